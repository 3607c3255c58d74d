"""The best labels of each class, kept while scores stream by, exact and in bounded memory.

A normalisation by class is increasing in the score, so the best n labels of all classes are among the best n of each:
one pass over the images is enough, though what a class is normalised by is known only at its end.
"""

from typing import NamedTuple

import numpy as np

_BUFFER = 1 << 21


class Labels(NamedTuple):
    """Some (image, class) pairs and their scores, by class, then best score, then place.

    place: int64[m], the image's place in the manifest; cls: int32[m]; score: float32[m].
    """

    place: np.ndarray
    cls: np.ndarray
    score: np.ndarray


class BestOfClasses:
    """Keeps the `keep` highest scores of each of K classes; the lower place wins between equal ones.

    Memory: 16 bytes for each of K × keep labels, and for each of `buffer` more between two settlements.
    """

    def __init__(self, num_classes: int, keep: int, buffer: int = _BUFFER) -> None:
        self.num_classes, self.keep, self._limit = num_classes, keep, buffer
        self._parts: list[Labels] = []
        self._waiting = 0
        # Of each class the score that a label must reach to be kept: -inf until the class is full.
        self._least = np.full(num_classes, -np.inf, np.float32)

    def add(self, place_B: np.ndarray, scores_BK: np.ndarray, allowed_BK: np.ndarray) -> None:
        """Take in the scores of a batch, float32 [B, K], for the pairs that are allowed, bool [B, K]; places int64 [B],
        in any order."""
        if self.keep == 0:
            return
        image, cls = np.nonzero(allowed_BK & (scores_BK >= self._least))
        self._parts.append(Labels(place_B[image], cls.astype(np.int32), scores_BK[image, cls]))
        self._waiting += len(cls)
        if self._waiting > self._limit:
            self._settle()

    def result(self) -> Labels:
        """The labels kept so far, by class, then best score, then lowest place."""
        return self._settle()

    def _settle(self) -> Labels:
        empty = Labels(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
        place, cls, score = (np.concatenate(column) for column in zip(empty, *self._parts, strict=True))
        order = np.lexsort((place, -score, cls))
        place, cls, score = place[order], cls[order], score[order]
        starts = np.searchsorted(cls, np.arange(self.num_classes + 1))
        counts = np.diff(starts)
        kept = np.arange(len(cls)) - starts[cls] < self.keep
        full = np.flatnonzero(counts >= max(1, self.keep))
        self._least[full] = score[starts[full] + self.keep - 1]
        labels = Labels(place[kept], cls[kept], score[kept])
        self._parts, self._waiting = [labels], 0
        return labels
