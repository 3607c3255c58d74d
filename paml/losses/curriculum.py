"""Curriculum labelling by a score threshold (Durand et al., CVPR 2019): sure unobserved labels are learnt as they lean.

    positive: -log p        negative: -log(1 - p)        unobserved: nothing, but from `first_epoch` on
    unobserved with logit x > threshold: -log p;  with x < -threshold: -log(1 - p)

The sides are chosen anew in each step, by the logits of that step, and none for good; those taken as positives are
reported as rejected. Mean over B x K.

Theirs alternates: a network is trained on the observed labels, scores all training images, the unobserved labels that
it is sure of (here, as in one of their five strategies, by a threshold of the score) join the observed ones, and
training starts again on these. Here labels join and leave within one run, and the first epoch alone is without them.
Their cost besides weighs an image by its share of observed labels, and a graph network of the classes goes with it;
neither is here. Threshold 2, p about 0.88 or 0.12.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.labels.states import UNOBSERVED
from paml.losses.base import AS_POSITIVE, LEFT_OUT, Epoch, Labels, Loss, Place


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """Curriculum labelling by a score threshold."""

    threshold: float = 2.0
    """Logit beyond which, to either side, an unobserved label is trained as the side that it leans to."""
    first_epoch: int = 2
    """The first epoch, counted from 1, in which unobserved labels are trained."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise SettingsError(f"loss.curriculum.threshold is {self.threshold}; it is a logit, 0 or more")
        if self.first_epoch < 1:
            raise SettingsError(f"loss.curriculum.first_epoch is {self.first_epoch}; epochs are counted from 1")


def surely_present(
    logits_BK: Tensor, state_BK: Tensor, settings: CurriculumSettings, epoch: Epoch, place: Place
) -> Tensor | None:
    """bool [B, K]: the unobserved labels trained as positives; None before the first epoch that has any."""
    if epoch.number < settings.first_epoch:
        return None
    return (state_BK == UNOBSERVED) & (logits_BK > settings.threshold)


def cost(logits_BK: Tensor, labels: Labels, settings: CurriculumSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    left_out = labels.unobserved
    as_positive = labels.positive
    if labels.rejected_BK is not None:
        left_out = left_out & ~labels.rejected_BK & (logits_BK >= -settings.threshold)
        as_positive = as_positive | labels.rejected_BK
    trained = torch.where(as_positive, softplus(-logits_BK), softplus(logits_BK))
    return torch.where(left_out, torch.zeros_like(trained), trained)


LOSS = Loss(
    unobserved=LEFT_OUT,
    rejected=AS_POSITIVE,
    rejects=True,
    select=surely_present,
    per_label=cost,
    settings="curriculum",
)
