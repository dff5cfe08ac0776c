"""A plan says which locks its apply would take, and who is in the way of one now: whoever an apply would wait for."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import desired, obstacles, pg
from reconciler import plan as planning
from reconciler.errors import Locked
from reconciler.locks import lock_key
from reconciler.render import html, markdown, text
from tests.integration import governed
from tests.integration.governed import command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from reconciler.model import Locks, Obstacle, Plan
    from tests.integration.governed import Governed
    from tests.servers import Database

IN_THE_WAY = {
    "row updated": ("UPDATE app.settings SET value = 'x' WHERE name = 'shop.open'", "row shop.open of app.settings"),
    "row deleted": ("DELETE FROM app.settings WHERE name = 'shop.open'", "row shop.open of app.settings"),
    "table locked": ("LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE", "table app.settings"),
    "table locked for reading": ("LOCK TABLE app.heartbeat IN SHARE MODE", "table app.heartbeat"),
    "function altered": ("ALTER FUNCTION app.fn_total() COST 7", "routine app.fn_total()"),
    "function replaced": (governed.TOTAL.replace("CREATE", "CREATE OR REPLACE"), "routine app.fn_total()"),
    "function granted": ("GRANT EXECUTE ON FUNCTION app.fn_total() TO PUBLIC", "routine app.fn_total()"),
    "function commented": ("COMMENT ON FUNCTION app.fn_total() IS 'mine'", "routine app.fn_total()"),
    "function dropped": ("DROP FUNCTION app.fn_total()", "routine app.fn_total()"),
    "schema being dropped": ("DROP SCHEMA app CASCADE", "schema app"),
    "another apply": (f"SELECT pg_advisory_xact_lock({lock_key('shop')})", "name shop"),
}
PERHAPS = {
    "row locked": ("SELECT FROM app.settings WHERE name = 'shop.open' FOR UPDATE", "row shop.open of app.settings"),
    "row of another gate, and perhaps ours": (
        "INSERT INTO app.settings (name, value) VALUES ('shop.till', 'false')",
        "row shop.till of app.settings",
    ),
    "marker inserted": ("INSERT INTO app.heartbeat VALUES ('courier', 'x', now(), 0)", "row courier of app.heartbeat"),
}
NOT_IN_THE_WAY = {
    "reads": "SELECT FROM app.settings, app.heartbeat",
    "locks another row": "SELECT FROM app.settings WHERE name = 'other' FOR UPDATE",
    "calls the function": "SELECT app.fn_total()",
    "has written somewhere else": "UPDATE app.cursor SET ran = now()",
    "an apply of another name": f"SELECT pg_advisory_xact_lock({lock_key('annex')})",
}


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


@contextmanager
def somebody(system: Governed, *statements: str) -> Iterator[int]:
    """A transaction that is left open; its process."""
    with psycopg.connect(system.db.dsn, application_name="somebody") as conn:
        for statement in statements:
            conn.execute(statement.encode())
        yield conn.info.backend_pid
        conn.rollback()


def look(system: Governed, role: str = "postgres") -> Plan:
    """What `reconciler plan` gives, without printing."""
    dsn = system.db.dsn_as(role)
    plan = system.plan(dsn)
    with pg.connect(dsn, "plan") as conn, pg.snapshot(conn):
        return obstacles.shown(conn, desired.load(system.directory, None), plan)


def locks(system: Governed, role: str = "postgres") -> Locks:
    found = look(system, role).locks
    assert found is not None
    return found


def reader(system: Governed) -> str:
    """Who may plan, and no more."""
    role = system.db.role()
    system.sql(f"GRANT USAGE ON SCHEMA app TO {role}", f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {role}")
    return role


# ---------------------------------------------------------------------------------------------------- who is in the way


@pytest.mark.smoke
@pytest.mark.parametrize(("statement", "place"), IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_whoever_an_apply_would_wait_for(system: Governed, statement: str, place: str) -> None:
    """What the plan says is what an apply meets."""
    plan = system.plan()
    with somebody(system, statement) as pid:
        shown = obstacles_of(system, plan)
        assert place in {one.place for one in shown}
        assert {(one.pid, one.role, one.application, one.state) for one in shown} == {
            (pid, "postgres", "somebody", "idle in transaction")
        }
        assert all(one.certain and one.since is not None for one in shown)
        with pytest.raises(Locked):
            system.apply(plan)
    assert locks(system).in_the_way == ()
    system.apply(plan)
    system.in_sync()


def obstacles_of(system: Governed, plan: Plan) -> tuple[Obstacle, ...]:
    """Who is in the way of a plan that was made before: some obstacles keep a plan waiting as well."""
    with pg.connect(system.db.dsn, "plan") as conn, pg.snapshot(conn):
        shown = obstacles.shown(conn, desired.load(system.directory, None), plan).locks
    assert shown is not None
    return shown.in_the_way


@pytest.mark.parametrize(("statement", "place"), PERHAPS.values(), ids=PERHAPS.keys())
def test_who_may_be_in_the_way_is_said_as_that(system: Governed, statement: str, place: str) -> None:
    with somebody(system, statement) as pid:
        (one,) = [one for one in locks(system).in_the_way if one.place == place]
        assert (one.pid, one.certain) == (pid, False)
        assert "perhaps" in one.holds or "may" in one.holds


@pytest.mark.parametrize("statement", NOT_IN_THE_WAY.values(), ids=NOT_IN_THE_WAY.keys())
def test_who_is_not_in_the_way(system: Governed, statement: str) -> None:
    plan = system.plan()
    with somebody(system, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", statement):
        assert locks(system).in_the_way == ()
        system.apply(plan)
    system.in_sync()


def test_a_transaction_that_is_over_leaves_nothing_behind(system: Governed) -> None:
    """A rolled-back change stays in the row's header."""
    with somebody(system, *(statement for statement, _ in list(IN_THE_WAY.values())[:1])):
        pass
    with somebody(system, "ALTER FUNCTION app.fn_total() COST 7", "SAVEPOINT s", "ROLLBACK"):
        assert locks(system).in_the_way == ()


@pytest.mark.parametrize("strength", ["FOR SHARE", "FOR KEY SHARE"])
def test_several_who_lock_a_row_together(system: Governed, strength: str) -> None:
    """Only those for whom an apply would wait: a foreign key of somebody else is not in its way."""
    statement = f"SELECT FROM app.settings WHERE name = 'shop.open' {strength}"
    with somebody(system, statement) as one, somebody(system, statement) as two:
        met = {each.pid for each in locks(system).in_the_way}
    assert met == ({one, two} if strength == "FOR SHARE" else set())


def test_a_change_in_a_savepoint(system: Governed) -> None:
    """It has a transaction id of its own; once that is released, nobody can say any more whose it is."""
    for release in ("SAVEPOINT t", "RELEASE s"):
        with somebody(system, "SAVEPOINT s", IN_THE_WAY["row updated"][0], release) as pid:
            assert [(one.place, one.pid) for one in locks(system).in_the_way] == [(IN_THE_WAY["row updated"][1], pid)]
        with somebody(system, "SAVEPOINT s", IN_THE_WAY["function altered"][0], release) as pid:
            assert [(one.place, one.pid) for one in locks(system).in_the_way] == [("routine app.fn_total()", pid)]
        # REPLACE keeps no lock on the catalog.
        with somebody(system, "SAVEPOINT s", IN_THE_WAY["function replaced"][0], release) as pid:
            shown = look(system)
            assert shown.locks is not None
            (one,) = shown.locks.in_the_way
            assert (one.place, one.certain) == ("routine app.fn_total()", True)
            assert one.pid == (pid if release == "SAVEPOINT t" else None)
            assert ("process cannot be told" in text.plan(shown, colour=False, verbose=False)) == (one.pid is None)
    with somebody(system, "SAVEPOINT s", IN_THE_WAY["row updated"][0], "ROLLBACK TO s", "SELECT 1"):
        assert locks(system).in_the_way == ()


def test_a_prepared_transaction_has_no_process(own_system: Governed) -> None:
    with psycopg.connect(own_system.db.dsn, autocommit=True) as conn:
        conn.execute("BEGIN")
        conn.execute(IN_THE_WAY["row updated"][0].encode())
        conn.execute("PREPARE TRANSACTION 'left'")
        shown = look(own_system)
        conn.execute("ROLLBACK PREPARED 'left'")
    assert shown.locks is not None
    (one,) = shown.locks.in_the_way
    assert (one.pid, one.role, one.state) == (0, None, None)
    assert "a prepared transaction (see pg_prepared_xacts)" in text.plan(shown, colour=False, verbose=False)


@pytest.fixture
def own_system(own_server: Any, tmp_path: Path) -> Iterator[Governed]:
    """On a server that has prepared transactions."""
    from tests.servers import Database

    server = own_server(max_prepared_transactions="2")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE shop")
    db = Database(server, "shop")
    yield governed.shop(db, tmp_path)
    db.conn.close()


# ----------------------------------------------------------------------------------------------------- what may be seen


def test_who_may_only_plan_sees_who_but_not_since_when(system: Governed) -> None:
    role = reader(system)
    with somebody(system, IN_THE_WAY["row updated"][0]) as pid:
        shown = look(system, role)
        assert shown.locks is not None
        (one,) = shown.locks.in_the_way
        assert (one.pid, one.role, one.application, one.state, one.since) == (pid, "postgres", "somebody", None, None)
        said = text.plan(shown, colour=False, verbose=False)
        assert "its state hidden from this role" in said
        assert "State and times of other roles' sessions are hidden from this role: GRANT pg_read_all_stats" in said
        system.sql(f"GRANT pg_read_all_stats TO {role}")
        (one,) = locks(system, role).in_the_way
        assert one.state == "idle in transaction"
        assert one.since is not None


def test_who_may_not_look_says_so(system: Governed) -> None:
    """Not seen is not nothing: it stands in every format, also when nothing else does."""
    role = reader(system)
    system.sql("REVOKE SELECT ON pg_catalog.pg_locks FROM PUBLIC")
    try:
        shown = look(system, role)
    finally:
        system.sql("GRANT SELECT ON pg_catalog.pg_locks TO PUBLIC")
    assert shown.locks is not None
    assert not shown.locks.looked
    sentence = "Who is in the way was not looked at: this role may not read pg_locks."
    assert sentence in shown.locks.not_seen
    assert sentence in text.plan(shown, colour=False, verbose=False)
    assert "was not looked at: this role may not read pg" in markdown.plan(shown)
    assert "was not looked at: this role may not read pg_locks." in html.plan(shown)


# -------------------------------------------------------------------------------------------------------- what is shown


def test_what_is_locked(system: Governed) -> None:
    found = {(lock.address, lock.mode, lock.place) for lock in locks(system).needed}
    assert found == {
        ("governance.shop", "advisory", "name shop"),
        ("function.app.fn_greet(text, integer)", "ACCESS SHARE", "schema app"),
        ("function.app.fn_greet(text, integer)", "CREATE", "routine app.fn_greet(text, integer)"),
        ("function.app.fn_total()", "ALTER", "routine app.fn_total()"),
        ("gate.shop.open", "ROW EXCLUSIVE", "table app.settings"),
        ("gate.shop.open", "FOR NO KEY UPDATE", "row shop.open of app.settings"),
        ("gate.shop.phase", "ROW EXCLUSIVE", "table app.settings"),
        ("gate.shop.phase", "INSERT", "row shop.phase of app.settings"),
        ("gate.shop.till", "ROW EXCLUSIVE", "table app.settings"),
        ("gate.shop.till", "INSERT", "row shop.till of app.settings"),
        ("marker.courier", "ROW EXCLUSIVE", "table app.heartbeat"),
        ("marker.courier", "INSERT", "row courier of app.heartbeat"),
    }


def test_what_is_said_is_what_is_taken(system: Governed) -> None:
    """The locks of a real apply at its end, on what the plan names: none that is not announced, none stronger."""
    from reconciler import apply as applying

    plan = look(system)
    assert plan.locks is not None
    taken: list[tuple[str, str, str]] = []

    def progress(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del detail, number, of
        if stage == "execute" and not taken:
            taken.extend(system.db.execute(TAKEN))

    applying.apply(system.request(plan), progress)
    modes = {"ROW EXCLUSIVE": "RowExclusiveLock", "ACCESS SHARE": "AccessShareLock", "ALTER": "AccessExclusiveLock"}
    announced = {(lock.on, lock.name, modes[lock.mode]) for lock in plan.locks.needed if lock.mode in modes}
    weaker = {"AccessShareLock", "RowShareLock"}  # of reading
    assert {lock for lock in taken if lock[2] not in weaker} == {lock for lock in announced if lock[2] not in weaker}
    assert ("schema", "app", "AccessShareLock") in taken


TAKEN = """
SELECT 'table', c.oid::regclass::text, l.mode
  FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE a.application_name = 'reconciler apply' AND a.datname = current_database() AND c.relkind = 'r'
   AND c.relnamespace = 'app'::regnamespace
UNION ALL
SELECT 'routine', l.objid::regprocedure::text, l.mode FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE a.application_name = 'reconciler apply' AND a.datname = current_database() AND l.locktype = 'object'
   AND l.classid = 'pg_proc'::regclass
UNION ALL
SELECT 'schema', l.objid::regnamespace::text, l.mode FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE a.application_name = 'reconciler apply' AND a.datname = current_database() AND l.locktype = 'object'
   AND l.classid = 'pg_namespace'::regclass
"""


def test_nothing_is_printed_when_nobody_is_in_the_way(system: Governed) -> None:
    shown = look(system)
    plain, more = (text.plan(shown, colour=False, verbose=verbose) for verbose in (False, True))
    assert plain == text.plan(shown.model_copy(update={"locks": None}), colour=False, verbose=False)
    (line,) = [line for line in more.splitlines() if "ocks until" in line]
    assert line == (
        "Locks until COMMIT: ALTER of 1 function; CREATE of 1 function; 4 rows; ROW EXCLUSIVE on app.heartbeat,"
        " app.settings. Nobody waits who calls a function, reads, or writes other rows."
    )
    assert "In the way" not in more + markdown.plan(shown) + html.plan(shown)


def test_the_command_shows_it_and_no_digest_knows_it(system: Governed, tmp_path: Path) -> None:
    plan = system.plan()
    words = ("plan", "-s", system.directory, "--dsn", system.db.dsn)
    with somebody(system, IN_THE_WAY["row updated"][0], "SELECT 'a secret in a query'") as pid:
        done = command(*words, "--out", tmp_path / "p.plan")
        as_json = json.loads(command(*words, "--format", "json").stdout)
        pages = [command(*words, "--format", form).stdout for form in ("markdown", "html")]
    lines = done.stdout.splitlines()
    (head,) = [line for line in lines if line.startswith("In the way at ")]
    assert head.endswith("(an apply waits 300ms, at most 2 times, then changes nothing):")
    said = lines[lines.index(head) + 1]
    who = f"process {pid}, role postgres, somebody, idle in transaction, its transaction open since "
    assert said.startswith(f"    row shop.open of app.settings: {who}")
    assert said.endswith("; has changed, deleted or locked it")
    for shown in (done.stdout, json.dumps(as_json), *pages):
        assert f"{pid}" in shown
        assert "somebody" in shown
        assert "a secret" not in shown
    assert as_json["format_version"] == "1.0"
    assert as_json["locks"]["in_the_way"][0]["place"] == "row shop.open of app.settings"
    assert as_json["effect_digest"] == plan.effect_digest
    # Saved, shown again, approved and applied like any other.
    saved, _ = planning.load(tmp_path / "p.plan")
    assert head in command("show", tmp_path / "p.plan").stdout.splitlines()
    system.apply(saved)
    system.in_sync()
    assert "locks" not in command(*words).stdout


def test_a_plan_of_an_earlier_version_has_no_locks(system: Governed, tmp_path: Path) -> None:
    plan = system.plan()
    document = plan.dump()
    del document["locks"]
    planning.write(tmp_path / "old.plan", document)
    loaded, _ = planning.load(tmp_path / "old.plan")
    assert loaded == plan
    system.apply(loaded)
    system.in_sync()
