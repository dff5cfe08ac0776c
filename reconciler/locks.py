"""First step of the transaction: lock what will change, then read it again; tried again while others are in the way."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg import sql

from reconciler import ledger, pg
from reconciler.errors import AnotherApply, Locked, ServerProblem, Stale
from reconciler.kinds import kinds
from reconciler.model import milliseconds
from reconciler.waits import people

if TYPE_CHECKING:
    from collections.abc import Callable

    from reconciler.model import ApplyPolicy, Change, Desired, Plan
    from reconciler.record import Progress
    from reconciler.waits import Waits

GONE = frozenset({"3F000", "42704", "42883", "42P01"})
"""What PostgreSQL says when something is not there: a schema, an object, a function, a table."""

BELT = 5_000
"""Milliseconds after max_duration at which the server ends by itself what we should have ended."""

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What is to be locked and under which limits. `in_time` raises Locked when max_duration is over."""

    plan: Plan
    desired: Desired
    policy: ApplyPolicy
    ledger_exists: bool
    waits: Waits
    progress: Progress
    in_time: Callable[[], float]


def take(conn: pg.Connection, task: Task, confirm: Callable[[str], T]) -> T:
    """Take every lock, then `confirm`, which gets the transaction id; what it returns.

    While somebody is in the way it is tried again from BEGIN, holding nothing in between. Raises AnotherApply, Locked,
    Stale, and what `confirm` raises. After an error the transaction is rolled back.
    """
    attempts = task.policy.lock_retries + 1
    for attempt in range(1, attempts + 1):
        task.progress("lock", f"attempt {attempt} of {attempts}" if attempt > 1 else "")
        try:
            xid = _lock(conn, task)
            task.waits.ready(conn, reading=True)
            return confirm(xid)
        except (Locked, Stale) as error:
            pg.roll_back(conn)
            if attempt == attempts or not _may_pass(error):
                raise
            time.sleep(min(attempt * milliseconds(task.policy.lock_timeout) / 8000, 1.0))
            task.in_time()
        except BaseException:
            pg.roll_back(conn)
            raise
    raise AssertionError


def _may_pass(error: Locked | Stale) -> bool:
    """Did the server say it, because of somebody who will be done? What we found out by reading will not pass.

    An object that somebody changed while we waited for it is locked and read again: perhaps it is as it was.
    """
    return isinstance(error.__cause__, psycopg.Error)


def _lock(conn: pg.Connection, task: Task) -> str:
    """One attempt. Returns the transaction id."""
    policy, waits = task.policy, task.waits
    pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    pg.settings(conn, milliseconds(policy.statement_timeout))
    # Should the client hang while it waits for locks, the server ends it.
    pg.end_by(conn, int(task.in_time() * 1000) + BELT)
    idle = sql.SQL("SET LOCAL idle_in_transaction_session_timeout = {}")
    pg.run(conn, idle.format(sql.Literal(milliseconds(policy.max_duration))))
    waits.begin(conn)
    _advisory_lock(conn, task.desired.name)
    xid: str = pg.rows(conn, "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid")[0]["xid"]
    if task.ledger_exists:
        # Nobody adds a trigger to it from here on; what is there already was made by somebody we trust.
        pg.run(conn, "LOCK TABLE reconciler.entry IN ROW EXCLUSIVE MODE", "locking the ledger")
        ledger.check_shape(conn, written_by_us=True)
    for change in sorted(task.plan.changes, key=lambda change: change.address):
        if "forget" not in change.actions:
            task.in_time()
            _hold(conn, task, change)
    return xid


def _hold(conn: pg.Connection, task: Task, change: Change) -> None:
    """Lock one object. What is not there any more makes the plan stale."""
    kind = kinds()[change.kind]
    before = None if change.before is None else kind.load(change.before)
    try:
        kind.lock(conn, change, before, task.desired.items[change.address].rules, lambda: task.waits.ready(conn))
    except ServerProblem as error:
        if getattr(error.__cause__, "sqlstate", None) in GONE:
            raise Stale(
                f"The plan is stale: {change.address} is no longer there.",
                details=[error.message],
                hint="Nothing was changed. Plan again, read it, approve it.",
            ) from error
        raise


def lock_key(name: str) -> int:
    """The advisory lock of a governance name: a signed 64-bit number made from its SHA-256."""
    return int.from_bytes(hashlib.sha256(f"reconciler:{name}".encode()).digest()[:8], "big", signed=True)


def _advisory_lock(conn: pg.Connection, name: str) -> None:
    key = lock_key(name)
    if pg.rows(conn, "SELECT pg_catalog.pg_try_advisory_xact_lock(%s::pg_catalog.int8) AS got", (key,))[0]["got"]:
        return
    holding = pg.rows(
        conn,
        """
        SELECT l.pid FROM pg_catalog.pg_locks l
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
           AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
           AND ((l.classid::pg_catalog.int8 << 32) | l.objid::pg_catalog.int8) = %s
        """,
        (key,),
    )
    who = [f"held by {person}" for person in people(conn, [row["pid"] for row in holding])]
    raise AnotherApply(
        f"Another apply of {name} is running.",
        details=who or ["held by a process that ended meanwhile"],
        hint="Nothing was changed. Wait for it, then plan again.",
    )
