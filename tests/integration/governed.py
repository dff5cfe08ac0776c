"""Beside the tests: a small governed system on a fresh database, and the main path in one call each.

The system: a gate table, a heartbeat table, a cursor, one function that must change and one that is missing. The files
are JSON, which is YAML.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unittest import mock

from psycopg import sql

from reconciler import apply as applying
from reconciler import approve as approving
from reconciler import desired, drift, pg
from reconciler import plan as planning
from reconciler.cli import main
from reconciler.model import digest
from reconciler.survey import survey, taken

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from reconciler.drift import DriftReport
    from reconciler.model import Approval, Outcome, Plan
    from tests.servers import Database

GREET = """CREATE FUNCTION app.fn_greet(who text, times integer DEFAULT 2) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, app, pg_temp
AS $function$
BEGIN
    RETURN repeat('hello ' || who, times);
END
$function$;
"""
TOTAL = """CREATE FUNCTION app.fn_total() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, app, pg_temp
AS $function$SELECT count(*) FROM app.settings$function$;
"""

SYSTEM = """
CREATE SCHEMA app;
GRANT USAGE, CREATE ON SCHEMA app TO {owner};
GRANT USAGE ON SCHEMA app TO {caller};
CREATE TABLE app.settings (
    name text PRIMARY KEY, value text, description text, changed timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE app.heartbeat (
    worker text PRIMARY KEY, kind text NOT NULL, seen timestamptz NOT NULL, ticks bigint NOT NULL DEFAULT 0
);
CREATE TABLE app.cursor (worker text PRIMARY KEY, ran timestamptz NOT NULL);
CREATE TABLE app.job (id bigint PRIMARY KEY, actor text NOT NULL);
INSERT INTO app.cursor VALUES ('courier', '2026-05-22 11:31:41.928657+00');
ALTER TABLE app.settings OWNER TO {owner};
ALTER TABLE app.heartbeat OWNER TO {owner};
ALTER TABLE app.cursor OWNER TO {owner};
ALTER TABLE app.job OWNER TO {owner};
"""

BEFORE = """
INSERT INTO app.settings (name, value) VALUES ('shop.limit', '10'), ('shop.open', 'false'), ('other', 'x');
CREATE FUNCTION app.fn_total() RETURNS bigint LANGUAGE sql VOLATILE
SET search_path = pg_catalog, app, pg_temp
AS $function$SELECT 0::bigint$function$;
ALTER FUNCTION app.fn_total() OWNER TO {owner};
REVOKE ALL ON FUNCTION app.fn_total() FROM PUBLIC;
COMMENT ON FUNCTION app.fn_total() IS 'Counts the settings.';
"""

# As they were: a superuser who switched the triggers of the ledger off.
TRIGGERS_ON = (
    "ALTER TABLE reconciler.entry ENABLE ALWAYS TRIGGER entry_is_append_only_row,"
    " ENABLE ALWAYS TRIGGER entry_is_append_only_statement"
)

# Every catalog of this database, to the row and its version; pg_statistic and the like are not written in tests.
CATALOGS = """
SELECT n.nspname, c.relname
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND NOT c.relisshared AND n.nspname NOT LIKE 'pg_toast%' AND n.nspname NOT LIKE 'pg_temp%'
 ORDER BY 1, 2
"""


def image(db: Database, *, versions: bool = True) -> dict[str, str]:
    """A digest of every table of the database, catalogs included: what "nothing was written" is judged by.

    versions: the transaction that wrote a row counts too, so that a row replaced by its equal is seen. For a catalog
    that says it all and costs a fifth: no row of it changes without a new version. Only those of pg_class do, where
    the server writes statistics in place.
    """
    xmin = sql.SQL("t.xmin::text || " if versions else "")
    parts = [
        sql.SQL("SELECT {name}, md5(coalesce(string_agg({row}, '|' ORDER BY {row}), '')) FROM {table} t").format(
            name=sql.Literal(f"{schema}.{name}"),
            row=sql.SQL("t.xmin::text")
            if versions and schema == "pg_catalog" and name != "pg_class"
            else xmin + sql.SQL("t::text"),
            table=sql.Identifier(schema, name),
        )
        for schema, name in db.execute(CATALOGS)
    ]
    return dict(db.conn.execute(sql.SQL(" UNION ALL ").join(parts)).fetchall())


class Governed:
    """A database, the directory that says what it should be, and who is who in it.

    `state` is what the files will say: change it, then `write`. Everything runs in this process, as superuser.
    """

    def __init__(self, db: Database, root: Path) -> None:
        self.db = db
        self.root = root
        self.directory = root / "state"
        self.plan_file = root / "change.plan"
        self.owner = db.role()
        self.caller = db.role()
        self.stranger = db.role()
        self.files: dict[str, str] = {}
        self.state: dict[str, Any] = {}

    @property
    def names(self) -> dict[str, str]:
        """For `format`: the roles of this system."""
        return {"owner": self.owner, "caller": self.caller, "stranger": self.stranger}

    def sql(self, *statements: str) -> None:
        """Run statements by hand, as superuser; {owner}, {caller} and {stranger} are filled in."""
        for statement in statements:
            filled = statement
            for name, role in self.names.items():
                filled = filled.replace(f"{{{name}}}", role)
            self.db.execute(filled)

    def function(self, address: str, text: str, **declared: Any) -> None:
        """Declare a function, owned by the owner and open to the caller unless told otherwise."""
        source = f"functions/{len(self.files)}.sql"
        self.files[source] = text
        self.state.setdefault("functions", {})[address] = {
            "source": source,
            "owner": self.owner,
            "execute": [self.caller],
            "comment": "A comment.",
            **declared,
        }

    def write(self) -> Governed:
        """Write the files anew."""
        (self.directory / "functions").mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (self.directory / name).write_bytes(text.encode())
        (self.directory / "all.yaml").write_text(json.dumps(self.state, indent=1))
        return self

    # ----------------------------------------------------------------------------------------------- the main path

    def plan(self, dsn: str | None = None) -> Plan:
        """The plan, as `reconciler plan --show-values` makes it."""
        wanted = taken(desired.load(self.directory, None))
        with pg.connect(dsn or self.db.dsn, "plan") as conn, pg.snapshot(conn):
            found = survey(conn, wanted)
        moved = drift.classify(wanted, found.last.manifest, found.live, last_known=found.last.readable)
        return found.plan(datetime.now(UTC), moved.drift)

    def drift(self, dsn: str | None = None) -> DriftReport:
        """The report that `reconciler drift` prints."""
        wanted = taken(desired.load(self.directory, None))
        with pg.connect(dsn or self.db.dsn, "drift") as conn, pg.snapshot(conn):
            found = survey(conn, wanted)
        return drift.report(
            drift.classify(wanted, found.last.manifest, found.live, last_known=found.last.readable),
            target=found.target,
            entry=found.last.entry,
            findings=found.live.findings,
            verdicts=found.verdicts,
            not_compared=found.not_compared,
            now=datetime.now(UTC),
            fail_on=frozenset[str](),
        )

    def approve(
        self,
        plan: Plan,
        *,
        approver: str = "operator",
        accepted: Sequence[str] | None = None,
        attested: Sequence[str] = (),
    ) -> Approval:
        """A yes to the plan with all its hazards."""
        return approving.approve(
            plan,
            digest(plan.dump()),
            approver=approver,
            reason="a test",
            accepted=plan.hazards if accepted is None else accepted,
            attested=attested,
            expires=None,
            now=datetime.now(UTC),
        )

    def save(self, plan: Plan, *approvals: Approval) -> Path:
        """The plan's file with its approvals beside it, for the command."""
        planning.write(self.plan_file, plan.dump())
        for approval in approvals:
            planning.write(approving.beside(self.plan_file, approval.approver), approval.dump())
        return self.plan_file

    def request(
        self, plan: Plan, approvals: Sequence[Approval] | None = None, *, dsn: str | None = None, **given: Any
    ) -> applying.Request:
        """What the operator asks for; a plan that sets the ledger up is a first apply."""
        given.setdefault("folder", self.root)
        given.setdefault("initialize", any(change.kind == "ledger" and change.before is None for change in plan.setup))
        chosen = [self.approve(plan)] if approvals is None else approvals
        return applying.Request(dsn=dsn or self.db.dsn, plan=plan, approvals=chosen, **given)

    def apply(
        self, plan: Plan, approvals: Sequence[Approval] | None = None, *, dsn: str | None = None, **given: Any
    ) -> Outcome:
        """Apply a plan, approved unless told otherwise."""
        return applying.apply(self.request(plan, approvals, dsn=dsn, **given), silent)

    def settle(self) -> Outcome:
        """Plan, approve, apply; then nothing may be left."""
        done = self.apply(self.plan())
        assert done.problems == ()
        self.in_sync()
        return done

    def in_sync(self) -> None:
        """Plan again is empty, and nothing has drifted."""
        again = self.plan()
        assert (again.setup, again.changes, again.drift) == ((), (), ())
        assert again.outcome == "no_changes"

    def value(self, key: str) -> str | None:
        """The stored value of a gate, None when there is no row."""
        found = self.db.execute("SELECT value FROM app.settings WHERE name = %s", [key])
        return found[0][0] if found else None

    @contextmanager
    def around_the_trigger(self) -> Iterator[None]:
        """What a superuser can do: the ledger without its triggers, and afterwards with them as if nothing had been."""
        self.sql("ALTER TABLE reconciler.entry DISABLE TRIGGER ALL")
        try:
            yield
        finally:
            self.sql(TRIGGERS_ON)

    def entries(self) -> int:
        """How many entries the ledger has; 0 when there is no ledger."""
        if self.db.execute("SELECT to_regclass('reconciler.entry')")[0][0] is None:
            return 0
        return self.db.execute("SELECT count(*) FROM reconciler.entry")[0][0]


def command(
    *arguments: str | Path,
    dsn: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves the half second that a new one takes to start.

    env: all variables there are; None leaves those of this process.
    """
    out, err = io.StringIO(), io.StringIO()
    words = ["reconciler", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: Any = None
    with (
        chdir(cwd or "."),
        mock.patch("sys.argv", words),
        mock.patch("sys.stdin", io.StringIO(stdin)),
        mock.patch.dict("os.environ", env or {}, clear=env is not None),
        mock.patch.dict("os.environ", {"RECONCILER_DSN": dsn} if dsn else {}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    # What a program could not print is an error here too.
    return subprocess.CompletedProcess(words, code, *(text.getvalue().encode().decode() for text in (out, err)))


def attests(plan_file: Path) -> list[str]:
    """The options that sign for everything that no query can see."""
    plan, _ = planning.load(plan_file)
    return [word for name in plan.attestations for word in ("--attest", name)]


def silent(stage: str, detail: str = "", number: int = 0, of: int = 0) -> None:
    """A progress that says nothing."""


def empty(db: Database, root: Path, apply: Mapping[str, Any] | None = None) -> Governed:
    """The governed system on its database, with files that govern nothing yet."""
    system = Governed(db, root)
    system.sql(SYSTEM)
    system.state = {
        "governance": {
            "version": 1,
            "name": "shop",
            "release": "r1",
            "targets": {"test": {}},
            "gate_stores": {
                "settings": {
                    "table": "app.settings",
                    "key": "name",
                    "value": "value",
                    "description": "description",
                    "updated_at": "changed",
                }
            },
            "scope": {
                "gates": [{"store": "settings", "matching": "shop.*"}],
                "functions": [{"schema": "app", "matching": "fn_*"}],
                "markers": [{"table": "app.heartbeat"}],
            },
            "approval": {"required": 1, "signed": False, "expires": "24h"},
            "apply": {
                "search_path": ["pg_catalog", "app", "pg_temp"],
                "lock_timeout": "300ms",
                "lock_retries": 1,
                "statement_timeout": "30s",
                "max_duration": "1m",
                "backup": "none",
                **(apply or {}),
            },
        }
    }
    return system


def shop(db: Database, root: Path, apply: Mapping[str, Any] | None = None) -> Governed:
    """The governed system with work for an apply: 4 to add, 2 to change; one invariant."""
    system = empty(db, root, apply)
    system.sql(BEFORE)
    system.function("app.fn_greet(text, integer)", GREET)
    system.function("app.fn_total()", TOTAL, execute=[], comment="Counts the settings.")
    system.state |= {
        "gates": {
            "shop.open": {"value": "true", "from": ["false"], "safe": "false", "lock": "approval", "reason": "Open."},
            "shop.limit": {"value": "10", "reason": "A number."},
            "shop.phase": {"value": "two", "order": ["one", "two", "three"], "reason": "The phase."},
            "shop.till": {"value": "false", "safe": "false", "lock": "locked", "reason": "Shut."},
        },
        "markers": {
            "courier": {
                "table": "app.heartbeat",
                "key": {"worker": "courier"},
                "bind": {"seen": {"query": "SELECT ran FROM app.cursor WHERE worker = 'courier'"}},
                "values": {"kind": "legacy", "ticks": "0"},
                "passive_while": "ticks = 0",
            }
        },
        "invariants": {
            "no-blank-actor": {"query": "SELECT id FROM app.job WHERE pg_catalog.btrim(actor) = ''", "rows": 0},
            "till-shut": {"gate": "shop.till", "equals": "false"},
        },
    }
    return system.write()


def applier(system: Governed) -> str:
    """A role with everything that DESIGN 7 asks for, and no more: SET on the owner, CREATE, rows of the stores."""
    role = system.db.role()
    option = " WITH INHERIT FALSE, SET TRUE" if system.db.server.major >= 16 else ""
    system.sql(
        f"GRANT {system.owner} TO {role}{option}",
        f"GRANT CREATE ON DATABASE {system.db.name} TO {role}",
        f"GRANT USAGE ON SCHEMA app TO {role}",
        f"GRANT SELECT, INSERT, UPDATE ON app.settings, app.heartbeat TO {role}",
        f"GRANT SELECT ON app.cursor, app.job TO {role}",
    )
    return role


def changed(document: Mapping[str, Any], path: Sequence[str | int], value: Any) -> dict[str, Any]:
    """A copy of a JSON document with one place changed."""
    copy: Any = deepcopy(dict(document))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return copy
