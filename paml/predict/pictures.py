"""Pictures for people: one photo with its maps, a single map as PNG, a reliability diagram."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from paml.explain.figures import CONTROL, colour, new_figure, plain_axes, save
from paml.explain.panel import COLOURS, OPACITY, draw_map, limit_of
from paml.metrics.calibration import Reliability
from paml.predict.predictor import Found


def draw_prediction(pixels: np.ndarray, found: Sequence[Found], maps: np.ndarray, path: str) -> None:
    """Draw to `path` (PNG) the photo, uint8 [H, W, 3], and the maps, float [n, h, w], of the n classes found.

    All maps have one scale of colours, so that a weak map looks weak. A class at or above its threshold is marked.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = pixels.shape[:2]
    panels = len(found) + 1
    columns = min(panels, 3 if panels % 3 == 0 else 4)
    rows = -(-panels // columns)
    side = 3.0
    figure = new_figure(side * columns + 0.7, rows * (min(2.0, max(0.5, height / width)) * side + 0.45))
    axes = figure.subplots(rows, columns, squeeze=False)
    limit = limit_of(list(maps))
    places = axes.ravel()
    places[0].imshow(pixels)
    places[0].set_title("photo", fontsize=11)
    for axis, one, scores in zip(places[1:], found, maps, strict=False):
        draw_map(axis, pixels, scores, limit)
        mark = {True: " ✓", False: "", None: ""}[one.above_threshold]
        axis.set_title(f"{one.name}  {one.score:.2f}{mark}", fontsize=11)
    for axis in places:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in places[panels:]:
        axis.set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(-limit, limit), COLOURS), ax=list(places), shrink=0.8)
    bar.set_label("attribution score; its average over the map is the logit", fontsize=8)
    save(figure, path)


def draw_reliability(curves: Mapping[str, Reliability], title: str, path: str) -> None:
    """Draw to `path` (PNG) what was said against what was true, bin by bin, and how many pairs were in each bin."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(10.5, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    left.plot([0, 1], [0, 1], color=CONTROL, linestyle="--", linewidth=1, label="perfect")
    bins = len(next(iter(curves.values())).count)
    edges = np.linspace(0, 1, bins + 1)
    for place, (name, curve) in enumerate(curves.items()):
        full = curve.count > 0
        label = f"{name}: error {100 * curve.error:.1f} %"
        left.plot(curve.said[full], curve.true[full], marker="o", markersize=4, color=colour(place), label=label)
        right.stairs(curve.count / max(1, curve.count.sum()), edges, color=colour(place), linewidth=1.6)
    left.set(xlabel="mean score of the bin", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    left.set_title("said and true", fontsize=10)
    right.set(xlabel="score", ylabel="share of the annotated pairs", xlim=(0, 1), yscale="log")
    right.set_title("how often it is said", fontsize=10)
    for axis in (left, right):
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        plain_axes(axis)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def map_png(pixels: np.ndarray, scores: np.ndarray, limit: float) -> bytes:
    """A map, float [h, w], over its picture, uint8 [H, W, 3], as PNG of H × W; colours range from -limit to limit."""
    import matplotlib
    from PIL import Image

    height, width = pixels.shape[:2]
    smooth = Image.fromarray(scores.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps[COLOURS]((np.asarray(smooth) / limit + 1) / 2)[:, :, :3]
    blend = (1 - OPACITY) * pixels + OPACITY * 255 * colours
    out = io.BytesIO()
    Image.fromarray(np.rint(blend).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
