"""Plans, drift and outcomes for a terminal. The summary lines are API (DESIGN 5) and golden-tested."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, cast

from reconciler.model import Command, Tried

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reconciler.drift import Accepted, Attribution, DriftReport, Item
    from reconciler.evidence import Evidence
    from reconciler.model import (
        Approval,
        Backup,
        BackupPolicy,
        Change,
        Drift,
        FieldChange,
        Finding,
        Json,
        Locks,
        Need,
        NotCompared,
        Obstacle,
        Outcome,
        Plan,
        Privileges,
        ProofReport,
        Summary,
        Target,
        Verdict,
    )
    from reconciler.mutate import MutationReport
    from reconciler.verify import History

COLOURS = {"+": "32", "~": "33", "-": "31", "!": "1;31", ".": "36", "-/+": "31", "?": "1;31"}
MEANING = {
    "+": "add",
    "~": "change",
    "-": "remove",
    "-/+": "remove and then add",
    ".": "forget",
    "!": "violated or not judged",
}
SHORT = 120
"""Longer values are shortened in lists of fields; the statements below them are always complete."""


def plan(found: Plan, *, colour: bool, verbose: bool) -> str:
    """A plan, complete: every change with its hazards, what differs, and the text of each statement."""
    page = _Page(colour)
    page.line(f"{found.state.name} {found.state.release} -> {_target(found.target)}")
    if found.snapshot_of is not None:
        page.line(snapshot_line(found))
    if found.setup:
        page.line("", "Setup:")
        for change in found.setup:
            _change(page, change)
    if found.drift:
        page.line("", "Note: objects have changed outside of reconciler since the last apply:")
        for item in found.drift:
            _moved(page, item)
    if found.changes:
        page.line("", "Changes:")
        for change in found.changes:
            _change(page, change)
    _verdicts(page, found.checks, verbose=verbose, to_sign=True)
    _findings(page, found.findings)
    _locks(page, found, verbose=verbose)
    _privileges(page, found.privileges if verbose else None)
    _not_compared(page, found.not_compared, verbose=verbose)
    page.legend()
    page.line("", plan_line(found))
    page.line(checks_line(found.invariants, found.proofs, found.surface))
    if found.has_changes:
        _before_apply(page, found)
    return page.text()


def snapshot_line(found: Plan) -> str:
    """How old what a plan was made from was then; empty where it was read while the plan was made."""
    if found.snapshot_of is None:
        return ""
    taken, made = datetime.fromisoformat(found.snapshot_of), datetime.fromisoformat(found.created_at)
    old = ago((made - taken).total_seconds())
    return f"Planned from a snapshot of {found.snapshot_of}, {old} old; an apply looks at the database itself."


def ago(seconds: float) -> str:
    """A span in the largest unit of which there are two: `90 s`, `5 min`, `26 h`, `3 d`."""
    whole = max(0, int(seconds))
    unit, size = next(
        ((name, size) for name, size in (("d", 86400), ("h", 3600), ("min", 60)) if whole >= 2 * size), ("s", 1)
    )
    return f"{whole // size} {unit}"


def _before_apply(page: _Page, found: Plan) -> None:
    """What an apply asks for, and what an approval is of."""
    if found.hazards:
        page.line(f"Hazards to accept: {', '.join(found.hazards)}.")
    page.line(f"Backup: {backup_policy(found.backup)}.")
    if found.privileges is not None:
        page.line(f"Apply needs: {needs_line(found.privileges)} {lacks_line(found.privileges)}")
    page.line(f"Effect digest: {found.effect_digest} (expires {found.expires_at})")


def plan_line(found: Plan) -> str:
    """`Plan: 10 to add, 1 to change, 0 to remove.` or the sentence that there is nothing to do."""
    if not found.has_changes:
        return "No changes. The database matches the desired state."
    return f"Plan: {_numbers(found.summary, 'to add', 'to change', 'to remove', 'to forget')}."


def backup_policy(policy: BackupPolicy) -> str:
    """Which backup an apply makes, in words."""
    match policy:
        case "none":
            return "none"
        case Command(command=command):
            return f"by the command {shlex.join(command)}, before and after"
        case Tried(kind=kind):
            return f"{BACKUPS[kind]}, restored on a scratch server to verify it, before and after"
        case _:
            return f"{BACKUPS[policy]}, before and after"


BACKUPS = {"governed": "what is governed", "full": "the whole database by pg_dump"}


def size(number: int) -> str:
    """Bytes, shortened: `15.4 kB`."""
    return f"{number / 1e6:.1f} MB" if number >= 1_000_000 else f"{number / 1e3:.1f} kB"


def backup_made(made: Backup) -> str:
    """One backup, on a line."""
    if made.file is None:
        return f"Backup {made.moment}: {made.tool}, {made.seconds:.1f} s"
    what = f"{made.file}, {size(made.bytes or 0)}, {made.tool}"
    return f"Backup {made.moment}: {what}, {made.seconds:.1f} s, SHA-256 {made.sha256}"


def checks_line(invariants: Sequence[Verdict], proofs: Sequence[Verdict] = (), surface: Sequence[Verdict] = ()) -> str:
    """The line that counts verdicts. What is judged later is said, never counted as done."""

    def of(verdicts: Sequence[Verdict], status: str) -> int:
        return sum(verdict.status == status for verdict in verdicts)

    later = of(invariants, "deferred")
    failed, unjudged, waiting = of(proofs, "failed"), of(proofs, "not_judged"), of(proofs, "deferred")
    hidden = of(surface, "not_judged")
    return (
        f"Invariants: {of(invariants, 'held')} held, {of(invariants, 'violated')} violated,"
        f" {of(invariants, 'attested')} attested, {of(invariants, 'not_judged')} not judged"
        + (f", {later} judged in apply" if later else "")
        + f". Proofs: {of(proofs, 'passed')} passed, {of(proofs, 'rehearsed')} rehearsed"
        + (f", {failed} failed" if failed else "")
        + (f", {unjudged} not judged" if unjudged else "")
        + (f", {waiting} not run" if waiting else "")
        + (
            f". Surface: {len(surface)} rows compared in apply"
            if of(surface, "deferred")
            else f". Surface: {of(surface, 'predicted')} of {len(surface)} as predicted"
        )
        + (f", {hidden} not judged." if hidden else ".")
    )


def drift(found: DriftReport, *, colour: bool, verbose: bool) -> str:
    """A drift report; a clean one says when it was clean."""
    page = _Page(colour)
    page.line(f"{_target(found.target)}, checked at {found.checked_at}")
    applied = found.last_applied
    page.line(
        f"Last applied: entry {applied['entry']} of {applied['recorded_at']}, release {applied['release']}"
        if applied
        else "Last applied: nothing that is known"
    )
    known = {item.address: item.attribution for item in found.items if item.attribution is not None}
    if found.drift:
        page.line("", "Drift (live is not what was last applied):")
        for item in found.drift:
            _moved(page, item)
            if item.address in known:
                page.line(f"      {attribution(known[item.address])}")
        page.line(*(f"    Not known {sentence}." for sentence in _of_all(known.values())))
    if found.pending:
        page.line("", "Pending (the files are not what was last applied):")
        for item in found.pending:
            _moved(page, item)
    _verdicts(page, found.invariants, verbose=verbose)
    _findings(page, found.findings)
    if touched := [item for item in found.items if item.item_class == "touched"]:
        page.line("", "Touched (as last applied, but written again since):")
        page.line(*(f"    {item.address}" for item in touched))
    _to_do(page, found.items)
    _accepted(page, found.accepted)
    _not_compared(page, found.not_compared, verbose=verbose)
    page.legend()
    page.line("")
    page.line(*drift_lines(found))
    return page.text()


def _to_do(page: _Page, items: Sequence[Item]) -> None:
    """What to do, once for all items that ask for the same."""
    wanted = {(item.item_class, item.todo): item for item in items if item.item_class != "touched"}
    if wanted:
        page.line("", "What to do:")
    page.line(*(f"    {item_class}: {todo}" for item_class, todo in wanted))


def _accepted(page: _Page, found: Accepted | None) -> None:
    if found is None:
        return
    page.line("", "Written into the files, for review:" if found.written else "Nothing was written into the files.")
    page.line(*(f"    {address}" for address in found.written))
    page.line(*(f"    changed: {file}" for file in found.files))
    page.line(*(f"  ! {one.address}: not written: {one.reason}" for one in found.not_written))


def _of_all(known: Iterable[Attribution]) -> list[str]:
    """What nobody knows of any of them; the rest stands beside each."""
    return sorted({sentence for one in known for sentence in one.not_known if not sentence.startswith("when")})


def attribution(found: Attribution) -> str:
    """When it was changed, or why nobody knows that, on a line."""
    words = [f"changed at {found.changed_at} (transaction {found.transaction})"] if found.changed_at else []
    words += [f"owner {found.owner}"] if found.owner else []
    words += [f"its row says (updated_at {found.updated_at})"] if found.updated_at else []
    words += [f"not known {sentence}" for sentence in found.not_known if sentence.startswith("when")]
    return "; ".join(words)


def drift_lines(found: DriftReport) -> tuple[str, str]:
    """The two lines that sum a drift report up."""
    moved = (
        f"Drift: {count(len(found.drift), 'object')} changed," if found.drift else f"No drift at {found.checked_at}."
    )
    checks = checks_line(found.invariants, found.proofs, found.surface)
    return f"{moved} {len(found.pending)} pending.", checks


def outcome(found: Outcome, *, colour: bool) -> str:
    """What an apply did."""
    page = _Page(colour)
    _done(page, found)
    return page.text()


def apply_line(found: Summary) -> str:
    """The sentence after COMMIT, `Apply complete! 10 added, 1 changed, 0 removed.`; other programs look for it."""
    return f"Apply complete! {_numbers(found, 'added', 'changed', 'removed', 'forgotten')}."


def _done(page: _Page, found: Outcome) -> None:
    page.line(apply_line(found.summary))
    page.line(checks_line(found.invariants, found.proofs, found.surface))
    page.line(f"Ledger entry {found.entry}, {found.hash}")
    page.line(f"{count(found.statements, 'statement')} in transaction {found.transaction_id}, {found.seconds:.2f} s")
    page.line(*map(backup_made, found.backups))
    if found.genesis:
        page.line(f"This is the first entry: write `ledger: {found.hash}` below targets.{found.target.name}.")
    if found.problems:
        page.line(f"Applied, but: {found.problems[0]}")
        for problem in found.problems[1:]:
            page.line(f"             {problem}")


def evidence(found: Evidence, *, colour: bool, verbose: bool) -> str:
    """The evidence of a run; verbose shows every verdict and every statement's time."""
    page = _Page(colour)
    page.line(f"{found.state.name} {found.state.release} -> {_target(found.target)}")
    page.line(f"Run {found.run_id}, {found.started_at or 'not begun'} to {found.finished_at or 'not known'}")
    for yes in found.approvals:
        page.line(f"Approved by {yes.approver}: {yes.reason}")
        if yes.attestations:
            page.line(f"  attests {', '.join(yes.attestations)}")
    if verbose:
        page.line("", "Statements:")
        for statement in found.executed:
            role = f"  -- as {statement.role}" if statement.role else ""
            page.line(f"    {statement.seconds * 1000:8.1f} ms  {statement.address}{role}")
        page.line("", "Stages:")
        for stage in found.stages:
            page.line(f"    {stage.seconds:8.3f} s   {stage.name}")
    _verdicts(page, found.checks, verbose=verbose)
    _findings(page, found.findings)
    _not_compared(page, found.not_compared, verbose=verbose)
    page.legend()
    page.line("")
    if found.outcome == "applied":
        _done(page, found)
        return page.text()
    fate = (
        "Outcome unknown: nobody can say whether it was committed."
        if found.outcome == "unknown"
        else "Not applied: nothing was changed."
    )
    page.line(f"{fate} {len(found.executed)} of {count(found.statements, 'statement')} ran.", colour=COLOURS["!"])
    page.line(*map(backup_made, found.backups))
    if found.failure is not None:
        page.line(f"Error: {found.failure.message}", *(f"  {detail}" for detail in found.failure.details))
    page.line(checks_line(found.invariants, found.proofs, found.surface))
    return page.text()


def proofs(found: ProofReport, *, colour: bool) -> str:
    """A line for each proof, and the line that counts them."""
    page = _Page(colour)
    page.line(_target(found.target))
    for verdict in found.proofs:
        symbol = "!" if verdict.status in {"failed", "not_judged"} else ""
        page.line(f"  {symbol or ' '} {verdict.address}: {verdict.status}: {verdict.detail}", symbol=symbol)
    numbers = Counter(verdict.status for verdict in found.proofs)
    words = ("passed", "rehearsed", "failed", "not_judged", "deferred")
    told = ", ".join(f"{numbers[word]} {word.replace('_', ' ')}" for word in words if numbers[word] or word == "passed")
    page.line("", f"Proofs: {told}; {found.seconds:.2f} s. Everything was rolled back.")
    return page.text()


VIOLATIONS = ("seen", "unseen", "vacuous", "not_tried")


def mutation(found: MutationReport, *, colour: bool) -> str:
    """How many faults of each kind were planted and noticed, and every one that was not."""
    page = _Page(colour)
    page.line(f"{_target(found.target)}, rehearsed on PostgreSQL {found.server_version}")
    for mutator, tally in found.mutants.items():
        rest = f", {tally.equivalent} equivalent" * bool(tally.equivalent)
        rest += f", {tally.refused} refused by PostgreSQL" * bool(tally.refused)
        symbol = "!" if tally.survived else ""
        alive = f", {tally.survived} not noticed" * bool(tally.survived)
        page.line(f"  {symbol or ' '} {mutator}: {tally.killed} of {tally.planted} noticed{rest}{alive}", symbol=symbol)
    alive = [each for each in found.survivors if not each.because]
    if alive:
        page.line("", "No proof notices:")
    for each in alive:
        page.line(f"  ! {each.id} {each.place}: {each.mutator}", symbol="!")
        page.line(f"      - {each.before}", f"      + {each.after}")
    for name, reason in found.unparsed.items():
        page.line(f"Not mutated: {name}: {reason}")
    if found.idle:
        page.line(f"Proofs that noticed nothing first: {', '.join(found.idle)}.")
    if found.unknown:
        page.line(f"No longer a mutant, take it out of the file of equivalents: {', '.join(found.unknown)}.")
    seen = Counter(each.status for each in found.invariants)
    for each in found.invariants:
        if each.status in {"unseen", "vacuous"}:
            page.line(f"  ! {each.address}: {each.status}: {each.detail}", symbol="!")
            page.line(*(f"      {attempt}" for attempt in each.attempts))
    told = ", ".join(f"{seen[word]} {word.replace('_', ' ')}" for word in VIOLATIONS if seen[word])
    page.line(f"Invariants, each violated on purpose: {told}." if told else "No invariant is declared.")
    planted = sum(tally.planted for tally in found.mutants.values())
    killed = sum(tally.killed for tally in found.mutants.values())
    same = len(found.survivors) - len(alive)
    page.line(
        "",
        f"Mutants: {killed} of {planted} noticed, {same} equivalent, {len(alive)} not noticed; {found.seconds:.0f} s.",
    )
    return page.text()


def history(found: History) -> str:
    """A line for each entry, the newest first."""
    page = _Page(colour=False)
    for past in reversed(found.entries):
        numbers = f"+{past.added} ~{past.changed} -{past.removed}" + f" .{past.forgotten}" * bool(past.forgotten)
        who = ", ".join(past.approvers) + (" (signed)" if past.signed else " (not signed)")
        alone = ", breaking the glass" * past.break_glass
        page.line(f"{past.number:>5}  {past.recorded_at}  {past.release}  {numbers}  {who}{alone}  {past.hash[:16]}")
    page.line(f"Entries of {found.name}: {len(found.entries)}.")
    return page.text()


def approval(found: Approval, *, colour: bool) -> str:
    """An approval."""
    page = _Page(colour)
    page.line(f"Approval {found.id} by {found.approver}: {found.reason}")
    page.line(f"For {_for(found)}, effect digest {found.effect_digest}")
    if found.listed is not None:
        page.line(
            *(f"  {one.name} (database {one.database}, system {one.system_identifier})" for one in found.listed.targets)
        )
    page.line(f"Accepts {', '.join(found.accepted) or 'no hazards, there are none'}")
    if found.attestations:
        page.line(f"Attests {', '.join(found.attestations)}")
    page.line(f"Issued {found.issued_at}, expires {found.expires_at}; {'signed' if found.signature else 'not signed'}")
    return page.text()


def _for(found: Approval) -> str:
    if found.target is not None:
        return _target(found.target)
    return (
        "no target" if found.listed is None else f"{count(len(found.listed.targets), 'target')} of {found.listed.fleet}"
    )


class _Page:
    """Lines of output; remembers which symbols were used. Nothing that comes from outside reaches the terminal raw."""

    def __init__(self, colour: bool) -> None:
        self._lines: list[str] = []
        self._used: list[str] = []
        self._colour = colour

    def line(self, *texts: str, symbol: str = "", colour: str = "") -> None:
        """`symbol`: one of the legend, with its colour. `colour`: a colour alone, for the lines of a diff."""
        chosen = COLOURS.get(symbol, colour)
        for text in texts:
            # A name with a line end in it must not look like a line of ours.
            shown = printable(text).replace("\n", "\\n")
            if self._colour and chosen:
                shown = f"\x1b[{chosen}m{shown}\x1b[0m"
            self._lines.append(shown)
        if symbol in MEANING and symbol not in self._used:
            self._used.append(symbol)

    def legend(self) -> None:
        if self._used:
            self.line(
                "", "Symbols: " + ", ".join(f"{symbol} {MEANING[symbol]}" for symbol in MEANING if symbol in self._used)
            )

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def as_json(document: Json) -> str:
    """JSON for people and programs: the same document, and harmless on a terminal as well."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # Such characters stand inside of strings only, where \uXXXX means the same.
    return _HARMFUL.sub(lambda match: json.dumps(match[0])[1:-1], text)


def printable(text: str) -> str:
    """The text with every character that moves, hides or reorders text (all but tab and line feed) written out."""

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return _HARMFUL.sub(written, text)


_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def _target(target: Target) -> str:
    return f"{target.name} (database {target.database}, PostgreSQL {target.server_version})"


def count(number: int, noun: str) -> str:
    """`1 statement`, `2 statements`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(summary: Summary, add: str, change: str, remove: str, forget: str) -> str:
    text = f"{summary.add} {add}, {summary.change} {change}, {summary.remove} {remove}"
    return f"{text}, {summary.forget} {forget}" if summary.forget else text


def symbol(actions: Sequence[str]) -> str:
    """Terraform's symbol of an action."""
    if list(actions) == ["remove", "add"]:
        return "-/+"
    return {"add": "+", "change": "~", "remove": "-", "forget": "."}[actions[0]]


def _change(page: _Page, change: Change) -> None:
    sign = symbol(change.actions)
    page.line(f"  {sign} {change.address}  ({change.reason})", symbol=sign)
    if change.hazards:
        page.line(f"      hazards: {', '.join(change.hazards)}")
    for field in change.fields:
        _field(page, field, first=change.actions == ("add",))
    for statement in change.statements:
        role = f"  -- as {statement.role}" if statement.role else ""
        lines = statement.text.strip().split("\n")
        lines[-1] += ";" + role
        for text in lines:
            page.line(f"      {text}")


def _moved(page: _Page, item: Drift) -> None:
    sign = symbol(item.actions)
    page.line(f"  {sign} {item.address}  ({item.reason})", symbol=sign)
    for field in item.fields:
        _field(page, field)


def _field(page: _Page, field: FieldChange, *, first: bool = False) -> None:
    """One value before and after. first: there was no object, so what was before says nothing."""
    before, after = field.before, field.after
    if first and isinstance(after, str) and "\n" in after:
        page.line(f"      {field.name}:", *(f"        {line}" for line in after.splitlines()))
        return
    if first:
        page.line(f"      {field.name}: {_value(after, 'nothing')}")
        return
    if isinstance(before, str) and isinstance(after, str) and ("\n" in before or "\n" in after):
        page.line(f"      {field.name}:")
        for text in _unified(before, after):
            page.line(f"        {text}", colour=COLOURS.get(text[:1], "") if text[:1] in "+-" else "")
        return
    nobody = "PUBLIC" if _GRANTEE.fullmatch(field.name) else "nothing"
    page.line(f"      {field.name}: {_value(before, nobody)} -> {_value(after, nobody)}")


def _unified(before: str, after: str) -> Iterable[str]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2))[2:]
    # Bodies that differ only in line ends or a last newline look alike line by line.
    return lines or [f"{len(before)} characters -> {len(after)} characters; only line ends differ"]


_GRANTEE = re.compile(r"acl\[\d+\]\['grantee'\]")
_GRANT = {"grantee", "grantor", "grantable"}


def _value(value: Json, nothing: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as canonical JSON writes it
    text = nothing if value is None else _whole(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}… ({len(text)} characters)"


def _whole(value: Json) -> str:
    """A value with all that is in it. A grant to nobody in particular is one to PUBLIC; a role's name is quoted."""
    if isinstance(value, list):
        return f"[{', '.join(_whole(item) for item in cast('list[Json]', value))}]"
    if isinstance(value, dict):
        thing = cast("dict[str, Json]", value)
        public = thing.keys() == _GRANT and thing["grantee"] is None
        pairs = (
            f"{name!r}: {'PUBLIC' if public and name == 'grantee' else _whole(item)}" for name, item in thing.items()
        )
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


def _verdicts(page: _Page, verdicts: Sequence[Verdict], *, verbose: bool, to_sign: bool = False) -> None:
    """What did not pass; with verbose everything. to_sign: also the claims that an approver is asked to sign for."""
    quiet = {"held", "passed", "predicted", "deferred"}
    shown = [verdict for verdict in verdicts if verbose or verdict.status not in quiet or (to_sign and verdict.missing)]
    if shown:
        page.line("", "Checks:")
    for verdict in shown:
        symbol = "!" if verdict.status in {"violated", "not_judged", "failed", "differs"} else ""
        page.line(f"  {symbol or ' '} {verdict.address}: {verdict.status}: {verdict.detail}", symbol=symbol)


def _findings(page: _Page, findings: Sequence[Finding]) -> None:
    if findings:
        page.line("", "Findings:")
    for finding in findings:
        page.line(f"    {finding.address}: {finding.code}: {finding.message}")


def _locks(page: _Page, found: Plan, *, verbose: bool) -> None:
    """Who was in the way; with verbose also what is locked, in one line."""
    if found.locks is None:
        return
    if verbose:
        page.line("", f"Locks until COMMIT: {locks_line(found.locks)}")
    if found.locks.in_the_way or not found.locks.looked:
        page.line("", f"In the way at {found.created_at} ({patience(found)}):")
        for one in found.locks.in_the_way:
            page.line(f"    {one.place}: {person(one)}; {one.holds}")
        for sentence in found.locks.not_seen:
            page.line(f"    {sentence}")


def _privileges(page: _Page, found: Privileges | None) -> None:
    """Everything that an apply needs, and what for; what the role lacks is marked."""
    if found is None:
        return
    page.line("", f"An apply needs (looked up as role {found.role}):")
    for need in found.needed:
        lacks = f", which {found.role} lacks" if need in found.missing else ""
        page.line(f"    {need.words}{lacks}  ({purposes(need)})")
    page.line(*(f"    {sentence}" for sentence in found.not_seen))


MOST_PURPOSES = 3
"""Of what a privilege is for, so many are named; the rest are counted."""


def purposes(need: Need) -> str:
    """What it is for."""
    named = ", ".join(need.addresses[:MOST_PURPOSES])
    more = len(need.addresses) - MOST_PURPOSES
    return f"{named} and {more} more" if more > 0 else named


MOST_TABLES = 3
"""More of them that are only read are counted."""


def needs_line(found: Privileges) -> str:
    """What an apply needs, in a sentence: privileges on one thing together, tables that are only read counted."""
    by_thing: dict[tuple[str, str, str | None], list[str]] = {}
    for need in found.needed:
        by_thing.setdefault((need.on, need.name, need.role), []).append(need.privilege)
    alike: dict[tuple[str, tuple[str, ...], str | None], list[str]] = {}
    for (on, name, role), privileges in by_thing.items():
        alike.setdefault((on, tuple(sorted(privileges)), role), []).append(name)
    parts = [_needed(on, privileges, names, role) for (on, privileges, role), names in alike.items()]
    return f"{'; '.join(parts) or 'nothing'}."


def _needed(on: str, privileges: Sequence[str], names: Sequence[str], role: str | None) -> str:
    what, where = ", ".join(privileges), ", ".join(names)
    match on:
        case "role":
            return f"membership with {what.replace('USAGE', 'INHERIT')} in {where}"
        case "table" if privileges == ("SELECT",) and len(names) > MOST_TABLES:
            return f"{what} on {len(names)} tables"
        case "table" | "everything":
            return f"{what} on {where}"
        case _:
            return f"{what} on {on} {where}" + (f" for role {role}" if role is not None else "")


def lacks_line(found: Privileges) -> str:
    """Who lacks what of it: a plan is usually made by a role that may only read, and that is no fault of the plan."""
    if not found.missing:
        return f"Role {found.role} has all of it."
    number = f"{len(found.missing)} of these {len(found.needed)}"
    if len(found.missing) == 1:
        number = found.missing[0].words
    return f"Role {found.role}, which made this plan, lacks {number}: apply as a role that has all of it."


def patience(found: Plan) -> str:
    """How long an apply of this plan would wait for somebody."""
    policy = found.desired["policy"]["apply"]
    return f"an apply waits {policy['lock_timeout']}, at most {policy['lock_retries'] + 1} times, then changes nothing"


def locks_line(found: Locks) -> str:
    """What is locked until COMMIT, counted; calls of functions and other rows are never kept waiting."""
    routines = Counter(lock.mode for lock in found.needed if lock.on == "routine")
    parts = [f"{mode} of {count(number, 'function')}" for mode, number in sorted(routines.items())]
    rows = sum(lock.on == "row" for lock in found.needed)
    parts += [count(rows, "row")] if rows else []
    tables = sorted({lock.name for lock in found.needed if lock.on == "table"})
    parts += [f"ROW EXCLUSIVE on {', '.join(tables)}"] if tables else []
    return f"{'; '.join(parts) or 'none'}. Nobody waits who calls a function, reads, or writes other rows."


def person(one: Obstacle) -> str:
    """Who it is, in words; what the role could not see is said."""
    if one.pid is None:
        return "somebody who worked in a savepoint, so that the process cannot be told"
    if not one.pid:
        return "a prepared transaction (see pg_prepared_xacts)"
    words = [f"process {one.pid}", f"role {one.role}", one.application or "no application_name"]
    words.append(one.state or "its state hidden from this role")
    if one.since is not None:
        words.append(f"its transaction open since {one.since}")
    return ", ".join(words)


def _not_compared(page: _Page, found: Sequence[NotCompared], *, verbose: bool) -> None:
    if not found:
        return
    if verbose:
        page.line("", "Not compared by this version:")
        for entry in found:
            page.line(f"    {entry.object_class} in {entry.where}: {entry.count}")
    else:
        counts: Counter[str] = Counter()
        for entry in found:
            counts[entry.object_class] += entry.count
        classes = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        page.line("", f"Not compared by this version: {classes}.")
