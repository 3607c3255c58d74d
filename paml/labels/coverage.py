"""How much of a label table the images at hand cover, and what a score over them is worth.

A label without its image trains and tests nothing. Where half of the images are missing nothing else says so:
training runs, and the score is one of another, smaller test set.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paml import storage
from paml.labels.states import POSITIVE, LabelError
from paml.labels.table import LabelTable

_BLOCK_ROWS = 1 << 18
_LOUD_BELOW = 0.95
_NAMED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Coverage:
    """What `measure_coverage` found. Arrays have one entry a class, K in all, in the order of the table."""

    table: str
    """Path of the label table."""
    classes: tuple[str, ...]
    names: tuple[str, ...]
    images_found: int
    """Images with one label or more that are at hand."""
    images_missing: int
    """Images with one label or more that are not."""
    images_unlabelled: int
    """Images at hand of which the table observes nothing."""
    positives_found: np.ndarray
    """int64[K]; each label of a class is that of another image."""
    positives_missing: np.ndarray
    """int64[K]"""
    negatives_found: np.ndarray
    """int64[K]"""
    negatives_missing: np.ndarray
    """int64[K]"""
    expected_ap: float
    """The average precision that the standard errors assume of every class."""

    @property
    def share(self) -> float:
        """Of the labelled images, those at hand; 1 where there are none."""
        return _share(self.images_found, self.images_missing)

    @property
    def lost(self) -> np.ndarray:
        """int64[n]: the classes whose positives are all missing, those that lost the most first."""
        gone = np.flatnonzero((self.positives_found == 0) & (self.positives_missing > 0))
        return gone[np.argsort(-self.positives_missing[gone], kind="stable")]

    @property
    def scored(self) -> np.ndarray:
        """bool[K]: the classes whose average precision can be computed: one positive at hand or more."""
        return self.positives_found > 0

    @property
    def unscored(self) -> np.ndarray:
        """bool[K]: the classes that could be scored if all images were at hand, and now cannot."""
        return ~self.scored & (self.positives_missing > 0)

    @property
    def standard_error(self) -> float:
        """Of the mAP over the classes that can be scored, as a fraction: see `map_standard_error`."""
        return map_standard_error(self.positives_found, self.expected_ap)

    @property
    def standard_error_of_all(self) -> float:
        """The same if no image were missing."""
        return map_standard_error(self.positives_found + self.positives_missing, self.expected_ap)

    def __str__(self) -> str:
        labels = [int(counts.sum()) for counts in (self.positives_found, self.positives_missing)]
        negatives = [int(counts.sum()) for counts in (self.negatives_found, self.negatives_missing)]
        total = self.images_found + self.images_missing
        lines = [
            f"coverage of {self.table}: {self.images_found:,} of {total:,} labelled images found ({self.share:.1%}), "
            f"{_share(*labels):.1%} of {sum(labels):,} positives, "
            f"{_share(*negatives):.1%} of {sum(negatives):,} negatives"
        ]
        if self.images_unlabelled:
            lines.append(f"{self.images_unlabelled:,} images at hand have no label in the table")
        if self.images_missing == 0:
            return "\n".join([*lines, self._worth()])
        if self.share < _LOUD_BELOW:
            lines.insert(
                0,
                f"ATTENTION: {1 - self.share:.1%} OF THE LABELLED IMAGES ARE MISSING. The rest is another, smaller "
                "set: do not compare a score over it, or after training on it, with published ones",
            )
        lost = self.lost
        if len(lost):
            lines.append(f"{len(lost):,} classes lost all their positives: {self._some(lost)}")
        worst = self._worst()
        if len(worst):
            lines.append(f"most of their positives lost besides: {self._some(worst)}")
        return "\n".join([*lines, self._worth()])

    def _worth(self) -> str:
        scored, could = int(self.scored.sum()), int((self.scored | self.unscored).sum())
        text = f"as a test set it can score {scored:,} of {could:,} classes"
        trivial = int((self.scored & (self.negatives_found == 0)).sum())
        if trivial:
            text += f" ({trivial:,} of them have no negative, so that their AP is 1 whatever the model)"
        if scored:
            text += (
                f"; standard error of mAP {100 * self.standard_error:.2f} points, with all images "
                f"{100 * self.standard_error_of_all:.2f} (expecting an AP of {self.expected_ap:g})"
            )
        return text

    def _worst(self) -> np.ndarray:
        """The classes with positives left that miss the largest share of them, and any at all."""
        both = np.flatnonzero((self.positives_found > 0) & (self.positives_missing > 0))
        shares = self.positives_missing[both] / (self.positives_missing[both] + self.positives_found[both])
        return both[np.lexsort((-self.positives_missing[both], -shares))]

    def _some(self, classes: np.ndarray) -> str:
        named = [
            f"{self.names[c]} ({self.classes[c]}, {self.positives_missing[c]:,} of "
            f"{self.positives_missing[c] + self.positives_found[c]:,})"
            for c in classes[:_NAMED]
        ]
        return ", ".join(named) + (f" and {len(classes) - _NAMED:,} more" if len(classes) > _NAMED else "")

    def by_class(self) -> pa.Table:
        """One row a class: class, name, images, positives and negatives found and missing, scored, standard_error.

        `standard_error` is that of the class's AP, a fraction, null where it cannot be scored. The totals stand
        in the schema's metadata under `paml`, as JSON.
        """
        found, missing = self.positives_found + self.negatives_found, self.positives_missing + self.negatives_missing
        errors = np.sqrt(self.expected_ap * (1 - self.expected_ap) / np.maximum(self.positives_found, 1))
        columns: dict[str, Any] = {
            "class": pa.array(self.classes, pa.string()),
            "name": pa.array(self.names, pa.string()),
            "images_found": found,
            "images_missing": missing,
            "positives_found": self.positives_found,
            "positives_missing": self.positives_missing,
            "negatives_found": self.negatives_found,
            "negatives_missing": self.negatives_missing,
            "scored": self.scored,
            "standard_error": pa.array(errors, mask=~self.scored),
        }
        totals = {
            "table": self.table,
            "images_found": self.images_found,
            "images_missing": self.images_missing,
            "images_unlabelled": self.images_unlabelled,
            "classes_scored": int(self.scored.sum()),
            "classes_unscored": int(self.unscored.sum()),
            "map_standard_error": _json_number(self.standard_error),
            "map_standard_error_of_all": _json_number(self.standard_error_of_all),
            "expected_ap": self.expected_ap,
        }
        return pa.table(columns).replace_schema_metadata({"paml": json.dumps(totals)})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `by_class` as Parquet, to a local disk or S3. Raises StorageError."""
        with storage.replacing(os.fspath(path)) as temporary:
            pq.write_table(self.by_class(), temporary, compression="zstd")


def measure_coverage(
    table: LabelTable, keys: Sequence[str] | pa.Array | pa.ChunkedArray, *, expected_ap: float = 0.5
) -> Coverage:
    """Compare a label table with the keys of the images at hand (`Manifest.keys()`).

    expected_ap: the average precision, above 0 and below 1, that standard errors assume; 0.5 gives the largest.
    One join of the keys and one pass over the labels found: O(annotations) time, 9 bytes an image of memory.
    Raises LabelError for another expected_ap.
    """
    if not 0 < expected_ap < 1:
        raise LabelError(f"expected_ap is {expected_ap}, allowed is a number between 0 and 1: take 0.5 if unknown")
    rows = table.rows_of(keys)
    rows = rows[rows >= 0]
    found = np.zeros(table.num_images, bool)
    found[rows] = True
    unlabelled = len(keys) - int((table.label_counts(rows) > 0).sum())
    positives, negatives = (np.zeros(table.num_classes, np.int64) for _ in range(2))
    labelled = missing = 0
    for start in range(0, table.num_images, _BLOCK_ROWS):
        block = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
        has_labels = table.label_counts(block) > 0
        here = found[block]
        labelled += int((has_labels & here).sum())
        missing += int((has_labels & ~here).sum())
        triples = table.lookup(block[here])
        is_positive = triples.state == POSITIVE
        positives += np.bincount(triples.cls[is_positive], minlength=table.num_classes)
        negatives += np.bincount(triples.cls[~is_positive], minlength=table.num_classes)
    all_positives, all_negatives = table.class_counts()
    return Coverage(
        table=table.path,
        classes=table.classes,
        names=table.names,
        images_found=labelled,
        images_missing=missing,
        images_unlabelled=unlabelled,
        positives_found=positives,
        positives_missing=all_positives - positives,
        negatives_found=negatives,
        negatives_missing=all_negatives - negatives,
        expected_ap=expected_ap,
    )


def missing_keys(table: LabelTable, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> list[str]:
    """The keys of the labelled images that are not among `keys`, ascending: what another source is to be asked for."""
    rows = table.rows_of(keys)
    absent = np.ones(table.num_images, bool)
    absent[rows[rows >= 0]] = False
    chosen = np.flatnonzero(absent)
    return table.keys(chosen[table.label_counts(chosen) > 0])


def map_standard_error(positives: np.ndarray, expected_ap: float = 0.5) -> float:
    """How far chance in the choice of the test images moves mAP: one standard deviation, as a fraction.

    positives: int[K], of each class; those without any are no part of mAP. NaN where none has one.

    The AP of a class with P positives is the mean of P precisions, one at each positive. Its error is taken as the
    binomial one, sqrt(AP (1 - AP) / P), which Boyd, Eng and Page recommend ("Area under the precision-recall
    curve: point estimates and confidence intervals", ECML PKDD 2013; Hanley and McNeil's formula is for the area
    under the ROC curve). The mean over the K' classes that have positives then has the error

        sqrt(sum over classes of AP (1 - AP) / P) / K'

    with `expected_ap` for the unknown AP of every class; 0.5 gives the largest value. Where scores are normal it is
    a quarter too large rather than too small (a test draws them). It takes the classes for
    independent, while labels of one image are not, and the images at hand for a random choice of all: where those
    that have boxes, or that were not deleted, are kept, the score is one of another population, which no standard
    error covers.
    """
    having = positives[positives > 0].astype(np.float64)
    if not len(having):
        return math.nan
    return math.sqrt(float((expected_ap * (1 - expected_ap) / having).sum())) / len(having)


def _share(found: int, missing: int) -> float:
    return found / (found + missing) if found + missing else 1.0


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value
