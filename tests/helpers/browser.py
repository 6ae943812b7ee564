"""A headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol) with the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# The browser reads commands from descriptor 3 and answers on 4.
_START = """
import os, sys
high = [os.dup(int(number)) for number in sys.argv[1:3]]
for place, number in enumerate([os.dup(number) for number in high], 3):
    os.dup2(number, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab: commands, and what went wrong in it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._held, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Send one command and return its result; events that come meanwhile are noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, *, dark: bool = False) -> None:
        """Load a file and wait until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setDeviceMetricsOverride", width=1280, height=1000, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while True:
            event = self._next()
            self._note(event)
            if event.get("method") == "Page.loadEventFired":
                return

    def run(self, script: str) -> Any:
        """Evaluate an expression, or a promise of one."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def hover(self, selector: str) -> None:
        """Move the mouse over an element."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = self.run(f"(() => {{ const b = document.querySelector('{selector}').getBoundingClientRect();"
                       "return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def press(self, key: str) -> None:
        """Press and release one key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self) -> bytes:
        """Return the window as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser is gone"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"request: {parameters['request']['url']}")
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(parameters))


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """Start a browser whose profile lies in `folder`."""
    assert CHROMIUM is not None
    (child_in, to_browser), (from_browser, child_out) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-Sc", _START, str(child_in), str(child_out), CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(child_in, child_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (child_in, child_out):
        os.close(end)
    try:
        yield Page(to_browser, from_browser)
    finally:
        for end in (to_browser, from_browser):
            os.close(end)
        process.terminate()
        process.wait(timeout=30)
