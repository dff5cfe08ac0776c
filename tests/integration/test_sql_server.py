"""What `sql`, `defaults` and `allowlist` say offline is what a real server says."""

# ruff: noqa: E501 - one statement on a line
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler import allowlist
from reconciler.allowlist import check_expression, check_query
from reconciler.defaults import CALLS, canonical_default, split_expressions
from reconciler.sql import Arg, Routine, check_body, identity, parse_identity, parse_routine, split_identity
from reconciler.syntax import BUILTIN_TYPES, quote_ident
from tests.declared import EXPRESSIONS, QUERIES, SCHEMA

if TYPE_CHECKING:
    from tests.servers import Database

TYPES = """
CREATE SCHEMA app;
CREATE SCHEMA "Odd Schema";
CREATE TYPE app.mood AS ENUM ('sad', 'ok', 'very happy');
CREATE TYPE app.pair AS (a integer, b text);
CREATE DOMAIN app.label AS text CHECK (VALUE <> '');
CREATE TYPE "Odd Schema"."Odd ""Type" AS (x integer);
CREATE TABLE app.things (id integer PRIMARY KEY, mood app.mood);
CREATE FUNCTION app.plan_support(internal) RETURNS internal LANGUAGE internal STRICT AS 'generate_series_int4_support';
CREATE TRANSFORM FOR integer LANGUAGE sql
  (FROM SQL WITH FUNCTION pg_catalog.prsd_lextype(internal), TO SQL WITH FUNCTION pg_catalog.int4recv(internal));
"""

# Each is created as it stands and read back from the catalog; every column must be what parse_routine() said.
ROUTINES = r"""
CREATE FUNCTION app.f01() RETURNS void LANGUAGE sql AS ''
CREATE FUNCTION app.f02(a int) RETURNS int LANGUAGE sql AS 'SELECT $1'
CREATE OR REPLACE FUNCTION app.f03(a int, b text) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RETURN true; END$$
CREATE FUNCTION app.f04(int, text) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 1::bigint'
CREATE FUNCTION app.f05(smallint, int8, float, real, float(3), double precision) RETURNS float4 LANGUAGE sql STABLE AS 'SELECT 1::real'
CREATE FUNCTION app.f06(dec, decimal(10,2), numeric(10,2), numeric) RETURNS numeric(5) LANGUAGE sql AS 'SELECT 1.0'
CREATE FUNCTION app.f07(varchar(10), character varying, char(3), character, bpchar, "char", nchar(2)) RETURNS varchar LANGUAGE sql AS $$SELECT 'a'::varchar$$
CREATE FUNCTION app.f08(bit, bit(3), bit varying(5), varbit, "bit") RETURNS bit LANGUAGE sql AS $$SELECT B'1'$$
CREATE FUNCTION app.f09(time, time(3), timetz, time with time zone, time without time zone) RETURNS timestamp LANGUAGE sql AS 'SELECT now()::timestamp'
CREATE FUNCTION app.f10(timestamp(3), timestamptz, timestamp with time zone, date) RETURNS timestamptz(3) LANGUAGE sql AS 'SELECT now()'
CREATE FUNCTION app.f11(interval, interval day to second, interval(3), interval year) RETURNS interval LANGUAGE sql AS $$SELECT interval '1s'$$
CREATE FUNCTION app.f12(a int[], b text[][], c integer ARRAY, d int ARRAY[3], e varchar(3)[], f _int4) RETURNS text[] LANGUAGE sql AS $$SELECT '{}'::text[]$$
CREATE FUNCTION app.f13(json, jsonb, xml, uuid, bytea, inet, cidr, macaddr, macaddr8, money, point, box) RETURNS jsonb LANGUAGE sql AS $$SELECT '{}'::jsonb$$
CREATE FUNCTION app.f14(oid, regclass, regtype, regproc, regprocedure, regrole, regnamespace, name, xid, xid8, tid, pg_lsn, oidvector, int2vector) RETURNS name LANGUAGE sql AS $$SELECT 'x'::name$$
CREATE FUNCTION app.f15(int4range, tstzrange, nummultirange, tsvector, tsquery, jsonpath, txid_snapshot, pg_snapshot, refcursor) RETURNS daterange LANGUAGE sql AS 'SELECT NULL::daterange'
CREATE FUNCTION app.f16(anyelement, anyarray) RETURNS anyelement LANGUAGE sql AS 'SELECT $1'
CREATE FUNCTION app.f17(anycompatible, anycompatiblearray, anyrange, anyenum, anynonarray) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RETURN true; END'
CREATE FUNCTION app.f18(m app.mood, p app.pair, l app.label, t app.things) RETURNS app.mood LANGUAGE sql AS 'SELECT $1'
CREATE FUNCTION app.f19(app.mood[], "Odd Schema"."Odd ""Type", "Odd Schema"."Odd ""Type"[]) RETURNS app.pair[] LANGUAGE sql AS 'SELECT NULL::app.pair[]'
CREATE FUNCTION "Odd Schema"."user"("select" int, "A b" text, "q""q" text) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION "Odd Schema"."MixedCase"() RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION "Odd Schema"."with""quote"() RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app."größe"("ünïcode" int, naïve text DEFAULT 'größer · ''é''') RETURNS text LANGUAGE sql AS $$SELECT 'é'::text$$
CREATE FUNCTION app.f24(IN a int, OUT b text, INOUT c int) RETURNS record LANGUAGE sql AS $$SELECT 'a'::text, 1$$
CREATE FUNCTION app.f25(OUT a int) LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f26(INOUT a int) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f27(OUT a int, OUT b text) LANGUAGE sql AS $$SELECT 1, 'b'::text$$
CREATE FUNCTION app.f28(a IN int, b OUT text) LANGUAGE sql AS $$SELECT 'b'::text$$
CREATE FUNCTION app.f29(VARIADIC a int[]) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f30(a text, VARIADIC b text[] DEFAULT '{}') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f31(VARIADIC "any") RETURNS int LANGUAGE internal AS 'pg_num_nulls'
CREATE FUNCTION app.f32() RETURNS SETOF int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f33() RETURNS SETOF record LANGUAGE sql ROWS 7 AS 'SELECT 1, 2'
CREATE FUNCTION app.f34() RETURNS TABLE(a int) LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.f35(x int) RETURNS TABLE(a int, b text, "C d" app.mood) LANGUAGE sql AS $$SELECT 1, 'b'::text, NULL::app.mood$$
CREATE FUNCTION app.f36(OUT a int, OUT b int) RETURNS SETOF record LANGUAGE sql AS 'SELECT 1, 2'
CREATE FUNCTION app.f37() RETURNS SETOF app.things LANGUAGE sql AS 'SELECT * FROM app.things'
CREATE FUNCTION app.f38() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.id := TG_ARGV[0]; RETURN NEW; END$$
CREATE FUNCTION app.f39() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE NOTICE '%', TG_TAG; END$$
CREATE FUNCTION app.f40() RETURNS int LANGUAGE sql IMMUTABLE STRICT LEAKPROOF PARALLEL SAFE COST 3 SECURITY DEFINER AS 'SELECT 1'
CREATE FUNCTION app.f41() RETURNS int LANGUAGE sql VOLATILE CALLED ON NULL INPUT NOT LEAKPROOF PARALLEL UNSAFE SECURITY INVOKER AS 'SELECT 1'
CREATE FUNCTION app.f42() RETURNS int LANGUAGE sql STABLE RETURNS NULL ON NULL INPUT PARALLEL RESTRICTED EXTERNAL SECURITY DEFINER AS 'SELECT 1'
CREATE FUNCTION app.f43() RETURNS int LANGUAGE sql COST 0.1 AS 'SELECT 1'
CREATE FUNCTION app.f44() RETURNS SETOF int LANGUAGE sql COST 123456789.123 ROWS 0.5 AS 'SELECT 1'
CREATE FUNCTION app.f45() RETURNS int LANGUAGE sql COST 1e10 AS 'SELECT 1'
CREATE FUNCTION app.f46(a int) RETURNS SETOF int LANGUAGE sql SUPPORT app.plan_support AS 'SELECT 1'
CREATE FUNCTION app.f47(a int, b int) RETURNS SETOF int LANGUAGE internal STRICT IMMUTABLE SUPPORT pg_catalog.generate_series_int4_support AS 'generate_series_int4'
CREATE FUNCTION app.f48(a int) RETURNS int LANGUAGE sql TRANSFORM FOR TYPE int AS 'SELECT 1'
CREATE FUNCTION app.window_row_number() RETURNS bigint LANGUAGE internal WINDOW IMMUTABLE STRICT AS 'window_row_number'
CREATE FUNCTION app.int4pl(int, int) RETURNS int LANGUAGE internal IMMUTABLE STRICT AS ''
CREATE FUNCTION app.f51() RETURNS int LANGUAGE sql SET search_path = pg_catalog, public, pg_temp AS 'SELECT 1'
CREATE FUNCTION app.f52() RETURNS int LANGUAGE sql SET search_path TO '' AS 'SELECT 1'
CREATE FUNCTION app.f53() RETURNS int LANGUAGE sql SET search_path TO 'Odd Schema', "user", "$user", 'pg_catalog, public' AS 'SELECT 1'
CREATE FUNCTION app.f54() RETURNS int LANGUAGE sql SET statement_timeout = 5000 SET work_mem = '4MB' SET lock_timeout TO '3s' AS 'SELECT 1'
CREATE FUNCTION app.f55() RETURNS int LANGUAGE sql SET seq_page_cost = 1.50 SET cpu_tuple_cost TO .01 SET enable_seqscan = off SET enable_sort = true AS 'SELECT 1'
CREATE FUNCTION app.f56() RETURNS int LANGUAGE sql SET datestyle = iso, ymd SET intervalstyle = postgres SET timezone = 'Asia/Ho_Chi_Minh' AS 'SELECT 1'
CREATE FUNCTION app.f57() RETURNS int LANGUAGE sql SET TIME ZONE 'UTC' AS 'SELECT 1'
CREATE FUNCTION app.f58() RETURNS int LANGUAGE sql SET work_mem = '1MB' SET search_path = a SET work_mem = '2MB' SET "Search_Path" = b AS 'SELECT 1'
CREATE FUNCTION app.f59() RETURNS int LANGUAGE sql SET work_mem = '1MB' SET search_path = a SET work_mem TO DEFAULT AS 'SELECT 1'
CREATE FUNCTION app.f60() RETURNS int LANGUAGE sql SET app.setting = 'It''s "quoted", so' SET "app.Other" = 5 SET app.list TO off AS 'SELECT 1'
CREATE FUNCTION app.f61() RETURNS int LANGUAGE sql SET temp_tablespaces = '' SET role = none SET client_min_messages = warning AS 'SELECT 1'
CREATE FUNCTION app.f62() RETURNS int LANGUAGE sql SET TIME ZONE LOCAL SET transform_null_equals = on SET random_page_cost = -0 AS 'SELECT 1'
CREATE FUNCTION app.f63() RETURNS int AS 'SELECT 1' STABLE LANGUAGE 'sql' PARALLEL "safe"
CREATE FUNCTION app.f64() RETURNS text LANGUAGE sql AS E'SELECT ''tab\there\\n''::text'
CREATE FUNCTION app.f65() RETURNS text LANGUAGE plpgsql AS $body$ BEGIN RETURN $$a$$ || 'b' || $x$c$x$; END $body$
CREATE PROCEDURE app.p01() LANGUAGE sql AS 'SELECT 1'
CREATE PROCEDURE app.p02(a int, b text DEFAULT 'x') LANGUAGE plpgsql AS 'BEGIN COMMIT; END'
CREATE PROCEDURE app.p03(IN a int, INOUT b text, OUT c int) LANGUAGE plpgsql AS 'BEGIN c := 1; END'
CREATE PROCEDURE app.p04(OUT a int, OUT b text) LANGUAGE plpgsql AS 'BEGIN a := 1; END'
CREATE PROCEDURE app.p05(a int, VARIADIC b int[]) LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'SELECT 1'
CREATE FUNCTION app.d01(a int = 1, b int DEFAULT -1, c bigint = 100, d bigint = -5, e bigint = 3000000000, f smallint = 3) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d02(a text = 'a', b text = '', c text = 'it''s', d text = NULL, e text = 'back\slash', f text = E'new\nline', g text = $$dollar$$) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d03(a boolean = true, b boolean = FALSE, c boolean = 't', d bool = 'no', e bool = NULL, f bool = '1') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d04(a numeric = 1, b numeric = 1.50, c numeric = -2.5, d numeric = '7', e numeric(5,2) = 1e3, f numeric = 1::int) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d05(a float8 = 1, b float8 = 1.50, c float8 = '2.50', d real = 0.1, e real = '0.1', f float8 = -1e3, g float8 = 1e20) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d06(a jsonb = '{}', b jsonb = '[]'::jsonb, c jsonb = '{"b": 1, "a":[true,null,1.50,"é\n"], "b":2}', d json = '{"b":1,  "a":2}', e jsonb = NULL, f jsonb = '"x"', g jsonb = '1e3') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d07(a text[] = '{}', b text[] = ARRAY[]::text[], c text[] = ARRAY['a', 'b'], d int[] = ARRAY[1, -2], e bigint[] = ARRAY[1, 2], f int[] = '{}'::int[], g text[] = ARRAY['a']::text[]) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d08(a varchar = 'x', b varchar(3) = 'y', c char(3) = 'z', d "char" = 'q', e name = 'n', f varchar = 'a'::text, g text = 'v'::varchar) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d09(a timestamptz = now(), b timestamptz = CURRENT_TIMESTAMP, c date = CURRENT_DATE, d timestamp = LOCALTIMESTAMP, e date = now()::date, f timestamptz = pg_catalog.clock_timestamp()) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d10(a text = CURRENT_USER, b name = SESSION_USER, c text = current_schema(), d name = current_schema, e text = USER, f name = current_catalog, g text = current_database()) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d11(a interval = '5 minutes', b interval = interval '1 day 2 hours', c interval = '00:00:30', d interval = '1 year 14 months 3 weeks', e interval = '90 sec'::interval, f interval = '0 s') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d12(a uuid = gen_random_uuid(), b uuid = 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', c date = '2026-05-22', d bytea = '\xDEADbeef', e oid = 0, f oid = '7') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d13(a app.mood = 'sad', b app.mood = 'very happy'::app.mood, c app.label = 'x', d app.mood = NULL, e app.label = NULL, f app.pair = NULL) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d14(a int = '5', b int = ' 7 ', c bigint = '9', d smallint = -1, e bigint = 1::bigint, f int = 5::smallint, g text = 100::text, h numeric = '-1'::integer) RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d15(a varchar[] = ARRAY['a', 'b'], b varchar[] = ARRAY['a']::varchar[], c bigint[] = ARRAY[1]::bigint[], d boolean[] = ARRAY[true, false], e numeric[] = ARRAY[1.5, 2.0], f "char"[] = '{}', g app.mood[] = '{}') RETURNS int LANGUAGE sql AS 'SELECT 1'
CREATE FUNCTION app.d16(INOUT a int DEFAULT 3, OUT b text, IN c text DEFAULT 'a, b) c') RETURNS record LANGUAGE sql AS $$SELECT 1, 'b'::text$$
CREATE PROCEDURE app.d17(a int, OUT b int, c text = '(,', d text[] = ARRAY['x,', ')']) LANGUAGE plpgsql AS 'BEGIN b := 1; END'
CREATE FUNCTION app.d18(a float8 = pi(), b float8 = random(), c int = pg_backend_pid(), d timestamptz = statement_timestamp(), e timestamptz = transaction_timestamp()) RETURNS int LANGUAGE sql AS 'SELECT 1'
""".strip().splitlines()

CATALOG = """
SELECT p.oid::regprocedure::text AS identity, n.nspname, p.proname, p.prokind::text, l.lanname, p.provolatile::text,
       p.prosecdef, p.proparallel::text, p.proisstrict, p.proleakproof, p.procost, p.prorows,
       (SELECT quote_ident(sn.nspname) || '.' || quote_ident(s.proname) FROM pg_proc s
          JOIN pg_namespace sn ON sn.oid = s.pronamespace WHERE s.oid = p.prosupport) AS support,
       ARRAY(SELECT format_type(t, NULL) FROM unnest(p.protrftypes) WITH ORDINALITY AS u(t, i) ORDER BY i) AS transforms,
       p.proconfig, p.prosrc, p.probin, format_type(p.prorettype, NULL) AS returns, p.proretset,
       p.proargnames, p.proargmodes::text[],
       ARRAY(SELECT format_type(t, NULL) FROM unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]))
             WITH ORDINALITY AS u(t, i) ORDER BY i) AS types,
       pg_get_expr(p.proargdefaults, 0) AS defaults
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
 WHERE p.oid = %s
"""
NEWEST = "SELECT oid FROM pg_proc ORDER BY oid::bigint DESC LIMIT 1"
WORDS = {
    "f": "function", "p": "procedure", "w": "window", "i": "immutable", "s": "stable", "v": "volatile",
}  # fmt: skip
MODES = {"i": "in", "o": "out", "b": "inout", "v": "variadic", "t": "table"}
PARALLEL = {"u": "unsafe", "r": "restricted", "s": "safe"}


def from_catalog(row: dict[str, Any]) -> Routine:
    """The same noun from pg_proc, written down independently of `kinds.function`."""
    types = row["types"]
    modes = [MODES[mode] for mode in row["proargmodes"] or "i" * len(types)]
    names = row["proargnames"] or [""] * len(types)
    expressions = split_expressions(row["defaults"] or "")
    inputs = [index for index, mode in enumerate(modes) if mode in {"in", "inout", "variadic"}]
    texts = dict(zip(inputs[len(inputs) - len(expressions) :], expressions, strict=True))
    args = [
        Arg.model_validate(
            {
                "name": names[index] or None,
                "mode": modes[index],
                "type": types[index],
                "default": canonical_default(texts[index], types[index]) if index in texts else None,
            }
        )
        for index in range(len(types))
    ]
    return Routine.model_validate(
        {
            "schema_name": row["nspname"],
            "name": row["proname"],
            "kind": WORDS[row["prokind"]],
            "args": tuple(args),
            "returns": None if row["prokind"] == "p" else row["returns"],
            "returns_set": row["proretset"],
            "language": row["lanname"],
            "volatility": WORDS[row["provolatile"]],
            "security_definer": row["prosecdef"],
            "parallel": PARALLEL[row["proparallel"]],
            "strict": row["proisstrict"],
            "leakproof": row["proleakproof"],
            "cost": row["procost"],
            "rows": row["prorows"],
            "support": row["support"],
            "transforms": tuple(row["transforms"]),
            "config": tuple(row["proconfig"] or ()),
            "body": row["prosrc"],
            "binary": row["probin"],
        }
    )


def prepare(db: Database) -> None:
    """The session that reads catalogs: as the product's own."""
    db.execute("SET search_path = ''; SET datestyle = 'ISO, YMD'; SET intervalstyle = postgres; SET timezone = 'UTC'")


def created(db: Database, statement: str) -> dict[str, Any]:
    db.execute(statement)
    cursor = db.conn.execute(CATALOG.encode(), (db.execute(NEWEST)[0][0],))
    names = [column.name for column in cursor.description or ()]
    return dict(zip(names, cursor.fetchall()[0], strict=True))


def test_a_parsed_routine_is_what_the_catalog_says(db: Database) -> None:
    assert len(ROUTINES) >= 60
    db.execute(TYPES)
    prepare(db)
    differences: dict[str, Any] = {}
    for statement in ROUTINES:
        row = created(db, statement)
        parsed, troubles = parse_routine(statement)
        live = from_catalog(row)
        if parsed is None:
            differences[statement] = troubles
        elif parsed != live:
            differences[statement] = {
                name: (getattr(parsed, name), getattr(live, name), row["defaults"])
                for name in Routine.model_fields
                if getattr(parsed, name) != getattr(live, name)
            }
        elif parse_identity(row["identity"]) != (identity(parsed.schema_name, parsed.name, parsed.args), []):
            differences[statement] = (identity(parsed.schema_name, parsed.name, parsed.args), row["identity"])
        elif split_identity(row["identity"])[:2] != (row["nspname"], row["proname"]):
            differences[statement] = split_identity(row["identity"])
        elif check_body(statement)[0]:
            differences[statement] = check_body(statement)
    assert differences == {}


def test_a_canonical_default_is_valid_and_comes_back_as_itself(db: Database) -> None:
    db.execute(TYPES)
    prepare(db)
    differences: list[tuple[str, str | None, str | None]] = []
    for statement in ROUTINES:
        parsed, _ = parse_routine(statement)
        for arg in parsed.args if parsed else ():
            if arg.default is None or canonical_default(arg.default, arg.type) != arg.default:
                assert arg.default is None, statement
                continue
            row = created(
                db, f"CREATE OR REPLACE FUNCTION app.again(a {arg.type} DEFAULT {arg.default}) RETURNS int"
                " LANGUAGE sql AS 'SELECT 1'"
            )  # fmt: skip
            (again,) = from_catalog(row).args
            db.execute(f"DROP FUNCTION {row['identity']}")
            if again.default != arg.default:
                differences.append((arg.type, arg.default, again.default))
    assert differences == []


def test_calls_without_arguments_return_what_the_table_says(db: Database) -> None:
    prepare(db)
    rows = db.execute(
        "SELECT proname::text, format_type(prorettype, NULL) FROM pg_proc"
        " WHERE pronamespace = 'pg_catalog'::regnamespace AND pronargs = 0 AND proname = ANY (%s)",
        (list(CALLS),),
    )
    newer = {"uuidv4", "uuidv7"} if db.server.major < 18 else set[str]()
    assert {name: CALLS[name] for name, _ in rows} == dict(rows)
    assert set(CALLS) - {name for name, _ in rows} == newer


def test_the_built_in_types_are_those_of_the_server(db: Database) -> None:
    prepare(db)
    rows = db.execute(
        "SELECT typname::text, format_type(oid, NULL) FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace"
        " AND typtype <> 'c' AND (typcategory <> 'A' OR typname IN ('int2vector', 'oidvector'))"
        " AND typname NOT LIKE '\\_%%'"
    )
    assert {name for name, _ in rows} == BUILTIN_TYPES
    for name, printed in rows:
        quoted = quote_ident(name)
        routine, troubles = parse_routine(f"CREATE FUNCTION a.b({quoted}, _{name}[]) RETURNS int LANGUAGE sql AS ''")
        assert routine is not None, troubles
        assert [arg.type for arg in routine.args] == [printed, f"{printed}[]"]


def test_names_are_quoted_as_the_server_quotes_them(db: Database) -> None:
    words = [word for (word,) in db.execute("SELECT word FROM pg_get_keywords()")]
    odd = ["a", "A", "a1", "1a", "_", "a_b", "a$b", "a b", 'a"b', "é", "", ".", "a.b", "A_B", "naïve", "ℵ", "x" * 63]
    live = dict(db.execute("SELECT w, quote_ident(w) FROM unnest(%s::text[]) AS w", ([*words, *odd],)))
    differences = {word for word in live if quote_ident(word) != live[word]}
    # Words that became keywords, or stricter ones, after this server: 16 and 17 brought the JSON ones.
    newer = {"json", "json_array", "json_arrayagg", "json_object", "json_objectagg", "merge_action"}
    assert differences <= (newer if db.server.major < 18 else set())

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=15))
    def any_name(name: str) -> None:
        assert db.execute("SELECT quote_ident(%s)", (name,)) == [(quote_ident(name),)] or name in newer

    any_name()


def test_accepted_queries_run_read_only_with_an_empty_path(db: Database) -> None:
    assert len(QUERIES) >= 40
    db.execute(SCHEMA)
    failures: dict[str, str] = {}
    for query in QUERIES:
        assert check_query(query).troubles == [], query
        db.execute("BEGIN READ ONLY; SET LOCAL search_path = ''; SET LOCAL statement_timeout = '10s'")
        try:
            db.execute(f"SELECT count(*) FROM (\n{query}\n) AS q")
            (assigned,) = db.execute("SELECT pg_current_xact_id_if_assigned() IS NULL")
            assert assigned == (True,), query
        except Exception as error:  # noqa: BLE001 - all failures at once
            failures[query] = str(error)
        db.execute("ROLLBACK")
    assert failures == {}


def test_accepted_expressions_run_on_one_row(db: Database) -> None:
    db.execute(SCHEMA)
    for expression in EXPRESSIONS:
        assert check_expression(expression) == []
        db.execute("BEGIN READ ONLY; SET LOCAL search_path = ''")
        assert db.execute(f"SELECT ({expression}) FROM app.workers LIMIT 1")
        db.execute("ROLLBACK")


def test_relations_of_a_query_exist(db: Database) -> None:
    db.execute(SCHEMA)
    prepare(db)
    for query in QUERIES:
        for relation in check_query(query).relations:
            assert db.execute("SELECT %s::regclass", (relation,))


NEWER = {
    15: {"has_parameter_privilege", "range_agg", "range_intersect_agg", "regexp_count", "regexp_instr", "regexp_like",
         "regexp_substr"},
    16: {"any_value", "date_add", "date_subtract"},
    17: {"pg_basetype", "to_bin", "to_oct", "uuid_extract_timestamp", "uuid_extract_version"},
    18: {"array_reverse", "array_sort", "casefold", "crc32", "crc32c"},
}  # fmt: skip
"""Allowed functions that came with a major."""

DANGEROUS = (
    "currval", "current_setting", "format", "gen_random_uuid", "lastval", "lpad", "nextval", "pg_read_file", "pg_sleep",
    "query_to_xml", "repeat", "set_config", "setval", "table_to_xml", "ts_rewrite", "ts_stat", "txid_current",
)  # fmt: skip


@pytest.mark.smoke
def test_every_allowed_function_is_built_in_and_not_volatile(db: Database) -> None:
    allowed = allowlist.FUNCTIONS | allowlist.AGGREGATES | allowlist.WINDOWS
    rows = db.execute(
        "SELECT p.proname::text, p.provolatile::text, p.prokind::text, p.proretset, l.lanname::text,"
        " 'pg_catalog.internal'::regtype = ANY (p.proargtypes::regtype[])"
        " FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang"
        " WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY (%s)",
        (list(allowed),),
    )
    missing = allowed - {row[0] for row in rows}
    assert missing <= set().union(*(names for major, names in NEWER.items() if db.server.major < major))
    # 14 calls the timezone() of timetz volatile because it knows the current offset of a zone.
    wrong = {row[0] for row in rows if row[1] == "v" or row[4] not in {"internal", "sql"} or row[5]}
    assert wrong == ({"timezone"} if db.server.major == 14 else set())
    assert {row[0] for row in rows if row[3]} == allowlist.SETS - missing
    kinds = {"f": allowlist.FUNCTIONS, "a": allowlist.AGGREGATES | allowlist.WINDOWS, "w": allowlist.WINDOWS}
    assert {row for row in rows if row[0] not in kinds[row[2]]} == set()
    assert allowed.isdisjoint(DANGEROUS)


@pytest.mark.smoke
def test_every_allowed_operator_is_not_volatile(db: Database) -> None:
    rows = db.execute(
        "SELECT o.oprname::text, p.provolatile::text, p.proname::text FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode"
        " WHERE o.oprnamespace = 'pg_catalog'::regnamespace"
    )
    assert {row[0] for row in rows} == allowlist.OPERATORS
    assert {row for row in rows if row[1] == "v"} == set()


@pytest.mark.smoke
def test_every_allowed_type_reads_its_input_without_effect(db: Database) -> None:
    rows = db.execute(
        "SELECT t.typname::text, p.provolatile::text FROM pg_type t JOIN pg_proc p ON p.oid = t.typinput"
        " WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typname = ANY (%s)",
        (list(allowlist.TYPES),),
    )
    assert {name for name, _ in rows} == allowlist.TYPES
    assert {row for row in rows if row[1] == "v"} == set()


@pytest.mark.smoke
def test_a_function_in_the_guise_of_a_column_is_refused_or_harmless(db: Database) -> None:
    prepare(db)
    rows = db.execute(
        "SELECT DISTINCT proname::text, provolatile::text FROM pg_proc"
        " WHERE pronamespace = 'pg_catalog'::regnamespace AND pronargs > 0 AND pronargs - pronargdefaults <= 1"
        " AND (proargtypes[0]::regtype::text IN ('record', '\"any\"') OR proargtypes[0]::regtype::text LIKE 'any%%')"
    )
    whole_rows = {name for name, _ in rows}
    assert {"to_jsonb", "record_out"} <= whole_rows
    for name in whole_rows:
        column = f"SELECT t.{quote_ident(name)} FROM app.jobs AS t"
        refused = bool(check_query(column).troubles)
        arrays_only = name.startswith("array_") or name in {"unnest", "cardinality"}
        assert refused or arrays_only or ("v" not in {row[1] for row in rows if row[0] == name}), name
        secret = f"SELECT t.{quote_ident(name)} FROM pg_catalog.pg_stat_activity AS t"
        assert check_query(secret).troubles, name
    one_argument = db.execute(
        "SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"
        " AND pronargs > 0 AND pronargs - pronargdefaults <= 1 AND provolatile = 'v'"
    )
    for (name,) in one_argument:
        assert check_query(f"SELECT t.{quote_ident(name)} FROM generate_series(1, 2) AS t").troubles, name
        assert name not in allowlist.OUTPUT_COLUMNS


def test_the_guise_works_on_a_server_that_is_not_protected(db: Database) -> None:
    # The reason for the rule: without it this query of one harmless function would sleep.
    with pytest.raises(Exception, match="statement timeout"):
        db.execute(
            "SET search_path = ''; SET statement_timeout = '100ms'; SELECT x.pg_sleep FROM generate_series(9, 9) AS x"
        )


@pytest.mark.smoke
def test_every_column_of_a_partly_secret_relation_is_known(db: Database) -> None:
    for relation, hidden in allowlist.SECRET_COLUMNS.items():
        rows = db.execute(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0",
            (f"pg_catalog.{relation}",),
        )
        columns = {name for (name,) in rows}
        assert hidden <= columns
        assert columns - hidden <= allowlist.OPEN_COLUMNS, relation
