"""Fifth step of the flow: a plan and a person -> Approval; and the judgement whether approvals cover a plan."""

from __future__ import annotations

import re
import unicodedata
import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import ValidationError

from reconciler.errors import NotApproved, PlanDamaged, ProofFailed, UsageError, Violated
from reconciler.model import Approval, Plan, Policy, Verdict, canonical, milliseconds
from reconciler.plan import read, stamp
from reconciler.trust import check_plan

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path


def approve(  # noqa: PLR0913 - what a person states, each once
    plan: Plan,
    checksum: str,
    *,
    approver: str,
    reason: str,
    accepted: Sequence[str],
    attested: Sequence[str] = (),
    expires: str | None,
    now: datetime,
) -> Approval:
    """A person's yes to the plan's effects.

    accepted: the hazards, each by name. expires: a duration such as `24h`; None takes the policy's, the longest.
    Raises PlanDamaged for a plan that is not what its digest says, Violated for one that could not be applied,
    NotApproved with what is missing, UsageError.
    """
    policy = check_plan(plan).policy
    refuse_blocked(plan)
    if not plan.has_changes:
        raise UsageError("The plan changes nothing; there is nothing to approve.")
    if policy.approval.signed:
        raise NotApproved(
            "The policy asks for signed approvals, which this version cannot make.",
            hint="Set governance.approval.signed to false; the installed policy must allow it too.",
        )
    if stamp(now) >= plan.expires_at:
        raise NotApproved(f"The plan expired at {plan.expires_at}.", hint="Make it again and read it again.")
    _refuse_incomplete(plan, accepted, attested)
    _check_words(approver, reason)
    longest = milliseconds(policy.approval.expires)
    try:
        lifetime = milliseconds(expires) if expires is not None else longest
    except ValueError as error:
        raise UsageError(f"--expires: {error}.") from None
    if lifetime > longest:
        raise UsageError(f"--expires {expires} is longer than the policy's {policy.approval.expires}.")
    return Approval(
        id=str(uuid.uuid4()),
        effect_digest=plan.effect_digest,
        plan_checksum=checksum,
        target=plan.target,
        approver=approver,
        reason=reason,
        accepted=tuple(sorted(set(accepted))),
        attestations=tuple(sorted(set(attested))),
        issued_at=stamp(now),
        expires_at=stamp(now + timedelta(milliseconds=lifetime)),
    )


def _refuse_incomplete(plan: Plan, accepted: Sequence[str], attested: Sequence[str]) -> None:
    """Each hazard accepted and each claim attested by name, and no other."""
    for given, wanted, what in ((accepted, plan.hazards, "hazard"), (attested, plan.attestations, "attestation")):
        if unknown := sorted(set(given) - set(wanted)):
            raise UsageError(
                f"The plan has no {what} {', '.join(unknown)}.", hint=f"It has {', '.join(wanted) or 'none'}."
            )
    if missing := [hazard for hazard in plan.hazards if hazard not in accepted]:
        raise NotApproved(
            f"Hazards not accepted: {', '.join(missing)}.",
            details=[f"{hazard}: {', '.join(plan.addresses_with(hazard))}" for hazard in missing],
            hint="Read them, then repeat with " + " ".join(f"--accept {hazard}" for hazard in missing) + ".",
        )
    if missing := [name for name in plan.attestations if name not in attested]:
        claims = {verdict.address.partition(".")[2]: verdict.detail for verdict in plan.checks}
        raise NotApproved(
            f"Not attested: {', '.join(missing)}.",
            details=[f"{name}: {claims[name]}" for name in missing],
            hint="No query can see these. Sign for what you know with "
            + " ".join(f"--attest {name}" for name in missing)
            + ".",
        )


def _check_words(approver: str, reason: str) -> None:
    if not approver.strip() or not reason.strip():
        raise UsageError("An approval needs a name and a reason.", hint='Add --as NAME and --reason "...".')
    for option, words in (("--as", approver), ("--reason", reason)):
        try:
            words.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{option} is not UTF-8.", hint="Check the locale of the terminal.") from None


def refuse_blocked(plan: Plan) -> None:
    """Raise Violated, or ProofFailed, when a check forbids this plan, naming each."""
    refuse(plan.blocking)


def refuse(verdicts: Sequence[Verdict]) -> None:
    """Raise Violated for the verdicts that block, naming each; ProofFailed when all of them are proofs'."""
    if not verdicts:
        return
    count = len(verdicts)
    details = [f"{verdict.address}: {verdict.status}: {verdict.detail}" for verdict in verdicts]
    if all(verdict.address.startswith("proof.") for verdict in verdicts):
        raise ProofFailed(
            f"{count} proof{'' if count == 1 else 's'} not passed; nothing can be applied.",
            details=details,
            hint="Look at the function on trial and at the step of the proof that is named.",
            verdicts=verdicts,
        )
    raise Violated(
        f"{count} check{'' if count == 1 else 's'} not passed; nothing can be applied.",
        details=details,
        hint="An invariant is never fixed by an apply. Find out who broke it, or what privilege is missing.",
        verdicts=verdicts,
    )


def load(path: Path) -> Approval:
    """An approval from its file. Raises UsageError, PlanDamaged."""
    try:
        return Approval.model_validate_json(canonical(read(path, "approval")))
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanDamaged(f"{path} is no approval: {first['loc']}: {first['msg']}.") from None


def verify(  # noqa: PLR0913 - the facts that a judgement needs, each once
    approvals: Sequence[Approval],
    *,
    effect_digest: str,
    hazards: Collection[str],
    attestations: Collection[str],
    policy: Policy,
    used: Collection[str],
    now: datetime,
) -> list[Approval]:
    """The approvals that cover these effects, under the installed policy, at the server's time.

    effect_digest, hazards and attestations: as derived again, never as the plan file says. used: approval ids that
    the ledger knows.
    Raises NotApproved with every reason when they are too few. One principal counts once, however it is spelt.
    """
    reasons: list[str] = []
    valid: dict[str, Approval] = {}
    for approval in approvals:
        wrong = _wrong(approval, effect_digest, hazards, attestations, policy, used, stamp(now))
        if wrong:
            reasons.append(f"the approval of {approval.approver} {wrong}")
        else:
            valid.setdefault(_principal(approval), approval)
    if len(valid) < policy.approval.required:
        reasons.append(f"{len(valid)} of {policy.approval.required} approvals")
        raise NotApproved(
            "The plan is not approved.",
            details=reasons,
            hint="Run `reconciler approve PLAN`, then apply again.",
        )
    return list(valid.values())


def _principal(approval: Approval) -> str:
    """The name without what the eye does not tell apart: case, width, accents composed or not, spaces."""
    return "".join(unicodedata.normalize("NFKC", approval.approver).casefold().split())


def _wrong(  # noqa: PLR0913, PLR0917 - as verify
    approval: Approval,
    effect_digest: str,
    hazards: Collection[str],
    attestations: Collection[str],
    policy: Policy,
    used: Collection[str],
    moment: str,
) -> str:
    """Why this approval does not count; empty when it does."""
    unaccepted = sorted(set(hazards) - set(approval.accepted))
    unattested = sorted(set(attestations) - set(approval.attestations))
    longest = policy.approval.expires
    reasons = (
        (approval.id in used, "was used before; an approval is for one apply"),
        (
            approval.effect_digest != effect_digest,
            f"is for other effects ({approval.effect_digest[:12]}, not {effect_digest[:12]})",
        ),
        (moment >= approval.expires_at, f"expired at {approval.expires_at}"),
        (
            _lifetime(approval) > timedelta(milliseconds=milliseconds(longest)),
            f"is meant to hold longer than the installed policy's {longest}",
        ),
        (
            moment < _earliest(approval),
            f"was issued at {approval.issued_at}, which is in the future of the server's clock",
        ),
        (bool(unaccepted), f"does not accept {', '.join(unaccepted)}"),
        (bool(unattested), f"does not attest {', '.join(unattested)}"),
        (policy.approval.signed, "is not signed, and the installed policy asks for signatures"),
    )
    return next((sentence for is_wrong, sentence in reasons if is_wrong), "")


def _lifetime(approval: Approval) -> timedelta:
    return datetime.fromisoformat(approval.expires_at) - datetime.fromisoformat(approval.issued_at)


def _earliest(approval: Approval) -> str:
    # Two clocks: the approver's machine may be a little ahead of the server's.
    issued = datetime.fromisoformat(approval.issued_at)
    return stamp(issued - timedelta(minutes=5))


def beside(plan_file: Path, approver: str) -> Path:
    """`<plan>.<principal>.approval.json` next to the plan. Raises UsageError for a name no file can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}", approver):
        raise UsageError(f"{approver!r} cannot be part of a file name.", hint="Say where to write with --out.")
    return plan_file.with_name(f"{plan_file.name}.{approver}.approval.json")


def all_beside(plan_file: Path) -> list[Path]:
    """Every approval next to the plan, by name."""
    prefix, suffix = f"{plan_file.name}.", ".approval.json"
    folder = plan_file.parent
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix) and path.name.endswith(suffix))
