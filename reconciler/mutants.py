"""Beside the flow: a routine's text -> the same routine with one fault in it, for every fault at every place. Pure.

`rehearsal` installs each on a scratch database and asks whether a proof notices. A fault is planted in PostgreSQL's own
parse tree and written back by its own deparser, so a mutant is always one that a person could have written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from postgast import PgQueryError, deparse, parse, parse_plpgsql
from postgast import pg_query_pb2 as pb

from reconciler.model import Model
from reconciler.sql import body_of
from reconciler.syntax import location_of, single, strings, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


class Mutant(Model):
    """One fault. `id` stays the same while the mutated expression does; `line` counts in the routine's file."""

    id: str
    routine: str
    mutator: str
    line: int
    before: str
    after: str
    text: str
    """The complete CREATE OR REPLACE statement."""


MUTATORS: dict[str, str] = {
    "condition": "a condition of IF, ELSIF, CASE, WHILE, EXIT or CONTINUE taken for false, for true, or inverted",
    "comparison": "a comparison turned or moved by one step: = <> < <= > >=, LIKE, IN, BETWEEN, IS DISTINCT FROM",
    "logic": "AND and OR exchanged, NOT left out, IS NULL turned",
    "filter": "a condition of WHERE, HAVING, FILTER or ON left out, one by one and as a whole",
    "constant": "a text, number or truth value changed, default values of arguments included",
    "arithmetic": "an arithmetic operator exchanged; the sides of || exchanged",
    "fallback": "COALESCE without its first or its last value, GREATEST and LEAST exchanged or cut",
    "normalisation": "btrim, lower, upper and the like left out; the clock taken for the beginning of the transaction",
    "lock": "FOR UPDATE left out, SKIP LOCKED turned into waiting",
    "order": "the direction of ORDER BY turned, one of its keys left out",
    "limit": "LIMIT or OFFSET left out, DISTINCT left out",
    "column": "one column of an UPDATE's SET left out, or set to NULL",
    "statement": "an INSERT, UPDATE, DELETE, PERFORM, CALL or assignment left out",
    "conflict": "ON CONFLICT left out",
    "null": "a value that is returned, inserted or passed on replaced by NULL",
    "security": "SECURITY DEFINER dropped",
}
"""Every kind of fault that is planted, with what it does."""


@dataclass(frozen=True)
class Piece:
    """One SQL text inside a routine that can be parsed alone.

    start, end: where it stands in the body, in bytes. role: what it is to the statement around it. wrap: what must
    stand before it to make it a statement. lead: what stands before it in the body, as `target` := does. into: the INTO
    clause that PL/pgSQL takes out of it.
    """

    text: str
    start: int
    end: int
    role: str
    wrap: str = ""
    lead: str = ""
    into: str = ""
    target: str = ""


def mutants(routine: str, text: str) -> tuple[Mutant, ...]:
    """Every mutant of a routine. routine: its identity. text: the one CREATE FUNCTION or PROCEDURE statement.

    Raises ValueError with a sentence when its body is in a language, or uses a type, that cannot be parsed offline.
    """
    statement, troubles = single(text)
    if statement is None or not statement.node.HasField("create_function_stmt"):
        raise ValueError(troubles[0].message if troubles else "it is no CREATE FUNCTION or PROCEDURE")
    tree = statement.node.create_function_stmt
    options = {node.def_elem.defname: node.def_elem for node in tree.options}
    if "as" not in options:
        raise ValueError("its body is not a text (BEGIN ATOMIC)")
    body = body_of(text, options["as"])
    raw = text.encode()
    language = options["language"].arg.string.sval if "language" in options else "sql"
    first_line = raw.count(b"\n", 0, body.start) + 1
    drafts: list[_Draft] = []
    for piece in _pieces(text, body.text, language):
        inner = body.text.encode()
        line = first_line + inner.count(b"\n", 0, piece.start)
        for fault in _of_piece(piece):
            changed = (inner[: piece.start] + fault.written.encode() + inner[piece.end :]).decode()
            quoted = _dollar_quoted(changed)
            whole = raw[: body.token[0]].decode() + quoted + raw[body.token[1] :].decode()
            drafts.append(_Draft(fault.mutator, line + fault.below, fault.before, fault.after, piece.text, whole))
    drafts += _of_header(tree, raw)
    return _numbered(routine, drafts, statement.start)


class _Draft(NamedTuple):
    mutator: str
    line: int
    before: str
    after: str
    context: str
    text: str


def _numbered(routine: str, drafts: Iterable[_Draft], start: int) -> tuple[Mutant, ...]:
    """Drafts with names that do not depend on what stands elsewhere in the file; equal texts only once.

    start: where the statement begins, in bytes.
    """
    seen: set[str] = set()
    twins: Counter[str] = Counter()
    found: list[Mutant] = []
    for draft in drafts:
        if draft.text in seen:
            continue
        seen.add(draft.text)
        facts = json.dumps([routine, draft.mutator, draft.context, draft.before, draft.after])
        twins[facts] += 1
        name = hashlib.sha256(f"{facts}{twins[facts]}".encode()).hexdigest()[:10]
        found.append(
            Mutant(
                id=name,
                routine=routine,
                mutator=draft.mutator,
                line=draft.line,
                before=draft.before,
                after=draft.after,
                text=_or_replace(draft.text, start),
            )
        )
    return tuple(found)


def _or_replace(text: str, start: int) -> str:
    """The statement as one that replaces; owner, grants and comment of the routine stay as they are."""
    statement = text.encode()[start:].decode()
    return re.sub(r"(?i)^CREATE\b(\s+OR\s+REPLACE\b)?", "CREATE OR REPLACE", statement)


def _dollar_quoted(body: str) -> str:
    tag = "$mutant$"
    while tag in body:
        tag = f"${tag[1:-1]}x$"
    return f"{tag}{body}{tag}"


# ------------------------------------------------------------------------------------------------- where the faults go


def _pieces(text: str, body: str, language: str) -> list[Piece]:
    """The parts of the body that are SQL. Raises ValueError when it cannot be parsed."""
    if language == "sql":
        try:
            tree = parse(body)
        except PgQueryError as error:
            raise ValueError(error.message) from error
        inner = body.encode()
        found: list[Piece] = []
        for each in tree.stmts:
            end = each.stmt_location + each.stmt_len if each.stmt_len else len(inner)
            lead = len(inner[each.stmt_location : end]) - len(inner[each.stmt_location : end].lstrip())
            found.append(Piece(inner[each.stmt_location + lead : end].decode(), each.stmt_location + lead, end, "sql"))
        return found
    if language != "plpgsql":
        raise ValueError(f"its language is {language}; SQL and PL/pgSQL can be parsed")
    return _plpgsql_pieces(_described(text), body)


def _described(text: str) -> Any:  # noqa: ANN401 - JSON of libpg_query
    """libpg_query's description of a PL/pgSQL routine, as JSON. Raises ValueError.

    postgast 0.2 writes broken JSON for the variables that PostgreSQL fills in for a trigger (`,{}},`): that is mended.
    """
    try:
        return parse_plpgsql(text)
    except PgQueryError as error:
        raise ValueError(error.message) from error
    except json.JSONDecodeError as error:
        variables, action, statements = error.doc.partition('"action":{')
        return json.loads(re.sub(r"(?<=[\[,])\{\}\},", "{},", variables) + action + statements)


class _Found(NamedTuple):
    """A SQL text in libpg_query's description: under which key, of which statement, from which line on."""

    query: str
    mode: int
    key: str
    owner: str
    line: int
    into: bool


def _texts(node: Any, around: _Found) -> Iterator[_Found]:  # noqa: ANN401 - JSON of libpg_query
    """Every text below, with what is known from the nodes `around` it."""
    if isinstance(node, list):
        for inner in cast("list[Any]", node):
            yield from _texts(inner, around)
    if not isinstance(node, dict):
        return
    for name, inner in cast("dict[str, Any]", node).items():
        if name == "PLpgSQL_expr":
            yield around._replace(query=inner["query"], mode=inner["parseMode"])
        elif name.startswith("PLpgSQL_") and isinstance(inner, dict):
            fields = cast("dict[str, Any]", inner)
            line, into = int(fields.get("lineno", around.line)), bool(fields.get("into"))
            below = around._replace(owner=name.removeprefix("PLpgSQL_"), line=line, into=into)
            if below.owner in RETURNS and "expr" not in fields and "lineno" in fields:
                yield below._replace(query="", mode=EXPRESSION)
            yield from _texts(fields, below)
        else:
            yield from _texts(inner, around._replace(key=name))


RETURNS = {"stmt_return": (b"RETURN",), "stmt_return_next": (b"RETURN", b"NEXT")}
"""Statements that return a variable, which is no SQL text to PL/pgSQL, or nothing; with their words."""

EXPRESSION = 2
"""parseMode of an expression: RAW_PARSE_PLPGSQL_EXPR of PostgreSQL's parser.h."""

ASSIGNMENTS = range(3, 6)
"""parseMode of `target := expression`: RAW_PARSE_PLPGSQL_ASSIGN1 to 3 of PostgreSQL's parser.h."""


def _plpgsql_pieces(description: Any, body: str) -> list[Piece]:  # noqa: ANN401
    """Every SQL text with its place in the body: the first one from its statement's line on that nobody took yet."""
    inner = body.encode()
    lines = [0, *(match.end() for match in re.finditer(rb"\n", inner))]
    source = _Source(inner, [(word.start, word.end) for word in tokens_of(body)[0]])
    found: list[Piece] = []
    for each in _texts(description, _Found("", 0, "", "", 1, into=False)):
        first = lines[min(each.line, len(lines)) - 1]
        place = source.variable(first, RETURNS[each.owner]) if not each.query else source.take(first, each)
        if place is None:
            if not each.query:
                continue  # it returns nothing
            raise ValueError(f"line {each.line} of its body: {each.query[:60]!r} was not found in the text")
        found.append(_piece(each, inner, *place))
    return sorted(found, key=lambda piece: piece.start)


class _Source:
    """The body of a routine, and which of its words are not part of a text that has its place."""

    def __init__(self, inner: bytes, words: Sequence[tuple[int, int]]) -> None:
        """words: from where to where each reaches, in bytes."""
        self.inner, self.words = inner, words
        self.free = {start for start, _ in words}

    def take(self, first: int, each: _Found) -> tuple[int, int] | None:
        """Where a text stands, from `first` on: whole words that are all free. They are not any more."""
        wanted = _as_written(each)
        for start, _ in self.words:
            end = start + len(wanted)
            if start >= first and _reads(self.inner[start:end], wanted, each):
                covered = [word for word in self.words if start <= word[0] < end]
                if all(word in self.free and stop <= end for word, stop in covered):
                    self.free -= {word for word, _ in covered}
                    return start, end
        return None

    def variable(self, first: int, keywords: Sequence[bytes]) -> tuple[int, int] | None:
        """Where the variable stands that the next RETURN returns; None when it returns nothing."""
        texts = [self.inner[start:end].upper() for start, end in self.words]
        for number, (start, _) in enumerate(self.words):
            behind = number + len(keywords)
            if start >= first and start in self.free and texts[number:behind] == list(keywords):
                last = texts.index(b";", behind) - 1
                covered = {word for word, _ in self.words[behind : last + 1]}
                if covered <= self.free and texts[behind] not in {b"NEXT", b"QUERY"}:
                    self.free -= {start, *covered}
                    return (self.words[behind][0], self.words[last][1]) if covered else None
        return None


def _as_written(each: _Found) -> bytes:
    """A text as it stands in the source, where PL/pgSQL changes more than it blanks out."""
    if each.owner == "stmt_perform":
        return b"PERFORM" + each.query.encode().removeprefix(b"SELECT")
    values = CASE_VALUES.fullmatch(each.query) if each.owner == "case_when" else None
    return (values[1] if values is not None else each.query).encode()


CASE_VALUES = re.compile(r'(?s)"__Case__Variable_\d+__" IN \((.*)\)')
"""What CASE x WHEN 1, 2 becomes: a comparison of a variable that nobody declared."""


def _reads(here: bytes, wanted: bytes, each: _Found) -> bool:
    """Does the source hold the text here? PL/pgSQL blanks INTO clauses out, place by place."""
    if each.owner == "stmt_perform":
        return here[:7].upper() == b"PERFORM" and here[7:] == wanted[7:]
    if not each.into:
        return here == wanted
    return (
        here[:1] == wanted[:1]
        and len(here) == len(wanted)
        and all(b in {a, BLANK} for a, b in zip(here, wanted, strict=True))
    )


BLANK = ord(" ")
"""What stands in a description where an INTO clause stood in the source."""


def _piece(each: _Found, inner: bytes, start: int, end: int) -> Piece:
    text = inner[start:end].decode()
    if each.owner == "stmt_perform":
        return Piece(text[7:], start, end, "perform", "SELECT", "PERFORM")
    if each.mode in ASSIGNMENTS:
        target, value = _sides(text)
        return Piece(value, start, end, "assign", "SELECT ", text.removesuffix(value), target=target)
    if each.mode == 0:
        if not each.into:
            return Piece(each.query, start, end, "statement")
        into = _into(inner[start:end], each.query.encode())
        if not into:
            # A clause at the end is cut off instead, and stands right behind.
            behind = inner.index(b";", end)
            into, end = inner[end:behind].decode().strip(), behind
        return Piece(each.query, start, end, "statement", into=into)
    role = "condition" if each.key == "cond" else each.key
    return Piece(text, start, end, role, "SELECT ")


def _sides(assignment: str) -> tuple[str, str]:
    """The target and the value of an assignment. In its brackets the target may hold an = too."""
    raw, depth = assignment.encode(), 0
    words = tokens_of(assignment)[0]
    for word, after in pairwise(words):
        said = raw[word.start : word.end]
        depth += (said in {b"[", b"("}) - (said in {b"]", b")"})
        if not depth and said in {b":=", b"="}:
            return raw[: word.start].decode().rstrip(), raw[after.start :].decode()
    raise ValueError(f"{assignment!r} assigns nothing")


def _into(written: bytes, without: bytes) -> str:
    """What was blanked out, from its first to its last differing byte; nothing when all of it was cut off."""
    differing = [place for place, (a, b) in enumerate(zip(written, without, strict=True)) if a != b]
    return written[differing[0] : differing[-1] + 1].decode() if differing else ""


# ------------------------------------------------------------------------------------------------- planting the faults


class _Fault(NamedTuple):
    """A fault in a piece: how many lines below its first one, what it was and is, the text to put into its place."""

    mutator: str
    below: int
    before: str
    after: str
    written: str


def _of_piece(piece: Piece) -> Iterator[_Fault]:
    """Every fault in one piece. Raises ValueError when the deparser would change more than the fault."""
    try:
        tree = parse(piece.wrap + piece.text)
        whole = _back(tree, piece)
    except PgQueryError as error:
        raise ValueError(f"{piece.text!r} cannot be parsed and written back: {error.message}") from error
    if _bare(parse(piece.wrap + whole)) != _bare(tree):
        raise ValueError(f"the deparser reads {piece.text!r} as something else")
    if piece.role == "condition":
        for turned in ("false", "true", f"NOT ({whole})"):
            yield _Fault("condition", 0, whole, turned, turned)
    for mutator, place, edit in _everywhere(tree):
        changed = pb.ParseResult()
        changed.CopyFrom(tree)
        edit(changed)
        try:
            text = _back(changed, piece)
            parse(piece.wrap + text)
        except PgQueryError:
            continue
        if text == whole or (piece.role == "condition" and text == "NULL"):
            continue  # a condition that is NULL is taken for false
        below = (piece.wrap + piece.text).encode()[: max(place, 0)].count(b"\n")
        written = piece.lead + text + (f" {piece.into}" if piece.into else "")
        yield _Fault(mutator, below, *_shortened(whole, text), written)
    yield from _left_out(piece, tree, whole)


def _left_out(piece: Piece, tree: pb.ParseResult, whole: str) -> Iterator[_Fault]:
    """The statement around the piece left out. A SELECT INTO stays: without it everything after is another routine."""
    kind = tree.stmts[0].stmt.WhichOneof("node")
    if piece.role == "perform" or (piece.role == "statement" and kind != "select_stmt" and not piece.into):
        yield _Fault("statement", 0, whole, "nothing", "NULL")
    elif piece.role == "sql" and kind != "select_stmt":
        yield _Fault("statement", 0, whole, "nothing", "")
    elif piece.role == "assign":
        yield _Fault("statement", 0, f"{piece.target} := {whole}", "nothing", f"{piece.lead}{piece.target}")


def _back(tree: pb.ParseResult, piece: Piece) -> str:
    return deparse(tree).removeprefix(piece.wrap)


def _bare(tree: Message) -> str:
    """A tree without the places where its parts stood in the text."""
    return re.sub(r"(?m)^\s*(location|stmt_location|stmt_len|(rexpr_)?list_(start|end)): -?\d+\n", "", str(tree))


def _shortened(before: str, after: str) -> tuple[str, str]:
    """The words that differ, with three of each side for orientation."""
    old, new = before.split(), after.split()
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    head, tail = max(0, head - 3), max(0, tail - 3)
    return " ".join(old[head : len(old) - tail]), " ".join(new[head : len(new) - tail])


Path = tuple[tuple[str, int | None], ...]


def _everywhere(tree: pb.ParseResult) -> Iterator[tuple[str, int, Callable[[pb.ParseResult], None]]]:
    """Every edit at every place of the tree, to be done on a copy of it; with the place in the text, in bytes."""
    for path, message, context in _places(tree, (), ()):
        for mutator, edit in _edits(message, context):

            def at_its_place(copy: pb.ParseResult, path: Path = path, edit: Callable[[Any], None] = edit) -> None:
                place: Any = copy
                for name, index in path:
                    place = getattr(place, name)
                    if index is not None:
                        place = place[index]
                edit(place)

            yield mutator, location_of(message), at_its_place


def _places(message: Message, path: Path, context: tuple[str, ...]) -> Iterator[tuple[Path, Message, tuple[str, ...]]]:
    """Every message below, with the way to it and the names of the fields on that way."""
    yield path, message, context
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if isinstance(value, Message):
            yield from _places(value, (*path, (field.name, None)), (*context, field.name))
        else:
            for index, one in enumerate(cast("Sequence[Message]", value)):
                yield from _places(one, (*path, (field.name, index)), (*context, field.name))


Edit = tuple[str, "Callable[[Any], None]"]


def _edits(message: Message, context: tuple[str, ...]) -> Iterator[Edit]:  # noqa: C901 - one case per kind of node
    match message:
        case pb.Node():
            yield from _node(message, context)
        case pb.A_Expr():
            yield from _operator(message)
        case pb.BoolExpr():
            yield from _logic(message, context)
        case pb.NullTest():
            turned = pb.IS_NOT_NULL if message.nulltesttype == pb.IS_NULL else pb.IS_NULL
            yield "logic", lambda node: setattr(node, "nulltesttype", turned)
        case pb.BooleanTest():
            turned = _TURNED_TESTS[message.booltesttype]
            yield "logic", lambda node: setattr(node, "booltesttype", turned)
        case pb.A_Const():
            if not _is_name(context):
                yield from _constant(message)
        case pb.MinMaxExpr():
            other = pb.IS_LEAST if message.op == pb.IS_GREATEST else pb.IS_GREATEST
            yield "fallback", lambda node: setattr(node, "op", other)
        case pb.SortBy():
            other = pb.SORTBY_ASC if message.sortby_dir == pb.SORTBY_DESC else pb.SORTBY_DESC
            yield "order", lambda node: setattr(node, "sortby_dir", other)
        case pb.CaseWhen():
            yield "condition", lambda node: node.expr.CopyFrom(_negated(node.expr))
        case pb.LockingClause() if message.wait_policy != pb.LockWaitBlock:
            yield "lock", lambda node: setattr(node, "wait_policy", pb.LockWaitBlock)
        case _:
            yield from _clauses(message)


def _is_name(context: tuple[str, ...]) -> bool:
    """Type modifiers are constants too, and no data."""
    return "typmods" in context


def _clauses(message: Message) -> Iterator[Edit]:
    """What can be left out of a statement or call."""
    names = {field.name for field, _ in message.ListFields()}
    if "where_clause" in names and not isinstance(message, pb.IndexElem):
        yield "filter", lambda node: node.ClearField("where_clause")
    for name, mutator in _OPTIONAL.items():
        if name in names:
            yield mutator, lambda node, name=name: node.ClearField(name)
    lists = {"sort_clause": "order", "agg_order": "order"}
    if isinstance(message, pb.UpdateStmt):
        lists = {"target_list": "column"}
    for name, mutator in lists.items():
        count = len(getattr(message, name, ()))
        for index in range(count if count > 1 else 0):
            yield mutator, lambda node, name=name, index=index: getattr(node, name).pop(index)
    if isinstance(message, pb.FuncCall) and message.agg_distinct:
        yield "limit", lambda node: setattr(node, "agg_distinct", False)


_OPTIONAL = {
    "having_clause": "filter",
    "agg_filter": "filter",
    "limit_count": "limit",
    "limit_offset": "limit",
    "distinct_clause": "limit",
    "locking_clause": "lock",
    "on_conflict_clause": "conflict",
}
"""Fields of statements and calls that may be missing, with the mutator that leaves them out."""

_TURNED_TESTS = {
    pb.IS_TRUE: pb.IS_NOT_TRUE,
    pb.IS_NOT_TRUE: pb.IS_TRUE,
    pb.IS_FALSE: pb.IS_NOT_FALSE,
    pb.IS_NOT_FALSE: pb.IS_FALSE,
    pb.IS_UNKNOWN: pb.IS_NOT_UNKNOWN,
    pb.IS_NOT_UNKNOWN: pb.IS_UNKNOWN,
}

_TURNED: Mapping[str, tuple[str, ...]] = {
    "=": ("<>",),
    "<>": ("=",),
    "!=": ("=",),
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "~": ("!~",),
    "!~": ("~",),
    "~*": ("!~*",),
    "!~*": ("~*",),
    "~~": ("!~~",),
    "!~~": ("~~",),
    "~~*": ("!~~*",),
    "!~~*": ("~~*",),
    "+": ("-",),
    "-": ("+",),
    "*": ("/",),
    "/": ("*",),
    "%": ("*",),
    "^": ("*",),
}
"""Operators and what they are turned into."""

_ARITHMETIC = frozenset("+-*/%^")

_KINDS = {
    pb.AEXPR_DISTINCT: pb.AEXPR_NOT_DISTINCT,
    pb.AEXPR_NOT_DISTINCT: pb.AEXPR_DISTINCT,
    pb.AEXPR_BETWEEN: pb.AEXPR_NOT_BETWEEN,
    pb.AEXPR_NOT_BETWEEN: pb.AEXPR_BETWEEN,
}
"""Comparisons that are words, and their opposites. The parser names them by kind, the deparser by kind and operator."""

_WORDS = {
    pb.AEXPR_DISTINCT: "=",
    pb.AEXPR_NOT_DISTINCT: "=",
    pb.AEXPR_BETWEEN: "BETWEEN",
    pb.AEXPR_NOT_BETWEEN: "NOT BETWEEN",
}


def _operator(expression: pb.A_Expr) -> Iterator[Edit]:
    name = strings(expression.name)[-1] if expression.name else ""
    if expression.kind in _KINDS:
        other = _KINDS[expression.kind]

        def word(node: pb.A_Expr) -> None:
            node.kind = other
            node.name[-1].string.sval = _WORDS[other]

        yield "comparison", word
        return
    for other in _TURNED.get(name, ()):

        def turned(node: pb.A_Expr, other: str = other) -> None:
            node.name[-1].string.sval = other

        yield "arithmetic" if name in _ARITHMETIC else "comparison", turned
    if expression.kind == pb.AEXPR_OP_ANY and name == "=":
        yield "comparison", lambda node: setattr(node, "kind", pb.AEXPR_OP_ALL)
    if name == "||":

        def exchanged(node: pb.A_Expr) -> None:
            left = pb.Node()
            left.CopyFrom(node.lexpr)
            node.lexpr.CopyFrom(node.rexpr)
            node.rexpr.CopyFrom(left)

        yield "arithmetic", exchanged


def _logic(expression: pb.BoolExpr, context: tuple[str, ...]) -> Iterator[Edit]:
    if expression.boolop == pb.NOT_EXPR:
        return  # at the Node around it
    other = pb.OR_EXPR if expression.boolop == pb.AND_EXPR else pb.AND_EXPR
    yield "logic", lambda node: setattr(node, "boolop", other)
    mutator = "filter" if _FILTERS & set(context[-2:]) else "logic"
    for index in range(len(expression.args)):
        yield mutator, lambda node, index=index: node.args.pop(index)


_FILTERS = {"where_clause", "having_clause", "agg_filter", "quals"}


def _negated(node: pb.Node) -> pb.Node:
    return pb.Node(bool_expr=pb.BoolExpr(boolop=pb.NOT_EXPR, args=[node]))


def _node(node: pb.Node, context: tuple[str, ...]) -> Iterator[Edit]:
    """Edits that put another expression into the place of one."""
    if node.HasField("bool_expr") and node.bool_expr.boolop == pb.NOT_EXPR:
        yield "logic", lambda place: place.CopyFrom(_copy(place.bool_expr.args[0]))
    if node.HasField("coalesce_expr"):
        for index in (0, -1):
            yield "fallback", lambda place, index=index: _without(place, "coalesce_expr", index)
    if node.HasField("min_max_expr"):
        for index in range(len(node.min_max_expr.args)):
            yield "fallback", lambda place, index=index: _without(place, "min_max_expr", index)
    if node.HasField("func_call"):
        names = strings(node.func_call.funcname)
        if names[-1] in NORMALISERS and len(node.func_call.args) == 1:
            yield "normalisation", lambda place: place.CopyFrom(_copy(place.func_call.args[0]))
        if names[-1] in CLOCKS:
            yield "normalisation", lambda place: place.func_call.funcname[-1].string.CopyFrom(pb.String(sval="now"))
    if _is_value(node, context):
        yield "null", lambda place: place.CopyFrom(pb.Node(a_const=pb.A_Const(isnull=True)))


def _copy(node: pb.Node) -> pb.Node:
    copy = pb.Node()
    copy.CopyFrom(node)
    return copy


def _without(place: pb.Node, name: str, index: int) -> None:
    """COALESCE, GREATEST or LEAST without one of its values; when one is left, that one alone."""
    expression = getattr(place, name)
    expression.args.pop(index)
    if len(expression.args) == 1:
        place.CopyFrom(_copy(expression.args[0]))


NORMALISERS = frozenset({"btrim", "ltrim", "rtrim", "lower", "upper", "initcap", "floor", "ceil", "round", "abs"})
"""Functions of one argument without which a value is another one only sometimes."""

CLOCKS = frozenset({"clock_timestamp", "statement_timestamp"})


def _is_value(node: pb.Node, context: tuple[str, ...]) -> bool:
    """A value handed on: of SET, of a VALUES row, of a SELECT's list, an argument after a text in a call's list."""
    kind = node.WhichOneof("node")
    if kind in {None, "res_target", "list", "string", "a_star", "set_to_default", "type_name"}:
        return False
    if kind == "a_const" and node.a_const.isnull:
        return False
    if kind == "column_ref" and any(field.HasField("a_star") for field in node.column_ref.fields):
        return False
    if context[-1:] == ("val",):
        return "target_list" in context[-4:]
    if context[-3:] == ("values_lists", "list", "items"):
        return True
    return context[-2:] == ("func_call", "args") and kind == "column_ref"


def _constant(constant: pb.A_Const) -> Iterator[Edit]:
    match constant.WhichOneof("val"):
        case "ival":
            value = constant.ival.ival
            for other in (value + 1, value - 1):
                if abs(other) <= MAX_INTEGER:
                    yield "constant", lambda node, other=other: node.ival.CopyFrom(pb.Integer(ival=other))
        case "fval":
            other_text = f"1{constant.fval.fval}"
            yield "constant", lambda node: setattr(node.fval, "fval", other_text)
        case "boolval":
            other_value = not constant.boolval.boolval
            yield "constant", lambda node: node.boolval.CopyFrom(pb.Boolean(boolval=other_value))
        case "sval":
            other_text = _other_text(constant.sval.sval)
            yield "constant", lambda node: setattr(node.sval, "sval", other_text)
        case _:
            pass


MAX_INTEGER = 2**31 - 1
"""A larger one is no integer to the parser."""


def _other_text(text: str) -> str:
    """Another text of the same make: an empty one gets a letter, JSON stays JSON, any other one ends differently."""
    if text in {"{}", "[]"}:
        return {"{}": '{"mutant": 1}', "[]": '["mutant"]'}[text]
    return f"{text}x"


# ------------------------------------------------------------------------------------------------------- in the header


def _of_header(tree: pb.CreateFunctionStmt, raw: bytes) -> Iterator[_Draft]:
    """SECURITY DEFINER dropped, and the constants among the default values of arguments changed."""
    for node in tree.options:
        option = node.def_elem
        if option.defname == "security" and option.arg.boolean.boolval:
            match = re.compile(rb"(?i)SECURITY\s+DEFINER").search(raw, option.location)
            if match is not None:
                changed = (raw[: match.start()] + b"SECURITY INVOKER" + raw[match.end() :]).decode()
                line = raw.count(b"\n", 0, match.start()) + 1
                yield _Draft("security", line, "SECURITY DEFINER", "SECURITY INVOKER", "", changed)
    for node in tree.parameters:
        parameter = node.function_parameter
        value = parameter.defexpr.a_const
        if not parameter.HasField("defexpr") or not parameter.defexpr.HasField("a_const") or value.isnull:
            continue
        before = deparse(_select(parameter.defexpr)).removeprefix("SELECT ")
        for _, edit in _constant(value):
            other = _copy(parameter.defexpr)
            edit(other.a_const)
            after = deparse(_select(other)).removeprefix("SELECT ")
            place = value.location
            if raw[place : place + len(before.encode())] != before.encode():
                continue
            changed = (raw[:place] + after.encode() + raw[place + len(before.encode()) :]).decode()
            line = raw.count(b"\n", 0, place) + 1
            name = f"{parameter.name} DEFAULT "
            yield _Draft("constant", line, name + before, name + after, "", changed)


def _select(value: pb.Node) -> pb.ParseResult:
    target = pb.Node(res_target=pb.ResTarget(val=value))
    select = pb.SelectStmt(target_list=[target], limit_option=pb.LIMIT_OPTION_DEFAULT, op=pb.SETOP_NONE)
    return pb.ParseResult(stmts=[pb.RawStmt(stmt=pb.Node(select_stmt=select))])
