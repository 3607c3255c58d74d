"""The source `openimages`: tables are built from a release's files directly, since they have many millions of rows."""

import dataclasses
import os
import posixpath
from collections.abc import Callable

from paml import storage
from paml.errors import DataError, SettingsError
from paml.labels import LabelTable, build_label_table
from paml.preparation.protocol import simulate
from paml.preparation.settings import PrepareSettings
from paml.preparation.tables import SplitRecords
from paml.sources.release import V3, V3_ARCHIVES, fetch_release, find_release_files, images_folder_of
from paml.sources.splits import SPLITS

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Release:
    """A release of Open Images, as `Dataset` describes it."""

    settings: PrepareSettings
    log: Log

    @property
    def splits(self) -> tuple[str, ...]:
        return self.settings.splits or SPLITS

    def write_table(self, split: str, folder: str) -> LabelTable:
        return self._build(split, storage.join(folder, f"{split}.arrow"))

    def write_full(self, split: str, folder: str) -> LabelTable | None:
        if self.settings.full_labels is None:
            return None
        annotations = storage.join(self.settings.full_labels, split, "annotations-human.csv")
        return self._build(split, storage.join(folder, f"{split}-full.arrow"), annotations)

    def write_protocol(self, folder: str) -> LabelTable | None:
        return simulate(self.settings, storage.join(folder, "train-full.arrow"), folder)

    def records_of(self, split: str) -> SplitRecords | None:
        return None

    def images_folder(self, split: str) -> str:
        labels = self.settings.labels.rstrip("/")
        own = images_folder_of(labels, split) or storage.join(posixpath.dirname(labels), "images")
        return self.settings.images or own

    def _build(self, split: str, out: str, annotations: str | None = None) -> LabelTable:
        files = find_release_files(self.settings.labels, split)
        classes = self.settings.class_list or files.classes
        report = build_label_table(
            annotations or files.annotations, classes, out, descriptions=files.descriptions,
            settings=self.settings.label_table,
        )  # fmt: skip
        self.log(f"classes: {classes}")
        self.log(str(report))
        return report.table


def needs_release(settings: PrepareSettings) -> bool:
    """Whether openimages.download_from is set and `labels` lacks a file."""
    if settings.openimages.download_from is None:
        return False
    try:
        files = [find_release_files(settings.labels, name) for name in settings.splits or SPLITS]
    except DataError:
        return True
    if any(not each.classes.endswith("classes-trainable.txt") for each in files):
        return True
    return settings.openimages.flickr and not all(each.images for each in files)


def fetch_missing_release(settings: PrepareSettings, log: Log) -> None:
    """Download, verify and unpack the release's archives if `needs_release`."""
    if not needs_release(settings):
        return
    folder, name = os.path.split(settings.labels.rstrip("/"))
    if name != V3:
        raise SettingsError(
            f"labels is {settings.labels!r}; with openimages.download_from its last folder must be {V3}"
        )
    archives = [a for name, a in V3_ARCHIVES.items() if settings.openimages.flickr or name != "images"]
    fetch_release(folder or ".", archives, base=settings.openimages.download_from or "", log=log)
