"""Batches of one worker: planned slots are read by offset, decoded by threads into one uint8 buffer, labelled.

Decoders release the GIL, so threads fill a batch in place without the copies that worker processes need.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from paml.data.decode import UndecodableError, decode_into
from paml.data.plan import EpochPlan, Samples, draw_flips
from paml.errors import DataError
from paml.labels.overlay import LabelOverlay
from paml.labels.probe import split_probe
from paml.labels.table import LabelTable, Triples
from paml.shards.reader import CorruptSample, ShardReader


@dataclasses.dataclass(frozen=True)
class LabelTriples:
    """Sparse labels of a batch: int64[m] image (place in the batch), int64[m] class, int8[m] state."""

    image: torch.Tensor
    cls: torch.Tensor
    state: torch.Tensor

    @classmethod
    def of(cls, triples: Triples) -> "LabelTriples":
        """From numpy; the class and image numbers become int64, which scattering on a device needs."""
        return cls(
            torch.from_numpy(triples.image.astype(np.int64)),
            torch.from_numpy(triples.cls.astype(np.int64)),
            torch.from_numpy(np.array(triples.state, dtype=np.int8)),
        )

    def to(self, device: torch.device) -> "LabelTriples":
        """The same on a device, without waiting for the copy."""
        if device.type == "cpu":
            return self
        parts = (self.image, self.cls, self.state)
        return LabelTriples(*(p.pin_memory().to(device, non_blocking=True) for p in parts))


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A sample that could not be used: counted, named, replaced by nothing."""

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, b images of S × S pixels."""

    step: int
    """Global batch within the epoch."""
    images: torch.Tensor
    """uint8 [b, S, S, 3]."""
    flips: torch.Tensor
    """bool [b]."""
    slots: torch.Tensor
    """int64 [b], slot in the global batch; pools and ties go by it."""
    index: np.ndarray
    """int64 [b], places in the manifest."""
    keys: Callable[[], list[str]]
    """Names the images; looked up only when somebody asks."""
    labels: LabelTriples
    """Observed labels, LL-Cp's corrections written in, the probe taken out."""
    probe: LabelTriples
    """Observed labels hidden from training."""
    truth: LabelTriples | None
    """Full labels, where known."""
    bad: tuple[BadSample, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class LabelSource:
    """What a worker knows of the labels."""

    table: LabelTable
    truth: LabelTable | None = None
    truth_rows: np.ndarray | None = None
    """int64[N], rows of `truth` for the plan's samples; -1 where it does not know the image."""
    overlay: LabelOverlay | None = None
    probe: float = 0.0
    seed: int = 0


def lookup_known(table: LabelTable, rows: np.ndarray, *, probe: float = 0.0, seed: int = 0) -> tuple[Triples, Triples]:
    """(kept, hidden) observed labels of `rows` (int64[b]); a row of -1, an unknown image, has none."""
    known = np.flatnonzero(rows >= 0)
    parts = split_probe(table.lookup(rows[known]), rows[known], table, probe, seed)
    kept, hidden = (part._replace(image=known[part.image].astype(np.int32)) for part in parts)
    return kept, hidden


class Loader:
    """Iterates over a worker's share of one epoch's global batches, from `start` on."""

    def __init__(
        self,
        *,
        reader: ShardReader,
        samples: Samples,
        labels: LabelSource,
        plan: EpochPlan,
        slots: tuple[int, int],
        image_size: int,
        epoch: int = 0,
        start: int = 0,
        seed: int = 0,
        flip: float = 0.0,
        threads: int | None = None,
        prefetch: int = 3,
        max_bad_share: float = 0.0,
        pin: bool = False,
    ) -> None:
        self.reader, self.samples, self.labels, self.plan, self.slots = reader, samples, labels, plan, slots
        self.image_size, self.epoch, self.start, self.seed, self.flip = image_size, epoch, start, seed, flip
        self.threads = threads or max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        self.prefetch, self.max_bad_share, self.pin = prefetch, max_bad_share, pin
        self.bad: list[BadSample] = []

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError once the share of bad samples passes `max_bad_share`."""
        decoders = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        waiting: collections.deque[tuple[int, np.ndarray, np.ndarray, torch.Tensor, list[Future]]]
        waiting = collections.deque()
        try:
            for step in range(self.start, self.plan.steps + self.prefetch):
                if step < self.plan.steps:
                    slots, chosen = self.plan.batch(step, self.slots)
                    pixels = self._buffer(len(chosen))
                    ahead = [
                        decoders.submit(self._decode, sample, pixels[place]) for place, sample in enumerate(chosen)
                    ]
                    waiting.append((step, slots, chosen, pixels, ahead))
                if len(waiting) > self.prefetch or (step >= self.plan.steps and waiting):
                    yield self._finish(*waiting.popleft())
        finally:
            decoders.shutdown(wait=True, cancel_futures=True)

    def _buffer(self, images: int) -> torch.Tensor:
        shape = (images, self.image_size, self.image_size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)

    def _decode(self, sample: int, out: torch.Tensor) -> BadSample | None:
        index = int(self.samples.index[sample])
        try:
            decode_into(self.reader.read(index), out)
        except (UndecodableError, CorruptSample) as error:
            return BadSample(self.reader.manifest.key(index), str(error))
        return None

    def _finish(
        self,
        step: int,
        slots: np.ndarray,
        chosen: np.ndarray,
        pixels: torch.Tensor,
        ahead: list[Future],
    ) -> Batch:
        outcomes: list[BadSample | None] = [future.result() for future in ahead]
        bad = tuple(outcome for outcome in outcomes if outcome is not None)
        if bad:
            good = np.flatnonzero([outcome is None for outcome in outcomes])
            slots, chosen, pixels = slots[good], chosen[good], pixels[torch.from_numpy(good)]
            self._refuse_too_many(bad)
        index, source = self.samples.index[chosen], self.labels
        kept, hidden = lookup_known(source.table, self.samples.row[chosen], probe=source.probe, seed=source.seed)
        if source.overlay is not None:
            kept = source.overlay.apply(kept, index)
        truth = None
        if source.truth is not None and source.truth_rows is not None:
            truth = LabelTriples.of(lookup_known(source.truth, source.truth_rows[chosen])[0])
        flips = draw_flips(self.seed, self.epoch, index, self.flip)
        return Batch(
            step=step,
            images=pixels,
            flips=torch.from_numpy(flips),
            slots=torch.from_numpy(slots),
            index=index,
            keys=lambda: [self.reader.manifest.key(int(place)) for place in index],
            labels=LabelTriples.of(kept),
            probe=LabelTriples.of(hidden),
            truth=truth,
            bad=bad,
        )

    def _refuse_too_many(self, bad: tuple[BadSample, ...]) -> None:
        self.bad.extend(bad)
        share = (self.slots[1] - self.slots[0]) / self.plan.batch_size
        allowed = self.max_bad_share * len(self.plan.order) * share
        if len(self.bad) > allowed:
            named = "; ".join(f"{sample.key}: {sample.reason}" for sample in self.bad[:5])
            raise DataError(
                f"{len(self.bad)} images of this epoch cannot be used, more than data.max_bad_share = "
                f"{self.max_bad_share} allows ({allowed:.1f} for this worker): {named}. "
                "Mend or re-make the shards (jobs/prepare_openimages.py checks them), or raise the share."
            )
