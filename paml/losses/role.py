"""ROLE, regularized online label estimation (Cole et al., CVPR 2021): labels are learned along with the classifier.

Each (image, class) pair has an estimate g, a free logit. With p = sigmoid(x) of the classifier and e = sigmoid(g), each
side is trained on the observed labels, on the other side, and on the number k of positives that an image has on
average:

    1/2 [P(p) + C(p, e) + R(p)] + 1/2 [P(e) + C(e, p) + R(e)]
    P(p) = -log p for a positive, -log(1 - p) for a negative, 0 for an unobserved label
    C(p, e) = -e log p - (1 - e) log(1 - p), for every label, e not differentiated
    R(p) = (s - k)^2 / K^2, s the mean over the batch's images of the sum of p over all classes

P and C are means over B x K; R is that of the global batch, as for EPR. k is `loss.expected_positives`. Estimates start
between 0.4 and 0.6, uniformly in g; those of observed positives at 0.995. Adam updates them at ten times the head's
learning rate (`lr_multiplier`), as the authors do. The authors chose learning rate and batch size from 1e-2 to 1e-5 and
from 8, 16. (ROLE + LI starts from a head that was trained on frozen features for 25 epochs: at 1e-5 the estimates move
little in ten.)

Differences: observed negatives, which the authors do not have, count in P and start at 0.005; the R of the authors'
short last batch counts as much as any other.

State: estimates and Adam's two moments in float32 for the images of the run, 12 bytes per label. The authors' Adam
moves every estimate in every step, by its remaining momentum if its image is not in the batch. Here only the batch's
rows are touched; the movement of a row since its last batch is added when it is read again, summed in closed form at
the current learning rate. The estimates equal the authors' up to Adam's epsilon, while the learning rate is constant.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import epr
from paml.losses.base import BatchContext, Labels, Loss, check_not_negative
from paml.losses.state import ImageState, StateScope

UNKNOWN, KNOWN = 0.405465108, 5.293304825
"""Logits of 0.6 and 0.995: estimates start within +-UNKNOWN, those of observed labels at +-KNOWN."""
BETA_1, BETA_2 = 0.9, 0.999
"""Adam's decay rates."""
MOMENTUM_STEPS = 256
"""Steps after which a momentum is negligible: 0.9^256 is 2e-12."""


@dataclass(frozen=True, kw_only=True)
class RoleSettings:
    """ROLE, regularized online label estimation."""

    lr_multiplier: float = 10.0
    """The estimates' learning rate is the head's times this."""

    def __post_init__(self) -> None:
        check_not_negative("role", self, "lr_multiplier")


def side(logits_BK: Tensor, other_BK: Tensor, state_BK: Tensor) -> Tensor:
    """Half of P and C of one side, [B, K]; both sides are given as logits."""
    other_BK = torch.sigmoid(other_BK.detach())
    present, absent = softplus(-logits_BK), softplus(logits_BK)
    from_other = other_BK * present + (1 - other_BK) * absent
    observed = torch.where(state_BK == POSITIVE, present, absent)
    return (from_other + torch.where(state_BK == UNOBSERVED, torch.zeros_like(observed), observed)) / 2


def cost(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    """The cost of every label, [B, K]: the value of both sides, the classifier's gradient."""
    assert labels.loss_state is not None
    estimate_BK = labels.loss_state.to(logits_BK.dtype)
    return side(logits_BK, estimate_BK, labels.state_BK) + side(estimate_BK, logits_BK, labels.state_BK).detach()


def over_batch(logits_BK: Tensor, labels: Labels, settings: Any, context: BatchContext) -> Tensor:
    """This worker's share of half of R of both sides."""
    assert labels.loss_state is not None
    classifier = epr.over_batch(logits_BK, labels, settings, context)
    return (classifier + epr.over_batch(labels.loss_state, labels, settings, context)) / 2


class LabelEstimates(ImageState):
    """g of every label, with its Adam. Reads g, [B, K]."""

    def __init__(self, settings: Any, scope: StateScope) -> None:
        super().__init__(scope, "role", 12, settings.max_state_gb)
        self.settings = settings
        N, K = len(scope.index), len(scope.classes)
        # Generated on the CPU: the same on every device.
        generator = torch.Generator().manual_seed(scope.seed)
        self.estimate_NK = torch.empty(N + 1, K).uniform_(-UNKNOWN, UNKNOWN, generator=generator).to(scope.device)
        self.mean_NK, self.square_NK = torch.zeros_like(self.estimate_NK), torch.zeros_like(self.estimate_NK)
        self.last_N = torch.zeros(N + 1, dtype=torch.int64, device=scope.device)
        """Last step (from 1) with the image; 0 for none."""
        self.tensors_N = {"estimate": self.estimate_NK, "mean": self.mean_NK, "square": self.square_NK}
        self.tensors_N["last"] = self.last_N
        self.steps = 0
        self.learning_rate = 0.0

    def read(self, index: np.ndarray, state_BK: Tensor) -> Tensor:
        """g of these images, float32 [B, K], after the steps so far."""
        return self._current(self.rows(index), state_BK, self.learning_rate)[0]

    def _current(self, row_B: Tensor, state_BK: Tensor, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """(estimate, mean, square) of rows after the steps that they were not part of."""
        last_B = self.last_N[row_B]
        estimate_BK, mean_BK, square_BK = (m[row_B] for m in (self.estimate_NK, self.mean_NK, self.square_NK))
        first_seen_BK = (last_B == 0)[:, None] & (state_BK != UNOBSERVED)
        known_BK = torch.where(state_BK == NEGATIVE, -KNOWN, KNOWN).to(torch.float32)
        estimate_BK = torch.where(first_seen_BK, known_BK, estimate_BK)

        idle_B = (self.steps - last_B).to(torch.float64)
        # In the j-th idle step the mean is BETA_1^j and the square BETA_2^j of what it was, both bias-corrected.
        j = torch.arange(1, MOMENTUM_STEPS + 1, device=row_B.device, dtype=torch.float64)
        step_BJ = last_B[:, None] + j
        factor_BJ = (BETA_1 / BETA_2**0.5) ** j * (1 - BETA_2**step_BJ).sqrt() / (1 - BETA_1**step_BJ)
        moved_B = torch.where(j <= idle_B[:, None], factor_BJ, 0.0).sum(1)
        estimate_BK = estimate_BK - (learning_rate * moved_B).float()[:, None] * _over_root(mean_BK, square_BK)
        return (
            estimate_BK,
            mean_BK * (BETA_1**idle_B).float()[:, None],
            square_BK * (BETA_2**idle_B).float()[:, None],
        )

    def apply(self, row_S: Tensor, logits_SK: Tensor, state_SK: Tensor, learning_rate: float) -> None:
        """One step of Adam for the estimates of the batch."""
        self.learning_rate = learning_rate * self.settings.role.lr_multiplier
        estimate_SK, mean_SK, square_SK = self._current(row_S, state_SK, self.learning_rate)
        gradient_SK = self._gradient(estimate_SK, logits_SK, state_SK, row_S < len(self.scope.index))
        self.steps += 1
        mean_SK = BETA_1 * mean_SK + (1 - BETA_1) * gradient_SK
        square_SK = BETA_2 * square_SK + (1 - BETA_2) * gradient_SK**2
        unbiased = (1 - BETA_2**self.steps) ** 0.5 / (1 - BETA_1**self.steps)
        self.estimate_NK[row_S] = estimate_SK - self.learning_rate * unbiased * _over_root(mean_SK, square_SK)
        self.mean_NK[row_S], self.square_NK[row_S] = mean_SK, square_SK
        self.last_N[row_S] = self.steps

    def _gradient(self, estimate_SK: Tensor, logits_SK: Tensor, state_SK: Tensor, present_S: Tensor) -> Tensor:
        """The loss's gradient with respect to the estimates, times S K, a factor that does not change Adam's steps."""
        e_SK = torch.sigmoid(estimate_SK)
        observed_SK = torch.where(state_SK == UNOBSERVED, 0.0, e_SK - (state_SK == POSITIVE).float())
        images = present_S.sum().clamp(min=1)
        expected = (e_SK.sum(1, dtype=torch.float64) * present_S).sum() / images
        surplus = ((expected - self.settings.expected_positives) / max(1, e_SK.shape[1])).float()
        return (e_SK - torch.sigmoid(logits_SK) + observed_SK) / 2 + surplus * e_SK * (1 - e_SK)

    def tensors(self) -> dict[str, Tensor]:
        """Estimates, moments and the number of steps."""
        return super().tensors() | {
            "steps": torch.tensor(self.steps),
            "learning_rate": torch.tensor(self.learning_rate, dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        super().load(tensors)
        self.steps, self.learning_rate = int(tensors["steps"]), float(tensors["learning_rate"])


def _over_root(mean_BK: Tensor, square_BK: Tensor) -> Tensor:
    """mean / sqrt(square), 0 before the first gradient."""
    return mean_BK / square_BK.clamp(min=1e-30).sqrt()


LOSS = Loss(
    per_label=cost, over_batch=over_batch, own_settings={"role": RoleSettings}, state=LabelEstimates, needs_state=True
)
