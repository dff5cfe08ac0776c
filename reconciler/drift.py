"""The three-way classification, pure: desired (files), last applied (ledger), live. Drift and pending stay apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from reconciler import __version__
from reconciler.diff import fields
from reconciler.errors import UsageError
from reconciler.kinds import kinds
from reconciler.model import (
    FORMAT_VERSION,
    Absent,
    Action,
    Desired,
    Drift,
    Entry,
    Finding,
    Json,
    Live,
    Model,
    NotCompared,
    Target,
    Verdict,
    blocking,
)
from reconciler.plan import of_kind, stamp
from reconciler.secrets import KEY

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime


class DriftReport(Model):
    """What `drift` says. `outcome` is the word of the exit code."""

    format_version: str
    outcome: str
    tool: str
    checked_at: str
    target: Target
    last_applied: Json
    drift: tuple[Drift, ...]
    pending: tuple[Drift, ...]
    findings: tuple[Finding, ...]
    invariants: tuple[Verdict, ...]
    proofs: tuple[Verdict, ...] = ()
    surface: tuple[Verdict, ...] = ()
    not_compared: tuple[NotCompared, ...]


@dataclass(frozen=True)
class Classified:
    """Drift is live against last applied, pending is desired against last applied."""

    drift: tuple[Drift, ...]
    pending: tuple[Drift, ...]


def classify(desired: Desired, last: Mapping[str, Json], live: Live, *, last_known: bool) -> Classified:
    """Every object that moved, by address: declared ones, and those that only the ledger still knows.

    last: the ledger's manifest; empty before the first apply, when nothing can have drifted and all that differs is
    pending. last_known: False when there is a ledger that this role may not read: then what differs from the files
    counts as drift, because nobody can say that it is only pending.
    """
    known = kinds()
    drift: list[Drift] = []
    pending: list[Drift] = []
    for address in sorted({*desired.items, *(name for name, entry in last.items() if entry["kind"] in known)}):
        item = desired.items.get(address)
        kind = known[item.kind if item else last[address]["kind"]]
        found = live.items.get(address)
        now = None if found is None else kind.essence(found).dump()
        wanted = None if item is None or isinstance(item.spec, Absent) else kind.essence(item.spec).dump()
        applied = last[address]["spec"] if address in last else None
        unjudged = live.facts.get(address, {}).get("not_judged")
        if unjudged == KEY:
            continue  # it was not read; the report says so
        if not last_known:
            if now != wanted:
                reason = "differs from the files; what was last applied is not known"
                drift.append(_moved(address, kind.name, wanted, now, reason))
            continue
        if address in last and now != applied:
            drift.append(_moved(address, kind.name, applied, now, "changed since the last apply"))
        if item is None:
            reason = "the ledger governs it and no file declares it any more"
            pending.append(Drift(address=address, kind=kind.name, actions=("forget",), before=applied, reason=reason))
        elif unjudged:
            continue  # nobody gave the value that the files want
        elif wanted is None and now is not None:
            pending.append(_moved(address, kind.name, now, None, "retired and still there"))
        elif wanted != applied and not (applied is None and now == wanted):
            reason = "declared and not applied" if applied is None else "the files changed since the last apply"
            pending.append(_moved(address, kind.name, applied, wanted, reason))
    return Classified(tuple(drift), tuple(pending))


def _moved(address: str, kind: str, before: Json, after: Json, reason: str) -> Drift:
    action: Action = "add" if before is None else "remove" if after is None else "change"
    return Drift(
        address=address,
        kind=kind,
        actions=(action,),
        before=before,
        after=after,
        fields=fields(before, after) if before is not None and after is not None else (),
        reason=reason,
    )


def finding_codes(text: str) -> frozenset[str]:
    """`undeclared,stale_heartbeat` as codes. Raises UsageError for one that no finding has."""
    known: tuple[str, ...] = get_args(Finding.model_fields["code"].annotation)
    codes = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(codes - set(known)):
        raise UsageError(f"--fail-on: there is no finding {', '.join(unknown)}.", hint=f"Findings: {', '.join(known)}.")
    return codes


def report(  # noqa: PLR0913 - what the report consists of
    moved: Classified,
    *,
    target: Target,
    entry: Entry | None,
    findings: Sequence[Finding],
    verdicts: Sequence[Verdict],
    not_compared: Sequence[NotCompared],
    fail_on: Collection[str],
    now: datetime,
) -> DriftReport:
    """The report, with the word of its exit code. fail_on: codes of findings that count as drift."""
    # What was last applied is known without the value of a secret, and compared; what the files want is not.
    untold = [found for found in verdicts if found.status == "not_judged" and found.missing.startswith(_SOURCES)]
    verdicts = [verdict for verdict in verdicts if verdict not in untold]
    blocked = blocking(verdicts)
    failing = any(finding.code in fail_on for finding in findings)
    applied = None
    if entry is not None:
        release = entry.body["plan"]["state"]["release"]
        applied = {"entry": entry.number, "recorded_at": entry.recorded_at, "release": release, "hash": entry.hash}
    return DriftReport(
        format_version=FORMAT_VERSION,
        outcome="violated" if blocked else "drift" if moved.drift or failing else "no_changes",
        tool=f"reconciler {__version__}",
        checked_at=stamp(now),
        target=target,
        last_applied=applied,
        drift=moved.drift,
        pending=moved.pending,
        findings=tuple(findings),
        invariants=of_kind(verdicts, "invariant"),
        not_compared=(*not_compared, *map(_without_value, untold)),
    )


_SOURCES = ("variable ", "file ")


def _without_value(verdict: Verdict) -> NotCompared:
    where = f"{verdict.address}: {verdict.missing} is not there"
    return NotCompared.model_validate({"class": "secret, with the files", "where": where, "count": 1})


def exit_code(found: DriftReport) -> int:
    """3 violated, 2 drift or a finding that was asked to fail, 0 otherwise: pending alone is 0 (DESIGN 8)."""
    return {"violated": 3, "drift": 2}.get(found.outcome, 0)
