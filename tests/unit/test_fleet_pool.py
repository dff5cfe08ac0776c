"""The threads of a fleet command: bounded, in order, stopped by a failure, and by Ctrl-C once or twice."""

from __future__ import annotations

import threading

import pytest

from reconciler.fleet import pool
from reconciler.fleet.files import Member
from reconciler.fleet.report import TargetResult

MEMBERS = [Member(f"shop-{number}", "", {"number": str(number)}) for number in range(1, 9)]
NAMES = [member.name for member in MEMBERS]


def nothing(_under_way: int) -> None:
    """Nobody pressed Ctrl-C."""


def ignored(_member: Member, _result: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_everybody_once_and_never_more_at_a_time(workers: int) -> None:
    lock = threading.Lock()
    now: list[str] = []
    most: list[int] = []
    seen: list[str] = []

    def work(member: Member) -> str:
        with lock:
            now.append(member.name)
            most.append(len(now))
            seen.append(member.name)
        with lock:
            now.remove(member.name)
        return member.name.upper()

    done = pool.run(MEMBERS, work, workers=workers, told=ignored, warned=nothing)
    assert done.results == {name: name.upper() for name in NAMES}
    assert sorted(seen) == NAMES
    assert max(most) <= workers
    if workers == 1:
        assert seen == NAMES
    assert not done.interrupted


def test_after_a_failure_nobody_begins() -> None:
    done = pool.run(
        MEMBERS,
        lambda member: member.name,
        workers=1,
        told=ignored,
        warned=nothing,
        stops=lambda name: name == "shop-3",
    )
    assert list(done.results) == NAMES[:3]


def test_what_was_under_way_ends_after_a_failure() -> None:
    third_began, second_told = threading.Event(), threading.Event()

    def work(member: Member) -> str:
        if member.name == "shop-2":
            assert third_began.wait(10)
        if member.name == "shop-3":
            third_began.set()
            assert second_told.wait(10)
        return member.name

    def told(member: Member, _result: str) -> None:
        if member.name == "shop-2":
            second_told.set()

    stops = "shop-2".__eq__
    done = pool.run(MEMBERS, work, workers=2, told=told, warned=nothing, stops=stops)
    assert set(done.results) == {"shop-1", "shop-2", "shop-3"}


def test_ctrl_c_lets_what_is_under_way_end() -> None:
    go = threading.Event()
    warnings: list[int] = []

    def work(member: Member) -> str:
        if member.name == "shop-2":
            assert go.wait(10)
        return member.name

    def told(member: Member, _result: str) -> None:
        if member.name == "shop-1":
            raise KeyboardInterrupt

    def warned(under_way: int) -> None:
        warnings.append(under_way)
        go.set()

    done = pool.run(MEMBERS[:2], work, workers=2, told=told, warned=warned)
    assert done.interrupted
    assert done.left == []
    assert set(done.results) >= {"shop-1"}
    assert len(warnings) == 1


def test_ctrl_c_twice_leaves_what_is_under_way() -> None:
    began, end = threading.Event(), threading.Event()

    def work(member: Member) -> str:
        if member.name == "shop-3":
            began.set()
            end.wait(10)
        return member.name

    def told(_member: Member, _result: str) -> None:
        assert began.wait(10)
        raise KeyboardInterrupt

    # Three threads: the first two answer, and at each answer somebody presses Ctrl-C.
    done = pool.run(MEMBERS[:3], work, workers=3, told=told, warned=nothing)
    end.set()
    assert done.interrupted
    assert done.left == ["shop-3"]


def test_results_stand_in_the_order_of_the_file() -> None:
    done: pool.Done[TargetResult] = pool.Done()
    done.results["shop-3"] = TargetResult(name="shop-3", state="checked", outcome="drift", exit_code=2)
    found = pool.in_order(MEMBERS[:3], done, {"shop-1": 1, "shop-2": 1, "shop-3": 2})
    assert [(one.name, one.state, one.wave) for one in found] == [
        ("shop-1", "not_started", 1),
        ("shop-2", "not_started", 1),
        ("shop-3", "checked", 2),
    ]
    assert found[0].labels == {"number": "1"}
