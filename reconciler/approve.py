"""Fifth step of the flow: a plan and a person -> Approval; and the judgement whether approvals cover a plan."""

from __future__ import annotations

import re
import unicodedata
import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import ValidationError

from reconciler.errors import NotApproved, PlanDamaged, UsageError, Violated
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
    if unknown := sorted(set(accepted) - set(plan.hazards)):
        raise UsageError(
            f"The plan has no hazard {', '.join(unknown)}.", hint=f"It has {', '.join(plan.hazards) or 'none'}."
        )
    if missing := [hazard for hazard in plan.hazards if hazard not in accepted]:
        raise NotApproved(
            f"Hazards not accepted: {', '.join(missing)}.",
            details=[f"{hazard}: {', '.join(plan.addresses_with(hazard))}" for hazard in missing],
            hint="Read them, then repeat with " + " ".join(f"--accept {hazard}" for hazard in missing) + ".",
        )
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
        issued_at=stamp(now),
        expires_at=stamp(now + timedelta(milliseconds=lifetime)),
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
    """Raise Violated when a check forbids this plan, naming each."""
    refuse(plan.blocking)


def refuse(verdicts: Sequence[Verdict]) -> None:
    """Raise Violated for the verdicts that block, naming each."""
    if verdicts:
        count = len(verdicts)
        raise Violated(
            f"{count} invariant{'' if count == 1 else 's'} not held; nothing can be applied.",
            details=[f"{verdict.address}: {verdict.status}: {verdict.detail}" for verdict in verdicts],
            hint="An invariant is never fixed by an apply. Find out who broke it, or what privilege is missing.",
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
    policy: Policy,
    used: Collection[str],
    now: datetime,
) -> list[Approval]:
    """The approvals that cover these effects, under the installed policy, at the server's time.

    effect_digest and hazards: as derived again, never as the plan file says. used: approval ids that the ledger knows.
    Raises NotApproved with every reason when they are too few. One principal counts once, however it is spelt.
    """
    reasons: list[str] = []
    valid: dict[str, Approval] = {}
    moment = stamp(now)
    for approval in approvals:
        who = f"the approval of {approval.approver}"
        unaccepted = sorted(set(hazards) - set(approval.accepted))
        if approval.id in used:
            reasons.append(f"{who} was used before; an approval is for one apply")
        elif approval.effect_digest != effect_digest:
            reasons.append(f"{who} is for other effects ({approval.effect_digest[:12]}, not {effect_digest[:12]})")
        elif moment >= approval.expires_at:
            reasons.append(f"{who} expired at {approval.expires_at}")
        elif _lifetime(approval) > timedelta(milliseconds=milliseconds(policy.approval.expires)):
            reasons.append(f"{who} is meant to hold longer than the installed policy's {policy.approval.expires}")
        elif moment < _earliest(approval):
            reasons.append(f"{who} was issued at {approval.issued_at}, which is in the future of the server's clock")
        elif unaccepted:
            reasons.append(f"{who} does not accept {', '.join(unaccepted)}")
        elif policy.approval.signed:
            reasons.append(f"{who} is not signed, and the installed policy asks for signatures")
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
