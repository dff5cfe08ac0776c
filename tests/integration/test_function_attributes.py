"""Each attribute of a routine, changed alone by hand on the server: the plan shows it, the apply puts it back."""

from __future__ import annotations

import itertools
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from reconciler import desired
from tests import sampling
from tests.integration import governed
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from reconciler.model import Change
    from tests.integration.governed import Governed
    from tests.servers import Server

PROBE = "app.fn_probe(text, integer)"
TAGS = "app.fn_tags(text[])"
STEP = "app.fn_step(integer)"

SOURCES = {
    PROBE: """CREATE FUNCTION app.fn_probe(who text, times integer DEFAULT 2) RETURNS SETOF text
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER PARALLEL RESTRICTED COST 50 ROWS 20
SET search_path = pg_catalog, app, pg_temp
SET work_mem = '8MB'
AS $function$
BEGIN
    RETURN QUERY SELECT who || i FROM generate_series(1, times) AS i;
END
$function$;
""",
    TAGS: """CREATE FUNCTION app.fn_tags(tags text[]) RETURNS text LANGUAGE sql IMMUTABLE
AS $function$SELECT tags[1]$function$;
""",
    STEP: """CREATE PROCEDURE app.fn_step(amount integer DEFAULT 1) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $procedure$
BEGIN
    NULL;
END
$procedure$;
""",
}


class Case(NamedTuple):
    """One change by hand: statements, or a function that makes it. `fields`: what the plan says differs."""

    name: str
    address: str
    by_hand: tuple[str, ...] | Callable[[Governed, str], None]
    fields: set[str]
    replaced: bool = False


def again(old: str, new: str) -> Callable[[Governed, str], None]:
    """CREATE OR REPLACE with another text, as somebody with an editor would."""

    def change(system: Governed, address: str) -> None:
        definition = system.db.execute("SELECT pg_get_functiondef(%s::regprocedure)", [address])[0][0]
        assert old in definition
        system.sql("SET check_function_bodies = off", definition.replace(old, new), "RESET check_function_bodies")

    return change


def anew(*pairs: tuple[str, str]) -> Callable[[Governed, str], None]:
    """DROP and CREATE with another text; owner, grants and comment as they were."""

    def change(system: Governed, address: str) -> None:
        definition = system.db.execute("SELECT pg_get_functiondef(%s::regprocedure)", [address])[0][0]
        for old, new in pairs:
            assert old in definition
            definition = definition.replace(old, new)
        system.sql(
            f"DROP ROUTINE {address}",
            "SET check_function_bodies = off",
            "SET ROLE {owner}",
            definition,
            "RESET ROLE",
            "RESET check_function_bodies",
            f"REVOKE EXECUTE ON ROUTINE {address} FROM PUBLIC",
            f"ALTER ROUTINE {address} OWNER TO {{owner}}",
            f"GRANT EXECUTE ON ROUTINE {address} TO {{caller}}",
            f"COMMENT ON ROUTINE {address} IS 'A comment.'",
        )

    return change


def alter(address: str, *clauses: str) -> tuple[str, ...]:
    return tuple(f"ALTER ROUTINE {address} {clause}" for clause in clauses)


def as_owner(*statements: str) -> tuple[str, ...]:
    return ("SET ROLE {owner}", *statements, "RESET ROLE")


MIDDLEMAN = (
    "GRANT USAGE ON SCHEMA app TO {stranger}",
    *as_owner(f"GRANT EXECUTE ON FUNCTION {PROBE} TO {{stranger}} WITH GRANT OPTION"),
    "SET ROLE {stranger}",
    f"GRANT EXECUTE ON FUNCTION {PROBE} TO {{caller}}",
    "RESET ROLE",
)

CASES = [
    Case("body, one byte", PROBE, again("SELECT who || i", "SELECT who ||  i"), {"body"}),
    Case("body, CR added", PROBE, again("\nBEGIN\n", "\r\nBEGIN\n"), {"body"}),
    Case("body, parsed", TAGS, again("AS $function$SELECT tags[1]$function$", "RETURN tags[1]"), {"body", "sql_body"}),
    Case(
        "body, BEGIN ATOMIC",
        TAGS,
        again("AS $function$SELECT tags[1]$function$", "BEGIN ATOMIC SELECT tags[1]; END"),
        {"body", "sql_body"},
    ),
    Case("language", PROBE, again("LANGUAGE plpgsql", "LANGUAGE sql"), {"language"}),
    Case(
        "language internal",
        TAGS,
        (
            (
                "CREATE OR REPLACE FUNCTION app.fn_tags(tags text[]) RETURNS text"
                " LANGUAGE internal IMMUTABLE COST 100 AS 'lower'"
            ),
        ),
        {"body", "language"},
    ),
    Case(
        "language c",
        TAGS,
        (
            (
                "CREATE OR REPLACE FUNCTION app.fn_tags(tags text[]) RETURNS text LANGUAGE c IMMUTABLE"
                " AS '$libdir/plpgsql', 'plpgsql_call_handler'"
            ),
        ),
        {"binary", "body", "cost", "language"},
    ),
    Case("argument name", PROBE, anew(("who text", "whom text")), {"args"}, replaced=True),
    Case("argument name lost", PROBE, anew(("who text", "text")), {"args"}),
    Case("argument mode VARIADIC", TAGS, anew(("(tags text[])", "(VARIADIC tags text[])")), {"args"}, replaced=True),
    Case(
        "argument mode INOUT",
        TAGS,
        anew(("(tags text[])", "(INOUT tags text[])"), ("RETURNS text\n", "\n")),
        {"args", "returns"},
        replaced=True,
    ),
    Case("argument OUT added", TAGS, anew(("(tags text[])", "(tags text[], OUT first text)")), {"args"}, replaced=True),
    Case(
        "returns TABLE",
        PROBE,
        anew(("RETURNS SETOF text", "RETURNS TABLE(line text)")),
        {"args"},
        replaced=True,
    ),
    Case("default changed", PROBE, again("DEFAULT 2", "DEFAULT 3"), {"args"}),
    Case("default an expression", PROBE, again("DEFAULT 2", "DEFAULT (1 + 1)"), {"args"}),
    Case("default removed", PROBE, anew((" DEFAULT 2", "")), {"args"}),
    Case("default added", PROBE, again("who text", "who text DEFAULT 'x'"), {"args"}, replaced=True),
    Case("return type", PROBE, anew(("SETOF text", "SETOF character varying")), {"returns"}, replaced=True),
    Case(
        "SETOF lost",
        PROBE,
        anew(("SETOF text", "text"), (" ROWS 20", "")),
        {"returns_set", "rows"},
        replaced=True,
    ),
    Case("SETOF added", TAGS, anew(("RETURNS text", "RETURNS SETOF text")), {"returns_set", "rows"}, replaced=True),
    Case("volatility", PROBE, alter(PROBE, "VOLATILE"), {"volatility"}),
    Case("volatility immutable", PROBE, alter(PROBE, "IMMUTABLE"), {"volatility"}),
    Case("strict", PROBE, alter(PROBE, "CALLED ON NULL INPUT"), {"strict"}),
    Case("strict added", TAGS, alter(TAGS, "STRICT"), {"strict"}),
    Case("leakproof", PROBE, alter(PROBE, "LEAKPROOF"), {"leakproof"}),
    Case("security definer lost", PROBE, alter(PROBE, "SECURITY INVOKER"), {"security_definer"}),
    Case("security definer added", TAGS, alter(TAGS, "SECURITY DEFINER"), {"security_definer"}),
    Case("parallel", PROBE, alter(PROBE, "PARALLEL SAFE"), {"parallel"}),
    Case("parallel unsafe", PROBE, alter(PROBE, "PARALLEL UNSAFE"), {"parallel"}),
    Case("cost", PROBE, alter(PROBE, "COST 51"), {"cost"}),
    Case("cost, a fraction", PROBE, alter(PROBE, "COST 50.25"), {"cost"}),
    Case("rows", PROBE, alter(PROBE, "ROWS 21"), {"rows"}),
    Case("support", PROBE, alter(PROBE, "SUPPORT pg_catalog.generate_series_int4_support"), {"support"}),
    Case(
        "transform",
        PROBE,
        (
            (
                "CREATE TRANSFORM FOR integer LANGUAGE plpgsql ("
                "FROM SQL WITH FUNCTION pg_catalog.prsd_lextype(internal),"
                " TO SQL WITH FUNCTION pg_catalog.int4recv(internal))"
            ),
            SOURCES[PROBE]
            .replace("CREATE", "CREATE OR REPLACE")
            .replace("STABLE", "TRANSFORM FOR TYPE integer STABLE"),
        ),
        {"transforms"},
    ),
    Case("setting added", PROBE, alter(PROBE, "SET enable_seqscan = off"), {"config"}),
    Case("setting removed", PROBE, alter(PROBE, "RESET work_mem"), {"config"}),
    Case("setting changed", PROBE, alter(PROBE, "SET work_mem = '9MB'"), {"config"}),
    Case("path lost", PROBE, alter(PROBE, "RESET search_path"), {"config"}),
    Case("path turned", PROBE, alter(PROBE, "SET search_path = app, pg_catalog, pg_temp"), {"config"}),
    Case("all settings lost", PROBE, alter(PROBE, "RESET ALL"), {"config"}),
    Case("owner", PROBE, alter(PROBE, "OWNER TO {stranger}"), {"acl", "owner"}),
    Case("owner the caller", PROBE, alter(PROBE, "OWNER TO {caller}"), {"acl", "owner"}),
    Case("owner superuser", PROBE, alter(PROBE, "OWNER TO postgres"), {"acl", "owner"}),
    Case("grant to PUBLIC", PROBE, as_owner(f"GRANT EXECUTE ON FUNCTION {PROBE} TO PUBLIC"), {"acl"}),
    Case("grants unset", PROBE, (f"UPDATE pg_proc SET proacl = NULL WHERE oid = '{PROBE}'::regprocedure",), {"acl"}),
    Case("grants empty", PROBE, as_owner(f"REVOKE EXECUTE ON FUNCTION {PROBE} FROM {{owner}}, {{caller}}"), {"acl"}),
    Case("grant too many", PROBE, as_owner(f"GRANT EXECUTE ON FUNCTION {PROBE} TO {{stranger}}"), {"acl"}),
    Case("grant missing", PROBE, as_owner(f"REVOKE EXECUTE ON FUNCTION {PROBE} FROM {{caller}}"), {"acl"}),
    Case(
        "grant option",
        PROBE,
        as_owner(f"GRANT EXECUTE ON FUNCTION {PROBE} TO {{caller}} WITH GRANT OPTION"),
        {"acl"},
    ),
    Case(
        "grant option of the owner",
        PROBE,
        as_owner(f"GRANT EXECUTE ON FUNCTION {PROBE} TO {{owner}} WITH GRANT OPTION"),
        {"acl"},
    ),
    Case("grant of the owner", PROBE, as_owner(f"REVOKE EXECUTE ON FUNCTION {PROBE} FROM {{owner}}"), {"acl"}),
    Case("grant by another grantor", PROBE, MIDDLEMAN, {"acl"}),
    Case(
        "grant only by another grantor",
        PROBE,
        (*MIDDLEMAN, *as_owner(f"REVOKE EXECUTE ON FUNCTION {PROBE} FROM {{caller}}")),
        {"acl"},
    ),
    Case("comment changed", PROBE, (f"COMMENT ON FUNCTION {PROBE} IS 'Another comment.'",), {"comment"}),
    Case("comment removed", PROBE, (f"COMMENT ON FUNCTION {PROBE} IS NULL",), {"comment"}),
    Case("window", TAGS, anew((" IMMUTABLE", " WINDOW IMMUTABLE")), {"kind"}, replaced=True),
    Case(
        "procedure: body",
        STEP,
        again("NULL;", "NULL; "),
        {"body"},
    ),
    Case("procedure: security definer", STEP, alter(STEP, "SECURITY DEFINER"), {"security_definer"}),
    Case("procedure: setting", STEP, alter(STEP, "SET work_mem = '9MB'"), {"config"}),
    Case("procedure: path lost", STEP, alter(STEP, "RESET search_path"), {"config"}),
    Case("procedure: owner", STEP, alter(STEP, "OWNER TO {stranger}"), {"acl", "owner"}),
    Case(
        "procedure: grants unset",
        STEP,
        (f"UPDATE pg_proc SET proacl = NULL WHERE oid = '{STEP}'::regprocedure",),
        {"acl"},
    ),
    Case("procedure: grant too many", STEP, (f"GRANT EXECUTE ON PROCEDURE {STEP} TO {{stranger}}",), {"acl"}),
    Case("procedure: comment", STEP, (f"COMMENT ON PROCEDURE {STEP} IS NULL",), {"comment"}),
    Case("procedure: default", STEP, again("DEFAULT 1", "DEFAULT 2"), {"args"}),
    Case("procedure: language", STEP, again("LANGUAGE plpgsql", "LANGUAGE sql"), {"language"}),
    Case("procedure: argument name", STEP, anew(("amount", "number")), {"args"}, replaced=True),
    Case("procedure: argument mode INOUT", STEP, anew(("IN amount", "INOUT amount")), {"args"}, replaced=True),
    Case("procedure: argument OUT", STEP, anew(("(IN amount", "(OUT n integer, IN amount")), {"args"}, replaced=True),
]


def probes(db: Database, root: Path) -> Governed:
    """Three routines under governance, applied once."""
    system = governed.empty(db, root)
    for address, text in SOURCES.items():
        system.function(address, text)
    system.write().settle()
    return system


def roots(change: Change) -> set[str]:
    """The attributes that differ, without the way into them: `args[0]['name']` is args."""
    return {re.split(r"[\[.]", field.name)[0] for field in change.fields}


def only_change(system: Governed) -> Change:
    plan = system.plan()
    (change,) = plan.changes
    assert (plan.setup, plan.summary.drift, len(plan.drift)) == ((), 1, 1)
    assert plan.drift[0].address == change.address
    assert "overwrites_drift" in change.hazards
    return change


def test_the_cases_cover_every_attribute() -> None:
    """A new attribute of the model needs a case here. Schema and name are the identity."""
    from reconciler.kinds.function import FunctionSpec

    covered = {field for case in CASES for field in case.fields}
    assert set(FunctionSpec.model_fields) - covered == {"name", "schema_name"}


@pytest.fixture(scope="module")
def lent(
    server: Server, new_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], AbstractContextManager[Governed]]]:
    """`with lent() as system`: probes in sync, from the test before where that came to its end and left them so."""
    idle: list[Governed] = []
    made: list[Database] = []

    @contextmanager
    def one() -> Iterator[Governed]:
        if not idle:
            made.append(Database.create(server, new_name()))
            idle.append(probes(made[-1], tmp_path_factory.mktemp("probes")))
        system = idle.pop()
        yield system
        idle.append(system)

    yield one
    for database in made:
        database.drop()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_attribute_changed_by_hand_is_seen_and_put_back(
    lent: Callable[[], AbstractContextManager[Governed]], case: Case
) -> None:
    with lent() as system:
        seen_and_put_back(system, case)


def seen_and_put_back(system: Governed, case: Case) -> None:
    if callable(case.by_hand):
        case.by_hand(system, case.address)
    else:
        system.sql(*case.by_hand)

    change = only_change(system)
    assert change.address == f"function.{case.address}"
    assert roots(change) == case.fields
    assert change.actions == (("remove", "add") if case.replaced else ("change",))
    assert ("replaces_function" in change.hazards) == case.replaced
    assert [moved.address for moved in system.drift().drift] == [change.address]

    system.settle()


@pytest.mark.parametrize(
    ("address", "by_hand"),
    [
        (
            PROBE,
            (
                f"DROP FUNCTION {PROBE}",
                "CREATE PROCEDURE app.fn_probe(who text, times integer DEFAULT 2) LANGUAGE plpgsql AS 'BEGIN END'",
            ),
        ),
        (
            STEP,
            (
                f"DROP PROCEDURE {STEP}",
                "CREATE FUNCTION app.fn_step(amount integer DEFAULT 1) RETURNS void LANGUAGE plpgsql AS 'BEGIN END'",
            ),
        ),
    ],
    ids=["function to procedure", "procedure to function"],
)
def test_another_kind_of_routine(db: Database, tmp_path: Path, address: str, by_hand: tuple[str, ...]) -> None:
    system = probes(db, tmp_path)
    system.sql(*by_hand)
    change = only_change(system)
    assert {"kind", "returns", "owner", "acl", "comment", "config"} <= roots(change)
    assert change.address == f"function.{address}"
    assert change.actions == ("remove", "add")
    assert "replaces_function" in change.hazards
    system.settle()


@pytest.mark.parametrize("address", [PROBE, STEP])
@pytest.mark.parametrize(
    ("by_hand", "undeclared"),
    [
        (("DROP ROUTINE {address}",), None),
        (("ALTER ROUTINE {address} RENAME TO fn_other",), "app.fn_other"),
        (("CREATE SCHEMA elsewhere", "ALTER ROUTINE {address} SET SCHEMA elsewhere"), None),
    ],
    ids=["dropped", "renamed", "moved"],
)
def test_a_routine_that_is_gone(
    db: Database, tmp_path: Path, address: str, by_hand: tuple[str, ...], undeclared: str | None
) -> None:
    system = probes(db, tmp_path)
    system.sql(*(statement.replace("{address}", address) for statement in by_hand))
    change = only_change(system)
    assert (change.address, change.actions, change.before) == (f"function.{address}", ("add",), None)
    found = [finding.address.partition("(")[0] for finding in system.plan().findings]
    assert found == ([] if undeclared is None else [f"function.{undeclared}"])
    system.settle()


def test_an_overload_in_scope_is_a_finding_and_stays(db: Database, tmp_path: Path) -> None:
    system = probes(db, tmp_path)
    system.sql("CREATE FUNCTION app.fn_probe(who text, times bigint) RETURNS text LANGUAGE sql AS 'SELECT who'")
    plan = system.plan()
    assert (plan.changes, plan.drift, plan.outcome) == ((), (), "no_changes")
    (finding,) = plan.findings
    assert (finding.code, finding.address) == ("undeclared", "function.app.fn_probe(text, bigint)")
    assert [found.code for found in system.drift().findings] == ["undeclared"]


def test_or_replace_by_hand_loses_what_it_is_not_told(db: Database, tmp_path: Path) -> None:
    """Only the body was meant: SECURITY DEFINER, the path and everything else fall back to defaults."""
    system = probes(db, tmp_path)
    system.sql(
        "CREATE OR REPLACE FUNCTION app.fn_probe(who text, times integer DEFAULT 2) RETURNS SETOF text LANGUAGE plpgsql"
        " AS 'BEGIN RETURN NEXT who; END'"
    )
    change = only_change(system)
    assert roots(change) == {"body", "config", "cost", "parallel", "rows", "security_definer", "strict", "volatility"}
    assert change.actions == ("change",)
    assert "security_definer" in change.hazards
    system.settle()


def test_everything_at_once(db: Database, tmp_path: Path) -> None:
    system = probes(db, tmp_path)
    system.sql(
        *MIDDLEMAN,
        f"COMMENT ON FUNCTION {PROBE} IS NULL",
        *alter(PROBE, "OWNER TO postgres", "RESET ALL", "SECURITY INVOKER", "COST 1", "LEAKPROOF", "VOLATILE"),
        f"GRANT EXECUTE ON FUNCTION {PROBE} TO PUBLIC",
        f"DROP PROCEDURE {STEP}",
        *alter(TAGS, "OWNER TO {caller}"),
    )
    assert {change.address: change.actions for change in system.plan().changes} == {
        f"function.{PROBE}": ("change",),
        f"function.{STEP}": ("add",),
        f"function.{TAGS}": ("change",),
    }
    system.settle()


def test_replaced_although_its_new_owner_cannot_see_the_schema(db: Database, tmp_path: Path) -> None:
    system = probes(db, tmp_path)
    anew(("SETOF text", "SETOF character varying"))(system, PROBE)
    system.sql(*alter(PROBE, "OWNER TO {stranger}"))
    assert only_change(system).actions == ("remove", "add")
    system.settle()


def test_a_chain_of_grants_is_taken_back_from_its_end(db: Database, tmp_path: Path) -> None:
    """Each link may only be revoked when nothing depends on it, whatever the roles are called."""
    system = probes(db, tmp_path)
    chain = [system.owner, *sorted([db.role(), db.role(), system.stranger]), system.caller]
    system.sql(f"GRANT USAGE ON SCHEMA app TO {', '.join(chain)}")
    for giver, taker in itertools.pairwise(chain):
        system.sql(f"SET ROLE {giver}", f"GRANT EXECUTE ON FUNCTION {PROBE} TO {taker} WITH GRANT OPTION", "RESET ROLE")
    assert roots(only_change(system)) == {"acl"}
    system.settle()


def test_a_chain_of_grants_against_the_alphabet(db: Database, tmp_path: Path) -> None:
    system = probes(db, tmp_path)
    chain = [system.owner, *sorted([db.role(), db.role(), system.stranger], reverse=True), system.caller]
    system.sql(f"GRANT USAGE ON SCHEMA app TO {', '.join(chain)}")
    for giver, taker in itertools.pairwise(chain):
        system.sql(f"SET ROLE {giver}", f"GRANT EXECUTE ON FUNCTION {PROBE} TO {taker} WITH GRANT OPTION", "RESET ROLE")
    assert roots(only_change(system)) == {"acl"}
    system.settle()


@pytest.mark.parametrize(
    "privileges",
    [
        ("GRANT EXECUTE ON FUNCTIONS TO {stranger}",),
        ("IN SCHEMA app GRANT EXECUTE ON FUNCTIONS TO {stranger}",),
        ("GRANT EXECUTE ON FUNCTIONS TO {stranger} WITH GRANT OPTION",),
        ("GRANT EXECUTE ON FUNCTIONS TO {caller} WITH GRANT OPTION",),
        ("REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC", "GRANT EXECUTE ON FUNCTIONS TO {caller}"),
        ("REVOKE EXECUTE ON FUNCTIONS FROM {owner}",),
        ("GRANT EXECUTE ON FUNCTIONS TO {owner} WITH GRANT OPTION",),
    ],
    ids=[
        "to a stranger",
        "in the schema",
        "with grant option",
        "grant option to a grantee",
        "not to PUBLIC",
        "not to the owner",
        "grant option to the owner",
    ],
)
@pytest.mark.parametrize("how", sampling.slow(["new", "replaced"], 2))
def test_default_privileges_do_not_leak(db: Database, tmp_path: Path, privileges: tuple[str, ...], how: str) -> None:
    system = probes(db, tmp_path)
    if how == "new":
        system.sql(f"DROP FUNCTION {PROBE}")
    else:
        anew(("SETOF text", "SETOF character varying"))(system, PROBE)
    system.sql(*(f"ALTER DEFAULT PRIVILEGES FOR ROLE {{owner}} {clause}" for clause in privileges))
    system.settle()
    granted = db.execute(
        "SELECT g.rolname, r.rolname, a.is_grantable FROM pg_proc p CROSS JOIN aclexplode(p.proacl) a"
        " JOIN pg_roles r ON r.oid = a.grantor LEFT JOIN pg_roles g ON g.oid = a.grantee"
        " WHERE p.oid = %s::regprocedure",
        [PROBE],
    )
    assert sorted(granted) == sorted([(system.owner, system.owner, False), (system.caller, system.owner, False)])


def test_the_files_change_and_so_does_the_function(db: Database, tmp_path: Path) -> None:
    """Pending, not drift: every attribute moves from what was applied to what is declared now."""
    system = probes(db, tmp_path)
    system.files["functions/0.sql"] = """CREATE FUNCTION app.fn_probe(whom text, times integer) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE COST 7.5
SET "TimeZone" = 'UTC'
AS $$SELECT $1$$;
"""
    system.state["functions"][PROBE] |= {"owner": system.stranger, "execute": [system.owner], "comment": None}
    system.sql("GRANT USAGE, CREATE ON SCHEMA app TO {stranger}")
    system.write()
    plan = system.plan()
    (change,) = plan.changes
    assert plan.drift == ()
    assert change.actions == ("remove", "add")
    assert {"replaces_function", "changes_owner"} <= set(change.hazards)
    assert "overwrites_drift" not in change.hazards
    assert [moved.address for moved in system.drift().pending] == [f"function.{PROBE}"]
    system.settle()
    assert db.execute("SELECT app.fn_probe('you', 1)") == [("you",)]


# -------------------------------------------------------------------------------------------- what a file may hold

ODD = """CREATE FUNCTION app."Fn ""odd"" %s"("select" text, "Zeit, ""ja"" %(x)s" integer DEFAULT 1) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $outer$
BEGIN
    RETURN "select" || $function$ a $function1$ b $function$ || '\\n%s {{}} Đ ''x'' ' || "Zeit, ""ja"" %(x)s";
END
$outer$;
"""

BODIES = {
    "CRLF": "\r\nBEGIN\r\n    RETURN 'a';\r\nEND\r\n",
    "CR": "\rBEGIN\r    RETURN 'a';\rEND\r",
    "mixed line ends": "\nBEGIN\r\n    RETURN 'a';\rEND\n\n",
    "dollar quotes": "BEGIN RETURN $function$a$function$ || $function1$b$function1$; END",
    "unfinished tag": "BEGIN RETURN 'a'; END -- $function",
    "dollar at the end": "BEGIN RETURN 'a'; END -- $",
    "backslashes": "BEGIN RETURN E'\\\\ \\' \\u0041' || '\\'; END",
    "placeholders": "BEGIN RETURN '%s %(a)s {} {0} $1 :x'; END",
    "other scripts": "BEGIN RETURN 'Điều 45 — 数据库 🐘'; END",
    "spaces": "  \t BEGIN RETURN 'a'; END \t  ",
    "second statement": "BEGIN RETURN 'a'; END; -- ; COMMIT; DROP TABLE x;",
}


def test_a_body_arrives_to_the_byte(db: Database, tmp_path: Path) -> None:
    """When the function is created, and when it is replaced because of something else."""
    system = governed.empty(db, tmp_path)
    for number, body in enumerate(BODIES.values()):
        text = f"CREATE FUNCTION app.fn_body_{number}() RETURNS text LANGUAGE plpgsql AS $quote${body}$quote$;\n"
        system.function(f"app.fn_body_{number}()", text)
    system.write().settle()
    wanted = {f"fn_body_{number}": body for number, body in enumerate(BODIES.values())}
    assert dict(db.execute("SELECT proname, prosrc FROM pg_proc WHERE proname LIKE 'fn_body_%'")) == wanted
    for name in wanted:
        system.sql(f"ALTER FUNCTION app.{name} COST 5")
    found = {change.address: roots(change) for change in system.plan().changes}
    assert found == {f"function.app.{name}()": {"cost"} for name in wanted}
    system.settle()
    assert dict(db.execute("SELECT proname, prosrc FROM pg_proc WHERE proname LIKE 'fn_body_%'")) == wanted


def test_a_file_with_crlf_everywhere(db: Database, tmp_path: Path) -> None:
    system = governed.empty(db, tmp_path)
    system.function("app.fn_greet(text, integer)", governed.GREET.replace("\n", "\r\n"))
    system.write().settle()
    ((body,),) = db.execute("SELECT prosrc FROM pg_proc WHERE proname = 'fn_greet'")
    assert body.count("\r\n") == body.count("\n") == 4


def test_names_that_need_quotes(db: Database, tmp_path: Path) -> None:
    system = governed.empty(db, tmp_path)
    role = db.role()
    odd_role = f'R "{role}", %s'
    quoted = '"' + odd_role.replace('"', '""') + '"'
    db.execute(f"CREATE ROLE {quoted}")
    try:
        db.execute(f"GRANT USAGE, CREATE ON SCHEMA app TO {quoted}")
        system.state["governance"]["scope"]["functions"] = [{"schema": "app", "matching": "Fn*"}]
        address = 'app."Fn ""odd"" %s"(text, integer)'
        system.function(address, ODD, owner=odd_role, execute=[odd_role, system.caller], comment='It\'s "%s" \\ {}')
        system.write().settle()
        (answer,) = db.execute('SELECT app."Fn ""odd"" %%s"(%s)', ["<"])
        assert answer == ("< a $function1$ b \\n%s {{}} Đ 'x' 1",)
        db.execute('COMMENT ON FUNCTION app."Fn ""odd"" %s"(text, integer) IS NULL')
        db.execute(f"REVOKE EXECUTE ON FUNCTION {address} FROM {system.caller}")
        db.execute(f"GRANT EXECUTE ON FUNCTION {address} TO {system.stranger}")
        assert roots(only_change(system)) == {"acl", "comment"}
        system.settle()
    finally:
        db.execute(f"DROP OWNED BY {quoted}")
        db.execute(f"DROP ROLE {quoted}")


SETTINGS = {
    "empty path": ("SET search_path = ''", 'search_path=""'),
    "quoted path": (
        'SET search_path = "My Schema", "a,b", "q""q", pg_temp',
        'search_path="My Schema", "a,b", "q""q", pg_temp',
    ),
    "user path": ('SET search_path = "$user", pg_temp', 'search_path="$user", pg_temp'),
    "one name with comma": ("SET search_path = 'a, b'", 'search_path="a, b"'),
    "date style": ("SET datestyle = 'ISO', 'DMY'", "DateStyle=ISO, DMY"),
    "time zone": ("SET TIME ZONE 'UTC'", "TimeZone=UTC"),
    "interval style": ("SET intervalstyle TO iso_8601", "IntervalStyle=iso_8601"),
    "number": ("SET work_mem = 65536", "work_mem=65536"),
    "unit": ("SET work_mem = '64MB'", "work_mem=64MB"),
    "fraction": ("SET seq_page_cost = 1.5", "seq_page_cost=1.5"),
    "negative": ("SET log_min_duration_statement = -1", "log_min_duration_statement=-1"),
    "switch": ("SET enable_seqscan = off", "enable_seqscan=off"),
    "own name": ("SET app.mode = 'a ''b'' \\c'", "app.mode=a 'b' \\c"),
    "empty text": ("SET app.mode = ''", "app.mode="),
    "role": ("SET role = none", "role=none"),
}


def test_a_setting_is_stored_as_it_is_compared(db: Database, tmp_path: Path) -> None:
    system = governed.empty(db, tmp_path)
    for number, (clause, _) in enumerate(SETTINGS.values()):
        text = f"CREATE FUNCTION app.fn_set_{number}() RETURNS integer LANGUAGE sql {clause} AS 'SELECT 1';"
        system.function(f"app.fn_set_{number}()", text, owner="postgres")  # some settings are a superuser's
    system.write().settle()
    stored = dict(db.execute("SELECT proname, proconfig FROM pg_proc WHERE proname LIKE 'fn_set_%'"))
    assert {name: stored[f"fn_set_{number}"] for number, name in enumerate(SETTINGS)} == {
        name: [wanted] for name, (_, wanted) in SETTINGS.items()
    }


SHAPES = {
    "leakproof and support": (
        "app.fn_shape(integer)",
        (
            "CREATE FUNCTION app.fn_shape(n integer) RETURNS SETOF integer LANGUAGE internal IMMUTABLE STRICT LEAKPROOF"
            " ROWS 7 SUPPORT pg_catalog.generate_series_int4_support AS 'int4inc'"
        ),
        True,
    ),
    "window": (
        "app.fn_shape()",
        "CREATE FUNCTION app.fn_shape() RETURNS bigint LANGUAGE internal WINDOW IMMUTABLE AS 'window_row_number'",
        True,
    ),
    "library": (
        "app.fn_shape()",
        (
            "CREATE FUNCTION app.fn_shape() RETURNS language_handler LANGUAGE c"
            " AS '$libdir/plpgsql', 'plpgsql_call_handler'"
        ),
        True,
    ),
    "table": (
        "app.fn_shape(text)",
        (
            "CREATE FUNCTION app.fn_shape(a text, OUT b integer, OUT c text[]) RETURNS SETOF record LANGUAGE sql"
            " AS $$SELECT 1, ARRAY[a]$$"
        ),
        False,
    ),
    "columns": (
        "app.fn_shape(integer)",
        (
            "CREATE FUNCTION app.fn_shape(n integer)"
            ' RETURNS TABLE("first one" integer, "select" timestamp with time zone)'
            " LANGUAGE sql ROWS 3 AS $$SELECT n, now()$$"
        ),
        False,
    ),
    "variadic": (
        "app.fn_shape(integer, numeric[])",
        (
            "CREATE FUNCTION app.fn_shape(INOUT a integer, VARIADIC b numeric(10, 2)[] DEFAULT '{}') LANGUAGE sql"
            " AS $$SELECT a$$"
        ),
        False,
    ),
    "unnamed": (
        "app.fn_shape(text, text)",
        "CREATE FUNCTION app.fn_shape(text, text) RETURNS text LANGUAGE sql AS 'SELECT $1'",
        False,
    ),
    "own types": (
        "app.fn_shape(app.heartbeat, app.settings[])",
        (
            "CREATE FUNCTION app.fn_shape(h app.heartbeat, s app.settings[]) RETURNS app.heartbeat LANGUAGE sql"
            " AS 'SELECT h'"
        ),
        False,
    ),
    "defaults": (
        "app.fn_shape(text, integer, boolean, jsonb, timestamp with time zone, uuid, numeric, text[], interval)",
        (
            "CREATE FUNCTION app.fn_shape(a text DEFAULT 'it''s', b integer DEFAULT -1, c boolean DEFAULT true,"
            ' d jsonb DEFAULT \'{"b": 1, "a": 2}\', e timestamp with time zone DEFAULT NULL, f uuid DEFAULT NULL,'
            " g numeric DEFAULT 1.50, h text[] DEFAULT '{}', i interval DEFAULT '5 minutes')"
            " RETURNS text LANGUAGE sql AS 'SELECT a'"
        ),
        False,
    ),
    "procedure with OUT": (
        "app.fn_shape(integer, text)",
        (
            "CREATE PROCEDURE app.fn_shape(a integer, OUT b integer, INOUT c text DEFAULT 'x') LANGUAGE sql"
            " AS $$SELECT 1, 'x'$$"
        ),
        False,
    ),
    "trigger": (
        "app.fn_shape()",
        "CREATE FUNCTION app.fn_shape() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        False,
    ),
}


def test_a_shape_is_created_as_it_is_compared(db: Database, tmp_path: Path) -> None:
    """Also put back from a drop by hand and from another cost: created, then replaced."""
    system = governed.empty(db, tmp_path)
    addresses: list[str] = []
    for number, (address, text, superuser) in enumerate(SHAPES.values()):
        addresses.append(address.replace("fn_shape", f"fn_shape_{number}"))
        owner = "postgres" if superuser else system.owner
        system.function(addresses[-1], text.replace("fn_shape", f"fn_shape_{number}"), owner=owner)
    system.write().settle()
    for address in addresses:
        system.sql(f"COMMENT ON ROUTINE {address} IS 'moved'", f"ALTER ROUTINE {address} SET work_mem = '1MB'")
    found = {change.address: roots(change) for change in system.plan().changes}
    assert found == {f"function.{address}": {"comment", "config"} for address in addresses}
    system.settle()
    for address in addresses:
        system.sql(f"DROP ROUTINE {address}")
    found = {change.address: change.actions for change in system.plan().changes}
    assert found == {f"function.{address}": ("add",) for address in addresses}
    system.settle()


def test_functions_that_call_each_other_are_created_in_order(db: Database, tmp_path: Path) -> None:
    """A SQL body is checked when it is created, so what it calls must be there."""
    system = governed.empty(db, tmp_path)
    system.function("app.fn_a()", "CREATE FUNCTION app.fn_a() RETURNS integer LANGUAGE sql AS 'SELECT app.fn_b()'")
    system.function("app.fn_b()", "CREATE FUNCTION app.fn_b() RETURNS integer LANGUAGE sql AS 'SELECT app.fn_c()'")
    system.function("app.fn_c()", "CREATE FUNCTION app.fn_c() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    system.write()
    assert [change.address for change in system.plan().changes] == [
        "function.app.fn_c()",
        "function.app.fn_b()",
        "function.app.fn_a()",
    ]
    system.settle()


def test_a_role_that_does_not_exist_is_named(db: Database, tmp_path: Path) -> None:
    from reconciler.errors import Refused

    system = probes(db, tmp_path)
    system.state["functions"][PROBE]["execute"] = ["nobody_has_this_name"]
    system.write()
    assert desired.load(system.directory, None)
    with pytest.raises(Refused) as refused:
        system.plan()
    assert "nobody_has_this_name" in str(refused.value.details)


def test_every_attribute_in_the_ledger_is_that_of_the_catalog(db: Database, tmp_path: Path) -> None:
    """The manifest is what drift is measured against: it must hold the live form, complete."""
    import json

    system = probes(db, tmp_path)
    ((body,),) = db.execute("SELECT body FROM reconciler.entry")
    manifest: dict[str, Any] = json.loads(body)["manifest"]
    assert set(manifest) == {f"function.{address}" for address in SOURCES}
    spec = manifest[f"function.{PROBE}"]["spec"]
    assert (spec["cost"], spec["rows"], spec["owner"], spec["volatility"]) == (50, 20, system.owner, "stable")
    assert spec["config"] == ["search_path=pg_catalog, app, pg_temp", "work_mem=8MB"]
