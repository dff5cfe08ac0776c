"""Beside the flow: values that only the server and the machine that applies may know; all others see an HMAC.

Pure but for `key` and `value`, which read the environment and files.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import stat
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from pydantic import field_validator, model_validator

from reconciler.errors import UsageError
from reconciler.model import Model, canonical

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reconciler.model import Address, Json

KEY = "RECONCILER_SECRET_KEY"
KEY_FILE = "RECONCILER_SECRET_KEY_FILE"
PREFIX = "RECONCILER_VALUE_"
DIRECTORY = "RECONCILER_VALUE_DIR"

SHORTEST_KEY = 32
"""Bytes: as many as the HMAC has."""

LONGEST = 65_536
"""Bytes of a value, and of a key."""

STAND_IN = "a rehearsal has no secrets"
"""What a scratch database holds in the place of a value."""

DOMAIN = "reconciler/secret/1"


class Source(Model):
    """Where the value of a secret gate comes from: a variable, or a file below the directory RECONCILER_VALUE_DIR."""

    env: str | None = None
    file: str | None = None

    @field_validator("env")
    @classmethod
    def _ours(cls, name: str | None) -> str | None:
        """Files of a stranger must not name any other variable: a password of the one who runs, say."""
        if name is not None and (not re.fullmatch(rf"{PREFIX}[A-Z0-9_]+", name) or name == DIRECTORY):
            raise ValueError(
                f"the variable must be named {PREFIX} and more of A-Z, 0-9 and _, for example {PREFIX}TOKEN"
            )
        return name

    @field_validator("file")
    @classmethod
    def _below(cls, name: str | None) -> str | None:
        """Only the one who runs says where values lie."""
        if name is None:
            return name
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the path must be relative to the directory {DIRECTORY}, without ..")
        return name

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.env is None) == (self.file is None):
            raise ValueError("write exactly one of `env` and `file`")
        return self

    def __str__(self) -> str:
        """In words, without a value."""
        return f"variable {self.env}" if self.env is not None else f"file {self.file} below {DIRECTORY}"


class Sealed(Model):
    """In the place of a value: its HMAC-SHA-256, and the fingerprint of the key. None: as the files say it, unread."""

    hmac: str | None = None
    key: str | None = None


class Key:
    """The key of all HMACs; it is never printed."""

    __slots__ = ("_secret", "fingerprint")

    def __init__(self, secret: bytes) -> None:
        """`secret`: at least SHORTEST_KEY bytes."""
        self._secret = secret
        self.fingerprint = self._of(["reconciler/secret-key/1"])[:16]

    def seal(self, address: Address, table: str, text: str) -> Sealed:
        """The HMAC, bound to the gate and its table: nobody sees that two gates hold the same."""
        return Sealed(hmac=self._of([DOMAIN, address, table, text]), key=self.fingerprint)

    def _of(self, parts: list[str]) -> str:
        return hmac.new(self._secret, canonical(parts), hashlib.sha256).hexdigest()


def key() -> Key | None:
    """The key from the environment or its file; None when nobody gives one, an empty variable included.

    Raises UsageError for one that is too short or cannot be read.
    """
    given, file = os.environ.get(KEY) or None, os.environ.get(KEY_FILE) or None
    if given is not None and file is not None:
        raise UsageError(f"{KEY} and {KEY_FILE} are both set.", hint="Set one of them.")
    if given is None and file is None:
        return None
    name, secret = (KEY, os.fsencode(given)) if given is not None else (KEY_FILE, _key_file(str(file)))
    if len(secret) < SHORTEST_KEY:
        raise UsageError(
            f"The key of {name} is shorter than {SHORTEST_KEY} bytes.", hint="Make one: openssl rand -hex 32"
        )
    return Key(secret)


@cache
def _key_file(path: str) -> bytes:
    """Once: it may be a pipe."""
    try:
        with Path(path).open("rb") as file:
            return _without_newline(file.read(LONGEST))
    except OSError as error:
        raise UsageError(f"Cannot read the file of {KEY_FILE}: {error.strerror}.") from None


def value(source: Source, address: Address) -> str | None:
    """The value itself; None when nobody gives one, an empty variable included. A file's last newline is not its part.

    Raises UsageError, which names the source and never the value, for what no gate can hold, and for a file that
    lies elsewhere.
    """
    if source.env is not None:
        given = os.environ.get(source.env) or None
        return None if given is None else _text(os.fsencode(given), source, address)
    directory = os.environ.get(DIRECTORY) or None
    if directory is None:
        return None
    place = Path(directory)
    if not (place.is_absolute() and place.is_dir()):
        raise UsageError(f"{DIRECTORY} is no absolute path of a directory.")
    root = place.resolve()
    file = (root / str(source.file)).resolve()
    if not file.is_relative_to(root):
        raise UsageError(
            f"{address}: {source} is a link that leads out of the directory.", hint=f"Put the value below {DIRECTORY}."
        )
    data = _file(file, source, address)
    return None if data is None else _text(_without_newline(data), source, address)


def apart(declared_in: Path) -> None:
    """The files that say where values are must not lie among them, nor the values among those files.

    Who proposes a change of the files must not be able to bring values of their own, and see which one is equal.
    Raises UsageError.
    """
    directory = os.environ.get(DIRECTORY) or None
    if directory is None:
        return
    values, files = Path(directory).resolve(), declared_in.resolve().parent
    if files.is_relative_to(values) or values.is_relative_to(files):
        raise UsageError(
            f"{DIRECTORY} and {declared_in} lie inside of each other.", hint="Keep values apart from the state."
        )


def _file(path: Path, source: Source, address: Address) -> bytes | None:
    """Resolved before; a link or a pipe that was put there meanwhile is not opened."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{address}: cannot read {source}: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise UsageError(f"{address}: {source} is no ordinary file.")
    with os.fdopen(opened, "rb") as file:
        return file.read(LONGEST + 3)


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data


def _text(data: bytes, source: Source, address: Address) -> str:
    """Bytes as a text that PostgreSQL can hold. Raises UsageError."""
    wrong = ""
    if not data:
        wrong = "is empty"
    elif len(data) > LONGEST:
        wrong = f"is longer than {LONGEST} bytes"
    elif b"\0" in data:
        wrong = "contains a NUL character, which PostgreSQL cannot store"
    else:
        try:
            return data.decode()
        except UnicodeDecodeError:
            wrong = "is not UTF-8"
    raise UsageError(f"{address}: {source} {wrong}.")


class Unspoken:
    """The secret values that a connection has seen, so that no text in which one of them can be heard is repeated.

    An error of the server quotes rows, whole or the beginning of each column; a trigger or a function can say anything.
    """

    SHORTEST = 4
    """Characters: what is shorter stands in every other text by chance."""

    PIECE = 12
    """Characters at an end of a longer value that are enough to know it by."""

    def __init__(self) -> None:
        """Nothing was seen, and nothing was sent."""
        self._marks: set[str] = set()
        self._values: set[str] = set()
        self.sent = False
        """Was a value sent? From then on nothing of the server's words is repeated on this connection."""

    def add(self, text: str) -> None:
        """A value was seen."""
        if len(text) >= self.PIECE:
            self._values.add(text)
        for part in {text, *text.splitlines()}:
            for form in _forms(part):
                if len(form) >= self.SHORTEST:
                    self._marks |= {form} if len(form) <= self.PIECE else {form[: self.PIECE], form[-self.PIECE :]}

    def heard_in(self, text: str) -> bool:
        """Is a value, or the beginning or end of one, in the text, plainly or in a usual spelling?"""
        return any(mark in text for mark in self._marks)

    def held_by(self, thing: Json) -> bool:
        """Is a whole value, one that is long enough not to be there by chance, in a text of this JSON?"""
        if isinstance(thing, str):
            return any(text in thing for text in self._values)
        if isinstance(thing, list | tuple):
            return any(self.held_by(part) for part in cast("list[Json]", thing))
        return isinstance(thing, dict) and self.held_by([*cast("dict[str, Json]", thing).values()])

    def without(self, text: str) -> str:
        """The text, or a sentence in its place."""
        return "(not shown: it quotes the value of a secret gate)" if self.heard_in(text) else text


def _forms(text: str) -> Iterator[str]:
    """The text as it stands in JSON, in Python, in SQL, and in what encode() makes of it."""
    data = text.encode()
    yield text
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]
    yield text.replace("'", "''")
    yield text.replace('"', '""')
    yield data.hex()
    yield data.hex().upper()
    yield base64.b64encode(data).decode().rstrip("=")
