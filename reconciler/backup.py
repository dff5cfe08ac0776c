"""Second step of an apply, and once more after COMMIT: what the policy asks for is copied into the evidence folder.

Before, it is whole, read again and found good before BEGIN is sent: a full disk, a missing right or a damaged dump
stops an apply that has not begun. A copy is of one snapshot, in which the plan was found to be fresh. What others
commit between it and BEGIN is not in it; whatever the apply changes is in it as it was when the apply changed it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from psycopg import sql
from psycopg.conninfo import make_conninfo

from reconciler import __version__, image, pg, programs, scratch
from reconciler.errors import BackupFailed, Locked, MissingProgram, PlanDamaged, ReconcilerError, SandboxError
from reconciler.model import Backup, Command, Step, Tried, milliseconds
from reconciler.parts import raw, relation
from reconciler.plan import read, serialize, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping
    from pathlib import Path

    from reconciler.model import Address, ApplyPolicy, Desired, Model, Target

EVERY = 10.0
"""Seconds between two lines of progress."""

SAFE = "Nothing was changed."

# zlib's own checksum is what makes a damaged byte of the data known; LZ4 and Zstandard carry none here.
FORMAT = ("--format=custom", "--compress=6")


@dataclass(frozen=True)
class Task:
    """What is to be backed up, and where to. governed: all that is declared or was; allow_functions: the installed."""

    dsn: str | None
    governed: Desired
    allow_functions: tuple[str, ...]
    policy: ApplyPolicy
    target: Target
    run_id: str
    folder: Path | None
    moment: Literal["before", "after"]
    progress: Callable[[str, str], None]

    @property
    def verify(self) -> bool:
        """Is it to be tried on a scratch database?"""
        return isinstance(self.policy.backup, Tried)

    def file(self, suffix: str) -> str:
        """The plain name of the file."""
        return f"backup-{self.moment}.{suffix}"


def make(conn: pg.Connection, task: Task) -> Backup:
    """Make the backup that the policy asks for, inside the caller's snapshot, and find it good.

    It raises BackupFailed, MissingProgram, SandboxError, UsageError, ServerProblem, and Locked when somebody holds a
    table that pg_dump must read; then no file of it remains.
    """
    form = task.policy.backup
    started = time.monotonic()
    # The snapshot must live as long as the dump takes, whatever the role or the database says of idle sessions.
    pg.run(conn, "SET LOCAL idle_in_transaction_session_timeout = 0")
    if conn.info.server_version >= 170_000:
        pg.run(conn, "SET LOCAL transaction_timeout = 0")
    if isinstance(form, Command):
        made = _by_command(conn, task, form.command)
    elif (form.kind if isinstance(form, Tried) else form) == "full":
        made = _full(conn, task)
    else:
        made = _governed(conn, task)
    return made.model_copy(update={"seconds": round(time.monotonic() - started, 3)})


def _begun(conn: pg.Connection, task: Task, form: Literal["governed", "full", "command"], tool: str) -> Backup:
    task.progress("backup", f"{form} by {tool}, {task.moment} the apply")
    now = pg.rows(conn, "SELECT pg_catalog.clock_timestamp() AS now")[0]["now"]
    return Backup(moment=task.moment, form=form, taken_at=stamp(now), seconds=0.0, tool=tool)


def _watch(task: Task, doing: str, file: Path | None = None) -> Callable[[float], None]:
    """Says now and then that something is still under way, and how large its file is."""
    told = 0.0

    def waiting(seconds: float) -> None:
        nonlocal told
        if seconds - told >= EVERY:
            told = seconds
            size = f", {file.stat().st_size / 1e6:.1f} MB" if file is not None and file.exists() else ""
            task.progress("backup", f"{doing}{size} after {seconds:.0f} s")

    return waiting


# ----------------------------------------------------------------------------------------------------------------- full


def _full(conn: pg.Connection, task: Task) -> Backup:
    tools = programs.newest(conn.info.server_version // 10_000)
    made = _begun(conn, task, "full", f"pg_dump {tools.version}")
    with _file(task, "dump") as file:
        _dump(conn, task, tools, file)
        sum_and_size = _sum(file)
        checked = [_listed(tools, file), _readable(task, tools, file)]
        if task.verify:
            checked.append(_tried(conn, task, lambda copy, place: _restore(conn, copy, task, tools, file, place)))
        if _sum(file) != sum_and_size:
            raise BackupFailed(f"{file.name} changed while it was being checked.", hint=SAFE)
        if task.moment == "before":
            _room(file.parent, sum_and_size[1])
    name, major = task.file("dump"), tools.number[0]
    into = f"Restore it into a new database (pg_restore {major} or later; roles are not in it: pg_dumpall --roles-only)"
    return made.model_copy(
        update={
            "file": name,
            "sha256": sum_and_size[0],
            "bytes": sum_and_size[1],
            "checked": tuple(checked),
            "restore": (
                CHECK,
                Step(what=into, command=f"createdb restored && pg_restore --dbname=restored {name}"),
                Step(what="See what is in it, to take out single objects", command=f"pg_restore --list {name}"),
            ),
        }
    )


CHECK = Step(what="Check that it is what was made", command="sha256sum --check --ignore-missing SHA256SUMS")


def _dump(conn: pg.Connection, task: Task, tools: programs.Tools, file: Path) -> None:
    """Dump the whole database as the caller's snapshot sees it. We give way, as an apply does, and try again."""
    snapshot = _exported(conn)
    options = [
        *FORMAT,
        f"--snapshot={snapshot}",
        f"--lock-wait-timeout={milliseconds(task.policy.lock_timeout)}",
        f"--file={file}",
    ]
    for attempt in range(task.policy.lock_retries + 1):
        if attempt:
            task.progress("backup", f"somebody holds a table that pg_dump must read; attempt {attempt + 1}")
        done = scratch.dump(conn, tools, options, task.dsn, waiting=_watch(task, "dumping", file))
        if not done.code:
            return
        why = _why("pg_dump", done)
        # What it calls a lock timeout is a statement timeout for the server.
        if not ("timeout" in why and any("LOCK TABLE" in line for line in done.said)):
            refused = "permission denied" in why or "row-level security" in why
            hint = "pg_dump reads every row: GRANT pg_read_all_data (and BYPASSRLS), or choose `backup: governed`."
            raise BackupFailed(why, details=done.said, hint=f"{SAFE} {hint}" if refused else SAFE)
    raise Locked(
        "pg_dump gave up waiting: somebody holds a table that it must read.",
        hint=f"{SAFE} Run the command again when the other session is done.",
    )


def _why(program: str, done: programs.Done) -> str:
    """The reason in one sentence: the first error of the program, else how it ended."""
    errors = [line.partition("error: ")[2] for line in done.said if "error: " in line]
    reason = (errors[0] if errors else "").strip().rstrip(".")
    return f"{program} failed: {reason}." if reason else f"{program} {done.how}."


def _exported(conn: pg.Connection) -> str:
    return pg.rows(conn, "SELECT pg_catalog.pg_export_snapshot() AS id", doing="exporting the snapshot")[0]["id"]


def _listed(tools: programs.Tools, file: Path) -> str:
    done = programs.archive(tools, ["--list", file])
    if done.code:
        raise _damaged("its list", done)
    return f"listed by pg_restore {tools.version}"


def _readable(task: Task, tools: programs.Tools, file: Path) -> str:
    """The list is only the beginning of the file; a damaged byte behind it shows when all of it is read."""
    done = programs.archive(tools, [f"--file={os.devnull}", file], waiting=_watch(task, "reading it again"))
    if done.code:
        raise _damaged("it to its end", done)
    return f"read to its end by pg_restore {tools.version}"


def _damaged(what: str, done: programs.Done) -> BackupFailed:
    return BackupFailed(
        f"The dump is damaged, pg_restore cannot read {what}: {_why('pg_restore', done)}",
        details=done.said,
        hint=f"{SAFE} Check the disk, and apply again.",
    )


def _restore(  # noqa: PLR0913, PLR0917 - from where to where
    conn: pg.Connection, copy: pg.Connection, task: Task, tools: programs.Tools, file: Path, place: str
) -> list[str]:
    """Restore the schema, and of the data the tables with governed rows. Returns what pg_restore complained about.

    It may complain of what the scratch server does not have, an extension for example: what counts is the comparison.
    """
    del copy
    common = ["--no-publications", "--no-subscriptions", "--no-security-labels", "--no-tablespaces"]
    tables = [
        ["--section=data", f"--schema={row['schema']}", f"--table={row['name']}"]
        for name in sorted({table for table, _ in scratch.rows_of(task.governed).values()})
        for row in pg.rows(conn, _PARTS, relation(name), doing=f"looking for the partitions of {name}")
    ]
    said: list[str] = []
    for part in (["--section=pre-data"], *tables, ["--section=post-data"]):
        options = [*part, *common, file]
        done = programs.client(tools, "pg_restore", options, place, waiting=_watch(task, "restoring it to try it"))
        said += done.said if done.code else ()
    return said


_PARTS = """
WITH t AS (SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = %s AND c.relname = %s)
SELECT n.nspname::pg_catalog.text AS schema, c.relname::pg_catalog.text AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid IN (SELECT t.oid FROM t)
    OR c.oid IN (SELECT p.relid::pg_catalog.oid FROM t, pg_catalog.pg_partition_tree(t.oid::pg_catalog.regclass) p)
 ORDER BY 1, 2
"""


# ------------------------------------------------------------------------------------------------------------- governed


def _governed(conn: pg.Connection, task: Task) -> Backup:
    made = _begun(conn, task, "governed", f"reconciler {__version__}")
    found = image.take(conn, task.governed, task.allow_functions, target=task.target, taken_at=made.taken_at)
    with _file(task, "json") as file:
        with file.open("wb") as opened:
            opened.write(serialize(found.dump()))
            opened.flush()
            os.fsync(opened.fileno())
        try:
            document = read(file, "backup")
        except PlanDamaged as error:
            raise BackupFailed(error.message, hint=SAFE) from None
        sha256, size = _sum(file)
        checked = [f"read again: {len(found.objects)} governed objects"]
        if task.verify:
            checked.append(
                _tried(
                    conn,
                    task,
                    lambda copy, place: _put_back(conn, copy, task, document["restore"], place),
                    without=found.not_in_it,
                )
            )
    name = task.file("json")
    script = 'print(*json.load(open(0, encoding="utf-8"))["restore"], sep="\\n;\\n", end="\\n;\\n")'
    again = (
        f"PYTHONUTF8=1 python3 -c 'import json; {script}' < {name} | psql -X -v ON_ERROR_STOP=1 --single-transaction"
    )
    return made.model_copy(
        update={
            "file": name,
            "sha256": sha256,
            "bytes": size,
            "checked": tuple(checked),
            "restore": (
                CHECK,
                Step(what="Undo the run, by its ledger entry", command="reconciler revert ENTRY --out undo.plan"),
                Step(what="Or, in a database that has none of the governed objects, make them anew", command=again),
                *(
                    Step(
                        what=f"{address} is a secret and not in it: plan and apply it again, with its value given",
                        command="reconciler plan --out again.plan",
                    )
                    for address in found.not_in_it
                ),
            ),
        }
    )


def _put_back(conn: pg.Connection, copy: pg.Connection, task: Task, statements: list[str], place: str) -> list[str]:
    """Run the document's own statements in a copy of the schema that the governed functions were taken out of."""
    scratch.copy_schema(conn, copy, task.dsn, place, snapshot=_exported(conn))
    for address, item in task.governed.items.items():
        if item.kind == "function":
            pg.run(copy, sql.SQL("DROP ROUTINE IF EXISTS {} CASCADE").format(raw(item.name)), f"dropping {address}")
    # The rows that foreign keys and triggers look for are not governed, and not here.
    alone = make_conninfo(place, options="-c session_replication_role=replica")
    text = "".join(f"{statement}\n;\n" for statement in statements)
    scratch.execute(programs.newest(conn.info.server_version // 10_000), text, alone)
    return []


# -------------------------------------------------------------------------------------------------------------- command


def _by_command(conn: pg.Connection, task: Task, command: tuple[str, ...]) -> Backup:
    """The operator's own: nothing is known of it but how it ended and what it said."""
    made = _begun(conn, task, "command", shlex.join(command))
    env = {
        **os.environ,
        **programs.variables(task.dsn),
        "RECONCILER_BACKUP": task.moment,
        "RECONCILER_RUN": task.run_id,
    }
    hidden = programs.secrets(task.dsn, conn.info.password)
    try:
        done = programs.run(command, env, waiting=_watch(task, "the command is running"), secrets=hidden)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BackupFailed(f"The backup command {command[0]} cannot be started: {why}.", hint=SAFE) from None
    if done.code:
        raise BackupFailed(f"The backup command {command[0]} {done.how}.", details=done.said, hint=SAFE)
    return made.model_copy(
        update={
            "exit_code": done.code,
            "said": done.said,
            "checked": ("its exit code was 0; nothing else of it was looked at",),
            "restore": (Step(what="As the snapshots of this command are restored", command=made.tool),),
        }
    )


# ------------------------------------------------------------------------------------------------------------ the trial


def _tried(
    conn: pg.Connection,
    task: Task,
    load: Callable[[pg.Connection, str], list[str]],
    without: Collection[Address] = (),
) -> str:
    """Restore into a scratch database and read there what is governed: it must be what the snapshot sees here.

    without: what is not in the backup.
    """
    task.progress("backup", "restoring it into a scratch database")
    read = image.objects(conn, task.governed, task.allow_functions)
    expected = {address: found for address, found in read.items() if address not in without}
    complaints: list[str] = []
    with scratch.database() as place, pg.connect(place, "backup") as copy:
        try:
            scratch.copy_roles(conn, copy)
            complaints = load(copy, place)
            with pg.snapshot(copy):
                there = image.objects(copy, task.governed, task.allow_functions)
        except (MissingProgram, SandboxError):
            raise
        except ReconcilerError as error:
            details = map(conn.unspoken.without, [*error.details, *complaints][:20])
            message = f"The backup cannot be restored: {conn.unspoken.without(error.message)}"
            raise BackupFailed(message, details=[*details], hint=SAFE) from error
        version = (copy.info.parameter_status("server_version") or "").split()[0]
    if wrong := _differing(expected, there):
        raise BackupFailed(
            f"The backup cannot be trusted: restored from it, {len(wrong)} of {len(expected)} governed objects differ.",
            details=[*map(conn.unspoken.without, [*wrong, *complaints][:20])],
            hint=SAFE,
        )
    missing = f"; not in it: {', '.join(without)}" if without else ""
    equal = f"all {len(expected)} governed objects are equal{missing}"
    return f"restored into a scratch database of PostgreSQL {version}: {equal}"


def _differing(expected: Mapping[Address, Model], there: Mapping[Address, Model]) -> list[str]:
    """A line for each, with the names of the fields, never their values."""
    wrong: list[str] = []
    for address in sorted({*expected, *there}):
        here, restored = expected.get(address), there.get(address)
        if here is None or restored is None:
            wrong.append(f"{address}: {'missing' if restored is None else 'there, but not on the target'}")
        elif here != restored:
            old, new = here.dump(), restored.dump()
            wrong.append(f"{address}: {', '.join(name for name in old if old[name] != new[name])} differ")
    return wrong


# ---------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _file(task: Task, suffix: str) -> Generator[Path]:
    """A new private file with a name of its own until it was found good. Whatever is raised, none of it remains."""
    if task.folder is None:
        raise BackupFailed("The policy asks for a backup, and nobody said where to put it.", hint=SAFE)
    name = task.file(suffix)
    partial = task.folder / f"{name}.partial"
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield partial
        partial.rename(task.folder / name)
    except OSError as error:
        _remove(partial)
        raise BackupFailed(
            f"The backup cannot be written to {task.folder}: {error.strerror}.",
            hint=f"{SAFE} Name another place with --evidence DIR.",
        ) from None
    except BaseException:
        _remove(partial)
        raise


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return  # its name says what it is


def _sum(file: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a file of any size."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest(), opened.tell()


def _room(folder: Path, size: int) -> None:
    """Will there be room for the backup after the apply, which is about as large? Raises BackupFailed."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < size:
        raise BackupFailed(
            f"There is no room in {folder} for the backup after the apply: about {size / 1e6:.1f} MB,"
            f" and {free / 1e6:.1f} MB are free.",
            hint=f"{SAFE} Name another place with --evidence DIR.",
        )
