"""Plots without a display, in one style; overlays of class activation maps on images."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from paml import storage

COLORS = ("#1f4e9c", "#d94801", "#e6a800", "#238b45", "#7b3294", "#1a9bb5", "#c51b7d", "#666666")
CONTROL_COLOR = "#9a9a9a"
MAP_COLORMAP = "coolwarm"
MAP_OPACITY = 0.6


def run_color(position: int) -> str:
    """The color of the run at a position, the same in every plot; colors repeat after the last."""
    return COLORS[position % len(COLORS)]


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty matplotlib figure; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str) -> None:
    """Write the figure as a PNG file, local or remote."""
    with storage.replacing(path) as local:
        figure.savefig(local, format="png")


def style_axes(axis: Any) -> None:
    """Remove the frame's top and right sides and draw a light grid behind the data."""
    axis.grid(color="#e2e2e2", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def hide_ticks(axis: Any) -> None:
    """Remove the ticks of an axis that shows an image."""
    axis.set_xticks([])
    axis.set_yticks([])


def map_limit(maps: Sequence[np.ndarray]) -> float:
    """The end of a color scale shared by several maps: their largest absolute value."""
    return max(1e-6, max(float(np.abs(scores).max()) for scores in maps))


def draw_map(axis: Any, pixels: np.ndarray, scores: np.ndarray, limit: float) -> None:
    """Draw a map, float [h, w], over its image, uint8 [H, W, 3]; the color scale ranges from -limit to limit."""
    height, width = pixels.shape[:2]
    axis.imshow(pixels)
    axis.imshow(
        scores,
        alpha=MAP_OPACITY,
        interpolation="bilinear",
        cmap=MAP_COLORMAP,
        vmin=-limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def add_map_colorbar(figure: Any, axes: Sequence[Any], limit: float, label: str, **style: Any) -> None:
    """Add the color bar of maps drawn on `axes` with the same limit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-limit, limit), MAP_COLORMAP)
    figure.colorbar(scale, ax=list(axes), shrink=0.8, **style).set_label(label, fontsize=8)


def map_png(pixels: np.ndarray, scores: np.ndarray, limit: float) -> bytes:
    """A map, float [h, w], over its image, uint8 [H, W, 3], as PNG of H × W; the scale ranges from -limit to limit."""
    import matplotlib
    from PIL import Image

    height, width = pixels.shape[:2]
    resized = Image.fromarray(scores.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    colors = matplotlib.colormaps[MAP_COLORMAP]((np.asarray(resized) / limit + 1) / 2)[:, :, :3]
    blend = (1 - MAP_OPACITY) * pixels + MAP_OPACITY * 255 * colors
    out = io.BytesIO()
    Image.fromarray(np.rint(blend).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()
