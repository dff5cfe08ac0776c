"""The way back: an entry of the ledger is undone by a plan like any other, or refused naming what stands in the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.errors import Refused
from tests.integration.governed import GREET, Governed, command, empty, shop

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Plan
    from tests.servers import Database

GOVERNED = """
SELECT 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '-') || r.rolname
       || coalesce(obj_description(p.oid, 'pg_proc'), '-')
  FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner WHERE p.pronamespace = 'app'::regnamespace
UNION ALL SELECT 'gate', name, value FROM app.settings
UNION ALL SELECT 'marker', worker, to_jsonb(h)::text FROM app.heartbeat h
ORDER BY 1, 2
"""


def picture(system: Governed) -> list[tuple[Any, ...]]:
    """Everything that can be governed, in PostgreSQL's own words."""
    return system.db.execute(GOVERNED)


def revert(system: Governed, entry: int) -> Plan:
    """The plan that `reconciler revert` saves, checked as everybody does who acts on it."""
    from reconciler import plan as planning

    out = system.root / f"undo-{entry}.plan"
    done = command("revert", str(entry), "-s", system.directory, "--out", out, dsn=system.db.dsn)
    assert done.returncode == 0, done.stderr
    assert f"reconciler approve {out}" in done.stderr
    made, _ = planning.load(out)
    return made


@pytest.mark.smoke
def test_the_first_apply_is_undone(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    before = picture(system)
    system.settle()
    assert picture(system) != before
    plan = revert(system, 1)
    assert (plan.summary.add, plan.summary.change, plan.summary.remove) == (0, 2, 4)
    assert plan.hazards == ("changes_policy", "forgets", "retires")
    assert {statement.text.split()[0] for statement in plan.statements} >= {"DELETE", "DROP", "UPDATE", "CREATE"}
    done = system.apply(plan)
    assert done.problems == ()
    assert picture(system) == before
    # The files want their state back: planning them again shows exactly what was undone.
    again = system.plan()
    assert sorted(change.address for change in again.changes) == sorted(
        change.address for change in plan.changes if "forget" not in change.actions
    )


def test_a_later_entry_is_undone_and_the_earlier_one_stands(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.settle()
    before = picture(system)
    system.state["gates"]["shop.limit"]["value"] = "20"
    system.state["gates"]["shop.more"] = {"value": "1", "reason": "New."}
    system.function("app.fn_greet(text, integer)", GREET.replace("hello", "good day"), comment="Another.")
    system.state["invariants"]["one"] = {"query": "SELECT 1 AS one", "rows": 1}
    system.write().settle()
    plan = revert(system, 2)
    assert [(change.address, change.actions[0]) for change in plan.changes] == [
        ("function.app.fn_greet(text, integer)", "change"),
        ("gate.shop.limit", "change"),
        ("gate.shop.more", "remove"),
        ("invariant.one", "forget"),
    ]
    system.apply(plan)
    assert picture(system) == before
    assert system.entries() == 3
    # A revert is an entry like any other, so it can be undone too.
    system.apply(revert(system, 3))
    assert system.value("shop.limit") == "20"
    assert system.value("shop.more") == "1"


def test_a_retired_function_comes_back_with_every_attribute(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.settle()
    before = picture(system)
    system.state["functions"]["app.fn_greet(text, integer)"] = {"retire": "Gone."}
    system.state["gates"]["shop.limit"] = {"retire": "Gone."}
    system.write()
    system.apply(system.plan())
    assert picture(system) != before
    system.apply(revert(system, 2))
    assert picture(system) == before


def test_what_was_changed_again_stands_in_the_way(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.settle()
    for value in ("20", "30"):
        system.state["gates"]["shop.limit"]["value"] = value
        system.write().settle()
    done = command("revert", "2", "-s", system.directory, "--out", tmp_path / "x.plan", dsn=system.db.dsn)
    assert done.returncode == 4
    assert "gate.shop.limit: it was changed again since; undo that first" in done.stderr
    assert not (tmp_path / "x.plan").exists()
    for entry in (3, 2):  # not 2, because 4 undoes 3 and 2 is then the one that made it so
        system.apply(revert(system, entry))
    assert system.value("shop.limit") == "10"


def test_all_that_cannot_be_undone_is_named(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.sql(
        "INSERT INTO app.settings (name, value) VALUES ('shop.phase', 'one'), ('shop.nothing', NULL)",
    )
    system.state["gates"]["shop.nothing"] = {"value": "x", "reason": "It was NULL."}
    system.write().settle()
    system.sql("UPDATE app.heartbeat SET ticks = 1")
    done = command("revert", "1", "-s", system.directory, "--out", tmp_path / "x.plan", dsn=system.db.dsn)
    assert done.returncode == 4
    for line in (
        "gate.shop.phase: `order` says that it never moves back from 'two' to 'one'",
        "gate.shop.nothing: it was NULL, which no gate can be set to",
    ):
        assert line in done.stderr


def test_a_marker_that_somebody_ticked_is_left_alone(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.settle()
    system.sql("UPDATE app.heartbeat SET ticks = 1")
    done = command("revert", "1", "-s", system.directory, "--out", tmp_path / "x.plan", dsn=system.db.dsn)
    assert done.returncode == 4
    assert "marker.courier" in done.stderr
    assert "belongs to its executor now (`passive_while: ticks = 0` does not hold)" in done.stderr


def test_a_tick_between_plan_and_apply_of_a_revert_is_not_lost(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    system.settle()
    plan = revert(system, 1)
    system.sql("UPDATE app.heartbeat SET ticks = 1")
    with pytest.raises(Refused):
        system.apply(plan)
    assert system.db.execute("SELECT ticks FROM app.heartbeat") == [(1,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("7", "--out", "x.plan"), "no ledger entry 7 on this database; they go from 1 to 1"),
        (("0", "--out", "x.plan"), "no ledger entry 0"),
        (("last", "--out", "x.plan"), "number of a ledger entry"),
        (("1",), "--out"),
        (("--prove", "nowhere.plan"), "nowhere.plan"),
        (("--prove", "nowhere.plan", "--out", "x.plan"), "saves no plan"),
    ],
)
def test_usage(db: Database, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    system = shop(db, tmp_path)
    system.settle()
    done = command("revert", "-s", system.directory, *arguments, dsn=system.db.dsn)
    assert done.returncode == 1
    assert message in done.stderr


def test_prove_says_beforehand_that_everything_would_be_undone(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    before = picture(system)
    system.save(system.plan())
    done = command("revert", "--prove", system.plan_file, dsn=system.db.dsn)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Everything was rolled back.")
    assert "all 6 changes are undone" in done.stdout
    found = json.loads(command("revert", "--prove", system.plan_file, "--format", "json", dsn=system.db.dsn).stdout)
    assert found["before"] == found["reverted"] != found["applied"]
    assert picture(system) == before
    assert system.entries() == 0


def test_prove_names_what_would_remain(db: Database, tmp_path: Path) -> None:
    system = shop(db, tmp_path)
    # A trigger that keeps a gate from being deleted: the revert would leave it behind.
    system.sql(
        "CREATE FUNCTION app.keep() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$",
        "CREATE TRIGGER keep BEFORE DELETE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.keep()",
    )
    system.save(system.plan())
    done = command("revert", "--prove", system.plan_file, dsn=system.db.dsn)
    assert done.returncode == 2
    assert "! gate.shop.phase: is still there" in done.stdout
    assert "Not undone: 2 of 6 changes." in done.stdout


def test_prove_needs_a_fresh_plan(db: Database, tmp_path: Path) -> None:
    system = empty(db, tmp_path)
    system.state["gates"] = {"shop.a": {"value": "1", "reason": "One."}}
    system.write()
    system.save(system.plan())
    system.sql("INSERT INTO app.settings (name, value) VALUES ('shop.a', '0')")
    done = command("revert", "--prove", system.plan_file, dsn=system.db.dsn)
    assert done.returncode == 4
    assert "stale" in done.stderr
