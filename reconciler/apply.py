"""Last step of the flow: an approved plan -> the database, in one transaction that commits only what was approved."""

from __future__ import annotations

import hashlib
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from psycopg import sql

from reconciler import __version__, approve, ledger, live, pg
from reconciler.diff import changes as diff_changes
from reconciler.errors import (
    Locked,
    MissingPrivilege,
    NotApproved,
    OutcomeUnknown,
    PlanDamaged,
    ReconcilerError,
    Refused,
    ServerProblem,
    Stale,
    UsageError,
)
from reconciler.kinds import kinds
from reconciler.model import (
    Approval,
    Asked,
    Change,
    Desired,
    Entry,
    Executed,
    Failure,
    Json,
    Live,
    Model,
    Outcome,
    Plan,
    Policy,
    Stage,
    Target,
    Verdict,
    Yes,
    blocking,
    milliseconds,
)
from reconciler.plan import dump_desired, effect_digest, effects_digest, load_desired, of_kind, stamp, summarize
from reconciler.survey import Survey, survey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime


TAKEN = frozenset({"23505", "42710", "42723", "42P06", "42P07"})
"""What PostgreSQL says when something is there already: a key, an object, a function, a schema, a table."""


class Progress(Protocol):
    """Told what apply is about to do: the stage, and within `execute` which of how many statements."""

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        """Called before each step."""
        ...


@dataclass(frozen=True)
class Request:
    """What an operator asks for. `target`: the -t option, None when not given."""

    dsn: str | None
    plan: Plan
    approvals: Sequence[Approval]
    target: str | None = None
    initialize: bool = False
    allow_untested: bool = False
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Record:
    """What an apply has done so far, kept beside it: a failed one must be told as well as a finished one.

    `begun` when BEGIN was about to be sent, `committed` when the server said so.
    """

    def __init__(self, progress: Progress) -> None:
        """`progress`: told every step as it comes; steps of one name are one stage here."""
        self.begun = False
        self.committed = False
        self.started_at: str | None = None
        self.finished_at: str | None = None
        self.transaction_id: str | None = None
        self.executed: list[Executed] = []
        self.entry: Entry | None = None
        self.verdicts: Sequence[Verdict] = ()
        self.found: Survey | None = None
        self._progress = progress
        self._stages: list[tuple[str, float]] = []
        self._ended: float | None = None

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        """A step begins, and the one before it is over."""
        if not self._stages or self._stages[-1][0] != stage:
            self._stages.append((stage, time.monotonic()))
        self._progress(stage, detail, number, of)

    def end(self) -> None:
        """The last step is over."""
        self._ended = time.monotonic()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage with its seconds."""
        ends = [*(moment for _, moment in self._stages[1:]), self._ended or time.monotonic()]
        return tuple(
            Stage(name=name, seconds=round(end - begin, 6))
            for (name, begin), end in zip(self._stages, ends, strict=True)
        )

    @property
    def seconds(self) -> float:
        """From the first lock to COMMIT, or to the end of a run that had none."""
        seconds = [stage.seconds for stage in self.stages if stage.name not in {"connect", "check", "after"}]
        return round(sum(seconds), 3)

    def outcome(self, request: Request, word: str, problems: Sequence[str] = ()) -> Outcome:
        """The apply as a document."""
        plan = request.plan
        entry = self.entry if self.committed else None
        return Outcome(
            outcome=word,
            tool=f"reconciler {__version__}",
            run_id=request.run_id,
            target=plan.target if self.found is None else self.found.target,
            effect_digest=plan.effect_digest,
            entry=None if entry is None else entry.number,
            hash=None if entry is None else entry.hash,
            previous=None if entry is None else entry.previous,
            genesis=entry is not None and entry.number == 1,
            transaction_id=self.transaction_id,
            started_at=self.started_at,
            finished_at=self.finished_at,
            statements=len(_statements(plan)),
            seconds=self.seconds,
            stages=self.stages,
            executed=tuple(self.executed),
            approvals=tuple(_yes(approval) for approval in request.approvals),
            summary=summarize(plan.changes, plan.summary.drift, plan.summary.findings),
            invariants=of_kind(self.verdicts, "invariant"),
            proofs=of_kind(self.verdicts, "proof"),
            surface=of_kind(self.verdicts, "surface"),
            findings=() if self.found is None else tuple(self.found.live.findings),
            not_compared=() if self.found is None else tuple(self.found.not_compared),
            problems=tuple(problems),
        )

    def failed(self, request: Request, error: ReconcilerError | KeyboardInterrupt) -> Outcome:
        """A run that ended with this error; everything in it was rolled back unless COMMIT had been answered."""
        self.end()
        if self.committed:
            return self.outcome(request, "applied", ["interrupted before planning again"])
        if isinstance(error, KeyboardInterrupt):
            word, why = "error", Failure(message="Interrupted; the server rolled back.")
        else:
            word, why = error.outcome, Failure(message=error.message, details=error.details, hint=error.hint)
        return self.outcome(request, word).model_copy(update={"failure": why})


def _yes(approval: Approval) -> Yes:
    return Yes(
        id=approval.id,
        approver=approval.approver,
        reason=approval.reason,
        accepted=approval.accepted,
        attestations=approval.attestations,
        issued_at=approval.issued_at,
        expires_at=approval.expires_at,
        signed=approval.signature is not None,
    )


@dataclass(frozen=True)
class _Run:
    """One apply under way."""

    request: Request
    desired: Desired
    policy: Policy
    deadline: float
    progress: Record

    @property
    def run_id(self) -> str:
        """Chosen before anything begins: the evidence's folder is named by it."""
        return self.request.run_id


def apply(request: Request, progress: Progress) -> Outcome:
    """Apply the plan, or change nothing. `progress`: a Record is asked afterwards what a failed run had done.

    Raises PlanDamaged, UsageError, ServerProblem, Violated, NotApproved, Stale, Locked; OutcomeUnknown when the
    connection was lost while COMMIT was under way and the ledger could not be asked.
    """
    record = progress if isinstance(progress, Record) else Record(progress)
    progress = record
    desired = check_plan(request.plan)
    if request.target is not None and request.target != request.plan.target.name:
        raise UsageError(f"The plan is for target {request.plan.target.name}, not {request.target}.")
    progress("connect")
    with pg.connect(request.dsn, "apply") as conn:
        pg.check_version(conn, allow_untested=request.allow_untested)
        progress("check", "identity, approvals, privileges")
        policy = _preflight(conn, request, desired)
        run = _Run(
            request=request,
            desired=desired,
            policy=policy,
            deadline=time.monotonic() + milliseconds(policy.apply.max_duration) / 1000,
            progress=record,
        )
        record.begun = True
        _transaction(conn, run)
    progress("after", "planning again on a new connection")
    try:
        problems = _after(request, desired)
    except KeyboardInterrupt:
        problems = ["interrupted before planning again"]
    record.end()
    return record.outcome(request, "applied", problems)


def check_plan(plan: Plan) -> Desired:
    """Derive everything in the plan again from what the effect digest covers, and trust nothing else (DESIGN rule 2).

    Returns the declarations. Raises PlanDamaged when the digests are not those of the content, NotApproved when a
    statement, a hazard or a change stands in the plan that its approved effects do not give.
    """
    desired = load_desired(plan.desired)
    effects = effects_digest(dump_desired(desired), plan.setup, plan.changes)
    if effects != plan.effects_digest or effect_digest(effects, plan.target) != plan.effect_digest:
        raise PlanDamaged(
            "The plan's digests are not those of its content.", hint="Make the plan again; a plan is never edited."
        )
    if plan.target.name != desired.target:
        raise PlanDamaged("The plan names two targets.")
    for change in plan.changes:
        again = _again(desired, change)
        if again.statements != change.statements or again.hazards != change.hazards:
            raise NotApproved(
                f"{change.address}: the plan holds statements or hazards that its approved effects do not give.",
                details=_first_difference(again, change),
                hint="Somebody edited the plan, or another version made it. Make it again and read it again.",
            )
    return desired


def _again(desired: Desired, change: Change) -> Change:
    """The change with statements and hazards derived again."""
    if "forget" in change.actions:
        return change.model_copy(update={"statements": (), "hazards": ("forgets",)})
    kind, item = kinds().get(change.kind), desired.items.get(change.address)
    if kind is None or item is None:
        raise PlanDamaged(f"The plan changes {change.address}, which it does not declare.")
    try:
        before: Model | None = None if change.before is None else kind.load(change.before)
        after: Model | None = None if change.after is None else kind.load(change.after)
        hazards = kind.hazards(before, after, item.rules)
        statements = kind.render(before, after, item.rules, change.context)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Only an edited plan holds an object that its kind cannot have.
        raise PlanDamaged(f"{change.address}: the plan's objects cannot be read: {type(error).__name__}.") from None
    if "overwrites_drift" in change.hazards:
        hazards.add("overwrites_drift")  # known to the ledger only; judged again when the plan is made again below
    return change.model_copy(update={"statements": statements, "hazards": tuple(sorted(hazards))})


def _first_difference(again: Change, change: Change) -> list[str]:
    extra = [statement.text for statement in change.statements if statement not in again.statements]
    lost = [statement.text for statement in again.statements if statement not in change.statements]
    return [f"in the plan only: {text}" for text in extra[:3]] + [f"missing in the plan: {text}" for text in lost[:3]]


# ---------------------------------------------------------------------------------------------------- before the change


def _preflight(conn: pg.Connection, request: Request, desired: Desired) -> Policy:
    """Everything that can be refused without a lock. Returns the policy to judge by: the installed one, if any."""
    plan = request.plan
    with pg.snapshot(conn):
        target = live.identify(conn, desired)
        _same_target(plan.target, target)
        last = ledger.last(conn, desired.name)
        if not last.readable:
            raise MissingPrivilege(last.findings[0].message)
        ledger.check_named(desired, last)
        if stamp(_server_time(conn)) >= plan.expires_at:
            raise NotApproved(f"The plan expired at {plan.expires_at}.", hint="Make it again and read it again.")
        policy = last.policy or desired.policy
        approve.verify(
            request.approvals,
            effect_digest=plan.effect_digest,
            hazards=plan.hazards,
            attestations=plan.attestations,
            policy=policy,
            used=last.used,
            now=_server_time(conn),
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
        if not plan.has_changes:
            return policy
        _capabilities(conn, plan, target, ledger_exists=last.exists)
    return policy


def _same_target(planned: Target, found: Target) -> None:
    for name in ("name", "database", "system_identifier"):
        if getattr(planned, name) != getattr(found, name):
            raise Stale(
                f"The plan is for {name.replace('_', ' ')} {getattr(planned, name)}, this is {getattr(found, name)}.",
                hint="Apply it where it was made for, or plan again here.",
            )


def _server_time(conn: pg.Connection) -> datetime:
    return pg.rows(conn, "SELECT pg_catalog.clock_timestamp() AS now")[0]["now"]


def _capabilities(conn: pg.Connection, plan: Plan, target: Target, *, ledger_exists: bool) -> None:
    """What the apply role needs and lacks, all of it at once. Raises MissingPrivilege."""
    option = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    role = pg.rows(conn, "SELECT current_user::pg_catalog.text AS role")[0]["role"]
    lacking: list[str] = []

    def ask(query: sql.SQL, params: Sequence[Any], missing: str) -> None:
        # NULL: the object is not there yet; then this plan creates it, or executing says so.
        if pg.rows(conn, query, params)[0]["may"] is False and missing not in lacking:
            lacking.append(missing)

    for statement_role in sorted({statement.role for statement in _statements(plan) if statement.role}):
        ask(
            sql.SQL("SELECT pg_catalog.pg_has_role(%s::pg_catalog.name, %s) AS may"),
            (statement_role, option),
            f"membership with SET in role {statement_role}",
        )
    for change in plan.changes:
        after = change.after or {}
        if change.kind == "function" and "add" in change.actions:
            ask(
                sql.SQL(
                    "SELECT (SELECT pg_catalog.has_schema_privilege(%s::pg_catalog.name, n.oid, 'CREATE')"
                    " FROM pg_catalog.pg_namespace n WHERE n.nspname = %s) AS may"
                ),
                (after["owner"], after["schema_name"]),
                f"CREATE on schema {after['schema_name']} for role {after['owner']}",
            )
        if change.kind in {"gate", "marker"} and after:
            rules = plan.desired["items"][change.address]["rules"]
            if rules.get("via"):
                continue
            verb = "INSERT" if change.before is None else "UPDATE"
            schema, _, name = after["table"].partition(".")
            ask(
                sql.SQL(
                    "SELECT (SELECT pg_catalog.has_any_column_privilege(c.oid, %s) FROM pg_catalog.pg_class c"
                    " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
                    " WHERE n.nspname = %s AND c.relname = %s) AS may"
                ),
                (verb, schema.strip('"'), name.strip('"')),
                f"{verb} on {after['table']}",
            )
    if ledger_exists:
        ask(
            sql.SQL("SELECT pg_catalog.has_table_privilege('reconciler.entry', 'INSERT') AS may"),
            (),
            "INSERT on reconciler.entry",
        )
    else:
        ask(
            sql.SQL("SELECT pg_catalog.has_database_privilege(%s, 'CREATE') AS may"),
            (target.database,),
            f"CREATE on database {target.database} (for the ledger)",
        )
    if lacking:
        raise MissingPrivilege(
            f"Role {role} lacks {lacking[0]}."
            if len(lacking) == 1
            else f"Role {role} lacks {len(lacking)} privileges.",
            details=lacking if len(lacking) > 1 else (),
            hint="Nothing was changed. Grant them, or apply as a role that has them.",
        )


# ------------------------------------------------------------------------------------------------------ the transaction


def _transaction(conn: pg.Connection, run: _Run) -> None:
    """BEGIN to COMMIT. Whatever is raised before COMMIT leaves the database as it was."""
    record = run.progress
    try:
        xid = _begin_and_lock(conn, run)
        record.transaction_id, record.started_at = xid, stamp(_server_time(conn))
        before = _unchanged(conn, run)
        record.found = before
        memos = live.remember(conn, Asked(run.desired, before.last.allow_functions))
        _execute(conn, run)
        verdicts, found = _look_again(conn, run, memos)
        record.found = replace(before, live=found)
        record.entry = _record(conn, run, before, found, verdicts, xid)
        _still(conn, run, found)
        record.finished_at = stamp(_server_time(conn))
    except BaseException:
        _roll_back(conn)
        with suppress(ReconcilerError):
            record.finished_at = stamp(_server_time(conn))
        raise
    record("commit")
    _commit(conn, run, xid)
    record.committed = True


def _begin_and_lock(conn: pg.Connection, run: _Run) -> str:
    """Take every lock, from BEGIN again when one was not to be had in time. Returns the transaction id."""
    attempts = run.policy.apply.lock_retries + 1
    for attempt in range(1, attempts + 1):
        run.progress("lock", f"attempt {attempt} of {attempts}" if attempt > 1 else "")
        try:
            return _lock(conn, run)
        except (Locked, Stale) as error:
            _roll_back(conn)
            # Another apply, and a stale row, will not become ours by waiting.
            if isinstance(error, Stale) or error.details or attempt == attempts:
                raise
            time.sleep(min(0.1 * attempt, 1.0))
            _in_time(run)
        except BaseException:
            _roll_back(conn)
            raise
    raise AssertionError


def _lock(conn: pg.Connection, run: _Run) -> str:
    policy = run.policy.apply
    pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    pg.settings(conn, milliseconds(policy.statement_timeout))
    pg.run(conn, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(milliseconds(policy.lock_timeout))))
    idle = sql.SQL("SET LOCAL idle_in_transaction_session_timeout = {}")
    pg.run(conn, idle.format(sql.Literal(milliseconds(policy.max_duration))))
    _advisory_lock(conn, run.desired.name)
    xid: str = pg.rows(conn, "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid")[0]["xid"]
    for change in sorted(run.request.plan.changes, key=lambda change: change.address):
        if "forget" not in change.actions:
            _in_time(run)
            kind = kinds()[change.kind]
            before = None if change.before is None else kind.load(change.before)
            kind.lock(conn, change, before, run.desired.items[change.address].rules)
    return xid


def lock_key(name: str) -> int:
    """The advisory lock of a governance name: a signed 64-bit number made from its SHA-256."""
    return int.from_bytes(hashlib.sha256(f"reconciler:{name}".encode()).digest()[:8], "big", signed=True)


def _advisory_lock(conn: pg.Connection, name: str) -> None:
    key = lock_key(name)
    if pg.rows(conn, "SELECT pg_catalog.pg_try_advisory_xact_lock(%s::pg_catalog.int8) AS got", (key,))[0]["got"]:
        return
    holders = pg.rows(
        conn,
        """
        SELECT l.pid, a.usename::pg_catalog.text AS role, a.application_name AS application
          FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
           AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
           AND ((l.classid::pg_catalog.int8 << 32) | l.objid::pg_catalog.int8) = %s
        """,
        (key,),
    )
    who = [f"held by process {row['pid']}, role {row['role']}, {row['application'] or 'no name'}" for row in holders]
    raise Locked(
        f"Another apply of {name} is running.",
        details=who or ["held by a process that ended meanwhile"],
        hint="Nothing was changed. Wait for it, then plan again.",
    )


def _unchanged(conn: pg.Connection, run: _Run) -> Survey:
    """Under the locks: read everything again, plan again, and go on only with the digest that was approved."""
    run.progress("read", "planning again under the locks")
    found = survey(conn, run.desired)
    plan = run.request.plan
    _same_target(plan.target, found.target)
    try:
        again = found.plan(_server_time(conn))
    except Refused as error:
        raise Stale("The plan is stale: the live database no longer allows it.", details=error.details) from error
    if again.effect_digest != plan.effect_digest:
        raise Stale(
            "The plan is stale: what is there now is not what was approved.",
            details=_differences(plan, again),
            hint="Nothing was changed. Plan again, read it, approve it.",
        )
    approve.verify(
        run.request.approvals,
        effect_digest=again.effect_digest,
        hazards=again.hazards,
        attestations=again.attestations,
        policy=run.policy,
        used=found.last.used,
        now=_server_time(conn),
    )
    if _rendered(again) != _rendered(plan):
        raise NotApproved(
            "The plan's statements are not those that its approved effects give.",
            details=[
                f"{ours[0]}: the plan holds other statements or hazards"
                for ours, theirs in zip(_rendered(again), _rendered(plan), strict=False)
                if ours != theirs
            ][:10],
            hint="Somebody edited the plan, or another version made it. Make it again and read it again.",
        )
    run.progress.verdicts = found.verdicts
    approve.refuse_blocked(again)
    return found


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


def _statements(plan: Plan) -> list[Any]:
    return [statement for change in (*plan.setup, *plan.changes) for statement in change.statements]


def _execute(conn: pg.Connection, run: _Run) -> None:
    """Every statement of the plan in its order, each under its role and the declared path."""
    path = sql.SQL(", ").join(map(sql.Identifier, run.policy.apply.search_path))
    total, number = len(_statements(run.request.plan)), 0
    for change in (*run.request.plan.setup, *run.request.plan.changes):
        item = run.desired.items.get(change.address)
        under: tuple[str, ...] | None = getattr(item.rules, "created_under", None) if item else None
        chosen = sql.SQL(", ").join(map(sql.Identifier, under)) if under else path
        answer = ""
        for statement in change.statements:
            number += 1
            run.progress("execute", change.address, number, total)
            remaining = _in_time(run)
            pg.timeout(conn, max(1, min(milliseconds(run.policy.apply.statement_timeout), int(remaining * 1000))))
            pg.run(conn, sql.SQL("SET LOCAL search_path = {}").format(chosen))
            if statement.role is not None:
                pg.run(conn, sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(statement.role)), change.address)
            begun = time.monotonic()
            answer = _send(conn, change, statement.text) or answer
            run.progress.executed.append(
                Executed(
                    address=change.address,
                    text=statement.text,
                    role=statement.role,
                    seconds=round(time.monotonic() - begun, 6),
                )
            )
            if statement.role is not None:
                pg.run(conn, "SET LOCAL ROLE NONE")
        if change.kind == "marker":
            _marker_is_there(conn, run, change, answer)
    pg.run(conn, "SET LOCAL search_path = ''")


def _send(conn: pg.Connection, change: Change, text: str) -> str:
    """Execute one statement. What somebody else created since the last look makes the plan stale."""
    try:
        return pg.execute(conn, text, doing=change.address)
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
    found = kind.read(conn, [item], run.desired.scope.model_copy(update={"markers": ()}), run.desired.stores)
    if change.address not in found.items:
        raise Stale(
            f"{change.address}: its statement ran, but there is no row.",
            details=[f"answer: {answer}"] if answer else (),
            hint="Nothing was changed. The answer says why the row was refused.",
        )


def _look_again(conn: pg.Connection, run: _Run, memos: Mapping[str, Json]) -> tuple[Sequence[Verdict], Live]:
    """Verify by reading: nothing left to do, every object as approved, every invariant held. Raises Stale, Violated."""
    run.progress("verify", "reading everything again before COMMIT")
    # To COMMIT: a deferred trigger would otherwise run after this last look.
    pg.run(conn, "SET CONSTRAINTS ALL IMMEDIATE", "making deferred constraints immediate")
    pg.settings(conn, milliseconds(run.policy.apply.statement_timeout))
    found = live.read(conn, run.desired)
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
    if wrong:
        raise Stale(
            "Rolled back: after the statements ran, the database was not what was approved.",
            details=wrong,
            hint="Something in the database changes what is written: a trigger, a rule, an event trigger.",
        )
    last = ledger.last(conn, run.desired.name)
    run.progress("judge", "invariants, surface and proofs")
    asked = Asked(
        desired=run.desired,
        allow_functions=last.allow_functions,
        inside=True,
        changes=run.request.plan.changes,
        attested={name for approval in run.request.approvals for name in approval.attestations},
    )
    verdicts = live.judge(conn, asked, memos)
    run.progress.verdicts = verdicts
    approve.refuse(blocking(verdicts, run.policy))
    return verdicts, found


def _settled(change: Change, found: Live) -> bool:
    kind = kinds()[change.kind]
    return kind.settled(kind.load(change.after), found.items.get(change.address))


def _record(  # noqa: PLR0913, PLR0917 - what an entry consists of
    conn: pg.Connection, run: _Run, before: Survey, found: Live, verdicts: Sequence[Verdict], xid: str
) -> Entry:
    """The ledger entry, in the same transaction."""
    run.progress("record")
    now = pg.rows(conn, "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text AS xid")[0]["xid"]
    if now != xid:
        raise ServerProblem(f"The transaction changed under us from {xid} to {now}; nothing may be recorded.")
    plan = run.request.plan
    body: dict[str, Json] = {
        "format_version": plan.format_version,
        "run_id": run.run_id,
        "target": plan.target.dump(),
        "plan": plan.dump(),
        "approvals": [approval.dump() for approval in run.request.approvals],
        "policy": run.desired.policy.dump(),
        "manifest": manifest(run.desired, found),
        "checks": [verdict.dump() for verdict in verdicts],
        "transaction_id": xid,
    }
    ids = [approval.id for approval in run.request.approvals]
    return ledger.append(conn, run.desired.name, before.last, run_id=run.run_id, approval_ids=ids, body=body)


def _still(conn: pg.Connection, run: _Run, found: Live) -> None:
    """Writing the ledger may have fired a trigger of somebody else: it must not have changed anything governed."""
    pg.run(conn, "SET CONSTRAINTS ALL IMMEDIATE", "making deferred constraints immediate")
    pg.settings(conn, milliseconds(run.policy.apply.statement_timeout))
    now = live.read(conn, run.desired).items
    if moved := sorted(address for address in {*now, *found.items} if now.get(address) != found.items.get(address)):
        raise Stale(
            "Rolled back: writing the ledger entry changed what is governed.",
            details=moved,
            hint="Somebody put a trigger or a rule on reconciler.entry.",
        )


def manifest(desired: Desired, found: Live) -> dict[str, Json]:
    """Everything declared, in its live form: what the next drift is measured against."""
    entries: dict[str, Json] = {}
    for address, item in desired.items.items():
        object_found = found.items[address]
        entries[address] = {
            "kind": item.kind,
            "spec": kinds()[item.kind].essence(object_found).dump(),
            "facts": {
                key: value for key, value in found.facts.get(address, {}).items() if key in {"xmin", "updated_at"}
            },
        }
    for address, check in desired.checks.items():
        entries[address] = {"kind": check.kind, "spec": check.spec.dump()}
    return entries


def _in_time(run: _Run) -> float:
    """Seconds left of max_duration. Raises Locked when there are none."""
    remaining = run.deadline - time.monotonic()
    if remaining <= 0:
        raise Locked(
            f"The apply took longer than max_duration {run.policy.apply.max_duration} and was rolled back.",
            hint="Nothing was changed. Find what it waited for, or raise governance.apply.max_duration.",
        )
    return remaining


def _roll_back(conn: pg.Connection) -> None:
    if conn.closed or conn.broken:
        return
    try:
        conn.execute("ROLLBACK")
    except psycopg.Error:
        conn.close()  # the server rolls back what a closed connection leaves


# -------------------------------------------------------------------------------------------------------------- the end


def _commit(conn: pg.Connection, run: _Run, xid: str) -> None:
    """COMMIT; when the answer is lost, ask the ledger and pg_xact_status on a new connection."""
    try:
        conn.execute("COMMIT")
    except KeyboardInterrupt:
        # Too late to stop it, or just in time: only the server knows.
        if not _was_committed(run, xid):
            raise
    except psycopg.Error as error:
        if not (conn.closed or conn.broken):
            # The server answered: it refused, and has rolled back.
            raise pg.translated(error, "COMMIT") from error
        if not _was_committed(run, xid):
            raise ServerProblem(
                "The connection was lost before COMMIT; the server rolled back.",
                hint="Nothing was changed. Apply again.",
            ) from error


def _was_committed(run: _Run, xid: str, patience: float = 10.0) -> bool:
    """Did the transaction commit? Raises OutcomeUnknown when nobody can say within `patience` seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            with pg.connect(run.request.dsn, "settle") as conn, pg.snapshot(conn):
                _same_target(run.request.plan.target, live.identify(conn, run.desired))
                query = "SELECT pg_catalog.pg_xact_status(%s::pg_catalog.xid8) AS status"
                status = pg.rows(conn, query, (xid,))[0]["status"]
                last = ledger.last(conn, run.desired.name)
            if status == "committed" or (last.entry and last.entry.run_id == run.run_id):
                return True
            if status == "aborted":
                return False
        except ReconcilerError:
            pass
        time.sleep(0.5)
    raise OutcomeUnknown(
        f"The connection was lost while COMMIT was under way, and the server cannot be asked (run {run.run_id}).",
        hint="When it is back, `reconciler plan` shows no changes if it was committed, the same plan if not.",
    )


def _after(request: Request, desired: Desired) -> list[str]:
    """After COMMIT nothing changes the result; what is wrong now is said as a problem."""
    try:
        with pg.connect(request.dsn, "apply") as conn, pg.snapshot(conn):
            again = survey(conn, desired)
            left = again.plan(_server_time(conn))
    except ReconcilerError as error:
        return [f"planning again failed: {error.message}"]
    return [f"planning again shows {change.address}: {change.reason}" for change in (*left.setup, *left.changes)]
