"""Reports as one HTML file that asks for nothing: no script, no font, no picture from anywhere."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reconciler.render import pages
from reconciler.render.pages import Name, Status
from reconciler.render.text import printable

if TYPE_CHECKING:
    from jinja2 import Template

    from reconciler.drift import DriftReport
    from reconciler.evidence import Evidence
    from reconciler.model import Approval, Plan
    from reconciler.render.pages import Block, Page
    from reconciler.verify import History


def evidence(found: Evidence) -> str:
    """report.html."""
    return render(pages.evidence(found))


def plan(found: Plan) -> str:
    """A plan."""
    return render(pages.plan(found))


def drift(found: DriftReport) -> str:
    """A drift report."""
    return render(pages.drift(found))


def approval(found: Approval) -> str:
    """An approval."""
    return render(pages.approval(found))


def history(found: History) -> str:
    """A ledger."""
    return render(pages.history(found))


def render(page: Page) -> str:
    """The page, complete."""
    return template("report.html.j2").render(
        page=page, is_name=_is_name, is_status=_is_status, sort_of=_sort, strength=_strength, shown=_shown
    )


@cache
def template(name: str) -> Template:
    """A page of the package. Whatever it prints is escaped."""
    # Jinja escapes what it prints; before that, what moves, hides or reorders text is written out.
    surroundings = Environment(
        loader=PackageLoader("reconciler"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return surroundings.get_template(name)


def _finalize(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _is_name(piece: str) -> bool:
    return isinstance(piece, Name)


def _is_status(piece: str) -> bool:
    return isinstance(piece, Status)


def _sort(block: Block) -> str:
    return type(block).__name__


def _strength(status: str) -> str:
    """How strong the word of a verdict is: `good`, `bad`, or `weak`."""
    return "good" if status in pages.GOOD else "bad" if status in pages.BAD else "weak"


def _shown(status: str) -> str:
    return pages.SHOWN.get(status, str(status))
