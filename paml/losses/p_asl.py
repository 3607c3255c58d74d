"""P-ASL, the partial asymmetric loss of class-aware selective loss, CSL (Ben-Baruch et al., CVPR 2022), in three modes.

    positive: -(1 - p)^g+ log p        negative: -m^g- log(1 - m)        unobserved: -w m^gu log(1 - m)
    where m = max(p - clip, 0)

- ignore: w = 0.
- negative: w = 1.
- selective: w = 0 for the `top_k` x B most likely unobserved labels of the whole batch, and for all unobserved labels
  of classes whose prior is above `prior_threshold` eta; else 1. The likely ones are chosen among all unobserved labels,
  from the first epoch on, the same set whatever the number of workers, as many in a short last batch; they are reported
  as rejected. A class's prior, the share of images that show it, is not known from partial labels: it is estimated as
  the mean p over the training images by a run of mode ignore, and read from `prior_file`. (The authors' mean runs along
  with that training and is never reset; `python -m paml.training.prior` takes it once, by the run's best checkpoint.)
  Without a file no class is left out.

The focusing factors are weights, not differentiated. Gammas of positives, negatives and unobserved labels: the authors'
command line has 0, 1 and 2 (the defaults here); for COCO they advise 0, 1, 4 where labels are dropped at random and
0, 3, 4 where classes are; clip 0, top_k 5, eta 0.05 (0.5 in the
commands that they advise).

Mean over images, as ASL, and with the same remarks on learning rates: the authors' is the sum. Their log is of p
clamped at 1e-8.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from paml.errors import SettingsError
from paml.labels.states import UNOBSERVED
from paml.losses.asl import asymmetric, check_focusing
from paml.losses.base import LEFT_OUT, Epoch, Labels, Loss, Place
from paml.losses.memory import Memory, Scope
from paml.losses.prior import read_prior
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
    prior_file: str | None = None
    """Mode selective: CSV or Parquet file (local or s3://) of classes' priors, columns mid and prior; null for none.
    `python -m paml.training.prior` makes it of a run."""
    prior_threshold: float = 0.05
    """Mode selective: eta, the prior above which all unobserved labels of a class are left out."""

    def __post_init__(self) -> None:
        check_focusing("p_asl", self, ("gamma_positive", "gamma_negative", "gamma_unobserved"), self.clip)
        if self.top_k < 0:
            raise SettingsError(f"loss.p_asl.top_k is {self.top_k}; it is a number of labels an image, at least 0")
        if not 0 <= self.prior_threshold <= 1:
            raise SettingsError(
                f"loss.p_asl.prior_threshold is {self.prior_threshold}; it is a share of images, from 0 to 1"
            )


def cost(logits_BK: Tensor, labels: Labels, settings: PASLSettings, epoch: Epoch, *, weight: float) -> Tensor:
    """The cost of every label, [B, K], with the weight of an unobserved one."""
    cost_BK, miss_BK = asymmetric(logits_BK, labels.positive, settings.clip)
    observed_BK = torch.where(labels.positive, miss_BK**settings.gamma_positive, miss_BK**settings.gamma_negative)
    unobserved_BK = weight * miss_BK**settings.gamma_unobserved
    if labels.recalled is not None:
        unobserved_BK = torch.where(labels.recalled, 0.0, unobserved_BK)
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


class CommonClasses(Memory):
    """Recalls bool [K]: the classes whose unobserved labels are left out, the same in every step."""

    def __init__(self, prior_file: str, threshold: float, scope: Scope) -> None:
        super().__init__(scope)
        self.prior_file = prior_file
        self.common_K = torch.from_numpy(read_prior(prior_file, scope.classes) > threshold).to(scope.device)

    def recall(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """bool [K]."""
        return self.common_K

    def tensors(self) -> dict[str, Tensor]:
        """The classes, so that a run does not go on with others."""
        return {"common": self.common_K}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raise SettingsError where the file says otherwise than when the run was begun."""
        if not torch.equal(tensors["common"].cpu(), self.common_K.cpu()):
            raise SettingsError(
                f"loss.p_asl.prior_file: by {self.prior_file} {int(self.common_K.sum())} classes are left out, other "
                f"ones than the {int(tensors['common'].sum())} of the run's checkpoint. Put the same file back, or "
                "give the new run another run.name"
            )


def memory(settings: PASLSettings, scope: Scope) -> Memory | None:
    """The classes with a high prior; None without a file of priors."""
    if settings.prior_file is None:
        return None
    return CommonClasses(settings.prior_file, settings.prior_threshold, scope)


IGNORE = Loss(unobserved=LEFT_OUT, per_label=partial(cost, weight=0.0), divisor="images", settings="p_asl")
NEGATIVE = Loss(per_label=partial(cost, weight=1.0), divisor="images", settings="p_asl")
SELECTIVE = Loss(
    per_label=partial(cost, weight=1.0),
    rejects=True,
    select=most_likely,
    divisor="images",
    settings="p_asl",
    memory=memory,
)
