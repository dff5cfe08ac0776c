"""What listens without a token answers who asks for this machine, by whatever name, and nobody else."""

from __future__ import annotations

import pytest

from reconciler.web import Guard, Request


@pytest.mark.parametrize("host", ["127.0.0.1:9188", "localhost:80", "[::1]:9188", "127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_answered(host: str) -> None:
    assert Guard(None).refused(Request("GET", "/", {"host": host})) is None


@pytest.mark.parametrize(
    "host", ["", ":", ":80", "example.org", "example.org:80", "127.0.0.1.example.org:9188", "127.0.0.1:80:80", "[::1"]
)
def test_another_name_is_not(host: str) -> None:
    refused = Guard(None).refused(Request("GET", "/", {"host": host}))
    assert refused is not None
    assert refused.code == 421
