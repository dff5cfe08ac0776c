"""Through PgBouncer, in session and in transaction mode: the whole path, the bad days, and nothing left behind.

In transaction mode a session of the server belongs to everybody in turn: what we set in it others find, and what others
left in it must not change what we do.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import desired, prove
from reconciler import plan as planning
from reconciler.errors import Locked, ReconcilerError
from tests import pooler as poolers
from tests.fault.proxy import Proxy
from tests.integration import governed
from tests.integration.governed import applier, command, image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fault.proxy import Line, Moment
    from tests.integration.governed import Governed
    from tests.pooler import Pooler
    from tests.servers import Database

LIMIT = 60.0  # seconds within which whatever a test waits for must have happened
MODES = ["session", "transaction"]
BACKEND = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'reconciler apply'"
)

# What a session of the server has beside its defaults. The first five PgBouncer itself keeps as each client has them.
LEFT = """
SELECT 'setting ' || name || ' ' || setting FROM pg_settings
 WHERE source = 'session'
   AND name NOT IN ('client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings', 'application_name')
UNION ALL SELECT 'role ' || current_user WHERE current_user <> session_user
UNION ALL SELECT 'prepared ' || name FROM pg_prepared_statements WHERE name <> ''
UNION ALL SELECT 'cursor ' || name FROM pg_cursors WHERE name <> ''
UNION ALL SELECT 'channel ' || channel FROM pg_listening_channels() AS channel
UNION ALL SELECT 'lock ' || locktype FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'
UNION ALL SELECT 'temporary ' || relname FROM pg_class WHERE relnamespace = pg_my_temp_schema()
"""

# What a careless application, with the same login, leaves in a session that is not its own.
RUBBISH = """
CREATE TEMPORARY TABLE settings (name text, value text);
SET search_path = rubbish;
SET timezone = 'Asia/Kathmandu';
SET datestyle = 'German, DMY';
SET intervalstyle = 'sql_standard';
SET extra_float_digits = -15;
SET bytea_output = 'escape';
SET standard_conforming_strings = off;
SET quote_all_identifiers = on;
SET row_security = on;
SET lock_timeout = '7s';
SET statement_timeout = '8s';
SET default_transaction_isolation = 'serializable';
SET default_transaction_read_only = on;
SET synchronous_commit = off;
SET check_function_bodies = off;
PREPARE rubbish AS SELECT 1;
LISTEN rubbish;
SELECT pg_advisory_lock(99);
BEGIN;
DECLARE rubbish CURSOR WITH HOLD FOR SELECT 1;
COMMIT;
"""


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


@pytest.fixture
def pooled(
    system: Governed, run_directory: Path, new_name: Callable[[], str]
) -> Iterator[Callable[..., tuple[Pooler, str]]]:
    """`pooled(mode, **settings)`: a PgBouncer, and the role that may apply."""
    role = applier(system)
    started: list[Any] = []

    def start(mode: str, **settings: str) -> tuple[Pooler, str]:
        running = poolers.running(
            run_directory / new_name(), system.db.server, [role, system.caller], {"pool_mode": mode, **settings}
        )
        started.append(running)
        return running.__enter__(), role

    yield start
    for running in started:
        running.__exit__(None, None, None)


def until(found: Callable[[], Any], what: str) -> Any:
    """Wait until it gives something, and return that."""
    deadline = time.monotonic() + LIMIT
    while not (value := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return value


def left(pooler: Pooler, system: Governed, role: str) -> list[str]:
    """What is left in the one session that the pooler has of this role."""
    with psycopg.connect(pooler.dsn(system.db.name, role), autocommit=True, prepare_threshold=None) as conn:
        return sorted(row[0] for row in conn.execute(LEFT.encode()).fetchall())


@contextmanager
def holding(system: Governed, statement: str) -> Iterator[int]:
    """A transaction of somebody else, past the pooler; its process."""
    with psycopg.connect(system.db.dsn, application_name="long") as conn:
        conn.execute(statement.encode())
        yield conn.info.backend_pid
        conn.rollback()


GATE = "UPDATE app.settings SET value = 'mine' WHERE name = 'shop.open'"


# ------------------------------------------------------------------------------------------------------- the whole path


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
def test_the_whole_path(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    """Plan, approve, apply, plan again, drift, prove, history: by a role that may no more than it must."""
    pooler, role = pooled(mode)
    system.state["proofs"] = {
        "adds": {
            "reason": "It counts.",
            "given": ["INSERT INTO app.settings (name, value) VALUES ('mine', 'x')"],
            "when": "SELECT app.fn_greet('you', 2)",
            "then": [{"query": "SELECT 1 FROM app.settings WHERE name = 'mine'", "rows": 1}],
        }
    }
    system.state["functions"]["app.fn_greet(text, integer)"]["execute"] = [system.caller, role]
    system.write()
    dsn = pooler.dsn(system.db.name, role)
    server = ("--dsn", dsn)
    direct = system.plan()
    made = command("plan", "-s", system.directory, *server, "--out", system.plan_file)
    assert made.returncode == 0, made.stderr
    plan, _ = planning.load(system.plan_file)
    assert plan.effect_digest == direct.effect_digest
    accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
    command("approve", system.plan_file, "--as", "operator", "--reason", "a test", *accept)
    done = command("apply", system.plan_file, *server, "--initialize")
    assert done.returncode == 0, done.stderr
    assert "Apply complete! 4 added, 2 changed, 0 removed." in done.stdout.splitlines()
    assert "Proofs: 1 passed" in done.stdout
    assert "Applied, but" not in done.stdout
    again = command("plan", "-s", system.directory, *server, "--detailed-exitcode")
    assert again.returncode == 0, again.stderr
    assert "No changes." in again.stdout
    drift = command("drift", "-s", system.directory, *server)
    assert drift.returncode == 0, drift.stderr
    assert "No drift at " in drift.stdout
    assert command("prove", "-s", system.directory, *server).returncode == 0
    system.in_sync()


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_of_ours_stays_in_a_session(
    system: Governed, pooled: Callable[..., tuple[Pooler, str]], size: int
) -> None:
    """In transaction mode nobody resets it. Whatever a run does: it ends, it is refused, it waits, it breaks off."""
    pooler, role = pooled("transaction", default_pool_size=str(size))
    dsn = pooler.dsn(system.db.name, role)
    assert left(pooler, system, role) == []
    plan = system.plan(dsn)
    assert left(pooler, system, role) == []
    with holding(system, GATE), pytest.raises(Locked):
        system.apply(plan, dsn=dsn)
    assert left(pooler, system, role) == []
    prove.prove(dsn, desired.load(system.directory, None), allow_untested=False)
    system.apply(plan, dsn=dsn)
    system.drift(dsn)
    for _ in range(2 * size):  # the pooler hands out the session that was used last
        assert left(pooler, system, role) == []
    system.in_sync()


# ------------------------------------------------------------------------------------------------ what others have left


def litter(pooler: Pooler, system: Governed, role: str) -> None:
    """Leave everything in the one session; an application that may do so in this mode by mistake only."""
    with psycopg.connect(pooler.dsn(system.db.name, role), autocommit=True, prepare_threshold=None) as conn:
        for statement in RUBBISH.split(";\n"):
            if statement.strip():
                conn.execute(statement.encode())


def test_what_others_left_in_the_session_changes_nothing(
    system: Governed, pooled: Callable[..., tuple[Pooler, str]]
) -> None:
    pooler, role = pooled("transaction", default_pool_size="1", server_reset_query_always="0")
    system.sql(f"GRANT TEMPORARY ON DATABASE {system.db.name} TO {role}", "CREATE SCHEMA rubbish")
    dsn = pooler.dsn(system.db.name, role)
    direct = system.plan()
    litter(pooler, system, role)
    before = left(pooler, system, role)
    assert len(before) > 15
    plan = system.plan(dsn)
    assert plan.effect_digest == direct.effect_digest
    done = system.apply(plan, dsn=dsn)
    assert (done.outcome, done.problems) == ("applied", ())
    # Not ours to clean up either.
    assert left(pooler, system, role) == before
    assert system.drift(dsn).drift == ()
    system.in_sync()


def test_a_role_that_somebody_left_in_the_session_is_not_ours(
    system: Governed, pooled: Callable[..., tuple[Pooler, str]]
) -> None:
    """Under it a plan would see, and an apply do, what the login may not; or the other way round."""
    pooler, role = pooled("transaction", default_pool_size="1")
    system.sql(f"GRANT {{stranger}} TO {role}")
    dsn = pooler.dsn(system.db.name, role)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f"SET ROLE {system.stranger}".encode())
    assert left(pooler, system, role) == [f"role {system.stranger}"]
    plan = system.plan(dsn)
    assert plan.effect_digest == system.plan().effect_digest
    system.apply(plan, dsn=dsn)
    system.in_sync()


# ------------------------------------------------------------------------------------------------------------- bad days


@pytest.mark.parametrize("mode", MODES)
def test_who_is_in_the_way_is_named(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    """By the process of the server, not by the number that the pooler tells its clients."""
    system.state["governance"]["apply"] |= {"lock_timeout": "1500ms", "lock_retries": 0}
    pooler, role = pooled(mode)
    dsn = pooler.dsn(system.write().db.name, role)
    plan = system.plan(dsn)
    before = image(system.db)
    with holding(system, GATE) as pid, pytest.raises(Locked, match=rf"held by process {pid}, role postgres, long"):
        system.apply(plan, dsn=dsn)
    assert image(system.db) == before
    system.apply(plan, dsn=dsn)
    system.in_sync()


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_of_one_is_enough(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    """Whoever would watch for us has to wait; the apply does not wait for that."""
    system.state["governance"]["apply"] |= {"lock_timeout": "900ms", "lock_retries": 1}
    pooler, role = pooled(mode, default_pool_size="1")
    dsn = pooler.dsn(system.write().db.name, role)
    plan = system.plan(dsn)
    before = image(system.db)
    begun = time.monotonic()
    with holding(system, GATE), pytest.raises(Locked, match="lock timeout"):
        system.apply(plan, dsn=dsn)
    assert time.monotonic() - begun < LIMIT
    assert image(system.db) == before
    system.apply(plan, dsn=dsn)
    system.in_sync()


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_that_is_full(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    pooler, role = pooled(mode, default_pool_size="1", query_wait_timeout="1")
    dsn = pooler.dsn(system.db.name, role)
    with psycopg.connect(dsn) as other:
        other.execute("SELECT 1")
        done = command("plan", "-s", system.directory, "--dsn", dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert "query_wait_timeout" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def sleepy(system: Governed) -> None:
    system.sql(
        "CREATE FUNCTION public.sleeps() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_catalog.pg_sleep(600); RETURN NEW; END$$",
        "CREATE TRIGGER sleeps BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION public.sleeps()",
    )


@pytest.mark.parametrize("mode", MODES)
def test_max_duration_ends_a_statement(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    """The request to stop goes through the pooler as well."""
    system.state["governance"]["apply"] |= {"statement_timeout": "60s", "max_duration": "5s"}
    pooler, role = pooled(mode)
    dsn = pooler.dsn(system.write().db.name, role)
    sleepy(system)
    plan = system.plan(dsn)
    before = image(system.db)
    with pytest.raises(Locked, match="max_duration 5s and was rolled back"):
        system.apply(plan, dsn=dsn)
    until(lambda: not system.db.execute(f"{BACKEND} AND state <> 'idle'"), "the server has stopped")
    assert image(system.db) == before
    system.sql("DROP TRIGGER sleeps ON app.settings")
    if mode == "transaction":
        assert left(pooler, system, role) == []
    system.state["governance"]["apply"]["max_duration"] = "1m"
    system.write().apply(system.plan(dsn), dsn=dsn)
    system.in_sync()


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    system.state["governance"]["apply"] |= {"statement_timeout": "10m", "max_duration": "10m"}
    pooler, role = pooled(mode)
    dsn = pooler.dsn(system.write().db.name, role)
    sleepy(system)
    plan = system.plan(dsn)
    system.save(plan, system.approve(plan))
    before = image(system.db)

    def press() -> None:
        until(lambda: system.db.execute(f"{BACKEND} AND wait_event = 'PgSleep'"), "it sleeps")
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    done = command("apply", system.plan_file, "--initialize", "--dsn", dsn)
    presser.join()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "Interrupted: nothing was changed."
    until(lambda: not system.db.execute(f"{BACKEND} AND state <> 'idle'"), "the server has stopped")
    assert image(system.db) == before


@pytest.mark.parametrize("mode", MODES)
def test_the_answer_to_commit_is_lost(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str) -> None:
    """Between us and the pooler: the run settles itself through it."""
    pooler, role = pooled(mode)
    plan = system.plan()

    def cut(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("after", "COMMIT"):
            line.cut()

    with Proxy(pooler, cut) as proxy:  # pyright: ignore[reportArgumentType] - it has a server's host and port
        done = system.apply(plan, dsn=proxy.dsn(system.db.name, role))
    assert done.problems == ("the answer to COMMIT was lost; the ledger says that it was committed",)
    system.in_sync()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["lock", "execute", "record"])
def test_the_pooler_dies(system: Governed, pooled: Callable[..., tuple[Pooler, str]], mode: str, stage: str) -> None:
    pooler, role = pooled(mode)
    plan = system.plan()
    before = image(system.db)

    wanted = stage

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, number, of
        if stage == wanted:
            pooler.process.kill()
            pooler.process.wait()

    request = system.request(plan, dsn=pooler.dsn(system.db.name, role))
    with pytest.raises(ReconcilerError, match="the connection was lost"):
        applying.apply(request, progress)
    until(lambda: not system.db.execute(BACKEND), "the server has noticed")
    assert image(system.db) == before
    again, _ = pooled(mode)
    system.apply(plan, dsn=again.dsn(system.db.name, role))
    system.in_sync()


def test_many_at_once_take_turns(system: Governed, pooled: Callable[..., tuple[Pooler, str]]) -> None:
    """Ten applies of one plan over a pool of two sessions: one commits, the others find it locked or stale."""
    pooler, role = pooled("transaction", default_pool_size="2")
    dsn = pooler.dsn(system.db.name, role)
    plan = system.plan(dsn)
    approval = system.approve(plan)

    def one(_: int) -> str:
        try:
            return system.apply(plan, [approval], dsn=dsn).outcome
        except ReconcilerError as error:
            return f"{error.exit_code} {error.outcome}"

    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(one, range(10)))
    assert outcomes.count("applied") == 1, outcomes
    assert {outcome.split()[0] for outcome in outcomes} <= {"applied", "4", "1"}
    assert system.entries() == 1
    assert left(pooler, system, role) == []
    system.in_sync()


# ----------------------------------------------------------------------------------------------------- what cannot work


def test_statement_mode_is_refused_in_one_sentence(system: Governed, pooled: Callable[..., tuple[Pooler, str]]) -> None:
    pooler, role = pooled("statement")
    done = command("plan", "-s", system.directory, "--dsn", pooler.dsn(system.db.name, role))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"transaction blocks not allowed in statement pooling mode", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_startup_options_are_refused_in_one_sentence(
    system: Governed, pooled: Callable[..., tuple[Pooler, str]]
) -> None:
    """PgBouncer passes none on; with ignore_startup_parameters it drops them, and nothing of ours needs one."""
    pooler, role = pooled("transaction")
    dsn = f"{pooler.dsn(system.db.name, role)} options='-c work_mem=8MB'"
    done = command("plan", "-s", system.directory, "--dsn", dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: Cannot connect to PostgreSQL: ")
    assert "unsupported startup parameter: options" in done.stderr
    other, _ = pooled("transaction", ignore_startup_parameters="options")
    dsn = f"{other.dsn(system.db.name, role)} options='-c work_mem=8MB'"
    assert command("plan", "-s", system.directory, "--dsn", dsn).returncode == 0
