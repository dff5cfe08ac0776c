"""A rollout that somebody misleads: by a canary that is nobody, by an approval that was for something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reconciler.fleet import rollout
from reconciler.fleet.files import Member
from tests.fleets import Shops

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Database


@pytest.fixture
def shops(db: Database, tmp_path: Path) -> Iterator[Shops]:
    made = Shops(db, tmp_path, 2)
    yield made
    made.drop()


def test_a_canary_that_is_nobody_is_not_skipped(shops: Shops) -> None:
    shops.declared["waves"] = [{"canary": {"region": "ue"}}, {"percent": 100}]
    shops.write()
    (plan,) = shops.plan()
    shops.approve(plan)
    done = shops.apply(plan)
    assert done.returncode == 1
    assert "No target of the fleet is of wave 1, the canary region=ue." in done.stderr
    assert [shops.entries(name) for name in shops.names] == [0, 0]
    # Who only looks is not stopped by it.
    assert shops.run("drift", shops.file).returncode == 0
    shops.declared["waves"][0] = {"canary": {"region": "eu"}}
    shops.write()
    done = shops.apply(plan)
    assert done.returncode == 0, done.stderr
    assert shops.nothing_left()


def test_an_approval_used_for_other_effects_makes_nobody_done(shops: Shops) -> None:
    (first,) = shops.plan("first")
    used = shops.approve(first)
    assert shops.apply(first, evidence="one").returncode == 0
    shops.sql("shop-001", "UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    shops.sql("shop-002", "UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    (second,) = shops.plan("second")
    alone = shops.apply(second, "--approval", used, evidence="two")
    assert "skipped" not in alone.stdout
    # Evidence is never overwritten, so the very same words would be refused.
    assert "start the same command again with another --evidence." in alone.stderr
    assert alone.returncode == 4
    assert "The plan is not approved. the approval of operator was used before" in alone.stdout
    both = shops.apply(second, "--approval", used, "--approval", shops.approve(second), evidence="three")
    assert both.returncode == 0, both.stdout + both.stderr
    assert shops.rollout("three") == dict.fromkeys(shops.names, "applied")
    assert shops.nothing_left()


def test_what_was_left_is_asked_of_its_ledger_and_not_of_evidence_that_nobody_wrote() -> None:
    left = rollout._left(Member("shop-001", "dbname=shop_001", {}))
    assert (left.state, left.exit_code) == ("failed", 5)
    assert "Start the rollout again" in left.message
    assert "settle" not in left.message
