"""In the middle of a fleet command: one look at one member, by the functions of the single commands."""

from __future__ import annotations

import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reconciler import drift as drifting
from reconciler.errors import Interrupted, ReconcilerError
from reconciler.fleet import report
from reconciler.look import look, planned
from reconciler.model import Model, Plan
from reconciler.plan import stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from reconciler.fleet.files import Fleet, Member
    from reconciler.fleet.report import TargetResult


class Planned(Model):
    """One member's plan, and how it went. plan: None where none could be made."""

    result: report.TargetResult
    plan: Plan | None = None


def drift(
    fleet: Fleet,
    member: Member,
    *,
    fail_on: frozenset[str],
    untested: bool,
    raising: tuple[type[ReconcilerError], ...] = (),
) -> TargetResult:
    """What `drift` says of one member; an error is a result too, unless it is one of `raising`."""

    def seen() -> TargetResult:
        now = datetime.now(UTC)
        found = look(member.dsn, fleet.of(member), fail_on=fail_on, allow_untested=untested, now=now).report
        return report.of_drift(member.name, dict(member.labels), found, drifting.exit_code(found), 0.0)

    return told(member, seen, raising)


def plan(fleet: Fleet, member: Member, *, untested: bool) -> Planned:
    """What `plan` says of one member."""
    kept: list[Plan] = []

    def seen() -> TargetResult:
        now = datetime.now(UTC)
        made = planned(member.dsn, fleet.of(member), allow_untested=untested, now=now)
        kept.append(made)
        return report.of_plan(member.name, dict(member.labels), made)

    return Planned(result=told(member, seen), plan=kept[0] if kept else None)


def told(
    member: Member, seen: Callable[[], TargetResult], raising: tuple[type[ReconcilerError], ...] = ()
) -> TargetResult:
    """The result of a look with its seconds, or of the error that it raised. Raises what is one of `raising`."""
    begun = time.monotonic()
    try:
        found = seen()
    except raising:
        raise
    except Exception as error:  # noqa: BLE001 - one member never hides the others
        found = failed(member, error)
    return found.model_copy(update={"seconds": round(time.monotonic() - begun, 3)})


def failed(member: Member, error: Exception) -> TargetResult:
    """The result of an error. Of a fault of ours only the name and the place are told: it may quote anything."""
    known = error if isinstance(error, ReconcilerError) else ReconcilerError(_fault(error))
    return report.of_error(member.name, dict(member.labels), known, stamp(datetime.now(UTC)), 0.0)


def _fault(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"A fault of reconciler: {type(error).__name__}{at}."


def left(member: Member) -> TargetResult:
    """A member whose look was left under way."""
    return failed(member, Interrupted("Interrupted while it was looked at."))
