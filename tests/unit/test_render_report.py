"""Reports: what they say of a run, also of one that failed, and that text from outside stays text in every format."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler import drift as drifting
from reconciler import evidence
from reconciler.model import (
    Approval,
    Change,
    Drift,
    Executed,
    Failure,
    FieldChange,
    Finding,
    NotCompared,
    Outcome,
    Stage,
    Statement,
    Summary,
    Verdict,
    Yes,
)
from reconciler.plan import stamp
from reconciler.render import html, markdown, pages, text
from tests import states

NOW = stamp(states.NOW)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x onerror=alert(1)>',
    "```\n</details>\n# a heading\n```",
    "`code` ``more`` ```",
    "@everyone and ops@example.com",
    "| a | b |\n| --- | --- |",
    "[link](https://evil.example) ![picture](https://evil.example/x.png) <https://evil.example>",
    "www.evil.example https://evil.example",
    "#123 org/repo#4 ~~struck~~ **bold** __bold__ $x$ &lt;b&gt;",
    "safe \u202etxet \u200bhidden\u2066",
    "\x1b[31mred\x1b[0m \x07 \r carriage",
    "back\\slash \\| pipe \\",
    "{{ 7 * 7 }} {% raw %} </style></details></pre>",
    "- item",
    "1. item",
    "> quote",
    "---",
    "===",
    "",
)


def outcome(text_: str = "words", **given: Any) -> Outcome:
    """An outcome in which every text that comes from outside is this one."""
    whole: dict[str, Any] = {
        "outcome": "applied",
        "tool": "reconciler 1",
        "run_id": "00000000-0000-4000-8000-000000000001",
        "target": states.TARGET.model_copy(update={"name": text_, "database": text_}),
        "effect_digest": "e" * 64,
        "entry": 2,
        "hash": "f" * 64,
        "previous": "d" * 64,
        "genesis": True,
        "transaction_id": "745",
        "started_at": NOW,
        "finished_at": NOW,
        "statements": 2,
        "seconds": 0.249,
        "stages": (Stage(name="lock", seconds=0.0), Stage(name="execute", seconds=0.2)),
        "executed": (Executed(address=text_, text=text_, role=text_, seconds=0.2),),
        "approvals": (
            Yes(
                id=text_, approver=text_, reason=text_, accepted=(text_,), attestations=("word",),
                issued_at=NOW, expires_at=NOW, signed=False,
            ),
        ),
        "summary": Summary(add=1),
        "invariants": (
            Verdict(address="invariant.kept", status="held", detail=text_, group=text_),
            Verdict(address="invariant.word", status="attested", detail=text_, group=text_),
            Verdict(address="invariant.dark", status="not_judged", detail=text_, missing=text_),
            Verdict(address=f"invariant.{text_}", status="violated", detail=text_),
        ),
        "proofs": (
            Verdict(address="proof.one", status="passed", detail=text_),
            Verdict(address="proof.two", status="failed", detail=text_),
            Verdict(address="proof.there", status="rehearsed", detail=text_),
        ),
        "surface": (
            Verdict(address="surface.rows", status="predicted", detail="", before="1", after="3", predicted="+2"),
            Verdict(address="surface.same", status="predicted", detail="", before=text_, after=text_, predicted="same"),
            Verdict(address="surface.other", status="differs", detail=text_, before="a", after=text_, predicted="same"),
            Verdict(address="surface.unread", status="differs", detail=text_, predicted="0"),
        ),
        "findings": (Finding(code="undeclared", address=text_, message=text_),),
        "not_compared": (NotCompared.model_validate({"class": text_, "where": text_, "count": 3}),),
    }  # fmt: skip
    return Outcome(**{**whole, **given})


def change(text_: str, kind: str, *actions: str, **given: Any) -> Change:
    fields: dict[str, Any] = {
        "address": f"{kind}.{text_}",
        "kind": kind,
        "actions": actions or ("add",),
        "reason": text_,
    }
    return Change.model_validate({**fields, "statements": (Statement(text=text_, role=text_),), **given})


def changes(text_: str = "words") -> tuple[Change, ...]:
    function = {
        **states.FUNCTION,
        "name": text_,
        "comment": text_,
        "acl": [{"grantee": None, "grantor": text_}, {"grantee": text_, "grantor": text_}],
    }
    return (
        change(text_, "function", after=function),
        change(text_ + "2", "function", "remove", "add", before=function, after=function),
        change(text_, "gate", "change", before={"value": text_}, after={"value": text_ + "!"}),
        change(text_ + "2", "gate", "remove", before={"value": text_}),
        change(text_, "marker", after={"table": text_, "key": {text_: text_}, "columns": {text_: None}}),
        change(text_, "gate", "forget", hazards=("forgets",)),
        change(text_, "novelty", fields=(FieldChange(name=text_, before=text_, after=text_ * 40),)),
    )


def plan(text_: str = "words", **given: Any) -> Any:
    made = states.build(states.desired(states.gate("app.a", "x", lock="locked", safe="x"), states.invariant("kept")))
    whole = {
        "setup": (change(text_, "policy"),),
        "changes": changes(text_),
        "drift": (drifted(text_),),
        "findings": (Finding(code="undeclared", address=text_, message=text_),),
        "invariants": outcome(text_).invariants,
        "not_compared": outcome(text_).not_compared,
        "target": outcome(text_).target,
        **given,
    }
    return made.model_copy(update=whole)


def drifted(text_: str) -> Drift:
    fields = (FieldChange(name=text_, before=text_, after=None),) * 2
    return Drift(address=text_, kind="gate", actions=("change",), fields=fields, reason=text_)


def kept(text_: str = "words", **given: Any) -> evidence.Evidence:
    found = evidence.document(outcome(text_, **given), plan(text_), "c" * 64)
    refusal = evidence.Refusal(proof="proof.one", refusal=text_)
    return found.model_copy(update={"reasons": {"proof.one": text_, "invariant.kept": text_}, "refusals": (refusal,)})


def drift(text_: str = "words", **given: Any) -> drifting.DriftReport:
    whole: dict[str, Any] = {
        "format_version": "1.0", "outcome": "drift", "tool": text_, "checked_at": NOW, "target": outcome(text_).target,
        "last_applied": {"entry": 3, "recorded_at": text_, "release": text_, "hash": "f" * 64},
        "drift": (drifted(text_),), "pending": (drifted(text_),), "findings": outcome(text_).findings,
        "invariants": outcome(text_).invariants, "not_compared": outcome(text_).not_compared,
    }  # fmt: skip
    return drifting.DriftReport(**{**whole, **given})


def approval(text_: str) -> Approval:
    return Approval(
        id=text_, effect_digest="e" * 64, plan_checksum="c" * 64, target=outcome(text_).target, approver=text_,
        reason=text_, accepted=(text_,), attestations=(text_,), issued_at=NOW, expires_at=NOW,
    )  # fmt: skip


def every_page(text_: str) -> list[pages.Page]:
    failed = {"outcome": "violated", "entry": None, "hash": None, "failure": Failure(message=text_, details=(text_,))}
    return [
        pages.evidence(kept(text_)),
        pages.evidence(kept(text_, problems=(text_,))),
        pages.evidence(kept(text_, **failed)),
        pages.plan(plan(text_)),
        pages.drift(drift(text_)),
        pages.approval(approval(text_)),
    ]


# ------------------------------------------------------------------------------------------------- what the report says


def titles(page: pages.Page) -> list[str]:
    return [section.title for section in page.sections]


def test_an_applied_run() -> None:
    page = pages.evidence(kept())
    assert (page.word, page.mood) == ("applied", "good")
    assert titles(page) == [
        "Scope honoured", "What was added and changed", "Proofs: 1 passed, 1 rehearsed, 1 failed",
        "Regression: 2 of 4 as predicted", "Words list: 1 held, 1 attested",
        "Other invariants: 1 not judged, 1 violated", "Findings: 1", "What was not looked at", "Approvals",
        "Statements: 1 of 2", "Ledger entry", "Backups",
    ]  # fmt: skip
    report = markdown.evidence(kept())
    assert "Locked gates hold their safe values: `app.a = x`." in report
    assert "| `rows` | 1 | 3 | +2 | +2 | as predicted |" in report
    assert "| `unread` | not read | not read |  | 0 | **differs** |" in report
    assert "| `words` | `one` | passed |" in report
    assert "write `ledger: " in report


def test_what_others_moved_is_told_beside_the_numbers() -> None:
    others = Verdict(
        address="surface.jobs",
        status="predicted",
        detail="1 -> 3 (+2), +2 by others",
        before="1",
        after="3",
        predicted="0",
    )
    report = markdown.evidence(kept(surface=(*kept().surface, others)))
    assert "| `jobs` | 1 | 3 | +2 | 0 | as predicted |" in report
    assert (
        "none of it by the apply*\n\n| Surface | What |\n| --- | --- |\n| `jobs` | 1 -&#62; 3 (+2), +2 by others |\n"
        in report
    )
    assert "by the apply" not in markdown.evidence(kept())


def test_a_problem_after_commit_stands_at_the_top() -> None:
    page = pages.evidence(kept(problems=("the disk is full",)))
    assert (page.word, page.mood) == ("applied", "open")
    assert "\n\n**Applied, but: the disk is full**\n\n" in markdown.evidence(kept(problems=("the disk is full",)))


def test_a_failed_run_says_that_nothing_was_changed() -> None:
    why = Failure(message="2 checks.", details=("invariant.words: violated: words", "and more"), hint="Look.")
    found = kept(outcome="violated", entry=None, hash=None, failure=why)
    page = pages.evidence(found)
    assert (page.word, page.mood, titles(page)[0]) == ("rolled back", "bad", "Why it was not applied")
    report = markdown.evidence(found)
    assert "**Nothing was changed: the server rolled the transaction back.**" in report
    assert "Apply complete" not in report
    assert "- and more\n" in report
    # What stands in the table of verdicts is not said twice.
    assert "- invariant.words" not in report
    assert "| `invariant.words` | **violated** | words |" in report
    assert "What would have been added and changed" in report
    assert "None: what is rolled back leaves no entry." in report
    assert "Statements: 1 of 2, all of them rolled back" in report
    assert "Locked gates" not in report
    assert text.evidence(found, colour=False, verbose=True).count("Not applied: nothing was changed.") == 1


def test_an_unknown_outcome_promises_nothing() -> None:
    found = kept(outcome="unknown", entry=None, hash=None, failure=Failure(message="The connection was lost."))
    for shown in (markdown.evidence(found), html.evidence(found), text.evidence(found, colour=False, verbose=False)):
        assert "nobody can say" in shown
        assert "othing was changed" not in shown
        assert "Apply complete" not in shown
    assert "-- Run 00000000-0000-4000-8000-000000000001: nobody knows whether committed." in evidence.statements(found)


def test_attested_is_weaker_than_held_and_never_more_than_a_word() -> None:
    page = html.evidence(kept())
    assert page.count('<table class="weak">') == 1
    weak = page[page.index('<table class="weak">') :]
    weak = weak[: weak.index("</table>")]
    assert '<span class="badge weak">attested</span>' in weak
    assert "badge good" not in weak
    for shown in (page, markdown.evidence(kept())):
        assert "confirmed" not in shown
        assert "It is somebody&#39;s word" in shown or "It is somebody's word" in shown


def test_changes_outside_of_the_scope_are_named() -> None:
    assert "`function.words`" in markdown.evidence(kept()).split("outside of the scope: ", 1)[1].splitlines()[0]


def test_plan_and_drift() -> None:
    page = pages.plan(plan())
    assert (page.word, page.mood) == ("changes", "open")
    assert pages.plan(plan(outcome="violated")).word == "blocked"
    assert pages.plan(plan(outcome="no_changes", setup=(), changes=())).word == "no changes"
    assert "| `novelty.words` | add | none | words |" in markdown.plan(plan())
    assert pages.drift(drift()).word == "drift"
    clean = markdown.drift(drift(outcome="no_changes", drift=(), pending=(), last_applied=None))
    assert clean.startswith(f"# Drift of words: no drift\n\nNo drift at {NOW}. 0 pending.\n")
    assert "**Last applied:** nothing that is known" in clean


# --------------------------------------------------------------------------------------------------------- hostile text


class Elements(HTMLParser):
    """Every element with its attributes, the text between, and whether each is closed in its turn."""

    EMPTY = frozenset({"meta", "link", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


ATTRIBUTES = {
    "charset", "http-equiv", "content", "name", "rel", "href", "lang", "class", "role", "aria-label", "tabindex",
    "scope", "viewbox", "preserveaspectratio", "aria-hidden", "focusable", "x", "y", "width", "height",
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_inert_in_html(hostile: str) -> None:
    for page, calm in zip(every_page(hostile), every_page("words"), strict=True):
        made, expected = Elements(html.render(page)), Elements(html.render(calm))
        assert made.open == []
        assert {tag for tag, _ in made.found} <= {tag for tag, _ in expected.found}
        assert {name for _, attributes in made.found for name in attributes} <= ATTRIBUTES
        shown = "".join(made.words)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f]", shown)
        if hostile:
            assert text.printable(hostile).strip() in shown


def test_html_asks_for_nothing() -> None:
    page = html.evidence(kept())
    found = Elements(page).found
    assert [attributes["href"] for tag, attributes in found if tag == "link"] == ["data:,"]
    assert not {tag for tag, _ in found} & {"script", "img", "iframe", "object", "form", "a", "base", "video", "audio"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    policies = [attributes["content"] for _, attributes in found if attributes.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    tags = [tag for tag, _ in found]
    assert tags.count("table") == tags.count("caption")
    assert all(attributes.get("scope") for tag, attributes in found if tag == "th")


def outside_code(report: str) -> str:
    """The report without its code: fenced blocks, spans and <code> elements, where nothing means anything."""
    lines: list[str] = []
    fence = ""
    for line in report.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif match := re.fullmatch(r"(`{3,})sql", line):
            fence = match[1]
        else:
            lines.append(line)
    assert fence == ""
    return re.sub(r"`[^`\n]+`|<code>[^<>`\n]*</code>", "", "\n".join(lines))


@pytest.mark.parametrize("hostile", [one for one in HOSTILE if one])
def test_hostile_text_is_inert_in_markdown(hostile: str) -> None:
    for page, calm in zip(every_page(hostile), every_page("words"), strict=True):
        report = markdown.render(page)
        bare, expected = outside_code(report), outside_code(markdown.render(calm))
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f]", report)
        # Nobody is mentioned, also not by a character reference that a mention is looked for behind.
        assert "@" not in bare
        assert "&#64;" not in re.sub(r"<code>[^<>\n]*</code>", "", report)
        assert "`" not in bare
        assert set(re.findall(r"<[^>\n]*>?", bare)) <= {"<details>", "<summary>", "</summary>", "</details>"}
        assert not re.search(r"\]\(|://|www\.|#\d|\$|~~", re.sub(r"&#\d+;", "", bare))
        # The same lines have the same shape: headings, bullets, rows and their cells.
        shape = [re.match(r"#* ?|- |> |\||<[^>]+>", line) for line in bare.splitlines()]
        calm_shape = [re.match(r"#* ?|- |> |\||<[^>]+>", line) for line in expected.splitlines()]
        assert [match and match[0] for match in shape] == [match and match[0] for match in calm_shape]
        assert [line.count("|") for line in bare.splitlines()] == [line.count("|") for line in expected.splitlines()]


@given(st.text(max_size=60))
def test_any_text_in_markdown_stays_on_its_line(text_: str) -> None:
    for said in (markdown.words((text_,)), markdown.code(text_)):
        assert "\n" not in said
        bare = outside_code(said)
        assert not set(bare) & set("@`<>|*[]\\")
    fenced = markdown.fenced(text_).splitlines()
    assert fenced[-1] not in fenced[1:-1]
    assert fenced[0] == f"{fenced[-1]}sql"


def test_an_address_for_mail_is_code() -> None:
    assert markdown.words(("ask ops@example.com, @team now",)) == "ask `ops@example.com,` `@team` now"
    assert markdown.words(("a|@b",)) == "<code>a&#124;&#64;b</code>"


# --------------------------------------------------------------------------------------------------------------- files


def test_a_hostile_name_leads_nowhere() -> None:
    given_ = [("../../etc/cron.d/x", b"1"), ("", b"2"), ("a\nb", b"3"), ("x" * 300, b"4")]
    made = evidence.files(kept(), plan=b"plan", approvals=given_, entry=None, pages={})
    names = [name for name in made if name.startswith("approvals/")]
    assert names == [
        "approvals/1-_etc_cron_d_x.json",
        "approvals/2-.json",
        "approvals/3-a_b.json",
        f"approvals/4-{'x' * 60}.json",
    ]
    assert list(made)[-1] == "SHA256SUMS"
    assert made["SHA256SUMS"].count(b"\n") == len(made) - 1


def test_a_script_of_statements_says_what_was_sent() -> None:
    found = kept(
        executed=(
            Executed(address="gate.a\nDROP TABLE x", text="SELECT 1;", role="r\n\u2028s", seconds=0.5),
            Executed(address="gate.b", text="SELECT 2 -- not over", role=None, seconds=0.25),
        )
    )
    lines = evidence.statements(found).splitlines()
    assert lines[3:] == [
        "-- 1 of 2: gate.a?DROP TABLE x as r??s, 0.500000 s", "SELECT 1;", "",
        "-- 2 of 2: gate.b, 0.250000 s", "SELECT 2 -- not over", ";",
    ]  # fmt: skip


def test_the_document_comes_back_as_it_was() -> None:
    found = kept("Điều 45 🙂")
    made = evidence.files(found, plan=b"", approvals=(), entry=None, pages={})
    document = json.loads(made["evidence.json"])
    assert document.pop("checksum")
    assert evidence.Evidence.model_validate_json(json.dumps(document)) == found
