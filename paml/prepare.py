"""From a release's files to a prepared data folder: shards with their manifest, and label tables.

<out>/shards/{split}/   tar files, manifest.arrow, rejects.csv
<out>/labels/{split}.arrow, {split}-full.arrow (full labels, where known), train-single.arrow (protocol)
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable

from paml import storage
from paml.errors import DataError, SettingsError
from paml.labels import LabelSettings, LabelTable, build_label_table, observe_single_positive
from paml.shards import ShardSettings, write_shards
from paml.sources.folder import count_folder, iter_folder
from paml.sources.tars import count_tars, iter_tars


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Where the images and CSV files lie and what to make of them."""

    out: str = "data/openimages_v3"
    """The prepared folder; give it as data.root to training."""
    release: str = "downloads/2017_11"
    """Folder of the class lists and the annotation files."""
    images: str = "downloads/images"
    """Folder of {split}/ image folders, or of {split}*.tar or {split}*.tar.gz files."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Splits to prepare."""
    annotations: str = "{split}/annotations-human.csv"
    """Annotation file of a split, below `release`. V4 to V7: {split}-annotations-human-imagelabels.csv."""
    classes: str = "classes-trainable.txt"
    """The classes in the order of the head, below `release`: one MID a line."""
    descriptions: str | None = "class-descriptions.csv"
    """MID and display name, below `release`; null for none."""
    full_labels: str | None = None
    """Folder with the same annotation files holding full labels (experiments); null for none."""
    single_positive_seed: int | None = None
    """With full labels: also make labels/train-single.arrow, one positive an image, drawn by this seed."""
    only_labelled: bool = False
    """Leave images without labels out of the shards, and name labelled ones that no source has."""
    shards: ShardSettings = dataclasses.field(default_factory=ShardSettings)
    labels: LabelSettings = dataclasses.field(default_factory=LabelSettings)
    workers: int | None = None
    """Threads that decode and encode; null takes all cores."""

    def __post_init__(self) -> None:
        if self.single_positive_seed is not None and self.full_labels is None:
            raise SettingsError("single_positive_seed needs full_labels: the positive is drawn from all true ones")
        if "{split}" not in self.annotations:
            raise SettingsError(f"annotations is {self.annotations!r}; it must contain {{split}}")


def _table(settings: PrepareSettings, folder: str, split: str, name: str, say: Callable[[str], None]) -> LabelTable:
    out = storage.join(settings.out, "labels", f"{name}.arrow")
    descriptions = settings.descriptions and storage.join(settings.release, settings.descriptions)
    report = build_label_table(
        storage.join(folder, settings.annotations.format(split=split)),
        storage.join(settings.release, settings.classes),
        out,
        descriptions=descriptions,
        settings=settings.labels,
    )
    say(str(report))
    return LabelTable.open(out)


def _source(settings: PrepareSettings, split: str) -> tuple[Iterable, int]:
    folder = storage.join(settings.images, split)
    if storage.list_files(folder):
        return iter_folder(folder), count_folder(folder)
    tars = [
        storage.join(settings.images, name)
        for name in storage.list_files(settings.images)
        if name.startswith(split) and name.endswith((".tar", ".tar.gz", ".tgz"))
    ]
    if not tars:
        raise DataError(
            f"no images of split {split!r}: neither a folder {folder} nor files {split}*.tar in {settings.images}; "
            "set images to the folder that holds them"
        )
    return iter_tars(tars), count_tars(tars)


def _first_rejects(folder: str, count: int = 3) -> list[list[str]]:
    text = storage.read_bytes(storage.join(folder, "rejects.csv")).decode()
    return list(csv.reader(io.StringIO(text)))[1 : count + 1]


def prepare(settings: PrepareSettings, say: Callable[[str], None] = print) -> None:
    """Make or complete the prepared folder; a run that was cut off goes on where it stood.

    Label tables are built anew each time (seconds to minutes); finished shards are kept. Raises PamlError.
    """
    storage.ensure_writable(settings.out)
    for split in settings.splits:
        table = _table(settings, settings.release, split, split, say)
        if settings.full_labels is not None:
            full = _table(settings, settings.full_labels, split, f"{split}-full", say)
            if split == "train" and settings.single_positive_seed is not None:
                path = storage.join(settings.out, "labels", "train-single.arrow")
                single = observe_single_positive(full, path, settings.single_positive_seed)
                say(f"label table {path}: {single.num_images:,} images with one positive each")
        source, count = _source(settings, split)
        report = write_shards(
            source,
            storage.join(settings.out, "shards", split),
            settings.shards,
            expected_count=count,
            wanted_keys=table.keys() if settings.only_labelled else None,
            workers=settings.workers,
        )
        say(f"shards of {split}: {report}")
        if report.rejected:
            for key, reason in _first_rejects(report.folder):
                say(f"  rejected: {key}: {reason}")
    say(f"prepared: give data.root = {settings.out} to jobs/train_openimages.py")
