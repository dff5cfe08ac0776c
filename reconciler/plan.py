"""Fourth step of the flow: Changes -> Plan with its digests; and a plan as a file, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pydantic_core
from pydantic import ValidationError

from reconciler import __version__
from reconciler.checks import checks
from reconciler.diff import changes as diff_changes
from reconciler.errors import PlanDamaged, UsageError
from reconciler.kinds import kinds
from reconciler.model import (
    DIGEST_ENCODING,
    FORMAT_VERSION,
    MOMENT,
    Change,
    Check,
    Desired,
    Drift,
    Finding,
    GateStore,
    Identity,
    Json,
    Listed,
    Live,
    NotCompared,
    Plan,
    Policy,
    Scope,
    StateInfo,
    Summary,
    Target,
    Verdict,
    blocking,
    canonical,
    digest,
    milliseconds,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


MAX_FILE = 256 * 1024**2


def build(  # noqa: PLR0913 - these are the inputs of the flow, each once
    desired: Desired,
    live: Live,
    *,
    target: Target,
    setup: Sequence[Change],
    last: Mapping[str, Json],
    drift: Sequence[Drift],
    verdicts: Sequence[Verdict],
    not_compared: Sequence[NotCompared],
    now: datetime,
) -> Plan:
    """The plan. The same inputs give the same digests; `now` only dates it.

    setup: what the tool needs for itself. last: the manifest last applied. drift: live against last applied.
    Raises Refused for changes that the live state does not allow.
    """
    return assemble(
        desired,
        diff_changes(desired, live, last),
        target=target,
        setup=setup,
        drift=drift,
        findings=live.findings,
        verdicts=verdicts,
        not_compared=not_compared,
        now=now,
    )


def assemble(  # noqa: PLR0913 - as build
    desired: Desired,
    found: Sequence[Change],
    *,
    target: Target,
    setup: Sequence[Change],
    now: datetime,
    drift: Sequence[Drift] = (),
    findings: Sequence[Finding] = (),
    verdicts: Sequence[Verdict] = (),
    not_compared: Sequence[NotCompared] = (),
) -> Plan:
    """The plan of these changes, with its digests."""
    declared = dump_desired(desired)
    effects = effects_digest(declared, setup, found)
    summary = summarize(found, len(drift), len(findings))
    return Plan(
        outcome="violated" if blocking(verdicts) else "changes" if setup or found else "no_changes",
        tool=f"reconciler {__version__}",
        created_at=stamp(now),
        expires_at=stamp(now + timedelta(milliseconds=milliseconds(desired.policy.approval.expires))),
        state=StateInfo(name=desired.name, release=desired.release, source_digest=desired.source_digest),
        target=target,
        setup=tuple(setup),
        changes=tuple(found),
        drift=tuple(drift),
        findings=tuple(findings),
        invariants=of_kind(verdicts, "invariant"),
        proofs=of_kind(verdicts, "proof"),
        surface=of_kind(verdicts, "surface"),
        not_compared=tuple(not_compared),
        summary=summary,
        effects_digest=effects,
        effect_digest=effect_digest(effects, target),
        desired=declared,
    )


def of_kind(verdicts: Sequence[Verdict], kind: str) -> tuple[Verdict, ...]:
    """The verdicts of one sort of check. What was not judged of an object itself stands with the invariants."""
    own = tuple(f"{name}." for name in (kind, *(kinds() if kind == "invariant" else ())))
    return tuple(verdict for verdict in verdicts if verdict.address.startswith(own))


def masked(plan: Plan) -> Plan:
    """The plan for strangers' eyes: values that declared queries gave are digests, in objects and statements alike.

    Such a plan is for reading; its statements are not what would run, so it is never written with `--out`.
    """
    desired = load_desired(plan.desired)

    def hidden(change: Change) -> Change:
        if change.after is None:
            return change
        kind, rules = kinds()[change.kind], desired.items[change.address].rules
        after = kind.masked(kind.load(change.after), rules)
        before = None if change.before is None else kind.load(change.before)
        statements = kind.render(before, after, rules, change.context)
        return change.model_copy(update={"after": after.dump(), "statements": statements})

    return plan.model_copy(update={"changes": tuple(hidden(change) for change in plan.changes)})


def summarize(found: Sequence[Change], drift: int, findings: int) -> Summary:
    """The numbers of the `Plan:` line. A replacement is one removal and one addition."""

    def count(action: str) -> int:
        return sum(action in change.actions for change in found)

    return Summary(
        add=count("add"),
        change=count("change"),
        remove=count("remove"),
        forget=count("forget"),
        drift=drift,
        findings=findings,
    )


def stamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the second."""
    return moment.astimezone(UTC).strftime(MOMENT)


# ------------------------------------------------------------------------------------------------------------- digests


def effects_digest(declared: Json, setup: Sequence[Change], found: Sequence[Change]) -> str:
    """SHA-256 of what would be true afterwards and by which rules (DESIGN 6).

    `declared` is in it whole, beyond the changes: an apply writes it to the ledger as what is governed from then on,
    and derives hazards from its rules, so nothing of it may be left to whoever edits a plan file.
    """
    return digest(
        {
            "encoding": DIGEST_ENCODING,
            "governance": declared["name"],
            "scope": declared["scope"],
            "policy": declared["policy"],
            "approvers": declared["approvers"],
            "setup": [change.effect() for change in setup],
            "changes": [change.effect() for change in found],
            "checks": declared["checks"],
            "declared": {"stores": declared["stores"], "items": declared["items"]},
        }
    )


def effect_digest(effects: str, target: Target | Identity) -> str:
    """SHA-256 that an approval for one target signs: the effects and exactly which database."""
    return digest(
        {
            "effects_digest": effects,
            "target": target.name,
            "system_identifier": target.system_identifier,
            "database": target.database,
        }
    )


def fleet_digest(listed: Listed) -> str:
    """SHA-256 that an approval for a fleet signs: the effects, and every database that they may be made on."""
    return digest(
        {
            "fleet": listed.fleet,
            "effects_digest": listed.effects_digest,
            "targets": [identity.dump() for identity in listed.targets],
        }
    )


def dump_desired(desired: Desired) -> dict[str, Json]:
    """Everything declared, as JSON types; `load_desired` is the inverse."""
    return {
        "name": desired.name,
        "release": desired.release,
        "target": desired.target,
        "database": desired.database,
        "ledger": desired.ledger,
        "policy": desired.policy.dump(),
        "approvers": desired.approvers,
        "scope": desired.scope.dump(),
        "stores": {name: store.dump() for name, store in sorted(desired.stores.items())},
        "items": {address: item.dump() for address, item in sorted(desired.items.items())},
        "checks": {address: check.dump() for address, check in sorted(desired.checks.items())},
        "source_digest": desired.source_digest,
    }


def with_forgotten(desired: Desired, manifest: Mapping[str, Json]) -> Desired:
    """The declarations, and what the ledger knows beside them: what was forgotten is still looked at."""
    known, judging = kinds(), checks()
    items = {
        address: known[entry["kind"]].declared(entry)
        for address, entry in manifest.items()
        if entry["kind"] in known and address not in desired.items
    }
    judged = {
        address: Check(kind=entry["kind"], name=entry["name"], spec=judging[entry["kind"]].load(entry["spec"]))
        for address, entry in manifest.items()
        if entry["kind"] in judging and address not in desired.checks
    }
    return replace(
        desired,
        items={**desired.items, **items},
        checks={**desired.checks, **judged},
        remembered=remembered(manifest),
    )


def remembered(manifest: Mapping[str, Json]) -> dict[str, Json]:
    """What the ledger remembers of objects whose text the catalog rewrites, by address."""
    facts = {address: entry.get("facts", {}).get("remembered") for address, entry in manifest.items()}
    return {address: pair for address, pair in facts.items() if pair is not None}


def load_desired(data: Json) -> Desired:
    """Everything declared, from a plan. Raises PlanDamaged when it is not what `dump_desired` writes."""
    known, judging = kinds(), checks()

    try:
        items = {address: known[entry["kind"]].declared(entry) for address, entry in data["items"].items()}
        judged = {
            address: Check(kind=entry["kind"], name=entry["name"], spec=judging[entry["kind"]].load(entry["spec"]))
            for address, entry in data["checks"].items()
        }
        if any(address != thing.address for part in (items, judged) for address, thing in part.items()):
            raise PlanDamaged("The plan names an object under another address than its own.")
        return Desired(
            name=data["name"],
            release=data["release"],
            target=data["target"],
            database=data["database"],
            ledger=data["ledger"],
            policy=Policy.model_validate_json(canonical(data["policy"])),
            approvers=str(data["approvers"]),
            scope=Scope.model_validate_json(canonical(data["scope"])),
            stores={name: GateStore.model_validate_json(canonical(store)) for name, store in data["stores"].items()},
            items=items,
            checks=judged,
            source_digest=data["source_digest"],
        )
    except (KeyError, TypeError, AttributeError, StopIteration, ValidationError) as error:
        raise PlanDamaged(f"The plan's declarations cannot be read: {type(error).__name__}.") from None


# --------------------------------------------------------------------------------------------------------------- files


def serialize(document: Json) -> bytes:
    """The one way a plan or approval is written: sorted keys, two spaces, a checksum over the canonical JSON."""
    text = canonical({key: value for key, value in document.items() if key != "checksum"})
    body: dict[str, Json] = json.loads(text, parse_int=_number)
    body["checksum"] = hashlib.sha256(text).hexdigest()
    # Its keys are in order already, but for the one that is new. json.dumps indents ten times as slowly (measured).
    return pydantic_core.to_json(dict(sorted(body.items())), indent=2) + b"\n"


def _number(text: str) -> int | float:
    """Canonical JSON writes 1e16 without an exponent; as an integer nobody could read it again (RFC 8785, 3.2.2.3)."""
    number = int(text)
    return number if abs(number) < 2**53 else float(text)


def write(path: Path, document: Json, *, private: bool = False) -> None:
    """Write a plan or approval whole or not at all. private: readable by its owner only. Raises UsageError."""
    replace_file(path, serialize(document), private=private)


def replace_file(path: Path, data: bytes, *, private: bool) -> None:
    """Put `data` in the place of `path` in one step. private: readable by its owner only. Raises UsageError."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o600 if private else 0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from None


def read(path: Path, what: str) -> dict[str, Json]:
    """The document of a file that `write` wrote, byte for byte. Raises UsageError, PlanDamaged."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no ordinary file.")
        if path.stat().st_size > MAX_FILE:
            raise PlanDamaged(f"{path} is larger than {MAX_FILE // 1024**2} MiB; no {what} is.")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {what} {path}: {error.strerror}.") from None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PlanDamaged(f"{path} is no {what}: {error}.") from None
    if not isinstance(document, dict):
        raise PlanDamaged(f"{path} is no {what}.")
    found = cast("dict[str, Json]", document)
    version = found.get("format_version")
    if isinstance(version, str) and version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise PlanDamaged(
            f"{path} has format {version}; this version reads {FORMAT_VERSION}.",
            hint="Make it again, or use the reconciler that made it.",
        )
    checksum = found.pop("checksum", None)
    try:
        intact = checksum is not None and serialize(found) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise PlanDamaged(
            f"{path} was changed after it was written: its checksum does not match.",
            hint="Make the plan again; a plan is never edited.",
        )
    return found


def load(path: Path) -> tuple[Plan, str]:
    """A saved plan and its checksum. Raises UsageError, PlanDamaged."""
    document = read(path, "plan")
    try:
        plan = Plan.model_validate_json(canonical(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanDamaged(f"{path} is no plan: {place}: {first['msg']}.") from None
    load_desired(plan.desired)
    return plan, digest(document)
