"""What an apply may not do on the side: each way to do it behind our back, and each harmless thing that looks alike."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import psycopg
import pytest

from reconciler import apply as applying
from reconciler import definitions
from reconciler.errors import NotApproved, Stale, Violated
from tests import sampling
from tests.integration import governed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database


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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


@pytest.mark.smoke
def test_a_write_by_another_backend_on_our_behalf_is_seen(shop: Governed) -> None:
    """Over dblink: no lock of ours tells of it, and what it wrote stands."""
    shop.sql("CREATE EXTENSION dblink SCHEMA app")
    insert = "INSERT INTO app.outbox (note) VALUES (''x'')"
    behind_our_back(shop, f"PERFORM app.dblink_exec('{shop.db.dsn}', '{insert}');")
    with pytest.raises(Stale) as caught:
        shop.apply(shop.plan())
    assert caught.value.details == ("app.dblink_exec(text,text) was called, which no rollback reaches",)
    assert shop.db.execute("SELECT count(*) FROM app.outbox") == [(11,)]
    assert shop.entries() == 0


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


@pytest.mark.smoke
def test_what_others_write_meanwhile_is_theirs(shop: Governed) -> None:
    stop, begun = threading.Event(), threading.Event()

    def write() -> None:
        with psycopg.connect(shop.db.dsn, autocommit=True) as conn:
            while not stop.wait(0.005):
                conn.execute("INSERT INTO app.outbox (note) VALUES ('background')")
                begun.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(60)
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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


class Meanwhile:
    """A progress that lets others write and commit, each time the apply comes to a stage."""

    def __init__(self, system: Governed, *statements: str, stages: tuple[str, ...] = ("execute", "verify")) -> None:
        self._system = system
        self._statements = statements
        self._left = list(stages)
        self.times = 0

    def __call__(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, number, of
        if stage not in self._left:
            return
        self._left.remove(stage)
        with psycopg.connect(self._system.db.dsn, autocommit=True) as conn:
            conn.execute("SET lock_timeout = '5s'")
            for statement in self._statements:
                conn.execute(statement.encode())
                self.times += 1


OTHERS = {
    "jobs": ("INSERT INTO app.job SELECT 1 + max(id), 'somebody' FROM app.job", "2 -> 4 (+2), +2 by others"),
    "settings": (
        "INSERT INTO app.settings SELECT 'theirs.' || count(*), 'x' FROM app.settings",
        "3 -> 7 (+4), +2 by others",
    ),
    "till-keys": (
        "INSERT INTO app.settings SELECT 'shop.theirs.' || count(*), 'x' FROM app.settings",
        "0 -> 3 (+3), +2 by others",
    ),
    "heartbeats": (
        "INSERT INTO app.heartbeat SELECT 'w' || count(*), 'x', now() FROM app.heartbeat",
        "0 -> 3 (+3), +2 by others",
    ),
    "functions": ("SELECT 1", "1 -> 2 (+1)"),
    "outbox": ("INSERT INTO app.outbox (note) VALUES ('theirs')", "10 -> 12 (+2), +2 by others"),
    "owners": ("INSERT INTO app.job VALUES (-1, 'zoe') ON CONFLICT DO NOTHING", "ann, bob -> ann, bob, zoe, by others"),
    "tables": (
        "CREATE TABLE IF NOT EXISTS app.theirs (id int)",
        r"(\d+) -> \d+ \(\+1\), \+1 by others",
    ),
}


@pytest.fixture
def crowded(counted: Governed) -> Governed:
    counted.sql("INSERT INTO app.job VALUES (1, 'ann'), (2, 'bob')")
    counted.state["surface"] = {
        **SURFACE,
        "till-keys": {**SURFACE["till-keys"], "query": SURFACE["till-keys"]["query"].replace("shop.t%", "shop.t_%")},
        "owners": {"query": "SELECT pg_catalog.string_agg(j.actor, ', ' ORDER BY j.actor) FROM app.job AS j"},
        "tables": {
            "query": "SELECT pg_catalog.count(*) FROM pg_catalog.pg_class AS c"
            " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname = 'app'"
        },
    }
    return counted.write()


@pytest.mark.smoke
@pytest.mark.parametrize("row", OTHERS)
def test_what_others_commit_during_the_apply_is_theirs(crowded: Governed, row: str) -> None:
    statement, said = OTHERS[row]
    if row == "tables":
        # The first apply makes the ledger, so that it writes to the catalogs itself: this is the second.
        crowded.settle()
        crowded.state["gates"]["shop.limit"]["value"] = "20"
        crowded.write()
    meanwhile = Meanwhile(crowded, statement)
    done = applying.apply(crowded.request(crowded.plan()), meanwhile)
    assert meanwhile.times == 2
    rows = {one.address.partition(".")[2]: one for one in done.surface}
    assert {one.status for one in rows.values()} == {"predicted"}, rows
    assert re.fullmatch(said if row == "tables" else re.escape(said), rows[row].detail), rows[row].detail
    assert done.problems == ()
    crowded.in_sync()


OURS = {
    # Ours alone, among many of theirs.
    "jobs": ("INSERT INTO app.job VALUES (99, 'ours');", "and of our own it is +1"),
    "settings": ("INSERT INTO app.settings VALUES ('stray', 'x');", "and of our own it is +3"),
    "till-keys": ("INSERT INTO app.settings VALUES ('stray', 'x');", "app.settings: "),
    "owners": ("INSERT INTO app.job VALUES (99, 'ours');", "app.job: 1 row written"),
    "outbox": ("INSERT INTO app.outbox (note) VALUES ('ours');", "we wrote to it: app.outbox: 1 row written"),
    "functions": ("CREATE FUNCTION app.stray() RETURNS int LANGUAGE sql AS 'SELECT 1';", "predicted +1"),
    "tables": ("CREATE TABLE app.stray (id int);", "predicted unchanged; pg_catalog.pg_class: "),
}


@pytest.mark.smoke
@pytest.mark.parametrize("row", OURS)
def test_what_we_wrote_is_not_hidden_by_what_others_write(crowded: Governed, row: str) -> None:
    body, said = OURS[row]
    behind_our_back(crowded, f"IF NEW.name = 'shop.open' THEN {body} END IF;")
    meanwhile = Meanwhile(crowded, OTHERS[row][0])
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), meanwhile)
    (line,) = [line for line in caught.value.details if line.startswith(f"surface.{row}: ")]
    assert said in line
    crowded.sql("DROP TRIGGER on_change ON app.settings")
    crowded.settle()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("DELETE FROM app.job WHERE id = 1;", "INSERT INTO app.job VALUES (7, 'x')", "2 -> 2, .*of our own it is -1"),
        ("INSERT INTO app.job VALUES (7, 'x');", "DELETE FROM app.job WHERE id = 1", "2 -> 2, .*of our own it is \\+1"),
        ("TRUNCATE app.job;", None, "2 -> 0, predicted unchanged; app.job: AccessExclusiveLock taken"),
    ],
)
def test_what_we_took_away_cannot_be_made_up_for_by_others(
    crowded: Governed, ours: str, theirs: str | None, said: str
) -> None:
    """At an equal number, because somebody else wrote as much the other way."""
    behind_our_back(crowded, f"IF NEW.name = 'shop.open' THEN {ours} END IF;")
    meanwhile = Meanwhile(crowded, *([theirs] if theirs else []), stages=("verify",))
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), meanwhile)
    (line,) = [line for line in caught.value.details if line.startswith("surface.jobs: ")]
    assert re.search(said, line)


BLIND = {
    "a view": ("SELECT v.n FROM app.seen AS v", "app.seen is no table"),
    "a function of the catalog": (
        "SELECT pg_catalog.string_agg(pg_catalog.format_type(23, j.id::int4), ',') FROM app.job AS j",
        "it calls a function that may read anything",
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_where_nobody_can_tell_whose_it_is_a_difference_blocks(crowded: Governed, name: str) -> None:
    query, why = BLIND[name]
    crowded.sql("CREATE VIEW app.seen AS SELECT count(*) AS n FROM app.job")
    crowded.state["surface"] = {"blind": {"query": query}}
    crowded.write()
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), Meanwhile(crowded, OTHERS["jobs"][0]))
    (line,) = caught.value.details
    assert line.endswith(f"predicted unchanged; nobody can tell who did it, because {why}")
    crowded.settle()


@pytest.mark.smoke
def test_counters_that_are_off_tell_nothing(crowded: Governed) -> None:
    crowded.state["surface"] = {"jobs": SURFACE["jobs"]}
    crowded.write()
    crowded.sql(f"ALTER DATABASE {crowded.db.name} SET track_counts = off")
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), Meanwhile(crowded, OTHERS["jobs"][0]))
    assert caught.value.details[0].endswith("because track_counts is off")
    crowded.settle()


@pytest.mark.smoke
def test_a_partition_that_was_attached_meanwhile_hides_nothing(crowded: Governed) -> None:
    crowded.state["surface"] = {"log": {"query": "SELECT pg_catalog.count(*) FROM app.log"}}
    crowded.state["invariants"]["log-untouched"] = {"untouched": ["app.log"]}
    crowded.write()
    behind_our_back(
        crowded,
        "IF NEW.name = 'shop.open' AND to_regclass('app.log_later') IS NOT NULL THEN"
        " INSERT INTO app.log VALUES ('2150-01-01', 'x'); END IF;",
    )
    # Attaching waits for nobody who reads, unlike CREATE TABLE ... PARTITION OF.
    attach = (
        "CREATE TABLE app.log_later (LIKE app.log)",
        "ALTER TABLE app.log ATTACH PARTITION app.log_later FOR VALUES FROM ('2100-01-01') TO ('2200-01-01')",
    )
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), Meanwhile(crowded, *attach, stages=("execute",)))
    assert sorted(caught.value.details) == [
        "invariant.log-untouched: violated: app.log_later: 1 row written",
        "surface.log: differs: 0 -> 1, predicted unchanged, and of our own it is +1",
    ]


def test_an_answer_that_others_change_during_the_apply_is_theirs(crowded: Governed) -> None:
    crowded.state["invariants"]["jobs"] = {"query": "SELECT j.* FROM app.job AS j", "unchanged": True}
    proxy = {"query": "SELECT j.id FROM app.job AS j", "unchanged": True}
    crowded.state["invariants"]["no-mail"] = {"attest": "No mail was sent.", "proxy": proxy}
    crowded.write()
    plan = crowded.plan()
    approval = crowded.approve(plan, attested=["no-mail"])
    done = applying.apply(crowded.request(plan, [approval]), Meanwhile(crowded, OTHERS["jobs"][0]))
    said = {one.address.partition(".")[2]: (one.status, one.detail) for one in done.invariants}
    assert said["jobs"] == ("held", "the answer changed during the apply, by others")
    assert said["no-mail"] == (
        "attested",
        "No mail was sent. What its proxy query sees changed during the apply, by others.",
    )
    crowded.in_sync()


def test_an_answer_that_we_change_beside_others_is_ours(crowded: Governed) -> None:
    crowded.state["invariants"]["jobs"] = {"query": "SELECT j.* FROM app.job AS j", "unchanged": True}
    crowded.write()
    behind_our_back(crowded, "UPDATE app.job SET actor = 'ours' WHERE id = 1;")
    with pytest.raises(Violated) as caught:
        applying.apply(crowded.request(crowded.plan()), Meanwhile(crowded, OTHERS["jobs"][0]))
    assert any(
        line.startswith("invariant.jobs: violated: the answer changed during the apply; app.job: ")
        for line in caught.value.details
    )


# ---------------------------------------------------------------------------------------------------------------- pins


PINNED = """
CREATE TABLE app.observed (
    id bigint PRIMARY KEY, kind text NOT NULL DEFAULT 'a', amount int CHECK (amount > 0), ref bigint,
    CONSTRAINT kinds CHECK (kind IN ('a', 'b'))
);
CREATE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN IF NEW.kind = 'c' THEN RAISE 'no'; END IF; RETURN NEW; END $body$;
CREATE TRIGGER guard BEFORE INSERT ON app.observed FOR EACH ROW EXECUTE FUNCTION app.guard();
GRANT SELECT ON app.observed TO {caller};
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
    ("table", "GRANT SELECT ON app.observed TO {stranger}"),
    ("table", "GRANT SELECT ON app.observed TO PUBLIC"),
    ("table", "GRANT SELECT (kind) ON app.observed TO {stranger}"),
    ("table", "GRANT SELECT ON app.observed TO {caller} WITH GRANT OPTION"),
    ("table", "REVOKE SELECT ON app.observed FROM {caller}"),
    ("table", "GRANT SELECT ON app.observed TO {owner}"),
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


@pytest.mark.parametrize(("pin", "by_hand"), sampling.smoke(TAMPERED, 3, others=pytest.mark.slow))
def test_a_pinned_definition_that_moved_is_seen(pinned: Governed, pin: str, by_hand: str) -> None:
    held = {verdict.address: verdict.status for verdict in pinned.plan().invariants}
    assert held[f"invariant.{pin}"] == "held"
    pinned.sql(by_hand)
    plan = pinned.plan()
    verdicts = {verdict.address: verdict.status for verdict in plan.invariants}
    assert verdicts[f"invariant.{pin}"] == "violated"
    assert verdicts[f"invariant.{'functions' if pin == 'table' else 'table'}"] == "held"
    assert plan.outcome == "violated"


READER = [
    ("GRANT SELECT ON app.observed TO {stranger}", "held"),
    ("GRANT SELECT (kind, id) ON app.observed TO {stranger}", "held"),
    ("REVOKE SELECT ON app.observed FROM {stranger}", "held"),
    ("GRANT SELECT ON app.observed TO {stranger} WITH GRANT OPTION", "violated"),
    ("GRANT INSERT ON app.observed TO {stranger}", "violated"),
    ("GRANT SELECT, UPDATE ON app.observed TO {stranger}", "violated"),
    ("GRANT UPDATE (kind) ON app.observed TO {stranger}", "violated"),
    ("GRANT SELECT ON app.observed TO PUBLIC", "violated"),
    ("GRANT SELECT ON app.observed TO {owner}", "violated"),
]


@pytest.mark.parametrize("tables", sampling.smoke(["table", "tables"], 2, others=pytest.mark.slow))
@pytest.mark.parametrize(("by_hand", "status"), READER)
def test_a_reader_may_read_and_nothing_else(pinned: Governed, tables: str, by_hand: str, status: str) -> None:
    pin = {"table": "app.observed"} if tables == "table" else {"tables": ["app.outbox", "app.observed"]}
    pinned.state["invariants"]["table"]["pin"] = pin
    pinned.write()
    assert governed.command("pin", "-s", pinned.directory, dsn=pinned.db.dsn).returncode == 0
    # Named after the capture: it needs no new one.
    pinned.state["invariants"]["table"]["pin"]["readers"] = [pinned.stranger]
    pinned.write()
    pinned.sql(by_hand)
    (verdict,) = [one for one in pinned.plan().invariants if one.address == "invariant.table"]
    assert verdict.status == status, verdict.detail


def test_a_reader_that_was_captured_as_one_may_lose_it(pinned: Governed) -> None:
    pinned.state["invariants"]["table"]["pin"]["readers"] = [pinned.caller]
    pinned.write()
    assert f"grant to {pinned.caller}: SELECT by postgres" in (pinned.directory / "pins.yaml").read_text()
    pinned.settle()
    pinned.sql("REVOKE SELECT ON app.observed FROM {caller}")
    pinned.in_sync()
    assert pinned.plan().blocking == ()


@pytest.mark.parametrize("name", ["user", "grant to x", 'a"b', "Über", "PUBLIC x"])
def test_the_name_of_a_reader_may_be_anything(pinned: Governed, name: str) -> None:
    """A name is only itself: no reader's name can cover another role's right."""
    pinned.state["invariants"]["table"]["pin"]["readers"] = [name]
    pinned.write()
    pinned.sql("GRANT SELECT ON app.observed TO {stranger}")
    assert pinned.plan().outcome == "violated"
    pinned.sql("REVOKE SELECT ON app.observed FROM {stranger}")
    quoted = '"' + name.replace('"', '""') + '"'
    with psycopg.connect(pinned.db.dsn) as conn:
        # Not committed: roles are the server's. A role of our own transaction is enough to read its grant back.
        conn.execute(f"CREATE ROLE {quoted}".encode())
        conn.execute(
            f"GRANT SELECT ON app.observed TO {quoted}; GRANT SELECT (kind) ON app.observed TO {quoted}".encode()
        )
        lines = conn.execute(
            "SELECT quote_ident(pg_get_userbyid((aclexplode(relacl)).grantee)) FROM pg_class"
            " WHERE oid = 'app.observed'::regclass"
        ).fetchall()
        assert definitions.reading(name) in {f"grant to {shown}: SELECT " for (shown,) in lines}
        conn.rollback()


@pytest.mark.smoke
def test_functions_have_no_readers(pinned: Governed) -> None:
    pinned.state["invariants"]["functions"]["pin"]["readers"] = [pinned.stranger]
    pinned.write()
    done = governed.command("validate", "-s", pinned.directory)
    assert done.returncode == 1
    assert "`readers` goes with `table` and `tables`" in done.stderr


def test_a_definition_that_the_apply_itself_would_change_rolls_back(pinned: Governed) -> None:
    behind_our_back(pinned, "ALTER TABLE app.observed DISABLE TRIGGER guard;")
    assert "disabled" in refused(pinned, "invariant.table")
