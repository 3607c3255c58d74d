"""Average precision from score and label state matrices: a function, and an accumulator for evaluation loops."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from paml.metrics.average_precision import Array, average_precision_by_class
from paml.metrics.pairs import Pairs, gather_pairs, join_pairs, pairs_of_states


def average_precision(scores: Array, states: Array) -> np.ndarray:
    """Average precision of each class over its annotated images, float64 [K]; NaN for a class without a positive.

    Equal to scikit-learn's `average_precision_score` of each class on the images where the class is observed. The mAP
    is `np.nanmean` of it.

    Args:
        scores: [N, K], logits or probabilities; ranked in float32.
        states: [N, K] with the codes POSITIVE, NEGATIVE and UNOBSERVED of paml.labels.
    """
    metric = PartialAveragePrecision(gather=False)
    metric.update(scores, states)
    return metric.compute()["AP"]


class PartialAveragePrecision:
    """Mean average precision over annotated (image, class) pairs, accumulated over batches.

    Works in any loop: call `update` for each batch, `compute` at the end of an epoch, then `reset`. Memory is O(number
    of annotated pairs). If torch.distributed is initialized, `compute` gathers the pairs of all ranks, and all must
    call it.

    Args:
        gather: whether to gather over ranks.
    """

    def __init__(self, *, gather: bool = True) -> None:
        self.gather = gather
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._parts: list[Pairs] = []
        self._num_classes: int | None = None

    def update(self, scores: Array, states: Array, index: Array | None = None) -> None:
        """Add a batch.

        Args:
            scores: [B, K], logits or probabilities, any float dtype and device; ranked in float32.
            states: [B, K] with the codes POSITIVE, NEGATIVE and UNOBSERVED of paml.labels.
            index: int [B], a number for each image. With it an image that comes again, such as the padding of a
                DistributedSampler, counts once. Give it for all batches or for none.
        """
        scores, states = torch.as_tensor(scores).detach(), torch.as_tensor(states)
        if scores.ndim != 2 or scores.shape != states.shape or self._num_classes not in (None, scores.shape[1]):
            expected = "[B, K]" if self._num_classes is None else f"[B, {self._num_classes}]"
            raise ValueError(
                f"scores are {tuple(scores.shape)} and states {tuple(states.shape)}; both must be {expected}"
            )
        self._num_classes = scores.shape[1]
        pairs = pairs_of_states(scores, states.to(scores.device))
        number_B = torch.full((len(scores),), -1) if index is None else torch.as_tensor(index).long()
        cls, score, positive, image = (values.cpu() for values in pairs)
        self._parts.append(Pairs(cls, score, positive, number_B.cpu()[image]))

    def compute(self) -> dict[str, Any]:
        """The metrics of all batches.

        Returns:
            A dict with `mAP` (NaN if no class has a positive), `AP` (float64 [K], NaN for a class without a positive),
            `positives` and `negatives` (int64 [K]), and `skipped`, the number of classes without a positive, which are
            left out of the mAP.
        """
        pairs, num_classes = join_pairs(self._parts), self._num_classes or 0
        if self.gather and dist.is_available() and dist.is_initialized():
            numbers: list = [0] * dist.get_world_size()
            dist.all_gather_object(numbers, num_classes)
            num_classes = max(numbers)  # a rank may have had no batch
            pairs = gather_pairs(pairs, dist.group.WORLD)
        if num_classes == 0:
            raise ValueError("there are no batches: call update before compute")
        cls, score, positive, image = (values.cpu().numpy() for values in pairs)
        if len(image) and image.min() >= 0:
            _, first = np.unique(image * num_classes + cls, return_index=True)
            cls, score, positive = cls[first], score[first], positive[first]
        ap = average_precision_by_class(cls, score, positive, num_classes)
        positives = np.bincount(cls[positive], minlength=num_classes)
        counted = ap[~np.isnan(ap)]
        return {
            "mAP": float(counted.mean()) if len(counted) else float("nan"),
            "AP": ap,
            "positives": positives,
            "negatives": np.bincount(cls, minlength=num_classes) - positives,
            "skipped": num_classes - len(counted),
        }
