"""WAN, weak assume negative (Cole et al., CVPR 2021): unobserved labels are negatives of little weight.

    positive: -log p        negative, unobserved: -w log(1 - p),  w = 1 / (K - 1)

The weight lets one observed positive count as much as all other labels of its image. Mean over B x K. Their code takes
log(p + 1e-5) and knows no observed negatives; ours weigh as the assumed ones do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class WANSettings:
    """WAN, weak assume negative."""

    negative_weight: float | None = None
    """Weight of a negative, observed or assumed; null takes 1 / (classes - 1)."""

    def __post_init__(self) -> None:
        if self.negative_weight is not None and not 0 <= self.negative_weight < float("inf"):
            raise SettingsError(f"loss.wan.negative_weight is {self.negative_weight}; it must be 0 or more, or null")


def cost(logits_BK: Tensor, labels: Labels, settings: WANSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    weight = settings.negative_weight
    if weight is None:
        weight = 1 / max(logits_BK.shape[1] - 1, 1)
    return torch.where(labels.positive, softplus(-logits_BK), weight * softplus(logits_BK))


LOSS = Loss(per_label=cost, settings="wan")
