"""Function files: everything read, everything wrong said at its place, one text for each default."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from postgast import parse

from reconciler.defaults import canonical_default, split_expressions
from reconciler.sql import Arg, check_body, identity, parse_identity, parse_routine, split_identity
from reconciler.syntax import Trouble, one_statement, quote_ident

CLAIM = """-- Claims a job.
CREATE OR REPLACE FUNCTION public.fn_claim(
    p_actor text,
    p_limit integer DEFAULT 10,  -- a comment, with a comma
    OUT job_id bigint
) RETURNS SETOF bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL SAFE STRICT COST 5 ROWS 20
SET search_path = pg_catalog, public, pg_temp
SET lock_timeout TO '1s'
AS $body$
BEGIN
  RETURN QUERY SELECT 1::bigint;
END
$body$;
"""

NAME = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=20)
PLAIN = NAME.filter(lambda name: len(name.encode()) < 64)


def create(rest: str, arguments: str = "") -> str:
    return f"CREATE FUNCTION app.f({arguments}) {rest}"


def messages(text: str) -> list[str]:
    routine, troubles = parse_routine(text)
    assert (routine is None) == bool(troubles)
    return [trouble.message for trouble in troubles]


def test_everything_a_statement_says_is_read() -> None:
    routine, troubles = parse_routine(CLAIM)
    assert troubles == []
    assert routine is not None
    assert routine.dump() == {
        "schema_name": "public",
        "name": "fn_claim",
        "kind": "function",
        "args": [
            {"name": "p_actor", "mode": "in", "type": "text", "default": None},
            {"name": "p_limit", "mode": "in", "type": "integer", "default": "10"},
            {"name": "job_id", "mode": "out", "type": "bigint", "default": None},
        ],
        "returns": "bigint",
        "returns_set": True,
        "language": "plpgsql",
        "volatility": "stable",
        "security_definer": True,
        "parallel": "safe",
        "strict": True,
        "leakproof": False,
        "cost": 5.0,
        "rows": 20.0,
        "support": None,
        "transforms": [],
        "config": ["search_path=pg_catalog, public, pg_temp", "lock_timeout=1s"],
        "body": "\nBEGIN\n  RETURN QUERY SELECT 1::bigint;\nEND\n",
        "binary": None,
        "sql_body": False,
    }


def test_what_is_left_out_has_the_default_of_postgresql() -> None:
    routine, _ = parse_routine(create("RETURNS SETOF int LANGUAGE sql AS 'SELECT 1'"))
    assert routine is not None
    assert (routine.volatility, routine.parallel, routine.strict) == ("volatile", "unsafe", False)
    assert (routine.security_definer, routine.leakproof, routine.config) == (False, False, ())
    assert (routine.cost, routine.rows) == (100.0, 1000.0)


def test_a_function_in_c_names_its_library_and_symbol() -> None:
    for symbol, body in (("", "f"), (", '-'", "f"), (", 'g'", "g")):
        routine, _ = parse_routine(create(f"RETURNS int LANGUAGE c AS '$libdir/x'{symbol}"))
        assert routine is not None
        assert (routine.body, routine.binary, routine.cost) == (body, "$libdir/x", 1.0)


def test_a_window_line_end_is_part_of_the_body() -> None:
    routine, _ = parse_routine(create("RETURNS int\r\nLANGUAGE sql AS $$\r\nSELECT 1\r\n$$\r\n"))
    assert routine is not None
    assert routine.body == "\r\nSELECT 1\r\n"


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", Trouble(1, 1, "there is no statement here")),
        ("-- only a comment", Trouble(1, 1, "there is no statement here")),
        ("CREATE FUNCTON", Trouble(1, 8, 'syntax error at or near "FUNCTON"')),
        ("-- ü\nCREATE FUNCTION größe(a int) x", Trouble(2, 30, 'syntax error at or near "x"')),
        ("DROP TABLE x", Trouble(1, 1, "a CREATE FUNCTION or CREATE PROCEDURE statement is expected here")),
        (
            "CREATE FUNCTION a.b() RETURNS int LANGUAGE sql AS '';\n\n  -- next\n  DROP TABLE x;",
            Trouble(4, 3, "exactly one statement is allowed here, this is the second of 2"),
        ),
        ("SELECT 'a\x00'", Trouble(1, 10, "a NUL character is not allowed in SQL")),
        ("SELECT '\ud800'", Trouble(None, None, "the text is not valid Unicode")),
        ("SELECT " + "+".join("1" * 30_000), Trouble(1, 20007, "the text has more than 20,000 words")),
        ("SELECT " + "+".join("1" * 500), Trouble(None, None, "the statement is nested too deeply to be checked")),
        ("SELECT 'open", Trouble(1, 8, 'unterminated quoted string at or near "\'open"')),
    ],
)
def test_a_file_that_is_not_one_create_statement_is_refused_at_its_place(text: str, trouble: Trouble) -> None:
    assert parse_routine(text) == (None, [trouble])


SQL = " LANGUAGE sql AS ''"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CREATE FUNCTION f() RETURNS int" + SQL, "f must be named with its schema: schema.f"),
        ('CREATE FUNCTION d.s."F"() RETURNS int' + SQL, 'd.s."F" must be named with its schema: schema."F"'),
        (create("RETURNS int" + SQL, "app.t.c%TYPE"), "app.t.c%TYPE would be looked up when the statement runs"),
        (create("RETURNS app.t.c%TYPE" + SQL), "app.t.c%TYPE would be looked up when the statement runs"),
        (create("RETURNS int" + SQL, "mood"), "type mood is not built in; write it with its schema: schema.mood"),
        (create("RETURNS int" + SQL, "pg_catalog.mood"), "there is no built-in type pg_catalog.mood"),
        (create("RETURNS int" + SQL, "a.b.c"), "there is no built-in type a.b.c"),
        (create("RETURNS serial" + SQL), "type serial is not built in"),
        (create("RETURNS int LANGUAGE plpgsql RETURN 1"), "a body in SQL syntax goes with LANGUAGE sql and without AS"),
        (create("RETURNS int AS '' RETURN 1"), "a body in SQL syntax goes with LANGUAGE sql and without AS"),
        (create("RETURNS int SET search_path FROM CURRENT" + SQL), "SET search_path FROM CURRENT takes its value"),
        (create("RETURNS int SET work_mem = 1, 2" + SQL), "SET work_mem takes only one value"),
        (create("RETURNS int SET TIME ZONE INTERVAL '1' HOUR" + SQL), "the value of timezone must be a plain constant"),
        (create("RETURNS int SET TRANSACTION SNAPSHOT 'x'" + SQL), "only SET name TO value is allowed here"),
        (create("RETURNS int" + SQL, "a int = 1, b int"), "input arguments after one with a default need defaults too"),
        (create("RETURNS int" + SQL, "OUT a int = 1"), "only input arguments can have a default"),
        (create("RETURNS int" + SQL, "a SETOF int"), "an argument cannot be a set"),
        (create("RETURNS int" + SQL, "a int, a text"), "argument name a is used more than once"),
        (create("RETURNS int" + SQL, "VARIADIC a int[], b int"), "a VARIADIC argument must be the last input argument"),
        (create("RETURNS int" + SQL, "VARIADIC a int"), "a VARIADIC argument must be an array"),
        (create("RETURNS text" + SQL, "OUT a int"), "the result type must be integer because of the OUT arguments"),
        (create("RETURNS int" + SQL, "OUT a int, OUT b int"), "the result type must be record because of the OUT"),
        (create(SQL), "RETURNS is missing"),
        (create("RETURNS int AS ''"), "no LANGUAGE is given"),
        (create("RETURNS int LANGUAGE sql"), "no body is given"),
        (create("RETURNS int LANGUAGE sql AS '', ''"), "language sql takes only one string after AS"),
        (create("RETURNS int STABLE IMMUTABLE" + SQL), "VOLATILITY is given twice"),
        (create("RETURNS int COST 0" + SQL), "COST must be a positive number"),
        (create("RETURNS SETOF int ROWS -1" + SQL), "ROWS must be a positive number"),
        (create("RETURNS int ROWS 5" + SQL), "ROWS is only for functions that return a set"),
        (create("RETURNS int PARALLEL maybe" + SQL), "PARALLEL must be SAFE, RESTRICTED or UNSAFE"),
        (create("RETURNS int SUPPORT f" + SQL), "SUPPORT must name its function with the schema: schema.function"),
        ("CREATE PROCEDURE app.p() STABLE" + SQL, "a procedure cannot have this attribute"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_one_sentence(text: str, said: str) -> None:
    (message,) = messages(text)
    assert message.startswith(said)


def test_all_troubles_of_a_file_are_collected_in_order() -> None:
    _, troubles = parse_routine(
        "CREATE FUNCTION f(a mood,\n  b int DEFAULT x())\nRETURNS serial\nROWS 5\nSET a FROM CURRENT\n"
        "LANGUAGE sql AS ''"
    )
    assert [(trouble.line, trouble.column) for trouble in troubles] == [
        (1, 1),
        (1, 21),
        (3, 9),
        (4, 1),
        (5, 1),
    ]


def test_an_input_and_an_output_may_share_a_name() -> None:
    for arguments in ("a int, OUT a int", "OUT a int, a int"):
        assert messages(create(SQL, arguments)) == []
    assert messages("CREATE FUNCTION app.f(a int) RETURNS TABLE(a int, b int)" + SQL) == []
    (said,) = messages("CREATE FUNCTION app.f(INOUT a int, OUT a int) RETURNS record" + SQL)
    assert said == "argument name a is used more than once"


@pytest.mark.parametrize(
    ("written", "body"),
    [
        ("LANGUAGE sql RETURN a + 1", "RETURN a + 1"),
        ("RETURN (SELECT 1) -- and no more\n;\n", "RETURN (SELECT 1)"),
        (
            "SET work_mem = '1MB' STABLE\nRETURN /* why */ 'é; BEGIN ATOMIC' || a ;",
            "RETURN /* why */ 'é; BEGIN ATOMIC' || a",
        ),
        ("LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT 2; END", "BEGIN ATOMIC SELECT 1; SELECT 2; END"),
        (
            "begin atomic\n  SELECT CASE WHEN a THEN 1 END; -- x\nend;",
            "begin atomic\n  SELECT CASE WHEN a THEN 1 END; -- x\nend",
        ),
        ('SET "return" TO x RETURN 1', "RETURN 1"),
    ],
)
def test_a_body_in_sql_syntax_is_taken_as_it_is_written(written: str, body: str) -> None:
    routine, troubles = parse_routine(create(f"RETURNS int {written}", "a int"))
    assert troubles == []
    assert routine is not None
    assert (routine.body, routine.sql_body, routine.language) == (body, True, "sql")


@pytest.mark.parametrize(
    ("written", "default"),
    [("a int = 1 + 1", "1 + 1"), ("int DEFAULT app.f( 2, 3 ) ", "app.f( 2, 3 )"), ("a int = (2), b int = 3", "2")],
)
def test_a_default_that_is_no_constant_is_taken_as_it_is_written(written: str, default: str) -> None:
    routine, _ = parse_routine(create("RETURNS int" + SQL, written))
    assert routine is not None
    assert routine.args[0].default == default


@pytest.mark.parametrize(
    ("settings_", "config"),
    [
        ('SET search_path = public, "$user", \'A b\', "user"', ('search_path=public, "$user", "A b", "user"',)),
        ("SET search_path = ''", ('search_path=""',)),
        ("SET search_path TO 'pg_catalog, public'", ('search_path="pg_catalog, public"',)),
        ("SET a.b = 1 SET search_path = x SET a.b = 2", ("a.b=2", "search_path=x")),
        ("SET a.b = 1 SET c.d = 2 RESET a.b", ("c.d=2",)),
        ("SET a.b = 1 RESET ALL", ()),
        ("SET DateStyle = iso, dmy SET TimeZone = 'UTC'", ("DateStyle=iso, dmy", "TimeZone=UTC")),
        ("SET work_mem = 1.5 SET cost.x = 0.10 SET geqo = off", ("work_mem=1.5", "cost.x=0.10", "geqo=off")),
    ],
)
def test_settings_are_stored_as_postgresql_flattens_them(settings_: str, config: tuple[str, ...]) -> None:
    routine, troubles = parse_routine(create(f"RETURNS int {settings_}{SQL}"))
    assert troubles == []
    assert routine is not None
    assert routine.config == config


# Bodies.


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        ("BEGIN\n  RETUN 1;\nEND", 4, 'syntax error at or near "RETUN"'),
        ("BEGIN\n  PERFORM 1;\n  x := 'x'; x := 5;\nEND", 5, '"x" is not a known variable'),
        ("BEGIN\n  IF true THEN\n    RETURN 1;\n  END;\nEND", 6, 'syntax error at or near ";"'),
        ("BEGIN\n  PERFORM 1;\n\n  RETURN 2 2;\nEND", 6, 'syntax error at or near "2"'),
        ("DECLARE\n  a int;\n  b int;\n  a int;\nBEGIN\nEND", 6, 'duplicate declaration at or near "a"'),
        ("BEGIN\n  RETURN 1;\n", 4, "syntax error at end of input"),
        ("BEGIN\n  FOR r IN SELECT 1 LOOP NULL; END LOOP;\nEND", 4, "loop variable of loop over rows must be a record"),
        ("BEGIN\n  RAISE NOTICE '%', 1, 2;\nEND", 4, "too many parameters specified for RAISE"),
        ("BEGIN\n  EXIT nowhere;\nEND", 4, 'there is no label "nowhere"'),
    ],
)
def test_a_plpgsql_body_that_does_not_parse_is_reported_at_its_line(body: str, line: int, said: str) -> None:
    text = f"-- one comment\nCREATE FUNCTION app.f() RETURNS int LANGUAGE plpgsql AS $$\n{body}\n$$"
    (trouble,), checked = check_body(text)
    assert checked
    assert trouble.message.startswith(said)
    assert (trouble.line, trouble.column) == (line, None)


@pytest.mark.parametrize(
    "text",
    [
        CLAIM,
        create("RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.a := TG_OP || TG_ARGV[0]; RETURN NEW; END$$"),
        create("RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE NOTICE '%', TG_TAG; END$$"),
        create("RETURNS int LANGUAGE sql AS 'SELECT 1; SELECT 2'"),
        create("RETURNS void LANGUAGE sql AS ''"),
        "CREATE PROCEDURE app.p() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'",
    ],
)
def test_a_body_that_parses_is_checked(text: str) -> None:
    assert check_body(text) == ([], True)


@pytest.mark.parametrize(
    "text",
    [
        create("RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'", "a other.kind"),
        create("RETURNS other.kind LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'"),
        create("RETURNS int LANGUAGE plpgsql AS 'DECLARE a other.kind; BEGIN RETURN 1; END'"),
        create("RETURNS int LANGUAGE plpgsql AS 'DECLARE a public.k[]; BEGIN RETURN 1; END'"),
        create("RETURNS int LANGUAGE plpgsql AS 'DECLARE a public.k; b int; BEGIN SELECT 1, 2 INTO a, b; END'"),
        create(
            "RETURNS int LANGUAGE plpgsql AS 'DECLARE a public.k; b int; BEGIN FOR a, b IN SELECT 1 LOOP END LOOP; END'"
        ),
        create("RETURNS int LANGUAGE plpgsql AS 'DECLARE a public.k; BEGIN GET DIAGNOSTICS a = ROW_COUNT; END'"),
        create("RETURNS int LANGUAGE plpython3u AS 'return 1'"),
        create("RETURNS int LANGUAGE internal AS 'now'"),
        create("RETURNS int LANGUAGE sql RETURN 1"),
    ],
)
def test_what_the_parser_cannot_know_is_no_error_of_the_author(text: str) -> None:
    assert check_body(text) == ([], False)


def test_a_sql_body_that_does_not_parse_is_reported_with_line_and_column() -> None:
    text = "-- c\nCREATE FUNCTION app.f() RETURNS int LANGUAGE sql AS $$\nSELECT 1;\nSELECT FRM x y$$"
    assert check_body(text) == ([Trouble(4, 14, 'syntax error at or near "y"')], True)
    same_line = create("RETURNS int LANGUAGE sql AS 'SELEC 1'")
    assert check_body(same_line) == (
        [Trouble(1, same_line.index("SELEC") + 1, 'syntax error at or near "SELEC"')],
        True,
    )


def test_a_file_without_a_create_statement_has_no_body() -> None:
    assert check_body("SELECT 1") == ([], False)
    assert check_body("SELEC 1")[1] is False


# Names.


def test_an_identity_has_input_arguments_only() -> None:
    args = [
        Arg.model_validate({"name": None, "mode": mode, "type": kind, "default": None})
        for mode, kind in (
            ("in", "text"),
            ("out", "xid"),
            ("inout", '"char"'),
            ("table", "json"),
            ("variadic", "a.b[]"),
        )
    ]
    assert identity("public", "user", args) == 'public."user"(text, "char", a.b[])'


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("public.f(text, int)", "public.f(text, integer)"),
        ("public.f()", "public.f()"),
        ("  PUBLIC.F ( INT4 ,varchar(10) ) ", "public.f(integer, character varying)"),
        ("public.f(a int, OUT b text, VARIADIC c timestamptz[])", "public.f(integer, timestamp with time zone[])"),
        (
            '"A b"."q""q"("char", app."X y"[], float, bool)',
            '"A b"."q""q"("char", app."X y"[], double precision, boolean)',
        ),
        ('public."plain"(pg_catalog.int8)', "public.plain(bigint)"),
        ('public."select"(numeric(1,2), bit, character)', 'public."select"(numeric, bit, character)'),
    ],
)
def test_an_identity_has_one_form(written: str, canonical: str) -> None:
    assert parse_identity(written) == (canonical, [])
    assert parse_identity(canonical) == (canonical, [])


@pytest.mark.parametrize(
    ("written", "trouble"),
    [
        ("", Trouble(1, 1, "syntax error at end of input")),
        ("public.f", Trouble(1, 1, "write the argument types too: public.f(...)")),
        ("f(int)", Trouble(1, 1, "write the name with its schema: schema.name(argument types)")),
        ("a.b.c(int)", Trouble(1, 1, "write the name with its schema: schema.name(argument types)")),
        ("public.f(mood)", Trouble(1, 10, "type mood is not built in; write it with its schema: schema.mood")),
        ("public.f(int", Trouble(1, 13, "syntax error at end of input")),
        ("public.f(int) CASCADE", Trouble(1, 1, "write one routine as schema.name(argument types)")),
        ("public.f(int), public.g(int)", Trouble(1, 1, "write one routine as schema.name(argument types)")),
        (
            "public.f(int); DROP TABLE x",
            Trouble(1, 16, "exactly one statement is allowed here, this is the second of 2"),
        ),
        ("IF EXISTS public.f(int)", Trouble(1, 1, "write one routine as schema.name(argument types)")),
    ],
)
def test_what_is_no_identity_is_refused_at_its_place(written: str, trouble: Trouble) -> None:
    assert parse_identity(written) == (None, [trouble])
    with pytest.raises(ValueError, match=re.escape(trouble.message)):
        split_identity(written)


def test_an_identity_can_be_taken_apart() -> None:
    assert split_identity('"A b"."user"(text, app."X,y"[])') == ("A b", "user", ("text", 'app."X,y"[]'))


@given(PLAIN)
@settings(deadline=None)
def test_a_quoted_name_is_read_back(name: str) -> None:
    target = parse(f"SELECT 1 AS {quote_ident(name)}").stmts[0].stmt.select_stmt.target_list[0].res_target
    assert target.name == name


@given(PLAIN, PLAIN, st.lists(st.sampled_from(["text", "integer", '"char"', 'app."X y"[]']), max_size=3))
@settings(deadline=None)
def test_an_identity_of_any_name_is_read_back(schema: str, name: str, types: list[str]) -> None:
    args = [Arg(name=None, mode="in", type=kind, default=None) for kind in types]
    written = identity(schema, name, args)
    assert parse_identity(written) == (written, [])
    assert split_identity(written) == (schema, name, tuple(types))


def test_keywords_are_quoted_unless_they_are_unreserved() -> None:
    quoted = {
        name: quote_ident(name)
        for name in ("user", "select", "interval", "authorization", "json", "a$b", "", "A", "1a")
    }
    assert all(text == f'"{name}"' for name, text in quoted.items())
    for name in ("name", "type", "queue", "_x", "a1", "abort"):
        assert quote_ident(name) == name
    assert quote_ident('a"b') == '"a""b"'


# Defaults.


@pytest.mark.parametrize(
    ("file", "catalog", "type_text", "canonical"),
    [
        ("'{}'", "'{}'::jsonb", "jsonb", "'{}'::jsonb"),
        ("100", "100", "integer", "100"),
        ("-1", "'-1'::integer", "integer", "-1"),
        ("- 1", "'-1'::integer", "bigint", "-1"),
        ("3000000000", "'3000000000'::bigint", "bigint", "3000000000"),
        ("1::bigint", "(1)::bigint", "bigint", "1"),
        ("NULL", "NULL::text", "text", "NULL::text"),
        ("TRUE", "true", "boolean", "true"),
        ("'on'", "true", "boolean", "true"),
        ("now()", "now()", "timestamp with time zone", "now()"),
        ("pg_catalog.now()", "now()", "timestamp with time zone", "now()"),
        ("now()::date", "(now())::date", "date", "(now())::date"),
        ("now()::timestamptz", "now()", "timestamp with time zone", "now()"),
        ("current_schema()", '"current_schema"()', "text", '"current_schema"()'),
        ("current_user", "CURRENT_USER", "text", "CURRENT_USER"),
        ("ARRAY[]::text[]", "'{}'::text[]", "text[]", "'{}'::text[]"),
        ("array['a', 'b']", "ARRAY['a'::text, 'b'::text]", "text[]", "ARRAY['a'::text, 'b'::text]"),
        ("ARRAY[1,-2]", "ARRAY[1, '-2'::integer]", "integer[]", "ARRAY[1, -2]"),
        ("'it''s'", "'it''s'::text", "text", "'it''s'::text"),
        ("'x'", "'x'::bpchar", "character", "'x'::bpchar"),
        ("1.50", "1.50", "numeric", "1.50"),
        ("'5'", "'5'::numeric", "numeric", "5"),
        ("1e3", "'1000'::numeric", "numeric", "1000"),
        ("-0.0", "0.0", "numeric", "0.0"),
        ("1.50", "1.50", "double precision", "1.5"),
        ("'1.5'", "'1.5'::double precision", "double precision", "1.5"),
        ("0.1", "0.1", "real", "0.1"),
        ("'5 minutes'", "'00:05:00'::interval", "interval", "'00:05:00'::interval"),
        ("interval '1 mon 2 days'", "'1 mon 2 days'::interval", "interval", "'1 mon 2 days'::interval"),
        (
            '\'{"b":1,"a":[1.50,"é"]}\'',
            '\'{"a": [1.50, "é"], "b": 1}\'::jsonb',
            "jsonb",
            '\'{"a": [1.50, "é"], "b": 1}\'::jsonb',
        ),
        ("'sad'", "'sad'::app.mood", "app.mood", "'sad'::app.mood"),
        ("'x'::app.label", "('x'::text)::app.label", "app.label", "'x'::app.label"),
        ("100::text", "(100)::text", "text", "100"),
        ("100::text", "(100)::text", "character varying", "(100)::text"),
    ],
)
def test_a_file_and_the_catalog_have_one_text_for_a_default(
    file: str, catalog: str, type_text: str, canonical: str
) -> None:
    assert canonical_default(file, type_text) == canonical
    assert canonical_default(catalog, type_text) == canonical
    assert canonical_default(canonical, type_text) == canonical


@pytest.mark.parametrize(
    ("expression", "type_text"),
    [
        ("1 + 1", "integer"),
        ("app.f()", "integer"),
        ("lower('A')", "text"),
        ("now() + interval '1 day'", "timestamp with time zone"),
        ("CURRENT_TIMESTAMP(3)", "timestamp with time zone"),
        ("(SELECT 1)", "integer"),
        ("x", "integer"),
        ("$1", "integer"),
        ("", "integer"),
        ("1, 2", "integer"),
        ("1 AS x", "integer"),
        ("ALL 1", "integer"),
        ("1 FROM app.jobs", "integer"),
        ("99999999999", "integer"),
        ("9" * 5000, "bigint"),
        ("1e400", "double precision"),
        ("1e39", "real"),
        ("'abc'", "integer"),
        ("'maybe'", "boolean"),
        ("'{a,b}'", "text[]"),
        ("ARRAY['1', 2]", "integer[]"),
        ("ARRAY[NULL]", "integer[]"),
        ("ARRAY[[1]]", "integer[]"),
        ("ARRAY[1]", "integer"),
        ("'abc'::varchar(2)", "text"),
        ("'2026-02-30'", "date"),
        ("'today'", "date"),
        ("'2026-05-22 11:31'", "timestamp with time zone"),
        ("'1 fortnight'", "interval"),
        ("'-1 day'", "interval"),
        ("'01:99:00'", "interval"),
        ("'{a'", "jsonb"),
        ("'NaN'", "jsonb"),
        ("'\"\\u0000\"'", "jsonb"),
        ("'" + "[" * 100_000 + "'", "jsonb"),
        ("'5'", "app.label"),
        ("'true'", "app.label"),
        ("'{}'", "app.composite"),
        ("'<a/>'", "xml"),
        ("'app.jobs'", "regclass"),
        ("'not-a-uuid'", "uuid"),
        ("'\\x0'", "bytea"),
        ("'ab'", '"char"'),
        ("'" + "x" * 64 + "'", "name"),
        ("B'101'", "bit"),
        ("NULL::mood", "text"),
    ],
)
def test_what_the_catalog_would_rewrite_cannot_be_compared(expression: str, type_text: str) -> None:
    assert canonical_default(expression, type_text) is None


TYPES = st.sampled_from(
    [
        "text",
        "integer",
        "bigint",
        "numeric",
        "real",
        "double precision",
        "boolean",
        "jsonb",
        "interval",
        "text[]",
        "a.b",
    ]
)


@given(
    st.one_of(st.integers().map(str), st.decimals().map(str), st.floats().map(repr), st.text(max_size=9)),
    st.booleans(),
    TYPES,
)
@settings(deadline=None)
def test_a_canonical_default_is_a_fixed_point(value: str, quoted: bool, type_text: str) -> None:
    expression = "'" + value.replace("'", "''") + "'" if quoted else value
    canonical = canonical_default(expression, type_text)
    assert canonical is None or canonical_default(canonical, type_text) == canonical


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
@settings(deadline=None)
def test_a_float_keeps_its_value(value: float) -> None:
    canonical = canonical_default(f"'{value!r}'", "double precision")
    assert canonical is None or float(canonical) == value


def test_the_expressions_of_a_list_are_told_apart() -> None:
    text = "'a,b'::text, ARRAY[1, 2], (1)::bigint, NULL::integer, 'é(', now()"
    assert split_expressions(text) == ["'a,b'::text", "ARRAY[1, 2]", "(1)::bigint", "NULL::integer", "'é('", "now()"]
    assert split_expressions("") == []
    assert split_expressions("'open") == []


# One statement.


@pytest.mark.parametrize("text", ["SELECT 1", "INSERT INTO a VALUES (1);", ";;SELECT 1;", "/* x */ SELECT ';' -- ;"])
def test_one_statement_is_one_by_its_parse_tree(text: str) -> None:
    assert one_statement(text) == []


@pytest.mark.parametrize("text", ["", ";", "SELECT 1; COMMIT", "SELECT $$;$$; SELECT 1", "SELECT"[:3]])
def test_anything_else_is_not_one_statement(text: str) -> None:
    assert len(one_statement(text)) == 1


FRAGMENTS = st.lists(
    st.sampled_from(
        """CREATE FUNCTION PROCEDURE app.f ( ) , RETURNS int text[] SETOF TABLE LANGUAGE sql plpgsql AS '' $$ 'x' =
        DEFAULT OUT INOUT VARIADIC SET search_path TO RETURN BEGIN ATOMIC END ; COST 1 -1 STABLE a b "é" -- /* */
        NULL ::""".split()
    ),
    max_size=25,
)


@given(FRAGMENTS)
@settings(deadline=None, max_examples=300)
def test_no_text_is_too_strange(parts: list[str]) -> None:
    for text in (" ".join(parts), "CREATE FUNCTION app.f(" + " ".join(parts)):
        routine, troubles = parse_routine(text)
        assert (routine is None) == bool(troubles)
        check_body(text)
        parse_identity(text)
        canonical_default(text, "text")
        split_expressions(text)
