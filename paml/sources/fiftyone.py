"""FiftyOne's data sets on disk: FiftyOneDataset (samples.json), and FiftyOneImageClassificationDataset and
FiftyOneImageDetectionDataset (labels.json), in one folder or in one per split.

Formats: https://docs.voxel51.com/user_guide/export_datasets.html
"""

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, SettingsError
from paml.labels.class_list import ClassList
from paml.parsing import parse_errors_as, read_json
from paml.sources.folder import is_image, key_of
from paml.sources.full import distinct_names, have_files, list_some, path_below, sniff
from paml.sources.records import Records
from paml.sources.splits import split_folder

POSITIVE_FIELD, NEGATIVE_FIELD = "positive_labels", "negative_labels"
"""The fields of the image labels of Open Images, as FiftyOne loads them."""
_LISTS = {
    "Classifications": "classifications",
    "Detections": "detections",
    "Polylines": "polylines",
    "Keypoints": "keypoints",
}
_SINGLE = ("Classification", "Detection", "Polyline", "Keypoint")
_START = re.compile(rb'\{\s*"(?:samples|classes|labels)"\s*:')
_FIELDS = re.compile(rb'"filepath"\s*:|"labels"\s*:\s*\{')
_FILES = ("samples.json", "labels.json")
_SPLITS = ("train", "val", "validation", "test")
_HINT = "export it again with FiftyOne"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class FiftyOneSettings:
    """The source `fiftyone`."""

    field: str | None = None
    """The field of the samples with an image's classes: Classification(s), Detections and the like. null: the only one,
    or positive_labels."""
    negative_field: str | None = None
    """The field with the classes that were checked and are absent; null: negative_labels for positive_labels, else
    none."""

    def __post_init__(self) -> None:
        if self.negative_field is not None and self.field is None:
            raise SettingsError(f"fiftyone.negative_field is {self.negative_field!r}: set fiftyone.field too")


class _Image(NamedTuple):
    """An image as a data set lists it."""

    name: str
    file: str
    """Its path below the root; "" if it was not found."""
    split: str
    positives: list[Any] | None
    """Labels; None if the image has none, not even an empty list."""
    negatives: list[Any] | None


@dataclass
class _Found:
    """What all data sets of a folder have in common."""

    root: str
    images: str | None
    listed: list[_Image] = field(default_factory=list)
    classes: dict[str, None] = field(default_factory=dict)
    """The classes of a labels.json, if it lists them."""
    bad_rows: list[tuple[int, str]] = field(default_factory=list)

    def files(self, folder: str) -> list[str]:
        """Paths of the images in a folder, if they are looked for here."""
        if self.images is not None:
            return []
        return [name for name in storage.list_files(storage.join(self.root, folder)) if is_image(name)]


def detect_fiftyone(labels: str) -> str | None:
    """Whether a file, or files in a folder or its subfolders, have the lists of these data sets."""
    if _looks_like_fiftyone(labels):
        return "a FiftyOne JSON file"
    found = _find_files(labels)
    if not found:
        return None
    return f"FiftyOne's {found[0]}" if len(found) == 1 else f"{len(found)} FiftyOne data sets, such as {found[0]}"


def read_fiftyone(labels: str, images: str | None, settings: FiftyOneSettings) -> Records:
    """The classes of a field of each sample, or of each image of a labels.json. A sample without a value is an image
    without labels.

    The split is the folder of a data set, or a tag (train, val, test) of a sample. Raises DataError for another format,
    and if several fields have classes.
    """
    if storage.exists(labels):
        folder, _, name = labels.rpartition("/")
        root, files = folder or ("/" if labels.startswith("/") else "."), [name]
    else:
        root = labels.rstrip("/")
        files = _find_files(root)
    if not files:
        raise DataError(
            f"{labels!r} has no samples.json or labels.json of FiftyOne: set labels to the folder of the export"
        )
    found = _Found(root, images)
    contents = {file: _read(storage.join(root, file)) for file in files}
    with parse_errors_as(labels, _HINT):
        fields = _choose_fields(labels, contents.values(), settings)
        for file, content in contents.items():
            split = split_folder(file) if len(files) > 1 else ""
            if "samples" in content:
                _add_samples(found, content["samples"], posixpath.dirname(file), split, fields)
            else:
                _add_labels(found, content, posixpath.dirname(file), split)
        return _records(found, labels, [name for name in fields if name])


def _records(found: _Found, labels: str, fields: Sequence[str]) -> Records:
    listed = found.listed
    if not listed:
        reason = found.bad_rows[0][1] if found.bad_rows else _HINT
        raise DataError(f"{labels!r} has no image: {reason}")
    splits, files = [each.split for each in listed], [each.file for each in listed]
    folders = [posixpath.dirname(each.file) or each.split for each in listed]
    names = distinct_names([each.name for each in listed], folders, splits, labels)
    image, cls, state = [], [], []
    for number, each in enumerate(listed):
        for text, values in (("1", each.positives), ("0", each.negatives)):
            for name in dict.fromkeys(_class_names(values or (), number + 1, found.bad_rows)):
                image.append(number)
                cls.append(name)
                state.append(text)
    pa.array([*names, *cls], pa.string())  # JSON can have text that is not valid Unicode
    classes = list(dict.fromkeys([*found.classes, *sorted(set(cls))])) if found.classes else []
    located = any(files)
    notes = []
    if found.images is None and not located:
        notes.append(f"no image was found in {found.root}, such as {names[0]!r}: set images")
    unlabeled = np.array([each.positives is None and each.negatives is None for each in listed], bool)
    if unlabeled.any():
        notes.append(f"{unlabeled.sum():,} of {len(names):,} samples have no value, so no labels")
    return Records(
        path=labels,
        understood=f"FiftyOne data set, {len(names):,} samples"
        + (f", classes of {', '.join(fields)}" if fields else ""),
        images=names,
        unlabeled=unlabeled,
        image=np.array(image, np.int64),
        cls=pa.array(cls, pa.string()).dictionary_encode(),
        state=pa.array(state, pa.string()).dictionary_encode(),
        row=np.array(image, np.int64) + 1,
        splits=splits if any(splits) else None,
        classes=ClassList(labels, classes, classes) if classes else None,
        folder=found.root if located else None,
        files=files if located else None,
        bad_rows=found.bad_rows,
        notes=notes,
    )


def _class_names(values: Sequence[Any], number: int, bad_rows: list[tuple[int, str]]) -> Iterator[str]:
    """The classes of labels, which are texts or objects with a `label`; others become bad rows."""
    for value in values:
        name = value.get("label") if isinstance(value, dict) else value
        if isinstance(name, str) and name.strip():
            yield name.strip()
        else:
            bad_rows.append((number, f"sample {number} has a label without a class: {str(value)[:80]!r}"))


# --- files ---------------------------------------------------------------------------------------------------------


def _looks_like_fiftyone(path: str) -> bool:
    start = sniff(path).lstrip()
    named = posixpath.basename(path) == "labels.json" and b'"classes"' in start[:64]  # of thousands of classes
    return bool(_START.match(start)) and (bool(_FIELDS.search(start)) or named)


def _find_files(root: str) -> list[str]:
    """The data sets in a folder or in its subfolders: the files, or the folder of the samples' own files."""
    listed = list_some(root)
    folders = {name.split("/")[0] for name in listed if "/" in name}
    found = []
    for folder in ("", *sorted(folders | set(_SPLITS))):
        names = [f"{folder}/{name}" if folder else name for name in (*_FILES, "metadata.json")]
        usable = (n for n in names[:2] if have_files(root, [n]) and _looks_like_fiftyone(storage.join(root, n)))
        if file := next(usable, None):
            found.append(file)
        elif have_files(root, names[2:]) and (storage.list_files(storage.join(root, folder, "samples"))):
            found.append(posixpath.join(folder, "samples"))
    return found


def _read(path: str) -> dict[str, Any]:
    """The content of a file, or of a folder with a file per sample."""
    if posixpath.basename(path) == "samples":
        return {"samples": [read_json(storage.join(path, name), _HINT) for name in storage.list_files(path)]}
    content = read_json(path, _HINT)
    if not isinstance(content.get("samples"), list) and not isinstance(content.get("labels"), dict):
        raise DataError(f"{path} has neither a list of samples nor labels by image: {_HINT}")
    return content


# --- samples.json --------------------------------------------------------------------------------------------------


def _choose_fields(
    labels: str, contents: Iterable[Mapping[str, Any]], settings: FiftyOneSettings
) -> tuple[str | None, str | None]:
    """The fields of the classes that are present and absent; (None, None) without samples."""
    samples = [sample for content in contents for sample in content.get("samples") or ()]
    names = dict.fromkeys(name for sample in samples for name, value in sample.items() if _has_classes(value))
    known = dict.fromkeys(name for sample in samples for name in sample)
    pa.array(known, pa.string())  # JSON can have text that is not valid Unicode
    chosen = (settings.field, settings.negative_field)
    if settings.field == POSITIVE_FIELD or (settings.field is None and {POSITIVE_FIELD, NEGATIVE_FIELD} & set(names)):
        chosen = (POSITIVE_FIELD, settings.negative_field or NEGATIVE_FIELD)
    elif settings.field is None and len(names) > 1:
        raise DataError(
            f"{labels!r} has several fields with classes, {', '.join(names)}: choose the true ones with fiftyone.field"
        )
    elif settings.field is None and names:
        chosen = (next(iter(names)), None)
    elif settings.field is None and samples:
        others = ", ".join([name for name in known if not name.startswith("_")][:_SHOWN])
        raise DataError(f"{labels!r} has no field with classes, only such as {others}: set labels to another data set")
    for given in (settings.field, settings.negative_field):
        if given is not None and given not in names:
            raise DataError(
                f"{labels!r} has no classes in the field {given!r}: set it to one of {', '.join(names) or 'none'}"
            )
    return chosen


def _has_classes(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("_cls") in _LISTS or value.get("_cls") in _SINGLE)


def _labels_of(value: Any) -> list[Any] | None:
    """The labels of a field's value; None if there is no value."""
    if not _has_classes(value):
        return None
    return value[_LISTS[value["_cls"]]] if value["_cls"] in _LISTS else [value]


def _add_samples(
    found: _Found, samples: Sequence[Any], folder: str, split: str, fields: tuple[str | None, str | None]
) -> None:
    files = {posixpath.join(folder, name) for name in found.files(folder)}
    for number, sample in enumerate(samples, 1):
        path = sample.get("filepath")
        kind = sample.get("_media_type", "image")
        if not isinstance(path, str) or not path or kind != "image":
            found.bad_rows.append((number, f"sample {number} is not an image: filepath {path!r}, media type {kind!r}"))
            continue
        tags = dict.fromkeys(tag for tag in sample.get("tags") or () if split_folder(f"{tag}/") == tag)
        if len(tags) > 1:
            raise DataError(f"the sample {path!r} has the tags {' and '.join(tags)}: leave it in one split")
        file = path_below(found.root, folder, path) if not path.startswith("/") else None
        positives, negatives = (_labels_of(sample.get(name)) for name in fields)
        listed = _Image(path, file if file in files else "", split or next(iter(tags), ""), positives, negatives)
        found.listed.append(listed)


# --- labels.json ---------------------------------------------------------------------------------------------------


def _add_labels(found: _Found, content: Mapping[str, Any], folder: str, split: str) -> None:
    """Images are named by their path below `data` without the suffix; labels are names or positions in `classes`."""
    classes = content.get("classes") or []
    found.classes |= dict.fromkeys(classes)
    below = posixpath.join(folder, "data")
    by_key: dict[str, list[str]] = {}
    for name in found.files(below):
        by_key.setdefault(key_of(name, "path"), []).append(name)
    for key, value in content["labels"].items():
        values = value if isinstance(value, list) else [value]
        positives = [
            classes[each] if type(each) is int and 0 <= each < len(classes) else each  # a bool is not a position
            for each in values
        ]
        named = by_key.get(key, [])
        name = named[0] if len(named) == 1 else key
        file = posixpath.join(below, name) if len(named) == 1 else ""
        found.listed.append(_Image(name, file, split, None if value is None else positives, None))
