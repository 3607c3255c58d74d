"""SPLC, self-paced loss correction (Zhang et al., "Robust loss design for multi-label learning with missing labels").

    positive: -(1 - p_m)^gamma log p_m,  p_m = sigmoid(x - margin)        negative, unobserved: -p^gamma log(1 - p)
    from `first_epoch` on, an unobserved label with p > threshold: -(1 - p)^gamma log p, without the margin

Labels are corrected anew in each step, none for good; they are reported as rejected. The focusing factors are
differentiated. Theirs: margin 1, gamma 2, correction from the second epoch on, threshold 0.6 (0.65 for COCO with 75 %
of its labels); Adam 1e-4, batch 128. Their code knows no observed negatives; ours are never corrected.

Mean over images: the sum over all labels / B. The authors' is the sum itself: learning rates as said for ASL.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paml.errors import SettingsError
from paml.labels.states import UNOBSERVED
from paml.losses.base import AS_POSITIVE, Epoch, Labels, Loss, Place
from paml.losses.hill import check_margin_and_gamma, focal


@dataclass(frozen=True, kw_only=True)
class SPLCSettings:
    """SPLC, self-paced loss correction."""

    margin: float = 1.0
    """Taken off an observed positive's logit."""
    gamma: float = 2.0
    """Focusing of all labels; 0 for none."""
    threshold: float = 0.6
    """Probability above which an unobserved label is trained as a positive."""
    first_epoch: int = 2
    """The first epoch, counted from 1, in which labels are corrected."""

    def __post_init__(self) -> None:
        check_margin_and_gamma("splc", self.margin, self.gamma)
        if not 0 < self.threshold < 1:
            raise SettingsError(f"loss.splc.threshold is {self.threshold}; it is a probability above 0 and below 1")
        if self.first_epoch < 1:
            raise SettingsError(f"loss.splc.first_epoch is {self.first_epoch}; epochs are counted from 1")


def likely(logits_BK: Tensor, state_BK: Tensor, settings: SPLCSettings, epoch: Epoch, place: Place) -> Tensor | None:
    """bool [B, K]: the unobserved labels with p > threshold; None before the first epoch of correction."""
    if epoch.number < settings.first_epoch:
        return None
    bound = math.log(settings.threshold / (1 - settings.threshold))
    return (state_BK == UNOBSERVED) & (logits_BK > bound)


def cost(logits_BK: Tensor, labels: Labels, settings: SPLCSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    as_positive = labels.positive
    if labels.rejected_BK is not None:
        as_positive = as_positive | labels.rejected_BK
    shifted = torch.where(labels.positive, logits_BK - settings.margin, logits_BK)
    return focal(torch.where(as_positive, shifted, -shifted), settings.gamma)


LOSS = Loss(rejected=AS_POSITIVE, rejects=True, select=likely, per_label=cost, divisor="images", settings="splc")
