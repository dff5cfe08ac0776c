"""`retire`: gates and functions are taken away by being written down as such, never by leaving a line out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reconciler.errors import InputError, MissingPrivilege, Refused, Stale
from tests.integration.governed import Governed, command, shop

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Database

WHY = "Nobody uses it any more."
GONE = (
    'DELETE FROM "app"."settings" WHERE "name" OPERATOR(pg_catalog.=) '
    "'shop.limit' AND \"value\" OPERATOR(pg_catalog.=) '10'"
)


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    """The governed system, applied."""
    made = shop(db, tmp_path).write()
    made.settle()
    return made


def retire(system: Governed, section: str, name: str) -> Governed:
    system.state[section][name] = {"retire": WHY}
    return system.write()


@pytest.mark.smoke
def test_gate_and_function_go_last_and_are_forgotten_with_it(system: Governed) -> None:
    retire(system, "gates", "shop.limit")
    retire(system, "functions", "app.fn_greet(text, integer)")
    system.state["gates"]["shop.new"] = {"value": "1", "reason": "New."}
    plan = system.write().plan()
    assert [(change.address, change.actions, change.reason) for change in plan.changes] == [
        ("gate.shop.new", ("add",), "declared and missing"),
        ("gate.shop.limit", ("remove",), WHY),
        ("function.app.fn_greet(text, integer)", ("remove",), WHY),
    ]
    assert plan.hazards == ("retires",)
    assert (plan.summary.add, plan.summary.remove, plan.summary.forget) == (1, 2, 0)
    assert [statement.text for change in plan.changes[1:] for statement in change.statements] == [
        GONE,
        "DROP ROUTINE app.fn_greet(text, integer)",
    ]
    done = system.apply(plan)
    assert done.problems == ()
    assert system.value("shop.limit") is None
    assert system.db.execute("SELECT to_regprocedure('app.fn_greet(text, integer)')") == [(None,)]
    system.in_sync()
    assert system.drift().pending == ()
    # The entry in the files may go now; nothing is left to forget.
    del system.state["gates"]["shop.limit"], system.state["functions"]["app.fn_greet(text, integer)"]
    system.write().in_sync()


def test_what_comes_back_is_taken_away_again(system: Governed) -> None:
    system.apply(retire(system, "gates", "shop.limit").plan())
    system.sql("INSERT INTO app.settings (name, value) VALUES ('shop.limit', '11')")
    plan = system.plan()
    assert [(change.address, change.actions) for change in plan.changes] == [("gate.shop.limit", ("remove",))]
    system.apply(plan)
    assert system.value("shop.limit") is None
    system.in_sync()


def test_removal_is_pending_until_it_is_applied(system: Governed) -> None:
    moved = retire(system, "gates", "shop.limit").drift()
    assert moved.drift == ()
    assert [(item.address, item.actions, item.reason) for item in moved.pending] == [
        ("gate.shop.limit", ("remove",), "retired and still there")
    ]


def test_the_hazard_must_be_accepted(system: Governed) -> None:
    plan = retire(system, "gates", "shop.limit").plan()
    system.save(plan)
    refused = command("approve", system.plan_file, "--as", "operator", "--reason", "a test")
    assert refused.returncode == 4
    assert "retires" in refused.stderr
    assert system.value("shop.limit") == "10"


def test_a_moved_value_makes_the_removal_stale(system: Governed) -> None:
    plan = retire(system, "gates", "shop.limit").plan()
    system.sql("UPDATE app.settings SET value = '12' WHERE name = 'shop.limit'")
    with pytest.raises(Stale):
        system.apply(plan)
    assert system.value("shop.limit") == "12"
    again = system.plan()
    assert again.hazards == ("overwrites_drift", "retires")


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ("CREATE VIEW app.v AS SELECT app.fn_greet('you') AS hello", "rule _RETURN on view app.v"),
        (
            "CREATE TABLE app.t (hello text DEFAULT app.fn_greet('you'))",
            "default value for column hello of table app.t",
        ),
        (
            "CREATE VIEW app.v AS SELECT app.fn_total() AS total; CREATE VIEW app.w AS SELECT app.fn_total() AS total",
            "rule _RETURN on view app.v, rule _RETURN on view app.w",
        ),
    ],
)
def test_dependents_are_listed_and_nothing_cascades(system: Governed, made: str, named: str) -> None:
    function = "app.fn_greet(text, integer)" if "greet" in made else "app.fn_total()"
    system.sql(made)
    retire(system, "functions", function)
    with pytest.raises(Refused) as refused:
        system.plan()
    assert f"depend on it: {named}" in refused.value.details[0]
    assert system.db.execute("SELECT to_regprocedure(%s) IS NULL", [function]) == [(False,)]


def test_a_dependent_that_appears_after_the_plan_stops_the_apply(system: Governed) -> None:
    plan = retire(system, "functions", "app.fn_greet(text, integer)").plan()
    system.sql("CREATE VIEW app.v AS SELECT app.fn_greet('you') AS hello")
    with pytest.raises(Stale) as stale:
        system.apply(plan)
    assert "app.v" in stale.value.details[0]
    assert system.db.execute("SELECT hello FROM app.v") == [("hello youhello you",)]


def test_bodies_that_name_what_is_retired_are_findings(system: Governed) -> None:
    system.sql(
        "CREATE FUNCTION app.other() RETURNS text LANGUAGE plpgsql AS"
        " $$BEGIN RETURN app.fn_greet('x') || (SELECT value FROM app.settings WHERE name = 'shop.limit'); END$$"
    )
    retire(system, "gates", "shop.limit")
    plan = retire(system, "functions", "app.fn_greet(text, integer)").plan()
    assert [(found.address, found.message.split(" still")[0]) for found in plan.findings] == [
        ("function.app.fn_greet(text, integer)", "app.other()"),
        ("gate.shop.limit", "app.other()"),
    ]


def test_a_retired_gate_guards_nothing(system: Governed) -> None:
    retire(system, "gates", "shop.open")
    system.state["functions"]["app.fn_greet(text, integer)"]["gates"] = ["shop.open"]
    system.state["proofs"] = {
        "P": {"reason": "x", "arm": {"shop.open": "true"}, "when": "SELECT 1 AS one", "then": [{"returns": {"one": 1}}]}
    }
    with pytest.raises(InputError) as wrong:
        system.write().plan()
    text = "\n".join(map(str, wrong.value.problems))
    assert "gate 'shop.open' is retired at" in text
    assert "gate 'shop.open' is retired" in text.replace("retired at", "")


@pytest.mark.parametrize(
    ("section", "name", "entry", "message"),
    [
        ("gates", "shop.limit", {"retire": ""}, "at least 1"),
        ("gates", "shop.limit", {"retire": WHY, "value": "1"}, "unknown key"),
        ("gates", "shop.limit", {"retire": WHY, "store": "nowhere"}, "gate store 'nowhere' is not declared"),
        ("functions", "app.fn_total", {"retire": WHY}, "argument"),
        ("markers", "courier", {"retire": WHY}, "reconciler revert"),
    ],
)
def test_a_retirement_that_cannot_be_read(
    system: Governed, section: str, name: str, entry: dict[str, str], message: str
) -> None:
    system.state.setdefault(section, {})[name] = entry
    with pytest.raises(InputError) as wrong:
        system.write().plan()
    assert message in "\n".join(map(str, wrong.value.problems))


def test_the_privilege_to_delete_is_asked_for_beforehand(system: Governed) -> None:
    role = system.db.role()
    system.sql(
        f"GRANT USAGE ON SCHEMA app, reconciler TO {role}",
        f"GRANT SELECT, UPDATE ON app.settings, app.heartbeat, app.cursor, app.job TO {role}",
        f"GRANT SELECT, INSERT ON reconciler.entry TO {role}",
    )
    plan = retire(system, "gates", "shop.limit").plan(system.db.dsn_as(role))
    with pytest.raises(MissingPrivilege) as missing:
        system.apply(plan, dsn=system.db.dsn_as(role))
    assert "DELETE on app.settings" in (missing.value.message + "".join(missing.value.details))
