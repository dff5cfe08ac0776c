"""Beside the flow: one invariant on trial. What is done to the database is undone; the invariant's own code judges it.

The ground that `violations` stands on. Never on a target: what is tried here takes locks and breaks things on purpose.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import psycopg
from psycopg import sql

from reconciler import pg
from reconciler.checks.invariant import CHECK
from reconciler.errors import ReconcilerError
from reconciler.model import Asked, Check, Json, Model, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from psycopg.sql import Composed

STATEMENT_TIMEOUT_MS = 20_000
LOCK_TIMEOUT_MS = 5_000

HOLDS = ("held", "attested")


class Attempt(Model):
    """One thing that was done, in words, and what came of it.

    violated, held: what the invariant said. refused: the server did not let it happen. not tried: why. without: the
    constraints and triggers that had to be taken away for it.
    """

    tried: str
    outcome: Literal["violated", "held", "refused", "not tried"]
    detail: str = ""
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`tried, without ...: outcome: detail`."""
        gone = f", without {', '.join(self.without)}" if self.without else ""
        return ": ".join(part for part in (f"{self.tried}{gone}", self.outcome, self.detail) if part)


class Trial:
    """The invariant, asked as an apply asks it just before COMMIT."""

    def __init__(self, conn: pg.Connection, check: Check, asked: Asked) -> None:
        """`conn`: idle or in a transaction that may be rolled back to a savepoint. Somebody signed for the claim."""
        self.conn = conn
        self.check = check
        self.asked = replace(asked, inside=True, attested={*asked.attested, check.name})

    @contextmanager
    def transaction(self, given: Callable[[], None] | None = None) -> Generator[Verdict]:
        """A transaction (or savepoint) that is rolled back. given: done before the invariant takes its first look.

        Yields the verdict while nothing has happened yet.
        """
        with undone(self.conn):
            pg.settings(self.conn, STATEMENT_TIMEOUT_MS)
            pg.run(self.conn, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT_MS)))
            pg.run(self.conn, "SET CONSTRAINTS ALL IMMEDIATE")
            if given is not None:
                given()
            self.remember()
            yield self.verdict()

    def remember(self) -> None:
        """What the invariant keeps in mind at BEGIN of an apply."""
        self.asked = replace(self.asked, memo=memo_of(self.conn, self.check, self.asked))

    def verdict(self) -> Verdict:
        """What the invariant says now."""
        return judged(self.conn, self.check, self.asked)

    def attempt(self, tried: str, make: Callable[[], None]) -> Attempt:
        """Do it, ask, undo it. Inside `transaction`."""
        try:
            with undone(self.conn):
                make()
                return outcome(tried, self.verdict())
        except ReconcilerError as error:
            return Attempt(tried=tried, outcome="refused", detail=refusal(error))

    def first(self, tried: str, ways: Iterable[Sequence[Composed]]) -> Attempt:
        """The first way, a list of statements, that the server lets happen. Inside `transaction`."""
        attempt = Attempt(tried=tried, outcome="not tried", detail="there is nothing to do it to")
        for statements in ways:
            attempt = self.attempt(tried, lambda statements=statements: run(self.conn, statements))
            if attempt.outcome != "refused":
                break
        return attempt


def outcome(tried: str, verdict: Verdict) -> Attempt:
    """The verdict as the end of an attempt."""
    if verdict.status == "violated":
        return Attempt(tried=tried, outcome="violated", detail=verdict.detail)
    if verdict.status in HOLDS:
        return Attempt(tried=tried, outcome="held", detail=verdict.detail)
    return Attempt(tried=tried, outcome="refused", detail=f"it could not be judged: {verdict.detail}")


def judged(conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
    """The check's own verdict; an error of its query is one that is not judged."""
    try:
        with undone(conn):
            # As `live` does before an apply judges: statistics views are cached for the whole transaction.
            pg.rows(conn, "SELECT pg_catalog.pg_stat_clear_snapshot()::pg_catalog.text AS cleared")
            return CHECK.run(conn, check, asked)
    except ReconcilerError as error:
        return Verdict(address=check.address, status="not_judged", detail=error.message)


def memo_of(conn: pg.Connection, check: Check, asked: Asked) -> Json:
    """What the check remembers; nothing when its query fails."""
    try:
        with undone(conn):
            return CHECK.remember(conn, check, asked)
    except ReconcilerError:
        return None


@contextmanager
def undone(conn: pg.Connection) -> Generator[None]:
    """Whatever happens inside is rolled back, whether it fails or not."""
    with conn.transaction(force_rollback=True):
        yield


@contextmanager
def kept(conn: pg.Connection) -> Generator[None]:
    """What happens inside stays, until the transaction around it is rolled back; undone when it fails."""
    with conn.transaction():
        yield


def run(conn: pg.Connection, statements: Iterable[Composed]) -> None:
    """Statements one after the other. Raises what `pg.run` raises."""
    for statement in statements:
        pg.run(conn, statement)


def diagnosis(error: BaseException) -> psycopg.errors.Diagnostic | None:
    """What the server told the driver, None when the error is not its."""
    return error.__cause__.diag if isinstance(error.__cause__, psycopg.Error) else None


def refusal(error: ReconcilerError) -> str:
    """Why the server refused, naming the constraint where one stood in the way."""
    diag = diagnosis(error)
    if diag is not None and diag.constraint_name:
        return f"constraint {diag.constraint_name} of {diag.table_name or diag.datatype_name or 'the database'}"
    return error.message
