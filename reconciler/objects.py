"""Beside the flow: real objects, made, changed or dropped because a query about the catalog speaks of them.

For `counterexamples`: what a query over pg_proc or pg_constraint sees changes honestly only by DDL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.parts import raw
from reconciler.rowmaking import Relation, describe
from reconciler.tampering import NAME, Tampering, new_extension, new_function, of_function, of_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


# -------------------------------------------------------------------------------------------------------------- making


Statements = "tuple[Composed, ...]"

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

_SIMPLE: dict[str, tuple[LiteralString, ...]] = {
    "pg_authid": (
        "CREATE ROLE {name}",
        "CREATE ROLE {name} SUPERUSER CREATEDB CREATEROLE LOGIN REPLICATION BYPASSRLS",
    ),
    "pg_foreign_data_wrapper": ("CREATE FOREIGN DATA WRAPPER {name}",),
    "pg_namespace": ("CREATE SCHEMA {name}",),
    "pg_publication": ("CREATE PUBLICATION {name} FOR ALL TABLES", "CREATE PUBLICATION {name}"),
    "pg_subscription": ("CREATE SUBSCRIPTION {name} CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false)",),
}

_IN_SCHEMA: dict[str, tuple[LiteralString, ...]] = {
    "pg_class": (
        "CREATE TABLE {place} (id pg_catalog.int4)",
        "CREATE VIEW {place} AS SELECT 1 AS id",
        "CREATE SEQUENCE {place}",
    ),
    "pg_type": ("CREATE TYPE {place} AS ENUM ('x')", "CREATE DOMAIN {place} AS pg_catalog.int4"),
}

_ON_TABLE: dict[str, tuple[LiteralString, ...]] = {
    "pg_attribute": ("ALTER TABLE {table} ADD COLUMN {name} pg_catalog.int4",),
    "pg_constraint": ("ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NULL OR {column} IS NOT NULL)",),
    "pg_policy": ("CREATE POLICY {name} ON {table} USING (true)",),
}


def makings(catalog: str, names: Sequence[str], objects: Named) -> Iterator[Tampering]:
    """Objects of a catalog, under each of these names, where the query would look for them."""
    for name in names:
        yield from _makings(catalog, name, objects)


def _makings(catalog: str, name: str, objects: Named) -> Iterator[Tampering]:  # noqa: PLR0912 - one per catalog
    own = sql.Identifier(name)
    for text in _SIMPLE.get(catalog, ()):
        yield _filled(text, name=own)
    for schema in objects.schemas:
        place = sql.Identifier(schema, name)
        for text in _IN_SCHEMA.get(catalog, ()):
            yield _filled(text, place=place)
        if catalog == "pg_proc":
            yield _shown(new_function(schema, name))
    for table in objects.tables if catalog in _ON_TABLE else ():
        for column in table.columns if catalog == "pg_constraint" else table.columns[:1]:
            for text in _ON_TABLE[catalog]:
                values = {"table": table.identifier, "name": own, "column": sql.Identifier(column.name)}
                yield _filled(text, **values)
    if catalog == "pg_extension":
        yield Tampering(f"extension {name} made", new_extension(name))
    elif catalog == "pg_foreign_server":
        wrapper = _filled("CREATE FOREIGN DATA WRAPPER {name}", name=sql.Identifier(NAME))
        yield _after(wrapper, "CREATE SERVER {name} FOREIGN DATA WRAPPER {wrapper}", own)
    elif catalog == "pg_event_trigger":
        function = _filled(
            "CREATE FUNCTION {place}() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
            place=sql.Identifier(objects.schemas[0], NAME) if objects.schemas else sql.Identifier("public", NAME),
        )
        yield _after(function, "CREATE EVENT TRIGGER {name} ON ddl_command_end EXECUTE FUNCTION {function}()", own)
    elif catalog == "pg_trigger":
        for table in objects.tables:
            function = _filled(
                "CREATE FUNCTION {place}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
                place=sql.Identifier(table.schema, NAME),
            )
            yield _after(
                function,
                "CREATE TRIGGER {name} AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
                own,
                table,
            )


def _filled(text: LiteralString, **values: sql.Composable) -> Tampering:
    return _shown((sql.SQL(text).format(**values),))


def _after(before: Tampering, text: LiteralString, name: sql.Identifier, table: Relation | None = None) -> Tampering:
    """A statement that needs what another one made."""
    ...


def _shown(statements: tuple[Composed, ...]) -> Tampering:
    return Tampering("; ".join(statement.as_string(None) for statement in statements), (statements,))
