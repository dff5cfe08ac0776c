"""Every single edit of a plan, an approval or a target, as somebody would make it who also makes the checksum right.

An edit is refused, or it is of the few things that no digest covers, listed here with the reason why they decide
nothing. `tests/integration/test_tampering.py` applies a plan with lies in all of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from reconciler import approve as approvals
from reconciler import plan as plans
from reconciler import setup, signatures, trust
from reconciler.errors import NotApproved, PlanDamaged, ReconcilerError, Stale
from reconciler.model import Approval, Check, GateScope, Live, Lock, Locks, Plan, Scope, Target, Verdict, canonical
from tests import states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from reconciler.model import Desired, Json

Place = tuple[str | int, ...]

INFORMATION = {
    "format_version": "another minor of the format that is read",
    "outcome": "a word about the plan; apply finds out again",
    "tool": "which version made it",
    "created_at": "when; covered where the plan is signed",
    "expires_at": "how long the plan is fresh: apply plans again under its locks, and approvals expire by themselves",
    "state": "names of files and release, for people",
    "target.server_version": "a minor update of the server is no other effect",
    "drift": "what others changed before; what it means for this plan stands in `before` and in the hazards",
    "findings": "what was seen beside the changes; apply looks again",
    "invariants": "verdicts of then; apply judges again, and asks for the attestations that it finds",
    "proofs": "as invariants",
    "surface": "as invariants",
    "not_compared": "what was not looked at",
    "locks": "what would be locked and who was in the way; apply takes the locks that its own changes need",
    "privileges": "what the planner's role would lack; apply asks for its own role",
    "summary": "counts of the changes; the ledger counts again",
    "changes.reason": "words",
    "changes.fields": "before and after once more, for people",
    "setup.reason": "words",
    "setup.fields": "before and after once more, for people",
    "desired.release": "a name, for people",
    "desired.source_digest": "which files; DESIGN: not an effect",
    "desired.database": "the target's own database is in the effect digest",
    "desired.ledger": "a plan of a ledger that was lost or replaced has another `setup`",
}
"""What no digest covers, and why it decides nothing."""


class Case(NamedTuple):
    """A plan whose author signed it, two approvals of it, and by what they are judged."""

    plan: Plan
    approvals: list[Approval]
    allowed: str


def declared(allowed: str) -> Desired:
    """A little of everything."""
    surface = Check("surface", "rows", _check("surface", query="SELECT count(*) FROM public.settings AS s"))
    return states.desired(
        states.gate("app.a", "true", from_=["false"], safe="false", lock="approval", order=["false", "true"]),
        states.function("fn_a", ["app.a"], args=[{"name": "p", "mode": "in", "type": "text", "default": None}]),
        states.function("fn_b", security_definer=True),
        states.marker("worker", fresh={"column": "seen", "within": "5m"}, passive_while="beats = 0"),
        states.invariant("no-cron"),
        states.invariant("signed-for", attest="Nobody called."),
        surface,
        policy=states.policy(required=2, signed=True, approvers="approvers", **{"for": {"retires": 2}}),
        approvers=allowed,
        scope=Scope(gates=(GateScope(store="settings", matching="app.*"),)),
        ledger="a" * 64,
        database=states.TARGET.database,
    )


def _check(kind: str, **spec: Json) -> Any:
    from reconciler.checks import checks

    return checks()[kind].load(spec)


def reading() -> Live:
    """One gate and one function to change, the rest to add."""
    former = {"owner": "former", "acl": [], "comment": "old"}
    return states.live(
        {
            "gate.app.a": states.gate_row("app.a", "false"),
            "function.public.fn_b()": states.function_row("fn_b", **former),
        },
        {"marker.worker": states.bound(), "function.public.fn_a(text)": {"default_grantees": ["stranger"]}},
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("keys")
    lines: list[str] = []
    for name in ("author", "one", "two"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        lines.append(f"{name} {' '.join((folder / f'{name}.pub').read_text().split()[:2])}\n")
    wanted = declared("".join(lines))
    first = setup.changes(wanted, version=0, readable=True, installed=None)
    claim = Verdict(
        address="invariant.signed-for",
        status="not_judged",
        detail="Nobody called.",
        missing="attestation",
        tolerated=True,
    )
    made = states.build(wanted, reading(), setup=first, verdicts=[claim, states.verdict("held")])
    lock = Lock(address="gate.app.a", mode="FOR UPDATE", on="row", name="public.settings", key={"name": "a"}, waits="x")
    made = made.model_copy(update={"locks": Locks(needed=(lock,), looked=True, in_the_way=(), not_seen=())})
    made = approvals.sign_plan(made, "author", folder / "author")
    yes = [
        approvals.approve(
            made,
            "c" * 64,
            approver=name,
            reason="change 4711",
            accepted=made.hazards,
            attested=made.attestations,
            expires="12h",
            now=states.NOW,
            key=folder / name,
        )
        for name in ("one", "two")
    ]
    return Case(made, yes, "".join(lines))


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh-keygen says the same to the same question; it is not asked thousands of times."""
    monkeypatch.setattr(signatures, "judge", functools.cache(signatures.judge))


def checked(case: Case, document: Json, given: list[Json], there: Target = states.TARGET) -> Plan:
    """What `apply` asks of a plan and its approvals before it takes a lock, in its order. Raises ReconcilerError."""
    try:
        plan = Plan.model_validate_json(canonical(document))
        loaded = [Approval.model_validate_json(canonical(one)) for one in given]
    except ValueError as error:
        raise PlanDamaged(str(error)) from None
    desired = trust.check_plan(plan)
    trust.same_target(plan.target, there)
    now = states.NOW + timedelta(hours=1)
    court = approvals.Court(
        policy=desired.policy,
        allowed=desired.approvers,
        used=(),
        now=now,
        author=approvals.author(plan, case.allowed, now),
        target=there,
    )
    approvals.verify(
        loaded, court, effect_digest=plan.effect_digest, hazards=plan.hazards, attestations=plan.attestations
    )
    return plan


def decides(plan: Plan) -> Json:
    """All of a plan that decides: as it is loaded, without the information."""
    whole = plan.model_copy(update={"desired": plans.dump_desired(plans.load_desired(plan.desired))}).dump()
    for place in INFORMATION:
        first, _, second = place.partition(".")
        for part in whole[first] if second and isinstance(whole[first], list) else [whole[first]] if second else []:
            part.pop(second)
        if not second:
            whole.pop(first)
    return whole


# --------------------------------------------------------------------------------------------------------- the edits


@contextmanager
def instead(holder: Json, key: str | int, value: Json) -> Iterator[None]:
    """`holder[key]` is something else for a while."""
    before, holder[key] = holder[key], value
    yield
    holder[key] = before


def others(value: Json) -> list[Json]:
    """What somebody might write in the place of this value."""
    if isinstance(value, bool):
        return [not value, None, "x"]
    if isinstance(value, int | float):
        return [value + 1, -value - 1, None, str(value)]
    if isinstance(value, str):
        return [value + "x", "", value.swapcase() + " ", None, 7]
    if value is None:
        return ["x", 7, {}]
    return []


def edited(value: Json) -> Iterator[tuple[str, Json]]:
    """Every single edit of one container: keys and elements taken away, added, repeated, exchanged."""
    if isinstance(value, dict):
        for key in value:
            yield f"without {key}", {name: inner for name, inner in value.items() if name != key}
        yield "and more", {**value, "more": 1}
    elif isinstance(value, list):
        for at, one in enumerate(value):
            yield f"without [{at}]", value[:at] + value[at + 1 :]
            yield f"[{at}] twice", [*value[: at + 1], one, *value[at + 1 :]]
            if at and value[at - 1] != one:
                yield f"[{at - 1}] and [{at}] exchanged", [*value[: at - 1], one, value[at - 1], *value[at + 1 :]]
        yield "and more", [*value, "x"]


def places(value: Json, place: Place = ()) -> Iterator[tuple[Place, Json, Json]]:
    """(place, what holds it, its key) of everything in a document, from the outside in."""
    steps: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    for step in steps:
        yield (*place, step), value, step
        if isinstance(value[step], dict | list):
            yield from places(value[step], (*place, step))


def edits(document: Json) -> Iterator[tuple[Place, str]]:
    """The document with one edit at a time, in place; what was done and where."""
    for place, holder, key in list(places(document)):
        value = holder[key]
        tried = [(f"{other!r:.40}", other) for other in others(value)] + list(edited(value))
        for what, other in tried:
            with instead(holder, key, other):
                yield place, what


def whole(document: Json) -> dict[str, Json]:
    return json.loads(canonical(document))


# ----------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_as_it_is_passes(case: Case) -> None:
    given = [one.dump() for one in case.approvals]
    assert decides(checked(case, case.plan.dump(), given)) == decides(case.plan)


@pytest.mark.parametrize("part", [name for name in Plan.model_fields if name != "desired"])
@pytest.mark.parametrize("digests", ["left", pytest.param("made to fit", marks=pytest.mark.slow)])
def test_every_edit_of_a_plan(case: Case, part: str, digests: str) -> None:
    try_all(case, part, None, fit=digests == "made to fit")


@pytest.mark.parametrize("part", plans.dump_desired(states.desired()))
@pytest.mark.parametrize("digests", ["left", pytest.param("made to fit", marks=pytest.mark.slow)])
def test_every_edit_of_the_declarations_of_a_plan(case: Case, part: str, digests: str) -> None:
    try_all(case, "desired", part, fit=digests == "made to fit")


def try_all(case: Case, first: str, second: str | None, *, fit: bool) -> None:
    """Every edit of one part of the plan: refused, or of something that decides nothing."""
    document, given = whole(case.plan.dump()), [one.dump() for one in case.approvals]
    expected, before = decides(case.plan), canonical(case.plan.dump())
    holder, name = (document, first) if second is None else (document[first], second)
    tried = refused = 0
    wrong: list[str] = []
    part = {name: holder[name]}  # so that the part itself is edited too, and not only what is in it
    for place, what in edits(part):
        holder[name] = part[name]
        tried += 1
        try:
            plan = checked(case, fitting(document) if fit else document, given)
        except ReconcilerError:
            refused += 1
        else:
            if decides(plan) != expected:
                wrong.append(f"{place}: {what}")
    holder[name] = part[name]
    assert canonical(document) == before, "every edit was undone"
    assert wrong == []
    assert tried > 0
    if (first if second is None else f"{first}.{second}") not in INFORMATION:
        assert refused > 0


def fitting(document: Json) -> Json:
    """The document with its digests computed anew, as far as it can be read."""
    try:
        plan = Plan.model_validate_json(canonical(document))
        effects = plans.effects_digest(plans.dump_desired(plans.load_desired(plan.desired)), plan.setup, plan.changes)
    except (ValueError, ReconcilerError):
        return document
    return {**document, "effects_digest": effects, "effect_digest": plans.effect_digest(effects, plan.target)}


def test_taking_the_authors_name_away_is_what_a_plan_without_author_is(case: Case) -> None:
    """Nobody can be held to a plan that is not signed; `required: 2` is the rule of four eyes that does not need it."""
    bare = case.plan.model_copy(update={"author": None, "author_signature": None})
    checked(case, bare.dump(), [one.dump() for one in case.approvals])
    own = case.approvals[0].model_copy(update={"approver": "author"})
    with pytest.raises(NotApproved):
        checked(case, bare.dump(), [own.dump(), case.approvals[1].dump()])


# ------------------------------------------------------------------------------------------------------ the statements


def statements(document: Json) -> list[tuple[Json, list[Json]]]:
    """Each change with the list of its statements."""
    return [(change, change["statements"]) for part in ("setup", "changes") for change in document[part]]


def refuse(case: Case, document: Json, holder: Json, key: str, value: Json) -> int:
    """This edit of a statement is refused by its name. Returns 1, to be counted."""
    with instead(holder, key, value), pytest.raises(NotApproved) as refused:
        checked(case, document, [one.dump() for one in case.approvals])
    assert "statements or hazards" in refused.value.message
    return 1


def test_every_extra_missing_repeated_or_altered_statement(case: Case) -> None:
    document, tried = whole(case.plan.dump()), 0
    for change, made in statements(document):
        for at in range(len(made) + 1):
            extra = {"text": "SELECT 1", "role": None}
            tried += refuse(case, document, change, "statements", [*made[:at], extra, *made[at:]])
        for other in rearranged(made):
            tried += refuse(case, document, change, "statements", other)
        for one in made:
            for text in altered(one["text"]):
                tried += refuse(case, document, one, "text", text)
            for role in {"postgres", None, "", "app_owner"} - {one["role"]}:
                tried += refuse(case, document, one, "role", role)
    assert tried > 300
    checked(case, document, [one.dump() for one in case.approvals])


def test_statements_moved_to_another_change(case: Case) -> None:
    document, tried = whole(case.plan.dump()), 0
    for (one, mine), (other, theirs) in itertools.pairwise(statements(document)):
        for here, there in ((mine[:-1], [*mine[-1:], *theirs]), (theirs, mine)):
            if (here, there) != (mine, theirs):
                with instead(one, "statements", here):
                    tried += refuse(case, document, other, "statements", there)
    assert tried > 5


def rearranged(made: list[Json]) -> Iterator[list[Json]]:
    """The list with one statement taken away or repeated, or two exchanged."""
    for at, one in enumerate(made):
        yield made[:at] + made[at + 1 :]
        yield [*made[:at], one, *made[at:]]
    for one, other in itertools.combinations(range(len(made)), 2):
        if made[one] != made[other]:
            turned = [*made]
            turned[one], turned[other] = made[other], made[one]
            yield turned


def altered(text: str) -> list[str]:
    """The statement as somebody might alter it."""
    middle = len(text) // 2
    return [
        "",
        text + " ",
        text + ";",
        text + "; DROP TABLE public.settings",
        text + " -- ",
        "/**/" + text,
        text[:-1],
        text[1:],
        text.swapcase(),
        text[:middle] + " " + text[middle:],
        text.replace("public", "publ\u0456c", 1) if "public" in text else text + "\u200b",
        text.replace("'", "''", 1) if "'" in text else text + "\n",
    ]


# -------------------------------------------------------------------------------------------------------- the approval


def test_every_edit_of_an_approval(case: Case) -> None:
    plan = case.plan.dump()
    first, second = (whole(one.dump()) for one in case.approvals)
    before = canonical(first)
    tried, passed, holder = 0, list[str](), {"approval": first}
    for place, what in edits(holder):
        tried += 1
        try:
            checked(case, plan, [holder["approval"], second])
        except ReconcilerError:
            continue
        if canonical(Approval.model_validate_json(canonical(holder["approval"])).dump()) != before:
            passed.append(f"{place}: {what}")
    assert passed == []
    assert tried > 100


def test_an_approval_is_not_signed_by_another(case: Case) -> None:
    plan = case.plan.dump()
    one, two = case.approvals
    for forged in (
        one.model_copy(update={"signature": two.signature}),
        one.model_copy(update={"approver": "two"}),
        one.model_copy(update={"break_glass": True}),
        one,
    ):
        with pytest.raises(NotApproved, match="not approved"):
            checked(case, plan, [forged.dump(), one.dump()])


# ---------------------------------------------------------------------------------------------------------- the target


def test_every_edit_of_the_target_that_is_there(case: Case) -> None:
    given = [one.dump() for one in case.approvals]
    for name in Target.model_fields:
        for other in ("x", "", getattr(states.TARGET, name) + " ", getattr(states.TARGET, name)[:-1]):
            there = states.TARGET.model_copy(update={name: other})
            if name == "server_version":
                checked(case, case.plan.dump(), given, there)
                continue
            with pytest.raises(Stale, match=f"The plan is for {name.replace('_', ' ')}"):
                checked(case, case.plan.dump(), given, there)
            # A plan that was made there has these effects and another digest; its approvals are for here.
            moved = fitting({**case.plan.dump(), "target": there.dump()})
            with pytest.raises(ReconcilerError):
                checked(case, moved, given, there)


# ----------------------------------------------------------------------------------------------------------- the bytes


def test_every_byte_of_an_approval(case: Case, tmp_path: Path) -> None:
    """Changed or taken away: without the checksum nothing can be edited by accident."""
    path = tmp_path / "approval"
    data = plans.serialize(case.approvals[0].dump())
    for at, byte in enumerate(data):
        for other in (*(bytes([byte ^ bit]) for bit in (1, 0x20)), b""):
            path.write_bytes(data[:at] + other + data[at + 1 :])
            with pytest.raises(PlanDamaged):
                approvals.load(path)
    path.write_bytes(data)
    assert approvals.load(path) == case.approvals[0]


def test_every_few_bytes_of_a_plan(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    data = plans.serialize(case.plan.dump())
    step = 97  # a prime: no layout of lines is stepped over
    for at in range(0, len(data), step):
        for other in (bytes([data[at] ^ 1]), b""):
            path.write_bytes(data[:at] + other + data[at + 1 :])
            with pytest.raises(PlanDamaged):
                plans.load(path)
    path.write_bytes(data)
    assert plans.load(path)[0] == case.plan


def test_a_signature_in_any_other_spelling(case: Case) -> None:
    """What base64 and armour leave open is closed: nothing rides along in an approval."""
    plan, second = case.plan.dump(), case.approvals[1].dump()
    made = case.approvals[0].signature or ""
    lines = made.splitlines()
    spellings = [
        made + "\n",
        made + "x",
        "x" + made,
        "\n" + made,
        made.replace("\n", "\r\n"),
        made.replace("\n", "\n\n", 1),
        "\n".join([lines[0], "Comment: x", *lines[1:]]) + "\n",
        "\n".join([lines[0], "".join(lines[1:-1]), lines[-1]]) + "\n",
        made + made,
        made.replace(lines[2], lines[2] + " "),
        made.replace("=\n-----END", "\n-----END"),
        made.replace("BEGIN SSH", "BEGIN  SSH"),
        "\x1b[31m" + made,
        made.replace(lines[1][:8], lines[1][:7] + "é"),
        "",
        "A" * 100_000,
    ]
    for spelling in spellings:
        if spelling == made:
            continue
        forged = {**case.approvals[0].dump(), "signature": spelling}
        with pytest.raises(NotApproved) as refused:
            checked(case, plan, [forged, second])
        assert "holds no signature that OpenSSH can read" in refused.value.details[0]
