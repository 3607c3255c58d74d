"""Hill loss (Zhang et al., "Robust loss design for multi-label learning with missing labels", 2021).

    positive: -(1 - p_m)^gamma log p_m,  p_m = sigmoid(x - margin)        negative, unobserved: (lambda - p) p^2

The gradient of negatives decreases again towards p = 1 (with lambda 1.5 it is 3 p^2 (1 - p)^2), where false negatives
are likely. The focusing factor is differentiated. The authors use margin 1, gamma 2 and lambda 1.5 on all data sets,
and Adam with learning rate 1e-4.

Mean over images: the sum over all labels / B. The authors use the sum itself; see ASL for learning rates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import BatchContext, Labels, Loss

MARGIN, GAMMA = 1.0, 2.0
"""The paper's margin of positives and focusing; SPLC uses them too."""


@dataclass(frozen=True, kw_only=True)
class HillSettings:
    """Hill loss."""

    lambda_: float = 1.5
    """Of the negatives' cost (lambda - p) p^2, which is highest at p = 2 lambda / 3."""

    def __post_init__(self) -> None:
        valid = 1 <= self.lambda_ < float("inf")
        check_setting(valid, "loss.hill.lambda_", self.lambda_, "at least 1, since costs would be negative below")


def focal(logits_BK: Tensor) -> Tensor:
    """-(1 - p)^gamma log p, all of it differentiated; for -x it is -p^gamma log(1 - p)."""
    return torch.exp(-GAMMA * softplus(logits_BK)) * softplus(-logits_BK)


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    p, q = torch.sigmoid(logits_BK), torch.sigmoid(-logits_BK)
    # lambda - p as (lambda - 1) + q, to keep precision for p near 1.
    hill = (settings.hill.lambda_ - 1 + q) * p * p
    return torch.where(labels.positive, focal(logits_BK - MARGIN), hill)


LOSS = Loss(per_label=cost, divisor="images", own_settings={"hill": HillSettings})
