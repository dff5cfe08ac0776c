"""The edge of `drift` and `plan`: one look at the database -> a report, or a plan. Reads only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler import capabilities, drift, obstacles, pg
from reconciler.drift import Attribution
from reconciler.errors import ServerProblem
from reconciler.parts import relation
from reconciler.survey import survey

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from reconciler.drift import DriftReport
    from reconciler.model import Address, Desired, Drift, Plan
    from reconciler.survey import Survey

WHO = "who did it: PostgreSQL keeps no record of that; its log may (log_statement, or pgaudit)"


@dataclass(frozen=True)
class Look:
    """What one look saw, and what follows from it."""

    survey: Survey
    report: DriftReport


def look(dsn: str | None, wanted: Desired, *, fail_on: Collection[str], allow_untested: bool, now: datetime) -> Look:
    """One look, on a connection of its own. Raises ServerProblem, UsageError, Refused."""
    with pg.connect(dsn, "drift") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        with pg.snapshot(conn):
            found = survey(conn, wanted)
            moved = drift.classify(wanted, found.last.manifest, found.live, last_known=found.last.readable)
            moved = drift.with_installed(moved, found.setup)
            known = attributions(conn, found, moved.drift)
    report = drift.report(
        moved,
        target=found.target,
        entry=found.last.entry,
        findings=found.live.findings,
        verdicts=found.verdicts,
        not_compared=found.not_compared,
        fail_on=fail_on,
        now=now,
        desired=wanted,
        live=found.live,
        attributions=known,
    )
    return Look(found, report)


def plan_of(found: Survey, now: datetime) -> Plan:
    """The plan that follows from what was seen, with what drifted. Raises Refused."""
    moved = drift.classify(found.desired, found.last.manifest, found.live, last_known=found.last.readable)
    return found.plan(now, moved.drift)


def planned(dsn: str | None, wanted: Desired, *, allow_untested: bool, now: datetime) -> Plan:
    """What would change, with locks and privileges as this role sees them, on a connection of its own.

    Raises ServerProblem, UsageError, Refused.
    """
    with pg.connect(dsn, "plan") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        with pg.snapshot(conn):
            made = plan_of(survey(conn, wanted), now)
            return capabilities.shown(conn, wanted, obstacles.shown(conn, wanted, made))


def attributions(conn: pg.Connection, found: Survey, moved: Sequence[Drift]) -> dict[Address, Attribution]:
    """When, and by which transaction, each of these was written, as far as PostgreSQL knows; in the same snapshot."""
    if not moved:
        return {}
    written = {one.address: _transaction(found, one) for one in moved}
    why_not, times = _commit_times(conn, sorted({xid for xid, _ in written.values() if xid is not None}))
    owners = _owners(conn, sorted({one.after["table"] for one in moved if one.after and "table" in one.after}))
    result: dict[Address, Attribution] = {}
    for one in moved:
        xid, gone = written[one.address]
        after = one.after or {}
        changed_at = times.get(xid) if xid is not None else None
        unknown = "" if changed_at is not None else gone or why_not or f"the time of transaction {xid} is not kept"
        result[one.address] = Attribution(
            changed_at=changed_at,
            transaction=xid,
            updated_at=found.live.facts.get(one.address, {}).get("updated_at"),
            owner=after.get("owner") or owners.get(after.get("table", "")),
            not_known=(*([f"when: {unknown}"] * bool(unknown)), WHO),
        )
    return result


def _transaction(found: Survey, one: Drift) -> tuple[str | None, str]:
    """The transaction that wrote the row or, of a function, its row of the catalog; or why there is none."""
    facts = found.live.facts.get(one.address, {})
    if one.after is None:
        return None, "what is gone leaves no trace"
    if {field.name for field in one.fields} == {"comment"}:
        xid = facts.get("comment_xmin")
        return (xid, "") if xid is not None else (None, "a comment that is gone leaves no trace")
    return facts.get("xmin"), ""


def _commit_times(conn: pg.Connection, transactions: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """When these transactions were committed, to the second; or why nobody can tell."""
    query = """
        SELECT pg_catalog.current_setting('track_commit_timestamp') AS tracked,
               pg_catalog.has_function_privilege(
                   'pg_catalog.pg_xact_commit_timestamp(pg_catalog.xid)', 'EXECUTE') AS may
    """
    row = pg.rows(conn, query, doing="asking for commit times")[0]
    if row["tracked"] != "on":
        return "track_commit_timestamp is off", {}
    if not row["may"]:
        return "this role may not execute pg_xact_commit_timestamp(xid)", {}
    pg.run(conn, "SAVEPOINT commit_times")
    try:
        rows = pg.rows(
            conn,
            """
            SELECT u.x AS xid, pg_catalog.to_char(
                       pg_catalog.pg_xact_commit_timestamp(u.x::pg_catalog.xid), 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS at
              FROM pg_catalog.unnest(%s::pg_catalog.text[]) AS u (x)
            """,
            (list(transactions),),
            doing="asking for commit times",
        )
    except ServerProblem:
        # A standby whose primary does not keep them says so only when it is asked.
        pg.run(conn, "ROLLBACK TO SAVEPOINT commit_times")
        return "the server keeps no commit times", {}
    return "", {row["xid"]: row["at"] for row in rows if row["at"] is not None}


def _owners(conn: pg.Connection, tables: Sequence[str]) -> dict[str, str]:
    """The owner of each table (`schema.name`)."""
    names = [relation(table) for table in tables]
    query = """
        SELECT w.number, pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text AS owner
          FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.name[]), pg_catalog.unnest(%s::pg_catalog.name[]))
               WITH ORDINALITY AS w (nspname, relname, number)
          JOIN pg_catalog.pg_namespace n ON n.nspname = w.nspname
          JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.relname
    """
    rows = pg.rows(conn, query, ([name[0] for name in names], [name[1] for name in names]), "looking up owners")
    return {tables[int(row["number"]) - 1]: str(row["owner"]) for row in rows}
