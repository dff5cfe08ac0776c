"""A fleet on several machines: rounds, workers that are killed, the schedule; by procrastinate on a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.fleet import queue
from tests.fleets import Shops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers import Database, Server


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 3)
    yield made
    made.drop()


@pytest.fixture
def results(shops: Shops, new_name: Callable[[], str], server: Server) -> Iterator[str]:
    """The database of the queue."""
    from tests.conftest import _clone

    for made in _clone(server, new_name(), "template1"):
        queue.create(made.dsn)
        yield made.dsn


class Workers:
    """Worker processes, ended with the test."""

    def __init__(self, shops: Shops, dsn: str) -> None:
        self.shops, self.dsn = shops, dsn
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        words = ["fleet", "worker", "--queue", self.dsn, str(self.shops.file), "--heartbeat", "1s", *more]
        log = (self.shops.root / f"worker-{len(self.running)}.log").open("wb")
        code = "from reconciler.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=log, stderr=subprocess.STDOUT, cwd=self.shops.root
        )
        log.close()
        self.running.append(process)
        return process

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.shops.root.glob("worker-*.log")))

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def workers(shops: Shops, results: str) -> Iterator[Workers]:
    made = Workers(shops, results)
    yield made
    made.end()


def test_a_round_by_one_worker(shops: Shops, workers: Workers) -> None:
    workers.start()
    told = shops.told("drift", shops.file, "--queue", workers.dsn)
    assert [one["name"] for one in told["targets"]] == shops.names
    assert {one["outcome"] for one in told["targets"]} == {"no_changes"}, workers.logs()
    assert told["finished_at"] is not None
    again = shops.told("status", "--queue", workers.dsn)
    assert again["round"] == told["round"]
    workers.end()
    assert [process.returncode for process in workers.running] == [0], workers.logs()
