"""P-ASL, the partial asymmetric loss of class-aware selective loss, CSL (Ben-Baruch et al., CVPR 2022), in three modes.

    positive: -(1 - p)^g+ log p        negative: -m^g- log(1 - m)        unobserved: -w m^gu log(1 - m)
    where m = max(p - clip, 0)

- ignore: w = 0.
- negative: w = 1.
- selective: w = 0 for the `top_k` x B most likely unobserved labels of the whole batch, else 1. (The authors leave out
  beside them the unobserved labels of classes whose estimated prior is high; that half needs a prior from a run of its
  own and is not here.) Chosen from the first epoch on, the same set whatever the number of workers, as many in a short
  last batch; they are reported as rejected.

The focusing factors are weights, not differentiated. Gammas of positives, negatives and unobserved labels: the authors'
command line has 0, 1 and 2 (the defaults here); for COCO they advise 0, 1, 4 where labels are dropped at random and
0, 3, 4 where classes are; clip 0, top_k 5.

Mean over images, as ASL, and with the same remarks on learning rates: the authors' is the sum. Their log is of p
clamped at 1e-8.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from paml.errors import SettingsError
from paml.labels.states import UNOBSERVED
from paml.losses.asl import asymmetric, check_focusing
from paml.losses.base import LEFT_OUT, Epoch, Labels, Loss, Place
from paml.losses.select import select_rejected


@dataclass(frozen=True, kw_only=True)
class PASLSettings:
    """P-ASL, the partial asymmetric loss of CSL; its mode is in the loss's name."""

    gamma_positive: float = 0.0
    """Focusing of observed positives; 0 for none."""
    gamma_negative: float = 1.0
    """Focusing of observed negatives."""
    gamma_unobserved: float = 2.0
    """Focusing of unobserved labels, which are trained as negatives (not in mode ignore)."""
    clip: float = 0.0
    """Probability up to which a negative costs nothing; it is taken off every negative's."""
    top_k: int = 5
    """Mode selective: unobserved labels left out for each image of a full batch, the most likely of the batch."""

    def __post_init__(self) -> None:
        check_focusing("p_asl", self, ("gamma_positive", "gamma_negative", "gamma_unobserved"), self.clip)
        if self.top_k < 0:
            raise SettingsError(f"loss.p_asl.top_k is {self.top_k}; it is a number of labels an image, at least 0")


def cost(logits_BK: Tensor, labels: Labels, settings: PASLSettings, epoch: Epoch, *, weight: float) -> Tensor:
    """The cost of every label, [B, K], with the weight of an unobserved one."""
    cost_BK, miss_BK = asymmetric(logits_BK, labels.positive, settings.clip)
    observed_BK = torch.where(labels.positive, miss_BK**settings.gamma_positive, miss_BK**settings.gamma_negative)
    unobserved_BK = weight * miss_BK**settings.gamma_unobserved
    return torch.where(labels.unobserved, unobserved_BK, observed_BK) * cost_BK


def most_likely(logits_BK: Tensor, state_BK: Tensor, settings: PASLSettings, epoch: Epoch, place: Place) -> Tensor:
    """bool [B, K]: in each pool the unobserved labels with the highest logits, `top_k` for each of its slots."""
    rate = min(Fraction(settings.top_k, max(logits_BK.shape[1], 1)), Fraction(1))
    return select_rejected(
        logits_BK,
        state_BK == UNOBSERVED,
        slots_B=place.slots_B,
        batch_size=place.batch_size,
        rate=rate,
        reject_of="all",
        reject_pool=place.reject_pool,
        group=place.world,
    )


IGNORE = Loss(unobserved=LEFT_OUT, per_label=partial(cost, weight=0.0), divisor="images", settings="p_asl")
NEGATIVE = Loss(per_label=partial(cost, weight=1.0), divisor="images", settings="p_asl")
SELECTIVE = Loss(
    per_label=partial(cost, weight=1.0), rejects=True, select=most_likely, divisor="images", settings="p_asl"
)
