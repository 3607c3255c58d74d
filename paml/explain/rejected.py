"""Rejected labels by epoch, of several runs in one figure, with precision and recall where they are known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paml.explain.figures import colour, new_figure, plain_axes, save

History = Sequence[Mapping[str, float]]


def rejects(history: History) -> bool:
    """Whether a run's history (of `Result` or of a checkpoint) tells of any rejected label."""
    return any(row.get("rejection/rejected", 0) > 0 for row in history)


def draw_rejected(histories: Mapping[str, tuple[int, History]], path: str) -> None:
    """Draw to `path` (PNG): labels rejected by epoch, and where known how many of them were false negatives.

    histories: by title, the place whose colour the run has and its history, a mapping an epoch with `epoch` and the
    `rejection/` figures of the journal. Beside the counts stand precision and recall, or where the truth is not known
    what the probe estimates. Raises ValueError where no run rejects.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    drawn = {title: (place, history) for title, (place, history) in histories.items() if rejects(history)}
    if not drawn:
        raise ValueError("no run rejects labels: there is nothing to draw")
    figure = new_figure(13.2, 4.2)
    counts, precise, recalled = figure.subplots(1, 3)
    for place, history in drawn.values():
        shade = colour(place)
        _line(counts, history, "rejected", shade, "-")
        _line(counts, history, "rejected_false_negatives", shade, "--")
        if not _line(precise, history, "precision", shade, "-"):
            _line(precise, history, "probe_false_rejection", shade, ":")
        if not _line(recalled, history, "recall", shade, "-"):
            _line(recalled, history, "probe_recall", shade, ":")
    counts.set_title("Labels rejected (dashed: truly positive)", fontsize=11, loc="left")
    counts.yaxis.set_major_formatter(EngFormatter(sep=""))
    precise.set_title("Precision (dotted: false rejection, by the probe)", fontsize=11, loc="left")
    recalled.set_title("Recall (dotted: by the probe)", fontsize=11, loc="left")
    for axis in (precise, recalled):
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in (counts, precise, recalled):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_axes(axis)
    counts.set_ylim(bottom=0)
    lines = [Line2D([], [], color=colour(place), marker="o", markersize=4) for place, _ in drawn.values()]
    figure.legend(lines, drawn, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def _line(axis: Any, history: History, name: str, shade: str, style: str) -> bool:
    """Draw a figure by epoch, if it is known in any of them."""
    values = [row.get(f"rejection/{name}", math.nan) for row in history]
    known = not all(map(math.isnan, values))
    if known:
        axis.plot([row["epoch"] for row in history], values, style, color=shade, marker="o", markersize=4)
    return known
