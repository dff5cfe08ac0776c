"""The query asked of copies: which of many made-up rows turn its verdict? The invariant judges, by its own code."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from psycopg import sql

from reconciler import pg
from reconciler.checks.forms import AttestInvariant
from reconciler.errors import ServerProblem
from reconciler.model import Check
from reconciler.violations.relations import Row, value_of
from reconciler.violations.scene import Key, elsewhere
from reconciler.violations.tampering import NAME
from reconciler.violations.trial import HOLDS, judged, memo_of, undone

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reconciler.violations.relations import Relation
    from reconciler.violations.scene import Scene
    from reconciler.violations.trial import Trial

Rows = dict[Key, list[Row]]

_Item = tuple[Key, str]
"""A row of a copy: the relation, and where it is there."""

HIDDEN = {"ctid", "tableoid", "xmin", "xmax", "cmin", "cmax"}
"""Names that no column of a table may have, though one of a view may."""


def turning(trial: Trial, scene: Scene, keys: Sequence[Key], rows: Mapping[Key, Sequence[Row]]) -> Rows:
    """The fewest of the rows that turn the verdict when copies of these relations have them too; none if none do.

    Raises ServerProblem when the query cannot be asked of copies, or of copies with any of the rows.
    """
    with undone(trial.conn):
        copies = {key: (NAME, f"{key[1][:50]}_{number}") for number, key in enumerate(keys)}
        pg.run(trial.conn, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(NAME)))
        for key, copy in copies.items():
            _copied(trial.conn, scene.relations[key], copy)
        check = asking(trial.check, elsewhere(scene, copies))
        asked = replace(trial.asked, memo=memo_of(trial.conn, check, trial.asked))
        before = judged(trial.conn, check, asked)
        if before.status not in HOLDS:
            raise ServerProblem(f"Asked of copies, {check.address} is {before.status}: {before.detail}.")
        items = [
            (key, place)
            for key, some in rows.items()
            for place in _filled(trial.conn, scene.relations[key], copies[key], some)
        ]

        def status(some: Sequence[_Item]) -> str:
            left = set(some)
            with undone(trial.conn):
                for key in rows:
                    gone = [place for at, place in items if at == key and (at, place) not in left]
                    statement = sql.SQL("DELETE FROM {} WHERE ctid = ANY ({}::pg_catalog.tid[])")
                    pg.run(trial.conn, statement.format(sql.Identifier(*copies[key]), sql.Literal(gone)))
                return judged(trial.conn, check, asked).status

        sound = _sound(items, status)
        if items and not sound:
            raise ServerProblem(f"{check.address} fails on every row that was made up.")
        left = set(_fewest(sound, status)) if sound and status(sound) == "violated" else set[_Item]()
    found: Rows = {}
    for key, some in rows.items():
        places = [item for item in items if item[0] == key]
        if turned := [row for item, row in zip(places, some, strict=True) if item in left]:
            found[key] = turned
    return found


def asking(check: Check, query: str) -> Check:
    """The same check with another query."""
    spec = check.spec
    if isinstance(spec, AttestInvariant) and spec.proxy is not None:
        proxy = spec.proxy.model_copy(update={"query": query})
        return Check(check.kind, check.name, spec.model_copy(update={"proxy": proxy}))
    return Check(check.kind, check.name, spec.model_copy(update={"query": query}))


def _copied(conn: pg.Connection, relation: Relation, copy: tuple[str, str]) -> None:
    columns = [sql.Identifier(column.name) for column in relation.columns if column.name not in HIDDEN]
    statement = sql.SQL("CREATE TABLE {} AS SELECT {} FROM {}").format(
        sql.Identifier(*copy), sql.SQL(", ").join(columns), relation.identifier
    )
    pg.run(conn, statement, f"copying {relation.text}")


def _filled(conn: pg.Connection, relation: Relation, copy: tuple[str, str], rows: Sequence[Row]) -> list[str]:
    """Write rows to a copy; where they are, in their order."""
    if not rows:
        return []
    columns = [column for column in relation.columns if column.name in rows[0] and column.name not in HIDDEN]
    statement = sql.SQL("INSERT INTO {} ({}) VALUES {} RETURNING ctid::pg_catalog.text AS place").format(
        sql.Identifier(*copy),
        sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        sql.SQL(", ").join(
            sql.SQL("({})").format(sql.SQL(", ").join(value_of(column, row[column.name]) for column in columns))
            for row in rows
        ),
    )
    return [row["place"] for row in pg.rows(conn, statement, doing=f"filling a copy of {relation.text}")]


def _sound(items: list[_Item], status: Callable[[Sequence[_Item]], str]) -> list[_Item]:
    """The items without those that the query cannot even be asked about, such as a text that is cast to a number."""
    if not items or status(items) in {"violated", *HOLDS}:
        return items
    half = len(items) // 2
    return [*_sound(items[:half], status), *_sound(items[half:], status)] if half else []


def _fewest(items: list[_Item], status: Callable[[Sequence[_Item]], str]) -> list[_Item]:
    """Take away halves, quarters … of the items, the last ones first, as long as the verdict stays."""
    size = max(1, len(items) // 2)
    while True:
        for end in range(len(items), 0, -size):
            rest = [*items[: max(0, end - size)], *items[end:]]
            if rest and status(rest) == "violated":
                items = rest
                break
        else:
            if size == 1:
                return items
            size = max(1, size // 2)
        size = min(size, max(1, len(items) // 2))
