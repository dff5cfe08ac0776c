"""The proofs on a server: what the engine sees and what escapes it, the shipped proofs, mutated bodies, a rehearsal."""

from __future__ import annotations

import json
import re
import shutil
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import approve as approving
from reconciler import definitions, desired, pg, prove, rehearsal, scaffold
from reconciler import plan as planning
from reconciler.errors import Locked, ProofFailed, ServerProblem, UsageError
from reconciler.model import digest
from reconciler.survey import survey
from tests.integration import governed, phase2
from tests.integration.governed import image
from tests.servers import PROJECT, Database, Server

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from reconciler.model import Verdict
    from reconciler.prove import ProofReport

# --- the engine, on a small system ------------------------------------------------------------------------------------

SMALL = """
CREATE TABLE public.settings (name text PRIMARY KEY, value text);
INSERT INTO public.settings VALUES ('app.open', 'false');
CREATE TABLE public.thing (id integer PRIMARY KEY, note text);
INSERT INTO public.thing VALUES (1, 'one');
CREATE SEQUENCE public.number;
CREATE SEQUENCE public.other;
CREATE TABLE public.late (id integer, CONSTRAINT late_fk FOREIGN KEY (id) REFERENCES public.thing
    DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION public.answer() RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('refused', true, 'reason', 'app.open=' || s.value, 'list', '[1, {"a": null}]'::jsonb)
      FROM public.settings AS s $$;
CREATE FUNCTION public.who() RETURNS text LANGUAGE sql AS 'SELECT current_user::text';
CREATE FUNCTION public.nothing_here() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM thing';
CREATE FUNCTION public.in_session(what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF what = 'lock' THEN PERFORM pg_advisory_lock(4711, 12);
    ELSIF what = 'prepared' THEN EXECUTE 'PREPARE left_behind AS SELECT 1';
    ELSIF what = 'number' THEN PERFORM nextval('public.number');
    ELSIF what = 'set' THEN PERFORM setval('public.other', 99);
    ELSIF what = 'listen' THEN LISTEN left_behind;
    END IF;
END $$;
CREATE PROCEDURE public.commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END';
CREATE PROCEDURE public.adds(INOUT n integer) LANGUAGE plpgsql AS 'BEGIN n := n + 1; END';
"""
GOVERNANCE = {
    "version": 1,
    "name": "small",
    "release": "first",
    "targets": {"main": {}},
    "gate_stores": {"settings": {"table": "public.settings", "key": "name", "value": "value"}},
    "approval": {"signed": False},
    "apply": {"statement_timeout": "5s", "lock_timeout": "200ms"},
}


class Small:
    """A small system; `play` plays one proof on it."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db = db
        self.folder = folder
        db.execute(SMALL)

    def state(self, **proofs: Any) -> Path:
        gate = {"app.open": {"value": "false", "reason": "A test."}}
        whole = {"governance": GOVERNANCE, "gates": gate, "proofs": proofs}
        (self.folder / "all.yaml").write_text(json.dumps(whole))
        return self.folder

    def play(self, **proof: Any) -> Verdict:
        wanted = desired.load(self.state(one={"reason": "A test.", **proof}), None)
        (verdict,) = prove.prove(self.db.dsn, wanted).proofs
        return verdict


@pytest.fixture
def small(db: Database, tmp_path: Path) -> Small:
    return Small(db, tmp_path)


THING = "SELECT t.note FROM public.thing AS t WHERE t.id = 1"
ADD = "INSERT INTO public.thing VALUES (2, 'two')"

PASSING: dict[str, dict[str, Any]] = {
    "one JSON value": {"when": "SELECT public.answer()", "then": [{"returns": {"reason": "app.open=false"}}]},
    "lists inside": {"when": "SELECT public.answer()", "then": [{"returns": {"list": [1, {"a": None}]}}]},
    "one row": {
        "when": "SELECT 1 AS a, 'x' AS b, 2.5 AS c, true AS d",
        "then": [{"returns": {"a": 1, "c": 2.5, "d": True}}],
    },
    "rows": {"when": "VALUES (1), (2)", "then": [{"returns": [{"column1": 1}, {"column1": 2}]}]},
    "no rows": {"when": "SELECT 1 WHERE false", "then": [{"returns": []}]},
    "what JSON has not": {
        "when": "SELECT '00000000-0000-4000-8000-000000000001'::uuid AS u, ARRAY[1, 2] AS a, '2000-01-01'::date AS d",
        "then": [{"returns": {"u": "00000000-0000-4000-8000-000000000001", "a": [1, 2], "d": "2000-01-01"}}],
    },
    "a procedure": {"when": "CALL public.adds(1)", "then": [{"returns": {"n": 2}}]},
    "equals": {
        "when": "UPDATE public.thing SET note = 'new' WHERE id = 1",
        "then": [{"query": THING, "equals": "new"}],
    },
    "rows by number": {"when": ADD, "then": [{"query": "SELECT t.id FROM public.thing AS t", "rows": 2}]},
    "raises": {
        "when": "INSERT INTO public.thing VALUES (1)",
        "then": [{"raises": "23505"}, {"query": THING, "equals": "one"}],
    },
    "raises with words": {
        "when": "INSERT INTO public.thing VALUES (1)",
        "then": [{"raises": "23505", "message": "thing_pkey"}],
    },
    "unchanged": {
        "given": [ADD],
        "when": "SELECT 1",
        "then": [{"query": "SELECT t.* FROM public.thing AS t", "unchanged": True}],
    },
    "armed": {
        "arm": {"app.open": "true"},
        "when": "SELECT public.answer()",
        "then": [{"returns": {"reason": "app.open=true"}}],
    },
    "disarmed": {
        "arm": {"app.open": None},
        "when": "SELECT count(*) FROM public.settings",
        "then": [{"returns": {"count": 0}}],
    },
    "a name found by the path": {"when": "SELECT public.nothing_here()", "then": [{"returns": {"nothing_here": 1}}]},
    "a temporary table": {
        "given": ["CREATE TEMP TABLE mine AS SELECT 5 AS n"],
        "when": "SELECT n FROM mine",
        "then": [{"returns": {"n": 5}}],
    },
    "a deferred constraint made good": {
        "given": ["SET CONSTRAINTS ALL DEFERRED", "INSERT INTO public.late VALUES (3)"],
        "when": "INSERT INTO public.thing VALUES (3)",
        "then": [{"query": "SELECT l.id FROM public.late AS l", "rows": 1}],
    },
    "a precondition": {
        "requires": [{"query": THING, "equals": "one", "because": "Number one is needed."}],
        "when": "SELECT 1 AS a",
        "then": [{"returns": {"a": 1}}],
    },
    "steps": {
        "steps": [
            {"given": [ADD], "when": "SELECT 1 AS a", "then": [{"returns": {"a": 1}}]},
            {"when": "DELETE FROM public.thing WHERE id = 2 RETURNING note", "then": [{"returns": {"note": "two"}}]},
        ]
    },
    "an announced sequence": {
        "advances": ["public.number"],
        "when": "SELECT nextval('public.number')",
        "then": [{"returns": {"nextval": 1}}],
    },
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_and_leaves_nothing(small: Small, name: str) -> None:
    before = image(small.db)
    verdict = small.play(**PASSING[name])
    assert (verdict.status, verdict.detail.endswith("met")) == ("passed", True), verdict.detail
    assert image(small.db) == before


FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "another value": (
        {"when": "SELECT public.answer()", "then": [{"returns": {"reason": "x"}}]},
        'then 1: reason: found "app.open=false", expected "x"',
    ),
    "no such key": (
        {"when": "SELECT public.answer()", "then": [{"returns": {"more": 1}}]},
        "then 1: more: missing, expected 1",
    ),
    "true is not 1": (
        {"when": "SELECT public.answer()", "then": [{"returns": {"refused": 1}}]},
        "then 1: refused: found true, expected 1",
    ),
    "inside a list": (
        {"when": "SELECT public.answer()", "then": [{"returns": {"list": [1, {"a": 2}]}}]},
        "then 1: list[1].a: found null, expected 2",
    ),
    "a shorter list": (
        {"when": "SELECT public.answer()", "then": [{"returns": {"list": [1]}}]},
        'then 1: list: 2 elements, expected 1: [1, {"a": null}]',
    ),
    "more rows": (
        {"when": "VALUES (1), (2)", "then": [{"returns": [{"column1": 1}]}]},
        "then 1: 2 elements, expected 1",
    ),
    "an unexpected error": (
        {"when": "SELECT 1 / 0", "then": [{"returns": {"a": 1}}]},
        "when: division by zero (SQLSTATE 22012)",
    ),
    "another error": (
        {"when": "SELECT 1 / 0", "then": [{"raises": "23505"}]},
        "then 1: raised division by zero (SQLSTATE 22012), expected 23505",
    ),
    "another message": (
        {"when": "SELECT 1 / 0", "then": [{"raises": "22012", "message": "by one"}]},
        "expected 22012 by one",
    ),
    "no error": (
        {"when": "SELECT 5 AS n", "then": [{"raises": "23505"}]},
        'then 1: no error, expected SQLSTATE 23505; it returned [{"n": 5}]',
    ),
    "another text": (
        {"when": "SELECT 1", "then": [{"query": THING, "equals": "two"}]},
        "then 1: found one, expected two",
    ),
    "two rows for a value": (
        {"when": ADD, "then": [{"query": "SELECT t.note FROM public.thing AS t", "equals": "one"}]},
        "then 1: found a query that gives more than one row",
    ),
    "another number": (
        {"when": ADD, "then": [{"query": "SELECT t.id FROM public.thing AS t", "rows": 1}]},
        "then 1: found 2 rows, expected 1 rows",
    ),
    "changed": (
        {"when": ADD, "then": [{"query": "SELECT t.* FROM public.thing AS t", "unchanged": True}]},
        "then 1: found 2 rows ",
    ),
    "swapped at the same number": (
        {
            "when": "UPDATE public.thing SET note = 'x'",
            "then": [{"query": "SELECT t.* FROM public.thing AS t", "unchanged": True}],
        },
        "then 1: found 1 rows ",
    ),
    "a given that fails": (
        {"given": ["INSERT INTO public.thing VALUES (1)"], "when": "SELECT 1", "then": [{"returns": {}}]},
        "given 1: duplicate key",
    ),
    "a query that fails": (
        {"when": "SELECT 1", "then": [{"query": "SELECT FROM public.thing AS t WHERE 1 / (t.id - 1) = 1", "rows": 1}]},
        "then 1: the query failed: division by zero",
    ),
    "the second step": (
        {
            "steps": [
                {"when": "SELECT 1 AS a", "then": [{"returns": {"a": 1}}]},
                {"when": "SELECT 1 AS a", "then": [{"returns": {"a": 1}}, {"returns": {"a": 2}}]},
            ]
        },
        "step 2: then 2: a: found 1, expected 2",
    ),
    "a deferred constraint": (
        {
            "given": ["SET CONSTRAINTS ALL DEFERRED"],
            "when": "INSERT INTO public.late VALUES (9)",
            "then": [{"returns": []}],
        },
        "a deferred constraint does not hold: insert or update on table",
    ),
    "a commit": (
        {"when": "CALL public.commits()", "then": [{"returns": []}]},
        "when: invalid transaction termination (SQLSTATE 2D000)",
    ),
    "too slow": (
        {"when": "SELECT pg_sleep(20)", "then": [{"returns": []}]},
        "when: canceling statement due to statement timeout",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_says_where_and_leaves_nothing(small: Small, name: str) -> None:
    before = image(small.db)
    proof, words = FAILING[name]
    verdict = small.play(**proof)
    assert verdict.status == "failed"
    assert words in verdict.detail
    assert image(small.db) == before


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lock", "advisory lock 4711/12"),
        ("prepared", "prepared statement left_behind"),
        ("number", "sequence public.number advanced"),
        ("set", "sequence public.other advanced"),
    ],
)
def test_what_escapes_a_rollback_is_seen(small: Small, what: str, words: str) -> None:
    verdict = small.play(when=f"SELECT public.in_session('{what}')", then=[{"returns": {}}])
    assert (verdict.status, verdict.detail) == ("failed", f"escaped the rollback: {words}")


def test_listen_does_not_escape(small: Small) -> None:
    assert small.play(when="SELECT public.in_session('listen')", then=[{"returns": {}}]).status == "passed"


def test_what_escapes_a_failing_proof_is_said_too(small: Small) -> None:
    verdict = small.play(when="SELECT public.in_session('number')", then=[{"returns": {"x": 1}}])
    assert verdict.detail.startswith("escaped the rollback: sequence public.number advanced; then 1: ")


def test_a_sequence_that_others_advance_meanwhile_is_not_ours(small: Small) -> None:
    stop = threading.Event()

    def busy() -> None:
        with psycopg.connect(small.db.dsn, autocommit=True) as conn:
            while not stop.wait(0.001):
                conn.execute("SELECT nextval('public.number')")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        verdict = small.play(when="SELECT pg_sleep(0.2)", then=[{"returns": {}}])
    finally:
        stop.set()
        thread.join()
    assert verdict.status == "passed"


def test_a_sequence_used_by_two_proofs_is_seen_in_both(small: Small) -> None:
    proof = {"reason": "A test.", "when": "SELECT public.in_session('number')", "then": [{"returns": {}}]}
    wanted = desired.load(small.state(one=proof, two=proof), None)
    report = prove.prove(small.db.dsn, wanted)
    assert [verdict.status for verdict in report.proofs] == ["failed", "failed"]


AWAY = """
CREATE EXTENSION postgres_fdw;
CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{host}', port '{port}', dbname '{name}');
CREATE USER MAPPING FOR CURRENT_USER SERVER far OPTIONS (user 'postgres');
CREATE FOREIGN TABLE public.away (id integer, note text) SERVER far OPTIONS (table_name 'thing');
CREATE FUNCTION public.tries() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.away VALUES (8, 'eight');
    RAISE 'no';
EXCEPTION WHEN raise_exception THEN NULL;
END $$
"""
USED, CONNECTED = "foreign table public.away was used", "a connection to foreign server far"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("INSERT INTO public.away VALUES (7, 'seven')", f"{USED}, {CONNECTED}"),
        ("SELECT id FROM public.away WHERE id > 100", f"{USED}, {CONNECTED}"),
        # The block that caught the error gave its lock back.
        ("SELECT public.tries()", CONNECTED),
    ],
)
def test_a_foreign_table_is_seen(small: Small, when: str, words: str) -> None:
    info = small.db.conn.info
    small.db.execute(AWAY.format(host=info.host, port=info.port, name=small.db.name))
    verdict = small.play(when=when, then=[{"query": THING, "equals": "one"}])
    assert (verdict.status, verdict.detail) == ("failed", f"escaped the rollback: {words}")


@pytest.mark.smoke
@pytest.mark.parametrize("which", ["lo_from_bytea(0, 'new')", "(SELECT oid FROM pg_largeobject_metadata LIMIT 1)"])
def test_an_export_of_a_large_object_is_seen(small: Small, which: str) -> None:
    """From inside a function, where nobody reads its name: the file is there whatever is rolled back."""
    small.db.execute("SELECT lo_from_bytea(0, 'there before')")
    small.db.execute(
        "CREATE FUNCTION public.exports() RETURNS void LANGUAGE plpgsql AS"
        f" $$ DECLARE which oid := {which};"
        " BEGIN PERFORM lo_export(which, current_setting('data_directory') || '/exported'); END $$"
    )
    verdict = small.play(when="SELECT public.exports()", then=[{"returns": {}}])
    words = "large objects were used, which can be files by now"
    assert (verdict.status, verdict.detail) == ("failed", f"escaped the rollback: {words}")
    exported = small.db.server.cluster.home / "data" / "exported"
    assert exported.exists()
    exported.unlink()


FAR = """
CREATE EXTENSION dblink;
CREATE FUNCTION public.far(statement text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM public.dblink_exec({dsn}, statement);
END $$;
CREATE FUNCTION public.far_in_sql(statement text) RETURNS bigint LANGUAGE sql AS
$$ SELECT count(*) FROM public.dblink({dsn}, statement) AS t (id integer) $$;
CREATE FUNCTION public.far_by_name(statement text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('SELECT public.%I(%L, %L)', 'dbli' || 'nk_exec', {dsn}, statement);
END $$;
CREATE FUNCTION public.far_and_error(statement text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM public.dblink_exec({dsn}, statement);
    RAISE 'nothing happened' USING ERRCODE = 'P0001';
END $$;
CREATE FUNCTION public.far_and_caught(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE said text;
BEGIN
    said := public.dblink_exec({dsn}, statement || ' RETURNING id');
EXCEPTION WHEN OTHERS THEN RETURN 'caught';
END $$;
CREATE FUNCTION public.far_on_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM public.far('DELETE FROM public.thing WHERE id = 9');
    RETURN NEW;
END $$;
CREATE TRIGGER far BEFORE INSERT ON public.thing FOR EACH ROW EXECUTE FUNCTION public.far_on_insert();
"""
DBLINK: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "plpgsql": ("SELECT public.far('{insert}')", [{"returns": {}}], "public.dblink_exec(text,text)"),
    "sql": (
        "SELECT public.far_in_sql('{insert} RETURNING id')",
        [{"returns": {"far_in_sql": 1}}],
        "public.dblink(text,text)",
    ),
    "a name put together": (
        "SELECT public.far_by_name('{insert}')",
        [{"returns": {}}],
        "public.dblink_exec(text,text)",
    ),
    "an error that is expected": (
        "SELECT public.far_and_error('{insert}')",
        [{"raises": "P0001"}],
        "public.dblink_exec(text,text)",
    ),
    "a call that fails after it worked": (
        "SELECT public.far_and_caught('{insert}')",
        [{"returns": {"far_and_caught": "caught"}}],
        "public.dblink_exec(text,text)",
    ),
    "a trigger": (
        "INSERT INTO public.thing VALUES (5, 'five')",
        [{"query": THING, "equals": "one"}],
        "public.dblink_exec(text,text)",
    ),
}


@pytest.fixture
def linked(small: Small) -> Small:
    """With dblink, and functions that use it to come back to the same database as somebody else."""
    small.db.execute(FAR.replace("{dsn}", f"'{small.db.dsn}'"))
    return small


@pytest.mark.smoke
@pytest.mark.parametrize("name", DBLINK)
def test_what_a_body_does_over_a_connection_of_its_own_is_seen(linked: Small, name: str) -> None:
    when, then, function = DBLINK[name]
    verdict = linked.play(when=when.format(insert="INSERT INTO public.thing VALUES (77)"), then=then)
    words = f"{function} was called, which no rollback reaches"
    assert (verdict.status, verdict.detail) == ("failed", f"escaped the rollback: {words}")
    # That is the harm: it stands.
    assert linked.db.execute("SELECT count(*) FROM public.thing WHERE id = 77") == [(int(name != "a trigger"),)]


def test_dblink_that_nobody_calls_is_no_escape(linked: Small) -> None:
    linked.db.execute("ALTER TABLE public.thing DISABLE TRIGGER far")
    assert linked.play(**PASSING["raises"]).status == "passed"
    assert linked.play(when="SELECT public.answer()", then=[{"returns": {"refused": True}}]).status == "passed"


@pytest.mark.smoke
def test_calls_that_may_not_be_counted_are_not_judged(linked: Small) -> None:
    """Not seen is not held: a role that may not have calls counted plays no proof where dblink is installed."""
    role = linked.db.role()
    one = {"reason": "A test.", "when": "SELECT 1 AS a", "then": [{"returns": {"a": 1}}]}
    wanted = desired.load(linked.state(one=one), None)
    (verdict,) = prove.prove(linked.db.dsn_as(role), wanted).proofs
    assert (verdict.status, verdict.missing) == ("not_judged", "SET on parameter track_functions")
    assert "public.dblink(text) and " in verdict.detail
    linked.db.execute(f"ALTER ROLE {role} SET track_functions = 'all'")
    (verdict,) = prove.prove(linked.db.dsn_as(role), wanted).proofs
    assert verdict.status == "passed"
    linked.db.execute(f"ALTER ROLE {role} RESET track_functions")
    if linked.db.server.major >= 15:
        linked.db.execute(f"GRANT SET ON PARAMETER track_functions TO {role}")
        (verdict,) = prove.prove(linked.db.dsn_as(role), wanted).proofs
        assert verdict.status == "passed"
        linked.db.execute(f"REVOKE SET ON PARAMETER track_functions FROM {role}")
    linked.db.execute("DROP EXTENSION dblink CASCADE")
    (verdict,) = prove.prove(linked.db.dsn_as(role), wanted).proofs
    assert verdict.status == "passed"


def test_the_role_holds_for_when_only(small: Small) -> None:
    role = small.db.role()
    verdict = small.play(
        steps=[
            {"as": role, "when": "SELECT public.who()", "then": [{"returns": {"who": role}}]},
            {"given": [ADD], "when": "SELECT public.who()", "then": [{"returns": {"who": "postgres"}}]},
            {
                "as": role,
                "when": "SELECT FROM public.thing",
                "then": [{"raises": "42501"}, {"query": THING, "equals": "one"}],
            },
            {"when": "SELECT public.who()", "then": [{"returns": {"who": "postgres"}}]},
        ]
    )
    assert verdict.status == "passed", verdict.detail


def test_row_security_is_on_for_callers_and_off_for_queries(small: Small) -> None:
    role = small.db.role()
    small.db.execute(f"ALTER TABLE public.thing ENABLE ROW LEVEL SECURITY; GRANT SELECT ON public.thing TO {role}")
    verdict = small.play(
        **{"as": role},
        when="SELECT count(*) FROM public.thing",
        then=[{"returns": {"count": 0}}, {"query": THING, "rows": 1}],
    )
    assert verdict.status == "passed", verdict.detail


def test_a_precondition_that_does_not_hold(small: Small) -> None:
    need = {"query": "SELECT t.id FROM public.thing AS t", "rows": 0, "because": "Somebody left things here."}
    verdict = small.play(requires=[need], when=ADD, then=[{"returns": []}])
    assert (verdict.status, verdict.missing) == ("not_judged", "precondition")
    assert verdict.detail == "Somebody left things here. (found 1 rows, required 0 rows)"


def test_what_the_role_may_not_do_is_not_judged(small: Small) -> None:
    role = small.db.role()
    small.db.execute(f"GRANT SELECT ON public.thing, public.settings TO {role}")
    wanted = desired.load(
        small.state(
            given={"reason": "A test.", "given": [ADD], "when": "SELECT 1", "then": [{"returns": []}]},
            armed={"reason": "A test.", "arm": {"app.open": "true"}, "when": "SELECT 1", "then": [{"returns": []}]},
            role={"reason": "A test.", "as": "postgres", "when": "SELECT 1", "then": [{"returns": []}]},
            nobody={"reason": "A test.", "as": "no_such_role", "when": "SELECT 1", "then": [{"returns": []}]},
            late={
                "reason": "A test.",
                "when": "SELECT 1",
                "then": [{"query": "SELECT l.id FROM public.late AS l", "rows": 0}],
            },
        ),
        None,
    )
    report = prove.prove(small.db.dsn_as(role), wanted)
    assert {verdict.status for verdict in report.proofs} == {"not_judged"}
    assert report.outcome == "proof_failed"
    missing = {verdict.address.partition(".")[2]: verdict.missing for verdict in report.proofs}
    assert missing["role"] == "membership with SET in role postgres"
    assert missing["nobody"] == "role no_such_role"
    assert missing["late"] == "SELECT on public.late"


def test_a_gate_that_does_not_keep_its_value(small: Small) -> None:
    small.db.execute(
        "CREATE FUNCTION public.back() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.value := 'false'; RETURN NEW; END$$;"
        " CREATE TRIGGER back BEFORE UPDATE ON public.settings FOR EACH ROW EXECUTE FUNCTION public.back()"
    )
    verdict = small.play(arm={"app.open": "true"}, when="SELECT 1", then=[{"returns": {}}])
    assert (verdict.status, verdict.detail) == ("failed", "arm: app.open does not keep the value 'true'")


def test_a_lock_that_somebody_holds_is_nobodys_failure(small: Small) -> None:
    with psycopg.connect(small.db.dsn) as conn:
        conn.execute("UPDATE public.settings SET value = value")
        with pytest.raises(Locked):
            small.play(arm={"app.open": "true"}, when="SELECT 1", then=[{"returns": {}}])


def test_a_connection_that_breaks_ends_everything(small: Small) -> None:
    small.db.execute(
        "CREATE FUNCTION public.dies() RETURNS void LANGUAGE sql AS 'SELECT pg_terminate_backend(pg_backend_pid())'"
    )
    with pytest.raises(ServerProblem, match="connection was lost"):
        small.play(when="SELECT public.dies()", then=[{"returns": {}}])


# --- the shipped proofs -----------------------------------------------------------------------------------------------

SHIPPED = [f"proof.P{number:02}" for number in range(1, 12)] + [f"proof.X{number}" for number in range(1, 5)]
TWO_SESSIONS = "proof.X5-skip-locked"
FIFTY = """
INSERT INTO public.queue_heartbeat (executor_name, executor_kind, last_tick_at, last_tick_status, ticks_total)
SELECT 'executor_' || n, 'Agent', clock_timestamp() - n * interval '20 seconds', 'ok', n
FROM generate_series(1, 50) AS n
"""
JOBS = """
INSERT INTO public.job_queue (job_kind, idempotency_key, actor, state, priority, attempts, finished_at)
SELECT 'real.kind', 'real:' || n, 'somebody',
       CASE n % 3 WHEN 0 THEN 'queued' WHEN 1 THEN 'retry_waiting' ELSE 'succeeded' END,
       0, n % 5, CASE n % 3 WHEN 2 THEN now() END
FROM generate_series(1, 300) AS n;
INSERT INTO public.job_dead_letter (
    job_id, job_kind, idempotency_key, actor, attempts, max_attempts, dead_letter_reason, dead_lettered_by
)
SELECT gen_random_uuid(), 'real.kind', 'real:dead:' || n, 'somebody', 5, 5, 'max_attempts', 'somebody'
FROM generate_series(1, 20) AS n
"""
LEASE = """
UPDATE public.job_queue
SET state = 'leased', lease_owner = 'executor_1', lease_until = clock_timestamp() + interval '1 hour'
WHERE job_id IN (SELECT job_id FROM public.job_queue WHERE state = 'queued' LIMIT 5)
"""
TICK = "UPDATE public.queue_heartbeat SET last_tick_at = clock_timestamp() WHERE executor_name = 'executor_' || %s"
GIVE_BACK = """
UPDATE public.job_queue SET state = 'queued', lease_owner = NULL, lease_until = NULL WHERE lease_owner = 'executor_1'
"""


class Phase2:
    """The shipped state on one database: a copy that may be changed, and the way through plan, approval and apply."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db = db
        self.state = folder / "state"
        shutil.copytree(PROJECT / "state", self.state)
        extensions = sorted(name for (name,) in db.execute("SELECT extname FROM pg_extension"))
        self.edit(
            "governance.yaml",
            "  targets:\n",
            f"  targets:\n    here: {{vars: {{extensions: {json.dumps(extensions)}}}}}\n",
        )

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.state / file
        text = path.read_text()
        assert text.count(old) >= 1, old
        path.write_text(text.replace(old, new))

    def apply(self) -> list[Verdict]:
        """Plan, approve with everything accepted and attested, apply; the verdicts of the proofs."""
        helper = governed.Governed(self.db, self.state.parent)
        wanted = desired.load(self.state, "here")
        with pg.connect(self.db.dsn, "plan") as conn, pg.snapshot(conn):
            plan = survey(conn, wanted).plan(datetime.now(UTC))
        approval = approving.approve(
            plan,
            digest(plan.dump()),
            approver="operator",
            reason="a test",
            accepted=plan.hazards,
            attested=plan.attestations,
            expires=None,
            now=datetime.now(UTC),
        )
        done = applying.apply(helper.request(plan, [approval]), governed.silent)
        return list(done.proofs)

    def prove(self) -> ProofReport:
        return prove.prove(self.db.dsn, desired.load(self.state, "here"))


@pytest.fixture
def before(dieu45: Database, tmp_path: Path) -> Phase2:
    """The governed system before Phase 2."""
    return Phase2(dieu45, tmp_path)


def words(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Status by the short name of each proof, with the detail of what did not pass."""
    fine = {"passed", "rehearsed", "deferred"}
    return {
        re.split(r"-", verdict.address)[0]: verdict.status if verdict.status in fine else verdict.detail
        for verdict in verdicts
    }


@contextmanager
def busy(db: Database, *, jobs: bool) -> Iterator[None]:
    """Fifty executors that beat all the time; with `jobs` also a worker that leases real jobs and gives them back."""
    stop = threading.Event()
    beats: list[int] = []

    def beat() -> None:
        with psycopg.connect(db.dsn, autocommit=True) as conn:
            while not stop.wait(0.002):
                conn.execute(TICK, [len(beats) % 50 + 1])
                if jobs:
                    conn.execute(LEASE if len(beats) % 2 else GIVE_BACK)
                beats.append(1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert len(beats) > 10


@pytest.mark.smoke
def test_the_shipped_proofs_pass_in_an_apply_beside_fifty_executors_and_a_full_queue(before: Phase2) -> None:
    before.db.execute(FIFTY)
    before.db.execute(JOBS)
    with busy(before.db, jobs=False):
        proofs = before.apply()
    assert words(proofs) == {**dict.fromkeys(SHIPPED, "passed"), "proof.X5": "deferred"}
    # And again on the database as it is, while real jobs are leased.
    with busy(before.db, jobs=True):
        for _ in range(3):
            report = before.prove()
            assert words(report.proofs) == {**dict.fromkeys(SHIPPED, "passed"), "proof.X5": "deferred"}
            assert (report.outcome, prove.exit_code(report)) == ("no_changes", 0)


def test_the_shipped_proofs_leave_nothing(before: Phase2) -> None:
    before.apply()
    image_before = image(before.db)
    assert words(before.prove().proofs)["proof.P01"] == "passed"
    assert image(before.db) == image_before


def test_the_reaper_is_not_tried_where_leases_of_others_have_expired(before: Phase2) -> None:
    before.apply()
    phase2.Queue(before.db.conn).add_job("leased", lease=-60)
    report = before.prove()
    not_judged = {name for name, detail in words(report.proofs).items() if detail.startswith("Leases of real jobs")}
    assert not_judged == {"proof.P02", "proof.P03", "proof.P04", "proof.P05"}
    assert prove.exit_code(report) == 3


REAPER = "functions/fn_job_reap_stale_leases_apply.sql"
TRIAGE = "functions/fn_job_dead_letter_triage_update.sql"

MUTANTS = {
    "the second gate is not asked": (
        *(REAPER, "c.key = 'queue.lease.reaper_enabled' AND lower(btrim(c.value)) = 'true'", "true"),
        "proof.P03",
    ),
    "the third gate is inverted": (REAPER, "AND c.value = 'false'", "AND c.value <> 'false'", "proof.P03"),
    "the first gate is not asked": (
        *(REAPER, "c.key = 'queue.job_substrate.enabled' AND lower(btrim(c.value)) = 'true'", "true"),
        "proof.X1",
    ),
    "DEFINER is dropped": (TRIAGE, "SECURITY DEFINER", "SECURITY INVOKER", "proof.P06"),
    "the WHERE is widened": (
        TRIAGE,
        "WHERE d.dead_letter_id = p_dead_letter_id;\n\n    RETURN",
        "WHERE true;\n\n    RETURN",
        "proof.P06",
    ),
    "a reason is changed": (TRIAGE, "'invalid_triage_status'", "'invalid_status'", "proof.P06"),
    "a constant is moved": (REAPER, "least(3600,", "least(36000,", "proof.P04"),
    "a comparison is turned": (
        REAPER,
        "IF v_attempts < v_job.max_attempts",
        "IF v_attempts <= v_job.max_attempts",
        "proof.P05",
    ),
    "fresh and stale are swapped": (
        *("functions/fn_queue_stale_check.sql", "FILTER (WHERE NOT e.stale)", "FILTER (WHERE e.stale)"),
        "proof.X2",
    ),
    "the fence is taken down": (
        "functions/fn_job_ack.sql",
        "p_expected_attempts <> v_job.attempts",
        "false",
        "proof.X3",
    ),
    "somebody else may call": (
        *(
            "functions.yaml",
            "execute: [operator]\n    gates: [queue.job_substrate.enabled, queue.lease",
            "execute: [operator, reader]\n    gates: [queue.job_substrate.enabled, queue.lease",
        ),
        "proof.X4",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_body_rolls_the_apply_back(before: Phase2, mutant: str) -> None:
    file, old, new, killer = MUTANTS[mutant]
    before.edit(file, old, new)
    before_image = image(before.db)
    with pytest.raises(ProofFailed) as refused:
        before.apply()
    failed = [detail for detail in refused.value.details if ": failed: " in detail]
    assert any(detail.startswith(killer) for detail in failed), refused.value.details
    assert image(before.db) == before_image


def test_the_proofs_of_a_new_directory_pass(own_server: Callable[..., Server], tmp_path: Path) -> None:
    """On a server of its own, because its roles have plain names."""
    scaffold.write(tmp_path / "state")
    (objects,) = re.findall(r"```sql\n(.*?)```", (tmp_path / "state" / "README.md").read_text(), re.DOTALL)
    dsn = own_server().dsn()
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(objects.encode())
        conn.execute((tmp_path / "state" / "functions" / "example.sql").read_bytes())
        conn.execute("ALTER FUNCTION public.fn_sessions_purge(integer) OWNER TO app_owner")
        conn.execute("GRANT EXECUTE ON FUNCTION public.fn_sessions_purge(integer) TO app_worker")
    report = prove.prove(dsn, desired.load(tmp_path / "state", None))
    assert [(verdict.status, verdict.detail) for verdict in report.proofs] == [
        ("passed", "3 steps, 4 expectations met")
    ]


# --- the command, and a rehearsal -------------------------------------------------------------------------------------


def test_the_command(before: Phase2) -> None:
    before.apply()
    done = governed.command("prove", "-s", before.state, "-t", "here", dsn=before.db.dsn)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0].partition("-")[0] for line in lines if ": passed: " in line] == SHIPPED
    assert re.fullmatch(r"Proofs: 15 passed, 1 deferred; \d+\.\d\d s\. Everything was rolled back\.", lines[-1])

    before.db.execute("REVOKE EXECUTE ON FUNCTION public.fn_queue_stale_check(integer) FROM reader")
    done = governed.command("prove", "-s", before.state, "-t", "here", "--format", "json", dsn=before.db.dsn)
    report = json.loads(done.stdout)
    assert (done.returncode, report["outcome"]) == (3, "proof_failed")
    failed = {verdict["address"].partition("-")[0] for verdict in report["proofs"] if verdict["status"] == "failed"}
    assert failed == {"proof.P10", "proof.X2", "proof.X4"}


def test_scratch_needs_rehearse(before: Phase2) -> None:
    done = governed.command("prove", "-s", before.state, "-t", "here", "--scratch", before.db.dsn, dsn=before.db.dsn)
    assert (done.returncode, "Add --rehearse" in done.stderr) == (1, True)


@pytest.mark.smoke
def test_a_rehearsal_on_the_embedded_server(before: Phase2) -> None:
    """Planned on the target, played on a copy: the target need not have been changed yet."""
    before.db.execute(FIFTY)
    before_image = image(before.db)
    done = governed.command(
        "prove", "-s", before.state, "-t", "here", "--rehearse", "--format", "json", dsn=before.db.dsn
    )
    assert done.returncode == 0, done.stderr + done.stdout
    proofs = json.loads(done.stdout)["proofs"]
    assert {verdict["status"] for verdict in proofs} == {"rehearsed"}
    assert len(proofs) == 16
    assert re.search(r"; rehearsed on PostgreSQL 18\.\d+, schema [0-9a-f]{16}$", proofs[0]["detail"])
    assert image(before.db) == before_image


@pytest.mark.smoke
def test_a_rehearsal_on_a_database_that_is_named(before: Phase2, db: Database) -> None:
    before.apply()
    wanted = desired.load(before.state, "here")
    report = rehearsal.prove(before.db.dsn, wanted, scratch=db.dsn)
    assert words(report.proofs) == dict.fromkeys([*SHIPPED, "proof.X5"], "rehearsed")
    # Its own gates are as declared again, and it is no longer empty.
    assert db.execute("SELECT value FROM public.dot_config WHERE key = 'queue.job_substrate.enabled'") == [("false",)]
    with pytest.raises(UsageError, match="is not empty"):
        rehearsal.prove(before.db.dsn, wanted, scratch=db.dsn)


@pytest.mark.parametrize("function", ["fn_job_reap_stale_leases_apply", "fn_job_claim"])
def test_waiting_for_a_lock_is_seen_by_two_sessions_only(before: Phase2, db: Database, function: str) -> None:
    before.edit(f"functions/{function}.sql", "FOR UPDATE SKIP LOCKED", "FOR UPDATE")
    wanted = desired.load(before.state, "here")
    report = rehearsal.prove(before.db.dsn, wanted, scratch=db.dsn)
    found = words(report.proofs)
    assert found.pop("proof.X5").startswith("step 1: when: canceling statement due to statement timeout")
    assert found == dict.fromkeys(SHIPPED, "rehearsed")


# --- a rehearsal, carried into an apply -------------------------------------------------------------------------------


class Carried(phase2.Phase2):
    """Phase 2, planned and approved, and rehearsed on a database beside it."""

    def __init__(self, db: Database, scratch: Database, folder: Path) -> None:
        super().__init__(db, folder)
        self.scratch = scratch
        self.report = folder / "phase2.rehearsal.json"

    def rehearse(self, code: int = 0) -> None:
        words = ("prove", "-s", self.state, "-t", self.target, "--rehearse", "--scratch", self.scratch.dsn)
        done = self.run(*words, "--out", self.report, code=code)
        assert f"reconciler apply PLAN --rehearsal {self.report}" in done.stderr

    def apply(self, *more: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        return super().apply("--rehearsal", self.report, *more, code=code)

    def forge(self, **changes: Any) -> None:
        """As somebody would who can compute a checksum."""
        document = json.loads(self.report.read_text())
        self.report.write_bytes(planning.serialize({**document, **changes}))


@pytest.fixture
def rehearsed(dieu45: Database, db: Database, tmp_path: Path) -> Carried:
    made = Carried(dieu45, db, tmp_path)
    made.approve()
    return made


@pytest.mark.smoke
def test_a_rehearsal_is_carried_into_an_apply_and_told_as_one(rehearsed: Carried) -> None:
    rehearsed.rehearse()
    place = rehearsed.folder / "run"
    done = rehearsed.apply("--evidence", place)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Invariants: ")]
    assert line.endswith(" Proofs: 15 passed, 1 rehearsed. Surface: 16 of 16 as predicted.")
    found = json.loads((place / "evidence.json").read_text())
    words_ = {row["address"].partition("-")[0]: row for row in found["proofs"]}
    assert words_["proof.X5"]["status"] == "rehearsed"
    ((version,),) = rehearsed.scratch.execute("SELECT split_part(current_setting('server_version'), ' ', 1)")
    where = rf"; rehearsed on PostgreSQL {re.escape(version)}, schema [0-9a-f]{{16}}, by the report of [0-9TZ:-]+$"
    assert re.search(where, words_["proof.X5"]["detail"])
    assert {row["status"] for name, row in words_.items() if name != "proof.X5"} == {"passed"}
    assert (place / "rehearsal.json").read_bytes() == rehearsed.report.read_bytes()
    assert "rehearsal.json" in (place / "SHA256SUMS").read_text()
    report = (place / "report.md").read_text()
    assert "Proofs: 15 passed, 1 rehearsed" in report
    assert "nobody signed it, and this run did not see it happen" in report
    assert "No changes." in rehearsed.plan()
    # A third party finds the report among the evidence.
    rehearsed.run("verify", place)
    (place / "rehearsal.json").unlink()
    assert "rehearsal.json: missing" in rehearsed.run("verify", place, code=1).stdout


def test_a_rehearsal_of_other_effects_is_refused_before_anything_begins(rehearsed: Carried) -> None:
    rehearsed.rehearse()
    rehearsed.edit("gates.yaml", 'value: "10"', 'value: "20"')
    rehearsed.approve()
    before = image(rehearsed.db)
    done = rehearsed.apply("--evidence", rehearsed.folder / "run", code=1)
    assert "The rehearsal was of other effects" in done.stderr
    assert not (rehearsed.folder / "run").exists()
    assert image(rehearsed.db) == before


def test_a_rehearsal_on_another_schema_is_stale(rehearsed: Carried) -> None:
    rehearsed.rehearse()
    rehearsed.db.execute("CREATE TABLE public.later (id integer)")
    before = image(rehearsed.db)
    done = rehearsed.apply("--format", "json", code=4)
    assert json.loads(done.stdout)["outcome"] == "stale"
    assert "the schema is not the one that was copied" in done.stderr
    assert image(rehearsed.db) == before
    rehearsed.db.execute("DROP TABLE public.later")
    rehearsed.apply()


def test_a_proof_that_failed_on_the_rehearsal_rolls_the_apply_back(rehearsed: Carried) -> None:
    rehearsed.edit("functions/fn_job_claim.sql", "FOR UPDATE SKIP LOCKED", "FOR UPDATE")
    rehearsed.approve()
    rehearsed.rehearse(code=3)
    before = image(rehearsed.db)
    done = rehearsed.apply("--evidence", rehearsed.folder / "run", "--format", "json", code=3)
    assert json.loads(done.stdout)["outcome"] == "proof_failed"
    found = json.loads((rehearsed.folder / "run" / "evidence.json").read_text())
    assert found["outcome"] == "proof_failed"
    assert [row["address"] for row in found["proofs"] if row["status"] == "failed"] == [TWO_SESSIONS]
    assert image(rehearsed.db) == before


def test_a_forged_report_says_no_more_than_rehearsed(rehearsed: Carried) -> None:
    """Nobody signs a report, so a lie about the one proof that no apply plays is told, as a report's word. No other."""
    rehearsed.rehearse()
    proofs = json.loads(rehearsed.report.read_text())["proofs"]
    lied = [
        {**row, "status": "failed" if row["address"] != TWO_SESSIONS else "rehearsed", "detail": "x"} for row in proofs
    ]
    rehearsed.forge(proofs=[{**row, "status": "passed"} for row in proofs])
    before = image(rehearsed.db)
    assert "No rehearsal can say passed" in rehearsed.apply(code=1).stderr
    rehearsed.report.write_text(rehearsed.report.read_text().replace("passed", "rehearsed"))
    assert "changed after it was written" in rehearsed.apply(code=1).stderr
    assert image(rehearsed.db) == before
    rehearsed.forge(proofs=lied)
    done = rehearsed.apply("--format", "json")
    said = {row["address"]: (row["status"], row["detail"]) for row in json.loads(done.stdout)["proofs"]}
    assert said.pop(TWO_SESSIONS)[0] == "rehearsed"
    assert {status for status, _ in said.values()} == {"passed"}
    assert "x" not in {detail for _, detail in said.values()}


def test_a_report_of_proofs_on_the_target_is_no_rehearsal(rehearsed: Carried) -> None:
    done = rehearsed.run("prove", "-s", rehearsed.state, "-t", rehearsed.target, "--out", rehearsed.report, code=1)
    assert "Add --rehearse." in done.stderr
    assert not rehearsed.report.exists()


def test_the_digest_of_a_schema_sees_what_a_proof_could_depend_on(db: Database) -> None:
    db.execute(
        "CREATE TABLE public.t (id integer, note text); CREATE VIEW public.v AS SELECT id FROM public.t;"
        " CREATE FUNCTION public.f() RETURNS integer LANGUAGE sql AS 'SELECT 1'; CREATE TYPE public.mood AS ENUM ('a');"
        " CREATE DOMAIN public.positive AS integer CHECK (VALUE > 0)"
    )
    role = db.role()

    def now() -> str:
        with pg.connect(db.dsn, "test") as conn, pg.snapshot(conn):
            return definitions.of_schema(conn)

    seen = {now()}
    changes = (
        "ALTER TABLE public.t ALTER note SET NOT NULL",
        "ALTER TABLE public.t ADD CONSTRAINT c CHECK (id > 0)",
        "CREATE INDEX ON public.t (id)",
        "CREATE FUNCTION public.g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER g BEFORE INSERT ON public.t FOR EACH ROW EXECUTE FUNCTION public.g()",
        "ALTER TABLE public.t DISABLE TRIGGER g",
        "CREATE OR REPLACE FUNCTION public.f() RETURNS integer LANGUAGE sql AS 'SELECT 2'",
        "ALTER FUNCTION public.f() SECURITY DEFINER",
        f"GRANT SELECT ON public.t TO {role}",
        f"GRANT UPDATE (note) ON public.t TO {role}",
        f"GRANT EXECUTE ON FUNCTION public.f() TO {role}",
        f"ALTER TABLE public.t OWNER TO {role}",
        "ALTER TABLE public.t ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON public.t USING (id = 1)",
        "CREATE OR REPLACE VIEW public.v AS SELECT id + 0 AS id FROM public.t",
        "ALTER TYPE public.mood ADD VALUE 'b'",
        "ALTER DOMAIN public.positive ADD CHECK (VALUE < 10)",
        "CREATE EXTENSION btree_gist",
        "CREATE SCHEMA other",
    )
    for statement in changes:
        db.execute(statement)
        seen.add(now())
    assert len(seen) == len(changes) + 1
    # Rows are no part of it.
    db.execute("INSERT INTO public.t VALUES (1, 'x')")
    assert now() in seen
