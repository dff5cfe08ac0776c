"""`drift --every` while server and network come and go: every round that can look looks, and nothing is left behind."""

from __future__ import annotations

import functools
import gc
import http.client
import os
import re
import signal
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import pg, watch
from tests.fault.proxy import Proxy
from tests.integration import governed
from tests.integration.governed import command
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fault.proxy import Line, Moment
    from tests.servers import Server

PLACE = re.compile(r"Listening on http://127\.0\.0\.1:(\d+)/metrics")


class Network:
    """Between the command and its server. `cut_at`: the line breaks at this statement of a session (0: never).

    stalling: whoever asks something, once connected, is not answered until `over` is set.
    """

    def __init__(self) -> None:
        self.cut_at = 0
        self.stalling = False
        self.over = threading.Event()
        self._seen: dict[int, int] = {}
        self.cuts = 0

    def __call__(self, moment: Moment, line: Line) -> None:
        if moment.when != "before":
            return
        number = self._seen[id(line)] = self._seen.get(id(line), 0) + 1
        if self.stalling and number > 1:
            self.over.wait()
            line.cut()
        if self.cut_at and number == self.cut_at:
            self.cuts += 1
            line.cut()


def connected(db: Database) -> list[str]:
    """The connections of the command to this database."""
    query = """SELECT application_name FROM pg_stat_activity
                WHERE application_name LIKE 'reconciler %%' AND datname = %s"""
    return [name for (name,) in db.execute(query, [db.name])]


def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait for what comes sooner or later."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def connections() -> int:
    """The objects of psycopg that this process still holds."""
    gc.collect()
    return sum(isinstance(one, psycopg.Connection) and not one.closed for one in gc.get_objects())


def test_a_lost_network_costs_its_rounds_and_nothing_else(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = governed.shop(db, tmp_path)
    shop.settle()
    network = Network()
    # A server that says nothing is given up so long after the time-out of statements.
    monkeypatch.setattr(pg, "snapshot", functools.partial(pg.snapshot, statement_timeout_ms=100))
    monkeypatch.setattr(pg, "GRACE", 0.2)
    descriptors = Path("/proc/self/fd")
    known: list[tuple[int, int]] = []

    def count() -> tuple[int, int]:
        return len(list(descriptors.iterdir())), connections()

    with Proxy(db.server, network) as proxy:

        def be(cut_at: int = 0, *, refusing: bool = False, stalling: bool = False) -> None:
            """How the network is in the next round."""
            until(lambda: refusing or stalling or not connected(db))
            network.cut_at, proxy.refusing, network.stalling = cut_at, refusing, stalling
            if not stalling:
                network.over.set()
            known.append(count())

        between: list[Callable[[], None]] = [
            be, be, *(functools.partial(be, number) for number in (1, 2, 10)), functools.partial(be, refusing=True),
            functools.partial(be, stalling=True), be, be,
        ]  # fmt: skip
        script(monkeypatch, between)
        done = command("drift", "-s", shop.directory, "--every", "1h", dsn=proxy.dsn(db.name))
        assert done.returncode == 0
        assert (done.stdout.count("No drift at"), done.stderr.count("Z Not checked: ")) == (5, 5)
        assert "Traceback" not in done.stderr
        assert network.cuts == 3
        # The first round makes what is made once.
        until(lambda: count() == known[1], 10)


def script(monkeypatch: pytest.MonkeyPatch, between: list[Callable[[], None]]) -> None:
    """In the place of waiting between two rounds: these calls, and then the end."""
    made = watch.Loop

    def scripted(*given: Any) -> watch.Loop:
        loop = made(*given)

        def wait(_: float) -> bool:
            if not between:
                return True
            between.pop(0)()
            return False

        loop.wait = wait
        return loop

    monkeypatch.setattr(watch, "Loop", scripted)


# ------------------------------------------------------------------------------------------------ the installed command


class Watched:
    """The installed command, looking once a second, as what it says of itself and the kernel of it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def page(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> int:
        found = re.search(rf"^{name}\{{[^}}]*\}} (\d+)$", self.page("/metrics")[1], re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    def rounds(self, more: int, *, up: int) -> None:
        """Wait for so many rounds more that went like this."""
        name = "reconciler_rounds_failed_total"
        start, failed = self.metric("reconciler_rounds_total"), self.metric(name)
        until(lambda: self.metric("reconciler_up") == up)
        until(lambda: self.metric("reconciler_rounds_total") >= start + more, 300)
        if not up:
            assert self.metric(name) > failed

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def status(self, name: str) -> int:
        """A number of /proc/PID/status: VmRSS is in kB."""
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


@contextmanager
def watched(shop: governed.Governed, dsn: str, variables: dict[str, str], log: Path) -> Iterator[Watched]:
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    with log.open("w") as out:
        process = subprocess.Popen(
            [program, "drift", "-s", shop.directory, "--every", "1s", "--listen", "127.0.0.1:0"],
            env={**variables, "RECONCILER_DSN": dsn, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            until(lambda: PLACE.search(log.read_text()))
            found = PLACE.search(log.read_text())
            assert found is not None
            yield Watched(process, int(found[1]))
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_minutes_of_trouble_leak_nothing(
    own_server: Callable[..., Server], tmp_path: Path, variables: dict[str, str]
) -> None:
    server = own_server()
    db = Database(server, "postgres")
    shop = governed.shop(db, tmp_path)
    shop.settle()
    db.conn.close()
    network = Network()
    log = tmp_path / "log"
    with Proxy(server, network) as proxy, watched(shop, proxy.dsn("postgres"), variables, log) as command:

        def restart(number: signal.Signals) -> None:
            server.cluster.stop(number)
            command.rounds(2, up=0)
            server.cluster.start(server.port)
            command.rounds(2, up=1)

        def trouble() -> None:
            restart(signal.SIGINT)
            for number in (1, 3, 7):
                network.cut_at = number
                command.rounds(2, up=0)
            network.cut_at, proxy.refusing = 0, True
            command.rounds(2, up=0)
            proxy.refusing = False
            restart(signal.SIGQUIT)

        command.rounds(10, up=1)
        trouble()  # warm: whatever is made once is made
        command.rounds(3, up=1)
        before = command.descriptors, command.status("Threads"), command.status("VmRSS")
        for _ in range(4):
            trouble()
        command.rounds(3, up=1)
        assert command.page("/healthz") == (200, "ok\n")
        until(lambda: (command.descriptors, command.status("Threads")) <= before[:2])
        assert command.status("VmRSS") - before[2] < 4096
        assert len(connected(db)) <= 1
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(60) == 0
        until(lambda: not connected(db))
        db.conn.close()
    assert "Traceback" not in log.read_text()
