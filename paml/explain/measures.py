"""Metrics of class activation maps: similarity of two maps of a label, extremes of a map, agreement with boxes.

Pure functions of n maps, float [n, H, W], computed in float64. Kim et al. (CVPR 2023, section 3) compare maps by rank
correlation and by the means of their top and bottom 5 %. Their code for this analysis is not public, so CONVENTION
states every choice that the paper leaves open.

BoostLU is strictly increasing and multiplies all positive scores by the same factor. It changes neither ranks
(`spearman`) nor the position of the maximum nor the box at a fraction of a positive maximum, only metrics that depend
on scale.
"""

from fractions import Fraction

import numpy as np

CONVENTION = (
    "spearman: averaged ranks for ties, NaN if a map is constant; "
    "control: correlation with exp(-x²/(2 (W/4)²) - y²/(2 (H/4)²)) around the map's center; "
    "top and bottom: mean of the k largest and k smallest scores, k = max(1, 5 % of H·W rounded half to even); "
    "concordance: Lin (1989), moments divided by H·W, NaN if both maps are the same constant; "
    "pointing: center of the first maximal cell is in a box of the class, borders included; "
    "box IoU: map resized bilinearly to the image, pixels of at least 0.2 times its maximum, best pair of a "
    "box around one of their 8-connected components and a box of the class, 0 if the maximum is not above 0"
)
"""Definitions of the metrics, stored with the results."""


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: Spearman's rank correlation of each pair of maps; NaN if one of them is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(_flat(maps), axis=1) for maps in np.broadcast_arrays(first, second))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)), -1.0, 1.0)


def concordance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: Lin's concordance correlation, 2·cov / (var + var + (difference of means)²), in [-1, 1].

    1 only for equal maps: unlike a rank correlation it decreases if one map is shifted or scaled. Moments are divided
    by H·W (Lin 1989). 0 if one map is constant, NaN if both are the same constant.
    """
    x, y = _flat(first), _flat(second)
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    bias = (x.mean(1) - y.mean(1)) ** 2
    with np.errstate(invalid="ignore"):
        return 2 * (dx * dy).mean(1) / ((dx * dx).mean(1) + (dy * dy).mean(1) + bias)


def tail_means(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(top float64 [n], bottom float64 [n]): means of the largest and smallest 5 % of each map's scores."""
    ordered = np.sort(_flat(maps), axis=1)
    count = max(1, round(Fraction(ordered.shape[1], 20)))
    return ordered[:, -count:].mean(1), ordered[:, :count].mean(1)


def centered_gaussian(height: int, width: int) -> np.ndarray:
    """float64 [H, W]: the control map, a centered Gaussian whose standard deviation is a quarter of each side.

    A rank correlation depends on the order of the values only, so on square maps the width does not matter.
    """
    y, x = (2 * np.arange(side) + 1 - side for side in (height, width))  # integers, so mirrored cells tie exactly
    return np.exp(-2 * ((y / height) ** 2)[:, None] - 2 * ((x / width) ** 2)[None, :])


def pointing_hits(maps: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """bool [n]: whether the center of each map's first maximal cell is in one of its boxes (the pointing game).

    boxes: for each map float64 [b, 4] of x_min, x_max, y_min, y_max as fractions of the image's sides; borders count.
    """
    height, width = maps.shape[1:]
    row, column = np.divmod(_flat(maps).argmax(1), width)
    hits = np.zeros(len(maps), bool)
    for i, (x_min, x_max, y_min, y_max) in enumerate(box.T for box in boxes):
        x, y = (column[i] + 0.5) / width, (row[i] + 0.5) / height
        hits[i] = ((x_min <= x) & (x <= x_max) & (y_min <= y) & (y <= y_max)).any()
    return hits


def best_box_iou(maps: np.ndarray, boxes: list[np.ndarray], *, size: int, threshold: float = 0.2) -> np.ndarray:
    """float64 [n]: the best intersection over union of a box drawn around part of each map with one of its boxes.

    The map is resized bilinearly to `size` × `size` pixels. A box is drawn around each 8-connected component of the
    pixels of at least `threshold` times its maximum, and the best pair counts, as in MaxBoxAccV2 (Choe et al., CVPR
    2020). 0 for a map without a positive score. boxes: as in `pointing_hits`.
    """
    import torch
    from scipy import ndimage
    from torchvision.ops import box_iou

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float64))[:, None], size=(size, size), mode="bilinear"
    ).numpy()[:, 0]
    best = np.zeros(len(maps))
    for i, (scores, true_boxes) in enumerate(zip(resized, boxes, strict=True)):
        if scores.max() <= 0:
            continue
        components = np.zeros(scores.shape, np.int32)
        ndimage.label(scores >= threshold * scores.max(), structure=np.ones((3, 3), int), output=components)
        slices = ndimage.find_objects(components)
        predicted_boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices]) / size
        true_corners = true_boxes[:, [0, 2, 1, 3]]  # torchvision's order: x_min, y_min, x_max, y_max
        best[i] = float(box_iou(torch.from_numpy(predicted_boxes), torch.from_numpy(true_corners)).max())
    return best


def _flat(maps: np.ndarray) -> np.ndarray:
    """float64 [n, H·W]."""
    return np.asarray(maps, dtype=np.float64).reshape(len(maps), -1)
