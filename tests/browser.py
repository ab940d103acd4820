"""A headless Chromium, driven by its DevTools protocol through two pipes: no package needed.

with open_browser(folder) as browser:
    browser.open(page)
    browser.run("document.title")
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
_FIRST_FREE = 10  # file descriptor: 3 and 4 are what Chromium reads and writes
_TIMEOUT_S = 240  # on a machine with other things to do


def find_chromium() -> str | None:
    """Chromium's program; None where there is none."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


@contextlib.contextmanager
def open_browser(folder: Path, width: int = 1400, height: int = 1500) -> Iterator[Browser]:
    """Start Chromium with a new profile in a folder; end it. Skips where there is none.

    With GEOT_BROWSER=1 in the environment it fails there.
    """
    program = find_chromium()
    if program is None:
        if os.environ.get("GEOT_BROWSER") == "1":
            pytest.fail("GEOT_BROWSER=1, but there is no Chromium")
        pytest.skip("there is no Chromium")
    to_browser, from_browser = _pipe(), _pipe()
    given = to_browser[0], from_browser[1]
    process = subprocess.Popen(
        [program, *_FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"],
        preexec_fn=lambda: (os.dup2(given[0], 3), os.dup2(given[1], 4)),
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in given:
        os.close(end)
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        for end in (to_browser[1], from_browser[0]):
            os.close(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _pipe() -> tuple[int, int]:
    """Both ends of a pipe, reading and writing, with numbers that are not in the way."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, _FIRST_FREE) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


class Browser:
    """One tab.

    Attributes:
        complaints: Texts of errors of the pages so far. (Warnings come from slow graphics too.)
        requests: Addresses that the pages asked for, but those that hold their own content.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._received = b""
        self._calls = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, and wait for its answer."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._write, rest) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            more = os.read(self._read, 2**16)
            assert more, "Chromium has ended"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._note(found.get("method", ""), found.get("params", {}))
        return found

    def _note(self, method: str, content: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "assert"):
            self.complaints.append(json.dumps(content["args"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.complaints.append(content["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {content['message']}")
        elif method == "Network.requestWillBeSent":
            address = content["request"]["url"]
            if not address.startswith(("data:", "blob:")):
                self.requests.append(address)

    def open(self, file: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.call("Page.navigate", url=file.as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _TIMEOUT_S
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key, such as "ArrowLeft" or "+"."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, selector: str | None = None, path: Path | None = None) -> np.ndarray:
        """What is seen of an element, or of the window: float [height, width, 3] from 0 to 1."""
        # Two frames: in the second one is what was drawn before.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        clip = {}
        if selector is not None:
            box = self.run(
                f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height}}"
                f"))(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
            )
            clip = {"clip": {**box, "scale": 1}, "captureBeyondViewport": True}
        data = base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"])
        if path is not None:
            path.write_bytes(data)
        return np.asarray(imread(io.BytesIO(data)))[..., :3]
