"""The project's own rules: linters, types, import contracts, and what no tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.servers import PROJECT

PACKAGE = PROJECT / "reconciler"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Names of the governed system of the examples: the package knows none of them.
GOVERNED = re.compile(
    r"dieu.?45|điều.?45|directus|dot_config|job_queue|job_dead_letter|job_substrate|queue_heartbeat|heartbeat_register"
    r"|event_outbox|iu_outbound|iu_route|fn_queue|fn_job|fn_iu|phase[12]_|workflow_admin|qdrant",
    re.IGNORECASE,
)


def ids(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "basedpyright", "lint-imports --no-cache"])
def test_linters_are_silent(command: str) -> None:
    program, *arguments = command.split()
    installed = Path(sysconfig.get_path("scripts")) / program
    done = subprocess.run([installed, *arguments], cwd=PROJECT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_only_pg_connects() -> None:
    calls = {
        ids(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"(psycopg\.)?(Async)?Connection(\[.*\])?\.connect|psycopg\.connect", ast.unparse(node.func))
    }
    imported = {
        ids(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "psycopg"
        and "connect" in {one.name for one in node.names}
    }
    assert calls | imported == {"reconciler/pg.py"}


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_every_module_says_its_place_in_its_first_line(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no docstring"
    assert docstring.splitlines()[0].strip(), "its first line is empty"


@pytest.mark.parametrize(
    "path", [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts], ids=ids
)
def test_the_package_knows_nothing_of_the_governed_system(path: Path) -> None:
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if GOVERNED.search(line)
    ]
    assert found == []
