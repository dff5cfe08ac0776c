"""Beside the flow: rows that a table could hold, how they get into it, and what stands in the way.

For `violations`, inside transactions that are rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from postgast import pg_query_pb2 as pb
from postgast import walk
from psycopg import sql

from reconciler import pg
from reconciler.errors import ReconcilerError, ServerProblem
from reconciler.parts import raw
from reconciler.samples import Column, Constants, constants_of, fresh, guesses, joined
from reconciler.syntax import expression_of, quote_ident
from reconciler.trial import Attempt, diagnosis, kept, undone

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import psycopg
    from google.protobuf.message import Message
    from psycopg.sql import Composable, Composed

Row = dict[str, str | None]
"""Column -> value as text, NULL as None; every column of the relation."""

MOST_COMBINATIONS = 50_000
SEARCH_TIMEOUT_MS = 5_000
_DEEPEST = 4
"""How far foreign keys are followed."""


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


# ------------------------------------------------------------------------------------------------------------- reading


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


# -------------------------------------------------------------------------------------------------------- combinations


class Wanted(NamedTuple):
    """What the rows are for."""

    constants: Constants = Constants({}, ())
    varied: frozenset[str] = frozenset()
    """Columns that take every value that might matter."""
    fixed: Mapping[str, str | None] = {}
    """Columns whose value is given."""
    filters: tuple[Condition, ...] = ()
    """Constants that the rows fulfil if any can."""
    alias: str = ""
    """The name by which the filters call the relation."""


def rows_for(  # noqa: PLR0913 - what, for what, how, how many
    conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool, limit: int, depth: int = 0
) -> list[Row]:
    """Rows for the relation, always the same ones: first those that pass the filters, the simplest first.

    lawful: they fulfil NOT NULL and the checks; otherwise they need not where varied columns are concerned.
    """
    wanted = wanted._replace(fixed={**_borrowed(conn, relation, wanted, depth), **wanted.fixed})
    laws = _laws(relation, wanted, lawful=lawful)
    generated = [column for column in relation.columns if column.generated is not None]
    found: list[Row] = []
    for filters in dict.fromkeys((wanted.filters, ())):
        pools = _cut(values_for(conn, relation, wanted._replace(filters=filters), lawful=lawful))
        if all(pools.values()):
            source = _source(relation, pools, generated, wanted.alias)
            more = _passing(conn, source, [*pools, *(one.name for one in generated)], (*laws, *filters), limit)
            found += [row for row in more if row not in found]
    return found


def _borrowed(conn: pg.Connection, relation: Relation, wanted: Wanted, depth: int) -> Row:
    """For columns that must point somewhere and that nobody asks for: a row that is there, or one that could be."""
    found: Row = {}
    bound = {column.name for column in relation.columns if column.not_null}
    for key in relation.foreign if depth < _DEEPEST else ():
        parent = describe(conn, key.schema, key.table)
        free = bound & {*key.ours} and not {*key.ours} & {*wanted.varied, *wanted.fixed}
        if parent is None or parent.oid == relation.oid or not free:
            continue
        shown = [sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(name)) for name in key.theirs]
        query = sql.SQL("SELECT {} FROM {} LIMIT 1").format(sql.SQL(", ").join(shown), parent.identifier)
        rows: list[Row] = pg.rows(conn, query, doing=f"reading {parent.text}")
        for row in rows or rows_for(conn, parent, Wanted(), lawful=True, limit=1, depth=depth + 1):
            found |= {ours: row[theirs] for ours, theirs in zip(key.ours, key.theirs, strict=True)}
    return found


def values_for(conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool) -> dict[str, list[str | None]]:
    """The values to try in each column that can be written, without those that a condition on it alone refuses."""
    laws = _laws(relation, wanted, lawful=lawful)
    found = _pools(conn, relation, wanted, lawful=lawful)
    for check in (*laws, *wanted.filters):
        for name in check.columns & found.keys() if len(check.columns) == 1 else ():
            source = _source(relation, {name: found[name]}, (), wanted.alias)
            rows = _passing(conn, source, [name], (check,), len(found[name])) if found[name] else []
            # A filter that lets nothing through is no help; a law is a law.
            found[name] = [row[name] for row in rows] or ([] if check in laws else found[name])
    return found


def _laws(relation: Relation, wanted: Wanted, *, lawful: bool) -> tuple[Condition, ...]:
    return tuple(check for check in relation.checks if lawful or not check.columns & wanted.varied)


def told_apart(relation: Relation, care: Collection[str], rows: Sequence[Row]) -> list[Row]:
    """The rows with keys of their own, where nobody cares what the key is."""
    cared = {*care, *(name for check in relation.checks for name in check.columns)}
    keys = [column for column in relation.columns if column.name in relation.unique - cared]
    return [
        row | {column.name: fresh(column, number) or row[column.name] for column in keys if column.name in row}
        for number, row in enumerate(rows)
    ]


def _pools(conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool) -> dict[str, list[str | None]]:
    """The values to try in each column that can be written."""
    ruled = {name for check in relation.checks for name in check.columns}
    few = wanted.constants.every if len(wanted.constants.every) <= 12 else ()
    pools: dict[str, list[str | None]] = {}
    for column in relation.columns:
        if column.generated is not None:
            continue
        if column.name in wanted.fixed:
            pools[column.name] = [wanted.fixed[column.name]]
            continue
        own = relation.constants.columns.get(column.name, ())
        texts = (*wanted.constants.columns.get(column.name, ()), *own)
        default = [raw(column.default)] if column.default is not None else []
        bound = column.not_null and (lawful or column.name not in wanted.varied)
        nothing: list[str | None] = [] if bound else [None]
        if column.name in wanted.varied:
            pools[column.name] = [*_taken(conn, column, [*guesses(column, texts or few), *default]), *nothing]
        elif column.name in ruled:
            found = _taken(conn, column, [*default, *guesses(column, texts)[:8]])
            pools[column.name] = [*found[:1], *nothing, *found[1:]] if default else [*nothing, *found]
        elif default or column.not_null:
            found = _taken(conn, column, default or guesses(column, texts)[:8])
            pools[column.name] = [*found[:1]] or nothing
        else:
            pools[column.name] = [None]
    return pools


def _taken(conn: pg.Connection, column: Column, expressions: Sequence[Composable]) -> list[str]:
    """The values of those expressions that the column's type takes, as the server prints them, each once."""
    casts = [sql.SQL("({})::{}::pg_catalog.text").format(one, raw(column.type)) for one in expressions]

    def ask(some: Sequence[Composable]) -> list[str | None]:
        query = sql.SQL("SELECT ARRAY[{}]::pg_catalog.text[] AS found").format(sql.SQL(", ").join(some))
        try:
            with undone(conn):
                return pg.rows(conn, query)[0]["found"]
        except ReconcilerError:
            # One that it does not take spoils the question: ask for each half.
            half = len(some) // 2
            return [*ask(some[:half]), *ask(some[half:])] if half else []

    found = ask(casts) if casts else []
    return list(dict.fromkeys(text for text in found if text is not None))


def _cut(pools: Mapping[str, list[str | None]]) -> dict[str, list[str | None]]:
    """The pools, the longest shortened until their combinations can be counted."""
    found = dict(pools)
    while prod(map(len, found.values())) > MOST_COMBINATIONS:
        longest = max(found, key=lambda name: len(found[name]))
        found[longest] = found[longest][: len(found[longest]) * 2 // 3]
    return found


class _Source(NamedTuple):
    """A FROM item with every combination of some values, and how to sort it: the first values of each first."""

    item: Composable
    order: list[Composable]


def _source(
    relation: Relation, pools: Mapping[str, Sequence[str | None]], generated: Sequence[Column], alias: str
) -> _Source:
    types = {column.name: raw(column.type) for column in relation.columns}
    values: list[Composable] = []
    tables: list[Composable] = []
    places: list[Composable] = []
    for name, pool in pools.items():
        if len(pool) == 1:
            value = sql.SQL("{}::{} AS {}").format(sql.Literal(pool[0]), types[name], sql.Identifier(name))
            values.append(value)
            continue
        # A name that no column has: 64 bytes would be cut.
        table, place = sql.Identifier(f"t!{len(tables)}"), sql.Identifier(f"o!{len(tables)}")
        rows = sql.SQL(", ").join(
            sql.SQL("({}, {}::{})").format(sql.Literal(number), sql.Literal(text), types[name])
            for number, text in enumerate(pool)
        )
        tables.append(sql.SQL("(VALUES {}) AS {} ({}, v)").format(rows, table, place))
        values.append(sql.SQL("{}.v AS {}").format(table, sql.Identifier(name)))
        places.append(place)
    inner = sql.SQL("SELECT {}").format(sql.SQL(", ").join([*values, *places]))
    if tables:
        inner += sql.SQL(" FROM ") + sql.SQL(" CROSS JOIN ").join(tables)
    name = sql.Identifier(alias or relation.name)
    if generated:
        more = [sql.SQL("{} AS {}").format(raw(one.generated or ""), sql.Identifier(one.name)) for one in generated]
        inner = sql.SQL("SELECT {}.*, {} FROM ({}) AS {}").format(name, sql.SQL(", ").join(more), inner, name)
    order = [sql.SQL(" + ").join(places), *places] if places else []
    return _Source(sql.SQL("({}) AS {}").format(inner, name), order)


def _passing(
    conn: pg.Connection, source: _Source, columns: Sequence[str], filters: Sequence[Condition], limit: int
) -> list[Row]:
    """The combinations that pass, computed by the server, so that conditions mean what they mean in the query.

    Filters that cannot be evaluated on such rows are left out, the last ones first.
    """
    shown = [sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(name)) for name in columns]
    query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(shown), source.item)
    if filters:
        query += sql.SQL(" WHERE ") + sql.SQL(" AND ").join(sql.SQL("({})").format(raw(one.text)) for one in filters)
    if source.order:
        query += sql.SQL(" ORDER BY ") + sql.SQL(", ").join(source.order)
    query += sql.SQL(" LIMIT {}").format(sql.Literal(limit))
    try:
        with undone(conn):
            pg.timeout(conn, SEARCH_TIMEOUT_MS)
            return pg.rows(conn, query, doing="combining values")
    except ReconcilerError:
        return _passing(conn, source, columns, filters[:-1], limit) if filters else []


# ------------------------------------------------------------------------------------------------------------- writing


def put(  # noqa: PLR0913, PLR0917 - what goes where, and how far one may go
    conn: pg.Connection,
    relation: Relation,
    row: Row,
    care: Collection[str],
    lifted: list[str] | None,
    depth: int = 0,
) -> None:
    """Insert the row, with the rows that its foreign keys ask for; or change the row that has its key already.

    care: the columns that matter when a row is changed. lifted: what stands in the way is taken away, and named in
    here; None: nothing is taken away. Raises ReconcilerError when the server does not let it happen.
    """
    columns = [column for column in relation.columns if column.generated is None and column.name in row]
    statement = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
        relation.identifier,
        sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        sql.SQL(", ").join(value_of(column, row[column.name]) for column in columns),
    )
    changed = False
    for _ in range(_OBSTACLES):
        try:
            with kept(conn):
                pg.run(conn, statement, f"writing to {relation.text}")
        except ReconcilerError as error:
            diag = diagnosis(error)
            if diag is None:
                raise
            taken = diag.sqlstate == "23505" and lifted is None and not changed
            if taken and (instead := _change_of(conn, relation, row, care, diag)):
                statement, changed = instead, True
            elif diag.sqlstate == "23503" and depth < _DEEPEST and _parent(conn, relation, row, diag, lifted, depth):
                continue
            elif lifted is not None and (what := lift(conn, relation, diag)):
                lifted.append(what)
            else:
                raise
        else:
            return
    raise ServerProblem(f"too much stands in the way of a row for {relation.text}")


_OBSTACLES = 16


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


def _change_of(
    conn: pg.Connection, relation: Relation, row: Row, care: Collection[str], diag: psycopg.errors.Diagnostic
) -> Composed | None:
    """Instead of the insert: an UPDATE of the row that has the key already; None when the key is an expression."""
    found = pg.rows(conn, _KEY, (diag.schema_name, diag.constraint_name), doing=f"reading the keys of {relation.text}")
    names = {one["name"] for one in found}
    values = {name: row[name] for name in care if name in row and name not in names}
    if not names or not values:
        return None
    where = sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(column.name), value_of(column, row[column.name]))
        for column in relation.columns
        if column.name in names
    )
    return change(relation, values, where)


_KEY = """
SELECT a.attname::pg_catalog.text AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid AND i.indexprs IS NULL
  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::pg_catalog.int2[])
 WHERE n.nspname = %s AND c.relname = %s
"""


def _parent(  # noqa: PLR0913, PLR0917 - as put
    conn: pg.Connection,
    relation: Relation,
    row: Row,
    diag: psycopg.errors.Diagnostic,
    lifted: list[str] | None,
    depth: int,
) -> bool:
    """Make the row that a foreign key asks for. False when there is no way to."""
    key = next((one for one in relation.foreign if one.name == diag.constraint_name), None)
    parent = describe(conn, key.schema, key.table) if key is not None else None
    if key is None or parent is None:
        return False
    pairs = {theirs: row[ours] for ours, theirs in zip(key.ours, key.theirs, strict=True)}
    if None in pairs.values():
        return False
    rows = rows_for(conn, parent, Wanted(fixed=pairs), lawful=True, limit=1)
    if not rows:
        return False
    try:
        with kept(conn):
            put(conn, parent, rows[0], (), lifted, depth + 1)
    except ReconcilerError:
        return False
    return True


# ----------------------------------------------------------------------------------------------- what stands in the way


def force(conn: pg.Connection, relation: Relation, statement: Composed, doing: str, lifted: list[str] | None) -> None:
    """Execute a statement; lifted: as in `put`. Raises ReconcilerError when the server does not let it happen."""
    for _ in range(_OBSTACLES):
        try:
            with kept(conn):
                pg.run(conn, statement, doing)
        except ReconcilerError as error:
            diag = diagnosis(error)
            what = lift(conn, relation, diag) if diag is not None and lifted is not None else None
            if what is None or lifted is None:
                raise
            lifted.append(what)
        else:
            return
    raise ServerProblem(f"too much stands in the way of a change of {relation.text}")


def past(attempt: Attempt, lifted: Sequence[str] | None) -> Attempt:
    """The attempt, saying what had to be taken away for it."""
    return attempt.model_copy(update={"without": tuple(dict.fromkeys(lifted))}) if lifted else attempt


def lift(conn: pg.Connection, relation: Relation, diag: psycopg.errors.Diagnostic) -> str | None:
    """Take away what refused a row, and say what it was; None when it cannot be told or taken away."""
    there = sql.Identifier(diag.schema_name or relation.schema, diag.table_name or relation.name)
    name = sql.Identifier(diag.constraint_name or "")
    ways: list[tuple[str, Composed]] = []
    if diag.sqlstate == "23502" and diag.column_name:
        column = sql.Identifier(diag.column_name)
        words = f"NOT NULL of {diag.table_name}.{diag.column_name}"
        ways = [(words, sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP NOT NULL").format(there, column))]
    elif diag.constraint_name and diag.datatype_name and not diag.table_name:
        domain = sql.Identifier(diag.schema_name or "", diag.datatype_name)
        words = f"constraint {diag.constraint_name} of domain {diag.datatype_name}"
        ways = [(words, sql.SQL("ALTER DOMAIN {} DROP CONSTRAINT {}").format(domain, name))]
    elif diag.constraint_name:
        words = f"{_KINDS.get(diag.sqlstate or '', 'constraint')} {diag.constraint_name}"
        drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {} CASCADE")
        index = sql.Identifier(diag.schema_name or relation.schema, diag.constraint_name)
        ways = [
            (words, drop.format(there, name)),
            (words, drop.format(relation.identifier, name)),
            (f"unique index {diag.constraint_name}", sql.SQL("DROP INDEX {}").format(index)),
        ]
    for words, statement in ways:
        try:
            with kept(conn):
                pg.run(conn, statement, words)
        except ReconcilerError:
            continue
        return words
    return lift_triggers(conn, relation, diag.context or "")


_KINDS = {
    "23514": "CHECK constraint",
    "23503": "foreign key",
    "23505": "unique constraint",
    "23P01": "exclusion constraint",
}


def lift_triggers(conn: pg.Connection, relation: Relation, context: str = "") -> str | None:
    """Disable the triggers whose function the context names, or else all that are enabled; None when there is none."""
    found = pg.rows(conn, _TRIGGERS, (relation.oid,), doing=f"reading the triggers of {relation.text}")
    guilty: list[str] = [row["name"] for row in found if f"{row['function']}(" in context] or [
        row["name"] for row in found
    ]
    try:
        with kept(conn):
            for name in guilty:
                statement = sql.SQL("ALTER TABLE {} DISABLE TRIGGER {}")
                pg.run(conn, statement.format(relation.identifier, sql.Identifier(name)), f"disabling {name}")
    except ReconcilerError:
        return None
    return f"trigger {', '.join(guilty)}" if guilty else None


_TRIGGERS = """
SELECT t.tgname::pg_catalog.text AS name, p.proname::pg_catalog.text AS function
  FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = %s AND NOT t.tgisinternal AND t.tgenabled <> 'D' ORDER BY t.tgname
"""


def said(row: Mapping[str, str | None], names: Collection[str]) -> str:
    """Some values of a row, for people: ` (name = 'value')`, or nothing."""
    shown = [f"{name} = {_quoted(value)}" for name, value in row.items() if name in names]
    return f" ({', '.join(shown)})" if shown else ""


def _quoted(value: str | None) -> str:
    if value is None:
        return "NULL"
    return repr(value if len(value) <= 60 else f"{value[:57]}...")
