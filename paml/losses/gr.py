"""GR, the generalized robust loss (Chen et al., IJCAI 2024): unobserved labels have soft targets and soft costs.

    positive: -log p        negative: -log(1 - p)
    unobserved: v [k (1 - p^q2) / q2 + (1 - k) p]
    k = sigmoid(w p + b), the estimated probability of a positive;  v = exp(-((p - mu) / sigma)^2 / 2), a weight

k and v are not differentiated. Their parameters move linearly over the run's T epochs: in epoch t (from 1) w and b have
moved by (t - 1) / T, mu and sigma by t / T. The cost as a positive is nearly -log p for q2 near 0. The cost as a
negative, p, is the paper's (1 - (1 - p)^q3) / q3 at q3 = 1; it is bounded, and so is the effect of a wrong target.

Mean over B x K. The authors use, as defaults of the released code, q2 0.01 and q3 1; w from 0 to 2, b -2; mu from 0.5
to 0.8, sigma from 2 to 0.5; 8 epochs, Adam 1e-5, batch 8. Their code has no observed negatives.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import BatchContext, Labels, Loss

W, B = (0.0, 2.0), (-2.0, -2.0)
"""Slope and offset of k, at the start and at the end of the run."""
MU, SIGMA = (0.5, 0.8), (2.0, 0.5)
"""Center and width of v, at the start and at the end of the run."""


@dataclass(frozen=True, kw_only=True)
class GRSettings:
    """GR, the generalized robust loss."""

    q2: float = 0.01
    """Exponent of the cost as a positive: near 0 the cost is -log p, at 1 it is 1 - p."""

    def __post_init__(self) -> None:
        check_setting(0 < self.q2 <= 1, "loss.gr.q2", self.q2, "above 0 and at most 1")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    """The cost of every label, [B, K]. Raises ValueError if the number of epochs is not known."""
    if context.num_epochs is None:
        raise ValueError("the loss gr has a schedule over the run: set num_epochs")
    begun, done = (min(epochs / context.num_epochs, 1.0) for epochs in (context.epoch - 1, context.epoch))
    w, b = _interpolate(W, begun), _interpolate(B, begun)
    mu, sigma = _interpolate(MU, done), _interpolate(SIGMA, done)
    q2 = settings.gr.q2

    p = torch.sigmoid(logits_BK.detach())
    k = torch.sigmoid(w * p + b)
    v = torch.exp(-0.5 * ((p - mu) / sigma) ** 2)
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    # 1 - p^q = -expm1(q log p), exact also for the small q2.
    as_positive = -torch.expm1(-q2 * present) / q2
    unobserved = v * (k * as_positive + (1 - k) * torch.sigmoid(logits_BK))
    return torch.where(labels.unobserved, unobserved, torch.where(labels.positive, present, absent))


def _interpolate(ends: tuple[float, float], fraction: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * fraction


LOSS = Loss(per_label=cost, own_settings={"gr": GRSettings})
