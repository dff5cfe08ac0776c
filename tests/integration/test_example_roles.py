"""examples/roles: each role can do its whole job on the governed system, and nothing more; nothing granted is spare."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
from postgast import pg_query_pb2 as pb

from reconciler import sandbox
from reconciler.syntax import statements_of, strings
from tests import servers
from tests.conftest import BASELINE, KIND
from tests.integration import governed
from tests.integration.phase2 import Phase2
from tests.servers import PROJECT, Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers import Server

EXAMPLE = PROJECT / "examples" / "roles"
OPERATOR = "reconciler_operator"
ROLES = ("planner", OPERATOR, "auditor")
FILES = ("planner", "operator", "auditor")
EMPTY = "No changes. The database matches the desired state."


def shell(script: str, db: Database) -> None:
    """Run a block of the README as it stands, as superuser of this database."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RECONCILER_"))}
    path = os.pathsep.join(
        (os.path.dirname(sys.executable), str(sandbox.embedded_binaries()), os.environ["PATH"])  # noqa: PTH120 - a text
    )
    where = {"PGHOST": db.server.host, "PGPORT": str(db.server.port), "PGUSER": "postgres", "PGDATABASE": db.name}
    # What has been granted before is no news.
    where["PGOPTIONS"] = "-c client_min_messages=warning"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**own, **where, "PATH": path},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def again(db: Database, *options: str) -> None:
    """Grant everything once more: a test may have taken something away."""
    files = " ".join(f"-f examples/roles/{role}.sql" for role in FILES)
    shell(f"psql -X -q -v ON_ERROR_STOP=1 {' '.join(options)} {files}", db)


def served(home: Path) -> Iterator[Server]:
    """A server with the roles, and database `roles` with what they may."""
    server = servers.start(home, KIND)
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE roles")
    files = home / "baseline"
    files.mkdir()
    for file in sorted(BASELINE.glob("[!89]*.sql")):
        shutil.copy(file, files)
    sandbox.load(files, server.dsn("roles"))
    (script,) = re.findall(r"^```sh\n(.*?)^```", (EXAMPLE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    with psycopg.connect(server.dsn("roles"), autocommit=True) as conn:
        conn.execute("CREATE TABLE public.private (secret text)")
        # So that what is granted is what counts.
        conn.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    shell(script, Database(server, "roles"))
    yield server
    server.cluster.stop()
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def own(run_directory: Path, new_name: Callable[[], str]) -> Iterator[Server]:
    """A server for this module: roles are the server's, and these have the names that the files say."""
    yield from served(run_directory / new_name())


class System(Phase2):
    """Phase 2, by three people."""

    def by(self, role: str, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command as this role; it says what it says."""
        state = () if command in {"apply", "settle"} else ("-s", self.state, "-t", self.target)
        return governed.command(command, *state, *arguments, "--dsn", self.db.dsn_as(role))

    def said(self, role: str, command: str, *arguments: str | Path) -> str:
        """The same, and it must be fine."""
        done = self.by(role, command, *arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def approved(self, role: str = "planner") -> Path:
        """A plan that this role made, approved by somebody without a database."""
        self.file.unlink(missing_ok=True)
        self.said(role, "plan", "--out", self.file)
        made = json.loads(self.file.read_text())
        found = {hazard for change in (*made["setup"], *made["changes"]) for hazard in change["hazards"]}
        accept = [word for hazard in sorted(found) for word in ("--accept", hazard)]
        words = ("--as", "somebody", "--reason", "a test", *accept, *governed.attests(self.file))
        done = governed.command("approve", self.file, *words)
        assert done.returncode == 0, done.stderr
        return self.file


def copied(server: Server, name: str, folder: Path) -> Iterator[System]:
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE roles".encode())
    db = Database(server, name)
    try:
        yield System(db, folder)
        again(db)
    finally:
        db.drop()


@pytest.fixture
def system(own: Server, new_name: Callable[[], str], tmp_path: Path) -> Iterator[System]:
    """The system before Phase 2, with its roles."""
    yield from copied(own, new_name(), tmp_path)


@pytest.fixture(scope="module")
def applied(own: Server, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system after Phase 2, planned and applied by its roles. Only for tests that change nothing."""
    with contextmanager(copied)(own, new_name(), tmp_path_factory.mktemp("roles")) as system:
        system.said(OPERATOR, "apply", system.approved(), "--initialize")
        yield system


# ------------------------------------------------------------------------------------------------------------ the jobs


@pytest.mark.smoke
def test_each_does_its_job(system: System) -> None:
    assert "No drift at " in system.said("planner", "drift")
    shown = system.said("planner", "plan")
    assert "Plan: 10 to add, 1 to change, 0 to remove." in shown.splitlines()
    assert " Role planner, which made this plan, lacks 15 of these 31: apply as a role that has all of it." in shown
    assert " Role reconciler_operator has all of it.\n" in system.said(OPERATOR, "plan")

    pins = system.state / "pins.yaml"
    before = pins.read_text()
    system.said("planner", "pin")
    # What is new are the grants to the two that read.
    new = [line for line in pins.read_text().splitlines() if line not in before]
    assert new
    assert all("grant to planner:" in line or f"grant to {OPERATOR}:" in line for line in new)
    pins.write_text(before)

    assert "Apply complete! 10 added, 1 changed, 0 removed." in system.said(
        OPERATOR, "apply", system.approved(), "--initialize"
    )
    assert EMPTY in system.said("planner", "plan")
    assert "Last applied: entry 1" in system.said("planner", "drift")
    assert system.db.execute(
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ '^fn_(job|queue)_'"
    ) == [("workflow_admin",)]
    system.db.execute("UPDATE public.dot_config SET value = '301' WHERE key = 'queue.lease.duration_sec'")
    assert system.by("planner", "drift").returncode == 2
    system.said(OPERATOR, "apply", system.approved())
    assert EMPTY in system.said("planner", "plan")

    anchor = system.folder / "ledger.anchor"
    assert "Entries of dieu45: 2." in system.said("auditor", "history", "--anchor", anchor)
    assert "dieu45: intact." in system.said("auditor", "verify", "--anchor", anchor)


def test_the_ledger_belongs_to_nobody(applied: System) -> None:
    assert applied.db.execute(
        "SELECT r.rolname, r.rolcanlogin, (SELECT count(*) FROM pg_auth_members m WHERE m.roleid = r.oid)"
        " FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE c.oid = 'reconciler.entry'::regclass"
    ) == [("reconciler_ledger", False, 0)]


# ------------------------------------------------------------------------------------------------------- nothing more

HOLLOW = "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
REAP = "public.fn_job_reap_stale_leases_apply(text, integer)"
LEDGER = (
    "UPDATE reconciler.entry SET body = body",
    "DELETE FROM reconciler.entry",
    "TRUNCATE reconciler.entry",
    "ALTER TABLE reconciler.entry DISABLE TRIGGER ALL",
    "DROP TRIGGER entry_is_append_only_row ON reconciler.entry",
    f"CREATE OR REPLACE FUNCTION reconciler.entry_is_append_only() {HOLLOW}",
    "CREATE FUNCTION reconciler.other() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER TABLE reconciler.entry OWNER TO current_user",
    "DROP SCHEMA reconciler CASCADE",
    "SET session_replication_role = replica",
    "SET ROLE reconciler_ledger",
)
FOREIGN = (
    "SELECT secret FROM public.private",
    "CREATE TABLE public.mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE EXTENSION dblink SCHEMA pg_catalog",
    "CREATE ROLE mine",
    "ALTER ROLE workflow_admin LOGIN",
    "GRANT workflow_admin TO auditor",
    "ALTER TABLE public.dot_config ADD COLUMN mine int",
    "CREATE RULE mine AS ON UPDATE TO public.dot_config DO INSTEAD NOTHING",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT pg_read_file('postgresql.conf')",
)
FUNCTIONS = (
    f"DROP FUNCTION {REAP}",
    f"ALTER FUNCTION {REAP} SECURITY INVOKER",
    f"COMMENT ON FUNCTION {REAP} IS 'mine'",
    f"ALTER FUNCTION {REAP} OWNER TO current_user",
    f"CREATE OR REPLACE FUNCTION public.fn_job_queue_updated_at() {HOLLOW}",
)
WRITES = tuple(
    statement
    for table, column in (
        ("dot_config", "key"),
        ("queue_heartbeat", "executor_name"),
        ("job_queue", "actor"),
        ("job_dead_letter", "actor"),
        ("event_outbox", "actor_ref"),
        ("iu_route_worker_cursor", "worker_name"),
    )
    for statement in (
        f"INSERT INTO public.{table} ({column}) VALUES ('mine')",
        f"UPDATE public.{table} SET {column} = {column}",
        f"DELETE FROM public.{table}",
        f"TRUNCATE public.{table}",
    )
)
READS = tuple(
    f"SELECT * FROM public.{table}"
    for table in ("dot_config", "queue_heartbeat", "job_queue", "job_dead_letter", "event_outbox", "information_unit")
)
CALLS = ("SELECT public.fn_job_reap_stale_leases_apply('me', 1)", "SELECT public.fn_job_enqueue('a', 'b', 'c')")
INSERTS = ("INSERT INTO reconciler.entry (name, number) VALUES ('dieu45', 9)",)

MAY_NOT = {
    "planner": (
        *LEDGER, *INSERTS, *FOREIGN, *FUNCTIONS, *WRITES, *CALLS, "SET ROLE workflow_admin",
        f"SET ROLE {OPERATOR}",
    ),
    "auditor": (
        *LEDGER, *INSERTS, *FOREIGN, *FUNCTIONS, *WRITES, *READS, *CALLS, "SET ROLE workflow_admin", "SET ROLE planner",
    ),
    OPERATOR: (
        *LEDGER, *FOREIGN,
        "UPDATE public.dot_config SET key = 'mine'",
        "TRUNCATE public.dot_config",
        "DELETE FROM public.job_queue",
        "INSERT INTO public.event_outbox (actor_ref) VALUES ('mine')",
        "UPDATE public.iu_sql_event_route SET dry_run = false",
    ),
}  # fmt: skip


def allowed(system: System, role: str, statements: tuple[str, ...], become: str | None = None) -> list[str]:
    """Of the statements those that PostgreSQL does not refuse for want of a privilege; all of it is rolled back."""
    found: list[str] = []
    with psycopg.connect(system.db.dsn_as(role)) as conn:
        for statement in statements:
            try:
                if become is not None:
                    conn.execute(f"SET LOCAL ROLE {become}".encode())
                conn.execute(statement.encode())
                found.append(statement)
            except psycopg.errors.InsufficientPrivilege:
                pass
            except psycopg.Error as error:
                found.append(f"{statement}: {error}")
            conn.rollback()
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("role", ROLES)
def test_nothing_more(applied: System, role: str) -> None:
    before = governed.image(applied.db)
    # Before 16 whoever may become the owner has the owner's rights without becoming it; the ledger is not the owner's.
    inherits = role == OPERATOR and applied.db.server.major < 16
    assert allowed(applied, role, LEDGER if inherits else MAY_NOT[role]) == []
    assert governed.image(applied.db) == before


def test_the_operator_has_the_owners_rights_only_as_the_owner(applied: System) -> None:
    found = allowed(applied, OPERATOR, FUNCTIONS)
    # Before 16 who is a member inherits; but for grants from the owner to itself, nothing is refused.
    assert found == [] if applied.db.server.major >= 16 else found != []
    # Whoever it becomes, the ledger is not theirs.
    for other in ("workflow_admin", "worker", "reader"):
        assert allowed(applied, OPERATOR, LEDGER, other) == []


@pytest.mark.parametrize("owner", ["workflow_admin", "reconciler_ledger"])
def test_nobody_logs_in_as_an_owner(applied: System, owner: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="is not permitted to log in"):
        psycopg.connect(applied.db.dsn_as(owner))


def test_the_jobs_of_the_others_are_refused(applied: System) -> None:
    """Each in a sentence that says what is missing; nobody gets a traceback, nothing is written."""
    before = governed.image(applied.db)
    for role, command, sentence in (
        ("auditor", "plan", "USAGE on schema public"),
        ("auditor", "drift", "USAGE on schema public"),
    ):
        done = applied.by(role, command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
        assert sentence in done.stderr
    applied.edit(
        "gates.yaml",
        'value: "300"\n    lock: free\n    reason: An exec',
        'value: "301"\n    lock: free\n    reason: An exec',
    )
    done = applied.by("planner", "apply", applied.approved())
    assert done.returncode == 1
    assert "Role planner lacks " in done.stderr
    assert "UPDATE on public.dot_config" in done.stderr
    assert governed.image(applied.db) == before


# ------------------------------------------------------------------------------------------------------ nothing spare


class Granted(NamedTuple):
    """One privilege that the example grants: how it is taken away, and by what words its absence is told."""

    role: str
    revoke: str
    words: str


def granted(file: str) -> list[Granted]:
    """Everything that a file grants, one by one, read by PostgreSQL's own parser; psql's own lines are left out."""
    text = (EXAMPLE / file).read_text()
    included = re.search(r"^\\ir (\S+)", text, re.MULTILINE)
    text += (EXAMPLE / included[1]).read_text() if included else ""
    reader = re.search(r"^\\set reader (\S+)", text, re.MULTILINE)
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("\\"))
    plain = "\n".join(lines).replace(':"reader"', reader[1] if reader else "")
    found: dict[Granted, None] = {}
    statements, troubles = statements_of(re.sub(r"^SELECT .*?(?=^$|^GRANT)", "", plain, flags=re.DOTALL | re.MULTILINE))
    assert troubles == []
    for statement in statements:
        if statement.node.HasField("grant_stmt"):
            grant = statement.node.grant_stmt
            (role,) = (node.role_spec.rolename for node in grant.grantees)
            for object_, node in itertools.product(grant.objects, grant.privileges):
                found |= dict.fromkeys(_taken(role, grant.objtype, object_, node.access_priv))
        elif statement.node.HasField("grant_role_stmt"):
            (role,) = (node.role_spec.rolename for node in statement.node.grant_role_stmt.grantee_roles)
            for node in statement.node.grant_role_stmt.granted_roles:
                name = node.access_priv.priv_name
                found[Granted(role, f"REVOKE {name} FROM {role}", name)] = None
    return list(found)


def _taken(role: str, sort: int, object_: pb.Node, privilege: pb.AccessPriv) -> Iterator[Granted]:
    verb = privilege.priv_name.upper()
    if sort == pb.OBJECT_SCHEMA:
        name = object_.string.sval
        yield Granted(role, f"REVOKE {verb} ON SCHEMA {name} FROM {role}", f"{verb} on schema {name}")
    elif sort == pb.OBJECT_PARAMETER_ACL:
        name = object_.string.sval
        yield Granted(role, f"REVOKE {verb} ON PARAMETER {name} FROM {role}", f"{verb} on parameter {name}")
    else:
        name = f"{object_.range_var.schemaname}.{object_.range_var.relname}"
        columns = strings(privilege.cols)
        for column in columns:
            yield Granted(role, f"REVOKE {verb} ({column}) ON {name} FROM {role}", object_.range_var.relname)
        if not columns:
            yield Granted(role, f"REVOKE {verb} ON {name} FROM {role}", f"{verb} on {name}")


def test_what_is_granted_is_read_from_the_files() -> None:
    assert granted("auditor.sql") == [
        Granted("auditor", "REVOKE USAGE ON SCHEMA reconciler FROM auditor", "USAGE on schema reconciler"),
        Granted("auditor", "REVOKE SELECT ON reconciler.entry FROM auditor", "SELECT on reconciler.entry"),
    ]
    operator = granted("operator.sql")
    assert (
        Granted(OPERATOR, "REVOKE UPDATE (value) ON public.dot_config FROM reconciler_operator", "dot_config")
        in operator
    )
    assert Granted(OPERATOR, "REVOKE worker FROM reconciler_operator", "worker") in operator
    assert (len(granted("planner.sql")), len(operator)) == (14, 31)


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return (done.stdout + done.stderr).lower()


@contextmanager
def apart(db: Database, one: Granted) -> Iterator[None]:
    """Without this privilege; the system's own operator, from whom it is inherited as well, is without it too."""
    inherited = one.revoke.startswith(("REVOKE SELECT", "REVOKE USAGE")) and one.role == OPERATOR
    db.execute(one.revoke)
    if inherited:
        db.execute(one.revoke.replace(OPERATOR, "operator"))
    try:
        yield
    finally:
        again(db)
        if inherited:
            db.execute(one.revoke.replace("REVOKE", "GRANT").replace(f"FROM {OPERATOR}", "TO operator"))


ELSEWHERE = {"pg_read_all_data", "SET on parameter track_functions"}
"""What only some databases need: each has a test of its own."""


@pytest.mark.slow
def test_nothing_that_the_operator_is_granted_is_spare(system: System) -> None:
    file = system.approved()
    gates = "SELECT key, value, xmin::text FROM public.dot_config ORDER BY key"
    before = system.db.execute(gates)
    for one in granted("operator.sql"):
        if one.words in ELSEWHERE:
            continue
        with apart(system.db, one):
            done = system.by(OPERATOR, "apply", file, "--initialize")
        assert done.returncode in {1, 3}, one
        assert one.words.lower() in told(done), (one, told(done))
        assert system.db.execute(gates) == before
        assert system.db.execute("SELECT count(*) FROM reconciler.entry") == [(0,)]
    system.said(OPERATOR, "apply", file, "--initialize")
    assert EMPTY in system.said("planner", "plan")


@pytest.mark.slow
def test_nothing_that_the_planner_is_granted_is_spare(system: System) -> None:
    for one in granted("planner.sql"):
        system.db.execute(one.revoke)
        done = system.by("planner", "plan")
        # Without the ledger there is a plan, which says that nobody knows what was last applied.
        assert done.returncode in ({0} if "reconciler" in one.words else {1, 3}), one
        assert one.words.lower() in told(done), (one, told(done))
        again(system.db)
    system.said("planner", "plan")


def test_nothing_that_the_auditor_is_granted_is_spare(applied: System) -> None:
    for one in granted("auditor.sql"):
        applied.db.execute(one.revoke)
        for command in ("history", "verify"):
            done = applied.by("auditor", command)
            assert done.returncode == 1
            assert f"permission denied for {'schema reconciler' if 'USAGE' in one.revoke else 'table entry'}" in told(
                done
            )
        again(applied.db)
        applied.said("auditor", "verify")


@pytest.mark.parametrize(
    "one", [one for one in granted("operator.sql") if one.words in {"INSERT on reconciler.entry", "worker"}], ids=str
)
def test_a_plan_says_what_its_role_lacks(system: System, one: Granted) -> None:
    system.db.execute(one.revoke)
    document = json.loads(system.said(OPERATOR, "plan", "--format", "json"))["privileges"]
    (missing,) = document["missing"]
    assert (document["role"], missing["privilege"], missing["name"]) == (
        OPERATOR, "SET" if one.words == "worker" else "INSERT", one.words.rpartition(" ")[2],
    )  # fmt: skip
    assert missing in document["needed"]
    text = system.said(OPERATOR, "plan", "-v")
    assert f"{'role worker' if one.words == 'worker' else one.words}, which reconciler_operator lacks  (" in text


# --------------------------------------------------------------------------------------------- what only some need


@pytest.mark.slow
def test_a_full_backup_reads_every_table(system: System) -> None:
    system.edit("governance.yaml", "backup: none", "backup: full")
    file = system.approved()
    lacking = system.by(OPERATOR, "apply", file, "--initialize")
    assert lacking.returncode == 1
    assert "pg_read_all_data" in lacking.stderr
    assert "SELECT on every table (pg_read_all_data), which reconciler_operator lacks" in system.said(
        OPERATOR, "plan", "-v"
    )
    again(system.db, "-v full_backup=yes")
    try:
        assert " Role reconciler_operator has all of it." in system.said(OPERATOR, "plan")
        system.said(OPERATOR, "apply", file, "--initialize")
    finally:
        system.db.execute("REVOKE pg_read_all_data FROM reconciler_operator")
    assert EMPTY in system.said("planner", "plan")


@pytest.mark.slow
def test_where_dblink_is_installed_calls_are_counted(system: System) -> None:
    system.db.execute("CREATE EXTENSION dblink")
    for name in ("vars: {extensions: [btree_gist, ", "extensions: [btree_gist, pgcrypto, "):
        system.edit("governance.yaml", name, name.replace("btree_gist, ", "btree_gist, dblink, "))
    file = system.approved()
    lacking = system.by(OPERATOR, "apply", file, "--initialize")
    assert lacking.returncode == 1
    assert f"Role {OPERATOR} lacks SET on parameter track_functions." in lacking.stderr
    assert "SET on parameter track_functions, which reconciler_operator lacks" in system.said(OPERATOR, "plan", "-v")
    again(system.db)
    try:
        system.said(OPERATOR, "apply", file, "--initialize")
        assert EMPTY in system.said("planner", "plan")
    finally:
        if system.db.server.major >= 15:
            system.db.execute("REVOKE SET ON PARAMETER track_functions FROM reconciler_operator")
        else:
            system.db.execute("ALTER ROLE reconciler_operator RESET track_functions")
