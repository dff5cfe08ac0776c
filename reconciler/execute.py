"""Sixth step of the flow: the statements of a plan, each under its role and the declared path.

An apply, a rehearsal and the proof that a revert undoes an apply run them through here, so they cannot differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import pg
from reconciler.kinds import kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from reconciler.model import Change, Declared, Json, Policy, Statement


def path_of(change: Change, items: Mapping[str, Declared], policy: Policy) -> Sequence[str]:
    """The search_path that a change runs under: that of the policy, or the one that its function is created under."""
    item = items.get(change.address)
    return getattr(item.rules, "created_under", None) or policy.apply.search_path if item else policy.apply.search_path


def one(conn: pg.Connection, statement: Statement, path: Sequence[str], doing: str, values: Sequence[str] = ()) -> str:
    """Run one statement inside the caller's transaction; its first answer row as text. values: for $1 ... in it.

    Raises what `pg.execute` raises; the role is then the statement's, and the transaction is over anyway.
    """
    chosen = sql.SQL(", ").join(map(sql.Identifier, path))
    pg.run(conn, sql.SQL("SET LOCAL search_path = {}").format(chosen))
    if statement.role is not None:
        pg.run(conn, sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(statement.role)), doing)
    answer = pg.execute(conn, statement.text, doing, values)
    if statement.role is not None:
        pg.run(conn, "SET LOCAL ROLE NONE")
    return answer


def script(changes: Iterable[Change], items: Mapping[str, Declared], policy: Policy) -> Generator[str]:
    """The same as text, a statement each, for one transaction of psql."""
    for change in changes:
        chosen = sql.SQL(", ").join(map(sql.Identifier, path_of(change, items, policy)))
        yield sql.SQL("SET LOCAL search_path = {}").format(chosen).as_string(None)
        for statement in change.statements:
            if statement.role is not None:
                yield sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(statement.role)).as_string(None)
            yield statement.text
            if statement.role is not None:
                yield "SET LOCAL ROLE NONE"


def everything(
    conn: pg.Connection,
    changes: Iterable[Change],
    items: Mapping[str, Declared],
    policy: Policy,
    values: Callable[[Change], Sequence[str]] = lambda change: (),  # noqa: ARG005 - most have none
) -> dict[str, Json]:
    """Run every statement of every change, in their order, and leave an empty search_path. Returns what was learned.

    values: what a change's statement needs beside its text.
    """
    found: dict[str, Json] = {}
    for change in changes:
        for statement in change.statements:
            one(conn, statement, path_of(change, items, policy), change.address, values(change))
        found |= learned(conn, change)
    pg.run(conn, "SET LOCAL search_path = ''")
    return found


def learned(conn: pg.Connection, change: Change) -> dict[str, Json]:
    """By address, what must be remembered of an object whose text the catalog rewrites, before anything else runs.

    Raises Stale when nobody could say that the text is that of the statement.
    """
    kind = kinds().get(change.kind)
    if kind is None or change.after is None or not kind.rewritten(after := kind.load(change.after)):
        return {}
    pg.run(conn, "SET LOCAL search_path = ''")
    pair = kind.learn(conn, after)
    return {} if pair is None else {change.address: pair}
