"""Requests to web servers: time-outs, the environment's proxies, and what a server says about coming back."""

import contextlib
import email.utils
import functools
import os
import time
import urllib.request
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import urllib3

from paml.storage import StorageError

USER_AGENT = "paml/0.1 (dataset preparation for research; multi-label image classifiers)"
_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 16
LATER = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of a server that may answer well another time."""


class Unreachable(StorageError):
    """A server that does not answer, or breaks off; may go well another time."""


@contextlib.contextmanager
def opened(
    url: str, *, headers: Mapping[str, str] | None = None, user_agent: str = USER_AGENT, timeout_seconds: float = 60.0
) -> Iterator[urllib3.BaseHTTPResponse]:
    """The answer to a GET, whatever its status, its body unread; up to three redirects are followed.

    timeout_seconds: of silence. Raises Unreachable where no answer comes, also for what is read in the block.
    """
    timeout = urllib3.Timeout(connect=min(_CONNECT_SECONDS, timeout_seconds), read=timeout_seconds)
    retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3, respect_retry_after_header=False)
    everything = {"User-Agent": user_agent, "Accept-Encoding": "identity", **(headers or {})}
    try:
        answer = _pool(os.getpid(), _proxy_of(url)).request(
            "GET", url, headers=everything, timeout=timeout, retries=retries, preload_content=False
        )
        try:
            yield answer
        finally:
            answer.close()  # a body that was not read to its end cannot be skipped on a connection that is kept
            answer.release_conn()
    except urllib3.exceptions.HTTPError as error:
        reason = str(error.reason) if isinstance(error, urllib3.exceptions.MaxRetryError) else str(error)
        raise Unreachable(0, f"{url} cannot be read: {reason}") from error


def pieces(answer: urllib3.BaseHTTPResponse, url: str, seconds: float | None = None) -> Iterator[bytes]:
    """The body as it arrives. Raises Unreachable where it ends early or takes more than `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    expected = answer.headers.get("Content-Length")
    count = 0
    while piece := answer.read1(_CHUNK):
        count += len(piece)
        yield piece
        if end is not None and time.monotonic() > end:
            raise Unreachable(0, f"{url} took more than {seconds:g} s for {count:,} bytes")
    if expected is not None and expected.isdigit() and count != int(expected):
        raise Unreachable(0, f"{url} broke off after {count:,} of {int(expected):,} bytes")


def retry_after_seconds(answer: urllib3.BaseHTTPResponse) -> float | None:
    """What the header Retry-After asks for, given as seconds or as a date; None without it."""
    value = (answer.headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _proxy_of(url: str) -> str | None:
    address = urlsplit(url)
    if address.hostname is None or urllib.request.proxy_bypass(address.hostname):
        return None
    return urllib.request.getproxies().get(address.scheme)


@functools.lru_cache(maxsize=4)
def _pool(process: int, proxy: str | None) -> urllib3.PoolManager:
    """Connections of this process: those that a fork shares are not safe."""
    if proxy is None:
        return urllib3.PoolManager(num_pools=64, maxsize=16)
    return urllib3.ProxyManager(proxy, num_pools=64, maxsize=16)
