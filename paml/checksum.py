"""Checksums: CRC-32 of images, and a checksum of an Arrow file inside the file itself that detects any changed bit.

The latter is in the schema's metadata, which an Arrow file stores twice: in its first message and in its footer. Both
copies are blanked while the checksum is computed. Other Arrow readers see one more metadata field.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from paml import storage
from paml.errors import PamlError, StorageError
from paml.parsing import PARSE_ERRORS

try:  # ISA-L uses the processor's CRC instructions and is five times as fast as zlib
    from isal.isal_zlib import crc32 as crc32_of
except ImportError:
    from zlib import crc32 as crc32_of

__all__ = [
    "CHECKSUM_PLACEHOLDER",
    "ChecksumError",
    "crc32_of",
    "file_signature",
    "read_with_checksum",
    "verify_checksum",
    "write_checksum",
    "write_with_checksum",
]

T = TypeVar("T")
_BLOCK = 4 << 20
_PREFIX = b"paml-seal-"
_BLANK = _PREFIX + hashlib.sha256(b"a seal not yet set").hexdigest().encode()
_MAGIC = b"ARROW1"
_HEAD, _TAIL = 16, 10  # magic and schema length; footer length and magic

CHECKSUM_PLACEHOLDER: Mapping[bytes, bytes] = {b"seal": _BLANK}
"""Metadata of a schema to be written; `write_checksum` fills it in."""


class ChecksumError(Exception):
    """The bytes differ from those that were written."""


def write_with_checksum(path: str, batch: pa.RecordBatch) -> None:
    """Write one batch to a file, local or s3://, atomically and with a checksum."""
    batch = batch.replace_schema_metadata({**CHECKSUM_PLACEHOLDER, **(batch.schema.metadata or {})})
    with storage.replacing(path) as temporary:
        with pa.ipc.new_file(temporary, batch.schema) as writer:
            writer.write_batch(batch)
        write_checksum(temporary)


def read_with_checksum(
    path: str,
    signature: tuple[int, ...],
    check_kind: Callable[[Mapping[bytes, bytes]], object],
    parse: Callable[[pa.RecordBatch, bool], T],
    damaged: Callable[[Exception], PamlError],
    *,
    refresh: bool = False,
) -> tuple[T, tuple[int, ...]]:
    """Map a file of `write_with_checksum`; returns the result of `parse`, and the file's signature.

    Every byte is checked, unless the file still has `signature`, the one of an earlier call. A remote file is copied to
    the local cache, a second time (`refresh`) if the first copy is damaged.

    check_kind: raises an error for the metadata of another kind of file or version. parse: called with the batch and
    whether the file was checked. damaged: the error to raise for a parse error. Also raises FileNotFoundError.
    """

    try:
        local = storage.local_copy(path, refresh=refresh)
        with pa.memory_map(local) as source:
            data = source.read_buffer()
        current = file_signature(local)
        check = current != signature
        has_checksum = not check or verify_checksum(memoryview(data)) is not None
        reader = pa.ipc.open_file(data)
        check_kind(reader.schema.metadata or {})
        if not has_checksum:
            raise ChecksumError("it has no checksum")
        if reader.num_record_batches != 1:
            raise ChecksumError(f"it has {reader.num_record_batches} record batches, expected 1")
        return parse(reader.get_batch(0), check), current
    except (StorageError, FileNotFoundError):
        raise
    except (PamlError, ChecksumError, OSError, *PARSE_ERRORS) as error:
        if storage.is_remote(path) and not refresh:
            return read_with_checksum(path, (), check_kind, parse, damaged, refresh=True)
        if isinstance(error, PamlError):
            raise
        raise damaged(error) from error


def write_checksum(path: str) -> None:
    """Fill in the checksum of an Arrow file whose metadata has `CHECKSUM_PLACEHOLDER`."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        offsets = _find(data, _BLANK)
        if not offsets:
            raise ValueError(f"{path} has no CHECKSUM_PLACEHOLDER in its metadata")
        with memoryview(data) as view:
            checksum = _PREFIX + _digest(view, offsets).encode()
        for offset in offsets:
            data[offset : offset + len(checksum)] = checksum


def verify_checksum(data: memoryview) -> bytes | None:
    """The checksum stored in an Arrow file; None for a file without one or a truncated file. Raises ChecksumError."""
    if bytes(data[-len(_MAGIC) :]) != _MAGIC:
        return None
    footer = bytes(data[_footer_start(data) :])
    start = footer.rfind(_PREFIX)
    if start < 0:
        return None
    checksum = footer[start : start + len(_BLANK)]
    if checksum != _PREFIX + _digest(data, _find(data, checksum)).encode():
        raise ChecksumError("its bytes differ from those that were written")
    return checksum


def file_signature(path: str) -> tuple[int, ...]:
    """Device, inode, size and times of the last changes: they differ if the file was replaced or modified."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _footer_start(data: memoryview | mmap.mmap) -> int:
    """The offset of the footer, within the file even if the stored length is wrong."""
    if len(data) < _HEAD + _TAIL:
        return 0
    length = struct.unpack("<i", data[-_TAIL : -_TAIL + 4])[0]
    return min(max(len(data) - _TAIL - length, 0), len(data))


def _find(data: memoryview | mmap.mmap, text: bytes) -> list[int]:
    """The offsets of `text` in the schema and in the footer."""
    if len(data) < _HEAD + _TAIL:
        return []
    schema_end = min(max(struct.unpack("<i", data[_HEAD - 4 : _HEAD])[0], 0) + _HEAD, len(data))
    offsets = []
    for start, end in ((0, schema_end), (max(_footer_start(data), schema_end), len(data))):
        part, offset = bytes(data[start:end]), -1
        while (offset := part.find(text, offset + 1)) >= 0:
            offsets.append(start + offset)
    return offsets


def _digest(data: memoryview, blanks: list[int]) -> str:
    """SHA-256 over the SHA-256 of each block, computed in threads, with `_BLANK` at the offsets `blanks`."""

    def hash_block(start: int) -> bytes:
        block = data[start : start + _BLOCK]
        for offset in blanks:
            low, high = max(offset, start), min(offset + len(_BLANK), start + len(block))
            if low < high:
                block = bytearray(block)
                block[low - start : high - start] = _BLANK[low - offset : high - offset]
        return hashlib.sha256(block).digest()

    starts = range(0, len(data), _BLOCK)
    if len(starts) < 3:
        blocks = [hash_block(start) for start in starts]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            blocks = list(pool.map(hash_block, starts))
    return hashlib.sha256(b"".join(blocks) + str(len(data)).encode()).hexdigest()
