"""Long numpy arrays, processed in blocks that fit the cache, by as many threads as torch may use."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

BLOCK = 65_536
"""Entries of a block: two float32 buffers of this size fit a second-level cache."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def map_blocks(function: Callable[[int, int], Result], length: int) -> list[Result]:
    """function(start, end) for the blocks of an array, in order. Threads help since numpy releases the lock.

    Neither blocks nor results depend on the number of threads.
    """
    ranges = [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    threads = min(torch.get_num_threads(), len(ranges) // 2)
    if threads < 2:
        return [function(start, end) for start, end in ranges]
    key = (os.getpid(), threads)  # a forked process has none of its parent's threads
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads - 1, thread_name_prefix="paml-blocks")
    cuts = [len(ranges) * i // threads for i in range(threads + 1)]

    def run(first: int, last: int) -> list[Result]:
        return [function(start, end) for start, end in ranges[first:last]]

    others = [_pools[key].submit(run, first, last) for first, last in pairwise(cuts[1:])]
    results = run(0, cuts[1])
    for other in others:
        results += other.result()
    return results


def nonzero_positions(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero` of a one-dimensional, contiguous bool array, faster if few are true: by words of eight."""
    n = len(mask) // 8 * 8
    if n < 4096:
        return np.flatnonzero(mask)
    words = np.flatnonzero(mask[:n].view(np.uint64) != 0)
    if len(words) * 4 > n // 8:
        return np.flatnonzero(mask)
    positions = np.flatnonzero(mask[:n].reshape(-1, 8)[words])
    positions = words[positions >> 3] * 8 + (positions & 7)
    return positions if n == len(mask) else np.concatenate([positions, np.flatnonzero(mask[n:]) + n])
