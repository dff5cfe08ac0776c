"""Rows that a relation could hold: combinations of values, always the same ones. The server computes them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.errors import ReconcilerError
from reconciler.parts import raw
from reconciler.violations.relations import Condition, Relation, Row, describe
from reconciler.violations.samples import Column, Constants, fresh, guesses
from reconciler.violations.trial import undone

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from psycopg.sql import Composable

MOST_COMBINATIONS = 50_000
SEARCH_TIMEOUT_MS = 5_000
DEEPEST = 4
"""How far foreign keys are followed."""


class Wanted(NamedTuple):
    """What the rows are for."""

    constants: Constants = Constants({}, ())
    varied: frozenset[str] = frozenset()
    """Columns that take every value that might matter."""
    fixed: Mapping[str, str | None] = {}
    """Columns whose value is given."""
    filters: tuple[Condition, ...] = ()
    """Constants that the rows fulfil if any can."""
    alias: str = ""
    """The name by which the filters call the relation."""


def rows_for(  # noqa: PLR0913 - what, for what, how, how many
    conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool, limit: int, depth: int = 0
) -> list[Row]:
    """Rows for the relation, always the same ones: first those that pass the filters, the simplest first.

    lawful: they fulfil NOT NULL and the checks; otherwise they need not where varied columns are concerned.
    """
    wanted = wanted._replace(fixed={**_borrowed(conn, relation, wanted, depth), **wanted.fixed})
    laws = _laws(relation, wanted, lawful=lawful)
    generated = [column for column in relation.columns if column.generated is not None]
    found: list[Row] = []
    for filters in dict.fromkeys((wanted.filters, ())):
        pools = _cut(values_for(conn, relation, wanted._replace(filters=filters), lawful=lawful))
        if all(pools.values()):
            source = _source(relation, pools, generated, wanted.alias)
            more = _passing(conn, source, [*pools, *(one.name for one in generated)], (*laws, *filters), limit)
            found += [row for row in more if row not in found]
    return found


def _borrowed(conn: pg.Connection, relation: Relation, wanted: Wanted, depth: int) -> Row:
    """For columns that must point somewhere and that nobody asks for: a row that is there, or one that could be."""
    found: Row = {}
    bound = {column.name for column in relation.columns if column.not_null}
    for key in relation.foreign if depth < DEEPEST else ():
        parent = describe(conn, key.schema, key.table)
        free = bound & {*key.ours} and not {*key.ours} & {*wanted.varied, *wanted.fixed}
        if parent is None or parent.oid == relation.oid or not free:
            continue
        shown = [sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(name)) for name in key.theirs]
        query = sql.SQL("SELECT {} FROM {} LIMIT 1").format(sql.SQL(", ").join(shown), parent.identifier)
        rows: list[Row] = pg.rows(conn, query, doing=f"reading {parent.text}")
        for row in rows or rows_for(conn, parent, Wanted(), lawful=True, limit=1, depth=depth + 1):
            found |= {ours: row[theirs] for ours, theirs in zip(key.ours, key.theirs, strict=True)}
    return found


def values_for(conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool) -> dict[str, list[str | None]]:
    """The values to try in each column that can be written, without those that a condition on it alone refuses."""
    laws = _laws(relation, wanted, lawful=lawful)
    found = _pools(conn, relation, wanted, lawful=lawful)
    for check in (*laws, *wanted.filters):
        for name in check.columns & found.keys() if len(check.columns) == 1 else ():
            source = _source(relation, {name: found[name]}, (), wanted.alias)
            rows = _passing(conn, source, [name], (check,), len(found[name])) if found[name] else []
            # A filter that lets nothing through is no help; a law is a law.
            found[name] = [row[name] for row in rows] or ([] if check in laws else found[name])
    return found


def _laws(relation: Relation, wanted: Wanted, *, lawful: bool) -> tuple[Condition, ...]:
    return tuple(check for check in relation.checks if lawful or not check.columns & wanted.varied)


def told_apart(relation: Relation, care: Collection[str], rows: Sequence[Row]) -> list[Row]:
    """The rows with keys of their own, where nobody cares what the key is."""
    cared = {*care, *(name for check in relation.checks for name in check.columns)}
    keys = [column for column in relation.columns if column.name in relation.unique - cared]
    return [
        row | {column.name: fresh(column, number) or row[column.name] for column in keys if column.name in row}
        for number, row in enumerate(rows)
    ]


def _pools(conn: pg.Connection, relation: Relation, wanted: Wanted, *, lawful: bool) -> dict[str, list[str | None]]:
    """The values to try in each column that can be written."""
    ruled = {name for check in relation.checks for name in check.columns}
    few = wanted.constants.every if len(wanted.constants.every) <= 12 else ()
    pools: dict[str, list[str | None]] = {}
    for column in relation.columns:
        if column.generated is not None:
            continue
        if column.name in wanted.fixed:
            pools[column.name] = [wanted.fixed[column.name]]
            continue
        own = relation.constants.columns.get(column.name, ())
        texts = (*wanted.constants.columns.get(column.name, ()), *own)
        groups = wanted.constants.groups.get(column.name, ())
        default = [raw(column.default)] if column.default is not None else []
        bound = column.not_null and (lawful or column.name not in wanted.varied)
        nothing: list[str | None] = [] if bound else [None]
        if column.name in wanted.varied:
            pools[column.name] = [*_taken(conn, column, [*guesses(column, texts or few, groups), *default]), *nothing]
        elif column.name in ruled:
            found = _taken(conn, column, [*default, *guesses(column, texts)[:8]])
            pools[column.name] = [*found[:1], *nothing, *found[1:]] if default else [*nothing, *found]
        elif default or column.not_null:
            found = _taken(conn, column, default or guesses(column, texts)[:8])
            pools[column.name] = [*found[:1]] or nothing
        else:
            pools[column.name] = [None]
    return pools


def _taken(conn: pg.Connection, column: Column, expressions: Sequence[Composable]) -> list[str]:
    """The values of those expressions that the column's type takes, as the server prints them, each once."""
    casts = [sql.SQL("({})::{}::pg_catalog.text").format(one, raw(column.type)) for one in expressions]

    def ask(some: Sequence[Composable]) -> list[str | None]:
        query = sql.SQL("SELECT ARRAY[{}]::pg_catalog.text[] AS found").format(sql.SQL(", ").join(some))
        try:
            with undone(conn):
                return pg.rows(conn, query)[0]["found"]
        except ReconcilerError:
            # One that it does not take spoils the question: ask for each half.
            half = len(some) // 2
            return [*ask(some[:half]), *ask(some[half:])] if half else []

    found = ask(casts) if casts else []
    return list(dict.fromkeys(text for text in found if text is not None))


def _cut(pools: Mapping[str, list[str | None]]) -> dict[str, list[str | None]]:
    """The pools, the longest shortened until their combinations can be counted."""
    found = dict(pools)
    while prod(map(len, found.values())) > MOST_COMBINATIONS:
        longest = max(found, key=lambda name: len(found[name]))
        found[longest] = found[longest][: len(found[longest]) * 2 // 3]
    return found


class _Source(NamedTuple):
    """A FROM item with every combination of some values, and how to sort it: the first values of each first."""

    item: Composable
    order: list[Composable]


def _source(
    relation: Relation, pools: Mapping[str, Sequence[str | None]], generated: Sequence[Column], alias: str
) -> _Source:
    types = {column.name: raw(column.type) for column in relation.columns}
    values: list[Composable] = []
    tables: list[Composable] = []
    places: list[Composable] = []
    for name, pool in pools.items():
        if len(pool) == 1:
            value = sql.SQL("{}::{} AS {}").format(sql.Literal(pool[0]), types[name], sql.Identifier(name))
            values.append(value)
            continue
        # A name that no column has: 64 bytes would be cut.
        table, place = sql.Identifier(f"t!{len(tables)}"), sql.Identifier(f"o!{len(tables)}")
        rows = sql.SQL(", ").join(
            sql.SQL("({}, {}::{})").format(sql.Literal(number), sql.Literal(text), types[name])
            for number, text in enumerate(pool)
        )
        tables.append(sql.SQL("(VALUES {}) AS {} ({}, v)").format(rows, table, place))
        values.append(sql.SQL("{}.v AS {}").format(table, sql.Identifier(name)))
        places.append(place)
    inner = sql.SQL("SELECT {}").format(sql.SQL(", ").join([*values, *places]))
    if tables:
        inner += sql.SQL(" FROM ") + sql.SQL(" CROSS JOIN ").join(tables)
    name = sql.Identifier(alias or relation.name)
    if generated:
        more = [sql.SQL("{} AS {}").format(raw(one.generated or ""), sql.Identifier(one.name)) for one in generated]
        inner = sql.SQL("SELECT {}.*, {} FROM ({}) AS {}").format(name, sql.SQL(", ").join(more), inner, name)
    order = [sql.SQL(" + ").join(places), *places] if places else []
    return _Source(sql.SQL("({}) AS {}").format(inner, name), order)


def _passing(
    conn: pg.Connection, source: _Source, columns: Sequence[str], filters: Sequence[Condition], limit: int
) -> list[Row]:
    """The combinations that pass, computed by the server, so that conditions mean what they mean in the query.

    Filters that cannot be evaluated on such rows are left out, the last ones first.
    """
    shown = [sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(name)) for name in columns]
    query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(shown), source.item)
    if filters:
        query += sql.SQL(" WHERE ") + sql.SQL(" AND ").join(sql.SQL("({})").format(raw(one.text)) for one in filters)
    if source.order:
        query += sql.SQL(" ORDER BY ") + sql.SQL(", ").join(source.order)
    query += sql.SQL(" LIMIT {}").format(sql.Literal(limit))
    try:
        with undone(conn):
            pg.timeout(conn, SEARCH_TIMEOUT_MS)
            return pg.rows(conn, query, doing="combining values")
    except ReconcilerError:
        return _passing(conn, source, columns, filters[:-1], limit) if filters else []
