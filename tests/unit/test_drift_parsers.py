"""Metrics and JUnit XML, read by the libraries of others: what they make of it is what we meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped
from prometheus_client.parser import text_string_to_metric_families

from reconciler import drift
from reconciler.drift import Heartbeat
from reconciler.model import CLASSES, Finding
from reconciler.render import junit, prometheus
from tests import states
from tests.unit.test_drift_formats import DRIFTED, HOSTILE, STALE, report

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from reconciler.drift import DriftReport

COUNTERS = {"reconciler_rounds_total": ("Rounds begun.", 3.0)}


def page(found: DriftReport) -> str:
    """What `/metrics` answers."""
    loop = prometheus.of_loop(found.name, found.target.name, COUNTERS)
    return prometheus.page([*prometheus.of_report(found), *loop])


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def test_what_prometheus_reads_is_what_was_counted() -> None:
    found = families(page(report(moved=DRIFTED, findings=(STALE, STALE))))
    samples = {
        (sample.name, sample.labels.get("class") or sample.labels.get("marker")): sample.value
        for family in found
        for sample in family.samples
    }
    assert {name for name, _ in samples} == {
        "reconciler_up", "reconciler_drift_items", "reconciler_drift_failing_items", "reconciler_marker_age_seconds",
        "reconciler_marker_age_limit_seconds", "reconciler_last_success_timestamp_seconds",
        "reconciler_last_applied_timestamp_seconds", "reconciler_build_info", "reconciler_rounds_total",
    }  # fmt: skip
    counts = dict.fromkeys(CLASSES, 0.0) | {"drift": 1.0, "stale_heartbeat": 2.0}
    assert {key: value for (name, key), value in samples.items() if name == "reconciler_drift_items"} == counts
    failing = {key for (name, key), value in samples.items() if name == "reconciler_drift_failing_items" and value}
    assert failing == {"drift"}
    assert samples["reconciler_marker_age_seconds", "w"] == 12.5
    assert samples["reconciler_rounds_total", None] == 3


def test_what_fails_is_what_the_exit_code_says() -> None:
    untold = states.verdict("not_judged", "not_judged").model_copy(update={"tolerated": True})
    for given, expected in (({"fail_on": ()}, set[str]()), ({"fail_on": {"stale_heartbeat"}}, {"stale_heartbeat"})):
        made = report(verdicts=[untold], findings=(STALE,), **given)
        found = next(one for one in families(page(made)) if one.name == "reconciler_drift_failing_items")
        assert {sample.labels["class"] for sample in found.samples if sample.value} == expected
        assert (drift.exit_code(made) == 2) == bool(expected)


def test_names_types_and_units_are_by_the_conventions() -> None:
    for family in families(page(report(moved=DRIFTED))):
        assert family.documentation.endswith((".", "?"))
        assert family.type in {"gauge", "counter"}
        for sample in family.samples:
            assert re.fullmatch(r"reconciler_[a-z]+(_[a-z]+)*", sample.name)
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert re.search(r"age|timestamp|time|duration", sample.name) is None or sample.name.endswith("_seconds")
            assert {"governance", "target"} <= set(sample.labels)
            assert sample.timestamp is None  # the textfile collector takes no file with time stamps


def test_a_hostile_name_is_one_label() -> None:
    target = states.TARGET.model_copy(update={"name": HOSTILE})
    beat = Heartbeat(address=f"marker.{HOSTILE}", age=1.0, within=2.0)
    made = report(target=target).model_copy(update={"heartbeats": (beat,), "name": HOSTILE})
    shown = HOSTILE.replace("\r", "\\u000d").replace("\ud800", "\\ud800")
    found = families(page(made))
    assert len(found) == len(families(page(report())))
    for family in found:
        for sample in family.samples:
            assert (sample.labels["governance"], sample.labels["target"]) == (shown, shown)
            assert sample.labels.get("marker", shown) == shown


def test_junit_is_read_with_every_result_in_its_place() -> None:
    verdicts = [states.verdict(status, status) for status in ("held", "violated", "not_judged", "deferred")]
    names = tuple(verdict.address for verdict in verdicts)
    whole = report(verdicts=verdicts, moved=DRIFTED, findings=(STALE,)).model_copy(
        update={"governed": ("gate.app.a", *names)}
    )
    read = JUnitXml.fromstring(junit.drift(whole).encode())
    assert (read.tests, read.failures, read.errors) == (6, 2, 1)
    told = {case.name: [type(result) for result in case.result] for suite in read for case in suite}
    assert told == {
        "gate.app.a": [Failure],
        "invariant.held": [],
        "invariant.violated": [Failure],
        "invariant.not_judged": [Error],
        "invariant.deferred": [Skipped],
        "marker.w": [],
    }
    assert {suite.name: (suite.tests, suite.failures, suite.errors, suite.skipped) for suite in read} == {
        "gate": (1, 1, 0, 0),
        "invariant": (4, 1, 1, 1),
        "finding": (1, 0, 0, 0),
    }
    before = (read.tests, read.failures, read.errors, read.skipped)
    read.update_statistics()
    assert (read.tests, read.failures, read.errors, read.skipped) == before


@pytest.mark.parametrize("name", [HOSTILE, "<!DOCTYPE x [<!ENTITY a 'b'>]>&a;", "]]>", "\x00\ufffe"])
def test_a_hostile_name_is_the_name_of_one_case(name: str) -> None:
    target = states.TARGET.model_copy(update={"name": name})
    finding = Finding(code="undeclared", address=f"gate.{name}", message=name)
    read = JUnitXml.fromstring(junit.drift(report(findings=(finding,), target=target)).encode())
    assert len([case for suite in read for case in suite]) == 2
