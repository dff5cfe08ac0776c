"""The error tree: every way a command can fail. Raised anywhere, printed and turned into an exit code only by `cli`.

ReconcilerError                1  error
├── InputError                 1  every problem of the files, at once
├── UsageError                 1  flags or files that do not fit together
├── PlanDamaged                1  a plan or approval file that is not what was written
├── ServerProblem              1  cannot connect, untested server, a statement failed
│   ├── MissingPrivilege       1
│   └── Unreachable            1  nobody answers, or not any more
├── SandboxError               1  the embedded server
├── MissingProgram             1  pg_dump, of no use or not there
├── BackupFailed               1  no backup, so nothing was begun
├── Interrupted                1  Ctrl-C or a polite kill, before COMMIT
├── Violated                   3  an invariant is violated or could not be judged
│   └── ProofFailed            3  nothing but proofs stands in the way
├── Refused                    4  what is there does not allow what was asked
│   ├── Stale                  4
│   ├── NotApproved            4
│   └── Locked                 4
│       └── AnotherApply       4
└── OutcomeUnknown             5  the connection was lost in COMMIT
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reconciler.model import Verdict


class Problem(NamedTuple):
    """One thing wrong with one place of an input. `line` and `column` count from 1; None where there is none."""

    file: str
    line: int | None
    column: int | None
    message: str

    def __str__(self) -> str:
        """`file:line:column: message`, without the parts that are not known."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return f"{place}: {self.message}" if place else self.message


class ReconcilerError(Exception):
    """Something went wrong."""

    exit_code: ClassVar[int] = 1
    outcome: ClassVar[str] = "error"

    def __init__(self, message: str = "", *, hint: str = "", details: Sequence[str] = ()) -> None:
        """`message` says what happened to which object, `hint` what to do next, `details` one line each."""
        self.message = message or (self.__doc__ or "").strip()
        self.hint = hint
        self.details = tuple(details)
        super().__init__(self.message)


class InputError(ReconcilerError):
    """The state directory has problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """`problems`: all of them, in order of file and line."""
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(
            f"{count} problem{'' if count == 1 else 's'} in the input.",
            details=[str(problem) for problem in self.problems],
        )


class UsageError(ReconcilerError):
    """The command was called in a way that cannot work."""


class PlanDamaged(ReconcilerError):
    """The file is not what reconciler wrote."""


class ServerProblem(ReconcilerError):
    """PostgreSQL refused."""


class MissingPrivilege(ServerProblem):
    """The role may not do this."""


class Unreachable(ServerProblem):
    """There is no connection to PostgreSQL; later there may be one."""


class SandboxError(ReconcilerError):
    """The sandbox could not be started or loaded."""


class MissingProgram(ReconcilerError):
    """A program of PostgreSQL is missing, or too old for the server."""


class BackupFailed(ReconcilerError):
    """The backup could not be made, or cannot be trusted."""


class Violated(ReconcilerError):
    """An invariant is violated or could not be judged."""

    exit_code = 3
    outcome = "violated"

    def __init__(
        self, message: str = "", *, hint: str = "", details: Sequence[str] = (), verdicts: Sequence[Verdict] = ()
    ) -> None:
        """`verdicts`: those that blocked."""
        super().__init__(message, hint=hint, details=details)
        self.verdicts = tuple(verdicts)


class ProofFailed(Violated):
    """A proof failed or could not be played."""

    outcome = "proof_failed"


class Interrupted(ReconcilerError):
    """Interrupted: nothing was changed."""


class Refused(ReconcilerError):
    """The live database does not allow this change."""

    exit_code = 4
    outcome = "stale"


class Stale(Refused):
    """The plan is stale: what is there now is not what was approved."""


class NotApproved(Refused):
    """The plan is not approved."""

    outcome = "not_approved"


class Locked(Refused):
    """Somebody else holds what this apply needs."""

    outcome = "locked"


class AnotherApply(Locked):
    """Another apply of the same name is running."""


class OutcomeUnknown(ReconcilerError):
    """The connection was lost while COMMIT was under way."""

    exit_code = 5
    outcome = "unknown"
