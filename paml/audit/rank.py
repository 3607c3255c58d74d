"""Which labels are found, and in what order: exact, the same every time, ties broken by the image's place, then class.

An unobserved label's score is its logit less a quarter of what the class's observed positives have above those of all
classes: a class whose confirmed positives score low need not score as high to be believed. Only a quarter, since the
classes of one head, trained together, are already on nearly one scale; the whole of it, or standardised or quantile
scores, put rare classes' noise first. An observed label's score is its logit's distance to the wrong side of a border
between positives and negatives, not 0: training on partial labels as AN pulls all logits down. The border lies in the
middle between the observed positives and the observed negatives of all classes, and again a quarter of the way to that
of the class. Both were chosen by experiment ("Label audit" in benchmarks/RESULTS.md). A class with few observed labels
moves less. Agreement over epochs and rejections did not better the score when they entered it: they are evidence.
"""

import dataclasses

import numpy as np

from paml.audit.finds import OBSERVED_WRONG, UNOBSERVED_POSITIVE, Finds
from paml.audit.scoring import Scored
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED

SHARE = 0.25
"""Of a class's distance from all classes that is taken off its logits."""
FEW = 10.0
"""So many observed labels move a class half as far as many would."""


@dataclasses.dataclass(frozen=True)
class ClassScale:
    """What normalises the logits of K classes; increasing in the logit, so that it keeps the order within a class."""

    offset: np.ndarray
    """float64 [K], taken off an unobserved label's logit."""
    border: np.ndarray
    """float64 [K], logit on whose sides the observed positives and negatives of a class are expected."""

    def scores(self, cls: np.ndarray, logit: np.ndarray, state: np.ndarray) -> np.ndarray:
        """float64: how likely wrong the table is on labels of these states (UNOBSERVED is wrong where it is positive).
        The arguments broadcast."""
        logit = np.asarray(logit, np.float64)
        observed = np.where(state == POSITIVE, -1, 1) * (logit - self.border[cls])
        return np.where(state == UNOBSERVED, logit - self.offset[cls], observed)


def scale_of(scored: Scored) -> ClassScale:
    """The scale by the observed labels of a pass; a class without them is taken as all classes are."""
    observed, K = scored.observed, scored.num_classes
    means, weights = [], []
    for chosen in (observed.positive, ~observed.positive):
        count = np.bincount(observed.cls[chosen], minlength=K).astype(np.float64)
        sums = np.bincount(observed.cls[chosen], observed.score[chosen].astype(np.float64), K)
        means.append(sums / np.maximum(count, 1))
        weights.append(count / (count + FEW))
    (positive, negative), (weight, other) = means, weights
    both = weight * other
    overall, middle = _mean(positive, weight), (positive + negative) / 2
    border = _mean(middle, both)
    return ClassScale(SHARE * weight * (positive - overall), border + SHARE * both * (middle - border))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * values).sum() / weights.sum()) if weights.any() else 0.0


def choose(
    scored: Scored, scale: ClassScale, finds: int, observed_finds: int, most_per_class: int | None = None
) -> Finds:
    """The `finds` unobserved labels that are likeliest positive, then the `observed_finds` observed ones that are
    likeliest wrong: positives of low score and negatives of high score. Fewer where there are no more.

    most_per_class: bound on the finds of one class within a kind.
    """
    unobserved, observed = scored.unobserved, scored.observed
    score = scale.scores(unobserved.cls, unobserved.score, np.array(UNOBSERVED))
    first = _best(score, unobserved.place, unobserved.cls, finds, most_per_class)
    states = np.where(observed.positive, POSITIVE, NEGATIVE)
    doubt = scale.scores(observed.cls, observed.score, states)
    second = _best(doubt, observed.place, observed.cls, observed_finds, most_per_class)
    return Finds(
        kind=np.array([UNOBSERVED_POSITIVE] * len(first) + [OBSERVED_WRONG] * len(second)),
        rank=np.concatenate([np.arange(len(first)), np.arange(len(second))]) + 1,
        place=np.concatenate([unobserved.place[first], observed.place[second]]),
        cls=np.concatenate([unobserved.cls[first], observed.cls[second]]),
        state=np.concatenate([np.full(len(first), UNOBSERVED), states[second]]).astype(np.int8),
        logit=np.concatenate([unobserved.score[first], observed.score[second]]),
        score=np.concatenate([score[first], doubt[second]]),
    )


def _best(score: np.ndarray, place: np.ndarray, cls: np.ndarray, count: int, most: int | None) -> np.ndarray:
    """int64: the labels of the highest scores, best first, at most `most` of a class."""
    order = np.lexsort((cls, place, -score))
    if most is not None and len(order):
        by_class = np.argsort(cls[order], kind="stable")
        starts = np.searchsorted(cls[order][by_class], cls[order][by_class])
        within = np.empty(len(order), np.int64)
        within[by_class] = np.arange(len(order)) - starts
        order = order[within < most]
    return order[:count]
