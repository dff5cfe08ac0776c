"""What an apply must be allowed, in one list: `plan` shows it with what its role lacks, `apply` asks before it locks.

The list follows from the plan. Three things only the database knows: the sequences that fill columns which an INSERT
leaves out, who owns a ledger that must be upgraded, and whether calls of functions must be counted. What triggers do as
the role that applies, nobody knows.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, LiteralString

from psycopg import sql

from reconciler import pg, transitions
from reconciler.checks import checks
from reconciler.errors import MissingPrivilege
from reconciler.kinds import kinds
from reconciler.model import Need, Plan, Privileges, Tried
from reconciler.parts import relation, role_need, table_need
from reconciler.syntax import quote_ident, writes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from reconciler.model import Address, Check, Desired
    from reconciler.syntax import Write

BACKUP = "backup"
"""The address of what a backup needs: it is no change."""

_ORDER = ("role", "database", "schema", "table", "sequence", "function", "parameter", "everything")


# ------------------------------------------------------------------------------------------------------------ the list


def needs(desired: Desired, plan: Plan, *, ledger_exists: bool) -> tuple[Need, ...]:
    """All that follows from the plan alone, each once, with every address that it is for. Pure."""
    found: list[Need] = []
    for change in plan.changes:
        if "forget" not in change.actions:
            found += kinds()[change.kind].needs(change, desired.items[change.address].rules)
    tables = {store.table for store in desired.stores.values()} | {entry.table for entry in desired.scope.markers}
    found += [table_need(f"scope.{desired.name}", "SELECT", table) for table in sorted(tables)]
    for check in _judged(desired, plan):
        found += checks()[check.kind].needs(check)
    if ledger_exists:
        found += [table_need("ledger.entry", verb, "reconciler.entry") for verb in ("SELECT", "INSERT")]
    else:
        database = plan.target.database
        found.append(Need(privilege="CREATE", on="database", name=database, addresses=("ledger.reconciler",)))
    backup = plan.backup
    if (backup.kind if isinstance(backup, Tried) else backup) == "full":
        found.append(Need(privilege="SELECT", on="everything", name="every table", addresses=(BACKUP,)))
    return _merged([*found, *_schemas(found)])


def _judged(desired: Desired, plan: Plan) -> Iterator[Check]:
    """The checks that must be judged; what may stay `not_judged` needs nothing."""
    tolerated = plan.policy.allow_not_judged
    return (check for check in desired.checks.values() if check.name not in tolerated)


def _schemas(found: Iterable[Need]) -> Iterator[Need]:
    """Nothing in a schema is reached without USAGE on it."""
    for need in found:
        if need.on in {"table", "function"}:
            schema = relation(need.name)[0]
            yield Need(privilege="USAGE", on="schema", name=schema, role=need.role, addresses=need.addresses)


def _merged(found: Iterable[Need]) -> tuple[Need, ...]:
    def same(need: Need) -> tuple[int, str, str, str]:
        return _ORDER.index(need.on), need.role or "", need.name, need.privilege

    merged: list[Need] = []
    for _, group in groupby(sorted(found, key=same), same):
        alike = list(group)
        addresses = tuple(sorted({address for need in alike for address in need.addresses}))
        merged.append(alike[0].model_copy(update={"addresses": addresses}))
    return tuple(merged)


# ------------------------------------------------------------------------------------------------------------ the look


def look(conn: pg.Connection, desired: Desired, plan: Plan, *, ledger_exists: bool) -> Privileges:
    """What an apply of the plan needs and the connection's role lacks. Reads catalogs only. Raises ServerProblem.

    What is not there yet is not missing: the plan creates it, or executing says so.
    """
    needed = needs(desired, plan, ledger_exists=ledger_exists)
    needed = _merged((*needed, *_ledger_owner(conn, plan), *_sequences(conn, plan)))
    missing: list[Need] = []
    for on, group in groupby(needed, lambda need: need.on):
        asked = list(group)
        calls = on == "function"
        allowed = [_may_call(conn, desired, need) for need in asked] if calls else _allowed(conn, on, asked)
        missing += [need for need, may in zip(asked, allowed, strict=True) if may is False]
    proofs = tuple(check.address for check in _judged(desired, plan) if check.kind == "proof")
    may_count = transitions.countable(conn) if proofs else None
    if may_count is not None:
        counting = Need(privilege="SET", on="parameter", name="track_functions", addresses=proofs)
        needed += (counting,)
        missing += [counting] * (not may_count)
    role = pg.rows(conn, "SELECT current_user::pg_catalog.text AS role")[0]["role"]
    return Privileges(role=role, needed=needed, missing=tuple(missing), not_seen=_triggers(conn, plan))


def shown(conn: pg.Connection, desired: Desired, plan: Plan) -> Plan:
    """The plan with `privileges`, for people to read. Raises ServerProblem."""
    if not plan.has_changes:
        return plan
    ledger_exists = all(change.address != "ledger.reconciler" or change.before is not None for change in plan.setup)
    return plan.model_copy(update={"privileges": look(conn, desired, plan, ledger_exists=ledger_exists)})


def check(conn: pg.Connection, desired: Desired, plan: Plan, *, ledger_exists: bool) -> None:
    """What the role lacks that applies, all of it at once. Raises MissingPrivilege.

    What only invariants, the surface and the backup lack raises nothing here: a check that cannot be judged has a
    verdict of its own, and exit code, and a program that makes a backup knows best what it may read.
    """
    found = look(conn, desired, plan, ledger_exists=ledger_exists)
    lacking = [need.words + (" (for the ledger)" if need.on == "database" else "") for need in found.missing]
    others = {BACKUP, *(check.address for check in desired.checks.values() if check.kind != "proof")}
    if any(not others.issuperset(need.addresses) for need in found.missing):
        raise MissingPrivilege(
            f"Role {found.role} lacks {lacking[0]}."
            if len(lacking) == 1
            else f"Role {found.role} lacks {len(lacking)} privileges.",
            details=lacking if len(lacking) > 1 else (),
            hint="Nothing was changed. Grant them, or apply as a role that has them.",
        )


def _allowed(conn: pg.Connection, on: str, asked: Sequence[Need]) -> list[bool | None]:
    """Of each, whether the role has it; None where the object is not there."""
    split = on in {"table", "sequence"}
    names = [relation(need.name) if split else ("", need.name) for need in asked]
    found = pg.rows(
        conn,
        sql.SQL(
            "SELECT {} AS may FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.text[]),"
            " pg_catalog.unnest(%s::pg_catalog.text[]), pg_catalog.unnest(%s::pg_catalog.text[]),"
            " pg_catalog.unnest(%s::pg_catalog.text[])) WITH ORDINALITY"
            " AS w (privilege, schema, name, role, number) ORDER BY w.number"
        ).format(sql.SQL(_MAY[on])),
        (
            [_option(conn, need) for need in asked],
            [schema for schema, _ in names],
            [name for _, name in names],
            [need.role for need in asked],
        ),
        doing="looking what this role may do",
    )
    return [row["may"] for row in found]


def _option(conn: pg.Connection, need: Need) -> str:
    """The privilege as this server calls it: before 16 every member may SET ROLE."""
    return "MEMBER" if need.privilege == "SET" and conn.info.server_version < 160_000 else need.privilege


def _may_call(conn: pg.Connection, desired: Desired, need: Need) -> bool | None:
    """Of a function that this plan creates, the files say who may execute it."""
    schema, name = relation(need.name)
    there = pg.rows(conn, _MAY_EXECUTE, (schema, name), doing=f"looking for {need.name}")
    if there:
        return any(row["may"] for row in there)
    created = [item.spec.dump() for item in desired.items.values() if item.kind == "function"]
    grants = [spec["acl"] for spec in created if (spec.get("schema_name"), spec.get("name")) == (schema, name)]
    if not grants:
        return None
    grantees = {grant["grantee"] for acl in grants for grant in acl}
    if None in grantees:
        return True
    return pg.rows(conn, _IS_ANY, (sorted(grantees),), doing="looking what this role is a member of")[0]["may"]


def _ledger_owner(conn: pg.Connection, plan: Plan) -> tuple[Need, ...]:
    """A ledger of an earlier version is upgraded by whoever is as good as its owner, or by a DBA beforehand."""
    if not any(change.address == "ledger.reconciler" and change.before is not None for change in plan.setup):
        return ()
    found = pg.rows(conn, _LEDGER_OWNER, doing="looking for the ledger")
    return tuple(role_need("ledger.reconciler", "USAGE", row["owner"]) for row in found)


def _sequences(conn: pg.Connection, plan: Plan) -> tuple[Need, ...]:
    """The sequences behind columns that an INSERT leaves to their default; identity columns need nothing."""
    found: list[Need] = []
    for address, write in _own_writes(plan):
        if write.verb != "INSERT" or not write.columns:
            continue
        for row in pg.rows(conn, _SEQUENCES, (*relation(write.table), list(write.columns)), "looking for sequences"):
            name = f"{quote_ident(row['schema'])}.{quote_ident(row['name'])}"
            found.append(Need(privilege="USAGE", on="sequence", name=name, addresses=(address,)))
    return tuple(found)


def _triggers(conn: pg.Connection, plan: Plan) -> tuple[str, ...]:
    """The triggers that run as the role that applies, a sentence each."""
    found: set[str] = set()
    for table, group in groupby(sorted({(write.table, write.verb) for _, write in _own_writes(plan)}), lambda w: w[0]):
        rows = pg.rows(conn, _TRIGGERS, (*relation(table), [verb for _, verb in group]), "looking for triggers")
        found |= {
            f"What {row['function']} does, trigger {row['trigger']} of {table}, needs the role that applies as well."
            for row in rows
        }
    return tuple(sorted(found))


def _own_writes(plan: Plan) -> Iterator[tuple[Address, Write]]:
    """What the statements write that run as the role that applies."""
    for change in plan.changes:
        for statement in change.statements:
            if statement.role is None:
                yield from ((change.address, write) for write in writes(statement.text))


_TABLE: LiteralString = """
(SELECT CASE w.privilege WHEN 'SELECT' THEN pg_catalog.has_table_privilege(c.oid, 'SELECT')
                         WHEN 'DELETE' THEN pg_catalog.has_table_privilege(c.oid, 'DELETE')
                         ELSE pg_catalog.has_any_column_privilege(c.oid, w.privilege) END
   FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname = w.schema AND c.relname = w.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f'))
"""

_EVERYTHING: LiteralString = """
NOT EXISTS (
    SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'S') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
       AND NOT (pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
                AND NOT pg_catalog.row_security_active(c.oid))
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                        WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                          AND d.deptype = 'e'))
"""

_MAY: Mapping[str, LiteralString] = {
    "role": "(SELECT pg_catalog.pg_has_role(r.oid, w.privilege) FROM pg_catalog.pg_roles r WHERE r.rolname = w.name)",
    "database": "(SELECT pg_catalog.has_database_privilege(d.oid, w.privilege) FROM pg_catalog.pg_database d"
    " WHERE d.datname = w.name)",
    "schema": "(SELECT pg_catalog.has_schema_privilege(coalesce(r.oid, m.oid), n.oid, w.privilege)"
    " FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles m ON m.rolname = current_user"
    " LEFT JOIN pg_catalog.pg_roles r ON r.rolname = w.role WHERE n.nspname = w.name"
    " AND (w.role IS NULL OR r.oid IS NOT NULL))",
    "table": _TABLE,
    "sequence": "(SELECT pg_catalog.has_sequence_privilege(c.oid, 'USAGE, UPDATE') FROM pg_catalog.pg_class c"
    " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = w.schema AND c.relname = w.name AND c.relkind = 'S')",
    "everything": _EVERYTHING,
}
"""Of each sort of object: may the role do it? NULL where it is not there; never an error, which would end the look."""

_MAY_EXECUTE: LiteralString = """
SELECT pg_catalog.has_function_privilege(p.oid, 'EXECUTE') AS may
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname = %s AND p.proname = %s
"""

_IS_ANY: LiteralString = """
SELECT coalesce(pg_catalog.bool_or(pg_catalog.pg_has_role(r.oid, 'USAGE')), false) AS may
  FROM pg_catalog.pg_roles r WHERE r.rolname = ANY (%s::pg_catalog.text[])
"""

_LEDGER_OWNER: LiteralString = """
SELECT pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text AS owner
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = 'reconciler' AND c.relname = 'entry'
"""

_SEQUENCES: LiteralString = """
SELECT DISTINCT sn.nspname::pg_catalog.text AS schema, s.relname::pg_catalog.text AS name
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_catalog.pg_attrdef f ON f.adrelid = c.oid AND f.adnum = a.attnum
  JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = f.oid
       AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
  JOIN pg_catalog.pg_class s ON s.oid = d.refobjid AND s.relkind = 'S'
  JOIN pg_catalog.pg_namespace sn ON sn.oid = s.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND a.attname <> ALL (%s::pg_catalog.text[])
 ORDER BY 1, 2
"""

# tgtype: 4 INSERT, 8 DELETE, 16 UPDATE.
_TRIGGERS: LiteralString = """
SELECT t.tgname::pg_catalog.text AS trigger, p.oid::pg_catalog.regprocedure::pg_catalog.text AS function
  FROM pg_catalog.pg_trigger t
  JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
  JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND NOT p.prosecdef
   AND EXISTS (SELECT FROM pg_catalog.unnest(%s::pg_catalog.text[]) AS v (verb)
                WHERE t.tgtype::pg_catalog.int4
                      & CASE v.verb WHEN 'INSERT' THEN 4 WHEN 'DELETE' THEN 8 ELSE 16 END <> 0)
"""
