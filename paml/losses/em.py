"""EM, entropy maximization (Zhou et al., ECCV 2022): unobserved labels are treated as unknown.

    positive: -log p        negative: -log(1 - p)        unobserved: -alpha H(p),  H = -p log p - (1 - p) log(1 - p)

Unobserved labels are pulled to p = 1/2, weakly if they are far from it: the gradient with respect to the logit x is
alpha p (1 - p) x. The loss can be negative. Mean over B x K. The authors use alpha 0.2 for VOC, 0.1 for COCO and
NUS-WIDE, 0.01 for CUB; learning rate 1e-5 (CUB 1e-4). Their code has no observed negatives.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.losses.base import BatchContext, Labels, Loss, check_not_negative


@dataclass(frozen=True, kw_only=True)
class EMSettings:
    """EM, entropy maximization; EM+APL uses them too."""

    alpha: float = 0.1
    """Weight of the entropy of unobserved labels: VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01."""

    def __post_init__(self) -> None:
        check_not_negative("em", self, "alpha")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    entropy = torch.sigmoid(logits_BK) * present + torch.sigmoid(-logits_BK) * absent
    return torch.where(labels.unobserved, -settings.em.alpha * entropy, torch.where(labels.positive, present, absent))


LOSS = Loss(per_label=cost, own_settings={"em": EMSettings})
