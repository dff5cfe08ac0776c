"""The edge to PostgreSQL: the only `connect`, session settings, the read-only snapshot, driver errors as ours."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from reconciler.errors import Locked, MissingPrivilege, ReconcilerError, ServerProblem, Stale
from reconciler.model import Target

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from psycopg.abc import QueryNoTemplate as Query

Connection = psycopg.Connection[dict[str, Any]]

OLDEST_MAJOR = 14
NEWEST_TESTED_MAJOR = 18

# Text forms of values must not depend on who connects from where: digests are made of them.
# search_path is empty so that every name in catalog output comes out qualified and no temporary table can stand in.
SESSION: tuple[LiteralString, ...] = (
    "SET LOCAL search_path = ''",
    "SET LOCAL row_security = off",
    # The verdict on a declared query was made for strings read this way.
    "SET LOCAL standard_conforming_strings = on",
    "SET LOCAL timezone = 'UTC'",
    "SET LOCAL datestyle = 'ISO, YMD'",
    "SET LOCAL intervalstyle = 'postgres'",
    "SET LOCAL extra_float_digits = 1",
    "SET LOCAL bytea_output = 'hex'",
    "SET LOCAL xmlbinary = 'base64'",
    "SET LOCAL quote_all_identifiers = off",
)


def connect(dsn: str | None, command: str) -> Connection:
    """Open a connection in autocommit mode; rows are dictionaries.

    dsn: a libpq connection string or URI; None or empty leaves everything to libpq's variables and service files.
    command: the reconciler command, shown to DBAs as `application_name`.
    Raises ServerProblem in one sentence, never with the password.
    """
    if re.match(r"postgres(?:ql)?://[^/?#]*@[^/?#]*@", dsn or ""):
        # libpq would take the rest of the password for the host, and quote it.
        raise ServerProblem(
            "The connection string cannot be read: it has two @ before the host.", hint="Write %40 for @ in a password."
        )
    try:
        return psycopg.Connection[dict[str, Any]].connect(
            dsn or "",
            autocommit=True,
            # Prepared statements kept on the server would be one more thing that outlives a rolled-back transaction.
            prepare_threshold=None,
            row_factory=dict_row,
            application_name=f"reconciler {command}",
            client_encoding="UTF8",
            connect_timeout=10,
            keepalives=1,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
        )
    except psycopg.ProgrammingError as error:
        raise ServerProblem(
            f"The connection string cannot be read: {_without_values(_first_line(error))}",
            hint="Write it as postgresql://user@host:port/database or as key=value pairs.",
        ) from None
    except psycopg.Error as error:
        raise ServerProblem(
            f"Cannot connect to PostgreSQL: {_connection_message(error)}",
            hint="Check --dsn, RECONCILER_DSN or the PG* variables; passwords belong in PGPASSWORD or ~/.pgpass.",
        ) from None


def without_password(dsn: str) -> str:
    """The connection string as it may be shown: itself, or without the secrets that stand in it."""
    parts = conninfo_to_dict(dsn)
    shown = {name: value for name, value in parts.items() if name not in {"password", "sslpassword"}}
    return dsn if len(shown) == len(parts) else make_conninfo("", **shown)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without_values(message: str) -> str:
    """The message without what it quotes: a piece of a password, or of a row that the planner may read."""
    return re.sub(r'"[^"]*"', '"…"', message)


def _connection_message(error: psycopg.Error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "FATAL" in line] or lines[:1]
    return re.sub(r"(password\s*=\s*)\S+", r"\1***", wanted[0] if wanted else type(error).__name__)


@contextmanager
def snapshot(conn: Connection, statement_timeout_ms: int = 60_000) -> Generator[Connection]:
    """One REPEATABLE READ READ ONLY transaction, always rolled back (DESIGN rule 3)."""
    run(conn, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    try:
        settings(conn, statement_timeout_ms)
        yield conn
    finally:
        if not conn.closed and not conn.broken:
            run(conn, "ROLLBACK")


def roll_back(conn: Connection) -> None:
    """End the transaction, whatever became of it."""
    if conn.closed or conn.broken:
        return
    try:
        conn.execute("ROLLBACK")
    except psycopg.Error:
        conn.close()  # the server rolls back what a closed connection leaves


def settings(conn: Connection, statement_timeout_ms: int) -> None:
    """Set, for this transaction, everything that a digest or a name look-up could depend on."""
    for statement in SESSION:
        run(conn, statement)
    timeout(conn, statement_timeout_ms)


def timeout(conn: Connection, milliseconds: int) -> None:
    """Set statement_timeout for the rest of the transaction (again, because a declared query may have run before)."""
    run(conn, sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(milliseconds)))


def run(conn: Connection, statement: Query, doing: str = "") -> None:
    """Execute one statement and drop its result. `doing` goes into the error message."""
    try:
        conn.execute(statement)
    except psycopg.Error as error:
        raise translated(error, doing) from error


def rows(
    conn: Connection,
    query: Query,
    params: Mapping[str, Any] | Sequence[Any] | None = None,
    doing: str = "",
    *,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """All rows of a query, as dictionaries. Raises what `translated` makes of a driver error.

    quiet: for queries of the files, whose errors can quote any value that the role may read.
    """
    try:
        return conn.execute(query, params).fetchall()
    except psycopg.Error as error:
        raise translated(error, doing, quiet=quiet) from error


def width(conn: Connection, query: Query, doing: str = "", *, quiet: bool = False) -> int:
    """How many columns a query has. Raises what `translated` makes of a driver error; `quiet` as in `rows`."""
    try:
        return len(conn.execute(query).description or ())
    except psycopg.Error as error:
        raise translated(error, doing, quiet=quiet) from error


_CHANGED_MEANWHILE = ("tuple concurrently", "cache lookup failed", "could not open relation with OID")
"""What the server says, as internal errors, when a catalog row changed or went away while it was at work on it."""


def translated(error: psycopg.Error, doing: str = "", *, quiet: bool = False) -> ReconcilerError:
    """The driver's error as ours: one sentence with the SQLSTATE and what was being done.

    A lock that was not to be had, a deadlock and a serialization failure are `Locked` (exit 4); a catalog tuple that
    somebody else changed under us is `Stale`; a missing privilege names the object as the server does. quiet: nothing
    of the server's words but the SQLSTATE.
    """
    state = error.sqlstate or "no SQLSTATE"
    primary = error.diag.message_primary or _first_line(error)
    if quiet:
        # Casting a secret to a number, or to a role, makes the server quote it; a pull request would print it.
        primary = "the time-out ran out" if state == "57014" else "the server refused the query"
    prefix = f"{doing}: " if doing else ""
    message = f"{prefix}{primary} (SQLSTATE {state})"
    details = [line for line in (error.diag.message_detail, error.diag.context) if line and not quiet]
    if state == "42501":
        return MissingPrivilege(message, hint="Grant the role what is missing, or run as a role that has it.")
    if state in {"55P03", "40P01", "40001"}:
        hint = "Nothing was changed. Run the command again when the other session is done."
        return Locked(message, hint=hint, details=details)
    if state == "XX000" and primary.startswith(_CHANGED_MEANWHILE):
        return Stale(message, hint="Somebody changed this at the same time. Nothing was changed; plan again.")
    if state == "57014":
        return ServerProblem(message, hint="The statement ran into its time-out. Nothing was changed.")
    if state.startswith(("08", "57P")) or (error.sqlstate is None and isinstance(error, psycopg.OperationalError)):
        return ServerProblem(
            f"{prefix}the connection was lost: {primary} (SQLSTATE {state})",
            details=details,
            hint="Nothing was changed. Run the command again when the server is back.",
        )
    return ServerProblem(message, hint="" if quiet else error.diag.message_hint or "", details=details)


def identify(conn: Connection) -> Target:
    """Which database this is: name, system identifier (a string of digits) and server version.

    The connection must be inside a transaction that `settings` prepared.
    """
    row = rows(
        conn,
        """
        SELECT pg_catalog.current_database() AS database,
               (SELECT system_identifier::pg_catalog.text FROM pg_catalog.pg_control_system()) AS system_identifier,
               pg_catalog.current_setting('server_version') AS server_version,
               pg_catalog.current_setting('server_version_num')::pg_catalog.int4 AS number
        """,
        doing="reading the identity of the database",
    )[0]
    return Target(
        name="",
        database=row["database"],
        system_identifier=row["system_identifier"],
        server_version=row["server_version"].split()[0],
    )


def check_version(conn: Connection, *, allow_untested: bool) -> None:
    """Refuse a server that this version was not tested on (DESIGN rule 12). Raises ServerProblem."""
    major = conn.info.server_version // 10_000
    if major < OLDEST_MAJOR:
        raise ServerProblem(
            f"PostgreSQL {major} is older than {OLDEST_MAJOR}, the oldest version reconciler knows.",
            hint="Upgrade the server.",
        )
    if major > NEWEST_TESTED_MAJOR and not allow_untested:
        raise ServerProblem(
            f"PostgreSQL {major} is newer than {NEWEST_TESTED_MAJOR}, the newest version reconciler was tested on.",
            hint="Use a newer reconciler, or --allow-untested-server if you accept that new attributes go unseen.",
        )


def execute(conn: Connection, text: str, doing: str = "") -> str:
    """Run one complete statement of a plan; its first answer row as text, or nothing.

    By the extended protocol (that is what `binary` chooses), which refuses a second statement in the same string.
    Raises what `translated` makes of a driver error.
    """
    try:
        cursor = conn.execute(text.encode(), binary=True)
        if cursor.description is None:
            return ""
        row = cursor.fetchone()
        return "" if row is None else ", ".join(str(value) for value in row.values())
    except psycopg.Error as error:
        raise translated(error, doing) from error
