"""What becomes of a look that raises: a result, and of a fault of ours no word that could quote something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reconciler.errors import Locked, Unreachable
from reconciler.fleet import looks
from reconciler.fleet.files import Member

if TYPE_CHECKING:
    from reconciler.fleet.report import TargetResult


MEMBER = Member("shop-1", "password=hunter2", {"region": "eu"})


def raising(error: Exception) -> TargetResult:
    def seen() -> TargetResult:
        raise error

    return looks.told(MEMBER, seen)


def test_an_error_is_a_result() -> None:
    found = raising(Locked("Somebody holds it.", hint="Wait."))
    assert (found.name, found.outcome, found.exit_code, found.message) == ("shop-1", "locked", 4, "Somebody holds it.")
    assert found.labels == {"region": "eu"}
    assert found.checked_at is not None


def test_a_fault_of_ours_is_named_and_not_quoted() -> None:
    found = raising(KeyError("hunter2"))
    assert found.message.startswith("A fault of reconciler: KeyError at test_fleet_looks.py:")
    assert "hunter2" not in found.message
    assert found.exit_code == 1


def test_what_is_asked_for_is_raised() -> None:
    def seen() -> TargetResult:
        raise Unreachable

    with pytest.raises(Unreachable):
        looks.told(MEMBER, seen, (Unreachable,))
    assert looks.told(MEMBER, seen).exit_code == 1
