"""Figures of class activation maps: how alike two maps of a label are, how large a map's ends are, where it points.

Pure functions of n maps at a time, float [n, H, W], computed in float64. Kim et al. (CVPR 2023, section 3) compare
maps by rank correlation and by the mean of their top and bottom 5 %; their code for it is not public, so every rule
that they leave open is stated here.

BoostLU is strictly increasing and multiplies all positive scores alike. So it changes neither ranks (`spearman`),
nor the place of the maximum, nor the box at a share of a positive maximum; only figures that see scale can change.
"""

from fractions import Fraction

import numpy as np

END_SHARE = Fraction(1, 20)
"""Of the scores that are a map's top or its bottom."""

CONVENTION = (
    "spearman: averaged ranks for ties, NaN where a map is constant; "
    "control: against exp(-x²/(2 (W/4)²) - y²/(2 (H/4)²)) about the map's centre; "
    "top and bottom: mean of the k largest and k smallest scores, k = max(1, 5 % of H·W rounded half to even); "
    "concordance: Lin (1989), moments divided by H·W, NaN where both maps are the same constant; "
    "pointing: centre of the first maximal cell within a box of the class, borders included; "
    "box IoU: map enlarged bilinearly to the image, pixels of at least box_share of its maximum, best of the boxes "
    "around its 8-connected parts with a box of the class, 0 where the maximum is not above 0"
)
"""What the figures mean, written beside them."""


def end_count(height: int, width: int) -> int:
    """k: how many scores are 5 % of a map, max(1, H·W / 20 rounded half to even), in exact arithmetic."""
    return max(1, round(END_SHARE * height * width))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """float64 [n, P]: the rank from 0 of each of P values in its row; equal values share the mean of their ranks."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    places = np.arange(values.shape[1])
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(new, places, 0), axis=1)
    ends = np.roll(new, -1, axis=1)
    ends[:, -1] = True
    last = np.minimum.accumulate(np.where(ends, places, len(places))[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: Spearman's rank correlation of each pair of maps; NaN where one of them is constant."""
    x, y = (average_ranks(_rows(maps)) for maps in np.broadcast_arrays(first, second))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)), -1.0, 1.0)


def concordance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: Lin's concordance correlation, 2·cov / (var + var + (difference of means)²), in [-1, 1].

    1 only for equal maps: unlike a rank correlation it falls when one map is shifted or scaled. Moments are divided
    by H·W (Lin 1989). 0 where one map is constant, NaN where both are the same constant.
    """
    x, y = _rows(first), _rows(second)
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    apart = (x.mean(1) - y.mean(1)) ** 2
    with np.errstate(invalid="ignore"):
        return 2 * (dx * dy).mean(1) / ((dx * dx).mean(1) + (dy * dy).mean(1) + apart)


def mean_absolute_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: mean of |first - second| over the cells, in attribution scores."""
    return np.abs(_rows(first) - _rows(second)).mean(1)


def end_means(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(top float64 [n], bottom float64 [n]): means of each map's `end_count` largest and smallest scores."""
    ordered, count = np.sort(_rows(maps), axis=1), end_count(*maps.shape[1:])
    return ordered[:, -count:].mean(1), ordered[:, :count].mean(1)


def centred_gaussian(height: int, width: int) -> np.ndarray:
    """float64 [H, W]: the control, a Gaussian about the map's centre, its deviation a quarter of each side.

    A rank correlation sees only the order of its values, so on square maps no other width would change it.
    """
    y, x = (2 * np.arange(side) + 1 - side for side in (height, width))  # whole numbers: mirrored cells tie exactly
    return np.exp(-2 * ((y / height) ** 2)[:, None] - 2 * ((x / width) ** 2)[None, :])


def points_into(maps: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """bool [n]: whether the centre of each map's first maximal cell lies within one of its boxes (pointing game).

    boxes: for each map float64 [b, 4] of x_min, x_max, y_min, y_max as shares of the picture's sides. Borders count.
    """
    width = maps.shape[2]
    y, x = np.divmod(_rows(maps).argmax(1), width)
    hits = np.zeros(len(maps), bool)
    for place, own in enumerate(boxes):
        at_x, at_y = (x[place] + 0.5) / width, (y[place] + 0.5) / maps.shape[1]
        hits[place] = ((own[:, 0] <= at_x) & (at_x <= own[:, 1]) & (own[:, 2] <= at_y) & (at_y <= own[:, 3])).any()
    return hits


def best_box_iou(maps: np.ndarray, boxes: list[np.ndarray], *, share: float, size: int) -> np.ndarray:
    """float64 [n]: the best overlap (intersection over union) of a box found in each map with one of its boxes.

    The map is enlarged bilinearly to `size` × `size` pixels; pixels of at least `share` of its maximum are kept; a box
    is drawn around each of their 8-connected parts, and the best pair counts (after Choe et al., CVPR 2020, and their
    MaxBoxAccV2). A map without a positive score finds no box: 0. boxes as in `points_into`.
    """
    import torch
    from scipy import ndimage

    grown = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float64))[:, None], size=(size, size), mode="bilinear"
    ).numpy()[:, 0]
    best = np.zeros(len(maps))
    for place, (scores, own) in enumerate(zip(grown, boxes, strict=True)):
        if scores.max() <= 0:
            continue
        parts = np.zeros(scores.shape, np.int32)
        ndimage.label(scores >= share * scores.max(), structure=np.ones((3, 3), int), output=parts)
        found = np.array([(x.start, x.stop, y.start, y.stop) for y, x in ndimage.find_objects(parts)]) / size
        best[place] = _overlaps(found, own).max()
    return best


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [a, b]: intersection over union of every box of [a, 4] with every one of [b, 4]."""
    a, b = first[:, None], second[None]
    wide = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    high = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 2], b[..., 2])
    shared = wide.clip(0) * high.clip(0)
    areas = [(box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2]) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def _rows(maps: np.ndarray) -> np.ndarray:
    """float64 [n, H·W]."""
    return np.asarray(maps, dtype=np.float64).reshape(len(maps), -1)
