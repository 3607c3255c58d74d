"""A checksum inside an Arrow file over all of its bytes, so that a bit changed anywhere is found before it is used.

It stands in the schema's metadata, which an Arrow file holds twice, at its head and in its footer, and is taken
with both places blanked. To other readers of Arrow it is one more field of the metadata.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

_BLOCK = 4 << 20
_PREFIX = b"paml-seal-"
_BLANK = _PREFIX + hashlib.sha256(b"a seal not yet set").hexdigest().encode()
_MAGIC = b"ARROW1"
_HEAD, _TAIL = 16, 10  # magic and the length of the schema; the length of the footer and the magic

UNSEALED: Mapping[bytes, bytes] = {b"seal": _BLANK}
"""To be merged into the metadata of the schema that is written; `seal_file` then fills it in."""


class BrokenSeal(Exception):
    """The bytes are not those that were sealed."""


def seal_file(path: str) -> None:
    """Fill in the checksum of an Arrow file that was written with `UNSEALED` in its metadata."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        places = _places(data, _BLANK)
        if not places:
            raise ValueError(f"{path} has no place for a seal: write it with UNSEALED in its metadata")
        with memoryview(data) as view:
            seal = _PREFIX + _digest(view, places).encode()
        for place in places:
            data[place : place + len(seal)] = seal


def check_seal(data: memoryview) -> bytes | None:
    """The seal of an Arrow file's bytes, which hold it; None where there is none, or no end. Raises BrokenSeal."""
    if bytes(data[-len(_MAGIC) :]) != _MAGIC:
        return None
    footer = bytes(data[_footer(data) :])
    start = footer.rfind(_PREFIX)
    if start < 0:
        return None
    seal = footer[start : start + len(_BLANK)]
    if seal != _PREFIX + _digest(data, _places(data, seal)).encode():
        raise BrokenSeal("its bytes are not those that were written")
    return seal


def file_mark(path: str) -> tuple[int, ...]:
    """What tells a file from the one that it was: device, number, size and times of the last changes."""
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _footer(data: memoryview | mmap.mmap) -> int:
    """Where the footer begins, within the file whatever its length says."""
    if len(data) < _HEAD + _TAIL:
        return 0
    length = struct.unpack("<i", data[-_TAIL : -_TAIL + 4])[0]
    return min(max(len(data) - _TAIL - length, 0), len(data))


def _places(data: memoryview | mmap.mmap, text: bytes) -> list[int]:
    """Where `text` stands in the schema at the head and in the footer."""
    if len(data) < _HEAD + _TAIL:
        return []
    schema = min(max(struct.unpack("<i", data[_HEAD - 4 : _HEAD])[0], 0) + _HEAD, len(data))
    found = []
    for start, end in ((0, schema), (max(_footer(data), schema), len(data))):
        part, place = bytes(data[start:end]), -1
        while (place := part.find(text, place + 1)) >= 0:
            found.append(start + place)
    return found


def _digest(data: memoryview, blanks: list[int]) -> str:
    """SHA-256 over the SHA-256 of each block, which several threads take, with `_BLANK` at the places `blanks`."""

    def of_block(start: int) -> bytes:
        block = data[start : start + _BLOCK]
        for place in blanks:
            low, high = max(place, start), min(place + len(_BLANK), start + len(block))
            if low < high:
                block = bytearray(block)
                block[low - start : high - start] = _BLANK[low - place : high - place]
        return hashlib.sha256(block).digest()

    starts = range(0, len(data), _BLOCK)
    if len(starts) < 3:
        blocks = [of_block(start) for start in starts]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            blocks = list(pool.map(of_block, starts))
    return hashlib.sha256(b"".join(blocks) + str(len(data)).encode()).hexdigest()
