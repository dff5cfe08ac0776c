"""Beside the tests: everything that others may do to what an apply changes, as transactions of theirs."""

from __future__ import annotations

from typing import NamedTuple


class Rival(NamedTuple):
    """A transaction of somebody else. {caller} and {stranger} are roles; app is the schema, spare another one.

    elsewhere: it changes nothing that the plan changes, so it may count as later though it committed before.
    """

    name: str
    statements: tuple[str, ...]
    elsewhere: bool = False


BODY = "app.fn_body()"
GRANTED = "app.fn_grant()"
REPLACED = """CREATE OR REPLACE FUNCTION {name} RETURNS integer LANGUAGE sql
SET search_path = pg_catalog, app, pg_temp AS $function$SELECT 77$function$"""
SAME_KEY = "INSERT INTO app.settings (name, value) VALUES ('shop.till', '{value}')"
OPEN = "WHERE name = 'shop.open'"
LIMIT = "WHERE name = 'shop.limit'"
AGAIN = "INSERT INTO app.settings (name, value) VALUES ('shop.open', '{value}')"


def _on_routine(name: str, word: str) -> list[Rival]:
    """Everything that can be done to a routine."""
    moves = {
        "replace": [REPLACED.format(name=name)],
        "cost": [f"ALTER FUNCTION {name} COST 7"],
        "security": [f"ALTER FUNCTION {name} SECURITY DEFINER"],
        "strict": [f"ALTER FUNCTION {name} STRICT"],
        "parallel": [f"ALTER FUNCTION {name} PARALLEL SAFE"],
        "owner": [f"ALTER FUNCTION {name} OWNER TO {{stranger}}"],
        "grant": [f"GRANT EXECUTE ON FUNCTION {name} TO {{stranger}}"],
        "revoke": [f"REVOKE EXECUTE ON FUNCTION {name} FROM {{caller}}"],
        "comment": [f"COMMENT ON FUNCTION {name} IS 'mine'"],
        "set": [f"ALTER FUNCTION {name} SET work_mem = '1MB'"],
        "rename": [f"ALTER FUNCTION {name} RENAME TO fn_other"],
        "set schema": [f"ALTER FUNCTION {name} SET SCHEMA spare"],
        "drop": [f"DROP FUNCTION {name}"],
        "drop and create": [f"DROP FUNCTION {name}", REPLACED.format(name=name)],
        "depends": [f"ALTER FUNCTION {name} DEPENDS ON EXTENSION plpgsql"],
        "cost and back": [f"ALTER FUNCTION {name} COST 7", f"ALTER FUNCTION {name} COST 100"],
        "comment, then cost": [f"COMMENT ON FUNCTION {name} IS 'mine'", f"ALTER FUNCTION {name} COST 7"],
        "cost, then comment": [f"ALTER FUNCTION {name} COST 7", f"COMMENT ON FUNCTION {name} IS 'mine'"],
    }
    return [Rival(f"{word}: {move}", tuple(statements)) for move, statements in moves.items()]


RIVALS = (
    *_on_routine(BODY, "replaced function"),
    *_on_routine(GRANTED, "granted function"),
    Rival("routines: grant on all", ("GRANT EXECUTE ON ALL ROUTINES IN SCHEMA app TO {stranger}",)),
    Rival("routines: reassign owned", ("REASSIGN OWNED BY {owner} TO {stranger}",)),
    Rival("routines: drop owned", ("DROP OWNED BY {caller}",)),
    Rival("routines: drop schema cascade", ("DROP SCHEMA app CASCADE",)),
    Rival("new function: same created", (REPLACED.format(name="app.fn_new()"),)),
    Rival("new function: other renamed to it", ("ALTER FUNCTION app.other() RENAME TO fn_new",)),
    Rival("row: flip", (f"UPDATE app.settings SET value = 'true' {OPEN}",)),
    Rival("row: flip to something else", (f"UPDATE app.settings SET value = 'half' {OPEN}",)),
    Rival("row: flip another", (f"UPDATE app.settings SET value = '11' {LIMIT}",)),
    Rival(
        "row: flip and back",
        (f"UPDATE app.settings SET value = 'x' {OPEN}", f"UPDATE app.settings SET value = 'false' {OPEN}"),
    ),
    Rival("row: to NULL", (f"UPDATE app.settings SET value = NULL {OPEN}",)),
    Rival("row: delete", (f"DELETE FROM app.settings {OPEN}",)),
    Rival("row: delete and re-insert", (f"DELETE FROM app.settings {OPEN}", AGAIN.format(value="false"))),
    Rival("row: delete and insert another", (f"DELETE FROM app.settings {OPEN}", AGAIN.format(value="half"))),
    Rival("row: key rename", (f"UPDATE app.settings SET name = 'gone' {OPEN}",)),
    Rival(
        "row: another takes its key",
        (
            f"UPDATE app.settings SET name = 'gone' {OPEN}",
            "UPDATE app.settings SET name = 'shop.open' WHERE name = 'other'",
        ),
    ),
    Rival("row: same key inserted", (SAME_KEY.format(value="true"),)),
    Rival("row: same row inserted", (SAME_KEY.format(value="false"),)),
    Rival("row: another renamed to it", ("UPDATE app.settings SET name = 'shop.till' WHERE name = 'other'",)),
    Rival(
        "row: flip one that stays", ("UPDATE app.settings SET value = '2' WHERE name = 'shop.still'",), elsewhere=True
    ),
    Rival("marker: same key inserted", ("INSERT INTO app.heartbeat VALUES ('courier', 'x', now(), 5)",)),
    Rival("marker: bound value moves", ("UPDATE app.cursor SET ran = ran + interval '1 s'",), elsewhere=True),
    Rival("table: truncate", ("TRUNCATE app.settings",)),
    Rival("table: lock", ("LOCK TABLE app.settings IN ACCESS EXCLUSIVE MODE",)),
    # Two objects, in the other order than that of the apply: whoever closes the circle, the apply gives way.
    Rival(
        "crosswise: rows",
        (f"UPDATE app.settings SET value = 'half' {OPEN}", f"UPDATE app.settings SET value = '11' {LIMIT}"),
    ),
    Rival(
        "crosswise: row, function",
        (f"UPDATE app.settings SET value = 'half' {OPEN}", f"ALTER FUNCTION {BODY} COST 7"),
    ),
    Rival("crosswise: functions", (f"ALTER FUNCTION {GRANTED} COST 7", f"ALTER FUNCTION {BODY} COST 7")),
    Rival("crosswise: new key, row", (SAME_KEY.format(value="x"), f"UPDATE app.settings SET value = 'half' {OPEN}")),
    Rival("crosswise: new function, function", (REPLACED.format(name="app.fn_new()"), f"ALTER FUNCTION {BODY} COST 7")),
    Rival(
        "crosswise: marker, row",
        (
            "INSERT INTO app.heartbeat VALUES ('courier', 'x', now(), 5)",
            f"UPDATE app.settings SET value = '11' {LIMIT}",
        ),
    ),
    Rival(
        "crosswise: table, function",
        ("LOCK TABLE app.job IN ACCESS EXCLUSIVE MODE", f"ALTER FUNCTION {BODY} COST 7"),
    ),
)
