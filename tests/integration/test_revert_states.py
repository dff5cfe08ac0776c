"""The way back over generated states: apply, then revert, changes nothing, whatever was there before."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import desired, execute, pg, undo
from reconciler.survey import survey
from tests.integration.governed import Governed, empty

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Database

TEXTS = ("10", "", " ", "it's", "a\nb", "Ðiều", "$$ $x$", "\\", "NULL", "1e3")
TYPES = ("integer", "text", "jsonb", "timestamp with time zone", "text[]", '"char"')
DEFAULTS = {"integer": "5", "text": "'it''s'::text", "jsonb": "'{}'::jsonb"}
NAMES = ("fn_one", "fn_two", "fn Three", "fn_four")


def routine(pick: random.Random, name: str, arguments: tuple[str, ...]) -> str:
    """A CREATE statement with chosen attributes, whose body fits its result."""
    procedure = name == "fn_four"
    result = pick.choice(("integer", "text", "SETOF integer", "TABLE (a integer, b text)"))
    names = pick.choice((("p", "q"), ("p", "r"), ("first", "second")))
    defaulted = pick.randrange(len(arguments) + 1)
    given: list[str] = []
    for index, kind in enumerate(arguments):
        last = all(one in DEFAULTS for one in arguments[defaulted:])
        default = f" DEFAULT {DEFAULTS[kind]}" if last and index >= defaulted and kind in DEFAULTS else ""
        given.append(f"{names[index]} {kind}{default}")
    options: list[str] = []
    if not procedure:
        options += [pick.choice(("VOLATILE", "STABLE", "IMMUTABLE")), pick.choice(("STRICT", "CALLED ON NULL INPUT"))]
        options += [pick.choice(("PARALLEL SAFE", "PARALLEL UNSAFE")), f"COST {pick.choice((1, 100, 0.5))}"]
        if result.startswith(("SETOF", "TABLE")):
            options.append(f"ROWS {pick.choice((1, 1000, 7))}")
    options.append(pick.choice(("SECURITY INVOKER", "SECURITY DEFINER")))
    options += pick.sample(
        ["SET work_mem = '4MB'", "SET datestyle = 'ISO, DMY'", "SET application_name = 'it''s \"x\" y'"],
        pick.randrange(3),
    )
    options.append("SET search_path = pg_catalog, app, pg_temp")
    tail = pick.choice(("", "-- café", "/* it's $$ here */"))
    ends = "NULL" if procedure else "RETURN" if result.startswith(("SETOF", "TABLE")) else "RETURN NULL"
    body = f"BEGIN\n    {ends}; {tail}\nEND"
    shown = f'"{name}"' if " " in name else name
    head = f"CREATE {'PROCEDURE' if procedure else 'FUNCTION'} app.{shown}({', '.join(given)})"
    returns = "" if procedure else f" RETURNS {result}"
    return f"{head}{returns}\nLANGUAGE plpgsql {' '.join(options)}\nAS $body$\n{body}\n$body$;\n"


SIGNATURES: dict[str, tuple[tuple[str, ...], ...]] = {
    "fn_one": ((), ("integer",), ("text", "integer")),
    "fn_two": (("jsonb",), ("text[]",)),
    "fn Three": (('"char"', "text"),),
    "fn_four": (("integer",), ("timestamp with time zone",)),
}


def choose(system: Governed, pick: random.Random) -> None:
    """Files that want some state: each function, gate and marker there in some form, retired, or not mentioned."""
    system.files.clear()
    system.state["functions"] = {}
    for name, signatures in SIGNATURES.items():
        for arguments in signatures:
            shown = f'"{name}"' if " " in name else name
            address = f"app.{shown}({', '.join(arguments)})"
            fate = pick.random()
            if fate < 0.25:
                system.state["functions"][address] = {"retire": "A test."}
            elif fate < 0.9:
                system.function(
                    address,
                    routine(pick, name, arguments),
                    owner=pick.choice((system.owner, system.caller)),
                    execute=pick.sample([system.caller, system.stranger, "PUBLIC"], pick.randrange(4)),
                    comment=pick.choice((None, "A comment.", "It's\nÐiều $$")),
                    waive={"public_execute": "a test"},
                )
    gates: dict[str, Any] = {}
    for key in ("shop.a", "shop.b", "shop.c", "shop.d"):
        if pick.random() < 0.3:
            gates[key] = {"retire": "A test."}
        elif pick.random() < 0.9:
            gates[key] = {"value": pick.choice(TEXTS), "reason": "A test."}
    system.state["gates"] = gates
    system.state["markers"] = {
        "courier": {
            "table": "app.heartbeat",
            "key": {"worker": pick.choice(("courier", "walker"))},
            "values": {"kind": "legacy", "seen": "2026-01-01 00:00:00+00", "ticks": "0"},
            "passive_while": "ticks = 0",
        }
    }
    system.write()


def walk(system: Governed, rounds: int, seed: int) -> tuple[int, int]:
    """Plan, prove that the revert undoes it, then go there and on. Returns rounds with changes and changes in all."""
    pick = random.Random(seed)
    changed = total = 0
    for _ in range(rounds):
        choose(system, pick)
        plan = system.plan()
        found = undo.prove(system.db.dsn, plan)
        assert (found.left, found.before) == ((), found.reverted), (plan.changes, found)
        changed += bool(plan.changes)
        total += len(plan.changes)
        assert (found.before == found.applied) == (not plan.changes)
        wanted = desired.load(system.directory, None)
        with pg.connect(system.db.dsn, "test") as conn:
            pg.run(conn, "BEGIN")
            pg.settings(conn, 10_000)
            made = survey(conn, wanted).plan(datetime.now(UTC))
            execute.everything(conn, made.changes, wanted.items, wanted.policy)
            pg.run(conn, "COMMIT")
    return changed, total


@pytest.fixture
def system(db: Database, tmp_path: Path) -> Governed:
    """Nothing governed yet; both owners may create functions."""
    made = empty(db, tmp_path)
    made.sql("GRANT USAGE, CREATE ON SCHEMA app TO {caller}", "GRANT USAGE ON SCHEMA app TO {stranger}")
    return made


def test_some_generated_states_go_and_come_back(system: Governed) -> None:
    changed, total = walk(system, 25, seed=1)
    assert changed >= 24
    assert total >= 150


@pytest.mark.slow
def test_a_thousand_generated_states_go_and_come_back(system: Governed) -> None:
    changed, total = walk(system, 1000, seed=2)
    assert changed >= 990
    assert total >= 6000
