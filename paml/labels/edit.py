"""Make tables from tables: filter, split, merge, and export to CSV. No function changes the table that it reads.

All work is arithmetic on the stored arrays, O(annotations) in time and memory. An image whose last label is removed
stays in the table without labels (`data.images: observed` excludes it from training).
"""

import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from paml import storage
from paml.errors import LabelError
from paml.labels.class_list import write_class_list
from paml.labels.hashing import mix64
from paml.labels.keys import as_stored, as_text, rank_texts
from paml.labels.rejects import HEADER
from paml.labels.resolve import ConflictRule, offsets_of, sorted_blocks
from paml.labels.table import LabelTable, Triples, table_from_blocks
from paml.labels.table_file import code_type, make_contents

_BLOCK_ROWS = 1 << 17
_SPLIT_SALT = 0x73706C6974  # makes these samples independent of others with the same seed


def filter_table(
    table: LabelTable,
    out: str,
    *,
    classes: Sequence[str] | None = None,
    images: Sequence[str] | pa.Array | None = None,
) -> LabelTable:
    """Write the part of `table` with these classes, in this order, and these images.

    Raises LabelError for a class or an image that the table does not have or that is listed twice.
    """
    check_outputs([out], [table.path])
    rows = None
    if images is not None:
        rows = np.sort(table.require_rows(images))
        if len(repeated := rows[1:][rows[1:] == rows[:-1]]):
            raise LabelError(f"image {table.keys(repeated[:1])[0]!r} is listed twice: list each image once")
    offsets, codes = _columns_of(table, rows)
    names = list(table.names)
    if classes is not None:
        index = {cls: number for number, cls in enumerate(table.classes)}
        missing = [cls for cls in classes if cls not in index]
        if missing:
            raise LabelError(
                f"{len(missing)} of {len(classes)} classes are not in label table {table.path!r}, such as "
                f"{missing[0]!r}: use classes of the table, such as {table.classes[0]!r}"
            )
        old_of_new = np.array([index[cls] for cls in classes], np.int64)
        new_of_old = np.full(table.num_classes, -1, np.int64)
        new_of_old[old_of_new] = np.arange(len(old_of_new))
        names = [table.names[number] for number in old_of_new]
        new_codes = 2 * new_of_old[codes >> 1] + (codes & 1)
        offsets, codes = _select_labels(new_codes >= 0, offsets, new_codes)
        if (np.diff(old_of_new) < 0).any():
            pairs = (np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) << 32) | codes
            pairs.sort()
            codes = pairs & 0xFFFFFFFF
    return _write(table, out, rows, offsets, codes, {"filtered_from": table.digest}, classes, names)


def filter_labels(
    table: LabelTable,
    out: str | None,
    chosen: Callable[[Triples], np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """Write the `chosen` labels of `table`, or, if `out` is None, return a table of them in memory.

    chosen: a function from some labels, whose `image` is the row in the table, to bool[m]:
    `lambda labels: labels.state == POSITIVE`. metadata: JSON values, instead of the digest of `table`.
    """
    if out is not None:
        check_outputs([out], [table.path])
    mask = np.concatenate(
        [np.zeros(0, bool), *(_check_mask(chosen(part), len(part.cls)) for part in iter_labels(table))]
    )
    labels = _select_labels(mask, *table.label_columns())
    return _write(table, out, None, *labels, metadata or {"filtered_from": table.digest})


def iter_labels(table: LabelTable) -> Iterator[Triples]:
    """All labels of a table, some images at a time; `image` int32[m] is the row in the table."""
    for start in range(0, table.num_images, _BLOCK_ROWS):
        labels = table.lookup(np.arange(start, min(start + _BLOCK_ROWS, table.num_images)))
        yield labels._replace(image=labels.image + np.int32(start))


def split(table: LabelTable, outs: Sequence[str], fractions: Sequence[float], seed: int) -> list[LabelTable]:
    """Write the images of `table` to several tables, a fraction of them to each; fractions add up to 1.

    The part of an image depends on (seed, key) only, so a part keeps its images as the table grows. The sizes match
    the fractions up to chance. Raises LabelError for other fractions.
    """
    if len(outs) != len(fractions):
        raise LabelError(f"{len(fractions)} fractions for {len(outs)} tables: give one fraction per table")
    check_fractions(fractions)
    check_outputs(outs, [table.path])
    bounds = [min(round(fraction * 2**64), 2**64 - 1) for fraction in np.cumsum(fractions)[:-1].tolist()]
    hashes = np.empty(table.num_images, np.uint64)
    seed_hash = mix64((seed ^ _SPLIT_SALT) % (1 << 64))
    for start in range(0, table.num_images, _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
        hashes[rows] = mix64(table.key_hashes(rows) ^ seed_hash)
    part = np.searchsorted(np.array(bounds, np.uint64), hashes, side="right")
    tables = []
    for number, out in enumerate(outs):
        rows = np.flatnonzero(part == number)
        metadata = {"split_from": table.digest, "fractions": list(fractions), "seed": seed, "part": number}
        tables.append(_write(table, out, rows, *_columns_of(table, rows), metadata))
    return tables


def merge(
    tables: Sequence[LabelTable | str],
    out: str,
    *,
    conflict: ConflictRule = "negative",
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """Write one table with the images, classes and labels of all. Classes are in the order of their first table.

    Its metadata has the counts of `duplicates` (labels that another table has too), `contradictions` (labels overruled
    by another state) and `conflicting_pairs`, and `metadata` (JSON values). Raises LabelError for no table and, by the
    rule `error`, for a contradiction.
    """
    opened = [table if isinstance(table, LabelTable) else LabelTable.open(table) for table in tables]
    if not opened:
        raise LabelError("there are no label tables to merge: name at least one")
    check_outputs([out], [table.path for table in opened])
    names: dict[str, str] = {}
    for table in opened:
        for cls, name in zip(table.classes, table.names, strict=True):
            names.setdefault(cls, name)
    index = {cls: number for number, cls in enumerate(names)}
    keys, rows_of_tables = _merged_keys(opened)
    blocks = []
    for table, rows in zip(opened, rows_of_tables, strict=True):
        new_of_old = np.array([index[cls] for cls in table.classes], np.int64)
        offsets, codes = table.label_columns()
        new_codes = (2 * new_of_old[codes >> 1] + (codes & 1)).astype(code_type(len(names)))
        blocks += sorted_blocks(np.repeat(rows, np.diff(offsets)), new_codes)
    about = {"merged_from": [table.digest for table in opened], **(metadata or {})}
    return table_from_blocks(keys, blocks, list(names), list(names.values()), conflict, about).write(out)


def _merged_keys(tables: Sequence[LabelTable]) -> tuple[pa.Array, list[np.ndarray]]:
    """(stored keys of the merged table, the rows uint64[n] in it of each table's keys)."""
    if all(table.has_hex_keys for table in tables):
        parts = [table.key_column().to_numpy() for table in tables]
        keys = np.sort(np.concatenate(parts))
        is_first = np.ones(len(keys), bool)
        np.not_equal(keys[1:], keys[:-1], out=is_first[1:])  # np.unique takes ten times as long
        keys = keys[is_first]
        return pa.array(keys), [np.searchsorted(keys, part).astype(np.uint64) for part in parts]
    texts = [as_text(table.key_column()).cast(pa.large_string()) for table in tables]
    rows, distinct = rank_texts(pa.concat_arrays(texts))
    return distinct.cast(pa.string()), np.split(rows, np.cumsum([table.num_images for table in tables])[:-1])


def export_csv(table: LabelTable, out: str) -> None:
    """Write the labels as `ImageID,Source,LabelName,Confidence`, by key and class.

    With the class list of `export_classes`, `build_label_table` makes a table of the same digest from it, if every
    image has a label: an image without one has no row. Fields are quoted if a key or a class needs it.
    """
    check_outputs([out], [table.path])
    classes = pa.array(table.classes, pa.string())
    fields = [*table.classes, *([] if table.has_hex_keys else table.keys())]
    quoted = any(mark in field for field in fields for mark in ',"\r\n')
    options = pacsv.WriteOptions(include_header=False, quoting_style="all_valid" if quoted else "none")
    with storage.replacing(out) as temporary, open(temporary, "wb") as file:
        file.write((",".join(HEADER) + "\n").encode())
        for start in range(0, table.num_images, _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
            labels = table.lookup(rows)
            columns = {
                "ImageID": as_text(table.key_column().take(pa.array(rows))).take(pa.array(labels.image)),
                "Source": pa.repeat("verification", len(labels.cls)),
                "LabelName": classes.take(pa.array(labels.cls)),
                "Confidence": pa.array(labels.state),
            }
            pacsv.write_csv(pa.table(columns), file, options)


def export_classes(table: LabelTable, out: str) -> None:
    """Write the class list as `MID,name` in the table's order; see `write_class_list`."""
    check_outputs([out], [table.path])
    write_class_list(out, table.classes, table.names)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise LabelError unless the fractions are 0 or more and add up to 1."""
    if not fractions or not min(fractions) >= 0 or not abs(sum(fractions) - 1) <= 1e-9:  # false for NaN
        raise LabelError(f"the fractions are {list(fractions)}, allowed are numbers of 0 or more that add up to 1")


def check_outputs(outputs: Sequence[str], inputs: Sequence[str]) -> None:
    """Raise LabelError for an output that is a folder, an input, or the same file as an earlier output.

    Files are compared, not names: a relative path, a link and an s3:// URL with an extra slash are the same file.
    """
    input_of = {_file_identity(path): path for path in reversed(inputs)}
    output_of: dict[object, str] = {}
    for path in outputs:
        if _is_folder(path):
            raise LabelError(f"the output {path!r} is a folder: name a file, such as {posixpath.join(path, 'out')!r}")
        identity = _file_identity(path)
        if identity in input_of:
            same = "" if path == input_of[identity] else f", which is the same file as {path!r}"
            raise LabelError(f"this would overwrite the input {input_of[identity]!r}{same}: name another output")
        if identity in output_of:
            raise LabelError(f"the outputs {output_of[identity]!r} and {path!r} are the same file: name two files")
        output_of[identity] = path


def _is_folder(path: str) -> bool:
    if storage.is_remote(path):
        return path.endswith("/") or path.count("/") < 3  # s3://bucket
    return not os.path.basename(path) or os.path.isdir(path)


def _file_identity(path: str) -> object:
    """A value that is equal for two names of one file, whether the file exists or not."""
    if storage.is_remote(path):
        return posixpath.normpath(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _columns_of(table: LabelTable, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, codes) of the images in `rows` (int64[n]; None: all)."""
    offsets, codes = table.label_columns()
    if rows is None:
        return offsets, codes
    counts = offsets[rows + 1] - offsets[rows]
    new_offsets = offsets_of(counts)
    return new_offsets, codes[np.repeat(offsets[rows] - new_offsets[:-1], counts) + np.arange(new_offsets[-1])]


def _select_labels(mask: np.ndarray, offsets: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, codes) of the labels in bool[m] `mask`."""
    before = np.zeros(len(mask) + 1, np.int32)
    np.cumsum(mask, dtype=np.int32, out=before[1:])
    return before[offsets], codes[mask]


def _check_mask(mask: np.ndarray, count: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != (count,):
        raise LabelError(
            f"the mask of labels has type {mask.dtype} and shape {mask.shape}, expected bool and ({count},): compare "
            "the labels' arrays, such as `labels.state == POSITIVE`"
        )
    return mask


def _write(
    table: LabelTable,
    out: str | None,
    rows: np.ndarray | None,
    offsets: np.ndarray,
    codes: np.ndarray,
    metadata: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> LabelTable:
    keys = table.key_column()
    contents = make_contents(
        as_stored(keys if rows is None else keys.take(pa.array(rows))),
        offsets,
        codes,
        table.classes if classes is None else classes,
        table.names if names is None else names,
        metadata,
    )
    new_table = LabelTable(contents)
    return new_table if out is None else new_table.write(out)
