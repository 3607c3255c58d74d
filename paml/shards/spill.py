"""Intermediate files of the shard writer: spills, each with encoded images of one part, sorted by shard.

A spill is one file, written atomically. Its header describes which images of the part it covers, what happened to those
without a record, and where the records of each shard are. The records follow, sorted by shard, so that one range read
returns the records of consecutive shards. Header and records have checksums.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from paml import storage
from paml.checksum import crc32_of
from paml.parsing import PARSE_ERRORS, parse_json_object
from paml.shards.images import EXTENSIONS, PreparedImage
from paml.sources.parts import Part

_RECORD = struct.Struct("<16sQHBIII")
"""Digest, size of the source file, size of the key, extension, width, height, size of the image. The CRC-32 of the
image, these fields and the key follows, then the key and the image."""
_CHECKSUM_BYTES = 4
_PREAMBLE = struct.Struct("<4sII")
"""Magic, size of the header, CRC-32 of the header."""
_FILE_MAGIC = b"PMLp"


def key_digest(seed: int, key: str) -> bytes:
    """16 bytes that determine a sample's shard and its position in it: BLAKE2b of the key, keyed by the seed."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16, key=seed.to_bytes(8, "little")).digest()


def shard_of(digest: bytes, num_shards: int) -> int:
    return int.from_bytes(digest[:8], "big") % num_shards


class Record(NamedTuple):
    """One encoded image."""

    digest: bytes
    source_bytes: int
    """Size of the source file: of two images with the same key, the one of the larger file is used."""
    key: str
    extension: str
    width: int
    height: int
    image: memoryview
    crc32: int


def pack(key: str, digest: bytes, source_bytes: int, image: PreparedImage) -> bytes:
    """The bytes of a record: header, checksum, key, image."""
    name, extension = key.encode("utf-8"), EXTENSIONS.index(image.extension)
    size = len(image.data)
    header = _RECORD.pack(digest, source_bytes, len(name), extension, image.width, image.height, size)
    checksum = crc32_of(name, crc32_of(header, crc32_of(image.data)))
    return b"".join((header, checksum.to_bytes(_CHECKSUM_BYTES, "little"), name, image.data))


class DamagedSpillError(Exception):
    """A spill that is truncated, changed or missing, for example after a power failure."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


def read_records(data: memoryview, path: str) -> Iterator[Record]:
    """The records in a range of a spill, in order. Raises DamagedSpillError at the first damaged record."""
    offset = 0
    while offset < len(data):
        try:
            digest, source_bytes, key_size, extension, width, height, size = _RECORD.unpack_from(data, offset)
            header = data[offset : offset + _RECORD.size]
            start = offset + _RECORD.size + _CHECKSUM_BYTES
            name, image = data[start : start + key_size], data[start + key_size : start + key_size + size]
            crc32 = crc32_of(image)
            if crc32_of(name, crc32_of(header, crc32)) != int.from_bytes(
                data[start - _CHECKSUM_BYTES : start], "little"
            ):
                raise ValueError("checksum mismatch")
            key, suffix = bytes(name).decode(), EXTENSIONS[extension]
        except (struct.error, ValueError, IndexError) as error:
            raise DamagedSpillError(path, f"the record at offset {offset} of the range: {error}") from error
        yield Record(digest, source_bytes, key, suffix, width, height, image, crc32)
        offset = start + key_size + size


@dataclasses.dataclass(kw_only=True)
class SpillHeader:
    """Which images of a part a spill covers, and what happened to those without a record."""

    first: int
    end: int
    """The spill covers the part's images [first, end), counted from 0."""
    last: bool = False
    """Whether the part has no images after `end`."""
    keys: str = ""
    """Digest of the part's keys up to `end`. The part is read again if its keys have changed."""
    unwanted: int = 0
    """Number of images that were not requested."""
    absent: int = 0
    """Number of requested keys for which the part has no image."""
    rejects: dict[str, str] = dataclasses.field(default_factory=dict)
    """Key and reason of the unusable images; the alphabetically first of several reasons."""


@dataclasses.dataclass(kw_only=True)
class Spill(SpillHeader):
    """A spill on the storage."""

    path: str
    shards: np.ndarray
    """int64[n], ascending: shards with records."""
    ends: np.ndarray
    """int64[n]: offset at which each shard's records end; they start where the previous ones end."""
    start: int
    """Offset of the first record."""
    header_crc32: int

    def offsets(self, shards: np.ndarray) -> np.ndarray:
        """int64[m]: offset of the first record of each of the shards (int64[m]) or of a later shard."""
        starts = np.concatenate([[self.start], self.ends])
        return starts[np.searchsorted(self.shards, shards)]


def spill_stem(part: Part) -> str:
    """The prefix of the file names of a part's spills; a part of another length gets another one."""
    identity = json.dumps([part.name, part.images, part.bytes])
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def spill_path(work: str, stem: str, number: int) -> str:
    return storage.join(work, f"{stem}-{number:05d}.spill")


def write_spill(path: str, records: Sequence[tuple[int, bytes, bytes]], header: SpillHeader) -> None:
    """Write (shard, digest, packed record) triples, in any order, as one spill."""
    ordered = sorted(records, key=lambda record: record[:2])
    sizes: dict[int, int] = {}
    for shard, _, data in ordered:
        sizes[shard] = sizes.get(shard, 0) + len(data)
    fields = {**dataclasses.asdict(header), "shards": list(sizes), "sizes": list(sizes.values())}
    encoded = json.dumps(fields).encode()
    with storage.replacing(path) as temporary, open(temporary, "wb", buffering=1 << 20) as file:
        file.write(_PREAMBLE.pack(_FILE_MAGIC, len(encoded), crc32_of(encoded)))
        file.write(encoded)
        file.writelines(data for _, _, data in ordered)


def read_spill(path: str) -> Spill:
    """Read the header of a spill. Raises FileNotFoundError, or DamagedSpillError."""
    size = storage.size_of(path)
    if size < _PREAMBLE.size:
        raise DamagedSpillError(path, "its header is truncated")
    magic, header_size, checksum = _PREAMBLE.unpack(storage.read_range(path, 0, _PREAMBLE.size))
    start = _PREAMBLE.size + header_size
    if magic != _FILE_MAGIC or size < start:
        raise DamagedSpillError(path, "its header is truncated or changed")
    header = storage.read_range(path, _PREAMBLE.size, header_size)
    if crc32_of(header) != checksum:
        raise DamagedSpillError(path, "checksum mismatch in its header")
    try:
        fields = parse_json_object(header)
        ends = start + np.cumsum(np.array(fields.pop("sizes"), np.int64))
        fields["rejects"] = {str(key): str(reason) for key, reason in fields["rejects"].items()}
        fields["shards"] = np.array(fields["shards"], np.int64)
        spill = Spill(**fields, path=path, ends=ends, start=start, header_crc32=checksum)
        counts = (spill.first, spill.end, spill.unwanted, spill.absent)
        ascending = (np.diff(ends, prepend=start) >= 0).all() and (np.diff(spill.shards) > 0).all()
        if any(type(count) is not int for count in counts) or not ascending or len(spill.shards) != len(ends):
            raise ValueError("its counts or offsets are inconsistent")
        end = int(ends[-1]) if len(ends) else start
    except PARSE_ERRORS as error:
        raise DamagedSpillError(path, f"its header is invalid ({type(error).__name__}: {error})") from error
    if size != end:
        raise DamagedSpillError(path, f"it has {size} bytes instead of {end}")
    return spill


def read_spills(work: str, stem: str) -> list[Spill]:
    """The consecutive spills of a part from its first image. Deletes a damaged spill, or one after a gap."""
    spills: list[Spill] = []
    while not (spills and spills[-1].last):
        path = spill_path(work, stem, len(spills))
        try:
            spill = read_spill(path)
            if spill.first != (spills[-1].end if spills else 0):
                raise DamagedSpillError(path, "it does not continue the previous one")
        except FileNotFoundError:
            break
        except DamagedSpillError:
            storage.delete(path)
            break
        spills.append(spill)
    return spills


def digest_set(seed: int, keys: Iterable[str]) -> np.ndarray:
    """S16[n], ascending: the distinct digests of the keys, as a set in 16 bytes each."""
    return np.unique(np.fromiter((key_digest(seed, key) for key in keys), "S16"))


def is_in_set(digest: bytes, digests: np.ndarray) -> bool:
    """Whether a digest is in a `digest_set`."""
    value = np.array(digest, "S16")
    position = np.searchsorted(digests, value)
    return bool(position < len(digests) and digests[position] == value)
