"""Beside the flow: real objects, made, changed or dropped because a query about the catalog speaks of them.

For `counterexamples`: what a query over pg_proc or pg_constraint sees changes honestly only by DDL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.parts import raw
from reconciler.violations.relations import Relation, describe
from reconciler.violations.tampering import NAME, Tampering, new_extension, of_function, of_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg.sql import Composed

FEW = 3
"""How many tables, functions or schemas are taken when a query names none."""


class Named(NamedTuple):
    """What the constants of a query name: existing objects; a few of the user's where none is named."""

    tables: tuple[Relation, ...]
    functions: tuple[tuple[int, str], ...]
    """oid and identity."""
    schemas: tuple[str, ...]
    roles: tuple[str, ...]
    """Only those that are named."""


_TABLES = """
SELECT n.nspname::pg_catalog.text AS schema, c.relname::pg_catalog.text AS name,
       c.relname = ANY (%(texts)s) OR c.oid::pg_catalog.regclass::pg_catalog.text = ANY (%(texts)s) AS named
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^(pg_|information_schema$)'
 ORDER BY 3 DESC, c.relkind, 1, 2 LIMIT 20
"""

_FUNCTIONS = """
SELECT p.oid::pg_catalog.int8 AS oid, p.oid::pg_catalog.regprocedure::pg_catalog.text AS identity,
       p.proname = ANY (%(texts)s) OR p.oid::pg_catalog.regprocedure::pg_catalog.text = ANY (%(texts)s)
       OR p.oid::pg_catalog.regproc::pg_catalog.text = ANY (%(texts)s) AS named
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 WHERE p.prokind IN ('f', 'p') AND n.nspname !~ '^(pg_|information_schema$)'
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
 ORDER BY 3 DESC, 2 LIMIT 20
"""

_SCHEMAS = """
SELECT n.nspname::pg_catalog.text AS name,
       n.nspname = ANY (%(texts)s) OR n.oid::pg_catalog.regnamespace::pg_catalog.text = ANY (%(texts)s)
       OR n.oid::pg_catalog.text = ANY (%(texts)s) AS named
  FROM pg_catalog.pg_namespace n WHERE n.nspname !~ '^(pg_|information_schema$)' ORDER BY 2 DESC, 1 LIMIT 20
"""


def named(conn: pg.Connection, texts: Sequence[str]) -> Named:
    """Look up what the constants name."""

    def some(query: LiteralString) -> list[dict[str, Any]]:
        rows = pg.rows(conn, query, {"texts": list(texts)}, doing="looking up what a query names")
        return [row for row in rows if row["named"]] or rows[:FEW]

    tables = [describe(conn, row["schema"], row["name"]) for row in some(_TABLES)]
    roles = pg.rows(
        conn,
        "SELECT rolname::pg_catalog.text AS name FROM pg_catalog.pg_roles WHERE rolname = ANY (%s) ORDER BY 1",
        (list(texts),),
        doing="looking up what a query names",
    )
    return Named(
        tuple(table for table in tables if table is not None),
        tuple((row["oid"], row["identity"]) for row in some(_FUNCTIONS)),
        tuple(row["name"] for row in some(_SCHEMAS)),
        tuple(row["name"] for row in roles),
    )


# --------------------------------------------------------------------------------------------------------------- making


NAME_COLUMNS = {
    "pg_attribute": "attname",
    "pg_authid": "rolname",
    "pg_class": "relname",
    "pg_constraint": "conname",
    "pg_event_trigger": "evtname",
    "pg_extension": "extname",
    "pg_foreign_data_wrapper": "fdwname",
    "pg_foreign_server": "srvname",
    "pg_namespace": "nspname",
    "pg_policy": "polname",
    "pg_proc": "proname",
    "pg_publication": "pubname",
    "pg_subscription": "subname",
    "pg_trigger": "tgname",
    "pg_type": "typname",
}
"""Catalogs whose objects can be made, with the column that holds their name."""

_MAKINGS: dict[str, tuple[tuple[LiteralString, ...], ...]] = {
    "pg_attribute": (("ALTER TABLE {table} ADD COLUMN {name} pg_catalog.int4",),),
    "pg_authid": (
        ("CREATE ROLE {name}",),
        ("CREATE ROLE {name} SUPERUSER CREATEDB CREATEROLE LOGIN REPLICATION BYPASSRLS",),
    ),
    "pg_class": (
        ("CREATE TABLE {place} (id pg_catalog.int4)",),
        ("CREATE VIEW {place} AS SELECT 1 AS id",),
        ("CREATE SEQUENCE {place}",),
    ),
    "pg_constraint": (
        ("ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NULL OR {column} IS NOT NULL)",),
        ("ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NULL OR {column} IS NOT NULL) NOT VALID",),
    ),
    "pg_event_trigger": (
        (
            "CREATE FUNCTION {helper}() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
            "CREATE EVENT TRIGGER {name} ON ddl_command_end EXECUTE FUNCTION {helper}()",
        ),
    ),
    "pg_foreign_data_wrapper": (("CREATE FOREIGN DATA WRAPPER {name}",),),
    "pg_foreign_server": (("CREATE FOREIGN DATA WRAPPER {new}", "CREATE SERVER {name} FOREIGN DATA WRAPPER {new}"),),
    "pg_namespace": (("CREATE SCHEMA {name}",),),
    "pg_policy": (("CREATE POLICY {name} ON {table} USING (true)",),),
    "pg_proc": (
        ("CREATE FUNCTION {place}(pg_catalog.line) RETURNS pg_catalog.int4 LANGUAGE sql AS 'SELECT 1'",),
        ("CREATE PROCEDURE {place}(pg_catalog.line) LANGUAGE sql AS 'SELECT 1'",),
    ),
    "pg_publication": (("CREATE PUBLICATION {name} FOR ALL TABLES",), ("CREATE PUBLICATION {name}",)),
    "pg_subscription": (("CREATE SUBSCRIPTION {name} CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false)",),),
    "pg_trigger": (
        (
            "CREATE FUNCTION {helper}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER {name} AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {helper}()",
        ),
    ),
    "pg_type": (("CREATE TYPE {place} AS ENUM ('x')",), ("CREATE DOMAIN {place} AS pg_catalog.int4",)),
}


def makings(catalog: str, names: Sequence[str], objects: Named) -> Iterator[Tampering]:
    """Objects of a catalog under each of these names, wherever the query might look for them."""
    if catalog == "pg_extension":
        yield from (Tampering(f"extension {name} made", new_extension(name)) for name in names)
        return
    schemas = objects.schemas or ("public",)
    helper = sql.Identifier(schemas[0], NAME)
    for name in names:
        for texts in _MAKINGS[catalog]:
            whole = "".join(texts)
            for schema in schemas if "{place}" in whole else schemas[:1]:
                values = {
                    "name": sql.Identifier(name),
                    "new": sql.Identifier(NAME),
                    "place": sql.Identifier(schema, name),
                    "helper": helper,
                }
                for spot in _spots(objects.tables, whole):
                    yield _shown(tuple(sql.SQL(text).format(**values, **spot) for text in texts))


def _spots(tables: Sequence[Relation], text: str) -> Iterator[dict[str, sql.Identifier]]:
    """What {table} and {column} stand for in turn; once nothing, when the text has neither."""
    if "{table}" not in text:
        yield {}
        return
    for table in tables:
        for column in table.columns if "{column}" in text else table.columns[:1]:
            yield {"table": table.identifier, "column": sql.Identifier(column.name)}


def _shown(statements: tuple[Composed, ...]) -> Tampering:
    return Tampering("; ".join(statement.as_string(None) for statement in statements), (statements,))


# ------------------------------------------------------------------------------------------------ changing and dropping


def changes(conn: pg.Connection, objects: Named) -> Iterator[Tampering]:
    """Every facet of the tables and functions that are named, and what the named roles may do with them."""
    yield from _grants(objects)
    for table in objects.tables:
        for facet in of_table(conn, table):
            yield Tampering(f"{table.text}: {facet.words}", facet.ways)
    for oid, _ in objects.functions:
        yield from of_function(conn, oid)


def _grants(objects: Named) -> Iterator[Tampering]:
    roles = [sql.SQL("PUBLIC"), *map(sql.Identifier, objects.roles)]
    targets = [
        *(sql.SQL("TABLE {}").format(table.identifier) for table in objects.tables),
        *(sql.SQL("ROUTINE {}").format(raw(identity)) for _, identity in objects.functions),
        *(sql.SQL("SCHEMA {}").format(sql.Identifier(schema)) for schema in objects.schemas),
    ]
    for target in targets:
        for role in roles:
            yield _shown((sql.SQL("GRANT ALL ON {} TO {}").format(target, role),))
            yield _shown((sql.SQL("REVOKE ALL ON {} FROM PUBLIC, {} CASCADE").format(target, role),))
    for role in roles[1:]:
        for other in roles[1:]:
            if role is not other:
                yield _shown((sql.SQL("GRANT {} TO {}").format(role, other),))
        yield _shown((sql.SQL("ALTER ROLE {} SUPERUSER").format(role),))
        yield _shown((sql.SQL("ALTER ROLE {} NOSUPERUSER").format(role),))


def drops(conn: pg.Connection, catalog: str, texts: Sequence[str]) -> Iterator[Tampering]:
    """The objects of a catalog that the constants name, dropped one by one with everything that needs them."""
    column = NAME_COLUMNS[catalog]
    if catalog in {"pg_attribute", "pg_authid"}:
        return  # a column is a facet of its table; a role has things everywhere
    query = sql.SQL(
        "SELECT (pg_catalog.pg_identify_object({}::pg_catalog.regclass, x.oid, 0)).* FROM {} AS x"
        " WHERE x.{} = ANY (%s::pg_catalog.name[]) ORDER BY x.oid LIMIT 4"
    ).format(sql.Literal(f"pg_catalog.{catalog}"), sql.Identifier("pg_catalog", catalog), sql.Identifier(column))
    for row in pg.rows(conn, query, (list(texts),), doing="looking up what a query names"):
        kind, identity = row["type"], row["identity"]
        if kind == "table constraint":
            name, _, table = identity.rpartition(" on ")
            yield _shown((sql.SQL("ALTER TABLE {} DROP CONSTRAINT {} CASCADE").format(raw(table), raw(name)),))
        else:
            yield _shown((sql.SQL("DROP {} {} CASCADE").format(raw(kind), raw(identity)),))
