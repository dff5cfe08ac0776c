"""The middle of the flow, once: what plan, drift, the stale check and the last look need, from one transaction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from reconciler import __version__, ledger, live, plan, setup
from reconciler.errors import PlanDamaged, Refused, UsageError
from reconciler.kinds import kinds
from reconciler.model import Asked, Judged, Snapshot, canonical, digest, tolerated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from reconciler.model import Change, Desired, Drift, Live, NotCompared, Plan, Target, Verdict
    from reconciler.pg import Connection


@dataclass(frozen=True)
class Survey:
    """What one transaction saw."""

    desired: Desired
    target: Target
    last: ledger.Last
    live: Live
    setup: Sequence[Change]
    verdicts: Sequence[Verdict]
    not_compared: Sequence[NotCompared]

    def plan(self, now: datetime, drift: Sequence[Drift] = ()) -> Plan:
        """The plan that follows from what was seen. Raises Refused."""
        return plan.build(
            self.desired,
            self.live,
            target=self.target,
            setup=self.setup,
            last=self.last.manifest,
            drift=drift,
            verdicts=self.verdicts,
            not_compared=self.not_compared,
            now=now,
        )


def survey(conn: Connection, desired: Desired) -> Survey:
    """Look at everything, inside the caller's transaction. Raises UsageError, ServerProblem, Refused.

    What the ledger knows and the files no longer declare is read and judged too: protection outlives its line.
    """
    target = live.identify(conn, desired)
    last = ledger.last(conn, desired.name)
    ledger.check_named(desired, last, target)
    if last.exists and last.readable:
        ledger.check_apart(desired, ledger.scopes(conn, desired.name))
    _guarded(desired, last)
    whole = plan.with_forgotten(desired, last.manifest)
    last = _hidden(desired, last)
    found = live.read(conn, whole, last.allow_functions)
    verdicts = live.judge(conn, Asked(whole, last.allow_functions))
    return _surveyed(desired, target, last, found, verdicts=verdicts, not_compared=live.not_compared(conn, desired))


def recalled(snapshot: Snapshot, desired: Desired) -> Survey:
    """The same from what was seen earlier, perhaps for other files. Pure. Raises UsageError, Refused.

    What it does not tell is not judged, and blocks the plan like what a role may not see.
    """
    target, last = snapshot.target, ledger.Last.load(snapshot.ledger)
    if (desired.name, desired.target) != (snapshot.name, target.name):
        raise UsageError(
            f"The snapshot is of target {target.name} of {snapshot.name}, not of {desired.target} of {desired.name}.",
            hint="Check --target and --state.",
        )
    live.check_database(desired, target, "the snapshot is of")
    ledger.check_named(desired, last, target)
    ledger.check_apart(desired, snapshot.scopes)
    _guarded(desired, last)
    whole = plan.with_forgotten(desired, last.manifest)
    last = _hidden(desired, last)
    verdicts = live.judged({one.check: one.verdict for one in snapshot.verdicts}, whole)
    try:
        found = live.of(snapshot.seen, whole)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlanDamaged(f"The snapshot does not hold what one of this version holds: {error!r}.") from None
    return _surveyed(desired, target, last, found, verdicts=verdicts, not_compared=snapshot.not_compared)


def take(conn: Connection, desired: Desired, now: datetime) -> Snapshot:
    """What `recalled` needs, inside the caller's transaction. Raises as survey does.

    No answer of a declared query is in it and no secret: it goes where pull requests are planned.
    """
    target = live.identify(conn, desired)
    last = ledger.last(conn, desired.name)
    ledger.check_named(desired, last, target)
    _guarded(desired, last)
    whole = plan.with_forgotten(desired, last.manifest)
    last = _hidden(desired, last)
    asked = Asked(whole, last.allow_functions)
    seen = live.look(conn, whole, last.allow_functions, widely=True)
    made = Snapshot(
        tool=f"reconciler {__version__}",
        taken_at=plan.stamp(now),
        name=desired.name,
        source_digest=desired.source_digest,
        target=target,
        ledger=last.dump(),
        scopes=ledger.scopes(conn, desired.name) if last.exists and last.readable else {},
        seen=seen,
        verdicts=tuple(
            Judged(check=digest(whole.checks[verdict.address].dump()), verdict=verdict)
            for verdict in live.judge(conn, asked)
        ),
        not_compared=live.not_compared(conn, desired),
    )
    live.refuse_secrets(conn, made)
    return made


def load(path: Path) -> Snapshot:
    """A saved snapshot. Raises UsageError, PlanDamaged."""
    try:
        found = Snapshot.model_validate_json(canonical(plan.read(path, "snapshot")))
        ledger.Last.load(found.ledger)
    except (KeyError, ValidationError):
        raise PlanDamaged(f"{path} is no snapshot.", hint="`reconciler snapshot --out FILE` makes one.") from None
    return found


def _surveyed(  # noqa: PLR0913 - what one look consists of
    desired: Desired,
    target: Target,
    last: ledger.Last,
    found: Live,
    *,
    verdicts: Sequence[Verdict],
    not_compared: Sequence[NotCompared],
) -> Survey:
    found = replace(found, findings=(*last.findings, *found.findings))
    return Survey(
        desired=desired,
        target=target,
        last=last,
        live=found,
        setup=setup.changes(
            desired, version=last.version, readable=last.readable, installed=last.installed, live=found
        ),
        verdicts=tolerated((*verdicts, *live.unjudged(desired, found)), last.policy or desired.policy),
        not_compared=not_compared,
    )


def taken(desired: Desired) -> Desired:
    """What the files say, with what only the environment of this process says: HMACs in the place of secrets.

    For plan and drift; an apply takes the declarations from its plan. Raises UsageError.
    """
    known = kinds()
    items = {address: known[item.kind].taken(item) for address, item in desired.items.items()}
    return replace(desired, items=items)


def _guarded(desired: Desired, last: ledger.Last) -> None:
    found = [sentence for kind in kinds().values() for sentence in kind.guarded(desired, last.manifest)]
    if found:
        one = len(found) == 1
        raise Refused(
            f"{found[0]}." if one else "The files do not go with the secrets that the ledger knows.",
            details=() if one else found,
            hint="Nothing was changed.",
        )


def _hidden(desired: Desired, last: ledger.Last) -> ledger.Last:
    """The ledger as it may be shown: without values of what is a secret now and was none when it was last applied."""
    found = {
        address: entry for kind in kinds().values() for address, entry in kind.hidden(desired, last.manifest).items()
    }
    if not found or last.entry is None:
        return last
    body = {**last.entry.body, "manifest": {**last.manifest, **found}}
    return replace(last, entry=last.entry.model_copy(update={"body": body}))
