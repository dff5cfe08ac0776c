"""What a run leaves: the evidence folder of an apply that was committed, and of one that was rolled back."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from reconciler import ledger
from reconciler.model import canonical
from tests.integration import governed
from tests.integration.phase2 import Phase2

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database

FILES = {
    "evidence.json",
    "report.md",
    "report.html",
    "plan.json",
    "statements.sql",
    "ledger-entry.json",
    "SHA256SUMS",
}
DELTAS = {"functions": "+5", "dot_config-keys": "+4", "queue-keys": "+4", "queue_heartbeat-rows": "+1"}
SURFACE = {
    "tables", "views", "functions", "dot_config-keys", "queue-keys", "queue_heartbeat-rows", "job_queue-rows",
    "job_dead_letter-rows", "event_outbox-rows", "cursor-last_run_at", "iu_vector_sync_point-rows",
    "information_unit-rows", "extensions", "production_documents", "fn_iu_op-aliases", "event_outbox-checks",
}  # fmt: skip
ATTESTED = {"F02-no-worker-started", "F07-no-qdrant", "F10-start-here", "F11-law-text"}
SECTIONS = (
    "Scope honoured",
    "What was added and changed",
    "Gates",
    "Markers",
    "Functions",
    "Proofs",
    "Regression",
    "Forbidden list",
    "Other invariants",
    "What was not looked at",
    "Approvals",
    "Statements",
    "Ledger entry",
)


class Run(NamedTuple):
    """A run that was committed: whose it was, its evidence, and what the command printed."""

    phase2: Phase2
    place: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture
def phase2(dieu45: Database, tmp_path: Path) -> Phase2:
    return Phase2(dieu45, tmp_path)


@pytest.fixture(scope="module")
def committed(dieu45_shared: Database, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run for all who read what it left."""
    phase2 = Phase2(dieu45_shared, tmp_path_factory.mktemp("committed"))
    phase2.approve("Phase 2, as decided")
    place = phase2.folder / "run"
    return Run(phase2, place, phase2.apply("--evidence", place))


def sums_hold(folder: Path) -> bool:
    """As anybody would check it."""
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return done.returncode == 0 and listed == there - {"SHA256SUMS"}


def test_the_evidence_of_phase_2(committed: Run) -> None:
    phase2, place, done = committed
    assert f"Evidence: {place}" in done.stderr.splitlines()
    assert "Applied, but" not in done.stdout

    there = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert there == FILES | {"approvals/1-operator.json"}
    assert sums_hold(place)
    assert (place.stat().st_mode & 0o777, (place / "plan.json").stat().st_mode & 0o777) == (0o700, 0o600)
    assert (place / "plan.json").read_bytes() == phase2.file.read_bytes()
    given = phase2.file.with_name("phase2.plan.operator.approval.json")
    assert (place / "approvals/1-operator.json").read_bytes() == given.read_bytes()

    found = json.loads((place / "evidence.json").read_text())
    assert (found["format_version"], found["outcome"], found["failure"], found["problems"]) == (
        "1.2",
        "applied",
        None,
        [],
    )
    surface = {row["address"].partition(".")[2]: row for row in found["surface"]}
    assert set(surface) == SURFACE
    assert {row["status"] for row in surface.values()} == {"predicted"}
    for name, row in surface.items():
        assert row["predicted"] == DELTAS.get(name, row["predicted"])
        expected = int(DELTAS.get(name, "0"))
        if row["before"].isdecimal():
            assert int(row["after"]) - int(row["before"]) == expected, name

    forbidden = [verdict for verdict in found["invariants"] if verdict["group"] == "forbidden"]
    statuses = {verdict["address"].partition(".")[2]: verdict["status"] for verdict in forbidden}
    assert len(statuses) == 14
    assert {name for name, status in statuses.items() if status == "attested"} == ATTESTED
    assert sum(status == "held" for status in statuses.values()) == 10

    assert [stage["name"] for stage in found["stages"]] == [
        *("connect", "check", "lock", "read", "execute", "verify", "judge", "record", "commit", "after"),
    ]
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    plan = json.loads(phase2.file.read_text())
    planned = [statement["text"] for change in (*plan["setup"], *plan["changes"]) for statement in change["statements"]]
    assert [statement["text"] for statement in found["executed"]] == planned
    assert len(planned) == found["statements"] > 11
    assert found["started_at"] <= found["finished_at"]
    assert [(yes["approver"], yes["reason"], set(yes["attestations"])) for yes in found["approvals"]] == [
        ("operator", "Phase 2, as decided", ATTESTED)
    ]
    assert {entry["class"] for entry in found["not_compared"]} >= {"table", "view", "constraint"}
    assert [(finding["code"], finding["address"]) for finding in found["findings"]] == [
        ("stale_heartbeat", "marker.iu_outbound_default")
    ]


def test_the_ledger_entry_checks_without_the_database(committed: Run) -> None:
    phase2, place, _ = committed
    entry = json.loads((place / "ledger-entry.json").read_text())
    found = json.loads((place / "evidence.json").read_text())
    ((stored,),) = phase2.db.execute("SELECT hash FROM reconciler.entry")
    text = entry["previous"] + canonical(entry["body"]).decode()
    assert hashlib.sha256(text.encode()).hexdigest() == entry["hash"] == found["hash"] == stored
    assert (entry["number"], entry["previous"], found["previous"]) == (1, ledger.GENESIS, ledger.GENESIS)
    assert entry["body"]["run_id"] == found["run_id"]


def test_what_the_report_says(committed: Run) -> None:
    place = committed.place
    report = (place / "report.md").read_text()
    headings = [line.lstrip("# ") for line in report.splitlines() if re.match("#{2,3} ", line)]
    assert [name for name in SECTIONS if not any(heading.startswith(name) for heading in headings)] == []
    assert report.startswith("# dieu45 phase2_governance: applied\n\nApply complete! 10 added, 1 changed, 0 removed.\n")
    assert "Regression: 16 of 16 as predicted" in headings
    assert "Forbidden list: 10 held, 4 attested" in headings
    rows = dict(re.findall(r"^\| `([\w-]+)` \| [^|]* \| [^|]* \| ([^|]*) \|", report, re.MULTILINE))
    assert {name: rows[name] for name in DELTAS} == DELTAS
    assert set(rows) >= SURFACE
    assert (
        "| `queue.heartbeat.enabled` | `false` → `true` | Heartbeat protocol armed; no worker is started. |" in report
    )
    assert "One transaction, `" in report
    assert "11 of 11 changes are of objects inside of it." in report
    # A person's word is never more than that.
    assert "confirmed" not in report
    for name in ATTESTED:
        (line,) = [line for line in report.splitlines() if line.startswith(f"| `{name}` |")]
        assert "| *attested* |" in line
        assert line.endswith("| `operator` |")
    page = (place / "report.html").read_text()
    assert all(f">{name}" in page for name in SECTIONS)
    assert page.count('<table class="weak"') == 1


def test_statements_can_be_read_as_a_script(committed: Run) -> None:
    script = (committed.place / "statements.sql").read_text()
    found = json.loads((committed.place / "evidence.json").read_text())
    assert script.startswith(f"-- Run {found['run_id']}: committed in transaction {found['transaction_id']}.\n")
    total = found["statements"]
    heads = re.findall(rf"^-- (\d+) of {total}: (\S.*), \d+\.\d{{6}} s$", script, re.MULTILINE)
    assert [int(number) for number, _ in heads] == list(range(1, total + 1))
    assert any(head.endswith(" as workflow_admin") for _, head in heads)
    assert all(statement["text"] in script for statement in found["executed"])


@pytest.mark.parametrize("form", ["text", "json", "markdown", "html"])
def test_show_renders_it_again(committed: Run, tmp_path: Path, form: str) -> None:
    phase2, place = committed.phase2, tmp_path / "run"
    shutil.copytree(committed.place, place)
    shown = phase2.run("show", place, "--format", form).stdout
    assert phase2.run("show", place / "evidence.json", "--format", form).stdout == shown
    if form == "json":
        document = json.loads((place / "evidence.json").read_text())
        del document["checksum"]
        assert json.loads(shown) == document
    elif form == "text":
        assert "Apply complete! 10 added, 1 changed, 0 removed." in shown.splitlines()
    else:
        assert shown == (place / {"markdown": "report.md", "html": "report.html"}[form]).read_text()
    (place / "evidence.json").write_text((place / "evidence.json").read_text().replace('"held"', '"passed"', 1))
    assert "changed after it was written" in phase2.run("show", place, code=1).stderr


def test_plan_and_drift_as_markdown_and_html(phase2: Phase2) -> None:
    plan = phase2.plan("--format", "markdown")
    assert plan.partition("\n")[2].startswith(
        "# Plan for dieu45 phase2_governance: changes\n\nPlan: 10 to add, 1 to change, 0 to remove.\n"
    )
    assert plan.count("<details>") == plan.count("</details>") > 11
    assert len(plan) < 65_536  # what a comment on a pull request may hold
    assert phase2.plan("--format", "html").startswith("<!doctype html>")
    phase2.approve()
    phase2.apply()
    where = ("drift", "-s", phase2.state, "-t", phase2.target, "--format")
    clean = phase2.run(*where, "markdown").stdout
    assert re.search(r"^No drift at \S+ 0 pending\.$", clean, re.MULTILINE)
    phase2.db.execute("UPDATE public.dot_config SET value = '3600' WHERE key = 'queue.lease.duration_sec'")
    moved = phase2.run(*where, "markdown", code=2).stdout
    assert (
        "| `gate.queue.lease.duration_sec` | change | changed since the last apply | `value`: `300 → 3600` |" in moved
    )
    assert "300 → 3600" in phase2.run(*where, "html", code=2).stdout
    saved = phase2.run("show", phase2.file, "--format", "markdown").stdout
    assert "# Plan for dieu45 phase2_governance: changes" in saved
    approval = phase2.file.with_name("phase2.plan.operator.approval.json")
    assert "**Approver:** `operator`" in phase2.run("show", approval, "--format", "markdown").stdout


# ---------------------------------------------------------------------------------------------------- a run that failed


def rolled_back(phase2: Phase2, code: int) -> tuple[dict[str, Any], str, Path]:
    """Apply, which must fail and change nothing; its evidence, its report and where they are."""
    phase2.approve()
    before = governed.image(phase2.db)
    place = phase2.folder / "run"
    done = phase2.apply("--evidence", place, code=code)
    assert governed.image(phase2.db) == before
    assert f"Evidence: {place}" in done.stderr.splitlines()
    assert sums_hold(place)
    assert not (place / "ledger-entry.json").exists()
    assert (place / "plan.json").read_bytes() == phase2.file.read_bytes()
    report = (place / "report.md").read_text()
    assert "**Nothing was changed: the server rolled the transaction back.**" in report
    assert "rolled back, nothing of this took effect" in (place / "statements.sql").read_text()
    return json.loads((place / "evidence.json").read_text()), report, place


def test_a_surface_that_differs_can_be_read_afterwards(phase2: Phase2) -> None:
    phase2.db.execute("""
        CREATE FUNCTION public.behind_our_back() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE 'CREATE TABLE public.smuggled ()'; RETURN NULL; END $$;
        CREATE TRIGGER behind_our_back AFTER UPDATE ON public.dot_config
          FOR EACH STATEMENT EXECUTE FUNCTION public.behind_our_back()
    """)
    found, report, place = rolled_back(phase2, 3)
    assert (found["outcome"], found["entry"], found["hash"]) == ("violated", None, None)
    assert any("surface.tables: differs" in detail for detail in found["failure"]["details"])
    (tables,) = [row for row in found["surface"] if row["address"] == "surface.tables"]
    assert (tables["status"], int(tables["after"]) - int(tables["before"])) == ("differs", 1 + 1 - 1)
    assert "Why it was not applied" in report
    assert re.search(r"^\| `tables` \| \d+ \| \d+ \| \+1 \| unchanged \| \*\*differs\*\* \|$", report, re.MULTILINE)
    assert "Ledger entry\n\nNone: what is rolled back leaves no entry." in report
    assert len(found["executed"]) == found["statements"]
    shown = phase2.run("show", place).stdout
    assert "Not applied: nothing was changed." in shown
    assert "! surface.tables: differs:" in shown


def test_a_proof_that_fails_is_told_as_one(phase2: Phase2) -> None:
    """A body that somebody changed: the files say so, the proofs do not agree."""
    body = phase2.state / "functions/fn_job_reap_stale_leases_apply.sql"
    told = body.read_text()
    assert told.count("IF v_attempts < v_job.max_attempts") == 1
    body.write_text(told.replace("IF v_attempts < v_job.max_attempts", "IF v_attempts <= v_job.max_attempts"))
    found, report, place = rolled_back(phase2, 3)
    assert (found["outcome"], found["entry"], found["hash"]) == ("proof_failed", None, None)
    failed = {row["address"]: row["detail"] for row in found["proofs"] if row["status"] == "failed"}
    what = "step 1: then 1: dead_letter_count: found 0, expected 2"
    assert failed == {"proof.P05-reap-dead-letters": what}
    # Everything else was judged too, and stood.
    assert {row["status"] for row in found["invariants"]} == {"held", "attested"}
    assert {row["status"] for row in found["surface"]} == {"predicted"}
    assert found["failure"]["message"] == "1 proof not passed; nothing can be applied."
    assert found["failure"]["details"] == [f"proof.P05-reap-dead-letters: failed: {what}"]
    assert f"| `proof.P05-reap-dead-letters` | **failed** | {what} |" in report
    assert " Proofs: 14 passed, 0 rehearsed, 1 failed, 1 not run. " in phase2.run("show", place).stdout

    again = phase2.apply("--evidence", phase2.folder / "again", "--format", "json", code=3)
    document = json.loads(again.stdout)
    assert document["outcome"] == "proof_failed"
    assert document["errors"][1:] == [f"proof.P05-reap-dead-letters: failed: {what}"]
    assert f"proof.P05-reap-dead-letters: failed: {what}" in again.stderr

    body.write_text(told)
    phase2.approve()
    phase2.apply("--evidence", phase2.folder / "third")
    assert "No changes." in phase2.plan()


def test_an_invariant_beside_a_failed_proof_is_the_word(phase2: Phase2) -> None:
    """What is true of the database weighs more than what a function would do; both are told."""
    body = phase2.state / "functions/fn_job_reap_stale_leases_apply.sql"
    body.write_text(body.read_text().replace("IF v_attempts < v_job", "IF v_attempts <= v_job"))
    phase2.db.execute("""
        CREATE FUNCTION public.behind_our_back() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE 'CREATE TABLE public.smuggled ()'; RETURN NULL; END $$;
        CREATE TRIGGER behind_our_back AFTER UPDATE ON public.dot_config
          FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION public.behind_our_back()
    """)
    found, _, _ = rolled_back(phase2, 3)
    assert found["outcome"] == "violated"
    assert {detail.partition(".")[0] for detail in found["failure"]["details"]} == {"surface", "proof"}


def test_a_statement_that_fails_is_told(phase2: Phase2) -> None:
    phase2.db.execute("""
        CREATE FUNCTION public.no_row() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'not today' USING ERRCODE = 'P0001'; END $$;
        CREATE TRIGGER no_row BEFORE INSERT ON public.queue_heartbeat
          FOR EACH ROW EXECUTE FUNCTION public.no_row()
    """)
    found, report, _ = rolled_back(phase2, 1)
    assert found["outcome"] == "error"
    assert found["started_at"] <= found["finished_at"]
    assert "not today" in found["failure"]["message"]
    assert "marker.iu_outbound_default" in found["failure"]["message"]
    assert 0 < len(found["executed"]) < found["statements"]
    assert found["stages"][-1]["name"] == "execute"
    # What was judged before the change stands there as that, and nothing as judged after it.
    assert {row["status"] for row in found["surface"]} == {"deferred"}
    assert "It had come as far as stage `execute`" in report


def test_a_run_that_never_began_leaves_nothing(phase2: Phase2) -> None:
    phase2.approve()
    place = phase2.folder / "deep" / "run"
    assert "--initialize" in phase2.run("apply", phase2.file, "--evidence", place, code=1).stderr
    assert not place.parent.exists()


# ------------------------------------------------------------------------------------------------------------ the place


def test_the_default_place_is_named_by_time_and_run(phase2: Phase2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILER_EVIDENCE", "")
    monkeypatch.chdir(phase2.folder)
    phase2.approve()
    phase2.apply()
    (place,) = (phase2.folder / "evidence").iterdir()
    ((run,),) = phase2.db.execute("SELECT run_id::text FROM reconciler.entry")
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-{run}", place.name)


def _occupied(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run/evidence.json").write_text("mine")
    return folder / "run"


def _file(folder: Path) -> Path:
    (folder / "run").write_text("mine")
    return folder / "run" / "below"


def _not_there(_folder: Path) -> Path:
    return Path("/proc/evidence")


@pytest.mark.parametrize("place", [_occupied, _file, _not_there], ids=["occupied", "below a file", "not writable"])
def test_a_place_that_cannot_be_written_stops_the_apply(phase2: Phase2, place: Callable[[Path], Path]) -> None:
    phase2.approve()
    before = governed.image(phase2.db)
    refused = phase2.apply("--evidence", place(phase2.folder), code=1)
    assert "vidence" in refused.stderr
    assert "Nothing was changed." in refused.stderr
    assert "lock" not in refused.stderr
    assert governed.image(phase2.db) == before
    assert not (phase2.folder / "run").is_dir() or (phase2.folder / "run/evidence.json").read_text() == "mine"


def test_a_folder_lost_after_commit_is_a_problem_and_no_failure(
    phase2: Phase2, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reconciler import apply as applying

    place = phase2.folder / "run"
    looked = applying._after

    def lose(*given: Any) -> list[str]:
        place.rmdir()
        place.write_text("in the way")
        return looked(*given)

    monkeypatch.setattr(applying, "_after", lose)
    phase2.approve()
    done = phase2.apply("--evidence", place)
    assert done.stdout.splitlines()[-1].startswith(f"Applied, but: The evidence in {place} is not complete")
    assert phase2.db.execute("SELECT count(*) FROM reconciler.entry") == [(1,)]
