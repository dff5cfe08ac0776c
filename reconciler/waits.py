"""Beside the transaction of an apply: how long it waits for the locks of others, and who holds them.

We give way, never the application. PostgreSQL makes that session the victim of a deadlock whose own deadlock_timeout
runs out first while the circle is closed. So whoever waits for us must not come to that point while we wait: before a
statement that may wait we know for how long others have been waiting for us at most, and stop before they get there.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from psycopg import sql

from reconciler import pg
from reconciler.errors import AnotherApply, Locked, ReconcilerError, ServerProblem

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

MARGIN = 0.2
"""Part of deadlock_timeout that is left between the end of our wait and the moment another session looks for deadlocks:
for what the network and a busy machine take.
"""

LONG = 0.2
"""Seconds after which a step counts as a wait, and somebody looks for whom. Of a shorter wait it is a fourth."""


class Waits:
    """The waits of one apply, from its first BEGIN to its end; used by `with`, so that nothing of it stays behind."""

    def __init__(self, dsn: str | None, lock_timeout: int) -> None:
        """lock_timeout: the policy's, in milliseconds. One of deadlock_timeout or more is kept, with what follows."""
        self._dsn = dsn
        self._limit = lock_timeout
        self._pid: int | None = None
        self._deadlock = 0.0
        self._asked = self._since = time.monotonic()
        self._oldest = 0.0
        self._set = 0
        self._holders: tuple[str, ...] = ()
        self._over = threading.Event()
        # A daemon: when the network is gone it may hang in connect, and nobody waits for that.
        self._watch = threading.Thread(target=self._look, name="waits", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._watch.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop watching."""
        self._over.set()
        self._watch.join(1.0)

    def begin(self, conn: pg.Connection) -> None:
        """A transaction has begun: it holds nothing yet, so nobody waits for it."""
        self._asked = self._since = time.monotonic()
        self._oldest, self._set = 0.0, 0
        row = pg.rows(
            conn,
            """
            SELECT pg_catalog.pg_backend_pid() AS pid,
                   pg_catalog.date_part('epoch', pg_catalog.current_setting('deadlock_timeout')::pg_catalog.interval)
                   * 1000 AS deadlock
            """,
        )[0]
        self._pid, self._deadlock = row["pid"], row["deadlock"]
        self.ready(conn)

    def ready(self, conn: pg.Connection, *, reading: bool = False) -> None:
        """The next statement may wait: set lock_timeout to what it may take now.

        reading: many statements follow that hardly ever wait. Each may take a fourth, so that none of them waits when
        somebody who began to wait for us before them looks for deadlocks.
        """
        self._since, self._holders = time.monotonic(), ()
        allowed = self._allowed()
        if allowed < self._limit / 2:
            asked = time.monotonic()
            self._oldest = pg.rows(conn, _BEHIND, {"deadlock": self._deadlock}, "looking who waits for us")[0]["oldest"]
            self._asked = asked
            allowed = self._allowed()
        if reading and self._limit < self._deadlock:
            allowed = min(allowed, self._limit / 4)
        # In steps, so that not every statement needs another setting; 0 would mean to wait for ever.
        step = max(1, self._limit // 8)
        chosen = max(1, int(allowed) // step * step)
        if chosen != self._set:
            pg.run(conn, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(chosen)))
            self._set = chosen

    def _allowed(self) -> float:
        """Milliseconds that a wait may take now: those who wait for us cannot look for deadlocks before it ends."""
        if self._limit >= self._deadlock:
            return self._limit
        elapsed = (time.monotonic() - self._asked) * 1000
        return min(self._limit, self._deadlock * (1 - MARGIN) - self._oldest - elapsed)

    @contextmanager
    def named(self) -> Generator[None]:
        """Whoever was in the way when the block ended with Locked is named in it."""
        try:
            yield
        except AnotherApply:
            raise
        except (Locked, ServerProblem) as error:
            waited = isinstance(error, Locked) or getattr(error.__cause__, "sqlstate", None) == "57014"
            if not (waited and self._holders):
                raise
            hint = error.hint if isinstance(error, Locked) else "Nothing was changed. Run the command again later."
            message = f"{error.message}; held by {' and '.join(self._holders)}"
            raise Locked(message, hint=hint, details=error.details) from error

    def _look(self) -> None:
        """While a step takes long, ask on a connection of its own whom it waits for."""
        conn: pg.Connection | None = None
        try:
            while not self._over.wait(min(LONG, self._set / 1000 or LONG) / 4):
                if self._pid is None or time.monotonic() - self._since < min(LONG, self._set / 4000):
                    continue
                conn = conn or pg.connect(self._dsn, "watch")
                # A transaction for each look: settings of a session would stay behind in a pooler's.
                with pg.snapshot(conn, 5_000):
                    found = holders(conn, self._pid)
                # What was seen is kept: the last look before a time-out may find us no longer waiting.
                self._holders = found or self._holders
        except ReconcilerError:
            pass  # then nobody is named
        finally:
            if conn is not None:
                conn.close()


def holders(conn: pg.Connection, pid: int) -> tuple[str, ...]:
    """Whom this process waits for, in words; empty when it does not wait for a lock."""
    found = pg.rows(
        conn,
        """
        SELECT pg_catalog.pg_blocking_pids(a.pid) AS pids FROM pg_catalog.pg_stat_activity a
         WHERE a.pid = %s AND a.wait_event_type = 'Lock'
        """,
        (pid,),
    )
    return people(conn, found[0]["pids"]) if found else ()


def people(conn: pg.Connection, pids: Sequence[int]) -> tuple[str, ...]:
    """Sessions in words: process, role, application_name, state, how long the transaction is open. Never the query.

    State and time of others' sessions are seen by members of pg_read_all_stats only. 0 is a prepared transaction.
    """
    query = """
        SELECT DISTINCT w.pid, a.usename::pg_catalog.text AS role, a.application_name AS application, a.state,
               pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - a.xact_start) AS seconds
          FROM pg_catalog.unnest(%s::pg_catalog.int4[]) AS w (pid)
          LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = w.pid
         ORDER BY w.pid
    """
    return tuple(_person(row) for row in pg.rows(conn, query, (list(pids),)))


def _person(row: Mapping[str, Any]) -> str:
    if row["pid"] == 0:
        return "a prepared transaction (see pg_prepared_xacts)"
    if row["role"] is None:
        return f"process {row['pid']}, which has ended meanwhile"
    words = [
        f"process {row['pid']}",
        f"role {row['role']}",
        row["application"] or "no application_name",
        row["state"] or "its state hidden from this role",
    ]
    if row["seconds"] is not None:
        words.append(f"its transaction open for {row['seconds']:.1f} s")
    return ", ".join(words)


# Those who wait for us, and who wait for them. One who has looked for deadlocks does not look again while it waits.
# waitstart is not set yet in the first moment of a wait. Operators by their schema: the path is the plan's by then.
_BEHIND = """
SELECT coalesce(pg_catalog.max(q.age), 0)::pg_catalog.float8 AS oldest FROM (
WITH RECURSIVE waiting AS MATERIALIZED (
    SELECT l.pid, pg_catalog.pg_blocking_pids(l.pid) AS blockers,
           coalesce(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()
                                                  OPERATOR(pg_catalog.-) pg_catalog.min(l.waitstart)), 0)
           OPERATOR(pg_catalog.*) 1000 AS age
      FROM pg_catalog.pg_locks l WHERE NOT l.granted GROUP BY l.pid
), behind AS (
    SELECT w.pid, w.age FROM waiting w WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (w.blockers)
    UNION
    SELECT w.pid, w.age FROM waiting w JOIN behind b ON b.pid OPERATOR(pg_catalog.=) ANY (w.blockers)
)
SELECT b.age FROM behind b WHERE b.age OPERATOR(pg_catalog.<=) %(deadlock)s
) AS q
"""
