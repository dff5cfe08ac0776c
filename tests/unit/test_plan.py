"""Plans: what the digests cover and what they do not, files that are read back byte for byte or not at all."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler import desired as desireds
from reconciler import plan as plans
from reconciler import trust
from reconciler.errors import PlanDamaged, ReconcilerError, UsageError
from reconciler.model import Action, Change, Live, Plan, Statement, Summary, Target, canonical, digest
from tests import states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from reconciler.model import Desired, Json

INFORMATION = {"release", "target", "database", "ledger", "source_digest"}
"""What of the declarations the digest of effects leaves out: target and database are in the other digest."""


def everything() -> Desired:
    """A little of each kind, with every rule that one can have."""
    grown = [
        {"name": "p_a", "mode": "in", "type": "text[]", "default": "'{}'::text[]"},
        {"name": None, "mode": "out", "type": "integer", "default": None},
    ]
    return states.desired(
        states.gate("app.a", "true", from_=["false"], safe="false", lock="approval", order=["false", "true"]),
        states.gate("app.b", "1"),
        states.function("fn_a", ["app.a"], args=grown, support="pg_catalog.s", transforms=["hstore"], comment="c"),
        states.function("fn_b", security_definer=True, body="SELECT public.fn_a()"),
        states.marker("worker", fresh={"column": "seen", "within": "5m"}, passive_while="beats = 0"),
        states.marker(
            "other",
            bind={"seen": {"query": "SELECT c.at FROM public.cursors AS c", "approve": "query"}},
            via={"function": "public.register", "args": {"p_seen": {"bind": "seen"}, "p_note": "n"}},
        ),
        states.invariant("no-cron"),
        states.invariant("no-blank", query="SELECT 1 FROM public.settings AS s", rows=0),
    )


def reading() -> Live:
    """What is there before: one gate and one function to change, everything else to add."""
    return states.live(
        {
            "gate.app.a": states.gate_row("app.a", "false"),
            "function.public.fn_b()": states.function_row("fn_b", owner="former", acl=[], comment="old"),
        },
        {
            "marker.worker": states.bound(),
            "marker.other": states.bound(),
            "function.public.fn_a(text[])": {"default_grantees": ["stranger"]},
        },
    )


def whole() -> Plan:
    return states.build(everything(), reading(), setup=[states.setup()])


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value that is no container, and of every empty container."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


def put(document: Json, path: tuple[str | int, ...], change: Callable[[Json], Json]) -> Json:
    """A copy of the document with one value changed."""
    copy = json.loads(json.dumps(document))
    *above, last = path
    inner = copy
    for step in above:
        inner = inner[step]
    inner[last] = change(inner[last])
    return copy


def other(value: Json) -> Json:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return ["x"] if value == [] else {"x": "x"} if value == {} else "x"


def document() -> dict[str, Json]:
    """What the digest of effects is made of, beside the encoding: declarations, setup and changes."""
    plan = whole()
    return {
        "declared": plan.desired,
        "setup": [change.dump() for change in plan.setup],
        "changes": [change.dump() for change in plan.changes],
    }


def effects(made_of: Json) -> str:
    setup, changes = ([Change.model_construct(**change) for change in made_of[part]] for part in ("setup", "changes"))
    return plans.effects_digest(made_of["declared"], setup, changes)


# ----------------------------------------------------------------------------------------------------------- digests


def test_the_digest_of_a_dumped_plan_is_that_of_the_plan() -> None:
    assert effects(document()) == whole().effects_digest


def test_every_value_that_has_an_effect_changes_the_digest_and_no_other_does() -> None:
    made_of = document()
    before = effects(made_of)
    told = {"reason", "statements", "fields", "kind"}  # of a change: words, what is derived, and part of the address
    unexpected: list[tuple[str | int, ...]] = []
    judged = 0
    for path in leaves(made_of):
        part, first = path[0], path[1] if path[0] == "declared" else path[2]
        counts = first not in (INFORMATION if part == "declared" else told)
        if (effects(put(made_of, path, other)) != before) != counts:
            unexpected.append(path)
        judged += counts
    assert unexpected == []
    assert judged > 200


def test_taking_anything_away_or_turning_a_list_changes_the_digest() -> None:
    made_of = document()
    before = effects(made_of)
    for name in ("items", "checks", "stores"):
        for key in made_of["declared"][name]:
            assert effects(put(made_of, ("declared", name), lambda part, key=key: without(part, key))) != before
    for part in ("changes", "setup"):
        for index in range(len(made_of[part])):
            assert effects(put(made_of, (part,), lambda all_, at=index: all_[:at] + all_[at + 1 :])) != before
    assert effects(put(made_of, ("changes",), lambda all_: all_[::-1])) != before


def without(mapping: dict[str, Json], key: str) -> dict[str, Json]:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize("name", Target.model_fields)
def test_an_approval_is_for_one_database_and_not_for_one_version_of_the_server(name: str) -> None:
    before = plans.effect_digest("0" * 64, states.TARGET)
    moved = states.TARGET.model_copy(update={name: "x"})
    assert (plans.effect_digest("0" * 64, moved) != before) == (name != "server_version")
    assert plans.effect_digest("1" * 64, states.TARGET) != before


def test_when_a_plan_is_made_does_not_change_its_digests() -> None:
    one, two = (states.build(everything(), reading(), now=states.NOW + timedelta(days=days)) for days in (0, 400))
    assert (one.created_at, one.expires_at) == ("2026-05-22T12:00:00Z", "2026-05-23T12:00:00Z")
    assert two.created_at != one.created_at
    assert (one.effects_digest, one.effect_digest) == (two.effects_digest, two.effect_digest)


def test_what_was_found_beside_the_changes_does_not_change_the_digests() -> None:
    plain = states.build(everything(), reading())
    told = states.build(everything(), reading(), verdicts=[states.verdict("violated")])
    assert told.outcome == "violated"
    assert plain.effect_digest == told.effect_digest


def test_facts_such_as_transaction_ids_do_not_change_the_digest() -> None:
    found = reading()
    moved = Live(found.items, {**found.facts, "gate.app.a": {"xmin": "4711", "updated_at": "now"}}, ())
    assert states.build(everything(), moved).effects_digest == states.build(everything(), found).effects_digest


# ------------------------------------------------------------------------------------------ digests of edited files


def planned(directory: Path) -> str:
    """The digest of effects of a state directory against an empty database."""
    wanted = desireds.load(directory, None)
    facts = {
        address: {"binds": {"last_seen": {"value": "now"}}, "expected": {"beats": "0"}} for address in wanted.items
    }
    return states.build(wanted, states.live({}, facts)).effects_digest


@pytest.fixture
def before(tmp_path: Path) -> str:
    return planned(states.write(tmp_path / "before", states.STATE))


def edited(tmp_path: Path, file: str, old: str, new: str) -> str:
    text = states.STATE[file]
    assert text.count(old) == 1, "the edit must hit one place"
    return planned(states.write(tmp_path / "after", {**states.STATE, file: text.replace(old, new)}))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("gates.yaml", "gates:\n", "# a comment\n\ngates:   # and another\n"),
        ("gates.yaml", '{value: "100", reason: Small enough.}', "\n    reason: \"Small enough.\"\n    value: '100'"),
        ("gates.yaml", 'value: "true", from: ["false"]', 'from: ["false"], value: "true"'),
        ("governance.yaml", "release: first", "release: second"),
        ("functions/fn_one.sql", "CREATE FUNCTION", "-- why\ncreate or replace function"),
        ("functions/fn_one.sql", "LANGUAGE plpgsql\n", "VOLATILE PARALLEL UNSAFE COST 100 LANGUAGE 'plpgsql'\n"),
        ("functions/fn_one.sql", "p_limit integer DEFAULT 5", "IN p_limit  pg_catalog.int4 = 5"),
        ("functions.yaml", "source: functions/fn_one.sql", "source: ./functions/../functions/fn_one.sql"),
    ],
)
def test_edits_without_effect_keep_an_approval(tmp_path: Path, before: str, file: str, old: str, new: str) -> None:
    assert edited(tmp_path, file, old, new) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("gates.yaml", 'value: "true"', 'value: "on"'),
        ("gates.yaml", 'from: ["false"]', 'from: ["false", "off"]'),
        ("gates.yaml", 'safe: "false", ', ""),
        ("gates.yaml", "lock: approval", "lock: free"),
        ("gates.yaml", "The pilot starts.", "The pilot begins."),
        ("gates.yaml", "order: [first, second, third]", "order: [first, second]"),
        ("functions.yaml", "owner: app_owner", "owner: other"),
        ("functions.yaml", "execute: [app_caller]", "execute: []"),
        ("functions.yaml", "gates: [app.enabled]", "gates: []"),
        ("functions.yaml", "Gives its argument back.", "Gives it back."),
        ("functions/fn_one.sql", "RETURN p_limit;", "RETURN p_limit ;"),
        ("functions/fn_one.sql", "DEFAULT 5", "DEFAULT 6"),
        ("functions/fn_one.sql", "LANGUAGE plpgsql", "LANGUAGE plpgsql STABLE"),
        ("functions/fn_one.sql", "pg_catalog, public, pg_temp", "pg_catalog, pg_temp"),
        ("markers.yaml", "name: worker", "name: other"),
        ("markers.yaml", "c.at", "c.other"),
        ("markers.yaml", "approve: value", "approve: query"),
        ("markers.yaml", 'beats: "0"', 'beats: "1"'),
        ("markers.yaml", "passive_while: beats = 0", "passive_while: beats <= 0"),
        ("markers.yaml", "within: 5m", "within: 6m"),
        ("invariants.yaml", "pg_cron", "other"),
        ("invariants.yaml", "rows: 0", "rows: 1"),
        ("invariants.yaml", "no-cron:", "no-scheduler:"),
        ("governance.yaml", "name: app\n", "name: other\n"),
        ("governance.yaml", 'matching: "app.*"', 'matching: "app*"'),
        ("governance.yaml", "expires: 24h", "expires: 23h"),
        ("governance.yaml", "required: 1", "required: 2"),
        ("governance.yaml", "key: name", "key: title"),
        ("governance.yaml", "  approval:", "  apply: {lock_timeout: 700ms}\n  approval:"),
        ("governance.yaml", "  approval:", "  apply: {search_path: [pg_catalog, pg_temp]}\n  approval:"),
        ("governance.yaml", "  approval:", "  allow_not_judged: [no-cron]\n  approval:"),
        ("governance.yaml", "  approval:", "  allow_functions: [public.f]\n  approval:"),
    ],
)
def test_edits_with_an_effect_kill_an_approval(tmp_path: Path, before: str, file: str, old: str, new: str) -> None:
    assert edited(tmp_path, file, old, new) != before


def test_names_and_number_of_files_have_no_effect(tmp_path: Path, before: str) -> None:
    yaml = [text for name, text in states.STATE.items() if name.endswith(".yaml")]
    one = {"z/all.yaml": "".join(yaml), "functions/fn_one.sql": states.SQL}
    assert planned(states.write(tmp_path / "one", one)) == before
    lines = states.STATE["gates.yaml"].splitlines(keepends=True)
    split = {f"{9 - number}.yaml": "gates:\n" + line for number, line in enumerate(lines[1:])}
    many = {name: text for name, text in states.STATE.items() if name != "gates.yaml"}
    assert planned(states.write(tmp_path / "many", {**many, **split})) == before


# ------------------------------------------------------------------------------------------------- declarations again


def test_a_plan_holds_everything_that_was_declared() -> None:
    wanted = everything()
    assert plans.load_desired(plans.dump_desired(wanted)) == wanted
    assert plans.load_desired(json.loads(json.dumps(whole().desired))) == wanted


@pytest.mark.parametrize(
    "damage",
    [
        {"items": {"gate.app.a": {"kind": "no such kind", "name": "app.a", "spec": {}, "rules": {}}}},
        {"items": {"gate.app.a": {}}},
        {"items": []},
        {"checks": {"invariant.x": {"kind": "invariant", "name": "x", "spec": {"none": 1}}}},
        {"policy": {}},
        {"scope": None},
        {"stores": {"a": {"table": 1}}},
        {"name": None, "items": None},
    ],
)
def test_declarations_that_are_none_are_damage(damage: dict[str, Json]) -> None:
    with pytest.raises(PlanDamaged):
        plans.load_desired({**plans.dump_desired(everything()), **damage})


@pytest.mark.parametrize("name", plans.dump_desired(states.desired()))
def test_each_part_of_the_declarations_is_needed(name: str) -> None:
    with pytest.raises(PlanDamaged):
        plans.load_desired(without(plans.dump_desired(everything()), name))


def test_an_object_under_another_address_is_damage() -> None:
    data = plans.dump_desired(states.desired(states.gate("app.a", "1")))
    data["items"] = {"gate.app.b": data["items"]["gate.app.a"]}
    with pytest.raises(PlanDamaged, match="another address"):
        plans.load_desired(data)


def recomputed(edited_plan: Json) -> Plan:
    """The plan with all its digests made to fit, as somebody would who edits one."""
    plan = Plan.model_validate_json(canonical(edited_plan))
    found = plans.effects_digest(plan.desired, plan.setup, plan.changes)
    digests = {"effects_digest": found, "effect_digest": plans.effect_digest(found, plan.target)}
    return plan.model_copy(update=digests)


def test_a_plan_that_nobody_edited_is_whole() -> None:
    assert trust.check_plan(whole()) == everything()


def test_no_edit_of_a_plan_goes_unseen() -> None:
    """As long as the digests are left alone; the next test makes them fit."""
    plan = whole()
    dumped = plan.dump()
    told = {"reason", "fields"}
    for path in leaves({"desired": dumped["desired"], "changes": dumped["changes"]}):
        if path[0] == "changes" and path[2] in told:
            continue
        try:
            left = Plan.model_validate_json(canonical(put(dumped, path, other)))
        except ValueError:
            continue  # refused when the file is loaded
        if path[1] in {"release", "source_digest", "ledger", "database"}:
            continue
        with pytest.raises(ReconcilerError):
            trust.check_plan(left)


@pytest.mark.parametrize("make", [other, lambda _: None, lambda _: 7, lambda _: {}, lambda _: []])
def test_an_edited_plan_whose_digests_fit_is_another_plan(make: Callable[[Json], Json]) -> None:
    plan = whole()
    dumped = plan.dump()
    for path in leaves({"desired": dumped["desired"], "setup": dumped["setup"], "changes": dumped["changes"]}):
        try:
            left = Plan.model_validate_json(canonical(put(dumped, path, make)))
        except ValueError:
            continue  # refused when the file is loaded
        try:
            edited_plan = recomputed(left.dump())
            trust.check_plan(edited_plan)
        except ReconcilerError:
            continue
        part = path[1] if path[0] == "desired" else path[2]
        words = {"reason", "fields", "kind", "statements"} if path[0] != "desired" else INFORMATION
        assert edited_plan.effect_digest != plan.effect_digest or part in words or left == plan, path


def test_a_statement_that_the_effects_do_not_give_is_refused() -> None:
    plan = whole()
    for index, change in enumerate(plan.changes):
        for statements in (
            (*change.statements, Statement(text="SELECT 1")),
            change.statements[:-1],
            tuple(one.model_copy(update={"role": "postgres"}) for one in change.statements),
            tuple(one.model_copy(update={"text": one.text + " "}) for one in change.statements),
        ):
            changes = list(plan.changes)
            changes[index] = change.model_copy(update={"statements": statements})
            with pytest.raises(ReconcilerError, match=re.escape(change.address)) as refused:
                trust.check_plan(plan.model_copy(update={"changes": tuple(changes)}))
            assert refused.value.exit_code == 4
            assert refused.value.details


# ------------------------------------------------------------------------------------------------------------- masked


def test_a_masked_plan_hides_the_values_that_queries_gave() -> None:
    plan = whole()
    shown = plans.masked(plan)
    secret = states.bound()["binds"]["seen"]["value"]
    markers = [change for change in shown.changes if change.kind == "marker"]
    assert len(markers) == 2
    assert secret in "".join(str(change) for change in plan.changes)
    assert secret not in "".join(str(change) for change in shown.changes)
    assert "(hidden; --show-values)" in markers[1].statements[0].text
    others = [change for change in plan.changes if change.kind != "marker"]
    assert [change for change in shown.changes if change.kind != "marker"] == others
    assert shown.effect_digest == plan.effect_digest
    assert shown.summary == plan.summary


def test_not_even_that_two_values_are_equal_is_shown() -> None:
    def shown(value: str) -> list[Change]:
        plan = states.build(states.desired(states.marker("w")), states.live({}, {"marker.w": states.bound(value)}))
        return list(plans.masked(plan).changes)

    assert shown("a") == shown("b")


# ------------------------------------------------------------------------------------------------------------ summary


@given(st.lists(st.sampled_from([("add",), ("change",), ("remove",), ("remove", "add"), ("forget",)]), max_size=20))
def test_the_summary_counts_effects(actions: list[tuple[Action, ...]]) -> None:
    found = [Change(address=f"gate.{index}", kind="gate", actions=each) for index, each in enumerate(actions)]
    flat = [action for each in actions for action in each]
    expected = {action: flat.count(action) for action in ("add", "change", "remove", "forget")}
    assert plans.summarize(found, 3, 4) == Summary.model_validate({**expected, "drift": 3, "findings": 4})


@pytest.mark.parametrize(
    ("given_", "outcome"),
    [
        ({}, "no_changes"),
        ({"setup": [states.setup()]}, "changes"),
        ({"verdicts": [states.verdict("held")]}, "no_changes"),
        ({"verdicts": [states.verdict("violated")]}, "violated"),
        ({"verdicts": [states.verdict("not_judged")], "setup": [states.setup()]}, "violated"),
    ],
)
def test_the_outcome_of_a_plan(given_: dict[str, Any], outcome: str) -> None:
    assert states.build(states.desired(), **given_).outcome == outcome


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan with one change, in its file."""
    path = tmp_path / "a.plan"
    plans.write(path, states.build(states.desired(states.gate("app.ä", "1"))).dump(), private=True)
    return path


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    plan = whole()
    plans.write(path, plan.dump(), private=True)
    loaded, checksum = plans.load(path)
    assert loaded == plan
    assert checksum == digest(plan.dump()) == json.loads(path.read_text())["checksum"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.plan"]


def test_writing_is_the_same_to_the_byte_each_time() -> None:
    plan = whole().dump()
    assert plans.serialize(plan) == plans.serialize(json.loads(plans.serialize(plan)))


@pytest.mark.parametrize("number", [100.0, 1e15, 2.0**53 - 1, 1e16, 1e21, 1e300, 1e-7, 0.1, -0.0])
def test_a_number_is_written_so_that_it_can_be_read(tmp_path: Path, number: float) -> None:
    """Canonical JSON knows no difference between 1e16 and an integer that it could not hold."""
    plans.write(tmp_path / "document", {"cost": number})
    assert plans.read(tmp_path / "document", "document") == {"cost": number}


def damaged(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(PlanDamaged) as refused:
        plans.load(path)
    assert refused.value.exit_code == 1


def test_a_plan_with_any_byte_changed_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for at, byte in enumerate(data):
        damaged(saved, data[:at] + bytes([byte ^ 1]) + data[at + 1 :])


def test_a_plan_with_a_byte_more_or_less_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for at in range(0, len(data) + 1, 3):
        damaged(saved, data[:at] + b" " + data[at:])
        if at < len(data):
            damaged(saved, data[:at] + data[at + 1 :])


def test_a_plan_that_was_cut_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for at in range(0, len(data), 29):
        damaged(saved, data[:at])


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"x"', b"{}", b"\xff", b"{" * 100_000, b"[" * 100_000, b'{"checksum": 1}', b'{"a": NaN}']
    + [b'{"a": ' + b"[" * depth + b"]" * depth + b"}" for depth in (300, 600, 900, 990)],
)
def test_what_is_no_plan_at_all_is_refused(saved: Path, content: bytes) -> None:
    damaged(saved, content)


def test_a_plan_whose_checksum_was_made_to_fit_is_still_refused_when_it_is_no_plan(saved: Path) -> None:
    document_ = json.loads(saved.read_bytes())
    for name in Plan.model_fields:
        if Plan.model_fields[name].is_required():
            damaged(saved, plans.serialize(without(document_, name)))
    damaged(saved, plans.serialize({**document_, "more": 1}))
    damaged(saved, plans.serialize({**document_, "desired": {}}))
    damaged(saved, plans.serialize({**document_, "summary": {"add": "1"}}))


@pytest.mark.parametrize(
    ("version", "fits"), [("1.0", True), ("1.7", True), ("2.0", False), ("10.0", False), ("0.9", False)]
)
def test_only_another_major_format_is_refused_by_its_number(saved: Path, version: str, fits: bool) -> None:
    document_ = {**json.loads(saved.read_bytes()), "format_version": version}
    saved.write_bytes(plans.serialize(document_))
    if fits:
        plans.load(saved)
    else:
        with pytest.raises(PlanDamaged, match=f"has format {version}; this version reads 1.0"):
            plans.load(saved)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read plan .*none.plan: No such file"):
        plans.load(tmp_path / "none.plan")
    with pytest.raises(UsageError, match="is no ordinary file"):
        plans.load(tmp_path)
    for path in (tmp_path / "none" / "a.plan", tmp_path):
        with pytest.raises(UsageError, match="Cannot write"):
            plans.write(path, {})
    assert list(tmp_path.iterdir()) == []
