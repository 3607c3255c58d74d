"""The data of a run: the manifests and label tables of its splits, and loaders over them."""

import dataclasses
from typing import Any

import numpy as np

from paml import storage
from paml.data.augment import Augmentation
from paml.data.embeddings import open_embeddings
from paml.data.loader import LabelSource, Loader, LoaderOptions
from paml.data.plan import EpochPlan, ImageChoice, Samples, join, plan_epoch, worker_slots
from paml.data.readers import CachedFeatures
from paml.data.settings import DataSettings
from paml.errors import DataError, check_setting
from paml.labels.overlay import LabelOverlay
from paml.labels.table import LabelTable
from paml.shards.cache import ShardCache
from paml.shards.manifest import Manifest
from paml.shards.reader import ShardReader
from paml.training.settings import TrainSettings
from paml.training.world import World


@dataclasses.dataclass(frozen=True)
class Split:
    """A set of images with labels."""

    name: str
    manifest: Manifest
    table: LabelTable
    samples: Samples
    truth: LabelTable | None = None
    truth_rows: np.ndarray | None = None
    features: CachedFeatures | None = None
    """Cached features (model.train_from) or embeddings (data.embeddings) to use instead of the images."""

    @property
    def image_size(self) -> int:
        """Side of the stored images in pixels. Raises SettingsError if they differ."""
        return self.manifest.image_size

    def subset(self, positions: np.ndarray) -> "Split":
        """The split with only the samples at these positions, in this order."""
        return dataclasses.replace(self, samples=self.samples.subset(positions))


@dataclasses.dataclass(frozen=True)
class RunData:
    """The splits of a run."""

    train: Split
    validation: Split
    test: Split | None
    image_size: int

    @property
    def splits(self) -> tuple[Split, ...]:
        """The existing splits, training first."""
        return tuple(split for split in (self.train, self.validation, self.test) if split is not None)

    @property
    def input_text(self) -> str:
        """What the model gets: `224 px`, or `embeddings [768, 1, 1]`."""
        shape = self.train.manifest.settings.get("shape")
        return f"{self.image_size} px" if shape is None else f"embeddings {shape}"

    @property
    def classes(self) -> tuple[str, ...]:
        """MIDs in the order of the model's outputs."""
        return self.train.table.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Display names in the same order. They may repeat."""
        return self.train.table.names


def open_data(settings: DataSettings) -> RunData:
    """Open all splits. Raises DataError, which names what is missing and the command that writes it."""
    train = open_split(
        settings, settings.train_split, settings.train_labels, images=settings.images, truth=settings.train_truth
    )

    def open_eval_split(name: str) -> Split:
        split = open_split(settings, name, f"labels/{name}.arrow", images="observed")
        check_same_classes(train.table, split.table)
        return split

    validation = open_eval_split(settings.validation_split)
    test = None if settings.test_split is None else open_eval_split(settings.test_split)
    return RunData(train, validation, test, settings.image_size or train.image_size)


def open_split(
    settings: DataSettings, split: str, labels: str, *, images: ImageChoice, truth: str | None = None
) -> Split:
    """Open the shards (or embeddings) of a split and the label tables `labels` and `truth`, paths in `settings.root`.

    `truth` may be missing. Raises DataError, SettingsError.
    """
    check_setting(bool(settings.root), "data.root", settings.root, "a folder written by `paml prepare`")
    table_path = storage.join(settings.root, labels)
    folder = storage.join(settings.root, "shards", split)
    if settings.embeddings is None:
        _check_exists(storage.join(folder, "manifest.arrow"), settings)
    _check_exists(table_path, settings)
    table = LabelTable.open(table_path)
    if settings.embeddings is None:
        manifest, features = Manifest.open(folder), None
    else:
        manifest, features = open_embeddings(settings, split, table)
    samples = join(manifest, table, images)
    if features is not None:  # a file may have the embeddings of all splits
        samples = samples.subset(np.flatnonzero(samples.row >= 0))
    if truth is None or not storage.exists(storage.join(settings.root, truth)):
        return Split(split, manifest, table, samples, features=features)
    full = LabelTable.open(storage.join(settings.root, truth))
    check_same_classes(table, full)
    rows = np.asarray(full.rows_of(manifest.keys()))[samples.index]
    return Split(split, manifest, table, samples, full, rows, features)


def _check_exists(path: str, settings: DataSettings) -> None:
    if not storage.exists(path):
        raise DataError(
            f"{path} does not exist: set data.root (now {settings.root}) to a folder with prepared data, or prepare "
            "it with `paml prepare`"
        )


def check_same_classes(first: LabelTable, second: LabelTable) -> None:
    """Raise DataError unless both tables have the same classes in the same order."""
    if first.classes != second.classes:
        raise DataError(
            f"{first.path} ({first.num_classes} classes) and {second.path} ({second.num_classes} classes) differ in "
            "their classes or in the order of classes: build both tables with the same class list"
        )


def train_loader(
    settings: TrainSettings,
    data: RunData,
    world: World,
    *,
    epoch: int,
    start: int,
    overlay: LabelOverlay,
    probe_fraction: float,
) -> Loader:
    """The worker's part of a training epoch, from global batch `start` on."""
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
    return split_loader(
        own,
        split,
        plan,
        data.image_size,
        world,
        LabelSource(split.table, split.truth, split.truth_rows, overlay, probe_fraction, settings.seed),
        slots=slots,
        start=start,
        augmentation=Augmentation(
            seed=settings.seed, epoch=epoch, flip_prob=own.flip_prob, min_crop_area=own.min_crop_area
        ),
    )


def eval_loader(settings: DataSettings, split: Split, image_size: int, world: World, *, batch_size: int) -> Loader:
    """The worker's part of a split: every image once, in the order of the manifest, without augmentation.

    batch_size: images per global batch.
    """
    plan = plan_epoch(split.samples, batch_size=batch_size, epoch=0, seed=0, window=1, shuffle=False)
    slots = worker_slots(batch_size, world.rank, world.size)
    return split_loader(settings, split, plan, image_size, world, slots=slots)


def split_loader(
    settings: DataSettings,
    split: Split,
    plan: EpochPlan,
    image_size: int,
    world: World,
    labels: LabelSource | None = None,
    **position: Any,
) -> Loader:
    """A loader of a split. labels: default its table. position: the keyword arguments of `Loader` but `features`."""
    options = LoaderOptions(
        image_size=image_size,
        threads=settings.decode_threads,
        max_bad_fraction=settings.max_bad_fraction,
        pin_memory=world.device.type == "cuda",
    )
    reader, labels = split_reader(settings, split), labels or LabelSource(split.table)
    return Loader(reader, split.samples, labels, plan, options, features=split.features, **position)


def split_reader(settings: DataSettings, split: Split) -> ShardReader:
    """A reader of the split's images. Shards in a bucket are cached."""
    limit = None if settings.cache_gb is None else int(settings.cache_gb * 1e9)
    return ShardReader(split.manifest, ShardCache(settings.cache_dir, limit))
