"""Predictions drawn for people: one photo with its maps, or a single map as PNG."""

import io
from collections.abc import Sequence

import numpy as np

from paml.explain.figures import new_figure, save
from paml.explain.panel import COLOURS, OPACITY, draw_map, limit_of
from paml.predict.predictor import Found

_COLUMNS = 4


def draw_prediction(pixels: np.ndarray, found: Sequence[Found], maps: np.ndarray, path: str) -> None:
    """Draw to `path` (PNG) the photo, uint8 [H, W, 3], and the maps, float [n, h, w], of the n classes found.

    All maps have one scale of colours, so that a weak map looks weak. A class at or above its threshold is marked.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = pixels.shape[:2]
    columns = min(_COLUMNS, len(found) + 1)
    rows = -(-(len(found) + 1) // columns)
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
    for axis in places[len(found) + 1 :]:
        axis.set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(-limit, limit), COLOURS), ax=axes.tolist(), shrink=0.8)
    bar.set_label("attribution score; its average over the map is the logit", fontsize=8)
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
