"""`drift --notify`: who is told, when it fails, and that the URL, which may hold a secret, is never printed."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import notify
from tests.integration import governed
from tests.integration.governed import command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.governed import Governed
    from tests.servers import Database

SECRET = "/services/T000/B000/s3cr3t-t0ken"


class Receiver:
    """What was posted, and what is answered: codes in their order, the last one again and again. None: never."""

    def __init__(self, *answers: int | None, location: str = "") -> None:
        self.answers = list(answers)
        self.location = location
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.released = threading.Event()

    def answer(self) -> int | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def receiving(receiver: Receiver, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.posted.append((self.path, json.loads(body)))
            code = receiver.answer()
            if code is None:
                receiver.released.wait(60)
                return
            self.send_response(code)
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the name is http.server's

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as above
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_address[1]}{SECRET}"
    finally:
        receiver.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def post(url: str, **given: Any) -> list[float]:
    """Post something; the pauses that were made."""
    pauses: list[float] = []
    notify.post(url, {"text": "é"}, sleep=pauses.append, **given)
    return pauses


def refused(url: str, **given: Any) -> str:
    with pytest.raises(notify.NotNotified) as error:
        post(url, **given)
    message = error.value.message
    assert "s3cr3t" not in message + "".join(error.value.details) + error.value.hint
    assert error.value.__cause__ is None
    return message


def test_a_server_that_fails_twice_is_asked_three_times() -> None:
    receiver = Receiver(500, 503, 200)
    with receiving(receiver) as url:
        assert post(url) == [1.0, 4.0]
    assert receiver.posted == [(SECRET, {"text": "é"})] * 3


def test_a_server_that_always_fails() -> None:
    receiver = Receiver(500)
    with receiving(receiver) as url:
        assert "it answered 500 (3 attempts)" in refused(url)
    assert len(receiver.posted) == 3


@pytest.mark.parametrize("code", [400, 403, 404, 410])
def test_what_another_attempt_would_not_change_is_not_tried_again(code: int) -> None:
    receiver = Receiver(code)
    with receiving(receiver) as url:
        assert refused(url).endswith(f"it answered {code}.")
    assert len(receiver.posted) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int) -> None:
    elsewhere = Receiver(200)
    with receiving(elsewhere) as other:
        receiver = Receiver(code, location=other)
        with receiving(receiver) as url:
            assert "a redirect, which is not followed" in refused(url)
    assert (len(receiver.posted), elsewhere.posted) == (1, [])


def test_a_server_that_never_answers() -> None:
    receiver = Receiver(None)
    with receiving(receiver) as url:
        assert "no answer in time (3 attempts)" in refused(url, timeout=0.05)


def test_nobody_listens() -> None:
    with receiving(Receiver(200)) as url:
        pass
    assert "connection refused (3 attempts)" in refused(url)


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *made.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Receiver(200)
    with receiving(receiver, context) as url:
        assert "its certificate is not to be trusted (self" in refused(url)
        assert receiver.posted == []
        post(url, context=ssl.create_default_context(cafile=str(certificate)))
    assert len(receiver.posted) == 1


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def shop(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Governed:
    monkeypatch.setattr(notify, "PAUSES", (0.0, 0.0))
    system = governed.shop(db, tmp_path)
    system.settle()
    return system


def test_a_clean_run_and_a_drifted_one_are_told(shop: Governed) -> None:
    receiver = Receiver(200)
    with receiving(receiver) as url:
        clean = command("drift", "-s", shop.directory, "--notify", url, dsn=shop.db.dsn)
        shop.sql("UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RECONCILER_NOTIFY_URL", url)
            drifted = command("drift", "-s", shop.directory, dsn=shop.db.dsn)
    assert (clean.returncode, drifted.returncode, clean.stderr, drifted.stderr) == (0, 2, "", "")
    first, second = (document for _, document in receiver.posted)
    assert first["text"].startswith("shop on test: no drift at 20")
    assert (second["outcome"], second["counts"]) == ("drift", {"drift": 1})
    assert "• drift: gate.shop.limit: changed since the last apply" in second["text"]
    assert "s3cr3t" not in clean.stdout + drifted.stdout + json.dumps([first, second])


def test_that_nobody_could_be_told_is_said_and_changes_the_exit_code_only_on_demand(shop: Governed) -> None:
    receiver = Receiver(500)
    with receiving(receiver) as url:
        done = command("drift", "-s", shop.directory, "--notify", url, dsn=shop.db.dsn)
        required = command("drift", "-s", shop.directory, "--notify", url, "--notify-required", dsn=shop.db.dsn)
    assert (done.returncode, required.returncode) == (0, 1)
    for one in (done, required):
        assert "No drift at" in one.stdout
        assert one.stderr.startswith("Warning: The report could not be posted to the URL of --notify: it answered 500")
        assert "s3cr3t" not in one.stdout + one.stderr


def test_that_nobody_could_look_is_told_too(shop: Governed, tmp_path: Path) -> None:
    receiver = Receiver(200)
    dsn = "host=/nowhere dbname=none password=hunter2"
    with receiving(receiver) as url:
        out = tmp_path / "reconciler.prom"
        good = ("drift", "-s", shop.directory, "--format", "prometheus", "--out", out)
        assert command(*good, dsn=shop.db.dsn).stdout == ""
        before = out.read_text()
        done = command(*good, "--notify", url, dsn=dsn)
    assert (done.returncode, done.stdout) == (1, "")
    ((_, document),) = receiver.posted
    assert document["outcome"] == "error"
    assert document["text"].startswith("shop on test: not checked at 20")
    assert "hunter2" not in json.dumps(document) + done.stderr
    after = out.read_text()
    assert 'reconciler_up{governance="shop",target="test"} 0\n' in after
    kept = [line for line in before.splitlines() if line.startswith("reconciler_last")]
    assert len(kept) == 2
    assert [line for line in after.splitlines() if line.startswith("reconciler_last")] == kept
    assert "reconciler_drift_items" not in after
    assert [path.name for path in tmp_path.iterdir() if "prom" in path.name] == ["reconciler.prom"]


def test_options_that_do_not_go_together(shop: Governed) -> None:
    for options, words in (
        (["--notify-required"], "--notify-required needs a URL"),
        (["--notify", "file:///s3cr3t"], "--notify needs a URL"),
        (["--listen", "127.0.0.1:0"], "Add --every 5m"),
        (["--every", "5m", "--to-state"], "--to-state writes once"),
        (["--every", "often"], "is no duration"),
        (["--every", "10ms"], "is too often"),
        (["--every", "5m", "--listen", "9187"], "write host:port"),
    ):
        done = command("drift", "-s", shop.directory, *options, dsn=shop.db.dsn)
        assert (done.returncode, done.stdout) == (1, ""), options
        assert words in done.stderr
        assert "s3cr3t" not in done.stderr


def test_reports_for_machines_from_the_database(shop: Governed, tmp_path: Path) -> None:
    shop.sql("UPDATE app.settings SET value = '11' WHERE name = 'shop.limit'")
    metrics = command("drift", "-s", shop.directory, "--format", "prometheus", dsn=shop.db.dsn)
    assert metrics.returncode == 2
    assert 'reconciler_drift_items{governance="shop",target="test",class="drift"} 1\n' in metrics.stdout
    out = tmp_path / "junit.xml"
    done = command("drift", "-s", shop.directory, "--format", "junit", "--out", out, dsn=shop.db.dsn)
    assert (done.returncode, done.stdout) == (2, "")
    text = out.read_text()
    assert text.count("<testcase ") == 9
    assert text.count("<failure ") == 1
    refused = command("drift", "-s", shop.directory, "--out", tmp_path / "no" / "x", dsn=shop.db.dsn)
    assert (refused.returncode, "Cannot write" in refused.stderr) == (1, True)
