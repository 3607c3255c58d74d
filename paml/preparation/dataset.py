"""The images and labels of all splits, from any source: what it understood, tables to write and names to match."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from paml import storage
from paml.errors import DataError, LabelError, SettingsError
from paml.labels import LabelTable, filter_table, observe_single_positive
from paml.labels.build import LabelReport
from paml.labels.class_list import ClassList
from paml.preparation.openimages import Release, fetch_missing_release
from paml.preparation.protocol import PAPER_SETS, PAPER_VALIDATION, paper_validation, simulate
from paml.preparation.settings import OpenImagesSettings, PrepareSettings
from paml.preparation.tables import (
    SplitRecords,
    check_disjoint,
    divide,
    find_classes,
    make_keys,
    split_names,
    write_table,
)
from paml.sources.full import list_some
from paml.sources.records import Records
from paml.sources.registry import SOURCES
from paml.sources.splits import ALIASES, SPLITS

Log = Callable[[str], None]


class Dataset(Protocol):
    """What `prepare` needs to know about a source."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to prepare."""
        ...

    def write_table(self, split: str, folder: str) -> LabelTable:
        """Write the label table of a split, `{folder}/{split}.arrow`."""
        ...

    def write_full(self, split: str, folder: str) -> LabelTable | None:
        """Write `{folder}/{split}-full.arrow`, if the complete labels are known; else None."""
        ...

    def write_protocol(self, folder: str) -> LabelTable | None:
        """Write the table of the simulated partial labels of train, from train-full.arrow; None without a protocol."""
        ...

    def records_of(self, split: str) -> SplitRecords | None:
        """The images as the source names them; None if it has keys alone."""
        ...

    def images_folder(self, split: str) -> str:
        """The folder of the images of all splits. Raises SettingsError if it is not known."""
        ...


def open_dataset(settings: PrepareSettings, log: Log) -> Dataset:
    """Read the labels of a source; detect the format if `source` is `auto`. Raises PamlError."""
    source = settings.source
    if source == "auto":
        source = detect_source(settings, log)
    dataset: Dataset
    if source == "openimages":
        ignored = {"unlisted": settings.unlisted, "split_names": settings.split_names, "keys": settings.keys != "name"}
        if named := [name for name, value in ignored.items() if value]:
            raise SettingsError(f"{named[0]} does not apply to Open Images: leave it out")
        fetch_missing_release(settings, log)
        dataset = Release(settings, log)
    else:
        if settings.openimages != OpenImagesSettings():
            raise SettingsError(f"the openimages settings do not apply to the source {source}: leave them out")
        dataset = read_dataset(settings, source, log)
    if settings.verdicts and settings.verdicts_split not in dataset.splits:
        raise SettingsError(
            f"verdicts_split is {settings.verdicts_split!r}: set it to one of the splits, {', '.join(dataset.splits)}"
        )
    return dataset


def detect_source(settings: PrepareSettings, log: Log) -> str:
    """The one format that the labels have. Raises DataError for none, and for several."""
    path = _first_path(settings.labels)
    reasons = {name: reason for name, source in SOURCES.items() if (reason := source.detect(path))}
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        log(f"source: {name} ({reason})")
        return name
    if reasons:
        fits = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise DataError(f"{path!r} fits several formats: {fits}. Choose one with source")
    if settings.labels == PrepareSettings.labels:
        return "openimages"
    if not _is_there(path):
        raise DataError(f"there is no {path!r}, or it is empty: set labels to an existing file or folder")
    if storage.exists(path) and not os.path.isdir(path) and not storage.size_of(path):
        raise DataError(f"{path!r} is empty (0 bytes): write it again, or set labels to another file")
    raise DataError(f"{path!r} is in none of the known formats: set source to one of {', '.join(SOURCES)}")


def _first_path(labels: str) -> str:
    """`labels`, or with {split} the first file that exists."""
    paths = list(dict.fromkeys(labels.replace("{split}", name) for split in SPLITS for name in ALIASES[split]))
    return next((path for path in paths if _is_there(path)), paths[0])


def _is_there(path: str) -> bool:
    return storage.exists(path) or bool(list_some(path))


def read_dataset(settings: PrepareSettings, source: str, log: Log) -> "Recorded":
    """Read the records of a source and divide them into splits. Raises PamlError."""
    by_split = _read_splits(settings, source, settings.labels, log)
    full = {} if settings.full_labels is None else _read_splits(settings, source, settings.full_labels, log)
    all_records = {id(records): records for records, _, _ in (*by_split.values(), *full.values())}
    classes = find_classes(list(all_records.values()), settings.class_list)
    divided: Collection[str] = ()
    if set(by_split) == {""}:
        records, keys, rows = by_split[""]
        fractions = {
            name: part for name, part in settings.split_fractions.items() if name in (settings.splits or SPLITS)
        }
        total = sum(fractions.values())
        if not total:
            raise SettingsError(
                f"split is {settings.split!r}: the splits to prepare, {', '.join(fractions)}, get nothing"
            )
        fractions = {name: part / total for name, part in fractions.items()}
        divided = fractions if len(fractions) > 1 else ()  # a single split has all images, wherever they are
        parts = divide(records, keys, rows, classes, fractions, settings.split_seed)
        by_split = {name: (records, keys, part) for name, part in parts.items()}
        sizes = ", ".join(f"{name} {len(rows):,}" for name, (_, _, rows) in by_split.items())
        log(f"the labels have no splits; a sample stratified by class (split_seed {settings.split_seed}): {sizes}")
    elif "validation" not in by_split and "train" in by_split and "validation" in (settings.splits or SPLITS):
        records, keys, rows = by_split["train"]
        by_split |= _take_validation(settings, source, records, keys, rows, classes, log)
        divided = ("train", "validation")
    wanted = settings.splits or tuple(name for name in SPLITS if name in by_split)
    if missing := [name for name in wanted if name not in by_split]:
        raise DataError(f"{settings.labels!r} has no images of {missing[0]}: it has {', '.join(by_split)}; set splits")
    splits: dict[str, SplitRecords] = {}
    reported: set[int] = set()
    for name in wanted:
        records, keys, rows = by_split[name]
        if not len(rows):
            raise DataError(f"no image was assigned to the split {name!r}: change splits or split")
        default = "negative" if records.complete else "unobserved"
        unlisted = settings.unlisted_in(name) or default
        splits[name] = SplitRecords(
            records=records,
            rows=rows,
            keys=[keys[row] for row in rows.tolist()],
            unlisted=unlisted,
            divided=name in divided,
            bad_rows=() if id(records) in reported else records.bad_rows,
        )
        reported.add(id(records))
    check_disjoint({name: split.keys for name, split in splits.items()})
    similar = Counter(name.lower() for name in classes.classes)
    if same := [name for name in classes.classes if similar[name.lower()] > 1]:
        log(f"WARNING: classes that differ in case only: {', '.join(same[:6])}")
    _check_earlier_splits(settings, splits)
    return Recorded(settings, source, splits, full, classes, log)


def _check_earlier_splits(settings: PrepareSettings, splits: Mapping[str, SplitRecords]) -> None:
    """Raise DataError for an image that an earlier call has put into a split that this one does not prepare."""
    for name in SPLITS:
        path = storage.join(settings.out, "labels", f"{name}.arrow")
        if name in splits or not storage.exists(path):
            continue
        table = LabelTable.open(path)
        for split, records in splits.items():
            rows = table.rows_of(records.keys)
            if len(rows := rows[rows >= 0]):
                raise DataError(
                    f"{len(rows):,} images of {split} are in {path} too, such as {table.keys(rows[:1])[0]!r}: prepare "
                    "all splits in one call, or set out to another folder"
                )


def _read_splits(
    settings: PrepareSettings, source: str, labels: str, log: Log
) -> dict[str, tuple[Records, list[str], np.ndarray]]:
    """(records, keys, rows) by split; the split "" if the source has none."""

    def read(path: str) -> tuple[Records, list[str]]:
        read_records = SOURCES[source].read
        assert read_records is not None, "openimages is read by Release"
        records = read_records(path, settings.images, getattr(settings, source, None))
        log(f"{path}: {records.understood}")
        for note in records.notes:
            log(f"  {note}")
        if not len(records.images):
            raise DataError(f"{path!r} names no image: {records.understood}")
        if settings.protocol is None:  # only the papers' sample depends on the keys of the format
            records = dataclasses.replace(records, keys=None)
        return records, make_keys(records, settings.keys)

    if "{split}" in labels:
        found = {}
        for split in settings.splits or SPLITS:
            names = [settings.split_names[split]] if split in settings.split_names else ALIASES[split]
            paths = [labels.replace("{split}", name) for name in names]
            path = next((path for path in paths if _is_there(path)), None)
            if path is None and settings.splits is None:
                log(f"there is no {' or '.join(paths)}: no {split}")
                continue
            if path is None:
                raise LabelError(
                    f"there is no {' or '.join(map(repr, paths))} (labels, split {split}): name the file, or set "
                    "splits to those that have one"
                )
            records, keys = read(path)
            found[split] = (records, keys, np.arange(len(keys)))
        if not found:
            raise LabelError(f"there is no {labels.replace('{split}', 'train')!r}: set labels to existing files")
        return found
    records, keys = read(labels)
    names = split_names(records, _paper_names(settings, source, records))
    if names is not None and source == "coco" and settings.protocol is not None:
        has_label = np.bincount(records.image, minlength=len(names)) > 0
        names = [name if has_label[row] else "" for row, name in enumerate(names)]  # as in the papers
    if names is None:
        return {"": (records, keys, np.arange(len(keys)))}
    array = np.array(names)
    if left_out := int((array == "").sum()):
        log(f"  {left_out:,} of {len(array):,} images are in none of the splits and are left out")
    return {name: (records, keys, np.flatnonzero(array == name)) for name in SPLITS if (array == name).any()}


def _paper_names(settings: PrepareSettings, source: str, records: Records) -> Mapping[str, str]:
    """`split_names`; under a protocol, the papers test on what COCO and VOC call val, and hold out part of train."""
    if settings.split_names or settings.protocol is None or source not in PAPER_SETS or records.splits is None:
        return settings.split_names
    names = {name for name in records.splits if name}
    for train, test in (("train2014", "val2014"), ("train", "val")):
        if {train, test} <= names:
            return {"train": train, "test": test}
    return {}


def _take_validation(
    settings: PrepareSettings, source: str, records: Records, keys: Sequence[str], rows: np.ndarray,
    classes: ClassList, log: Log,
) -> dict[str, tuple[Records, list[str], np.ndarray]]:  # fmt: skip
    """Divide train into train and validation."""
    if settings.protocol is not None and source in PAPER_SETS:
        order = rows[np.argsort(np.array([keys[row] for row in rows.tolist()], object), kind="stable")]
        held_out = paper_validation(len(order), settings.protocol_seed)
        parts = {"train": np.sort(order[~held_out]), "validation": np.sort(order[held_out])}
        log(f"validation is {PAPER_VALIDATION:.0%} of train, as in the papers")
    else:
        fractions = settings.split_fractions
        share = fractions["validation"] / ((fractions["train"] + fractions["validation"]) or 1)
        shares = {"train": 1 - share, "validation": share}
        parts = divide(records, keys, rows, classes, shares, settings.split_seed)
        log(f"validation is {share:.0%} of train, since the labels have no validation split")
    return {name: (records, list(keys), part) for name, part in parts.items()}


def _is_complete(path: str) -> bool:
    """Whether every pair of the table at `path` has a state."""
    table = LabelTable.open(path)
    return table.num_annotations == table.num_images * table.num_classes


def _join(first: SplitRecords, second: SplitRecords) -> SplitRecords:
    """Both splits, of the same records, as one."""
    rows = np.concatenate([first.rows, second.rows])
    order, keys = np.argsort(rows), [*first.keys, *second.keys]
    return dataclasses.replace(first, rows=rows[order], keys=[keys[i] for i in order.tolist()])


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A source that was read into records."""

    settings: PrepareSettings
    source: str
    by_split: dict[str, SplitRecords]
    full: dict[str, tuple[Records, list[str], np.ndarray]]
    """The complete labels by split, if full_labels is set."""
    classes: ClassList
    log: Log

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.by_split)

    def write_table(self, split: str, folder: str) -> LabelTable:
        return self._write(self.by_split[split], storage.join(folder, f"{split}.arrow")).table

    def write_full(self, split: str, folder: str) -> LabelTable | None:
        given = self.by_split[split]
        out = storage.join(folder, f"{split}-full.arrow")
        if self.settings.full_labels is None:
            if self.settings.protocol is None or split != "train":
                return None
            if given.unlisted != "negative" and not _is_complete(storage.join(folder, f"{split}.arrow")):
                raise SettingsError(
                    "protocol needs complete labels: set full_labels, or unlisted to "
                    f"'{{{split}: negative}}' if those of {self.settings.labels!r} are complete"
                )
            return self._write(given, out).table
        records, keys, _ = self.full.get(split) or next(iter(self.full.values()))
        row_of = {key: row for row, key in enumerate(keys)}
        if missing := [key for key in given.keys if key not in row_of]:
            raise DataError(
                f"full_labels {self.settings.full_labels!r} has no labels of {len(missing):,} images of {split}, "
                f"such as {missing[0]!r}: name the complete labels of the same images"
            )
        rows = np.array([row_of[key] for key in given.keys], np.int64)
        order = np.argsort(rows)
        complete = SplitRecords(
            records=records, rows=rows[order], keys=[given.keys[i] for i in order.tolist()], unlisted="negative"
        )
        return self._write(complete, out).table

    def write_protocol(self, folder: str) -> LabelTable | None:
        full = storage.join(folder, "train-full.arrow")
        if self.settings.protocol == "single-positive" and self.source in PAPER_SETS:
            return self._write_released(folder, full)
        return simulate(self.settings, full, folder)

    def _write_released(self, folder: str, full: str) -> LabelTable:
        """As the released scripts sample: first over train with validation, then without the validation images."""
        train, validation = self.by_split["train"], self.by_split.get("validation")
        same = validation is not None and validation.records is train.records
        whole = train if validation is None or not same else _join(train, validation)
        path, sampled = (storage.join(folder, f"{name}.arrow") for name in ("all-full", "all-single"))
        everything = self._write(whole, path).table
        single = observe_single_positive(everything, sampled, self.settings.protocol_seed, protocol="released")
        table = filter_table(single, storage.join(folder, "train-single.arrow"), images=LabelTable.open(full).keys())
        for stem in ("all-full", "all-single"):
            for suffix in (".arrow", ".classes.csv", ".rejects.parquet"):
                storage.delete(storage.join(folder, stem + suffix))
        return table

    def records_of(self, split: str) -> SplitRecords | None:
        return self.by_split[split]

    def images_folder(self, split: str) -> str:
        folder = self.settings.images or self.by_split[split].records.folder
        if folder is None:
            raise SettingsError(
                f"images is not set: name the folder or bucket of the images of {self.settings.labels!r}"
            )
        return folder

    def _write(self, split: SplitRecords, out: str) -> LabelReport:
        return write_table(split, self.classes, out, self.settings.label_table, self.log)
