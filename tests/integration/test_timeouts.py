"""Whatever is in its way, an apply gives up in time, has changed nothing, says what it waited for, and works next time.

What is in the way here is real: transactions that stay open, statements that sleep, a backend that is stopped, a line
on which nothing comes. The role has no more than an apply needs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import evidence as evidences
from reconciler import pg
from reconciler import settle as settling
from reconciler.errors import Locked, OutcomeUnknown, ServerProblem
from tests.fault.proxy import Proxy
from tests.integration import governed
from tests.integration.governed import applier, command, image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reconciler.model import Plan
    from tests.fault.proxy import Line, Moment
    from tests.integration.governed import Governed
    from tests.servers import Database

LIMIT = 50.0  # seconds within which whatever a test waits for must have happened
FOREVER = 600  # seconds that an obstacle stays: whoever waits for its end has failed
LONG = {"lock_timeout": "60s", "lock_retries": 0, "statement_timeout": "60s", "max_duration": "100s"}
BACKEND = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'reconciler apply'"
)

HOLDS = {
    "row of a gate": ("UPDATE app.settings SET value = 'mine' WHERE name = 'shop.open'", "gate.shop.open"),
    "function": ("ALTER FUNCTION app.fn_total() COST 7", "function.app.fn_total()"),
}


@contextmanager
def holding(system: Governed, statement: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of somebody else, idle and open until the end of the block."""
    with psycopg.connect(system.db.dsn, application_name="long") as conn:
        conn.execute(statement.encode())
        yield conn
        conn.rollback()


class Clock:
    """What our side takes for the time, so that a busy machine changes nothing but how long a test takes."""

    def __init__(self) -> None:
        self._real = time.monotonic
        self._begun = self._real()
        self._ahead = 0.0

    def now(self) -> float:
        return self._real() + self._ahead

    def nearly_over(self) -> None:
        """From here on there is about a second left of the max_duration of an apply that began after this clock."""
        self._ahead = max(0.0, self._begun + 99 - self._real())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.now)
    return made


def until(found: Callable[[], Any], what: str) -> Any:
    """Wait until it gives something, and return that."""
    deadline = time.perf_counter() + LIMIT
    while not (value := found()):
        assert time.perf_counter() < deadline, f"never: {what}"
        time.sleep(0.02)
    return value


def saved(system: Governed) -> Plan:
    plan = system.plan()
    system.save(plan, system.approve(plan))
    return plan


def apply_as(system: Governed, role: str, *more: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command as this role, and its seconds."""
    begun = time.perf_counter()
    done = command("apply", system.plan_file, "--initialize", "--dsn", system.db.dsn_as(role), *more)
    return done, time.perf_counter() - begun


def works_now(system: Governed, plan: Plan, role: str) -> None:
    """The next run, with nothing in the way."""
    system.apply(plan, dsn=system.db.dsn_as(role))
    system.in_sync()


# --------------------------------------------------------------------------------------------------- a long transaction


@pytest.mark.smoke
@pytest.mark.parametrize(("statement", "address"), HOLDS.values(), ids=HOLDS.keys())
def test_behind_a_long_transaction(db: Database, tmp_path: Path, statement: str, address: str) -> None:
    system = governed.shop(db, tmp_path, {"lock_timeout": "1200ms", "lock_retries": 1})
    role = applier(system)
    plan = saved(system)
    before = image(db)
    with holding(system, statement) as conn:
        done, seconds = apply_as(system, role, "--evidence", tmp_path / "run")
        # Twice 1.2 s and a pause; the rest is the machine's. Each leaves a second for whoever looks who is in the way.
        assert 2.4 <= seconds < LIMIT
        assert (done.returncode, done.stdout) == (4, "")
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert f"{address}: " in said
        assert "canceling statement due to lock timeout (SQLSTATE 55P03)" in said
        assert f"held by process {conn.info.backend_pid}, role postgres, long, its state hidden from this role" in said
        assert any("lock: attempt 2 of 2" in line for line in done.stderr.splitlines())
        assert "Nothing was changed." in done.stderr
        assert image(db) == before
    assert evidences.load(tmp_path / "run").outcome == "locked"
    works_now(system, plan, role)


def test_between_two_attempts_it_holds_nothing_and_then_it_goes_on(db: Database, tmp_path: Path) -> None:
    """The obstacle goes away while the apply pauses; whoever waited for what the apply had locked gets it first."""
    system = governed.shop(db, tmp_path, {"lock_timeout": "400ms", "lock_retries": 3})
    role = applier(system)
    plan = saved(system)
    with holding(system, HOLDS["row of a gate"][0]) as conn:

        def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
            del number, of
            if stage == "lock" and detail.startswith("attempt 2"):
                # fn_total() comes before the gate, so the first attempt had locked it.
                with psycopg.connect(db.dsn) as other:
                    other.execute("SET lock_timeout = '1ms'")
                    other.execute("ALTER FUNCTION app.fn_total() COST 100")
                    other.rollback()
                conn.rollback()

        done = applying.apply(system.request(plan, dsn=db.dsn_as(role)), progress)
    assert done.outcome == "applied"
    system.in_sync()


# ---------------------------------------------------------------------------------------------- a statement that sleeps


def sleepy(system: Governed) -> None:
    """Whoever opens the shop sleeps first."""
    system.sql(
        "CREATE FUNCTION public.sleeps() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN PERFORM pg_catalog.pg_sleep({FOREVER}); RETURN NEW; END$$",
        "CREATE TRIGGER sleeps BEFORE UPDATE ON app.settings FOR EACH ROW WHEN (NEW.name = 'shop.open')"
        " EXECUTE FUNCTION public.sleeps()",
    )


def awake(system: Governed) -> None:
    system.sql("DROP TRIGGER sleeps ON app.settings", "DROP FUNCTION public.sleeps()")


@pytest.mark.smoke
def test_a_statement_that_sleeps_runs_into_its_time_out(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path, {"statement_timeout": "700ms"})
    role = applier(system)
    sleepy(system)
    plan = saved(system)
    before = image(db)
    done, seconds = apply_as(system, role)
    assert seconds < LIMIT
    assert (done.returncode, done.stdout) == (1, "")
    said = "Error: gate.shop.open: canceling statement due to statement timeout (SQLSTATE 57014)"
    assert said in done.stderr.splitlines()
    assert "The statement ran into its time-out. Nothing was changed." in done.stderr
    assert image(db) == before
    awake(system)
    works_now(system, plan, role)


SLEEPS_WHEN_SLOW = """
CREATE FUNCTION app.tired(text) RETURNS boolean LANGUAGE plpgsql VOLATILE AS
$$BEGIN IF $1 = 'slow' THEN PERFORM pg_catalog.pg_sleep(600); END IF; RETURN false; END$$;
CREATE VIEW app.slow AS SELECT id FROM app.job WHERE app.tired(actor);
ALTER VIEW app.slow OWNER TO {owner};
GRANT SELECT ON app.slow TO PUBLIC;
"""
SLOW = "INSERT INTO app.job VALUES (1, 'slow')"


def ends_in_time(
    system: Governed, role: str, clock: Clock, stage: str, obstacle: Callable[[], object]
) -> tuple[Locked, Plan]:
    """An apply that meets the obstacle at this stage, where max_duration is nearly over, ends when it is."""
    plan = system.plan()
    wanted, met = stage, list[str]()

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, of
        if (f"{stage} {number}" if number else stage) == wanted and not met:
            met.append(stage)
            clock.nearly_over()
            obstacle()

    begun = time.perf_counter()
    with pytest.raises(Locked) as raised:
        applying.apply(system.request(plan, dsn=system.db.dsn_as(role)), progress)
    assert time.perf_counter() - begun < LIMIT
    assert met
    assert raised.value.exit_code == 4
    assert f"max_duration 100s and was rolled back while it was at: {stage.partition(' ')[0]}" in raised.value.message
    assert raised.value.hint.startswith("Nothing was changed. ")
    return raised.value, plan


def test_max_duration_ends_a_statement(db: Database, tmp_path: Path, clock: Clock) -> None:
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    sleepy(system)
    before = image(db)
    _, plan = ends_in_time(system, role, clock, "execute 1", lambda: None)
    assert image(db) == before
    awake(system)
    works_now(system, plan, role)


def test_max_duration_ends_a_wait_for_a_lock(db: Database, tmp_path: Path, clock: Clock) -> None:
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    before = image(db)
    with holding(system, HOLDS["row of a gate"][0]) as conn:
        error, plan = ends_in_time(system, role, clock, "lock", lambda: None)
        assert f"; held by process {conn.info.backend_pid}, role postgres, long" in error.message
        assert image(db) == before
    works_now(system, plan, role)


@pytest.mark.parametrize("what", ["an invariant", "a query of a proof", "the statement of a proof"])
def test_max_duration_ends_what_is_judged(db: Database, tmp_path: Path, clock: Clock, what: str) -> None:
    """They have time-outs of their own, longer than what is left; and a check that failed is no verdict on the rest."""
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    system.sql(SLEEPS_WHEN_SLOW)
    looking = "SELECT id FROM app.slow"
    if what == "an invariant":
        for number in range(5):  # each may take 5 s
            system.state["invariants"][f"slow-{number}"] = {"query": looking, "rows": 0}
    else:
        asked = what == "a query of a proof"
        system.state["proofs"] = {
            f"slow-{number}": {
                "reason": "It sleeps.",
                "when": "SELECT 1 AS one" if asked else "SELECT id FROM app.slow",
                "then": [{"query": looking, "rows": 0}] if asked else [{"returns": []}],
            }
            for number in range(5)
        }
    system.write()
    before = image(db)
    _, plan = ends_in_time(system, role, clock, "judge", lambda: system.sql(SLOW))
    system.sql("DELETE FROM app.job")
    assert image(db) == before
    works_now(system, plan, role)


# ---------------------------------------------------------------------------------------- a server that stops answering


@contextmanager
def stopped(db: Database) -> Iterator[Callable[[], None]]:
    """`stop()` stops the backend of the apply, between two statements; at the end of the block it goes on."""
    pids: list[int] = []

    def stop() -> None:
        ((pid,),) = db.execute(BACKEND)
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)

    try:
        yield stop
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def gone(db: Database) -> None:
    until(lambda: not db.execute(BACKEND), "the backend of the apply has ended")


@pytest.mark.parametrize("stage", ["lock", "read", "execute 9", "verify", "judge", "record"])
def test_a_backend_that_is_stopped(
    db: Database, tmp_path: Path, clock: Clock, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not even hear that it is to stop; so it is left, and rolls back when it wakes up."""
    monkeypatch.setattr(pg, "GRACE", 0.3)
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    before = image(db)
    with stopped(db) as stop:
        _, plan = ends_in_time(system, role, clock, stage, stop)
        if stage != "lock":  # there it has the lock not yet
            with pytest.raises(Locked, match=r"Another apply of shop is running"):
                system.apply(plan, dsn=db.dsn_as(role))
    gone(db)
    assert image(db) == before
    works_now(system, plan, role)


def test_a_line_on_which_nothing_comes(
    db: Database, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network swallows a statement and every request to cancel it; both ends of the line stay open."""
    monkeypatch.setattr(pg, "GRACE", 0.3)
    system = governed.shop(db, tmp_path, LONG)
    plan = system.plan()
    before = image(db)
    over = threading.Event()

    def swallow(moment: Moment, line: Line) -> None:
        if moment.when == "before" and moment.text.startswith("UPDATE"):
            proxy.refusing = True
            clock.nearly_over()
            over.wait(LIMIT)
            line.cut()

    with Proxy(db.server, swallow) as proxy:
        begun = time.perf_counter()
        with pytest.raises(Locked, match="max_duration 100s and was rolled back while it was at: execute"):
            system.apply(plan, dsn=proxy.dsn(db.name))
        assert time.perf_counter() - begun < LIMIT
        over.set()
    gone(db)
    assert image(db) == before
    system.apply(plan)
    system.in_sync()


@pytest.mark.parametrize("arrived", [True, False])
def test_a_commit_without_an_answer_is_asked_after(
    db: Database, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, *, arrived: bool
) -> None:
    """max_duration does not end COMMIT, which nobody can take back; but nobody waits for its answer for ever."""
    monkeypatch.setattr(pg, "GRACE", 0.3)
    monkeypatch.setattr(applying, "COMMITTING", 0.5)
    monkeypatch.setattr(settling, "PATIENCE", 0.5)
    system = governed.shop(db, tmp_path, LONG)
    plan = system.plan()
    before = image(db)
    over = threading.Event()

    def swallow(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("after" if arrived else "before", "COMMIT"):
            over.wait(2 * LIMIT)
            line.cut()

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, number, of
        if stage == "commit":
            clock.nearly_over()

    with Proxy(db.server, swallow) as proxy:
        request = system.request(plan, dsn=proxy.dsn(db.name))
        begun = time.perf_counter()
        if arrived:
            done = applying.apply(request, progress)
            assert done.problems[0] == "the answer to COMMIT was lost; the ledger says that it was committed"
        else:
            with pytest.raises(OutcomeUnknown) as raised:
                applying.apply(request, progress)
            assert "is still open in process" in " ".join(raised.value.details)
        assert time.perf_counter() - begun < LIMIT
        over.set()
    gone(db)
    if not arrived:
        assert image(db) == before
        system.apply(plan)
    system.in_sync()


def counted(conn: pg.Connection, stop: Callable[[], None]) -> None:
    with pg.snapshot(conn, 3000):
        stop()
        pg.rows(conn, "SELECT 1 AS one", doing="counting to one")


def test_a_plan_does_not_wait_for_ever(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pg, "GRACE", 0.3)
    conn = pg.connect(db.dsn, "apply")
    with stopped(db) as stop:
        begun = time.perf_counter()
        with pytest.raises(ServerProblem) as raised:
            counted(conn, stop)
        assert time.perf_counter() - begun < LIMIT
    assert raised.value.message == (
        "counting to one: the connection was lost: no answer within 3 s (SQLSTATE no SQLSTATE)"
    )
    assert conn.closed
    gone(db)


def test_a_statement_that_answers_in_its_last_moment_is_not_lost(
    db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request to stop comes too late: what was done was done."""
    monkeypatch.setattr(pg, "GRACE", LIMIT)
    with pg.connect(db.dsn, "apply") as conn:
        answer = {"one": 1}
        deaf = pg.Limit(time.monotonic() + 98, lambda: AssertionError("over"), kindly=False)
        # It sleeps for longer than a look at the clock takes to come round, and then its time has long been over.
        passing = threading.Thread(target=lambda: (until(at(db, "PgSleep"), "it sleeps"), clock.nearly_over()))
        passing.start()
        with pg.within(conn, deaf):
            assert pg.rows(conn, "SELECT 1 AS one FROM pg_sleep(1)") == [answer]
            passing.join()
            with pytest.raises(AssertionError, match="over"):
                pg.rows(conn, "SELECT 2 AS two")  # not even sent
        assert pg.rows(conn, "SELECT 1 AS one") == [answer]


def test_a_host_that_answers_to_nothing(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pg.NETWORK, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        begun = time.perf_counter()
        dsn = f"postgresql://postgres@127.0.0.1:{deaf.getsockname()[1]}/app"
        done = command("plan", "-s", governed.shop(db, tmp_path).directory, "--dsn", dsn)
        assert time.perf_counter() - begun < LIMIT
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: Cannot connect to PostgreSQL: ")
    assert "timeout" in done.stderr


def test_a_peer_that_is_gone_is_noticed(db: Database) -> None:
    """By the kernel, on an idle connection (keepalive) and when what was sent is not acknowledged (user timeout)."""
    with pg.connect(db.server.tcp(db.name), "apply") as conn:
        one = socket.socket(fileno=os.dup(conn.fileno()))
        with one:
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            found = [
                one.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            ]
    assert found == [10, 5, 3, 25_000]


# ---------------------------------------------------------------------------------------------- a client that is frozen


@contextmanager
def started(system: Governed, role: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    words = [program, "apply", system.plan_file, "--initialize", "--dsn", system.db.dsn_as(role)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def at(db: Database, event: str) -> Callable[[], list[tuple[Any, ...]]]:
    """Does the backend of the apply wait for this?"""
    return lambda: db.execute(f"{BACKEND} AND wait_event = %s", [event])


# What holds a lock has a transaction; a failed one keeps its session, and nothing else.
OPEN = f"SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND pid IN ({BACKEND})"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["idle", "in a statement", "in a proof"])
def test_the_server_ends_what_a_frozen_client_left_open(db: Database, tmp_path: Path, where: str) -> None:
    """Nobody is there to end it at max_duration (10 s): the server does, idle at once, in a statement 5 s later."""
    system = governed.shop(db, tmp_path, {**LONG, "max_duration": "10s"})
    role = applier(system)
    if where == "in a proof":
        if db.server.major < 17:
            # Without transaction_timeout it is the statement's own time-out.
            system.state["governance"]["apply"]["statement_timeout"] = "12s"
        system.state["proofs"] = {
            "sleeps": {"reason": "It sleeps.", "when": "SELECT pg_catalog.pg_sleep(60)", "then": [{"returns": []}]}
        }
        system.write()
    if where == "in a statement":
        sleepy(system)
    saved(system)
    before = image(db)
    held = holding(system, HOLDS["row of a gate"][0]) if where == "idle" else None
    with started(system, role) as process:
        if held is not None:
            with held:
                until(at(db, "transactionid"), "it waits for the row")
                os.kill(process.pid, signal.SIGSTOP)
        else:
            until(at(db, "PgSleep"), "it sleeps")
            os.kill(process.pid, signal.SIGSTOP)
        until(lambda: not db.execute(OPEN), "the transaction of the apply has ended")
        assert image(db) == before
        os.kill(process.pid, signal.SIGCONT)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode in {1, 4}
    assert "Nothing was changed." in err
    assert "Traceback" not in err
    assert image(db) == before


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("where", ["lock", "statement", "stopped backend"])
def test_ctrl_c_rolls_back_at_once_and_says_so(db: Database, tmp_path: Path, where: str) -> None:
    """In a wait for a lock, in a statement that sleeps, and when the server does not hear of it."""
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    if where != "lock":
        sleepy(system)
    plan = saved(system)
    before = image(db)
    with (
        holding(system, HOLDS["row of a gate"][0] if where == "lock" else "SELECT 1"),
        started(system, role) as process,
    ):
        ((pid,),) = until(at(db, "transactionid" if where == "lock" else "PgSleep"), "it waits")
        if where == "stopped backend":
            os.kill(pid, signal.SIGSTOP)
        try:
            begun = time.perf_counter()
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
            assert time.perf_counter() - begun < LIMIT
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        # Not only has the client gone: the server has stopped, long before the sleep would have ended.
        gone(db)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "Interrupted: nothing was changed."
    assert "Traceback" not in err
    assert image(db) == before
    if where != "lock":
        awake(system)
    works_now(system, plan, role)


def test_a_second_ctrl_c_does_not_wait(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path, LONG)
    role = applier(system)
    sleepy(system)
    plan = saved(system)
    with started(system, role) as process:
        ((pid,),) = until(at(db, "PgSleep"), "it sleeps")
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(3):
                os.kill(process.pid, signal.SIGINT)
                time.sleep(0.3)
            _, err = process.communicate(timeout=LIMIT)
        finally:
            os.kill(pid, signal.SIGCONT)
    gone(db)
    assert process.returncode == 1
    assert "Traceback" not in err
    awake(system)
    works_now(system, plan, role)
