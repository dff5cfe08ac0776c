"""Three points, desired, last applied and live: what is drift, what is pending, and the exit code."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import drift
from reconciler.errors import UsageError
from reconciler.model import CLASSES, Drift, Entry, Finding, Live
from tests import states

if TYPE_CHECKING:
    from reconciler.drift import DriftReport
    from reconciler.model import Declared

CHANGED = "changed since the last apply"
UNAPPLIED = "declared and not applied"
FILES = "the files changed since the last apply"
UNKNOWN = "differs from the files; what was last applied is not known"


def classify(wanted: Declared, last: str | None, live: str | None, *, known: bool = True) -> drift.Classified:
    """One gate with three values; None is a row that is not there."""
    desired = states.desired(wanted)
    manifest = {} if last is None else states.manifest(desired, {wanted.address: states.gate_row(wanted.name, last)})
    found = {} if live is None else {wanted.address: states.gate_row(wanted.name, live)}
    return drift.classify(desired, manifest, states.live(found), last_known=known)


def told(found: tuple[Drift, ...]) -> tuple[str, str] | None:
    return (found[0].actions[0], found[0].reason) if found else None


@pytest.mark.parametrize(
    ("last", "live", "drifted", "pending"),
    [
        # The files want "a".
        ("a", "a", None, None),
        ("a", "b", ("change", CHANGED), None),
        ("a", None, ("remove", CHANGED), None),
        (None, "a", None, None),
        (None, "b", None, ("add", UNAPPLIED)),
        (None, None, None, ("add", UNAPPLIED)),
        ("b", "b", None, ("change", FILES)),
        ("b", "a", ("change", CHANGED), ("change", FILES)),
        ("b", "c", ("change", CHANGED), ("change", FILES)),
        ("b", None, ("remove", CHANGED), ("change", FILES)),
    ],
)
def test_drift_and_pending_are_kept_apart(
    last: str | None, live: str | None, drifted: tuple[str, str] | None, pending: tuple[str, str] | None
) -> None:
    found = classify(states.gate("app.a", "a"), last, live)
    assert (told(found.drift), told(found.pending)) == (drifted, pending)


@pytest.mark.parametrize(("live", "drifted"), [("a", None), ("b", ("change", UNKNOWN)), (None, ("remove", UNKNOWN))])
def test_with_a_ledger_that_cannot_be_read_every_difference_is_drift(live: str | None, drifted: Any) -> None:
    found = classify(states.gate("app.a", "a"), None, live, known=False)
    assert (told(found.drift), found.pending) == (drifted, ())


def test_a_row_that_was_written_again_is_touched_and_nothing_else() -> None:
    gate = states.gate("app.a", "a")
    desired = states.desired(gate)
    row = states.gate_row("app.a", "a")
    manifest = states.manifest(desired, {gate.address: row})
    manifest[gate.address]["facts"] = {"xmin": "700"}
    for xmin, touched in (("700", []), ("701", ["gate.app.a"]), (None, [])):
        live = states.live({gate.address: row}, {gate.address: {"xmin": xmin}})
        found = drift.classify(desired, manifest, live, last_known=True)
        assert ([one.address for one in found.touched], found.drift, found.pending) == (touched, (), ())
        made = report(found)
        assert ([item.item_class for item in made.items], drift.exit_code(made)) == (["touched"] * len(touched), 0)


def test_drift_names_what_was_and_what_is() -> None:
    (moved,) = classify(states.gate("app.a", "a"), "a", "b").drift
    assert [(field.name, field.before, field.after) for field in moved.fields] == [("value", "a", "b")]
    assert (moved.address, moved.kind) == ("gate.app.a", "gate")
    assert moved.before == states.gate_row("app.a", "a").dump()
    assert moved.after == states.gate_row("app.a", "b").dump()
    assert classify(states.gate("app.a", "a"), "a", None).drift[0].fields == ()


def test_drift_exists_exactly_where_live_is_not_what_was_applied() -> None:
    for wanted, last, live in itertools.product("abc", "abc", "abc"):
        found = classify(states.gate("app.a", wanted), last, live)
        assert bool(found.drift) == (last != live)
        assert bool(found.pending) == (wanted != last)


def test_objects_are_told_by_address_and_others_are_left_out() -> None:
    gates = [states.gate(f"app.{name}", "a") for name in "abc"]
    desired = states.desired(*gates)
    manifest = states.manifest(desired, {gate.address: gate.spec for gate in gates})
    live = states.live({gate.address: gate.spec for gate in gates} | {"gate.app.b": states.gate_row("app.b", "x")})
    found = drift.classify(desired, manifest, live, last_known=True)
    assert [moved.address for moved in found.drift] == ["gate.app.b"]


@pytest.mark.parametrize(
    ("live", "drifted"),
    [
        ({"beats": "0", "seen": "then"}, False),
        ({"beats": "9", "seen": "now"}, False),
        ({"beats": "9"}, False),
        (None, True),
    ],
)
def test_a_marker_drifts_only_when_its_row_is_gone(live: dict[str, str] | None, drifted: bool) -> None:
    marker = states.marker("worker")
    desired = states.desired(marker)
    manifest = states.manifest(desired, {marker.address: states.marker_row("worker", beats="0", seen="then")})
    found = {} if live is None else {marker.address: states.marker_row("worker", **live)}
    moved = drift.classify(desired, manifest, states.live(found), last_known=True)
    assert (bool(moved.drift), moved.pending) == (drifted, ())


# ------------------------------------------------------------------------------------------------- report, exit codes


def report(moved: drift.Classified | None = None, **given: Any) -> DriftReport:
    whole: dict[str, Any] = {
        "target": states.TARGET,
        "entry": None,
        "findings": (),
        "verdicts": (),
        "not_compared": (),
        "fail_on": (),
        "now": states.NOW,
    }
    return drift.report(moved or drift.Classified((), ()), **{**whole, **given})


DRIFTED = classify(states.gate("app.a", "a"), "a", "b")
PENDING = classify(states.gate("app.a", "a"), "b", "b")
STALE = Finding(code="stale_heartbeat", address="marker.w", message="old")


@pytest.mark.parametrize(
    ("moved", "given", "fail_on", "outcome", "code"),
    [
        (None, {}, "", "no_changes", 0),
        (PENDING, {}, "", "no_changes", 0),
        (DRIFTED, {}, "", "drift", 2),
        (None, {"findings": [STALE]}, "", "no_changes", 0),
        (None, {"findings": [STALE]}, "undeclared", "no_changes", 0),
        (None, {"findings": [STALE]}, "undeclared, stale_heartbeat", "drift", 2),
        (None, {"verdicts": [states.verdict("held")]}, "", "no_changes", 0),
        (None, {"verdicts": [states.verdict("violated")]}, "", "violated", 3),
        (None, {"verdicts": [states.verdict("not_judged")]}, "", "violated", 3),
        (DRIFTED, {"verdicts": [states.verdict("violated")]}, "", "violated", 3),
        (DRIFTED, {"verdicts": [states.verdict("violated")], "findings": [STALE]}, "stale_heartbeat", "violated", 3),
    ],
)
def test_the_outcome_and_the_exit_code(
    moved: Any, given: dict[str, Any], fail_on: str, outcome: str, code: int
) -> None:
    codes = drift.finding_codes(fail_on)
    found = report(moved, fail_on=codes, **given)
    assert (found.outcome, drift.exit_code(found)) == (outcome, code)


def test_a_report_says_when_and_since_what() -> None:
    body = {"plan": {"state": {"release": "first"}}}
    entry = Entry(name="app", number=3, run_id="r", recorded_at="then", previous="0" * 64, hash="f" * 64, body=body)
    found = report(entry=entry)
    assert found.checked_at == "2026-05-22T12:00:00Z"
    assert found.last_applied == {"entry": 3, "recorded_at": "then", "release": "first", "hash": "f" * 64}
    assert report().last_applied is None


def test_codes_of_findings() -> None:
    assert drift.finding_codes("") == frozenset()
    assert drift.finding_codes(" undeclared ,, stale_heartbeat,") == {"undeclared", "stale_heartbeat"}
    with pytest.raises(UsageError, match="there is no finding stale, unknown") as refused:
        drift.finding_codes("undeclared,unknown,stale")
    assert "stale_heartbeat" in refused.value.hint
    with pytest.raises(UsageError) as refused:
        drift.finding_codes("undeclard,moved_pins")
    assert refused.value.hint.startswith("Did you mean moved_pin, undeclared? Findings: violated, ")
    assert drift.finding_codes(",".join(CLASSES)) == set(CLASSES)


def test_an_exit_code_always_has_something_to_show() -> None:
    """What fails is an item, and an item that fails is what the exit code says."""
    parts = itertools.product([None, PENDING, DRIFTED], [(), (STALE,)], ["held", "violated", "not_judged"], CLASSES)
    for moved, findings, status, asked in parts:
        found = report(moved, findings=findings, verdicts=[states.verdict(status)], fail_on={asked})
        assert bool(drift.exit_code(found)) == any(item.fails for item in found.items)


def test_what_is_live_beyond_the_files_is_no_drift() -> None:
    found = drift.classify(states.desired(), {}, Live({"gate.x": states.gate_row("x", "1")}, {}, ()), last_known=True)
    assert found == drift.Classified((), ())
