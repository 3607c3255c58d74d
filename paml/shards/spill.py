"""Encoded images on their way to their shards: one append-only file a shard, and a journal of what they hold.

Sources are read once, in whatever order they have; the image of a key belongs to a shard given by its hash,
so images for all shards arrive mixed. Each goes to the end of its shard's spill file. A journal entry follows
the bytes it speaks of, so after a cut everything that the journal names is in the files, and what lies beyond
is cut off. Memory is bounded by `buffer_bytes`, and by 28 bytes a sample for the journal when a run goes on.
"""

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paml.shards.images import EXTENSIONS, Prepared
from paml.storage import StorageError

_RECORD = struct.Struct("<4sI16sQHBxIIII")
"""Mark, CRC-32 of the rest and the key, digest, place in the source, bytes of the key, extension, width,
height, bytes of the image, CRC-32 of the image."""
_MARK = b"PMLs"
_FRAME = struct.Struct("<4sII")
"""Mark, number of entries, CRC-32 of the entries."""
_FRAME_MARK = b"PMLj"
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("end", "<u8")])


def key_digest(seed: int, key: str) -> bytes:
    """16 bytes that decide a sample's shard and its place in it: BLAKE2b of the key, keyed by the seed."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16, key=seed.to_bytes(8, "little")).digest()


def shard_of(digest: bytes, num_shards: int) -> int:
    return int.from_bytes(digest[:8], "big") % num_shards


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's errors while writing into StorageError with a way out."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            error.errno,
            f"cannot write {os.fspath(path)!r}: {error.strerror or error}: free some space, mend its "
            "permissions or choose another folder; the same call then goes on where this one stood",
        ) from error


class Record(NamedTuple):
    """One image in a spill file."""

    digest: bytes
    sequence: int
    """Place in the source: the first of two with one key wins."""
    key: str
    extension: str
    width: int
    height: int
    start: int
    """Of the image's bytes in the spill file."""
    size: int
    crc32: int


def pack(key: str, digest: bytes, sequence: int, image: Prepared) -> bytes:
    """A record: header, key, image."""
    name = key.encode("utf-8")
    header = _RECORD.pack(
        _MARK,
        0,
        digest,
        sequence,
        len(name),
        EXTENSIONS.index(image.extension),
        image.width,
        image.height,
        len(image.data),
        zlib.crc32(image.data),
    )
    checksum = zlib.crc32(name, zlib.crc32(header[8:]))
    return b"".join((header[:4], checksum.to_bytes(4, "little"), header[8:], name, image.data))


class DamagedSpill(Exception):
    """A record that fails its checksum, e.g. after a power cut."""


def read_records(data: memoryview) -> Iterator[Record]:
    """The records of a spill file, in its order. Raises DamagedSpill at the first that is torn or changed."""
    at = 0
    while at < len(data):
        header = data[at : at + _RECORD.size]
        if len(header) < _RECORD.size:
            raise DamagedSpill(f"a record is cut at byte {at}")
        mark, checksum, digest, sequence, key_size, extension, width, height, size, crc32 = _RECORD.unpack(header)
        start = at + _RECORD.size + key_size
        name = bytes(data[at + _RECORD.size : start])
        if mark != _MARK or zlib.crc32(name, zlib.crc32(header[8:])) != checksum:
            raise DamagedSpill(f"the record at byte {at} fails its checksum")
        image = data[start : start + size]
        if len(image) < size or zlib.crc32(image) != crc32:
            raise DamagedSpill(f"the image of {name.decode()!r} at byte {start} fails its checksum")
        yield Record(digest, sequence, name.decode(), EXTENSIONS[extension], width, height, start, size, crc32)
        at = start + size


class Spill:
    """The spill files of a run and their journal, in a local folder."""

    def __init__(self, folder: Path, num_shards: int, *, finished: set[int], buffer_bytes: int = 64 << 20) -> None:
        """Open a new or cut-off spill. `finished` are the shards whose tar files are in place already."""
        self.folder = folder
        self._journal = folder / "journal.bin"
        self._buffer_bytes = buffer_bytes
        self._buffered = 0
        self._pending: dict[int, list[bytes]] = {}
        self._entries: list[tuple[int, int, int, int]] = []
        self._ends = np.zeros(num_shards, np.int64)
        with writing(folder):
            self.done, self.lost = self._recover(finished)

    def path(self, shard: int) -> Path:
        return self.folder / f"spill-{shard:06d}.bin"

    def _read_journal(self) -> np.ndarray:
        try:
            data = self._journal.read_bytes()
        except FileNotFoundError:
            return np.zeros(0, _ENTRY)
        frames, at = [], 0
        while at + _FRAME.size <= len(data):
            mark, count, checksum = _FRAME.unpack_from(data, at)
            body = data[at + _FRAME.size : at + _FRAME.size + count * _ENTRY.itemsize]
            if mark != _FRAME_MARK or len(body) < count * _ENTRY.itemsize or zlib.crc32(body) != checksum:
                break
            frames.append(np.frombuffer(body, _ENTRY))
            at += _FRAME.size + len(body)
        return np.concatenate(frames) if frames else np.zeros(0, _ENTRY)

    def _recover(self, finished: set[int]) -> tuple["KeySet", int]:
        """Keep what the journal names and the files hold, cut off the rest: (done keys, entries lost)."""
        entries = self._read_journal()
        shards = entries["shard"].astype(np.int64)
        sizes = np.zeros(len(self._ends), np.int64)
        for shard in range(len(sizes)):
            with contextlib.suppress(FileNotFoundError):
                sizes[shard] = self.path(shard).stat().st_size
        is_finished = np.zeros(len(sizes), bool)
        is_finished[list(finished)] = True
        kept = is_finished[shards] | (entries["end"].astype(np.int64) <= sizes[shards])
        lost = int((~kept).sum())
        entries, shards = entries[kept], shards[kept]
        live = ~is_finished[shards]
        np.maximum.at(self._ends, shards[live], entries["end"][live].astype(np.int64))
        for shard in np.flatnonzero((sizes > self._ends) & ~is_finished):
            os.truncate(self.path(int(shard)), int(self._ends[shard]))
        if len(entries) or self._journal.exists():
            temporary = self._journal.with_suffix(".tmp")
            temporary.write_bytes(_frame(entries))
            os.replace(temporary, self._journal)
        return KeySet(entries["high"], entries["low"]), lost

    def add(self, shard: int, digest: bytes, record: bytes) -> None:
        """Append a record; it is safe once `flush` has returned."""
        self._pending.setdefault(shard, []).append(record)
        self._ends[shard] += len(record)
        self._entries.append((*_halves(digest), shard, int(self._ends[shard])))
        self._buffered += len(record)
        if self._buffered >= self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Append what is in memory to the files, then to the journal. Raises StorageError."""
        if not self._entries:
            return
        for shard, records in self._pending.items():
            path = self.path(shard)
            with writing(path), open(path, "ab") as file:
                file.writelines(records)
        with writing(self._journal), open(self._journal, "ab") as file:
            file.write(_frame(np.array(self._entries, _ENTRY)))
        self._pending, self._entries, self._buffered = {}, [], 0


def _frame(entries: np.ndarray) -> bytes:
    body = entries.tobytes()
    return _FRAME.pack(_FRAME_MARK, len(entries), zlib.crc32(body)) + body


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


class KeySet:
    """A set of digests in 16 bytes each, with a place for each: sorted arrays and a binary search."""

    def __init__(self, high: np.ndarray, low: np.ndarray) -> None:
        order = np.lexsort((low, high))
        self._high, self._low = high[order], low[order]
        if len(order):
            new = np.ones(len(order), bool)
            new[1:] = (self._high[1:] != self._high[:-1]) | (self._low[1:] != self._low[:-1])
            self._high, self._low = self._high[new], self._low[new]

    @classmethod
    def of(cls, digests: list[bytes]) -> "KeySet":
        halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
        return cls(halves[:, 0], halves[:, 1])

    def __len__(self) -> int:
        return len(self._high)

    def find(self, digest: bytes) -> int:
        """The place of a digest among the sorted ones, -1 where it is not in the set."""
        high, low = _halves(digest)
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return at
            at += 1
        return -1
