"""Beside the flow: a scratch database with the target's schema, gates and markers, the plan applied, the proofs played.

What needs two sessions, and whatever may not be tried on the target, runs here. Nothing is written to the target.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.json import Jsonb

from reconciler import execute, live, pg, sandbox
from reconciler.checks.proof import CHECK, ProofSpec
from reconciler.checks.proof import rehearse as with_two_sessions
from reconciler.diff import changes as differences
from reconciler.errors import ServerProblem, UsageError
from reconciler.model import Absent, Asked, milliseconds
from reconciler.parts import identifier
from reconciler.prove import ProofReport, report
from reconciler.survey import survey

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from reconciler.model import Check, Desired, Json, Plan, Target, Verdict


@dataclass(frozen=True)
class Rehearsed:
    """A scratch database that stands for the target. `schema`: digest of the schema that was copied."""

    dsn: str
    version: str
    schema: str
    target: Target
    allow_functions: Sequence[str]
    """The installed policy's."""


def prove(
    dsn: str | None, desired: Desired, *, scratch: str | None = None, allow_untested: bool = False
) -> ProofReport:
    """Play every proof on a rehearsal of the target.

    scratch: an empty database to use instead of an embedded server of our own. Raises UsageError, ServerProblem,
    SandboxError, Refused when the live state does not allow the plan.
    """
    started = time.monotonic()
    with prepared(dsn, desired, scratch=scratch, allow_untested=allow_untested) as copy:
        verdicts = tuple(
            _played(copy, check, Asked(desired, copy.allow_functions, inside=True))
            for check in desired.checks.values()
            if check.kind == CHECK.name
        )
    return report(copy.target, verdicts, time.monotonic() - started)


@contextmanager
def prepared(
    dsn: str | None, desired: Desired, *, scratch: str | None = None, allow_untested: bool = False
) -> Generator[Rehearsed]:
    """A rehearsal of the target with the plan applied, for as long as the block runs. Raises as `prove` does."""
    with pg.connect(dsn, "prove") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        with pg.snapshot(conn):
            found = survey(conn, desired)
            plan = found.plan(datetime.now(UTC))
    with _scratch(scratch) as place:
        version, schema = rehearse(dsn, place, desired, plan)
        yield Rehearsed(place, version, schema, found.target, found.last.allow_functions)


@contextmanager
def _scratch(dsn: str | None) -> Generator[str]:
    """The database that was named, or one of an embedded server that ends with us."""
    if dsn is not None:
        yield dsn
        return
    folder = Path(tempfile.mkdtemp(prefix="reconciler-rehearsal-"))
    if os.geteuid() == 0:
        folder.chmod(0o711)  # the server's account passes through
    data = folder / "sandbox"
    try:
        yield sandbox.up(None, data)
    finally:
        sandbox.down(data)
        shutil.rmtree(folder, ignore_errors=True)


def rehearse(dsn: str | None, scratch: str, desired: Desired, plan: Plan) -> tuple[str, str]:
    """Make the scratch database what the target will be once the plan is applied: (its version, schema digest).

    Raises UsageError, ServerProblem.
    """
    with pg.connect(dsn, "rehearse") as conn, pg.connect(scratch, "rehearse") as copy:
        if occupied := pg.rows(copy, sandbox.NOT_EMPTY.encode(), doing="looking whether the scratch database is empty"):
            raise UsageError(
                f"The scratch database {copy.info.dbname} is not empty: it has {occupied[0]['name']}.",
                hint="A rehearsal starts from nothing; name an empty database with --scratch.",
            )
        _copy_roles(conn, copy)
        schema = _schema(conn, copy, dsn)
        _restore(schema, scratch, copy)
        for table, key in _rows_to_copy(desired):
            _copy_row(conn, copy, table, key)
        # Not the setup: the ledger is the target's.
        pg.run(copy, "BEGIN")
        pg.settings(copy, milliseconds(desired.policy.apply.statement_timeout))
        execute.everything(copy, plan.changes, desired.items, desired.policy)
        pg.run(copy, "COMMIT")
        with pg.snapshot(copy):
            there = live.read(copy, desired, desired.policy.allow_functions)
            left = differences(desired, there, {})
        if left:
            raise ServerProblem(
                "The rehearsal is not what the plan says.",
                details=[f"{change.address}: {change.reason}" for change in left[:10]],
            )
        version = copy.info.parameter_status("server_version") or ""
    lines = [line for line in schema.splitlines() if line and not line.startswith(("--", "\\", "SET "))]
    return version.split()[0], hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _played(copy: Rehearsed, check: Check, asked: Asked) -> Verdict:
    where = f"rehearsed on PostgreSQL {copy.version}, schema {copy.schema[:16]}"
    if isinstance(check.spec, ProofSpec) and check.spec.sessions == 2:
        with pg.connect(copy.dsn, "prove") as conn, pg.connect(copy.dsn, "prove") as other:
            verdict = with_two_sessions(conn, other, check, asked)
    else:
        with pg.connect(copy.dsn, "prove") as conn:
            pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
            pg.settings(conn, milliseconds(asked.desired.policy.apply.statement_timeout))
            verdict = CHECK.run(conn, check, asked)
            conn.rollback()
    status = "rehearsed" if verdict.status == "passed" else verdict.status
    return verdict.model_copy(update={"status": status, "detail": f"{verdict.detail}; {where}"})


# ------------------------------------------------------------------------------------------------------------ copying


def _copy_roles(conn: pg.Connection, copy: pg.Connection) -> None:
    """Roles belong to the server: those that the scratch server lacks are made there, without password and log-in."""
    query = "SELECT rolname::pg_catalog.text AS name, rolinherit FROM pg_catalog.pg_roles WHERE rolname !~ '^pg_'"
    there = {row["name"] for row in pg.rows(copy, query)}
    new = {row["name"]: row["rolinherit"] for row in pg.rows(conn, query) if row["name"] not in there}
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


def _schema(conn: pg.Connection, copy: pg.Connection, dsn: str | None) -> str:
    """pg_dump's text of the target's schema, without our ledger and the extensions that the scratch server lacks."""
    query = "SELECT name::pg_catalog.text AS name FROM pg_catalog.pg_available_extensions"
    available = {row["name"] for row in pg.rows(copy, query)}
    installed = [row["name"] for row in pg.rows(conn, "SELECT extname::pg_catalog.text AS name FROM pg_extension")]
    without = [f"--exclude-extension={name}" for name in installed if name not in available]
    options = ["--schema-only", "--exclude-schema=reconciler", "--no-publications", "--no-subscriptions", *without]
    return _client("pg_dump", options, dsn)


def _restore(schema: str, scratch: str, copy: pg.Connection) -> None:
    """By psql, in one transaction."""
    newer = "SET transaction_timeout = 0;\n" if copy.info.server_version < 170_000 else ""
    text = schema.replace(newer, "", 1) if newer else schema
    _client("psql", ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", "-"], scratch, text)


def _client(program: str, options: Sequence[str], dsn: str | None, given: str = "") -> str:
    """Run one of PostgreSQL's own programs; the password travels by environment, never on a command line."""
    parts: dict[str, Any] = dict(conninfo_to_dict(dsn or ""))
    password = parts.pop("password", None)
    path = sandbox.embedded_binaries() / program
    done = subprocess.run(
        [path, *options, "--dbname", make_conninfo("", **parts)],
        check=False,
        capture_output=True,
        text=True,
        input=given,
        env={**os.environ, **({"PGPASSWORD": str(password)} if password is not None else {})},
    )
    if done.returncode:
        raise ServerProblem(f"{program} failed.", details=done.stderr.splitlines()[-10:])
    return done.stdout


def _rows_to_copy(desired: Desired) -> list[tuple[str, dict[str, str]]]:
    """Table and key of the row of every declared gate and marker."""
    found: list[tuple[str, dict[str, str]]] = []
    for item in desired.items.values():
        if item.kind == "gate":
            store: Any = getattr(item.rules, "store")  # noqa: B009 - only gates have one
            found.append((store.table, {store.key: item.name}))
        elif item.kind == "marker":
            spec: Json = item.spec.at if isinstance(item.spec, Absent) else item.spec.dump()
            found.append((spec["table"], spec["key"]))
    return found


def _copy_row(conn: pg.Connection, copy: pg.Connection, table: str, key: dict[str, str]) -> None:
    """The row with this key as it is on the target, if it is there."""
    where = sql.SQL(" AND ").join(
        sql.SQL("t.{}::pg_catalog.text = {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in key.items()
    )
    read = sql.SQL("SELECT pg_catalog.to_jsonb(t) AS row FROM {} AS t WHERE {}").format(identifier(table), where)
    for row in pg.rows(conn, read, doing=f"reading {table}"):
        columns = sql.SQL(", ").join(map(sql.Identifier, row["row"]))
        write = sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE"
            " SELECT {columns} FROM pg_catalog.jsonb_populate_record(NULL::{table}, %s)"
        ).format(table=identifier(table), columns=columns)
        pg.rows(copy, write + sql.SQL(" RETURNING 1 AS done"), (Jsonb(row["row"]),), f"copying a row of {table}")
