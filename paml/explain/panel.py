"""Pictures of labels: what each run's map of a label looks like, on one scale of colours."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paml.data.decode import decode_rgb
from paml.explain.figures import new_figure, save
from paml.explain.runs import OpenRun
from paml.labels.states import POSITIVE
from paml.models.boost import boost_lu
from paml.models.cam import pool_logits
from paml.shards.reader import ShardReader
from paml.training.data import Split

COLOURS = "coolwarm"
OPACITY = 0.6
"""Of a map over its picture."""


@dataclasses.dataclass(frozen=True)
class PanelRow:
    """One label of a panel."""

    pixels: np.ndarray
    """uint8 [S, S, 3]."""
    name: str
    maps: list[tuple[np.ndarray, float]]
    """For each run its map [H, W] as boosted in scoring, and the logit."""


def boosted_map(run: OpenRun, pixels: np.ndarray, cls: int) -> tuple[np.ndarray, float]:
    """(map float32 [H, W] as boosted in scoring, logit) of class `cls` for one picture, uint8 [S, S, 3]."""
    maps_BKHW = run.maps(torch.from_numpy(pixels)[None])
    logit = float(pool_logits(maps_BKHW, run.alpha)[0, cls])
    return boost_lu(maps_BKHW[0, cls], run.alpha).cpu().numpy(), logit


def panel_row(runs: Sequence[OpenRun], pixels: np.ndarray, cls: int, name: str) -> PanelRow:
    """The maps of one label by every run."""
    return PanelRow(pixels, name, [boosted_map(run, pixels, cls) for run in runs])


def draw_map_panel(titles: Sequence[str], rows: Sequence[PanelRow], path: str) -> None:
    """Draw labels to `path` (PNG): picture × runs, one scale of colours a row, so that a weak map looks weak.

    The scale ends at the median of the runs' largest absolute scores; what lies beyond has the colour of its end.
    """
    figure = new_figure(2.4 * (len(titles) + 1) + 0.6, 2.5 * len(rows) + 0.3)
    _draw_rows(figure, titles, rows)
    save(figure, path)


def draw_panel(runs: Sequence[OpenRun], split: Split, path: str, *, examples: int = 3, seed: int = 0) -> None:
    """Draw to `path` (PNG): above the curves by epoch, below `examples` labels with each run's map of them.

    The labels are positives of the split that the last run scores well above the first.
    """
    rows = _examples(runs, split, examples, seed)
    figure = new_figure(3.0 * (len(runs) + 1), 3.4 + 2.6 * examples)
    above, below = figure.subfigures(2, 1, height_ratios=(3.4, 2.6 * examples))
    _curves(above, runs)
    _draw_rows(below, [run.title for run in runs], rows)
    save(figure, path)


def choose_labels(worth: np.ndarray, cls: np.ndarray, count: int) -> list[int]:
    """Places of the `count` labels worth most, one of each class first."""
    order = np.argsort(-worth, kind="stable").tolist()
    seen: set[int] = set()
    first, again = [], []
    for place in order:
        (again if int(cls[place]) in seen else first).append(place)
        seen.add(int(cls[place]))
    return (first + again)[:count]


def limit_of(maps: Sequence[np.ndarray]) -> float:
    """The end of one scale of colours for several maps: their largest absolute value."""
    return max(1e-6, max(float(np.abs(scores).max()) for scores in maps))


def draw_map(axis: Any, pixels: np.ndarray, scores: np.ndarray, limit: float) -> None:
    """A map, float [h, w], laid over its picture, uint8 [H, W, 3]; colours range from -limit to limit."""
    height, width = pixels.shape[:2]
    axis.imshow(pixels)
    axis.imshow(
        scores,
        alpha=OPACITY,
        interpolation="bilinear",
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def _draw_rows(figure, titles: Sequence[str], rows: Sequence[PanelRow]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots(len(rows), len(titles) + 1, squeeze=False)
    for place, (line, row) in enumerate(zip(axes, rows, strict=True)):
        # The median of the runs' own ends: one map that is boosted far beyond the others must not fade them all.
        limit = float(np.median([limit_of([scores]) for scores, _ in row.maps]))
        line[0].imshow(row.pixels)
        line[0].set_title(row.name, fontsize=10)
        for axis, title, (scores, logit) in zip(line[1:], titles, row.maps, strict=True):
            draw_map(axis, row.pixels, scores, limit)
            score = f"p = {1 / (1 + np.exp(-logit)):.2f}"
            axis.set_title(f"{title}\n{score}" if place == 0 else score, fontsize=10)
        scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
        figure.colorbar(scale, ax=list(line), shrink=0.8, extend="both")
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])


def _curves(figure, runs: Sequence[OpenRun]) -> None:
    from matplotlib.ticker import MaxNLocator

    score, rejected = figure.subplots(1, 2)
    for run in runs:
        epochs = [figures["epoch"] for figures in run.history]
        score.plot(epochs, [100 * f["val/map"] for f in run.history], marker="o", label=run.title)
        if "rejection/rejected" not in run.history[-1]:
            continue
        rejected.bar(epochs, [f["rejection/rejected"] for f in run.history], label="rejected", color="0.75")
        if "rejection/rejected_false_negatives" in run.history[-1]:
            true = [f["rejection/rejected_false_negatives"] for f in run.history]
            rejected.bar(epochs, true, label="truly false negatives", color="tab:green")
            rejected.set_title(f"{run.title}: labels rejected", fontsize=10)
    score.set(xlabel="epoch", ylabel="validation mAP, %")
    score.legend(fontsize=9)
    rejected.set(xlabel="epoch")
    for axis in (score, rejected):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if rejected.patches:
        rejected.legend(fontsize=9)


def _examples(runs: Sequence[OpenRun], split: Split, count: int, seed: int) -> list[PanelRow]:
    """Of some pictures the positive that the last run scores most above the first; the best of them."""
    reader = ShardReader(split.manifest)
    drawn = np.random.default_rng(seed).permutation(len(split.samples))[:120]
    found: list[tuple[float, np.ndarray, int]] = []
    for sample in drawn:
        labels = split.table.lookup(split.samples.row[[sample]])
        positives = labels.cls[labels.state == POSITIVE]
        if not len(positives):
            continue
        pixels = decode_rgb(reader.read(int(split.samples.index[sample])))
        images = torch.from_numpy(pixels)[None]
        chances = [pool_logits(run.maps(images), run.alpha)[0, positives].sigmoid() for run in (runs[0], runs[-1])]
        gain = (chances[1] - chances[0]).cpu().numpy()
        best = int(gain.argmax())
        found.append((float(gain[best]), pixels, int(positives[best])))
    chosen = choose_labels(np.array([gain for gain, *_ in found]), np.array([cls for *_, cls in found]), count)
    return [panel_row(runs, found[at][1], found[at][2], split.table.names[found[at][2]]) for at in chosen]
