"""Which sample stands in which slot of which global batch: pure arithmetic, the same for every number of workers.

Slot j of every global batch is fed by stream j, a fixed sequence of samples. A worker owns a contiguous range
of slots, so it reads a contiguous part of the shards, and nothing but that range depends on how many workers
there are. Starting at any step costs one look into an array.
"""

import dataclasses
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


_SHARD_ORDER, _SAMPLE_ORDER, _FLIP = 1, 2, 3


def draw_flips(seed: int, epoch: int, samples: np.ndarray, share: float) -> np.ndarray:
    """bool[n]: whether each sample (by its place in the manifest) is mirrored in this epoch."""
    return draw64(seed, epoch, _FLIP, samples) < np.uint64(min(share * 2.0**64, 2.0**64 - 1025))


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
    """int64[N], positions into `Samples`, stream after stream."""
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
        return slot, self.order[slot * full + np.minimum(slot, rest) + step]


def plan_epoch(
    samples: Samples, *, batch_size: int, epoch: int, seed: int, window: int, shuffle: bool = True
) -> EpochPlan:
    """Deal the samples to `batch_size` streams: shards in drawn order, shuffled in windows of `window` samples.

    A window is a run of whole shards' samples in that order; the larger it is the better the mixing, the
    smaller it is the fewer shards a node touches. Without `shuffle` (scoring) the order is the manifest's.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}; it must be at least 1")
    order = np.arange(len(samples), dtype=np.int64)
    if shuffle:
        order = np.argsort(draw64(seed, epoch, _SHARD_ORDER, samples.shard), kind="stable")
        drawn = draw64(seed, epoch, _SAMPLE_ORDER, samples.index[order])
        for start in range(0, len(order), window):
            part = slice(start, start + window)
            order[part] = order[part][np.argsort(drawn[part], kind="stable")]
    return EpochPlan(order=order, batch_size=batch_size)


def worker_slots(batch_size: int, rank: int, workers: int) -> tuple[int, int]:
    """The contiguous range [lo, hi) of slots that worker `rank` of `workers` owns; ranges differ by at most 1."""
    return rank * batch_size // workers, (rank + 1) * batch_size // workers
