"""The table: what somebody may do by hand behind our back, with the class it gets, the exit code, and nothing else.

Each row starts from the same applied system: the database is copied anew under its own name, which its ledger knows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
from psycopg import sql

from tests.integration import governed
from tests.integration.governed import Governed, command
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

GREET = "function.app.fn_greet(text, integer)"
TOTAL = "function.app.fn_total()"
EACH = "function.app.fn_each(integer)"
LIMIT = "gate.shop.limit"
COURIER = "marker.courier"
JOBS = "invariant.jobs"
ALIASES = "invariant.aliases"

EACH_TEXT = """CREATE FUNCTION app.fn_each(many integer DEFAULT 3) RETURNS SETOF integer
LANGUAGE sql STABLE ROWS 10
SET search_path = pg_catalog, app, pg_temp
AS $function$SELECT generate_series(1, many)$function$;
"""

MORE = """
CREATE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $f$BEGIN RETURN NEW; END$f$;
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON app.job FOR EACH ROW EXECUTE FUNCTION app.guard();
ALTER TABLE app.job ADD CONSTRAINT job_id_check CHECK (id > 0), ADD COLUMN note text;
CREATE INDEX job_actor ON app.job (actor);
CREATE FUNCTION app.alias_one() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION app.alias_two() RETURNS int LANGUAGE sql AS 'SELECT 2';
"""

MEMBERS = """
SELECT m.member FROM pg_catalog.pg_auth_members AS m JOIN pg_catalog.pg_roles AS r ON r.oid = m.roleid
 WHERE r.rolname = '{owner}'
"""
POWERS = "SELECT r.oid FROM pg_catalog.pg_roles AS r WHERE r.rolname = '{caller}' AND (r.rolsuper OR r.rolbypassrls)"


class Settled(NamedTuple):
    """The system, and a copy of its database as it was right after the apply."""

    system: Governed
    copy: str


def copied(server: Server, name: str, template: str) -> None:
    """The database, new from the template."""
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    if server.major >= 15:
        create += sql.SQL(" STRATEGY FILE_COPY")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        conn.execute(create)


@pytest.fixture(scope="module")
def settled(server: Server, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settled]:
    db = Database(server, new_name())
    copied(server, db.name, "template1")
    system = governed.shop(db, tmp_path_factory.mktemp("tampered"))
    system.sql(MORE)
    system.function("app.fn_each(integer)", EACH_TEXT)
    system.state["markers"]["courier"]["fresh"] = {"column": "seen", "within": "4000d"}
    system.state["invariants"] |= {
        "jobs": {"pin": {"table": "app.job"}},
        "aliases": {"pin": {"functions": "app.alias_*"}},
        "extension-set": {"extensions": {"exactly": ["plpgsql"]}},
        "no-documents": {"forbid": {"relation": "production_documents"}},
        "no-cron": {"forbid": {"schema": "cron"}},
        "nobody-is-the-owner": {"query": MEMBERS.format(owner=system.owner), "rows": 0},
        "caller-is-plain": {"query": POWERS.format(caller=system.caller), "rows": 0},
        "phase-stands": {"gate": "shop.phase", "equals": "two", "row": "untouched"},
    }
    assert command("pin", "-s", system.write().directory, dsn=db.dsn).returncode == 0
    system.settle()
    # From now on the files know their ledger.
    system.state["governance"]["targets"]["test"]["ledger"] = db.execute("SELECT hash FROM reconciler.entry")[0][0]
    system.write()
    db.conn.close()
    copy = Database(server, new_name())
    copied(server, copy.name, db.name)
    yield Settled(system, copy.name)
    copy.drop()
    db.drop()


@pytest.fixture
def shop(settled: Settled) -> Governed:
    settled.system.db.conn.close()
    copied(settled.system.db.server, settled.system.db.name, settled.copy)
    return settled.system


EXIT = {
    "violated": 3, "moved_pin": 3, "drift": 2, "undeclared": 0, "stale_heartbeat": 0, "marker_differs": 0, "touched": 0,
}  # fmt: skip


class Row(NamedTuple):
    """What somebody does, statement by statement; what drift tells of it; how that is undone which is the server's."""

    done: str
    told: set[tuple[str, str]]
    undo: str = ""


def one(item_class: str, address: str, *rows: str) -> list[Row]:
    """Rows that each give one item, the same."""
    return [Row(done, {(item_class, address)}) for done in rows]


ALTER = "ALTER FUNCTION app.fn_greet(text, integer)"
EXECUTE = "EXECUTE ON FUNCTION app.fn_greet(text, integer)"
COMMENT = "COMMENT ON FUNCTION app.fn_greet(text, integer) IS"
REPLACED = governed.TOTAL.replace("CREATE", "CREATE OR REPLACE").rstrip().rstrip(";")
EACH_REPLACED = EACH_TEXT.replace("CREATE", "CREATE OR REPLACE").rstrip().rstrip(";")
SETTING = "UPDATE app.settings SET"

FUNCTIONS = [
    *one(
        "drift",
        GREET,
        *(
            f"{ALTER} {what}"
            for what in (
                "VOLATILE",
                "IMMUTABLE",
                "SECURITY INVOKER",
                "STRICT",
                "LEAKPROOF",
                "PARALLEL SAFE",
                "PARALLEL RESTRICTED",
                "COST 7",
                "SET search_path = app",
                "SET search_path = app, pg_catalog, pg_temp",
                "RESET search_path",
                "RESET ALL",
                "SET work_mem = '1MB'",
                "SET search_path FROM CURRENT",
                "OWNER TO {stranger}",
                "SET SCHEMA public",
            )
        ),
        "DROP FUNCTION app.fn_greet(text, integer)",
    ),
    *one(
        "drift",
        EACH,
        "ALTER FUNCTION app.fn_each(integer) ROWS 7",
        "ALTER FUNCTION app.fn_each(integer) SUPPORT pg_catalog.generate_series_int4_support",
        EACH_REPLACED.replace("DEFAULT 3", "DEFAULT 4"),
        EACH_REPLACED.replace("LANGUAGE sql", "LANGUAGE plpgsql").replace("SELECT", "BEGIN END -- SELECT"),
        f"DROP FUNCTION app.fn_each(integer) ;; {EACH_TEXT.replace('many', 'more')}",
        f"DROP FUNCTION app.fn_each(integer) ;; {EACH_TEXT.replace('SETOF integer', 'SETOF bigint')}",
        f"DROP FUNCTION app.fn_each(integer) ;; {EACH_TEXT.replace('SETOF integer', 'integer').replace('ROWS 10', '')}",
        f"DROP FUNCTION app.fn_each(integer) ;; {EACH_TEXT}",
        "DROP FUNCTION app.fn_each(integer) ;; "
        "CREATE PROCEDURE app.fn_each(many integer) LANGUAGE sql AS $f$SELECT 1$f$",
    ),
    *one(
        "drift",
        TOTAL,
        REPLACED.replace("count(*)", "count(*) + 1"),
        REPLACED.replace("settings$f", "settings $f"),
        REPLACED.replace("SELECT count", "-- later\nSELECT count"),
        REPLACED.replace("SET search_path = pg_catalog, app, pg_temp\n", ""),
        REPLACED.replace("STABLE", ""),
    ),
    *one("touched", TOTAL, REPLACED, "ALTER FUNCTION app.fn_total() VOLATILE ;; ALTER FUNCTION app.fn_total() STABLE"),
    Row(
        "ALTER FUNCTION app.fn_total() RENAME TO fn_sum",
        {("drift", TOTAL), ("undeclared", "function.app.fn_sum()")},
    ),
    *one("undeclared", "function.app.fn_new()", "CREATE FUNCTION app.fn_new() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    *one("undeclared", "function.app.fn_new()", "CREATE PROCEDURE app.fn_new() LANGUAGE sql AS 'SELECT 1'"),
    *one(
        "undeclared",
        "function.app.fn_total(integer)",
        "CREATE FUNCTION app.fn_total(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ),
    Row("CREATE FUNCTION app.other() RETURNS int LANGUAGE sql AS 'SELECT 1'", set()),
    Row("CREATE FUNCTION public.fn_total() RETURNS int LANGUAGE sql AS 'SELECT 1'", set()),
]

GRANTS = [
    *one(
        "drift",
        GREET,
        f"GRANT {EXECUTE} TO PUBLIC",
        f"GRANT {EXECUTE} TO {{stranger}}",
        f"GRANT {EXECUTE} TO {{caller}} WITH GRANT OPTION",
        f"GRANT {EXECUTE} TO {{caller}} WITH GRANT OPTION ;; SET ROLE {{caller}} ;; GRANT {EXECUTE} TO {{stranger}}"
        " ;; RESET ROLE",
        f"REVOKE {EXECUTE} FROM {{caller}}",
        f"REVOKE {EXECUTE} FROM {{owner}}",
        f"REVOKE {EXECUTE} FROM {{owner}}, {{caller}}",
        "UPDATE pg_catalog.pg_proc SET proacl = NULL WHERE proname = 'fn_greet'",
        "UPDATE pg_catalog.pg_proc SET proacl = acldefault('f', proowner) WHERE proname = 'fn_greet'",
    ),
    *one("touched", GREET, f"GRANT {EXECUTE} TO {{stranger}} ;; REVOKE {EXECUTE} FROM {{stranger}}"),
    *one("drift", GREET, f"{COMMENT} 'Another.'", f"{COMMENT} 'A comment. '", f"{COMMENT} NULL", f"{COMMENT} ''"),
]

GATES = [
    *one(
        "drift",
        LIMIT,
        *(
            f"{SETTING} value = {value} WHERE name = 'shop.limit'"
            for value in ("'11'", "'10 '", "' 10'", "'10.0'", "E'10\\n'", "''", "NULL")
        ),
        "DELETE FROM app.settings WHERE name = 'shop.limit'",
    ),
    *one("drift", "gate.shop.open", f"{SETTING} value = 'TRUE' WHERE name = 'shop.open'"),
    *one("drift", "gate.shop.open", f"{SETTING} value = 'false' WHERE name = 'shop.open'"),
    *one(
        "touched",
        LIMIT,
        f"{SETTING} value = value WHERE name = 'shop.limit'",
        f"{SETTING} value = 'x' WHERE name = 'shop.limit' ;; {SETTING} value = '10' WHERE name = 'shop.limit'",
        "DELETE FROM app.settings WHERE name = 'shop.limit' ;; "
        "INSERT INTO app.settings (name, value) VALUES ('shop.limit', '10')",
        f"{SETTING} changed = '2001-01-01' WHERE name = 'shop.limit'",
    ),
    # The one whose invariant says `row: untouched`.
    *one(
        "violated",
        "invariant.phase-stands",
        f"{SETTING} value = 'one' WHERE name = 'shop.phase' ;; {SETTING} value = 'two' WHERE name = 'shop.phase'",
        f"{SETTING} value = value WHERE name = 'shop.phase'",
    ),
    Row(
        f"{SETTING} value = 'one' WHERE name = 'shop.phase'",
        {("drift", "gate.shop.phase"), ("violated", "invariant.phase-stands")},
    ),
    Row(
        f"{SETTING} value = 'true' WHERE name = 'shop.till'",
        {("drift", "gate.shop.till"), ("violated", "invariant.till-shut")},
    ),
    Row(
        f"{SETTING} name = 'shop.limit ' WHERE name = 'shop.limit'",
        {("drift", LIMIT), ("undeclared", "gate.shop.limit ")},
    ),
    *one("drift", LIMIT, f"{SETTING} name = 'Shop.limit' WHERE name = 'shop.limit'"),
    *one("undeclared", "gate.shop.more", "INSERT INTO app.settings (name, value) VALUES ('shop.more', '1')"),
    Row("INSERT INTO app.settings (name, value) VALUES ('mine', '1')", set()),
    Row(f"{SETTING} value = 'y' WHERE name = 'other'", set()),
]

MARKERS = [
    *one("drift", COURIER, "DELETE FROM app.heartbeat"),
    *one("marker_differs", COURIER, "UPDATE app.heartbeat SET kind = 'other'"),
    *one("stale_heartbeat", COURIER, "UPDATE app.heartbeat SET seen = '2001-01-01'"),
    *one("undeclared", "marker.app.heartbeat", "INSERT INTO app.heartbeat VALUES ('another', 'x', now())"),
    Row("UPDATE app.heartbeat SET worker = 'thief'", {("drift", COURIER), ("undeclared", "marker.app.heartbeat")}),
    # What an executor does with its own row.
    Row("UPDATE app.heartbeat SET ticks = 5, kind = 'busy', seen = now()", set()),
]

PINS = [
    *one(
        "moved_pin",
        JOBS,
        "ALTER TABLE app.job DISABLE TRIGGER guard",
        "ALTER TABLE app.job DISABLE TRIGGER ALL",
        "ALTER TABLE app.job ENABLE REPLICA TRIGGER guard",
        "ALTER TABLE app.job ENABLE ALWAYS TRIGGER guard",
        "DROP TRIGGER guard ON app.job",
        "CREATE TRIGGER second AFTER DELETE ON app.job FOR EACH ROW EXECUTE FUNCTION app.guard()",
        "CREATE OR REPLACE FUNCTION app.guard() RETURNS trigger LANGUAGE plpgsql"
        " SET search_path = pg_catalog, pg_temp AS $f$BEGIN RETURN NULL; END$f$",
        "ALTER FUNCTION app.guard() SECURITY DEFINER",
        "ALTER TABLE app.job DROP CONSTRAINT job_id_check",
        "ALTER TABLE app.job DROP CONSTRAINT job_id_check, ADD CONSTRAINT job_id_check CHECK (id > 0) NOT VALID",
        "ALTER TABLE app.job DROP CONSTRAINT job_id_check, ADD CONSTRAINT job_id_check CHECK (id > -9)",
        "ALTER TABLE app.job RENAME CONSTRAINT job_id_check TO other",
        "ALTER TABLE app.job ADD COLUMN more int",
        "ALTER TABLE app.job DROP COLUMN note",
        "ALTER TABLE app.job ALTER note TYPE varchar(9)",
        "ALTER TABLE app.job ALTER note SET DEFAULT 'x'",
        "ALTER TABLE app.job ALTER actor DROP NOT NULL",
        "ALTER TABLE app.job ALTER id ADD GENERATED ALWAYS AS IDENTITY",
        "DROP INDEX app.job_actor",
        "CREATE INDEX another ON app.job (note)",
        "CREATE RULE swallowed AS ON INSERT TO app.job DO INSTEAD NOTHING",
        "CREATE POLICY everyone ON app.job USING (true)",
        "ALTER TABLE app.job ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE app.job OWNER TO {stranger}",
        "GRANT SELECT ON app.job TO {stranger}",
        "GRANT INSERT ON app.job TO PUBLIC",
        "GRANT UPDATE (note) ON app.job TO {stranger}",
        "ALTER TABLE app.job SET UNLOGGED",
        "ALTER TABLE app.job REPLICA IDENTITY FULL",
    ),
    Row("ALTER TABLE app.job DROP CONSTRAINT job_id_check, ADD CONSTRAINT job_id_check CHECK (id > 0)", set()),
    *one(
        "moved_pin",
        ALIASES,
        "CREATE OR REPLACE FUNCTION app.alias_one() RETURNS int LANGUAGE sql AS 'SELECT 9'",
        "CREATE FUNCTION app.alias_one(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION app.alias_two()",
        "ALTER FUNCTION app.alias_two() SET work_mem = '1MB'",
        "ALTER FUNCTION app.alias_two() OWNER TO {stranger}",
        "REVOKE EXECUTE ON FUNCTION app.alias_two() FROM PUBLIC",
    ),
]

REST = [
    *one("violated", "invariant.no-blank-actor", "INSERT INTO app.job VALUES (1, ' ')"),
    *one("violated", "invariant.extension-set", "CREATE EXTENSION btree_gist SCHEMA public"),
    *one("violated", "invariant.no-documents", "CREATE VIEW public.production_documents AS SELECT 1 AS x"),
    *one("violated", "invariant.no-cron", "CREATE SCHEMA cron"),
    Row(
        "GRANT {owner} TO {stranger}",
        {("violated", "invariant.nobody-is-the-owner")},
        "REVOKE {owner} FROM {stranger}",
    ),
    Row(
        "GRANT {owner} TO {stranger} WITH ADMIN OPTION",
        {("violated", "invariant.nobody-is-the-owner")},
        "REVOKE {owner} FROM {stranger}",
    ),
    Row(
        "ALTER ROLE {caller} SUPERUSER",
        {("violated", "invariant.caller-is-plain")},
        "ALTER ROLE {caller} NOSUPERUSER",
    ),
    Row(
        "ALTER ROLE {caller} BYPASSRLS",
        {("violated", "invariant.caller-is-plain")},
        "ALTER ROLE {caller} NOBYPASSRLS",
    ),
]

TABLE = [*FUNCTIONS, *GRANTS, *GATES, *MARKERS, *PINS, *REST]


@pytest.mark.parametrize("row", TABLE, ids=[f"{number}-{row.done[:60]}" for number, row in enumerate(TABLE)])
def test_its_class_its_exit_code_and_nothing_else(shop: Governed, row: Row) -> None:
    try:
        shop.sql(*row.done.split(" ;; "))
        done = command("drift", "-s", shop.directory, "--format", "json", dsn=shop.db.dsn)
    finally:
        shop.sql(row.undo)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert {(item["class"], item["address"]) for item in report["items"]} == row.told
    assert len(report["items"]) == len(row.told)
    code = max((EXIT[item_class] for item_class, _ in row.told), default=0)
    assert (done.returncode, report["outcome"]) == (code, {3: "violated", 2: "drift", 0: "no_changes"}[code])
    assert all(item["next"] and item["reason"] for item in report["items"])
    assert [item["fails"] for item in report["items"]] == [EXIT[item["class"]] > 0 for item in report["items"]]


@pytest.mark.parametrize("item_class", [item_class for item_class, code in EXIT.items() if not code])
def test_what_was_asked_to_fail_fails(shop: Governed, item_class: str) -> None:
    row = next(row for row in TABLE if {one for one, _ in row.told} == {item_class})
    shop.sql(*row.done.split(" ;; "))
    done = command("drift", "-s", shop.directory, "--fail-on", item_class, "--format", "json", dsn=shop.db.dsn)
    report = json.loads(done.stdout)
    assert (done.returncode, report["outcome"], [item["fails"] for item in report["items"]]) == (2, "drift", [True])
    others = ",".join(sorted({"undeclared", "touched", "stale_heartbeat"} - {item_class}))
    assert command("drift", "-s", shop.directory, "--fail-on", others, dsn=shop.db.dsn).returncode == 0


def test_a_row_written_again_is_known_after_the_next_apply(shop: Governed) -> None:
    shop.sql("UPDATE app.settings SET value = value WHERE name = 'shop.phase'")
    assert command("drift", "-s", shop.directory, dsn=shop.db.dsn).returncode == 3
    shop.sql("UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    shop.settle()
    assert command("drift", "-s", shop.directory, dsn=shop.db.dsn).returncode == 0


def test_every_class_that_a_hand_on_the_server_can_cause_is_in_the_table() -> None:
    assert {item_class for row in TABLE for item_class, _ in row.told} == set(EXIT)
    assert len({row.done for row in TABLE}) == len(TABLE)


# ----------------------------------------------------------------------------------------------------------- the ledger

ENTRY = "ALTER TABLE reconciler.entry"
OFF, ON = f"{ENTRY} DISABLE TRIGGER ALL", governed.TRIGGERS_ON
FORGED = "hash = encode(sha256(convert_to(previous || replace(body, 'operator', 'intruder'), 'UTF8')), 'hex')"

NO_CODE = """CREATE OR REPLACE FUNCTION reconciler.entry_is_append_only() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $f$BEGIN RETURN NEW; END$f$"""

LEDGER = [
    (OFF, "its triggers are not those of a ledger"),
    (f"{ENTRY} ENABLE TRIGGER entry_is_append_only_row", "its triggers are not those of a ledger"),
    ("DROP TRIGGER entry_is_append_only_row ON reconciler.entry", "its triggers are not those of a ledger"),
    (NO_CODE, "its trigger function is not ours"),
    (f"{ENTRY} DROP CONSTRAINT entry_hash_check", "its constraints are not those of a ledger"),
    (f"{ENTRY} ADD COLUMN more text", "its columns are not those of a ledger"),
    (f"{ENTRY} SET UNLOGGED", "it is unlogged"),
    ("CREATE RULE swallowed AS ON INSERT TO reconciler.entry DO INSTEAD NOTHING", "it has rules"),
    (
        f"{OFF} ;; UPDATE reconciler.entry SET body = replace(body, 'operator', 'intruder'), {FORGED} ;; {ON}",
        "names the ledger",
    ),
    (f"{OFF} ;; UPDATE reconciler.entry SET approval_ids = '{{}}' ;; {ON}", "does not have the ids of its body"),
    (f"{OFF} ;; UPDATE reconciler.entry SET run_id = gen_random_uuid() ;; {ON}", "does not have the ids of its body"),
    (f"{OFF} ;; UPDATE reconciler.entry SET recorded_at = '2001-01-01' ;; {ON}", "does not have the time of its body"),
    (f"{OFF} ;; DELETE FROM reconciler.entry ;; {ON}", "does not exist"),
    ("DROP SCHEMA reconciler CASCADE", "does not exist"),
]


@pytest.mark.parametrize(
    ("statements", "said"), LEDGER, ids=[f"{number}-{said}" for number, (_, said) in enumerate(LEDGER)]
)
def test_a_ledger_that_somebody_went_around_is_refused(shop: Governed, statements: str, said: str) -> None:
    shop.sql(*statements.split(" ;; "))
    done = command("drift", "-s", shop.directory, "--format", "json", dsn=shop.db.dsn)
    report = json.loads(done.stdout)
    assert (done.returncode, report["outcome"], "items" in report) == (4, "stale", False)
    assert done.stderr.startswith("Error: ")
    assert said in " ".join(report["errors"])
    assert report["hint"]
