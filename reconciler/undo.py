"""Beside the flow: a plan is applied and reverted in one transaction that is rolled back: does anything remain?"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import execute, live, pg
from reconciler.apply import manifest
from reconciler.diff import changes as differences
from reconciler.errors import Refused, Stale
from reconciler.model import FORMAT_VERSION, Model, Target, canonical, digest, milliseconds
from reconciler.plan import remembered, stamp
from reconciler.revert import Undo, declarations
from reconciler.setup import scope
from reconciler.survey import survey
from reconciler.trust import check_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler.model import Change, Desired, Json, Live, Plan


class Identity(Model):
    """What apply-then-revert came to. Digests of everything the plan changes: before, applied, reverted."""

    format_version: str = FORMAT_VERSION
    outcome: str
    target: Target
    seconds: float
    before: str
    applied: str
    reverted: str
    left: tuple[str, ...]
    """What is not as it was, a line each."""


def prove(dsn: str | None, plan: Plan, *, allow_untested: bool = False) -> Identity:
    """Run the plan's statements, then those that undo them, then roll back. Nothing is committed.

    Raises PlanDamaged, Stale when the plan is not what the database needs now, Refused naming what cannot be undone,
    Locked and ServerProblem as an apply does.
    """
    started = time.monotonic()
    desired = check_plan(plan)
    with pg.connect(dsn, "revert") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        limits = desired.policy.apply
        pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        try:
            pg.settings(conn, milliseconds(limits.statement_timeout))
            pg.run(conn, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(milliseconds(limits.lock_timeout))))
            found = _round_trip(conn, plan, desired)
        finally:
            if not (conn.closed or conn.broken):
                conn.rollback()
    return found.model_copy(update={"seconds": round(time.monotonic() - started, 3)})


def _round_trip(conn: pg.Connection, plan: Plan, desired: Desired) -> Identity:
    found = survey(conn, desired)
    now = pg.rows(conn, "SELECT pg_catalog.clock_timestamp() AS now")[0]["now"]
    if found.plan(now).effect_digest != plan.effect_digest:
        raise Stale("The plan is stale: what is there now is not what it was made for.", hint="Plan again.")
    allowed = found.last.allow_functions
    learned = execute.everything(conn, plan.changes, desired.items, desired.policy, _values(conn, desired))
    desired = replace(desired, remembered={**remembered(found.last.manifest), **learned})
    applied = live.read(conn, desired, allowed)
    if left := differences(desired, applied, {}):
        raise Refused("The plan does not lead to what it says.", details=[change.address for change in left])
    body: dict[str, Json] = {
        "manifest": {
            address: entry.dump() for address, entry in manifest(desired, applied, found.last.manifest).items()
        },
        "plan": plan.dump(),
        "policy": desired.policy.dump(),
        "scope": scope(desired),
        "run_id": stamp(now),
    }
    installed = found.last.entry.body if found.last.entry else None
    undo = Undo("this plan", plan.changes, installed, body, body)
    wanted = declarations(undo, desired)
    back = differences(wanted, live.read(conn, wanted, allowed), body["manifest"])
    execute.everything(conn, back, wanted.items, desired.policy, _values(conn, wanted))
    # As the catalog shows it, whatever was written: what the ledger remembered before is compared with itself.
    reverted = live.read(conn, replace(desired, remembered=remembered(found.last.manifest)), allowed)
    addresses = sorted(change.address for change in plan.changes)
    before, after = _image(found.live, addresses), _image(reverted, addresses)
    left = tuple(
        f"{address}: {_said(before[address], after[address])}"
        for address in addresses
        if before[address] != after[address]
    )
    return Identity(
        outcome="drift" if left else "no_changes",
        target=plan.target,
        seconds=0.0,
        before=digest(before),
        applied=digest(_image(applied, addresses)),
        reverted=digest(after),
        left=left,
    )


def _values(conn: pg.Connection, desired: Desired) -> Callable[[Change], Sequence[str]]:
    return lambda change: live.values(conn, change, desired.items)


def _image(found: Live, addresses: list[str]) -> dict[str, Json]:
    return {address: found.items[address].dump() if address in found.items else None for address in addresses}


def _said(before: Json, after: Json) -> str:
    if before is None or after is None:
        return "is still there" if before is None else "did not come back"
    names: Mapping[str, Json] = before
    return ", ".join(name for name in names if canonical(before[name]) != canonical(after.get(name))) + " differ"


def exit_code(found: Identity) -> int:
    """2 when something remains, as for drift; else 0."""
    return 2 if found.left else 0
