"""The seed's proof, made mechanical: what its author checked by hand, asserted item by item on one apply of Phase 2.

And its forbidden list: every tampering that each item must see, before an apply and during one.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import cli as command_line
from tests.integration import governed
from tests.integration.phase2 import Phase2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.servers import Database

SEED = {
    "tables": "0",
    "views": "0",
    "functions": "+5",
    "dot_config-keys": "+4",
    "queue-keys": "+4",
    "queue_heartbeat-rows": "+1",
    "job_queue-rows": "0",
    "job_dead_letter-rows": "0",
    "event_outbox-rows": "+1019",
    "cursor-last_run_at": "unchanged",
    "iu_vector_sync_point-rows": "0",
    "information_unit-rows": "0",
    "extensions": "unchanged",
    "production_documents": "0",
    "fn_iu_op-aliases": "0",
    "event_outbox-checks": "0",
}
"""The regression table of the seed: what each row differed by."""

ELEVEN = {f"P{number:02}" for number in range(1, 12)}
ADDED = {"X1", "X2", "X3", "X4"}
REFUSALS = {
    "already_registered": "P11",
    "invalid_triage_status": "P06",
    "actor_required": "P06",
    "queue.lease.reaper_dry_run_only=true": "P03",
    "queue.lease.reaper_enabled=false": "P03",
    "not_found": "P06",
    "payload_denied": "P01",
}
"""The seven refusals of the seed, with the proof that shows each."""

HELD = {
    "F01-no-pg-cron", "F03-no-outbox-write", "F04-outbox-schema", "F05-no-check-widened", "F06-no-outbox-mutation",
    "F08-no-production-documents", "F09-aliases", "F12-executor-kinds", "F13-worker-off", "F14-substrate-off",
}  # fmt: skip
ATTESTED = {"F02-no-worker-started", "F07-no-qdrant", "F10-start-here", "F11-law-text"}

EVENTS = """
INSERT INTO public.event_outbox (event_domain, event_type, event_stream, actor_ref, source_system)
SELECT 'iu', 'iu.version_applied', 'lifecycle', 'agent:editor', 'directus' FROM generate_series(1, {})
"""
FIFTY = """
INSERT INTO public.queue_heartbeat (executor_name, executor_kind, last_tick_at, last_tick_status, ticks_total)
SELECT 'executor_' || n, 'Agent', clock_timestamp(), 'ok', n FROM generate_series(1, 50) AS n
"""
QUEUE = """
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

WORK = (
    (
        "UPDATE public.queue_heartbeat SET last_tick_at = clock_timestamp(), ticks_total = ticks_total + 1"
        " WHERE executor_name LIKE 'executor%'"
    ),
    # An executor that beats for the first time; and one that enqueues a job, claims it and ends it.
    (
        "INSERT INTO public.queue_heartbeat (executor_name, executor_kind, last_tick_at, last_tick_status, ticks_total)"
        " SELECT 'executor_' || 1 + count(*), 'Agent', clock_timestamp(), 'ok', 1 FROM public.queue_heartbeat"
    ),
    (
        "INSERT INTO public.job_queue (job_kind, idempotency_key, actor)"
        " SELECT 'real.kind', 'new:' || count(*), 'somebody' FROM public.job_queue"
    ),
    (
        "UPDATE public.job_queue SET state = 'leased', lease_owner = 'executor_1',"
        " lease_until = clock_timestamp() + interval '1 hour' WHERE idempotency_key LIKE 'new:%' AND state = 'queued'"
    ),
    (
        "UPDATE public.job_queue SET state = 'succeeded', finished_at = clock_timestamp(), lease_owner = NULL,"
        " lease_until = NULL WHERE state = 'leased'"
    ),
    # The queue is pruned, and a letter is written for one that gave up.
    (
        "DELETE FROM public.job_queue WHERE job_id IN (SELECT job_id FROM public.job_queue WHERE state = 'succeeded'"
        " LIMIT 1)"
    ),
    (
        "INSERT INTO public.job_dead_letter (job_id, job_kind, idempotency_key, actor, attempts, max_attempts,"
        " dead_letter_reason, dead_lettered_by) VALUES (gen_random_uuid(), 'real.kind', 'x', 'somebody', 5, 5,"
        " 'max_attempts', 'somebody')"
    ),
    "UPDATE public.iu_route_worker_cursor SET last_run_at = last_run_at",
    EVENTS.format(27),
)


@pytest.fixture
def phase2(dieu45: Database, tmp_path: Path) -> Phase2:
    return Phase2(dieu45, tmp_path)


class Others:
    """What others commit while an apply is under way: at each of these stages, on a connection of their own."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch, work: Callable[[str], tuple[str, ...]]) -> None:
        self.commits = 0
        told = command_line._Progress.__call__

        def listen(progress: Any, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
            told(progress, stage, detail, number, of)
            with psycopg.connect(db.dsn, autocommit=True) as conn:
                conn.execute("SET lock_timeout = '5s'")
                for statement in work(stage):
                    conn.execute(statement.encode())
                    self.commits += 1

        monkeypatch.setattr(command_line._Progress, "__call__", listen)


def once(*stages: str, statements: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """The statements at the first call for each stage."""
    left = list(stages)

    def work(stage: str) -> tuple[str, ...]:
        if stage in left:
            left.remove(stage)
            return statements
        return ()

    return work


def evidence(phase2: Phase2) -> tuple[dict[str, Any], str]:
    """Apply; the evidence and the report."""
    place = phase2.folder / "run"
    phase2.apply("--evidence", place)
    return json.loads((place / "evidence.json").read_text()), (place / "report.md").read_text()


def short(address: str) -> str:
    return address.partition(".")[2].partition("-")[0]


# ------------------------------------------------------------------------------------------------------- one apply


@pytest.mark.smoke
def test_the_evidence_of_one_apply_shows_what_the_seed_proved_by_hand(
    phase2: Phase2, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Others(phase2.db, monkeypatch, once("execute", statements=(EVENTS.format(1019),)))
    phase2.approve("Phase 2, as decided")
    found, report = evidence(phase2)
    assert others.commits == 1
    assert (found["outcome"], found["problems"]) == ("applied", [])

    # Proofs: 11 of 11, and those that were added.
    statuses = {short(row["address"]): row["status"] for row in found["proofs"]}
    assert {name for name, status in statuses.items() if status == "passed"} >= ELEVEN | ADDED
    assert {status for name, status in statuses.items() if name not in ELEVEN | ADDED} <= {"passed", "deferred"}

    # Refusals: 7 of 7, each shown by a proof that passed.
    shown = {(row["refusal"], short(row["proof"])) for row in found["refusals"]}
    assert set(REFUSALS.items()) <= shown
    assert {statuses[proof] for proof in REFUSALS.values()} == {"passed"}
    told = dict(re.findall(r"^\| `([^`]+)` \| `[A-Z]\d.*` \| (\w+) \|$", report, re.MULTILINE))
    assert {refusal: told[refusal] for refusal in REFUSALS} == dict.fromkeys(REFUSALS, "passed")

    # The forbidden list: 10 held, 4 attested, none not judged.
    forbidden = {row["address"].partition(".")[2]: row["status"] for row in found["invariants"] if row["group"]}
    assert {name for name, status in forbidden.items() if status == "held"} == HELD
    assert {name for name, status in forbidden.items() if status == "attested"} == ATTESTED
    assert len(forbidden) == 14
    judged = [*found["invariants"], *found["proofs"], *found["surface"]]
    assert [row["address"] for row in judged if row["status"] == "not_judged"] == []
    assert {row["status"] for row in found["invariants"]} == {"held", "attested"}

    # The surface: 16 of 16, with the seed's numbers, in the evidence and in the report's table.
    assert {row["address"].partition(".")[2] for row in found["surface"]} == set(SEED)
    assert {row["status"] for row in found["surface"]} == {"predicted"}
    table = re.findall(
        r"^\| `([\w-]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \| [^|]* \| as predicted \|$", report, re.MULTILINE
    )
    assert {name: delta for name, _, _, delta in table} == SEED
    for name, before, after, delta in table:
        if delta != "unchanged":
            assert int(after) - int(before) == int(delta), name
    (outbox,) = [row for row in found["surface"] if row["address"] == "surface.event_outbox-rows"]
    assert outbox["detail"].endswith("(+1019), +1019 by others")
    assert "Regression: 16 of 16 as predicted" in report
    assert "Forbidden list: 10 held, 4 attested" in report
    # And after COMMIT, on a new connection: what differs came later, and nothing did.
    assert found["surface_later"] == {row["address"]: row["after"] for row in found["surface"]}
    assert "Read again after COMMIT, on a new connection: 16 of 16 as inside the transaction." in report

    # One transaction made all of it: every function, gate, marker and the entry carry its id.
    xid = int(found["transaction_id"])
    assert {
        int(made)
        for (made,) in phase2.db.execute(
            """
            SELECT xmin::text FROM pg_catalog.pg_proc WHERE proname IN ('fn_queue_heartbeat_register_passive',
                   'fn_job_reap_stale_leases_dry_run', 'fn_job_reap_stale_leases_apply',
                   'fn_job_dead_letter_requeue_dry_run', 'fn_job_dead_letter_triage_update')
            UNION ALL SELECT xmin::text FROM public.dot_config WHERE key IN ('queue.heartbeat.enabled',
                   'queue.lease.reaper_enabled', 'queue.lease.reaper_dry_run_only', 'queue.dlq.replay_enabled',
                   'queue.runtime.phase')
            UNION ALL SELECT xmin::text FROM public.queue_heartbeat WHERE executor_name = 'iu_outbound_default'
            UNION ALL SELECT xmin::text FROM reconciler.entry
            """
        )
    } == {xid % 2**32}
    assert f"One transaction, `{xid}`." in report
    # What the proofs played with is gone, and no locked gate was written.
    counts = "SELECT (SELECT count(*) FROM public.job_queue), (SELECT count(*) FROM public.job_dead_letter)"
    assert phase2.db.execute(counts) == [(0, 0)]
    assert "No changes." in phase2.plan()


@pytest.mark.smoke
def test_it_passes_beside_fifty_executors_and_a_busy_queue(phase2: Phase2, monkeypatch: pytest.MonkeyPatch) -> None:
    """They beat, enqueue, claim, end and prune jobs and send events between BEGIN and the last look."""
    phase2.db.execute(FIFTY)
    phase2.db.execute(QUEUE)
    phase2.approve()
    stages = ("read", "execute", "execute", "execute", "verify", "judge", "after")
    others = Others(phase2.db, monkeypatch, once(*stages, statements=WORK))
    found, report = evidence(phase2)
    assert others.commits == len(WORK) * len(stages)
    assert (found["outcome"], found["problems"]) == ("applied", [])
    statuses = {short(row["address"]): row["status"] for row in found["proofs"]}
    assert {name for name, status in statuses.items() if status == "passed"} >= ELEVEN | ADDED
    assert {row["status"] for row in found["surface"]} == {"predicted"}
    assert len(found["surface"]) == 16
    # Read before the first statement: what came at `read` is in the number already.
    said = {row["address"].partition(".")[2]: row["detail"] for row in found["surface"]}
    assert said["job_dead_letter-rows"] == "21 -> 26 (+5), +5 by others"
    assert said["queue_heartbeat-rows"] == "51 -> 57 (+6), +5 by others"
    assert said["job_queue-rows"] == "300, unchanged"
    assert said["event_outbox-rows"].endswith("(+135), +135 by others")
    assert said["dot_config-keys"].endswith("(+4)")
    assert "| `job_dead_letter-rows` | 21 -&#62; 26 (+5), +5 by others |" in report
    # What others commit after COMMIT is later still.
    assert "13 of 16 as inside the transaction." in report
    assert "| `job_dead_letter-rows` | 26 | 27 |" in report
    assert found["surface_later"]["surface.job_dead_letter-rows"] == "27"
    # The heartbeats and jobs of others are as they left them.
    assert phase2.db.execute("SELECT count(*) FROM public.job_queue") == [(300,)]
    assert phase2.db.execute(
        "SELECT min(ticks_total), max(ticks_total) FROM public.queue_heartbeat"
        " WHERE executor_name ~ '^executor_([1-9]|[1-4][0-9]|50)$'"
    ) == [(8, 57)]
    assert "No changes." in phase2.plan()


# ---------------------------------------------------------------------------------------------------- tampered before


CHECK_WIDER = """
ALTER TABLE public.{table} DROP CONSTRAINT {name}, ADD CONSTRAINT {name} CHECK ({text}) {more}
"""
DOMAIN = "event_domain IN ('iu', 'knowledge', 'governance', 'system'{more})"
ALIAS = "public.fn_iu_op_verify_cut(uuid, text)"

BEFORE: dict[str, tuple[str, str]] = {
    "F01: an extension of that schema": ("CREATE SCHEMA cron", "F01-no-pg-cron"),
    "F03: an event that names phase 2": (
        EVENTS.format(1).replace("'agent:editor'", "'agent:phase2'"),
        "no-phase2-event",
    ),
    "F04: a CHECK widened at the same count": (
        CHECK_WIDER.format(
            table="event_outbox",
            name="event_outbox_event_domain_check",
            text=DOMAIN.format(more=", 'other'"),
            more="",
        ),
        "F04-outbox-schema",
    ),
    "F04: a CHECK added again NOT VALID": (
        CHECK_WIDER.format(
            table="event_outbox",
            name="event_outbox_event_domain_check",
            text=DOMAIN.format(more=""),
            more="NOT VALID",
        ),
        "F04-outbox-schema",
    ),
    "F04: the trigger disabled": (
        "ALTER TABLE public.event_outbox DISABLE TRIGGER trg_event_outbox_type_validate",
        "F04-outbox-schema",
    ),
    "F04: the trigger's function gutted": (
        (
            "CREATE OR REPLACE FUNCTION public.fn_event_outbox_type_validate() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RETURN NEW; END $$"
        ),
        "F04-outbox-schema",
    ),
    "F04: a policy": ("CREATE POLICY all_rows ON public.event_outbox USING (true)", "F04-outbox-schema"),
    "F04: a right": ("GRANT SELECT ON public.event_outbox TO worker", "F04-outbox-schema"),
    "F04: a default": ("ALTER TABLE public.event_outbox ALTER delivery_lane SET DEFAULT 'digest'", "F04-outbox-schema"),
    "F05: a CHECK of the registry widened": (
        CHECK_WIDER.format(
            table="event_type_registry",
            name="event_type_registry_domain_check",
            text=DOMAIN.format(more=", 'other'"),
            more="",
        ),
        "F05-no-check-widened",
    ),
    "F05: a route may be live": (
        CHECK_WIDER.format(table="iu_sql_event_route", name="iu_sql_event_route_dry_run_check", text="true", more=""),
        "F05-no-check-widened",
    ),
    "F07: a new server": ("CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw", "no-foreign-server"),
    "F08: in another schema": (
        "CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.production_documents ()",
        "F08-no-production-documents",
    ),
    "F09: a body at the same count": (
        (
            f"CREATE OR REPLACE FUNCTION {ALIAS.replace('uuid, text', 'p_unit_id uuid, p_actor text DEFAULT NULL')}"
            " RETURNS jsonb LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp"
            " AS $$ SELECT '{}'::jsonb $$"
        ),
        "F09-aliases",
    ),
    "F09: a right": (f"GRANT EXECUTE ON FUNCTION {ALIAS} TO worker", "F09-aliases"),
    "F12: MOT added": (
        CHECK_WIDER.format(
            table="queue_heartbeat",
            name="queue_heartbeat_executor_kind_check",
            text="executor_kind IN ('DOT', 'Agent', 'Hermes', 'Codex', 'PG_worker', 'external_worker',"
            " 'future_Kestra_adapter', 'MOT')",
            more="",
        ),
        "F12-executor-kinds",
    ),
    "F13: the worker's gate": (
        "UPDATE public.dot_config SET value = 'true' WHERE key = 'queue.worker.enabled'",
        "F13-worker-off",
    ),
    "F14: the substrate's gate": (
        "UPDATE public.dot_config SET value = 'true' WHERE key = 'queue.job_substrate.enabled'",
        "F14-substrate-off",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_was_tampered_with_before_blocks_the_plan_and_is_named(phase2: Phase2, name: str) -> None:
    by_hand, check = BEFORE[name]
    constraint = (
        "SELECT conname FROM pg_constraint WHERE conrelid = 'public.queue_heartbeat'::regclass AND contype = 'c'"
    )
    if "F12" in name:
        # Its name is not told by anybody.
        ((own,),) = phase2.db.execute(f"{constraint} AND pg_get_constraintdef(oid) LIKE '%future_Kestra%'")
        by_hand = by_hand.replace("queue_heartbeat_executor_kind_check", own)
    phase2.db.execute(by_hand)
    where = ("plan", "-s", phase2.state, "-t", phase2.target, "--format", "json")
    document = json.loads(phase2.run(*where, code=3).stdout)
    assert document["outcome"] == "violated"
    violated = {row["address"].partition(".")[2] for row in document["invariants"] if row["status"] == "violated"}
    assert violated == {check}


# ---------------------------------------------------------------------------------------------------- tampered during


def behind_our_back(db: Database, body: str) -> None:
    """Run `body` when the apply inserts its last gate, which no proof touches: as the function's owner, not as us."""
    db.execute(
        f"""
        CREATE FUNCTION public.behind_our_back() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $body$
        BEGIN
            {body}
            RETURN NULL;
        END $body$;
        CREATE TRIGGER behind_our_back AFTER INSERT ON public.dot_config
            FOR EACH ROW WHEN (NEW.key = 'queue.runtime.phase') EXECUTE FUNCTION public.behind_our_back();
        """
    )


EVENT = EVENTS.format(1).strip() + ";"
FLIP = """
UPDATE public.dot_config SET value = 'true' WHERE key = '{key}';
UPDATE public.dot_config SET value = 'false' WHERE key = '{key}';
"""
OUTBOX = {"invariant.F03-no-outbox-write", "surface.event_outbox-rows"}

DURING: dict[str, tuple[str, set[str], str]] = {
    "an event that says nothing": (EVENT, OUTBOX, "public.event_outbox: 1 row written"),
    "an event in a block that swallows errors": (
        f"BEGIN {EVENT} EXCEPTION WHEN division_by_zero THEN NULL; END;",
        OUTBOX,
        "public.event_outbox: 1 row written",
    ),
    "TRUNCATE": (
        "TRUNCATE public.event_outbox;",
        {*OUTBOX, "invariant.F06-no-outbox-mutation"},
        "AccessExclusiveLock taken",
    ),
    "one row updated": (
        (
            "UPDATE public.event_outbox SET event_severity = 'error'"
            " WHERE id IN (SELECT id FROM public.event_outbox LIMIT 1);"
        ),
        {*OUTBOX, "invariant.F06-no-outbox-mutation"},
        "1 row written",
    ),
    "one row swapped for another": (
        "DELETE FROM public.event_outbox WHERE id IN (SELECT id FROM public.event_outbox LIMIT 1);" + EVENT,
        {*OUTBOX, "invariant.F06-no-outbox-mutation"},
        "2 rows written",
    ),
    "the worker's gate flipped and flipped back": (
        FLIP.format(key="queue.worker.enabled"),
        {"invariant.F13-worker-off"},
        "its row was written during the apply",
    ),
    "the substrate's gate flipped and flipped back": (
        FLIP.format(key="queue.job_substrate.enabled"),
        {"invariant.F14-substrate-off"},
        "its row was written during the apply",
    ),
    "a CHECK widened at the same count": (
        BEFORE["F05: a CHECK of the registry widened"][0].strip() + ";",
        {"invariant.F05-no-check-widened"},
        "+ public.event_type_registry: constraint event_type_registry_domain_check CHECK",
    ),
    "the trigger's function gutted": (
        "EXECUTE $e$" + BEFORE["F04: the trigger's function gutted"][0] + "$e$;",
        {"invariant.F04-outbox-schema"},
        "calls public.fn_event_outbox_type_validate()",
    ),
    "an alias swapped": (
        "EXECUTE $e$" + BEFORE["F09: a body at the same count"][0] + "$e$;",
        {"invariant.F09-aliases"},
        "public.fn_iu_op_verify_cut",
    ),
    "a vector swapped at the same count": (
        (
            "UPDATE public.iu_vector_sync_point AS v SET synced_at = synced_at + interval '1 s'"
            " WHERE v.ctid IN (SELECT w.ctid FROM public.iu_vector_sync_point AS w LIMIT 1);"
        ),
        {"invariant.F07-no-qdrant"},
        "attested, but what its proxy query sees changed during the apply",
    ),
    "a job smuggled in": (
        "INSERT INTO public.job_queue (job_kind, idempotency_key, actor) VALUES ('real.kind', 'smuggled', 'x');",
        {"surface.job_queue-rows"},
        "of our own it is +1",
    ),
    "a table": (
        "EXECUTE 'CREATE TABLE public.smuggled ()';",
        {"surface.tables"},
        "predicted unchanged",
    ),
}


@pytest.mark.parametrize("name", DURING)
def test_what_is_done_behind_the_back_of_the_apply_rolls_it_back(phase2: Phase2, name: str) -> None:
    body, checks, said = DURING[name]
    behind_our_back(phase2.db, body)
    found = caught(phase2)
    wrong = {
        row["address"]: row["detail"]
        for row in (*found["invariants"], *found["surface"], *found["proofs"])
        if row["status"] in {"violated", "differs", "failed"}
    }
    assert set(wrong) == checks
    assert any(said in detail for detail in wrong.values()), wrong


def caught(phase2: Phase2) -> dict[str, Any]:
    """Apply, which is rolled back as violated and changes nothing; its evidence."""
    phase2.approve()
    image = governed.image(phase2.db)
    place = phase2.folder / "run"
    done = phase2.apply("--evidence", place, "--format", "json", code=3)
    assert json.loads(done.stdout)["outcome"] == "violated"
    assert governed.image(phase2.db) == image
    found = json.loads((place / "evidence.json").read_text())
    assert (found["outcome"], found["entry"]) == ("violated", None)
    return found


@pytest.mark.parametrize("deferred", ["CONSTRAINT TRIGGER", "a chain of them"])
def test_a_deferred_trigger_that_would_fire_at_commit_is_caught(phase2: Phase2, deferred: str) -> None:
    first = "INSERT INTO public.relay VALUES (1);" if deferred != "CONSTRAINT TRIGGER" else EVENT
    phase2.db.execute(
        f"""
        CREATE TABLE public.relay (n integer);
        CREATE FUNCTION public.at_commit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $body$
        BEGIN {first} RETURN NULL; END $body$;
        CREATE FUNCTION public.at_commit_again() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $body$
        BEGIN {EVENT} RETURN NULL; END $body$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON public.dot_config DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.key = 'queue.runtime.phase') EXECUTE FUNCTION public.at_commit();
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON public.relay DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION public.at_commit_again();
        """
    )
    found = caught(phase2)
    wrong = {row["address"] for row in (*found["invariants"], *found["surface"]) if row["status"] not in GOOD}
    assert wrong == OUTBOX


GOOD = {"held", "attested", "predicted"}


def test_a_gate_that_others_flip_and_flip_back_during_the_apply_is_caught_too(
    phase2: Phase2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`row: untouched` speaks of the row: who wrote it does not matter."""
    flip = tuple(line for line in FLIP.format(key="queue.worker.enabled").strip().splitlines())
    phase2.approve()
    Others(phase2.db, monkeypatch, once("verify", statements=flip))
    place = phase2.folder / "run"
    phase2.apply("--evidence", place, code=3)
    found = json.loads((place / "evidence.json").read_text())
    assert [row["address"] for row in found["invariants"] if row["status"] not in GOOD] == ["invariant.F13-worker-off"]
