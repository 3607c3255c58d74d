"""Which sample stands in which slot of which global batch: pure arithmetic, the same for every number of workers.

Slot j of every global batch is fed by stream j, a fixed sequence of samples. A worker owns a contiguous range
of slots, so it reads a contiguous part of the shards, and nothing but that range depends on how many workers
there are. Starting at any step costs one look into an array.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from paml.errors import SettingsError
from paml.labels.states import POSITIVE
from paml.labels.table import LabelTable
from paml.shards.manifest import Manifest

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(value: np.ndarray | int) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 in, well mixed uint64 out, the same for ever."""
    z = np.atleast_1d(np.asarray(value, dtype=np.uint64)) + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw64(seed: int, epoch: int, purpose: int, items: np.ndarray) -> np.ndarray:
    """One uint64 for each item, a pure function of (seed, epoch, purpose, item)."""
    stream = mix64(mix64(mix64(seed) ^ np.uint64(epoch)) ^ np.uint64(purpose))
    return mix64(items.astype(np.uint64) ^ stream)


_SHARD_ORDER, _SAMPLE_ORDER, _FLIP, _WINDOW_ORDER, _WINDOW_OFFSET = 1, 2, 3, 4, 5
_CROP_AREA, _CROP_ASPECT, _CROP_LEFT, _CROP_TOP = 6, 7, 8, 9


def draw_flips(seed: int, epoch: int, samples: np.ndarray, share: float) -> np.ndarray:
    """bool[n]: whether each sample (by its place in the manifest) is mirrored in this epoch."""
    return draw64(seed, epoch, _FLIP, samples) < np.uint64(min(share * 2.0**64, 2.0**64 - 1025))


def draw_crops(seed: int, epoch: int, samples: np.ndarray, smallest: float) -> np.ndarray:
    """float64[n, 4]: left, top, right and bottom of the part that each sample keeps, as shares of width and height.

    Its area is drawn evenly from `smallest` to 1 of the picture's, its aspect ratio, on a log scale, from 3/4 to 4/3 of
    the picture's (random resized crops, Szegedy et al. 2015); a side that would be too long is the picture's own.
    """
    area, aspect, left, top = (
        (draw64(seed, epoch, purpose, samples) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        for purpose in (_CROP_AREA, _CROP_ASPECT, _CROP_LEFT, _CROP_TOP)
    )
    area = smallest + (1 - smallest) * area
    aspect = np.exp((2 * aspect - 1) * np.log(4 / 3))
    width, height = np.minimum(1, np.sqrt(area * aspect)), np.minimum(1, np.sqrt(area / aspect))
    left, top = left * (1 - width), top * (1 - height)
    return np.stack([left, top, left + width, top + height], axis=1)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The images that take part in a run: N of them, in the order of the manifest."""

    index: np.ndarray
    """int64[N], place in the manifest."""
    row: np.ndarray
    """int64[N], row of the label table; -1 where the table does not know the image."""
    shard: np.ndarray
    """int32[N], shard that holds the image."""
    unlabelled: int = 0
    """Images of the manifest that were left out since the table says nothing of them (or no positive)."""
    missing: int = 0
    """Images of the table that the manifest does not hold."""

    def __len__(self) -> int:
        return len(self.index)


ImageChoice = Literal["observed", "positive", "all"]


def join(manifest: Manifest, table: LabelTable, images: ImageChoice = "observed") -> Samples:
    """The one join of keys to rows. `images`: those with an observed label, with a positive one, or all.

    Raises SettingsError where nothing is left, since training on nothing would look like success.
    """
    rows = np.asarray(table.rows_of(manifest.keys()))
    keep = np.ones(len(rows), dtype=bool) if images == "all" else rows >= 0
    if images != "all":
        known = np.flatnonzero(keep)
        has = table.label_counts(rows[known]) > 0
        if images == "positive":
            triples = table.lookup(rows[known])
            has = np.zeros(len(known), dtype=bool)
            has[triples.image[triples.state == POSITIVE]] = True
        keep[known] = has
    index = np.flatnonzero(keep)
    if not len(index):
        raise SettingsError(
            f"none of the {manifest.num_samples:,} images of {manifest.folder} has labels in {table.path} "
            f"(data.images: {images}): do the shards and the table come from the same release and split?"
        )
    return Samples(
        index=index,
        row=rows[index],
        shard=np.asarray(manifest.shard)[index],
        unlabelled=len(rows) - len(index),
        missing=table.num_images - int((rows >= 0).sum()),
    )


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The global batches of one epoch over N samples with B slots."""

    order: np.ndarray
    """int64[N], positions into `Samples`, stream after stream; -1 in streams that were not asked for."""
    batch_size: int

    @property
    def steps(self) -> int:
        """Global batches in the epoch; the last may be short."""
        return -(-len(self.order) // self.batch_size)

    def batch(self, step: int, slots: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(slots int64[b], samples int64[b]) of global batch `step` for the slots lo ≤ j < hi."""
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
    window: int,
    shuffle: bool = True,
    slots: tuple[int, int] | None = None,
) -> EpochPlan:
    """Deal the samples to `batch_size` streams: shards in drawn order, cut into streams, each shuffled in windows.

    Samples are shuffled within their shard before the cut, and after it within windows of `window` of a stream's
    consecutive samples. Nothing is shuffled over the end of a stream, so the streams of a worker hold a contiguous
    part of the shards: all workers together touch no more than shards + workers - 1. A stream has the shards of one
    window in play at a time; the larger the window, the better samples mix over the steps, the more a cache must
    hold (see `shard_uses`). Windows end at different steps in different streams, so that fetching is even.

    Without `shuffle` (scoring) the order is the manifest's. `slots` (lo, hi) draws the streams of these slots alone,
    and in their time: all other places of the plan's `order` are -1.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}; it must be at least 1")
    if window < 1:
        raise SettingsError(f"the shuffle window is {window} samples; it must be at least 1")
    if not shuffle:
        return EpochPlan(order=np.arange(len(samples), dtype=np.int64), batch_size=batch_size)
    lo, hi = slots or (0, batch_size)
    bounds = _stream_starts(len(samples), batch_size, np.arange(lo, hi + 1))
    first, last = int(bounds[0]), int(bounds[-1])
    order = np.full(len(samples), -1, dtype=np.int64)
    order[first:last] = own = _by_shard(samples, first, last, seed, epoch)
    drawn = draw64(seed, epoch, _WINDOW_ORDER, np.arange(first, last))
    offsets = draw64(seed, epoch, _WINDOW_OFFSET, np.arange(lo, hi)) % np.uint64(window)
    for start, end, offset in zip((bounds[:-1] - first).tolist(), (bounds[1:] - first).tolist(), offsets, strict=True):
        for part, width in _windows(start, end, window, int(offset)):
            places = _order_of(drawn[part].reshape(-1, width))
            order[first:last][part] = np.take_along_axis(own[part].reshape(-1, width), places, axis=1).reshape(-1)
    return EpochPlan(order=order, batch_size=batch_size)


def _stream_starts(count: int, batch_size: int, stream: np.ndarray) -> np.ndarray:
    """int64: where each stream begins in the order of `count` samples; the first ones hold one sample more."""
    full, rest = divmod(count, batch_size)
    return stream * full + np.minimum(stream, rest)


def _by_shard(samples: Samples, first: int, last: int, seed: int, epoch: int) -> np.ndarray:
    """int64[last - first]: the samples of these places, shards in drawn order and each shuffled in itself."""
    if first == last:
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(samples.shard[1:] != samples.shard[:-1]) + 1])
    sizes = np.diff(starts, append=len(samples))
    shards = np.argsort(draw64(seed, epoch, _SHARD_ORDER, samples.shard[starts]), kind="stable")
    ends = np.cumsum(sizes[shards])
    parts, touched = [], slice(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1)
    for shard in shards[touched].tolist():
        own = slice(int(starts[shard]), int(starts[shard] + sizes[shard]))
        parts.append(own.start + _order_of(draw64(seed, epoch, _SAMPLE_ORDER, samples.index[own])))
    begin = int(ends[touched.start] - sizes[shards[touched.start]])
    return np.concatenate(parts)[first - begin : last - begin]


def _windows(start: int, end: int, window: int, offset: int) -> Iterator[tuple[slice, int]]:
    """(places, width of each window in them) of a stream: a short window first, whole ones, a short one last."""
    if end - start <= window:
        offset = 0
    cuts = (start, start + offset, start + offset + (end - start - offset) // window * window, end)
    for (low, high), width in zip(itertools.pairwise(cuts), (offset, window, end - cuts[2]), strict=True):
        if low < high:
            yield slice(low, high), width


def _order_of(draws: np.ndarray) -> np.ndarray:
    """int64[..., n]: the order of uint64[..., n] along the last axis.

    The lowest bits of a draw give way to its place: no two are equal then, so that every sort, however fast and
    unstable, ends in the same order on every machine.
    """
    places = np.arange(draws.shape[-1], dtype=np.uint64)
    low = np.uint64((1 << (len(places) - 1).bit_length()) - 1)
    return (np.sort((draws & ~low) | places, axis=-1) & low).astype(np.int64)


def shard_uses(samples: Samples, plan: EpochPlan, slots: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard int32[u], first int64[u], last int64[u]): the shards that these slots read, and from which step to which.

    By first step. A cache that holds all shards in play at any one step needs each shard of a bucket once an epoch.
    """
    bounds = _stream_starts(len(samples), plan.batch_size, np.arange(slots[0], slots[1] + 1))
    shard = samples.shard[plan.order[bounds[0] : bounds[-1]]]
    step = np.arange(len(shard)) - np.repeat(bounds[:-1] - bounds[0], np.diff(bounds))
    used, place = np.unique(shard, return_inverse=True)
    first, last = np.full(len(used), plan.steps, np.int64), np.full(len(used), -1, np.int64)
    np.minimum.at(first, place, step)
    np.maximum.at(last, place, step)
    order = np.argsort(first, kind="stable")
    return used[order], first[order], last[order]


def worker_slots(batch_size: int, rank: int, workers: int) -> tuple[int, int]:
    """The contiguous range [lo, hi) of slots that worker `rank` of `workers` owns; ranges differ by at most 1."""
    return rank * batch_size // workers, (rank + 1) * batch_size // workers
