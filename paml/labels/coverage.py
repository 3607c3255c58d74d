"""How many labels of a table have an image.

A label without its image is neither trained nor tested. If half of the images are missing, training still runs, and
its score is that of another, smaller test set.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paml import storage
from paml.labels.edit import iter_labels
from paml.labels.states import POSITIVE
from paml.labels.table import LabelTable

_WARN_BELOW = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Coverage:
    """The result of `measure_coverage`."""

    table: str
    """Path of the label table."""
    images_found: int
    """Labeled images that are available."""
    images_missing: int
    """Labeled images that are not."""
    images_unlabeled: int
    """Available images without a label in the table."""
    by_class: pa.Table
    """One row per class: class, name, and the positives and negatives found and missing."""

    @property
    def found_fraction(self) -> float:
        """Available fraction of the labeled images; 1 if there are none."""
        return _fraction(self.images_found, self.images_missing)

    def __str__(self) -> str:
        counts = {name: self.by_class[name].to_numpy() for name in self.by_class.column_names[2:]}
        found, missing = counts["positives_found"], counts["positives_missing"]
        lines = []
        if self.found_fraction < _WARN_BELOW:
            lines.append(
                f"WARNING: {1 - self.found_fraction:.1%} of the labeled images are missing. The rest is a "
                "different, smaller set: do not compare scores over it, or after training on it, with published ones"
            )
        lines.append(
            f"coverage of {self.table}: {self.images_found:,} of {self.images_found + self.images_missing:,} labeled "
            f"images found ({self.found_fraction:.1%}), {_fraction(found.sum(), missing.sum()):.1%} of the positives, "
            f"{_fraction(counts['negatives_found'].sum(), counts['negatives_missing'].sum()):.1%} of the negatives; "
            f"{self.images_unlabeled:,} available images have no label"
        )
        if len(lost := np.flatnonzero((found == 0) & (missing > 0))):
            names = ", ".join(self.by_class["name"].take(pa.array(lost[:5])).to_pylist())
            lines.append(f"{len(lost):,} classes have no positive left and cannot be scored, such as {names}")
        return "\n".join(lines)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `by_class` as Parquet, local or s3://, with the totals as JSON in the schema's metadata."""
        totals = {name: value for name, value in vars(self).items() if name != "by_class"}
        rows = self.by_class.replace_schema_metadata({"paml": json.dumps(totals)})
        with storage.replacing(os.fspath(path)) as temporary:
            pq.write_table(rows, temporary, compression="zstd")


def measure_coverage(table: LabelTable, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> Coverage:
    """Compare a label table with the keys of the available images (`Manifest.keys()`).

    One join of the keys and one pass over the labels: O(annotations) time, 9 bytes of memory per image.
    """
    rows = table.rows_of(keys)
    available = np.zeros(table.num_images, bool)
    available[rows[rows >= 0]] = True
    labeled = np.diff(table.label_columns()[0]) > 0
    found = np.zeros(2 * table.num_classes, np.int64)
    for labels in iter_labels(table):
        chosen = available[labels.image]
        found += np.bincount(2 * labels.cls[chosen] + labels.state[chosen], minlength=len(found))
    positives, negatives = table.class_counts()
    by_class = {
        "class": pa.array(table.classes, pa.string()),
        "name": pa.array(table.names, pa.string()),
        "positives_found": found[POSITIVE::2],
        "positives_missing": positives - found[POSITIVE::2],
        "negatives_found": found[1 - POSITIVE :: 2],
        "negatives_missing": negatives - found[1 - POSITIVE :: 2],
    }
    return Coverage(
        table=table.path,
        images_found=int((labeled & available).sum()),
        images_missing=int((labeled & ~available).sum()),
        images_unlabeled=len(rows) - int(labeled[rows[rows >= 0]].sum()),
        by_class=pa.table(by_class),
    )


def missing_keys(table: LabelTable, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> list[str]:
    """The keys of the labeled images that are not among `keys`, ascending."""
    rows = table.rows_of(keys)
    missing = np.diff(table.label_columns()[0]) > 0
    missing[rows[rows >= 0]] = False
    return table.keys(np.flatnonzero(missing))


def _fraction(found: int, missing: int) -> float:
    return found / (found + missing) if found + missing else 1.0
