"""Between a plan file and anybody who acts on it: derive everything again, trust nothing but what the digest covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler import setup
from reconciler.errors import NotApproved, PlanDamaged, Stale
from reconciler.kinds import kinds
from reconciler.plan import dump_desired, effect_digest, effects_digest, load_desired

if TYPE_CHECKING:
    from reconciler.model import Change, Desired, Hazard, Model, Plan, Statement, Target

EDITED = "Somebody edited the plan, or another version made it. Make it again and read it again."


def check_plan(plan: Plan) -> Desired:
    """The declarations of a plan that is what its digest says, statement by statement, hazard by hazard (rule 2).

    `approve`, `show` and `apply` all start here: what is read, what is signed and what is run is the same.
    Raises PlanDamaged when the digests are not those of the content, NotApproved when a statement or a hazard stands in
    the plan that its effects do not give.
    """
    desired = load_desired(plan.desired)
    effects = effects_digest(dump_desired(desired), plan.setup, plan.changes)
    if effects != plan.effects_digest or effect_digest(effects, plan.target) != plan.effect_digest:
        raise PlanDamaged(
            "The plan's digests are not those of its content.", hint="Make the plan again; a plan is never edited."
        )
    if plan.target.name != desired.target:
        raise PlanDamaged("The plan names two targets.")
    derived = [(change, *_setup(desired, change)) for change in plan.setup]
    derived += [(change, *_again(desired, change)) for change in plan.changes]
    for change, statements, hazards in derived:
        # Some hazards follow from the ledger alone: more of them than are derived here is right, fewer never. To the
        # digest they are a set, so they stand in one order only.
        told = change.hazards == tuple(sorted(change.hazards)) and hazards <= set(change.hazards)
        if statements != change.statements or not told:
            raise NotApproved(
                f"{change.address}: the plan holds statements or hazards that its approved effects do not give.",
                details=_differences(statements, change),
                hint=EDITED,
            )
    return desired


def same_target(planned: Target, found: Target) -> None:
    """Is this the database that the plan was made for? Raises Stale."""
    for name in ("name", "database", "system_identifier"):
        if getattr(planned, name) != getattr(found, name):
            raise Stale(
                f"The plan is for {name.replace('_', ' ')} {getattr(planned, name)}, this is {getattr(found, name)}.",
                hint="Apply it where it was made for, or plan again here.",
            )


def _setup(desired: Desired, change: Change) -> tuple[tuple[Statement, ...], set[Hazard]]:
    if change.kind != setup.kind_of(change.address):
        # No digest covers the word, and by it the installed policy and list are found in a plan.
        raise PlanDamaged(f"{change.address}: the plan calls it {change.kind}.", hint=EDITED)
    item = desired.items.get(change.address.removeprefix(setup.ACCEPTED))
    if change.kind == "accepted" and item is None:
        raise PlanDamaged(f"The plan accepts {change.address}, which it does not declare.")
    try:
        if change.kind == "accepted" and item is not None:
            return (), set(setup.accepted_hazards(change, item))
        return setup.statements(change), set(setup.hazards(change))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanDamaged(f"{change.address}: the plan's objects cannot be read: {type(error).__name__}.") from None


def _again(desired: Desired, change: Change) -> tuple[tuple[Statement, ...], set[Hazard]]:
    """Statements and hazards, derived from the typed content."""
    if "forget" in change.actions:
        return (), {"forgets"}
    kind, item = kinds().get(change.kind), desired.items.get(change.address)
    if kind is None or item is None:
        raise PlanDamaged(f"The plan changes {change.address}, which it does not declare.")
    try:
        before: Model | None = None if change.before is None else kind.load(change.before)
        after: Model | None = None if change.after is None else kind.load(change.after)
        hazards: set[Hazard] = {"retires"} if after is None else kind.hazards(before, after, item.rules)
        return kind.render(before, after, item.rules, change.context), hazards
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Only an edited plan holds an object that its kind cannot have.
        raise PlanDamaged(f"{change.address}: the plan's objects cannot be read: {type(error).__name__}.") from None


def _differences(statements: tuple[Statement, ...], change: Change) -> list[str]:
    extra = [statement.text for statement in change.statements if statement not in statements]
    lost = [statement.text for statement in statements if statement not in change.statements]
    return [f"in the plan only: {text}" for text in extra[:3]] + [f"missing in the plan: {text}" for text in lost[:3]]
