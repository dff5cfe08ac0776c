"""The report of a rehearsal, held against the plan: what it may say, and what it is refused for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from reconciler import carried
from reconciler import plan as plans
from reconciler.checks import checks
from reconciler.errors import PlanDamaged, UsageError
from reconciler.model import Check, ProofReport, Rehearsal
from tests import states

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Desired, Verdict


def proof(name: str, sessions: int, **given: Any) -> Check:
    step = {
        "given": [],
        "arm": {},
        "holder": ["SELECT 1"] * (sessions - 1),
        "as": None,
        "when": "SELECT 1",
        "within": None,
    }
    whole = {"steps": [{**step, "then": [{"returns": []}]}], "requires": [], "advances": [], "stores": {}}
    return Check("proof", name, checks()["proof"].load({"reason": "why", "sessions": sessions, **whole, **given}))


def wanted(*more: Check) -> Desired:
    return states.desired(proof("alone", 1), proof("both", 2), states.invariant("no-cron"), *more)


def verdict(name: str, status: str = "rehearsed", detail: str = "1 step") -> Verdict:
    return states.verdict(status, detail=detail).model_copy(update={"address": f"proof.{name}"})


PLAN = states.build(wanted())


def report(**given: Any) -> ProofReport:
    made_for = {
        "effect_digest": PLAN.effect_digest,
        "schema_digest": "5" * 64,
        "server_version": "18.6",
        "rehearsed_at": "2026-05-22T11:00:00Z",
    }
    rehearsal = Rehearsal(**{name: given.pop(name, value) for name, value in made_for.items()})
    whole: dict[str, Any] = {
        "outcome": "no_changes",
        "target": states.TARGET,
        "seconds": 1.5,
        "proofs": (verdict("alone"), verdict("both", detail="2 steps; rehearsed on PostgreSQL 18.6, schema 5555")),
        "rehearsal": rehearsal,
    }
    return ProofReport(**{**whole, **given})


def test_only_what_no_apply_plays_is_carried_and_says_where() -> None:
    told = carried.verdicts(report(), PLAN, wanted())
    assert {address: (one.status, one.detail) for address, one in told.items()} == {
        "proof.both": (
            "rehearsed",
            "2 steps; rehearsed on PostgreSQL 18.6, schema 5555, by the report of 2026-05-22T11:00:00Z",
        )
    }


@pytest.mark.parametrize("status", ["failed", "not_judged"])
def test_a_rehearsal_that_failed_is_carried_as_that(status: str) -> None:
    found = report(proofs=(verdict("alone"), verdict("both", status).model_copy(update={"tolerated": True})))
    told = carried.verdicts(found, PLAN, wanted())["proof.both"]
    assert (told.status, told.tolerated) == (status, False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "of the target": ({"rehearsal": None}, "is of no rehearsal"),
    "other effects": ({"effect_digest": "7" * 64}, "was of other effects \\(777777777777, not "),
    "another server": (
        {"target": states.TARGET.model_copy(update={"server_version": "16.12"})},
        "was for PostgreSQL 16.12, the plan is for 16.13",
    ),
    "a proof is missing": ({"proofs": (verdict("alone"),)}, "was of other proofs: proof.both"),
    "a proof is strange": (
        {"proofs": (verdict("alone"), verdict("both"), verdict("third"))},
        "was of other proofs: proof.third",
    ),
    "says passed": (
        {"proofs": (verdict("alone"), verdict("both", "passed"))},
        "No rehearsal can say passed of proof.both",
    ),
    "says passed of another": (
        {"proofs": (verdict("alone", "passed"), verdict("both"))},
        "No rehearsal can say passed of proof.alone",
    ),
    "says deferred": (
        {"proofs": (verdict("alone"), verdict("both", "deferred"))},
        "No rehearsal can say deferred of proof.both",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_report_of_anything_else_is_refused(name: str) -> None:
    given, said = REFUSED[name]
    with pytest.raises(UsageError, match=said) as refused:
        carried.verdicts(report(**given), PLAN, wanted())
    assert "Rehearse again" in refused.value.hint


def test_another_text_of_a_proof_is_another_rehearsal() -> None:
    changed = states.desired(proof("alone", 1), proof("both", 2, reason="another"), states.invariant("no-cron"))
    with pytest.raises(UsageError, match="was of other effects"):
        carried.verdicts(report(), states.build(changed), changed)


def test_a_report_is_read_back_as_it_was_written_and_not_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "rehearsal.json"
    plans.write(file, report().dump())
    assert carried.load(file) == report()
    file.write_text(file.read_text().replace("18.6", "18.7"))
    with pytest.raises(PlanDamaged, match="changed after it was written"):
        carried.load(file)
    plans.write(file, {**report().dump(), "signed_by": "me"})
    with pytest.raises(PlanDamaged, match="is no report of a rehearsal"):
        carried.load(file)
    plans.write(file, PLAN.dump())
    with pytest.raises(PlanDamaged, match="is no report of a rehearsal"):
        carried.load(file)
