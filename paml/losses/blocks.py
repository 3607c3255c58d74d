"""Long arrays on the CPU, worked on in blocks that fit the cache, by as many threads as torch may use."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

BLOCK = 65_536
"""Entries of a block: two float32 buffers of it fit a second-level cache."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def in_blocks(work: Callable[[int, int], Result], length: int) -> list[Result]:
    """work(start, end) for the blocks of an array, in their order; numpy drops the lock, so that threads help.

    The blocks do not depend on the number of threads, nor do the results.
    """
    ranges = [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    threads = min(torch.get_num_threads(), len(ranges) // 2)
    if threads < 2:
        return [work(start, end) for start, end in ranges]
    # A forked process has none of its parent's threads.
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads - 1, thread_name_prefix="paml-blocks")
    cuts = [len(ranges) * i // threads for i in range(threads + 1)]

    def several(first: int, last: int) -> list[Result]:
        return [work(start, end) for start, end in ranges[first:last]]

    others = [_pools[key].submit(several, a, b) for a, b in pairwise(cuts[1:])]
    results = several(0, cuts[1])
    for other in others:
        results += other.result()
    return results


def true_places(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero` of a one-dimensional, contiguous bool array, faster where few are true: by words of eight."""
    n = len(mask) // 8 * 8
    if n < 4096:
        return np.flatnonzero(mask)
    words = np.flatnonzero(mask[:n].view(np.uint64) != 0)
    if len(words) * 4 > n // 8:
        return np.flatnonzero(mask)
    places = np.flatnonzero(mask[:n].reshape(-1, 8)[words])
    places = words[places >> 3] * 8 + (places & 7)
    return places if n == len(mask) else np.concatenate([places, np.flatnonzero(mask[n:]) + n])
