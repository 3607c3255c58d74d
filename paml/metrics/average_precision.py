"""Average precision over annotated (image, class) pairs, for all classes by one sort.

AP of a class is the sum over its distinct scores, from high to low, of (rise of recall) x (precision), as in
scikit-learn's `average_precision_score`: pairs of equal score count together, so their order does not matter. Pairs
that nobody annotated are no part of it.

Axes: n pairs, K classes.
"""

import numpy as np
import torch

Array = np.ndarray | torch.Tensor

MAX_CLASSES = 2**31


def average_precision_by_class(cls: Array, score: Array, positive: Array, num_classes: int) -> np.ndarray:
    """float64 [K]: each class's average precision; NaN for a class without a positive pair.

    cls [n]: integers below `num_classes`. score [n]: float32, any monotone score (logits do); 0.0 and -0.0 are equal.
    positive [n]: bool. Memory is O(n + K).
    Raises ValueError for a class out of range or a score that is NaN, TypeError for scores of another type.
    """
    cls, score, positive = check_pairs(cls, score, positive, num_classes)
    n = len(cls)
    ap = np.full(num_classes, np.nan)
    if n == 0:
        return ap
    # One sort by class, then by falling score; the lowest bit carries the state along.
    packed = cls.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= falling_key(score)
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
    rise = np.diff(tp, prepend=tp.dtype.type(0))
    rising = np.flatnonzero(rise > 0)
    ends, tp, rise = ends[rising], tp[rising], rise[rising]

    end_cls = (packed[ends] >> np.uint64(32)).astype(np.int64)
    pairs_of_class = np.bincount(cls, minlength=num_classes)
    class_start = np.cumsum(pairs_of_class) - pairs_of_class
    positives = np.bincount(end_cls, weights=rise, minlength=num_classes)
    tp_before = np.cumsum(positives) - positives
    precision = (tp - tp_before[end_cls]) / (ends + 1 - class_start[end_cls])
    total = np.bincount(end_cls, weights=rise * precision, minlength=num_classes)
    np.divide(total, positives, out=ap, where=positives > 0)
    return ap


def micro_average_precision(score: Array, positive: Array) -> float:
    """AP of all pairs taken as one class; NaN without a positive pair."""
    score = _numpy(score)
    return float(average_precision_by_class(np.zeros(len(score), np.int32), score, positive, 1)[0])


def check_pairs(
    cls: Array, score: Array, positive: Array, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs as numpy arrays (int, float32, bool), or an error that says what is wrong with them."""
    cls, score, positive = _numpy(cls), _numpy(score), _numpy(positive)
    if cls.ndim != 1 or cls.shape != score.shape or cls.shape != positive.shape:
        raise ValueError(
            f"pairs do not fit: {cls.shape} classes, {score.shape} scores, {positive.shape} states; "
            "needed is one of each a pair"
        )
    if score.dtype != np.float32:
        raise TypeError(f"scores are {score.dtype}; float32 is needed (another type would gain or lose ties unseen)")
    if positive.dtype != np.bool_:
        raise TypeError(f"`positive` is {positive.dtype}; bool is needed: pass state == POSITIVE")
    if not 0 < num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; it is a number from 1 to {MAX_CLASSES}")
    if len(cls):
        low, high = int(cls.min()), int(cls.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"classes from {low} to {high} lie outside 0 to {num_classes - 1}")
        bad = int(np.isnan(score).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(score)} scores are NaN and cannot be ranked: "
                "the model has diverged, take an earlier checkpoint"
            )
    return cls, score, positive


def falling_key(score: np.ndarray) -> np.ndarray:
    """uint32 keys that fall as the float32 score rises, equal where the scores are."""
    bits = (score + np.float32(0)).view(np.int32)
    # A negative float already falls as its bits rise; a positive one has all but its sign bit turned round. Without a
    # branch, for signs are hard to predict.
    return (bits ^ (~(bits >> 31) & np.int32(0x7FFFFFFF))).view(np.uint32)


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
