"""Scores of a model over annotated pairs: mAP, the five class groups, micro figures, and their tables.

Axes: K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paml.errors import SettingsError
from paml.metrics.average_precision import (
    Array,
    average_precision_by_class,
    check_pairs,
    micro_average_precision,
)

NUM_GROUPS = 5
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """What counts in a mean; classes without any annotated pair never do."""

    no_positives: Literal["skip", "zero"] = "skip"
    """A class with negative pairs only: left out of the means, or counted as AP 0 (as BridgeGap and IMCL do)."""
    no_negatives: Literal["keep", "skip"] = "keep"
    """A class with positive pairs only, whose AP is always 1: counted, or left out (as CSL does)."""
    group_by: Literal["annotations", "positives"] = "annotations"
    """What the five groups are ordered by: training positives + negatives, or positives alone."""
    decision_threshold: float = 0.0
    """Score from which on a pair counts as predicted positive in micro precision, recall and F1; 0 for logits is
    p = 0.5."""

    def __post_init__(self) -> None:
        allowed = {
            "no_positives": ("skip", "zero"),
            "no_negatives": ("keep", "skip"),
            "group_by": ("annotations", "positives"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise SettingsError(f"metrics.{field} is {getattr(self, field)!r}; allowed are {', '.join(values)}")
        if not np.isfinite(self.decision_threshold):
            raise SettingsError(f"metrics.decision_threshold is {self.decision_threshold}; it is a finite score")

    @property
    def convention(self) -> str:
        """The convention in words, for every report."""
        positives = {"skip": "left out", "zero": "counted as 0"}[self.no_positives]
        negatives = {"keep": "counted", "skip": "left out"}[self.no_negatives]
        by = {"annotations": "annotations (positives + negatives)", "positives": "positives"}[self.group_by]
        return (
            f"AP over annotated pairs; classes without positives {positives}, without negatives {negatives}, "
            f"without pairs left out; groups by ascending number of training {by}, ties by class index"
        )


PUBLISHED_CONVENTIONS: dict[str, MetricSettings] = {
    "bridgegap": MetricSettings(no_positives="zero", no_negatives="keep"),
    "imcl": MetricSettings(no_positives="zero", no_negatives="keep"),
    "csl": MetricSettings(no_positives="skip", no_negatives="skip"),
}
"""The settings under which a figure may stand beside one of those works' own."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All scores are fractions from 0 to 1; NaN where nothing counts."""

    map: float
    """Mean AP over the classes that count."""
    groups: dict[str, float]
    """G1 (rarest in training) to G5: mean AP over the group's classes that count; empty without training counts."""
    micro_ap: float
    """AP of all pairs taken as one class."""
    micro_precision: float
    """Share of positives among the pairs predicted positive."""
    micro_recall: float
    """Share of pairs predicted positive among the positives."""
    micro_f1: float
    per_class: np.ndarray
    """float64 [K]: AP as it counts in the means; NaN for a class that does not count."""
    positives: np.ndarray
    """int64 [K]: positive pairs."""
    negatives: np.ndarray
    """int64 [K]: negative pairs."""
    group_of: np.ndarray | None
    """int64 [K]: 1 to 5, or None without training counts."""
    train_counts: np.ndarray | None
    """int64 [K]: what the groups were ordered by."""
    convention: str

    @property
    def num_counted(self) -> int:
        """Number of classes that count in the mean."""
        return int(np.count_nonzero(~np.isnan(self.per_class)))

    def metrics(self) -> dict[str, float]:
        """The figures by their names in a journal; a score that is not defined is left out."""
        values = {
            "val/map": self.map,
            "val/micro_ap": self.micro_ap,
            "val/micro_precision": self.micro_precision,
            "val/micro_recall": self.micro_recall,
            "val/micro_f1": self.micro_f1,
            **{f"groups/{name}": value for name, value in self.groups.items()},
        }
        return {name: value for name, value in values.items() if not np.isnan(value)}


def five_groups(train_counts: Array) -> np.ndarray:
    """int64 [K]: the group, 1 (fewest) to 5 (most), of each class by its number of training labels.

    Classes are ordered by (count, class index) and cut into five runs; where 5 does not divide K, the first K mod 5
    groups hold one class more. With fewer than 5 classes the last groups are empty.
    """
    order = np.argsort(np.asarray(train_counts), kind="stable")
    groups = np.empty(len(order), np.int64)
    for number, part in enumerate(np.array_split(order, NUM_GROUPS), start=1):
        groups[part] = number
    return groups


def scores(
    cls: Array,
    score: Array,
    positive: Array,
    num_classes: int,
    *,
    settings: MetricSettings | None = None,
    train_positives: Array | None = None,
    train_negatives: Array | None = None,
) -> Scores:
    """All scores of the given pairs (see `average_precision_by_class` for their form and the errors).

    train_positives, train_negatives: int [K], numbers of training labels for the five groups (the label table's
    `class_counts`); without them there are no groups.
    """
    settings = settings or MetricSettings()
    cls, score, positive = check_pairs(cls, score, positive, num_classes)
    positives = np.bincount(cls[positive], minlength=num_classes)
    negatives = np.bincount(cls, minlength=num_classes) - positives
    per_class = average_precision_by_class(cls, score, positive, num_classes)
    if settings.no_positives == "zero":
        per_class[(positives == 0) & (negatives > 0)] = 0.0
    if settings.no_negatives == "skip":
        per_class[negatives == 0] = np.nan

    group_of = train_counts = None
    groups: dict[str, float] = {}
    if train_positives is not None:
        train_counts = np.asarray(train_positives, dtype=np.int64)
        if settings.group_by == "annotations":
            if train_negatives is None:
                raise ValueError(
                    "groups by annotations need train_negatives too: pass them or set metrics.group_by: positives"
                )
            train_counts = train_counts + np.asarray(train_negatives, dtype=np.int64)
        if train_counts.shape != (num_classes,):
            raise ValueError(f"training counts have shape {train_counts.shape}; needed is ({num_classes},)")
        group_of = five_groups(train_counts)
        groups = {f"G{g}": _mean(per_class[group_of == g]) for g in range(1, NUM_GROUPS + 1)}

    predicted = score >= np.float32(settings.decision_threshold)
    hits = int(np.count_nonzero(predicted & positive))
    num_predicted, num_positive = int(np.count_nonzero(predicted)), int(np.count_nonzero(positive))
    return Scores(
        map=_mean(per_class),
        groups=groups,
        micro_ap=micro_average_precision(score, positive),
        micro_precision=_ratio(hits, num_predicted),
        micro_recall=_ratio(hits, num_positive),
        micro_f1=_ratio(2 * hits, num_predicted + num_positive),
        per_class=per_class,
        positives=positives,
        negatives=negatives,
        group_of=group_of,
        train_counts=train_counts,
        convention=settings.convention,
    )


def write_per_class(path: str, result: Scores, mids: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Write one row a class to a Parquet file (local or s3://), in class order; the convention is in its metadata.

    Columns: class_index, mid, name, ap (null where the class does not count), counts_in_mean, positives, negatives,
    group (1 to 5), train_count; the last two are null without training counts.
    Raises ValueError where the number of MIDs or names is not the number of classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from paml import storage

    K = len(result.per_class)
    names = mids if names is None else names
    if len(mids) != K or len(names) != K:
        raise ValueError(f"scores are of {K} classes, but {len(mids)} MIDs and {len(names)} names were given")
    counted = ~np.isnan(result.per_class)
    nothing = pa.nulls(K, pa.int64())
    table = pa.table(
        {
            "class_index": pa.array(np.arange(K, dtype=np.int32)),
            "mid": pa.array(list(mids), pa.string()),
            "name": pa.array(list(names), pa.string()),
            "ap": pa.array(result.per_class, mask=~counted),
            "counts_in_mean": pa.array(counted),
            "positives": pa.array(result.positives),
            "negatives": pa.array(result.negatives),
            "group": nothing if result.group_of is None else pa.array(result.group_of),
            "train_count": nothing if result.train_counts is None else pa.array(result.train_counts),
        }
    ).replace_schema_metadata(
        {
            "schema_version": str(SCHEMA_VERSION),
            "convention": result.convention,
            "scores": json.dumps(result.metrics()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def score_table(rows: Scores | dict[str, Scores]) -> str:
    """A text table in percent, a line a model: the five groups, all classes, micro AP; the convention stands below.

    Raises ValueError for rows of different conventions, which cannot be compared.
    """
    rows = {"model": rows} if isinstance(rows, Scores) else rows
    conventions = {result.convention for result in rows.values()}
    if len(conventions) > 1:
        raise ValueError(
            "these scores follow different conventions and cannot be compared: "
            "score all with the same `metrics` settings"
        )
    columns = [f"G{g}" for g in range(1, NUM_GROUPS + 1)] if any(r.groups for r in rows.values()) else []
    header = ["", *columns, "all (mAP)", "micro AP", "classes", "pairs"]
    lines = [header]
    for name, result in rows.items():
        pairs = int(result.positives.sum() + result.negatives.sum())
        lines.append(
            [
                name,
                *(_percent(result.groups.get(group, np.nan)) for group in columns),
                _percent(result.map),
                _percent(result.micro_ap),
                f"{result.num_counted} of {len(result.per_class)}",
                str(pairs),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(len(line) for line in text))
    return "\n".join([*text, *conventions])


def _mean(values: np.ndarray) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else float("nan")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"
