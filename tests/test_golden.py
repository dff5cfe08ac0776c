"""Every folder of tests/golden is a case: a database, a state, and everything that the commands say about them.

    before.sql    makes the database; the roles golden_owner, golden_caller and golden_other are there
    earlier/      a state that was applied before, if there is one
    between.sql   what somebody did by hand after that
    state/        the state that is planned, approved, applied and planned again
    environment   variables of all commands, NAME=value, one a line; no value of one may be printed
    change.sql    what somebody did by hand after the apply: then drift, plan and apply run again
    expected/     what was printed, and exit-codes.txt; written by `pytest tests/test_golden.py --update-golden`

What differs from run to run and from server to server is replaced by a word in capitals.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.integration import governed
from tests.servers import PROJECT

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.conftest import Command
    from tests.servers import Database, Server

GOLDEN = PROJECT / "tests" / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("*/state"))
ROLES = ("golden_owner", "golden_caller", "golden_other")
EMPTY = "No changes. The database matches the desired state."
KEYS = {
    "format_version", "outcome", "tool", "created_at", "expires_at", "state", "target", "setup", "changes", "drift",
    "findings", "invariants", "proofs", "surface", "not_compared", "summary", "effects_digest", "effect_digest",
}  # fmt: skip
"""Keys of a plan that programs outside of this project rely on."""


@pytest.fixture(scope="module", autouse=True)
def roles(server: Server) -> None:
    """The roles of all cases; they are the server's, so whichever worker comes first makes them."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        for name in ROLES:
            with suppress(psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
                conn.execute(f"CREATE ROLE {name}".encode())


class Case:
    """One case under way: runs commands in its folder and keeps what they print."""

    def __init__(self, folder: Path, db: Database, scratch: Path) -> None:
        self.folder = folder
        self.db = db
        self.plan_file = scratch / "golden.plan"
        self.printed: dict[str, str] = {}
        self.codes: list[str] = []

    def sql(self, name: str) -> bool:
        """Run a file of the case as superuser, if it is there."""
        path = self.folder / name
        if path.exists():
            self.db.execute(path.read_text())
        return path.exists()

    def run(self, step: str, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command and keep its exit code; `--dsn` is added where the command reaches the database."""
        dsn = () if command in {"validate", "approve"} else ("--dsn", self.db.dsn)
        done = governed.command(command, *arguments, *dsn, cwd=self.folder)
        self.codes.append(f"{step}: {done.returncode}")
        return done

    def keep(self, name: str, text: str) -> None:
        self.printed[name] = normalised(text, self.db.name, str(self.plan_file))

    def plan(self, step: str, state: str = "state") -> bool:
        """Plan into the plan file. Says whether the plan can be applied."""
        self.plan_file.unlink(missing_ok=True)
        done = self.run(step, "plan", "-s", state, "--out", self.plan_file)
        self.keep(f"{step}.txt", done.stdout)
        if done.returncode:
            self.keep(f"{step}-error.txt", done.stderr)
        return done.returncode == 0

    def apply(self, step: str, *options: str) -> bool:
        """Approve the plan with all its hazards and apply it; False when there was nothing to apply."""
        made = json.loads(self.plan_file.read_text())
        found = {hazard for change in (*made["setup"], *made["changes"]) for hazard in change["hazards"]}
        if not (made["setup"] or made["changes"]):
            return False
        accept = [word for hazard in sorted(found) for word in ("--accept", hazard)]
        done = self.run(f"{step} approve", "approve", self.plan_file, "--as", "golden", "--reason", "test", *accept)
        assert done.returncode == 0, done.stderr
        done = self.run(step, "apply", self.plan_file, *options)
        assert done.returncode == 0, done.stderr
        self.keep(f"{step}.txt", done.stdout)
        return True

    def empty(self, step: str, state: str = "state") -> None:
        """Plan again; there must be nothing left."""
        assert self.plan(step, state)
        assert EMPTY in self.printed[f"{step}.txt"].splitlines()


def play(case: Case) -> None:
    """All steps of a case, as far as it goes."""
    done = case.run("validate", "validate", "-s", "state")
    case.keep("validate.txt", done.stdout + done.stderr)
    if done.returncode:
        return
    case.sql("before.sql")
    first = ["--initialize"]
    if (case.folder / "earlier").exists():
        assert case.plan("earlier", "earlier")
        assert case.apply("earlier apply", *first)
        first = []
        case.empty("earlier again", "earlier")
        for step in ("earlier", "earlier apply", "earlier again"):
            del case.printed[f"{step}.txt"]  # what it says is another case's
        case.sql("between.sql")
    applicable = case.plan("plan")
    document = case.run("plan as json", "plan", "-s", "state", "--format", "json")
    case.printed["plan.json"] = as_json(document.stdout, case.db.name)
    if not applicable:
        return
    if case.apply("apply", *first):
        case.empty("after-plan")
    if case.sql("change.sql"):
        done = case.run("drift", "drift", "-s", "state")
        case.keep("drift.txt", done.stdout + done.stderr)
        if case.plan("repair-plan") and case.apply("repair"):
            case.empty("after-repair")
            del case.printed["after-repair.txt"]


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_golden(
    folder: Path, db: Database, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(folder, db, tmp_path)
    given = folder / "environment"
    variables = [line.split("=", 1) for line in given.read_text().splitlines()] if given.exists() else []
    for name, value in variables:
        monkeypatch.setenv(name, value)
    play(case)
    assert [name for name, value in variables if any(value in text for text in case.printed.values())] == []
    case.printed["exit-codes.txt"] = "".join(f"{line}\n" for line in case.codes)
    printed = {name: text for name, text in case.printed.items() if text}
    expected = folder / "expected"
    if request.config.getoption("--update-golden"):
        expected.mkdir(exist_ok=True)
        for path in expected.iterdir():
            path.unlink()
        for name, text in printed.items():
            (expected / name).write_text(text)
    assert {path.name: path.read_text() for path in sorted(expected.iterdir())} == dict(sorted(printed.items()))


def test_the_first_plan_shows_all_of_the_ledger(db: Database, cli: Command) -> None:
    shown = cli("plan", "-s", "governance-only/state", "--dsn", db.dsn, cwd=GOLDEN).stdout
    source = cli("ledger", "--print-sql").stdout
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("--")]
    assert len(code) > 30
    missing = [line for line in code if f"      {line}" not in shown.splitlines()]
    assert missing == []


# ------------------------------------------------------------------------------------- what differs from run to run


LEDGER = re.compile(r"(  \+ ledger\.reconciler  .*\n)(?:      .*\n|\n(?=      ))+")


def normalised(text: str, database: str, plan_file: str) -> str:
    """Printed text with the names, times, numbers and digests of this run replaced."""
    for pattern, word in (
        (re.escape(plan_file), "PLAN"),
        (rf"\b{re.escape(database)}\b", "DATABASE"),
        (r"PostgreSQL \d+(\.\d+)+", "PostgreSQL VERSION"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
        (r"(entry \d+ of )\S+ \S+(?=, release)", r"\1TIME"),
        (r"(updated_at )\S+ [^)]+", r"\1TIME"),
        (r"(Effect digest: )[0-9a-f]{64}", r"\1DIGEST"),
        (r"(Ledger entry \d+, |`ledger: )[0-9a-f]{64}", r"\1HASH"),
        (r"in transaction \d+, [0-9.]+ s", "in transaction NUMBER, SECONDS s"),
        (r" is \d+ s old", " is SECONDS s old"),
    ):
        text = re.sub(pattern, word, text)
    text = LEDGER.sub(r"\1      LEDGER\n", text)
    return re.sub(
        r"^Not compared by this version: .*$", lambda line: re.sub(r"\d+", "N", line[0]), text, flags=re.MULTILINE
    )


def as_json(text: str, database: str) -> str:
    """A plan document with the same replacements; all keys that are promised are there."""
    document: dict[str, Any] = json.loads(text)
    if document["outcome"] in {"error", "stale"}:
        assert set(document) == {"format_version", "outcome", "errors", "hint"}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    assert set(document) >= KEYS
    for name in ("created_at", "expires_at", "tool"):
        document[name] = name.upper()
    document["target"] |= {"database": "DATABASE", "system_identifier": "IDENTIFIER", "server_version": "VERSION"}
    document["effect_digest"] = "DIGEST"
    for change in document["setup"]:
        if change["kind"] == "ledger":
            change["statements"] = ["LEDGER"]
    for finding in document["findings"]:
        finding["message"] = re.sub(r" is \d+ s old", " is SECONDS s old", finding["message"])
    for need in (document["privileges"] or {"needed": []})["needed"]:
        if need["on"] == "database":
            need["name"] = "DATABASE"
    for entry in document["not_compared"]:
        entry["count"] = 0
    del document["desired"]  # everything declared; effects_digest, which stays, is made of it
    assert database not in json.dumps(document)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
