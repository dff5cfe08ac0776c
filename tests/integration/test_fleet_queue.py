"""A fleet on several machines: rounds, workers that are killed, the schedule; by procrastinate on a real server."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from reconciler.fleet import queue
from tests.fleets import Shops, Workers
from tests.integration.governed import command
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 3)
    yield made
    made.drop()


@pytest.fixture
def results(db: Database) -> Iterator[str]:
    """The database of the queue."""
    name = f"{db.name}_results"
    with psycopg.connect(db.server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    queue.create(db.server.dsn(name))
    yield db.server.dsn(name)
    Database(db.server, name).drop()


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


def asked(dsn: str, query: LiteralString) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(query).fetchall()


def until(condition: Callable[[], bool], workers: Workers) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, workers.logs()
        time.sleep(0.1)


def held(shops: Shops, name: str) -> psycopg.Connection[tuple[Any, ...]]:
    """A look at this target waits until the connection is closed."""
    conn = psycopg.connect(shops.dsn(name))
    conn.execute("LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE")
    return conn


def test_a_killed_worker_is_replaced_and_nothing_is_seen_twice(shops: Shops, workers: Workers) -> None:
    chosen: list[tuple[str, dict[str, str]]] = [(name, {}) for name in shops.names]
    assert queue.begin(workers.dsn, "shops", chosen, "round-1", ())
    with held(shops, "shop-002"):
        first = workers.start("--workers", "1")
        until(lambda: asked(workers.dsn, DOING) == [("shop-002",)], workers)
        first.kill()
        first.wait()
        second = workers.start("--workers", "1")
        # Its lock is that of a job whose worker is gone; the next target is free.
        until(lambda: asked(workers.dsn, SEEN) == [("shop-001",), ("shop-003",)], workers)
    until(lambda: len(asked(workers.dsn, SEEN)) == 3, workers)
    assert asked(workers.dsn, SEEN) == [(name,) for name in shops.names]
    assert "shop-002: its worker is gone; looked at again." in workers.logs()
    by = asked(workers.dsn, "SELECT worker FROM reconciler_fleet.result ORDER BY target")
    assert [worker.rpartition(":")[2] for (worker,) in by] == [str(first.pid), str(second.pid), str(second.pid)]
    # The same job once more, as if its worker had been killed between the result and the end of the job.
    before = asked(workers.dsn, "SELECT target, recorded_at FROM reconciler_fleet.result ORDER BY 1")
    with psycopg.connect(workers.dsn, options="-c search_path=reconciler_fleet") as conn:
        conn.execute(AGAIN)
    until(lambda: asked(workers.dsn, WAITING) == [(0,)], workers)
    assert asked(workers.dsn, "SELECT target, recorded_at FROM reconciler_fleet.result ORDER BY 1") == before


DOING: LiteralString = "SELECT args ->> 'target' FROM reconciler_fleet.procrastinate_jobs WHERE status = 'doing'"
SEEN: LiteralString = "SELECT target FROM reconciler_fleet.result ORDER BY 1"
WAITING: LiteralString = "SELECT count(*) FROM reconciler_fleet.procrastinate_jobs WHERE status IN ('todo', 'doing')"
AGAIN: LiteralString = """
SELECT procrastinate_defer_jobs_v1(ARRAY[ROW('fleet:shops', 'reconciler.look', 0, 'shops/shop-001', NULL,
       '{"round_id": "round-1", "target": "shop-001", "labels": {}, "fail_on": []}', NULL)
       ::procrastinate_job_to_defer_v1])
"""


def test_the_schedule_begins_rounds_and_each_is_one(shops: Shops, workers: Workers) -> None:
    shops.declared["schedule"] = "* * * * * */2"
    shops.write()
    workers.start()
    workers.start()
    until(lambda: asked(workers.dsn, "SELECT count(*) FROM reconciler_fleet.round")[0][0] >= 2, workers)
    workers.end()
    rounds = asked(workers.dsn, "SELECT id FROM reconciler_fleet.round ORDER BY started_at")
    assert all(name.startswith("shops@2") and name.endswith("Z") for (name,) in rounds)
    assert len({name for (name,) in rounds}) == len(rounds)
    first = shops.told("status", "--queue", workers.dsn, "--round", rounds[0][0])
    assert [one["state"] for one in first["targets"]] == ["checked"] * 3
    assert [process.returncode for process in workers.running] == [0, 0]


@pytest.mark.slow
def test_what_cannot_be_reached_is_tried_again(shops: Shops, workers: Workers) -> None:
    own, away = (sql.Identifier(shops.databases["shop-002"] + more) for more in ("", "_away"))
    rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
    with psycopg.connect(shops.server.dsn(), autocommit=True) as conn:
        conn.execute(rename.format(own, away))
        workers.start()
        chosen: list[tuple[str, dict[str, str]]] = [(name, {}) for name in shops.names]
        queue.begin(workers.dsn, "shops", chosen, "round-1", ())
        until(lambda: asked(workers.dsn, TRIED) == [(1,)], workers)
        assert asked(workers.dsn, "SELECT count(*) FROM reconciler_fleet.result WHERE target = 'shop-002'") == [(0,)]
        conn.execute(rename.format(away, own))
    until(lambda: len(asked(workers.dsn, SEEN)) == 3, workers)
    told = shops.told("status", "--queue", workers.dsn)
    assert [one["outcome"] for one in told["targets"]] == ["no_changes"] * 3


@pytest.mark.slow
def test_what_is_never_reached_is_told_in_the_end(shops: Shops, workers: Workers) -> None:
    shops.declared["targets"][1]["dsn"] = shops.server.dsn("nowhere")
    shops.write()
    workers.start()
    told = shops.told("drift", shops.file, "--queue", workers.dsn)
    assert [one["outcome"] for one in told["targets"]] == ["no_changes", "error", "no_changes"]
    assert "Cannot connect" in told["targets"][1]["message"]


TRIED: LiteralString = """
SELECT attempts FROM reconciler_fleet.procrastinate_jobs WHERE args ->> 'target' = 'shop-002' AND status = 'todo'
"""


def test_files_that_are_broken_are_a_result(shops: Shops, workers: Workers) -> None:
    workers.start()
    until(lambda: len(asked(workers.dsn, WORKERS)) == 1, workers)
    good = shops.file.read_text()
    chosen: list[tuple[str, dict[str, str]]] = [(name, {}) for name in [*shops.names, "shop-009"]]
    shops.file.write_text("fleet: {}")
    queue.begin(workers.dsn, "shops", chosen, "broken", ())
    until(lambda: asked(workers.dsn, WAITING) == [(0,)], workers)
    shops.file.write_text(good)
    queue.begin(workers.dsn, "shops", chosen, "good", ())
    until(lambda: asked(workers.dsn, WAITING) == [(0,)], workers)
    broken = shops.told("status", "--queue", workers.dsn, "--round", "broken")
    assert {one["outcome"] for one in broken["targets"]} == {"error"}
    assert "problems in the input" in broken["targets"][0]["message"]
    mended = shops.told("status", "--queue", workers.dsn, "--fleet", "shops")
    assert [one["outcome"] for one in mended["targets"]] == ["no_changes"] * 3 + ["error"]
    assert mended["targets"][3]["message"] == "The fleet has no target shop-009 any more."


def test_a_role_that_may_not_write_jobs_is_told_in_one_sentence(shops: Shops, db: Database, results: str) -> None:
    role = db.role()
    with psycopg.connect(results, autocommit=True) as conn:
        conn.execute(
            sql.SQL(
                "GRANT USAGE ON SCHEMA reconciler_fleet TO {0};"
                "GRANT SELECT, INSERT ON reconciler_fleet.round, reconciler_fleet.result TO {0}"
            ).format(sql.Identifier(role))
        )
    done = shops.run("drift", shops.file, "--queue", f"{results} user={role}")
    assert done.returncode == 1
    assert "Error: writing the jobs: permission denied for table procrastinate_jobs" in done.stderr
    assert asked(results, "SELECT count(*) FROM reconciler_fleet.round") == [(0,)]
    with psycopg.connect(results, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))


WORKERS: LiteralString = "SELECT FROM reconciler_fleet.procrastinate_workers"


def test_what_is_missing_is_said_in_one_sentence(
    shops: Shops, db: Database, results: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ("drift", shops.file, "--queue", db.dsn),
        ("worker", shops.file, "--queue", db.dsn),
        ("status", "--queue", db.dsn),
    ):
        done = shops.run(*words)
        assert done.returncode == 1
        assert "has no schema reconciler_fleet" in done.stderr, words
    assert "already" in shops.run("init", "--queue", results).stderr
    assert shops.run("status", "--queue", results).returncode == 1
    printed = shops.run("init", "--queue", results, "--print-sql").stdout
    assert "CREATE TABLE reconciler_fleet.result" in printed
    assert "CREATE TABLE procrastinate_jobs" in printed
    shops.declared["schedule"] = "61 * * * *"
    shops.write()
    done = shops.run("worker", shops.file, "--queue", results)
    assert done.returncode == 1
    assert "is no cron expression" in done.stderr
    monkeypatch.setitem(sys.modules, "procrastinate", None)
    done = shops.run("init", "--queue", db.dsn)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Error: A queue needs procrastinate, which is not installed.",
        "pip install 'pg-reconciler[fleet]'",
    ]


def test_a_result_of_another_version_is_one_sentence(results: str, tmp_path: Path) -> None:
    with psycopg.connect(results, autocommit=True) as conn:
        conn.execute(
            """
            INSERT INTO reconciler_fleet.round (id, fleet, targets)
            VALUES ('r1', 'shops', '[{"name": "a", "labels": {}}]');
            INSERT INTO reconciler_fleet.result (round, target, worker, body)
            VALUES ('r1', 'a', 'w1', '{"name": "a", "state": "checked", "outcome": "no_changes", "exit_code": 0}')
            """
        )
    report = ("fleet", "report", "--queue", results, "--out", tmp_path / "board.html")
    done = command(*report)
    assert (done.returncode, (tmp_path / "board.html").exists()) == (0, True), done.stderr
    with psycopg.connect(results, autocommit=True) as conn:
        conn.execute("""UPDATE reconciler_fleet.result SET body = '{"name": "a", "state": "judged"}'""")
    for words in (report, ("fleet", "status", "--queue", results)):
        done = command(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Error: Round r1 holds what this version does not write: ValidationError." in done.stderr
