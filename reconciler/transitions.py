"""What transition checks ask: did this backend write to a relation during the apply? Locks are the answer (DESIGN 4).

The strongest lock that our own backend holds is exact for everything it did itself, triggers and SECURITY DEFINER
functions included. Catalogs are the exception: PostgreSQL gives their locks back at once, so of them only the counters
tell. It cannot see what another backend did on our behalf; so calls of functions with connections of their own (dblink)
are counted, where the role may have them counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from reconciler import pg
from reconciler.allowlist import CATALOG, check_query
from reconciler.parts import relation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from reconciler.model import Json
    from reconciler.pg import Connection

READING = {"AccessShareLock", "RowShareLock"}
"""Held by SELECT, and by SELECT FOR UPDATE and foreign-key checks, which change no data."""

OUTSIDE = ("adminpack", "dblink", "http", "pg_background")
"""Libraries whose functions work outside of the transaction: over connections of their own, or on the server's files.

Of others nobody can know it; what is written in an untrusted language (plpython3u ...) can do the same.
"""


class Own(NamedTuple):
    """What this backend did to the tables that a query reads.

    wrote: a sentence for each table; empty when nothing. The numbers are rows, TOAST tables left out; what a savepoint
    undid is counted. unknown: why nobody can tell; then the rest means nothing.
    """

    wrote: tuple[str, ...] = ()
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    unknown: str = ""


class _Part(NamedTuple):
    """One relation of a family, and the rows that this backend wrote to it, as counted so far or since."""

    name: str
    kind: str
    inserted: int = 0
    updated: int = 0
    deleted: int = 0

    @property
    def written(self) -> int:
        return self.inserted + self.updated + self.deleted

    def since(self, before: _Part | None) -> _Part:
        if before is None:
            return self
        rows = (now - then for now, then in zip(self[2:], before[2:], strict=True))
        return _Part(self.name, self.kind, *rows)


def family(conn: Connection, names: Sequence[str]) -> dict[str, Json]:
    """The relations with their partitions, children and TOAST tables, and this backend's own write counters for each.

    Returns what `touched` asks for; "missing" holds the names for which there is no table. The counters carry over from
    the previous transaction of the connection, so only their difference means anything (measured).
    """
    found: dict[str, Json] = {}
    missing: list[str] = []
    for name in names:
        rows = pg.rows(conn, _FAMILY, relation(name), doing=f"reading the relations of {name}")
        if not rows:
            missing.append(name)
        for row in rows:
            found[row["oid"]] = [row[field] for field in _Part._fields]
    return {"names": list(names), "found": found, "missing": missing}


def touched(conn: Connection, remembered: Json) -> list[str]:
    """What this backend did to a family beyond reading since it was remembered, a sentence each; empty when nothing."""
    parts = _since(conn, remembered)
    return sorted({*_hard(conn, parts), *_opened(conn, parts)})


def watch(conn: Connection, query: str) -> dict[str, Json]:
    """What must be remembered of everything that a query reads, so that `own` can tell our writes from others' later.

    The query must have passed `check_query`.
    """
    report = check_query(query)
    reads = family(conn, report.relations)
    kinds = {name: kind for name, kind, *_ in reads["found"].values()}
    if report.troubles or report.functions & CATALOG:
        unknown = "it calls a function that may read anything"
    elif not report.relations:
        unknown = "it reads no table"
    elif reads["missing"]:
        unknown = f"{reads['missing'][0]} is no table"
    elif foreign := [name for name, kind in kinds.items() if kind == "f"]:
        unknown = f"{foreign[0]} is a foreign table"
    else:
        unknown = _rows_uncounted(conn)
    return {**reads, "unknown": unknown and f"nobody can tell who did it, because {unknown}"}


def own(conn: Connection, watched: Json) -> Own:
    """What this backend did, since `watch`, to what the query reads."""
    unknown: str = watched["unknown"] or _rows_uncounted(conn)
    if unknown:
        return Own(unknown=unknown)
    parts = _since(conn, watched)
    if hard := sorted(set(_hard(conn, parts))):
        return Own(unknown="; ".join(hard))
    rows = [part for part in parts.values() if part.kind != "t"]
    return Own(
        wrote=tuple(sorted(_said(part) for part in parts.values() if part.written)),
        inserted=sum(part.inserted for part in rows),
        updated=sum(part.updated for part in rows),
        deleted=sum(part.deleted for part in rows),
    )


def track(conn: Connection) -> None:
    """From here to the end of the transaction have calls of functions counted, where the role may ask for it.

    At the beginning, because PL/pgSQL decides once in a transaction whether a simple expression is counted.
    """
    row = _tracking(conn)
    if row["may"] and not row["tracked"]:
        pg.run(conn, "SET LOCAL track_functions = 'all'")


def calls(conn: Connection) -> dict[str, int | None]:
    """How often this session called each function of OUTSIDE, by identity. None: never; 0: it never came back."""
    rows = pg.rows(conn, _CALLS, {"libraries": list(OUTSIDE)}, doing="counting calls of functions")
    return {row["name"]: row["calls"] for row in rows}


def called(conn: Connection, before: Mapping[str, int | None]) -> list[str]:
    """Which functions of OUTSIDE were called since, a sentence each. Only what `track` has counted is seen."""
    return [
        f"{name} was called, which no rollback reaches"
        for name, number in calls(conn).items()
        if number != before.get(name)
    ]


def uncounted(conn: Connection) -> tuple[str, str] | None:
    """(missing, sentence) when there are functions of OUTSIDE and this role may not have their calls counted."""
    there = calls(conn)
    if not there or _tracking(conn)["tracked"]:
        return None
    name, more = next(iter(there)), f" and {len(there) - 1} more" if len(there) > 1 else ""
    grant = "GRANT SET ON PARAMETER track_functions TO it" if conn.info.server_version >= 150_000 else ""
    missing = "SET on parameter track_functions"
    return missing, (
        f"this database has {name}{more}, which no rollback reaches, and this role may not have calls counted:"
        f" {grant or 'let a superuser say ALTER ROLE ... SET track_functions = all'}"
    )


def countable(conn: Connection) -> bool | None:
    """May this role have calls of OUTSIDE counted, or are they? None: this database has no such function."""
    if not calls(conn):
        return None
    row = _tracking(conn)
    return row["tracked"] or row["may"]


def _tracking(conn: Connection) -> dict[str, Any]:
    query = _TRACKING if conn.info.server_version >= 150_000 else _TRACKING_14
    return pg.rows(conn, query, doing="looking whether calls are counted")[0]


def locks(conn: Connection) -> set[tuple[Any, ...]]:
    """Every lock on a relation that this backend holds, and every advisory lock, to compare before and after."""
    rows = pg.rows(conn, _OWN, doing="reading our own locks")
    return {tuple(row.values()) for row in rows}


def _rows_uncounted(conn: Connection) -> str:
    row = pg.rows(conn, "SELECT pg_catalog.current_setting('track_counts')::pg_catalog.bool AS counts")[0]
    return "" if row["counts"] else "track_counts is off"


def _since(conn: Connection, remembered: Json) -> dict[str, _Part]:
    """Every relation of a family, of then and of now, with what this backend wrote to it since."""
    before = {oid: _Part(*facts) for oid, facts in remembered["found"].items()}
    now = {oid: _Part(*facts) for oid, facts in family(conn, remembered["names"])["found"].items()}
    gone = {oid: _Part(part.name, part.kind) for oid, part in before.items() if oid not in now}
    # One that is new, a partition that somebody attached, had nothing of ours before.
    return gone | {oid: part.since(before.get(oid)) for oid, part in now.items()}


def _modes(conn: Connection, parts: dict[str, _Part]) -> Iterator[tuple[_Part, str]]:
    oids = [int(oid) for oid in parts]
    return ((parts[row["oid"]], row["mode"]) for row in pg.rows(conn, _LOCKS, (oids,), doing="reading our own locks"))


def _hard(conn: Connection, parts: dict[str, _Part]) -> Iterator[str]:
    """Locks stronger than writing rows takes: TRUNCATE, ALTER and the like."""
    soft = {*READING, "RowExclusiveLock"}
    return (f"{part.name}: {mode} taken" for part, mode in _modes(conn, parts) if mode not in soft)


def _opened(conn: Connection, parts: dict[str, _Part]) -> Iterator[str]:
    """What was opened for writing and written; an UPDATE that found no row takes this lock too."""
    modes = _modes(conn, parts)
    return (_said(part) for part, mode in modes if mode == "RowExclusiveLock" and part.written)


def _said(part: _Part) -> str:
    return f"{part.name}: {part.written} row{'' if part.written == 1 else 's'} written"


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
       c.relkind::pg_catalog.text AS kind,
       pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid) AS inserted,
       pg_catalog.pg_stat_get_xact_tuples_updated(c.oid) AS updated,
       pg_catalog.pg_stat_get_xact_tuples_deleted(c.oid) AS deleted
  FROM whole w JOIN pg_catalog.pg_class c ON c.oid = w.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""

_LOCKS = """
SELECT l.relation::pg_catalog.text AS oid, l.mode
  FROM pg_catalog.pg_locks l
 WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND l.granted
   AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
   AND l.relation = ANY (%s::pg_catalog.oid[])
"""

_CALLS = """
SELECT p.oid::pg_catalog.regprocedure::pg_catalog.text AS name,
       pg_catalog.pg_stat_get_xact_function_calls(p.oid) AS calls
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
 WHERE l.lanname = 'c'
   AND pg_catalog.substring(p.probin, '([^/]+?)(?:[.]so)?$') = ANY (%(libraries)s::pg_catalog.text[])
 ORDER BY 1
"""

_TRACKING = """
SELECT pg_catalog.current_setting('track_functions') = 'all' AS tracked,
       pg_catalog.has_parameter_privilege('track_functions', 'SET') AS may
"""

_TRACKING_14 = """
SELECT pg_catalog.current_setting('track_functions') = 'all' AS tracked, r.rolsuper AS may
  FROM pg_catalog.pg_roles r WHERE r.rolname = current_user
"""

_OWN = """
SELECT locktype, database::pg_catalog.text, relation::pg_catalog.text, classid::pg_catalog.text, objid::pg_catalog.text,
       objsubid, mode
  FROM pg_catalog.pg_locks
 WHERE pid = pg_catalog.pg_backend_pid() AND granted AND locktype IN ('relation', 'advisory')
"""
