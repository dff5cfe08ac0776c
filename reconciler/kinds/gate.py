"""Kind `gate`: one row of a configuration table, held at an exact value by compare-and-set.

Of a secret gate nobody but the server and the apply knows the value: here are its HMACs, and places in its statements.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from psycopg import sql
from pydantic import ConfigDict, Field

from reconciler import pg, secrets
from reconciler.errors import Problem, ServerProblem, Stale, UsageError
from reconciler.kinds import UNSEEN, Blocked, Bystander, Kind, Reading, Retirement, Wanted, Writing
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
    canonical,
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
    relation,
    row_lock,
    table,
    table_lock,
    write_needs,
)
from reconciler.secrets import Sealed, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


MOST_FINDINGS = 100
MOST_KEYS = 10_000
"""Undeclared keys in scope that a snapshot names, of each store."""
LONGEST = 200
"""Characters of an undeclared key that are read."""


class GateDeclaration(Model):
    """What a file says of one gate. `value` is the stored text, always quoted."""

    value: str
    secret: Literal[False] = False
    reason: str = Field(min_length=1)
    from_: tuple[str, ...] = Field(default=(), alias="from")
    safe: str | None = None
    lock: Literal["free", "approval", "locked"] = "free"
    order: tuple[str, ...] = ()
    store: str | None = None


PLAIN = ("value", "from", "safe", "order")
"""Keys that name values."""


def _without_plain(schema: JsonObject) -> None:
    for name in PLAIN:
        schema["properties"].pop(name)
    schema["required"] = ["secret", "value_from", "reason"]


class SecretDeclaration(Model):
    """What a file says of a secret gate. The keys that name values are known only so that it can be said why not."""

    model_config = ConfigDict(json_schema_extra=_without_plain)

    secret: bool = False
    value_from: Source | None = None
    reason: str = Field(min_length=1)
    value: str | None = None
    from_: tuple[str, ...] = Field(default=(), alias="from")
    safe: str | None = None
    lock: Literal["free", "approval", "locked"] = "free"
    order: tuple[str, ...] = ()
    store: str | None = None


class GateRetirement(Retirement):
    """What a file says of a gate that is taken out."""

    secret: bool = False
    store: str | None = None


class GateSpec(Model):
    """The row: which table, which key, which value (None is SQL NULL)."""

    table: str
    key: str
    value: str | Sealed | None


class GateRules(Model):
    """What the files say about changing the row."""

    store: GateStore
    from_: tuple[str, ...] = Field(default=(), alias="from")
    safe: str | None = None
    lock: Literal["free", "approval", "locked"] = "free"
    order: tuple[str, ...] = ()
    reason: str


class SecretRules(GateRules):
    """The same for a secret gate. `value_from` is None for one that is retired."""

    secret: Literal[True] = True
    value_from: Source | None = None


class Gate(Kind[GateDeclaration | SecretDeclaration, GateSpec, GateRules]):
    """Reads, compares and sets gates."""

    name = "gate"
    section = "gates"
    order = 20
    Declaration = GateDeclaration
    Retirement = GateRetirement
    Spec = GateSpec
    Rules = GateRules

    def forms(self) -> tuple[type[GateDeclaration | SecretDeclaration], ...]:
        """Two."""
        return GateDeclaration, SecretDeclaration

    def form(self, data: Json) -> type[GateDeclaration | SecretDeclaration]:
        """What says `secret`, or where a value is from, is meant as a secret."""
        keys = cast("JsonObject", data) if isinstance(data, dict) else {}
        plain = keys.get("secret", False) is False and "value_from" not in keys
        return GateDeclaration if plain else SecretDeclaration

    def declare(
        self, name: str, declaration: GateDeclaration | SecretDeclaration, context: Context
    ) -> tuple[GateSpec | None, GateRules | None, list[Complaint | Problem]]:
        """Find the store and refuse what can never be right: an armed locked gate, a value outside its own order."""
        store, problem = _store(declaration.store, context)
        if isinstance(declaration, SecretDeclaration):
            return _secret(name, declaration, store, [] if store else [problem], context)
        problems: list[Complaint | Problem] = [] if store else [problem]
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
        if retirement.secret and (complaint := _readable_otherwise(store, context)):
            return None, None, [complaint]
        form = SecretRules if retirement.secret else GateRules
        return Absent(retire=retirement.retire), form(store=store, reason=retirement.retire), []

    def look(
        self,
        conn: pg.Connection,
        wanted: Sequence[Declared],
        desired: Desired,
        allow_functions: Sequence[str],
        *,
        widely: bool = False,
    ) -> JsonObject:
        """One query per store: the declared keys, and the keys in scope that nobody declared, without their values."""
        sealing = secrets.key()
        stores: list[JsonObject] = []
        for name, store in _stores(wanted, desired).items():
            here = [item for item in wanted if isinstance(item.rules, GateRules) and item.rules.store == store]
            secret = {item.name for item in here if isinstance(item.rules, SecretRules)}
            declared = {
                item.name: _texts(item.spec, item.rules)
                if isinstance(item.spec, GateSpec) and isinstance(item.rules, GateRules)
                else ()
                for item in here
                # Without the key nothing of a secret gate is read: then nobody has to be able to.
                if sealing or item.name not in secret
            }
            patterns = [entry.matching for entry in desired.scope.gates if entry.store == name]
            seen: JsonObject = {"store": store.dump(), "keys": sorted(declared), "scope": patterns, "rows": []}
            stores.append(seen)
            if not declared and not patterns:
                continue
            kind = seen["type"] = _value_type(conn, name, store)
            seen["forms"] = {key: _stored_as(conn, store, key, texts, kind) for key, texts in declared.items()}
            for row in _rows(conn, name, store, sorted(declared)):
                value: str | Sealed | None = row["value"]
                if sealing and isinstance(value, str) and row["key"] in secret:
                    conn.unspoken.add(value)
                    value = sealing.seal(f"{self.name}.{row['key']}", store.table, value)
                seen["rows"].append({**row, "value": value.dump() if isinstance(value, Sealed) else value})
            if len(seen["rows"]) != len({row["key"] for row in seen["rows"]}):
                keys = [row["key"] for row in seen["rows"]]
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ServerProblem(
                    f"gate store {name}: {store.table} holds {twice} twice, whatever its index says.",
                    hint="REINDEX the table and find out which row is right.",
                )
            if patterns:
                most = MOST_KEYS if widely else MOST_FINDINGS
                seen["others"] = _others(conn, name, seen, sorted({*declared, *secret}), most)
        retired = [item for item in wanted if isinstance(item.spec, Absent)]
        there = {row["key"] for seen in stores for row in seen["rows"]}
        mentions = {item.name: mentioned(conn, item.name, retired) for item in retired if item.name in there}
        return {"stores": stores, "retired": mentions, "secrets": sealing is not None}

    def found(self, seen: JsonObject, wanted: Sequence[Declared], desired: Desired) -> Reading:
        """Row by row, with what the column makes of each declared text."""
        items: dict[str, Model] = {}
        facts: dict[str, JsonObject] = {}
        findings: list[Finding] = []
        looks = {canonical(look["store"]): look for look in seen["stores"]}
        for name, store in _stores(wanted, desired).items():
            here = [item for item in wanted if isinstance(item.rules, GateRules) and item.rules.store == store]
            look: JsonObject = looks.get(canonical(store.dump()), {"keys": [], "scope": [], "rows": []})
            rows = {row["key"]: row for row in look["rows"]}
            for item in here:
                facts[item.address] = _fact(item, look, secrets_read=seen["secrets"])
                if item.name in rows:
                    row = rows[item.name]
                    items[item.address] = self.load({"table": store.table, "key": item.name, "value": row["value"]})
                    facts[item.address] |= {"xmin": row["xmin"], "updated_at": row["updated_at"]}
            patterns = [entry.matching for entry in desired.scope.gates if entry.store == name]
            if patterns and "others" in look:
                findings += _undeclared(store, look["others"], {item.name for item in here}, patterns)
        for item in wanted:
            if not isinstance(item.spec, Absent) or item.address not in items:
                continue
            if item.name not in seen["retired"]:
                facts[item.address] |= UNSEEN
                continue
            findings += [
                Finding(
                    code="mentioned", address=item.address, message=f"{who} still names {item.name}, which is retired"
                )
                for who in seen["retired"][item.name]
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
        secret = isinstance(rules, SecretRules)
        for spec in (before, after):
            if spec is not None and spec.value is not None and secret != _sealed(spec):
                raise TypeError("a secret gate has no value here, and another one no HMAC")
        # Its places in the statement: the new value first, then the one that is there.
        old: sql.Composable = sql.SQL("$1" if after is None else "$2")
        new: sql.Composable = sql.SQL("$1")
        if not secret:
            old, new = (sql.Literal(spec.value if spec else None) for spec in (before, after))
        if after is None:
            return () if before is None else (complete(_delete(before, store, old)),)
        if before is None:
            columns: dict[str, sql.Composable] = {
                store.key: sql.Literal(after.key),
                store.value: new,
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
                new,
                touch,
                _holds(before, store, old),
            )
        return (complete(statement),)

    def hazards(self, before: GateSpec | None, after: GateSpec | None, rules: GateRules) -> set[Hazard]:
        """`moves_from_safe` when the row leaves its safe value, `arms_gate` when it is guarded.

        Which value of a secret gate is safe nobody can say: each new one of a guarded gate arms it.
        """
        if after is not None and _sealed(after):
            return {"arms_gate"} if rules.lock != "free" else set()
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
        if _sealed(before):
            raise ValueError(
                "its value is a secret, of which only an HMAC was kept; declare the value that it should have"
            )
        order = rules.order
        if after is not None and before.value in order and after["value"] in order:
            raise ValueError(f"`order` says that it never moves back from {after['value']!r} to {before.value!r}")
        if before.value is None:
            raise ValueError("it was NULL, which no gate can be set to")
        allowed = () if after is None else (after["value"],)
        return rules.model_copy(update={"from_": allowed})

    def load_rules(self, rules: Json) -> GateRules:
        """Those of a secret gate say so."""
        form = SecretRules if "secret" in rules else GateRules
        return form.model_validate_json(canonical(rules))

    def bound(self, conn: pg.Connection, change: Change, rules: GateRules) -> tuple[str, ...]:
        """The new value, from where the files say, and the one that is there; each has the HMAC that was approved."""
        if not isinstance(rules, SecretRules):
            return ()
        # The statement before may have left the path of the application.
        pg.run(conn, "SET LOCAL search_path = ''")
        sealing = secrets.key()
        if sealing is None:
            raise UsageError(
                f"{change.address} is a secret, and {secrets.KEY} is not set.", hint="Set it, and apply again."
            )
        found: list[str] = []
        if change.after is not None:
            source = _source(rules)
            text = secrets.value(source, change.address)
            if text is None:
                raise UsageError(f"{change.address}: nobody gives its value: {source} is not there.")
            conn.unspoken.add(text)
            spec = self.load(change.after)
            if sealing.seal(change.address, spec.table, text) != spec.value:
                raise Stale(
                    f"The plan is stale: {source} holds another value for {change.address} than was approved.",
                    hint="Nothing was changed. Plan again, read it, approve it.",
                )
            found.append(text)
        before = None if change.before is None else self.load(change.before)
        if before is not None and before.value is not None:
            rows = _rows(conn, "of a secret", rules.store, [before.key])
            text = rows[0]["value"] if rows else None
            if text is None or sealing.seal(change.address, before.table, text) != before.value:
                raise Stale(
                    f"The plan is stale: {change.address} holds another value than when it was made.",
                    hint="Nothing was changed. Plan again, read it, approve it.",
                )
            conn.unspoken.add(text)
            found.append(text)
        return tuple(found)

    def accept(self, item: Declared, live: GateSpec | None, installed: GateRules, source: str) -> Writing:
        """Its value. Not of a secret, nor where a rule says that it must not hold this one."""
        rules = item.rules
        if not (isinstance(rules, GateRules) and isinstance(item.spec, GateSpec)):
            raise TypeError(item)
        if any(isinstance(one, SecretRules) for one in (rules, installed)):
            raise ValueError("it is a secret: its value stands in no file")
        if "locked" in {rules.lock, installed.lock}:
            raise ValueError("it is locked: it may hold only its safe value, so it can only be put back")
        if live is None:
            return Writing(retired=True)
        if live.value is None or _sealed(live):
            raise ValueError("it is NULL, which no file can say")
        for order in (rules.order, installed.order):
            if live.value in order and item.spec.value in order[order.index(live.value) + 1 :]:
                raise ValueError(f"`order` says that it never moves back from {item.spec.value!r} to {live.value!r}")
        return Writing({"value": live.value})

    def taken(self, item: Declared) -> Declared:
        """With the HMAC of its value, where it is a secret, and both the key and the value are there."""
        sealing = secrets.key()
        if sealing is None or not (isinstance(item.rules, SecretRules) and isinstance(item.spec, GateSpec)):
            return item
        if item.place is not None:
            secrets.apart(Path(item.place.file))
        text = secrets.value(_source(item.rules), item.address)
        if text is None:
            return item
        sealed = sealing.seal(item.address, item.spec.table, text)
        return replace(item, spec=item.spec.model_copy(update={"value": sealed}))

    def guarded(self, desired: Desired, known: Mapping[str, Json]) -> list[str]:
        """There is one key. What the ledger knows as a secret no file calls plain, or reads by other columns."""
        sealing = secrets.key()
        values: list[Json] = [entry["spec"].get("value") for entry in known.values() if entry["kind"] == self.name]
        values += [item.spec.dump().get("value") for item in desired.items.values() if item.kind == self.name]
        keys = {cast("JsonObject", value)["key"] for value in values if isinstance(value, dict)} - {None}
        if sealing is not None and (others := sorted(keys - {sealing.fingerprint})):
            what = f"its fingerprint is {sealing.fingerprint}, theirs {', '.join(others)}"
            return [f"{secrets.KEY} is not the key that the HMACs of the ledger or of the plan were made with ({what})"]
        found: list[str] = []
        for address, entry in known.items():
            if entry["kind"] != self.name or "secret" not in entry["rules"]:
                continue
            item = desired.items.get(address)
            if item is not None and not isinstance(item.rules, SecretRules):
                found.append(f"{address} is a secret by the ledger: write `secret: true` also here")
            store = self.load_rules(entry["rules"]).store
            found += [
                f"gate store {name} reads the table of {address}, which is a secret by the ledger, by other columns"
                for name, other in desired.stores.items()
                if _same_table(other, store) and not _same_columns(other, store)
            ]
        return found

    def hidden(self, desired: Desired, known: Mapping[str, Json]) -> dict[str, Json]:
        """A gate that was plain when it was last applied, and what compares its value."""
        sealing = secrets.key()
        secret = {address for address, item in desired.items.items() if isinstance(item.rules, SecretRules)}
        found: dict[str, Json] = {}
        for address, entry in known.items():
            spec: JsonObject = entry["spec"]
            if address in secret and "secret" not in entry["rules"]:
                value: Json = spec["value"]
                if isinstance(value, str):
                    sealed = sealing.seal(address, spec["table"], value) if sealing else Sealed()
                    value = sealed.dump()
                rules = {name: _unshown(rule) if name in PLAIN else rule for name, rule in entry["rules"].items()}
                found[address] = {**entry, "spec": {**spec, "value": value}, "rules": rules}
            elif f"{self.name}.{spec.get('gate')}" in secret and "equals" in spec:
                found[address] = {**entry, "spec": {**spec, "equals": HIDDEN, "declared": HIDDEN}}
        return found

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


def _holds(before: GateSpec, store: GateStore, value: sql.Composable) -> sql.Composed:
    """The condition that finds the row only while it holds this value.

    The operator by its schema: one of another schema that fits the column types better must not stand in.
    """
    old = sql.SQL("IS NULL")
    if before.value is not None:
        old = sql.SQL("OPERATOR(pg_catalog.=) {}").format(value)
    return sql.SQL("{} OPERATOR(pg_catalog.=) {} AND {} {}").format(
        sql.Identifier(store.key), sql.Literal(before.key), sql.Identifier(store.value), old
    )


def _delete(before: GateSpec, store: GateStore, value: sql.Composable) -> sql.Composed:
    return sql.SQL("DELETE FROM {} WHERE {}").format(identifier(before.table), _holds(before, store, value))


def _texts(spec: GateSpec, rules: GateRules) -> tuple[str, ...]:
    """Every text that is compared with the stored one."""
    given = (spec.value, rules.safe, *rules.from_, *rules.order)
    return tuple(dict.fromkeys(text for text in given if isinstance(text, str)))


HIDDEN = "(a secret)"


def _sealed(spec: GateSpec) -> bool:
    return isinstance(spec.value, Sealed)


def _unshown(rule: Json) -> Json:
    """A rule of a gate that is a secret now, without the values that it names."""
    if isinstance(rule, list):
        return [HIDDEN] if rule else []
    return rule and HIDDEN


def _secret(
    name: str, declaration: SecretDeclaration, store: GateStore | None, problems: list[Complaint], context: Context
) -> tuple[GateSpec | None, SecretRules | None, list[Complaint | Problem]]:
    """What holds of a gate whose value stands in no file: nor does any other value that it may, or must, hold."""
    problems = list(problems)
    if not declaration.secret:
        problems.append(Complaint(("value_from",), "`value_from` is for secrets: write `secret: true` beside it"))
    elif declaration.value is not None:
        problems.append(Complaint(("value",), "the value of a secret stands in no file: write `value_from` instead"))
    elif declaration.value_from is None:
        problems.append(Complaint(("secret",), "a secret gate needs `value_from`: {env: NAME} or {file: PATH}"))
    given = {"from": declaration.from_, "safe": declaration.safe, "order": declaration.order}
    problems += [
        Complaint((key,), f"a secret gate has no `{key}`: it would name values, and those of a secret stand in no file")
        for key, rule in given.items()
        if rule
    ]
    if declaration.lock == "locked":
        problems.append(Complaint(("lock",), "a secret gate cannot be locked: it would need `safe`, a value in a file"))
    if store is not None and (complaint := _readable_otherwise(store, context)):
        problems.append(complaint)
    if problems or store is None:
        return None, None, list(problems)
    rules = SecretRules(
        store=store, lock=declaration.lock, reason=declaration.reason, value_from=declaration.value_from
    )
    return GateSpec(table=store.table, key=name, value=Sealed()), rules, []


def _readable_otherwise(store: GateStore, context: Context) -> Complaint | None:
    """A column that is shown must not be the one that holds secrets."""
    shown = {store.key, store.description, store.updated_at}
    others = [name for name, other in context.stores.items() if _same_table(other, store)]
    if store.value in shown or not all(_same_columns(context.stores[name], store) for name in others):
        what = f"the columns of {store.table}: no other may be its `value`, nor in another gate store"
        return Complaint(("secret",), f"a secret needs a store that says one thing of {what}")
    return None


def _same_table(one: GateStore, other: GateStore) -> bool:
    return relation(one.table) == relation(other.table)


def _same_columns(one: GateStore, other: GateStore) -> bool:
    return (one.key, one.value, one.description, one.updated_at) == (
        other.key,
        other.value,
        other.description,
        other.updated_at,
    )


def _source(rules: Model) -> Source:
    """Where the value comes from. Raises TypeError for a gate that has none."""
    if not isinstance(rules, SecretRules) or rules.value_from is None:
        raise TypeError(rules)
    return rules.value_from


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


def _others(conn: pg.Connection, name: str, look: JsonObject, keys: Sequence[str], most: int) -> JsonObject:
    """Keys in scope that no file declares: the first by name, and how many there are."""
    store, patterns = GateStore.model_validate_json(canonical(look["store"])), look["scope"]
    query = sql.SQL(
        "SELECT pg_catalog.left({key}::pg_catalog.text, {longest}) AS key, pg_catalog.count(*) OVER () AS found"
        " FROM {table} WHERE {key}::pg_catalog.text ~ ANY (%s::pg_catalog.text[])"
        " AND {key}::pg_catalog.text <> ALL (%s::pg_catalog.text[]) ORDER BY 1 LIMIT {most}"
    ).format(
        key=sql.Identifier(store.key),
        longest=sql.Literal(LONGEST),
        table=identifier(store.table),
        most=sql.Literal(most),
    )
    globs = [glob_regex(pattern) for pattern in patterns]
    rows = pg.rows(conn, query, (globs, list(keys)), doing=f"reading gate store {name} ({store.table})")
    return {"keys": [row["key"] for row in rows], "found": rows[0]["found"] if rows else 0}


def _undeclared(store: GateStore, others: JsonObject, declared: set[str], patterns: Sequence[str]) -> list[Finding]:
    """A finding for each of the first hundred, and one for the rest."""
    scope = _matching(patterns)
    left = [key for key in others["keys"] if key not in declared and scope(key)]
    findings = [
        Finding(
            code="undeclared",
            address=f"gate.{key}",
            message=f"key {key} in {store.table} is in scope but no file declares it",
        )
        for key in left[:MOST_FINDINGS]
    ]
    more = len(left) - len(findings) + others["found"] - len(others["keys"])
    if more:
        message = f"{more} more keys of {store.table} are in scope but no file declares them"
        findings.append(Finding(code="undeclared", address=f"gate.{store.table}", message=message))
    return findings


def _matching(patterns: Sequence[str]) -> Callable[[str], bool]:
    globs = [re.compile(glob_regex(pattern), re.DOTALL) for pattern in patterns]
    return lambda key: any(glob.fullmatch(key) for glob in globs)


def _fact(item: Declared, look: JsonObject, *, secrets_read: bool) -> JsonObject:
    """What the column makes of its texts, or what is missing to say what the gate holds."""
    if isinstance(item.rules, SecretRules) and not secrets_read:
        return {"not_judged": secrets.KEY}
    if not _seen(item, look):
        return dict(UNSEEN)
    found: JsonObject = {"stored_as": look["forms"].get(item.name, {})}
    unread = isinstance(item.spec, GateSpec) and item.spec.value == Sealed()
    return found | ({"not_judged": str(_source(item.rules))} if unread else {})


def _seen(item: Declared, look: JsonObject) -> bool:
    """Does the look tell what this gate holds, and what its column makes of every text that is compared with that?"""
    known = look.get("forms", {}).get(item.name)
    if known is None:
        others: JsonObject = look.get("others", {"keys": [], "found": 0})
        all_known = others["found"] == len(others["keys"]) and _matching(look["scope"])(item.name)
        if not all_known or item.name[:LONGEST] in others["keys"]:
            return False
    if look["type"] == "text" or not (isinstance(item.spec, GateSpec) and isinstance(item.rules, GateRules)):
        return True
    return set(_texts(item.spec, item.rules)) <= set(known or ())


KIND = Gate()
