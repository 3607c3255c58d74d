"""Figures of a run, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from paml import storage
from paml.tracking.journal import Event

_REJECTED, _TRUE, _LINE, _SECOND_LINE = "#9ecae1", "#08519c", "#d94801", "#e6a800"


def rejection_history(events: Iterable[Event]) -> list[dict[str, float]]:
    """The `rejection/` metrics of a journal (`read_journal`), one dict an epoch, names without the prefix."""
    rows: dict[int, dict[str, float]] = {}
    for event in events:
        if event.kind == "metric" and event.key.startswith("rejection/"):
            row = rows.setdefault(event.step, {"epoch": event.step})
            row[event.key.removeprefix("rejection/")] = event.value
    return [rows[step] for step in sorted(rows)]


def rejected_by_epoch_figure(history: Sequence[Mapping[str, float]], path: str) -> None:
    """Draws the rejected labels by epoch to a PNG file, local or S3.

    `history` has a mapping an epoch: `epoch` and `rejected`; where the truth is known
    `rejected_false_negatives`, `precision` and `recall`, else the probe's `probe_recall` and
    `probe_false_rejection`. Shares lie in [0, 1]; NaN leaves a gap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    if not history:
        raise ValueError("the history has no epoch: draw the figure after the first one")
    epochs = [row["epoch"] for row in history]

    def column(name: str) -> list[float] | None:
        values = [row.get(name, float("nan")) for row in history]
        return values if any(value == value for value in values) else None

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    counts = figure.add_subplot()
    true = column("rejected_false_negatives")
    counts.bar(epochs, column("rejected") or [0.0] * len(epochs), 0.8, color=_REJECTED, label="rejected")
    if true:
        counts.bar(epochs, true, 0.8, color=_TRUE, label="of them truly positive")
    counts.set_xlim(min(epochs) - 0.6, max(epochs) + 0.6)
    counts.set_xlabel("epoch")
    counts.set_ylabel("labels")
    counts.xaxis.set_major_locator(MaxNLocator(integer=True))
    counts.yaxis.set_major_formatter(EngFormatter(sep=""))
    counts.set_title("Rejected labels by epoch", loc="left", fontweight="bold")
    counts.grid(axis="y", color="#dddddd", linewidth=0.8)
    counts.set_axisbelow(True)
    for side in ("top", "right", "left"):
        counts.spines[side].set_visible(False)

    lines = [("precision", "precision", _LINE, "-"), ("recall", "recall", _SECOND_LINE, "--")]
    if not column("precision"):
        lines = [
            ("probe_recall", "recall, by the probe", _LINE, "-"),
            ("probe_false_rejection", "false rejection, by the probe", _SECOND_LINE, "--"),
        ]
    drawn = [(values, *line) for line in lines if (values := column(line[0]))]
    if drawn:
        shares = counts.twinx()
        for values, _, label, colour, style in drawn:
            shares.plot(epochs, values, style, color=colour, marker="o", mec="white", markersize=6, label=label)
        shares.set_ylim(0, max(1.0, *(value for values, *_ in drawn for value in values if value == value)))
        shares.yaxis.set_major_formatter(PercentFormatter(1.0))
        for side in ("top", "left", "right"):
            shares.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_bytes(path, buffer.getvalue())
