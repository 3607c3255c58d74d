"""Shards of a bucket on the local disk: one bounded folder for all processes of a node.

A shard is fetched once, however many processes and threads ask for it, checked by SHA-256, and then named after
that digest. The kernel's file locks (flock) say who fetches a shard and which ones are being read, so what a
killed process held is free at once. Where neither the bound nor the disk leaves room, the cache says so and its
reader takes ranges straight from the bucket.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from paml import storage
from paml.errors import SettingsError
from paml.reading import open_own, own_folder
from paml.shards.manifest import Manifest

PIECE_BYTES = 8 << 20
"""Bytes of one request."""
_PIECES_AHEAD = 3
_SLOW_BYTES_PER_SECOND = 1e6
_SLOW_SECONDS = 10.0
_WAIT_SECONDS = 0.01
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)
_warned_of: set[str] = set()


class Cancelled(Exception):
    """Nobody waits for this shard any more."""


@dataclasses.dataclass
class Traffic:
    """What one process took from the bucket and from the cache."""

    bytes_fetched: int = 0
    """Bytes read from the bucket."""
    hits: int = 0
    """Shards opened that lay in the cache (or that another process was fetching)."""
    misses: int = 0
    """Shards that this process fetched."""
    ranges: int = 0
    """Images read straight from the bucket, since the cache had no room for their shard."""

    def add(self, other: "Traffic") -> None:
        """Count what another process took."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class OpenShard:
    """A tar file held open for reads by offset; threads may share it.

    `pread` fills memory of its own: a file that is cut meanwhile ends a read early, where a mapped one would end
    the process (SIGBUS). The file is closed with the last reference to it.
    """

    def __init__(self, path: str, *, cached: bool = False, verified: bool = True) -> None:
        """Raises FileNotFoundError or another OSError. A `cached` file is not evicted before it is closed."""
        self.path, self.verified = path, verified
        self.handle = open_own(path, os.O_RDONLY) if cached else _open_file(path)
        weakref.finalize(self, _close, self.handle, cached)
        if cached:
            fcntl.flock(self.handle, fcntl.LOCK_SH)
            os.utime(self.handle)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends before."""
        data = os.pread(self.handle, size, offset)
        while len(data) < size and (more := os.pread(self.handle, size - len(data), offset + len(data))):
            data += more  # Linux reads 2 GiB at most at a time; network file systems may give less
        return data

    @property
    def bytes(self) -> int:
        """Size of the file now."""
        return os.fstat(self.handle).st_size


def _open_file(path: str) -> int:
    """A descriptor of a regular file; a pipe or a device is refused, which may have no end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return handle


def _close(handle: int, cached: bool) -> None:
    if cached:
        with contextlib.suppress(OSError):
            os.utime(handle)  # the time of last use, by which the cache evicts
    os.close(handle)


class ShardCache:
    """The folder `folder`, which all processes of a node may share; `limit_bytes` None takes 80 % of its disk's room.

    Least recently used shards make room for others, but never one that a process has open. Raises StorageError
    where the folder cannot be used at all. Threads may share a cache; it pickles as its settings.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise SettingsError(f"the cache's bound is {limit_bytes} bytes; it must be at least 0")
        self.folder = os.path.abspath(os.fspath(folder) if folder is not None else storage.cache_folder())
        self.shards = os.path.join(self.folder, "shards")
        self.limit_bytes = limit_bytes
        self.traffic = Traffic()
        self._count = threading.Lock()
        self._ready = False

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[str, int | None]]:
        return ShardCache, (self.folder, self.limit_bytes)

    def open(
        self,
        manifest: Manifest,
        shard: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        again: bool = False,
        quiet: bool = False,
    ) -> OpenShard | None:
        """The shard from the cache, fetched where it is not there; None where it finds no room (logged unless `quiet`).

        `again` looks whether the cached file is still the one that was fetched and, where it is not, fetches anew.
        A shard whose SHA-256 stays wrong after a second fetch is given all the same, with `verified` False: its
        images are told apart by their CRC-32. Raises StorageError naming the object, and Cancelled.
        """
        info, url = manifest.shards[shard], manifest.shard_path(shard)
        self._prepare()
        found = None if again else self._look(info.sha256)
        if found is not None:
            self._add(hits=1)
            return found
        with self._lock(f"{info.sha256}.lock", cancelled, url):
            found = self._look(info.sha256)
            if found is not None and again and not self._whole(found, info.bytes, info.sha256):
                log.warning("%s in the cache is damaged: %s is fetched again", found.path, url)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(found.path)
                found = None
            if found is not None:
                self._add(hits=1)
                return found
            return self._fetch(url, info.sha256, info.bytes, cancelled, quiet)

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        """Bytes straight from the bucket, fewer where the object ends before; counted. Raises StorageError."""
        try:
            data = storage.read_range(url, offset, size)
        except OSError:
            there = _size_of(url)
            if there >= offset + size:
                raise
            data = storage.read_range(url, offset, there - offset) if there > offset else b""
        self._add(ranges=1, bytes_fetched=len(data))
        return data

    def held_bytes(self) -> int:
        """Bytes of all shards in the cache, those being fetched with their full size."""
        return sum(size for _, _, size in self._entries())

    def _add(self, **counts: int) -> None:
        with self._count:
            self.traffic.add(Traffic(**counts))

    def take_traffic(self) -> Traffic:
        """What was counted since the last call."""
        with self._count:
            taken, self.traffic = self.traffic, Traffic()
        return taken

    def _prepare(self) -> None:
        if self._ready:
            return
        try:
            os.makedirs(self.shards, exist_ok=True)
            own_folder(self.shards)
            with self._lock("room.lock"):
                self._clear_abandoned()
                if self.limit_bytes is None:
                    self.limit_bytes = int(0.8 * (shutil.disk_usage(self.shards).free + self.held_bytes()))
        except storage.StorageError:
            raise
        except OSError as error:  # also of file systems without locks
            raise storage.StorageError(
                error.errno,
                f"the cache folder {self.shards} cannot be used: {error.strerror}: set data.cache_dir to a folder of a "
                "local disk that you may write to",
            ) from error
        self._ready = True

    @contextlib.contextmanager
    def _lock(self, name: str, cancelled: Callable[[], bool] = lambda: False, url: str | None = None) -> Iterator[None]:
        """Hold a lock file, against threads of this process too. Its holder's death frees it."""
        os.makedirs(self.shards, exist_ok=True)  # somebody may have cleared the whole cache
        handle = open_own(os.path.join(self.shards, name), os.O_RDWR | os.O_CREAT)
        begun, told = time.monotonic(), _SLOW_SECONDS
        try:
            while not _try_lock(handle, fcntl.LOCK_EX):
                if cancelled():
                    raise Cancelled
                time.sleep(_WAIT_SECONDS)
                waited = time.monotonic() - begun
                if waited > told:
                    told *= 4
                    holder = os.pread(handle, 32, 0).decode("ascii", "replace") or "unknown"
                    log.warning("waiting for %.0f s for process %s to fetch %s", waited, holder, url or self.shards)
            with contextlib.suppress(OSError):  # a full disk has no room for the number either
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)

    def _look(self, sha256: str) -> OpenShard | None:
        """The shard opened, where the cache has it: whole, or the remains of one that is damaged in the bucket."""
        for name, verified in ((f"{sha256}.tar", True), (f"{sha256}.damaged.tar", False)):
            path = os.path.join(self.shards, name)
            with contextlib.suppress(FileNotFoundError):
                found = OpenShard(path, cached=True, verified=verified)
                if os.fstat(found.handle).st_nlink:  # else it was evicted before it was locked
                    return found
        return None

    def _whole(self, found: OpenShard, size: int, sha256: str) -> bool:
        """Whether a cached file still is what was fetched; what is damaged in the bucket counts as such."""
        try:
            return not found.verified or (found.bytes == size and storage.sha256_of(found.path)[0] == sha256)
        except OSError:  # the disk gives it no more
            return False

    def _fetch(self, url: str, sha256: str, size: int, cancelled: Callable[[], bool], quiet: bool) -> OpenShard | None:
        """Called by the holder of the shard's lock."""
        part = os.path.join(self.shards, f"{sha256}.part")
        begun, digest, fetched = time.monotonic(), "", 0
        try:
            for attempt in range(2):
                why = self._reserve(part, size)
                if why:
                    self._say_no_room(url, why, quiet)
                    return None
                digest, fetched = self._download(url, part, size, cancelled)
                if digest == sha256:
                    break
                if attempt == 0:
                    log.warning("%s: SHA-256 differs from the manifest's on arrival: it is fetched again", url)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            if isinstance(error, OSError) and error.errno in _FULL:
                self._say_no_room(url, os.strerror(error.errno), quiet)
                return None
            raise
        seconds = time.monotonic() - begun
        if seconds > _SLOW_SECONDS and fetched < seconds * _SLOW_BYTES_PER_SECOND:
            log.warning("slow object: %s took %.0f s for %.1f MB", url, seconds, fetched / 1e6)
        if digest != sha256:
            log.warning(
                "%s is damaged in the bucket (twice fetched, SHA-256 differs): its images are used one by one where "
                "their CRC-32 agrees; write or copy it again",
                url,
            )
        found = OpenShard(part, cached=True, verified=digest == sha256)  # held before others can see and evict it
        found.path = os.path.join(self.shards, f"{sha256}.tar" if found.verified else f"{sha256}.damaged.tar")
        os.replace(part, found.path)
        self._add(misses=1)
        return found

    def _download(self, url: str, part: str, size: int, cancelled: Callable[[], bool]) -> tuple[str, int]:
        """(SHA-256, bytes) of what was written to `part`: at most `size` bytes of the object."""
        there = min(size, _size_of(url))
        starts = deque(range(0, there, PIECE_BYTES))
        digest, written = hashlib.sha256(), 0
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_PIECES_AHEAD) as pool, open(open_own(part, os.O_RDWR), "r+b") as file:
            try:
                while starts or waiting:
                    while starts and len(waiting) < _PIECES_AHEAD:
                        start = starts.popleft()
                        waiting.append(pool.submit(storage.read_range, url, start, min(PIECE_BYTES, there - start)))
                    data = waiting.popleft().result()
                    if cancelled():
                        raise Cancelled
                    file.write(data)
                    digest.update(data)
                    written += len(data)
            finally:
                for future in waiting:
                    future.cancel()
                self._add(bytes_fetched=written)
            file.truncate(written)
        return digest.hexdigest(), written

    def _reserve(self, part: str, size: int) -> str:
        """Make a file of `size` bytes that really lies on the disk, evicting what it takes; '' or why it cannot be."""
        with self._lock("room.lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            self._clear_abandoned()
            limit = self.limit_bytes
            assert limit is not None, "_prepare sets it"
            entries = sorted(self._entries(), key=lambda entry: entry[1])
            held, why = sum(entry[2] for entry in entries), ""
            while True:
                if held + size <= limit:
                    why = _allocate(part, size)
                    if not why:
                        return ""
                freed = self._evict_one(entries)
                if freed is None:
                    break
                held -= freed
        if size > limit:
            why = why or f"the shard alone has {size / 1e9:.3f} GB"
        return why or f"all {held / 1e9:.3f} GB in it are being read or fetched"

    def _say_no_room(self, url: str, why: str, quiet: bool) -> None:
        if quiet or self.shards in _warned_of:
            return
        _warned_of.add(self.shards)
        log.warning(
            "the cache %s (bound %.3f GB) has no room for %s: %s. Images are read one by one from the bucket, which is "
            "slower: raise data.cache_gb, free some disk, or put data.cache_dir on a larger one",
            self.shards,
            (self.limit_bytes or 0) / 1e9,
            url,
            why,
        )

    def _entries(self) -> list[tuple[str, int, int]]:
        """(path, time of last use in ns, bytes) of all shards, also of those being fetched."""
        found = []
        with os.scandir(self.shards) as listing:
            for entry in listing:
                if entry.name.endswith((".tar", ".part")):
                    with contextlib.suppress(FileNotFoundError):
                        about = entry.stat(follow_symlinks=False)
                        found.append((entry.path, about.st_mtime_ns, about.st_size))
        return found

    def _evict_one(self, entries: list[tuple[str, int, int]]) -> int | None:
        """Bytes freed by removing the least recently used shard that nobody has open; None where there is none."""
        for entry in list(entries):
            path, _, size = entry
            if not path.endswith(".tar"):
                continue
            try:
                handle = open_own(path, os.O_RDONLY)
            except FileNotFoundError:
                entries.remove(entry)
                return size
            except storage.StorageError:  # no shard of this cache: its reader says so
                continue
            try:
                if _try_lock(handle, fcntl.LOCK_EX):
                    os.unlink(path)
                    entries.remove(entry)
                    return size
            finally:
                os.close(handle)
        return None

    def _clear_abandoned(self) -> None:
        """Remove the half files of processes that are no more."""
        for path, _, _ in self._entries():
            if not path.endswith(".part"):
                continue
            try:
                handle = open_own(f"{path.removesuffix('.part')}.lock", os.O_RDWR | os.O_CREAT)
            except OSError:
                continue
            try:
                if _try_lock(handle, fcntl.LOCK_EX):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            finally:
                os.close(handle)


def _size_of(url: str) -> int:
    try:
        return storage.size_of(url)
    except FileNotFoundError as error:
        raise gone(url) from error


def gone(shard: str) -> storage.StorageError:
    """What to say of a shard that is not there, on a disk or in a bucket."""
    return storage.StorageError(
        errno.ENOENT, f"the shard {shard} of the manifest is gone: put it back, or write the shards again"
    )


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _allocate(path: str, size: int) -> str:
    """Make a file of `size` bytes on the disk; the reason where it has no room for it, else ''."""
    handle = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
    except OSError as error:
        os.unlink(path)
        if error.errno in _FULL:
            return os.strerror(error.errno)
        raise
    finally:
        os.close(handle)
    return ""
