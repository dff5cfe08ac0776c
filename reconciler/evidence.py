"""Last step of the flow, kept: Outcome, Plan, Approvals -> the files of an evidence folder. Pure, but for the writer.

A third party reads the folder without the database: what was approved, what was executed, what every check said, and
SHA256SUMS over all of it. The pages in it are rendered by the caller; `reconciler show` renders them again from
evidence.json alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from datetime import UTC
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from reconciler import intoto
from reconciler.errors import PlanDamaged, UsageError
from reconciler.model import (
    Absent,
    Address,
    Change,
    Desired,
    Model,
    Moment,
    Outcome,
    Plan,
    Scope,
    StateInfo,
    canonical,
    glob_match,
)
from reconciler.plan import load_desired, read, replace_file, serialize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from reconciler.model import Entry, Json

DOCUMENT = "evidence.json"
BEFORE = "evidence-unknown.json"
"""What the run itself could say, when its outcome became known only later."""
SUMS = "SHA256SUMS"


class Refusal(Model):
    """One refusal that a proof expects: the reason in the answer, or the SQLSTATE raised."""

    proof: Address
    refusal: str


class Evidence(Outcome):
    """An outcome with what a reader needs of the plan: evidence.json. Texts of statements stand in `executed`."""

    state: StateInfo
    planned_at: Moment
    plan_checksum: str
    effects_digest: str
    scope: Scope
    setup: tuple[Change, ...]
    changes: tuple[Change, ...]
    outside_scope: tuple[Address, ...] = ()
    """Changes of objects that the declared scope does not cover: declared by name all the same."""
    locked: dict[Address, str] = {}
    """The gates that no apply may arm, with their values."""
    gates: dict[Address, tuple[str, ...]] = {}
    """Function -> the gates it reads, for what was changed."""
    reasons: dict[Address, str] = {}
    """Why, as the files say it: of changed objects and of every check."""
    refusals: tuple[Refusal, ...] = ()
    author: str | None = None
    """Who signed the plan; None when it is not signed."""


def document(outcome: Outcome, plan: Plan, checksum: str) -> Evidence:
    """The outcome of applying this plan, as evidence. checksum: that of the plan's file."""
    desired = load_desired(plan.desired)
    changed = (*plan.setup, *plan.changes)
    rules: dict[Address, dict[str, Json]] = {
        address: item.rules.dump() for address, item in desired.items.items() if item.rules
    }
    reasons = {change.address: rules.get(change.address, {}).get("reason", "") for change in changed}
    reasons |= {address: getattr(check.spec, "reason", "") for address, check in desired.checks.items()}
    return Evidence(
        **{name: getattr(outcome, name) for name in Outcome.model_fields},
        state=plan.state,
        planned_at=plan.created_at,
        plan_checksum=checksum,
        effects_digest=plan.effects_digest,
        scope=desired.scope,
        setup=tuple(_without_text(change) for change in plan.setup),
        changes=tuple(_without_text(change) for change in plan.changes),
        outside_scope=tuple(change.address for change in plan.changes if not _covered(desired, change)),
        locked={
            address: str(item.spec.dump().get("value"))
            for address, item in desired.items.items()
            if rules.get(address, {}).get("lock") == "locked" and not isinstance(item.spec, Absent)
        },
        gates={
            change.address: tuple(rules.get(change.address, {}).get("gates") or ())
            for change in plan.changes
            if change.kind == "function"
        },
        reasons={address: reason for address, reason in reasons.items() if reason},
        refusals=tuple(_refusals(desired)),
        author=plan.author,
    )


def _without_text(change: Change) -> Change:
    return change.model_copy(update={"statements": ()})


def _covered(desired: Desired, change: Change) -> bool:
    """Does the declared scope cover the object of this change?"""
    thing = change.after or change.before or {}
    scope = desired.scope
    match change.kind:
        case "gate":
            stores = {name for name, store in desired.stores.items() if store.table == thing.get("table")}
            key = str(thing.get("key", change.address.partition(".")[2]))
            return any((not thing or one.store in stores) and glob_match(one.matching, key) for one in scope.gates)
        case "function":
            schema, name = str(thing.get("schema_name", "")), str(thing.get("name", ""))
            return any(one.schema_name == schema and glob_match(one.matching, name) for one in scope.functions)
        case "marker":
            return any(one.table == thing.get("table") for one in scope.markers)
        case _:
            return False


def _refusals(desired: Desired) -> list[Refusal]:
    """Every refusal that the declared proofs expect, each once for each proof."""
    found: dict[tuple[Address, str], None] = {}
    for address, check in desired.checks.items():
        if check.kind != "proof":
            continue
        spec = check.spec.dump()
        for step in spec.get("steps") or (spec,):
            for expected in step.get("then") or ():
                reasons = _reasons(expected.get("returns"))
                if state := expected.get("raises"):
                    reasons.append(
                        f"SQLSTATE {state}: {expected['message']}" if expected.get("message") else f"SQLSTATE {state}"
                    )
                found |= {(address, reason): None for reason in reasons}
    return [Refusal(proof=address, refusal=reason) for address, reason in found]


def _reasons(answer: Json) -> list[str]:
    """The reasons in an expected answer: those of objects that say `refused`, at any depth."""
    if isinstance(answer, dict):
        held = cast("dict[str, Json]", answer)
        told = [value for value in held.values() if isinstance(value, str) and value.startswith("refused")]
        own = [str(held["reason"])] if "reason" in held else told or ["refused"]
        own = own if held.get("refused") is True else []
        return own + [reason for value in held.values() for reason in _reasons(value)]
    if isinstance(answer, list | tuple):
        return [reason for value in cast("list[Json]", answer) for reason in _reasons(value)]
    return []


# --------------------------------------------------------------------------------------------------------------- files


def files(  # noqa: PLR0913 - what a folder consists of
    found: Evidence,
    *,
    plan: bytes,
    approvals: Sequence[tuple[str, bytes]],
    entry: Entry | None,
    pages: Mapping[str, str],
    rehearsal: bytes | None = None,
    sign: Callable[[bytes], str] | None = None,
) -> dict[str, bytes]:
    """Every file of the folder by its name below it, SHA256SUMS last.

    plan, approvals: the files as they were given, byte for byte; the approvals with the name of the approver.
    entry: the ledger entry that was committed, None when none was. pages: name of a page -> its text. rehearsal: the
    report that was carried in, as it was given. sign: bytes -> an armoured SSHSIG; None leaves the statements out.
    Raises what `sign` does.
    """
    made = {DOCUMENT: serialize(found.dump())}
    made |= {name: text.encode() for name, text in pages.items()}
    made["plan.json"] = plan
    for number, (approver, data) in enumerate(approvals, 1):
        # An approver's name is somebody else's text: it must not lead out of the folder.
        safe = re.sub(r"[^A-Za-z0-9@+-]+", "_", approver)[:60]
        made[f"approvals/{number}-{safe}.json"] = data
    if rehearsal is not None:
        made["rehearsal.json"] = rehearsal
    made["statements.sql"] = statements(found).encode()
    if entry is not None:
        made["ledger-entry.json"] = serialize(entry.dump())
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    # Backups lie there already, and may be too large to be read once more.
    sums |= {one.file: one.sha256 for one in found.backups if one.file is not None and one.sha256 is not None}
    if sign is not None:
        said = intoto.signed(intoto.statements(found, sums), sign)
        made |= said
        sums |= {name: hashlib.sha256(data).hexdigest() for name, data in said.items()}
    made[SUMS] = listing(sums)
    return made


def listing(sums: Mapping[str, str]) -> bytes:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode()


def statements(found: Outcome) -> str:
    """What was executed, in its order, as a script to read: role and time stand in comments."""
    fate = {"applied": f"committed in transaction {found.transaction_id}", "unknown": "nobody knows whether committed"}
    lines = [
        f"-- Run {found.run_id}: {fate.get(found.outcome, 'rolled back, nothing of this took effect')}.",
        f"-- {len(found.executed)} of {found.statements} statements were executed.",
    ]
    for number, statement in enumerate(found.executed, 1):
        role = f" as {statement.role}" if statement.role else ""
        lines += ["", _comment(f"{number} of {found.statements}: {statement.address}{role}, {statement.seconds:.6f} s")]
        text = statement.text.rstrip().removesuffix(";")
        # A comment at the end would swallow the semicolon.
        lines += [text, ";"] if "--" in text.rpartition("\n")[2] else [f"{text};"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """One line of a script: a name with a line end in it must not become a statement."""
    return "-- " + re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", text)


def default_name(run_id: str, now: datetime) -> str:
    """`<UTC time>-<run>`: sorts by time, and the run is the ledger's."""
    return f"{now.astimezone(UTC).strftime('%Y%m%dT%H%M%SZ')}-{run_id}"


class Folder:
    """The place of one run's evidence: taken before BEGIN, so that a place that cannot be written stops the apply."""

    def __init__(self, path: Path) -> None:
        """Take the place. Raises UsageError when it exists and is not empty, or cannot be written."""
        self.path = path
        self._made: list[Path] = []
        try:
            missing = [place for place in (path, *path.parents) if not place.exists()]
            for place in reversed(missing):
                place.mkdir(mode=0o700 if place == path else 0o777)
                self._made.append(place)
            if any(path.iterdir()):
                raise UsageError(
                    f"{path} is not empty, and evidence is never overwritten.",
                    hint="Nothing was changed. Name a directory that is empty or does not exist.",
                )
            with tempfile.TemporaryFile(dir=path) as probe:
                probe.write(b"x")
        except OSError as error:
            self.give_back()
            raise UsageError(
                f"Evidence cannot be written to {path}: {error.strerror}.",
                hint="Nothing was changed. Name another place with --evidence DIR.",
            ) from None

    def give_back(self) -> None:
        """Remove what was made for a run that did not begin."""
        for place in reversed(self._made):
            try:
                place.rmdir()
            except OSError:
                return

    def write(self, made: Mapping[str, bytes]) -> None:
        """Write every file, in the order given; the last one says that the others are there. Raises UsageError."""
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)  # somebody may have tidied up an empty folder
            for name, data in made.items():
                place = self.path / name
                place.parent.mkdir(exist_ok=True)
                # As the plan file: it holds what the plan's role could read.
                descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"The evidence in {self.path} is not complete: {error.strerror}.") from None


def complete(
    path: Path,
    found: Evidence,
    entry: Entry | None,
    pages: Mapping[str, str],
    sign: Callable[[bytes], str] | None = None,
) -> None:
    """Replace what a folder says of a run whose outcome was unknown by what is known now.

    entry, pages, sign: as in `files`; an unknown outcome has no statements yet. Everything else in the folder stays as
    it is, and so does what the run itself said, as evidence-unknown.json. The document is replaced last: until then the
    folder can be settled again. Raises UsageError.
    """
    made = {name: text.encode() for name, text in pages.items()}
    made["statements.sql"] = statements(found).encode()
    if entry is not None:
        made["ledger-entry.json"] = serialize(entry.dump())
    document = serialize(found.dump())
    try:
        made[BEFORE] = (path / DOCUMENT).read_bytes()
        listed = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
        sums = {name: value for value, name in listed}
        sums |= {name: hashlib.sha256(data).hexdigest() for name, data in [*made.items(), (DOCUMENT, document)]}
        if sign is not None:
            said = intoto.signed(intoto.statements(found, sums), sign)
            (path / intoto.FOLDER).mkdir(mode=0o700, exist_ok=True)
            made |= said
            sums |= {name: hashlib.sha256(data).hexdigest() for name, data in said.items()}
        made[SUMS] = listing(sums)
        made[DOCUMENT] = document
        for name, data in made.items():
            replace_file(path / name, data, private=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"The evidence in {path} could not be completed: {error}.") from None


def is_evidence(found: Mapping[str, Any]) -> bool:
    """Is this document the evidence of a run, not a plan or an approval?"""
    return "run_id" in found and "executed" in found


def find(run: Path, parent: Path) -> Path:
    """The folder of a run: itself, that of its evidence.json, or the one below `parent` that its id names.

    Raises UsageError when there is none, or more than one, or nothing in it.
    """
    plain = "Without its evidence, `reconciler plan` shows no changes when the run was committed, the same plan if not."
    if run.is_dir():
        if not (run / DOCUMENT).exists():
            raise UsageError(f"{run} holds no {DOCUMENT}: the run did not come to write it.", hint=plain)
        return run
    if run.name == DOCUMENT and run.is_file():
        return run.parent
    found = sorted(parent.glob(f"*-{run}")) if re.fullmatch(r"[0-9a-f-]{36}", str(run)) else []
    if len(found) != 1:
        what = f"{len(found)} folders below {parent} end in" if found else "There is no evidence folder"
        raise UsageError(
            f"{what} {run}.",
            hint=f"Name the folder that apply printed as `Evidence:`. {plain}",
        )
    return found[0]


def load(path: Path) -> Evidence:
    """The evidence of a folder or of its evidence.json. Raises UsageError, PlanDamaged."""
    file = path / DOCUMENT if path.is_dir() else path
    try:
        return Evidence.model_validate_json(canonical(read(file, "evidence")))
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanDamaged(f"{file} is no evidence: {first['loc']}: {first['msg']}.") from None
