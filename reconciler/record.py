"""Beside an apply: what was asked, and what it has done so far. A failed one must be told as well as a finished one."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from reconciler import __version__
from reconciler.errors import Interrupted, OutcomeUnknown
from reconciler.model import Approval, Backup, Entry, Executed, Failure, Outcome, Plan, ProofReport, Stage, Verdict, Yes
from reconciler.plan import of_kind, summarize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from reconciler.errors import ReconcilerError
    from reconciler.survey import Survey


class Progress(Protocol):
    """Told what apply is about to do: the stage, and within `execute` which of how many statements."""

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        """Called before each step."""
        ...


@dataclass(frozen=True)
class Request:
    """What an operator asks for. `target`: the -t option; `rehearsal`: a report to carry in; None when not given."""

    dsn: str | None
    plan: Plan
    approvals: Sequence[Approval]
    target: str | None = None
    initialize: bool = False
    allow_untested: bool = False
    rehearsal: ProofReport | None = None
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    settle_by: str = "reconciler settle EVIDENCE"
    """What to type when the answer to COMMIT was lost and nobody could be asked."""
    folder: Path | None = None
    """Where backups are put: the place of the evidence, which is there already."""


class Record:
    """What an apply has done so far, kept beside it: a failed one must be told as well as a finished one.

    `begun` when BEGIN was about to be sent, or a backup is there to be told of; `committing` from COMMIT until its end
    is known, `committed` when the server said so. `remark`: how that became known, when not by the answer to COMMIT.
    `doing`: the step it is at.
    """

    def __init__(self, progress: Progress) -> None:
        """`progress`: told every step as it comes; steps of one name are one stage here."""
        self.begun = False
        self.committing = False
        self.committed = False
        self.remark = ""
        self.doing = ""
        self.started_at: str | None = None
        self.finished_at: str | None = None
        self.transaction_id: str | None = None
        self.executed: list[Executed] = []
        self.backups: list[Backup] = []
        self.entry: Entry | None = None
        self.verdicts: Sequence[Verdict] = ()
        self.found: Survey | None = None
        self.surface_later: Mapping[str, str] = {}
        self._progress = progress
        self._stages: list[tuple[str, float]] = []
        self._ended: float | None = None

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        """A step begins, and the one before it is over."""
        if not self._stages or self._stages[-1][0] != stage:
            self._stages.append((stage, time.monotonic()))
        self.doing = f"{stage}: {detail}" if detail else stage
        self._progress(stage, detail, number, of)

    def end(self) -> None:
        """The last step is over."""
        self._ended = time.monotonic()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage with its seconds; none when the run ended before its first."""
        if not self._stages:
            return ()
        ends = [*(moment for _, moment in self._stages[1:]), self._ended or time.monotonic()]
        return tuple(
            Stage(name=name, seconds=round(end - begin, 6))
            for (name, begin), end in zip(self._stages, ends, strict=True)
        )

    @property
    def seconds(self) -> float:
        """From the first lock to COMMIT, or to the end of a run that had none."""
        seconds = [stage.seconds for stage in self.stages if stage.name not in {"connect", "check", "backup", "after"}]
        return round(sum(seconds), 3)

    def outcome(self, request: Request, word: str, problems: Sequence[str] = ()) -> Outcome:
        """The apply as a document."""
        plan = request.plan
        entry = self.entry if self.committed else None
        return Outcome(
            outcome=word,
            tool=f"reconciler {__version__}",
            run_id=request.run_id,
            target=plan.target if self.found is None else self.found.target,
            effect_digest=plan.effect_digest,
            entry=None if entry is None else entry.number,
            hash=None if entry is None else entry.hash,
            previous=None if entry is None else entry.previous,
            genesis=entry is not None and entry.number == 1,
            transaction_id=self.transaction_id,
            started_at=self.started_at,
            finished_at=self.finished_at,
            statements=len(plan.statements),
            seconds=self.seconds,
            stages=self.stages,
            executed=tuple(self.executed),
            backups=tuple(self.backups),
            approvals=tuple(_yes(approval) for approval in request.approvals),
            summary=summarize(plan.changes, plan.summary.drift, plan.summary.findings),
            invariants=of_kind(self.verdicts, "invariant"),
            proofs=of_kind(self.verdicts, "proof"),
            surface=of_kind(self.verdicts, "surface"),
            surface_later=dict(self.surface_later),
            findings=() if self.found is None else tuple(self.found.live.findings),
            not_compared=() if self.found is None else tuple(self.found.not_compared),
            problems=(*([self.remark] * bool(self.remark)), *problems),
        )

    def interrupted(self, request: Request) -> ReconcilerError:
        """What an interruption came to, in words that hold at whatever moment it came."""
        if self.committed:
            return Interrupted("interrupted")
        if not self.committing:
            return Interrupted()
        return OutcomeUnknown(
            f"Interrupted while COMMIT was under way; nobody can say yet what became of run {request.run_id}.",
            hint=f"Ask the server: {request.settle_by}",
        )

    def failed(self, request: Request, error: ReconcilerError) -> Outcome:
        """A run that ended with this error; everything in it was rolled back unless COMMIT had been answered."""
        self.end()
        if self.committed:
            return self.outcome(request, "applied", [f"not planned again: {error.message}"])
        why = Failure(message=error.message, details=error.details, hint=error.hint)
        return self.outcome(request, error.outcome).model_copy(update={"failure": why})


def _yes(approval: Approval) -> Yes:
    return Yes(
        id=approval.id,
        approver=approval.approver,
        reason=approval.reason,
        accepted=approval.accepted,
        attestations=approval.attestations,
        issued_at=approval.issued_at,
        expires_at=approval.expires_at,
        signed=approval.signature is not None,
        break_glass=approval.break_glass,
    )
