"""One pass of a checkpoint over a split: the top unobserved labels of each class, and all observed ones.

The top labels are exact and take bounded memory: normalization by class is increasing in the score, so the n
highest-scoring labels of all classes are among the n highest of each. One pass over the images is enough, although the
normalization is known only at its end. Axes: B images, K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from paml.data.loader import Batch
from paml.errors import DataError
from paml.labels.states import UNOBSERVED
from paml.models.cam import pool_logits

_BUFFER_LABELS = 1 << 21
View = Callable[[Batch], torch.Tensor]
"""The raw maps [B, K, h, w] of a batch: of the images, or of their mirror images."""


class ScoredLabels(NamedTuple):
    """m (image, class) pairs with scores.

    image: int64[m], the image's position in the manifest; cls: int32[m]; score: float32[m], the logit; state: int8[m].
    """

    image: np.ndarray
    cls: np.ndarray
    score: np.ndarray
    state: np.ndarray


class TopLabelsPerClass:
    """Retains the `count` highest scores of each of K classes; the lower image wins ties.

    Memory: 16 bytes for each of K × count labels and for each of up to `buffer` labels that are not yet merged.
    """

    def __init__(self, num_classes: int, count: int, buffer: int = _BUFFER_LABELS) -> None:
        self.num_classes, self.count, self._max_pending = num_classes, count, buffer
        self._parts = [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))]
        self._pending = 0
        # The score that a label of each class must reach to be retained: -inf until the class is full.
        self._floor = np.full(num_classes, -np.inf, np.float32)

    def add(self, image_B: np.ndarray, scores_BK: np.ndarray, allowed_BK: np.ndarray) -> None:
        """Add the scores of a batch, float32 [B, K], of allowed pairs, bool [B, K]; image_B int64 [B], in any order."""
        if self.count == 0:
            return
        row, cls = np.nonzero(allowed_BK & (scores_BK >= self._floor))
        self._parts.append((image_B[row], cls.astype(np.int32), scores_BK[row, cls]))
        self._pending += len(cls)
        if self._pending > self._max_pending:
            self.result()

    def result(self) -> ScoredLabels:
        """Merge the labels added so far and return the retained ones, by class, descending score and image."""
        image, cls, score = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((image, -score, cls))
        image, cls, score = image[order], cls[order], score[order]
        starts = np.searchsorted(cls, np.arange(self.num_classes + 1))
        retained = np.arange(len(cls)) - starts[cls] < self.count
        full = np.flatnonzero(np.diff(starts) >= max(1, self.count))
        self._floor[full] = score[starts[full] + self.count - 1]
        labels = (image[retained], cls[retained], score[retained])
        self._parts, self._pending = [labels], 0
        return ScoredLabels(*labels, np.full(len(labels[0]), UNOBSERVED, np.int8))


class SplitScores(NamedTuple):
    """The scores of a split's labels."""

    images: int
    num_classes: int
    unobserved: ScoredLabels
    """Unobserved labels of the highest logits of each class."""
    observed: ScoredLabels


@torch.inference_mode()
def score_labels(
    views: Sequence[View],
    batches: Iterable[Batch],
    *,
    alpha: float,
    num_classes: int,
    per_class: int,
    on_batch: Callable[[int], object] = lambda images: None,
) -> SplitScores:
    """Score every pair of the batches by its logit, averaged over the views, in float32.

    per_class: unobserved labels to retain per class. Memory: that of `TopLabelsPerClass` and 17 bytes per observed
    label, for any number of images. Raises DataError if there are no images, or a logit is not finite.
    """
    top = TopLabelsPerClass(num_classes, per_class)
    observed: list[tuple[np.ndarray, ...]] = []
    images = 0
    for batch in batches:
        if not len(batch):
            continue
        by_view = np.stack([pool_logits(view(batch), alpha).cpu().numpy() for view in views])
        logits_BK = by_view.mean(0, dtype=np.float64).astype(np.float32)
        if not np.isfinite(logits_BK).all():
            raise DataError("a score is not finite, so the checkpoint's weights are damaged: use another checkpoint")
        image, cls, state = (values.numpy() for values in (batch.labels.image, batch.labels.cls, batch.labels.state))
        unobserved_BK = np.ones(logits_BK.shape, bool)
        unobserved_BK[image, cls] = state == UNOBSERVED
        top.add(batch.index, logits_BK, unobserved_BK)
        observed.append((batch.index[image], cls.astype(np.int32), logits_BK[image, cls], state.astype(np.int8)))
        images += len(batch)
        on_batch(len(batch))
    if not images:
        raise DataError("no image to audit: the split's manifest and its label table have no image in common")
    columns = ScoredLabels(*(np.concatenate(column) for column in zip(*observed, strict=True)))
    return SplitScores(images, num_classes, top.result(), columns)
