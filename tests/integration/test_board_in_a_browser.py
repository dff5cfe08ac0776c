"""The board of a fleet as a person uses it: with 1,000 targets, by keyboard, read aloud, and kept new by its server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from reconciler.fleet import board, report
from tests.browser import Page, chromium
from tests.unit.test_fleet_board import moved, round_of, target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reconciler.fleet.report import FleetReport

pytestmark = pytest.mark.slow

NOW = datetime(2026, 5, 22, 12, 0, 0, tzinfo=UTC)
SHOWN = "[...document.querySelectorAll('#rows tr:not([hidden])')].map(row => row.dataset.name)"
SAID = "document.getElementById('said').innerText"


def fleet(number: int) -> FleetReport:
    """So many targets: of a hundred, one is away, two are violated and seven drifted."""

    def one(at: int) -> report.TargetResult:
        labels = {"region": ("eu", "us", "ap")[at % 3]}
        name = f"shop-{at:04}"
        match at % 100:
            case 0:
                return target(name, "error", labels=labels, message=f"Cannot connect to {name}.")
            case 1 | 2:
                return target(name, "violated", labels=labels, violated=("invariant.no-cron",))
            case rest if rest < 10:
                items = tuple(moved(f"gate.queue.{part}", field="value") for part in range(rest))
                return target(name, "drift", labels=labels, drift=rest, items=items)
            case _:
                return target(name, labels=labels)

    return round_of(*(one(at) for at in range(number)))


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as found:
        found.look(width=1280, dark=False)
        yield found


def test_a_thousand_targets(tmp_path: Path, page: Page) -> None:
    file = tmp_path / "board.html"
    file.write_text(board.html(fleet(1000), NOW))
    page.open(file)
    assert (page.said, page.asked) == ([], [])
    assert page.evaluate(SAID) == "1000 targets"
    assert page.evaluate(f"{SHOWN}.length") == 1000
    # What is worst is on top, and nothing is pushed out of the window.
    assert page.evaluate(f"{SHOWN}.slice(0, 11)") == [*(f"shop-{at:04}" for at in range(0, 1000, 100)), "shop-0001"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # By keyboard alone: `/` finds the search, words are looked for in everything that a row says.
    page.key("/", "/")
    assert page.evaluate("document.activeElement.id") == "find"
    for letter in "gate.queue.8 us":
        page.key(letter, letter)
    assert page.evaluate(SHOWN) == ["shop-0109", "shop-0409", "shop-0709"]
    assert page.evaluate(SAID) == "3 of 1000 targets"
    page.evaluate("document.querySelector('#rows tr:not([hidden]) summary').focus()")
    page.key("Enter", "\r")
    assert page.evaluate("document.querySelectorAll('#rows details[open] li').length") == 9

    # What is chosen stands in the address: whoever opens that sees the same.
    chosen = page.evaluate("location.hash")
    same = tmp_path / "same.html"
    same.write_bytes(file.read_bytes())
    page.open(f"{same.as_uri()}{chosen}")
    assert page.evaluate(SAID) == "3 of 1000 targets"
    page.evaluate("document.getElementById('find').value = ''")
    page.evaluate("document.querySelector('.pick[data-outcome=violated]').click()")
    assert page.evaluate(SAID) == "20 of 1000 targets"
    assert (
        page.evaluate("document.querySelector('.pick[data-outcome=violated]').getAttribute('aria-pressed')") == "true"
    )
    page.evaluate("document.querySelector('.pick[data-outcome=violated]').click()")
    page.evaluate("document.querySelectorAll('.sort')[3].click()")
    assert page.evaluate(f"{SHOWN}[0]") == "shop-0009"
    assert page.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"
    assert page.said == []


def test_it_is_read_aloud_and_fits_a_phone(tmp_path: Path, page: Page) -> None:
    file = tmp_path / "board.html"
    file.write_text(board.html(fleet(12), NOW))
    page.open(file)
    told = page.tree()
    assert ("searchbox", "Search") in told
    assert ("button", "drift 7") in told
    assert ("rowheader", "shop-0003 region=eu") in told
    assert {name for role, name in told if role == "columnheader"} >= {"Target", "Outcome", "Checked", "Drift"}
    assert ("status", "") in told
    assert {role for role, name in told if name == "Targets"} == {"search", "region"}
    page.look(width=390, dark=True, phone=True)
    page.open(file)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_without_its_script_it_says_the_same(tmp_path: Path, page: Page) -> None:
    """Mail programs and strict policies run none: then all is shown, and nothing that would not work."""
    file = tmp_path / "board.html"
    whole = board.html(fleet(12), NOW)
    file.write_text(whole[: whole.index("<script>")] + whole[whole.index("</script>") + 9 :])
    page.open(file)
    assert page.evaluate(f"{SHOWN}.length") == 12
    assert page.evaluate("getComputedStyle(document.getElementById('controls')).display") == "none"
    assert page.evaluate("document.querySelector('#rows time').innerText") == "60 min ago"


def test_served_it_keeps_itself_new(tmp_path: Path, page: Page) -> None:
    file = tmp_path / "drift.json"
    token = tmp_path / "token"
    token.write_text("a token that is long enough\n")

    def written(found: FleetReport) -> None:
        (tmp_path / "new").write_text(found.model_dump_json(by_alias=True))
        (tmp_path / "new").replace(file)

    written(fleet(12))
    words = ["serve", file, "--listen", "127.0.0.1:0", "--refresh", "1s", "--token-file", token]
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    with subprocess.Popen([program, *words], stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split(" at ")[1].split(" ")[0]
        page.open(address)
        page.evaluate("document.getElementById('token').value = 'a token that is long enough'")
        page.evaluate("document.querySelector('form').submit()")
        assert page.until(SAID) == "12 targets"
        page.evaluate("document.querySelector('.pick[data-outcome=error]').click()")
        assert page.evaluate(SHOWN) == ["shop-0000"]
        changed = json.loads(file.read_text())
        changed["targets"][5] |= {"outcome": "error", "exit_code": 1, "message": "Cannot connect."}
        written(report.FleetReport.model_validate_json(json.dumps(changed)))
        assert page.until(f"{SHOWN}.length === 2 && {SHOWN}") == ["shop-0000", "shop-0005"]
        file.write_text("no report")
        assert "is no report of a fleet" in page.until("document.querySelector('#head p.bad')?.innerText")
        assert page.evaluate(SHOWN) == ["shop-0000", "shop-0005"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
