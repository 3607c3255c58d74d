"""Read images from shards by their position in the manifest, each checked by its CRC-32."""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from paml import storage
from paml.checksum import crc32_of
from paml.shards.cache import Cancelled, OpenShard, ShardCache, shard_errors
from paml.shards.manifest import Manifest

_IDLE_SECONDS = 60.0
_CACHE_FULL_SECONDS = 5.0
"""Read images of a shard one by one for this long before asking a full cache again."""

log = logging.getLogger(__name__)


class CorruptSampleError(Exception):
    """An image whose bytes differ from those that were written."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"image {self.key!r} of {self.shard}: {self.reason}"


@dataclasses.dataclass(eq=False)
class _ShardState:
    """What a reader knows about one shard. Times are those of `time.monotonic`."""

    file: OpenShard | None = None
    last_read: float = 0.0
    cache_full_until: float = 0.0
    rechecked: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class ShardReader:
    """Reads images by index from tar files, which are opened when first needed.

    Threads may share a reader. A pickled reader opens its files again. At most `max_open` tar files are open at a
    time. Shards of a bucket are read through `cache` (a ShardCache or its folder; default: `storage.cache_folder`),
    which retains every shard that a reader has open. Shards that were not read for a minute are closed when another
    one is opened; `release` closes shards at once.
    """

    def __init__(self, manifest: Manifest, cache: "ShardCache | str | None" = None, max_open: int = 128) -> None:
        self.manifest = manifest
        self.cache = cache if isinstance(cache, ShardCache) else ShardCache(cache)
        self.max_open = max_open
        self._states = [_ShardState() for _ in manifest.shards]
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.manifest, self.cache, self.max_open)

    def read(self, index: int) -> bytes:
        """The encoded image. Raises CorruptSampleError, and StorageError if its shard is unreachable."""
        shard = int(self.manifest.shard[index])
        file = self._states[shard].file or self._open_shard(shard)
        image, reason = self._read(file, shard, index)
        if reason and file is not None and self.is_remote(shard) and self._recheck(shard, file):
            image, reason = self._read(self._open_shard(shard), shard, index)
        if reason:
            raise CorruptSampleError(self.manifest.key(index), self.manifest.shard_path(shard), reason)
        return image

    def fetch(self, shard: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Open a shard in advance if the cache has space for it. Raises StorageError and Cancelled."""
        self._open_shard(shard, cancelled, prefetch=True)

    def is_remote(self, shard: int) -> bool:
        """Whether a shard is in a bucket."""
        return storage.is_remote(self.manifest.shard_path(shard))

    def release(self, shards: Iterable[int]) -> None:
        """Close shards that are no longer needed, so that the cache may evict them."""
        for shard in shards:
            self._states[shard].file = None

    def _read(self, file: OpenShard | None, shard: int, index: int) -> tuple[bytes, str]:
        """(image, '') or (the bytes that could be read, the error)."""
        manifest = self.manifest
        offset, size, crc32 = int(manifest.offset[index]), int(manifest.size[index]), int(manifest.crc32[index])
        if file is None:
            url = manifest.shard_path(shard)
            image = self.cache.read_range(url, offset, size)
            if len(image) == size and crc32_of(image) != crc32:
                image = self.cache.read_range(url, offset, size)
        else:
            self._states[shard].last_read = time.monotonic()
            try:
                image = file.read(offset, size)
            except OSError as error:
                return b"", f"bytes {offset} to {offset + size} are unreadable: {error}"
        if len(image) < size:
            end = os.fstat(file.handle).st_size if file is not None else offset + len(image)
            return image, f"the tar file is truncated: it ends at byte {end}, the image at byte {offset + size}"
        if crc32_of(image) != crc32:
            return image, f"CRC-32 mismatch in bytes {offset} to {offset + size}"
        return image, ""

    def _recheck(self, shard: int, file: OpenShard) -> bool:
        """Let the cache check a shard that gave a bad image, once; False if it was checked before."""
        state = self._states[shard]
        with state.lock:
            if state.file not in (None, file):
                return True  # another thread has just replaced it
            if state.rechecked:
                return False
            state.rechecked, state.file = True, None
            checked = self.cache.open(self.manifest, shard, recheck=True)
            if checked is not None:
                self._add_open(state, checked)
            return True

    def _open_shard(
        self, shard: int, cancelled: Callable[[], bool] = lambda: False, *, prefetch: bool = False
    ) -> OpenShard | None:
        """The opened shard; None if the cache has no space for it."""
        state, path = self._states[shard], self.manifest.shard_path(shard)
        with state.lock:
            file = state.file
            if file is not None:
                return file
            if not storage.is_remote(path):
                with shard_errors(path):
                    file = OpenShard(path)
            elif prefetch or time.monotonic() >= state.cache_full_until:
                self._close_unused()
                file = self.cache.open(self.manifest, shard, cancelled, quiet=prefetch)
                if file is None and not prefetch:
                    state.cache_full_until = time.monotonic() + _CACHE_FULL_SECONDS
            if file is not None:
                self._add_open(state, file)
            return file

    def _add_open(self, state: _ShardState, file: OpenShard) -> None:
        state.last_read, state.file = time.monotonic(), file  # a file with an old time would be closed
        self._close_unused()

    def _close_unused(self) -> None:
        """Close the shards that were not read for a minute, and the least recently read ones above `max_open`."""
        with self._lock:
            opened = sorted((state for state in self._states if state.file), key=lambda state: state.last_read)
            for number, state in enumerate(opened):
                if number < len(opened) - self.max_open or time.monotonic() - state.last_read > _IDLE_SECONDS:
                    state.file = None


class ShardPrefetcher:
    """Threads that open shards of a bucket before they are needed.

    shards: in the order of their first use. first_steps: the step at which each is first used. At most `ahead` shards
    that are not yet in use are open or being fetched. Errors are logged; the reader raises them when it needs a shard.
    """

    def __init__(
        self,
        reader: ShardReader,
        shards: Sequence[int] | np.ndarray,
        first_steps: Sequence[int] | np.ndarray,
        ahead: int,
    ) -> None:
        self._reader, self._shards, self._first_steps, self._ahead = reader, shards, first_steps, ahead
        self._next, self._stopped = 0, False
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fetch")
        self.advance_to(0)

    def advance_to(self, step: int) -> None:
        """The loader has reached `step`: fetch the shards that are now allowed."""
        while self._next < len(self._shards) and (
            self._next < self._ahead or self._first_steps[self._next - self._ahead] <= step
        ):
            self._pool.submit(self._fetch, int(self._shards[self._next]))
            self._next += 1

    def close(self) -> None:
        """Stop, within the time of one request."""
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, shard: int) -> None:
        try:
            self._reader.fetch(shard, lambda: self._stopped)
        except Cancelled:
            pass
        except OSError as error:
            log.warning("prefetching a shard failed: %s", error)
