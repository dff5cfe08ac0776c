"""An apply commits what was approved and nothing else, whatever the database does meanwhile by itself.

What triggers, event triggers and rules do to the objects of a plan is in tests/integration/test_apply_hostile.py, and
ways around the last look that were found by trying in test_attacks.py. Here: what was not in the plan, and what hides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from reconciler.errors import ReconcilerError, Refused, ServerProblem, Stale
from tests.integration import governed
from tests.integration.governed import image

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


def refused(shop: Governed, error: type[ReconcilerError] | tuple[type[ReconcilerError], ...] = Stale) -> str:
    """An apply that must fail and change nothing; what it said. Afterwards the same plan is still the plan."""
    plan = shop.plan()
    before = image(shop.db)
    with pytest.raises(error) as raised:
        shop.apply(plan)
    assert image(shop.db) == before
    assert shop.plan().effect_digest == plan.effect_digest
    return "\n".join([raised.value.message, *raised.value.details])


def on_update(shop: Governed, body: str, *, when: str = "AFTER", definer: str = "", deferred: bool = False) -> None:
    """A trigger that runs once, when shop.open is changed."""
    kind, more = ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED") if deferred else ("TRIGGER", "")
    shop.sql(
        f"CREATE FUNCTION public.meddles() RETURNS trigger LANGUAGE plpgsql {definer} AS"
        f" $m$BEGIN {body}; RETURN NEW; END$m$",
        f"CREATE {kind} meddles {when} UPDATE ON app.settings {more}"
        " FOR EACH ROW WHEN (NEW.name = 'shop.open') EXECUTE FUNCTION public.meddles()",
    )


# ------------------------------------------------------------------------------------- what we own and nobody declared

BEHIND = {
    "a key is added": ("INSERT INTO app.settings (name, value) VALUES ('shop.extra', 'true')", "gate.shop.extra"),
    "a key is changed": ("UPDATE app.settings SET value = 'true' WHERE name = 'shop.old'", "gate.shop.old"),
    "a key is renamed": ("UPDATE app.settings SET name = 'shop.new' WHERE name = 'shop.old'", "gate.shop.new"),
    "a key is renamed out of scope": ("UPDATE app.settings SET name = 'x' WHERE name = 'shop.old'", "gate.shop.old"),
    "a key is deleted": ("DELETE FROM app.settings WHERE name = 'shop.old'", "gate.shop.old"),
    "a function is added": (
        "CREATE FUNCTION app.fn_backdoor() RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
        "function.app.fn_backdoor()",
    ),
    "a function is granted": ("GRANT EXECUTE ON FUNCTION app.fn_old() TO {caller}", "function.app.fn_old()"),
    "a function is replaced": (
        "CREATE OR REPLACE FUNCTION app.fn_old() RETURNS text LANGUAGE sql AS 'SELECT 2::text'",
        "function.app.fn_old()",
    ),
    "a function is dropped": ("DROP FUNCTION app.fn_old()", "function.app.fn_old()"),
    "an executor is added": ("INSERT INTO app.heartbeat VALUES ('ghost', 'x', now(), 1)", "app.heartbeat"),
    "a beat is forged": ("UPDATE app.heartbeat SET seen = now() WHERE worker = 'baker'", "app.heartbeat"),
    "an executor is deleted": ("DELETE FROM app.heartbeat WHERE worker = 'baker'", "app.heartbeat"),
    "a key is added inside an exception block": (
        "BEGIN INSERT INTO app.settings (name) VALUES ('shop.extra'); EXCEPTION WHEN division_by_zero THEN NULL; END",
        "gate.shop.extra",
    ),
}


@pytest.mark.parametrize(("what", "address"), BEHIND.values(), ids=BEHIND.keys())
def test_what_a_trigger_does_to_what_is_ours_and_not_declared(shop: Governed, what: str, address: str) -> None:
    shop.sql(
        "INSERT INTO app.settings (name, value) VALUES ('shop.old', 'false')",
        "CREATE FUNCTION app.fn_old() RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
        "INSERT INTO app.heartbeat VALUES ('baker', 'x', '2026-05-22 00:00:00+00', 3)",
    )
    for name, role in shop.names.items():
        what = what.replace(f"{{{name}}}", role)
    on_update(shop, what)
    said = refused(shop)
    assert said.startswith("Rolled back:")
    assert address in said
    shop.sql("DROP FUNCTION public.meddles() CASCADE")
    shop.settle()


def test_a_beat_of_a_declared_executor_is_not_forged(shop: Governed) -> None:
    """Its marker is satisfied for ever, so what the row holds is compared by nobody; but no apply writes a beat."""
    shop.settle()
    shop.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    on_update(shop, "UPDATE app.heartbeat SET seen = now(), ticks = 7 WHERE worker = 'courier'")
    assert "marker.courier: written inside of the apply" in refused(shop)


@pytest.mark.parametrize(
    "what",
    [
        "UPDATE app.settings SET value = 'y' WHERE name = 'other'",
        "INSERT INTO app.settings (name, value) VALUES ('audit.1', 'x')",
        "INSERT INTO app.job VALUES (1, 'auditor')",
        "CREATE FUNCTION app.other() RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
    ],
)
def test_what_a_trigger_does_elsewhere_is_its_business(shop: Governed, what: str) -> None:
    """An audit trail, a counter: what the scope does not cover is not ours to refuse."""
    on_update(shop, what)
    shop.settle()


@pytest.mark.parametrize(
    "what",
    [
        "INSERT INTO app.settings (name, value) VALUES ('shop.extra', 'true')",
        "DELETE FROM app.settings WHERE name = 'shop.old'",
        "CREATE FUNCTION app.fn_more() RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
        "DROP FUNCTION app.fn_old()",
        "INSERT INTO app.heartbeat VALUES ('ghost', 'x', now(), 1)",
        "UPDATE app.heartbeat SET seen = now(), ticks = 4 WHERE worker = 'baker'",
    ],
)
def test_what_others_commit_meanwhile_is_later(shop: Governed, what: str) -> None:
    """To objects that the plan does not touch, in the middle of an apply: the next drift, and not our doing."""
    shop.sql(
        "INSERT INTO app.settings (name, value) VALUES ('shop.old', 'false')",
        "CREATE FUNCTION app.fn_old() RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
        "INSERT INTO app.heartbeat VALUES ('baker', 'x', '2026-05-22 00:00:00+00', 3)",
    )
    plan, once = shop.plan(), [what]

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:  # noqa: ARG001 - as called
        if stage == "verify" and once:
            with psycopg.connect(shop.db.dsn, autocommit=True) as conn:
                conn.execute(once.pop().encode())

    from reconciler import apply as applying

    applying.apply(shop.request(plan), progress)
    shop.in_sync()


# ------------------------------------------------------------------------------------------------- the ledger, at birth


@pytest.mark.parametrize(
    "added",
    [
        "CREATE TRIGGER more AFTER INSERT ON reconciler.entry FOR EACH ROW EXECUTE FUNCTION public.writes()",
        "ALTER TABLE reconciler.entry ADD CHECK (public.quiet(number))",
        (
            "ALTER TABLE reconciler.entry DROP CONSTRAINT entry_number_check;"
            " ALTER TABLE reconciler.entry ADD CONSTRAINT entry_number_check CHECK (public.quiet(number))"
        ),
        "CREATE INDEX more ON reconciler.entry (public.quiet(number))",
        "CREATE UNIQUE INDEX more ON reconciler.entry (number) WHERE public.quiet(number)",
        "CREATE RULE more AS ON INSERT TO reconciler.entry DO ALSO INSERT INTO app.job VALUES (1, '')",
        "ALTER TABLE reconciler.entry ADD COLUMN more boolean GENERATED ALWAYS AS (public.quiet(number)) STORED",
        "ALTER TABLE reconciler.entry DROP COLUMN hash, ADD COLUMN hash text NOT NULL DEFAULT ''",
        (
            "DROP TRIGGER entry_is_append_only_row ON reconciler.entry; CREATE TRIGGER entry_is_append_only_row"
            " BEFORE UPDATE ON reconciler.entry FOR EACH ROW EXECUTE FUNCTION reconciler.entry_is_append_only()"
        ),
        "ALTER TABLE reconciler.entry SET UNLOGGED",
    ],
    ids=[
        *(
            "trigger",
            "check",
            "another check of the same name",
            "index",
            "partial index",
            "rule",
            "column",
            "no checks",
        ),
        *("another trigger of the same name", "unlogged"),
    ],
)
def test_an_event_trigger_that_builds_something_into_the_new_ledger(shop: Governed, added: str) -> None:
    """The entry is the last thing written, after everything was judged: nothing else may run then."""
    shop.sql(
        "CREATE FUNCTION public.writes() RETURNS trigger LANGUAGE plpgsql AS"
        " $w$BEGIN INSERT INTO app.job VALUES (1, ''); RETURN NULL; END$w$",
        "CREATE FUNCTION public.loud() RETURNS boolean LANGUAGE plpgsql AS"
        " $w$BEGIN INSERT INTO app.job VALUES (1, ''); RETURN true; END$w$",
        "CREATE FUNCTION public.quiet(bigint) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS"
        " $w$BEGIN RETURN public.loud(); END$w$",
        "CREATE FUNCTION public.meddles() RETURNS event_trigger LANGUAGE plpgsql AS $m$BEGIN"
        " IF tg_tag = 'CREATE TRIGGER' AND current_setting('my.turn', true) IS DISTINCT FROM 'over'"
        " AND EXISTS (SELECT FROM pg_trigger WHERE tgname = 'entry_is_append_only_statement') THEN"
        f" PERFORM set_config('my.turn', 'over', true); {added}; END IF; END$m$",
        "CREATE EVENT TRIGGER meddles ON ddl_command_end EXECUTE FUNCTION public.meddles()",
    )
    assert "not the ledger of this program" in refused(shop, Refused)
    shop.sql("DROP EVENT TRIGGER meddles")
    shop.settle()


# ------------------------------------------------------------------------------------------ what hides until COMMIT


HIDING = """
CREATE TABLE app.one (n int);
CREATE TABLE app.two (n int);
CREATE FUNCTION app.next_one() RETURNS trigger LANGUAGE plpgsql AS $f$
DECLARE other text := CASE TG_TABLE_NAME WHEN 'one' THEN 'two' ELSE 'one' END;
BEGIN
    SET CONSTRAINTS ALL DEFERRED;
    IF NEW.n < 9 THEN
        -- As many rows are forgotten as are written, so the number of rows that were written stays as it was. And in a
        -- table that was emptied before in the same transaction this writes nothing to the catalog.
        EXECUTE format('TRUNCATE app.%I', other);
        EXECUTE format('INSERT INTO app.%I VALUES (%s)', other, NEW.n + 1);
    ELSE
        UPDATE app.settings SET value = '99' WHERE name = 'shop.limit';
    END IF;
    RETURN NULL;
END $f$;
CREATE FUNCTION app.begins() RETURNS trigger LANGUAGE plpgsql AS $f$
BEGIN
    TRUNCATE app.one; TRUNCATE app.two;
    INSERT INTO app.two VALUES (-1);
    INSERT INTO app.one VALUES (1);
    RETURN NULL;
END $f$;
CREATE CONSTRAINT TRIGGER next_one AFTER INSERT ON app.one DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.n > 0) EXECUTE FUNCTION app.next_one();
CREATE CONSTRAINT TRIGGER next_one AFTER INSERT ON app.two DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.n > 0) EXECUTE FUNCTION app.next_one();
CREATE TRIGGER begins AFTER UPDATE ON app.settings FOR EACH ROW WHEN (NEW.name = 'shop.open')
    EXECUTE FUNCTION app.begins();
"""


def test_a_deferred_trigger_that_hides_behind_a_truncate(shop: Governed) -> None:
    """TRUNCATE takes what was written out of the counters by which deferred triggers are known to be done."""
    shop.sql(HIDING)
    assert "app.one, app.two, so nobody can tell" in refused(shop)


def test_a_deferred_trigger_where_nothing_is_counted(shop: Governed) -> None:
    name = shop.db.execute("SELECT current_database()")[0][0]
    shop.sql(
        HIDING.replace("TRUNCATE app.one; TRUNCATE app.two;", "").replace(
            "EXECUTE format('TRUNCATE app.%I', other);", ""
        ),
        f'ALTER DATABASE "{name}" SET track_counts = off',
    )
    assert "track_counts is off" in refused(shop)


def test_a_trigger_that_only_truncates_is_its_business(shop: Governed) -> None:
    """Where nothing can be deferred there is nothing to hide."""
    shop.sql("CREATE TABLE app.scratch (n int)")
    on_update(shop, "TRUNCATE app.scratch; INSERT INTO app.scratch VALUES (1)")
    shop.settle()


# ----------------------------------------------------------------------------------------- the transaction, the session


def test_a_procedure_that_ends_the_transaction(shop: Governed) -> None:
    shop.sql("CREATE PROCEDURE public.ends() LANGUAGE plpgsql AS $p$BEGIN COMMIT; END$p$")
    on_update(shop, "CALL public.ends()")
    assert "SQLSTATE 2D000" in refused(shop, ServerProblem)


@pytest.mark.parametrize(
    "what",
    [
        "SET LOCAL ROLE {stranger}",
        "SET ROLE {stranger}",
        "SET SESSION AUTHORIZATION {stranger}",
        "SET LOCAL session_replication_role = replica",
        "SET LOCAL search_path = pg_temp; SET row_security = on; SET default_transaction_isolation = serializable",
        "SET LOCAL standard_conforming_strings = off; SET LOCAL datestyle = 'German'; SET LOCAL timezone = 'Japan'",
        "SET LOCAL transaction_read_only = on",
    ],
)
def test_a_trigger_that_changes_the_session(shop: Governed, what: str) -> None:
    """Whatever comes of it: nothing, or exactly what was approved."""
    for name, role in shop.names.items():
        what = what.replace(f"{{{name}}}", role)
    on_update(shop, what)
    plan = shop.plan()
    before = image(shop.db)
    try:
        shop.apply(plan)
    except ReconcilerError:
        assert image(shop.db) == before
    else:
        shop.in_sync()


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_a_body_that_is_rewritten(shop: Governed, *, deferred: bool) -> None:
    """The created function, by CREATE OR REPLACE: everything but the body stays."""
    evil = governed.GREET.replace("'hello '", "'bye '").replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
    on_update(shop, f"EXECUTE $e${evil}$e$", deferred=deferred)
    assert "function.app.fn_greet(text, integer): not what was approved" in refused(shop)


def test_a_trigger_that_writes_to_a_foreign_table(shop: Governed) -> None:
    """Back into the same database: at COMMIT it would commit too, and no look before that can see it."""
    host, port, name = shop.db.server.host, shop.db.server.port, shop.db.name
    shop.sql(
        "INSERT INTO app.settings (name, value) VALUES ('shop.late', 'false')",
        "CREATE EXTENSION postgres_fdw SCHEMA public",
        f"CREATE SERVER loop FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{host}', port '{port}', dbname '{name}')",
        "CREATE USER MAPPING FOR postgres SERVER loop OPTIONS (user 'postgres')",
        "CREATE FOREIGN TABLE public.far (name text, value text)"
        " SERVER loop OPTIONS (schema_name 'app', table_name 'settings')",
    )
    shop.state["gates"]["shop.late"] = {"value": "false", "safe": "false", "lock": "locked", "reason": "Shut."}
    shop.write()
    on_update(shop, "UPDATE public.far SET value = 'true' WHERE name = 'shop.late'")
    assert "public.far: a foreign table was written" in refused(shop)
    shop.sql("DROP FUNCTION public.meddles() CASCADE")
    shop.settle()


def test_a_trigger_that_calls_another_session(shop: Governed) -> None:
    """What that one did no rollback reaches, but nobody may believe that the apply was all there was."""
    loop = f"host={shop.db.server.host} port={shop.db.server.port} dbname={shop.db.name} user=postgres"
    shop.sql("CREATE EXTENSION dblink SCHEMA public")
    on_update(shop, f"PERFORM public.dblink_exec('{loop}', $u$INSERT INTO app.job VALUES (1, 'far')$u$)")
    plan = shop.plan()
    with pytest.raises(Stale) as raised:
        shop.apply(plan)
    assert "public.dblink_exec(text,text) was called, which no rollback reaches" in raised.value.details
    assert shop.value("shop.open") == "false"
    assert shop.entries() == 0
    shop.sql("DROP FUNCTION public.meddles() CASCADE")
    shop.settle()
