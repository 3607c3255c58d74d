"""WAN, weak assume negative (Cole et al., CVPR 2021): unobserved labels are negatives of little weight.

    positive: -log p        negative, unobserved: -w log(1 - p),  w = 1 / (K - 1)

One observed positive counts as much as all other labels of its image. Mean over B x K. The authors' code has no
observed negatives; here they weigh as much as the assumed ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import BatchContext, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class WANSettings:
    """WAN, weak assume negative."""

    negative_weight: float | None = None
    """Weight of a negative, observed or assumed; null uses 1 / (classes - 1)."""

    def __post_init__(self) -> None:
        weight = self.negative_weight
        valid = weight is None or 0 <= weight < float("inf")
        check_setting(valid, "loss.wan.negative_weight", weight, "0 or more, or null")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    weight = settings.wan.negative_weight
    if weight is None:
        weight = 1 / max(logits_BK.shape[1] - 1, 1)
    return torch.where(labels.positive, softplus(-logits_BK), weight * softplus(logits_BK))


LOSS = Loss(per_label=cost, own_settings={"wan": WANSettings})
