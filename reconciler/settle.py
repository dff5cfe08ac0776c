"""Last step of the flow where it can be cut off: COMMIT, and finding out afterwards whether it happened."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from psycopg.pq import TransactionStatus

from reconciler import ledger, live, pg
from reconciler.errors import MissingPrivilege, OutcomeUnknown, PlanDamaged, ReconcilerError, Refused, ServerProblem
from reconciler.model import Failure
from reconciler.survey import survey
from reconciler.trust import check_plan, same_target

if TYPE_CHECKING:
    from datetime import datetime

    from reconciler.evidence import Evidence
    from reconciler.model import Desired, Entry, Plan
    from reconciler.record import Record

PATIENCE = 10.0
"""Seconds that an apply goes on asking before it gives up."""


@dataclass(frozen=True)
class Case:
    """A run whose COMMIT was sent. `command`: what an operator types to have it settled later."""

    dsn: str | None
    plan: Plan
    desired: Desired
    run_id: str
    transaction_id: str
    command: str
    allow_untested: bool


def commit(conn: pg.Connection, case: Case, record: Record) -> None:
    """COMMIT, and do not return before it is known to have happened.

    `record.committing` is true from here until the end is known, so that whatever interrupts us, nobody says that
    nothing was changed. Raises ServerProblem and KeyboardInterrupt when the server rolled back, OutcomeUnknown when
    nobody could say.
    """
    # What COMMIT answers must be on disk, whatever the role or the database has as its default.
    pg.rows(
        conn,
        "SELECT pg_catalog.set_config('synchronous_commit', 'on', true) AS value"
        " WHERE pg_catalog.current_setting('synchronous_commit') = 'off'",
    )
    record.committing = True
    try:
        answer = conn.execute("COMMIT").statusmessage
    except KeyboardInterrupt:
        if _still_open(conn) or settled(case) is None:
            record.committing = False
            raise
        record.remark = "interrupted in COMMIT; the ledger says that it was committed"
    except psycopg.Error as error:
        if not (conn.closed or conn.broken):
            # The server answered: it refused, and has rolled back.
            record.committing = False
            raise pg.translated(error, "COMMIT", unspoken=conn.unspoken) from error
        if settled(case) is None:
            record.committing = False
            raise ServerProblem(
                "The connection was lost before COMMIT; the server rolled back.",
                hint="Nothing was changed. Apply again.",
            ) from error
        record.remark = "the answer to COMMIT was lost; the ledger says that it was committed"
    else:
        if answer != "COMMIT":
            record.committing = False
            raise ServerProblem(f"The server answered COMMIT with {answer}: it rolled back.")
    record.committed = True


def _still_open(conn: pg.Connection) -> bool:
    """Was COMMIT not even sent? Then closing the connection ends the transaction. Otherwise only the server knows."""
    unsent = not conn.closed and conn.info.transaction_status == TransactionStatus.INTRANS
    conn.close()
    return unsent


def settled(case: Case, patience: float | None = None) -> Entry | None:
    """Ask on new connections until the server can say: the run's ledger entry, or None when it was rolled back.

    patience: seconds; PATIENCE when None, and 0 asks once. Raises OutcomeUnknown with the last reason, Refused for
    another database or a ledger that somebody changed, MissingPrivilege for one that this role may not read.
    """
    until = time.monotonic() + (PATIENCE if patience is None else patience)
    pause, asking_once = 0.1, patience == 0
    try:
        while True:
            try:
                with pg.connect(case.dsn, "settle") as conn:
                    pg.check_version(conn, allow_untested=case.allow_untested)
                    return ask(conn, case)
            except ReconcilerError as error:
                if asking_once and isinstance(error, Refused | MissingPrivilege):
                    raise
                reason = error
            if time.monotonic() >= until:
                break
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
    except KeyboardInterrupt:
        raise _unknown(case, OutcomeUnknown("Interrupted while asking.")) from None
    raise _unknown(case, reason) from reason


def _unknown(case: Case, reason: ReconcilerError) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"The connection was lost while COMMIT was under way, and nobody can say yet what became of run {case.run_id}.",
        details=[reason.message, *reason.details],
        hint=f"Ask again when the server is back: {case.command}",
    )


def ask(conn: pg.Connection, case: Case) -> Entry | None:
    """One look, on a new connection: the run's ledger entry when it was committed, None when it never will be.

    The ledger decides, because its entry is part of the transaction. A transaction id does not: one that a crash took
    from the server's memory is handed out again, and then its status is another transaction's (measured). It says only
    whether the transaction is over. Raises OutcomeUnknown when it is not, or when this server cannot know.
    """
    with pg.within(conn, pg.lost(PATIENCE)):
        status = _status(conn, case.transaction_id)
    # Everything from here on is seen by a snapshot that is later than the status.
    with pg.snapshot(conn):
        same_target(case.plan.target, live.identify(conn, case.desired))
        standby = pg.rows(conn, "SELECT pg_catalog.pg_is_in_recovery() AS standby")[0]["standby"]
        last = ledger.last(conn, case.desired.name)
        if not last.readable:
            raise MissingPrivilege(last.findings[0].message)
        entry = ledger.of_run(conn, case.desired.name, case.run_id) if last.exists else None
        if entry is not None:
            return entry
        if standby:
            raise OutcomeUnknown("This server is a standby: it may not have heard of the run yet. Ask the primary.")
        if status == "in progress":
            raise OutcomeUnknown(_open(conn, case.transaction_id))
        if status == "committed" and not _as_before(conn, case):
            raise OutcomeUnknown(
                f"Transaction {case.transaction_id} was committed, but the ledger has no entry of the run.",
                details=[
                    "Either a crash made the server hand the id out again, and it is another transaction's, or",
                    "somebody removed the entry. What was to be changed is not as it was: `reconciler plan` shows it.",
                ],
            )
    return None


def _status(conn: pg.Connection, transaction_id: str) -> str | None:
    """`in progress`, `committed`, `aborted`; None for one that is no longer remembered, or was never given out."""
    query = "SELECT pg_catalog.pg_xact_status(%s::pg_catalog.text::pg_catalog.xid8) AS status"
    try:
        return pg.rows(conn, query, (transaction_id,), "asking for the transaction")[0]["status"]
    except ServerProblem as error:
        if getattr(error.__cause__, "sqlstate", None) == "22023":  # "is in the future"
            return None
        raise


def _open(conn: pg.Connection, transaction_id: str) -> str:
    """The server has not noticed yet that its client is gone. Who that is, as far as this role may see it."""
    holders = pg.rows(
        conn,
        """
        SELECT a.pid FROM pg_catalog.pg_stat_activity a
         WHERE a.backend_xid = (%s::pg_catalog.text::pg_catalog.xid8)::pg_catalog.xid
        """,
        (transaction_id,),
    )
    who = f" in process {holders[0]['pid']}" if holders else ""
    return f"Transaction {transaction_id} is still open{who}: it ends when the server notices that its client left."


def _as_before(conn: pg.Connection, case: Case) -> bool:
    """Is exactly the approved work still to be done?"""
    try:
        again = survey(conn, case.desired).plan(_server_time(conn))
    except Refused:
        return False
    return again.effect_digest == case.plan.effect_digest


def _server_time(conn: pg.Connection) -> datetime:
    return pg.rows(conn, "SELECT pg_catalog.clock_timestamp() AS now")[0]["now"]


def resolve(
    dsn: str | None, found: Evidence, plan: Plan, *, command: str, allow_untested: bool
) -> tuple[Evidence, Entry | None]:
    """The evidence of a run whose outcome was unknown, as it reads now that the server was asked; and its ledger entry.

    Raises PlanDamaged and NotApproved for a plan that is not what its digest says or not the run's, and what `settled`
    raises.
    """
    desired = check_plan(plan)
    if (plan.effect_digest, plan.target) != (found.effect_digest, found.target):
        raise PlanDamaged("The plan in the folder is not the one that the run applied.")
    case = Case(dsn, plan, desired, found.run_id, found.transaction_id or "", command, allow_untested)
    entry = settled(case, 0)
    if entry is None:
        why = Failure(
            message="The connection was lost in COMMIT; asked again, the server says that it rolled back.",
            hint="Nothing was changed. Apply again.",
        )
        return found.model_copy(update={"outcome": "error", "failure": why}), None
    remark = f"the answer to COMMIT was lost; entry {entry.number} of the ledger says that it was committed"
    told = {
        "outcome": "applied",
        "entry": entry.number,
        "hash": entry.hash,
        "previous": entry.previous,
        "genesis": entry.number == 1,
        "failure": None,
        "problems": (*found.problems, remark),
    }
    return found.model_copy(update=told), entry
