"""Which labels are found, and in what order: exact, the same every time, ties broken by the image's place, then class.

The score is the logit less a quarter of what the class's observed positives have above those of all classes: a class
whose confirmed positives score low need not score as high to be believed. Only a quarter, since the classes of one
head, trained together, are already on nearly one scale; the whole of it, or standardised or quantile scores, put rare
classes' noise first (measured: "Label audit" in benchmarks/RESULTS.md). A class with few observed positives moves less.
"""

import dataclasses

import numpy as np

from paml.audit.finds import OBSERVED_WRONG, UNOBSERVED_POSITIVE, Finds
from paml.audit.scoring import Scored
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED

SHARE = 0.25
"""Of a class's distance from all classes that is taken off its logits."""
FEW_POSITIVES = 10.0
"""So many observed positives move a class half as far as many would."""


@dataclasses.dataclass(frozen=True)
class ClassScale:
    """What normalises the logits of K classes; increasing in the logit, so that it keeps the order within a class."""

    offset: np.ndarray
    """float64 [K], taken off a class's logits."""

    def scores(self, cls: np.ndarray, logit: np.ndarray) -> np.ndarray:
        """float64: class-normalised logits. `cls` and `logit` broadcast."""
        return np.asarray(logit, np.float64) - self.offset[cls]


def scale_of(scored: Scored) -> ClassScale:
    """The scale by the observed positives of a pass; the offset is 0 for a class that has none."""
    observed, classes = scored.observed, scored.num_classes
    cls = observed.cls[observed.positive]
    count = np.bincount(cls, minlength=classes).astype(np.float64)
    if not count.sum():
        return ClassScale(np.zeros(classes))
    mean = np.bincount(cls, observed.score[observed.positive].astype(np.float64), classes) / np.maximum(count, 1)
    weight = count / (count + FEW_POSITIVES)
    overall = float((weight * mean).sum() / weight.sum())
    return ClassScale(SHARE * weight * (mean - overall))


def choose(
    scored: Scored, scale: ClassScale, finds: int, observed_finds: int, most_per_class: int | None = None
) -> Finds:
    """The `finds` unobserved labels that are likeliest positive, then the `observed_finds` observed ones that are
    likeliest wrong: positives of low score and negatives of high score. Fewer where there are no more.

    most_per_class: bound on the finds of one class within a kind.
    """
    unobserved, observed = scored.unobserved, scored.observed
    score = scale.scores(unobserved.cls, unobserved.score)
    first = _best(score, unobserved.place, unobserved.cls, finds, most_per_class)
    doubt = scale.scores(observed.cls, observed.score)
    doubt = np.where(observed.positive, -doubt, doubt)
    second = _best(doubt, observed.place, observed.cls, observed_finds, most_per_class)
    states = np.where(observed.positive[second], POSITIVE, NEGATIVE)
    return Finds(
        kind=np.array([UNOBSERVED_POSITIVE] * len(first) + [OBSERVED_WRONG] * len(second)),
        rank=np.concatenate([np.arange(len(first)), np.arange(len(second))]) + 1,
        place=np.concatenate([unobserved.place[first], observed.place[second]]),
        cls=np.concatenate([unobserved.cls[first], observed.cls[second]]),
        state=np.concatenate([np.full(len(first), UNOBSERVED), states]).astype(np.int8),
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
