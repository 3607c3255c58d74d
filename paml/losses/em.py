"""EM, entropy maximisation (Zhou et al., ECCV 2022): unobserved labels are acknowledged as unknown.

    positive: -log p        negative: -log(1 - p)        unobserved: -alpha H(p),  H = -p log p - (1 - p) log(1 - p)

Unobserved labels are pulled to p = 1/2, weakly where they are sure: the gradient by the logit x is alpha p (1 - p) x.
The loss can lie below zero. Mean over B x K. Their alpha: VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01; learning rate 1e-5
(CUB 1e-4). Their code takes log(p + 1e-5) and knows no observed negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class EMSettings:
    """EM, entropy maximisation."""

    alpha: float = 0.1
    """Weight of the entropy of unobserved labels: VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise SettingsError(f"loss.em.alpha is {self.alpha}; it must be 0 or more")


def cost(logits_BK: Tensor, labels: Labels, settings: EMSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    entropy = torch.sigmoid(logits_BK) * present + torch.sigmoid(-logits_BK) * absent
    return torch.where(labels.unobserved, -settings.alpha * entropy, torch.where(labels.positive, present, absent))


LOSS = Loss(per_label=cost, settings="em")
