"""What the search must know of a relation: its columns, what its rows must fulfil, and SQL that changes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from postgast import pg_query_pb2 as pb
from postgast import walk
from psycopg import sql

from reconciler import pg
from reconciler.parts import raw
from reconciler.syntax import expression_of, quote_ident
from reconciler.violations.samples import Column, Constants, constants_of, joined

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from google.protobuf.message import Message
    from psycopg.sql import Composable, Composed

Row = dict[str, str | None]
"""Column -> value as text, NULL as None; every column of the relation."""


class Condition(NamedTuple):
    """A condition on the rows of a relation, as an expression over its columns."""

    text: str
    columns: frozenset[str]


class ForeignKey(NamedTuple):
    """Columns of a table, and those of another table (schema, name) where their values must be."""

    name: str
    ours: tuple[str, ...]
    schema: str
    table: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """A relation as the catalog describes it. `kind`: pg_class.relkind."""

    oid: int
    schema: str
    name: str
    kind: str
    columns: tuple[Column, ...]
    checks: tuple[Condition, ...] = ()
    """CHECK constraints, and for a partitioned table that a row belongs to one of its partitions."""
    unique: frozenset[str] = frozenset()
    """Columns of unique indexes."""
    foreign: tuple[ForeignKey, ...] = ()
    constants: Constants = field(default=Constants({}, ()))
    """Those of the checks."""

    @property
    def identifier(self) -> sql.Identifier:
        """For SQL."""
        return sql.Identifier(self.schema, self.name)

    @property
    def text(self) -> str:
        """For people."""
        return f"{quote_ident(self.schema)}.{quote_ident(self.name)}"


def describe(conn: pg.Connection, schema: str, name: str) -> Relation | None:
    """The relation with its columns and what its rows must fulfil; None when there is none of this name."""
    found = pg.rows(conn, _RELATION, (schema, name), doing=f"reading {schema}.{name}")
    if not found:
        return None
    oid, kind = found[0]["oid"], found[0]["relkind"]
    columns = tuple(
        Column(
            row["name"],
            row["type"],
            row["category"],
            row["element"],
            row["not_null"],
            None if "nextval(" in (row["default"] or "") else row["default"],
            row["generated"],
            tuple(row["labels"]),
        )
        for row in pg.rows(conn, _COLUMNS, (oid,), doing=f"reading the columns of {schema}.{name}")
    )
    texts = [row["text"] for row in pg.rows(conn, _CHECKS, {"oid": oid}, doing=f"reading the checks of {name}")]
    trees = [expression_of(text)[0] for text in texts if text]
    checks = tuple(
        # A CHECK that comes to NULL is fulfilled.
        Condition(f"({text}) IS NOT FALSE", frozenset(names_in(tree)))
        for text, tree in zip(texts, trees, strict=True)
        if tree is not None
    )
    unique = pg.rows(conn, _UNIQUE, (oid,), doing=f"reading the keys of {name}")
    keys = pg.rows(conn, _FOREIGN_KEYS, (oid,), doing=f"reading the foreign keys of {name}")
    return Relation(
        oid=oid,
        schema=schema,
        name=name,
        kind=kind,
        columns=columns,
        checks=checks,
        unique=frozenset(row["name"] for row in unique),
        foreign=tuple(
            ForeignKey(row["name"], tuple(row["ours"]), row["schema"], row["table"], tuple(row["theirs"]))
            for row in keys
        ),
        constants=joined(constants_of(tree) for tree in trees if tree is not None),
    )


def names_in(tree: Message) -> set[str]:
    """The names of the columns in a tree."""
    return {node.fields[-1].string.sval for _, node in walk(tree) if isinstance(node, pb.ColumnRef)}


_RELATION = """
SELECT c.oid::pg_catalog.int8 AS oid, c.relkind::pg_catalog.text AS relkind
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""

_COLUMNS = """
SELECT a.attname::pg_catalog.text AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type,
       b.typcategory::pg_catalog.text AS category, coalesce(e.typcategory::pg_catalog.text, '') AS element,
       a.attnotnull OR t.typnotnull AS not_null,
       CASE WHEN a.attgenerated = '' THEN coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), t.typdefault) END
           AS "default",
       CASE WHEN a.attgenerated <> '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) END AS generated,
       ARRAY(SELECT l.enumlabel::pg_catalog.text FROM pg_catalog.pg_enum l WHERE l.enumtypid = b.oid
              ORDER BY l.enumsortorder) AS labels
  FROM pg_catalog.pg_attribute a
  JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
  JOIN pg_catalog.pg_type b ON b.oid = CASE t.typbasetype WHEN 0 THEN t.oid ELSE t.typbasetype END
  LEFT JOIN pg_catalog.pg_type e ON e.oid = b.typelem AND b.typcategory = 'A'
  LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

_CHECKS = """
SELECT pg_catalog.pg_get_expr(k.conbin, k.conrelid) AS text
  FROM pg_catalog.pg_constraint k WHERE k.conrelid = %(oid)s AND k.contype = 'c'
UNION ALL
SELECT pg_catalog.string_agg('(' || coalesce(pg_catalog.pg_get_partition_constraintdef(i.inhrelid), 'true') || ')',
                             ' OR ' ORDER BY i.inhrelid)
  FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhparent AND c.relkind = 'p'
 WHERE i.inhparent = %(oid)s HAVING pg_catalog.count(*) > 0
"""

_UNIQUE = """
SELECT DISTINCT a.attname::pg_catalog.text AS name
  FROM pg_catalog.pg_index i
  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::pg_catalog.int2[])
 WHERE i.indrelid = %s AND i.indisunique
"""


_FOREIGN_KEYS = """
SELECT k.conname::pg_catalog.text AS name, n.nspname::pg_catalog.text AS schema, c.relname::pg_catalog.text AS "table",
       (SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY u.place)
          FROM pg_catalog.unnest(k.conkey) WITH ORDINALITY AS u (number, place)
          JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number) AS ours,
       (SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY u.place)
          FROM pg_catalog.unnest(k.confkey) WITH ORDINALITY AS u (number, place)
          JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number) AS theirs
  FROM pg_catalog.pg_constraint k
  JOIN pg_catalog.pg_class c ON c.oid = k.confrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE k.conrelid = %s AND k.contype = 'f' ORDER BY k.conname
"""


def value_of(column: Column, text: str | None) -> Composable:
    """A value for its column."""
    return sql.SQL("{}::{}").format(sql.Literal(text), raw(column.type))


def change(relation: Relation, values: Mapping[str, str | None], where: Composable) -> Composed:
    """An UPDATE of these columns."""
    pairs = [
        sql.SQL("{} = {}").format(sql.Identifier(column.name), value_of(column, values[column.name]))
        for column in relation.columns
        if column.name in values and column.generated is None
    ]
    return sql.SQL("UPDATE {} SET {} WHERE {}").format(relation.identifier, sql.SQL(", ").join(pairs), where)


def said(row: Mapping[str, str | None], names: Collection[str]) -> str:
    """Some values of a row, for people: ` (name = 'value')`, or nothing."""
    shown = [f"{name} = {_quoted(value)}" for name, value in row.items() if name in names]
    return f" ({', '.join(shown)})" if shown else ""


def _quoted(value: str | None) -> str:
    if value is None:
        return "NULL"
    return repr(value if len(value) <= 60 else f"{value[:57]}...")
