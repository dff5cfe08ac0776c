"""Approvals: what a person must say, for how long it holds, and when approvals cover a plan."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import approve as approvals
from reconciler import plan as plans
from reconciler.errors import NotApproved, PlanDamaged, ProofFailed, UsageError, Violated
from reconciler.model import Approval, Json, Plan
from tests import states

if TYPE_CHECKING:
    from pathlib import Path

HAZARDS = ("arms_gate", "moves_from_safe")


def plan(**policy: Any) -> Plan:
    """A plan that arms a gate."""
    gate = states.gate("app.a", "true", from_=["false"], safe="false", lock="approval")
    wanted = states.desired(gate, policy=states.policy(**policy))
    return states.build(wanted, states.live({gate.address: states.gate_row("app.a", "false")}))


def approve(of: Plan | None = None, **given: Any) -> Approval:
    whole: dict[str, Any] = {
        "approver": "operator",
        "reason": "change 4711",
        "accepted": HAZARDS,
        "expires": None,
        "now": states.NOW,
    }
    return approvals.approve(of or plan(), "c" * 64, **{**whole, **given})


# ---------------------------------------------------------------------------------------------------------- approving


def test_an_approval_says_what_who_why_and_until_when() -> None:
    made, given = plan(), approve(accepted=["moves_from_safe", "arms_gate", "arms_gate"])
    assert given.model_dump(exclude={"id"}) == {
        "format_version": "1.0",
        "effect_digest": made.effect_digest,
        "plan_checksum": "c" * 64,
        "target": states.TARGET.dump(),
        "approver": "operator",
        "reason": "change 4711",
        "accepted": HAZARDS,
        "attestations": (),
        "issued_at": "2026-05-22T12:00:00Z",
        "expires_at": "2026-05-23T12:00:00Z",
        "break_glass": False,
        "signature": None,
    }
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", given.id)
    assert approve().id != given.id


@pytest.mark.parametrize(
    ("accepted", "missing"), [((), "arms_gate, moves_from_safe"), (HAZARDS[:1], "moves_from_safe")]
)
def test_every_hazard_must_be_named(accepted: tuple[str, ...], missing: str) -> None:
    with pytest.raises(NotApproved, match=rf"Hazards not accepted: {missing}\.") as refused:
        approve(accepted=accepted)
    assert refused.value.details[-1] == "moves_from_safe: gate.app.a"
    assert "--accept moves_from_safe" in refused.value.hint


def test_a_hazard_that_the_plan_does_not_have_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="no hazard grants_public, retires") as refused:
        approve(accepted=[*HAZARDS, "retires", "grants_public"])
    assert refused.value.hint == "It has arms_gate, moves_from_safe."


@pytest.mark.parametrize("given", [{"approver": " "}, {"reason": ""}, {"reason": " \t\n"}])
def test_a_name_and_a_reason_are_needed(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a name and a reason"):
        approve(**given)


def test_a_plan_without_changes_needs_no_approval() -> None:
    with pytest.raises(UsageError, match="nothing to approve"):
        approve(states.build(states.desired()), accepted=())


def test_setup_alone_can_be_approved() -> None:
    assert approve(states.build(states.desired(), setup=[states.setup()]), accepted=()).accepted == ()


@pytest.mark.parametrize("status", ["violated", "not_judged"])
def test_a_plan_that_an_invariant_blocks_cannot_be_approved(status: str) -> None:
    blocked = plan().model_copy(update={"invariants": (states.verdict(status), states.verdict("held", "fine"))})
    with pytest.raises(Violated, match="1 check not passed") as refused:
        approve(blocked)
    assert refused.value.exit_code == 3
    assert refused.value.details == (f"invariant.no-cron: {status}: why",)


def test_several_that_block_are_all_named() -> None:
    found = (states.verdict("violated", "a"), states.verdict("not_judged", "b"))
    with pytest.raises(Violated, match="2 checks not passed") as refused:
        approvals.refuse(found)
    assert len(refused.value.details) == 2
    approvals.refuse(())


@pytest.mark.parametrize("status", ["failed", "not_judged"])
def test_proofs_alone_have_a_word_of_their_own(status: str) -> None:
    proof = states.verdict(status).model_copy(update={"address": "proof.P1"})
    with pytest.raises(ProofFailed, match="2 proofs not passed") as failed:
        approvals.refuse((proof, proof))
    assert (failed.value.outcome, failed.value.exit_code) == ("proof_failed", 3)
    for beside in ("invariant.x", "surface.x"):
        with pytest.raises(Violated, match="2 checks not passed") as violated:
            approvals.refuse((proof, proof.model_copy(update={"address": beside, "status": "violated"})))
        assert (violated.value.outcome, violated.value.exit_code) == ("violated", 3)


def test_a_policy_that_asks_for_signatures_is_not_served_without() -> None:
    with pytest.raises(NotApproved, match="must be signed"):
        approve(plan(signed=True))


@pytest.mark.parametrize(("hours", "expired"), [(23.999, False), (24, True), (300, True)])
def test_an_expired_plan_cannot_be_approved(hours: float, expired: bool) -> None:
    now = states.NOW + timedelta(hours=hours)
    if expired:
        with pytest.raises(NotApproved, match="expired at 2026-05-23T12:00:00Z"):
            approve(now=now)
    else:
        approve(now=now)


@pytest.mark.parametrize(
    ("expires", "until"),
    [
        ("1s", "2026-05-22T12:00:01Z"),
        ("2h", "2026-05-22T14:00:00Z"),
        ("24h", "2026-05-23T12:00:00Z"),
        ("1d", "2026-05-23T12:00:00Z"),
    ],
)
def test_an_approval_may_be_shorter_than_the_policy(expires: str, until: str) -> None:
    assert approve(expires=expires).expires_at == until


@pytest.mark.parametrize("expires", ["25h", "1441m", "2d"])
def test_an_approval_may_not_be_longer_than_the_policy(expires: str) -> None:
    with pytest.raises(UsageError, match=f"--expires {expires} is longer than the policy's 24h"):
        approve(expires=expires)


@pytest.mark.parametrize("expires", ["", "2", "soon", "0s", "-1h"])
def test_an_expiry_that_is_no_duration(expires: str) -> None:
    with pytest.raises(UsageError, match=r"--expires: .* is no duration"):
        approve(expires=expires)


# ---------------------------------------------------------------------------------------------------------- verifying


def verify(*given: Approval, **facts: Any) -> None:
    whole: dict[str, Any] = {"effect_digest": plan().effect_digest, "hazards": HAZARDS, "attestations": ()}
    court: dict[str, Any] = {
        "policy": states.policy(),
        "allowed": "",
        "used": (),
        "now": states.NOW + timedelta(hours=1),
        "target": None,
    }
    judged = approvals.Court(**{name: facts.pop(name, value) for name, value in court.items()})
    approvals.verify(given, judged, **{**whole, **facts})


def reasons(*given: Approval, **facts: Any) -> list[str]:
    with pytest.raises(NotApproved, match=r"The plan is not approved\.") as refused:
        verify(*given, **facts)
    assert refused.value.exit_code == 4
    assert refused.value.outcome == "not_approved"
    return list(refused.value.details)


def test_an_approval_covers_the_plan_it_was_given_for() -> None:
    verify(approve())


def test_nobody_is_not_enough() -> None:
    assert reasons() == ["0 of 1 approvals"]


def test_a_used_approval() -> None:
    given = approve()
    assert reasons(given, used={given.id}) == [
        "the approval of operator was used before; an approval is for one apply",
        "0 of 1 approvals",
    ]


def test_other_effects() -> None:
    given = approve()
    assert reasons(given, effect_digest="f" * 64)[0] == (
        f"the approval of operator is for other effects ({given.effect_digest[:12]}, not ffffffffffff)"
    )


@pytest.mark.parametrize(("seconds", "expired"), [(-1, False), (0, True), (1, True)])
def test_an_approval_expires_by_the_clock_of_the_server(seconds: int, expired: bool) -> None:
    given = approve(expires="2h")
    now = states.NOW + timedelta(hours=2, seconds=seconds)
    if expired:
        assert reasons(given, now=now)[0] == "the approval of operator expired at 2026-05-22T14:00:00Z"
    else:
        verify(given, now=now)


@pytest.mark.parametrize(("hours", "refused"), [(24, False), (24.1, True), (80_000, True)])
def test_the_installed_policy_limits_how_long_an_approval_holds(hours: float, refused: bool) -> None:
    end = plans.stamp(states.NOW + timedelta(hours=hours))
    given = approve().model_copy(update={"expires_at": end})
    if refused:
        assert reasons(given)[0] == "the approval of operator is meant to hold longer than the installed policy's 24h"
    else:
        verify(given)


@pytest.mark.parametrize(("minutes", "early"), [(-5, False), (-6, True), (-3000, True)])
def test_an_approval_from_the_future(minutes: int, early: bool) -> None:
    now = states.NOW + timedelta(minutes=minutes)
    if early:
        assert "is in the future of the server's clock" in reasons(approve(), now=now)[0]
    else:
        verify(approve(), now=now)


def test_the_time_zone_of_the_server_means_nothing() -> None:
    from datetime import timezone

    hanoi = (states.NOW + timedelta(hours=1)).astimezone(timezone(timedelta(hours=7)))
    verify(approve(expires="2h"), now=hanoi)
    assert "expired" in reasons(approve(expires="2h"), now=hanoi + timedelta(hours=1))[0]


def test_hazards_that_apply_derives_count_not_those_of_the_plan() -> None:
    assert reasons(approve(), hazards=[*HAZARDS, "retires", "overwrites_drift"])[0] == (
        "the approval of operator does not accept overwrites_drift, retires"
    )


def test_attestations_that_apply_derives_count_each_by_name() -> None:
    given = approve().model_copy(update={"attestations": ("C1", "C3")})
    assert reasons(given, attestations=("C1", "C2", "C4"))[0] == "the approval of operator does not attest C2, C4"
    assert reasons(approve(), attestations=("C1",))[0] == "the approval of operator does not attest C1"
    verify(given, attestations=("C1",))


def test_an_approval_that_gives_no_reason() -> None:
    for reason in ("", " ", "\n"):
        given = approve().model_copy(update={"reason": reason})
        assert reasons(given)[0] == "the approval of operator gives no reason"


@pytest.mark.parametrize("name", ["name", "database", "system_identifier"])
def test_an_approval_for_another_place_says_which(name: str) -> None:
    elsewhere = states.TARGET.model_copy(update={name: "other"})
    given = approve().model_copy(update={"target": elsewhere})
    assert reasons(given, target=states.TARGET)[0] == (
        f"the approval of operator is for target {elsewhere.name}, database {elsewhere.database}"
        f" of system {elsewhere.system_identifier}, not for this database"
    )
    verify(approve(), target=states.TARGET.model_copy(update={"server_version": "17.1"}))


@pytest.mark.parametrize("alias", ["Operator", "oper\u200bator", "\u202eoperator", "operator\u00ad", "\ufeffoperator"])
def test_letters_that_nobody_sees_make_no_second_person(alias: str) -> None:
    two = approve(), approve(approver="second").model_copy(update={"approver": alias})
    assert reasons(*two, policy=states.policy(required=2)) == ["1 of 2 approvals"]


def test_more_accepted_than_needed_is_fine() -> None:
    verify(approve(), hazards=())


def test_the_installed_policy_decides_about_signatures() -> None:
    assert reasons(approve(), policy=states.policy(signed=True))[0] == (
        "the approval of operator is not signed, and the installed policy asks for signatures"
    )


def test_a_signature_that_nobody_checks_is_none() -> None:
    forged = approve().model_copy(update={"signature": "-----BEGIN SSH SIGNATURE-----"})
    for signed in (True, False):
        assert reasons(forged, policy=states.policy(signed=signed))[0].startswith(
            "the approval of operator holds no signature that OpenSSH can read"
        )


def test_distinct_people_count() -> None:
    two = states.policy(required=2)
    one, again, other = approve(), approve(), approve(approver="second")
    assert reasons(one, policy=two) == ["1 of 2 approvals"]
    assert reasons(one, again, policy=two) == ["1 of 2 approvals"]
    assert reasons(one, one, policy=two) == ["1 of 2 approvals"]
    verify(one, other, policy=two)
    assert reasons(one, other, policy=two, used={other.id})[-1] == "1 of 2 approvals"


def test_every_reason_is_named_at_once() -> None:
    used, short, stranger = approve(), approve(approver="b", expires="1s"), approve(approver="c")
    found = reasons(used, short, stranger, used={used.id}, hazards=[*HAZARDS, "retires"])
    assert len(found) == 4
    assert [line.split(" ")[3] for line in found[:3]] == ["operator", "b", "c"]


def test_a_bad_approval_beside_a_good_one_does_no_harm() -> None:
    verify(approve(approver="late", expires="1s"), approve())


# -------------------------------------------------------------------------------------------------------------- files


def saved(path: Path, document: Json) -> Path:
    path.write_bytes(plans.serialize(document))
    return path


def test_an_approval_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    given = approve()
    assert approvals.load(saved(tmp_path / "a", given.dump())) == given


@pytest.mark.parametrize("name", [name for name, one in Approval.model_fields.items() if one.is_required()])
def test_an_approval_lacks_nothing(tmp_path: Path, name: str) -> None:
    document = {key: value for key, value in approve().dump().items() if key != name}
    with pytest.raises(PlanDamaged, match="is no approval"):
        approvals.load(saved(tmp_path / "a", document))


def test_a_plan_is_no_approval_and_an_approval_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanDamaged, match="is no approval"):
        approvals.load(saved(tmp_path / "a", plan().dump()))
    with pytest.raises(PlanDamaged, match="is no plan"):
        plans.load(saved(tmp_path / "b", approve().dump()))


def test_an_approval_with_a_byte_changed_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", approve().dump())
    data = path.read_bytes()
    for at, byte in enumerate(data):
        path.write_bytes(data[:at] + bytes([byte ^ 1]) + data[at + 1 :])
        with pytest.raises(PlanDamaged):
            approvals.load(path)


@pytest.mark.parametrize("id_", ["", "1", "11111111-2222-4333-8444-55555555555A", "11111111222243338444555555555555"])
def test_an_id_has_one_spelling(tmp_path: Path, id_: str) -> None:
    """The ledger compares them; in another spelling a used one would look new."""
    with pytest.raises(PlanDamaged, match="its id is no UUID in small letters"):
        approvals.load(saved(tmp_path / "a", {**approve().dump(), "id": id_}))


@pytest.mark.parametrize("name", ["issued_at", "expires_at"])
@pytest.mark.parametrize("moment", ["", "soon", "2026-13-01T00:00:00Z", "9999"])
def test_an_approval_with_a_time_that_is_none_is_damaged(tmp_path: Path, name: str, moment: str) -> None:
    with pytest.raises(PlanDamaged):
        approvals.load(saved(tmp_path / "a", {**approve().dump(), name: moment}))


def test_where_approvals_stand() -> None:
    from pathlib import Path

    assert approvals.beside(Path("x/a.plan"), "jo@x.org") == Path("x/a.plan.jo@x.org.approval.json")


@pytest.mark.parametrize("name", ["", "../jo", "a/b", "a b", ".hidden", "-x", "ü", "a\n", "a" * 101])
def test_a_name_that_cannot_stand_in_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a file name") as refused:
        approvals.beside(tmp_path / "a.plan", name)
    assert "--out" in refused.value.hint


def test_all_approvals_beside_a_plan(tmp_path: Path) -> None:
    for name in (
        "a.plan.b.approval.json",
        "a.plan.a.approval.json",
        "a.plan",
        "b.plan.a.approval.json",
        "a.plan.x.json",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in approvals.all_beside(tmp_path / "a.plan")] == [
        "a.plan.a.approval.json",
        "a.plan.b.approval.json",
    ]


def test_approvals_are_json_for_other_programs(tmp_path: Path) -> None:
    document = json.loads(saved(tmp_path / "a", approve().dump()).read_text())
    # `listed` is in those for a fleet, in the place of `target`.
    assert set(document) == {*Approval.model_fields, "checksum"} - {"listed"}
