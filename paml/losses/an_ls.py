"""AN-LS, assume negative with label smoothing (as compared by Cole et al., CVPR 2021).

    target t = 1 - e for a positive, e for a negative or an unobserved label; cost -t log p - (1 - t) log(1 - p)

Mean over B x K. The authors use e = 0.1 on all data sets. They move all of e to the other side; others move e / 2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import BatchContext, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class ANLSSettings:
    """AN-LS, assume negative with label smoothing."""

    smoothing: float = 0.1
    """e: the target is 1 - e for positives and e for all other labels."""

    def __post_init__(self) -> None:
        check_setting(0 <= self.smoothing < 0.5, "loss.an_ls.smoothing", self.smoothing, "at least 0 and below 0.5")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    e = settings.an_ls.smoothing
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    return torch.where(labels.positive, (1 - e) * present + e * absent, (1 - e) * absent + e * present)


LOSS = Loss(per_label=cost, own_settings={"an_ls": ANLSSettings})
