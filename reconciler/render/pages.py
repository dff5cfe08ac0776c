"""What a report says, whatever its format: evidence, plan, drift and approval as sections of blocks, pure.

`markdown` and `html` write the same blocks, so the two formats cannot say different things. Nothing here is escaped:
that is what the formats are for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from reconciler.model import BY_OTHERS
from reconciler.render import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from reconciler.drift import DriftReport, Item
    from reconciler.evidence import Evidence
    from reconciler.model import Approval, Change, Drift, Executed, Finding, Json, NotCompared, Plan, Scope, Verdict
    from reconciler.verify import History


class Name(str):  # noqa: SLOT000 - a mark on a text, nothing more
    """A name, a value or a digest: shown as code."""


class Status(str):  # noqa: SLOT000 - as Name
    """The word of a verdict: shown as a badge."""


Words: TypeAlias = "tuple[str, ...]"
"""Pieces of a sentence; some are names or statuses."""

BAD = frozenset({"violated", "failed", "differs", "not_judged"})
GOOD = frozenset({"held", "passed", "predicted"})
"""All other statuses are weaker than these: a person's word, another database, or later."""

SHOWN = {"predicted": "as predicted", "not_judged": "not judged"}
LONG = 200
"""Longer values are shortened in tables; statements are always complete."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph. tone: `bad`, `note` or nothing."""

    words: Words
    tone: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[Words, ...]


@dataclass(frozen=True)
class Facts:
    """Labels with what they stand for."""

    rows: tuple[tuple[str, Words], ...]


@dataclass(frozen=True)
class Table:
    """A table. numbers: the columns that are numbers, from 0. weak: what it says is weaker than verified."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Words, ...], ...]
    numbers: frozenset[int] = frozenset()
    weak: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: pieces (what, how much), and the same in words."""

    label: Words
    pieces: tuple[tuple[str, float], ...]
    shown: str


@dataclass(frozen=True)
class Bars:
    """A chart of horizontal bars on one scale."""

    caption: str
    head: tuple[str, str]
    bars: tuple[Bar, ...]

    @property
    def longest(self) -> float:
        """The length that fills the width."""
        return max((sum(amount for _, amount in bar.pieces) for bar in self.bars), default=0.0)


@dataclass(frozen=True)
class Fold:
    """Text to be opened on demand, shown as it is."""

    summary: Words
    code: str


Block: TypeAlias = "Paragraph | Bullets | Facts | Table | Bars | Fold"


@dataclass(frozen=True)
class Section:
    """A part with a heading. parts: sections one level below."""

    title: str
    blocks: tuple[Block, ...]
    parts: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report. mood: `good`, `bad` or `open`."""

    title: str
    word: str
    mood: str
    lead: tuple[Block, ...]
    sections: tuple[Section, ...]


# ------------------------------------------------------------------------------------------------------------ evidence


def evidence(found: Evidence) -> Page:
    """The report of one run: what was done, how it was judged, and what was not looked at."""
    applied = found.outcome == "applied"
    word = "applied" if applied else "outcome unknown" if found.outcome == "unknown" else "rolled back"
    sections = [
        *([] if applied else [_why_not(found)]),
        _scope_honoured(found),
        _what_changed(found, applied=applied),
        _proofs(found),
        _regression(found),
        *_invariants(found),
        *_attention(found.findings),
        _not_looked_at(found),
        _approvals(found),
        _statements(found),
        _ledger(found),
        _backups(found),
    ]
    return Page(
        title=f"{found.state.name} {found.state.release}",
        word=word,
        mood="good" if applied and not found.problems else "open" if applied or word == "outcome unknown" else "bad",
        lead=_status(found, applied=applied),
        sections=tuple(sections),
    )


def _status(found: Evidence, *, applied: bool) -> tuple[Block, ...]:
    first: list[Block] = []
    if applied:
        first.append(Paragraph((text.apply_line(found.summary),)))
        first.append(Paragraph((text.checks_line(found.invariants, found.proofs, found.surface),)))
        first += [Paragraph(("Applied, but: ", problem), "bad") for problem in found.problems]
    elif found.outcome == "unknown":
        sentence = (
            "The connection was lost while COMMIT was under way: nobody can say from here whether it was committed."
        )
        first.append(Paragraph((sentence,), "bad"))
    else:
        first.append(Paragraph(("Nothing was changed: the server rolled the transaction back.",), "bad"))
    target = found.target
    facts: list[tuple[str, Words]] = [
        ("Outcome", (Name(found.outcome),)),
        ("Run", (Name(found.run_id),)),
        ("Target", (Name(target.name), " = database ", Name(target.database), f", PostgreSQL {target.server_version}")),
        ("System identifier", (Name(target.system_identifier),)),
        ("Began (server's clock)", (found.started_at or "not known",)),
        ("Ended (server's clock)", (found.finished_at or "not known",)),
        ("Transaction", (Name(found.transaction_id or "none"), f", {found.seconds:.3f} s")),
        ("Plan", (f"made {found.planned_at}, checksum ", Name(found.plan_checksum))),
        ("Effect digest", (Name(found.effect_digest),)),
        ("Tool", (found.tool,)),
    ]
    return (*first, Facts(tuple(facts)))


def _why_not(found: Evidence) -> Section:
    blocks: list[Block] = []
    wrong = [verdict for verdict in found.checks if verdict.status in BAD]
    if found.failure is not None:
        blocks.append(Paragraph((found.failure.message,), "bad"))
        # What a verdict says stands in the table below, once.
        shown = tuple(f"{verdict.address}: " for verdict in wrong)
        if details := [detail for detail in found.failure.details if not (shown and detail.startswith(shown))]:
            blocks.append(Bullets(tuple((detail,) for detail in details)))
        if found.failure.hint:
            blocks.append(Paragraph((found.failure.hint,)))
    if wrong:
        blocks.append(_verdicts("Checks that did not pass", wrong))
    last = found.stages[-1].name if found.stages else "none"
    blocks.append(
        Paragraph(
            (
                "It had come as far as stage ",
                Name(last),
                f"; {len(found.executed)} of {found.statements} statements ran.",
            )
        )
    )
    return Section("Why it was not applied", tuple(blocks))


def _scope_honoured(found: Evidence) -> Section:
    items: list[Words] = [("Declared scope: ", *_scope(found.scope), ".")]
    inside = len(found.changes) - len(found.outside_scope)
    items.append((f"{inside} of {len(found.changes)} changes are of objects inside of it.",))
    if found.outside_scope:
        items.append(("Declared by name, outside of the scope: ", *_listed(found.outside_scope), "."))
    if found.outcome == "applied":
        items.append(
            (
                "One transaction, ",
                Name(found.transaction_id or ""),
                ". After the statements ran everything was read again: nothing was left to change.",
            )
        )
        if found.locked:
            pairs = [f"{address.partition('.')[2]} = {value}" for address, value in found.locked.items()]
            items.append(("Locked gates hold their safe values: ", *_listed(pairs), "."))
    hazards = sorted({hazard for change in (*found.setup, *found.changes) for hazard in change.hazards})
    items.append(("Hazards accepted by name: ", *_listed(hazards), ".") if hazards else ("It had no hazards.",))
    return Section("Scope honoured", (Bullets(tuple(items)),))


def _scope(scope: Scope) -> Words:
    parts: list[Words] = []
    parts += [("gates ", Name(one.matching), " in ", Name(one.store)) for one in scope.gates]
    parts += [("functions ", Name(f"{one.schema_name}.{one.matching}")) for one in scope.functions]
    parts += [("rows of ", Name(one.table)) for one in scope.markers]
    words: list[str] = []
    for part in parts:
        words += [", ", *part] if words else part
    return tuple(words) or ("nothing beyond what is declared by name",)


def _what_changed(found: Evidence, *, applied: bool) -> Section:
    title = "What was added and changed" if applied else "What would have been added and changed"
    blocks: list[Block] = (
        [_by_kind(found.changes, DONE if applied else WANTED)]
        if found.changes
        else [Paragraph(("No governed object.",))]
    )
    of_kind: dict[str, list[Change]] = {}
    for change in found.changes:
        kind = "forget" if "forget" in change.actions else change.kind
        of_kind.setdefault(kind, []).append(change)
    parts: list[Section] = []
    if gates := of_kind.pop("gate", []):
        parts.append(Section("Gates", (_gates(gates, found.reasons),)))
    if markers := of_kind.pop("marker", []):
        note = "A marker stands for somebody else. It is inserted once and is no sign of life."
        parts.append(Section("Markers", (_markers(markers), Paragraph((note,), "note"))))
    if functions := of_kind.pop("function", []):
        parts.append(Section("Functions", (_functions(functions, found.gates),)))
    if rest := [change for changes in of_kind.values() for change in changes]:
        parts.append(Section("Other changes", (_plainly("Other changes", rest),)))
    if found.setup:
        parts.append(Section("Setup", (_plainly("What the tool needs for itself", found.setup),)))
    return Section(title, tuple(blocks), tuple(parts))


WANTED = {"add": "to add", "change": "to change", "remove": "to remove", "forget": "to forget"}
DONE = {"add": "added", "change": "changed", "remove": "removed", "forget": "forgotten"}


def _by_kind(changes: Sequence[Change], said: Mapping[str, str]) -> Bars:
    counts: dict[str, Counter[str]] = {}
    for change in changes:
        counts.setdefault(change.kind, Counter()).update(change.actions)
    bars = [
        Bar(
            (kind,),
            tuple((action, float(count[action])) for action in said if count[action]),
            ", ".join(f"{count[action]} {word}" for action, word in said.items() if count[action]),
        )
        for kind, count in sorted(counts.items())
    ]
    return Bars("Changes by kind", ("Kind", "Changes"), tuple(bars))


def _gates(changes: Sequence[Change], reasons: Mapping[str, str]) -> Table:
    def value(change: Change) -> Words:
        before, after = (change.before or {}).get("value"), (change.after or {}).get("value")
        shown: Words = (Name(_short(after)),) if change.after is not None else ("removed",)
        return (Name(_short(before)), " → ", *shown) if change.before is not None else shown

    rows = [
        ((Name(change.address.partition(".")[2]),), value(change), (reasons.get(change.address, change.reason),))
        for change in changes
    ]
    return Table("Gates that were added or changed", ("Key", "Value", "Purpose"), tuple(rows))


def _markers(changes: Sequence[Change]) -> Table:
    rows: list[tuple[Words, ...]] = []
    for change in changes:
        thing = change.after or change.before or {}
        pairs = [
            f"{name} = {_short(value)}" for part in ("key", "columns") for name, value in thing.get(part, {}).items()
        ]
        rows.append(
            (
                (Name(change.address.partition(".")[2]),),
                (Name(str(thing.get("table", ""))),),
                _listed(pairs),
            )
        )
    return Table("Rows that stand for a worker", ("Marker", "Table", "Row"), tuple(rows))


def _functions(changes: Sequence[Change], gates: Mapping[str, tuple[str, ...]]) -> Table:
    rows: list[tuple[Words, ...]] = []
    for change in changes:
        thing = change.after or change.before or {}
        rights = "SECURITY DEFINER" if thing.get("security_definer") else "invoker"
        owner = str(thing.get("owner", ""))
        callers = [
            str(grant.get("grantee") or "PUBLIC") for grant in thing.get("acl", ()) if grant.get("grantee") != owner
        ]
        done = "added" if change.before is None else "removed" if change.after is None else "changed"
        if "add" in change.actions and "remove" in change.actions:
            done = "replaced"
        fields = [field.name for field in change.fields]
        rows.append(
            (
                (Name(change.address.partition(".")[2]),),
                (f"{done}: ", *_listed(fields)) if fields else (done,),
                (f"{rights}, {str(thing.get('volatility', '')).upper()}, owner ", Name(owner)),
                _listed(gates.get(change.address, ())) or ("none",),
                _listed(callers) or ("nobody but the owner",),
                (str(thing.get("comment") or ""),),
            )
        )
    head = ("Function", "Change", "Runs as", "Gates, in order", "May execute", "Purpose")
    return Table("Functions that were added or changed", head, tuple(rows))


def _plainly(caption: str, changes: Sequence[Change]) -> Table:
    rows = [((Name(change.address),), (" and ".join(change.actions),), (change.reason,)) for change in changes]
    return Table(caption, ("Object", "Action", "Why"), tuple(rows))


def _proofs(found: Evidence) -> Section:
    proofs = found.proofs
    if not proofs:
        return Section("Proofs", (Paragraph(("No proof is declared.",), "note"),))
    counts = Counter(proof.status for proof in proofs)
    said = ", ".join(f"{counts[status]} {SHOWN.get(status, status)}" for status in _ranked(counts))
    note = (
        "Each proof ran inside of the transaction, in a savepoint that was rolled back; a rehearsed one ran on another"
        " database."
    )
    blocks: list[Block] = [Paragraph((note,))]
    if counts["rehearsed"]:
        said_elsewhere = (
            "What was rehearsed is told as the report says that was given to the apply. It is bound to these effects"
            " and to the schema, nobody signed it, and this run did not see it happen."
        )
        blocks.append(Paragraph((said_elsewhere,), "note"))
    blocks.append(_verdicts("Proofs", proofs, why=found.reasons, what="What it shows"))
    of: dict[str, list[str]] = {}
    for refusal in found.refusals:
        of.setdefault(refusal.refusal, []).append(refusal.proof)
    if of:
        statuses = {proof.address: proof.status for proof in proofs}
        rows = [
            (
                (Name(refusal),),
                _listed([_short_name(address) for address in addresses]),
                (_shown([statuses.get(address, "deferred") for address in addresses]),),
            )
            for refusal, addresses in of.items()
        ]
        blocks.append(Table("Refusals that the proofs expect", ("Refusal", "Shown by", "Verdict"), tuple(rows)))
    return Section(f"Proofs: {said}", tuple(blocks))


def _shown(statuses: Sequence[str]) -> Status:
    """Of several proofs that show the same: one that failed counts, and otherwise the strongest."""
    order = [*sorted(BAD), *sorted(GOOD), "rehearsed", "attested", "deferred"]
    return Status(min(statuses, key=lambda status: order.index(status) if status in order else len(order)))


def _regression(found: Evidence) -> Section:
    rows = found.surface
    if not rows:
        return Section("Regression", (Paragraph(("No surface is declared.",), "note"),))
    table = Table(
        "Numbers around the change, before and after, inside of the transaction",
        ("Surface", "Before", "After", "Δ", "Predicted", "Verdict"),
        tuple(
            (
                (_short_name(row.address),),
                (_short(row.before) if row.before is not None else "not read",),
                (_short(row.after) if row.after is not None else "not read",),
                (_delta(row.before, row.after),),
                (row.predicted or "",),
                (Status(row.status),),
            )
            for row in rows
        ),
        numbers=frozenset({1, 2, 3}),
    )
    blocks: list[Block] = [table]
    if wrong := [row for row in rows if row.status in BAD]:
        blocks.append(_verdicts("Rows that are not as predicted", wrong))
    if theirs := [row for row in rows if row.status == "predicted" and row.detail.endswith(BY_OTHERS)]:
        told = tuple(((_short_name(row.address),), (row.detail,)) for row in theirs)
        blocks.append(Table("Rows that others wrote to meanwhile, none of it by the apply", ("Surface", "What"), told))
    if found.surface_later:
        blocks += _later(rows, found.surface_later)
    fine = sum(row.status == "predicted" for row in rows)
    return Section(f"Regression: {fine} of {len(rows)} as predicted", tuple(blocks))


def _later(rows: Sequence[Verdict], later: Mapping[str, str]) -> Iterable[Block]:
    """The same numbers after COMMIT: what differs then came later, by somebody else."""
    on = [row for row in rows if row.after is not None and row.after != later.get(row.address)]
    same = f"{len(rows) - len(on)} of {len(rows)} as inside the transaction"
    yield Paragraph((f"Read again after COMMIT, on a new connection: {same}.",))
    if on:
        cells = tuple(
            ((_short_name(row.address),), (_short(row.after),), (_short(later.get(row.address, "not read")),))
            for row in on
        )
        yield Table("Rows that had moved on by then", ("Surface", "Inside", "After COMMIT"), cells, frozenset({1, 2}))


def _delta(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return ""
    if before.isdecimal() and after.isdecimal():
        difference = int(after) - int(before)
        return f"{difference:+d}" if difference else "0"
    return "unchanged" if before == after else "changed"


def _invariants(found: Evidence) -> list[Section]:
    """One section for each group, those without one last."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in found.invariants:
        groups.setdefault(verdict.group, []).append(verdict)
    sections: list[Section] = []
    for group, verdicts in sorted(groups.items(), key=lambda item: (item[0] == "", item[0])):
        name = f"{group[:1].upper()}{group[1:]} list" if group else "Other invariants"
        sections.append(_group(name, verdicts, found))
    return sections or [Section("Invariants", (Paragraph(("No invariant is declared.",), "note"),))]


def _group(name: str, verdicts: Sequence[Verdict], found: Evidence) -> Section:
    judged = [verdict for verdict in verdicts if verdict.status != "attested"]
    attested = [verdict for verdict in verdicts if verdict.status == "attested"]
    counts = Counter(verdict.status for verdict in verdicts)
    said = ", ".join(f"{counts[status]} {SHOWN.get(status, status)}" for status in _ranked(counts))
    blocks: list[Block] = []
    if judged:
        blocks.append(_verdicts(f"{name}: judged by the database", judged, why=found.reasons, what="Why"))
    if attested:
        blocks.append(
            Paragraph(
                ("No query can see what follows. It is somebody's word and was not verified by this program.",), "note"
            )
        )
        signed = {
            verdict.address: [
                yes.approver for yes in found.approvals if _short_name(verdict.address) in yes.attestations
            ]
            for verdict in attested
        }
        rows = [
            (
                (_short_name(verdict.address),),
                (Status("attested"),),
                (verdict.detail,),
                _listed(signed[verdict.address]) or ("nobody",),
            )
            for verdict in attested
        ]
        head = ("Item", "Verdict", "What was claimed", "Signed for by")
        blocks.append(Table(f"{name}: attested, not verified", head, tuple(rows), weak=True))
    return Section(f"{name}: {said}", tuple(blocks))


def _ranked(counts: Mapping[str, int]) -> list[str]:
    order = ["held", "passed", "attested", "rehearsed", "deferred", "not_judged", "violated"]
    return sorted(counts, key=lambda status: order.index(status) if status in order else len(order))


def _attention(findings: Sequence[Finding]) -> list[Section]:
    if not findings:
        return []
    return [
        Section(f"Findings: {len(findings)}", (_findings("True now, and nothing that changes by itself", findings),))
    ]


def _findings(caption: str, findings: Iterable[Finding]) -> Table:
    rows = [((Name(finding.address),), (finding.code,), (finding.message,)) for finding in findings]
    return Table(caption, ("Object", "Finding", "What"), tuple(rows))


def _not_looked_at(found: Evidence) -> Section:
    blocks: list[Block] = []
    later = [verdict for verdict in found.checks if verdict.status in {"deferred", "not_judged", "rehearsed"}]
    if later:
        blocks.append(_verdicts("Declared and not judged on this database", later))
    if found.not_compared:
        blocks.append(_classes(found.not_compared))
    return Section("What was not looked at", tuple(blocks) or (Paragraph(("Nothing that is known.",)),))


def _classes(entries: Sequence[NotCompared]) -> Table:
    rows = [((entry.object_class,), (entry.where,), (str(entry.count),)) for entry in entries]
    caption = "Classes of objects that this version does not compare"
    return Table(caption, ("Class", "Where", "Number"), tuple(rows), numbers=frozenset({2}))


def _approvals(found: Evidence) -> Section:
    rows = [
        (
            (Name(yes.approver),),
            (yes.reason,),
            _listed(yes.accepted) or ("none",),
            _listed(yes.attestations) or ("none",),
            (f"{yes.issued_at} until {yes.expires_at}",),
            ("signed" if yes.signed else "not signed",),
            (Name(yes.id),),
        )
        for yes in found.approvals
    ]
    head = ("Approver", "Reason", "Hazards accepted", "Attested", "Valid", "Signature", "Id")
    return Section(
        "Approvals",
        (
            Table("Who approved exactly these effects", head, tuple(rows)),
            Paragraph(_author(found), "note"),
        ),
    )


def _author(found: Evidence) -> Words:
    if found.author is None:
        return ("Author not verified: the plan itself is not signed.",)
    return ("The plan is signed by ", Name(found.author), ", who does not count as an approver of it.")


def _statements(found: Evidence) -> Section:
    blocks: list[Block] = []
    if found.stages:
        bars = [Bar((stage.name,), (("stage", stage.seconds),), f"{stage.seconds:.3f} s") for stage in found.stages]
        blocks.append(Bars("Time per stage", ("Stage", "Seconds"), tuple(bars)))
    groups: dict[str, list[Executed]] = {}
    for statement in found.executed:
        groups.setdefault(statement.address, []).append(statement)
    if groups:
        rows = [
            (
                (Name(address),),
                (str(len(statements)),),
                _listed(dict.fromkeys(one.role for one in statements if one.role)) or ("the apply role",),
                (f"{sum(one.seconds for one in statements) * 1000:.1f}",),
            )
            for address, statements in groups.items()
        ]
        head = ("Object", "Statements", "As", "Milliseconds")
        blocks.append(Table("Statements, in the order in which they ran", head, tuple(rows), numbers=frozenset({1, 3})))
        blocks += [
            Fold(
                (Name(address), f": {text.count(len(statements), 'statement')}"),
                "\n".join(_as_script(one.text, one.role, one.seconds) for one in statements),
            )
            for address, statements in groups.items()
        ]
    fate = "" if found.outcome == "applied" else ", all of them rolled back" if found.outcome != "unknown" else ""
    return Section(f"Statements: {len(found.executed)} of {found.statements}{fate}", tuple(blocks))


def _as_script(statement: str, role: str | None, seconds: float | None = None) -> str:
    facts = [f"as {role}"] * bool(role) + ([] if seconds is None else [f"{seconds * 1000:.1f} ms"])
    said = ", ".join(facts).replace("\n", " ")
    comment = f"-- {said}\n" if said else ""
    return f"{comment}{statement.strip()};\n"


def _ledger(found: Evidence) -> Section:
    if found.entry is None:
        said = (
            "Not known: look for the run in the ledger when the server is back."
            if found.outcome == "unknown"
            else "None: what is rolled back leaves no entry."
        )
        return Section("Ledger entry", (Paragraph((said,)),))
    facts: tuple[tuple[str, Words], ...] = (
        ("Number", (str(found.entry),)),
        ("Hash", (Name(found.hash or ""),)),
        ("Previous", (Name(found.previous or ""),)),
        ("Run", (Name(found.run_id),)),
        ("Effects digest", (Name(found.effects_digest),)),
    )
    blocks: list[Block] = [Facts(facts)]
    if found.genesis:
        name = found.target.name
        blocks.append(Paragraph(("The first entry: write ", Name(f"ledger: {found.hash}"), f" below targets.{name}.")))
    return Section("Ledger entry", tuple(blocks))


def _backups(found: Evidence) -> Section:
    if not found.backups:
        rehomed = any(change.kind == "home" for change in found.setup)
        why = "nothing but the ledger is written" if rehomed else "the policy asks for none"
        return Section("Backups", (Paragraph((f"None: {why}.",)),))
    rows = [
        (
            (made.moment,),
            (made.form,),
            (Name(made.tool),),
            (Name(made.file or "none"),),
            (str(made.bytes) if made.bytes is not None else "",),
            (Name(made.sha256 or ""),),
            (made.taken_at,),
            (f"{made.seconds:.1f}",),
            ("; ".join(made.checked),),
        )
        for made in found.backups
    ]
    head = ("Apply", "Of", "By", "File", "Bytes", "SHA-256", "Snapshot of", "Seconds", "How it was checked")
    blocks: list[Block] = [Table("Backups, in the order in which they were made", head, tuple(rows), frozenset({4, 7}))]
    if found.outcome == "applied" and not any(made.moment == "after" for made in found.backups):
        blocks.append(Paragraph(("There is none of after the apply.",), "bad"))
    if any(made.file is not None for made in found.backups):
        note = (
            "A backup is of one snapshot. What others commit after that is not in it; what the run changed is in the"
            " first one as it was when the run changed it."
        )
        blocks.append(Paragraph((note,), "note"))
    blocks += [
        Fold((f"What the command said {made.moment} the apply",), "\n".join(made.said))
        for made in found.backups
        if made.said
    ]
    steps = [(f"{step.what}: ", Name(step.command)) for step in found.backups[0].restore]
    parts = (Section("How to come back by it", (Bullets(tuple(steps)),)),) if steps else ()
    return Section("Backups", tuple(blocks), parts)


# ------------------------------------------------------------------------------------------------ plan, drift, approval


def plan(found: Plan) -> Page:
    """A plan for the author and the reviewer of a change."""
    sections: list[Section] = []
    if found.changes:
        parts = tuple(_planned(change) for change in found.changes)
        sections.append(Section("Changes", (_by_kind(found.changes, WANTED), _overview(found.changes)), parts))
    if found.setup:
        sections.append(Section("Setup", (_overview(found.setup),), tuple(_planned(change) for change in found.setup)))
    if found.drift:
        sections.append(Section("Changed outside of reconciler since the last apply", (_moved("Drift", found.drift),)))
    sections += [
        *_open_checks(found.checks),
        *_attention(found.findings),
        *_in_the_way(found),
        *_needed(found),
        *_left_out(found.not_compared),
    ]
    lead: list[Block] = [
        Paragraph((text.plan_line(found),)),
        Paragraph((text.checks_line(found.invariants, found.proofs, found.surface),)),
        *([Paragraph((text.snapshot_line(found),), "note")] if found.snapshot_of else []),
    ]
    facts: list[tuple[str, Words]] = [_target(found.target.name, found.target.database, found.target.server_version)]
    if found.hazards:
        facts.append(("Hazards to accept", _listed(found.hazards)))
    if found.attestations:
        facts.append(("To be attested", _listed(found.attestations)))
    if found.has_changes:
        facts.append(("Backup", (text.backup_policy(found.backup),)))
        facts.append(("Effect digest", (Name(found.effect_digest),)))
        facts.append(("Expires", (found.expires_at,)))
    if found.locks is not None:
        facts.append(("Locks until COMMIT", (text.locks_line(found.locks),)))
    facts.append(("Tool", (found.tool,)))
    word = {"violated": "blocked", "changes": "changes"}.get(found.outcome, "no changes")
    return Page(
        title=f"Plan for {found.state.name} {found.state.release}",
        word=word,
        mood="bad" if word == "blocked" else "open" if word == "changes" else "good",
        lead=(*lead, Facts(tuple(facts))),
        sections=tuple(sections),
    )


def _in_the_way(found: Plan) -> list[Section]:
    """Who held at that moment what an apply needs; and what of that could not be seen."""
    if found.locks is None or (found.locks.looked and not found.locks.in_the_way):
        return []
    rows = [
        ((Name(one.address),), (Name(one.place),), (Name(text.person(one)),), (one.holds,))
        for one in found.locks.in_the_way
    ]
    blocks: list[Block] = [Paragraph((f"At {found.created_at}; {text.patience(found)}.",))]
    if rows:
        blocks.append(Table("Who was in the way", ("Change", "Where", "Who", "What"), tuple(rows)))
    blocks += [Paragraph((sentence,), "note") for sentence in found.locks.not_seen]
    return [Section(f"In the way: {len(rows)}", tuple(blocks))]


def _needed(found: Plan) -> list[Section]:
    """What an apply must be allowed, and which of it the role that planned is."""
    allowed = found.privileges
    if allowed is None:
        return []
    rows = [
        ((Name(need.words),), (Name(text.purposes(need)),), ("no" if need in allowed.missing else "yes",))
        for need in allowed.needed
    ]
    blocks: list[Block] = [Paragraph((text.lacks_line(allowed),))]
    blocks.append(Table("What an apply needs", ("Privilege", "For", f"Role {allowed.role} has it"), tuple(rows)))
    blocks += [Paragraph((sentence,), "note") for sentence in allowed.not_seen]
    return [Section(f"Privileges: {len(rows)} needed, role {allowed.role} lacks {len(allowed.missing)}", tuple(blocks))]


def _overview(changes: Sequence[Change]) -> Table:
    rows = [
        (
            (Name(change.address),),
            (" and ".join(change.actions),),
            _listed(change.hazards) or ("none",),
            (change.reason,),
        )
        for change in changes
    ]
    return Table("What would change", ("Object", "Action", "Hazards", "Why"), tuple(rows))


def _planned(change: Change) -> Section:
    blocks: list[Block] = []
    if change.fields:
        rows = [
            ((Name(field.name),), (Name(_short(field.before)),), (Name(_short(field.after)),))
            for field in change.fields
        ]
        blocks.append(Table(f"Fields of {change.address}", ("Field", "Now", "Then"), tuple(rows)))
    if change.statements:
        code = "\n".join(_as_script(statement.text, statement.role) for statement in change.statements)
        blocks.append(Fold((text.count(len(change.statements), "statement"),), code))
    return Section(f"{text.symbol(change.actions)} {change.address}", tuple(blocks))


def drift(found: DriftReport) -> Page:
    """A drift report; a clean one says when it was clean."""
    lines = text.drift_lines(found)
    lead: list[Block] = [Paragraph((line,)) for line in lines]
    applied = found.last_applied
    last: Words = (
        (f"entry {applied['entry']} of {applied['recorded_at']}, release ", Name(applied["release"]))
        if applied
        else ("nothing that is known",)
    )
    facts = (
        _target(found.target.name, found.target.database, found.target.server_version),
        ("Checked", (found.checked_at,)),
        ("Last applied", last),
        ("Tool", (found.tool,)),
    )
    sections: list[Section] = []
    if found.drift:
        sections.append(Section("Drift: live is not what was last applied", (_moved("Drift", found.drift),)))
    if found.pending:
        sections.append(
            Section("Pending: the files are not what was last applied", (_moved("Pending", found.pending),))
        )
    sections += _attributed(found.items)
    verdicts = (*found.invariants, *found.proofs, *found.surface)
    sections += [*_open_checks(verdicts), *_attention(found.findings)]
    sections += [*_touched(found.items), *_to_do(found.items), *_accepted(found), *_left_out(found.not_compared)]
    word = {"violated": "violated", "drift": "drift"}.get(found.outcome, "no drift")
    return Page(
        title=f"Drift of {found.target.name}",
        word=word,
        mood="good" if word == "no drift" else "bad",
        lead=(*lead, Facts(facts)),
        sections=tuple(sections),
    )


def _moved(caption: str, items: Sequence[Drift]) -> Table:
    rows: list[tuple[Words, ...]] = []
    for item in items:
        fields: list[str] = []
        for field in item.fields:
            arrow = f"{_short(field.before)} → {_short(field.after)}"
            fields += [", "] * bool(fields) + [Name(field.name), ": ", Name(arrow)]
        rows.append(((Name(item.address),), (" and ".join(item.actions),), (item.reason,), tuple(fields)))
    return Table(caption, ("Object", "Action", "What", "Fields"), tuple(rows))


def _attributed(items: Sequence[Item]) -> list[Section]:
    """When each of what drifted was written, as far as anybody knows."""
    rows: list[tuple[Words, ...]] = [
        (
            (Name(item.address),),
            (known.changed_at or "not known",),
            (Name(known.owner),) if known.owner else ("not known",),
            (Name(known.updated_at),) if known.updated_at else (),
            ("; ".join(known.not_known),),
        )
        for item in items
        if (known := item.attribution) is not None
    ]
    head = ("Object", "Changed at", "Owner", "updated_at of its row", "Not known")
    return [Section("When it drifted", (Table("What PostgreSQL knows", head, tuple(rows)),))] if rows else []


def _touched(items: Sequence[Item]) -> list[Section]:
    names: list[Words] = [(Name(item.address),) for item in items if item.item_class == "touched"]
    return [Section("Touched: as last applied, but written again since", (Bullets(tuple(names)),))] if names else []


def _to_do(items: Sequence[Item]) -> list[Section]:
    """What to do, once for all items that ask for the same."""
    counts = Counter((item.item_class, item.todo) for item in items if item.item_class != "touched")
    rows = [((Name(name),), (str(number),), (todo,)) for (name, todo), number in counts.items()]
    head = ("Class", "Items", "What to do")
    return [Section("What to do", (Table("By class", head, tuple(rows), numbers=frozenset({1})),))] if rows else []


def _accepted(found: DriftReport) -> list[Section]:
    """What was written into the files, and what could not be."""
    if found.accepted is None:
        return []
    rows: list[tuple[Words, ...]] = [((Name(name),), ("written",)) for name in found.accepted.written]
    rows += [((Name(one.address),), (f"not written: {one.reason}",)) for one in found.accepted.not_written]
    table = Table("Drift in the files", ("Object", "What became of it"), tuple(rows))
    return [Section("Accepted into the files", (table,))] if rows else []


def _open_checks(verdicts: Sequence[Verdict]) -> list[Section]:
    quiet = {"held", "passed", "predicted", "deferred"}
    shown = [verdict for verdict in verdicts if verdict.status not in quiet or verdict.missing]
    return [Section("Checks that need somebody", (_verdicts("Checks that need somebody", shown),))] if shown else []


def _left_out(classes: Sequence[NotCompared]) -> list[Section]:
    return [Section("What was not looked at", (_classes(classes),))] if classes else []


def approval(found: Approval) -> Page:
    """An approval."""
    facts: tuple[tuple[str, Words], ...] = (
        ("Approver", (Name(found.approver),)),
        ("Reason", (found.reason,)),
        _covered(found),
        ("Effect digest", (Name(found.effect_digest),)),
        ("Hazards accepted", _listed(found.accepted) or ("none",)),
        ("Attested", _listed(found.attestations) or ("none",)),
        ("Valid", (f"{found.issued_at} until {found.expires_at}",)),
        ("Signature", ("signed" if found.signature else "not signed",)),
    )
    return Page(f"Approval {found.id}", "approval", "open", (Facts(facts),), ())


def _covered(found: Approval) -> tuple[str, Words]:
    if found.target is not None:
        return _target(found.target.name, found.target.database, found.target.server_version)
    places = (
        [f"{one.name} = {one.database} on {one.system_identifier}" for one in found.listed.targets]
        if found.listed
        else []
    )
    return "Targets", _listed(places) or ("none",)


def history(found: History) -> Page:
    """Every entry of a ledger, the newest first."""
    rows: list[tuple[Words, ...]] = []
    for past in reversed(found.entries):
        who = ", ".join(past.approvers) + (" (signed)" if past.signed else " (not signed)")
        rows.append(
            (
                (str(past.number),),
                (past.recorded_at,),
                (Name(past.target),),
                (Name(past.release),),
                (f"+{past.added} ~{past.changed} -{past.removed} .{past.forgotten}",),
                (who + ", breaking the glass" * past.break_glass,),
                (Name(past.hash),),
            )
        )
    head = ("Entry", "Recorded at", "Target", "Release", "Added, changed, removed, forgotten", "Approved by", "Hash")
    table = Table("Entries of the ledger, the newest first", head, tuple(rows), numbers=frozenset({0}))
    count = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
    return Page(f"History of {found.name}", count, "open", (table,) if rows else (), ())


# --------------------------------------------------------------------------------------------------------------- small


def _target(name: str, database: str, version: str) -> tuple[str, Words]:
    return "Target", (Name(name), " = database ", Name(database), f", PostgreSQL {version}")


def _verdicts(caption: str, verdicts: Sequence[Verdict], why: Mapping[str, str] | None = None, what: str = "") -> Table:
    rows: list[tuple[Words, ...]] = []
    for verdict in verdicts:
        row: tuple[Words, ...] = (
            (_short_name(verdict.address) if why is not None else Name(verdict.address),),
            (Status(verdict.status),),
            (verdict.detail,),
        )
        rows.append((*row, (why.get(verdict.address, ""),)) if why is not None else row)
    head = ("Item", "Verdict", "What was found")
    return Table(caption, (*head, what) if why is not None else head, tuple(rows))


def _short_name(address: str) -> Name:
    return Name(address.partition(".")[2])


def _listed(names: Iterable[str]) -> Words:
    words: list[str] = []
    for name in names:
        words += [", ", Name(name)] if words else [Name(name)]
    return tuple(words)


def _short(value: Json) -> str:
    shown = "nothing" if value is None else str(value)
    return shown if len(shown) <= LONG else f"{shown[:LONG]}… ({len(shown)} characters)"
