"""EM + APL, entropy maximisation with asymmetric pseudo-labels (Zhou et al., ECCV 2022).

    positive: -log p        negative: -log(1 - p)        unobserved: -alpha H(p), as EM
    unobserved with a pseudo-label t: beta [-t log p - (1 - t) log(1 - p)]

After each epoch from `first_epoch` w to the last but one, the lowest floor(0.9 n / (T - w)) scores of each class become
pseudo-labels for good: t is the score p itself at that time, a soft negative. n is the number of the class's unobserved
labels, T the run's epochs; what has a pseudo-label is not chosen again. So 0.9 n have one when the last epoch begins;
in a run of w epochs or fewer nothing has, and the loss is EM.

Mean over B x K. Theirs, in ten epochs, for VOC, COCO, NUS-WIDE and CUB: alpha 0.2, 0.1, 0.1, 0.01; beta 0.02, 0.9, 0.2,
0.4; w 5, 5, 4, 3; learning rate 1e-5 (CUB 1e-4), batch 8, 16, 16, 8.

Where this differs: theirs scores all training images in a pass of its own once an epoch is over. Here an image's score
is the one that the epoch's training gave it, with its flip and boost and weights up to an epoch old, which costs
nothing. Their log is of p + 1e-5, and their code knows no observed negatives.

Memory: the epoch's logits and the pseudo-labels, 16 bits each, of the images that take part: 4 bytes a label. Scores
that are equal in 16 bits are chosen in the order of the manifest.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.labels.states import UNOBSERVED
from paml.losses import em
from paml.losses.base import Epoch, Labels, Loss
from paml.losses.memory import Memory, Scope, check_bound, check_fits

LARGEST = 65504.0
"""Largest number of 16 bits."""
CLASSES_AT_ONCE = 32
"""Classes whose scores are sorted together, to bound what sorting takes."""


@dataclass(frozen=True, kw_only=True)
class EMAPLSettings:
    """EM + APL, entropy maximisation with asymmetric pseudo-labels."""

    alpha: float = 0.1
    """Weight of the entropy of unobserved labels: VOC 0.2, COCO 0.1, NUS-WIDE 0.1, CUB 0.01."""
    beta: float = 0.9
    """Weight of a pseudo-label: VOC 0.02, COCO 0.9, NUS-WIDE 0.2, CUB 0.4."""
    first_epoch: int = 5
    """w, the first epoch, counted from 1, after which labels get pseudo-labels: VOC 5, COCO 5, NUS-WIDE 4, CUB 3."""
    share: float = 0.9
    """Share of a class's unobserved labels that have a pseudo-label in the end."""
    max_memory_gb: float = 4.0
    """Largest memory of scores that a worker may hold, 4 bytes for each (image, class) pair."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"loss.em_apl.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.first_epoch < 1:
            raise SettingsError(f"loss.em_apl.first_epoch is {self.first_epoch}; epochs are counted from 1")
        if not 0 <= self.share <= 1:
            raise SettingsError(f"loss.em_apl.share is {self.share}; it is a fraction from 0 to 1")
        check_bound("em_apl", self.max_memory_gb)


def cost(logits_BK: Tensor, labels: Labels, settings: EMAPLSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]."""
    cost_BK = em.cost(logits_BK, labels, em.EMSettings(alpha=settings.alpha), epoch)
    if labels.recalled is None:
        return cost_BK
    has_one_BK = labels.unobserved & ~labels.recalled.isnan()
    target_BK = torch.where(has_one_BK, labels.recalled.to(logits_BK.dtype), 0.0)
    pseudo_BK = target_BK * softplus(-logits_BK) + (1 - target_BK) * softplus(logits_BK)
    return torch.where(has_one_BK, settings.beta * pseudo_BK, cost_BK)


class PseudoLabels(Memory):
    """The epoch's scores and the pseudo-labels so far. Recalls these as float32 [B, K], NaN where a label has none."""

    def __init__(self, settings: EMAPLSettings, scope: Scope) -> None:
        super().__init__(scope)
        self.settings = settings
        check_fits("em-apl", scope, 4, settings.max_memory_gb, "a score and a pseudo-label")
        shape = len(scope.index) + 1, len(scope.classes)  # the last row is for slots without an image
        self.logits_NK = torch.full(shape, math.nan, dtype=torch.float16, device=scope.device)
        """Of this epoch's unobserved labels; NaN for observed ones and for images that have not come yet."""
        self.target_NK = torch.full_like(self.logits_NK, math.nan)

    def recall(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """The pseudo-labels of these images."""
        return self.target_NK[self.rows(index)].float()

    def learn(
        self, index: np.ndarray, slots_B: Tensor, logits_BK: Tensor, state_BK: Tensor, learning_rate: float
    ) -> None:
        """Keep the scores of the global batch."""
        row_S, logits_SK, state_SK = self.together(index, slots_B, logits_BK, state_BK)
        known_SK = torch.where(state_SK == UNOBSERVED, logits_SK.clamp(-LARGEST, LARGEST), math.nan)
        self.logits_NK[row_S] = known_SK.half()

    def end_epoch(self, epoch: int) -> None:
        """From the first epoch on, the lowest scores of each class become pseudo-labels; the scores are forgotten."""
        first, last = self.settings.first_epoch, self.scope.epochs
        if first <= epoch < last:
            share = Fraction(str(self.settings.share)) / (last - first)
            for start in range(0, self.logits_NK.shape[1], CLASSES_AT_ONCE):
                columns = slice(start, start + CLASSES_AT_ONCE)
                self._label(self.logits_NK[:-1, columns], self.target_NK[:-1, columns], share)
        self.logits_NK.fill_(math.nan)

    def _label(self, logits_NK: Tensor, target_NK: Tensor, share: Fraction) -> None:
        unobserved_NK = ~logits_NK.isnan()
        count_K = unobserved_NK.sum(0) * share.numerator // share.denominator
        open_NK = unobserved_NK & target_NK.isnan()
        score_NK = torch.where(open_NK, logits_NK.float(), math.inf)
        order_NK = score_NK.sort(dim=0, stable=True).indices
        rank_N1 = torch.arange(len(logits_NK), device=logits_NK.device)[:, None]
        chosen_NK = torch.zeros_like(open_NK).scatter(0, order_NK, rank_N1 < count_K) & open_NK
        target_NK.copy_(torch.where(chosen_NK, torch.sigmoid(logits_NK.float()).half(), target_NK))

    def tensors(self) -> dict[str, Tensor]:
        """Scores and pseudo-labels."""
        return {"logits": self.logits_NK[:-1], "target": self.target_NK[:-1]}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.logits_NK[:-1] = tensors["logits"].to(self.logits_NK.device)
        self.target_NK[:-1] = tensors["target"].to(self.target_NK.device)


def memory(settings: Any, scope: Scope) -> Memory:
    """The pseudo-labels of a run."""
    return PseudoLabels(settings, scope)


LOSS = Loss(per_label=cost, settings="em_apl", memory=memory)
