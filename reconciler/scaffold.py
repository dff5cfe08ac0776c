"""What `reconciler init` writes: a commented state directory that validates, as a start for one's own. For `cli`."""

from __future__ import annotations

import importlib.resources
import secrets
import shutil
from typing import TYPE_CHECKING

from reconciler.errors import UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path


def write(directory: Path) -> list[Path]:
    """Write the example into `directory`, which must be empty or missing; the files written, in order of name.

    All of it or nothing: the files are written beside their place and moved there when complete.
    Raises UsageError when something is in the way or the place cannot be written.
    """
    place = directory.resolve()  # a link to an empty directory is as good as the directory
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            _create(place)
        elif not place.is_dir():
            raise UsageError(f"{directory} is a file.", hint="Name a directory that is empty or does not exist.")
        elif any(place.iterdir()):
            raise UsageError(f"{directory} is not empty.", hint="Name a directory that is empty or does not exist.")
        else:
            _fill(place)
    except OSError as error:
        raise UsageError(f"Cannot write {directory}: {error.strerror or error}.") from error
    return sorted(directory / path.relative_to(place) for path in place.rglob("*") if path.is_file())


def _create(place: Path) -> None:
    stage = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        _copy(importlib.resources.files("reconciler") / "templates" / "init", stage)
        stage.rename(place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fill(place: Path) -> None:
    """Into a directory that stays itself: somebody may stand in it, and its parent may not be ours to write."""
    stage = place / f".{secrets.token_hex(4)}"
    try:
        _copy(importlib.resources.files("reconciler") / "templates" / "init", stage)
        for entry in sorted(stage.iterdir()):
            entry.rename(place / entry.name)
    except BaseException:
        for entry in place.iterdir():  # it was empty, so all of this is ours
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise
    stage.rmdir()


def _copy(source: Traversable, place: Path) -> None:
    """Contents only: packages are often installed read-only, and their modes would travel along."""
    place.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, place / entry.name)
        else:
            (place / entry.name).write_bytes(entry.read_bytes())
