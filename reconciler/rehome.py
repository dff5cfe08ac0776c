"""Beside the flow: the ledger of a clone, of an upgraded or a restored server -> the plan that says where it is now.

Such a plan changes nothing else: the entry that it becomes governs what the last one governed, and voids every approval
that was issued before it. It is approved and applied like any other, by the installed policy and list.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reconciler import ledger, live, setup
from reconciler.errors import MissingPrivilege, UsageError
from reconciler.model import Body, GateStore, Scope, canonical
from reconciler.plan import assemble, with_forgotten

if TYPE_CHECKING:
    from datetime import datetime

    from reconciler.model import Desired, JsonObject, Plan
    from reconciler.pg import Connection


def plan(conn: Connection, like: Desired, now: datetime) -> tuple[Plan, ledger.Last]:
    """The plan that gives the ledger its new home, and the ledger that it was made from.

    like: whose name, target, database and ledger hash it is for; everything else is as installed. Raises UsageError
    where nothing was applied yet or the connection is to another database, MissingPrivilege, Refused.
    """
    target = live.identify(conn, like)
    last = ledger.last(conn, like.name)
    if not last.readable:
        raise MissingPrivilege(last.findings[0].message)
    ledger.check_genesis(like, last)
    if last.entry is None or last.home is None:
        raise UsageError(f"{like.name} was never applied on this database; there is nothing to rehome.")
    change = setup.home(like.name, last.home, target)
    return assemble(installed(like, last.entry.body), (), target=target, setup=[change], now=now), last


def is_one(made: Plan) -> bool:
    """Does this plan give a ledger its new home?"""
    return any(change.kind == "home" for change in made.setup)


def installed(like: Desired, body: JsonObject) -> Desired:
    """What the last entry governs, as declarations. like: whose name, target, database and ledger hash they have."""
    kept = Body.model_validate_json(canonical(body))
    bare = replace(
        like,
        release=f"rehome to {like.target}",
        policy=kept.policy,
        approvers=kept.approvers,
        scope=Scope.model_validate_json(canonical(kept.scope["scope"])),
        stores={name: GateStore.model_validate_json(canonical(store)) for name, store in kept.scope["stores"].items()},
        items={},
        checks={},
        source_digest=kept.run_id,
    )
    return with_forgotten(bare, {address: entry.dump() for address, entry in kept.manifest.items()})
