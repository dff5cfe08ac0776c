"""In the middle of a fleet command: one piece of work for each member, a bounded number at a time, in threads.

Threads are enough: of a look, nine tenths are the server's. Each has one connection at a time. Only the thread that
called hears of Ctrl-C: after the first nothing new starts and what is under way ends; after the second it is left.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from reconciler.fleet.report import TargetResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reconciler.fleet.files import Member

R = TypeVar("R")

LOOKS = 0.2
"""Seconds between two looks whether somebody pressed Ctrl-C."""


@dataclass
class Done(Generic[R]):
    """What came of the work, by the name of the member. `left`: those that were left under way."""

    results: dict[str, R] = field(default_factory=dict[str, R])
    left: list[str] = field(default_factory=list[str])
    interrupted: bool = False


class _Crew(Generic[R]):
    """The threads, and what they share: who waits, who was begun, what came of it, whether to stop."""

    def __init__(self, members: Sequence[Member], work: Callable[[Member], R], stops: Callable[[R], bool]) -> None:
        self.answers: queue.SimpleQueue[tuple[Member, R]] = queue.SimpleQueue()
        self._work = work
        self._stops = stops
        self._waiting = list(reversed(members))
        self._begun: set[str] = set()
        # Nobody may begin between the decision to stop and the count of those under way.
        self._lock = threading.Lock()

    def begin(self, workers: int) -> None:
        # They are not waited for at exit: somebody who presses Ctrl-C twice wants to go.
        for _ in range(min(workers, len(self._waiting))):
            threading.Thread(target=self._labour, daemon=True).start()

    def stop(self) -> None:
        """Nobody begins any more."""
        with self._lock:
            self._waiting.clear()

    def under_way(self, done: Done[R]) -> set[str]:
        """Who was begun, or will be, and has not answered."""
        with self._lock:
            return (self._begun | {member.name for member in self._waiting}) - done.results.keys()

    def _labour(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                member = self._waiting.pop()
                self._begun.add(member.name)
            result = self._work(member)
            if self._stops(result):
                self.stop()  # here, and not where the answer is heard: until then somebody else would have begun
            self.answers.put((member, result))


def run(  # noqa: PLR0913 - who, what, and who hears of it
    members: Sequence[Member],
    work: Callable[[Member], R],
    *,
    workers: int,
    told: Callable[[Member, R], object],
    warned: Callable[[int], None],
    stops: Callable[[R], bool] = lambda _result: False,
) -> Done[R]:
    """Do the work for each member, in their order, by so many threads; `work` raises nothing.

    told: hears of each result as it comes, in the calling thread. warned: is told after Ctrl-C how many are still under
    way. stops: after such a result nobody begins any more.
    """
    crew = _Crew(members, work, stops)
    done: Done[R] = Done()
    crew.begin(workers)
    while crew.under_way(done):
        try:
            member, result = crew.answers.get(timeout=LOOKS)
            done.results[member.name] = result
            told(member, result)
        except queue.Empty:
            continue
        except KeyboardInterrupt:
            crew.stop()
            under_way = crew.under_way(done)
            if done.interrupted:
                done.left = sorted(under_way)
                break
            done.interrupted = True
            warned(len(under_way))
    return done


def in_order(
    members: Sequence[Member], done: Done[TargetResult], waves: dict[str, int] | None = None
) -> list[TargetResult]:
    """The results in the order of the members; those that nobody came to are `not_started`."""
    return [
        (
            done.results.get(member.name)
            or TargetResult(name=member.name, labels=dict(member.labels), state="not_started")
        ).model_copy(update={"wave": waves.get(member.name)} if waves else {})
        for member in members
    ]
