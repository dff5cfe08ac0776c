"""Beside the flow: values worth trying in a column, from the constants of a condition and from the column's type.

Pure. What comes out are guesses: the server decides which of them a column takes and which of them turn a condition.
"""

from __future__ import annotations

import json
import re
import string
from itertools import chain, islice, product
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from postgast import pg_query_pb2 as pb
from postgast import walk
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from google.protobuf.message import Message
    from psycopg.sql import Composable

_T = TypeVar("_T")

ENOUGH = 48
"""How many values are tried in one column."""


class Column(NamedTuple):
    """A column as the catalog describes it. `category`, `element`: pg_type.typcategory of its type and its elements."""

    name: str
    type: str
    category: str
    element: str
    not_null: bool
    default: str | None
    """The expression; None where there is none, or where it would advance a sequence."""
    generated: str | None
    labels: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ constants


class Constants(NamedTuple):
    """What a condition says: texts to try in each column that it compares, and all texts in their order.

    groups: for each column the texts of each comparison apart: a key and what is found there belong together.
    """

    columns: dict[str, tuple[str, ...]]
    every: tuple[str, ...]
    groups: dict[str, tuple[tuple[str, ...], ...]] = {}


_LIKE = (pb.AEXPR_LIKE, pb.AEXPR_ILIKE)
_LIKE_NAMES = {"~~", "!~~", "~~*", "!~~*", "like", "notlike"}
_REGEX_NAMES = {"~", "~*", "!~", "!~*", "similar_escape", "similar_to_escape"}


def constants_of(tree: Message) -> Constants:
    """The constants of a tree by the columns that stand in the same comparison or call; patterns become texts."""
    holders = [node for _, node in walk(tree) if isinstance(node, pb.A_Expr | pb.FuncCall | pb.SubLink)]
    samples: dict[int, Callable[[str], list[str]]] = {}
    for holder in holders:
        if make := _pattern(holder):
            samples |= {node.location: make for _, node in walk(holder) if isinstance(node, pb.A_Const)}

    def texts(node: Message) -> Iterator[str]:
        for _, inner in walk(node):
            if isinstance(inner, pb.A_Const) and (text := constant(inner)) is not None:
                yield from samples.get(inner.location, _plain)(text)

    columns: dict[str, dict[str, None]] = {}
    groups: dict[str, dict[tuple[str, ...], None]] = {}
    for holder in holders:
        found = dict.fromkeys(texts(holder))
        for name in _column_names(holder):
            columns.setdefault(name, {}).update(found)
            groups.setdefault(name, {})[tuple(found)] = None
    return Constants(
        {name: tuple(found) for name, found in columns.items()},
        tuple(dict.fromkeys(texts(tree))),
        {name: tuple(found) for name, found in groups.items()},
    )


def joined(parts: Iterable[Constants]) -> Constants:
    """The constants of several trees."""
    whole = list(parts)
    names = list(dict.fromkeys(name for part in whole for name in part.columns))
    return Constants(
        {name: _once(part.columns.get(name, ()) for part in whole) for name in names},
        _once(part.every for part in whole),
        {name: _once(part.groups.get(name, ()) for part in whole) for name in names},
    )


def _once(parts: Iterable[Iterable[_T]]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(parts)))


def mentioned(tree: Message, *, shown: bool) -> set[str]:
    """The names of the columns that a tree speaks of. shown: those that it merely selects count too."""
    names = set(_column_names(tree))
    if shown:
        return names
    selected = [target for _, node in walk(tree) if isinstance(node, pb.SelectStmt) for target in node.target_list]
    bare = [target.res_target.val for target in selected if target.res_target.val.HasField("column_ref")]
    places = {node.column_ref.location for node in bare}
    return {
        node.fields[-1].string.sval
        for _, node in walk(tree)
        if isinstance(node, pb.ColumnRef) and node.location not in places and node.fields[-1].HasField("string")
    }


def _column_names(tree: Message) -> Iterator[str]:
    for _, node in walk(tree):
        if isinstance(node, pb.ColumnRef) and node.fields[-1].HasField("string"):
            yield node.fields[-1].string.sval


def constant(node: pb.A_Const) -> str | None:
    """A constant as text; None for NULL and for bit strings."""
    match node.WhichOneof("val"):
        case "ival":
            return str(node.ival.ival)
        case "fval":
            return node.fval.fval
        case "boolval":
            return "true" if node.boolval.boolval else "false"
        case "sval":
            return node.sval.sval
        case _:
            return None


def _pattern(node: Message) -> Callable[[str], list[str]] | None:
    """How the constants of this node are read, when they are patterns."""
    if isinstance(node, pb.A_Expr):
        name = node.name[-1].string.sval if node.name else ""
        if node.kind in _LIKE or name in _LIKE_NAMES:
            return like
        return matching if name in _REGEX_NAMES or node.kind == pb.AEXPR_SIMILAR else None
    if isinstance(node, pb.FuncCall) and node.funcname[-1].string.sval.startswith("regexp_"):
        return matching
    return None


def _plain(text: str) -> list[str]:
    """The text, and the elements of what reads like an array."""
    inner = re.fullmatch(r"\{(.*)\}", text)
    elements = [part.strip().strip('"') for part in inner[1].split(",")] if inner else []
    return [*(element for element in elements if element and ":" not in element), text]


# ------------------------------------------------------------------------------------------------------------- patterns


def like(pattern: str) -> list[str]:
    """Texts that a LIKE pattern matches, the pattern last."""
    parts: list[str] = re.findall(r"\\.|%|_|[^\\%_]+", pattern, re.DOTALL)

    def filled(many: str) -> str:
        wild = {"%": many, "_": "x"}
        return "".join(wild[part] if part in wild else part.removeprefix("\\") for part in parts)

    return list(dict.fromkeys([filled(""), filled("x"), pattern]))


_CHARACTERS = "ax0A_- .@:/é"
_CLASSES = {
    "alpha": string.ascii_letters + "é",
    "digit": string.digits,
    "alnum": string.ascii_letters + "é" + string.digits,
    "upper": string.ascii_uppercase,
    "lower": string.ascii_lowercase + "é",
    "space": string.whitespace,
    "blank": " \t",
    "punct": string.punctuation,
    "xdigit": string.hexdigits,
    "word": string.ascii_letters + "é" + string.digits + "_",
}
_ESCAPES = {"d": "digit", "w": "word", "s": "space"}
_VARIANTS = 8
_LONGEST = 10_000


def matching(pattern: str) -> list[str]:
    """Texts that a regular expression should match, simplest first; empty when it cannot be read."""
    try:
        reader = _Regex(pattern)
        found = reader.branches()
    except IndexError:
        return []
    return found if reader.place == len(pattern) else []


class _Regex:
    """Reads a pattern once and gives a few texts for each part. Raises IndexError where it ends too early."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.place = 0

    def peek(self) -> str:
        return self.pattern[self.place : self.place + 1]

    def take(self, count: int = 1) -> str:
        taken = self.pattern[self.place : self.place + count]
        if len(taken) < count:
            raise IndexError
        self.place += count
        return taken

    def branches(self) -> list[str]:
        """`a|b`."""
        found = [self.sequence()]
        while self.peek() == "|":
            self.take()
            found.append(self.sequence())
        # One of each branch first.
        mixed = (text for row in _uneven(found) for text in row)
        return list(islice(dict.fromkeys(mixed), _VARIANTS))

    def sequence(self) -> list[str]:
        """`ab*c?`."""
        texts = [""]
        while self.peek() not in {"", "|", ")"}:
            part = self.quantified(self.atom())
            texts = list(islice(dict.fromkeys(a + b for b, a in product(part, texts)), _VARIANTS))
        return texts

    def quantified(self, one: list[str]) -> list[str]:
        """`x`, `x?`, `x*`, `x+`, `x{2,3}`, greedy or not."""
        mark = self.peek()
        if mark and mark in "?*+":
            self.take()
            one = one if mark == "+" else ["", *one]
        elif bounds := re.compile(r"\{(\d+)(,\d*)?\}").match(self.pattern, self.place):
            self.take(len(bounds[0]))
            if max(map(len, one)) * int(bounds[1]) > _LONGEST:
                raise IndexError
            one = [text * int(bounds[1]) for text in one]
        else:
            return one
        if self.peek() == "?":
            self.take()
        return one

    def atom(self) -> list[str]:
        """A character, a class, a group or an anchor."""
        char = self.take()
        if char in "^$":
            return [""]
        if char == ".":
            return ["x"]
        if char == "[":
            return self.bracket()
        if char == "\\":
            return self.escape()
        if char != "(":
            return [char]
        looking = re.compile(r"\?(<?[=!])").match(self.pattern, self.place)
        if self.pattern.startswith("?:", self.place):
            self.take(2)
        elif looking:
            self.take(len(looking[0]))
        found = self.branches()
        self.take()
        return [""] if looking else found

    def escape(self) -> list[str]:
        """A class, a word boundary, or the character itself."""
        char = self.take()
        if char.lower() in _ESCAPES:
            members = _CLASSES[_ESCAPES[char.lower()]]
            return [members[0]] if char.islower() else [_outside(members)]
        return [""] if char in "mMyYAZ123456789" else [{"t": "\t", "n": "\n"}.get(char, char)]

    def bracket(self) -> list[str]:
        """`[a-z_]`, `[^[:alpha:]]`: the first member, or a character that is none."""
        negated = self.peek() == "^"
        if negated:
            self.take()
        members = ""
        while self.peek() != "]" or not members:
            if named := re.compile(r"\[:(\w+):\]").match(self.pattern, self.place):
                self.take(len(named[0]))
                members += _CLASSES.get(named[1], "")
                continue
            first = self.take()
            if first == "\\":
                first = self.escape()[0]
            if self.peek() == "-" and self.pattern[self.place + 1 : self.place + 2] not in {"]", ""}:
                self.take()
                members += "".join(map(chr, range(ord(first), ord(self.take()) + 1)))
            else:
                members += first
        self.take()
        return [_outside(members)] if negated else [members[0]]


def _outside(members: str) -> str:
    return next((char for char in _CHARACTERS if char not in members), "~")


def _uneven(rows: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    for number in range(max(map(len, rows))):
        yield [row[number] for row in rows if number < len(row)]


# --------------------------------------------------------------------------------------------------------------- values


def fresh(column: Column, number: int) -> str | None:
    """A text that nobody else uses, another one for each number from 0; None for types that have too few values."""
    match column.category, column.type:
        case _, "uuid":
            return f"00000000-0000-4000-8000-{number:012x}"
        case "N", kind:
            return str((30_000 if kind == "smallint" else 900_000_000) + number)
        case "S", _:
            return f"v{number}"
        case "D", kind if not kind.startswith("time "):
            return f"{2001 + number // 336}-{1 + number // 28 % 12:02}-{1 + number % 28:02}"
        case _:
            return None


def guesses(column: Column, texts: Sequence[str], groups: Sequence[Sequence[str]] = ()) -> list[Composable]:
    """What to try in a column that is compared with these texts: expressions without type, the likeliest first.

    groups: as in Constants.
    """
    own = [sql.Literal(text) for text in (fresh(column, 0), fresh(column, 1)) if text is not None]
    match column.category:
        case "B":
            found: Iterable[Composable] = _literals(["true", "false"])
        case "E":
            found = _literals([*(text for text in texts if text in column.labels), *column.labels])
        case "S":
            found = chain(_literals(texts), own[:1], _literals(_edges(texts)), own[1:])
        case "N":
            found = chain(_numbers(column, texts), own)
        case "D":
            found = chain(_moments(texts), own)
        case "T":
            found = _literals([*texts, "0", "1 day", "-1 day", "1000 days"])
        case "A":
            found = _literals(_arrays(column, texts))
        case _ if column.type in {"json", "jsonb"}:
            found = _literals(_documents(texts, groups))
        case _:
            hosts = [text.partition("/")[0] for text in texts if "/" in text]
            found = chain(_literals([*texts, *hosts]), own, _literals(["", "0", "1", "x", "empty", "(,)", "{}", "::1"]))
    unique: dict[str, Composable] = {}
    for one in found:
        unique.setdefault(one.as_string(None), one)
    return list(islice(unique.values(), ENOUGH))


def _literals(texts: Iterable[str]) -> Iterator[Composable]:
    return (sql.Literal(text) for text in texts)


def _number(text: str) -> str | None:
    return text if re.fullmatch(r"[+-]?\d{1,30}(\.\d{0,30})?", text) else None


def _edges(texts: Sequence[str]) -> Iterator[str]:
    """Blank, other cases, longer ones, glued ones, and texts of the lengths that are named."""
    yield from ("", " ", "Ab")
    few = texts[:4]
    yield from (f"{text}x" for text in texts[:8])
    yield from (change(text) for text in few for change in (str.upper, str.lower) if change(text) != text)
    yield from (a + b for a in few for b in few if a != b)
    for text in texts:
        if re.fullmatch(r"\d{1,4}", text):
            yield from ("x" * int(text), "x" * (int(text) + 1))


def _numbers(column: Column, texts: Sequence[str]) -> Iterator[Composable]:
    numbers = [text for text in texts if _number(text)]
    yield from _literals(numbers)
    for text in numbers:
        for step in ("1", "-1", "0.5", "-0.5"):
            yield sql.SQL("({}::pg_catalog.numeric + {}::pg_catalog.numeric)::pg_catalog.text").format(
                sql.Literal(text), sql.Literal(step)
            )
    yield from _literals(["0", "1", "-1", "1000000"])
    if column.type == "oid":
        for text in texts:
            for kind in ("regclass", "regnamespace", "regrole"):
                cast = sql.Identifier("pg_catalog", kind)
                yield sql.SQL("{}::{}::pg_catalog.oid::pg_catalog.text").format(sql.Literal(text), cast)
    yield from _literals(["NaN"])


def _moments(texts: Sequence[str]) -> Iterator[Composable]:
    yield from _literals(text for text in texts if not _number(text))
    for text in texts:
        span = sql.SQL("{}::pg_catalog.interval").format(sql.Literal(f"{text} seconds" if _number(text) else text))
        for factor in ("2", "-2", "0.5", "-0.5"):
            yield sql.SQL("(pg_catalog.now() + {} * {})::pg_catalog.text").format(span, sql.Literal(float(factor)))
    for text in texts:
        if not _number(text):
            for step in ("1 day", "-1 day"):
                yield sql.SQL("({}::pg_catalog.timestamptz + {}::pg_catalog.interval)::pg_catalog.text").format(
                    sql.Literal(text), sql.Literal(step)
                )
    yield from _literals(["2000-01-01", "2100-01-01", "now", "infinity", "-infinity", "12:00"])


def _arrays(column: Column, texts: Sequence[str]) -> Iterator[str]:
    def array(elements: Sequence[str]) -> str:
        return "{" + ",".join(json.dumps(element, ensure_ascii=False) for element in elements) + "}"

    yield from (array([text]) for text in texts)
    yield "{}"
    if texts:
        yield array(texts)
    if (own := fresh(column._replace(category=column.element, type=column.type.removesuffix("[]")), 0)) is not None:
        yield array([own])
    yield "{NULL}"
    lengths = [int(text) for text in texts if re.fullmatch(r"\d{1,3}", text)]
    yield from (array(["1"] * length) for number in lengths for length in (number, number + 1))
    yield "0"  # int2vector, oidvector


def _documents(texts: Sequence[str], groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """JSON: what the comparisons together speak of; each text as a document, as a key and as a value below a key."""
    plain = ["null", '"x"', "0", "-1", "1000000", "true", "[]", "{}"]
    documents = [text for text in texts if _document(text)]
    near = [str(int(text) + step) for text in documents if re.fullmatch(r"-?\d{1,15}", text) for step in (1, -1)]
    keys = [text for text in texts if not _document(text) and not re.fullmatch(r"\{.*\}|\$.*", text)]
    values = [*documents, *near, *(json.dumps(key, ensure_ascii=False) for key in keys), *plain]
    yield from ("{}", *documents)
    told = {json.dumps(group[0], ensure_ascii=False): list(_told(group[1:])) for group in groups if len(group) > 1}
    for number in range(3 if len(told) > 1 else 0):
        yield "{" + ", ".join(f"{name}: {some[min(number, len(some) - 1)]}" for name, some in told.items()) + "}"
    named = [json.dumps(key, ensure_ascii=False) for key in keys[:6]]
    for value in values[:10]:
        yield from (f"{{{name}: {value}}}" for name in named)
        if len(named) > 1:
            yield "{" + ", ".join(f"{name}: {value}" for name in named) + "}"
    nested = [(a, b, value) for a in named[:3] for b in named[:3] if a != b for value in values[:4]]
    yield from (f"{{{a}: {{{b}: {value}}}}}" for a, b, value in nested)
    yield from (f"[{value}]" for value in values[:4])
    yield from plain


def _told(texts: Sequence[str]) -> Iterator[str]:
    """A value below a key: the first text, and numbers beside it."""
    for text in texts[:1]:
        if re.fullmatch(r"-?\d{1,15}", text):
            yield from (text, str(int(text) + 1), str(int(text) - 1))
        else:
            yield text if _document(text) else json.dumps(text, ensure_ascii=False)


def _document(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
