"""Reports as Markdown (GitHub's), for pull requests and evidence folders. Text from outside stays text.

Whatever stands in a name, a reason or a statement: it cannot end a code block, a cell or a fold, cannot become a link,
an image or HTML, and cannot mention anybody. A mention is found after character references were resolved, so an @ is
written inside of code, where nobody looks for one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from reconciler.render import pages
from reconciler.render.pages import Bars, Bullets, Facts, Fold, Name, Page, Paragraph, Section, Status, Table
from reconciler.render.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reconciler.drift import DriftReport
    from reconciler.evidence import Evidence
    from reconciler.model import Approval, Plan
    from reconciler.render.pages import Block, Words
    from reconciler.verify import History


def evidence(found: Evidence) -> str:
    """report.md."""
    return render(pages.evidence(found))


def plan(found: Plan) -> str:
    """A plan, whole; `comment` makes one that fits into a pull request."""
    return render(pages.plan(found))


def drift(found: DriftReport) -> str:
    """A drift report."""
    return render(pages.drift(found))


def approval(found: Approval) -> str:
    """An approval."""
    return render(pages.approval(found))


def history(found: History) -> str:
    """A ledger, as a table."""
    return render(pages.history(found))


def render(page: Page) -> str:
    """The page, complete."""
    blocks = [f"# {words((page.title,))}: {page.word}", *_blocks(page.lead)]
    for section in page.sections:
        blocks += _section(section, 2)
    return "\n\n".join(blocks) + "\n"


def section(found: Section, level: int) -> str:
    """One part of a page, with a heading of this level."""
    return "\n\n".join(_section(found, level))


def _section(section: Section, level: int) -> Iterable[str]:
    yield f"{'#' * level} {words((section.title,))}"
    yield from _blocks(section.blocks)
    for part in section.parts:
        yield from _section(part, level + 1)


def _blocks(blocks: Sequence[Block]) -> Iterable[str]:
    for block in blocks:
        yield _block(block)


def _block(block: Block) -> str:
    match block:
        case Paragraph(said, tone):
            return {"bad": "**{}**", "note": "> {}"}.get(tone, "{}").format(words(said))
        case Bullets(items):
            return "\n".join(f"- {words(item)}" for item in items)
        case Facts(rows):
            return "\n".join(f"- **{words((label,))}:** {words(said)}" for label, said in rows)
        case Table():
            return _table(block)
        case Bars(caption, head, bars):
            rows = tuple((bar.label, (bar.shown,)) for bar in bars)
            return _table(Table(caption, head, rows))
        case Fold(summary, code):
            return f"<details><summary>{_summary(summary)}</summary>\n\n{fenced(code)}\n\n</details>"


def _table(table: Table) -> str:
    head = " | ".join(words((name,)) for name in table.head)
    rule = " | ".join("---:" if number in table.numbers else "---" for number in range(len(table.head)))
    lines = [f"| {head} |", f"| {rule} |"]
    for row in table.rows:
        cells = [words(cell) for cell in row]
        lines.append(f"| {' | '.join(f'*{cell}*' if table.weak and cell == 'attested' else cell for cell in cells)} |")
    return f"*{words((table.caption,))}*\n\n" + "\n".join(lines)


def words(said: Words) -> str:
    """A sentence on one line, every piece harmless."""
    return "".join(_piece(piece) for piece in said)


def _piece(piece: str) -> str:
    if isinstance(piece, Status):
        word = pages.SHOWN.get(piece, str(piece))
        return f"**{word}**" if piece in pages.BAD else word
    if isinstance(piece, Name):
        return code(piece)
    # An @ is found by whoever is to be mentioned even when it is written as a character reference, unless in code.
    return "".join(code(part) if "@" in part else _plain(part) for part in re.split(r"(\S*@\S*)", _line(piece)))


def _line(text: str) -> str:
    return printable(text).replace("\n", "\\n").replace("\t", " ")


_SIMPLE = re.compile(r"[^`|\\\s](?:[^`|\\\t]*[^`|\\\s])?")
"""What can stand between two backticks, in a table cell as well."""


def code(text: str) -> str:
    """Text as code, on one line."""
    line = _line(text)
    if _SIMPLE.fullmatch(line):
        return f"`{line}`"
    return f"<code>{_html(line)}</code>" if line else ""


_SPECIAL = re.compile(
    r"""[&<>`*\[\]|\\#~$@^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[Ww])\.|:(?=//)|^-(?=[-\s]|$)|^[+=](?=[\s=]|$)"""
)


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML: what could be is written as a character reference."""
    escaped = _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)
    return re.sub(r"^(\d+)([.)])", lambda match: f"{match[1]}&#{ord(match[2])};", escaped)


def _summary(said: Words) -> str:
    """The line of a fold, which is HTML."""
    pieces = [
        f"<code>{_html(piece)}</code>" if piece and (isinstance(piece, Name) or "@" in piece) else _html(piece)
        for piece in said
    ]
    return "".join(pieces)


_HTML = re.compile(r"""[^\w (),.'"/=-]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[Ww])\.""")


def _html(text: str) -> str:
    """Text inside of an HTML element inside of Markdown: neither of the two may find anything in it."""
    return _HTML.sub(lambda match: _escaped(match[0]), _line(text))


def _escaped(found: str) -> str:
    return "".join(f"&#{ord(char)};" if ord(char) < 128 else char for char in found)


def fenced(text: str, language: str = "sql") -> str:
    """A code block with a fence longer than any run of backticks inside."""
    shown = printable(text).rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"
