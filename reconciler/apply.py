"""Last step of the flow: an approved plan -> the database, in one transaction that commits only what was approved."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from reconciler import (
    approve,
    backup,
    bystanders,
    capabilities,
    carried,
    deferred,
    execute,
    ledger,
    live,
    locks,
    pg,
    rehome,
    settle,
    setup,
)
from reconciler.diff import changes as diff_changes
from reconciler.errors import (
    Locked,
    MissingPrivilege,
    NotApproved,
    ReconcilerError,
    Refused,
    ServerProblem,
    Stale,
    UsageError,
)
from reconciler.kinds import kinds
from reconciler.model import (
    FORMAT_VERSION,
    Approval,
    Asked,
    Body,
    Change,
    Desired,
    Entry,
    Executed,
    Governed,
    Json,
    Live,
    Outcome,
    Plan,
    Policy,
    Statement,
    Verdict,
    blocking,
    canonical,
    milliseconds,
    tolerated,
)
from reconciler.plan import remembered, stamp, with_forgotten
from reconciler.record import Progress, Record, Request
from reconciler.survey import Survey, survey
from reconciler.trust import EDITED, check_plan, same_target
from reconciler.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime


TAKEN = frozenset({"23505", "42710", "42723", "42P06", "42P07"})
"""What PostgreSQL says when something is there already: a key, an object, a function, a schema, a table."""


COMMITTING = 10.0
"""Seconds that the answer to COMMIT may take at least, also when max_duration is nearly over."""


@dataclass(frozen=True)
class _Run:
    """One apply under way."""

    request: Request
    desired: Desired
    policy: Policy
    ledger_exists: bool
    deadline: float
    waits: Waits
    progress: Record
    rehearsed: Mapping[str, Verdict]
    remembered: dict[str, Json] = field(default_factory=dict[str, "Json"])
    """What is known of objects whose text the catalog rewrites; grows while statements are executed."""

    @property
    def knowing(self) -> Desired:
        """What is declared, with all that is remembered by now."""
        return replace(self.desired, remembered=self.remembered)

    @property
    def run_id(self) -> str:
        """Chosen before anything begins: the evidence's folder is named by it."""
        return self.request.run_id


def apply(request: Request, progress: Progress) -> Outcome:
    """Apply the plan, or change nothing. `progress`: a Record is asked afterwards what a failed run had done.

    Raises PlanDamaged, UsageError, ServerProblem, Violated, ProofFailed, NotApproved, Stale, Locked; OutcomeUnknown
    when the connection was lost while COMMIT was under way and the ledger could not be asked.
    """
    record = progress if isinstance(progress, Record) else Record(progress)
    progress = record
    desired = check_plan(request.plan)
    if request.target is not None and request.target != request.plan.target.name:
        raise Stale(
            f"The plan is for target {request.plan.target.name}, not {request.target}.",
            hint="Apply it where it was made for, or plan again here.",
        )
    rehearsed = carried.verdicts(request.rehearsal, request.plan, desired) if request.rehearsal is not None else {}
    progress("connect")
    with pg.connect(request.dsn, "apply") as conn:
        pg.check_version(conn, allow_untested=request.allow_untested)
        progress("check", "identity, approvals, privileges")
        last = _preflight(conn, request, desired, record)
        policy = last.policy or desired.policy
        with Waits(request.dsn, milliseconds(policy.apply.lock_timeout)) as waits:
            run = _Run(
                request=request,
                desired=desired,
                policy=policy,
                ledger_exists=last.exists,
                deadline=time.monotonic() + milliseconds(policy.apply.max_duration) / 1000,
                waits=waits,
                progress=record,
                rehearsed=rehearsed,
            )
            record.begun = True
            _transaction(conn, run)
    problems: list[str] = []
    if not rehome.is_one(request.plan):
        problems += _whatever_happens(
            "not backed up after the apply", lambda: _back_up_after(request, desired, policy, record)
        )
        problems += _whatever_happens("not planned again", lambda: _plan_again(request, desired, record))
    record.end()
    return record.outcome(request, "applied", problems)


# ---------------------------------------------------------------------------------------------------- before the change


def _preflight(conn: pg.Connection, request: Request, desired: Desired, record: Record) -> ledger.Last:
    """Everything that can be refused without a lock, and the backup. Returns the ledger, whose policy judges."""
    plan = request.plan
    with pg.snapshot(conn):
        target = live.identify(conn, desired)
        same_target(plan.target, target)
        last = ledger.last(conn, desired.name)
        if not last.readable:
            raise MissingPrivilege(last.findings[0].message)
        if not rehome.is_one(plan):
            ledger.check_named(desired, last, target)
        if stamp(_server_time(conn)) >= plan.expires_at:
            raise NotApproved(f"The plan expired at {plan.expires_at}.", hint="Make it again and read it again.")
        if last.exists:
            ledger.check_shape(conn, written_by_us=True)
        approve.verify(
            request.approvals,
            _court(conn, plan, last, desired),
            effect_digest=plan.effect_digest,
            hazards=plan.hazards,
            attestations=plan.attestations,
        )
        if last.entry is None and not request.initialize:
            raise UsageError(
                f"This would be the first apply of {desired.name} on database {target.database}.",
                hint="Say so with --initialize, so that a lost ledger is never mistaken for a first apply.",
            )
        if last.entry is not None and request.initialize:
            raise Refused(
                f"--initialize, but {desired.name} was applied here before (entry {last.entry.number}).",
                hint="Leave the option out.",
            )
        capabilities.check(conn, desired, plan, ledger_exists=last.exists)
        for change in plan.changes:
            # Once more when it is executed; a secret that is not there or another one need not hold a lock before.
            live.values(conn, change, desired.items)
        if request.rehearsal is not None:
            carried.same_schema(conn, request.rehearsal)
        policy = last.policy or desired.policy
        if policy.apply.backup != "none" and not rehome.is_one(plan):
            # In this snapshot: then the backup holds what was approved as it is changed, and a policy that nobody saw
            # runs no command.
            _as_approved(plan, survey(conn, desired), _server_time(conn))
            record.backups.append(backup.make(conn, _to_back_up(request, desired, policy, last, record, "before")))
            record.begun = True
    return last


def _to_back_up(  # noqa: PLR0913, PLR0917 - all that is known at that moment
    request: Request,
    desired: Desired,
    policy: Policy,
    last: ledger.Last,
    record: Record,
    moment: Literal["before", "after"],
) -> backup.Task:
    return backup.Task(
        dsn=request.dsn,
        governed=with_forgotten(desired, last.manifest),
        allow_functions=tuple(last.allow_functions),
        policy=policy.apply,
        target=request.plan.target,
        run_id=request.run_id,
        folder=request.folder,
        moment=moment,
        progress=record,
    )


def _court(conn: pg.Connection, plan: Plan, last: ledger.Last, desired: Desired) -> approve.Court:
    """By what approvals are judged: what is installed; at a first apply what the plan installs."""
    allowed = desired.approvers if last.entry is None else last.approvers
    now = _server_time(conn)
    return approve.Court(
        policy=last.policy or desired.policy,
        allowed=allowed,
        used=last.used,
        now=now,
        author=approve.author(plan, allowed, now),
        rehomed_at=last.rehomed_at,
        target=plan.target,
    )


def _server_time(conn: pg.Connection) -> datetime:
    return pg.rows(conn, "SELECT pg_catalog.clock_timestamp() AS now")[0]["now"]


# ------------------------------------------------------------------------------------------------------ the transaction


def _transaction(conn: pg.Connection, run: _Run) -> None:
    """BEGIN to COMMIT. Whatever is raised before COMMIT leaves the database as it was."""
    record = run.progress
    try:
        with run.waits.named(), pg.within(conn, pg.Limit(run.deadline, lambda: _too_late(run))):
            xid = _rehome(conn, run) if rehome.is_one(run.request.plan) else _change(conn, run)
        record.finished_at = stamp(_server_time(conn))
    except BaseException:
        pg.roll_back(conn)
        with suppress(ReconcilerError), pg.within(conn, pg.lost(pg.GRACE)):
            record.finished_at = stamp(_server_time(conn))
        raise
    record("commit")
    # Whoever waits for COMMIT cannot take it back: when there is no answer, the ledger is asked what became of it.
    with pg.within(conn, pg.lost(max(run.deadline - time.monotonic(), COMMITTING))):
        settle.commit(conn, _case(run, xid), record)


def _change(conn: pg.Connection, run: _Run) -> str:
    """Lock, read again, execute, verify, record: everything but COMMIT. Returns the transaction id."""
    record = run.progress
    before = locks.take(conn, _task(run), lambda xid: _unchanged(conn, run, xid))
    record.found = before.survey
    run.remembered.update(remembered(before.survey.last.manifest))
    memos = live.remember(conn, Asked(run.desired, before.survey.last.allow_functions))
    seen = bystanders.look(conn, run.desired)
    _execute(conn, run)
    run.waits.ready(conn)
    verdicts, found = _look_again(conn, run, memos, seen, before.approvals)
    record.found = replace(before.survey, live=found)
    record.entry = _record(conn, run, before, found, verdicts)
    _still(conn, run, found, before.xid)
    return before.xid


def _rehome(conn: pg.Connection, run: _Run) -> str:
    """The ledger's next entry says where it is now; nothing else is written or judged. Returns the transaction id."""
    plan = run.request.plan

    def confirm(xid: str) -> str:
        now = _server_time(conn)
        run.progress.transaction_id, run.progress.started_at = xid, stamp(now)
        run.progress("read", "the ledger again, under its lock")
        again, last = rehome.plan(conn, run.desired, now)
        same_target(plan.target, again.target)
        if again.effect_digest != plan.effect_digest:
            raise Stale(
                "The plan is stale: the ledger is not what it was when this was approved.",
                hint="Nothing was changed. Make it again with `reconciler rehome`, read it, approve it.",
            )
        court = _court(conn, plan, last, run.desired)
        counted = approve.verify(
            run.request.approvals,
            court,
            effect_digest=again.effect_digest,
            hazards=again.hazards,
            attestations=(),
        )
        run.progress("record")
        body = last.body.model_copy(
            update={
                "run_id": run.run_id,
                "recorded_at": stamp(now),
                "target": again.target,
                "plan": again.dump(),
                "approvals": tuple(counted),
                "checks": (),
                "emergencies": approve.emergencies(
                    last.emergencies, last.number + 1, stamp(now), counted, again, court
                ),
                "transaction_id": xid,
                "rehomed_at": stamp(now),
            }
        )
        run.progress.entry = ledger.append(conn, run.desired.name, last, body)
        return xid

    return locks.take(conn, _task(run), confirm)


def _task(run: _Run) -> locks.Task:
    return locks.Task(
        plan=run.request.plan,
        desired=run.desired,
        policy=run.policy.apply,
        ledger_exists=run.ledger_exists,
        waits=run.waits,
        progress=run.progress,
        in_time=lambda: _in_time(run),
    )


def _case(run: _Run, xid: str) -> settle.Case:
    """What must be known to find out later whether the run was committed."""
    asked = run.request
    return settle.Case(
        dsn=asked.dsn,
        plan=asked.plan,
        desired=run.desired,
        run_id=run.run_id,
        transaction_id=xid,
        command=asked.settle_by,
        allow_untested=asked.allow_untested,
    )


@dataclass(frozen=True)
class _Confirmed:
    """What the look under the locks gave: all that was seen, the plan made again, and which approvals count by what."""

    xid: str
    survey: Survey
    plan: Plan
    court: approve.Court
    approvals: Sequence[Approval]


def _unchanged(conn: pg.Connection, run: _Run, xid: str) -> _Confirmed:
    """Under the locks: read everything again, plan again, and go on only with the digest that was approved."""
    run.progress.transaction_id, run.progress.started_at = xid, stamp(_server_time(conn))
    run.progress("read", "planning again under the locks")
    found = survey(conn, run.desired)
    plan = run.request.plan
    same_target(plan.target, found.target)
    again = _as_approved(plan, found, _server_time(conn))
    court = _court(conn, plan, found.last, run.desired)
    counted = approve.verify(
        run.request.approvals,
        court,
        effect_digest=again.effect_digest,
        hazards=again.hazards,
        attestations=again.attestations,
    )
    if _rendered(again) != _rendered(plan):
        raise NotApproved(
            "The plan's statements are not those that its approved effects give.",
            details=[
                f"{ours[0]}: the plan holds other statements or hazards"
                for ours, theirs in zip(_rendered(again), _rendered(plan), strict=False)
                if ours != theirs
            ][:10],
            hint=EDITED,
        )
    run.progress.verdicts = found.verdicts
    approve.refuse_blocked(again)
    return _Confirmed(xid, found, again, court, counted)


def _as_approved(plan: Plan, found: Survey, now: datetime) -> Plan:
    """The plan made again from what is there now. Raises Stale when that is not what was approved."""
    try:
        again = found.plan(now)
    except Refused as error:
        raise Stale("The plan is stale: the live database no longer allows it.", details=error.details) from error
    if again.effect_digest != plan.effect_digest:
        raise Stale(
            "The plan is stale: what is there now is not what was approved.",
            details=_differences(plan, again),
            hint="Nothing was changed. Plan again, read it, approve it.",
        )
    return again


def _differences(plan: Plan, again: Plan) -> list[str]:
    """The first differences between what was approved and what would be done now, a line each."""
    old = {change.address: change for change in (*plan.setup, *plan.changes)}
    new = {change.address: change for change in (*again.setup, *again.changes)}
    lines: list[str] = []
    for address in sorted({*old, *new}):
        approved, now = old.get(address), new.get(address)
        if approved is None and now is not None:
            lines.append(f"{address}: nothing was approved, now it needs {'/'.join(now.actions)}: {now.reason}")
        elif now is None:
            lines.append(f"{address}: already as desired")
        elif approved is not None and now.effect() != approved.effect():
            was, live_now = approved.before or {}, now.before or {}
            names = [name for name in sorted({*was, *live_now}) if was.get(name) != live_now.get(name)]
            what = f"the live {', '.join(names)} changed" if names else "the effect changed"
            lines.append(f"{address}: {what}")
    return lines[:10] or ["the declarations, the policy or the checks are not those that were approved"]


def _rendered(plan: Plan) -> list[tuple[str, Any, Any]]:
    return [(change.address, change.statements, change.hazards) for change in (*plan.setup, *plan.changes)]


def _execute(conn: pg.Connection, run: _Run) -> None:
    """Every statement of the plan in its order, each under its role and the declared path."""
    total, number = len(run.request.plan.statements), 0
    for change in (*run.request.plan.setup, *run.request.plan.changes):
        chosen = execute.path_of(change, run.desired.items, run.policy)
        answer = ""
        for statement in change.statements:
            number += 1
            run.progress("execute", change.address, number, total)
            # The server's own limit comes last, so that it is we who say why.
            remaining = int(_in_time(run) * 1000) + locks.BELT
            pg.timeout(conn, min(milliseconds(run.policy.apply.statement_timeout), remaining))
            run.waits.ready(conn)
            begun = time.monotonic()
            answer = _send(conn, run, change, statement, chosen) or answer
            run.progress.executed.append(
                Executed(
                    address=change.address,
                    text=statement.text,
                    role=statement.role,
                    seconds=round(time.monotonic() - begun, 6),
                )
            )
        run.remembered.update(execute.learned(conn, change))
        if change.kind == "marker" and change.after is not None:
            _marker_is_there(conn, run, change, answer)
    pg.run(conn, "SET LOCAL search_path = ''")


def _send(conn: pg.Connection, run: _Run, change: Change, statement: Statement, path: Sequence[str]) -> str:
    """Execute one statement. What somebody else created since the last look makes the plan stale."""
    values = live.values(conn, change, run.desired.items)
    try:
        return execute.one(conn, statement, path, change.address, values)
    except ServerProblem as error:
        if change.before is None and getattr(error.__cause__, "sqlstate", None) in TAKEN:
            raise Stale(
                f"The plan is stale: somebody created {change.address} at the same time.",
                details=[error.message],
                hint="Nothing was changed. Plan again, read it, approve it.",
            ) from error
        raise


def _marker_is_there(conn: pg.Connection, run: _Run, change: Change, answer: str) -> None:
    """`via` is judged by reading the row, and its answer is quoted when the row is missing."""
    kind, item = kinds()["marker"], run.desired.items[change.address]
    pg.run(conn, "SET LOCAL search_path = ''")
    nothing_else = replace(run.desired, scope=run.desired.scope.model_copy(update={"markers": ()}))
    found = kind.read(conn, [item], nothing_else, run.policy.allow_functions)
    if change.address not in found.items:
        raise Stale(
            f"{change.address}: its statement ran, but there is no row.",
            details=[f"answer: {conn.unspoken.without(answer)}"] if answer else (),
            hint="Nothing was changed. The answer says why the row was refused.",
        )


def _look_again(
    conn: pg.Connection, run: _Run, memos: Mapping[str, Json], seen: bystanders.Seen, counted: Sequence[Approval]
) -> tuple[Sequence[Verdict], Live]:
    """Verify by reading: nothing left to do, every object as approved, every invariant held. Raises Stale, Violated."""
    run.progress("verify", "reading everything again before COMMIT")
    _drain(conn, run)
    allowed = ledger.last(conn, run.desired.name).allow_functions
    found = live.read(conn, run.knowing, allowed)
    wrong = [
        f"{change.address}: not what was approved after its statements ran"
        for change in run.request.plan.changes
        if change.after is not None and not _settled(change, found)
    ]
    try:
        left = diff_changes(run.desired, found, {})
    except Refused as error:
        left, wrong = (), [*wrong, *error.details]
    wrong += [
        f"{change.address}: {', '.join(field.name for field in change.fields) or change.reason}" for change in left
    ]
    wrong += bystanders.moved(conn, run.desired, seen, run.request.plan.changes)
    if wrong:
        raise Stale(
            "Rolled back: after the statements ran, the database was not what was approved.",
            details=wrong,
            hint="Something in the database changes what is written: a trigger, a rule, an event trigger.",
        )
    run.progress("judge", "invariants, surface and proofs")
    asked = Asked(
        desired=run.desired,
        allow_functions=allowed,
        inside=True,
        changes=run.request.plan.changes,
        attested={name for approval in counted for name in approval.attestations},
        rehearsed=run.rehearsed,
    )
    judged = (*live.judge(conn, asked, memos), *live.unjudged(run.desired, found))
    verdicts = tolerated(judged, run.policy)
    run.progress.verdicts = verdicts
    approve.refuse(blocking(verdicts))
    return verdicts, found


def _drain(conn: pg.Connection, run: _Run) -> None:
    deferred.drain(conn, milliseconds(run.policy.apply.statement_timeout), lambda: _in_time(run))


def _settled(change: Change, found: Live) -> bool:
    kind = kinds()[change.kind]
    return kind.settled(kind.load(change.after), found.items.get(change.address))


def _record(conn: pg.Connection, run: _Run, before: _Confirmed, found: Live, verdicts: Sequence[Verdict]) -> Entry:
    """The ledger entry, in the same transaction. It holds the plan as made again here, not the file's."""
    run.progress("record")
    last, recorded_at = before.survey.last, stamp(_server_time(conn))
    body = Body(
        format_version=FORMAT_VERSION,
        run_id=run.run_id,
        recorded_at=recorded_at,
        target=before.plan.target,
        plan=before.plan.dump(),
        approvals=tuple(before.approvals),
        policy=run.desired.policy,
        approvers=run.desired.approvers,
        scope=setup.scope(run.desired),
        manifest=manifest(run.desired, found, before.survey.last.manifest),
        checks=tuple(verdicts),
        emergencies=approve.emergencies(
            last.emergencies, last.number + 1, recorded_at, before.approvals, before.plan, before.court
        ),
        transaction_id=before.xid,
        rehomed_at=before.survey.last.rehomed_at,
    )
    return ledger.append(conn, run.desired.name, last, body)


def _still(conn: pg.Connection, run: _Run, found: Live, xid: str) -> None:
    """The very last look: nothing is left to run at COMMIT, nothing governed moved, it is still our transaction."""
    _drain(conn, run)
    left = pg.rows(
        conn,
        """
        SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text AS xid,
               -- An older one is somebody else's, whose session we have from a pooler, and has run already.
               (SELECT pg_catalog.count(*) FROM pg_catalog.pg_cursors
                 WHERE is_holdable AND creation_time >= pg_catalog.transaction_timestamp()) AS cursors
        """,
    )[0]
    if left["xid"] != xid:
        raise ServerProblem(f"The transaction changed under us from {xid} to {left['xid']}; nothing may be committed.")
    if left["cursors"]:
        raise Stale(
            "Rolled back: something opened a cursor WITH HOLD, whose query would run at COMMIT.",
            hint="Look at the triggers of the tables that were written.",
        )
    now = live.read(conn, run.knowing, run.policy.allow_functions).items
    if moved := sorted(address for address in {*now, *found.items} if now.get(address) != found.items.get(address)):
        raise Stale(
            "Rolled back: writing the ledger entry changed what is governed.",
            details=moved,
            hint="Somebody put a trigger or a rule on reconciler.entry.",
        )


def manifest(desired: Desired, found: Live, last: Mapping[str, Json]) -> dict[str, Governed]:
    """Everything declared, objects in their live form: what the next drift is measured against.

    last: the one before. What could not be compared, and is tolerated so, stays as it was there.
    """
    unjudged = {address for address, facts in found.facts.items() if "not_judged" in facts}
    kept = {
        address: Governed.model_validate_json(
            canonical({**last[address], "rules": desired.items[address].rules.dump()})
        )
        for address in unjudged & last.keys() & desired.items.keys()
    }
    entries = {
        address: Governed(
            kind=item.kind,
            name=item.name,
            spec=kinds()[item.kind].essence(found.items[address]).dump(),
            rules=item.rules.dump(),
            facts={
                key: value for key, value in found.facts[address].items() if key in {"xmin", "updated_at", "remembered"}
            },
        )
        for address, item in desired.items.items()
        if address in found.items and address not in unjudged
    }
    return (
        entries
        | kept
        | {
            address: Governed(kind=check.kind, name=check.name, spec=check.spec.dump())
            for address, check in desired.checks.items()
        }
    )


def _in_time(run: _Run) -> float:
    """Seconds left of max_duration. Raises Locked when there are none."""
    remaining = run.deadline - time.monotonic()
    if remaining <= 0:
        raise _too_late(run)
    return remaining


def _too_late(run: _Run) -> Locked:
    return Locked(
        f"The apply took longer than max_duration {run.policy.apply.max_duration} and was rolled back"
        f" while it was at: {run.progress.doing}",
        hint="Nothing was changed. Find what it waited for, or raise governance.apply.max_duration.",
    )


# -------------------------------------------------------------------------------------------------------------- the end


def _whatever_happens(without: str, step: Callable[[], list[str]]) -> list[str]:
    """After COMMIT nothing changes the result; what goes wrong now is said as a problem: that it was done `without`."""
    try:
        return step()
    except KeyboardInterrupt:
        return [f"{without}: interrupted"]
    except ReconcilerError as error:
        return [f"{without}: {error.message}"]
    except Exception as error:  # noqa: BLE001 - the change stands
        return [f"{without}: {type(error).__name__}: {error}"]


def _back_up_after(request: Request, desired: Desired, policy: Policy, record: Record) -> list[str]:
    """By the policy that the backup before was made by."""
    if policy.apply.backup != "none":
        with pg.connect(request.dsn, "apply") as conn, pg.snapshot(conn):
            last = ledger.last(conn, desired.name)
            record.backups.append(backup.make(conn, _to_back_up(request, desired, policy, last, record, "after")))
    return []


def _plan_again(request: Request, desired: Desired, record: Record) -> list[str]:
    record("after", "planning again on a new connection")
    return _after(request, desired, record)


def _after(request: Request, desired: Desired, record: Record) -> list[str]:
    """What a plan shows that should be empty now, and every check that blocks; `record` keeps the surface as it is."""
    try:
        with pg.connect(request.dsn, "apply") as conn, pg.snapshot(conn):
            again = survey(conn, desired)
            left = again.plan(_server_time(conn))
            record.surface_later = live.numbers(conn, Asked(desired, again.last.allow_functions))
    except ReconcilerError as error:
        return [f"planning again failed: {error.message}"]
    problems = [f"planning again shows {change.address}: {change.reason}" for change in (*left.setup, *left.changes)]
    return problems + [f"{verdict.address}: {verdict.status}: {verdict.detail}" for verdict in left.blocking]
