"""A ledger that finds itself in another place: nothing goes on before `rehome` was approved, and it voids approvals."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from reconciler import approve as approving
from reconciler import plan as planning
from reconciler import verify as verifying
from reconciler.errors import NotApproved, Refused, Stale
from reconciler.plan import stamp
from tests.integration import governed

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    made = governed.shop(db, tmp_path)
    assert command(made, "plan", "--out", made.plan_file).returncode == 0
    applied(made, made.plan_file, "--initialize")
    return made


def command(system: Governed, name: str, *words: str | Path, target: str = "test") -> subprocess.CompletedProcess[str]:
    """One that reads the state directory."""
    return governed.command(name, "-s", system.directory, "-t", target, *words, dsn=system.db.dsn)


def applied(system: Governed, plan: Path, *words: str) -> None:
    made, _ = planning.load(plan)
    hazards = [word for hazard in made.hazards for word in ("--accept", hazard)]
    for line in (
        ("approve", plan, "--as", "operator", "--reason", "a test", *hazards),
        ("apply", plan, *words, "--evidence", system.root / f"evidence-{plan.name}"),
    ):
        done = governed.command(*line, dsn=system.db.dsn)
        assert done.returncode == 0, done.stderr


def moved(system: Governed) -> None:
    """From here on the database has another name, as the copy has that somebody restored beside the original."""
    name = f"{system.db.name}_moved"
    system.db.conn.close()
    with psycopg.connect(system.db.server.dsn(), autocommit=True) as conn:
        conn.execute(
            sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(system.db.name), sql.Identifier(name))
        )
    system.db.name = name
    system.state["governance"]["targets"] = {"test": {}, "staging": {}}
    system.write()


def rehomed(system: Governed, target: str) -> Path:
    plan = system.root / f"rehome-{target}.plan"
    made = command(system, "rehome", "--out", plan, target=target)
    assert made.returncode == 0, made.stderr
    return plan


def test_nothing_goes_on_in_another_place_before_it_was_rehomed(system: Governed) -> None:
    home = system.db.name
    moved(system)
    for name in ("plan", "drift"):
        for target, said in (
            ("test", f"was written on database {home} of system "),
            ("staging", "that of target test"),
        ):
            refused = command(system, name, target=target)
            assert refused.returncode == 4
            assert said in refused.stderr
            assert f"reconciler rehome -t {target} --out FILE" in refused.stderr

    plan = rehomed(system, "staging")
    shown = governed.command("show", plan).stdout
    assert "home.shop" in shown
    assert f"database: '{home}' -> '{system.db.name}'" in shown
    assert "Plan: 0 to add, 0 to change, 0 to remove." in shown
    bare = governed.command("approve", plan, "--as", "operator", "--reason", "a test")
    assert (bare.returncode, "Hazards not accepted: rehomes." in bare.stderr) == (4, True)
    applied(system, plan)

    again = command(system, "plan", target="staging")
    assert (again.returncode, "No changes." in again.stdout) == (0, True)
    assert command(system, "drift", target="staging").returncode == 0
    assert command(system, "plan").returncode == 4
    found = command(system, "verify", target="staging")
    assert (found.returncode, "intact" in found.stdout) == (0, True)
    (entry,) = system.db.execute("SELECT body::jsonb FROM reconciler.entry WHERE number = 2")[0]
    (first,) = system.db.execute("SELECT body::jsonb FROM reconciler.entry WHERE number = 1")[0]
    assert entry["target"]["name"] == "staging"
    assert entry["rehomed_at"] == entry["recorded_at"]
    assert {key: entry[key] for key in ("manifest", "policy", "scope")} == {
        key: first[key] for key in ("manifest", "policy", "scope")
    }
    folder = system.root / f"evidence-{plan.name}"
    assert verifying.folder(folder, None).problems == ()
    assert json.loads((folder / "evidence.json").read_text())["setup"][0]["kind"] == "home"


def test_what_moved_meanwhile_is_left_alone_and_stays_drift(system: Governed) -> None:
    moved(system)
    system.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'", "DROP FUNCTION app.fn_total()")
    applied(system, rehomed(system, "test"))
    assert system.value("shop.open") == "false"
    drift = command(system, "drift")
    assert drift.returncode == 2
    assert "gate.shop.open" in drift.stdout
    assert "function.app.fn_total()" in drift.stdout


def test_approvals_of_before_are_void_also_in_the_same_place(system: Governed) -> None:
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write()
    plan = system.plan()
    pending = system.approve(plan)
    applied(system, rehomed(system, "test"))

    with pytest.raises(NotApproved) as refused:
        system.apply(plan, [pending])
    assert "before the ledger was rehomed at" in refused.value.details[0]
    assert system.value("shop.limit") == "10"
    assert system.entries() == 2

    # The plan itself is as good as it was; it takes another yes.
    later = pending.model_copy(update={"issued_at": stamp(datetime.now(UTC) + timedelta(seconds=2))})
    assert system.apply(plan, [later]).outcome == "applied"
    system.in_sync()
    # What holds is remembered by every later entry.
    assert system.db.execute("SELECT count(DISTINCT body::jsonb ->> 'rehomed_at') FROM reconciler.entry") == [(1,)]
    assert verifying.chain("shop", rows(system)).problems == ()


def rows(system: Governed) -> list[verifying.Row]:
    names = ("name", "number", "run_id", "approval_ids", "previous", "hash", "body")
    found = system.db.execute(
        "SELECT name, number, run_id::text, approval_ids::text[], previous, hash, body FROM reconciler.entry ORDER BY 2"
    )
    return [dict(zip(names, row, strict=True)) for row in found]


def test_a_plan_to_rehome_is_stale_when_the_ledger_goes_on(system: Governed) -> None:
    file = rehomed(system, "test")
    plan, _ = planning.load(file)
    yes = system.approve(plan)
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write().settle()
    with pytest.raises(Stale, match="the ledger is not what it was"):
        system.apply(plan, [yes])
    assert system.entries() == 2


def test_a_plan_to_rehome_holds_nothing_else(system: Governed) -> None:
    """Its approval is for another home alone: what the ledger does not give again is refused."""
    plan, _ = planning.load(rehomed(system, "test"))
    declared = json.loads(json.dumps(plan.desired))
    declared["policy"]["approval"]["required"] = 1
    declared["policy"]["apply"]["max_duration"] = "7d"
    effects = planning.effects_digest(declared, plan.setup, plan.changes)
    edited = plan.model_copy(
        update={
            "desired": declared,
            "effects_digest": effects,
            "effect_digest": planning.effect_digest(effects, plan.target),
        }
    )
    with pytest.raises(Stale):
        system.apply(edited, [system.approve(edited)])
    assert system.entries() == 1


def test_a_name_that_was_never_applied_has_nothing_to_rehome(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    refused = command(system, "rehome", "--out", tmp_path / "x.plan")
    assert (refused.returncode, "there is nothing to rehome" in refused.stderr) == (1, True)
    assert not (tmp_path / "x.plan").exists()


def test_the_installed_list_judges_it(system: Governed) -> None:
    plan, _ = planning.load(rehomed(system, "test"))
    yes = system.approve(plan)
    with pytest.raises(NotApproved):
        system.apply(plan, [yes.model_copy(update={"effect_digest": "0" * 64})])
    with pytest.raises(NotApproved):
        system.apply(plan, [])


def test_a_chain_that_moves_without_a_rehome_is_found(system: Governed) -> None:
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write().settle()
    found = rows(system)
    body = json.loads(found[1]["body"])
    body["target"]["database"] = "elsewhere"
    found[1]["body"] = planning.canonical(body).decode()
    assert any("no rehome says so" in problem for problem in verifying.chain("shop", found).problems)


def test_files_that_name_another_ledger_are_refused(system: Governed) -> None:
    system.state["governance"]["targets"]["test"]["ledger"] = "f" * 64
    system.write()
    refused = command(system, "rehome", "--out", system.root / "x.plan")
    assert (refused.returncode, "names the ledger" in refused.stderr) == (4, True)


def test_refused_without_the_hazard(system: Governed) -> None:
    plan, _ = planning.load(rehomed(system, "test"))
    with pytest.raises(NotApproved, match="rehomes"):
        approving.approve(
            plan, "0" * 64, approver="operator", reason="x", accepted=[], expires=None, now=datetime.now(UTC)
        )
    with pytest.raises(Refused):
        system.apply(plan, [])
