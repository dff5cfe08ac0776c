"""Beside an apply: the report of a rehearsal, held against the plan -> verdicts on proofs that no apply plays.

A report is a file, and nobody signed it: what it says is told as rehearsed, with where, and never counts as passed. It
cannot stand for a proof that the apply plays itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from reconciler import definitions
from reconciler.checks.proof import ProofSpec
from reconciler.errors import PlanDamaged, Stale, UsageError
from reconciler.model import ProofReport, canonical
from reconciler.plan import read

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Address, Desired, Plan, Verdict
    from reconciler.pg import Connection

AGAIN = "Rehearse again: reconciler prove --rehearse --out FILE."


def load(path: Path) -> ProofReport:
    """The report from its file. Raises UsageError, PlanDamaged."""
    try:
        return ProofReport.model_validate_json(canonical(read(path, "report of a rehearsal")))
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanDamaged(f"{path} is no report of a rehearsal: {first['loc']}: {first['msg']}.") from None


def verdicts(found: ProofReport, plan: Plan, desired: Desired) -> dict[Address, Verdict]:
    """What the rehearsal came to for each proof that needs one. Raises UsageError when it was of anything else."""
    made_for = found.rehearsal
    if made_for is None:
        raise UsageError("The report is of no rehearsal: its proofs were played on the target.", hint=AGAIN)
    # The digest covers every change, every check with its text, and the database.
    if made_for.effect_digest != plan.effect_digest:
        raise UsageError(
            f"The rehearsal was of other effects ({made_for.effect_digest[:12]}, not {plan.effect_digest[:12]}).",
            details=[f"it was made for database {found.target.database} ({found.target.name})"],
            hint=AGAIN,
        )
    if found.target.server_version != plan.target.server_version:
        raise UsageError(
            f"The rehearsal was for PostgreSQL {found.target.server_version}, the plan is for"
            f" {plan.target.server_version}.",
            hint=AGAIN,
        )
    told = {verdict.address: verdict for verdict in found.proofs}
    wanted = {
        address: isinstance(check.spec, ProofSpec) and check.spec.sessions == 2
        for address, check in desired.checks.items()
        if check.kind == "proof"
    }
    if wanted.keys() != told.keys():
        odd = ", ".join(sorted(wanted.keys() ^ told.keys()))
        raise UsageError(f"The rehearsal was of other proofs: {odd}.", hint=AGAIN)
    if wrong := sorted(
        address for address, verdict in told.items() if verdict.status not in {"rehearsed", "failed", "not_judged"}
    ):
        raise UsageError(f"No rehearsal can say {told[wrong[0]].status} of {wrong[0]}.", hint=AGAIN)
    where = f"by the report of {made_for.rehearsed_at}"
    return {
        address: told[address].model_copy(update={"detail": f"{told[address].detail}, {where}", "tolerated": False})
        for address, needed in wanted.items()
        if needed
    }


def same_schema(conn: Connection, found: ProofReport) -> None:
    """Is the schema still the one that was copied? Raises Stale."""
    if found.rehearsal is not None and definitions.of_schema(conn) != found.rehearsal.schema_digest:
        raise Stale(
            "The rehearsal is stale: the schema is not the one that was copied.",
            hint=f"Nothing was changed. {AGAIN}",
        )
