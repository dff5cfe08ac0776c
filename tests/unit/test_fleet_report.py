"""The document of a round over a fleet: the worst of all, written and read again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.errors import PlanDamaged, UsageError
from reconciler.fleet import report
from reconciler.render.text import as_json

if TYPE_CHECKING:
    from pathlib import Path


def one(name: str, outcome: str | None, code: int | None, **more: Any) -> report.TargetResult:
    state = "not_started" if outcome is None else "checked"
    given = {"name": name, "state": state, "outcome": outcome, "exit_code": code, **more}
    return report.TargetResult.model_validate(given)


def of(*results: report.TargetResult) -> report.FleetReport:
    return report.assemble(
        "drift", "shops", "round-1", results, started_at="2026-05-22T12:00:00Z", finished_at=None, workers=2
    )


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 2], 2),
        ([2, 3], 3),
        ([3, 4, 2], 4),
        ([4, 1, 3], 1),
        ([1, 5, 4], 5),
    ],
)
def test_the_exit_code_is_the_worst_of_all(codes: list[int], worst: int) -> None:
    words = {0: "no_changes", 1: "error", 2: "drift", 3: "violated", 4: "locked", 5: "unknown"}
    found = of(*(one(f"t{number}", words[code], code) for number, code in enumerate(codes)), one("later", None, None))
    assert (found.exit_code, found.outcome) == (worst, words[worst])


def test_a_round_that_applied_something_says_so() -> None:
    assert of(one("a", "no_changes", 0), one("b", "applied", 0)).outcome == "applied"


def test_an_interrupted_round_is_no_success() -> None:
    found = report.assemble(
        "drift",
        "shops",
        "r",
        [one("a", "no_changes", 0)],
        started_at="2026-05-22T12:00:00Z",
        finished_at="2026-05-22T12:00:01Z",
        workers=1,
        interrupted=True,
    )
    assert (found.outcome, found.exit_code) == ("error", 1)


def test_a_report_is_read_again(tmp_path: Path) -> None:
    moved = report.Moved.model_validate({"address": "gate.a", "class": "drift", "field": "value"})
    found = of(one("a", "drift", 2, drift=1, items=(moved,), labels={"region": "eu"}), one("b", None, None))
    file = tmp_path / "fleet.json"
    file.write_text(as_json(found.dump()))
    assert json.loads(file.read_text())["targets"][0]["items"] == [
        {"address": "gate.a", "class": "drift", "field": "value"}
    ]
    assert report.load(file) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": "2.0"}', '{"format_version": "1.0"}', "[" * 9999])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(text)
    with pytest.raises(PlanDamaged):
        report.load(file)
    with pytest.raises(UsageError):
        report.load(tmp_path / "nowhere.json")
