"""Beside an apply: what a run leaves, written when its end is known. Nothing that goes wrong here changes that end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler import evidence, signatures
from reconciler.errors import ReconcilerError, UsageError
from reconciler.render import html, markdown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from reconciler.evidence import Folder
    from reconciler.model import Entry, Outcome, Plan


@dataclass(frozen=True)
class Kept:
    """What a run leaves: the folder, and what was given to it, byte for byte. written: is told when it is there."""

    folder: Folder
    plan: Plan
    checksum: str
    plan_bytes: bytes
    approvals: list[tuple[str, bytes]]
    rehearsal: bytes | None
    sign: Callable[[bytes], str] | None
    written: Callable[[], None]

    def write(self, done: Outcome, entry: Entry | None) -> list[str]:
        """Write the evidence; problems are returned, because after COMMIT nothing changes the outcome."""
        problems: list[str] = []
        try:
            told = evidence.document(done, self.plan, self.checksum)
            pages = {"report.md": markdown.evidence(told), "report.html": html.evidence(told)}

            def files(sign: Callable[[bytes], str] | None) -> dict[str, bytes]:
                return evidence.files(
                    told,
                    plan=self.plan_bytes,
                    approvals=self.approvals,
                    entry=entry,
                    pages=pages,
                    rehearsal=self.rehearsal,
                    sign=sign,
                )

            try:
                made = files(self.sign)
            except ReconcilerError as error:
                problems.append(f"the evidence is not signed: {error.message}")
                made = files(None)
            self.folder.write(made)
        except KeyboardInterrupt:
            return [f"interrupted while evidence was written to {self.folder.path}"]
        except ReconcilerError as error:
            return [error.message]
        except Exception as error:  # noqa: BLE001 - the change stands, whatever goes wrong in telling it
            return [f"evidence could not be written to {self.folder.path}: {type(error).__name__}: {error}"]
        self.written()
        return problems


def signing(key: Path | None) -> Callable[[bytes], str] | None:
    """What signs the statements of a run. A key that is not there stops an apply before it begins: UsageError."""
    if key is None:
        return None
    if not key.is_file():
        raise UsageError(f"There is no key {key}.", hint="Name a private key, or a public one that the agent holds.")
    return lambda message: signatures.sign(message, key, signatures.EVIDENCE)
