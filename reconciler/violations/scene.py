"""What a query reads, from its parse tree: relations, views taken apart, conditions and constants; and the same query
asked of copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from postgast import deparse, walk
from postgast import pg_query_pb2 as pb

from reconciler import pg
from reconciler.allowlist import AGGREGATES, CATALOG, FUNCTIONS, WINDOWS
from reconciler.syntax import single, strings
from reconciler.violations.relations import Condition, Relation, describe, names_in
from reconciler.violations.samples import Constants, constants_of, joined, mentioned

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.message import Message

Key = tuple[str, str]
"""Schema and name of a relation."""

SYSTEM = {"pg_catalog", "information_schema"}


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
    """It calls functions whose answer depends on more than what they are given."""

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
        calls=any(_looks_around(node) for _, node in walk(tree)),
    )


def _looks_around(node: Message) -> bool:
    """Whether the node is a call that may read the catalog, the clock, or whatever a policy allowed."""
    if isinstance(node, pb.FuncCall):
        *schema, name = strings(node.funcname)
        return schema not in ([], ["pg_catalog"]) or name not in _SETTLED
    return isinstance(node, pb.SQLValueFunction)


_CLOCK = {"age", "now", "statement_timestamp", "transaction_timestamp"}
_SETTLED = (FUNCTIONS | AGGREGATES | WINDOWS) - CATALOG - _CLOCK


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
