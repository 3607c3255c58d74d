"""The corrections of LL-Cp: a sparse overlay on the label table, kept in memory and in checkpoints.

The table itself is never written. A correction turns an unobserved label into a positive permanently.
"""

import numpy as np

from paml.labels.states import POSITIVE
from paml.labels.table import Triples


class LabelOverlay:
    """Corrected (image, class) pairs as one sorted int64 array of image·K + class; images by manifest index."""

    def __init__(self, num_classes: int, codes: np.ndarray | None = None) -> None:
        self.num_classes = num_classes
        self.codes = np.unique(np.asarray([] if codes is None else codes, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.codes)

    def encode(self, images: np.ndarray, cls: np.ndarray) -> np.ndarray:
        """int64[n]: codes of (image, class) pairs."""
        return images.astype(np.int64) * self.num_classes + cls

    def add(self, codes: np.ndarray) -> None:
        """Add corrections; repeats have no effect."""
        self.codes = np.union1d(self.codes, codes)

    def apply(self, triples: Triples, images: np.ndarray) -> Triples:
        """`triples` of `images` (int64[b]) with the corrections of these images appended as positives."""
        if not len(self.codes) or not len(images):
            return triples
        first = np.searchsorted(self.codes, images * self.num_classes)
        count = np.searchsorted(self.codes, (images + 1) * self.num_classes) - first
        image = np.repeat(np.arange(len(images), dtype=np.int32), count)
        index = np.arange(len(image)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        cls = (self.codes[index] - images[image] * self.num_classes).astype(np.int32)
        return Triples(
            image=np.concatenate([triples.image, image]),
            cls=np.concatenate([triples.cls, cls]),
            state=np.concatenate([triples.state, np.full(len(image), POSITIVE, dtype=np.int8)]),
        )
