"""The kill matrix: an apply is stopped before and after every statement it sends, and the database is looked at.

    python -m tests.fault.kill            everything, over the Phase 2 apply of examples/dieu45 on PostgreSQL 16.13
    python -m tests.fault.kill --every 50 --modes client,crash --server 18 --workers 2

Four ways to stop it, at each moment (see `proxy`):

client   the process of the command is killed with SIGKILL, and the server sees its connection end
backend  the server process is terminated; the client goes on, and must say what is true
crash    the server is stopped at once (immediate), recovers and is there again; the client goes on
image    the server is frozen and its files copied: what a crash would leave; a second server recovers from the copy.
         One apply gives the images of many moments, so this is the crash of every moment in a bearable time

After each: the database is to the row and its version what it was before, or it is what it is after an apply that was
let alone; no advisory lock is held; the client's exit code says which of the two; and the next run works, because it is
the next round's. What is neither before nor after is counted as `between`, and there must be none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import psycopg
from psycopg import sql

from reconciler import sandbox
from reconciler.model import digest
from tests import servers
from tests.fault.proxy import Proxy
from tests.integration import governed
from tests.servers import PROJECT, Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.fault.proxy import Line, Moment

MODES = ("client", "backend", "crash", "image")
LIMIT = 300.0  # seconds that one apply may take to come to its moment, or to its end
DATABASE = "governed"
STILL = 15.0  # seconds that an apply may stand still: its proofs look at the clock
TOGETHER = 25  # images that are made of one apply
WATCH = "reconciler watch"  # asks from time to time who is in the way; it is no part of the apply

# Columns whose values tell when or in which run something was written: no two applies agree on them.
VOLATILE = [
    *("updated_at", "changed", "created_at", "last_seen_at", "metadata"),
    *("run_id", "recorded_at", "approval_ids", "body", "previous", "hash"),
]


class Round(NamedTuple):
    """One kill. `found`: before, after or between; `wrong`: what else must not be."""

    mode: str
    moment: Moment
    found: str
    code: int | None
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Arena:
    """A server of one's own with a governed database, a template of it, and a plan that was approved."""

    server: Server
    folder: Path
    plan: Path
    before: dict[str, str]
    after: str

    @property
    def db(self) -> Database:
        """New at each use: a crash ends every connection."""
        return Database(self.server, DATABASE)


# ------------------------------------------------------------------------------------------------ what is to be killed


@contextmanager
def arena(kind: str, prepare: Callable[[Database, Path], Path], folder: Path | None = None) -> Iterator[Arena]:
    """A server of this kind. prepare(db, folder) makes the governed system and returns the approved plan's file."""
    home = Path(tempfile.mkdtemp(prefix="kill-", dir=folder))
    home.chmod(0o711)
    # Commits are waited for, so that a crash takes nothing that was there before. Without TCP a port is only part of
    # the socket's name, and a server and its copy can have the same.
    server = servers.start(home / "s", kind, {"synchronous_commit": "on", "listen_addresses": ""})
    try:
        db = Database(server, DATABASE)
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        work = home / "work"
        work.mkdir()
        plan = prepare(db, work)
        db.conn.close()
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE untouched TEMPLATE {}").format(sql.Identifier(DATABASE)))
        fresh(server)
        with closing(Database(server, DATABASE)) as db:
            before = governed.image(db)
        one = Arena(server, home, plan, before, "")
        with Running(one, server.dsn(DATABASE)) as command:
            code = command.wait()
        if code:
            raise RuntimeError(command.said())
        with closing(one.db) as db:
            after = meaning(db)
        fresh(server)
        yield Arena(server, home, plan, before, after)
    finally:
        server.cluster.stop(signal.SIGQUIT)
        shutil.rmtree(home)


@contextmanager
def closing(db: Database) -> Iterator[Database]:
    try:
        yield db
    finally:
        db.conn.close()


def fresh(server: Server) -> None:
    """The database as it was, once more."""
    create = sql.SQL("CREATE DATABASE {} TEMPLATE untouched").format(sql.Identifier(DATABASE))
    if server.major >= 15:
        create += sql.SQL(" STRATEGY FILE_COPY")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE)))
        conn.execute(create)


def phase2(db: Database, folder: Path) -> Path:
    """Phase 2 on its baseline, without the magnitudes, and with more time than a long look at each statement takes."""
    baseline = folder / "baseline"
    baseline.mkdir()
    for file in sorted((PROJECT / "examples/dieu45/baseline").glob("[!89]*.sql")):
        shutil.copy(file, baseline)
    sandbox.load(baseline, db.dsn)
    state = folder / "state"
    shutil.copytree(PROJECT / "state", state)
    file = state / "governance.yaml"
    text = re.sub(r"max_duration: \w+", "max_duration: 20h", file.read_text())
    text = re.sub(r"backup: \w+", "backup: none", text)
    target = "sandbox"
    if db.execute("SELECT 1 FROM pg_extension WHERE extname = 'pgcrypto'"):
        target = "here"
        text = text.replace("  targets:\n", f"  targets:\n    here: {{database: {db.name}}}\n")
    file.write_text(text)
    plan = folder / "change.plan"
    _run("plan", "-s", state, "-t", target, "--out", plan, dsn=db.dsn)
    return _approved(plan)


def shop(db: Database, folder: Path) -> Path:
    """The small governed system of the tests."""
    system = governed.shop(db, folder, {"max_duration": "10m"})  # no look at a frozen server is part of it
    plan = system.plan()
    return system.save(plan, system.approve(plan))


def _approved(plan: Path) -> Path:
    document = json.loads(plan.read_text())
    hazards = sorted({hazard for change in (*document["setup"], *document["changes"]) for hazard in change["hazards"]})
    accepted = [word for hazard in hazards for word in ("--accept", hazard)]
    _run("approve", plan, "--as", "operator", "--reason", "a test", *accepted, *governed.attests(plan))
    return plan


def _run(*words: str | Path, dsn: str | None = None) -> None:
    done = governed.command(*words, dsn=dsn)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")


# -------------------------------------------------------------------------------------------------- how it is looked at


def meaning(db: Database) -> str:
    """A digest of everything that an apply can change, without what no two applies agree on: times, ids, versions."""
    tables = [name for name in db.execute(governed.CATALOGS) if name[0] not in {"pg_catalog", "information_schema"}]
    rows = {
        f"{schema}.{name}": db.conn.execute(
            sql.SQL(
                "SELECT md5(coalesce(string_agg(r, '|' ORDER BY r), ''))"
                " FROM (SELECT (to_jsonb(t) - %s::text[])::text AS r FROM {} t) q"
            ).format(sql.Identifier(schema, name)),
            (VOLATILE,),
        ).fetchone()
        for schema, name in tables
    }
    return digest({"rows": {name: row[0] for name, row in rows.items() if row}, "catalog": db.execute(_CATALOG)[0][0]})


_CATALOG = """
SELECT md5(string_agg(line, E'\\n' ORDER BY line)) FROM (
    SELECT concat_ws(' ', pg_get_functiondef(p.oid), p.proowner::regrole, p.proacl, obj_description(p.oid, 'pg_proc'))
      FROM pg_proc p WHERE p.oid >= 16384 AND p.prokind IN ('f', 'p')
    UNION ALL
    SELECT concat_ws(' ', n.nspname, n.nspacl, n.nspowner::regrole) FROM pg_namespace n
     WHERE n.nspname NOT LIKE 'pg\\_t%'
    UNION ALL
    SELECT concat_ws(' ', c.oid::regclass, c.relkind, c.relowner::regrole, c.relacl) FROM pg_class c
     WHERE c.oid >= 16384 AND c.relnamespace <> 'pg_toast'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', t.tgrelid::regclass, pg_get_triggerdef(t.oid), t.tgenabled) FROM pg_trigger t
     WHERE NOT t.tgisinternal
    UNION ALL
    SELECT concat_ws(' ', k.conname, k.conrelid::regclass, pg_get_constraintdef(k.oid)) FROM pg_constraint k
     WHERE k.oid >= 16384
) AS q (line)
"""


def look(server: Server, one: Arena) -> tuple[str, list[str]]:
    """Before, after or between; and what else must not be."""
    with closing(Database(server, DATABASE)) as db:
        found = "before" if governed.image(db) == one.before else "after" if meaning(db) == one.after else "between"
        held = db.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")[0][0]
        return found, [f"{held} advisory locks are held"] * bool(held)


def gone(server: Server) -> None:
    """Wait until the server has noticed that its client is gone."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'reconciler%'"
    deadline = time.monotonic() + LIMIT
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        while conn.execute(query).fetchone() != (0,):
            if time.monotonic() > deadline:
                raise RuntimeError("a backend of the apply is still there")
            time.sleep(0.002)


# ----------------------------------------------------------------------------------------------------------- the victim


class Victim(Protocol):
    """A process that runs the command."""

    def kill(self) -> None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


class Forked:
    """The command in a process forked from the nursery: everything is imported already, the rest is the same."""

    def __init__(self, nursery: subprocess.Popen[str], words: Sequence[str], out: Path) -> None:
        self._nursery = nursery
        self._code: int | None = None
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        nursery.stdin.write(json.dumps([list(words), str(out)]) + "\n")
        nursery.stdin.flush()
        self._pid = int(nursery.stdout.readline())
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._nursery.stdout is not None
        self._code = int(self._nursery.stdout.readline() or "-1")
        self._ended.set()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def poll(self) -> int | None:
        return self._code if self._ended.is_set() else None

    def wait(self) -> int:
        self._reader.join(LIMIT)
        if self._code is None:
            raise TimeoutError
        return self._code


def nursery(plan: Path) -> subprocess.Popen[str]:
    """A process that has imported all that an apply imports, and parsed what the plan says."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fault.kill", "nursery", str(plan)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def bring_up(plan: Path) -> None:
    """Fork a process for each line of standard input, tell its id, and then how it ended."""
    from reconciler import apply, approve, checks, evidence, kinds, settle  # noqa: F401 - so that no child needs to
    from reconciler import plan as plans
    from reconciler.cli import main as command
    from reconciler.render import html, markdown, text  # noqa: F401
    from reconciler.trust import check_plan

    checks.checks()
    kinds.kinds()
    made, _ = plans.load(plan)
    check_plan(made)
    for line in sys.stdin:
        words, out = json.loads(line)
        pid = os.fork()
        if pid == 0:
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.close(0)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = words
            try:
                command()
            except SystemExit as ended:
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()
                os._exit(ended.code if isinstance(ended.code, int) else 1)
            finally:
                os._exit(70)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


class Running:
    """One apply under way. Without a nursery it is the installed command, as a user starts it."""

    def __init__(self, one: Arena, dsn: str, started_by: subprocess.Popen[str] | None = None) -> None:
        self._evidence = Path(tempfile.mkdtemp(dir=one.folder))
        self._out = self._evidence / "said"
        program = Path(sysconfig.get_path("scripts")) / "reconciler"
        words = [str(program), "apply", str(one.plan), "--initialize", "--dsn", dsn]
        words += ["--evidence", str(self._evidence / "run")]
        self.victim: Victim
        if started_by is not None:
            self.victim = Forked(started_by, words, self._out)
        else:
            with self._out.open("w") as out:
                self.victim = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.victim.kill()
        self.victim.wait()
        shutil.rmtree(self._evidence)

    def said(self) -> str:
        return self._out.read_text()

    def wait(self) -> int:
        return self.victim.wait()


# ------------------------------------------------------------------------------------------------------------ the kills


@dataclass
class Trap:
    """Holds the apply at one moment until it is told to let go, and then may have cut the line."""

    number: int
    cutting: bool
    """The client is dead, or the server's answer is lost."""
    moment: Moment | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, moment: Moment, line: Line) -> None:
        if moment.number != self.number:
            return
        self.moment = moment
        self.reached.set()
        self.go.wait(LIMIT)
        if self.cutting:
            line.cut()


def count(one: Arena) -> list[Moment]:
    """Every moment of an apply that is let alone."""
    moments: list[Moment] = []
    watch = Proxy(one.server, lambda moment, _: moments.append(moment), aside=WATCH)
    with watch as proxy, Running(one, proxy.dsn(DATABASE)) as run:
        code = run.wait()
        said = run.said()
    fresh(one.server)
    if code:
        raise RuntimeError(said)
    return moments


def kill(one: Arena, mode: str, number: int, started_by: subprocess.Popen[str] | None = None) -> Round | None:
    """One round: an apply that is killed at this moment. None when it ended before it came to it."""
    trap = Trap(number, cutting=False)
    code: int | None = None
    with Proxy(one.server, trap, aside=WATCH) as proxy, Running(one, proxy.dsn(DATABASE), started_by) as run:
        deadline = time.monotonic() + LIMIT
        while not trap.reached.wait(0.01):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not at moment {number} in {LIMIT} s: {run.said()}")
            if run.victim.poll() is not None:
                fresh(one.server)
                return None
        moment = trap.moment
        assert moment is not None
        # The answer of what was done is lost; what was not done is sent into the void.
        trap.cutting = mode == "client" or moment.when == "after" or not moment.pid
        if mode == "client":
            run.victim.kill()
            run.victim.wait()
        elif mode == "backend" and moment.pid:
            with psycopg.connect(one.server.dsn(), autocommit=True) as conn:
                conn.execute("SELECT pg_terminate_backend(%s, 60000)", (moment.pid,))
        elif mode == "crash":
            one.server.cluster.stop(signal.SIGQUIT)
            one.server.cluster.start(one.server.port)
        trap.go.set()
        if mode != "client":
            code = run.victim.wait()
        said = run.said()
    gone(one.server)
    found, wrong = look(one.server, one)
    if code is not None:
        wrong += _told(found, code, said)
    if found != "before":
        fresh(one.server)
    return Round(mode, moment, found, code, tuple(wrong))


def _told(found: str, code: int, said: str) -> list[str]:
    """Does the client say what is true? The server was there to be asked, so it knows."""
    wrong: list[str] = []
    if "Traceback" in said:
        wrong.append("a traceback")
    if code != {"before": 1, "after": 0}.get(found):
        wrong.append(f"exit code {code}")
    if found == "before" and "Nothing was changed" not in said and "Cannot connect" not in said:
        wrong.append("does not say that nothing was changed")
    if found == "after" and "Apply complete!" not in said:
        wrong.append("does not say that it was applied")
    return wrong + [said] * bool(wrong)


def images(
    one: Arena, wanted: Callable[[Moment], bool], tell: Callable[[Round], None], still: float = STILL
) -> list[Round]:
    """One apply, and at each wanted moment what a crash would leave; for as many seconds as it may stand still."""
    made: list[Round] = []
    stood = 0.0

    def watch(moment: Moment, line: Line) -> None:
        nonlocal stood
        del line
        if stood < still and wanted(moment):
            begun = time.monotonic()
            made.append(_image(one, moment))
            stood += time.monotonic() - begun
            tell(made[-1])

    with Proxy(one.server, watch, aside=WATCH) as proxy, Running(one, proxy.dsn(DATABASE)) as run:
        while run.victim.poll() is None:
            time.sleep(0.2)
        code, said = run.victim.wait(), run.said()
    fresh(one.server)
    if code:
        raise RuntimeError(said)
    return made


def all_images(one: Arena, numbers: Sequence[int], tell: Callable[[Round], None]) -> list[Round]:
    """An image of each of these moments, by as many applies as it takes."""
    found: list[Round] = []
    left = list(numbers)
    while left:
        # Spread over all of the apply: proofs that follow each other look at the clock, each from its own beginning.
        wanted = set(left[:: -(-len(left) // TOGETHER)])
        made = images(one, lambda moment, wanted=wanted: moment.number in wanted, tell)
        found += made
        seen = {done.moment.number for done in made}
        left = [number for number in left if number not in seen]
        if not made:
            break  # not every apply needs as many statements as the one that was counted
    return found


def _image(one: Arena, moment: Moment) -> Round:
    copy = one.folder / "copy"
    copy.mkdir()
    copy.chmod(0o711)
    cluster = sandbox.Cluster(copy, one.server.cluster._installed)
    with _frozen(one.server):
        subprocess.run(["cp", "-a", one.server.cluster.data, copy / "data"], check=True)
    for file in (copy / "data").glob(".s.PGSQL.*"):
        file.unlink()  # the socket of the other
    try:
        cluster.start(one.server.port)
        server = Server(cluster, str(cluster.socket_directory), one.server.port, one.server.version, "")
        found, wrong = look(server, one)
        return Round("image", moment, found, None, tuple(wrong))
    finally:
        cluster.stop(signal.SIGQUIT)
        shutil.rmtree(copy)


@contextmanager
def _frozen(server: Server) -> Iterator[None]:
    """No process of the server runs: nothing of its files changes."""
    parent = int((server.cluster.data / "postmaster.pid").read_text().split()[0])
    pids = [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True)
class Choice:
    """Before each so many-th statement: after one is before the next. COMMIT always, on both sides; and after the last.

    part: only the k-th of n parts.
    """

    every: int = 1
    part: tuple[int, int] = (1, 1)

    def __call__(self, moment: Moment) -> bool:
        if moment.text == "COMMIT":
            return True
        index, left = divmod((moment.number - 1) // 2, self.every)
        return moment.when == "before" and left == 0 and index % self.part[1] == self.part[0] - 1

    def of(self, moments: Sequence[Moment]) -> list[int]:
        """Their numbers, in an order that covers all of the apply early, so that half a run says something."""
        chosen = [moment.number for moment in moments if self(moment)] + [moments[-1].number]
        return [number for start in range(16) for number in chosen[start::16]]


def matrix(one: Arena, modes: Sequence[str], choice: Choice, tell: Callable[[Round], None]) -> list[Round]:
    """Kill at every chosen moment, in every one of the ways."""
    found: list[Round] = []
    numbers = choice.of(count(one))
    with nursery(one.plan) as started_by:
        try:
            for mode in modes:
                if mode == "image":
                    found += all_images(one, sorted(numbers), tell)
                    continue
                for number in numbers:
                    done = kill(one, mode, number, started_by)
                    # Not every apply needs as many statements as the one that was counted.
                    if done is not None:
                        found.append(done)
                        tell(done)
        finally:
            assert started_by.stdin is not None
            started_by.stdin.close()
    return found


def run(given: argparse.Namespace, part: tuple[int, int]) -> Counter[tuple[str, str]]:
    """One part of the matrix; each thing that is wrong is printed as it comes. The number of rounds by mode and end."""
    begun, rounds = time.monotonic(), Counter[tuple[str, str]]()

    def tell(done: Round) -> None:
        rounds[done.mode, done.found] += 1
        if done.found == "between" or done.wrong:
            rounds[done.mode, "wrong"] += 1
            print(f"{done.mode} {done.moment}: {done.found}", *done.wrong, sep="\n  ", flush=True)  # noqa: T201
        if rounds.total() % 100 == 0:
            print(f"{part[0]}/{part[1]}: {time.monotonic() - begun:.0f} s, {_line(rounds)}", flush=True)  # noqa: T201

    # In memory where that is: the images of a server are many files, written and thrown away.
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else None
    with arena(given.server, {"phase2": phase2, "shop": shop}[given.system], folder) as one:
        choice, moments = Choice(given.every, part), count(one)
        statements = sum(moment.when == "before" for moment in moments)
        chosen = len(choice.of(moments))
        print(f"{part[0]}/{part[1]}: {statements} statements, {chosen} boundaries", flush=True)  # noqa: T201
        matrix(one, given.modes.split(","), choice, tell)
    return rounds


def _line(rounds: Counter[tuple[str, str]]) -> str:
    ends = Counter[str]()
    for (_, found), number in rounds.items():
        ends[found] += number
    whole = ends["before"] + ends["after"] + ends["between"]
    return f"{whole} rounds, {ends['between']} in-between states, {ends['wrong']} wrong"


def main(arguments: Sequence[str]) -> int:
    """Print the numbers at the end; 1 when there was anything wrong."""
    if arguments[:1] == ["nursery"]:
        bring_up(Path(arguments[1]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fault.kill")
    parser.add_argument("--every", type=int, default=1, help="kill at every so many-th statement only")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a server and a part of the matrix")
    parser.add_argument("--modes", default="image,client,backend", help=f"of {', '.join(MODES)}")
    parser.add_argument("--server", default="16", help="embedded, or a major of the matrix")
    parser.add_argument("--system", default="phase2", choices=["phase2", "shop"])
    given = parser.parse_args(arguments)
    begun, rounds = time.monotonic(), Counter[tuple[str, str]]()
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        parts = [(number, given.workers) for number in range(1, given.workers + 1)]
        for found in pool.map(partial(run, given), parts):
            rounds.update(found)
    for (mode, found), number in sorted(rounds.items()):
        print(f"{mode:8} {found:8} {number}")  # noqa: T201
    print(f"{_line(rounds)}; {time.monotonic() - begun:.0f} s")  # noqa: T201
    return 1 if any(found in {"between", "wrong"} for _, found in rounds) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
