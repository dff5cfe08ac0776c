"""`reconciler init` writes all of its files or none, and never over somebody's own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from reconciler import scaffold
from reconciler.errors import UsageError
from reconciler.yamltext import parse, read_text

NAMES = [
    "README.md",
    "functions.yaml",
    "functions/example.sql",
    "gates.yaml",
    "governance.yaml",
    "invariants.yaml",
    "markers.yaml",
    "proofs.yaml",
]


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def test_a_missing_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    directory = tmp_path / "infra" / "db" / "state"
    written = scaffold.write(directory)
    assert [str(path.relative_to(directory)) for path in written] == sorted(NAMES, key=Path)
    assert everything(tmp_path / "infra") == [f"db/state/{name}" for name in NAMES]


def test_an_empty_directory_is_filled_and_stays_the_same_directory(tmp_path: Path) -> None:
    before = tmp_path.stat().st_ino
    scaffold.write(tmp_path)
    assert everything(tmp_path) == NAMES
    assert tmp_path.stat().st_ino == before


def test_the_paths_returned_start_as_the_caller_named_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path("state/gates.yaml") in scaffold.write(Path("state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    assert Path("gates.yaml") in scaffold.write(Path())


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert tmp_path / "link" / "gates.yaml" in scaffold.write(tmp_path / "link")
    assert everything(tmp_path / "real") == NAMES
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["gates.yaml", ".git"])
def test_a_directory_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        scaffold.write(tmp_path)
    assert everything(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_second_time_is_refused(tmp_path: Path) -> None:
    scaffold.write(tmp_path / "state")
    with pytest.raises(UsageError, match="is not empty"):
        scaffold.write(tmp_path / "state")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        scaffold.write(tmp_path / "state")
    with pytest.raises(UsageError, match="Cannot write"):
        scaffold.write(tmp_path / "state" / "below")
    assert (tmp_path / "state").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, step: int
) -> None:
    directory = tmp_path / "state"
    if exists:
        directory.mkdir()
    calls = 0

    def full(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise OSError(28, "No space left on device")

    whole = Path.rename if exists else Path.write_bytes

    def fails(self: Path, *arguments: object) -> object:
        full()
        return whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, whole.__name__, fails)
    with pytest.raises(UsageError, match="No space left on device"):
        scaffold.write(directory)
    assert directory.exists() == exists
    assert list(tmp_path.rglob("*")) == ([directory] if exists else [])


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    for directory in (tmp_path, tmp_path / "state"):
        with pytest.raises(KeyboardInterrupt):
            scaffold.write(directory)
        assert list(tmp_path.iterdir()) == []


def test_the_files_have_the_modes_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        scaffold.write(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "state" / "functions").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "state" / "functions" / "example.sql").stat().st_mode) == 0o640


def test_every_yaml_file_reads_without_a_problem(tmp_path: Path) -> None:
    sections = []
    for path in scaffold.write(tmp_path / "state"):
        text, problems = read_text(path, tmp_path / "state")
        assert text is not None
        if path.suffix == ".yaml":
            document, found = parse(text, str(path))
            assert document is not None
            sections += list(document.data)
            problems += found
        assert problems == []
    assert sorted(sections) == ["functions", "gates", "governance", "invariants", "markers", "proofs"]
