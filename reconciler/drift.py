"""The three-way classification, pure: desired (files), last applied (ledger), live. Drift and pending stay apart."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from reconciler import __version__
from reconciler.diff import fields
from reconciler.errors import UsageError
from reconciler.kinds import UNSEEN, kinds
from reconciler.model import (
    CLASSES,
    Absent,
    Action,
    Address,
    Change,
    Desired,
    Drift,
    DriftClass,
    Entry,
    FieldChange,
    Finding,
    Json,
    JsonObject,
    Live,
    Model,
    Moment,
    NotCompared,
    Target,
    Verdict,
    blocking,
)
from reconciler.plan import of_kind, stamp
from reconciler.secrets import KEY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime

DRIFT_VERSION = "1.1"
"""Of a drift report: 1.1 added `name`, `items`, `governed`, `heartbeats` and `accepted`."""

ALWAYS: frozenset[str] = frozenset({"drift", "both"})
"""The classes that are exit 2 unasked; a check that blocks is exit 3."""


class Attribution(Model):
    """What PostgreSQL knows of a change. It never knows who.

    changed_at: when the transaction that wrote the row, or the row of the catalog, was committed. transaction: its id.
    updated_at: what the row says of itself, which whoever writes it may write as well. owner: of the function or the
    table, now. not_known: a sentence for each thing that nobody can tell.
    """

    changed_at: Moment | None = None
    transaction: str | None = None
    updated_at: str | None = None
    owner: str | None = None
    not_known: tuple[str, ...] = ()


class Item(Model):
    """One thing that a report is about. `todo` (in JSON `next`) says what to do.

    before and after: last applied and live; of a pending one, last applied (or live) and what the files want. wanted:
    what the files want, where live and the files both moved. fails: it is a reason of the exit code.
    """

    address: Address
    item_class: DriftClass = Field(alias="class")
    kind: str
    actions: tuple[Action, ...] = ()
    before: JsonObject | None = None
    after: JsonObject | None = None
    wanted: JsonObject | None = None
    fields: tuple[FieldChange, ...] = ()
    reason: str
    todo: str = Field(alias="next")
    fails: bool
    attribution: Attribution | None = None


class Heartbeat(Model):
    """How old a marker is, in seconds, and how old it may be. `age` is None where the column is NULL."""

    address: Address
    age: float | None
    within: float


class NotWritten(Model):
    """Drift that could not be written into the files, and why."""

    address: Address
    reason: str


class Accepted(Model):
    """What `drift --to-state` wrote: the objects, and the files that were changed or removed."""

    written: tuple[Address, ...]
    files: tuple[str, ...]
    not_written: tuple[NotWritten, ...]


class DriftReport(Model):
    """What `drift` says. `outcome` is the word of the exit code. `governed`: every object and check looked at."""

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
    name: str = ""
    items: tuple[Item, ...] = ()
    governed: tuple[Address, ...] = ()
    heartbeats: tuple[Heartbeat, ...] = ()
    accepted: Accepted | None = None


@dataclass(frozen=True)
class Classified:
    """Drift is live against last applied, pending is desired against last applied.

    touched: of what is as it was last applied, the rows that somebody wrote again.
    """

    drift: tuple[Drift, ...]
    pending: tuple[Drift, ...]
    touched: tuple[Drift, ...] = ()


def classify(  # noqa: C901 - the table of DESIGN 8, row by row
    desired: Desired, last: Mapping[str, Json], live: Live, *, last_known: bool
) -> Classified:
    """Every object that moved, by address: declared ones, and those that only the ledger still knows.

    last: the ledger's manifest; empty before the first apply, when nothing can have drifted and all that differs is
    pending. last_known: False when there is a ledger that this role may not read: then what differs from the files
    counts as drift, because nobody can say that it is only pending.
    """
    known = kinds()
    drift: list[Drift] = []
    pending: list[Drift] = []
    touched: list[Drift] = []
    for address in sorted({*desired.items, *(name for name, entry in last.items() if entry["kind"] in known)}):
        item = desired.items.get(address)
        kind = known[item.kind if item else last[address]["kind"]]
        found = live.items.get(address)
        now = None if found is None else kind.essence(found).dump()
        wanted = None if item is None or isinstance(item.spec, Absent) else kind.essence(item.spec).dump()
        applied = last[address]["spec"] if address in last else None
        facts = live.facts.get(address, {})
        unjudged = facts.get("not_judged")
        if found is None and unjudged in {KEY, UNSEEN["not_judged"]}:
            continue  # it was not read; the report says so
        if not last_known:
            if now != wanted:
                reason = "differs from the files; what was last applied is not known"
                drift.append(_moved(address, kind.name, wanted, now, reason))
            continue
        if address in last and now != applied:
            drift.append(_moved(address, kind.name, applied, now, "changed since the last apply"))
        elif address in last and kind.ours and _written_again(last[address], facts):
            touched.append(
                Drift(address=address, kind=kind.name, actions=(), before=applied, after=now, reason=TOUCHED)
            )
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
    return Classified(tuple(drift), tuple(pending), tuple(touched))


WRITTEN = "was written since the last apply"
TOUCHED = f"the same value, but its row {WRITTEN}"


def _written_again(entry: Mapping[str, Json], facts: Mapping[str, Json]) -> bool:
    before = entry.get("facts", {}).get("xmin")
    return before is not None and facts.get("xmin") not in {None, before}


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


def with_installed(moved: Classified, setup: Sequence[Change]) -> Classified:
    """So, and pending is too what the files say of policy, scope, approvers, rules and checks and is not installed.

    setup: what an apply would install. What it needs for itself, or accepts, is told otherwise; so is an object that
    moved, by its own line.
    """
    told = {one.address for one in (*moved.drift, *moved.pending)}
    more = tuple(
        Drift(**{name: getattr(one, name) for name in Drift.model_fields})
        for one in setup
        # Before the first apply nothing is installed, and all of it is.
        if (one.before is not None or one.kind == "check")
        and one.kind not in {"ledger", "accepted"}
        and one.address not in told
    )
    return replace(moved, pending=tuple(sorted((*moved.pending, *more), key=lambda one: one.address)))


def finding_codes(text: str) -> frozenset[str]:
    """`undeclared,stale_heartbeat` as classes. Raises UsageError for one that no item of a report has."""
    codes = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(codes - set(CLASSES)):
        near = [match for name in unknown for match in difflib.get_close_matches(name, CLASSES, 1)]
        meant = f"Did you mean {', '.join(near)}? " if near else ""
        raise UsageError(
            f"--fail-on: there is no finding {', '.join(unknown)}.", hint=f"{meant}Findings: {', '.join(CLASSES)}."
        )
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
    desired: Desired | None = None,
    live: Live | None = None,
    attributions: Mapping[Address, Attribution] | None = None,
) -> DriftReport:
    """The report, with the word of its exit code. fail_on: classes of items that count as drift, beside those that do.

    desired and live: for the names of what was looked at, pins and heartbeats. attributions: of what drifted.
    """
    # What was last applied is known without the value of a secret, and compared; what the files want is not.
    untold = [found for found in verdicts if found.status == "not_judged" and found.missing.startswith(_SOURCES)]
    verdicts = [verdict for verdict in verdicts if verdict not in untold]
    applied: Json = None
    manifest: Mapping[str, Json] = {}
    if entry is not None:
        release = entry.body["plan"]["state"]["release"]
        applied = {"entry": entry.number, "recorded_at": entry.recorded_at, "release": release, "hash": entry.hash}
        manifest = entry.body.get("manifest", {})
    pins = {address for address, known in manifest.items() if "pin" in known["spec"]}
    if desired is not None:
        pins |= {address for address, check in desired.checks.items() if "pin" in check.spec.dump()}
    guards = _row_guards(desired, manifest)
    rewritten = {address for address, gate in guards.items() if any(one.address == gate for one in moved.touched)}
    verdicts = [_written(verdict) if verdict.address in rewritten else verdict for verdict in verdicts]
    told = tuple(one for one in moved.touched if one.address not in guards.values())
    moved = replace(moved, touched=told)
    found = [*_moves(moved, attributions or {}), *_of_findings(findings), *_of_verdicts(verdicts, pins, rewritten)]
    blocked = {verdict.address for verdict in blocking(verdicts)}
    items = tuple(
        item.model_copy(update={"fails": item.fails or item.item_class in fail_on or _blocks(item, blocked)})
        for item in sorted(found, key=lambda item: (CLASSES.index(item.item_class), item.address))
    )
    failing = any(item.fails for item in items)
    return DriftReport(
        format_version=DRIFT_VERSION,
        outcome="violated" if blocked else "drift" if failing else "no_changes",
        tool=f"reconciler {__version__}",
        checked_at=stamp(now),
        target=target,
        last_applied=applied,
        drift=moved.drift,
        pending=moved.pending,
        findings=tuple(findings),
        invariants=of_kind(verdicts, "invariant"),
        not_compared=(*not_compared, *map(_without_value, untold)),
        name=desired.name if desired is not None else "",
        items=items,
        governed=() if desired is None else _governed(desired, manifest),
        heartbeats=() if live is None else _heartbeats(live),
    )


def _row_guards(desired: Desired | None, manifest: Mapping[str, Json]) -> dict[Address, Address]:
    """Of every invariant that says `row: untouched` the gate: of the files, and of what the ledger still watches."""
    specs = {address: known["spec"] for address, known in manifest.items() if known["kind"] == "invariant"}
    if desired is not None:
        specs |= {address: check.spec.dump() for address, check in desired.checks.items()}
    return {address: f"gate.{spec['gate']}" for address, spec in specs.items() if spec.get("row") == "untouched"}


def _written(verdict: Verdict) -> Verdict:
    """Of a gate in a row that somebody wrote again, where `row: untouched` forbids that (DESIGN 8)."""
    if verdict.status != "held":
        return verdict
    return verdict.model_copy(update={"status": "violated", "detail": f"{verdict.detail}, but its row {WRITTEN}"})


def _governed(desired: Desired, manifest: Mapping[str, Json]) -> tuple[Address, ...]:
    """Every object, and every invariant: proofs and the surface are an apply's."""
    checks = {address for address, check in desired.checks.items() if check.kind == "invariant"}
    known = {address for address, entry in manifest.items() if entry["kind"] in {*kinds(), "invariant"}}
    return tuple(sorted({*desired.items, *checks, *known}))


def _heartbeats(live: Live) -> tuple[Heartbeat, ...]:
    return tuple(
        Heartbeat(address=address, age=facts["age"], within=facts["within"])
        for address, facts in sorted(live.facts.items())
        if "within" in facts
    )


def _blocks(item: Item, blocked: Collection[Address]) -> bool:
    return item.item_class in {"violated", "not_judged", "moved_pin"} and item.address in blocked


def _item(address: Address, item_class: DriftClass, kind: str, reason: str, **given: Json) -> Item:
    whole = {"address": address, "class": item_class, "kind": kind, "reason": reason, "next": TODO[item_class]}
    return Item.model_validate({**whole, "fails": item_class in ALWAYS, **given})


def _moves(moved: Classified, attributions: Mapping[Address, Attribution]) -> Iterator[Item]:
    """What moved: live, the files, or both. One item for each object."""
    pending = {item.address: item for item in moved.pending}
    drifted = {item.address for item in moved.drift}

    def of(one: Drift, item_class: DriftClass, **given: Json) -> Item:
        shown = {"actions": one.actions, "before": one.before, "after": one.after, "fields": one.fields}
        shown |= {"attribution": attributions.get(one.address)} if item_class != "pending" else {}
        return _item(one.address, item_class, one.kind, given.pop("reason", one.reason), **{**shown, **given})

    for one in moved.drift:
        files = pending.get(one.address)
        if files is None:
            yield of(one, "drift")
        elif "forget" in files.actions:
            yield of(one, "both", reason=f"{one.reason}; {files.reason}", next=FORGOTTEN)
        elif files.after == one.after:
            yield of(one, "both", wanted=files.after, reason=f"{one.reason}; the files say the same", next=ACCEPTED)
        else:
            yield of(one, "both", wanted=files.after, reason=f"{one.reason}, and {files.reason}")
    yield from (of(one, "pending") for one in moved.pending if one.address not in drifted)
    yield from (of(one, "touched") for one in moved.touched)


def _of_findings(findings: Sequence[Finding]) -> Iterator[Item]:
    for finding in findings:
        yield _item(finding.address, finding.code, finding.address.partition(".")[0], finding.message)


def _of_verdicts(
    verdicts: Sequence[Verdict], pins: Collection[Address], rewritten: Collection[Address]
) -> Iterator[Item]:
    for verdict in verdicts:
        kind = verdict.address.partition(".")[0]
        if verdict.status == "not_judged":
            yield _item(verdict.address, "not_judged", kind, verdict.detail)
        elif verdict.status == "violated":
            item_class: DriftClass = "moved_pin" if verdict.address in pins else "violated"
            given = {"next": REWRITTEN} if verdict.address in rewritten else {}
            yield _item(verdict.address, item_class, kind, verdict.detail, **given)


REWRITTEN = (
    "Find out who did it: it may have been changed and changed back. The value is right, so nothing stops the next"
    " apply; the ledger then knows the row as it is."
)
PUT_BACK = "put it back with `reconciler plan --out FILE`, approve, apply (hazard `overwrites_drift`)"
ACCEPTED = "The files accept it: `reconciler plan --out FILE`, approve and apply, so that the ledger knows it too."
FORGOTTEN = "Declare it again, or have the `forget` of the plan approved and applied; then it is not governed any more."
TODO: Mapping[DriftClass, str] = {
    "violated": "Find out who did it and put it right: an apply never does that, and none goes on before.",
    "not_judged": "Give the role what it lacks, or name the check in `allow_not_judged` and have that approved.",
    "moved_pin": "Put the definition back; or accept it: `reconciler pin`, review pins.yaml, approve, apply.",
    "drift": f"Find out who did it. Then {PUT_BACK}; or accept it with `reconciler drift --to-state`, review, apply.",
    "both": f"Find out who did it, and which one is right. Then correct the files, or {PUT_BACK}.",
    "pending": "`reconciler plan --out FILE`, approve, apply.",
    "undeclared": "Declare it, or take it out of the database: an apply leaves alone what is not declared.",
    "break_glass": "Look at what was done; the next apply that a normal quorum approves acknowledges it.",
    "stale_heartbeat": "Look at the executor: nobody else writes its heartbeat.",
    "marker_differs": "Find out who wrote the row, or declare what it holds: an apply leaves a marker's row alone.",
    "mentioned": "Change the function before what it names is gone.",
    "ledger_not_readable": "Run the GRANTs; until then what differs from the files counts as drift.",
    "touched": "Nothing: it holds what it should. It may have been changed and changed back.",
}
"""What to do about each class."""


_SOURCES = ("variable ", "file ")


def _without_value(verdict: Verdict) -> NotCompared:
    where = f"{verdict.address}: {verdict.missing} is not there"
    return NotCompared.model_validate({"class": "secret, with the files", "where": where, "count": 1})


def exit_code(found: DriftReport) -> int:
    """3 violated, 2 drift or a finding that was asked to fail, 0 otherwise: pending alone is 0 (DESIGN 8)."""
    return {"violated": 3, "drift": 2}.get(found.outcome, 0)
