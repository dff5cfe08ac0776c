"""What an apply needs for itself, pure: the ledger, the policy, and the rules that protect what is governed.

These are effects like any other: digested, approved, printed under `Setup:`. Protection outlives its line (DESIGN
rule 8), so a rule, a check or a scope that says something else than the installed one is shown and has a hazard.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, cast

from postgast import split

from reconciler.checks import checks
from reconciler.kinds import kinds
from reconciler.model import (
    Absent,
    Change,
    Declared,
    Desired,
    FieldChange,
    Hazard,
    Json,
    JsonObject,
    Live,
    Model,
    Statement,
    Target,
    canonical,
)
from reconciler.syntax import quote_ident

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILES = ("ledger.sql", "ledger-2.sql")
"""What makes each version of the ledger's own schema from the one before it; the first makes it from nothing."""

VERSION = len(FILES)
"""Of the ledger's own schema."""

WORDS = ("reason",)
"""Keys of rules and checks that are for people: another wording is no other rule."""


def source(since: int = 0, owner: str | None = None) -> str:
    """The SQL that makes the ledger of a version into the newest, as a DBA could run it beforehand.

    since: the version that is there, 0 for none. owner: the role that it shall belong to, who runs it when None.
    """
    folder = files("reconciler")
    parts = [folder.joinpath(name).read_text("utf-8") for name in FILES[since:]]
    if owner is not None:
        role = quote_ident(owner)
        parts.append(
            "-- Nobody should be able to log in as the owner, or be a member of it: an owner can switch triggers off.\n"
            f"ALTER FUNCTION reconciler.entry_is_append_only() OWNER TO {role};\n"
            f"ALTER TABLE reconciler.entry OWNER TO {role};\n"
            f"ALTER SCHEMA reconciler OWNER TO {role};\n"
        )
    return "\n".join(parts)


def statements(change: Change) -> tuple[Statement, ...]:
    """What a setup change executes: the ledger's own SQL to create or upgrade it, nothing for everything else."""
    if change.kind == "ledger":
        since = 0 if change.before is None else int(change.before["version"])
        return tuple(Statement(text=text) for text in split(source(since)))
    return ()


def hazards(change: Change) -> tuple[Hazard, ...]:
    """Whatever replaces something that is installed changes the policy, or who may approve."""
    if change.kind == "ledger":
        return ()
    if change.kind == "home":
        return ("rehomes",)
    if change.kind == "accepted":
        return ("retires",) if change.after is None else ()
    if change.kind == "approvers":
        return ("changes_approvers",) if change.before is not None else ()
    return ("changes_policy",) if change.before is not None else ()


def changes(
    desired: Desired, *, version: int, readable: bool, installed: Mapping[str, Json] | None, live: Live | None = None
) -> tuple[Change, ...]:
    """What an apply would install.

    version: of the ledger's schema, 0 when there is none. installed: the last entry's body, None when this name was
    never applied here. live: for what was done by hand and the files now say too, which only the ledger has to learn.
    """
    found: list[Change] = []
    if version < VERSION:
        before = {"version": version} if version else None
        reason = "an earlier version made it" if version else "the first apply creates it"
        found.append(_change("ledger.reconciler", "ledger", before, {"version": VERSION}, reason))
    if not readable:
        return tuple(found)
    before = installed or {}
    parts: list[tuple[str, str, JsonObject | None, JsonObject]] = [
        (f"policy.{desired.name}", "policy", before.get("policy"), desired.policy.dump()),
        (f"scope.{desired.name}", "scope", before.get("scope"), scope(desired)),
    ]
    listed = before.get("approvers") or ""
    if listed or desired.approvers:
        old = {"allowed_signers": listed} if listed else None
        parts.append((f"approvers.{desired.name}", "approvers", old, {"allowed_signers": desired.approvers}))
    manifest: Mapping[str, Json] = before.get("manifest", {})
    for address, item in desired.items.items():
        if address in manifest:
            parts.append((address, "rules", manifest[address]["rules"], item.rules.dump()))
    for address, check in desired.checks.items():
        # A new one may be all that is new; the first apply installs everything anyhow.
        if address in manifest or installed is not None:
            parts.append((address, "check", manifest.get(address, {}).get("spec"), check.spec.dump()))
    for address, kind, old, new in parts:
        if old is None or _meaning(old) != _meaning(new):
            first = "judged from this apply on" if kind == "check" else "the first one"
            reason = first if old is None else f"the files say another {kind} than is installed"
            found.append(_change(address, kind, old, new, reason))
    return (*found, *(_accepted(desired, live, manifest) if live is not None else ()))


ACCEPTED = "accepted."
"""Before the address of what the files accept."""


def _accepted(desired: Desired, live: Live, manifest: Mapping[str, Json]) -> Iterator[Change]:
    """Drift that the files say too: nothing is executed, and it is approved like any other change of what is governed.

    Otherwise it would be drift for ever, and who does a thing by hand and then declares it would need no approval.
    """
    known = kinds()
    for address, item in desired.items.items():
        if address not in manifest or "not_judged" in live.facts.get(address, {}):
            continue
        kind, applied = known[item.kind], manifest[address]
        there = live.items.get(address)
        now = None if there is None else kind.essence(there).dump()
        wanted = None if isinstance(item.spec, Absent) else kind.essence(item.spec).dump()
        if now != wanted or now == applied["spec"]:
            continue
        bare = _change(ACCEPTED + address, "accepted", applied["spec"], now, "done by hand, and the files say the same")
        yield bare.model_copy(update={"hazards": accepted_hazards(bare, item, kind.load_rules(applied["rules"]))})


def accepted_hazards(change: Change, item: Declared, *more: Model) -> tuple[Hazard, ...]:
    """What a person must accept by name, as if an apply had done it. more: other rules that it is judged by."""
    kind = kinds()[item.kind]
    found: set[Hazard] = set(hazards(change))
    if change.after is not None and change.before is not None:
        before, after = kind.load(change.before), kind.load(change.after)
        for rules in (item.rules, *more):
            found |= kind.hazards(before, after, rules)
    return tuple(sorted(found))


def home(name: str, before: Target, after: Target) -> Change:
    """The ledger of this name gets another home, or is told again where it is."""
    old, new = (
        {"name": one.name, "database": one.database, "system": one.system_identifier} for one in (before, after)
    )
    reason = "the same home; approvals of before are void" if old == new else "the ledger is in another place"
    return _change(f"home.{name}", "home", old, new, reason)


def kind_of(address: str) -> str:
    """What a setup change at this address is called: rules and checks bear the addresses of what they are about."""
    first = address.partition(".")[0]
    return "rules" if first in kinds() else "check" if first in checks() else first


def scope(desired: Desired) -> JsonObject:
    """What is owned, and the tables that gates live in."""
    stores = {name: store.dump() for name, store in sorted(desired.stores.items())}
    return {"scope": desired.scope.dump(), "stores": stores}


def overlaps(ours: JsonObject, theirs: JsonObject) -> list[str]:
    """What two scopes, as `scope` gives them, both own: two names that govern one object would undo each other."""
    found: list[str] = []
    for one in ours["scope"]["gates"]:
        for other in theirs["scope"]["gates"]:
            table = ours["stores"][one["store"]]["table"]
            same = table == theirs["stores"].get(other["store"], {}).get("table")
            if same and meet(one["matching"], other["matching"]):
                found.append(f"gates {one['matching']} and {other['matching']} of {table}")
    found += [
        f"functions {one['matching']} and {other['matching']} of schema {one['schema']}"
        for one in ours["scope"]["functions"]
        for other in theirs["scope"]["functions"]
        if one["schema"] == other["schema"] and meet(one["matching"], other["matching"])
    ]
    markers = {entry["table"] for entry in ours["scope"]["markers"]} & {
        entry["table"] for entry in theirs["scope"]["markers"]
    }
    return found + [f"markers of {table}" for table in sorted(markers)]


def meet(one: str, other: str) -> bool:
    """Is there a name that matches both globs? `*` and `?` only."""
    # reached[j]: the first i characters of `one` and the first j of `other` can stand for the same name.
    reached = [True] + [False] * len(other)
    for j, letter in enumerate(other, 1):
        reached[j] = reached[j - 1] and letter == "*"
    for mine in one:
        before = reached
        reached = [before[0] and mine == "*"]
        for j, letter in enumerate(other, 1):
            if mine == "*" or letter == "*":
                reached.append(before[j] or reached[j - 1] or before[j - 1])
            else:
                reached.append(before[j - 1] and (mine == letter or "?" in {mine, letter}))
    return reached[-1]


def _meaning(part: JsonObject) -> JsonObject:
    return {key: value for key, value in part.items() if key not in WORDS}


def _fields(before: JsonObject, after: JsonObject) -> tuple[FieldChange, ...]:
    """Every value that differs, by its path. A first one is shown whole: it is approved like any other."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return tuple(
        FieldChange(name=name, before=old.get(name), after=new.get(name))
        for name in sorted({*old, *new})
        if canonical(old.get(name)) != canonical(new.get(name))
    )


def _leaves(thing: JsonObject, path: str = "") -> Iterator[tuple[str, Json]]:
    """The values inside of mappings, each with its path; lists are values. What is empty says nothing."""
    for name, value in thing.items():
        if isinstance(value, dict):
            yield from _leaves(cast("JsonObject", value), f"{path}{name}.")
        elif value not in (None, "", [], ()):
            yield f"{path}{name}", value


def _change(address: str, kind: str, before: JsonObject | None, after: JsonObject | None, reason: str) -> Change:
    bare = Change(
        address=address,
        kind=kind,
        actions=("add",) if before is None else ("remove",) if after is None else ("change",),
        before=before,
        after=after,
        fields=_fields(before or {}, after or {}) if kind != "ledger" else (),
        reason=reason,
    )
    return bare.model_copy(update={"statements": statements(bare), "hazards": hazards(bare)})
