"""AN-LS, assume negative with label smoothing (compared by Cole et al., CVPR 2021).

    target t = 1 - e for a positive, e for a negative or an unobserved label; cost -t log p - (1 - t) log(1 - p)

Mean over B x K. Theirs is e = 0.1 on all sets, with log(p + 1e-5). Their e goes whole to the other side, where other
authors write e / 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.losses.base import Epoch, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class ANLSSettings:
    """AN-LS, assume negative with label smoothing."""

    smoothing: float = 0.1
    """e: positives are trained to be 1 - e, all others to be e."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 0.5:
            raise SettingsError(f"loss.an_ls.smoothing is {self.smoothing}; it must be at least 0 and below 0.5")


def cost(logits_BK: Tensor, labels: Labels, settings: ANLSSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    own_side, other_side = 1 - settings.smoothing, settings.smoothing
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    as_positive = own_side * present + other_side * absent
    as_negative = own_side * absent + other_side * present
    return torch.where(labels.positive, as_positive, as_negative)


LOSS = Loss(per_label=cost, settings="an_ls")
