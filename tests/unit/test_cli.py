from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from reconciler.cli import cli

ROOT = Path(__file__).resolve().parents[2]

QUICK = """
import sys
sys.argv = ["reconciler", {argument!r}]
from reconciler import cli
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0, end.code
print(sorted({{"psycopg", "deepdiff", "pydantic", "postgast", "ruamel"}} & set(sys.modules)))
"""


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in group.commands.items():
        here = (*path, name)
        found += commands(command, here) if isinstance(command, click.Group) else [(here, command)]
    return found


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_loads_nothing_that_is_slow_to_import(argument: str) -> None:
    program = QUICK.format(argument=argument)
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_shows_two_examples_and_stands_in_the_readme(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0
    examples = [line for line in done.output.splitlines() if line.startswith("    reconciler " + " ".join(path))]
    assert len(examples) >= 2, done.output
    assert path[-1] in (ROOT / "README.md").read_text()


def test_the_example_options_exist() -> None:
    for path, command in commands():
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for line in (command.help or "").splitlines():
            if line.strip().startswith("reconciler "):
                used = {word for word in line.partition("|")[0].split() if word.startswith("-")}
                assert used <= known, (path, used - known)
