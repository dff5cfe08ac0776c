"""Who may add entries to a ledger, or rewrite a folder of evidence, against `verify` and against the ledger's shape."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import setup
from reconciler.errors import Refused, ServerProblem, Stale
from reconciler.model import Plan, canonical
from reconciler.plan import dump_desired, effect_digest, effects_digest, load_desired
from reconciler.trust import check_plan
from tests.integration import governed
from tests.integration.governed import applier, command
from tests.integration.test_remembered import ADDRESS, REPLACED
from tests.integration.test_remembered import text as opened
from tests.integration.test_signatures import Signed, person
from tests.integration.test_verify import judged, recomputed, run, statement, summed, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database

__all__ = ["run"]


@pytest.fixture(autouse=True)
def evidence_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


# -------------------------------------------------------------------------------------------------------------- entries


def _no_quorum(body: dict[str, Any]) -> None:
    body["policy"]["approval"] |= {"signed": False, "required": 1}


def _own_list(body: dict[str, Any]) -> None:
    body["approvers"] += "stranger " + body["approvers"].split(" ", 1)[1]


def _narrow(body: dict[str, Any]) -> None:
    body["scope"]["scope"]["gates"] = []


def _other_rules(body: dict[str, Any]) -> None:
    body["manifest"]["gate.shop.limit"]["rules"]["from"] = ["66"]


def _no_check(body: dict[str, Any]) -> None:
    del body["manifest"]["invariant.no-blank-actor"]


def _tame_check(body: dict[str, Any]) -> None:
    body["manifest"]["invariant.no-blank-actor"]["spec"]["query"] = "SELECT 1 WHERE false"


def _no_object(body: dict[str, Any]) -> None:
    del body["manifest"]["gate.shop.open"]


def _other_object(body: dict[str, Any]) -> None:
    body["manifest"]["gate.shop.limit"]["spec"]["value"] = "66"


def _elsewhere(body: dict[str, Any]) -> None:
    body["target"]["database"] = "another"


def _rehomed(body: dict[str, Any]) -> None:
    body["rehomed_at"] = body["recorded_at"]


def _no_author(body: dict[str, Any]) -> None:
    body["plan"]["author"] = "author"


def _no_time(body: dict[str, Any]) -> None:
    body["recorded_at"] = "yesterday"


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no quorum": (_no_quorum, "it installs another policy or list of approvers than was approved"),
    "a list of one's own": (_own_list, "it installs another policy or list of approvers than was approved"),
    "another scope": (_narrow, "it installs another scope than was approved"),
    "other rules": (_other_rules, "other objects, rules or checks than were approved: gate.shop.limit"),
    "a check less": (_no_check, "other objects, rules or checks than were approved: invariant.no-blank-actor"),
    "another check": (_tame_check, "other objects, rules or checks than were approved: invariant.no-blank-actor"),
    "an object less": (_no_object, "other objects, rules or checks than were approved: gate.shop.open"),
    "another object": (_other_object, "other objects, rules or checks than were approved: gate.shop.limit"),
    "another place": (_elsewhere, "it was written in another place than its plan is for"),
    "a rehome": (_rehomed, "it says of the ledger's last rehome what the entry before it does not"),
    "an author": (_no_author, "it was not approved: The plan says that author made it, but its signature"),
    "no time": (_no_time, "its body is not one that reconciler wrote: recorded_at"),
}


def test_an_entry_installs_nothing_but_what_was_approved(db: Database, tmp_path: Path) -> None:
    """Signatures cover the plan; what else the entry says is in effect is worked out from it."""
    signed = Signed(db, tmp_path).settled()
    signed.system.state["gates"]["shop.limit"]["value"] = "11"
    signed.system.write()
    signed.settled()
    assert verify(signed.system).returncode == 0
    honest = db.execute("SELECT body FROM reconciler.entry WHERE number = 2")[0][0]
    for name, (change, sentence) in FORGED.items():
        recomputed(signed.system, change)
        done = verify(signed.system)
        assert done.returncode == 1, (name, done.stdout, done.stderr)
        assert f"! entry 2: {sentence}" in done.stdout.replace("it holds ", ""), (name, done.stdout)
        recomputed(signed.system, lambda body: body.update(json.loads(honest)))
    assert verify(signed.system).returncode == 0


def test_the_role_that_applies_cannot_install_a_list_by_hand(system: Governed) -> None:
    """It may INSERT, for an apply does: the next entry is not believed because it follows the chain."""
    system.settle()
    system.state["gates"]["shop.limit"]["value"] = "11"
    plan = system.write().plan()
    body = json.loads(system.db.execute("SELECT body FROM reconciler.entry")[0][0])
    previous = system.db.execute("SELECT hash FROM reconciler.entry")[0][0]
    yes = system.approve(plan)
    body |= {"plan": plan.dump(), "approvals": [yes.dump()], "run_id": "00000000-0000-4000-8000-000000000000"}
    body["policy"]["approval"]["required"] = 5
    text = canonical(body).decode()
    system.db.execute(
        "INSERT INTO reconciler.entry (name, number, run_id, recorded_at, approval_ids, body, previous, hash)"
        " VALUES ('shop', 2, %s, %s, %s::uuid[], %s, %s, %s)",
        [
            body["run_id"],
            body["recorded_at"],
            [yes.id],
            text,
            previous,
            hashlib.sha256((previous + text).encode()).hexdigest(),
        ],
    )
    done = verify(system)
    assert done.returncode == 1
    assert "! entry 2: it installs another policy or list of approvers than was approved" in done.stdout


# ------------------------------------------------------------------------------------------------------------ its shape


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER FUNCTION reconciler.entry_is_append_only() SET search_path = app, pg_catalog",
        "ALTER FUNCTION reconciler.entry_is_append_only() RESET search_path",
        "ALTER FUNCTION reconciler.entry_is_append_only() SECURITY DEFINER",
        (
            "CREATE OR REPLACE FUNCTION reconciler.entry_is_append_only() RETURNS trigger LANGUAGE plpgsql"
            " SET search_path = pg_catalog, pg_temp AS ''"
        ),
    ],
)
def test_the_trigger_function_does_what_ours_does(system: Governed, statement: str) -> None:
    system.settle()
    system.sql("SET check_function_bodies = off", statement)
    with pytest.raises(Refused) as refused:
        system.plan()
    assert refused.value.details == ("its trigger function is not ours",)


@pytest.mark.parametrize("what", ["FUNCTION reconciler.entry_is_append_only()", "SCHEMA reconciler"])
def test_whose_code_an_insert_runs(system: Governed, what: str) -> None:
    """The table is nobody's; its trigger function, or the schema to put another table in, is somebody's."""
    keeper = system.db.role("NOLOGIN")
    system.sql(setup.source(owner=keeper), f"ALTER {what} OWNER TO {{stranger}}")
    role = applier(system)
    system.sql(f"GRANT USAGE ON SCHEMA reconciler TO {role}", f"GRANT SELECT, INSERT ON reconciler.entry TO {role}")
    dsn = system.db.dsn_as(role)
    for one in (dsn, system.db.dsn):
        with pytest.raises(Refused) as refused:
            system.apply(system.plan(one), dsn=one, initialize=True)
        assert refused.value.details == (f"it belongs to {system.stranger}, whose code this role should not run",)
    assert system.entries() == 0
    system.sql(f"ALTER {what} OWNER TO {keeper}")
    assert system.apply(system.plan(dsn), dsn=dsn, initialize=True).problems == ()
    system.in_sync()


# ------------------------------------------------------------------------------------------------- remembered equality


@pytest.mark.parametrize("tag", ["GRANT", "REVOKE", "COMMENT", "ALTER ROUTINE"])
def test_an_event_trigger_that_fires_after_create(system: Governed, tag: str) -> None:
    """The pair is learned after all statements of a function: at GRANT there is still time to replace it."""
    system.function(ADDRESS, opened())
    system.write()
    if tag == "ALTER ROUTINE":
        system.sql(opened(), f"ALTER FUNCTION {ADDRESS} OWNER TO {{stranger}}")
    plan = system.plan()
    system.sql(
        "CREATE FUNCTION public.meddle() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF to_regprocedure('app.fn_open(integer)') IS NOT NULL"
        " AND current_setting('test.busy', true) IS DISTINCT FROM 'yes' THEN"
        f" PERFORM set_config('test.busy', 'yes', true); {REPLACED} BEGIN ATOMIC SELECT true; END;"
        " END IF; END $$",
        f"CREATE EVENT TRIGGER meddle ON ddl_command_end WHEN TAG IN ('{tag}') EXECUTE FUNCTION public.meddle()",
    )
    try:
        with pytest.raises(Stale):
            system.apply(plan)
        with pytest.raises(Refused) as refused:
            system.plan()
        assert "event trigger meddle fires when it is created or granted" in refused.value.details[0]
    finally:
        system.sql("DROP EVENT TRIGGER meddle")
    assert system.entries() == 0
    system.settle()


NAMES = """CREATE FUNCTION app.fn_open(minimum integer DEFAULT 1 + app.size('ab')) RETURNS boolean LANGUAGE sql STABLE
SET search_path = pg_catalog, app, pg_temp
BEGIN ATOMIC
    SELECT app.count_of(s.name) > minimum FROM app.shelf s WHERE s.mood::app.mood = 'good';
END;
"""
WORLD = """
CREATE TYPE app.mood AS ENUM ('good', 'bad');
CREATE TABLE app.shelf (name varchar, mood text);
CREATE FUNCTION app.count_of(text) RETURNS integer LANGUAGE sql IMMUTABLE RETURN 1;
CREATE FUNCTION app.size(text) RETURNS integer LANGUAGE sql IMMUTABLE RETURN 1;
GRANT SELECT ON app.shelf TO {owner};
"""
ANEW = "DROP FUNCTION app.fn_open(integer);"
OTHERS = {
    "a cast": "CREATE FUNCTION app.feel(text) RETURNS app.mood LANGUAGE sql IMMUTABLE RETURN 'good'::app.mood;"
    " CREATE CAST (text AS app.mood) WITH FUNCTION app.feel(text);",
    "a view": "ALTER TABLE app.shelf RENAME TO hidden;"
    " CREATE VIEW app.shelf AS SELECT 'x'::varchar AS name, mood FROM app.hidden;",
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_one_text_that_means_something_else(system: Governed, other: str) -> None:
    """Dropped and made again with the text of the file, when what it names is something else: the text is the same."""
    system.sql(WORLD)
    system.function(ADDRESS, NAMES)
    system.write().settle()
    before = system.db.execute("SELECT pg_get_functiondef('app.fn_open'::regproc)")
    comment = f"COMMENT ON FUNCTION {ADDRESS} IS 'A comment.'"
    grants = f"REVOKE ALL ON FUNCTION {ADDRESS} FROM PUBLIC; GRANT EXECUTE ON FUNCTION {ADDRESS} TO {{caller}}"
    again = (NAMES, f"ALTER FUNCTION {ADDRESS} OWNER TO {{owner}}", grants, comment)
    system.sql(ANEW, *again)
    system.in_sync()  # it means the same
    system.sql(ANEW, other, *again, "GRANT SELECT ON app.shelf TO {owner}")
    assert system.db.execute("SELECT pg_get_functiondef('app.fn_open'::regproc)") == before
    assert [item.address for item in system.plan().drift] == [f"function.{ADDRESS}"]
    system.settle()


# ------------------------------------------------------------------------------------------------------------- folders


def test_statements_behind_a_link(run: Path) -> None:
    elsewhere = run.parent / "elsewhere"
    (run / "statements").rename(elsewhere)
    (run / "statements").symlink_to(elsewhere)
    assert "! statements: not in SHA256SUMS" in judged(run)


def test_an_envelope_in_another_spelling(run: Path) -> None:
    """No statement has an envelope as its subject, so an envelope has one spelling only."""
    file = statement(run, "deployment")
    envelope = json.loads(file.read_text())
    for text in (
        json.dumps(envelope),
        file.read_text().replace('"payload":', '"payload": "", "payload":'),
        file.read_text().replace(envelope["payload"], envelope["payload"][:8] + "!" + envelope["payload"][8:]),
    ):
        file.write_text(text)
        summed(run)
        assert f"! {file.relative_to(run)}: is not written as reconciler writes it" in judged(run)


def test_a_pattern_signs_for_a_run(run: Path) -> None:
    """The name is the list's: a statement says by its key whose it is."""
    approvers = run.parent / "state" / "approvers"
    kept = "".join(line for line in approvers.read_text().splitlines(keepends=True) if not line.startswith("hand "))
    hand = person(run.parent, "hand")
    approvers.write_text(f'{kept}*@example.org namespaces="reconciler-evidence" {hand.public}\n')
    assert "4 in-toto statements, signatures included" in judged(run, code=0)
    approvers.write_text(f'{kept}*@example.org namespaces="reconciler-approval" {hand.public}\n')
    assert "for other purposes only, not for reconciler-evidence" in judged(run)


# -------------------------------------------------------------------------------------------------------- edited plans


SMUGGLED = {
    "a statement after the body": ("'true');\nEND", "'true');\nEND; DROP TABLE app.job", ServerProblem),
    "an attribute before the body": ("BEGIN ATOMIC", "ROWS 7 BEGIN ATOMIC", ServerProblem),
    "a setting before the body": ("BEGIN ATOMIC", "SET enable_sort TO off BEGIN ATOMIC", Stale),
    "another end of the arguments": ("length('ab')", "length('ab')) RETURNS boolean RETURN true --", ServerProblem),
}


@pytest.mark.parametrize(("old", "new", "error"), SMUGGLED.values(), ids=SMUGGLED)
def test_a_body_or_a_default_that_is_more_than_that(
    system: Governed, old: str, new: str, error: type[Exception]
) -> None:
    """Whoever writes plan files can put any text where the catalog's own is not compared; it is still one function."""
    system.function(ADDRESS, opened())
    plan = system.write().plan()
    forged = _made_to_fit(plan, old, new)
    before = system.db.execute("SELECT count(*) FROM pg_proc, pg_class")
    with pytest.raises(error):
        system.apply(forged)
    assert system.db.execute("SELECT count(*) FROM pg_proc, pg_class") == before
    assert system.entries() == 0
    system.settle()


def _made_to_fit(plan: Plan, old: str, new: str) -> Plan:
    """Another text in one function, with the statements and the digests that follow from it."""
    text = json.dumps(plan.dump())
    wanted, there = json.dumps(new)[1:-1], json.dumps(old)[1:-1]
    assert there in text
    made = Plan.model_validate_json(text.replace(there, wanted))
    declared = load_desired(made.desired)
    effects = effects_digest(dump_desired(declared), made.setup, made.changes)
    made = made.model_copy(update={"effects_digest": effects, "effect_digest": effect_digest(effects, made.target)})
    check_plan(made)
    return made


# ------------------------------------------------------------------------------------------------------------- a rehome


def test_a_rehome_is_told_as_what_it_is(system: Governed) -> None:
    """It makes no backup, whatever the policy says, and is not undone but said again."""
    system.state["governance"]["apply"]["backup"] = "governed"
    system.write().settle()
    plan, undo = system.root / "rehome.plan", system.root / "undo.plan"
    done = command("rehome", "-s", system.directory, "--out", plan, dsn=system.db.dsn)
    assert "\nBackup: none.\n" in done.stdout
    yes = ("approve", plan, "--as", "operator", "--reason", "a test", "--accept", "rehomes")
    assert command(*yes).returncode == 0
    folder = system.root / "evidence"
    assert command("apply", plan, "--evidence", folder, dsn=system.db.dsn).returncode == 0
    assert not list(folder.glob("backup-*"))
    assert "None: nothing but the ledger is written." in (folder / "report.md").read_text()
    done = command("revert", "2", "-s", system.directory, "--out", undo, dsn=system.db.dsn)
    assert (done.returncode, undo.exists()) == (4, False)
    assert "Entry 2 says where the ledger is" in done.stderr
    assert verify(system).returncode == 0
    system.in_sync()
