"""One pass of one or more checkpoints over a split: the best unobserved labels of each class, and all observed ones.

Axes: B images, K classes, C checkpoints.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from paml.audit.best import BestOfClasses, Labels
from paml.data.loader import Batch
from paml.errors import DataError
from paml.labels.states import POSITIVE, UNOBSERVED
from paml.models.cam import CamClassifier, pool_logits

_BINS = 1 << 16

View = Callable[[Batch], torch.Tensor]
"""A batch as the models take it: the images as they are, or mirrored."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """The m observed labels, in the order of the images and by ascending class within one."""

    place: np.ndarray
    """int64 [m], the image's place in the manifest."""
    cls: np.ndarray
    """int32 [m]."""
    positive: np.ndarray
    """bool [m]."""
    score: np.ndarray
    """float32 [m], the logit."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one pass leaves."""

    images: int
    """Images that were scored."""
    num_classes: int
    """K."""
    unobserved: Labels
    """Those of the highest logits of each class, by class, then best logit, then place."""
    observed: Observed
    histograms: np.ndarray
    """int64 [C, 65536], the unobserved logits of each checkpoint, in ascending bins (see `bin_of`)."""


def bin_of(logits: np.ndarray) -> np.ndarray:
    """int64: the place of float32 values among 65,536 ascending bins, each at most 1/128 of its values wide."""
    bits = (np.asarray(logits, np.float32) + np.float32(0)).view(np.int32)  # -0 becomes 0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative floats run the other way
    return (ordered.astype(np.int64) >> 16) + _BINS // 2


def least_rejected_bin(histogram: np.ndarray, share: float) -> int:
    """The lowest bin that a label may lie in and be among the `share` highest: at least so many, counted by bins."""
    wanted = int(np.ceil(share * int(histogram.sum())))
    if wanted == 0:
        return _BINS
    from_above = np.cumsum(histogram[::-1])
    return _BINS - 1 - int(np.searchsorted(from_above, wanted))


@torch.inference_mode()
def score_labels(
    models: Sequence[CamClassifier],
    batches: Iterable[Batch],
    views: Sequence[View],
    *,
    alpha: float,
    num_classes: int,
    keep: int,
    watch: Callable[[int], None] = lambda images: None,
) -> Scored:
    """Score every pair of the batches by the last model's logit, averaged over the views; all in float32.

    The other models see the first view alone, for their histograms. keep: unobserved labels kept of each class; memory
    is that of `BestOfClasses` and 17 bytes an observed label, whatever the number of images. Raises DataError for no
    image and for a logit that is no number.
    """
    best = BestOfClasses(num_classes, keep)
    histograms = np.zeros((len(models), _BINS), np.int64)
    observed: list[tuple[np.ndarray, ...]] = []
    images = 0
    for batch in batches:
        if not len(batch):
            continue
        logits_CBK = checkpoint_logits(models, views[0](batch), alpha)
        seen = [logits_CBK[-1], *(checkpoint_logits(models[-1:], view(batch), alpha)[0] for view in views[1:])]
        logits_BK = np.stack(seen).mean(0, dtype=np.float64).astype(np.float32)
        if not (np.isfinite(logits_CBK).all() and np.isfinite(logits_BK).all()):
            raise DataError("a score is not finite: the checkpoint's weights are lost, take another checkpoint")
        image, cls = batch.labels.image.numpy(), batch.labels.cls.numpy()
        open_BK = np.ones(logits_BK.shape, bool)
        open_BK[image, cls] = batch.labels.state.numpy() == UNOBSERVED
        best.add(batch.index, logits_BK, open_BK)
        state = batch.labels.state.numpy()
        observed.append((batch.index[image], cls.astype(np.int32), state == POSITIVE, logits_BK[image, cls]))
        for place, own in enumerate(logits_CBK):
            histograms[place] += np.bincount(bin_of(own[open_BK]), minlength=_BINS)
        images += len(batch)
        watch(len(batch))
    if not images:
        raise DataError("there is no image to audit: the split's manifest and its label table share none")
    return Scored(
        images=images,
        num_classes=num_classes,
        unobserved=best.result(),
        observed=Observed(*(np.concatenate(column) for column in zip(*observed, strict=True))),
        histograms=histograms,
    )


def checkpoint_logits(models: Sequence[CamClassifier], images_BCHW: torch.Tensor, alpha: float) -> np.ndarray:
    """float32 [C, B, K]: what each checkpoint says, on the CPU."""
    return np.stack([pool_logits(model.maps(images_BCHW), alpha).cpu().numpy() for model in models])
