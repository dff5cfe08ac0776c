"""The board of a fleet: what its page says of every target, and what nobody can make it say or do."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime
from html import unescape
from typing import Any

import pytest

from reconciler.errors import ServerProblem
from reconciler.fleet import board, report, serve
from reconciler.fleet.report import Applied, FleetReport, Moved, TargetResult
from reconciler.web import Guard, Request

NOW = datetime(2026, 5, 22, 12, 0, 0, tzinfo=UTC)
HOST = {"host": "127.0.0.1:9188"}


def target(name: str, outcome: str | None = "no_changes", **more: Any) -> TargetResult:
    codes = {"drift": 2, "violated": 3, "error": 1, "locked": 4}
    data: dict[str, Any] = {
        "name": name,
        "state": "checked" if outcome else "not_started",
        "outcome": outcome,
        "exit_code": codes.get(outcome, 0) if outcome else None,
        "checked_at": "2026-05-22T11:00:00Z" if outcome else None,
    }
    return TargetResult.model_validate({**data, **more})


def moved(address: str, sort: str = "drift", field: str | None = None) -> Moved:
    return Moved.model_validate({"address": address, "class": sort, "field": field})


def round_of(*targets: TargetResult, finished_at: str | None = "2026-05-22T11:01:00Z") -> FleetReport:
    return report.assemble(
        "drift", "shops", "r1", targets, started_at="2026-05-22T11:00:00Z", finished_at=finished_at, workers=2
    )


def test_the_worst_is_first_and_each_outcome_has_a_button() -> None:
    found = board.board(
        round_of(
            target("fine"),
            target("later", None),
            target("moved", "drift", drift=2, items=(moved("gate.a", field="value"), moved("gate.b"))),
            target("gone", "error", message="Cannot connect."),
            target("also moved", "drift", drift=1, items=(moved("gate.c"),)),
        ),
        NOW,
    )
    assert [row.name for row in found.targets] == ["gone", "also moved", "moved", "later", "fine"]
    assert [(group.word, group.count) for group in found.groups] == [
        ("error", 1),
        ("drift", 2),
        ("not started", 1),
        ("in sync", 1),
    ]
    assert (found.word, found.mood) == ("error", "bad")
    by_name = {row.name: row for row in found.targets}
    assert by_name["gone"].summary == "Cannot connect."
    assert by_name["moved"].summary == "drift: gate.a (value) and 1 more"
    assert by_name["moved"].lines == ["drift: gate.a (value)", "drift: gate.b"]
    assert (by_name["later"].age, by_name["fine"].age) == ("", "60 min ago")


def test_every_word_of_an_outcome_has_a_rank() -> None:
    words = set(report.Word.__args__) | {"already", "not_started"}
    assert {name for name, _ in board.RANKS} == words


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-05-22T12:00:05Z", "0 s ago"),
        ("2026-05-22T11:58:01Z", "119 s ago"),
        ("2026-05-22T11:58:00Z", "2 min ago"),
        ("2026-05-22T10:00:00Z", "2 h ago"),
        ("2026-05-19T12:00:00Z", "3 d ago"),
    ],
)
def test_ages(moment: str, expected: str) -> None:
    assert board.age(moment, NOW) == expected


def test_a_round_that_goes_on_says_so() -> None:
    found = board.board(round_of(target("a"), target("b", None), finished_at=None), NOW)
    assert (found.word, found.mood) == ("under way", "open")
    assert "has not ended yet" in found.round


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e"


def test_nothing_that_a_target_says_becomes_a_part_of_the_page() -> None:
    page = board.html(
        round_of(
            target(
                HOSTILE,
                "error",
                message=HOSTILE,
                labels={"region": HOSTILE},
                applied=Applied(release=HOSTILE, entry=1, at="2026-05-22T11:00:00Z"),
                violated=(HOSTILE,),
            )
        ),
        NOW,
        trouble=HOSTILE,
    )
    assert page.count("<script") == page.count("</script") == 1
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_only_the_script_of_the_page_may_run() -> None:
    page = board.html(round_of(target("a")), NOW)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert script is not None
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in unescape(policy[1])
    assert "default-src 'none'" in unescape(policy[1])
    assert not re.search(r'(src|href)="(?!data:)', page)


# ----------------------------------------------------------------------------------------------------------- served


class Reading:
    """What the source is asked: a report, or an error."""

    def __init__(self, found: FleetReport) -> None:
        self.found: FleetReport | None = found
        self.asked = 0

    def __call__(self) -> FleetReport:
        self.asked += 1
        if self.found is None:
            raise ServerProblem("Cannot connect to PostgreSQL: nobody there.")
        return self.found


def test_it_is_read_anew_now_and_then_and_stays_when_that_fails() -> None:
    reading, moment = Reading(round_of(target("a"))), [0.0]
    source = serve.Source(reading, keep=5, clock=lambda: moment[0])
    answer = serve.pages(source, Guard(None), 15)
    first = answer(Request("GET", "/", HOST))
    assert (first.code, 'data-refresh="15"' in first.text) == (200, True)
    same = {**HOST, "if-none-match": first.headers["ETag"]}
    assert answer(Request("GET", "/", same)).code == 304
    assert reading.asked == 1
    moment[0] = 5.0
    reading.found = round_of(target("b"))
    newer = answer(Request("GET", "/", same))
    assert (newer.code, '<tr data-name="b"' in newer.text) == (200, True)
    moment[0] = 10.0
    reading.found = None
    older = answer(Request("GET", "/", {**HOST, "if-none-match": newer.headers["ETag"]}))
    assert older.code == 200
    assert "Not newer than this: Cannot connect to PostgreSQL: nobody there." in older.text
    assert '<tr data-name="b"' in older.text
    assert report.FleetReport.model_validate_json(answer(Request("GET", "/report.json", HOST)).text) == source.found


def test_what_was_never_read_is_no_empty_board() -> None:
    reading = Reading(round_of())
    reading.found = None
    answer = serve.pages(serve.Source(reading, keep=5), Guard(None), 15)
    found = answer(Request("GET", "/", HOST))
    assert (found.code, found.text) == (503, "Cannot connect to PostgreSQL: nobody there.\n")


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/healthz", 200), ("GET", "/", 401), ("GET", "/report.json", 401), ("GET", "/etc/passwd", 401),
        ("POST", "/", 401), ("POST", "/login", 403), ("PUT", "/", 401),
    ],
)  # fmt: skip
def test_without_the_token_there_is_nothing_to_see(method: str, path: str, code: int) -> None:
    reading = Reading(round_of(target("a")))
    answer = serve.pages(serve.Source(reading, keep=5), Guard("a long enough token"), 15)
    found = answer(Request(method, path, HOST))
    assert (found.code, reading.asked) == (code, 0)
    mine = {"authorization": "Bearer a long enough token"}
    assert answer(Request("GET", "/", mine)).code == 200
    assert answer(Request("POST", "/", mine)).code == 405
    assert answer(Request("GET", "/more", mine)).code == 404
