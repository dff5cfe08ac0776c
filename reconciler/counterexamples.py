"""Beside the flow: what would make a declared query answer otherwise than it must? Looked for in the query's own tree.

1. Rows. Copies of the tables are filled with rows made of the query's constants, of those of the tables' CHECKs and of
   values of each type; the query is asked on the copies. When its verdict turns, the rows are reduced to those that it
   takes, and written to the real tables: first as the constraints allow, then with what is in the way taken away.
2. Existing rows, changed and deleted.
3. Real objects, where the query reads the catalog: made, changed and dropped by DDL.
4. Views over what the server does (sessions, statistics): replaced by a view over a copy of their rows.

Everything is bounded and comes in the same order every time. Nothing here knows what a query means: the invariant
judges.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from postgast import deparse, walk
from postgast import pg_query_pb2 as pb
from psycopg import sql

from reconciler import pg
from reconciler.checks.forms import AttestInvariant, QueryInvariant
from reconciler.errors import ReconcilerError
from reconciler.model import Check
from reconciler.objects import NAME_COLUMNS, changes, drops, makings, named
from reconciler.rowmaking import (
    Condition,
    Relation,
    Row,
    Wanted,
    change,
    describe,
    force,
    lift_triggers,
    names_in,
    past,
    put,
    rows_for,
    said,
    told_apart,
    value_of,
    values_for,
)
from reconciler.samples import Constants, constants_of, joined, mentioned
from reconciler.syntax import single
from reconciler.tampering import NAME
from reconciler.trial import HOLDS, Attempt, Trial, judged, kept, memo_of, refusal, undone

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from google.protobuf.message import Message
    from psycopg.sql import Composable, Composed

    from reconciler.model import Model
    from reconciler.tampering import Tampering

Key = tuple[str, str]
"""Schema and name of a relation."""

Rows = dict[Key, list[Row]]

_Item = tuple[Key, str]
"""A row of a copy: the relation, and where it is there."""

MOST_ROWS = 240
"""In the copy of one relation."""
MOST_CHANGES = 120
"""Of the existing rows of one relation."""
_OTHERS = 3
"""How often other rows are looked for when the first ones are refused."""
_BEFORE = "a row made beforehand"
MOST_OBJECTS = 200
"""Made, changed and dropped, each."""
SYSTEM = {"pg_catalog", "information_schema"}


# --------------------------------------------------------------------------------------------------- what a query reads


class Place(NamedTuple):
    """One mention of a relation in FROM, and the conditions of the same SELECT that are about it alone."""

    key: Key
    alias: str
    filters: tuple[Condition, ...]


@dataclass(frozen=True)
class Scene:
    """What a query reads, views taken apart."""

    tree: pb.Node
    places: tuple[Place, ...]
    relations: Mapping[Key, Relation]
    views: Mapping[Key, pb.Node]
    constants: Constants
    varied: frozenset[str]
    """Names of the columns whose values may matter."""
    told: frozenset[str]
    """Those that the query itself compares."""
    calls: bool
    """It calls functions."""

    def tables(self) -> list[Key]:
        """Where rows can be written: the tables that are not the system's."""
        return [key for key, it in self.relations.items() if it.kind in {"r", "p", "f"} and key[0] not in SYSTEM]

    def catalogs(self) -> list[Key]:
        """The system's tables."""
        return [key for key, it in self.relations.items() if it.kind == "r" and key[0] in SYSTEM]

    def materialized(self) -> list[Key]:
        """What must be refreshed before it is read."""
        return [key for key, it in self.relations.items() if it.kind == "m"]

    def replaceable(self) -> list[Key]:
        """Views whose rows come from the server or from functions, not from tables that somebody could write to."""
        return [
            key
            for key, tree in self.views.items()
            if key[0] in SYSTEM or any(isinstance(node, pb.RangeFunction) for _, node in walk(tree))
        ]

    def wanted(self, place: Place) -> Wanted:
        """The rows that this mention of a relation might notice."""
        return Wanted(self.constants, self.varied, {}, place.filters, place.alias)


def read(conn: pg.Connection, query: str, *, shown: bool) -> Scene:
    """Take a query apart. shown: the values that it selects matter, not only how many rows it gives."""
    tree = _tree(query)
    places: list[Place] = []
    relations: dict[Key, Relation] = {}
    views: dict[Key, pb.Node] = {}
    trees, waiting = [tree], [tree]
    while waiting:
        for key, alias, filters in _mentions(waiting.pop()):
            relation = relations.get(key) or describe(conn, *key)
            if relation is None:
                continue  # a CTE
            names = {column.name for column in relation.columns}
            places.append(Place(key, alias, tuple(one for one in filters if one.columns <= names)))
            if key not in relations and relation.kind in {"v", "m"}:
                views[key] = _definition(conn, relation)
                trees.append(views[key])
                waiting.append(views[key])
            relations[key] = relation
    return Scene(
        tree=tree,
        places=tuple(places),
        relations=relations,
        views=views,
        constants=joined(constants_of(one) for one in trees),
        varied=frozenset(name for one in trees for name in mentioned(one, shown=shown or one is not tree)),
        told=frozenset(mentioned(tree, shown=False)),
        calls=any(isinstance(node, pb.FuncCall) for _, node in walk(tree)),
    )


def _tree(query: str) -> pb.Node:
    statement, troubles = single(query)
    if statement is None:
        raise ValueError(troubles[0].message)
    return statement.node


def _definition(conn: pg.Connection, view: Relation) -> pb.Node:
    query = "SELECT pg_catalog.rtrim(pg_catalog.pg_get_viewdef(%s::pg_catalog.oid), '; ') AS text"
    return _tree(pg.rows(conn, query, (view.oid,), doing=f"reading the definition of {view.text}")[0]["text"])


def _mentions(tree: Message) -> Iterator[tuple[Key, str, list[Condition]]]:
    """Every relation in a FROM, the name it has there, and the conditions of that SELECT on it alone."""
    for _, node in walk(tree):
        if isinstance(node, pb.SelectStmt):
            tables: list[pb.RangeVar] = []
            terms = list(_terms(node.where_clause))
            for item in node.from_clause:
                _from(item, tables, terms)
            for table in tables:
                alias = table.alias.aliasname or table.relname
                found = [] if table.alias.colnames else [term for term in terms if _about(term, alias)]
                # In a view's definition the catalog's own relations stand without schema.
                key = (table.schemaname or "pg_catalog", table.relname)
                yield key, alias, [Condition(_text(term), frozenset(names_in(term))) for term in found]


def _from(item: pb.Node, tables: list[pb.RangeVar], terms: list[pb.Node]) -> None:
    """The relations of a FROM item and the conditions of its joins."""
    if item.HasField("range_var"):
        tables.append(item.range_var)
    elif item.HasField("join_expr"):
        terms += _terms(item.join_expr.quals)
        _from(item.join_expr.larg, tables, terms)
        _from(item.join_expr.rarg, tables, terms)


def _terms(condition: pb.Node) -> Iterator[pb.Node]:
    """What must hold at once."""
    if condition.HasField("bool_expr") and condition.bool_expr.boolop == pb.AND_EXPR:
        for part in condition.bool_expr.args:
            yield from _terms(part)
    elif condition.WhichOneof("node"):
        yield condition


def _about(term: pb.Node, alias: str) -> bool:
    """Whether a condition can be evaluated on rows of this relation alone, as far as its text says."""
    nodes = [node for _, node in walk(term)]
    columns = [node for node in nodes if isinstance(node, pb.ColumnRef)]
    return (
        bool(columns)
        and not any(isinstance(node, pb.SubLink) for node in nodes)
        and all(len(one.fields) == 1 or one.fields[-2].string.sval == alias for one in columns)
    )


def _text(expression: pb.Node) -> str:
    select = pb.SelectStmt(target_list=[pb.Node(res_target=pb.ResTarget(val=expression))])
    return _statement(pb.Node(select_stmt=select)).removeprefix("SELECT ")


def _statement(tree: pb.Node) -> str:
    return deparse(pb.ParseResult(stmts=[pb.RawStmt(stmt=tree)]))


def elsewhere(scene: Scene, copies: Mapping[Key, Key]) -> str:
    """The query with relations replaced by copies; a view that reads one of them is written out."""
    return _statement(_moved(scene, scene.tree, copies))


def _moved(scene: Scene, tree: pb.Node, copies: Mapping[Key, Key]) -> pb.Node:
    moved = pb.Node()
    moved.CopyFrom(tree)
    for node in list(_wrapped(moved)):
        if node.HasField("range_var"):
            table = node.range_var
            key = (table.schemaname or "pg_catalog", table.relname)
            if not table.alias.aliasname:
                table.alias.aliasname = table.relname
            if key in copies:
                table.schemaname, table.relname = copies[key]
            elif key in scene.views and _reads(scene, scene.views[key], copies):
                subquery = _moved(scene, scene.views[key], copies)
                node.CopyFrom(pb.Node(range_subselect=pb.RangeSubselect(subquery=subquery, alias=table.alias)))
        elif node.HasField("column_ref") and len(node.column_ref.fields) > 2:
            del node.column_ref.fields[:-2]  # schema.table.column: only the table's name is left
    return moved


def _wrapped(message: Message) -> Iterator[pb.Node]:
    """Every node of a tree, in its wrapper, so that it can be exchanged."""
    if isinstance(message, pb.Node):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from _wrapped(part)


def _reads(scene: Scene, tree: pb.Node, copies: Mapping[Key, Key]) -> bool:
    keys = [key for key, _, _ in _mentions(tree)]
    return any(key in copies or (key in scene.views and _reads(scene, scene.views[key], copies)) for key in keys)


# -------------------------------------------------------------------------------------------------------- the searches


def search(trial: Trial, query: str) -> list[Attempt]:
    """What was tried to turn the verdict of a query invariant (or of an attestation's proxy), until something did.

    Nothing stays done.
    """
    spec = trial.check.spec
    shown = not (isinstance(spec, QueryInvariant) and spec.rows is not None)
    with trial.transaction():
        scene = read(trial.conn, query, shown=shown)
    found: list[Attempt] = []
    with closing(_Search(trial, scene).all()) as attempts:
        for attempt in attempts:
            if attempt not in found:
                found.append(attempt)
            if attempt.outcome == "violated":
                break
    return found


class _Search:
    """The searches for one query, each a generator of attempts that undoes what it did."""

    def __init__(self, trial: Trial, scene: Scene) -> None:
        self.trial = trial
        self.conn = trial.conn
        self.scene = scene

    def all(self) -> Generator[Attempt]:
        """One after the other; whoever asks stops at the first violation."""
        tables = self.scene.tables()
        for lawful in (True, False) if tables else ():

            def rows(*, lawful: bool = lawful) -> Iterator[Attempt]:
                yield from self.new_rows(tables, lawful=lawful)
                yield from self.existing_rows(tables, lawful=lawful)

            yield from self.staged("", self.foreign_made_local, rows)
            if lawful and self.transition():
                yield from self.staged(_BEFORE, lambda: self.given(tables), lambda: self.rows_given(tables))
        catalogs = self.scene.catalogs()
        if catalogs or (self.scene.calls and not tables):
            yield from self.staged("", None, lambda: self.objects(catalogs))
        views = self.scene.replaceable()
        if views:
            yield from self.staged(
                "views replaced by copies of their rows",
                lambda: self.views_replaced(views),
                lambda: self.new_rows(views, lawful=True, how="in a copy that stands for"),
            )

    def rows_given(self, keys: Sequence[Key]) -> Iterator[Attempt]:
        """Change and delete rows that `given` made."""
        return self.existing_rows(keys, lawful=True, whose=_BEFORE)

    def staged(
        self, words: str, given: Callable[[], None] | None, searches: Callable[[], Iterator[Attempt]]
    ) -> Iterator[Attempt]:
        """Searches in a transaction of their own, after something that was there before; it must hold then."""
        try:
            with self.trial.transaction(given) as verdict:
                if verdict.status in HOLDS:
                    yield from searches()
                else:
                    yield Attempt(tried=words, outcome="not tried", detail=f"then it is {verdict.status}")
        except ReconcilerError as error:
            yield Attempt(tried=words or "the search", outcome="refused", detail=refusal(error))

    def transition(self) -> bool:
        """The invariant is about what an apply does: rows that were there before may be made for it."""
        spec = self.trial.check.spec
        return isinstance(spec, AttestInvariant) or (isinstance(spec, QueryInvariant) and bool(spec.unchanged))

    # ------------------------------------------------------------------------------------------------------ new rows

    def new_rows(self, keys: Sequence[Key], *, lawful: bool, how: str = "in") -> Iterator[Attempt]:
        """Search on copies, then write what was found to the real relations."""
        tried = 0
        for repeat in (1, self.crowd()):
            rows = {key: self.candidates(key, lawful=lawful, repeat=repeat) for key in keys}
            for some in _subsets(keys):
                chosen = {key: rows[key] for key in some if rows[key]}
                tried += sum(map(len, chosen.values()))
                for _ in range(_OTHERS):
                    found = self.found_on_copies(keys, chosen)
                    if not found:
                        break
                    yield self.written(found, lawful=lawful, how=how)
                    # The same rows again would end in the same way.
                    chosen = {key: [row for row in chosen[key] if row not in found.get(key, ())] for key in chosen}
        what = "as the constraints allow" if lawful else "whatever the constraints say"
        names = ", ".join(self.scene.relations[key].text for key in keys)
        yield Attempt(tried=f"{tried} made-up rows, {what}, in copies of {names}", outcome="held")

    def crowd(self) -> int:
        """How many rows alike might be too many: one more than a small number that the query names, at least two."""
        numbers = [int(text) for text in self.scene.constants.every if text.isdecimal() and len(text) <= 3]
        return max([1, *(number for number in numbers if number < MOST_ROWS)]) + 1

    def candidates(self, key: Key, *, lawful: bool, repeat: int = 1) -> list[Row]:
        """Rows for one relation, for each of its mentions in the query; or a few of them, `repeat` times each."""
        relation = self.scene.relations[key]
        places = [place for place in self.scene.places if place.key == key]
        found: list[Row] = []
        for place in places:
            limit = MOST_ROWS // len(places)
            more = rows_for(self.conn, relation, self.scene.wanted(place), lawful=lawful, limit=limit)
            found += [row for row in more if row not in found]
        if repeat > 1:
            found = [row for row in found[: max(1, MOST_ROWS // repeat)] for _ in range(repeat)]
        return told_apart(relation, self.scene.varied, found)

    def found_on_copies(self, keys: Sequence[Key], rows: Rows) -> Rows:
        """Few rows that turn the verdict when they are added to copies of the relations; none when all do not."""
        with undone(self.conn):
            copies = {key: (NAME, f"{key[1]}_{number}") for number, key in enumerate(keys)}
            pg.run(self.conn, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(NAME)))
            for key, copy in copies.items():
                statement = sql.SQL("CREATE TABLE {} AS SELECT * FROM {}")
                pg.run(self.conn, statement.format(sql.Identifier(*copy), sql.Identifier(*key)))
            check = asking(self.trial.check, elsewhere(self.scene, copies))
            asked = replace(self.trial.asked, memo=memo_of(self.conn, check, self.trial.asked))
            if judged(self.conn, check, asked).status not in HOLDS:
                return {}
            items = [(key, place) for key in rows for place in self.filled(key, copies[key], rows[key])]

            def violated(some: Sequence[_Item]) -> bool:
                left = set(some)
                with undone(self.conn):
                    for key in rows:
                        gone = [item[1] for item in items if item[0] == key and item not in left]
                        statement = sql.SQL("DELETE FROM {} WHERE ctid = ANY ({}::pg_catalog.tid[])")
                        pg.run(self.conn, statement.format(sql.Identifier(*copies[key]), sql.Literal(gone)))
                    return judged(self.conn, check, asked).status == "violated"

            left = set(_fewest(items, violated)) if violated(items) else set[_Item]()
        found: Rows = {}
        for key in rows:
            places = [item for item in items if item[0] == key]
            some = [row for item, row in zip(places, rows[key], strict=True) if item in left]
            if some:
                found[key] = some
        return found

    def filled(self, key: Key, copy: Key, rows: Sequence[Row]) -> list[str]:
        """Write rows to a copy; where they are, in their order."""
        if not rows:
            return []
        columns = [column for column in self.scene.relations[key].columns if column.name in rows[0]]
        statement = sql.SQL("INSERT INTO {} ({}) VALUES {} RETURNING ctid::pg_catalog.text AS place").format(
            sql.Identifier(*copy),
            sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
            sql.SQL(", ").join(
                sql.SQL("({})").format(sql.SQL(", ").join(value_of(column, row[column.name]) for column in columns))
                for row in rows
            ),
        )
        return [row["place"] for row in pg.rows(self.conn, statement, doing="filling a copy")]

    def written(self, rows: Rows, *, lawful: bool, how: str) -> Attempt:
        """Write the rows to the real relations and ask the invariant."""
        order = _parents_first(self.conn, self.scene, list(rows))
        lifted: list[str] | None = None if lawful else []

        def write() -> None:
            for key in order:
                for row in rows[key]:
                    put(self.conn, self.scene.relations[key], row, self.scene.varied, lifted)
            self.refresh()

        words = "; ".join(
            f"{'a row' if len(rows[key]) == 1 else f'{len(rows[key])} rows'} {how} {self.scene.relations[key].text}"
            f"{said(rows[key][0], self.scene.told)}"
            for key in order
        )
        attempt = self.trial.attempt(words, write)
        if attempt.outcome == "held" and not lawful:
            # Nothing refused the rows, but something changed them.
            def without_triggers() -> None:
                for key in order:
                    names = lift_triggers(self.conn, self.scene.relations[key])
                    if lifted is not None and names:
                        lifted.append(names)
                write()

            attempt = self.trial.attempt(words, without_triggers)
        return past(attempt, lifted)

    def refresh(self) -> None:
        """Bring materialized views up to date."""
        for key in reversed(self.scene.materialized()):
            pg.run(self.conn, sql.SQL("REFRESH MATERIALIZED VIEW {}").format(sql.Identifier(*key)))

    # -------------------------------------------------------------------------------------------------- existing rows

    def existing_rows(self, keys: Sequence[Key], *, lawful: bool, whose: str = "an existing row") -> Iterator[Attempt]:
        """Change one column of one row, then of all rows; delete one row, then all."""
        for key in keys:
            relation = self.scene.relations[key]
            row = sql.SQL("(tableoid, ctid) = (SELECT tableoid, ctid FROM {} ORDER BY tableoid, ctid LIMIT 1)").format(
                relation.identifier
            )
            count = sql.SQL("SELECT EXISTS (SELECT FROM {}) AS there").format(relation.identifier)
            if not pg.rows(self.conn, count, doing=f"looking for rows of {relation.text}")[0]["there"]:
                yield Attempt(tried=f"{whose} of {relation.text}", outcome="not tried", detail="it has no row")
                continue
            held: list[Attempt] = []
            for words, where in ((whose, row), ("all rows", sql.SQL("true"))):
                delete = sql.SQL("DELETE FROM {} WHERE {}").format(relation.identifier, where)
                held.append(self.forced(relation, f"{words} of {relation.text} deleted", delete, lawful=lawful))
                for name, value in islice(self.values(key, lawful=lawful), MOST_CHANGES):
                    if held[-1].outcome == "violated":
                        break
                    update = change(relation, {name: value}, where)
                    tried = f"{words} of {relation.text} changed{said({name: value}, {name})}"
                    held.append(self.forced(relation, tried, update, lawful=lawful))
                if held[-1].outcome == "violated":
                    yield held[-1]
                    return
            yield Attempt(
                tried=f"rows of {relation.text} changed and deleted in {len(held)} ways",
                outcome="held" if any(one.outcome == "held" for one in held) else "refused",
                detail="; ".join(sorted({one.detail for one in held if one.outcome == "refused"}))[:400],
            )

    def values(self, key: Key, *, lawful: bool) -> Iterator[tuple[str, str | None]]:
        """Columns of a relation and what to put there, in turn."""
        relation = self.scene.relations[key]
        wanted = Wanted(self.scene.constants, self.scene.varied)
        pools = values_for(self.conn, relation, wanted, lawful=lawful)
        chosen = {name: pool for name, pool in pools.items() if name in self.scene.varied} or pools
        for number in range(max(map(len, chosen.values()), default=0)):
            yield from ((name, pool[number]) for name, pool in chosen.items() if number < len(pool))

    def forced(self, relation: Relation, words: str, statement: Composed, *, lawful: bool) -> Attempt:
        """Execute it; when not lawful, take away what refuses it."""
        lifted: list[str] | None = None if lawful else []

        def make() -> None:
            force(self.conn, relation, statement, words, lifted)
            self.refresh()

        return past(self.trial.attempt(words, make), lifted)

    def given(self, keys: Sequence[Key]) -> None:
        """A row in each relation that was there before: written past triggers and foreign keys."""
        self.foreign_made_local()
        pg.run(self.conn, "SET LOCAL session_replication_role = replica")
        for key in _parents_first(self.conn, self.scene, list(keys)):
            for row in self.candidates(key, lawful=True)[:1]:
                with kept(self.conn):
                    put(self.conn, self.scene.relations[key], row, (), None)
        pg.run(self.conn, "SET LOCAL session_replication_role = origin")
        self.refresh()

    # -------------------------------------------------------------------------------------------------------- objects

    def objects(self, catalogs: Sequence[Key]) -> Iterator[Attempt]:
        """Make, change and drop what the catalog would show."""
        texts = self.scene.constants.every
        objects = named(self.conn, texts)
        readable = [key for key in catalogs if key[1] in NAME_COLUMNS]
        made = {key: list(islice(makings(key[1], self.names(key), objects), MOST_OBJECTS)) for key in readable}
        for facets in made.values():
            yield from self.tampered("made", facets)
        yield from self.tampered("changed", list(islice(changes(self.conn, objects), MOST_OBJECTS)))
        for key in readable:
            yield from self.tampered("dropped", list(drops(self.conn, key[1], texts)))
        for key, facets in made.items():
            for facet in facets[:4]:
                yield from self.made_and_altered(key, facet)

    def names(self, key: Key) -> list[str]:
        """Names that the query might look for."""
        column, relation = NAME_COLUMNS[key[1]], self.scene.relations[key]
        found: dict[str, None] = {}
        for place in self.scene.places:
            if place.key == key:
                wanted = self.scene.wanted(place)._replace(varied=frozenset({column}))
                pool = values_for(self.conn, relation, wanted, lawful=True)[column]
                found |= dict.fromkeys(text for text in pool if text)
        return [NAME, *list(found)[:6]]

    def tampered(self, what: str, facets: Sequence[Tampering]) -> Iterator[Attempt]:
        """Each facet in turn: the one that turns the verdict, else one sentence for all."""
        attempts: list[Attempt] = []
        for facet in facets:
            attempts.append(self.trial.first(facet.words, facet.ways))
            if attempts[-1].outcome == "violated":
                yield attempts[-1]
                return
        if attempts:
            held = sum(one.outcome == "held" for one in attempts)
            detail = f"{len(attempts) - held} of them refused" if held < len(attempts) else ""
            yield Attempt(
                tried=f"{len(attempts)} objects or attributes of objects {what}, one at a time",
                outcome="held" if held else "refused",
                detail=detail,
            )

    def made_and_altered(self, key: Key, facet: Tampering) -> Iterator[Attempt]:
        """Make an object and write attributes to its row in the catalog, found on a copy of the catalog."""
        relation = self.scene.relations[key]
        if "oid" not in {column.name for column in relation.columns}:
            return
        for statements in facet.ways[:1]:
            try:
                with undone(self.conn):
                    row, rows = self.altered_rows(key, statements)
                    found = self.found_on_copies([key], {key: rows}).get(key, [])
            except ReconcilerError:
                continue
            if not found:
                yield Attempt(tried=f"{facet.words}, with {len(rows)} other attributes", outcome="held")
                continue
            other = {name: value for name, value in found[0].items() if value != row[name]}

            def make(statements: Sequence[Composable] = statements, other: Row = other) -> None:
                before = self.oids(key)
                for statement in statements:
                    pg.run(self.conn, sql.Composed([statement]))
                (oid,) = self.oids(key) - before
                where = sql.SQL("oid = {}::pg_catalog.oid").format(sql.Literal(oid))
                pg.run(self.conn, change(relation, other, where))

            yield self.trial.attempt(f"{facet.words}; then in {relation.text}{said(other, other)}", make)

    def altered_rows(self, key: Key, statements: Sequence[Composable]) -> tuple[Row, list[Row]]:
        """The row of a new object, and the same with every other value that the query might look for."""
        relation = self.scene.relations[key]
        before = self.oids(key)
        for statement in statements:
            pg.run(self.conn, sql.Composed([statement]))
        columns = [column for column in relation.columns if column.type not in {"pg_node_tree", "anyarray"}]
        shown = [sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(column.name)) for column in columns]
        query = sql.SQL("SELECT {} FROM {} WHERE oid = ANY ({}::pg_catalog.oid[]) ORDER BY oid LIMIT 1").format(
            sql.SQL(", ").join(shown), relation.identifier, sql.Literal(sorted(self.oids(key) - before))
        )
        row = pg.rows(self.conn, query, doing=f"reading {relation.text}")[0]
        skipped = {"oid", NAME_COLUMNS[key[1]]}
        fixed = {name: value for name, value in row.items() if name in skipped or name not in self.scene.varied}
        found: list[Row] = []
        for place in self.scene.places:
            if place.key == key:
                wanted = self.scene.wanted(place)._replace(fixed=fixed)
                found += rows_for(self.conn, relation, wanted, lawful=True, limit=MOST_ROWS)
        return row, [{name: one[name] for name in row} for one in found]

    def oids(self, key: Key) -> set[str]:
        query = sql.SQL("SELECT oid::pg_catalog.text AS oid FROM {}").format(sql.Identifier(*key))
        return {row["oid"] for row in pg.rows(self.conn, query, doing="reading the catalog")}

    # ---------------------------------------------------------------------------------------------------------- views

    def views_replaced(self, keys: Sequence[Key]) -> None:
        """Let tables with a copy of their rows stand for views."""
        pg.run(self.conn, "SET LOCAL allow_system_table_mods = on")
        pg.run(self.conn, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(f"{NAME}_views")))
        for key in keys:
            copy = sql.Identifier(f"{NAME}_views", key[1])
            view = sql.Identifier(*key)
            pg.run(self.conn, sql.SQL("CREATE TABLE {} AS SELECT * FROM {}").format(copy, view))
            pg.run(self.conn, sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT * FROM {}").format(view, copy))

    def foreign_made_local(self) -> None:
        """Let empty local tables stand for foreign ones: a rollback would not reach what is written there."""
        for key in self.scene.tables():
            relation = self.scene.relations[key]
            if relation.kind == "f":
                away = sql.SQL("ALTER FOREIGN TABLE {} RENAME TO {}")
                like = sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)")
                other = sql.Identifier(key[0], f"{NAME}_{key[1]}"[:63])
                pg.run(self.conn, away.format(relation.identifier, sql.Identifier(f"{NAME}_{key[1]}"[:63])))
                pg.run(self.conn, like.format(relation.identifier, other))


def asking(check: Check, query: str) -> Check:
    """The same check with another query."""
    spec = check.spec
    other: Model
    if isinstance(spec, AttestInvariant) and spec.proxy is not None:
        other = spec.model_copy(update={"proxy": spec.proxy.model_copy(update={"query": query})})
    else:
        other = spec.model_copy(update={"query": query})
    return Check(check.kind, check.name, other)


def _subsets(keys: Sequence[Key]) -> Iterator[tuple[Key, ...]]:
    """All relations, each alone, all but one."""
    yield tuple(keys)
    if len(keys) > 1:
        yield from ((key,) for key in keys)
    if len(keys) > 2:
        yield from (tuple(other for other in keys if other != key) for key in keys)


def _fewest(items: list[_Item], violated: Callable[[list[_Item]], bool]) -> list[_Item]:
    """Take away halves, quarters … of the items, the last ones first, as long as the verdict stays."""
    size = max(1, len(items) // 2)
    while len(items) > 1:
        for end in range(len(items), 0, -size):
            rest = items[: max(0, end - size)] + items[end:]
            if rest and violated(rest):
                items = rest
                break
        else:
            if size == 1:
                return items
            size = max(1, size // 2)
            continue
        size = min(size, max(1, len(items) // 2))
    return items


def _parents_first(conn: pg.Connection, scene: Scene, keys: Sequence[Key]) -> list[Key]:
    """The relations in an order in which foreign keys among them find what they ask for."""
    oids = {scene.relations[key].oid: key for key in keys}
    query = """
        SELECT k.conrelid::pg_catalog.int8 AS child, k.confrelid::pg_catalog.int8 AS parent
          FROM pg_catalog.pg_constraint k
         WHERE k.contype = 'f' AND k.conrelid = ANY (%(oids)s::pg_catalog.oid[])
           AND k.confrelid = ANY (%(oids)s::pg_catalog.oid[]) AND k.conrelid <> k.confrelid
    """
    rows = pg.rows(conn, query, {"oids": list(oids)}, doing="reading foreign keys")
    parents = {key: {oids[row["parent"]] for row in rows if oids[row["child"]] == key} for key in keys}
    order: list[Key] = []
    while len(order) < len(keys):
        left = [key for key in keys if key not in order]
        free = [key for key in left if parents[key] <= set(order)]
        order += free[:1] or left[:1]
    return order
