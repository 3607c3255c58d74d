"""EM + APL, entropy maximization with asymmetric pseudo-labels (Zhou et al., ECCV 2022).

    positive: -log p        negative: -log(1 - p)        unobserved: -alpha H(p), as EM
    unobserved with a pseudo-label t: beta [-t log p - (1 - t) log(1 - p)]

After each epoch from epoch w = warm-up + 1 to the last but one, the lowest floor(0.9 n / (T - w)) scores of each class
become pseudo-labels for good. t is the score p at that time, a soft negative. n is the number of the class's unobserved
labels, T the run's epochs; a label with a pseudo-label is not chosen again. So 0.9 n labels have one when the last
epoch starts. In a run of w epochs or fewer no label has one, and the loss is EM.

Mean over B x K. The authors use, in ten epochs, for VOC, COCO, NUS-WIDE and CUB: alpha 0.2, 0.1, 0.1, 0.01; beta 0.02,
0.9, 0.2, 0.4; w 5, 5, 4, 3; learning rate 1e-5 (CUB 1e-4), batch 8, 16, 16, 8.

Differences: the authors score all training images in a separate pass after each epoch. Here an image's score is the one
that the epoch's training computed, with its flip and boost and with weights up to an epoch old, which costs nothing.
Their code has no observed negatives.

State: the epoch's logits and the pseudo-labels of the run's images, in 16 bits: 4 bytes per label. Scores that are
equal in 16 bits are chosen in the order of the manifest.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.labels.states import UNOBSERVED
from paml.losses import em
from paml.losses.base import BatchContext, Labels, Loss, check_not_negative
from paml.losses.state import ImageState, StateScope

MAX_FLOAT16 = 65504.0
CLASSES_PER_SORT = 32
"""Classes whose scores are sorted together; bounds the memory of sorting."""
WARMUP_EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class EMAPLSettings:
    """EM + APL, entropy maximization with asymmetric pseudo-labels."""

    beta: float = 0.9
    """Weight of a pseudo-label: VOC 0.02, COCO 0.9, NUS-WIDE 0.2, CUB 0.4."""
    pseudo_label_fraction: float = 0.9
    """Fraction of a class's unobserved labels that have a pseudo-label in the end."""

    def __post_init__(self) -> None:
        check_not_negative("em_apl", self, "beta")
        fraction = self.pseudo_label_fraction
        check_setting(0 <= fraction <= 1, "loss.em_apl.pseudo_label_fraction", fraction, "a fraction from 0 to 1")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    cost_BK = em.cost(logits_BK, labels, settings, context)
    assert labels.loss_state is not None
    has_one_BK = labels.unobserved & ~labels.loss_state.isnan()
    target_BK = torch.where(has_one_BK, labels.loss_state.to(logits_BK.dtype), 0.0)
    pseudo_BK = target_BK * softplus(-logits_BK) + (1 - target_BK) * softplus(logits_BK)
    return torch.where(has_one_BK, settings.em_apl.beta * pseudo_BK, cost_BK)


class PseudoLabels(ImageState):
    """The epoch's scores and the pseudo-labels so far. Reads float32 [B, K], NaN for a label without one."""

    def __init__(self, settings: Any, scope: StateScope) -> None:
        super().__init__(scope, "em-apl", 4, settings.max_state_gb)
        self.first_epoch = settings.warmup_or(WARMUP_EPOCHS) + 1
        self.fraction = Fraction(str(settings.em_apl.pseudo_label_fraction))
        shape = len(scope.index) + 1, len(scope.classes)
        self.logits_NK = torch.full(shape, math.nan, dtype=torch.float16, device=scope.device)
        """Of this epoch's unobserved labels; NaN for observed labels and images not seen yet."""
        self.target_NK = torch.full_like(self.logits_NK, math.nan)
        self.tensors_N = {"logits": self.logits_NK, "target": self.target_NK}

    def read(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """The pseudo-labels of these images."""
        return self.target_NK[self.rows(index)].float()

    def apply(self, row_S: Tensor, logits_SK: Tensor, state_SK: Tensor, learning_rate: float) -> None:
        """Store the scores."""
        clamped_SK = logits_SK.clamp(-MAX_FLOAT16, MAX_FLOAT16)
        self.logits_NK[row_S] = torch.where(state_SK == UNOBSERVED, clamped_SK, math.nan).half()

    def end_epoch(self, epoch: int) -> None:
        """After the warm-up, turn the lowest scores of each class into pseudo-labels; clear the scores."""
        if self.first_epoch <= epoch < self.scope.epochs:
            fraction = self.fraction / (self.scope.epochs - self.first_epoch)
            for start in range(0, self.logits_NK.shape[1], CLASSES_PER_SORT):
                columns = slice(start, start + CLASSES_PER_SORT)
                _label(self.logits_NK[:-1, columns], self.target_NK[:-1, columns], fraction)
        self.logits_NK.fill_(math.nan)


def _label(logits_NK: Tensor, target_NK: Tensor, fraction: Fraction) -> None:
    """Set targets for the lowest scores of each class among the labels without one, in place."""
    unobserved_NK = ~logits_NK.isnan()
    count_K = unobserved_NK.sum(0) * fraction.numerator // fraction.denominator
    unlabeled_NK = unobserved_NK & target_NK.isnan()
    score_NK = torch.where(unlabeled_NK, logits_NK.float(), math.inf)
    order_NK = score_NK.sort(dim=0, stable=True).indices
    rank_N1 = torch.arange(len(logits_NK), device=logits_NK.device)[:, None]
    chosen_NK = torch.zeros_like(unlabeled_NK).scatter(0, order_NK, rank_N1 < count_K) & unlabeled_NK
    target_NK.copy_(torch.where(chosen_NK, torch.sigmoid(logits_NK.float()).half(), target_NK))


LOSS = Loss(
    per_label=cost,
    own_settings={"em_apl": EMAPLSettings, "em": em.EMSettings},
    state=PseudoLabels,
    needs_state=True,
)
