"""Average precision over annotated (image, class) pairs, for all classes with one sort.

AP of a class is the sum over its distinct scores, from high to low, of (increase of recall) x (precision), as in
scikit-learn's `average_precision_score`: pairs with equal scores count together, so their order does not matter.

Axes: n pairs, K classes.
"""

import numpy as np
import torch

Array = np.ndarray | torch.Tensor

MAX_CLASSES = 2**31


def average_precision_by_class(cls: Array, score: Array, positive: Array, num_classes: int) -> np.ndarray:
    """Average precision of each class, float64 [K]; NaN for a class without a positive pair. Memory is O(n + K).

    Args:
        cls: integers [n] below `num_classes`.
        score: float32 [n], logits or probabilities; 0.0 and -0.0 are equal.
        positive: bool [n].
        num_classes: K.

    Raises ValueError for a class out of range or a NaN score, TypeError for scores of another dtype.
    """
    cls, score, positive = check_pairs(cls, score, positive, num_classes)
    n = len(cls)
    ap = np.full(num_classes, np.nan)
    if n == 0:
        return ap
    # One sort by class, then by descending score; the lowest bit is `positive`.
    packed = cls.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= descending_key(score)
    packed <<= np.uint64(1)
    packed |= positive
    packed.sort()

    true_positives = np.cumsum((packed & np.uint64(1)).astype(bool), dtype=np.int32 if n < 2**31 else np.int64)
    packed >>= np.uint64(1)
    last = np.empty(n, bool)
    np.not_equal(packed[1:], packed[:-1], out=last[:-1])
    last[-1] = True
    ends = np.flatnonzero(last)
    tp = true_positives[ends]
    increase = np.diff(tp, prepend=tp.dtype.type(0))
    increases = np.flatnonzero(increase > 0)
    ends, tp, increase = ends[increases], tp[increases], increase[increases]

    end_cls = (packed[ends] >> np.uint64(32)).astype(np.int64)
    pairs_of_class = np.bincount(cls, minlength=num_classes)
    class_start = np.cumsum(pairs_of_class) - pairs_of_class
    positives = np.bincount(end_cls, weights=increase, minlength=num_classes)
    tp_before = np.cumsum(positives) - positives
    precision = (tp - tp_before[end_cls]) / (ends + 1 - class_start[end_cls])
    total = np.bincount(end_cls, weights=increase * precision, minlength=num_classes)
    np.divide(total, positives, out=ap, where=positives > 0)
    return ap


def check_pairs(
    cls: Array, score: Array, positive: Array, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs as numpy arrays (int, float32, bool). Raises ValueError or TypeError for invalid ones."""
    cls, score, positive = _numpy(cls), _numpy(score), _numpy(positive)
    if cls.ndim != 1 or cls.shape != score.shape or cls.shape != positive.shape:
        raise ValueError(f"pairs do not fit: {cls.shape} classes, {score.shape} scores, {positive.shape} states")
    if score.dtype != np.float32:
        raise TypeError(f"scores are {score.dtype}; use float32 (a conversion would add or remove ties)")
    if positive.dtype != np.bool_:
        raise TypeError(f"`positive` is {positive.dtype}; it must be bool: pass state == POSITIVE")
    if not 0 < num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; it must be from 1 to {MAX_CLASSES}")
    if len(cls):
        low, high = int(cls.min()), int(cls.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"classes {low} to {high} are outside of 0 to {num_classes - 1}")
        bad = int(np.isnan(score).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(score)} scores are NaN and cannot be ranked: "
                "the model has diverged, use an earlier checkpoint"
            )
    return cls, score, positive


def descending_key(score: np.ndarray) -> np.ndarray:
    """uint32 keys in the descending order of the float32 scores, equal for equal scores."""
    bits = (score + np.float32(0)).view(np.int32)
    # Negative floats descend as their bits ascend; positive ones have all bits except the sign inverted. Branch-free,
    # since signs are hard to predict.
    return (bits ^ (~(bits >> 31) & np.int32(0x7FFFFFFF))).view(np.uint32)


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
