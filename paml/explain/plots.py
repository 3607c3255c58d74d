"""Plots of the analysis: similarity and extremes of maps, and rejected labels by epoch, for several runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paml.explain.report import MAP_KINDS, STATES, MapMetrics
from paml.plots import CONTROL_COLOR, new_figure, run_color, save_figure, style_axes

History = Sequence[Mapping[str, float]]
"""Metrics by epoch, as in a run's result."""


def draw_similarity(metrics: MapMetrics, path: str) -> None:
    """Draw to `path` (PNG) histograms of rank correlation and concordance with the reference, for positive and negative
    labels. Boosted maps are dashed, if boost can change the metric."""
    figure = new_figure(10.4, 6.7)
    bins = np.linspace(-1, 1, 41)
    reference = metrics.titles[0]
    legend: dict[str, Any] = {}
    names = (("spearman", "Spearman's correlation"), ("concordance", "Lin's concordance"))
    for row, (name, title) in zip(figure.subplots(2, 2), names, strict=True):
        curves = []
        if name == "spearman":
            control = metrics.metric("control")[0, 0]
            curves.append((f"{reference} with a centered Gaussian", CONTROL_COLOR, "-", control))
        for run, run_title in enumerate(metrics.titles):
            raw, boosted = metrics.metric(name)[run]
            first = metrics.checkpoints.index(metrics.checkpoints[run]) == run  # raw maps of a checkpoint, once
            if run and first:
                curves.append((run_title, run_color(run), "-", raw))
            if run and name == "concordance" and metrics.boost_matters(run):
                curves.append((f"{run_title}, boosted", run_color(run), "--", boosted))
        for axis, (state, code) in zip(row, STATES.items(), strict=True):
            labels = metrics.state == code
            for label, color, style, values in curves:
                counts, _ = np.histogram(values[labels & np.isfinite(values)], bins)
                if counts.sum():
                    percent = 100 * counts / counts.sum()
                    legend[label] = axis.stairs(percent, bins, color=color, linestyle=style, linewidth=1.8)
            axis.set_title(f"{state.capitalize()} labels ({labels.sum():,})", fontsize=11, loc="left")
            axis.set(xlabel=f"{title} with the map of {reference}", ylabel="labels (%)", xlim=(-1, 1))
            axis.set_ylim(bottom=0)
            style_axes(axis)
    if legend:
        figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def draw_extremes(metrics: MapMetrics, path: str) -> None:
    """Draw to `path` (PNG) box plots of the means of the top and bottom 5 % of scores by run, of raw and boosted maps.

    Boxes show median and quartiles, whiskers the 5th and 95th percentiles.
    """
    from matplotlib.patches import Patch

    figure = new_figure(10.4, 6.7)
    step = len(metrics.titles) + 1.0
    for row, (kind, kind_name) in zip(figure.subplots(2, 2), enumerate(MAP_KINDS), strict=True):
        for axis, (name, title) in zip(row, (("top", "Top 5 %"), ("bottom", "Bottom 5 %")), strict=True):
            for group, code in enumerate(STATES.values()):
                for run, values in enumerate(metrics.metric(name)[:, kind][:, metrics.state == code]):
                    axis.boxplot(
                        values[np.isfinite(values)],
                        positions=[group * step + run],
                        widths=0.7,
                        whis=(5, 95),
                        showfliers=False,
                        patch_artist=True,
                        boxprops={"facecolor": run_color(run), "alpha": 0.75},
                        medianprops={"color": "white", "linewidth": 2},
                        manage_ticks=False,
                    )
            axis.axhline(0, color="#555555", linewidth=0.8)
            centers = [group * step + (len(metrics.titles) - 1) / 2 for group in range(len(STATES))]
            axis.set_xticks(centers, [f"{state} labels" for state in STATES])
            axis.set_title(f"{title} of scores, {kind_name} maps", fontsize=11, loc="left")
            axis.set_ylabel("attribution score")
            style_axes(axis)
            axis.grid(axis="x", visible=False)
    patches = [Patch(color=run_color(run), alpha=0.75) for run in range(len(metrics.titles))]
    figure.legend(patches, metrics.titles, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def draw_rejected(histories: Mapping[str, tuple[int, History]], path: str) -> bool:
    """Draw to `path` (PNG) the number of rejected labels by epoch, with precision and recall of the rejections.

    histories: by title the run's position, which decides its color, and its metrics by epoch. Runs without ground
    truth show the probe's estimates instead. Returns whether any run rejects labels; otherwise nothing is drawn.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    rejecting = {
        title: (position, history)
        for title, (position, history) in histories.items()
        if any(row.get("rejection/rejected", 0) > 0 for row in history)
    }
    if not rejecting:
        return False
    figure = new_figure(13.2, 4.2)
    counts, precision, recall = figure.subplots(1, 3)
    draw_rejected_counts(counts, rejecting)
    for position, history in rejecting.values():
        color = run_color(position)
        if not draw_metric(precision, history, "rejection/precision", color, "-"):
            draw_metric(precision, history, "rejection/probe_false_rejection_rate", color, ":")
        if not draw_metric(recall, history, "rejection/recall", color, "-"):
            draw_metric(recall, history, "rejection/probe_recall", color, ":")
    style_epoch_axis(precision, "Precision (dotted: false rejection rate of the probe)")
    style_epoch_axis(recall, "Recall (dotted: estimated by the probe)")
    for axis in (precision, recall):
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    lines = [Line2D([], [], color=run_color(position), marker="o", markersize=4) for position, _ in rejecting.values()]
    figure.legend(lines, rejecting, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)
    return True


def draw_learning_curves(figure: Any, histories: Mapping[str, tuple[int, History]]) -> None:
    """Draw on a figure the validation mAP and the number of rejected labels. histories: as in `draw_rejected`."""
    from matplotlib.ticker import PercentFormatter

    score, rejected = figure.subplots(1, 2)
    for title, (position, history) in histories.items():
        draw_metric(score, history, "val/mAP", run_color(position), "-", label=title)
    style_epoch_axis(score, "Validation mAP")
    score.yaxis.set_major_formatter(PercentFormatter(1.0))
    score.legend(fontsize=9)
    draw_rejected_counts(rejected, histories)


def draw_rejected_counts(axis: Any, histories: Mapping[str, tuple[int, History]]) -> None:
    """Draw the number of rejected labels by epoch, and of false negatives among them if known."""
    from matplotlib.ticker import EngFormatter

    for position, history in histories.values():
        draw_metric(axis, history, "rejection/rejected", run_color(position), "-")
        draw_metric(axis, history, "rejection/rejected_false_negatives", run_color(position), "--")
    style_epoch_axis(axis, "Rejected labels (dashed: false negatives)")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))


def style_epoch_axis(axis: Any, title: str) -> None:
    """Title and integer ticks of a plot of metrics by epoch."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style_axes(axis)


def draw_metric(axis: Any, history: History, name: str, color: str, style: str, label: str | None = None) -> bool:
    """Draw a metric by epoch; returns whether it is known for any epoch."""
    values = [row.get(name, math.nan) for row in history]
    known = not all(map(math.isnan, values))
    if known:
        axis.plot([row["epoch"] for row in history], values, style, color=color, marker="o", markersize=4, label=label)
    return known
