"""ASL, the asymmetric loss (Ridnik et al., ICCV 2021): easy negatives count little, very easy ones nothing.

    positive: -(1 - p)^g+ log p        negative, unobserved: -m^g- log(1 - m),  m = max(p - clip, 0)

The focusing factors (1 - p)^g+ and m^g- are weights without a gradient, as in the authors' training script (a switch in
their code; the paper's formula has a gradient there). The authors' class defaults to g- 4 and g+ 1; their COCO script,
and so the defaults here, uses g- 4 and g+ 0. Both use clip 0.05.

Mean over images: the sum over all labels / B. The authors use the sum itself, B times as much. Adam's steps do not
depend on such a factor, so the authors' learning rates apply unchanged. With SGD use B times their learning rate and
their gradient clipping norm / B.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import BatchContext, Labels, Loss, check_not_negative


@dataclass(frozen=True, kw_only=True)
class ASLSettings:
    """ASL, the asymmetric loss."""

    gamma_positive: float = 0.0
    """Focusing of positives; 0 for none."""
    gamma_negative: float = 4.0
    """Focusing of negatives, observed or assumed."""
    clip: float = 0.05
    """Subtracted from a negative's probability; negatives up to this probability cost nothing."""

    def __post_init__(self) -> None:
        check_not_negative("asl", self, "gamma_positive", "gamma_negative")
        check_setting(0 <= self.clip < 1, "loss.asl.clip", self.clip, "a probability, at least 0 and below 1")


def asymmetric(logits_BK: Tensor, positive_BK: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(-log p or -log(1 - m), miss probability 1 - p or m without a gradient) of every label, both [B, K]."""
    against_BK = torch.where(positive_BK, -logits_BK, logits_BK)
    cost_BK, miss_BK = softplus(against_BK), torch.sigmoid(against_BK.detach())
    if clip > 0:
        # 1 - m as (1 - p) + clip, to keep precision for p near 1.
        clipped_BK = -torch.log((torch.sigmoid(-logits_BK) + clip).clamp(max=1))
        cost_BK = torch.where(positive_BK, cost_BK, clipped_BK)
        miss_BK = torch.where(positive_BK, miss_BK, (miss_BK - clip).clamp(min=0))
    return cost_BK, miss_BK


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    own: ASLSettings = settings.asl
    cost_BK, miss_BK = asymmetric(logits_BK, labels.positive, own.clip)
    weight_BK = torch.where(labels.positive, miss_BK**own.gamma_positive, miss_BK**own.gamma_negative)
    return weight_BK * cost_BK


LOSS = Loss(per_label=cost, divisor="images", own_settings={"asl": ASLSettings})
