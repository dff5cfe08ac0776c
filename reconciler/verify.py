"""Beside the flow: a ledger's chain or an evidence folder -> what does not hold. Believes nothing that it can work out.

A chain is judged from its rows alone: by hashes, by the digests of each plan, by the signatures of each approval under
the list that was installed before that entry. A folder is judged without a database.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from reconciler import approve, signatures
from reconciler.errors import NotApproved, PlanDamaged, ReconcilerError, UsageError
from reconciler.evidence import DOCUMENT, SUMS, listing
from reconciler.evidence import load as load_evidence
from reconciler.intoto import FOLDER, envelope, key_id, opened, pre_authentication, statements
from reconciler.kinds import kinds
from reconciler.ledger import GENESIS, chained, lives
from reconciler.model import FORMAT_VERSION, Absent, Body, Json, Model, Plan, canonical
from reconciler.plan import load as load_plan
from reconciler.plan import read, replace_file, serialize
from reconciler.rehome import is_one
from reconciler.setup import ACCEPTED, scope
from reconciler.trust import check_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from reconciler.evidence import Evidence
    from reconciler.model import Approval, Desired


class Past(Model):
    """One entry of a ledger, for people."""

    number: int
    recorded_at: str
    run_id: str
    target: str
    release: str
    added: int
    changed: int
    removed: int
    forgotten: int
    approvers: tuple[str, ...]
    signed: bool
    break_glass: bool
    hash: str


class History(Model):
    """All entries of one governance name, the oldest first."""

    format_version: str = FORMAT_VERSION
    outcome: str = "no_changes"
    name: str
    entries: tuple[Past, ...]


class Verified(Model):
    """What was looked at, and every problem that was found, a sentence each."""

    format_version: str = FORMAT_VERSION
    outcome: str
    subject: str
    checked: tuple[str, ...]
    problems: tuple[str, ...]


class Anchor(Model):
    """The head of a chain, kept where whoever can rewrite the ledger cannot: in git, in a ticket."""

    name: str
    database: str
    system_identifier: str
    number: int
    hash: str
    recorded_at: str


Row = dict[str, Any]
"""name, number, run_id, recorded_at, approval_ids, previous, hash, body (text), as `ledger.chain` reads them."""


def history(name: str, rows: Sequence[Row]) -> History:
    """The chain as a list for people. Raises PlanDamaged for an entry that cannot be read; `verify` says why."""
    return History(name=name, entries=tuple(_past(row) for row in rows))


def _past(row: Row) -> Past:
    try:
        body = json.loads(row["body"])
        plan, approvals = body["plan"], body["approvals"]
        return Past(
            number=row["number"],
            recorded_at=body["recorded_at"],
            run_id=row["run_id"],
            target=body["target"]["name"],
            release=plan["state"]["release"],
            added=plan["summary"]["add"],
            changed=plan["summary"]["change"],
            removed=plan["summary"]["remove"],
            forgotten=plan["summary"]["forget"],
            approvers=tuple(yes["approver"] for yes in approvals),
            signed=all(yes.get("signature") for yes in approvals),
            break_glass=any(yes.get("break_glass") for yes in approvals),
            hash=row["hash"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PlanDamaged(
            f"Ledger entry {row['number']} cannot be read: {type(error).__name__}.",
            hint="`reconciler verify` says more.",
        ) from None


# ------------------------------------------------------------------------------------------------------------ the chain


def chain(name: str, rows: Sequence[Row], anchor: Anchor | None = None) -> Verified:
    """Judge a whole chain. rows: every entry of this name, by number."""
    problems: list[str] = []
    count = f"{len(rows)} entr{'y' if len(rows) == 1 else 'ies'}"
    checked = [f"{count} of {name}: hashes, order, digests, approvals, signatures, what each installs"]
    previous, used, runs = GENESIS, set[str](), set[str]()
    before: Body | None = None
    for position, row in enumerate(rows, 1):
        problems += [f"entry {row['number']}: {problem}" for problem in _link(row, position, previous)]
        previous = row["hash"]
        try:
            body = Body.model_validate_json(row["body"])
        except ValidationError as error:
            problems.append(f"entry {row['number']}: its body is not one that reconciler wrote: {_first(error)}")
            before = None
            continue
        problems += [f"entry {row['number']}: {problem}" for problem in _entry(row, body, before, position, used)]
        if body.run_id in runs:
            problems.append(f"entry {row['number']}: run {body.run_id} has another entry")
        runs.add(body.run_id)
        used |= {yes.id for yes in body.approvals}
        before = body
    if anchor is not None:
        problems += _anchored(name, rows, anchor)
        checked.append(f"the anchor of entry {anchor.number}")
    return Verified(
        outcome="error" if problems else "no_changes", subject=name, checked=tuple(checked), problems=tuple(problems)
    )


def _link(row: Row, position: int, previous: str) -> Iterator[str]:
    if row["number"] != position:
        yield f"it is number {position} of the chain: entries are missing"
    if row["previous"] != previous:
        yield "it does not follow the entry before it"
    if row["hash"] != chained(row["previous"], row["body"]):
        yield "its hash is not that of its body"
    try:
        same = canonical(json.loads(row["body"])) == row["body"].encode()
    except ValueError:
        same = False
    if not same:
        yield "its body is not written as reconciler writes it"


def _entry(row: Row, body: Body, before: Body | None, position: int, used: set[str]) -> Iterator[str]:
    """What the entry says of itself, worked out again."""
    if body.run_id != row["run_id"]:
        yield f"its run is {row['run_id']}, its body says {body.run_id}"
    if sorted(yes.id for yes in body.approvals) != sorted(row["approval_ids"]):
        yield "its approval ids are not those of its body"
    try:
        plan = Plan.model_validate_json(canonical(body.plan))
        desired = check_plan(plan)
    except (ValidationError, ReconcilerError) as error:
        yield f"its plan does not hold: {error.message if isinstance(error, ReconcilerError) else _first(error)}"
        return
    if desired.name != row["name"]:
        yield f"its plan is that of {desired.name}"
    yield from _installs(body, before, plan, desired)
    if before is not None and lives(body.target) != lives(before.target) and not is_one(plan):
        yield "it was written in another place than the entry before it, and no rehome says so"
    if before is None and position > 1:
        return  # under which policy nobody can say
    policy = body.policy if before is None else before.policy
    allowed = body.approvers if before is None else before.approvers
    moment = datetime.fromisoformat(body.recorded_at).astimezone(UTC)
    try:
        court = approve.Court(
            policy=policy,
            allowed=allowed,
            used=frozenset(used),
            now=moment,
            author=approve.author(plan, allowed, moment),
            rehomed_at=None if before is None else before.rehomed_at,
            target=plan.target,
        )
        counted = approve.verify(
            body.approvals,
            court,
            effect_digest=plan.effect_digest,
            hazards=plan.hazards,
            attestations=plan.attestations,
        )
    except NotApproved as refused:
        yield f"it was not approved: {'; '.join(refused.details) or refused.message}"
        return
    open_ = before.emergencies if before else ()
    if approve.emergencies(open_, position, body.recorded_at, counted, plan, court) != body.emergencies:
        yield "what it says of broken glass is not what its approvals give"


def _installs(body: Body, before: Body | None, plan: Plan, desired: Desired) -> Iterator[str]:
    """What the entry says is in effect from then on, against what was approved: later entries are judged by it.

    A rehome leaves in effect what was. Who may add entries could otherwise have a trifle approved, and install with it
    a list of approvers of their own.
    """
    if lives(body.target) != lives(plan.target):
        yield "it was written in another place than its plan is for"
    if is_one(plan):
        kept = None if before is None else (before.policy, before.approvers, before.scope, before.manifest)
        if kept is not None and kept != (body.policy, body.approvers, body.scope, body.manifest):
            yield "it installs more than the new home that was approved"
        if body.rehomed_at != body.recorded_at:
            yield "it does not say when the ledger got its new home"
        return
    if before is not None and body.rehomed_at != before.rehomed_at:
        yield "it says of the ledger's last rehome what the entry before it does not"
    if (body.policy, body.approvers) != (desired.policy, desired.approvers):
        yield "it installs another policy or list of approvers than was approved"
    if canonical(body.scope) != canonical(scope(desired)):
        yield "it installs another scope than was approved"
    if wrong := _others(body, before, plan, desired):
        yield f"it holds other objects, rules or checks than were approved: {', '.join(sorted(wrong))}"


def _others(body: Body, before: Body | None, plan: Plan, desired: Desired) -> set[str]:
    """The addresses of the manifest that are not as the plan declares them, and those that it should have."""
    found: dict[str, Json] = {address: entry.dump() for address, entry in body.manifest.items()}
    told = {address: entry["spec"] if address in desired.checks else entry["rules"] for address, entry in found.items()}
    declared = {address: check.spec.dump() for address, check in desired.checks.items()}
    declared |= {address: item.rules.dump() for address, item in desired.items.items() if address in found}
    wrong = {
        address for address in {*told, *declared} if canonical(told.get(address)) != canonical(declared.get(address))
    }
    accepted = [(change.address.removeprefix(ACCEPTED), change) for change in plan.setup if change.kind == "accepted"]
    for address, change in [*accepted, *((change.address, change) for change in plan.changes)]:
        if change.after is not None:
            kind = kinds()[address.partition(".")[0]]
            approved = kind.essence(kind.load(change.after)).dump()
            if address not in found or canonical(found[address]["spec"]) != canonical(approved):
                wrong.add(address)
    known = set[str]() if before is None else {*before.manifest} - {*found}
    return wrong | {
        address for address in known & {*desired.items} if not isinstance(desired.items[address].spec, Absent)
    }


def _anchored(name: str, rows: Sequence[Row], anchor: Anchor) -> Iterator[str]:
    if anchor.name != name:
        yield f"the anchor is that of {anchor.name}"
        return
    found = next((row for row in rows if row["number"] == anchor.number), None)
    if found is None:
        yield f"the anchor knows entry {anchor.number}, which is missing: the chain was cut"
    elif found["hash"] != anchor.hash:
        yield f"entry {anchor.number} is not the one that was anchored: the chain was written anew"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def write_anchor(path: Path, anchor: Anchor) -> None:
    """Write the head of a chain, whole or not at all. Raises UsageError."""
    replace_file(path, serialize(anchor.dump()), private=False)


def load_anchor(path: Path) -> Anchor:
    """Raises UsageError, PlanDamaged."""
    try:
        return Anchor.model_validate_json(canonical(read(path, "anchor")))
    except ValidationError as error:
        raise PlanDamaged(f"{path} is no anchor: {_first(error)}.") from None


# ----------------------------------------------------------------------------------------------------------- the folder


def folder(path: Path, allowed: str | None) -> Verified:
    """Judge an evidence folder offline: every byte by SHA256SUMS, every claim that can be worked out again.

    allowed: the text of an allowed_signers file, None when nobody gave one. Raises UsageError when it is none.
    """
    if not (path / SUMS).is_file() or not (path / DOCUMENT).is_file():
        raise UsageError(f"{path} is no evidence folder: {SUMS} or {DOCUMENT} is not there.")
    listed, problems = _sums(path)
    checked = [f"{len(listed)} files by SHA-256"]
    problems += _documents(path, allowed, checked, listed)
    return Verified(
        outcome="error" if problems else "no_changes",
        subject=str(path),
        checked=tuple(checked),
        problems=tuple(problems),
    )


def _sums(path: Path) -> tuple[dict[str, str], list[str]]:
    """The listed files with their sums, and every one that is changed, missing, added or listed out of order."""
    problems: list[str] = []
    listed: dict[str, str] = {}
    raw = (path / SUMS).read_bytes()
    for number, line in enumerate(raw.decode(errors="replace").split("\n")[:-1], 1):
        value, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            problems.append(f"{SUMS}, line {number}: not a line that reconciler writes")
            continue
        listed[name] = value
        file = path / name
        if ".." in name.split("/") or name.startswith("/") or file.is_symlink() or not file.is_file():
            problems.append(f"{name}: missing")
        elif _sha256(file) != value:
            problems.append(f"{name}: not what {SUMS} says")
    if raw != listing(listed):
        problems.append(f"{SUMS}: not in the form and order that reconciler writes")
    there = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir() or file.is_symlink()}
    problems += [f"{name}: not in {SUMS}" for name in sorted(there - set(listed) - {SUMS})]
    return listed, problems


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _documents(path: Path, allowed: str | None, checked: list[str], listed: Mapping[str, str]) -> Iterator[str]:
    """The plan, the approvals and the ledger entry, against each other and against what the evidence says of them."""
    try:
        told = load_evidence(path)
        plan, checksum = load_plan(path / "plan.json")
        check_plan(plan)
    except ReconcilerError as error:
        yield error.message
        return
    checked.append("the plan's statements and digests, derived again")
    if (told.plan_checksum, told.effects_digest) != (checksum, plan.effects_digest):
        yield "the evidence is that of another plan"
    approvals: list[Approval] = []
    for file in sorted((path / "approvals").glob("*.json")):
        try:
            approvals.append(approve.load(file))
        except ReconcilerError as error:
            yield error.message
    if sorted(yes.id for yes in approvals) != sorted(yes.id for yes in told.approvals):
        yield "the approvals are not those that the evidence names"
    for yes in approvals:
        if not approve.covers(yes, plan.effect_digest, plan.target):
            yield f"the approval of {yes.approver} is for other effects"
    yield from _signed(allowed, plan, approvals, checked)
    yield from _stated(path, told, allowed, checked, listed)
    yield from _backups(told, listed, checked)
    if (path / "ledger-entry.json").is_file():
        checked.append("the ledger entry's hash")
        yield from _kept(path, told.run_id, plan)
    elif told.outcome == "applied":
        yield "ledger-entry.json: missing, and the run was applied"


def _signed(allowed: str | None, plan: Plan, approvals: Sequence[Approval], checked: list[str]) -> Iterator[str]:
    signed = [yes for yes in approvals if yes.signature is not None]
    if allowed is None:
        if signed:
            checked.append("signatures not checked: --allowed-signers FILE says who may sign")
        return
    if plan.author is not None:
        checked.append("the signature of the plan's author")
        try:
            approve.author(plan, allowed, datetime.fromisoformat(plan.created_at).astimezone(UTC))
        except NotApproved as refused:
            yield refused.message
    for yes in approvals:
        if yes.signature is None:
            yield f"the approval of {yes.approver} is not signed"
            continue
        try:
            approve.signer(yes, allowed, datetime.fromisoformat(yes.issued_at).astimezone(UTC))
        except signatures.BadSignature as wrong:
            yield f"the approval of {yes.approver} {wrong}"
    checked.append(f"{len(signed)} signatures")


def _stated(
    path: Path, told: Evidence, allowed: str | None, checked: list[str], listed: Mapping[str, str]
) -> Iterator[str]:
    """The in-toto statements: those that the evidence gives, each signed, and no other."""
    files = [name for name in listed if name.startswith(f"{FOLDER}/")]
    there = {name.partition("/")[2].partition(".")[0]: name for name in files}
    yield from (f"{name}: not of this run" for name in files if name not in there.values())
    if not there:
        if allowed is not None and told.outcome != "unknown":
            yield "nobody signed for the run: it was applied without --key, or the statements were taken away"
        return
    try:
        wanted = statements(told, {name: value for name, value in listed.items() if name not in files})
    except (KeyError, ValueError):
        yield "the folder does not have the files that its statements are about"
        return
    moment = datetime.fromisoformat(told.finished_at or told.planned_at).astimezone(UTC)
    for step in sorted({*there, *wanted}):
        if step not in wanted or step not in there:
            yield there.get(step, f"{FOLDER}/{step}") + (": missing" if step in wanted else ": not of this run")
            continue
        try:
            _statement(path / there[step], step, canonical(wanted[step]), allowed, moment)
        except (OSError, ValueError) as wrong:
            yield f"{there[step]}: {wrong}"
        except signatures.BadSignature as wrong:
            yield f"{there[step]}: its signature {wrong}"
    checked.append(f"{len(wanted)} in-toto statements" + (", signatures included" if allowed is not None else ""))


def _statement(file: Path, step: str, wanted: bytes, allowed: str | None, moment: datetime) -> None:
    """Raises ValueError or BadSignature when the envelope does not say this, signed by a key of the list."""
    payload, signature = opened(file.read_bytes())
    if payload != wanted:
        raise ValueError("says something else than the evidence")
    if file.name != f"{step}.{key_id(signature)[:8]}.json":
        raise ValueError("is not named by the key that signed it")
    if allowed is not None:
        signatures.judge_any(pre_authentication(payload), signature, allowed, signatures.EVIDENCE, moment)
    if file.read_bytes() != envelope(payload, signature):
        raise ValueError("is not written as reconciler writes it")


def _backups(told: Evidence, listed: Mapping[str, str], checked: list[str]) -> Iterator[str]:
    made = {one.file: one.sha256 for one in told.backups if one.file is not None}
    if made:
        checked.append(f"{len(made)} backups against what the run read of them")
    for name, value in made.items():
        if listed.get(name) != value:
            yield f"{name}: not the backup that the run made"


def _kept(path: Path, run_id: str, plan: Plan) -> Iterator[str]:
    try:
        entry: Mapping[str, Json] = read(path / "ledger-entry.json", "ledger entry")
        body = entry["body"]
        if entry["hash"] != chained(entry["previous"], canonical(body).decode()):
            yield "the ledger entry's hash is not that of its body"
        if body["run_id"] != run_id:
            yield f"the ledger entry is that of run {body['run_id']}"
        if body["plan"]["effect_digest"] != plan.effect_digest:
            yield "the ledger entry is that of another plan"
    except ReconcilerError as error:
        yield error.message
    except (KeyError, TypeError):
        yield "ledger-entry.json is no ledger entry"


def exit_code(found: Verified) -> int:
    """1 when something does not hold, as for any damaged file; else 0."""
    return 1 if found.problems else 0
