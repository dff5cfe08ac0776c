"""Backups before and after an apply: each form, restored and compared; and everything that must stop an apply first."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from reconciler import apply as applying
from reconciler import backup, desired, image, pg, programs, sandbox
from reconciler.errors import BackupFailed, InputError, MissingProgram, SandboxError
from reconciler.model import Outcome
from tests import pooler
from tests.integration import governed
from tests.integration.governed import command, shop, silent
from tests.servers import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Database, Server

FULL_TRIED = {"kind": "full", "verify": "restore"}
GOVERNED_TRIED = {"kind": "governed", "verify": "restore"}
PICTURE = """
SELECT 'function', p.oid::regprocedure::text, concat_ws(' ', pg_get_functiondef(p.oid), r.rolname,
       obj_description(p.oid, 'pg_proc'), (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(p.proacl) AS a))
  FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner WHERE p.pronamespace = 'app'::regnamespace
UNION ALL SELECT 'gate', name, to_jsonb(s)::text FROM app.settings s WHERE name LIKE 'shop.%'
UNION ALL SELECT 'marker', worker, to_jsonb(h)::text FROM app.heartbeat h
ORDER BY 1, 2
"""


@pytest.fixture(scope="module")
def tools() -> programs.Tools:
    return programs.newest(14)


def picture(conn: psycopg.Connection[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Everything governed, in PostgreSQL's own words, rows with every column."""
    return conn.execute(PICTURE.encode()).fetchall()


class Run:
    """One governed system with a plan that is approved, and the command that applies it."""

    def __init__(self, db: Database, root: Path, policy: Any, **apply: Any) -> None:
        self.db = db
        self.system = shop(db, root, {"backup": policy, **apply})
        self.place = root / "evidence"
        self.before: list[tuple[Any, ...]] = []

    def ready(self) -> Run:
        plan = self.system.plan()
        self.system.save(plan, self.system.approve(plan))
        self.before = picture(self.db.conn)
        return self

    def apply(self, code: int = 0, *, dsn: str | None = None) -> subprocess.CompletedProcess[str]:
        image_before = governed.image(self.db)
        words = ("apply", self.system.plan_file, "--initialize", "--evidence", self.place)
        done = command(*words, dsn=dsn or self.db.dsn)
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert governed.image(self.db) == image_before
            assert not self.place.exists()
        return done

    def made(self) -> list[dict[str, Any]]:
        """What the evidence says of the backups."""
        return json.loads((self.place / "evidence.json").read_text())["backups"]


@pytest.fixture
def run(db: Database, tmp_path: Path) -> Callable[..., Run]:
    return lambda policy="full", **apply: Run(db, tmp_path, policy, **apply).ready()


@pytest.fixture
def other(server: Server, db: Database) -> Iterator[str]:
    """A second database of the same server, empty: its name."""
    name = f"{db.name}_restored"
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield name
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def shell(line: str, folder: Path, tools: programs.Tools, dsn: str) -> subprocess.CompletedProcess[str]:
    """As an operator types it, with libpq's variables set for this database."""
    env = {**os.environ, **programs.variables(dsn), "PATH": f"{tools.folder}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=env, check=False, capture_output=True, text=True)


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: programs.Tools) -> Callable[..., Path]:
    """`instead(pg_dump="…")` puts programs first in PATH that run a piece of Python and call themselves 99.1.

    In it `real(*options)` runs the true program with the options it was given, `file` is what pg_dump writes to.
    """

    def put(**bodies: str) -> Path:
        folder = tmp_path / "programs"
        folder.mkdir()
        for name in ("pg_dump", "pg_restore", "psql"):
            head = (
                f"#!{sys.executable}\nimport os, pathlib, subprocess, sys, time\n"
                f"if sys.argv[1:] == ['--version']:\n    print('{name} (PostgreSQL) 99.1')\n    sys.exit()\n"
                "given = sys.argv[1:]\n"
                "def real():\n"
                f"    done = subprocess.run(['{tools.folder / name}', *given])\n"
                "    if done.returncode:\n        sys.exit(done.returncode)\n"
                "named = [word.partition('=')[2] for word in given if word.startswith('--file=')]\n"
                "file = pathlib.Path(named[0] if named else given[-1])\n"
            )
            (folder / name).write_text(head + bodies.get(name, "real()") + "\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    return put


# ----------------------------------------------------------------------------------------------------------- each form


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["full", "governed"])
def test_both_are_in_the_evidence_and_nowhere_else(run: Callable[..., Run], tmp_path: Path, form: str) -> None:
    one = run(form)
    there = set(tmp_path.rglob("*"))
    done = one.apply()
    suffix = {"full": "dump", "governed": "json"}[form]
    files = [f"backup-before.{suffix}", f"backup-after.{suffix}"]
    made = one.made()
    assert [(each["moment"], each["form"], each["file"]) for each in made] == [
        ("before", form, files[0]),
        ("after", form, files[1]),
    ]
    for each in made:
        path = one.place / each["file"]
        assert (each["sha256"], each["bytes"]) == backup._sum(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert each["tool"].startswith({"full": "pg_dump ", "governed": "reconciler "}[form])
        assert each["seconds"] > 0
        assert f"Backup {each['moment']}: {each['file']}, " in done.stdout
        assert each["sha256"] in (one.place / "report.md").read_text()
    sums = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=one.place, check=False)
    assert sums.returncode == 0
    listed = {line.split("  ")[1] for line in (one.place / "SHA256SUMS").read_text().splitlines()}
    assert listed >= set(files)
    below = {one.place, *one.place.rglob("*")}
    assert {path for path in tmp_path.rglob("*") if "reconciler" in str(path)} <= below | there
    assert [path for path in below if path.suffix == ".partial"] == []
    stages = [stage["name"] for stage in json.loads((one.place / "evidence.json").read_text())["stages"]]
    assert stages[:4] == ["connect", "check", "backup", "lock"]
    assert stages[-3:] == ["commit", "backup", "after"]
    one.system.in_sync()


def test_a_full_backup_is_restored_as_the_report_says(
    run: Callable[..., Run], other: str, server: Server, tools: programs.Tools
) -> None:
    one = run("full")
    one.apply()
    steps = {step["what"].split()[0]: step["command"] for step in one.made()[0]["restore"]}
    checked = shell(steps["Check"], one.place, tools, server.dsn())
    assert checked.returncode == 0, checked.stderr
    assert "backup-before.dump: OK" in checked.stdout
    listed = shell(steps["See"], one.place, tools, server.dsn())
    assert "TABLE DATA app settings" in listed.stdout
    line = steps["Restore"].replace("createdb restored && ", "").replace("restored", other)
    restored = shell(line, one.place, tools, server.dsn())
    errors = [text for text in restored.stderr.splitlines() if "error:" in text and "transaction_timeout" not in text]
    assert errors == []  # an older server does not know transaction_timeout, and pg_restore goes on
    with psycopg.connect(server.dsn(other)) as conn:
        assert picture(conn) == one.before
    assert one.before != picture(one.db.conn)


AWKWARD = (
    # A body that is stored parsed, and names a function that comes after it in the alphabet.
    "CREATE FUNCTION app.fn_total_twice() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT 2 * app.fn_zero(); END",
    "ALTER FUNCTION app.fn_total_twice() OWNER TO {owner}",
    (
        "CREATE FUNCTION app.fn_more(a text DEFAULT $$it's \\ %s :x$$, VARIADIC b integer[] DEFAULT '{}') RETURNS text"
        " LANGUAGE plpgsql COST 7 AS $f$BEGIN -- $function$ 'é' :a \\d\nRETURN a; END$f$"
    ),
    # An owner who may no longer make anything here, and grants that were passed on.
    "ALTER FUNCTION app.fn_more(text, integer[]) OWNER TO {stranger}",
    "GRANT EXECUTE ON FUNCTION app.fn_more(text, integer[]) TO {caller} WITH GRANT OPTION",
    "GRANT USAGE ON SCHEMA app TO {caller}, {owner}",
    "SET ROLE {caller}; GRANT EXECUTE ON FUNCTION app.fn_more(text, integer[]) TO {owner}; RESET ROLE",
    "ALTER DEFAULT PRIVILEGES FOR ROLE {stranger} GRANT EXECUTE ON FUNCTIONS TO {caller}",
    "INSERT INTO app.settings (name, value, description) VALUES ('shop.empty', NULL, 'it''s \\ :x')",
    "INSERT INTO app.settings (name, value) VALUES ('shop.c', '1')",
)


@pytest.fixture
def awkward(db: Database, tmp_path: Path) -> Callable[[Any], Run]:
    """A system whose governed objects are hard to make anew."""

    def begin(policy: Any) -> Run:
        one = Run(db, tmp_path, policy)
        system = one.system
        system.sql("CREATE FUNCTION app.fn_zero() RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint'")
        system.sql(*AWKWARD)
        # What they become is no matter: they are declared, so they are in the backup.
        for name, head in (
            ("app.fn_zero()", "app.fn_zero() RETURNS bigint"),
            ("app.fn_total_twice()", "app.fn_total_twice() RETURNS bigint"),
            ("app.fn_more(text, integer[])", "app.fn_more(a text, VARIADIC b integer[]) RETURNS bigint"),
        ):
            text = f"CREATE FUNCTION {head} LANGUAGE sql AS 'SELECT 7::bigint';"
            system.function(name, text, execute=["PUBLIC"], waive={"public_execute": "a test"})
        system.state["gates"]["shop.empty"] = {"value": "x", "reason": "It was NULL."}
        system.state["gates"]["shop.c"] = {"retire": "It goes."}
        system.write()
        return one.ready()

    return begin


@pytest.mark.smoke
def test_a_governed_backup_is_put_back_as_the_report_says(awkward: Callable[[Any], Run], tools: programs.Tools) -> None:
    one = awkward("governed")
    one.apply()
    assert picture(one.db.conn) != one.before
    document = json.loads((one.place / "backup-before.json").read_text())
    assert document["absent"] == sorted(document["absent"])
    assert set(document["objects"]) >= {"function.app.fn_total_twice()", "gate.shop.empty", "gate.shop.c"}
    names = one.db.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'app'::regnamespace")
    for (name,) in names:
        one.db.execute(f"DROP ROUTINE {name} CASCADE")
    one.db.execute("DELETE FROM app.settings WHERE name LIKE 'shop.%'")
    one.db.execute("DELETE FROM app.heartbeat")
    rights = "SELECT nspname, a::text FROM pg_namespace, unnest(nspacl) AS a ORDER BY 1, 2"
    schema = one.db.execute(rights)
    (line,) = [step["command"] for step in one.made()[0]["restore"] if "psql" in step["command"]]
    done = shell(line, one.place, tools, one.db.dsn)
    assert done.returncode == 0, done.stderr
    assert picture(one.db.conn) == one.before
    # The right that an owner needed for a moment is gone again.
    assert one.db.execute(rights) == schema


def test_what_is_pinned_is_in_a_governed_backup(db: Database, tmp_path: Path) -> None:
    one = Run(db, tmp_path, "governed")
    one.system.sql(
        "CREATE FUNCTION app.stamp() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN new; END$$",
        "CREATE TRIGGER stamp BEFORE UPDATE ON app.job FOR EACH ROW EXECUTE FUNCTION app.stamp()",
        "CREATE FUNCTION app.pinned_one() RETURNS integer LANGUAGE sql AS 'SELECT 41 + 1'",
    )
    one.system.state["invariants"] |= {
        "jobs": {"pin": {"table": "app.job"}},
        "ones": {"pin": {"functions": "app.pinned_*"}},
    }
    one.system.write()
    assert command("pin", "-s", one.system.directory, dsn=db.dsn).returncode == 0
    one.ready().apply()
    for moment in ("before", "after"):
        document = json.loads((one.place / f"backup-{moment}.json").read_text())
        assert any("column actor" in line for line in document["pinned"]["jobs"])
        assert len(document["pinned"]["ones"]) == 1
        assert set(document["definitions"]) == {"app.pinned_one()", "app.stamp()"}
        assert "SELECT 41 + 1" in document["definitions"]["app.pinned_one()"]


def test_the_operators_own_command(run: Callable[..., Run]) -> None:
    line = 'echo "$PGDATABASE $RECONCILER_BACKUP $RECONCILER_RUN" >&2; echo done; test -n "$RECONCILER_DSN"'
    one = run({"command": ["sh", "-c", line, "it's", "$HOME"]})
    done = one.apply()
    found = json.loads((one.place / "evidence.json").read_text())
    made = found["backups"]
    assert [each["moment"] for each in made] == ["before", "after"]
    for each in made:
        assert each["said"] == [f"{one.db.name} {each['moment']} {found['run_id']}", "done"]
        assert (each["form"], each["exit_code"], each["file"]) == ("command", 0, None)
        assert each["tool"] == shlex.join(["sh", "-c", line, "it's", "$HOME"])  # no shell of ours read it
    assert "Backup before: sh -c " in done.stdout
    assert f"{one.db.name} before" in (one.place / "report.md").read_text()


# -------------------------------------------------------------------------------------------------- restored to be sure


@pytest.mark.smoke
@pytest.mark.parametrize("policy", [FULL_TRIED, GOVERNED_TRIED], ids=["full", "governed"])
def test_a_restored_backup_equals_what_is_there(awkward: Callable[[Any], Run], policy: Any) -> None:
    one = awkward(policy)
    one.apply()
    for each in one.made():
        (tried,) = [line for line in each["checked"] if line.startswith("restored into a scratch database")]
        assert tried.endswith("governed objects are equal")
    assert {path.name for path in one.place.iterdir()} >= {each["file"] for each in one.made()}


def test_a_restored_backup_of_the_queue_equals_it(dieu45: Database, tmp_path: Path) -> None:
    wanted = desired.load(PROJECT / "state", "sandbox")
    task = _task(dieu45, tmp_path, wanted, FULL_TRIED)
    with pg.connect(dieu45.dsn, "apply") as conn, pg.snapshot(conn):
        made = backup.make(conn, task)
        there = image.objects(conn, wanted, ())
    assert made.checked[-1].endswith(f"all {len(there)} governed objects are equal")
    assert len(there) > 10


def test_a_backup_that_restores_to_something_else_blocks(run: Callable[..., Run], instead: Callable[..., Path]) -> None:
    """pg_dump itself writes another definition: the file is as it was made, and only the trial can know."""
    instead(pg_dump="real(); file.write_bytes(file.read_bytes().replace(b'SELECT 0::', b'SELECT 1::'))")
    refused = run(FULL_TRIED).apply(1)
    assert "restored from it, 1 of 3 governed objects differ" in refused.stderr
    assert "function.app.fn_total(): body differ" in refused.stderr
    assert "Nothing was changed." in refused.stderr


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("INSERT INTO", "gate.shop.limit: missing"),
        ("COMMENT ON", "function.app.fn_total(): comment differ"),
    ],
)
def test_a_governed_backup_that_lacks_a_statement_blocks(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, statement: str, said: str
) -> None:
    whole = image._restore
    monkeypatch.setattr(
        image, "_restore", lambda *given: [text for text in whole(*given) if not text.startswith(statement)]
    )
    assert said in run(GOVERNED_TRIED).apply(1).stderr


def test_without_a_server_to_try_it_on_nothing_begins(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    one = run(GOVERNED_TRIED)
    monkeypatch.setattr(sandbox, "embedded_binaries", _missing)
    refused = one.apply(1)
    assert "embedded PostgreSQL server, which is not installed" in refused.stderr


def _missing() -> Path:
    raise SandboxError(
        "The sandbox needs the embedded PostgreSQL server, which is not installed.",
        hint="pip install 'pg-reconciler[embedded]'",
    )


# ---------------------------------------------------------------------------------------------------- a damaged backup


FLIP = "data = bytearray(file.read_bytes()); data[{place}] ^= 1; file.write_bytes(data)"


@pytest.mark.parametrize("place", ["20", "len(data) // 2", "-40", "data.index(b'SELECT 0::bigint')"])
@pytest.mark.parametrize("moment", ["--list", "--file"])
def test_one_byte_that_changes_after_the_dump_blocks(
    run: Callable[..., Run], instead: Callable[..., Path], moment: str, place: str
) -> None:
    """Wherever it is, and whether or not pg_restore stumbles over it: the SHA-256 is checked again before BEGIN."""
    flip = FLIP.format(place=place)
    when = f"if any(word.startswith('{moment}') for word in given):"
    instead(pg_restore=f"{when}\n    file = pathlib.Path(given[-1]); {flip}\nreal()")
    refused = run("full").apply(1)
    assert "damaged" in refused.stderr or "changed while it was being checked" in refused.stderr
    assert "lock" not in refused.stderr


def test_a_dump_that_was_written_with_one_byte_changed_blocks(
    run: Callable[..., Run], instead: Callable[..., Path]
) -> None:
    """The list reads only the beginning of the file; this byte is in a table's data."""
    instead(pg_dump=f"real(); {FLIP.format(place='-40')}")
    refused = run("full").apply(1)
    assert "The dump is damaged, pg_restore cannot read it to its end" in refused.stderr


def test_every_byte_of_the_data_is_checked(db: Database, tmp_path: Path, tools: programs.Tools) -> None:
    db.execute("CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 300) AS i")
    whole = tmp_path / "whole.dump"
    assert not programs.client(tools, "pg_dump", [*backup.FORMAT, f"--file={whole}"], db.dsn).code
    data = whole.read_bytes()
    begin = data.index(b"\x78\x9c")  # how zlib's streams of this level begin
    task = _task(db, tmp_path, None, "full")
    backup._readable(task, tools, whole)
    damaged = tmp_path / "damaged.dump"
    places = range(begin, len(data) - 5, (len(data) - begin) // 40)  # the last five bytes only say that it ends
    for place in places:
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        backup._listed(tools, damaged)  # does not see it
        with pytest.raises(BackupFailed, match="to its end"):
            backup._readable(task, tools, damaged)


# ------------------------------------------------------------------------------------------------ which pg_dump is used


def _task(db: Database, folder: Path, wanted: Any, policy: Any) -> backup.Task:
    from reconciler.model import ApplyPolicy, Target, canonical

    return backup.Task(
        dsn=db.dsn,
        governed=wanted,
        allow_functions=(),
        policy=ApplyPolicy.model_validate_json(canonical({"backup": policy})),
        target=Target(name="t", database=db.name, system_identifier="1", server_version="18"),
        run_id="r",
        folder=folder,
        moment="before",
        progress=silent,
    )


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """`nowhere("12.1", "9.6.24")` is a machine that has only these versions, in this order in PATH."""

    def make(*versions: str) -> list[Path]:
        monkeypatch.setattr(sandbox, "embedded_binaries", _missing)
        monkeypatch.setattr(programs, "DEBIAN", tmp_path / "debian")
        folders: list[Path] = []
        for version in versions:
            folder = tmp_path / f"bin-{version}"
            folder.mkdir()
            for name in ("pg_dump", "pg_restore"):
                (folder / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
                (folder / name).chmod(0o755)
            folders.append(folder)
        monkeypatch.setenv("PATH", ":".join([*map(str, folders), "/nothing", "bin"]))
        return folders

    return make


def test_older_programs_are_refused_by_name(run: Callable[..., Run], nowhere: Callable[..., list[Path]]) -> None:
    one = run("full")
    first, second = nowhere("12.1", "9.6.24")
    major = one.db.server.major
    refused = one.apply(1)
    assert (
        f"Error: The server is PostgreSQL {major}, and no pg_dump of that or a later version was found,"
        f" only 12.1 in {first}, 9.6.24 in {second}."
    ) in refused.stderr.splitlines()
    assert f"postgresql-client-{major}" in refused.stderr


def test_none_at_all_is_one_sentence(nowhere: Callable[..., list[Path]]) -> None:
    nowhere()
    with pytest.raises(MissingProgram, match=r"no pg_dump of that or a later version was found\.$"):
        programs.newest(16)


def test_the_newest_is_taken_wherever_it_is(
    nowhere: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = nowhere("16.13", "18.1", "17.9", "18.0")
    assert programs.newest(16) == (folders[1], "18.1")
    (tmp_path / "debian" / "19").mkdir(parents=True)
    folders[3].rename(tmp_path / "debian" / "19" / "bin")
    (tmp_path / "debian/19/bin/pg_dump").write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 19beta1 (Debian 19~1)'\n")
    assert programs.newest(16).version == "19beta1"
    # Debian's wrapper is any version; a pg_dump without pg_restore beside it is of no use; a folder of PATH that is not
    # absolute is another one in every directory.
    wrapper = tmp_path / "pg_wrapper"
    wrapper.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 99.9'\n")
    wrapper.chmod(0o755)
    for name, real in (("wrapped", wrapper), ("alone", folders[1] / "pg_dump")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pg_dump").symlink_to(real)
    (tmp_path / "wrapped/pg_restore").symlink_to(wrapper)
    (tmp_path / "here").mkdir()
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / "here" / name).symlink_to(wrapper.with_name("direct"))
    (tmp_path / "direct").write_bytes(wrapper.read_bytes())
    (tmp_path / "direct").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"here:{tmp_path / 'wrapped'}:{tmp_path / 'alone'}:{os.environ['PATH']}")
    assert programs.newest(16).version == "19beta1"
    monkeypatch.setenv("PATH", f"{tmp_path / 'here'}:{os.environ['PATH']}")
    assert programs.newest(16).version == "99.9"


def test_an_old_one_first_in_path_is_passed_over(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: programs.Tools
) -> None:
    one = run("full")
    (tmp_path / "old").mkdir()
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / "old" / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) 9.6.24'\n")
        (tmp_path / "old" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}:{os.environ['PATH']}")
    one.apply()
    assert [each["tool"] for each in one.made()] == [f"pg_dump {tools.version}"] * 2


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "policy", ["full", "governed", GOVERNED_TRIED, {"command": ["sh", "-c", "ps axww; env | grep ^PGPASS"]}], ids=str
)
def test_the_password_is_in_no_file_and_on_no_command_line(
    run: Callable[..., Run], instead: Callable[..., Path], tmp_path: Path, policy: Any
) -> None:
    one = run(policy)
    seen = tmp_path / "seen"
    instead(pg_dump=f"open('{seen}', 'a').write(repr((given, os.environ.get('PGPASSWORD'))) + chr(10)); real()")
    dsn = one.db.server.tcp(one.db.name)
    password = one.db.server.password
    done = one.apply(dsn=f"postgresql://postgres:{password}@127.0.0.1:{one.db.server.port}/{one.db.name}")
    assert password not in done.stdout + done.stderr
    for path in one.place.rglob("*"):
        assert not path.is_file() or password.encode() not in path.read_bytes(), path
    if seen.exists():
        assert conninfo_to_dict(dsn)["password"] == password
        for line in seen.read_text().splitlines():
            arguments, _, given = line.rpartition(", ")
            assert password not in arguments
            assert password in given
    if isinstance(policy, dict) and "command" in policy:
        assert all(each["said"][-1] == "PGPASSWORD=***" for each in one.made())


def test_a_failing_command_prints_no_secret(run: Callable[..., Run]) -> None:
    one = run({"command": ["sh", "-c", 'echo "could not reach $RECONCILER_DSN as $PGPASSWORD"; exit 3']})
    password = one.db.server.password
    refused = one.apply(1, dsn=one.db.server.tcp(one.db.name))
    assert "The backup command sh exited with 3." in refused.stderr
    assert "could not reach *** as ***" in refused.stderr
    assert password not in refused.stderr + refused.stdout


def test_a_key_with_a_password_is_refused(tools: programs.Tools) -> None:
    with pytest.raises(Exception, match="sslpassword"):
        programs.client(tools, "pg_dump", [], "host=nowhere sslpassword=hidden")


# -------------------------------------------------------------------------------------------------- what must not begin


def test_a_stale_plan_backs_nothing_up(run: Callable[..., Run], tmp_path: Path) -> None:
    one = run({"command": ["touch", str(tmp_path / "ran")]})
    one.system.sql("UPDATE app.settings SET value = 'maybe' WHERE name = 'shop.open'")
    refused = one.apply(4)
    assert "stale" in refused.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sh", "-c", "echo one; echo two >&2; exit 7"], "The backup command sh exited with 7."),
        (["sh", "-c", "kill -9 $$"], "The backup command sh was ended by SIGKILL."),
        (["/nowhere/at-all"], "The backup command /nowhere/at-all cannot be started: No such file or directory."),
        (["/etc/passwd"], "The backup command /etc/passwd cannot be started: Permission denied."),
    ],
)
def test_a_command_that_fails_before_blocks(run: Callable[..., Run], words: list[str], said: str) -> None:
    refused = run({"command": words}).apply(1)
    assert f"Error: {said}" in refused.stderr.splitlines()
    assert "Nothing was changed." in refused.stderr
    assert refused.stderr.count("  two") == ("two" in words[-1])


def test_what_fails_after_commit_is_a_problem_and_no_failure(run: Callable[..., Run]) -> None:
    one = run({"command": ["sh", "-c", 'test "$RECONCILER_BACKUP" = before']})
    done = one.apply()
    last = done.stdout.splitlines()[-1]
    assert last == "Applied, but: not backed up after the apply: The backup command sh exited with 1."
    assert [each["moment"] for each in one.made()] == ["before"]
    assert "There is none of after the apply." in (one.place / "report.md").read_text()
    one.system.in_sync()


def test_a_dump_that_fails_after_commit_leaves_no_file(run: Callable[..., Run], instead: Callable[..., Path]) -> None:
    one = run("full")
    instead(pg_dump="real()\nif 'after' in file.name:\n    sys.exit('pg_dump: error: the disk is gone')")
    done = one.apply()
    assert done.stdout.splitlines()[-1] == (
        "Applied, but: not backed up after the apply: pg_dump failed: the disk is gone."
    )
    assert sorted(path.name for path in one.place.glob("backup*")) == ["backup-before.dump"]


def _no_folder(_root: Path) -> None:
    return None


def _gone(root: Path) -> Path:
    return root / "gone"


def _not_writable(_root: Path) -> Path:
    return Path("/proc/self")


@pytest.mark.parametrize("policy", ["full", "governed"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        (_no_folder, "nobody said where to put it"),
        (_gone, "cannot be written to .*: No such file"),
        (_not_writable, "cannot be written to /proc/self: "),
    ],
    ids=["none", "missing", "not writable"],
)
def test_a_place_that_cannot_be_written_blocks(
    run: Callable[..., Run], tmp_path: Path, place: Callable[[Path], Path | None], said: str, policy: str
) -> None:
    one = run(policy)
    before = governed.image(one.db)
    record = applying.Record(silent)
    with pytest.raises(BackupFailed, match=said):
        applying.apply(one.system.request(one.system.plan(), folder=place(tmp_path)), record)
    assert governed.image(one.db) == before
    assert not record.begun


@pytest.mark.parametrize("policy", ["full", "governed"])
def test_a_full_disk_blocks(run: Callable[..., Run], policy: str, tmp_path: Path) -> None:
    """A limit on the size of files is a disk that every user can fill."""
    one = run(policy)
    before = governed.image(one.db)
    done = subprocess.run(
        [_program(), "apply", one.system.plan_file, "--initialize", "--evidence", one.place],
        env={**os.environ, "RECONCILER_DSN": one.db.dsn},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
    )
    said = {
        "full": "pg_dump was ended by SIGXFSZ.",
        "governed": f"The backup cannot be written to {one.place}: File too large.",
    }
    assert f"Error: {said[policy]}" in done.stderr.splitlines()
    assert done.returncode == 1
    assert governed.image(one.db) == before
    assert not one.place.exists()


def _program() -> Path:
    return Path(sysconfig.get_path("scripts")) / "reconciler"


def test_what_pg_dump_says_of_a_full_disk_is_the_sentence(
    run: Callable[..., Run], instead: Callable[..., Path]
) -> None:
    said = "could not write to file: No space left on device"
    instead(pg_dump=f"file.write_bytes(b'half'); sys.exit('pg_dump: error: {said}')")
    refused = run("full").apply(1)
    assert f"Error: pg_dump failed: {said}." in refused.stderr.splitlines()


def test_no_room_for_the_one_after_blocks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    one = run("full")
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        facts = list(real(path))
        facts[4] = 1  # f_bavail, in blocks
        return os.statvfs_result(facts)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    refused = one.apply(1)
    assert "There is no room in" in refused.stderr
    assert "for the backup after the apply" in refused.stderr


def test_a_table_that_somebody_holds_is_left_alone(run: Callable[..., Run]) -> None:
    one = run("full", lock_timeout="100ms", lock_retries=2)
    one.db.execute("CREATE TABLE app.held (x integer)")
    words = ("apply", one.system.plan_file, "--initialize", "--evidence", one.place)
    with psycopg.connect(one.db.dsn) as holder:
        holder.execute("LOCK TABLE app.held IN ACCESS EXCLUSIVE MODE")
        refused = command(*words, dsn=one.db.dsn)
    assert refused.returncode == 4
    assert "somebody holds a table that it must read" in refused.stderr
    assert refused.stderr.count("attempt ") == 2
    assert not one.place.exists()
    one.apply()


def test_what_the_role_may_not_read_blocks(db: Database, tmp_path: Path) -> None:
    one = Run(db, tmp_path, "full")
    role = db.role()
    one.system.sql(f"GRANT {{owner}}, {{caller}} TO {role}", "CREATE TABLE app.private (x integer)")
    db.execute(f"GRANT CREATE ON DATABASE {db.name} TO {role}")
    db.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA app TO {role}; REVOKE ALL ON app.private FROM {role}")
    one.ready()
    refused = one.apply(1, dsn=db.dsn_as(role))
    assert "permission denied for table private" in refused.stderr
    assert "pg_read_all_data" in refused.stderr
    db.execute(f"GRANT pg_read_all_data TO {role}")
    one.apply(dsn=db.dsn_as(role))


# --------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", ["full", "command"])
def test_an_interrupted_backup_leaves_no_process_and_no_file(
    run: Callable[..., Run], instead: Callable[..., Path], tmp_path: Path, form: str, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"
    # It has a child of its own, and does not end when it is asked to.
    body = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "if named:\n    file.write_bytes(b'half a dump')\n"
        f"pathlib.Path('{pids}.new').write_text(f'{{os.getpid()}} {{child.pid}}'); os.rename('{pids}.new', '{pids}')\n"
        "time.sleep(600)"
    )
    folder = instead(pg_dump=body)
    one = run("full" if form == "full" else {"command": [str(folder / "pg_dump"), "now"]})
    before = governed.image(one.db)
    with subprocess.Popen(
        [_program(), "apply", one.system.plan_file, "--initialize", "--evidence", one.place],
        env={**os.environ, "RECONCILER_DSN": one.db.dsn},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while not pids.exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("Interrupted: nothing was changed.")
    for pid in map(int, pids.read_text().split()):
        assert not _alive(pid)
    assert not one.place.exists()
    assert governed.image(one.db) == before


def _alive(pid: int) -> bool:
    """Does it still run? Whoever adopts it may not have buried it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_backup_after_commit_is_a_problem(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run("governed")
    whole = image.take

    def interrupted(conn: Any, *given: Any, **more: Any) -> Any:
        if one.system.entries():
            raise KeyboardInterrupt
        return whole(conn, *given, **more)

    monkeypatch.setattr(image, "take", interrupted)
    done = one.apply()
    assert "Applied, but: not backed up after the apply: interrupted" in done.stdout
    assert "not planned again" not in done.stdout
    assert sorted(path.name for path in one.place.glob("backup*")) == ["backup-before.json"]


def test_a_run_that_fails_later_keeps_its_backup(run: Callable[..., Run]) -> None:
    one = run("governed")
    one.system.sql(
        "CREATE FUNCTION app.no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$",
        "CREATE TRIGGER no BEFORE UPDATE ON app.settings FOR EACH ROW EXECUTE FUNCTION app.no()",
    )
    words = ("apply", one.system.plan_file, "--initialize", "--evidence", one.place)
    failed = command(*words, dsn=one.db.dsn)
    assert failed.returncode == 1
    assert [each["file"] for each in one.made()] == ["backup-before.json"]
    assert subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=one.place, check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------- one snapshot


def test_what_others_commit_during_the_dump_is_not_in_it(run: Callable[..., Run], instead: Callable[..., Path]) -> None:
    """And it is no reason to distrust the backup: what it is compared with was read in the same snapshot."""
    one = run(FULL_TRIED)
    body = (
        "subprocess.run(['{psql}', '-X', '-c', \"UPDATE app.settings SET description = 'meanwhile'\", *database])\n"
        "subprocess.run(['{psql}', '-X', '-c', \"INSERT INTO app.heartbeat VALUES ('late', 'x', now())\", *database])\n"
        "time.sleep(2)\nreal()"
    )
    folder = instead()
    database = "database = [given[given.index('--dbname') + 1]]\n"
    text = (folder / "pg_dump").read_text()
    changed = text.removesuffix("real()\n") + database + body.replace("{psql}", str(folder / "psql")) + "\n"
    (folder / "pg_dump").write_text(changed)
    # A database that ends idle transactions: the snapshot must outlive the dump all the same.
    one.db.execute(f"ALTER DATABASE {one.db.name} SET idle_in_transaction_session_timeout = '1s'")
    one.apply()
    made = one.made()
    assert made[0]["checked"][-1].endswith("all 3 governed objects are equal")
    listed = subprocess.run(
        [folder / "pg_restore", "--file=-", "--data-only", "--table=settings", one.place / "backup-before.dump"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "meanwhile" not in listed.stdout
    assert one.db.execute("SELECT count(*) FROM app.settings WHERE description = 'meanwhile'")[0][0] > 0


def test_a_long_backup_says_how_long_it_takes(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "EVERY", 0.05)
    done = run({"command": ["sleep", "2"]}).apply()
    assert re.search(r"backup: the command is running after \d s", done.stderr)


# ----------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("none", "Backup: none."),
        ("full", "Backup: the whole database by pg_dump, before and after."),
        ("governed", "Backup: what is governed, before and after."),
        (
            FULL_TRIED,
            "Backup: the whole database by pg_dump, restored on a scratch server to verify it, before and after.",
        ),
        ({"command": ["snap", "a b"]}, "Backup: by the command snap 'a b', before and after."),
    ],
    ids=["none", "full", "governed", "verified", "command"],
)
def test_a_plan_says_which_one_will_be_made(run: Callable[..., Run], policy: Any, said: str) -> None:
    one = run(policy)
    assert said in command("show", one.system.plan_file).stdout.splitlines()
    page = command("show", one.system.plan_file, "--format", "markdown").stdout
    assert f"- **Backup:** {said.removeprefix('Backup: ').removesuffix('.')}" in page.replace("&#46;", ".")


def test_the_installed_policy_decides(run: Callable[..., Run]) -> None:
    one = run("governed")
    one.apply()
    system = one.system
    first = system.plan().effects_digest
    system.state["governance"]["apply"]["backup"] = "none"
    system.write()
    plan = system.plan()
    assert plan.effects_digest != first
    assert plan.backup == "governed"
    assert plan.hazards == ("changes_policy",)
    done = system.apply(plan, folder=one.place.parent)
    assert [made.moment for made in done.backups] == ["before", "after"]
    system.state["gates"]["shop.limit"]["value"] = "11"
    again = system.write().plan()
    assert again.backup == "none"
    assert system.apply(again).backups == ()
    system.in_sync()


@pytest.mark.parametrize(
    "policy",
    [
        "fully",
        "None",
        {"kind": "full"},
        {"verify": "restore"},
        {"command": []},
        {"command": "pg_dump"},
        {"kind": "none", "verify": "restore"},
        [],
        1,
    ],
    ids=str,
)
def test_another_policy_is_a_problem_with_a_place(db: Database, tmp_path: Path, policy: Any) -> None:
    system = shop(db, tmp_path, {"backup": policy})
    with pytest.raises(InputError) as refused:
        desired.load(system.directory, None)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].line is not None


def test_an_outcome_without_backups_is_still_read(run: Callable[..., Run]) -> None:
    one = run("none")
    one.apply()
    found = json.loads((one.place / "evidence.json").read_text())
    assert found["backups"] == []
    fields = {name: value for name, value in found.items() if name in Outcome.model_fields and name != "backups"}
    assert Outcome.model_validate_json(json.dumps(fields)).backups == ()
    assert "None: the policy asks for none." in (one.place / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------- through a pooler


@pytest.mark.parametrize(("mode", "code"), [("session", 0), ("transaction", 1)])
def test_pg_dump_leaves_nothing_in_a_session_of_the_application(
    run: Callable[..., Run], run_directory: Path, mode: str, code: int
) -> None:
    one = run("full")
    home = run_directory / f"{one.db.name}_pooler"
    with pooler.running(home, one.db.server, ["postgres"], {"pool_mode": mode}) as pooled:
        dsn = pooled.dsn(one.db.name)
        done = one.apply(code, dsn=dsn)
        assert ("pg_dump needs a session of its own" in done.stderr) is bool(code)
        with psycopg.connect(dsn, autocommit=True) as conn:
            left = conn.execute(
                "SELECT current_setting('search_path'), count(*) FROM pg_prepared_statements"
            ).fetchall()
        assert left == [('"$user", public', 0)]


def test_a_pool_without_a_spare_session_is_not_waited_for(
    run: Callable[..., Run], run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg, "SPARE", 0.5)
    one = run("full")
    home = run_directory / f"{one.db.name}_pooler"
    settings = {"pool_mode": "transaction", "default_pool_size": "1"}
    with pooler.running(home, one.db.server, ["postgres"], settings) as pooled:
        assert "pg_dump needs a session of its own" in one.apply(1, dsn=pooled.dsn(one.db.name)).stderr
