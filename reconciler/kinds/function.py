"""Kind `function`: functions and procedures with every attribute, owner, grants and comment."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from psycopg import sql
from pydantic import Field

from reconciler import pg
from reconciler.defaults import canonical_default, split_expressions
from reconciler.errors import Problem, Stale
from reconciler.kinds import UNSEEN, Blocked, Bystander, Kind, Reading, Retirement, Wanted, Writing
from reconciler.model import (
    Absent,
    Change,
    Declared,
    Desired,
    Finding,
    Hazard,
    Json,
    JsonObject,
    Lock,
    Model,
    Need,
    Scope,
    Statement,
    glob_regex,
)
from reconciler.parts import Complaint, Context, complete, mentioned, raw, role_need
from reconciler.sql import (
    Arg,
    Routine,
    check_body,
    dollar_quoted,
    identity,
    parse_identity,
    parse_routine,
    split_identity,
    with_body,
    with_statement,
)
from reconciler.yamltext import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# proconfig of these holds a list of quoted identifiers, not one string (GUC_LIST_QUOTE; pg_dump has the same list).
LIST_SETTINGS = frozenset({
    "local_preload_libraries", "search_path", "session_preload_libraries", "shared_preload_libraries",
    "temp_tablespaces", "unix_socket_directories",
})  # fmt: skip

WAIVABLE = ("pinned_path", "public_execute")


class Grant(Model):
    """EXECUTE for one grantee. `grantee` None is PUBLIC."""

    grantee: str | None
    grantor: str
    grantable: bool = False

    if TYPE_CHECKING:
        # pydantic makes frozen models hashable; type checkers do not know.
        def __hash__(self) -> int: ...


class FunctionDeclaration(Model):
    """What a file says of one function beside its CREATE statement. `execute` is exact; PUBLIC only if named."""

    source: str
    owner: str = Field(min_length=1)
    execute: tuple[str, ...] = ()
    comment: str | None = None
    gates: tuple[str, ...] = ()
    created_under: tuple[str, ...] | None = None
    waive: dict[str, str] = {}


class FunctionSpec(Routine):
    """Everything that is compared."""

    owner: str
    acl: tuple[Grant, ...]
    comment: str | None

    @property
    def identity(self) -> str:
        """As regprocedure prints it under an empty search_path."""
        return identity(self.schema_name, self.name, self.args)


class FunctionRules(Model):
    """What the files say beside the object: the gates it reads, in this order; the path to create it under."""

    gates: tuple[str, ...] = ()
    created_under: tuple[str, ...] | None = None
    waived: tuple[str, ...] = ()
    checked_offline: bool = True


class Function(Kind[FunctionDeclaration, FunctionSpec, FunctionRules]):
    """Reads, compares, creates and changes functions and procedures."""

    name = "function"
    section = "functions"
    order = 10
    Declaration = FunctionDeclaration
    Spec = FunctionSpec
    Rules = FunctionRules

    def declare(
        self, name: str, declaration: FunctionDeclaration, context: Context
    ) -> tuple[FunctionSpec | None, FunctionRules | None, list[Complaint | Problem]]:
        """Read and parse the source file, and hold it against the key, the built-in rules and PL/pgSQL's own parser."""
        problems: list[Complaint | Problem] = []
        canonical, troubles = parse_identity(name)
        problems += [Complaint((), trouble.message) for trouble in troubles]
        if canonical is not None and canonical != name:
            problems.append(Complaint((), f"write the identity as regprocedure prints it: {canonical}"))
        source = context.root / declaration.source
        path = str(source)
        text, unreadable = read_text(source, context.root)
        if text is None:
            return None, None, [*problems, *(Complaint(("source",), str(problem)) for problem in unreadable)]
        routine, troubles = parse_routine(text)
        problems += [Problem(path, trouble.line, trouble.column, trouble.message) for trouble in troubles]
        if routine is None:
            return None, None, problems
        found = identity(routine.schema_name, routine.name, routine.args)
        if canonical is not None and found != canonical:
            problems.append(Complaint((), f"{path} creates {found}, not {canonical}"))
        checked = True
        if routine.language in {"plpgsql", "sql"}:
            troubles, checked = check_body(text)
            problems += [Problem(path, trouble.line, trouble.column, trouble.message) for trouble in troubles]
        problems += _rules(declaration, routine, context)
        if problems:
            return None, None, problems
        owner = declaration.owner
        grantees = {None if role == "PUBLIC" else role for role in declaration.execute} | {owner}
        spec = FunctionSpec(
            **{name: getattr(routine, name) for name in Routine.model_fields},
            owner=owner,
            acl=_sorted(Grant(grantee=grantee, grantor=owner) for grantee in grantees),
            comment=declaration.comment,
        )
        rules = FunctionRules(
            gates=declaration.gates,
            created_under=declaration.created_under,
            waived=tuple(sorted(declaration.waive)),
            checked_offline=checked,
        )
        return spec, rules, []

    def retire(
        self, name: str, retirement: Retirement, context: Context
    ) -> tuple[Absent | None, FunctionRules | None, list[Complaint]]:
        """The identity is all that is needed."""
        canonical, troubles = parse_identity(name)
        problems = [Complaint((), trouble.message) for trouble in troubles]
        if canonical is not None and canonical != name:
            problems.append(Complaint((), f"write the identity as regprocedure prints it: {canonical}"))
        return (None, None, problems) if problems else (Absent(retire=retirement.retire), FunctionRules(), [])

    def removable(self, live: FunctionSpec, rules: FunctionRules, facts: Mapping[str, Json]) -> None:
        """DROP is never CASCADE: what depends on the function must go first."""
        if dependents := facts.get("dependents"):
            raise Blocked(f"it cannot be retired while others depend on it: {', '.join(dependents)}")

    def look(
        self,
        conn: pg.Connection,
        wanted: Sequence[Declared],
        desired: Desired,
        allow_functions: Sequence[str],
        *,
        widely: bool = False,
    ) -> JsonObject:
        """Catalog columns only: the pg_get_* functions show newer text than the snapshot (DESIGN 12)."""
        specs = [item.spec for item in wanted if isinstance(item.spec, FunctionSpec)]
        retired = [item for item in wanted if isinstance(item.spec, Absent)]
        names = [_name(item) for item in wanted]
        rows = _rows(conn, names, desired.scope)
        there = {_spec(row).identity for row in rows} if retired else set[str]()
        return {
            "names": sorted({*names}),
            "scope": [[entry.schema_name, entry.matching] for entry in desired.scope.functions],
            "rows": rows,
            "roles": sorted(_roles(conn, None if widely else specs)),
            "defaults": _default_grants(conn),
            "event_triggers": _event_triggers(conn) if widely or any(self.rewritten(spec) for spec in specs) else None,
            "retired": {
                item.name: {
                    "dependents": _dependents(conn, item, retired),
                    "mentions": mentioned(conn, split_identity(item.name)[1], retired),
                }
                for item in retired
                if item.name in there
            },
        }

    def found(self, seen: JsonObject, wanted: Sequence[Declared], desired: Desired) -> Reading:
        """By identity. Of a function that is retired only now a look made before does not know who depends on it."""
        declared = {item.name: item for item in wanted}
        items: dict[str, Model] = {}
        facts: dict[str, Mapping[str, Json]] = {}
        findings: list[Finding] = []
        in_scope = _Covered([], [(entry.schema_name, entry.matching) for entry in desired.scope.functions])
        for row in seen["rows"]:
            spec = _spec(row)
            address = f"{self.name}.{spec.identity}"
            if spec.identity in declared:
                items[address], known = _as_remembered(spec, row["uses"], desired.remembered.get(address))
                facts[address] = {"xmin": row["xmin"], "comment_xmin": row["comment_xmin"], **known}
            elif not row["extension"] and in_scope.holds(spec.schema_name, spec.name):
                message = f"{row['prokind_word']} {spec.identity} is in scope but no file declares it"
                findings.append(Finding(code="undeclared", address=address, message=message))
        covered = _Covered(seen["names"], seen["scope"])
        for item in declared.values():
            more = self._more(item, seen, there=item.address in items) if covered.holds(*_name(item)) else UNSEEN
            if more:
                facts[item.address] = {**facts.get(item.address, {}), **more}
            if isinstance(item.spec, Absent) and item.address in items and item.name in seen["retired"]:
                findings += [
                    Finding(code="mentioned", address=item.address, message=f"{who} still names it, and it is retired")
                    for who in seen["retired"][item.name]["mentions"]
                    if who != item.name
                ]
        return Reading(items, facts, findings)

    def _more(self, item: Declared, seen: JsonObject, *, there: bool) -> dict[str, Json]:
        """What else must be known to decide about it: roles, default privileges, event triggers; who depends on it."""
        spec = item.spec
        if isinstance(spec, FunctionSpec):
            named = {spec.owner, *(grant.grantee for grant in spec.acl if grant.grantee is not None)}
            found = _defaults_of(spec, seen["defaults"])
            if absent := sorted(named - set(seen["roles"])):
                found["missing_roles"] = absent
            if seen["event_triggers"] and self.rewritten(spec):
                found["event_triggers"] = seen["event_triggers"]
            return found
        if not there:
            return {}
        retired = seen["retired"].get(item.name)
        return dict(UNSEEN) if retired is None else {"dependents": retired["dependents"]}

    def bystanders(self, conn: pg.Connection, wanted: Sequence[Declared], desired: Desired) -> dict[str, Bystander]:
        """The functions in scope that nobody declared, and that are no extension's."""
        declared = {item.name for item in wanted}
        named = [(_spec(row).identity, row) for row in _rows(conn, (), desired.scope) if not row["extension"]]
        return {
            f"{self.name}.{name}": Bystander(row["xmin"], int(row["oid"]))
            for name, row in named
            if name not in declared
        }

    def decide(
        self, spec: FunctionSpec, rules: FunctionRules, live: FunctionSpec | None, facts: Mapping[str, Json]
    ) -> Wanted | None:
        """In sync when every attribute is equal. A change that OR REPLACE cannot make is a drop and a create."""
        if live == spec:
            return None
        if absent := facts.get("missing_roles"):
            raise Blocked(f"role {', '.join(absent)} does not exist in this cluster")
        if meddlers := facts.get("event_triggers"):
            raise Blocked(_meddled(meddlers))
        if live is None:
            return Wanted(spec, _created_with(facts))
        if _needs_replacement(live, spec):
            return Wanted(spec, _created_with(facts), replace=True)
        return Wanted(spec)

    def render(
        self, before: FunctionSpec | None, after: FunctionSpec | None, rules: FunctionRules, context: JsonObject | None
    ) -> tuple[Statement, ...]:
        """Create or change with every attribute written out: OR REPLACE silently resets what it is not told."""
        if after is None:
            drop = sql.SQL("DROP ROUTINE {}")
            return () if before is None else (complete(drop.format(raw(before.identity)), before.owner),)
        name = raw(after.identity)
        statements: list[Statement] = []
        if before is None or _needs_replacement(before, after):
            if before is not None:
                if before.owner != after.owner:
                    statements.append(complete(_owned_by(name, after.owner)))
                statements.append(complete(sql.SQL("DROP ROUTINE {}").format(name), after.owner))
            statements.append(complete(_create(after, replace=False), after.owner))
            # A grant option that is wanted is given, for the one that is there may be none.
            acl = _initial_acl(after.owner, context or {}) - {grant for grant in after.acl if grant.grantable}
            comment = None
        else:
            acl = set(before.acl)
            comment = before.comment
            if before.owner != after.owner:
                statements.append(complete(_owned_by(name, after.owner)))
                # ALTER OWNER puts the new owner in the place of the old one, as grantee and as grantor.
                acl = {_reowned(grant, before.owner, after.owner) for grant in acl}
            if _routine(before) != _routine(after):
                statements.append(complete(_create(after, replace=True), after.owner))
        statements += _grants(acl, set(after.acl), name, after.owner)
        if comment != after.comment:
            comment_on = sql.SQL("COMMENT ON ROUTINE {} IS {}").format(name, sql.Literal(after.comment))
            statements.append(complete(comment_on, after.owner))
        return tuple(statements)

    def hazards(self, before: FunctionSpec | None, after: FunctionSpec | None, rules: FunctionRules) -> set[Hazard]:
        """What the new form lets somebody do that the old one did not."""
        if after is None:
            return set()
        found: set[Hazard] = set()
        if after.security_definer and not (before and before.security_definer and before.owner == after.owner):
            found.add("security_definer")
        old = {grant.grantee for grant in before.acl} if before else set[str | None]()
        new = {grant.grantee for grant in after.acl} - old - {after.owner}
        if None in new:
            found.add("grants_public")
        if new - {None}:
            found.add("grants_execute")
        if before and before.owner != after.owner:
            found.add("changes_owner")
        if before and _needs_replacement(before, after):
            found.add("replaces_function")
        return found

    def rewritten(self, spec: FunctionSpec) -> dict[str, Json]:
        """A body in SQL syntax, defaults that are more than constants."""
        parts: dict[str, Json] = {"body": spec.body} if spec.sql_body else {}
        for index, arg in enumerate(spec.args):
            if arg.default is not None and canonical_default(arg.default, arg.type) is None:
                parts[f"default of argument {index + 1}"] = arg.default
        return parts

    def accept(self, item: Declared, live: FunctionSpec | None, installed: FunctionRules, source: str) -> Writing:
        """Owner, grants and comment in the entry, the rest in its file: of a body that differs only the body."""
        if live is None:
            return Writing(retired=True)
        spec = item.spec
        if not isinstance(spec, FunctionSpec):
            raise TypeError(item)
        grantees = {grant.grantee for grant in live.acl}
        plain = {Grant(grantee=grantee, grantor=live.owner) for grantee in grantees}
        if set(live.acl) != plain or live.owner not in grantees:
            raise ValueError(
                "its grants are not ones that `execute` can say: with a grant option, by another grantor than the"
                " owner, or none to the owner"
            )
        keys: dict[str, Json] = {}
        if live.owner != spec.owner:
            keys["owner"] = live.owner
        if grantees - {live.owner} != {grant.grantee for grant in spec.acl} - {spec.owner}:
            names = {"PUBLIC" if grantee is None else grantee for grantee in grantees - {live.owner}}
            keys["execute"] = sorted(names)
        if live.comment != spec.comment:
            keys["comment"] = live.comment
        return Writing(keys, None if _routine(live) == _routine(spec) else _rewritten_file(source, spec, live))

    def learn(self, conn: pg.Connection, after: FunctionSpec) -> Json:
        """The pair of remembered equality (DESIGN 6): what was written, and what the catalog makes of it."""
        written = self.rewritten(after)
        if meddlers := _event_triggers(conn):
            raise Stale(f"{after.identity}: {_meddled(meddlers)}", hint="Nothing was changed.")
        rows = _rows(conn, [(after.schema_name, after.name)], Scope())
        found = next(((live, row["uses"]) for row in rows if (live := _spec(row)).identity == after.identity), None)
        if found is None:
            return None
        live, uses = found
        return {"written": written, "live": _shown(live, written), "uses": uses}

    def lock(
        self,
        conn: pg.Connection,
        change: Change,
        before: FunctionSpec | None,
        rules: FunctionRules,
        ready: Callable[[], None],
    ) -> None:
        """Two ALTERs that write back nothing that was read before (DESIGN 7.4).

        NO DEPENDS ON EXTENSION takes the object lock (COMMENT and DROP wait); RESET of a setting nobody can set takes
        the catalog tuple (REPLACE, ALTER, GRANT and RENAME wait and fail). ssl_renegotiation_limit exists on every
        supported major and has had no effect since 9.5. What is created has nothing to lock but its schema.
        """
        doing = f"locking {change.address}"
        after = None if change.after is None else self.load(change.after)
        if after is not None and (before is None or _needs_replacement(before, after)):
            _hold_schema(conn, after, doing, ready)
        if before is None:
            return
        extension = _free_extension(conn, before, doing)
        name = raw(before.identity)
        # As its owner only if need be: an owner by hand may not even see the schema.
        inherits = "SELECT pg_catalog.pg_has_role(%s::pg_catalog.name, 'USAGE') AS may"
        may = pg.rows(conn, inherits, (before.owner,), doing)[0]["may"]
        removed = _removed_dependencies(conn)
        ready()
        if not may:
            pg.run(conn, sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(before.owner)), doing)
        no_depends = sql.SQL("ALTER ROUTINE {} NO DEPENDS ON EXTENSION {}")
        pg.run(conn, no_depends.format(name, sql.Identifier(extension)), doing)
        pg.run(conn, "SET LOCAL ROLE NONE", doing)
        if _removed_dependencies(conn) != removed:
            raise Stale(
                f"Somebody made {change.address} depend on extension {extension} at the same time.",
                hint="Nothing was changed. Apply again.",
            )
        ready()
        if not may:
            pg.run(conn, sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(before.owner)), doing)
        pg.run(conn, sql.SQL("ALTER ROUTINE {} RESET ssl_renegotiation_limit").format(name), doing)
        pg.run(conn, "SET LOCAL ROLE NONE", doing)

    def locks(self, change: Change, rules: FunctionRules) -> tuple[Lock, ...]:
        """Its row of the catalog and the object; calls take neither. A new one keeps its schema from being dropped."""
        spec = self.load(change.before or change.after)
        mode, waits = "CREATE", "who creates the same function"
        if change.before is not None:
            mode = "ALTER" if change.after is not None else "DROP"
            waits = "nobody who calls it; who alters, replaces, grants, comments or drops it"
        routine = Lock(address=change.address, mode=mode, on="routine", name=spec.identity, waits=waits)
        if change.before is not None and change.actions != ("remove", "add"):
            return (routine,)
        waits, schema = "who drops the schema", spec.schema_name
        return (Lock(address=change.address, mode="ACCESS SHARE", on="schema", name=schema, waits=waits), routine)

    def needs(self, change: Change, rules: FunctionRules) -> tuple[Need, ...]:
        """To become whom its statements run as; and what that one needs of the schema."""
        before = None if change.before is None else self.load(change.before)
        after = None if change.after is None else self.load(change.after)
        spec = after or before
        if spec is None:
            return ()
        at = (change.address,)
        roles = sorted({statement.role for statement in change.statements if statement.role is not None})
        found = [role_need(change.address, "SET", role) for role in roles]
        found += [
            Need(privilege="USAGE", on="schema", name=spec.schema_name, role=role, addresses=at) for role in roles
        ]
        if before is not None and after is not None and before.owner != after.owner:
            # ALTER ... OWNER TO runs as the role that applies, which must then be as good as its owner.
            found.append(role_need(change.address, "USAGE", before.owner))
        if after is not None and (before is None or before.owner != after.owner or _routine(before) != _routine(after)):
            # CREATE OR REPLACE asks for it too, and a new owner must have it.
            need = Need(privilege="CREATE", on="schema", name=after.schema_name, role=after.owner, addresses=at)
            found.append(need)
        return tuple(found)


def _rewritten_file(text: str, spec: FunctionSpec, live: FunctionSpec) -> str:
    """The source file with what is live. Comments around the statement stay, those inside of it only with it."""
    others = _routine(spec) | {"body": live.body} == _routine(live)
    if others and not live.sql_body and live.language != "c":
        return with_body(text, live.body)
    return with_statement(text, f"{_create(live, replace=False).as_string(None)};")


def _shown(live: FunctionSpec, parts: Iterable[str]) -> dict[str, Json]:
    """The same parts as the catalog shows them."""
    defaults = {f"default of argument {index + 1}": arg.default for index, arg in enumerate(live.args)}
    have: dict[str, Json] = {**defaults, "body": live.body}
    return {name: have.get(name) for name in parts}


def _as_remembered(live: FunctionSpec, uses: Json, pair: Json) -> tuple[FunctionSpec, dict[str, Json]]:
    """The live object with what was written in the place of the catalog's texts, for as long as those are the same.

    uses: the objects that it depends on. One text can stand for two meanings: it does not show by which function a cast
    is made, and if a relation is a table or a view.
    """
    if pair is None or (_shown(live, pair["live"]), uses) != (pair["live"], pair.get("uses")):
        return live, {}
    if live.sql_body != ("body" in pair["live"]):
        return live, {}
    written: Mapping[str, Json] = pair["written"]
    args = tuple(
        arg.model_copy(update={"default": written.get(f"default of argument {index + 1}", arg.default)})
        for index, arg in enumerate(live.args)
    )
    return live.model_copy(update={"args": args, "body": written.get("body", live.body)}), {"remembered": pair}


def _event_triggers(conn: pg.Connection) -> list[Json]:
    """The names of those that fire while a function is created and granted: what the catalog shows could be theirs.

    The pair is learned when all statements of the function have run: one that fires at GRANT comes in time.
    """
    return [
        row["name"]
        for row in pg.rows(
            conn,
            """
            SELECT e.evtname::pg_catalog.text AS name FROM pg_catalog.pg_event_trigger e
             WHERE e.evtenabled IN ('O', 'A') AND e.evtevent IN ('ddl_command_start', 'ddl_command_end')
               AND (e.evttags IS NULL OR e.evttags && %s::pg_catalog.text[])
             ORDER BY 1
            """,
            (["CREATE FUNCTION", "CREATE PROCEDURE", "ALTER ROUTINE", "GRANT", "REVOKE", "COMMENT"],),
            doing="reading event triggers",
        )
    ]


def _meddled(names: Sequence[Json]) -> str:
    return (
        f"event trigger {', '.join(map(str, names))} fires when it is created or granted, so nobody could say that what"
        " the catalog then shows is what was written; write the body as a string after AS, and defaults as constants"
    )


def _free_extension(conn: pg.Connection, spec: FunctionSpec, doing: str) -> str:
    """An installed extension that the routine does not depend on by ALTER ROUTINE ... DEPENDS. Raises Stale."""
    found = pg.rows(
        conn,
        """
        SELECT e.extname::pg_catalog.text AS name FROM pg_catalog.pg_extension e
         WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                             JOIN pg_catalog.pg_proc p ON p.oid = d.objid
                             JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
                            WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                              AND d.refobjid = e.oid AND d.deptype = 'x'
                              AND n.nspname = %s AND p.proname = %s)
         ORDER BY e.extname = 'plpgsql' DESC, e.extname LIMIT 1
        """,
        (spec.schema_name, spec.name),
        doing=doing,
    )
    if not found:
        raise Stale(f"{doing}: no installed extension is free to name in the lock statement.")
    return found[0]["name"]


def _removed_dependencies(conn: pg.Connection) -> int:
    """Rows of pg_depend that we have deleted, some in an earlier transaction: only the difference means anything."""
    query = """
        SELECT pg_catalog.sum(n_tup_del)::pg_catalog.int8 AS number FROM pg_catalog.pg_stat_xact_sys_tables
         WHERE relid = 'pg_catalog.pg_depend'::pg_catalog.regclass
    """
    return pg.rows(conn, query)[0]["number"]


def _hold_schema(conn: pg.Connection, spec: FunctionSpec, doing: str, ready: Callable[[], None]) -> None:
    """Keep the schema from being dropped: CREATE FUNCTION does not, and would leave it in no schema (measured).

    CREATE TABLE locks the schema before it looks whether the table is there; with IF NOT EXISTS that is all it does.
    """
    query = """
        SELECT c.oid, c.relname::pg_catalog.text AS name,
               EXISTS (SELECT FROM pg_catalog.pg_locks l
                        WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'object' AND l.objid = n.oid
                          AND l.classid = 'pg_catalog.pg_namespace'::pg_catalog.regclass) AS held
          FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
         WHERE n.nspname = %s ORDER BY c.oid LIMIT 1
    """
    there = pg.rows(conn, query, (spec.schema_name,), doing)
    if not there or there[0]["held"]:
        return  # a schema without any relation cannot be held
    ready()
    pg.run(conn, sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(spec.owner)), doing)
    table = sql.Identifier(spec.schema_name, there[0]["name"])
    pg.run(conn, sql.SQL("CREATE TABLE IF NOT EXISTS {} ()").format(table), doing)
    pg.run(conn, "SET LOCAL ROLE NONE", doing)
    now = pg.rows(conn, query, (spec.schema_name,), doing)
    if [row["oid"] for row in now] != [there[0]["oid"]]:
        raise Stale(f"{doing}: somebody dropped {spec.schema_name}.{there[0]['name']} at the same time.")


def _rules(declaration: FunctionDeclaration, routine: Routine, context: Context) -> list[Complaint | Problem]:
    """The built-in rules, each waivable by name with a reason (DESIGN 4)."""
    problems: list[Complaint | Problem] = []
    for name, reason in declaration.waive.items():
        if name not in WAIVABLE:
            problems.append(Complaint(("waive", name), f"there is no rule {name!r}; rules: {', '.join(WAIVABLE)}"))
        elif not reason.strip():
            problems.append(Complaint(("waive", name), "a waiver needs a reason"))
    tables = {store.table.rpartition(".")[2].strip('"') for store in context.stores.values()}
    reads_gate = bool(declaration.gates) or any(re.search(rf"\b{re.escape(name)}\b", routine.body) for name in tables)
    path = next((setting for setting in routine.config if setting.startswith("search_path=")), None)
    pinned = path is not None and split_list(path.partition("=")[2])[-1:] == ["pg_temp"]
    if (routine.security_definer or reads_gate) and not pinned and "pinned_path" not in declaration.waive:
        what = "SECURITY DEFINER" if routine.security_definer else "a function that reads a gate"
        problems.append(
            Complaint(
                ("source",),
                f"{what} must pin its path with pg_temp last (SET search_path = pg_catalog, public, pg_temp):"
                " a temporary table could otherwise stand in for a real one",
            )
        )
    if "PUBLIC" in declaration.execute and "public_execute" not in declaration.waive:
        problems.append(Complaint(("execute",), "EXECUTE for PUBLIC needs `waive: {public_execute: <reason>}`"))
    if len(set(declaration.execute)) != len(declaration.execute):
        problems.append(Complaint(("execute",), "a role is named twice"))
    return problems


def split_list(value: str) -> list[str]:
    """The names in a stored list setting: `pg_catalog, "My Schema", pg_temp` -> three names, unquoted."""
    parts = re.findall(r'"((?:[^"]|"")*)"|([^,\s"]+)', value)
    return [plain or quoted.replace('""', '"') for quoted, plain in parts]


def _sorted(grants: Iterable[Grant]) -> tuple[Grant, ...]:
    return tuple(sorted(grants, key=lambda grant: (grant.grantee or "", grant.grantee is None, grant.grantor)))


def _routine(spec: FunctionSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in Routine.model_fields}


def _needs_replacement(live: FunctionSpec, spec: FunctionSpec) -> bool:
    """Would CREATE OR REPLACE refuse it? PostgreSQL manual, CREATE FUNCTION, notes."""

    def shape(routine: FunctionSpec) -> list[Any]:
        outputs = [(arg.name, arg.mode, arg.type) for arg in routine.args if arg.mode in {"out", "inout", "table"}]
        return [routine.kind, routine.returns, routine.returns_set, outputs, [arg.mode for arg in routine.args]]

    if shape(live) != shape(spec):
        return True
    pairs = zip(live.args, spec.args, strict=False)
    return any(
        (old.name is not None and old.name != new.name) or (old.default is not None and new.default is None)
        for old, new in pairs
    )


def _create(spec: FunctionSpec, *, replace: bool) -> sql.Composed:
    """The complete CREATE statement; CREATE OR REPLACE only to change what exists."""
    procedure = spec.kind == "procedure"
    clauses: list[sql.Composable] = [sql.SQL("LANGUAGE {}").format(sql.Identifier(spec.language))]
    if spec.transforms:
        transforms = [sql.SQL("FOR TYPE {}").format(raw(name)) for name in spec.transforms]
        clauses.append(sql.SQL("TRANSFORM {}").format(sql.SQL(", ").join(transforms)))
    if spec.kind == "window":
        clauses.append(sql.SQL("WINDOW"))
    if not procedure:
        clauses += [
            raw(spec.volatility.upper()),
            sql.SQL("STRICT" if spec.strict else "CALLED ON NULL INPUT"),
            sql.SQL("LEAKPROOF" if spec.leakproof else "NOT LEAKPROOF"),
            sql.SQL("PARALLEL {}").format(raw(spec.parallel.upper())),
            sql.SQL("COST {}").format(sql.Literal(_number(spec.cost))),
        ]
        if spec.returns_set:
            clauses.append(sql.SQL("ROWS {}").format(sql.Literal(_number(spec.rows))))
        if spec.support:
            clauses.append(sql.SQL("SUPPORT {}").format(raw(spec.support)))
    clauses.append(sql.SQL("SECURITY DEFINER" if spec.security_definer else "SECURITY INVOKER"))
    clauses += [_setting(setting) for setting in spec.config]
    if spec.sql_body:
        clauses.append(raw(spec.body))
    else:
        body = _quoted(spec.body)
        if spec.binary is not None:
            body = sql.SQL("{}, {}").format(sql.Literal(spec.binary), body)
        clauses.append(sql.SQL("AS {}").format(body))
    return sql.SQL("{} {} {}({}){}\n {}").format(
        sql.SQL("CREATE OR REPLACE" if replace else "CREATE"),
        sql.SQL("PROCEDURE" if procedure else "FUNCTION"),
        sql.Identifier(spec.schema_name, spec.name),
        sql.SQL(", ").join(_argument(arg) for arg in spec.args if arg.mode != "table"),
        _returns(spec),
        sql.SQL("\n ").join(clauses),
    )


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _argument(arg: Arg) -> sql.Composable:
    parts: list[sql.Composable] = [raw(arg.mode.upper())]
    if arg.name is not None:
        parts.append(sql.Identifier(arg.name))
    parts.append(raw(arg.type))
    if arg.default is not None:
        parts.append(sql.SQL("DEFAULT {}").format(raw(arg.default)))
    return sql.SQL(" ").join(parts)


def _returns(spec: FunctionSpec) -> sql.Composable:
    if spec.returns is None:
        return sql.SQL("")
    columns = [arg for arg in spec.args if arg.mode == "table"]
    if columns:
        parts = [sql.SQL("{} {}").format(sql.Identifier(arg.name or ""), raw(arg.type)) for arg in columns]
        return sql.SQL("\n RETURNS TABLE({})").format(sql.SQL(", ").join(parts))
    setof = sql.SQL("SETOF " if spec.returns_set else "")
    return sql.SQL("\n RETURNS {}{}").format(setof, raw(spec.returns))


def _setting(setting: str) -> sql.Composable:
    name, _, value = setting.partition("=")
    values = split_list(value) if name in LIST_SETTINGS else [value]
    literals = sql.SQL(", ").join(map(sql.Literal, values)) if values else sql.SQL("''")
    return sql.SQL("SET {} TO {}").format(sql.SQL(".").join(map(sql.Identifier, name.split("."))), literals)


def _quoted(body: str) -> sql.Composable:
    """The body between dollar quotes whose tag does not occur in it, so that it stays readable and byte-exact."""
    return raw(dollar_quoted(body))


def _owned_by(name: sql.SQL, owner: str) -> sql.Composed:
    """Runs as the apply role: the old owner need not be a member of the new one, nor be able to see the schema."""
    return sql.SQL("ALTER ROUTINE {} OWNER TO {}").format(name, sql.Identifier(owner))


def _initial_acl(owner: str, context: JsonObject) -> set[Grant]:
    """The grants of a new function: PUBLIC and its owner, and what ALTER DEFAULT PRIVILEGES adds or takes away.

    Whom it adds is taken to have the grant option: revoking one that is not there does nothing.
    """
    grantees: set[str | None] = {None} if context.get("default_owner_lacks") else {None, owner}
    plain = {Grant(grantee=grantee, grantor=owner) for grantee in grantees}
    return plain | {Grant(grantee=name, grantor=owner, grantable=True) for name in context["default_grantees"]}


def _reowned(grant: Grant, old: str, new: str) -> Grant:
    return Grant(
        grantee=new if grant.grantee == old else grant.grantee,
        grantor=new if grant.grantor == old else grant.grantor,
        grantable=grant.grantable,
    )


def _grants(have: set[Grant], want: set[Grant], name: sql.SQL, owner: str) -> list[Statement]:
    """REVOKE what is too much, each by its grantor and after all that hangs on it; then GRANT what is missing."""

    def grantee(grant: Grant) -> sql.Composable:
        return sql.SQL("PUBLIC") if grant.grantee is None else sql.Identifier(grant.grantee)

    statements: list[Statement] = []
    for grant in _from_the_ends(have - want):
        kept = any((other.grantee, other.grantor) == (grant.grantee, grant.grantor) for other in want)
        option = sql.SQL("GRANT OPTION FOR " if kept and grant.grantable else "")
        revoke = sql.SQL("REVOKE {}EXECUTE ON ROUTINE {} FROM {}").format(option, name, grantee(grant))
        statements.append(complete(revoke, grant.grantor))
    for grant in _from_the_root(want - have, owner):
        plain = any((other.grantee, other.grantor) == (grant.grantee, grant.grantor) for other in have)
        if plain and not grant.grantable:
            continue  # it had the grant option; taking that away left the plain grant
        option = sql.SQL(" WITH GRANT OPTION" if grant.grantable else "")
        give = sql.SQL("GRANT EXECUTE ON ROUTINE {} TO {}{}").format(name, grantee(grant), option)
        statements.append(complete(give, grant.grantor))
    return statements


def _from_the_root(grants: set[Grant], owner: str) -> list[Grant]:
    """In an order in which they can be given: the owner's first, then what those pass on who got the grant option."""
    left, ordered, givers = list(_sorted(grants)), list[Grant](), {owner}
    while left:
        ready = [grant for grant in left if grant.grantor in givers] or left
        ordered += ready
        givers |= {grant.grantee for grant in ready if grant.grantee is not None and grant.grantable}
        left = [grant for grant in left if grant not in ready]
    return ordered


def _from_the_ends(grants: set[Grant]) -> list[Grant]:
    """In an order in which they can be revoked: who passed a grant on loses it after those who got it from there."""
    left, ordered = list(_sorted(grants)), list[Grant]()
    while left:
        givers = {grant.grantor for grant in left if grant.grantor != grant.grantee}
        ends = [grant for grant in left if grant.grantee not in givers or grant.grantee == grant.grantor] or left
        ordered += ends
        left = [grant for grant in left if grant not in ends]
    return ordered


def _name(item: Declared) -> tuple[str, str]:
    """Schema and name; of what is retired there is only the identity."""
    spec = item.spec
    return (spec.schema_name, spec.name) if isinstance(spec, FunctionSpec) else split_identity(item.name)[:2]


class _Covered:
    """Which functions a look saw: those of these names (schema, name), and all of this scope (schema, pattern)."""

    def __init__(self, names: Iterable[Sequence[str]], scope: Iterable[Sequence[str]]) -> None:
        self._names = {(schema, name) for schema, name in names}
        self._scope = [(schema, re.compile(glob_regex(pattern), re.DOTALL)) for schema, pattern in scope]

    def holds(self, schema: str, name: str) -> bool:
        """Would it have been seen?"""
        return (schema, name) in self._names or any(
            schema == scope and pattern.fullmatch(name) for scope, pattern in self._scope
        )


def _rows(conn: pg.Connection, names: Sequence[tuple[str, str]], owned: Scope) -> list[dict[str, Any]]:
    """Every function in scope and every one of these names (schema, name)."""
    scope = owned.functions
    return pg.rows(
        conn,
        _QUERY,
        {
            "schemas": [schema for schema, _ in names],
            "names": [name for _, name in names],
            "scope_schemas": [entry.schema_name for entry in scope],
            "scope_patterns": [glob_regex(entry.matching) for entry in scope],
        },
        doing="reading functions",
    )


def _spec(row: Mapping[str, Any]) -> FunctionSpec:
    """One row of `_QUERY` as the model. Argument modes and defaults are stored apart from the types (pg_proc)."""
    modes = {"i": "in", "o": "out", "b": "inout", "v": "variadic", "t": "table"}
    types: list[str] = row["arg_types"] or []
    arg_modes = [modes[mode] for mode in row["arg_modes"]] if row["arg_modes"] else ["in"] * len(types)
    names: list[str | None] = [name or None for name in row["arg_names"]] if row["arg_names"] else [None] * len(types)
    inputs = [index for index, mode in enumerate(arg_modes) if mode in {"in", "inout", "variadic"}]
    expressions = split_expressions(row["defaults"]) if row["defaults"] else []
    defaults: dict[int, str] = {}
    for index, expression in zip(inputs[len(inputs) - len(expressions) :], expressions, strict=True):
        defaults[index] = canonical_default(expression, types[index]) or expression
    args = tuple(
        Arg.model_validate(
            {"name": names[index], "mode": arg_modes[index], "type": types[index], "default": defaults.get(index)}
        )
        for index in range(len(types))
    )
    entries: list[tuple[str | None, str, bool]] = row["acl"] or []
    grants = _sorted(
        Grant(grantee=grantee, grantor=grantor, grantable=grantable) for grantee, grantor, grantable in entries
    )
    procedure = row["prokind_word"] == "procedure"
    return FunctionSpec(
        schema_name=row["schema"],
        name=row["name"],
        kind=row["prokind_word"],
        args=args,
        returns=None if procedure else row["returns"],
        returns_set=row["returns_set"],
        language=row["language"],
        volatility=row["volatility"],
        security_definer=row["security_definer"],
        parallel=row["parallel"],
        strict=row["strict"],
        leakproof=row["leakproof"],
        cost=row["cost"],
        rows=row["rows"],
        support=row["support"],
        transforms=tuple(row["transforms"] or ()),
        config=tuple(row["config"] or ()),
        body=row["body"],
        binary=row["binary"],
        owner=row["owner"],
        acl=grants,
        comment=row["comment"],
        sql_body=row["sql_body"],
    )


def _dependents(conn: pg.Connection, item: Declared, retired: Sequence[Declared]) -> list[Json]:
    """What would be dropped with it, in PostgreSQL's words, but for what is retired as well."""
    rows = pg.rows(
        conn,
        """
        SELECT DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid) AS what
          FROM pg_catalog.pg_depend d
         WHERE d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass
           AND d.refobjid = %(name)s::pg_catalog.regprocedure AND d.deptype IN ('n', 'a', 'i', 'e')
           AND NOT (d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                    AND d.objid::pg_catalog.regprocedure::pg_catalog.text = ANY (%(retired)s))
         ORDER BY 1
        """,
        {"name": item.name, "retired": [other.name for other in retired]},
        doing=f"looking for what depends on {item.name}",
    )
    return [row["what"] for row in rows]


def _roles(conn: pg.Connection, specs: Sequence[FunctionSpec] | None) -> set[str]:
    """Which of the roles that are named there exist; None: all that exist."""
    if specs is None:
        query = "SELECT rolname::pg_catalog.text AS name FROM pg_catalog.pg_roles"
        return {row["name"] for row in pg.rows(conn, query, doing="reading roles")}
    named = {spec.owner for spec in specs} | {grant.grantee for spec in specs for grant in spec.acl if grant.grantee}
    query = "SELECT rolname::pg_catalog.text AS name FROM pg_catalog.pg_roles WHERE rolname = ANY (%s)"
    return {row["name"] for row in pg.rows(conn, query, (sorted(named),), doing="reading roles")}


def _default_grants(conn: pg.Connection) -> list[dict[str, Any]]:
    """Who gets EXECUTE on a new function by ALTER DEFAULT PRIVILEGES: (owner, schema or None, grantee, grantable).

    Without a schema the grants stand in the place of PostgreSQL's own, in a schema they are added. `grantee` is None
    for PUBLIC, and for a row that grants nothing to anybody.
    """
    return pg.rows(
        conn,
        """
        SELECT o.rolname::pg_catalog.text AS owner, n.nspname::pg_catalog.text AS schema,
               g.rolname::pg_catalog.text AS grantee, a.is_grantable AS grantable
          FROM pg_catalog.pg_default_acl d
          JOIN pg_catalog.pg_roles o ON o.oid = d.defaclrole
          LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace
          LEFT JOIN LATERAL pg_catalog.aclexplode(d.defaclacl) a ON true
          LEFT JOIN pg_catalog.pg_roles g ON g.oid = a.grantee
         WHERE d.defaclobjtype = 'f'
        """,
        doing="reading default privileges",
    )


def _defaults_of(spec: FunctionSpec, found: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    """How the grants of this function, were it new, would differ from PostgreSQL's own: `_initial_acl` reads this."""
    rows = [row for row in found if row["owner"] == spec.owner and row["schema"] in {None, spec.schema_name}]
    names = {row["grantee"] for row in rows if row["grantee"] and (row["grantee"] != spec.owner or row["grantable"])}
    replaced = any(row["schema"] is None for row in rows)
    lacks = replaced and all(row["grantee"] != spec.owner for row in rows)
    return {"default_grantees": sorted(names), **({"default_owner_lacks": True} if lacks else {})}


def _created_with(facts: Mapping[str, Json]) -> dict[str, Json]:
    """What else the statements of a new function are derived from."""
    context = {key: facts[key] for key in ("default_grantees", "default_owner_lacks") if key in facts}
    return {"default_grantees": [], **context}


# SELECT around WITH: who reads the server's log sees at the first word that a run only reads.
_QUERY = """
SELECT q.* FROM (
WITH wanted AS (
    SELECT DISTINCT s AS nspname, f AS proname
      FROM ROWS FROM (pg_catalog.unnest(%(schemas)s::pg_catalog.name[]),
                      pg_catalog.unnest(%(names)s::pg_catalog.name[])) AS w(s, f)
), scope AS (
    SELECT s AS nspname, f AS pattern
      FROM ROWS FROM (pg_catalog.unnest(%(scope_schemas)s::pg_catalog.name[]),
                      pg_catalog.unnest(%(scope_patterns)s::pg_catalog.text[])) AS w(s, f)
), candidate AS (
    -- The schemas first: the server has thousands of functions of its own, and a pattern for each would take its time.
    SELECT p.*, p.xmin AS proc_xmin, n.nspname,
           EXISTS (SELECT FROM scope s
                    WHERE s.nspname = n.nspname AND p.proname::pg_catalog.text ~ s.pattern) AS in_scope
      FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
     WHERE p.prokind IN ('f', 'p', 'w')
       AND n.nspname = ANY (%(schemas)s::pg_catalog.name[] || %(scope_schemas)s::pg_catalog.name[])
)
SELECT p.proc_xmin::pg_catalog.text AS xmin, p.oid,
       p.nspname::pg_catalog.text AS schema, p.proname::pg_catalog.text AS name,
       CASE p.prokind WHEN 'p' THEN 'procedure' WHEN 'w' THEN 'window' ELSE 'function' END AS prokind_word,
       (SELECT pg_catalog.array_agg(pg_catalog.format_type(t, NULL) ORDER BY i)
          FROM pg_catalog.unnest(coalesce(p.proallargtypes, p.proargtypes::pg_catalog.oid[]))
               WITH ORDINALITY AS u(t, i)) AS arg_types,
       p.proargmodes::pg_catalog.text[] AS arg_modes,
       p.proargnames AS arg_names,
       pg_catalog.pg_get_expr(p.proargdefaults, 0) AS defaults,
       pg_catalog.format_type(p.prorettype, NULL) AS returns, p.proretset AS returns_set,
       l.lanname::pg_catalog.text AS language,
       CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END AS volatility,
       p.prosecdef AS security_definer,
       CASE p.proparallel WHEN 's' THEN 'safe' WHEN 'r' THEN 'restricted' ELSE 'unsafe' END AS parallel,
       p.proisstrict AS strict, p.proleakproof AS leakproof,
       p.procost::pg_catalog.float8 AS cost, p.prorows::pg_catalog.float8 AS rows,
       (SELECT pg_catalog.quote_ident(sn.nspname) || '.' || pg_catalog.quote_ident(sp.proname)
          FROM pg_catalog.pg_proc sp JOIN pg_catalog.pg_namespace sn ON sn.oid = sp.pronamespace
         WHERE sp.oid = p.prosupport::pg_catalog.oid) AS support,
       (SELECT pg_catalog.array_agg(pg_catalog.format_type(t, NULL) ORDER BY i)
          FROM pg_catalog.unnest(p.protrftypes) WITH ORDINALITY AS u(t, i)) AS transforms,
       p.proconfig AS config,
       -- What others dropped meanwhile has no text any more.
       CASE WHEN p.prosqlbody IS NULL THEN p.prosrc
            ELSE coalesce(pg_catalog.pg_get_function_sqlbody(p.oid), '') END AS body,
       p.probin AS binary, p.prosqlbody IS NOT NULL AS sql_body,
       CASE WHEN p.prosqlbody IS NOT NULL OR p.proargdefaults IS NOT NULL THEN
            (SELECT pg_catalog.array_agg(DISTINCT pg_catalog.concat_ws(' ', i.type, i.identity)
                                         ORDER BY pg_catalog.concat_ws(' ', i.type, i.identity))
               FROM pg_catalog.pg_depend d
              CROSS JOIN LATERAL pg_catalog.pg_identify_object(d.refclassid, d.refobjid, d.refobjsubid) i
              WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid = p.oid AND d.deptype = 'n')
       END AS uses,
       o.rolname::pg_catalog.text AS owner,
       (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(
                   g.rolname, coalesce(r.rolname, a.grantor::pg_catalog.text), a.is_grantable))
          FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
          LEFT JOIN pg_catalog.pg_roles g ON g.oid = a.grantee
          LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantor) AS acl,
       (SELECT d.description FROM pg_catalog.pg_description d
         WHERE d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
           AND d.objoid = p.oid AND d.objsubid = 0) AS comment,
       (SELECT d.xmin::pg_catalog.text FROM pg_catalog.pg_description d
         WHERE d.classoid = 'pg_catalog.pg_proc'::pg_catalog.regclass
           AND d.objoid = p.oid AND d.objsubid = 0) AS comment_xmin,
       EXISTS (SELECT FROM pg_catalog.pg_depend d
                WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                  AND d.objid = p.oid AND d.deptype = 'e') AS extension
  FROM candidate p
  JOIN pg_catalog.pg_language l ON l.oid = p.prolang
  JOIN pg_catalog.pg_roles o ON o.oid = p.proowner
 WHERE p.in_scope OR (p.nspname, p.proname) IN (SELECT w.nspname, w.proname FROM wanted w)
) AS q
 ORDER BY q.schema, q.name, q.oid
"""

KIND = Function()
