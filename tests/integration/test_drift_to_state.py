"""`drift --to-state`: what was done by hand goes into the files, comments kept; the next plan changes nothing."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.errors import NotApproved, PlanDamaged
from reconciler.ledger import chained
from reconciler.model import Statement, canonical
from reconciler.plan import effect_digest, effects_digest
from reconciler.trust import check_plan
from tests.integration import governed
from tests.integration.governed import Governed, command

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.errors import ReconcilerError
    from tests.servers import Database

GATES = """\
# What is open.
gates:
  # The shop itself.
  shop.open:      # nobody touches this
    value: "true"
    from: ["false"]
    safe: "false"
    lock: approval
    reason: Open.

  shop.limit: {value: '10', reason: A number.}   # in one line

  shop.phase:
    value: two   # the phase
    order: [one, two, three]
    reason: The phase.

  shop.plain:
    reason: Something.
    value: plain
  # the end of the gates
"""

FUNCTIONS = """\
functions:
  app.fn_greet(text, integer):
    source: functions/greet.sql
    owner: {owner}
    execute: [{caller}]          # exactly
    comment: A comment.
  # Between the two.
  app.fn_total():
    source: functions/total.sql
    owner: {owner}    # who counts
"""

GREET = f"-- Greets.\n{governed.GREET}-- The end.\n"


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    system = governed.empty(db, tmp_path)
    system.write()
    (system.directory / "gates.yaml").write_text(GATES)
    (system.directory / "functions.yaml").write_text(FUNCTIONS.format(**system.names))
    (system.directory / "functions" / "greet.sql").write_text(GREET)
    (system.directory / "functions" / "total.sql").write_text(governed.TOTAL)
    system.settle()
    return system


def files(system: Governed) -> dict[str, str]:
    return {
        str(path.relative_to(system.directory)): path.read_bytes().decode()
        for path in sorted(system.directory.rglob("*"))
        if path.is_file()
    }


def to_state(system: Governed) -> tuple[dict[str, Any], int]:
    done = command("drift", "-s", system.directory, "--to-state", "--format", "json", dsn=system.db.dsn)
    return json.loads(done.stdout), done.returncode


def not_written(document: dict[str, Any]) -> dict[str, str]:
    return {one["address"]: one["reason"] for one in document["accepted"]["not_written"]}


def accepted(system: Governed) -> None:
    """Nothing but what the ledger has to learn; once that is approved and applied, nothing at all."""
    made = system.plan()
    assert made.changes == ()
    assert {change.kind for change in made.setup} <= {"accepted", "rules"}
    assert system.apply(made).outcome == "applied"
    system.in_sync()
    assert system.drift().items == ()


def test_values_are_written_where_they_stand_and_nothing_else(shop: Governed) -> None:
    before = files(shop)
    shop.sql(
        "UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'",
        "UPDATE app.settings SET value = 'three' WHERE name = 'shop.phase'",
        "UPDATE app.settings SET value = E'a \"q\"\\nü' WHERE name = 'shop.plain'",
    )
    document, code = to_state(shop)
    assert (code, document["outcome"]) == (2, "drift")
    assert document["accepted"]["written"] == ["gate.shop.limit", "gate.shop.phase", "gate.shop.plain"]
    assert document["accepted"]["not_written"] == []
    assert [name.rpartition("/")[2] for name in document["accepted"]["files"]] == ["gates.yaml"]
    expected = (
        GATES.replace("'10'", '"25"')
        .replace("value: two ", 'value: "three" ')
        .replace("plain\n ", '"a \\"q\\"\\nü"\n ')
    )
    assert files(shop) == {**before, "gates.yaml": expected}
    report = shop.drift()
    assert {item.item_class for item in report.items} == {"both"}
    assert all("The files accept it" in item.todo for item in report.items)
    accepted(shop)


def test_what_is_accepted_has_the_hazards_that_an_apply_would_have_had(shop: Governed) -> None:
    shop.sql(
        "GRANT EXECUTE ON FUNCTION app.fn_total() TO {stranger}",
        "ALTER FUNCTION app.fn_greet(text, integer) OWNER TO {stranger}",
    )
    document, _ = to_state(shop)
    assert len(document["accepted"]["written"]) == 2
    made = shop.plan()
    assert made.changes == ()
    hazards = {change.address: change.hazards for change in made.setup}
    assert hazards == {
        "accepted.function.app.fn_greet(text, integer)": ("changes_owner", "security_definer"),
        "accepted.function.app.fn_total()": ("grants_execute",),
    }
    with pytest.raises(NotApproved, match="Hazards not accepted: changes_owner, security_definer"):
        shop.apply(made, [shop.approve(made, accepted=["grants_execute"])])
    accepted(shop)


def test_a_body_goes_into_its_file_and_the_comments_around_it_stay(shop: Governed) -> None:
    before = files(shop)
    shop.sql(governed.GREET.replace("CREATE", "CREATE OR REPLACE").replace("hello", "$function$ bonjour"[11:]))
    document, _ = to_state(shop)
    assert document["accepted"]["written"] == ["function.app.fn_greet(text, integer)"]
    assert files(shop) == {**before, "functions/greet.sql": GREET.replace("hello", "bonjour")}
    accepted(shop)


def test_attributes_owner_grants_and_comment(shop: Governed) -> None:
    before = files(shop)
    shop.sql(
        "ALTER FUNCTION app.fn_greet(text, integer) COST 7",
        "ALTER FUNCTION app.fn_greet(text, integer) OWNER TO {stranger}",
        "REVOKE EXECUTE ON FUNCTION app.fn_greet(text, integer) FROM {caller}",
        "COMMENT ON FUNCTION app.fn_greet(text, integer) IS NULL",
        "COMMENT ON FUNCTION app.fn_total() IS 'It''s new.'",
        "GRANT EXECUTE ON FUNCTION app.fn_total() TO {caller}",
    )
    document, _ = to_state(shop)
    assert document["accepted"]["not_written"] == []
    now = files(shop)
    assert now["functions/greet.sql"].startswith("-- Greets.\nCREATE FUNCTION")
    assert now["functions/greet.sql"].endswith(";\n-- The end.\n")
    assert "COST 7" in now["functions/greet.sql"]
    names = shop.names
    expected = (
        FUNCTIONS.format(**names)
        .replace(f"owner: {names['owner']}\n", f'owner: "{names["stranger"]}"\n')
        .replace(f"[{names['caller']}] ", "[] ")
        .replace("comment: A comment.", "comment: null")
        .replace("# who counts\n", f'# who counts\n    execute: ["{names["caller"]}"]\n    comment: "It\'s new."\n')
    )
    assert now["functions.yaml"] == expected
    assert now["functions/total.sql"] == before["functions/total.sql"]
    accepted(shop)


def test_what_is_gone_is_retired(shop: Governed) -> None:
    shop.sql(
        "DELETE FROM app.settings WHERE name IN ('shop.limit', 'shop.plain')",
        "DROP FUNCTION app.fn_greet(text, integer)",
    )
    document, _ = to_state(shop)
    assert document["accepted"]["not_written"] == []
    now = files(shop)
    assert "functions/greet.sql" not in now
    assert (
        '  shop.limit: {retire: "Taken out of the database by hand; accepted."}   # in one line\n' in now["gates.yaml"]
    )
    assert '    retire: "Taken out of the database by hand; accepted."\n  # the end of the gates\n' in now["gates.yaml"]
    made = shop.plan()
    assert {change.hazards for change in made.setup} == {("retires",)}
    accepted(shop)


def test_what_no_file_may_say_is_left_alone_and_named(shop: Governed) -> None:
    (shop.directory / "more.yaml").write_text(
        'gates:\n  shop.till: {value: "false", safe: "false", lock: locked, reason: Shut.}\n'
        "  shop.varied: {value: {var: much}, reason: It depends.}\n"
        "  shop.order: {value: two, order: [one, two], reason: Phases.}\n"
        "markers:\n  courier:\n    table: app.heartbeat\n    key: {worker: courier}\n"
        "    values: {kind: legacy, seen: '2026-05-22'}\n"
    )
    shop.state["governance"]["vars"] = {"much": "9"}
    shop.write().settle()
    before = files(shop)
    shop.sql(
        "UPDATE app.settings SET value = 'true' WHERE name = 'shop.till'",
        "UPDATE app.settings SET value = '8' WHERE name = 'shop.varied'",
        "UPDATE app.settings SET value = 'one' WHERE name = 'shop.order'",
        "UPDATE app.settings SET value = NULL WHERE name = 'shop.plain'",
        "UPDATE app.settings SET value = 'another' WHERE name = 'shop.phase'",
        "DELETE FROM app.heartbeat",
        "GRANT EXECUTE ON FUNCTION app.fn_greet(text, integer) TO {caller} WITH GRANT OPTION",
        "GRANT EXECUTE ON FUNCTION app.fn_total() TO PUBLIC",
    )
    document, code = to_state(shop)
    assert code == 2
    assert document["accepted"]["written"] == []
    assert document["accepted"]["files"] == []
    said = not_written(document)
    for address, words in {
        "gate.shop.till": "it is locked",
        "gate.shop.varied": "its `value` is a variable",
        "gate.shop.order": "`order` says that it never moves back",
        "gate.shop.plain": "it is NULL",
        "gate.shop.phase": "is not in `order`",
        "marker.courier": "a marker cannot be retired",
        "function.app.fn_greet(text, integer)": "its grants are not ones that `execute` can say",
        "function.app.fn_total()": "public_execute",
    }.items():
        assert words in said.pop(address)
    assert said == {}
    assert files(shop) == before


def test_what_the_files_say_otherwise_is_for_a_person(shop: Governed) -> None:
    text = GATES.replace("'10'", "'15'")
    (shop.directory / "gates.yaml").write_text(text)
    shop.sql("UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'")
    document, _ = to_state(shop)
    assert "say something else" in not_written(document)["gate.shop.limit"]
    assert (shop.directory / "gates.yaml").read_text() == text


def test_without_the_ledger_nothing_is_written(shop: Governed) -> None:
    planner = shop.db.role()
    shop.sql(
        f"GRANT USAGE ON SCHEMA app TO {planner}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {planner}",
        "UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'",
    )
    done = command("drift", "-s", shop.directory, "--to-state", dsn=shop.db.dsn_as(planner))
    assert "Nothing was written into the files." in done.stdout
    assert "what was last applied is not known" in done.stdout
    assert (shop.directory / "gates.yaml").read_text() == GATES


def test_a_secret_stands_in_no_file(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILER_SECRET_KEY", "k" * 32)
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", "hunter22-hunter22")
    text = "gates:\n  shop.token: {secret: true, value_from: {env: RECONCILER_VALUE_TOKEN}, reason: A token.}\n"
    (shop.directory / "more.yaml").write_text(text)
    shop.settle()
    shop.sql("UPDATE app.settings SET value = 'rival-secret-value' WHERE name = 'shop.token'")
    done = command("drift", "-s", shop.directory, "--to-state", dsn=shop.db.dsn)
    assert "gate.shop.token: not written: it is a secret" in done.stdout
    assert (shop.directory / "more.yaml").read_text() == text
    assert "rival-secret-value" not in done.stdout + done.stderr + "".join(files(shop).values())


def test_done_by_hand_and_then_declared_needs_an_approval_too(shop: Governed) -> None:
    """The order of the two makes no difference: nobody arms a gate by hand and then declares it."""
    shop.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    to_state(shop)
    accepted(shop)
    shop.sql("UPDATE app.settings SET value = 'true' WHERE name = 'shop.open'")
    to_state(shop)
    (change,) = shop.plan().setup
    assert (change.address, change.hazards) == ("accepted.gate.shop.open", ("arms_gate", "moves_from_safe"))
    accepted(shop)


def test_what_was_accepted_can_be_reverted(shop: Governed, tmp_path: Path) -> None:
    shop.sql("UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'")
    to_state(shop)
    accepted(shop)
    verified = command("verify", "-s", shop.directory, dsn=shop.db.dsn)
    assert (verified.returncode, verified.stdout.endswith("intact.\n")) == (0, True), verified.stdout
    (shop.directory / "gates.yaml").write_text(GATES)
    out = tmp_path / "undo.plan"
    done = command("revert", "2", "-s", shop.directory, "--out", out, dsn=shop.db.dsn)
    assert (done.returncode, done.stderr.startswith("Saved")) == (0, True), done.stderr
    made = json.loads(out.read_text())
    assert [(change["address"], change["after"]["value"]) for change in made["changes"]] == [("gate.shop.limit", "10")]


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"hazards": ()}, NotApproved),
        ({"hazards": ("moves_from_safe",)}, NotApproved),
        ({"address": "accepted.gate.shop.none"}, PlanDamaged),
        ({"address": "accepted."}, PlanDamaged),
        ({"kind": "rules"}, PlanDamaged),
        ({"after": {"table": "app.settings"}}, PlanDamaged),
        ({"after": {"table": "app.settings", "key": "shop.open", "value": 7}}, PlanDamaged),
        ({"statements": (Statement(text="SELECT 1"),)}, NotApproved),
    ],
    ids=str,
)
def test_an_edited_plan_accepts_nothing(shop: Governed, edit: dict[str, Any], error: type[ReconcilerError]) -> None:
    """Even with digests that fit: what is accepted is derived again, with its hazards."""
    shop.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    to_state(shop)
    accepted(shop)
    shop.sql("UPDATE app.settings SET value = 'true' WHERE name = 'shop.open'")
    to_state(shop)
    made = shop.plan()
    (change,) = made.setup
    check_plan(made)
    edited = made.model_copy(update={"setup": (change.model_copy(update=edit),)})
    effects = effects_digest(edited.desired, edited.setup, edited.changes)
    digests = {"effects_digest": effects, "effect_digest": effect_digest(effects, edited.target)}
    with pytest.raises(error):
        check_plan(edited.model_copy(update=digests))


def test_a_chain_that_says_another_value_than_was_accepted_is_found(shop: Governed) -> None:
    """Somebody who can write the whole chain anew, and without an anchor: the approved plan says otherwise."""
    shop.sql("UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'")
    to_state(shop)
    accepted(shop)
    query = "SELECT previous, body FROM reconciler.entry WHERE number = 2"
    ((previous, text),) = shop.db.execute(query)
    body = json.loads(text)
    body["manifest"]["gate.shop.limit"]["spec"]["value"] = "26"
    edited = canonical(body).decode()
    with shop.around_the_trigger():
        shop.db.execute(
            "UPDATE reconciler.entry SET body = %s, hash = %s WHERE number = 2", [edited, chained(previous, edited)]
        )
    verified = command("verify", "-s", shop.directory, dsn=shop.db.dsn)
    assert verified.returncode != 0
    assert "it holds other objects, rules or checks than were approved: gate.shop.limit" in verified.stdout


def test_links_and_pipes_in_the_directory(shop: Governed) -> None:
    """A file behind a link is changed where it is, and stays behind its link."""
    real = shop.directory / "kept" / "gates.txt"
    real.parent.mkdir()
    (shop.directory / "gates.yaml").rename(real)
    (shop.directory / "gates.yaml").symlink_to("kept/gates.txt")
    (shop.directory / "dangling.txt").symlink_to("nowhere")
    (shop.directory / "loop").symlink_to(".")
    os.mkfifo(shop.directory / "pipe")
    shop.sql("UPDATE app.settings SET value = '25' WHERE name = 'shop.limit'")
    document, _ = to_state(shop)
    assert (document["accepted"]["written"], document["accepted"]["not_written"]) == (["gate.shop.limit"], [])
    assert (shop.directory / "gates.yaml").is_symlink()
    assert real.read_text() == GATES.replace("'10'", '"25"')
    assert shop.plan().changes == ()
