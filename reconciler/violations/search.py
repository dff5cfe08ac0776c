"""What would make a declared query answer otherwise than it must? Looked for in the query's own tree.

1. Rows. Copies of the tables are filled with rows made of the query's constants, of those of the tables' CHECKs and of
   values of each type, and the query is asked on the copies. When its verdict turns, the rows that it takes are written
   to the real tables: first as the constraints allow, then with what is in the way taken away.
2. Existing rows, changed and deleted.
3. Real objects, where the query reads the catalog: made, changed and dropped by DDL.
4. Views over what the server does (sessions, statistics): replaced by a view over a copy of their rows.

Everything is bounded and comes in the same order every time. Nothing here knows what a query means: the invariant
judges.
"""

from __future__ import annotations

from contextlib import closing, suppress
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from psycopg import sql

from reconciler import pg
from reconciler.checks.forms import AttestInvariant, QueryInvariant
from reconciler.errors import ReconcilerError
from reconciler.violations.copies import HIDDEN, Rows, turning
from reconciler.violations.objects import NAME_COLUMNS, Named, changes, drops, makings, named
from reconciler.violations.relations import Relation, Row, change, said
from reconciler.violations.rows import DEEPEST, Wanted, rows_for, told_apart, values_for
from reconciler.violations.samples import Constants, joined
from reconciler.violations.scene import SYSTEM, Key, Place, Scene, read
from reconciler.violations.tampering import NAME
from reconciler.violations.trial import HOLDS, Attempt, Trial, kept, refusal, run, undone
from reconciler.violations.writing import asleep, domains, force, lift_triggers, past, put

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from psycopg.sql import Composed

    from reconciler.violations.tampering import Tampering

MOST_ROWS = 240
"""In the copy of one relation."""
MOST_CHANGES = 120
"""Of the existing rows of one relation."""
MOST_OBJECTS = 200
"""Made, changed and dropped, each."""

_OTHERS = 3
"""How often other rows are looked for when the first ones are refused."""
_BEFORE = "a row made beforehand"


class Found(NamedTuple):
    """What a query reads, what was tried to turn it, and which searches could not be made at all, with the reason."""

    scene: Scene
    attempts: tuple[Attempt, ...]
    obstructed: tuple[str, ...]


def search(trial: Trial, query: str) -> Found:
    """Try to turn the verdict of a query invariant (or of an attestation's proxy) until something does.

    Nothing stays done.
    """
    spec = trial.check.spec
    shown = not (isinstance(spec, QueryInvariant) and spec.rows is not None)
    with trial.transaction():
        scene = read(trial.conn, query, shown=shown)
    found: list[Attempt] = []
    searches = _Search(trial, scene)
    with closing(searches.everywhere()) as attempts:
        for attempt in attempts:
            if attempt not in found:
                found.append(attempt)
            if attempt.outcome == "violated":
                break
    return Found(scene, tuple(found), tuple(dict.fromkeys(searches.obstructed)))


class _Search:
    """The searches for one query, each a generator of attempts that undoes what it did."""

    def __init__(self, trial: Trial, scene: Scene) -> None:
        self.trial = trial
        self.conn = trial.conn
        self.scene = scene
        self.dropped: list[str] = []
        """What is out of the way throughout a transaction."""
        self.obstructed: list[str] = []

    def everywhere(self) -> Generator[Attempt]:
        """One search after the other; whoever asks stops at the first violation."""
        tables = self.scene.tables()
        if tables:
            lawful = "rows that the constraints allow"
            yield from self.staged(lawful, self.foreign_made_local, lambda: self.rows(tables, lawful=True))
            yield from self.staged(
                f"{_BEFORE} in each table",
                lambda: self.given(tables),
                lambda: self.existing_rows(tables, lawful=True, whose=_BEFORE),
            )
            other = "rows that constraints forbid"
            yield from self.staged(other, self.foreign_made_local, lambda: self.rows(tables, lawful=False))
            yield from self.staged(
                "constraints of domains dropped",
                lambda: self.without_domains(tables),
                lambda: self.rows(tables, lawful=False) if self.dropped else iter(()),
            )
        catalogs = self.scene.catalogs()
        if catalogs or (self.scene.calls and not tables):
            yield from self.staged("objects made, changed and dropped", None, lambda: self.objects(catalogs))
        if raw := [key for key in catalogs if key[1] not in NAME_COLUMNS]:
            straight = "written straight into"
            yield from self.staged("rows of the catalog", None, lambda: self.new_rows(raw, lawful=True, how=straight))
        if views := self.scene.replaceable():
            yield from self.staged(
                "views replaced by copies of their rows",
                lambda: self.views_replaced(views),
                lambda: self.new_rows(views, lawful=True, how="in a copy that stands for"),
            )

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
            yield self.not_tried(words, error)
        self.dropped = []

    def not_tried(self, words: str, error: ReconcilerError) -> Attempt:
        """A search that could not be made: what it would have found nobody knows."""
        self.obstructed.append(refusal(error))
        return Attempt(tried=words, outcome="not tried", detail=refusal(error))

    # --------------------------------------------------------------------------------------------------------- new rows

    def rows(self, keys: Sequence[Key], *, lawful: bool) -> Iterator[Attempt]:
        """New rows, then existing ones."""
        try:
            yield from self.new_rows(keys, lawful=lawful)
        except ReconcilerError as error:
            yield self.not_tried("made-up rows", error)
        yield from self.existing_rows(keys, lawful=lawful)

    def new_rows(self, keys: Sequence[Key], *, lawful: bool, how: str = "in") -> Iterator[Attempt]:
        """Search on copies, then write what was found to the real relations."""
        tried = 0
        for repeat in (1, self.crowd()):
            rows = {key: self.candidates(key, lawful=lawful, repeat=repeat) for key in keys}
            for some in _subsets(keys):
                chosen = {key: rows[key] for key in some if rows[key]}
                tried += sum(map(len, chosen.values()))
                for _ in range(_OTHERS):
                    found = turning(self.trial, self.scene, keys, chosen)
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

    def wanted(self, place: Place) -> Wanted:
        """The rows that a mention of a relation might notice."""
        constants = self.scene.constants
        if place.key[0] in SYSTEM:
            # Whose oids a catalog may hold, no constant says.
            oids = self.oids_named()
            columns = [one.name for one in self.scene.relations[place.key].columns if one.type == "oid"]
            constants = joined([constants, Constants(dict.fromkeys(columns, oids), ())])
        return Wanted(constants, self.scene.varied, {}, place.filters, place.alias)

    def candidates(self, key: Key, *, lawful: bool, repeat: int = 1) -> list[Row]:
        """Rows for one relation, for each of its mentions in the query; or a few of them, `repeat` times each."""
        relation = self.scene.relations[key]
        places = [place for place in self.scene.places if place.key == key]
        found: list[Row] = []
        for place in places:
            limit = MOST_ROWS // len(places)
            more = rows_for(self.conn, relation, self.wanted(place), lawful=lawful, limit=limit)
            found += [row for row in more if row not in found]
        if repeat > 1:
            found = [row for row in found[: max(1, MOST_ROWS // repeat)] for _ in range(repeat)]
        return told_apart(relation, self.scene.varied, found)

    def written(self, rows: Rows, *, lawful: bool, how: str) -> Attempt:
        """Write the rows to the real relations and ask the invariant."""
        order = _parents_first(self.scene, [*rows])
        lifted: list[str] | None = None if lawful else [*self.dropped]

        def write(depth: int = 0) -> None:
            for key in order:
                for row in rows[key]:
                    put(self.conn, self.scene.relations[key], row, self.scene.varied, lifted, depth)
            self.refresh()

        def alone() -> None:
            for key in order:
                names = lift_triggers(self.conn, self.scene.relations[key])
                if lifted is not None and names is not None:
                    lifted.append(names)
            write(DEEPEST)

        words = "; ".join(
            f"{'a row' if len(rows[key]) == 1 else f'{len(rows[key])} rows'} {how} {self.scene.relations[key].text}"
            f"{said(rows[key][0], self.scene.told)}"
            for key in order
        )
        attempt = self.trial.attempt(words, write)
        if attempt.outcome == "held" and not lawful:
            # Nothing refused the rows: a trigger changed them, or what a foreign key asked for was made as well.
            attempt = self.trial.attempt(words, alone)
        return past(attempt, lifted)

    def refresh(self) -> None:
        """Bring materialized views up to date."""
        for key in reversed(self.scene.materialized()):
            pg.run(self.conn, sql.SQL("REFRESH MATERIALIZED VIEW {}").format(sql.Identifier(*key)))

    # ---------------------------------------------------------------------------------------------------- existing rows

    def existing_rows(self, keys: Sequence[Key], *, lawful: bool, whose: str = "an existing row") -> Iterator[Attempt]:
        """Delete a row of each relation or change one of its columns; then all rows."""
        for key in keys:
            relation = self.scene.relations[key]
            count = sql.SQL("SELECT EXISTS (SELECT FROM {}) AS there").format(relation.identifier)
            if not pg.rows(self.conn, count, doing=f"looking for rows of {relation.text}")[0]["there"]:
                yield Attempt(tried=f"{whose} of {relation.text}", outcome="not tried", detail="it has no row")
                continue
            tried: list[Attempt] = []
            for words, statement in self.moves(key, whose, lawful=lawful):
                tried.append(self.forced(relation, words, statement, lawful=lawful))
                if tried[-1].outcome == "violated":
                    yield tried[-1]
                    return
            refused = sorted({one.detail for one in tried if one.outcome == "refused"})
            yield Attempt(
                tried=f"rows of {relation.text} changed and deleted in {len(tried)} ways",
                outcome="held" if any(one.outcome == "held" for one in tried) else "refused",
                detail=f"refused by {'; '.join(refused)}"[:400] if refused else "",
            )

    def moves(self, key: Key, whose: str, *, lawful: bool) -> Iterator[tuple[str, Composed]]:
        """What can be done to existing rows, one column and one value at a time."""
        relation = self.scene.relations[key]
        one = sql.SQL("(tableoid, ctid) = (SELECT tableoid, ctid FROM {} ORDER BY tableoid, ctid LIMIT 1)").format(
            relation.identifier
        )
        wanted = Wanted(self.scene.constants, self.scene.varied)
        pools = values_for(self.conn, relation, wanted, lawful=lawful)
        chosen = {name: pool for name, pool in pools.items() if name in self.scene.varied} or pools
        longest = max(map(len, chosen.values()), default=0)
        values = [
            (name, pool[number]) for number in range(longest) for name, pool in chosen.items() if number < len(pool)
        ]
        for words, where in ((whose, one), ("all rows", sql.SQL("true"))):
            yield f"{words} of {relation.text} deleted", _delete(relation, where)
            for name, value in values[:MOST_CHANGES]:
                tried = f"{words} of {relation.text} changed{said({name: value}, {name})}"
                yield tried, change(relation, {name: value}, where)

    def forced(self, relation: Relation, words: str, statement: Composed, *, lawful: bool) -> Attempt:
        """Execute it; when not lawful, take away what refuses it."""
        lifted: list[str] | None = None if lawful else [*self.dropped]

        def make() -> None:
            force(self.conn, relation, statement, words, lifted)
            self.refresh()

        return past(self.trial.attempt(words, make), lifted)

    # ----------------------------------------------------------------------------------------- what is there beforehand

    def given(self, keys: Sequence[Key]) -> None:
        """A row in each relation that was there before: written past triggers and foreign keys.

        Where the answer must only stay as it is, one that the query sees; otherwise one like any other.
        """
        self.foreign_made_local()
        spec = self.trial.check.spec
        seen = isinstance(spec, AttestInvariant) or (isinstance(spec, QueryInvariant) and bool(spec.unchanged))
        with asleep(self.conn):
            for key in _parents_first(self.scene, keys):
                relation = self.scene.relations[key]
                plain = rows_for(self.conn, relation, Wanted(), lawful=True, limit=1)
                for row in self.candidates(key, lawful=True)[:1] if seen else plain:
                    with suppress(ReconcilerError), kept(self.conn):
                        put(self.conn, relation, row, (), None)
        self.refresh()

    def without_domains(self, keys: Sequence[Key]) -> None:
        """Take away the constraints of the domains of columns that matter."""
        self.foreign_made_local()
        for words, statement in domains(self.conn, [self.scene.relations[key] for key in keys], self.scene.varied):
            # In a savepoint: PostgreSQL takes no other after this statement ("unprocessed inval messages").
            with kept(self.conn):
                pg.run(self.conn, statement, words)
            self.dropped.append(words)

    def foreign_made_local(self) -> None:
        """Let empty local tables stand for foreign ones: a rollback would not reach what is written there."""
        for key in self.scene.tables():
            relation = self.scene.relations[key]
            if relation.kind == "f":
                name = sql.Identifier(f"{NAME}_{key[1]}"[:63])
                away = sql.SQL("ALTER FOREIGN TABLE {} RENAME TO {}").format(relation.identifier, name)
                like = sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                    relation.identifier, sql.Identifier(key[0], f"{NAME}_{key[1]}"[:63])
                )
                run(self.conn, [away, like])

    def views_replaced(self, keys: Sequence[Key]) -> None:
        """Let tables with a copy of their rows stand for what views show."""
        pg.run(self.conn, "SET LOCAL allow_system_table_mods = on")
        home = f"{NAME}_views"
        pg.run(self.conn, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(home)))
        for key in keys:
            relation, copy = self.scene.relations[key], sql.Identifier(home, key[1])
            pairs = [
                (
                    sql.Identifier(column.name),
                    sql.Identifier(f"{column.name}_" if column.name in HIDDEN else column.name),
                )
                for column in relation.columns
            ]
            there = sql.SQL(", ").join(sql.SQL("{} AS {}").format(name, other) for name, other in pairs)
            back = sql.SQL(", ").join(sql.SQL("{} AS {}").format(other, name) for name, other in pairs)
            table = sql.SQL("CREATE TABLE {} AS SELECT {} FROM {}").format(copy, there, relation.identifier)
            view = sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT {} FROM {}").format(relation.identifier, back, copy)
            run(self.conn, [table, view])

    # ---------------------------------------------------------------------------------------------------------- objects

    def objects(self, catalogs: Sequence[Key]) -> Iterator[Attempt]:
        """Make, change and drop what the catalog would show."""
        objects = self.named()
        makeable = [key for key in catalogs if key[1] in NAME_COLUMNS]
        made = {key: list(islice(makings(key[1], self.names(key), objects), MOST_OBJECTS)) for key in makeable}
        for facets in made.values():
            yield from self.tampered("made", facets)
        yield from self.tampered("changed", list(islice(changes(self.conn, objects), MOST_OBJECTS)))
        for key in makeable:
            yield from self.tampered("dropped", list(drops(self.conn, key[1], self.scene.constants.every)))
        for key, facets in made.items():
            for facet in facets[:4]:
                yield from self.made_and_altered(key, facet)

    def named(self) -> Named:
        """What the query's constants name."""
        return named(self.conn, self.scene.constants.every)

    def oids_named(self) -> tuple[str, ...]:
        """The oids of the tables and functions among them."""
        found = self.named()
        return tuple(str(oid) for oid in (*(table.oid for table in found.tables), *(oid for oid, _ in found.functions)))

    def names(self, key: Key) -> list[str]:
        """Names that the query might look for in a catalog, and one that it does not."""
        column, relation = NAME_COLUMNS[key[1]], self.scene.relations[key]
        found: dict[str, None] = {}
        for place in self.scene.places:
            if place.key == key:
                wanted = self.wanted(place)._replace(varied=frozenset({column}))
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
            tried = f"{len(attempts)} objects or attributes of objects {what}, one at a time"
            yield Attempt(tried=tried, outcome="held" if held else "refused", detail=detail)

    def made_and_altered(self, key: Key, facet: Tampering) -> Iterator[Attempt]:
        """Make an object and write other attributes to its row in the catalog; which, is searched on a copy of it."""
        relation, statements = self.scene.relations[key], facet.ways[0]
        if "oid" not in {column.name for column in relation.columns}:
            return
        try:
            with undone(self.conn):
                row = self.new_object(key, statements)
                rows = self.altered(key, row)
                found = turning(self.trial, self.scene, [key], {key: rows}).get(key, [])
        except ReconcilerError as error:
            yield Attempt(tried=facet.words, outcome="refused", detail=refusal(error))
            return
        if not found:
            yield Attempt(tried=f"{facet.words}, with {len(rows)} other sets of attributes", outcome="held")
            return
        other = {name: value for name, value in found[0].items() if value != row[name]}

        def make() -> None:
            oid = self.new_object(key, statements)["oid"]
            where = sql.SQL("oid = {}::pg_catalog.oid").format(sql.Literal(oid))
            pg.run(self.conn, change(relation, other, where))

        yield self.trial.attempt(f"{facet.words}; then in {relation.text}{said(other, other)}", make)

    def new_object(self, key: Key, statements: Sequence[Composed]) -> Row:
        """Make it; its row in the catalog, without the columns whose values cannot be written."""
        relation = self.scene.relations[key]
        query = sql.SQL("SELECT coalesce(pg_catalog.array_agg(oid), '{{}}') AS oids FROM {}").format(
            relation.identifier
        )
        before = pg.rows(self.conn, query, doing=f"reading {relation.text}")[0]["oids"]
        run(self.conn, statements)
        shown = [
            sql.SQL("{0}::pg_catalog.text AS {0}").format(sql.Identifier(column.name))
            for column in relation.columns
            if column.type not in {"pg_node_tree", "anyarray"}
        ]
        query = sql.SQL("SELECT {} FROM {} WHERE oid <> ALL ({}::pg_catalog.oid[]) ORDER BY oid LIMIT 1").format(
            sql.SQL(", ").join(shown), relation.identifier, sql.Literal(before)
        )
        return pg.rows(self.conn, query, doing=f"reading {relation.text}")[0]

    def altered(self, key: Key, row: Row) -> list[Row]:
        """The row of a catalog with every other attribute that the query might look for."""
        skipped = {"oid", NAME_COLUMNS[key[1]]}
        fixed = {name: value for name, value in row.items() if name in skipped or name not in self.scene.varied}
        found: list[Row] = []
        for place in self.scene.places:
            if place.key == key:
                wanted = self.wanted(place)._replace(fixed=fixed)
                found += rows_for(self.conn, self.scene.relations[key], wanted, lawful=True, limit=MOST_ROWS)
        return [{name: one[name] for name in row} for one in found]


def _delete(relation: Relation, where: sql.Composable) -> Composed:
    return sql.SQL("DELETE FROM {} WHERE {}").format(relation.identifier, where)


def _subsets(keys: Sequence[Key]) -> Iterator[tuple[Key, ...]]:
    """All relations, each alone, all but one."""
    yield tuple(keys)
    if len(keys) > 1:
        yield from ((key,) for key in keys)
    if len(keys) > 2:
        yield from (tuple(other for other in keys if other != key) for key in keys)


def _parents_first(scene: Scene, keys: Sequence[Key]) -> list[Key]:
    """The relations in an order in which foreign keys among them find what they ask for."""
    parents = {key: {(one.schema, one.table) for one in scene.relations[key].foreign} & {*keys} - {key} for key in keys}
    order: list[Key] = []
    while len(order) < len(keys):
        left = [key for key in keys if key not in order]
        order += [key for key in left if parents[key] <= {*order}][:1] or left[:1]
    return order
