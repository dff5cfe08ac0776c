"""A check that is all that is new: it is shown, approved and installed, and from then on it outlives its line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from reconciler.errors import NotApproved, Violated
from tests.integration import governed
from tests.integration.governed import command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database


@pytest.fixture
def shop(db: Database, tmp_path: Path) -> Governed:
    system = governed.shop(db, tmp_path)
    system.settle()
    system.state["invariants"]["few-jobs"] = {"query": "SELECT id FROM app.job WHERE actor = 'nobody'", "rows": 0}
    return system.write()


def pending(shop: Governed) -> list[str]:
    """What `drift` says is declared and not installed; nothing else may be there."""
    done = command("drift", "-s", shop.directory, "--format", "json", dsn=shop.db.dsn)
    assert done.returncode == 0
    items = json.loads(done.stdout)["items"]
    assert {item["class"] for item in items} <= {"pending"}
    return [item["address"] for item in items]


def test_it_is_pending_until_an_apply_of_its_own(shop: Governed) -> None:
    assert pending(shop) == ["invariant.few-jobs"]
    plan = shop.plan()
    assert [(change.address, change.kind, change.before, change.hazards) for change in plan.setup] == [
        ("invariant.few-jobs", "check", None, ())
    ]
    assert (plan.changes, plan.outcome) == ((), "changes")
    shop.apply(plan)
    shop.in_sync()
    assert pending(shop) == []


def test_without_its_line_it_is_forgotten_only_with_a_yes(shop: Governed) -> None:
    shop.apply(shop.plan())
    del shop.state["invariants"]["few-jobs"]
    shop.write()
    shop.sql("INSERT INTO app.job (id, actor) VALUES (77, 'nobody')")
    plan = shop.plan()
    assert [(change.address, change.actions) for change in plan.changes] == [("invariant.few-jobs", ("forget",))]
    assert [one.address for one in plan.blocking] == ["invariant.few-jobs"]
    with pytest.raises(Violated):
        shop.apply(plan)
    shop.sql("DELETE FROM app.job WHERE actor = 'nobody'")
    plan = shop.plan()
    with pytest.raises(NotApproved):
        shop.apply(plan, [shop.approve(plan, accepted=[])])
    shop.apply(plan)
    shop.in_sync()


def test_one_that_is_violated_is_not_installed(shop: Governed) -> None:
    shop.sql("INSERT INTO app.job (id, actor) VALUES (77, 'nobody')")
    plan = shop.plan()
    assert plan.outcome == "violated"
    with pytest.raises(Violated):
        shop.apply(plan)
    assert shop.entries() == 1
