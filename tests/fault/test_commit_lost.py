"""The answer to COMMIT is lost, wherever the line can break: the run finds out by itself, or says how to, later.

What must never happen: that it says one thing and the database another.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler import evidence as evidences
from reconciler import settle as settling
from reconciler.errors import MissingPrivilege, OutcomeUnknown, Refused, Stale
from reconciler.trust import check_plan
from tests.fault.proxy import Proxy
from tests.integration import governed
from tests.integration.governed import command, image
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reconciler.model import Plan
    from tests.fault.proxy import Line, Moment
    from tests.integration.governed import Governed
    from tests.servers import Server

LIMIT = 60.0  # seconds within which whatever a test waits for must have happened
LENGTH = len(b"Q....COMMIT\0")
ROLLED_BACK = "The connection was lost before COMMIT; the server rolled back."
REMARK = "Applied, but: the answer to COMMIT was lost; the ledger says that it was committed"


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


@pytest.fixture
def crashing(own_server: Callable[..., Server], tmp_path: Path) -> Iterator[Governed]:
    """The same on a server of its own, which may be broken."""
    server = own_server(wal_level="replica", max_wal_senders="2", synchronous_commit="on")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE shop")
    db = Database(server, "shop")
    yield governed.shop(db, tmp_path)
    db.conn.close()


@dataclass
class Where:
    """Breaks the line once, at COMMIT: before or after it, with the first bytes of what is pending still passed on."""

    when: str
    passing: int = 0
    away: bool = False
    """And from then on nobody can connect."""
    proxy: Proxy | None = None
    text: str = "COMMIT"
    done: bool = False

    def __call__(self, moment: Moment, line: Line) -> None:
        if self.done or (moment.when, moment.text) != (self.when, self.text):
            return
        self.done = True
        if self.proxy is not None and self.away:
            self.proxy.refusing = True
        line.cut(self.passing)


@contextmanager
def broken(system: Governed, where: Where) -> Iterator[Proxy]:
    with Proxy(system.db.server, where) as proxy:
        where.proxy = proxy
        yield proxy


def saved(system: Governed) -> tuple[Plan, Path]:
    plan = system.plan()
    return plan, system.save(plan, system.approve(plan))


def apply_by(proxy: Proxy, system: Governed, *more: str | Path) -> subprocess.CompletedProcess[str]:
    where = ("--dsn", proxy.dsn(system.db.name))
    return command("apply", system.plan_file, "--initialize", "--evidence", system.root / "run", *where, *more)


def sums_hold(folder: Path) -> bool:
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return done.returncode == 0 and listed == there - {"SHA256SUMS"}


# ------------------------------------------------------------------------------------------------ it settles by itself


def test_a_commit_that_did_not_arrive_whole_is_rolled_back(system: Governed) -> None:
    """Cut before it, and in it after each byte."""
    plan, _ = saved(system)
    before = image(system.db)
    for count in range(LENGTH):
        with broken(system, Where("before", count)) as proxy:
            done = apply_by(proxy, system, "--evidence", system.root / f"run-{count}")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"Error: {ROLLED_BACK}" in done.stderr.splitlines()
        assert done.stderr.splitlines()[-1] == "Nothing was changed. Apply again."
        assert image(system.db) == before
        assert evidences.load(system.root / f"run-{count}").outcome == "error"
    system.apply(plan)
    system.in_sync()


ARRIVED = {
    "sent, and the line breaks": Where("before", LENGTH),
    "answered, and the answer is lost": Where("after"),
    "half of the answer": Where("after", 7),
    "COMMIT, but not that the server is ready": Where("after", 12),
    "all but one byte of the answer": Where("after", 17),
}


@pytest.mark.smoke
@pytest.mark.parametrize("where", ARRIVED.values(), ids=ARRIVED.keys())
def test_a_commit_that_arrived_is_success(system: Governed, where: Where) -> None:
    saved(system)
    with broken(system, replace(where)) as proxy:
        done = apply_by(proxy, system)
    assert done.returncode == 0, done.stderr
    assert "Apply complete! 4 added, 2 changed, 0 removed." in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == REMARK
    found = evidences.load(system.root / "run")
    assert (found.outcome, found.entry, found.failure) == ("applied", 1, None)
    assert sums_hold(system.root / "run")
    system.in_sync()


def test_a_server_that_comes_back_in_time_is_waited_for(crashing: Governed) -> None:
    """It crashes with the COMMIT in its hand, and is there again before the apply gives up."""
    plan, _ = saved(crashing)

    def watch(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("before", "COMMIT"):
            restart(crashing.db)
            line.cut()

    with Proxy(crashing.db.server, watch) as proxy:
        done = apply_by(proxy, crashing)
    assert done.returncode == 1
    assert f"Error: {ROLLED_BACK}" in done.stderr.splitlines()
    assert crashing.entries() == 0
    crashing.apply(plan)
    crashing.in_sync()


def test_a_transaction_that_is_still_open_is_not_called_rolled_back(
    system: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is cut off and the server does not know: whether COMMIT is under way to it nobody can say."""
    monkeypatch.setattr(settling, "PATIENCE", 0.3)
    saved(system)
    noticed = threading.Event()

    def watch(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("before", "COMMIT"):
            line.client.socket.shutdown(socket.SHUT_RDWR)
            noticed.wait(LIMIT)
            line.cut(LENGTH)

    with Proxy(system.db.server, watch) as proxy:
        done = apply_by(proxy, system)
        assert done.returncode == 5
        assert re.search(r"Transaction \d+ is still open in process \d+", done.stderr)
        early = command("settle", system.root / "run", dsn=system.db.dsn)
        assert (early.returncode, early.stdout) == (5, "")
        assert "still open" in early.stderr
        noticed.set()
        until_gone(system)  # before the proxy closes, which hangs up on whoever is still passing something on
    done = command("settle", system.root / "run", dsn=system.db.dsn)
    assert done.returncode == 0, done.stderr
    system.in_sync()


def until_gone(system: Governed) -> None:
    """Wait until no apply is connected."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'reco%'"
    deadline = time.monotonic() + LIMIT
    while system.db.execute(query) != [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- nobody can be asked


def lost(
    system: Governed, where: Where, monkeypatch: pytest.MonkeyPatch, *more: str
) -> subprocess.CompletedProcess[str]:
    """An apply that ends in doubt: COMMIT was cut as told, and from then on nobody can connect."""
    monkeypatch.setattr(settling, "PATIENCE", 0.3)
    with broken(system, replace(where, away=True)) as proxy:
        return apply_by(proxy, system, *more)


def restart(db: Database) -> None:
    """As after a crash."""
    db.conn.close()  # opened again at its next use
    db.server.cluster.stop(signal.SIGQUIT)
    db.server.cluster.start(db.server.port)


IN_DOUBT = {"committed": Where("before", LENGTH), "rolled back": Where("before", LENGTH - 1)}


@pytest.mark.parametrize("fate", IN_DOUBT)
def test_what_an_apply_in_doubt_says(system: Governed, fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(system)
    done = lost(system, IN_DOUBT[fate], monkeypatch)
    place = system.root / "run"
    assert (done.returncode, done.stdout) == (5, "")
    lines = done.stderr.splitlines()
    (said,) = [line for line in lines if line.startswith("Error: ")]
    found = evidences.load(place)
    assert said == (
        "Error: The connection was lost while COMMIT was under way, and nobody can say yet what became of run"
        f" {found.run_id}."
    )
    assert "Traceback" not in done.stderr
    assert "othing was changed" not in done.stderr
    assert lines[-1].startswith(f"Ask again when the server is back: reconciler settle {place} --dsn ")
    assert (found.outcome, found.entry) == ("unknown", None)
    assert found.transaction_id is not None
    assert "nobody can say" in (place / "report.md").read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("crashed", [False, True], ids=["", "after a crash"])
@pytest.mark.parametrize("fate", IN_DOUBT)
def test_settle_finds_out(crashing: Governed, fate: str, monkeypatch: pytest.MonkeyPatch, *, crashed: bool) -> None:
    system, place = crashing, crashing.root / "run"
    plan, _ = saved(system)
    before = image(system.db)
    with broken(system, replace(IN_DOUBT[fate], away=True)) as proxy:
        monkeypatch.setattr(settling, "PATIENCE", 0.3)
        doubtful = apply_by(proxy, system)
        assert doubtful.returncode == 5
        words = shlex.split(doubtful.stderr.splitlines()[-1].partition("back: ")[2])
        kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        still = command(*words[1:])
        assert (still.returncode, still.stdout) == (5, "")
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == kept
        until_gone(system)  # the server has read what came of COMMIT, and ended
        if crashed:
            restart(system.db)
        proxy.refusing = False
        # Word for word as the apply printed it.
        done = command(*words[1:])
    again = command("settle", place, "--format", "json", dsn=system.db.dsn)
    assert "Nothing to settle" in again.stderr
    found = evidences.load(place)
    assert json.loads(again.stdout)["outcome"] == found.outcome
    assert sums_hold(place)
    assert json.loads((place / "evidence-unknown.json").read_text())["outcome"] == "unknown"
    judged = command("verify", place)
    assert (judged.returncode, judged.stderr) == (0, "")
    assert (place / "evidence.json").stat().st_mode & 0o777 == 0o600
    report = (place / "report.md").read_text()
    if fate == "committed":
        assert (done.returncode, again.returncode) == (0, 0), done.stderr
        assert "Apply complete! 4 added, 2 changed, 0 removed." in done.stdout.splitlines()
        assert done.stdout.splitlines()[-1] == (
            "Applied, but: the answer to COMMIT was lost; entry 1 of the ledger says that it was committed"
        )
        assert (found.outcome, found.entry, found.failure) == ("applied", 1, None)
        entry = json.loads((place / "ledger-entry.json").read_text())
        assert entry["hash"] == found.hash == system.db.execute("SELECT hash FROM reconciler.entry")[0][0]
        assert "applied" in report.splitlines()[0]
        system.in_sync()
        return
    assert (done.returncode, again.returncode) == (1, 1)
    assert "Not applied: nothing was changed." in done.stdout
    assert (found.outcome, found.entry) == ("error", None)
    assert not (place / "ledger-entry.json").exists()
    assert "**Nothing was changed: the server rolled the transaction back.**" in report
    if not crashed:
        assert image(system.db) == before
    system.apply(plan)
    system.in_sync()


def test_settle_by_the_id_of_the_run(system: Governed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    monkeypatch.setenv("RECONCILER_EVIDENCE", str(parent))
    monkeypatch.setattr(settling, "PATIENCE", 0.3)
    saved(system)
    with broken(system, Where("after", away=True)) as proxy:
        command("apply", system.plan_file, "--initialize", dsn=proxy.dsn(system.db.name))
    (place,) = parent.iterdir()
    run = evidences.load(place).run_id
    assert command("settle", run, dsn=system.db.dsn).returncode == 0
    (parent / "empty").mkdir()
    empty = command("settle", parent / "empty", dsn=system.db.dsn)
    assert (empty.returncode, empty.stdout) == (1, "")
    assert "`reconciler plan` shows no changes" in empty.stderr
    missing = command("settle", run.replace(run[0], "0" if run[0] != "0" else "1"), dsn=system.db.dsn)
    assert missing.returncode == 1
    assert "`reconciler plan` shows no changes" in missing.stderr


def test_the_printed_command_holds_no_password(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "PATIENCE", 0.3)
    saved(system)
    with broken(system, Where("after", away=True)) as proxy:
        dsn = f"{proxy.dsn(system.db.name)} password=hunter2"
        done = command("apply", system.plan_file, "--initialize", "--evidence", system.root / "run", "--dsn", dsn)
    assert done.returncode == 5
    assert "hunter2" not in done.stderr + (system.root / "run/evidence.json").read_text()
    words = shlex.split(done.stderr.splitlines()[-1].partition("back: ")[2])
    assert words[:3] == ["reconciler", "settle", str(system.root / "run")]
    assert f"dbname={system.db.name}" in words[4]


def test_settle_asks_the_database_of_the_run_and_no_other(
    system: Governed, monkeypatch: pytest.MonkeyPatch, new_name: Callable[[], str]
) -> None:
    saved(system)
    lost(system, IN_DOUBT["committed"], monkeypatch)
    other = new_name()
    system.db.execute(f"CREATE DATABASE {other}")
    try:
        done = command("settle", system.root / "run", dsn=system.db.server.dsn(other))
    finally:
        system.db.execute(f"DROP DATABASE {other}")
    assert (done.returncode, done.stdout) == (4, "")
    assert f"The plan is for database {system.db.name}, this is {other}." in done.stderr
    assert command("settle", system.root / "run", dsn=system.db.dsn).returncode == 0


def test_settle_of_a_run_that_is_not_the_last(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(system)
    lost(system, IN_DOUBT["committed"], monkeypatch)
    system.sql("ALTER FUNCTION app.fn_total() COST 7")
    system.apply(system.plan())
    assert system.entries() == 2
    assert command("settle", system.root / "run", dsn=system.db.dsn).returncode == 0
    assert evidences.load(system.root / "run").entry == 1


def test_settle_that_was_interrupted_can_be_repeated(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of which only a part was replaced is still one that can be settled."""
    saved(system)
    lost(system, IN_DOUBT["committed"], monkeypatch)
    place, written = system.root / "run", evidences.replace_file

    def full(path: Path, data: bytes, *, private: bool) -> None:
        if path.name == "evidence.json":
            raise OSError(28, "No space left on device")
        written(path, data, private=private)

    with monkeypatch.context() as patch:
        patch.setattr(evidences, "replace_file", full)
        done = command("settle", place, dsn=system.db.dsn)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert command("settle", place, dsn=system.db.dsn).returncode == 0
    assert sums_hold(place)


def test_settle_of_somebody_elses_plan(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(system)
    lost(system, IN_DOUBT["rolled back"], monkeypatch)
    system.state["gates"]["shop.limit"]["value"] = "99"
    (system.root / "run/plan.json").write_bytes(system.write().save(system.plan()).read_bytes())
    done = command("settle", system.root / "run", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not the one that the run applied" in done.stderr


# ---------------------------------------------------------------------------------------- whom to believe, and whom not


NO_RUN = "00000000-0000-4000-8000-000000000000"


def case(system: Governed, plan: Plan, transaction_id: str, run_id: str = NO_RUN) -> settling.Case:
    return settling.Case(system.db.dsn, plan, check_plan(plan), run_id, transaction_id, "reconciler settle X", False)


def test_a_transaction_id_that_was_handed_out_again_proves_nothing(crashing: Governed) -> None:
    """A crash loses what was not yet on disk, the use of a transaction id too, and then somebody else gets it."""
    plan, _ = saved(crashing)
    ((writer,),) = crashing.db.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
    os.kill(writer, signal.SIGSTOP)
    ids: list[str] = []

    def watch(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("before", "COMMIT"):
            query = "SELECT max(backend_xid::text) FROM pg_stat_activity WHERE application_name = 'reconciler apply'"
            ids.append(crashing.db.execute(query)[0][0])
            # The postmaster tells all to quit; the stopped one hears of it when it goes on.
            threading.Timer(0.3, os.kill, (writer, signal.SIGCONT)).start()
            restart(crashing.db)
            while crashing.db.execute("SELECT pg_current_xact_id()::text")[0][0] != ids[0]:
                pass
            line.cut()

    with Proxy(crashing.db.server, watch) as proxy:
        done = apply_by(proxy, crashing)
    assert crashing.db.execute("SELECT pg_xact_status(%s::text::xid8)", ids) == [("committed",)]
    assert done.returncode == 1
    assert f"Error: {ROLLED_BACK}" in done.stderr.splitlines()
    assert crashing.entries() == 0
    crashing.apply(plan)
    crashing.in_sync()


def test_a_committed_transaction_without_an_entry(system: Governed) -> None:
    """The same work still to be done: it was another transaction. Something else there: nobody can say."""
    plan, _ = saved(system)
    ((other,),) = system.db.execute("SELECT pg_current_xact_id()::text")
    assert settling.settled(case(system, plan, other), 0) is None
    system.sql("UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    with pytest.raises(OutcomeUnknown) as raised:
        settling.settled(case(system, plan, other), 0)
    assert "no entry of the run" in raised.value.details[0]


@pytest.mark.parametrize("number", ["3", "4000000000"], ids=["forgotten", "never given out"])
def test_a_transaction_id_that_nobody_knows(system: Governed, number: str) -> None:
    """Then the ledger alone decides: what is not in it and not open was rolled back."""
    plan, _ = saved(system)
    assert settling.settled(case(system, plan, number), 0) is None
    system.apply(plan)
    ((run,),) = system.db.execute("SELECT run_id::text FROM reconciler.entry")
    entry = settling.settled(case(system, plan, number, run), 0)
    assert entry is not None
    assert entry.number == 1


def test_a_standby_cannot_say_that_it_never_happened(crashing: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    system, place = crashing, crashing.root / "run"
    plan, _ = saved(system)
    lost(system, IN_DOUBT["rolled back"], monkeypatch)
    server = system.db.server
    system.db.conn.close()
    mark = server.cluster.data / "standby.signal"
    server.cluster.stop()
    mark.touch()
    server.cluster.start(server.port)
    done = command("settle", place, dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (5, "")
    assert "standby" in done.stderr
    mark.unlink()
    system.db.conn.close()
    server.cluster.stop()
    server.cluster.start(server.port)
    assert command("settle", place, dsn=system.db.dsn).returncode == 1
    system.apply(plan)
    system.in_sync()


def test_a_ledger_that_cannot_be_read_or_believed(system: Governed) -> None:
    plan, _ = saved(system)
    system.settle()
    one = case(system, plan, "3")
    with pytest.raises(MissingPrivilege):
        settling.settled(replace(one, dsn=system.db.dsn_as(system.stranger)), 0)
    system.sql("ALTER TABLE reconciler.entry DISABLE TRIGGER ALL")
    with pytest.raises(Refused):
        settling.settled(one, 0)
    elsewhere = plan.model_copy(update={"target": plan.target.model_copy(update={"system_identifier": "1"})})
    with pytest.raises(Stale):
        settling.settled(replace(one, plan=elsewhere), 0)


@pytest.mark.parametrize("default", ["off", "local"])
def test_what_commit_answered_survives_a_crash(own_server: Callable[..., Server], tmp_path: Path, default: str) -> None:
    """Where commits are not waited for by default, an apply's is."""
    server = own_server(synchronous_commit=default)
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE shop")
        ((writer,),) = conn.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").fetchall()
    system = governed.shop(Database(server, "shop"), tmp_path)
    saved(system)
    os.kill(writer, signal.SIGSTOP)

    def watch(moment: Moment, line: Line) -> None:
        if (moment.when, moment.text) == ("after", "COMMIT"):
            threading.Timer(0.3, os.kill, (writer, signal.SIGCONT)).start()
            restart(system.db)
            line.cut(len(line.pending))

    with Proxy(server, watch) as proxy:
        done = apply_by(proxy, system)
    assert done.returncode == 0, done.stderr
    system.in_sync()
    system.db.conn.close()


# ------------------------------------------------------------------------------------------------------- interruptions


class Running:
    """The command as a process of its own, whose line the test holds at a statement."""

    def __init__(self, system: Governed, when: str, text: str = "COMMIT") -> None:
        self.system, self.when, self.text = system, when, text
        self.held, self.go = threading.Event(), threading.Event()
        self.passing = True

    def __call__(self, moment: Moment, line: Line) -> None:
        if moment.when == self.when and moment.text.lstrip().startswith(self.text):
            self.held.set()
            self.go.wait(LIMIT)
            if not self.passing:
                line.cut()

    @contextmanager
    def process(self) -> Iterator[tuple[subprocess.Popen[str], Proxy]]:
        program = Path(sysconfig.get_path("scripts")) / "reconciler"
        with Proxy(self.system.db.server, self) as proxy:
            words = [program, "apply", self.system.plan_file, "--initialize", "--evidence", self.system.root / "run"]
            with subprocess.Popen(
                [*words, "--dsn", proxy.dsn(self.system.db.name)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                try:
                    assert self.held.wait(LIMIT)
                    yield process, proxy
                finally:
                    self.go.set()
                    process.kill()


@pytest.mark.parametrize("at", ["BEGIN ISOLATION LEVEL READ COMMITTED", 'UPDATE "app"', "INSERT INTO reconciler.entry"])
def test_interrupted_again_and_again_before_commit(system: Governed, at: str) -> None:
    """The server does not answer, and somebody loses patience: it ends at once, and says what is true."""
    plan, _ = saved(system)
    before = image(system.db)
    run = Running(system, "before", at)
    run.passing = False
    with run.process() as (process, _):
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)  # psycopg looks for signals ten times a second
        out, err = process.communicate()
        run.go.set()
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "Interrupted: nothing was changed."
    assert "Traceback" not in err
    until_gone(system)
    assert image(system.db) == before
    assert evidences.load(system.root / "run").outcome == "error"
    system.apply(plan)
    system.in_sync()


def test_interrupted_right_after_the_commit(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is done: it was committed, and that is what it says."""
    saved(system)
    commit = settling.commit

    def interrupted(*given: Any) -> None:
        commit(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(settling, "commit", interrupted)
    done = command("apply", system.plan_file, "--initialize", "--evidence", system.root / "run", dsn=system.db.dsn)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "Applied, but: not planned again: interrupted"
    assert evidences.load(system.root / "run").entry == 1
    assert sums_hold(system.root / "run")
    system.in_sync()


def test_interrupted_when_nobody_knows(system: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between COMMIT and its answer, in our own code: neither applied nor unchanged may be said."""
    saved(system)

    def interrupted(conn: Any, case: Any, record: Any) -> None:  # noqa: ARG001 - as called
        record.committing = True
        raise KeyboardInterrupt

    monkeypatch.setattr(settling, "commit", interrupted)
    done = command("apply", system.plan_file, "--initialize", "--evidence", system.root / "run", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (5, "")
    assert "othing was changed" not in done.stderr
    assert f"reconciler settle {system.root / 'run'}" in done.stderr.splitlines()[-1]
    monkeypatch.undo()
    assert command("settle", system.root / "run", dsn=system.db.dsn).returncode == 1


def test_that_nobody_reads_along_stops_nothing(system: Governed) -> None:
    saved(system)
    reading, writing = os.pipe()
    os.close(reading)
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    words = [program, "apply", system.plan_file, "--initialize", "--evidence", system.root / "run"]
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(
            [*words, "--dsn", system.db.dsn], check=False, stdout=subprocess.PIPE, stderr=nobody, text=True
        )
    assert done.returncode == 0
    assert "Apply complete! 4 added, 2 changed, 0 removed." in done.stdout.splitlines()
    assert "Applied, but" not in done.stdout
    assert sums_hold(system.root / "run")
    system.in_sync()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_in_a_commit_that_goes_through(system: Governed, when: str, number: signal.Signals) -> None:
    saved(system)
    run = Running(system, when)
    with run.process() as (process, _):
        process.send_signal(number)
        time.sleep(0.2)  # long enough that the signal comes first; the outcome is the same otherwise
        run.go.set()
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert "Apply complete! 4 added, 2 changed, 0 removed." in out.splitlines()
    assert out.splitlines()[-1] == "Applied, but: interrupted in COMMIT; the ledger says that it was committed"
    assert "othing was changed" not in err
    assert evidences.load(system.root / "run").outcome == "applied"
    system.in_sync()


def test_interrupted_in_a_commit_that_does_not_arrive(system: Governed) -> None:
    plan, _ = saved(system)
    before = image(system.db)
    run = Running(system, "before")
    run.passing = False
    with run.process() as (process, _):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        run.go.set()
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "Interrupted: nothing was changed."
    assert image(system.db) == before
    system.apply(plan)
    system.in_sync()


def test_interrupted_again_while_it_asks(system: Governed) -> None:
    """Then nobody knows, and that is what it says."""
    saved(system)
    run = Running(system, "after")
    run.passing = False
    with run.process() as (process, proxy):
        proxy.refusing = True
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        run.go.set()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (5, "")
    assert "othing was changed" not in err
    assert f"reconciler settle {system.root / 'run'}" in err
    assert command("settle", system.root / "run", dsn=system.db.dsn).returncode == 0
    system.in_sync()
