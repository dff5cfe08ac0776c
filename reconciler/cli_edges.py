"""Below `cli`: what its modules share of the edge to people and programs. Options, lines on stderr, JSON, signals."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from reconciler.model import Model

F = TypeVar("F", bound="Callable[..., Any]")


def untested_option(command: F) -> F:
    """`--allow-untested-server`."""
    return click.option(
        "--allow-untested-server", is_flag=True, help="Go on with a server newer than any that was tested."
    )(command)


def options_for(command: F, formats: tuple[str, ...]) -> F:
    """`--format` (as `form`) with these formats, `--no-color` and `-v`."""
    command = click.option("-v", "--verbose", is_flag=True, help="Say more.")(command)
    command = click.option("--no-color", is_flag=True, help="No colours (also: NO_COLOR, no terminal, TERM=dumb).")(
        command
    )
    return click.option(
        "--format",
        "form",
        type=click.Choice(formats),
        default="text",
        show_default=True,
        help="How to print the result.",
    )(command)


def aside(text: str) -> None:
    """A line on stderr, if anybody reads along: that nobody does stops nothing and changes no exit code."""
    with suppress(OSError):
        click.echo(text, err=True)


def colour(no_color: bool) -> bool:
    """May what goes to stdout have colours?"""
    unwanted = no_color or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return not unwanted and sys.stdout.isatty()


def print_json(document: Model | dict[str, Any]) -> None:
    """The document on stdout, harmless on a terminal."""
    from reconciler.render.text import as_json

    click.echo(as_json(document if isinstance(document, dict) else document.dump()))


def interrupt(_number: int, _frame: object) -> NoReturn:
    """A handler: a polite kill is as Ctrl-C."""
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """From here on the outcome is known and is told, however often somebody presses Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def evidence_parent() -> Path:
    """Where evidence goes that nobody named a place for."""
    return Path(os.environ.get("RECONCILER_EVIDENCE") or "evidence")
