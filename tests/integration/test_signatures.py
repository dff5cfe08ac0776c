"""Signed approvals on a real database: quorum, four eyes, a governed list, break-glass; by ssh-keygen itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import plan as planning
from reconciler.model import canonical
from tests.integration.governed import Governed, command, shop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Database


@dataclass(frozen=True)
class Person:
    """A principal with a key of its own."""

    name: str
    key: Path

    @property
    def public(self) -> str:
        kind, data = self.key.with_suffix(".pub").read_text().split()[:2]
        return f"{kind} {data}"

    def listed(self, options: str = "") -> str:
        return f"{self.name} {options} {self.public}\n"


def person(folder: Path, name: str, key: str | None = None) -> Person:
    path = folder / f"key-of-{key or name}"
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return Person(name, path)


class Signed:
    """The shop under a signed policy."""

    def __init__(self, db: Database, root: Path, required: int = 2, **policy: Any) -> None:
        self.system: Governed = shop(db, root)
        self.people = {name: person(root, name) for name in ("operator", "reviewer", "author")}
        self.policy: dict[str, Any] = {"required": required, "signed": True, "approvers": "approvers", **policy}
        self.list("".join(one.listed() for one in self.people.values()))

    def list(self, text: str) -> None:
        """Write the list of approvers, and the files."""
        self.system.state["governance"]["approval"] = self.policy
        self.system.write()
        (self.system.directory / "approvers").write_text(text)

    def plan(self, *more: str | Path) -> Path:
        file = self.system.plan_file
        for old in file.parent.glob("*.approval.json"):
            old.unlink()
        done = command("plan", "-s", self.system.directory, "--out", file, *more, dsn=self.system.db.dsn)
        assert done.returncode == 0, done.stderr
        return file

    def approve(self, who: str | Person, *more: str | Path, code: int = 0) -> str:
        one = self.people[who] if isinstance(who, str) else who
        plan, _ = planning.load(self.system.plan_file)
        accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
        given = ("--as", one.name, "--key", one.key, "--reason", "a test", *accept, *more)
        done = command("approve", self.system.plan_file, *given)
        assert done.returncode == code, done.stderr
        return done.stderr

    def apply(self, *more: str, code: int = 0) -> str:
        first = ["--initialize"] * (self.system.entries() == 0)
        done = command("apply", self.system.plan_file, *first, *more, dsn=self.system.db.dsn)
        assert done.returncode == code, done.stderr
        return done.stderr

    def settled(self) -> Signed:
        self.plan()
        self.approve("operator")
        self.approve("reviewer")
        self.apply()
        self.system.in_sync()
        return self


@pytest.fixture(autouse=True)
def evidence_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[dict[str, str]]]:
    """Two agents, each of its own."""
    made: list[dict[str, str]] = []
    for number in range(2):
        socket = tmp_path / f"agent{number}"
        out = subprocess.run(["ssh-agent", "-a", socket, "-s"], check=True, capture_output=True, text=True).stdout
        made.append({"SSH_AUTH_SOCK": str(socket), "pid": out.split("SSH_AGENT_PID=")[1].split(";")[0]})
    yield made
    for one in made:
        os.kill(int(one["pid"]), signal.SIGTERM)


@pytest.mark.smoke
def test_two_people_in_two_places_and_a_third_applies(
    db: Database, tmp_path: Path, agents: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signed(db, tmp_path)
    file = signed.plan()
    made: list[Path] = []
    for who, agent in zip(("operator", "reviewer"), agents, strict=True):
        place = tmp_path / f"place-of-{who}"
        place.mkdir()
        copy = place / "change.plan"
        shutil.copy(file, copy)
        monkeypatch.setenv("SSH_AUTH_SOCK", agent["SSH_AUTH_SOCK"])
        key = signed.people[who].key
        subprocess.run(["ssh-add", "-q", key], check=True)
        key.unlink()  # the agent holds it; what is left here is the public half
        plan, _ = planning.load(copy)
        accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
        done = command("approve", copy, "--as", who, "--key", key.with_suffix(".pub"), "--reason", "a test", *accept)
        assert done.returncode == 0, done.stderr
        made += place.glob("*.approval.json")
    one = signed.apply("--approval", str(made[0]), code=4)
    assert "1 of 2 approvals" in one
    assert "may still approve: author, reviewer" in one
    signed.apply("--approval", str(made[0]), "--approval", str(made[1]))
    signed.system.in_sync()


def test_anyone_can_check_an_approval_with_stock_tools(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    signed.plan()
    assert "; the plan needs 2 approvals, 1 lie beside it. Next: " in signed.approve("operator")
    document = json.loads(next(tmp_path.glob("*.approval.json")).read_text())
    (tmp_path / "sig").write_text(document["signature"])
    # What `jq -cjS 'del(.checksum, .signature)'` prints.
    bare = {key: value for key, value in document.items() if key not in {"checksum", "signature"}}
    allowed, signature = str(signed.system.directory / "approvers"), str(tmp_path / "sig")
    done = subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-n", "reconciler-approval", "-I", "operator", "-f", allowed, "-s", signature],
        input=json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert canonical(bare) == json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_one_person_with_two_keys_and_two_people_with_one_key_count_once(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path)
    second = person(tmp_path, "operator", "second")
    shared = Person("reviewer", signed.people["operator"].key)
    signed.list(
        signed.people["operator"].listed() + second.listed() + shared.listed() + signed.people["author"].listed()
    )
    signed.plan()
    signed.approve("operator")
    signed.approve(second, "--out", str(tmp_path / "two.approval.json"))
    signed.approve(shared)
    files = sorted(str(path) for path in tmp_path.glob("*.approval.json"))
    options = [word for path in files for word in ("--approval", path)]
    said = signed.apply(*options, code=4)
    assert "1 of 2 approvals" in said
    assert "the approval of reviewer is signed with the key that operator signed with" in said


def test_whoever_made_the_plan_does_not_approve_it(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    author = signed.people["author"]
    signed.plan("--key", author.key, "--as", "author")
    signed.approve("author")
    said = signed.apply(code=4)
    assert "the approval of author is by who made the plan" in said
    # Nor with another name and the same key, nor with another key and the same name.
    for path in tmp_path.glob("*.approval.json"):
        path.unlink()
    signed.list(signed.people["operator"].listed() + author.listed() + Person("alias", author.key).listed())
    signed.plan("--key", author.key, "--as", "author")
    signed.approve(Person("alias", author.key))
    assert "the approval of alias is by who made the plan" in signed.apply(code=4)
    signed.approve("operator")
    signed.apply()


def test_an_edited_author_is_refused(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    signed.plan("--key", signed.people["author"].key, "--as", "author")
    plan, _ = planning.load(signed.system.plan_file)
    planning.write(signed.system.plan_file, plan.model_copy(update={"author": "reviewer"}).dump())
    signed.approve("reviewer")
    assert "The plan says that reviewer made it, but its signature does not fit what was signed" in signed.apply(code=4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reason": "another"}, "does not fit what was signed"),
        ({"accepted": ["everything"]}, "does not accept"),
        ({"approver": "reviewer"}, "the approval of reviewer does not fit what was signed"),
        ({"expires_at": "2999-01-01T00:00:00Z"}, "longer than the installed policy's"),
        ({"signature": None}, "is not signed"),
        (
            {"signature": "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"},
            "holds no signature that OpenSSH can read",
        ),
        ({"break_glass": True}, "breaks the glass"),
        ({"id": "00000000-0000-4000-8000-000000000000"}, "does not fit what was signed"),
    ],
)
def test_an_edited_approval(db: Database, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    signed = Signed(db, tmp_path, required=1)
    signed.plan()
    signed.approve("operator")
    file = next(tmp_path.glob("*.approval.json"))
    document = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
    planning.write(file, {**document, **change})
    assert sentence in signed.apply(code=4)


def test_keys_for_other_purposes_and_other_times(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    operator, reviewer = signed.people["operator"], signed.people["reviewer"]
    signed.list(operator.listed('valid-before="20200101"') + reviewer.listed('namespaces="reconciler-evidence"'))
    signed.plan()
    assert "is by a key of operator that is not valid at this time" in signed.approve("operator", code=4)
    assert "that the list allows for other purposes only" in signed.approve("reviewer", code=4)


def test_a_certificate_of_the_listed_authority(db: Database, tmp_path: Path, agents: list[dict[str, str]]) -> None:
    signed = Signed(db, tmp_path, required=1)
    authority, holder = person(tmp_path, "authority"), person(tmp_path, "holder")
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority.key, "-I", "id", "-n", "holder", holder.key.with_suffix(".pub")],
        check=True,
    )
    signed.list(f"holder cert-authority {authority.public}\n")
    signed.plan()
    certificate = holder.key.with_name(f"{holder.key.name}-cert.pub")
    assert certificate.exists()
    environment = {**os.environ, "SSH_AUTH_SOCK": agents[0]["SSH_AUTH_SOCK"]}
    subprocess.run(["ssh-add", "-q", holder.key], check=True, env=environment)
    before = os.environ.get("SSH_AUTH_SOCK")
    os.environ["SSH_AUTH_SOCK"] = agents[0]["SSH_AUTH_SOCK"]
    try:
        signed.approve(Person("holder", certificate))
    finally:
        os.environ.pop("SSH_AUTH_SOCK")
        os.environ.update({"SSH_AUTH_SOCK": before} if before else {})
    signed.apply()


@pytest.mark.smoke
def test_the_list_is_changed_only_under_the_installed_list(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path).settled()
    intruder = person(tmp_path, "intruder")
    signed.list("".join(one.listed() for one in signed.people.values()) + intruder.listed())
    plan, _ = planning.load(signed.plan())
    assert plan.hazards == ("changes_approvers",)
    assert [(change.address, change.kind) for change in plan.setup] == [("approvers.shop", "approvers")]
    # Who signs with the new key is refused, when approving and when applying.
    assert "is not by a key that the installed list knows as intruder" in signed.approve(intruder, code=4)
    signed.approve("operator")
    forged = json.loads(next(tmp_path.glob("*.approval.json")).read_text())
    assert "1 of 2 approvals" in signed.apply(code=4)
    assert forged["approver"] == "operator"
    signed.approve("reviewer")
    signed.apply()
    signed.system.in_sync()
    # Now it is installed, and counts.
    signed.system.state["gates"]["shop.limit"]["value"] = "11"
    signed.system.write()
    signed.plan()
    signed.approve("operator")
    signed.approve(intruder)
    signed.apply()


def test_an_approver_who_was_removed_does_not_count_any_more(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path).settled()
    signed.system.state["gates"]["shop.limit"]["value"] = "11"
    signed.system.write()
    kept = signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    waiting = [(path, path.read_bytes()) for path in (kept, *tmp_path.glob("*.approval.json"))]
    signed.system.state["gates"]["shop.limit"]["value"] = "10"
    signed.list(signed.people["operator"].listed() + signed.people["author"].listed())
    signed.plan()
    signed.approve("operator")
    signed.approve("author")
    signed.apply()
    for path, data in waiting:
        path.write_bytes(data)
    said = signed.apply(code=4)
    assert "stale" in said or "installed list" in said
    assert signed.system.value("shop.limit") == "10"


def test_more_approvals_for_named_hazards(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1, **{"for": {"arms_gate": 3}})
    signed.plan()
    signed.approve("operator")
    signed.approve("reviewer")
    assert "2 of 3 approvals" in signed.apply(code=4)
    signed.approve("author")
    signed.apply()


def test_a_required_number_that_nobody_can_reach(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=4)
    done = command("validate", "-s", signed.system.directory)
    assert done.returncode == 1
    assert "4 approvals are required" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is nobody in it"),
        ("# only a comment\n", "there is nobody in it"),
        ("operator\n", ":1: expected: principals"),
        ("operator ssh-ed25519 AAAA\n", "is no public key"),
    ],
)
def test_a_list_that_cannot_be_read(db: Database, tmp_path: Path, text: str, sentence: str) -> None:
    signed = Signed(db, tmp_path, required=1)
    signed.list(text)
    done = command("validate", "-s", signed.system.directory)
    assert done.returncode == 1
    assert sentence in done.stderr + done.stdout


def test_breaking_the_glass(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=2, break_glass=["reviewer"])
    signed.settled()
    signed.system.state["gates"]["shop.limit"]["value"] = "12"
    signed.system.write()
    signed.plan()
    assert "not among the break-glass principals" in signed.approve("operator", "--break-glass", code=4)
    signed.approve("reviewer", "--break-glass")
    signed.apply()
    assert signed.system.value("shop.limit") == "12"
    found = signed.system.drift()
    assert [(one.code, one.address) for one in found.findings] == [("break_glass", "ledger.shop")]
    # A normal quorum, later and for anything, acknowledges it.
    signed.system.state["gates"]["shop.limit"]["value"] = "13"
    signed.system.write()
    signed.settled()
    assert signed.system.drift().findings == ()


def test_an_ordinary_signature_does_not_break_the_glass(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=2, break_glass=["reviewer"])
    signed.plan()
    signed.approve("reviewer")
    file = next(tmp_path.glob("*.approval.json"))
    document = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
    planning.write(file, {**document, "break_glass": True})
    said = signed.apply(code=4)
    assert "was made for another purpose than reconciler-break-glass" in said or "does not fit" in said
