"""Mutants that no proof kills: each does what its original does on a thousand inputs, which see every other fault."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from reconciler import mutate
from reconciler.desired import sources
from reconciler.mutants import MUTATORS, Mutant, mutants
from tests import sampling
from tests.equivalence import Bench
from tests.integration import phase2
from tests.scenes import CHUNK, INPUTS, scenes
from tests.servers import PROJECT, Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXTS = {routine: path.read_text() for routine, path in sources(PROJECT / "state").items()}
MUTANTS = {each.id: each for routine, text in TEXTS.items() for each in mutants(routine, text)}
KNOWN = mutate._known(PROJECT / "examples" / "dieu45" / "equivalent-mutants.yaml")

SHORT = [re.sub(r"^public\.|\(.*", "", routine) for routine in TEXTS]

MOMENT = "to the microsecond"
"""Words by which an entry admits that it does differ, where a time equals the clock that the function reads itself. No
proof can bring that about."""

SAMPLE = {entry.routine: name for name, entry in KNOWN.items()}
"""One of each routine."""


@pytest.fixture(scope="module")
def bench(server: Server, new_name: Callable[[], str]) -> Iterator[Bench]:
    database = Database(server, new_name())
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
    phase2.load_baseline(database.conn)
    phase2.install(database.conn)
    yield Bench(database.conn)
    database.drop()


def objection(bench: Bench, mutant: Mutant, because: str) -> str | None:
    """What speaks against calling a mutant equivalent for this reason; None when nothing does."""
    if mutant.mutator == "lock":
        return "a lock shows only between two sessions: a proof of two sessions has to kill it"
    text = TEXTS[mutant.routine]
    found = bench.difference(mutant, text, ties=MOMENT not in because)
    if found is not None:
        return f"it is not equivalent: {found}"
    if MOMENT in because and bench.difference(mutant, text) is None:
        return f"its reason admits a difference, {MOMENT}, and there is none"
    return None


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entry"), KNOWN.items(), ids=KNOWN)
def test_an_entry_names_a_mutant_and_says_which(name: str, entry: mutate.Equivalent) -> None:
    assert name in MUTANTS, f"{entry.routine} has no such mutant any more; was: {entry.fault}"
    mutant = MUTANTS[name]
    assert (entry.routine, entry.fault) == (mutant.routine, f"{mutant.before} => {mutant.after}")
    assert entry.because.strip()


@pytest.mark.parametrize("name", sampling.slow(SAMPLE.values(), 3))
def test_one_of_each_routine_is_equivalent(bench: Bench, name: str) -> None:
    assert objection(bench, MUTANTS[name], KNOWN[name].because) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN if name not in SAMPLE.values()])
def test_every_other_one_is_equivalent(bench: Bench, name: str) -> None:
    assert objection(bench, MUTANTS[name], KNOWN[name].because) is None


# --- the inputs, and what they see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("routine", sampling.slow(TEXTS, 3), ids=SHORT)
def test_the_inputs_reach_every_refusal_and_mostly_come_through(bench: Bench, routine: str) -> None:
    some = scenes(routine)
    outcomes = bench.outcomes(routine, TEXTS[routine])

    assert len({(scene.asked(whole=False), call) for scene in some for call in scene.calls}) == INPUTS
    assert sum(outcome.succeeded for outcome in outcomes) >= 0.6 * INPUTS
    reasons = Counter(outcome.reason for outcome in outcomes)
    assert [one for one in re.findall("'reason', '([^']*)'", TEXTS[routine]) if reasons[one] < 3] == []
    # Outcomes that depend on when they were made would differ for no reason.
    with bench.installed(routine, TEXTS[routine]):
        again = bench.play(some[: 2 * CHUNK])
    assert again == outcomes[: len(again)]


# The routine, and the words that are the fault's.
SEEN = [
    ("fn_job_queue_updated_at", "normalisation", "clock_timestamp()", "now()"),
    ("fn_job_enqueue", "limit", "jsonb_agg(DISTINCT denied.name", "jsonb_agg(denied.name"),
    ("fn_job_enqueue", "conflict", "ON CONFLICT (idempotency_key)", "v_max_attempts) RETURNING"),
    ("fn_job_enqueue", "constant", "'reason', 'idempotency_race'", "'reason', 'idempotency_racex'"),
    ("fn_job_claim", "order", "q.job_id LIMIT", "q.scheduled_at LIMIT"),
    ("fn_job_claim", "normalisation", "lower(btrim(c.value)) = 'true'", "AND btrim(c.value) = 'true'"),
    ("fn_job_claim", "security", "SECURITY DEFINER", "SECURITY INVOKER"),
    ("fn_job_ack", "comparison", "v_job.lease_until < v_now", "v_job.lease_until <= v_now"),
    ("fn_job_ack", "logic", "p_lease_owner IS NULL OR v_job", "v_job.lease_owner IS DISTINCT"),
    ("fn_job_fail", "fallback", "LEAST(v_attempts - 1, 20)))", "(v_attempts - 1)))"),
    ("fn_job_fail", "arithmetic", "* (2 ^ LEAST(v_attempts", "* (2 * LEAST(v_attempts"),
    ("fn_job_extend_lease", "constant", "v_lease_seconds, 300), 1)", "v_lease_seconds, 300), 2)"),
    ("fn_job_extend_lease", "statement", "v_lease_until := GREATEST", "nothing"),
    ("fn_queue_heartbeat_tick", "arithmetic", "h.metadata || v_metadata", "v_metadata || h.metadata"),
    ("fn_queue_heartbeat_tick", "column", "SET last_tick_at = GREATEST", "h SET last_tick_status = p_status,"),
    ("fn_queue_stale_check", "normalisation", "floor(extract", "h.ticks_total, extract"),
    ("fn_queue_heartbeat_register_passive", "condition", "COALESCE(btrim(p_actor), '') = ''", "false"),
    ("fn_job_reap_stale_leases_dry_run", "constant", "p_limit DEFAULT 100", "p_limit DEFAULT 101"),
    ("fn_job_reap_stale_leases_apply", "filter", "WHERE q.job_id = v_job.job_id", "WHERE q.state = v_job.state"),
    ("fn_job_dead_letter_requeue_dry_run", "filter", "WHERE q.idempotency_key = v_letter", "WHERE q.state IN"),
    ("fn_job_dead_letter_triage_update", "null", "triage_note = p_triage_note", "triage_note = NULL"),
]


def planted(function: str, mutator: str, before: str, after: str) -> Mutant:
    """The first mutant of a function with these words."""
    return next(
        each
        for each in MUTANTS.values()
        if f".{function}(" in each.routine
        and each.mutator == mutator
        and before in each.before
        and after in each.after
        and before not in each.after
    )


@pytest.mark.parametrize(("function", "mutator", "before", "after"), sampling.slow(SEEN, 3))
def test_a_fault_is_seen_and_told_with_its_input(
    bench: Bench, function: str, mutator: str, before: str, after: str
) -> None:
    mutant = planted(function, mutator, before, after)
    found = bench.difference(mutant, TEXTS[mutant.routine])
    assert found is not None
    assert found.number < INPUTS
    assert re.match(rf"SELECT public.\"{function}\"\(|WITH c AS \(UPDATE public.job_queue", found.input)
    assert " -> " in found.what


def test_faults_of_every_kind_and_function_are_tried() -> None:
    assert {mutator for _, mutator, _, _ in SEEN} == MUTATORS.keys() - {"lock"}
    assert {function for function, _, _, _ in SEEN} == set(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("routine", TEXTS, ids=SHORT)
def test_what_is_not_on_the_list_is_seen_to_differ(bench: Bench, routine: str) -> None:
    others = [each for each in MUTANTS.values() if each.routine == routine and each.mutator != "lock"]
    unseen = [
        f"{each.id} {each.mutator}: {each.before} => {each.after}"
        for each in others[::15]
        if each.id not in KNOWN and bench.difference(each, TEXTS[routine]) is None
    ]
    assert unseen == []


# --- what does not get onto the list ----------------------------------------------------------------------------------


def test_a_lock_is_no_matter_for_one_session(bench: Bench) -> None:
    mutant = planted("fn_job_ack", "lock", "FOR UPDATE", "q.job_id = p_job_id")
    assert bench.difference(mutant, TEXTS[mutant.routine]) is None
    assert "two sessions" in str(objection(bench, mutant, "The row is not read again."))


def test_a_difference_at_one_moment_has_to_be_admitted(bench: Bench) -> None:
    mutant = planted("fn_job_ack", "comparison", "v_job.lease_until < v_now", "v_job.lease_until <= v_now")
    assert "'late'" not in str(objection(bench, mutant, f"Differs only where it equals the clock, {MOMENT}."))
    assert objection(bench, mutant, f"Differs only where it equals the clock, {MOMENT}.") is None
    told = objection(bench, mutant, "It is the same.")
    assert told is not None
    assert "answer.late False -> True" in told


def test_a_difference_in_a_race_is_one(bench: Bench) -> None:
    mutant = planted("fn_job_enqueue", "constant", "'reason', 'idempotency_race'", "'reason', 'idempotency_racex'")
    assert "with a rival" in str(objection(bench, mutant, "It is the same."))


def test_an_excuse_hides_no_other_difference_and_stands_only_where_it_is_needed(bench: Bench) -> None:
    changed = planted("fn_job_ack", "constant", "'not_leased'", "'not_leasedx'")
    assert "not_leasedx" in str(objection(bench, changed, f"Differs {MOMENT}."))
    same = next(MUTANTS[name] for name, entry in KNOWN.items() if MOMENT not in entry.because)
    assert objection(bench, same, "It is the same.") is None
    assert "there is none" in str(objection(bench, same, f"Differs {MOMENT}."))


def test_what_the_server_refuses_or_never_ends_differs(bench: Bench) -> None:
    mutant = planted("fn_job_ack", "constant", "'not_leased'", "'not_leasedx'")
    text = TEXTS[mutant.routine]
    refused = mutant.model_copy(update={"text": text.replace("RETURNS jsonb", "RETURNS json")})
    assert "cannot change return type" in str(bench.difference(refused, text))
    endless = mutant.model_copy(update={"text": text.replace("BEGIN\n", "BEGIN\n    LOOP END LOOP;\n", 1)})
    bench.patience = "100ms"
    assert "statement timeout" in str(bench.difference(endless, text))
