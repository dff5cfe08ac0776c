"""The faults that are planted in routines: every kind, at its place, nothing else changed; ids that stay."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from postgast import parse

from reconciler import mutants as planting
from reconciler.desired import sources
from reconciler.mutants import MUTATORS, Mutant, mutants
from tests.servers import PROJECT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAME = "public.f(integer)"
STATES = [PROJECT / place for place in ("state", "examples/dieu45/phase3", "examples/feature-flags/state")]
SHIPPED = [(name, path) for state in STATES for name, path in sources(state).items()]


def plpgsql(body: str, *, returns: str = "integer") -> str:
    """A function of PL/pgSQL with this body; a, b, x and y are integers, r is a record, l a list."""
    return (
        f"CREATE FUNCTION public.f(a integer DEFAULT 5) RETURNS {returns} LANGUAGE plpgsql AS $$\n"
        "DECLARE b integer; x integer; y integer; r record; l integer[];\n"
        f"BEGIN\n    {body}\nEND;\n$$;\n"
    )


def language_sql(body: str) -> str:
    return f"CREATE FUNCTION public.f(a integer) RETURNS integer LANGUAGE sql AS $$ {body}$$;\n"


def planted(text: str, mutator: str | None = None) -> list[str]:
    """The texts of all mutants, written as the original is."""
    return [as_original(each) for each in mutants(NAME, text) if mutator in {None, each.mutator}]


def as_original(mutant: Mutant) -> str:
    return mutant.text.replace("CREATE OR REPLACE ", "CREATE ").replace("$mutant$", "$$")


# --- every kind -------------------------------------------------------------------------------------------------------

# What the fault replaces, and by what, within a body. Bodies are written as PostgreSQL's deparser writes them, because
# the expression around a fault is written back as a whole.
IN_PLPGSQL = [
    ("condition", "IF a = 1 THEN x := 1; END IF;", "IF a = 1", "IF false"),
    ("condition", "IF a = 1 THEN x := 1; END IF;", "IF a = 1", "IF true"),
    ("condition", "IF a = 1 THEN x := 1; END IF;", "IF a = 1", "IF NOT (a = 1)"),
    ("condition", "IF a = 1 THEN x := 1; ELSIF b = 2 THEN x := 2; END IF;", "ELSIF b = 2", "ELSIF false"),
    ("condition", "WHILE x < 3 LOOP x := 4; END LOOP;", "WHILE x < 3", "WHILE false"),
    ("condition", "LOOP EXIT WHEN x = 3; END LOOP;", "WHEN x = 3", "WHEN true"),
    ("condition", "LOOP CONTINUE WHEN x = 3; EXIT; END LOOP;", "WHEN x = 3", "WHEN false"),
    ("condition", "x := CASE WHEN a = 1 THEN 2 END;", "WHEN a = 1", "WHEN NOT a = 1"),
    ("comparison", "x := a = 1;", "a = 1", "a <> 1"),
    ("comparison", "x := a < 1;", "a < 1", "a <= 1"),
    ("comparison", "x := a < 1;", "a < 1", "a >= 1"),
    ("comparison", "x := a >= 1;", "a >= 1", "a > 1"),
    ("comparison", "x := a LIKE 'b%';", "a LIKE", "a NOT LIKE"),
    ("comparison", "x := a NOT ILIKE 'b%';", "a NOT ILIKE", "a ILIKE"),
    ("comparison", "x := a ~ 'b';", "a ~ ", "a !~ "),
    ("comparison", "x := a IN (1, 2);", "a IN", "a NOT IN"),
    ("comparison", "x := a NOT BETWEEN 1 AND 2;", "a NOT BETWEEN", "a BETWEEN"),
    ("comparison", "x := a IS DISTINCT FROM b;", "IS DISTINCT", "IS NOT DISTINCT"),
    ("comparison", "x := a = ANY(l);", "= ANY", "= ALL"),
    ("logic", "x := a = 1 AND b = 2;", "AND", "OR"),
    ("logic", "x := a = 1 AND b = 2;", "a = 1 AND b = 2", "b = 2"),
    ("logic", "x := NOT a = 1;", "NOT a = 1", "a = 1"),
    ("logic", "x := a IS NULL;", "IS NULL", "IS NOT NULL"),
    ("logic", "x := a IS NOT TRUE;", "IS NOT TRUE", "IS TRUE"),
    ("filter", "DELETE FROM t WHERE a = 1 AND b = 2;", " WHERE a = 1 AND b = 2", ""),
    ("filter", "DELETE FROM t WHERE a = 1 AND b = 2;", "a = 1 AND b = 2", "a = 1"),
    ("filter", "x := (SELECT count(*) FILTER (WHERE a = 1) FROM t);", " FILTER (WHERE a = 1)", ""),
    ("filter", "x := (SELECT count(*) FROM t HAVING count(*) > 1);", " HAVING count(*) > 1", ""),
    ("filter", "x := (SELECT t.a FROM t JOIN u ON t.b = u.b AND t.c = u.c);", "t.b = u.b AND t.c = u.c", "t.c = u.c"),
    ("constant", "x := 7;", "7", "8"),
    ("constant", "x := 7;", "7", "6"),
    ("constant", "x := -1;", "-1", "0"),
    ("constant", "x := 1.5;", "1.5", "11.5"),
    ("constant", "x := true;", "true", "false"),
    ("constant", "x := 'ab';", "'ab'", "'abx'"),
    ("constant", "x := '';", "''", "'x'"),
    ("constant", "x := '{}';", "'{}'", """'{"mutant": 1}'"""),
    ("constant", "x := '[]';", "'[]'", """'["mutant"]'"""),
    ("arithmetic", "x := a + 1;", "a + 1", "a - 1"),
    ("arithmetic", "x := a * 2;", "a * 2", "a / 2"),
    ("arithmetic", "x := 2 ^ a;", "2 ^ a", "2 * a"),
    ("arithmetic", "x := a || 'b';", "a || 'b'", "'b' || a"),
    ("fallback", "x := COALESCE(a, b, 3);", "COALESCE(a, b, 3)", "COALESCE(b, 3)"),
    ("fallback", "x := COALESCE(a, b, 3);", "COALESCE(a, b, 3)", "COALESCE(a, b)"),
    ("fallback", "x := COALESCE(a, 3);", "COALESCE(a, 3)", "a"),
    ("fallback", "x := GREATEST(a, b);", "GREATEST", "LEAST"),
    ("fallback", "x := LEAST(a, b);", "LEAST(a, b)", "b"),
    ("normalisation", "x := lower(btrim(a));", "lower(btrim(a))", "btrim(a)"),
    ("normalisation", "x := lower(btrim(a));", "lower(btrim(a))", "lower(a)"),
    ("normalisation", "x := clock_timestamp();", "clock_timestamp()", "now()"),
    ("lock", "PERFORM a FROM t FOR UPDATE;", " FOR UPDATE", ""),
    ("lock", "PERFORM a FROM t FOR UPDATE SKIP LOCKED;", " SKIP LOCKED", ""),
    ("order", "PERFORM a FROM t ORDER BY a, b;", "a, b", "a DESC, b"),
    ("order", "PERFORM a FROM t ORDER BY a DESC, b;", "a DESC, b", "a ASC, b"),
    ("order", "PERFORM a FROM t ORDER BY a, b;", "ORDER BY a, b", "ORDER BY a"),
    ("order", "x := (SELECT array_agg(a ORDER BY a, b) FROM t);", "ORDER BY a, b", "ORDER BY b"),
    ("limit", "PERFORM a FROM t LIMIT 5;", " LIMIT 5", ""),
    ("limit", "PERFORM a FROM t OFFSET 5;", " OFFSET 5", ""),
    ("limit", "x := (SELECT count(DISTINCT a) FROM t);", "DISTINCT a", "a"),
    ("limit", "PERFORM DISTINCT a FROM t;", "DISTINCT a", "a"),
    ("column", "UPDATE t SET a = 1, b = x;", "a = 1, b = x", "b = x"),
    ("null", "UPDATE t SET a = 1, b = x;", "b = x", "b = NULL"),
    ("statement", "DELETE FROM t;", "DELETE FROM t", "NULL"),
    ("statement", "INSERT INTO t VALUES (1);", "INSERT INTO t VALUES (1)", "NULL"),
    ("statement", "PERFORM g(1);", "PERFORM g(1)", "NULL"),
    ("statement", "CALL p(1);", "CALL p(1)", "NULL"),
    ("statement", "r.n := 1;", "r.n := 1", "r.n := r.n"),
    ("statement", "l[(x = 1)::int] := 1;", "] := 1", "] := l[(x = 1)::int]"),
    ("conflict", "INSERT INTO t VALUES (1) ON CONFLICT (a) DO NOTHING;", " ON CONFLICT (a) DO NOTHING", ""),
    ("null", "RETURN a + 1;", "a + 1", "NULL"),
    ("null", "INSERT INTO t VALUES (a, 2);", "(a, 2)", "(NULL, 2)"),
    ("null", "PERFORM g(a);", "g(a)", "g(NULL)"),
]


@pytest.mark.parametrize(("mutator", "body", "before", "after"), IN_PLPGSQL)
def test_a_fault_is_planted_in_plpgsql(mutator: str, body: str, before: str, after: str) -> None:
    assert body.count(before) == 1
    assert plpgsql(body.replace(before, after)) in planted(plpgsql(body), mutator)


@pytest.mark.parametrize(
    ("mutator", "header", "before", "after"),
    [
        ("security", "SECURITY DEFINER", "DEFINER", "INVOKER"),
        ("security", "security  definer", "security  definer", "SECURITY INVOKER"),
        ("constant", "COST 1", "DEFAULT 5", "DEFAULT 6"),
        ("constant", "COST 1", "DEFAULT 5", "DEFAULT 4"),
    ],
)
def test_a_fault_is_planted_in_the_header(mutator: str, header: str, before: str, after: str) -> None:
    text = plpgsql("RETURN a;").replace("AS $$", f"{header} AS $$")
    assert text.replace(before, after) in planted(text, mutator)


def test_what_a_default_value_computes_and_null_are_left_alone() -> None:
    text = plpgsql("RETURN a;").replace("a integer DEFAULT 5", "a integer DEFAULT 2 + 3, c text DEFAULT NULL")
    assert planted(text, "constant") == []


def test_every_mutator_has_an_example_and_occurs_in_what_is_shipped() -> None:
    assert {mutator for mutator, *_ in IN_PLPGSQL} | {"security"} == set(MUTATORS)
    functions = sources(PROJECT / "state").items()
    assert {each.mutator for name, path in functions for each in mutants(name, path.read_text())} == set(MUTATORS)


# --- every place ------------------------------------------------------------------------------------------------------

# A body with one 7 that can be changed, as the mutant writes it where it writes it differently.
PLACES = {
    "into": ("SELECT a INTO x FROM t WHERE b = 7;", "SELECT a FROM t WHERE b = 8 INTO x;"),
    "into first": ("SELECT INTO x a FROM t WHERE b = 7;", "SELECT a FROM t WHERE b = 8 INTO x;"),
    "into strict": ("SELECT a INTO STRICT x FROM t WHERE b = 7;", "SELECT a FROM t WHERE b = 8 INTO STRICT x;"),
    "into many": ("SELECT a, b INTO x, y FROM t WHERE b = 7;", "SELECT a, b FROM t WHERE b = 8 INTO x, y;"),
    "into at the end": ("SELECT a FROM t WHERE b = 7 INTO x;", None),
    "into strict at the end": ("SELECT a FROM t WHERE b = 7 INTO STRICT x;", None),
    "into behind a lock": ("SELECT a FROM t WHERE b = 7 FOR UPDATE INTO x;", None),
    "returning into": ("INSERT INTO t (a) VALUES (7) RETURNING a INTO x;", None),
    "update returning into": ("UPDATE t SET a = 7 RETURNING a, b INTO STRICT x, y;", None),
    "delete returning into": ("DELETE FROM t WHERE a = 7 RETURNING a INTO x;", None),
    "with into": (
        "WITH w AS (SELECT 7 AS n) SELECT n INTO x FROM w;",
        "WITH w AS (SELECT 8 AS n) SELECT n FROM w INTO x;",
    ),
    "perform": ("PERFORM g(7);", None),
    "perform in small letters": ("perform g(7);", "PERFORM g(8);"),
    "perform over lines": ("PERFORM\n  a\n  FROM t WHERE a = 7;", "PERFORM a FROM t WHERE a = 8;"),
    "assignment": ("x := 7;", None),
    "assignment with =": ("x = 7;", None),
    "element": ("l[1] := 7;", None),
    "element that is compared for": ("l[(x = 1)::integer] := 7;", None),
    "element by a name": ("l[g(n => 1)] = 7;", None),
    "assignment of a comparison": ("x = y = 7;", None),
    "field": ("r.n := 7;", None),
    "if": ("IF a = 7 THEN NULL; END IF;", None),
    "elsif": ("IF a THEN NULL; ELSIF b = 7 THEN NULL; END IF;", None),
    "else": ("IF a THEN NULL; ELSE x := 7; END IF;", None),
    "case of a value": ("CASE 7 WHEN b THEN NULL; END CASE;", None),
    "case of values": ("CASE x WHEN a, 7 THEN NULL; END CASE;", None),
    "case of conditions": ("CASE WHEN a = 7 THEN NULL; ELSE NULL; END CASE;", None),
    "in a case": ("CASE x WHEN a THEN y := 7; END CASE;", None),
    "for a range": ("FOR i IN a..7 LOOP NULL; END LOOP;", None),
    "for a range from": ("FOR i IN 7..a LOOP NULL; END LOOP;", None),
    "for a range by": ("FOR i IN REVERSE a..b BY 7 LOOP NULL; END LOOP;", None),
    "for a query": ("FOR r IN SELECT a FROM t WHERE a = 7 LOOP NULL; END LOOP;", None),
    "for dynamic": ("FOR r IN EXECUTE x USING 7 LOOP NULL; END LOOP;", None),
    "in a for": ("FOR r IN SELECT a FROM t LOOP x := 7; END LOOP;", None),
    "foreach": ("FOREACH x IN ARRAY g(7) LOOP NULL; END LOOP;", None),
    "while": ("WHILE x < 7 LOOP NULL; END LOOP;", None),
    "exit": ("<<o>> LOOP EXIT o WHEN x = 7; END LOOP o;", None),
    "return": ("RETURN 7;", None),
    "execute": ("EXECUTE 'SELECT' || 7;", None),
    "execute using": ("EXECUTE 'SELECT 7' INTO x USING a, 7;", None),
    "raise": ("RAISE EXCEPTION '7 %', 7;", None),
    "raise using": ("RAISE EXCEPTION 'x' USING ERRCODE = 7;", None),
    "assert": ("ASSERT x = 7, y;", None),
    "open": ("OPEN r FOR SELECT a FROM t WHERE a = 7;", None),
    "block": ("BEGIN x := 7; END;", None),
    "handler": ("BEGIN NULL; EXCEPTION WHEN unique_violation THEN x := 7; END;", None),
    "call": ("CALL p(7, x);", None),
    "over lines": ("x := a +\n\n     7;", "x := a + 8;"),
    "behind a comment": ("-- x := 7\n    /* x := 7; */ x := 7;", None),
    "behind a text": ("RAISE 'x := 7'; x := 7;", None),
    "behind a word that ends so": ("PERFORM xx7; x := 7;", None),
}


@pytest.mark.parametrize(("body", "written"), PLACES.values(), ids=PLACES)
def test_a_fault_is_planted_at_every_place(body: str, written: str | None) -> None:
    last = body.rindex("7")
    changed = written or f"{body[:last]}8{body[last + 1 :]}"
    kind = "refcursor" if body.startswith("OPEN") else "record"
    text, wanted = (plpgsql(each).replace("r record", f"r {kind}") for each in (body, changed))
    assert wanted in planted(text, "constant")


@pytest.mark.parametrize(
    ("body", "before", "after"),
    [
        ("RETURN QUERY SELECT a FROM t WHERE a = 7;", "a = 7", "a <> 7"),
        ("RETURN QUERY EXECUTE 'SELECT 7' USING 7;", "USING 7", "USING 8"),
        ("RETURN NEXT a + 7;", "+ 7", "- 7"),
        ("RETURN NEXT x; RETURN;", "NEXT x", "NEXT NULL"),
    ],
)
def test_a_fault_is_planted_in_rows_that_are_returned(body: str, before: str, after: str) -> None:
    assert plpgsql(body.replace(before, after), returns="SETOF integer") in planted(
        plpgsql(body, returns="SETOF integer")
    )


def test_a_variable_that_is_returned_is_replaced_by_null_each_where_it_stands() -> None:
    body = "IF a = 1 THEN RETURN 2; ELSIF b = 1 THEN RETURN x; END IF; return x; RETURN y;"
    found = planted(plpgsql(body), "null")
    for before, after in (("RETURN x", "RETURN NULL"), ("return x", "return NULL"), ("RETURN y", "RETURN NULL")):
        assert plpgsql(body.replace(before, after)) in found
    assert planted(plpgsql("RETURN;", returns="void"), "null") == []


def test_equal_texts_on_a_line_are_changed_one_at_a_time() -> None:
    body = "x := 7; BEGIN x := 7; IF x = 7 THEN x := 7; END IF; END; x := 7;"
    spots = [match.start() for match in re.finditer("7", body)]
    found = planted(plpgsql(body), "constant")
    for spot in spots:
        assert plpgsql(f"{body[:spot]}8{body[spot + 1 :]}") in found
    assert len(found) == len(set(found)) == 2 * len(spots) + 2  # and the default value, twice


def test_declarations_and_cursors_are_changed_too() -> None:
    text = plpgsql("OPEN c(7); CLOSE c;").replace(
        "r record;",
        "r integer DEFAULT 3; k constant integer = 4; c CURSOR (n integer) FOR SELECT n FROM t WHERE a = 6;",
    )
    found = planted(text, "constant")
    for before, after in (("DEFAULT 3", "DEFAULT 4"), ("= 4", "= 5"), ("a = 6", "a = 7"), ("c(7)", "c(8)")):
        assert text.replace(before, after) in found


# --- other routines ---------------------------------------------------------------------------------------------------


def test_every_statement_of_a_sql_function_is_changed() -> None:
    text = language_sql("UPDATE t SET b = 1 WHERE c = a; SELECT b FROM t WHERE c = 7")
    found = planted(text)
    for before, after in (
        ("UPDATE t SET b = 1 WHERE c = a", ""),
        (" WHERE c = a", ""),
        ("b = 1", "b = 2"),
        ("c = 7", "c <> 7"),
    ):
        assert text.replace(before, after) in found
    assert not any("SELECT" not in each for each in found)


TRIGGER = """CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_op = 'INSERT' AND new.a IS NULL THEN
        NEW.a := ',{}},';
        RETURN NULL;
    END IF;
    RETURN NEW;
END;
$$;
"""


def test_a_trigger_function_is_changed_though_its_description_is_broken() -> None:
    found = planted(TRIGGER)
    for before, after in (
        ("tg_op = 'INSERT' AND", "tg_op <> 'INSERT' AND"),
        ("new.a IS NULL", "new.a IS NOT NULL"),
        ("',{}},'", "',{}},x'"),
        ("RETURN NEW", "RETURN NULL"),
        ("NEW.a := ',{}},'", "NEW.a := NEW.a"),
    ):
        assert TRIGGER.replace(before, after) in found
    event = "CREATE FUNCTION public.f() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no %', 7; END$$;"
    assert event.replace("7", "8") in planted(event)


@pytest.mark.parametrize("opening", ["'", "E'", "e'"])
def test_a_quoted_body_is_read_as_what_it_says(opening: str) -> None:
    body = "BEGIN RETURN ''it''''s'' || 7; END"
    found = mutants(NAME, f"CREATE FUNCTION public.f() RETURNS text LANGUAGE plpgsql AS {opening}{body}' STABLE;")
    wanted = "CREATE OR REPLACE FUNCTION public.f() RETURNS text LANGUAGE plpgsql AS $mutant${}$mutant$ STABLE;"
    assert wanted.format("BEGIN RETURN 'it''s' || 8; END") in [each.text for each in found]


def test_a_body_may_hold_the_quotes_of_mutants() -> None:
    text = language_sql("SELECT '$mutant$', '$mutantx$', 7")
    wanted = text.replace("7", "8").replace("$$", "$mutantxx$").replace("CREATE", "CREATE OR REPLACE")
    assert wanted in [each.text for each in mutants(NAME, text)]


def test_only_the_statement_is_made_to_replace() -> None:
    text = language_sql("SELECT 7").replace("CREATE FUNCTION", "create\n  or replace FUNCTION")
    said = f"-- We create function f here.\n/* CREATE FUNCTION */\n{text}"
    assert {each.text for each in mutants(NAME, said)} == {each.text for each in mutants(NAME, text)}
    assert all(each.text.startswith("CREATE OR REPLACE FUNCTION") for each in mutants(NAME, said))


def test_letters_of_several_bytes_before_a_place_do_not_move_it() -> None:
    text = (
        "-- Điều 45 — ünïcode\n"
        "CREATE FUNCTION public.f(\"é\" text DEFAULT 'ö', n integer DEFAULT 5) RETURNS text LANGUAGE plpgsql\n"
        "SECURITY DEFINER AS $$\n"
        "DECLARE x text := 'äöü 🐘';\n"
        "BEGIN\n"
        "    -- 🐘🐘🐘\n"
        "    IF \"é\" = 'ñ' THEN RETURN 'ß' || x; END IF;\n"
        "    RETURN x || 7;\n"
        "END;\n$$;\n"
    )
    said, _, statement = text.partition("\n")
    found = {as_original(each): each for each in mutants(NAME, text)}
    for line, before, after in (
        (2, "'ö'", "'öx'"),
        (2, "DEFAULT 5", "DEFAULT 6"),
        (3, "DEFINER", "INVOKER"),
        (4, "'äöü 🐘'", "'äöü 🐘x'"),
        (7, "\"é\" = 'ñ'", "\"é\" <> 'ñ'"),
        (7, "'ß' || x", "x || 'ß'"),
        (8, "x || 7", "x || 8"),
    ):
        assert found[statement.replace(before, after)].line == line, (said, before)


def test_a_line_is_that_of_the_place_in_the_file() -> None:
    body = "x := 1;\n    UPDATE t\n    SET a = 1\n    WHERE b = 7;\n"
    lines = {(each.before, each.line) for each in mutants(NAME, "\n" + plpgsql(body)) if each.mutator == "comparison"}
    assert lines == {("1 WHERE b = 7", 8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("LANGUAGE c AS 'library', 'symbol'", "its language is c; SQL and PL/pgSQL can be parsed"),
        ("LANGUAGE internal AS 'int4in'", "its language is internal; SQL and PL/pgSQL can be parsed"),
        ("LANGUAGE plpython3u AS $$return 1$$", "its language is plpython3u; SQL and PL/pgSQL can be parsed"),
        ("LANGUAGE sql BEGIN ATOMIC SELECT 1; END", "its body is not a text (BEGIN ATOMIC)"),
        ("LANGUAGE sql RETURN 1", "its body is not a text (BEGIN ATOMIC)"),
        ("LANGUAGE sql AS 'SELEC 1'", 'syntax error at or near "SELEC"'),
        ("LANGUAGE plpgsql AS 'BEGIN IF THEN END'", 'missing expression at or near "THEN"'),
        ("LANGUAGE plpgsql AS 'BEGIN RETURN 1 FROM; END'", "syntax error at end of input"),
        (
            "LANGUAGE plpgsql AS 'DECLARE c CURSOR (n integer) FOR SELECT n; BEGIN OPEN c(n => 1); END'",
            "line 1 of its body: '1 AS n' was not found in the text",
        ),
    ],
)
def test_what_cannot_be_parsed_is_said(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mutants(NAME, f"CREATE FUNCTION public.f() RETURNS integer {options};")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT 1;", "it is no CREATE FUNCTION or PROCEDURE"),
        ("", "there is no statement here"),
        ("CREATE FUNKTION f();", 'syntax error at or near "FUNKTION"'),
        (language_sql("SELECT 1") + "SELECT 2;", "exactly one statement is allowed here"),
    ],
)
def test_what_is_no_routine_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mutants(NAME, text)


def test_a_procedure_and_an_empty_body_are_routines() -> None:
    procedure = "CREATE PROCEDURE public.p(a integer) LANGUAGE plpgsql AS $$BEGIN DELETE FROM t; COMMIT; END$$;"
    assert planted(procedure) == [procedure.replace("DELETE FROM t", "NULL")]
    assert planted(language_sql("")) == []


@pytest.mark.parametrize("number", [2**31 - 1, -(2**31 - 1), 2**31, 2**63 - 1])
def test_the_largest_numbers_are_changed_to_numbers(number: int) -> None:
    found = planted(plpgsql(f"x := {number};"), "constant")
    assert plpgsql(f"x := {number - 1 if number > 0 else number + 1};") in found or number > 2**31 - 1
    assert len(found) > 2
    for text in found:
        parse(text)


# --- ids --------------------------------------------------------------------------------------------------------------


def ids(text: str) -> Sequence[str]:
    return [each.id for each in mutants(NAME, text)]


BASE = plpgsql("IF a = 1 THEN\n    x := 2;\n    END IF;\n    RETURN x + b;")


@pytest.mark.parametrize(
    "text",
    [
        "-- said before\n" + BASE,
        BASE.replace("    x := 2;", "    -- CREATE x := 2;\n\n    x := 2;"),
        BASE.replace("    x := 2;", "        x := 2;  /* a = 1 */"),
        BASE.replace("BEGIN\n", "BEGIN -- x + b\n"),
        BASE.replace("CREATE FUNCTION", "create or replace function"),
        BASE.replace("AS $$", "COST 5 AS $$"),
        BASE.replace("$$", "$body$"),
        BASE.replace("RETURN x + b;", "RETURN x + b;\n    NULL;"),
    ],
)
def test_an_id_stays_when_something_else_changes(text: str) -> None:
    assert text != BASE
    assert ids(text) == ids(BASE)


def test_ids_stay_beside_a_new_statement_and_change_with_their_own() -> None:
    more = BASE.replace("    x := 2;", "    y := 3;\n    x := 2;")
    assert set(ids(BASE)) < set(ids(more))
    other = BASE.replace("x + b", "x + a")
    assert set(ids(BASE)) - set(ids(other))
    assert {each.id for each in mutants("public.g(integer)", BASE)}.isdisjoint(ids(BASE))


def test_twins_have_ids_of_their_own() -> None:
    twins = ids(plpgsql("x := 7; x := 7; x := 7;"))
    assert len(set(twins)) == len(twins)
    assert set(ids(plpgsql("x := 7; x := 7;"))) < set(twins)


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_every_mutant_of_a_shipped_function_parses_and_differs(name: str, path: Path) -> None:
    text = path.read_text()
    bare = planting._bare(parse(text))
    found = mutants(name, text)
    assert len(found) >= 3
    for each in found:
        tree = parse(each.text)
        created = tree.stmts[0].stmt.create_function_stmt
        assert created.replace
        created.replace = False
        assert planting._bare(tree) != bare, each
        if "LANGUAGE plpgsql" in text:
            planting._described(each.text)
        assert 1 <= each.line <= text.count("\n") + 1
        assert each.before != each.after


def test_ids_are_unique_among_all_shipped_functions() -> None:
    for state in STATES:
        found = [each.id for name, path in sources(state).items() for each in mutants(name, path.read_text())]
        assert len(set(found)) == len(found) > 10
