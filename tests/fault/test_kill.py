"""An apply that is killed, or whose server is, at any moment: before or after, never between. Samples of make kill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import KIND
from tests.fault import kill

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fault.proxy import Moment

# The beginnings of statements, and on which side of them: what matters most in an apply, in its order.
MARKS = [
    ("", "before"),
    ("SELECT pg_catalog.pg_try_advisory_xact_lock", "after"),
    ("CREATE TABLE reconciler.entry", "after"),
    ('UPDATE "app"."settings"', "after"),
    ("INSERT INTO reconciler.entry", "after"),
    ("COMMIT", "before"),
    ("COMMIT", "after"),
]


@pytest.fixture(scope="module")
def shop(run_directory: Path) -> Iterator[kill.Arena]:
    with kill.arena(KIND, kill.shop, run_directory) as one:
        yield one


def is_marked(moment: Moment, text: str, when: str) -> bool:
    return moment.when == when and moment.text.lstrip().startswith(text)


def marked(moments: list[Moment]) -> list[int]:
    """The first moment of each mark, and the last moment of all."""
    found = [next(moment.number for moment in moments if is_marked(moment, *mark)) for mark in MARKS]
    return [*found, moments[-1].number]


def judged(rounds: list[kill.Round]) -> None:
    """Nothing between, nothing else wrong, and every round on the right side of COMMIT."""
    wrong = [one for one in rounds if one.found == "between" or one.wrong]
    assert wrong == []
    assert {one.found for one in rounds if one.moment.text == "COMMIT" and one.moment.when == "after"} == {"after"}
    assert {one.found for one in rounds if one.moment.text == "COMMIT" and one.moment.when == "before"} == {"before"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in ("client", "backend")), "crash"]
)
def test_the_installed_command_is_killed(shop: kill.Arena, mode: str) -> None:
    """As a user starts it, at what matters most."""
    wanted = marked(kill.count(shop))
    rounds = [done for number in wanted if (done := kill.kill(shop, mode, number)) is not None]
    assert len(rounds) >= len(MARKS)
    judged(rounds)
    assert [one.found for one in rounds[: len(MARKS)]] == ["before"] * (len(MARKS) - 1) + ["after"]


@pytest.mark.smoke
def test_what_a_crash_would_leave(shop: kill.Arena) -> None:
    """Copies of the frozen server's files, from which another server recovers."""
    left = list(MARKS)

    def wanted(moment: Moment) -> bool:
        return bool(left) and is_marked(moment, *left[0]) and left.pop(0) is not None

    rounds = kill.images(shop, wanted, lambda _: None, still=300.0)  # no proof of it looks at the clock
    assert len(rounds) == len(MARKS)
    judged(rounds)


@pytest.mark.slow
def test_phase_2_is_killed(run_directory: Path) -> None:
    """On the seed's own version, spread over all of the apply."""
    with kill.arena("16", kill.phase2, run_directory) as one:
        rounds = kill.matrix(one, kill.MODES, kill.Choice(every=110), lambda _: None)
    assert len(rounds) > 80
    assert {one.mode for one in rounds} == set(kill.MODES)
    judged(rounds)
