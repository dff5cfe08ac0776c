"""Last edge of a fleet's report: the board, one HTML file that needs no server; with one, it keeps itself new.

The table is written here, row by row, and says everything without its script, which sorts, searches and hides.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Literal

from reconciler.fleet import text
from reconciler.render.html import template
from reconciler.render.text import count

if TYPE_CHECKING:
    from reconciler.fleet.report import FleetReport, TargetResult

Strength = Literal["good", "bad", "weak"]

RANKS: tuple[tuple[str, Strength], ...] = (
    ("unknown", "bad"), ("error", "bad"), ("proof_failed", "bad"), ("violated", "bad"), ("drift", "bad"),
    ("stale", "weak"), ("not_approved", "weak"), ("locked", "weak"), ("changes", "weak"), ("not_started", "weak"),
    ("already", "good"), ("applied", "good"), ("no_changes", "good"),
)  # fmt: skip
"""What a target can be, the worst first, and how strongly it is shown."""

WORDS = {"no_changes": "in sync", "already": "already applied"}
"""What is not said as it is written."""

COLUMNS = (
    ("Target", "text"), ("Outcome", "rank"), ("Checked", "text"), ("Drift", "number"), ("Violated", "number"),
    ("Findings", "number"), ("Last applied", "text"), ("What", ""),
)  # fmt: skip
"""Heads, and how a column is sorted; empty: it is not."""


@dataclass(frozen=True)
class Row:
    """One target, in words."""

    name: str
    labels: list[str]
    key: str
    rank: int
    word: str
    strength: Strength
    checked_at: str
    age: str
    drift: int
    violated: int
    findings: int
    applied: str
    applied_at: str
    summary: str
    lines: list[str]


@dataclass(frozen=True)
class Group:
    """The targets of one outcome: a button that shows only these."""

    key: str
    word: str
    strength: Strength
    count: int


@dataclass(frozen=True)
class Board:
    """Everything the page says."""

    fleet: str
    word: str
    mood: Literal["good", "bad", "open"]
    round: str
    trouble: str
    groups: list[Group]
    targets: list[Row]
    columns: tuple[tuple[str, str], ...] = COLUMNS


def html(found: FleetReport, now: datetime, *, refresh: int = 0, trouble: str = "") -> str:
    """The page. now: what ages are told by until the script looks at its own clock.

    refresh: seconds after which the page asks its server again; 0: there is none. trouble: why it is not newer.
    """
    return template("board.html.j2").render(
        board=board(found, now, trouble), refresh=refresh, script_digest=_script_digest()
    )


def board(found: FleetReport, now: datetime, trouble: str = "") -> Board:
    """The report in words, the worst target first. Pure."""
    rows = sorted((_row(one, now) for one in found.targets), key=lambda row: (row.rank, row.name))
    counted = {row.key: [other for other in rows if other.key == row.key] for row in rows}
    groups = [Group(key, same[0].word, same[0].strength, len(same)) for key, same in counted.items()]
    key = "changes" if found.finished_at is None else found.outcome
    strength = dict(RANKS)[key]
    return Board(
        fleet=found.fleet,
        word="under way" if found.finished_at is None else _word(key),
        mood="open" if strength == "weak" else strength,
        round=_round(found),
        trouble=trouble,
        groups=groups,
        targets=rows,
    )


def age(moment: str, now: datetime) -> str:
    """How long ago that was, in the largest unit of which there are two."""
    seconds = max(0, int((now - datetime.fromisoformat(moment)).total_seconds()))
    unit, size = next(
        ((name, size) for name, size in (("d", 86400), ("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1)
    )
    return f"{seconds // size} {unit} ago"


def _round(found: FleetReport) -> str:
    what = f"Round {found.round}: {found.command} of {count(len(found.targets), 'target')}"
    end = "has not ended yet" if found.finished_at is None else f"ended {found.finished_at}"
    return f"{what}, began {found.started_at}, {end}{', interrupted' if found.interrupted else ''}."


def _row(one: TargetResult, now: datetime) -> Row:
    key = one.state if one.state in {"already", "not_started"} else one.outcome or "not_started"
    rank = [name for name, _ in RANKS].index(key)
    moved = [f"{item.item_class.replace('_', ' ')}: {text.moved(item)}" for item in one.items]
    shown = {item.address for item in one.items}
    lines = [
        *([one.message] if one.message else []),
        *moved,
        *(f"violated: {address}" for address in one.violated if address not in shown),
        *(f"not judged: {address}" for address in one.not_judged if address not in shown),
    ]
    wave = [] if one.wave is None else [f"wave {one.wave}"]
    return Row(
        name=one.name,
        labels=[*(f"{name}={value}" for name, value in sorted(one.labels.items())), *wave],
        key=key,
        rank=rank,
        word=_word(key),
        strength=RANKS[rank][1],
        checked_at=one.checked_at or "",
        age=age(one.checked_at, now) if one.checked_at else "",
        drift=one.drift,
        violated=len(one.violated),
        findings=one.findings,
        applied=f"{one.applied.release}, entry {one.applied.entry}" if one.applied else "never",
        applied_at=one.applied.at if one.applied else "",
        summary=_summary(one, lines),
        lines=lines if len(lines) > 1 or any(len(line) > LONG for line in lines) else [],
    )


LONG = 90
"""Characters of one line that a row shows without being opened."""


def _summary(one: TargetResult, lines: list[str]) -> str:
    if one.summary is not None and one.state == "planned" and one.outcome != "no_changes":
        numbers = one.summary
        return f"{numbers.add} to add, {numbers.change} to change, {numbers.remove} to remove"
    if not lines:
        return ""
    first = lines[0] if len(lines[0]) <= LONG else f"{lines[0][:LONG]}…"
    return first if len(lines) == 1 else f"{first} and {len(lines) - 1} more"


def _word(key: str) -> str:
    return WORDS.get(key, key.replace("_", " "))


@cache
def _script_digest() -> str:
    """Of what the page's own policy allows to run, and nothing else."""
    return base64.b64encode(hashlib.sha256(template("board.js").render().encode()).digest()).decode()
