"""Hill loss (Zhang et al., "Robust loss design for multi-label learning with missing labels", 2021).

    positive: -(1 - p_m)^gamma log p_m,  p_m = sigmoid(x - margin)        negative, unobserved: (lambda - p) p^2

The negatives' gradient falls again towards p = 1 (with lambda 1.5 it is 3 p^2 (1 - p)^2), where a false negative is
likely. The focusing factor is differentiated. Theirs: margin 1, gamma 2, lambda 1.5 on all sets; Adam 1e-4.

Mean over images: the sum over all labels / B. The authors' is the sum itself: learning rates as said for ASL.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class HillSettings:
    """Hill loss."""

    margin: float = 1.0
    """Taken off a positive's logit; the authors advise 0.5 to 1."""
    gamma: float = 2.0
    """Focusing of positives; 0 for none."""
    lambda_: float = 1.5
    """Of a negative's cost (lambda - p) p^2, which is highest at p = 2 lambda / 3; at least 1."""

    def __post_init__(self) -> None:
        check_margin_and_gamma("hill", self.margin, self.gamma)
        if not 1 <= self.lambda_ < float("inf"):
            raise SettingsError(f"loss.hill.lambda_ is {self.lambda_}; it must be at least 1, or costs fall below 0")


def check_margin_and_gamma(loss: str, margin: float, gamma: float) -> None:
    """Raise SettingsError for a margin or a gamma below 0."""
    for name, value in (("margin", margin), ("gamma", gamma)):
        if not 0 <= value < float("inf"):
            raise SettingsError(f"loss.{loss}.{name} is {value}; it must be 0 or more")


def focal(logits_BK: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p, the factor differentiated with the rest; of -x it is -p^gamma log(1 - p)."""
    return torch.exp(-gamma * softplus(logits_BK)) * softplus(-logits_BK)


def cost(logits_BK: Tensor, labels: Labels, settings: HillSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    p, q = torch.sigmoid(logits_BK), torch.sigmoid(-logits_BK)
    # lambda - p as (lambda - 1) + q, so that little of a p near 1 is lost.
    hill = (settings.lambda_ - 1 + q) * p * p
    return torch.where(labels.positive, focal(logits_BK - settings.margin, settings.gamma), hill)


LOSS = Loss(per_label=cost, divisor="images", settings="hill")
