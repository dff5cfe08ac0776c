"""The second system: its whole cycle on the server of the run, its demo, and gates whose values are no text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from reconciler import sandbox
from tests.servers import PROJECT

if TYPE_CHECKING:
    from tests.conftest import Command
    from tests.servers import Database

EXAMPLE = PROJECT / "examples" / "feature-flags"
STATE = EXAMPLE / "state"

EXPRESS = [
    'function."Shop Control"."cartLimit"()',
    'function."Shop Control".purge_carts(integer)',
    "gate.carts.max_age_days",
    "gate.checkout.regions",
    "marker.nightly_import_eu_west",
]
CHANGED = [
    'function."Shop Control".flag_is_on(text)',
    "gate.checkout.express",
    "gate.checkout.limits",
    "gate.release.ring",
]


def environment(**more: str) -> dict[str, str]:
    """For a shell: our command and the wheel's psql on PATH, nothing else of whoever runs the tests."""
    path = (str(Path(sys.executable).parent), str(sandbox.embedded_binaries()), os.environ["PATH"])
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RECONCILER_"))}
    return {**own, "PATH": os.pathsep.join(path), "NO_COLOR": "1", **more}


def shell(script: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment(**more),
        timeout=300,
    )


@pytest.fixture
def shop(db: Database) -> Database:
    sandbox.load(EXAMPLE / "baseline", db.dsn)
    return db


@pytest.mark.smoke
def test_the_readme_walks_through_the_whole_cycle(shop: Database) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    # The first block starts a sandbox; here the database is the test's own.
    assert blocks[0].startswith("RECONCILER_DSN=$(reconciler sandbox up ")
    done = shell("\n".join(blocks[1:]), RECONCILER_DSN=shop.dsn)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("Plan: ", "No ", "Apply complete!", "Drift: ", "exit code"))
    ]
    assert [re.sub(r" at \S+Z", "", line) for line in told] == [
        "Plan: 5 to add, 4 to change, 0 to remove.",
        "Apply complete! 5 added, 4 changed, 0 removed.",
        "No changes. The database matches the desired state.",
        "Drift: 2 objects changed, 0 pending.",
        "exit code 2",
        "exit code 4",
        "Plan: 0 to add, 1 to change, 0 to remove.",
        "Apply complete! 0 added, 1 changed, 0 removed.",
        "No drift. 0 pending.",
    ]
    additions = re.findall(r"^  \+ (.*)  \(declared and missing\)$", done.stdout, re.MULTILINE)
    assert sorted(additions) == EXPRESS
    changes = re.findall(r"^  ~ (.*)  \(differs from what is declared\)$", done.stdout, re.MULTILINE)
    assert sorted(changes) == CHANGED
    assert '`from` allows only \'{"items": 20, "currency": "EUR"}\'' in done.stderr

    # What was applied is what the system then does, for those who may.
    shop.execute("SET ROLE storefront")
    assert shop.execute("""SELECT "Shop Control".flag_is_on('checkout.express'), "Shop Control"."cartLimit"()""") == [
        (True, 50)
    ]
    assert shop.execute(
        """SELECT "Shop Control".flag_is_on('carts.purge'), "Shop Control".flag_is_on('nowhere')"""
    ) == [(False, False)]
    shop.execute('SET ROLE "on-call"')
    assert shop.execute('CALL "Shop Control".purge_carts(10, NULL)') == [(0,)]
    shop.execute("RESET ROLE")
    assert shop.execute('SELECT count(*) FROM "Shop Control".cart') == [(3,)]
    assert shop.execute('SELECT service, region, beats, state, seen::text FROM "Shop Control"."Beacon"') == [
        ("nightly-import", "eu-west", 0, "silent", "2026-02-27 03:11:02.871+00")
    ]
    assert shop.execute("""SELECT val::text, "changedAt"::date::text FROM "Shop Control".app_settings
                           WHERE name = 'theme'""") == [('{"dark": true, "accent": "#0b6e4f"}', "2026-03-04")]


def test_the_purge_works_once_it_is_armed(shop: Database) -> None:
    shop.execute((STATE / "functions" / "purge_carts.sql").read_text())
    shop.execute("INSERT INTO \"Shop Control\".app_settings (name, val) VALUES ('carts.max_age_days', '180')")
    shop.execute("UPDATE \"Shop Control\".app_settings SET val = '\"on\"' WHERE name = 'carts.purge'")
    shop.execute('UPDATE "Shop Control".cart SET touched_at = now() WHERE cart_id = 3')
    assert shop.execute('CALL "Shop Control".purge_carts(1, NULL)') == [(1,)]
    assert shop.execute('CALL "Shop Control".purge_carts(10, NULL)') == [(1,)]
    assert shop.execute('SELECT cart_id FROM "Shop Control".cart') == [(3,)]


@pytest.mark.slow
def test_the_demo_runs_and_leaves_nothing_behind() -> None:
    done = shell("examples/feature-flags/demo.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for wanted in (
        "Plan: 5 to add, 4 to change, 0 to remove.",
        "Apply complete! 5 added, 4 changed, 0 removed.",
        "  name=checkout.regions, val=['eu-west', 'eu-north']",
        "No changes. The database matches the desired state.",
        "Drift: 1 object changed, 0 pending.",
        "exit code 2",
        "Apply complete! 0 added, 1 changed, 0 removed.",
    ):
        assert wanted in lines, done.stdout
    work = next(Path(word).parent for word in done.stdout.split() if word.endswith("/express.plan"))
    assert not work.exists()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STATE, tmp_path / "state"))


def edit(state: Path, old: str, new: str) -> None:
    file = state / "flags.yaml"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_a_value_in_another_spelling_than_the_stored_one_is_refused(
    called: Command, shop: Database, state: Path
) -> None:
    edit(state, """value: '{"items": 50, "currency": "EUR"}'""", """value: '{"currency":"EUR","items":50}'""")
    edit(state, "safe: 'false'", "safe: ' false'")
    done = called("plan", "-s", state, "--dsn", shop.dsn, check=False)
    assert done.returncode == 4
    assert "the column stores ' false' as 'false'; write it as it is stored" in done.stderr
    assert """stores '{"currency":"EUR","items":50}' as '{"items": 50, "currency": "EUR"}'""" in done.stderr


def test_a_value_that_the_column_cannot_hold_is_an_error_of_the_plan(
    called: Command, shop: Database, state: Path
) -> None:
    edit(state, "value: '180'", "value: '180 days'")
    done = called("plan", "-s", state, "--dsn", shop.dsn, check=False)
    assert done.returncode == 1
    assert "gate.carts.max_age_days as jsonb" in done.stderr


def test_a_column_without_equality_is_no_gate(called: Command, shop: Database) -> None:
    shop.execute('ALTER TABLE "Shop Control".app_settings ALTER COLUMN val TYPE json')
    done = called("plan", "-s", STATE, "--dsn", shop.dsn, check=False)
    assert done.returncode == 1
    assert 'column val of "Shop Control".app_settings is json, which has no equality' in done.stderr


def test_gates_of_other_types(called: Command, db: Database, tmp_path: Path) -> None:
    db.execute('CREATE SCHEMA "Shop Control"')
    db.execute("CREATE TYPE \"Shop Control\".\"Ring\" AS ENUM ('canary', 'early')")
    kinds = {
        "boolean": ("false", "true"),
        "numeric(6,2)": ("1.50", "2.00"),
        '"Shop Control"."Ring"': ("canary", "early"),
        "text[]": ("{a}", '{a,"b c"}'),
    }
    stores: dict[str, dict[str, str]] = {}
    gates: dict[str, dict[str, object]] = {}
    for number, (kind, (before, after)) in enumerate(kinds.items()):
        table = f'"Shop Control"."Switch {number}"'
        db.execute(f"CREATE TABLE {table} (key text PRIMARY KEY, value {kind} NOT NULL)")
        db.execute(f"INSERT INTO {table} VALUES (%s, %s)", [f"old {number}", before])
        stores[f"store {number}"] = {"table": table, "key": "key", "value": "value"}
        moved: dict[str, object] = {"value": after, "store": f"store {number}", "reason": "It moves."}
        gates |= {f"old {number}": {**moved, "from": [before]}, f"new {number}": moved}
    governance = {
        "version": 1,
        "name": "switches",
        "release": "one",
        "targets": {"test": {}},
        "gate_stores": stores,
        "approval": {"signed": False},
        "apply": {"backup": "none"},
    }
    # JSON is YAML.
    (tmp_path / "all.yaml").write_text(json.dumps({"governance": governance, "gates": gates}))
    common = ("-s", tmp_path, "--dsn", db.dsn)
    called("plan", *common, "--out", tmp_path / "one.plan")
    called("approve", tmp_path / "one.plan", "--as", "operator", "--reason", "a test")
    called("apply", tmp_path / "one.plan", "--dsn", db.dsn, "--initialize")
    for number, (_, after) in enumerate(kinds.values()):
        assert db.execute(f'SELECT DISTINCT value::text FROM "Shop Control"."Switch {number}"') == [(after,)]
    assert called("plan", *common, "--detailed-exitcode").returncode == 0
