"""What `plan` and `drift` need and touch: a role that may read the declared tables, and statements that only read.

And the bad days of a connection and of a role: one sentence that names the object and what is missing.
"""

from __future__ import annotations

import csv
import re
import shutil
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import desired, pg, sandbox
from reconciler.errors import MissingPrivilege, Refused
from reconciler.survey import survey
from tests.conftest import BASELINE
from tests.integration import governed
from tests.integration.governed import applier
from tests.servers import PROJECT, Database

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.model import Verdict
    from tests.conftest import Command
    from tests.servers import Server

STATE = PROJECT / "state"
TABLES = (
    "public.dot_config",
    "public.queue_heartbeat",
    "public.iu_route_worker_cursor",
    "public.job_queue",
    "public.job_dead_letter",
    "public.event_outbox",
    "public.iu_sql_event_route",
    "public.information_unit",
    "public.iu_vector_sync_point",
)
# Rows of the surface that a plan reads beforehand.
COUNTED = ("surface.job_queue-rows", "surface.event_outbox-rows")
READS = ("pg_read_all_settings", "pg_read_all_stats")
HANDS = [
    "--accept",
    "arms_gate",
    "--accept",
    "grants_execute",
    "--accept",
    "moves_from_safe",
    "--accept",
    "security_definer",
]


def planner(db: Database, *, tables: tuple[str, ...] = TABLES, reads: tuple[str, ...] = READS) -> str:
    """A role that may read the declared tables and what the checks look at, nothing else. The pins know its name."""
    role = db.role(name=f"planner_{db.name}")
    for table in tables:
        db.execute(f"GRANT SELECT ON {table} TO {role}")
    for read in reads:
        db.execute(f"GRANT {read} TO {role}")
    return role


def target(db: Database) -> str:
    """production wants a database of that name; the sandbox has no pgcrypto, which then is one extension too many."""
    return "sandbox" if db.execute("SELECT 1 FROM pg_extension WHERE extname = 'pgcrypto'") == [] else "here"


@pytest.fixture
def state(tmp_path: Path, dieu45: Database) -> Path:
    """The project's state, with a target that takes this database's name whatever it is called."""
    return states(tmp_path, dieu45)


def states(folder: Path, db: Database) -> Path:
    copy = folder / "state"
    shutil.copytree(STATE, copy)
    file = copy / "governance.yaml"
    text = file.read_text().replace("  targets:\n", f"  targets:\n    here: {{database: {db.name}}}\n")
    file.write_text(text.replace("readers: [operator, planner, reconciler_operator]", f"readers: [planner_{db.name}]"))
    return copy


def reading(command: str, db: Database, role: str, state: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return governed.command(command, "-s", state, "-t", target(db), "--dsn", db.dsn_as(role), *more)


def phase2(db: Database, state: Path, folder: Path) -> None:
    """Plan, approve and apply as superuser."""
    for words in (
        ("plan", "-s", state, "-t", target(db), "--out", folder / "p2.plan"),
        ("approve", folder / "p2.plan", "--as", "operator", "--reason", "test", *HANDS),
        ("apply", folder / "p2.plan", "--initialize"),
    ):
        signed = governed.attests(folder / "p2.plan") if words[0] == "approve" else []
        assert governed.command(*words, *signed, dsn=db.dsn).returncode == 0


def test_select_on_the_tables_and_two_roles_are_enough(dieu45: Database, state: Path, tmp_path: Path) -> None:
    role = planner(dieu45)
    before = reading("plan", dieu45, role, state)
    assert "Plan: 10 to add, 1 to change, 0 to remove." in before.stdout.splitlines()
    assert (before.returncode, before.stderr) == (0, "")
    assert " 0 violated, 0 attested, 0 not judged, " in before.stdout
    assert "undeclared" not in before.stdout
    first = reading("drift", dieu45, role, state)
    assert (first.returncode, first.stderr) == (0, "")
    assert "No drift at " in first.stdout

    phase2(dieu45, state, tmp_path)

    after = reading("plan", dieu45, role, state)
    assert (after.returncode, after.stderr) == (0, "")
    assert "No changes. The database matches the desired state." in after.stdout
    assert f"GRANT USAGE ON SCHEMA reconciler TO {role}" in after.stdout
    clean = reading("drift", dieu45, role, state)
    assert (clean.returncode, clean.stderr) == (0, "")

    dieu45.execute("UPDATE public.dot_config SET value = '301' WHERE key = 'queue.lease.duration_sec'")
    moved = reading("drift", dieu45, role, state)
    assert moved.returncode == 2
    assert "gate.queue.lease.duration_sec" in moved.stdout
    assert "what was last applied is not known" in moved.stdout


def test_with_the_ledger_readable_nothing_is_left_to_say(dieu45: Database, state: Path, tmp_path: Path) -> None:
    phase2(dieu45, state, tmp_path)
    role = planner(dieu45, tables=(*TABLES, "reconciler.entry"))
    dieu45.execute(f"GRANT USAGE ON SCHEMA reconciler TO {role}")
    found = reading("drift", dieu45, role, state)
    assert found.returncode == 0
    assert "ledger_not_readable" not in found.stdout
    assert "Last applied: entry 1" in found.stdout


@pytest.mark.parametrize(
    ("tables", "reads", "missing", "affected"),
    [
        (TABLES, READS[1:], "pg_read_all_settings", {"F01-no-pg-cron"}),
        (TABLES, READS[:1], "pg_read_all_stats", {"no-unexpected-backend"}),
        (
            tuple(table for table in TABLES if table != "public.job_queue"),
            READS,
            "SELECT on public.job_queue",
            {"no-leased-jobs", "no-such-job", "no-blank-actor", "no-letter-of-a-live-job"},
        ),
        (
            tuple(table for table in TABLES if table != "public.event_outbox"),
            READS,
            "SELECT on public.event_outbox",
            {"no-phase2-event", "F06-no-outbox-mutation"},
        ),
        (
            tuple(table for table in TABLES if table != "public.iu_sql_event_route"),
            READS,
            "SELECT on public.iu_sql_event_route",
            {"routes-stay-dry"},
        ),
    ],
    ids=["settings", "stats", "job_queue", "event_outbox", "routes"],
)
@pytest.mark.parametrize("command", ["plan", "drift"])
def test_not_seen_is_not_held(
    dieu45: Database,
    state: Path,
    command: str,
    tables: tuple[str, ...],
    reads: tuple[str, ...],
    missing: str,
    affected: set[str],
) -> None:
    import json

    role = planner(dieu45, tables=tables, reads=reads)
    done = reading(command, dieu45, role, state, "--format", "json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    verdicts = [*document["invariants"], *document.get("surface", [])]
    unjudged = {verdict["address"]: verdict for verdict in verdicts if verdict["status"] not in {"held", "deferred"}}
    counted = f"surface.{missing.rpartition('.')[2]}-rows"
    addresses = {f"invariant.{name}" for name in affected}
    if command == "plan" and counted in COUNTED:
        addresses.add(counted)
    assert set(unjudged) == addresses
    for verdict in unjudged.values():
        assert (verdict["status"], verdict["missing"]) == ("not_judged", missing)
        assert missing in verdict["detail"]
    text = reading(command, dieu45, role, state)
    assert text.returncode == 3
    assert text.stdout.count(": not_judged: ") == len(addresses)
    assert missing in text.stdout
    assert f", {len(affected)} not judged" in text.stdout


def test_a_plan_with_an_unjudged_invariant_is_not_saved(dieu45: Database, state: Path, tmp_path: Path) -> None:
    role = planner(dieu45, reads=())
    done = reading("plan", dieu45, role, state, "--out", str(tmp_path / "p.plan"))
    assert done.returncode == 3
    assert not (tmp_path / "p.plan").exists()


@pytest.mark.parametrize("command", ["plan", "drift"])
@pytest.mark.parametrize("table", TABLES[:3])
def test_a_declared_table_that_may_not_be_read_is_named(
    dieu45: Database, state: Path, command: str, table: str
) -> None:
    role = planner(dieu45, tables=tuple(each for each in TABLES if each != table))
    done = reading(command, dieu45, role, state)
    one_sentence(done, 1)
    assert table.removeprefix("public.") in done.stderr
    assert f"role {role} lacks SELECT on {table}" in done.stderr


def one_sentence(done: subprocess.CompletedProcess[str], code: int) -> None:
    """An error, then at most its details and what to do; never a traceback, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) <= 4


def test_row_security_on_the_table_of_an_invariant(dieu45: Database, state: Path) -> None:
    role = planner(dieu45)
    dieu45.execute("ALTER TABLE public.job_queue ENABLE ROW LEVEL SECURITY")
    dieu45.execute("CREATE POLICY all_rows ON public.job_queue USING (true)")
    done = reading("plan", dieu45, role, state)
    assert done.returncode == 3
    assert "row security hides rows of public.job_queue" in done.stdout
    assert ", 4 not judged" in done.stdout
    # Who bypasses it judges.
    assert reading("plan", dieu45, "postgres", state).returncode == 0


def test_row_security_behind_a_view_of_an_invariant(db: Database, tmp_path: Path) -> None:
    """The view is readable, its table hides rows from the view's owner: nothing is judged on the rest."""
    system = governed.shop(db, tmp_path)
    system.sql(
        "CREATE VIEW app.jobs AS SELECT * FROM app.job",
        "ALTER VIEW app.jobs OWNER TO {stranger}",
        "GRANT SELECT ON app.job TO {stranger}",
        "ALTER TABLE app.job ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY few ON app.job USING (id > 5)",
        "INSERT INTO app.job VALUES (1, '')",
        "GRANT USAGE ON SCHEMA app TO {stranger}",
    )
    system.state["invariants"] = {"no-blank-actor": {"query": "SELECT id FROM app.jobs", "rows": 0}}
    with pytest.raises(MissingPrivilege, match=r"judging invariant\.no-blank-actor: .*42501"):
        system.write().plan()


def test_row_security_on_a_gate_store_and_a_marker_table(db: Database, tmp_path: Path) -> None:
    """A gate that is hidden is not a gate that is missing."""
    system = governed.shop(db, tmp_path)
    system.sql(
        "GRANT USAGE ON SCHEMA app TO {stranger}",
        "GRANT SELECT ON ALL TABLES IN SCHEMA app TO {stranger}",
    )
    assert system.plan(db.dsn_as(system.stranger)).summary == system.plan().summary
    for table in ("app.settings", "app.heartbeat", "app.cursor"):
        system.sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        with pytest.raises(MissingPrivilege, match=rf"row security hides rows of {table} from role {system.stranger}"):
            system.plan(db.dsn_as(system.stranger))
        system.sql(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")


# --------------------------------------------------------------------------------------------- what a run says and does


@pytest.fixture
def logged(own_server: Callable[..., Server], tmp_path: Path) -> Iterator[tuple[Database, Path]]:
    """The light baseline on a server that logs every statement, and its log."""
    server = own_server(
        logging_collector="on", log_destination="csvlog", log_filename="all", log_statement="all", log_rotation_size="0"
    )
    files = tmp_path / "baseline"
    files.mkdir()
    for file in BASELINE.glob("[!89]*.sql"):
        shutil.copy(file, files)
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE directus")
    sandbox.load(files, server.dsn("directus"))
    db = Database(server, "directus")
    yield db, server.cluster.home / "data" / "log" / "all.csv"
    db.conn.close()


def statements(log: Path, application: str) -> list[str]:
    """The text of every statement that this application sent; of csvlog, 22 is application_name, 13 the message."""
    csv.field_size_limit(2**24)
    with log.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[22] == application]
    found = [re.match(r"(?:statement|execute [^:]+): (.*)", row[13], re.DOTALL) for row in rows]
    return [match[1].strip() for match in found if match]


@pytest.mark.matrix
def test_a_run_only_reads(cli: Command, logged: tuple[Database, Path], tmp_path: Path) -> None:
    db, log = logged
    state = states(tmp_path / "s", db) if (tmp_path / "s").mkdir() is None else STATE
    role = planner(db)
    snapshot = "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text"
    ((xid,),) = db.execute(snapshot)
    for round_ in ("before", "after"):
        for command in ("plan", "drift"):
            for form in ("text", "json"):
                cli(command, "-s", state, "-t", target(db), "--dsn", db.dsn_as(role), "--format", form)
        if round_ == "before":
            assert db.execute(snapshot) == [(xid,)]  # nobody was given a transaction id
            phase2(db, state, tmp_path)

    for command in ("plan", "drift"):
        sent = statements(log, f"reconciler {command}")
        assert len(sent) > 40
        assert {text.split()[0] for text in sent} <= {"BEGIN", "SET", "SELECT", "FETCH", "ROLLBACK"}
        assert sent.count("ROLLBACK") == sum(text.startswith("BEGIN") for text in sent) >= 4
        assert all(text.endswith("READ ONLY") for text in sent if text.startswith("BEGIN"))
        assert all(text.startswith("SET LOCAL ") for text in sent if text.startswith("SET"))
        # One statement each, and none that would take a lock or run a function of ours.
        assert not any(re.search(r"\bFOR (UPDATE|SHARE|NO KEY|KEY)\b|\bINTO\b", text) for text in sent)
    # What apply sends before it has all its approvals is the same; the log has its changes afterwards.
    assert "INSERT" in {text.split()[0] for text in statements(log, "reconciler apply")}


def test_no_transaction_id_at_the_end_of_a_run(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    for settled in (False, True):
        if settled:
            system.settle()
        with pg.connect(db.dsn, "plan") as conn, pg.snapshot(conn):
            survey(conn, desired.load(system.directory, None)).plan(governed.datetime.now(governed.UTC))
            query = (
                "SELECT pg_catalog.pg_current_xact_id_if_assigned()::text AS xid,"
                " (SELECT count(*) FROM pg_catalog.pg_locks WHERE pid = pg_catalog.pg_backend_pid()"
                " AND mode NOT IN ('AccessShareLock', 'ExclusiveLock')) AS locks,"
                " pg_catalog.current_setting('transaction_read_only') AS readonly"
            )
            assert pg.rows(conn, query) == [{"xid": None, "locks": 0, "readonly": "on"}]


# ---------------------------------------------------------------------------------------------------- a bad connection

SECRET = "s3cr3t-w0rd"


CONNECTIONS = {
    "wrong password": "postgresql://postgres:{secret}@127.0.0.1:{port}/postgres",
    "wrong password, pairs": "host=127.0.0.1 port={port} user=postgres password={secret} dbname=postgres",
    "wrong password, quoted": "host=127.0.0.1 port={port} user=postgres password='{secret}' dbname=postgres",
    "wrong password, option": "postgresql://127.0.0.1:{port}/postgres?user=postgres&password={secret}",
    "no server": "postgresql://postgres:{secret}@127.0.0.1:1/postgres",
    "no host": "postgresql://postgres:{secret}@no-such-host.invalid/postgres",
    "no socket": "host=/nonexistent user=postgres password={secret}",
    "wrong database": "host={host} port={port} user=postgres password={secret} dbname=no_such_database",
    "wrong role": "host={host} port={port} user=no_such_role password={secret} dbname=postgres",
    "port no number": "postgresql://postgres:{secret}@127.0.0.1:port/postgres",
    "at sign in the password": "postgresql://postgres:x@{secret}@127.0.0.1:{port}/postgres",
    "slash in the password": "postgresql://postgres:x/{secret}@127.0.0.1:{port}/postgres",
    "question mark in the password": "postgresql://postgres:x?{secret}@127.0.0.1:{port}/postgres",
    "space in the password": "host=127.0.0.1 port={port} user=postgres password=x {secret} dbname=postgres",
    "unknown option": "host=127.0.0.1 port={port} user=postgres password={secret} dbnam=postgres",
    "no connection string": "postgres:{secret}@127.0.0.1:{port}/postgres",
    "wrong scheme": "postgressql://postgres:{secret}@127.0.0.1:{port}/postgres",
    "open quote": "host=127.0.0.1 password='{secret} dbname=postgres",
    "bad escape": "postgresql://postgres:{secret}%zz@127.0.0.1:{port}/postgres",
}


def connection(server: Server, name: str) -> str:
    return CONNECTIONS[name].format(secret=SECRET, host=server.host, port=server.port)


@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_connection_that_fails_is_one_sentence(server: Server, name: str) -> None:
    said = governed.command("plan", "-t", "sandbox", "--dsn", connection(server, name))
    one_sentence(said, 1)
    assert len(said.stderr.splitlines()) == 2
    assert SECRET not in said.stderr


def test_the_object_is_named(server: Server, db: Database) -> None:
    def said(dsn: str, target: str = "sandbox") -> str:
        done = governed.command("drift", "-t", target, dsn=dsn)
        one_sentence(done, 1)
        assert SECRET not in done.stderr
        return done.stderr

    assert 'password authentication failed for user "postgres"' in said(connection(server, "wrong password"))
    assert "refused" in said(connection(server, "no server")).lower()
    assert 'database "no_such_database" does not exist' in said(connection(server, "wrong database"))
    assert 'role "no_such_role" does not exist' in said(connection(server, "wrong role"))
    assert f"Target production is database directus, but this connection is to {db.name}." in said(db.dsn, "production")
    assert "there is no table public.dot_config in this database" in said(db.dsn)


def test_the_password_of_a_run_is_nowhere(dieu45: Database, state: Path, tmp_path: Path) -> None:
    dsn = dieu45.server.tcp(dieu45.name)
    password = dieu45.server.password
    plan = tmp_path / "p.plan"
    made = governed.command("plan", "-s", state, "-t", target(dieu45), "--dsn", dsn, "--out", plan, "-v")
    done = [
        made,
        governed.command("approve", plan, "--as", "operator", "--reason", "test", *HANDS, *governed.attests(plan)),
        governed.command("apply", plan, "--dsn", dsn, "--initialize", "-v"),
        governed.command("drift", "-s", state, "-t", target(dieu45), "--dsn", dsn, "--format", "json"),
    ]
    assert [each.returncode for each in done] == [0, 0, 0, 0]
    assert not any(password in each.stdout + each.stderr for each in done)
    assert not any(password in file.read_text() for file in tmp_path.glob("p.plan*"))
    assert dieu45.execute("SELECT count(*) FROM reconciler.entry WHERE strpos(body, %s) > 0", [password]) == [(0,)]


# ------------------------------------------------------------------------------------------------------ who may apply


def test_a_role_with_exactly_what_is_needed_applies(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    role = applier(system)
    plan = system.plan(db.dsn_as(role))
    assert plan == system.plan().model_copy(update={"created_at": plan.created_at, "expires_at": plan.expires_at})
    system.apply(plan, dsn=db.dsn_as(role))
    system.in_sync()
    assert db.execute("SELECT DISTINCT r.rolname FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner"
                      " WHERE p.proname LIKE 'fn\\_%%'", []) == [(system.owner,)]  # fmt: skip
    # And again, to put back what was changed by hand.
    system.sql("ALTER FUNCTION app.fn_greet(text, integer) SECURITY INVOKER")
    system.apply(system.plan(), dsn=db.dsn_as(role))
    system.in_sync()


@pytest.mark.parametrize(
    ("revoke", "named"),
    [
        ("REVOKE {owner} FROM {role}", "membership with SET in role {owner}"),
        ("REVOKE CREATE ON DATABASE {database} FROM {role}", "CREATE on database {database}"),
        ("REVOKE CREATE ON SCHEMA app FROM {owner}", "CREATE on schema app for role {owner}"),
        ("REVOKE INSERT ON app.settings FROM {role}", "INSERT on app.settings"),
        ("REVOKE UPDATE ON app.settings FROM {role}", "UPDATE on app.settings"),
        ("REVOKE INSERT ON app.heartbeat FROM {role}", "INSERT on app.heartbeat"),
    ],
    ids=["owner", "database", "schema", "insert gate", "update gate", "insert marker"],
)
def test_a_privilege_that_is_missing_at_apply_is_named(db: Database, tmp_path: Path, revoke: str, named: str) -> None:
    system = governed.shop(db, tmp_path)
    role = applier(system)
    plan = system.plan()
    words = {"role": role, "owner": system.owner, "database": db.name}
    db.execute(revoke.format(**words))
    before = governed.image(db)
    with pytest.raises(MissingPrivilege) as refused:
        system.apply(plan, dsn=db.dsn_as(role))
    said = f"{refused.value.message} {' '.join(refused.value.details)}"
    assert role in said
    assert named.format(**words) in said
    assert governed.image(db) == before


def test_everything_that_is_missing_is_named_at_once(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    role = db.role()
    system.sql(f"GRANT USAGE ON SCHEMA app TO {role}", f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {role}")
    plan = system.plan()
    file = system.save(plan, system.approve(plan))
    before = governed.image(db)
    done = governed.command("apply", file, "--dsn", db.dsn_as(role), "--initialize")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"Role {role} lacks" in done.stderr
    for what in (f"membership with SET in role {system.owner}", "INSERT on app.settings", "CREATE on database"):
        assert what in done.stderr
    assert governed.image(db) == before


def test_a_ledger_that_may_not_be_read_or_written_stops_an_apply(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    system.settle()
    role = applier(system)
    system.sql("UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    plan = system.plan()
    before = governed.image(db)
    with pytest.raises(MissingPrivilege, match="may not read the ledger"):
        system.apply(plan, dsn=db.dsn_as(role))
    db.execute(f"GRANT USAGE ON SCHEMA reconciler TO {role}")
    db.execute(f"GRANT SELECT ON reconciler.entry TO {role}")
    before = governed.image(db)
    with pytest.raises(MissingPrivilege, match=r"INSERT on reconciler\.entry"):
        system.apply(plan, dsn=db.dsn_as(role))
    assert governed.image(db) == before
    db.execute(f"GRANT INSERT ON reconciler.entry TO {role}")
    system.apply(plan, dsn=db.dsn_as(role))
    system.in_sync()


def test_a_schema_of_that_name_that_is_no_ledger(db: Database, tmp_path: Path) -> None:
    system = governed.shop(db, tmp_path)
    db.execute("CREATE SCHEMA reconciler")
    with pytest.raises(Refused, match="is not the ledger of this program"):
        system.plan()


def test_verdicts_tell_counts_never_rows(db: Database, tmp_path: Path) -> None:
    """What the planner may read, a pull request could print."""
    system = governed.shop(db, tmp_path)
    system.sql(
        "INSERT INTO app.job VALUES (1, ''), (2, '  ')", "UPDATE app.settings SET value = 'hush' WHERE name = 'other'"
    )
    system.state["invariants"]["value"] = {
        "query": "SELECT value FROM app.settings WHERE name = 'other'",
        "equals": "something else",
    }
    found: dict[str, Verdict] = {verdict.address: verdict for verdict in system.write().plan().invariants}
    assert found["invariant.no-blank-actor"].detail == "2 rows, expected 0"
    assert found["invariant.value"].status == "violated"
    shown: Any = found["invariant.value"].dump()
    assert "hush" not in str(shown)
