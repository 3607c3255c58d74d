"""Pictures of a sweep: parallel coordinates, importance of its settings, score against each setting.

A trial's score is its best validation mAP, in percent; that of a stopped trial is what it had reached by then.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from paml.compare.space import Axis
from paml.compare.trials import Sweep, Trial, shown

LEAST_FOR_IMPORTANCE = 10
_DARK, _SOFT, _GRID = "#08519c", "#9ecae1", "#dddddd"
_NEUTRAL = "#525252"
_COLOURS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#e6a800", "#8c510a")
_BINS = 6
_COLUMNS = 3
_TREES, _REPEATS = 300, 30


def draw_pictures(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, bytes]:
    """Name -> PNG file. Fewer than two trials with a score make none, fewer than ten no importance."""
    scored = [trial for trial in trials if trial.scores]
    axes = sorted(sweep.axes, key=_rank)
    if len(scored) < 2:
        return {}
    pictures = {
        "parallel_coordinates.png": _parallel(axes, scored),
        "score_by_setting.png": _score_by_setting(axes, scored),
    }
    if len(scored) >= LEAST_FOR_IMPORTANCE:
        pictures["importance.png"] = _draw_importance(*importance(axes, scored))
    return pictures


def importance(axes: Sequence[Axis], trials: Sequence[Trial]) -> tuple[dict[str, tuple[float, float]], float]:
    """Name of each axis -> (mean, standard deviation) of its importance; and the forest's own worth.

    Permutation importance (Breiman, 2001) of a random forest of scores: how much of R² is lost when an axis' values are
    shuffled among the trials. The second figure is R² on the trials that each tree has not seen; at 0 or below it
    explains nothing. `trials` are those that have a score.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    points = np.stack([[_place(axis, trial.point[axis.name]) for axis in axes] for trial in trials])
    scores = np.array([trial.score for trial in trials])
    forest = RandomForestRegressor(_TREES, min_samples_leaf=2, oob_score=True, random_state=0).fit(points, scores)
    found = permutation_importance(forest, points, scores, n_repeats=_REPEATS, random_state=0)
    pairs = zip(found["importances_mean"].tolist(), found["importances_std"].tolist(), strict=True)
    return dict(zip((axis.name for axis in axes), pairs, strict=True)), float(forest.oob_score_)


def _rank(axis: Axis) -> int:
    """alpha and the reject rate first, as in the papers."""
    first = ("boost.train", "loss.reject_rate_step")
    return min((first.index(name) for name in axis.names if name in first), default=len(first))


def _numeric(axis: Axis) -> bool:
    return axis.kind != "choice" or all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis.values
    )


def _log(axis: Axis) -> bool:
    """Drawn by orders of magnitude."""
    if axis.kind == "choice":
        values = [value for value in axis.values if isinstance(value, (int, float))]
        return _numeric(axis) and min(values) > 0 and max(values) / min(values) > 20
    return axis.kind == "log_uniform"


def _place(axis: Axis, value: Any) -> float:
    """Where a value lies on its axis: a number (its logarithm), or the place in the list."""
    if not _numeric(axis):
        return float(axis.values.index(value))
    return math.log10(value) if _log(axis) else float(value)


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.kind == "choice":
        return [(_place(axis, value), shown(value)) for value in axis.values]
    values = np.linspace(axis.low, axis.high, 5).tolist()
    if axis.kind == "log_uniform":  # the ends, and what is round between them with room on both sides
        room = (axis.high / axis.low) ** 0.12
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        rounded = [digit * 10.0**decade for decade in decades for digit in (1, 3)]
        values = [axis.low, *(v for v in rounded if axis.low * room < v < axis.high / room), axis.high]
    return [(_place(axis, value), f"{value:.3g}") for value in values]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _bare(plot: Any) -> None:
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    plot.set_axisbelow(True)


def _label(axis: Axis) -> str:
    return "\n".join(axis.names)


def _parallel(axes: Sequence[Axis], trials: Sequence[Trial]) -> bytes:
    """A line a trial, from axis to axis to its score; the best lie on top."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = _figure(2.2 * (len(axes) + 1) + 1.5, 5)
    plot = figure.add_subplot()
    scores = [100 * trial.score for trial in trials]
    low, high = min(scores), max(scores)
    scale: Any = ScalarMappable(Normalize(low, high if high > low else low + 1), "viridis")
    spans = [(min(p for p, _ in _ticks(axis)), max(p for p, _ in _ticks(axis))) for axis in axes]
    for trial in sorted(trials, key=lambda trial: trial.score):
        places = [
            (_place(axis, trial.point[axis.name]) - start) / (end - start) if end > start else 0.5
            for axis, (start, end) in zip(axes, spans, strict=True)
        ]
        places.append((100 * trial.score - low) / (high - low) if high > low else 0.5)
        whole = trial.state == "finished"
        plot.plot(
            range(len(places)),
            places,
            color=scale.to_rgba(100 * trial.score),
            linewidth=1.8 if whole else 0.9,
            linestyle="-" if whole else (0, (4, 2)),
            alpha=0.95 if whole else 0.55,
        )
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8}
    for place, (axis, (start, end)) in enumerate(zip(axes, spans, strict=True)):
        plot.axvline(place, color="black", linewidth=0.8)
        for at, text in _ticks(axis):
            height = (at - start) / (end - start) if end > start else 0.5
            plot.text(place + 0.03, height, text, fontsize=8, va="center", bbox=halo)
    plot.axvline(len(axes), color="black", linewidth=0.8)
    for share in np.linspace(0, 1, 5):
        plot.text(len(axes) + 0.03, share, f"{low + share * (high - low):.1f}", fontsize=8, va="center", bbox=halo)
    plot.set_xticks(range(len(axes) + 1), [*map(_label, axes), "val mAP, %"])
    plot.set_xlim(-0.1, len(axes) + 0.35)
    plot.set_yticks([])
    for side in ("top", "right", "left", "bottom"):
        plot.spines[side].set_visible(False)
    plot.tick_params(axis="x", length=0)
    plot.set_title(
        f"{len(trials)} trials (dashed: stopped early, by what they had reached)", loc="left", fontweight="bold"
    )
    return _png(figure)


def _score_by_setting(axes: Sequence[Axis], trials: Sequence[Trial]) -> bytes:
    """A panel a setting; the line joins the best of each value, of a range the best of each sixth."""
    columns = min(len(axes), _COLUMNS)
    rows = -(-len(axes) // columns)
    figure = _figure(4.6 * columns, 3.6 * rows + 0.5)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
    schemes = [axis for axis in axes if not _numeric(axis) and 1 < len(axis.values) <= len(_COLOURS)]
    by = next((axis for axis in schemes if "loss.name" in axis.names), None)
    groups: list[tuple[Any, str]] = [(None, _DARK)] if by is None else list(zip(by.values, _COLOURS, strict=False))
    for panel, axis in zip(panels, axes, strict=False):
        _bare(panel)
        panel.grid(color=_GRID, linewidth=0.8)
        for value, colour in groups:
            own = [trial for trial in trials if by is None or trial.point[by.name] == value]
            for state, face in (("finished", colour), ("other", "none")):
                shown_here = [trial for trial in own if (trial.state == "finished") == (state == "finished")]
                panel.scatter(
                    [_place(axis, trial.point[axis.name]) for trial in shown_here],
                    [100 * trial.score for trial in shown_here],
                    s=26,
                    facecolors=face,
                    edgecolors=colour,
                    linewidths=1,
                    alpha=0.9,
                    zorder=3,
                )
            if axis is not by and own:
                places, tops = _tops(axis, own)
                panel.plot(places, tops, color=colour, linewidth=1.6, alpha=0.8, zorder=2)
        ticks = _ticks(axis)
        long = len(ticks) > 6 or any(len(text) > 8 for _, text in ticks)
        panel.set_xticks([at for at, _ in ticks], [text for _, text in ticks], rotation=30 if long else 0)
        panel.set_xlabel(", ".join(axis.names))
    for panel in panels[::columns]:
        panel.set_ylabel("val mAP, %")
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    _legend(figure, groups, by)
    figure.suptitle("Validation mAP against each setting", x=0.01, ha="left", fontweight="bold")
    return _png(figure)


def _legend(figure: Any, groups: Sequence[tuple[Any, str]], by: Axis | None) -> None:
    from matplotlib.lines import Line2D

    def dot(colour: str, face: str, text: str) -> Any:
        return Line2D([], [], linestyle="", marker="o", color=colour, markerfacecolor=face, label=text)

    handles = [dot(colour, colour, shown(value)) for value, colour in groups if by is not None]
    neutral = _DARK if by is None else _NEUTRAL
    handles += [dot(neutral, neutral, "finished"), dot(neutral, "none", "stopped early, or failed later")]
    handles.append(Line2D([], [], color=neutral, label="best of the value, or of a sixth of the range"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _tops(axis: Axis, trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """Places along an axis and the best score, in percent, at each."""
    found: dict[float, tuple[float, float]] = {}
    low, high = (_place(axis, end) for end in (axis.ends[0], axis.ends[-1]))
    for trial in trials:
        place = bin_ = _place(axis, trial.point[axis.name])
        if axis.grid is None or len(axis.grid) > 2 * _BINS:
            bin_ = min(_BINS - 1, math.floor((place - low) / (high - low) * _BINS))
        found[bin_] = max(found.get(bin_, (-math.inf, place)), (100 * trial.score, place))
    tops = sorted((place, score) for score, place in found.values())
    return [place for place, _ in tops], [score for _, score in tops]


def _draw_importance(found: dict[str, tuple[float, float]], trust: float) -> bytes:
    figure = _figure(8, 1.6 + 0.5 * len(found))
    plot = figure.add_subplot()
    _bare(plot)
    ordered = sorted(found.items(), key=lambda one: one[1][0])
    means = [mean for _, (mean, _) in ordered]
    plot.barh(range(len(ordered)), means, xerr=[std for _, (_, std) in ordered], color=_SOFT, ecolor=_DARK, height=0.6)
    plot.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    plot.grid(axis="x", color=_GRID, linewidth=0.8)
    plot.set_xlabel(
        f"R² lost when the setting is shuffled among trials\n(random forest; its R² on unseen trials: {trust:.2f})"
    )
    plot.set_title("Importance by permutation", loc="left", fontweight="bold")
    return _png(figure)
