"""Last step of a fleet command: what became of every target, as one document that programs read and boards show.

A report never holds a connection string: a target is known by its name.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, ValidationError

from reconciler import __version__
from reconciler.errors import PlanDamaged, UsageError
from reconciler.model import Address, DriftClass, Model, Moment, Summary
from reconciler.plan import MAX_FILE, stamp

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reconciler.drift import DriftReport
    from reconciler.errors import ReconcilerError
    from reconciler.model import Plan

FORMAT_VERSION = "1.0"

Word: TypeAlias = Literal[
    "no_changes",
    "changes",
    "applied",
    "drift",
    "violated",
    "proof_failed",
    "stale",
    "not_approved",
    "locked",
    "unknown",
    "error",
]
"""The outcomes of DESIGN 5, one for every command."""

State: TypeAlias = Literal["checked", "planned", "applied", "already", "failed", "not_started"]
"""What was done with a target: looked at (drift), planned, applied now, applied by an earlier run, failed (of an
apply), or nothing: the round was stopped before it, or has not come to it yet."""

WORST_FIRST = (5, 1, 4, 3, 2, 0)
"""Exit codes, as they outdo each other (DESIGN 5)."""

MOST_ITEMS = 50
"""Items that a result lists; `drift` counts them all."""


class Moved(Model):
    """One thing that moved. `field`: which part of the object, a line for each; None when it is the whole object."""

    address: Address
    item_class: DriftClass = Field(alias="class")
    field: str | None = None


class Applied(Model):
    """The last entry of a target's ledger."""

    release: str
    entry: int
    at: Moment


class TargetResult(Model):
    """What became of one target.

    outcome and exit_code: as the same command would have had for this target alone; None when it was not started.
    checked_at: when it was looked at, by the clock of the machine that looked; None when nobody did. How old that is
    is for the reader to work out. seconds: how long it took. wave: from 1; None where there are no waves.
    drift: items of the classes drift, both and moved_pin. items: what moved, is pending or was found, at most
    MOST_ITEMS lines. findings: how many. violated and not_judged: addresses of checks. message: of an error, one
    sentence, without a connection string. summary and group: of a plan; targets of one group take one approval.
    """

    name: str
    labels: dict[str, str] = {}
    state: State
    outcome: Word | None = None
    exit_code: int | None = None
    checked_at: Moment | None = None
    seconds: float = 0.0
    wave: int | None = None
    drift: int = 0
    items: tuple[Moved, ...] = ()
    findings: int = 0
    violated: tuple[Address, ...] = ()
    not_judged: tuple[Address, ...] = ()
    message: str = ""
    applied: Applied | None = None
    summary: Summary | None = None
    group: str | None = None


class FleetReport(Model):
    """One round over a fleet.

    round: its id. finished_at: None while it goes on. outcome and exit_code: the worst of all targets; of a round that
    was interrupted, or goes on, the worst so far. targets: in the order of the fleet's file.
    """

    format_version: str = FORMAT_VERSION
    tool: str = f"reconciler {__version__}"
    command: Literal["drift", "plan", "apply"]
    fleet: str
    round: str
    started_at: Moment
    finished_at: Moment | None
    interrupted: bool = False
    outcome: Word
    exit_code: int
    workers: int = Field(ge=0)
    seconds: float = 0.0
    targets: tuple[TargetResult, ...]


def worst(results: Sequence[TargetResult]) -> tuple[Word, int]:
    """Outcome and exit code of a whole round; `no_changes` and 0 where nothing was done or found."""
    code = max((one.exit_code or 0 for one in results), key=lambda found: -WORST_FIRST.index(found), default=0)
    for one in results:
        # Among those of one exit code, the one that says that something is or was to be done.
        if one.exit_code == code and one.outcome is not None and one.outcome != "no_changes":
            return one.outcome, code
    return "no_changes", code


def of_drift(name: str, labels: dict[str, str], found: DriftReport, exit_code: int, seconds: float) -> TargetResult:
    """A drift report of one target, short."""
    lines = [
        Moved.model_validate({"address": item.address, "class": item.item_class, "field": field})
        for item in found.items
        for field in ([one.name for one in item.fields] or [None])
    ]
    applied = found.last_applied
    return TargetResult.model_validate(
        {
            "name": name,
            "labels": labels,
            "state": "checked",
            "outcome": found.outcome,
            "exit_code": exit_code,
            "checked_at": found.checked_at,
            "seconds": round(seconds, 3),
            "drift": sum(item.item_class in {"drift", "both", "moved_pin"} for item in found.items),
            "items": tuple(lines[:MOST_ITEMS]),
            "findings": len(found.findings),
            "violated": tuple(one.address for one in found.items if one.item_class in {"violated", "moved_pin"}),
            "not_judged": tuple(one.address for one in found.items if one.item_class == "not_judged"),
            "applied": None
            if applied is None
            else Applied(
                release=applied["release"],
                entry=applied["entry"],
                at=stamp(datetime.fromisoformat(applied["recorded_at"])),
            ),
        }
    )


def of_plan(name: str, labels: dict[str, str], made: Plan) -> TargetResult:
    """A plan of one target, short. Exit code 3 where a check blocks it, else 0."""
    return TargetResult.model_validate(
        {
            "name": name,
            "labels": labels,
            "state": "planned",
            "outcome": made.outcome,
            "exit_code": 3 if made.blocking else 0,
            "checked_at": made.created_at,
            "drift": made.summary.drift,
            "findings": len(made.findings),
            "violated": tuple(one.address for one in made.blocking if one.status != "not_judged"),
            "not_judged": tuple(one.address for one in made.blocking if one.status == "not_judged"),
            "summary": made.summary,
            "group": made.effects_digest if made.has_changes and not made.blocking else None,
        }
    )


def of_error(name: str, labels: dict[str, str], error: ReconcilerError, now: str, seconds: float) -> TargetResult:
    """A target that could not be looked at."""
    return TargetResult.model_validate(
        {
            "name": name,
            "labels": labels,
            "state": "checked",
            "outcome": error.outcome,
            "exit_code": error.exit_code,
            "checked_at": now,
            "seconds": round(seconds, 3),
            "message": error.message,
        }
    )


def assemble(  # noqa: PLR0913 - what a round consists of
    command: Literal["drift", "plan", "apply"],
    fleet: str,
    round_id: str,
    results: Sequence[TargetResult],
    *,
    started_at: str,
    finished_at: str | None,
    workers: int,
    seconds: float = 0.0,
    interrupted: bool = False,
) -> FleetReport:
    """The report of a round. workers: 0 where nobody counted them."""
    outcome, code = worst(results)
    if interrupted and code == 0:
        outcome, code = "error", 1
    return FleetReport(
        command=command,
        fleet=fleet,
        round=round_id,
        started_at=started_at,
        finished_at=finished_at,
        interrupted=interrupted,
        outcome=outcome,
        exit_code=code,
        workers=workers,
        seconds=round(seconds, 3),
        targets=tuple(results),
    )


def load(path: Path) -> FleetReport:
    """A report from a file that `--format json` wrote. Raises UsageError, PlanDamaged."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise PlanDamaged(f"{path} is larger than {MAX_FILE // 1024**2} MiB; no report of a fleet is.")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the report {path}: {error.strerror}.") from None
    try:
        version = json.loads(data).get("format_version", "")
    except (ValueError, AttributeError, RecursionError):
        raise PlanDamaged(f"{path} is no report of a fleet.") from None
    if str(version).partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise PlanDamaged(
            f"{path} has format {version}; this version reads {FORMAT_VERSION}.",
            hint="Make it again, or use the reconciler that made it.",
        )
    try:
        return FleetReport.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanDamaged(f"{path} is no report of a fleet: {place}: {first['msg']}.") from None
