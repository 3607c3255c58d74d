"""The loader: reads a worker's slots of each planned global batch, decodes them into one buffer, adds the labels."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from paml.data.augment import Augmentation
from paml.data.plan import EpochPlan, Samples, shard_uses
from paml.data.readers import BadRows, BatchReader, CachedFeatures, PendingBatch, copy_features, decode_images
from paml.errors import DataError
from paml.labels.overlay import LabelOverlay
from paml.labels.probe import split_probe
from paml.labels.table import LabelTable, Triples
from paml.shards.reader import ShardPrefetcher, ShardReader
from paml.tasks import read_ahead

SHARDS_AHEAD = 4
"""Shards of a bucket that each worker fetches before they are needed."""


class LabelTriples(NamedTuple):
    """Sparse labels of a batch: int64[m] image (row of the batch), int64[m] class, int8[m] state."""

    image: torch.Tensor
    cls: torch.Tensor
    state: torch.Tensor

    @classmethod
    def of(cls, triples: Triples) -> "LabelTriples":
        """Convert from numpy. Image and class become int64, as scattering on a device requires."""
        return cls(
            torch.from_numpy(triples.image.astype(np.int64)),
            torch.from_numpy(triples.cls.astype(np.int64)),
            torch.from_numpy(np.array(triples.state, dtype=np.int8)),
        )

    def to(self, device: torch.device) -> "LabelTriples":
        """Copy to a device, asynchronously."""
        if device.type == "cpu":
            return self
        return LabelTriples(*(part.pin_memory().to(device, non_blocking=True) for part in self))


@dataclasses.dataclass(frozen=True)
class BadSample:
    """An image that could not be read. It is reported and not replaced by another."""

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch: b images of S × S pixels."""

    step: int
    """Number of the global batch within the epoch."""
    images: torch.Tensor
    """uint8 [b, S, S, 3]; or features, float16 or float32 [b, h, w, C], already mirrored according to `flips`."""
    flips: torch.Tensor
    """bool [b]."""
    slots: torch.Tensor
    """int64 [b], slots in the global batch. They define reject pools and break ties."""
    index: np.ndarray
    """int64 [b], positions in the manifest."""
    keys: Callable[[], list[str]]
    """Returns the keys of the images."""
    labels: LabelTriples
    """Observed labels with the corrections of LL-Cp, without the probe."""
    probe: LabelTriples
    """Observed labels that are hidden from training."""
    truth: LabelTriples | None
    """Full labels, if known."""
    bad: tuple[BadSample, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class LabelSource:
    """The label tables of a loader."""

    table: LabelTable
    truth: LabelTable | None = None
    """Full labels, if known."""
    truth_rows: np.ndarray | None = None
    """int64[N], rows of `truth` for the plan's samples; -1 for an image that is not in it."""
    overlay: LabelOverlay | None = None
    """Corrections of LL-Cp."""
    probe_fraction: float = 0.0
    seed: int = 0
    """Selects the probe."""


def lookup_known(
    table: LabelTable, rows: np.ndarray, *, probe_fraction: float = 0.0, seed: int = 0
) -> tuple[Triples, Triples]:
    """(visible, hidden) observed labels of the table's rows, int64[b]. A row of -1 (unknown image) has none."""
    known = np.flatnonzero(rows >= 0)
    parts = split_probe(table.lookup(rows[known]), rows[known], table, probe_fraction, seed)
    visible, hidden = (part._replace(image=known[part.image].astype(np.int32)) for part in parts)
    return visible, hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How a loader reads. No option changes a pixel or a label but `image_size`."""

    image_size: int | None = None
    """Side of the images in pixels; None uses the size stored in the shards."""
    threads: int | None = None
    """Decoding threads; None uses $OMP_NUM_THREADS or all CPUs."""
    prefetch: int = 3
    """Batches to read ahead."""
    max_bad_fraction: float = 0.0
    """Largest fraction of unreadable images in this worker's part of the epoch."""
    pin_memory: bool = False
    """Read into pinned memory, for asynchronous copies to a GPU."""


class Loader:
    """Iterates over one worker's part of the global batches of an epoch.

        samples = join(manifest, table)
        plan = plan_epoch(samples, batch_size=32, epoch=1, seed=0)
        for batch in Loader(ShardReader(manifest), samples, LabelSource(table), plan):
            ...

    slots: the range [lo, hi) of slots of this worker; None for all. start: the first step. features: cached features
    to use instead of the images. The memory of a batch is reused when nothing refers to the batch or a part of it.
    """

    def __init__(
        self,
        reader: ShardReader,
        samples: Samples,
        labels: LabelSource,
        plan: EpochPlan,
        options: LoaderOptions | None = None,
        *,
        slots: tuple[int, int] | None = None,
        start: int = 0,
        augmentation: Augmentation | None = None,
        features: CachedFeatures | None = None,
    ) -> None:
        self.reader, self.samples, self.labels, self.plan = reader, samples, labels, plan
        self.options = options or LoaderOptions()
        self.slots, self.start = slots or (0, plan.batch_size), start
        self.augmentation, self.features = augmentation or Augmentation(), features
        self.bad: list[BadSample] = []
        """Unreadable images so far."""

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError if more images than `max_bad_fraction` are unreadable, and StorageError."""
        shards, first_steps, last_steps = self._bucket_shards()
        with contextlib.ExitStack() as cleanup:
            reader = self._batch_reader()
            cleanup.callback(reader.close)
            prefetcher = ShardPrefetcher(self.reader, shards, first_steps, ahead=_shards_ahead(self.reader))
            cleanup.callback(prefetcher.close)

            def start() -> Iterator[tuple[int, np.ndarray, np.ndarray, torch.Tensor, PendingBatch]]:
                for step in range(self.start, self.plan.steps):
                    slots, chosen = self.plan.batch(step, self.slots)
                    prefetcher.advance_to(step)
                    yield step, slots, chosen, *self._start_read(reader, self.samples.index[chosen])

            for pending in read_ahead(start(), self.options.prefetch):
                batch = self._finish(*pending)
                self.reader.release(shards[last_steps == batch.step].tolist())
                yield batch
                del batch, pending  # frees its memory for the batches that follow

    def _bucket_shards(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, first step, last step) of the shards of a bucket that this iteration reads, by first step."""
        if self.features is not None or not any(map(self.reader.is_remote, range(len(self.reader.manifest.shards)))):
            none = np.zeros(0, np.int64)
            return none, none, none
        shards, first, last = shard_uses(self.samples, self.plan, self.slots)
        needed = last >= self.start
        return shards[needed], first[needed], last[needed]

    def _batch_reader(self) -> BatchReader:
        sizes = {
            "batch_size": self.slots[1] - self.slots[0],
            "threads": self.options.threads or max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))),
            "buffers": self.options.prefetch + 2,
        }
        if self.features is not None:
            copy = functools.partial(copy_features, self.features, self.augmentation)
            rows, plain = self.features.rows_per_task, self.features.plain
            return BatchReader(copy, plain.shape[1:], plain.dtype.type, rows_per_task=rows, **sizes)
        size = self.options.image_size or self.reader.manifest.image_size
        return BatchReader(self._decode, (size, size, 3), np.uint8, **sizes)

    def _decode(self, index: np.ndarray, out: np.ndarray) -> BadRows:
        return decode_images(self.reader, index, out, self.augmentation.crops(index))

    def _start_read(self, reader: BatchReader, index: np.ndarray) -> tuple[torch.Tensor, PendingBatch]:
        if self.options.pin_memory:
            # torch reuses pinned memory only after the copies that read it are done
            dtype = torch.from_numpy(np.empty(0, reader.dtype)).dtype
            pixels = torch.empty((len(index), *reader.row_shape), dtype=dtype, pin_memory=True)
            return pixels, reader.start(index, pixels.numpy())
        pending = reader.start(index)
        return torch.from_numpy(pending.rows), pending

    def _finish(
        self, step: int, slots: np.ndarray, chosen: np.ndarray, pixels: torch.Tensor, pending: PendingBatch
    ) -> Batch:
        reasons = dict(pending.wait())
        key = self.reader.manifest.key
        bad = tuple(BadSample(key(int(self.samples.index[chosen[row]])), reasons[row]) for row in sorted(reasons))
        if bad:
            good = np.array([row for row in range(len(chosen)) if row not in reasons], dtype=np.int64)
            slots, chosen, pixels = slots[good], chosen[good], pixels[torch.from_numpy(good)]
            self._check_bad(bad)
        index, source = self.samples.index[chosen], self.labels
        visible, hidden = lookup_known(
            source.table, self.samples.row[chosen], probe_fraction=source.probe_fraction, seed=source.seed
        )
        if source.overlay is not None:
            visible = source.overlay.apply(visible, index)
        truth = None
        if source.truth is not None and source.truth_rows is not None:
            truth = LabelTriples.of(lookup_known(source.truth, source.truth_rows[chosen])[0])
        return Batch(
            step=step,
            images=pixels,
            flips=torch.from_numpy(self.augmentation.flips(index)),
            slots=torch.from_numpy(slots),
            index=index,
            keys=lambda: [key(int(position)) for position in index],
            labels=LabelTriples.of(visible),
            probe=LabelTriples.of(hidden),
            truth=truth,
            bad=bad,
        )

    def _check_bad(self, bad: tuple[BadSample, ...]) -> None:
        self.bad.extend(bad)
        fraction = self.options.max_bad_fraction
        allowed = fraction * len(self.plan.order) * (self.slots[1] - self.slots[0]) / self.plan.batch_size
        if len(self.bad) > allowed:
            examples = "; ".join(f"{sample.key}: {sample.reason}" for sample in self.bad[:5])
            raise DataError(
                f"{len(self.bad)} images of this epoch are unreadable; data.max_bad_fraction = {fraction} allows "
                f"{allowed:.1f} per worker: {examples}. Check the shards with `paml verify` and write them again, or "
                "increase data.max_bad_fraction"
            )


def _shards_ahead(reader: ShardReader) -> int:
    """SHARDS_AHEAD, or fewer if the workers of a node would fill more than a quarter of the cache with them."""
    limit = reader.cache.limit_bytes
    if limit is None:
        return SHARDS_AHEAD
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    largest = max((shard.bytes for shard in reader.manifest.shards), default=1)
    return max(1, min(SHARDS_AHEAD, limit // (4 * workers * max(1, largest))))
