"""Inside an apply: deferred triggers, run to the last, because what ran at COMMIT would run after the last look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reconciler import pg
from reconciler.errors import Stale

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 20
"""How often deferred triggers may defer each other before the apply gives up."""


def drain(conn: pg.Connection, statement_timeout_ms: int, in_time: Callable[[], object]) -> None:
    """Run every deferred trigger now; afterwards the session is as `pg.settings` leaves it, and the role our own.

    A trigger can defer the next one again, so it is repeated until nothing is written: only a write can queue one. That
    is known from our own counters; where they cannot tell, and there are triggers to defer, the apply ends.
    in_time: asked between the rounds, raises when there is no time left. Raises Stale.
    """
    for _ in range(ROUNDS):
        before = _look(conn)
        pg.run(conn, "SET CONSTRAINTS ALL IMMEDIATE", "making deferred constraints immediate")
        after = _look(conn)
        if after["writes"] == before["writes"]:
            _refuse_blind(after)
            pg.run(conn, "SET LOCAL ROLE NONE")
            pg.settings(conn, statement_timeout_ms)
            return
        in_time()
    raise Stale(
        "Rolled back: deferred triggers keep writing and deferring each other.",
        hint="Look for triggers that execute SET CONSTRAINTS.",
    )


def _look(conn: pg.Connection) -> dict[str, Any]:
    return pg.rows(conn, _COUNTERS, doing="reading our own write counters")[0]


def _refuse_blind(seen: dict[str, Any]) -> None:
    """TRUNCATE and DROP take what was written before out of the counters again: then they need not have moved."""
    if not seen["deferrable"]:
        return
    if not seen["counted"]:
        raise Stale(
            "Rolled back: track_counts is off, so nobody can tell when deferred triggers are done.",
            hint="Set it to on, at least for the role that applies.",
        )
    if seen["emptied"]:
        raise Stale(
            f"Rolled back: a trigger emptied, created, altered or dropped {', '.join(seen['emptied'])}, so nobody can"
            " tell when deferred triggers are done.",
            hint="Look at the triggers of the tables that were written.",
        )


_COUNTERS = """
SELECT (SELECT coalesce(pg_catalog.sum(s.n_tup_ins + s.n_tup_upd + s.n_tup_del), 0)::pg_catalog.int8
          FROM pg_catalog.pg_stat_xact_all_tables s) AS writes,
       pg_catalog.current_setting('track_counts')::pg_catalog.bool AS counted,
       EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgdeferrable AND NOT t.tgisinternal) AS deferrable,
       (SELECT pg_catalog.array_agg(DISTINCT l.relation::pg_catalog.regclass::pg_catalog.text)
          FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation
         WHERE l.pid = pg_catalog.pg_backend_pid() AND l.granted AND l.locktype = 'relation'
           AND l.mode = 'AccessExclusiveLock' AND coalesce(c.relkind IN ('r', 'p'), true)
           -- The ledger, which the first apply creates.
           AND c.relnamespace IS DISTINCT FROM
               (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'reconciler')) AS emptied
"""
