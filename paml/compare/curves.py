"""Learning curves of a comparison: whether the budget was long enough, and which rows overfit."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from paml.compare.grid import Row
from paml.plots import CONTROL_COLOR, new_figure, run_color, save_figure, style_axes
from paml.runs.folder import is_finished, read_result

COLORED = 7
"""Curves in color; the others are gray."""


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Validation mAP of a row by epoch, over its finished seeds."""

    name: str
    maps: np.ndarray
    """float64 [seeds, epochs]; NaN after a seed's last epoch."""

    @property
    def mean(self) -> np.ndarray:
        """float64 [epochs]: mean over the seeds."""
        return np.nanmean(self.maps, axis=0)

    @property
    def best(self) -> float:
        """Highest mean over the seeds."""
        return float(np.nanmax(self.mean))


def read_curves(rows: Iterable[Row]) -> list[Curve]:
    """The curves of all rows with a finished training, in order, with epochs that train the head alone."""
    curves = []
    for row in rows:
        seeds = []
        for training in row.trainings.values():
            if is_finished(training.folder):
                suffix = "" if f"{training.settings.boost.eval:g}" == row.alpha else f"_alpha_{row.alpha}"
                seeds.append([metrics[f"val/mAP{suffix}"] for metrics in read_result(training.folder).history])
        if seeds:
            maps = np.array(list(itertools.zip_longest(*seeds, fillvalue=np.nan)), float).T
            curves.append(Curve(row.name, maps))
    return curves


def draw_curves(curves: Sequence[Curve], always: Sequence[str], title: str, path: str) -> None:
    """Draw one line per row into a PNG file, local or s3://, with a band from the lowest to the highest seed.

    always: rows that are colored in any case, together with the best others.
    """
    colored = sorted(curves, key=lambda curve: (curve.name not in always, -curve.best))[:COLORED]
    colored.sort(key=lambda curve: -curve.best)
    figure = new_figure(8.4, 4.6)
    axis = figure.subplots()
    for curve in curves:
        epochs = np.arange(1, curve.maps.shape[1] + 1)
        if curve not in colored:
            axis.plot(epochs, 100 * curve.mean, color=CONTROL_COLOR, linewidth=0.7, alpha=0.5)
    for position, curve in enumerate(colored):
        epochs, color = np.arange(1, curve.maps.shape[1] + 1), run_color(position)
        axis.plot(epochs, 100 * curve.mean, color=color, linewidth=2, marker="o", markersize=3, label=curve.name)
        if len(curve.maps) > 1:
            low, high = 100 * np.nanmin(curve.maps, axis=0), 100 * np.nanmax(curve.maps, axis=0)
            axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    values = 100 * np.concatenate([curve.mean for curve in colored])
    margin = 0.05 * (np.nanmax(values) - np.nanmin(values)) + 0.1
    axis.set_ylim(np.nanmin(values) - margin, np.nanmax(values) + margin)
    axis.set(xlabel="Epoch", ylabel="Validation mAP, %")
    axis.set_title(title, fontsize=11, loc="left")
    axis.xaxis.get_major_locator().set_params(integer=True)
    style_axes(axis)
    figure.legend(loc="outside right upper", frameon=False, title="Best first")
    save_figure(figure, path)
