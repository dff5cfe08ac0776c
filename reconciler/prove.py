"""Beside the flow: the declared proofs on a target, in one transaction that is rolled back whatever they come to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import ledger, live, pg
from reconciler.checks.proof import CHECK
from reconciler.model import Asked, ProofReport, Rehearsal, Scope, Target, Verdict, blocking, milliseconds
from reconciler.scratch import secret

if TYPE_CHECKING:
    from reconciler.model import Desired


def prove(dsn: str | None, desired: Desired, *, allow_untested: bool = False) -> ProofReport:
    """Play the proofs on the database as it is. Raises UsageError, ServerProblem, Locked."""
    started = time.monotonic()
    with pg.connect(dsn, "prove") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        policy = desired.policy.apply
        pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        try:
            pg.settings(conn, milliseconds(policy.statement_timeout))
            pg.run(conn, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(milliseconds(policy.lock_timeout))))
            target = live.identify(conn, desired)
            allowed = ledger.last(conn, desired.name).allow_functions
            pg.run(conn, "SET CONSTRAINTS ALL IMMEDIATE")
            asked = Asked(desired, allowed, inside=True)
            # What a function answers or raises may be a secret, which has to be known to be left out.
            live.read(conn, _secret_ones(desired), allowed)
            verdicts = tuple(
                live.spoken(conn, CHECK.run(conn, check, asked))
                for check in desired.checks.values()
                if check.kind == CHECK.name
            )
        finally:
            if not (conn.closed or conn.broken):
                conn.rollback()
    return report(target, verdicts, time.monotonic() - started)


def _secret_ones(desired: Desired) -> Desired:
    """The same with nothing but secrets, and no scope."""
    items = {address: desired.items[address] for address in secret(desired)}
    return replace(desired, items=items, stores={}, scope=Scope())


def report(
    target: Target, verdicts: tuple[Verdict, ...], seconds: float, rehearsal: Rehearsal | None = None
) -> ProofReport:
    """The verdicts with the word that sums them up."""
    return ProofReport(
        outcome="proof_failed" if blocking(verdicts) else "no_changes",
        target=target,
        seconds=round(seconds, 3),
        proofs=verdicts,
        rehearsal=rehearsal,
    )


def exit_code(found: ProofReport) -> int:
    """3 when a proof failed or could not be judged, else 0."""
    return 3 if found.outcome == "proof_failed" else 0
