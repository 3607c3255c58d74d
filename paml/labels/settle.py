"""Labels as they come, to labels in order: sorted by (key, class), one of equal ones kept, contradictions settled."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from paml.labels.states import LabelError
from paml.labels.table import rough_order

ConflictRule = Literal["negative", "positive", "drop", "error"]
CONFLICT_RULES = {
    "negative": "a pair that is both 1 and 0 is NEGATIVE; the rows that say 1 are rejected",
    "positive": "a pair that is both 1 and 0 is POSITIVE; the rows that say 0 are rejected",
    "drop": "a pair that is both 1 and 0 is left UNOBSERVED; all its rows are rejected",
    "error": "a pair that is both 1 and 0 stops the build",
}
_SETTLE_ROWS = 1 << 20
_BLOCK_ROWS = 1 << 16
Item = TypeVar("Item")
Result = TypeVar("Result")


class Labels(NamedTuple):
    """Labels by image: keys uint64[n], and 2 * class + state of each, codes uint16[n] or uint32[n]."""

    keys: np.ndarray
    codes: np.ndarray


class Settled(NamedTuple):
    """Labels in order, a list an image, and what was put aside on the way."""

    keys: np.ndarray
    """uint64[n], ascending, no repeats."""
    offsets: np.ndarray
    """int64[n + 1], where each image's labels begin in `codes`."""
    codes: np.ndarray
    """[m], ascending within an image."""
    duplicates: Labels
    """Labels that an equal one repeats."""
    contradictions: Labels
    """Labels that lost against another state of their pair, with all their copies."""
    conflicting_pairs: int
    """(image, class) pairs that were both 1 and 0."""


def by_key(keys: np.ndarray, codes: np.ndarray) -> Labels:
    """The labels in ascending order of their keys."""
    order = rough_order(keys)
    ascending = keys[order]
    if (ascending[1:] < ascending[:-1]).any():
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
    return Labels(ascending, codes[order])


def in_blocks(keys: np.ndarray, codes: np.ndarray) -> Iterator[Labels]:
    """Labels in any order as the blocks that `settle` takes, at least one."""
    for start in range(0, max(1, len(keys)), _BLOCK_ROWS):
        yield by_key(keys[start : start + _BLOCK_ROWS], codes[start : start + _BLOCK_ROWS])


def settle(blocks: list[Labels], conflict: ConflictRule, *, threads: int = 1) -> Settled:
    """Settle labels that come in blocks, one or more, each ascending by key (see `by_key`). Empties the list.

    Works on ranges of keys of about a million labels, whose sorting stays in the cache and whose copies stay small.
    """
    total = sum(len(block.keys) for block in blocks)
    pieces = max(1, total // _SETTLE_ROWS)
    step = max(1, total // (64 * pieces))
    # Every step-th of all labels, counted over the blocks, so that small ones have their say too.
    starts = np.cumsum([0, *(len(block.keys) for block in blocks)])
    sample = np.sort(_joined([b.keys[-s % step :: step] for b, s in zip(blocks, starts.tolist(), strict=False)]))
    bounds = np.unique(sample[(np.arange(1, pieces) * len(sample)) // pieces])
    cuts = [[0, *np.searchsorted(block.keys, bounds).tolist(), len(block.keys)] for block in blocks]

    def settle_range(piece: int) -> tuple[np.ndarray, ...]:
        parts = [
            Labels(block.keys[cut[piece] : cut[piece + 1]], block.codes[cut[piece] : cut[piece + 1]])
            for block, cut in zip(blocks, cuts, strict=True)
        ]
        keys, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _settle_piece(keys, codes, conflict)

    columns: list[list[np.ndarray]] = [[] for _ in range(8)]
    with ThreadPoolExecutor(threads, "paml-labels") as pool:
        for piece in ahead(pool, settle_range, range(len(bounds) + 1), threads + 1):
            for column, part in zip(columns, piece, strict=True):
                column.append(part)
    blocks.clear()
    unique, counts, settled, *rejected, conflicting = map(_joined, columns)
    offsets = np.zeros(len(unique) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=offsets[1:])
    return Settled(unique, offsets, settled, Labels(*rejected[:2]), Labels(*rejected[2:]), len(conflicting))


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[Result]:
    """`pool.map(work, items)`, but with at most `limit` items taken and not yet handed out."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= limit:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def refuse_contradictions(settled: Settled, key_text: Callable[[int], str], mids: Sequence[str], advice: str) -> None:
    """Raises LabelError, naming the first, where there are contradictions; for the rule `error`."""
    if settled.conflicting_pairs:
        keys, codes = settled.contradictions
        some = ", ".join(
            f"image {key_text(int(key))} and class {mids[int(code) >> 1]}"
            for key, code in zip(keys[:3], codes[:3], strict=True)
        )
        raise LabelError(f"{settled.conflicting_pairs:,} pairs are both 1 and 0, the first: {some}: {advice}")


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts in one array; the list is emptied on the way, so that both never exist in full."""
    whole = np.empty(sum(len(part) for part in parts), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def _settle_piece(keys: np.ndarray, codes: np.ndarray, conflict: str) -> tuple[np.ndarray, ...]:
    """(keys, counts, codes, duplicate keys, codes, contradicting keys, codes, conflicting pairs) of one range."""
    ascending, codes = by_key(keys, codes)
    starts = np.ones(len(keys), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=starts[1:])
    unique = ascending[starts]
    pairs = np.cumsum(starts, dtype=np.int64)
    pairs -= 1
    pairs <<= 32
    pairs |= codes
    pairs.sort()
    repeats = np.zeros(len(pairs), bool)
    np.equal(pairs[1:], pairs[:-1], out=repeats[1:])
    # A contradiction is two neighbours of one pair once repeats are gone: first the negative, then the positive.
    single = pairs[~repeats] if repeats.any() else pairs
    second = np.flatnonzero((single[1:] >> 1) == (single[:-1] >> 1)) + 1
    conflicting = single[second] >> 1
    lost = np.zeros(len(single), bool)
    lost[second] = conflict != "positive"
    if conflict in ("positive", "drop", "error"):
        lost[second - 1] = True
    repeated, losing = pairs[repeats], single[lost]
    if len(losing) and len(repeated):
        # Copies of a row that loses are contradictions too, not duplicates: all that the file said is counted once.
        copies = np.isin(repeated, losing)
        losing, repeated = np.concatenate([losing, repeated[copies]]), repeated[~copies]
    kept = single[~lost] if len(losing) else single
    counts = np.bincount(kept >> 32, minlength=len(unique))
    has_labels = counts > 0
    low = np.int64(0xFFFFFFFF)
    return (
        unique[has_labels],
        counts[has_labels].astype(np.int32),
        (kept & low).astype(codes.dtype),
        unique[repeated >> 32],
        (repeated & low).astype(codes.dtype),
        unique[losing >> 32],
        (losing & low).astype(codes.dtype),
        conflicting,
    )
