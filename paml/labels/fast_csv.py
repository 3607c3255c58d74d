"""Annotation lines of the usual form, parsed with array arithmetic on whole blocks of bytes.

A usual line is 16 lower-case hex digits, a Source, a known class and `0` or `1`, between three commas and a line feed,
without any byte up to the comma's code (blanks, quotes, control characters) or above ASCII. Nearly all lines of a
release are such. The others are returned unchanged for the general parser.
"""

from collections.abc import Iterator, Sequence
from io import RawIOBase
from typing import NamedTuple

import numpy as np

from paml.labels.keys import words_to_uint64

_COMMA, _LINE_FEED, _ZERO, _LAST_ASCII = 44, 10, 48, 127
_LINE_MARKS = np.array([_COMMA, _COMMA, _COMMA, _LINE_FEED], np.uint8)
_WORD = 16  # bytes of a key, and of the longest class that is looked up here


class ParsedBlock(NamedTuple):
    """The content of a block of n lines. Empty lines are dropped."""

    keys: np.ndarray
    """uint64[m], of the usual lines."""
    codes: np.ndarray
    """int64[m]: 2 * class + state."""
    other: bytes
    """The other lines, each with its line feed."""
    other_lines: np.ndarray
    """int64[k]: their numbers within the block, from 0."""
    lines: int
    """n"""


def read_blocks(file: RawIOBase, size: int) -> Iterator[np.ndarray]:
    """The rest of a file as uint8 blocks of about `size` bytes that end with a line feed, added if it is missing."""
    rest = b""
    while True:
        block = bytearray(len(rest) + size + 1)
        block[: len(rest)] = rest
        end = len(rest) + (file.readinto(memoryview(block)[len(rest) : -1]) or 0)
        if end == len(rest):
            break
        cut = block.rfind(b"\n", 0, end) + 1
        if cut:
            yield np.frombuffer(block, np.uint8, cut)
        rest = block[cut:end]
    if rest:
        yield np.frombuffer(rest + b"\n", np.uint8)


class ClassHashTable:
    """An open-addressing hash table of class names of up to 16 bytes. Longer ones go to the general parser."""

    def __init__(self, classes: Sequence[str]) -> None:
        texts = [cls.encode() for cls in classes]
        short = np.array([number for number, text in enumerate(texts) if 0 < len(text) <= _WORD], np.int64)
        words = np.frombuffer(b"".join(texts[number].rjust(_WORD, b"\0") for number in short), "<u8").reshape(-1, 2)
        self._first, self._second = np.zeros((2, len(classes) + 1), np.uint64)  # the last, zero, marks an empty slot
        self._first[short], self._second[short] = words.T
        bits = max(8, (16 * len(classes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._slots = np.full(1 << bits, len(classes), np.int64)
        self._probes = 1
        for number, slot in zip(short, self._slot_of(*words.T), strict=True):
            step = 0
            while self._slots[(slot + step) % len(self._slots)] < len(classes):
                step += 1
            self._slots[(slot + step) % len(self._slots)] = number
            self._probes = max(self._probes, step + 1)
        # A name is right-aligned in its word; the bytes in front of it are masked.
        masks = b"".join((b"\xff" * length).rjust(_WORD, b"\0") for length in range(_WORD + 1))
        self._masks = np.ascontiguousarray(np.frombuffer(masks, "<u8").reshape(-1, 2).T)

    def _slot_of(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        mixed = first * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= second * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed *= np.uint64(0x9FB21C651E98DF25)
        return (mixed >> self._shift).astype(np.int64)

    def find(self, words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64[n]: the class whose name is the last `lengths` bytes (int64[n]) of words uint64[n, 2], or -1."""
        size = np.where(lengths <= _WORD, lengths, 0)
        first = words[:, 0] & self._masks[0][size]
        second = words[:, 1] & self._masks[1][size]
        slot = self._slot_of(first, second)
        cls = self._slots[slot]
        wrong = np.flatnonzero((self._first[cls] != first) | (self._second[cls] != second))
        for step in range(1, self._probes):
            if not len(wrong):
                break
            cls[wrong] = candidate = self._slots[(slot[wrong] + step) % len(self._slots)]
            wrong = wrong[(self._first[candidate] != first[wrong]) | (self._second[candidate] != second[wrong])]
        cls[wrong] = -1
        cls[size == 0] = -1
        return cls


def parse_block(block: np.ndarray, classes: ClassHashTable) -> ParsedBlock:
    """Parse one block (uint8[b]) of `read_blocks`. Nearly all the time is spent without the interpreter lock."""
    # One comparison: 45 to 127 become 0 to 82, all other bytes more.
    marks = np.flatnonzero(block - np.uint8(_COMMA + 1) > _LAST_ASCII - _COMMA - 1)
    fields = marks[: len(marks) // 4 * 4].reshape(-1, 4)  # of each line: its three commas and its line feed
    if len(marks) % 4 == 0 and (block[fields] == _LINE_MARKS).all():
        ends = fields[:, 3]
        line = np.arange(len(ends))
    else:
        ends = marks[block[marks] == _LINE_FEED]
        line_of = np.searchsorted(ends, marks)
        has_four = np.bincount(line_of, minlength=len(ends)) == 4
        fields = marks[has_four[line_of]].reshape(-1, 4)
        usual = (block[fields] == _LINE_MARKS).all(axis=1)
        fields, line = fields[usual], np.flatnonzero(has_four)[usual]
    starts = np.zeros(len(ends), np.int64)
    np.add(ends[:-1], 1, out=starts[1:])
    usual = (fields[:, 0] - starts[line] == _WORD) & (fields[:, 3] - fields[:, 2] == 2)
    if not usual.all():
        fields, line = fields[usual], line[usual]
    keys, codes = np.empty(0, np.uint64), np.empty(0, np.int64)
    if len(line):
        # numpy copies 16 bytes from any offset at once, because void types need no alignment.
        windows = np.ndarray(len(block) - _WORD + 1, f"V{_WORD}", block, strides=(1,))  # type: ignore[call-overload]
        keys, usual = words_to_uint64(windows[starts[line]].view("<u8").reshape(-1, 2))
        cls = classes.find(windows[fields[:, 2] - _WORD].view("<u8").reshape(-1, 2), fields[:, 2] - fields[:, 1] - 1)
        state = block[fields[:, 3] - 1] - np.uint8(_ZERO)
        usual &= cls >= 0
        usual &= state <= 1
        codes = 2 * cls + state
        if not usual.all():
            keys, codes, line = keys[usual], codes[usual], line[usual]
    is_other = ends > starts
    is_other[line] = False
    other_lines = np.flatnonzero(is_other)
    bounds = zip(starts[other_lines].tolist(), (ends[other_lines] + 1).tolist(), strict=True)
    data = block.data
    return ParsedBlock(keys, codes, b"".join(data[start:end] for start, end in bounds), other_lines, len(ends))
