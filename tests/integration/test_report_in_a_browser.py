"""report.html as a person opens it: in a light and a dark theme, on a wide screen, on a phone and on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import Page, chromium
from tests.integration.phase2 import Phase2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Database

pytestmark = pytest.mark.slow

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"width": 1200, "dark": False},
    "dark": {"width": 1200, "dark": True},
    "phone": {"width": 390, "dark": False, "phone": True},
    "dark phone": {"width": 390, "dark": True, "phone": True},
    "paper": {"width": 794, "dark": False, "paper": True},
}
CUT_OFF = """
[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)
    .map(box => box.getAttribute('aria-label'))
"""
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
PUSHED = """
(() => { const box = [...document.querySelectorAll('.scroll')].find(box => box.scrollWidth > box.clientWidth + 50);
         box.scrollLeft = 50;
         const cell = box.querySelector('tbody th').getBoundingClientRect();
         return [box.scrollLeft, Math.round(cell.left - box.getBoundingClientRect().left)]; })()
"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as found:
        yield found


def test_both_reports_in_every_look(dieu45: Database, tmp_path: Path, page: Page) -> None:
    phase2 = Phase2(dieu45, tmp_path)
    phase2.approve()
    body = phase2.state / "functions/fn_job_reap_stale_leases_apply.sql"
    text = body.read_text()
    body.write_text(text.replace("v_attempts < v_job.max_attempts", "v_attempts <= v_job.max_attempts"))
    phase2.approve()
    phase2.apply("--evidence", tmp_path / "rolled back", code=3)
    body.write_text(text)
    phase2.approve()
    phase2.apply("--evidence", tmp_path / "applied")

    colours: dict[str, Any] = {}
    for outcome in ("applied", "rolled back"):
        for name, look in LOOKS.items():
            page.look(**look)
            page.open(tmp_path / outcome / "report.html")
            assert page.evaluate("document.querySelector('.mood').innerText") == outcome
            # It says nothing, asks for nothing, and runs nothing.
            assert (page.said, page.asked, page.evaluate("document.scripts.length")) == ([], [], 0)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            if look["width"] > 700:
                assert page.evaluate(CUT_OFF) == [], name
            colours[name] = page.evaluate(COLOURS)
    assert colours["light"] == colours["phone"] != colours["dark"] == colours["dark phone"]
    assert colours["paper"] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]

    # On a phone a wide table is pushed aside in its box, and what a row is about stays.
    page.look(**LOOKS["phone"])
    page.open(tmp_path / "applied" / "report.html")
    assert page.evaluate(PUSHED) == [50, 1]
    picture = tmp_path / "picture.png"
    page.picture(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_browser_would_tell(tmp_path: Path, page: Page) -> None:
    """What the test above relies on: a page that says and asks something is noticed."""
    loud = tmp_path / "loud.html"
    loud.write_text("<img src=https://example.org/x.png><script>console.log('here'); undefined_name()</script>")
    page.look(**LOOKS["light"])
    page.open(loud)
    assert page.asked == ["https://example.org/x.png"]
    # What the page says itself and what the browser says of the address come in an order of their own.
    assert "['here']" in page.said
    assert any("undefined_name" in line for line in page.said)
