"""Open Images from the original addresses in `images.csv`, requested politely.

Used only on request, for images that no bucket has. About a fifth of the images were removed by 2018 and others have
changed, so each file's size and MD5 are compared with the release's.
"""

import base64
import contextlib
import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from paml import storage
from paml.errors import DataError, check_setting
from paml.sources.fetch import read_concurrently, wait_seconds
from paml.sources.parts import MAX_IMAGE_BYTES, Part, Payload, fingerprint
from paml.sources.web import RETRY_STATUS, USER_AGENT, Unreachable, iter_chunks, open_url, retry_after_seconds
from paml.storage import StorageError

COLUMNS = ("ImageID", "OriginalURL", "OriginalSize", "OriginalMD5")
_UNAVAILABLE = "photo_unavailable"
_THREADS = 8  # concurrent requests of one part to all servers
_GIVE_UP_AFTER = 20  # consecutive images without a response; the part is then read again
_FIRST_WAIT_SECONDS = 1.0  # after the first failure; it doubles with each
_TIMEOUT_SECONDS = 60.0  # for one whole image
_BLOCK_BYTES = 64 << 20  # the lookup of the wanted keys is rebuilt for each block


@dataclass(frozen=True, kw_only=True)
class FlickrSettings:
    """How the original servers are requested. The limits apply within one part; two parts are read at a time."""

    connections_per_host: int = 2
    """Concurrent requests to one server."""
    tries: int = 5
    """Requests for one image, with growing random waits between them, before it is rejected."""
    longest_wait_seconds: float = 300.0
    """A server that asks for a longer wait (Retry-After) ends the part, which can be read again later."""
    user_agent: str = USER_AGENT
    """User-Agent of the requests; include a contact address."""

    def __post_init__(self) -> None:
        for name in ("connections_per_host", "tries", "longest_wait_seconds"):
            check_setting(getattr(self, name) >= 1, f"flickr_requests.{name}", getattr(self, name), "1 or more")


def flickr_parts(
    images_csv: str,
    wanted_keys: Iterable[str] | None = None,
    settings: FlickrSettings | None = None,
    per_part: int = 500,
) -> list[Part]:
    """The images of `images.csv` (V3, or the image lists of V4 to V7) at their original addresses.

    images_csv: CSV with the columns ImageID, OriginalURL, OriginalSize (bytes) and OriginalMD5 (base64), local or
    in S3. wanted_keys: only these; one that is not in the file yields a FileNotFoundError.

    Yielded as exceptions, and so rejected: images that were removed (404, 410 and the like, never requested twice),
    changed ones, and those without a response in `settings.tries` requests. Raises DataError for a file with other
    columns; a part raises StorageError if servers are down or ask for a long wait.
    """
    check_setting(per_part >= 1, "per_part", per_part, "1 or more")
    settings = settings or FlickrSettings()
    table = _read_rows(images_csv, None if wanted_keys is None else pa.array(sorted(set(wanted_keys)), pa.string()))
    parts = []
    for number, start in enumerate(range(0, table.num_rows, per_part)):
        part = table.slice(start, per_part).combine_chunks()  # a slice would be pickled with its whole table
        rows = part.to_pylist()
        digits = fingerprint(text for row in rows for text in row.values())
        size = sum(_parse_int(row["OriginalSize"]) or 0 for row in rows)
        read = partial(_fetch_all, part, settings)
        parts.append(Part(f"flickr-{number:06d}-{digits}", read, len(rows), size, max_concurrent=2))
    return parts


def _fetch_all(rows: pa.Table, settings: FlickrSettings) -> Iterator[tuple[str, Payload]]:
    client = _Client(settings)
    consecutive = 0
    for row, payload in read_concurrently(rows.to_pylist(), client.fetch, _THREADS):
        consecutive = consecutive + 1 if isinstance(payload, Unreachable) else 0
        if consecutive >= _GIVE_UP_AFTER:
            raise StorageError(
                0,
                f"{consecutive} consecutive images could not be fetched, the last because of: {payload}: check the "
                "network, or try again later",
            )
        yield row["ImageID"], payload


def _read_rows(path: str, wanted: pa.Array | None) -> pa.Table:
    """COLUMNS of the wanted rows in the file's order, then the wanted keys that it does not have, without address."""
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    batches = []
    try:
        with (
            storage.open_input(path) as file,
            pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(newlines_in_values=True),
                convert_options=pacsv.ConvertOptions(
                    include_columns=list(COLUMNS), column_types=schema, strings_can_be_null=False
                ),
            ) as reader,
        ):
            for batch in reader:
                if wanted is not None:
                    batch = batch.filter(pc.call_function("is_in", [batch["ImageID"]], pc.SetLookupOptions(wanted)))
                if batch.num_rows:
                    batches.append(batch)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not an image list of Open Images ({error}): it needs the columns {', '.join(COLUMNS)}: use "
            "images.csv of V3, or *-images-with-labels-with-rotation.csv of later releases"
        ) from error
    table = pa.Table.from_batches(batches, schema)
    if wanted is None:
        return table
    is_listed = pc.call_function("is_in", [wanted], pc.SetLookupOptions(table["ImageID"]))
    unlisted = wanted.filter(pc.call_function("invert", [is_listed]))
    blank = pa.repeat("", len(unlisted))
    return pa.concat_tables([table, pa.table([unlisted, blank, blank, blank], schema=schema)])


class _Client:
    """Requests images and limits the load of each server: concurrent requests, and pauses that it asks for."""

    def __init__(self, settings: FlickrSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._slots: dict[str, threading.Semaphore] = defaultdict(
            lambda: threading.Semaphore(settings.connections_per_host)
        )
        self._paused_until: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def _slot(self, host: str) -> Iterator[None]:
        with self._lock:
            slot = self._slots[host]
        with slot:
            while (wait := self._paused_until[host] - time.monotonic()) > 0:
                time.sleep(wait)
            yield

    def _pause(self, host: str, seconds: float) -> None:
        """Delay all requests to the server, not only the one that was refused."""
        longest = self._settings.longest_wait_seconds
        if seconds > longest:
            raise StorageError(
                0,
                f"{host} asks to wait {seconds:,.0f} s, more than flickr_requests.longest_wait_seconds = {longest:g}: "
                "start again later",
            )
        with self._lock:
            self._paused_until[host] = max(self._paused_until[host], time.monotonic() + seconds)

    def fetch(self, row: dict[str, str]) -> Payload:
        """The file of one row, or why it cannot be fetched."""
        url = row["OriginalURL"]
        if not url:
            return FileNotFoundError(f"{row['ImageID']} is not in the image list, so its address is unknown")
        host = _host_of(url)
        if host is None:
            return DataError(f"{url!r} is not a web address")
        tries, failure = self._settings.tries, None
        for attempt in range(tries):
            wait = wait_seconds(attempt, _FIRST_WAIT_SECONDS, self._settings.longest_wait_seconds)
            with self._slot(host):
                try:
                    return self._request(url, row)
                except Unreachable as error:
                    failure = error
                    if isinstance(error, _Busy):
                        self._pause(host, max(wait, error.seconds))
            if attempt < tries - 1:
                time.sleep(wait)
        return Unreachable(0, f"no response to {tries} requests: {failure}")

    def _request(self, url: str, row: dict[str, str]) -> Payload:
        with open_url(url, user_agent=self._settings.user_agent, timeout_seconds=_TIMEOUT_SECONDS) as response:
            if response.status in RETRY_STATUS:
                raise _Busy(f"{url} answered {response.status}", retry_after_seconds(response) or 0.0)
            if response.status != 200:
                return FileNotFoundError(f"{url} answered {response.status}: the image was removed")
            if _UNAVAILABLE in (response.geturl() or ""):
                return FileNotFoundError(f"{url} redirects to {response.geturl()}: the image was removed")
            size, md5 = _parse_int(row["OriginalSize"]), row["OriginalMD5"].strip()
            limit = MAX_IMAGE_BYTES if size is None else min(size, MAX_IMAGE_BYTES)
            data = bytearray()
            for chunk in iter_chunks(response, url, _TIMEOUT_SECONDS):
                data += chunk
                if len(data) > limit:
                    break
        if len(data) > MAX_IMAGE_BYTES:
            return DataError(f"{url} has more than {MAX_IMAGE_BYTES:,} bytes")
        if size is not None and len(data) != size:
            more = "more than " if len(data) > size else ""
            return DataError(f"{url} has changed: {more}{min(len(data), size):,} bytes, the release has {size:,}")
        current = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        if md5 and current != md5:
            return DataError(f"{url} has changed: its MD5 is {current}, the release has {md5}")
        return bytes(data)


class _Busy(Unreachable):
    """A server that asks for a later retry."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(0, message)
        self.seconds = seconds


def _host_of(url: str) -> str | None:
    """None if it is not a web address."""
    try:
        address = urlsplit(url)
        return address.hostname if address.scheme in ("http", "https") else None
    except ValueError:
        return None


def _parse_int(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None
