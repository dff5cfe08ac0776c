"""`drift --every`: the same look again and again, at moments that do not wander, and what it saw for who asks by HTTP.

Nothing here knows a database: a round is a function that says what it saw or raises. Clock and wait are parameters.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reconciler.errors import ReconcilerError
from reconciler.web import Answer, Request

if TYPE_CHECKING:
    from collections.abc import Callable

SHORTEST = 1.0
"""Seconds between two rounds, at least."""

LATE = 3
"""So many intervals without a finished round, and the loop does not count as alive."""


@dataclass
class Loop:
    """Rounds at start, start + every, start + 2 * every ...: a slow round makes none of the later ones late.

    round: looks, and tells what it saw; raises ReconcilerError when it could not. failed: is told that. missed: is told
    how many moments went by while a round was under way. clock: seconds that never go back. wait: waits so many
    seconds, True when the loop shall end.
    """

    every: float
    round: Callable[[], None]
    failed: Callable[[ReconcilerError], None]
    missed: Callable[[int], None]
    clock: Callable[[], float] = time.monotonic
    stop: threading.Event = field(default_factory=threading.Event)
    wait: Callable[[float], bool] | None = None
    rounds: int = 0
    failures: int = 0
    skipped: int = 0
    unseen: int = 0
    """Rounds that failed since the last one that did not."""
    finished_at: float | None = None
    """By the clock, of the last round."""
    started_at: float = 0.0

    def run(self) -> None:
        """Until `stop` is set, or a KeyboardInterrupt, which ends it as well."""
        wait = self.wait or self.stop.wait
        self.started_at = self.clock()
        due = self.started_at
        try:
            while not self.stop.is_set():
                self._once()
                late = max(0, int((self.clock() - due) // self.every))  # a wait may end a little early
                if late:
                    self.skipped += late
                    self.missed(late)
                due += (late + 1) * self.every
                if wait(max(0.0, due - self.clock())):
                    return
        except KeyboardInterrupt:
            self.stop.set()

    def _once(self) -> None:
        self.rounds += 1
        try:
            self.round()
            self.unseen = 0
        except ReconcilerError as error:
            self.failures += 1
            self.unseen += 1
            self.failed(error)
        self.finished_at = self.clock()

    @property
    def alive(self) -> bool:
        """Did a round end not too long ago?"""
        since = self.started_at if self.finished_at is None else self.finished_at
        return self.clock() - since < LATE * self.every

    @property
    def health(self) -> tuple[bool, str]:
        """Alive, and in words. A server that is away is no reason to start this process anew: the next round asks."""
        if not self.alive:
            return False, "no round has ended for too long"
        if self.unseen:
            return True, f"ok, but nobody could look in the last {self.unseen} round{'s' * (self.unseen > 1)}"
        return True, "ok"


def pages(metrics: Callable[[], str], health: Callable[[], tuple[bool, str]]) -> Callable[[Request], Answer]:
    """`/metrics` and `/healthz`, and nothing else.

    metrics: the text of the first. health: whether the loop is alive, which is 200 or 503, and a line of text.
    """

    def answer(request: Request) -> Answer:
        match (request.method, request.path):
            case ("GET", "/metrics"):
                return Answer(metrics(), sort="text/plain; version=0.0.4; charset=utf-8")
            case ("GET", "/healthz"):
                good, words = health()
                return Answer(f"{words}\n", 200 if good else 503)
            case ("GET", _):
                return Answer("There is /metrics and /healthz.\n", 404)
            case _:
                return Answer("There is nothing to write to.\n", 405)

    return answer
