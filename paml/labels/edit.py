"""Tables made from tables: cut, kept in part, split, merged, turned back into CSV. None changes the table it reads.

All is arithmetic on the stored arrays, O(annotations) in time and memory. An image whose last label goes stays in
the table without labels (`data.images: observed` leaves it out of training), so that only `images` decides on images.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from paml import storage
from paml.labels.build import HEADER, ranked
from paml.labels.hashing import mix
from paml.labels.settle import CONFLICT_RULES, ConflictRule, in_blocks, refuse_contradictions, settle
from paml.labels.states import LabelError
from paml.labels.table import (
    LabelTable,
    Triples,
    as_strings,
    code_type,
    hex_to_uint64,
    uint64_to_hex,
    write_table,
)

_BLOCK_ROWS = 1 << 17
_SPLIT = 0x73706C6974  # keeps these draws apart from others of the same seed


def cut(
    table: LabelTable,
    out: str,
    *,
    classes: Sequence[str] | None = None,
    images: Sequence[str] | pa.Array | None = None,
) -> LabelTable:
    """Write the part of `table` on these classes (MIDs, whose order becomes that of the indices) and these images.

    Raises LabelError for a class or an image that the table lacks or that is named twice.
    """
    rows = None if images is None else np.sort(_rows_of(table, images))
    offsets, codes = _columns(table, rows)
    mids, names = list(table.classes), list(table.names)
    if classes is not None:
        index = {mid: number for number, mid in enumerate(table.classes)}
        missing = [mid for mid in classes if mid not in index]
        if missing:
            raise LabelError(
                f"{len(missing)} of {len(classes)} classes are not in label table {table.path!r}, the first is "
                f"{missing[0]!r}: name classes of the table, such as {table.classes[0]!r}"
            )
        old = np.array([index[mid] for mid in classes], np.int64)
        new = np.full(len(mids), -1, np.int64)
        new[old] = np.arange(len(old))
        mids, names = list(classes), [table.names[number] for number in old]
        moved = 2 * new[codes >> 1] + (codes & 1)
        offsets, codes = _only(moved >= 0, offsets, moved)
        if (np.diff(old) < 0).any():
            pairs = (np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) << 32) | codes
            pairs.sort()
            codes = pairs & 0xFFFFFFFF
    return _write(table, out, rows, offsets, codes, {"cut_from": table.digest}, mids, names)


def keep(
    table: LabelTable,
    out: str,
    chosen: np.ndarray | Callable[[Triples], np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """Write the labels of `table` that are `chosen`. `metadata` (JSON values) says why, where another table is made.

    chosen: bool[num_annotations] in the order of `table.lookup(np.arange(table.num_images))`, or a function from some
    labels, whose `image` is the row in the table, to bool[m]: `lambda labels: labels.state == POSITIVE`.
    """
    offsets, codes = table.label_columns()
    if not isinstance(chosen, np.ndarray):
        parts = [np.zeros(0, bool), *(_checked(chosen(labels), len(labels.cls)) for labels in labels_of(table))]
        chosen = np.concatenate(parts)
    kept = _checked(chosen, table.num_annotations)
    return _write(table, out, None, *_only(kept, offsets, codes), metadata or {"kept_from": table.digest})


def labels_of(table: LabelTable, block_rows: int = _BLOCK_ROWS) -> Iterator[Triples]:
    """All labels of a table as Triples, some images at a time; `image` int32[m] is the row in the table."""
    for start in range(0, table.num_images, block_rows):
        found = table.lookup(np.arange(start, min(start + block_rows, table.num_images)))
        yield found._replace(image=found.image + np.int32(start))


def split(table: LabelTable, outs: Sequence[str], shares: Sequence[float], seed: int) -> list[LabelTable]:
    """Write the images of `table` to several tables, a share of them to each; shares add up to 1.

    Where an image goes depends on (seed, key) alone, so a part keeps its images as the table grows; the parts have
    their shares but for chance. Raises LabelError for other shares.
    """
    if len(outs) != len(shares) or not outs:
        raise LabelError(f"{len(shares)} shares for {len(outs)} tables: give one share a table, and at least one")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise LabelError(f"the shares are {list(shares)}, allowed are numbers of 0 or more that add up to 1")
    bounds = [min(round(share * 2**64), 2**64 - 1) for share in np.cumsum(shares)[:-1].tolist()]
    draws = np.empty(table.num_images, np.uint64)
    start = mix(np.array([(seed ^ _SPLIT) % (1 << 64)], np.uint64))
    for begin in range(0, table.num_images, _BLOCK_ROWS):
        rows = np.arange(begin, min(begin + _BLOCK_ROWS, table.num_images))
        draws[rows] = mix(table.key_hashes(rows) ^ start)
    part = np.searchsorted(np.array(bounds, np.uint64), draws, side="right")
    about = {"split_from": table.digest, "shares": list(shares), "seed": seed}
    return [
        _part(table, out, np.flatnonzero(part == number), {**about, "part": number}) for number, out in enumerate(outs)
    ]


def split_by_keys(
    table: LabelTable, parts: Mapping[str, Sequence[str] | pa.Array], rest: str | None
) -> list[LabelTable]:
    """Write the images named for each part (path of its table to keys), and those named for none to `rest`.

    Raises LabelError for a key that the table lacks, that stands twice or in two parts, and, where `rest` is None, if
    images are left over.
    """
    place = np.full(table.num_images, len(parts), np.int64)
    for number, (out, keys) in enumerate(parts.items()):
        rows = _rows_of(table, keys)
        again = rows[place[rows] < number]
        if len(again):
            first = list(parts)[int(place[again[0]])]
            raise LabelError(
                f"{len(again)} images stand in two parts, {first!r} and {out!r}, the first is "
                f"{table.keys(again[:1])[0]!r}: an image may stand in one part alone"
            )
        place[rows] = number
    left = np.flatnonzero(place == len(parts))
    if rest is None and len(left):
        raise LabelError(
            f"{len(left)} images of label table {table.path!r} stand in no part, the first is "
            f"{table.keys(left[:1])[0]!r}: name them, or say where the rest goes"
        )
    outs = [*parts, *([] if rest is None else [rest])]
    about = {"split_from": table.digest}
    return [
        _part(table, out, np.flatnonzero(place == number), {**about, "part": number}) for number, out in enumerate(outs)
    ]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did. The labels of all tables = `annotations` + `duplicates` + `contradictions`."""

    table: LabelTable
    """The merged table, opened."""
    annotations: int
    """Labels in it."""
    duplicates: int
    """Labels that another table says too."""
    contradictions: int
    """Labels that lost against another state."""
    conflicting_pairs: int
    """(image, class) pairs that were both POSITIVE and NEGATIVE."""
    conflict: str
    """The rule for such pairs."""

    def __str__(self) -> str:
        return (
            f"label table {self.table.path}: {self.table.num_images:,} images, {self.annotations:,} labels; "
            f"{self.duplicates:,} were there twice, {self.conflicting_pairs:,} pairs contradicted each other "
            f"({CONFLICT_RULES[self.conflict]})"
        )


def merge(
    tables: Sequence[LabelTable | str],
    out: str,
    *,
    conflict: ConflictRule = "negative",
    threads: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Write one table with the images, classes and labels of all. The classes keep the order of their first table.
    `metadata` (JSON values) is added to that of the merge.

    Raises LabelError for no table and, by the rule `error`, for a contradiction.
    """
    if conflict not in CONFLICT_RULES:
        raise LabelError(f"conflict is {conflict!r}, allowed are {', '.join(CONFLICT_RULES)}")
    opened = [table if isinstance(table, LabelTable) else LabelTable.open(table) for table in tables]
    if not opened:
        raise LabelError("there are no label tables to merge: name at least one")
    names: dict[str, str] = {}
    for table in opened:
        for mid, name in zip(table.classes, table.names, strict=True):
            names.setdefault(mid, name)
    index = {mid: number for number, mid in enumerate(names)}
    dtype = code_type(len(index))

    if all(table.has_hex_keys for table in opened):
        key_numbers = [table.key_column().to_numpy() for table in opened]
        all_numbers = np.sort(np.concatenate(key_numbers))
        first = np.ones(len(all_numbers), bool)
        np.not_equal(all_numbers[1:], all_numbers[:-1], out=first[1:])  # np.unique takes ten times as long
        all_numbers = all_numbers[first]
        keys: pa.Array = pa.array(all_numbers)
    else:
        texts = [_key_texts(table).cast(pa.large_string()) for table in opened]
        numbers, dictionary = ranked(pa.concat_arrays(texts))
        key_numbers = np.split(numbers, np.cumsum([table.num_images for table in opened])[:-1])
        keys, all_numbers = _stored(dictionary.cast(pa.string())), np.arange(len(dictionary), dtype=np.uint64)
    blocks = []
    for table, own in zip(opened, key_numbers, strict=True):
        new = np.array([index[mid] for mid in table.classes], np.int64)
        offsets, codes = table.label_columns()
        moved = (2 * new[codes >> 1] + (codes & 1)).astype(dtype)
        blocks += in_blocks(np.repeat(own, np.diff(offsets)), moved)
    settled = settle(blocks, conflict, threads=threads)
    if conflict == "error":
        refuse_contradictions(
            settled,
            lambda key: as_strings(_as_text(keys))[int(np.searchsorted(all_numbers, np.uint64(key)))].as_py(),
            list(index),
            "mend the tables, or set conflict to negative, positive or drop",
        )
    counts = np.zeros(len(keys), np.int64)
    counts[np.searchsorted(all_numbers, settled.keys)] = np.diff(settled.offsets)
    table = write_table(
        out,
        keys=keys,
        offsets=_offsets(counts),
        codes=settled.codes,
        classes=list(index),
        names=list(names.values()),
        metadata={
            "merged_from": [table.digest for table in opened],
            "conflict": conflict,
            "conflict_rule": CONFLICT_RULES[conflict],
            "conflicting_pairs": settled.conflicting_pairs,
            **(metadata or {}),
        },
    )
    return MergeReport(
        table=table,
        annotations=table.num_annotations,
        duplicates=len(settled.duplicates.keys),
        contradictions=len(settled.contradictions.keys),
        conflicting_pairs=settled.conflicting_pairs,
        conflict=conflict,
    )


def export_csv(table: LabelTable, out: str, *, source: str = "verification") -> None:
    """Write the labels as `ImageID,Source,LabelName,Confidence`, by key and class.

    With the class list of `export_classes`, `build_label_table` makes the same table of it, to the same digest, if
    every image has a label: an image without one has no row. Fields are quoted where a key or a MID needs it.
    """
    mids = pa.array(table.classes, pa.string())
    fields = [source, *table.classes, *([] if table.has_hex_keys else table.keys())]
    quoted = any(mark in field for field in fields for mark in ',"\r\n')
    options = pacsv.WriteOptions(include_header=False, quoting_style="all_valid" if quoted else "none")
    with storage.replacing(out) as temporary, open(temporary, "wb") as file:
        file.write((",".join(HEADER) + "\n").encode())
        for start in range(0, table.num_images, _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
            labels = table.lookup(rows)
            keys = _key_texts(table, rows)
            columns = {
                "ImageID": keys.take(pa.array(labels.image)),
                "Source": pa.array([source]).take(pa.array(np.zeros(len(labels.cls), np.int8))),
                "LabelName": mids.take(pa.array(labels.cls)),
                "Confidence": pa.array(labels.state),
            }
            pacsv.write_csv(pa.table(columns), file, options)


def export_classes(table: LabelTable, out: str) -> None:
    """Write the class list as `MID,name`, in the table's order: `classes` and `descriptions` of a build alike."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(zip(table.classes, table.names, strict=True))
    storage.write_bytes(out, text.getvalue().encode())


def _part(table: LabelTable, out: str, rows: np.ndarray, about: Mapping[str, Any]) -> LabelTable:
    return _write(table, out, rows, *_columns(table, rows), about)


def _rows_of(table: LabelTable, keys: Sequence[str] | pa.Array) -> np.ndarray:
    rows = table.rows_of(keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise LabelError(
            f"{len(missing)} of {len(rows)} keys are not in label table {table.path!r}, the first is "
            f"{as_strings(keys)[int(missing[0])].as_py()!r}: keep those for which rows_of gives 0 or more"
        )
    named = np.bincount(rows, minlength=1)
    if named.max() > 1:
        raise LabelError(f"image {table.keys([int(named.argmax())])[0]!r} is named twice: name each image once")
    return rows


def _columns(table: LabelTable, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, codes) of the images in `rows` (int64[n]; None: all)."""
    offsets, codes = table.label_columns()
    if rows is None:
        return offsets, codes
    counts = offsets[rows + 1] - offsets[rows]
    chosen = _offsets(counts)
    return chosen, codes[np.repeat(offsets[rows] - chosen[:-1], counts) + np.arange(chosen[-1])]


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _only(kept: np.ndarray, offsets: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, codes) of the labels that `kept` bool[m] marks."""
    before = np.zeros(len(kept) + 1, np.int32)
    np.cumsum(kept, dtype=np.int32, out=before[1:])
    return before[offsets], codes[kept]


def _checked(chosen: np.ndarray, count: int) -> np.ndarray:
    chosen = np.asarray(chosen)
    if chosen.dtype != np.bool_ or chosen.shape != (count,):
        raise LabelError(
            f"the choice of labels has type {chosen.dtype} and shape {chosen.shape}, allowed is bool, one of each of "
            f"the {count} labels: compare the labels' arrays, as `labels.state == POSITIVE` does"
        )
    return chosen


def _key_texts(table: LabelTable, rows: np.ndarray | None = None) -> pa.Array:
    keys = table.key_column()
    return _as_text(keys if rows is None else keys.take(pa.array(rows)))


def _as_text(keys: pa.Array) -> pa.Array:
    return uint64_to_hex(keys.to_numpy()) if pa.types.is_uint64(keys.type) else keys


def _stored(keys: pa.Array) -> pa.Array:
    """Ascending keys as a table stores them: numbers once no other key is left."""
    if pa.types.is_uint64(keys.type):
        return keys
    values, valid = hex_to_uint64(keys)
    return pa.array(values) if valid.all() else keys


def _write(
    table: LabelTable,
    out: str,
    rows: np.ndarray | None,
    offsets: np.ndarray,
    codes: np.ndarray,
    about: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> LabelTable:
    if os.path.abspath(out) == os.path.abspath(table.path):
        raise LabelError(f"label table {out!r} would be written over itself: name another file")
    keys = table.key_column()
    return write_table(
        out,
        keys=_stored(keys if rows is None else keys.take(pa.array(rows))),
        offsets=offsets,
        codes=codes,
        classes=table.classes if classes is None else classes,
        names=table.names if names is None else names,
        metadata=about,
    )
