"""While an apply has its transaction open, whoever does not change what it changes never waits for it."""

from __future__ import annotations

import shutil
import threading
import time
from typing import TYPE_CHECKING, Self

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import approve as approvals
from reconciler import plan as planning
from tests.integration import governed
from tests.integration.phase2 import Phase2
from tests.servers import PROJECT

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.record import Request
    from tests.servers import Database

LIMIT = 60.0  # seconds within which a beat must have come
PATIENCE = "20ms"  # of a worker for a lock: every pause of the apply is longer
LOCKED = """
SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE a.application_name = 'reconciler apply' AND a.datname = current_database() AND l.locktype = 'transactionid'
"""


class Worker:
    """Somebody who does the same again and again in a thread; a wait for a lock ends it with an error."""

    def __init__(self, db: Database, statement: str, role: str) -> None:
        self._db, self._statement, self._role = db, statement, role
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.done = 0
        self.longest = 0.0
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        with psycopg.connect(self._db.dsn, autocommit=True, application_name="worker") as conn:
            conn.execute(f"SET lock_timeout = '{PATIENCE}'".encode())
            conn.execute(f"SET ROLE {self._role}".encode())
            try:
                while not self._over.wait(0.002):
                    begun = time.perf_counter()
                    conn.execute(self._statement.encode())
                    self.longest = max(self.longest, time.perf_counter() - begun)
                    self.done += 1
            except psycopg.Error as error:
                self.error = error

    def twice_more(self) -> None:
        """Wait until it has begun and ended its work once more: all of that while the caller does nothing."""
        wanted, deadline = self.done + 2, time.monotonic() + LIMIT
        while self.done < wanted:
            assert self.error is None, str(self.error)
            assert time.monotonic() < deadline
            time.sleep(0.002)


def applied_beside(request: Request, *workers: Worker, db: Database) -> int:
    """Apply, and pause before each step until every worker has worked. Returns at how many of them it held locks."""
    held = 0

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        nonlocal held
        del stage, detail, number, of
        held += db.execute(LOCKED)[0][0] > 0
        for worker in workers:
            worker.twice_more()

    done = applying.apply(request, progress)
    assert (done.outcome, done.problems) == ("applied", ())
    for worker in workers:
        assert worker.error is None, str(worker.error)
    return held


@pytest.mark.smoke
def test_callers_readers_and_writers_of_other_rows(db: Database, tmp_path: Path) -> None:
    """Of a function that is altered, of a gate that is changed, of the table that a marker goes to."""
    system = governed.shop(db, tmp_path)
    system.sql(
        "INSERT INTO app.heartbeat VALUES ('live', 'x', now(), 1)",
        "GRANT EXECUTE ON FUNCTION app.fn_total() TO {caller}",
        "GRANT SELECT ON app.settings TO {caller}",
        "GRANT SELECT, UPDATE ON app.heartbeat TO {caller}",
    )
    system.state["functions"]["app.fn_total()"]["execute"] = [system.caller]
    system.write()
    plan = system.plan()
    assert "marker.courier" in {change.address for change in plan.changes}
    with (
        Worker(
            db,
            "UPDATE app.heartbeat SET seen = clock_timestamp(), ticks = ticks + 1 WHERE worker = 'live'",
            system.caller,
        ) as beats,
        Worker(db, "SELECT app.fn_total(), value FROM app.settings WHERE name = 'shop.open'", system.caller) as calls,
    ):
        held = applied_beside(system.request(plan), beats, calls, db=db)
    assert held > 10
    assert beats.done >= 2 * held
    system.in_sync()


def test_a_live_worker_beats_through_the_whole_of_phase_3(dieu45: Database, tmp_path: Path) -> None:
    """By the function that it really calls, whose proofs run in the same apply; it is in no plan."""
    system = Phase2(dieu45, tmp_path)
    system.approve()
    system.apply()
    gates, governance = (system.state / name for name in ("gates.yaml", "governance.yaml"))
    kept = governance.read_text()
    shutil.copytree(PROJECT / "examples" / "dieu45" / "phase3", system.state, dirs_exist_ok=True)
    governance.write_text(kept.replace("release: phase2_governance", "release: phase3_route_pilot"))
    assert "phase3_route_pilot_dry_run" in gates.read_text()
    file = system.approve("Phase 3")
    plan, _ = planning.load(file)
    assert {change.kind for change in plan.changes} == {"function", "gate", "marker"}
    beat = "SELECT public.fn_queue_heartbeat_tick('live_worker', 'PG_worker')"
    with Worker(dieu45, beat, "worker") as worker:
        worker.twice_more()
        yes = [approvals.load(path) for path in approvals.all_beside(file)]
        request = applying.Request(dsn=dieu45.dsn, plan=plan, approvals=yes, folder=tmp_path / "run")
        held = applied_beside(request, worker, db=dieu45)
    assert held > 10
    ((ticks,),) = dieu45.execute("SELECT ticks_total FROM queue_heartbeat WHERE executor_name = 'live_worker'")
    assert ticks == worker.done
    print(f"{ticks} beats, the longest took {worker.longest * 1000:.1f} ms, at {held} steps with locks held")  # noqa: T201
    assert "No changes." in system.plan()
