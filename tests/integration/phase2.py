"""Beside the tests: the governed system after Phase 2, made from state/ without the reconciler, and how to call it.

And `Phase2`, the way of an operator through the commands, with a copy of state/ that may be changed.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID, uuid4

from psycopg import sql
from psycopg.types.json import Jsonb
from ruamel.yaml import YAML

from tests.integration import governed
from tests.servers import PROJECT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    import psycopg

    from tests.servers import Database

STATE = PROJECT / "state"
BASELINE = PROJECT / "examples" / "dieu45" / "baseline"

PHASE_2 = (
    "public.fn_queue_heartbeat_register_passive(text, text, timestamp with time zone, text, text)",
    "public.fn_job_reap_stale_leases_dry_run(integer)",
    "public.fn_job_reap_stale_leases_apply(text, integer)",
    "public.fn_job_dead_letter_requeue_dry_run(uuid)",
    "public.fn_job_dead_letter_triage_update(uuid, text, text, text)",
)

# The role that calls each function where a test names none.
CALLER = {
    "fn_job_enqueue": "worker",
    "fn_job_claim": "worker",
    "fn_job_ack": "worker",
    "fn_job_fail": "worker",
    "fn_job_extend_lease": "worker",
    "fn_queue_heartbeat_tick": "worker",
    "fn_queue_stale_check": "reader",
    "fn_queue_heartbeat_register_passive": "operator",
    "fn_job_reap_stale_leases_dry_run": "reader",
    "fn_job_reap_stale_leases_apply": "operator",
    "fn_job_dead_letter_requeue_dry_run": "reader",
    "fn_job_dead_letter_triage_update": "operator",
}

SUBSTRATE = "queue.job_substrate.enabled"
HEARTBEAT = "queue.heartbeat.enabled"
REAPER = "queue.lease.reaper_enabled"
DRY_RUN_ONLY = "queue.lease.reaper_dry_run_only"
REPLAY = "queue.dlq.replay_enabled"


def declared(block: str) -> dict[str, dict[str, Any]]:
    """One block of state/*.yaml, by address. The file has the block's name."""
    return YAML(typ="safe", pure=True).load(STATE / f"{block}.yaml")[block]


def load_baseline(conn: psycopg.Connection[Any]) -> None:
    """The light baseline: each file as one string in one transaction."""
    for file in sorted(BASELINE.glob("[!89]*.sql")):
        with conn.transaction():
            conn.execute(file.read_bytes())


def create(conn: psycopg.Connection[Any], address: str) -> None:
    """A function as functions.yaml declares it: definition, owner, grants and comment."""
    function = declared("functions")[address]
    routine = sql.SQL(address)  # pyright: ignore[reportArgumentType] - an address is SQL as it stands
    conn.execute((STATE / function["source"]).read_bytes())
    conn.execute(sql.SQL("ALTER FUNCTION {} OWNER TO {}").format(routine, sql.Identifier(function["owner"])))
    conn.execute(sql.SQL("REVOKE ALL ON FUNCTION {} FROM PUBLIC").format(routine))
    for role in function["execute"]:
        conn.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(routine, sql.Identifier(role)))
    conn.execute(sql.SQL("COMMENT ON FUNCTION {} IS {}").format(routine, function["comment"]))


def install(conn: psycopg.Connection[Any]) -> None:
    """Phase 2 on a baseline: the five functions and the twelve gates, without the marker."""
    with conn.transaction():
        for address in PHASE_2:
            create(conn, address)
        for key, gate in declared("gates").items():
            conn.execute(
                "INSERT INTO public.dot_config (key, value) VALUES (%s, %s)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE dot_config.value <> excluded.value",
                [key, gate["value"]],
            )


class Phase2:
    """Phase 2 on a baseline, planned, approved and applied by the commands; all files of one operator in one folder."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db = db
        self.folder = folder
        self.state = folder / "state"
        self.file = folder / "phase2.plan"
        shutil.copytree(PROJECT / "state", self.state)
        self.target = "sandbox"
        if db.execute("SELECT 1 FROM pg_extension WHERE extname = 'pgcrypto'"):
            self.edit("governance.yaml", "  targets:\n", f"  targets:\n    here: {{database: {db.name}}}\n")
            self.target = "here"

    def edit(self, file: str, old: str, new: str) -> None:
        """Change one file of the copy."""
        path = self.state / file
        text = path.read_text()
        assert old in text, f"{file} does not hold {old!r}"
        path.write_text(text.replace(old, new))

    def run(self, command: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = governed.command(command, *arguments, dsn=self.db.dsn)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    def plan(self, *more: str) -> str:
        return self.run("plan", "-s", self.state, "-t", self.target, *more).stdout

    def approve(self, reason: str = "Phase 2") -> Path:
        self.plan("--out", str(self.file))
        made = json.loads(self.file.read_text())
        found = {hazard for change in (*made["setup"], *made["changes"]) for hazard in change["hazards"]}
        names = {one["address"].partition(".")[2] for one in made["invariants"] if one["missing"] == "attestation"}
        words = [word for hazard in sorted(found) for word in ("--accept", hazard)]
        words += [word for name in sorted(names) for word in ("--attest", name)]
        self.run("approve", self.file, "--as", "operator", "--reason", reason, *words)
        return self.file

    def apply(self, *more: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("apply", self.file, "--initialize", *more, code=code)


class Queue:
    """The system in one session that may do everything; each call is made as a role."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self.conn = conn

    def rows(self, query: str, *params: object) -> list[tuple[Any, ...]]:
        """The rows of a query made as superuser."""
        return self.conn.execute(query.encode(), params or None).fetchall()

    def value(self, query: str, *params: object) -> Any:
        """The one value of a query made as superuser."""
        ((value,),) = self.rows(query, *params)
        return value

    def record(self, table: str, column: str, key: object) -> dict[str, Any]:
        """One row, by column name; times as text."""
        query = sql.SQL("SELECT to_jsonb(t) FROM public.{} AS t WHERE {} = %s").format(
            sql.Identifier(table), sql.Identifier(column)
        )
        ((row,),) = self.conn.execute(query, [key]).fetchall()
        return row

    def job(self, job_id: UUID | str) -> dict[str, Any]:
        return self.record("job_queue", "job_id", job_id)

    def letter(self, job_id: UUID | str) -> dict[str, Any]:
        return self.record("job_dead_letter", "job_id", job_id)

    def image(self, table: str) -> list[tuple[Any, ...]]:
        """Every row of a table to the byte, with its version."""
        query = sql.SQL("SELECT t.ctid::text, t.xmin::text, t::text FROM public.{} AS t ORDER BY 3")
        return self.conn.execute(query.format(sql.Identifier(table))).fetchall()

    def gate(self, key: str, value: str | None) -> Self:
        """Store a gate's value; None removes the row."""
        if value is None:
            self.conn.execute("DELETE FROM public.dot_config WHERE key = %s", [key])
        else:
            self.conn.execute(
                "INSERT INTO public.dot_config (key, value) VALUES (%s, %s)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                [key, value],
            )
        return self

    def arm_reaper(self) -> Self:
        return self.gate(SUBSTRATE, "true").gate(REAPER, "true").gate(DRY_RUN_ONLY, "false")

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """What runs inside runs as this role. After an error, roll back."""
        self.conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(name)))
        yield
        self.conn.execute("RESET ROLE")

    def call(self, function: str, *positional: object, by: str | None = None, **named: object) -> dict[str, Any]:
        """The answer of a function, called as the role that CALLER or `by` names."""
        arguments = [sql.Placeholder()] * len(positional)
        arguments += [sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder()) for name in named]
        query = sql.SQL("SELECT public.{}({})").format(sql.Identifier(function), sql.SQL(", ").join(arguments))
        values = [Jsonb(v) if isinstance(v, dict) else v for v in (*positional, *named.values())]
        with self.role(by or CALLER[function]):
            ((answer,),) = self.conn.execute(query, values).fetchall()
        return answer

    def refusal(self, function: str, *positional: object, by: str | None = None, **named: object) -> str | None:
        """The reason that a function gives for refusing, None when it does not refuse."""
        answer = self.call(function, *positional, by=by, **named)
        assert answer["refused"] is ("reason" in answer)
        return answer.get("reason")

    def add_job(
        self,
        state: str = "queued",
        *,
        owner: str = "w1",
        lease: float = 300,
        attempts: int = 0,
        max_attempts: int = 5,
        key: str | None = None,
        kind: str = "test.kind",
        priority: int = 100,
        due_in: float = -1,
    ) -> UUID:
        """A job written past the functions. `lease` and `due_in`: seconds from now; only leased states have a lease."""
        leased = state in {"leased", "in_progress"}
        finished = state in {"succeeded", "failed", "dead_letter", "cancelled", "cleaned"}
        return self.value(
            "INSERT INTO public.job_queue (job_kind, state, lease_owner, lease_until, attempts, max_attempts,"
            " idempotency_key, actor, priority, scheduled_at, finished_at, source_ref, payload_json, run_id)"
            " VALUES (%s, %s, %s, clock_timestamp() + %s * interval '1 second', %s, %s, %s, 'tester', %s,"
            " clock_timestamp() + %s * interval '1 second', CASE WHEN %s THEN clock_timestamp() END,"
            " 'source', '{\"ref\": 1}', gen_random_uuid()) RETURNING job_id",
            *(kind, state, owner if leased else None, lease if leased else None, attempts, max_attempts),
            *(key or str(uuid4()), priority, due_in, finished),
        )

    def add_letter(self, key: str | None = None, *, triage_status: str = "pending") -> UUID:
        """A dead letter and its job, written past the functions. Returns the letter's id."""
        job_id = self.add_job("dead_letter", attempts=5, key=key)
        return self.value(
            "INSERT INTO public.job_dead_letter (job_id, job_kind, idempotency_key, actor, attempts, max_attempts,"
            " dead_letter_reason, dead_lettered_by, triage_status) SELECT job_id, job_kind, idempotency_key, actor,"
            " attempts, max_attempts, 'max_attempts', 'tester', %s FROM public.job_queue WHERE job_id = %s"
            " RETURNING dead_letter_id",
            *(triage_status, job_id),
        )

    def add_executor(self, name: str, age: float, *, ticks: int = 1, kind: str = "PG_worker") -> None:
        """An executor that was last seen `age` seconds ago."""
        self.conn.execute(
            "INSERT INTO public.queue_heartbeat (executor_name, executor_kind, last_tick_at, ticks_total)"
            " VALUES (%s, %s, clock_timestamp() - %s * interval '1 second', %s)",
            [name, kind, age, ticks],
        )
