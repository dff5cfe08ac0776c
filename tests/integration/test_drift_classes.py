"""What drift says beside the class of each thing done by hand (test_drift_tampered.py): since when, and what to do."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired, drift, look
from reconciler.model import CLASSES
from reconciler.survey import taken
from tests.integration import governed
from tests.integration.governed import Governed, command
from tests.states import NOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.drift import DriftReport
    from tests.servers import Database, Server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    system = governed.shop(db, tmp_path)
    system.state["markers"]["courier"]["fresh"] = {"column": "seen", "within": "400d"}
    system.write().settle()
    return system


def looked(system: Governed, *fail_on: str) -> DriftReport:
    wanted = taken(desired.load(system.directory, None))
    return look.look(system.db.dsn, wanted, fail_on=frozenset(fail_on), allow_untested=False, now=NOW).report


def told(report: DriftReport) -> set[tuple[str, str]]:
    return {(item.item_class, item.address) for item in report.items}


GREET = "function.app.fn_greet(text, integer)"
TOTAL = "function.app.fn_total()"

ALTER = "ALTER FUNCTION app.fn_greet(text, integer)"


def test_a_ticking_executor_is_nobodys_item(shop: Governed) -> None:
    shop.sql("UPDATE app.heartbeat SET ticks = ticks + 1, seen = now(), kind = 'active'")
    report = looked(shop)
    assert report.items == ()
    (beat,) = report.heartbeats
    assert (beat.address, beat.within) == ("marker.courier", 400 * 86_400.0)
    assert beat.age is not None
    assert 0 <= beat.age < 3600
    assert "gate.shop.limit" in report.governed
    assert "invariant.till-shut" in report.governed


def test_a_locked_gate_that_is_armed_drifts_and_violates(shop: Governed) -> None:
    shop.sql("UPDATE app.settings SET value = 'true' WHERE name = 'shop.till'")
    report = looked(shop)
    assert told(report) == {("violated", "invariant.till-shut"), ("drift", "gate.shop.till")}
    assert drift.exit_code(report) == 3


def test_pending_alone_is_no_reason_to_exit(shop: Governed) -> None:
    shop.state["gates"]["shop.limit"]["value"] = "20"
    report = looked(shop.write())
    assert told(report) == {("pending", "gate.shop.limit")}
    assert (report.outcome, drift.exit_code(report)) == ("no_changes", 0)
    (item,) = report.items
    assert [(field.name, field.before, field.after) for field in item.fields] == [("value", "10", "20")]
    assert drift.exit_code(looked(shop, "pending")) == 2


def test_what_the_files_say_of_the_governance_itself_is_pending_too(shop: Governed) -> None:
    shop.state["governance"]["approval"]["expires"] = "48h"
    shop.state["governance"]["scope"]["functions"].append({"schema": "app", "matching": "more_*"})
    shop.state["invariants"]["till-shut"]["reason"] = "Another one, which is no other check."
    shop.state["gates"]["shop.open"]["from"] = ["false", "maybe"]
    report = looked(shop.write())
    assert told(report) == {("pending", f"{what}.shop") for what in ("policy", "scope")} | {
        ("pending", "gate.shop.open")
    }
    assert (report.outcome, drift.exit_code(report)) == ("no_changes", 0)
    fields = {item.address: [(one.name, one.before, one.after) for one in item.fields] for item in report.items}
    assert fields["policy.shop"] == [("approval.expires", "24h", "48h")]
    done = command("drift", "-s", shop.directory, dsn=shop.db.dsn)
    assert "No drift at" in done.stdout
    assert "3 pending." in done.stdout
    assert drift.exit_code(looked(shop, "pending")) == 2
    shop.settle()
    assert looked(shop).items == ()


def test_an_object_that_moved_says_so_on_its_own_line(shop: Governed) -> None:
    shop.state["gates"]["shop.open"]["from"] = ["false", "maybe"]
    shop.write().sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    assert told(looked(shop)) == {("drift", "gate.shop.open")}


def test_a_row_that_must_stand_is_watched_after_its_line_is_gone(shop: Governed) -> None:
    shop.state["invariants"]["limit"] = {"gate": "shop.limit", "equals": "10", "row": "untouched"}
    shop.state["gates"]["shop.phase"]["value"] = "three"
    shop.write().settle()
    del shop.state["invariants"]["limit"]
    shop.write().sql("UPDATE app.settings SET value = value WHERE name = 'shop.limit'")
    report = looked(shop)
    assert told(report) == {("violated", "invariant.limit")}
    assert drift.exit_code(report) == 3
    assert report.items[0].reason == "shop.limit is '10', but its row was written since the last apply"
    assert "nothing stops the next apply" in report.items[0].todo
    assert shop.plan().outcome == "changes"


def test_both_moved_is_one_item_with_three_values(shop: Governed) -> None:
    shop.state["gates"]["shop.limit"]["value"] = "20"
    shop.write().sql("UPDATE app.settings SET value = '30' WHERE name = 'shop.limit'")
    report = looked(shop)
    (item,) = report.items
    assert (item.item_class, drift.exit_code(report)) == ("both", 2)
    values: list[Any] = [(side or {})["value"] for side in (item.before, item.after, item.wanted)]
    assert values == ["10", "30", "20"]


def test_what_the_files_forget_and_somebody_changes(shop: Governed) -> None:
    del shop.state["gates"]["shop.limit"]
    shop.write().sql("UPDATE app.settings SET value = '30' WHERE name = 'shop.limit'")
    (item,) = looked(shop).items
    assert (item.item_class, item.wanted) == ("both", None)
    assert "forget" in item.todo


def test_a_moved_pin_is_told_from_another_violation(shop: Governed) -> None:
    shop.state["invariants"]["jobs"] = {"pin": {"table": "app.job"}}
    assert command("pin", "-s", shop.write().directory, dsn=shop.db.dsn).returncode == 0
    assert told(looked(shop)) == {("pending", "invariant.jobs")}
    shop.settle()
    assert looked(shop).items == ()
    shop.sql("ALTER TABLE app.job ADD COLUMN more int")
    report = looked(shop)
    assert told(report) == {("moved_pin", "invariant.jobs")}
    assert drift.exit_code(report) == 3
    assert "reconciler pin" in report.items[0].todo


def test_a_role_that_may_not_read_the_ledger(shop: Governed) -> None:
    planner = shop.db.role()
    shop.sql(
        f"GRANT USAGE ON SCHEMA app TO {planner}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {planner}",
        "UPDATE app.settings SET value = '30' WHERE name = 'shop.limit'",
    )
    wanted = taken(desired.load(shop.directory, None))
    dsn = shop.db.dsn_as(planner)
    report = look.look(dsn, wanted, fail_on=frozenset(), allow_untested=False, now=NOW).report
    assert told(report) == {("drift", "gate.shop.limit"), ("ledger_not_readable", "ledger.reconciler")}


def test_the_command_tells_all_of_it(shop: Governed) -> None:
    shop.sql("UPDATE app.settings SET value = '30' WHERE name = 'shop.limit'")
    done = command("drift", "-s", shop.directory, dsn=shop.db.dsn)
    assert done.returncode == 2
    assert "  ~ gate.shop.limit  (changed since the last apply)" in done.stdout
    assert "its row says (updated_at 20" in done.stdout
    assert "not known when: track_commit_timestamp is off" in done.stdout
    assert "What to do:" in done.stdout
    document = json.loads(command("drift", "-s", shop.directory, "--format", "json", dsn=shop.db.dsn).stdout)
    (item,) = document["items"]
    assert document["format_version"] == "1.1"
    assert (item["class"], item["address"], item["fails"]) == ("drift", "gate.shop.limit", True)
    assert item["fields"] == [{"name": "value", "before": "10", "after": "30"}]
    assert set(item) == {
        "address", "class", "kind", "actions", "before", "after", "wanted", "fields", "reason", "next", "fails",
        "attribution",
    }  # fmt: skip
    for form in ("markdown", "html"):
        shown = command("drift", "-s", shop.directory, "--format", form, dsn=shop.db.dsn)
        assert shown.returncode == 2
        assert "track_commit_timestamp" in shown.stdout
    assert [name for name in CLASSES if f"    {name}: " in done.stdout] == ["drift"]


def test_a_name_that_no_finding_has_is_said_with_the_one_that_was_meant(shop: Governed) -> None:
    done = command("drift", "-s", shop.directory, "--fail-on", "stale_hartbeat", dsn=shop.db.dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no finding stale_hartbeat" in done.stderr
    assert "Did you mean stale_heartbeat?" in done.stderr


# ---------------------------------------------------------------------------------------------------------- attribution


@contextmanager
def tracked(own_server: Callable[..., Server], name: str) -> Iterator[Database]:
    from tests.servers import Database

    server = own_server(track_commit_timestamp="on")
    main = Database(server, "postgres")
    main.execute(f"CREATE DATABASE {name}")
    db = Database(server, name)
    yield db
    db.drop()
    main.conn.close()


def test_postgresql_knows_when_where_it_keeps_commit_times(own_server: Callable[..., Server], tmp_path: Path) -> None:
    with tracked(own_server, "kept") as db:
        shop = governed.shop(db, tmp_path)
        shop.settle()
        shop.sql(
            "UPDATE app.settings SET value = '30' WHERE name = 'shop.limit'",
            "COMMENT ON FUNCTION app.fn_total() IS 'Another.'",
            f"{ALTER} COST 7",
            "DELETE FROM app.settings WHERE name = 'shop.phase'",
        )
        known = {item.address: item.attribution for item in looked(shop).items}
        times = {
            "gate.shop.limit": "SELECT xmin::text, to_char(pg_xact_commit_timestamp(xmin) AT TIME ZONE 'UTC',"
            """ 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM app.settings WHERE name = 'shop.limit'""",
            TOTAL: "SELECT d.xmin::text, to_char(pg_xact_commit_timestamp(d.xmin) AT TIME ZONE 'UTC',"
            """ 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM pg_description d WHERE description = 'Another.'""",
            GREET: "SELECT xmin::text, to_char(pg_xact_commit_timestamp(xmin) AT TIME ZONE 'UTC',"
            """ 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM pg_proc WHERE proname = 'fn_greet'""",
        }
        for address, query in times.items():
            attribution = known[address]
            assert attribution is not None
            assert (attribution.transaction, attribution.changed_at) == db.execute(query)[0]
            assert attribution.owner == shop.owner
            assert len(attribution.not_known) == 1
            assert attribution.not_known[0].startswith("who did it")
        gone = known["gate.shop.phase"]
        assert gone is not None
        assert (gone.changed_at, gone.not_known[0]) == (None, "when: what is gone leaves no trace")
        shop.sql("REVOKE EXECUTE ON FUNCTION pg_catalog.pg_xact_commit_timestamp(xid) FROM PUBLIC")
        planner = db.role()
        shop.sql(
            f"GRANT USAGE ON SCHEMA app, reconciler TO {planner}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA app, reconciler TO {planner}",
        )
        wanted = taken(desired.load(shop.directory, None))
        report = look.look(db.dsn_as(planner), wanted, fail_on=frozenset(), allow_untested=False, now=NOW).report
        limit = next(item.attribution for item in report.items if item.address == "gate.shop.limit")
        assert limit is not None
        assert limit.not_known[0] == "when: this role may not execute pg_xact_commit_timestamp(xid)"
