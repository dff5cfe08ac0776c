"""What a `governed` backup holds: everything governed, read in one transaction, as a document that can be put back.

Its statements are those that an apply would run; the rows of gates and markers are whole, with the columns that nobody
declares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import __version__, execute, live, pg
from reconciler.checks.invariant import PinInvariantSpec, captured
from reconciler.diff import changes as differences
from reconciler.kinds import kinds
from reconciler.model import FORMAT_VERSION, Address, JsonObject, Live, Model, Moment, Target, glob_regex
from reconciler.parts import relation, schema_and_pattern
from reconciler.scratch import insert, place, row, rows_of, secret_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reconciler.checks.forms import Pinned
    from reconciler.model import Change, Desired


class Kept(Model):
    """One governed object as it was. `row`: for a gate or a marker, every column as text in the server's own form."""

    kind: str
    spec: JsonObject
    row: dict[str, str | None] | None = None


class Image(Model):
    """What was governed and what was pinned at one moment of one database, and how to make it again."""

    format_version: str = FORMAT_VERSION
    tool: str
    target: Target
    taken_at: Moment
    objects: dict[Address, Kept]
    absent: tuple[Address, ...]
    """Declared, and not there."""
    pinned: dict[str, tuple[str, ...]]
    """Name of a pin invariant -> its lines."""
    definitions: dict[str, str]
    """The functions that pins name, and those of triggers of pinned tables: identity -> its statement."""
    restore: tuple[str, ...]
    """Statements that make every object anew, for one transaction of a database that has none of them."""
    not_in_it: tuple[Address, ...] = ()
    """Secret gates: their rows have no value here, and no statement puts them back."""


_SETTINGS = ("client_encoding = 'UTF8'", "standard_conforming_strings = on", "check_function_bodies = off")


def objects(conn: pg.Connection, governed: Desired, allow_functions: Sequence[str]) -> dict[Address, Model]:
    """Every governed object that is there, by address: what two databases are compared by."""
    return dict(live.read(conn, governed, allow_functions).items)


def take(
    conn: pg.Connection, governed: Desired, allow_functions: Sequence[str], *, target: Target, taken_at: str
) -> Image:
    """Read everything, inside the caller's transaction. governed: all that is declared or was.

    Raises what reading raises: ServerProblem, MissingPrivilege.
    """
    found = objects(conn, governed, allow_functions)
    places = rows_of(governed)
    hidden = secret_columns(governed)
    rows = {
        address: row(conn, *places[address], hidden.get(place(*places[address]), ()))
        for address in found
        if address in places
    }
    pins = {name.name: name.spec.pin for name in governed.checks.values() if isinstance(name.spec, PinInvariantSpec)}
    return Image(
        tool=f"reconciler {__version__}",
        target=target,
        taken_at=taken_at,
        objects={
            address: Kept(kind=governed.items[address].kind, spec=spec.dump(), row=rows.get(address))
            for address, spec in sorted(found.items())
        },
        absent=tuple(sorted(governed.items.keys() - found.keys())),
        pinned={name: tuple(captured(conn, pin)) for name, pin in sorted(pins.items())},
        definitions=dict(item for pin in pins.values() for item in _definitions(conn, pin).items()),
        restore=tuple(_restore(conn, governed, allow_functions, found, rows)),
        not_in_it=tuple(sorted(address for address in rows if place(*places[address]) in hidden)),
    )


def _restore(
    conn: pg.Connection,
    governed: Desired,
    allow_functions: Sequence[str],
    found: Mapping[Address, Model],
    rows: Mapping[Address, dict[str, str | None] | None],
) -> list[str]:
    """First what a row could need. Bodies are not checked: what they name need not be there yet."""
    items = {
        address: replace(governed.items[address], spec=spec) for address, spec in found.items() if address not in rows
    }
    there = replace(governed, items=items)
    facts = live.read(conn, there, allow_functions).facts
    made = [_with_its_body(conn, change) for change in differences(there, Live({}, facts, ()), {})]
    # A body that is stored parsed needs what it names.
    made.sort(key=lambda change: bool((change.after or {}).get("sql_body")))
    lacking = _lacking(conn, made)
    script = [f"SET LOCAL {setting}" for setting in _SETTINGS]
    script += [f"GRANT {right} TO {role}" for right, role in lacking]
    script += execute.script(made, items, governed.policy)
    script += [f"REVOKE {right} FROM {role}" for right, role in lacking]
    places = rows_of(governed)
    path = sql.SQL(", ").join(map(sql.Identifier, governed.policy.apply.search_path))
    script.append(sql.SQL("SET LOCAL search_path = {}").format(path).as_string(None))
    order = list(kinds())
    hidden = secret_columns(governed)
    whole = [address for address in rows if place(*places[address]) not in hidden]
    for address in sorted(whole, key=lambda address: (order.index(governed.items[address].kind), address)):
        if (columns := rows[address]) is not None:
            script.append(insert(places[address][0], columns).as_string(None))
    return script


def _with_its_body(conn: pg.Connection, change: Change) -> Change:
    """BEGIN ATOMIC: only the catalog can write the statement, and it stands in the place of ours."""
    if not (change.after or {}).get("sql_body"):
        return change
    query = "SELECT pg_catalog.pg_get_functiondef(%s::pg_catalog.regprocedure) AS text"
    text = pg.rows(conn, query, (change.address.partition(".")[2],), f"reading {change.address}")[0]["text"]
    create, *rest = change.statements
    return change.model_copy(update={"statements": (create.model_copy(update={"text": text}), *rest)})


def _lacking(conn: pg.Connection, made: Sequence[Change]) -> list[tuple[str, str]]:
    """What the roles that make the objects may not do in their schemas: (words of a GRANT, role), for a moment only.

    An object outlives the right under which it was made.
    """
    pairs = sorted(
        {
            (statement.role, str((change.after or {})["schema_name"]))
            for change in made
            for statement in change.statements
            if statement.role is not None
        }
    )
    query = """
        SELECT pg_catalog.has_schema_privilege(%(role)s, %(schema)s, 'CREATE') AS "CREATE",
               pg_catalog.has_schema_privilege(%(role)s, %(schema)s, 'USAGE') AS "USAGE"
    """
    found: list[tuple[str, str]] = []
    for role, schema in pairs:
        rights = pg.rows(conn, query, {"role": role, "schema": schema}, f"looking what {role} may do")[0]
        if words := ", ".join(right for right, has in rights.items() if not has):
            named = sql.Identifier(schema).as_string(None), sql.Identifier(role).as_string(None)
            found.append((f"{words} ON SCHEMA {named[0]}", named[1]))
    return found


def _definitions(conn: pg.Connection, pin: Pinned) -> dict[str, str]:
    schema, pattern = schema_and_pattern(pin.functions) if pin.functions is not None else ("", "")
    tables = [relation(name) for name in pin.every_table()]
    found = pg.rows(
        conn,
        _DEFINITIONS,
        {
            "schema": schema,
            "pattern": glob_regex(pattern),
            "schemas": [name for name, _ in tables],
            "tables": [name for _, name in tables],
        },
        doing="reading the definitions of what is pinned",
    )
    return {line["name"]: line["text"] for line in found}


_DEFINITIONS = """
SELECT p.oid::pg_catalog.regprocedure::pg_catalog.text AS name, pg_catalog.pg_get_functiondef(p.oid) AS text
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 WHERE p.prokind <> 'a'
   AND ((n.nspname = %(schema)s AND p.proname::pg_catalog.text ~ %(pattern)s)
        OR p.oid IN (SELECT t.tgfoid
                       FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
                       JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace
                       JOIN ROWS FROM (pg_catalog.unnest(%(schemas)s::pg_catalog.name[]),
                                       pg_catalog.unnest(%(tables)s::pg_catalog.name[])) AS w (schema, name)
                         ON w.schema = s.nspname AND w.name = c.relname
                      WHERE NOT t.tgisinternal))
 ORDER BY 1
"""
