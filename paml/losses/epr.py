"""EPR, expected positive regularization (Cole et al., CVPR 2021): images have k positives on average.

    positive: -log p        negative: -log(1 - p)        unobserved: nothing
    plus, for the batch: (s - k)^2 / K^2, s the mean over the batch's images of the sum of p over all classes

The labels' part is a mean over B x K. The term is that of the global batch, for any number of workers, and counts in a
short last batch in proportion to its images. k is `loss.expected_positives`. The authors' code has no observed
negatives and counts the last batch's term as much as any other.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from paml.losses.base import LEFT_OUT, BatchContext, Labels, Loss


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    observed = torch.where(labels.positive, softplus(-logits_BK), softplus(logits_BK))
    return torch.where(labels.unobserved, torch.zeros_like(observed), observed)


def over_batch(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    """This worker's share of the term: B/N of N K (s - k)^2 / K^2 for its B of the global batch's N images.

    Its gradient is that of the whole term with respect to this worker's logits, 2 (s - k) / K for every p: the sums of
    the other workers are constants, so nothing is differentiated through the exchange. (s is a constant too: a second
    derivative would lack the term's.)
    """
    B, K = logits_BK.shape
    if K == 0:
        return logits_BK.sum()
    local = torch.sigmoid(logits_BK).sum(1).sum(0, dtype=torch.float64)
    sum_and_images = torch.stack([local.detach(), torch.full_like(local.detach(), B)])
    if context.world is not None:
        dist.all_reduce(sum_and_images, group=context.world)
    surplus = sum_and_images[0] / sum_and_images[1].clamp(min=1) - settings.expected_positives
    return B * surplus**2 / K + 2 * surplus / K * (local - local.detach())


LOSS = Loss(unobserved=LEFT_OUT, per_label=cost, over_batch=over_batch)
