"""The file of a label table: an Arrow IPC file of one record batch with a row per image, sorted by key.

- `key`: uint64 if every key is 16 lower-case hex digits (as ImageIDs are), else string;
- `labels`: list of `2 * class + (1 if positive else 0)`, ascending (uint16, or uint32 above 32,768 classes).

The lists are contiguous with int32 offsets, so a look-up is arithmetic on three flat arrays, which all processes that
map the file share. Classes, names, digest and the digests of the sources are JSON in the schema's metadata.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.checksum import read_with_checksum, write_with_checksum
from paml.errors import LabelError
from paml.parsing import parse_json_object

SCHEMA_VERSION = 1
_METADATA_KEY = b"paml"
_KIND = "label_table"
_MAX_LABELS = 2**31 - 1


@dataclass(frozen=True)
class TableContents:
    """The content of a table, in memory or mapped from its file."""

    keys: pa.Array
    """uint64[n] or string[n], ascending, no repeats."""
    offsets: np.ndarray
    """int32[n + 1]"""
    codes: np.ndarray
    """uint16[m] or uint32[m]: 2 * class + state."""
    metadata: Mapping[str, Any]
    """Includes `classes`, `names` and `digest`."""


def make_contents(
    keys: pa.Array,
    offsets: np.ndarray,
    codes: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    metadata: Mapping[str, Any],
) -> TableContents:
    """The contents of a new table from sorted arrays. Raises LabelError for bad classes and for too many labels."""
    check_classes(classes, names)
    if len(codes) > _MAX_LABELS:
        raise LabelError(f"{len(codes):,} labels, a table holds at most {_MAX_LABELS:,}: split the images in two")
    codes = codes.astype(code_type(len(classes)), copy=False)
    offsets = offsets.astype(np.int32, copy=False)
    metadata = {
        **metadata,
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "classes": list(classes),
        "names": list(names),
        "num_images": len(keys),
        "num_annotations": len(codes),
        "digest": _digest(classes, names, keys, offsets, codes),
    }
    return TableContents(keys, offsets, codes, metadata)


def write_contents(out: str, contents: TableContents) -> None:
    """Write a table's file atomically."""
    lists = pa.ListArray.from_arrays(pa.array(contents.offsets), pa.array(contents.codes))
    schema = pa.schema(
        [pa.field("key", contents.keys.type, nullable=False), pa.field("labels", lists.type, nullable=False)],
        metadata={_METADATA_KEY: json.dumps(contents.metadata)},
    )
    write_with_checksum(out, pa.RecordBatch.from_arrays([contents.keys, lists], schema=schema))


def open_contents(path: str, signature: tuple[int, ...] = ()) -> tuple[TableContents, tuple[int, ...]]:
    """Map the table at `path`; returns its contents and the file's signature. See `read_with_checksum`."""

    def parse(batch: pa.RecordBatch, check: bool) -> TableContents:
        metadata = _metadata_of(path, batch.schema.metadata or {})
        if check:
            _check_contents(batch, metadata)
        lists = batch.column("labels")
        offsets, codes = (column.to_numpy(zero_copy_only=True) for column in (lists.offsets, lists.values))
        return TableContents(batch.column("key"), offsets, codes, metadata)

    def damaged(error: Exception) -> LabelError:
        problem = "is not a complete Arrow file, or damaged" if isinstance(error, pa.ArrowInvalid) else "is damaged"
        return LabelError(f"label table {path!r} {problem} ({error}): build or copy it again")

    try:
        return read_with_checksum(path, signature, functools.partial(_metadata_of, path), parse, damaged)
    except FileNotFoundError:
        raise LabelError(f"there is no label table {path!r}: name an existing file") from None


def code_type(num_classes: int) -> np.dtype:
    """The type of a table's codes: uint16 up to 32,768 classes, else uint32."""
    return np.dtype(np.uint16 if 2 * num_classes <= 1 << 16 else np.uint32)


def check_classes(classes: Sequence[str], names: Sequence[str]) -> None:
    """Raise LabelError if there are no classes, one repeats, or names and classes differ in number."""
    if not classes:
        raise LabelError("there are no classes: name at least one")
    if len(set(classes)) != len(classes):
        repeated = next(cls for cls, count in Counter(classes).items() if count > 1)
        raise LabelError(f"class {repeated!r} is a duplicate: list each class once")
    if len(names) != len(classes):
        raise LabelError(f"{len(names)} names for {len(classes)} classes: give one name per class")


def _check_contents(batch: pa.RecordBatch, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError or ArrowInvalid for values out of bounds: a checksum detects damage, not a forged file.

    Look-ups use offsets and codes as memory addresses without further checks.
    """
    classes, names = metadata["classes"], metadata["names"]
    if not all(isinstance(text, str) for text in [*classes, *names, metadata["digest"]]):
        raise ValueError("a class, a name or the digest is not text")
    if not 0 < len(classes) == len(set(classes)) == len(names):
        raise ValueError("it has no classes, repeated ones, or another number of names")
    lists = batch.column("labels")
    key_type, list_type = batch.schema.field("key").type, lists.type
    if key_type not in (pa.uint64(), pa.string()) or list_type.value_type not in (pa.uint16(), pa.uint32()):
        raise ValueError(f"its columns are {', '.join(map(str, batch.schema))}")
    batch.validate(full=True)
    if any(column.null_count for column in (*batch.columns, lists.values)):
        raise ValueError("it has nulls")
    highest = pc.call_function("max", [lists.values]).as_py()
    if highest is not None and highest >= 2 * len(classes):
        raise ValueError(f"it has the code {highest} and {len(classes)} classes")
    bounds = (lists.offsets[0].as_py(), lists.offsets[-1].as_py()) if batch.num_rows else (0, 0)
    counts = (batch.num_rows, len(lists.values), *bounds)
    expected = (metadata["num_images"], metadata["num_annotations"], 0, metadata["num_annotations"])
    if counts != expected:
        raise ValueError(f"it has (images, labels, first and last offset) {counts}, its metadata {expected}")


def _metadata_of(path: str, schema_metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Raises LabelError for another kind of file or another schema version."""
    raw = schema_metadata.get(_METADATA_KEY)
    metadata = parse_json_object(raw) if raw else {}
    if metadata.get("kind") != _KIND:
        raise LabelError(f"{path!r} is an Arrow file but not a label table: pass the file that build_label_table wrote")
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LabelError(
            f"label table {path!r} has schema version {version}, this paml reads version {SCHEMA_VERSION}: build the "
            "table again, or use the paml that wrote it"
        )
    return metadata


def _digest(
    classes: Sequence[str], names: Sequence[str], keys: pa.Array, offsets: np.ndarray, codes: np.ndarray
) -> str:
    """SHA-256 of the labels themselves: equal labels have equal digests, whatever made the table."""
    digest = hashlib.sha256(json.dumps([list(classes), list(names), str(keys.type), str(codes.dtype)]).encode())
    for buffer in keys.buffers()[1:]:
        if buffer is not None:
            digest.update(buffer)
    digest.update(np.ascontiguousarray(offsets).data)
    digest.update(np.ascontiguousarray(codes).data)
    return digest.hexdigest()
