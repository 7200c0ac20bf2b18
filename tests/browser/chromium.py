"""A real Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from websockets.sync.client import ClientConnection, connect

HOW_TO_GET = "scripts/test-browser installs it; on Debian: apt-get install chromium"
ANSWER_S = 30.0


@dataclass
class Tab:
    """One page. `problems` are what its console, its network and its security policy complained of."""

    socket: ClientConnection
    problems: list[str] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    """Bytes of the bodies that came over the network, uncompressed, by URL; the largest answer of each."""
    _urls: dict[str, str] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _asked: int = 0

    def command(self, method: str, **parameters: object) -> dict[str, Any]:
        """Sends a command and returns its result; reads the events that come before it."""
        self._asked += 1
        self.socket.send(json.dumps({"id": self._asked, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(ANSWER_S))
            if message.get("id") == self._asked:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, which is one that JSON can hold."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.await_true(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def await_true(self, expression: str, within_s: float = 15.0) -> None:
        def holds() -> bool:
            try:
                return bool(self.run(f"Boolean({expression})"))
            except AssertionError:
                # The page is being replaced.
                return False

        eventually(holds, within_s=within_s)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def look_like(self, width: int, theme: str) -> None:
        """A window of this width, and a user who prefers this theme."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def picture(self, file: Path) -> None:
        """Saves the whole page as a PNG."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        method, details = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(details["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(details["args"])[:500])
        elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(details["entry"])[:500])
        elif method == "Network.responseReceived":
            self._urls[details["requestId"]] = details["response"]["url"]
        elif method == "Network.dataReceived":
            self._sizes[details["requestId"]] = self._sizes.get(details["requestId"], 0) + details["dataLength"]
        elif method == "Network.loadingFinished" and details["requestId"] in self._urls:
            url = self._urls[details["requestId"]]
            self.received[url] = max(self.received.get(url, 0), self._sizes.get(details["requestId"], 0))


@contextmanager
def browsing(home: Path) -> Iterator[Tab]:
    """A Chromium with one empty tab and a profile in `home`, which ends with the block."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.fail(f"no chromium: {HOW_TO_GET}")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
    with (home / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [binary, *flags, f"--user-data-dir={home / 'profile'}", "about:blank"], stdout=log, stderr=log
        )
    try:
        with _tab(home / "profile") as tab:
            yield tab
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _tab(profile: Path) -> Iterator[Tab]:
    told = profile / "DevToolsActivePort"
    eventually(lambda: told.exists() and len(told.read_text().splitlines()) == 2, within_s=30.0)
    port, path = told.read_text().splitlines()
    with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as browser:
        target = Tab(browser).command("Target.createTarget", url="about:blank")["targetId"]
        with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.command(f"{domain}.enable")
            yield tab
