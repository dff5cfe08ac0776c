"""`history` and `verify`: a chain somebody went around is found, and a folder of which a byte was changed."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.intoto import key_id, pre_authentication
from reconciler.model import canonical
from reconciler.signatures import EVIDENCE, sign
from tests.integration.governed import Governed, command, shop
from tests.integration.test_signatures import Signed, person
from tests.servers import PROJECT

if TYPE_CHECKING:
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
    table = command("history", "-s", system.directory, "--format", "markdown", dsn=system.db.dsn).stdout
    assert table.startswith("# History of shop: 3 entries\n")
    assert [line.split("|")[1].strip() for line in table.splitlines() if "operator" in line] == ["3", "2", "1"]
    assert document["entries"][2]["hash"] in table
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
    """The evidence of a signed apply, signed for by who applied it: a key of the list that may do nothing else."""
    signed = Signed(db, tmp_path)
    hand = person(tmp_path, "hand")
    listed = "".join(one.listed() for one in signed.people.values())
    signed.list(listed + hand.listed('namespaces="reconciler-evidence"'))
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    signed.apply("--evidence", str(tmp_path / "run"), "--key", str(hand.key))
    return tmp_path / "run"


def judged(run: Path, code: int = 1) -> str:
    done = command("verify", run, "--allowed-signers", run.parent / "state" / "approvers")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.smoke
def test_an_intact_folder(run: Path) -> None:
    said = judged(run, code=0)
    assert "Looked at 2 signatures." in said
    assert "Looked at 4 in-toto statements, signatures included." in said
    assert said.endswith("run: intact.\n")
    document = json.loads(command("verify", run, "--format", "json").stdout)
    assert document["problems"] == []
    assert "signatures not checked" in " ".join(document["checked"])


def test_every_changed_byte_is_named(run: Path) -> None:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(files) >= 12
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


def summed(run: Path) -> None:
    """SHA256SUMS anew: whoever can edit a file can do that."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(run)}\n"
        for path in sorted(run.rglob("*"), key=lambda one: str(one.relative_to(run)))
        if path.is_file() and path.name != "SHA256SUMS"
    ]
    (run / "SHA256SUMS").write_text("".join(lines))


def test_a_folder_with_new_sums(run: Path) -> None:
    """Whoever edits a file can write its sum as well: then it is the claims that do not hold."""
    approval = next((run / "approvals").iterdir())
    document = {key: value for key, value in json.loads(approval.read_text()).items() if key != "checksum"}
    from reconciler.plan import serialize

    approval.write_bytes(serialize({**document, "reason": "quite another one"}))
    summed(run)
    said = judged(run)
    assert "does not fit what was signed" in said


def statement(run: Path, step: str) -> Path:
    (found,) = (run / "statements").glob(f"{step}.*.json")
    return found


def test_what_the_statements_say(run: Path) -> None:
    told = json.loads((run / "evidence.json").read_text())
    payloads = {
        path.name.partition(".")[0]: json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))
        for path in (run / "statements").iterdir()
    }
    assert {step: payload["predicateType"].rpartition("attestation/")[2] for step, payload in payloads.items()} == {
        "human-review-1": "human-review/v0.1",
        "human-review-2": "human-review/v0.1",
        "test-result": "test-result/v0.1",
        "deployment": "deployment/v1",
    }
    plan = {"name": "plan.json", "digest": {"sha256": hashlib.sha256((run / "plan.json").read_bytes()).hexdigest()}}
    assert all(payload["_type"] == "https://in-toto.io/Statement/v1" for payload in payloads.values())
    assert all(plan in payload["subject"] for payload in payloads.values())
    tests = payloads["test-result"]
    assert tests["predicate"] == {
        "result": "PASSED",
        "configuration": [plan],
        "passedTests": ["invariant.no-blank-actor", "invariant.till-shut"],
        "warnedTests": [],
        "failedTests": [],
    }
    # The whole folder is its subject.
    everything = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    named = {one["name"] for one in tests["subject"]}
    assert named == {"effects"} | {name for name in everything if not name.startswith("statements/")}
    assert payloads["deployment"]["predicate"]["creationTime"] == told["finished_at"]
    assert payloads["deployment"]["predicate"]["scopes"]["urn:reconciler:database/v1"] == told["target"]["database"]


def test_stock_tools_check_a_statement(run: Path, tmp_path: Path) -> None:
    """As the README shows it."""
    shown = (PROJECT / "README.md").read_text()
    script = shown.partition("```sh\njq -r .payload")[2].partition("```")[0]
    assert "ssh-keygen -Y verify" in script
    for step in ("deployment", "test-result"):
        file = statement(run, step)
        words = f"jq -r .payload{script}".replace("statements/deployment.*.json", str(file))
        words = words.replace("-f approvers", f"-f {run.parent / 'state' / 'approvers'}").replace(
            "-I operator", "-I hand"
        )
        done = subprocess.run(["bash", "-ec", words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert 'Good "reconciler-evidence" signature for hand' in done.stdout


def test_a_report_that_was_edited_with_its_sum(run: Path) -> None:
    """Nothing in the report is worked out again, but its bytes are what somebody signed for."""
    report = run / "report.md"
    report.write_text(report.read_text().replace("operator", "somebody"))
    summed(run)
    said = judged(run)
    assert f"! {statement(run, 'test-result').relative_to(run)}: says something else than the evidence" in said


@pytest.mark.parametrize("step", ["human-review-1", "human-review-2", "test-result", "deployment"])
def test_a_statement_that_was_taken_away(run: Path, step: str) -> None:
    statement(run, step).unlink()
    summed(run)
    assert f"! statements/{step}: missing" in judged(run)


def test_all_statements_taken_away(run: Path) -> None:
    shutil.rmtree(run / "statements")
    summed(run)
    assert "! nobody signed for the run" in judged(run)


@pytest.mark.parametrize("edit", ["signature", "payload", "another key", "another step", "twice", "no envelope"])
def test_a_forged_statement(run: Path, edit: str) -> None:
    file = statement(run, "deployment")
    envelope = json.loads(file.read_text())
    said = {
        "signature": "its signature does not fit what was signed",
        "payload": "says something else than the evidence",
        "another key": "its signature is not by a key that the list knows",
        "another step": ": missing",
        "twice": ": not of this run",
        "no envelope": ": it is no envelope",
    }[edit]
    match edit:
        case "signature":
            envelope["signatures"] = json.loads(statement(run, "test-result").read_text())["signatures"]
        case "payload":
            payload = base64.b64decode(envelope["payload"]).replace(b"test", b"production")
            envelope["payload"] = base64.b64encode(payload).decode()
        case "another key":
            stranger = person(run.parent, "stranger")
            armoured = sign(pre_authentication(base64.b64decode(envelope["payload"])), stranger.key, EVIDENCE)
            envelope["signatures"] = [{"keyid": key_id(armoured), "sig": base64.b64encode(armoured.encode()).decode()}]
            file.unlink()
            file = file.with_name(f"deployment.{key_id(armoured)[:8]}.json")
        case "another step":
            file.rename(file.with_name(file.name.replace("deployment", "retirement")))
            file = file.with_name(file.name.replace("deployment", "retirement"))
        case "twice":
            file = file.with_name("deployment.00000000.json")
        case _:
            envelope = [envelope]
    file.write_text(json.dumps(envelope))
    summed(run)
    assert said in judged(run)


def test_an_approver_cannot_sign_for_the_run_with_a_key_for_approvals_only(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    signed.list("".join(one.listed('namespaces="reconciler-approval"') for one in signed.people.values()))
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    signed.apply("--evidence", str(tmp_path / "run"), "--key", str(signed.people["operator"].key))
    assert "that the list allows for other purposes only" in judged(tmp_path / "run")


def test_a_failed_run_is_signed_for_too(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    signed.system.sql("UPDATE app.settings SET value = '12' WHERE name = 'shop.open'")
    signed.apply("--evidence", str(tmp_path / "run"), "--key", str(signed.people["author"].key), code=4)
    judged(tmp_path / "run", code=0)
    assert {path.name.partition(".")[0] for path in (tmp_path / "run" / "statements").iterdir()} == {
        "human-review-1",
        "human-review-2",
        "test-result",
    }
    assert (
        '"FAILED"'
        in base64.b64decode(json.loads(statement(tmp_path / "run", "test-result").read_text())["payload"]).decode()
    )


def test_a_key_that_is_not_there_stops_the_apply(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    assert "There is no key" in signed.apply("--key", str(tmp_path / "nokey"), code=1)
    assert signed.system.entries() == 0


def test_a_key_that_cannot_sign_is_a_problem_of_the_evidence_alone(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    broken = tmp_path / "broken"
    broken.write_text("no key")
    signed.apply("--evidence", str(tmp_path / "run"), "--key", str(broken))
    signed.system.in_sync()
    assert "nobody signed for the run" in judged(tmp_path / "run")


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_folder(tmp_path: Path, place: str) -> None:
    done = command("verify", tmp_path / place)
    assert done.returncode == 1
    assert "is no evidence folder" in done.stderr
