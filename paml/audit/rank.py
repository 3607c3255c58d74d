"""Ranking of label issues: exact and deterministic; ties are broken by image, then class.

The score of an unobserved label is its logit minus a quarter of the distance between the mean logit of its class's
observed positives and that of all classes, so a class whose confirmed positives score low needs a lower score. Only a
quarter, because the classes of one head are already on nearly one scale; subtracting all of it, or standardizing, put
the noise of rare classes first. The score of an observed label is the distance of its logit to the wrong side of a
boundary between positives and negatives. The boundary is not 0, because training with partial labels as AN lowers all
logits: it is midway between the means of observed positives and observed negatives of all classes, and a quarter of the
way from there to the midpoint of the class. Classes with few observed labels are shifted less. Both rules were
chosen by experiment (see "Label audit" in the results). The agreement of checkpoints did not improve the ranking; it is
reported as evidence.
"""

import dataclasses

import numpy as np
import pandas as pd

from paml.audit.issues import MISSING, WRONG, LabelIssues
from paml.audit.scoring import SplitScores
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED

CLASS_SHIFT = 0.25
"""Fraction of a class's distance from all classes that is removed from its logits."""
PRIOR_COUNT = 10.0
"""A class with this many observed labels is shifted half as far as one with many."""


@dataclasses.dataclass(frozen=True)
class ClassScale:
    """Normalization of the logits of K classes. It is increasing in the logit, so the order within a class is kept."""

    offset: np.ndarray
    """float64 [K], subtracted from the logit of an unobserved label."""
    boundary: np.ndarray
    """float64 [K], logit that separates observed positives and negatives of a class."""

    def scores(self, cls: np.ndarray, logit: np.ndarray, state: np.ndarray) -> np.ndarray:
        """float64: how likely the table is wrong on labels of these states; UNOBSERVED is wrong if it is truly
        positive. The arguments broadcast."""
        logit = np.asarray(logit, np.float64)
        observed = np.where(state == POSITIVE, -1, 1) * (logit - self.boundary[cls])
        return np.where(state == UNOBSERVED, logit - self.offset[cls], observed)


def fit_class_scale(scores: SplitScores) -> ClassScale:
    """The scale from the observed labels of a split; a class without observed labels is not shifted."""
    observed, K = scores.observed, scores.num_classes
    means, weights = [], []
    for state in (POSITIVE, NEGATIVE):
        chosen = observed.state == state
        count = np.bincount(observed.cls[chosen], minlength=K).astype(np.float64)
        total = np.bincount(observed.cls[chosen], observed.score[chosen].astype(np.float64), K)
        means.append(total / np.maximum(count, 1))
        weights.append(count / (count + PRIOR_COUNT))
    (positive, negative), (positive_weight, negative_weight) = means, weights
    weight, midpoint = positive_weight * negative_weight, (positive + negative) / 2
    boundary = _weighted_mean(midpoint, weight)
    return ClassScale(
        CLASS_SHIFT * positive_weight * (positive - _weighted_mean(positive, positive_weight)),
        boundary + CLASS_SHIFT * weight * (midpoint - boundary),
    )


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * values).sum() / weights.sum()) if weights.any() else 0.0


def rank_issues(
    scores: SplitScores, scale: ClassScale, missing: int, wrong: int, max_per_class: int | None = None
) -> LabelIssues:
    """The `missing` unobserved labels that are most likely positive, then the `wrong` observed labels that are most
    likely wrong (positives of low score and negatives of high score); fewer if there are no more.

    max_per_class: limit for the issues of one class within a kind.
    """
    parts = []
    for kind, labels, count in ((MISSING, scores.unobserved, missing), (WRONG, scores.observed, wrong)):
        score = scale.scores(labels.cls, labels.score, labels.state)
        order = np.lexsort((labels.cls, labels.image, -score))
        if max_per_class is not None:
            cls = labels.cls[order]
            order = order[pd.Series(cls).groupby(cls).cumcount().to_numpy() < max_per_class]
        order = order[:count]
        image, cls, logit, state = (column[order] for column in labels)
        parts.append((np.full(len(order), kind), np.arange(len(order)) + 1, image, cls, state, logit, score[order]))
    return LabelIssues(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def checkpoint_agreement(issues: LabelIssues, scale: ClassScale, logits: np.ndarray) -> np.ndarray:
    """float64 [n]: the fraction of the checkpoints that score the label at least as high as the last issue of its kind.

    logits: float32 [n, C], of each checkpoint.
    """
    scores = scale.scores(issues.cls[:, None], logits, issues.state[:, None])
    agreement = np.empty(len(issues))
    for kind in np.unique(issues.kind):
        of_kind = issues.kind == kind
        agreement[of_kind] = (scores[of_kind] >= issues.score[of_kind].min()).mean(1)
    return agreement
