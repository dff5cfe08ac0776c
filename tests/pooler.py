"""PgBouncer in front of a server of the tests: where its program comes from, and how one starts.

The program of the machine is taken; where there is none, Debian's packages are brought into the cache and unpacked
there, which needs neither root nor an installation.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from psycopg.conninfo import make_conninfo

from reconciler.errors import SandboxError
from reconciler.sandbox import Account
from tests import servers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.servers import Server

CACHE = servers.CACHE / "pgbouncer"
PORT = 6432  # only part of the socket's name
STARTING = 20.0  # seconds


class Program(NamedTuple):
    """PgBouncer, and the folder of the libraries that the machine lacks, if there is one."""

    path: Path
    libraries: Path | None


def program() -> Program:
    """The program, fetched when absent."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is not None:
        return Program(Path(found), None)
    servers.CACHE.mkdir(parents=True, exist_ok=True)
    with servers.locked(servers.CACHE / "pgbouncer.lock"):
        if not CACHE.is_dir():
            _fetch()
    (library,) = {path.parent for path in CACHE.glob("usr/lib/*/libcares.so*")}
    return Program(CACHE / "usr" / "sbin" / "pgbouncer", library)


def _fetch() -> None:
    """Debian's package and the libraries that it names, by apt-get with lists of its own."""
    for needed in ("apt-get", "dpkg-deb"):
        if shutil.which(needed) is None:
            raise SandboxError("There is no pgbouncer here, and no apt-get to fetch it.", hint="Install PgBouncer.")
    with tempfile.TemporaryDirectory(prefix="pgbouncer-", dir=servers.CACHE) as place:
        folder = Path(place)
        folder.chmod(0o755)
        own = ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        own += ["-o", "APT::Sandbox::User="]
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        _step(["apt-get", "-qq", *own, "update"], folder)
        named = _step(["apt-cache", *own, "depends", "--important", "pgbouncer"], folder)
        libraries = [word for line in named.splitlines() for word in line.split() if word.startswith("lib")]
        _step(["apt-get", "-qq", *own, "download", "pgbouncer", *sorted(set(libraries) - {"libc6"})], folder)
        for package in folder.glob("*.deb"):
            _step(["dpkg-deb", "-x", str(package), "whole"], folder)
        (folder / "whole").chmod(0o755)
        (folder / "whole").rename(CACHE)


def _step(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SandboxError(f"`{' '.join(command)}` failed.", details=(done.stderr or done.stdout).splitlines()[-10:])
    return done.stdout


class Pooler(NamedTuple):
    """A running PgBouncer. `host` and `port` as a server's, for whoever connects by the socket."""

    host: str
    port: int
    process: subprocess.Popen[bytes]

    def dsn(self, dbname: str, user: str = "postgres") -> str:
        return make_conninfo(host=self.host, port=self.port, user=user, dbname=dbname)

    def stop(self) -> None:
        """At once, with whatever is under way."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STARTING)


@contextmanager
def running(home: Path, server: Server, roles: Sequence[str], settings: Mapping[str, str]) -> Iterator[Pooler]:
    """Start PgBouncer in a directory that does not exist yet; `settings` are those of section [pgbouncer]."""
    found, account = program(), Account.for_server()
    home.mkdir()
    home.chmod(0o711)  # whatever the umask: as root, the account passes through
    place = home / "pooler"
    account.own(place)
    copied = _copy(found, home)
    lines = {
        "listen_port": str(PORT),
        "unix_socket_dir": str(place),
        "pidfile": str(place / "pid"),  # for the guard of the run
        "auth_type": "trust",
        "auth_file": str(place / "users.txt"),
        "logfile": str(place / "log"),
        "max_client_conn": "200",
        **settings,
    }
    configured = "\n".join(f"{name} = {value}" for name, value in lines.items())
    _give(place / "users.txt", "".join(f'"{role}" ""\n' for role in ("postgres", *roles)), account)
    _give(
        place / "pgbouncer.ini",
        f"[databases]\n* = host={server.host} port={server.port}\n[pgbouncer]\n{configured}\n",
        account,
    )
    other = account.uid != os.geteuid()
    process = subprocess.Popen(
        [copied.path, "--quiet", place / "pgbouncer.ini"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.defpath, "LD_LIBRARY_PATH": str(copied.libraries or "")},
        user=account.uid if other else None,
        group=account.gid if other else None,
        extra_groups=[] if other else None,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    pooler = Pooler(str(place), PORT, process)
    try:
        _wait(pooler, place / "log")
        yield pooler
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        shutil.rmtree(home)


def _copy(found: Program, home: Path) -> Program:
    """Where every account may run it."""
    path = Path(shutil.copy(found.path, home))
    if found.libraries is None:
        return Program(path, None)
    libraries = home / "lib"
    shutil.copytree(found.libraries, libraries, symlinks=True)
    for each in (home, *home.rglob("*")):
        if not each.is_symlink() and each != home and each.name != "pooler":
            each.chmod(0o755)
    return Program(path, libraries)


def _give(path: Path, text: str, account: Account) -> None:
    path.write_text(text)
    os.chown(path, account.uid, account.gid)


def _wait(pooler: Pooler, log: Path) -> None:
    """Until it lets somebody in."""
    deadline = time.monotonic() + STARTING
    while True:
        try:
            psycopg.connect(pooler.dsn("postgres")).close()
        except psycopg.OperationalError as error:
            if pooler.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            said = log.read_text().splitlines()[-10:] if log.exists() else [str(error)]
            raise SandboxError("PgBouncer does not start.", details=said) from error
        return
