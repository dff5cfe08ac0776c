"""Declared queries of strangers: what is accepted, what is refused, and where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler import allowlist
from reconciler.allowlist import check_expression, check_query, counted
from reconciler.syntax import Trouble
from tests.declared import ATTACKS, EXPRESSIONS, QUERIES


@pytest.mark.parametrize("query", QUERIES)
def test_an_honest_query_is_accepted(query: str) -> None:
    assert check_query(query).troubles == []


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_an_attack_is_refused(number: int) -> None:
    assert check_query(ATTACKS[number]).troubles != []


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_an_attack_is_refused_inside_another_query(number: int) -> None:
    attack = ATTACKS[number]
    inside = f"SELECT id FROM app.jobs WHERE EXISTS (\n{attack}\n)"
    # A comment at the end, and VALUES, are harmless where something follows.
    harmless = attack.endswith("the rest of the line") or attack == "VALUES (1)"
    assert (check_query(inside).troubles == []) is harmless


WHOLE = {
    "SELECT count(*) FROM app.jobs": "app.jobs",
    "SELECT pg_catalog.count(*) FROM app.jobs AS j": "app.jobs",
    'select COUNT(*) as n\nfrom "App"."Jobs" x -- all': '"App"."Jobs"',
    "SELECT count(*) FROM ONLY app.jobs": None,
    "SELECT count(j.id) FROM app.jobs AS j": None,
    "SELECT count(DISTINCT j.id) FROM app.jobs AS j": None,
    "SELECT count(*) FILTER (WHERE true) FROM app.jobs": None,
    "SELECT count(*) OVER () FROM app.jobs": None,
    "SELECT count(*) + 1 FROM app.jobs": None,
    "SELECT count(*), 1 FROM app.jobs": None,
    "SELECT sum(1) FROM app.jobs": None,
    "SELECT count(*) FROM app.jobs AS j WHERE j.id > 0": None,
    "SELECT count(*) FROM app.jobs, app.jobs AS k": None,
    "SELECT count(*) FROM app.jobs AS j JOIN app.jobs AS k ON true": None,
    "SELECT count(*) FROM app.jobs GROUP BY ()": None,
    "SELECT count(*) FROM app.jobs HAVING true": None,
    "SELECT count(*) FROM app.jobs LIMIT 1": None,
    "SELECT count(*) FROM app.jobs OFFSET 1": None,
    "SELECT count(*) FROM app.jobs TABLESAMPLE system (10)": None,
    "SELECT count(*) FROM app.jobs UNION SELECT 1": None,
    "WITH jobs AS (SELECT 1) SELECT count(*) FROM jobs": None,
    "SELECT count(*) FROM (SELECT 1) AS j": None,
    "SELECT count(*) FROM generate_series(1, 2)": None,
    "VALUES (1)": None,
    "DELETE FROM app.jobs": None,
    "": None,
}


@pytest.mark.parametrize("query", WHOLE)
def test_a_table_that_is_counted_whole(query: str) -> None:
    assert counted(query) == WHOLE[query]


def test_the_functions_of_a_query_are_known_wherever_they_stand() -> None:
    text = "SELECT lower(x) FROM unnest(ARRAY[pg_catalog.format_type(1, 2)]) AS x WHERE EXISTS (SELECT max(1))"
    assert check_query(text).functions == {"lower", "unnest", "format_type", "max"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_honest_expression_is_accepted(expression: str) -> None:
    assert check_expression(expression) == []


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "*",
        "a, b",
        "a AS b",
        "a b",
        "ALL a",
        "DISTINCT a",
        "a FROM app.jobs",
        "a WHERE true",
        "a ORDER BY 1",
        "a UNION SELECT 1",
        "a = 1; DELETE FROM app.jobs",
        "a = 1;",
        "a = 1 -- and no more",
        "1) OR (true",
        "a.b",
        "a.*",
        "(a).b",
        "(1).pg_sleep",
        "(SELECT 1)",
        "EXISTS (SELECT 1)",
        "ARRAY(SELECT 1)",
        "a IN (SELECT 1)",
        "count(*)",
        "sum(a)",
        "sum(a) OVER ()",
        "row_number() OVER ()",
        "lower(a) OVER ()",
        "generate_series(1, 2)",
        "unnest(a)",
        "pg_sleep(1)",
        "app.f(a)",
        "a::app.mood",
        "a OPERATOR(app.=) 1",
        "$1",
        "current_setting('a')",
        "(VALUES (1))",
    ],
)
def test_an_expression_is_about_one_row_only(expression: str) -> None:
    assert check_expression(expression) != []


@pytest.mark.parametrize(
    ("query", "trouble"),
    [
        (
            "SELECT *\nFROM app.jobs j,\n  jobs",
            Trouble(3, 3, "relation jobs must be named with its schema: schema.jobs"),
        ),
        ("SELECT 'ü', pg_sleep(1)", Trouble(1, 13, "pg_sleep is no function that is allowed here")),
        ("SELECT app.f(1)", Trouble(1, 8, "app.f is no function that is allowed here")),
        ("SELECT 1 FOR UPDATE", Trouble(1, 1, "a locking clause such as FOR UPDATE is not allowed here")),
        (
            "SELECT 1 FROM app.jobs FOR UPDATE OF jobs",
            Trouble(1, 38, "a locking clause such as FOR UPDATE is not allowed here"),
        ),
        ("SELECT 1 INTO x", Trouble(1, 15, "INTO is not allowed here")),
        ("SELECT $1", Trouble(1, 8, "a parameter such as $1 is not allowed here")),
        ("SELECT 'x'::app.mood", Trouble(1, 13, "type app.mood is not allowed here")),
        ("SELECT a OPERATOR(app.+) b", Trouble(1, 10, "operator app.+ is not allowed here")),
        ("SELECT a COLLATE app.c", Trouble(1, 10, "collation app.c is not allowed here")),
        ("SELECT 1;", Trouble(1, 9, "leave the semicolon out")),
        ("UPDATE app.jobs SET id = 1", Trouble(1, 1, "only SELECT is allowed here")),
        ("WITH a AS (DELETE FROM app.jobs) SELECT 1", Trouble(1, 6, "only SELECT is allowed here")),
        (
            "WITH RECURSIVE a AS (SELECT 1) SELECT 1",
            Trouble(1, 1, "WITH RECURSIVE is not allowed here"),
        ),
        (
            "SELECT x.pg_sleep FROM generate_series(1, 2) AS x",
            Trouble(1, 8, "x.pg_sleep could be a call of a function; declare the column: AS x(pg_sleep)"),
        ),
        (
            "SELECT count(*) FROM pg_catalog.pg_authid",
            Trouble(1, 22, "relation pg_catalog.pg_authid is not allowed here: it can hold secrets"),
        ),
        ("SELECT query FROM pg_catalog.pg_stat_activity", Trouble(1, 8, "column query can hold secrets")),
        ("SELECT * FROM app.jobs TABLESAMPLE system (1)", Trouble(1, 15, "TABLESAMPLE is not allowed here")),
        ("SELECT 1 FROM COALESCE(1) AS x", Trouble(1, 15, "only the call of a function is allowed in FROM")),
        ("SELECT xmlelement(NAME a)", Trouble(1, 8, "XML is not allowed here")),
    ],
)
def test_a_refusal_says_what_and_where(query: str, trouble: Trouble) -> None:
    assert check_query(query).troubles == [trouble]


def test_all_troubles_are_collected_in_order() -> None:
    troubles = check_query("SELECT pg_sleep(1),\n nextval('s'), x::mood\nFROM jobs").troubles
    assert [(trouble.line, trouble.column) for trouble in troubles] == [(1, 8), (2, 2), (2, 19), (3, 6)]


def test_the_installed_policy_can_allow_functions() -> None:
    query = (
        "SELECT app.is_late(id), public.\"Odd\"(1), pg_catalog.current_setting('a'), current_setting('b') FROM app.jobs"
    )
    assert len(check_query(query).troubles) == 4
    assert check_query(query, ["app.is_late", "public.Odd", "pg_catalog.current_setting"]).troubles == []
    assert check_expression("app.is_late(id)", ["app.is_late"]) == []
    # A policy names functions with their schema: an unqualified name is always pg_catalog's.
    assert check_query("SELECT is_late(1)", ["is_late", "app.is_late"]).troubles != []
    # And what it allows by one name is not allowed in another guise.
    assert check_query(
        "SELECT x.current_setting FROM unnest('{a}'::text[]) AS x", ["pg_catalog.current_setting"]
    ).troubles


def test_the_relations_that_are_read_are_named() -> None:
    query = (
        "WITH a AS (SELECT 1 FROM app.jobs) SELECT * FROM a, app.workers AS w"
        ' WHERE EXISTS (SELECT FROM "Odd Schema"."user") UNION SELECT 1, name FROM app.workers'
    )
    assert check_query(query).relations == ('"Odd Schema"."user"', "app.jobs", "app.workers")
    assert check_query("SELECT 1").relations == ()


def test_a_cte_is_seen_where_postgresql_sees_it() -> None:
    accepted = [
        "WITH a AS (SELECT 1) SELECT * FROM (SELECT * FROM a) AS x",
        "WITH a AS (SELECT 1), b AS (SELECT * FROM a) SELECT * FROM b UNION SELECT * FROM a",
        "WITH a AS (WITH b AS (SELECT 1) SELECT * FROM b) SELECT * FROM a",
        "SELECT (WITH a AS (SELECT 1) SELECT count(*) FROM a)",
    ]
    refused = [
        "WITH a AS (SELECT * FROM b), b AS (SELECT 1) SELECT * FROM a",
        "WITH a AS (SELECT * FROM a) SELECT * FROM a",
        "WITH a AS (WITH b AS (SELECT 1) SELECT * FROM b) SELECT * FROM b",
        "SELECT (WITH a AS (SELECT 1) SELECT count(*) FROM a) FROM a",
        "(WITH a AS (SELECT 1) SELECT * FROM a) UNION SELECT * FROM a",
    ]
    assert [query for query in accepted if check_query(query).troubles] == []
    assert [query for query in refused if not check_query(query).troubles] == []


def test_a_declared_column_may_be_named_like_a_function() -> None:
    assert check_query("SELECT x.pg_sleep FROM generate_series(1, 2) AS x(pg_sleep)").troubles == []
    twice = (
        "SELECT x.pg_sleep FROM generate_series(1, 2) AS x,"
        " LATERAL (SELECT x.pg_sleep FROM generate_series(1, 2) AS x(pg_sleep)) AS y"
    )
    assert check_query(twice).troubles != []


def test_the_lists_do_not_contradict_each_other() -> None:
    assert allowlist.SETS <= allowlist.FUNCTIONS
    assert not allowlist.FUNCTIONS & allowlist.AGGREGATES
    assert not set(allowlist.SECRET_COLUMNS) & allowlist.SECRET_RELATIONS
    assert not allowlist.OPEN_COLUMNS & (allowlist.FUNCTIONS | allowlist.AGGREGATES)
    assert not any(hidden & allowlist.OPEN_COLUMNS for hidden in allowlist.SECRET_COLUMNS.values())
    known = {f"{node}.{field}" for node, fields in allowlist.NODES.items() for field in fields.split()}
    assert not known & set(allowlist.NAMES)


WORDS = """SELECT FROM WHERE WITH AS ( ) , . * ; app.jobs jobs x pg_sleep generate_series (1,2) 1 'a' :: text mood
    JOIN ON LATERAL UNION ORDER BY FOR UPDATE [1] = $1 OVER FILTER -- /* */ VALUES RECURSIVE INTO
    NULL CASE WHEN END""".split()


@given(st.lists(st.sampled_from(WORDS), max_size=20))
@settings(deadline=None, max_examples=300)
def test_no_text_is_too_strange(parts: list[str]) -> None:
    for text in (" ".join(parts), "SELECT " + " ".join(parts)):
        if "pg_sleep (1,2)" in text.replace("/* */ ", ""):
            assert check_query(text).troubles or "--" in text
        check_expression(text)
