"""Check `invariant`: what must be true of the live state. A violated one is never fixed; it blocks the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

from psycopg import sql

from reconciler import definitions, pg, transitions
from reconciler.allowlist import check_query
from reconciler.checks import CheckKind
from reconciler.checks.forms import (
    FORMS,
    MAX_ROWS,
    AttestInvariant,
    Exactly,
    ExtensionsInvariant,
    Forbidden,
    ForbidInvariant,
    GateInvariant,
    GateInvariantSpec,
    PinInvariant,
    PinInvariantSpec,
    Pinned,
    QueryInvariant,
    UntouchedInvariant,
)
from reconciler.model import BY_OTHERS, Asked, Check, Declared, Json, Model, Need, Verdict, canonical, glob_regex
from reconciler.parts import (
    QUERY_TIMEOUT_MS,
    Complaint,
    Context,
    hidden_needs,
    identifier,
    raw,
    relation,
    schema_and_pattern,
    single_value,
    unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Invariant(CheckKind):
    """Judges invariants on the state that the transaction sees, and on what the apply did to it."""

    name = "invariant"
    section = "invariants"
    order = 10

    def forms(self) -> Sequence[type[Model]]:
        """Every form."""
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
        """Find the gate's store and the pin's lines; hold queries against the allowlist."""
        if isinstance(declaration, QueryInvariant):
            problems = _refused(declaration.query, ("query",), context)
            return (None if problems else declaration), problems
        if isinstance(declaration, AttestInvariant) and declaration.proxy is not None:
            problems = _refused(declaration.proxy.query, ("proxy", "query"), context)
            return (None if problems else declaration), problems
        if isinstance(declaration, UntouchedInvariant):
            problems = [
                Complaint(("untouched", index), message)
                for index, text in enumerate(declaration.untouched)
                if (message := _no_relation(text))
            ]
            return (None if problems else declaration), problems
        if isinstance(declaration, PinInvariant):
            return _pin_spec(name, declaration, context)
        if isinstance(declaration, GateInvariant):
            return _gate_spec(declaration, context, items)
        return declaration, []

    def load(self, spec: Json) -> Model:
        """The form is told by its key, as in the files."""
        resolved: dict[str, type[Model]] = {"gate": GateInvariantSpec, "pin": PinInvariantSpec}
        form = next(resolved.get(key, FORMS[key]) for key in FORMS if key in spec)
        return form.model_validate_json(canonical(spec))

    def needs(self, check: Check) -> tuple[Need, ...]:
        """What its queries read; the settings that preloaded libraries stand in; the gate's table."""
        spec = check.spec
        if isinstance(spec, ForbidInvariant) and spec.forbid.preload is not None:
            return hidden_needs(check.address, ["pg_catalog.pg_settings"])
        if isinstance(spec, GateInvariantSpec):
            return hidden_needs(check.address, [spec.store.table])
        return super().needs(check)

    def remember(self, conn: pg.Connection, check: Check, asked: Asked) -> Json:
        """For transitions: the row's transaction id, the relations and our own write counters, the proxy's answer."""
        spec = check.spec
        if (
            isinstance(spec, GateInvariantSpec)
            and spec.row is not None
            and unreadable(conn, [spec.store.table]) is None
        ):
            return {"xmin": _gate_row(conn, check.address, spec)[1]}
        if isinstance(spec, UntouchedInvariant):
            return {"relations": transitions.family(conn, spec.untouched)}
        query = _watched(spec)
        if query is not None and _obstacle(conn, query, asked.allow_functions) is None:
            return {
                "answer": _fingerprint(conn, query, check.address),
                "watched": transitions.watch(conn, query),
            }
        return None

    def run(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:
        """Judge one invariant."""
        return _grouped(self._judge(conn, check, asked), check)

    def planned(self, check: Check) -> Verdict | None:
        """What a person will say, and what only an apply can break."""
        match check.spec:
            case AttestInvariant() as spec:
                return _grouped(_to_be_attested(check, spec), check)
            case UntouchedInvariant():
                return _grouped(_later(check.address), check)
            case _:
                return None

    def _judge(self, conn: pg.Connection, check: Check, asked: Asked) -> Verdict:  # noqa: PLR0911 - one per form
        spec, address = check.spec, check.address
        match spec:
            case ForbidInvariant():
                return _forbid(conn, address, spec.forbid)
            case ExtensionsInvariant():
                return _extensions(conn, address, spec.extensions)
            case GateInvariantSpec():
                return _gate(conn, address, spec, asked)
            case QueryInvariant():
                return _query(conn, address, spec, asked)
            case UntouchedInvariant():
                return _untouched(conn, address, asked)
            case PinInvariantSpec():
                return _pin(conn, address, spec)
            case AttestInvariant():
                return _attest(conn, check, spec, asked)
            case _:
                raise TypeError(spec)


def _refused(query: str, path: tuple[str | int, ...], context: Context) -> list[Complaint]:
    report = check_query(query, context.policy.allow_functions)
    return [Complaint(path, trouble.message) for trouble in report.troubles]


def _no_relation(text: str) -> str:
    try:
        relation(text)
    except ValueError as error:
        return str(error)
    return ""


def _gate_spec(
    declaration: GateInvariant, context: Context, items: Mapping[str, Declared]
) -> tuple[Model | None, list[Complaint]]:
    stores = context.stores
    name = declaration.store or (next(iter(stores)) if len(stores) == 1 else "")
    if name not in stores:
        known = ", ".join(sorted(stores)) or "none is declared"
        return None, [Complaint(("gate",), f"`store` must name one of governance.gate_stores: {known}")]
    item = items.get(f"gate.{declaration.gate}")
    if item is not None and getattr(item.rules, "secret", False):
        message = f"gate {declaration.gate!r} is a secret: no file says what it holds"
        return None, [Complaint(("gate",), message)]
    spec = GateInvariantSpec(
        gate=declaration.gate,
        equals=declaration.equals,
        row=declaration.row,
        store=stores[name],
        declared=item.spec.dump()["value"] if item is not None else None,
        reason=declaration.reason,
        group=declaration.group,
    )
    return spec, []


def _pin_spec(name: str, declaration: PinInvariant, context: Context) -> tuple[Model | None, list[Complaint]]:
    stored = context.pins.get(name)
    if context.capturing:
        return PinInvariantSpec(pin=declaration.pin, lines=(), reason=declaration.reason, group=declaration.group), []
    if stored is None:
        return None, [Complaint(("pin",), "nothing is captured for it: run `reconciler pin` and review pins.yaml")]
    if stored.pin != declaration.pin.named():
        return None, [Complaint(("pin",), "pins.yaml captured something else: run `reconciler pin` and review it")]
    return PinInvariantSpec(
        pin=declaration.pin, lines=stored.lines, reason=declaration.reason, group=declaration.group
    ), []


def _verdict(address: str, held: bool, detail: str) -> Verdict:
    return Verdict(address=address, status="held" if held else "violated", detail=detail)


def _not_judged(address: str, missing: str, detail: str) -> Verdict:
    return Verdict(address=address, status="not_judged", detail=detail, missing=missing)


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


def _gate(conn: pg.Connection, address: str, spec: GateInvariantSpec, asked: Asked) -> Verdict:
    if missing := unreadable(conn, [spec.store.table]):
        return _not_judged(address, *missing)
    value, xmin = _gate_row(conn, address, spec)
    if xmin is None:
        will = spec.declared == spec.equals and not asked.inside
        return _verdict(address, will, f"{spec.gate} is absent" + (" and declared with this value" if will else ""))
    if value != spec.equals:
        return _verdict(address, False, f"{spec.gate} is {value!r}, must be {spec.equals!r}")
    if spec.row is not None and asked.inside and asked.memo["xmin"] not in {None, xmin}:
        return _verdict(address, False, f"{spec.gate} is {value!r}, but its row was written during the apply")
    return _verdict(
        address, True, f"{spec.gate} is {value!r}" + (", row untouched" if spec.row and asked.inside else "")
    )


def _gate_row(conn: pg.Connection, address: str, spec: GateInvariantSpec) -> tuple[str | None, str | None]:
    """Value and transaction id of the row; (None, None) when there is none."""
    query = sql.SQL(
        "SELECT {}::pg_catalog.text AS value, xmin::pg_catalog.text AS xmin FROM {} WHERE {}::pg_catalog.text = %s"
    ).format(sql.Identifier(spec.store.value), identifier(spec.store.table), sql.Identifier(spec.store.key))
    found = pg.rows(conn, query, (spec.gate,), doing=f"judging {address}")
    return (found[0]["value"], found[0]["xmin"]) if found else (None, None)


def _later(address: str) -> Verdict:
    return Verdict(address=address, status="deferred", detail="judged inside the apply, just before COMMIT")


def _untouched(conn: pg.Connection, address: str, asked: Asked) -> Verdict:
    if not asked.inside:
        return _later(address)
    remembered: dict[str, Json] = asked.memo["relations"]
    if remembered["missing"]:
        missing = f"relation {remembered['missing'][0]}"
        return _not_judged(address, missing, f"there is no {missing}")
    touched = transitions.touched(conn, remembered)
    return _verdict(address, not touched, "; ".join(touched) or "no lock that could write, or opened and not written")


def _pin(conn: pg.Connection, address: str, spec: PinInvariantSpec) -> Verdict:
    pinned, lines = _unread(spec.lines, spec.pin), _unread(captured(conn, spec.pin), spec.pin)
    gone, new = [line for line in pinned if line not in lines], [line for line in lines if line not in pinned]
    if not gone and not new and pinned != lines:
        return _verdict(address, False, "the same facts in another order")
    moved = [f"- {line}" for line in gone[:3]] + [f"+ {line}" for line in new[:3]]
    more = f" and {len(gone) + len(new) - len(moved)} more" if len(gone) + len(new) > len(moved) else ""
    return _verdict(address, not moved, "; ".join(moved) + more if moved else f"{len(lines)} facts as pinned")


def _unread(lines: Sequence[str], pin: Pinned) -> list[str]:
    """The lines without those that say that one of the pin's readers may read."""
    tables = pin.every_table()
    prefixes = tuple(
        f"{name}: {start}" if len(tables) > 1 else start
        for name in tables
        for start in map(definitions.reading, pin.readers)
    )
    return [line for line in lines if not line.startswith(prefixes)]


def captured(conn: pg.Connection, pin: Pinned) -> list[str]:
    """The lines of what is pinned, as it is now; a table that is not there is a line that says so."""
    if pin.functions is not None:
        schema, pattern = schema_and_pattern(pin.functions)
        return definitions.of_functions(conn, schema, glob_regex(pattern))
    tables = pin.every_table()
    found = {name: definitions.of_table(conn, name) or ["no such relation"] for name in tables}
    return [f"{name}: {line}" if len(tables) > 1 else line for name in tables for line in found[name]]


def _grouped(verdict: Verdict, check: Check) -> Verdict:
    return verdict.model_copy(update={"group": getattr(check.spec, "group", "")})


def _to_be_attested(check: Check, spec: AttestInvariant) -> Verdict:
    detail = f"to be signed for with --attest {check.name}: {spec.attest}"
    return Verdict(address=check.address, status="deferred", detail=detail, missing="attestation")


def _attest(conn: pg.Connection, check: Check, spec: AttestInvariant, asked: Asked) -> Verdict:
    """A person's word; its proxy can only refute it."""
    if not asked.inside:
        return _to_be_attested(check, spec)
    if check.name not in asked.attested:
        return _not_judged(check.address, "attestation", f"nobody signed for it: {spec.attest}")
    seen = ""
    if spec.proxy is not None:
        if missing := _obstacle(conn, spec.proxy.query, asked.allow_functions):
            return _not_judged(check.address, *missing)
        moved, how = _moved(conn, spec.proxy.query, check.address, asked)
        if moved:
            return _verdict(check.address, False, f"attested, but what its proxy query sees {how}")
        seen = f" What its proxy query sees {how}."
    claim = spec.attest if spec.attest.endswith((".", "!", "?", "…")) or spec.proxy is None else f"{spec.attest}."
    return Verdict(address=check.address, status="attested", detail=f"{claim}{seen}")


def _moved(conn: pg.Connection, query: str, address: str, asked: Asked) -> tuple[bool, str]:
    """Did we change the answer during the apply? And in words what became of it. What others changed is theirs."""
    if asked.memo is None:
        return True, "could not be read when the transaction began"
    if _fingerprint(conn, query, address) == asked.memo["answer"]:
        return False, "is the same as at BEGIN"
    own = transitions.own(conn, asked.memo["watched"])
    if why := own.unknown or "; ".join(own.wrote):
        return True, f"changed during the apply; {why}"
    return False, f"changed during the apply, {BY_OTHERS}"


def _fingerprint(conn: pg.Connection, query: str, address: str) -> str:
    """Number and order-free digest of the rows, computed by the server."""
    text = sql.SQL(
        "SELECT pg_catalog.count(*) || ':' || coalesce(pg_catalog.sum("
        "pg_catalog.hashtextextended(q::pg_catalog.text, 0)::pg_catalog.numeric), 0) AS answer FROM ({}\n) AS q"
    ).format(raw(query))
    pg.timeout(conn, QUERY_TIMEOUT_MS)
    return pg.rows(conn, text, doing=f"judging {address}")[0]["answer"]


def _watched(spec: Model) -> str | None:
    """The query whose answer an apply must leave as it is."""
    if isinstance(spec, QueryInvariant) and spec.unchanged:
        return spec.query
    return spec.proxy.query if isinstance(spec, AttestInvariant) and spec.proxy is not None else None


def _query(  # noqa: PLR0911 - one per way to be judged
    conn: pg.Connection, address: str, spec: QueryInvariant, asked: Asked
) -> Verdict:
    if missing := _obstacle(conn, spec.query, asked.allow_functions):
        return _not_judged(address, *missing)
    if spec.unchanged:
        if not asked.inside:
            return _later(address)
        moved, how = _moved(conn, spec.query, address, asked)
        return _verdict(address, not moved, f"the answer {how}")
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


def _obstacle(conn: pg.Connection, query: str, allow_functions: Sequence[str]) -> tuple[str, str] | None:
    """What keeps this query from being judged by this role under the installed policy: (what is missing, sentence)."""
    # Again and with the installed policy: a file may allow itself whatever it likes (DESIGN rule 3).
    report = check_query(query, allow_functions)
    if report.troubles:
        return "allow_functions", f"the installed policy does not allow it: {report.troubles[0].message}"
    return unreadable(conn, report.relations)


CHECK = Invariant()
