"""Text of a state file -> plain data with the place of every key -> a model, or problems. For `desired`.

`read_text` decides which files are ours, `parse` turns YAML into plain Python values and remembers where each stands,
`validate` turns a part of that into a pydantic model. None of them raises for what a stranger wrote and none stops at
the first fault if it can go on: what is wrong is a `Problem` with its place and a plain sentence.

The language is YAML 1.2 with the core schema (`yes`, `on`, `1_000` and `2026-05-22` are text), less everything by which
a text grows or two readers see two things: anchors, aliases, merge keys, tags, second documents, duplicate keys, keys
that are not text, invisible characters. The events are libyaml's (`ruamel.yaml.clib`): twenty times faster than the
same events in Python. Where libyaml takes less than YAML 1.2 (a `:` or `?` in an unquoted text inside `[]` or `{}`) it
says so and never reads something else.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, cast

import pydantic
import pydantic_core
from _ruamel_yaml import CParser  # pyright: ignore[reportMissingImports, reportUnknownVariableType] - no stubs
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from reconciler import faults
from reconciler.errors import Problem
from reconciler.faults import KeyPath, quoted, short, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from reconciler.model import Json

M = TypeVar("M", bound=pydantic.BaseModel)
T = TypeVar("T")

Place: TypeAlias = tuple[int, int]
"""Line and column, both from 1; a column is a character, not a byte."""

SIZE_LIMIT: Final = 16 * 1024 * 1024
DEPTH_LIMIT: Final = 64
VALUE_LIMIT: Final = 1_000_000
PROBLEM_LIMIT: Final = 1_000
SAFE_INTEGER: Final = 2**53 - 1
"""The largest integer on which canonical JSON (RFC 8785) and all its readers agree."""


# --- Files -----------------------------------------------------------------------------------------------------------


def read_text(path: Path, root: Path) -> tuple[str | None, list[Problem]]:
    """Text of a regular UTF-8 file that, links resolved, lies inside `root`; line ends are left as they are.

    Problems name the file as `path` was passed. Never raises for what is there or is not.
    """
    try:
        return _decoded(_content(path, root)), []
    except _Refusal as refusal:
        return None, [Problem(str(path), refusal.line, refusal.column, refusal.message)]
    except (OSError, RuntimeError, ValueError) as error:
        return None, [Problem(str(path), None, None, _unreadable(error))]


class _Refusal(Exception):
    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


def _content(path: Path, root: Path) -> bytes:
    inside = path.resolve(strict=True)
    if not inside.is_relative_to(root.resolve(strict=True)):
        raise _Refusal("lies outside the state directory (links resolved): copy it into it")
    # O_NONBLOCK: opening a pipe must not wait for somebody to write into it.
    descriptor = os.open(inside, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Refusal(_NOT_A_FILE)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(SIZE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(content) > SIZE_LIMIT:
        raise _Refusal(f"is larger than {SIZE_LIMIT // 1024**2} MiB: split it into several files")
    return content


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Refusal("is UTF-16: save it as UTF-8", 1, 1)
    if content.startswith(b"\xef\xbb\xbf"):
        raise _Refusal("starts with a byte order mark: save it as UTF-8 without one", 1, 1)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        message = f"is not UTF-8: byte 0x{content[error.start]:02x} cannot stand here"
        raise _Refusal(message, *_place_of_end(before)) from error
    if "\0" in text:
        raise _Refusal(_HAS_NUL, *_place_of_end(text[: text.index("\0")]))
    return text


_HAS_NUL: Final = "contains a NUL byte, which PostgreSQL cannot store"
_NOT_A_FILE: Final = "is not a regular file"


def _unreadable(error: OSError | RuntimeError | ValueError) -> str:
    """Why a file could not be opened. RuntimeError is how Python 3.11 and 3.12 report a circle of links."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, IsADirectoryError):
        return _NOT_A_FILE
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
        return "is a link that leads back to itself"
    if isinstance(error, OSError) and error.errno == errno.ENXIO:  # a socket, or a device without a driver
        return _NOT_A_FILE
    return f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"


def _place_of_end(before: str) -> Place:
    """Line and column of what follows `before`; CR LF, LF and CR each end a line."""
    lines = re.split(r"\r\n|\n|\r", before)
    return len(lines), len(lines[-1]) + 1


# --- YAML ------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """One file: `data` in plain Python types, and where everything in it stands.

    `places` has the key of a mapping entry or the start of a list entry, `value_places` the value; `()` is where the
    file's mapping starts. `texts` has what was written where YAML reads something else than text (`true`, `0x10`, `~`).
    """

    data: Json
    places: Mapping[KeyPath, Place]
    value_places: Mapping[KeyPath, Place]
    texts: Mapping[KeyPath, str]

    def problem(self, file: str, path: KeyPath, message: str, *, value: bool = False) -> Problem:
        """A problem at the key (with `value`: at the value) of `path`, or at its nearest parent that the file has."""
        if value and path in self.value_places:
            return Problem(file, *self.value_places[path], message)
        known = next(path[:length] for length in range(len(path), -1, -1) if path[:length] in self.places)
        return Problem(file, *self.places[known], message)


def parse(text: str, file: str) -> tuple[Document | None, list[Problem]]:
    """YAML text to plain data and places, with every problem found on the way; `file` is named in them.

    The document is None when the text cannot be read as one mapping (syntax, aliases, limits). A document that comes
    with problems is good for finding more of them and for nothing else. An empty file is an empty mapping.
    """
    if found := FORBIDDEN.search(text):
        return None, [Problem(file, *_place_of_end(text[: found.start()]), _forbidden(found[0]))]
    builder = _Builder(text, file)
    with _collector_paused():
        top = builder.build()
    if top is None:
        return None, builder.problems
    document = Document(
        top.data,
        _View(top.mark, lambda mark: (mark.key_line + 1, mark.key_column + 1)),
        _View(top.mark, lambda mark: (mark.line + 1, mark.column + 1)),
        _View(top.mark, lambda mark: mark.text),
    )
    return document, builder.problems


@contextmanager
def _collector_paused() -> Generator[None]:
    """Looking for cycles among millions of new containers, of which none is garbage, would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


FORBIDDEN: Final = re.compile(
    # All that YAML calls not printable; line ends of YAML 1.1, on which readers disagree; byte order marks; and what
    # shows a reviewer another order of characters than the one that is there.
    r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029\ufeff\u202a-\u202e\u2066-\u2069]"
)


def _forbidden(character: str) -> str:
    code = ord(character)
    if not code:
        return _HAS_NUL
    if 0xD800 <= code <= 0xDFFF:
        return f"contains half of a surrogate pair (U+{code:04X}), which UTF-8 cannot hold"
    escape = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    name = unicodedata.name(character, "a control character")
    return f'the character U+{code:04X} ({name}) cannot be seen: remove it, or write "{escape}" in double quotes'


class _Mark(NamedTuple):
    """Where one entry stands, from 0 as libyaml counts, and the marks of the entries below it."""

    key_line: int
    key_column: int
    line: int
    column: int
    below: dict[str | int, _Mark] | None
    text: str | None


class _View(Mapping[KeyPath, T]):
    """What `read` finds in the marks, by path, looked up when asked: of 100,000 paths in a file one or two ever are."""

    def __init__(self, top: _Mark, read: Callable[[_Mark], T | None]) -> None:
        self._top = top
        self._read = read

    def __getitem__(self, path: KeyPath) -> T:
        mark: _Mark | None = self._top
        for step in path:
            mark = mark.below.get(step) if mark and mark.below else None
        found = None if mark is None else self._read(mark)
        if found is None:
            raise KeyError(path)
        return found

    def __iter__(self) -> Iterator[KeyPath]:
        waiting: list[tuple[KeyPath, _Mark]] = [((), self._top)]
        while waiting:
            path, mark = waiting.pop()
            if self._read(mark) is not None:
                yield path
            waiting.extend(((*path, step), below) for step, below in reversed((mark.below or {}).items()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Position(Protocol):
    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


class _Event(Protocol):
    """What libyaml's events have, all kinds taken together."""

    start_mark: _Position
    anchor: str | None
    tag: str | None
    value: str
    implicit: tuple[bool, bool]
    version: tuple[int, int] | None


class _Parser(Protocol):
    def get_event(self) -> Any: ...  # noqa: ANN401 - an _Event, whose class says which kind


class _Top(NamedTuple):
    data: dict[str, Json]
    mark: _Mark


class _Frame(NamedTuple):
    """A container that waits for the end of the one inside it, which stands at `line` and `column`."""

    container: Any
    marks: dict[str | int, _Mark]
    key: str | None
    key_line: int
    key_column: int
    line: int
    column: int


class _Stop(Exception):
    """The problem just added makes the rest of the file meaningless."""


class _Builder:
    """Events to data, marks and problems, without recursion."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.problems: list[Problem] = []
        self.usable = True

    def build(self) -> _Top | None:
        """The mapping that the file is, or None when it cannot be read as one."""
        try:
            parser = cast("Callable[[str], _Parser]", CParser)(self.text)
            data, mark = self._consume(parser.get_event) or ({}, _Mark(0, 0, 0, 0, None, None))
            if not isinstance(data, dict):
                self._stop(mark, f"a state file is a mapping (key: value), this is {shown(data, mark.text)}")
        except MarkedYAMLError as error:
            self.problems.append(_syntax_problem(self.file, self.text, error))
            return None
        except _Stop:
            return None
        return _Top(cast("dict[str, Json]", data), mark) if self.usable else None

    def _consume(self, next_event: Callable[[], Any]) -> tuple[Json, _Mark] | None:  # noqa: C901, PLR0912, PLR0915
        """Value and mark of the one document, None when it is empty. Raises MarkedYAMLError and _Stop.

        One loop with everything in local names: this is where reading a large state directory spends its time.
        """
        container: Any = []
        marks: dict[str | int, _Mark] = {}
        in_mapping = False
        key: str | None = None
        key_line = key_column = 0
        frames: list[_Frame] = []
        values = 0
        while True:
            event = next_event()
            kind = event.__class__
            at = event.start_mark
            line, column = at.line, at.column
            value: Json = None
            below: dict[str | int, _Mark] | None = None
            text: str | None = None
            if kind is ScalarEvent:
                value = event.value
                if event.anchor is not None or event.tag is not None:
                    self._decorated(event)
                elif event.implicit[0]:
                    if value[:1] in _MAYBE_NOT_TEXT:
                        value = self._plain(value, at)
                        text = None if value.__class__ is str else event.value
                elif "\0" in value:
                    self._add(at, "contains \\0, a NUL character, which PostgreSQL cannot store")
                if in_mapping and key is None:
                    key, key_line, key_column = str(event.value), line, column
                    if text is not None or key == "<<":
                        self._odd_key(value, event)
                    if key in container:
                        self._add(at, f"duplicate key {quoted(key)}: already at {self._where(marks[key])}")
                    continue
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                if event.anchor is not None or event.tag is not None:
                    self._decorated(event)
                if in_mapping and key is None:
                    self._stop(at, f"a key must be text, this is {shown({} if kind is MappingStartEvent else [])}")
                if len(frames) == DEPTH_LIMIT:
                    self._stop(at, f"more than {DEPTH_LIMIT} levels inside each other")
                frames.append(_Frame(container, marks, key, key_line, key_column, line, column))
                in_mapping = kind is MappingStartEvent
                container, marks, key = {} if in_mapping else [], {}, None
                continue
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                value, below = container, marks
                container, marks, key, key_line, key_column, line, column = frames.pop()
                in_mapping = container.__class__ is dict
            elif kind is AliasEvent:
                self._aliases(at)
                if in_mapping and key is None:
                    key, key_line, key_column = f"*{event.anchor}", line, column
                    continue
            elif kind is DocumentStartEvent:
                if container:
                    self._stop(at, "a second document starts here: a state file holds one")
                if event.version not in {None, (1, 2)}:
                    self._add(at, "the state language is YAML 1.2: remove this line")
                continue
            elif kind is StreamEndEvent:
                return (container[0], marks[0]) if container and marks[0].text != "" else None
            else:
                continue
            values += 1
            if values > VALUE_LIMIT:
                self._stop(at, f"more than {VALUE_LIMIT:,} values in one file: split it")
            if in_mapping:
                if key not in container:  # of a duplicate key the first stays
                    container[key] = value
                    marks[cast("str", key)] = _Mark(key_line, key_column, line, column, below, text)
                key = None
            else:
                marks[len(container)] = _Mark(line, column, line, column, below, text)
                container.append(value)

    def _where(self, mark: _Mark) -> str:
        return f"{self.file}:{mark.key_line + 1}:{mark.key_column + 1}"

    def _add(self, at: _Position, message: str) -> None:
        self.problems.append(Problem(self.file, at.line + 1, at.column + 1, message))
        if len(self.problems) == PROBLEM_LIMIT:
            self._stop(at, f"{PROBLEM_LIMIT:,} problems up to here: the rest of the file was not read")

    def _stop(self, at: _Position, message: str) -> NoReturn:
        self.problems.append(Problem(self.file, at.line + 1, at.column + 1, message))
        raise _Stop

    def _aliases(self, at: _Position) -> None:
        """Once per file: who uses them uses many. What stands for something else is not in the data."""
        if self.usable:
            self.usable = False
            self._add(at, "anchors (&), aliases (*) and merge keys (<<) are not part of the state language")

    def _decorated(self, event: _Event) -> None:
        if event.anchor is not None:
            self._aliases(event.start_mark)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._add(event.start_mark, f"tags ({short(tag)}) are not part of the state language: quote what is text")

    def _odd_key(self, value: Json, event: _Event) -> None:
        if event.value == "<<":
            if event.implicit[0]:
                self._aliases(event.start_mark)
        elif event.value:
            message = f"a key must be text, this is {shown(value, event.value)}: write {quoted(event.value)}"
            self._add(event.start_mark, message)
        else:
            self._add(event.start_mark, "a key is missing before the ':'")

    def _plain(self, text: str, at: _Position) -> Json:
        """What an unquoted text stands for in the core schema (YAML 1.2, 10.3.2); 0 for what JSON cannot hold."""
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            number = _integer(text)
        elif _FLOAT.fullmatch(text):
            number = _real(text)
        elif text in _NOT_FINITE:
            number = None
        else:
            return text
        if number is None:
            self._add(at, f"JSON cannot hold the number {short(text)} exactly: write {quoted(text)}")
            return 0
        return number


_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NOT_FINITE: Final = frozenset(
    [*(sign + form for form in (".inf", ".Inf", ".INF") for sign in ("", "+", "-")), ".nan", ".NaN", ".NAN"]
)
_MAYBE_NOT_TEXT: Final = frozenset({"", *"~nNtTfF", *"-+.0123456789"})
_INTEGER: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")


def _integer(text: str) -> int | None:
    if text[:2] in {"0o", "0x"}:
        number = int(text[2:], 8 if text[1] == "o" else 16)
    elif len(text.lstrip("+-0")) > 16:  # int() takes quadratic time for very many digits, and then refuses them
        return None
    else:
        number = int(text)
    return number if abs(number) <= SAFE_INTEGER else None


def _real(text: str) -> float | None:
    """The number, if the shortest text for it, which is what JSON will show, is the number that `text` says."""
    number = float(text)
    try:
        return number if Decimal(repr(number)) == Decimal(text) else None
    except ArithmeticError:  # an exponent beyond what even Decimal holds
        return None


def _syntax_problem(file: str, text: str, error: MarkedYAMLError) -> Problem:
    """One sentence for what libyaml found, at the place where a person would look for it."""
    said = cast("str", error.problem)
    found, begun = cast("_Position", error.problem_mark), cast("_Position | None", error.context_mark)
    message, at_start = _SYNTAX.get(said, (f"this is not valid YAML: {said}", False))
    if said == _CANNOT_START:
        character = re.split(r"\r\n|\n|\r", text)[found.line][found.column]
        message = _TAB if character == "\t" else f"a text that starts with {character} must be quoted"
    at = begun if begun and at_start else found
    return Problem(file, at.line + 1, at.column + 1, message)


_QUOTE_IT: Final = "quote the text if it is meant as text"
_INDENTATION: Final = "check the indentation here and how the lines before end"
_TAB: Final = "a tab cannot be used for indentation: use spaces"
_DIRECTIVE: Final = "the state language has no directives: remove this line"
_IN_FLOW: Final = "inside [] and {} a text with ':' or '?' must be quoted"
_CANNOT_START: Final = "found character that cannot start any token"
_UNCLOSED: Final = "the quote that opens here is not closed"
_ESCAPE: Final = "an unknown escape in double quotes: write \\\\ for a backslash, or use single quotes"
_SYNTAX: Final[dict[str, tuple[str, bool]]] = {
    # What libyaml says: what we say, and whether the fault is where the unfinished thing starts.
    "found a tab character that violates indentation": (_TAB, False),
    "found a tab character where an indentation space is expected": (_TAB, False),
    "mapping values are not allowed in this context": (
        f"': ' cannot stand here: {_QUOTE_IT}, or {_INDENTATION}",
        False,
    ),
    "mapping keys are not allowed in this context": (f"'? ' cannot stand here: {_QUOTE_IT}", False),
    "block sequence entries are not allowed in this context": (
        f"a list entry (- ) cannot start here: start the list on a line of its own, or {_QUOTE_IT}",
        False,
    ),
    "could not find expected ':'": ("this is neither 'key: value' nor part of the text before it", True),
    "did not find expected key": (f"expected a key: {_INDENTATION}", False),
    "did not find expected '-' indicator": (f"expected the next list entry (- ): {_INDENTATION}", False),
    "did not find expected ',' or ']'": (f"the '[' here lacks a ',' or its ']' ({_IN_FLOW})", True),
    "did not find expected ',' or '}'": (f"the '{{' here lacks a ',' or its '}}' ({_IN_FLOW})", True),
    "did not find expected node content": ("a value is missing here, or the ] or } that ends the values", False),
    "did not find expected <document start>": (f"this does not belong to what stands above it: {_INDENTATION}", False),
    "found unexpected end of stream": (_UNCLOSED, True),
    "found unexpected document indicator": (_UNCLOSED, True),
    "found unexpected ':'": (_IN_FLOW, False),
    "found unknown escape character": (_ESCAPE, False),
    "did not find expected hexdecimal number": (_ESCAPE, False),
    "found invalid Unicode character escape code": ("this escape is no character (half of a surrogate pair?)", False),
    "did not find expected alphabetic or numeric character": (f"a name is missing after & or *: {_QUOTE_IT}", False),
    "found undefined tag handle": ("tags (!) are not part of the state language: quote what is text", False),
    "found incompatible YAML document": ("the state language is YAML 1.2: remove this line", False),
    "found unknown directive name": (_DIRECTIVE, False),
    "found duplicate %YAML directive": (_DIRECTIVE, False),
    "found duplicate %TAG directive": (_DIRECTIVE, False),
}


# --- Models ----------------------------------------------------------------------------------------------------------


def validate(  # noqa: PLR0913, PLR0917 - the six are one question, asked in one place
    model: type[M], document: Document, path: KeyPath, data: Json, file: str, context: object = None
) -> tuple[M | None, list[Problem]]:
    """`data` as `model`, or every reason why not, each at its place in `document`.

    `data` is what the document has at `path`, perhaps with variables filled in: what does not stand in the file is
    reported at the nearest parent that does. Only the names used in files (aliases) count as keys. `context` is handed
    to the validators. Read as JSON, because there pydantic's strict mode takes a list for a tuple.
    """
    try:
        text = pydantic_core.to_json(data)
        return model.model_validate_json(text, context=context, by_alias=True, by_name=False), []
    except pydantic.ValidationError as error:
        found = faults.explain(model, error, data, lambda below: document.texts.get((*path, *below)))
        problems = {
            document.problem(file, (*path, *fault.path), fault.message, value=fault.at_value) for fault in found
        }
    return None, sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0, problem.message))
