"""What listens: who may ask, and what nobody gets by asking otherwise."""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING

import pytest

from reconciler import web
from reconciler.web import Answer, Guard, Request

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN = "correct horse battery staple"


def seen(guard: Guard, **headers: str) -> int:
    """200 for who may see the page, else the code of the answer."""
    refused = guard.refused(Request("GET", "/", headers))
    return 200 if refused is None else refused.code


# ------------------------------------------------------------------------------------------------------- without token


@pytest.mark.parametrize("host", ["127.0.0.1:9188", "localhost:9188", "[::1]:9188", "127.9.9.9:1"])
def test_a_loopback_address_is_for_everybody_who_reaches_it(host: str) -> None:
    assert seen(Guard(None), host=host) == 200


@pytest.mark.parametrize("host", ["board.example.org:9188", "127.0.0.1.example.org:9188", "10.0.0.1:9188", "", ":80"])
def test_a_page_of_another_site_is_not_answered(host: str) -> None:
    """Its name was made to point to this machine (DNS rebinding); the browser still says which name it asked."""
    assert seen(Guard(None), host=host) == 421


# ---------------------------------------------------------------------------------------------------------- with token


@pytest.mark.parametrize("sent", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer  {TOKEN} "])
def test_who_has_the_token_may_ask_from_anywhere(sent: str) -> None:
    assert seen(Guard(TOKEN), host="board.example.org", authorization=sent) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "127.0.0.1:9188"},
        {"authorization": TOKEN},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": f"reconciler={TOKEN}"},
        {"cookie": "reconciler="},
        {"cookie": "reconciler"},
        {"cookie": "reconciler=é"},
    ],
)
def test_who_has_not_is_asked_for_it(headers: Mapping[str, str]) -> None:
    assert seen(Guard(TOKEN), **headers) == 401


def test_a_person_types_it_once() -> None:
    guard = Guard(TOKEN)
    wrong = guard.refused(Request("POST", "/login", {}, b"token=wrong"))
    assert wrong is not None
    assert (wrong.code, "Set-Cookie" in wrong.headers) == (403, False)
    right = guard.refused(Request("POST", "/login", {}, b"token=correct+horse+battery+staple"))
    assert right is not None
    assert (right.code, right.headers["Location"]) == (303, "/")
    cookie, _, how = right.headers["Set-Cookie"].partition("; ")
    assert TOKEN not in cookie
    assert how == "HttpOnly; SameSite=Strict; Path=/"
    assert seen(guard, cookie=f"theme=dark; {cookie}") == 200
    assert seen(guard, cookie=f"x{cookie}") == 401
    assert seen(Guard("another token altogether"), cookie=cookie) == 401
    for body in (b"", b"token=", b"token", b"\xff\xfe", b"token=%00"):
        refused = guard.refused(Request("POST", "/login", {}, body))
        assert refused is not None
        assert refused.code == 403


# ------------------------------------------------------------------------------------------------------------ the wire


def test_what_is_sent_is_read_only_so_far() -> None:
    asked: list[Request] = []

    def answer(request: Request) -> Answer:
        asked.append(request)
        return Answer("said\n", headers={"X-More": "1"})

    with web.serving(("127.0.0.1", 0), answer) as (host, port):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request("POST", "/a?b=c", body=b"x" * web.LONGEST_BODY, headers={"X-Given": "Yes"})
        found = connection.getresponse()
        assert (found.status, found.read(), found.getheader("X-More")) == (200, b"said\n", "1")
        assert found.getheader("X-Content-Type-Options") == "nosniff"
        assert (asked[0].path, asked[0].headers["x-given"], len(asked[0].body)) == ("/a", "Yes", web.LONGEST_BODY)
        for length in (str(web.LONGEST_BODY + 1), "-1", "1e3", "٣"):
            with socket.create_connection((host, port), timeout=60) as line:
                line.sendall(f"POST / HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
                assert line.recv(65536).split()[1] == b"413"
        connection.request("DELETE", "/")
        assert connection.getresponse().status == 501
    assert len(asked) == 1


def test_a_page_that_fails_ends_no_other() -> None:
    def answer(request: Request) -> Answer:
        return Answer(str(1 // len(request.path.strip("/"))))

    with web.serving(("127.0.0.1", 0), answer) as (host, port):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request("GET", "/")
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request("GET", "/x")
        assert connection.getresponse().read() == b"1"
