"""A drift report as metrics: the text format of Prometheus, for the textfile collector and for `/metrics`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeAlias

from reconciler import __version__
from reconciler.model import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from reconciler.drift import DriftReport

Labels: TypeAlias = "tuple[tuple[str, str], ...]"


@dataclass(frozen=True)
class Family:
    """One metric: its samples differ by their labels."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Sequence[tuple[Labels, float]]


def drift(found: DriftReport) -> str:
    """A report of one look."""
    return page(of_report(found))


def not_checked(name: str, target: str, before: str) -> str:
    """What replaces a file when nobody could look: `reconciler_up` is 0, and the moments of `before` are kept.

    Items and ages are left out: nobody knows them now. before: the text of the file so far.
    """
    kept = [line for line in before.splitlines() if line.startswith(_MOMENTS) or line.startswith(_MOMENT_COMMENTS)]
    return page([_up(name, target, up=False)]) + "".join(f"{line}\n" for line in kept)


_MOMENTS = ("reconciler_last_success_timestamp_seconds{", "reconciler_last_applied_timestamp_seconds{")
_MOMENT_COMMENTS = tuple(f"# {word} {name.removesuffix('{')} " for name in _MOMENTS for word in ("HELP", "TYPE"))


def of_report(found: DriftReport, *, current: bool = True) -> list[Family]:
    """The metrics of a report. current: False for one that is only the last there was; then what may have changed since
    is left out.
    """
    where = _labels(found.name, found.target.name)
    moments = [
        Family(
            "reconciler_last_success_timestamp_seconds",
            "gauge",
            "When the database was last looked at without an error, in seconds since 1970.",
            [(where, _seconds(found.checked_at))],
        )
    ]
    applied = None if found.last_applied is None else _recorded(found.last_applied["recorded_at"])
    if applied is not None:
        moments.append(
            Family(
                "reconciler_last_applied_timestamp_seconds",
                "gauge",
                "When the last entry of the ledger was written, in seconds since 1970.",
                [(where, applied)],
            )
        )
    if not current:
        return [_up(found.name, found.target.name, up=False), *moments]
    counts = Counter(item.item_class for item in found.items)
    failing = Counter(item.item_class for item in found.items if item.fails)
    ages = [(beat.address.partition(".")[2], beat.age) for beat in found.heartbeats]
    return [
        _up(found.name, found.target.name, up=True),
        Family(
            "reconciler_drift_items",
            "gauge",
            "Items of the drift report, by class.",
            [((*where, ("class", name)), counts[name]) for name in CLASSES],
        ),
        Family(
            "reconciler_drift_failing_items",
            "gauge",
            "Items of the drift report that are a reason of its exit code, by class.",
            [((*where, ("class", name)), failing[name]) for name in CLASSES],
        ),
        Family(
            "reconciler_marker_age_seconds",
            "gauge",
            "Age of the heartbeat of each marker that says how old it may be.",
            [((*where, ("marker", name)), age) for name, age in ages if age is not None],
        ),
        Family(
            "reconciler_marker_age_limit_seconds",
            "gauge",
            "How old the heartbeat of each marker may be.",
            [((*where, ("marker", beat.address.partition(".")[2])), beat.within) for beat in found.heartbeats],
        ),
        *moments,
        Family(
            "reconciler_build_info",
            "gauge",
            "1, with the version of reconciler and of the server.",
            [((*where, ("version", __version__), ("server_version", found.target.server_version)), 1)],
        ),
    ]


def of_loop(name: str, target: str, counters: Mapping[str, tuple[str, float]]) -> list[Family]:
    """Counters of a loop: metric -> (help, value)."""
    where = _labels(name, target)
    return [Family(metric, "counter", words, [(where, value)]) for metric, (words, value) in counters.items()]


def down(name: str, target: str) -> list[Family]:
    """What is known when nobody has looked yet."""
    return [_up(name, target, up=False)]


def _up(name: str, target: str, *, up: bool) -> Family:
    words = "Could the database be looked at, the last time somebody tried?"
    return Family("reconciler_up", "gauge", words, [(_labels(name, target), int(up))])


def page(families: Iterable[Family]) -> str:
    """The text: HELP and TYPE, then the samples. A metric without samples is left out."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines += [f"# HELP {family.name} {_help(family.help)}", f"# TYPE {family.name} {family.kind}"]
        for labels, value in family.samples:
            pairs = ",".join(f'{label}="{escaped(text)}"' for label, text in labels)
            lines.append(f"{family.name}{{{pairs}}} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def escaped(text: str) -> str:
    r"""A label's value: `\`, `"` and line feeds are escaped; half a surrogate pair, which UTF-8 lacks, is written out.

    A carriage return is what some readers take for the end of a line.
    """
    shown = re.sub("[\ud800-\udfff\r]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _labels(name: str, target: str) -> Labels:
    return (("governance", name), ("target", target))


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _recorded(text: str) -> float | None:
    """A timestamptz as the server writes it; None for one without a year that Python knows."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
