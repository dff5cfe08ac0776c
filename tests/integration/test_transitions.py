"""What an apply may not do on the side: each way to do it behind our back, and each harmless thing that looks alike."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import psycopg
import pytest

from reconciler.errors import NotApproved, Violated
from tests.integration import governed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database

pytestmark = pytest.mark.smoke


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    system = governed.shop(db, tmp_path)
    system.sql(
        """
        CREATE TABLE app.outbox (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text NOT NULL);
        INSERT INTO app.outbox (note) SELECT 'note ' || i FROM generate_series(1, 10) AS i;
        CREATE TABLE app.log (at timestamptz NOT NULL, note text) PARTITION BY RANGE (at);
        CREATE TABLE app.log_now PARTITION OF app.log FOR VALUES FROM ('2000-01-01') TO ('2100-01-01');
        CREATE TABLE app.child () INHERITS (app.outbox);
        """
    )
    system.state["invariants"]["outbox-untouched"] = {"untouched": ["app.outbox", "app.log"]}
    return system.write()


def behind_our_back(system: Governed, body: str) -> None:
    """Run `body` when the apply changes a gate, as its owner and not as us."""
    system.sql(
        f"""
        CREATE FUNCTION app.on_change() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $body$
        BEGIN
            {body}
            RETURN NULL;
        END $body$;
        CREATE TRIGGER on_change AFTER UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.on_change();
        """
    )


def refused(system: Governed, check: str) -> str:
    """The apply is rolled back because of this check; returns what it says. Nothing was written."""
    plan = system.plan()
    before = governed.image(system.db)
    with pytest.raises(Violated) as caught:
        system.apply(plan)
    assert governed.image(system.db) == before
    said = [line for line in caught.value.details if line.startswith(f"{check}: ")]
    assert len(said) == 1, caught.value.details
    return said[0]


# ---------------------------------------------------------------------------------------------------------- untouched


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("INSERT INTO app.outbox (note) VALUES ('x');", "1 row written"),
        ("UPDATE app.outbox SET note = note || '!' WHERE id <= 2;", "2 rows written"),
        ("DELETE FROM app.outbox WHERE id = 1; INSERT INTO app.outbox (note) VALUES ('x');", "2 rows written"),
        ("TRUNCATE app.outbox;", "AccessExclusiveLock taken"),
        ("ALTER TABLE app.outbox ADD COLUMN extra text;", "AccessExclusiveLock taken"),
        ("LOCK TABLE app.outbox IN SHARE MODE;", "ShareLock taken"),
        ("INSERT INTO app.log VALUES (now(), 'x');", "app.log_now: 1 row written"),
        ("INSERT INTO app.log_now VALUES (now(), 'x');", "app.log_now: 1 row written"),
        ("INSERT INTO app.child (id, note) OVERRIDING SYSTEM VALUE VALUES (99, 'x');", "app.child: 1 row written"),
        (
            "BEGIN INSERT INTO app.outbox (note) VALUES ('x'); EXCEPTION WHEN division_by_zero THEN NULL; END;",
            "written",
        ),
    ],
)
def test_a_write_by_somebody_elses_trigger_is_seen(shop: Governed, body: str, said: str) -> None:
    behind_our_back(shop, body)
    assert said in refused(shop, "invariant.outbox-untouched")


def test_an_index_made_by_somebody_elses_trigger_is_seen(shop: Governed) -> None:
    behind_our_back(shop, "CREATE INDEX ON app.outbox (note);")
    before = governed.image(shop.db)
    with pytest.raises(Violated) as caught:
        shop.apply(shop.plan())
    assert any("ShareLock taken" in line for line in caught.value.details)
    # Building an index writes its statistics to pg_class in place: those stay where everything else is rolled back.
    after = governed.image(shop.db)
    assert {name for name in before if after[name] != before[name]} <= {"pg_catalog.pg_class"}
    assert shop.db.execute("SELECT count(*) FROM pg_indexes WHERE tablename = 'outbox'") == [(1,)]


def test_a_deferred_trigger_is_seen_before_commit(shop: Governed) -> None:
    shop.sql(
        """
        CREATE FUNCTION app.on_commit() RETURNS trigger LANGUAGE plpgsql AS $body$
        BEGIN INSERT INTO app.outbox (note) VALUES ('late'); RETURN NULL; END $body$;
        CREATE CONSTRAINT TRIGGER on_commit AFTER UPDATE ON app.settings
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION app.on_commit();
        """
    )
    assert "1 row written" in refused(shop, "invariant.outbox-untouched")


@pytest.mark.parametrize(
    "body",
    [
        "PERFORM count(*) FROM app.outbox;",
        "PERFORM 1 FROM app.outbox WHERE id = 1 FOR UPDATE;",
        "PERFORM 1 FROM app.outbox WHERE id = 1 FOR KEY SHARE;",
        "UPDATE app.outbox SET note = 'x' WHERE false;",
        "DELETE FROM app.log WHERE false;",
    ],
)
def test_reading_and_opening_without_writing_is_no_write(shop: Governed, body: str) -> None:
    behind_our_back(shop, body)
    shop.settle()


def test_a_foreign_key_check_is_no_write(shop: Governed) -> None:
    shop.sql("ALTER TABLE app.settings ADD COLUMN note bigint DEFAULT 1 REFERENCES app.outbox (id)")
    shop.settle()


def test_what_others_write_meanwhile_is_theirs(shop: Governed) -> None:
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(shop.db.dsn, autocommit=True) as conn:
            while not stop.wait(0.005):
                conn.execute("INSERT INTO app.outbox (note) VALUES ('background')")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        shop.settle()
    finally:
        stop.set()
        writer.join()
    assert shop.db.execute("SELECT count(*) > 10 FROM app.outbox")[0][0]


def test_a_relation_that_is_not_there_cannot_be_judged(shop: Governed) -> None:
    shop.state["invariants"]["outbox-untouched"] = {"untouched": ["app.nowhere"]}
    shop.write()
    assert "not_judged: there is no relation app.nowhere" in refused(shop, "invariant.outbox-untouched")


# ---------------------------------------------------------------------------------------------------- a row untouched


def test_a_gate_flipped_and_flipped_back_is_seen(shop: Governed) -> None:
    shop.state["invariants"]["limit"] = {"gate": "shop.limit", "equals": "10", "row": "untouched"}
    shop.write()
    behind_our_back(
        shop,
        """
        IF NEW.name <> 'shop.limit' THEN
            UPDATE app.settings SET value = '11' WHERE name = 'shop.limit';
            UPDATE app.settings SET value = '10' WHERE name = 'shop.limit';
        END IF;
        """,
    )
    assert "its row was written during the apply" in refused(shop, "invariant.limit")


def test_a_row_that_nobody_wrote_is_untouched(shop: Governed) -> None:
    shop.state["invariants"]["limit"] = {"gate": "shop.limit", "equals": "10", "row": "untouched"}
    shop.write()
    shop.settle()


# --------------------------------------------------------------------------------------------------- queries unchanged


def test_an_answer_that_changes_during_the_apply_is_seen(shop: Governed) -> None:
    del shop.state["invariants"]["outbox-untouched"]
    shop.state["invariants"]["rows"] = {"query": "SELECT o.note FROM app.outbox AS o", "unchanged": True}
    shop.write()
    # At equal count: one row swapped for another.
    behind_our_back(shop, "UPDATE app.outbox SET note = 'swapped' WHERE id = 3;")
    assert "the answer changed during the apply" in refused(shop, "invariant.rows")
    shop.sql("DROP TRIGGER on_change ON app.settings")
    shop.settle()


# ------------------------------------------------------------------------------------------------------- attestations


def test_what_no_query_can_see_must_be_signed_for(shop: Governed) -> None:
    shop.state["invariants"]["nobody-called"] = {"attest": "Nobody was called."}
    shop.write()
    plan = shop.plan()
    assert plan.attestations == ("nobody-called",)
    with pytest.raises(NotApproved, match="Not attested: nobody-called"):
        shop.approve(plan)
    signed = shop.approve(plan, attested=["nobody-called"])
    silent = signed.model_copy(update={"attestations": ()})
    before = governed.image(shop.db)
    with pytest.raises(NotApproved) as caught:
        shop.apply(plan, [silent])
    assert any("does not attest nobody-called" in line for line in caught.value.details)
    assert governed.image(shop.db) == before
    done = shop.apply(plan, [signed])
    (verdict,) = [one for one in done.invariants if one.address == "invariant.nobody-called"]
    assert verdict.status == "attested"
    shop.in_sync()


def test_a_proxy_can_refute_an_attestation(shop: Governed) -> None:
    del shop.state["invariants"]["outbox-untouched"]
    proxy = {"query": "SELECT o.id FROM app.outbox AS o", "unchanged": True}
    shop.state["invariants"]["no-mail"] = {"attest": "No mail was sent.", "proxy": proxy}
    shop.write()
    behind_our_back(shop, "INSERT INTO app.outbox (note) VALUES ('mail');")
    plan = shop.plan()
    with pytest.raises(Violated) as caught:
        shop.apply(plan, [shop.approve(plan, attested=["no-mail"])])
    assert any("what its proxy query sees changed" in line for line in caught.value.details)


# ------------------------------------------------------------------------------------------------------------- surface


SURFACE = {
    "functions": {
        "query": "SELECT pg_catalog.count(*) FROM pg_catalog.pg_proc AS p"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = 'app'",
        "counts": {"kind": "function", "schema": "app"},
    },
    "settings": {"query": "SELECT pg_catalog.count(*) FROM app.settings", "counts": {"kind": "gate"}},
    "till-keys": {
        "query": "SELECT pg_catalog.count(*) FROM app.settings AS s WHERE s.name LIKE 'shop.t%'",
        "counts": {"kind": "gate", "matching": "shop.t*"},
    },
    "heartbeats": {
        "query": "SELECT pg_catalog.count(*) FROM app.heartbeat",
        "counts": {"kind": "marker", "table": "app.heartbeat"},
    },
    "jobs": {"query": "SELECT pg_catalog.count(*) FROM app.job"},
    "outbox": {
        "query": "SELECT pg_catalog.count(*) FROM app.outbox",
        "expect": "background",
        "relation": "app.outbox",
    },
    "cursor": {"query": "SELECT c.ran FROM app.cursor AS c", "expect": "not_before"},
    "size": {"query": "SELECT pg_catalog.max(o.id) FROM app.outbox AS o", "expect": "observed"},
}


@pytest.fixture
def counted(shop: Governed) -> Governed:
    shop.state["invariants"].pop("outbox-untouched")
    shop.state["surface"] = SURFACE
    return shop.write()


def test_the_surface_is_as_predicted(counted: Governed) -> None:
    done = counted.settle()
    rows = {row.address: row for row in done.surface}
    assert {row.status for row in rows.values()} == {"predicted"}
    assert (rows["surface.functions"].predicted, rows["surface.functions"].detail) == ("+1", "1 -> 2 (+1)")
    assert (rows["surface.settings"].predicted, rows["surface.settings"].detail) == ("+2", "3 -> 5 (+2)")
    assert rows["surface.till-keys"].predicted == "+1"
    assert rows["surface.heartbeats"].predicted == "+1"
    assert rows["surface.jobs"].predicted == "unchanged"
    # A second apply that changes one gate predicts nothing to add.
    counted.state["gates"]["shop.limit"]["value"] = "20"
    counted.write()
    rows = {row.address: row for row in counted.settle().surface}
    assert rows["surface.settings"].predicted == "0"


@pytest.mark.parametrize(
    ("row", "body", "said"),
    [
        ("jobs", "INSERT INTO app.job VALUES (1, 'x');", "0 -> 1, predicted unchanged"),
        ("settings", "INSERT INTO app.settings VALUES ('stray', 'x');", "predicted +2"),
        ("functions", "CREATE FUNCTION app.stray() RETURNS int LANGUAGE sql AS 'SELECT 1';", "predicted +1"),
        ("outbox", "INSERT INTO app.outbox (note) VALUES ('ours');", "we wrote to it"),
        ("outbox", "DELETE FROM app.outbox WHERE id > 5;", "we wrote to it"),
        ("cursor", "UPDATE app.cursor SET ran = '2001-01-01';", "earlier than before"),
    ],
)
def test_a_number_that_is_not_as_predicted_rolls_back(counted: Governed, row: str, body: str, said: str) -> None:
    behind_our_back(counted, body)
    assert said in refused(counted, f"surface.{row}")


def test_a_cursor_that_moved_on_is_good_news(counted: Governed) -> None:
    counted.sql("INSERT INTO app.heartbeat VALUES ('courier', 'legacy', '2026-05-22 11:31:41.928657+00')")
    behind_our_back(counted, "UPDATE app.cursor SET ran = '2100-01-01';")
    rows = {row.address: row for row in counted.settle().surface}
    assert rows["surface.cursor"].status == "predicted"


# ---------------------------------------------------------------------------------------------------------------- pins


PINNED = """
CREATE TABLE app.observed (
    id bigint PRIMARY KEY, kind text NOT NULL DEFAULT 'a', amount int CHECK (amount > 0), ref bigint,
    CONSTRAINT kinds CHECK (kind IN ('a', 'b'))
);
CREATE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN IF NEW.kind = 'c' THEN RAISE 'no'; END IF; RETURN NEW; END $body$;
CREATE TRIGGER guard BEFORE INSERT ON app.observed FOR EACH ROW EXECUTE FUNCTION app.guard();
CREATE FUNCTION app.alias_one(a int) RETURNS int LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION app.alias_two(a int) RETURNS int LANGUAGE sql AS 'SELECT a';
"""

TAMPERED = [
    ("table", "ALTER TABLE app.observed ADD COLUMN extra text"),
    ("table", "ALTER TABLE app.observed ALTER kind DROP NOT NULL"),
    ("table", "ALTER TABLE app.observed ALTER kind SET DEFAULT 'b'"),
    ("table", "ALTER TABLE app.observed ALTER amount TYPE bigint"),
    (
        "table",
        "ALTER TABLE app.observed DROP CONSTRAINT kinds, ADD CONSTRAINT kinds CHECK (kind IN ('a', 'b', 'c'))",
    ),
    (
        "table",
        "ALTER TABLE app.observed DROP CONSTRAINT kinds, ADD CONSTRAINT kinds CHECK (kind IN ('a', 'b')) NOT VALID",
    ),
    ("table", "ALTER TABLE app.observed DROP CONSTRAINT kinds"),
    ("table", "CREATE INDEX ON app.observed (kind)"),
    ("table", "ALTER TABLE app.observed DISABLE TRIGGER guard"),
    ("table", "ALTER TABLE app.observed ENABLE ALWAYS TRIGGER guard"),
    ("table", "DROP TRIGGER guard ON app.observed"),
    (
        "table",
        "CREATE OR REPLACE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql AS $b$ BEGIN RETURN NEW; END $b$",
    ),
    ("table", "ALTER FUNCTION app.guard() SECURITY DEFINER"),
    ("table", "ALTER TABLE app.observed OWNER TO {owner}"),
    ("table", "GRANT INSERT ON app.observed TO {caller}"),
    ("table", "GRANT UPDATE (kind) ON app.observed TO {caller}"),
    ("table", "ALTER TABLE app.observed ENABLE ROW LEVEL SECURITY"),
    ("table", "CREATE POLICY mine ON app.observed USING (kind = 'a')"),
    ("table", "CREATE RULE silent AS ON DELETE TO app.observed DO INSTEAD NOTHING"),
    ("table", "ALTER TABLE app.observed REPLICA IDENTITY FULL"),
    ("table", "ALTER TABLE app.observed ADD FOREIGN KEY (ref) REFERENCES app.outbox (id)"),
    ("table", "DROP TABLE app.observed"),
    ("functions", "CREATE OR REPLACE FUNCTION app.alias_one(a int) RETURNS int LANGUAGE sql AS 'SELECT a + 0'"),
    ("functions", "GRANT EXECUTE ON FUNCTION app.alias_one(int) TO {caller}"),
    ("functions", "REVOKE EXECUTE ON FUNCTION app.alias_two(int) FROM PUBLIC"),
    ("functions", "ALTER FUNCTION app.alias_two(int) OWNER TO {owner}"),
    ("functions", "ALTER FUNCTION app.alias_two(int) STRICT"),
    ("functions", "ALTER FUNCTION app.alias_two(int) SET search_path = app"),
    ("functions", "CREATE FUNCTION app.alias_three() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    ("functions", "DROP FUNCTION app.alias_two(int)"),
]


@pytest.fixture
def pinned(shop: Governed) -> Governed:
    shop.sql(PINNED)
    shop.state["invariants"] |= {
        "table": {"pin": {"table": "app.observed"}},
        "functions": {"pin": {"functions": "app.alias_*"}},
    }
    shop.write()
    done = governed.command("pin", "-s", shop.directory, dsn=shop.db.dsn)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return shop


def test_a_pin_must_be_captured_first(shop: Governed) -> None:
    shop.state["invariants"]["table"] = {"pin": {"table": "app.outbox"}}
    shop.write()
    done = governed.command("validate", "-s", shop.directory)
    assert done.returncode == 1
    assert "nothing is captured for it: run `reconciler pin`" in done.stderr


def test_capturing_again_changes_nothing(pinned: Governed) -> None:
    file = pinned.directory / "pins.yaml"
    text = file.read_text()
    governed.command("pin", "-s", pinned.directory, dsn=pinned.db.dsn)
    assert file.read_text() == text
    pinned.settle()


@pytest.mark.parametrize(("pin", "by_hand"), TAMPERED)
def test_a_pinned_definition_that_moved_is_seen(pinned: Governed, pin: str, by_hand: str) -> None:
    held = {verdict.address: verdict.status for verdict in pinned.plan().invariants}
    assert held[f"invariant.{pin}"] == "held"
    pinned.sql(by_hand)
    plan = pinned.plan()
    verdicts = {verdict.address: verdict.status for verdict in plan.invariants}
    assert verdicts[f"invariant.{pin}"] == "violated"
    assert verdicts[f"invariant.{'functions' if pin == 'table' else 'table'}"] == "held"
    assert plan.outcome == "violated"


def test_a_definition_that_the_apply_itself_would_change_rolls_back(pinned: Governed) -> None:
    behind_our_back(pinned, "ALTER TABLE app.observed DISABLE TRIGGER guard;")
    assert "disabled" in refused(pinned, "invariant.table")
