"""Read images out of shards by their place in the manifest, each checked by its CRC-32."""

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from typing import Any

from paml import storage
from paml.shards.manifest import Manifest


class CorruptSample(Exception):
    """An image whose bytes are not those that were written."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"image {self.key!r} of {self.shard}: {self.reason}"


class ShardReader:
    """Images by index from memory-mapped tar files, opened when first needed.

    Threads may share a reader; pickled to another process it opens its files anew. At most `max_open` tar
    files are mapped at a time. Shards of a remote folder are copied to `cache` (default: that of
    `storage.cache_folder`), checked by SHA-256 on arrival and fetched a second time where that fails; one that
    stays bad is used all the same, since each image is checked when read.
    """

    def __init__(self, manifest: Manifest, cache: str | None = None, *, max_open: int = 256) -> None:
        self.manifest = manifest
        self.cache = cache
        self.max_open = max_open
        self._maps: OrderedDict[int, memoryview | None] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "cache": self.cache, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["manifest"], state["cache"], max_open=state["max_open"])

    def read(self, index: int) -> memoryview:
        """The encoded image, without a copy. Raises CorruptSample."""
        manifest = self.manifest
        shard = int(manifest.shard[index])
        data = self._maps.get(shard)
        if data is None:
            data = self._open(shard)
        offset, size = int(manifest.offset[index]), int(manifest.size[index])
        image = data[offset : offset + size]
        if len(image) < size:
            raise self._corrupt(
                index, f"the tar file ends at byte {len(data)}, the image at byte {offset + size}: it was cut"
            )
        if zlib.crc32(image) != int(manifest.crc32[index]):
            raise self._corrupt(index, f"bytes {offset} to {offset + size} fail their CRC-32: they were changed")
        return image

    def _corrupt(self, index: int, reason: str) -> CorruptSample:
        shard = int(self.manifest.shard[index])
        return CorruptSample(self.manifest.key(index), self.manifest.shard_path(shard), reason)

    def _open(self, shard: int) -> memoryview:
        with self._lock:
            turn = self._fetching.setdefault(shard, threading.Lock())
        with turn:
            data = self._maps.get(shard)
            if data is not None:
                return data
            path = self._local_path(shard)
            if os.path.getsize(path):
                with open(path, "rb") as file:
                    # the views that `read` gave out keep a map alive after it has left the list
                    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            else:
                data = memoryview(b"")
            with self._lock:
                self._maps[shard] = data
                while len(self._maps) > self.max_open:
                    self._maps.popitem(last=False)
            return data

    def _local_path(self, shard: int) -> str:
        path = self.manifest.shard_path(shard)
        if not storage.is_remote(path):
            if not os.path.exists(path):
                raise storage.StorageError(
                    f"the shard {path} of the manifest is gone: put it back, or write the shards again"
                )
            return path
        info = self.manifest.shards[shard]
        local = os.path.join(self.cache or storage.cache_folder(), "shards", f"{info.sha256}.tar")
        if not (os.path.exists(local) and os.path.getsize(local) == info.bytes):
            for _ in range(2):
                storage.copy_to_local(path, local)
                if storage.sha256_of(local)[0] == info.sha256:
                    break
        return local
