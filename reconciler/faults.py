"""Pydantic's errors -> plain sentences at the keys a person wrote. For `yamltext`.

Pydantic's locations carry labels of union branches among the keys, and its messages speak of inputs and types.
`explain` follows the locations through the data and the model's types, keeps of a union the form that was most likely
meant, and says what to write instead where that is known.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    cast,
    get_args,
    get_origin,
)

import pydantic
import pydantic_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from reconciler.model import Json

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys, and positions in lists from 0, that lead to a value."""

_Type: TypeAlias = Any
"""What may stand as an annotation; None when it is not known."""


class Fault(NamedTuple):
    """One thing wrong in the data: at the value of `path`, or at its key."""

    path: KeyPath
    at_value: bool
    message: str


def explain(
    model: type[pydantic.BaseModel],
    error: pydantic.ValidationError,
    data: Json,
    written: Callable[[KeyPath], str | None],
) -> Iterator[Fault]:
    """What is wrong with `data` as `model`. `written` gives the text of a value that YAML does not read as text."""
    errors = [_Error(detail["loc"], detail) for detail in error.errors(include_url=False)]
    for placed in _relevant(model, errors, data, ()):
        yield Fault(placed.path, placed.at_value, _sentence(placed, written(placed.path)))


class _Error(NamedTuple):
    """One of pydantic's errors; `loc` is the part of its location that is not yet followed."""

    loc: tuple[str | int, ...]
    detail: ErrorDetails


class _Placed(NamedTuple):
    """A fault with the real keys that lead to it, and the type that was expected there (for a key: of its mapping)."""

    path: KeyPath
    at_value: bool
    expected: _Type
    detail: ErrorDetails
    key: str | int | None = None
    wanted: tuple[str, ...] = ()
    """In words, where several kinds of value would do."""


def _relevant(expected: _Type, errors: Sequence[_Error], data: Json, path: KeyPath) -> Iterator[_Placed]:
    """Follow pydantic's locations through `data` and the types, to faults at real paths, without its union labels."""
    expected = _bare(expected)
    below: dict[str | int, list[_Error]] = {}
    for loc, detail in errors:
        if not loc:
            whole = detail["type"] in _OWN_WORDS and isinstance(data, dict)
            yield _Placed(path, not whole, expected, detail)
        elif loc[1:] == ("[key]",):
            yield _Placed((*path, loc[0]), False, None, detail, loc[0])
        elif detail["type"] == "missing" and len(loc) == 1:
            yield _Placed(path, False, expected, detail, loc[0])
        elif detail["type"] == "extra_forbidden" and len(loc) == 1:
            yield _Placed((*path, loc[0]), False, expected, detail, loc[0])
        else:
            below.setdefault(loc[0], []).append(_Error(loc[1:], detail))
    if len(_members(expected)) > 1:
        yield from _best_branch(expected, below, data, path)
        return
    for step, rest in below.items():
        inside = _child(data, step)
        if inside is _ABSENT and expected is None:
            yield from _relevant(None, rest, data, path)  # a label of pydantic's, no key
        else:
            yield from _relevant(_field(expected, step), rest, inside, (*path, step))


def _best_branch(
    union: _Type, branches: Mapping[str | int, Sequence[_Error]], data: Json, path: KeyPath
) -> Iterator[_Placed]:
    """The faults of the one form of a union that the author most likely meant; other forms would only be noise."""
    kinds = [error.detail for rest in branches.values() for error in rest if not error.loc]
    fitting = {
        label: rest
        for label, rest in branches.items()
        if any(error.loc or error.detail["type"] not in _EXPECTED for error in rest)
    }
    if fitting:
        label = min(fitting, key=lambda each: sum(_WEIGHT.get(error.detail["type"], 1) for error in fitting[each]))
        yield from _relevant(_member(union, label), fitting[label], data, path)
    elif kinds:
        wanted = tuple(dict.fromkeys(_EXPECTED[kind["type"]] for kind in kinds))
        yield _Placed(path, True, None, kinds[0], wanted=wanted)


_ABSENT: Final = object()
_WEIGHT: Final = {"missing": 2, "extra_forbidden": 2, "literal_error": 2}
"""Faults that say `another form was meant` rather than `this form, with a slip`."""


def _child(data: Json, step: str | int) -> Json:
    if isinstance(data, dict):
        return cast("dict[str | int, Json]", data).get(step, _ABSENT)
    if isinstance(data, list) and isinstance(step, int):
        return cast("list[Json]", data)[step] if step < len(cast("list[Json]", data)) else _ABSENT
    return _ABSENT


def _bare(expected: _Type) -> _Type:
    """A type without Annotated, aliases, `| None` and RootModel around it."""
    while True:
        if get_origin(expected) is Annotated:
            expected = get_args(expected)[0]
        elif hasattr(expected, "__value__"):
            expected = expected.__value__
        elif len(members := _members(expected)) == 1:
            expected = members[0]
        elif _is_model(expected, pydantic.RootModel):
            expected = _fields(expected)["root"].annotation
        else:
            return expected


def _members(expected: _Type) -> list[_Type]:
    """The forms of a union without None; nothing when it is no union."""
    if get_origin(expected) not in {Union, types.UnionType}:
        return []
    return [member for member in get_args(expected) if member is not types.NoneType]


def _member(union: _Type, label: str | int) -> _Type:
    """The form that pydantic calls `label`: a model's name or tag, else a type's name. None when that is not clear."""
    for member in map(_bare, _members(union)):
        name = getattr(get_origin(member) or member, "__name__", None)
        tags = [tag for field in _fields(member).values() for tag in _options(_bare(field.annotation))]
        if str(label).partition("[")[0] == name or label in tags:
            return member
    return None


def _field(expected: _Type, step: str | int) -> _Type:
    """The type below `step`, None when it is not known."""
    if fields := _fields(expected):
        return fields[step].annotation if step in fields else None
    origin, arguments = get_origin(expected), get_args(expected)
    if not isinstance(origin, type) or not arguments:
        return None
    if issubclass(origin, Mapping):
        return arguments[1]
    if issubclass(origin, tuple) and arguments[-1] is not Ellipsis:
        return arguments[step] if isinstance(step, int) and step < len(arguments) else None
    return arguments[0]


def _is_model(expected: _Type, base: type[pydantic.BaseModel]) -> bool:
    return isinstance(expected, type) and issubclass(expected, base)


def _fields(expected: _Type) -> dict[str | int, FieldInfo]:
    """The fields of a model by their names in files; nothing for other types."""
    if not _is_model(expected, pydantic.BaseModel):
        return {}
    return {field.alias or name: field for name, field in expected.model_fields.items()}


def _options(expected: _Type) -> tuple[Json, ...]:
    if get_origin(expected) is Literal:
        return get_args(expected)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return tuple(member.value for member in expected)
    return ()


_OWN_WORDS: Final = frozenset({"value_error", "assertion_error"})
_EXPECTED: Final[dict[str, str]] = {
    **dict.fromkeys(("string_type", "string_sub_type"), "a string"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"), "a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"), "a mapping (key: value)"
    ),
    "none_required": "nothing",
}


def _sentence(placed: _Placed, written: str | None) -> str:
    """One of pydantic's errors in plain words; `written` is the value as the file has it, when that is no text."""
    detail, key = placed.detail, placed.key
    kind, value, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return f"missing key {quoted(str(key))}"
    if kind == "extra_forbidden":
        return f"unknown key {quoted(str(key))}{_meant(str(key), map(str, _fields(placed.expected)))}"
    if kind in _OWN_WORDS:
        said = str(limits["error"])
    elif kind in {"literal_error", "enum"}:
        said = _not_one_of(placed.expected, value, written, limits)
    elif kind in _EXPECTED:
        said = _wrong_kind(placed.wanted or (_EXPECTED[kind],), value, written)
    elif kind in _LIMITS:
        said = _LIMITS[kind].format_map({**limits, "shown": shown(value, written)})
    else:
        said = detail["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return said if key is None else f"key {quoted(str(key))}: {said}"


_LIMITS: Final = {
    "greater_than": "must be greater than {gt}, this is {shown}",
    "greater_than_equal": "must be at least {ge}, this is {shown}",
    "less_than": "must be less than {lt}, this is {shown}",
    "less_than_equal": "must be at most {le}, this is {shown}",
    "string_too_short": "must have at least {min_length} characters, this is {shown}",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "{shown} does not match the pattern {pattern}",
    "too_short": "must have at least {min_length} entries, this has {actual_length}",
    "too_long": "must have at most {max_length} entries, this has {actual_length}",
    "union_tag_invalid": "the key {discriminator} must be one of {expected_tags}, this is '{tag}'",
    "union_tag_not_found": "missing key {discriminator}",
}


_UNQUOTED: Final = (
    ("true or false", "true|false"),
    ("a whole number", "-?[0-9]+"),
    ("a number", r"-?[0-9]+(\.[0-9]+)?"),
)
"""What a text must look like for the quotes to be the only thing that is wrong with it."""


def _wrong_kind(wanted: tuple[str, ...], value: Json, written: str | None) -> str:
    """What was expected and what there is, and how to write it when the two differ by quotes or brackets."""
    fix = ""
    scalar = written or (str(value).lower() if isinstance(value, bool) else str(value))
    if "a string" in wanted and (isinstance(value, bool | int | float) or written):
        wanted = tuple("a quoted string" if form == "a string" else form for form in wanted)
        fix = f": write {quoted(scalar)}"
    elif isinstance(value, str) and any(form in wanted and re.fullmatch(text, value) for form, text in _UNQUOTED):
        fix = f": write {value} without quotes"
    elif "a list" in wanted and isinstance(value, str | bool | int | float):
        fix = f": write [{quoted(value) if isinstance(value, str) else scalar}]"
    return f"expected {' or '.join(wanted)}, got {shown(value, written)}{fix}"


def _not_one_of(expected: _Type, value: Json, written: str | None, limits: Mapping[str, Any]) -> str:
    """Neither of the values that the type lists. `expected` may be unknown: then pydantic's own list is shown."""
    options = _options(expected)
    listed = ", ".join(str(option) for option in options) or str(limits["expected"])
    said = f"expected {'one of ' if len(options) != 1 else ''}{listed}, got {shown(value, written)}"
    if isinstance(value, str):
        return said + _meant(value, [option for option in options if isinstance(option, str)])
    return f'{said}: write "{written}"' if written in options else said


def _meant(text: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, options, n=1)
    return f" (did you mean {quoted(close[0])}?)" if close else ""


def short(text: str) -> str:
    """`text`, or its beginning."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def quoted(text: str) -> str:
    """`text` as one would write it in YAML, on one line and not endless."""
    return pydantic_core.to_json(short(text)).decode()


def shown(value: Json, text: str | None = None) -> str:
    """What a value is, in words; `text` is how it was written."""
    if value is None:
        return "null" if text else "nothing"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {short(text or str(value))}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    return "a mapping" if isinstance(value, dict) else "a list"
