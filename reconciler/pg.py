"""The edge to PostgreSQL: the only `connect`, session settings, the read-only snapshot, driver errors as ours."""

from __future__ import annotations

import math
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString, TypeVar

import psycopg
from psycopg import sql, waiting
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from reconciler.errors import Locked, MissingPrivilege, ReconcilerError, ServerProblem, Stale, Unreachable
from reconciler.model import Target
from reconciler.secrets import Unspoken

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from psycopg.abc import PQGen
    from psycopg.abc import QueryNoTemplate as Query

T = TypeVar("T")

OLDEST_MAJOR = 14
NEWEST_TESTED_MAJOR = 18

# Text forms of values must not depend on who connects from where: digests are made of them.
# search_path is empty so that every name in catalog output comes out qualified and no temporary table can stand in.
SESSION: tuple[LiteralString, ...] = (
    # Behind a pooler the session may be one in which somebody else of the same login has left another role.
    "SET LOCAL role TO DEFAULT",
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


CONNECTING = 10
"""Seconds for a server to let us in."""

NETWORK: dict[str, Any] = {
    "connect_timeout": CONNECTING,
    # A peer that is gone without a word, on an idle connection and on one with something under way: 25 s.
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""Options of every connection, ours and those of PostgreSQL's own programs."""

GRACE = 2.0
"""Seconds for a server to take a request to cancel, and as many to say that it stopped."""

LOOKS = 0.1
"""Seconds between two looks whether a wait for the server is over, and whether somebody pressed Ctrl-C."""


@dataclass(frozen=True)
class Limit:
    """When to stop waiting for the server (`time.monotonic()`), and the error that it then is.

    kindly: ask the server to stop first, so that the transaction can be rolled back on the same connection.
    """

    until: float
    error: Callable[[], Exception]
    kindly: bool = True


class _Over(Exception):
    """A wait went on for too long."""


class Connection(psycopg.Connection[dict[str, Any]]):
    """A connection that need not wait for ever: a server, or a network, that says nothing is left alone in time.

    What the server counts (statement_timeout ...) ends nothing when it is the server that hangs.
    """

    limit: Limit | None = None
    patience: float = math.inf
    """Seconds that one answer may take."""

    def __init__(self, *given: Any, **options: Any) -> None:  # noqa: ANN401 - what psycopg hands over
        """`unspoken`: the secret values that this connection has seen."""
        super().__init__(*given, **options)
        self.unspoken = Unspoken()

    def wait(self, gen: PQGen[T], interval: float = LOOKS, timeout: float | None = None) -> T:
        """What psycopg calls for every message: send, and receive until the answer is whole. Raises the limit's error.

        When the limit is over, and after Ctrl-C, the server is asked to stop. When it does not say within GRACE that it
        did, the connection is closed, and the server rolls back once it notices.
        """
        if timeout is not None:  # only for notifications
            return super().wait(gen, interval, timeout)
        limit = self._soonest()
        if time.monotonic() >= limit.until:
            gen.close()
            raise limit.error()
        try:
            return waiting.wait(_until(gen, limit.until), self.pgconn.socket, interval)
        except KeyboardInterrupt:
            # What was sent must not go on without us.
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                with suppress(_Over, psycopg.Error):
                    self._stopped(gen, kindly=limit.kindly)
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    self.close()
            raise
        except _Over:
            try:
                return self._stopped(gen, kindly=limit.kindly)  # it was done after all
            except (_Over, psycopg.Error):
                raise limit.error() from None

    def _soonest(self) -> Limit:
        until = time.monotonic() + self.patience
        if self.limit is not None and self.limit.until <= until:
            return self.limit
        return Limit(until, lambda: psycopg.OperationalError(f"no answer within {self.patience:.0f} s"))

    def _stopped(self, gen: PQGen[T], *, kindly: bool) -> T:
        """Ask the server to stop what it does, and hear how it ended. Raises its error; _Over when it says nothing."""
        try:
            if kindly:
                with suppress(psycopg.Error):
                    self.cancel_safe(timeout=GRACE)
            return waiting.wait(_until(gen, time.monotonic() + GRACE), self.pgconn.socket, LOOKS)
        except psycopg.Error:
            raise
        except BaseException:  # silent, or interrupted again
            self.close()
            raise


def _until(gen: PQGen[T], end: float) -> PQGen[T]:
    """The same conversation with the server; raises _Over at its first pause after the end."""
    answer: Any = None
    while True:
        try:
            wanted = gen.send(answer)
        except StopIteration as done:
            return done.value
        answer = yield wanted
        if time.monotonic() >= end:
            raise _Over


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
        return Connection.connect(
            dsn or "",
            autocommit=True,
            # Prepared statements kept on the server would be one more thing that outlives a rolled-back transaction.
            prepare_threshold=None,
            row_factory=dict_row,
            application_name=f"reconciler {command}",
            client_encoding="UTF8",
            **NETWORK,
        )
    except psycopg.ProgrammingError as error:
        raise ServerProblem(
            f"The connection string cannot be read: {_without_values(_first_line(error))}",
            hint="Write it as postgresql://user@host:port/database or as key=value pairs.",
        ) from None
    except psycopg.Error as error:
        raise Unreachable(
            f"Cannot connect to PostgreSQL: {_connection_message(error)}",
            hint="Check --dsn, RECONCILER_DSN or the PG* variables; passwords belong in PGPASSWORD or ~/.pgpass.",
        ) from None


def place(dsn: str) -> dict[str, str] | None:
    """The parts of a connection string, secrets as empty text; None for one that cannot be read."""
    try:
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    except psycopg.Error:
        return None
    return {name: "" if name in SECRETS else value for name, value in parts.items()}


SECRETS = frozenset({"password", "sslpassword"})
"""The parts of a connection string that are never shown."""


def string(**parts: str) -> str:
    """A connection string of these parts."""
    return make_conninfo("", **parts)


def without_password(dsn: str) -> str:
    """The connection string as it may be shown: itself, or without the secrets that stand in it."""
    parts = conninfo_to_dict(dsn)
    shown = {name: value for name, value in parts.items() if name not in SECRETS}
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
    before, conn.patience = conn.patience, statement_timeout_ms / 1000 + GRACE
    try:
        run(conn, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            settings(conn, statement_timeout_ms)
            yield conn
        finally:
            if not conn.closed and not conn.broken:
                run(conn, "ROLLBACK")
    finally:
        conn.patience = before


@contextmanager
def within(conn: Connection, limit: Limit) -> Generator[None]:
    """While the block runs, no wait for the server goes on beyond the limit."""
    before, conn.limit = conn.limit, limit
    try:
        yield
    finally:
        conn.limit = before


def lost(seconds: float) -> Limit:
    """The limit after which a server that said nothing counts as lost; it is not asked to stop."""
    error = psycopg.OperationalError("the server did not answer in time")
    return Limit(time.monotonic() + seconds, lambda: error, kindly=False)


def roll_back(conn: Connection) -> None:
    """End the transaction, whatever became of it and however late it is."""
    if conn.closed or conn.broken:
        return
    try:
        with within(conn, lost(GRACE)):
            conn.execute("ROLLBACK")
    except psycopg.Error:
        conn.close()  # the server rolls back what a closed connection leaves


def settings(conn: Connection, statement_timeout_ms: int) -> None:
    """Set, for this transaction, everything that a digest or a name look-up could depend on."""
    run(conn, "; ".join(SESSION))  # one message: an apply says all of it four times
    timeout(conn, statement_timeout_ms)


def timeout(conn: Connection, milliseconds: int) -> None:
    """Set statement_timeout for the rest of the transaction (again, because a declared query may have run before)."""
    run(conn, sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(milliseconds)))


def end_by(conn: Connection, milliseconds: int) -> None:
    """Have the server end this transaction after so long in all, where it can count that (PostgreSQL 17 and later)."""
    if conn.info.server_version >= 170_000:
        run(conn, sql.SQL("SET LOCAL transaction_timeout = {}").format(sql.Literal(milliseconds)))


def run(conn: Connection, statement: Query, doing: str = "") -> None:
    """Execute one statement and drop its result. `doing` goes into the error message."""
    try:
        conn.execute(statement)
    except psycopg.Error as error:
        raise translated(error, doing, unspoken=conn.unspoken) from error


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
        raise translated(error, doing, quiet=quiet, unspoken=conn.unspoken) from error


def width(conn: Connection, query: Query, doing: str = "", *, quiet: bool = False) -> int:
    """How many columns a query has. Raises what `translated` makes of a driver error; `quiet` as in `rows`."""
    return len(columns(conn, query, doing, quiet=quiet))


def columns(conn: Connection, query: Query, doing: str = "", *, quiet: bool = False) -> list[str]:
    """The names of a query's columns, in their order. Raises as `width`."""
    try:
        return [column.name for column in conn.execute(query).description or ()]
    except psycopg.Error as error:
        raise translated(error, doing, quiet=quiet, unspoken=conn.unspoken) from error


_CHANGED_MEANWHILE = ("tuple concurrently", "cache lookup failed", "could not open relation with OID")
"""What the server says, as internal errors, when a catalog row changed or went away while it was at work on it."""


def translated(
    error: psycopg.Error, doing: str = "", *, quiet: bool = False, unspoken: Unspoken | None = None
) -> ReconcilerError:
    """The driver's error as ours: one sentence with the SQLSTATE and what was being done.

    A lock that was not to be had, a deadlock and a serialization failure are `Locked` (exit 4); a catalog tuple that
    somebody else changed under us is `Stale`; a missing privilege names the object as the server does. quiet: nothing
    of the server's words but the SQLSTATE. unspoken: of the connection; what quotes a secret is not repeated either.
    """
    state = error.sqlstate or "no SQLSTATE"
    first = primary = error.diag.message_primary or _first_line(error)
    if quiet:
        # Casting a secret to a number, or to a role, makes the server quote it; a pull request would print it.
        primary = "the time-out ran out" if state == "57014" else "the server refused the query"
    elif unspoken is not None and _may_quote(error, unspoken):
        primary, quiet = f"{type(error).__name__}; the server's words may quote a secret and are left out", True
    prefix = f"{doing}: " if doing else ""
    message = f"{prefix}{primary} (SQLSTATE {state})"
    details = [line for line in (error.diag.message_detail, error.diag.context) if line and not quiet]
    if state == "42501":
        return MissingPrivilege(message, hint="Grant the role what is missing, or run as a role that has it.")
    if state in {"55P03", "40P01", "40001"}:
        hint = "Nothing was changed. Run the command again when the other session is done."
        return Locked(message, hint=hint, details=details)
    if state == "XX000" and first.startswith(_CHANGED_MEANWHILE):
        return Stale(message, hint="Somebody changed this at the same time. Nothing was changed; plan again.")
    if state == "57014":
        return ServerProblem(message, hint="The statement ran into its time-out. Nothing was changed.")
    if state.startswith(("08", "57P")) or (error.sqlstate is None and isinstance(error, psycopg.OperationalError)):
        return Unreachable(
            f"{prefix}the connection was lost: {primary} (SQLSTATE {state})",
            details=details,
            hint="Nothing was changed. Run the command again when the server is back.",
        )
    return ServerProblem(message, hint="" if quiet else error.diag.message_hint or "", details=details)


def _may_quote(error: psycopg.Error, unspoken: Unspoken) -> bool:
    """Can a value of a secret gate be heard in it? Once one was sent, whatever the server says may be made of it."""
    said = "\n".join(filter(None, (str(error), error.diag.message_hint, error.diag.context)))
    return (unspoken.sent and error.sqlstate is not None) or unspoken.heard_in(said)


SPARE = 5.0
"""Seconds for a pooler to find a session that nobody uses."""


def shared(conn: Connection, dsn: str | None) -> bool:
    """Is what another program sets in its session left to others: a pooler in transaction mode, or one without a spare?

    A pooler gives its clients numbers of its own for their processes. In transaction mode one session of the server
    serves two clients in turn, or one client is served by two; in session mode neither.
    """
    query = "SELECT pg_catalog.pg_backend_pid() AS pid"
    if rows(conn, query)[0]["pid"] == conn.info.backend_pid:
        return False
    try:
        with connect(dsn, "backup") as one, connect(dsn, "backup") as two:
            seen: dict[Connection, set[int]] = {one: set(), two: set()}
            for client in (one, one, two, two, one):
                with within(client, lost(SPARE)):
                    seen[client].add(rows(client, query)[0]["pid"])
    except ReconcilerError:
        return True
    return len(seen[one] | seen[two]) != 2 or len(seen[one]) != 1


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


def execute(conn: Connection, text: str, doing: str = "", values: Sequence[str] = ()) -> str:
    """Run one complete statement of a plan; its first answer row as text, or nothing.

    By the extended protocol (that is what `binary` chooses), which refuses a second statement in the same string.
    values: secrets, for the places $1 ... of the text; from then on nothing that the server says is repeated.
    Raises what `translated` makes of a driver error.
    """
    try:
        if values:
            conn.unspoken.sent = True
            psycopg.RawCursor(conn).execute(text.encode(), list(values), binary=True)
            return ""
        cursor = conn.execute(text.encode(), binary=True)
        if cursor.description is None:
            return ""
        row = cursor.fetchone()
        return "" if row is None else ", ".join(str(value) for value in row.values())
    except psycopg.Error as error:
        raise translated(error, doing, unspoken=conn.unspoken) from error
