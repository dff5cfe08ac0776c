#!/usr/bin/env python3
"""The heartbeat caller: looks at what the route worker leaves behind, and says so in queue_heartbeat.

It never vouches for a worker that it did not see. The worker's row is ticked only while the worker's own trace,
iu_route_worker_cursor.last_run_at, is younger than the threshold; otherwise that row is not touched. The caller ticks a
row of its own with every beat, so that the silence of the worker and the silence of the caller are two facts.

`--attest WHO` is another thing: a person's word instead of a trace. It is written down as such.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import psycopg
from psycopg import errors
from psycopg.rows import dict_row

if TYPE_CHECKING:
    from typing import LiteralString

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0

# The numbers, as the functions of the queue read them: what is no positive integer is the default. The time is the
# database's, read once: the caller sends none.
SETTING: LiteralString = """
WITH setting AS MATERIALIZED (
    SELECT pg_catalog.clock_timestamp() AS at,
           coalesce((
               SELECT pg_catalog.substring(pg_catalog.btrim(c.value), '^[1-9][0-9]{0,8}$')::integer
               FROM public.dot_config AS c WHERE c.key = 'queue.heartbeat.stale_threshold_seconds'
           ), 300) AS threshold_seconds,
           coalesce((
               SELECT pg_catalog.substring(pg_catalog.btrim(c.value), '^[1-9][0-9]{0,8}$')::integer
               FROM public.dot_config AS c WHERE c.key = 'queue.heartbeat.caller_interval_sec'
           ), 60) AS interval_seconds
)"""

# A time that is still to come is no trace of anything. A null takes out what the other mode left in metadata.
OBSERVED: LiteralString = """,
trace AS MATERIALIZED (
    SELECT s.*,
           c.last_run_at,
           CASE
               WHEN c.last_run_at IS NULL THEN 'absent'
               WHEN c.last_run_at > s.at THEN 'future'
               WHEN c.last_run_at < s.at - pg_catalog.make_interval(secs => s.threshold_seconds) THEN 'old'
               ELSE 'recent'
           END AS evidence
    FROM setting AS s
    LEFT JOIN public.iu_route_worker_cursor AS c ON c.worker_name = %(watched)s
), watched AS MATERIALIZED (
    SELECT t.*,
           CASE WHEN t.evidence = 'recent' THEN public.fn_queue_heartbeat_tick(
               p_executor_name => %(watched)s,
               p_executor_kind => %(kind)s,
               p_status => 'ok',
               p_metadata => pg_catalog.jsonb_build_object(
                   'evidence', 'iu_route_worker_cursor.last_run_at',
                   'observed_at', t.last_run_at,
                   'attested_by', NULL
               )
           ) END AS answer
    FROM trace AS t
)"""

ATTESTED: LiteralString = """,
watched AS MATERIALIZED (
    SELECT s.*,
           NULL::timestamp with time zone AS last_run_at,
           'operator_attestation' AS evidence,
           public.fn_queue_heartbeat_tick(
               p_executor_name => %(watched)s,
               p_executor_kind => %(kind)s,
               p_status => 'warn',
               p_metadata => pg_catalog.jsonb_build_object(
                   'evidence', 'operator_attestation',
                   'observed_at', NULL,
                   'attested_by', %(attested_by)s::text
               )
           ) AS answer
    FROM setting AS s
)"""

# The worker's row cannot be judged, and the caller is alive all the same.
UNJUDGED: LiteralString = """,
watched AS MATERIALIZED (
    SELECT s.*,
           NULL::timestamp with time zone AS last_run_at,
           %(unjudged)s::text AS evidence,
           NULL::jsonb AS answer
    FROM setting AS s
)"""

# The caller's status is about the caller. Silence that it could see is `ok`: it did its work. `warn` means that it
# lives but could not look, that its tick was refused, or that it passed on somebody's word.
OWN: LiteralString = """
SELECT w.evidence,
       pg_catalog.floor(pg_catalog.date_part('epoch', w.at - w.last_run_at))::bigint AS age_seconds,
       w.threshold_seconds,
       w.interval_seconds,
       w.answer AS watched,
       public.fn_queue_heartbeat_tick(
           p_executor_name => %(own)s,
           p_executor_kind => 'external_worker',
           p_status => CASE
               WHEN w.evidence IN ('recent', 'old') AND NOT coalesce((w.answer ->> 'refused')::boolean, false) THEN 'ok'
               ELSE 'warn'
           END,
           p_metadata => pg_catalog.jsonb_build_object(
               'watched', %(watched)s::text,
               'evidence', w.evidence,
               'refused', w.answer ->> 'reason',
               'attested_by', %(attested_by)s::text
           )
       ) AS own
FROM watched AS w"""


class Task(NamedTuple):
    """Who beats for whom. `attested_by` None means: observe."""

    watched: str
    kind: str
    own: str
    attested_by: str | None


class Beat(NamedTuple):
    """What one beat found and did. The answers are those of fn_queue_heartbeat_tick; `watched` None: not touched."""

    evidence: str
    age_seconds: int | None
    threshold_seconds: int
    interval_seconds: int
    watched: dict[str, Any] | None
    own: dict[str, Any]

    def line(self, task: Task) -> str:
        """The one line that a beat leaves in the log."""
        age = "" if self.age_seconds is None else f" age={self.age_seconds}s"
        return (
            f"beat watched={task.watched} evidence={self.evidence}{age}"
            f" worker={_told(self.watched)} caller={_told(self.own)}"
        )


def beat(conn: psycopg.Connection[Any], task: Task) -> Beat:
    """One beat, one statement, committed by itself: a heartbeat inside a longer transaction is invisible until its end.

    When the worker's row or the cursor is out of reach, a second statement ticks the caller alone.
    Raises psycopg.Error when that is impossible too.
    """
    try:
        return _run(conn, task, OBSERVED if task.attested_by is None else ATTESTED)
    except errors.InsufficientPrivilege:
        return _run(conn, task, UNJUDGED, "not_readable")
    except errors.LockNotAvailable:
        return _run(conn, task, UNJUDGED, "locked")
    except errors.QueryCanceled:
        return _run(conn, task, UNJUDGED, "timed_out")


def _run(conn: psycopg.Connection[Any], task: Task, middle: LiteralString, unjudged: str | None = None) -> Beat:
    cursor = conn.cursor(row_factory=dict_row)
    row = cursor.execute(SETTING + middle + OWN, {**task._asdict(), "unjudged": unjudged}).fetchone()
    return Beat(**(row or {}))


def _told(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "untouched"
    if answer["refused"]:
        return f"refused:{answer['reason']}"
    promoted = ",promoted" if answer["promoted_from_passive"] else ""
    return f"{answer['last_tick_status']}:{answer['ticks_total']}{promoted}"


def connect(dsn: str, user: str) -> psycopg.Connection[Any]:
    """The caller's own connection. Raises psycopg.Error, and ClickException for a role that may do everything."""
    conn = psycopg.connect(
        dsn,
        user=user,
        autocommit=True,
        application_name="heartbeat caller",
        connect_timeout=10,
        tcp_user_timeout=15_000,  # ms: a server that vanished is noticed
        options="-c search_path=pg_catalog -c lock_timeout=2s -c statement_timeout=10s",
    )
    if conn.info.parameter_status("is_superuser") == "on":
        conn.close()
        raise click.ClickException(f"{user} is a superuser; the caller needs the worker's role and no more.")
    return conn


def watch(dsn: str, user: str, task: Task, interval: float | None, stop: threading.Event) -> None:
    """Beat until told to stop. A lost connection is opened again, after longer and longer waits.

    interval: seconds between beats; None takes queue.heartbeat.caller_interval_sec. Never more than a third of the
    threshold. Raises psycopg.ProgrammingError for what waiting does not heal: no function, no privilege.
    """
    delay = FIRST_DELAY_S
    while not stop.is_set():
        try:
            with connect(dsn, user) as conn:
                while not stop.is_set():
                    begun = time.monotonic()
                    done = beat(conn, task)
                    delay = FIRST_DELAY_S
                    click.echo(done.line(task))
                    pause = min(interval or done.interval_seconds, done.threshold_seconds / 3)
                    stop.wait(max(0.0, begun + pause - time.monotonic()))
        except psycopg.ProgrammingError:
            raise
        except psycopg.Error as error:
            click.echo(f"no beat, next try in {delay:g} s: {_first_line(error)}", err=True)
            stop.wait(delay)
            delay = min(delay * 2, LONGEST_DELAY_S)


def _first_line(error: psycopg.Error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@click.command()
@click.option("--dsn", default="", help="Where; else libpq's own variables and service files.")
@click.option("--user", default="worker", show_default=True, help="The role to connect as.")
@click.option("--watch", "watched", default="iu_outbound_default", show_default=True, help="The executor to look at.")
@click.option("--kind", default="PG_worker", show_default=True, help="Its executor_kind.")
@click.option("--name", "own", default="dieu45_heartbeat_caller", show_default=True, help="The caller's own executor.")
@click.option("--interval", type=click.FloatRange(min=0, min_open=True), help="Seconds; else the configured number.")
@click.option("--once", is_flag=True, help="One beat, then exit: 0 when the caller's own tick was taken, else 1.")
@click.option("--attest", "attested_by", metavar="WHO", help="Tick the executor on WHO's word, without looking.")
def main(  # noqa: PLR0913, PLR0917 - the options
    dsn: str,
    user: str,
    watched: str,
    kind: str,
    own: str,
    interval: float | None,
    once: bool,
    attested_by: str | None,
) -> None:
    """Tell queue_heartbeat what can be seen of an executor, and that somebody is looking."""
    if attested_by is not None and not attested_by.strip():
        raise click.BadParameter("say who attests", param_hint="--attest")
    if watched == own:
        raise click.BadParameter("the caller cannot watch itself", param_hint="--watch")
    task = Task(watched, kind, own, attested_by)
    try:
        if once:
            with connect(dsn, user) as conn:
                done = beat(conn, task)
            click.echo(done.line(task))
            raise SystemExit(1 if done.own["refused"] else 0)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        watch(dsn, user, task, interval, stop)
    except psycopg.Error as error:
        raise click.ClickException(_first_line(error)) from None
    click.echo("stopped", err=True)


if __name__ == "__main__":
    main()
