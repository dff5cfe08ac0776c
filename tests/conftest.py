"""What every test may ask for: the server of the run, fresh databases on it, the governed system, the command."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import psycopg
import pytest
from psycopg import sql

from reconciler import sandbox
from tests import servers
from tests.servers import PROJECT, Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

BASELINE = PROJECT / "examples" / "dieu45" / "baseline"
KIND = os.environ.get("RECONCILER_TEST_SERVER", "embedded")

# A run says the same as the one before it, however busy the machine is: its examples are the same, and none of them has
# to be done in so many milliseconds. `pytest --hypothesis-profile=search` looks for others.
_UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("search", **_UNHURRIED)
hypothesis.settings.register_profile("same", derandomize=True, **_UNHURRIED)
hypothesis.settings.load_profile("same")

_guard = pytest.StashKey[servers.Guard]()
_run = pytest.StashKey[Path]()


class Command(Protocol):
    """`cli("plan", "--dsn", dsn, check=False)`: run the installed command to its end."""

    def __call__(
        self,
        *arguments: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*/expected from what is printed")


def pytest_configure(config: pytest.Config) -> None:
    # A worker of xdist is told where the run is; only the process that was called makes and removes it.
    told = getattr(config, "workerinput", {}).get("run")
    if told is None and not config.option.collectonly:
        config.stash[_guard] = servers.Guard()
        told = config.stash[_guard].run
    if told is not None:
        config.stash[_run] = Path(told)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: pytest.Item) -> None:
    node.workerinput["run"] = str(node.config.stash[_run])  # pyright: ignore[reportAttributeAccessIssue] - an xdist node


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if _guard in config.stash:
        config.stash[_guard].release()


def pytest_report_header() -> str:
    version = "the wheel's 18" if KIND == "embedded" else servers.MATRIX.get(KIND, "unknown")
    return f"PostgreSQL: {version} (RECONCILER_TEST_SERVER={KIND})"


@pytest.fixture(scope="session")
def run_directory(pytestconfig: pytest.Config) -> Path:
    """The directory of this run; what starts a server below it in DIR/data needs no cleaning up."""
    return pytestconfig.stash[_run]


@pytest.fixture(scope="session")
def server(run_directory: Path) -> Server:
    """The private PostgreSQL of this run."""
    return servers.shared(run_directory, KIND)


@pytest.fixture(scope="session")
def new_name() -> Callable[[], str]:
    """Names of databases that no other test of the run uses."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    numbers = itertools.count(1)
    return lambda: f"test_{worker}_{next(numbers)}"


@pytest.fixture
def own_server(run_directory: Path, new_name: Callable[[], str]) -> Iterator[Callable[..., Server]]:
    """`own_server(log_statement="all")` starts a server for one test, with settings of its own, that may be broken."""
    started: list[Server] = []

    def begin(**settings: str) -> Server:
        started.append(servers.start(run_directory / new_name(), KIND, settings))
        return started[-1]

    yield begin
    for one in started:
        one.cluster.stop()
        shutil.rmtree(one.cluster.home)


@pytest.fixture
def db(server: Server, new_name: Callable[[], str]) -> Iterator[Database]:
    """A fresh empty database."""
    yield from _clone(server, new_name(), "template1")


@pytest.fixture
def dieu45(server: Server, run_directory: Path, new_name: Callable[[], str]) -> Iterator[Database]:
    """The governed system as it was before Phase 2, without its magnitudes (baseline files 8* and 9*)."""
    yield from _clone(server, new_name(), _template(server, run_directory, "dieu45"))


@pytest.fixture(scope="module")
def dieu45_shared(server: Server, run_directory: Path, new_name: Callable[[], str]) -> Iterator[Database]:
    """`dieu45` for all tests of a module that leave it as they found it, and say so."""
    yield from _clone(server, new_name(), _template(server, run_directory, "dieu45"))


@pytest.fixture
def dieu45_full(server: Server, run_directory: Path, new_name: Callable[[], str]) -> Iterator[Database]:
    """The governed system as it was before Phase 2, at full size."""
    yield from _clone(server, new_name(), _template(server, run_directory, "dieu45_full"))


@pytest.fixture(scope="session", autouse=True)
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs leave their evidence when they are not told otherwise: not in the project."""
    place = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECONCILER_EVIDENCE", str(place))
        yield place


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """A run that a script started in the background ignores Ctrl-C, and so would every program that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory, evidence: Path) -> dict[str, str]:
    """The variables of a user, with none of those that steer the command of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    foreign = ("PG", "RECONCILER_", "XDG_", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "PYTEST_")
    base = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    base.update(HOME=str(home), LC_ALL="C.UTF-8", TERM="dumb", RECONCILER_EVIDENCE=str(evidence))
    return base


@pytest.fixture(scope="session")
def cli(variables: dict[str, str]) -> Command:
    """Runs the installed `reconciler` as a user would."""
    program = Path(sysconfig.get_path("scripts")) / "reconciler"

    def start(arguments: Sequence[str | Path], **given: Any) -> subprocess.CompletedProcess[str]:
        given["input"] = given.pop("stdin")
        return subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=300, **given)

    return _command(start, variables)


@pytest.fixture(scope="session")
def called(variables: dict[str, str]) -> Command:
    """What `cli` does, in this process: for tests of what a command says and not of how a program starts and ends."""
    from tests.integration import governed

    return _command(lambda arguments, **given: governed.command(*arguments, **given), variables)


def _command(start: Callable[..., subprocess.CompletedProcess[str]], variables: Mapping[str, str]) -> Command:
    def run(
        *arguments: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        done = start(arguments, cwd=cwd or PROJECT, env={**variables, **(env or {})}, stdin=stdin)
        if check and done.returncode:
            words = " ".join(str(argument) for argument in arguments)
            pytest.fail(f"`reconciler {words}` exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


def _clone(server: Server, name: str, template: str) -> Iterator[Database]:
    database = Database.create(server, name, template)
    yield database
    database.drop()


def _template(server: Server, run: Path, name: str) -> str:
    """The template database, built by whichever worker of the run asks first."""
    ready = run / f"{name}.ready"
    with servers.locked(run / f"{name}.lock"):
        if ready.exists():
            return name
        files = BASELINE
        if name == "dieu45":
            files = run / "baseline"
            files.mkdir(exist_ok=True)
            for file in sorted(BASELINE.glob("[!89]*.sql")):
                shutil.copy(file, files)
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            identifier = sql.Identifier(name)
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier))
            conn.execute(sql.SQL("CREATE DATABASE {}").format(identifier))
            sandbox.load(files, server.dsn(name))
            # A connection to a template would make copying it fail.
            conn.execute(sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false").format(identifier))
        ready.touch()
    return name
