"""The epoch plan: which sample fills which slot of which global batch, the same for every number of workers.

Stream j, a fixed sequence of samples, feeds slot j of every global batch. A worker owns a contiguous range of slots
and so reads a contiguous part of the shards. Nothing else depends on the number of workers. Starting at any step takes
one array look-up.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from paml.errors import SettingsError, check_setting
from paml.labels.hashing import mix64
from paml.labels.states import POSITIVE
from paml.labels.table import LabelTable
from paml.shards.manifest import Manifest

_SHARD_ORDER, _SAMPLE_ORDER, _WINDOW_ORDER, _WINDOW_OFFSET = 1, 2, 4, 5


def draw64(seed: int, epoch: int, purpose: int, items: np.ndarray) -> np.ndarray:
    """uint64[n]: one random number per item, a pure function of (seed, epoch, purpose, item)."""
    stream = mix64(mix64(mix64(seed) ^ np.uint64(epoch)) ^ np.uint64(purpose))
    return mix64(items.astype(np.uint64) ^ stream)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The N images of a run, in manifest order."""

    index: np.ndarray
    """int64[N], position in the manifest."""
    row: np.ndarray
    """int64[N], row in the label table; -1 for an image that is not in the table."""
    shard: np.ndarray
    """int32[N], shard number."""
    unlabeled: int = 0
    """Images of the manifest that were excluded because they have no observed (or no positive) label."""
    missing: int = 0
    """Images of the table that are not in the manifest."""

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, positions: np.ndarray) -> "Samples":
        """Only the samples at these positions, in this order."""
        selected = {name: getattr(self, name)[positions] for name in ("index", "row", "shard")}
        return dataclasses.replace(self, **selected)


ImageChoice = Literal["observed", "positive", "all"]


def join(manifest: Manifest, table: LabelTable, images: ImageChoice = "observed") -> Samples:
    """Match the keys of the manifest with the rows of the table. Raises SettingsError if no image remains.

    images: select those with an observed label, those with a positive label, or all.
    """
    rows = np.asarray(table.rows_of(manifest.keys()))
    known, index = np.flatnonzero(rows >= 0), np.arange(len(rows))
    if images == "positive":
        triples = table.lookup(rows[known])
        index = known[np.unique(triples.image[triples.state == POSITIVE])]
    elif images == "observed":
        index = known[table.label_counts(rows[known]) > 0]
    if not len(index):
        raise SettingsError(
            f"none of the {manifest.num_samples:,} images of {manifest.folder} has labels in {table.path} "
            f"(data.images is {images}): use shards and a table of the same data set and split"
        )
    return Samples(
        index=index,
        row=rows[index],
        shard=np.asarray(manifest.shard)[index],
        unlabeled=len(rows) - len(index),
        missing=table.num_images - len(known),
    )


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The global batches of one epoch over N samples with B slots."""

    order: np.ndarray
    """int64[N], positions in `Samples`, stream after stream; -1 in streams that were not requested."""
    batch_size: int

    @property
    def steps(self) -> int:
        """Number of global batches; the last one may be short."""
        return -(-len(self.order) // self.batch_size)

    def batch(self, step: int, slots: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(slots int64[b], positions in `Samples` int64[b]) of global batch `step`, for the slots [lo, hi)."""
        full, rest = divmod(len(self.order), self.batch_size)
        hi = slots[1] if step < full else min(slots[1], rest)
        slot = np.arange(slots[0], max(hi, slots[0]), dtype=np.int64)
        return slot, self.order[_stream_starts(len(self.order), self.batch_size, slot) + step]


def plan_epoch(
    samples: Samples,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    window: int = 1024,
    shuffle: bool = True,
    slots: tuple[int, int] | None = None,
) -> EpochPlan:
    """Plan one epoch: shuffle the shards, shuffle within shards, cut into `batch_size` streams, shuffle in windows.

    A window is `window` consecutive samples of one stream. Nothing is shuffled across the end of a stream, so the
    streams of one worker cover a contiguous part of the shards: all workers together open at most shards + workers - 1.
    A stream uses the shards of one window at a time. A larger window mixes the samples better over the steps, and a
    cache must hold more shards (see `shard_uses`). Windows end at different steps in different streams, which spreads
    the fetching of shards.

    shuffle: False (scoring) uses the order of the manifest. slots: plan only the streams of the slots [lo, hi); all
    other entries of `order` are -1. Raises SettingsError.
    """
    check_setting(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check_setting(window >= 1, "the shuffle window", window, "at least 1")
    if not shuffle:
        return EpochPlan(order=np.arange(len(samples), dtype=np.int64), batch_size=batch_size)
    lo, hi = slots or (0, batch_size)
    bounds = _stream_starts(len(samples), batch_size, np.arange(lo, hi + 1))
    first, last = int(bounds[0]), int(bounds[-1])
    by_shard = _shuffle_by_shard(samples, first, last, seed, epoch)
    window_keys = draw64(seed, epoch, _WINDOW_ORDER, np.arange(first, last))
    offsets = draw64(seed, epoch, _WINDOW_OFFSET, np.arange(lo, hi)) % np.uint64(window)
    shuffled = np.empty_like(by_shard)
    for start, end, offset in zip((bounds[:-1] - first).tolist(), (bounds[1:] - first).tolist(), offsets, strict=True):
        for part, width in _windows(start, end, window, int(offset)):
            order = _order_of(window_keys[part].reshape(-1, width))
            shuffled[part] = np.take_along_axis(by_shard[part].reshape(-1, width), order, axis=1).reshape(-1)
    order = np.full(len(samples), -1, dtype=np.int64)
    order[first:last] = shuffled
    return EpochPlan(order=order, batch_size=batch_size)


def _stream_starts(count: int, batch_size: int, stream: np.ndarray) -> np.ndarray:
    """int64: the start of each stream in an order of `count` samples; the first streams have one sample more."""
    full, rest = divmod(count, batch_size)
    return stream * full + np.minimum(stream, rest)


def _shuffle_by_shard(samples: Samples, first: int, last: int, seed: int, epoch: int) -> np.ndarray:
    """int64[last - first]: this slice of the epoch's order, with shards shuffled, and samples within each shard."""
    if first == last:
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(samples.shard[1:] != samples.shard[:-1]) + 1])
    sizes = np.diff(starts, append=len(samples))
    shards = np.argsort(draw64(seed, epoch, _SHARD_ORDER, samples.shard[starts]), kind="stable")
    ends = np.cumsum(sizes[shards])
    used = slice(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1)
    parts = []
    for shard in shards[used].tolist():
        members = slice(int(starts[shard]), int(starts[shard] + sizes[shard]))
        parts.append(members.start + _order_of(draw64(seed, epoch, _SAMPLE_ORDER, samples.index[members])))
    begin = int(ends[used.start] - sizes[shards[used.start]])
    return np.concatenate(parts)[first - begin : last - begin]


def _windows(start: int, end: int, window: int, offset: int) -> Iterator[tuple[slice, int]]:
    """(slice, width of each window in it) of one stream: a short first window, full windows, a short last window."""
    if end - start <= window:
        offset = 0
    cuts = (start, start + offset, start + offset + (end - start - offset) // window * window, end)
    for (low, high), width in zip(itertools.pairwise(cuts), (offset, window, end - cuts[2]), strict=True):
        if low < high:
            yield slice(low, high), width


def _order_of(keys: np.ndarray) -> np.ndarray:
    """int64[..., n]: the sorting order of uint64[..., n] along the last axis.

    The position replaces the lowest bits of each key. Keys are therefore distinct, and an unstable sort gives the same
    order on every machine.
    """
    positions = np.arange(keys.shape[-1], dtype=np.uint64)
    low = np.uint64((1 << (len(positions) - 1).bit_length()) - 1)
    return (np.sort((keys & ~low) | positions, axis=-1) & low).astype(np.int64)


def shard_uses(samples: Samples, plan: EpochPlan, slots: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard int32[u], first step int64[u], last step int64[u]) of the shards that these slots read, by first step.

    A cache that can hold all shards in use at any step fetches each shard once per epoch.
    """
    bounds = _stream_starts(len(samples), plan.batch_size, np.arange(slots[0], slots[1] + 1))
    shard = samples.shard[plan.order[bounds[0] : bounds[-1]]]
    step = np.arange(len(shard)) - np.repeat(bounds[:-1] - bounds[0], np.diff(bounds))
    used, inverse = np.unique(shard, return_inverse=True)
    first, last = np.full(len(used), plan.steps, np.int64), np.full(len(used), -1, np.int64)
    np.minimum.at(first, inverse, step)
    np.maximum.at(last, inverse, step)
    order = np.argsort(first, kind="stable")
    return used[order], first[order], last[order]


def worker_slots(batch_size: int, rank: int, workers: int) -> tuple[int, int]:
    """The contiguous range [lo, hi) of slots of worker `rank` of `workers`; ranges differ in length by at most 1."""
    return rank * batch_size // workers, (rank + 1) * batch_size // workers
