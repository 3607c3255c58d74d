"""EPR, expected positive regularisation (Cole et al., CVPR 2021): images have k positives on average.

    positive: -log p        negative: -log(1 - p)        unobserved: nothing
    and over the batch: (s - k)^2 / K^2, where s is the mean over the batch's images of the sum of p over all classes

The labels' part is a mean over B x K; the term is that of the global batch, whatever the number of workers, and a short
last batch's term weighs as its images do. Their k: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4. Their code takes
log(p + 1e-5), its last batch's term weighs as much as any, and it knows no observed negatives.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import LEFT_OUT, Epoch, Labels, Loss
from paml.losses.select import RejectGroup


@dataclass(frozen=True, kw_only=True)
class EPRSettings:
    """EPR, expected positive regularisation."""

    expected_positives: float = 2.9
    """k, the mean number of positives of an image: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4."""

    def __post_init__(self) -> None:
        if not 0 <= self.expected_positives < float("inf"):
            raise SettingsError(f"loss.epr.expected_positives is {self.expected_positives}; it must be 0 or more")


def cost(logits_BK: Tensor, labels: Labels, settings: EPRSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    observed = torch.where(labels.positive, softplus(-logits_BK), softplus(logits_BK))
    return torch.where(labels.unobserved, torch.zeros_like(observed), observed)


def over_batch(logits_BK: Tensor, labels: Labels, settings: Any, world: RejectGroup | None) -> Tensor:
    """This worker's share of the term by `settings.expected_positives`.

    It is B/N of N K (s - k)^2 / K^2 for its B of the global batch's N images. Its gradient is that of the whole term by
    this worker's logits, 2 (s - k) / K of every p: the other workers' sums enter as constants, so that nothing has to
    be differentiated through the exchange. (So does s itself: a second derivative would miss the term's.)
    """
    B, K = logits_BK.shape
    if K == 0:
        return logits_BK.sum()
    own = torch.sigmoid(logits_BK).sum(1).sum(0, dtype=torch.float64)
    sum_and_images = torch.stack([own.detach(), torch.full_like(own.detach(), B)])
    if world is not None:
        dist.all_reduce(sum_and_images, group=world)
    surplus = sum_and_images[0] / sum_and_images[1].clamp(min=1) - settings.expected_positives
    return B * surplus**2 / K + 2 * surplus / K * (own - own.detach())


LOSS = Loss(unobserved=LEFT_OUT, per_label=cost, over_batch=over_batch, settings="epr")
