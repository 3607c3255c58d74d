"""A local cache of shards from a bucket: one bounded folder for all processes of a node.

A shard is fetched once for all processes and threads, verified by SHA-256, and named after that digest. File locks
(flock) protect the fetch of a shard and the shards that are open, so a killed process releases its own at once. If the
limit or the disk has no space for a shard, its images are read one by one from the bucket.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from paml import storage
from paml.errors import SettingsError, StorageError
from paml.parsing import check_not_symlink, open_no_follow
from paml.shards.manifest import Manifest, ShardInfo
from paml.tasks import read_ahead

REQUEST_BYTES = 8 << 20
_REQUESTS_AHEAD = 3
_WARN_SECONDS = 10.0
_POLL_SECONDS = 0.01
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPACE_LOCK = "space.lock"

log = logging.getLogger(__name__)
_warned_folders: set[str] = set()


class Cancelled(Exception):
    """The fetch of a shard was cancelled."""


@dataclasses.dataclass
class Traffic:
    """Reads of one process from the bucket and from the cache."""

    bytes_fetched: int = 0
    """Bytes read from the bucket."""
    hits: int = 0
    """Shards that were in the cache, or that another process fetched."""
    misses: int = 0
    """Shards that this process fetched."""
    ranges: int = 0
    """Images read directly from the bucket because the cache had no space for their shard."""

    def add(self, other: "Traffic") -> None:
        """Add the counts of another process."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class OpenShard:
    """An open tar file for reads by offset; threads may share it. It is closed with the last reference to it.

    Uses `pread` instead of a memory map: a file that is truncated meanwhile shortens a read, where a map would end the
    process (SIGBUS).
    """

    def __init__(self, path: str, *, cached: bool = False, verified: bool = True) -> None:
        """Raises FileNotFoundError or another OSError. A `cached` file is not evicted before it is closed."""
        self.path, self.verified = path, verified
        self.handle = open_no_follow(path, os.O_RDONLY) if cached else _open_regular_file(path)
        weakref.finalize(self, _close, self.handle, cached)
        if cached:
            fcntl.flock(self.handle, fcntl.LOCK_SH)
            os.utime(self.handle)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer if the file ends before."""
        data = os.pread(self.handle, size, offset)
        while len(data) < size and (more := os.pread(self.handle, size - len(data), offset + len(data))):
            data += more  # Linux reads at most 2 GiB at a time; network file systems may return less
        return data


def _open_regular_file(path: str) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # a pipe or device may be infinite
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def _close(handle: int, cached: bool) -> None:
    if cached:
        with contextlib.suppress(OSError):
            os.utime(handle)  # the time of last use, for eviction
    os.close(handle)


class ShardCache:
    """A cache in `folder`, which all processes of a node may share; `limit_bytes` None: 80 % of the free space.

    Evicts the least recently used shards, but none that a process has open. Raises StorageError if the folder is
    unusable. Threads may share a cache; it pickles as its settings.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise SettingsError(f"the cache limit is {limit_bytes} bytes: set it to 0 or more")
        self.folder = os.path.abspath(os.fspath(folder) if folder is not None else storage.cache_folder())
        self.shards = os.path.join(self.folder, "shards")
        self.limit_bytes = limit_bytes
        self.traffic = Traffic()
        self._traffic_lock = threading.Lock()
        self._prepared = False

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[str, int | None]]:
        return ShardCache, (self.folder, self.limit_bytes)

    def open(
        self,
        manifest: Manifest,
        shard: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        recheck: bool = False,
        quiet: bool = False,
    ) -> OpenShard | None:
        """The shard, fetched if it is not in the cache; None if there is no space (logged unless `quiet`).

        recheck: verify the cached file, and fetch it again if it was changed. A shard whose SHA-256 is still wrong
        after a second fetch is returned with `verified` False; the CRC-32 of each image then identifies the good ones.
        Raises StorageError with the object's URL, and Cancelled.
        """
        info, url = manifest.shards[shard], manifest.shard_path(shard)
        self._prepare()
        cached = None if recheck else self._open_cached(info.sha256)
        if cached is None:
            with self._lock(f"{info.sha256}.lock", cancelled, url):
                cached = self._open_cached(info.sha256)
                if cached is not None and recheck and not _is_intact(cached, info):
                    log.warning("%s in the cache is damaged: fetching %s again", cached.path, url)
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(cached.path)
                    cached = None
                if cached is None:
                    return self._fetch(url, info, cancelled, quiet)
        self._count(hits=1)
        return cached

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        """Bytes directly from the bucket, fewer if the object ends before. Counts the traffic. Raises StorageError."""
        try:
            data = storage.read_range(url, offset, size)
        except OSError:
            with shard_errors(url):
                object_size = storage.size_of(url)
            if object_size >= offset + size:
                raise
            data = storage.read_range(url, offset, object_size - offset) if object_size > offset else b""
        self._count(ranges=1, bytes_fetched=len(data))
        return data

    def used_bytes(self) -> int:
        """Size of all shards in the cache, including those being fetched."""
        return sum(size for _, _, size in self._entries())

    def take_traffic(self) -> Traffic:
        """The traffic since the last call."""
        with self._traffic_lock:
            traffic, self.traffic = self.traffic, Traffic()
        return traffic

    def _count(self, **counts: int) -> None:
        with self._traffic_lock:
            self.traffic.add(Traffic(**counts))

    def _prepare(self) -> None:
        if self._prepared:
            return
        try:
            os.makedirs(self.shards, exist_ok=True)
            check_not_symlink(self.shards)
            with self._lock(_SPACE_LOCK):
                if self.limit_bytes is None:
                    self.limit_bytes = int(0.8 * (shutil.disk_usage(self.shards).free + self.used_bytes()))
        except StorageError:
            raise
        except OSError as error:  # also raised by file systems without locks
            raise StorageError(
                error.errno,
                f"the cache folder {self.shards} is unusable: {error.strerror}: set data.cache_dir to a writable "
                "folder on a local disk",
            ) from error
        self._prepared = True

    @contextlib.contextmanager
    def _lock(self, name: str, cancelled: Callable[[], bool] = lambda: False, url: str | None = None) -> Iterator[None]:
        """Hold a lock file, also against threads of this process. The kernel releases it when the process dies."""
        os.makedirs(self.shards, exist_ok=True)  # somebody may have deleted the whole cache
        handle = open_no_follow(os.path.join(self.shards, name), os.O_RDWR | os.O_CREAT)
        start, warn_after = time.monotonic(), _WARN_SECONDS
        try:
            while not _try_lock(handle):
                if cancelled():
                    raise Cancelled
                time.sleep(_POLL_SECONDS)
                waited = time.monotonic() - start
                if waited > warn_after:
                    warn_after *= 4
                    log.warning("waited %.0f s for another process or thread to fetch %s", waited, url or self.shards)
            yield
        finally:
            os.close(handle)

    def _open_cached(self, sha256: str) -> OpenShard | None:
        """The shard if it is in the cache, intact or as a copy of one that is damaged in the bucket."""
        for name, verified in ((f"{sha256}.tar", True), (f"{sha256}.damaged.tar", False)):
            with contextlib.suppress(FileNotFoundError):
                cached = OpenShard(os.path.join(self.shards, name), cached=True, verified=verified)
                if os.fstat(cached.handle).st_nlink:  # 0 if it was evicted before it was locked
                    return cached
        return None

    def _fetch(self, url: str, info: ShardInfo, cancelled: Callable[[], bool], quiet: bool) -> OpenShard | None:
        """Fetch a shard. The caller holds its lock."""
        part = os.path.join(self.shards, f"{info.sha256}.part")
        try:
            verified = self._download(url, part, info, cancelled)
            if not verified:
                log.warning("%s: its SHA-256 differs from the manifest's: fetching it again", url)
                verified = self._download(url, part, info, cancelled)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
                if not quiet:
                    self._warn_no_space(url, str(error.strerror))
                return None
            raise
        if not verified:
            log.warning(
                "%s is damaged in the bucket (its SHA-256 differs in two fetches): images with a valid CRC-32 are "
                "used; write or copy the shard again",
                url,
            )
        shard = OpenShard(part, cached=True, verified=verified)  # locked before it becomes visible
        shard.path = os.path.join(self.shards, f"{info.sha256}.tar" if verified else f"{info.sha256}.damaged.tar")
        os.replace(part, shard.path)
        self._count(misses=1)
        return shard

    def _download(self, url: str, part: str, info: ShardInfo, cancelled: Callable[[], bool]) -> bool:
        """Write the object, at most as large as the shard, to `part`. Returns whether its SHA-256 is right."""
        self._reserve(part, info.bytes)
        with shard_errors(url):
            size = min(info.bytes, storage.size_of(url))
        digest = hashlib.sha256()
        with ThreadPoolExecutor(_REQUESTS_AHEAD) as pool, open(open_no_follow(part, os.O_RDWR), "r+b") as file:
            requests = (
                pool.submit(storage.read_range, url, start, min(REQUEST_BYTES, size - start))
                for start in range(0, size, REQUEST_BYTES)
            )
            for request in read_ahead(requests, _REQUESTS_AHEAD - 1):
                data = request.result()
                self._count(bytes_fetched=len(data))
                if cancelled():
                    raise Cancelled
                file.write(data)
                digest.update(data)
            file.truncate()
        return digest.hexdigest() == info.sha256

    def _reserve(self, part: str, size: int) -> None:
        """Allocate a file of `size` bytes on the disk, evicting as needed. Raises OSError (ENOSPC) without space."""
        with self._lock(_SPACE_LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            limit = self.limit_bytes
            assert limit is not None, "_prepare sets it"
            used, reason = self.used_bytes(), ""
            for freed in itertools.chain([0], self._evict()):
                used -= freed
                if used + size <= limit:
                    try:
                        return _allocate(part, size)
                    except OSError as error:
                        if error.errno not in _DISK_FULL_ERRNOS:
                            raise
                        reason = os.strerror(error.errno)
        if size > limit:
            reason = reason or f"the shard alone has {size / 1e9:.3f} GB"
        raise OSError(errno.ENOSPC, reason or f"all {used / 1e9:.3f} GB in it are being read or fetched")

    def _warn_no_space(self, url: str, reason: str) -> None:
        if self.shards in _warned_folders:
            return
        _warned_folders.add(self.shards)
        log.warning(
            "the cache %s (limit %.3f GB) has no space for %s: %s. Images are read one by one from the bucket, which "
            "is slower: increase data.cache_gb, free disk space, or set data.cache_dir to a larger disk",
            self.shards,
            (self.limit_bytes or 0) / 1e9,
            url,
            reason,
        )

    def _entries(self) -> list[tuple[str, int, int]]:
        """(path, time of last use in ns, bytes) of all shards, including those being fetched."""
        entries = []
        with os.scandir(self.shards) as listing:
            for entry in listing:
                if entry.name.endswith((".tar", ".part")):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        entries.append((entry.path, status.st_mtime_ns, status.st_size))
        return entries

    def _evict(self) -> Iterator[int]:
        """Delete what no process has open: partial files of dead processes, then the least recently used shards. Yields
        the bytes of each.

        A partial file is locked by the process that fetches it, until that process dies.
        """
        for path, _, size in sorted(self._entries(), key=lambda entry: (not entry[0].endswith(".part"), entry[1])):
            partial = path.endswith(".part")
            lock = f"{path.removesuffix('.part')}.lock" if partial else path
            # StorageError: not a file of this cache; its reader reports it
            with contextlib.suppress(FileNotFoundError, StorageError):
                handle = open_no_follow(lock, os.O_RDWR | os.O_CREAT if partial else os.O_RDONLY)
                try:
                    is_unused = _try_lock(handle)
                    if is_unused:
                        os.unlink(path)
                finally:
                    os.close(handle)
                if is_unused:
                    yield size


def _is_intact(cached: OpenShard, info: ShardInfo) -> bool:
    """Whether a cached file is still as it was fetched. A copy of a damaged shard counts as intact."""
    try:
        return not cached.verified or storage.sha256_of(cached.path) == (info.sha256, info.bytes)
    except OSError:  # the disk can no longer read it
        return False


@contextlib.contextmanager
def shard_errors(shard: str) -> Iterator[None]:
    """Convert the errors of a shard that does not exist or cannot be opened to StorageError."""
    try:
        with storage.storage_errors("open the shard", shard):
            yield
    except FileNotFoundError as error:
        message = f"the shard {shard} of the manifest does not exist: restore it, or write the shards again"
        raise StorageError(errno.ENOENT, message) from error


def _try_lock(handle: int) -> bool:
    """Take an exclusive lock if nobody holds the file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _allocate(path: str, size: int) -> None:
    """Create a file of `size` bytes. Raises OSError if the disk has no space for it."""
    handle = open_no_follow(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(handle)
