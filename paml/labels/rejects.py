"""The rejects file (Parquet): every row that did not become a label, with the kind of its fault."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paml import storage
from paml.labels.keys import as_text
from paml.labels.resolve import Labels

HEADER = ("ImageID", "Source", "LabelName", "Confidence")
"""The columns of an annotation file of Open Images."""
REJECT_KINDS = ("malformed_row", "unknown_class", "malformed_confidence", "duplicate", "contradiction")
REJECTS_SCHEMA = pa.schema(
    [
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("file", pa.string()),
        ("line", pa.int64()),
        *((name, pa.string()) for name in HEADER),
        ("text", pa.string()),
    ]
)


def rejects_path_of(table_path: str) -> str:
    """The rejects file next to the label table at `table_path`."""
    return os.path.splitext(table_path)[0] + ".rejects.parquet"


def format_counts(counts: Mapping[str, int]) -> str:
    """The kinds of rejected rows with their counts, without those of zero."""
    return ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items() if count) or "none"


def describe_source(path: str, local: str | None = None) -> dict[str, Any]:
    """Name, SHA-256 and size of a file (or of its copy `local`), for a table's metadata."""
    sha256, size = storage.sha256_of(local or path)
    return {"file": os.path.basename(path), "sha256": sha256, "bytes": size}


class RejectsWriter:
    """Writes the rejects file as rows are rejected; it replaces an older one when the `with` block succeeds."""

    def __init__(self, path: str) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RejectsWriter":
        temporary = self._stack.enter_context(storage.replacing(self._path))
        self._writer = self._stack.enter_context(pq.ParquetWriter(temporary, REJECTS_SCHEMA, compression="zstd"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, kind: str, columns: Mapping[str, pa.Array], file: str | None = None) -> None:
        """Write rows, given as some of the columns of REJECTS_SCHEMA."""
        count = len(next(iter(columns.values())))
        if count == 0:
            return
        self.counts[kind] += count
        filled = {**columns, "kind": pa.repeat(kind, count).dictionary_encode()}
        if file is not None:
            filled["file"] = pa.repeat(os.path.basename(file), count)
        arrays = [
            filled[field.name].cast(field.type) if field.name in filled else pa.nulls(count, field.type)
            for field in REJECTS_SCHEMA
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=REJECTS_SCHEMA))

    def add_labels(
        self, kind: str, stored: Callable[[np.ndarray], pa.Array], labels: Labels, classes: Sequence[str]
    ) -> None:
        """Valid rows that another row repeats or contradicts; `stored` turns their keys into stored keys."""
        columns = {
            "ImageID": as_text(stored(labels.keys)),
            "LabelName": pa.array(classes).take(pa.array(labels.codes >> 1)),
            "Confidence": pa.array(["0", "1"]).take(pa.array(labels.codes & 1)),
        }
        self.add(kind, columns)
