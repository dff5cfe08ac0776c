"""The one door to PostgreSQL's own parser (postgast): text in; parse trees, places, names and types out.

`sql`, `defaults` and `allowlist` stand on it. Everything here is offline, so it knows the types that are built in by
their names, and takes every other type as it is written: with its schema.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from google.protobuf.message import DecodeError
from postgast import PgQueryError, parse, scan, walk
from postgast import pg_query_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

MAX_TOKENS = 20_000
"""What is parsed at all: postgast checks no stack, and an expression of 200,000 words ends the process."""

BUILTIN_TYPES = frozenset(
    """
    aclitem any anyarray anycompatible anycompatiblearray anycompatiblemultirange anycompatiblenonarray
    anycompatiblerange anyelement anyenum anymultirange anynonarray anyrange bit bool box bpchar bytea char cid cidr
    circle cstring date datemultirange daterange event_trigger fdw_handler float4 float8 gtsvector index_am_handler
    inet int2 int2vector int4 int4multirange int4range int8 int8multirange int8range internal interval json jsonb
    jsonpath language_handler line lseg macaddr macaddr8 money name numeric nummultirange numrange oid oidvector path
    pg_brin_bloom_summary pg_brin_minmax_multi_summary pg_ddl_command pg_dependencies pg_lsn pg_mcv_list pg_ndistinct
    pg_node_tree pg_snapshot point polygon record refcursor regclass regcollation regconfig regdictionary regnamespace
    regoper regoperator regproc regprocedure regrole regtype table_am_handler text tid time timestamp timestamptz
    timetz trigger tsm_handler tsmultirange tsquery tsrange tstzmultirange tstzrange tsvector txid_snapshot unknown
    uuid varbit varchar void xid xid8 xml
    """.split()
)
"""pg_type.typname in pg_catalog, the same on 14 to 18, without arrays and the row types of catalogs."""

SQL_NAMES = {
    "bit": "bit",
    "bool": "boolean",
    "bpchar": "character",
    "char": '"char"',
    "float4": "real",
    "float8": "double precision",
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
    "interval": "interval",
    "json": "json",
    "numeric": "numeric",
    "time": "time without time zone",
    "timestamp": "timestamp without time zone",
    "timestamptz": "timestamp with time zone",
    "timetz": "time with time zone",
    "varbit": "bit varying",
    "varchar": "character varying",
}
"""The names that format_type() prints for types that the SQL standard names; every other one is quoted if need be."""


class Trouble(NamedTuple):
    """One thing wrong in a text. Line and column count from 1 within that text; None where they are not known."""

    line: int | None
    column: int | None
    message: str


class Statement(NamedTuple):
    """One statement of a text: its tree, and where its first word stands (in bytes from 0)."""

    node: pb.Node
    start: int


class UnknownType(Exception):
    """A type name that means nothing without a database. `location` counts bytes from 0, -1 when unknown."""

    def __init__(self, location: int, message: str) -> None:
        """`message` is one sentence that says what to write instead."""
        super().__init__(message)
        self.location = location
        self.message = message


def at(text: str, location: int | None, message: str) -> Trouble:
    """A Trouble at byte `location` (from 0) of `text`; None or a negative one means that the place is not known."""
    if location is None or location < 0:
        return Trouble(None, None, message)
    return _at(text, len(text.encode()[:location].decode(errors="ignore")), message)


def _at(text: str, index: int, message: str) -> Trouble:
    before = text[:index]
    return Trouble(before.count("\n") + 1, index - before.rfind("\n"), message)


def _refused(text: str, error: PgQueryError) -> Trouble:
    """What the parser said. Its places count characters, unlike those in trees and tokens."""
    place = error.cursorpos - 1
    return _at(text, place, error.message) if place >= 0 else Trouble(None, None, error.message)


def tokens_of(text: str) -> tuple[list[pb.ScanToken], list[Trouble]]:
    """The words of `text` without comments, or what PostgreSQL's scanner says against it."""
    if "\x00" in text:
        # The C library stops reading there: what comes after would be checked by nobody.
        return [], [_at(text, text.index("\x00"), "a NUL character is not allowed in SQL")]
    try:
        found = scan(text)
    except UnicodeEncodeError:
        return [], [Trouble(None, None, "the text is not valid Unicode")]
    except PgQueryError as error:
        return [], [_refused(text, error)]
    comments = (pb.Token.SQL_COMMENT, pb.Token.C_COMMENT)
    return [token for token in found.tokens if token.token not in comments], []


def statements_of(text: str) -> tuple[list[Statement], list[Trouble]]:
    """The statements of `text`, or what PostgreSQL's parser says against it."""
    tokens, troubles = tokens_of(text)
    if troubles:
        return [], troubles
    if len(tokens) > MAX_TOKENS:
        return [], [at(text, tokens[MAX_TOKENS].start, f"the text has more than {MAX_TOKENS:,} words")]
    try:
        tree = parse(text)
    except PgQueryError as error:
        return [], [_refused(text, error)]
    except DecodeError:
        return [], [Trouble(None, None, "the statement is nested too deeply to be checked")]
    starts = [next(token.start for token in tokens if token.start >= raw.stmt_location) for raw in tree.stmts]
    return [Statement(raw.stmt, start) for raw, start in zip(tree.stmts, starts, strict=True)], []


def statement_end(text: str) -> Trouble | None:
    """What is wrong with the end of `text` when something is to be put behind it: a semicolon, or a comment."""
    last = scan(text).tokens[-1]
    if last.token == pb.Token.ASCII_59:
        return at(text, last.start, "leave the semicolon out")
    if last.token == pb.Token.SQL_COMMENT:
        return at(text, last.start, "a comment may not be the last thing here")
    return None


def one_statement(text: str) -> list[Trouble]:
    """What is wrong with `text` as exactly one statement, by its parse tree. Nothing wrong: an empty list."""
    return single(text)[1]


def single(text: str) -> tuple[Statement | None, list[Trouble]]:
    """The only statement of `text`, or what is wrong."""
    statements, troubles = statements_of(text)
    if not troubles and not statements:
        troubles = [Trouble(1, 1, "there is no statement here")]
    if len(statements) > 1:
        message = f"exactly one statement is allowed here, this is the second of {len(statements)}"
        troubles = [at(text, statements[1].start, message)]
    return (None, troubles) if troubles else (statements[0], [])


class Write(NamedTuple):
    """A table that a statement writes to, as `schema.table`, how, and for INSERT the columns that it names."""

    verb: Literal["INSERT", "UPDATE", "DELETE"]
    table: str
    columns: tuple[str, ...] = ()


def writes(text: str) -> tuple[Write, ...]:
    """What the statements of `text` write to, by their parse trees. A table without its schema is left out."""
    found: list[Write] = []
    for statement in statements_of(text)[0]:
        for _, node in walk(statement.node):
            if not isinstance(node, pb.InsertStmt | pb.UpdateStmt | pb.DeleteStmt) or not node.relation.schemaname:
                continue
            table = f"{quote_ident(node.relation.schemaname)}.{quote_ident(node.relation.relname)}"
            match node:
                case pb.InsertStmt():
                    found.append(Write("INSERT", table, tuple(column.res_target.name for column in node.cols)))
                    if node.HasField("on_conflict_clause") and node.on_conflict_clause.target_list:
                        found.append(Write("UPDATE", table))
                case pb.UpdateStmt():
                    found.append(Write("UPDATE", table))
                case _:
                    found.append(Write("DELETE", table))
    return tuple(found)


def expression_of(text: str) -> tuple[pb.Node | None, list[Trouble]]:
    """The tree of `text` as one scalar expression, or what is wrong. Places count within `text`.

    The expression is read as the only column of a SELECT; anything that makes it more than that is refused.
    """
    prefix = "SELECT "
    statement, troubles = single(prefix + text)
    if statement is None:
        return None, [shifted(trouble, len(prefix)) for trouble in troubles]
    select = statement.node.select_stmt
    fields = [field.name for field, _ in select.ListFields() if field.name not in ("limit_option", "op")]
    if fields != ["target_list"] or len(select.target_list) != 1 or tokens_of(text)[0][0].token == pb.Token.ALL:
        return None, [Trouble(1, 1, "exactly one expression is allowed here")]
    target = select.target_list[0].res_target
    if target.name:
        return None, [Trouble(1, 1, "an expression has no name of its own")]
    return target.val, []


def shifted(trouble: Trouble, columns: int) -> Trouble:
    """The same trouble after `columns` characters were taken away from the front of the first line."""
    if trouble.line != 1 or trouble.column is None:
        return trouble
    return trouble._replace(column=max(1, trouble.column - columns))


def location_of(node: Message) -> int:
    """Where the text of `node` begins, in bytes from 0; -1 when the tree does not say."""
    places = (getattr(inner, "location", -1) for _, inner in walk(node))
    return min((place for place in places if place >= 0), default=-1)


def strings(nodes: Iterable[pb.Node]) -> tuple[str, ...]:
    """The parts of a dotted name."""
    return tuple(node.string.sval for node in nodes)


@lru_cache(maxsize=4096)
def quote_ident(name: str) -> str:
    """`name` as PostgreSQL's quote_identifier() prints it: quoted when it is a keyword that is not unreserved.

    The keywords are those of PostgreSQL 18 (kwlist.h), so names that became keywords later than the server's version
    are quoted here and not there: compare what this function made on both sides.
    """
    plain = name.isascii() and name.replace("_", "a").isalnum() and name == name.lower() and not name[0].isdigit()
    if plain and scan(name).tokens[0].keyword_kind in (pb.NO_KEYWORD, pb.UNRESERVED_KEYWORD):
        return name
    return '"' + name.replace('"', '""') + '"'


def type_name(node: pb.TypeName) -> str:
    """A type as format_type(oid, NULL) prints it when search_path is empty. Raises UnknownType.

    Routines keep no length or precision of their arguments, so those are dropped: varchar(10) is `character varying`.
    """
    names = strings(node.names)
    written = ".".join(quote_ident(name) for name in names)
    if node.pct_type:
        message = f"{written}%TYPE would be looked up when the statement runs; write the type itself"
        raise UnknownType(node.location, message)
    suffix = "[]" if node.array_bounds else ""
    if len(names) == 2 and names[0] != "pg_catalog":
        return written + suffix
    name = names[-1]
    if name.startswith("_") and name[1:] in BUILTIN_TYPES:
        name, suffix = name[1:], "[]"
    if len(names) == 1 and name not in BUILTIN_TYPES:
        raise UnknownType(node.location, f"type {written} is not built in; write it with its schema: schema.{written}")
    if len(names) > 2 or name not in BUILTIN_TYPES:
        raise UnknownType(node.location, f"there is no built-in type {written}")
    return SQL_NAMES.get(name, quote_ident(name)) + suffix
