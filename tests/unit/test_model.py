"""The nouns: canonical JSON and digests, durations, globs, and what a plan says of itself."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reconciler.model import (
    Change,
    Check,
    Declared,
    GateScope,
    Hazard,
    Model,
    Place,
    Statement,
    Verdict,
    blocking,
    canonical,
    digest,
    glob_regex,
    milliseconds,
    tolerated,
)
from tests import states

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Example(Model):
    name: str
    numbers: tuple[int, ...] = ()


# ------------------------------------------------------------------------------------------------- JSON and digests


def test_canonical_json_is_that_of_the_rfc() -> None:
    # RFC 8785, 3.2.2 to 3.2.4: no white space, shortest numbers, keys sorted by UTF-16, characters as they are.
    value = {
        "numbers": [333333333.33333329, 4.50, 2e-3],
        "string": '€$\x0f\nA\'B"\\"/',
        "literals": [None, True, False],
    }
    assert canonical(value).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,4.5,0.002],"string":"€$\\u000f\\nA\'B\\"\\\\\\"/"}'
    )
    assert canonical({"\ufb33": 1, "\U0001f600": 2}).decode() == '{"\U0001f600":2,"\ufb33":1}'


@given(PLAIN)
def test_canonical_json_is_json_and_stays_the_same_when_read_back(value: Any) -> None:
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(0, 9), min_size=2, max_size=6))
def test_the_order_of_keys_means_nothing(mapping: dict[str, int]) -> None:
    turned = dict(reversed(mapping.items()))
    assert digest(turned) == digest(mapping) == hashlib.sha256(canonical(mapping)).hexdigest()


@given(PLAIN, PLAIN)
def test_other_values_have_other_digests(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_canonical_json_is_that_of_the_library(value: Any) -> None:
    """Whichever way it is written."""
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize(
    "value",
    [
        {"\ue000": 1, "\U0001f600": 2, "\uffff": 3, "\ud7ff": 4, "": 5},
        '\x00\x1f\x7f\u2028\u2029"\\/\b\f\n\r\t',
        [1.0, -0.0, 0.1, 1e-4, 1e-5, 1e15, 1e16, 1e21, 123456789012345.6, 2.5e-7, 5e-324, 1.7976931348623157e308],
        [10**14, 10**15, -(10**15), 2**53 - 1],
        (1, (2, [3])),
    ],
)
def test_canonical_json_where_encoders_differ(value: Any) -> None:
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [2**53, -(2**53), float("nan"), float("inf"), {1: "x"}, object(), "\ud800"])
def test_what_json_cannot_hold_has_no_digest(value: Any) -> None:
    with pytest.raises((rfc8785.CanonicalizationError, UnicodeEncodeError)):
        digest(value)


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    "data",
    [{"name": 1}, {"name": "a", "other": 1}, {"name": "a", "numbers": ["1"]}, {"name": "a", "numbers": [True]}, {}],
)
def test_models_take_only_what_they_declare_in_the_type_they_declare(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate_json(json.dumps(data))


def test_models_are_frozen() -> None:
    example = Example(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        example.name = "b"


def test_models_are_written_with_the_names_used_in_files() -> None:
    assert states.gate("app.a", "1", from_=["0"]).rules.dump()["from"] == ["0"]
    assert GateScope(store="s", matching="a.*").dump() == {"store": "s", "matching": "a.*"}


def test_where_a_declaration_stands_is_no_part_of_it() -> None:
    here, there = Place("a.yaml", 1, 2), Place("b.yaml", 3, 4)
    item = states.gate("app.a", "1")
    assert str(here) == "a.yaml:1:2"
    one, other = (Declared("gate", "app.a", item.spec, item.rules, place) for place in (here, there))
    assert one == other
    assert one.dump() == other.dump()
    check = states.invariant("no-cron")
    assert Check("invariant", "no-cron", check.spec, here) == Check("invariant", "no-cron", check.spec, there)
    assert (one.address, check.address) == ("gate.app.a", "invariant.no-cron")


def test_the_effect_of_a_change_is_everything_but_words_and_rendered_sql() -> None:
    change = Change(
        address="gate.a",
        kind="gate",
        actions=("change",),
        before={"value": "0"},
        after={"value": "1"},
        context={"k": 1},
        hazards=("moves_from_safe", "arms_gate"),
    )
    told = change.model_copy(update={"reason": "why", "statements": (Statement(text="SELECT 1"),)})
    assert told.effect() == change.effect()
    assert change.effect() == {
        "address": "gate.a",
        "actions": ["change"],
        "before": {"value": "0"},
        "after": {"value": "1"},
        "context": {"k": 1},
        "hazards": ["arms_gate", "moves_from_safe"],
    }


def change(address: str, *hazards: Hazard) -> Change:
    return Change(address=address, kind="gate", actions=("add",), hazards=hazards)


def test_a_plan_names_each_hazard_of_setup_and_changes_once() -> None:
    plan = states.build(states.desired()).model_copy(
        update={
            "setup": (change("policy.app", "changes_policy"),),
            "changes": (change("gate.a", "moves_from_safe", "arms_gate"), change("gate.b", "arms_gate")),
        }
    )
    assert plan.hazards == ("arms_gate", "changes_policy", "moves_from_safe")


def test_setup_alone_is_something_to_apply() -> None:
    assert not states.build(states.desired()).has_changes
    assert states.build(states.desired(), setup=[states.setup()]).has_changes
    assert states.build(states.desired(states.gate("app.a", "1"))).has_changes


@pytest.mark.parametrize(
    ("status", "allowed", "blocks"),
    [
        ("held", (), False),
        ("violated", (), True),
        ("violated", ("no-cron",), True),
        ("not_judged", (), True),
        ("not_judged", ("no-cron",), False),
        ("not_judged", ("no-cro", "invariant.no-cron"), True),
    ],
)
def test_what_blocks_an_apply(status: str, allowed: tuple[str, ...], blocks: bool) -> None:
    policy = states.policy().model_copy(update={"allow_not_judged": allowed})
    found = Verdict.model_validate({"address": "invariant.no-cron", "status": status, "detail": ""})
    (judged,) = tolerated([found], policy)
    assert blocking([judged]) == ((judged,) if blocks else ())
    assert judged.tolerated == (status == "not_judged" and not blocks)


# --------------------------------------------------------------------------------------------------- durations, globs


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1ms", 1), ("800ms", 800), ("60s", 60_000), ("2m", 120_000), ("24h", 86_400_000), ("7d", 604_800_000)],
)
def test_durations(text: str, expected: int) -> None:
    assert milliseconds(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "1", "s", "0s", "-1s", "+1s", "1.5s", "1 s", " 1s", "1s\n", "1S", "1min", "1w", "٣s", "1e3s", "9" * 10 + "s"],
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="for example 800ms or 24h"):
        milliseconds(text)


def matches(pattern: str, text: str) -> bool:
    """As PostgreSQL's `~`, where the point takes a line end and `$` only the very end."""
    return re.fullmatch(glob_regex(pattern), text, re.DOTALL) is not None


@given(st.text("ab.*?\\^$|(){}+_-%é \n", max_size=6), st.text("ab.*?\\^$|(){}+_-%é \n", max_size=6))
def test_globs_match_as_file_names_do(pattern: str, text: str) -> None:
    assert matches(pattern, text) == fnmatch.fnmatchcase(text, pattern)


@given(st.text(max_size=8))
def test_without_stars_a_glob_matches_itself_and_nothing_longer(text: str) -> None:
    pattern = text.replace("*", "-").replace("?", "-")
    assert matches(pattern, pattern)
    assert not matches(pattern, pattern + "x")
    assert not matches(pattern, "x" + pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("queue.*", "queue.a", True),
        ("queue.*", "queue.", True),
        ("queue.*", "queueXa", False),
        ("fn_job_*", "fn_job_claim", True),
        ("fn_job_*", "fnXjobXclaim", False),
        ("[ab]", "[ab]", True),
        ("[ab]", "a", False),
        ("a|b", "a", False),
        ("%", "anything", False),
    ],
)
def test_globs_know_two_special_characters(pattern: str, text: str, expected: bool) -> None:
    assert matches(pattern, text) == expected
