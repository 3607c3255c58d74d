"""SPLC, self-paced loss correction (Zhang et al., "Robust loss design for multi-label learning with missing labels").

    positive: -(1 - p_m)^gamma log p_m,  p_m = sigmoid(x - margin)        negative, unobserved: -p^gamma log(1 - p)
    after the warm-up, an unobserved label with p > threshold: -(1 - p)^gamma log p, without the margin

Labels are corrected in each step anew; they are reported as rejected. The focusing factors are differentiated. The
authors use margin 1, gamma 2, one warm-up epoch and threshold 0.6 (0.65 for COCO with 75 % of its labels); Adam 1e-4,
batch 128. Their code has no observed negatives; here they are never corrected.

Mean over images: the sum over all labels / B. The authors use the sum itself; see ASL for learning rates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paml.errors import check_setting
from paml.losses.base import AS_POSITIVE, BatchContext, Labels, Loss, unobserved_above
from paml.losses.hill import MARGIN, focal


@dataclass(frozen=True, kw_only=True)
class SPLCSettings:
    """SPLC, self-paced loss correction."""

    threshold: float = 0.6
    """Probability above which an unobserved label is trained as a positive."""

    def __post_init__(self) -> None:
        valid = 0 < self.threshold < 1
        check_setting(valid, "loss.splc.threshold", self.threshold, "a probability above 0 and below 1")


def likely(logits_BK: Tensor, state_BK: Tensor, settings: Any, context: BatchContext) -> Tensor | None:
    """bool [B, K]: the unobserved labels with p > threshold; None during the warm-up."""
    threshold = settings.splc.threshold
    return unobserved_above(math.log(threshold / (1 - threshold)), logits_BK, state_BK, settings, context.epoch)


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    as_positive = labels.positive
    if labels.rejected_BK is not None:
        as_positive = as_positive | labels.rejected_BK
    shifted = torch.where(labels.positive, logits_BK - MARGIN, logits_BK)
    return focal(torch.where(as_positive, shifted, -shifted))


LOSS = Loss(
    rejected=AS_POSITIVE,
    select=likely,
    per_label=cost,
    divisor="images",
    own_settings={"splc": SPLCSettings},
)
