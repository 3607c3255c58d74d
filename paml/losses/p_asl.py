"""P-ASL, the partial asymmetric loss of class-aware selective loss, CSL (Ben-Baruch et al., CVPR 2022), in three modes.

    positive: -(1 - p)^g+ log p        negative: -m^g- log(1 - m)        unobserved: -w m^gu log(1 - m)
    with m = max(p - clip, 0)

- ignore: w = 0.
- negative: w = 1.
- selective: w = 0 for the `top_k` x B most likely unobserved labels of the global batch of B images (fewer in a short
  last batch), and for all unobserved labels of classes whose prior is above `prior_threshold` eta; else 1. The most
  likely labels are chosen among all unobserved labels, from the first epoch on, the same set for any number of workers;
  they are reported as rejected. A class's prior, the fraction of images that show it, is not known from partial labels.
  It is estimated as the mean p over the training images by a run of mode ignore and read from `prior_file`. (The
  authors' mean runs along with that training and is never reset; `paml evaluate --prior_out` computes it once, with
  the run's best checkpoint.) Without a file no class is left out.

The focusing factors are weights without a gradient. The defaults of the authors' command line, and here, are gammas 0,
1 and 2 for positives, negatives and unobserved labels; for COCO they recommend 0, 1, 4 if labels are missing at random
and 0, 3, 4 if classes are; clip 0, top_k 5, eta 0.05 (0.5 in the commands that they recommend).

Mean over images as ASL, where learning rates are explained: the authors use the sum.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paml.errors import SettingsError, check_setting
from paml.labels.states import UNOBSERVED
from paml.losses.asl import asymmetric
from paml.losses.base import LEFT_OUT, BatchContext, Labels, Loss, check_not_negative
from paml.losses.prior import read_prior
from paml.losses.select import select_rejected
from paml.losses.state import LossState, StateScope


@dataclass(frozen=True, kw_only=True)
class PASLSettings:
    """P-ASL, the partial asymmetric loss of CSL, all modes."""

    gamma_positive: float = 0.0
    """Focusing of observed positives; 0 for none."""
    gamma_negative: float = 1.0
    """Focusing of observed negatives."""
    gamma_unobserved: float = 2.0
    """Focusing of unobserved labels, which are trained as negatives (not in mode ignore)."""
    clip: float = 0.0
    """Subtracted from a negative's probability; negatives up to this probability cost nothing."""
    top_k: int = 5
    """Mode selective: the most likely unobserved labels of the batch are left out, this many per image on average."""
    prior_file: str | None = None
    """Mode selective: CSV or Parquet file (local or s3://) of class priors, columns mid and prior; null for none.
    `paml evaluate --prior_out` writes it from a run."""
    prior_threshold: float = 0.05
    """Mode selective: eta, the prior above which all unobserved labels of a class are left out."""

    def __post_init__(self) -> None:
        check_not_negative("p_asl", self, "gamma_positive", "gamma_negative", "gamma_unobserved")
        check_setting(0 <= self.clip < 1, "loss.p_asl.clip", self.clip, "a probability, at least 0 and below 1")
        check_setting(self.top_k >= 0, "loss.p_asl.top_k", self.top_k, "0 or more labels per image")
        threshold = self.prior_threshold
        check_setting(0 <= threshold <= 1, "loss.p_asl.prior_threshold", threshold, "a fraction of images, from 0 to 1")


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext, *, weight: float) -> Tensor:
    """The cost of every label, [B, K]; weight: w of the unobserved labels."""
    own: PASLSettings = settings.p_asl
    cost_BK, miss_BK = asymmetric(logits_BK, labels.positive, own.clip)
    observed_BK = torch.where(labels.positive, miss_BK**own.gamma_positive, miss_BK**own.gamma_negative)
    unobserved_BK = weight * miss_BK**own.gamma_unobserved
    if labels.loss_state is not None:
        unobserved_BK = torch.where(labels.loss_state, 0.0, unobserved_BK)
    return torch.where(labels.unobserved, unobserved_BK, observed_BK) * cost_BK


def most_likely(logits_BK: Tensor, state_BK: Tensor, settings: Any, context: BatchContext) -> Tensor:
    """bool [B, K]: in each pool the unobserved labels with the highest logits, `top_k` per image."""
    return select_rejected(
        logits_BK,
        state_BK == UNOBSERVED,
        context.pools(logits_BK, settings.reject_pool),
        rate=min(Fraction(settings.p_asl.top_k, max(logits_BK.shape[1], 1)), Fraction(1)),
        reject_of="all",
    )


class CommonClasses(LossState):
    """Reads bool [K]: the classes whose unobserved labels are left out, the same in every step."""

    def __init__(self, prior_file: str, threshold: float, scope: StateScope) -> None:
        self.prior_file = prior_file
        self.common_K = torch.from_numpy(read_prior(prior_file, scope.classes) > threshold).to(scope.device)

    def read(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """bool [K]."""
        return self.common_K

    def tensors(self) -> dict[str, Tensor]:
        """The classes."""
        return {"common": self.common_K}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raise SettingsError if the file gives other classes than when the run started."""
        if not torch.equal(tensors["common"].cpu(), self.common_K.cpu()):
            raise SettingsError(
                f"loss.p_asl.prior_file: {self.prior_file} leaves out {int(self.common_K.sum())} classes, the run's "
                f"checkpoint leaves out {int(tensors['common'].sum())} or other ones. Restore the file, or start a new "
                "run with another run.name"
            )


def common_classes(settings: Any, scope: StateScope) -> LossState | None:
    """The classes with a high prior; None without a prior file."""
    own: PASLSettings = settings.p_asl
    return None if own.prior_file is None else CommonClasses(own.prior_file, own.prior_threshold, scope)


_SETTINGS: dict[str, type] = {"p_asl": PASLSettings}
IGNORE = Loss(unobserved=LEFT_OUT, per_label=partial(cost, weight=0.0), divisor="images", own_settings=_SETTINGS)
NEGATIVE = Loss(per_label=partial(cost, weight=1.0), divisor="images", own_settings=_SETTINGS)
SELECTIVE = Loss(
    per_label=partial(cost, weight=1.0),
    select=most_likely,
    divisor="images",
    own_settings=_SETTINGS,
    state=common_classes,
)
