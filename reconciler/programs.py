"""Beside the flow, other people's programs: PostgreSQL's own, found by version, and the operator's; run to their end.

No shell, no command line with a password on it, no child left behind: a program that is still running when we are
interrupted is ended with everything it started.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from reconciler import pg, sandbox
from reconciler.errors import MissingProgram, SandboxError, ServerProblem, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO

DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian's packages put the programs of each major, outside of PATH."""

PROBE = 10.0
"""Seconds that a program may take to say its version."""

LOOKS = 0.2
"""Seconds between two looks at a program under way."""

PATIENCE = 5.0
"""Seconds that a program has to end when it is told to; then it is killed."""

TAIL = 65_536
"""Bytes that are kept of what a program prints: it may print a whole database."""

LINES, WIDTH = 10, 500
"""Of that, lines and characters of each that anybody is shown."""


class Tools(NamedTuple):
    """The programs of one installation of PostgreSQL. `version` as they print it, for example 18.6."""

    folder: Path
    version: str

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = re.findall(r"\d+", f"{self.version}.0")[:2]
        return int(major), int(minor)


class Done(NamedTuple):
    """How a program ended. `code`: below 0 it was ended by that signal. `said`: its last lines, without secrets."""

    code: int
    seconds: float
    said: tuple[str, ...]

    @property
    def how(self) -> str:
        """In words, after the name of the program."""
        if self.code < 0:
            with suppress(ValueError):
                return f"was ended by {signal.Signals(-self.code).name}"
        return f"exited with {self.code}"


def newest(major: int) -> Tools:
    """The newest pg_dump, with pg_restore beside it, that can dump a server of this major. Raises MissingProgram.

    Looked for in the wheel of the extra `embedded`, on PATH and where Debian puts every major.
    """
    found = [tools for folder in _folders() if (tools := _tools(folder)) is not None]
    best = max(found, key=lambda tools: tools.number, default=None)
    if best is None or best.number[0] < major:
        there = ", ".join(f"{tools.version} in {tools.folder}" for tools in found)
        raise MissingProgram(
            f"The server is PostgreSQL {major}, and no pg_dump of that or a later version was found"
            + (f", only {there}." if there else "."),
            hint=f"Install postgresql-client-{major} or later, or: pip install 'pg-reconciler[embedded]'",
        )
    return best


def _folders() -> list[Path]:
    """Every folder that may hold the programs, each once."""
    folders: list[Path] = []
    with suppress(SandboxError):
        folders.append(sandbox.embedded_binaries())
    folders += [Path(part) for part in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    folders += sorted(DEBIAN.glob("*/bin"))
    # A relative part of PATH means another program in every directory.
    return list(dict.fromkeys(folder for folder in folders if folder.is_absolute()))


def _tools(folder: Path) -> Tools | None:
    """The programs of a folder; None when there are none, or when they do not say what they are."""
    program = folder / "pg_dump"
    # Debian's wrapper runs one version or another, as its arguments want; the versions themselves are found anyway.
    if not _runs(program) or not _runs(folder / "pg_restore") or program.resolve().name == "pg_wrapper":
        return None
    try:
        told = subprocess.run([program, "--version"], check=False, capture_output=True, text=True, timeout=PROBE)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"pg_dump \(PostgreSQL\) (\d+\S*)", told.stdout)
    return None if match is None else Tools(folder, match[1])


def _runs(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)


def client(  # noqa: PLR0913 - one call of one program
    tools: Tools,
    program: str,
    options: Sequence[str | Path],
    dsn: str | None,
    *,
    given: IO[bytes] | None = None,
    into: IO[bytes] | None = None,
    waiting: Callable[[float], None] | None = None,
) -> Done:
    """Run one of PostgreSQL's own programs on a database; the password travels by environment.

    given, into: files for its standard input and output. Raises UsageError, ServerProblem when it cannot be started.
    """
    parts = dict(conninfo_to_dict(dsn or "")) | pg.NETWORK
    if parts.pop("sslpassword", None) is not None:
        raise UsageError(
            f"{program} cannot be given `sslpassword` without showing it to every user of this machine.",
            hint="Use a client key without a password of its own.",
        )
    password = parts.pop("password", None)
    parts["application_name"] = "reconciler backup" if program == "pg_dump" else "reconciler"
    env = {} if password is None else {"PGPASSWORD": str(password)}
    command = [tools.folder / program, "--no-password", "--dbname", make_conninfo("", **parts), *options]
    return _own(command, env, given=given, into=into, waiting=waiting, secrets=secrets(dsn))


def archive(tools: Tools, options: Sequence[str | Path], *, waiting: Callable[[float], None] | None = None) -> Done:
    """Run pg_restore on an archive without any database, and drop what it prints. Raises ServerProblem as `client`."""
    with Path(os.devnull).open("wb") as nowhere:
        return _own([tools.folder / "pg_restore", *options], {}, into=nowhere, waiting=waiting)


def _own(command: Sequence[str | Path], env: Mapping[str, str], **how: Any) -> Done:  # noqa: ANN401 - as `run`
    """A program of PostgreSQL, that speaks English to us."""
    try:
        return run(command, {**os.environ, "LC_ALL": "C", **env}, **how)
    except OSError as error:
        raise ServerProblem(f"{command[0]} cannot be started: {error.strerror}.") from None


def variables(dsn: str | None) -> dict[str, str]:
    """What a connection string says, as the variables that all programs of libpq read, and whole as RECONCILER_DSN."""
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults()}
    parts = conninfo_to_dict(dsn or "")
    known = {name.decode(): str(parts[word]) for word, name in names.items() if name and word in parts}
    return known | ({"RECONCILER_DSN": dsn} if dsn else {})


def secrets(dsn: str | None, password: str | None = None) -> tuple[str, ...]:
    """What nothing that is shown may hold, the longest first: passwords, and strings with one in it.

    password: of an open connection, wherever it came from.
    """
    parts = conninfo_to_dict(dsn or "")
    words = {password, os.environ.get("PGPASSWORD"), *(parts.get(name) for name in ("password", "sslpassword"))}
    found = {str(word) for word in words if word}
    if dsn and found:
        found.add(dsn)
    return tuple(sorted(found, key=len, reverse=True))


def run(  # noqa: PLR0913 - as `client`
    command: Sequence[str | Path],
    env: Mapping[str, str],
    *,
    given: IO[bytes] | None = None,
    into: IO[bytes] | None = None,
    waiting: Callable[[float], None] | None = None,
    secrets: Sequence[str] = (),
) -> Done:
    """Run a program to its end, in a session of its own and without a terminal.

    waiting: called with the seconds so far, a few times a second. What it raises, and an interruption, ends the program
    first. Raises OSError when it cannot be started.
    """
    started = time.monotonic()
    output = subprocess.PIPE if into is None else into
    process = subprocess.Popen(
        command,
        stdin=given or subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if into is None else subprocess.PIPE,
        env=env,
        start_new_session=True,  # so that all of it can be ended, and Ctrl-C reaches it only through us
    )
    pipe = process.stdout if into is None else process.stderr
    assert pipe is not None  # noqa: S101 - one of the two is a pipe
    try:
        with pipe:
            said = _listen(process, pipe, lambda: waiting(time.monotonic() - started) if waiting else None)
    except BaseException:
        _end(process)
        raise
    return Done(process.returncode, round(time.monotonic() - started, 3), _last(said, secrets))


def _listen(process: subprocess.Popen[bytes], pipe: IO[bytes], waiting: Callable[[], None]) -> bytes:
    """The end of what it prints, until it has ended. Somebody it left behind may hold the pipe open for ever."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if selector.select(LOOKS):
                data = os.read(pipe.fileno(), TAIL)
                if not data:
                    break
                said = (said + data)[-TAIL:]
            elif process.poll() is not None:
                break
            waiting()
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOKS)
            return said
        waiting()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything it started: first politely, so that pg_dump ends its query too."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last(said: bytes, secrets: Sequence[str]) -> tuple[str, ...]:
    text = said.decode("utf-8", "replace")
    if len(said) == TAIL:
        text = text.partition("\n")[2]  # a first line without its beginning could hold the end of a secret
    for secret in secrets:
        text = text.replace(secret, "***")
    lines = [line.rstrip()[:WIDTH] for line in text.splitlines()]
    return tuple([line for line in lines if line][-LINES:])
