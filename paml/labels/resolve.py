"""Sort labels by (key, class), drop duplicates and resolve contradictions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from paml.errors import LabelError
from paml.labels.keys import approximate_argsort, as_text

ConflictRule = Literal["negative", "positive", "drop", "error"]
CONFLICT_RULES = {
    "negative": "a pair with both states becomes NEGATIVE; its positive rows are rejected",
    "positive": "a pair with both states becomes POSITIVE; its negative rows are rejected",
    "drop": "a pair with both states stays UNOBSERVED; all its rows are rejected",
    "error": "a pair with both states stops the build",
}
_PIECE_ROWS = 1 << 20
_BLOCK_ROWS = 1 << 16
Item = TypeVar("Item")
Result = TypeVar("Result")


class Labels(NamedTuple):
    """Labels in flat arrays: keys uint64[n], and 2 * class + state of each, codes uint16[n] or uint32[n]."""

    keys: np.ndarray
    codes: np.ndarray


class ResolvedLabels(NamedTuple):
    """Sorted labels, one list per image, and the labels that were removed."""

    keys: np.ndarray
    """uint64[n], ascending, no repeats."""
    offsets: np.ndarray
    """int64[n + 1], where each image's labels start in `codes`."""
    codes: np.ndarray
    """[m], ascending within an image."""
    duplicates: Labels
    """Repeats of an equal label."""
    contradictions: Labels
    """Labels overruled by the other state of their pair, with all their copies."""
    conflicting_pairs: int
    """(image, class) pairs that had both states."""


def check_conflict_rule(rule: str) -> None:
    """Raise LabelError if `rule` is not one of CONFLICT_RULES."""
    if rule not in CONFLICT_RULES:
        raise LabelError(f"conflict is {rule!r}, allowed are {', '.join(CONFLICT_RULES)}")


def sort_by_key(keys: np.ndarray, codes: np.ndarray) -> Labels:
    """The labels in ascending order of their keys."""
    order = approximate_argsort(keys)
    ascending = keys[order]
    if (ascending[1:] < ascending[:-1]).any():
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
    return Labels(ascending, codes[order])


def sorted_blocks(keys: np.ndarray, codes: np.ndarray) -> Iterator[Labels]:
    """Labels in any order as the sorted blocks that `resolve` takes, at least one."""
    for start in range(0, max(1, len(keys)), _BLOCK_ROWS):
        yield sort_by_key(keys[start : start + _BLOCK_ROWS], codes[start : start + _BLOCK_ROWS])


def resolve(
    blocks: list[Labels],
    conflict: ConflictRule,
    stored: Callable[[np.ndarray], pa.Array],
    classes: Sequence[str],
    *,
    threads: int = 1,
) -> ResolvedLabels:
    """Sort and resolve labels given as one or more blocks, each ascending by key. Empties the list to save memory.

    Works on ranges of keys with about a million labels each: sorting then stays in the cache and copies stay small.
    stored: turns keys into those of the table. Raises LabelError for a contradiction by the rule `error`, with an
    example, and for another rule.
    """
    check_conflict_rule(conflict)
    total = sum(len(block.keys) for block in blocks)
    pieces = max(1, total // _PIECE_ROWS)
    step = max(1, total // (64 * pieces))
    # Sample every step-th label, counting across blocks, so that small blocks are represented.
    starts = np.cumsum([0, *(len(block.keys) for block in blocks)])
    sample = np.sort(_concatenate([b.keys[-s % step :: step] for b, s in zip(blocks, starts.tolist(), strict=False)]))
    bounds = np.unique(sample[(np.arange(1, pieces) * len(sample)) // pieces])
    cuts = [[0, *np.searchsorted(block.keys, bounds).tolist(), len(block.keys)] for block in blocks]

    def resolve_range(piece: int) -> tuple[np.ndarray, ...]:
        parts = [
            Labels(block.keys[cut[piece] : cut[piece + 1]], block.codes[cut[piece] : cut[piece + 1]])
            for block, cut in zip(blocks, cuts, strict=True)
        ]
        keys, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _resolve_piece(keys, codes, conflict)

    columns: list[list[np.ndarray]] = [[] for _ in range(8)]
    with ThreadPoolExecutor(threads, "paml-labels") as pool:
        for piece in map_ahead(pool, resolve_range, range(len(bounds) + 1), threads + 1):
            for column, part in zip(columns, piece, strict=True):
                column.append(part)
    blocks.clear()
    unique, counts, codes, *removed, conflicting = map(_concatenate, columns)
    if conflict == "error" and len(conflicting):
        key, code = removed[2:]
        raise LabelError(
            f"{len(conflicting):,} pairs are both 1 and 0, such as image {as_text(stored(key[:1]))[0].as_py()} and "
            f"class {classes[int(code[0]) >> 1]}: fix the labels, or set conflict to negative, positive or drop"
        )
    duplicates, contradictions = Labels(*removed[:2]), Labels(*removed[2:])
    return ResolvedLabels(unique, offsets_of(counts), codes, duplicates, contradictions, len(conflicting))


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """int64[n + 1]: where each image's labels start, from their counts integer[n]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def map_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[Result]:
    """`pool.map(work, items)`, but with at most `limit` results in flight."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= limit:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """np.concatenate that frees each part once it is copied, so both never exist in full."""
    whole = np.empty(sum(len(part) for part in parts), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def _resolve_piece(keys: np.ndarray, codes: np.ndarray, conflict: str) -> tuple[np.ndarray, ...]:
    """(keys, counts, codes, duplicate keys, codes, contradicting keys, codes, conflicting pairs) of one range."""
    ascending, codes = sort_by_key(keys, codes)
    is_first = np.ones(len(keys), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    unique = ascending[is_first]
    pairs = np.cumsum(is_first, dtype=np.int64)
    pairs -= 1
    pairs <<= 32
    pairs |= codes
    pairs.sort()
    is_repeat = np.zeros(len(pairs), bool)
    np.equal(pairs[1:], pairs[:-1], out=is_repeat[1:])
    # Without repeats, a contradiction is two neighbors of one pair: first the negative, then the positive.
    single = pairs[~is_repeat] if is_repeat.any() else pairs
    second = np.flatnonzero((single[1:] >> 1) == (single[:-1] >> 1)) + 1
    conflicting = single[second] >> 1
    overruled = np.zeros(len(single), bool)
    overruled[second] = conflict != "positive"
    if conflict in ("positive", "drop", "error"):
        overruled[second - 1] = True
    duplicates, contradictions = pairs[is_repeat], single[overruled]
    if len(contradictions) and len(duplicates):
        # Copies of an overruled label count as contradictions, not as duplicates.
        copies = np.isin(duplicates, contradictions)
        contradictions, duplicates = np.concatenate([contradictions, duplicates[copies]]), duplicates[~copies]
    remaining = single[~overruled] if len(contradictions) else single
    counts = np.bincount(remaining >> 32, minlength=len(unique))
    has_labels = counts > 0
    code_mask = np.int64(0xFFFFFFFF)
    return (
        unique[has_labels],
        counts[has_labels].astype(np.int32),
        (remaining & code_mask).astype(codes.dtype),
        unique[duplicates >> 32],
        (duplicates & code_mask).astype(codes.dtype),
        unique[contradictions >> 32],
        (contradictions & code_mask).astype(codes.dtype),
        conflicting,
    )
