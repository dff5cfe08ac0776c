"""Beside the tests: headless Chromium, told what to do over a pipe (its DevTools protocol), to look at a report.

Debian's package `chromium`. Nothing is downloaded, and no page is asked for but files and what this machine serves.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from io import FileIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """One page. `said`: console messages and errors; `asked`: every address it asked for, its own file apart."""

    def __init__(self, reading: FileIO, writing: FileIO) -> None:
        self._reading = reading
        self._writing = writing
        self._rest = b""
        self._number = 0
        self._session = ""
        self._loaded = ""
        self.said: list[str] = []
        self.asked: list[str] = []
        (target,) = [one for one in self._ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self._ask("Page.setLifecycleEventsEnabled", enabled=True)

    def open(self, file: Path | str) -> None:
        """Load a file, or an address on this machine, and wait until it and all that it asks for are there."""
        address = file if isinstance(file, str) else file.resolve().as_uri()
        self._loaded = ""
        frame = self._ask("Page.navigate", url=address)["loaderId"]
        while self._loaded != frame:
            self._next()
        self.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame)).then(() => 0)")
        self.asked = [one for one in self.asked if one != address]

    def look(self, width: int, *, dark: bool, phone: bool = False, paper: bool = False) -> None:
        """From now on: a window this wide, in CSS pixels, in a light or dark theme, perhaps on paper."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[theme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return done["result"].get("value")

    def until(self, expression: str, limit: float = 60.0) -> Any:
        """The value of a JavaScript expression, as soon as it has one. limit: seconds."""
        deadline = time.monotonic() + limit
        while not (value := self.evaluate(f"document.readyState === 'complete' && ({expression})")):
            if time.monotonic() > deadline:
                raise TimeoutError(expression)
            time.sleep(0.05)
        return value

    def key(self, name: str, text: str = "") -> None:
        """Press and release one key, as somebody without a mouse does."""
        for sort in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9, " ": 32}.get(name, 0)
            self._ask("Input.dispatchKeyEvent", type=sort, key=name, text=text, windowsVirtualKeyCode=code)

    def tree(self) -> list[tuple[str, str]]:
        """What a screen reader is told of the page: role and name of every part that is not left out."""
        nodes = self._ask("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the whole page, or of the window."""
        made = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(made["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._reading.read(2**16)
            if not data:
                raise RuntimeError("Chromium ended.")
            self._rest += data
        head, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(head)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.said.append(str([one.get("value") for one in params["args"]]))
            case "Runtime.exceptionThrown":
                self.said.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.said.append(params["entry"]["text"])
            case "Page.lifecycleEvent" if params["name"] == "networkIdle":
                self._loaded = params["loaderId"]
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case _:
                pass
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with one empty page. profile: a directory of its own."""
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("There is no Chromium: apt-get install chromium.")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    # The protocol's pipes are descriptors 3 and 4: a shell gives them to the program by number (sh knows none above 9).
    words = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program]
    browser = subprocess.Popen(
        [*words, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with FileIO(ours_in, "r") as reading, FileIO(ours_out, "w") as writing:
            yield Page(reading, writing)
    finally:
        browser.terminate()
        browser.wait(timeout=30)
