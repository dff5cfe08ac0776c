"""Last step of a fleet command that writes: approved groups -> their targets, in waves, each in its own transaction.

Whether a target is done is asked of its own ledger, before each apply: it holds the ids of the approvals that were used
on it. So a rollout that was stopped, or killed, is resumed by starting it again, and no target is applied twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler import apply as applying
from reconciler import approve, ledger, pg
from reconciler import plan as plans
from reconciler.errors import OutcomeUnknown, ReconcilerError, UsageError
from reconciler.evidence import Folder
from reconciler.fleet import looks, pool
from reconciler.fleet.report import Applied, TargetResult
from reconciler.kept import Kept
from reconciler.model import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from reconciler.fleet.files import Fleet, Member
    from reconciler.fleet.groups import Group
    from reconciler.model import Approval, Plan

MOST_REASONS = 3
"""Details of an error that a result tells."""


@dataclass(frozen=True)
class Approved:
    """A group with the approvals that lie beside it or were named, each with its bytes as they were given."""

    group: Group
    approvals: Sequence[tuple[Approval, bytes]]


@dataclass(frozen=True)
class Order:
    """What an operator asks for. folder: where every target's evidence goes, each below its name; it is there.

    settle_by: what to type, for a target and its evidence, when the answer to COMMIT was lost.
    """

    fleet: Fleet
    groups: Sequence[Approved]
    initialize: bool
    untested: bool
    folder: Path
    sign: Callable[[bytes], str] | None
    settle_by: Callable[[Member, Path], str]


@dataclass
class Rollout:
    """What became of it. `halted`: the wave that it stopped in."""

    results: Sequence[TargetResult]
    interrupted: bool = False
    halted: int | None = None


def targets(order: Order, members: Sequence[Member]) -> dict[str, Approved]:
    """The group of each target.

    Raises UsageError for a target of two groups, one that the fleet does not have, and a first apply that nobody asked
    for.
    """
    found: dict[str, Approved] = {}
    known = {member.name for member in members}
    for approved in order.groups:
        plan, number = approved.group.plan, len(approved.group.names)
        if first(plan) and not order.initialize:
            raise UsageError(
                f"This would be the first apply of {plan.state.name} on {number} target{'' if number == 1 else 's'}.",
                hint="Say so with --initialize, so that a lost ledger is never mistaken for a first apply.",
            )
        for name in approved.group.names:
            if name in found:
                raise UsageError(f"Target {name} is in two of these plans.", hint="Plan again and apply the new ones.")
            found[name] = approved
    if missing := sorted(found.keys() - known):
        raise UsageError(
            f"The plan is also for {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}, which the fleet has not.",
            hint="Plan again, or put the target back into the file of the fleet.",
        )
    return found


def run(  # noqa: PLR0913 - what a rollout goes by
    order: Order,
    members: Sequence[Member],
    group_of: Mapping[str, Approved],
    waves: Mapping[str, int],
    *,
    workers: int,
    told: Callable[[Member, TargetResult], object],
    warned: Callable[[int], None],
) -> Rollout:
    """Apply wave after wave. The first target that fails ends it: what is under way ends, nothing new begins.

    members: those to apply, in their order, each with a group. told and warned: as for `pool.run`.
    """
    results: dict[str, TargetResult] = {}
    outcome = Rollout(())
    for wave in sorted({waves[member.name] for member in members}):
        crowd = [member for member in members if waves[member.name] == wave]
        done = pool.run(
            crowd,
            lambda member: one(order, group_of[member.name], member),
            workers=workers,
            told=told,
            warned=warned,
            stops=lambda result: result.state == "failed",
        )
        done.results |= {member.name: _left(member) for member in crowd if member.name in done.left}
        results |= done.results
        if done.interrupted or any(result.state == "failed" for result in done.results.values()):
            outcome.interrupted, outcome.halted = done.interrupted, wave
            break
    outcome.results = pool.in_order(members, pool.Done(results), dict(waves))
    return outcome


def one(order: Order, approved: Approved, member: Member) -> TargetResult:
    """Apply to one target, unless its ledger says that it was done. Raises nothing but what is a fault of ours."""

    def apply() -> TargetResult:
        plan = approved.group.of(member.name, order.fleet.of(member).ledger)
        # One that was used for other effects says nothing of these; the apply says what is wrong with it.
        ids = {one.id for one, _ in approved.approvals if approve.covers(one, plan.effect_digest, plan.target)}
        if before := already(member, plan, ids):
            return before
        try:
            return _apply(order, approved, member, plan)
        except ReconcilerError as error:
            # Somebody else may have been quicker with the same approval.
            if before := already(member, plan, ids):
                return before
            # There is no other place to read what stands in the way: where nothing was begun, no evidence is written.
            why = "; ".join(error.details[:MOST_REASONS])
            return looks.failed(member, error).model_copy(update={"message": f"{error.message} {why}".rstrip()})

    found = looks.told(member, apply)
    return found.model_copy(update={"state": "failed"}) if found.state == "checked" else found


def already(member: Member, plan: Plan, ids: set[str]) -> TargetResult | None:
    """The result of a target whose own ledger knows one of these approvals; None when it does not.

    The ledger of another target, to which the connection may lead by mistake or in a copy of its database, says nothing
    of this one: then the apply goes on, and is refused.
    """
    with pg.connect(member.dsn, "apply") as conn, pg.snapshot(conn):
        last = ledger.last(conn, plan.state.name)
        here = pg.identify(conn).model_copy(update={"name": member.name})
    if last.entry is None or last.home is None or not last.used & ids:
        return None
    if ledger.lives(here) != ledger.lives(plan.target) or last.home.name != member.name:
        return None
    return _result(member, "already", "no_changes").model_copy(
        update={
            "applied": Applied(
                release=last.entry.body["plan"]["state"]["release"],
                entry=last.entry.number,
                at=last.entry.body["recorded_at"],
            )
        }
    )


def _result(member: Member, state: str, outcome: str) -> TargetResult:
    return TargetResult.model_validate(
        {"name": member.name, "labels": dict(member.labels), "state": state, "outcome": outcome, "exit_code": 0}
    )


def _apply(order: Order, approved: Approved, member: Member, plan: Plan) -> TargetResult:
    """One apply with its evidence. Raises what `apply` raises; after COMMIT nothing."""
    place = order.folder / member.name
    request = applying.Request(
        dsn=member.dsn,
        plan=plan,
        approvals=[approval for approval, _ in approved.approvals],
        target=member.name,
        initialize=order.initialize and first(plan),
        allow_untested=order.untested,
        settle_by=order.settle_by(member, place),
        folder=place,
    )
    document = plan.dump()
    kept = Kept(
        Folder(place),
        plan,
        digest(document),
        plans.serialize(document),
        [(approval.approver, data) for approval, data in approved.approvals],
        None,
        order.sign,
        lambda: None,
    )
    record = applying.Record(_silent)
    try:
        done = applying.apply(request, record)
    except ReconcilerError as error:
        done = record.failed(request, error)
        if not record.committed:
            if record.begun:
                kept.write(done, None)
            else:
                kept.folder.give_back()
            raise
    problems = [*done.problems, *kept.write(done, record.entry)]
    found = _result(member, "applied", "applied")
    entry = record.entry
    applied = entry and Applied(release=plan.state.release, entry=entry.number, at=entry.body["recorded_at"])
    return found.model_copy(
        update={
            "checked_at": done.finished_at,
            "applied": applied,
            "summary": done.summary,
            "group": plan.effects_digest,
            "message": f"Applied, but: {'; '.join(problems)}" if problems else "",
        }
    )


def first(plan: Plan) -> bool:
    """Would it be the first apply of its name on its database?"""
    return any(change.kind == "policy" and change.before is None for change in plan.setup)


def _left(member: Member) -> TargetResult:
    """A target whose apply was left under way: nobody waited for its end."""
    error = OutcomeUnknown(
        "Left while it was applied; nobody waited to hear what became of it. Start the rollout again, which asks its"
        " ledger."
    )
    return looks.failed(member, error).model_copy(update={"state": "failed"})


def _silent(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
    """Nobody is told of the steps of one apply among many."""
