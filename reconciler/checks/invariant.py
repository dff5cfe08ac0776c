"""Check `invariant`: what must be true of the live state. A violated one is never fixed; it blocks the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

from psycopg import sql
from pydantic import Field, model_validator

from reconciler import pg
from reconciler.allowlist import check_query
from reconciler.checks import CheckKind
from reconciler.model import Check, Declared, GateStore, Json, Model, Verdict, canonical
from reconciler.parts import QUERY_TIMEOUT_MS, Complaint, Context, identifier, raw, single_value, unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_ROWS = 100_000

# Relations whose rows or columns are hidden, without an error, from a role that lacks the privilege (DESIGN rule 16).
HIDING = {
    "pg_catalog.pg_settings": "pg_read_all_settings",
    "pg_catalog.pg_stat_activity": "pg_read_all_stats",
    "pg_catalog.pg_stat_gssapi": "pg_read_all_stats",
    "pg_catalog.pg_stat_replication": "pg_read_all_stats",
    "pg_catalog.pg_stat_ssl": "pg_read_all_stats",
    "pg_catalog.pg_stat_subscription": "pg_read_all_stats",
    "pg_catalog.pg_stat_wal_receiver": "pg_read_all_stats",
}


class Forbidden(Model):
    """Things of which none may exist. `relation`: in any schema. `preload`: in a *_preload_libraries setting."""

    extension: str | None = None
    schema_name: str | None = Field(default=None, alias="schema")
    preload: str | None = None
    relation: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Forbidden:
        if not any((self.extension, self.schema_name, self.preload, self.relation)):
            raise ValueError("name at least one of extension, schema, preload, relation")
        return self


class ForbidInvariant(Model):
    """`forbid: {...}`."""

    forbid: Forbidden
    reason: str = ""


class Exactly(Model):
    """A set of names, neither more nor fewer."""

    exactly: tuple[str, ...]


class ExtensionsInvariant(Model):
    """`extensions: {exactly: [...]}`."""

    extensions: Exactly
    reason: str = ""


class GateInvariant(Model):
    """`gate: KEY, equals: "text"`."""

    gate: str
    equals: str
    store: str | None = None
    reason: str = ""


class GateInvariantSpec(Model):
    """The gate and where its row lives. `declared`: the value the files want, which an absent row will get."""

    gate: str
    equals: str
    store: GateStore
    declared: str | None
    reason: str = ""


class QueryInvariant(Model):
    """`query: SELECT ...` with `rows: N` or `equals: "text"` (one row, one column)."""

    query: str
    rows: int | None = Field(default=None, ge=0, le=MAX_ROWS)
    equals: str | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _one_expectation(self) -> QueryInvariant:
        if (self.rows is None) == (self.equals is None):
            raise ValueError("write exactly one of `rows` and `equals`")
        return self


FORMS: dict[str, type[Model]] = {
    "forbid": ForbidInvariant,
    "extensions": ExtensionsInvariant,
    "gate": GateInvariant,
    "query": QueryInvariant,
}


class Invariant(CheckKind):
    """Judges invariants on the state that the transaction sees."""

    name = "invariant"
    section = "invariants"

    def forms(self) -> Sequence[type[Model]]:
        """The four forms."""
        return tuple(FORMS.values())

    def form(self, data: Json) -> tuple[type[Model] | None, str]:
        """The form is told by its key."""
        found = [form for key, form in FORMS.items() if isinstance(data, dict) and key in data]
        if len(found) == 1:
            return found[0], ""
        return None, f"an invariant has exactly one of the keys {', '.join(FORMS)}"

    def declare(
        self, name: str, declaration: Model, context: Context, items: Mapping[str, Declared]
    ) -> tuple[Model | None, list[Complaint]]:
        """Find the gate's store; hold the query against the allowlist."""
        if isinstance(declaration, QueryInvariant):
            report = check_query(declaration.query, context.policy.allow_functions)
            problems = [Complaint(("query",), trouble.message) for trouble in report.troubles]
            return (None if problems else declaration), problems
        if not isinstance(declaration, GateInvariant):
            return declaration, []
        stores = context.stores
        name = declaration.store or (next(iter(stores)) if len(stores) == 1 else "")
        if name not in stores:
            known = ", ".join(sorted(stores)) or "none is declared"
            return None, [Complaint(("gate",), f"`store` must name one of governance.gate_stores: {known}")]
        item = items.get(f"gate.{declaration.gate}")
        value = item.spec.dump()["value"] if item is not None else None
        spec = GateInvariantSpec(
            gate=declaration.gate,
            equals=declaration.equals,
            store=stores[name],
            declared=value,
            reason=declaration.reason,
        )
        return spec, []

    def load(self, spec: Json) -> Model:
        """The form is told by its key, as in the files."""
        form = GateInvariantSpec if "gate" in spec else next(FORMS[key] for key in FORMS if key in spec)
        return form.model_validate_json(canonical(spec))

    def run(self, conn: pg.Connection, check: Check, allow_functions: Sequence[str]) -> Verdict:
        """Judge one invariant."""
        spec = check.spec
        if isinstance(spec, ForbidInvariant):
            return _forbid(conn, check.address, spec.forbid)
        if isinstance(spec, ExtensionsInvariant):
            return _extensions(conn, check.address, spec.extensions)
        if isinstance(spec, GateInvariantSpec):
            return _gate(conn, check.address, spec)
        if isinstance(spec, QueryInvariant):
            return _query(conn, check.address, spec, allow_functions)
        raise TypeError(spec)


def _verdict(address: str, held: bool, detail: str) -> Verdict:
    return Verdict(address=address, status="held" if held else "violated", detail=detail)


def _not_judged(address: str, missing: str, detail: str) -> Verdict:
    return Verdict(address=address, status="not_judged", detail=detail, missing=missing)


def _may(conn: pg.Connection, role: str) -> bool:
    query = "SELECT pg_catalog.pg_has_role(current_user, %s::pg_catalog.name, 'USAGE') AS may"
    return pg.rows(conn, query, (role,))[0]["may"]


_RELATIONS: LiteralString = """
SELECT pg_catalog.format('%%I.%%I', n.nspname, c.relname) AS n
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = %s ORDER BY 1
"""


def _forbid(conn: pg.Connection, address: str, forbidden: Forbidden) -> Verdict:
    found: list[str] = []
    looked: list[str] = []
    questions: tuple[tuple[str, str | None, LiteralString], ...] = (
        ("extension", forbidden.extension, "SELECT extname AS n FROM pg_catalog.pg_extension WHERE extname = %s"),
        ("schema", forbidden.schema_name, "SELECT nspname AS n FROM pg_catalog.pg_namespace WHERE nspname = %s"),
        ("relation", forbidden.relation, _RELATIONS),
    )
    for what, name, query in questions:
        if name is not None:
            looked.append(f"{what} {name}")
            found += [f"{what} {row['n']}" for row in pg.rows(conn, query, (name,), doing=f"judging {address}")]
    hidden = ""
    if forbidden.preload is not None:
        settings = pg.rows(
            conn,
            "SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN"
            " ('shared_preload_libraries', 'session_preload_libraries', 'local_preload_libraries') ORDER BY name",
            doing=f"judging {address}",
        )
        looked.append(f"preloaded library {forbidden.preload}")
        for row in settings:
            libraries = [part.strip().strip('"').rpartition("/")[2] for part in row["setting"].split(",")]
            if forbidden.preload in {library.removesuffix(".so") for library in libraries}:
                found.append(f"{forbidden.preload} in {row['name']}")
        if not found and len(settings) < 3:
            hidden = "pg_read_all_settings"
    if found:
        return _verdict(address, False, f"found: {', '.join(found)}")
    if hidden:
        return _not_judged(address, hidden, f"the role may not see the preload settings; GRANT {hidden} to it")
    return _verdict(address, True, f"absent: {', '.join(looked)}")


def _extensions(conn: pg.Connection, address: str, wanted: Exactly) -> Verdict:
    query = "SELECT extname::pg_catalog.text AS name FROM pg_catalog.pg_extension"
    live = {row["name"] for row in pg.rows(conn, query, doing=f"judging {address}")}
    more, fewer = sorted(live - set(wanted.exactly)), sorted(set(wanted.exactly) - live)
    differences = [f"not declared: {', '.join(more)}"] * bool(more) + [f"missing: {', '.join(fewer)}"] * bool(fewer)
    return _verdict(address, not differences, "; ".join(differences) or f"exactly {', '.join(sorted(live))}")


def _gate(conn: pg.Connection, address: str, spec: GateInvariantSpec) -> Verdict:
    if missing := unreadable(conn, [spec.store.table]):
        return _not_judged(address, *missing)
    query = sql.SQL("SELECT {}::pg_catalog.text AS value FROM {} WHERE {}::pg_catalog.text = %s").format(
        sql.Identifier(spec.store.value), identifier(spec.store.table), sql.Identifier(spec.store.key)
    )
    found = pg.rows(conn, query, (spec.gate,), doing=f"judging {address}")
    if not found:
        will = spec.declared == spec.equals
        return _verdict(address, will, f"{spec.gate} is absent" + (" and declared with this value" if will else ""))
    value = found[0]["value"]
    detail = f"{spec.gate} is {value!r}" + ("" if value == spec.equals else f", must be {spec.equals!r}")
    return _verdict(address, value == spec.equals, detail)


def _query(conn: pg.Connection, address: str, spec: QueryInvariant, allow_functions: Sequence[str]) -> Verdict:
    if missing := _obstacle(conn, spec, allow_functions):
        return _not_judged(address, *missing)
    pg.timeout(conn, QUERY_TIMEOUT_MS)
    doing = f"judging {address}"
    if spec.rows is not None:
        query = sql.SQL(
            "SELECT pg_catalog.count(*) AS found FROM (SELECT FROM ({}\n) AS q LIMIT {}) AS counted"
        ).format(raw(spec.query), sql.Literal(MAX_ROWS + 1))
        found: int = pg.rows(conn, query, doing=doing, quiet=True)[0]["found"]
        return _verdict(address, found == spec.rows, f"{found} rows, expected {spec.rows}")
    value, error = single_value(conn, spec.query, doing)
    if value is None:
        return _verdict(address, False, f"the query {error}")
    if value == spec.equals:
        return _verdict(address, True, "equal")
    # Not the value, nor a digest that a short one could be guessed from: a pull request could print it.
    return _verdict(address, False, "another value than declared")


def _obstacle(conn: pg.Connection, spec: QueryInvariant, allow_functions: Sequence[str]) -> tuple[str, str] | None:
    """What keeps this query from being judged by this role under the installed policy: (what is missing, sentence)."""
    # Again and with the installed policy: a file may allow itself whatever it likes (DESIGN rule 3).
    report = check_query(spec.query, allow_functions)
    if report.troubles:
        return "allow_functions", f"the installed policy does not allow it: {report.troubles[0].message}"
    for name in report.relations:
        role = HIDING.get(name)
        if role is not None and not _may(conn, role):
            return role, f"{name} hides rows or columns from this role; GRANT {role} to it"
    return unreadable(conn, report.relations)


CHECK = Invariant()
