"""A headless browser, where one is installed: opens a page from its file and runs JavaScript in it."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

SHOWN = """(body => {
    body.querySelectorAll("script, style").forEach(part => part.remove());
    return body.textContent.replace(/\\s+/g, " ");
})(document.body ? document.body.cloneNode(true) : document.createElement("body"))"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in a headless Chromium, spoken to over its own debugging protocol."""

    def __init__(self, profile: Path, height: int = 900, width: int = 1280) -> None:
        path = find_browser()
        if path is None:
            pytest.skip(f"no browser is installed (looked for {', '.join(NAMES)})")
        self._process = subprocess.Popen(
            [
                path,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--window-size={width},{height}",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        port_file, limit = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.exists() and "\n" in port_file.read_text()):
            if self._process.poll() is not None or time.monotonic() > limit:
                self.close()
                pytest.skip("the browser does not start on this machine")
            time.sleep(0.1)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        self._connect(port, target["webSocketDebuggerUrl"])
        self._number = 0
        self.problems: list[str] = []
        """Exceptions and errors that the page's console was told, the policy's refusals among them."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _connect(self, port: int, url: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=300)
        key = base64.b64encode(os.urandom(16)).decode()
        path = re.sub(r"^ws://[^/]+", "", url)
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._stream.readline()
        accepted = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        assert base64.b64encode(accepted) in head

    def _send(self, text: str) -> None:
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        length = (
            bytes([0x80 | size])
            if size < 126
            else struct.pack("!BH" if size < 65536 else "!BQ", 0x80 | (126 if size < 65536 else 127), size)
        )
        self._socket.sendall(b"\x81" + length + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def _receive(self) -> dict[str, Any]:
        data, last = b"", False
        while not last:
            first, second = self._stream.read(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
            data += self._stream.read(size)
            last = bool(first & 0x80)
        return json.loads(data)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        self._send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"]["entry"]["text"])
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]

    def open(self, page: Path) -> None:
        """Load a file and wait until its script has run."""
        self.call("Page.navigate", url=page.as_uri())
        limit = time.monotonic() + 60
        while self.run("document.readyState + location.href") != "complete" + page.as_uri():
            assert time.monotonic() < limit, "the page does not load"
            time.sleep(0.05)

    def visit(self, url: str, *texts: str, limit_s: float = 180) -> str:
        """Load a page whose scripts fetch what it shows, wait until all the texts stand in it, give its whole text."""
        self.call("Page.navigate", url="about:blank")  # a change of the part behind `#` alone would load nothing
        self.call("Page.navigate", url=url)
        limit = time.monotonic() + limit_s
        while missing := [text for text in texts if text not in (shown := self.run(SHOWN))]:
            assert time.monotonic() < limit, f"{missing} are not shown by {url} within {limit_s:.0f} s, but: {shown}"
            time.sleep(0.5)
        return shown

    def until(self, script: str, what: str, limit_s: float = 180) -> None:
        """Wait until an expression is true in the page."""
        limit = time.monotonic() + limit_s
        while not self.run(script):
            assert time.monotonic() < limit, f"waited {limit_s:.0f} s for {what}; the page shows: {self.run(SHOWN)}"
            time.sleep(0.2)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, pressed as a person does."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def downloads_to(self, folder: Path) -> None:
        """Where what the page saves goes."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def still(self, seconds: float = 2.0, limit_s: float = 60) -> None:
        """Wait until the page's text and pictures have stayed as they are for so long."""
        script = f"({SHOWN}).length + ' ' + [...document.images].map(i => i.complete && i.naturalWidth).join()"
        end, since, before = time.monotonic() + limit_s, time.monotonic(), None
        while time.monotonic() - since < seconds and time.monotonic() < end:
            if (now := self.run(script)) != before:
                before, since = now, time.monotonic()
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        """What the page looks like."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
