"""Intermediate files of the shard writer: pieces, each with encoded images of one part, sorted by shard.

A piece is one file, whole or absent. Its header says which images of the part it covers, what became of those
that are not in it, and where each shard's records lie. The records follow, sorted by shard, so that one read of
a range gets all that a piece has for consecutive shards. Header and records carry checksums.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from paml import storage
from paml.reading import MISSHAPEN, parse_object
from paml.shards.crc import crc32_of
from paml.shards.images import EXTENSIONS, Prepared
from paml.sources.parts import Part
from paml.storage import StorageError

_RECORD = struct.Struct("<4sI16sQHBxIIII")
"""Mark, CRC-32 of the rest and the key, digest, bytes of the source's file, bytes of the key, extension, width,
height, bytes of the image, CRC-32 of the image."""
_MARK = b"PMLs"
_HEAD = struct.Struct("<4sII")
"""Mark, bytes of the header, CRC-32 of the header."""
_HEAD_MARK = b"PMLp"


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
    """One encoded image."""

    digest: bytes
    source_bytes: int
    """Size of the file that it was made of: of two with one key the larger file wins."""
    key: str
    extension: str
    width: int
    height: int
    image: memoryview
    crc32: int


def pack(key: str, digest: bytes, source_bytes: int, image: Prepared) -> bytes:
    """A record: header, key, image."""
    name = key.encode("utf-8")
    header = _RECORD.pack(
        _MARK,
        0,
        digest,
        source_bytes,
        len(name),
        EXTENSIONS.index(image.extension),
        image.width,
        image.height,
        len(image.data),
        crc32_of(image.data),
    )
    checksum = crc32_of(name, crc32_of(header[8:]))
    return b"".join((header[:4], checksum.to_bytes(4, "little"), header[8:], name, image.data))


class DamagedPiece(Exception):
    """A piece that is torn, changed or gone, e.g. after a power cut; holds its path."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def read_records(data: memoryview, path: str) -> Iterator[Record]:
    """The records of a range of a piece, in its order. Raises DamagedPiece at the first that is torn or changed."""
    at = 0
    while at < len(data):
        header = data[at : at + _RECORD.size]
        if len(header) < _RECORD.size:
            raise DamagedPiece(path, "a record is cut")
        mark, checksum, digest, source_bytes, key_size, extension, width, height, size, crc32 = _RECORD.unpack(header)
        start = at + _RECORD.size + key_size
        name = bytes(data[at + _RECORD.size : start])
        if mark != _MARK or crc32_of(name, crc32_of(header[8:])) != checksum:
            raise DamagedPiece(path, f"the record {at} bytes into its range fails its checksum")
        image = data[start : start + size]
        try:
            key, suffix = name.decode(), EXTENSIONS[extension]
        except (UnicodeDecodeError, IndexError) as error:
            raise DamagedPiece(path, f"the record {at} bytes into its range is none: {error}") from error
        if len(image) < size or crc32_of(image) != crc32:
            raise DamagedPiece(path, f"the image of {key!r} fails its checksum")
        yield Record(digest, source_bytes, key, suffix, width, height, image, crc32)
        at = start + size


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a piece's header says."""

    path: str
    part: str
    """Name of the part whose images it holds."""
    first: int
    end: int
    """It covers the part's images from `first` up to `end`, counted from 0."""
    last: bool
    """The part has no images after `end`."""
    keys: str
    """Digest of the part's keys from the first one up to `end`: a part that gives others now is read anew."""
    unwanted: int
    """Images whose key is not wanted."""
    absent: int
    """Wanted keys that the part has no image for."""
    rejects: tuple[tuple[str, str], ...]
    """(key, reason) of the images that cannot be used."""
    shards: np.ndarray
    """int64[n]: shards that it has records of, ascending."""
    ends: np.ndarray
    """int64[n]: byte within the file at which each shard's records end; they begin where the one before ends."""
    start: int
    """Byte at which the records begin."""
    mark: int
    """Checksum of the header."""

    @property
    def record_bytes(self) -> int:
        return int(self.ends[-1]) - self.start if len(self.ends) else 0

    def offsets(self, shards: np.ndarray) -> np.ndarray:
        """Byte at which the records of each of int64[m] `shards`, or of the next one that it has, begin."""
        starts = np.concatenate([[self.start], self.ends])
        return starts[np.searchsorted(self.shards, shards)]


def piece_stem(part: Part) -> str:
    """What the file names of a part's pieces begin with: a part of another length is another one."""
    mark = json.dumps([part.name, part.images, part.bytes])
    return hashlib.sha256(mark.encode()).hexdigest()[:24]


def piece_path(work: str, stem: str, number: int) -> str:
    return storage.join(work, f"{stem}-{number:05d}.piece")


def write_piece(
    path: str,
    records: Sequence[tuple[int, bytes, bytes]],
    *,
    part: str,
    first: int,
    end: int,
    last: bool,
    keys: str,
    unwanted: int,
    absent: int,
    rejects: Sequence[tuple[str, str]],
) -> None:
    """Write (shard, digest, packed record) triples, in any order, as one piece, whole or not at all."""
    ordered = sorted(records, key=lambda record: record[:2])
    sizes: dict[int, int] = {}
    for shard, _, data in ordered:
        sizes[shard] = sizes.get(shard, 0) + len(data)
    header = json.dumps(
        {
            "part": part,
            "first": first,
            "end": end,
            "last": last,
            "keys": keys,
            "unwanted": unwanted,
            "absent": absent,
            "rejects": rejects,
            "shards": list(sizes),
            "sizes": list(sizes.values()),
        }
    ).encode()
    head = _HEAD.pack(_HEAD_MARK, len(header), crc32_of(header))
    with storage.replacing(path) as temporary, writing(path), open(temporary, "wb", buffering=1 << 20) as file:
        file.write(head)
        file.write(header)
        file.writelines(data for _, _, data in ordered)


def read_piece(path: str) -> Piece:
    """The header of a piece. Raises FileNotFoundError where there is none, DamagedPiece where it is torn."""
    size = storage.size_of(path)
    if size < _HEAD.size:
        raise DamagedPiece(path, "its header is cut")
    mark, header_size, checksum = _HEAD.unpack(storage.read_range(path, 0, _HEAD.size))
    if mark != _HEAD_MARK or size < _HEAD.size + header_size:
        raise DamagedPiece(path, "its header is cut or changed")
    header = storage.read_range(path, _HEAD.size, header_size) if header_size else b""
    if crc32_of(header) != checksum:
        raise DamagedPiece(path, "its header fails its checksum")
    start = _HEAD.size + header_size
    try:
        piece = _piece(path, parse_object(header), start, checksum)
    except MISSHAPEN as error:
        raise DamagedPiece(path, f"its header is none of a piece ({type(error).__name__}: {error})") from error
    if size != start + piece.record_bytes:
        raise DamagedPiece(path, f"it has {size} bytes, not {start + piece.record_bytes}")
    return piece


def _piece(path: str, fields: dict[str, Any], start: int, mark: int) -> Piece:
    piece = Piece(
        path=path,
        part=fields["part"],
        first=fields["first"],
        end=fields["end"],
        last=fields["last"],
        keys=fields["keys"],
        unwanted=fields["unwanted"],
        absent=fields["absent"],
        rejects=tuple((key, reason) for key, reason in fields["rejects"]),
        shards=np.array(fields["shards"], np.int64),
        ends=start + np.cumsum(np.array(fields["sizes"], np.int64)),
        start=start,
        mark=mark,
    )
    counts = (piece.first, piece.end, piece.unwanted, piece.absent)
    rising = (np.diff(piece.ends, prepend=start) >= 0).all() and (np.diff(piece.shards) > 0).all()
    if any(type(count) is not int for count in counts) or not rising or len(piece.shards) != len(piece.ends):
        raise ValueError("its counts or places are no such")
    return piece


def read_pieces(work: str, stem: str) -> list[Piece]:
    """The pieces of a part that join up from its first image on; what follows a gap or damage is removed."""
    found: list[Piece] = []
    while not (found and found[-1].last):
        path = piece_path(work, stem, len(found))
        try:
            piece = read_piece(path)
        except FileNotFoundError:
            break
        except DamagedPiece:
            storage.delete(path)
            break
        if piece.first != (found[-1].end if found else 0):
            storage.delete(path)
            break
        found.append(piece)
    return found


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
    def of(cls, digests: Iterable[bytes]) -> "KeySet":
        joined = bytearray()
        for digest in digests:
            joined += digest
        halves = np.frombuffer(joined, ">u8").reshape(-1, 2).astype(np.uint64)
        return cls(halves[:, 0], halves[:, 1])

    def __len__(self) -> int:
        return len(self._high)

    def digest(self) -> str:
        """The same for the same set, whatever its order."""
        return hashlib.sha256(self._high.tobytes() + self._low.tobytes()).hexdigest()

    def __contains__(self, digest: bytes) -> bool:
        high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return True
            at += 1
        return False
