"""Inside an apply: what the scope covers and no plan names. This transaction leaves it alone; others may change it.

Triggers and event triggers can do more than what was approved: add a key or a function, forge a beat of somebody else's
executor, write over another connection what no rollback reaches. Who wrote a row is told by its transaction id, who
deleted one by our own counters and locks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler import pg, transitions
from reconciler.kinds import kinds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from reconciler.kinds import Bystander
    from reconciler.model import Change, Desired, Json


@dataclass(frozen=True)
class Seen:
    """What was there under the locks, before the first statement; and what we had written and called by then."""

    found: Mapping[str, Bystander]
    written: Mapping[str, Json]
    calls: Mapping[str, int | None]


def look(conn: pg.Connection, desired: Desired) -> Seen:
    """What must be remembered for `moved`. From here on calls are counted, where this role may ask for it."""
    transitions.track(conn)
    tables = {store.table for store in desired.stores.values()} | {entry.table for entry in desired.scope.markers}
    return Seen(
        found=_read(conn, desired),
        written={table: {**transitions.family(conn, [table]), "unknown": ""} for table in sorted(tables)},
        calls=transitions.calls(conn),
    )


def moved(conn: pg.Connection, desired: Desired, before: Seen, changes: Sequence[Change]) -> list[str]:
    """What this transaction did to what it should have left alone, a sentence each; empty when nothing."""
    planned = {change.address for change in changes if "forget" not in change.actions}
    now = {name: one for name, one in _read(conn, desired).items() if name not in planned}
    other = {name: one for name, one in now.items() if name not in before.found or before.found[name].xmin != one.xmin}
    own = _ours(conn, {one.xmin for one in other.values()})
    lost = {name: one for name, one in before.found.items() if name not in now and name not in planned}
    taken = _taken(conn, lost.values(), before, changes)
    foreign = pg.rows(conn, _FOREIGN, doing="reading our own locks")
    return [
        *(f"{name}: written inside of the apply, and in no plan" for name, one in other.items() if one.xmin in own),
        *(f"{name}: taken away inside of the apply, and in no plan" for name, one in lost.items() if one.at in taken),
        *(f"{row['name']}: a foreign table was written, and that commits elsewhere" for row in foreign),
        *transitions.called(conn, before.calls),
    ]


def _read(conn: pg.Connection, desired: Desired) -> dict[str, Bystander]:
    found: dict[str, Bystander] = {}
    for kind in kinds().values():
        wanted = [item for item in desired.items.values() if item.kind == kind.name]
        found |= kind.bystanders(conn, wanted, desired)
    return found


def _taken(
    conn: pg.Connection, lost: Iterable[Bystander], before: Seen, changes: Sequence[Change]
) -> Collection[str | int]:
    """The tables and routines, of those that something is lost from, where it was us."""
    places = {one.at for one in lost}
    routines = [place for place in places if isinstance(place, int)]
    taken: set[str | int] = {row["oid"] for row in pg.rows(conn, _DROPPED, (routines,), "reading our own locks")}
    for table in places - set(routines):
        own = transitions.own(conn, before.written[str(table)])
        planned = sum(change.before is not None and change.before.get("table") == table for change in changes)
        if own.unknown or own.updated + own.deleted > planned:
            taken.add(table)
    return taken


def _ours(conn: pg.Connection, ids: Collection[str]) -> set[str]:
    """Which of these transaction ids of rows that we see are our transaction's, or those of its savepoints.

    An id of a row has 32 bits and comes again after 4 billion: it is taken for one of the next ten million after our
    own, or for none of ours. One that the snapshot does not know to be over, and of which we see a row, is ours.
    """
    return {row["id"] for row in pg.rows(conn, _OURS, {"ids": sorted(ids)}, "looking which rows are ours")}


_DROPPED = """
SELECT l.objid::pg_catalog.int8 AS oid FROM pg_catalog.pg_locks l
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.granted AND l.mode = 'AccessExclusiveLock' AND l.locktype = 'object'
   AND l.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND l.objid = ANY (%s::pg_catalog.int8[]::pg_catalog.oid[])
"""

_FOREIGN = """
SELECT DISTINCT l.relation::pg_catalog.regclass::pg_catalog.text AS name
  FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.granted AND l.locktype = 'relation' AND c.relkind = 'f'
   AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
 ORDER BY 1
"""

_OURS = """
SELECT q.id FROM (
    SELECT i.id, s.own, s.over,
           (i.id::pg_catalog.int8 - s.own %% 4294967296 + 6442450944) %% 4294967296 - 2147483648 AS later
      FROM pg_catalog.unnest(%(ids)s::pg_catalog.text[]) AS i (id)
     CROSS JOIN (SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8 AS own,
                        pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text
                        ::pg_catalog.int8 AS over) AS s
) AS q
 WHERE q.later = 0
    OR q.later BETWEEN 1 AND 10000000
   AND CASE WHEN q.own + q.later >= q.over THEN true
            ELSE pg_catalog.pg_xact_status((q.own + q.later)::pg_catalog.text::pg_catalog.xid8) = 'in progress' END
"""
