"""A server that is asked to take a report and does all but that; a URL whose half would be dropped."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from reconciler import notify
from reconciler.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def dripping() -> Generator[str]:
    """A server that sends its answer letter by letter, each long before a time-out, and ends after hundreds."""
    over = threading.Event()

    def answer(conn: socket.socket) -> None:
        with conn, suppress(OSError):
            conn.sendall(b"HTTP/1.0 200 OK\r\nX: ")
            for _ in range(400):
                if over.wait(0.01):
                    return
                conn.sendall(b"a")
            conn.sendall(b"\r\n\r\n")

    def serve() -> None:
        with suppress(OSError):
            while True:
                conn, _ = server.accept()
                threading.Thread(target=answer, args=(conn,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            over.set()


def test_an_answer_that_never_ends_is_not_waited_for() -> None:
    with dripping() as url, pytest.raises(notify.NotNotified, match=r"no answer in time \(3 attempts\)"):
        notify.post(url, {}, sleep=lambda _seconds: None, timeout=0.2)


@pytest.mark.parametrize("who", ["user:secret@", "user@", "@"])
def test_a_user_in_the_url_is_refused_and_not_dropped(who: str) -> None:
    with pytest.raises(UsageError) as refused:
        notify.check(f"https://{who}example.org/hook")
    assert "a user before the host is not sent" in refused.value.message
    assert "secret" not in f"{refused.value.message} {refused.value.hint}"


def test_an_at_sign_behind_the_host_is_taken() -> None:
    notify.check("https://example.org/hook/@here?to=a@example.org")
