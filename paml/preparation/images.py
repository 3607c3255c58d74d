"""Find the images of a split: listed folders and buckets, tar files, embedded images, or files by key."""

import operator
import os
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError
from paml.labels import LabelTable
from paml.labels.coverage import missing_keys
from paml.preparation.dataset import Dataset
from paml.preparation.openimages import Release
from paml.preparation.settings import PrepareSettings
from paml.preparation.tables import SplitRecords
from paml.sources.flickr import flickr_parts
from paml.sources.folder import bucket_parts, file_parts, is_image, list_folder
from paml.sources.matching import explain_missing, file_key, match_files, normalize_name
from paml.sources.parts import Part
from paml.sources.release import find_release_files, images_folder_of
from paml.sources.tars import TAR_SUFFIXES, tar_keys, tar_parts

Log = Callable[[str], None]
_TYPICAL_IMAGE_BYTES = 300_000
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """The images of a split, ready to be written."""

    parts: list[Part]
    count: int
    """How many are expected."""
    wanted: pa.StringArray | None
    """The keys to write; None: all that the parts have."""
    found: pa.StringArray | None = None
    """The keys of all images that have a file; None if that is not known without reading."""


def find_images(dataset: Dataset, settings: PrepareSettings, split: str, table: LabelTable, log: Log) -> SplitImages:
    """The images of a split. Raises DataError if there are none, or fewer of the labeled ones than min_found."""
    records = dataset.records_of(split)
    if records is not None and records.records.parts is not None:
        return _embedded(records)
    if records is not None and settings.images is None and (files := records.files) is not None:
        return _listed_by_source(records, files, table, settings)
    root = dataset.images_folder(split)
    is_release = isinstance(dataset, Release)
    if is_release and settings.images is None and images_folder_of(settings.labels, split) == root:
        place = _Place("folder", root, shared=False)
    else:
        place = _locate(root, split, records, settings, is_release=is_release)
    if place.kind == "bucket":
        found = _by_name(place, root, split, records, table)
    elif place.kind == "tars":
        found = _in_tars(place, records, table, settings)
    else:
        others = [other for name in dataset.splits if name != split and (other := dataset.records_of(name))]
        found = _in_folder(place, records, table, settings, {key for other in others for key in other.keys}, log)
    if settings.openimages.flickr and isinstance(dataset, Release):
        found = _with_flickr(found, table, settings, split)
    return found


def check_found(
    records: SplitRecords | None,
    table: LabelTable,
    available: pa.StringArray,
    minimum: float,
    split: str,
    *,
    examples: Iterable[str] | None = None,
) -> None:
    """Raise DataError if too few of the labeled images are among the `available` keys.

    examples: keys of all files, for the message, if `available` has only those that are matched.
    """
    missing = missing_keys(table, available)
    labeled = int((np.diff(table.label_columns()[0]) > 0).sum())
    count = labeled - len(missing)
    if count and count >= minimum * labeled:
        return
    names, all_keys = _named(records, table)
    examples = available.to_pylist() if examples is None else examples
    raise DataError(
        f"{count:,} of {labeled:,} labeled images of {split} have a file, at least {minimum:.0%} must (min_found): "
        + explain_missing(names, all_keys, examples)
    )


def _named(records: SplitRecords | None, table: LabelTable) -> tuple[list[str], list[str]]:
    """(names, keys) of the images that the labels name."""
    if records is None:
        return (keys := table.keys()), keys
    return records.names, records.keys


def _embedded(split: SplitRecords) -> SplitImages:
    """Images within the labels' own files; parts of other splits are not read."""
    records = split.records
    parts = list(records.parts or ())
    if records.part_splits is not None and records.splits is not None:
        theirs = {records.splits[int(row)] for row in split.rows}
        parts = [part for part, of in zip(parts, records.part_splits, strict=True) if of in theirs]
    keys = pa.array(split.keys, pa.string())
    return SplitImages(parts=parts, count=len(keys), wanted=keys, found=keys)


def _listed_by_source(
    split: SplitRecords, files: Sequence[str], table: LabelTable, settings: PrepareSettings
) -> SplitImages:
    """The files that the source names; images without one are reported as missing."""
    pairs = sorted((key, file) for key, file in zip(split.keys, files, strict=True) if file)
    found = pa.array([key for key, _ in pairs], pa.string())
    check_found(split, table, found, settings.min_found, split.records.path)
    parts = file_parts(split.records.folder or "", pairs, as_paths=True)
    return SplitImages(parts=parts, count=len(pairs), wanted=pa.array(split.keys, pa.string()), found=found)


def _by_name(place: "_Place", root: str, split: str, records: SplitRecords | None, table: LabelTable) -> SplitImages:
    """Images under the names of the labels, without listing."""
    if records is None:
        keys = table.keys()
        parts = bucket_parts(root, keys, split)
    else:
        keys, names = records.keys, map(normalize_name, records.names)
        files = [(key, name if is_image(name) else f"{name}.jpg") for key, name in zip(keys, names, strict=True)]
        parts = file_parts(place.folder, sorted(files), as_paths=False)
    return SplitImages(parts=parts, count=len(keys), wanted=pa.array(keys, pa.string()))


@dataclass(frozen=True)
class _Place:
    """Where the images of a split are."""

    kind: str
    """folder, bucket or tars."""
    folder: str
    shared: bool
    """Whether the images of other splits are there too."""
    tars: Sequence[str] = ()


def _locate(
    root: str, split: str, records: SplitRecords | None, settings: PrepareSettings, *, is_release: bool
) -> _Place:
    """One rule for folders, buckets and tar files: what is for the split, else what is there for all splits."""
    kind = settings.images_from
    divided = records is not None and records.divided
    names = [] if divided else [split]
    if records is not None and records.records.splits is not None:
        names += sorted({records.records.splits[int(row)] for row in records.rows} - {split, ""})
    own = [storage.join(root, name) for name in names]
    without_listing = is_release and settings.only_labeled and not settings.openimages.flickr
    if kind == "bucket" or (kind == "auto" and without_listing and storage.is_remote(root)):
        return _Place("bucket", storage.join(root, split), shared=False)
    if kind != "tars":
        for folder in own:
            if _has_files(folder) or settings.openimages.flickr:
                return _Place("folder", folder, shared=divided)
    listed = [storage.join(root, name) for name in storage.list_files(root)] if kind != "folder" else []
    own_output = settings.out.rstrip("/") + "/"  # it may be below the images
    tars = [path for path in listed if path.endswith(TAR_SUFFIXES) and not path.startswith(own_output)]
    for name in names:
        if matching := [tar for tar in tars if tar.rsplit("/", 1)[-1].startswith(name)]:
            return _Place("tars", root, shared=divided, tars=matching)
    if tars and not is_release and (kind == "tars" or not any(map(is_image, listed))):
        return _Place("tars", root, shared=True, tars=tars)
    if is_release or kind == "tars":
        raise DataError(
            f"no images of split {split!r}: neither a folder {storage.join(root, split)} nor files {split}*.tar in "
            f"{root}; set images to the folder that has them"
        )
    return _Place("folder", root, shared=True)


def _has_files(folder: str) -> bool:
    if storage.is_remote(folder):
        return next(iter(storage.list_objects(folder)), None) is not None
    return os.path.isdir(folder)


def _in_folder(
    place: _Place,
    records: SplitRecords | None,
    table: LabelTable,
    settings: PrepareSettings,
    of_other_splits: Set[str],
    log: Log,
) -> SplitImages:
    listing, passed_over = list_folder(place.folder)
    if passed_over:
        suffixes = ", ".join(f"{suffix} {count:,}" for suffix, count in passed_over.most_common(_SHOWN))
        log(
            f"{place.folder}: {passed_over.total():,} files are not images by their suffix and were left out: "
            f"{suffixes}. Convert images among them to JPEG"
        )
    if not listing and not settings.openimages.flickr:
        raise DataError(f"{place.folder} has no image: set images to the folder of the images")
    only_labeled = settings.only_labeled or place.shared
    sizes = dict(listing)
    if records is None:
        files = _by_key(listing, settings)
    else:
        matching = match_files(records.names, records.keys, sizes, settings.keys)
        if matching.shadowed:
            file, used = matching.shadowed[0]
            count = len(matching.shadowed)
            log(f"{count:,} files were left out, such as {file}: the labels name other files of the same key, {used}")
        files = dict(matching.files)
        taken = {*matching.files.values(), *(file for file, _ in matching.shadowed)}
        if not only_labeled:
            extra = _by_key([(name, size) for name, size in listing if name not in taken], settings)
            files |= {key: name for key, name in extra.items() if key not in of_other_splits}
    if not settings.openimages.flickr:
        examples = (file_key(name, settings.keys) for name in sizes)
        matched = pa.array(list(files), pa.string())
        check_found(records, table, matched, settings.min_found, place.folder, examples=examples)
    wanted, found = None, pa.array(list(files), pa.string())
    if only_labeled:
        wanted = pa.array(table.keys(), pa.string())
        labeled = set(wanted.to_pylist())
        files = {key: name for key, name in files.items() if key in labeled}
    pairs = sorted(files.items(), key=operator.itemgetter(1))
    parts = file_parts(place.folder, pairs, [sizes[name] for _, name in pairs])
    return SplitImages(parts=parts, count=len(pairs), wanted=wanted, found=found)


def _by_key(listing: Sequence[tuple[str, int]], settings: PrepareSettings) -> dict[str, str]:
    """The file of each key. Raises DataError if several files have a key."""
    files: dict[str, str] = {}
    for name, _ in listing:
        key = file_key(name, settings.keys)
        if files.setdefault(key, name) != name:
            fix = "set keys to 'path'" if settings.keys == "name" else "rename one"
            if os.path.splitext(normalize_name(name))[0] == os.path.splitext(normalize_name(files[key]))[0]:
                fix = "rename one"
            raise DataError(
                f"the files {files[key]!r} and {name!r} have the same key {key!r}: {fix}, or set images to the folder "
                "of the right one"
            )
    return files


def _in_tars(place: _Place, records: SplitRecords | None, table: LabelTable, settings: PrepareSettings) -> SplitImages:
    """The images of tar files; local ones are listed first, from their headers."""
    parts = tar_parts(place.tars, settings.keys)
    wanted = pa.array(table.keys(), pa.string()) if settings.only_labeled or place.shared else None
    if any(storage.is_remote(path) for path in place.tars):
        found, images = None, sum(-(-(part.bytes or 0) // _TYPICAL_IMAGE_BYTES) for part in parts)
    else:
        found = pa.array(tar_keys(place.tars, settings.keys), pa.string())
        images = len(found)
        check_found(records, table, found, settings.min_found, place.folder)
    return SplitImages(parts=parts, count=images if wanted is None else len(wanted), wanted=wanted, found=found)


def _with_flickr(found: SplitImages, table: LabelTable, settings: PrepareSettings, split: str) -> SplitImages:
    """Add the labeled images that the folder lacks, at their original addresses."""
    lacking = missing_keys(table, pa.array([], pa.string()) if found.found is None else found.found)
    if not lacking:
        return found
    image_list = find_release_files(settings.labels, split).images
    if image_list is None:
        raise DataError(
            f"{settings.labels} has no list of the images' addresses for {split!r} (V3: {split}/images.csv): download "
            "it, or leave openimages.flickr out"
        )
    parts = [*found.parts, *flickr_parts(image_list, lacking, settings.openimages.flickr_requests)]
    return SplitImages(parts=parts, count=found.count + len(lacking), wanted=found.wanted, found=None)
