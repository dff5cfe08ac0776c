"""Third step of a fleet command: members -> waves, pure. The same file and members always give the same waves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reconciler.errors import UsageError
from reconciler.fleet.files import Canary
from reconciler.fleet.members import has

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reconciler.fleet.files import Member, Percent


def assign(waves: Sequence[Canary | Percent], members: Sequence[Member]) -> dict[str, int]:
    """The wave of every member, from 1, by name. Without waves everybody is in the first.

    A canary wave has whom it names. A percent wave has the next members in the order of the file, until so many percent
    of all members, rounded up, are in it or in a wave before it. Raises UsageError for a canary that is nobody: what
    was to go first would silently be skipped.
    """
    if not waves:
        return {member.name: 1 for member in members}
    placed: dict[str, int] = {}
    for number, wave in enumerate(waves, 1):
        if isinstance(wave, Canary):
            meant = [member for member in members if _is_canary(member, wave)]
            if not meant:
                canary = wave.canary
                named = canary if isinstance(canary, tuple) else [f"{name}={value}" for name, value in canary.items()]
                raise UsageError(
                    f"No target of the fleet is of wave {number}, the canary {', '.join(named)}.",
                    hint="Nothing was begun. Look at `labels` in the file of the fleet, or take the wave out.",
                )
            chosen = [member for member in meant if member.name not in placed]
        else:
            left = [member for member in members if member.name not in placed]
            chosen = left[: max(0, math.ceil(len(members) * wave.percent / 100) - len(placed))]
        placed |= {member.name: number for member in chosen}
    return placed


def _is_canary(member: Member, wave: Canary) -> bool:
    return member.name in wave.canary if isinstance(wave.canary, tuple) else has(member, wave.canary)
