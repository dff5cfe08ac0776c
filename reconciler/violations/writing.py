"""Rows into real tables: with what they need elsewhere, or, where that is wanted, with what refuses them taken away."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import pg
from reconciler.errors import ReconcilerError, ServerProblem
from reconciler.violations.relations import Relation, Row, change, describe, value_of
from reconciler.violations.rows import DEEPEST, Wanted, rows_for
from reconciler.violations.trial import Attempt, diagnosis, kept

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Sequence

    import psycopg
    from psycopg.sql import Composed


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
    here; None: nothing is taken away. depth: how far foreign keys were followed; DEEPEST: they are not. Raises
    ReconcilerError when the server does not let it happen.
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
            elif diag.sqlstate == "23503" and depth < DEEPEST and _parent(conn, relation, row, diag, lifted, depth):
                continue
            elif lifted is not None and (what := lift(conn, relation, diag)):
                lifted.append(what)
            else:
                raise
        else:
            return
    raise ServerProblem(f"too much stands in the way of a row for {relation.text}")


_OBSTACLES = 16


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


REPLICA = sql.Composed([sql.SQL("SET LOCAL session_replication_role = replica")])
"""Triggers and foreign keys sleep from here on. Only a superuser may, or who was granted this setting."""


@contextmanager
def asleep(conn: pg.Connection) -> Generator[None]:
    """What is written inside is written past triggers and foreign keys, where the role may do that."""
    try:
        with kept(conn):
            pg.run(conn, REPLICA)
    except ReconcilerError:
        yield
        return
    yield
    pg.run(conn, "SET LOCAL session_replication_role = origin")


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


def domains(conn: pg.Connection, relations: Sequence[Relation], columns: Collection[str]) -> list[tuple[str, Composed]]:
    """The constraints of the domains that those columns have, in words and as statements that take them away."""
    rows = pg.rows(
        conn, _DOMAINS, ([one.oid for one in relations], list(columns)), doing="reading the constraints of domains"
    )
    return [
        (
            f"constraint {row['name']} of domain {row['domain']}",
            sql.SQL("ALTER DOMAIN {} DROP CONSTRAINT {}").format(
                sql.Identifier(row["schema"], row["domain"]), sql.Identifier(row["name"])
            ),
        )
        for row in rows
    ]


_DOMAINS = """
SELECT DISTINCT n.nspname::pg_catalog.text AS schema, t.typname::pg_catalog.text AS domain,
       k.conname::pg_catalog.text AS name
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
  JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
  JOIN pg_catalog.pg_constraint k ON k.contypid = t.oid AND k.contype = 'c'
 WHERE a.attrelid = ANY (%s::pg_catalog.oid[]) AND a.attname = ANY (%s::pg_catalog.name[]) ORDER BY 1, 2, 3
"""
