"""Beside the tests: a database, an approved plan, and rounds in which a rival meets the apply of that plan.

Every round begins with the same database. The rival's statements run before, between and after those of the apply, and
an oracle says whether the outcome is one that the two could have had one after the other, in the order in which they
committed. Anything else is a lost update: a rival's committed change that an apply overwrote or hid although it was
approved without it, or an apply that committed something else than the approved after-image.
"""

from __future__ import annotations

import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from reconciler import apply as applying
from reconciler import pg
from reconciler.errors import ReconcilerError
from reconciler.trust import check_plan
from tests.fault.rivals import BODY, GRANTED
from tests.integration import governed
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from reconciler.model import Desired, Plan
    from reconciler.record import Request
    from tests.fault.rivals import Rival
    from tests.servers import Server

SERVER = {"track_commit_timestamp": "on"}
"""Settings of a server to race on: the order of commits can be asked for."""

LIMITS = {"lock_timeout": "800ms", "lock_retries": 1}
"""Of the apply: the default, and one more attempt is enough to see what a second one does."""

PATIENCE = 20.0
"""Seconds after which a rival that does not end is an error of the harness."""

VACUUM_EVERY = 200
"""Rounds. Every one of them leaves dead rows in the catalogs, and autovacuum is off."""

TABLES = """
CREATE SCHEMA IF NOT EXISTS app;
GRANT USAGE, CREATE ON SCHEMA app TO {owner};
GRANT USAGE ON SCHEMA app TO {caller};
CREATE TABLE IF NOT EXISTS app.settings (
    name text PRIMARY KEY, value text, description text, changed timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS app.heartbeat (
    worker text PRIMARY KEY, kind text NOT NULL, seen timestamptz NOT NULL, ticks bigint NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS app.cursor (worker text PRIMARY KEY, ran timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS app.job (id bigint PRIMARY KEY, actor text NOT NULL);
"""

RESET = """
BEGIN;
SET LOCAL session_replication_role = replica;
SET LOCAL client_min_messages = error;
ALTER TABLE reconciler.entry DISABLE TRIGGER ALL;
DELETE FROM reconciler.entry WHERE number > 1;
{triggers_on};
CREATE SCHEMA IF NOT EXISTS spare;
{tables}
DELETE FROM app.settings;
DELETE FROM app.heartbeat;
DELETE FROM app.cursor;
INSERT INTO app.settings (name, value) VALUES ('shop.limit', '9'), ('shop.open', 'false'), ('shop.still', '1'),
    ('other', 'x');
INSERT INTO app.cursor VALUES ('courier', '2026-05-22 11:31:41.928657+00');
DROP FUNCTION IF EXISTS app.fn_body(), app.fn_grant();
DROP FUNCTION IF EXISTS app.fn_new(), app.fn_other();
DROP FUNCTION IF EXISTS app.other(), spare.fn_body(), spare.fn_grant();
{functions}
COMMIT;
"""

FUNCTION = """CREATE FUNCTION {name} RETURNS integer LANGUAGE sql
SET search_path = pg_catalog, app, pg_temp AS $function$SELECT {answer}$function$;
"""

OWNED = """ALTER FUNCTION {name} OWNER TO {{owner}};
REVOKE ALL ON FUNCTION {name} FROM PUBLIC;
COMMENT ON FUNCTION {name} IS '{comment}';
"""

# Everything that the plan or a rival may change, and functions that were left in no schema at all.
WORLD = """
SELECT jsonb_build_object(
    'functions', (
        SELECT jsonb_object_agg(coalesce(n.nspname::text, 'no schema') || '.' || p.proname, jsonb_build_array(
                   p.prosrc, p.procost, p.prosecdef, p.proisstrict, p.proparallel, p.proconfig, o.rolname,
                   (SELECT array_agg(a::text ORDER BY a::text)
                      FROM unnest(coalesce(p.proacl, acldefault('f', p.proowner))) a),
                   (SELECT count(*) FROM pg_depend d
                     WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'x'),
                   obj_description(p.oid, 'pg_proc')))
          FROM pg_proc p LEFT JOIN pg_namespace n ON n.oid = p.pronamespace LEFT JOIN pg_roles o ON o.oid = p.proowner
         WHERE n.nspname IN ('app', 'spare') OR n.oid IS NULL),
    'schema', (SELECT nspname FROM pg_namespace WHERE nspname = 'app'))
"""
ROWS = """
SELECT jsonb_build_object(
    'settings', (SELECT jsonb_agg(jsonb_build_array(name, value) ORDER BY name) FROM app.settings),
    'heartbeat', (SELECT jsonb_agg(jsonb_build_array(worker, kind, ticks) ORDER BY worker) FROM app.heartbeat),
    'cursor', (SELECT jsonb_agg(jsonb_build_array(worker, ran) ORDER BY worker) FROM app.cursor))
"""

# Functions that an apply without locks left in no schema: nothing but this takes them away.
ORPHANS = b"""
CREATE TEMP TABLE orphan AS SELECT oid FROM pg_proc WHERE pronamespace NOT IN (SELECT oid FROM pg_namespace);
DELETE FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid IN (SELECT oid FROM orphan);
DELETE FROM pg_shdepend WHERE classid = 'pg_proc'::regclass AND objid IN (SELECT oid FROM orphan);
DELETE FROM pg_description WHERE classoid = 'pg_proc'::regclass AND objoid IN (SELECT oid FROM orphan);
DELETE FROM pg_proc WHERE oid IN (SELECT oid FROM orphan);
DROP TABLE orphan;
"""

Image = dict[str, Any]


class Stepping(pg.Connection):
    """The connection of an apply: kept from round to round, and somebody is told before each statement."""

    before: Callable[[], None] | None = None

    def execute(self, *arguments: Any, **options: Any) -> psycopg.Cursor[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride] - passes everything on
        if self.before is not None:
            self.before()
        return super().execute(*arguments, **options)

    def __exit__(self, *raised: object) -> None:
        pg.roll_back(self)


class Point(NamedTuple):
    """Before the n-th statement of a stage of the apply, counting from 0."""

    stage: str
    number: int


ENDED = Point("ended", 0)
"""When the apply is over."""


@dataclass(frozen=True)
class Schedule:
    """When the statements of a rival run, and its end: one more than it has statements, in order.

    impatient: whenever the apply waits for it, it does not wait for its next point. delays: seconds before each
    statement instead of points, counted from the begin of the apply: what then meets what is chance.
    """

    points: tuple[Point, ...] = ()
    delays: tuple[float, ...] = ()
    commit: bool = True
    impatient: bool = True


@dataclass(frozen=True)
class Round:
    """What came of one round. rival: committed, rolled back, or its SQLSTATE. lost: what is wrong, else empty."""

    rival: Rival
    schedule: Schedule
    apply: str
    rival_end: str
    lost: str = ""


class Opponent:
    """The thread and the connection of the rival."""

    def __init__(self, dsn: str, waits: Callable[[], bool]) -> None:
        """waits: does the apply wait for a lock?"""
        self.conn = psycopg.connect(dsn, autocommit=True, application_name="rival")
        self.pid = self.conn.info.backend_pid
        self._waits = waits
        self._events: list[threading.Event] = []
        self._thread: threading.Thread | None = None
        self._next: int | None = None
        self.end = ""
        self.xid: str | None = None

    @property
    def busy(self) -> bool:
        """Is it at a step, and not waiting for the point of the next one?"""
        waiting = self._next
        return not self.end and (waiting is None or self._events[waiting].is_set())

    def start(self, statements: Sequence[str], schedule: Schedule) -> None:
        """Begin the transaction; its statements wait for their points."""
        self._events = [threading.Event() for _ in range(len(statements) + 1)]
        self.end, self.xid, self._next = "", None, 0
        begun = time.monotonic()

        def wait(number: int) -> None:
            if schedule.delays:
                time.sleep(max(0.0, begun + schedule.delays[number] - time.monotonic()))
                return
            self._next = number
            while not self._events[number].wait(0.002):
                if schedule.impatient and number and self._waits():
                    break
            self._next = None

        def run() -> None:
            try:
                for number, statement in enumerate(statements):
                    wait(number)
                    if not number:
                        self.conn.execute("BEGIN")
                    self.conn.execute(statement.encode())
                wait(len(statements))
                xid = self.conn.execute("SELECT pg_current_xact_id_if_assigned()::text").fetchone()
                self.conn.execute(b"COMMIT" if schedule.commit else b"ROLLBACK")
                self.xid = xid[0] if xid else None
                self.end = "committed" if schedule.commit else "rolled back"
            except psycopg.Error as error:
                self.conn.execute("ROLLBACK")
                self.end = error.sqlstate or type(error).__name__

        self._thread = threading.Thread(target=run, name="rival")
        self._thread.start()

    def reach(self, number: int) -> None:
        """The point of this statement has come."""
        self._events[number].set()

    def join(self) -> str:
        """Let it come to its end."""
        for event in self._events:
            event.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive(), "the rival never ended"
        return self.end


class Duel:
    """A small governed system on a database of its own, one approved plan, and rounds."""

    def __init__(self, db: Database, root: Path) -> None:
        self.db = db
        self.system = _system(db, root)
        self._reset = _filled(self.system, RESET).encode()
        self._stage, self._number, self.doing = "", 0, ""
        self._hook: Callable[[Point], None] | None = None
        self._session: Stepping | None = None
        self._serial: dict[tuple[str, str], tuple[str, Image]] = {}
        self._monitor = psycopg.connect(db.dsn, autocommit=True, application_name="monitor")
        self._eye = psycopg.connect(db.dsn, autocommit=True, application_name="eye")
        self._rounds = 0
        self._orphans = False
        self._ended = False
        self._desired: dict[str, Desired] = {}
        self.opponent = Opponent(db.dsn, self._apply_waits)
        self.system.settle()
        self.reset()
        self.before = self.world()
        self.plan: Plan = self.system.plan()
        assert len(self.plan.changes) == 7, self.plan.summary
        self._approvals = [self.system.approve(self.plan)]
        self.points: list[Point] = []
        self._hook = self.points.append
        assert self.apply() == "applied"
        self._hook = None
        self.after = self.world()
        self.seconds = self._measure()

    def close(self) -> None:
        """Close every connection."""
        for conn in (self.opponent.conn, self._monitor, self._eye, self._session):
            if conn is not None:
                conn.close()

    def reset(self) -> None:
        """The database as every round begins."""
        self._rounds += 1
        if self._rounds % VACUUM_EVERY == 0:
            self.db.conn.execute("VACUUM")
        if self._orphans:
            self.db.conn.execute(ORPHANS)
        self.db.conn.execute(self._reset)

    def world(self) -> Image:
        """Everything that the plan or a rival may change."""
        image: Image = self.db.execute(WORLD)[0][0]
        self._orphans = any(name.startswith("no schema") for name in image["functions"] or ())
        if image["schema"] is not None:
            image |= self.db.execute(ROWS)[0][0]
        return image

    # ---------------------------------------------------------------------------------------------------- one apply

    def apply(self) -> str:
        """The plan applied by the product's own function: `applied`, or the word and the exit code of its refusal."""
        request: Request = self.system.request(self.plan, self._approvals)
        self._stage, self._number, self._ended = "", 0, False
        self.xid: str | None = None
        try:
            with self._connections():
                done = applying.apply(request, self._progress)
        except ReconcilerError as error:
            self.error = error
            return error.outcome if error.exit_code == 4 else f"exit {error.exit_code}: {error.message}"
        finally:
            self._ended = True
        self.xid = done.transaction_id
        return done.outcome

    @contextmanager
    def _connections(self) -> Iterator[None]:
        """Connections kept, the plan checked once, no second look after COMMIT: they only cost time here."""
        connect = pg.connect

        def lent(dsn: str | None, command: str) -> pg.Connection:
            if command != "apply":
                return connect(dsn, command)
            if self._session is None or self._session.closed:
                options: dict[str, Any] = {"row_factory": dict_row, "prepare_threshold": None}
                self._session = Stepping.connect(
                    dsn or "", autocommit=True, application_name="reconciler apply", **options
                )
            self._session.before = self._step
            return self._session

        with (
            mock.patch.object(pg, "connect", lent),
            mock.patch.object(applying, "check_plan", self._checked),
            mock.patch.object(applying, "_after", return_value=[]),
        ):
            try:
                yield
            finally:
                if self._session is not None:
                    self._session.before = None

    def _checked(self, plan: Plan) -> Desired:
        if plan.effect_digest not in self._desired:
            self._desired[plan.effect_digest] = check_plan(plan)
        return self._desired[plan.effect_digest]

    def _progress(self, stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
        del number, of
        self.doing = detail
        if stage != self._stage:
            self._stage, self._number = stage, -1

    def _step(self) -> None:
        self._number += 1
        if self._hook is not None and self._stage:
            self._hook(Point(self._stage, self._number))

    def _apply_waits(self) -> bool:
        """Does the apply wait for a lock? Asked by the rival's thread."""
        if self._session is None or self._ended:
            return False
        query = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND NOT granted)"
        row = self._eye.execute(query, (self._session.info.backend_pid,)).fetchone()
        return bool(row and row[0])

    def _rival_waits(self) -> bool:
        query = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND NOT granted)"
        row = self._monitor.execute(query, (self.opponent.pid,)).fetchone()
        return bool(row and row[0])

    def _measure(self) -> float:
        """Seconds that an apply takes."""
        self.reset()
        begun = time.monotonic()
        self.apply()
        return time.monotonic() - begun

    # ---------------------------------------------------------------------------------------------------- one round

    def alone(self, rival: Rival) -> str:
        """The rival, with nobody else there."""
        self.opponent.start(self._statements(rival), Schedule(delays=(0.0,) * (len(rival.statements) + 1)))
        return self.opponent.join()

    def serial(self, rival: Rival, order: str) -> tuple[str, Image]:
        """How the last of these ends, and the world then: `rival`, `rival, apply` or `apply, rival`, undisturbed.

        Found out once, by doing it.
        """
        if (rival.name, order) not in self._serial:
            self.reset()
            ends = [self.alone(rival) if who == "rival" else self.apply() for who in order.split(", ")]
            self._serial[rival.name, order] = ends[-1], self.world()
        return self._serial[rival.name, order]

    def play(self, rival: Rival, schedule: Schedule) -> Round:
        """One round: reset, the apply and the rival, and the oracle's verdict."""
        self.reset()
        pending = list(enumerate(schedule.points))

        def hook(point: Point) -> None:
            while pending and pending[0][1] == point:
                self.let(pending.pop(0)[0])

        self.opponent.start(self._statements(rival), schedule)
        self._hook = hook if schedule.points else None
        try:
            ended = self.apply()
        finally:
            self._hook = None
            rival_end = self.opponent.join()
        return Round(rival, schedule, ended, rival_end, self._lost(rival, ended, rival_end))

    def _statements(self, rival: Rival) -> list[str]:
        return [_filled(self.system, statement) for statement in rival.statements]

    def let(self, number: int) -> None:
        """The rival may go on with this statement; wait until it is done with it, or waits for a lock."""
        self.opponent.reach(number)
        deadline = time.monotonic() + PATIENCE
        while self.opponent.busy:
            assert time.monotonic() < deadline, "the rival is busy for ever"
            time.sleep(0.0003)
            if self.opponent.busy and self._rival_waits():
                return

    def _lost(self, rival: Rival, ended: str, rival_end: str) -> str:
        """The oracle. Empty when the outcome is that of the two one after the other, in the order of their commits."""
        world, first = self.world(), self._rival_first()
        if ended != "applied":
            expected = self.serial(rival, "rival")[1] if rival_end == "committed" else self.before
            return _other(world, expected, "after an apply that was refused")
        if rival_end != "committed":
            return _other(world, self.after, "after an apply whose rival did nothing")
        if first:
            end, expected = self.serial(rival, "rival, apply")
            if end == "applied" and world == expected:
                return ""
            if not rival.elsewhere:
                return f"the rival committed first; alone, the apply would then have been {end}" + _other(
                    world, expected, ", and there would be another world"
                )
        end, expected = self.serial(rival, "apply, rival")
        if end != "committed":
            return f"after the apply, the rival alone would have failed with {end}"
        return _other(world, expected, "after the apply and then the rival")

    def _rival_first(self) -> bool:
        """Did the rival commit before the apply? One that wrote nothing comes after."""
        if self.opponent.xid is None or self.xid is None:
            return False
        query = "SELECT pg_xact_commit_timestamp(%s::text::xid) < pg_xact_commit_timestamp(%s::text::xid)"
        return self.db.execute(query, [self.opponent.xid, self.xid])[0][0]


def _system(db: Database, root: Path) -> governed.Governed:
    """The system of the integration tests with a table of its own for every sort of change."""
    system = governed.Governed(db, root)
    system.sql("CREATE SCHEMA spare", TABLES)
    system.sql("INSERT INTO app.cursor VALUES ('courier', '2026-05-22 11:31:41.928657+00')")
    system.state = {
        "governance": {
            "version": 1,
            "name": "race",
            "release": "r1",
            "targets": {"test": {}},
            "gate_stores": {"settings": {"table": "app.settings", "key": "name", "value": "value"}},
            "approval": {"required": 1, "signed": False, "expires": "24h"},
            "apply": {"search_path": ["pg_catalog", "app", "pg_temp"], "backup": "none", **LIMITS},
        },
        "gates": {
            "shop.open": {"value": "true", "from": ["false"], "reason": "Open."},
            "shop.limit": {"value": "10", "reason": "A number."},
            "shop.till": {"value": "false", "reason": "Shut."},
            "shop.still": {"value": "1", "reason": "Nothing to do."},
        },
        "markers": {
            "courier": {
                "table": "app.heartbeat",
                "key": {"worker": "courier"},
                "bind": {"seen": {"query": "SELECT ran FROM app.cursor WHERE worker = 'courier'"}},
                "values": {"kind": "legacy", "ticks": "0"},
            }
        },
        "invariants": {
            "no-blank-actor": {"query": "SELECT id FROM app.job WHERE pg_catalog.btrim(actor) = ''", "rows": 0}
        },
    }
    for name in (BODY, GRANTED, "app.fn_new()"):
        system.function(name, FUNCTION.format(name=name, answer=2))
    return system.write()


def _filled(system: governed.Governed, statement: str) -> str:
    """With the statements that a reset is made of, and the roles."""
    functions = [
        FUNCTION.format(name=BODY, answer=1) + OWNED.format(name=BODY, comment="A comment."),
        f"GRANT EXECUTE ON FUNCTION {BODY} TO {{caller}};",
        FUNCTION.format(name=GRANTED, answer=2) + OWNED.format(name=GRANTED, comment="Another."),
        FUNCTION.format(name="app.other()", answer=5),
    ]
    parts = {"tables": TABLES, "functions": "".join(functions), "triggers_on": governed.TRIGGERS_ON}
    for name, text in (*parts.items(), *system.names.items()):
        statement = statement.replace(f"{{{name}}}", text)
    return statement


def _other(found: Image, expected: Image, when: str) -> str:
    """The differences between two images; empty when there is none."""
    if found == expected:
        return ""
    keys = sorted({*found, *expected})
    told: list[str] = []
    for key in keys:
        is_now, should = found.get(key), expected.get(key)
        if isinstance(is_now, dict) and isinstance(should, dict):
            told.append(_other(is_now, should, key))
        elif is_now != should:
            told.append(f"{key} is {is_now}, not {should}")
    return f"{when}: {'; '.join(filter(None, told))}"


@contextmanager
def duel_on(server: Server, name: str) -> Iterator[Duel]:
    """An duel on a new database of a server that has the settings of SERVER."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    db = Database(server, name)
    with tempfile.TemporaryDirectory() as root:
        try:
            duel = Duel(db, Path(root))
            try:
                yield duel
            finally:
                duel.close()
        finally:
            db.drop()
