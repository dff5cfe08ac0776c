"""Kind `marker`: one row that stands for an executor. A missing one may be inserted; it is never touched again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from psycopg import sql
from pydantic import Field

from reconciler import pg
from reconciler.allowlist import check_expression, check_query
from reconciler.errors import MissingPrivilege
from reconciler.kinds import UNSEEN, Blocked, Bystander, Kind, Reading, Retirement, Wanted, Writing
from reconciler.model import (
    Absent,
    Change,
    Declared,
    Desired,
    Duration,
    Finding,
    Hazard,
    Json,
    JsonObject,
    Lock,
    Model,
    Need,
    Statement,
    milliseconds,
)
from reconciler.parts import (
    QUERY_TIMEOUT_MS,
    Complaint,
    Context,
    complete,
    hidden_needs,
    hold,
    hold_row,
    identifier,
    own_relation,
    raw,
    relation,
    row_lock,
    single_value,
    table,
    table_lock,
    unreadable,
    write_needs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler.errors import Problem


HIDDEN = "(hidden; --show-values)"


class Bind(Model):
    """A column that a query fills. `approve: value`: the approver reads it; `query`: any single value will do."""

    query: str
    approve: Literal["value", "query"] = "value"


class BindRef(Model):
    """An argument that takes the value of a bind."""

    bind: str


class Via(Model):
    """The function that inserts the row; its arguments by name."""

    function: str
    args: dict[str, str | BindRef] = {}


class Fresh(Model):
    """How old the row may be before it is a finding."""

    column: str
    within: Duration


class MarkerDeclaration(Model):
    """What a file says of one marker."""

    table: str
    key: dict[str, str] = Field(min_length=1)
    bind: dict[str, Bind] = {}
    values: dict[str, str] = {}
    via: Via | None = None
    passive_while: str | None = None
    fresh: Fresh | None = None


class MarkerSpec(Model):
    """The row: its key, and the declared columns as text in the server's own form (None is SQL NULL).

    Read from a database, `columns` is what the row holds. Wanted for an insert, it holds the declared values and the
    bound ones; a column of `queries` takes the value its query has when the row is inserted.
    """

    table: str
    key: dict[str, str]
    columns: dict[str, str | None]
    queries: dict[str, str] = {}


class MarkerRules(Model):
    """How the row is made and watched. `via_types`: argument types of the function, when the files declare it too."""

    bind: dict[str, Bind] = {}
    via: Via | None = None
    via_types: dict[str, str] | None = None
    passive_while: str | None = None
    fresh: Fresh | None = None


class Marker(Kind[MarkerDeclaration, MarkerSpec, MarkerRules]):
    """Reads markers, and inserts missing ones. It never writes a beat (DESIGN rule 10)."""

    name = "marker"
    section = "markers"
    order = 30
    ours = False
    Declaration = MarkerDeclaration
    Spec = MarkerSpec
    Rules = MarkerRules

    def declare(
        self, name: str, declaration: MarkerDeclaration, context: Context
    ) -> tuple[MarkerSpec | None, MarkerRules | None, list[Complaint | Problem]]:
        """Check names, and every query against the allowlist for declared queries."""
        problems: list[Complaint | Problem] = []
        for path, text, known in (
            (("table",), declaration.table, own_relation),
            (("via", "function"), declaration.via.function if declaration.via else None, relation),
        ):
            try:
                if text is not None:
                    known(text)
            except ValueError as error:
                problems.append(Complaint(path, str(error)))
        allowed = context.policy.allow_functions
        for column, bind in declaration.bind.items():
            report = check_query(bind.query, allowed)
            problems += [Complaint(("bind", column, "query"), trouble.message) for trouble in report.troubles]
            if column in declaration.values:
                problems.append(Complaint(("values", column), "stands in `bind` too; a column has one source"))
        for argument, value in (declaration.via.args if declaration.via else {}).items():
            if isinstance(value, BindRef) and value.bind not in declaration.bind:
                problems.append(Complaint(("via", "args", argument), f"`bind` has no {value.bind!r}"))
        if declaration.passive_while is not None:
            troubles = check_expression(declaration.passive_while, allowed)
            problems += [Complaint(("passive_while",), trouble.message) for trouble in troubles]
        if problems:
            return None, None, problems
        spec = MarkerSpec(table=declaration.table, key=declaration.key, columns=dict(declaration.values))
        rules = MarkerRules(
            bind=declaration.bind,
            via=declaration.via,
            via_types=_declared_types(declaration.via, context) if declaration.via else None,
            passive_while=declaration.passive_while,
            fresh=declaration.fresh,
        )
        return spec, rules, []

    def retire(
        self, name: str, retirement: Retirement, context: Context
    ) -> tuple[Absent | None, MarkerRules | None, list[Complaint]]:
        """Not from the files: a marker belongs to its executor."""
        message = "a marker belongs to its executor; only `reconciler revert` takes one away, while nobody ticked it"
        return None, None, [Complaint(("retire",), message)]

    def removable(self, live: MarkerSpec, rules: MarkerRules, facts: Mapping[str, Json]) -> None:
        """A marker that somebody ticked, or of which nobody can say that, is left alone."""
        if not facts["passive"]:
            why = (
                f"`passive_while: {rules.passive_while}` does not hold"
                if rules.passive_while
                else "it has no `passive_while`"
            )
            raise Blocked(f"it belongs to its executor now ({why}), so it is not taken away")

    def look(
        self,
        conn: pg.Connection,
        wanted: Sequence[Declared],
        desired: Desired,
        allow_functions: Sequence[str],
        *,
        widely: bool = False,
    ) -> JsonObject:
        """Each declared row; the binds only where the row is missing; how many others there are in scope."""
        rows: dict[str, JsonObject] = {}
        known: dict[str, tuple[list[str], list[tuple[str, ...]]]] = {}
        for item in wanted:
            spec, rules = _declared(item)
            if spec is None or rules is None:
                continue
            refused = _refused(rules, allow_functions)
            row, expected = _row(conn, item.address, spec, rules, passive="passive_while" not in refused)
            key = list(spec.key)
            known.setdefault(spec.table, (key, []))[1].append(tuple(spec.key[column] for column in key))
            if widely and row is not None:
                row = _without_values(row, expected)
            seen = rows[item.address] = {"of": _essentials(item), "row": row, "expected": expected, "refused": refused}
            if row is None and not isinstance(item.spec, Absent):
                seen["binds"] = {
                    column: {"error": refused[column]}
                    if column in refused
                    # A snapshot goes where the answers of queries must not.
                    else _UNBOUND
                    if widely and bind.approve == "value"
                    else _bound(conn, item.address, column, bind)
                    for column, bind in rules.bind.items()
                }
                seen["via"] = _live_types(conn, rules.via)
        tables = {entry.table for entry in desired.scope.markers}
        return {"rows": rows, "others": {place: _others(conn, place, *known.get(place, ([], []))) for place in tables}}

    def found(self, seen: JsonObject, wanted: Sequence[Declared], desired: Desired) -> Reading:
        """What an earlier look tells of a marker holds while its declaration is the same."""
        items: dict[str, Model] = {}
        facts: dict[str, dict[str, Json]] = {}
        findings: list[Finding] = []
        for item in wanted:
            spec, rules = _declared(item)
            if spec is None or rules is None:
                continue
            look = seen["rows"].get(item.address)
            if look is None or look["of"] != _essentials(item):
                facts[item.address] = dict(UNSEEN)
                continue
            row, expected = look["row"], look["expected"]
            if row is None and isinstance(item.spec, Absent):
                continue
            if row is None:
                facts[item.address] = {"binds": look["binds"], "expected": expected, "via": look["via"]}
                if _UNBOUND in look["binds"].values():
                    facts[item.address] |= UNSEEN
                continue
            if "passive_while" in look["refused"]:
                message = f"passive_while {look['refused']['passive_while']}"
                findings.append(Finding(code="marker_differs", address=item.address, message=message))
            items[item.address] = MarkerSpec(table=spec.table, key=spec.key, columns=row["columns"])
            facts[item.address] = {"xmin": row["xmin"], "expected": expected, "passive": row["passive"]}
            facts[item.address] |= _age(rules, row)
            if not isinstance(item.spec, Absent):
                findings += _watch(item.address, rules, row, expected)
        for entry in desired.scope.markers:
            findings += _undeclared(entry.table, seen["others"].get(entry.table, 0))
        return Reading(items, facts, findings)

    def bystanders(self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired) -> dict[str, Bystander]:
        """Every row of a table in scope: a row belongs to its executor, declared or not."""
        found: dict[str, Bystander] = {}
        for place in sorted({entry.table for entry in desired.scope.markers}):
            declared = [
                (item.address, spec)
                for item in wanted
                if isinstance(spec := item.spec, MarkerSpec) and spec.table == place
            ]
            if not declared:
                continue  # as in `read`: nobody says what its key is
            columns = list(declared[0][1].key)
            addresses = _rows_of_stores(desired, place, columns)
            addresses |= {tuple(spec.key.get(column) for column in columns): address for address, spec in declared}
            texts = sql.SQL(", ").join(sql.SQL("{}::pg_catalog.text").format(sql.Identifier(name)) for name in columns)
            query = sql.SQL("SELECT ARRAY[{}] AS key, xmin::pg_catalog.text AS xmin FROM {}")
            for row in pg.rows(conn, query.format(texts, identifier(place)), doing=f"reading {place}"):
                address = addresses.get(tuple(row["key"]))
                name = address or f"row {', '.join(map(str, row['key']))} of {place}"
                found[name] = Bystander(row["xmin"], place)
        return found

    def decide(
        self, spec: MarkerSpec, rules: MarkerRules, live: MarkerSpec | None, facts: Mapping[str, Json]
    ) -> Wanted | None:
        """A row that exists satisfies its marker for ever. A missing one needs exactly one value from each bind."""
        if live is not None:
            return None
        columns: dict[str, str | None] = dict(facts["expected"])
        queries: dict[str, str] = {}
        for column, bind in rules.bind.items():
            found: Mapping[str, Json] = facts["binds"][column]
            if found.get("error"):
                raise Blocked(f"the query bound to {column} {found['error']}")
            if bind.approve == "value":
                columns[column] = found["value"]
            else:
                queries[column] = bind.query
        wanted = MarkerSpec(table=spec.table, key=spec.key, columns=columns, queries=queries)
        return Wanted(wanted, None if rules.via is None else {"types": _types(rules.via, rules, facts["via"])})

    def render(
        self, before: MarkerSpec | None, after: MarkerSpec | None, rules: MarkerRules, context: JsonObject | None
    ) -> tuple[Statement, ...]:
        """One plain INSERT, or one call of the declared function; sorted, so that order in a file means nothing."""
        if after is None:
            return () if before is None else (complete(_delete(before, rules)),)
        if before is not None:
            return ()

        def value(column: str) -> sql.Composable:
            if column in after.queries:
                return sql.SQL("({})").format(raw(after.queries[column]))
            return sql.Literal(after.columns[column])

        if rules.via is None:
            columns: dict[str, sql.Composable] = {name: sql.Literal(text) for name, text in sorted(after.key.items())}
            columns |= {name: value(name) for name in sorted({*after.columns, *after.queries} - set(after.key))}
            statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                identifier(after.table),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join(columns.values()),
            )
        else:
            types: Mapping[str, str] = (context or {})["types"]
            # Every argument with its type: otherwise an overload that somebody adds could be called in its place.
            args = [
                sql.SQL("{} => {}::{}").format(
                    sql.Identifier(name),
                    value(given.bind) if isinstance(given, BindRef) else sql.Literal(given),
                    raw(types[name]),
                )
                for name, given in sorted(rules.via.args.items())
            ]
            statement = sql.SQL("SELECT {}({})").format(identifier(rules.via.function), sql.SQL(", ").join(args))
        return (complete(statement),)

    def hazards(self, before: MarkerSpec | None, after: MarkerSpec | None, rules: MarkerRules) -> set[Hazard]:
        """None: a marker arms nothing."""
        return set()

    def lock(
        self,
        conn: pg.Connection,
        change: Change,
        before: MarkerSpec | None,
        rules: MarkerRules,
        ready: Callable[[], None],
    ) -> None:
        """Keep triggers from being added to the table. No row: a rival's insert of the same key makes ours fail."""
        ready()
        if before is not None:
            hold(conn, before.table, change.address)
            ready()
            hold_row(conn, before.table, _where(before.key), change)
        elif rules.via is None and change.after is not None:
            hold(conn, change.after["table"], change.address)

    def locks(self, change: Change, rules: MarkerRules) -> tuple[Lock, ...]:
        """The table as writing does, and the row."""
        row = change.before or change.after or {}
        return (table_lock(change.address, row["table"]), row_lock(change, row["table"], row["key"]))

    def needs(self, change: Change, rules: MarkerRules) -> tuple[Need, ...]:
        """To read what is bound, and to write the row or to call the function that does."""
        if change.after is None:
            return write_needs(change)
        read = {name for bind in rules.bind.values() for name in check_query(bind.query).relations}
        found = hidden_needs(change.address, sorted(read))
        if rules.via is None:
            return (*write_needs(change), *found)
        call = Need(privilege="EXECUTE", on="function", name=rules.via.function, addresses=(change.address,))
        return (call, *found)

    def settled(self, after: MarkerSpec, live: MarkerSpec | None) -> bool:
        """The row is there and its declared columns hold what was approved."""
        if live is None:
            return False
        return all(live.columns.get(column) == value for column, value in after.columns.items())

    def essence(self, live: MarkerSpec) -> MarkerSpec:
        """That the row exists: what it holds belongs to the executor once it ticks."""
        return MarkerSpec(table=live.table, key=live.key, columns={})

    def accept(self, item: Declared, live: MarkerSpec | None, installed: MarkerRules, source: str) -> Writing:
        """Never: all that can drift is that the row is gone, and no file takes a marker away."""
        raise ValueError(
            "a marker cannot be retired by the files; have it inserted again, or take it out of them (`forget`)"
        )

    def masked(self, after: MarkerSpec, rules: MarkerRules) -> MarkerSpec:
        """No bound values: they come from a query, and what a planner may read a pull request could print.

        Not even their digest, which gives away a short value to whoever tries them all.
        """
        shown = {column: HIDDEN if column in rules.bind else value for column, value in after.columns.items()}
        return MarkerSpec(table=after.table, key=after.key, columns=shown, queries=after.queries)


_UNBOUND: JsonObject = {"unseen": True}
"""In the place of a bound value that nobody looked up."""


def _declared(item: Declared) -> tuple[MarkerSpec | None, MarkerRules | None]:
    """The row that is meant, also of what is retired; and its rules."""
    spec, rules = item.spec, item.rules
    if isinstance(spec, Absent):
        spec = MarkerSpec(table=(spec.at or {})["table"], key=(spec.at or {})["key"], columns={})
    return (spec, rules) if isinstance(spec, MarkerSpec) and isinstance(rules, MarkerRules) else (None, None)


def _essentials(item: Declared) -> JsonObject:
    """All that the queries of a look are made of, and the types of `via` that the files themselves say."""
    return item.dump()


def _delete(before: MarkerSpec, rules: MarkerRules) -> sql.Composed:
    """Only while nobody ticked: the row is locked, the condition stands all the same."""
    passive = raw(rules.passive_while) if rules.passive_while else sql.SQL("false")
    return sql.SQL("DELETE FROM {} WHERE {} AND ({})").format(identifier(before.table), _where(before.key), passive)


def _rows_of_stores(desired: Desired, place: str, columns: Sequence[str]) -> dict[tuple[str | None, ...], str]:
    """Rows that are declared as something else: a table may be a gate store as well."""
    return {
        (item.name,): item.address
        for item in desired.items.values()
        if (store := getattr(item.rules, "store", None)) is not None
        and (store.table, [store.key]) == (place, list(columns))
    }


def _declared_types(via: Via, context: Context) -> dict[str, str] | None:
    """Argument types by name of the one function of this name that the files declare; None when they do not."""
    wanted = relation(via.function)
    found = [
        spec
        for item in context.items.values()
        if item.kind == "function" and ((spec := item.spec.dump())["schema_name"], spec["name"]) == wanted
    ]
    return {arg["name"]: arg["type"] for arg in found[0]["args"] if arg["name"]} if len(found) == 1 else None


def _live_types(conn: pg.Connection, via: Via | None) -> list[dict[str, str]]:
    """Argument types by name of every function of this name that is there."""
    if via is None:
        return []
    rows = pg.rows(
        conn,
        """
        SELECT (SELECT pg_catalog.jsonb_object_agg(u.name, pg_catalog.format_type(u.type, NULL))
                  FROM ROWS FROM (pg_catalog.unnest(p.proargnames),
                                  pg_catalog.unnest(coalesce(p.proallargtypes, p.proargtypes::pg_catalog.oid[])))
                       AS u (name, type)
                 WHERE u.name <> '') AS types
          FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname = %s AND p.proname = %s
        """,
        relation(via.function),
        doing=f"looking up {via.function}",
    )
    return [row["types"] or {} for row in rows]


def _types(via: Via, rules: MarkerRules, live: Sequence[dict[str, str]]) -> dict[str, str]:
    """The type of each given argument. Raises Blocked when it is not certain which function is meant."""
    if rules.via_types is None and len(live) != 1:
        what = "is not there" if not live else f"is overloaded ({len(live)} functions have this name)"
        raise Blocked(f"{via.function} {what}; declare the function that `via` means")
    types = rules.via_types if rules.via_types is not None else live[0]
    if unknown := sorted(set(via.args) - set(types)):
        raise Blocked(f"{via.function} has no argument {', '.join(unknown)}")
    return {name: types[name] for name in sorted(via.args)}


def _refused(rules: MarkerRules, allow_functions: Sequence[str]) -> dict[str, str]:
    """The queries of the files that the installed policy does not allow: a file may allow itself whatever it likes."""
    sentence = "is not allowed by the installed policy: {}"
    refused: dict[str, str] = {}
    for column, bind in rules.bind.items():
        if troubles := check_query(bind.query, allow_functions).troubles:
            refused[column] = sentence.format(troubles[0].message)
    if rules.passive_while and (troubles := check_expression(rules.passive_while, allow_functions)):
        refused["passive_while"] = sentence.format(troubles[0].message)
    return refused


def _where(key: Mapping[str, str]) -> sql.Composable:
    pairs = [sql.SQL("{} = {}").format(sql.Identifier(column), sql.Literal(value)) for column, value in key.items()]
    return sql.SQL(" AND ").join(pairs)


def _row(
    conn: pg.Connection, address: str, spec: MarkerSpec, rules: MarkerRules, *, passive: bool
) -> tuple[dict[str, Any] | None, dict[str, Json]]:
    """The row (or None), and the declared values in the server's own text form, so that `0` and `00` compare equal."""
    watched = [rules.fresh.column] if rules.fresh else []
    columns = list(dict.fromkeys([*spec.columns, *rules.bind]))
    types = table(conn, spec.table, address, list(spec.key), [*columns, *watched]).columns
    forms = [
        sql.SQL("{}::{}::pg_catalog.text AS {}").format(sql.Literal(value), raw(types[column]), sql.Identifier(column))
        for column, value in spec.columns.items()
    ]
    doing = f"reading {address}"
    expected = pg.rows(conn, sql.SQL("SELECT {}").format(sql.SQL(", ").join(forms)), doing=doing)[0] if forms else {}
    texts = [sql.SQL("{}::pg_catalog.text").format(sql.Identifier(column)) for column in columns]
    query = sql.SQL(
        "SELECT xmin::pg_catalog.text AS xmin, ARRAY[{texts}]::pg_catalog.text[] AS texts, ({passive}) AS passive,"
        " pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - ({fresh}))::pg_catalog.float8 AS age"
        " FROM {table} WHERE {where}"
    ).format(
        texts=sql.SQL(", ").join(texts),
        passive=raw(rules.passive_while) if rules.passive_while and passive else sql.SQL("false"),
        fresh=sql.Identifier(rules.fresh.column) if rules.fresh else sql.SQL("NULL::pg_catalog.timestamptz"),
        table=identifier(spec.table),
        where=_where(spec.key),
    )
    pg.timeout(conn, QUERY_TIMEOUT_MS)
    found = pg.rows(conn, query, doing=doing, quiet=True)
    if not found:
        return None, expected
    row = found[0]
    row["columns"] = dict(zip(columns, row["texts"], strict=True))
    return row, expected


def _without_values(row: Mapping[str, Any], expected: Mapping[str, Json]) -> dict[str, Any]:
    """The row as far as it matters to a plan: is it there, who has it, how old is it, is it as it was declared."""
    columns = {
        column: value if row["columns"][column] == value else f"not {value}" for column, value in expected.items()
    }
    return {"xmin": row["xmin"], "passive": row["passive"], "age": row["age"], "columns": columns}


def _bound(conn: pg.Connection, address: str, column: str, bind: Bind) -> dict[str, Json]:
    """The single value of a bind as text, or what is wrong with the answer. Runs inside the caller's transaction."""
    doing = f"running the query bound to {column} of {address}"
    if missing := unreadable(conn, check_query(bind.query, ()).relations):
        raise MissingPrivilege(f"{doing}: {missing[1]}.", hint="Grant it, or run as a role that has it.")
    value, error = single_value(conn, bind.query, doing)
    return {"value": value} if value is not None else {"error": error}


def _age(rules: MarkerRules, row: Mapping[str, Any]) -> dict[str, Json]:
    """How old the row is and may be, in seconds, where the files say how old it may be."""
    return {} if rules.fresh is None else {"age": row["age"], "within": milliseconds(rules.fresh.within) / 1000}


def _watch(address: str, rules: MarkerRules, row: Mapping[str, Any], expected: Mapping[str, Json]) -> list[Finding]:
    findings: list[Finding] = []
    if row["passive"]:
        differing = sorted(column for column, value in expected.items() if row["columns"][column] != value)
        if differing:
            message = f"the row is still passive but {', '.join(differing)} is not what was declared"
            findings.append(Finding(code="marker_differs", address=address, message=message))
    if rules.fresh and row["age"] is not None and row["age"] * 1000 > milliseconds(rules.fresh.within):
        age = int(row["age"])
        message = f"{rules.fresh.column} is {age} s old; it should be within {rules.fresh.within}"
        findings.append(Finding(code="stale_heartbeat", address=address, message=message))
    return findings


def _others(conn: pg.Connection, name: str, key: Sequence[str], declared: Sequence[tuple[str, ...]]) -> int:
    """How many rows nobody declared. Not their keys: those are data of a table that a stranger's file named."""
    if not key:
        return 0
    texts = sql.SQL(", ").join(sql.SQL("{}::pg_catalog.text").format(sql.Identifier(column)) for column in key)
    rows = [sql.SQL("ROW({})").format(sql.SQL(", ").join(map(sql.Literal, row))) for row in declared]
    query = sql.SQL("SELECT pg_catalog.count(*) AS found FROM {} WHERE ROW({}) NOT IN ({})").format(
        identifier(name), texts, sql.SQL(", ").join(rows)
    )
    return pg.rows(conn, query, doing=f"reading {name}")[0]["found"]


def _undeclared(name: str, found: int) -> list[Finding]:
    if not found:
        return []
    message = f"{found} row{'' if found == 1 else 's'} of {name} in scope that no file declares"
    return [Finding(code="undeclared", address=f"marker.{name}", message=message)]


KIND = Marker()
