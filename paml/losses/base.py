"""What a loss is: how it trains each kind of label, and which unobserved labels it rejects.

Most papers' losses are a cost per label (`Loss.per_label`), summed over the batch and divided by a number that the loss
states. In the formulas x is a logit, p = sigmoid(x) and q = 1 - p. The code writes -log p as softplus(-x), -log q as
softplus(x) and q^g as exp(-g softplus(x)): nothing overflows and no epsilon is needed. (The released codes use
log(p + 1e-5) or clamp p at 1e-8, which caps costs and removes the gradient of the labels that are most wrong.)

Axes: B images of this worker, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from paml.errors import check_setting
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses.pools import Pools
from paml.losses.state import LossState, StateScope

AS_NEGATIVE = 1
"""The label costs -log(1 - p) = softplus(x)."""
AS_POSITIVE = -1
"""The label costs -log p = softplus(-x)."""
LEFT_OUT = 0
"""The label costs nothing."""


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """Position of a worker's images in the run and in the global batch. The defaults fit a single process."""

    epoch: int = 1
    """The current epoch, counted from 1. LL-R, LL-Ct and LL-Cp reject nothing in epoch 1."""
    num_epochs: int | None = None
    """Epochs of the whole run, for losses with a schedule (GR)."""
    slots_B: Tensor | None = None
    """int64, slots of the images in the global batch; None for 0 to B - 1."""
    batch_size: int | None = None
    """Number of slots in the global batch; None for B."""
    world: dist.ProcessGroup | None = None
    """The workers that share the global batch; all of them must call, also with B = 0. None for one worker."""
    divisor: float | None = None
    """Divides the sum of the label costs; None for batch_size * K."""

    def pools(self, logits_BK: Tensor, reject_pool: int | None) -> Pools:
        """The pools in which the labels of this batch are ranked."""
        B = len(logits_BK)
        slots_B = torch.arange(B, device=logits_BK.device) if self.slots_B is None else self.slots_B
        group = self.world if self.world is not None and self.world.size() > 1 else None
        return Pools(slots_B, B if self.batch_size is None else self.batch_size, reject_pool, group)


class Labels(NamedTuple):
    """What a loss knows about the labels of a batch."""

    state_BK: Tensor
    """int8, label states."""
    rejected_BK: Tensor | None
    """bool, unobserved labels that are rejected; None if none are."""
    loss_state: Tensor | None = None
    """What the loss's state holds about these images (`LossState.read`)."""

    @property
    def positive(self) -> Tensor:
        """bool [B, K]: observed as present."""
        return self.state_BK == POSITIVE

    @property
    def unobserved(self) -> Tensor:
        """bool [B, K], rejected ones included."""
        return self.state_BK == UNOBSERVED


def growing(step: Fraction, epoch: int) -> Fraction:
    """step * (epoch - 1), at most 1: nothing in the warm-up epoch 1, then one step more per epoch (LL-R, LL-Ct)."""
    return min(step * (epoch - 1), Fraction(1))


def constant(step: Fraction, epoch: int) -> Fraction:
    """Nothing in the warm-up epoch 1, then `step` in every epoch (LL-Cp)."""
    return step if epoch > 1 else Fraction(0)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An entry of the registry. Functions get `settings`, the whole LossSettings.

    Labels cost their binary cross-entropy (see `unobserved`, `rejected`) unless `per_label` is set.
    """

    unobserved: int = AS_NEGATIVE
    """AS_NEGATIVE or LEFT_OUT: how cross-entropy trains an unobserved label."""
    rejected: int = LEFT_OUT
    """LEFT_OUT or AS_POSITIVE: how a rejected label is trained."""
    rate: Callable[[Fraction, int], Fraction] | None = None
    """Rejects the highest logits of each pool: (reject_rate_step, epoch counted from 1) -> exact rate of that epoch."""
    select: Callable[[Tensor, Tensor, Any, BatchContext], Tensor | None] | None = None
    """Rejects by another rule: (logits_BK, state_BK, settings, context) -> bool [B, K], or None if this epoch rejects
    nothing."""
    corrects: bool = False
    """Whether a rejected label becomes a positive for good: the caller writes it into later states."""
    needs_all_observed: bool = False
    """Whether an unobserved label is an error."""
    per_label: Callable[[Tensor, Labels, Any, BatchContext], Tensor] | None = None
    """Cost of each label instead of cross-entropy: (logits_BK, labels, settings, context) -> cost_BK, differentiated by
    autograd. Rejected labels that are LEFT_OUT are removed afterwards."""
    over_batch: Callable[[Tensor, Labels, Any, BatchContext], Tensor] | None = None
    """A term of the whole batch: (logits_BK, labels, settings, context) -> this worker's share of it, a scalar that is
    added to the sum of its label costs. All workers call it."""
    divisor: Literal["labels", "images"] = "labels"
    """Mean over the global batch's labels (B * K), or over its images (B: a sum over the labels of an image)."""
    own_settings: dict[str, type] = field(default_factory=dict)
    """Settings of this loss alone: field of LossSettings -> its dataclass."""
    state: Callable[[Any, StateScope], LossState | None] | None = None
    """(settings, run) -> what the loss keeps between batches; None if these settings need nothing. Raises SettingsError
    if it is too large."""
    needs_state: bool = False
    """Whether the loss cannot be computed without `loss_state`."""

    @property
    def recovers(self) -> bool:
        """Whether rejected labels are trained as positives."""
        return self.rejected == AS_POSITIVE

    @property
    def rejects(self) -> bool:
        """Whether the loss rejects labels at all."""
        return self.rate is not None or self.select is not None


def unobserved_above(threshold: float, logits_BK: Tensor, state_BK: Tensor, settings: Any, epoch: int) -> Tensor | None:
    """bool [B, K]: the unobserved labels with a logit above `threshold`; None in the warm-up, by default epoch 1."""
    if epoch <= settings.warmup_or(1):
        return None
    return (state_BK == UNOBSERVED) & (logits_BK > threshold)


def sign_of_labels(loss: Loss, state_BK: Tensor, rejected_BK: Tensor | None) -> Tensor:
    """int8 [B, K]: AS_NEGATIVE, AS_POSITIVE or LEFT_OUT for every label."""
    sign_BK = torch.full_like(state_BK, loss.unobserved, dtype=torch.int8)
    sign_BK = torch.where(state_BK == POSITIVE, AS_POSITIVE, sign_BK)
    sign_BK = torch.where(state_BK == NEGATIVE, AS_NEGATIVE, sign_BK)
    if rejected_BK is not None:
        sign_BK = torch.where(rejected_BK, loss.rejected, sign_BK)
    return sign_BK


def per_label_loss(
    loss: Loss, logits_BK: Tensor, labels: Labels, settings: Any = None, context: BatchContext | None = None
) -> Tensor:
    """The cost of every label, [B, K], in the logits' dtype: the readable form that the fused path must equal.

    A NaN or infinite logit gives a cost that is not finite, also in a rejected label.
    """
    no_cost_BK = (logits_BK - logits_BK).detach()  # 0, but NaN where the logit is not finite
    if loss.per_label is None:
        sign_BK = sign_of_labels(loss, labels.state_BK, labels.rejected_BK)
        return torch.where(sign_BK == LEFT_OUT, no_cost_BK, softplus(logits_BK * sign_BK))
    cost_BK = loss.per_label(logits_BK, labels, settings, context or BatchContext()) + no_cost_BK
    if labels.rejected_BK is not None and loss.rejected == LEFT_OUT:
        cost_BK = torch.where(labels.rejected_BK, no_cost_BK, cost_BK)
    return cost_BK


def check_not_negative(group: str, settings: object, *names: str) -> None:
    """Raise SettingsError for a setting of `loss.<group>` that is negative, infinite or NaN."""
    for name in names:
        value = getattr(settings, name)
        check_setting(0 <= value < float("inf"), f"loss.{group}.{name}", value, "0 or more")
