"""ROLE, regularised online label estimation (Cole et al., CVPR 2021): the labels are learnt beside the classifier.

Each (image, class) pair has an estimate g of its own, a free logit. With p = sigmoid(x) of the classifier and
e = sigmoid(g), either side learns from what is observed, from the other side, which it takes as it is, and from the
number of positives k that an image has on average:

    1/2 [P(p) + C(p, e) + R(p)] + 1/2 [P(e) + C(e, p) + R(e)]
    P(p) = -log p for a positive, -log(1 - p) for a negative, 0 for an unobserved label
    C(p, e) = -e log p - (1 - e) log(1 - p), for every label, e not differentiated
    R(p) = (s - k)^2 / K^2, s the mean over the batch's images of the sum of p over all classes

P and C are means over B x K; R is that of the global batch, as EPR's. Estimates begin between 0.4 and 0.6, evenly in
g, those of observed positives at 0.995, and move by Adam at ten times the classifier's learning rate, as the authors'
do: at ten times the head's here, so that a `head_factor` is in it. Their k: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4;
their learning rate and batch come of a search over 1e-2 to 1e-5 and 8, 16. (ROLE + LI begins at a head that was
trained on frozen features for 25 epochs: at 1e-5 the estimates move little in ten.)

Where this differs: observed negatives, which theirs knows none of, count in P and begin at 0.005. Their log is of
p + 1e-5; their last, short batch's R weighs as much as any.

Memory: estimates and Adam's two moments, float32, of the images that take part, 12 bytes a label. The authors' Adam
moves every estimate in every step, by what is left of its momentum where its image is not in the batch. Here only the
batch's rows are touched; what a row would have moved since its image came last is made up for when it comes again,
summed in closed form, at the learning rate of that step and with no epsilon in Adam's denominator. So estimates are
those of their Adam as soon as anything looks at them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import epr
from paml.losses.base import Epoch, Labels, Loss
from paml.losses.memory import Memory, Scope, check_bound, check_fits
from paml.losses.select import RejectGroup

UNKNOWN, KNOWN = 0.405465108, 5.293304825
"""Logits of 0.6 and of 0.995: estimates begin within the one, those of observed labels at the other."""
BETA_1, BETA_2 = 0.9, 0.999
"""Adam's decays."""
COASTING = 256
"""Steps after which a momentum is spent: 0.9^256 is 2e-12."""


@dataclass(frozen=True, kw_only=True)
class RoleSettings:
    """ROLE, regularised online label estimation."""

    expected_positives: float = 2.9
    """k, the mean number of positives of an image: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4."""
    learning_rate_factor: float = 10.0
    """The estimates learn at the head's learning rate times this."""
    max_memory_gb: float = 4.0
    """Largest memory of estimates that a worker may hold, 12 bytes for each (image, class) pair."""

    def __post_init__(self) -> None:
        if not 0 <= self.expected_positives < float("inf"):
            raise SettingsError(f"loss.role.expected_positives is {self.expected_positives}; it must be 0 or more")
        if not 0 <= self.learning_rate_factor < float("inf"):
            raise SettingsError(f"loss.role.learning_rate_factor is {self.learning_rate_factor}; it must be 0 or more")
        check_bound("role", self.max_memory_gb)


def side(logits_BK: Tensor, other_BK: Tensor, state_BK: Tensor) -> Tensor:
    """Half of P and C of one side, [B, K]; both sides are given as logits."""
    other_BK = torch.sigmoid(other_BK.detach())
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    from_other = other_BK * present + (1 - other_BK) * absent
    observed = torch.where(state_BK == POSITIVE, present, absent)
    return (from_other + torch.where(state_BK == UNOBSERVED, torch.zeros_like(observed), observed)) / 2


def cost(logits_BK: Tensor, labels: Labels, settings: RoleSettings, epoch: Epoch) -> Tensor:
    """The cost of every label, [B, K]: both sides' value, the classifier's gradient."""
    estimate_BK = _estimates(labels).to(logits_BK.dtype)
    return side(logits_BK, estimate_BK, labels.state_BK) + side(estimate_BK, logits_BK, labels.state_BK).detach()


def over_batch(logits_BK: Tensor, labels: Labels, settings: RoleSettings, world: RejectGroup | None) -> Tensor:
    """This worker's share of half of R of both sides."""
    classifiers = epr.over_batch(logits_BK, labels, settings, world)
    return (classifiers + epr.over_batch(_estimates(labels), labels, settings, world)) / 2


def _estimates(labels: Labels) -> Tensor:
    assert labels.recalled is not None
    return labels.recalled


class Estimates(Memory):
    """g of every label, with its Adam. Recalls g, [B, K]."""

    def __init__(self, settings: RoleSettings, scope: Scope) -> None:
        super().__init__(scope)
        self.settings = settings
        N, K = len(scope.index), len(scope.classes)
        check_fits("role", scope, 12, settings.max_memory_gb, "an estimate and its two moments")
        # Drawn on the CPU, so that all workers draw the same; N + 1 rows, the last for slots without an image.
        generator = torch.Generator().manual_seed(scope.seed)
        drawn_NK = torch.empty(N + 1, K).uniform_(-UNKNOWN, UNKNOWN, generator=generator)
        self.estimate_NK = drawn_NK.to(scope.device)
        self.mean_NK, self.square_NK = torch.zeros_like(self.estimate_NK), torch.zeros_like(self.estimate_NK)
        self.last_N = torch.zeros(N + 1, dtype=torch.int64, device=scope.device)
        """The step (from 1) that an image was in last; 0 for none."""
        self.steps = 0
        self.learning_rate = 0.0

    def recall(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """g of these images, float32 [B, K], as far as they have come by now."""
        return self._now(self.rows(index), state_BK, self.learning_rate)[0]

    def _now(self, row_B: Tensor, state_BK: Tensor, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """(estimate, mean, square) of rows after the steps that passed without them."""
        last_B = self.last_N[row_B]
        estimate_BK, mean_BK, square_BK = (m[row_B] for m in (self.estimate_NK, self.mean_NK, self.square_NK))
        fresh_BK = (last_B == 0)[:, None] & (state_BK != UNOBSERVED)
        known_BK = torch.where(state_BK == NEGATIVE, -KNOWN, KNOWN).to(torch.float32)
        estimate_BK = torch.where(fresh_BK, known_BK, estimate_BK)

        idle_B = (self.steps - last_B).to(torch.float64)
        # In the j-th step since: mean BETA_1^j, square BETA_2^j of what they were, both corrected for their bias.
        j = torch.arange(1, COASTING + 1, device=row_B.device, dtype=torch.float64)
        step_BJ = last_B[:, None] + j
        share_BJ = (BETA_1 / BETA_2**0.5) ** j * (1 - BETA_2**step_BJ).sqrt() / (1 - BETA_1**step_BJ)
        coast_B = torch.where(j <= idle_B[:, None], share_BJ, 0.0).sum(1)
        estimate_BK = estimate_BK - (learning_rate * coast_B).float()[:, None] * _over_root(mean_BK, square_BK)
        return (
            estimate_BK,
            mean_BK * (BETA_1**idle_B).float()[:, None],
            square_BK * (BETA_2**idle_B).float()[:, None],
        )

    def learn(
        self, index: np.ndarray, slots_B: Tensor, logits_BK: Tensor, state_BK: Tensor, learning_rate: float
    ) -> None:
        """One step of Adam for the estimates of the global batch."""
        row_S, logits_SK, state_SK = self.together(index, slots_B, logits_BK, state_BK)
        self.learning_rate = learning_rate * self.settings.learning_rate_factor
        estimate_SK, mean_SK, square_SK = self._now(row_S, state_SK, self.learning_rate)
        gradient_SK = self._gradient(estimate_SK, logits_SK, state_SK, row_S < len(self.scope.index))
        self.steps += 1
        mean_SK = BETA_1 * mean_SK + (1 - BETA_1) * gradient_SK
        square_SK = BETA_2 * square_SK + (1 - BETA_2) * gradient_SK**2
        unbiased = (1 - BETA_2**self.steps) ** 0.5 / (1 - BETA_1**self.steps)
        self.estimate_NK[row_S] = estimate_SK - self.learning_rate * unbiased * _over_root(mean_SK, square_SK)
        self.mean_NK[row_S], self.square_NK[row_S] = mean_SK, square_SK
        self.last_N[row_S] = self.steps

    def _gradient(self, estimate_SK: Tensor, logits_SK: Tensor, state_SK: Tensor, present_S: Tensor) -> Tensor:
        """The loss's gradient by the estimates, times S K, which Adam does not feel."""
        e_SK = torch.sigmoid(estimate_SK)
        observed_SK = torch.where(state_SK == UNOBSERVED, 0.0, e_SK - (state_SK == POSITIVE).float())
        images = present_S.sum().clamp(min=1)
        expected = (e_SK.sum(1, dtype=torch.float64) * present_S).sum() / images
        surplus = ((expected - self.settings.expected_positives) / max(1, e_SK.shape[1])).float()
        return (e_SK - torch.sigmoid(logits_SK) + observed_SK) / 2 + surplus * e_SK * (1 - e_SK)

    def tensors(self) -> dict[str, Tensor]:
        """Estimates, moments and how far the steps have come."""
        N = len(self.scope.index)
        return {
            "estimate": self.estimate_NK[:N],
            "mean": self.mean_NK[:N],
            "square": self.square_NK[:N],
            "last": self.last_N[:N],
            "steps": torch.tensor(self.steps),
            "learning_rate": torch.tensor(self.learning_rate, dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        kept = {"estimate": self.estimate_NK, "mean": self.mean_NK, "square": self.square_NK, "last": self.last_N}
        for name, tensor in kept.items():
            tensor[:-1] = tensors[name].to(tensor.device)
        self.steps, self.learning_rate = int(tensors["steps"]), float(tensors["learning_rate"])


def _over_root(mean_BK: Tensor, square_BK: Tensor) -> Tensor:
    """mean / sqrt(square), 0 where no gradient has come yet."""
    return mean_BK / square_BK.clamp(min=1e-30).sqrt()


def memory(settings: Any, scope: Scope) -> Memory:
    """The estimates of a run."""
    return Estimates(settings, scope)


LOSS = Loss(per_label=cost, over_batch=over_batch, settings="role", memory=memory, needs_memory=True)
