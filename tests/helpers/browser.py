"""A headless browser, if one is installed: opens a page and runs JavaScript in it."""

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

from tests.helpers.jobs import terminate

PAGE_TEXT = """(body => {
    body.querySelectorAll("script, style").forEach(part => part.remove());
    return body.textContent.replace(/\\s+/g, " ");
})(document.body ? document.body.cloneNode(true) : document.createElement("body"))"""
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in COMMANDS if (path := shutil.which(name))), None)


class Browser:
    """One page in a headless Chromium, controlled by the DevTools protocol."""

    def __init__(self, profile: Path, height: int = 900, width: int = 1280) -> None:
        path = find_browser()
        if path is None:
            pytest.skip(f"no browser is installed (looked for {', '.join(COMMANDS)})")
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
        port_file, limit = profile / "DevToolsActivePort", time.monotonic() + 180
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
        """Exceptions and console errors of the page, including violations of its content security policy."""
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
        """Send a command of the protocol and return its result."""
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
        limit = time.monotonic() + 180
        while self.run("document.readyState + location.href") != "complete" + page.as_uri():
            assert time.monotonic() < limit, "the page does not load"
            time.sleep(0.05)

    def visit(self, url: str, *texts: str, limit_s: float = 180) -> str:
        """Load a page, wait until it contains all the texts and return all of its text."""
        self.call("Page.navigate", url="about:blank")  # changing only the fragment would load nothing
        self.call("Page.navigate", url=url)
        limit = time.monotonic() + limit_s
        while missing := [text for text in texts if text not in (shown := self.run(PAGE_TEXT))]:
            assert time.monotonic() < limit, f"{missing} are not shown by {url} within {limit_s:.0f} s, but: {shown}"
            time.sleep(0.5)
        return shown

    def until(self, script: str, what: str, limit_s: float = 180) -> None:
        """Wait until an expression is true in the page."""
        limit = time.monotonic() + limit_s
        while not self.run(script):
            assert time.monotonic() < limit, f"waited {limit_s:.0f} s for {what}; the page shows: {self.run(PAGE_TEXT)}"
            time.sleep(0.2)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def set_download_folder(self, folder: Path) -> None:
        """Set the folder for downloads."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def wait_until_unchanged(self, seconds: float = 2.0, limit_s: float = 60) -> None:
        """Wait until the page's text and images have not changed for `seconds`, at most `limit_s`."""
        script = f"({PAGE_TEXT}).length + ' ' + [...document.images].map(i => i.complete && i.naturalWidth).join()"
        end, since, before = time.monotonic() + limit_s, time.monotonic(), None
        while time.monotonic() - since < seconds and time.monotonic() < end:
            if (now := self.run(script)) != before:
                before, since = now, time.monotonic()
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        """A PNG image of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Close the browser."""
        terminate(self._process)
