"""Functions whose text the catalog rewrites: equal while what was written and what is shown stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from reconciler import undo
from reconciler.errors import Refused, Stale
from tests.integration import governed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database

ADDRESS = "app.fn_open(integer)"
OPEN = """-- Whether the shop is open.
CREATE FUNCTION app.fn_open(minimum integer DEFAULT 1 + length('{word}')) RETURNS boolean LANGUAGE sql STABLE
SET search_path = pg_catalog, app, pg_temp
BEGIN ATOMIC
    /* {comment} */
    SELECT count(*) >= minimum FROM app.settings WHERE value = '{value}';
    SELECT EXISTS (SELECT * FROM app.settings s WHERE s.name = 'shop.open' AND s.value = '{value}');
END;
"""


REPLACED = (
    "CREATE OR REPLACE FUNCTION app.fn_open(minimum integer DEFAULT 1 + length('ab')) RETURNS boolean LANGUAGE sql"
    " STABLE SET search_path = pg_catalog, app, pg_temp"
)


def text(**parts: str) -> str:
    found = OPEN
    for name, value in {"word": "ab", "comment": "as written", "value": "true", **parts}.items():
        found = found.replace(f"{{{name}}}", value)
    return found


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    made = governed.shop(db, tmp_path)
    made.function(ADDRESS, text())
    return made.write()


def facts(system: Governed) -> Any:
    query = "SELECT body::jsonb #> %s FROM reconciler.entry ORDER BY number DESC LIMIT 1"
    return system.db.execute(query, [["manifest", f"function.{ADDRESS}", "facts", "remembered"]])[0][0]


@pytest.mark.smoke
def test_a_body_and_a_default_that_the_catalog_rewrites(system: Governed) -> None:
    plan = system.plan()
    shown = next(change for change in plan.changes if ADDRESS in change.address).statements[0].text
    assert "/* as written */" in shown
    assert "DEFAULT 1 + length('ab')" in shown
    system.settle()
    assert governed.command("drift", "-s", system.directory, dsn=system.db.dsn).returncode == 0
    pair = facts(system)
    assert pair["written"]["default of argument 1"] == "1 + length('ab')"
    assert pair["live"]["default of argument 1"] == "(1 + length('ab'::text))"
    assert "as written" in pair["written"]["body"]
    assert "as written" not in pair["live"]["body"]
    # And so on, apply after apply, also of something else.
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write().settle()
    assert facts(system) == pair


@pytest.mark.parametrize(
    "part", [{"value": "false"}, {"word": "abc"}, {"comment": "as written, later"}], ids=["body", "default", "comment"]
)
def test_another_text_is_another_function(system: Governed, part: dict[str, str]) -> None:
    system.settle()
    system.files["functions/2.sql"] = text(**part)
    system.write()
    plan = system.plan()
    assert [change.address for change in plan.changes] == [f"function.{ADDRESS}"]
    assert (plan.drift, plan.hazards) == ((), ())
    system.settle()


@pytest.mark.parametrize(
    "statement",
    [
        f"{REPLACED} BEGIN ATOMIC SELECT true; END",
        f"{REPLACED} AS 'SELECT true'",
        text(word="abc").replace("CREATE ", "CREATE OR REPLACE "),
        "ALTER TABLE app.settings RENAME COLUMN value TO setting",
    ],
    ids=["body", "no longer parsed", "default", "what it names"],
)
def test_drift_is_seen(system: Governed, statement: str) -> None:
    """By hand, or because what the body names has another name now: the catalog's text moved."""
    system.settle()
    system.sql(statement)
    if "RENAME" in statement:
        system.state["governance"]["gate_stores"]["settings"]["value"] = "setting"
        system.write()
    found = system.plan()
    assert f"function.{ADDRESS}" in {item.address for item in found.drift}


def test_what_was_there_before_is_replaced_once(system: Governed) -> None:
    """Nobody remembers who wrote it: the first apply puts the file in its place, and knows it from then on."""
    system.sql(text(), f"ALTER FUNCTION {ADDRESS} OWNER TO {{owner}}")
    assert f"function.{ADDRESS}" in {change.address for change in system.plan().changes}
    system.settle()


def test_an_event_trigger_could_put_its_own_text_there(system: Governed) -> None:
    system.sql(
        "CREATE FUNCTION public.meddle() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
        "CREATE EVENT TRIGGER meddle ON ddl_command_end WHEN TAG IN ('CREATE FUNCTION')"
        " EXECUTE FUNCTION public.meddle()",
    )
    try:
        with pytest.raises(Refused) as refused:
            system.plan()
        assert "event trigger meddle fires when it is created" in refused.value.details[0]
    finally:
        system.sql("DROP EVENT TRIGGER meddle")
    # Made after the plan: what is there now is not what was approved.
    plan = system.plan()
    system.sql("CREATE EVENT TRIGGER meddle ON ddl_command_end EXECUTE FUNCTION public.meddle()")
    try:
        with pytest.raises(Stale):
            system.apply(plan)
    finally:
        system.sql("DROP EVENT TRIGGER meddle")
    assert system.entries() == 0
    system.settle()


def test_something_in_the_same_apply_replaces_it(system: Governed) -> None:
    """The pair is learned right after CREATE; a trigger that runs later in the apply does not get its text in."""
    system.sql(
        "CREATE FUNCTION public.replaces() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        f" {REPLACED} BEGIN ATOMIC SELECT true; END; RETURN NEW; END $$",
        "CREATE TRIGGER replaces AFTER UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION public.replaces()",
    )
    with pytest.raises(Stale) as refused:
        system.apply(system.plan())
    assert any(ADDRESS in detail for detail in refused.value.details)
    assert system.entries() == 0


def test_there_and_back(system: Governed) -> None:
    """Reverted to a parsed body, and from none to one: by the text that was written, or the catalog's."""
    system.settle()
    before = system.db.execute("SELECT pg_get_functiondef('app.fn_open'::regproc)")
    system.files["functions/2.sql"] = text(value="false")
    plan = system.write().plan()
    found = undo.prove(system.db.dsn, plan)
    assert (found.left, found.before == found.reverted, found.before == found.applied) == ((), True, False)
    system.settle()
    out = system.root / "undo.plan"
    made = governed.command("revert", "2", "-s", system.directory, "--out", out, dsn=system.db.dsn)
    assert made.returncode == 0, made.stderr
    for words in (("approve", out, "--as", "operator", "--reason", "back"), ("apply", out)):
        done = governed.command(*words, dsn=system.db.dsn)
        assert done.returncode == 0, done.stderr
    assert system.db.execute("SELECT pg_get_functiondef('app.fn_open'::regproc)") == before
    system.files["functions/2.sql"] = text()
    system.write().in_sync()


def test_return_is_a_body_too(system: Governed) -> None:
    system.files["functions/2.sql"] = (
        "CREATE FUNCTION app.fn_open(minimum integer DEFAULT (2 * 3)) RETURNS boolean\n"
        "SET search_path = pg_catalog, app, pg_temp RETURN minimum > 0 -- and no more\n;"
    )
    system.write().settle()
    assert facts(system)["live"]["default of argument 1"] == "(2 * 3)"
