"""What people read: the lines that other programs rely on, the legend, and nothing from outside raw."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler import drift as drifting
from reconciler.model import Approval, Change, Drift, FieldChange, Finding, NotCompared, Outcome, Statement, Summary
from reconciler.plan import summarize
from reconciler.render import text
from tests import states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reconciler.drift import DriftReport
    from reconciler.model import Plan, Verdict

HELD = (
    "Invariants: 0 held, 0 violated, 0 attested, 0 not judged. Proofs: 0 passed, 0 rehearsed."
    " Surface: 0 of 0 as predicted."
)


def plan(*changes: Change, **given: Any) -> Plan:
    made = states.build(states.desired())
    return made.model_copy(update={"changes": changes, "summary": summarize(changes, 0, 0), **given})


def change(*actions: str, name: str = "app.a", **given: Any) -> Change:
    fields = {"address": f"gate.{name}", "kind": "gate", "actions": actions, "reason": "why", **given}
    return Change.model_validate(fields)


def lines(found: Plan, *, colour: bool = False, verbose: bool = False) -> list[str]:
    return text.plan(found, colour=colour, verbose=verbose).splitlines()


def outcome(**given: Any) -> Outcome:
    whole: dict[str, Any] = {
        "outcome": "applied",
        "run_id": "r",
        "target": states.TARGET,
        "effect_digest": "e" * 64,
        "entry": 2,
        "hash": "f" * 64,
        "genesis": False,
        "transaction_id": "745",
        "statements": 31,
        "seconds": 0.249,
        "summary": Summary(add=10, change=1),
        "invariants": (),
        "proofs": (),
        "surface": (),
    }
    return Outcome(**{**whole, **given})


# ----------------------------------------------------------------------------------------------------- lines of the API


def test_the_line_of_a_plan() -> None:
    found = plan(*(change("add", name=f"app.{number}") for number in range(10)), change("change", name="app.x"))
    assert text.plan_line(found) == "Plan: 10 to add, 1 to change, 0 to remove."
    shown = lines(found)
    assert shown[shown.index(HELD) - 1] == "Plan: 10 to add, 1 to change, 0 to remove."


def test_the_line_of_a_plan_with_setup_alone() -> None:
    assert text.plan_line(plan(setup=(states.setup(),))) == "Plan: 0 to add, 0 to change, 0 to remove."


def test_a_replacement_is_one_removal_and_one_addition() -> None:
    assert text.plan_line(plan(change("remove", "add"))) == "Plan: 1 to add, 0 to change, 1 to remove."


def test_what_is_forgotten_is_named_only_when_there_is_some() -> None:
    found = plan(change("forget"), change("forget", name="app.b"))
    assert text.plan_line(found) == "Plan: 0 to add, 0 to change, 0 to remove, 2 to forget."
    assert text.outcome(outcome(summary=found.summary), colour=False).startswith(
        "Apply complete! 0 added, 0 changed, 0 removed, 2 forgotten.\n"
    )


def test_the_line_of_an_empty_plan() -> None:
    assert lines(plan())[-2:] == ["No changes. The database matches the desired state.", HELD]


def test_the_line_of_an_apply() -> None:
    assert text.outcome(outcome(), colour=False).splitlines() == [
        "Apply complete! 10 added, 1 changed, 0 removed.",
        HELD,
        f"Ledger entry 2, {'f' * 64}",
        "31 statements in transaction 745, 0.25 s",
    ]


def test_the_line_of_the_checks() -> None:
    found = [states.verdict("held")] * 10 + [states.verdict("violated")] * 2 + [states.verdict("not_judged")] * 3
    assert text.checks_line(found) == (
        "Invariants: 10 held, 2 violated, 0 attested, 3 not judged. Proofs: 0 passed, 0 rehearsed."
        " Surface: 0 of 0 as predicted."
    )


def test_what_is_judged_later_is_said_and_counted_apart() -> None:
    def of(*statuses: str) -> list[Verdict]:
        return [states.verdict(status) for status in statuses]

    assert text.checks_line(
        of("held", "attested", "deferred", "deferred"),
        of("passed", "rehearsed", "failed", "deferred"),
        of("deferred", "deferred"),
    ) == (
        "Invariants: 1 held, 0 violated, 1 attested, 0 not judged, 2 judged in apply."
        " Proofs: 1 passed, 1 rehearsed, 1 failed, 1 not run. Surface: 2 rows compared in apply."
    )
    assert text.checks_line((), (), of("predicted", "predicted", "differs")).endswith("Surface: 2 of 3 as predicted.")


def test_what_could_not_be_judged_is_never_left_out() -> None:
    def of(*statuses: str) -> list[Verdict]:
        return [states.verdict(status) for status in statuses]

    line = text.checks_line((), of("passed", "not_judged", "not_judged"), of("predicted", "not_judged"))
    assert line.endswith(" Proofs: 1 passed, 0 rehearsed, 2 not judged. Surface: 1 of 2 as predicted, 1 not judged.")
    planned = text.checks_line((), of("deferred"), of("deferred", "not_judged"))
    assert planned.endswith(
        "Proofs: 0 passed, 0 rehearsed, 1 not run. Surface: 2 rows compared in apply, 1 not judged."
    )


def test_problems_after_commit_come_last() -> None:
    shown = text.outcome(outcome(problems=("one", "two")), colour=False).splitlines()
    assert shown[0].startswith("Apply complete!")
    assert shown[-2:] == ["Applied, but: one", "             two"]


def test_the_first_entry_says_what_belongs_into_the_files() -> None:
    shown = text.outcome(outcome(genesis=True, statements=1), colour=False)
    assert f"write `ledger: {'f' * 64}` below targets.main." in shown
    assert "1 statement in" in shown


# ------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_shows_each_statement_whole_with_its_role() -> None:
    long = "SELECT '" + "x" * 5000 + "'"
    made = change("add", statements=(Statement(text="CREATE\nFUNCTION f", role="owner"), Statement(text=long)))
    shown = lines(plan(made))
    at = shown.index("      CREATE")
    assert shown[at : at + 3] == ["      CREATE", "      FUNCTION f;  -- as owner", f"      {long};"]


def test_the_legend_shows_only_the_symbols_in_use() -> None:
    def legend(*changes: Change, **given_: Any) -> str:
        return next((line for line in lines(plan(*changes, **given_)) if line.startswith("Symbols: ")), "")

    assert legend() == ""
    assert legend(change("add")) == "Symbols: + add"
    assert legend(change("forget"), change("add")) == "Symbols: + add, . forget"
    assert legend(change("remove", "add"), change("change"), change("remove")) == (
        "Symbols: ~ change, - remove, -/+ remove and then add"
    )
    assert legend(invariants=(states.verdict("violated"),)) == "Symbols: ! violated or not judged"


def test_each_action_has_its_symbol() -> None:
    for actions, symbol in {
        ("add",): "+",
        ("change",): "~",
        ("remove",): "-",
        ("remove", "add"): "-/+",
        ("forget",): ".",
    }.items():
        assert f"  {symbol} gate.app.a  (why)" in lines(plan(change(*actions)))


def test_hazards_are_shown_at_the_change_and_together() -> None:
    shown = lines(
        plan(change("change", hazards=("arms_gate", "moves_from_safe")), change("add", hazards=("arms_gate",)))
    )
    assert "      hazards: arms_gate, moves_from_safe" in shown
    assert "Hazards to accept: arms_gate, moves_from_safe." in shown
    assert shown[-1] == f"Effect digest: {plan().effect_digest} (expires 2026-05-23T12:00:00Z)"


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("a", "b", "f: 'a' -> 'b'"),
        (None, "b", "f: nothing -> 'b'"),
        (True, False, "f: True -> False"),
        (1.0, 2.5, "f: 1 -> 2.5"),
        ("it's", 'a"b', "f: \"it's\" -> 'a\"b'"),
        ("x" * 200, "y", f"f: '{'x' * 119}… (202 characters) -> 'y'"),
        (None, {"a": [None, 1.5, "x"], "grantee": None}, "f: nothing -> {'a': [None, 1.5, 'x'], 'grantee': None}"),
    ],
)
def test_fields_on_one_line(before: Any, after: Any, line: str) -> None:
    made = change("change", fields=(FieldChange(name="f", before=before, after=after),))
    assert f"      {line}" in lines(plan(made))


@pytest.mark.parametrize(
    ("name", "before", "after", "line"),
    [
        ("acl[0]['grantee']", None, "a", "PUBLIC -> 'a'"),
        ("acl[10]['grantee']", "PUBLIC", None, "'PUBLIC' -> PUBLIC"),
        ("columns['grantee']", None, "a", "nothing -> 'a'"),
        ("acl[0]['grantor']", "a", "b", "'a' -> 'b'"),
        (
            "acl[1]",
            {"grantee": None, "grantor": "o", "grantable": False},
            None,
            "{'grantee': PUBLIC, 'grantor': 'o', 'grantable': False} -> nothing",
        ),
        (
            "acl",
            [],
            [{"grantee": None, "grantor": "o", "grantable": True}],
            "[] -> [{'grantee': PUBLIC, 'grantor': 'o', 'grantable': True}]",
        ),
    ],
)
def test_a_grant_without_a_grantee_is_one_to_public(name: str, before: Any, after: Any, line: str) -> None:
    made = change("change", fields=(FieldChange(name=name, before=before, after=after),))
    assert f"      {name}: {line}" in lines(plan(made))


@pytest.mark.parametrize("colour", [False, True])
def test_a_line_that_a_body_lost_or_got_is_no_symbol_of_the_legend(colour: bool) -> None:
    made = change("change", fields=(FieldChange(name="body", before="a\n b\nc", after="a\n+c\n! d"),))
    shown = text.plan(plan(made), colour=colour, verbose=False)
    assert "        - b" in shown
    assert [line for line in shown.splitlines() if "Symbols:" in line] == ["Symbols: ~ change"]


def test_texts_of_several_lines_are_compared_line_by_line() -> None:
    before, after = "a\nb\nc\nd\ne\nf\n", "a\nb\nc\nd\nE\nf\n"
    shown = lines(plan(change("change", fields=(FieldChange(name="body", before=before, after=after),))))
    at = shown.index("      body:")
    assert shown[at + 1 : at + 7] == [
        "        @@ -3,4 +3,4 @@",
        "         c",
        "         d",
        "        -e",
        "        +E",
        "         f",
    ]


@pytest.mark.parametrize(("before", "after"), [("a\nb", "a\nb\n"), ("a\r\nb", "a\nb"), ("a\n", "a\r\n")])
def test_texts_that_differ_in_line_ends_only_are_told_so(before: str, after: str) -> None:
    shown = lines(plan(change("change", fields=(FieldChange(name="body", before=before, after=after),))))
    assert f"        {len(before)} characters -> {len(after)} characters; only line ends differ" in shown


def verdicts_shown(*found: Verdict, verbose: bool = False) -> list[str]:
    return [line for line in lines(plan(invariants=found), verbose=verbose) if "invariant." in line]


def test_held_invariants_are_shown_when_asked() -> None:
    held, broken = states.verdict("held", "a"), states.verdict("violated", "b", "3 rows")
    assert verdicts_shown(held, broken) == ["  ! invariant.b: violated: 3 rows"]
    assert verdicts_shown(held, broken, verbose=True)[0] == "    invariant.a: held: why"
    assert "Invariants:" not in lines(plan(invariants=(held,)))


SIGN = states.verdict("deferred", "word", "to be signed for with --attest word: so it is").model_copy(
    update={"missing": "attestation"}
)


def test_a_plan_lists_the_claims_to_sign_for_and_drift_does_not() -> None:
    later = states.verdict("deferred", "rows", "judged inside the apply, just before COMMIT")
    assert verdicts_shown(SIGN, later) == [
        "    invariant.word: deferred: to be signed for with --attest word: so it is"
    ]
    assert "Checks:" not in drift(verdicts=(SIGN, later)).splitlines()
    broken = states.verdict("violated", "b", "3 rows")
    shown = drift(verdicts=(SIGN, broken)).splitlines()
    assert [line for line in shown if "invariant." in line] == ["  ! invariant.b: violated: 3 rows"]


def test_findings_and_what_was_not_compared() -> None:
    finding = Finding(code="undeclared", address="gate.app.z", message="key app.z")
    counted = [("table", "schema a", 3), ("table", "schema b", 4), ("view", "schema a", 1)]
    where = tuple(NotCompared.model_validate({"class": c, "where": w, "count": n}) for c, w, n in counted)
    found = plan(findings=(finding,), not_compared=where)
    assert "    gate.app.z: undeclared: key app.z" in lines(found)
    assert "Not compared by this version: table (7), view (1)." in lines(found)
    assert "    table in schema b: 4" in lines(found, verbose=True)


def test_equal_numbers_in_two_schemas_are_added_up() -> None:
    where = tuple(
        NotCompared.model_validate({"class": "table", "where": f"schema {name}", "count": 3}) for name in ("a", "b")
    )
    assert "Not compared by this version: table (6)." in lines(plan(not_compared=where))


# ------------------------------------------------------------------------------------------------- drift, approvals


def drift(moved: Sequence[Drift] = (), pending: Sequence[Drift] = (), **given: Any) -> str:
    found: DriftReport = drifting.report(
        drifting.Classified(tuple(moved), tuple(pending)),
        target=states.TARGET,
        entry=None,
        findings=given.get("findings", ()),
        verdicts=given.get("verdicts", ()),
        not_compared=(),
        fail_on=(),
        now=states.NOW,
    )
    return text.drift(found, colour=False, verbose=False)


MOVED = Drift(address="gate.app.a", kind="gate", actions=("change",), reason="why")


def test_a_clean_run_says_when() -> None:
    shown = drift().splitlines()
    assert shown[0] == "main (database app, PostgreSQL 16.13), checked at 2026-05-22T12:00:00Z"
    assert "No drift at 2026-05-22T12:00:00Z. 0 pending." in shown
    assert shown[-1] == HELD


def test_drift_and_pending_stand_apart() -> None:
    shown = drift([MOVED], [MOVED, MOVED]).splitlines()
    assert shown.index("Drift (live is not what was last applied):") < shown.index(
        "Pending (the files are not what was last applied):"
    )
    assert "Drift: 1 object changed, 2 pending." in shown
    assert "Drift: 2 objects changed, 0 pending." in drift([MOVED, MOVED])
    assert "Drift:" not in drift((), [MOVED])


def test_an_approval_says_everything_it_holds() -> None:
    given_ = Approval(
        id="i",
        effect_digest="e" * 64,
        plan_checksum="c" * 64,
        target=states.TARGET,
        approver="operator",
        reason="change 4711",
        accepted=("arms_gate",),
        attestations=("F02-no-worker", "F07-no-mail"),
        issued_at="2026-05-22T12:00:00Z",
        expires_at="2026-05-22T14:00:00Z",
    )
    assert text.approval(given_, colour=False).splitlines() == [
        "Approval i by operator: change 4711",
        f"For main (database app, PostgreSQL 16.13), effect digest {'e' * 64}",
        "Accepts arms_gate",
        "Attests F02-no-worker, F07-no-mail",
        "Issued 2026-05-22T12:00:00Z, expires 2026-05-22T14:00:00Z; not signed",
    ]
    none = given_.model_copy(update={"accepted": (), "attestations": (), "signature": "s"})
    assert "Attests" not in text.approval(none, colour=False)
    assert "Accepts no hazards, there are none" in text.approval(none, colour=False)
    assert text.approval(none, colour=False).endswith("; signed\n")


# ------------------------------------------------------------------------------------------------------- the terminal


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[2J",
        "\x9b2J",
        "\r",
        "\b",
        "\x07",
        "\x00",
        "\x7f",
        "\x0b",
        "\x0c",
        "\x85",
        "\u202e",
        "\u2066",
        "\u2069",
        "\u200b",
        "\u200f",
        "\u2028",
        "\u2029",
        "\u061c",
        "\ufeff",
        "\U000e0041",
        "\u00ad",
        "\udcff",
    ],
)
def test_characters_that_move_or_hide_text_are_written_out(hostile: str) -> None:
    shown = text.printable(f"a{hostile}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.endswith("b")


@given(
    st.text(
        st.characters(categories=["L", "N", "P", "S", "Zs", "Mn"], max_codepoint=0xDFFFF) | st.sampled_from("\n\t"),
        max_size=20,
    )
)
def test_ordinary_text_stays_as_it_is(ordinary: str) -> None:
    assert text.printable(ordinary) == ordinary


@given(st.text(max_size=20))
def test_nothing_printed_controls_the_terminal(anything: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u061c]", text.printable(anything))


HOSTILE = "evil\x1b]0;title\x07\x1b[1A\u202etxt"


def test_no_part_of_a_plan_reaches_the_terminal_raw() -> None:
    made = change(
        "change",
        name=HOSTILE,
        reason=HOSTILE,
        fields=(
            FieldChange(name=HOSTILE, before=HOSTILE, after="b"),
            FieldChange(name="body", before=f"{HOSTILE}\n", after=f"{HOSTILE}\nb"),
            FieldChange(name="list", before=[HOSTILE], after=None),
        ),
        statements=(Statement(text=f"SELECT '{HOSTILE}'", role=HOSTILE),),
    )
    moved = Drift(address=HOSTILE, kind="gate", actions=("change",), fields=made.fields, reason=HOSTILE)
    found = plan(
        made,
        target=states.TARGET.model_copy(update={"database": HOSTILE, "name": HOSTILE}),
        drift=(moved,),
        findings=(Finding(code="undeclared", address=HOSTILE, message=HOSTILE),),
        invariants=(states.verdict("violated", HOSTILE, HOSTILE),),
        not_compared=(NotCompared.model_validate({"class": "x", "where": HOSTILE, "count": 1}),),
    )
    for verbose in (False, True):
        shown = text.plan(found, colour=False, verbose=verbose)
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "\x07" not in shown
        assert "\\u001b" in shown
    coloured = text.plan(found, colour=True, verbose=True)
    assert set(re.findall(r"\x1b[^m]*m?", coloured)) <= {"\x1b[0m", "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[1;31m"}
    for shown in (
        text.outcome(outcome(problems=(HOSTILE,)), colour=False),
        drift([moved], [moved], findings=found.findings),
    ):
        assert "\x1b" not in shown


def test_a_line_end_in_a_name_starts_no_line() -> None:
    forged = "x\nNo changes. The database matches the desired state."
    finding = Finding(code="undeclared", address=forged, message=forged)
    shown = lines(plan(change("add", name=forged), findings=(finding,)))
    assert not any(line.startswith("No changes.") for line in shown)
    assert sum("x\\nNo changes." in line for line in shown) == 2


def test_colours_only_when_asked_and_never_in_the_words() -> None:
    made = plan(change("add"), change("change"), change("remove"), change("forget"))
    plain, coloured = text.plan(made, colour=False, verbose=False), text.plan(made, colour=True, verbose=False)
    assert "\x1b" not in plain
    assert "\x1b[32m  + gate.app.a  (why)\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
