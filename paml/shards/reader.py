"""Read images out of shards by their place in the manifest, each checked by its CRC-32."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from paml import storage
from paml.shards.cache import Cancelled, OpenShard, ShardCache, gone
from paml.shards.crc import crc32_of
from paml.shards.manifest import Manifest

_IDLE_SECONDS = 60.0
_NO_ROOM_SECONDS = 5.0
"""How long images of a shard are read one by one before the cache is asked again."""

log = logging.getLogger(__name__)


class CorruptSample(Exception):
    """An image whose bytes are not those that were written."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"image {self.key!r} of {self.shard}: {self.reason}"


class ShardReader:
    """Images by index from tar files, opened when first needed.

    Threads may share a reader; pickled to another process it opens its files anew. At most `max_open` tar files
    are open at a time. Shards of a bucket come through `cache` (a ShardCache or its folder; default: that of
    `storage.cache_folder`), which keeps every shard that a reader has open: those not read for a minute are
    closed when another one is opened, and `release` closes them at once.
    """

    def __init__(self, manifest: Manifest, cache: "ShardCache | str | None" = None, *, max_open: int = 128) -> None:
        self.manifest = manifest
        self.cache = cache if isinstance(cache, ShardCache) else ShardCache(cache)
        self.max_open = max_open
        self._open: dict[int, OpenShard] = {}
        self._used: dict[int, float] = {}
        self._no_room: dict[int, float] = {}
        self._looked_again: set[int] = set()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "cache": self.cache, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["manifest"], state["cache"], max_open=state["max_open"])

    def read(self, index: int) -> bytes:
        """The encoded image. Raises CorruptSample, and StorageError where its shard cannot be reached at all."""
        manifest = self.manifest
        shard, offset, size = int(manifest.shard[index]), int(manifest.offset[index]), int(manifest.size[index])
        file = self._open.get(shard) or self._open_shard(shard)
        image, reason = self._read(file, shard, offset, size, int(manifest.crc32[index]))
        if reason and file is not None and self.is_remote(shard) and self._look_again(shard, file):
            file = self._open_shard(shard)
            image, reason = self._read(file, shard, offset, size, int(manifest.crc32[index]))
        if reason:
            raise CorruptSample(manifest.key(index), manifest.shard_path(shard), reason)
        return image

    def fetch(self, shard: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Open a shard before it is needed, if there is room. Raises StorageError, and Cancelled."""
        self._open_shard(shard, cancelled, early=True)

    def is_remote(self, shard: int) -> bool:
        """Whether a shard lies in a bucket."""
        return storage.is_remote(self.manifest.shard_path(shard))

    def release(self, shards: Iterable[int]) -> None:
        """Close shards that are not needed any more, so that the cache may drop them."""
        with self._lock:
            for shard in shards:
                self._open.pop(shard, None)
                self._used.pop(shard, None)

    def _read(self, file: OpenShard | None, shard: int, offset: int, size: int, crc32: int) -> tuple[bytes, str]:
        """(image, '') or (what there is, what is wrong with it)."""
        if file is None:
            url = self.manifest.shard_path(shard)
            image = self.cache.read_range(url, offset, size)
            if len(image) == size and crc32_of(image) != crc32:
                image = self.cache.read_range(url, offset, size)
        else:
            self._used[shard] = time.monotonic()
            try:
                image = file.read(offset, size)
            except OSError as error:
                return b"", f"bytes {offset} to {offset + size} cannot be read: {error}"
        if len(image) < size:
            end = file.bytes if file is not None else offset + len(image)
            return image, f"the tar file ends at byte {end}, the image at byte {offset + size}: it was cut"
        if crc32_of(image) != crc32:
            return image, f"bytes {offset} to {offset + size} fail their CRC-32: they were changed"
        return image, ""

    def _look_again(self, shard: int, file: OpenShard) -> bool:
        """Let the cache look at a shard that gave a bad image, once; False where that was done before."""
        with self._turn(shard):
            if self._open.get(shard, file) is not file:
                return True  # another thread has just done so
            if shard in self._looked_again:
                return False
            self._looked_again.add(shard)
            self._open.pop(shard, None)
            found = self.cache.open(self.manifest, shard, again=True)
            if found is not None:
                self._keep(shard, found)
            return True

    def _turn(self, shard: int) -> threading.Lock:
        with self._lock:
            return self._opening.setdefault(shard, threading.Lock())

    def _open_shard(
        self, shard: int, cancelled: Callable[[], bool] = lambda: False, *, early: bool = False
    ) -> OpenShard | None:
        """The shard, opened; None where the cache has no room for it."""
        with self._turn(shard):
            file = self._open.get(shard)
            if file is not None:
                return file
            path = self.manifest.shard_path(shard)
            if not storage.is_remote(path):
                file = _open_local(path)
            elif not early and time.monotonic() < self._no_room.get(shard, 0.0):
                return None
            else:
                self._close_idle()
                file = self.cache.open(self.manifest, shard, cancelled, quiet=early)
                if file is None:
                    if not early:
                        self._no_room[shard] = time.monotonic() + _NO_ROOM_SECONDS
                    return None
            self._keep(shard, file)
            return file

    def _keep(self, shard: int, file: OpenShard) -> None:
        with self._lock:
            self._open[shard], self._used[shard] = file, time.monotonic()
            while len(self._open) > self.max_open:
                self._open.pop(min(self._open, key=lambda opened: self._used.get(opened, 0.0)))

    def _close_idle(self) -> None:
        now = time.monotonic()
        with self._lock:
            for shard in [s for s in self._open if now - self._used.get(s, now) > _IDLE_SECONDS]:
                self._open.pop(shard)


class FetchAhead:
    """Threads that open shards of a bucket before they are needed, in the order of need.

    `shards` in that order, and `first`, the step at which each is first needed. At most `ahead` shards that are not
    needed yet are open or under way. Failures are left to the reader, who will meet them.
    """

    def __init__(
        self, reader: ShardReader, shards: Sequence[int], first: Sequence[int], *, ahead: int, threads: int = 2
    ) -> None:
        self._reader, self._shards, self._first, self._ahead = reader, shards, first, ahead
        self._next, self._step, self._stopped = 0, 0, False
        self._change = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="fetch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """Reading is at `step`: later shards may be fetched."""
        with self._change:
            self._step = step
            self._change.notify_all()

    def close(self) -> None:
        """Stop, within the time of one request."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (shard := self._take()) is not None:
            try:
                self._reader.fetch(shard, lambda: self._stopped)
            except Cancelled:
                return
            except OSError as error:
                log.warning("could not fetch ahead: %s", error)

    def _take(self) -> int | None:
        with self._change:
            while not self._stopped and self._next < len(self._shards):
                place = self._next
                if place < self._ahead or self._first[place - self._ahead] <= self._step:
                    self._next += 1
                    return int(self._shards[place])
                self._change.wait()
        return None


def _open_local(path: str) -> OpenShard:
    try:
        return OpenShard(path)
    except FileNotFoundError as error:
        raise gone(path) from error
    except OSError as error:
        raise storage.StorageError(
            error.errno, f"the shard {path} cannot be opened: {os.strerror(error.errno or 0)}"
        ) from error
