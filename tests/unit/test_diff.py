"""Desired and live -> changes: which, in which order, with which hazards, and what is refused."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.diff import changes, fields
from reconciler.errors import Refused
from reconciler.model import Declared, Place, canonical
from tests import states

if TYPE_CHECKING:
    from reconciler.model import Change, Check, Json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


def seen(before: Json, after: Json) -> list[tuple[str, Json, Json]]:
    return [(field.name, field.before, field.after) for field in fields(before, after)]


def addresses(found: tuple[Change, ...]) -> list[str]:
    return [change.address for change in found]


def added(*things: Declared | Check) -> list[str]:
    """The order in which declared things that are all missing are made."""
    wanted = states.desired(*things)
    facts = {one.address: states.bound() for one in things if isinstance(one, Declared) and one.kind == "marker"}
    return addresses(changes(wanted, states.live({}, facts), {}))


# ------------------------------------------------------------------------------------------------------------ fields


def test_fields_names_what_differs_and_nothing_else() -> None:
    before = {"same": 1, "gone": "x", "other": "a", "null": None}
    assert seen(before, {"same": 1, "other": "b", "new": 2, "null": None}) == [
        ("gone", "x", None),
        ("new", None, 2),
        ("other", "a", "b"),
    ]


def test_fields_looks_into_lists_and_mappings() -> None:
    assert seen({"acl": [{"who": "a", "how": 1}]}, {"acl": [{"who": "b", "how": 1}]}) == [("acl[0]['who']", "a", "b")]
    assert seen({"config": ["a"]}, {"config": ["a", "b"]}) == [("config[1]", None, "b")]
    assert seen({"config": ["a", "b"]}, {"config": ["b"]})[0][0].startswith("config[")


def test_a_value_that_changes_its_type_differs() -> None:
    assert seen({"e": 1}, {"e": True}) == [("e", 1, True)]
    assert seen({"e": [1]}, {"e": "1"}) == [("e", [1], "1")]
    assert seen({"e": None}, {"e": []}) == [("e", None, [])]
    assert [name for name, _, _ in seen({"e": [1]}, {"e": [True]})] == ["e"]


@given(
    st.dictionaries(st.text("abc", max_size=2), VALUES, max_size=3), st.dictionaries(st.text("abc", max_size=2), VALUES)
)
def test_fields_is_empty_exactly_for_equal_objects(before: dict[str, Any], after: dict[str, Any]) -> None:
    told = {key: value for key, value in before.items() if value is not None}
    wanted = {key: value for key, value in after.items() if value is not None}
    assert (fields(before, after) == ()) == (canonical(told) == canonical(wanted))


# ------------------------------------------------------------------------------------------------------- what changes


def test_what_is_in_sync_gives_nothing() -> None:
    gate, function, marker = states.gate("app.a", "1"), states.function("fn_a"), states.marker("worker")
    found = states.live(
        {
            gate.address: gate.spec,
            function.address: function.spec,
            marker.address: states.marker_row("worker", beats="17", seen="now"),
        }
    )
    assert changes(states.desired(gate, function, marker), found, {}) == ()


def test_what_is_missing_is_added_and_what_differs_is_changed() -> None:
    old, new = states.gate("app.old", "1"), states.gate("app.new", "1")
    found = states.live({old.address: states.gate_row("app.old", "0")})
    one, other = changes(states.desired(old, new), found, {})
    assert (one.address, one.actions, one.before, one.reason) == (
        "gate.app.new",
        ("add",),
        None,
        "declared and missing",
    )
    assert (other.address, other.actions, other.reason) == (
        "gate.app.old",
        ("change",),
        "differs from what is declared",
    )
    assert [field.name for field in other.fields] == ["value"]
    assert one.fields == ()
    assert "INSERT" in one.statements[0].text
    assert "UPDATE" in other.statements[0].text


def test_a_function_that_replace_cannot_change_is_dropped_and_made() -> None:
    wanted = states.function("fn_a", returns="bigint")
    found = states.live({wanted.address: states.function_row("fn_a", returns="integer")})
    (change,) = changes(states.desired(wanted), found, {})
    assert change.actions == ("remove", "add")
    assert change.hazards == ("replaces_function",)
    assert [statement.text.split()[0] for statement in change.statements] == ["DROP", "CREATE", "REVOKE"]


def test_what_moved_since_the_last_apply_is_a_hazard() -> None:
    gate = states.gate("app.a", "1")
    wanted = states.desired(gate)
    last = states.manifest(wanted, {gate.address: gate.spec})
    (change,) = changes(wanted, states.live({gate.address: states.gate_row("app.a", "0")}), last)
    assert change.hazards == ("overwrites_drift",)
    assert change.reason == "changed since the last apply"
    (again,) = changes(wanted, states.live(), last)
    assert (again.actions, again.hazards) == (("add",), ("overwrites_drift",))


def test_what_the_files_change_is_no_drift() -> None:
    old, new = states.gate("app.a", "0"), states.gate("app.a", "1")
    last = states.manifest(states.desired(old), {old.address: old.spec})
    (change,) = changes(states.desired(new), states.live({old.address: old.spec}), last)
    assert change.hazards == ()


def test_what_no_file_declares_any_more_is_forgotten_and_nothing_is_dropped() -> None:
    gate, other, check = states.gate("app.a", "1"), states.gate("app.b", "1"), states.invariant("no-cron")
    before = states.desired(gate, other, check)
    last = states.manifest(before, {gate.address: gate.spec, other.address: other.spec})
    one, two = changes(states.desired(gate), states.live({gate.address: gate.spec}), last)
    assert addresses((one, two)) == ["gate.app.b", "invariant.no-cron"]
    for change in (one, two):
        assert (change.actions, change.hazards, change.statements) == (("forget",), ("forgets",), ())
        assert change.after is None
    assert one.before == other.spec.dump()
    assert two.before == check.spec.dump()


def test_everything_that_is_refused_is_named_at_once() -> None:
    gate = states.gate("app.cas", "true", from_=["false"])
    back = states.gate("app.phase", "first", order=["first", "second"])
    marker = states.marker("worker")
    function = states.function("fn_a")
    placed = Declared("gate", gate.name, gate.spec, gate.rules, Place("gates.yaml", 3, 5))
    found = states.live(
        {gate.address: states.gate_row("app.cas", "maybe"), back.address: states.gate_row("app.phase", "second")},
        {
            gate.address: {"updated_at": "then"},
            function.address: {"missing_roles": ["app_owner", "app_caller"]},
            marker.address: {
                "binds": {"seen": {"error": "gives no row; it must give exactly one value"}},
                "expected": {},
            },
        },
    )
    with pytest.raises(Refused) as refused:
        changes(states.desired(placed, back, marker, function, states.gate("app.fine", "1")), found, {})
    assert refused.value.exit_code == 4
    assert refused.value.details == (
        "gate.app.cas (gates.yaml:3:5): the live value is 'maybe' (updated_at then); `from` allows only 'false'",
        "gate.app.phase: 'second' would move back to 'first'; `order` never moves back",
        "marker.worker: the query bound to seen gives no row; it must give exactly one value",
        "function.public.fn_a(): role app_owner, app_caller does not exist in this cluster",
    )


@pytest.mark.parametrize(
    ("live", "rules", "refused"),
    [
        ("0", {}, None),
        ("0", {"from_": ["0", "2"]}, None),
        ("3", {"from_": ["0", "2"]}, "`from` allows only '0', '2'"),
        (None, {"from_": ["0"]}, "the live value is NULL; `from` allows only '0'"),
        ("0", {"order": ["0", "1", "2"]}, None),
        ("2", {"order": ["0", "1", "2"]}, "'2' would move back to '1'"),
        ("x", {"order": ["0", "1", "2"]}, "the live value 'x' is not in `order`"),
        (None, {"order": ["0", "1", "2"]}, "the live value NULL is not in `order`"),
        ("0", {"order": ["0", "1"], "from_": ["9"]}, "`from` allows only '9'"),
    ],
)
def test_compare_and_set(live: str | None, rules: dict[str, Any], refused: str | None) -> None:
    gate = states.gate("app.a", "1", **rules)
    found = states.live({gate.address: states.gate_row("app.a", live)})
    if refused is None:
        assert addresses(changes(states.desired(gate), found, {})) == [gate.address]
    else:
        with pytest.raises(Refused) as error:
            changes(states.desired(gate), found, {})
        assert refused in error.value.details[0]


def test_a_missing_gate_is_added_whatever_from_and_order_say() -> None:
    assert added(states.gate("app.a", "1", from_=["0"], order=["0", "1"])) == ["gate.app.a"]


@pytest.mark.parametrize(
    ("live", "value", "rules", "hazards"),
    [
        ("false", "true", {"safe": "false", "lock": "approval"}, ("arms_gate", "moves_from_safe")),
        ("false", "true", {"safe": "false"}, ("moves_from_safe",)),
        (None, "true", {"safe": "false"}, ("moves_from_safe",)),
        ("other", "true", {"safe": "false", "lock": "approval"}, ("arms_gate",)),
        ("true", "false", {"safe": "false", "lock": "approval"}, ()),
        ("false", "true", {}, ()),
    ],
)
def test_hazards_of_gates(live: str | None, value: str, rules: dict[str, Any], hazards: tuple[str, ...]) -> None:
    gate = states.gate("app.a", value, **rules)
    found = states.live({} if live is None else {gate.address: states.gate_row("app.a", live)})
    (change,) = changes(states.desired(gate), found, {})
    assert change.hazards == hazards


def acl(*grantees: str | None) -> list[dict[str, Any]]:
    return [{"grantee": grantee, "grantor": "app_owner", "grantable": False} for grantee in grantees]


@pytest.mark.parametrize(
    ("before", "after", "hazards"),
    [
        (None, {"security_definer": True}, ("security_definer",)),
        ({"security_definer": True}, {"security_definer": True, "comment": "c"}, ()),
        ({"security_definer": True}, {"security_definer": True, "owner": "x"}, ("changes_owner", "security_definer")),
        ({"security_definer": True}, {}, ()),
        ({}, {"acl": acl("app_owner", "other")}, ("grants_execute",)),
        ({}, {"acl": acl("app_owner", None)}, ("grants_public",)),
        ({}, {"acl": acl("app_owner", "other", None)}, ("grants_execute", "grants_public")),
        ({"acl": acl("app_owner", "other", None)}, {}, ()),
        ({"cost": 5.0}, {"owner": "other", "acl": acl("other")}, ("changes_owner",)),
        ({"args": [{"name": "a", "mode": "in", "type": "text", "default": None}]}, None, ("replaces_function",)),
    ],
)
def test_hazards_of_functions(before: dict[str, Any] | None, after: dict[str, Any] | None, hazards: Any) -> None:
    if after is None:  # another name of an argument, which OR REPLACE refuses
        after = {"args": [{"name": "b", "mode": "in", "type": "text", "default": None}]}
    wanted = states.function("fn_a", **after)
    found = {} if before is None else {wanted.address: states.function_row("fn_a", **before)}
    (change,) = changes(states.desired(wanted), states.live(found), {})
    assert change.hazards == hazards


# -------------------------------------------------------------------------------------------------------------- order


def test_functions_then_gates_then_markers() -> None:
    assert added(states.marker("a"), states.gate("app.a", "1"), states.function("fn_z")) == [
        "function.public.fn_z()",
        "gate.app.a",
        "marker.a",
    ]


def test_a_function_comes_after_those_that_its_body_names() -> None:
    functions = [
        states.function("fn_a", body="SELECT public.fn_c()"),
        states.function("fn_b"),
        states.function("fn_c", body="SELECT public.fn_b()"),
    ]
    assert added(*functions) == ["function.public.fn_b()", "function.public.fn_c()", "function.public.fn_a()"]


def test_only_whole_names_count_and_a_circle_is_no_obstacle() -> None:
    functions = [
        states.function("fn_a", body="SELECT public.fn_bb(), public.fn_c()"),
        states.function("fn_b"),
        states.function("fn_c", body="SELECT public.fn_a()"),
    ]
    assert added(*functions) == ["function.public.fn_c()", "function.public.fn_a()", "function.public.fn_b()"]


def test_overloads_are_two_functions() -> None:
    integer = states.function("fn_a", args=[{"name": None, "mode": "in", "type": "integer", "default": None}])
    text = states.function("fn_a", args=[{"name": None, "mode": "in", "type": "text", "default": None}])
    caller = states.function("fn_0", body="SELECT public.fn_a(1)")
    assert added(text, integer, caller) == [
        "function.public.fn_a(integer)",
        "function.public.fn_a(text)",
        "function.public.fn_0()",
    ]


@given(st.permutations(["fn_a", "fn_b", "fn_c", "fn_d"]), st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_every_call_without_a_circle_is_honoured_whatever_the_order_of_the_files(
    names: list[str], calls: set[tuple[int, int]]
) -> None:
    downward = {(max(pair), min(pair)) for pair in calls if pair[0] != pair[1]}
    ordered = sorted(names)
    bodies = {
        name: " ".join(f"public.{ordered[low]}()" for high, low in downward if ordered[high] == name) or "none"
        for name in names
    }
    found = added(*(states.function(name, body=bodies[name]) for name in names))
    assert sorted(found) == sorted(f"function.public.{name}()" for name in names)
    for high, low in downward:
        assert found.index(f"function.public.{ordered[low]}()") < found.index(f"function.public.{ordered[high]}()")


def test_the_order_of_the_files_does_not_change_the_result() -> None:
    things = [states.gate("app.b", "1"), states.gate("app.a", "1"), states.function("fn_a"), states.function("fn_b")]
    results = {tuple(added(*turned)) for turned in itertools.permutations(things)}
    assert len(results) == 1
