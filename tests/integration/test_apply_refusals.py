"""What an apply refuses: a database that moved, an approval that does not fit, a plan that somebody edited.

Every refusal leaves each table of the database, catalogs included, to the row and its version as it was.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql as composing

from reconciler import plan as planning
from reconciler import setup, trust
from reconciler.errors import (
    NotApproved,
    PlanDamaged,
    ReconcilerError,
    Refused,
    ServerProblem,
    Stale,
    UsageError,
    Violated,
)
from reconciler.model import Plan, canonical
from tests.integration import governed
from tests.integration.governed import changed, image
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.model import Approval, Json
    from tests.integration.governed import Governed
    from tests.servers import Server


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    return governed.shop(db, tmp_path)


@contextmanager
def untouched(system: Governed) -> Iterator[None]:
    """Nothing is written inside."""
    before = image(system.db)
    yield
    assert image(system.db) == before


# ------------------------------------------------------------------------------------------------ the database moved

MOVED = {
    "gate flipped": (
        ["UPDATE app.settings SET value = 'true' WHERE name = 'shop.open'"],
        Stale,
        ["gate.shop.open", "already as desired"],
    ),
    "gate set to something else": (
        ["UPDATE app.settings SET value = '7' WHERE name = 'shop.limit'"],
        Stale,
        ["gate.shop.limit", "nothing was approved"],
    ),
    "gate outside of from": (
        ["UPDATE app.settings SET value = 'half' WHERE name = 'shop.open'"],
        Stale,
        ["gate.shop.open", "'half'", "`from` allows only 'false'"],
    ),
    "gate deleted": (
        ["DELETE FROM app.settings WHERE name = 'shop.open'"],
        Stale,
        ["gate.shop.open"],
    ),
    "gate NULL": (
        ["UPDATE app.settings SET value = NULL WHERE name = 'shop.open'"],
        Stale,
        ["gate.shop.open", "the live value is NULL"],
    ),
    "gate with a space": (
        ["UPDATE app.settings SET value = 'false ' WHERE name = 'shop.open'"],
        Stale,
        ["gate.shop.open", "'false '"],
    ),
    "new gate there, as declared": (
        ["INSERT INTO app.settings (name, value) VALUES ('shop.till', 'false')"],
        Stale,
        ["gate.shop.till", "already as desired"],
    ),
    "new gate there, other value": (
        ["INSERT INTO app.settings (name, value) VALUES ('shop.phase', 'one')"],
        Stale,
        ["gate.shop.phase", "the live", "value"],
    ),
    "phase went on": (
        ["INSERT INTO app.settings (name, value) VALUES ('shop.phase', 'three')"],
        Stale,
        ["gate.shop.phase", "never moves back"],
    ),
    "new function there": (
        ["CREATE FUNCTION app.fn_greet(text, integer) RETURNS text LANGUAGE sql AS 'SELECT $1'"],
        Stale,
        ["function.app.fn_greet(text, integer)", "the live"],
    ),
    "function changed": (
        ["ALTER FUNCTION app.fn_total() COST 7"],
        Stale,
        ["function.app.fn_total()", "the live cost changed"],
    ),
    "function granted": (
        ["GRANT EXECUTE ON FUNCTION app.fn_total() TO PUBLIC"],
        Stale,
        ["function.app.fn_total()", "the live acl changed"],
    ),
    "function's owner": (
        ["ALTER FUNCTION app.fn_total() OWNER TO {stranger}"],
        Stale,
        ["function.app.fn_total()", "acl, owner"],
    ),
    "function's comment": (
        ["COMMENT ON FUNCTION app.fn_total() IS NULL"],
        Stale,
        ["function.app.fn_total()", "the live comment changed"],
    ),
    "function dropped": (["DROP FUNCTION app.fn_total()"], (Stale, ServerProblem), ["function.app.fn_total()"]),
    "function renamed": (
        ["ALTER FUNCTION app.fn_total() RENAME TO fn_sum"],
        (Stale, ServerProblem),
        ["function.app.fn_total()"],
    ),
    "function dropped and created again": (
        [
            "DROP FUNCTION app.fn_total()",
            "CREATE PROCEDURE app.fn_total() LANGUAGE sql AS ''",
            "ALTER PROCEDURE app.fn_total() OWNER TO {owner}",
        ],
        Stale,
        ["function.app.fn_total()", "kind"],
    ),
    "default privileges": (
        ["ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT EXECUTE ON FUNCTIONS TO {stranger}"],
        Stale,
        ["function.app.fn_greet(text, integer)"],
    ),
    "marker inserted": (
        ["INSERT INTO app.heartbeat VALUES ('courier', 'legacy', now(), 0)"],
        Stale,
        ["marker.courier", "already as desired"],
    ),
    "bound value moved": (
        ["UPDATE app.cursor SET ran = ran + interval '1 microsecond'"],
        Stale,
        ["marker.courier"],
    ),
    "bind without a row": (["DELETE FROM app.cursor"], Stale, ["marker.courier", "no row"]),
    "bind with another query's rows": (
        ["INSERT INTO app.cursor VALUES ('other', now())", "UPDATE app.cursor SET ran = 'infinity'"],
        Stale,
        ["marker.courier"],
    ),
    "invariant broken": (
        ["INSERT INTO app.job VALUES (1, ' ')"],
        Violated,
        ["invariant.no-blank-actor", "1 rows, expected 0"],
    ),
    "ledger created": ([setup.source()], Stale, ["ledger.reconciler: already as desired"]),
    "something else of that name": (["CREATE SCHEMA reconciler"], Refused, ["is not the ledger of this program"]),
}  # fmt: skip


@pytest.mark.parametrize(("by_hand", "error", "said"), MOVED.values(), ids=MOVED.keys())
def test_a_database_that_moved_since_the_plan(
    system: Governed,
    by_hand: list[str],
    error: type[ReconcilerError] | tuple[type[ReconcilerError], ...],
    said: list[str],
) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    system.sql(*by_hand)
    with untouched(system), pytest.raises(error) as refused:
        system.apply(plan, [approval])
    assert refused.value.exit_code == (3 if error is Violated else 4)
    told = "\n".join([refused.value.message, *refused.value.details])
    for words in said:
        assert words in told


def test_a_row_replaced_by_its_equal_is_no_difference(system: Governed) -> None:
    """Another version of the same value: nothing that was approved is different."""
    plan = system.plan()
    system.sql(
        "DELETE FROM app.settings WHERE name = 'shop.open'", "INSERT INTO app.settings VALUES ('shop.open', 'false')"
    )
    system.apply(plan)
    system.in_sync()


def test_what_others_do_elsewhere_does_not_matter(system: Governed) -> None:
    plan = system.plan()
    system.sql(
        "INSERT INTO app.settings (name, value) VALUES ('another', '1')",
        "INSERT INTO app.heartbeat VALUES ('somebody', 'x', now(), 3)",
        "CREATE FUNCTION app.other() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "CREATE TABLE app.more (id integer)",
        "INSERT INTO app.job VALUES (1, 'me')",
    )
    system.apply(plan)
    again = system.plan()
    assert (again.changes, again.setup, again.drift) == ((), (), ())


def test_the_command_names_the_first_differences(system: Governed) -> None:
    plan = system.plan()
    file = system.save(plan, system.approve(plan))
    system.sql("UPDATE app.settings SET value = '7' WHERE name = 'shop.limit'", "ALTER FUNCTION app.fn_total() COST 7")
    with untouched(system):
        done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (4, "")
    assert "Error: The plan is stale: what is there now is not what was approved." in done.stderr.splitlines()
    assert "  function.app.fn_total(): the live cost changed" in done.stderr.splitlines()
    assert "  gate.shop.limit: nothing was approved, now it needs change: differs from what is declared" in done.stderr
    shown = governed.command("apply", file, "--initialize", "--format", "json", dsn=system.db.dsn)
    assert json.loads(shown.stdout)["outcome"] == "stale"


def test_after_a_stale_plan_the_next_one_works(system: Governed) -> None:
    plan = system.plan()
    system.sql("ALTER FUNCTION app.fn_total() COST 7")
    with pytest.raises(Stale):
        system.apply(plan)
    system.settle()


# ------------------------------------------------------------------------------------------------------- approvals


def later(approval: Approval, **times: timedelta) -> Approval:
    """The approval with its times moved."""
    from datetime import datetime

    moved = {
        name: planning.stamp(datetime.fromisoformat(getattr(approval, name)) + delta) for name, delta in times.items()
    }
    return approval.model_copy(update=moved)


APPROVALS: dict[str, tuple[Callable[[Approval], list[Approval]], str]] = {
    "none": (lambda _: [], "0 of 1 approvals"),
    "other effects": (lambda a: [a.model_copy(update={"effect_digest": "0" * 64})], "is for other effects"),
    "no hazards": (lambda a: [a.model_copy(update={"accepted": ()})], "does not accept arms_gate, grants_execute"),
    "a hazard short": (lambda a: [a.model_copy(update={"accepted": a.accepted[1:]})], "does not accept arms_gate"),
    "expired": (
        lambda a: [later(a, issued_at=timedelta(hours=-25), expires_at=timedelta(hours=-25))],
        "expired at",
    ),
    "from the future": (lambda a: [later(a, issued_at=timedelta(hours=1))], "is in the future of the server's clock"),
}


@pytest.mark.parametrize(("make", "said"), APPROVALS.values(), ids=APPROVALS.keys())
def test_an_approval_that_does_not_fit(system: Governed, make: Callable[[Approval], list[Approval]], said: str) -> None:
    plan = system.plan()
    with untouched(system), pytest.raises(NotApproved) as refused:
        system.apply(plan, make(system.approve(plan)))
    assert said in "\n".join(refused.value.details)
    assert refused.value.exit_code == 4


def test_a_bad_approval_beside_a_good_one_does_no_harm(system: Governed) -> None:
    plan = system.plan()
    good = system.approve(plan)
    system.apply(plan, [good.model_copy(update={"effect_digest": "0" * 64, "approver": "eve"}), good])
    system.in_sync()


def test_an_approval_is_for_one_apply(system: Governed) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    system.apply(plan, [approval])
    with untouched(system), pytest.raises(NotApproved) as refused:
        system.apply(plan, [approval], initialize=False)
    assert "was used before" in "\n".join(refused.value.details)
    # Undone by hand, so that the plan's effects are wanted again: the approval is used up all the same.
    system.sql("UPDATE app.settings SET value = 'false' WHERE name = 'shop.open'")
    second = system.plan()
    old = approval.model_copy(update={"effect_digest": second.effect_digest, "accepted": second.hazards})
    with untouched(system), pytest.raises(NotApproved):
        system.apply(second, [old])


def test_two_of_two_are_two_people(system: Governed) -> None:
    system.state["governance"]["approval"]["required"] = 2
    system.write()
    plan = system.plan()
    first, again = system.approve(plan), system.approve(plan)
    for approvals in ([], [first], [first, again], [first, first]):
        with untouched(system), pytest.raises(NotApproved) as refused:
            system.apply(plan, approvals)
        assert f"{len({each.approver for each in approvals})} of 2 approvals" in refused.value.details
    # One person in two spellings.
    with untouched(system), pytest.raises(NotApproved) as refused:
        system.apply(plan, [first, system.approve(plan, approver=" Operator")])
    assert "1 of 2 approvals" in refused.value.details
    system.apply(plan, [first, system.approve(plan, approver="reviewer")])
    system.in_sync()


def test_the_installed_policy_judges_not_the_proposed_one(system: Governed) -> None:
    system.state["governance"]["approval"]["required"] = 2
    system.write()
    first = system.plan()
    system.apply(first, [system.approve(first), system.approve(first, approver="reviewer")])
    system.state["governance"]["approval"]["required"] = 1
    system.write()
    plan = system.plan()
    (policy,) = plan.setup
    assert (policy.address, policy.hazards) == ("policy.shop", ("changes_policy",))
    with untouched(system), pytest.raises(NotApproved, match="not approved") as refused:
        system.apply(plan)
    assert "1 of 2 approvals" in refused.value.details
    system.apply(plan, [system.approve(plan), system.approve(plan, approver="reviewer")])
    # From now on one is enough.
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write().settle()


def test_a_policy_that_wants_signatures_takes_no_unsigned_approval(system: Governed) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    system.state["governance"]["approval"] |= {"signed": True, "approvers": "approvers"}
    key = system.root / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    system.write()
    (system.directory / "approvers").write_text(f"operator {key.with_suffix('.pub').read_text()}")
    signed = system.plan()
    with pytest.raises(NotApproved, match="must be signed"):
        system.approve(signed)
    forged = approval.model_copy(
        update={"effect_digest": signed.effect_digest, "signature": "-----BEGIN SSH SIGNATURE"}
    )
    with untouched(system), pytest.raises(NotApproved) as refused:
        system.apply(signed, [forged])
    assert "holds no signature that OpenSSH can read" in "\n".join(refused.value.details)


def test_a_plan_that_expired_is_not_applied(system: Governed) -> None:
    """Its approval may still be good: approved in the last minute of the plan, it lives for another day."""
    plan = system.plan()
    approval = system.approve(plan)
    expired = plan.model_copy(update={"expires_at": "2026-01-01T00:00:00Z"})
    with untouched(system), pytest.raises(NotApproved, match="The plan expired at 2026-01-01T00:00:00Z"):
        system.apply(expired, [approval])
    with pytest.raises(NotApproved, match="expired"):
        system.approve(expired)


def test_the_command_without_an_approval_and_without_a_terminal(system: Governed) -> None:
    file = system.save(system.plan())
    with untouched(system):
        done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (4, "")
    assert "Error: The plan is not approved." in done.stderr.splitlines()


@pytest.mark.parametrize("damage", ["byte", "checksum", "cut", "empty", "list", "plan"])
def test_an_approval_file_that_somebody_edited(system: Governed, damage: str) -> None:
    plan = system.plan()
    file = system.save(plan, system.approve(plan))
    (approval,) = system.root.glob("*.approval.json")
    text = approval.read_text()
    approval.write_text(
        {
            "byte": text.replace("a test", "a Test"),
            "checksum": text.replace('"checksum": "', '"checksum": "0'),
            "cut": text[:-20],
            "empty": "",
            "list": "[]",
            "plan": file.read_text(),
        }[damage]
    )
    with untouched(system):
        done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert approval.name in done.stderr
    assert "Traceback" not in done.stderr


def test_an_approval_of_another_plan_is_refused_by_the_command(system: Governed) -> None:
    first = system.plan()
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write()
    file = system.save(system.plan(), system.approve(first))
    with untouched(system):
        done = governed.command("apply", file, "--initialize", dsn=system.db.dsn)
    assert done.returncode == 4
    assert "is for other effects" in done.stderr


# ------------------------------------------------------------------------------------------- a plan that was edited

# What a plan says about itself and what people read; nothing of it decides what is done.
FOR_PEOPLE = {
    "created_at", "drift", "findings", "format_version", "invariants", "not_compared", "outcome", "proofs", "state",
    "summary", "surface", "tool",
}  # fmt: skip
# The same within what decides: words, and what the effect digest covers by the target's identity instead.
WORDS = {
    ("desired", "source_digest"),
    ("desired", "release"),
    ("desired", "database"),
    ("desired", "ledger"),
    ("target", "server_version"),
}


def is_words(path: tuple[str | int, ...]) -> bool:
    first, *rest = path
    in_change = rest[1] if first in {"changes", "setup"} and len(rest) > 1 else None
    return path in WORDS or in_change in {"reason", "fields"} or (first, in_change) == ("setup", "kind")


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Json]]:
    """Every place of a document with its value: scalars, and each list and mapping as such."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))


def edits(value: Json) -> list[Json]:
    """Other values that somebody might write there."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    if isinstance(value, str):
        return [value + " ", "" if value else "x"]
    if value is None:
        return ["x"]
    if isinstance(value, list):
        return [value[:-1]] if value else []
    return [{**value, "more": 1}, {key: value[key] for key in list(value)[:-1]}] if value else []


def attempts(document: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with one place below a top-level key changed, each place in turn."""
    for path, value in leaves(document[key], (key,)):
        for edit in [] if is_words(path) or path == ("desired",) else edits(value):
            yield f"{'.'.join(map(str, path))} = {edit!r:.60}", changed(document, path, edit)


@pytest.mark.parametrize("key", sorted(set(Plan.model_fields) - FOR_PEOPLE))
def test_an_edited_plan_never_does_what_was_not_approved(system: Governed, key: str) -> None:
    """Each place of what decides, its checksum made right again: an error or a refusal, and nothing written."""
    plan = system.plan()
    approval = system.approve(plan)
    tried = 0
    with untouched(system):
        for what, document in attempts(plan.dump(), key):
            planning.write(system.plan_file, document)
            tried += 1
            try:
                loaded, _ = planning.load(system.plan_file)
                says = planning.dump_desired(planning.load_desired(loaded.desired))
                if loaded.model_copy(update={"desired": says}) == plan:
                    continue  # a key that says what is so without it
                system.apply(loaded, [approval], initialize=True)
            except (PlanDamaged, NotApproved, Stale, UsageError):
                continue
            except ReconcilerError as error:
                pytest.fail(f"{what}: {type(error).__name__}: {error}")
            pytest.fail(f"{what}: applied")
    assert tried > 0


def test_what_is_for_people_decides_nothing(system: Governed) -> None:
    """All of it replaced by lies: what is done, said and remembered is the truth."""
    plan = system.plan()
    approval = system.approve(plan)
    lies = {
        "created_at": "1999-01-01T00:00:00Z",
        "outcome": "no_changes",
        "tool": "another",
        "findings": [],
        "not_compared": [],
        "invariants": [],
        "summary": {"add": 99, "change": 98, "remove": 97, "forget": 96, "drift": 0, "findings": 0},
    }
    document = {**plan.dump(), **lies}
    for change in (*document["changes"], *document["setup"]):
        change["reason"] = "nothing to see here"
        change["fields"] = []
    document["desired"] |= {"source_digest": "0" * 64, "release": "r0", "more": 1}
    document["target"]["server_version"] = "9.6"
    planning.write(system.plan_file, document)
    loaded, _ = planning.load(system.plan_file)
    done = system.apply(loaded, [approval], initialize=True)
    assert (done.summary.add, done.summary.change, done.summary.remove, done.summary.forget) == (4, 2, 0, 0)
    assert len(done.invariants) == 2
    system.in_sync()


def test_a_violation_edited_out_of_the_plan_still_blocks(system: Governed) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    system.sql("INSERT INTO app.job VALUES (1, '')")
    violated = system.plan()
    assert violated.outcome == "violated"
    healed = violated.model_copy(update={"invariants": plan.invariants, "outcome": "changes"})
    with untouched(system), pytest.raises(Violated):
        system.apply(healed, [approval])


ADDITIONS = {
    "a statement": lambda document: document["changes"][0]["statements"].append({"text": "SELECT 1", "role": None}),
    "a second statement in a text": lambda document: document["changes"][0]["statements"][0].update(
        text=document["changes"][0]["statements"][0]["text"] + "; DROP TABLE app.job"
    ),
    "a space": lambda document: document["changes"][0]["statements"][0].update(
        text=document["changes"][0]["statements"][0]["text"] + " "
    ),
    "another role": lambda document: document["changes"][0]["statements"][0].update(role="postgres"),
    "no role": lambda document: document["changes"][0]["statements"][0].update(role=None),
    "a statement of the setup": lambda document: document["setup"][0]["statements"].append(
        {"text": "DROP TABLE app.job", "role": None}
    ),
    "statements of the setup lost": lambda document: document["setup"][0].update(statements=[]),
    "statements in another order": lambda document: document["changes"][0]["statements"].reverse(),
    "changes in another order": lambda document: document["changes"].reverse(),
    "a change twice": lambda document: document["changes"].append(document["changes"][0]),
    "a change lost": lambda document: document["changes"].pop(),
    "a hazard lost": lambda document: document["changes"][0].update(hazards=[]),
    "another kind": lambda document: document["changes"][0].update(kind="gate"),
    "an unknown kind": lambda document: document["changes"][0].update(kind="nothing"),
    "an unknown action": lambda document: document["changes"][0].update(actions=["explode"]),
    "an unknown key": lambda document: document.update(extra=1),
}


@pytest.mark.parametrize("edit", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_an_addition_to_a_plan(system: Governed, edit: Callable[[dict[str, Any]], None]) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    document = json.loads(canonical(plan.dump()))
    edit(document)
    planning.write(system.plan_file, document)
    with untouched(system), pytest.raises((PlanDamaged, NotApproved)):
        system.apply(planning.load(system.plan_file)[0], [approval], initialize=True)


def test_a_rule_edited_with_its_digests_made_right_again_has_no_approval(system: Governed) -> None:
    """The strongest editor: digests computed anew over the lie. Then the approval is for other effects."""
    plan = system.plan()
    approval = system.approve(plan)
    document = plan.dump()
    for address, rules in (("gate.shop.open", {"safe": None}), ("gate.shop.till", {"lock": "free"})):
        declared = changed(document["desired"], ("items", address, "rules"), {
            **document["desired"]["items"][address]["rules"], **rules
        })  # fmt: skip
        edited = Plan.model_validate_json(canonical({**document, "desired": declared}))
        effects = planning.effects_digest(declared, edited.setup, edited.changes)
        edited = edited.model_copy(
            update={"effects_digest": effects, "effect_digest": planning.effect_digest(effects, edited.target)}
        )
        with untouched(system), pytest.raises(NotApproved):
            system.apply(edited, [approval], initialize=True)


@pytest.mark.parametrize("version", ["2.0", "0.9", "x", "", None, 1])
def test_a_plan_of_another_format_is_refused(system: Governed, version: Json) -> None:
    planning.write(system.plan_file, {**system.plan().dump(), "format_version": version})
    with pytest.raises(PlanDamaged):
        planning.load(system.plan_file)


# ------------------------------------------------------------------------------------------------ the wrong database


def test_another_database_with_the_same_content(system: Governed, server: Server, new_name: Callable[[], str]) -> None:
    plan = system.plan()
    approval = system.approve(plan)
    system.db.conn.close()
    twin = Database(server, new_name())
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(
            composing.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                composing.Identifier(twin.name), composing.Identifier(system.db.name)
            )
        )
    try:
        before = image(twin)
        with pytest.raises(Stale, match=f"is for database {system.db.name}, this is {twin.name}"):
            system.apply(plan, [approval], dsn=twin.dsn)
        assert image(twin) == before
        # Its own plan has the same effects and another effect digest.
        other = system.plan(twin.dsn)
        assert other.effects_digest == plan.effects_digest
        assert other.effect_digest != plan.effect_digest
        with pytest.raises(NotApproved, match="not approved"):
            system.apply(other, [approval], dsn=twin.dsn)
        assert image(twin) == before
    finally:
        twin.drop()


def test_another_target_than_the_plans(system: Governed) -> None:
    system.state["governance"]["targets"] = {"test": {}, "live": {}}
    system.write()
    system.state["governance"]["targets"] = {"test": {}}
    system.write()
    plan = system.plan()
    with untouched(system), pytest.raises(Stale, match="The plan is for target test, not live"):
        system.apply(plan, target="live")
    file = system.save(plan, system.approve(plan))
    assert governed.command("apply", file, "-t", "live", "--initialize", dsn=system.db.dsn).returncode == 4
    assert governed.command("apply", file, "-t", "test", "--initialize", dsn=system.db.dsn).returncode == 0


def test_the_target_of_the_ledger_is_the_target(system: Governed) -> None:
    """A clone shares everything but the name that people give it: -t must equal what the ledger says."""
    system.settle()
    system.state["governance"]["targets"] = {"elsewhere": {}}
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write()
    with untouched(system), pytest.raises(Refused) as refused:
        system.apply(system.plan())
    assert "elsewhere" in refused.value.message
    assert "test" in refused.value.message


# ------------------------------------------------------------------------------------------------------- the ledger


def test_a_first_apply_says_so(system: Governed) -> None:
    plan = system.plan()
    with untouched(system), pytest.raises(UsageError, match="This would be the first apply of shop"):
        system.apply(plan, initialize=False)
    system.apply(plan, initialize=True)
    system.sql("UPDATE app.settings SET value = '7' WHERE name = 'shop.limit'")
    second = system.plan()
    with untouched(system), pytest.raises(Refused, match="was applied here before"):
        system.apply(second, initialize=True)
    system.apply(second, initialize=False)
    system.in_sync()


def test_a_ledger_that_a_dba_made_beforehand(system: Governed) -> None:
    sql = governed.command("ledger", "--print-sql").stdout
    assert sql == setup.source()
    system.db.execute(sql)
    plan = system.plan()
    assert [change.address for change in plan.setup] == ["policy.shop", "scope.shop"]
    with untouched(system), pytest.raises(UsageError, match="This would be the first apply"):
        system.apply(plan, initialize=False)
    system.apply(plan, initialize=True)
    system.in_sync()


@pytest.mark.parametrize("command", ["plan", "drift", "apply"])
@pytest.mark.parametrize("there", ["none", "another"])
def test_files_that_name_a_ledger_which_is_not_there(system: Governed, command: str, there: str) -> None:
    """Never a first apply: this is another database, or its ledger was lost."""
    named = "a" * 64
    plan = system.plan()
    if there == "another":
        system.settle()
        system.sql("UPDATE app.settings SET value = '7' WHERE name = 'shop.limit'")
        plan = system.plan()
    system.state["governance"]["targets"]["test"] = {"ledger": named}
    system.write()
    words: list[Any] = [command, "-s", system.directory]
    if command == "apply":
        # A plan made from files with that line cannot be had here, so it is made without and then told.
        named_plan = Plan.model_validate_json(canonical(changed(plan.dump(), ("desired", "ledger"), named)))
        words = [command, system.save(named_plan, system.approve(plan)), *(["--initialize"] if there == "none" else [])]
    with untouched(system):
        done = governed.command(*words, dsn=system.db.dsn)
    assert (done.returncode, done.stdout) == (4, "")
    assert named in done.stderr
    assert ("does not exist" if there == "none" else "begins with") in done.stderr


def test_a_ledger_that_was_lost_is_not_a_first_apply(system: Governed) -> None:
    done = system.settle()
    system.state["governance"]["targets"]["test"] = {"ledger": done.hash}
    system.write().in_sync()
    system.sql("DROP SCHEMA reconciler CASCADE", "UPDATE app.settings SET value = '7' WHERE name = 'shop.limit'")
    with untouched(system), pytest.raises(Refused, match="does not exist"):
        system.plan()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE reconciler.entry SET body = '{}'",
        "UPDATE reconciler.entry SET recorded_at = now()",
        "UPDATE reconciler.entry SET hash = repeat('0', 64)",
        "DELETE FROM reconciler.entry",
        "TRUNCATE reconciler.entry",
        "TRUNCATE reconciler.entry CASCADE",
        ("INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, 3, gen_random_uuid(), '{}', '{}', hash, encode(sha256(convert_to(hash || '{}', 'UTF8')), 'hex')"
        " FROM reconciler.entry"),
        ("INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, 2, gen_random_uuid(), '{}', '{}', repeat('1', 64),"
        " encode(sha256(convert_to(repeat('1', 64) || '{}', 'UTF8')), 'hex') FROM reconciler.entry"),
        ("INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, 2, gen_random_uuid(), '{}', '{}', hash, repeat('1', 64) FROM reconciler.entry"),
        ("INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, 2, gen_random_uuid(), approval_ids, '{}', hash,"
        " encode(sha256(convert_to(hash || '{}', 'UTF8')), 'hex') FROM reconciler.entry"),
        ("INSERT INTO reconciler.entry (name, number, run_id, approval_ids, body, previous, hash)"
        " SELECT name, 1, gen_random_uuid(), '{}', '{}', repeat('0', 64),"
        " encode(sha256(convert_to(repeat('0', 64) || '{}', 'UTF8')), 'hex') FROM reconciler.entry"),
    ],
    ids=[
        "update body", "update time", "update hash", "delete", "truncate", "truncate cascade", "a gap", "another chain",
        "another hash", "an approval again", "a second genesis",
    ],
)  # fmt: skip
def test_the_ledger_is_append_only_for_superusers_too(system: Governed, statement: str) -> None:
    system.settle()
    with untouched(system), pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.IntegrityError)):
        system.db.execute(statement)


AROUND = {
    "body": "UPDATE reconciler.entry SET body = replace(body, '\"shop.limit\"', '\"shop.other\"') WHERE number = 2",
    "hash": "UPDATE reconciler.entry SET hash = repeat('1', 64) WHERE number = 2",
    "first entry, hash made right again": "UPDATE reconciler.entry SET body = body || ' ', hash = encode(sha256("
    "convert_to(previous || body || ' ', 'UTF8')), 'hex') WHERE number = 1",
    "first entry gone": "DELETE FROM reconciler.entry WHERE number = 1",
}


@pytest.mark.parametrize("statement", AROUND.values(), ids=AROUND.keys())
def test_who_goes_around_the_ledger_is_noticed(system: Governed, statement: str) -> None:
    """A superuser without triggers and constraints, put back afterwards: the chain no longer fits."""
    system.settle()
    system.state["gates"]["shop.limit"]["value"] = "11"
    system.write().settle()
    system.sql(
        "ALTER TABLE reconciler.entry DISABLE TRIGGER ALL",
        "ALTER TABLE reconciler.entry DROP CONSTRAINT entry_hash_check",
        statement,
        "ALTER TABLE reconciler.entry ADD CONSTRAINT entry_hash_check CHECK (hash = pg_catalog.encode("
        "pg_catalog.sha256(pg_catalog.convert_to(previous || body, 'UTF8')), 'hex')) NOT VALID",
        "UPDATE pg_constraint SET convalidated = true WHERE conname = 'entry_hash_check'",
        governed.TRIGGERS_ON,
    )
    for command in ("plan", "drift"):
        done = governed.command(command, "-s", system.directory, dsn=system.db.dsn)
        assert (done.returncode, done.stdout) == (4, "")
        assert "went around the ledger" in done.stderr


def test_the_chain_fits(system: Governed) -> None:
    """Entry after entry, computed here: the hash is that of the previous hash and the body."""
    import hashlib

    system.settle()
    for value in ("11", "12", "13"):
        system.state["gates"]["shop.limit"]["value"] = value
        system.write().settle()
    previous = "0" * 64
    rows = system.db.execute("SELECT number, previous, hash, body FROM reconciler.entry ORDER BY number")
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    for _, linked, own, body in rows:
        assert linked == previous
        previous = hashlib.sha256((linked + body).encode()).hexdigest()
        assert own == previous
        assert canonical(json.loads(body)).decode() == body


def test_two_names_in_one_ledger_have_a_chain_each(system: Governed) -> None:
    system.settle()
    system.state["governance"]["name"] = "annex"
    system.state["governance"]["scope"] = {}
    for section in ("functions", "markers", "invariants", "gates"):
        system.state[section] = {}
    system.state["gates"] = {"other": {"value": "y", "reason": "Another."}}
    system.write()
    plan = system.plan()
    assert [change.address for change in plan.setup] == ["policy.annex", "scope.annex"]
    assert [change.address for change in plan.changes] == ["gate.other"]
    system.apply(plan, initialize=True)
    system.in_sync()
    assert system.db.execute("SELECT name, number FROM reconciler.entry ORDER BY 1") == [("annex", 1), ("shop", 1)]


def test_check_plan_needs_no_database(system: Governed) -> None:
    assert trust.check_plan(system.plan()).name == "shop"
