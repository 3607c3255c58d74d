"""Scores of a model over annotated pairs: mAP, the five class groups, micro-averaged metrics, and their tables.

Axes: K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paml.errors import check_setting
from paml.metrics.average_precision import Array, average_precision_by_class, check_pairs
from paml.metrics.pairs import write_table

NUM_GROUPS = 5
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Which classes count in a mean; classes without any annotated pair never do."""

    no_positives: Literal["skip", "zero"] = "skip"
    """Classes with negative pairs only: left out of the means, or counted with AP 0 (as BridgeGap and IMCL do)."""

    def __post_init__(self) -> None:
        valid = self.no_positives in ("skip", "zero")
        check_setting(valid, "metrics.no_positives", self.no_positives, "skip or zero")

    @property
    def convention(self) -> str:
        """The convention, as every report states it."""
        positives = {"skip": "left out", "zero": "counted as 0"}[self.no_positives]
        return (
            f"AP over annotated pairs; classes without positives {positives}, without negatives counted, without pairs "
            "left out; groups by ascending number of training annotations (positives + negatives), ties by class index"
        )


DECISION_THRESHOLD = 0.0
"""Logit from which a pair counts as predicted positive in micro precision, recall and F1: p = 0.5."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions from 0 to 1; NaN if nothing counts."""

    map: float
    """Mean AP over the classes that count."""
    groups: dict[str, float]
    """G1 (rarest in training) to G5: mean AP over the group's classes that count; empty without training counts."""
    micro_ap: float
    """AP of all pairs as one class."""
    micro_precision: float
    """Fraction of positives among the pairs predicted positive."""
    micro_recall: float
    """Fraction of pairs predicted positive among the positives."""
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
    """int64 [K]: number of training labels that orders the groups."""
    convention: str

    @property
    def num_counted(self) -> int:
        """Number of classes that count in the mean."""
        return int(np.count_nonzero(~np.isnan(self.per_class)))

    def metrics(self) -> dict[str, float]:
        """All scores by name, without the prefix of a split such as `val/`; NaN where a score is undefined."""
        return {
            "mAP": self.map,
            "micro_AP": self.micro_ap,
            "micro_precision": self.micro_precision,
            "micro_recall": self.micro_recall,
            "micro_F1": self.micro_f1,
            **self.groups,
        }


def five_groups(train_counts: Array) -> np.ndarray:
    """int64 [K]: the group of each class by its number of training labels, 1 (fewest) to 5 (most).

    Classes are ordered by (count, class index) and divided into five parts; the first K mod 5 groups have one class
    more. With fewer than 5 classes the last groups are empty.
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
    train_counts: Array | None = None,
) -> Scores:
    """All scores of the given pairs (see `average_precision_by_class` for their format and the errors).

    train_counts: int [K], numbers of training labels, which give the five groups; without them there are no groups.
    """
    settings = settings or MetricSettings()
    cls, score, positive = check_pairs(cls, score, positive, num_classes)
    positives = np.bincount(cls[positive], minlength=num_classes)
    negatives = np.bincount(cls, minlength=num_classes) - positives
    per_class = average_precision_by_class(cls, score, positive, num_classes)
    if settings.no_positives == "zero":
        per_class[(positives == 0) & (negatives > 0)] = 0.0

    group_of = counts = None
    groups: dict[str, float] = {}
    if train_counts is not None:
        counts = np.asarray(train_counts, dtype=np.int64)
        if counts.shape != (num_classes,):
            raise ValueError(f"training counts have shape {counts.shape}; it must be ({num_classes},)")
        group_of = five_groups(counts)
        groups = {f"G{g}": _mean(per_class[group_of == g]) for g in range(1, NUM_GROUPS + 1)}

    predicted = score >= np.float32(DECISION_THRESHOLD)
    hits = int(np.count_nonzero(predicted & positive))
    num_predicted, num_positive = int(np.count_nonzero(predicted)), int(np.count_nonzero(positive))
    return Scores(
        map=_mean(per_class),
        groups=groups,
        micro_ap=float(average_precision_by_class(np.zeros_like(cls), score, positive, 1)[0]),
        micro_precision=_ratio(hits, num_predicted),
        micro_recall=_ratio(hits, num_positive),
        micro_f1=_ratio(2 * hits, num_predicted + num_positive),
        per_class=per_class,
        positives=positives,
        negatives=negatives,
        group_of=group_of,
        train_counts=counts,
        convention=settings.convention,
    )


def write_per_class(path: str, result: Scores, mids: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Write one row per class, in class order, to a Parquet file (local or s3://) with the convention in its metadata.

    Columns: class_index, mid, name, ap (null where the class does not count), counts_in_mean, positives, negatives,
    group (1 to 5), train_count; the last two are null without training counts.
    Raises ValueError if the number of MIDs or names is not the number of classes.
    """
    import pyarrow as pa

    K = len(result.per_class)
    names = mids if names is None else names
    if len(mids) != K or len(names) != K:
        raise ValueError(f"the scores have {K} classes, but there are {len(mids)} MIDs and {len(names)} names")
    counted = ~np.isnan(result.per_class)
    nulls = pa.nulls(K, pa.int64())
    columns = {
        "class_index": np.arange(K, dtype=np.int32),
        "mid": pa.array(mids, pa.string()),
        "name": pa.array(names, pa.string()),
        "ap": pa.array(result.per_class, mask=~counted),
        "counts_in_mean": counted,
        "positives": result.positives,
        "negatives": result.negatives,
        "group": nulls if result.group_of is None else result.group_of,
        "train_count": nulls if result.train_counts is None else result.train_counts,
    }
    defined = {name: value for name, value in result.metrics().items() if not np.isnan(value)}
    metadata = {"schema_version": str(SCHEMA_VERSION), "convention": result.convention, "scores": json.dumps(defined)}
    write_table(path, columns, metadata)


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of text with aligned columns, the first `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def score_table(rows: Scores | dict[str, Scores]) -> str:
    """A text table in percent, one line per model: the five groups, all classes, micro AP; then the convention.

    Raises ValueError for rows with different conventions, which cannot be compared.
    """
    rows = {"model": rows} if isinstance(rows, Scores) else rows
    conventions = {result.convention for result in rows.values()}
    if len(conventions) > 1:
        raise ValueError(
            "these scores have different conventions and cannot be compared: score all with the same `metrics` settings"
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
    text = align_columns(lines)
    text.insert(1, "-" * max(len(line) for line in text))
    return "\n".join([*text, *conventions])


def _mean(values: np.ndarray) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else float("nan")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"
