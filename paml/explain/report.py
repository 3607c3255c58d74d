"""What the analysis of maps ends in: one row a label in Parquet, a summary, and two figures."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from paml import storage
from paml.explain.figures import CONTROL, Series, colour, draw_boxes, draw_distributions
from paml.explain.measures import CONVENTION
from paml.labels.states import NEGATIVE, POSITIVE
from paml.spreadsheet import ReportWriter
from paml.training.data import Split

SCHEMA_VERSION = 1
KINDS = ("raw", "boosted")
STATES = {"positive": POSITIVE, "negative": NEGATIVE}


@dataclasses.dataclass(frozen=True)
class Measured:
    """The figures of m labels by R runs."""

    FIGURES: ClassVar[tuple[str, ...]] = (
        "logit",
        "spearman",
        "control",
        "top",
        "bottom",
        "mean_absolute_difference",
        "concordance",
        "pointing_hit",
        "box_iou",
    )
    titles: tuple[str, ...]
    checkpoints: tuple[str, ...]
    alphas: tuple[float, ...]
    reference: int
    """Place of the run that the others are compared with."""
    index: np.ndarray
    """int64 [m], place of the image in the manifest."""
    cls: np.ndarray
    """int32 [m]."""
    state: np.ndarray
    """int8 [m], POSITIVE or NEGATIVE."""
    boxed: np.ndarray
    """bool [m], whether a box of the label is known."""
    values: np.ndarray
    """float64 [R, 2, F, m]: by run, raw or boosted, figure, label."""

    def figure(self, name: str) -> np.ndarray:
        """float64 [R, 2, m]; NaN where it is undefined or does not apply."""
        return self.values[:, :, self.FIGURES.index(name)]

    def boosts(self, run: int) -> bool:
        """Whether a run's boosted maps can stand otherwise to the reference's than its raw ones."""
        return self.alphas[run] != 1 or self.alphas[self.reference] != 1

    def applies(self, name: str, run: int) -> np.ndarray:
        """bool [m]: for which labels a figure is asked of a run. NaN there means undefined (a constant map)."""
        if name in ("pointing_hit", "box_iou"):
            return self.boxed
        asked = {"control": run == self.reference, "logit": True, "top": True, "bottom": True}
        return np.full(len(self.cls), asked.get(name, run != self.reference))


def write_rows(measured: Measured, split: Split, settings: Any, path: str) -> None:
    """Write one row a (image, class, run, raw or boosted) to a Parquet file, local or s3://.

    Columns: key, mid, state (positive or negative), run, map (raw or boosted), then the figures of Measured. A figure
    that does not apply is null (those of likeness for the reference, `control` for the others, those of boxes where
    none is known); one that is undefined is NaN. Metadata `paml`: schema_version, runs, settings, convention.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {"title": title, "checkpoint": checkpoint, "alpha": alpha}
            for title, checkpoint, alpha in zip(measured.titles, measured.checkpoints, measured.alphas, strict=True)
        ],
        "reference": measured.titles[measured.reference],
        "settings": dataclasses.asdict(settings),
        "labels": split.table.digest,
        "images": split.manifest.digest,
        "convention": CONVENTION,
    }
    places, image = np.unique(measured.index, return_inverse=True)
    dictionary = pa.dictionary(pa.int32(), pa.string())
    types = {name: pa.float64() for name in Measured.FIGURES} | {"pointing_hit": pa.bool_()}
    named = dict.fromkeys(("key", "mid", "state", "run", "map"), dictionary)
    schema = pa.schema(list((named | types).items()), metadata={"paml": json.dumps(facts)})

    def coded(codes: np.ndarray, texts: Sequence[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(texts, pa.string()))

    labels = [
        coded(image, [split.manifest.key(int(place)) for place in places]),
        coded(measured.cls, split.table.classes),
        coded(np.where(measured.state == POSITIVE, 0, 1), ["positive", "negative"]),
    ]
    zeros = np.zeros(len(measured.cls), np.int32)
    with storage.replacing(path) as local, pq.ParquetWriter(local, schema, compression="zstd") as writer:
        for run, title in enumerate(measured.titles):
            for kind, name in enumerate(KINDS):
                columns = [*labels, coded(zeros, [title]), coded(zeros, [name])]
                for figure, type_ in types.items():
                    absent, values = ~measured.applies(figure, run), measured.figure(figure)[run, kind]
                    if type_ == pa.bool_():
                        values = values == 1
                    columns.append(pa.array(values, type_, mask=absent, from_pandas=False))
                writer.write_table(pa.table(columns, schema=schema))


def summary(measured: Measured) -> list[dict[str, Any]]:
    """One row a (state, run, raw or boosted, figure): labels it was asked of, how many of them have no value, and
    mean, quartiles and median of the others (NaN where there are none)."""
    rows = []
    for state, code in STATES.items():
        for run, title in enumerate(measured.titles):
            for kind, name in enumerate(KINDS):
                for figure in Measured.FIGURES:
                    asked = measured.applies(figure, run) & (measured.state == code)
                    values = measured.figure(figure)[run, kind, asked]
                    if not len(values):
                        continue
                    finite = values[~np.isnan(values)]
                    q1, median, q3 = np.percentile(finite, (25, 50, 75)) if len(finite) else (np.nan,) * 3
                    rows.append(
                        {
                            "state": state,
                            "run": title,
                            "map": name,
                            "figure": figure,
                            "labels": len(values),
                            "undefined": len(values) - len(finite),
                            "mean": float(finite.mean()) if len(finite) else float("nan"),
                            "q1": float(q1),
                            "median": float(median),
                            "q3": float(q3),
                        }
                    )
    return rows


def summary_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """The rows of `summary` as CSV, figures in full."""
    out = io.StringIO()
    writer = ReportWriter(out)
    writer.writerow(rows[0])
    writer.writerows([row[name] for name in rows[0]] for row in rows)
    return out.getvalue().encode()


def summary_text(measured: Measured, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summary` as a table a reader takes in: medians with quartiles, means where a figure is a share.

    A run has a row of raw maps and one of maps boosted by its alpha, the latter where it can differ.
    """
    of = {(row["state"], row["run"], row["map"], row["figure"]): row for row in rows}
    reference = measured.titles[measured.reference]
    lines = []
    for state, code in STATES.items():
        labels = measured.state == code
        if not labels.any():
            continue
        images = len(np.unique(measured.index[labels]))
        lines += ["", f"{state} labels: {labels.sum():,} of {images:,} images; median [quartiles], against {reference}"]
        boxed = bool((labels & measured.boxed).any())
        head = ["run", "map", "Spearman", "top 5 %", "bottom 5 %", "|difference|", "concordance", "undefined"]
        table = [head + (["pointing, %", "box IoU, mean"] if boxed else [])]
        for run, title in enumerate(measured.titles):
            for kind in KINDS if measured.boosts(run) else KINDS[:1]:
                spread = ("spearman", "top", "bottom", "mean_absolute_difference", "concordance")
                row = [
                    title,
                    kind if kind == "raw" else f"alpha {measured.alphas[run]:g}",
                    *(_spread(of.get((state, title, kind, figure))) for figure in spread),
                ]
                compared = [of.get((state, title, kind, name)) for name in ("control", "spearman", "concordance")]
                row.append(f"{max(found['undefined'] for found in compared if found):,}")
                if boxed:
                    hit, iou = (of[state, title, kind, name]["mean"] for name in ("pointing_hit", "box_iou"))
                    row += [f"{100 * hit:.1f}", f"{iou:.3f}"]
                table.append(row)
        control = ["control", "Gaussian", _spread(of[state, reference, "raw", "control"])]
        table.append(control + [""] * (len(table[0]) - len(control)))
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def _spread(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "{} [{}, {}]".format(*(_short(row[name]) for name in ("median", "q1", "q3")))


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def draw_likeness(measured: Measured, path: str) -> None:
    """Draw to `path` (PNG): distributions of Spearman's correlation with the control, and of concordance, for positive
    and for negative labels; boosted maps dashed where they can differ."""
    panels = []
    reference = measured.titles[measured.reference]
    for figure, name in (("spearman", "Spearman's correlation"), ("concordance", "Lin's concordance")):
        for state, code in STATES.items():
            labels = measured.state == code
            series: list[Series] = []
            if figure == "spearman":
                control = measured.figure("control")[measured.reference, 0, labels]
                series.append((f"{reference} with a centred Gaussian", CONTROL, "-", control))
            for run, title in enumerate(measured.titles):
                if run == measured.reference:
                    continue
                values = measured.figure(figure)[run][:, labels]
                if measured.checkpoints.index(measured.checkpoints[run]) == run:  # else its raw maps are drawn already
                    series.append((title, colour(run), "-", values[0]))
                if figure == "concordance" and measured.boosts(run):
                    series.append((f"{title}, boosted", colour(run), "--", values[1]))
            panels.append((f"{state.capitalize()} labels ({labels.sum():,})", f"{name} with {reference}'s map", series))
    draw_distributions(panels, 2, path)


def draw_ends(measured: Measured, path: str) -> None:
    """Draw to `path` (PNG): means of the top and bottom 5 % of scores by run, raw above and boosted below."""
    panels = []
    for kind, name in enumerate(KINDS):
        for figure, title in (("top", "Top 5 %"), ("bottom", "Bottom 5 %")):
            groups = [
                (state, list(measured.figure(figure)[:, kind][:, measured.state == code]))
                for state, code in STATES.items()
            ]
            panels.append((f"{title} of scores, {name} maps", groups))
    draw_boxes(panels, measured.titles, path)
