"""A test run leaves nothing behind, however it ends: no server, no directory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database, Server

TEST_THAT_HANGS = """
import json, time
from pathlib import Path

def test_hangs(db, run_directory):
    pid = int((run_directory / "shared" / "data" / "postmaster.pid").read_text().splitlines()[0])
    partial = Path(__file__).with_suffix(".partial")
    partial.write_text(json.dumps({"run": str(run_directory), "pid": pid}))
    partial.rename(Path(__file__).with_suffix(".json"))
    time.sleep(600)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_behind(tmp_path: Path, sign: signal.Signals, workers: str) -> None:
    test = tmp_path / "test_hangs.py"
    test.write_text(TEST_THAT_HANGS)
    facts = test.with_suffix(".json")
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "-n", workers]
    pytest_run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-c", PROJECT / "pyproject.toml", *quiet, test],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: facts.exists() or pytest_run.poll() is not None)
    assert pytest_run.poll() is None
    found = json.loads(facts.read_text())
    assert Path(f"/proc/{found['pid']}").exists()

    pytest_run.send_signal(sign)

    pytest_run.wait(timeout=60)
    wait_until(lambda: not Path(found["run"]).exists())
    wait_until(lambda: not Path(f"/proc/{found['pid']}").exists())


def test_each_test_has_its_own_database(db: Database, own_server: Callable[..., Server], dieu45: Database) -> None:
    assert db.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 2200") == [(0,)]
    assert dieu45.execute("SELECT count(*) > 0 FROM pg_class WHERE relnamespace = 2200") == [(True,)]
    assert own_server(log_statement="all").port != db.server.port
