"""Figures of several runs, drawn without a display; a run has the same colour in all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paml import storage

COLOURS = ("#1f4e9c", "#d94801", "#e6a800", "#238b45", "#7b3294", "#1a9bb5", "#c51b7d", "#666666")
"""By the place of a run; after the last they begin again."""
CONTROL = "#9a9a9a"


def colour(place: int) -> str:
    """Of the run at this place."""
    return COLOURS[place % len(COLOURS)]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str) -> None:
    """To a PNG file, local or s3://."""
    with storage.replacing(path) as local:
        figure.savefig(local, format="png")


def plain_axes(axis: Any) -> None:
    """No frame, a faint grid behind."""
    axis.grid(color="#e2e2e2", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


Series = tuple[str, str, str, np.ndarray]
"""(label, colour, line style, values float [n])."""


def draw_distributions(panels: Sequence[tuple[str, str, Sequence[Series]]], columns: int, path: str) -> None:
    """Histograms of figures that lie in [-1, 1], as outlines of the share of labels in each of 40 bins.

    panels: (title, name of the axis, series) row by row; values that are not finite are left out.
    """
    rows = -(-len(panels) // columns)
    figure = new_figure(5.2 * columns, 3.1 * rows + 0.5)
    bins = np.linspace(-1, 1, 41)
    entries: dict[str, Any] = {}
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, name, series) in zip(axes, panels, strict=False):
        for label, shade, style, values in series:
            counts, _ = np.histogram(values[np.isfinite(values)], bins)
            if counts.sum():
                shares = 100 * counts / counts.sum()
                entries[label] = axis.stairs(shares, bins, color=shade, linestyle=style, linewidth=1.8, label=label)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set(xlabel=name, ylabel="labels, %", xlim=(-1, 1))
        axis.set_ylim(bottom=0)
        plain_axes(axis)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def draw_boxes(
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[np.ndarray]]]]], titles: Sequence[str], path: str
) -> None:
    """Medians, quartiles and 5 to 95 % of figures by run, two panels a row.

    panels: (title, [(group, values of each run)]); values that are not finite are left out.
    """
    from matplotlib.patches import Patch

    rows = -(-len(panels) // 2)
    figure = new_figure(10.4, 3.1 * rows + 0.5)
    step = len(titles) + 1.0
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, (title, groups) in zip(axes, panels, strict=False):
        for at, (_, by_run) in enumerate(groups):
            for place, values in enumerate(by_run):
                finite = values[np.isfinite(values)]
                if not len(finite):
                    continue
                low, q1, median, q3, high = np.percentile(finite, (5, 25, 50, 75, 95))
                stats = {"med": median, "q1": q1, "q3": q3, "whislo": low, "whishi": high}
                look = {"facecolor": colour(place), "edgecolor": colour(place), "alpha": 0.75}
                line = {"color": colour(place), "linewidth": 1.4}
                axis.bxp(
                    [stats],
                    positions=[at * step + place],
                    widths=0.7,
                    showfliers=False,
                    patch_artist=True,
                    boxprops=look,
                    medianprops={"color": "white", "linewidth": 2},
                    whiskerprops=line,
                    capprops=line,
                    manage_ticks=False,
                )
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.set_xticks([at * step + (len(titles) - 1) / 2 for at in range(len(groups))], [name for name, _ in groups])
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_ylabel("attribution score")
        plain_axes(axis)
        axis.grid(axis="x", visible=False)
    patches = [Patch(color=colour(place), alpha=0.75) for place in range(len(titles))]
    figure.legend(patches, titles, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)
