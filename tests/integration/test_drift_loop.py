"""`drift --every` against a real server: it goes away and comes back, and nothing of ours is left behind.

Nothing here waits for a time to pass: rounds begin when the test says so.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import watch
from tests.integration import governed
from tests.integration.governed import command
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Server

PLACE = re.compile(r"Listening on http://(127\.0\.0\.1):(\d+)/metrics")


class Script:
    """In the place of waiting: what happens between two rounds, one call each; after the last the loop ends."""

    def __init__(self, *between: Callable[[], None]) -> None:
        self.between = list(between)

    def __call__(self, _: float) -> bool:
        if not self.between:
            return True
        self.between.pop(0)()
        return False


def ours(db: Database) -> list[str]:
    """The connections of the command to this database."""
    query = """SELECT application_name FROM pg_stat_activity
                WHERE application_name LIKE 'reconciler %%' AND datname = %s"""
    return [name for (name,) in db.execute(query, [db.name])]


def gone(db: Database) -> None:
    """Nothing of ours is connected: a process of the server ends a moment after its client has left."""
    deadline = time.monotonic() + 60
    while left := ours(db):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> governed.Governed:
    system = governed.shop(db, tmp_path)
    system.settle()
    return system


def looped(
    monkeypatch: pytest.MonkeyPatch, system: governed.Governed, *options: str, script: Script, dsn: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command with the script in the place of its waiting."""
    made = watch.Loop

    def scripted(*given: Any) -> watch.Loop:
        loop = made(*given)
        loop.wait = script
        return loop

    monkeypatch.setattr(watch, "Loop", scripted)
    return command("drift", "-s", system.directory, "--every", "1h", *options, dsn=dsn or system.db.dsn)


def test_each_round_sees_what_is_there_then_and_leaves_no_connection(
    shop: governed.Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        gone(shop.db)
        shop.sql("UPDATE app.settings SET value = value || '1' WHERE name = 'shop.limit'")

    def declare() -> None:
        shop.state["gates"]["shop.limit"]["value"] = "12"
        shop.write()

    done = looped(monkeypatch, shop, script=Script(change, declare))
    assert (done.returncode, done.stderr) == (0, "Stopped.\n")
    assert done.stdout.count("No drift at") == 1
    assert done.stdout.count("Drift: 1 object changed, 0 pending.") == 1
    assert done.stdout.count("Drift: 1 object changed, 1 pending.") == 1


def test_files_that_break_meanwhile_are_said_and_the_loop_goes_on(
    shop: governed.Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shop.directory / "all.yaml"
    good = file.read_text()

    done = looped(
        monkeypatch, shop, script=Script(lambda: void(file.write_text("gates: [")), lambda: void(file.write_text(good)))
    )
    assert done.returncode == 0
    assert done.stdout.count("No drift at") == 2
    assert "Z Not checked: 1 problem in the input.\n" in done.stderr
    assert "state/all.yaml:" in done.stderr
    assert "Missed" not in done.stderr
    file.write_text("gates: [")
    assert looped(monkeypatch, shop, script=Script()).returncode == 1


def void(_: object) -> None:
    pass


def test_it_survives_a_restart_of_the_server(
    own_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_server()
    db = Database(server, "postgres")
    shop = governed.shop(db, tmp_path)
    shop.settle()
    db.conn.close()
    out = tmp_path / "reconciler.prom"
    pages: list[str] = []
    asked: list[Callable[[], str]] = []
    answering = watch.pages

    def heard(metrics: Callable[[], str], health: Callable[[], tuple[bool, str]]) -> Any:
        asked.append(metrics)
        return answering(metrics, health)

    monkeypatch.setattr(watch, "pages", heard)

    def look() -> None:
        pages.extend((asked[0](), out.read_text()))

    def stop() -> None:
        look()
        server.cluster.stop(signal.SIGINT)

    def start() -> None:
        look()
        server.cluster.start(server.port)

    options = ("--listen", "127.0.0.1:0", "--format", "prometheus", "--out", str(out))
    done = looped(monkeypatch, shop, *options, script=Script(stop, start, look), dsn=server.dsn())
    assert done.returncode == 0
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ Not checked: Cannot connect to PostgreSQL", done.stderr)
    ups = [re.search(r"^reconciler_up\{[^}]*\} (\d)$", page, re.MULTILINE) for page in pages]
    assert [up[1] for up in ups if up is not None] == ["1", "1", "0", "0", "1", "1"]
    for page in pages[2:4]:
        assert "reconciler_drift_items" not in page
        assert "reconciler_last_success_timestamp_seconds" in page
    assert re.search(r"^reconciler_rounds_failed_total\{[^}]*\} 1$", pages[4], re.MULTILINE)
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------------ the installed command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_cleanly_on_a_signal(
    shop: governed.Governed, variables: dict[str, str], number: signal.Signals
) -> None:
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    process = subprocess.Popen(
        [program, "drift", "-s", shop.directory, "--every", "1h", "--listen", "127.0.0.1:0"],
        env={**variables, "RECONCILER_DSN": shop.db.dsn, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        match = PLACE.match(process.stderr.readline())
        assert match is not None
        assert any(line.startswith("No drift at") for line in process.stdout)
        connection = http.client.HTTPConnection(match[1], int(match[2]), timeout=60)
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"ok\n")
        connection.close()
        process.send_signal(number)
        rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest[1]) == (0, "Stopped.\n")
    gone(shop.db)


def test_a_signal_in_the_middle_of_a_look_ends_it_and_what_it_had_asked(
    shop: governed.Governed, variables: dict[str, str]
) -> None:
    """Somebody holds the table, so the look waits."""
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    with psycopg.connect(shop.db.dsn) as holder:
        holder.execute("LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            [program, "drift", "-s", shop.directory, "--every", "1h"],
            env={**variables, "RECONCILER_DSN": shop.db.dsn, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database"
            waiting += " WHERE datname = current_database())"
            while not shop.db.execute(waiting)[0][0]:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, said) == (0, ("", "Stopped.\n"))
        gone(shop.db)  # while whoever held the table holds it still
