"""Proofs, offline: which statements they may hold, how a proof is written, and which gates are proven."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired
from reconciler.checks.proof import CHECK, ProofSpec, refuses, statement_troubles
from reconciler.errors import InputError
from reconciler.model import canonical
from reconciler.plan import dump_desired, load_desired
from tests import states

if TYPE_CHECKING:
    from pathlib import Path

ALLOWED = [
    "SELECT 1",
    "SELECT public.fn_one(1)",
    "SELECT id FROM public.jobs FOR UPDATE SKIP LOCKED",
    "SELECT nextval('public.s'), setval('public.s', 5), clock_timestamp(), gen_random_uuid(), pg_sleep(0.1)",
    "SELECT set_config('search_path', 'x', true)",
    "SELECT (a.b).c, x.note FROM public.t AS x, a",
    "SELECT count(*) FILTER (WHERE v) OVER (ORDER BY n), string_agg(a, ',') FROM public.t",
    "VALUES (1), (2)",
    "TABLE public.t",
    "INSERT INTO public.t VALUES (1) ON CONFLICT DO NOTHING RETURNING *",
    "UPDATE public.t SET a = now()",
    "DELETE FROM public.t USING public.u WHERE true",
    "MERGE INTO public.t USING public.u ON true WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM public.t RETURNING *) SELECT * FROM gone",
    "CALL public.p(1)",
    "CREATE TEMP TABLE x AS SELECT 1 AS a",
    "CREATE TEMP TABLE IF NOT EXISTS x ON COMMIT DROP AS VALUES (1)",
    "SET CONSTRAINTS ALL DEFERRED",
    "SELECT 1;",
]

REFUSED = [
    ("", "there is no statement here"),
    ("SELECT 1; SELECT 2", "exactly one statement is allowed here"),
    ("SELECT 1; COMMIT; BEGIN", "exactly one statement is allowed here"),
    ("SELEC 1", "syntax error"),
    ("COMMIT", "COMMIT is not allowed in a proof"),
    ("ROLLBACK TO SAVEPOINT reconciler_proof", "ROLLBACK is not allowed"),
    ("RELEASE reconciler_proof", "RELEASE is not allowed"),
    ("SAVEPOINT a", "SAVEPOINT is not allowed"),
    ("PREPARE TRANSACTION 'x'", "PREPARE is not allowed"),
    ("PREPARE x AS SELECT 1", "PREPARE is not allowed"),
    ("EXECUTE x", "EXECUTE is not allowed"),
    ("DO $$BEGIN PERFORM 1; END$$", "DO is not allowed"),
    ("COPY public.t TO '/tmp/x'", "COPY is not allowed"),
    ("COPY (SELECT 1) TO PROGRAM 'id'", "COPY is not allowed"),
    ("LISTEN x", "LISTEN is not allowed"),
    ("NOTIFY x", "NOTIFY is not allowed"),
    ("LOCK public.t", "LOCK is not allowed"),
    ("TRUNCATE public.t", "TRUNCATE is not allowed"),
    ("SET ROLE postgres", "SET is not allowed"),
    ("SET search_path = x", "SET is not allowed"),
    ("RESET ALL", "RESET is not allowed"),
    ("DISCARD ALL", "DISCARD is not allowed"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DECLARE is not allowed"),
    ("EXPLAIN ANALYZE SELECT 1", "EXPLAIN is not allowed"),
    ("VACUUM", "VACUUM is not allowed"),
    ("CREATE TABLE x (a integer)", "CREATE is not allowed"),
    ("ALTER TABLE x ADD b integer", "ALTER is not allowed"),
    ("GRANT SELECT ON x TO y", "GRANT is not allowed"),
    ("CREATE TABLE x AS SELECT 1", "only a temporary table"),
    ("CREATE UNLOGGED TABLE x AS SELECT 1", "only a temporary table"),
    ("CREATE MATERIALIZED VIEW x AS SELECT 1", "only a temporary table"),
    ("CREATE TEMP TABLE x AS EXECUTE y", "EXECUTE is not allowed"),
    ("SELECT 1 INTO x", "SELECT INTO is not allowed"),
    ("WITH a AS (SELECT 1) SELECT * INTO x FROM a", "SELECT INTO is not allowed"),
    ("SELECT $1", "there are no parameters"),
    ("SELECT dblink('x', 'y')", "a connection of its own"),
    ("SELECT * FROM public.dblink('x', 'y') AS t (a integer)", "a connection of its own"),
    ("SELECT ext.dblink_exec('x')", "a connection of its own"),
    ("SELECT lo_export(1, '/tmp/x')", "write any other with its schema"),
    ("SELECT pg_catalog.lo_import('/tmp/x')", "its effect could outlive a rollback"),
    ("SELECT pg_advisory_lock(1)", "lock"),
    ("SELECT pg_try_advisory_lock(1)", "lock"),
    ("SELECT pg_catalog.pg_notify('a', 'b')", "pg_notify"),
    ("SELECT pg_terminate_backend(1)", "pg_terminate_backend"),
    ("SELECT pg_logical_emit_message(false, 'a', 'b')", "pg_logical_emit_message"),
    ("SELECT query_to_xml('SELECT 1', true, true, '')", "query_to_xml"),
    ("SELECT set_config('role', 'x', false)", "set_config must be local"),
    ("SELECT set_config('role', 'x', v) FROM public.t", "set_config must be local"),
    ("SELECT set_config('role', 'x', is_local => true)", "set_config must be local"),
    ("SELECT fn_one(1)", "write any other with its schema"),
    ("INSERT INTO public.t SELECT pg_advisory_lock(1)", "pg_advisory_lock"),
    ("UPDATE public.t SET a = lo_creat(1)", "lo_creat"),
    ("CALL pg_catalog.pg_advisory_lock(1)", "pg_advisory_lock"),
    ("CREATE TEMP TABLE x AS SELECT pg_advisory_lock(1)", "pg_advisory_lock"),
    ("SELECT x.pg_notify FROM public.t AS x", "could be a call"),
    ("SELECT (1).pg_advisory_lock", "could be a call"),
]


@pytest.mark.parametrize("text", ALLOWED)
def test_what_a_statement_may_be(text: str) -> None:
    assert statement_troubles(text) == []


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_refused(text: str, message: str) -> None:
    (first, *_) = statement_troubles(text)
    assert message in first.message


# --- how a proof is written -------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"reason": "A test.", "when": "SELECT 1", "then": [{"returns": []}]}


def load(folder: Path, *proofs: dict[str, Any], gates: str = "[]") -> desired.Desired:
    files = {name: text for name, text in states.STATE.items() if name != "proofs.yaml"}
    files["functions.yaml"] = files["functions.yaml"].replace("[app.enabled]", gates)
    named = {f"one{number}": proof for number, proof in enumerate(proofs, 1)}
    states.write(folder, {**files, "proofs.yaml": json.dumps({"proofs": named}, indent=1)})
    return desired.load(folder, None)


def problems(folder: Path, *proofs: dict[str, Any], gates: str = "[]") -> list[str]:
    with pytest.raises(InputError) as refused:
        load(folder, *proofs, gates=gates)
    return [problem.message for problem in refused.value.problems]


TWO = {"sessions": 2, "holder": ["SELECT 1"]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"reason": ""}, "at least 1 character"),
    ({"then": []}, "at least 1"),
    ({"then": [{}]}, "exactly one of `returns`, `raises` and `query`"),
    ({"then": [{"returns": {}, "raises": "23505"}]}, "exactly one of `returns`, `raises` and `query`"),
    ({"then": [{"query": "SELECT 1"}]}, "exactly one of `equals`, `rows` and `unchanged`"),
    ({"then": [{"query": "SELECT 1", "rows": 1, "equals": "1"}]}, "exactly one of `equals`, `rows` and `unchanged`"),
    ({"then": [{"returns": {}, "rows": 1}]}, "exactly one of `equals`, `rows` and `unchanged`"),
    ({"then": [{"raises": "unique"}]}, ""),
    ({"then": [{"returns": {}, "message": "x"}]}, "`message` goes with `raises`"),
    ({"then": [{"raises": "23505"}, {"returns": {}}]}, "write `raises` or `returns`"),
    ({"then": [{"raises": "23505"}, {"raises": "23505"}]}, "write `raises` once"),
    ({"then": [{"query": "SELECT 1 FROM jobs", "rows": 1}]}, "schema"),
    ({"then": [{"query": "SELECT public.fn_one(1)", "rows": 1}]}, "no function that is allowed here"),
    ({"then": [{"query": "DELETE FROM public.t", "rows": 1}]}, "SELECT"),
    ({"requires": [{"query": "SELECT 1", "because": "x"}]}, "exactly one of `rows` and `equals`"),
    ({"requires": [{"query": "SELECT 1 FROM jobs", "rows": 0, "because": "x"}]}, "schema"),
    ({"given": ["COMMIT"]}, "COMMIT is not allowed"),
    ({"when": "SELECT 1; SELECT 2"}, "exactly one statement"),
    ({"arm": {"app.enabld": "true"}}, "gate 'app.enabld' is not declared"),
    ({"holder": ["SELECT 1"]}, "`holder` needs `sessions: 2`"),
    ({"within": "2s"}, "`within` needs `sessions: 2`"),
    ({"release": "commit"}, "`release` needs `sessions: 2`"),
    ({"meanwhile": ["SELECT 1"]}, "`meanwhile` needs `sessions: 2`"),
    ({"pause": {"after": "insert", "on": "public.t"}}, "`pause` needs `sessions: 2`"),
    ({"sessions": 2}, "`sessions: 2` needs `holder`"),
    ({**TWO, "release": "end"}, ""),
    ({**TWO, "meanwhile": ["SELECT 1"]}, "`meanwhile` needs `release`"),
    ({**TWO, "meanwhile": ["COMMIT"], "release": "commit"}, "COMMIT is not allowed"),
    ({**TWO, "pause": {"after": "insert", "on": "public.t"}}, "`pause` needs `release`"),
    ({**TWO, "pause": {"on": "public.t"}, "release": "commit"}, "exactly one of `before` and `after`"),
    ({**TWO, "pause": {"after": "insert", "before": "insert", "on": "public.t"}}, "exactly one of `before` and"),
    ({**TWO, "pause": {"after": "truncate", "on": "public.t"}, "release": "commit"}, ""),
    ({**TWO, "pause": {"after": "insert", "on": "t"}, "release": "commit"}, "is no qualified name"),
    ({"sessions": 3}, ""),
    ({"advances": ["s"]}, "is no qualified name"),
    ({"steps": [{"when": "SELECT 1", "then": [{"returns": []}]}]}, "unknown key"),
    ({"andthen": 1}, "unknown key"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_one_problem(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    found = problems(tmp_path, {**GOOD, **change})
    assert any(message in line for line in found), found


def test_all_problems_at_once_each_at_its_place(tmp_path: Path) -> None:
    step = {"when": "COMMIT", "then": [{"query": "SELECT 1 FROM jobs", "rows": 1}], "arm": {"nothing": "true"}}
    good = {"when": "SELECT 1", "then": [{"returns": []}]}
    with pytest.raises(InputError) as refused:
        load(tmp_path, {"reason": "A test.", "steps": [good, step]}, {**GOOD, "given": ["DO 'x'"]})
    lines = (tmp_path / "proofs.yaml").read_text().splitlines()
    places = [lines[(problem.line or 0) - 1].strip() for problem in refused.value.problems]
    assert places == ['"when": "COMMIT",', '"query": "SELECT 1 FROM jobs",', "\"DO 'x'\""]


def test_a_gate_that_is_not_declared_is_named_at_its_place(tmp_path: Path) -> None:
    step = {"when": "SELECT 1", "then": [{"returns": []}], "arm": {"nothing": "true"}}
    with pytest.raises(InputError) as refused:
        load(tmp_path, {"reason": "A test.", "steps": [step]})
    (problem,) = refused.value.problems
    line = (tmp_path / "proofs.yaml").read_text().splitlines()[(problem.line or 0) - 1]
    assert (problem.message, line.strip()) == ("gate 'nothing' is not declared", '"nothing": "true"')


def test_a_proof_survives_the_plan_file(tmp_path: Path) -> None:
    proof = {
        **GOOD,
        "requires": [{"query": "SELECT 1", "equals": "1", "because": "x"}],
        "arm": {"app.enabled": None, "app.limit": "5"},
        "as": "app_caller",
        "given": ["SELECT 1"],
        "then": [{"returns": {"a": [1, 2.5, None, {"b": True}]}}, {"query": "SELECT 1", "unchanged": True}],
    }
    wanted = load(tmp_path, proof, GOOD, {"reason": "x", "steps": [{"when": "SELECT 1", "then": GOOD["then"]}]})
    again = load_desired(json.loads(canonical(dump_desired(wanted))))
    assert again.checks == wanted.checks
    spec = again.checks["proof.one1"].spec
    assert isinstance(spec, ProofSpec)
    assert spec.stores == {"app.enabled": states.STORE, "app.limit": states.STORE}


# --- which gates are proven -------------------------------------------------------------------------------------------


def proof(when: str, *then: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"reason": "A test.", "when": when, "then": list(then), **more}


REFUSES = {"returns": {"refused": True, "reason": "app.enabled=false"}}


@pytest.mark.parametrize(
    "one",
    [
        proof("SELECT public.fn_one(1)", REFUSES),
        proof("SELECT public.fn_one()", REFUSES),
        proof("SELECT public.fn_one(p_limit => 1) AS a, 2 AS b", {"returns": {"a": {"reason": "app.enabled=shut"}}}),
        proof("SELECT a FROM public.fn_one(1) AS a", {"returns": [{"a": "app.enabled=false"}]}),
        proof("SELECT public.fn_one(1)", {"raises": "P0001", "message": "app.enabled is shut"}),
        {
            "reason": "A test.",
            "steps": [
                {"when": "SELECT 1", "then": [{"returns": []}]},
                {"when": "SELECT public.fn_one(1)", "then": [REFUSES]},
            ],
        },
    ],
)
def test_a_proof_that_exercises_the_gate(tmp_path: Path, one: dict[str, Any]) -> None:
    load(tmp_path, one, gates="[app.enabled]")


@pytest.mark.parametrize(
    "one",
    [
        GOOD,
        proof("SELECT 1 AS fn_one", REFUSES),
        proof("SELECT public.fn_two(1)", REFUSES),
        proof("SELECT other.fn_one(1)", REFUSES),
        proof("SELECT public.fn_one(1, 2)", REFUSES),
        proof("SELECT 'public.fn_one(1)'", REFUSES),
        proof("SELECT public.fn_one(1)", {"returns": {"reason": "app.enabled"}}),
        proof("SELECT public.fn_one(1)", {"returns": {"reason": "app.enabled.more=false"}}),
        proof("SELECT public.fn_one(1)", {"returns": {"reason": "not app.enabled=false"}}),
        proof("SELECT public.fn_one(1)", {"raises": "P0001"}),
        proof("SELECT public.fn_one(1)", REFUSES, sessions=2, holder=["SELECT 1"]),
    ],
)
def test_a_proof_that_does_not(tmp_path: Path, one: dict[str, Any]) -> None:
    assert problems(tmp_path, one, gates="[app.enabled]") == [
        "no proof shows that public.fn_one refuses with a reason `app.enabled=…`"
    ]


def test_each_gate_needs_its_own(tmp_path: Path) -> None:
    one = proof("SELECT public.fn_one(1)", REFUSES)
    found = problems(tmp_path, one, gates="[app.enabled, app.limit, app.phase]")
    assert found == [
        f"no proof shows that public.fn_one refuses with a reason `{gate}=…`" for gate in ("app.limit", "app.phase")
    ]


def test_a_broken_proof_does_not_make_another_problem_of_the_function(tmp_path: Path) -> None:
    found = problems(tmp_path, proof("SELECT public.fn_one(1); SELECT 2", REFUSES), gates="[app.enabled]")
    assert len(found) == 1
    assert "exactly one statement" in found[0]


def test_what_is_said_of_the_kind() -> None:
    assert (CHECK.name, CHECK.section, CHECK.order) == ("proof", "proofs", 30)
    spec = ProofSpec(reason="x", requires=(), advances=(), sessions=1, steps=(), stores={})
    assert not refuses(spec, "public", "fn", 1, "gate")
