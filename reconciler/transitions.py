"""What transition checks ask: did this backend write to a relation during the apply? Locks are the answer (DESIGN 4).

The strongest lock that our own backend holds is exact for everything it did itself, triggers and SECURITY DEFINER
functions included; it cannot see what another backend (dblink, a foreign server) did on our behalf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reconciler import pg
from reconciler.parts import relation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reconciler.model import Json
    from reconciler.pg import Connection

READING = {"AccessShareLock", "RowShareLock"}
"""Held by SELECT, and by SELECT FOR UPDATE and foreign-key checks, which change no data."""


def family(conn: Connection, names: Sequence[str]) -> dict[str, Json]:
    """The relations with their partitions, children and TOAST tables, and this backend's own write counters for each.

    Returns {"found": {oid as text: [name, inserted + updated + deleted]}, "missing": [name, ...]}. The counters carry
    over from the previous transaction of the connection, so only their difference means anything (measured).
    """
    found: dict[str, Json] = {}
    missing: list[str] = []
    for name in names:
        rows = pg.rows(conn, _FAMILY, relation(name), doing=f"reading the relations of {name}")
        if not rows:
            missing.append(name)
        for row in rows:
            found[row["oid"]] = [row["name"], row["writes"]]
    return {"found": found, "missing": missing}


def touched(conn: Connection, remembered: Mapping[str, Json]) -> list[str]:
    """What this backend did to the remembered relations beyond reading, a sentence each; empty when nothing."""
    rows = pg.rows(conn, _LOCKS, ([int(oid) for oid in remembered],), doing="reading our own locks")
    sentences: list[str] = []
    for row in rows:
        name, writes = remembered[row["oid"]]
        if row["mode"] in READING:
            continue
        if row["mode"] == "RowExclusiveLock":
            # Opened for writing: an UPDATE that found no row takes this lock too.
            written = row["writes"] - writes
            if written:
                sentences.append(f"{name}: {written} row{'' if written == 1 else 's'} written")
            continue
        sentences.append(f"{name}: {row['mode']} taken")
    return sorted(set(sentences))


def locks(conn: Connection) -> set[tuple[Any, ...]]:
    """Every lock on a relation that this backend holds, and every advisory lock, to compare before and after."""
    rows = pg.rows(conn, _OWN, doing="reading our own locks")
    return {tuple(row.values()) for row in rows}


_FAMILY = """
WITH RECURSIVE tree (oid) AS (
    SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'm', 'f')
    UNION
    SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree t ON t.oid = i.inhparent
), whole (oid) AS (
    SELECT oid FROM tree
    UNION
    SELECT c.reltoastrelid FROM pg_catalog.pg_class c JOIN tree t ON t.oid = c.oid WHERE c.reltoastrelid <> 0
)
SELECT c.oid::pg_catalog.text AS oid, pg_catalog.format('%%I.%%I', n.nspname, c.relname) AS name,
       pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid) + pg_catalog.pg_stat_get_xact_tuples_updated(c.oid)
       + pg_catalog.pg_stat_get_xact_tuples_deleted(c.oid) AS writes
  FROM whole w JOIN pg_catalog.pg_class c ON c.oid = w.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""

_LOCKS = """
SELECT l.relation::pg_catalog.text AS oid, l.mode,
       pg_catalog.pg_stat_get_xact_tuples_inserted(l.relation) + pg_catalog.pg_stat_get_xact_tuples_updated(l.relation)
       + pg_catalog.pg_stat_get_xact_tuples_deleted(l.relation) AS writes
  FROM pg_catalog.pg_locks l
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND l.granted
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
   AND l.relation = ANY (%s::pg_catalog.oid[])
"""

_OWN = """
SELECT locktype, database::pg_catalog.text, relation::pg_catalog.text, classid::pg_catalog.text, objid::pg_catalog.text,
       objsubid, mode
  FROM pg_catalog.pg_locks
 WHERE pid = pg_catalog.pg_backend_pid() AND granted AND locktype IN ('relation', 'advisory')
"""
