"""The board for who asks by HTTP: read anew now and then; what was read last stays when that fails."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from reconciler.errors import ReconcilerError
from reconciler.fleet import board
from reconciler.model import digest
from reconciler.web import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from reconciler.fleet.report import FleetReport
    from reconciler.web import Guard, Request

HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


@dataclass
class Source:
    """What `read` gave, for `keep` seconds; then it is asked again. trouble: why that failed, None when it did not."""

    read: Callable[[], FleetReport]
    keep: float
    clock: Callable[[], float] = time.monotonic
    found: FleetReport | None = None
    trouble: str = ""
    _asked_at: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def newest(self) -> tuple[FleetReport | None, str]:
        """The report, and what is to be said of it. One reader at a time asks, the others wait for it."""
        with self._lock:
            if self._asked_at is None or self.clock() - self._asked_at >= self.keep:
                try:
                    self.found, self.trouble = self.read(), ""
                except ReconcilerError as error:
                    self.trouble = error.message
                self._asked_at = self.clock()
            return self.found, self.trouble


def pages(source: Source, guard: Guard, refresh: int) -> Callable[[Request], Answer]:
    """`/` is the board, `/report.json` the report, `/healthz` says that somebody is there. refresh: seconds."""

    def answer(request: Request) -> Answer:  # noqa: PLR0911 - one per answer
        if (request.method, request.path) == ("GET", "/healthz"):
            return Answer("ok\n")
        if refused := guard.refused(request):
            return Answer(refused.text, refused.code, refused.sort, {**HEADERS, **refused.headers})
        if request.method != "GET":
            return Answer("There is nothing to write to.\n", 405, headers={"Allow": "GET, HEAD"})
        if request.path not in {"/", "/report.json"}:
            return Answer("There is /, /report.json and /healthz.\n", 404)
        found, trouble = source.newest()
        if found is None:
            return Answer(f"{trouble}\n", 503, headers=HEADERS)
        if request.path == "/report.json":
            return Answer(
                f"{found.model_dump_json(by_alias=True, indent=2)}\n", sort="application/json", headers=HEADERS
            )
        tag = f'"{digest([found.dump(), trouble])[:32]}"'
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Answer(code=304, headers=headers)
        told = f"Not newer than this: {trouble}" if trouble else ""
        page = board.html(found, datetime.now(UTC), refresh=refresh, trouble=told)
        return Answer(page, sort="text/html; charset=utf-8", headers=headers)

    return answer
