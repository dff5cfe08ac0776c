"""Beside the flow: a scratch database, and what is copied into it of the target: roles, schema, single rows.

A rehearsal and the trial of a backup need the same. Nothing is written to the target.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import pg, programs, sandbox
from reconciler.errors import ServerProblem
from reconciler.model import Absent
from reconciler.parts import identifier, relation
from reconciler.secrets import STAND_IN

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping, Sequence
    from typing import IO, Any

    from reconciler.model import Address, Desired, Json


@contextmanager
def database(dsn: str | None = None) -> Generator[str]:
    """The database that was named, or one of an embedded server that ends with us. Raises SandboxError."""
    if dsn is not None:
        yield dsn
        return
    folder = Path(tempfile.mkdtemp(prefix="reconciler-scratch-"))
    if os.geteuid() == 0:
        folder.chmod(0o711)  # the server's account passes through
    data = folder / "sandbox"
    try:
        yield sandbox.here(sandbox.up(None, data))
    finally:
        sandbox.down(data)
        shutil.rmtree(folder, ignore_errors=True)


def copy_roles(conn: pg.Connection, copy: pg.Connection) -> None:
    """Roles belong to the server: those that the scratch server lacks are made there, without password and log-in."""
    query = "SELECT rolname::pg_catalog.text AS name, rolinherit FROM pg_catalog.pg_roles WHERE rolname !~ '^pg_'"
    # In this order: on one and the same server a role that somebody makes meanwhile is not made again.
    wanted = {row["name"]: row["rolinherit"] for row in pg.rows(conn, query)}
    there = {row["name"] for row in pg.rows(copy, query)}
    new = {name: inherits for name, inherits in wanted.items() if name not in there}
    for name, inherits in new.items():
        create = sql.SQL("CREATE ROLE {} {}").format(
            sql.Identifier(name), sql.SQL("INHERIT" if inherits else "NOINHERIT")
        )
        pg.run(copy, create, f"making role {name} on the scratch server")
    for row in pg.rows(conn, _MEMBERS):
        if row["member"] in new:
            grant = sql.SQL("GRANT {} TO {}").format(sql.Identifier(row["role"]), sql.Identifier(row["member"]))
            pg.run(copy, grant, f"making {row['member']} a member of {row['role']} on the scratch server")


_MEMBERS = """
SELECT DISTINCT r.rolname::pg_catalog.text AS role, m.rolname::pg_catalog.text AS member
  FROM pg_catalog.pg_auth_members a JOIN pg_catalog.pg_roles r ON r.oid = a.roleid
  JOIN pg_catalog.pg_roles m ON m.oid = a.member
 ORDER BY 1, 2
"""


def copy_schema(
    conn: pg.Connection, copy: pg.Connection, dsn: str | None, scratch: str, *, snapshot: str | None = None
) -> None:
    """Load the target's schema in one transaction, without our ledger and the extensions that the scratch server lacks.

    conn and copy are open to dsn and scratch. snapshot: one that `conn` exported. Raises MissingProgram, ServerProblem.
    """
    tools = programs.newest(conn.info.server_version // 10_000)
    query = "SELECT name::pg_catalog.text AS name FROM pg_catalog.pg_available_extensions"
    available = {row["name"] for row in pg.rows(copy, query)}
    installed = [row["name"] for row in pg.rows(conn, "SELECT extname::pg_catalog.text AS name FROM pg_extension")]
    without = [f"--exclude-extension={name}" for name in installed if name not in available]
    options = ["--schema-only", "--exclude-schema=reconciler", "--no-publications", "--no-subscriptions", *without]
    with tempfile.TemporaryFile() as file:
        seen = [f"--snapshot={snapshot}"] if snapshot else []
        _completed("pg_dump", dump(conn, tools, [*options, *seen], dsn, into=file))
        file.seek(0)
        text = file.read().decode()
        newer = "SET transaction_timeout = 0;\n" if copy.info.server_version < 170_000 else ""
        execute(tools, text.replace(newer, "", 1) if newer else text, scratch)


def dump(  # noqa: PLR0913 - as `programs.client`
    conn: pg.Connection,
    tools: programs.Tools,
    options: Sequence[str | Path],
    dsn: str | None,
    *,
    into: IO[bytes] | None = None,
    waiting: Callable[[float], None] | None = None,
) -> programs.Done:
    """Run pg_dump on the database that `conn` is open to. Raises ServerProblem, and what `programs.client` raises.

    What it sets in its session (an empty search_path, for one) it leaves there.
    """
    if pg.shared(conn, dsn):
        raise ServerProblem(
            "pg_dump needs a session of its own, and by this pooler the application would have it next.",
            hint="Nothing was changed. Name the server itself with --dsn, or a pool in session mode.",
        )
    return programs.client(tools, "pg_dump", options, dsn, into=into, waiting=waiting)


def execute(tools: programs.Tools, text: str, scratch: str) -> None:
    """Run a script by psql, in one transaction. Raises ServerProblem."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", "-"]
        _completed("psql", programs.client(tools, "psql", options, scratch, given=file))


def _completed(program: str, done: programs.Done) -> None:
    if done.code:
        raise ServerProblem(f"{program} {done.how}.", details=done.said)


# ---------------------------------------------------------------------------------------------------------------- rows


def rows_of(desired: Desired) -> dict[Address, tuple[str, dict[str, str]]]:
    """Table and key of the row of every declared gate and marker."""
    found: dict[Address, tuple[str, dict[str, str]]] = {}
    for address, item in desired.items.items():
        if item.kind == "gate":
            store: Any = getattr(item.rules, "store")  # noqa: B009 - only gates have one
            found[address] = (store.table, {store.key: item.name})
        elif item.kind == "marker":
            spec: Json = item.spec.at if isinstance(item.spec, Absent) else item.spec.dump()
            found[address] = (spec["table"], spec["key"])
    return found


def secret_columns(desired: Desired) -> dict[tuple[str, str], set[str]]:
    """Columns that hold a secret, by table and key of the row, for `row`: also where a marker is the same row."""
    found: dict[tuple[str, str], set[str]] = {}
    places = rows_of(desired)
    for address in secret(desired):
        rules: Any = desired.items[address].rules
        found.setdefault(place(*places[address]), set()).add(rules.store.value)
    return found


def secret(desired: Desired) -> set[Address]:
    """The gates whose values may not leave the server."""
    return {address for address, item in desired.items.items() if getattr(item.rules, "secret", False)}


def place(table: str, key: Mapping[str, str]) -> tuple[str, str]:
    """Table and key as something to look a row up by."""
    return ".".join(relation(table)), json.dumps(key, sort_keys=True)


def row(
    conn: pg.Connection, table: str, key: Mapping[str, str], without: Collection[str] = ()
) -> dict[str, str | None] | None:
    """The row with this key, each column as text in the server's own form; generated ones are left out.

    without: columns that are not even read.
    """
    stored = [found["name"] for found in pg.rows(conn, _STORED, relation(table), doing=f"reading {table}")]
    columns = [name for name in stored if name not in without]
    where = sql.SQL(" AND ").join(
        sql.SQL("t.{}::pg_catalog.text = {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in key.items()
    )
    texts = sql.SQL(", ").join(
        sql.SQL("t.{0}::pg_catalog.text AS {0}").format(sql.Identifier(column)) for column in columns
    )
    query = sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(texts, identifier(table), where)
    found = pg.rows(conn, query, doing=f"reading {table}")
    return found[0] if found else None


_STORED = """
SELECT a.attname::pg_catalog.text AS name
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
 ORDER BY a.attnum
"""


def insert(table: str, row: Mapping[str, str | None]) -> sql.Composed:
    """The statement that puts a row back which `row` read."""
    return sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
        identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(map(sql.Literal, row.values())),
    )


def copy_row(
    conn: pg.Connection, copy: pg.Connection, table: str, key: Mapping[str, str], secrets: Collection[str] = ()
) -> None:
    """The row with this key as it is on the target, if it is there. secrets: columns that get a stand-in."""
    if (found := row(conn, table, key, secrets)) is not None:
        pg.run(copy, insert(table, {**found, **dict.fromkeys(secrets, STAND_IN)}), f"copying a row of {table}")
