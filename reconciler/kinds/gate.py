"""Kind `gate`: one row of a configuration table, held at an exact value by compare-and-set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from psycopg import sql
from pydantic import Field

from reconciler import pg
from reconciler.errors import Problem, ServerProblem
from reconciler.kinds import Blocked, Bystander, Kind, Reading, Retirement, Wanted
from reconciler.model import (
    Absent,
    Change,
    Declared,
    Desired,
    Finding,
    GateStore,
    Hazard,
    Json,
    JsonObject,
    Lock,
    Model,
    Need,
    Statement,
    glob_regex,
)
from reconciler.parts import (
    Complaint,
    Context,
    complete,
    hold,
    hold_row,
    identifier,
    mentioned,
    raw,
    row_lock,
    table,
    table_lock,
    write_needs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


MOST_FINDINGS = 100


class GateDeclaration(Model):
    """What a file says of one gate. `value` is the stored text, always quoted."""

    value: str
    reason: str = Field(min_length=1)
    from_: tuple[str, ...] = Field(default=(), alias="from")
    safe: str | None = None
    lock: Literal["free", "approval", "locked"] = "free"
    order: tuple[str, ...] = ()
    store: str | None = None


class GateRetirement(Retirement):
    """What a file says of a gate that is taken out."""

    store: str | None = None


class GateSpec(Model):
    """The row: which table, which key, which value (None is SQL NULL)."""

    table: str
    key: str
    value: str | None


class GateRules(Model):
    """What the files say about changing the row."""

    store: GateStore
    from_: tuple[str, ...] = Field(default=(), alias="from")
    safe: str | None = None
    lock: Literal["free", "approval", "locked"] = "free"
    order: tuple[str, ...] = ()
    reason: str


class Gate(Kind[GateDeclaration, GateSpec, GateRules]):
    """Reads, compares and sets gates."""

    name = "gate"
    section = "gates"
    order = 20
    Declaration = GateDeclaration
    Retirement = GateRetirement
    Spec = GateSpec
    Rules = GateRules

    def declare(
        self, name: str, declaration: GateDeclaration, context: Context
    ) -> tuple[GateSpec | None, GateRules | None, list[Complaint | Problem]]:
        """Find the store and refuse what can never be right: an armed locked gate, a value outside its own order."""
        problems: list[Complaint | Problem] = []
        store, problem = _store(declaration.store, context)
        if store is None:
            problems.append(problem)
        if declaration.lock == "locked":
            if declaration.safe is None:
                problems.append(Complaint(("lock",), "a locked gate needs `safe`, the only value it may hold"))
            elif declaration.value != declaration.safe:
                problems.append(
                    Complaint(
                        ("value",),
                        f"a locked gate may hold only its safe value {declaration.safe!r}, not {declaration.value!r};"
                        " only a proof may arm it, inside a transaction that is rolled back",
                    )
                )
        if declaration.order:
            if declaration.value not in declaration.order:
                problems.append(Complaint(("value",), f"{declaration.value!r} is not in `order`"))
            if len(set(declaration.order)) != len(declaration.order):
                problems.append(Complaint(("order",), "`order` names a value twice"))
        if problems or store is None:
            return None, None, problems
        spec = GateSpec(table=store.table, key=name, value=declaration.value)
        rules = GateRules(
            store=store,
            **{"from": declaration.from_},
            safe=declaration.safe,
            lock=declaration.lock,
            order=declaration.order,
            reason=declaration.reason,
        )
        return spec, rules, []

    def retire(
        self, name: str, retirement: GateRetirement, context: Context
    ) -> tuple[Absent | None, GateRules | None, list[Complaint]]:
        """Find the store that the key is taken out of."""
        store, problem = _store(retirement.store, context)
        if store is None:
            return None, None, [problem]
        return Absent(retire=retirement.retire), GateRules(store=store, reason=retirement.retire), []

    def read(
        self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired, allow_functions: Sequence[str]
    ) -> Reading:
        """One query per store: the declared keys, and the keys in scope that nobody declared."""
        items: dict[str, Model] = {}
        facts: dict[str, Mapping[str, Json]] = {}
        findings: list[Finding] = []
        for name, store in _stores(wanted, desired).items():
            declared = {
                item.name: _texts(item.spec, item.rules) if isinstance(item.spec, GateSpec) else ()
                for item in wanted
                if isinstance(item.rules, GateRules) and item.rules.store == store
            }
            patterns = [glob_regex(entry.matching) for entry in desired.scope.gates if entry.store == name]
            if not declared and not patterns:
                continue
            kind = _value_type(conn, name, store)
            for key, texts in declared.items():
                facts[f"{self.name}.{key}"] = {"stored_as": _stored_as(conn, store, key, texts, kind)}
            for row in _rows(conn, name, store, sorted(declared)):
                address = f"{self.name}.{row['key']}"
                if address in items:
                    raise ServerProblem(
                        f"gate store {name}: {store.table} holds {row['key']} twice, whatever its index says.",
                        hint="REINDEX the table and find out which row is right.",
                    )
                items[address] = GateSpec(table=store.table, key=row["key"], value=row["value"])
                facts[address] = {**facts[address], "xmin": row["xmin"], "updated_at": row["updated_at"]}
            findings += _undeclared(conn, name, store, sorted(declared), patterns) if patterns else []
        retired = [item for item in wanted if isinstance(item.spec, Absent) and item.address in items]
        findings += [
            Finding(code="mentioned", address=item.address, message=f"{who} still names {item.name}, which is retired")
            for item in retired
            for who in mentioned(conn, item.name, retired)
        ]
        return Reading(items, facts, findings)

    def bystanders(self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired) -> dict[str, Bystander]:
        """The keys in scope that nobody declared."""
        declared = [item.name for item in wanted]
        found: dict[str, Bystander] = {}
        for name, store in desired.stores.items():
            patterns = [glob_regex(entry.matching) for entry in desired.scope.gates if entry.store == name]
            query = sql.SQL(
                "SELECT {key}::pg_catalog.text AS key, xmin::pg_catalog.text AS xmin FROM {table}"
                " WHERE {key}::pg_catalog.text ~ ANY (%s::pg_catalog.text[])"
                " AND {key}::pg_catalog.text <> ALL (%s::pg_catalog.text[])"
            ).format(key=sql.Identifier(store.key), table=identifier(store.table))
            if patterns:
                rows = pg.rows(conn, query, (patterns, declared), doing=f"reading gate store {name} ({store.table})")
                found |= {f"{self.name}.{row['key']}": Bystander(row["xmin"], store.table) for row in rows}
        return found

    def decide(
        self, spec: GateSpec, rules: GateRules, live: GateSpec | None, facts: Mapping[str, Json]
    ) -> Wanted | None:
        """In sync when the stored text is equal. Otherwise the live value must be one that `from` and `order` allow.

        A declared text that the column would store as another one is never equal to anything: it is refused.
        """
        stored_as: Mapping[str, Json] = facts.get("stored_as", {})
        for text in _texts(spec, rules):
            if stored_as.get(text, text) != text:
                raise Blocked(f"the column stores {text!r} as {stored_as[text]!r}; write it as it is stored")
        if live == spec:
            return None
        if live is not None:
            where = f" (updated_at {facts['updated_at']})" if facts.get("updated_at") else ""
            shown = "NULL" if live.value is None else repr(live.value)
            if rules.from_ and live.value not in rules.from_:
                allowed = ", ".join(repr(value) for value in rules.from_)
                raise Blocked(f"the live value is {shown}{where}; `from` allows only {allowed}")
            if rules.order and live.value not in rules.order:
                raise Blocked(f"the live value {shown}{where} is not in `order`, so nobody can say if it moves back")
            if rules.order and rules.order.index(str(live.value)) > rules.order.index(str(spec.value)):
                raise Blocked(f"{shown}{where} would move back to {spec.value!r}; `order` never moves back")
        return Wanted(spec)

    def render(
        self, before: GateSpec | None, after: GateSpec | None, rules: GateRules, context: JsonObject | None
    ) -> tuple[Statement, ...]:
        """One INSERT, or one UPDATE or DELETE that finds the row only while it holds the value that was approved."""
        store = rules.store
        if after is None:
            return () if before is None else (complete(_delete(before, store)),)
        if before is None:
            columns: dict[str, sql.Composable] = {
                store.key: sql.Literal(after.key),
                store.value: sql.Literal(after.value),
            }
            if store.description:
                columns[store.description] = sql.Literal(rules.reason)
            if store.updated_at:
                columns[store.updated_at] = sql.SQL("pg_catalog.now()")
            statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                identifier(after.table),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join(columns.values()),
            )
        else:
            touch = (
                sql.SQL(", {} = pg_catalog.now()").format(sql.Identifier(store.updated_at))
                if store.updated_at
                else sql.SQL("")
            )
            statement = sql.SQL("UPDATE {} SET {} = {}{} WHERE {}").format(
                identifier(after.table),
                sql.Identifier(store.value),
                sql.Literal(after.value),
                touch,
                _holds(before, store),
            )
        return (complete(statement),)

    def hazards(self, before: GateSpec | None, after: GateSpec | None, rules: GateRules) -> set[Hazard]:
        """`moves_from_safe` when the row leaves its safe value, `arms_gate` when it is guarded."""
        if after is None or rules.safe is None or after.value == rules.safe:
            return set()
        found: set[Hazard] = set()
        if before is None or before.value == rules.safe:
            found.add("moves_from_safe")
        if rules.lock != "free":
            found.add("arms_gate")
        return found

    def backwards(self, before: GateSpec, rules: GateRules, after: Json) -> GateRules:
        """Compare-and-set holds this way round too; `order` is a promise that a gate never moves back."""
        order = rules.order
        if after is not None and before.value in order and after["value"] in order:
            raise ValueError(f"`order` says that it never moves back from {after['value']!r} to {before.value!r}")
        if before.value is None:
            raise ValueError("it was NULL, which no gate can be set to")
        allowed = () if after is None else (after["value"],)
        return rules.model_copy(update={"from_": allowed})

    def lock(
        self,
        conn: pg.Connection,
        change: Change,
        before: GateSpec | None,
        rules: GateRules,
        ready: Callable[[], None],
    ) -> None:
        """Keep triggers from being added, then lock the row as it will be read.

        Its value is all that changes, so a foreign key may go on pointing to it; whoever would change the value,
        rename the key or delete the row waits all the same.
        """
        ready()
        hold(conn, rules.store.table, change.address)
        if before is not None:
            key = sql.SQL("{} = {}").format(sql.Identifier(rules.store.key), sql.Literal(before.key))
            ready()
            hold_row(conn, before.table, key, change)

    def locks(self, change: Change, rules: GateRules) -> tuple[Lock, ...]:
        """The table as writing does, and the row."""
        row = change.before or change.after or {}
        return (table_lock(change.address, row["table"]), row_lock(change, row["table"], {rules.store.key: row["key"]}))

    def needs(self, change: Change, rules: GateRules) -> tuple[Need, ...]:
        """To write the row."""
        return write_needs(change)


def _store(name: str | None, context: Context) -> tuple[GateStore | None, Complaint]:
    """The store of this name, or the only one; else what is wrong."""
    chosen = name or (next(iter(context.stores)) if len(context.stores) == 1 else None)
    known = ", ".join(sorted(context.stores)) or "none is declared"
    problem = f"gate store {chosen!r} is not declared" if chosen else "`store` must say which gate store"
    complaint = Complaint(("store",) if chosen else (), f"{problem} (governance.gate_stores: {known})")
    return context.stores.get(chosen) if chosen is not None else None, complaint


def _holds(before: GateSpec, store: GateStore) -> sql.Composed:
    """The condition that finds the row only while it holds this value.

    The operator by its schema: one of another schema that fits the column types better must not stand in.
    """
    old = sql.SQL("IS NULL")
    if before.value is not None:
        old = sql.SQL("OPERATOR(pg_catalog.=) {}").format(sql.Literal(before.value))
    return sql.SQL("{} OPERATOR(pg_catalog.=) {} AND {} {}").format(
        sql.Identifier(store.key), sql.Literal(before.key), sql.Identifier(store.value), old
    )


def _delete(before: GateSpec, store: GateStore) -> sql.Composed:
    return sql.SQL("DELETE FROM {} WHERE {}").format(identifier(before.table), _holds(before, store))


def _texts(spec: GateSpec, rules: GateRules) -> tuple[str, ...]:
    """Every text that is compared with the stored one."""
    given = (spec.value, rules.safe, *rules.from_, *rules.order)
    return tuple(dict.fromkeys(text for text in given if text is not None))


def _value_type(conn: pg.Connection, name: str, store: GateStore) -> str:
    """The type of the value column. Raises ServerProblem for one without equality: compare-and-set needs it."""
    extra = [column for column in (store.description, store.updated_at) if column]
    kind = table(conn, store.table, f"gate store {name}", [store.key], [store.value, *extra]).columns[store.value]
    if kind in {"json", "xml"}:
        raise ServerProblem(
            f"gate store {name}: column {store.value} of {store.table} is {kind}, which has no equality.",
            hint="Make it text, or jsonb.",
        )
    return kind


def _stored_as(conn: pg.Connection, store: GateStore, key: str, texts: Sequence[str], kind: str) -> dict[str, Json]:
    """What a value column that is no text makes of each declared text, for example of `{"b":1}` in jsonb.

    Raises ServerProblem for a text that is no value of the type.
    """
    if kind == "text":
        return {}
    forms = [sql.SQL("{}::{}::pg_catalog.text").format(sql.Literal(text), raw(kind)) for text in texts]
    query = sql.SQL("SELECT ARRAY[{}]::pg_catalog.text[] AS forms").format(sql.SQL(", ").join(forms))
    found = pg.rows(conn, query, doing=f"reading gate.{key} as {kind}, the type of {store.value} in {store.table}")
    return dict(zip(texts, found[0]["forms"], strict=True))


def _rows(conn: pg.Connection, name: str, store: GateStore, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The declared rows. The value is cut where nobody would write it into a file."""
    updated_at = (
        sql.SQL("{}::pg_catalog.text").format(sql.Identifier(store.updated_at)) if store.updated_at else sql.SQL("NULL")
    )
    query = sql.SQL(
        "SELECT {key}::pg_catalog.text AS key, {value}::pg_catalog.text AS value, xmin::pg_catalog.text AS xmin,"
        " {updated_at} AS updated_at FROM {table}"
        " WHERE {key}::pg_catalog.text = ANY (%s::pg_catalog.text[]) ORDER BY 1"
    ).format(
        key=sql.Identifier(store.key),
        value=sql.Identifier(store.value),
        updated_at=updated_at,
        table=identifier(store.table),
    )
    return pg.rows(conn, query, (list(keys),), doing=f"reading gate store {name} ({store.table})")


def _stores(wanted: Sequence[Declared], desired: Desired) -> dict[str, GateStore]:
    """The declared stores, and those of gates that only the ledger still knows."""
    stores = dict(desired.stores)
    for item in wanted:
        if isinstance(item.rules, GateRules) and item.rules.store not in stores.values():
            stores[f"{item.rules.store.table} (no longer declared)"] = item.rules.store
    return stores


def _undeclared(
    conn: pg.Connection, name: str, store: GateStore, keys: Sequence[str], patterns: Sequence[str]
) -> list[Finding]:
    """Keys in scope that no file declares: the first hundred by name, the rest as a number."""
    query = sql.SQL(
        "SELECT pg_catalog.left({key}::pg_catalog.text, 200) AS key, pg_catalog.count(*) OVER () AS found FROM {table}"
        " WHERE {key}::pg_catalog.text ~ ANY (%s::pg_catalog.text[])"
        " AND {key}::pg_catalog.text <> ALL (%s::pg_catalog.text[]) ORDER BY 1 LIMIT {most}"
    ).format(key=sql.Identifier(store.key), table=identifier(store.table), most=sql.Literal(MOST_FINDINGS))
    rows = pg.rows(conn, query, (list(patterns), list(keys)), doing=f"reading gate store {name} ({store.table})")
    findings = [
        Finding(
            code="undeclared",
            address=f"gate.{row['key']}",
            message=f"key {row['key']} in {store.table} is in scope but no file declares it",
        )
        for row in rows
    ]
    if rows and rows[0]["found"] > len(rows):
        message = f"{rows[0]['found'] - len(rows)} more keys of {store.table} are in scope but no file declares them"
        findings.append(Finding(code="undeclared", address=f"gate.{store.table}", message=message))
    return findings


KIND = Gate()
