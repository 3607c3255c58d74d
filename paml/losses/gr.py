"""GR, the generalised robust loss (Chen et al., IJCAI 2024): unobserved labels have soft targets and soft costs.

    positive: -log p        negative: -log(1 - p)
    unobserved: v [k (1 - p^q2) / q2 + (1 - k) (1 - (1 - p)^q3) / q3]
    k = sigmoid(w p + b), the estimated chance of being a positive;  v = exp(-((p - mu) / sigma)^2 / 2), a weight

k and v are weights, not differentiated. They move in straight lines over the run's T epochs: in epoch t (from 1) w and
b have gone (t - 1) / T of their way, mu and sigma t / T. A cost with q near 0 is nearly -log p, with q = 1 it is 1 - p,
which bounds what a wrong target can do.

Mean over B x K. Theirs, all defaults of the released code: q2 0.01, q3 1; w 0 to 2, b -2; mu 0.5 to 0.8, sigma 2 to
0.5; 8 epochs, Adam 1e-5, batch 8. What they took for each data set is not released. Their code takes log(p + 1e-7) and
knows no observed negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class GRSettings:
    """GR, the generalised robust loss. Pairs are the values at the start and at the end of the schedule."""

    w: tuple[float, float] = (0.0, 2.0)
    """Slope of k = sigmoid(w p + b), the soft target of an unobserved label."""
    b: tuple[float, float] = (-2.0, -2.0)
    """Offset of k."""
    mu: tuple[float, float] = (0.5, 0.8)
    """Probability at which an unobserved label weighs most."""
    sigma: tuple[float, float] = (2.0, 0.5)
    """Width of that weight, above 0."""
    q2: float = 0.01
    """Power of the cost as a positive, above 0 and at most 1: near 0 it is -log p, at 1 it is 1 - p."""
    q3: float = 1.0
    """Power of the cost as a negative."""
    epochs: int | None = None
    """Epochs that the schedule takes; null takes the run's. Later ones stay at its end."""

    def __post_init__(self) -> None:
        for name in ("w", "b", "mu", "sigma"):
            if len(getattr(self, name)) != 2:
                raise SettingsError(f"loss.gr.{name} is {getattr(self, name)}; it has two values, start and end")
        if not min(self.sigma) > 0:
            raise SettingsError(f"loss.gr.sigma is {self.sigma}; both values must be above 0")
        for name in ("q2", "q3"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(f"loss.gr.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if self.epochs is not None and self.epochs < 1:
            raise SettingsError(f"loss.gr.epochs is {self.epochs}; it must be at least 1, or null")


def cost(logits_BK: Tensor, labels: Labels, settings: GRSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]. Raises ValueError where nobody says how many epochs the schedule takes."""
    length = settings.epochs or epoch.last
    if length is None:
        raise ValueError("GR's schedule needs the number of epochs: pass `epochs`, or set loss.gr.epochs")
    begun, done = (min(done / length, 1.0) for done in (epoch.number - 1, epoch.number))
    w, b = _between(settings.w, begun), _between(settings.b, begun)
    mu, sigma = _between(settings.mu, done), _between(settings.sigma, done)

    p = torch.sigmoid(logits_BK.detach())
    chance = torch.sigmoid(w * p + b)
    weight = torch.exp(-0.5 * ((p - mu) / sigma) ** 2)
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    # 1 - p^q = -expm1(q log p), exact also for the small q2.
    as_positive = -torch.expm1(-settings.q2 * present) / settings.q2
    as_negative = -torch.expm1(-settings.q3 * absent) / settings.q3
    unobserved = weight * (chance * as_positive + (1 - chance) * as_negative)
    return torch.where(labels.unobserved, unobserved, torch.where(labels.positive, present, absent))


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


LOSS = Loss(per_label=cost, settings="gr")
