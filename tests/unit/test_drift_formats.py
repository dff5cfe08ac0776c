"""Drift as metrics, as JUnit XML and as what is posted: complete, and no name gets out of its place."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from reconciler import drift as drifting
from reconciler import notify
from reconciler.drift import Heartbeat
from reconciler.errors import ServerProblem
from reconciler.model import CLASSES, Drift, Entry, Finding, Live
from reconciler.render import junit, prometheus
from tests import states

HOSTILE = 'evil"} 1\nreconciler_up 7 \\ \r\x00\x1b[1A\u202e\ud800\uffff<!channel> ]]> & <b> é'


def report(**given: Any) -> drifting.DriftReport:
    gate = states.gate("app.a", "a")
    desired = states.desired(gate)
    body = {"plan": {"state": {"release": "first"}}, "manifest": {}}
    entry = Entry(
        name="app",
        number=3,
        run_id="r",
        recorded_at="2026-05-22 11:00:00.5+00",
        previous="0" * 64,
        hash="f" * 64,
        body=body,
    )
    live = Live({}, {"marker.w": {"age": 12.5, "within": 300.0}, "marker.none": {"age": None, "within": 60.0}}, ())
    whole: dict[str, Any] = {
        "target": states.TARGET,
        "entry": entry,
        "findings": (),
        "verdicts": (),
        "not_compared": (),
        "fail_on": (),
        "now": states.NOW,
        "desired": desired,
        "live": live,
    }
    moved = given.pop("moved", drifting.Classified((), ()))
    return drifting.report(moved, **{**whole, **given})


DRIFTED = drifting.Classified((Drift(address="gate.app.a", kind="gate", actions=("change",), reason="changed"),), ())
STALE = Finding(code="stale_heartbeat", address="marker.w", message="old")

# ----------------------------------------------------------------------------------------------------------- prometheus

SAMPLE = re.compile(
    r'([a-z_:][a-z0-9_:]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)*)\} (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)'
)
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"')
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The text format, as its specification says it: every metric with HELP and TYPE before its samples, once."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    known: list[str] = []
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in known
            known.append(name)
        elif line.startswith("# TYPE "):
            assert re.fullmatch(rf"# TYPE {known[-1]} (gauge|counter)", line)
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1] == known[-1]
            labels = tuple(
                (label, re.sub(r'\\[\\"n]', lambda escape: ESCAPES[escape[0]], value))
                for label, value in LABEL.findall(match[2])
            )
            assert (match[1], labels) not in found
            found[match[1], labels] = float(match[3])
    assert text.encode().decode() == text
    return found


WHERE = (("governance", "app"), ("target", "main"))


def test_metrics_of_a_clean_report_name_every_class() -> None:
    found = samples(prometheus.drift(report()))
    assert found["reconciler_up", WHERE] == 1
    assert [found["reconciler_drift_items", (*WHERE, ("class", name))] for name in CLASSES] == [0] * len(CLASSES)
    assert found["reconciler_marker_age_seconds", (*WHERE, ("marker", "w"))] == 12.5
    assert ("reconciler_marker_age_seconds", (*WHERE, ("marker", "none"))) not in found
    assert found["reconciler_marker_age_limit_seconds", (*WHERE, ("marker", "none"))] == 60
    assert found["reconciler_last_success_timestamp_seconds", WHERE] == states.NOW.timestamp()
    assert found["reconciler_last_applied_timestamp_seconds", WHERE] == states.NOW.timestamp() - 3600 + 0.5


def test_metrics_count_the_items() -> None:
    found = samples(prometheus.drift(report(moved=DRIFTED, findings=(STALE, STALE))))
    counts = {
        dict(labels)["class"]: value for (name, labels), value in found.items() if name == "reconciler_drift_items"
    }
    assert {name: count for name, count in counts.items() if count} == {"drift": 1, "stale_heartbeat": 2}


def test_a_name_in_a_label_is_a_label() -> None:
    target = states.TARGET.model_copy(update={"name": HOSTILE})
    beat = Heartbeat(address=f"marker.{HOSTILE}", age=1.0, within=2.0)
    made = report(target=target).model_copy(update={"heartbeats": (beat,)})
    found = samples(prometheus.drift(made))
    shown = HOSTILE.replace("\r", "\\u000d").replace("\ud800", "\\ud800")
    assert found["reconciler_up", (("governance", "app"), ("target", shown))] == 1
    assert {dict(labels)["target"] for _, labels in found} == {shown}
    (marker,) = (dict(labels)["marker"] for name, labels in found if name == "reconciler_marker_age_seconds")
    assert marker == shown


def test_when_nobody_could_look_only_the_moments_stay() -> None:
    before = prometheus.drift(report(moved=DRIFTED))
    found = samples(prometheus.not_checked("app", "main", before))
    assert {name: value for (name, _), value in found.items()} == {
        "reconciler_up": 0,
        "reconciler_last_success_timestamp_seconds": states.NOW.timestamp(),
        "reconciler_last_applied_timestamp_seconds": states.NOW.timestamp() - 3600 + 0.5,
    }
    again = prometheus.not_checked("app", "main", prometheus.not_checked("app", "main", before))
    assert samples(again) == found
    assert samples(prometheus.not_checked("app", "main", "no metrics\n")) == {("reconciler_up", WHERE): 0}
    loop = prometheus.page(prometheus.of_report(report(), current=False))
    assert {name for name, _ in samples(loop)} == {name for name, _ in found}


# ---------------------------------------------------------------------------------------------------------------- JUnit

SUITE = {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"}
CASE = {"error", "failure", "skipped", "system-out", "system-err"}


def cases(text: str) -> dict[str, Any]:
    """The cases by name; the document is what the schema of Jenkins' xUnit plugin (junit-10.xsd) allows."""
    root = ET.fromstring(text.encode())
    assert root.tag == "testsuites"
    assert set(root.attrib) <= {"name", "time", "tests", "failures", "disabled", "errors"}
    found: dict[str, Any] = {}
    totals = {"tests": 0, "failures": 0, "errors": 0}
    for suite in root:
        assert (suite.tag, set(suite.attrib)) == ("testsuite", SUITE)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        properties, *tests = suite
        assert properties.tag == "properties"
        assert all((one.tag, set(one.attrib)) == ("property", {"name", "value"}) for one in properties)
        for case in tests:
            assert (case.tag, set(case.attrib)) == ("testcase", {"name", "classname", "time"})
            assert {child.tag for child in case} <= CASE
            assert len([child for child in case if child.tag in {"error", "failure", "skipped"}]) <= 1
            assert case.attrib["name"] not in found
            found[case.attrib["name"]] = case
        assert int(suite.attrib["tests"]) == len(tests)
        for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.attrib[name]) == len(suite.findall(f"testcase/{tag}"))
        for name in totals:
            totals[name] += int(suite.attrib[name])
    assert {name: int(root.attrib[name]) for name in totals} == totals
    return found


def test_every_object_and_check_is_a_case() -> None:
    whole = report(verdicts=(states.verdict("held"),), moved=drifting.Classified((), ()))
    whole = whole.model_copy(update={"governed": ("gate.app.a", "invariant.no-cron")})
    found = cases(junit.drift(whole))
    assert list(found) == ["gate.app.a", "invariant.no-cron"]
    assert all(len(case) == 0 for case in found.values())


def test_what_fails_what_is_an_error_and_what_is_skipped() -> None:
    verdicts = [states.verdict(status, status) for status in ("held", "violated", "not_judged", "deferred")]
    whole = report(verdicts=verdicts, moved=DRIFTED, findings=(STALE,))
    names = tuple(verdict.address for verdict in verdicts)
    found = cases(junit.drift(whole.model_copy(update={"governed": ("gate.app.a", "gate.app.b", *names)})))
    told = {name: [child.tag for child in case] for name, case in found.items()}
    assert told == {
        "gate.app.a": ["failure"],
        "gate.app.b": [],
        "invariant.held": [],
        "invariant.violated": ["failure"],
        "invariant.not_judged": ["error"],
        "invariant.deferred": ["skipped"],
        "marker.w": ["system-out"],
    }
    assert found["gate.app.a"].find("failure").attrib == {"type": "drift", "message": "changed"}
    failing = cases(junit.drift(report(findings=(STALE,), fail_on={"stale_heartbeat"})))
    assert [child.tag for child in failing["marker.w"]] == ["failure"]


def test_a_name_in_xml_is_a_name() -> None:
    finding = Finding(code="undeclared", address=f"gate.{HOSTILE}", message=HOSTILE)
    target = states.TARGET.model_copy(update={"name": HOSTILE, "database": HOSTILE})
    found = cases(junit.drift(report(findings=(finding,), target=target, fail_on={"undeclared"})))
    (name,) = set(found) - {"gate.app.a"}
    assert name.startswith('gate.evil"} 1\nreconciler_up 7 \\')
    assert "\\u0000" in name
    assert "\\uffff" in name
    assert "<!channel> ]]> & <b> é" in name


# --------------------------------------------------------------------------------------------------------------- notify


def test_a_clean_run_speaks_too() -> None:
    document = notify.of_report(report())
    assert document["text"] == "app on main: no drift at 2026-05-22T12:00:00Z"
    assert (document["outcome"], document["counts"], document["items"]) == ("no_changes", {}, [])


def test_what_is_posted_mentions_nobody() -> None:
    finding = Finding(code="undeclared", address=f"gate.{HOSTILE}", message=HOSTILE)
    document = notify.of_report(report(findings=(finding,), moved=DRIFTED, fail_on={"undeclared"}))
    assert "<" not in document["text"]
    assert "&lt;!channel&gt; ]]&gt; &amp; &lt;b&gt;" in document["text"]
    assert "1 drift, 1 undeclared" in document["text"]
    assert [item["class"] for item in document["items"]] == ["drift", "undeclared"]
    failed = notify.of_error("app", "main", ServerProblem("<gone>"), "now")
    assert failed["text"] == "app on main: not checked at now: &lt;gone&gt;"
    assert failed["outcome"] == "error"


def test_a_long_report_is_counted() -> None:
    many = tuple(
        Drift(address=f"gate.{number}", kind="gate", actions=("change",), reason="changed") for number in range(25)
    )
    document = notify.of_report(report(moved=drifting.Classified(many, ())))
    assert document["text"].endswith("\nand 5 more")
    assert len(document["items"]) == 25


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/x",
        "file:///etc/passwd",
        "https:///secret",
        "//host",
        "https://host:99999/s",
        "https://h/\ns",
        "host.example.org/s",
    ],
)
def test_a_url_that_nothing_can_be_posted_to(url: str) -> None:
    with pytest.raises(notify.UsageError) as refused:
        notify.check(url)
    assert "secret" not in refused.value.message
    assert url == "" or url not in refused.value.message
