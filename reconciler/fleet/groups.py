"""Fourth step of a fleet command: plans of many targets -> one for each before-state, with the list of its targets.

Targets are of one group when their effects digests are equal: the same changes from the same state under the same
rules. What is approved is then one plan and a list; the plan of each target follows from the two.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from reconciler.errors import PlanDamaged
from reconciler.model import FORMAT_VERSION, Identity, Json, Listed, Model, Plan, Target, canonical, digest
from reconciler.plan import effect_digest, read
from reconciler.trust import check_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SUFFIX = ".fleet.plan"


class Group(Model):
    """A plan for several targets. `plan`: that of the first of them. targets: by name."""

    format_version: str = FORMAT_VERSION
    fleet: str
    targets: tuple[Target, ...] = Field(min_length=1)
    plan: Plan

    @property
    def listed(self) -> Listed:
        """What an approval signs."""
        return Listed(
            fleet=self.fleet,
            effects_digest=self.plan.effects_digest,
            targets=tuple(
                Identity(name=one.name, database=one.database, system_identifier=one.system_identifier)
                for one in self.targets
            ),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the targets."""
        return tuple(one.name for one in self.targets)

    def of(self, name: str, ledger: str | None) -> Plan:
        """The plan of one target: the same effects, its own identity.

        ledger: the hash that its ledger must begin with, where the fleet's file names one.
        """
        target = next(one for one in self.targets if one.name == name)
        return self.plan.model_copy(
            update={
                "target": target,
                "effect_digest": effect_digest(self.plan.effects_digest, target),
                "desired": {**self.plan.desired, "target": name, "ledger": ledger},
            }
        )


def make(fleet: str, plans: Sequence[Plan]) -> list[Group]:
    """The groups of those plans that change something and are not blocked, the largest first."""
    found: dict[str, list[Plan]] = defaultdict(list)
    for plan in plans:
        if plan.has_changes and not plan.blocking:
            found[plan.effects_digest].append(plan)
    groups = [
        Group(
            fleet=fleet,
            targets=tuple(plan.target for plan in sorted(same, key=_name)),
            plan=min(same, key=_name),
        )
        for same in found.values()
    ]
    return sorted(groups, key=lambda group: (-len(group.targets), group.plan.effects_digest))


def _name(plan: Plan) -> str:
    return plan.target.name


def file_name(group: Group) -> str:
    """By the first digits of the effects digest."""
    return f"{group.plan.effects_digest[:12]}{SUFFIX}"


def is_one(document: dict[str, Json]) -> bool:
    """Is this document a group's plan, and not one target's?"""
    return "fleet" in document and "targets" in document


def load(path: Path) -> tuple[Group, str]:
    """A group's plan, derived again, and its checksum. Raises UsageError, PlanDamaged, NotApproved."""
    document = read(path, "plan of a fleet")
    return judged(path, document), digest(document)


def judged(path: Path, document: dict[str, Json]) -> Group:
    """The document as a group's plan. Raises PlanDamaged, NotApproved."""
    try:
        group = Group.model_validate_json(canonical(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanDamaged(f"{path} is no plan of a fleet: {place}: {first['msg']}.") from None
    check_plan(group.plan)
    if list(group.names) != sorted(set(group.names)) or group.plan.target not in group.targets:
        raise PlanDamaged(f"{path} does not list its targets once each, by name, with that of its plan among them.")
    return group
