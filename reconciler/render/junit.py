"""A drift report as JUnit XML, for the test view of a CI: one case for each governed object and check, and finding."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from reconciler.render.text import printable

if TYPE_CHECKING:
    from reconciler.drift import DriftReport, Item
    from reconciler.model import Verdict

UNJUDGED = {"deferred": "judged inside an apply"}


def drift(found: DriftReport) -> str:
    """The document. What is not wrong passes; what was asked to fail, drifted or is violated fails; what could not be
    judged is an error; what only an apply judges is skipped. What need not be done about is said in `system-out`.
    """
    verdicts = {verdict.address: verdict for verdict in found.invariants}
    items: dict[str, list[Item]] = {}
    for item in found.items:
        items.setdefault(item.address, []).append(item)
    suites: dict[str, list[str]] = {}
    for address in (*found.governed, *sorted(items.keys() - set(found.governed))):
        kind = address.partition(".")[0] if address in found.governed else "finding"
        suites.setdefault(kind, []).append(address)
    root = Element("testsuites", {"name": _text(f"reconciler drift of {found.name} on {found.target.name}")})
    totals = {"tests": 0, "failures": 0, "errors": 0}
    for kind, addresses in suites.items():
        suite = SubElement(root, "testsuite", {"name": _text(kind)})
        properties = SubElement(suite, "properties")
        for name, value in (("governance", found.name), ("target", found.target.name), ("outcome", found.outcome)):
            SubElement(properties, "property", {"name": name, "value": _text(value)})
        for address in addresses:
            classname = _text(f"reconciler.{found.name}.{found.target.name}.{kind}")
            case = SubElement(suite, "testcase", {"name": _text(address), "classname": classname, "time": "0"})
            _case(case, items.get(address, []), verdicts.get(address))
        numbers = {
            "tests": len(addresses),
            "failures": len(suite.findall("testcase/failure")),
            "errors": len(suite.findall("testcase/error")),
        }
        for name, number in numbers.items():
            suite.set(name, str(number))
            totals[name] += number
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        suite.set("time", "0")
        suite.set("timestamp", found.checked_at.removesuffix("Z"))
        suite.set("hostname", _text(found.target.database))
    for name, number in totals.items():
        root.set(name, str(number))
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'


def _case(case: Element, items: list[Item], verdict: Verdict | None) -> None:
    """At most one of failure, error and skipped; the rest is output."""
    wrong = [item for item in items if item.fails]
    if wrong:
        word = "error" if all(item.item_class == "not_judged" for item in wrong) else "failure"
        attributes = {"type": wrong[0].item_class, "message": _text(wrong[0].reason)}
        SubElement(case, word, attributes).text = "\n".join(_told(item) for item in wrong)
    elif any(item.item_class == "not_judged" for item in items) or (verdict and verdict.status in UNJUDGED):
        message = UNJUDGED.get(verdict.status, verdict.detail) if verdict else items[0].reason
        SubElement(case, "skipped", {"message": _text(message)})
    if quiet := [item for item in items if not item.fails]:
        SubElement(case, "system-out").text = "\n".join(_told(item) for item in quiet)


def _told(item: Item) -> str:
    lines = [f"{item.item_class}: {item.reason}"]
    lines += [f"  {field.name}: {field.before!r} -> {field.after!r}" for field in item.fields]
    if item.attribution is not None:
        known = item.attribution
        lines += [f"  changed at {known.changed_at}"] * (known.changed_at is not None)
        lines += [f"  not known: {sentence}" for sentence in known.not_known]
    return "\n".join(_text(line) for line in (*lines, item.todo))


def _text(text: str) -> str:
    """Only what XML 1.0 can hold: everything else is written out."""
    return re.sub("[\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", printable(text))
