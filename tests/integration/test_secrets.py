"""A run with secrets, after which every artefact is searched for them; and an attack on each part of the protection."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import desired, evidence, ledger, pg, rehearsal, scratch, settle, undo
from reconciler import plan as planning
from reconciler import revert as undoing
from reconciler.errors import MissingPrivilege, Refused, ServerProblem, Stale, UsageError, Violated
from reconciler.survey import survey, taken
from tests.integration import governed
from tests.integration.governed import Governed, command
from tests.servers import Database

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers import Server

KEY = "k3y-of-this-test-0123456789-abcdefghijklmnopqrstuvwxyz"
OLD = "old-Zebra/\"quoted\"-'ticked'-Ünïcode-\\back-7Q"
NEW = 'new-Walrus{"password": "x"}\'; DROP TABLE app.settings; --€ %s %(x)s $1 $2 8R'
WRONG = "wrong-Okapi-value-that-nobody-approved-9S"
FILED = "-----BEGIN TOTEM-----\nline-Lynx-one-4T\nline-Heron-two-5U\n-----END TOTEM-----"
PLAIN = "plain-Marmot-before-it-was-called-a-secret-6V"
GONE = "gone-Ibis-of-a-retired-gate-3W"
PLANTED = {"key": KEY, "old": OLD, "new": NEW, "wrong": WRONG, "filed": FILED, "plain": PLAIN, "gone": GONE}

TOKEN = {"secret": True, "value_from": {"env": "RECONCILER_VALUE_TOKEN"}, "reason": "The courier's token."}
TWIN = {"secret": True, "value_from": {"env": "RECONCILER_VALUE_TOKEN"}, "lock": "approval", "reason": "The same."}
SHEET = {"secret": True, "value_from": {"file": "keys/sheet.pem"}, "reason": "A certificate."}


def spellings(text: str) -> Iterator[bytes]:
    """How a value may stand in an artefact: whole, in pieces, escaped and encoded."""
    raw = text.encode()
    for part in {text, *text.split("\n")}:
        for form in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], repr(part)[1:-1]):
            yield from (form.encode(), form.replace("'", "''").encode(), form.replace('"', "&#34;").encode())
        yield from (part[:11].encode(), part[-9:].encode())
    yield from (base64.b64encode(raw)[:-4], base64.urlsafe_b64encode(raw)[:-4], raw.hex().encode())
    yield from (raw.hex().upper().encode(), base64.b32encode(raw)[:-8])


def leaks(texts: dict[str, bytes]) -> list[str]:
    """Where a planted value stands."""
    known = {(name, form) for name, text in PLANTED.items() for form in spellings(text) if len(form) > 5}
    shared = {b"-----BEGIN ", b"-----END TO", b"TEM-----", b"END TOTEM"}  # says nothing
    return sorted(
        f"{where}: {name} as {form!r}"
        for where, text in texts.items()
        for name, form in known
        if form in text and form not in shared and not form.startswith((b"-----", b"OTEM"))
    )


@pytest.fixture
def shop(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Governed:
    """Secrets in every state that a row can have: one to change, one missing, one in place, one that was plain."""
    system = governed.empty(db, tmp_path)
    system.sql("INSERT INTO app.settings (name, value) VALUES ('shop.limit', '10')")
    for key, value in (("shop.token", OLD), ("shop.plain", PLAIN)):
        db.execute("INSERT INTO app.settings (name, value) VALUES (%s, %s)", [key, value])
    system.state["gates"] = {
        "shop.limit": {"value": "10", "reason": "A number."},
        "shop.token": TOKEN,
        "shop.twin": TWIN,
        "shop.sheet": SHEET,
    }
    values = tmp_path / "values"
    (values / "keys").mkdir(parents=True)
    (values / "keys" / "sheet.pem").write_text(FILED + "\n")
    monkeypatch.setenv("RECONCILER_SECRET_KEY", KEY)
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    monkeypatch.setenv("RECONCILER_VALUE_DIR", str(values))
    return system.write()


class Run:
    """Commands on a system; keeps everything that they said."""

    def __init__(self, system: Governed) -> None:
        self.system = system
        self.said: dict[str, bytes] = {}

    def __call__(self, *words: str | Path, state: bool = False) -> subprocess.CompletedProcess[str]:
        given = (*words, "-s", self.system.directory) if state else words
        done = command(*given, dsn=self.system.db.dsn)
        name = f"{len(self.said) // 2} {' '.join(map(str, words[:4]))}"
        self.said |= {f"{name} stdout": done.stdout.encode(), f"{name} stderr": done.stderr.encode()}
        return done

    def artefacts(self) -> dict[str, bytes]:
        """All that was said, every file but the values themselves, and every row of the ledger."""
        files = {
            str(path.relative_to(self.system.root)): path.read_bytes()
            for path in sorted(self.system.root.rglob("*"))
            if path.is_file() and "values" not in path.parts
        }
        rows = self.system.db.execute("SELECT e::text FROM reconciler.entry e ORDER BY number")
        return self.said | files | {f"entry {number}": row[0].encode() for number, row in enumerate(rows, 1)}

    def apply(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Plan, approve and apply; what was made is kept under this name."""
        made = self.system.root / f"{name}.plan"
        planned = self("plan", "--out", made, state=True)
        assert planned.returncode == 0, planned.stderr
        return self.again(name, *options)

    def again(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        made = self.system.root / f"{name}.plan"
        plan, _ = planning.load(made)
        accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
        assert self("approve", made, "--as", "operator", "--reason", "a test", *accept).returncode == 0
        place = self.system.root / f"evidence-{name}-{len(self.said)}"
        return self("apply", made, "--evidence", place, "-v", *options)


BOASTS = """
CREATE FUNCTION app.boast() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the value % is %', NEW.value, encode(convert_to(NEW.value, 'UTF8'), 'base64')
        USING DETAIL = NEW.value, HINT = 'not ' || NEW.value, CONSTRAINT = left(NEW.value, 60);
END
$$
"""


def look_before(run: Run) -> None:
    """Everything that only reads, in every format."""
    assert run("validate", "-v", state=True).returncode == 0
    for form in ("text", "json", "markdown", "html"):
        assert run("plan", "--format", form, "-v", "--show-values", state=True).returncode == 0
        assert run("plan", "--format", form, state=True).returncode == 0
    assert run("drift", "-v", state=True).returncode == 0
    assert run("plan", "--out", run.system.root / "first.plan", state=True).returncode == 0


def fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value than was approved; then statements that fail with the row, or the value, in the server's words."""
    shop = run.system
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", WRONG)
    refused = run.again("first", "--initialize")
    assert refused.returncode == 4
    assert "variable RECONCILER_VALUE_TOKEN holds another value for gate.shop.token than was approved" in refused.stderr
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    check = "ALTER TABLE app.settings ADD CONSTRAINT small CHECK (length(value) < 48 OR name = 'shop.plain')"
    before = "CREATE TRIGGER boasts BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.boast()"
    late = (
        "CREATE CONSTRAINT TRIGGER boasts AFTER UPDATE ON app.settings DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION app.boast()"
    )
    shop.sql(BOASTS)
    for statement, error in ((check, "CheckViolation"), (before, "RaiseException"), (late, "RaiseException")):
        shop.sql(statement)
        failed = run.again("first", "--initialize")
        assert (failed.returncode, error in failed.stderr) == (1, True)
        shop.sql("ALTER TABLE app.settings DROP CONSTRAINT IF EXISTS small")
        shop.sql("DROP TRIGGER IF EXISTS boasts ON app.settings")


def go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody turns one and it is put right; one that nobody governed becomes a secret; one comes and goes."""
    shop = run.system
    shop.db.execute("UPDATE app.settings SET value = %s WHERE name = 'shop.token'", [OLD])
    drifted = run("drift", "-v", state=True)
    assert (drifted.returncode, "gate.shop.token" in drifted.stdout) == (2, True)
    for form in ("json", "markdown", "html"):
        assert run("drift", "--format", form, state=True).returncode == 2
    monkeypatch.delenv("RECONCILER_VALUE_TOKEN")
    assert run("plan", state=True).returncode == 3
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    monkeypatch.setenv("RECONCILER_VALUE_GONE", GONE)
    monkeypatch.setenv("RECONCILER_VALUE_PLAIN", NEW)
    shop.state["gates"]["shop.gone"] = {**TOKEN, "value_from": {"env": "RECONCILER_VALUE_GONE"}}
    shop.write()
    assert run.apply("second").returncode == 0
    shop.in_sync()
    shop.state["gates"]["shop.gone"] = {"retire": "No longer.", "secret": True}
    shop.state["gates"]["shop.plain"] = {**TOKEN, "value_from": {"env": "RECONCILER_VALUE_PLAIN"}}
    shop.write()
    done = run.apply("third")
    assert done.returncode == 0, done.stderr
    shop.in_sync()
    assert (shop.value("shop.gone"), shop.value("shop.plain")) == (None, NEW)


def look_back(run: Run) -> None:
    """Everything that tells of what was done."""
    shop = run.system
    for folder in sorted(shop.root.glob("evidence-*")):
        for words in (("show", folder, "-v"), ("show", folder, "--format", "html"), ("settle", folder)):
            run(*words)
        assert run("verify", folder).returncode == 0
    for name in ("first", "second", "third"):
        for form in ("text", "json", "markdown", "html"):
            assert run("show", shop.root / f"{name}.plan", "-v", "--format", form).returncode == 0
    assert run("history", "--anchor", shop.root / "anchor", state=True).returncode == 0
    assert run("verify", "--anchor", shop.root / "anchor", state=True).returncode == 0
    undone = run("revert", "2", "--out", shop.root / "undo.plan", state=True)
    assert undone.returncode == 4
    assert "gate.shop.token: its value is a secret, of which only an HMAC was kept" in undone.stderr
    backups = sorted(shop.root.glob("evidence-*/backup-*.json"))
    assert len(backups) >= 6
    for file in backups:
        kept = json.loads(file.read_text())
        assert all("value" not in thing["row"] for name, thing in kept["objects"].items() if name != "gate.shop.limit")


def test_no_artefact_of_a_run_holds_a_secret(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(shop)
    shop.state["governance"]["apply"]["backup"] = "governed"
    shop.write()
    look_before(run)
    fail(run, monkeypatch)
    applied = run.again("first", "--initialize")
    assert applied.returncode == 0, applied.stderr
    assert [shop.value(f"shop.{name}") for name in ("token", "twin", "sheet")] == [NEW, NEW, FILED]
    shop.in_sync()
    go_on(run, monkeypatch)
    look_back(run)
    assert leaks(run.artefacts()) == []
    # And the search finds what is there: it is not that nothing was looked at.
    assert leaks({"a": f"x {json.dumps(NEW)} y".encode()})
    assert leaks({"a": base64.b64encode(OLD.encode())})
    assert len([name for name in run.artefacts() if "evidence-" in name]) > 40


# -------------------------------------------------------------------------------------------------------------- the key


def test_without_the_key_secrets_are_not_judged_and_their_table_is_not_read(
    shop: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.state["gates"] = {"shop.token": TOKEN}
    shop.state["governance"]["scope"]["gates"] = []
    shop.write().settle()
    assert shop.value("shop.token") == NEW
    planner = shop.db.role()
    shop.sql(
        f"GRANT USAGE ON SCHEMA app, reconciler TO {planner}",
        f"GRANT SELECT ON reconciler.entry, app.heartbeat TO {planner}",
    )
    monkeypatch.delenv("RECONCILER_SECRET_KEY")
    plan = shop.plan(as_role(shop, planner))
    (verdict,) = plan.invariants
    assert (verdict.address, verdict.status, verdict.missing) == (
        "gate.shop.token",
        "not_judged",
        "RECONCILER_SECRET_KEY",
    )
    assert (plan.outcome, plan.changes, plan.drift) == ("violated", (), ())
    assert command("plan", "-s", shop.directory, dsn=shop.db.dsn).returncode == 3
    drifted = command("drift", "-s", shop.directory, dsn=shop.db.dsn)
    assert (drifted.returncode, "No drift at" in drifted.stdout) == (3, True)
    with pytest.raises(Violated, match="1 check not passed; nothing can be applied"):
        shop.apply(plan)
    monkeypatch.setenv("RECONCILER_SECRET_KEY", KEY)
    with pytest.raises(MissingPrivilege, match=r"lacks SELECT on app\.settings"):
        shop.plan(as_role(shop, planner))


def as_role(system: Governed, role: str) -> str:
    return f"{system.db.dsn} options='-c role={role}'"


def test_what_the_policy_lists_may_stay_unjudged_and_the_ledger_keeps_it(
    shop: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.state["governance"]["allow_not_judged"] = ["shop.token", "shop.twin", "shop.sheet"]
    shop.write().settle()
    monkeypatch.delenv("RECONCILER_SECRET_KEY")
    shop.state["gates"]["shop.limit"]["value"] = "11"
    shop.write()
    done = shop.apply(shop.plan())
    assert (done.outcome, done.problems, shop.value("shop.limit")) == ("applied", (), "11")
    told = [(verdict.address, verdict.tolerated) for verdict in done.invariants if verdict.status == "not_judged"]
    assert told == [("gate.shop.sheet", True), ("gate.shop.token", True), ("gate.shop.twin", True)]
    monkeypatch.setenv("RECONCILER_SECRET_KEY", KEY)
    shop.in_sync()
    assert shop.drift().outcome == "no_changes"
    shop.db.execute("UPDATE app.settings SET value = 'another' WHERE name = 'shop.token'")
    assert [moved.address for moved in shop.drift().drift] == ["gate.shop.token"]


@pytest.mark.parametrize("moment", ["plan", "apply"])
def test_another_key_than_the_ledgers_is_refused(shop: Governed, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    shop.settle()
    shop.db.execute("UPDATE app.settings SET value = 'another' WHERE name = 'shop.token'")
    plan = shop.plan()
    monkeypatch.setenv("RECONCILER_SECRET_KEY", "another key, which is as long as it must be")
    said = "RECONCILER_SECRET_KEY is not the key that the HMACs of the ledger or of the plan were made with"
    with pytest.raises((Refused, Stale), match=said if moment == "plan" else "another value|is not the key"):
        shop.plan() if moment == "plan" else shop.apply(plan)
    refused = command("drift", "-s", shop.directory, dsn=shop.db.dsn)
    assert (refused.returncode, said in refused.stderr) == (4, True)
    monkeypatch.setenv("RECONCILER_SECRET_KEY", KEY)
    assert shop.apply(plan).problems == ()
    shop.in_sync()


def test_a_key_that_is_too_short_is_an_error(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONCILER_SECRET_KEY", "short-and-never-printed")
    refused = command("plan", "-s", shop.directory, dsn=shop.db.dsn)
    assert (refused.returncode, "shorter than 32 bytes" in refused.stderr) == (1, True)
    assert "short-and-never-printed" not in refused.stderr


def test_the_fingerprint_of_the_key_is_in_the_ledger(shop: Governed) -> None:
    shop.settle()
    (body,) = shop.db.execute("SELECT body::jsonb -> 'manifest' FROM reconciler.entry")[0]
    values = [body[f"gate.shop.{name}"]["spec"]["value"] for name in ("token", "twin")]
    assert values[0]["key"] == values[1]["key"]
    assert len(values[0]["key"]) == 16
    # The same value twice, and nobody sees it.
    assert shop.value("shop.token") == shop.value("shop.twin")
    assert values[0]["hmac"] != values[1]["hmac"]


# ------------------------------------------------------------------------------------------------------------ the value


def test_without_the_values_drift_still_judges_what_was_applied(
    shop: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.settle()
    monkeypatch.delenv("RECONCILER_VALUE_TOKEN")
    monkeypatch.delenv("RECONCILER_VALUE_DIR")
    found = shop.drift()
    assert (found.outcome, found.pending, found.drift) == ("no_changes", (), ())
    untold = [one.where for one in found.not_compared if one.object_class == "secret, with the files"]
    assert untold == [
        "gate.shop.sheet: file keys/sheet.pem below RECONCILER_VALUE_DIR is not there",
        "gate.shop.token: variable RECONCILER_VALUE_TOKEN is not there",
        "gate.shop.twin: variable RECONCILER_VALUE_TOKEN is not there",
    ]
    plan = shop.plan()
    assert [verdict.status for verdict in plan.invariants] == ["not_judged"] * 3
    shop.db.execute("DELETE FROM app.settings WHERE name = 'shop.sheet'")
    assert [(moved.address, moved.actions) for moved in shop.drift().drift] == [("gate.shop.sheet", ("remove",))]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (WRONG, Stale),
        (NEW + "\n", Stale),
        ("", UsageError),
        (None, UsageError),
    ],
)
def test_apply_takes_the_value_again_and_wants_the_approved_one(
    shop: Governed, monkeypatch: pytest.MonkeyPatch, given: str | None, error: type[Exception]
) -> None:
    plan = shop.plan()
    if given is None:
        monkeypatch.delenv("RECONCILER_VALUE_TOKEN")
    else:
        monkeypatch.setenv("RECONCILER_VALUE_TOKEN", given)
    before = governed.image(shop.db)
    with pytest.raises(error, match=r"gate\.shop\.token|RECONCILER_VALUE_TOKEN"):
        shop.apply(plan)
    assert governed.image(shop.db) == before
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    shop.settle()


def test_a_value_that_changes_under_the_apply_is_not_sent(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = shop.plan()

    def turn(stage: str, *_: Any, **__: Any) -> None:
        if stage == "execute":
            monkeypatch.setenv("RECONCILER_VALUE_TOKEN", WRONG)

    with pytest.raises(Stale, match=r"holds another value for gate\.shop\.token than was approved"):
        applying.apply(shop.request(plan), turn)
    assert shop.value("shop.token") == OLD
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    shop.settle()


def test_after_a_secret_was_sent_nothing_of_the_servers_words_is_repeated(shop: Governed) -> None:
    """What a trigger makes of a value nobody could recognize."""
    shop.sql(
        "CREATE FUNCTION app.hint() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'it is %',"
        " reverse(NEW.value) USING DETAIL = 'or ' || reverse(NEW.value), HINT = reverse(NEW.value); END $$",
        "CREATE CONSTRAINT TRIGGER hints AFTER UPDATE ON app.settings DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION app.hint()",
    )
    with pytest.raises(ServerProblem) as refused:
        shop.apply(shop.plan())
    assert refused.value.message == (
        "making deferred constraints immediate:"
        " RaiseException; the server's words may quote a secret and are left out (SQLSTATE P0001)"
    )
    assert (refused.value.details, refused.value.hint) == ((), "")
    shop.sql("DROP TRIGGER hints ON app.settings")
    shop.settle()


def test_compare_and_set_holds(shop: Governed) -> None:
    plan = shop.plan()
    shop.db.execute("UPDATE app.settings SET value = %s WHERE name = 'shop.token'", [WRONG])
    with pytest.raises(Stale) as refused:
        shop.apply(plan)
    assert leaks({"said": str((refused.value.message, refused.value.details, refused.value.hint)).encode()}) == []
    assert shop.value("shop.token") == WRONG
    # Also where only the WHERE of the statement can tell: the reading before it finds the approved value.
    (change,) = [one for one in shop.plan().changes if one.address == "gate.shop.token"]
    (statement,) = change.statements
    assert "= $1" in statement.text
    assert statement.text.endswith('AND "value" OPERATOR(pg_catalog.=) $2')
    shop.settle()


def test_a_row_that_our_own_statements_changed_is_not_overwritten(shop: Governed) -> None:
    """Nobody else can: it is locked. The first statement of this apply can have a trigger."""
    shop.sql(
        "CREATE FUNCTION app.turn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE app.settings SET value = 'turned' WHERE name = 'shop.token'; RETURN NEW; END $$",
        "CREATE TRIGGER turns AFTER INSERT ON app.settings FOR EACH ROW WHEN (NEW.name = 'shop.sheet')"
        " EXECUTE FUNCTION app.turn()",
    )
    with pytest.raises(Stale, match=r"gate\.shop\.token holds another value than when it was made"):
        shop.apply(shop.plan())
    assert shop.value("shop.token") == OLD
    shop.sql("DROP TRIGGER turns ON app.settings")
    shop.settle()


@pytest.mark.slow
def test_what_the_server_logs_of_parameters_can_be_left_out(
    own_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONCILER_SECRET_KEY", KEY)
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", NEW)
    server = own_server(log_statement="all", log_parameter_max_length="0", log_error_verbosity="terse")
    shop = governed.empty(Database(server, "postgres"), tmp_path)
    shop.state["gates"] = {"shop.token": TOKEN}
    shop.sql("ALTER TABLE app.settings ADD CONSTRAINT small CHECK (length(value) < 9)")
    with pytest.raises(ServerProblem):
        shop.write().apply(shop.plan())
    shop.sql("ALTER TABLE app.settings DROP CONSTRAINT small")
    shop.settle()
    shop.db.conn.close()
    log = server.cluster.log.read_bytes()
    assert b"VALUES ('shop.token', $1" in log
    assert leaks({"log": log}) == []


@pytest.mark.parametrize(
    "value", ["v' || pg_sleep(1) || '", '{"a": [1, "\\u0041"]}', "$1 $2 %s %%", " \ta\r\n\n", "€" * 9999]
)
def test_odd_values_arrive_byte_for_byte(shop: Governed, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", value)
    shop.settle()
    assert shop.value("shop.token") == shop.value("shop.twin") == value


def test_a_trigger_that_rewrites_the_value_is_noticed(shop: Governed) -> None:
    shop.sql(
        "CREATE FUNCTION app.lower() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.value := lower(NEW.value); RETURN NEW; END'",
        "CREATE TRIGGER lowers BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.lower()",
    )
    with pytest.raises(Stale) as refused:
        shop.apply(shop.plan())
    assert any(line.startswith("gate.shop.token: ") for line in refused.value.details)
    assert leaks({"said": str(refused.value.details).encode()}) == []
    assert shop.value("shop.token") == OLD
    shop.sql("DROP TRIGGER lowers ON app.settings")
    shop.settle()


def test_a_column_that_is_no_text_takes_parameters_too(shop: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.sql("DELETE FROM app.settings", "ALTER TABLE app.settings ALTER value TYPE jsonb USING value::jsonb")
    shop.state["gates"] = {"shop.token": TOKEN}
    shop.write()
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", '{"b": 1, "a": "secret-Okapi-jsonb"}')
    # jsonb stores it as another text, which has another HMAC.
    with pytest.raises(Stale, match="the database was not what was approved"):
        shop.apply(shop.plan())
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", '{"a": "secret-Okapi-jsonb", "b": 1}')
    shop.settle()
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", '{"a": "other-Okapi-jsonb", "b": 1}')
    shop.settle()
    monkeypatch.setenv("RECONCILER_VALUE_TOKEN", '{"a": "broken-Okapi')
    with pytest.raises(ServerProblem) as refused:
        shop.apply(shop.plan())
    assert "Okapi" not in str((refused.value.message, refused.value.details, refused.value.hint))


# -------------------------------------------------------------------------------------------------- a stranger's change


ATTACKS = {
    "plain": {"value": "x", "reason": "Show me."},
    "guess": {"value": "x", "from": ["y"], "reason": "Is it y?"},
    "retired as plain": {"retire": "Show me."},
}
"""Entries that a stranger would like to see planned for a token that is governed."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_ledger_knows_as_a_secret_stays_one(shop: Governed, attack: str) -> None:
    shop.settle()
    shop.state["gates"]["shop.token"] = ATTACKS[attack]
    shop.write()
    for words in (("plan", "--show-values", "-v"), ("drift", "-v"), ("plan", "--format", "json")):
        refused = command(*words, "-s", shop.directory, dsn=shop.db.dsn)
        assert refused.returncode == 4
        assert "gate.shop.token is a secret by the ledger: write `secret: true` also here" in refused.stderr
        assert leaks({"said": (refused.stdout + refused.stderr).encode()}) == []


@pytest.mark.parametrize("columns", [{"key": "value", "value": "name"}, {"updated_at": "value"}, {"description": None}])
def test_no_store_of_a_stranger_shows_the_column(shop: Governed, columns: dict[str, Any]) -> None:
    shop.settle()
    store = shop.state["governance"]["gate_stores"]["settings"]
    shop.state["governance"]["gate_stores"]["settings"] = {**store, **columns}
    for name in ("shop.token", "shop.twin", "shop.sheet"):
        del shop.state["gates"][name]
    shop.write()
    refused = command("plan", "--show-values", "-s", shop.directory, dsn=shop.db.dsn)
    assert refused.returncode == 4
    assert "gate store settings reads the table of gate.shop." in refused.stderr
    assert leaks({"said": (refused.stdout + refused.stderr).encode()}) == []


def test_lines_that_are_taken_out_are_forgotten_without_a_value(shop: Governed) -> None:
    shop.settle()
    for name in ("shop.token", "shop.twin", "shop.sheet"):
        del shop.state["gates"][name]
    shop.write()
    run = Run(shop)
    assert run("plan", "--format", "json", "--show-values", state=True).returncode == 0
    assert run("drift", "--format", "json", state=True).returncode == 0
    assert leaks(run.said) == []
    done = shop.apply(shop.plan())
    assert (done.summary.forget, done.problems) == (3, ())
    shop.in_sync()


def test_what_was_plain_when_it_was_applied_is_not_shown_when_it_becomes_a_secret(
    shop: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONCILER_VALUE_PLAIN", NEW)
    shop.state["gates"] = {
        "shop.plain": {"value": PLAIN, "from": [PLAIN], "safe": PLAIN, "order": [PLAIN], "reason": "Not yet."}
    }
    shop.state["invariants"] = {"is-plain": {"gate": "shop.plain", "equals": PLAIN}}
    shop.write().settle()
    shop.state["gates"] = {"shop.plain": {**TOKEN, "value_from": {"env": "RECONCILER_VALUE_PLAIN"}}}
    del shop.state["invariants"]
    shop.write()
    run = Run(shop)
    for form in ("text", "json", "markdown", "html"):
        assert run("plan", "--format", form, "-v", "--show-values", state=True).returncode == 0
        assert run("drift", "--format", form, "-v", state=True).returncode == 0
    plan = shop.plan()
    assert [change.hazards for change in plan.changes if change.address == "gate.shop.plain"] == [()]
    done = shop.apply(plan)
    assert done.problems == ()
    shop.in_sync()
    (last,) = shop.db.execute("SELECT body FROM reconciler.entry ORDER BY number DESC LIMIT 1")
    assert leaks(run.said | {"entry": last[0].encode(), "outcome": json.dumps(done.dump()).encode()}) == []
    with pytest.raises(Refused) as refused:
        revert(shop, 2)
    assert refused.value.details == (
        "gate.shop.plain: its value is a secret, of which only an HMAC was kept; declare the value that it should have",
    )


def revert(shop: Governed, number: int) -> Any:
    with pg.connect(shop.db.dsn, "revert") as conn, pg.snapshot(conn):
        last = ledger.last(conn, "shop").entry
        undone, before = ledger.numbered(conn, "shop", number), ledger.numbered(conn, "shop", number - 1)
        assert last is not None
        assert undone is not None
        return undoing.declarations(undoing.of_entry(undone, before, last), desired.load(shop.directory, None))


def test_a_statement_with_the_value_in_it_is_not_what_was_approved(shop: Governed) -> None:
    plan = shop.plan()
    (change,) = [one for one in plan.changes if one.address == "gate.shop.sheet"]
    (statement,) = change.statements
    filled = statement.model_copy(update={"text": statement.text.replace("$1", "'guess'")})
    edited = [one.model_copy(update={"statements": (filled,)}) if one is change else one for one in plan.changes]
    with pytest.raises(Refused, match="the plan holds statements or hazards that its approved effects do not give"):
        shop.apply(plan.model_copy(update={"changes": tuple(edited)}))
    shop.settle()


def test_a_secret_that_stands_elsewhere_is_not_shown_there(shop: Governed) -> None:
    shop.settle()
    shop.state["gates"]["shop.copy"] = {"value": "no copy", "reason": "Where it went."}
    shop.write()
    shop.db.execute("INSERT INTO app.settings (name, value) VALUES ('shop.copy', %s)", [f"copied: {NEW}"])
    for words in (("plan", "--show-values", "-v"), ("drift", "--format", "json")):
        refused = command(*words, "-s", shop.directory, dsn=shop.db.dsn)
        assert refused.returncode == 4
        assert "The value of a secret gate stands also in gate.shop.copy, which would be shown." in refused.stderr
        assert leaks({"said": (refused.stdout + refused.stderr).encode()}) == []


def test_undeclared_rows_show_no_value(shop: Governed) -> None:
    shop.settle()
    shop.db.execute("INSERT INTO app.settings (name, value) VALUES ('shop.more', %s)", [GONE])
    run = Run(shop)
    for form in ("text", "json", "markdown", "html"):
        assert run("drift", "--format", form, "-v", state=True).returncode == 0
    assert b"shop.more" in run.said["0 drift --format text -v stdout"]
    assert leaks(run.said) == []


# ----------------------------------------------------------------------------------------------- proofs, ways back, ...


def test_a_proof_that_quotes_a_secret_is_told_without_it(shop: Governed) -> None:
    read = "SELECT value FROM app.settings WHERE name = 'shop.token'"
    shop.state["proofs"] = {
        "P1": {"reason": "r", "when": read, "then": [{"returns": {"value": "nothing"}}]},
        "P2": {"reason": "r", "when": "SELECT app.shout()", "then": [{"returns": {"shout": "quiet"}}]},
    }
    shop.sql(
        "CREATE FUNCTION app.shout() RETURNS text LANGUAGE plpgsql AS $$ DECLARE told text; BEGIN"
        " SELECT value INTO told FROM app.settings WHERE name = 'shop.token'; RAISE EXCEPTION 'it is %', told; END $$"
    )
    shop.write()
    run = Run(shop)
    shop.db.execute("UPDATE app.settings SET value = %s WHERE name = 'shop.token'", [NEW])
    proved = run("prove", state=True)
    assert (proved.returncode, proved.stdout.count("not shown: it quotes the value of a secret gate")) == (3, 2)
    assert run("prove", "--format", "json", state=True).returncode == 3
    assert run("plan", "--out", shop.root / "one.plan", state=True).returncode == 0
    failed = run.again("one", "--initialize")
    assert (failed.returncode, "proof.P1" in failed.stderr) == (3, True)
    assert leaks(run.said | files(shop)) == []


def files(shop: Governed) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in shop.root.rglob("*")
        if path.is_file() and "values" not in path.relative_to(shop.root).parts
    }


def test_adding_a_secret_can_be_undone_and_changing_it_cannot(shop: Governed) -> None:
    shop.settle()
    shop.state["gates"]["shop.late"] = TOKEN
    shop.write().settle()
    wanted = revert(shop, 2)
    with pg.connect(shop.db.dsn, "revert") as conn, pg.snapshot(conn):
        plan = survey(conn, wanted).plan(datetime.now(UTC))
    assert [(change.address, change.actions) for change in plan.changes] == [("gate.shop.late", ("remove",))]
    assert leaks({"plan": planning.serialize(plan.dump())}) == []
    assert shop.apply(plan).problems == ()
    assert shop.value("shop.late") is None
    with pytest.raises(Refused, match="cannot be undone"):
        revert(shop, 1)


def test_a_plan_is_proven_to_be_undone_but_for_its_secrets(shop: Governed) -> None:
    shop.settle()
    shop.state["gates"]["shop.late"] = TOKEN
    plan = shop.write().plan()
    assert undo.prove(shop.db.dsn, plan).left == ()
    shop.db.execute("UPDATE app.settings SET value = 'turned' WHERE name = 'shop.token'")
    with pytest.raises(Refused) as refused:
        undo.prove(shop.db.dsn, shop.plan())
    assert "gate.shop.token: its value is a secret" in refused.value.details[0]
    shop.settle()


@pytest.mark.slow
def test_a_governed_backup_is_restored_without_the_secrets_and_says_so(shop: Governed) -> None:
    shop.state["governance"]["apply"]["backup"] = {"kind": "governed", "verify": "restore"}
    done = shop.write().apply(shop.plan())
    assert done.problems == ()
    for made in done.backups:
        assert "not in it: gate.shop." in made.checked[-1]
        assert any("gate.shop.token is a secret and not in it" in step.what for step in made.restore)
    document = json.loads((shop.root / "backup-after.json").read_text())
    assert document["not_in_it"] == ["gate.shop.sheet", "gate.shop.token", "gate.shop.twin"]
    assert not any("shop.token" in statement for statement in document["restore"])
    assert any("shop.limit" in statement for statement in document["restore"])
    shop.in_sync()


@pytest.mark.slow
def test_a_rehearsal_has_stand_ins(shop: Governed) -> None:
    shop.settle()
    shop.db.execute("UPDATE app.settings SET value = %s WHERE name = 'shop.token'", [OLD])
    shop.state["gates"]["shop.late"] = SHEET
    shop.state["gates"]["shop.sheet"] = {"retire": "Moved.", "secret": True}
    shop.write()
    wanted = taken(desired.load(shop.directory, None))
    with scratch.database() as place:
        rehearsal.rehearse(shop.db.dsn, place, wanted, shop.plan())
        with psycopg.connect(place) as conn:
            rows = dict(conn.execute("SELECT name, value FROM app.settings").fetchall())
    stand_in = "a rehearsal has no secrets"
    assert rows == {"shop.limit": "10", "shop.token": stand_in, "shop.twin": stand_in, "shop.late": stand_in}
    shop.settle()


def test_settle_tells_of_a_run_with_secrets(shop: Governed) -> None:
    plan = shop.plan()
    done = shop.apply(plan)
    told = evidence.document(done, plan, "0" * 64).model_copy(update={"outcome": "unknown", "entry": None})
    found, entry = settle.resolve(shop.db.dsn, told, plan, command="settle", allow_untested=False)
    assert (found.outcome, entry is not None) == ("applied", True)
    assert leaks({"evidence": json.dumps(found.dump()).encode()}) == []
