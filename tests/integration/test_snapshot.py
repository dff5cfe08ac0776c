"""`snapshot` and `plan --live`: the same plan without the database, nothing in it that must not travel, no guess."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from reconciler import plan as planning
from tests.integration import governed
from tests.integration.governed import command

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from reconciler.model import Plan
    from tests.integration.governed import Governed
    from tests.servers import Database

UNKNOWN = "a plan that connects to the database"


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


def taken(shop: Governed) -> Path:
    file = shop.root / "live.snapshot"
    done = command("snapshot", "-s", shop.directory, "--out", file, dsn=shop.db.dsn)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return file


def planned(shop: Governed, file: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    """Nothing says where a database is."""
    return command("plan", "-s", shop.directory, "--live", file, *more, env={"PATH": ""})


def saved(shop: Governed, file: Path) -> Plan:
    done = planned(shop, file, "--out", shop.plan_file)
    assert done.returncode == 0, done.stdout + done.stderr
    return planning.load(shop.plan_file)[0]


def unknown(shop: Governed, file: Path) -> list[str]:
    """What a plan from the snapshot cannot tell; then it blocks."""
    done = planned(shop, file, "--format", "json")
    assert done.returncode == 3, done.stdout
    verdicts = json.loads(done.stdout)["invariants"]
    return [one["address"] for one in verdicts if (one["status"], one["missing"]) == ("not_judged", UNKNOWN)]


def changed(shop: Governed) -> None:
    """The next version of the files: something of everything that a snapshot can tell."""
    shop.sql("CREATE FUNCTION app.fn_gone() RETURNS int LANGUAGE sql RETURN 1")
    shop.state["gates"]["shop.limit"]["value"] = "11"
    shop.state["gates"]["shop.new"] = {"value": "on", "reason": "New."}
    del shop.state["gates"]["shop.phase"]
    shop.files["functions/0.sql"] = shop.files["functions/0.sql"].replace("Hello", "Good day")
    shop.function(
        "app.fn_new(text)",
        "CREATE FUNCTION app.fn_new(a text DEFAULT lower('A')) RETURNS text LANGUAGE sql AS 'SELECT a'",
    )
    shop.state["functions"]["app.fn_total()"]["comment"] = "Another comment."
    shop.state["invariants"]["sworn"] = {"attest": "Nobody was called."}
    shop.state["invariants"]["jobs"] = {"untouched": ["app.job"]}
    shop.state["governance"]["release"] = "r2"
    shop.write()


def test_the_same_plan_without_the_database(shop: Governed) -> None:
    shop.settle()
    file = taken(shop)
    done = planned(shop, file)
    assert (done.returncode, done.stdout.count("No changes.")) == (0, 1), done.stderr
    assert "Planned from a snapshot of " in done.stdout
    changed(shop)
    file = taken(shop)
    there, here = shop.plan(), saved(shop, file)
    assert (here.effects_digest, here.effect_digest) == (there.effects_digest, there.effect_digest)
    assert (here.changes, here.setup, here.drift) == (there.changes, there.setup, there.drift)
    assert here.snapshot_of is not None
    shop.apply(here, [shop.approve(here, attested=["sworn"])])
    shop.in_sync()


def test_the_files_may_have_changed_since(shop: Governed) -> None:
    """That is what it is for: the scheduled job has the old files, the pull request the new ones."""
    shop.settle()
    file = taken(shop)
    changed(shop)
    there, here = shop.plan(), saved(shop, file)
    assert (here.effect_digest, here.changes) == (there.effect_digest, there.changes)


def test_what_was_not_seen_is_not_guessed(shop: Governed) -> None:
    shop.sql("INSERT INTO app.settings (name, value) VALUES ('shop.hidden', 'private'), ('other.one', 'x')")
    shop.sql("CREATE FUNCTION app.other() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    shop.settle()
    file = taken(shop)
    shop.state["gates"]["shop.hidden"] = {"value": "private", "reason": "Its value was nobody's business."}
    shop.state["gates"]["other.one"] = {"value": "y", "reason": "Outside of the scope."}
    shop.function("app.other()", "CREATE FUNCTION app.other() RETURNS int LANGUAGE sql AS 'SELECT 2'")
    shop.state["functions"]["app.fn_total()"] = {"retire": "Not called any more."}
    shop.state["markers"]["second"] = {
        "table": "app.heartbeat",
        "key": {"worker": "second"},
        "values": {"kind": "legacy"},
    }
    shop.state["invariants"]["few-jobs"] = {"query": "SELECT id FROM app.job", "rows": 0}
    shop.write()
    assert unknown(shop, file) == [
        "invariant.few-jobs",
        "function.app.fn_total()",
        "function.app.other()",
        "gate.other.one",
        "gate.shop.hidden",
        "marker.second",
    ]
    assert not (shop.root / "x.plan").exists()
    done = planned(shop, file, "--out", shop.root / "x.plan")
    assert (done.returncode, (shop.root / "x.plan").exists()) == (3, False)


def test_what_must_not_travel_does_not(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILER_SECRET_KEY", "k" * 32)
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", "hunter2-hunter2")
    shop.sql("INSERT INTO app.settings (name, value) VALUES ('shop.hidden', 'undeclared-value')")
    shop.sql("UPDATE app.cursor SET ran = '2001-02-03 04:05:06+00'")
    shop.state["gates"]["shop.token"] = {
        "secret": True,
        "value_from": {"env": "RECONCILER_VALUE_TOKEN"},
        "reason": "Secret.",
    }
    shop.write()
    before = taken(shop).read_text()
    assert "2001-02-03" not in before
    assert "undeclared-value" not in before
    shop.settle()
    after = taken(shop)
    text = after.read_text()
    assert "undeclared-value" not in text
    assert "hunter2" not in text
    assert "2001-02-03" not in text
    assert after.stat().st_mode & 0o777 == 0o600
    # Without key and value the secret is not judged, as in every other plan.
    done = planned(shop, after, "--format", "json")
    assert [one["missing"] for one in json.loads(done.stdout)["invariants"] if one["status"] == "not_judged"] == [
        "variable RECONCILER_VALUE_TOKEN"
    ]


def test_an_apply_does_not_believe_it(shop: Governed) -> None:
    shop.settle()
    changed(shop)
    here = saved(shop, taken(shop))
    shop.sql("UPDATE app.settings SET value = '12' WHERE name = 'shop.limit'")
    approved = shop.save(here, shop.approve(here, attested=["sworn"]))
    before = governed.image(shop.db)
    done = command("apply", approved, dsn=shop.db.dsn)
    assert (done.returncode, governed.image(shop.db)) == (4, before)
    assert "gate.shop.limit" in done.stderr


def test_what_is_no_snapshot_of_this_target(shop: Governed, tmp_path: Path) -> None:
    shop.settle()
    file = taken(shop)
    done = planned(shop, file, "--dsn", shop.db.dsn)
    assert (done.returncode, done.stderr.count("from --live or from --dsn")) == (1, 1)
    document = json.loads(file.read_text())
    for damaged, expected in (
        (file.read_text().replace("shop.limit", "shop.limut"), "was changed after it was written"),
        ("{}", "was changed after it was written"),
        (planning.serialize({"format_version": "1.0"}).decode(), "is no snapshot"),
        (planning.serialize({**document, "ledger": {}}).decode(), "is no snapshot"),
        (planning.serialize({**document, "seen": {"gate": {}}}).decode(), "does not hold what one of this version"),
        (planning.serialize({**document, "format_version": "2.0"}).decode(), "has format 2.0"),
    ):
        (tmp_path / "damaged").write_text(damaged)
        done = planned(shop, tmp_path / "damaged")
        assert (done.returncode, done.stdout) == (1, "")
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    shop.state["governance"]["name"] = "another"
    shop.write()
    done = planned(shop, file)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is of target test of shop, not of test of another" in done.stderr
