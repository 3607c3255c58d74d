"""Panels of labels: each run's map of a label side by side, on one color scale."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paml.models.boost import boost_lu
from paml.models.cam import pool_logits
from paml.plots import add_map_colorbar, draw_map, hide_ticks, map_limit, new_figure, save_figure
from paml.runs.spec import OpenRun


@dataclasses.dataclass(frozen=True)
class PanelRow:
    """One label of a panel."""

    pixels: np.ndarray
    """uint8 [S, S, 3]."""
    name: str
    maps: list[tuple[np.ndarray, float]]
    """For each run the map [H, W], boosted as in scoring, and the logit."""


def boosted_map(run: OpenRun, pixels: np.ndarray, cls: int) -> tuple[np.ndarray, float]:
    """(map float32 [H, W], boosted as in scoring, and logit) of class `cls` for one image, uint8 [S, S, 3]."""
    maps_BKHW = run.maps(torch.from_numpy(pixels)[None])
    logit = float(pool_logits(maps_BKHW, run.alpha)[0, cls])
    return boost_lu(maps_BKHW[0, cls], run.alpha).cpu().numpy(), logit


def draw_map_panel(titles: Sequence[str], rows: Sequence[PanelRow], path: str) -> None:
    """Draw a grid of labels × runs to `path` (PNG).

    Each row has one color scale, so a weak map looks weak. It ends at the median of the runs' largest absolute scores;
    larger scores are clipped to it.
    """
    figure = new_figure(2.4 * (len(titles) + 1) + 0.6, 2.5 * len(rows) + 0.3)
    draw_rows(figure, titles, rows)
    save_figure(figure, path)


def choose_labels(priority: np.ndarray, cls: np.ndarray, count: int) -> list[int]:
    """Positions of the `count` labels of highest priority; one of each class comes before a second of any class."""
    seen: set[int] = set()
    first, repeated = [], []
    for position in np.argsort(-priority, kind="stable").tolist():
        (repeated if int(cls[position]) in seen else first).append(position)
        seen.add(int(cls[position]))
    return (first + repeated)[:count]


def draw_rows(figure: Any, titles: Sequence[str], rows: Sequence[PanelRow]) -> None:
    """Draw a grid of labels × runs on a figure, as `draw_map_panel`."""
    axes = figure.subplots(len(rows), len(titles) + 1, squeeze=False)
    for i, (row_axes, row) in enumerate(zip(axes, rows, strict=True)):
        # The median, because one map that is boosted far beyond the others would make them invisible.
        limit = float(np.median([map_limit([scores]) for scores, _ in row.maps]))
        row_axes[0].imshow(row.pixels)
        row_axes[0].set_title(row.name, fontsize=10)
        for axis, title, (scores, logit) in zip(row_axes[1:], titles, row.maps, strict=True):
            draw_map(axis, row.pixels, scores, limit)
            score = f"p = {1 / (1 + np.exp(-logit)):.2f}"
            axis.set_title(f"{title}\n{score}" if i == 0 else score, fontsize=10)
        add_map_colorbar(figure, row_axes, limit, "attribution score", extend="both")
        for axis in row_axes:
            hide_ticks(axis)
