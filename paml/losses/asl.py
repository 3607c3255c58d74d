"""ASL, the asymmetric loss (Ridnik et al., ICCV 2021): easy negatives count little, very easy ones nothing.

    positive: -(1 - p)^g+ log p        negative, unobserved: -m^g- log(1 - m),  m = max(p - clip, 0)

The focusing factors (1 - p)^g+ and m^g- are weights, not differentiated, as in the authors' training script (a switch
in their code; the paper's formula would differentiate them). Their class defaults to g- 4, g+ 1, their COCO script,
and so the defaults here, to g- 4, g+ 0; clip 0.05 in both.

Mean over images: the sum over all labels / B. The authors' is the sum itself, B times as much. Adam's steps do not
change with such a factor, so their learning rates carry over as they are; under SGD take B times theirs, and a
`clip_norm` of theirs divided by B. Their log is of p clamped at 1e-8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class ASLSettings:
    """ASL, the asymmetric loss."""

    gamma_positive: float = 0.0
    """Focusing of positives; 0 for none."""
    gamma_negative: float = 4.0
    """Focusing of negatives, observed or assumed."""
    clip: float = 0.05
    """Probability up to which a negative costs nothing; it is taken off every negative's."""

    def __post_init__(self) -> None:
        check_focusing("asl", self, ("gamma_positive", "gamma_negative"), self.clip)


def check_focusing(loss: str, settings: object, gammas: tuple[str, ...], clip: float) -> None:
    """Raise SettingsError for a gamma below 0 or a clip outside [0, 1)."""
    for name in gammas:
        gamma = getattr(settings, name)
        if not 0 <= gamma < float("inf"):
            raise SettingsError(f"loss.{loss}.{name} is {gamma}; it must be 0 (no focusing) or more")
    if not 0 <= clip < 1:
        raise SettingsError(f"loss.{loss}.clip is {clip}; it is a probability, at least 0 and below 1")


def asymmetric(logits_BK: Tensor, positive_BK: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Of every label -log p or -log(1 - m), and its miss, 1 - p or m, which is not differentiated: both [B, K]."""
    against_BK = torch.where(positive_BK, -logits_BK, logits_BK)
    cost_BK, miss_BK = softplus(against_BK), torch.sigmoid(against_BK.detach())
    if clip > 0:
        # 1 - m = (1 - p) + clip, so that little of a p near 1 is lost.
        clipped_BK = -torch.log((torch.sigmoid(-logits_BK) + clip).clamp(max=1))
        cost_BK = torch.where(positive_BK, cost_BK, clipped_BK)
        miss_BK = torch.where(positive_BK, miss_BK, (miss_BK - clip).clamp(min=0))
    return cost_BK, miss_BK


def cost(logits_BK: Tensor, labels: Labels, settings: ASLSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    cost_BK, miss_BK = asymmetric(logits_BK, labels.positive, settings.clip)
    weight_BK = torch.where(labels.positive, miss_BK**settings.gamma_positive, miss_BK**settings.gamma_negative)
    return weight_BK * cost_BK


LOSS = Loss(per_label=cost, divisor="images", settings="asl")
