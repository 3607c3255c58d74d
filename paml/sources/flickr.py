"""Open Images from the original addresses in `images.csv`: what no bucket has, asked for politely.

Nothing here runs unless it is asked for. Authors have removed or changed a share of the photos since (about a
fifth were gone by 2018), which is why each file's size and MD5 are compared with the release's.
"""

import base64
import contextlib
import hashlib
import io
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from paml import storage
from paml.errors import DataError, SettingsError
from paml.sources.fetch import read_ahead, wait_seconds
from paml.sources.parts import Part, Payload, mark_of, starts
from paml.sources.web import LATER, USER_AGENT, Unreachable, opened, pieces, retry_after_seconds
from paml.storage import StorageError

COLUMNS = ("ImageID", "OriginalURL", "OriginalSize", "OriginalMD5")
_UNAVAILABLE = "photo_unavailable"
_BLOCK_BYTES = 64 << 20  # the table of wanted keys is made anew for each


@dataclass(frozen=True, kw_only=True)
class FlickrSettings:
    """How the original servers are asked. The limits hold within one part: read few parts at a time."""

    connections_per_host: int = 2
    """Requests under way to one server at a time."""
    threads: int = 8
    """Requests under way to all servers together."""
    tries: int = 5
    """Requests for one image, with growing waits of random length between them, before it is given up."""
    first_wait_seconds: float = 1.0
    """The wait after the first failure; it doubles with each."""
    longest_wait_seconds: float = 300.0
    """A server that asks (Retry-After) for a longer one ends the part, which may be read again later."""
    timeout_seconds: float = 60.0
    """For one image, all of it."""
    give_up_after: int = 20
    """Images one after the other that no server answered for: the part ends with an error, to be read again."""
    user_agent: str = USER_AGENT
    """How the requests name themselves; put an address in it where you can be reached."""
    accept_changed: bool = False
    """Take files whose size or MD5 is not the release's. By default they are rejected, with both named."""
    max_bytes: int = 100_000_000
    """Larger files are not read to their end; they are rejected."""

    def __post_init__(self) -> None:
        for name in ("connections_per_host", "threads", "tries", "give_up_after", "max_bytes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"flickr.{name} is {getattr(self, name)}: set it to 1 or more")
        for name in ("first_wait_seconds", "longest_wait_seconds", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"flickr.{name} is {getattr(self, name)}: set it above 0")
        if not self.user_agent.strip():
            raise SettingsError("flickr.user_agent is empty: servers are told who asks, set a name and an address")


@dataclass(frozen=True)
class FlickrPart:
    """Some rows of `images.csv`."""

    name: str
    rows: bytes = field(repr=False)
    """An Arrow stream of COLUMNS."""
    images: int
    bytes: int
    settings: FlickrSettings

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        rows = pa.ipc.open_stream(self.rows).read_all().to_pylist()
        servers = _Servers(self.settings)
        in_a_row = 0
        for row, payload in read_ahead(rows, servers.fetch, self.settings.threads):
            in_a_row = in_a_row + 1 if isinstance(payload, Unreachable) else 0
            if in_a_row >= self.settings.give_up_after:
                raise StorageError(
                    0,
                    f"{in_a_row} images one after the other could not be fetched, the last for this reason: "
                    f"{payload}: check the network, or try again later",
                )
            yield row["ImageID"], payload


def flickr_parts(
    images_csv: str,
    wanted_keys: Iterable[str] | None = None,
    settings: FlickrSettings | None = None,
    per_part: int = 500,
) -> list[Part]:
    """The photos of `images.csv` (V3, or the image lists of V4 to V7) at their original addresses.

    images_csv: CSV with the columns ImageID, OriginalURL, OriginalSize (bytes) and OriginalMD5 (base64), local or
    in S3. wanted_keys: only these; one that the file has not is given with a FileNotFoundError.

    Given with an exception, and so rejected: photos that are gone (404, 410 and the like, never asked for twice),
    changed ones, and those that no server answered for in `settings.tries` requests. Raises DataError for a file
    with other columns; a part raises StorageError where servers are down altogether or ask for a long wait.
    """
    settings = settings or FlickrSettings()
    table = _read_rows(images_csv, None if wanted_keys is None else pa.array(sorted(set(wanted_keys)), pa.string()))
    parts: list[Part] = []
    for number, start in enumerate(starts(table.num_rows, per_part)):
        rows = table.slice(start, per_part).combine_chunks()
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        mark = mark_of(text for column in rows.columns for text in column.to_pylist())
        size = sum(_whole_number(text) or 0 for text in rows["OriginalSize"].to_pylist())
        parts.append(FlickrPart(f"flickr-{number:06d}-{mark}", sink.getvalue(), rows.num_rows, size, settings))
    return parts


def _read_rows(path: str, wanted: pa.Array | None) -> pa.Table:
    """COLUMNS of the wanted rows in the file's order, then the wanted keys that it has not, without an address."""
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
            f"{path} is no image list of Open Images ({error}): it needs the columns {', '.join(COLUMNS)}: name "
            "images.csv of V3, or *-images-with-labels-with-rotation.csv of later releases"
        ) from error
    table = pa.Table.from_batches(batches, schema)
    if wanted is None:
        return table
    found = pc.call_function("is_in", [wanted], pc.SetLookupOptions(table["ImageID"]))
    absent = wanted.filter(pc.call_function("invert", [found]))
    blank = pa.array([""] * len(absent), pa.string())
    return pa.concat_tables([table, pa.table([absent, blank, blank, blank], schema=schema)])


class _Servers:
    """The servers that a part asks: how many requests each has, and until when it wants none."""

    def __init__(self, settings: FlickrSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._slots: dict[str, threading.Semaphore] = defaultdict(
            lambda: threading.Semaphore(settings.connections_per_host)
        )
        self._closed_until: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def _slot(self, host: str) -> Iterator[None]:
        with self._lock:
            slot = self._slots[host]
        with slot:
            while (wait := self._closed_until[host] - time.monotonic()) > 0:
                time.sleep(wait)
            yield

    def _close(self, host: str, seconds: float) -> None:
        """All requests to the server wait, not only the one that was refused."""
        longest = self._settings.longest_wait_seconds
        if seconds > longest:
            raise StorageError(
                0,
                f"{host} asks to come back in {seconds:,.0f} s, more than flickr.longest_wait_seconds = {longest:g}: "
                "start again later",
            )
        with self._lock:
            self._closed_until[host] = max(self._closed_until[host], time.monotonic() + seconds)

    def fetch(self, row: dict[str, Any]) -> Payload:
        """The file of one row, or why there is none."""
        url = row["OriginalURL"]
        if not url:
            return FileNotFoundError(f"{row['ImageID']} is not in the image list, so its address is unknown")
        host = _host_of(url)
        if host is None:
            return DataError(f"{url!r} is no web address")
        failure: Unreachable | None = None
        for attempt in range(self._settings.tries):
            wait = wait_seconds(attempt, self._settings.first_wait_seconds, self._settings.longest_wait_seconds)
            with self._slot(host):
                try:
                    found = self._ask(url, row)
                except Unreachable as error:
                    failure, found = error, None
                if isinstance(found, _Busy):
                    failure = Unreachable(0, f"{url} answered {found.status}")
                    self._close(host, max(wait, found.seconds or 0.0))
            if found is None:
                time.sleep(wait if attempt < self._settings.tries - 1 else 0.0)
            elif not isinstance(found, _Busy):
                return found
        return Unreachable(0, f"given up after {self._settings.tries} requests: {failure}")

    def _ask(self, url: str, row: dict[str, Any]) -> "Payload | _Busy":
        settings = self._settings
        with opened(url, user_agent=settings.user_agent, timeout_seconds=settings.timeout_seconds) as answer:
            if answer.status in LATER:
                return _Busy(answer.status, retry_after_seconds(answer))
            if answer.status != 200:
                return FileNotFoundError(f"{url} answered {answer.status}: the photo is gone")
            if _UNAVAILABLE in (answer.geturl() or ""):
                return FileNotFoundError(f"{url} leads to {answer.geturl()}: the photo is gone")
            size, md5 = _whole_number(row["OriginalSize"]), row["OriginalMD5"].strip()
            limit = settings.max_bytes if size is None or settings.accept_changed else min(size, settings.max_bytes)
            data = bytearray()
            for piece in pieces(answer, url, settings.timeout_seconds):
                data += piece
                if len(data) > limit:
                    break
        if len(data) > settings.max_bytes:
            return DataError(f"{url} has more than flickr.max_bytes = {settings.max_bytes:,} bytes")
        if not settings.accept_changed:
            if size is not None and len(data) != size:
                more = "more than " if len(data) > size else ""
                return DataError(f"{url} has changed: {more}{min(len(data), size):,} bytes, the release says {size:,}")
            found = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
            if md5 and found != md5:
                return DataError(f"{url} has changed: its MD5 is {found}, the release says {md5}")
        return bytes(data)


@dataclass(frozen=True)
class _Busy:
    """A server that wants to be asked later."""

    status: int
    seconds: float | None


def _host_of(url: str) -> str | None:
    """None for what is no address in the web."""
    try:
        address = urlsplit(url)
        return address.hostname if address.scheme in ("http", "https") else None
    except ValueError:
        return None


def _whole_number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None
