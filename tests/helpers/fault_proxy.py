"""An S3 server for tests with failing requests: moto behind an HTTP proxy that breaks a seeded fraction of them.

As a fixture: `with faulty_s3(fraction=0.2) as s3: ...`, with `s3.environment` in the environment. As a command:
`python -m tests.helpers.fault_proxy --fraction 0.2 --port 9900 --bucket images`. Whether a request fails depends on
the seed, the request and how often it was sent before, not on the order of threads and processes.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

KINDS: Mapping[str, str] = {
    "internal_error": "500 InternalError, nothing was done",
    "slow_down": "503 SlowDown, nothing was done",
    "silence": "the request is taken, no answer comes, nothing was done",
    "reset": "the connection is reset, nothing was done",
    "lost_answer": "the request is carried out, then the connection is reset before any answer",
    "reset_headers": "the request is carried out, the connection is reset in the middle of the headers",
    "reset_body": "the connection is reset in the middle of the body",
    "stalled_body": "the body stops in the middle and the connection stays open",
    "cut_body": "the body ends in the middle, with the Content-Length of all of it, and the connection is closed",
    "slow_body": "the complete body, in small pieces over `slow_seconds`",
}
_BODY_KINDS = ("reset_body", "stalled_body", "cut_body", "slow_body")
_PIECES = 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "proxy-connection"}


@dataclasses.dataclass
class FaultPlan:
    """Which requests break. All fields may be changed while the proxy runs."""

    fraction: float = 0.2
    """Fraction of requests that break, 0 to 1."""
    seed: int = 0
    kinds: Sequence[str] = tuple(KINDS)
    """Kinds of faults, equally frequent."""
    methods: Sequence[str] | None = None
    """Only these HTTP methods break; None for all."""
    match: str = ""
    """Only requests whose path and query contain this."""
    max_in_a_row: int | None = 3
    """The same request (method, path, query, range) never breaks more than this many times in a row."""
    silence_seconds: float = 60.0
    """How long `silence` and `stalled_body` hold the connection, unless the client gives up first."""
    slow_seconds: float = 1.0
    """Duration of a `slow_body`."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request that the proxy received."""

    method: str
    path: str
    range: str | None
    fault: str | None


class FaultProxy:
    """The proxy in front of a server; thread-safe. `endpoint` is the faulty URL, `upstream` the one without faults."""

    def __init__(self, upstream: str, plan: FaultPlan | None = None, *, port: int = 0) -> None:
        self.upstream = upstream
        self.plan = plan or FaultPlan()
        self.seen: list[Seen] = []
        self._times: collections.Counter[str] = collections.Counter()
        self._in_a_row: collections.Counter[str] = collections.Counter()
        self._script: dict[str, collections.deque[str | None]] = collections.defaultdict(collections.deque)
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Number of broken requests by kind, without zeros."""
        with self._lock:
            return dict(collections.Counter(seen.fault for seen in self.seen if seen.fault is not None))

    @property
    def requests(self) -> int:
        return len(self.seen)

    @property
    def broken(self) -> int:
        return sum(self.counts.values())

    def script(self, method: str, *faults: str | None) -> None:
        """Break the next requests of a method in this way, None for no fault; then the plan continues."""
        self._script[method].extend(faults)

    def clear_script(self) -> None:
        """Remove the remaining scripted faults."""
        self._script.clear()

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Break nothing within the block."""
        fraction, self.plan.fraction = self.plan.fraction, 0.0
        try:
            yield
        finally:
            self.plan.fraction = fraction

    def draw(self, method: str, path: str, byte_range: str | None) -> str | None:
        """The fault of this request, if any."""
        plan, identity = self.plan, f"{method} {path} {byte_range}"
        with self._lock:
            self._times[identity] += 1
            fault = None
            if self._script[method]:
                fault = self._script[method].popleft()
            elif (
                (plan.methods is None or method in plan.methods)
                and plan.match in path
                and (plan.max_in_a_row is None or self._in_a_row[identity] < plan.max_in_a_row)
            ):
                text = f"{plan.seed} {self._times[identity]} {identity}"
                value, kind = struct.unpack("<QQ", hashlib.blake2b(text.encode(), digest_size=16).digest())
                if value < plan.fraction * 2.0**64:
                    fault = plan.kinds[kind % len(plan.kinds)]
            self._in_a_row[identity] = self._in_a_row[identity] + 1 if fault else 0
            self.seen.append(Seen(method, path, byte_range, fault))
        return fault

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that disconnect are expected."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        proxy = self.server.proxy
        fault = proxy.draw(self.command, self.path, self.headers.get("Range"))
        body = self._body()
        if fault == "internal_error":
            return self._refuse(500, "InternalError")
        if fault == "slow_down":
            return self._refuse(503, "SlowDown")
        if fault == "silence":
            return self._stay_silent()
        if fault == "reset":
            return self._reset()
        status, reason, headers, answer = self._forward(body)
        if fault == "lost_answer" or (fault in _BODY_KINDS and len(answer) < 2 and fault != "slow_body"):
            return self._reset()
        head = f"HTTP/1.1 {status} {reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
        if fault == "reset_headers":
            self._send(head[: len(head) // 2].encode("latin-1"))
            return self._reset()
        self._send(head.encode("latin-1"))
        half = len(answer) // 2
        if fault == "slow_body":
            piece = max(1, -(-len(answer) // _PIECES))
            for start in range(0, len(answer), piece):
                self._send(answer[start : start + piece])
                if proxy.closing.wait(proxy.plan.slow_seconds / _PIECES):
                    break
        elif fault in _BODY_KINDS:
            self._send(answer[:half])
            if fault == "reset_body":
                # Let the client read the first half: a reset drops what it has not read.
                time.sleep(0.01)
                self._reset()
            elif fault == "stalled_body":
                self._stay_silent()
            self.close_connection = True
        else:
            self._send(answer)
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _serve

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            data = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return bytes(data)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        """(status, reason, headers, body) of the upstream server's response."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        for again in (True, False):
            if self._upstream is None:
                address = urlsplit(self.server.proxy.upstream)
                self._upstream = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
            try:
                self._upstream.request(self.command, self.path, body or None, headers)
                answer = self._upstream.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException):
                self._upstream.close()
                self._upstream = None
                if not again or self.command not in ("GET", "HEAD"):
                    raise
        else:
            raise AssertionError("the loop leaves or raises")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if answer.status not in (204, 304):
            headers.append(("Content-Length", length or "0"))
        if answer.will_close:
            self._upstream.close()
            self._upstream = None
        return answer.status, answer.reason, headers, data

    def _refuse(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
        data = b"" if self.command == "HEAD" else text.encode()
        length = len(text) if self.command == "HEAD" else len(data)
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\r\n"
        self._send(head.encode() + data)

    def _send(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _stay_silent(self) -> None:
        """Wait until the client disconnects, the time is over, or the proxy closes."""
        self.close_connection = True
        end = time.monotonic() + self.server.proxy.plan.silence_seconds
        self.connection.settimeout(0.05)
        while time.monotonic() < end and not self.server.proxy.closing.is_set():
            try:
                if not self.connection.recv(1 << 16):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _reset(self) -> None:
        """Close with a TCP reset instead of an end of stream."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.flush()
            self.rfile.close()
            self.wfile.close()
            self.connection.close()


@dataclasses.dataclass(frozen=True)
class FaultyS3:
    """A moto server and the proxy in front of it."""

    proxy: FaultProxy
    direct: str
    """URL of the server without faults."""

    @property
    def endpoint(self) -> str:
        return self.proxy.endpoint

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a process that uses the faulty endpoint."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def make_bucket(self, name: str) -> str:
        """Create a bucket without faults; returns `s3://name`."""
        sent = http.client.HTTPConnection(urlsplit(self.direct).netloc, timeout=30)
        sent.request("PUT", f"/{name}")
        answer = sent.getresponse()
        answer.read()
        sent.close()
        if answer.status not in (200, 409):
            raise RuntimeError(f"the bucket {name} was not made: {answer.status} {answer.reason}")
        return f"s3://{name}"


@contextlib.contextmanager
def faulty_s3(plan: FaultPlan | None = None, *, port: int = 0, **changes: object) -> Iterator[FaultyS3]:
    """A moto server behind a proxy; `changes` are fields of FaultPlan. Both stop when the context ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, bound = server.get_host_and_port()
    direct = f"http://{host}:{bound}"
    proxy = FaultProxy(direct, dataclasses.replace(plan or FaultPlan(), **changes), port=port)
    try:
        yield FaultyS3(proxy, direct)
    finally:
        proxy.close()
        server.stop()


def main() -> None:
    """Serve until interrupted, then print what was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--bucket", default="bucket")
    chosen = parser.parse_args()
    with faulty_s3(port=chosen.port, fraction=chosen.fraction, seed=chosen.seed, kinds=tuple(chosen.kinds)) as s3:
        s3.make_bucket(chosen.bucket)
        for name, value in s3.environment.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f"{s3.proxy.requests} requests, {s3.proxy.broken} broken: {s3.proxy.counts}")


if __name__ == "__main__":
    main()
