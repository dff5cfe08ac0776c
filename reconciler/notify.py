"""Beside `drift`: posts a report as JSON to a URL that may hold a secret, and so is never printed.

A redirect is not followed: the report would go to somebody nobody named. Certificates are checked.
"""

from __future__ import annotations

import json
import queue
import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from reconciler import __version__
from reconciler.errors import ReconcilerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from http.client import HTTPMessage
    from typing import IO

    from reconciler.drift import DriftReport
    from reconciler.model import JsonObject

TIMEOUT = 10.0
"""Seconds for a connection, and for an answer."""

PAUSES = (1.0, 4.0)
"""Seconds before the second attempt, and before the third."""

MOST_ITEMS = 20
"""Of the items of a report, so many are named in the text; the rest are counted."""


class NotNotified(ReconcilerError):
    """The report could not be posted."""


class _Final(Exception):
    """Asking again would not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0913, PLR0917 - the signature is urllib's
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """None: the answer is then an error."""


def check(url: str) -> None:
    """Raises UsageError, without the URL, for one that nothing could be posted to."""
    holds_user = False
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        holds_user = "@" in parts.netloc
    except ValueError:
        usable = False
    if not usable or any(char.isspace() or not char.isprintable() for char in url):
        raise UsageError("--notify needs a URL that begins with https:// or http:// and names a host.")
    if holds_user:
        raise UsageError(
            "--notify: a user before the host is not sent.",
            hint="Put what the server asks for into the path or the query.",
        )


def post(
    url: str,
    document: JsonObject,
    *,
    sleep: Callable[[float], None],
    timeout: float = TIMEOUT,
    context: ssl.SSLContext | None = None,
) -> None:
    """Post the document; three attempts where another may help. Raises NotNotified, without the URL.

    sleep: waits so many seconds. timeout: in seconds, of each attempt for a connection and again for an answer.
    context: by whose certificates a server is believed; the system's when None.
    """
    opener = urllib.request.build_opener(
        _NoRedirect, urllib.request.HTTPSHandler(context=context or ssl.create_default_context())
    )
    body = json.dumps(document, ensure_ascii=True).encode()
    headers = {"Content-Type": "application/json", "User-Agent": f"reconciler/{__version__}"}
    said = ""
    for pause in (0.0, *PAUSES):
        if pause:
            sleep(pause)
        try:
            said = _in_time(opener, urllib.request.Request(url, body, headers, method="POST"), timeout)  # noqa: S310
        except _Final as final:
            raise NotNotified(f"The report could not be posted to the URL of --notify: {final}.") from None
        if not said:
            return
    raise NotNotified(
        f"The report could not be posted to the URL of --notify: {said} ({1 + len(PAUSES)} attempts)."
    ) from None


def _in_time(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> str:
    """As `_attempt`, and as a whole no longer than twice the time-out.

    A socket's own time-out begins anew with each byte, and a server may send one now and then for ever.
    """
    answers: queue.SimpleQueue[str | _Final] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_attempt(opener, request, timeout))
        except _Final as final:
            answers.put(final)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=2 * timeout)
    except queue.Empty:
        return "no answer in time"
    if isinstance(found, _Final):
        raise found
    return found


def _attempt(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> str:
    """Nothing when it was taken, else what went wrong. Raises _Final when another attempt would end the same way.

    What libraries say may quote the URL, so these are our words.
    """
    try:
        with opener.open(request, timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            raise _Final(f"it answered {error.code}, a redirect, which is not followed") from None
        if error.code < 500 and error.code not in {408, 429}:
            raise _Final(f"it answered {error.code}") from None
        return f"it answered {error.code}"
    except urllib.error.URLError as error:
        return _reason(error.reason)
    except (HTTPException, OSError, ValueError) as error:
        return _reason(error)


def _reason(reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise _Final(f"its certificate is not to be trusted ({reason.verify_message})") from None
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror.lower()
    return type(reason).__name__


def of_report(report: DriftReport) -> JsonObject:
    """What is posted of a report, a clean one too: `text` for Slack and its like, the rest for programs."""
    counts: dict[str, int] = {}
    for item in report.items:
        counts[item.item_class] = counts.get(item.item_class, 0) + 1
    where = f"{report.name} on {report.target.name}"
    word = {"violated": "violated", "drift": "drift"}.get(report.outcome, "no drift")
    lines = [f"{where}: {word} at {report.checked_at}"]
    lines += [", ".join(f"{number} {name}" for name, number in counts.items())] * bool(counts)
    named = [item for item in report.items if item.fails]
    lines += [f"• {item.item_class}: {item.address}: {item.reason}" for item in named[:MOST_ITEMS]]
    lines += [f"and {len(named) - MOST_ITEMS} more"] * (len(named) > MOST_ITEMS)
    return {
        "text": _plain("\n".join(lines)),
        "format_version": report.format_version,
        "outcome": report.outcome,
        "name": report.name,
        "target": report.target.dump(),
        "checked_at": report.checked_at,
        "counts": counts,
        "items": [
            {"class": item.item_class, "address": item.address, "reason": item.reason, "next": item.todo}
            for item in named
        ],
    }


def of_error(name: str, target: str, error: ReconcilerError, at: str) -> JsonObject:
    """What is posted when nobody could look."""
    return {
        "text": _plain(f"{name} on {target}: not checked at {at}: {error.message}"),
        "outcome": error.outcome,
        "name": name,
        "target": {"name": target},
        "checked_at": at,
        "errors": [error.message, *error.details],
    }


def _plain(text: str) -> str:
    """Slack's own escapes: a name from the database mentions nobody and is no link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
