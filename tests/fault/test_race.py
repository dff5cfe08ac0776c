"""Hostile sessions against an apply: nothing of theirs is overwritten or hidden, and none of them pays for a deadlock.

The harness is in race.py; here a short run of it, the proof that it bites, and one test for every way to be in the way.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import psycopg
import pytest
from psycopg.rows import dict_row

from reconciler import apply as applying
from reconciler import pg, waits
from reconciler.errors import Locked, ReconcilerError, Stale
from reconciler.waits import Waits
from tests import sampling, servers
from tests.fault.duel import ENDED, SERVER, Point, Schedule, Stepping, duel_on
from tests.fault.race import Tally, locked_by, rounds
from tests.fault.rivals import RIVALS
from tests.integration import governed
from tests.integration.governed import image
from tests.integration.phase2 import Phase2
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.model import Approval, Outcome, Plan
    from tests.fault.duel import Duel, Round
    from tests.integration.governed import Governed
    from tests.servers import Server

BY_NAME = {rival.name: rival for rival in RIVALS}
LIMIT = 60.0  # seconds within which whatever a test waits for must have happened


@pytest.fixture(scope="module")
def duel(run_directory: Path, new_name: Callable[[], str]) -> Iterator[Duel]:
    """A duel on a server of its own, for all tests of this file that a worker runs."""
    kind = os.environ.get("RECONCILER_TEST_SERVER", "embedded")
    server = servers.start(run_directory / new_name(), kind, SERVER)
    with duel_on(server, "race") as one:
        yield one
    server.cluster.stop()


def points(duel: Duel, stage: str) -> list[Point]:
    return [point for point in duel.points if point.stage == stage]


def tally(played: Iterator[Round]) -> Tally:
    total = Tally()
    for one in played:
        total.add(one)
    return total


# ------------------------------------------------------------------------------------------------------ the harness


@pytest.mark.smoke
@pytest.mark.matrix
def test_nothing_is_lost_in_a_short_race(duel: Duel) -> None:
    """Every rival once, at a moment of chance; `make race` has thousands of rounds."""
    total = tally(rounds(duel, RIVALS, len(RIVALS), seed=20260522))
    assert (total.lost, total.errors, total.victims) == ([], [], 0)
    assert total.total("applied") > 0
    assert total.total("stale") > 0


@pytest.mark.slow
def test_nothing_is_lost_in_a_race(duel: Duel) -> None:
    total = tally(rounds(duel, RIVALS, 10 * len(RIVALS), seed=1))
    assert (total.lost, total.errors, total.victims) == ([], [], 0)


AT_EVERY_STEP = (
    "replaced function: cost",
    "replaced function: comment",
    "granted function: depends",
    "routines: drop schema cascade",
    "row: flip another",
)


def at_every_step(duel: Duel, name: str, *stages: str) -> Iterator[Round]:
    """The whole transaction of a rival before each statement of these stages."""
    rival = BY_NAME[name]
    for point in duel.points:
        if point.stage in stages:
            yield duel.play(rival, Schedule(points=(point,) * (len(rival.statements) + 1)))


@pytest.mark.parametrize("name", sampling.slow(AT_EVERY_STEP, 3))
def test_nothing_is_lost_before_any_statement_of_the_locks(duel: Duel, name: str) -> None:
    total = tally(at_every_step(duel, name, "lock"))
    assert (total.lost, total.errors, total.victims) == ([], [], 0)
    assert total.rounds > 10


@pytest.mark.parametrize(
    ("locks", "name", "stage"),
    [
        ("none", "replaced function: cost", "execute"),
        ("none", "replaced function: comment", "commit"),
        ("own-value", "replaced function: cost", "lock"),
        ("own-value", "row: flip another", "lock"),
        ("own-value", "replaced function: comment", "commit"),
    ],
)
def test_the_harness_bites(duel: Duel, locks: str, name: str, stage: str) -> None:
    """Without locks, and with locks that write back a value read before, the same rounds do lose updates."""
    with locked_by(locks):
        lost = next((round_ for round_ in at_every_step(duel, name, stage) if round_.lost), None)
    assert lost is not None
    assert not duel.play(lost.rival, lost.schedule).lost


def test_a_schema_that_is_dropped_takes_its_new_function_with_it(duel: Duel) -> None:
    """CREATE FUNCTION has locked its schema since 18.6 or a little before; older servers leave it in no schema."""
    with duel.db.conn.transaction(force_rollback=True):
        duel.db.execute("CREATE FUNCTION spare.one() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
        held = duel.db.execute(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND objid = 'spare'::regnamespace)"
        )
    rival = BY_NAME["routines: drop schema cascade"]
    late = Schedule(points=(points(duel, "record")[0],) * 2)
    with locked_by("none"):
        lost = duel.play(rival, late).lost
    assert ("no schema.fn_new" in lost) is not held[0][0]
    again = duel.play(rival, late)
    assert (again.apply, again.rival_end, again.lost) == ("applied", "committed", "")


# -------------------------------------------------------------------------------------------------------- deadlocks

CROSSWISE = {
    "crosswise: new key, row": "gate.shop.till",
    "crosswise: new function, function": "function.app.fn_new()",
    "crosswise: marker, row": "marker.courier",
}


def crossed(duel: Duel, name: str) -> Round:
    """The rival holds what the apply will create, and has waited for a while for what the apply holds.

    Then the apply closes the circle, when the rival has waited longer than what deadlock_timeout has more than
    lock_timeout.
    """
    rival, ready = BY_NAME[name], Waits.ready

    def late(self: Waits, conn: pg.Connection, **options: Any) -> None:
        if duel.doing == CROSSWISE[name]:
            duel.let(1)
            time.sleep(0.4)
        ready(self, conn, **options)

    never = Point("never", 0)
    with mock.patch.object(Waits, "ready", late):
        return duel.play(rival, Schedule(points=(points(duel, "check")[0], never, ENDED)))


@pytest.mark.parametrize("name", CROSSWISE)
def test_the_apply_gives_way_to_who_has_waited_for_it(duel: Duel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half a second for a busy machine, between the look who waits for us and our own wait, instead of 0.2.
    monkeypatch.setattr(waits, "MARGIN", 0.5)
    round_ = crossed(duel, name)
    assert (round_.apply, round_.rival_end, round_.lost) == ("locked", "committed", "")


@pytest.mark.parametrize("name", CROSSWISE)
def test_a_lock_timeout_below_deadlock_timeout_alone_makes_the_application_pay(duel: Duel, name: str) -> None:
    """Why waits are measured: the rival began to wait first, so its deadlock_timeout ends first.

    Once is enough: on a busy machine the circle may be closed too late for that.
    """
    with mock.patch.object(Waits, "_allowed", lambda self: self._limit):
        assert any(crossed(duel, name).rival_end == "40P01" for _ in range(5))


# ---------------------------------------------------------------------------------------------------- who is in the way


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path, {"lock_timeout": "1200ms", "lock_retries": 0})


def both(system: Governed) -> tuple[Plan, Approval]:
    plan = system.plan()
    return plan, system.approve(plan)


def refused(system: Governed, plan: Plan, approval: Approval) -> ReconcilerError:
    """An apply that exits 4 and changes nothing."""
    before = image(system.db)
    with pytest.raises(ReconcilerError) as raised:
        system.apply(plan, [approval])
    assert image(system.db) == before
    assert raised.value.exit_code == 4, raised.value.message
    return raised.value


@contextmanager
def rival(db: Database, *statements: str) -> Iterator[psycopg.Connection[Any]]:
    """A session with an open transaction in which these ran."""
    with psycopg.connect(db.dsn, application_name="billing") as conn:
        for statement in statements:
            conn.execute(statement.encode())
        yield conn
        conn.rollback()


def until(system: Governed, query: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not system.db.execute(query)[0][0]:
        assert time.monotonic() < deadline, f"never true: {query}"
        time.sleep(0.02)


WAITS = (
    "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
    " AND application_name = 'reconciler apply' AND wait_event_type = 'Lock')"
)

HOLDERS = {
    "row": ("UPDATE app.settings SET value = 'sesame' WHERE name = 'shop.open'", "locking gate.shop.open"),
    "table": ("LOCK TABLE app.settings IN SHARE MODE", "locking gate."),
    "routine": ("COMMENT ON FUNCTION app.fn_total() IS 'sesame'", "locking function.app.fn_total()"),
    "its catalog row": ("ALTER FUNCTION app.fn_total() COST 7", "locking function.app.fn_total()"),
    "a new key": ("INSERT INTO app.settings VALUES ('shop.till', 'sesame')", "gate.shop.till"),
    "a new routine": (
        "CREATE FUNCTION app.fn_greet(text, integer) RETURNS text LANGUAGE sql AS 'SELECT $1'",
        "function.app.fn_greet(text, integer)",
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize(("statement", "what"), HOLDERS.values(), ids=HOLDERS.keys())
def test_who_holds_what_is_named_in_one_sentence(system: Governed, statement: str, what: str) -> None:
    plan, approval = both(system)
    with rival(system.db, statement) as conn:
        error = refused(system, plan, approval)
        assert isinstance(error, Locked)
        holder = (
            f"held by process {conn.info.backend_pid}, role postgres, billing, idle in transaction, its transaction"
        )
        assert what in error.message
        assert "lock timeout (SQLSTATE 55P03)" in error.message
        assert f"{holder} open for " in error.message
        assert "\n" not in error.message
        assert "sesame" not in f"{error.message}{error.details}{error.hint}"  # never what it runs
    system.apply(plan, [approval])
    system.in_sync()


def test_who_holds_a_table_that_is_only_read_is_named_too(system: Governed) -> None:
    plan, approval = both(system)
    with rival(system.db, "LOCK TABLE app.job IN ACCESS EXCLUSIVE MODE") as conn:
        with pytest.raises(Locked) as raised:
            system.apply(plan, [approval])
        assert "invariant.no-blank-actor" in raised.value.message
        assert f"held by process {conn.info.backend_pid}" in raised.value.message
    system.apply(plan, [approval])
    system.in_sync()


def test_several_holders_are_all_named(system: Governed) -> None:
    plan, approval = both(system)
    shared = "LOCK TABLE app.settings IN SHARE MODE"
    with rival(system.db, shared) as one, rival(system.db, shared) as two:
        message = refused(system, plan, approval).message
        for conn in (one, two):
            assert f"process {conn.info.backend_pid}, role postgres, billing" in message


def test_a_prepared_transaction_has_no_process(own_server: Callable[..., Server], tmp_path: Path) -> None:
    server = own_server(max_prepared_transactions="5")
    db = Database(server, "postgres")
    system = governed.shop(db, tmp_path, {"lock_timeout": "1200ms", "lock_retries": 0})
    plan, approval = both(system)
    with psycopg.connect(db.dsn, autocommit=True) as conn:
        conn.execute(f"BEGIN; {HOLDERS['row'][0]}; PREPARE TRANSACTION 'nightly'".encode())
        assert "held by a prepared transaction (see pg_prepared_xacts)" in refused(system, plan, approval).message
        conn.execute("ROLLBACK PREPARED 'nightly'")
    system.apply(plan, [approval])
    db.conn.close()


def test_what_a_role_may_not_see_of_a_holder_is_said(system: Governed) -> None:
    role = system.db.role()
    with (
        rival(system.db, "SELECT FROM app.settings WHERE name = 'shop.open' FOR UPDATE") as conn,
        pg.connect(system.db.dsn_as(role), "watch") as eye,
    ):
        (told,) = waits.people(eye, [conn.info.backend_pid])
        assert told == f"process {conn.info.backend_pid}, role postgres, billing, its state hidden from this role"
    with pg.connect(system.db.dsn, "watch") as eye:
        assert waits.people(eye, [2**30]) == (f"process {2**30}, which has ended meanwhile",)


def test_a_holder_whose_time_is_over_does_not_stay_named(db: Database, tmp_path: Path) -> None:
    """Waited for in the beginning, gone since: what goes wrong later is not its fault."""
    system = governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": 0})
    system.sql("ALTER TABLE app.settings ADD CHECK (value <> 'two')")
    plan, approval = both(system)
    with rival(db, HOLDERS["row"][0]) as conn, ThreadPoolExecutor(1) as pool:
        running = pool.submit(system.apply, plan, [approval])
        until(system, WAITS)
        time.sleep(4 * waits.LONG)
        conn.rollback()
        error = running.exception(LIMIT)
    assert isinstance(error, ReconcilerError)
    assert "violates check constraint" in error.message
    assert "held by" not in error.message


def test_a_statement_timeout_that_ends_in_a_wait_is_a_lock(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": 0, "statement_timeout": "3s"})
    plan, approval = both(system)
    with rival(db, HOLDERS["row"][0]) as conn:
        error = refused(system, plan, approval)
        assert isinstance(error, Locked)
        assert f"(SQLSTATE 57014); held by process {conn.info.backend_pid}" in error.message


def test_the_apply_as_the_victim_of_a_deadlock(db: Database, tmp_path: Path) -> None:
    """Only a lock_timeout above deadlock_timeout lets it come to that, and here the other one never looks."""
    system = governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": 0})
    # Long enough for somebody to look whom it waits for.
    system.sql(f"ALTER DATABASE {db.name} SET deadlock_timeout = '3s'")
    plan, approval = both(system)
    with rival(db, "SET deadlock_timeout = '10min'", HOLDERS["a new key"][0]) as conn, ThreadPoolExecutor(2) as pool:
        reached, go = threading.Event(), threading.Event()

        def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
            del detail, number, of
            if stage == "read":
                reached.set()
                go.wait(LIMIT)

        running = pool.submit(applying.apply, system.request(plan, [approval]), progress)
        assert reached.wait(LIMIT)
        waiting = pool.submit(conn.execute, HOLDERS["row"][0].encode())
        until(system, f"SELECT EXISTS (SELECT FROM pg_locks WHERE pid = {conn.info.backend_pid} AND NOT granted)")
        go.set()
        error = running.exception(LIMIT)
        waiting.result(LIMIT)
        assert isinstance(error, Locked)
        assert error.exit_code == 4
        assert "deadlock detected (SQLSTATE 40P01)" in error.message
        assert f"held by process {conn.info.backend_pid}, role postgres, billing" in error.message
        assert any(f"blocked by process {conn.info.backend_pid}" in line for line in error.details)
    system.apply(plan, [approval])
    system.in_sync()


def test_a_serialization_failure_is_refused(system: Governed) -> None:
    """An apply never has one of its own, being READ COMMITTED; a trigger that reaches elsewhere may."""
    system.sql(
        "CREATE FUNCTION public.fails() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE serialization_failure USING MESSAGE = 'could not serialize access'; END$$",
        "CREATE TRIGGER fails BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION public.fails()",
    )
    error = refused(system, *both(system))
    assert isinstance(error, Locked)
    assert error.message == "gate.shop.open: could not serialize access (SQLSTATE 40001)"
    system.sql("DROP TRIGGER fails ON app.settings")
    system.settle()


MEANWHILE = {
    "changed": ("ALTER FUNCTION app.fn_total() COST 7", "function.app.fn_total(): the live cost changed"),
    "changed and changed back": ("ALTER FUNCTION app.fn_total() COST 100", None),
    "dropped": ("DROP FUNCTION app.fn_total()", "function.app.fn_total() is no longer there"),
}


@pytest.mark.parametrize(("statement", "said"), MEANWHILE.values(), ids=MEANWHILE.keys())
@pytest.mark.parametrize("retries", [0, 1])
def test_tuple_concurrently_updated(
    db: Database, tmp_path: Path, statement: str, said: str | None, retries: int
) -> None:
    """Read again, it is told what changed; or nothing did, and the apply goes on."""
    system = governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": retries})
    plan, approval = both(system)
    with rival(db, statement) as conn, ThreadPoolExecutor(1) as pool:
        running = pool.submit(system.apply, plan, [approval])
        until(system, WAITS)
        conn.commit()
        if said is None and retries:
            running.result(LIMIT)
            system.in_sync()
            return
        error = running.exception(LIMIT)
    assert isinstance(error, Stale)
    told = "\n".join([error.message, *error.details])
    if retries or "DROP" in statement:
        assert said is not None
        assert said in told
    else:
        assert "locking function.app.fn_total(): tuple concurrently updated (SQLSTATE XX000)" in error.message
    assert system.entries() == 0


# ---------------------------------------------------------------------------------------------------- who is not in it


def test_a_foreign_key_to_a_gate_does_not_wait_for_the_apply_nor_the_apply_for_it(system: Governed) -> None:
    system.sql("CREATE TABLE app.uses (gate text REFERENCES app.settings, id bigint)")
    plan, approval = both(system)
    seen: list[str] = []

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, of
        seen.append(stage)
        with psycopg.connect(system.db.dsn, options="-c lock_timeout=1ms", autocommit=True) as conn:
            conn.execute("INSERT INTO app.uses VALUES ('shop.open', %s)", [number])

    with rival(system.db, "INSERT INTO app.uses VALUES ('shop.open', 0), ('shop.limit', 0)"):
        applying.apply(system.request(plan, [approval]), progress)
    assert {"lock", "read", "execute", "verify", "record", "commit"} <= set(seen)
    system.in_sync()


def test_a_row_that_is_taken_away_waits_for_a_foreign_key(system: Governed) -> None:
    """Its key goes, so whoever has just referred to it must be done first."""
    system.settle()
    system.sql("CREATE TABLE app.uses (gate text REFERENCES app.settings, id bigint)")
    system.state["gates"]["shop.limit"] = {"retire": "Nobody asks for it any more."}
    plan, approval = both(system.write())
    with rival(system.db, "INSERT INTO app.uses VALUES ('shop.limit', 0)") as conn:
        error = refused(system, plan, approval)
        assert f"held by process {conn.info.backend_pid}" in error.message
    system.apply(plan, [approval])
    system.in_sync()


def test_a_live_worker_ticks_on_while_phase_2_changes_around_it(dieu45: Database, tmp_path: Path) -> None:
    """Before every statement of an apply that replaces the tick itself and a gate, and puts a marker beside its row."""
    work = Phase2(dieu45, tmp_path)
    work.approve()
    work.apply()
    tick = "functions/fn_queue_heartbeat_tick.sql"
    work.edit(tick, "-- Only the word true opens a gate", "-- Nothing but the word true opens a gate")
    work.edit("gates.yaml", 'value: "300"', 'value: "299"')
    dieu45.execute("DELETE FROM public.queue_heartbeat WHERE executor_name = 'iu_outbound_default'")
    work.approve("Once more")
    beats = 0
    worker: psycopg.Connection[Any] = psycopg.connect(
        dieu45.dsn, autocommit=True, options="-c lock_timeout=1ms -c role=worker"
    )

    def beat() -> None:
        nonlocal beats
        beats += 1
        answer = worker.execute("SELECT public.fn_queue_heartbeat_tick('w1', 'PG_worker')").fetchone()
        assert answer is not None
        assert answer[0]["ticks_total"] == beats

    def lent(dsn: str | None, command: str) -> pg.Connection:
        if command != "apply":
            return connect(dsn, command)
        conn = Stepping.connect(dsn or "", autocommit=True, prepare_threshold=None, row_factory=dict_row)
        conn.before = beat
        open_.append(conn)
        return conn

    connect, open_ = pg.connect, [worker]
    with mock.patch.object(pg, "connect", lent):
        work.run("apply", work.file)
    assert beats > 500
    for conn in open_:
        conn.close()
    assert "No changes." in work.plan()


# ------------------------------------------------------------------------------------------------------------- many


@pytest.mark.parametrize("first", sampling.slow([True, False], 2), ids=["first apply", "later apply"])
def test_of_fifty_applies_of_one_plan_one_commits(db: Database, tmp_path: Path, first: bool) -> None:
    """Fifty threads, each with connections of its own, begin at the same moment."""
    system = governed.shop(db, tmp_path)
    if not first:
        system.settle()
        system.sql(
            "ALTER FUNCTION app.fn_total() COST 7", "UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'"
        )
    entries = system.entries()
    plan, approval = both(system)
    start = threading.Barrier(50)

    def once() -> Outcome | ReconcilerError:
        start.wait(LIMIT)
        try:
            return system.apply(plan, [approval])
        except ReconcilerError as error:
            return error

    with ThreadPoolExecutor(50) as pool:
        ends = [future.result(120) for future in [pool.submit(once) for _ in range(50)]]
    losers = [end for end in ends if isinstance(end, ReconcilerError)]
    assert [end.outcome for end in ends if not isinstance(end, ReconcilerError)] == ["applied"]
    assert {loser.exit_code for loser in losers} == {4}, {loser.message for loser in losers}
    assert system.entries() == entries + 1
    system.in_sync()
