"""What kinds and checks share: what a declaration may refer to, discovery, and SQL composed from checked names."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from psycopg import sql

from reconciler import pg
from reconciler.errors import MissingPrivilege, ServerProblem, Stale
from reconciler.model import Address, Change, Declared, GateStore, JsonObject, Lock, Model, Need, Policy, Statement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Literal, LiteralString


class Complaint(NamedTuple):
    """Something wrong inside one declaration; `path` leads from the declaration to the key."""

    path: tuple[str | int, ...]
    message: str


class Captured(Model):
    """One entry of `pins`: what was pinned (as the invariant says it) and its lines, written by `reconciler pin`."""

    pin: JsonObject
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """What a declaration may refer to."""

    root: Path
    stores: Mapping[str, GateStore]
    policy: Policy
    pins: Mapping[str, Captured]
    capturing: bool = False
    """While `reconciler pin` captures: a pin without lines is no problem."""
    items: Mapping[Address, Declared] = field(default_factory=dict[str, "Declared"])
    """What kinds before this one declared."""


def discover(package: str, paths: Sequence[str], attribute: str) -> dict[str, Any]:
    """The `attribute` of every module of a package, by its `name`."""
    return {thing.name: thing for thing in _things(package, tuple(paths), attribute)}


@cache
def _things(package: str, paths: tuple[str, ...], attribute: str) -> tuple[Any, ...]:
    """Once for each package: a plan asks for its kinds dozens of times, and each look reads the directory."""
    modules = (importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(paths))
    return tuple(getattr(module, attribute) for module in modules if hasattr(module, attribute))


_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[a-z_][a-z0-9_$]*)'


def relation(text: str) -> tuple[str, str]:
    """`schema.name` (quoted where needed) as its two names. Raises ValueError with a sentence."""
    match = re.fullmatch(rf"({_IDENTIFIER})\.({_IDENTIFIER})", text)
    if match is None:
        raise ValueError(f"{text!r} is no qualified name: write schema.table, for example public.settings")
    schema, name = (part[1:-1].replace('""', '"') if part.startswith('"') else part for part in match.groups())
    return schema, name


def schema_and_pattern(text: str) -> tuple[str, str]:
    """`schema.glob` as schema and glob. Raises ValueError with a sentence."""
    schema, dot, pattern = text.partition(".")
    if not (schema and dot and pattern) or '"' in schema:
        raise ValueError(f"{text!r} is no schema.pattern, for example public.fn_*")
    return schema, pattern


SYSTEM_SCHEMAS = frozenset({"information_schema", "pg_catalog", "pg_toast", "reconciler"})


def own_relation(text: str) -> tuple[str, str]:
    """`schema.name` of a table that rows may be governed in. Raises ValueError for one of the system's."""
    schema, name = relation(text)
    if schema in SYSTEM_SCHEMAS or schema.startswith("pg_"):
        raise ValueError(f"{text} belongs to the system; no gate or marker lives there")
    return schema, name


def identifier(text: str) -> sql.Identifier:
    """The qualified name as something that composes into SQL."""
    return sql.Identifier(*relation(text))


def raw(text: str) -> sql.SQL:
    """Text that PostgreSQL's own parser or catalog gave us (type names, identities, default expressions), as SQL."""
    return sql.SQL(cast("LiteralString", text))


def complete(composed: sql.Composable, role: str | None = None) -> Statement:
    """The statement with every literal written out: what is shown is what is sent."""
    return Statement(text=composed.as_string(None), role=role)


QUERY_TIMEOUT_MS = 5_000
MAX_TEXT = 65_536
"""Characters of a value that a declared query may give."""


def single_value(conn: pg.Connection, query: str, doing: str) -> tuple[str | None, str]:
    """The one value, as text, that a declared query gives; or None and what is wrong with its answer.

    The query must have passed `check_query`. It runs in the caller's transaction, with its own time-out, and never
    sends more than two values of limited length.
    """
    shape = sql.SQL("SELECT * FROM ({}\n) AS q LIMIT 0").format(raw(query))
    pg.timeout(conn, QUERY_TIMEOUT_MS)
    columns = pg.width(conn, shape, doing, quiet=True)
    if columns != 1:
        return None, f"has {columns} columns; it must have exactly one"
    text = sql.SQL("SELECT pg_catalog.left(q.v::pg_catalog.text, {}) AS value FROM ({}\n) AS q (v) LIMIT 2")
    found = pg.rows(conn, text.format(sql.Literal(MAX_TEXT + 1), raw(query)), doing=doing, quiet=True)
    if len(found) != 1:
        return None, f"gives {'no row' if not found else 'more than one row'}; it must give exactly one value"
    value: str | None = found[0]["value"]
    if value is None:
        return None, "gives NULL; it must give exactly one value"
    if len(value) > MAX_TEXT:
        return None, f"gives a value of more than {MAX_TEXT} characters"
    return value, ""


# Relations whose rows or columns are hidden, without an error, from a role that lacks the privilege (DESIGN rule 16).
_HIDING = {
    "pg_catalog.pg_settings": "pg_read_all_settings",
    "pg_catalog.pg_stat_activity": "pg_read_all_stats",
    "pg_catalog.pg_stat_gssapi": "pg_read_all_stats",
    "pg_catalog.pg_stat_replication": "pg_read_all_stats",
    "pg_catalog.pg_stat_ssl": "pg_read_all_stats",
    "pg_catalog.pg_stat_subscription": "pg_read_all_stats",
    "pg_catalog.pg_stat_wal_receiver": "pg_read_all_stats",
}


def _may(conn: pg.Connection, role: str) -> bool:
    query = "SELECT pg_catalog.pg_has_role(current_user, %s::pg_catalog.name, 'USAGE') AS may"
    return pg.rows(conn, query, (role,))[0]["may"]


_READABLE = """
SELECT w.number, current_user::pg_catalog.text AS role, pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS usage,
       pg_catalog.has_table_privilege(c.oid, 'SELECT') AS may_read, pg_catalog.row_security_active(c.oid) AS hides
  FROM ROWS FROM (pg_catalog.unnest(%s::pg_catalog.name[]), pg_catalog.unnest(%s::pg_catalog.name[]))
       WITH ORDINALITY AS w (nspname, relname, number)
  JOIN pg_catalog.pg_namespace n ON n.nspname = w.nspname
  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.relname
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""


def unreadable(conn: pg.Connection, relations: Sequence[str]) -> tuple[str, str] | None:
    """What keeps this role from seeing all rows of the relations: (missing privilege, sentence), or None.

    Asked before, because an error inside the snapshot would end it.
    """
    wanted = list(map(relation, relations))
    asked = ([schema for schema, _ in wanted], [name for _, name in wanted])
    rows = pg.rows(conn, _READABLE, asked) if wanted else []
    found = {row["number"]: row for row in rows}
    for number, name in enumerate(relations, 1):
        role = _HIDING.get(name)
        if role is not None and not _may(conn, role):
            return role, f"{name} hides rows or columns from this role; GRANT {role} to it"
        row = found.get(number)
        if row is None:
            return f"relation {name}", f"there is no relation {name}"
        if not row["usage"]:
            missing = f"USAGE on the schema of {name}"
            return missing, f"role {row['role']} lacks {missing}"
        if not row["may_read"]:
            return f"SELECT on {name}", f"role {row['role']} lacks SELECT on {name}"
        if row["hides"]:
            return f"BYPASSRLS for {name}", f"row security hides rows of {name} from role {row['role']}"
    return None


def hold(conn: pg.Connection, name: str, address: str) -> None:
    """Take the lock that writing takes anyway: until COMMIT nobody adds a trigger, a rule or a column."""
    statement = sql.SQL("LOCK TABLE {} IN ROW EXCLUSIVE MODE").format(identifier(name))
    pg.run(conn, statement, doing=f"locking {address}")


def hold_row(conn: pg.Connection, name: str, where: sql.Composable, change: Change) -> None:
    """Lock the one row of a table that the condition finds, so that nobody changes, renames or deletes it until COMMIT.

    FOR UPDATE only to delete it: otherwise its key stays, and what refers to it by a foreign key need not wait. No row:
    it was deleted or renamed, perhaps put back as another one, while we waited. Raises Stale.
    """
    strength = sql.SQL("FOR UPDATE" if change.after is None else "FOR NO KEY UPDATE")
    query = sql.SQL("SELECT 1 AS locked FROM {} WHERE {} {}").format(identifier(name), where, strength)
    if len(pg.rows(conn, query, doing=f"locking {change.address}")) != 1:
        raise Stale(
            f"The plan is stale: {change.address} is no longer the row that was approved.",
            hint="Nothing was changed. Plan again, read it, approve it.",
        )


def table_lock(address: Address, name: str) -> Lock:
    """What `hold` takes."""
    return Lock(address=address, mode="ROW EXCLUSIVE", on="table", name=name, waits="who alters the table")


def row_lock(change: Change, name: str, key: Mapping[str, str]) -> Lock:
    """What `hold_row` takes, or an INSERT of the key."""
    mode, waits = "INSERT", "who inserts the same key"
    if change.before is not None:
        mode = "FOR UPDATE" if change.after is None else "FOR NO KEY UPDATE"
        waits = "who changes or deletes this row"
    return Lock(address=change.address, mode=mode, on="row", name=name, key=dict(key), waits=waits)


def table_need(address: Address, privilege: str, name: str) -> Need:
    """A privilege on a table, for the role that applies."""
    return Need(privilege=privilege, on="table", name=name, addresses=(address,))


def write_needs(change: Change) -> tuple[Need, ...]:
    """What it takes to lock and write the one row of a change."""
    table: str = (change.after or change.before or {})["table"]
    verbs = ["INSERT"] if change.before is None else ["UPDATE"]
    if change.after is None:
        verbs.append("DELETE")  # FOR UPDATE, by which the row is locked, asks for the other one
    return tuple(table_need(change.address, verb, table) for verb in verbs)


def role_need(address: Address, privilege: Literal["SET", "USAGE"], name: str) -> Need:
    """Membership in a role, for the role that applies: to become it, or to have what it may."""
    return Need(privilege=privilege, on="role", name=name, addresses=(address,))


def hidden_needs(address: Address, relations: Iterable[str]) -> tuple[Need, ...]:
    """What it takes to see all rows and columns of the relations (`schema.name`) that a declared query reads."""
    found: list[Need] = []
    for name in relations:
        role = _HIDING.get(name)
        if role is not None:
            found.append(role_need(address, "USAGE", role))
        elif relation(name)[0] not in SYSTEM_SCHEMAS:
            found.append(table_need(address, "SELECT", name))
    return tuple(found)


def mentioned(conn: pg.Connection, name: str, retired: Sequence[Declared]) -> list[str]:
    """Functions whose body names this gate or function as a word: what no dependency in the catalog shows.

    retired: what goes away in the same apply and so does not count.
    """
    found = pg.rows(
        conn,
        """
        SELECT p.oid::pg_catalog.regprocedure::pg_catalog.text AS name
          FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' AND p.prosqlbody IS NULL
           AND p.prosrc ~ ('(^|[^[:alnum:]_])' || %s || '($|[^[:alnum:]_])')
         ORDER BY 1 LIMIT 20
        """,
        (re.sub(r"(\W)", r"\\\1", name),),
        doing=f"looking for functions that name {name}",
    )
    own = {item.name for item in retired}
    return [row["name"] for row in found if row["name"] not in own]


class Table(NamedTuple):
    """What the catalog says of one table: column name -> type, and the column sets of its unique indexes."""

    columns: dict[str, str]
    unique: list[frozenset[str]]


def table(conn: pg.Connection, name: str, purpose: str, key: Sequence[str], columns: Sequence[str] = ()) -> Table:
    """Look up a table that rows are read from; everything that would make reading it unsafe is an error.

    Raises ServerProblem when the table, a column or a unique index on exactly `key` is missing, MissingPrivilege
    when the role may not read it.
    """
    schema, relname = relation(name)
    found = pg.rows(
        conn,
        """
        SELECT c.oid::pg_catalog.int8 AS oid, c.relkind::pg_catalog.text AS relkind,
               current_user::pg_catalog.text AS role,
               pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS usage,
               pg_catalog.has_table_privilege(c.oid, 'SELECT') AS may_read,
               pg_catalog.row_security_active(c.oid) AS hides,
               c.relkind = 'r' AND EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid) AS children
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = %s AND c.relname = %s
        """,
        (schema, relname),
        doing=f"looking up {name}",
    )
    if not found or found[0]["relkind"] not in {"r", "p"}:
        raise ServerProblem(
            f"{purpose}: there is no table {name} in this database.", hint="Check the name, the target and --dsn."
        )
    row = found[0]
    if not (row["usage"] and row["may_read"]):
        what = f"SELECT on {name}" if row["usage"] else f"USAGE on schema {schema}"
        raise MissingPrivilege(
            f"{purpose}: role {row['role']} lacks {what}.",
            hint=f"GRANT {what.replace(' on ', ' ON ')} TO {row['role']};",
        )
    if row["hides"]:
        raise MissingPrivilege(
            f"{purpose}: row security hides rows of {name} from role {row['role']}.",
            hint=f"Give BYPASSRLS to {row['role']}, or let the owner of the table read it.",
        )
    if row["children"]:
        raise ServerProblem(
            f"{purpose}: table {name} has child tables, whose rows its readers see and its indexes do not cover.",
            hint="Detach them (ALTER TABLE ... NO INHERIT).",
        )
    attributes = pg.rows(
        conn,
        """
        SELECT attname::pg_catalog.text AS name, pg_catalog.format_type(atttypid, atttypmod) AS type
          FROM pg_catalog.pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
        """,
        (row["oid"],),
    )
    types = {attribute["name"]: attribute["type"] for attribute in attributes}
    for column in (*key, *columns):
        if column not in types:
            raise ServerProblem(
                f"{purpose}: table {name} has no column {column}.", hint=f"It has {', '.join(sorted(types))}."
            )
    indexes = pg.rows(
        conn,
        """
        SELECT (SELECT pg_catalog.array_agg(a.attname::pg_catalog.text)
                  FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::pg_catalog.int2[])) AS columns
          FROM pg_catalog.pg_index i
         WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate
           AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnatts = i.indnkeyatts
        """,
        (row["oid"],),
    )
    unique = [frozenset(cast("list[str]", index["columns"])) for index in indexes]
    if frozenset(key) not in unique:
        raise ServerProblem(
            f"{purpose}: table {name} has no unique index on ({', '.join(key)}), so a key could name two rows.",
            hint="Create a unique index or a primary key on exactly these columns.",
        )
    return Table(types, unique)
