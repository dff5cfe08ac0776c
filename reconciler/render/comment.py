"""A plan as one comment on a pull request: found again by its marker, never too long, removals always in sight.

What a host calls too long is measured in characters; GitHub takes 65,536.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from reconciler import approve, signatures
from reconciler.errors import UsageError
from reconciler.render import markdown, pages, text
from reconciler.render.pages import Name

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Template

    from reconciler.model import Change, Plan

LIMIT = 65_536
"""Characters of a comment on GitHub."""

LONGEST_NAMES = 20_000
"""Characters that the names of what is taken away may have, when nothing else would fit."""


@dataclass(frozen=True)
class Comment:
    """The parts that a template puts together, each harmless Markdown; empty where there is nothing to say."""

    marker: str
    title: str
    summary: str
    facts: str
    attention: str
    taken_away: str
    approve: str
    details_title: str
    details: str
    left_out: str


def plan(
    found: Plan, *, file: str = "PLAN", artefact: str = "", template: Path | None = None, limit: int = LIMIT
) -> str:
    """The comment, of at most `limit` characters.

    file: what the saved plan is called in the command that approves it. artefact: where the whole plan lies, named when
    not all of it fits. template: a Jinja file in the place of ours, which can reach nothing but the parts. Raises
    UsageError for a template that fails, or that alone is too long.
    """
    form = _template(template)
    blocks = _details(found)
    whole = _comment(found, file)

    def said(shown: int, names: int | None = None) -> str:
        parts = replace(
            whole,
            details="\n\n".join(blocks[:shown]),
            details_title=f"{shown} of {len(blocks)} parts" if shown < len(blocks) else "What would change, in full",
            left_out=_left_out(len(blocks) - shown, artefact),
            taken_away=whole.taken_away if names is None else _taken_away(found, names),
        )
        return _rendered(form, parts)

    if len(complete := said(len(blocks))) <= limit:
        return complete
    fits, too_many = -1, len(blocks)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if len(said(middle)) <= limit else (fits, middle)
    if fits >= 0:
        return said(fits)
    for names in (LONGEST_NAMES, 2_000, 0):
        if len(shortest := said(0, names)) <= limit:
            return shortest
    raise UsageError(
        f"The comment is longer than {limit} characters without any change in it.", hint="Shorten --template."
    )


def marker(found: Plan) -> str:
    """What the comment is found by, to write the next one in its place: one for each target of each name."""
    which = hashlib.sha256(f"{found.state.name}\0{found.target.name}".encode()).hexdigest()
    return f"<!-- reconciler plan {which[:32]} -->"


def _comment(found: Plan, file: str) -> Comment:
    page = pages.plan(found)
    title, *lead = markdown.render(replace(page, sections=())).rstrip("\n").split("\n\n")
    blocking = [f"- {markdown.words((Name(one.address), f': {one.status}: {one.detail}'))}" for one in found.blocking]
    return Comment(
        marker=marker(found),
        title=title,
        summary="\n\n".join(lead[:-1]),
        facts=lead[-1],
        attention="\n".join(["**This plan is blocked:**", "", *blocking]) if blocking else "",
        taken_away=_taken_away(found),
        approve=_approve(found, file),
        details_title="",
        details="",
        left_out="",
    )


def _taken_away(found: Plan, most: int | None = None) -> str:
    """Every change after which something is not there any more, or not as somebody left it.

    most: characters of names; None: a line for each.
    """
    taken = [change for change in (*found.setup, *found.changes) if _takes(change)]
    if not taken:
        return ""
    lines = [
        f"- `{text.symbol(change.actions)}` {markdown.words((Name(change.address), f' ({_takes(change)})'))}"
        for change in taken
    ]
    if most is not None:
        # One name after the other, as many as there is room for.
        names = [markdown.words((Name(change.address),)) for change in taken]
        kept, used = 0, 0
        while kept < len(names) and used + len(names[kept]) + 2 <= most:
            used += len(names[kept]) + 2
            kept += 1
        more = f" and {len(names) - kept} more" if kept < len(names) else ""
        lines = [", ".join(names[:kept]) + more]
    return "\n".join([f"**Taken away, replaced or overwritten: {len(taken)}**", "", *lines])


def _takes(change: Change) -> str:
    """In which way this change takes something away; empty when it does not."""
    if "remove" in change.actions:
        return "dropped and created" if "add" in change.actions else "removed"
    if "forget" in change.actions:
        return "no longer protected"
    return "overwrites what somebody changed" if "overwrites_drift" in change.hazards else ""


def _approve(found: Plan, file: str) -> str:
    """Who may say yes, and how."""
    if not found.has_changes or found.blocking:
        return ""
    policy, listed = approve.judging(found)
    needed = policy.approval.needed(found.hazards)
    words = [f"--accept {hazard}" for hazard in found.hazards] + [
        f"--attest {shlex.quote(name)}" for name in found.attestations
    ]
    key = " --key KEY" if policy.approval.signed else ""
    command = " ".join([f'reconciler approve {file} --as NAME{key} --reason "..."', *words])
    who = signatures.who(listed, signatures.APPROVAL, datetime.now(UTC)) if listed else []
    names = ", ".join(markdown.code(name) for name in who) or "whoever the installed policy lets"
    sentence = f"Needs {text.count(needed, 'approval')}; may approve: {names}."
    return f"{sentence}\n\n{markdown.fenced(command, 'sh')}"


def _details(found: Plan) -> list[str]:
    """Everything else, in parts that are shown whole or not at all: first what is short, then change by change."""
    page = pages.plan(found)
    changes = [section for section in page.sections if section.parts]
    others = [section for section in page.sections if not section.parts]
    blocks = [markdown.section(section, 2) for section in others]
    for section in changes:
        blocks.append(f"## {markdown.words((section.title,))}")
        blocks += [markdown.section(part, 3) for part in section.parts]
    return blocks


def _left_out(number: int, artefact: str) -> str:
    if not number:
        return ""
    there = f"<{artefact}>" if _LINK.fullmatch(artefact) else markdown.words((artefact,))
    where = f": {there}" if artefact else " with `reconciler show PLAN`."
    return f"{text.count(number, 'part')} did not fit into this comment. The whole plan is there{where}"


_LINK = re.compile(r"https?://[A-Za-z0-9./:_?=&%#~+-]+")
"""An address that ends where its brackets do."""


def _template(file: Path | None) -> Template:
    try:
        surroundings = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        if file is None:
            from importlib.resources import files

            return surroundings.from_string(files("reconciler").joinpath("templates/comment.md.j2").read_text("utf-8"))
        return surroundings.from_string(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"Cannot read the template {file}: {reason}.") from None
    except TemplateError as error:
        raise UsageError(f"The template {file} is no Jinja template: {error}.") from None


def _rendered(form: Template, parts: Comment) -> str:
    try:
        return form.render(vars(parts)).strip("\n") + "\n"
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise UsageError(f"The template cannot be filled in: {error}.") from None
