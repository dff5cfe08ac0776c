"""What `reconciler pin` does: the live definitions of everything pinned -> pins.yaml, for review. Nobody types them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from reconciler.checks.invariant import PinInvariantSpec, captured
from reconciler.errors import ServerProblem
from reconciler.plan import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Desired
    from reconciler.pg import Connection

HEAD = """# Written by `reconciler pin` from the live database: the definitions that pin invariants compare with.
# Review a change to it like any other; nobody types it.
pins:
"""


def capture(conn: Connection, desired: Desired) -> tuple[str, int]:
    """The text of pins.yaml for every pin invariant, and how many. Raises ServerProblem for a missing table."""
    parts: list[str] = []
    for check in desired.checks.values():
        if not isinstance(check.spec, PinInvariantSpec):
            continue
        lines = captured(conn, check.spec.pin)
        if absent := [line for line in lines if line.endswith("no such relation")]:
            raise ServerProblem(f"{check.address} pins what is not in this database: {absent[0]}.")
        # JSON strings are YAML strings, whatever a definition contains.
        pin = json.dumps(check.spec.pin.named(), ensure_ascii=False)
        shown = "".join(f"\n      - {json.dumps(line, ensure_ascii=False)}" for line in lines) or " []"
        parts.append(f"  {json.dumps(check.name)}:\n    pin: {pin}\n    lines:{shown}\n")
    return HEAD + "".join(parts), len(parts)


def write(path: Path, text: str) -> None:
    """Write it whole or not at all. Raises UsageError."""
    replace_file(path, text.encode(), private=False)
