"""Drift, plan and apply of a small fleet on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fleets import Shops

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Database


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 4)
    yield made
    made.drop()


def test_one_approval_for_all_and_a_second_plan_is_empty(shops: Shops) -> None:
    (plan,) = shops.plan()
    assert shops.group(plan).names == tuple(shops.names)
    shops.approve(plan)
    done = shops.apply(plan)
    assert done.returncode == 0, done.stderr + done.stdout
    assert shops.rollout() == dict.fromkeys(shops.names, "applied")
    assert shops.nothing_left()
    for name in shops.names:
        assert (shops.root / "evidence" / name / "evidence.json").is_file()
    told = shops.told("drift", shops.file)
    assert {(one["outcome"], one["exit_code"], one["applied"]["entry"]) for one in told["targets"]} == {
        ("no_changes", 0, 1)
    }
    again = shops.apply(plan, evidence="again")
    assert again.returncode == 0, again.stderr
    assert "skipped, already applied" in again.stdout
    assert [shops.entries(name) for name in shops.names] == [1] * 4
