"""`drift --every`: the same look again and again, at moments that do not wander, and what it saw for who asks by HTTP.

Nothing here knows a database: a round is a function that says what it saw or raises. Clock and wait are parameters.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import TYPE_CHECKING, Any

from reconciler.errors import ReconcilerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

SHORTEST = 1.0
"""Seconds between two rounds, at least."""

LATE = 3
"""So many intervals without a finished round, and the loop does not count as alive."""

SLOW_READER = 10.0
"""Seconds that somebody who asks by HTTP may take."""


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


def address(text: str) -> tuple[str, int]:
    """`127.0.0.1:9187`, `[::1]:9187`, `localhost:0` as host and port. Raises UsageError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    good = bool(bare) and port.isascii() and port.isdigit() and int(port) < 65536 and (":" not in bare or bare != host)
    if not good:
        raise UsageError(f"--listen {text}: write host:port, for example 127.0.0.1:9187 or [::1]:9187.")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Is this an address that only the same machine reaches?"""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


@contextmanager
def serving(
    place: tuple[str, int], metrics: Callable[[], str], health: Callable[[], tuple[bool, str]]
) -> Generator[tuple[str, int]]:
    """While the block runs, `/metrics` and `/healthz` are answered, in threads of their own; yields host and port.

    metrics: the text of the first. health: whether the loop is alive, which is 200 or 503, and a line of text.
    Raises UsageError when nobody can listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = SLOW_READER
        server_version = "reconciler"
        sys_version = ""

        def do_GET(self) -> None:
            """Two pages, and nothing else."""
            match self.path.partition("?")[0]:
                case "/metrics":
                    self._answer(200, metrics(), "text/plain; version=0.0.4; charset=utf-8")
                case "/healthz":
                    good, words = health()
                    self._answer(200 if good else 503, f"{words}\n")
                case _:
                    self._answer(404, "There is /metrics and /healthz.\n")

        do_HEAD = do_GET  # noqa: N815 - the name is http.server's

        def _answer(self, code: int, text: str, sort: str = "text/plain; charset=utf-8") -> None:
            body = text.encode("utf-8", "backslashreplace")
            with suppress(OSError):  # who asked went away
                self.send_response(code)
                self.send_header("Content-Type", sort)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - the signature is http.server's
            """Nothing: who asks every ten seconds would fill the log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = AF_INET6 if ":" in place[0] else ThreadingHTTPServer.address_family

        def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as above
            """Nothing: what a stranger sends is no trouble of ours."""

    try:
        server = Server(place, Handler)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {place[0]}:{place[1]}: {error.strerror or error}.", hint="Choose another with --listen."
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield place[0], int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
