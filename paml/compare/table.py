"""The table of a comparison: its figures, and the same as text, CSV and LaTeX.

Figures are fractions until they are printed, in percent.
"""

import dataclasses
import io
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from paml import storage
from paml.compare.bootstrap import bootstrap_map, interval
from paml.compare.grid import Row, Training
from paml.compare.published import published_map
from paml.compare.settings import CompareSettings
from paml.errors import DataError
from paml.labels.table import LabelTable
from paml.metrics import Pairs, read_pairs, scores
from paml.metrics.scores import NUM_GROUPS
from paml.spreadsheet import ReportWriter
from paml.tracking.journal import END_STATUSES, Event, read_journal
from paml.training.data import open_split
from paml.training.loop import Result, pairs_path, run_folder_of

NAN = math.nan
GROUPS = tuple(f"G{group}" for group in range(1, NUM_GROUPS + 1))


@dataclasses.dataclass(frozen=True)
class Scored:
    """One training, scored on the test split by the epoch that validation chose for one alpha."""

    map: float
    groups: Mapping[str, float]
    epoch: int
    precision: float
    """Share of the labels rejected in that epoch that are false negatives; NaN where nothing is rejected or known."""
    recall: float
    """Share of the false negatives that are rejected in that epoch."""
    hours: float
    """From start to end, stops left out."""
    replicates: np.ndarray
    """float64 [R], mAP on the test images drawn again."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table: means over the seeds that have a score."""

    name: str
    seeds: int
    """Seeds that have a score."""
    missing: int
    """Seeds whose training failed."""
    map: float = NAN
    spread: float = NAN
    """Standard deviation over the seeds (n - 1); NaN for one."""
    low: float = NAN
    high: float = NAN
    """The bootstrap's interval of the mean."""
    difference: float = NAN
    """Of the mean to that of the row compared with, over the seeds that both have."""
    difference_low: float = NAN
    difference_high: float = NAN
    gap: float = NAN
    """Gap closed, over the seeds that all three rows have."""
    precision: float = NAN
    recall: float = NAN
    groups: Mapping[str, float] = dataclasses.field(default_factory=dict)
    epoch: float = NAN
    hours: float = NAN
    published: float = NAN
    source: str = ""


def finished(training: Training) -> bool:
    """Whether a training has been scored on the test split."""
    return storage.exists(storage.join(run_folder_of(training.settings), "result.json"))


def result_of(training: Training) -> Result:
    """What a finished training left."""
    return Result.read(run_folder_of(training.settings))


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What all rows of a table are measured by."""

    images: np.ndarray
    """int64 [I]: places in the manifest of the test images that have labels, sorted: what the bootstrap draws from."""
    grouped_by: str
    """The row whose training labels order the classes into the five groups: with labels of its own a row, as that of
    the full labels has, would else be grouped otherwise than those beside it."""
    train_positives: np.ndarray
    train_negatives: np.ndarray
    """int64 [K], of those labels."""


def yardstick_of(rows: Sequence[Row], trainings: Mapping[str, Training], settings: CompareSettings) -> Yardstick:
    """The yardstick of a table; its groups are those of the row compared with, else of the first."""
    row = next((row for row in rows if row.name == settings.against), rows[0])
    data = trainings[next(iter(row.trainings.values()))].settings.data
    test = open_split(data, str(data.test_split), f"labels/{data.test_split}.arrow", images="observed")
    counts = LabelTable.open(storage.join(data.root, data.train_labels)).class_counts()
    return Yardstick(np.sort(test.samples.index), row.name, *counts)


def score_row(
    row: Row,
    trainings: Mapping[str, Training],
    settings: CompareSettings,
    yardstick: Yardstick,
    seen: dict[str, str],
) -> dict[int, Scored]:
    """Seed -> score, for the seeds whose training is finished.

    seen: what the rows before were scored on, added to; raises DataError where this row was scored on something else.
    """
    found = {}
    for seed, name in row.trainings.items():
        training = trainings[name]
        if not finished(training):
            continue
        folder, result = run_folder_of(training.settings), result_of(training)
        best = result.best[row.alpha]
        chosen = next(figures for figures in result.history if figures["epoch"] == best["epoch"])
        pairs, num_classes = _same_pairs(folder, row.alpha, seen)
        test = scores(
            *pairs[:3],
            num_classes,
            settings=training.settings.metrics,
            train_positives=yardstick.train_positives,
            train_negatives=yardstick.train_negatives,
        )
        found[seed] = Scored(
            map=test.map,
            groups=test.groups,
            epoch=best["epoch"],
            precision=chosen.get("rejection/precision", NAN),
            recall=chosen.get("rejection/recall", NAN) if chosen.get("rejection/rejected") else NAN,
            hours=hours_of(read_journal(folder, unreadable={})),
            replicates=bootstrap_map(
                pairs,
                num_classes,
                yardstick.images,
                replicates=settings.replicates,
                seed=settings.bootstrap_seed,
                settings=training.settings.metrics,
            ),
        )
    return found


def _same_pairs(folder: str, alpha: str, seen: dict[str, str]) -> tuple[Pairs, int]:
    pairs, facts = read_pairs(pairs_path(folder, alpha))
    for name in ("split", "labels"):
        if seen.setdefault(name, facts[name]) != facts[name]:
            raise DataError(
                f"{folder} was scored on other test {name} than the rows before it: its figures cannot stand in one "
                "table with theirs. Remove that run's folder, and the same command trains it again"
            )
    return pairs, int(facts["num_classes"])


def hours_of(events: Sequence[Event]) -> float:
    """Hours that a run was at work: from each start to the end or the last sign of life before the next start."""
    total, start, last = 0, None, 0
    for event in events:
        starts = event.kind == "status" and event.value == "RUNNING"
        ends = event.kind == "status" and event.value in END_STATUSES
        if start is not None and (starts or ends):
            total += (event.time_ms if ends else last) - start
            start = None
        if starts:
            start = event.time_ms
        last = event.time_ms
    return (total + (last - start if start is not None else 0)) / 3.6e6


def table_lines(rows: Mapping[str, dict[int, Scored]], all_seeds: int, settings: CompareSettings) -> list[Line]:
    """A line for each row (name -> seed -> score), in their order; `all_seeds` were to be trained of each."""
    below, above, against = (rows.get(name or "", {}) for name in (settings.below, settings.above, settings.against))
    lines = []
    for name, scored in rows.items():
        public = published_map(settings.published, name) if settings.published else None
        beside = {"published": public[0] / 100, "source": public[1]} if public else {}
        if not scored:
            lines.append(Line(name, 0, all_seeds, **beside))
            continue
        low, high = interval(_mean_replicates(scored, scored), settings.level)
        common = scored.keys() & against.keys()
        apart, spans = NAN, (NAN, NAN)
        if common and name != settings.against:
            apart = _mean(scored, common) - _mean(against, common)
            between = _mean_replicates(scored, common) - _mean_replicates(against, common)
            spans = interval(between, settings.level)
        lines.append(
            Line(
                name=name,
                seeds=len(scored),
                missing=all_seeds - len(scored),
                map=_mean(scored, scored),
                spread=float(np.std([s.map for s in scored.values()], ddof=1)) if len(scored) > 1 else NAN,
                low=low,
                high=high,
                difference=apart,
                difference_low=spans[0],
                difference_high=spans[1],
                gap=_gap(scored, below, above),
                precision=_plain_mean([s.precision for s in scored.values()]),
                recall=_plain_mean([s.recall for s in scored.values()]),
                groups={g: _plain_mean([s.groups.get(g, NAN) for s in scored.values()]) for g in GROUPS},
                epoch=_plain_mean([s.epoch for s in scored.values()]),
                hours=_plain_mean([s.hours for s in scored.values()]),
                **beside,
            )
        )
    return lines


def _mean(scored: Mapping[int, Scored], seeds: Collection[int]) -> float:
    return float(np.mean([scored[seed].map for seed in sorted(seeds)]))


def _mean_replicates(scored: Mapping[int, Scored], seeds: Collection[int]) -> np.ndarray:
    return np.mean([scored[seed].replicates for seed in sorted(seeds)], axis=0)


def _gap(scored: Mapping[int, Scored], below: Mapping[int, Scored], above: Mapping[int, Scored]) -> float:
    common = scored.keys() & below.keys() & above.keys()
    if not common:
        return NAN
    ground, top = _mean(below, common), _mean(above, common)
    return (_mean(scored, common) - ground) / (top - ground) if top != ground else NAN


def _plain_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN


def columns_of(lines: Sequence[Line], settings: CompareSettings) -> list[tuple[str, list[str]]]:
    """Heading and cells of each column of the printed table; columns without any figure are left out."""
    level = f"{settings.level:.0%}"
    columns = [
        ("", [line.name for line in lines]),
        ("mAP", [_percent(line.map) for line in lines]),
        ("± seeds", [_percent(line.spread) for line in lines]),
        (level, [_span(line.low, line.high) for line in lines]),
        (f"- {settings.against}", [_percent(line.difference, "+.2f") for line in lines]),
        (f"{level} of it", [_span(line.difference_low, line.difference_high, "+.2f") for line in lines]),
        ("gap closed", [_percent(line.gap, ".0f", " %") for line in lines]),
        ("rej. prec.", [_percent(line.precision, ".1f") for line in lines]),
        ("rej. recall", [_percent(line.recall, ".1f") for line in lines]),
        *((group, [_percent(line.groups.get(group, NAN)) for line in lines]) for group in GROUPS),
        ("epoch", [_number(line.epoch, ".3g") for line in lines]),
        ("hours", [_number(line.hours, ".2f") for line in lines]),
        ("failed", [str(line.missing) if line.missing else "-" for line in lines]),
        ("published", [_percent(line.published) for line in lines]),
    ]
    return [(heading, cells) for heading, cells in columns if any(cell != "-" for cell in cells)]


def as_text(lines: Sequence[Line], settings: CompareSettings, notes: Sequence[str] = ()) -> str:
    """The table in columns, then a line for each note."""
    columns = columns_of(lines, settings)
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns]
    rows = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *notes])


def as_csv(lines: Sequence[Line]) -> str:
    """Every figure of every row, as fractions of full precision; empty where there is none."""
    names = [field.name for field in dataclasses.fields(Line) if field.name != "groups"]
    out = io.StringIO()
    writer = ReportWriter(out)
    writer.writerow([*names, *GROUPS])
    for line in lines:
        values = [getattr(line, name) for name in names] + [line.groups.get(group, NAN) for group in GROUPS]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return out.getvalue()


def as_latex(lines: Sequence[Line], settings: CompareSettings, notes: Sequence[str] = ()) -> str:
    """A tabular with booktabs' rules; the best mAP is bold, but for the row that the gap is measured up to."""
    columns = columns_of(lines, settings)
    best = max((line.map for line in lines if line.name != settings.above and line.seeds), default=NAN)
    body = []
    for place, line in enumerate(lines):
        cells = [_escaped(cells[place]) for _, cells in columns]
        if line.map == best and line.name != settings.above:
            cells[1] = rf"\textbf{{{cells[1]}}}"
        body.append(" & ".join(cells) + r" \\")
    head = " & ".join(_escaped(heading) for heading, _ in columns) + r" \\"
    frame = [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*(f"% {note}" for note in notes), *frame, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def figures_of(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Row -> its figures by name, for a journal; what is not known is left out."""
    names = ("map", "spread", "low", "high", "difference", "gap", "precision", "recall", "hours")
    return {
        line.name: {name: value for name in names if not math.isnan(value := getattr(line, name))}
        | {group: value for group, value in line.groups.items() if not math.isnan(value)}
        for line in lines
    }


def _percent(value: float, form: str = ".2f", unit: str = "") -> str:
    return _number(100 * value, form) + (unit if not math.isnan(value) else "")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _span(low: float, high: float, form: str = ".2f") -> str:
    return "-" if math.isnan(low) else f"{_percent(low, form)} to {_percent(high, form)}"


_SIGNS = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "\\": r"\textbackslash{}"}


def _escaped(text: str) -> str:
    return "--" if text == "-" else "".join(_SIGNS.get(sign, sign) for sign in text)
