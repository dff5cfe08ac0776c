"""Second source of the flow: one snapshot of the database -> Live, verdicts, and what was not looked at. Reads only.

`plan`, `drift`, the stale check of `apply` and its final verification all read through here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reconciler import pg
from reconciler.checks import CheckKind, checks
from reconciler.errors import Refused, UsageError
from reconciler.kinds import UNSEEN, kinds
from reconciler.model import (
    Address,
    Asked,
    Change,
    Check,
    Declared,
    Desired,
    Finding,
    Json,
    JsonObject,
    Live,
    Model,
    NotCompared,
    Target,
    Verdict,
    digest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def read(conn: pg.Connection, desired: Desired, allow_functions: Sequence[str]) -> Live:
    """Every declared object as it is, with facts and findings. The caller's transaction decides what is seen.

    allow_functions: the installed policy's, for queries that declarations hold.
    """
    found = of(look(conn, desired, allow_functions), desired)
    _refuse_copies(conn, desired, found.items, found.facts)
    findings = (
        finding.model_copy(update={"message": conn.unspoken.without(finding.message)}) for finding in found.findings
    )
    return replace(found, findings=tuple(findings))


def look(conn: pg.Connection, desired: Desired, allow_functions: Sequence[str], *, widely: bool = False) -> JsonObject:
    """What every kind reads, by its name. widely: also what the next version of the files may need."""
    return {
        kind.name: kind.look(conn, _of_kind(desired, kind.name), desired, allow_functions, widely=widely)
        for kind in kinds().values()
    }


def of(seen: Mapping[str, Json], desired: Desired) -> Live:
    """The declared objects, in what was seen. Pure."""
    items: dict[str, Model] = {}
    facts: dict[str, Mapping[str, Json]] = {}
    findings: list[Finding] = []
    for kind in kinds().values():
        reading = kind.found(seen[kind.name], _of_kind(desired, kind.name), desired)
        items.update(reading.items)
        facts.update(reading.facts)
        findings += reading.findings
    return Live(items, facts, tuple(sorted(findings, key=lambda finding: (finding.code, finding.address))))


def _of_kind(desired: Desired, name: str) -> list[Declared]:
    return [item for item in desired.items.values() if item.kind == name]


def _refuse_copies(
    conn: pg.Connection, desired: Desired, items: Mapping[str, Model], facts: Mapping[str, Mapping[str, Json]]
) -> None:
    """What is shown of other objects must not be a secret. Raises Refused, naming where it stands."""
    found = sorted(
        address
        for address in desired.items
        if conn.unspoken.held_by([items[address].dump() if address in items else None, facts.get(address)])
    )
    if found:
        raise Refused(
            f"The value of a secret gate stands also in {found[0]}, which would be shown.",
            details=found[1:],
            hint="Nothing was changed. Take it out of there, or call that a secret too; then change the value.",
        )


def judge(conn: pg.Connection, asked: Asked, memos: Mapping[Address, Json] | None = None) -> tuple[Verdict, ...]:
    """The verdict of every declared check, in the order of their sorts and then by address.

    memos: what `remember` returned at BEGIN, when asked inside an apply.
    """
    # Statistics views are cached for the whole transaction: without this, the second look of an apply would see the
    # sessions of the first, and a background worker that has ended meanwhile as one without a type.
    pg.rows(conn, "SELECT pg_catalog.pg_stat_clear_snapshot()::pg_catalog.text AS cleared")
    return tuple(
        spoken(conn, kind.run(conn, check, replace(asked, memo=(memos or {}).get(check.address))))
        for kind, check in _checks(asked)
    )


def spoken(conn: pg.Connection, verdict: Verdict) -> Verdict:
    """What a check says may be of the database's own making: a function can answer, or raise, what it reads."""
    return verdict.model_copy(
        update={
            name: conn.unspoken.without(text)
            for name in ("detail", "before", "after", "predicted")
            if (text := getattr(verdict, name)) is not None
        }
    )


def judged(known: Mapping[str, Verdict], desired: Desired) -> tuple[Verdict, ...]:
    """The verdicts of an earlier look, for checks that are still the same. Pure.

    known: by the digest of the check. Of another one nobody can say anything, unless it is judged in the apply anyhow.
    """
    found: list[Verdict] = []
    for kind, check in _checks(Asked(desired)):
        verdict = known.get(digest(check.dump())) or kind.planned(check)
        missing = str(UNSEEN["not_judged"])
        detail = "it is not one that was judged for the snapshot"
        new = Verdict(address=check.address, status="not_judged", detail=detail, missing=missing)
        found.append(verdict or new)
    return tuple(found)


def refuse_secrets(conn: pg.Connection, made: Model) -> None:
    """Raises Refused when a secret that this connection has seen stands in what is about to be written."""
    if conn.unspoken.held_by([made.dump()]):
        raise Refused(
            "The value of a secret gate stands also in what the snapshot would show.",
            hint="Nothing was written. `reconciler plan` names the place; take it out of there.",
        )


def unjudged(desired: Desired, found: Live) -> tuple[Verdict, ...]:
    """A verdict for each object that could not be compared: a secret without the key, or without its value. Pure."""
    missing = {address: str(facts["not_judged"]) for address, facts in found.facts.items() if "not_judged" in facts}
    return tuple(
        Verdict(
            address=address,
            status="not_judged",
            detail=f"{what} is not there, so nobody can tell if its secret is the declared one",
            missing=what,
        )
        for address, what in sorted(missing.items())
        if address in desired.items
    )


def values(conn: pg.Connection, change: Change, items: Mapping[Address, Declared]) -> tuple[str, ...]:
    """What the places $1 ... of the change's statement stand for; nothing for most. Raises UsageError, Stale."""
    item = items.get(change.address)
    return () if item is None or "forget" in change.actions else kinds()[item.kind].bound(conn, change, item.rules)


def remember(conn: pg.Connection, asked: Asked) -> dict[Address, Json]:
    """What every check must know about the state at BEGIN, by address."""
    return {check.address: kind.remember(conn, check, asked) for kind, check in _checks(asked)}


def numbers(conn: pg.Connection, asked: Asked) -> dict[Address, str]:
    """What each row of the surface is now, by address; what cannot be read is left out."""
    found = {check.address: kind.number(conn, check, asked) for kind, check in _checks(asked)}
    return {address: conn.unspoken.without(number) for address, number in found.items() if number is not None}


def _checks(asked: Asked) -> list[tuple[CheckKind, Check]]:
    declared = asked.desired.checks.values()
    return [(kind, check) for kind in checks().values() for check in declared if check.kind == kind.name]


def identify(conn: pg.Connection, desired: Desired) -> Target:
    """The database's identity under the target's name. Raises UsageError when it is not the target's database."""
    found = pg.identify(conn).model_copy(update={"name": desired.target})
    check_database(desired, found, "this connection is to")
    return found


def check_database(desired: Desired, found: Target, what: str) -> None:
    """Is it the database that the files say? Pure. what: before its name. Raises UsageError."""
    if desired.database is not None and found.database != desired.database:
        raise UsageError(
            f"Target {desired.target} is database {desired.database}, but {what} {found.database}.",
            hint="Check --dsn and --target.",
        )


def not_compared(conn: pg.Connection, desired: Desired) -> tuple[NotCompared, ...]:
    """The object classes in the schemas of the declared scope that are not compared, with their numbers."""
    schemas = sorted({entry.schema_name for entry in desired.scope.functions} | _schemas_of_tables(desired))
    found = pg.rows(conn, _NOT_COMPARED, {"schemas": schemas}, doing="counting what is not compared")
    return tuple(
        NotCompared.model_validate({"class": row["class"], "where": row["where"], "count": row["count"]})
        for row in found
    )


def _schemas_of_tables(desired: Desired) -> set[str]:
    from reconciler.parts import relation

    tables = [store.table for store in desired.stores.values()] + [entry.table for entry in desired.scope.markers]
    return {relation(table)[0] for table in tables}


# SELECT around WITH: who reads the server's log sees at the first word that a run only reads.
_NOT_COMPARED = """
SELECT q.* FROM (
WITH counted (class, schema) AS (
    SELECT CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'table' WHEN 'v' THEN 'view'
                          WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence' WHEN 'f' THEN 'foreign table'
                          WHEN 'c' THEN 'composite type' ELSE 'index' END, c.relnamespace
      FROM pg_catalog.pg_class c WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c', 'i', 'I')
    UNION ALL
    SELECT 'aggregate', p.pronamespace FROM pg_catalog.pg_proc p WHERE p.prokind = 'a'
    UNION ALL
    SELECT 'type', t.typnamespace FROM pg_catalog.pg_type t WHERE t.typtype IN ('d', 'e', 'r', 'm')
    UNION ALL
    SELECT 'constraint', k.connamespace FROM pg_catalog.pg_constraint k
    UNION ALL
    SELECT 'trigger', c.relnamespace FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
     WHERE NOT t.tgisinternal
    UNION ALL
    SELECT 'rule', c.relnamespace FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
     WHERE r.rulename <> '_RETURN'
    UNION ALL
    SELECT 'policy', c.relnamespace FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c ON c.oid = p.polrelid
    UNION ALL
    SELECT 'operator', o.oprnamespace FROM pg_catalog.pg_operator o
    UNION ALL
    SELECT 'operator class', o.opcnamespace FROM pg_catalog.pg_opclass o
    UNION ALL
    SELECT 'collation', c.collnamespace FROM pg_catalog.pg_collation c
    UNION ALL
    SELECT 'conversion', c.connamespace FROM pg_catalog.pg_conversion c
    UNION ALL
    SELECT 'text search object', c.cfgnamespace FROM pg_catalog.pg_ts_config c
    UNION ALL
    SELECT 'text search object', d.dictnamespace FROM pg_catalog.pg_ts_dict d
    UNION ALL
    SELECT 'extended statistics', s.stxnamespace FROM pg_catalog.pg_statistic_ext s
    UNION ALL
    SELECT 'default privileges', d.defaclnamespace FROM pg_catalog.pg_default_acl d
)
SELECT c.class, 'schema ' || n.nspname::pg_catalog.text AS where, pg_catalog.count(*) AS count
  FROM counted c JOIN pg_catalog.pg_namespace n ON n.oid = c.schema
 WHERE n.nspname = ANY (%(schemas)s::pg_catalog.name[])
 GROUP BY 1, 2
UNION ALL
SELECT 'event trigger', 'database', pg_catalog.count(*) FROM pg_catalog.pg_event_trigger HAVING pg_catalog.count(*) > 0
UNION ALL
SELECT 'extension', 'database (see invariants)', pg_catalog.count(*) FROM pg_catalog.pg_extension
UNION ALL
SELECT 'publication', 'database', pg_catalog.count(*) FROM pg_catalog.pg_publication HAVING pg_catalog.count(*) > 0
) AS q
ORDER BY 1, 2
"""
