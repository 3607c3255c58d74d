"""A web server that breaks as told: for sources that must live with real ones."""

import contextlib
import dataclasses
import http.server
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator


@dataclasses.dataclass
class File:
    """What the server has at one path."""

    body: bytes
    ranges: bool = True
    script: deque[object] = dataclasses.field(default_factory=deque)
    """One entry for each of the next requests: a status, (status, headers), ("cut", bytes), "reset", ("slow",
    seconds), "ignore range", or None for a sound answer, as are all later ones."""


class Server:
    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.asked: Counter[str] = Counter()
        self.seen: list[tuple[float, str, dict[str, str]]] = []
        self.busy = self.busiest = 0
        self.delay_seconds = 0.0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self  # pyright: ignore[reportAttributeAccessIssue]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path: str, body: bytes, *script: object, ranges: bool = True) -> str:
        self.files[path] = File(body, ranges, deque(script))
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up, as one does after a cut answer, is no news; all else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        owner: Server = self.server.owner  # pyright: ignore[reportAttributeAccessIssue]
        with owner.lock:
            owner.asked[self.path] += 1
            owner.seen.append((time.monotonic(), self.path, dict(self.headers)))
            owner.busy += 1
            owner.busiest = max(owner.busiest, owner.busy)
        try:
            time.sleep(owner.delay_seconds)
            with contextlib.suppress(OSError):
                self._answer(owner.files.get(self.path))
        finally:
            with owner.lock:
                owner.busy -= 1

    def _answer(self, file: File | None) -> None:
        if file is None:
            return self._send(404, {}, b"nothing here")
        act = file.script.popleft() if file.script else None
        if isinstance(act, int):
            return self._send(act, {}, b"no")
        if isinstance(act, tuple) and isinstance(act[0], int):
            return self._send(act[0], act[1], b"no")
        if act == "reset":
            return self._reset()
        body, status, headers = file.body, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and file.ranges and act != "ignore range":
            start = int(asked[1])
            if start >= len(body):
                return self._send(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body = body[start:]
        if isinstance(act, tuple) and act[0] == "cut":
            self._head(status, headers, len(body))
            self.wfile.write(body[: act[1]])
            return self._reset()
        if isinstance(act, tuple) and act[0] == "slow":
            self._head(status, headers, len(body))
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(act[1])
            return None
        return self._send(status, headers, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, headers, len(body))
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str], size: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        time.sleep(0.01)  # a reset drops what the client has not read
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()


@contextlib.contextmanager
def running() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()
