"""Beside the flow: a ledger entry -> the declarations that undo it. Pure; the plan is then made like any other.

An entry is undone object by object, like a commit in git: what it changed goes back to what was there before, what was
changed again since stands in the way and is named, everything else stays as it is governed now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from reconciler.checks import checks
from reconciler.errors import Refused
from reconciler.kinds import kinds
from reconciler.model import (
    Absent,
    Change,
    Check,
    Declared,
    Desired,
    GateStore,
    Json,
    JsonObject,
    Policy,
    Scope,
    canonical,
)
from reconciler.setup import ACCEPTED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from reconciler.model import Entry, Model


@dataclass(frozen=True)
class Undo:
    """One entry of the ledger, with what was installed before it and what is installed now.

    name: what it is called in messages and reasons. Before and now are bodies of ledger entries; `before` is None when
    it was the first.
    """

    name: str
    changes: Sequence[Change]
    before: JsonObject | None
    after: JsonObject
    now: JsonObject


def of_entry(entry: Entry, before: Entry | None, latest: Entry) -> Undo:
    """What is to be undone, from three entries of one ledger. Raises Refused for one that only says where it is."""
    plan = entry.body["plan"]
    if any(change["kind"] == "home" for change in plan.get("setup", ())):
        raise Refused(
            f"Entry {entry.number} says where the ledger is, and changed nothing else: there is nothing to undo.",
            hint="Where the ledger is somewhere else again: reconciler rehome.",
        )
    return Undo(
        name=f"entry {entry.number}",
        changes=[Change.model_validate_json(canonical(change)) for change in (*plan["changes"], *_accepted(plan))],
        before=before.body if before else None,
        after=entry.body,
        now=latest.body,
    )


def declarations(undo: Undo, like: Desired) -> Desired:
    """The declarations whose plan undoes it. like: whose name, target and database they are for.

    Raises Refused, naming everything that cannot be undone.
    """
    problems: list[str] = []
    now: Mapping[str, Json] = undo.now["manifest"]
    known, judging = kinds(), checks()
    items = {
        address: known[entry["kind"]].declared(_merged_rules(undo, address, entry))
        for address, entry in now.items()
        if entry["kind"] in known
    }
    for change in undo.changes:
        undone, problem = _undone(undo, change)
        if undone is not None:
            items[change.address] = undone
        elif problem:
            problems.append(f"{change.address}: {problem}")
    judged: dict[str, Check] = {}
    for address in sorted({*now, *undo.after["manifest"], *_manifest(undo.before)}):
        spec, problem = _check(undo, address)
        if problem:
            problems.append(f"{address}: {problem}")
        elif spec is not None:
            kind, _, name = address.partition(".")
            judged[address] = Check(kind=kind, name=name, spec=judging[kind].load(spec))
    if problems:
        raise Refused(
            f"{undo.name.capitalize()} cannot be undone.",
            details=problems,
            hint="Nothing was written. Change the files instead, or undo what stands in the way first.",
        )
    scope = _three_way(undo, "scope")
    return replace(
        like,
        release=f"revert of {undo.name}",
        policy=Policy.model_validate_json(canonical(_three_way(undo, "policy"))),
        approvers=str(undo.now.get("approvers") or ""),
        scope=Scope.model_validate_json(canonical(scope["scope"])),
        stores={name: GateStore.model_validate_json(canonical(store)) for name, store in scope["stores"].items()},
        items=items,
        checks=judged,
        source_digest=str(undo.after.get("run_id", "")),
    )


def _accepted(plan: JsonObject) -> Iterator[JsonObject]:
    """What somebody did by hand and this entry accepted, as if it had done it."""
    for change in plan.get("setup", ()):
        if change["kind"] == "accepted":
            address = change["address"].removeprefix(ACCEPTED)
            yield {**change, "address": address, "kind": address.partition(".")[0]}


def _manifest(body: JsonObject | None) -> Mapping[str, Json]:
    return {} if body is None else body["manifest"]


def _three_way(undo: Undo, part: str) -> Json:
    """This part of the policy as it was before, if this entry changed it and nobody since."""
    before = undo.before[part] if undo.before else undo.after[part]
    return before if undo.now[part] == undo.after[part] else undo.now[part]


def _merged_rules(undo: Undo, address: str, entry: Json) -> Json:
    """The object as it is governed now; with its earlier rules, if this entry changed them and nobody since."""
    before, after = _manifest(undo.before).get(address), undo.after["manifest"].get(address)
    if before is None or after is None or entry["rules"] != after["rules"]:
        return entry
    return {**entry, "rules": before["rules"]}


def _check(undo: Undo, address: str) -> tuple[Json | None, str]:
    """What this check says afterwards, or why that cannot be said. None: it is gone."""
    before, after, now = (
        None if address not in manifest or manifest[address]["kind"] not in checks() else manifest[address]["spec"]
        for manifest in (_manifest(undo.before), undo.after["manifest"], undo.now["manifest"])
    )
    if before == after:
        return now, ""
    if now == after:
        return before, ""
    return (before, "") if now == before else (None, "it was changed again since; undo that first")


def _undone(undo: Undo, change: Change) -> tuple[Declared | None, str]:
    """The object as it was before this change, or why it cannot come back."""
    kind = kinds().get(change.kind)
    now = undo.now["manifest"].get(change.address)
    if kind is None:
        return None, ""  # a check that was forgotten: see `_check`
    if "forget" in change.actions:
        earlier = _manifest(undo.before).get(change.address)
        return (kind.declared(earlier), "") if earlier is not None and now is None else (None, "")
    entry = undo.after["manifest"].get(change.address)
    if (None if now is None else now["spec"]) != (None if entry is None else entry["spec"]):
        return None, "it was changed again since; undo that first"
    rules = entry["rules"] if entry is not None else undo.after["plan"]["desired"]["items"][change.address]["rules"]
    name = change.address.partition(".")[2]
    if change.before is None:
        return _absent(undo, change, kind.load_rules(rules), name), ""
    earlier = _manifest(undo.before).get(change.address)
    before: Model = kind.load(change.before)
    try:
        relaxed = kind.backwards(before, kind.load_rules(earlier["rules"] if earlier else rules), change.after)
    except ValueError as error:
        return None, str(error)
    return Declared(kind=change.kind, name=name, spec=before, rules=relaxed), ""


def _absent(undo: Undo, change: Change, rules: Model, name: str) -> Declared:
    after = cast("JsonObject", change.after)
    at = {"table": after["table"], "key": after["key"]} if change.kind == "marker" else None
    return Declared(kind=change.kind, name=name, spec=Absent(retire=f"undoes {undo.name}", at=at), rules=rules)
