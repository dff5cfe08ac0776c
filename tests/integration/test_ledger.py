"""The ledger's own schema: made beforehand by a DBA, upgraded, older and newer than the program, and attacked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from reconciler import setup
from reconciler.errors import Refused
from tests.integration import governed
from tests.integration.governed import applier

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


def first_version(system: Governed) -> None:
    """The ledger as the first version of its schema made it."""
    system.db.execute(setup.source().split("-- Version 2:")[0])


def test_the_version_stands_where_a_dba_looks(system: Governed) -> None:
    system.db.execute(setup.source())
    said = system.db.execute("SELECT obj_description('reconciler'::regnamespace)")[0][0]
    assert said.endswith(f" Version {setup.VERSION}.")


def test_an_older_ledger_is_upgraded_by_an_approved_apply(system: Governed) -> None:
    first_version(system)
    plan = system.plan()
    upgrade = plan.setup[0]
    assert (upgrade.address, upgrade.before, upgrade.after) == ("ledger.reconciler", {"version": 1}, {"version": 2})
    assert upgrade.hazards == ()
    assert all("CREATE" not in statement.text for statement in upgrade.statements)
    assert system.apply(plan, initialize=True).outcome == "applied"
    system.in_sync()
    assert system.db.execute(
        "SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE tgrelid = 'reconciler.entry'::regclass"
        " AND NOT tgisinternal"
    ) == [("A",)]


def test_an_older_ledger_goes_on_with_its_chain(system: Governed) -> None:
    first_version(system)
    system.apply(system.plan(), initialize=True)
    with system.around_the_trigger():
        pass
    system.sql(
        "ALTER TABLE reconciler.entry ENABLE TRIGGER entry_is_append_only_row",
        "ALTER TABLE reconciler.entry ENABLE TRIGGER entry_is_append_only_statement",
    )
    assert [change.address for change in system.plan().setup] == ["ledger.reconciler"]
    system.settle()
    assert system.entries() == 2


def test_half_an_upgrade_is_no_ledger(system: Governed) -> None:
    first_version(system)
    system.sql("ALTER TABLE reconciler.entry ENABLE ALWAYS TRIGGER entry_is_append_only_row")
    with pytest.raises(Refused) as refused:
        system.plan()
    assert refused.value.details == ("its triggers are not those of a ledger",)
    assert "a newer reconciler" in refused.value.hint


@pytest.mark.parametrize("statement", ["UPDATE reconciler.entry SET hash = hash", "DELETE FROM reconciler.entry"])
def test_append_only_in_every_session(system: Governed, statement: str) -> None:
    """The first version's triggers kept quiet in a session that replicates."""
    system.settle()
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        system.sql("SET session_replication_role = replica", statement)
    system.sql("SET session_replication_role = origin")
    system.in_sync()


def test_made_beforehand_for_an_owner_that_nobody_is(system: Governed) -> None:
    """A DBA runs what `ledger --print-sql --owner` prints; the role that applies may add entries and nothing else."""
    keeper = system.db.role("NOLOGIN")
    printed = governed.command("ledger", "--print-sql", "--owner", keeper)
    assert printed.returncode == 0
    system.sql(printed.stdout)
    role = applier(system)
    system.sql(
        f"REVOKE CREATE ON DATABASE {system.db.name} FROM {role}",
        f"GRANT USAGE ON SCHEMA reconciler TO {role}",
        f"GRANT SELECT, INSERT ON reconciler.entry TO {role}",
    )
    dsn = system.db.dsn_as(role)
    plan = system.plan(dsn)
    assert [change.kind for change in plan.setup] == ["policy", "scope"]
    assert system.apply(plan, dsn=dsn, initialize=True).problems == ()
    system.in_sync()
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in (
            "UPDATE reconciler.entry SET hash = hash",
            "DELETE FROM reconciler.entry",
            "TRUNCATE reconciler.entry",
            "ALTER TABLE reconciler.entry DISABLE TRIGGER ALL",
            "DROP SCHEMA reconciler CASCADE",
            f"SET ROLE {keeper}",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())


@pytest.mark.parametrize("login", [True, False])
def test_an_owner_that_somebody_could_be_is_not_trusted(system: Governed, login: bool) -> None:
    keeper = system.db.role("LOGIN" if login else "NOLOGIN")
    if not login:
        system.sql(f"GRANT {keeper} TO {{stranger}}")
    system.sql(setup.source(owner=keeper))
    role = applier(system)
    system.sql(f"GRANT USAGE ON SCHEMA reconciler TO {role}", f"GRANT SELECT, INSERT ON reconciler.entry TO {role}")
    dsn = system.db.dsn_as(role)
    plan = system.plan(dsn)
    with pytest.raises(Refused) as refused:
        system.apply(plan, dsn=dsn, initialize=True)
    assert refused.value.details == (f"it belongs to {keeper}, whose code this role should not run",)
    assert system.entries() == 0


def test_a_dba_upgrades_beforehand(system: Governed) -> None:
    first_version(system)
    printed = governed.command("ledger", "--print-sql", "--since", "1")
    system.sql(printed.stdout)
    assert "ledger" not in {change.kind for change in system.plan().setup}
    assert governed.command("ledger", "--print-sql", "--since", str(setup.VERSION)).stdout == ""
    newer = governed.command("ledger", "--print-sql", "--since", str(setup.VERSION + 1))
    assert (newer.returncode, "There is no version 3 of the ledger" in newer.stderr) == (1, True)


def test_an_owner_with_any_name() -> None:
    name = 'odd "name"; DROP SCHEMA app CASCADE; --'
    assert 'OWNER TO "odd ""name""; DROP SCHEMA app CASCADE; --";' in setup.source(owner=name)


def test_two_names_side_by_side(system: Governed) -> None:
    """Each has a chain of its own; what one owns, another may not."""
    system.settle()
    other = governed.Governed(system.db, system.root / "other")
    other.state = {
        "governance": {
            **system.state["governance"],
            "name": "till",
            "scope": {"gates": [{"store": "settings", "matching": "till.*"}]},
        },
        "gates": {"till.open": {"value": "true", "reason": "Open."}},
    }
    other.root.mkdir()
    other.write()
    plan = other.plan()
    assert "ledger" not in {change.kind for change in plan.setup}
    other.apply(plan, initialize=True)
    other.in_sync()
    system.in_sync()
    assert system.db.execute("SELECT name, number, previous FROM reconciler.entry ORDER BY name") == [
        ("shop", 1, "0" * 64),
        ("till", 1, "0" * 64),
    ]

    other.state["governance"]["scope"]["gates"].append({"store": "settings", "matching": "shop.o*"})
    other.write()
    with pytest.raises(Refused, match="overlaps with what another name governs") as refused:
        other.plan()
    assert refused.value.details == ("shop: gates shop.o* and shop.* of app.settings",)
    assert governed.command("drift", "-s", other.directory, dsn=other.db.dsn).returncode == 4


def test_the_first_hash_belongs_in_the_files(system: Governed) -> None:
    """Files that name it are never taken for those of a first apply when the ledger was lost."""
    done = system.settle()
    assert (done.genesis, done.hash) == (True, system.db.execute("SELECT hash FROM reconciler.entry")[0][0])
    system.state["governance"]["targets"]["test"]["ledger"] = done.hash
    system.write().in_sync()
    system.sql("DROP SCHEMA reconciler CASCADE")
    with pytest.raises(Refused, match="does not exist"):
        system.plan()
