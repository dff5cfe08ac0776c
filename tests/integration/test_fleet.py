"""Drift, plan and apply of a small fleet on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from reconciler.fleet import report
from tests.fleets import Shops

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from reconciler.fleet.files import Member
    from tests.servers import Database


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 4)
    yield made
    made.drop()


def test_one_approval_for_all_and_a_second_plan_is_empty(shops: Shops) -> None:
    (plan,) = shops.plan()
    assert shops.group(plan).names == tuple(shops.names)
    shops.approve(plan)
    done = shops.apply(plan)
    assert done.returncode == 0, done.stderr + done.stdout
    assert shops.rollout() == dict.fromkeys(shops.names, "applied")
    assert shops.nothing_left()
    for name in shops.names:
        assert (shops.root / "evidence" / name / "evidence.json").is_file()
    told = shops.told("drift", shops.file)
    assert {(one["outcome"], one["exit_code"], one["applied"]["entry"]) for one in told["targets"]} == {
        ("no_changes", 0, 1)
    }
    again = shops.apply(plan, evidence="again")
    assert again.returncode == 0, again.stderr
    assert "skipped, already applied" in again.stdout
    assert [shops.entries(name) for name in shops.names] == [1] * 4


def names(report: dict[str, Any], state: str) -> list[str]:
    return [one["name"] for one in report["targets"] if one["state"] == state]


def test_one_target_never_hides_the_others(shops: Shops) -> None:
    (plan,) = shops.plan()
    shops.approve(plan)
    assert shops.apply(plan).returncode == 0
    shops.sql("shop-002", "UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    shops.sql("shop-003", "INSERT INTO app.job VALUES (1, ' ')")
    shops.declared["targets"][3]["dsn"] = shops.server.dsn("nowhere")
    shops.write()

    told = shops.told("drift", shops.file)
    assert [(one["outcome"], one["exit_code"]) for one in told["targets"]] == [
        ("no_changes", 0),
        ("drift", 2),
        ("violated", 3),
        ("error", 1),
    ]
    assert (told["outcome"], told["exit_code"]) == ("error", 1)
    second, third, fourth = told["targets"][1:]
    assert second["items"] == [{"address": "gate.shop.limit", "class": "drift", "field": "value"}]
    assert third["violated"] == ["invariant.no-blank-actor"]
    assert "Cannot connect" in fourth["message"]
    assert fourth["applied"] is None
    done = shops.run("drift", shops.file)
    assert done.returncode == 1
    assert "shop-001" not in done.stdout
    assert "~ shop-002  drift: gate.shop.limit (value)" in done.stdout
    for only, code in (("shop-001", 0), ("shop-002", 2), ("shop-003", 3)):
        assert shops.run("drift", shops.file, "--only", only).returncode == code
    assert shops.run("drift", shops.file, "--select", "region=us").returncode == 3
    assert shops.run("plan", shops.file, "--only", "shop-003").returncode == 3

    out = shops.root / "drift.json"
    assert shops.run("drift", shops.file, "--format", "json", "--out", out).returncode == 1
    assert [one.name for one in report.load(out).targets] == shops.names


def test_a_rollout_stops_in_its_wave_and_resumes(shops: Shops) -> None:
    shops.declared["waves"] = [{"canary": ["shop-002"]}, {"canary": {"region": "us"}}, {"percent": 100}]
    shops.declared["workers"] = 1
    shops.write()
    (plan,) = shops.plan()
    shops.approve(plan)
    shops.sql("shop-003", "UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    done = shops.apply(plan, evidence="first")
    assert done.returncode == 4
    assert shops.rollout("first") == {
        "shop-001": "not_started",
        "shop-002": "applied",
        "shop-003": "failed",
        "shop-004": "not_started",
    }
    assert "Stopped in wave 2; 2 not started." in done.stderr
    assert [shops.entries(name) for name in shops.names] == [0, 1, 0, 0]
    assert not (shops.root / "first" / "shop-001").exists()

    shops.sql("shop-003", "UPDATE app.settings SET value = '10' WHERE name = 'shop.limit'")
    # Somebody put the connection of one target into the place of another: its ledger says nothing of that one.
    own = shops.declared["targets"][0]["dsn"]
    shops.declared["targets"][0]["dsn"] = shops.dsn("shop-002")
    shops.declared["targets"].pop(1)
    shops.declared["waves"].pop(0)
    shops.write()
    done = shops.apply(plan, "--only", "shop-001", evidence="wrong")
    assert done.returncode == 1
    assert "shop-002, which the fleet has not" in done.stderr
    shops.declared["targets"].insert(1, {"name": "shop-002", "dsn": own})
    shops.write()
    done = shops.apply(plan, "--only", "shop-001", evidence="wrong")
    assert done.returncode == 4
    assert shops.rollout("wrong") == {"shop-001": "failed"} if (shops.root / "wrong").exists() else True
    assert "skipped" not in done.stdout
    assert shops.entries("shop-002") == 1

    shops.declared["targets"][0]["dsn"], shops.declared["targets"][1]["dsn"] = own, shops.dsn("shop-002")
    shops.write()
    done = shops.apply(plan, evidence="second")
    assert done.returncode == 0, done.stderr
    assert shops.rollout("second") == {name: "already" if name == "shop-002" else "applied" for name in shops.names}
    assert [shops.entries(name) for name in shops.names] == [1] * 4
    assert shops.nothing_left()


def test_targets_of_a_catalogue(shops: Shops) -> None:
    shops.template.sql("CREATE TABLE app.fleet (name text, dsn text, labels jsonb)")
    catalogue = shops.template.db
    for name in shops.names:
        catalogue.execute('INSERT INTO app.fleet VALUES (%s, %s, \'{"region": "eu"}\')', (name, shops.dsn(name)))
    query = "SELECT name, dsn, labels FROM app.fleet"
    shops.declared["targets"] = [{"from": {"dsn": catalogue.dsn, "query": query}, "labels": {"from": "catalogue"}}]
    shops.write()
    told = shops.told("drift", shops.file)
    assert [(one["name"], one["labels"]) for one in told["targets"]] == [
        (name, {"from": "catalogue", "region": "eu"}) for name in shops.names
    ]
    assert told["exit_code"] == 0

    for change, sentence in (
        ("UPDATE app.fleet SET name = 'shop-001' WHERE name = 'shop-002'", "there are two targets 'shop-001'"),
        ("UPDATE app.fleet SET name = 'a b' WHERE name = 'shop-002'", "without a usable name"),
        ("UPDATE app.fleet SET labels = '[]' WHERE name = 'shop-002'", "labels are no JSON object"),
        ("UPDATE app.fleet SET dsn = NULL WHERE name = 'shop-002'", "it needs a dsn"),
        ("UPDATE app.fleet SET dsn = 'host=x pasword=hunter2' WHERE name = 'shop-002'", "no connection string"),
        ("UPDATE app.fleet SET dsn = (SELECT max(dsn) FROM app.fleet)", "are one database"),
        ("UPDATE app.fleet SET labels = jsonb_build_object('a', repeat('x', 5000))", "more than 4096 characters"),
        (
            "INSERT INTO app.fleet SELECT i::text, 'dbname=' || i FROM generate_series(1, 10001) i",
            "more than 10000 rows",
        ),
        ("DELETE FROM app.fleet", "has no target"),
        ("ALTER TABLE app.fleet RENAME TO gone", "cannot be listed"),
    ):
        catalogue.execute("CREATE TABLE app.kept AS TABLE app.fleet")
        catalogue.execute(change)
        done = shops.run("drift", shops.file)
        assert done.returncode == 1, change
        assert sentence in done.stderr, (change, done.stderr)
        assert "hunter2" not in done.stderr
        assert "Traceback" not in done.stderr
        catalogue.execute("DROP TABLE IF EXISTS app.fleet, app.gone")
        catalogue.execute("ALTER TABLE app.kept RENAME TO fleet")
    shops.declared["targets"][0]["from"]["query"] = "SELECT name, dsn, labels AS tags FROM app.fleet"
    shops.write()
    assert "columns that nobody asked for: tags" in shops.run("drift", shops.file).stderr


def test_a_password_of_a_catalogue_is_never_shown(shops: Shops) -> None:
    shops.template.sql("CREATE TABLE app.fleet (name text, dsn text)")
    catalogue = shops.template.db
    wrong = shops.server.tcp("nowhere").replace(shops.server.password, "hunter2")
    assert "hunter2" in wrong
    for index, name in enumerate(shops.names):
        dsn = wrong if index == 1 else shops.dsn(name)
        catalogue.execute("INSERT INTO app.fleet VALUES (%s, %s)", (name, dsn))
    shops.declared["targets"] = [{"from": {"dsn": catalogue.dsn, "query": "SELECT name, dsn FROM app.fleet"}}]
    shops.write()
    done = shops.run("drift", shops.file, "--format", "json", "-v")
    assert done.returncode == 1
    assert "password authentication failed" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    assert shops.server.host not in done.stdout


def test_groups_differ_where_the_targets_do(shops: Shops) -> None:
    shops.sql("shop-004", "UPDATE app.settings SET value = '9' WHERE name = 'shop.limit'")
    first, second = shops.plan()
    assert [shops.group(path).names for path in (first, second)] == [
        ("shop-001", "shop-002", "shop-003"),
        ("shop-004",),
    ]
    done = shops.run("apply", first, second, "-f", shops.file)
    assert done.returncode == 4
    assert "is not approved" in done.stderr
    for path in (first, second):
        shops.approve(path)
    done = shops.run("apply", first, second, "-f", shops.file)
    assert done.returncode == 1
    assert "--initialize" in done.stdout + done.stderr
    assert sum(shops.entries(name) for name in shops.names) == 0
    assert shops.apply(first, second).returncode == 0
    assert shops.nothing_left()
    assert shops.run("plan", shops.file, "--out", shops.root / "plans").returncode == 1


def test_a_plan_that_is_printed_hides_what_queries_gave(shops: Shops) -> None:
    seen = "2026-05-22 11:31:41.928657+00"
    assert seen not in shops.run("plan", shops.file, "-v").stdout
    assert seen in shops.run("plan", shops.file, "-v", "--show-values").stdout


def test_ctrl_c_ends_it_and_says_what_was_done(shops: Shops, monkeypatch: pytest.MonkeyPatch) -> None:
    from reconciler import cli_fleet

    shops.declared["workers"] = 1
    shops.write()
    (plan,) = shops.plan()
    shops.approve(plan)
    heard = cli_fleet._Progress.__call__

    def told(self: cli_fleet._Progress, member: Member, result: report.TargetResult) -> None:
        heard(self, member, result)
        if member.name == "shop-001":
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_fleet._Progress, "__call__", told)
    done = shops.apply(plan, evidence="first")
    assert done.returncode == 1
    assert "Interrupted: nothing new begins" in done.stderr
    assert "Interrupted." in done.stdout
    state = shops.rollout("first")
    assert state["shop-001"] == "applied"
    assert state["shop-004"] == "not_started"
    monkeypatch.undo()
    assert shops.apply(plan, evidence="second").returncode == 0
    assert [shops.entries(name) for name in shops.names] == [1] * 4
    assert shops.nothing_left()
