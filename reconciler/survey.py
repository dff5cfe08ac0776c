"""The middle of the flow, once: what plan, drift, the stale check and the last look need, from one transaction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reconciler import ledger, live, plan, setup
from reconciler.errors import Refused
from reconciler.kinds import kinds
from reconciler.model import Asked, tolerated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

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
        ledger.check_apart(conn, desired)
    _guarded(desired, last)
    whole = plan.with_forgotten(desired, last.manifest)
    last = _hidden(desired, last)
    found = live.read(conn, whole, last.allow_functions)
    found = type(found)(found.items, found.facts, (*last.findings, *found.findings))
    policy = last.policy or desired.policy
    return Survey(
        desired=desired,
        target=target,
        last=last,
        live=found,
        setup=setup.changes(
            desired, version=last.version, readable=last.readable, installed=last.installed, live=found
        ),
        verdicts=tolerated(
            (*live.judge(conn, Asked(whole, last.allow_functions)), *live.unjudged(desired, found)), policy
        ),
        not_compared=live.not_compared(conn, desired),
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
