"""Batches of one worker: planned slots are read by offset, decoded in place into one uint8 buffer, labelled.

Threads decode by default, since libjpeg-turbo works without the interpreter's lock (benchmarks/loader.py measures
both); processes are for decoders that hold it.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from paml.data.cached import CachedFeatures, FeatureReaders
from paml.data.decoders import Decoders, Filling, ProcessDecoders, ThreadDecoders
from paml.data.plan import EpochPlan, Samples, draw_crops, draw_flips
from paml.errors import DataError
from paml.labels.overlay import LabelOverlay
from paml.labels.probe import split_probe
from paml.labels.table import LabelTable, Triples
from paml.shards.cache import Traffic
from paml.shards.reader import FetchAhead, ShardReader


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
    """uint8 [b, S, S, 3]; or cached features, float16 [b, h, w, C], of the images mirrored already where `flips`."""
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
    """Iterates over a worker's share of one epoch's global batches, from `start` on.

    `processes` decode, or where it is 0, `threads` of this process; both give the same batches. A batch's memory
    is used again once neither it nor a part of it is referred to. With `pin` threads decode into memory of torch's
    pinned allocator, which gives it again only when the copies to the device that read it are done. Below 1, `crop` is
    the smallest share that random crops keep of a picture. With `features` nothing is decoded: they stand in the place
    of the images.
    """

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
        crop: float = 1.0,
        threads: int | None = None,
        processes: int = 0,
        prefetch: int = 3,
        shards_ahead: int = 4,
        max_bad_share: float = 0.0,
        pin: bool = False,
        features: CachedFeatures | None = None,
    ) -> None:
        self.reader, self.samples, self.labels, self.plan, self.slots = reader, samples, labels, plan, slots
        self.image_size, self.epoch, self.start, self.seed = image_size, epoch, start, seed
        self.flip, self.crop = flip, crop
        self.threads = threads or max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        self.processes, self.shards_ahead = processes, shards_ahead
        self.prefetch, self.max_bad_share, self.pin = prefetch, max_bad_share, pin
        self.features = features
        self.bad: list[BadSample] = []
        self.traffic = Traffic()
        """What was read from a bucket so far and not taken; complete when the iteration has ended."""

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError once the share of bad samples passes `max_bad_share`; StorageError, LoaderProcessError."""
        waiting: collections.deque[tuple[int, np.ndarray, np.ndarray, torch.Tensor, Filling]] = collections.deque()
        with contextlib.ExitStack() as ending:
            decoders = self._decoders()
            ending.callback(self._end, decoders)
            needs = _Needs(self)
            ending.callback(needs.close)
            for step in range(self.start, self.plan.steps + self.prefetch):
                if step < self.plan.steps:
                    slots, chosen = self.plan.batch(step, self.slots)
                    needs.reached(step)
                    waiting.append((step, slots, chosen, *self._fill(decoders, self.samples.index[chosen])))
                if len(waiting) > self.prefetch or (step >= self.plan.steps and waiting):
                    batch = self._finish(*waiting.popleft())
                    decoders.release(needs.done_after(batch.step))
                    self.traffic.add(decoders.traffic())
                    yield batch
                    del batch  # or its memory could not be used again while the next ones are made

    def take_traffic(self) -> Traffic:
        """What was read from a bucket since the last call."""
        taken, self.traffic = self.traffic, Traffic()
        return taken

    def _end(self, decoders: Decoders) -> None:
        decoders.close()
        self.traffic.add(decoders.traffic())

    def _decoders(self) -> Decoders:
        shape = (self.slots[1] - self.slots[0], self.image_size, self.image_size, 3)
        keep = self.prefetch + 2
        if self.features is not None:
            return FeatureReaders(self.features, self._flips, shape[0], self.threads, keep=keep)
        if self.processes:
            return ProcessDecoders(self.reader, shape, self.processes, keep=keep, crops=self._crops)
        return ThreadDecoders(self.reader, shape, self.threads, keep=keep, crops=self._crops)

    def _fill(self, decoders: Decoders, index: np.ndarray) -> tuple[torch.Tensor, Filling]:
        if self.pin and (self.features is not None or not self.processes):
            shape, kind = (self.image_size, self.image_size, 3), torch.uint8
            if self.features is not None:
                shape, kind = self.features.shape, torch.float16
            pixels = torch.empty((len(index), *shape), dtype=kind, pin_memory=True)
            return pixels, decoders.fill(index, pixels.numpy())
        filling = decoders.fill(index)
        return torch.from_numpy(filling.pixels), filling

    def _finish(
        self, step: int, slots: np.ndarray, chosen: np.ndarray, pixels: torch.Tensor, filling: Filling
    ) -> Batch:
        faults = dict(filling.faults())
        key = self.reader.manifest.key
        bad = tuple(
            BadSample(key(int(self.samples.index[chosen[place]])), reason) for place, reason in sorted(faults.items())
        )
        if bad:
            good = np.array([place for place in range(len(chosen)) if place not in faults], dtype=np.int64)
            slots, chosen, pixels = slots[good], chosen[good], pixels[torch.from_numpy(good)]
            self._refuse_too_many(bad)
        index, source = self.samples.index[chosen], self.labels
        kept, hidden = lookup_known(source.table, self.samples.row[chosen], probe=source.probe, seed=source.seed)
        if source.overlay is not None:
            kept = source.overlay.apply(kept, index)
        truth = None
        if source.truth is not None and source.truth_rows is not None:
            truth = LabelTriples.of(lookup_known(source.truth, source.truth_rows[chosen])[0])
        return Batch(
            step=step,
            images=pixels,
            flips=torch.from_numpy(self._flips(index)),
            slots=torch.from_numpy(slots),
            index=index,
            keys=lambda: [key(int(place)) for place in index],
            labels=LabelTriples.of(kept),
            probe=LabelTriples.of(hidden),
            truth=truth,
            bad=bad,
        )

    def _flips(self, index: np.ndarray) -> np.ndarray:
        """bool[b]: which images, by their places in the manifest, are mirrored."""
        return draw_flips(self.seed, self.epoch, index, self.flip)

    def _crops(self, index: np.ndarray) -> np.ndarray | None:
        """float64[b, 4]: the part that is kept of each image, by its place in the manifest; None for all of it."""
        return draw_crops(self.seed, self.epoch, index, self.crop) if self.crop < 1 else None

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


class _Needs:
    """From which step to which each shard of a bucket is needed: fetched ahead of the first, let go at the last."""

    def __init__(self, loader: Loader) -> None:
        self._ahead: FetchAhead | None = None
        self._last: dict[int, list[int]] = {}
        reader, steps = loader.reader, range(loader.start, loader.plan.steps)
        if loader.features is not None or not any(
            reader.is_remote(shard) for shard in range(len(reader.manifest.shards))
        ):
            return
        parts = [loader.samples.shard[loader.plan.batch(step, loader.slots)[1]] for step in steps]
        shards = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        at = np.repeat(np.arange(steps.start, steps.stop), [len(part) for part in parts])
        needed, place = np.unique(shards, return_index=True)
        last = at[len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]]
        for shard, step in zip(needed.tolist(), last.tolist(), strict=True):
            self._last.setdefault(step, []).append(shard)
        order = np.argsort(place, kind="stable")
        self._ahead = FetchAhead(reader, needed[order].tolist(), at[place[order]].tolist(), ahead=loader.shards_ahead)

    def reached(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead.reached(step)

    def done_after(self, step: int) -> list[int]:
        """The shards that no later step needs."""
        return self._last.pop(step, [])

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
