"""What `drift --to-state` does: drift -> the state files, changed so that they say what is live. For a pull request.

Only what differs is written, character by character, so comments, order and style stay. Each change is tried on a copy
of the directory first: what does not load, or would say something else than what is live, is left out and named.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ruamel.yaml import YAML

from reconciler import desired as desires
from reconciler.drift import Accepted, NotWritten
from reconciler.errors import InputError, UsageError
from reconciler.kinds import kinds
from reconciler.model import Absent
from reconciler.plan import replace_file
from reconciler.yamltext import FORBIDDEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reconciler.drift import Item
    from reconciler.kinds import Writing
    from reconciler.model import Address, Declared, Desired, Json, Live

RETIRED = "Taken out of the database by hand; accepted."
"""The reason that stands in the files until a person writes a better one."""


def to_state(
    directory: Path, wanted: Desired, live: Live, manifest: Mapping[str, Json], items: Sequence[Item]
) -> Accepted:
    """Write what drifted into the files of `directory`. Raises UsageError for a file that cannot be written.

    items: of the report. manifest: the ledger's; without it nobody knows what drifted, and nothing is written.
    """
    changed: dict[Path, str | None] = {}
    written: list[Address] = []
    not_written: list[NotWritten] = []
    sources = desires.sources(directory)
    for item in items:
        if item.item_class not in {"drift", "both"} or (item.item_class == "both" and _accepted(item, wanted)):
            continue
        try:
            edits = _edits(directory, item, wanted, live, manifest, sources, changed)
        except ValueError as reason:
            not_written.append(NotWritten(address=item.address, reason=str(reason)))
            continue
        changed |= edits
        written.append(item.address)
    for path, text in sorted(changed.items()):
        if text is None:
            _remove(path)
        else:
            replace_file(path.resolve(), text.encode(), private=False)
    return Accepted(
        written=tuple(written), files=tuple(str(path) for path in sorted(changed)), not_written=tuple(not_written)
    )


def _accepted(item: Item, wanted: Desired) -> bool:
    """Do the files say already what is live?"""
    return item.address in wanted.items and item.wanted == item.after


def _edits(  # noqa: PLR0913, PLR0917 - one object, what is known of it, and what was changed before
    directory: Path,
    item: Item,
    wanted: Desired,
    live: Live,
    manifest: Mapping[str, Json],
    sources: Mapping[str, Path],
    changed: Mapping[Path, str | None],
) -> dict[Path, str | None]:
    """The files with this object as it is live; None for one that goes. Raises ValueError with a sentence."""
    if item.address not in manifest:
        raise ValueError("what was last applied is not known, so it may be only pending")
    if item.item_class == "both":
        raise ValueError("the files changed since the last apply too, and say something else: decide which is right")
    declared = wanted.items[item.address]
    if declared.place is None:
        raise ValueError("no file declares it")
    kind = kinds()[declared.kind]
    source = sources.get(declared.name) if declared.kind == "function" else None

    def text_of(path: Path) -> str:
        text = changed[path] if path in changed else path.read_bytes().decode()
        if text is None:
            raise ValueError(f"{path} is taken away with another object")
        return text

    writing = kind.accept(
        declared,
        live.items.get(item.address),
        kind.load_rules(manifest[item.address]["rules"]),
        text_of(source) if source is not None else "",
    )
    file = Path(declared.place.file)
    edits: dict[Path, str | None] = {file: written_entry(text_of(file), kind.section, declared.name, writing)}
    if source is not None and writing.source is not None:
        edits[source] = writing.source
    if source is not None and writing.retired and list(sources.values()).count(source) == 1:
        edits[source] = None
    _try(directory, {**changed, **edits}, wanted.target, declared, live)
    return {path: text for path, text in edits.items() if text is None or text != path.read_bytes().decode()}


def _try(directory: Path, changed: Mapping[Path, str | None], target: str, declared: Declared, live: Live) -> None:
    """Would the files load, and say of this object what is live? Raises ValueError."""
    with tempfile.TemporaryDirectory(prefix="reconciler-") as place:
        copy = Path(place) / "state"
        _copied(directory, copy)
        for path, text in changed.items():
            inside = copy / path.relative_to(directory)
            inside.unlink()  # it may be a link, and what it leads to is none of the copy
            if text is not None:
                inside.write_bytes(text.encode())
        try:
            loaded = desires.load(copy, target)
        except InputError as error:
            message = error.problems[0].message
            raise ValueError(f"the files would not be valid any more: {message}") from None
    item = loaded.items.get(declared.address)
    there = live.items.get(declared.address)
    same = item is not None and (isinstance(item.spec, Absent) if there is None else item.spec == there)
    if not same:
        raise ValueError("no file can say what is live")


def _copied(directory: Path, copy: Path) -> None:
    """The files and links of the directory; what is neither (a pipe, say) nobody reads. Raises UsageError."""

    def neither(folder: str, names: list[str]) -> list[str]:
        paths = [Path(folder, name) for name in names]
        return [path.name for path in paths if not (path.is_symlink() or path.is_file() or path.is_dir())]

    try:
        shutil.copytree(directory, copy, symlinks=True, ignore=neither)
    except OSError as error:
        raise UsageError(f"Cannot copy {directory}, to try the changes: {error.strerror or error}.") from None


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise UsageError(f"Cannot remove {path}: {error.strerror}.") from None


# ------------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class _Edit:
    """Characters from `start` to `end` become `text`."""

    start: int
    end: int
    text: str


def written_entry(text: str, section: str, name: str, writing: Writing) -> str:
    """The YAML text with the entry `section.name` changed, and everything else as it is.

    Raises ValueError with a sentence when a value stands in a variable.
    """
    if not writing.retired and not writing.keys:
        return text
    root: _Node = cast("Any", YAML(typ="safe", pure=True)).compose(text)
    entry = _value(_value(root, section), name)
    if entry is None or entry.id != "mapping":
        raise ValueError("its entry is not one that can be changed")
    if writing.retired:
        retired = f"retire: {_quoted(RETIRED)}"
        flow = bool(entry.flow_style)
        edits = [_Edit(entry.start_mark.index, _end(text, entry), f"{{{retired}}}" if flow else retired)]
        kept = _pairs(entry).get("store")
        if kept is not None:
            raise ValueError("its entry names a store: retire it by hand")
    else:
        edits = [_set(text, entry, key, value) for key, value in writing.keys.items()]
    # From the end, so that the places of the others stay; two at one place in the order they were made.
    edits.reverse()
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


_Node: TypeAlias = Any
"""A node of ruamel.yaml, which has no types: its `id` says if it is a mapping, a sequence or a scalar."""


def _pairs(node: _Node) -> dict[str, _Node]:
    return {str(key.value): value for key, value in node.value}


def _value(node: _Node, name: str) -> _Node:
    return _pairs(node).get(name) if node is not None and node.id == "mapping" else None


def _end(text: str, node: _Node) -> int:
    """Where the node ends: of a block, after its last value, and not after the comments that follow."""
    if node.id == "scalar" or node.flow_style or not node.value:
        end = int(node.end_mark.index)
    else:
        last = node.value[-1]
        end = _end(text, last[1] if node.id == "mapping" else last)
    while end > node.start_mark.index and text[end - 1].isspace():
        end -= 1
    return end


def _set(text: str, entry: _Node, key: str, value: Json) -> _Edit:
    """The edit that gives the key this value, or adds it after the others."""
    node = _pairs(entry).get(key)
    if node is not None and node.id == "mapping":
        raise ValueError(f"its `{key}` is a variable, which other entries and targets share")
    if node is not None:
        return _Edit(node.start_mark.index, _end(text, node), _written(value))
    last = _end(text, list(_pairs(entry).values())[-1])
    if entry.flow_style:
        quote = '"' if text[entry.start_mark.index + 1 :].lstrip().startswith('"') else ""
        return _Edit(last, last, f", {quote}{key}{quote}: {_written(value)}")
    line_end = re.compile(r"\r?\n|$").search(text, last)
    at = last if line_end is None else line_end.start()
    newline = "\r\n" if "\r\n" in text else "\n"
    return _Edit(at, at, f"{newline}{' ' * entry.start_mark.column}{key}: {_written(value)}")


def _written(value: Json) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_written(item) for item in cast('list[Json]', value))}]"
    if value is None:
        return "null"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """In double quotes; what must not stand in a file as it is becomes an escape that YAML and JSON share."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return FORBIDDEN.sub(escaped, json.dumps(text, ensure_ascii=False))
