"""Apply on bad days: triggers that rewrite, rivals that hold or race, kills at every stage, statements that fail.

After each the database is as it was, to the row and its version, or as it was approved; never something between.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import locks
from reconciler.errors import Locked, ReconcilerError, Refused, ServerProblem, Stale, Violated
from tests import sampling
from tests.integration import governed
from tests.integration.governed import image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reconciler.model import Approval, Outcome, Plan
    from tests.integration.governed import Governed
    from tests.servers import Database

GATE = 77  # the advisory lock on which `brake` waits
LIMIT = 60.0  # seconds within which whatever a test waits for must have happened


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


@pytest.fixture
def patient(db: Database, tmp_path: Path) -> Governed:
    """Waits long for locks, so that a test decides how a wait ends."""
    return governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": 0})


def until(system: Governed, query: str) -> None:
    """Wait until the query gives true."""
    deadline = time.monotonic() + LIMIT
    while not system.db.execute(query)[0][0]:
        assert time.monotonic() < deadline, f"never true: {query}"
        time.sleep(0.02)


SESSIONS = "SELECT count(*) {} FROM pg_stat_activity WHERE datname = current_database() AND application_name = '{}'"
GONE = SESSIONS.format("= 0", "reconciler apply")
WAITS = SESSIONS.format("> 0", "reconciler apply") + " AND wait_event_type = 'Lock'"
TAKER_WAITS = SESSIONS.format("> 0", "taker") + " AND wait_event_type = 'Lock'"


def both(system: Governed) -> tuple[Plan, Approval]:
    plan = system.plan()
    return plan, system.approve(plan)


def refused(
    system: Governed, error: type[ReconcilerError] | tuple[type[ReconcilerError], ...] = Stale
) -> ReconcilerError:
    """An apply that must fail and change nothing; afterwards the same plan is still the plan."""
    plan, approval = both(system)
    before = image(system.db)
    with pytest.raises(error) as raised:
        system.apply(plan, [approval])
    assert image(system.db) == before
    assert system.plan().effect_digest == plan.effect_digest
    return raised.value


def told(error: ReconcilerError) -> str:
    return "\n".join([error.message, *error.details])


# --------------------------------------------------------------------------------- what is written is not what is there


def trigger(system: Governed, body: str, event: str, *, table: str = "app.settings", options: str = "") -> None:
    """A trigger with this body; `options` goes between the event and FOR EACH ROW."""
    kind = "CONSTRAINT TRIGGER" if "AFTER" in event and options else "TRIGGER"
    system.sql(
        f"CREATE FUNCTION public.rewrites() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$",
        f"CREATE {kind} rewrites {event} ON {table} {options} FOR EACH ROW EXECUTE FUNCTION public.rewrites()",
    )


FLIP = "UPDATE app.settings SET value = '99' WHERE name = 'shop.limit'; RETURN NULL;"
DEFERRED = "DEFERRABLE INITIALLY DEFERRED"

TRIGGERS = {
    "rewrites the row": ("NEW.value := 'false'; RETURN NEW;", "BEFORE UPDATE", ""),
    "rewrites the row by a space": ("NEW.value := NEW.value || ' '; RETURN NEW;", "BEFORE UPDATE OR INSERT", ""),
    "rewrites a new row": ("NEW.value := 'true'; RETURN NEW;", "BEFORE INSERT", ""),
    "renames a new row": ("NEW.name := NEW.name || 'x'; RETURN NEW;", "BEFORE INSERT", ""),
    "drops the row": ("RETURN NULL;", "BEFORE UPDATE OR INSERT", ""),
    "flips another gate": (f"IF NEW.name <> 'shop.limit' THEN {FLIP} END IF; RETURN NULL;", "AFTER UPDATE", ""),
    "flips another gate at COMMIT": (
        f"IF NEW.name <> 'shop.limit' THEN {FLIP} END IF; RETURN NULL;",
        "AFTER UPDATE",
        DEFERRED,
    ),
    "flips it back at COMMIT": (
        "IF NEW.value = 'true' THEN UPDATE app.settings SET value = 'no' WHERE name = NEW.name; END IF; RETURN NULL;",
        "AFTER UPDATE",
        DEFERRED,
    ),
    "deletes a row at COMMIT": (
        "DELETE FROM app.settings WHERE name = 'shop.till'; RETURN NULL;",
        "AFTER INSERT OR UPDATE",
        DEFERRED,
    ),
    "alters a function at COMMIT": (
        "ALTER FUNCTION app.fn_greet(text, integer) SECURITY INVOKER; RETURN NULL;",
        "AFTER INSERT",
        DEFERRED,
    ),
    "grants at COMMIT": (
        "GRANT EXECUTE ON FUNCTION app.fn_greet(text, integer) TO PUBLIC; RETURN NULL;",
        "AFTER INSERT",
        DEFERRED,
    ),
    "takes the marker back": ("DELETE FROM app.heartbeat; RETURN NULL;", "AFTER INSERT", DEFERRED),
}


@pytest.mark.parametrize(("body", "event", "options"), TRIGGERS.values(), ids=TRIGGERS.keys())
def test_a_trigger_that_rewrites(system: Governed, body: str, event: str, options: str) -> None:
    table = "app.heartbeat" if "heartbeat" in body else "app.settings"
    trigger(system, body, event, table=table, options=options)
    error = refused(system)
    assert error.exit_code == 4
    assert error.message.startswith(("Rolled back:", "marker.courier: its statement ran"))
    system.sql("DROP FUNCTION public.rewrites() CASCADE")
    system.settle()


def test_a_deferred_trigger_that_breaks_an_invariant(system: Governed) -> None:
    trigger(system, "INSERT INTO app.job VALUES (1, ''); RETURN NULL;", "AFTER UPDATE", options=DEFERRED)
    error = refused(system, Violated)
    assert "invariant.no-blank-actor" in told(error)


def test_a_deferred_trigger_that_refuses(system: Governed) -> None:
    trigger(system, "RAISE EXCEPTION 'not on my watch';", "AFTER UPDATE", options=DEFERRED)
    error = refused(system, ServerProblem)
    assert "not on my watch" in error.message
    assert error.exit_code == 1


def test_a_trigger_that_makes_constraints_deferred_again(system: Governed) -> None:
    """What was made immediate before the last look is not put off until COMMIT by a trigger."""
    trigger(
        system,
        f"IF NEW.name <> 'shop.limit' THEN SET CONSTRAINTS ALL DEFERRED; {FLIP} END IF; RETURN NULL;",
        "AFTER UPDATE OR INSERT",
        options=DEFERRED,
    )
    assert "gate.shop.limit" in told(refused(system))


@pytest.mark.parametrize(
    "added",
    [
        "CREATE TRIGGER more AFTER INSERT ON reconciler.entry FOR EACH ROW EXECUTE FUNCTION public.flips()",
        (
            "CREATE CONSTRAINT TRIGGER more AFTER INSERT ON reconciler.entry DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION public.flips()"
        ),
        "CREATE RULE more AS ON INSERT TO reconciler.entry DO ALSO DELETE FROM app.settings WHERE name = 'shop.limit'",
        "ALTER TABLE reconciler.entry DISABLE TRIGGER ALL",
        (
            "CREATE OR REPLACE FUNCTION reconciler.entry_is_append_only() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NEW; END'"
        ),
    ],
    ids=["trigger", "deferred trigger", "rule", "triggers off", "trigger function"],
)
def test_a_ledger_that_somebody_rebuilt(system: Governed, added: str) -> None:
    """The last statement of an apply writes to it: nothing else may happen then, and nothing less."""
    system.settle()
    system.sql(
        "ALTER FUNCTION app.fn_total() COST 7",
        f"CREATE FUNCTION public.flips() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {FLIP} END$$",
    )
    plan, approval = both(system)
    system.sql(added)
    before = image(system.db)
    with pytest.raises(Refused) as raised:
        system.apply(plan, [approval])
    assert raised.value.exit_code == 4
    assert "ledger" in told(raised.value)
    assert image(system.db) == before


EVENTS = {
    "alters it": "ALTER FUNCTION app.fn_greet(text, integer) VOLATILE",
    "grants it": "GRANT EXECUTE ON FUNCTION app.fn_greet(text, integer) TO PUBLIC",
    "owns it": "ALTER FUNCTION app.fn_greet(text, integer) OWNER TO postgres",
    "comments it": "COMMENT ON FUNCTION app.fn_greet(text, integer) IS 'mine'",
    "drops it": "DROP FUNCTION app.fn_greet(text, integer)",
    "renames it": "ALTER FUNCTION app.fn_greet(text, integer) RENAME TO fn_other",
    "flips a gate": "UPDATE app.settings SET value = '99' WHERE name = 'shop.limit'",
}


@pytest.mark.parametrize("what", EVENTS.values(), ids=EVENTS.keys())
def test_an_event_trigger_that_alters_what_was_created(system: Governed, what: str) -> None:
    """After the last DDL on the function, by the rights of a superuser."""
    system.sql(
        "CREATE FUNCTION public.meddles() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$BEGIN"
        " IF tg_tag = 'COMMENT' AND current_setting('my.turn', true) IS DISTINCT FROM 'over' AND EXISTS (SELECT FROM"
        " pg_event_trigger_ddl_commands() WHERE object_identity = 'app.fn_greet(pg_catalog.text,integer)'"
        " OR object_identity = 'app.fn_greet(text,integer)') THEN"
        f" PERFORM set_config('my.turn', 'over', true); {what}; END IF; END$$",
        "CREATE EVENT TRIGGER meddles ON ddl_command_end EXECUTE FUNCTION public.meddles()",
    )
    error = refused(system)
    assert error.message.startswith("Rolled back: after the statements ran")
    assert ("gate.shop.limit" if "settings" in what else "function.app.fn_greet(text, integer)") in told(error)
    system.sql("DROP EVENT TRIGGER meddles")
    system.settle()


RULES = {
    "update nothing": "ON UPDATE TO app.settings DO INSTEAD NOTHING",
    "insert nothing": "ON INSERT TO app.settings DO INSTEAD NOTHING",
    "insert elsewhere": "ON INSERT TO app.settings DO INSTEAD INSERT INTO app.job VALUES (9, NEW.name)",
    "update also another": "ON UPDATE TO app.settings WHERE NEW.name = 'shop.open'"
    " DO ALSO INSERT INTO app.heartbeat VALUES ('courier', 'x', now(), 5)",
    "insert no marker": "ON INSERT TO app.heartbeat DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_rule_that_rewrites(system: Governed, rule: str) -> None:
    system.sql(f"CREATE RULE rewrites AS {rule}")
    assert refused(system).exit_code == 4


def test_a_function_that_refuses_to_insert_the_marker_is_quoted(system: Governed) -> None:
    system.sql(
        "CREATE FUNCTION app.register(worker text) RETURNS jsonb LANGUAGE sql AS"
        ' $$SELECT \'{"refused": true, "reason": "shut on sundays"}\'::jsonb$$'
    )
    system.state["markers"]["courier"]["via"] = {"function": "app.register", "args": {"worker": "courier"}}
    error = refused(system.write())
    assert "marker.courier" in error.message
    assert "shut on sundays" in told(error)


# ---------------------------------------------------------------------------------------------- statements that fail


FAILURES = {
    "no such table": ("CREATE FUNCTION app.fn_bad() RETURNS text LANGUAGE sql AS 'SELECT a FROM app.missing'", "42P01"),
    "another type": ("CREATE FUNCTION app.fn_bad() RETURNS date LANGUAGE sql AS 'SELECT 1'", "42P13"),
    "no such type": ("CREATE FUNCTION app.fn_bad() RETURNS app.missing LANGUAGE sql AS 'SELECT 1'", "42704"),
    "no such language": ("CREATE FUNCTION app.fn_bad() RETURNS integer LANGUAGE plnothing AS 'SELECT 1'", "42704"),
    "leakproof": ("CREATE FUNCTION app.fn_bad() RETURNS integer LANGUAGE sql LEAKPROOF AS 'SELECT 1'", "42501"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "state"), FAILURES.values(), ids=FAILURES.keys())
def test_a_function_that_cannot_be_created(system: Governed, text: str, state: str) -> None:
    system.function("app.fn_bad()", text, execute=[])
    system.write()
    error = refused(system, ServerProblem)
    assert error.exit_code == 1
    assert error.message.startswith("function.app.fn_bad(): ")
    assert f"(SQLSTATE {state})" in error.message
    assert system.entries() == 0


def test_a_value_that_the_table_refuses(system: Governed) -> None:
    system.sql("ALTER TABLE app.settings ADD CHECK (value <> 'two')")
    error = refused(system, ServerProblem)
    assert error.message.startswith("gate.shop.phase: ")


def test_a_function_that_something_depends_on_is_not_replaced(system: Governed) -> None:
    """A drop never cascades."""
    system.settle()
    system.sql("CREATE VIEW app.totals AS SELECT app.fn_total()")
    system.files["functions/1.sql"] = governed.TOTAL.replace("RETURNS bigint", "RETURNS numeric").replace(
        "count(*)", "count(*)::numeric"
    )
    error = refused(system.write(), ServerProblem)
    assert "(SQLSTATE 2BP01)" in error.message
    assert "view totals depends on function fn_total()" in told(error)


def test_the_command_says_that_it_was_rolled_back(system: Governed) -> None:
    system.function("app.fn_bad()", FAILURES["no such table"][0], execute=[])
    plan, approval = both(system.write())
    file = system.save(plan, approval)
    before = image(system.db)
    done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert 'Error: function.app.fn_bad(): relation "app.missing" does not exist (SQLSTATE 42P01)' in done.stderr
    assert "Traceback" not in done.stderr
    assert image(system.db) == before


# --------------------------------------------------------------------------------------------------------- rivals

HOLDS = {
    "row of a gate": "SELECT FROM app.settings WHERE name = 'shop.open' FOR UPDATE",
    "row of a gate, shared": "SELECT FROM app.settings WHERE name = 'shop.open' FOR SHARE",
    "ledger created": "CREATE SCHEMA reconciler",
    "gate updated": "UPDATE app.settings SET value = 'true' WHERE name = 'shop.open'",
    "gate deleted": "DELETE FROM app.settings WHERE name = 'shop.open'",
    "gate inserted": "INSERT INTO app.settings (name, value) VALUES ('shop.till', 'false')",
    "table of the gates": "LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE",
    "table of the gates, for reading": "LOCK TABLE app.settings IN SHARE MODE",
    "marker inserted": "INSERT INTO app.heartbeat VALUES ('courier', 'legacy', now(), 0)",
    "function altered": "ALTER FUNCTION app.fn_total() COST 7",
    "function replaced": governed.TOTAL.replace("CREATE", "CREATE OR REPLACE"),
    "function granted": "GRANT EXECUTE ON FUNCTION app.fn_total() TO PUBLIC",
    "function commented": "COMMENT ON FUNCTION app.fn_total() IS 'mine'",
    "function renamed": "ALTER FUNCTION app.fn_total() RENAME TO fn_sum",
    "function dropped": "DROP FUNCTION app.fn_total()",
    "function created": "CREATE FUNCTION app.fn_greet(text, integer) RETURNS text LANGUAGE sql AS 'SELECT $1'",
}


@contextmanager
def rival(system: Governed, *statements: str) -> Iterator[psycopg.Connection[Any]]:
    """A session with an open transaction in which these ran; rolled back at the end unless it was committed."""
    with psycopg.connect(system.db.dsn, application_name="rival") as conn:
        for statement in statements:
            conn.execute(statement.encode())
        yield conn
        conn.rollback()


@pytest.mark.parametrize("name", sampling.slow(HOLDS, 2))
def test_a_rival_that_holds_what_must_change(system: Governed, name: str) -> None:
    plan, approval = both(system)
    before = image(system.db)
    with rival(system, HOLDS[name]):
        started = time.monotonic()
        with pytest.raises(Locked) as raised:
            system.apply(plan, [approval])
        assert time.monotonic() - started < LIMIT
        assert raised.value.exit_code == 4
        assert "lock timeout" in raised.value.message
    assert image(system.db) == before
    system.apply(plan, [approval])
    system.in_sync()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(*) FROM app.settings",
        "UPDATE app.settings SET value = 'z' WHERE name = 'other'",
        "SELECT FROM app.settings WHERE name = 'other' FOR UPDATE",
        "SELECT FROM app.settings WHERE name = 'shop.open' FOR KEY SHARE",
        "CREATE FUNCTION app.other() RETURNS integer LANGUAGE sql AS 'SELECT app.fn_total()::integer'",
    ],
    ids=["reads", "updates another row", "locks another row", "refers to a row", "creates another function"],
)
def test_a_rival_that_only_looks_or_works_elsewhere_is_not_in_the_way(system: Governed, statement: str) -> None:
    plan, approval = both(system)
    with rival(system, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", statement):
        system.apply(plan, [approval])
    system.in_sync()


def test_another_apply_is_named(system: Governed) -> None:
    plan, approval = both(system)
    file = system.save(plan, approval)
    before = image(system.db)
    with rival(system, f"SELECT pg_advisory_xact_lock({locks.lock_key('shop')})") as conn:
        started = time.monotonic()
        done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
        assert time.monotonic() - started < LIMIT
        assert (done.returncode, done.stdout) == (4, "")
        assert "Error: Another apply of shop is running." in done.stderr.splitlines()
        holder = (
            f"  held by process {conn.info.backend_pid}, role postgres, rival, idle in transaction, its transaction"
        )
        assert any(line.startswith(holder) for line in done.stderr.splitlines()), done.stderr
    assert image(system.db) == before
    # The lock belongs to a name in a database; another name does not wait.
    with rival(system, f"SELECT pg_advisory_xact_lock({locks.lock_key('annex')})"):
        system.apply(plan, [approval])


WHILE_WAITING = {
    "gate updated": (HOLDS["gate updated"], "gate.shop.open"),
    "gate deleted": (HOLDS["gate deleted"], "gate.shop.open"),
    "gate deleted and inserted": (
        HOLDS["gate deleted"] + "; INSERT INTO app.settings (name, value) VALUES ('shop.open', 'false')",
        "gate.shop.open",
    ),
    "gate inserted": (HOLDS["gate inserted"], "gate.shop.till"),
    "marker inserted": (HOLDS["marker inserted"], "marker.courier"),
    "function altered": (HOLDS["function altered"], "function.app.fn_total()"),
    "function granted": (HOLDS["function granted"], "function.app.fn_total()"),
    "function commented": (HOLDS["function commented"], "function.app.fn_total()"),
    "function renamed": (HOLDS["function renamed"], "function.app.fn_total()"),
    "function dropped": (HOLDS["function dropped"], "function.app.fn_total()"),
    "function created": (HOLDS["function created"], "function.app.fn_greet(text, integer)"),
}


@pytest.mark.parametrize(("statement", "address"), WHILE_WAITING.values(), ids=WHILE_WAITING.keys())
@pytest.mark.parametrize("end", sampling.slow(["commit", "rollback"], 2))
def test_a_rival_that_ends_while_the_apply_waits(patient: Governed, statement: str, address: str, end: str) -> None:
    plan, approval = both(patient)
    with rival(patient, statement) as conn, ThreadPoolExecutor(1) as pool:
        running = pool.submit(patient.apply, plan, [approval])
        until(patient, WAITS)
        if end == "rollback":
            conn.rollback()
            running.result(LIMIT)
            patient.in_sync()
            return
        conn.commit()
        before = image(patient.db)
        error = running.exception(LIMIT)
    assert isinstance(error, ReconcilerError)
    assert error.exit_code == 4, told(error)
    assert address in told(error)
    assert image(patient.db) == before
    assert patient.entries() == 0


def test_of_many_applies_of_one_plan_one_commits(system: Governed) -> None:
    plan, approval = both(system)
    start = threading.Barrier(4)

    def once() -> Outcome | ReconcilerError:
        start.wait()
        try:
            return system.apply(plan, [approval])
        except ReconcilerError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        ends = [future.result(60) for future in [pool.submit(once) for _ in range(4)]]
    losers = [end for end in ends if isinstance(end, ReconcilerError)]
    assert len(losers) == 3
    assert [loser.exit_code for loser in losers] == [4, 4, 4], [told(loser) for loser in losers]
    assert system.entries() == 1
    system.in_sync()


def test_of_two_plans_at_once_one_commits(patient: Governed) -> None:
    """The second waits for nobody: the lock of the name is taken, or the plan is stale."""
    patient.settle()
    patient.sql("ALTER FUNCTION app.fn_total() COST 7")
    first = both(patient)
    patient.sql("ALTER FUNCTION app.fn_greet(text, integer) COST 7")
    second = both(patient)
    with pytest.raises(Stale):
        patient.apply(first[0], [first[1]])
    patient.apply(second[0], [second[1]])
    patient.in_sync()
    assert patient.entries() == 2


# ------------------------------------------------------------------------------------------------------------- kills


def brake(system: Governed) -> None:
    """The UPDATE of a gate waits for an advisory lock: an apply stands still in the middle of its statements."""
    system.sql(
        f"CREATE FUNCTION public.waits() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        f" PERFORM pg_catalog.pg_advisory_xact_lock({GATE}); RETURN NEW; END$$",
        "CREATE TRIGGER waits BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION public.waits()",
    )


STAGES = ["check", "lock", "read", *(f"execute {number}" for number in (1, 4, 9, 14, 17)), "verify", "record", "commit"]


@pytest.mark.parametrize("when", STAGES)
def test_the_backend_is_terminated(system: Governed, when: str) -> None:
    """Before each stage. Lost in COMMIT, the apply finds out by itself what became of it."""
    plan, approval = both(system)
    before = image(system.db)
    seen: list[str] = []

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, of
        seen.append(f"{stage} {number}" if number else stage)
        if seen[-1] == when and seen.count(when) == 1:
            system.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'reconciler apply'"
            )
            until(system, GONE)

    with pytest.raises(ServerProblem) as raised:
        applying.apply(system.request(plan, [approval]), progress)
    assert seen[-1] == when
    assert "connection was lost" in raised.value.message
    assert image(system.db) == before
    system.apply(plan, [approval])
    system.in_sync()


def test_the_backend_is_terminated_while_it_waits(patient: Governed) -> None:
    brake(patient)
    plan, approval = both(patient)
    before = image(patient.db)
    with rival(patient, f"SELECT pg_advisory_xact_lock({GATE})"), ThreadPoolExecutor(1) as pool:
        running = pool.submit(patient.apply, plan, [approval])
        until(patient, WAITS)
        patient.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'reconciler apply'"
                    " AND datname = current_database()")  # fmt: skip
        error = running.exception(LIMIT)
    assert isinstance(error, ServerProblem)
    assert "connection was lost" in error.message
    assert image(patient.db) == before
    patient.apply(plan, [approval])


class Running:
    """The command `apply` in a process of its own, whose progress is read line by line."""

    def __init__(self, system: Governed, plan: Plan, approval: Approval) -> None:
        program = Path(sysconfig.get_path("scripts")) / "reconciler"
        file = system.save(plan, approval)
        self.process = subprocess.Popen(
            [program, "apply", file, "--dsn", system.db.dsn, "--initialize"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def reaches(self, stage: str) -> None:
        """Read until this stage is reported."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if f" s  {stage}" in line or stage in line.partition(" s  ")[2]:
                return
        pytest.fail(f"never reached {stage}: {self.said}")

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, all of stderr."""
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, "".join(self.said) + err


@contextmanager
def running(system: Governed, plan: Plan, approval: Approval) -> Iterator[Running]:
    command = Running(system, plan, approval)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.communicate()


KILLS = [
    "check",
    "lock",
    "read",
    "execute 1/",
    ": function.app.fn_greet",
    ": gate.shop.open",
    "verify",
    "record",
    "commit",
]


@pytest.mark.parametrize("stage", sampling.slow(KILLS, 2))
def test_the_command_is_killed(system: Governed, stage: str) -> None:
    """kill -9 as soon as a stage is reported; how far it came meanwhile is chance, the end is not."""
    plan, approval = both(system)
    before = image(system.db)
    with running(system, plan, approval) as command:
        command.reaches(stage)
        command.process.kill()
    until(system, GONE)
    if system.entries():
        system.in_sync()
    else:
        assert image(system.db) == before
        system.apply(plan, [approval])
        system.in_sync()
    assert system.entries() == 1


def test_the_command_is_killed_while_it_waits(patient: Governed) -> None:
    """Its backend waits on, and gives up when it next looks for its client: nothing is committed without a COMMIT."""
    brake(patient)
    plan, approval = both(patient)
    before = image(patient.db)
    with rival(patient, f"SELECT pg_advisory_xact_lock({GATE})"):
        with running(patient, plan, approval) as command:
            until(patient, WAITS)
            command.process.kill()
        assert image(patient.db) == before
    until(patient, GONE)
    assert image(patient.db) == before
    patient.apply(plan, [approval])
    patient.in_sync()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("where", ["lock", "execute"])
def test_a_polite_signal_rolls_back_and_says_so(patient: Governed, number: signal.Signals, where: str) -> None:
    if where == "execute":
        brake(patient)
    plan, approval = both(patient)
    before = image(patient.db)
    held = f"SELECT pg_advisory_xact_lock({GATE})" if where == "execute" else HOLDS["row of a gate"]
    with rival(patient, held), running(patient, plan, approval) as command:
        until(patient, WAITS)
        os.kill(command.process.pid, number)
        code, out, err = command.end()
        assert (code, out) == (1, "")
        assert err.splitlines()[-1] == "Interrupted: nothing was changed."
        until(patient, GONE)
    assert image(patient.db) == before
    patient.apply(plan, [approval])
    patient.in_sync()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_after_the_commit_does_not_undo_the_truth(patient: Governed, number: signal.Signals) -> None:
    """Somebody takes the table in the moment of COMMIT, so planning again hangs and is interrupted: it is applied."""
    brake(patient)
    plan, approval = both(patient)
    with (
        rival(patient, f"SELECT pg_advisory_xact_lock({GATE})") as gatekeeper,
        running(patient, plan, approval) as command,
    ):
        until(patient, WAITS)
        with psycopg.connect(patient.db.dsn, application_name="taker") as taker, ThreadPoolExecutor(1) as pool:
            taking = pool.submit(taker.execute, "LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE")
            until(patient, TAKER_WAITS)
            gatekeeper.rollback()
            taking.result(LIMIT)
            until(patient, WAITS)  # planning again
            os.kill(command.process.pid, number)
            code, out, err = command.end()
            taker.rollback()
    assert code == 0, err
    assert "Apply complete! 4 added, 2 changed, 0 removed." in out.splitlines()
    assert any(line.startswith("Applied, but: ") for line in out.splitlines())
    assert "rolled back" not in err
    patient.in_sync()


def test_what_goes_wrong_after_the_commit_is_a_problem_not_a_failure(system: Governed) -> None:
    """A role that may apply and whose connections are then refused: applied, and said."""
    plan, approval = both(system)
    role = system.db.role("LOGIN SUPERUSER CONNECTION LIMIT 5")

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, number, of
        if stage == "commit":
            system.sql(f"ALTER ROLE {role} NOLOGIN")

    done = applying.apply(system.request(plan, [approval], dsn=system.db.dsn_as(role)), progress)
    assert done.outcome == "applied"
    assert len(done.problems) == 1
    assert "planning again failed" in done.problems[0]
    system.in_sync()


def test_an_apply_that_takes_too_long_is_rolled_back(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path, {"lock_timeout": "20s", "lock_retries": 0, "max_duration": "1s"})
    brake(system)
    plan, approval = both(system)
    before = image(db)
    with rival(system, f"SELECT pg_advisory_xact_lock({GATE})"):
        started = time.monotonic()
        with pytest.raises(ReconcilerError):
            system.apply(plan, [approval])
        assert time.monotonic() - started < 15  # less than the time-out of the lock
    assert image(db) == before
