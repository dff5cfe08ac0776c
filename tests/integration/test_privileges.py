"""What a plan says of privileges: what its apply needs, of whom, what for, and what the role that made it lacks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import capabilities, desired, pg
from reconciler.errors import MissingPrivilege
from reconciler.model import Plan, canonical
from tests.integration import governed
from tests.integration.governed import Governed, applier

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Privileges
    from tests.servers import Database


def privileges(system: Governed, role: str | None = None) -> Privileges:
    """What `reconciler plan` shows of them, asked as this role."""
    dsn = system.db.dsn_as(role) if role else system.db.dsn
    wanted = desired.load(system.directory, None)
    made = system.plan(dsn)
    with pg.connect(dsn, "plan") as conn, pg.snapshot(conn):
        found = capabilities.shown(conn, wanted, made).privileges
    assert found is not None
    return found


def words(system: Governed, role: str | None = None) -> list[str]:
    return [need.words for need in privileges(system, role).missing]


def test_all_that_an_apply_needs(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    role = applier(system)
    found = privileges(system, role)
    assert [need.words for need in found.needed] == [
        f"membership with SET in role {system.owner}",
        f"CREATE on database {db.name}",
        "USAGE on schema app",
        f"CREATE on schema app for role {system.owner}",
        f"USAGE on schema app for role {system.owner}",
        "SELECT on app.cursor",
        "INSERT on app.heartbeat",
        "SELECT on app.heartbeat",
        "SELECT on app.job",
        "INSERT on app.settings",
        "SELECT on app.settings",
        "UPDATE on app.settings",
    ]
    assert (found.role, found.missing, found.not_seen) == (role, (), ())
    by_words = {need.words: need.addresses for need in found.needed}
    assert by_words["UPDATE on app.settings"] == ("gate.shop.open",)
    assert by_words["SELECT on app.job"] == ("invariant.no-blank-actor",)
    assert by_words["SELECT on app.cursor"] == ("marker.courier",)
    # What is listed is enough.
    system.apply(system.plan(), dsn=db.dsn_as(role))
    system.in_sync()
    assert system.plan().privileges is None


def test_a_plan_of_a_role_that_only_reads_is_no_error(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    role = db.role()
    system.sql(f"GRANT USAGE ON SCHEMA app TO {role}", f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {role}")
    saved = tmp_path / "p.plan"
    done = governed.command("plan", "-s", system.directory, "--dsn", db.dsn_as(role), "--out", saved)
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Apply needs: ")]
    assert line.startswith(
        f"Apply needs: membership with SET in {system.owner}; CREATE on database {db.name}; USAGE on schema app;"
    )
    assert line.endswith(
        f" Role {role}, which made this plan, lacks 5 of these 12: apply as a role that has all of it."
    )
    # The file keeps it, every format shows it, and a plan without it is as good.
    document = json.loads(saved.read_text())
    assert document["privileges"]["role"] == role
    assert len(document["privileges"]["missing"]) == 5
    for form in ("markdown", "html"):
        report = governed.command("show", saved, "--format", form).stdout
        assert "12 needed, role" in report
        assert "membership with SET in role" in report
    bare: dict[str, Any] = {key: value for key, value in document.items() if key not in {"privileges", "checksum"}}
    without = Plan.model_validate_json(canonical(bare))
    assert (without.privileges, without.effect_digest) == (None, document["effect_digest"])
    system.apply(without)
    system.in_sync()


def test_a_sequence_behind_a_column_that_an_insert_leaves_out(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    system.sql(
        "ALTER TABLE app.settings ADD COLUMN number serial, ADD COLUMN other bigint GENERATED ALWAYS AS IDENTITY",
    )
    role = applier(system)
    plan = system.plan()
    assert words(system, role) == ["USAGE on sequence app.settings_number_seq"]
    before = governed.image(db)
    with pytest.raises(MissingPrivilege, match=r"lacks USAGE on sequence app\.settings_number_seq\."):
        system.apply(plan, dsn=db.dsn_as(role))
    assert governed.image(db) == before
    system.sql(f"GRANT USAGE ON SEQUENCE app.settings_number_seq TO {role}")
    assert words(system, role) == []
    system.apply(plan, dsn=db.dsn_as(role))
    system.in_sync()


def test_what_triggers_do_is_said_to_be_unknown(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    system.sql(
        "CREATE TABLE app.log (name text)",
        "CREATE FUNCTION app.noted() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO app.log VALUES (NEW.name); RETURN NEW; END$$",
        "CREATE TRIGGER noted BEFORE INSERT ON app.settings FOR EACH ROW EXECUTE FUNCTION app.noted()",
        "CREATE TRIGGER gone BEFORE DELETE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.noted()",
    )
    role = applier(system)
    found = privileges(system, role)
    assert found.missing == ()
    assert found.not_seen == (
        "What app.noted() does, trigger noted of app.settings, needs the role that applies as well.",
    )
    before = governed.image(db)
    with pytest.raises(MissingPrivilege, match="permission denied for table log"):
        system.apply(system.plan(), dsn=db.dsn_as(role))
    assert governed.image(db) == before
    # As its owner it would not be the applying role's business.
    system.sql("ALTER FUNCTION app.noted() SECURITY DEFINER")
    assert privileges(system, role).not_seen == ()


def test_a_new_owner_takes_two_memberships(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    system.settle()
    system.sql("ALTER FUNCTION app.fn_total() OWNER TO {stranger}")
    role = applier(system)
    system.sql(f"GRANT USAGE ON SCHEMA reconciler TO {role}", f"GRANT SELECT, INSERT ON reconciler.entry TO {role}")
    assert words(system, role) == [f"membership with INHERIT in role {system.stranger}"]
    plan = system.plan()
    with pytest.raises(MissingPrivilege, match=f"membership with INHERIT in role {system.stranger}"):
        system.apply(plan, dsn=db.dsn_as(role))
    system.sql(f"GRANT {{stranger}} TO {role}")
    assert words(system, role) == []
    system.apply(plan, dsn=db.dsn_as(role))
    system.in_sync()


def test_a_retired_gate_is_locked_and_deleted(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    system.settle()
    system.state["gates"]["shop.limit"] = {"retire": "Not asked any more."}
    system.write()
    role = applier(system)
    system.sql(f"GRANT USAGE ON SCHEMA reconciler TO {role}", f"GRANT SELECT, INSERT ON reconciler.entry TO {role}")
    assert words(system, role) == ["DELETE on app.settings"]
    system.sql(f"REVOKE UPDATE ON app.settings FROM {role}", f"GRANT DELETE ON app.settings TO {role}")
    assert words(system, role) == ["UPDATE on app.settings"]
    system.sql(f"GRANT UPDATE ON app.settings TO {role}")
    system.apply(system.plan(), dsn=db.dsn_as(role))
    system.in_sync()


def test_what_may_stay_not_judged_needs_nothing(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    role = applier(system)
    system.sql(f"REVOKE SELECT ON app.job FROM {role}")
    assert words(system, role) == ["SELECT on app.job"]
    system.state["governance"]["allow_not_judged"] = ["no-blank-actor"]
    system.write()
    assert words(system, role) == []
