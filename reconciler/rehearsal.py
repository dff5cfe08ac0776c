"""Beside the flow: a scratch database with the target's schema, gates and markers, the plan applied, the proofs played.

What needs two sessions, and whatever may not be tried on the target, runs here. Nothing is written to the target.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from reconciler import definitions, execute, live, pg, sandbox
from reconciler import scratch as scratches
from reconciler.checks.proof import CHECK, ProofSpec
from reconciler.checks.proof import rehearse as with_two_sessions
from reconciler.diff import changes as differences
from reconciler.errors import ServerProblem, UsageError
from reconciler.model import Asked, Rehearsal, milliseconds
from reconciler.plan import stamp
from reconciler.prove import report
from reconciler.secrets import STAND_IN
from reconciler.survey import survey, taken

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from reconciler.model import Change, Check, Desired, Plan, ProofReport, Target, Verdict


@dataclass(frozen=True)
class Rehearsed:
    """A scratch database that stands for the target, and what it was made for."""

    dsn: str
    rehearsal: Rehearsal
    target: Target
    allow_functions: Sequence[str]
    """The installed policy's."""


def prove(
    dsn: str | None, desired: Desired, *, scratch: str | None = None, allow_untested: bool = False
) -> ProofReport:
    """Play every proof on a rehearsal of the target.

    scratch: an empty database to use instead of an embedded server of our own. Raises UsageError, ServerProblem,
    SandboxError, Refused when the live state does not allow the plan.
    """
    started = time.monotonic()
    with prepared(dsn, desired, scratch=scratch, allow_untested=allow_untested) as copy:
        verdicts = tuple(
            _played(copy, check, Asked(desired, copy.allow_functions, inside=True))
            for check in desired.checks.values()
            if check.kind == CHECK.name
        )
    return report(copy.target, verdicts, time.monotonic() - started, copy.rehearsal)


@contextmanager
def prepared(
    dsn: str | None, desired: Desired, *, scratch: str | None = None, allow_untested: bool = False
) -> Generator[Rehearsed]:
    """A rehearsal of the target with the plan applied, for as long as the block runs. Raises as `prove` does."""
    desired = taken(desired)
    with pg.connect(dsn, "prove") as conn:
        pg.check_version(conn, allow_untested=allow_untested)
        with pg.snapshot(conn):
            found = survey(conn, desired)
            plan = found.plan(datetime.now(UTC))
            schema = definitions.of_schema(conn)
    with scratches.database(scratch) as place:
        version = rehearse(dsn, place, desired, plan)
        made_for = Rehearsal(
            effect_digest=plan.effect_digest,
            schema_digest=schema,
            server_version=version,
            rehearsed_at=stamp(datetime.now(UTC)),
        )
        yield Rehearsed(place, made_for, found.target, found.last.allow_functions)


def rehearse(dsn: str | None, scratch: str, desired: Desired, plan: Plan) -> str:
    """Make the scratch database what the target will be once the plan is applied; returns its server's version.

    Raises UsageError, ServerProblem.
    """
    with pg.connect(dsn, "rehearse") as conn, pg.connect(scratch, "rehearse") as copy:
        if occupied := pg.rows(copy, sandbox.NOT_EMPTY.encode(), doing="looking whether the scratch database is empty"):
            raise UsageError(
                f"The scratch database {copy.info.dbname} is not empty: it has {occupied[0]['name']}.",
                hint="A rehearsal starts from nothing; name an empty database with --scratch.",
            )
        scratches.copy_roles(conn, copy)
        scratches.copy_schema(conn, copy, dsn, scratch)
        with pg.snapshot(conn):
            hidden = scratches.secret_columns(desired)
            for table, key in scratches.rows_of(desired).values():
                scratches.copy_row(conn, copy, table, key, hidden.get(scratches.place(table, key), ()))
        # Not the setup: the ledger is the target's.
        pg.run(copy, "BEGIN")
        pg.settings(copy, milliseconds(desired.policy.apply.statement_timeout))
        execute.everything(copy, plan.changes, desired.items, desired.policy, _stand_ins)
        pg.run(copy, "COMMIT")
        known = desired.items.keys() - scratches.secret(desired)
        shown = replace(desired, items={address: desired.items[address] for address in sorted(known)})
        with pg.snapshot(copy):
            there = live.read(copy, shown, desired.policy.allow_functions)
            left = differences(shown, there, {})
        if left:
            raise ServerProblem(
                "The rehearsal is not what the plan says.",
                details=[f"{change.address}: {change.reason}" for change in left[:10]],
            )
        version = copy.info.parameter_status("server_version") or ""
    return version.split()[0]


def _stand_ins(change: Change) -> Sequence[str]:
    """A scratch database has no secrets, neither those that are there nor those that are to come."""
    sealed = [
        spec for spec in (change.after, change.before) if spec is not None and isinstance(spec.get("value"), dict)
    ]
    return [STAND_IN for _ in sealed] if change.kind == "gate" else ()


def _played(copy: Rehearsed, check: Check, asked: Asked) -> Verdict:
    where = f"rehearsed on PostgreSQL {copy.rehearsal.server_version}, schema {copy.rehearsal.schema_digest[:16]}"
    if isinstance(check.spec, ProofSpec) and check.spec.sessions == 2:
        with pg.connect(copy.dsn, "prove") as conn, pg.connect(copy.dsn, "prove") as other:
            verdict = with_two_sessions(conn, other, check, asked)
    else:
        with pg.connect(copy.dsn, "prove") as conn:
            pg.run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
            pg.settings(conn, milliseconds(asked.desired.policy.apply.statement_timeout))
            verdict = CHECK.run(conn, check, asked)
            conn.rollback()
    status = "rehearsed" if verdict.status == "passed" else verdict.status
    return verdict.model_copy(update={"status": status, "detail": f"{verdict.detail}; {where}"})
