"""HTTP requests with timeouts, the environment's proxies, and Retry-After."""

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

USER_AGENT = "paml/0.2 (dataset preparation for research; multi-label image classifiers)"
_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 16
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of a server that may succeed later."""


class Unreachable(StorageError):
    """A server that does not answer, or closes the connection; a retry may succeed."""


@contextlib.contextmanager
def open_url(
    url: str, *, headers: Mapping[str, str] | None = None, user_agent: str = USER_AGENT, timeout_seconds: float = 60.0
) -> Iterator[urllib3.BaseHTTPResponse]:
    """The response to a GET, of any status, with its body unread; up to three redirects are followed.

    timeout_seconds: without receiving data. Raises Unreachable if there is no response, also for reads in the block.
    """
    timeout = urllib3.Timeout(connect=min(_CONNECT_SECONDS, timeout_seconds), read=timeout_seconds)
    retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3, respect_retry_after_header=False)
    all_headers = {"User-Agent": user_agent, "Accept-Encoding": "identity", **(headers or {})}
    try:
        response = _pool(os.getpid(), _proxy_of(url)).request(
            "GET", url, headers=all_headers, timeout=timeout, retries=retries, preload_content=False
        )
        try:
            yield response
        finally:
            response.close()  # a connection with an unread body cannot be reused
            response.release_conn()
    except urllib3.exceptions.HTTPError as error:
        reason = str(error.reason) if isinstance(error, urllib3.exceptions.MaxRetryError) else str(error)
        raise Unreachable(0, f"{url} cannot be read: {reason}") from error


def iter_chunks(response: urllib3.BaseHTTPResponse, url: str, seconds: float | None = None) -> Iterator[bytes]:
    """The body as it arrives. Raises Unreachable if it ends early or takes more than `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    expected = response.headers.get("Content-Length")
    count = 0
    while chunk := response.read1(_CHUNK_BYTES):
        count += len(chunk)
        yield chunk
        if end is not None and time.monotonic() > end:
            raise Unreachable(0, f"{url} took more than {seconds:g} s for {count:,} bytes")
    if expected is not None and expected.isdigit() and count != int(expected):
        raise Unreachable(0, f"{url} ended after {count:,} of {int(expected):,} bytes")


def retry_after_seconds(response: urllib3.BaseHTTPResponse) -> float | None:
    """The wait that the header Retry-After asks for, in seconds or as a date; None without it."""
    value = (response.headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _proxy_of(url: str) -> str | None:
    address = urlsplit(url)
    bypassed = address.hostname is None or urllib.request.proxy_bypass(address.hostname)
    return None if bypassed else urllib.request.getproxies().get(address.scheme)


@functools.lru_cache(maxsize=4)
def _pool(process: int, proxy: str | None) -> urllib3.PoolManager:
    """Connections of this process: sharing them across a fork is not safe."""
    if proxy is None:
        return urllib3.PoolManager(num_pools=64, maxsize=16)
    return urllib3.ProxyManager(proxy, num_pools=64, maxsize=16)
