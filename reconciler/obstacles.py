"""Beside a plan: which locks its apply would take, and who is in the way of one now. Reads only, and takes no lock.

Who holds a row or a function is told by the transaction id that it carries: it belongs to the one who changed or locked
it last. What an open transaction has created nobody else can see; that, and what the role may not see, is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.kinds import kinds
from reconciler.locks import lock_key
from reconciler.model import MOMENT, Lock, Locks, Obstacle
from reconciler.parts import identifier, relation, table_lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from reconciler.model import Change, Desired, Plan

CONFLICTS = ["AccessExclusiveLock", "ExclusiveLock", "ShareLock", "ShareRowExclusiveLock"]
"""What keeps a ROW EXCLUSIVE lock waiting, held or waited for."""

UNSEEN = "What open transactions have created or inserted, and not yet committed, cannot be seen."


def shown(conn: pg.Connection, desired: Desired, plan: Plan) -> Plan:
    """The plan with `locks`: what its apply would lock, and who is in the way. The caller's snapshot is READ ONLY.

    Raises ServerProblem.
    """
    if not plan.has_changes:
        return plan
    needed = _needed(conn, desired, plan.changes)
    hidden = [UNSEEN]
    met: list[_Met] = []
    may = pg.rows(conn, _MAY, doing="looking what this role may see of locks")[0]
    if may["locks"]:
        met = _on_names(conn, needed)
        shut = {one.lock.name for one in met if one.holds.endswith("AccessExclusiveLock")}
        met += [*_on_rows(conn, [lock for lock in needed if lock.name not in shut]), *_on_catalog(conn, needed)]
    else:
        hidden.append("Who is in the way was not looked at: this role may not read pg_locks.")
    if not may["stats"]:
        hidden.append(
            "State and times of other roles' sessions are hidden from this role: GRANT pg_read_all_stats to it."
        )
    found = _named(conn, met)
    locks = Locks(needed=needed, looked=may["locks"], in_the_way=found, not_seen=tuple(hidden))
    return plan.model_copy(update={"locks": locks})


class _Met(NamedTuple):
    """Somebody with something that a lock of ours would wait for. pid: as in Obstacle."""

    lock: Lock
    pid: int | None
    holds: str
    certain: bool = True


def _needed(conn: pg.Connection, desired: Desired, changes: Iterable[Change]) -> tuple[Lock, ...]:
    """Every lock, each once, in the order in which an apply takes them."""
    found = [
        Lock(
            address=f"governance.{desired.name}",
            mode="advisory",
            on="name",
            name=desired.name,
            waits="another apply of the same name",
        )
    ]
    if pg.rows(conn, _LEDGER, doing="looking for the ledger")[0]["there"]:
        found.append(table_lock("ledger.entry", "reconciler.entry"))
    for change in sorted(changes, key=lambda change: change.address):
        if "forget" not in change.actions:
            found += kinds()[change.kind].locks(change, desired.items[change.address].rules)
    return tuple(found)


def _on_names(conn: pg.Connection, needed: Sequence[Lock]) -> list[_Met]:
    """Whole tables, schemas, and the lock of another apply."""
    tables = {lock.name: lock for lock in reversed(needed) if lock.on == "table"}
    schemas = {lock.name: lock for lock in reversed(needed) if lock.on == "schema"}
    named = {str(lock_key(lock.name)): lock for lock in needed if lock.on == "name"}
    names = {table: relation(table) for table in tables}
    found = pg.rows(
        conn,
        _TABLES,
        {
            "tables": list(tables),
            "schemas": [schema for schema, _ in names.values()],
            "names": [name for _, name in names.values()],
            "modes": CONFLICTS,
            "free": list(schemas),
            "keys": list(named),
        },
        doing="looking who is in the way",
    )
    where = {"table": tables, "schema": schemas, "name": named}
    return [
        _Met(
            where[row["sort"]][row["name"]],
            row["pid"],
            "is an apply of it" if row["sort"] == "name" else f"{row['verb']} {row['mode']}",
        )
        for row in found
    ]


def _on_rows(conn: pg.Connection, needed: Sequence[Lock]) -> list[_Met]:
    """Rows that somebody has changed, deleted or locked; for rows to be inserted, who may be inserting them."""
    met: list[_Met] = []
    for lock in needed:
        if lock.on != "row":
            continue
        doing = f"looking who is in the way of {lock.address}"
        if lock.mode == "INSERT":
            schema, name = relation(lock.name)
            idle = pg.rows(conn, _IDLE_WRITERS, {"schema": schema, "name": name}, doing)
            met += [_Met(lock, row["pid"], "may have inserted it: has written to the table", False) for row in idle]
            continue
        pairs = [sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(text)) for name, text in lock.key.items()]
        query = sql.SQL("SELECT xmax::pg_catalog.text AS xmax, tableoid AS oid FROM {} WHERE {}").format(
            identifier(lock.name), sql.SQL(" AND ").join(pairs)
        )
        for row in pg.rows(conn, query, doing=doing):
            met += [_of_row(lock, one) for one in _holders(conn, row["xmax"], row["oid"], doing)]
    return met


def _holders(conn: pg.Connection, xmax: str, table: int, doing: str) -> Sequence[Mapping[str, Any]]:
    """Who changed, deleted or locked a row last and has not ended: `pid`; `writes`: it has written to the table."""
    found = pg.rows(conn, _HOLDERS, {"xmax": xmax, "oid": table}, doing)
    if found or not pg.rows(conn, _OPEN, {"xmax": xmax}, doing)[0]["open"]:
        return found
    # In a savepoint that was released: of such a transaction id nobody can say whose it is, but for who wrote here.
    return pg.rows(conn, _WRITERS, {"oid": table}, doing) or [{"pid": None, "writes": True}]


def _of_row(lock: Lock, holder: Mapping[str, Any]) -> _Met:
    if holder["writes"]:
        return _Met(lock, holder["pid"], "has changed, deleted or locked it")
    # Only the table's lock tells: SELECT FOR UPDATE, and the FOR KEY SHARE of a foreign key for which nobody waits.
    return _Met(lock, holder["pid"], "has locked it, perhaps only for a foreign key", certain=False)


def _on_catalog(conn: pg.Connection, needed: Sequence[Lock]) -> list[_Met]:
    """Routines that somebody has altered, replaced, granted, commented on or dropped."""
    routines = {lock.name: lock for lock in needed if lock.on == "routine" and lock.mode != "CREATE"}
    doing = "looking who is in the way of functions"
    met: list[_Met] = []
    for row in pg.rows(conn, _ROUTINES, {"names": list(routines)}, doing) if routines else ():
        lock = routines[row["name"]]
        changed = _holders(conn, row["xmax"], row["catalog"], doing)
        met += [_Met(lock, one["pid"], "has altered, replaced, granted or dropped it") for one in changed]
        held = pg.rows(conn, _OBJECT, {"oid": row["oid"]}, doing)
        met += [_Met(lock, one["pid"], f"{one['verb']} {one['mode']}") for one in held]
    return met


def _named(conn: pg.Connection, met: Sequence[_Met]) -> tuple[Obstacle, ...]:
    """Who they are. Each once for every place, and nobody perhaps who is for certain."""
    certain = {one.pid for one in met if one.certain}
    by_place = {(one.lock.place, one.pid): one for one in met if one.certain or one.pid not in certain}
    pids = sorted({one.pid for one in by_place.values() if one.pid})
    people = {row["pid"]: row for row in pg.rows(conn, _PEOPLE, (pids,), doing="looking who is in the way")}
    nobody = {"role": None, "application": None, "state": None, "since": None}
    found: list[Obstacle] = []
    for one in by_place.values():
        who = people.get(one.pid or 0, nobody)
        if one.pid and one.pid not in people:
            continue  # it has ended meanwhile
        found.append(
            Obstacle(
                address=one.lock.address,
                place=one.lock.place,
                holds=one.holds,
                certain=one.certain,
                pid=one.pid,
                role=who["role"],
                application=who["application"] or None,
                state=who["state"],
                since=None if who["since"] is None else who["since"].strftime(MOMENT),
            )
        )
    return tuple(sorted(found, key=lambda one: (not one.certain, one.address, one.place, one.pid or 0)))


# By the catalog: to_regclass raises for who may not use the schema.
_LEDGER: LiteralString = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'reconciler' AND c.relname = 'entry') AS there
"""

_MAY: LiteralString = """
SELECT pg_catalog.has_table_privilege('pg_catalog.pg_locks', 'SELECT') AS locks,
       pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS stats
"""

_TABLES: LiteralString = """
SELECT q.sort, q.name, q.pid, q.mode, CASE WHEN q.granted THEN 'holds' ELSE 'waits for' END AS verb FROM (
    SELECT 'table' AS sort, w.name, coalesce(l.pid, 0) AS pid, l.mode, l.granted
      FROM ROWS FROM (pg_catalog.unnest(%(tables)s::pg_catalog.text[]),
                      pg_catalog.unnest(%(schemas)s::pg_catalog.text[]),
                      pg_catalog.unnest(%(names)s::pg_catalog.text[])) AS w (name, nspname, relname)
      JOIN pg_catalog.pg_namespace n ON n.nspname = w.nspname
      JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.relname
      JOIN pg_catalog.pg_locks l ON l.locktype = 'relation' AND l.relation = c.oid
     WHERE l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
       AND l.mode = ANY (%(modes)s::pg_catalog.text[])
    UNION ALL
    SELECT 'schema', n.nspname::pg_catalog.text, coalesce(l.pid, 0), l.mode, l.granted
      FROM pg_catalog.pg_namespace n
      JOIN pg_catalog.pg_locks l ON l.locktype = 'object' AND l.objid = n.oid
           AND l.classid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
     WHERE n.nspname = ANY (%(free)s::pg_catalog.text[]) AND l.mode = 'AccessExclusiveLock'
       AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
    UNION ALL
    SELECT 'name', k.key, coalesce(l.pid, 0), l.mode, l.granted
      FROM pg_catalog.unnest(%(keys)s::pg_catalog.text[]) AS k (key)
      JOIN pg_catalog.pg_locks l ON l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
           AND ((l.classid::pg_catalog.int8 << 32) | l.objid::pg_catalog.int8) = k.key::pg_catalog.int8
     WHERE l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
) AS q
 WHERE q.pid <> pg_catalog.pg_backend_pid()
"""

_IDLE_WRITERS: LiteralString = """
SELECT DISTINCT l.pid
  FROM pg_catalog.pg_locks l
  JOIN pg_catalog.pg_class c ON c.oid = l.relation
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND l.locktype = 'relation' AND l.granted
   AND l.mode = 'RowExclusiveLock' AND a.state = 'idle in transaction'
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
"""

# xmax is a transaction, or stands for several who lock a row together; an age between 1 and the oldest of the database
# tells that there are such members to ask for (of another one, asking is an error). Only a transaction that is still
# open holds a lock on its own id.
_HOLDERS: LiteralString = """
SELECT DISTINCT coalesce(l.pid, 0) AS pid,
       EXISTS (SELECT FROM pg_catalog.pg_locks w
                WHERE w.virtualtransaction = l.virtualtransaction AND w.locktype = 'relation' AND w.relation = %(oid)s
                  AND w.mode NOT IN ('AccessShareLock', 'RowShareLock')) AS writes
  FROM pg_catalog.pg_locks l
 WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
   AND (l.pid IS NULL OR l.pid <> pg_catalog.pg_backend_pid())
   AND (l.transactionid = %(xmax)s::pg_catalog.text::pg_catalog.xid
        OR l.transactionid = ANY ((
            SELECT CASE WHEN %(xmax)s::pg_catalog.text <> '0'
                         AND pg_catalog.mxid_age(%(xmax)s::pg_catalog.text::pg_catalog.xid)
                             BETWEEN 1 AND pg_catalog.mxid_age(d.datminmxid)
                        THEN ARRAY(SELECT m.xid
                                     FROM pg_catalog.pg_get_multixact_members(%(xmax)s::pg_catalog.text::pg_catalog.xid)
                                       AS m WHERE m.mode <> 'keysh') END
              FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())::pg_catalog.xid[]))
"""

# Is this transaction, which changed a row that the snapshot still shows, under way? Ids are counted in 32 bits, again
# and again. `back` is how far it lies behind the end of the snapshot; almost all the way round is one of later.
_OPEN: LiteralString = """
SELECT coalesce(CASE WHEN %(xmax)s::pg_catalog.text = '0' THEN false
                     WHEN q.back > 4284967296
                     THEN NOT pg_catalog.mxid_age(%(xmax)s::pg_catalog.text::pg_catalog.xid)
                              BETWEEN 1 AND pg_catalog.mxid_age(d.datminmxid)
                     WHEN q.back BETWEEN 1 AND q.next - 3
                     THEN pg_catalog.pg_xact_status((q.next - q.back)::pg_catalog.text::pg_catalog.xid8) = 'in progress'
                     END, q.back = 0) AS open
  FROM (SELECT (s.next - %(xmax)s::pg_catalog.int8 %% 4294967296 + 4294967296) %% 4294967296 AS back, s.next
          FROM (SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8
                       AS next) AS s) AS q
 CROSS JOIN pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()
"""

_WRITERS: LiteralString = """
SELECT DISTINCT coalesce(l.pid, 0) AS pid, true AS writes FROM pg_catalog.pg_locks l
 WHERE l.locktype = 'relation' AND l.relation = %(oid)s AND l.granted
   AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
"""

_ROUTINES: LiteralString = """
SELECT p.oid, p.tableoid AS catalog, p.xmax::pg_catalog.text AS xmax,
       p.oid::pg_catalog.regprocedure::pg_catalog.text AS name
  FROM pg_catalog.pg_proc p WHERE p.oid::pg_catalog.regprocedure::pg_catalog.text = ANY (%(names)s::pg_catalog.text[])
"""

_OBJECT: LiteralString = """
SELECT coalesce(l.pid, 0) AS pid, l.mode, CASE WHEN l.granted THEN 'holds' ELSE 'waits for' END AS verb
  FROM pg_catalog.pg_locks l
 WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND l.objid = %(oid)s
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
"""

_PEOPLE: LiteralString = """
SELECT a.pid, a.usename::pg_catalog.text AS role, a.application_name AS application, a.state, a.xact_start AS since
  FROM pg_catalog.pg_stat_activity a WHERE a.pid = ANY (%s::pg_catalog.int4[])
"""
