"""`history` and `verify`: a chain somebody went around is found, and a folder of which a byte was changed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.model import canonical
from tests.integration.governed import Governed, command, shop
from tests.integration.test_signatures import Signed

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from tests.servers import Database


@pytest.fixture(autouse=True)
def evidence_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    """Three entries."""
    made = shop(db, tmp_path)
    made.settle()
    for value in ("11", "12"):
        made.state["gates"]["shop.limit"]["value"] = value
        made.write().settle()
    return made


def verify(system: Governed, *more: str | Path) -> subprocess.CompletedProcess[str]:
    return command("verify", "-s", system.directory, *more, dsn=system.db.dsn)


@pytest.mark.smoke
def test_history_and_an_intact_chain(system: Governed) -> None:
    found = command("history", "-s", system.directory, dsn=system.db.dsn)
    assert found.returncode == 0
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["3", "2", "1"]
    assert "+4 ~2 -0  operator (not signed)" in lines[2]
    assert lines[3] == "Entries of shop: 3."
    document = json.loads(command("history", "-s", system.directory, "--format", "json", dsn=system.db.dsn).stdout)
    assert [entry["number"] for entry in document["entries"]] == [1, 2, 3]
    done = verify(system)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "shop: intact.")


def test_a_rewritten_row(system: Governed) -> None:
    body = system.db.execute("SELECT body FROM reconciler.entry WHERE number = 2")[0][0]
    forged = body.replace('"value":"11"', '"value":"99"')
    assert forged != body
    new = hashlib.sha256(
        (system.db.execute("SELECT previous FROM reconciler.entry WHERE number = 2")[0][0] + forged).encode()
    )
    with system.around_the_trigger():
        system.db.execute(
            "UPDATE reconciler.entry SET body = %s, hash = %s WHERE number = 2", [forged, new.hexdigest()]
        )
    done = verify(system)
    assert done.returncode == 1
    assert "! entry 3: it does not follow the entry before it" in done.stdout
    assert "! entry 2: its plan does not hold" in done.stdout


def test_a_removed_row(system: Governed) -> None:
    with system.around_the_trigger():
        system.sql("DELETE FROM reconciler.entry WHERE number = 2")
    done = verify(system)
    assert done.returncode == 1
    assert "! entry 3: it is number 2 of the chain: entries are missing" in done.stdout


def recomputed(system: Governed, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite entry 2 and everything after it, with right hashes."""
    previous = system.db.execute("SELECT previous FROM reconciler.entry WHERE number = 2")[0][0]
    with system.around_the_trigger():
        for number, text in system.db.execute("SELECT number, body FROM reconciler.entry WHERE number >= 2 ORDER BY 1"):
            body = json.loads(text)
            if number == 2:
                change(body)
            made = canonical(body).decode()
            new = hashlib.sha256((previous + made).encode()).hexdigest()
            system.db.execute(
                "UPDATE reconciler.entry SET body = %s, previous = %s, hash = %s WHERE number = %s",
                [made, previous, new, number],
            )
            previous = new


def test_a_chain_that_was_written_anew_is_found_by_the_anchor(system: Governed, tmp_path: Path) -> None:
    anchor = tmp_path / "ledger.anchor"
    assert command("history", "-s", system.directory, "--anchor", anchor, dsn=system.db.dsn).returncode == 0
    assert verify(system, "--anchor", anchor).returncode == 0

    def whitewash(body: dict[str, Any]) -> None:
        body["approvals"][0]["reason"] = "quite another one"

    recomputed(system, whitewash)
    assert verify(system).returncode == 0  # no signature, no anchor: nobody can tell
    done = verify(system, "--anchor", anchor)
    assert done.returncode == 1
    assert "! entry 3 is not the one that was anchored: the chain was written anew" in done.stdout


def test_a_chain_that_was_cut_is_found_by_the_anchor(system: Governed, tmp_path: Path) -> None:
    anchor = tmp_path / "ledger.anchor"
    command("history", "-s", system.directory, "--anchor", anchor, dsn=system.db.dsn)
    with system.around_the_trigger():
        system.sql("DELETE FROM reconciler.entry WHERE number = 3")
    assert verify(system).returncode == 0
    done = verify(system, "--anchor", anchor)
    assert "! the anchor knows entry 3, which is missing: the chain was cut" in done.stdout


def test_an_edited_anchor(system: Governed, tmp_path: Path) -> None:
    anchor = tmp_path / "ledger.anchor"
    command("history", "-s", system.directory, "--anchor", anchor, dsn=system.db.dsn)
    anchor.write_text(anchor.read_text().replace('"number": 3', '"number": 2'))
    done = verify(system, "--anchor", anchor)
    assert done.returncode == 1
    assert "checksum" in done.stderr


def test_a_signed_chain_that_was_written_anew_is_found_without_an_anchor(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path).settled()
    signed.system.state["gates"]["shop.limit"]["value"] = "11"
    signed.system.write()
    signed.settled()
    assert verify(signed.system).stdout.endswith("shop: intact.\n")

    def whitewash(body: dict[str, Any]) -> None:
        body["approvals"][0]["reason"] = "quite another one"

    recomputed(signed.system, whitewash)
    done = verify(signed.system)
    assert done.returncode == 1
    assert "! entry 2: it was not approved: the approval of operator does not fit what was signed" in done.stdout


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def run(db: Database, tmp_path: Path) -> Path:
    """The evidence of a signed apply."""
    signed = Signed(db, tmp_path)
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    signed.apply("--evidence", str(tmp_path / "run"))
    return tmp_path / "run"


def judged(run: Path, code: int = 1) -> str:
    done = command("verify", run, "--allowed-signers", run.parent / "state" / "approvers")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.smoke
def test_an_intact_folder(run: Path) -> None:
    said = judged(run, code=0)
    assert "Looked at 2 signatures." in said
    assert said.endswith("run: intact.\n")
    document = json.loads(command("verify", run, "--format", "json").stdout)
    assert document["problems"] == []
    assert "signatures not checked" in " ".join(document["checked"])


def test_every_changed_byte_is_named(run: Path) -> None:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(files) >= 8
    for path in files:
        data = path.read_bytes()
        for place in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            said = judged(run)
            assert path.name in said, (path, place, said)
        path.write_bytes(data)
    judged(run, code=0)


def test_missing_added_and_reordered(run: Path) -> None:
    report = run / "report.md"
    data = report.read_bytes()
    report.unlink()
    assert "! report.md: missing" in judged(run)
    report.write_bytes(data)
    (run / "more.txt").write_text("x")
    assert "! more.txt: not in SHA256SUMS" in judged(run)
    (run / "more.txt").unlink()
    (run / "link").symlink_to(run / "report.md")
    assert "! link: not in SHA256SUMS" in judged(run)
    (run / "link").unlink()
    sums = run / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(reversed(lines)))
    assert "! SHA256SUMS: not in the form and order that reconciler writes" in judged(run)


def test_a_folder_with_new_sums(run: Path) -> None:
    """Whoever edits a file can write its sum as well: then it is the claims that do not hold."""
    approval = next((run / "approvals").iterdir())
    document = {key: value for key, value in json.loads(approval.read_text()).items() if key != "checksum"}
    from reconciler.plan import serialize

    approval.write_bytes(serialize({**document, "reason": "quite another one"}))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(run)}\n"
        for path in sorted(run.rglob("*"), key=lambda one: str(one.relative_to(run)))
        if path.is_file() and path.name != "SHA256SUMS"
    ]
    (run / "SHA256SUMS").write_text("".join(lines))
    said = judged(run)
    assert "does not fit what was signed" in said


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_folder(tmp_path: Path, place: str) -> None:
    done = command("verify", tmp_path / place)
    assert done.returncode == 1
    assert "is no evidence folder" in done.stderr
