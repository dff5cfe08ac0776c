"""Ways to get something past the plan, the approval or the last look that were found by trying; each must stay shut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import desired, drift, pg
from reconciler import plan as planning
from reconciler.errors import InputError, NotApproved, PlanDamaged, Refused, ServerProblem, Stale
from reconciler.survey import survey
from reconciler.trust import check_plan
from tests.integration import governed

if TYPE_CHECKING:
    from tests.integration.governed import Governed
    from tests.servers import Database


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


# ------------------------------------------------------------------------------------------------------ edited plans


def test_an_approval_is_not_made_for_the_digest_of_another_plan(shop: Governed) -> None:
    benign = shop.plan()
    shop.state["gates"]["shop.limit"]["value"] = "1000000"
    evil = shop.write().plan()
    stolen = {"effect_digest": evil.effect_digest, "effects_digest": evil.effects_digest}
    dressed = benign.model_copy(update=stolen)
    with pytest.raises(PlanDamaged, match="digests are not those of its content"):
        shop.approve(dressed)
    path = shop.save(dressed)
    shown = governed.command("show", path)
    assert (shown.returncode, shown.stdout) == (1, "")


def test_a_hazard_taken_out_of_the_file_is_not_out_of_the_plan(shop: Governed) -> None:
    plan = shop.plan()
    quiet = tuple(change.model_copy(update={"hazards": ()}) for change in plan.changes)
    effects = planning.effects_digest(plan.desired, plan.setup, quiet)
    edited = plan.model_copy(
        update={
            "changes": quiet,
            "effects_digest": effects,
            "effect_digest": planning.effect_digest(effects, plan.target),
        }
    )
    with pytest.raises(NotApproved, match="statements or hazards"):
        shop.approve(edited)


def test_what_the_ledger_records_is_what_was_seen_and_not_what_the_file_says(shop: Governed) -> None:
    plan = shop.plan()
    forged = plan.model_copy(update={"tool": "forged", "findings": (), "not_compared": ()})
    shop.apply(forged, [shop.approve(forged)])
    body = shop.db.execute("SELECT body FROM reconciler.entry")[0][0]
    assert "forged" not in body
    shop.in_sync()


# --------------------------------------------------------------------------------------------------- strangers' files


@pytest.mark.parametrize("where", ["bind", "passive_while", "invariant"])
def test_a_file_cannot_allow_itself_a_function(shop: Governed, where: str) -> None:
    shop.state["governance"]["allow_functions"] = ["pg_catalog.pg_sleep", "pg_catalog.pg_notify"]
    marker = shop.state["markers"]["courier"]
    if where == "bind":
        marker["bind"]["seen"]["query"] = "SELECT pg_catalog.pg_sleep(600)::text"
    elif where == "passive_while":
        marker["passive_while"] = "pg_catalog.pg_sleep(600) IS NULL"
        shop.sql("INSERT INTO app.heartbeat VALUES ('courier', 'legacy', now())")
    else:
        shop.state["invariants"]["naps"] = {"query": "SELECT pg_catalog.pg_sleep(600)", "rows": 1}
    shop.write()
    if where == "bind":
        with pytest.raises(Refused) as caught:
            shop.plan()
        assert "is not allowed by the installed policy" in caught.value.details[0]
    else:
        plan = shop.plan()
        said = [finding.message for finding in plan.findings] + [verdict.detail for verdict in plan.invariants]
        assert any("the installed policy" in line and "pg_sleep" in line for line in said)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT c.secret::int4::text FROM app.vault AS c",
        "SELECT ('\"' || c.secret)::int4::text FROM app.vault AS c",
        "SELECT c.secret::regclass::text FROM app.vault AS c",
        "SELECT c.secret::regrole::text FROM app.vault AS c",
        "SELECT c.secret::jsonb::text FROM app.vault AS c",
        "SELECT pg_catalog.has_table_privilege(c.secret, 'SELECT')::text FROM app.vault AS c",
    ],
)
@pytest.mark.parametrize("where", ["bind", "equals", "rows"])
def test_an_error_of_the_server_does_not_quote_what_it_read(shop: Governed, query: str, where: str) -> None:
    shop.sql("CREATE TABLE app.vault (secret text)", "INSERT INTO app.vault VALUES ('hunter2')")
    if where == "bind":
        shop.state["markers"]["courier"]["bind"]["seen"]["query"] = query
    else:
        shop.state["invariants"]["curious"] = {"query": query, **({"rows": 3} if where == "rows" else {"equals": "x"})}
    shop.write()
    done = governed.command("plan", "-s", shop.directory, dsn=shop.db.dsn)
    assert "hunter2" not in done.stdout + done.stderr
    if where != "rows":
        assert done.returncode == 1
        assert "SQLSTATE" in done.stderr


@pytest.mark.parametrize("table", ["pg_catalog.pg_authid", "information_schema.sql_features", "reconciler.entry"])
def test_a_system_table_is_no_gate_store_and_holds_no_marker(shop: Governed, table: str) -> None:
    shop.state["governance"]["gate_stores"]["other"] = {"table": table, "key": "rolname", "value": "rolpassword"}
    shop.state["markers"]["courier"]["table"] = table
    shop.write()
    with pytest.raises(InputError) as caught:
        shop.plan()
    assert sum("belongs to the system" in str(problem) for problem in caught.value.problems) >= 1


def test_a_glob_over_a_large_table_stays_small(shop: Governed) -> None:
    shop.sql(
        "INSERT INTO app.settings (name, value) SELECT 'shop.x' || i, repeat('x', 1000) FROM generate_series(1, 5000) i"
    )
    findings = [finding for finding in shop.plan().findings if finding.code == "undeclared"]
    assert len(findings) == 101
    assert findings[-1].message.startswith("4900 more keys") or findings[0].message.startswith("4900 more keys")


def test_the_proposed_policy_does_not_tolerate_what_cannot_be_judged(shop: Governed) -> None:
    shop.state["invariants"]["nowhere"] = {"query": "SELECT FROM app.nowhere", "rows": 0}
    shop.state["governance"]["allow_not_judged"] = ["nowhere"]
    shop.write()
    shop.sql("CREATE TABLE app.nowhere ()")
    shop.settle()
    shop.sql("DROP TABLE app.nowhere")
    assert governed.command("drift", "-s", shop.directory, dsn=shop.db.dsn).returncode == 0
    shop.state["invariants"]["nor-here"] = {"query": "SELECT FROM app.nor_here", "rows": 0}
    shop.state["governance"]["allow_not_judged"] = ["nowhere", "nor-here"]
    shop.write()
    assert governed.command("drift", "-s", shop.directory, dsn=shop.db.dsn).returncode == 3


# ------------------------------------------------------------------------------------------------ code run as somebody


def with_via(shop: Governed) -> Governed:
    shop.function(
        "app.fn_register(text, timestamp with time zone)",
        """CREATE FUNCTION app.fn_register(p_worker text, p_seen timestamptz) RETURNS jsonb
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, app, pg_temp AS $f$
        BEGIN
            INSERT INTO app.heartbeat VALUES (p_worker, 'legacy', p_seen) ON CONFLICT DO NOTHING;
            RETURN jsonb_build_object('refused', false);
        END $f$;""",
    )
    shop.state["markers"]["courier"]["via"] = {
        "function": "app.fn_register",
        "args": {"p_worker": "courier", "p_seen": {"bind": "seen"}},
    }
    return shop.write()


def test_an_overload_is_not_called_in_the_place_of_the_declared_function(shop: Governed) -> None:
    with_via(shop)
    plan = shop.plan()
    shop.sql(
        """
        CREATE FUNCTION app.fn_register(p_worker text, p_seen text) RETURNS jsonb LANGUAGE plpgsql AS $f$
        BEGIN EXECUTE format('ALTER ROLE %I SUPERUSER', '{stranger}'); RETURN '{}'; END $f$
        """
    )
    shop.apply(plan)
    superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = %s"
    assert shop.db.execute(superuser, [shop.stranger]) == [(False,)]
    assert shop.db.execute("SELECT kind FROM app.heartbeat") == [("legacy",)]


def test_an_operator_of_another_schema_does_not_stand_in(shop: Governed) -> None:
    shop.sql(
        "ALTER TABLE app.settings ALTER name TYPE varchar(50), ALTER value TYPE varchar(50)",
        "CREATE TABLE app.trace (who text)",
        """
        CREATE FUNCTION app.eq(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS $f$
        BEGIN INSERT INTO app.trace VALUES (current_user); RETURN $1::text = $2::text; END $f$
        """,
        "CREATE OPERATOR app.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = app.eq)",
    )
    shop.settle()
    assert shop.db.execute("SELECT count(*) FROM app.trace") == [(0,)]


def test_no_trigger_can_be_added_once_the_rows_are_locked(shop: Governed) -> None:
    plan = shop.plan()
    seen: list[str] = []

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:  # noqa: ARG001 - as called
        if stage != "execute" or seen:
            return
        with psycopg.connect(shop.db.dsn, autocommit=True) as conn:
            conn.execute("SET lock_timeout = '100ms'")
            for statement in (
                "CREATE TRIGGER t BEFORE UPDATE ON app.settings EXECUTE FUNCTION suppress_redundant_updates_trigger()",
                "CREATE RULE r AS ON UPDATE TO app.settings DO INSTEAD NOTHING",
                "ALTER TABLE app.heartbeat ADD COLUMN extra text",
            ):
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    conn.execute(statement)
                seen.append(statement)

    from reconciler import apply as applying

    applying.apply(shop.request(plan), progress)
    assert len(seen) == 3
    shop.in_sync()


@pytest.mark.parametrize("made", ["with a trigger", "alike", "as something else"])
def test_somebody_elses_ledger_is_not_written_to(shop: Governed, made: str) -> None:
    shop.sql(f'GRANT CREATE ON DATABASE "{shop.db.execute("SELECT current_database()")[0][0]}" TO {{stranger}}')
    with psycopg.connect(shop.db.dsn_as(shop.stranger), autocommit=True) as conn:
        if made == "as something else":
            conn.execute("CREATE SCHEMA reconciler")
        else:
            conn.execute(governed.command("ledger", "--print-sql").stdout.encode())
        if made == "with a trigger":
            evil = (
                "CREATE FUNCTION reconciler.evil() RETURNS trigger LANGUAGE plpgsql AS $f$"
                f" BEGIN ALTER ROLE {shop.stranger} SUPERUSER; RETURN NULL; END $f$"
            )
            conn.execute(evil.encode())
            conn.execute(
                "CREATE TRIGGER evil AFTER INSERT ON reconciler.entry FOR EACH ROW EXECUTE FUNCTION reconciler.evil()"
            )
    if made == "alike":
        plan = shop.plan()
        with pytest.raises(Refused, match="not the ledger of this program") as caught:
            shop.apply(plan, initialize=True)
        assert "whose code this role should not run" in caught.value.details[0]
    else:
        with pytest.raises(Refused, match="not the ledger of this program"):
            shop.plan()
    assert shop.db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [shop.stranger]) == [(False,)]


# -------------------------------------------------------------------------------------------------- effects at COMMIT


def test_a_cursor_that_would_run_at_commit_rolls_back(shop: Governed) -> None:
    shop.sql(
        """
        CREATE FUNCTION app.late() RETURNS int LANGUAGE plpgsql VOLATILE AS $f$
        BEGIN INSERT INTO app.job VALUES (1, 'late'); RETURN 1; END $f$
        """,
        """
        CREATE FUNCTION app.open_it() RETURNS trigger LANGUAGE plpgsql AS $f$
        BEGIN EXECUTE 'DECLARE held CURSOR WITH HOLD FOR SELECT app.late()'; RETURN NULL; END $f$
        """,
        "CREATE TRIGGER open_it AFTER UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.open_it()",
    )
    before = governed.image(shop.db)
    with pytest.raises(Stale, match="cursor WITH HOLD"):
        shop.apply(shop.plan())
    assert governed.image(shop.db) == before


@pytest.mark.parametrize("links", [1, 4, 60])
def test_triggers_that_defer_each_other_are_run_to_the_last(shop: Governed, links: int) -> None:
    shop.sql(
        "CREATE TABLE app.chain (n int)",
        f"""
        CREATE FUNCTION app.next_link() RETURNS trigger LANGUAGE plpgsql AS $f$
        BEGIN
            SET CONSTRAINTS ALL DEFERRED;
            IF NEW.n < {links} THEN INSERT INTO app.chain VALUES (NEW.n + 1);
            ELSE UPDATE app.settings SET value = 'late' WHERE name = 'shop.limit'; END IF;
            RETURN NULL;
        END $f$
        """,
        "CREATE FUNCTION app.first_link() RETURNS trigger LANGUAGE plpgsql AS $f$"
        " BEGIN INSERT INTO app.chain VALUES (1); RETURN NULL; END $f$",
        "CREATE CONSTRAINT TRIGGER link AFTER INSERT ON app.chain DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION app.next_link()",
        "CREATE TRIGGER begin_chain AFTER UPDATE ON app.settings FOR EACH ROW WHEN (NEW.name = 'shop.open')"
        " EXECUTE FUNCTION app.first_link()",
    )
    before = governed.image(shop.db)
    with pytest.raises(Stale) as caught:
        shop.apply(shop.plan())
    assert governed.image(shop.db) == before
    expected = "keep writing" if links == 60 else "was not what was approved"
    assert expected in caught.value.message


# ---------------------------------------------------------------------------------------- protection that is taken away


def test_a_rule_that_is_weakened_is_shown_and_needs_acceptance(shop: Governed) -> None:
    shop.settle()
    del shop.state["gates"]["shop.till"]["lock"], shop.state["gates"]["shop.till"]["safe"]
    shop.state["gates"]["shop.till"]["value"] = "true"
    shop.state["invariants"].pop("till-shut")
    plan = shop.write().plan()
    assert {"arms_gate", "moves_from_safe", "changes_policy", "forgets"} <= set(plan.hazards)
    assert [(change.address, change.kind) for change in plan.setup] == [("gate.shop.till", "rules")]
    shop.apply(plan)
    shop.in_sync()


@pytest.mark.parametrize(
    "weaken",
    [
        lambda state: state["invariants"]["no-blank-actor"].update(query="SELECT FROM app.job WHERE false"),
        lambda state: state["gates"]["shop.open"].update({"lock": "free"}),
        lambda state: state["governance"]["scope"].update(functions=[]),
        lambda state: state["governance"]["approval"].update(expires="12h"),
    ],
)
def test_a_weaker_check_or_scope_is_no_empty_plan(shop: Governed, weaken: Any) -> None:
    shop.settle()
    weaken(shop.state)
    plan = shop.write().plan()
    assert plan.changes == ()
    assert plan.hazards == ("changes_policy",)
    shop.apply(plan)
    shop.in_sync()


def test_another_wording_is_no_other_rule(shop: Governed) -> None:
    shop.settle()
    shop.state["gates"]["shop.open"]["reason"] = "Open, and said better."
    shop.state["invariants"]["no-blank-actor"]["reason"] = "Everybody has a name."
    shop.write()
    shop.in_sync()


def test_what_the_files_forget_is_still_watched(shop: Governed) -> None:
    shop.settle()
    del shop.state["gates"]["shop.open"]
    shop.state["invariants"].pop("no-blank-actor")
    shop.state["governance"]["scope"]["gates"] = []
    shop.write()
    assert {item.address for item in shop.drift().pending} == {"gate.shop.open"}
    shop.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    report = shop.drift()
    assert [item.address for item in report.drift] == ["gate.shop.open"]
    assert drift.exit_code(report) == 2
    shop.sql("INSERT INTO app.job VALUES (1, ' ')")
    assert drift.exit_code(shop.drift()) == 3


def test_a_child_table_cannot_hide_a_gate(shop: Governed) -> None:
    shop.settle()
    shop.sql(
        "CREATE TABLE app.hidden () INHERITS (app.settings)", "INSERT INTO app.hidden VALUES ('shop.till', 'true')"
    )
    with pytest.raises(ServerProblem, match="has child tables"):
        shop.plan()


# ---------------------------------------------------------------------------------------------------------- the ledger


REPLACED = """
CREATE OR REPLACE FUNCTION reconciler.entry_is_append_only() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'
"""


def forge(shop: Governed, body: str) -> None:
    shop.db.execute(
        "INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, number + 1, gen_random_uuid(), '{}', %(body)s, hash,"
        " encode(sha256(convert_to(hash || %(body)s, 'UTF8')), 'hex') FROM reconciler.entry"
        " ORDER BY number DESC LIMIT 1",
        {"body": body},
    )


@pytest.mark.parametrize("body", ["x", "{}", "[]", "null", '{"policy": {}}', '"' * 2])
def test_an_entry_that_nobody_here_wrote_is_one_sentence(shop: Governed, body: str) -> None:
    shop.settle()
    forge(shop, body)
    for name in ("plan", "drift"):
        done = governed.command(name, "-s", shop.directory, dsn=shop.db.dsn)
        assert (done.returncode, done.stdout) == (4, "")
        assert "is not one that reconciler wrote" in done.stderr


def test_columns_beside_the_hash_do_not_move_unseen(shop: Governed) -> None:
    shop.settle()
    with shop.around_the_trigger():
        shop.sql("UPDATE reconciler.entry SET approval_ids = '{}'")
    with pytest.raises(Refused, match="does not have the ids of its body"):
        shop.plan()


@pytest.mark.parametrize(
    "tamper",
    [
        "ALTER TABLE reconciler.entry DISABLE TRIGGER entry_is_append_only_row",
        "DROP TRIGGER entry_is_append_only_statement ON reconciler.entry",
        "ALTER TABLE reconciler.entry DROP CONSTRAINT entry_hash_check",
        REPLACED,
        "CREATE RULE r AS ON INSERT TO reconciler.entry DO ALSO NOTHING",
        "CREATE TABLE reconciler.more () INHERITS (reconciler.entry)",
        "ALTER TABLE reconciler.entry ADD COLUMN extra text",
    ],
)
def test_a_ledger_that_was_taken_apart_is_refused(shop: Governed, tamper: str) -> None:
    shop.settle()
    shop.sql(tamper)
    with pytest.raises(Refused, match="not the ledger of this program"):
        shop.plan()


# ----------------------------------------------------------------------------------------------------------- approvals


@pytest.mark.parametrize(
    "alias", ["Operator", "OPERATOR", "ope rator", "".join(chr(ord(char) + 0xFEE0) for char in "operator")]
)
def test_one_person_with_two_spellings_is_one_person(shop: Governed, alias: str) -> None:
    shop.state["governance"]["approval"]["required"] = 2
    plan = shop.write().plan()
    first = shop.approve(plan, approver="operator")
    second = shop.approve(plan, approver="second").model_copy(update={"approver": alias})
    with pytest.raises(NotApproved) as caught:
        shop.apply(plan, [first, second])
    assert caught.value.details[-1] == "1 of 2 approvals"
    shop.apply(plan, [first, shop.approve(plan, approver="second")])
    shop.in_sync()


def test_an_approval_for_something_else_is_not_recorded(shop: Governed) -> None:
    plan = shop.plan()
    good = shop.approve(plan)
    other = shop.approve(plan, approver="somebody").model_copy(update={"effect_digest": "0" * 64})
    shop.apply(plan, [other, good])
    body = shop.db.execute("SELECT body FROM reconciler.entry")[0][0]
    assert "somebody" not in body


def test_a_pipe_beside_the_plan_does_not_hang_the_apply(shop: Governed) -> None:
    path = shop.save(shop.plan())
    os.mkfifo(f"{path}.x.approval.json")
    done = governed.command("apply", path, "--initialize", dsn=shop.db.dsn)
    assert done.returncode == 1
    assert "is no ordinary file" in done.stderr


def test_committed_is_success_even_when_nobody_can_read_it(shop: Governed) -> None:
    plan = shop.plan()
    path = shop.save(plan, shop.approve(plan))
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from reconciler.cli import main; main()", "apply", str(path), "--initialize"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RECONCILER_DSN": shop.db.dsn},
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shop.in_sync()


def test_strings_are_read_the_standard_way_whatever_the_database_says(shop: Governed) -> None:
    name = shop.db.execute("SELECT current_database()")[0][0]
    shop.sql(f'ALTER DATABASE "{name}" SET standard_conforming_strings = off')
    shop.sql("CREATE TABLE app.trace (who text)")
    # Read the old way the literal ends later, and the rest is another query.
    shop.state["invariants"]["quotes"] = {"query": "SELECT '\\' AS a, ' FROM app.job --' AS b", "rows": 1}
    shop.write()
    with pg.connect(shop.db.dsn, "plan") as conn, pg.snapshot(conn):
        found = survey(conn, desired.load(shop.directory, None))
    held = {verdict.address: verdict.status for verdict in found.verdicts}
    assert held["invariant.quotes"] == "held"


def test_a_plan_that_is_whole_passes(shop: Governed) -> None:
    assert check_plan(shop.plan()).name == "shop"
