"""What an approval is good for and what not: replays, revocation, the list, the quorum, glass, harmless edits."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from reconciler import approve as approving
from reconciler import drift as drifting
from reconciler import plan as planning
from reconciler import sandbox, signatures
from reconciler.model import Approval, Plan
from tests import servers
from tests.conftest import KIND
from tests.integration.governed import command, image
from tests.integration.test_signatures import Person, Signed, person
from tests.servers import Database, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def evidence_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def signed(db: Database, tmp_path: Path) -> Signed:
    """Installed and in sync: two of operator, reviewer and author; reviewer may break the glass."""
    return Signed(db, tmp_path, required=2, break_glass=["reviewer"]).settled()


def limit(signed: Signed, value: str, *more: str | Path) -> Plan:
    """The files want another limit; the plan of that is saved."""
    signed.system.state["gates"]["shop.limit"]["value"] = value
    signed.system.write()
    return planning.load(signed.plan(*more))[0]


def both(signed: Signed) -> list[Path]:
    """Approved by operator and reviewer; their files."""
    signed.approve("operator")
    signed.approve("reviewer")
    return sorted(signed.system.plan_file.parent.glob("change.plan.*.approval.json"))


def forge(signed: Signed, who: Person, namespace: str = signatures.APPROVAL, **change: Any) -> Path:
    """An approval as somebody makes it who does not ask `reconciler approve`; signed, and put beside the plan."""
    plan, checksum = planning.load(signed.system.plan_file)
    now = datetime.now(UTC)
    told: dict[str, Any] = {
        "id": "11111111-2222-4333-8444-555555555555",
        "effect_digest": plan.effect_digest,
        "plan_checksum": checksum,
        "target": plan.target,
        "approver": who.name,
        "reason": "a test",
        "accepted": plan.hazards,
        "attestations": plan.attestations,
        "issued_at": planning.stamp(now),
        "expires_at": planning.stamp(now + timedelta(hours=1)),
        **change,
    }
    bare = Approval(**told)
    made = bare.model_copy(update={"signature": signatures.sign(bare.statement(), who.key, namespace)})
    file = approving.beside(signed.system.plan_file, who.name)
    planning.write(file, made.dump())
    return file


def refused(signed: Signed, sentence: str, *more: str, dsn: str | None = None) -> None:
    """Exit 4 with this sentence, and nothing written."""
    where = signed.system.db
    before = image(where)
    first = ["--initialize"] * (signed.system.entries() == 0)
    done = command("apply", signed.system.plan_file, *first, *more, dsn=dsn or where.dsn)
    assert done.returncode == 4, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert image(where) == before


# ------------------------------------------------------------------------------------------------------------- replays


def test_on_another_database_with_the_same_content(
    db: Database, tmp_path: Path, server: Server, new_name: Callable[[], str]
) -> None:
    """Before the first apply; afterwards the copy's ledger names its home as well (see `rehome`)."""
    signed = Signed(db, tmp_path, required=2)
    signed.plan()
    files = both(signed)
    mine, name = signed.system.db, new_name()
    mine.conn.close()
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(mine.name)))
    twin = Database(server, name)
    try:
        refused(signed, f"The plan is for database {mine.name}, this is {name}.", dsn=twin.dsn)
        # Its own plan is for the same effects there.
        kept = [(path, path.read_bytes()) for path in files]
        done = command("plan", "-s", signed.system.directory, "--out", signed.system.plan_file, dsn=twin.dsn)
        assert done.returncode == 0, done.stderr
        for path, data in kept:
            path.write_bytes(data)
        refused(signed, f"the approval of operator is for target test, database {mine.name} of", dsn=twin.dsn)
        assert twin.execute("SELECT value FROM app.settings WHERE name = 'shop.open'") == [("false",)]
    finally:
        twin.drop()


@pytest.fixture
def replicated(own_server: Callable[..., Server], run_directory: Path, new_name: Callable[[], str]) -> Iterator[Any]:
    """A server that can be copied while it runs, and what makes its physical clone."""
    original = own_server(wal_level="replica", max_wal_senders="2")
    with (original.cluster.data / "pg_hba.conf").open("a") as rules:
        rules.write("local replication all trust\n")
    with psycopg.connect(original.dsn(), autocommit=True) as conn:
        conn.execute("SELECT pg_reload_conf()")
    clones: list[sandbox.Cluster] = []

    def clone() -> Server:
        home = run_directory / new_name()
        home.mkdir()
        home.chmod(0o711)
        cluster = sandbox.Cluster(home, servers.binaries(KIND))
        clones.append(cluster)
        cluster.account.own(cluster.data)
        copy = [sandbox.embedded_binaries() / "pg_basebackup", "-d", original.dsn(), "-D", cluster.data, "-c", "fast"]
        done = cluster.account.run(copy)
        assert done.returncode == 0, done.stderr
        servers.start_on_a_free_port(cluster)
        with psycopg.connect(cluster.dsn("postgres")) as conn:
            return Server(cluster, str(cluster.socket_directory), conn.info.port, original.version, original.password)

    yield original, clone
    for one in clones:
        one.stop()
        shutil.rmtree(one.home)


def test_on_a_physical_clone_that_has_another_name(
    replicated: tuple[Server, Callable[[], Server]], tmp_path: Path, new_name: Callable[[], str]
) -> None:
    """A clone is the same database to the server: what tells it apart is the target name, which the ledger keeps."""
    original, clone = replicated
    name = new_name()
    with psycopg.connect(original.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    db = Database(original, name)
    signed = Signed(db, tmp_path, required=2).settled()
    limit(signed, "11")
    both(signed)
    copy = Database(clone(), name)
    identities = [one.execute("SELECT system_identifier FROM pg_control_system()") for one in (db, copy)]
    assert identities[0] == identities[1]
    before = image(copy)
    done = command("apply", signed.system.plan_file, "-t", "clone", dsn=copy.dsn)
    assert done.returncode == 4
    assert "The plan is for target test, not clone." in done.stderr
    # Nor does the clone take a plan of its own under a name that its ledger does not have.
    signed.system.state["governance"]["targets"] = {"test": {}, "clone": {}}
    signed.system.write()
    done = command("plan", "-s", signed.system.directory, "-t", "clone", dsn=copy.dsn)
    assert done.returncode == 4
    assert "This is target clone, but the ledger of shop here is that of target test." in done.stderr
    assert image(copy) == before
    copy.conn.close()
    # The original is none the worse.
    signed.system.state["governance"]["targets"] = {"test": {}}
    signed.system.write()
    signed.apply()
    signed.system.in_sync()
    db.conn.close()


def test_on_the_same_database_after_a_revert(signed: Signed) -> None:
    wanted = limit(signed, "11")
    kept = [(path, path.read_bytes()) for path in both(signed)]
    signed.apply()
    undo = signed.system.root / "undo.plan"
    done = command("revert", "2", "-s", signed.system.directory, "--out", undo, dsn=signed.system.db.dsn)
    assert done.returncode == 0, done.stderr
    signed.system.plan_file.write_bytes(undo.read_bytes())
    for path, _ in kept:
        path.unlink()
    both(signed)
    signed.apply()
    assert signed.system.value("shop.limit") == "10"
    for path, data in kept:
        path.write_bytes(data)
    planning.write(signed.system.plan_file, wanted.dump())
    refused(signed, "the approval of operator was used before; an approval is for one apply")
    # A revert leaves rules of its own, so that to want the same value again is another effect.
    assert planning.load(signed.plan())[0].effect_digest != wanted.effect_digest
    forge(signed, signed.people["author"], effect_digest=wanted.effect_digest)
    refused(signed, f"the approval of author is for other effects ({wanted.effect_digest[:12]}, not ")


def test_after_it_expired(signed: Signed) -> None:
    limit(signed, "11")
    signed.approve("operator")
    past = datetime.now(UTC) - timedelta(minutes=1)
    forge(
        signed,
        signed.people["reviewer"],
        issued_at=planning.stamp(past - timedelta(hours=1)),
        expires_at=planning.stamp(past),
    )
    refused(signed, f"the approval of reviewer expired at {planning.stamp(past)}")


def test_with_a_key_that_was_revoked_since(signed: Signed) -> None:
    limit(signed, "11")
    waiting = [(path, path.read_bytes()) for path in (signed.system.plan_file, *both(signed))]
    signed.system.state["gates"]["shop.limit"]["value"] = "10"
    signed.list(signed.people["operator"].listed() + signed.people["author"].listed())
    del signed.policy["break_glass"]
    signed.list(signed.people["operator"].listed() + signed.people["author"].listed())
    signed.plan()
    signed.approve("operator")
    signed.approve("author")
    signed.apply()
    signed.system.in_sync()
    for path in signed.system.root.glob("*.approval.json"):
        path.unlink()
    for path, data in waiting:
        path.write_bytes(data)
    refused(signed, "the approval of reviewer is not by a key that the installed list knows as reviewer")
    assert signed.system.value("shop.limit") == "10"


@pytest.mark.parametrize("namespace", ["file", "git", signatures.BREAK_GLASS, signatures.PLAN])
def test_with_a_signature_that_was_made_for_something_else(db: Database, tmp_path: Path, namespace: str) -> None:
    signed = Signed(db, tmp_path, required=1)
    signed.plan()
    forge(signed, signed.people["operator"], namespace)
    refused(signed, "the approval of operator was made for another purpose than reconciler-approval")


def test_with_a_key_that_the_list_allows_for_something_else(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    operator, reviewer = signed.people["operator"], signed.people["reviewer"]
    signed.list(operator.listed('namespaces="file,git"') + reviewer.listed())
    signed.plan()
    forge(signed, operator)
    refused(signed, "is by a key of operator that the list allows for other purposes only, not for reconciler-approval")
    said = command("apply", signed.system.plan_file, "--initialize", dsn=db.dsn).stderr
    assert "may still approve: reviewer\n" in said


def test_by_the_author_of_a_signed_plan(signed: Signed) -> None:
    author = signed.people["author"]
    limit(signed, "11", "--key", author.key, "--as", "author")
    signed.approve("operator")
    forge(signed, author)
    refused(signed, "the approval of author is by who made the plan")
    said = command("apply", signed.system.plan_file, dsn=signed.system.db.dsn).stderr
    assert "1 of 2 approvals" in said
    assert "may still approve: reviewer\n" in said
    signed.approve("reviewer")
    signed.apply("--evidence", str(signed.system.root / "run"), "--key", str(signed.people["operator"].key))
    signed.system.in_sync()
    shown = command("show", signed.system.root / "run", "--format", "markdown").stdout
    assert "The plan is signed by" in shown
    assert "Author not verified" not in shown
    # Offline, the author's signature is judged by whatever list one trusts.
    listed = signed.system.directory / "approvers"
    done = command("verify", signed.system.root / "run", "--allowed-signers", listed)
    assert done.returncode == 0, done.stdout
    assert "Looked at the signature of the plan's author." in done.stdout
    listed.write_text(signed.people["operator"].listed() + signed.people["reviewer"].listed())
    done = command("verify", signed.system.root / "run", "--allowed-signers", listed)
    assert done.returncode == 1
    assert "The plan says that author made it, but its signature is not by a key" in done.stdout


def test_windows_are_judged_by_the_clock_of_the_server(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    now = datetime.now(UTC)
    past, future = (f"{now + timedelta(days=days):%Y%m%d%H%M%S}" for days in (-1, 1))
    for options, good in (
        (f'valid-before="{past}"', False),
        (f'valid-after="{future}"', False),
        (f'valid-after="{past}",valid-before="{future}"', True),
    ):
        signed.list(signed.people["operator"].listed(options) + signed.people["reviewer"].listed())
        signed.plan()
        forge(signed, signed.people["operator"])
        if good:
            # Whatever the database calls the time.
            signed.system.sql(f"ALTER DATABASE \"{db.name}\" SET timezone = 'Pacific/Kiritimati'")
            signed.apply()
        else:
            refused(signed, "is by a key of operator that is not valid at this time")
    signed.system.in_sync()


# ------------------------------------------------------------------------------------------------------------ the list


def test_who_adds_a_key_and_signs_with_it_is_refused(signed: Signed, tmp_path: Path) -> None:
    """Alone, beside an honest one, under a name of the list, and with the installed policy lowered in the same plan."""
    intruder = person(tmp_path, "intruder")
    everybody = "".join(one.listed() for one in signed.people.values())
    second_key = Person("reviewer", intruder.key)
    for listed, who in ((everybody + intruder.listed(), intruder), (everybody + second_key.listed(), second_key)):
        signed.policy["required"] = 1
        signed.list(listed)
        plan, _ = planning.load(signed.plan())
        assert plan.hazards == ("changes_approvers", "changes_policy")
        forge(signed, who)
        refused(signed, f"the approval of {who.name} is not by a key that the installed list knows as {who.name}")
        signed.approve("operator")
        refused(signed, "1 of 2 approvals")
    signed.approve("author")
    signed.apply()
    signed.system.in_sync()


def test_a_list_cannot_be_left_away(signed: Signed) -> None:
    """Neither by asking for no signatures any more nor by naming no list: what is installed judges."""
    signed.policy = {"required": 1, "signed": False}
    signed.list("")
    plan, _ = planning.load(signed.plan())
    assert plan.hazards == ("changes_approvers", "changes_policy")
    accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
    done = command("approve", signed.system.plan_file, "--as", "operator", "--reason", "a test", *accept)
    assert done.returncode == 4
    assert "This approval must be signed." in done.stderr
    refused(signed, "The plan is not approved")


def test_a_comment_in_the_list_and_other_line_ends_change_nothing(signed: Signed) -> None:
    limit(signed, "11")
    both(signed)
    lines = [f"{one.name}   {one.public} a comment\r\n" for one in signed.people.values()]
    signed.list("# Who may approve.\r\n\r\n" + "".join(lines))
    again = signed.system.plan()
    assert [change.address for change in again.setup] == []
    assert again.effect_digest == planning.load(signed.system.plan_file)[0].effect_digest
    signed.apply()
    signed.system.in_sync()


def test_a_list_that_is_too_long_is_one_sentence(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=1)
    signed.list("".join(f"person-{number} {signed.people['operator'].public}\n" for number in range(4_000)))
    done = command("validate", "-s", signed.system.directory)
    assert done.returncode == 1
    assert "approvers:1: a list of approvers has at most 256 KiB" in done.stderr


def test_a_wildcard_lets_a_key_be_anybody_but_one_at_a_time(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=2)
    operator, reviewer = signed.people["operator"], signed.people["reviewer"]
    signed.list(f"*,!root {operator.public}\n{reviewer.listed()}")
    signed.plan()
    for name in ("somebody", "somebody-else"):
        forge(signed, Person(name, operator.key))
    refused(signed, "the approval of somebody is signed with the key that somebody-else signed with")
    forge(signed, Person("root", operator.key))
    refused(signed, "the approval of root is not by a key that the installed list knows as root")
    signed.approve("reviewer")
    signed.apply()
    signed.system.in_sync()


# ---------------------------------------------------------------------------------------------------------- the quorum


@pytest.mark.parametrize("lowered", ["required", "for", "for left out"])
def test_a_quorum_is_lowered_only_by_itself(db: Database, tmp_path: Path, lowered: str) -> None:
    signed = Signed(db, tmp_path, required=2, **{"for": {"changes_policy": 3}})
    signed.settled()
    if lowered == "required":
        signed.policy["required"] = 1
    elif lowered == "for":
        signed.policy["for"] = {"changes_policy": 1}
    else:
        del signed.policy["for"]
    signed.list("".join(one.listed() for one in signed.people.values()))
    plan, _ = planning.load(signed.plan())
    assert plan.hazards == ("changes_policy",)
    both(signed)
    refused(signed, "2 of 3 approvals")
    signed.approve("author")
    signed.apply()
    signed.system.in_sync()


@pytest.mark.parametrize("number", [0, -1])
def test_a_threshold_is_at_least_one(db: Database, tmp_path: Path, number: int) -> None:
    signed = Signed(db, tmp_path, required=1, **{"for": {"arms_gate": number}})
    done = command("validate", "-s", signed.system.directory)
    assert done.returncode == 1
    assert "must be at least 1" in done.stderr


def test_a_quorum_that_the_list_cannot_reach(db: Database, tmp_path: Path) -> None:
    signed = Signed(db, tmp_path, required=2)
    second = person(tmp_path, "operator", "second")
    signed.list(signed.people["operator"].listed() + second.listed())
    done = command("validate", "-s", signed.system.directory)
    assert done.returncode == 1
    assert "2 approvals are required, and" in done.stderr
    assert "lets 1 principals with keys of their own approve" in done.stderr


# ---------------------------------------------------------------------------------------------------------- the glass


def told(signed: Signed) -> list[str]:
    """What drift and plan say of broken glass: the same."""
    found = [[one.message for one in report.findings if one.code == "break_glass"] for report in both_reports(signed)]
    assert found[0] == found[1]
    return found[0]


def both_reports(signed: Signed) -> list[Any]:
    return [signed.system.drift(), signed.system.plan()]


def test_broken_glass_needs_a_reason(signed: Signed) -> None:
    limit(signed, "11")
    plan, _ = planning.load(signed.system.plan_file)
    accept = [word for hazard in plan.hazards for word in ("--accept", hazard)]
    key = signed.people["reviewer"].key
    for reason in ("", " \t"):
        given = ("--as", "reviewer", "--key", key, "--break-glass", "--reason", reason, *accept)
        done = command("approve", signed.system.plan_file, *given)
        assert done.returncode == 1
        assert "needs a name and a reason" in done.stderr
        forge(signed, signed.people["reviewer"], signatures.BREAK_GLASS, break_glass=True, reason=reason)
        refused(signed, "the approval of reviewer gives no reason")


def test_broken_glass_is_told_until_a_quorum_acknowledges_it(signed: Signed) -> None:
    for number, value in enumerate(("11", "12"), 2):
        limit(signed, value)
        signed.approve("reviewer", "--break-glass")
        signed.apply()
        assert len(told(signed)) == number - 1
    assert told(signed)[0].startswith("entry 2 of ")
    assert told(signed)[0].endswith(" was applied by reviewer alone, breaking the glass: a test")
    report = signed.system.drift()
    assert drifting.exit_code(report) == 0
    done = command("drift", "-s", signed.system.directory, "--fail-on", "break_glass", dsn=signed.system.db.dsn)
    assert done.returncode == 2
    assert "breaking the glass" in done.stdout
    said = command("history", "-s", signed.system.directory, dsn=signed.system.db.dsn).stdout
    assert said.count("breaking the glass") == 2
    limit(signed, "13")
    both(signed)
    signed.apply()
    assert told(signed) == []
    assert command("verify", "-s", signed.system.directory, dsn=signed.system.db.dsn).returncode == 0


def test_with_a_quorum_no_glass_is_broken(signed: Signed) -> None:
    limit(signed, "11")
    signed.approve("reviewer", "--break-glass", "--out", str(signed.system.root / "change.plan.a.approval.json"))
    both(signed)
    signed.apply()
    assert told(signed) == []
    signed.system.in_sync()


def test_who_breaks_the_glass_to_change_who_decides_cannot_acknowledge_it(signed: Signed) -> None:
    """The policy lowered and the list shortened to one's own key: that stays loud until those from before approve."""
    reviewer = signed.people["reviewer"]
    everybody = "".join(one.listed() for one in signed.people.values())
    signed.policy["required"] = 1
    signed.list(reviewer.listed())
    signed.plan()
    signed.approve("reviewer", "--break-glass")
    signed.apply()
    (said,) = told(signed)
    assert "it changed who decides (changes_approvers, changes_policy), and only the approvers from before" in said
    # Alone, by the policy that is installed now: applied, and still told.
    limit(signed, "11")
    signed.approve("reviewer")
    signed.apply()
    assert told(signed) == [said]
    # Those from before are let in again; still nobody of them has said anything.
    signed.policy["required"] = 2
    signed.list(everybody)
    signed.plan()
    signed.approve("reviewer")
    signed.apply()
    assert told(signed) == [said]
    limit(signed, "12")
    signed.approve("operator")
    signed.approve("author")
    signed.apply()
    assert told(signed) == []
    signed.system.in_sync()
    assert command("verify", "-s", signed.system.directory, dsn=signed.system.db.dsn).returncode == 0


def test_an_emergency_is_acknowledged_by_as_many_as_it_would_have_taken(db: Database, tmp_path: Path) -> None:
    """Where one is enough for most plans, that one does not acknowledge what takes two."""
    more = {"for": {"changes_policy": 2}, "break_glass": ["reviewer"]}
    signed = Signed(db, tmp_path, required=1, **more).settled()
    signed.policy["expires"] = "12h"
    signed.list("".join(one.listed() for one in signed.people.values()))
    signed.plan()
    signed.approve("reviewer", "--break-glass")
    signed.apply()
    for value, approvers, left in (("11", ["reviewer"], 1), ("12", ["operator"], 1), ("13", ["operator", "author"], 0)):
        limit(signed, value)
        for who in approvers:
            signed.approve(who)
        signed.apply()
        assert len(told(signed)) == left
    signed.system.in_sync()
    assert command("verify", "-s", signed.system.directory, dsn=db.dsn).returncode == 0


def test_a_rehome_keeps_broken_glass_and_may_break_it(signed: Signed) -> None:
    """The entry that says where the ledger is now carries on what nobody acknowledged."""
    for number in (2, 3):
        plan = signed.system.plan_file
        for old in plan.parent.glob("*.approval.json"):
            old.unlink()
        done = command("rehome", "-s", signed.system.directory, "-t", "test", "--out", plan, dsn=signed.system.db.dsn)
        assert done.returncode == 0, done.stderr
        later = datetime.now(UTC) + timedelta(seconds=2)
        forge(
            signed,
            signed.people["reviewer"],
            signatures.BREAK_GLASS,
            break_glass=True,
            id=f"11111111-2222-4333-8444-00000000000{number}",
            # Approvals of the same second as the last rehome are void too.
            issued_at=planning.stamp(later),
        )
        signed.apply()
        assert len(told(signed)) == number - 1
    assert command("verify", "-s", signed.system.directory, dsn=signed.system.db.dsn).returncode == 0
    signed.system.in_sync()


def test_verify_finds_an_emergency_that_was_taken_out_of_the_ledger(signed: Signed) -> None:
    from reconciler.ledger import chained
    from reconciler.model import canonical

    limit(signed, "11")
    signed.approve("reviewer", "--break-glass")
    signed.apply()
    ((body, previous),) = signed.system.db.execute("SELECT body, previous FROM reconciler.entry WHERE number = 2")
    quiet = canonical({**json.loads(body), "emergencies": []}).decode()
    with signed.system.around_the_trigger():
        signed.system.db.execute(
            "UPDATE reconciler.entry SET body = %s, hash = %s WHERE number = 2", [quiet, chained(previous, quiet)]
        )
    done = command("verify", "-s", signed.system.directory, dsn=signed.system.db.dsn)
    assert done.returncode == 1
    assert "entry 2: what it says of broken glass is not what its approvals give" in done.stdout


# -------------------------------------------------------------------------------------------------- what has no effect


def test_harmless_edits_keep_the_approvals(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the effect digest; then all of them together by an apply of the new plan with the old approvals."""
    system = signed.system
    before = limit(signed, "11")
    files = [(path, path.read_bytes()) for path in both(signed)]
    yaml = system.directory / "all.yaml"
    git = ["git", "-C", system.directory, "-c", "user.name=operator", "-c", "user.email=operator@example.org"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "one"], ["checkout", "-qb", "side"]):
        subprocess.run([*git, *words], check=True)

    def same() -> Plan:
        again = system.plan()
        assert again.effect_digest == before.effect_digest
        return again

    yaml.write_text("# why\n" + json.dumps(system.state, sort_keys=True, separators=(", ", ": ")) + "\n\n# the end\n")
    same()
    gates = system.state.pop("gates")
    yaml.write_text(json.dumps(system.state, indent=4))
    for name, gate in gates.items():
        (system.directory / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (system.directory / "deep" / "er" / f"{name}.yaml").write_text(json.dumps({"gates": {name: gate}}))
    same()
    moved = {one["source"]: f"moved/{number}.sql" for number, one in enumerate(system.state["functions"].values())}
    (system.directory / "moved").mkdir()
    for declared in system.state["functions"].values():
        text = (system.directory / declared["source"]).read_text()
        (system.directory / declared["source"]).unlink()
        declared["source"] = moved[declared["source"]]
        (system.directory / declared["source"]).write_text(f"-- moved\n{text}\n")
    yaml.write_text(json.dumps(system.state, indent=4))
    same()
    system.state["governance"]["release"] = "r2"
    yaml.write_text(json.dumps(system.state, indent=4))
    same()
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "two"], check=True)
    subprocess.run([*git, "checkout", "-q", "main"], check=True)
    subprocess.run([*git, "merge", "-q", "--no-ff", "-m", "three", "side"], check=True)
    same()
    system.sql(
        "INSERT INTO app.settings (name, value) VALUES ('elsewhere.armed', 'true')",
        "UPDATE app.settings SET value = 'y' WHERE name = 'other'",
        "CREATE TABLE app.unrelated (id bigint)",
    )
    same()
    monkeypatch.setattr(planning, "__version__", "99.0")
    plan = same()
    assert plan.tool == "reconciler 99.0"
    longer = {"created_at": "2026-01-01T00:00:00Z", "expires_at": "2099-01-01T00:00:00Z"}
    planning.write(system.plan_file, plan.model_copy(update=longer).dump())
    for path, data in files:
        path.write_bytes(data)
    signed.apply()
    system.in_sync()
    assert system.value("shop.limit") == "11"


def test_another_expiry_of_an_approval_is_no_other_effect(signed: Signed) -> None:
    limit(signed, "11")
    signed.approve("operator", "--expires", "1h")
    signed.approve("reviewer", "--expires", "23h")
    signed.apply()
    signed.system.in_sync()


def test_lies_in_everything_that_no_digest_covers(db: Database, tmp_path: Path) -> None:
    """What is executed, governed afterwards and asked of the approvers is that of the honest plan, to the byte."""
    signed = Signed(db, tmp_path, required=2)
    honest, _ = planning.load(signed.plan())
    both(signed)
    document = honest.dump()
    finding = {"code": "undeclared", "address": "gate.x", "message": "a lie"}
    lock = {"address": "gate.x", "mode": "NONE", "on": "table", "name": "x", "key": {}, "waits": "nobody"}
    document |= {
        "outcome": "no_changes",
        "tool": "another",
        "created_at": "1999-01-01T00:00:00Z",
        "expires_at": "2999-01-01T00:00:00Z",
        "state": {"name": "other", "release": "other", "source_digest": "f" * 64},
        "drift": [{"address": "gate.x", "kind": "gate", "actions": ["change"]}],
        "findings": [finding],
        "invariants": [],
        "proofs": [],
        "surface": [],
        "not_compared": [],
        "locks": {"needed": [lock], "looked": True, "in_the_way": [], "not_seen": []},
        "summary": {"add": 0, "change": 0, "remove": 9, "forget": 9, "drift": 9, "findings": 9},
    }
    for change in (*document["changes"], *document["setup"]):
        change["reason"], change["fields"] = "nothing to see here", [{"name": "value", "before": "a", "after": "b"}]
    document["target"]["server_version"] = "9.6"
    document["desired"] |= {"release": "r0", "source_digest": "0" * 64, "database": db.name, "more": 1}
    planning.write(signed.system.plan_file, document)
    said = command("apply", signed.system.plan_file, "--initialize", "--format", "json", dsn=db.dsn)
    assert said.returncode == 0, said.stderr
    done = json.loads(said.stdout)
    assert [(one["text"], one["role"]) for one in done["executed"]] == [
        (one.text, one.role) for one in honest.statements
    ]
    counted = ("add", "change", "remove", "forget")
    assert [done["summary"][name] for name in counted] == [honest.summary.dump()[name] for name in counted]
    ((text,),) = db.execute("SELECT body FROM reconciler.entry")
    body = json.loads(text)
    wanted = honest.desired["items"] | honest.desired["checks"]
    assert {address: one["rules"] for address, one in body["manifest"].items()} == {
        address: one.get("rules", {}) for address, one in wanted.items()
    }
    # Of a marker only its key is governed for ever.
    assert [address for address, one in body["manifest"].items() if one["spec"] != wanted[address]["spec"]] == [
        "marker.courier"
    ]
    assert body["policy"] == honest.desired["policy"]
    assert body["approvers"] == honest.desired["approvers"]
    assert body["scope"]["scope"] == honest.desired["scope"]
    assert body["plan"]["effect_digest"] == honest.effect_digest
    assert len(body["approvals"]) == 2
    assert "a lie" not in text
    assert "nothing to see here" not in text
    signed.system.in_sync()
