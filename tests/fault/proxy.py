"""Between a client and PostgreSQL: a proxy that knows the messages of the protocol, and stops or cuts the line at any.

A client sends a statement as one message (Query) or as several that end with Sync, and the server ends each answer with
ReadyForQuery. So there are two moments for each statement: *before* the server has it, and *after* the server has done
it but before the client knows. Connecting counts as a statement without text.
"""

from __future__ import annotations

import select
import shutil
import socket
import struct
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Server

PORT = 5432  # only part of the socket's name
CANCEL, SSL, GSS = 80877102, 80877103, 80877104


@dataclass(frozen=True)
class Moment:
    """One place where the line can break. `number` counts from 1 over all sessions of the proxy."""

    number: int
    when: Literal["before", "after"]
    text: str
    pid: int
    """Of the backend; 0 before it is known."""

    def __str__(self) -> str:
        words = " ".join(self.text.split())
        return f"{self.number} {self.when} {words[:60] or 'connecting'}"


class Cut(Exception):
    """Ends a session: both sides are closed."""


class Side:
    """One end of the line: what was received and not taken yet."""

    def __init__(self, own: socket.socket) -> None:
        self.socket = own
        self.received = b""

    def read(self, count: int) -> bytes:
        """So many bytes, as soon as they are there. Raises ConnectionError when the other end is gone."""
        while len(self.received) < count:
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError
            self.received += more
        data, self.received = self.received[:count], self.received[count:]
        return data

    def message(self) -> tuple[bytes, bytes]:
        """One message: its kind, and all of it."""
        head = self.read(5)
        return head[:1], head + self.read(struct.unpack_from("!I", head, 1)[0] - 4)

    def start(self) -> bytes:
        """The first message of a session, after any question for encryption was answered with no."""
        while True:
            head = self.read(4)
            start = head + self.read(struct.unpack("!I", head)[0] - 4)
            if struct.unpack_from("!I", start, 4)[0] not in {SSL, GSS}:
                return start
            self.socket.sendall(b"N")

    def request(self) -> tuple[bytes, str]:
        """What a client sends until it waits for an answer, and the statement in it."""
        whole, text = b"", ""
        while True:
            kind, message = self.message()
            whole += message
            body = message[5:]
            if kind == b"Q":
                return whole, body.rstrip(b"\0").decode()
            if kind == b"P":
                text = body.split(b"\0")[1].decode()
            if kind in {b"S", b"X"}:
                return whole, text


@dataclass
class Line:
    """One session. What a watcher may do with it at a moment."""

    client: Side
    server: Side
    pid: int = 0
    pending: bytes = b""
    """Not passed on yet: at `before` what the client sent, at `after` what the server answered."""
    towards: Side | None = None
    """Who waits for it."""
    application: str = ""

    def cut(self, passing: int = 0) -> NoReturn:
        """Pass on the first bytes of what is pending, then break the line for good."""
        with suppress(OSError):
            if self.towards is not None:
                self.towards.socket.sendall(self.pending[:passing])
            if self.towards is self.server and passing:
                # A socket that is closed with something unread in it takes back what was sent (unix(7), ECONNRESET),
                # and a server may say something at any time.
                self.client.socket.shutdown(socket.SHUT_RDWR)
                self.server.socket.shutdown(socket.SHUT_WR)
                while self.server.socket.recv(65536):
                    pass
        raise Cut

    def hang_up(self) -> None:
        """The client is gone, as the server would see it when its process was killed."""
        for side in (self.client, self.server):
            with suppress(OSError):
                side.socket.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Listens on a socket in a private directory; every session has its thread."""

    def __init__(self, server: Server, watch: Callable[[Moment, Line], None], *, aside: str = "") -> None:
        """`watch` is called at every moment, in the thread of the session; it may wait, and it may cut.

        aside: sessions with this application_name have no moments: what they send, and when, is chance.
        """
        self._address = f"{server.host}/.s.PGSQL.{server.port}"
        self._watch = watch
        self._aside = aside
        self._directory = Path(tempfile.mkdtemp(prefix="proxy-"))
        self._numbers = threading.Lock()
        self._number = 0
        self._lines: list[Line] = []
        self._threads: list[threading.Thread] = []
        self.refusing = False
        """New sessions are closed at once, as by a server that is away."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / f".s.PGSQL.{PORT}"))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def dsn(self, dbname: str, user: str = "postgres") -> str:
        return make_conninfo(host=str(self._directory), port=PORT, user=user, dbname=dbname)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for line in self._lines:
            line.hang_up()
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._directory)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError, Cut):
            line = Line(Side(client), Side(server))
            self._lines.append(line)
            self._talk(line)

    def _talk(self, line: Line) -> None:
        start = line.client.start()
        if struct.unpack_from("!I", start, 4)[0] == CANCEL:
            line.server.socket.connect(self._address)
            line.server.socket.sendall(start)
            return
        parts = start[8:].split(b"\0")
        line.application = dict(zip(parts[::2], parts[1::2], strict=False)).get(b"application_name", b"").decode()
        self._turn(line, start, "")
        while True:
            message, text = line.client.request()
            if message[:1] == b"X":
                line.server.socket.sendall(message)
                return
            self._turn(line, message, text)

    def _turn(self, line: Line, message: bytes, text: str) -> None:
        """One statement and its answer."""
        line.pending, line.towards = message, line.server
        self._moment(line, "before", text)
        if not line.pid:
            # Not sooner: a connection that says nothing keeps a server from stopping for a minute.
            line.server.socket.connect(self._address)
        line.server.socket.sendall(message)
        try:
            line.pending, line.towards = _answer(line), line.client
        except EndOfAnswer as end:
            # What the server said before it went away belongs to the client.
            line.client.socket.sendall(end.said)
            raise Cut from None
        self._moment(line, "after", text)
        line.client.socket.sendall(line.pending)

    def _moment(self, line: Line, when: Literal["before", "after"], text: str) -> None:
        if self._aside and line.application == self._aside:
            return
        with self._numbers:
            self._number += 1
            moment = Moment(self._number, when, text, line.pid)
        self._watch(moment, line)


class EndOfAnswer(Exception):
    """The server closed the line before its answer was whole."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self.said = said


def _answer(line: Line) -> bytes:
    """What the server says until it is ready for more. Raises EndOfAnswer, and Cut when the client left."""
    said = b""
    while True:
        if not line.server.received:
            ready, _, _ = select.select([line.client.socket, line.server.socket], [], [])
            if line.server.socket not in ready:
                raise Cut
        try:
            kind, message = line.server.message()
        except OSError:
            raise EndOfAnswer(said) from None
        said += message
        if kind == b"K":
            line.pid = struct.unpack_from("!I", message, 5)[0]
        if kind == b"Z":
            return said
