"""The table of a comparison: its numbers, and the same as text, CSV and LaTeX.

Scores are fractions; the printed tables show percent.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from paml import storage
from paml.compare.bootstrap import bootstrap_map, interval
from paml.compare.grid import Row
from paml.compare.published import published_map
from paml.compare.settings import CompareSettings
from paml.errors import DataError
from paml.labels.table import LabelTable
from paml.metrics import Pairs, read_pairs, scores
from paml.metrics.scores import NUM_GROUPS, align_columns
from paml.runs.folder import is_finished, pairs_path, read_result
from paml.runs.journal import END_STATUSES, Event, read_journal
from paml.spreadsheet import format_csv
from paml.training.data import open_split

GROUPS = [f"G{group}" for group in range(1, NUM_GROUPS + 1)]
MEANS = ["map", "precision", "recall", "epoch", "hours", *GROUPS]
"""Columns that are means over the finished seeds. precision: fraction of the rejected labels that are false negatives;
recall: fraction of the false negatives that are rejected; hours: training time, without interruptions."""
COLUMNS = [
    *("seeds", "missing", "map", "spread", "low", "high", "difference", "difference_low", "difference_high", "gap"),
    *("precision", "recall", "epoch", "hours", "published", "source", *GROUPS),
]
"""Columns of a table. seeds, missing: finished and failed seeds; spread: standard deviation over the seeds (n - 1);
low and high: bootstrap interval of the mean; difference to `compare_to` with its interval, over the seeds that both
rows have; gap: gap closed, over the seeds that the row and both reference rows have. NaN if unknown."""


class SeedScore(NamedTuple):
    """Test scores of one training with one alpha, in the epoch chosen on validation."""

    metrics: dict[str, float]
    """By the names in MEANS."""
    replicates: np.ndarray
    """float64 [R]: mAP on resampled test images."""


@dataclasses.dataclass(frozen=True)
class EvalReference:
    """What all rows of a table are evaluated with."""

    images: np.ndarray
    """int64 [I]: sorted manifest rows of the labeled test images, which the bootstrap resamples."""
    grouped_by: str
    """The row whose training labels define the five class groups. Rows trained on other labels use the same groups."""
    train_counts: tuple[np.ndarray, np.ndarray]
    """int64 [K] positives and int64 [K] negatives among those training labels."""


def eval_reference(rows: Mapping[str, Row], settings: CompareSettings) -> EvalReference:
    """The reference of a table, with the groups of `compare_to` or else of the first row."""
    row = rows[settings.compare_to or next(iter(rows))]
    data = row.first.settings.data
    test = open_split(data, str(data.test_split), f"labels/{data.test_split}.arrow", images="observed")
    counts = LabelTable.open(storage.join(data.root, data.train_labels)).class_counts()
    return EvalReference(np.sort(test.samples.index), row.name, counts)


def score_row(
    row: Row, settings: CompareSettings, reference: EvalReference, digests: dict[str, str]
) -> dict[int, SeedScore]:
    """Seed -> scores, for the finished seeds.

    digests: of the test data of earlier rows, updated by this one. Raises DataError if this row was scored on others.
    """
    by_seed = {}
    for seed, training in row.trainings.items():
        if not is_finished(training.folder):
            continue
        result = read_result(training.folder)
        best = result.best[row.alpha]["epoch"]
        epoch = next(metrics for metrics in result.history if metrics["epoch"] == best)
        pairs, num_classes = _read_same_pairs(training.folder, row.alpha, digests)
        metrics, (positives, negatives) = training.settings.metrics, reference.train_counts
        test = scores(*pairs[:3], num_classes, settings=metrics, train_counts=positives + negatives)
        values = {
            "map": test.map,
            "precision": epoch.get("rejection/precision", math.nan),
            "recall": epoch.get("rejection/recall", math.nan) if epoch.get("rejection/rejected") else math.nan,
            "epoch": best,
            "hours": training_hours(read_journal(training.folder, unreadable={})),
        }
        replicates = bootstrap_map(
            pairs, num_classes, reference.images, replicates=settings.replicates, seed=0, settings=metrics
        )
        by_seed[seed] = SeedScore(values | test.groups, replicates)
    return by_seed


def _read_same_pairs(folder: str, alpha: str, digests: dict[str, str]) -> tuple[Pairs, int]:
    pairs, facts = read_pairs(pairs_path(folder, alpha))
    for name in ("split", "labels"):
        if digests.setdefault(name, facts[name]) != facts[name]:
            raise DataError(
                f"{folder} was scored on other test {name} than the rows before it, so they are not comparable. Remove "
                "that folder and repeat the command to train it again"
            )
    return pairs, int(facts["num_classes"])


def training_hours(events: Sequence[Event]) -> float:
    """Hours that a run was training: from each start to its end, or to the last event before the next start."""
    total, running, last = 0, False, 0
    for event in events:
        starts = event.kind == "status" and event.value == "RUNNING"
        if running and not starts:
            total += event.time_ms - last
        if event.kind == "status":
            running = event.value not in END_STATUSES
        last = event.time_ms
    return total / 3.6e6


def table_rows(rows: Mapping[str, dict[int, SeedScore]], num_seeds: int, settings: CompareSettings) -> pd.DataFrame:
    """The table, with one row per name and COLUMNS, from row name -> seed -> scores.

    num_seeds: seeds that each row should have.
    """
    baseline, upper_bound, compare_to = (
        rows.get(name or "", {}) for name in (settings.baseline_row, settings.upper_bound_row, settings.compare_to)
    )
    table = []
    for name, by_seed in rows.items():
        seeds = pd.DataFrame([score.metrics for score in by_seed.values()], columns=MEANS, dtype=float)
        values: dict[str, Any] = {"seeds": len(by_seed), "missing": num_seeds - len(by_seed), "source": ""}
        values |= {"spread": seeds["map"].std(), **seeds.mean()}
        if settings.published and (published := published_map(settings.published, name)):
            values |= {"published": published[0] / 100, "source": published[1]}
        if by_seed:
            values["low"], values["high"] = interval(_mean_replicates(by_seed, by_seed), 0.95)
        common = by_seed.keys() & baseline.keys() & upper_bound.keys()
        if common:
            own, low, high = (_mean_map(each, common) for each in (by_seed, baseline, upper_bound))
            values["gap"] = (own - low) / (high - low) if high != low else math.nan
        common = by_seed.keys() & compare_to.keys()
        if common and name != settings.compare_to:
            values["difference"] = _mean_map(by_seed, common) - _mean_map(compare_to, common)
            differences = _mean_replicates(by_seed, common) - _mean_replicates(compare_to, common)
            values["difference_low"], values["difference_high"] = interval(differences, 0.95)
        table.append(values)
    return pd.DataFrame(table, index=pd.Index(rows, name="name"), columns=COLUMNS)


def _mean_map(by_seed: Mapping[int, SeedScore], seeds: Collection[int]) -> float:
    return float(np.mean([by_seed[seed].metrics["map"] for seed in sorted(seeds)]))


def _mean_replicates(by_seed: Mapping[int, SeedScore], seeds: Collection[int]) -> np.ndarray:
    return np.mean([by_seed[seed].replicates for seed in sorted(seeds)], axis=0)


def table_cells(table: pd.DataFrame, settings: CompareSettings) -> pd.DataFrame:
    """The cells of the printed table, without empty columns."""

    def number(column: str, spec: str = ".2f", unit: str = "", scale: float = 100) -> list[str]:
        return ["-" if math.isnan(value) else f"{scale * value:{spec}}{unit}" for value in table[column]]

    def format_interval(low: str, high: str, spec: str = ".2f") -> list[str]:
        ends = zip(number(low, spec), number(high, spec), strict=True)
        return ["-" if first == "-" else f"{first} to {last}" for first, last in ends]

    cells = {
        "": list(table.index),
        "mAP": number("map"),
        "± seeds": number("spread"),
        "95%": format_interval("low", "high"),
        f"- {settings.compare_to}": number("difference", "+.2f"),
        "95% of diff.": format_interval("difference_low", "difference_high", "+.2f"),
        "gap closed": number("gap", ".0f", " %"),
        "rej. prec.": number("precision", ".1f"),
        "rej. recall": number("recall", ".1f"),
        **{group: number(group) for group in GROUPS},
        "epoch": number("epoch", ".3g", scale=1),
        "hours": number("hours", ".2f", scale=1),
        "failed": [str(count or "-") for count in table["missing"]],
        "published": number("published"),
    }
    return pd.DataFrame({heading: column for heading, column in cells.items() if set(column) != {"-"}})


def as_text(table: pd.DataFrame, settings: CompareSettings, notes: Sequence[str] = ()) -> str:
    """The table in columns, followed by one line per note."""
    cells = table_cells(table, settings)
    return "\n".join([format_table([list(cells), *cells.to_numpy().tolist()]), *notes])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, the first to the left; the first row is the heading."""
    heading, *lines = align_columns(rows)
    return "\n".join([heading, "-" * max(map(len, [heading, *lines])), *lines])


def as_csv(table: pd.DataFrame) -> str:
    """All numbers of all rows, as fractions of full precision; empty if unknown."""
    known = table.reset_index().astype(object).where(table.reset_index().notna(), "")
    return format_csv([list(known), *known.to_numpy().tolist()])


def as_latex(table: pd.DataFrame, settings: CompareSettings, notes: Sequence[str] = ()) -> str:
    """A tabular with booktabs rules; the best mAP is bold, apart from the upper bound."""
    cells = table_cells(table, settings)
    style: Any = cells.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    scores = table["map"].where(table.index != settings.upper_bound_row).to_numpy()
    if not np.isnan(scores).all():
        style = style.set_properties(subset=([np.nanargmax(scores)], ["mAP"]), textbf="--rwrap")
    latex = style.to_latex(hrules=True, column_format="l" + "r" * (cells.shape[1] - 1))
    return "".join(f"% {note}\n" for note in notes) + latex


def table_metrics(regime: str, table: pd.DataFrame) -> dict[str, float]:
    """The known numbers by names that trackers accept: mAP of LL-R + BoostLU in regime single is
    mAP/single/LL-R BoostLU."""
    fields = ["map", "spread", "low", "high", "difference", "gap", "precision", "recall", "hours", *GROUPS]
    metrics = {}
    for row, values in table[fields].iterrows():
        name = " ".join(re.sub(r"[^\w. :-]", " ", str(row), flags=re.ASCII).split())
        for field, value in values.dropna().items():
            metrics["/".join(["mAP" if field == "map" else str(field), *([regime] if regime else []), name])] = value
    return metrics
