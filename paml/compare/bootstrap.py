"""Paired bootstrap of mAP: whole images are drawn again, the same ones for every model.

A replicate gives each image a weight, how often it was drawn, and every pair the weight of its image. A model's pairs
are sorted once; a replicate is then one gather and one running sum over them.

Replicates lie above the model's own mAP, as a positive drawn twice is found twice at one threshold: by 0.5 of their
standard deviation with 30 positives a class, by 0.2 with 300. In a difference of two models most of that cancels.

Axes: n pairs, K classes, I images, R replicates.
"""

import numpy as np

from paml.metrics import MetricSettings, Pairs
from paml.metrics.average_precision import check_pairs, falling_key


class Ranked:
    """The pairs of one model in the order that average precision looks at them."""

    def __init__(self, pairs: Pairs, num_classes: int, images: np.ndarray) -> None:
        """images: int64 [I], sorted, every image that is drawn from. Raises ValueError where a pair's image is none of
        them."""
        cls, score, positive = check_pairs(*pairs[:3], num_classes)
        image = np.searchsorted(images, pairs.image.cpu().numpy())
        if len(cls) and not np.array_equal(images[np.minimum(image, len(images) - 1)], pairs.image.cpu().numpy()):
            raise ValueError("a pair is of an image that is not among those to draw from")
        falling = cls.astype(np.uint64) << np.uint64(32) | falling_key(score)
        order = np.argsort(falling, kind="stable")
        falling, positive = falling[order], positive[order]
        self._K = num_classes
        self._image = image[order].astype(np.int32)
        per_class = np.bincount(cls, minlength=num_classes)
        self._class_end = np.cumsum(per_class)
        self._class_start = self._class_end - per_class

        # Pairs of equal score count together, and only those with a positive among them add to AP.
        last = np.append(falling[1:] != falling[:-1], True) if len(falling) else np.empty(0, bool)
        tie = np.cumsum(last) - last  # int [n]: which run of equal scores
        self._positive = np.flatnonzero(positive)
        ties, first = np.unique(tie[self._positive], return_index=True)
        self._first_positive = first
        self._end = np.flatnonzero(last)[ties]
        self._cls = (falling[self._end] >> np.uint64(32)).astype(np.int64)

    def average_precision(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float64 [K] average precision under integer image weights int [I], NaN for a class without a positive; and
        float64 [K] the weight of its positives and of all its pairs.

        As scikit-learn's `average_precision_score(sample_weight=...)`, and as if each image stood there so often.
        """
        weights = weights.astype(np.int32, copy=False)
        drawn = np.zeros(len(self._image) + 1, np.int64)
        np.cumsum(weights[self._image], out=drawn[1:])
        whole = (drawn[self._class_end] - drawn[self._class_start]).astype(np.float64)
        ap = np.full(self._K, np.nan)
        if not len(self._positive):
            return ap, np.zeros(self._K), whole
        rise = np.add.reduceat(weights[self._image[self._positive]], self._first_positive, dtype=np.int64)
        positives = np.bincount(self._cls, weights=rise, minlength=self._K)
        hits = np.cumsum(rise) - (np.cumsum(positives) - positives)[self._cls]
        passed = drawn[self._end + 1] - drawn[self._class_start[self._cls]]
        total = np.bincount(self._cls, weights=rise * (hits / np.maximum(passed, 1)), minlength=self._K)
        np.divide(total, positives, out=ap, where=positives > 0)
        return ap, positives, whole

    def mean(self, weights: np.ndarray, settings: MetricSettings) -> float:
        """mAP under integer image weights; which classes count is decided by the pairs drawn, as `settings` say."""
        ap, positives, whole = self.average_precision(weights)
        if settings.no_positives == "zero":
            ap[(positives == 0) & (whole > 0)] = 0.0
        if settings.no_negatives == "skip":
            ap[whole == positives] = np.nan
        counted = ap[~np.isnan(ap)]
        return float(counted.mean()) if len(counted) else float("nan")


def bootstrap_map(
    pairs: Pairs, num_classes: int, images: np.ndarray, *, replicates: int, seed: int, settings: MetricSettings
) -> np.ndarray:
    """float64 [R]: mAP on I images drawn with replacement from `images` (int64 [I], sorted), R times.

    Equal `images`, `replicates` and `seed` draw the same images, so that the replicates of two models are paired.
    """
    ranked, rng = Ranked(pairs, num_classes, images), np.random.default_rng(seed)
    count = len(images)
    found = np.empty(replicates)
    for r in range(replicates):
        found[r] = ranked.mean(np.bincount(rng.integers(0, count, count), minlength=count), settings)
    return found


def interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval that holds `level` of the replicates; NaN where there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
