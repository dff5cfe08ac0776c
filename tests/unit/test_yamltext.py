"""Reading state files: which files, which YAML, where every problem stands and in which words."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import socket
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Field, RootModel, field_validator, model_validator
from ruamel.yaml import YAML
from typing_extensions import TypeAliasType

from reconciler.model import Model, canonical
from reconciler.yamltext import (
    DEPTH_LIMIT,
    PROBLEM_LIMIT,
    SAFE_INTEGER,
    SIZE_LIMIT,
    Document,
    parse,
    read_text,
    validate,
)

if TYPE_CHECKING:
    from pathlib import Path


def read(text: str) -> Document:
    document, problems = parse(text, "f.yaml")
    assert problems == []
    assert document is not None
    return document


def refused(text: str) -> list[str]:
    """The problems of a text of which nothing can be used."""
    document, problems = parse(text, "f.yaml")
    assert document is None
    return [str(problem) for problem in problems]


def complaints(text: str) -> list[str]:
    """The problems of a text that could be read to its end."""
    document, problems = parse(text, "f.yaml")
    assert document is not None
    return [str(problem) for problem in problems]


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


def why_not(path: Path, root: Path) -> str:
    text, problems = read_text(path, root)
    assert text is None
    assert len(problems) == 1
    assert problems[0].file == str(path)
    return str(problems[0])


def test_text_comes_as_it_is(root: Path) -> None:
    content = "a: 'Điều 45' \r\nb: 1\n\r\u2028"
    (root / "a.yaml").write_bytes(content.encode())
    assert read_text(root / "a.yaml", root) == (content, [])


def test_a_link_inside_the_directory_is_followed(root: Path) -> None:
    (root / "a.yaml").write_text("a: 1")
    (root / "b.yaml").symlink_to("a.yaml")
    assert read_text(root / "b.yaml", root) == ("a: 1", [])


def test_the_directory_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (root / "a.yaml").write_text("a: 1")
    (tmp_path / "link").symlink_to(root)
    assert read_text(tmp_path / "link" / "a.yaml", tmp_path / "link") == ("a: 1", [])


@pytest.mark.parametrize("target", ["../outside.sql", "/etc/passwd", "/dev/zero"])
def test_what_lies_outside_is_refused(root: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside.sql").write_text("SELECT 1")
    (root / "link.sql").symlink_to(target)
    assert "lies outside the state directory" in why_not(root / "link.sql", root)
    assert "lies outside the state directory" in why_not(root / target, root)


def test_a_sibling_with_the_same_beginning_lies_outside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "state2").mkdir()
    (tmp_path / "state2" / "a.sql").write_text("SELECT 1")
    assert "lies outside the state directory" in why_not(root / ".." / "state2" / "a.sql", root)


def test_what_is_no_file_is_refused_without_waiting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "pipe")
    (root / "directory").mkdir()
    monkeypatch.chdir(root)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "directory", "socket"):
            assert why_not(root / name, root).endswith("is not a regular file")


def test_what_cannot_be_opened_is_said(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    assert why_not(root / "missing", root).endswith("missing: does not exist")
    assert why_not(root / "dangling", root).endswith("dangling: does not exist")
    assert why_not(root / "loop", root).endswith("loop: is a link that leads back to itself")
    assert "cannot be read: " in why_not(root / ("x" * 300), root)
    assert "cannot be read: " in why_not(root / "a\0b", root)
    (root / "file").write_text("")
    assert "cannot be read: " in why_not(root / "file" / "below", root)


def test_without_the_permission(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (root / "a").write_text("")
    monkeypatch.setattr(os, "open", denied)  # root may read everything, so no mode would do
    assert why_not(root / "a", root).endswith("a: cannot be read: permission denied")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbfa: 1", ":1:1: starts with a byte order mark: save it as UTF-8 without one"),
        ("a: 1".encode("utf-16"), ":1:1: is UTF-16: save it as UTF-8"),
        (b"a: 1\r\nb: \xc3\xa9\xff", ":2:5: is not UTF-8: byte 0xff cannot stand here"),
        (b"\xed\xa0\x80", ":1:1: is not UTF-8: byte 0xed cannot stand here"),
        (b"a\rb\0", ":2:2: contains a NUL byte, which PostgreSQL cannot store"),
    ],
)
def test_bytes_that_are_no_text(root: Path, content: bytes, problem: str) -> None:
    (root / "a").write_bytes(content)
    assert why_not(root / "a", root) == str(root / "a") + problem


def test_the_size_limit(root: Path) -> None:
    (root / "a").write_bytes(b"x" * SIZE_LIMIT)
    assert read_text(root / "a", root)[1] == []
    (root / "a").write_bytes(b"x" * (SIZE_LIMIT + 1))
    assert why_not(root / "a", root).endswith("a: is larger than 16 MiB: split it into several files")


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *((word, None) for word in ("", "~", "null", "Null", "NULL")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "n", "nULL", "tRUE", "Yes", "None")),
        *((number, int(number)) for number in ("0", "-1", "+12", "9007199254740991", "-9007199254740991")),
        ("007", 7),
        ("0000000000000000000000000000000001", 1),
        ("0o17", 15),
        ("0x1F", 31),
        *((number, float(number)) for number in ("1.5", "-0.1", ".5", "5.", "1e3", "-1.25E-7", "+2.0")),
        *((text, text) for text in ("1_000", "0b1", "12:30:45", "2026-05-22", "-0x1f", "1.2.3", "+", ".", "-.", "e3")),
        *((text, text) for text in ("=", ".infinity", "--", "1e", "0x", "0o8", "1,5", "-a", "300s", ".5.", "٣")),
        ("a b  # comment", "a b"),
        ("'true'", "true"),
        ('"1"', "1"),
        ('"a\\tb\\u00e9\\x01"', "a\tbé\x01"),
        ("|\n  1\n   2\n", "1\n 2\n"),
        (">-\n  a\n  b\n", "a b"),
        ("a\n  b", "a b"),
        ("[]", []),
        ("[1, a b, [~]]", [1, "a b", [None]]),
        ("{}", {}),
        ("{b: 1, a: {}}", {"b": 1, "a": {}}),
        ("\n- 1\n- a: 1\n  b: 2\n-\n", [1, {"a": 1, "b": 2}, None]),
        ("\n- - a\n", [["a"]]),
    ],
)
def test_values(written: str, value: Any) -> None:
    data = read(f"k: {written}").data
    assert data == {"k": value}
    assert type(data["k"]) is type(value)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n", "---\n", "--- # nothing\n...\n", "%YAML 1.2\n---\n"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    document = read(text)
    assert document.data == {}
    assert dict(document.places) == dict(document.value_places) == {(): (1, 1)} or text.startswith("%")
    assert dict(document.texts) == {}


@pytest.mark.parametrize(
    ("text", "what"),
    [("foo", 'the text "foo"'), ("- a", "a list"), ("12", "the number 12"), ("~", "null"), ('""', 'the text ""')],
)
def test_a_file_is_a_mapping(text: str, what: str) -> None:
    assert refused(text) == [f"f.yaml:1:1: a state file is a mapping (key: value), this is {what}"]


def test_line_ends_make_no_difference() -> None:
    text = "a: |\n  x\n  y\nb:\n- 'c\n\n  d'\n- e\n"
    for end in ("\r\n", "\r"):
        document = read(text.replace("\n", end))
        assert document.data == read(text).data
        assert dict(document.value_places) == dict(read(text).value_places)


@pytest.mark.parametrize(
    "number",
    [
        *("9007199254740992", "-9007199254740992", "0x20000000000000", "0o777777777777777777777"),
        *("1" * 5000, "0x" + "f" * 5000, "0.12345678901234567890"),
        *("1e999", "-1e999", "1e-999", "1e-99999999999999999999999999", "1e99999999999999999999999"),
        *(".inf", "-.Inf", "+.INF", ".nan", ".NaN"),
    ],
    ids=lambda number: number[:10],
)
def test_numbers_that_json_cannot_hold(number: str) -> None:
    document, problems = parse(f"a:\n  - {number}", "f.yaml")
    assert [(problem.line, problem.column) for problem in problems] == [(2, 5)]
    assert problems[0].message.startswith("JSON cannot hold the number ")
    assert len(problems[0].message) < 200
    assert document is not None
    canonical(document.data)


# --- Places ----------------------------------------------------------------------------------------------------------

PLACES = """\
# comment
gates:
  "queue.é":   {value: true, from: ["a", 0x10]}
  b:

    - x
    -   y: |
          text
        z: ~
  ? c
  : d
"""


def test_places() -> None:
    document = read(PLACES)
    assert dict(document.places) == {
        (): (2, 1),
        ("gates",): (2, 1),
        ("gates", "queue.é"): (3, 3),
        ("gates", "queue.é", "value"): (3, 17),
        ("gates", "queue.é", "from"): (3, 30),
        ("gates", "queue.é", "from", 0): (3, 37),
        ("gates", "queue.é", "from", 1): (3, 42),
        ("gates", "b"): (4, 3),
        ("gates", "b", 0): (6, 7),
        ("gates", "b", 1): (7, 9),
        ("gates", "b", 1, "y"): (7, 9),
        ("gates", "b", 1, "z"): (9, 9),
        ("gates", "c"): (10, 5),
    }
    assert list(document.places) == list(document.value_places)
    assert document.value_places["gates",] == (3, 3)
    assert document.value_places["gates", "queue.é", "value"] == (3, 24)
    assert document.value_places["gates", "b", 1, "y"] == (7, 12)
    assert document.value_places["gates", "c"] == (11, 5)
    assert dict(document.texts) == {
        ("gates", "queue.é", "value"): "true",
        ("gates", "queue.é", "from", 1): "0x10",
        ("gates", "b", 1, "z"): "~",
    }
    assert len(document.places) == 13
    assert len(document.texts) == 3


def test_paths_that_are_not_there() -> None:
    document = read(PLACES)
    for path in [("x",), ("gates", "c", "d"), ("gates", "b", 2), ("gates", "b", "0"), ("gates", "queue.é", "from", -1)]:
        assert path not in document.places
    assert document.problem("f", ("gates", "c", "d", 1), "m") == ("f", 10, 5, "m")
    assert document.problem("f", ("gates", "c", "d", 1), "m", value=True) == ("f", 10, 5, "m")
    assert document.problem("f", ("gates", "c"), "m", value=True) == ("f", 11, 5, "m")
    assert document.problem("f", ("x",), "m") == ("f", 2, 1, "m")


def test_an_astral_character_is_one_column() -> None:
    assert read("{😀: 1, b: 2}").places["b",] == (1, 8)


# --- What is not part of the language --------------------------------------------------------------------------------


def test_every_duplicate_key_names_both_places() -> None:
    text = "a: 1\nb:\n  c: 1\n  c: 2\na: 3\n'a': 4\nd: {e: 1, e: 2}\n"
    assert complaints(text) == [
        'f.yaml:4:3: duplicate key "c": already at f.yaml:3:3',
        'f.yaml:5:1: duplicate key "a": already at f.yaml:1:1',
        'f.yaml:6:1: duplicate key "a": already at f.yaml:1:1',
        'f.yaml:7:11: duplicate key "e": already at f.yaml:7:5',
    ]


@pytest.mark.parametrize(
    "text", ["a: &x 1", "a: &x [*x]", "a: *x", "<<: {a: 1}", "&k a: 1", "*k : 1", "a: &x {<<: *y}"]
)
def test_anchors_aliases_and_merge_keys(text: str) -> None:
    (problem,) = refused(text)
    assert problem.endswith("anchors (&), aliases (*) and merge keys (<<) are not part of the state language")


def test_a_quoted_merge_key_is_a_key() -> None:
    assert read("'<<': 1").data == {"<<": 1}


def test_a_bomb_of_aliases_is_one_problem_beside_the_others() -> None:
    lines = [
        "l0: &l0 [x, x]",
        *(f"l{level}: &l{level} [*l{level - 1}, *l{level - 1}]" for level in range(1, 60)),
        "l0: 1",
    ]
    assert [problem.partition(" ")[2][:9] for problem in refused("\n".join(lines))] == ["anchors (", "duplicate"]


@pytest.mark.parametrize(
    "tag", ["!x", "!!str", "!!python/object:os.system", "!", "!<tag:yaml.org,2002:int>", "!!binary"]
)
def test_tags(tag: str) -> None:
    for text in (f"a: {tag} 1", f"a: {tag} {{}}", f"a: {tag} [b]", f"{tag} a: 1"):
        (problem,) = complaints(text)
        assert "are not part of the state language: quote what is text" in problem


@pytest.mark.parametrize("text", ["a: 1\n---\nb: 2\n", "---\n---\nb: 2", "a: 1\n...\n---\nb: 2\n"])
def test_a_second_document(text: str) -> None:
    (problem,) = refused(text)
    assert problem.endswith("a second document starts here: a state file holds one")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1: a", '1:1: a key must be text, this is the number 1: write "1"'),
        ("a: {true: b}", '1:5: a key must be text, this is the boolean true: write "true"'),
        ("~: a", '1:1: a key must be text, this is null: write "~"'),
        ("a:\n  ? \n  : b", "2:4: a key is missing before the ':'"),
        ('"a\\0b": 1', "1:1: contains \\0, a NUL character, which PostgreSQL cannot store"),
        ('a: ["\\x00"]', "1:5: contains \\0, a NUL character, which PostgreSQL cannot store"),
        ("%YAML 1.1\n---\na: yes", "1:1: the state language is YAML 1.2: remove this line"),
    ],
)
def test_odd_but_readable(text: str, problem: str) -> None:
    assert complaints(text) == [f"f.yaml:{problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("? [a]\n: b", "1:3: a key must be text, this is a list"),
        ("a: {{b: c}: d}", "1:5: a key must be text, this is a mapping"),
        ("a:\n\tb: 1", "2:1: a tab cannot be used for indentation: use spaces"),
        ("a: |\n\tb", "2:1: a tab cannot be used for indentation: use spaces"),
        ("a: @b", "1:4: a text that starts with @ must be quoted"),
        ("a: [`b`]", "1:5: a text that starts with ` must be quoted"),
        ("a: %b", "1:4: a text that starts with % must be quoted"),
        ("a: b: c", "1:5: ': ' cannot stand here: quote the text if it is meant as text, or check the indentation"),
        ("a: 1\n b: 2", "2:3: ': ' cannot stand here: quote the text if it is meant as text"),
        ("a: 'b", "1:4: the quote that opens here is not closed"),
        ('a: 1\nb: "c\n---\n', "2:4: the quote that opens here is not closed"),
        ("a: 1\nb\nc: 2", "2:1: this is neither 'key: value' nor part of the text before it"),
        ("a:\n  b: 1\n c: 2", "3:2: expected a key: check the indentation here and how the lines before end"),
        ("a:\n- b\nc\n- d", "3:1: this is neither 'key: value' nor part of the text before it"),
        ("a:\n  - b\n  c: d", "3:3: expected the next list entry (- ): check the indentation"),
        ("a: - b", "1:4: a list entry (- ) cannot start here: start the list on a line of its own"),
        ("a: {b: 1\nc: 2", "1:4: the '{' here lacks a ',' or its '}'"),
        ("a: [b\n", "1:4: the '[' here lacks a ',' or its ']'"),
        ("a: [b]]", "1:7: expected a key: check the indentation here"),
        ("a: [http://b]", "1:9: inside [] and {} a text with ':' or '?' must be quoted"),
        ("a: {matching: fn_?}", "1:4: the '{' here lacks a ',' or its '}' (inside [] and {} a text with"),
        ("a: [,]", "1:5: a value is missing here"),
        (" a: 1\nb: 2", "2:1: this does not belong to what stands above it: check the indentation"),
        ("a: 1\n...\nb: 2", "3:1: this does not belong to what stands above it"),
        ('a: "\\q"', "1:5: an unknown escape in double quotes"),
        ('a: "\\xzz"', "1:7: an unknown escape in double quotes"),
        ('a: "\\ud800"', "1:7: this escape is no character (half of a surrogate pair?)"),
        ('a: "\\U00110000"', "1:7: this escape is no character"),
        ("a: *", "1:5: a name is missing after & or *: quote the text if it is meant as text"),
        ("a: !x!y 1", "1:4: tags (!) are not part of the state language"),
        ("%FOO 1\n---\na: 1", "1:5: the state language has no directives: remove this line"),
        ("%YAML 2.0\n---\na: 1", "1:1: the state language is YAML 1.2: remove this line"),
        ("a: >9x\n b", "1:6: this is not valid YAML: "),
        ("k" * 1025 + ": 1", "1:1026: ': ' cannot stand here"),
    ],
)
def test_what_is_no_yaml(text: str, problem: str) -> None:
    (found,) = refused(text)
    assert found.startswith(f"f.yaml:{problem}")


def test_problems_before_a_syntax_error_are_kept() -> None:
    assert [problem[:11] for problem in refused("a: 1\na: 2\nb: [\n")] == ["f.yaml:2:1:", "f.yaml:4:1:"]


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\x85", "U+0085"),
        ("\u2028", "U+2028 (LINE SEPARATOR)"),
        ("\u2029", "U+2029 (PARAGRAPH SEPARATOR)"),
        ("\ufeff", "U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("\u202e", "U+202E (RIGHT-TO-LEFT OVERRIDE)"),
        ("\u2066", "U+2066 (LEFT-TO-RIGHT ISOLATE)"),
        ("\x01", "U+0001 (a control character)"),
        ("\x7f", "U+007F (a control character)"),
        ("\x9f", "U+009F (a control character)"),
        ("\ufffe", "U+FFFE"),
        ("\0", "a NUL byte"),
        ("\ud800", "half of a surrogate pair (U+D800)"),
    ],
)
def test_characters_that_cannot_be_seen(character: str, name: str) -> None:
    for text in (f"a: 1\r\nb: {character}", f"a: 1\rb: '{character}'", f"a: 1\n#  {character}"):
        (problem,) = refused(text)
        assert problem.startswith("f.yaml:2:")
        assert name in problem
        problem.encode()


def test_characters_that_can() -> None:
    text = "Điều 45 \u00a0 \t 日本 😀 العربية עברית \ue000"
    assert read(f"a: '{text}'").data == {"a": text}


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["[", "{a: ", "[{a: "])
def test_the_depth_limit(opening: str) -> None:
    (problem,) = refused("a: " + opening * 100_000)
    assert problem.endswith(f"more than {DEPTH_LIMIT} levels inside each other")


def test_depth_up_to_the_limit() -> None:
    inner = DEPTH_LIMIT - 1
    assert len(read("a: " + "[" * inner + "]" * inner).places) == DEPTH_LIMIT + 1 - 1
    assert len(refused("a: " + "[" * (inner + 1) + "]" * (inner + 1))) == 1


def test_the_limit_of_values() -> None:
    (problem,) = refused("a:\n" + "- 1\n" * 1_000_001)
    assert problem == "f.yaml:1000002:3: more than 1,000,000 values in one file: split it"


def test_the_limit_of_problems() -> None:
    problems = refused("a: 1\n" * 100_000)
    assert len(problems) == PROBLEM_LIMIT + 1
    assert problems[-1].endswith("1,000 problems up to here: the rest of the file was not read")


@pytest.mark.parametrize(
    "text",
    [
        "a: '" + "x" * 8_000_000 + "'",
        "a: " + "x " * 4_000_000,
        "a: " + "9" * 8_000_000,
        "a: 0x" + "f" * 8_000_000,
        "a: 1e" + "9" * 8_000_000,
        "a: !" + "x" * 8_000_000,
        "'" + "x\n" * 4_000_000,
        "x" * 8_000_000 + ": 1",
        "? " * 4_000_000,
        "- " * 4_000_000,
        "\t" * 8_000_000,
        "#\n" * 4_000_000,
        "%" * 8_000_000,
        "---\n" * 2_000_000,
        "*a : " * 1_000_000,
        "[" + "*a," * 1_000_000,
    ],
    ids=lambda text: text[:6],
)
def test_a_large_hostile_file_costs_seconds_at_most_and_says_little(text: str) -> None:
    start = time.perf_counter()
    _, problems = parse(text, "f.yaml")
    assert time.perf_counter() - start < 20
    assert len(problems) <= 3
    assert all(len(str(problem)) < 300 for problem in problems)


def test_ten_thousand_entries_are_no_matter() -> None:
    entry = '  queue.g{}.enabled:\n    value: "true"\n    from: ["false"]\n    lock: approval\n    reason: Text.\n'
    text = "gates:\n" + "".join(entry.format(number) for number in range(10_000))
    document = read(text)
    assert document.places["gates", "queue.g9999.enabled", "from", 0] == (49_999, 12)


def test_the_collector_is_as_it_was() -> None:
    for switch in (gc.disable, gc.enable):
        switch()
        try:
            for text in ("a: 1", "a: [", "a: *b"):
                enabled = gc.isenabled()
                parse(text, "f.yaml")
                assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_threads_do_not_meet() -> None:
    results: list[Any] = []
    texts = [f"a{number}: [{number}]\nb: {{}}\n" for number in range(8)]
    threads = [threading.Thread(target=lambda text=text: results.append(read(text).data)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.dumps(result) for result in results) == [f'{{"a{n}": [{n}], "b": {{}}}}' for n in range(8)]


# --- Any data, any text ----------------------------------------------------------------------------------------------

# What ruamel writes unescaped and we refuse to read is in `hidden`; surrogates and NUL are no text of PostgreSQL.
hidden = "\x85\u2028\u2029\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0" + hidden), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-SAFE_INTEGER, SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(
        ["true", "null", "~", "1", "0x1", "1e3", ".inf", "yes", "<<", "=", "- a", "a: b", "#", "", "&a", "2026-01-01"]
    )
)
data = st.dictionaries(
    texts,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=20
    ),
    max_size=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data)
def test_what_ruamel_writes_is_read_as_it_was(value: dict[str, Any]) -> None:
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    stream = io.StringIO()
    writer.dump(value, stream)
    document = read(stream.getvalue())
    assert document.data == value
    assert json.dumps(document.data, sort_keys=True) == json.dumps(value, sort_keys=True)  # 1 is not True, nor 1.0


@settings(max_examples=300, deadline=None)
@given(data)
def test_json_is_read_as_it_was(value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    for code in range(0x7F, 0xA0):  # JSON need not escape these
        text = text.replace(chr(code), f"\\u{code:04x}")
    assert read(text).data == value


pieces = st.sampled_from(
    [
        *("a", "b: ", ": ", "- ", "? ", "\n", "  ", "\t", "{", "}", "[", "]", ",", "'", '"', "|\n", ">", "#"),
        *("&a ", "*a", "!!str ", "!", "%", "@", "---\n", "...\n", "<<: ", "1", "true", "~", "é", "😀", "\\"),
        *("\r\n", "\r", "\x00", "\u2028", "\ufeff", "\\ud800"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(pieces | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_gives_data_with_places_or_a_problem_in_the_text(text: str) -> None:
    document, problems = parse(text, "f.yaml")
    assert document is not None or problems
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for problem in problems:
        str(problem).encode()
        assert problem.line is not None
        assert problem.column is not None
        assert 1 <= problem.line <= len(lines) + 1
        assert problem.column >= 1
        if problem.line <= len(lines):
            assert problem.column <= len(lines[problem.line - 1]) + 1
    if document is None:
        return
    json.dumps(document.data, allow_nan=False).encode()
    if not problems:
        canonical(document.data)
    for path, (line, column) in document.places.items():
        value = document.data
        for step in path:
            value = value[step]
        assert document.value_places[path] >= (line, column)
        if path and isinstance(path[-1], str) and path[-1].isalpha() and path[-1].isascii():
            assert path[-1] in lines[line - 1][column - 1 :]


# --- Models ----------------------------------------------------------------------------------------------------------


class Inner(Model):
    bind: str
    schema_name: str = Field(default="public", alias="schema")


class Cat(Model):
    kind: Literal["cat"]
    lives: int


class Dog(Model):
    kind: Literal["dog"]
    tricks: tuple[str, ...] = ()


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


Side = TypeAliasType("Side", Literal["left", "right"])


def as_it_is(inner: Inner) -> Inner:
    return inner


class Names(RootModel[tuple[str, ...]]):
    pass


class Entry(Model):
    value: str
    from_: tuple[str, ...] = Field(default=(), alias="from")
    lock: Literal["free", "approval", "locked"] = "free"
    rows: int | None = Field(default=None, ge=0, le=10)
    share: float = 0.5
    on: bool = False
    keys: dict[str, str] = {}
    args: dict[Annotated[str, Field(pattern="^[a-z]+$")], str | Inner] = {}
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    pair: tuple[str, int] = ("", 0)
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    form: Cat | Dog | None = None
    mixed: int | tuple[str, ...] | None = None
    names: Names | None = None
    size: Size = Size.SMALL
    side: Side = "left"
    checked: Annotated[Inner, AfterValidator(as_it_is)] | int = 0
    short: str = Field(default="x", min_length=1, max_length=3, pattern="^x")
    few: tuple[str, ...] = Field(default=("a",), min_length=1, max_length=2)

    @field_validator("keys")
    @classmethod
    def _no_blank(cls, keys: dict[str, str]) -> dict[str, str]:
        if any(not key.strip() for key in keys):
            raise ValueError("a key is blank")
        return keys

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if self.lock == "locked" and self.from_:
            raise ValueError("a locked entry has no `from`")
        return self


def judge(body: str) -> list[str]:
    """Problems of an entry `e` written in flow style, after `e: {value: "", `."""
    document = read("section:\n  e: {value: '', " + body + "}")
    _, problems = validate(Entry, document, ("section", "e"), document.data["section"]["e"], "f")
    return [str(problem) for problem in problems]


def test_lists_become_tuples_and_aliases_names() -> None:
    document = read(
        "e: {value: a, from: [b, c], rows: 3, share: 1, inners: [{bind: x, schema: s}], pair: [a, 1], names: [n]}"
    )
    entry, problems = validate(Entry, document, ("e",), document.data["e"], "f")
    assert problems == []
    assert entry is not None
    assert (entry.from_, entry.rows, entry.share, entry.pair) == (("b", "c"), 3, 1.0, ("a", 1))
    assert entry.inners == (Inner(bind="x", schema="s"),)
    assert entry.names == Names(("n",))


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        # Keys. The entry's own key is at 2:3, its first mapping key at 2:7, `body` starts at 2:18.
        ("form_: 1", ['2:18: unknown key "form_" (did you mean "form"?)']),
        ("from_: [a]", ['2:18: unknown key "from_" (did you mean "from"?)']),
        ("xyzzy: 1", ['2:18: unknown key "xyzzy"']),
        ("inner: {schema: a, bnd: b}", ['2:18: missing key "bind"', '2:37: unknown key "bnd" (did you mean "bind"?)']),
        ("inners: [{bind: a}, {}]", ['2:38: missing key "bind"']),
        ("inners: [{bind: a}, {bind: a, shema: b}]", ['2:48: unknown key "shema" (did you mean "schema"?)']),
        # Kinds of values, at the value.
        ("from: [true]", ['2:25: expected a quoted string, got the boolean true: write "true"']),
        ("from: [010, 0x1F, 1.50, 1e3]", [
            '2:25: expected a quoted string, got the number 010: write "010"',
            '2:30: expected a quoted string, got the number 0x1F: write "0x1F"',
            '2:36: expected a quoted string, got the number 1.50: write "1.50"',
            '2:42: expected a quoted string, got the number 1e3: write "1e3"',
        ]),
        ("from: [~]", ['2:25: expected a quoted string, got null: write "~"']),
        ("lock: ", ["2:24: expected one of free, approval, locked, got nothing"]),
        ("from: [[a], {b: c}]", ["2:25: expected a string, got a list", "2:30: expected a string, got a mapping"]),
        ("from: a", ['2:24: expected a list, got the text "a": write ["a"]']),
        ("from: 1", ["2:24: expected a list, got the number 1: write [1]"]),
        ("from: {a: b}", ["2:24: expected a list, got a mapping"]),
        ("inner: a", ['2:25: expected a mapping (key: value), got the text "a"']),
        ("inners: [[]]", ["2:27: expected a mapping (key: value), got a list"]),
        ("keys: [a]", ["2:24: expected a mapping (key: value), got a list"]),
        ("keys: {a: 1}", ['2:28: expected a quoted string, got the number 1: write "1"']),
        ("rows: '3'", ['2:24: expected a whole number, got the text "3": write 3 without quotes']),
        ("rows: three", ['2:24: expected a whole number, got the text "three"']),
        ("rows: 1.5", ["2:24: expected a whole number, got the number 1.5"]),
        ("rows: true", ["2:24: expected a whole number, got the boolean true"]),
        ("share: '.5'", ['2:25: expected a number, got the text ".5"']),
        ("share: '0.5'", ['2:25: expected a number, got the text "0.5": write 0.5 without quotes']),
        ("on: 'true'", ['2:22: expected true or false, got the text "true": write true without quotes']),
        ("on: yes", ['2:22: expected true or false, got the text "yes"']),
        ("on: 1", ["2:22: expected true or false, got the number 1"]),
        # Values.
        ("lock: no", ['2:24: expected one of free, approval, locked, got the text "no"']),
        ("lock: fre", ['2:24: expected one of free, approval, locked, got the text "fre" (did you mean "free"?)']),
        ("lock: true", ["2:24: expected one of free, approval, locked, got the boolean true"]),
        ("size: large", ['2:24: expected one of s, l, got the text "large"']),
        ("side: lefft", ['2:24: expected one of left, right, got the text "lefft" (did you mean "left"?)']),
        ("rows: -1", ["2:24: must be at least 0, this is the number -1"]),
        ("rows: 11", ["2:24: must be at most 10, this is the number 11"]),
        ("short: ''", ['2:25: must have at least 1 characters, this is the text ""']),
        ("short: xxxx", ["2:25: must have at most 3 characters"]),
        ("short: y", ['2:25: the text "y" does not match the pattern ^x']),
        ("few: []", ["2:23: must have at least 1 entries, this has 0"]),
        ("few: [a, b, c]", ["2:23: must have at most 2 entries, this has 3"]),
        ("pair: [a]", ['2:18: missing key "1"']),
        ("pair: [a, b]", ['2:28: expected a whole number, got the text "b"']),
        # Our own validators, in their own words: at the key of the mapping they judge.
        ("keys: {' ': a}", ["2:18: a key is blank"]),
        ("lock: locked, from: [a]", ["2:3: a locked entry has no `from`"]),
        # Keys of mappings that have rules of their own.
        ("args: {Aa: b}", ['2:25: key "Aa": the text "Aa" does not match the pattern ^[a-z]+$']),
        # Unions: one form's problems, never all.
        ("args: {a: 1}", ['2:28: expected a quoted string or a mapping (key: value), got the number 1: write "1"']),
        ("args: {a: [b]}", ["2:28: expected a string or a mapping (key: value), got a list"]),
        ("args: {a: {bnd: b}}", ['2:25: missing key "bind"', '2:29: unknown key "bnd" (did you mean "bind"?)']),
        ("args: {a: {bind: 1}}", ['2:35: expected a quoted string, got the number 1: write "1"']),
        ("mixed: a", ['2:25: expected a whole number or a list, got the text "a": write ["a"]']),
        ("mixed: [a, 1]", ['2:29: expected a quoted string, got the number 1: write "1"']),
        ("names: [1]", ['2:26: expected a quoted string, got the number 1: write "1"']),
        ("pet: {kind: cat, lives: nine}", ['2:42: expected a whole number, got the text "nine"']),
        ("pet: {kind: dog, tricks: [1]}", ['2:44: expected a quoted string, got the number 1: write "1"']),
        ("pet: {kind: cow}", ["2:23: the key 'kind' must be one of 'cat', 'dog', this is 'cow'"]),
        ("pet: {lives: 9}", ["2:23: missing key 'kind'"]),
        ("form: {kind: cat, lives: nine}", ['2:43: expected a whole number, got the text "nine"']),
        ("form: {kind: dog, trick: [a]}", ['2:36: unknown key "trick" (did you mean "tricks"?)']),
        ("form: [a]", ["2:24: expected a mapping (key: value), got a list"]),
        ("checked: {bind: [1]}", ["2:34: expected a string, got a list"]),
        ("checked: a", ['2:27: expected a mapping (key: value) or a whole number, got the text "a"']),
        # Several at once, in the order of the file.
        ("rows: a, lock: b, zzz: c, on: d", [
            '2:24: expected a whole number, got the text "a"',
            '2:33: expected one of free, approval, locked, got the text "b"',
            '2:36: unknown key "zzz"',
            '2:48: expected true or false, got the text "d"',
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_entry(body: str, problems: list[str]) -> None:
    assert judge(body) == [f"f:{problem}" for problem in problems]


def test_a_missing_key_is_reported_at_the_entry() -> None:
    document = read("section:\n  first: {}\n  second:\n    lock: free\n")
    for name, place in (("first", "f:2:3"), ("second", "f:3:3")):
        _, problems = validate(Entry, document, ("section", name), document.data["section"][name], "f")
        assert [str(problem) for problem in problems] == [f'{place}: missing key "value"']


def test_an_entry_that_is_no_mapping() -> None:
    document = read("a: text\nb:\nc: [1]\n")
    found = [validate(Entry, document, (name,), document.data[name], "f")[1][0] for name in "abc"]
    assert [str(problem) for problem in found] == [
        'f:1:4: expected a mapping (key: value), got the text "text"',
        "f:2:3: expected a mapping (key: value), got nothing",
        "f:3:4: expected a mapping (key: value), got a list",
    ]


def test_a_whole_file_can_be_one_model() -> None:
    document = read("# comment\nvalue: 1\nzzz: 2\n")
    _, problems = validate(Entry, document, (), document.data, "f")
    assert [str(problem) for problem in problems] == [
        'f:2:8: expected a quoted string, got the number 1: write "1"',
        'f:3:1: unknown key "zzz"',
    ]
    document = read("")
    _, problems = validate(Entry, document, (), document.data, "f")
    assert [str(problem) for problem in problems] == ['f:1:1: missing key "value"']


def test_what_a_variable_brought_is_reported_where_it_is_used() -> None:
    document = read("e:\n  value: a\n  from: {var: names}\n  inner: {var: inner}\n")
    data = {"value": "a", "from": ["b", 1], "inner": {"bind": {"x": 1}, "zzz": 2}}
    _, problems = validate(Entry, document, ("e",), data, "f")
    assert [str(problem) for problem in problems] == [
        'f:3:3: expected a quoted string, got the number 1: write "1"',
        "f:4:3: expected a string, got a mapping",
        'f:4:3: unknown key "zzz"',
    ]


def test_the_context_reaches_the_validators() -> None:
    class Contextual(Model):
        name: str

        @field_validator("name")
        @classmethod
        def _known(cls, name: str, info: Any) -> str:
            if name not in info.context:
                raise ValueError(f"{name} is not known")
            return name

    document = read("name: b")
    assert validate(Contextual, document, (), document.data, "f", {"b"})[1] == []
    (problem,) = validate(Contextual, document, (), document.data, "f", {"a"})[1]
    assert str(problem) == "f:1:7: b is not known"


def test_numbers_stay_what_they_are() -> None:
    class Numbers(Model):
        values: tuple[int | float, ...]

    document = read("values: [1, 1.0, 9007199254740991, 1e-7]")
    numbers, _ = validate(Numbers, document, (), document.data, "f")
    assert numbers is not None
    assert [type(value) for value in numbers.values] == [int, float, int, float]
    assert math.isclose(numbers.values[3], 1e-7)
