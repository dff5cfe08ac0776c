"""A fleet's report and groups as people read them: a line for each target that there is something to say of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler.render.text import COLOURS, count, plan_line, printable

if TYPE_CHECKING:
    from reconciler.fleet.groups import Group
    from reconciler.fleet.report import FleetReport, Moved, TargetResult

MOST_MOVED = 3
"""Of what moved on a target, so much stands in its line; the rest is counted."""

SYMBOLS = {"drift": "~", "violated": "!", "proof_failed": "!", "error": "!", "unknown": "!", "applied": "+"}
"""Of an outcome, as in the other reports; everything refused has none."""


def report(found: FleetReport, *, colour: bool, verbose: bool) -> str:
    """A line for each target that is not as it should be (with `verbose` for each), and one for all."""
    quiet = {"checked", "planned"}
    width = max((len(one.name) for one in found.targets), default=0)
    lines: list[str] = []
    for one in found.targets:
        dull = one.state in quiet and one.outcome == "no_changes" and not one.findings
        if verbose or not dull:
            symbol = SYMBOLS.get(one.outcome or "", " ")
            line = printable(f"{symbol} {one.name:<{width}}  {said(one)}").rstrip().replace("\n", "\\n")
            lines.append(f"\x1b[{COLOURS[symbol]}m{line}\x1b[0m" if colour and symbol in COLOURS else line)
    return "\n".join([*lines, summary(found)]) + "\n"


def said(one: TargetResult) -> str:
    """What is to be said of one target."""
    wave = f" (wave {one.wave})" if one.wave is not None else ""
    if one.state == "not_started":
        return f"not started{wave}"
    if one.message and one.state != "applied":
        return f"{'failed: ' if one.state == 'failed' else ''}{word(one)}{wave}: {one.message}"
    parts: list[str] = []
    if one.summary is not None and one.state == "planned" and one.outcome != "no_changes":
        numbers = one.summary
        parts.append(f"{numbers.add} to add, {numbers.change} to change, {numbers.remove} to remove")
    if one.state in {"applied", "already"} and one.applied is not None:
        parts.append(f"entry {one.applied.entry} of {one.applied.at}")
    if one.violated:
        parts.append(f"violated: {', '.join(one.violated[:MOST_MOVED])}")
    if one.not_judged:
        parts.append(f"not judged: {', '.join(one.not_judged[:MOST_MOVED])}")
    found = [item for item in one.items if item.item_class in {"drift", "both", "moved_pin"}]
    if found:
        rest = f", and {len(found) - MOST_MOVED} more" if len(found) > MOST_MOVED else ""
        parts.append(", ".join(map(moved, found[:MOST_MOVED])) + rest)
    if one.findings:
        parts.append(count(one.findings, "finding"))
    if one.message:
        parts.append(one.message)
    return f"{word(one)}{wave}" + (f": {'; '.join(parts)}" if parts else "")


def word(one: TargetResult) -> str:
    """The state or the outcome, in words."""
    if one.state == "already":
        return "skipped, already applied"
    return (one.outcome or one.state).replace("_", " ")


def moved(item: Moved) -> str:
    """The object, and which part of it."""
    return f"{item.address} ({item.field})" if item.field else item.address


def summary(found: FleetReport) -> str:
    """One line for the whole round."""
    numbers: dict[str, int] = {}
    for one in found.targets:
        name = "not started" if one.state == "not_started" else "failed" if one.state == "failed" else word(one)
        numbers[name] = numbers.get(name, 0) + 1
    parts = ", ".join(f"{number} {name}" for name, number in sorted(numbers.items(), key=lambda pair: -pair[1]))
    by = f", {count(found.workers, 'worker')}" if found.workers else ""
    state = "" if found.finished_at else " The round goes on."
    cut = " Interrupted." if found.interrupted else ""
    return (
        f"Fleet {found.fleet}, {found.command}: {count(len(found.targets), 'target')}: {parts or 'nothing'};"
        f" {found.seconds:.1f} s{by}.{state}{cut}"
    )


def listing(group: Group) -> str:
    """Which targets a plan is for."""
    lines = [f"For {count(len(group.targets), 'target')} of fleet {group.fleet}, each as planned for the first:"]
    lines += [f"  {one.name} (database {one.database}, system {one.system_identifier})" for one in group.targets]
    return printable("\n".join(lines)) + "\n\n"


def group_line(group: Group) -> str:
    """What a group would change, and where."""
    names = ", ".join(group.names[:5]) + (f" and {len(group.names) - 5} more" if len(group.names) > 5 else "")
    number = count(len(group.targets), "target")
    return printable(f"{group.plan.effects_digest[:12]}, {number} ({names}): {plan_line(group.plan)}")
