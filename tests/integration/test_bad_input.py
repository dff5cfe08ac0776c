"""Through the command, as a stranger would: bad files, bad usage, damaged plans, what the database does not allow.

Each gives one report with the exit code of DESIGN's list, no traceback, and changes nothing.
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import secrets
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests import states
from tests.servers import PROJECT

if TYPE_CHECKING:
    from tests.conftest import Command
    from tests.servers import Database

GATE = {
    "governance.yaml": states.GOVERNANCE,
    "gates.yaml": 'gates:\n  app.a: {value: "on", from: ["off"], safe: "off", lock: approval, reason: r}\n',
}
TABLES = """
    CREATE TABLE public.settings (name text PRIMARY KEY, value text);
    CREATE TABLE public.workers (name text PRIMARY KEY, beats bigint NOT NULL DEFAULT 0, last_seen timestamptz);
    CREATE TABLE public.cursors (name text PRIMARY KEY, at timestamptz);
    INSERT INTO public.settings VALUES ('app.a', 'off');
"""
KEYS = [
    "format_version", "outcome", "tool", "created_at", "expires_at", "state", "target", "setup", "changes", "drift",
    "findings", "invariants", "proofs", "surface", "not_compared", "summary", "effects_digest", "effect_digest",
]  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A small state that validates, with one gate to change."""
    return states.write(tmp_path / "state", GATE)


@pytest.fixture
def small(db: Database) -> Database:
    """The database that goes with it."""
    db.execute(TABLES)
    return db


def refused(done: subprocess.CompletedProcess[str], code: int) -> list[str]:
    """The lines of a refusal on stderr: the exit code is right and nothing looks like a crash."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr.splitlines()


def everything(db: Database) -> list[Any]:
    """What an apply could have written: the rows with their versions, and every schema and routine."""
    return [
        db.execute("SELECT xmin::text, s::text FROM public.settings AS s ORDER BY 2"),
        db.execute("SELECT xmin::text, w::text FROM public.workers AS w ORDER BY 2"),
        db.execute("SELECT nspname FROM pg_namespace ORDER BY 1"),
        db.execute("SELECT count(*), max(oid) FROM pg_proc"),
    ]


# ----------------------------------------------------------------------------------------------------------- the files


ANCHORS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + number)}: &{chr(98 + number)} [{', '.join(['*' + chr(97 + number)] * 10)}]\n" for number in range(20)
)

SOURCES: dict[str, tuple[str | bytes, list[str]]] = {
    "SQL that does not parse": (
        "CREATE FUNCTION public.fn_one(p_limit integer) RETURNS integer\nLANGUAGE sql AZ 'SELECT 1';",
        ["functions/fn_one.sql:2:14: syntax error"],
    ),
    "a body that does not parse": (
        states.SQL.replace("    RETURN p_limit;", "    IF p_limit THEN\n        RETRUN p_limit;\n    END IF;"),
        ["functions/fn_one.sql:7: "],
    ),
    "several statements": (
        states.SQL + "DROP TABLE public.settings;\n",
        ["functions/fn_one.sql:9:1: exactly one statement"],
    ),
    "no statement": ("-- nothing\n", ["functions/fn_one.sql:1:1: there is no statement here"]),
    "another statement": (
        "DROP TABLE public.settings;",
        ["functions/fn_one.sql:1:1: a CREATE FUNCTION or CREATE PROCEDURE"],
    ),
    "another signature": (
        states.SQL.replace("p_limit integer DEFAULT 5", "p_limit bigint"),
        ["functions.yaml:2:3: STATE/functions/fn_one.sql creates public.fn_one(bigint), not public.fn_one(integer)"],
    ),
    "another name": (
        states.SQL.replace("fn_one", "fn_two"),
        ["functions.yaml:2:3: STATE/functions/fn_one.sql creates public.fn_two(integer), not public.fn_one(integer)"],
    ),
    "no schema": (
        states.SQL.replace("public.fn_one", "fn_one"),
        ["functions/fn_one.sql:1:1: fn_one must be named with its schema"],
    ),
    "not UTF-8": (
        states.SQL.encode() + b"-- \xe9\n",
        ["functions.yaml:3:13: STATE/functions/fn_one.sql:9:4: is not UTF-8"],
    ),
    "a NUL byte": (
        states.SQL.encode() + b"-- \0\n",
        ["functions.yaml:3:13: STATE/functions/fn_one.sql:9:4: contains a NUL"],
    ),
    "a path that is not pinned": (
        states.SQL.replace("SET search_path = pg_catalog, public, pg_temp", "SECURITY DEFINER"),
        ["functions.yaml:3:13: SECURITY DEFINER must pin its path with pg_temp last"],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_source_file(tmp_path: Path, called: Command, name: str) -> None:
    content, expected = SOURCES[name]
    states.write(tmp_path / "state", {**states.STATE, "functions/fn_one.sql": content})
    lines = refused(called("validate", check=False, cwd=tmp_path), 1)
    found = [line.removeprefix("state/").replace("state/functions/", "STATE/functions/") for line in lines]
    assert len(found) == len(expected) + 1
    for line, start in zip(found, expected, strict=False):
        assert line.startswith(start)
    assert lines[-1] == "Error: 1 problem in the input."


def test_sources_outside_of_the_directory(tmp_path: Path, called: Command) -> None:
    outside = tmp_path / "outside.sql"
    outside.write_text(states.SQL)
    text = "functions:\n" + "".join(
        f"  public.fn_{number}(): {{owner: o, source: {source}}}\n"
        for number, source in enumerate(
            ["../outside.sql", str(outside), "link.sql", "none.sql", "folder", "circle.sql"]
        )
    )
    directory = states.write(tmp_path / "state", {"governance.yaml": states.GOVERNANCE, "functions.yaml": text})
    (directory / "link.sql").symlink_to(outside)
    (directory / "circle.sql").symlink_to("circle.sql")
    (directory / "folder").mkdir()
    lines = refused(called("validate", check=False, cwd=tmp_path), 1)
    assert [line.split(": ", 2)[2] for line in lines[:3]] == [
        "lies outside the state directory (links resolved): copy it into it"
    ] * 3
    assert [line.split(": ", 2)[2] for line in lines[3:6]] == [
        "does not exist",
        "is not a regular file",
        "is a link that leads back to itself",
    ]
    assert [line.split(": ")[0] for line in lines[:6]] == [
        f"state/functions.yaml:{number}:{len('  public.fn_0(): {owner: o, source: ') + 1}" for number in range(2, 8)
    ]


YAML: dict[str, tuple[dict[str, str | bytes | None], str]] = {
    "an unknown key": (
        {"gates.yaml": "gates:\n  app.a: {valeu: x, value: y, reason: r}\n"},
        'gates.yaml:2:11: unknown key "valeu" (did you mean "value"?)',
    ),
    "an unknown section": ({"a.yaml": "gatse: {}\n"}, "a.yaml:1:1: unknown section 'gatse'; did you mean 'gates'?"),
    "a duplicate key": (
        {"gates.yaml": "gates:\n  app.a: {value: x, reason: r}\n\n  app.a: {value: x, reason: r}\n"},
        'gates.yaml:4:3: duplicate key "app.a": already at state/gates.yaml:2:3',
    ),
    "a duplicate address": (
        {"sub/more.yaml": "gates:\n  app.a: {value: x, reason: r}\n"},
        "sub/more.yaml:2:3: gates.app.a is already declared at state/gates.yaml:2:3",
    ),
    "a wrong type": (
        {"gates.yaml": "gates:\n  app.a: {value: true, reason: r}\n"},
        'gates.yaml:2:18: expected a quoted string, got the boolean true: write "true"',
    ),
    "a section of a wrong type": (
        {"gates.yaml": "gates: [a]\n"},
        "gates.yaml:1:8: section 'gates' must be a mapping of names to entries",
    ),
    "anchors": ({"a.yaml": ANCHORS}, "a.yaml:1:4: anchors (&), aliases (*) and merge keys (<<) are not part"),
    "50 MB of anchors": ({"a.yaml": ANCHORS * (50_000_000 // len(ANCHORS))}, "a.yaml: is larger than 16 MiB"),
    "not UTF-8": ({"a.yaml": b"gates: {}\n# \xff\n"}, "a.yaml:2:3: is not UTF-8: byte 0xff cannot stand here"),
    "UTF-16": ({"a.yaml": "gates: {}".encode("utf-16")}, "a.yaml:1:1: is UTF-16: save it as UTF-8"),
    "no YAML": ({"a.yaml": "gates: [\n"}, "a.yaml:2:1: a value is missing here"),
    "a bidi character": ({"a.yaml": "gates: {} # \u202e\n"}, "a.yaml:1:13: the character U+202E"),
    "an escape sequence": ({"a.yaml": "gates: {} # \x1b[2J\n"}, "a.yaml:1:13: the character U+001B"),
    "another suffix": ({"a.yml": "gates: {}\n"}, "a.yml: only *.yaml is read: rename it, so that nothing goes unseen"),
    "no governance": ({"governance.yaml": None}, ": no file has the section `governance`"),
    "an unknown variable": (
        {"i.yaml": "invariants:\n  i: {extensions: {exactly: {var: none}}}\n"},
        "i.yaml:2:20: there is no variable 'none' (governance.vars and the target's: none)",
    ),
    "an unknown gate of a function": (
        {
            "f.yaml": "functions:\n  public.fn_one(integer): {source: f.sql, owner: o, gates: [app.b]}\n",
            "f.sql": states.SQL,
        },
        "f.yaml:2:61: gate 'app.b' is not declared; did you mean 'app.a'?",
    ),
    "a locked gate that is armed": (
        {"gates.yaml": "gates:\n  app.a: {value: 'on', safe: 'off', lock: locked, reason: r}\n"},
        "gates.yaml:2:18: a locked gate may hold only its safe value 'off', not 'on'",
    ),
    "a value that is not in order": (
        {"gates.yaml": "gates:\n  app.a: {value: c, order: [a, b], reason: r}\n"},
        "gates.yaml:2:18: 'c' is not in `order`",
    ),
    "EXECUTE for PUBLIC": (
        {
            "f.yaml": "functions:\n  public.fn_one(integer): {source: f.sql, owner: o, execute: [PUBLIC]}\n",
            "f.sql": states.SQL,
        },
        "f.yaml:2:62: EXECUTE for PUBLIC needs `waive:",
    ),
    "an undeclared store": (
        {"gates.yaml": "gates:\n  app.a: {value: x, store: other, reason: r}\n"},
        "gates.yaml:2:28: gate store 'other' is not declared (governance.gate_stores: settings)",
    ),
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_state_file(tmp_path: Path, state: Path, called: Command, name: str) -> None:
    files, expected = YAML[name]
    states.write(state, files)
    lines = refused(called("validate", check=False, cwd=tmp_path), 1)
    assert lines[0].removeprefix("state").removeprefix("/").startswith(expected)
    assert lines[1:] == ["Error: 1 problem in the input."]


HOSTILE = [
    "DELETE FROM public.settings",
    "SELECT 1; SELECT 2",
    "SELECT 1;",
    "",
    "SELECT pg_catalog.pg_sleep(10)",
    "SELECT pg_catalog.pg_terminate_backend(1)",
    "SELECT pg_catalog.set_config('statement_timeout', '0', true)",
    "SELECT pg_catalog.query_to_xml('DELETE FROM public.settings', true, true, '')",
    "SELECT pg_catalog.pg_advisory_lock(1)",
    "SELECT pg_catalog.pg_read_file('/etc/passwd')",
    "SELECT public.anything()",
    "SELECT s.value FROM settings AS s",
    "SELECT s.value FROM public.settings AS s FOR UPDATE",
    "SELECT s.value INTO public.x FROM public.settings AS s",
    "WITH d AS (DELETE FROM public.settings RETURNING value) SELECT d.value FROM d",
    "COPY public.settings TO PROGRAM 'sh'",
    "SELECT 1) AS q; DROP TABLE public.settings; --",
    "SELECT 1 /*",
    "EXPLAIN ANALYZE SELECT 1",
    "SELECT nextval('public.s')",
    "SELECT p.rolpassword FROM pg_catalog.pg_authid AS p",
]


def test_hostile_queries_are_refused_offline_wherever_they_stand(tmp_path: Path, called: Command) -> None:
    quoted = [json.dumps(query) for query in HOSTILE]
    marker = "table: public.workers, key: {name: x}"
    files = {
        "governance.yaml": states.GOVERNANCE,
        "i.yaml": "invariants:\n" + "".join(f"  i{n}: {{query: {q}, rows: 0}}\n" for n, q in enumerate(quoted)),
        "m.yaml": "markers:\n"
        + "".join(f"  m{n}: {{{marker}, bind: {{c: {{query: {q}}}}}}}\n" for n, q in enumerate(quoted)),
        "p.yaml": "markers:\n"
        + "".join(f"  p{n}: {{{marker}, passive_while: {json.dumps(f'({q}) = 1')}}}\n" for n, q in enumerate(HOSTILE)),
    }
    states.write(tmp_path / "state", files)
    lines = refused(called("validate", check=False, cwd=tmp_path), 1)
    places = [line.split(": ")[0] for line in lines[:-1]]
    for file in ("i", "m", "p"):
        missed = [
            HOSTILE[n]
            for n in range(len(HOSTILE))
            if not any(p.startswith(f"state/{file}.yaml:{n + 2}:") for p in places)
        ]
        assert missed == []


def test_every_problem_of_every_file_comes_at_once_and_in_order(
    tmp_path: Path, called: Command, small: Database
) -> None:
    files: dict[str, str | bytes | None] = {
        "a.yaml": "gates:\n  app.x: {value: 1, reason: r}\n  app.y: {reason: r}\n",
        "b.yaml": "gates: {app.a: {value: x, reason: r}}\n",
        "c.yaml": b"\xff",
        "d.yml": "",
        "e.yaml": "invariants: {i: {query: DROP TABLE x, rows: 0}}\n",
        "f.yaml": "functions: {f(): {source: none.sql, owner: o}}\n",
        "g.yaml": "gates: [\n",
        "h.yaml": "something: else\n",
    }
    states.write(tmp_path / "state", {**GATE, **files})
    before = everything(small)
    lines = refused(called("validate", check=False, cwd=tmp_path), 1)
    assert [re.split(r":\d|: ", line)[0] for line in lines[:-1]] == [
        *["state/a.yaml"] * 2,
        "state/c.yaml",
        "state/d.yml",
        "state/e.yaml",
        *["state/f.yaml"] * 2,
        "state/g.yaml",
        "state/gates.yaml",
        "state/h.yaml",
    ]
    assert lines[-1] == "Error: 10 problems in the input."
    for command in ("plan", "drift"):
        assert refused(called(command, "--dsn", small.dsn, check=False, cwd=tmp_path), 1) == lines
    done = called("validate", "--format", "json", check=False, cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["outcome"] == "error"
    assert document["errors"] == lines[:-1]
    assert everything(small) == before


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda _: None, "There is no state directory state."),
        (lambda path: path.mkdir(), "no *.yaml file here; `reconciler init` writes a directory to start from"),
        (lambda path: path.write_text("x"), "There is no state directory state."),
        (lambda path: states.write(path, {"README.md": "x"}), "no *.yaml file here"),
    ],
)
def test_a_directory_that_is_none(tmp_path: Path, called: Command, make: Any, expected: str) -> None:
    make(tmp_path / "state")
    assert expected in refused(called("validate", check=False, cwd=tmp_path), 1)[0]


# ----------------------------------------------------------------------------------------------------------- the usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["plan", "--nothing"],
        ["plan", "more"],
        ["plan", "--format", "xml"],
        ["plan", "-t", "nobody"],
        ["plan", "--dsn", "postgresql://%zz"],
        ["plan", "--dsn", "host=/nowhere"],
        ["plan", "--out", "."],
        ["drift", "--fail-on", "nothing"],
        ["drift", "--dsn", "nothing=1"],
        ["approve"],
        ["approve", "none.plan"],
        ["approve", "none.plan", "--as", "a", "--reason", "b"],
        ["apply", "none.plan"],
        ["apply", "state"],
        ["show", "none.plan"],
        ["show", "state/gates.yaml"],
        ["init", "state"],
        ["ledger"],
        ["validate", "-t", "nobody"],
        ["validate", "-s", "\udcff"],
        ["validate", "-t", "\udcff"],
        ["show", "\udcff"],
    ],
    ids=lambda arguments: " ".join(arguments).encode("ascii", "backslashreplace").decode(),
)
def test_bad_usage_is_an_error_and_never_looks_like_changes(
    tmp_path: Path, state: Path, called: Command, arguments: list[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = called(*arguments, check=False, cwd=tmp_path, env={"PGHOST": str(tmp_path), "PGCONNECT_TIMEOUT": "2"})
    refused(done, 1)
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert state.is_dir()


def test_an_error_is_a_json_document_when_json_was_asked_for(tmp_path: Path, state: Path, called: Command) -> None:
    del state
    done = called("plan", "--format=json", "-t", "mian", check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "format_version": "1.0",
        "outcome": "error",
        "errors": ["There is no target 'mian'."],
        "hint": "Did you mean 'main'?",
    }


# ------------------------------------------------------------------------------------------------------ saved documents


@pytest.fixture
def plan_file(tmp_path: Path, state: Path, small: Database, called: Command) -> Path:
    """A saved plan with one change."""
    del state
    called("plan", "--dsn", small.dsn, "--out", "a.plan", cwd=tmp_path)
    return tmp_path / "a.plan"


ACCEPT = ["--accept", "arms_gate", "--accept", "moves_from_safe"]


def test_a_damaged_plan_is_refused_by_every_command(plan_file: Path, small: Database, called: Command) -> None:
    data = plan_file.read_bytes()
    chance = random.Random(4711)
    before = everything(small)
    for number in range(12):
        at = chance.randrange(len(data))
        byte = bytes([data[at] ^ (1 << chance.randrange(7))])
        plan_file.write_bytes(data[:at] + byte + data[at + 1 :])
        arguments = [
            ["show", plan_file],
            ["approve", plan_file, "--as", "a", "--reason", "b", *ACCEPT],
            ["apply", plan_file, "--dsn", small.dsn, "--initialize"],
        ][number % 3]
        lines = refused(called(*arguments, check=False), 1)
        assert re.search(r"was changed after it was written|is no plan|has format", lines[0]), (at, lines)
    assert everything(small) == before
    assert [path.name for path in plan_file.parent.iterdir() if "approval" in path.name] == []


def test_a_plan_is_no_approval_and_an_approval_no_plan(plan_file: Path, small: Database, called: Command) -> None:
    called("approve", plan_file, "--as", "jo", "--reason", "r", *ACCEPT)
    approval = plan_file.with_name("a.plan.jo.approval.json")
    before = everything(small)
    for arguments, what in (
        (["apply", plan_file, "--approval", plan_file, "--initialize"], "is no approval"),
        (["apply", approval, "--initialize"], "is no plan"),
    ):
        assert what in refused(called(*arguments, "--dsn", small.dsn, check=False), 1)[0]
    assert "is no plan" in refused(called("approve", approval, "--as", "b", "--reason", "r", check=False), 1)[0]
    assert everything(small) == before
    assert json.loads(called("show", approval, "--format", "json").stdout)["approver"] == "jo"
    assert "gate.app.a" in called("show", plan_file).stdout


def test_a_damaged_approval_is_refused(plan_file: Path, small: Database, called: Command) -> None:
    called("approve", plan_file, "--as", "jo", "--reason", "r", *ACCEPT)
    approval = plan_file.with_name("a.plan.jo.approval.json")
    approval.write_text(approval.read_text().replace('"jo"', '"me"'))
    before = everything(small)
    lines = refused(called("apply", plan_file, "--dsn", small.dsn, "--initialize", check=False), 1)
    assert "was changed after it was written" in lines[0]
    assert everything(small) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "jo", "--reason", "r"], "Hazards not accepted: arms_gate, moves_from_safe."),
        (["--as", "jo", "--reason", "r", *ACCEPT, "--accept", "retires"], "The plan has no hazard retires."),
        (["--as", "jo", "--reason", " ", *ACCEPT], "An approval needs a name and a reason."),
        (["--as", "jo", "--reason", "r", *ACCEPT, "--expires", "soon"], "--expires: 'soon' is no duration"),
        (["--as", "jo", "--reason", "r", *ACCEPT, "--expires", "9d"], "--expires 9d is longer than the policy's 24h."),
        (["--as", "../jo", "--reason", "r", *ACCEPT], "'../jo' cannot be part of a file name."),
        (["--as", "jo", "--reason", "r", *ACCEPT, "--out", "none/a.json"], "Cannot write none/a.json: No such file"),
        (["--as", "jo", "--reason", "\udcff", *ACCEPT], "is not UTF-8"),
        (["--as", "\udcff", "--reason", "r", *ACCEPT, "--out", "x.json"], "is not UTF-8"),
    ],
)
def test_an_approval_that_is_not_given(plan_file: Path, called: Command, options: list[str], message: str) -> None:
    folder = plan_file.parent
    done = called("approve", plan_file, *options, check=False, cwd=folder)
    assert message in refused(done, 4 if message.startswith("Hazards") else 1)[0]
    assert [path.name for path in folder.iterdir() if path.suffix == ".json"] == []


@pytest.mark.parametrize("out", ["none/a.plan", "state/gates.yaml/a.plan"])
def test_a_plan_that_cannot_be_written(tmp_path: Path, state: Path, small: Database, called: Command, out: str) -> None:
    before = sorted(state.rglob("*"))
    lines = refused(called("plan", "--dsn", small.dsn, "--out", out, check=False, cwd=tmp_path), 1)
    assert lines[0].startswith(f"Error: Cannot write {out}: ")
    assert sorted(state.rglob("*")) == before


def test_nothing_is_left_of_a_plan_that_an_invariant_blocks(
    tmp_path: Path, state: Path, small: Database, called: Command
) -> None:
    states.write(state, {"i.yaml": "invariants: {i: {extensions: {exactly: []}}}\n"})
    done = called("plan", "--dsn", small.dsn, "--out", "a.plan", check=False, cwd=tmp_path)
    assert "Not written: a.plan. An invariant blocks this plan." in refused(done, 3)
    assert not (tmp_path / "a.plan").exists()


# ------------------------------------------------------------------------------------- what the database does not allow


def test_everything_that_the_live_state_forbids_is_named_at_once(
    tmp_path: Path, state: Path, small: Database, called: Command
) -> None:
    small.execute("""
        INSERT INTO public.settings VALUES ('app.phase', 'third'), ('app.null', NULL);
        INSERT INTO public.cursors VALUES ('a', '2020-01-01'), ('b', '2020-01-01'), ('null', NULL);
        UPDATE public.settings SET value = 'maybe' WHERE name = 'app.a'
    """)

    def marker(name: str, condition: str) -> str:
        query = f"SELECT c.at FROM public.cursors AS c WHERE {condition}"
        bind = f"{{last_seen: {{query: {json.dumps(query)}}}}}"
        return f"  {name}: {{table: public.workers, key: {{name: {name}}}, bind: {bind}}}\n"

    markers = [("zero", "false"), ("two", "c.at IS NOT NULL"), ("none", "c.at IS NULL"), ("one", "c.name = 'a'")]
    states.write(
        state,
        {
            "m.yaml": "markers:\n" + "".join(marker(name, condition) for name, condition in markers),
            "g.yaml": "gates:\n  app.phase: {value: second, order: [first, second, third], reason: r}\n",
        },
    )
    before = everything(small)
    done = called("plan", "--dsn", small.dsn, "--out", "a.plan", check=False, cwd=tmp_path)
    one = "it must give exactly one value"
    assert refused(done, 4) == [
        "Error: The live database does not allow what the files want.",
        "  gate.app.a (state/gates.yaml:2:3): the live value is 'maybe'; `from` allows only 'off'",
        "  gate.app.phase (state/g.yaml:2:3): 'third' would move back to 'second'; `order` never moves back",
        f"  marker.none (state/m.yaml:4:3): the query bound to last_seen gives NULL; {one}",
        f"  marker.two (state/m.yaml:3:3): the query bound to last_seen gives more than one row; {one}",
        f"  marker.zero (state/m.yaml:2:3): the query bound to last_seen gives no row; {one}",
        "Nothing was changed. Correct the files, or find out who changed the database and why.",
    ]
    assert not (tmp_path / "a.plan").exists()
    document = json.loads(called("plan", "--dsn", small.dsn, "--format", "json", check=False, cwd=tmp_path).stdout)
    assert (document["outcome"], len(document["errors"])) == ("stale", 6)
    assert everything(small) == before


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DROP TABLE public.settings", "gate store settings: there is no table public.settings in this database."),
        (
            "ALTER TABLE public.settings DROP CONSTRAINT settings_pkey",
            "gate store settings: table public.settings has no unique",
        ),
        (
            "ALTER TABLE public.settings RENAME value TO val",
            "gate store settings: table public.settings has no column value.",
        ),
    ],
)
def test_a_database_that_is_another(
    tmp_path: Path, state: Path, small: Database, called: Command, sql: str, message: str
) -> None:
    del state
    small.execute(sql)
    for command in ("plan", "drift"):
        lines = refused(called(command, "--dsn", small.dsn, check=False, cwd=tmp_path), 1)
        assert lines[0].startswith(f"Error: {message}")


def test_a_schema_that_only_has_the_name_of_the_ledger(
    tmp_path: Path, state: Path, small: Database, called: Command
) -> None:
    del state
    small.execute("CREATE SCHEMA reconciler")
    for command in ("plan", "drift"):
        lines = refused(called(command, "--dsn", small.dsn, check=False, cwd=tmp_path), 4)
        assert lines[0] == "Error: Schema reconciler exists, but it is not the ledger of this program."


def test_a_target_that_is_another_database(tmp_path: Path, state: Path, small: Database, called: Command) -> None:
    text = states.GOVERNANCE.replace("{main: {}}", "{main: {database: production}}")
    states.write(state, {"governance.yaml": text})
    lines = refused(called("plan", "--dsn", small.dsn, check=False, cwd=tmp_path), 1)
    assert lines[0] == f"Error: Target main is database production, but this connection is to {small.name}."


# --------------------------------------------------------------------------------------------- what other programs read


def test_plan_as_json_has_every_key_that_is_promised(
    tmp_path: Path, state: Path, small: Database, called: Command
) -> None:
    del state
    document = json.loads(called("plan", "--dsn", small.dsn, "--format", "json", cwd=tmp_path).stdout)
    assert [key for key in KEYS if key not in document] == []
    assert (document["format_version"], document["outcome"]) == ("1.0", "changes")
    assert sorted(document["state"]) == ["name", "release", "source_digest"]
    assert sorted(document["target"]) == ["database", "name", "server_version", "system_identifier"]
    assert isinstance(document["target"]["system_identifier"], str)
    assert document["target"]["database"] == small.name
    assert document["summary"] == {"add": 0, "change": 1, "remove": 0, "forget": 0, "drift": 0, "findings": 0}
    for change in (*document["setup"], *document["changes"]):
        promised = {"address", "kind", "actions", "before", "after", "fields", "reason", "hazards", "statements"}
        assert promised <= set(change)
    assert [change["address"] for change in document["changes"]] == ["gate.app.a"]
    assert re.fullmatch(r"[0-9a-f]{64}", document["effects_digest"])
    assert re.fullmatch(r"[0-9a-f]{64}", document["effect_digest"])


def test_validate_as_json(tmp_path: Path, state: Path, called: Command) -> None:
    del state
    done = called("validate", "--format", "json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"format_version": "1.0", "outcome": "no_changes", "errors": []}


def test_detailed_exit_codes(tmp_path: Path, state: Path, small: Database, called: Command) -> None:
    del state
    assert called("plan", "--dsn", small.dsn, cwd=tmp_path).returncode == 0
    done = called("plan", "--dsn", small.dsn, "--detailed-exitcode", "--out", "a.plan", check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Plan: 0 to add, 1 to change, 0 to remove." in done.stdout.splitlines()
    called("approve", "a.plan", "--as", "jo", "--reason", "r", *ACCEPT, cwd=tmp_path)
    called("apply", "a.plan", "--dsn", small.dsn, "--initialize", cwd=tmp_path)
    done = called("plan", "--dsn", small.dsn, "--detailed-exitcode", "--out", "b.plan", cwd=tmp_path)
    assert "No changes. The database matches the desired state." in done.stdout.splitlines()
    for form, expected in (("text", "No changes."), ("json", '"outcome": "no_changes"')):
        done = called("apply", "b.plan", "--dsn", small.dsn, "--format", form, cwd=tmp_path)
        assert expected in done.stdout
    assert (
        "nothing to approve"
        in refused(called("approve", "b.plan", "--as", "jo", "--reason", "r", check=False, cwd=tmp_path), 1)[0]
    )


def terminal(arguments: list[str | Path], folder: Path, **env: str) -> bytes:
    """What the command writes to a terminal."""
    program = Path(sysconfig.get_path("scripts")) / "reconciler"
    ours, theirs = pty.openpty()
    base = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    with subprocess.Popen(
        [program, *arguments],
        cwd=folder,
        env={**base, "TERM": "xterm", **env},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as running:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not piece:
                break
            written += piece
        os.close(ours)
        assert running.wait(60) == 0
    return written


def test_colours_on_a_terminal_unless_they_are_not_wanted(plan_file: Path) -> None:
    show, folder = ["show", plan_file], plan_file.parent
    assert b"\x1b[33m  ~ gate.app.a" in terminal(show, folder)
    assert b"\x1b[33m" in terminal(show, folder, NO_COLOR="")  # empty is as good as not there (no-color.org)
    for written in (
        terminal([*show, "--no-color"], folder),
        terminal(show, folder, NO_COLOR="1"),
        terminal(show, folder, TERM="dumb"),
    ):
        assert b"~ gate.app.a" in written
        assert b"\x1b" not in written


def test_no_colours_into_a_pipe(plan_file: Path, cli: Command) -> None:
    assert "\x1b" not in cli("show", plan_file, env={"TERM": "xterm"}).stdout


# -------------------------------------------------------------------------------------------------------- from nothing


def test_what_init_writes_can_be_applied(tmp_path: Path, db: Database, called: Command) -> None:
    """init, validate, the tables of its README, plan, approve, apply, plan again: empty."""
    called("init", "state", cwd=tmp_path)
    assert "The state is valid." in called("validate", cwd=tmp_path).stdout
    roles = {name: f"{name}_{secrets.token_hex(4)}" for name in ("app_owner", "app_worker")}
    for path in (tmp_path / "state").rglob("*"):
        if path.is_file():  # the server is shared, and so are its roles
            path.write_text(re.sub("app_owner|app_worker(?!s)", lambda match: roles[match[0]], path.read_text()))
    example = re.search(r"```sql\n(.*?)```", (tmp_path / "state" / "README.md").read_text(), re.DOTALL)
    assert example is not None
    db.execute(example[1])
    try:
        called("plan", "--dsn", db.dsn, "--out", "a.plan", cwd=tmp_path)
        made = json.loads((tmp_path / "a.plan").read_text())
        assert made["summary"]["add"] == 4
        hazards = sorted({hazard for change in made["changes"] for hazard in change["hazards"]})
        accept = [word for hazard in hazards for word in ("--accept", hazard)]
        called("approve", "a.plan", "--as", "jo", "--reason", "first", *accept, cwd=tmp_path)
        done = called("apply", "a.plan", "--dsn", db.dsn, "--initialize", cwd=tmp_path)
        assert done.stdout.startswith("Apply complete! 4 added, 0 changed, 0 removed.\n")
        assert "No changes." in called("plan", "--dsn", db.dsn, "--detailed-exitcode", cwd=tmp_path).stdout
        assert db.execute("SELECT public.fn_sessions_purge(1) ->> 'reason'") == [("sessions.purge_enabled=false",)]
    finally:
        db.drop()
        with psycopg.connect(db.server.dsn(), autocommit=True) as conn:
            for role in roles.values():
                conn.execute(f"DROP ROLE IF EXISTS {role}".encode())


def test_the_schema_is_printed_as_json(called: Command) -> None:
    document = json.loads(called("schema").stdout)
    assert document["$schema"].startswith("https://json-schema.org/")
    sections = ["functions", "gates", "governance", "invariants", "markers", "pins", "proofs", "surface"]
    assert sorted(document["properties"]) == sections


def test_help_imports_nothing_slow() -> None:
    program = Path(sysconfig.get_path("scripts")) / "python"
    code = (
        "import sys\nfrom reconciler.cli import main\nsys.argv = ['reconciler', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print(sorted({'psycopg', 'deepdiff', 'pydantic', 'postgast'} & sys.modules.keys()))"
    )
    done = subprocess.run([program, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
