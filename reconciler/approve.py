"""Fifth step of the flow: a plan and a person -> Approval; and the judgement whether approvals cover a plan."""

from __future__ import annotations

import re
import unicodedata
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import ValidationError

from reconciler import signatures
from reconciler.errors import NotApproved, PlanDamaged, ProofFailed, UsageError, Violated
from reconciler.model import (
    Approval,
    Emergency,
    Identity,
    Json,
    Listed,
    Plan,
    Policy,
    Target,
    Verdict,
    canonical,
    milliseconds,
)
from reconciler.plan import effect_digest as plan_digest
from reconciler.plan import fleet_digest, read, stamp
from reconciler.trust import check_plan

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
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
    key: Path | None = None,
    break_glass: bool = False,
    listed: Listed | None = None,
) -> Approval:
    """A person's yes to the plan's effects.

    listed: on these targets instead of the plan's own, which is one of them, for the same effects.
    accepted: the hazards, each by name. expires: a duration such as `24h`; None takes the policy's, the longest. key:
    signs it; a private key, or a public one that the agent holds the other half of.
    Raises PlanDamaged for a plan that is not what its digest says, Violated for one that could not be applied,
    NotApproved with what is missing, UsageError.
    """
    check_plan(plan)
    policy, allowed = judging(plan)
    refuse_blocked(plan)
    if not plan.has_changes:
        raise UsageError("The plan changes nothing; there is nothing to approve.")
    if key is None and (policy.approval.signed or break_glass):
        raise NotApproved(
            "This approval must be signed.",
            hint="Add --key FILE: a private SSH key, or a public one that the agent holds.",
        )
    if break_glass and approver not in policy.approval.break_glass:
        raise NotApproved(
            f"{approver} is not among the break-glass principals of the policy that judges this plan.",
            hint=f"They are {', '.join(policy.approval.break_glass) or 'none'}.",
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
    approval = Approval(
        id=str(uuid.uuid4()),
        effect_digest=plan.effect_digest if listed is None else fleet_digest(listed),
        plan_checksum=checksum,
        target=plan.target if listed is None else None,
        listed=listed,
        approver=approver,
        reason=reason,
        accepted=tuple(sorted(set(accepted))),
        attestations=tuple(sorted(set(attested))),
        issued_at=stamp(now),
        expires_at=stamp(now + timedelta(milliseconds=lifetime)),
        break_glass=break_glass,
    )
    if key is None:
        return approval
    signed = approval.model_copy(update={"signature": signatures.sign(approval.statement(), key, _namespace(approval))})
    try:
        signer(signed, allowed, now)
    except signatures.BadSignature as wrong:
        raise NotApproved(
            f"The approval of {approver} {wrong}.",
            hint="It would be refused. Approve with a key of this principal, or ask who keeps the list of approvers.",
        ) from None
    return signed


def judging(plan: Plan) -> tuple[Policy, str]:
    """The policy and the list of approvers that will judge this plan: the installed ones, as the plan shows them.

    A plan that changes them holds the installed ones as `before`; a first plan is judged by its own.
    """
    before = {change.kind: change.before for change in plan.setup if change.before is not None}
    policy = Policy.model_validate_json(canonical(before.get("policy", plan.desired["policy"])))
    listed: Json = before.get("approvers")
    return policy, plan.desired["approvers"] if listed is None else listed["allowed_signers"]


def author(plan: Plan, allowed: str, now: datetime) -> signatures.Signer | None:
    """Who made the plan, None when it does not say.

    Raises NotApproved for a plan that names somebody and is not signed by a key that the list knows under that name.
    """
    if plan.author is None and plan.author_signature is None:
        return None
    try:
        return signatures.judge(
            plan.statement(), plan.author_signature or "", allowed, plan.author or "", signatures.PLAN, now
        )
    except signatures.BadSignature as wrong:
        raise NotApproved(
            f"The plan says that {plan.author} made it, but its signature {wrong}.",
            hint="Make the plan again, signed by a key of the installed list, or leave --key away.",
        ) from None


def sign_plan(plan: Plan, name: str, key: Path) -> Plan:
    """The plan with its author's signature. Raises UsageError."""
    named = plan.model_copy(update={"author": name})
    return named.model_copy(update={"author_signature": signatures.sign(named.statement(), key, signatures.PLAN)})


def _namespace(approval: Approval) -> str:
    return signatures.BREAK_GLASS if approval.break_glass else signatures.APPROVAL


def signer(approval: Approval, allowed: str, now: datetime) -> signatures.Signer:
    """Who signed this approval, by this list at this time. Raises BadSignature."""
    return signatures.judge(
        approval.statement(), approval.signature or "", allowed, approval.approver, _namespace(approval), now
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
        found = Approval.model_validate_json(canonical(read(path, "approval")))
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanDamaged(f"{path} is no approval: {first['loc']}: {first['msg']}.") from None
    # In one spelling, so that an id that was used is the same text whenever it comes back.
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found.id):
        raise PlanDamaged(f"{path} is no approval: its id is no UUID in small letters.")
    return found


@dataclass(frozen=True)
class Court:
    """By what approvals are judged: the installed policy and list, who made the plan, what was used before, the time.

    allowed: the text of an allowed_signers file. used: approval ids that the ledger knows. now: the server's time.
    rehomed_at: when the ledger last got another home.
    """

    policy: Policy
    allowed: str
    used: Collection[str]
    now: datetime
    author: signatures.Signer | None = None
    rehomed_at: str | None = None
    target: Target | None = None
    """The database that is there; None where the digest alone says for which one the effects are."""


def verify(
    approvals: Sequence[Approval],
    court: Court,
    *,
    effect_digest: str,
    hazards: Collection[str],
    attestations: Collection[str],
) -> list[Approval]:
    """The approvals that cover these effects.

    effect_digest, hazards and attestations: as derived again, never as the plan file says. Raises NotApproved with
    every reason when they are too few. One principal counts once, however it is spelt, and one key counts once. Where
    a normal quorum is there, no glass is broken.
    """
    reasons: list[str] = []
    alone: list[Approval] = []
    valid: dict[str, Approval] = {}
    keys: dict[str, str] = {}
    for approval in approvals:
        wrong = _wrong(approval, court, effect_digest, hazards, attestations)
        by = None
        if not wrong and approval.signature is not None:
            try:
                by = signer(approval, court.allowed, court.now)
            except signatures.BadSignature as bad:
                wrong = str(bad)
        if not wrong and by is not None and keys.setdefault(by.fingerprint, approval.approver) != approval.approver:
            wrong = f"is signed with the key that {keys[by.fingerprint]} signed with"
        if not wrong and court.author is not None and _is_author(approval, by, court.author):
            wrong = "is by who made the plan"
        if wrong:
            reasons.append(f"the approval of {approval.approver} {wrong}")
        elif approval.break_glass:
            alone.append(approval)
        else:
            valid.setdefault(_principal(approval.approver), approval)
    needed = court.policy.approval.needed(hazards)
    if len(valid) < needed and alone:
        return alone[:1]
    if len(valid) < needed:
        raise NotApproved(
            "The plan is not approved.",
            details=[*reasons, f"{len(valid)} of {needed} approvals", *_missing(court, valid)],
            hint="Run `reconciler approve PLAN`, then apply again.",
        )
    return list(valid.values())


def emergencies(  # noqa: PLR0913, PLR0917 - an entry, as far as it is known before it is written
    open_: Sequence[Emergency], number: int, recorded_at: str, counted: Sequence[Approval], plan: Plan, court: Court
) -> tuple[Emergency, ...]:
    """The broken glass that is still to be told after an entry with this number and these approvals.

    open_: what was to be told before it. counted: the approvals that `verify` gave. An entry that breaks the glass adds
    itself. Any other acknowledges an emergency when its approvals would have been enough for that emergency too, by the
    policy and the list that were installed before it.
    """
    if broken := next((approval for approval in counted if approval.break_glass), None):
        added = Emergency(
            entry=number,
            recorded_at=recorded_at,
            approver=broken.approver,
            reason=broken.reason,
            hazards=plan.hazards,
            policy=court.policy.approval,
            approvers=court.allowed,
        )
        return (*open_, added)
    return tuple(one for one in open_ if not _acknowledged(one, counted, plan, court))


def _acknowledged(emergency: Emergency, counted: Sequence[Approval], plan: Plan, court: Court) -> bool:
    # As many as the emergency itself would have taken, and how long approvals hold is no matter of then.
    needed = emergency.policy.needed(emergency.hazards)
    then = emergency.policy.model_copy(update={"required": needed, "expires": court.policy.approval.expires})
    earlier = replace(
        court, policy=court.policy.model_copy(update={"approval": then}), allowed=emergency.approvers, used=()
    )
    try:
        verify(counted, earlier, effect_digest=plan.effect_digest, hazards=plan.hazards, attestations=plan.attestations)
    except NotApproved:
        return False
    return True


def _is_author(approval: Approval, by: signatures.Signer | None, author: signatures.Signer) -> bool:
    same_key = by is not None and by.fingerprint == author.fingerprint
    return same_key or _principal(approval.approver) == _principal(author.principal)


def _missing(court: Court, valid: Mapping[str, Approval]) -> list[str]:
    """Who could still approve, by the installed list."""
    if not court.policy.approval.signed:
        return []
    barred = {_principal(court.author.principal)} if court.author else set[str]()
    listed = signatures.who(court.allowed, signatures.APPROVAL, court.now)
    names = [name for name in listed if _principal(name) not in {*valid, *barred}]
    return [f"may still approve: {', '.join(names) or 'nobody'}"]


def _principal(name: str) -> str:
    """The name without what the eye does not tell apart: case, width, accents composed or not, spaces, marks."""
    seen = (char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) not in {"Cf", "Cc"})
    return "".join("".join(seen).casefold().split())


def _wrong(
    approval: Approval, court: Court, effect_digest: str, hazards: Collection[str], attestations: Collection[str]
) -> str:
    """Why this approval does not count, signature aside; empty when it does."""
    policy, moment = court.policy.approval, stamp(court.now)
    unaccepted = sorted(set(hazards) - set(approval.accepted))
    unattested = sorted(set(attestations) - set(approval.attestations))
    reasons = (
        (approval.id in court.used, "was used before; an approval is for one apply"),
        (
            court.target is not None and not _names(approval, court.target),
            f"is for {_place(approval)}, not for this database",
        ),
        (
            not covers(approval, effect_digest, court.target),
            f"is for other effects ({approval.effect_digest[:12]}, not {effect_digest[:12]})",
        ),
        (moment >= approval.expires_at, f"expired at {approval.expires_at}"),
        (
            _lifetime(approval) > timedelta(milliseconds=milliseconds(policy.expires)),
            f"is meant to hold longer than the installed policy's {policy.expires}",
        ),
        (
            moment < _earliest(approval),
            f"was issued at {approval.issued_at}, which is in the future of the server's clock",
        ),
        (
            approval.issued_at <= (court.rehomed_at or ""),
            f"was issued at {approval.issued_at}, before the ledger was rehomed at {court.rehomed_at}, which voids it",
        ),
        (not approval.reason.strip(), "gives no reason"),
        (bool(unaccepted), f"does not accept {', '.join(unaccepted)}"),
        (bool(unattested), f"does not attest {', '.join(unattested)}"),
        (
            approval.signature is None and (policy.signed or approval.break_glass),
            "is not signed, and the installed policy asks for signatures",
        ),
        (
            approval.break_glass and approval.approver not in policy.break_glass,
            "breaks the glass, which the installed policy does not let this principal do",
        ),
    )
    return next((sentence for is_wrong, sentence in reasons if is_wrong), "")


def covers(approval: Approval, effect_digest: str, target: Target | None = None) -> bool:
    """Is it for these effects on this target? The digest says both; `target` only spares looking through a list.

    A list is covered when the digest is that of the effects on one of the databases in it, so neither a list that
    was changed nor effects of another group pass; and the list must be the one that the approval's own digest is of.
    """
    if approval.listed is None:
        return approval.effect_digest == effect_digest
    known = [one for one in approval.listed.targets if target is None or _identity(one) == _identity(target)]
    return approval.effect_digest == fleet_digest(approval.listed) and any(
        plan_digest(approval.listed.effects_digest, one) == effect_digest for one in known
    )


def _names(approval: Approval, target: Target) -> bool:
    if approval.target is not None:
        return _identity(approval.target) == _identity(target)
    return approval.listed is not None and _identity(target) in map(_identity, approval.listed.targets)


def _identity(target: Target | Identity) -> tuple[str, str, str]:
    return target.name, target.database, target.system_identifier


def _place(approval: Approval) -> str:
    if approval.target is not None:
        target = approval.target
        return f"target {target.name}, database {target.database} of system {target.system_identifier}"
    listed = approval.listed
    return f"{len(listed.targets)} targets of fleet {listed.fleet}" if listed is not None else "no target"


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
