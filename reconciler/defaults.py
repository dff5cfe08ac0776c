"""Default expressions of arguments: one text for what a file says and what the catalog shows.

PostgreSQL stores `DEFAULT '{}'` of a jsonb argument as a tree and prints it as `'{}'::jsonb`; -1 comes back as
`'-1'::integer`. What is constant, or one call without arguments, has one text here. Everything else cannot be compared
by text and is refused.
"""

from __future__ import annotations

import json
import math
import re
import struct
import uuid
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from postgast import pg_query_pb2 as pb

from reconciler.syntax import UnknownType, expression_of, quote_ident, strings, tokens_of, type_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from reconciler.model import Json

INTEGERS: Mapping[str, tuple[int, int]] = {
    "smallint": (-(2**15), 2**15 - 1),
    "integer": (-(2**31), 2**31 - 1),
    "bigint": (-(2**63), 2**63 - 1),
    "oid": (0, 2**32 - 1),
}

FLOATS = ("real", "double precision")

CALLS: Mapping[str, str] = {
    "clock_timestamp": "timestamp with time zone",
    "current_database": "name",
    "current_schema": "name",
    "gen_random_uuid": "uuid",
    "now": "timestamp with time zone",
    "pg_backend_pid": "integer",
    "pi": "double precision",
    "random": "double precision",
    "statement_timestamp": "timestamp with time zone",
    "timeofday": "text",
    "transaction_timestamp": "timestamp with time zone",
    "txid_current": "bigint",
    "uuidv4": "uuid",
    "uuidv7": "uuid",
    "version": "text",
}
"""Built-in functions that take no arguments, with the type they return."""

VALUE_FUNCTIONS: Mapping[int, tuple[str, str]] = {
    pb.SVFOP_CURRENT_DATE: ("CURRENT_DATE", "date"),
    pb.SVFOP_CURRENT_TIME: ("CURRENT_TIME", "time with time zone"),
    pb.SVFOP_CURRENT_TIMESTAMP: ("CURRENT_TIMESTAMP", "timestamp with time zone"),
    pb.SVFOP_LOCALTIME: ("LOCALTIME", "time without time zone"),
    pb.SVFOP_LOCALTIMESTAMP: ("LOCALTIMESTAMP", "timestamp without time zone"),
    pb.SVFOP_CURRENT_ROLE: ("CURRENT_ROLE", "name"),
    pb.SVFOP_CURRENT_USER: ("CURRENT_USER", "name"),
    pb.SVFOP_USER: ("USER", "name"),
    pb.SVFOP_SESSION_USER: ("SESSION_USER", "name"),
    pb.SVFOP_CURRENT_CATALOG: ("CURRENT_CATALOG", "name"),
    pb.SVFOP_CURRENT_SCHEMA: ("CURRENT_SCHEMA", "name"),
}


class _NoOneText(Exception):
    """This expression has no text of its own that the catalog would show too."""


@lru_cache(maxsize=16384)
def canonical_default(expression: str, type_text: str) -> str | None:
    """One text for a default expression of an argument of type `type_text` (as format_type prints it).

    The same for what a file says and for what pg_get_expr() shows with search_path, DateStyle ISO and IntervalStyle
    postgres set; valid after DEFAULT; a fixed point. None: the two cannot be compared.
    """
    node, troubles = expression_of(expression)
    if node is None or troubles:
        return None
    try:
        return _canonical(node, type_text)
    except (_NoOneText, UnknownType):
        return None


def split_expressions(text: str) -> list[str]:
    """The single expressions of `a, b`, which is how pg_get_expr() prints proargdefaults."""
    tokens, troubles = tokens_of(text)
    if troubles or not tokens:
        return []
    raw = text.encode()
    parts: list[str] = []
    depth = start = 0
    for token in tokens:
        word = raw[token.start : token.end]
        if word in (b"(", b"["):
            depth += 1
        elif word in (b")", b"]"):
            depth -= 1
        elif word == b"," and depth == 0:
            parts.append(raw[start : token.start].decode().strip())
            start = token.end
    return [*parts, raw[start:].decode().strip()]


def _canonical(node: pb.Node, wanted: str) -> str:
    """The one text of `node` for an argument of type `wanted`."""
    match node.WhichOneof("node"):
        case "a_const":
            return _constant(node.a_const, wanted)
        case "type_cast":
            return _cast(node.type_cast, wanted)
        case "a_array_expr":
            return _array(node.a_array_expr, wanted, None)
        case "func_call" | "sqlvalue_function":
            return _call(node)[0]
        case _:
            raise _NoOneText


def _cast(node: pb.TypeCast, wanted: str) -> str:
    """A constant, array or call that carries a cast: the cast goes where it says nothing new."""
    if node.type_name.typmods or node.type_name.setof:
        raise _NoOneText
    target = type_name(node.type_name)
    match node.arg.WhichOneof("node"):
        case "a_const":
            return _cast_constant(node.arg.a_const, target, wanted)
        case "a_array_expr" if target == wanted:
            return _array(node.arg.a_array_expr, wanted, target)
        case "type_cast" if target == wanted and not _is_builtin(wanted):
            # A cast to a domain is shown on top of the cast to its base type.
            return _cast(node.arg.type_cast, wanted)
        case "func_call" | "sqlvalue_function":
            text, returned = _call(node.arg)
            return text if target == returned else f"({text})::{_in_expression(target)}"
        case _:
            raise _NoOneText


def _cast_constant(constant: pb.A_Const, target: str, wanted: str) -> str:
    domain_over_text = not _is_builtin(wanted) and target in ("text", "character varying", "character")
    if constant.isnull or domain_over_text:
        # NULL is NULL in every type, and of a domain PostgreSQL shows the base type.
        return _constant(constant, wanted)
    inner = _constant(constant, target)
    if wanted in FLOATS and (target in INTEGERS or target == "numeric"):
        return _number(Decimal(inner), wanted)
    exact = _fits(inner, target) and (_fits(inner, wanted) or wanted == "numeric")
    if target == wanted or exact or inner.startswith("'"):
        return inner
    return f"({inner})::{_in_expression(target)}"


def _array(array: pb.A_ArrayExpr, wanted: str, cast: str | None) -> str:
    """ARRAY[...] of constants. Without a cast PostgreSQL takes strings for text."""
    if not wanted.endswith("[]"):
        raise _NoOneText
    element = wanted.removesuffix("[]")
    if not array.elements:
        return f"'{{}}'::{_in_expression(wanted)}"
    texts: list[str] = []
    for node in array.elements:
        literal = node.type_cast.arg if node.HasField("type_cast") else node
        if not literal.HasField("a_const") or literal.a_const.isnull:
            raise _NoOneText
        untyped = node.HasField("a_const") and node.a_const.HasField("sval") and cast is None
        texts.append(_canonical(node, "text" if untyped else element))
    if len({text.startswith("'") for text in texts}) > 1:
        # PostgreSQL reads the strings as numbers then.
        raise _NoOneText
    return f"ARRAY[{', '.join(texts)}]"


def _call(node: pb.Node) -> tuple[str, str]:
    """The text and the returned type of a call without arguments."""
    if node.HasField("sqlvalue_function"):
        known = VALUE_FUNCTIONS.get(node.sqlvalue_function.op)
        if known is None:
            raise _NoOneText
        return known
    call = node.func_call
    fields = {field.name for field, _ in call.ListFields()}
    names = strings(call.funcname)
    name = names[-1]
    if fields - {"funcname", "funcformat", "location"} or name not in CALLS or names[:-1] not in ((), ("pg_catalog",)):
        raise _NoOneText
    return f"{quote_ident(name)}()", CALLS[name]


def _constant(constant: pb.A_Const, wanted: str) -> str:
    """A literal as the value of type `wanted` that it stands for."""
    if constant.isnull:
        return f"NULL::{_in_expression(wanted)}"
    match constant.WhichOneof("val"):
        case "ival":
            return _number(Decimal(constant.ival.ival), wanted)
        case "fval":
            return _number(_decimal(constant.fval.fval), wanted)
        case "boolval":
            return "true" if constant.boolval.boolval else "false"
        case "sval":
            return _string(constant.sval.sval, wanted)
        case _:
            raise _NoOneText


def _number(value: Decimal, wanted: str) -> str:
    """A number without quotes, as short as the type it becomes allows."""
    if wanted in FLOATS:
        value = _shortest(value, wanted)
    text = _in_full(value)
    if wanted in INTEGERS and not _fits(text, wanted):
        raise _NoOneText
    return text


def _shortest(value: Decimal, wanted: str) -> Decimal:
    """The shortest decimal that is the same float, as float8out writes it."""
    number = float4(float(value)) if wanted == "real" else float(value)
    if not math.isfinite(number):
        raise _NoOneText
    return Decimal(repr(number)).normalize()


def _in_full(value: Decimal) -> str:
    """As numeric_out writes it: no exponent, no negative zero."""
    return format(value or abs(value), "f")


def _fits(text: str, wanted: str) -> bool:
    """Whether `text` is an integer that type `wanted` can hold without changing it."""
    low, high = INTEGERS.get(wanted, (1, 0))
    return re.fullmatch(r"-?\d{1,20}", text) is not None and low <= int(text) <= high


def float4(value: float) -> float:
    """`value` as a float4 column gives it back: the shortest decimal that is the same float4."""
    try:
        single = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError as error:
        raise _NoOneText from error
    shortest = (float(f"{single:.{digits}g}") for digits in range(1, 10))
    return next(text for text in shortest if struct.pack("f", text) == struct.pack("f", single))


def _string(value: str, wanted: str) -> str:
    """A quoted literal as the output function of type `wanted` writes its value."""
    if wanted.endswith("[]"):
        if value.strip() != "{}":
            raise _NoOneText
        return f"'{{}}'::{_in_expression(wanted)}"
    if not _is_builtin(wanted):
        return f"{_quoted(_word(value))}::{wanted}"
    if wanted in INTEGERS or wanted in ("numeric", *FLOATS):
        return _number(_decimal(value), wanted)
    if wanted == "boolean":
        return _boolean(value)
    written = OUTPUT.get(wanted)
    if written is None:
        raise _NoOneText
    return f"{_quoted(written(value))}::{_in_expression(wanted)}"


def _decimal(value: str) -> Decimal:
    if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*", value) is None:
        raise _NoOneText
    return Decimal(value.strip())


def _boolean(value: str) -> str:
    word = value.strip().lower()
    if word == "on" or (word and any(true.startswith(word) for true in ("true", "yes", "1"))):
        return "true"
    if word in ("off", "of") or (word and any(false.startswith(word) for false in ("false", "no", "0"))):
        return "false"
    raise _NoOneText


def _word(value: str) -> str:
    """A label of an enumeration. The output of other types could be another text, a domain's could be true or 5."""
    if re.fullmatch(r"[^\W\d][\w -]*", value) is None or value.lower() in ("true", "false", "null", "infinity", "nan"):
        raise _NoOneText
    return value


def _same(value: str) -> str:
    return value


def _name(value: str) -> str:
    if len(value.encode()) > 63:
        raise _NoOneText
    return value


def _char(value: str) -> str:
    if len(value) != 1 or not value.isascii():
        raise _NoOneText
    return value


def _uuid(value: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}", value) is None:
        raise _NoOneText
    return str(uuid.UUID(value))


def _date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat() if len(value) == 10 else _never(value)
    except ValueError as error:
        raise _NoOneText from error


def _never(value: str) -> str:
    raise _NoOneText(value)


def _bytea(value: str) -> str:
    if re.fullmatch(r"\\x([0-9a-fA-F]{2})*", value) is None:
        raise _NoOneText
    return value.lower()


def _jsonb(value: str) -> str:
    """As jsonb_out prints it: keys by length and then by bytes, the last of equal ones, numbers in full."""
    try:
        tree = json.loads(value, parse_float=_decimal, parse_int=_decimal, parse_constant=_never)
        text = _write_json(tree)
    except (ValueError, RecursionError) as error:
        raise _NoOneText from error
    if "\\u0000" in text or "\x7f" in text or re.search("[\ud800-\udfff]", text) is not None:
        raise _NoOneText
    return text


def _write_json(part: Json) -> str:
    match part:
        case dict():
            members = sorted(cast("dict[str, Json]", part).items(), key=lambda item: (len(item[0].encode()), item[0]))
            return "{" + ", ".join(f"{_write_json(key)}: {_write_json(item)}" for key, item in members) + "}"
        case list():
            return "[" + ", ".join(map(_write_json, cast("list[Json]", part))) + "]"
        case Decimal():
            return _in_full(part)
        case _:
            return json.dumps(part, ensure_ascii=False)


UNITS = {
    **dict.fromkeys("y yr yrs year years".split(), (12, 0, 0)),
    **dict.fromkeys("mon mons month months".split(), (1, 0, 0)),
    **dict.fromkeys("w week weeks".split(), (0, 7, 0)),
    **dict.fromkeys("d day days".split(), (0, 1, 0)),
    **dict.fromkeys("h hr hrs hour hours".split(), (0, 0, 3600)),
    **dict.fromkeys("m min mins minute minutes".split(), (0, 0, 60)),
    **dict.fromkeys("s sec secs second seconds".split(), (0, 0, 1)),
}
"""Months, days and seconds of the units of an interval (deltatktbl in datetime.c), without the rare ones."""


def _interval(value: str) -> str:
    """As interval_out prints it in style postgres; only whole, positive amounts of named units and hh:mm:ss."""
    months = days = seconds = 0
    rest = value.strip()
    clock = re.search(r"(?:^|\s)(\d{1,4}):(\d\d)(?::(\d\d))?$", rest)
    if clock is not None:
        hours, minutes, secs = (int(part or 0) for part in clock.groups())
        if minutes > 59 or secs > 59:
            raise _NoOneText
        seconds, rest = hours * 3600 + minutes * 60 + secs, rest[: clock.start()].strip()
    amounts = re.findall(r"(\d{1,6})\s*([a-z]+)\s*", rest)
    if "".join(number + unit for number, unit in amounts) != re.sub(r"\s", "", rest):
        raise _NoOneText
    if (not amounts and clock is None) or any(unit not in UNITS for _, unit in amounts):
        raise _NoOneText
    for number, unit in amounts:
        month, day, second = UNITS[unit]
        months, days, seconds = months + int(number) * month, days + int(number) * day, seconds + int(number) * second
    parts = [
        f"{amount} {word}{'' if amount == 1 else 's'}"
        for amount, word in ((months // 12, "year"), (months % 12, "mon"), (days, "day"))
        if amount
    ]
    if seconds or not parts:
        parts.append(f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}")
    return " ".join(parts)


OUTPUT: Mapping[str, Callable[[str], str]] = {
    '"char"': _char,
    "bytea": _bytea,
    "character": _same,
    "character varying": _same,
    "date": _date,
    "interval": _interval,
    "json": _same,
    "jsonb": _jsonb,
    "name": _name,
    "text": _same,
    "uuid": _uuid,
}
"""What the output function of a built-in type makes of a literal. A type that is not here has no known output."""


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _is_builtin(wanted: str) -> bool:
    return "." not in wanted


@lru_cache(maxsize=1024)
def _in_expression(wanted: str) -> str:
    """A type as it must be written after `::`, where the SQL names of bpchar and bit would mean a length of 1."""
    base = wanted.removesuffix("[]")
    return {"character": "bpchar", "bit": '"bit"'}.get(base, base) + wanted[len(base) :]
