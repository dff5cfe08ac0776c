"""`fleet report` and `serve` as commands: what they read, write and refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.governed import command
from tests.unit.test_fleet_board import round_of, target

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "drift.json"
    found.write_text(round_of(target("shop-1"), target("shop-2", "drift", drift=1)).model_dump_json(by_alias=True))
    return found


def test_the_page_is_written_whole_or_not_at_all(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "board.html"
    done = command("fleet", "report", file, "--out", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"Written: {out}\n")
    before = out.read_text()
    assert before.startswith("<!doctype html>")
    assert '<tr data-name="shop-2" data-outcome="drift">' in before
    file.write_text(file.read_text().replace("shop-2", "shop-3").replace('"drift":1', '"drift":"one"'))
    done = command("fleet", "report", file, "--out", out)
    assert (done.returncode, out.read_text()) == (1, before)
    assert "is no report of a fleet: targets.1.drift" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--listen", "0.0.0.0:0"), "others than this machine reach that"),
        (("--listen", "[::]:0"), "others than this machine reach that"),
        (("--listen", "9188"), "write host:port"),
        (("--token-file", "nowhere"), "Cannot read the token from nowhere: No such file or directory."),
        (("--token-file", "short"), "a token has at least 16 characters"),
        (("--token-file", "binary"), "Cannot read the token from binary: it is no text."),
        (("--refresh", "often"), "--refresh often"),
    ],
)
def test_what_serve_refuses(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 20)
    done = command("serve", file, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert expected in done.stderr
    assert "secret" not in done.stderr


def test_it_must_be_said_what_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECONCILER_QUEUE", raising=False)
    for words in (("serve",), ("fleet", "report", "--out", "x")):
        done = command(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Give the FILE of a report, or --queue DSN." in done.stderr
