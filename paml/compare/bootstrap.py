"""Paired bootstrap of mAP: images are resampled with replacement, the same ones for every model.

A replicate gives each image a weight (how often it was drawn) and each pair that of its image. The pairs of a
model are sorted once; a replicate is then one gather and one cumulative sum over them.

Replicates are biased upwards, since the copies of a positive count at the same threshold: by 0.5 of their standard
deviation with 30 positives per class, by 0.2 with 300. Differences of two models cancel most of the bias.

Axes: n pairs, K classes, I images, R replicates.
"""

import numpy as np

from paml.metrics import MetricSettings, Pairs
from paml.metrics.average_precision import check_pairs, descending_key


class RankedPairs:
    """The pairs of one model, sorted by class and score."""

    def __init__(self, pairs: Pairs, num_classes: int, images: np.ndarray) -> None:
        """images: int64 [I], the sorted images to resample. Raises ValueError for a pair of another image."""
        cls, score, positive = check_pairs(*pairs[:3], num_classes)
        image = np.searchsorted(images, pairs.image.cpu().numpy())
        if len(cls) and not np.array_equal(images[np.minimum(image, len(images) - 1)], pairs.image.cpu().numpy()):
            raise ValueError("a pair belongs to an image that is not in `images`")
        descending = cls.astype(np.uint64) << np.uint64(32) | descending_key(score)
        order = np.argsort(descending, kind="stable")
        descending, positive = descending[order], positive[order]
        self._K = num_classes
        self._image = image[order].astype(np.int32)
        per_class = np.bincount(cls, minlength=num_classes)
        self._class_end = np.cumsum(per_class)
        self._class_start = self._class_end - per_class

        # Pairs with equal scores count together, and only ties that include a positive add to AP.
        last = np.append(descending[1:] != descending[:-1], True) if len(descending) else np.empty(0, bool)
        tie = np.cumsum(last) - last  # int [n]: number of the tie
        self._positive = np.flatnonzero(positive)
        ties, first = np.unique(tie[self._positive], return_index=True)
        self._first_positive = first
        self._end = np.flatnonzero(last)[ties]
        self._cls = (descending[self._end] >> np.uint64(32)).astype(np.int64)

    def average_precision(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float64 [K] average precision under integer image weights int [I], NaN for a class without a positive; and
        float64 [K] the weight of its positives and of all its pairs.

        Equal to scikit-learn's `average_precision_score(sample_weight=...)`, and to repeating each image.
        """
        weights = weights.astype(np.int32, copy=False)
        cumulative = np.zeros(len(self._image) + 1, np.int64)
        np.cumsum(weights[self._image], out=cumulative[1:])
        total_weight = (cumulative[self._class_end] - cumulative[self._class_start]).astype(np.float64)
        ap = np.full(self._K, np.nan)
        if not len(self._positive):
            return ap, np.zeros(self._K), total_weight
        gain = np.add.reduceat(weights[self._image[self._positive]], self._first_positive, dtype=np.int64)
        positives = np.bincount(self._cls, weights=gain, minlength=self._K)
        hits = np.cumsum(gain) - (np.cumsum(positives) - positives)[self._cls]
        predicted = cumulative[self._end + 1] - cumulative[self._class_start[self._cls]]
        total = np.bincount(self._cls, weights=gain * (hits / np.maximum(predicted, 1)), minlength=self._K)
        np.divide(total, positives, out=ap, where=positives > 0)
        return ap, positives, total_weight

    def mean(self, weights: np.ndarray, settings: MetricSettings) -> float:
        """mAP under integer image weights. `settings` decide from the resampled pairs which classes count."""
        ap, positives, total_weight = self.average_precision(weights)
        if settings.no_positives == "zero":
            ap[(positives == 0) & (total_weight > 0)] = 0.0
        known = ap[~np.isnan(ap)]
        return float(known.mean()) if len(known) else float("nan")


def bootstrap_map(
    pairs: Pairs, num_classes: int, images: np.ndarray, *, replicates: int, seed: int, settings: MetricSettings
) -> np.ndarray:
    """float64 [R]: mAP on I images resampled with replacement from `images` (int64 [I], sorted).

    Models with equal `images`, `replicates` and `seed` are scored on the same resampled images.
    """
    ranked, rng = RankedPairs(pairs, num_classes, images), np.random.default_rng(seed)
    count = len(images)
    maps = np.empty(replicates)
    for r in range(replicates):
        maps[r] = ranked.mean(np.bincount(rng.integers(0, count, count), minlength=count), settings)
    return maps


def interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval that contains the fraction `level` of the replicates; NaN without replicates."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
