"""One approval for many targets, and everything that somebody could try to make of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import approve as approving
from reconciler import plan as planning
from reconciler.errors import NotApproved, PlanDamaged
from reconciler.fleet import groups
from reconciler.model import Approval, canonical, digest
from tests.conftest import _clone
from tests.fleets import Shops, rewrite
from tests.integration.governed import command
from tests.integration.test_signatures import person

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.fleet.groups import Group
    from tests.servers import Database, Server

SIGNED = {"required": 1, "signed": True, "expires": "24h", "approvers": "approvers"}


def signed(db: Database, root: Path, number: int) -> Shops:
    """Shops under a signed policy."""
    operator = person(root, "operator")
    (root / "state").mkdir(exist_ok=True)
    (root / "state" / "approvers").write_text(operator.listed())
    return Shops(db, root, number, approval=SIGNED)


@pytest.fixture(scope="module")
def offline(
    server: Server, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Group, Approval]]:
    """A group of three with its signed approval; the databases are never written to."""
    for db in _clone(server, new_name(), "template1"):
        shops = signed(db, tmp_path_factory.mktemp("signed"), 3)
        (plan,) = shops.plan()
        file = shops.approve(plan, "--key", shops.root / "key-of-operator")
        yield shops.group(plan), approving.load(file)
        shops.drop()


def judged(group: Group, approval: Approval, name: str = "shop-001", **court: Any) -> str:
    """Why the approval does not cover the target; empty when it does."""
    plan = group.of(name, None)
    policy, allowed = approving.judging(plan)
    usual = approving.Court(policy, allowed, frozenset(), datetime.now(UTC), target=plan.target)
    try:
        counted = approving.verify(
            [approval],
            replace(usual, **court),
            effect_digest=plan.effect_digest,
            hazards=plan.hazards,
            attestations=plan.attestations,
        )
    except NotApproved as refused:
        return refused.details[0]
    assert counted == [approval]
    return ""


def changed(approval: Approval, targets: list[dict[str, str]], *, resealed: bool, **more: str) -> Approval:
    """With another list; `resealed`: and the digest that goes with it, as who has no key can make it."""
    document = approval.dump()
    document["listed"] |= {"targets": targets, **more}
    edited = Approval.model_validate_json(canonical(document))
    assert edited.listed is not None
    return edited.model_copy(update={"effect_digest": planning.fleet_digest(edited.listed)}) if resealed else edited


def test_it_covers_each_of_its_targets(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    assert approval.target is None
    assert approval.listed == group.listed
    assert [judged(group, approval, name) for name in group.names] == [""] * 3
    # The digest alone says for which target it is; no court need name one.
    assert [judged(group, approval, name, target=None) for name in group.names] == [""] * 3


EXTRA = {"name": "shop-009", "database": "other", "system_identifier": "7000000000000000001"}


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("attack", ["added", "removed", "renamed", "another database", "another system", "swapped"])
def test_a_list_that_was_changed_covers_nobody(offline: tuple[Group, Approval], attack: str, resealed: bool) -> None:
    group, approval = offline
    targets: list[dict[str, str]] = [dict(one) for one in approval.dump()["listed"]["targets"]]
    match attack:
        case "added":
            targets.append(EXTRA)
        case "removed":
            targets.pop()
        case "renamed":
            targets[2]["name"] = "shop-010"
        case "another database":
            targets[2]["database"] = "other"
        case "another system":
            targets[2]["system_identifier"] = "7000000000000000001"
        case _:
            targets[1], targets[2] = targets[2], targets[1]
    edited = changed(approval, targets, resealed=resealed)
    said = {judged(group, edited, name) for name in group.names}
    assert "" not in said
    if not resealed:
        assert all("is for other effects" in one or "not for this database" in one for one in said)
    else:
        assert any("does not fit what was signed" in one for one in said), said


@pytest.mark.parametrize("word", ["fleet", "effects_digest"])
def test_the_rest_of_the_list_is_signed_too(offline: tuple[Group, Approval], word: str) -> None:
    group, approval = offline
    targets = approval.dump()["listed"]["targets"]
    value = "sheds" if word == "fleet" else "0" * 64
    for resealed in (False, True):
        assert judged(group, changed(approval, targets, resealed=resealed, **{word: value}))


def test_a_target_that_is_not_listed_is_not_covered(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    stranger = group.plan.target.model_copy(update={"name": "shop-009"})
    wider = group.model_copy(update={"targets": (*group.targets, stranger)})
    assert "not for this database" in judged(wider, approval, "shop-009")
    assert "other effects" in judged(wider, approval, "shop-009", target=None)
    # What stands in the plan file decides nothing: those that are listed are covered as before.
    assert judged(wider, approval) == ""


def test_effects_that_differ_in_one_byte_are_not_covered(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    desired = group.plan.desired
    gate = desired["items"]["gate.shop.limit"]
    other = {
        **desired,
        "items": {**desired["items"], "gate.shop.limit": {**gate, "spec": {**gate["spec"], "value": "11"}}},
    }
    effects = planning.effects_digest(other, group.plan.setup, group.plan.changes)
    assert effects != group.plan.effects_digest
    made = group.model_copy(
        update={"plan": group.plan.model_copy(update={"desired": other, "effects_digest": effects})}
    )
    assert "other effects" in judged(made, approval)


def test_it_is_for_one_apply_on_each_target(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    assert "used before" in judged(group, approval, used=frozenset({approval.id}))


def test_one_target_and_a_list_are_never_taken_for_each_other(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    plan = group.of("shop-001", None)
    single = approval.model_copy(
        update={"target": plan.target, "listed": None, "effect_digest": plan.effect_digest, "signature": None}
    )
    unsigned: dict[str, Any] = {
        "policy": approving.judging(plan)[0].model_copy(
            update={"approval": plan.policy.approval.model_copy(update={"signed": False})}
        )
    }
    assert judged(group, single, **unsigned) == ""
    assert "not for this database" in judged(group, single, "shop-002", **unsigned)
    # The signature of a list does not hold for one of its targets, nor the digest of one for a list.
    assert "does not fit what was signed" in judged(group, single.model_copy(update={"signature": approval.signature}))
    assert "other effects" in judged(
        group, approval.model_copy(update={"effect_digest": plan.effect_digest, "signature": None}), **unsigned
    )
    for both in ({"target": plan.target.dump()}, {"listed": None}):
        document = {**approval.dump(), **both}
        with pytest.raises(ValueError, match="an approval is for a target, or for a list"):
            Approval.model_validate_json(canonical(document))


def test_what_was_signed_for_one_target_keeps_its_bytes(offline: tuple[Group, Approval]) -> None:
    group, approval = offline
    plan = group.of("shop-001", None)
    single = approval.model_copy(update={"target": plan.target, "listed": None})
    assert "listed" not in single.dump()
    assert b'"listed"' not in single.statement()
    assert b'"target"' not in approval.statement().replace(b'"targets"', b"")


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = signed(db, tmp_path, 3)
    yield made
    made.drop()


def test_signed_for_two_groups(shops: Shops) -> None:
    key = shops.root / "key-of-operator"
    shops.sql("shop-002", "UPDATE app.settings SET value = '9' WHERE name = 'shop.limit'")
    first, second = shops.plan()
    assert shops.group(first).names == ("shop-001", "shop-003")
    assert shops.group(second).names == ("shop-002",)
    approval = shops.approve(first, "--key", key)
    shown = command("show", approval)
    assert "shop-001" in shown.stdout
    assert "shop-003" in shown.stdout
    assert "2 targets of shops" in shown.stdout

    # The approval of one group for the other.
    done = shops.apply(second, "--approval", approval, evidence="a")
    assert done.returncode == 4
    assert "not approved" in done.stderr
    assert shops.entries("shop-002") == 0

    # A list in the plan that is longer than what was approved.
    document = planning.read(first, "plan")
    wider = first.with_name("wider.fleet.plan")
    stranger = shops.group(second).plan.target.dump()
    wider.write_bytes(first.read_bytes())
    rewrite(wider, {"targets": sorted([*document["targets"], stranger], key=lambda one: one["name"])})
    done = shops.apply(wider, "--approval", approval, "--only", "shop-002", evidence="b")
    assert done.returncode == 4
    assert shops.entries("shop-002") == 0

    # A list in which another target's name stands for this database.
    rewrite(wider, {"targets": [{**stranger, "name": "shop-001"}, document["targets"][1]]})
    with pytest.raises(PlanDamaged):
        groups.load(wider)

    # The single command, where the target has another name.
    single = shops.root / "single.plan"
    state = ("-s", shops.template.directory)
    assert command("plan", *state, "--out", single, dsn=shops.dsn("shop-001")).returncode == 0
    done = command("apply", single, "--approval", approval, "--initialize", dsn=shops.dsn("shop-001"))
    assert done.returncode == 4
    assert "not for this database" in done.stderr

    done = shops.apply(first, "--key", key, evidence="c")
    assert done.returncode == 0, done.stderr
    signers = ("--allowed-signers", shops.root / "state" / "approvers")
    done = command("verify", shops.root / "c" / "shop-001", *signers)
    assert done.returncode == 0, done.stdout
    kept = next((shops.root / "c" / "shop-001" / "approvals").iterdir())
    assert kept.read_bytes() == approval.read_bytes()

    # Once more on a target that has it, by the single command with the plan of just that target.
    plan = shops.group(first).of("shop-001", None)
    planning.write(single, plan.dump())
    done = command("apply", single, "--approval", approval, dsn=shops.dsn("shop-001"))
    assert done.returncode == 4
    assert "used before" in done.stderr
    assert shops.entries("shop-001") == 1
    shops.approve(second, "--key", key)
    done = shops.apply(second, evidence="d")
    assert done.returncode == 0, done.stderr
    assert shops.nothing_left()


def test_a_plan_of_a_fleet_that_was_edited_is_refused(offline: tuple[Group, Approval], tmp_path: Path) -> None:
    group, _ = offline
    file = tmp_path / "a.fleet.plan"
    planning.write(file, group.dump())
    assert groups.load(file) == (group, digest(group.dump()))
    good = group.dump()
    for wrong in (
        {"targets": [*good["targets"], good["targets"][0]]},
        {"targets": list(reversed(good["targets"]))},
        {"targets": good["targets"][1:]},
        {"targets": []},
        {"plan": {**good["plan"], "effects_digest": "0" * 64}},
        {"plan": {**good["plan"], "changes": []}},
    ):
        rewrite(file, wrong)
        with pytest.raises(PlanDamaged):
            groups.load(file)
        planning.write(file, good)
