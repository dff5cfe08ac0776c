"""The functions of the governed system, called on a server: refusals in their order, effects, answers, permissions."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from tests.integration import phase2
from tests.integration.phase2 import CALLER, DRY_RUN_ONLY, HEARTBEAT, REAPER, REPLAY, SUBSTRATE, Queue
from tests.servers import Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.smoke

KINDS = ("DOT", "Agent", "Hermes", "Codex", "PG_worker", "external_worker", "future_Kestra_adapter")
DENIED = ("body", "content", "raw", "vector", "embedding", "secret", "token", "password", "ssn", "personal_data")
TRIAGE = ("pending", "acknowledged", "manual_replay", "escalated", "closed")

# What never opens a gate, though a cast to boolean would take half of it for true. None: the row is missing.
NOT_TRUE = (None, "", "false", "garbage", "on", "y", "yes", "t", "1", "truе")  # noqa: RUF001 - the last e is Cyrillic
NOT_FALSE = (None, "", "true", "garbage", "off", "n", "no", "f", "0", "FALSE", " false")


@pytest.fixture(scope="module")
def phase2_database(server: Server, new_name: Callable[[], str]) -> Iterator[Database]:
    """One database for all tests of this file that roll back."""
    database = Database(server, new_name())
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
    phase2.load_baseline(database.conn)
    phase2.install(database.conn)
    yield database
    database.drop()


@pytest.fixture
def queue(phase2_database: Database) -> Iterator[Queue]:
    """Phase 2 in a transaction that is rolled back, gates as declared."""
    with psycopg.connect(phase2_database.dsn) as conn:
        yield Queue(conn)
        conn.rollback()


@pytest.fixture
def armed(queue: Queue) -> Queue:
    """The same with the substrate armed, as inside a proof."""
    return queue.gate(SUBSTRATE, "true")


@pytest.fixture
def sessions(dieu45: Database) -> Iterator[Callable[..., Queue]]:
    """`sessions()` opens one more session on a database of its own, all gates of the reaper open."""
    phase2.install(dieu45.conn)
    Queue(dieu45.conn).arm_reaper()
    opened: list[psycopg.Connection[Any]] = []

    def begin(*, autocommit: bool = True) -> Queue:
        opened.append(psycopg.connect(dieu45.dsn, autocommit=autocommit))
        return Queue(opened[-1])

    yield begin
    for conn in opened:
        conn.close()


# --- gates and numbers ------------------------------------------------------------------------------------------------

GATED = {
    SUBSTRATE: [
        ("fn_job_enqueue", ("kind", "tester", "key")),
        ("fn_job_claim", ("w1",)),
        ("fn_job_ack", (uuid4(), "w1")),
        ("fn_job_fail", (uuid4(), "w1", "boom")),
        ("fn_job_extend_lease", (uuid4(), "w1")),
        ("fn_job_reap_stale_leases_apply", ("tester",)),
    ],
    REAPER: [("fn_job_reap_stale_leases_apply", ("tester",))],
    HEARTBEAT: [
        ("fn_queue_heartbeat_tick", ("e1", "Agent")),
        ("fn_queue_heartbeat_register_passive", ("e1", "Agent", "2026-05-22 11:31:41+00", "tester")),
    ],
}


@pytest.mark.parametrize(
    ("gate", "function", "arguments"), [(g, *call) for g, calls in GATED.items() for call in calls]
)
def test_only_the_word_true_opens_a_gate(queue: Queue, gate: str, function: str, arguments: tuple[object, ...]) -> None:
    queue.arm_reaper()
    for value in NOT_TRUE:
        assert queue.gate(gate, value).refusal(function, *arguments) == f"{gate}=false", value
    for value in ("true", " TRUE ", "True"):
        assert queue.gate(gate, value).refusal(function, *arguments) in {None, "not_found", "already_registered"}


def test_only_the_word_false_opens_the_inverted_gate(queue: Queue) -> None:
    queue.arm_reaper()
    for value in NOT_FALSE:
        reason = queue.gate(DRY_RUN_ONLY, value).refusal("fn_job_reap_stale_leases_apply", "tester")
        assert reason == "queue.lease.reaper_dry_run_only=true", value
        assert queue.call("fn_job_reap_stale_leases_dry_run")["gates"][DRY_RUN_ONLY] is True
    assert queue.gate(DRY_RUN_ONLY, "false").refusal("fn_job_reap_stale_leases_apply", "tester") is None


def test_the_replay_gate_reads_garbage_as_shut(queue: Queue) -> None:
    letter = queue.add_letter(triage_status="manual_replay")
    for value in NOT_TRUE:
        queue.gate(REPLAY, value)
        assert queue.call("fn_job_dead_letter_requeue_dry_run", letter)["replay_gate_enabled"] is False, value


@pytest.mark.parametrize("value", [None, "", "0", "-5", "3.5", "abc", "9999999999", "1e3", "60s"])
def test_a_number_that_is_missing_or_garbage_reads_as_the_default(armed: Queue, value: str | None) -> None:
    for key in (
        "queue.lease.duration_sec",
        "queue.heartbeat.stale_threshold_seconds",
        "queue.retry.backoff_base_sec",
        "queue.retry.max_attempts_default",
    ):
        armed.gate(key, value)
    job_id = armed.call("fn_job_enqueue", "kind", "tester", "key")["job_id"]
    assert armed.job(job_id)["max_attempts"] == 5
    assert armed.call("fn_job_claim", "w1")["lease_seconds"] == 300
    assert armed.call("fn_job_fail", job_id, "w1", "boom")["backoff_sec"] == 10
    assert armed.call("fn_queue_stale_check")["threshold_seconds"] == 300


def test_a_number_is_read_from_its_key(armed: Queue) -> None:
    armed.gate("queue.lease.duration_sec", " 60 ").gate("queue.retry.backoff_base_sec", "3")
    armed.gate("queue.retry.max_attempts_default", "2").gate("queue.heartbeat.stale_threshold_seconds", "7")
    job_id = armed.call("fn_job_enqueue", "kind", "tester", "key")["job_id"]
    assert armed.call("fn_job_claim", "w1")["lease_seconds"] == 60
    assert armed.call("fn_job_fail", job_id, "w1", "boom")["backoff_sec"] == 3
    assert armed.job(job_id)["max_attempts"] == 2
    assert armed.call("fn_queue_stale_check")["threshold_seconds"] == 7


@pytest.mark.parametrize("path", ["pg_catalog, public", "pg_temp, public", "public", ""])
def test_a_temporary_table_named_like_the_gate_table_opens_nothing(queue: Queue, path: str) -> None:
    stale = queue.add_job("leased", lease=-60)
    queue.gate(HEARTBEAT, "false")
    queue.conn.execute("SET ROLE operator")
    queue.conn.execute("CREATE TEMP TABLE dot_config (key text, value text)")
    queue.conn.execute(
        "INSERT INTO pg_temp.dot_config VALUES (%s, 'true'), (%s, 'true'), (%s, 'false'), (%s, 'true'), (%s, 'true')",
        [SUBSTRATE, REAPER, DRY_RUN_ONLY, HEARTBEAT, REPLAY],
    )
    queue.conn.execute("GRANT SELECT ON pg_temp.dot_config TO PUBLIC")
    queue.conn.execute("SELECT set_config('search_path', %s, true)", [path])

    assert queue.refusal("fn_job_reap_stale_leases_apply", "tester") == f"{SUBSTRATE}=false"
    preview = queue.call("fn_job_reap_stale_leases_dry_run", by="operator")
    assert preview["gates"] == {SUBSTRATE: False, REAPER: False, DRY_RUN_ONLY: True}
    registered = queue.refusal("fn_queue_heartbeat_register_passive", "e", "Agent", "2026-05-22 00:00:00+00", "tester")
    assert registered == f"{HEARTBEAT}=false"
    assert queue.job(stale)["state"] == "leased"


# --- enqueue ----------------------------------------------------------------------------------------------------------


def test_enqueue_refuses_in_this_order(queue: Queue) -> None:
    call: dict[str, Any] = {
        "p_job_kind": "  ",
        "p_actor": None,
        "p_idempotency_key": "",
        "p_payload_json": Jsonb(["vector"]),
    }
    gate = queue.call("fn_job_enqueue", **call)
    assert gate == {"refused": True, "reason": "queue.job_substrate.enabled=false", "job_id": None}
    queue.gate(SUBSTRATE, "true")
    for reason, repair in (
        ("job_kind_required", {"p_job_kind": "kind"}),
        ("actor_required", {"p_actor": "tester"}),
        ("idempotency_key_required", {"p_idempotency_key": "key"}),
        ("payload_not_object", {"p_payload_json": {"vector": [1]}}),
    ):
        assert queue.call("fn_job_enqueue", **call) == {"refused": True, "reason": reason, "job_id": None}
        call |= repair
    assert queue.call("fn_job_enqueue", **call) == {
        "refused": True,
        "reason": "payload_denied",
        "job_id": None,
        "denied_keys": ["vector"],
    }
    assert queue.rows("SELECT FROM public.job_queue") == []
    call["p_payload_json"] = {}
    assert set(queue.call("fn_job_enqueue", **call)) == {
        "refused",
        "job_id",
        "state",
        "deduplicated",
    }


@pytest.mark.parametrize("payload", [None, Jsonb(None), Jsonb([]), Jsonb("text"), Jsonb(3)])
def test_a_payload_must_be_an_object(armed: Queue, payload: object) -> None:
    assert armed.refusal("fn_job_enqueue", "kind", "tester", "key", p_payload_json=payload) == "payload_not_object"


@pytest.mark.parametrize(
    ("payload", "denied"),
    [
        *(({word: 1}, [word]) for word in DENIED),
        ({"a": {"b": {"vector": []}}}, ["vector"]),
        ({"a": [1, [{"b": None}, {"token": "x"}]]}, ["token"]),
        ({"Vector": 1}, ["Vector"]),
        ({"PERSONAL_DATA": {"Body": 1}, "ref": {"body": 2}}, ["Body", "PERSONAL_DATA", "body"]),
        ({" secret ": 1}, [" secret "]),
    ],
)
def test_denied_keys_are_found_at_every_depth_and_in_any_case(
    armed: Queue, payload: dict[str, object], denied: list[str]
) -> None:
    answer = armed.call("fn_job_enqueue", "kind", "tester", "key", payload)
    assert (answer["reason"], sorted(answer["denied_keys"])) == ("payload_denied", denied)


@pytest.mark.parametrize(
    "payload", [{}, {"tags": ["vector", "body"]}, {"vector_ref": "v1", "note": "secret"}, {"a": [[]]}]
)
def test_words_that_are_no_keys_are_allowed(armed: Queue, payload: dict[str, object]) -> None:
    assert armed.refusal("fn_job_enqueue", "kind", "tester", "key", payload) is None


def test_the_table_refuses_what_goes_past_the_function(queue: Queue) -> None:
    with pytest.raises(errors.CheckViolation, match="job_queue_payload_safe_check"):
        queue.conn.execute(
            "INSERT INTO public.job_queue (job_kind, idempotency_key, actor, payload_json)"
            " VALUES ('kind', 'key', 'tester', '{\"vector\": [1]}')"
        )


def test_enqueue_writes_what_it_is_given(armed: Queue) -> None:
    run = uuid4()
    answer = armed.call(
        "fn_job_enqueue",
        *("kind", "tester", "key", {"ref": 1}),
        p_source_ref="s",
        p_target_ref="t",
        p_payload_ref="p",
        p_priority=7,
        p_run_id=run,
        p_scheduled_at="2030-01-01 00:00:00+00",
        p_max_attempts=3,
    )
    assert {name: answer[name] for name in ("refused", "state", "deduplicated")} == {
        "refused": False,
        "state": "queued",
        "deduplicated": False,
    }
    job = armed.job(answer["job_id"])
    expected = {
        "job_kind": "kind",
        "actor": "tester",
        "idempotency_key": "key",
        "payload_json": {"ref": 1},
        "source_ref": "s",
        "target_ref": "t",
        "payload_ref": "p",
        "priority": 7,
        "run_id": str(run),
        "max_attempts": 3,
        "attempts": 0,
        "lease_owner": None,
        "scheduled_at": "2030-01-01T00:00:00+00:00",
    }
    assert {name: job[name] for name in expected} == expected


@pytest.mark.parametrize("state", ["queued", "leased", "in_progress", "retry_waiting"])
def test_an_active_job_keeps_its_key(armed: Queue, state: str) -> None:
    job_id = armed.add_job(state, key="key")
    answer = armed.call("fn_job_enqueue", "other.kind", "somebody", "key")
    assert answer == {"refused": False, "job_id": str(job_id), "state": state, "deduplicated": True}


@pytest.mark.parametrize("state", ["succeeded", "failed", "dead_letter", "cancelled", "cleaned"])
def test_a_finished_job_gives_its_key_back(armed: Queue, state: str) -> None:
    job_id = armed.add_job(state, key="key")
    answer = armed.call("fn_job_enqueue", "kind", "tester", "key")
    assert answer["deduplicated"] is False
    assert answer["job_id"] != str(job_id)


def test_enqueue_says_so_when_the_holder_of_the_key_vanished_in_between(armed: Queue) -> None:
    armed.conn.execute("CREATE FUNCTION pg_temp.vanish() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    armed.conn.execute(
        "CREATE TRIGGER vanish BEFORE INSERT ON public.job_queue FOR EACH ROW EXECUTE FUNCTION pg_temp.vanish()"
    )
    answer = armed.call("fn_job_enqueue", "kind", "tester", "key")
    assert answer == {"refused": True, "reason": "idempotency_race", "job_id": None}


def test_eight_racing_sessions_make_one_job(sessions: Callable[..., Queue]) -> None:
    barrier = threading.Barrier(8)
    answers: list[dict[str, Any]] = []

    def enqueue(queue: Queue) -> None:
        barrier.wait(timeout=60)
        answers.append(queue.call("fn_job_enqueue", "kind", "tester", "key"))

    threads = [threading.Thread(target=enqueue, args=[sessions()]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(answer["deduplicated"] for answer in answers) == [False] + [True] * 7
    assert len({answer["job_id"] for answer in answers}) == 1
    assert sessions().value("SELECT count(*) FROM public.job_queue") == 1


# --- claim ------------------------------------------------------------------------------------------------------------


def test_claim_refuses_in_this_order(queue: Queue) -> None:
    assert queue.call("fn_job_claim", " ") == {"refused": True, "reason": f"{SUBSTRATE}=false"}
    queue.gate(SUBSTRATE, "true")
    assert queue.call("fn_job_claim", " ") == {"refused": True, "reason": "lease_owner_required"}
    assert queue.call("fn_job_claim", None) == {"refused": True, "reason": "lease_owner_required"}
    assert queue.call("fn_job_claim", "w1") == {"refused": False, "claimed_count": 0, "lease_seconds": 300, "jobs": []}


def test_claim_leases_what_is_due_in_order_and_counts_no_attempt(armed: Queue) -> None:
    second = armed.add_job(priority=5, due_in=-10)
    first = armed.add_job("retry_waiting", priority=5, due_in=-20, attempts=2)
    third = armed.add_job(priority=9, due_in=-99)
    armed.add_job(priority=1, due_in=60)
    for state in ("leased", "in_progress", "succeeded", "dead_letter"):
        armed.add_job(state, priority=1, lease=-60)

    answer = armed.call("fn_job_claim", "w9", p_limit=10, p_lease_seconds=60)

    assert [job["job_id"] for job in answer["jobs"]] == [str(first), str(second), str(third)]
    assert (answer["claimed_count"], answer["lease_seconds"]) == (3, 60)
    assert set(answer["jobs"][0]) == {
        *("job_id", "job_kind", "source_ref", "target_ref", "payload_ref", "payload_json", "priority", "attempts"),
        *("max_attempts", "idempotency_key", "run_id", "lease_until"),
    }
    job = armed.job(first)
    assert (job["state"], job["lease_owner"], job["attempts"]) == ("leased", "w9", 2)
    assert job["picked_at"] is not None
    assert job["lease_until"] == answer["jobs"][0]["lease_until"]
    seconds = "SELECT extract(epoch FROM lease_until - picked_at) FROM public.job_queue WHERE job_id = %s"
    assert armed.value(seconds, first) == 60


def test_claim_takes_only_the_kinds_and_the_number_asked_for(armed: Queue) -> None:
    for kind in ("a", "b", "b", "c"):
        armed.add_job(kind=kind)
    assert [job["job_kind"] for job in armed.call("fn_job_claim", "w1", ["b"], 1)["jobs"]] == ["b"]
    assert armed.call("fn_job_claim", "w1", [], 9)["claimed_count"] == 0
    assert armed.call("fn_job_claim", "w1", ["a", "b"], -3)["claimed_count"] == 0
    assert armed.call("fn_job_claim", "w1", None, None)["claimed_count"] == 1
    assert armed.call("fn_job_claim", "w1", p_limit=9)["claimed_count"] == 2


def test_leases_and_waits_run_on_the_wall_clock(queue: Queue) -> None:
    """now() stands still from BEGIN on: in a long transaction a short lease would be born expired, or never expire."""
    queue.arm_reaper()
    queue.add_job()
    expired = queue.add_job("leased", lease=0.5)
    queue.conn.execute("SELECT pg_sleep(1.1)")

    job_id = queue.call("fn_job_claim", "w1", p_lease_seconds=1)["jobs"][0]["job_id"]
    assert queue.value("SELECT lease_until > clock_timestamp() FROM public.job_queue WHERE job_id = %s", job_id)
    assert queue.call("fn_job_ack", job_id, "w1")["late"] is False

    assert queue.call("fn_job_reap_stale_leases_dry_run")["stale_count"] == 1
    (reaped,) = queue.call("fn_job_reap_stale_leases_apply", "tester")["jobs"]
    assert reaped["job_id"] == str(expired)
    ahead = "SELECT extract(epoch FROM scheduled_at - clock_timestamp()) FROM public.job_queue WHERE job_id = %s"
    assert 9.5 < queue.value(ahead, expired) <= 10

    queue.call("fn_queue_heartbeat_tick", "e1", "Agent")
    beat = "SELECT last_tick_at > now() + interval '1 second' FROM public.queue_heartbeat"
    assert queue.value(beat)
    assert queue.call("fn_queue_stale_check", 1)["fresh_count"] == 1


def test_two_claimers_never_wait_and_never_share(sessions: Callable[..., Queue]) -> None:
    one, two = sessions(autocommit=False), sessions()
    jobs = {str(two.add_job()) for _ in range(4)}
    two.conn.execute("SET lock_timeout = '2s'")
    first = one.call("fn_job_claim", "w1", p_limit=2)["jobs"]
    second = two.call("fn_job_claim", "w2", p_limit=9)["jobs"]
    assert len(first) == len(second) == 2
    assert {job["job_id"] for job in [*first, *second]} == jobs


# --- ack, fail, extend ------------------------------------------------------------------------------------------------

TERMINAL_CALLS = {
    "fn_job_ack": (),
    "fn_job_fail": ("boom",),
    "fn_job_extend_lease": (),
}


@pytest.mark.parametrize("function", TERMINAL_CALLS)
def test_who_does_not_hold_the_lease_is_refused_in_this_order(queue: Queue, function: str) -> None:
    rest = TERMINAL_CALLS[function]
    unknown, waiting = uuid4(), queue.add_job(attempts=1)
    held = queue.add_job("leased", attempts=1, lease=-60 if function == "fn_job_extend_lease" else 60)

    def reason(job_id: object, owner: str | None, expected: int | None) -> str | None:
        answer = queue.call(function, job_id, owner, *rest, p_expected_attempts=expected)
        assert set(answer) == {"refused", "reason"}
        return answer["reason"]

    assert reason(unknown, "other", 7) == f"{SUBSTRATE}=false"
    queue.gate(SUBSTRATE, "true")
    before = queue.image("job_queue")
    assert reason(unknown, "other", 7) == "not_found"
    assert reason(None, "other", 7) == "not_found"
    assert reason(waiting, "other", 7) == "not_leased"
    assert reason(held, "other", 7) == "lease_mismatch"
    assert reason(held, None, 7) == "lease_mismatch"
    assert reason(held, "w1", 0) == "attempt_mismatch"
    if function == "fn_job_extend_lease":
        assert reason(held, "w1", 1) == "lease_expired"
    # A refusal writes nothing; only the row lock of the look may show in xmax.
    assert [row[2] for row in queue.image("job_queue")] == [row[2] for row in before]


@pytest.mark.parametrize("function", TERMINAL_CALLS)
@pytest.mark.parametrize(
    "state", ["queued", "succeeded", "failed", "retry_waiting", "dead_letter", "cancelled", "cleaned"]
)
def test_only_a_leased_job_can_be_ended_or_prolonged(armed: Queue, function: str, state: str) -> None:
    assert armed.refusal(function, armed.add_job(state), "w1", *TERMINAL_CALLS[function]) == "not_leased"


def test_a_lease_without_an_owner_belongs_to_nobody(armed: Queue) -> None:
    job_id = armed.add_job()
    armed.conn.execute("UPDATE public.job_queue SET state = 'leased' WHERE job_id = %s", [job_id])
    for function, rest in TERMINAL_CALLS.items():
        assert armed.refusal(function, job_id, None, *rest) == "lease_mismatch"


@pytest.mark.parametrize("state", ["leased", "in_progress"])
def test_ack_ends_the_job_without_an_attempt(armed: Queue, state: str) -> None:
    job_id = armed.add_job(state)
    answer = armed.call("fn_job_ack", job_id, "w1", 0)
    assert answer == {"refused": False, "job_id": str(job_id), "state": "succeeded", "late": False, "attempts": 0}
    job = armed.job(job_id)
    assert (job["state"], job["attempts"], job["lease_owner"], job["lease_until"]) == ("succeeded", 0, None, None)
    assert job["finished_at"] is not None
    assert armed.refusal("fn_job_ack", job_id, "w1") == "not_leased"


def test_a_late_ack_counts_until_the_job_is_reaped(queue: Queue) -> None:
    queue.arm_reaper()
    late, reaped = queue.add_job("leased", lease=-60), queue.add_job("leased", lease=-60)
    assert queue.call("fn_job_ack", late, "w1")["late"] is True
    assert queue.call("fn_job_reap_stale_leases_apply", "tester")["reaped_count"] == 1
    assert queue.refusal("fn_job_ack", reaped, "w1") == "not_leased"
    assert queue.refusal("fn_job_fail", reaped, "w1", "late") == "not_leased"


def test_the_attempt_is_the_fence_when_the_same_worker_comes_back(queue: Queue) -> None:
    queue.arm_reaper()
    job_id = queue.add_job()
    fence = queue.call("fn_job_claim", "pod-1")["jobs"][0]["attempts"]
    queue.conn.execute("UPDATE public.job_queue SET lease_until = clock_timestamp() - interval '1 second'")
    assert queue.call("fn_job_reap_stale_leases_apply", "tester")["reset_count"] == 1
    queue.conn.execute("UPDATE public.job_queue SET scheduled_at = clock_timestamp() - interval '1 second'")
    again = queue.call("fn_job_claim", "pod-1")["jobs"][0]
    assert (fence, again["attempts"]) == (0, 1)
    for function, rest in TERMINAL_CALLS.items():
        stale = queue.refusal(function, job_id, "pod-1", *rest, p_expected_attempts=fence)
        assert stale == "attempt_mismatch"
    assert queue.refusal("fn_job_ack", job_id, "pod-1", p_expected_attempts=1) is None


def test_fail_waits_10_20_40_80_seconds_and_then_gives_up(armed: Queue) -> None:
    job_id = armed.add_job()
    waits: list[int] = []
    for attempt in (1, 2, 3, 4):
        armed.conn.execute("UPDATE public.job_queue SET scheduled_at = clock_timestamp() - interval '1 second'")
        armed.call("fn_job_claim", "w1")
        answer = armed.call("fn_job_fail", job_id, "w1", f"boom {attempt}")
        assert set(answer) == {
            *("refused", "state", "attempts", "backoff_sec", "scheduled_at", "dead_letter_id"),
        }
        assert (answer["state"], answer["attempts"], answer["dead_letter_id"]) == ("retry_waiting", attempt, None)
        job = armed.job(job_id)
        assert (job["state"], job["attempts"], job["last_error"]) == ("retry_waiting", attempt, f"boom {attempt}")
        assert (job["lease_owner"], job["lease_until"], job["finished_at"]) == (None, None, None)
        assert job["scheduled_at"] == answer["scheduled_at"]
        ahead = armed.value("SELECT extract(epoch FROM scheduled_at - clock_timestamp()) FROM public.job_queue")
        assert answer["backoff_sec"] - 2 < ahead <= answer["backoff_sec"]
        waits.append(answer["backoff_sec"])
    assert waits == [10, 20, 40, 80]

    armed.conn.execute("UPDATE public.job_queue SET scheduled_at = clock_timestamp() - interval '1 second'")
    armed.call("fn_job_claim", "w1")
    answer = armed.call("fn_job_fail", job_id, "w1", "boom 5")
    assert (answer["state"], answer["attempts"], answer["backoff_sec"]) == ("dead_letter", 5, None)
    job, letter = armed.job(job_id), armed.letter(job_id)
    assert (job["state"], job["attempts"], job["lease_owner"]) == ("dead_letter", 5, None)
    assert job["finished_at"] is not None
    assert letter["dead_letter_id"] == answer["dead_letter_id"]
    copied = ("job_kind", "idempotency_key", "source_ref", "target_ref", "payload_ref", "payload_json", "priority")
    for column in (*copied, "actor", "run_id", "attempts", "max_attempts", "last_error"):
        assert letter[column] == job[column]
    assert (letter["dead_letter_reason"], letter["triage_status"]) == ("max_attempts", "pending")
    assert (letter["last_lease_owner"], letter["dead_lettered_by"]) == ("w1", "w1")


def test_fail_of_what_cannot_be_retried_gives_up_at_once(armed: Queue) -> None:
    job_id = armed.add_job("in_progress")
    assert armed.call("fn_job_fail", job_id, "w1", "no such page", False)["state"] == "dead_letter"
    assert (armed.letter(job_id)["dead_letter_reason"], armed.letter(job_id)["attempts"]) == ("non_retryable", 1)


def test_backoff_ends_at_one_hour(queue: Queue) -> None:
    queue.arm_reaper()
    failed = queue.add_job("leased", attempts=30, max_attempts=99)
    assert queue.call("fn_job_fail", failed, "w1", "boom")["backoff_sec"] == 3600
    queue.add_job("leased", lease=-60, attempts=8, max_attempts=99)
    queue.gate("queue.retry.backoff_base_sec", "999999999")
    assert queue.call("fn_job_reap_stale_leases_dry_run")["jobs"][0]["backoff_sec"] == 3600
    assert queue.call("fn_job_reap_stale_leases_apply", "tester")["jobs"][0]["backoff_sec"] == 3600


@pytest.mark.parametrize("function", ["fn_job_fail", "fn_job_reap_stale_leases_apply"])
def test_a_letter_that_is_already_there_is_kept_and_aborts_nothing(queue: Queue, function: str) -> None:
    queue.arm_reaper()
    letter = queue.add_letter(triage_status="escalated")
    (job_id,) = queue.rows("SELECT job_id FROM public.job_dead_letter")[0]
    queue.conn.execute(
        "UPDATE public.job_queue SET state = 'leased', lease_owner = 'w1', attempts = 4, finished_at = NULL,"
        " lease_until = clock_timestamp() - interval '1 minute' WHERE job_id = %s",
        [job_id],
    )
    before = queue.image("job_dead_letter")
    if function == "fn_job_fail":
        assert queue.call(function, job_id, "w1", "boom")["dead_letter_id"] == str(letter)
    else:
        other = queue.add_job("leased", lease=-30)
        answer = queue.call(function, "tester")
        assert (answer["jobs"][0]["dead_letter_id"], answer["jobs"][1]["job_id"]) == (str(letter), str(other))
    assert queue.job(job_id)["state"] == "dead_letter"
    assert queue.image("job_dead_letter") == before


def test_extend_prolongs_and_never_shortens(armed: Queue) -> None:
    job_id = armed.add_job("leased", lease=60)
    answer = armed.call("fn_job_extend_lease", job_id, "w1", 600, 0)
    assert set(answer) == {"refused", "state", "lease_until"}
    assert (answer["state"], armed.job(job_id)["state"]) == ("in_progress", "in_progress")
    assert armed.job(job_id)["lease_until"] == answer["lease_until"]
    assert 590 < armed.value("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM public.job_queue") <= 600
    for seconds in (1, 0, -99, None):
        assert armed.call("fn_job_extend_lease", job_id, "w1", seconds)["lease_until"] == answer["lease_until"]


def test_every_change_of_a_job_is_dated(armed: Queue) -> None:
    job_id = armed.add_job("leased")
    before = armed.job(job_id)["updated_at"]
    armed.call("fn_job_extend_lease", job_id, "w1", 600)
    middle = armed.job(job_id)["updated_at"]
    armed.call("fn_job_ack", job_id, "w1")
    assert before < middle < armed.job(job_id)["updated_at"]


# --- heartbeats -------------------------------------------------------------------------------------------------------


def test_tick_refuses_in_this_order(queue: Queue) -> None:
    queue.add_executor("taken", 5, kind="DOT")
    call: dict[str, Any] = {"p_executor_name": " ", "p_executor_kind": "MOT", "p_status": "fine"}
    before = queue.image("queue_heartbeat")
    assert queue.gate(HEARTBEAT, "false").call("fn_queue_heartbeat_tick", **call) == {
        "refused": True,
        "reason": f"{HEARTBEAT}=false",
    }
    queue.gate(HEARTBEAT, "true")
    for reason, repair in (
        ("executor_name_required", {"p_executor_name": "taken"}),
        ("invalid_executor_kind", {"p_executor_kind": None}),
        ("invalid_executor_kind", {"p_executor_kind": "Agent"}),
        ("invalid_status", {"p_status": None}),
        ("invalid_status", {"p_status": "warn"}),
        ("executor_kind_mismatch", {"p_executor_kind": "DOT"}),
    ):
        assert queue.call("fn_queue_heartbeat_tick", **call) == {"refused": True, "reason": reason}
        call |= repair
    assert [row[2] for row in queue.image("queue_heartbeat")] == [row[2] for row in before]
    assert queue.refusal("fn_queue_heartbeat_tick", **call) is None


@pytest.mark.parametrize("kind", KINDS)
def test_seven_kinds_of_executor_may_tick(queue: Queue, kind: str) -> None:
    answer = queue.call("fn_queue_heartbeat_tick", "phase2_proof_executor", kind)
    assert set(answer) == {
        *("refused", "executor_name", "ticks_total", "last_tick_at", "last_tick_status", "promoted_from_passive"),
    }
    assert (answer["executor_name"], answer["ticks_total"]) == ("phase2_proof_executor", 1)
    assert (answer["last_tick_status"], answer["promoted_from_passive"]) == ("ok", False)
    assert queue.record("queue_heartbeat", "executor_name", "phase2_proof_executor")["executor_kind"] == kind


def test_beats_count_up_and_keep_what_was_known(queue: Queue) -> None:
    job = uuid4()
    queue.call("fn_queue_heartbeat_tick", "e1", "Agent", "ok", job, "w1", {"host": "a", "pid": 1})
    queue.call("fn_queue_heartbeat_tick", "e1", "Agent", "error", p_metadata={"pid": 2})
    answer = queue.call("fn_queue_heartbeat_tick", "e1", "Agent", "warn", p_metadata=Jsonb(["no object"]))
    row = queue.record("queue_heartbeat", "executor_name", "e1")
    assert (answer["ticks_total"], row["ticks_total"], row["last_tick_status"]) == (3, 3, "warn")
    assert row["metadata"] == {"host": "a", "pid": 2}
    assert (row["current_job_id"], row["lease_owner"]) == (None, None)


def test_a_beat_never_turns_the_clock_back(queue: Queue) -> None:
    queue.add_executor("e1", age=-30)
    before = queue.record("queue_heartbeat", "executor_name", "e1")["last_tick_at"]
    assert queue.call("fn_queue_heartbeat_tick", "e1", "PG_worker")["last_tick_at"] == before


def test_the_first_own_beat_promotes_a_passive_marker(queue: Queue) -> None:
    queue.call("fn_queue_heartbeat_register_passive", "e1", "PG_worker", "2026-05-22 11:31:41+00", "tester")
    first = queue.call("fn_queue_heartbeat_tick", "e1", "PG_worker")
    second = queue.call("fn_queue_heartbeat_tick", "e1", "PG_worker")
    assert [(t["ticks_total"], t["promoted_from_passive"]) for t in (first, second)] == [(1, True), (2, False)]
    assert queue.call("fn_queue_stale_check")["stale_count"] == 0
    # The word stays behind, so only ticks_total tells whether an executor is passive.
    assert queue.record("queue_heartbeat", "executor_name", "e1")["metadata"]["marker"] == "legacy_silent_passive"


def test_stale_check_tells_two_fresh_executors_from_a_stale_one(queue: Queue) -> None:
    queue.add_executor("fresh-1", 5)
    queue.add_executor("fresh-2", 299)
    queue.add_executor("stale-1", 400, ticks=0)
    answer = queue.call("fn_queue_stale_check")
    assert set(answer) == {"refused", "stale_count", "fresh_count", "threshold_seconds", "checked_at", "executors"}
    assert (answer["refused"], answer["stale_count"], answer["fresh_count"]) == (False, 1, 2)
    (stale,) = answer["executors"]
    assert set(stale) == {
        *("executor_name", "executor_kind", "last_tick_at", "last_tick_status", "ticks_total", "age_seconds"),
        "passive",
    }
    assert (stale["executor_name"], stale["passive"], stale["age_seconds"]) == ("stale-1", True, 400)
    assert queue.call("fn_queue_stale_check", 4)["stale_count"] == 3
    assert queue.call("fn_queue_stale_check", 4)["executors"][0]["executor_name"] == "stale-1"
    assert queue.call("fn_queue_stale_check", 3600)["stale_count"] == 0


def test_stale_check_of_nobody(queue: Queue) -> None:
    answer = queue.call("fn_queue_stale_check")
    assert (answer["stale_count"], answer["fresh_count"], answer["executors"]) == (0, 0, [])


def test_the_health_view_has_its_own_bands_and_always_a_row(queue: Queue) -> None:
    view = (
        "SELECT executors_total, executors_fresh, executors_warning, executors_stale, executor_name"
        " FROM public.v_queue_health"
    )
    assert queue.rows(view) == [(0, 0, 0, 0, None)]
    for name, age in (("a", 200), ("b", 400), ("c", 700), ("d", 800)):
        queue.add_executor(name, age)
    queue.add_job("leased", lease=-60)
    queue.add_job("leased", lease=60)
    queue.add_job("retry_waiting")
    queue.add_letter()
    queue.add_letter(triage_status="closed")
    assert [row[:4] for row in queue.rows(view)] == [(4, 1, 1, 2)] * 4
    counters = "SELECT DISTINCT leases_stale, jobs_waiting, dead_letters_pending FROM public.v_queue_health"
    assert queue.rows(counters) == [(1, 1, 1)]
    hints = dict(queue.rows("SELECT executor_name, status_hint FROM public.v_queue_health"))
    assert hints == {"a": "fresh", "b": "warning", "c": "stale", "d": "stale"}


def test_register_passive_refuses_in_this_order(queue: Queue) -> None:
    queue.add_executor("taken", 5)
    call: dict[str, Any] = {
        "p_executor_name": " ",
        "p_executor_kind": "MOT",
        "p_last_observed_at": None,
        "p_actor": " ",
    }
    before = queue.image("queue_heartbeat")
    queue.gate(HEARTBEAT, "false")
    gate = queue.call("fn_queue_heartbeat_register_passive", **call)
    assert gate == {"refused": True, "reason": f"{HEARTBEAT}=false"}
    queue.gate(HEARTBEAT, "true")
    for reason, repair in (
        ("actor_required", {"p_actor": "tester"}),
        ("executor_name_required", {"p_executor_name": "taken"}),
        ("invalid_executor_kind", {"p_executor_kind": None}),
        ("invalid_executor_kind", {"p_executor_kind": "Agent"}),
        ("last_observed_at_required", {"p_last_observed_at": "-infinity"}),
        ("last_observed_at_required", {"p_last_observed_at": "infinity"}),
        ("last_observed_at_in_future", {"p_last_observed_at": "2999-01-01 00:00:00+00"}),
        ("last_observed_at_in_future", {"p_last_observed_at": "2026-05-22 11:31:41+00"}),
        ("already_registered", {"p_executor_name": "new"}),
    ):
        assert queue.call("fn_queue_heartbeat_register_passive", **call) == {"refused": True, "reason": reason}
        call |= repair
    assert queue.image("queue_heartbeat") == before
    assert queue.refusal("fn_queue_heartbeat_register_passive", **call) is None


def test_register_passive_writes_a_marker_and_no_beat(queue: Queue) -> None:
    answer = queue.call(
        "fn_queue_heartbeat_register_passive",
        *("iu_outbound_default", "PG_worker", "2026-05-22 11:31:41.928657+00", "tester", "not an active claim"),
    )
    assert answer == {
        "refused": False,
        "passive": True,
        "last_tick_at": "2026-05-22T11:31:41.928657+00:00",
        "last_tick_status": "warn",
        "ticks_total": 0,
    }
    row = queue.record("queue_heartbeat", "executor_name", "iu_outbound_default")
    assert (row["executor_kind"], row["last_tick_status"], row["ticks_total"]) == ("PG_worker", "warn", 0)
    assert row["last_tick_at"] == "2026-05-22T11:31:41.928657+00:00"
    registered_at = row["metadata"].pop("registered_at")
    assert row["metadata"] == {
        "marker": "legacy_silent_passive",
        "source": "fn_queue_heartbeat_register_passive",
        "registered_by": "tester",
        "note": "not an active claim",
    }
    assert queue.value("SELECT clock_timestamp() - %s::timestamptz < interval '1 minute'", registered_at)
    check = queue.call("fn_queue_stale_check")
    assert (check["stale_count"], check["executors"][0]["passive"]) == (1, True)
    assert queue.value("SELECT executors_stale FROM public.v_queue_health") == 1


@pytest.mark.parametrize("ticks", [0, 1, 5000])
def test_registering_again_leaves_the_row_as_it_is_to_the_byte(queue: Queue, ticks: int) -> None:
    queue.add_executor("e1", 5, ticks=ticks)
    before = queue.image("queue_heartbeat")
    for _ in range(2):
        reason = queue.refusal("fn_queue_heartbeat_register_passive", "e1", "DOT", "2026-05-22 00:00:00+00", "tester")
        assert reason == "already_registered"
    assert queue.image("queue_heartbeat") == before


# --- the reaper -------------------------------------------------------------------------------------------------------


def test_the_reaper_refuses_in_this_order(queue: Queue) -> None:
    queue.add_job("leased", lease=-60)
    before = queue.image("job_queue")
    for reason, repair in (
        (f"{SUBSTRATE}=false", (SUBSTRATE, "true")),
        (f"{REAPER}=false", (REAPER, "true")),
        (f"{DRY_RUN_ONLY}=true", (DRY_RUN_ONLY, "garbage")),
        (f"{DRY_RUN_ONLY}=true", (DRY_RUN_ONLY, "false")),
    ):
        answer = queue.call("fn_job_reap_stale_leases_apply", " ")
        assert answer == {"refused": True, "reason": reason, "reaped_count": 0}
        queue.gate(*repair)
    for actor in (" ", "", None):
        answer = queue.call("fn_job_reap_stale_leases_apply", actor)
        assert answer == {"refused": True, "reason": "actor_required", "reaped_count": 0}
    assert queue.image("job_queue") == before
    assert queue.call("fn_job_reap_stale_leases_apply", "tester")["reaped_count"] == 1


def test_the_preview_lists_what_would_happen_and_writes_nothing(queue: Queue) -> None:
    last_try = queue.add_job("in_progress", lease=-90, attempts=4)
    first_try = queue.add_job("leased", lease=-60)
    queue.add_job("leased", lease=60)
    queue.add_job("queued")
    before = queue.image("job_queue")

    answer = queue.call("fn_job_reap_stale_leases_dry_run")

    assert set(answer) == {
        *("refused", "dry_run", "stale_count", "listed_count", "checked_at", "gates", "apply_would_refuse", "jobs"),
    }
    assert (answer["refused"], answer["dry_run"], answer["apply_would_refuse"]) == (False, True, True)
    assert (answer["stale_count"], answer["listed_count"]) == (2, 2)
    assert answer["gates"] == {SUBSTRATE: False, REAPER: False, DRY_RUN_ONLY: True}
    assert all(job.pop("lease_until") for job in answer["jobs"])
    assert answer["jobs"] == [
        {
            "job_id": str(last_try),
            "job_kind": "test.kind",
            "state": "in_progress",
            "lease_owner": "w1",
            "age_seconds": 90,
            "attempts": 4,
            "max_attempts": 5,
            "next_attempts": 5,
            "would_action": "dead_letter",
            "backoff_sec": None,
        },
        {
            "job_id": str(first_try),
            "job_kind": "test.kind",
            "state": "leased",
            "lease_owner": "w1",
            "age_seconds": 60,
            "attempts": 0,
            "max_attempts": 5,
            "next_attempts": 1,
            "would_action": "retry_waiting",
            "backoff_sec": 10,
        },
    ]
    limited = queue.call("fn_job_reap_stale_leases_dry_run", 1)
    assert (limited["stale_count"], limited["listed_count"]) == (2, 1)
    assert queue.call("fn_job_reap_stale_leases_dry_run", -1)["listed_count"] == 0
    assert queue.image("job_queue") == before
    queue.arm_reaper()
    armed = queue.call("fn_job_reap_stale_leases_dry_run")
    assert armed["gates"] == {SUBSTRATE: True, REAPER: True, DRY_RUN_ONLY: False}
    assert armed["apply_would_refuse"] is False


def test_the_reaper_resets_a_job_that_has_tries_left(queue: Queue) -> None:
    queue.arm_reaper()
    job_id = queue.add_job("leased", lease=-60)
    fresh = queue.add_job("leased", lease=60)
    lease_until = queue.job(job_id)["lease_until"]

    answer = queue.call("fn_job_reap_stale_leases_apply", "tester", 10)

    (reset,) = answer.pop("jobs")
    assert answer == {"refused": False, "actor": "tester", "reaped_count": 1, "reset_count": 1, "dead_letter_count": 0}
    assert set(reset) == {"job_id", "action", "attempts", "backoff_sec", "scheduled_at"}
    assert (reset["job_id"], reset["action"], reset["attempts"]) == (str(job_id), "retry_waiting", 1)
    assert reset["backoff_sec"] == 10
    job = queue.job(job_id)
    assert (job["state"], job["attempts"], job["lease_owner"], job["lease_until"]) == ("retry_waiting", 1, None, None)
    assert (job["finished_at"], job["scheduled_at"]) == (None, reset["scheduled_at"])
    until = lease_until.removesuffix("+00:00")
    assert job["last_error"].startswith("lease_expired owner=w1 lease_until=")
    assert job["last_error"].endswith("Z reaped_by=tester")
    assert until in job["last_error"]
    ahead = "SELECT extract(epoch FROM scheduled_at - clock_timestamp()) FROM public.job_queue WHERE job_id = %s"
    assert 9 < queue.value(ahead, job_id) <= 10
    assert queue.job(fresh)["state"] == "leased"


def test_the_reaper_gives_up_a_job_at_its_last_try(queue: Queue) -> None:
    queue.arm_reaper()
    job_id = queue.add_job("in_progress", lease=-60, attempts=4)
    answer = queue.call("fn_job_reap_stale_leases_apply", "tester")
    (dead,) = answer.pop("jobs")
    assert answer == {"refused": False, "actor": "tester", "reaped_count": 1, "reset_count": 0, "dead_letter_count": 1}
    job, letter = queue.job(job_id), queue.letter(job_id)
    assert dead == {
        "job_id": str(job_id),
        "action": "dead_letter",
        "attempts": 5,
        "dead_letter_id": letter["dead_letter_id"],
    }
    assert (job["state"], job["attempts"], job["lease_owner"], job["lease_until"]) == ("dead_letter", 5, None, None)
    assert job["finished_at"] is not None
    for column in ("job_kind", "idempotency_key", "payload_json", "actor", "run_id", "attempts", "last_error"):
        assert letter[column] == job[column]
    assert (letter["dead_letter_reason"], letter["triage_status"]) == ("lease_expired_max_attempts", "pending")
    assert (letter["last_lease_owner"], letter["dead_lettered_by"]) == ("w1", "tester")
    again = queue.call("fn_job_reap_stale_leases_apply", "tester")
    assert (again["refused"], again["reaped_count"], again["jobs"]) == (False, 0, [])


def test_the_reaper_takes_the_longest_expired_first(queue: Queue) -> None:
    queue.arm_reaper()
    jobs = [str(queue.add_job("leased", lease=-age)) for age in (30, 90, 60)]
    order = [jobs[1], jobs[2], jobs[0]]
    assert queue.call("fn_job_reap_stale_leases_apply", "tester", 0)["reaped_count"] == 0
    assert queue.call("fn_job_reap_stale_leases_apply", "tester", -5)["reaped_count"] == 0
    one = queue.call("fn_job_reap_stale_leases_apply", "tester", 1)["jobs"]
    rest = queue.call("fn_job_reap_stale_leases_apply", "tester", None)["jobs"]
    assert [job["job_id"] for job in [*one, *rest]] == order


def test_reaped_again_and_again_a_job_waits_longer_and_dies(queue: Queue) -> None:
    queue.arm_reaper()
    job_id = queue.add_job()
    seen: list[tuple[str, int | None]] = []
    for _ in range(5):
        queue.conn.execute(
            "UPDATE public.job_queue SET state = 'leased', lease_owner = 'w1',"
            " lease_until = clock_timestamp() - interval '1 second'"
        )
        preview = queue.call("fn_job_reap_stale_leases_dry_run")["jobs"][0]
        (done,) = queue.call("fn_job_reap_stale_leases_apply", "tester")["jobs"]
        assert (preview["would_action"], preview["backoff_sec"]) == (done["action"], done.get("backoff_sec"))
        assert preview["next_attempts"] == done["attempts"]
        seen.append((done["action"], done.get("backoff_sec")))
    assert seen == [*(("retry_waiting", wait) for wait in (10, 20, 40, 80)), ("dead_letter", None)]
    assert queue.job(job_id)["attempts"] == 5


def test_the_reaper_never_waits_for_a_worker(sessions: Callable[..., Queue]) -> None:
    worker, reaper = sessions(autocommit=False), sessions()
    busy, idle = reaper.add_job("leased", lease=-60), reaper.add_job("leased", lease=-30)
    worker.call("fn_job_ack", busy, "w1")  # holds the row, not committed yet

    reaper.conn.execute("SET lock_timeout = '1ms'")
    answer = reaper.call("fn_job_reap_stale_leases_apply", "tester")
    assert [job["job_id"] for job in answer["jobs"]] == [str(idle)]

    worker.conn.commit()
    assert reaper.call("fn_job_reap_stale_leases_apply", "tester")["reaped_count"] == 0
    assert reaper.job(busy)["state"] == "succeeded"


def test_two_reapers_share_the_work(sessions: Callable[..., Queue]) -> None:
    one, two = sessions(autocommit=False), sessions()
    jobs = {str(two.add_job("leased", lease=-60)) for _ in range(4)}
    two.conn.execute("SET lock_timeout = '2s'")
    first = one.call("fn_job_reap_stale_leases_apply", "one", 2)["jobs"]
    second = two.call("fn_job_reap_stale_leases_apply", "two", 9)["jobs"]
    assert len(first) == len(second) == 2
    assert {job["job_id"] for job in [*first, *second]} == jobs


def test_an_ack_that_waited_for_the_reaper_is_refused(sessions: Callable[..., Queue]) -> None:
    reaper, worker, watcher = sessions(autocommit=False), sessions(), sessions()
    job_id = worker.add_job("leased", lease=-60)
    reaper.call("fn_job_reap_stale_leases_apply", "tester")
    reasons: list[str | None] = []
    late = threading.Thread(target=lambda: reasons.append(worker.refusal("fn_job_ack", job_id, "w1")))
    late.start()
    waiting = "SELECT count(*) FROM pg_catalog.pg_locks WHERE NOT granted AND pid = %s"
    deadline = time.monotonic() + 60
    while not watcher.value(waiting, worker.conn.info.backend_pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    reaper.conn.commit()
    late.join(timeout=60)
    assert reasons == ["not_leased"]
    assert watcher.job(job_id)["state"] == "retry_waiting"


# --- dead letters -----------------------------------------------------------------------------------------------------


def test_the_requeue_preview_names_every_blocker_and_the_first_one_wins(queue: Queue) -> None:
    letter = queue.add_letter("key")
    colliding = queue.add_job(key="key")
    before = queue.image("job_queue"), queue.image("job_dead_letter")

    def preview() -> dict[str, Any]:
        return queue.call("fn_job_dead_letter_requeue_dry_run", letter)

    answer = preview()
    assert answer.pop("job_id") == str(queue.value("SELECT job_id FROM public.job_dead_letter"))
    assert answer == {
        "refused": False,
        "dead_letter_id": str(letter),
        "job_kind": "test.kind",
        "triage_status": "pending",
        "replay_gate_enabled": False,
        "idempotency_collision": True,
        "colliding_job_id": str(colliding),
        "blockers": [f"{REPLAY}=false", "triage_status=pending", f"idempotency_collision={colliding}"],
        "would_action": f"refused: {REPLAY}=false",
    }
    assert (queue.image("job_queue"), queue.image("job_dead_letter")) == before
    queue.gate(REPLAY, "true")
    assert (preview()["replay_gate_enabled"], preview()["would_action"]) == (True, "refused: triage_status=pending")
    queue.call("fn_job_dead_letter_triage_update", letter, "manual_replay", "tester")
    assert preview()["would_action"] == f"refused: idempotency_collision={colliding}"
    queue.conn.execute(
        "UPDATE public.job_queue SET state = 'cancelled', finished_at = now() WHERE job_id = %s", [colliding]
    )
    answer = preview()
    assert (answer["blockers"], answer["idempotency_collision"], answer["colliding_job_id"]) == ([], False, None)
    assert answer["would_action"] == "requeue: job_kind=test.kind idempotency_key=key"


def test_only_a_letter_marked_for_replay_can_be_queued_again(queue: Queue) -> None:
    queue.gate(REPLAY, "true")
    blockers = {
        status: queue.call("fn_job_dead_letter_requeue_dry_run", queue.add_letter(triage_status=status))["blockers"]
        for status in TRIAGE
    }
    assert blockers == {status: [] if status == "manual_replay" else [f"triage_status={status}"] for status in TRIAGE}


@pytest.mark.parametrize("letter", [None, uuid4()])
def test_the_requeue_preview_of_an_unknown_letter(queue: Queue, letter: object) -> None:
    answer = queue.call("fn_job_dead_letter_requeue_dry_run", letter)
    assert answer == {"refused": True, "reason": "dead_letter_not_found"}


def test_triage_refuses_in_this_order(queue: Queue) -> None:
    queue.add_letter()
    before = queue.image("job_dead_letter")
    for actor, status, reason in (
        (" ", "done", "actor_required"),
        (None, "done", "actor_required"),
        ("tester", "done", "invalid_triage_status"),
        ("tester", None, "invalid_triage_status"),
        ("tester", "Closed", "invalid_triage_status"),
        ("tester", "closed", "not_found"),
    ):
        answer = queue.call("fn_job_dead_letter_triage_update", uuid4(), status, actor)
        assert answer == {"refused": True, "reason": reason}
    assert queue.image("job_dead_letter") == before


@pytest.mark.parametrize("status", TRIAGE)
def test_triage_records_who_decided_what_and_touches_no_job(queue: Queue, status: str) -> None:
    letter = queue.add_letter()
    jobs = queue.image("job_queue")
    answer = queue.call("fn_job_dead_letter_triage_update", letter, status, "tester", "seen")
    assert answer == {"refused": False, "from": "pending", "to": status, "requeued": False}
    row = queue.record("job_dead_letter", "dead_letter_id", letter)
    assert (row["triage_status"], row["triaged_by"], row["triage_note"]) == (status, "tester", "seen")
    assert row["triaged_at"] is not None
    again = queue.call("fn_job_dead_letter_triage_update", letter, "pending", "other")
    assert (again["from"], again["to"]) == (status, "pending")
    assert queue.image("job_queue") == jobs


# --- permissions ------------------------------------------------------------------------------------------------------


def test_exactly_the_declared_roles_may_execute(queue: Queue) -> None:
    for address, function in phase2.declared("functions").items():
        may = {
            role
            for role in ("workflow_admin", "operator", "worker", "reader")
            if queue.value("SELECT has_function_privilege(%s, %s, 'EXECUTE')", role, address)
        }
        assert may == {"workflow_admin", *function["execute"]}, address
        public = "SELECT proacl::text ~ '[{,]=' FROM pg_catalog.pg_proc WHERE oid = %s::regprocedure"
        assert queue.value(public, address) is False


@pytest.mark.parametrize("function", sorted(set(CALLER) - {"fn_queue_stale_check"}))
def test_whoever_is_not_named_gets_42501(queue: Queue, function: str) -> None:
    (declared,) = (f["execute"] for a, f in phase2.declared("functions").items() if a.startswith(f"public.{function}("))
    nulls = queue.value("SELECT pronargs - pronargdefaults FROM pg_catalog.pg_proc WHERE proname = %s", function)
    for role in {"operator", "worker", "reader"} - set(declared):
        with pytest.raises(errors.InsufficientPrivilege), queue.conn.transaction():
            queue.call(function, *[None] * nulls, by=role)


@pytest.mark.parametrize("role", ["operator", "worker", "reader"])
@pytest.mark.parametrize("table", ["dot_config", "job_queue", "job_dead_letter", "queue_heartbeat"])
def test_nobody_writes_past_the_functions(queue: Queue, role: str, table: str) -> None:
    identifier = sql.Identifier(table)
    with queue.role(role):
        queue.conn.execute(sql.SQL("SELECT FROM public.{}").format(identifier))
    for statement in ("DELETE FROM public.{}", "TRUNCATE public.{}", "INSERT INTO public.{} DEFAULT VALUES"):
        with pytest.raises(errors.InsufficientPrivilege), queue.conn.transaction(), queue.role(role):
            queue.conn.execute(sql.SQL(statement).format(identifier))
    with pytest.raises(errors.InsufficientPrivilege), queue.conn.transaction(), queue.role(role):
        queue.conn.execute("CREATE TABLE public.mine ()")


@pytest.mark.parametrize("role", ["operator", "reader"])
def test_the_previews_need_nothing_but_to_read(queue: Queue, role: str) -> None:
    letter = queue.add_letter()
    queue.conn.execute("SET TRANSACTION READ ONLY")
    assert queue.call("fn_job_reap_stale_leases_dry_run", by=role)["dry_run"] is True
    assert queue.call("fn_job_dead_letter_requeue_dry_run", letter, by=role)["refused"] is False
    assert queue.call("fn_queue_stale_check", by=role)["refused"] is False


def test_phase_2_adds_five_functions_as_they_are_declared(queue: Queue) -> None:
    listed = queue.rows(
        "SELECT p.proname::text, p.provolatile::text, p.prosecdef, p.proconfig, r.rolname::text"
        " FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_roles AS r ON r.oid = p.proowner"
        " WHERE p.pronamespace = 'public'::regnamespace AND p.proname ~ '^fn_(job|queue)_'"
        " AND p.prorettype <> 'trigger'::regtype ORDER BY 1"
    )
    path = ["search_path=pg_catalog, public, pg_temp"]
    stable = {"fn_queue_stale_check", "fn_job_reap_stale_leases_dry_run", "fn_job_dead_letter_requeue_dry_run"}
    assert listed == [
        (name, "s" if name in stable else "v", name not in stable, path, "workflow_admin") for name in sorted(CALLER)
    ]
    assert len(listed) == 12
