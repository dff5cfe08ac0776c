"""The comment on a pull request: what is always in sight, how long it may be, and that text from outside stays text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from reconciler.errors import UsageError
from reconciler.render import comment
from tests import states
from tests.unit.test_render_report import HOSTILE, change, plan

if TYPE_CHECKING:
    from pathlib import Path

    from reconciler.model import Plan


def many(adds: int, removals: int, forgets: int = 0, **given: Any) -> Plan:
    changes = [change(f"app.added_{at}", "gate", after={"value": "x" * 100}) for at in range(adds)]
    changes += [change(f"app.removed_{at}", "gate", "remove", before={"value": "x"}) for at in range(removals)]
    changes += [change(f"app.forgotten_{at}", "gate", "forget", hazards=("forgets",)) for at in range(forgets)]
    return plan(changes=tuple(changes), setup=(), drift=(), findings=(), invariants=(), **given)


def unfenced(text: str) -> list[str]:
    """The lines that are not code. Every fence must be closed."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif match := re.fullmatch(r"(`{3,})(sql|sh)", line):
            fence = match[1]
        else:
            lines.append(line)
    assert fence == ""
    return lines


def valid(text: str) -> str:
    """The comment, after a look that every fold and every fence in it is closed."""
    lines = unfenced(text)
    assert sum("<details>" in line for line in lines) == lines.count("</details>")
    return text


def in_sight(text: str) -> str:
    """What is outside of every fold."""
    return text.partition("<details>")[0]


def test_what_a_reviewer_must_see_is_outside_of_the_fold() -> None:
    made = many(3, 2, 1)
    found = valid(comment.plan(made, file="change.plan"))
    assert found.startswith(f"{comment.marker(made)}\n# Plan for ")
    seen = in_sight(found)
    assert "**Taken away, replaced or overwritten: 3**" in seen
    for line in ("- `-` `gate.app.removed_0` (removed)", "- `.` `gate.app.forgotten_0` (no longer protected)"):
        assert line in seen.splitlines()
    assert made.effect_digest in seen
    assert made.expires_at in seen
    assert "app.added_0" not in seen
    assert "Needs 1 approval; may approve: whoever the installed policy lets." in seen
    assert 'reconciler approve change.plan --as NAME --reason "..." --accept forgets' in seen.splitlines()
    assert re.search(r"^### .*gate\.app\.added_0$", found, re.MULTILINE)


def test_one_comment_for_each_target() -> None:
    made = many(1, 0)
    again = made.model_copy(update={"created_at": "2030-01-01T00:00:00Z", "effect_digest": "0" * 64})
    elsewhere = made.model_copy(update={"target": made.target.model_copy(update={"name": "another"})})
    assert comment.marker(made) == comment.marker(again) != comment.marker(elsewhere)
    assert re.fullmatch(r"<!-- reconciler plan [0-9a-f]{32} -->", comment.marker(plan("--> @everyone")))


def test_five_thousand_changes_fit_and_show_every_removal() -> None:
    made = many(4500, 400, 100)
    found = valid(comment.plan(made, artefact="https://ci.example.org/runs/1/plan"))
    assert len(found) <= comment.LIMIT
    assert len(found) > comment.LIMIT - 5_000  # as much as fits
    seen = in_sight(found)
    for at in range(400):
        assert f"`gate.app.removed_{at}` (removed)" in seen
    for at in range(100):
        assert f"`gate.app.forgotten_{at}` (no longer protected)" in seen
    left = re.search(
        r"^(\d+) parts did not fit into this comment\. The whole plan is there: <(.*)>$", found, re.MULTILINE
    )
    assert left is not None
    assert left[2] == "https://ci.example.org/runs/1/plan"
    shown = len(re.findall(r"^### ", found, re.MULTILINE))
    assert shown > 0
    assert int(left[1]) == 5000 - shown


def test_even_when_only_names_fit() -> None:
    """Three thousand removals: a line for each would be too long, their names one after the other are not."""
    made = many(0, 1500)
    found = valid(comment.plan(made, limit=45_000))
    assert len(found) <= 45_000
    assert all(f"`gate.app.removed_{at}`" in in_sight(found) for at in range(600))
    assert re.search(r" and \d+ more$", in_sight(found), re.MULTILINE)
    assert "**Taken away, replaced or overwritten: 1500**" in found


def test_what_blocks_is_in_sight_and_nobody_is_asked_to_approve() -> None:
    blocked = many(1, 0).model_copy(update={"invariants": (states.verdict("violated"),)})
    seen = in_sight(comment.plan(blocked))
    assert "**This plan is blocked:**" in seen
    assert "- `invariant.no-cron`: violated: why" in seen.splitlines()
    assert "reconciler approve" not in seen


@pytest.mark.parametrize("hostile", [one for one in HOSTILE if one])
def test_hostile_text_is_inert(hostile: str) -> None:
    found = valid(comment.plan(plan(hostile), file="change.plan", artefact=hostile))
    bare = re.sub(r"`[^`\n]+`|<code>[^<>`\n]*</code>", "", "\n".join(unfenced(found)[1:]))
    assert "@" not in bare
    assert set(re.findall(r"<[^>\n]*>?", bare)) <= {"<details>", "<summary>", "</summary>", "</details>", LINK}
    assert "](" not in bare


LINK = "<https://evil.example>"
"""Nobody but the caller says where the whole plan lies."""


# ---------------------------------------------------------------------------------------------------------- a template


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "comment.md"
    file.write_text("{{ marker }}\n## Ours\n\n{{ summary }}\n{{ taken_away }}\n")
    made = many(1, 1)
    found = comment.plan(made, template=file)
    assert found.startswith(f"{comment.marker(made)}\n## Ours\n\nPlan: ")
    assert "`gate.app.removed_0` (removed)" in found


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{% if %}", "is no Jinja template"),
        ("{{ marker.__class__.__mro__ }}", "unsafe"),
        ("{{ marker.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ 'x' * 100000 }}", "longer than 65536 characters without any change in it"),
        ("{% for a in range(10000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_or_reaches_out(tmp_path: Path, template: str, expected: str) -> None:
    file = tmp_path / "comment.md"
    file.write_text(template)
    with pytest.raises(UsageError) as refused:
        comment.plan(many(1, 0), template=file)
    assert expected in f"{refused.value.message}"


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read the template"):
        comment.plan(many(1, 0), template=tmp_path / "nowhere")
