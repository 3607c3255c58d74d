"""The data of a run: manifests and label tables of its splits, joined once, and loaders over them."""

import dataclasses
import os
from typing import Any

import numpy as np

from paml import storage
from paml.data.cached import CachedFeatures
from paml.data.loader import LabelSource, Loader
from paml.data.plan import ImageChoice, Samples, join, plan_epoch, worker_slots
from paml.data.settings import DataSettings
from paml.errors import DataError, SettingsError
from paml.labels.overlay import LabelOverlay
from paml.labels.table import LabelTable
from paml.losses import Memory, Scope, build_memory
from paml.shards.cache import ShardCache
from paml.shards.manifest import Manifest
from paml.shards.reader import ShardReader
from paml.training.settings import TrainSettings
from paml.training.world import World


@dataclasses.dataclass(frozen=True)
class Split:
    """One set of images with its labels."""

    name: str
    manifest: Manifest
    table: LabelTable
    samples: Samples
    truth: LabelTable | None = None
    truth_rows: np.ndarray | None = None
    features: CachedFeatures | None = None
    """What takes the place of the images in training from a named layer."""

    @property
    def image_size(self) -> int:
        """Side of the stored pictures in pixels; raises SettingsError where they differ."""
        widths, heights = np.asarray(self.manifest.width), np.asarray(self.manifest.height)
        side = int(widths[0])
        if (widths == side).all() and (heights == side).all():
            return side
        raise SettingsError(
            f"the images of {self.manifest.folder} differ in size; set data.image_size to the training size in pixels"
        )


@dataclasses.dataclass(frozen=True)
class RunData:
    """All splits of a run."""

    train: Split
    validation: Split
    test: Split | None
    image_size: int

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that there are, training first."""
        return tuple(split for split in (self.train, self.validation, self.test) if split is not None)

    @property
    def classes(self) -> tuple[str, ...]:
        """MIDs, in the order of the head's maps."""
        return self.train.table.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Display names, in the same order; they may repeat."""
        return self.train.table.names


def _need(path: str, settings: DataSettings) -> str:
    if not storage.exists(path):
        raise DataError(
            f"{path} is not there. Prepare the data first: `python jobs/prepare_openimages.py --help` shows how "
            f"(it fills data.root, now {settings.root}), or point data.root at a prepared folder"
        )
    return path


def open_split(
    settings: DataSettings, split: str, labels: str, *, images: ImageChoice, truth: str | None = None
) -> Split:
    """Open one split and join its keys to the table's rows. Raises DataError, SettingsError."""
    folder = storage.join(settings.root, "shards", split)
    _need(storage.join(folder, "manifest.arrow"), settings)
    manifest = Manifest.open(folder)
    table = LabelTable.open(_need(storage.join(settings.root, labels), settings))
    samples = join(manifest, table, images)
    if truth is None or not storage.exists(storage.join(settings.root, truth)):
        return Split(split, manifest, table, samples)
    full = LabelTable.open(storage.join(settings.root, truth))
    same_classes(table, full)
    rows = np.asarray(full.rows_of(manifest.keys()))[samples.index]
    return Split(split, manifest, table, samples, full, rows)


def same_classes(first: LabelTable, second: LabelTable) -> None:
    """Raise DataError unless both tables number their classes alike."""
    if first.classes != second.classes:
        raise DataError(
            f"{first.path} has {first.num_classes} classes and {second.path} has {second.num_classes}, or in another "
            "order: build both tables with the same classes-trainable.txt"
        )


def open_data(settings: DataSettings) -> RunData:
    """Open all splits. Raises DataError naming what is missing and the command that makes it."""
    train = open_split(
        settings,
        settings.train_split,
        settings.train_labels,
        images=settings.images,
        truth=settings.train_truth,
    )
    validation = open_split(
        settings, settings.validation_split, f"labels/{settings.validation_split}.arrow", images="observed"
    )
    test = None
    if settings.test_split is not None:
        test = open_split(settings, settings.test_split, f"labels/{settings.test_split}.arrow", images="observed")
    for split in (validation, test):
        if split is not None:
            same_classes(train.table, split.table)
    return RunData(train, validation, test, settings.image_size or train.image_size)


def loss_memory(settings: TrainSettings, data: RunData, world: World) -> Memory | None:
    """What the run's loss keeps beyond a batch, None for most. Raises SettingsError, DataError."""
    scope = Scope(
        index=data.train.samples.index,
        classes=data.classes,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        device=world.device,
        world=world.group,
    )
    return build_memory(settings.loss, scope)


def train_loader(
    settings: TrainSettings,
    data: RunData,
    world: World,
    *,
    epoch: int,
    start: int,
    overlay: LabelOverlay,
    probe: float,
) -> Loader:
    """The worker's share of a training epoch, from global batch `start` on."""
    split, own = data.train, settings.data
    slots = worker_slots(settings.batch_size, world.rank, world.size)
    plan = plan_epoch(
        split.samples,
        batch_size=settings.batch_size,
        epoch=epoch,
        seed=settings.seed,
        window=own.shuffle_window,
        slots=slots,
    )
    labels = LabelSource(split.table, split.truth, split.truth_rows, overlay, probe, settings.seed)
    return _loader(
        settings,
        split,
        world,
        labels=labels,
        plan=plan,
        slots=slots,
        image_size=data.image_size,
        epoch=epoch,
        start=start,
        flip=own.flip,
        crop=own.crop,
    )


def eval_loader(settings: TrainSettings, split: Split, image_size: int, world: World) -> Loader:
    """The worker's share of a split in the manifest's order, each image once, no flips, no crops."""
    batch = settings.eval_batch_size or 2 * settings.batch_size
    plan = plan_epoch(split.samples, batch_size=batch, epoch=0, seed=0, window=1, shuffle=False)
    slots = worker_slots(batch, world.rank, world.size)
    labels = LabelSource(split.table)
    return _loader(settings, split, world, labels=labels, plan=plan, slots=slots, image_size=image_size)


def _loader(settings: TrainSettings, split: Split, world: World, **own: Any) -> Loader:
    """With what training and scoring have in common; `own` are the other arguments of `Loader`."""
    data = settings.data
    return Loader(
        reader=split_reader(data, split),
        samples=split.samples,
        seed=settings.seed,
        threads=data.decode_threads,
        processes=data.loader_processes,
        prefetch=data.prefetch,
        shards_ahead=shards_ahead(data, split.manifest),
        max_bad_share=data.max_bad_share,
        pin=world.device.type == "cuda",
        features=split.features,
        **own,
    )


def split_reader(settings: DataSettings, split: Split) -> ShardReader:
    """Reads the images of a split, those of a bucket through the cache."""
    return ShardReader(split.manifest, ShardCache(settings.cache_dir, _cache_limit(settings)))


def _cache_limit(settings: DataSettings) -> int | None:
    return None if settings.cache_gb is None else int(settings.cache_gb * 1e9)


def shards_ahead(settings: DataSettings, manifest: Manifest) -> int:
    """Shards to fetch ahead: no more than fill a quarter of the cache, over all workers of a node."""
    limit = _cache_limit(settings)
    if limit is None:
        return settings.shards_ahead
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    largest = max((shard.bytes for shard in manifest.shards), default=1)
    return max(1, min(settings.shards_ahead, limit // (4 * workers * max(1, largest))))
