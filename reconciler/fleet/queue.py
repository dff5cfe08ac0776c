"""On several machines: the looks of a round as jobs of procrastinate, and workers that do them.

A round is written down in one transaction with its jobs, so there is never one without the other. A job has its
target's lock, so no target is looked at twice at a time; what it saw is kept once for each round and target, so a job
that runs again, because its worker was killed, adds nothing when it had come to its end. procrastinate's tables are in
the schema of the results. Its names are not for other programs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from psycopg import sql

from reconciler import pg
from reconciler.errors import InputError, ReconcilerError, Unreachable, UsageError
from reconciler.fleet import files, looks, members, results
from reconciler.plan import stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import procrastinate
    import psycopg
    from procrastinate.job_context import JobContext

    from reconciler.fleet.files import Fleet, Member
    from reconciler.fleet.report import TargetResult

LOOK = "reconciler.look"
ROUND = "reconciler.round"

ATTEMPTS = 3
"""Looks at a target that cannot be reached, before the round says so."""

PAUSE = 3
"""Seconds before the second look; its square before the third."""

SILENT = 3
"""So many heartbeats that did not come, and a worker counts as killed."""

AGAIN = 5.0
"""Seconds before a worker that lost the queue's database looks for it again."""

LATE = 600
"""Seconds after its moment that a round of the schedule is still begun, when no worker was there."""


class _Again(Exception):
    """The target could not be reached; a later look may."""


RETRIED = {_Again, Unreachable}
"""For the rest a job has a result, which is that there is none."""


@dataclass(frozen=True)
class Work:
    """What a worker goes by. told: hears a line for every look, and of trouble. heartbeat: in seconds."""

    file: Path
    dsn: str
    workers: int
    heartbeat: float
    fail_on: frozenset[str]
    untested: bool
    told: Callable[[str], None]


def library() -> Any:  # noqa: ANN401 - a module
    """The package. Raises UsageError where it is not installed."""
    try:
        import procrastinate
    except ImportError:
        raise UsageError(
            "A queue needs procrastinate, which is not installed.", hint="pip install 'pg-reconciler[fleet]'"
        ) from None
    return procrastinate


def source() -> str:
    """The SQL of everything that `fleet init` makes: the results, and procrastinate's own tables beside them."""
    schema = library().schema.SchemaManager.get_schema()
    return f"{results.source()}\nSET LOCAL search_path = {results.SCHEMA};\n\n{schema}"


def create(dsn: str) -> None:
    """Make the schema, in one transaction. Raises UsageError where it is there already."""
    made = source()
    with pg.connect(dsn, "fleet init") as conn:
        if results.there(conn):
            raise UsageError(f"The database {conn.info.dbname} has the schema {results.SCHEMA} already.")
        pg.run(conn, "BEGIN")
        pg.run(conn, made.encode(), "making the schema")
        pg.run(conn, "COMMIT")


def begin(
    dsn: str, fleet: str, chosen: Sequence[tuple[str, dict[str, str]]], round_id: str, fail_on: Collection[str]
) -> bool:
    """Write a round down with a job for each target; False when it was before. Raises UsageError, ServerProblem."""
    procrastinate = library()
    # It never opens its pool: the jobs are written by our own connection, in the transaction of the round.
    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector())
    jobs = [
        app.configure_task(LOOK, queue=queue_name(fleet), lock=f"{fleet}/{name}").make_new_job(
            round_id=round_id, target=name, labels=labels, fail_on=sorted(fail_on)
        )
        for name, labels in chosen
    ]
    with pg.connect(dsn, "fleet") as conn:
        results.check(conn)
        pg.run(conn, "BEGIN")
        pg.run(conn, sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(results.SCHEMA)))
        begun = results.begin(conn, round_id, fleet, chosen)
        if begun:
            try:
                app.job_manager.batch_defer_jobs(jobs=jobs, connection=conn)
            except procrastinate.exceptions.ConnectorException as error:
                # What the driver said is in it.
                raise pg.translated(cast("psycopg.Error", error.__cause__), "writing the jobs") from None
        pg.run(conn, "COMMIT")
    return begun


def queue_name(fleet: str) -> str:
    """Of the jobs of a fleet: several may share a database."""
    return f"fleet:{fleet}"


def work(given: Work, fleet: Fleet) -> None:
    """Do jobs until SIGINT or SIGTERM; then what is under way ends. Raises InputError, UsageError, ServerProblem.

    fleet: the file as it is now, for its name and its schedule; each round reads it anew.
    """
    library()
    _check_schedule(fleet)
    with pg.connect(given.dsn, "fleet worker") as conn:
        results.check(conn)
    logger = logging.getLogger("procrastinate")
    handler = _Told(given.told)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        asyncio.run(_worker(given, fleet))
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _check_schedule(fleet: Fleet) -> None:
    croniter: Any = import_module("croniter").croniter  # it has no types; procrastinate brings it
    schedule = fleet.declared.schedule
    if schedule is not None and not croniter.is_valid(schedule):
        raise InputError([fleet.problem(("schedule",), f"{schedule!r} is no cron expression", value=True)])


class _Told(logging.Handler):
    """What procrastinate warns of, a line each and no traceback."""

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told(f"queue: {record.getMessage().splitlines()[0]}")


async def _worker(given: Work, fleet: Fleet) -> None:
    """One worker after the other, as long as nobody says stop: each ends when it loses the database."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # The looks are threads of it, and the standard one has few.
    loop.set_default_executor(ThreadPoolExecutor(given.workers + 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set():
        try:
            await _until(stop, given, fleet)
        except (library().exceptions.ConnectorException, OSError, ReconcilerError):
            given.told("The database of the queue does not answer.")
        if not stop.is_set():
            given.told(f"Looking for it again in {AGAIN:.0f} s.")
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), AGAIN)


async def _until(stop: asyncio.Event, given: Work, fleet: Fleet) -> None:
    app = _app(given, fleet)
    async with app.open_async():
        worker = asyncio.create_task(
            app.run_worker_async(
                queues=[queue_name(fleet.name)],
                concurrency=given.workers,
                install_signal_handlers=False,
                update_heartbeat_interval=given.heartbeat,
                stalled_worker_timeout=given.heartbeat * SILENT,
                delete_jobs="successful",
            )
        )
        mending = asyncio.create_task(_mend(app, given, fleet))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({worker, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (mending, stopping, worker):
            task.cancel()  # a worker that is cancelled lets its jobs come to their end
        with suppress(asyncio.CancelledError):
            await worker


def _app(given: Work, fleet: Fleet) -> procrastinate.App:
    """The tasks of a worker, and its connections to the queue."""
    procrastinate = library()
    place = f"-c search_path={results.SCHEMA}"
    app = procrastinate.App(
        connector=procrastinate.PsycopgConnector(
            conninfo=given.dsn,
            kwargs={"options": place, "application_name": "reconciler fleet worker", **pg.NETWORK},
            min_size=1,
            max_size=given.workers + 2,
            timeout=pg.CONNECTING,
        ),
        periodic_defaults={"max_delay": LATE},
    )
    queue = queue_name(fleet.name)
    current = _Current(given.file)
    worker = f"{socket.gethostname()}:{os.getpid()}"
    retry = procrastinate.RetryStrategy(max_attempts=ATTEMPTS, exponential_wait=PAUSE, retry_exceptions=RETRIED)

    @app.task(name=LOOK, queue=queue, pass_context=True, retry=retry)
    def look(context: JobContext, round_id: str, target: str, labels: dict[str, str], fail_on: list[str]) -> None:
        with pg.connect(given.dsn, "fleet worker") as conn:
            if results.known(conn, round_id, target):
                return
            final = context.job.attempts >= ATTEMPTS - 1
            seen = _seen(current, round_id, target, labels, frozenset(fail_on), untested=given.untested, final=final)
            if results.record(conn, round_id, worker, seen):
                given.told(f"{target}: {seen.outcome}")

    def round_(timestamp: int) -> None:
        when = stamp(datetime.fromtimestamp(timestamp, UTC))
        loaded = files.load(given.file)
        chosen = [(member.name, dict(member.labels)) for member in members.resolve(loaded)]
        if going := _going(given.dsn, queue):
            given.told(f"No round at {when}: of the one before it {going} targets are not done.")
            return
        if begin(given.dsn, fleet.name, chosen, f"{fleet.name}@{when}", given.fail_on):
            given.told(f"Round {fleet.name}@{when}: {len(chosen)} targets.")

    task = app.task(name=ROUND, queue=queue, queueing_lock=f"{queue}/round", retry=retry)(round_)
    if fleet.declared.schedule is not None:
        app.periodic(cron=fleet.declared.schedule, periodic_id=fleet.name)(task)
    return app


def _going(dsn: str, queue: str) -> int:
    """How many looks of this queue wait or are under way."""
    query = """
        SELECT pg_catalog.count(*) AS number FROM reconciler_fleet.procrastinate_jobs
         WHERE queue_name = %s AND task_name = %s AND status IN ('todo', 'doing')
    """
    with pg.connect(dsn, "fleet worker") as conn:
        return int(pg.rows(conn, query, (queue, LOOK), "counting jobs")[0]["number"])


class _Current:
    """The file of the fleet as it was when a round was begun here: read anew for each round, not for each target."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._of = lru_cache(maxsize=2)(self._load)

    def __call__(self, round_id: str) -> tuple[Fleet, dict[str, Member]]:
        with self._lock:
            return self._of(round_id)

    def _load(self, _round_id: str) -> tuple[Fleet, dict[str, Member]]:
        fleet = files.load(self._file)
        return fleet, {member.name: member for member in members.resolve(fleet)}


def _seen(  # noqa: PLR0913 - what a job says
    current: _Current,
    round_id: str,
    target: str,
    labels: dict[str, str],
    fail_on: frozenset[str],
    *,
    untested: bool,
    final: bool,
) -> TargetResult:
    """A look at one target, or why there was none. Raises _Again where a later one may help."""
    nobody = files.Member(target, "", labels)
    try:
        fleet, known = current(round_id)
        if target not in known:
            raise UsageError(f"The fleet has no target {target} any more.")
        return looks.drift(
            fleet,
            known[target],
            fail_on=fail_on,
            untested=untested,
            raising=() if final else (Unreachable,),
        )
    except Unreachable as error:
        if not final:
            raise _Again from error
        return looks.failed(nobody, error)
    except ReconcilerError as error:
        return looks.failed(nobody, error)


async def _mend(app: procrastinate.App, given: Work, fleet: Fleet) -> None:
    """Give back the jobs of workers whose heartbeat stopped. One worker at a time, or one was given back twice."""
    while True:
        await asyncio.sleep(given.heartbeat)
        with suppress(ReconcilerError, library().exceptions.ConnectorException):
            conn = await asyncio.to_thread(pg.connect, given.dsn, "fleet worker")
            with conn:
                if not await asyncio.to_thread(results.alone, conn, queue_name(fleet.name)):
                    continue
                stalled = await app.job_manager.get_stalled_jobs(
                    queue=queue_name(fleet.name), seconds_since_heartbeat=given.heartbeat * SILENT
                )
                for job in stalled:
                    await app.job_manager.retry_job(job)
                    given.told(f"{job.task_kwargs.get('target', job.task_name)}: its worker is gone; looked at again.")
