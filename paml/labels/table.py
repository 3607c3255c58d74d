"""The label table: the observed labels of all images, sparse, in memory or in one memory-mapped file."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.errors import LabelError
from paml.labels.hashing import hash_keys, mix64
from paml.labels.keys import (
    approximate_argsort,
    as_array,
    as_strings,
    as_text,
    check_not_empty,
    hex_to_uint64,
    sort_keys,
)
from paml.labels.resolve import ConflictRule, Labels, offsets_of, resolve, sorted_blocks
from paml.labels.states import STATE_OF_TEXT, UNOBSERVED
from paml.labels.table_file import TableContents, code_type, make_contents, open_contents, write_contents

IN_MEMORY = "<memory>"
_COUNT_BLOCK = 1 << 22


class Triples(NamedTuple):
    """Observed labels of a list of images, in the list's order and by ascending class within an image.

    image: int32[m], position in the list of rows; cls: int32[m], class index; state: int8[m], POSITIVE or NEGATIVE.
    """

    image: np.ndarray
    cls: np.ndarray
    state: np.ndarray


class LabelTable:
    """The observed labels of a set of images: `open` a file, or make one `from_arrays`, `from_frame` or `from_arrow`.

    A file is checked in full when it is opened: LabelError if it is missing, not a label table, truncated, changed, or
    of another schema version. A table of a file pickles as its path and digest, so another process maps the file
    again; a table in memory pickles with its labels.
    """

    path: str
    """The file, or `<memory>`."""
    digest: str
    """SHA-256 of the labels, classes and names."""
    classes: tuple[str, ...]
    names: tuple[str, ...]
    num_classes: int
    num_images: int
    num_annotations: int
    metadata: Mapping[str, Any]

    def __init__(self, contents: TableContents, path: str = IN_MEMORY, signature: tuple[int, ...] = ()) -> None:
        self.path = path
        self.metadata = contents.metadata
        self.digest = self.metadata["digest"]
        self.classes = tuple(self.metadata["classes"])
        self.names = tuple(self.metadata["names"])
        self.num_classes = len(self.classes)
        self.num_images = len(contents.keys)
        self.num_annotations = len(contents.codes)
        self._contents = contents
        self._keys, self._offsets, self._codes = contents.keys, contents.offsets, contents.codes
        self._signature = signature
        self._class_counts: tuple[np.ndarray, np.ndarray] | None = None

    @staticmethod
    def open(path: str | os.PathLike[str]) -> "LabelTable":
        """Map the table at `path`; one in S3 is first copied to the local cache."""
        contents, signature = open_contents(os.fspath(path))
        return LabelTable(contents, os.fspath(path), signature)

    @staticmethod
    def from_arrays(
        image_ids: Sequence[str] | pa.Array,
        class_ids: Any,
        states: Any,
        *,
        classes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        images: Sequence[str] | pa.Array | None = None,
        conflict: ConflictRule = "error",
    ) -> "LabelTable":
        """A table in memory from one entry per label: image, class and state.

        class_ids: classes as text, or integer indices into `classes`. states: 1, True or "positive" for POSITIVE;
        0, False or "negative" for NEGATIVE; leave unobserved pairs out. classes: the classes in the order of their
        indices, by default all of `class_ids`, sorted. names: display names, by default the classes. images: all
        images, to include those without a label. conflict: what to do with a pair of both states.

        Repeats of an equal label are dropped and counted in `metadata["duplicates"]`. Raises LabelError for arrays of
        different lengths, unknown classes, unknown images, other states, and, by default, for contradictions.
        """
        image_keys = as_strings(image_ids)
        check_not_empty(image_keys)
        cls, classes = _class_indices(class_ids, classes)
        state = _states_of(states)
        if not len(image_keys) == len(cls) == len(state):
            raise LabelError(
                f"{len(image_keys)} image ids, {len(cls)} class ids and {len(state)} states: give one of each per label"
            )
        images = image_keys.unique() if images is None else as_strings(images)
        position = pc.call_function("index_in", [image_keys], pc.SetLookupOptions(images))
        if position.null_count:
            unknown = image_keys.filter(position.is_null())
            raise LabelError(f"{len(unknown)} labels are of images not in `images`, such as {unknown[0].as_py()!r}")
        return _from_indices(images, position.to_numpy(), cls, state, classes, names, conflict)

    @staticmethod
    def from_arrow(
        table: Any, *, image: str = "image", cls: str = "class", state: str = "state", **options: Any
    ) -> "LabelTable":
        """A table in memory from an Arrow table (or any object with the Arrow C stream interface), a row per label.

        image, cls and state name its columns. Options and errors are those of `from_arrays`.
        """
        try:
            rows = pa.table(table)
        except pa.ArrowException as error:
            raise LabelError(f"the columns cannot be converted to Arrow ({error}): use one type per column") from error
        missing = [column for column in (image, cls, state) if column not in rows.column_names]
        if missing:
            raise LabelError(
                f"there is no column {missing[0]!r}; the columns are {', '.join(rows.column_names) or 'none'}: set "
                "image, cls and state to their names"
            )
        return LabelTable.from_arrays(rows[image], rows[cls], rows[state], **options)

    @staticmethod
    def from_frame(
        frame: Any, image: str = "image", cls: str = "class", state: str = "state", **options: Any
    ) -> "LabelTable":
        """A table in memory from a pandas or polars DataFrame, a row per label; see `from_arrow`."""
        columns = [column for column in (image, cls, state) if column in frame.columns]
        return LabelTable.from_arrow(frame[columns], image=image, cls=cls, state=state, **options)

    def write(self, path: str) -> "LabelTable":
        """Write the table to a file, local or s3://, and open that."""
        write_contents(path, self._contents)
        return LabelTable.open(path)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path == IN_MEMORY:
            return LabelTable, (self._contents,)
        return _open_unchanged, (self.path, self.digest, self._signature)

    def __repr__(self) -> str:
        positives, negatives = (int(counts.sum()) for counts in self.class_counts())
        return (
            f"LabelTable({self.path!r}: {self.num_images:,} images, {self.num_classes:,} classes, "
            f"{self.num_annotations:,} labels ({positives:,} positive, {negatives:,} negative))"
        )

    @property
    def has_hex_keys(self) -> bool:
        """Whether keys are stored as uint64 (16 lower-case hex digits)."""
        return pa.types.is_uint64(self._keys.type)

    def rows_of(self, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int64[n]: the row of each key, -1 if the table has no such image. One vectorized join."""
        wanted = as_strings(keys)
        if not self.has_hex_keys:
            rows = pc.call_function("index_in", [wanted], pc.SetLookupOptions(self._keys))
            return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        values, valid = hex_to_uint64(wanted)
        # Searching for ascending values reads the mapped keys in order, ten times faster than at random.
        order = approximate_argsort(values)
        rows = np.full(len(values), -1, np.int64)
        table_keys = self._hex_keys()
        if len(table_keys):
            position = np.minimum(np.searchsorted(table_keys, values[order]), len(table_keys) - 1)
            hit = (table_keys[position] == values[order]) & valid[order]
            rows[order[hit]] = position[hit]
        return rows

    def require_rows(self, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int64[n]: the row of each key. Raises LabelError for keys that the table does not have."""
        rows = self.rows_of(keys)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise LabelError(
                f"{len(missing)} of {len(rows)} keys are not in label table {self.path!r}, such as "
                f"{as_strings(keys)[int(missing[0])].as_py()!r}: keep only keys for which rows_of returns 0 or more"
            )
        return rows

    def states(self, image_ids: Sequence[str] | pa.Array) -> np.ndarray:
        """int8[B, K]: the dense label states of some images: POSITIVE 1, NEGATIVE 0, UNOBSERVED -1.

        Raises LabelError for images that the table does not have.
        """
        rows = self.require_rows(image_ids)
        labels = self.lookup(rows)
        states = np.full((len(rows), self.num_classes), UNOBSERVED, np.int8)
        states[labels.image, labels.cls] = labels.state
        return states

    def keys(self, rows: np.ndarray | Sequence[int] | None = None) -> list[str]:
        """The keys of `rows` (int64[n]); of all rows, in order, by default."""
        chosen = self._keys if rows is None else self._keys.take(pa.array(self._check_rows(rows)))
        return as_text(chosen).to_pylist()

    def key_column(self) -> pa.Array:
        """All keys as stored, ascending: uint64[num_images] or string[num_images]."""
        return self._keys

    def label_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int32[num_images + 1], codes uint16 or uint32[num_annotations]) as stored: 2 * class + state."""
        return self._offsets, self._codes

    def lookup(self, rows: np.ndarray | Sequence[int]) -> Triples:
        """The observed labels of `rows` (int64[n], any order, repeats allowed). Raises LabelError for other rows."""
        chosen = self._check_rows(rows)
        starts = self._offsets[chosen]
        lengths = self._offsets[chosen + 1] - starts
        image = np.repeat(np.arange(len(chosen), dtype=np.int32), lengths)
        # Entry i is read at i + shift of its image: the image's start minus the entries of the images before it.
        shift = starts - (np.cumsum(lengths, dtype=np.int32) - lengths)
        codes = self._codes[shift[image] + np.arange(len(image), dtype=np.int32)]
        return Triples(image, (codes >> 1).astype(np.int32), (codes & 1).astype(np.int8))

    def label_counts(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """int32[n]: the number of observed labels of each of `rows`."""
        chosen = self._check_rows(rows)
        return self._offsets[chosen + 1] - self._offsets[chosen]

    def key_hashes(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """uint64[n]: `paml.labels.hashing.hash_keys` of the keys of `rows`."""
        chosen = self._check_rows(rows)
        if self.has_hex_keys:
            return mix64(self._hex_keys()[chosen])
        return hash_keys(self._keys.take(pa.array(chosen)))

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(positives int64[K], negatives int64[K]): the labels of each class over all images."""
        if self._class_counts is None:
            counts = np.zeros(2 * self.num_classes, np.int64)
            # Block by block, because bincount widens its input to int64.
            for start in range(0, self.num_annotations, _COUNT_BLOCK):
                counts += np.bincount(self._codes[start : start + _COUNT_BLOCK], minlength=len(counts))
            positives, negatives = counts[1::2].copy(), counts[0::2].copy()
            positives.setflags(write=False)
            negatives.setflags(write=False)
            self._class_counts = positives, negatives
        return self._class_counts

    def _hex_keys(self) -> np.ndarray:
        return self._keys.to_numpy(zero_copy_only=True)

    def _check_rows(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1:
            raise LabelError(f"rows have shape {chosen.shape}, expected one axis: pass a flat array of row numbers")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_images):
            bad = chosen[(chosen < 0) | (chosen >= self.num_images)][0]
            raise LabelError(
                f"row {bad} is not in label table {self.path!r}, which has rows 0 to {self.num_images - 1}: drop the "
                "keys for which rows_of returns -1"
            )
        return chosen


def _open_unchanged(path: str, digest: str, signature: tuple[int, ...]) -> LabelTable:
    contents, signature = open_contents(path, signature)
    table = LabelTable(contents, path, signature)
    if table.digest != digest:
        raise LabelError(
            f"label table {path!r} has changed since it was opened (digest {table.digest[:16]}…, expected "
            f"{digest[:16]}…): start the job again"
        )
    return table


def _class_indices(class_ids: Any, classes: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """(integer[m] indices, classes). Raises LabelError for a class or an index that is not among `classes`."""
    column = as_array(class_ids)
    if pa.types.is_integer(column.type) and classes is not None:
        return _check_indices(np.asarray(column), len(classes), "class"), list(classes)
    texts = as_strings(column)
    known = sorted(set(texts.unique().to_pylist()) - {None, ""}) if classes is None else list(classes)
    found = pc.call_function("index_in", [texts], pc.SetLookupOptions(pa.array(known, pa.string())))
    if found.null_count:
        unknown = texts.filter(found.is_null())
        raise LabelError(
            f"{len(unknown)} labels are of unknown classes, such as {unknown[0].as_py()!r}; the classes are such as "
            f"{known[0] if known else 'none'!r}: add them to `classes`, or leave these labels out"
        )
    return found.to_numpy().astype(np.int64), known


def _states_of(states: Any) -> np.ndarray:
    """int64[m] of POSITIVE and NEGATIVE. Raises LabelError for other values."""
    if isinstance(states, list | tuple):  # Arrow does not mix bool with other numbers
        states = [None if state is None else str(state) for state in states]
    coded = as_array(states).dictionary_encode()
    texts = as_strings(coded.dictionary)
    codes = [STATE_OF_TEXT.get((text or "").lower()) for text in texts.to_pylist()]
    if coded.null_count or None in codes:
        bad = None if coded.null_count else texts[codes.index(None)].as_py()
        raise LabelError(f"state {bad!r} is unknown: use 1 or positive, 0 or negative, and leave unobserved pairs out")
    return np.array(codes, np.int64)[coded.indices.to_numpy()] if codes else np.zeros(0, np.int64)


def _from_indices(
    images: Any,
    image: np.ndarray,
    cls: np.ndarray,
    state: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str] | None,
    conflict: ConflictRule,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """A table in memory from one entry per label; `image` int[m] is an index into `images`."""
    keys, order = sort_keys(images)
    row_of = np.empty(len(order), np.uint64)
    row_of[order] = np.arange(len(order))
    codes = (2 * cls.astype(np.int64) + state).astype(code_type(len(classes)))
    blocks = list(sorted_blocks(row_of[image.astype(np.int64)], codes))
    return table_from_blocks(keys, blocks, classes, classes if names is None else names, conflict, metadata)


def table_from_blocks(
    keys: pa.Array,
    blocks: list[Labels],
    classes: Sequence[str],
    names: Sequence[str],
    conflict: ConflictRule,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """A table in memory. keys: as stored, ascending; blocks: labels by row of `keys`, each ascending. Empties the list.

    metadata: JSON values, added to the rule and the counts of duplicates and contradictions.
    """
    resolved = resolve(blocks, conflict, lambda rows: keys.take(pa.array(rows)), classes)
    counts = np.zeros(len(keys), np.int64)
    counts[resolved.keys.astype(np.int64)] = np.diff(resolved.offsets)
    about = {
        "conflict": conflict,
        "conflicting_pairs": resolved.conflicting_pairs,
        "duplicates": len(resolved.duplicates.keys),
        "contradictions": len(resolved.contradictions.keys),
        **(metadata or {}),
    }
    return LabelTable(make_contents(keys, offsets_of(counts), resolved.codes, classes, names, about))


def table_from_triples(
    keys: Sequence[str] | pa.Array,
    classes: Sequence[str],
    names: Sequence[str] | None,
    image: np.ndarray | Sequence[int],
    cls: np.ndarray | Sequence[int],
    state: np.ndarray | Sequence[int],
    out: str,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """Write a table from index arrays and open it.

    keys: one per image, in any order, no repeats (an image may have no labels); names: None uses the classes;
    image int[m] (index into `keys`), cls int[m] (index into `classes`), state [m] (as in `LabelTable.from_arrays`), in
    any order. Repeats of an equal label are dropped. Raises LabelError for an index out of range, another state, a
    contradiction or a duplicate key.
    """
    image, cls = (
        _check_indices(np.asarray(values), limit, what)
        for values, limit, what in ((image, len(keys), "image"), (cls, len(classes), "class"))
    )
    state = _states_of(state)
    if not image.shape == cls.shape == state.shape or image.ndim != 1:
        raise LabelError(
            f"image, cls and state have shapes {image.shape}, {cls.shape} and {state.shape}: give one of each per label"
        )
    return _from_indices(keys, image, cls, state, classes, names, "error", metadata).write(out)


def _check_indices(indices: np.ndarray, count: int, what: str) -> np.ndarray:
    if len(bad := indices[(indices < 0) | (indices >= count)]):
        raise LabelError(f"{what} index {bad[0]} is out of range: there are {count}, counted from 0")
    return indices
