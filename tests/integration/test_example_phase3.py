"""Phase 3 of the governed system: its files, its apply upon Phase 2, the route dry run, and the heartbeat caller."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo
from ruamel.yaml import YAML

from reconciler import sandbox
from tests.integration import phase2
from tests.integration.phase2 import HEARTBEAT, STATE, SUBSTRATE, Queue
from tests.servers import PROJECT, Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Command

PHASE_3 = PROJECT / "examples" / "dieu45" / "phase3"
PROGRAM = PHASE_3 / "heartbeat_caller.py"
WORKER = "iu_outbound_default"
CALLER = "dieu45_heartbeat_caller"
ROUTE = "iu_version_applied_default"
PILOT_KIND = "queue.route.pilot_job_kind"

COUNTS = {
    "tables": "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'public'",
    "functions": "SELECT count(*) FROM pg_catalog.pg_proc WHERE pronamespace = 'public'::regnamespace",
    "fn_job_ and fn_queue_": "SELECT count(*) FROM pg_catalog.pg_proc WHERE pronamespace = 'public'::regnamespace"
    " AND proname ~ '^fn_(job|queue)_' AND prorettype <> 'trigger'::regtype",
    "keys": "SELECT count(*) FROM public.dot_config",
    "queue keys": "SELECT count(*) FROM public.dot_config WHERE key ~ '^queue\\.'",
    "heartbeats": "SELECT count(*) FROM public.queue_heartbeat",
    "jobs": "SELECT count(*) FROM public.job_queue",
    "events": "SELECT count(*) FROM public.event_outbox",
}
SHUT = "SELECT key, value, xmin::text FROM public.dot_config WHERE key = ANY (%s) ORDER BY key"


# --- the files --------------------------------------------------------------------------------------------------------


def test_what_phase_2_declares_stands_here_byte_for_byte() -> None:
    own = {"README.md", "governance.yaml", "gates.yaml"}
    before = {file.relative_to(STATE).as_posix(): file.read_bytes() for file in STATE.rglob("*") if file.is_file()}
    for name, content in before.items():
        if name not in own:
            copy = PHASE_3 / name
            assert copy.is_file(), f"copy state/{name} to examples/dieu45/phase3/{name}"
            assert copy.read_bytes() == content, f"examples/dieu45/phase3/{name} is not state/{name}"
    after = {file.relative_to(PHASE_3).as_posix() for file in PHASE_3.rglob("*") if file.is_file()}
    assert {name for name in after - set(before) if "__pycache__" not in name} == {
        "functions/fn_route_consumer_dry_run.sql",
        "heartbeat_caller.py",
        "phase3.yaml",
    }


def test_what_is_not_a_copy_differs_only_by_the_phase() -> None:
    yaml = YAML(typ="safe", pure=True)
    gates = phase2.declared("gates")
    gates["queue.runtime.phase"]["value"] = "phase3_route_pilot_dry_run"
    assert yaml.load(PHASE_3 / "gates.yaml") == {"gates": gates}

    governance = yaml.load(STATE / "governance.yaml")["governance"]
    governance["release"] = "phase3_route_pilot"
    assert yaml.load(PHASE_3 / "governance.yaml") == {"governance": governance}


# --- Phase 3 upon Phase 2 ---------------------------------------------------------------------------------------------


class Release(NamedTuple):
    """Phase 3 as the command applied it upon Phase 2, and what was there before."""

    database: Database
    before: dict[str, int]
    gates_before: list[tuple[Any, ...]]
    plan: dict[str, Any]
    text: str


def count(database: Database) -> dict[str, int]:
    return {name: database.execute(query)[0][0] for name, query in COUNTS.items()}


@pytest.fixture(scope="module")
def release(
    server: Server, new_name: Callable[[], str], called: Command, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    """The light baseline, Phase 2, Phase 3; what worker may read of the cursor is granted as the README says."""
    database = Database(server, new_name())
    files = tmp_path_factory.mktemp("plans")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
    phase2.load_baseline(database.conn)
    database.execute("DROP EXTENSION IF EXISTS pgcrypto")  # target sandbox has none

    def apply(state: Path, file: Path, *more: str) -> str:
        called("plan", "-t", "sandbox", "-s", state, "--dsn", database.dsn, "--out", file)
        plan = json.loads(file.read_text())
        hazards = sorted({hazard for change in plan["setup"] + plan["changes"] for hazard in change["hazards"]})
        accepted = [word for hazard in hazards for word in ("--accept", hazard)]
        claims = [one["address"] for one in plan["invariants"] if one["missing"] == "attestation"]
        accepted += [word for claim in claims for word in ("--attest", claim.partition(".")[2])]
        called("approve", file, "--as", "operator", "--reason", "a test", *accepted)
        return called("apply", file, "--dsn", database.dsn, *more).stdout

    apply(STATE, files / "phase2.plan", "--initialize")
    before, gates = count(database), database.execute(SHUT, [[SUBSTRATE, "queue.worker.enabled"]])
    text = apply(PHASE_3, files / "phase3.plan")
    database.execute("GRANT SELECT ON public.iu_route_worker_cursor TO worker")
    yield Release(database, before, gates, json.loads((files / "phase3.plan").read_text()), text)
    database.drop()


@pytest.mark.smoke
def test_the_plan_and_its_effects_are_the_predicted_ones(release: Release) -> None:
    assert [(change["actions"], change["address"]) for change in release.plan["changes"]] == [
        (["add"], "function.public.fn_route_consumer_dry_run(text, integer)"),
        (["add"], "gate.queue.heartbeat.caller_interval_sec"),
        (["add"], "gate.queue.route.pilot_enqueue_enabled"),
        (["add"], "gate.queue.route.pilot_job_kind"),
        (["change"], "gate.queue.runtime.phase"),
        (["add"], f"marker.{CALLER}"),
    ]
    # The ledger is there, the policy is the same; what Phase 3 judges beside Phase 2 is installed with it.
    assert {(change["kind"], change["before"]) for change in release.plan["setup"]} == {("check", None)}
    assert {change["address"] for change in release.plan["setup"]} == {
        "invariant.F03-no-phase3-event",
        "invariant.P3-caller-in-time",
        "invariant.P3-no-job-of-a-route",
        "invariant.P3-pilot-enqueues-nothing",
    }
    assert "Apply complete! 5 added, 1 changed, 0 removed." in release.text.splitlines()
    assert release.before["queue keys"] == 12
    after = count(release.database)
    assert {name: after[name] - number for name, number in release.before.items()} == {
        "tables": 0,
        "functions": 1,
        "fn_job_ and fn_queue_": 0,
        "keys": 3,
        "queue keys": 3,
        "heartbeats": 1,
        "jobs": 0,
        "events": 0,
    }
    assert after["fn_job_ and fn_queue_"] == 12
    assert release.database.execute("SELECT value FROM public.dot_config WHERE key = 'queue.runtime.phase'") == [
        ("phase3_route_pilot_dry_run",)
    ]


def test_substrate_and_worker_stay_shut_and_were_not_even_touched(release: Release) -> None:
    gates = release.database.execute(SHUT, [[SUBSTRATE, "queue.worker.enabled"]])
    assert gates == release.gates_before
    assert [value for _, value, _ in gates] == ["false", "false"]


@pytest.mark.smoke
def test_planned_again_phase_3_is_empty_and_phase_2_is_refused(release: Release, called: Command) -> None:
    common = ("-t", "sandbox", "--dsn", release.database.dsn)
    again = called("plan", "-s", PHASE_3, *common, "--detailed-exitcode")
    assert "No changes. The database matches the desired state." in again.stdout.splitlines()
    older = called("plan", "-s", STATE, *common, check=False)
    assert older.returncode == 4
    assert "would move back to 'phase2_governance'" in older.stderr
    drift = called("drift", "-s", PHASE_3, *common, "--fail-on", "stale_heartbeat", check=False)
    assert drift.returncode == 2
    assert re.findall(r"marker\.(\w+): stale_heartbeat", drift.stdout) == [CALLER, WORKER]


@pytest.mark.slow
def test_the_commands_of_the_readme(dieu45: Database) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (PHASE_3 / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    # The first block starts a sandbox; here the database is the test's own.
    assert blocks[0].startswith("RECONCILER_DSN=$(reconciler sandbox up ")
    dieu45.execute("DROP EXTENSION IF EXISTS pgcrypto")
    path = (str(Path(sys.executable).parent), str(sandbox.embedded_binaries()), os.environ["PATH"])
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RECONCILER_"))}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks[1:])],
        check=False,
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**own, "PATH": os.pathsep.join(path), "NO_COLOR": "1", "RECONCILER_DSN": dieu45.dsn},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for wanted in (
        "Plan: 5 to add, 1 to change, 0 to remove.",
        "Apply complete! 5 added, 1 changed, 0 removed.",
        "No changes. The database matches the desired state.",
        "exit code 4",
    ):
        assert wanted in lines, done.stdout
    assert re.search(
        r"^beat watched=\S+ evidence=old age=\d+s worker=untouched caller=ok:1,promoted$", done.stdout, re.MULTILINE
    )
    assert re.search(rf"{WORKER} *\| *0 \| t *\| stale", done.stdout)
    assert re.search(rf"{CALLER} *\| *1 \| f *\| fresh", done.stdout)


# --- the route dry run ------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(release: Release) -> Iterator[Queue]:
    """Phase 3 in a transaction that is rolled back."""
    with psycopg.connect(release.database.dsn) as conn:
        yield Queue(conn)
        conn.rollback()


def dry_run(queue: Queue, *arguments: object, by: str = "reader") -> dict[str, Any]:
    return queue.call("fn_route_consumer_dry_run", *(arguments or (ROUTE,)), by=by)


def add_event(queue: Queue, after: str, *, event_type: str = "iu.version_applied", event_id: str | None = None) -> str:
    """An event `after` (an interval) the cursor's position; its id."""
    return str(
        queue.value(
            "INSERT INTO public.event_outbox (id, event_domain, event_type, event_stream, event_subject_table,"
            " event_subject_ref, canonical_address, actor_ref, source_system, safe_payload, created_at)"
            " SELECT coalesce(%s::uuid, gen_random_uuid()), 'iu', %s, 'lifecycle', 'information_unit', 'u1', 'law/1',"
            " 'agent:editor', 'directus', '{\"version\": 2}', c.last_created_at + %s::interval"
            " FROM public.iu_route_worker_cursor AS c RETURNING id",
            *(event_id, event_type, after),
        )
    )


@pytest.mark.smoke
def test_the_dry_run_lists_the_backlog_in_its_order(queue: Queue) -> None:
    ids = [add_event(queue, f"{second} s") for second in (1, 2, 3, 4, 5, 6, 7)]
    add_event(queue, "1 s", event_type="iu.marked")
    answer = dry_run(queue, ROUTE, 3)
    assert set(answer) == {
        *("refused", "route_code", "event_domain", "job_kind", "substrate_enabled", "cursor", "backlog"),
        *("listed_count", "truncated", "would_enqueue"),
    }
    assert (answer["refused"], answer["route_code"], answer["event_domain"]) == (False, ROUTE, "iu")
    assert (answer["job_kind"], answer["substrate_enabled"]) == ("route.iu.version_applied", False)
    assert (answer["backlog"], answer["listed_count"], answer["truncated"]) == (7, 3, True)
    cursor = queue.record("iu_route_worker_cursor", "worker_name", WORKER)
    assert answer["cursor"] == {
        name: cursor[name] for name in ("worker_name", "last_created_at", "last_event_id", "last_run_at")
    }
    assert [one["idempotency_key"] for one in answer["would_enqueue"]] == [f"route:{ROUTE}:{one}" for one in ids[:3]]
    assert answer["would_enqueue"][0] == {
        "job_kind": "route.iu.version_applied",
        "idempotency_key": f"route:{ROUTE}:{ids[0]}",
        "source_ref": f"event_outbox:{ids[0]}",
        "target_ref": "law/1",
        "payload_json": {
            "event_id": ids[0],
            "event_type": "iu.version_applied",
            "subject_table": "information_unit",
            "subject_ref": "u1",
            "canonical_address": "law/1",
            "correlation_id": None,
        },
        "would_action": f"refused: {SUBSTRATE}=false",
    }
    whole = dry_run(queue, ROUTE)
    assert (whole["backlog"], whole["listed_count"], whole["truncated"]) == (7, 7, False)
    assert [one["source_ref"].partition(":")[2] for one in whole["would_enqueue"]] == ids
    assert dry_run(queue, ROUTE, None) == whole
    for nothing in (0, -5):
        answer = dry_run(queue, ROUTE, nothing)
        assert (answer["backlog"], answer["listed_count"], answer["truncated"]) == (7, 0, True)


@pytest.mark.smoke
def test_the_dry_run_writes_nothing_as_reader(release: Release) -> None:
    with psycopg.connect(release.database.dsn_as("reader")) as conn:
        answer = conn.execute("SELECT public.fn_route_consumer_dry_run(%s)", [ROUTE]).fetchall()[0][0]
        assert (answer["refused"], answer["backlog"]) == (False, 0)
        modes = "SELECT DISTINCT mode FROM pg_catalog.pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
        assert conn.execute(modes).fetchall() == [("AccessShareLock",)]
        assert conn.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]
    assert release.database.execute(
        "SELECT provolatile, prosecdef, proconfig FROM pg_catalog.pg_proc WHERE proname = 'fn_route_consumer_dry_run'"
    ) == [("s", False, ["search_path=pg_catalog, public, pg_temp"])]
    for role in ("worker", "operator"):
        with psycopg.connect(release.database.dsn_as(role)) as conn, pytest.raises(errors.InsufficientPrivilege):
            conn.execute("SELECT public.fn_route_consumer_dry_run(%s)", [ROUTE])


@pytest.mark.smoke
def test_the_refusals_of_the_dry_run_in_their_order(queue: Queue) -> None:
    queue.conn.execute("DELETE FROM public.iu_route_worker_cursor")
    for unknown in ("nowhere", "", None):
        assert dry_run(queue, unknown) == {"refused": True, "reason": "route_not_found"}
    update = "UPDATE public.iu_sql_event_route SET enabled = %s, dry_run = %s WHERE route_code = %s"
    queue.conn.execute(update, [False, False, ROUTE])
    assert dry_run(queue) == {"refused": True, "reason": "route_not_dry_run"}
    queue.conn.execute(update, [True, True, ROUTE])
    assert dry_run(queue) == {"refused": True, "reason": "cursor_not_found"}


def test_the_cursor_is_a_position_between_two_keys(queue: Queue) -> None:
    queue.conn.execute(
        "UPDATE public.iu_route_worker_cursor SET last_event_id = 'a0000000-0000-0000-0000-000000000000'"
    )
    after = add_event(queue, "0 s", event_id="f0000000-0000-0000-0000-000000000000")
    add_event(queue, "0 s", event_id="10000000-0000-0000-0000-000000000000")
    add_event(queue, "-1 s")  # committed late: behind the cursor, and the README says so
    assert [one["payload_json"]["event_id"] for one in dry_run(queue)["would_enqueue"]] == [after]
    # A second cursor that never moved counts everything; of several the one that is furthest behind decides.
    queue.conn.execute("INSERT INTO public.iu_route_worker_cursor (worker_name, event_domain) VALUES ('another', 'iu')")
    answer = dry_run(queue)
    total = "SELECT count(*) FROM public.event_outbox WHERE event_type = 'iu.version_applied'"
    assert (answer["cursor"]["worker_name"], answer["backlog"]) == ("another", queue.value(total))


def test_what_stands_in_the_way_comes_in_its_order(queue: Queue) -> None:
    event = add_event(queue, "1 s")

    def action() -> str:
        (one,) = dry_run(queue)["would_enqueue"]
        return one["would_action"]

    queue.gate(PILOT_KIND, "route.iu.cut")
    queue.conn.execute("UPDATE public.iu_sql_event_route SET enabled = false, target_kind = 'digest'")
    for value in ("false", None, "on", "1", "garbage"):
        queue.gate(SUBSTRATE, value)
        assert action() == f"refused: {SUBSTRATE}=false"
    queue.gate(SUBSTRATE, "true")
    assert dry_run(queue)["substrate_enabled"] is True
    assert action() == f"refused: {PILOT_KIND}=route.iu.cut"
    queue.gate(PILOT_KIND, None)
    assert action() == f"refused: {PILOT_KIND}="
    queue.gate(PILOT_KIND, "route.iu.version_applied")
    assert action() == "refused: route_disabled"
    queue.conn.execute("UPDATE public.iu_sql_event_route SET enabled = true")
    assert action() == "refused: target_kind=digest"
    queue.conn.execute("UPDATE public.iu_sql_event_route SET target_kind = 'job'")
    key = f"route:{ROUTE}:{event}"
    assert action() == f"enqueue: job_kind=route.iu.version_applied idempotency_key={key}"
    # What is listed is what the queue takes, and then it is there already.
    (one,) = dry_run(queue)["would_enqueue"]
    job = queue.call(
        "fn_job_enqueue",
        p_actor="tester",
        **{f"p_{name}": one[name] for name in ("job_kind", "idempotency_key", "payload_json", "source_ref")},
    )
    assert job["refused"] is False
    assert action() == f"deduplicate: job_id={job['job_id']}"
    queue.conn.execute("UPDATE public.job_queue SET state = 'succeeded', finished_at = now()")
    assert action().startswith("enqueue: ")


# --- the heartbeat caller ---------------------------------------------------------------------------------------------


@pytest.fixture
def system(release: Release, server: Server, new_name: Callable[[], str]) -> Iterator[Queue]:
    """A copy of Phase 3 of the test's own: what the caller does is committed."""
    release.database.conn.close()  # a template has no sessions
    database = Database(server, new_name())
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
        sql.Identifier(database.name), sql.Identifier(release.database.name)
    )
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(create + sql.SQL(" STRATEGY FILE_COPY" if server.major >= 15 else ""))
    yield Queue(database.conn)
    database.drop()


def dsn_of(queue: Queue) -> str:
    return make_conninfo(queue.conn.info.dsn, password=queue.conn.info.password)


def command(dsn: str, *options: str) -> list[str]:
    return [sys.executable, str(PROGRAM), "--dsn", dsn, *options]


def once(queue: Queue, *options: str, code: int = 0) -> str:
    """One beat; its line, or what it says when it fails."""
    done = subprocess.run(
        command(dsn_of(queue), "--once", *options), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout or done.stderr).strip()


@contextmanager
def running(dsn: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The caller as a service; killed at the end if it did not end before."""
    with subprocess.Popen(command(dsn, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], number: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(number)]


def worker_runs(queue: Queue, ago: str = "0 s") -> None:
    """The route worker leaves its trace, `ago` (an interval) in the past."""
    queue.conn.execute("UPDATE public.iu_route_worker_cursor SET last_run_at = clock_timestamp() - %s::interval", [ago])


def row_of(queue: Queue, name: str) -> tuple[Any, ...]:
    """A heartbeat row to the byte, with its version."""
    query = "SELECT ctid::text, xmin::text, h::text FROM public.queue_heartbeat AS h WHERE executor_name = %s"
    return queue.rows(query, name)[0]


def executor(queue: Queue, name: str) -> dict[str, Any]:
    return queue.record("queue_heartbeat", "executor_name", name)


def health(queue: Queue, name: str) -> tuple[Any, ...]:
    query = "SELECT passive, status_hint FROM public.v_queue_health WHERE executor_name = %s"
    return queue.rows(query, name)[0]


@pytest.mark.smoke
def test_while_the_cursor_is_frozen_the_worker_stays_passive_and_the_caller_is_fresh(system: Queue) -> None:
    before = row_of(system, WORKER)
    assert health(system, CALLER) == (True, "stale")
    line = once(system)
    assert re.fullmatch(rf"beat watched={WORKER} evidence=old age=\d+s worker=untouched caller=ok:1,promoted", line)
    assert row_of(system, WORKER) == before
    assert health(system, WORKER) == (True, "stale")
    assert health(system, CALLER) == (False, "fresh")
    own = executor(system, CALLER)
    assert (own["executor_kind"], own["last_tick_status"], own["ticks_total"]) == ("external_worker", "ok", 1)
    assert (own["metadata"]["watched"], own["metadata"]["evidence"]) == (WORKER, "old")
    check = system.call("fn_queue_stale_check")
    assert (check["stale_count"], check["fresh_count"]) == (1, 1)


@pytest.mark.smoke
def test_when_the_cursor_moves_the_worker_is_promoted(system: Queue) -> None:
    worker_runs(system, "20 s")
    assert re.fullmatch(
        rf"beat watched={WORKER} evidence=recent age=\d+s worker=ok:1,promoted caller=ok:1,promoted", once(system)
    )
    worker = executor(system, WORKER)
    assert (worker["ticks_total"], worker["last_tick_status"]) == (1, "ok")
    assert worker["metadata"]["evidence"] == "iu_route_worker_cursor.last_run_at"
    run = system.record("iu_route_worker_cursor", "worker_name", WORKER)["last_run_at"]
    assert worker["metadata"]["observed_at"] == run
    assert health(system, WORKER) == (False, "fresh")
    assert system.call("fn_queue_stale_check")["stale_count"] == 0
    assert system.value("SELECT max(executors_stale) FROM public.v_queue_health") == 0
    assert once(system).endswith(" worker=ok:2 caller=ok:2")

    # Registered again, nothing is overwritten: neither the ticking worker nor the ticking caller.
    rows = row_of(system, WORKER), row_of(system, CALLER)
    for name, kind in ((WORKER, "PG_worker"), (CALLER, "external_worker")):
        answer = system.call("fn_queue_heartbeat_register_passive", name, kind, "2026-05-22 11:31:41+00", "tester")
        assert answer == {"refused": True, "reason": "already_registered"}
    assert (row_of(system, WORKER), row_of(system, CALLER)) == rows


def test_what_is_no_evidence_is_none(system: Queue) -> None:
    before = row_of(system, WORKER)
    worker_runs(system, "301 s")
    assert re.search(r" evidence=old age=\d+s worker=untouched caller=ok:1,promoted$", once(system))
    worker_runs(system, "-1 hour")
    assert re.search(r" evidence=future age=-\d+s worker=untouched caller=warn:2", once(system))
    system.conn.execute("UPDATE public.iu_route_worker_cursor SET last_run_at = NULL")
    assert " evidence=absent worker=untouched caller=warn:3" in once(system)
    system.conn.execute("DELETE FROM public.iu_route_worker_cursor")
    assert " evidence=absent worker=untouched caller=warn:4" in once(system)
    assert row_of(system, WORKER) == before
    assert once(system, "--watch", "nobody").endswith(" evidence=absent worker=untouched caller=warn:5")
    assert system.rows("SELECT FROM public.queue_heartbeat WHERE executor_name = 'nobody'") == []


def test_a_worker_out_of_reach_does_not_silence_the_caller(system: Queue) -> None:
    worker_runs(system)
    assert once(system, "--kind", "Agent").endswith(" worker=refused:executor_kind_mismatch caller=warn:1,promoted")
    system.conn.execute("REVOKE SELECT ON public.iu_route_worker_cursor FROM worker")
    assert once(system).endswith(" evidence=not_readable worker=untouched caller=warn:2")
    system.conn.execute("GRANT SELECT ON public.iu_route_worker_cursor TO worker")
    with psycopg.connect(dsn_of(system)) as other:
        other.execute("SELECT FROM public.queue_heartbeat WHERE executor_name = %s FOR UPDATE", [WORKER])
        assert once(system).endswith(" evidence=locked worker=untouched caller=warn:3")
    assert executor(system, WORKER)["ticks_total"] == 0
    # With the protocol off nobody beats, and the exit code says so.
    system.gate(HEARTBEAT, "false")
    assert once(system, code=1).endswith(f" worker=refused:{HEARTBEAT}=false caller=refused:{HEARTBEAT}=false")


def test_an_attestation_is_written_down_as_one(system: Queue) -> None:
    assert once(system, "--attest", "duty officer") == (
        f"beat watched={WORKER} evidence=operator_attestation worker=warn:1,promoted caller=warn:1,promoted"
    )
    worker = executor(system, WORKER)
    assert worker["last_tick_status"] == "warn"
    assert worker["metadata"]["evidence"] == "operator_attestation"
    assert (worker["metadata"]["attested_by"], worker["metadata"]["observed_at"]) == ("duty officer", None)
    assert executor(system, CALLER)["metadata"]["attested_by"] == "duty officer"
    # Observed again, the word of before is gone.
    worker_runs(system)
    once(system)
    metadata = executor(system, WORKER)["metadata"]
    assert (metadata["evidence"], metadata["attested_by"]) == ("iu_route_worker_cursor.last_run_at", None)
    assert executor(system, CALLER)["last_tick_status"] == "ok"


def test_the_death_of_the_caller_shows(system: Queue) -> None:
    once(system)
    seen: list[tuple[int, str, bool]] = []
    for age in (0, 301, 601):  # the threshold is 300 s; the rows are aged, nobody waits
        system.conn.execute(
            "UPDATE public.queue_heartbeat SET last_tick_at = clock_timestamp() - %s * interval '1 second'"
            " WHERE executor_name = %s",
            [age, CALLER],
        )
        stale = {one["executor_name"] for one in system.call("fn_queue_stale_check")["executors"]}
        seen.append((age, health(system, CALLER)[1], CALLER in stale))
    assert seen == [(0, "fresh", False), (301, "warning", True), (601, "stale", True)]
    assert system.value("SELECT max(executors_stale) FROM public.v_queue_health") == 2


def test_what_the_caller_refuses_to_do(system: Queue) -> None:
    assert "is a superuser" in once(system, "--user", "postgres", code=1)
    assert "say who attests" in once(system, "--attest", " ", code=2)
    assert "cannot watch itself" in once(system, "--watch", CALLER, code=2)
    assert once(system, "--user", "operator", code=1).startswith("Error: permission denied for function")
    assert once(system, "--user", "nobody_of_that_name", code=1).startswith("Error: connection ")


def test_it_beats_at_least_three_times_per_threshold_and_ends_on_sigterm(system: Queue) -> None:
    system.gate("queue.heartbeat.stale_threshold_seconds", "1")
    with running(dsn_of(system)) as process:
        begun = time.monotonic()
        assert [line.partition(" caller=")[2] for line in lines(process, 3)] == ["ok:1,promoted", "ok:2", "ok:3"]
        assert time.monotonic() - begun < 30  # the configured interval is 60 s
        sessions = "SELECT state, usename::text FROM pg_catalog.pg_stat_activity WHERE application_name = %s"
        assert set(system.rows(sessions, "heartbeat caller")) <= {("idle", "worker"), ("active", "worker")}
        process.send_signal(signal.SIGTERM)
        _, trouble = process.communicate(timeout=60)
    assert (process.returncode, trouble) == (0, "stopped\n")


def test_one_statement_for_each_beat_and_a_restart_is_waited_for(own_server: Callable[..., Server]) -> None:
    server = own_server(log_statement="all", log_line_prefix="%a|", log_parameter_max_length="-1")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        phase2.load_baseline(conn)
        phase2.install(conn)
        conn.execute("GRANT SELECT ON public.iu_route_worker_cursor TO worker")
    with running(server.dsn(), "--interval", "0.05") as process:
        assert [line.partition(" caller=")[2] for line in lines(process, 3)] == ["ok:1", "ok:2", "ok:3"]
        port = int(server.port)
        server.cluster.stop()
        time.sleep(0.2)
        server.cluster.start(port)
        for line in iter(process.stdout.readline, ""):  # pyright: ignore[reportOptionalMemberAccess]
            if int(line.rpartition(":")[2]) > 5:
                break
        process.send_signal(signal.SIGTERM)
        _, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    assert trouble.startswith("no beat, next try in 0.5 s: ")
    assert trouble.endswith("stopped\n")
    log = server.cluster.log.read_text()
    statements = re.findall(r"^heartbeat caller\|LOG:  (?:statement|execute [^:]*):\s+(\S+)", log, re.MULTILINE)
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        ticks = Queue(conn).value("SELECT ticks_total FROM public.queue_heartbeat WHERE executor_name = %s", CALLER)
    # Whatever was under way when the server stopped was told to nobody.
    assert set(statements) == {"WITH"}
    assert ticks <= len(statements) <= ticks + 1
    parameters = re.findall(r"^heartbeat caller\|DETAIL:  [Pp]arameters: (.*)$", log, re.MULTILINE)
    assert parameters
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d|\d{9}", "".join(parameters)), "the caller sends no times"
