"""Made-up systems for tests: small state directories, and the nouns of the flow without a database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from reconciler import plan as plans
from reconciler.checks import checks
from reconciler.kinds import kinds
from reconciler.model import (
    ApplyPolicy,
    ApprovalPolicy,
    Change,
    Check,
    Declared,
    Desired,
    GateStore,
    Json,
    Live,
    Model,
    Plan,
    Policy,
    Scope,
    Target,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

NOW = datetime(2026, 5, 22, 12, 0, 0, tzinfo=UTC)
TARGET = Target(name="main", database="app", system_identifier="7000000000000000001", server_version="16.13")
STORE = GateStore(table="public.settings", key="name", value="value")

GOVERNANCE = """\
governance:
  version: 1
  name: app
  release: first
  targets: {main: {}}
  gate_stores:
    settings: {table: public.settings, key: name, value: value}
  scope:
    gates: [{store: settings, matching: "app.*"}]
    functions: [{schema: public, matching: "fn_*"}]
    markers: [{table: public.workers}]
  approval: {required: 1, signed: false, expires: 24h}
"""

SQL = """\
CREATE FUNCTION public.fn_one(p_limit integer DEFAULT 5) RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, public, pg_temp
AS $$
BEGIN
    RETURN p_limit;
END
$$;
"""

STATE: Mapping[str, str] = {
    "governance.yaml": GOVERNANCE,
    "gates.yaml": """\
gates:
  app.enabled: {value: "true", from: ["false"], safe: "false", lock: approval, reason: The pilot starts.}
  app.limit: {value: "100", reason: Small enough.}
  app.phase: {value: second, order: [first, second, third], reason: The second phase.}
""",
    "functions.yaml": """\
functions:
  public.fn_one(integer):
    source: functions/fn_one.sql
    owner: app_owner
    execute: [app_caller]
    gates: [app.enabled]
    comment: Gives its argument back.
""",
    "functions/fn_one.sql": SQL,
    "markers.yaml": """\
markers:
  worker:
    table: public.workers
    key: {name: worker}
    bind: {last_seen: {query: SELECT c.at FROM public.cursors AS c, approve: value}}
    values: {beats: "0"}
    passive_while: beats = 0
    fresh: {column: last_seen, within: 5m}
""",
    "invariants.yaml": """\
invariants:
  no-cron: {forbid: {extension: pg_cron}}
  no-blank: {query: SELECT s.name FROM public.settings AS s WHERE s.value = '', rows: 0}
""",
    "proofs.yaml": """proofs:
  refuses:
    reason: The gate is asked.
    arm: {app.enabled: "false"}
    when: SELECT public.fn_one(1)
    then: [{returns: [{fn_one: app.enabled=false}]}]
""",
}
"""A state directory with everything in it, by file."""


def write(directory: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Write the files below `directory`, which is returned; None removes one."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


# ------------------------------------------------------------------------------------------- without files or database


def gate(name: str, value: str, **rules: Any) -> Declared:
    """A declared gate; `rules` as GateRules names them, with `from_`."""
    kind = kinds()["gate"]
    given = {"store": STORE.dump(), "reason": "because", **rules}
    given["from"] = given.pop("from_", [])
    spec = {"table": STORE.table, "key": name, "value": value}
    return Declared("gate", name, kind.load(spec), kind.load_rules(given))


def gate_row(name: str, value: str | None) -> Model:
    """A gate as it is read from its table."""
    return kinds()["gate"].load({"table": STORE.table, "key": name, "value": value})


FUNCTION: Mapping[str, Json] = {
    "schema_name": "public",
    "kind": "function",
    "args": [],
    "returns": "integer",
    "returns_set": False,
    "language": "plpgsql",
    "volatility": "volatile",
    "security_definer": False,
    "parallel": "unsafe",
    "strict": False,
    "leakproof": False,
    "cost": 100.0,
    "rows": 0.0,
    "support": None,
    "transforms": [],
    "config": ["search_path=pg_catalog, public, pg_temp"],
    "body": " BEGIN RETURN 1; END ",
    "binary": None,
    "owner": "app_owner",
    "acl": [{"grantee": "app_owner", "grantor": "app_owner", "grantable": False}],
    "comment": None,
}


def function_row(name: str, **attributes: Any) -> Model:
    """A function as it is read from the catalog."""
    return kinds()["function"].load({**FUNCTION, "name": name, **attributes})


def function(name: str, gates: Iterable[str] = (), **attributes: Any) -> Declared:
    """A declared function without arguments, or with those of `args`."""
    spec: Any = function_row(name, **attributes)
    rules = kinds()["function"].load_rules({"gates": list(gates)})
    return Declared("function", spec.identity, spec, rules)


def marker(name: str, **given: Any) -> Declared:
    """A declared marker with a bound column `seen` and a value `beats`; `given` replaces rules."""
    kind = kinds()["marker"]
    spec = {"table": "public.workers", "key": {"name": name}, "columns": {"beats": "0"}}
    bind = {"seen": {"query": "SELECT c.at FROM public.cursors AS c", "approve": "value"}}
    return Declared("marker", name, kind.load(spec), kind.load_rules({"bind": bind, **given}))


def marker_row(name: str, **columns: str) -> Model:
    """A marker's row as it is read from its table."""
    return kinds()["marker"].load({"table": "public.workers", "key": {"name": name}, "columns": columns})


def invariant(name: str, **spec: Any) -> Check:
    """A declared invariant, by default one that forbids an extension."""
    return Check("invariant", name, checks()["invariant"].load(spec or {"forbid": {"extension": "pg_cron"}}))


def policy(**given: Any) -> Policy:
    """One unsigned approval is enough, unless `given` says otherwise of the approval."""
    return Policy(approval=ApprovalPolicy(**{"signed": False, **given}), apply=ApplyPolicy())


def desired(*things: Declared | Check, **given: Any) -> Desired:
    """Everything declared."""
    whole: dict[str, Any] = {
        "name": "app",
        "release": "first",
        "target": "main",
        "database": None,
        "ledger": None,
        "policy": policy(),
        "approvers": "",
        "scope": Scope(),
        "stores": {"settings": STORE},
        "items": {thing.address: thing for thing in things if isinstance(thing, Declared)},
        "checks": {thing.address: thing for thing in things if isinstance(thing, Check)},
        "source_digest": "0" * 64,
    }
    return Desired(**{**whole, **given})


def live(items: Mapping[str, Model] | None = None, facts: Mapping[str, Mapping[str, Json]] | None = None) -> Live:
    """A reading: objects and facts by address."""
    return Live(items or {}, facts or {}, ())


def bound(value: str = "2026-05-22 11:31:41+00") -> dict[str, Json]:
    """The facts of a marker of `marker()` that is missing."""
    types = {"p_seen": "timestamp with time zone", "p_note": "text"}
    return {"binds": {"seen": {"value": value}}, "expected": {"beats": "0"}, "via": [types]}


def manifest(wanted: Desired, found: Mapping[str, Model]) -> dict[str, Json]:
    """What the ledger would remember after `wanted` was applied and `found` was there."""
    entries: dict[str, Json] = {
        address: {
            "kind": item.kind,
            "name": item.name,
            "spec": kinds()[item.kind].essence(found[address]).dump(),
            "rules": item.rules.dump(),
        }
        for address, item in wanted.items.items()
        if address in found
    }
    return entries | {
        address: {"kind": one.kind, "name": one.name, "spec": one.spec.dump(), "rules": {}}
        for address, one in wanted.checks.items()
    }


def build(wanted: Desired, found: Live | None = None, **given: Any) -> Plan:
    """The plan from `found` (by default: nothing is there) to `wanted`."""
    whole: dict[str, Any] = {
        "target": TARGET,
        "setup": (),
        "last": {},
        "drift": (),
        "verdicts": (),
        "not_compared": (),
        "now": NOW,
    }
    return plans.build(wanted, found or live(), **{**whole, **given})


def setup() -> Change:
    """The first policy, as an apply would install it."""
    return Change(
        address="policy.app", kind="policy", actions=("add",), after=policy().dump(), reason="the first policy"
    )


def verdict(status: str, name: str = "no-cron", detail: str = "why") -> Verdict:
    """What a check found."""
    return Verdict.model_validate({"address": f"invariant.{name}", "status": status, "detail": detail})
