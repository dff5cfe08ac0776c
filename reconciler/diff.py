"""Third step of the flow: Desired and Live -> Changes. Pure: the same two inputs always give the same list."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from reconciler.errors import Refused
from reconciler.kinds import Blocked, Kind, Wanted, kinds
from reconciler.model import (
    Absent,
    Action,
    Change,
    Declared,
    Desired,
    FieldChange,
    Hazard,
    Json,
    Live,
    Model,
    canonical,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def changes(desired: Desired, live: Live, last: Mapping[str, Json]) -> tuple[Change, ...]:
    """What leads from live to desired, in the order of an apply.

    last: the manifest of the last ledger entry (address -> {"kind", "spec"}), empty when there is none.
    Raises Refused, naming every object that may not be changed from its live state.
    """
    blocked: list[str] = []
    found: list[Change] = []
    removed: list[Change] = []
    known = kinds()
    for item in desired.items.values():
        kind = known[item.kind]
        before = live.items.get(item.address)
        facts = live.facts.get(item.address, {})
        if "not_judged" in facts:
            continue  # nobody can say anything of it; see `live.unjudged`
        try:
            if isinstance(item.spec, Absent):
                if before is not None:
                    kind.removable(before, item.rules, facts)
                    removed.append(_removal(kind, item, item.spec, before, last))
                continue
            wanted = kind.decide(item.spec, item.rules, before, facts)
        except Blocked as reason:
            place = f" ({item.place})" if item.place else ""
            blocked.append(f"{item.address}{place}: {reason}")
            continue
        if wanted is not None:
            found.append(_change(kind, item, before, wanted, last))
    if blocked:
        raise Refused(
            "The live database does not allow what the files want.",
            details=blocked,
            hint="Nothing was changed. Correct the files, or find out who changed the database and why.",
        )
    # Removals last and the other way round: nothing is taken away from under what still stands on it.
    return (*_ordered(found), *reversed(_ordered(removed)), *_forgotten(desired, last))


def _change(
    kind: Kind[Any, Any, Any], item: Declared, before: Model | None, wanted: Wanted, last: Mapping[str, Json]
) -> Change:
    old = None if before is None else before.dump()
    new = wanted.after.dump()
    hazards: set[Hazard] = kind.hazards(before, wanted.after, item.rules)
    applied = last.get(item.address)
    if applied is not None:
        # By the installed rules as well: a file that drops a lock does not drop the hazard with it.
        hazards |= kind.hazards(before, wanted.after, kind.load_rules(applied["rules"]))
    reason = "declared and missing" if before is None else "differs from what is declared"
    if applied is not None and applied["spec"] != (None if before is None else kind.essence(before).dump()):
        hazards.add("overwrites_drift")
        reason = "changed since the last apply"
    actions: tuple[Action, ...] = ("remove", "add") if wanted.replace else ("add",) if before is None else ("change",)
    return Change(
        address=item.address,
        kind=item.kind,
        actions=actions,
        before=old,
        after=new,
        context=wanted.context,
        fields=fields(old, new) if old is not None else (),
        reason=reason,
        hazards=tuple(sorted(hazards)),
        statements=kind.render(before, wanted.after, item.rules, wanted.context),
    )


def _removal(
    kind: Kind[Any, Any, Any], item: Declared, absent: Absent, before: Model, last: Mapping[str, Json]
) -> Change:
    hazards: set[Hazard] = {"retires"}
    applied = last.get(item.address)
    if applied is not None and applied["spec"] != kind.essence(before).dump():
        hazards.add("overwrites_drift")
    return Change(
        address=item.address,
        kind=item.kind,
        actions=("remove",),
        before=before.dump(),
        reason=absent.retire,
        hazards=tuple(sorted(hazards)),
        statements=kind.render(before, None, item.rules, None),
    )


def _forgotten(desired: Desired, last: Mapping[str, Json]) -> list[Change]:
    """Protection outlives its line: what the ledger knows and no file declares is shown, and needs approval."""
    return [
        Change(
            address=address,
            kind=entry["kind"],
            actions=("forget",),
            before=entry["spec"],
            reason="no file declares it any more; it stays in the database, ungoverned",
            hazards=("forgets",),
        )
        for address, entry in sorted(last.items())
        if address not in desired.items and address not in desired.checks
    ]


def _ordered(found: Sequence[Change]) -> list[Change]:
    """By kind in the order of an apply; functions after the functions that their bodies name, otherwise by address."""
    order = {name: index for index, name in enumerate(kinds())}
    ranked = {
        change.address: change for change in sorted(found, key=lambda change: (order[change.kind], change.address))
    }
    after = {address: change.after or change.before or {} for address, change in ranked.items()}
    named: dict[str, list[str]] = {}
    for address, thing in after.items():
        if "body" in thing:
            named.setdefault(thing["name"], []).append(address)
    needs = {
        address: sorted(
            other
            for word in set(re.findall(r"\w+", thing.get("body", ""))) & set(named)
            for other in named[word]
            if other != address
        )
        for address, thing in after.items()
    }
    done: dict[str, Change] = {}
    seen: set[str] = set()
    for start in ranked:
        # Depth first with a stack of our own: a chain of functions may be longer than Python's.
        stack = [(start, iter(needs[start]))] if start not in seen else []
        seen.add(start)
        while stack:
            address, rest = stack[-1]
            # What was seen and is not done is a cycle: PL/pgSQL resolves names when it runs.
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                done[address] = ranked[address]
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(needs[following])))
    return list(done.values())


def fields(before: Json, after: Json) -> tuple[FieldChange, ...]:
    """The top-level fields that differ, then, inside mappings and lists, the paths that do (deepdiff).

    Plain comparison first: only what differs is looked at closely.
    """
    found: list[FieldChange] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        # Canonical JSON: 1 and true differ, 100 and 100.0 do not.
        if canonical(old) == canonical(new):
            continue
        if isinstance(old, list | dict) and isinstance(new, list | dict):
            # Inside a list deepdiff takes 1 and true for equal: then the whole list is named.
            found += _inside(name, old, new) or [FieldChange(name=name, before=old, after=new)]
        else:
            found.append(FieldChange(name=name, before=old, after=new))
    return tuple(found)


def _inside(name: str, old: Json, new: Json) -> list[FieldChange]:
    # Slow to import, and most runs have nothing to compare this closely.
    from deepdiff import DeepDiff
    from deepdiff.helper import notpresent

    # deepdiff has no types: a group of levels, each with a path and the two values.
    delta = cast("dict[str, list[Any]]", DeepDiff(old, new, view="tree", ignore_order=False))
    levels = sorted((level for group in delta.values() for level in group), key=lambda level: str(level.path()))
    return [
        FieldChange(
            name=str(level.path(root=name)),
            before=None if level.t1 is notpresent else level.t1,
            after=None if level.t2 is notpresent else level.t2,
        )
        for level in levels
    ]
