"""Can anything violate an invariant? The shipped ones see what is done to them; the vacuous ones are found out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from reconciler import definitions, desired, pg, rehearsal, sandbox, transitions
from reconciler.checks import forms, invariant
from reconciler.errors import ReconcilerError, ServerProblem
from reconciler.model import Asked
from reconciler.violations import Violation, synthesise
from tests import sampling
from tests.integration import phase2
from tests.integration.governed import image
from tests.servers import PROJECT, Database

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from reconciler.model import Desired

FLAGS = PROJECT / "examples" / "feature-flags"


def tried(db: Database, wanted: Desired, *names: str, dsn: str | None = None) -> dict[str, Violation]:
    """Every invariant, or those named, put to the test; afterwards the database is as it was."""
    before = image(db)
    with pg.connect(dsn or db.dsn, "prove") as conn:
        found = {
            check.name: synthesise(conn, check, Asked(wanted))
            for check in wanted.checks.values()
            if check.kind == "invariant" and (not names or check.name in names)
        }
    assert image(db) == before
    return found


def said(violation: Violation) -> list[str]:
    return [str(attempt) for attempt in violation.attempts]


# -------------------------------------------------------------------------------------------------------------- shipped

PERSONS_WORD = {"F02-no-worker-started", "F10-start-here", "F11-law-text"}


@pytest.fixture(scope="module")
def phase_2(dieu45_shared: Database) -> Database:
    dieu45_shared.execute("DROP EXTENSION IF EXISTS pgcrypto")  # the target sandbox has none
    phase2.install(dieu45_shared.conn)
    return dieu45_shared


@pytest.fixture(scope="module")
def wanted() -> Desired:
    return desired.load(phase2.STATE, "sandbox")


@pytest.mark.parametrize("name", sampling.smoke(sorted(phase2.declared("invariants")), 3))
def test_a_violation_of_every_shipped_invariant_is_seen(phase_2: Database, wanted: Desired, name: str) -> None:
    found = tried(phase_2, wanted, name)[name]
    assert found.status == ("not_tried" if name in PERSONS_WORD else "seen"), said(found)
    if name in PERSONS_WORD:
        assert "a person's word" in found.detail
    else:
        assert found.attempts[-1].outcome in {"violated", "not tried"}


def test_what_each_shipped_form_was_put_through(phase_2: Database, wanted: Desired) -> None:
    names = ("F01-no-pg-cron", "F03-no-outbox-write", "F13-worker-off", "extension-set", "no-blank-actor")
    found = tried(phase_2, wanted, *names)
    assert [attempt.outcome for attempt in found["F01-no-pg-cron"].attempts] == ["violated"] * 4 + ["not tried"]
    assert "pg_cron added to shared_preload_libraries: not tried" in found["F01-no-pg-cron"].detail
    outbox = "public.event_outbox"
    assert [attempt.tried for attempt in found["F03-no-outbox-write"].attempts] == [
        f"a row inserted into {outbox}",
        f"a row of {outbox} updated",
        f"a row of {outbox} deleted",
        f"{outbox} truncated",
        f"{outbox}: a column added",
        f"{outbox}: a trigger added",
        f"{outbox}: an index added",
    ]
    assert [attempt.tried.removeprefix("queue.worker.enabled ") for attempt in found["F13-worker-off"].attempts] == [
        "turned to 'true'",
        "turned to 'true' and back",
        "written with the value that it has",
        "the row of queue.worker.enabled deleted",
    ]
    assert [attempt.tried for attempt in found["extension-set"].attempts] == [
        "one more extension",
        "extension btree_gist dropped",
        "extension plpgsql dropped",
        "extension postgres_fdw dropped",
    ]
    # A second line of defence: it sees what the table's own CHECK keeps out.
    assert found["no-blank-actor"].attempts[-1].without == ("CHECK constraint job_queue_actor_check",)
    assert "once CHECK constraint job_queue_actor_check is out of the way" in found["no-blank-actor"].detail


def test_a_violation_of_every_invariant_of_the_second_system_is_seen(db: Database) -> None:
    sandbox.load(FLAGS / "baseline", db.dsn)
    db.execute("DROP EXTENSION IF EXISTS pgcrypto")
    found = tried(db, desired.load(FLAGS / "state", None))
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(found, "seen")
    assert len(found) == 6


@pytest.mark.slow
def test_on_a_rehearsal_whose_tables_are_empty_too(dieu45: Database, db: Database) -> None:
    dieu45.execute("DROP EXTENSION IF EXISTS pgcrypto")
    wanted = desired.load(phase2.STATE, "sandbox")
    with rehearsal.prepared(dieu45.dsn, wanted, scratch=db.dsn) as copy:
        found = tried(db, wanted, dsn=copy.dsn)
    assert {name for name, one in found.items() if one.status != "seen"} == PERSONS_WORD


# ------------------------------------------------------------------------------------------------- queries of all kinds

SYSTEM = """
CREATE SCHEMA app;
GRANT USAGE ON SCHEMA app TO {reader};
CREATE TYPE app.mood AS ENUM ('sad', 'ok');
CREATE DOMAIN app.percent AS numeric CONSTRAINT up_to_100 CHECK (VALUE BETWEEN 0 AND 100);
CREATE TABLE app.settings (name text PRIMARY KEY, value text);
INSERT INTO app.settings VALUES ('app.open', 'false');
CREATE TABLE app.customer (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email text NOT NULL CONSTRAINT once UNIQUE CHECK (email ~ '^[^@]+@[^@]+$'),
    born date, mood app.mood, discount app.percent NOT NULL DEFAULT 0, tags text[] NOT NULL DEFAULT '{{}}',
    size integer GENERATED ALWAYS AS (length(email)) STORED
);
CREATE TABLE app.purchase (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), customer bigint NOT NULL CONSTRAINT bought REFERENCES app.customer,
    amount numeric(10, 2) NOT NULL CHECK (amount > 0), paid boolean NOT NULL DEFAULT false, paid_at timestamptz,
    state varchar(3) NOT NULL DEFAULT 'new', data jsonb NOT NULL DEFAULT '{{}}', during tstzrange, ip inet,
    CONSTRAINT paid_when CHECK (paid = (paid_at IS NOT NULL))
);
CREATE TABLE app.ledger (id serial PRIMARY KEY, account text NOT NULL, delta numeric NOT NULL);
CREATE TABLE app.log (at timestamptz NOT NULL, note text, level smallint NOT NULL) PARTITION BY RANGE (at);
CREATE TABLE app.log_1 PARTITION OF app.log FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
CREATE VIEW app.unpaid AS SELECT p.id AS purchase, p.amount FROM app.purchase p WHERE NOT p.paid;
CREATE VIEW app.never AS SELECT * FROM app.purchase WHERE false;
CREATE MATERIALIZED VIEW app.totals AS SELECT customer, sum(amount) AS total FROM app.purchase GROUP BY customer;
CREATE TABLE app.node (
    id integer PRIMARY KEY, parent integer REFERENCES app.node, kind text NOT NULL CHECK (kind IN ('a', 'b'))
);
INSERT INTO app.node VALUES (1, NULL, 'a'), (2, 1, 'b');
CREATE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.delta > 1000 THEN RAISE EXCEPTION 'too much'; END IF;
    NEW.account := lower(NEW.account);
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON app.ledger FOR EACH ROW EXECUTE FUNCTION app.guard();
CREATE FUNCTION app.pay() RETURNS integer LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS 'SELECT 1';
REVOKE ALL ON FUNCTION app.pay() FROM PUBLIC;
"""

Queries = dict[str, tuple[str, int | str]]
"""By name: the query, and how many rows it must give, or `=` and its value, or `~` when its answer must not change."""

ROWS: Queries = {
    "two columns": ("SELECT p.id FROM app.purchase AS p WHERE p.paid_at > now() AND p.amount < 1", 0),
    "no alias": ("SELECT id FROM app.purchase WHERE amount > 5000", 0),
    "a moment between": (
        (
            "SELECT p.id FROM app.purchase AS p"
            " WHERE p.paid_at < now() - interval '5 min' AND p.paid_at > now() - interval '1 h'"
        ),
        0,
    ),
    "left join": (
        "SELECT c.id FROM app.customer AS c LEFT JOIN app.purchase AS p ON p.customer = c.id WHERE p.id IS NULL",
        0,
    ),
    "not exists": (
        (
            "SELECT c.id FROM app.customer AS c WHERE c.mood = 'sad'"
            " AND NOT EXISTS (SELECT 1 FROM app.purchase AS p WHERE p.customer = c.id)"
        ),
        0,
    ),
    "exists": (
        (
            "SELECT c.id FROM app.customer AS c"
            " WHERE EXISTS (SELECT 1 FROM app.purchase AS p WHERE p.customer = c.id AND p.amount > 5000)"
        ),
        0,
    ),
    "in": (
        (
            "SELECT p.id FROM app.purchase AS p WHERE p.paid"
            " AND p.customer IN (SELECT c.id FROM app.customer AS c WHERE c.born > '2020-01-01')"
        ),
        0,
    ),
    "cte": (
        (
            "WITH late AS (SELECT p.customer FROM app.purchase AS p WHERE p.paid_at < now() - interval '2 years')"
            " SELECT c.id FROM late JOIN app.customer AS c ON c.id = late.customer WHERE c.discount > 50"
        ),
        0,
    ),
    "subselect": (
        (
            "SELECT q.customer FROM (SELECT p.customer, count(*) AS n FROM app.purchase AS p GROUP BY p.customer) AS q"
            " WHERE q.n > 3"
        ),
        0,
    ),
    "six alike": ("SELECT l.account FROM app.ledger AS l GROUP BY l.account HAVING count(*) > 5", 0),
    "a sum": ("SELECT l.account FROM app.ledger AS l GROUP BY l.account HAVING sum(l.delta) <> 0", 0),
    "union": (
        (
            "SELECT l.account FROM app.ledger AS l WHERE l.delta < -500 UNION ALL"
            " SELECT c.email FROM app.customer AS c WHERE c.mood IS NULL AND c.email LIKE '%@example.com'"
        ),
        0,
    ),
    "except": ("SELECT l.account FROM app.ledger AS l EXCEPT SELECT c.email FROM app.customer AS c", 0),
    "window": (
        (
            "SELECT q.id FROM (SELECT n.id, n.kind, lag(n.kind) OVER (ORDER BY n.id) AS before FROM app.node AS n) AS q"
            " WHERE q.kind = 'a' AND q.before = 'b'"
        ),
        0,
    ),
    "self join": ("SELECT a.id FROM app.node AS a JOIN app.node AS b ON b.id = a.parent WHERE a.kind = b.kind", 0),
    "case": ("SELECT n.id FROM app.node AS n WHERE CASE n.kind WHEN 'a' THEN n.parent IS NOT NULL ELSE false END", 0),
    "json": (
        "SELECT p.id FROM app.purchase AS p WHERE p.data ->> 'coupon' = 'FREE' AND (p.data -> 'limit')::int4 > 10",
        0,
    ),
    "json path": ("SELECT p.id FROM app.purchase AS p WHERE p.data #>> '{a,b}' = 'x'", 0),
    "json key": ("SELECT p.id FROM app.purchase AS p WHERE p.data ? 'password'", 0),
    "json each": (
        "SELECT p.id FROM app.purchase AS p, LATERAL jsonb_each_text(p.data) AS e WHERE e.key = 'secret'",
        0,
    ),
    "array": ("SELECT c.id FROM app.customer AS c WHERE 'vip' = ANY (c.tags) AND c.discount = 0", 0),
    "long array": ("SELECT c.id FROM app.customer AS c WHERE cardinality(c.tags) > 3", 0),
    "unnest": ("SELECT c.id FROM app.customer AS c, LATERAL unnest(c.tags) AS t(tag) WHERE t.tag = 'banned'", 0),
    "range": ("SELECT p.id FROM app.purchase AS p WHERE isempty(p.during)", 0),
    "network": ("SELECT p.id FROM app.purchase AS p WHERE p.ip << '10.0.0.0/8'::inet", 0),
    "generated": ("SELECT c.id FROM app.customer AS c WHERE c.size < 4", 0),
    "prefix": ("SELECT s.name FROM app.settings AS s WHERE starts_with(s.name, 'tmp.')", 0),
    "partition": ("SELECT l.note FROM app.log AS l WHERE l.level > 5", 0),
    "view": ("SELECT u.purchase FROM app.unpaid AS u WHERE u.amount > 100", 0),
    "materialized view": ("SELECT t.customer FROM app.totals AS t WHERE t.total > 1000", 0),
    "must be there": ("SELECT n.id FROM app.node AS n WHERE n.id = 1", 1),
    "a count": ("SELECT count(*) FROM app.node AS n", "=2"),
    "all of them": ("SELECT bool_and(n.kind IN ('a', 'b')) FROM app.node AS n", "=true"),
    "a value": ("SELECT n.kind FROM app.node AS n WHERE n.id = 1", "=a"),
    "unchanged": ("SELECT count(*) FROM app.ledger AS l", "~"),
    "unchanged, of some": ("SELECT l.account FROM app.ledger AS l WHERE l.delta > 10", "~"),
}

SECOND_LINE: dict[str, tuple[str, int | str, str]] = {
    "a check": ("SELECT n.id FROM app.node AS n WHERE n.kind = 'c'", 0, "CHECK constraint node_kind_check"),
    "of two columns": (
        "SELECT p.id FROM app.purchase AS p WHERE p.paid AND p.paid_at IS NULL",
        0,
        "CHECK constraint paid_when",
    ),
    "unique": (
        "SELECT c.email FROM app.customer AS c GROUP BY c.email HAVING count(*) > 1",
        0,
        "unique constraint once",
    ),
    "foreign key": (
        "SELECT p.id FROM app.purchase AS p LEFT JOIN app.customer AS c ON c.id = p.customer WHERE c.id IS NULL",
        0,
        "foreign key bought",
    ),
    "not null": ("SELECT p.id FROM app.purchase AS p WHERE p.amount IS NULL", 0, "NOT NULL of purchase.amount"),
    "domain": (
        "SELECT c.id FROM app.customer AS c WHERE c.discount > 100",
        0,
        "constraint up_to_100 of domain percent",
    ),
    "a trigger that refuses": ("SELECT l.id FROM app.ledger AS l WHERE l.delta > 2000", 0, "trigger guard"),
    "a trigger that rewrites": (
        "SELECT l.id FROM app.ledger AS l WHERE l.account <> lower(l.account)",
        0,
        "trigger guard",
    ),
}
"""With what has to be out of the way."""

CATALOG: Queries = {
    "superusers": ("SELECT r.rolname FROM pg_catalog.pg_roles AS r WHERE r.rolsuper AND r.rolname !~ 'postgres'", 0),
    "paths": (
        (
            "SELECT p.oid FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace"
            " WHERE n.nspname = 'app' AND p.prosecdef AND p.proconfig IS NULL"
        ),
        0,
    ),
    "attributes": (
        (
            "SELECT p.oid FROM pg_catalog.pg_proc AS p WHERE p.pronamespace = 'app'::regnamespace"
            " AND p.provolatile = 'i' AND p.prosecdef"
        ),
        0,
    ),
    "a function must be there": (
        (
            "SELECT p.oid FROM pg_catalog.pg_proc AS p WHERE p.pronamespace = 'app'::regnamespace AND p.proname = 'pay'"
            " AND p.pronargs = 0"
        ),
        1,
    ),
    "execute": (
        (
            "SELECT p.oid FROM pg_catalog.pg_proc AS p, LATERAL aclexplode(p.proacl) AS a"
            " WHERE p.oid = 'app.pay()'::regprocedure AND a.grantee = 0"
        ),
        0,
    ),
    "row security": (
        "SELECT c.relrowsecurity FROM pg_catalog.pg_class AS c WHERE c.oid = 'app.node'::regclass",
        "=false",
    ),
    "triggers": (
        "SELECT t.tgname FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = 'app.node'::regclass AND NOT t.tgisinternal",
        0,
    ),
    "constraints": (
        (
            "SELECT string_agg(pg_get_constraintdef(c.oid), ' AND ' ORDER BY c.conname)"
            " FROM pg_catalog.pg_constraint AS c"
            " WHERE c.conrelid = 'app.node'::regclass AND c.contype = 'c'"
        ),
        "=CHECK ((kind = ANY (ARRAY['a'::text, 'b'::text])))",
    ),
    "tables": ("SELECT count(*) FROM pg_catalog.pg_tables AS t WHERE t.schemaname = 'app'", "=7"),
    "columns": (
        "SELECT count(*) FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = 'app.node'::regclass AND a.attnum > 0",
        "=3",
    ),
    "privilege": ("SELECT has_table_privilege('{reader}', 'app.node', 'UPDATE')", "=false"),
    "member": ("SELECT pg_has_role('{reader}', '{writer}', 'MEMBER')", "=false"),
    "event triggers": ("SELECT e.evtname FROM pg_catalog.pg_event_trigger AS e", 0),
    "publications": ("SELECT p.pubname FROM pg_catalog.pg_publication AS p", 0),
    "subscriptions": ("SELECT s.subname FROM pg_catalog.pg_subscription AS s", 0),
    "policies": ("SELECT p.policyname FROM pg_catalog.pg_policies AS p WHERE p.schemaname = 'app'", 0),
    "unlogged": ("SELECT c.relname FROM pg_catalog.pg_class AS c WHERE c.relpersistence = 'u'", 0),
    "broken indexes": ("SELECT i.indexrelid FROM pg_catalog.pg_index AS i WHERE NOT i.indisvalid", 0),
    "settings": ("SELECT d.setrole FROM pg_catalog.pg_db_role_setting AS d WHERE d.setdatabase = 1", 0),
    "sessions": (
        (
            "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a"
            " WHERE a.application_name LIKE 'worker%' AND a.state = 'idle'"
        ),
        0,
    ),
    "slots": ("SELECT s.slot_name FROM pg_catalog.pg_replication_slots AS s", 0),
}

VACUOUS: Queries = {
    "false": ("SELECT n.id FROM app.node AS n WHERE false", 0),
    "contradiction": ("SELECT n.id FROM app.node AS n WHERE n.kind = 'a' AND n.kind = 'b'", 0),
    "between nothing": ("SELECT n.id FROM app.node AS n WHERE n.id > 5 AND n.id < 3", 0),
    "unequal to itself": ("SELECT n.id FROM app.node AS n WHERE n.id <> n.id", 0),
    "equal to NULL": ("SELECT n.id FROM app.node AS n WHERE n.kind = NULL", 0),
    "not in NULL": ("SELECT n.id FROM app.node AS n WHERE n.kind NOT IN ('a', NULL)", 0),
    "too long for its type": ("SELECT p.id FROM app.purchase AS p WHERE p.state = 'cancelled'", 0),
    "no boolean": ("SELECT p.id FROM app.purchase AS p WHERE p.paid::text = 'yes'", 0),
    "no number": ("SELECT n.id FROM app.node AS n WHERE n.id::text = 'one'", 0),
    "never in upper case": ("SELECT s.name FROM app.settings AS s WHERE upper(s.name) = 'abc'", 0),
    "no rows wanted": ("SELECT n.id FROM app.node AS n LIMIT 0", 0),
    "an empty view": ("SELECT v.id FROM app.never AS v", 0),
    "nothing read": ("SELECT 1", "=1"),
    "nothing but arguments": ("SELECT upper('a')", "=A"),
    "nothing unchanged": ("SELECT n.id FROM app.node AS n WHERE false", "~"),
    "no such object": ("SELECT p.oid FROM pg_catalog.pg_proc AS p WHERE p.proname = 'A' AND p.proname = 'B'", 0),
}


class Shop:
    """A made-up system, and the files of whatever is asked about it."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db = db
        self.folder = folder
        self.names = {"reader": db.role(), "writer": db.role()}
        db.execute(SYSTEM.format(**self.names))

    def wanted(self, invariants: Mapping[str, Any]) -> Desired:
        governance = {
            "version": 1,
            "name": "shop",
            "release": "first",
            "targets": {"main": {}},
            "gate_stores": {"settings": {"table": "app.settings", "key": "name", "value": "value"}},
            "approval": {"signed": False},
        }
        text = json.dumps({"governance": governance, "invariants": invariants})
        for name, role in self.names.items():
            text = text.replace(f"{{{name}}}", role)
        (self.folder / "all.yaml").write_text(text)
        return desired.load(self.folder, None)

    def tried(self, invariants: Mapping[str, Any]) -> dict[str, Violation]:
        return tried(self.db, self.wanted(invariants))

    def pinned(self, pin: dict[str, str]) -> dict[str, Any]:
        """A pin invariant as it stands after `reconciler pin`."""
        with pg.connect(self.db.dsn, "pin") as conn, pg.snapshot(conn):
            lines = invariant.captured(conn, forms.Pinned.model_validate(pin))
        (self.folder / "pins.yaml").write_text(json.dumps({"pins": {"one": {"pin": pin, "lines": lines}}}))
        return {"one": {"pin": pin}}


def declared(queries: Queries) -> dict[str, Any]:
    """As invariants."""
    found: dict[str, Any] = {}
    for name, (query, wish) in queries.items():
        expected: dict[str, Any] = {"rows": wish}
        if isinstance(wish, str):
            expected = {"unchanged": True} if wish == "~" else {"equals": wish[1:]}
        found[name.replace(" ", "-").replace(",", "")] = {"query": query, **expected}
    return found


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Shop:
    return Shop(db, tmp_path)


def test_queries_over_rows_are_turned_by_rows_that_every_constraint_allows(shop: Shop) -> None:
    found = shop.tried(declared(ROWS))
    assert {name: said(one) for name, one in found.items() if one.status != "seen"} == {}
    # amount < 1 AND paid_at > now(): the table allows both; paid = (paid_at IS NOT NULL) must then hold too.
    assert {name: one.attempts[-1].without for name, one in found.items() if one.attempts[-1].without} == {}


def test_a_second_line_of_defence_says_what_the_first_is(shop: Shop) -> None:
    found = shop.tried(declared({name: (query, wish) for name, (query, wish, _) in SECOND_LINE.items()}))
    first = {name.replace(" ", "-"): (gone,) for name, (_, _, gone) in SECOND_LINE.items()}
    assert {name: one.attempts[-1].without for name, one in found.items()} == first
    assert {one.status for one in found.values()} == {"seen"}


def test_queries_over_the_catalog_are_turned_by_real_objects(shop: Shop) -> None:
    found = shop.tried(declared(CATALOG))
    assert {name: said(one) for name, one in found.items() if one.status != "seen"} == {}
    assert "in a copy that stands for pg_catalog.pg_stat_activity" in found["sessions"].detail
    assert "CREATE SUBSCRIPTION" in found["subscriptions"].detail


@pytest.mark.smoke
def test_what_nothing_can_violate_is_called_vacuous(shop: Shop) -> None:
    found = shop.tried(declared(VACUOUS))
    assert {name: said(one) for name, one in found.items() if one.status != "vacuous"} == {}
    assert "PostgreSQL's planner says so" in found["false"].detail
    assert "PostgreSQL's planner says so" in found["contradiction"].detail
    assert "kinds of attempts" in found["too-long-for-its-type"].detail
    assert "always the same" in found["nothing-read"].detail
    # What was tried stands there.
    assert any("made-up rows, whatever the constraints say" in line for line in said(found["no-number"]))


def test_a_query_about_the_server_is_not_tried_rather_than_vacuous(shop: Shop) -> None:
    found = shop.tried(declared({"version": ("SELECT now() > '2000-01-01'::timestamptz", "=true")}))["version"]
    assert (found.status, found.detail) == (
        "not_tried",
        "it reads no relation, and nothing that was done changes what its functions say",
    )


def test_a_query_that_fails_on_every_row_is_not_tried_rather_than_vacuous(shop: Shop) -> None:
    query = "SELECT l.note FROM app.log AS l WHERE 1 / (l.level - l.level) > 0"
    found = shop.tried(declared({"zero": (query, 0)}))["zero"]
    assert found.status == "not_tried"
    assert found.detail == "not everything could be tried: invariant.zero fails on every row that was made up."


def test_what_does_not_hold_to_begin_with_is_not_tried(shop: Shop) -> None:
    found = shop.tried(declared({"wrong": ("SELECT n.id FROM app.node AS n", 0)}))["wrong"]
    assert found.status == "not_tried"
    assert "does not hold to begin with: violated: 2 rows, expected 0" in found.detail


def test_the_same_is_tried_every_time(shop: Shop) -> None:
    some = declared({name: ROWS[name] for name in ("exists", "json", "six alike")})
    assert shop.tried(some) == shop.tried(some)


# ----------------------------------------------------------------------------------------------------- every other form


def test_every_facet_of_a_pinned_table_is_changed_and_seen(shop: Shop) -> None:
    shop.db.execute(
        """
        CREATE POLICY mine ON app.customer USING (true);
        CREATE INDEX by_mood ON app.customer (mood) WHERE mood = 'sad';
        GRANT UPDATE ON app.customer TO PUBLIC;
        CREATE TRIGGER guard BEFORE INSERT ON app.customer FOR EACH ROW EXECUTE FUNCTION app.guard();
        """
    )
    found = shop.tried(shop.pinned({"table": "app.customer"}))["one"]
    assert found.status == "seen", said(found)
    assert {attempt.tried.removeprefix("app.customer: ") for attempt in found.attempts} >= {
        "a CHECK added",
        "a NOT NULL dropped",
        "a NOT NULL set",
        "a column added",
        "a column dropped",
        "a column renamed",
        "a default dropped",
        "a default set",
        "a grant revoked",
        "a parent given",
        "a policy added",
        "a rule added",
        "a trigger added",
        "an index added",
        "constraint customer_email_check dropped",
        "constraint customer_email_check dropped and added again NOT VALID",
        "constraint customer_email_check widened, their number as before",
        "constraint once dropped",
        "index by_mood dropped",
        "policy mine dropped",
        "row security enabled",
        "row security forced",
        "SELECT granted",
        "SELECT granted to be passed on",
        "the function of trigger guard gutted",
        "the owner changed",
        "the replica identity changed",
        "the type of a column changed",
        "trigger guard disabled",
        "trigger guard dropped",
        "UPDATE granted",
        "UPDATE of a column granted",
    }
    # Another table refers to it, so it cannot be made unlogged: said, not hidden.
    assert [str(one) for one in found.attempts if one.outcome != "violated"] == [
        "app.customer: made unlogged: refused: constraint bought of customer"
    ]


@pytest.mark.parametrize(
    ("pin", "some"),
    [
        ({"functions": "app.*"}, {"one more function", "app.pay(): SECURITY turned", "app.guard(): the body changed"}),
        ({"functions": "app.no_*"}, {"one more function"}),
        ({"table": "app.unpaid"}, {"app.unpaid: the query of the view changed", "app.unpaid: the owner changed"}),
        ({"table": "app.log"}, {"app.log: an index added", "app.log: a column dropped"}),
        ({"table": "app.nowhere"}, {"app.nowhere created"}),
    ],
)
def test_every_pin_sees_what_is_done_to_it(shop: Shop, pin: dict[str, str], some: set[str]) -> None:
    found = shop.tried(shop.pinned(pin))["one"]
    assert found.status == "seen", said(found)
    assert some <= {attempt.tried for attempt in found.attempts if attempt.outcome == "violated"}


def test_a_write_to_any_part_of_a_table_is_seen(shop: Shop) -> None:
    found = shop.tried({"alone": {"untouched": ["app.log", "app.customer"]}})["alone"]
    assert found.status == "seen", said(found)
    assert "a row inserted into app.log: violated: app.log_1: 1 row written" in said(found)
    assert {one.outcome for one in found.attempts} == {"violated"}


def test_a_gate_is_never_vacuous(shop: Shop) -> None:
    shop.db.execute(
        """
        CREATE FUNCTION app.shut() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.value := ''false''; RETURN NEW; END';
        CREATE TRIGGER shut BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.shut();
        ALTER TABLE app.settings ADD CONSTRAINT only_false CHECK (value = 'false');
        """
    )
    found = shop.tried({"shut": {"gate": "app.open", "equals": "false"}})["shut"]
    assert found.status == "seen"
    assert said(found) == [
        (
            "app.open turned to 'true', without trigger shut, CHECK constraint only_false: violated: "
            "app.open is 'true', must be 'false'"
        ),
        "the row of app.open deleted: violated: app.open is absent",
    ]


def test_each_forbidden_thing_is_made(shop: Shop) -> None:
    forbidden = {"extension": "dblink", "schema": "other", "preload": "auto_explain", "relation": "node_copy"}
    found = shop.tried({name: {"forbid": {name: value}} for name, value in forbidden.items()})
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(forbidden, "seen")
    exactly = shop.tried({"only": {"extensions": {"exactly": ["plpgsql"]}}})["only"]
    assert [one.outcome for one in exactly.attempts] == ["violated", "violated"]


def test_an_attestation_is_only_as_good_as_its_proxy(shop: Shop) -> None:
    def attested(query: str) -> dict[str, Any]:
        return {"attest": "Nobody did.", "proxy": {"query": query, "unchanged": True}}

    found = shop.tried(
        {
            "good": attested("SELECT n.id FROM app.node AS n"),
            "empty": attested("SELECT n.id FROM app.node AS n WHERE false"),
            "none": {"attest": "Nobody did."},
        }
    )
    assert {name: one.status for name, one in found.items()} == {
        "good": "seen",
        "empty": "vacuous",
        "none": "not_tried",
    }


# ---------------------------------------------------------------------------------------------- a check that goes blind


def test_a_pin_that_does_not_look_at_validity_is_found_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = definitions._CONSTRAINTS.replace("pg_catalog.pg_get_constraintdef(k.oid)", "k.contype::pg_catalog.text")
    monkeypatch.setattr(definitions, "_CONSTRAINTS", blind.replace("CASE WHEN k.convalidated", "CASE WHEN true"))
    found = shop.tried(shop.pinned({"table": "app.node"}))["one"]
    assert found.status == "unseen"
    assert "constraint node_kind_check widened, their number as before" in found.detail
    assert "constraint node_kind_check dropped and added again NOT VALID" in found.detail


def test_counters_that_count_nothing_are_found_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions._Part, "written", 0)
    found = shop.tried({"alone": {"untouched": ["app.node"]}})["alone"]
    assert found.status == "unseen"
    assert "a row inserted into app.node, a row of app.node updated, a row of app.node deleted" in found.detail


def test_a_gate_that_nobody_reads_is_found_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "_gate_row", lambda *_: ("false", "1"))
    found = shop.tried({"shut": {"gate": "app.open", "equals": "false", "row": "untouched"}})["shut"]
    assert (found.status, {one.outcome for one in found.attempts}) == ("unseen", {"held"})


# -------------------------------------------------------------------------------------------------- what stays as it is


def test_nothing_is_written_to_a_foreign_table(shop: Shop) -> None:
    info = conninfo_to_dict(shop.db.dsn)
    shop.db.execute(
        f"""
        CREATE EXTENSION postgres_fdw;
        CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{info["host"]}', port '{info["port"]}',
            dbname '{shop.db.name}');
        CREATE USER MAPPING FOR CURRENT_USER SERVER far OPTIONS (user 'postgres', password_required 'false');
        CREATE FOREIGN TABLE app.far (id integer, parent integer, kind text) SERVER far
            OPTIONS (schema_name 'app', table_name 'node');
        """
    )
    found = shop.tried(declared({"far": ("SELECT f.id FROM app.far AS f WHERE f.kind = 'c'", 0)}))["far"]
    assert found.status == "seen"
    assert shop.tried({"far": {"untouched": ["app.far"]}})["far"].status == "not_tried"


def test_sequences_do_not_move(shop: Shop) -> None:
    query = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'app' ORDER BY 1"
    before = shop.db.execute(query)
    some = declared({name: ROWS[name] for name in ("six alike", "left join", "union")})
    assert {one.status for one in shop.tried({**some, "alone": {"untouched": ["app.ledger"]}}).values()} == {"seen"}
    assert shop.db.execute(query) == before


def test_it_can_run_inside_a_transaction_that_goes_on(shop: Shop) -> None:
    wanted = shop.wanted(declared({"a check": SECOND_LINE["a check"][:2]}))
    with pg.connect(shop.db.dsn, "prove") as conn:
        pg.run(conn, "BEGIN")
        pg.run(conn, "INSERT INTO app.node VALUES (3, 1, 'b')")
        (check,) = wanted.checks.values()
        assert synthesise(conn, check, Asked(wanted)).status == "seen"
        assert pg.rows(conn, "SELECT count(*) AS n FROM app.node") == [{"n": 3}]
        pg.run(conn, "ROLLBACK")


def test_an_owner_who_is_no_superuser_can_do_less_and_says_so(shop: Shop) -> None:
    owner = shop.names["writer"]
    tables = shop.db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relkind IN ('r', 'p')"
    )
    shop.db.execute(f"ALTER SCHEMA app OWNER TO {owner}")
    for (name,) in tables:
        shop.db.execute(f"ALTER TABLE app.{name} OWNER TO {owner}")
    shop.db.execute(f"GRANT CREATE ON DATABASE {shop.db.name} TO {owner}")
    wanted = shop.wanted(
        {
            **declared({"two columns": ROWS["two columns"], "slots": CATALOG["slots"]}),
            "cron": {"forbid": {"extension": "nosuch"}},
            "alone": {"untouched": ["app.node"]},
            "shut": {"gate": "app.open", "equals": "false", "row": "untouched"},
        }
    )
    found = tried(shop.db, wanted, dsn=shop.db.dsn_as(owner))
    assert {name: one.status for name, one in found.items()} == {
        "alone": "seen",
        "cron": "not_tried",
        "shut": "seen",
        "slots": "not_tried",
        "two-columns": "seen",
    }
    assert "permission denied" in found["cron"].detail
    assert "permission denied" in found["slots"].detail


def test_a_lost_connection_is_an_error_and_no_verdict(shop: Shop) -> None:
    wanted = shop.wanted(declared({"a check": SECOND_LINE["a check"][:2]}))
    (check,) = wanted.checks.values()
    with pg.connect(shop.db.dsn, "prove") as conn:
        shop.db.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])
        with pytest.raises((ServerProblem, ReconcilerError)):
            synthesise(conn, check, Asked(wanted))
