"""The loop: when its rounds begin, what it says of lost ones, how it ends; and the two pages for who asks by HTTP."""

from __future__ import annotations

import http.client
import threading
from typing import TYPE_CHECKING

import pytest

from reconciler import watch, web
from reconciler.errors import ReconcilerError, ServerProblem, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


class Time:
    """A clock that moves only when somebody waits or works."""

    def __init__(self, rounds: int, work: Callable[[int], float] = lambda _: 0.0) -> None:
        self.now = 1000.0
        self.begun: list[float] = []
        self.work = work
        self.rounds = rounds
        self.failures: list[str] = []
        self.missed: list[int] = []

    def round(self) -> None:
        self.begun.append(self.now - 1000)
        self.now += self.work(len(self.begun))

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return len(self.begun) >= self.rounds

    def loop(self, every: float, round: Callable[[], None] | None = None) -> watch.Loop:  # noqa: A002 - its own word
        def failed(error: ReconcilerError) -> None:
            self.failures.append(error.message)

        return watch.Loop(
            every, round or self.round, failed, self.missed.append, clock=lambda: self.now, wait=self.wait
        )


def test_rounds_begin_at_multiples_of_the_interval_however_long_they_take() -> None:
    time = Time(5, lambda number: 10.0 + number)
    time.loop(60).run()
    assert time.begun == [0, 60, 120, 180, 240]
    assert time.missed == []


def test_a_round_that_takes_too_long_skips_the_moments_it_missed() -> None:
    time = Time(4, lambda number: 150.0 if number == 2 else 1.0)
    loop = time.loop(60)
    loop.run()
    assert time.begun == [0, 60, 240, 300]
    assert (time.missed, loop.skipped, loop.rounds) == ([2], 2, 4)


def test_a_wait_that_ends_early_is_no_missed_round() -> None:
    time = Time(3)
    loop = time.loop(60)
    loop.wait = lambda seconds: time.wait(seconds - 1)
    loop.run()
    assert (time.begun, time.missed) == ([0, 59, 119], [])


def test_a_round_that_cannot_look_does_not_end_the_loop() -> None:
    time = Time(4)

    def round() -> None:  # noqa: A001 - its own word
        time.round()
        if len(time.begun) in {2, 3}:
            raise ServerProblem("the server is away")

    loop = time.loop(60, round)
    loop.run()
    assert time.begun == [0, 60, 120, 180]
    assert (time.failures, loop.failures) == (["the server is away"] * 2, 2)


def test_what_is_no_error_of_ours_is_not_swallowed() -> None:
    time = Time(3)

    def round() -> None:  # noqa: A001 - its own word
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time.loop(60, round).run()


@pytest.mark.parametrize("where", ["round", "wait"])
def test_an_interruption_ends_it(where: str) -> None:
    time = Time(3)

    def interrupted(_: float = 0) -> bool:
        raise KeyboardInterrupt

    loop = time.loop(60, interrupted if where == "round" else time.round)  # pyright: ignore[reportArgumentType]
    loop.wait = interrupted
    loop.run()
    assert loop.stop.is_set()
    assert loop.rounds == 1


def test_it_waits_on_an_event_that_anybody_may_set() -> None:
    begun = threading.Event()
    loop = watch.Loop(3600, begun.set, lambda _: None, lambda _: None)
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert begun.wait(30)
    loop.stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert loop.rounds == 1


def test_alive_while_rounds_end() -> None:
    time = Time(1)
    loop = time.loop(60)
    loop.run()
    time.now = (loop.finished_at or 0) + 179
    assert loop.alive
    assert loop.health == (True, "ok")
    time.now += 2
    assert loop.health == (False, "no round has ended for too long")


def test_rounds_that_cannot_look_are_told_and_no_reason_to_start_anew() -> None:
    time = Time(5)
    told: list[tuple[bool, str]] = []

    def round() -> None:  # noqa: A001 - its own word
        told.append(loop.health)
        time.round()
        if len(time.begun) in {2, 3}:
            raise ServerProblem("the server is away")

    loop = time.loop(60, round)
    loop.run()
    words = [
        "ok",
        "ok",
        "ok, but nobody could look in the last 1 round",
        "ok, but nobody could look in the last 2 rounds",
    ]
    assert told == [(True, text) for text in (*words, "ok")]


# ----------------------------------------------------------------------------------------------------------------- HTTP


def asked(place: tuple[str, int], path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(*place, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type") or "", answer.read().decode()
    finally:
        connection.close()


def test_two_pages_and_nothing_else() -> None:
    state = {"alive": True, "metrics": "a 1\n"}

    def health() -> tuple[bool, str]:
        return bool(state["alive"]), "some words"

    with web.serving(("127.0.0.1", 0), watch.pages(lambda: str(state["metrics"]), health)) as place:
        assert asked(place, "/metrics") == (200, "text/plain; version=0.0.4; charset=utf-8", "a 1\n")
        assert asked(place, "/metrics?x=1")[0] == 200
        state["metrics"] = "a 2 é\n"
        assert asked(place, "/metrics")[2] == "a 2 é\n"
        assert asked(place, "/metrics", "HEAD")[::2] == (200, "")
        assert asked(place, "/healthz")[::2] == (200, "some words\n")
        state["alive"] = False
        assert asked(place, "/healthz")[0] == 503
        for path in ("/", "/../etc/passwd", "/metrics/x"):
            assert asked(place, path)[0] == 404
        assert asked(place, "/metrics", "POST")[0] == 405
    with pytest.raises(OSError):  # noqa: PT011 - refused, in the words of the system
        asked(place, "/metrics")


def test_a_place_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        web.serving(("127.0.0.1", 0), lambda _: web.Answer()) as place,
        pytest.raises(UsageError, match=f"Cannot listen on 127.0.0.1:{place[1]}"),
        web.serving(place, lambda _: web.Answer()),
    ):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9187", ("127.0.0.1", 9187)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:80", ("localhost", 80)),
        ("0.0.0.0:9187", ("0.0.0.0", 9187)),
        ("9187", None),
        (":9187", None),
        ("127.0.0.1:", None),
        ("127.0.0.1:99999", None),
        ("127.0.0.1:-1", None),
        ("::1:9187", None),
        ("127.0.0.1:\uff19187", None),
    ],
)
def test_where_to_listen(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match="write host:port"):
            web.address(text)
    else:
        assert web.address(text) == expected


def test_loopback_is_told_from_the_world() -> None:
    assert [web.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [web.is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1", "db.example.org")] == [False] * 4
