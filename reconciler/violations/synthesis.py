"""Every form of invariant: the violations that are made for it, and what its verdict comes to."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import psycopg
from psycopg import sql

from reconciler import pg
from reconciler.checks.forms import (
    AttestInvariant,
    ExtensionsInvariant,
    Forbidden,
    ForbidInvariant,
    GateInvariantSpec,
    PinInvariantSpec,
    QueryInvariant,
    UntouchedInvariant,
)
from reconciler.errors import ReconcilerError
from reconciler.model import Asked, Check, Json, Model, glob_regex
from reconciler.parts import identifier, raw, relation, schema_and_pattern
from reconciler.violations.relations import Relation, Row, change, describe
from reconciler.violations.rows import Wanted, rows_for, values_for
from reconciler.violations.samples import Constants
from reconciler.violations.search import search
from reconciler.violations.tampering import (
    NAME,
    Tampering,
    gone_extension,
    new_extension,
    of_functions,
    of_table,
)
from reconciler.violations.trial import HOLDS, Attempt, Trial, kept
from reconciler.violations.writing import REPLICA, asleep, force, lift_triggers, past, put

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg.sql import Composed

MOST_FUNCTIONS = 10
"""Whose facets are changed one by one."""


Status = Literal["seen", "unseen", "vacuous", "not_tried"]


class Violation(Model):
    """What was done to violate an invariant, and whether it noticed.

    seen: every violation that could be made was seen. unseen: one was made and the invariant held. vacuous: nothing
    that was tried turns its query. not_tried: nothing could be made here.
    """

    address: str
    status: Status
    attempts: tuple[Attempt, ...]
    detail: str


def synthesise(conn: pg.Connection, check: Check, asked: Asked) -> Violation:
    """Try to violate one invariant. Never on a target.

    conn: of a superuser or an owner of everything, idle or in a transaction; nothing that is done stays. Raises
    ServerProblem when the connection is lost.
    """
    trial = Trial(conn, check, asked)
    try:
        with trial.transaction() as verdict:
            before = verdict
        if before.status not in HOLDS:
            detail = f"it does not hold to begin with: {before.status}: {before.detail}"
            return Violation(address=check.address, status="not_tried", attempts=(), detail=detail)
        return _by_form(trial)
    except psycopg.Error as error:
        raise pg.translated(error, f"violating {check.address}") from error


def _by_form(trial: Trial) -> Violation:  # noqa: PLR0911 - one per form
    spec = trial.check.spec
    match spec:
        case ForbidInvariant():
            return _facets(trial, _forbidden(trial, spec.forbid))
        case ExtensionsInvariant():
            return _facets(trial, _extensions(trial, spec.extensions.exactly))
        case GateInvariantSpec():
            return _facets(trial, _gate(trial, spec))
        case UntouchedInvariant():
            return _facets(trial, _untouched(trial, spec.untouched))
        case PinInvariantSpec():
            return _facets(trial, _pin(trial, spec))
        case QueryInvariant():
            return _query(trial, spec.query)
        case AttestInvariant():
            if spec.proxy is None:
                detail = "a person's word: there is nothing to judge"
                return Violation(address=trial.check.address, status="not_tried", attempts=(), detail=detail)
            return _query(trial, spec.proxy.query)
        case _:
            raise TypeError(spec)


# ------------------------------------------------------------------------------------------------------------- the ends


def _facets(trial: Trial, found: Iterator[Attempt]) -> Violation:
    """Each of the attempts is a violation, so each has to be seen; what could not be made is named."""
    attempts = tuple(found)
    of = {
        outcome: [one for one in attempts if one.outcome == outcome]
        for outcome in ("violated", "held", "refused", "not tried")
    }
    missing = [str(one) for one in (*of["refused"], *of["not tried"])]
    rest = f"; not made: {'; '.join(missing)}" if missing else ""
    if of["held"]:
        status, detail = "unseen", f"not seen: {', '.join(one.tried for one in of['held'])}"
    elif of["violated"]:
        status, detail = "seen", f"{len(of['violated'])} ways to violate it, each seen{rest}"
    else:
        status, detail = "not_tried", f"no violation could be made{rest}"
    return Violation(address=trial.check.address, status=status, attempts=attempts, detail=detail)


def _query(trial: Trial, query: str) -> Violation:
    """One violation is enough, and none at all makes it vacuous.

    One that needs a constraint out of the way is one: then the invariant is a second line of defence.
    """
    scene, attempts, obstructed = search(trial, query)
    status: Status = "vacuous"
    if attempts and attempts[-1].outcome == "violated":
        gone = f" once {', '.join(attempts[-1].without)} is out of the way" if attempts[-1].without else ""
        status, detail = "seen", f"seen{gone}: {attempts[-1].tried}"
    elif not scene.relations and scene.calls:
        status, detail = "not_tried", "it reads no relation, and nothing that was done changes what its functions say"
    elif not scene.relations:
        detail = "it reads no relation: its answer is always the same"
    elif _never(trial, query):
        detail = "it gives no row whatever the data: PostgreSQL's planner says so"
    elif obstructed:
        status, detail = "not_tried", f"not everything could be tried: {'; '.join(obstructed)}"
    else:
        detail = f"none of {len(attempts)} kinds of attempts turned it"
    return Violation(address=trial.check.address, status=status, attempts=attempts, detail=detail)


def _never(trial: Trial, query: str) -> bool:
    """Whether the planner sees from the query alone that there is never a row."""
    with trial.transaction():
        pg.run(trial.conn, "SET LOCAL constraint_exclusion = off")
        explain = sql.SQL("EXPLAIN (FORMAT JSON) {}").format(raw(query))
        (row,) = pg.rows(trial.conn, explain, doing="explaining a query", quiet=True)
    plan: Json = row["QUERY PLAN"][0]["Plan"]
    while plan["Node Type"] in {"Limit", "Sort", "Subquery Scan", "Unique"} and len(plan.get("Plans", ())) == 1:
        plan = plan["Plans"][0]
    return plan["Node Type"] == "Result" and plan.get("One-Time Filter") == "false"


# -------------------------------------------------------------------------------------------------- extensions, schemas


def _forbidden(trial: Trial, forbidden: Forbidden) -> Iterator[Attempt]:
    with trial.transaction():
        if (name := forbidden.extension) is not None:
            yield trial.first(f"extension {name} installed", new_extension(name))
        if (name := forbidden.schema_name) is not None:
            create = sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name))
            yield trial.first(f"schema {name} created", [[create]])
        if (name := forbidden.relation) is not None:
            home = sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(NAME))
            table = sql.SQL("CREATE TABLE {} (id pg_catalog.int4)").format(sql.Identifier(NAME, name))
            view = sql.SQL("CREATE VIEW {} AS SELECT 1 AS id").format(sql.Identifier(NAME, name))
            yield trial.first(f"table {name} created in another schema", [[home, table]])
            yield trial.first(f"view {name} created in another schema", [[home, view]])
        if (name := forbidden.preload) is not None:
            for setting in ("session_preload_libraries", "local_preload_libraries"):
                statement = sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(setting), sql.Literal(name))
                yield trial.first(f"{name} added to {setting}", [[statement]])
            yield Attempt(
                tried=f"{name} added to shared_preload_libraries",
                outcome="not tried",
                detail="this setting changes only when a server starts",
            )


def _extensions(trial: Trial, names: Sequence[str]) -> Iterator[Attempt]:
    with trial.transaction():
        query = """
            SELECT a.name::pg_catalog.text AS name FROM pg_catalog.pg_available_extensions a
             WHERE a.installed_version IS NULL AND a.name <> ALL (%s) ORDER BY 1 LIMIT 3
        """
        spare = [row["name"] for row in pg.rows(trial.conn, query, (list(names),), doing="reading extensions")]
        ways = [way for name in spare for way in new_extension(name)[:1]]
        yield trial.first("one more extension", [*ways, *new_extension(NAME)[1:]])
        for name in names:
            yield trial.first(f"extension {name} dropped", gone_extension(name))


# ---------------------------------------------------------------------------------------------------------------- gates


def _gate(trial: Trial, spec: GateInvariantSpec) -> Iterator[Attempt]:
    """The row turned, taken away, and, where it must not even be touched, turned and turned back."""
    with trial.transaction():
        table = describe(trial.conn, *relation(spec.store.table))
        if table is None:
            raise ValueError(spec.store.table)
        where = sql.SQL("{}::pg_catalog.text = {}").format(sql.Identifier(spec.store.key), sql.Literal(spec.gate))
        same = change(table, {spec.store.value: spec.equals}, where)
        other = _another(trial, table, spec)
        if other is None:
            yield Attempt(
                tried=f"{spec.gate} turned", outcome="not tried", detail="its column seems to take no other value"
            )
        else:
            turned = change(table, {spec.store.value: other}, where)
            yield _forced(trial, table, f"{spec.gate} turned to {other!r}", [turned])
            if spec.row is not None:
                yield _forced(trial, table, f"{spec.gate} turned to {other!r} and back", [turned, same])
        if spec.row is not None:
            yield _forced(trial, table, f"{spec.gate} written with the value that it has", [same])
        delete = sql.SQL("DELETE FROM {} WHERE {}").format(table.identifier, where)
        yield _forced(trial, table, f"the row of {spec.gate} deleted", [delete])


def _another(trial: Trial, table: Relation, spec: GateInvariantSpec) -> str | None:
    """Another value that the gate's column takes: one that the constraints allow, if there is one."""
    texts = ("true", "false", "0", "1", '"x"', "{}", "x")
    wanted = Wanted(Constants({spec.store.value: texts}, texts), frozenset({spec.store.value}))
    for lawful in (True, False):
        for value in values_for(trial.conn, table, wanted, lawful=lawful)[spec.store.value]:
            if value is not None and value != spec.equals:
                return value
    return None


def _forced(trial: Trial, table: Relation, words: str, statements: Sequence[Composed]) -> Attempt:
    """Write to a table; what refuses it or puts it right again is taken away and named."""
    lifted: list[str] = []

    def make() -> None:
        for statement in statements:
            force(trial.conn, table, statement, words, lifted)

    def past_triggers() -> None:
        if names := lift_triggers(trial.conn, table):
            lifted.append(names)
        make()

    attempt = trial.attempt(words, make)
    return past(trial.attempt(words, past_triggers) if attempt.outcome == "held" else attempt, lifted)


# ---------------------------------------------------------------------------------------------------------- transitions


def _untouched(trial: Trial, names: Sequence[str]) -> Iterator[Attempt]:
    for name in names:
        with trial.transaction():
            table = describe(trial.conn, *relation(name))
            rows = rows_for(trial.conn, table, Wanted(), lawful=True, limit=1) if table is not None else []
        if table is None or table.kind not in {"r", "p"}:
            kind = "no such table" if table is None else "what is written to it is not in this database"
            yield Attempt(tried=f"{name} written to", outcome="not tried", detail=kind)
            continue
        yield from _touched(trial, table, rows)


def _touched(trial: Trial, table: Relation, rows: Sequence[Row]) -> Iterator[Attempt]:
    """Every way to write to a table. No constraint of it is taken away for that: doing so would be seen by itself."""
    conn = trial.conn

    def insert() -> None:
        with asleep(conn):
            put(conn, table, rows[0], (), None)

    def there() -> None:
        with suppress(ReconcilerError, IndexError), kept(conn):
            insert()

    one = sql.SQL("(tableoid, ctid) = (SELECT tableoid, ctid FROM {} ORDER BY tableoid, ctid LIMIT 1)").format(
        table.identifier
    )
    updates = [
        sql.SQL("UPDATE {0} SET {1} = {1} WHERE {2}").format(table.identifier, sql.Identifier(column.name), one)
        for column in table.columns
        if column.generated is None
    ]
    delete = sql.SQL("DELETE FROM {} WHERE {}").format(table.identifier, one)
    truncate = sql.SQL("TRUNCATE {} CASCADE").format(table.identifier)
    with trial.transaction():
        if rows:
            yield trial.attempt(f"a row inserted into {table.text}", insert)
        else:
            detail = "no row was found that its constraints allow"
            yield Attempt(tried=f"a row inserted into {table.text}", outcome="not tried", detail=detail)
    for words, ways in (
        (f"a row of {table.text} updated", [*([REPLICA, update] for update in updates), *([one] for one in updates)]),
        (f"a row of {table.text} deleted", [[REPLICA, delete], [delete]]),
    ):
        # Each in a transaction of its own: the counters of written rows go on counting what was undone.
        with trial.transaction(there) as verdict:
            count = sql.SQL("SELECT EXISTS (SELECT FROM {}) AS there").format(table.identifier)
            found = pg.rows(conn, count, doing=f"looking for rows of {table.text}")[0]["there"]
            if found and verdict.status in HOLDS:
                yield trial.first(words, ways)
            else:
                detail = "it has no row, and none could be made" if not found else f"then it is {verdict.status}"
                yield Attempt(tried=words, outcome="not tried", detail=detail)
    with trial.transaction():
        yield trial.first(f"{table.text} truncated", [[truncate]])
        for facet in of_table(conn, table):
            if facet.words in _DDL:
                yield trial.first(f"{table.text}: {facet.words}", facet.ways)


_DDL = {"a column added", "an index added", "a trigger added"}


# ----------------------------------------------------------------------------------------------------------------- pins


def _pin(trial: Trial, spec: PinInvariantSpec) -> Iterator[Attempt]:
    for facet in _facets_of(trial, spec):
        with trial.transaction():
            yield trial.first(facet.words, facet.ways)


def _facets_of(trial: Trial, spec: PinInvariantSpec) -> list[Tampering]:
    if spec.pin.functions is not None:
        schema, glob = schema_and_pattern(spec.pin.functions)
        with trial.transaction():
            return of_functions(trial.conn, schema, glob_regex(glob), glob, MOST_FUNCTIONS)
    found: list[Tampering] = []
    for name in spec.pin.every_table():
        with trial.transaction():
            table = describe(trial.conn, *relation(name))
            if table is None:
                create = sql.SQL("CREATE TABLE {} (id pg_catalog.int4)").format(identifier(name))
                found.append(Tampering(f"{name} created", ((create,),)))
            else:
                found += [Tampering(f"{name}: {it.words}", it.ways) for it in of_table(trial.conn, table)]
    return found
