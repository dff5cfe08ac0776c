"""Memory of the rounds: one database that every worker writes what it saw to, once for each target and round.

The schema is made by `fleet init`; nothing of it is in a governed database.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb
from pydantic import ValidationError

from reconciler import pg
from reconciler.errors import PlanDamaged, UsageError
from reconciler.fleet import report
from reconciler.fleet.report import FleetReport, TargetResult
from reconciler.model import canonical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = "reconciler_fleet"


def source() -> str:
    """The SQL that creates the schema."""
    return resources.files("reconciler.fleet").joinpath("results.sql").read_text("utf-8")


def there(conn: pg.Connection) -> bool:
    """Was the schema made?"""
    query = "SELECT pg_catalog.to_regclass('reconciler_fleet.result') IS NOT NULL AS there"
    return bool(pg.rows(conn, query, doing="looking for the results")[0]["there"])


def check(conn: pg.Connection) -> None:
    """Raises UsageError where `fleet init` was never run."""
    if not there(conn):
        raise UsageError(
            f"The database {conn.info.dbname} has no schema {SCHEMA}.",
            hint="Run `reconciler fleet init --queue DSN` once, or have a DBA run what its --print-sql prints.",
        )


def begin(conn: pg.Connection, round_id: str, fleet: str, targets: Sequence[tuple[str, Mapping[str, str]]]) -> bool:
    """Write down which targets the round is of; False when it was begun before, and then nothing is changed."""
    listed = Jsonb([{"name": name, "labels": dict(labels)} for name, labels in targets])
    query = """
        INSERT INTO reconciler_fleet.round (id, fleet, targets) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING id
    """
    return bool(pg.rows(conn, query, (round_id, fleet, listed), "beginning the round"))


def known(conn: pg.Connection, round_id: str, target: str) -> bool:
    """Was this target looked at in this round?"""
    query = "SELECT FROM reconciler_fleet.result WHERE round = %s AND target = %s"
    return bool(pg.rows(conn, query, (round_id, target), "looking for the result"))


def record(conn: pg.Connection, round_id: str, worker: str, found: TargetResult) -> bool:
    """Keep what was seen; False when somebody did before, and then theirs stays."""
    query = """
        INSERT INTO reconciler_fleet.result (round, target, worker, body) VALUES (%s, %s, %s, %s)
        ON CONFLICT DO NOTHING RETURNING target
    """
    return bool(pg.rows(conn, query, (round_id, found.name, worker, Jsonb(found.dump())), "writing the result"))


def progress(conn: pg.Connection, round_id: str) -> tuple[int, int]:
    """How many targets of the round were looked at, and how many it has."""
    query = """
        SELECT pg_catalog.jsonb_array_length(r.targets) AS of,
               (SELECT pg_catalog.count(*) FROM reconciler_fleet.result s WHERE s.round = r.id) AS done
          FROM reconciler_fleet.round r WHERE r.id = %s
    """
    row = pg.rows(conn, query, (round_id,), "counting results")[0]
    return int(row["done"]), int(row["of"])


def alone(conn: pg.Connection, queue: str) -> bool:
    """Is nobody else mending this queue? Then nobody else does until the connection is closed."""
    query = "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended(%s, 0)) AS mine"
    return bool(pg.rows(conn, query, (f"{SCHEMA}/{queue}",), "mending the queue")[0]["mine"])


def workers(conn: pg.Connection) -> list[float]:
    """Seconds since the last heartbeat of every worker that is known, the newest first."""
    query = """
        SELECT EXTRACT(epoch FROM pg_catalog.clock_timestamp() - last_heartbeat)::pg_catalog.float8 AS age
          FROM reconciler_fleet.procrastinate_workers ORDER BY last_heartbeat DESC
    """
    return [max(0.0, float(row["age"])) for row in pg.rows(conn, query, doing="looking for workers")]


def last(conn: pg.Connection, fleet: str | None = None, round_id: str | None = None) -> FleetReport | None:
    """The newest round (of this fleet), or the one with this id; None when there is none.

    Targets that nobody has looked at yet are in it as `not_started`, and then it is not finished. Raises UsageError.
    """
    check(conn)
    query = """
        SELECT id, fleet, targets,
               pg_catalog.to_char(started_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS began, started_at
          FROM reconciler_fleet.round
         WHERE (%(fleet)s::pg_catalog.text IS NULL OR fleet = %(fleet)s)
           AND (%(round)s::pg_catalog.text IS NULL OR id = %(round)s)
         ORDER BY started_at DESC LIMIT 1
    """
    rounds = pg.rows(conn, query, {"fleet": fleet, "round": round_id}, "looking for the last round")
    if not rounds:
        return None
    row = rounds[0]
    seen = pg.rows(
        conn,
        """
        SELECT target, body, worker, recorded_at,
               pg_catalog.to_char(recorded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS at
          FROM reconciler_fleet.result WHERE round = %s ORDER BY recorded_at
        """,
        (row["id"],),
        "reading the results",
    )
    try:
        return _report(row, seen)
    except (ValidationError, KeyError, TypeError) as error:
        raise PlanDamaged(
            f"Round {row['id']} holds what this version does not write: {type(error).__name__}.",
            hint="Use the reconciler of the workers, or begin a new round.",
        ) from None


def _report(row: Mapping[str, Any], seen: Sequence[Mapping[str, Any]]) -> FleetReport:
    bodies = {one["target"]: one["body"] for one in seen}
    results = [
        TargetResult.model_validate_json(canonical(bodies[one["name"]]))
        if one["name"] in bodies
        else TargetResult(name=one["name"], labels=one["labels"], state="not_started")
        for one in row["targets"]
    ]
    whole = all(one.state != "not_started" for one in results)
    return report.assemble(
        "drift",
        row["fleet"],
        row["id"],
        results,
        started_at=row["began"],
        finished_at=seen[-1]["at"] if whole and seen else None,
        workers=len({one["worker"] for one in seen}),
        seconds=(seen[-1]["recorded_at"] - row["started_at"]).total_seconds() if seen else 0.0,
    )
