"""Prediction of one image on the command line: a table of its top classes, and a plot of their maps."""

from collections.abc import Callable, Sequence

import numpy as np

from paml.data.decode import decode_rgb
from paml.inference.predictor import ClassPrediction, Predictor, read_image_file
from paml.plots import add_map_colorbar, draw_map, hide_ticks, map_limit, new_figure, save_figure


def predict_image(
    predictor: Predictor, path: str, *, top: int = 5, show: str | None = None, log: Callable[[str], None] = print
) -> list[ClassPrediction]:
    """Log the `top` classes of the image at `path` (local or s3://), and draw their maps to `show` (PNG).

    Each line has score, name, MID and whether the score reaches the class's threshold; the last line states whether
    the scores are calibrated. Raises DataError if the image is missing or cannot be decoded, StorageError.
    """
    output = predictor.forward(predictor.read_image(path)[None], with_maps=show is not None)
    predictions = predictor.top_classes(output.scores_BK[0], top)
    width = max(len(prediction.name) for prediction in predictions)
    for one in predictions:
        mark = "  above its threshold" if one.above_threshold else ""
        log(f"{one.score:.4f}  {one.name.ljust(width)}  {one.class_id}{mark}")
    if (calibration := predictor.calibration) is None:
        log("scores are not calibrated, and partial labels make them too low: run paml calibrate")
    else:
        threshold = calibration.threshold
        known = f"{np.isfinite(threshold).sum()} of {len(threshold)} classes have a threshold"
        log(f"scores are calibrated; {known} for precision {calibration.precision:g}")
    if show is not None and output.maps_BKHW is not None:
        maps = output.maps_BKHW[0][[prediction.index for prediction in predictions]]
        draw_prediction(decode_rgb(read_image_file(path)), predictions, maps, show)
        log(f"wrote {show}")
    return predictions


def draw_prediction(pixels: np.ndarray, predictions: Sequence[ClassPrediction], maps: np.ndarray, path: str) -> None:
    """Draw to `path` (PNG) an image, uint8 [H, W, 3], and the maps, float [n, h, w], of its n predicted classes.

    All maps share one color scale. A check mark shows that a class reaches its threshold.
    """
    height, width = pixels.shape[:2]
    panels = len(predictions) + 1
    columns = min(panels, 3 if panels % 3 == 0 else 4)
    rows = -(-panels // columns)
    side = 3.0
    figure = new_figure(side * columns + 0.7, rows * (min(2.0, max(0.5, height / width)) * side + 0.45))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    limit = map_limit(list(maps))
    grid[0].imshow(pixels)
    grid[0].set_title("Image", fontsize=11)
    for axis, prediction, scores in zip(grid[1:], predictions, maps, strict=False):
        draw_map(axis, pixels, scores, limit)
        mark = " ✓" if prediction.above_threshold else ""
        axis.set_title(f"{prediction.name}  {prediction.score:.2f}{mark}", fontsize=11)
    for axis in grid:
        hide_ticks(axis)
    for axis in grid[panels:]:
        axis.set_visible(False)
    add_map_colorbar(figure, grid, limit, "attribution score (mean over the map = logit)")
    save_figure(figure, path)
