"""Curriculum labeling by a score threshold (Durand et al., CVPR 2019): confident unobserved labels are trained.

    positive: -log p        negative: -log(1 - p)        unobserved: nothing, but after the warm-up
    unobserved with logit x > threshold: -log p;  with x < -threshold: -log(1 - p)

Labels are chosen in each step anew, by the logits of that step; those trained as positives are reported as rejected.
Mean over B x K.

The authors alternate: they train a network on the observed labels, score all training images, add the unobserved labels
that the network is confident of (one of their five strategies is a score threshold) and train again. Here labels are
added and removed within one run. The authors also weigh an image by its fraction of observed labels and use a graph
network over the classes; neither is implemented here. Threshold 2 is p of about 0.88 or 0.12.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.losses.base import AS_POSITIVE, LEFT_OUT, BatchContext, Labels, Loss, unobserved_above


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """Curriculum labeling by a score threshold."""

    threshold: float = 2.0
    """Unobserved labels are trained as positives if their logit is above this, as negatives if it is below -this."""

    def __post_init__(self) -> None:
        valid = 0 <= self.threshold < float("inf")
        check_setting(valid, "loss.curriculum.threshold", self.threshold, "a logit, 0 or more")


def confident_positives(logits_BK: Tensor, state_BK: Tensor, settings: Any, context: BatchContext) -> Tensor | None:
    """bool [B, K]: the unobserved labels that are trained as positives; None during the warm-up."""
    return unobserved_above(settings.curriculum.threshold, logits_BK, state_BK, settings, context.epoch)


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    left_out = labels.unobserved
    as_positive = labels.positive
    if labels.rejected_BK is not None:
        left_out = left_out & ~labels.rejected_BK & (logits_BK >= -settings.curriculum.threshold)
        as_positive = as_positive | labels.rejected_BK
    trained = torch.where(as_positive, softplus(-logits_BK), softplus(logits_BK))
    return torch.where(left_out, torch.zeros_like(trained), trained)


LOSS = Loss(
    unobserved=LEFT_OUT,
    rejected=AS_POSITIVE,
    select=confident_positives,
    per_label=cost,
    own_settings={"curriculum": CurriculumSettings},
)
