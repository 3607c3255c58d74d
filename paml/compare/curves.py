"""Learning curves of a comparison: whether a budget was long enough for its rows, and which of them memorise."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paml.compare.grid import Row, Training
from paml.compare.table import finished, result_of
from paml.explain.figures import CONTROL, colour, new_figure, plain_axes, save

SHOWN = 7
"""Curves in colour; the others stay grey, so that one still sees where they lie."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Validation mAP of a row by epoch, over the seeds that are finished."""

    name: str
    maps: np.ndarray
    """float64 [seeds, epochs]; NaN where a seed has stopped earlier."""

    @property
    def best(self) -> float:
        """Of the mean over the seeds."""
        return float(np.nanmax(np.nanmean(self.maps, axis=0)))


def curves_of(rows: Sequence[Row], trainings: Mapping[str, Training]) -> list[Curve]:
    """Of every row that has a finished training, in the order of the rows; epochs of the head alone included."""
    found = []
    for row in rows:
        done = [trainings[name] for name in row.trainings.values() if finished(trainings[name])]
        curves = [_curve(training, row.alpha) for training in done]
        if curves:
            maps = np.full((len(curves), max(map(len, curves))), np.nan)
            for seed, curve in enumerate(curves):
                maps[seed, : len(curve)] = curve
            found.append(Curve(row.name, maps))
    return found


def _curve(training: Training, alpha: str) -> list[float]:
    first = f"{training.settings.boost.eval:g}" == alpha
    name = "val/map" if first else f"val/map_alpha_{alpha}"
    return [figures[name] for figures in result_of(training).history]


def draw_curves(curves: Sequence[Curve], always: Sequence[str], title: str, path: str) -> None:
    """A line a row to a PNG file, local or s3://, with a band from the lowest seed to the highest.

    always: rows that are in colour in any case; the best others join them.
    """
    ranked = sorted(curves, key=lambda curve: (curve.name not in always, -curve.best))[:SHOWN]
    shown = sorted(ranked, key=lambda curve: -curve.best)
    figure = new_figure(8.4, 4.6)
    axis = figure.subplots()
    for curve in curves:
        if curve not in ranked:
            axis.plot(
                np.arange(1, curve.maps.shape[1] + 1), 100 * _mean(curve), color=CONTROL, linewidth=0.7, alpha=0.5
            )
    for place, curve in enumerate(shown):
        epochs = np.arange(1, curve.maps.shape[1] + 1)
        axis.plot(
            epochs, 100 * _mean(curve), color=colour(place), linewidth=2, marker="o", markersize=3, label=curve.name
        )
        if len(curve.maps) > 1:
            low, high = 100 * np.nanmin(curve.maps, axis=0), 100 * np.nanmax(curve.maps, axis=0)
            axis.fill_between(epochs, low, high, color=colour(place), alpha=0.15, linewidth=0)
    seen = 100 * np.concatenate([_mean(curve) for curve in shown])
    room = 0.05 * (np.nanmax(seen) - np.nanmin(seen)) + 0.1
    axis.set_ylim(np.nanmin(seen) - room, np.nanmax(seen) + room)
    axis.set(xlabel="epoch", ylabel="validation mAP, %")
    axis.set_title(title, fontsize=11, loc="left")
    axis.xaxis.get_major_locator().set_params(integer=True)
    plain_axes(axis)
    figure.legend(loc="outside right upper", frameon=False, title="best first")
    save(figure, path)


def _mean(curve: Curve) -> np.ndarray:
    return np.nanmean(curve.maps, axis=0)
