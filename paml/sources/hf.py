"""Data sets of Hugging Face `datasets` as files: Parquet, saved Arrow folders, and image folders with metadata.

Layouts: https://huggingface.co/docs/datasets/image_dataset, and `Dataset.save_to_disk`. Read without that package.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.errors import DataError, PamlError, check_setting
from paml.parsing import PARSE_ERRORS, parse_errors_as, read_json, safe_join
from paml.sources.full import list_inputs, list_some, path_below
from paml.sources.hf_files import (
    HINT,
    DataFile,
    has_bytes,
    image_parts,
    is_embedded,
    open_file,
    path_keys,
    read_rows,
    read_schema,
    row_keys,
)
from paml.sources.hf_labels import LabelColumns, choose_columns, class_names, list_classes, read_features, read_labels
from paml.sources.parts import Part
from paml.sources.records import Records
from paml.sources.splits import file_splits
from paml.sources.table_settings import TableSettings

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".csv")
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class HFSettings:
    """The source `hf`: data sets of Hugging Face."""

    image_column: str | None = None
    """The column of images (their bytes or paths); null: the only one that has images, or a usual name (file_name)."""
    labels_column: str | None = None
    """The column of the classes of each image: names, class numbers, or lists of them; null: the only one with
    class labels or lists, or a usual name (labels, label, ...), or else all columns of true, false, 1, 0 and -1."""
    negatives_column: str | None = None
    """A column like `labels_column` with the classes that are absent, for partial labels."""
    separator: str | None = None
    """What joins the classes of a text, such as `|`; or `blank`, `json`, or `none` (a text is one class); null:
    detected if it is unambiguous. Lists of texts are not divided."""
    minus_one: str | None = None
    """What -1 means in columns or lists of states: `negative`, `unobserved` or `positive`; null: -1 is rejected. As a
    class number it always means no class."""

    def __post_init__(self) -> None:
        check_setting(self.separator != "", "hf.separator", self.separator, "a text, blank, json, none or null")
        states = ("negative", "unobserved", "positive")
        allowed = self.minus_one is None or self.minus_one in states
        check_setting(allowed, "hf.minus_one", self.minus_one, f"null, {', '.join(states)}")


def detect_hf(labels: str) -> str | None:
    """Whether a file or folder looks like a data set of Hugging Face: its names, or the schema of its first file."""
    try:
        if labels.endswith(".jsonl"):
            return "metadata.jsonl of an image folder" if posixpath.basename(labels) == _METADATA[0] else None
        if labels.endswith((".parquet", ".arrow")) and storage.exists(labels):
            schema = read_schema(labels)
            is_hf = b"huggingface" in (schema.metadata or {}) or any(is_embedded(column.type) for column in schema)
            return "a file with images or features of Hugging Face" if is_hf else None
        names = [name for name in list_some(labels) if not name.startswith(".")]
    except (PamlError, OSError, *PARSE_ERRORS):
        return None
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return "a folder saved by datasets"
    if metadata := [name for name in names if posixpath.basename(name) in _METADATA]:
        return f"an image folder with {metadata[0]}"
    files = [name for name in names if name.endswith((".parquet", ".arrow"))]
    return (
        detect_hf(storage.join(labels, files[0])) and f"{len(files):,} data files, such as {files[0]}"
        if files
        else None
    )


def read_hf(labels: str, images: str | None, settings: HFSettings) -> Records:
    """The labels of a Parquet, Arrow or metadata file, or of all such files of a folder.

    Images inside the files are `parts`. Their keys are their paths without suffix, if all have a path and they are
    distinct, else `{file}-{row}`, with rows from 0. Raises DataError for files of other shapes, columns or separators
    that are not certain, and an image with two splits.
    """
    root, names, splits, notes = _find_files(labels)
    with parse_errors_as(labels, HINT, also=(OSError, EOFError)):
        files = [open_file(storage.join(root, name)) for name in names]
        columns = choose_columns(
            labels, files[0].schema, settings.image_column, settings.labels_column, settings.negatives_column
        )
        split_column = None if any(splits) else next((n for n in columns.unused if n.lower() == "split"), None)
        columns.unused = [name for name in columns.unused if name != split_column]
        rows = [_read_rows(file, files[0], columns, split_column) for file in files]
        table = pa.concat_tables([table for table, _ in rows], promote_options="permissive")
        paths = pa.chunked_array([chunk for _, each in rows for chunk in each.chunks], pa.string()).combine_chunks()
        found = read_labels(
            labels, table, columns, TableSettings(separator=settings.separator, minus_one=settings.minus_one)
        )
        classes = list_classes(labels, columns, found)
        counts = [sum(file.counts) for file in files]
        file_of, row_of = np.repeat(np.arange(len(files)), counts), np.concatenate([np.arange(n) for n in counts])
        split_of = [splits[n] for n in file_of.tolist()]
        if split_column is not None:
            split_of = [text or "" for text in table.column(split_column).cast(pa.string()).to_pylist()]
        if any(has_bytes(file, columns.image) for file in files):
            given = _embedded(files, names, splits, columns.image, paths)
        else:
            starts = [name if posixpath.basename(name) in _METADATA else "" for name in names]
            given = _listed(labels, root, starts, file_of, paths)
        unnamed = np.flatnonzero(given.image < 0)
        keep = given.image[found.row] >= 0
        row, cls, state = found.row[keep], found.cls.filter(pa.array(keep)), found.state.filter(pa.array(keep))
        image = given.image[row]
        numbers = row_of[row] + 1
    notes += [*found.notes, *given.notes]
    if unlabeled := len(given.images) - len(np.unique(image)):
        notes.append(f"{unlabeled:,} images have no labels")
    if columns.unused:
        notes.append(f"columns that are not used: {', '.join(columns.unused[:_SHOWN])}")
    if classes is not None and not columns.names and not columns.classes:
        notes.append("classes are numbers, because the files have no names of classes")
    counts_of = Counter(state.to_pylist())
    if counts_of["-1"]:
        notes.append(f"{counts_of['-1']:,} labels are -1 and are rejected: set hf.minus_one to what it means")
    label_columns = ", ".join(map(repr, columns.read[:_SHOWN]))
    return Records(
        path=labels,
        understood=f"Hugging Face, {len(files):,} {files[0].kind} files, {len(given.images):,} images of the column "
        f"{columns.image!r}, {len(cls):,} labels ({counts_of['1']:,} positive) of {label_columns}",
        images=given.images,
        image=image,
        cls=cls.dictionary_encode(),
        state=state.dictionary_encode(),
        row=numbers,
        splits=_splits_of_images(labels, given, split_of) if any(split_of) else None,
        classes=classes,
        parts=given.parts,
        part_splits=given.part_splits if any(splits) else None,
        folder=given.folder,
        files=given.files,
        bad_rows=[(int(row_of[n]) + 1, f"no image: row {row_of[n] + 1} of {names[file_of[n]]}") for n in unnamed],
        notes=notes,
    )


def _read_rows(
    file: DataFile, first: DataFile, columns: LabelColumns, split_column: str | None
) -> tuple[pa.Table, pa.ChunkedArray]:
    """The labels and paths of a file. Raises DataError if its columns are not those of the first file."""
    wanted = [*columns.read, *([split_column] if split_column else [])]
    for name in (columns.image, *wanted):
        if name not in file.schema.names:
            raise DataError(
                f"{file.path!r} has no column {name!r}, but {first.path!r} has: set labels to files of one kind"
            )
        if class_names(read_features(file.schema).get(name)) != class_names(read_features(first.schema).get(name)):
            raise DataError(
                f"{file.path!r} and {first.path!r} have different names of classes in {name!r}: set labels to one"
            )
    return read_rows(file, wanted, columns.image)


# --- images --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Images:
    """The images that the rows name."""

    images: list[str]
    image: np.ndarray
    """int64[R], the image of each row, or -1."""
    parts: list[Part] | None = None
    part_splits: list[str] | None = None
    folder: str | None = None
    files: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def _embedded(
    files: Sequence[DataFile], names: Sequence[str], splits: Sequence[str], column: str, paths: pa.Array
) -> _Images:
    """Images inside the files: one per row."""
    keys = path_keys(paths)
    stems: list[str | None] = [None] * len(files)
    notes: list[str] = []
    if not keys.null_count and pc.call_function("count_distinct", [keys]).as_py() == len(keys):
        images = keys.to_pylist()
    else:
        short = [posixpath.basename(name) for name in names]
        stems = [name.rpartition(".")[0] for name in (short if len(set(short)) == len(short) else names)]
        images = [
            key for file, stem in zip(files, stems, strict=True) for key in row_keys(stem or "", 0, sum(file.counts))
        ]
        notes.append(f"images are named by file and row, because their paths are missing or repeat: {images[0]}")
    listed = [image_parts(file, column, stem) for file, stem in zip(files, stems, strict=True)]
    return _Images(
        images=images, image=np.arange(len(images)), notes=notes, parts=[part for parts in listed for part in parts],
        part_splits=[split for split, parts in zip(splits, listed, strict=True) for _ in parts],
    )  # fmt: skip


def _listed(labels: str, root: str, names: Sequence[str], file_of: np.ndarray, paths: pa.Array) -> _Images:
    """Images by path; rows of one path are joined. names: files in whose folders the paths start, "" for the root's."""
    folders = pa.array([f"{folder}/" if (folder := posixpath.dirname(name)) else "" for name in names], pa.string())
    texts = pc.call_function("binary_join_element_wise", [folders.take(pa.array(file_of)), paths, pa.scalar("")])
    coded = texts.dictionary_encode()
    images: list[str] = coded.dictionary.to_pylist()
    if not images:
        raise DataError(f"{labels!r} has no image: neither bytes nor paths; set hf.image_column to another column")
    start = os.path.abspath(root) + "/" if not storage.is_remote(root) else root.rstrip("/") + "/"
    files = [path_below(root, image.removeprefix(start)) or "" for image in images]
    image = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    if files[0] and storage.exists(storage.join(root, files[0])):
        return _Images(images=images, image=image, folder=root, files=files)
    note = f"the images are not in the files, nor in {root}, such as {images[0]!r}: set images to their folder"
    return _Images(images=images, image=image, notes=[note])


def _splits_of_images(labels: str, given: _Images, split_of: Sequence[str]) -> list[str]:
    """The split of each image. Raises DataError for an image with two."""
    splits: list[str | None] = [None] * len(given.images)
    for image, split in zip(given.image.tolist(), split_of, strict=True):
        if image >= 0 and (splits[image] or split) != split:
            raise DataError(
                f"{labels!r} has the image {given.images[image]!r} in {splits[image]} and {split}: remove it from one"
            )
        if image >= 0:
            splits[image] = split
    return [split or "" for split in splits]


# --- files ---------------------------------------------------------------------------------------------------------


def _find_files(labels: str) -> tuple[str, list[str], list[str], list[str]]:
    """(root, data files below it, the split of each, notes). Raises DataError."""
    if storage.exists(labels):
        if not labels.endswith((".parquet", ".arrow", ".jsonl", ".csv")):
            raise DataError(
                f"{labels!r} is not a Hugging Face data file: name a .parquet, .arrow or metadata.jsonl file"
            )
        root, name = posixpath.split(labels)
        return root or ("/" if labels.startswith("/") else "."), [name], file_splits([name]), []
    found = [name for name in list_inputs(labels) if not any(part.startswith(".") for part in name.split("/"))]
    if not found:
        raise DataError(f"there is no {labels!r}, or it is empty: set labels to an existing file or folder")
    if "dataset_dict.json" in found:
        listed = [_saved_files(labels, split) for split in _saved_splits(labels)]
        return (
            labels,
            [name for names, _ in listed for name in names],
            [split for names, split in listed for _ in names],
            [],
        )
    if "state.json" in found:
        names, split = _saved_files(labels, "")
        return labels, names, [split] * len(names), []
    metadata = [name for name in found if posixpath.basename(name) in _METADATA]
    for names in (metadata, *([n for n in found if n.endswith(suffix)] for suffix in (".parquet", ".arrow"))):
        if names:
            others = [name for name in found if name.endswith((".parquet", ".arrow", *_METADATA)) and name not in names]
            notes = [f"{len(others):,} other data files were not read, such as {others[0]}"] if others else []
            return labels, names, file_splits(names), notes
    raise DataError(
        f"{labels!r} has no .parquet or .arrow file and no {' or '.join(_METADATA)}: set labels to the folder of these"
    )


def _saved_splits(root: str) -> list[str]:
    path = storage.join(root, "dataset_dict.json")
    with parse_errors_as(path, HINT):
        splits = read_json(path, HINT)["splits"]
        for split in splits:
            safe_join(root, split)
        return list(splits)


def _saved_files(root: str, folder: str) -> tuple[list[str], str]:
    """(Arrow files below `root`, split) of a saved data set: those that its state names, since others are caches."""
    path = storage.join(root, folder, "state.json")
    if not storage.exists(path):
        raise DataError(f"there is no {path!r}, although {root!r} was saved with it: copy the folder again")
    with parse_errors_as(path, HINT):
        state = read_json(path, HINT)
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise DataError(f"{path!r} selects rows by a file of indices: save it again after flatten_indices()")
        names = [file["filename"] for file in state["_data_files"]]
        for name in names:
            safe_join(root, name)
        split = folder or state.get("_split") or ""
        return [f"{folder}/{name}" if folder else name for name in names], str(split)
