"""The governed system before Phase 2: its magnitudes, its shape, and that state/ tells the truth about Phase 1."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import errors

from tests.integration import phase2
from tests.integration.phase2 import BASELINE, CALLER, PHASE_2, STATE, declared

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database, Server

PHASE_1 = [address for address in declared("functions") if address not in PHASE_2]

COUNTS = {
    "tables": "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'public'",
    "views": "SELECT count(*) FROM pg_catalog.pg_views WHERE schemaname = 'public'",
    "functions": "SELECT count(*) FROM pg_catalog.pg_proc WHERE pronamespace = 'public'::regnamespace",
    "keys": "SELECT count(*) FROM public.dot_config",
    "queue keys": "SELECT count(*) FROM public.dot_config WHERE key LIKE 'queue.%'",
    "events": "SELECT count(*) FROM public.event_outbox",
    "sync points": "SELECT count(*) FROM public.iu_vector_sync_point",
    "units": "SELECT count(*) FROM public.information_unit",
    "heartbeats": "SELECT count(*) FROM public.queue_heartbeat",
    "jobs": "SELECT count(*) FROM public.job_queue",
    "dead letters": "SELECT count(*) FROM public.job_dead_letter",
    "checks of event_outbox": "SELECT count(*) FROM pg_catalog.pg_constraint"
    " WHERE conrelid = 'public.event_outbox'::regclass AND contype = 'c'",
    "aliases": "SELECT count(*) FROM pg_catalog.pg_proc WHERE proname ~ '^fn_iu_op_'",
}

# Everything of a function but its number, and its defaults as text: the stored form holds parse positions.
FUNCTION = """
SELECT to_jsonb(p) - ARRAY['oid', 'proargdefaults', 'proacl']
       || jsonb_build_object(
           'arguments', pg_catalog.pg_get_function_arguments(p.oid),
           'acl', (SELECT jsonb_agg(a::text ORDER BY a::text) FROM unnest(p.proacl) AS a),
           'comment', pg_catalog.obj_description(p.oid, 'pg_proc')
       )
FROM pg_catalog.pg_proc AS p
WHERE p.oid = %s::regprocedure
"""


def column(db: Database, query: str) -> list[Any]:
    return [row[0] for row in db.execute(query)]


@pytest.mark.smoke
def test_the_full_size(dieu45_full: Database) -> None:
    assert {name: dieu45_full.execute(query)[0][0] for name, query in COUNTS.items()} == {
        "tables": 271,
        "views": 55,
        "functions": 515,
        "keys": 94,
        "queue keys": 8,
        "events": 133_784,
        "sync points": 152,
        "units": 175,
        "heartbeats": 0,
        "jobs": 0,
        "dead letters": 0,
        "checks of event_outbox": 9,
        "aliases": 5,
    }
    governed = column(
        dieu45_full,
        "SELECT proname::text FROM pg_catalog.pg_proc WHERE pronamespace = 'public'::regnamespace"
        " AND proname ~ '^fn_(job|queue)_' ORDER BY 1",
    )
    assert governed == sorted(re.findall(r"fn_\w+", " ".join(PHASE_1)))
    # 5,000 events came in after the route worker had fallen silent.
    waiting = (
        "SELECT count(*) FROM public.event_outbox AS e JOIN public.iu_route_worker_cursor AS c"
        " ON (e.created_at, e.id) > (c.last_created_at, c.last_event_id)"
    )
    assert dieu45_full.execute(waiting) == [(5000,)]


@pytest.mark.smoke
def test_state_tells_the_truth_about_phase_1(dieu45: Database) -> None:
    assert len(PHASE_1) == 8
    before = {address: dieu45.execute(FUNCTION, [address])[0][0] for address in PHASE_1}
    dieu45.execute("DROP TRIGGER trg_job_queue_updated_at ON public.job_queue")
    for address in PHASE_1:
        dieu45.execute(f"DROP FUNCTION {address}")
        phase2.create(dieu45.conn, address)
    assert {address: dieu45.execute(FUNCTION, [address])[0][0] for address in PHASE_1} == before


def test_the_baseline_holds_the_text_of_every_phase_1_function() -> None:
    text = (BASELINE / "40_queue_functions.sql").read_text()
    for address in PHASE_1:
        assert (STATE / declared("functions")[address]["source"]).read_text() in text


@pytest.mark.smoke
def test_state_declares_what_phase_2_needs(dieu45: Database) -> None:
    live = dict(dieu45.execute("SELECT key, value FROM public.dot_config WHERE key LIKE 'queue.%%'", []))
    gates = {key: gate["value"] for key, gate in declared("gates").items()}
    assert len(gates) == 12
    assert {key: value for key, value in gates.items() if live.get(key) != value} == {
        "queue.heartbeat.enabled": "true",
        "queue.lease.reaper_enabled": "false",
        "queue.lease.reaper_dry_run_only": "true",
        "queue.dlq.replay_enabled": "false",
        "queue.runtime.phase": "phase2_governance",
    }
    assert declared("gates")["queue.heartbeat.enabled"]["from"] == [live["queue.heartbeat.enabled"]]
    assert {gate["value"] for gate in declared("gates").values() if gate.get("lock") == "locked"} <= {"true", "false"}
    for gate in declared("gates").values():
        assert gate.get("lock") != "locked" or gate["value"] == gate["safe"]

    phase2.install(dieu45.conn)
    assert dieu45.execute(COUNTS["queue keys"]) == [(12,)]
    for key, invariant in declared("invariants").items():
        if "query" in invariant and "unchanged" not in invariant:
            rows = dieu45.execute(invariant["query"])
            assert rows == ([] if "rows" in invariant else [(invariant["equals"],)]), key


@pytest.mark.smoke
def test_the_marker_is_made_by_its_function_from_the_cursor(dieu45: Database) -> None:
    phase2.install(dieu45.conn)
    (marker,) = declared("markers").values()
    via = marker["via"]
    ((observed,),) = dieu45.execute(marker["bind"]["last_tick_at"]["query"])
    assert observed.isoformat() == "2026-05-22T11:31:41.928657+00:00"
    arguments = {n: observed if isinstance(v, dict) else v for n, v in via["args"].items()}
    phase2.Queue(dieu45.conn).call(via["function"].removeprefix("public."), **arguments)
    ((row,),) = dieu45.execute("SELECT to_jsonb(h) FROM public.queue_heartbeat AS h")
    assert {name: str(row[name]) for name in (*marker["key"], *marker["values"])} == {
        **marker["key"],
        **marker["values"],
    }
    check = phase2.Queue(dieu45.conn).call("fn_queue_stale_check")
    assert (check["stale_count"], check["fresh_count"]) == (1, 0)
    assert dieu45.execute("SELECT executors_stale FROM public.v_queue_health") == [(1,)]


def test_the_gates_of_the_yaml_are_asked_in_that_order() -> None:
    for address, function in declared("functions").items():
        body = (STATE / function["source"]).read_text()
        asked = re.findall(r"'reason', '(queue\.[a-z_.]+)=", body)
        assert asked == function.get("gates", []), address
    assert {re.findall(r"fn_\w+", address)[0] for address in declared("functions")} == {
        *CALLER,
        "fn_job_queue_updated_at",
    }


def test_the_shape_of_the_tables(dieu45: Database) -> None:
    columns = (
        "SELECT attrelid::regclass::text, count(*), count(*) FILTER (WHERE attnotnull) FROM pg_catalog.pg_attribute"
        " WHERE attnum > 0 AND attrelid = ANY (%s::regclass[]) GROUP BY 1"
    )
    tables = ["public.job_queue", "public.queue_heartbeat", "public.dot_config", "public.event_outbox"]
    assert {row[0]: row[1:] for row in dieu45.execute(columns, [tables])} == {
        "job_queue": (21, 12),
        "queue_heartbeat": (9, 7),
        "dot_config": (4, 3),
        "event_outbox": (16, 12),
    }
    checks = (
        "SELECT conrelid::regclass::text, count(*) FROM pg_catalog.pg_constraint WHERE contype = 'c'"
        " AND conrelid = ANY (%s::regclass[]) GROUP BY 1"
    )
    assert dict(dieu45.execute(checks, [[*tables, "public.job_dead_letter"]])) == {
        "job_queue": 9,
        "job_dead_letter": 3,
        "queue_heartbeat": 3,
        "event_outbox": 9,
    }
    outbox = column(
        dieu45,
        "SELECT attname::text FROM pg_catalog.pg_attribute WHERE attrelid = 'public.event_outbox'::regclass"
        " AND attnum > 0 ORDER BY attnum",
    )
    assert outbox == [
        *("id", "event_domain", "event_type", "event_stream", "delivery_lane", "event_severity"),
        *("event_subject_table", "event_subject_ref", "canonical_address", "actor_ref", "source_system"),
        *("correlation_id", "payload_classification", "safe_payload", "occurred_at", "created_at"),
    ]
    triggers = "SELECT tgrelid::regclass::text, tgname::text FROM pg_catalog.pg_trigger WHERE NOT tgisinternal"
    assert dict(dieu45.execute(triggers)) == {
        "event_outbox": "trg_event_outbox_type_validate",
        "job_queue": "trg_job_queue_updated_at",
    }
    # information_schema counts every NOT NULL as a CHECK, which is why nothing here asks it.
    assert dieu45.execute(
        "SELECT count(*) FROM information_schema.table_constraints"
        " WHERE table_name = 'event_outbox' AND constraint_type = 'CHECK'"
    ) == [(21,)]


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("job_kind = ' '", "job_kind"),
        ("state = 'paused'", "state"),
        ("payload_json = '{\"token\": 1}'", "payload_safe"),
        ("attempts = -1", "attempts"),
        ("max_attempts = 0", "max_attempts"),
        ("priority = -1", "priority"),
        ("lease_owner = 'w1'", "lease"),
        ("lease_until = now()", "lease"),
        ("state = 'succeeded'", "finished"),
        ("actor = ' '", "actor"),
    ],
)
def test_the_checks_of_job_queue(dieu45: Database, change: str, constraint: str) -> None:
    phase2.Queue(dieu45.conn).add_job()
    with pytest.raises(errors.CheckViolation, match=f"job_queue_{constraint}_check"):
        dieu45.execute(f"UPDATE public.job_queue SET {change}")


def test_other_vocabularies_are_closed(dieu45: Database) -> None:
    queue = phase2.Queue(dieu45.conn)
    queue.add_executor("e1", 1)
    queue.add_letter()
    for statement in (
        "UPDATE public.queue_heartbeat SET executor_kind = 'MOT'",
        "UPDATE public.queue_heartbeat SET last_tick_status = 'fine'",
        "UPDATE public.queue_heartbeat SET ticks_total = -1",
        "UPDATE public.job_dead_letter SET triage_status = 'done'",
        "UPDATE public.job_dead_letter SET dead_letter_reason = 'tired'",
        "UPDATE public.job_dead_letter SET payload_json = '{\"body\": 1}'",
        "UPDATE public.iu_sql_event_route SET enabled = true, dry_run = false",
        "UPDATE public.event_outbox SET safe_payload = '{\"secret\": 1}'",
    ):
        with pytest.raises(errors.CheckViolation):
            dieu45.execute(statement)
    with pytest.raises(errors.ForeignKeyViolation, match="not registered"):
        dieu45.execute("UPDATE public.event_outbox SET event_type = 'iu.unheard_of'")


def test_the_five_aliases(dieu45: Database) -> None:
    aliases = "SELECT oid::regprocedure::text FROM pg_catalog.pg_proc WHERE proname ~ '^fn_iu_op_' ORDER BY 1"
    assert column(dieu45, aliases) == [
        "fn_iu_op_cleanup_dry_run(integer,text)",
        "fn_iu_op_cut(uuid,boolean,text,boolean)",
        "fn_iu_op_mark_file(text,text,jsonb,text,text,text,text,text)",
        "fn_iu_op_verify_cut(uuid,text)",
        "fn_iu_op_verify_mark(uuid,boolean,text,text,text)",
    ]
    mark = "SELECT public.fn_iu_op_mark_file('a/b', 'A', '{}', 'note', 'd1', 'owner', 'tester')"
    ((marked,),) = dieu45.execute(mark)
    for call, key, expected in (
        ("fn_iu_op_verify_mark(%s, true, 'd1')", "verified", True),
        ("fn_iu_op_cut(%s)", "would_cut", True),
        ("fn_iu_op_verify_cut(%s)", "verified", False),
        ("fn_iu_op_cut(%s, true)", "cut", True),
        ("fn_iu_op_verify_cut(%s)", "verified", True),
    ):
        ((answer,),) = dieu45.execute(f"SELECT public.{call}", [marked["unit_id"]])
        assert answer[key] is expected, call
    assert dieu45.execute("SELECT public.fn_iu_op_cleanup_dry_run()")[0][0]["would_clean"] == 0


def test_workflow_admin_owns_everything_and_no_caller_is_a_member(dieu45_full: Database) -> None:
    foreign = """
        SELECT o.name FROM (
            SELECT 'pg_catalog.pg_class'::regclass AS catalog, oid, relname::text, relowner, relnamespace FROM pg_class
            UNION ALL
            SELECT 'pg_catalog.pg_proc'::regclass, oid, proname::text, proowner, pronamespace FROM pg_proc
        ) AS o (catalog, oid, name, owner, schema)
        WHERE o.schema = 'public'::regnamespace AND o.owner <> 'workflow_admin'::regrole AND NOT EXISTS (
            SELECT FROM pg_depend AS d WHERE d.classid = o.catalog AND d.objid = o.oid AND d.deptype = 'e'
        )
    """
    assert dieu45_full.execute(foreign) == []
    members = "SELECT r FROM unnest(%s::text[]) AS r WHERE pg_has_role(r, 'workflow_admin', 'MEMBER')"
    assert dieu45_full.execute(members, [["operator", "worker", "reader"]]) == []
    roles = "SELECT rolcanlogin, rolsuper, rolbypassrls, rolpassword FROM pg_catalog.pg_authid WHERE rolname = ANY (%s)"
    names = ["workflow_admin", "operator", "worker", "reader"]
    assert dieu45_full.execute(roles, [names]) == [(True, False, False, None)] * 4
    schema = (
        "SELECT r, has_schema_privilege(r, 'public', 'USAGE'), has_schema_privilege(r, 'public', 'CREATE')"
        " FROM unnest(%s::text[]) AS r"
    )
    assert dieu45_full.execute(schema, [names]) == [(name, True, name == "workflow_admin") for name in names]


def test_two_databases_can_be_loaded_at_the_same_time(own_server: Callable[..., Server]) -> None:
    server = own_server()
    failures: list[Exception] = []
    barrier = threading.Barrier(2)

    def load(name: str) -> None:
        try:
            with psycopg.connect(server.dsn(), autocommit=True) as conn:
                conn.execute(f"CREATE DATABASE {name}".encode())
            with psycopg.connect(server.dsn(name), autocommit=True) as conn:
                barrier.wait(timeout=20)
                phase2.load_baseline(conn)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=load, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
