"""Values to try, patterns turned into texts, and queries asked of copies: what needs no server."""

from __future__ import annotations

import re

import pytest

from reconciler.syntax import expression_of, single
from reconciler.violations.samples import Column, constants_of, fresh, guesses, joined, like, matching, mentioned
from reconciler.violations.scene import Scene, elsewhere

TEXT = Column("t", "text", "S", "", not_null=False, default=None, generated=None)


def column(type_: str, category: str, element: str = "", labels: tuple[str, ...] = ()) -> Column:
    return Column("c", type_, category, element, not_null=False, default=None, generated=None, labels=labels)


def texts(some: Column, *constants: str) -> list[str]:
    return [guess.as_string(None).strip() for guess in guesses(some, constants)]


@pytest.mark.parametrize(
    "pattern",
    [
        "(^|[^a-z])(customer|e?mail|mot)([^a-z]|$)",
        "^(fn|dot)_(.*_)?(customer|e?mail|mot)(_|$)",
        r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$",
        "^[^@]+@[^@]+$",
        r"^\d{3}-\w+\s\S$",
        "a{2,5}b+?c*?",
        "^(?:x|y)[]a-]$",
        r"\D\.\$",
    ],
)
def test_a_pattern_gives_texts_that_it_matches(pattern: str) -> None:
    found = matching(pattern)
    assert found
    assert [text for text in found if not re.search(pattern, text)] == []


@pytest.mark.parametrize("pattern", ["(", "[a", "a)", "(a", "x{999999}", "(a{5000}){5000}", "\\"])
def test_a_pattern_that_cannot_be_read_gives_nothing(pattern: str) -> None:
    assert matching(pattern) == []


def test_named_classes_of_a_pattern_are_known() -> None:
    assert matching("^[[:digit:]][^[:alnum:]]$") == ["0_"]


def test_like_gives_texts_and_the_pattern_itself() -> None:
    assert like("%phase%") == ["phase", "xphasex", "%phase%"]
    assert like(r"a\_%") == ["a_", "a_x", r"a\_%"]


def test_constants_stand_with_the_columns_they_are_compared_with() -> None:
    statement, _ = single(
        "SELECT q.id FROM app.q AS q WHERE q.state IN ('leased', 'busy') AND q.n > -5 AND q.name ~ '^a|b$'"
        " AND q.tags = ANY ('{x,y}'::text[]) AND q.kind LIKE 'k%'"
    )
    assert statement is not None
    found = constants_of(statement.node)
    assert found.columns == {
        "state": ("leased", "busy"),
        "n": ("-5",),
        "name": ("a", "b"),
        "tags": ("x", "y", "{x,y}"),
        "kind": ("k", "kx", "k%"),
    }
    assert found.every[:3] == ("leased", "busy", "-5")


def test_what_is_merely_selected_does_not_matter_unless_it_is_shown() -> None:
    statement, _ = single("SELECT q.id, lower(q.name) FROM app.q AS q WHERE q.state = 'x'")
    assert statement is not None
    assert mentioned(statement.node, shown=False) == {"name", "state"}
    assert mentioned(statement.node, shown=True) == {"id", "name", "state"}


def test_constants_of_several_trees_are_joined_in_order() -> None:
    trees = [expression_of(text)[0] for text in ("a > 1 AND b = 'x'", "a < 3")]
    assert joined(constants_of(tree) for tree in trees if tree is not None).columns == {"a": ("1", "3"), "b": ("x",)}


def test_fresh_values_differ_and_repeat() -> None:
    for some in (TEXT, column("uuid", "U"), column("integer", "N"), column("smallint", "N"), column("date", "D")):
        found = [fresh(some, number) for number in range(400)]
        assert None not in found
        assert len({*found}) == 400
        assert found == [fresh(some, number) for number in range(400)]
    assert fresh(column("boolean", "B"), 0) is None


def test_values_come_from_the_type_and_the_constants() -> None:
    assert texts(TEXT, "abc")[0] == "'abc'"
    assert {"''", "' '", "'abcx'", "'ABC'"} <= {*texts(TEXT, "abc")}
    assert "'" + "x" * 13 + "'" in texts(TEXT, "12")
    assert texts(column("boolean", "B")) == ["'true'", "'false'"]
    assert texts(column("app.mood", "E", labels=("sad", "ok")), "ok") == ["'ok'", "'sad'"]
    assert """'["x"]'""" in texts(column("jsonb", "U"), '"x"')
    assert """'{"limit": 10}'""" in texts(column("jsonb", "U"), "limit", "10")
    assert """'{"x","y"}'""" in texts(column("text[]", "A", "S"), "x", "y")
    assert any("interval" in text for text in texts(column("timestamp with time zone", "D"), "1 minute"))


def test_keys_of_one_document_keep_their_own_values() -> None:
    found = guesses(column("jsonb", "U"), ("coupon", "FREE", "limit", "10"), (("coupon", "FREE"), ("limit", "10")))
    assert """'{"coupon": "FREE", "limit": 11}'""" in [one.as_string(None) for one in found]


def test_a_query_is_asked_of_copies() -> None:
    statement, _ = single(
        "WITH late AS (SELECT public.job.id FROM public.job) SELECT l.id FROM late AS l JOIN app.other AS o USING (id)"
        " WHERE EXISTS (SELECT 1 FROM public.job AS j WHERE j.id = o.id)"
    )
    assert statement is not None
    scene = Scene(statement.node, (), {}, {}, constants_of(statement.node), frozenset(), frozenset(), calls=False)
    assert elsewhere(scene, {("public", "job"): ("copies", "job_0")}) == (
        "WITH late AS (SELECT job.id FROM copies.job_0 job) SELECT l.id FROM late l JOIN app.other o USING (id)"
        " WHERE EXISTS (SELECT 1 FROM copies.job_0 j WHERE j.id = o.id)"
    )


def test_a_view_that_reads_a_copied_table_is_written_out() -> None:
    statement, _ = single("SELECT v.id FROM app.v AS v")
    view, _ = single("SELECT job.id FROM public.job WHERE job.open")
    assert statement is not None
    assert view is not None
    trees = {("app", "v"): view.node}
    scene = Scene(statement.node, (), {}, trees, constants_of(view.node), frozenset(), frozenset(), calls=False)
    assert elsewhere(scene, {("public", "job"): ("copies", "job_0")}) == (
        "SELECT v.id FROM (SELECT job.id FROM copies.job_0 job WHERE job.open) v"
    )
    assert elsewhere(scene, {}) == "SELECT v.id FROM app.v v"
