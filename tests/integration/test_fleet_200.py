"""200 databases on one server: drift by 1, 2 and 4 workers, workers killed half-way, a rollout that fails and resumes.

The numbers are printed: `pytest -n 0 tests/integration/test_fleet_200.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
import pytest

from reconciler.fleet import queue
from tests import servers
from tests.conftest import KIND
from tests.fleets import Shops, Workers
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Command

pytestmark = pytest.mark.slow

NUMBER = 200
SINGLE = 10
"""Single runs that are measured; as many as there are targets would take minutes."""


@pytest.fixture(scope="module")
def shops(
    run_directory: Path, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shops]:
    """On a server of their own: to drop 200 databases takes longer than to remove a server."""
    home = run_directory / new_name()
    server = servers.start(home, KIND)
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE template_shop")
    made = Shops(Database(server, "template_shop"), tmp_path_factory.mktemp("fleet"), NUMBER)
    made.declared |= {
        "workers": 4,
        "waves": [{"canary": ["shop-001", "shop-002"]}, {"percent": 10}, {"percent": 50}, {"percent": 100}],
    }
    made.write()
    yield made
    server.cluster.stop()
    shutil.rmtree(home)


def note(capsys: pytest.CaptureFixture[str], *lines: str) -> None:
    """The numbers, for whoever runs this by hand."""
    with capsys.disabled():
        sys.stdout.write("\n" + "".join(f"  {line}\n" for line in lines))


def test_drift_of_all_with_1_2_and_4_workers(shops: Shops, cli: Command, capsys: pytest.CaptureFixture[str]) -> None:
    seconds: dict[int, float] = {}
    shops.told("drift", shops.file, "--workers", "4")  # so that every database was visited once before anything counts
    for workers in (1, 2, 4):
        told = shops.told("drift", shops.file, "--workers", str(workers))
        assert [one["name"] for one in told["targets"]] == shops.names
        assert {(one["state"], one["outcome"]) for one in told["targets"]} == {("checked", "no_changes")}
        seconds[workers] = told["seconds"]
    begun = time.monotonic()
    for name in shops.names[:SINGLE]:
        cli("drift", "-s", shops.template.directory, "-t", "test", "--dsn", shops.dsn(name))
    single = (time.monotonic() - begun) / SINGLE
    note(
        capsys,
        *(
            f"{NUMBER} targets, {workers} workers: {took:.1f} s, {took / NUMBER * 1000:.0f} ms for each"
            for workers, took in seconds.items()
        ),
        f"single runs: {single * 1000:.0f} ms for each, {single * NUMBER:.0f} s for {NUMBER}",
    )
    assert max(seconds.values()) < single * NUMBER


def test_two_workers_killed_half_way(shops: Shops, capsys: pytest.CaptureFixture[str]) -> None:
    with psycopg.connect(shops.server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE results")
    dsn = shops.server.dsn("results")
    queue.create(dsn)
    workers = Workers(shops, dsn)
    try:
        first, second = workers.start("--workers", "2"), workers.start("--workers", "2")
        named = [(name, {"region": "eu"}) for name in shops.names]
        assert queue.begin(dsn, "shops", named, "round-1", ())
        assert not queue.begin(dsn, "shops", named, "round-1", ())
        wait_for(dsn, 1, workers)
        begun = time.monotonic()
        wait_for(dsn, NUMBER // 4, workers)
        first.kill()
        wait_for(dsn, NUMBER // 2, workers)
        second.kill()
        for process in (first, second):
            process.wait()
        cut = asked(dsn, "SELECT count(*) FROM reconciler_fleet.procrastinate_jobs WHERE status = 'doing'")[0][0]
        assert cut > 0, "nobody was killed while looking"
        workers.start("--workers", "4")
        wait_for(dsn, NUMBER, workers)
        took = time.monotonic() - begun
        seen = Counter(row[0] for row in asked(dsn, "SELECT target FROM reconciler_fleet.result"))
        assert seen == Counter(shops.names)
        by = asked(dsn, "SELECT count(*) FROM reconciler_fleet.result GROUP BY worker ORDER BY 1")
        assert len(by) == 3
        told = shops.told("status", "--queue", dsn)
        assert told["finished_at"] is not None
        assert {(one["outcome"], one["message"]) for one in told["targets"]} == {("no_changes", "")}
    finally:
        workers.end()
    counts = ", ".join(str(row[0]) for row in by)
    note(capsys, f"{NUMBER} targets by three workers ({counts}), two of them killed in {cut} looks: {took:.1f} s")


def asked(dsn: str, query: LiteralString) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(query).fetchall()


def wait_for(dsn: str, number: int, workers: Workers) -> None:
    """Until so many targets were looked at."""
    ends = time.monotonic() + 120
    done = 0
    while done < number and time.monotonic() < ends:
        done = asked(dsn, "SELECT count(*) FROM reconciler_fleet.result")[0][0]
        time.sleep(0.05)
    assert done >= number, f"{done} of {number} after 120 s\n{workers.logs()}"


def test_a_rollout_stops_at_a_failure_and_resumes(shops: Shops, capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = shops.plan()
    assert shops.group(plan).names == tuple(shops.names)
    shops.approve(plan)
    broken = "shop-050"
    shops.sql(broken, "UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    begun = time.monotonic()
    done = shops.apply(plan, evidence="first")
    first = time.monotonic() - begun
    assert done.returncode == 4, done.stderr
    state = shops.rollout("first")
    waves = {one["name"]: one["wave"] for one in json.loads((shops.root / "first/rollout.json").read_text())["targets"]}
    assert Counter(waves.values()) == {1: 2, 2: 18, 3: 80, 4: 100}
    assert state[broken] == "failed"
    assert {state[name] for name, wave in waves.items() if wave < 3} == {"applied"}
    assert {state[name] for name, wave in waves.items() if wave > 3} == {"not_started"}
    applied = {name for name, word in state.items() if word == "applied"}
    assert 20 <= len(applied) < 100
    assert {name for name in shops.names if shops.entries(name)} == applied

    shops.sql(broken, "UPDATE app.settings SET value = '10' WHERE name = 'shop.limit'")
    done = shops.apply(plan, evidence="second")
    assert done.returncode == 0, done.stderr + done.stdout
    state = shops.rollout("second")
    assert {name for name, word in state.items() if word == "already"} == applied
    assert {word for name, word in state.items() if name not in applied} == {"applied"}
    assert [shops.entries(name) for name in shops.names] == [1] * NUMBER
    assert shops.nothing_left()
    note(
        capsys,
        f"{len(applied)} applied in {first:.1f} s before the failure, {first / len(applied):.2f} s for each, 4 workers",
        done.stdout.splitlines()[-1],
    )
