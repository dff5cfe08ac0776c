"""The main job end to end, by the command: Điều 45 Phase 2 planned, approved, applied, and watched afterwards."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.model import digest
from tests.integration import governed
from tests.servers import PROJECT

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.conftest import Command
    from tests.servers import Database

HAZARDS = ("arms_gate", "grants_execute", "moves_from_safe", "security_definer")
PLAN_LINE = "Plan: 10 to add, 1 to change, 0 to remove."
NO_CHANGES = "No changes. The database matches the desired state."
MARKER = "SELECT t.xmin::text, t::text FROM public.queue_heartbeat t WHERE executor_name = 'iu_outbound_default'"

COUNTS = {
    "functions": "SELECT count(*) FROM pg_catalog.pg_proc WHERE pronamespace = 'public'::regnamespace",
    "keys": "SELECT count(*) FROM public.dot_config",
    "queue keys": "SELECT count(*) FROM public.dot_config WHERE key LIKE 'queue.%'",
    "heartbeats": "SELECT count(*) FROM public.queue_heartbeat",
    "tables": "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'public'",
    "views": "SELECT count(*) FROM pg_catalog.pg_views WHERE schemaname = 'public'",
    "events": "SELECT count(*) FROM public.event_outbox",
    "jobs": "SELECT count(*) FROM public.job_queue",
}


class Job:
    """The commands of the main job on one database; in this process, or as a user types them when `cli` is given."""

    def __init__(self, db: Database, folder: Path, cli: Command | None = None) -> None:
        self.cli = cli
        self.db = db
        self.folder = folder
        self.state = PROJECT / "state"
        self.file = folder / "phase2.plan"
        # production is the database directus with pgcrypto; the embedded server has none, and no test owns that name.
        self.target = "sandbox"
        if db.execute("SELECT 1 FROM pg_extension WHERE extname = 'pgcrypto'"):
            self.edit("governance.yaml", "  targets:\n", f"  targets:\n    here: {{database: {db.name}}}\n")
            self.target = "here"

    def edit(self, file: str, old: str, new: str) -> None:
        """Change a copy of the state."""
        if self.state == PROJECT / "state":
            self.state = self.folder / "state"
            shutil.copytree(PROJECT / "state", self.state)
        text = (self.state / file).read_text()
        assert old in text
        (self.state / file).write_text(text.replace(old, new))

    def run(self, command: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        if self.cli is not None:
            done = self.cli(command, *arguments, check=False, env={"RECONCILER_DSN": self.db.dsn})
        else:
            done = governed.command(command, *arguments, dsn=self.db.dsn)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def plan(self, *more: str | Path, code: int = 0) -> str:
        return self.run("plan", "-s", self.state, "-t", self.target, *more, code=code).stdout

    def approve(self, *hazards: str) -> None:
        accept = [word for hazard in hazards or HAZARDS for word in ("--accept", hazard)]
        self.run("approve", self.file, "--as", "operator", "--reason", "Phase 2", *accept, *governed.attests(self.file))

    def apply(self, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("apply", self.file, *more, code=code)

    def drift(self, *more: str, code: int = 0) -> str:
        return self.run("drift", "-s", self.state, "-t", self.target, *more, code=code).stdout

    def report(self, *, code: int = 0) -> dict[str, Any]:
        return json.loads(self.drift("--format", "json", code=code))

    def phase2(self) -> subprocess.CompletedProcess[str]:
        """Plan, approve, apply."""
        self.plan("--out", self.file)
        self.approve()
        return self.apply("--initialize")

    def counts(self) -> dict[str, int]:
        return {name: self.db.execute(query)[0][0] for name, query in COUNTS.items()}


@pytest.fixture
def job(dieu45: Database, tmp_path: Path) -> Job:
    return Job(dieu45, tmp_path)


@pytest.fixture(scope="module")
def applied(dieu45_shared: Database, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Phase 2 has been applied; whoever breaks something mends it."""
    job = Job(dieu45_shared, tmp_path_factory.mktemp("applied"))
    job.phase2()
    return job


@pytest.mark.smoke
def test_the_main_job_at_full_size(cli: Command, dieu45_full: Database, tmp_path: Path) -> None:
    job = Job(dieu45_full, tmp_path, cli)
    before = job.counts()
    assert (before["functions"], before["keys"], before["queue keys"], before["heartbeats"]) == (515, 94, 8, 0)
    assert (before["tables"], before["views"], before["events"]) == (271, 55, 133_784)
    untouched = dieu45_full.execute(
        "SELECT md5(string_agg(t.xmin::text || t::text, '' ORDER BY id)) FROM public.event_outbox t"
    )
    cursor = dieu45_full.execute("SELECT xmin::text, t::text FROM public.iu_route_worker_cursor t ORDER BY 2")

    assert PLAN_LINE in job.plan("--out", job.file).splitlines()
    job.approve()
    done = job.apply("--initialize")
    assert "Apply complete! 10 added, 1 changed, 0 removed." in done.stdout.splitlines()

    after = job.counts()
    assert after == before | {"functions": 520, "keys": 98, "queue keys": 12, "heartbeats": 1}
    assert NO_CHANGES in job.plan("--detailed-exitcode").splitlines()
    assert "No drift at " in job.drift()
    ((stale,),) = dieu45_full.execute("SELECT public.fn_queue_stale_check()")
    assert stale["stale_count"] == 1
    assert (
        dieu45_full.execute(
            "SELECT md5(string_agg(t.xmin::text || t::text, '' ORDER BY id)) FROM public.event_outbox t"
        )
        == untouched
    )
    assert dieu45_full.execute("SELECT xmin::text, t::text FROM public.iu_route_worker_cursor t ORDER BY 2") == cursor


def test_what_the_plan_says(job: Job) -> None:
    before = governed.image(job.db)
    text = job.plan()
    lines = text.splitlines()
    assert PLAN_LINE in lines
    assert "undeclared" not in text
    setup, changes = lines.index("Setup:"), lines.index("Changes:")
    assert setup < changes
    inside = "\n".join(lines[setup:changes])
    assert "ledger.reconciler" in inside
    assert "CREATE SCHEMA reconciler" in inside
    assert "CREATE TABLE reconciler.entry" in inside
    assert "reconciler" not in "\n".join(
        line for line in lines[changes:] if line.lstrip().startswith(("+ ", "~ ", "- "))
    )
    signs = [match[1] for line in lines[changes:] if (match := re.match(r"  (\+|~|-|-/\+|\.) [a-z]+\.", line))]
    assert (signs.count("+"), signs.count("~"), len(signs)) == (10, 1, 11)
    # Functions before what needs them.
    order = [line.split()[1].partition(".")[0] for line in lines[changes:] if re.match(r"  [+~] [a-z]+\.", line)]
    assert order == ["function"] * 5 + ["gate"] * 5 + ["marker"]
    assert " 0 violated, 0 attested, 0 not judged, " in text
    assert f"Hazards to accept: {', '.join(HAZARDS)}." in lines
    assert "Not compared by this version:" in text
    job.plan("--detailed-exitcode", code=2)
    assert governed.image(job.db) == before


def test_what_the_plan_says_as_json(job: Job) -> None:
    plan = json.loads(job.plan("--format", "json"))
    assert (plan["format_version"], plan["outcome"]) == ("1.0", "changes")
    assert plan["summary"] == {"add": 10, "change": 1, "remove": 0, "forget": 0, "drift": 0, "findings": 0}
    assert [change["address"] for change in plan["setup"]] == ["ledger.reconciler", "policy.dieu45", "scope.dieu45"]
    assert plan["findings"] == []
    assert isinstance(plan["target"]["system_identifier"], str)
    assert plan["drift"] == []
    (flip,) = [change for change in plan["changes"] if change["actions"] == ["change"]]
    assert (flip["address"], flip["before"]["value"], flip["after"]["value"]) == (
        "gate.queue.heartbeat.enabled",
        "false",
        "true",
    )
    assert flip["hazards"] == ["arms_gate", "moves_from_safe"]
    assert all(change["statements"] for change in plan["changes"])


def test_two_plans_of_the_same_state_have_one_digest(job: Job) -> None:
    first = json.loads(job.plan("--format", "json"))
    job.edit("gates.yaml", "gates:\n", "\n# A comment more.\ngates:\n")
    second = json.loads(job.plan("--format", "json"))
    assert first["effect_digest"] == second["effect_digest"]
    assert first["state"]["source_digest"] != second["state"]["source_digest"]
    job.edit("gates.yaml", 'value: "10"', 'value: "11"')
    assert json.loads(job.plan("--format", "json"))["effect_digest"] != first["effect_digest"]


def test_apply_plan_again_and_apply_again(job: Job) -> None:
    done = job.phase2()
    assert "Applied, but" not in done.stdout
    (genesis,) = [line for line in done.stdout.splitlines() if line.startswith("This is the first entry")]
    entries = job.db.execute("SELECT name, number, hash FROM reconciler.entry")
    assert [(name, number) for name, number, _ in entries] == [("dieu45", 1)]
    assert entries[0][2] in genesis

    again = json.loads(job.plan("--format", "json", "--detailed-exitcode"))
    assert (again["outcome"], again["changes"], again["setup"]) == ("no_changes", [], [])
    assert NO_CHANGES in job.plan("--out", job.folder / "empty.plan").splitlines()

    before = governed.image(job.db)
    for more in ((), ("--initialize",)):
        refused = job.apply(*more, code=4)
        assert refused.stdout == ""
        assert refused.stderr.splitlines()[-2:] != []
    assert "used before" in job.apply(code=4).stderr
    # A new approval of the same plan does not help: what it was for is there.
    job.approve()
    assert "stale" in job.apply(code=4).stderr
    assert governed.image(job.db) == before

    # The plan of an empty change applies without an approval, and writes nothing.
    assert NO_CHANGES in job.run("apply", job.folder / "empty.plan").stdout.splitlines()
    assert governed.image(job.db) == before


def test_a_ledger_named_in_the_files(applied: Job, tmp_path: Path) -> None:
    job = Job(applied.db, tmp_path)
    ((genesis,),) = job.db.execute("SELECT hash FROM reconciler.entry")
    job.edit("governance.yaml", "    sandbox:\n", f"    sandbox:\n      ledger: {genesis}\n")
    if job.target == "here":
        job.edit("governance.yaml", f"{{database: {job.db.name}}}", f"{{database: {job.db.name}, ledger: {genesis}}}")
    assert NO_CHANGES in job.plan()
    assert "No drift" in job.drift()


@pytest.mark.parametrize("where", ["change", "setup"])
def test_a_statement_added_to_an_approved_plan_is_refused(job: Job, where: str) -> None:
    job.plan("--out", job.file)
    job.approve()
    document = json.loads(job.file.read_text())
    document.pop("checksum")
    part = document["changes" if where == "change" else "setup"][0]
    part["statements"].append({"text": "ALTER ROLE operator SUPERUSER", "role": None})
    text = json.dumps({**document, "checksum": digest(document)}, indent=2, sort_keys=True, ensure_ascii=False)
    job.file.write_text(text + "\n")
    before = governed.image(job.db)
    refused = job.apply("--initialize", code=4)
    assert part["address"] in refused.stderr
    assert governed.image(job.db) == before
    assert job.db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'operator'") == [(False,)]


def test_a_byte_changed_in_a_plan_is_an_error(job: Job) -> None:
    job.plan("--out", job.file)
    job.approve()
    data = job.file.read_bytes()
    before = governed.image(job.db)
    for damaged in (
        data.replace(b'"300"', b'"301"', 1),
        data + b"\n",
        data[:-1],
        data.replace(b"  ", b" ", 1),
        b"",
        b"{}",
    ):
        assert damaged != data
        job.file.write_bytes(damaged)
        assert job.apply("--initialize", code=1).stdout == ""
    assert governed.image(job.db) == before
    job.file.write_bytes(data)
    job.apply("--initialize")


def test_the_marker_after_a_real_tick_is_the_workers(job: Job) -> None:
    job.phase2()
    ((registered,),) = job.db.execute("SELECT ticks_total FROM public.queue_heartbeat")
    assert registered == 0
    found = job.drift("--fail-on", "stale_heartbeat", code=2)
    assert "marker.iu_outbound_default: stale_heartbeat" in found
    job.db.execute(
        "SELECT public.fn_queue_heartbeat_tick(p_executor_name => 'iu_outbound_default',"
        " p_executor_kind => 'PG_worker', p_status => 'ok')"
    )
    row = job.db.execute(MARKER)
    ((ticks,),) = job.db.execute("SELECT ticks_total FROM public.queue_heartbeat")
    assert ticks == 1
    assert NO_CHANGES in job.plan("--detailed-exitcode").splitlines()
    assert "No drift" in job.drift("--fail-on", "stale_heartbeat,marker_differs")
    # Another change does not touch it either.
    job.edit("gates.yaml", 'value: "10"', 'value: "11"')
    job.plan("--out", job.file)
    for old in job.folder.glob("*.approval.json"):
        old.unlink()
    job.run("approve", job.file, "--as", "operator", "--reason", "slower", *governed.attests(job.file))
    job.apply()
    assert job.db.execute(MARKER) == row


def test_a_passive_marker_changed_by_hand_is_a_finding(job: Job) -> None:
    job.phase2()
    job.db.execute("UPDATE public.queue_heartbeat SET last_tick_status = 'ok'")
    assert "marker.iu_outbound_default: marker_differs" in job.drift()
    assert NO_CHANGES in job.plan()
    job.drift("--fail-on", "marker_differs", code=2)
    job.db.execute("DELETE FROM public.queue_heartbeat")
    assert [moved["address"] for moved in job.report(code=2)["drift"]] == ["marker.iu_outbound_default"]
    assert "Plan: 1 to add, 0 to change, 0 to remove." in job.plan()


@pytest.mark.parametrize(
    ("address", "break_", "mend"),
    [
        (
            "gate.queue.lease.duration_sec",
            "UPDATE public.dot_config SET value = '3600' WHERE key = 'queue.lease.duration_sec'",
            "UPDATE public.dot_config SET value = '300' WHERE key = 'queue.lease.duration_sec'",
        ),
        (
            "gate.queue.dlq.replay_enabled",
            "DELETE FROM public.dot_config WHERE key = 'queue.dlq.replay_enabled'",
            "INSERT INTO public.dot_config (key, value) VALUES ('queue.dlq.replay_enabled', 'false')",
        ),
        (
            "function.public.fn_job_ack(uuid, text, integer)",
            "GRANT EXECUTE ON FUNCTION public.fn_job_ack(uuid, text, integer) TO PUBLIC",
            "REVOKE EXECUTE ON FUNCTION public.fn_job_ack(uuid, text, integer) FROM PUBLIC",
        ),
        (
            "function.public.fn_job_reap_stale_leases_apply(text, integer)",
            "ALTER FUNCTION public.fn_job_reap_stale_leases_apply(text, integer) SECURITY INVOKER",
            "ALTER FUNCTION public.fn_job_reap_stale_leases_apply(text, integer) SECURITY DEFINER",
        ),
    ],
    ids=["gate", "gate gone", "grant", "security"],
)
def test_drift_comes_and_goes(applied: Job, address: str, break_: str, mend: str) -> None:
    assert "No drift" in applied.drift()
    applied.db.execute(break_)
    report = applied.report(code=2)
    assert report["outcome"] == "drift"
    assert ([moved["address"] for moved in report["drift"]], report["pending"]) == ([address], [])
    shown = applied.drift(code=2)
    assert f" {address}  (changed since the last apply)" in shown
    assert "Drift: 1 object changed, 0 pending." in shown.splitlines()
    plan = applied.plan()
    assert "Note: objects have changed outside of reconciler since the last apply:" in plan.splitlines()
    assert "overwrites_drift" in plan
    applied.db.execute(mend)
    assert "No drift" in applied.drift()
    assert NO_CHANGES in applied.plan()


def test_drift_is_put_back_by_an_apply(job: Job) -> None:
    job.phase2()
    job.db.execute("UPDATE public.dot_config SET value = '3600' WHERE key = 'queue.lease.duration_sec'")
    job.db.execute("ALTER FUNCTION public.fn_job_ack(uuid, text, integer) RESET search_path")
    job.plan("--out", job.file)
    for old in job.folder.glob("*.approval.json"):
        old.unlink()
    refused = job.run("approve", job.file, "--as", "operator", "--reason", "back", *governed.attests(job.file), code=4)
    assert "overwrites_drift" in refused.stderr
    job.approve("overwrites_drift")
    job.apply()
    assert NO_CHANGES in job.plan()
    assert "No drift" in job.drift()
    assert job.db.execute("SELECT count(*) FROM reconciler.entry") == [(2,)]


def test_pending_is_not_drift(job: Job) -> None:
    before = job.report()
    assert (len(before["drift"]), len(before["pending"]), before["last_applied"]) == (0, 11, None)
    job.phase2()
    job.edit("gates.yaml", 'value: "10"', 'value: "11"')
    report = job.report()
    assert ([moved["address"] for moved in report["pending"]], report["drift"]) == (
        ["gate.queue.retry.backoff_base_sec"],
        [],
    )
    assert "Pending (the files are not what was last applied):" in job.drift().splitlines()
    # Both at once, and the same gate moved by hand to a third value.
    job.db.execute("UPDATE public.dot_config SET value = '12' WHERE key = 'queue.retry.backoff_base_sec'")
    both = job.report(code=2)
    assert [moved["address"] for moved in both["drift"]] == ["gate.queue.retry.backoff_base_sec"]
    assert (both["drift"][0]["before"]["value"], both["drift"][0]["after"]["value"]) == ("10", "12")
    assert (both["pending"][0]["before"]["value"], both["pending"][0]["after"]["value"]) == ("10", "11")


def test_an_undeclared_object_is_a_finding_and_fails_only_when_asked(job: Job) -> None:
    job.phase2()
    job.db.execute("INSERT INTO public.dot_config (key, value) VALUES ('queue.new', '1'), ('queueXnew', '1')")
    job.db.execute("CREATE FUNCTION public.fn_job_new() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    job.db.execute("CREATE FUNCTION public.fn_jobXnew() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    report = job.report()
    found = [finding["address"] for finding in report["findings"] if finding["code"] == "undeclared"]
    assert found == ["function.public.fn_job_new()", "gate.queue.new"]
    job.drift("--fail-on", "undeclared", code=2)
    assert NO_CHANGES in job.plan("--detailed-exitcode")


def test_a_line_taken_out_of_the_files_is_forgotten_by_approval_only(job: Job) -> None:
    """Protection outlives its line: nothing is dropped, and nobody stops watching without a yes."""
    job.phase2()
    job.edit("gates.yaml", "  queue.notify.enabled:\n", "  # queue.notify.enabled:\n")
    text = (job.state / "gates.yaml").read_text()
    start = text.index("  # queue.notify.enabled:")
    (job.state / "gates.yaml").write_text(text[:start] + text[text.index("  # --- leases and retries") :])
    plan = job.plan("--out", job.file)
    assert "Plan: 0 to add, 0 to change, 0 to remove, 1 to forget." in plan.splitlines()
    for old in job.folder.glob("*.approval.json"):
        old.unlink()
    job.run("approve", job.file, "--as", "operator", "--reason", "no", *governed.attests(job.file), code=4)
    row = job.db.execute("SELECT xmin::text, value FROM public.dot_config WHERE key = 'queue.notify.enabled'")
    job.approve("forgets")
    job.apply()
    assert job.db.execute("SELECT xmin::text, value FROM public.dot_config WHERE key = 'queue.notify.enabled'") == row
    assert "gate.queue.notify.enabled: undeclared" in job.plan()


@pytest.mark.parametrize(
    ("by_hand", "said"),
    [
        (
            "UPDATE public.dot_config SET value = 'maybe' WHERE key = 'queue.heartbeat.enabled'",
            ["gate.queue.heartbeat.enabled", "'maybe'", "`from` allows only 'false'"],
        ),
        (
            "INSERT INTO public.dot_config (key, value) VALUES ('queue.runtime.phase', 'phase3_route_pilot_dry_run')",
            ["gate.queue.runtime.phase", "never moves back"],
        ),
        (
            "INSERT INTO public.dot_config (key, value) VALUES ('queue.runtime.phase', 'phase0')",
            ["gate.queue.runtime.phase", "'phase0'", "is not in `order`"],
        ),
        (
            "DELETE FROM public.iu_route_worker_cursor",
            ["marker.iu_outbound_default", "last_tick_at", "no row"],
        ),
    ],
    ids=["from", "phase back", "phase unknown", "bind zero rows"],
)
def test_what_the_live_state_does_not_allow_is_refused_and_said(job: Job, by_hand: str, said: list[str]) -> None:
    job.db.execute(by_hand)
    done = job.run("plan", "-s", job.state, "-t", job.target, "--out", job.file, code=4)
    assert done.stdout == ""
    for words in said:
        assert words in done.stderr
    assert not job.file.exists()


def test_a_bind_with_two_rows_is_refused(job: Job) -> None:
    job.edit("markers.yaml", " WHERE worker_name = 'iu_outbound_default'\"", '"')
    job.db.execute(
        'INSERT INTO public.iu_route_worker_cursor SELECT (jsonb_populate_record(t, \'{"worker_name": "other"}\')).*'
        " FROM public.iu_route_worker_cursor t"
    )
    done = job.run("plan", "-s", job.state, "-t", job.target, code=4)
    assert "marker.iu_outbound_default" in done.stderr
    assert "more than one row" in done.stderr


def test_a_locked_gate_cannot_be_declared_armed(job: Job) -> None:
    job.edit("gates.yaml", '  queue.worker.enabled:\n    value: "false"', '  queue.worker.enabled:\n    value: "true"')
    done = job.run("plan", "-s", job.state, "-t", job.target, code=1)
    assert re.search(r"gates\.yaml:\d+:\d+: .*locked gate", done.stderr)


def test_a_violated_invariant_blocks_and_is_not_repaired(job: Job) -> None:
    job.db.execute("UPDATE public.dot_config SET value = 'true' WHERE key = 'queue.job_substrate.enabled'")
    text = job.plan("--out", job.file, code=3)
    assert "! invariant.F14-substrate-off: violated" in text
    assert not job.file.exists()
    assert job.report(code=3)["outcome"] == "violated"
    ((value,),) = job.db.execute("SELECT value FROM public.dot_config WHERE key = 'queue.job_substrate.enabled'")
    assert value == "true"


def test_show_prints_a_plan_and_an_approval_again(job: Job) -> None:
    job.plan("--out", job.file)
    job.approve()
    job.apply("--initialize")
    shown = job.run("show", job.file).stdout
    assert PLAN_LINE in shown.splitlines()
    (approval,) = job.folder.glob("*.approval.json")
    assert "operator: Phase 2" in job.run("show", approval).stdout


CONTROL_PLANE = """
SELECT 'function', p.oid::regprocedure::text,
       pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '-') || r.rolname || coalesce(obj_description(p.oid), '-')
  FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
 WHERE p.pronamespace = 'public'::regnamespace AND p.proname ~ '^fn_(job|queue)_'
UNION ALL SELECT 'gate', key, value FROM public.dot_config WHERE key LIKE 'queue.%'
UNION ALL SELECT 'marker', executor_name, to_jsonb(h)::text FROM public.queue_heartbeat h
ORDER BY 1, 2
"""
"""All that Phase 2 may change, in PostgreSQL's own words."""


@pytest.mark.smoke
def test_phase_2_is_undone_to_the_byte(job: Job) -> None:
    baseline, counts = digest(job.db.execute(CONTROL_PLANE)), job.counts()
    job.phase2()
    applied = digest(job.db.execute(CONTROL_PLANE))
    assert applied != baseline
    undo = job.folder / "undo.plan"
    shown = job.run("revert", "1", "-s", job.state, "-t", job.target, "--out", undo).stdout
    assert "Plan: 0 to add, 1 to change, 10 to remove" in shown
    accept = [word for hazard in ("changes_policy", "forgets", "retires") for word in ("--accept", hazard)]
    job.run("approve", undo, "--as", "operator", "--reason", "Back to phase 1", *accept, *governed.attests(undo))
    done = job.run("apply", undo).stdout
    assert "Apply complete! 0 added, 1 changed, 10 removed" in done
    assert digest(job.db.execute(CONTROL_PLANE)) == baseline
    assert job.counts() == counts
    # Back and forth: Phase 2 can be applied again, and is what it was.
    assert PLAN_LINE in job.plan("--out", job.file)
    plan = json.loads(job.file.read_text())
    hazards = sorted({hazard for change in (*plan["setup"], *plan["changes"]) for hazard in change["hazards"]})
    job.approve(*hazards)
    job.apply()
    assert digest(job.db.execute(CONTROL_PLANE)) != baseline
    assert NO_CHANGES in job.plan()
