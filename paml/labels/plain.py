"""Annotation lines of the usual form, parsed by arithmetic on whole blocks of bytes.

A plain line is 16 lower-case hex digits, a Source, a known class and `0` or `1`, between three commas and a line
feed, with no byte up to the comma's code (blanks, quotes, control characters) or above ASCII in it. Nearly all lines
of a release are such. The rest is handed back untouched for the careful parser, so that this one need not be clever.
"""

from collections.abc import Iterator, Sequence
from io import RawIOBase
from typing import NamedTuple

import numpy as np

from paml.labels.table import words_to_uint64

_COMMA, _LINE_FEED, _ZERO, _LAST = 44, 10, 48, 127
_FOUR_MARKS = np.array([_COMMA, _COMMA, _COMMA, _LINE_FEED], np.uint8)
_WORD = 16  # bytes of a key, and of the longest class that is looked up here


class PlainLines(NamedTuple):
    """What a block of n lines holds.

    keys: uint64[m] and codes: int64[m] (2 * class + state) of its plain lines; odd: its other lines, each with its
    line feed, and odd_lines: int64[k], their numbers within the block, from 0; lines: n. Empty lines are dropped.
    """

    keys: np.ndarray
    codes: np.ndarray
    odd: bytes
    odd_lines: np.ndarray
    lines: int


def blocks_of(file: RawIOBase, size: int) -> Iterator[np.ndarray]:
    """The rest of a file as uint8 blocks of about `size` bytes that end with a line feed, added where it lacks."""
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


class ClassWords:
    """The classes in an open-addressed hash table of 16-byte words. Longer ones are left to the careful parser."""

    def __init__(self, mids: Sequence[str]) -> None:
        texts = [mid.encode() for mid in mids]
        short = np.array([number for number, text in enumerate(texts) if 0 < len(text) <= _WORD], np.int64)
        words = np.frombuffer(b"".join(texts[number].rjust(_WORD, b"\0") for number in short), "<u8").reshape(-1, 2)
        self._first, self._second = np.zeros((2, len(mids) + 1), np.uint64)  # the last, zero, is the empty slot's
        self._first[short], self._second[short] = words.T
        bits = max(8, (16 * len(mids)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._slots = np.full(1 << bits, len(mids), np.int64)
        self._probes = 1
        for number, place in zip(short, self._place(*words.T), strict=True):
            step = 0
            while self._slots[(place + step) % len(self._slots)] < len(mids):
                step += 1
            self._slots[(place + step) % len(self._slots)] = number
            self._probes = max(self._probes, step + 1)
        # A name ends its word; what stands before it there is masked.
        masks = b"".join((b"\xff" * length).rjust(_WORD, b"\0") for length in range(_WORD + 1))
        self._masks = np.ascontiguousarray(np.frombuffer(masks, "<u8").reshape(-1, 2).T)

    def _place(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        scattered = first * np.uint64(0x9E3779B97F4A7C15)
        scattered ^= second * np.uint64(0xC2B2AE3D27D4EB4F)
        scattered *= np.uint64(0x9FB21C651E98DF25)
        return (scattered >> self._shift).astype(np.int64)

    def find(self, words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64[n]: the class whose name is the last `lengths` bytes (int64[n]) of words uint64[n, 2]; -1 for none."""
        size = np.where(lengths <= _WORD, lengths, 0)
        first = words[:, 0] & self._masks[0][size]
        second = words[:, 1] & self._masks[1][size]
        place = self._place(first, second)
        found = self._slots[place]
        wrong = np.flatnonzero((self._first[found] != first) | (self._second[found] != second))
        for step in range(1, self._probes):
            if not len(wrong):
                break
            found[wrong] = again = self._slots[(place[wrong] + step) % len(self._slots)]
            wrong = wrong[(self._first[again] != first[wrong]) | (self._second[again] != second[wrong])]
        found[wrong] = -1
        found[size == 0] = -1
        return found


def parse_block(block: np.ndarray, classes: ClassWords) -> PlainLines:
    """Read one block (uint8[b]) of `blocks_of`. Nearly all the time is spent without the interpreter's lock."""
    # In one comparison: 45 to 127 become 0 to 82, all other bytes more.
    marks = np.flatnonzero(block - np.uint8(_COMMA + 1) > _LAST - _COMMA - 1)
    at = marks[: len(marks) // 4 * 4].reshape(-1, 4)
    if len(marks) % 4 == 0 and (block[at] == _FOUR_MARKS).all():
        ends, line = at[:, 3], None
    else:
        ends = marks[block[marks] == _LINE_FEED]
        line_of = np.searchsorted(ends, marks)
        four = np.bincount(line_of, minlength=len(ends)) == 4
        at = marks[four[line_of]].reshape(-1, 4)
        right = (block[at] == _FOUR_MARKS).all(axis=1)
        at, line = at[right], np.flatnonzero(four)[right]
    starts = np.zeros(len(ends), np.int64)
    np.add(ends[:-1], 1, out=starts[1:])
    begin = starts if line is None else starts[line]
    right = (at[:, 0] - begin == _WORD) & (at[:, 3] - at[:, 2] == 2)
    if not right.all():
        at, begin, line = at[right], begin[right], np.flatnonzero(right) if line is None else line[right]
    if not len(at):
        return _with_odd(block, starts, ends, np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))

    # Sixteen bytes from any place on: numpy copies them in one go, as they need no alignment.
    windows = np.ndarray(len(block) - _WORD + 1, f"V{_WORD}", block, strides=(1,))  # type: ignore[call-overload]
    keys, right = words_to_uint64(windows[begin].view("<u8").reshape(-1, 2))
    cls = classes.find(windows[at[:, 2] - _WORD].view("<u8").reshape(-1, 2), at[:, 2] - at[:, 1] - 1)
    state = block[at[:, 3] - 1] - np.uint8(_ZERO)
    right &= cls >= 0
    right &= state <= 1
    codes = 2 * cls + state
    if right.all():
        return _with_odd(block, starts, ends, keys, codes, line)
    return _with_odd(
        block, starts, ends, keys[right], codes[right], np.flatnonzero(right) if line is None else line[right]
    )


def _with_odd(
    block: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    keys: np.ndarray,
    codes: np.ndarray,
    line: np.ndarray | None,
) -> PlainLines:
    """Add the lines that are not among `line` (None: all lines are)."""
    odd = ends > starts
    odd[slice(None) if line is None else line] = False
    odd_lines = np.flatnonzero(odd)
    bounds = zip(starts[odd_lines].tolist(), (ends[odd_lines] + 1).tolist(), strict=True)
    whole = block.data
    return PlainLines(keys, codes, b"".join(whole[start:end] for start, end in bounds), odd_lines, len(ends))
