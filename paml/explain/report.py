"""Results of the analysis of maps: metrics of every label in Parquet, and a summary as text."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from paml import storage
from paml.explain.measures import CONVENTION
from paml.labels.states import NEGATIVE, POSITIVE
from paml.metrics.scores import align_columns
from paml.training.data import Split

SCHEMA_VERSION = 1
MAP_KINDS = ("raw", "boosted")
STATES = {"positive": POSITIVE, "negative": NEGATIVE}
SIMILARITIES = ("spearman", "mean_absolute_difference", "concordance")
"""Metrics that compare a run with the reference."""
BOX_METRICS = ("pointing_hit", "box_iou")
METRICS = ("logit", "top", "bottom", "control", *SIMILARITIES, *BOX_METRICS)
"""All metrics of a map; `control` is the similarity of the reference's map to a centered Gaussian."""


@dataclasses.dataclass(frozen=True)
class MapMetrics:
    """Metrics of the maps of m labels by R runs; the others are compared with the first, the reference."""

    titles: tuple[str, ...]
    checkpoints: tuple[str, ...]
    alphas: tuple[float, ...]
    index: np.ndarray
    """int64 [m], the image's position in the manifest."""
    cls: np.ndarray
    """int32 [m]."""
    state: np.ndarray
    """int8 [m], POSITIVE or NEGATIVE."""
    values: np.ndarray
    """float64 [R, 2, F, m]: by run, raw or boosted, metric, label."""

    def metric(self, name: str) -> np.ndarray:
        """float64 [R, 2, m]; NaN if the metric is undefined or does not apply."""
        return self.values[:, :, METRICS.index(name)]

    @property
    def has_box(self) -> np.ndarray:
        """bool [m], whether a box of the label is known."""
        return ~np.isnan(self.metric("box_iou")[0, 0])

    def boost_matters(self, run: int) -> bool:
        """Whether comparing boosted maps with the reference can differ from comparing raw maps."""
        return self.alphas[run] != 1 or self.alphas[0] != 1

    def applies(self, name: str, run: int) -> np.ndarray:
        """bool [m]: the labels to which a metric of a run applies; NaN there means undefined (a constant map)."""
        if name in BOX_METRICS:
            return self.has_box
        left_out = name in SIMILARITIES if run == 0 else name == "control"
        return np.full(len(self.cls), not left_out)


def write_metrics(metrics: MapMetrics, split: Split, settings: Any, path: str) -> None:
    """Write one row per (image, class, run, raw or boosted) to a Parquet file, local or remote.

    Columns: key, mid, state (positive or negative), run, map (raw or boosted), and METRICS. A metric that does not
    apply is null (similarities of the reference, `control` of the others, box metrics of labels without a box); an
    undefined one is NaN. Metadata `paml`: schema_version, runs, settings, digests and convention.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {"title": title, "checkpoint": checkpoint, "alpha": alpha}
            for title, checkpoint, alpha in zip(metrics.titles, metrics.checkpoints, metrics.alphas, strict=True)
        ],
        "reference": metrics.titles[0],
        "settings": dataclasses.asdict(settings),
        "labels": split.table.digest,
        "images": split.manifest.digest,
        "convention": CONVENTION,
    }

    def encode(codes: np.ndarray, texts: Sequence[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(texts, pa.string()))

    images, image_codes = np.unique(metrics.index, return_inverse=True)
    labels = {
        "key": encode(image_codes, [split.manifest.key(int(image)) for image in images]),
        "mid": encode(metrics.cls, split.table.classes),
        "state": encode(np.where(metrics.state == POSITIVE, 0, 1), ["positive", "negative"]),
    }
    constant, tables = np.zeros(len(metrics.cls), np.int32), []
    for (run, title), (kind, kind_name) in itertools.product(enumerate(metrics.titles), enumerate(MAP_KINDS)):
        columns = labels | {"run": encode(constant, [title]), "map": encode(constant, [kind_name])}
        for name in METRICS:
            values = metrics.metric(name)[run, kind]
            values = values == 1 if name == "pointing_hit" else values
            columns[name] = pa.array(values, mask=~metrics.applies(name, run), from_pandas=False)
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables).replace_schema_metadata({"paml": json.dumps(metadata)})
    with storage.replacing(path) as local:
        pq.write_table(table, local, compression="zstd")


def summary_text(metrics: MapMetrics) -> str:
    """A table for each state: medians with quartiles, and means of box metrics, of the labels where they are defined.

    Each run has a row for raw maps, and one for maps boosted by its alpha if they can differ.
    """
    lines = []
    for state, code in STATES.items():
        labels = metrics.state == code
        if not labels.any():
            continue
        images = len(np.unique(metrics.index[labels]))
        counts = f"{labels.sum():,} {state} labels in {images:,} images"
        lines += ["", f"{counts}; median [quartiles], compared with {metrics.titles[0]}"]
        with_boxes = bool((labels & metrics.has_box).any())
        header = ["run", "map", "Spearman", "top 5 %", "bottom 5 %", "|difference|", "concordance", "undefined"]
        table = [header + (["pointing, %", "box IoU, mean"] if with_boxes else [])]

        def values_of(name: str, run: int, kind: int, labels: np.ndarray = labels) -> np.ndarray:
            return metrics.metric(name)[run, kind, labels & metrics.applies(name, run)]

        for run, title in enumerate(metrics.titles):
            for kind, kind_name in enumerate(MAP_KINDS if metrics.boost_matters(run) else MAP_KINDS[:1]):
                row = [title, kind_name if kind_name == "raw" else f"alpha {metrics.alphas[run]:g}"]
                names = ("spearman", "top", "bottom", "mean_absolute_difference", "concordance")
                row += [_format_quartiles(values_of(name, run, kind)) for name in names]
                compared = [values_of(name, run, kind) for name in ("control", "spearman", "concordance")]
                row.append(f"{max(np.isnan(values).sum() for values in compared):,}")
                if with_boxes:
                    hit, iou = (values_of(name, run, kind).mean() for name in BOX_METRICS)
                    row += [f"{100 * hit:.1f}", f"{iou:.3f}"]
                table.append(row)
        control = ["control", "Gaussian", _format_quartiles(values_of("control", 0, 0))]
        table.append(control + [""] * (len(table[0]) - len(control)))
        lines += align_columns(table, left=2)
    return "\n".join(lines)


def _format_quartiles(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    defined = values[~np.isnan(values)]
    quartiles = np.percentile(defined, (50, 25, 75)) if len(defined) else (np.nan,) * 3
    median, q1, q3 = (f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}" for value in quartiles)
    return f"{median} [{q1}, {q3}]"
