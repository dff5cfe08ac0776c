"""Below what listens: answers by HTTP, each in a thread of its own. Nothing here knows what is answered."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from reconciler.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

SLOW_READER = 10.0
"""Seconds that somebody who asks may take."""

LONGEST_BODY = 4096
"""Bytes of what somebody sends that are read."""

COOKIE = "reconciler"


@dataclass(frozen=True)
class Request:
    """What somebody asks. path: without the query. headers: names in small letters."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What is answered. sort: the Content-Type."""

    text: str = ""
    code: int = 200
    sort: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def address(text: str) -> tuple[str, int]:
    """`127.0.0.1:9187`, `[::1]:9187`, `localhost:0` as host and port. Raises UsageError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    good = bool(bare) and port.isascii() and port.isdigit() and int(port) < 65536 and (":" not in bare or bare != host)
    if not good:
        raise UsageError(f"--listen {text}: write host:port, for example 127.0.0.1:9187 or [::1]:9187.")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Is this an address that only the same machine reaches?"""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


@dataclass(frozen=True)
class Guard:
    """Who may ask. Without a token everybody who reaches a loopback address, but no page of another site.

    A program sends the token as `Authorization: Bearer`, a person types it once; then a cookie stands for it.
    """

    token: str | None

    def refused(self, request: Request) -> Answer | None:
        """What is answered in the place of the page; None: it is theirs to see."""
        if self.token is None:
            # A name that somebody lets point to 127.0.0.1 would make this page part of their site (DNS rebinding).
            # A browser leaves out port 80.
            host = re.sub(r":[0-9]*\Z", "", request.headers.get("host", "")).removeprefix("[").removesuffix("]")
            return None if is_loopback(host) else Answer("Ask by the address that was printed.\n", 421)
        if request.method == "POST" and request.path == "/login":
            given = parse_qs(request.body.decode("utf-8", "replace")).get("token", [""])[0]
            return self._welcome() if self._is_it(given) else Answer(_LOGIN.format("That is not it."), 403, _HTML)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_it(given.strip()):
            return None
        cookies = (part.strip().partition("=") for part in request.headers.get("cookie", "").split(";"))
        if any(name == COOKIE and hmac.compare_digest(value.encode(), self._stand_in) for name, _, value in cookies):
            return None
        return Answer(_LOGIN.format(""), 401, _HTML, {"WWW-Authenticate": "Bearer"})

    def _is_it(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    @property
    def _stand_in(self) -> bytes:
        return hmac.digest((self.token or "").encode(), b"reconciler cookie", hashlib.sha256).hex().encode()

    def _welcome(self) -> Answer:
        cookie = f"{COOKIE}={self._stand_in.decode()}; HttpOnly; SameSite=Strict; Path=/"
        return Answer("", 303, headers={"Location": "/", "Set-Cookie": cookie})


_HTML = "text/html; charset=utf-8"

_LOGIN = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>reconciler</title>
<form method="post" action="/login"><p><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Show the board</button></p><p role="alert">{}</p></form></html>
"""


@contextmanager
def serving(place: tuple[str, int], answer: Callable[[Request], Answer]) -> Generator[tuple[str, int]]:
    """While the block runs, requests are answered; yields host and port.

    Raises UsageError when nobody can listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = SLOW_READER
        server_version = "reconciler"
        sys_version = ""

        def do_GET(self) -> None:
            """A page, or its head."""
            self._answer()

        do_HEAD = do_POST = do_GET  # noqa: N815 - the names are http.server's

        def _answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            length = headers.get("content-length", "0")
            if not (length.isascii() and length.isdigit() and int(length) <= LONGEST_BODY):
                self.close_connection = True
                self._send(Answer("That is too long.\n", 413))
                return
            method = "GET" if self.command == "HEAD" else self.command
            self._send(answer(Request(method, self.path.partition("?")[0], headers, self.rfile.read(int(length)))))

        def _send(self, said: Answer) -> None:
            body = said.text.encode("utf-8", "backslashreplace")
            with suppress(OSError):  # who asked went away
                self.send_response(said.code)
                self.send_header("Content-Type", said.sort)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Content-Type-Options", "nosniff")
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - the signature is http.server's
            """Nothing: who asks every ten seconds would fill the log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = AF_INET6 if ":" in place[0] else ThreadingHTTPServer.address_family

        def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as above
            """Nothing: what a stranger sends is no trouble of ours."""

    try:
        server = Server(place, Handler)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {place[0]}:{place[1]}: {error.strerror or error}.", hint="Choose another with --listen."
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield place[0], int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
