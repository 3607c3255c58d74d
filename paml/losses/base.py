"""What a loss is: how each kind of label is trained, and what share of the unobserved ones is rejected.

Axes: B images (of the global batch, or a worker's part of it), K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED

AS_NEGATIVE = 1
"""The label costs -log(1 - p) = softplus(x)."""
AS_POSITIVE = -1
"""The label costs -log p = softplus(-x)."""
LEFT_OUT = 0
"""The label costs nothing."""


def never(step: Fraction, epoch: int) -> Fraction:
    """Reject nothing, whatever the epoch."""
    return Fraction(0)


def growing(step: Fraction, epoch: int) -> Fraction:
    """step x (epoch - 1), at most 1: nothing in the warm-up epoch 1, then a step more every epoch (LL-R, LL-Ct)."""
    return min(step * (epoch - 1), Fraction(1))


def constant(step: Fraction, epoch: int) -> Fraction:
    """step, at most 1, in every epoch from 2 on (LL-Cp, whose corrections add up by themselves)."""
    return min(step, Fraction(1)) if epoch >= 2 else Fraction(0)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Binary cross-entropy over (image, class) pairs; observed labels always count as what they are."""

    unobserved: int
    """AS_NEGATIVE or LEFT_OUT: how an unobserved label is trained."""
    rejected: int = LEFT_OUT
    """LEFT_OUT or AS_POSITIVE: how a rejected label is trained."""
    rate: Callable[[Fraction, int], Fraction] = never
    """(reject_rate_step, epoch counted from 1) -> the share to reject in that epoch, exactly."""
    rejects: bool = False
    """Whether labels are ranked and rejected at all."""
    corrects: bool = False
    """Whether a rejected label becomes a positive for good: the caller stores it and writes it into later states."""
    needs_all_observed: bool = False
    """Whether an unobserved label is an error."""
    per_label: Callable[[Tensor, Tensor], Tensor] | None = None
    """Another cost than cross-entropy: (logits_BK, sign_BK) -> cost_BK, where sign is AS_NEGATIVE, AS_POSITIVE or
    LEFT_OUT. It goes through autograd; None takes the fused cross-entropy. For rejection it must rise with the logit
    of a negative."""


def sign_of_labels(loss: Loss, state_BK: Tensor, rejected_BK: Tensor | None) -> Tensor:
    """int8 [B, K]: AS_NEGATIVE, AS_POSITIVE or LEFT_OUT for every label."""
    sign_BK = torch.full_like(state_BK, loss.unobserved, dtype=torch.int8)
    sign_BK = torch.where(state_BK == POSITIVE, AS_POSITIVE, sign_BK)
    sign_BK = torch.where(state_BK == NEGATIVE, AS_NEGATIVE, sign_BK)
    if rejected_BK is not None:
        sign_BK = torch.where(rejected_BK, loss.rejected, sign_BK)
    return sign_BK


def per_label_loss(loss: Loss, logits_BK: Tensor, state_BK: Tensor, rejected_BK: Tensor | None = None) -> Tensor:
    """The cost of every label, [B, K], of the logits' type: the readable form that the fast path must equal.

    A logit that is NaN or +inf gives NaN even where the label is left out, so that no fault hides in a rejected label.
    """
    if loss.needs_all_observed:
        check_all_observed(state_BK)
    sign_BK = sign_of_labels(loss, state_BK, rejected_BK)
    cost_BK = loss.per_label(logits_BK, sign_BK) if loss.per_label else softplus(logits_BK * sign_BK)
    return torch.where(sign_BK == LEFT_OUT, (logits_BK - logits_BK).detach(), cost_BK)


def check_all_observed(state_BK: Tensor) -> None:
    """Raise ValueError where a label is unobserved. On a GPU it asks nothing, for that would wait for the device."""
    if state_BK.device.type != "cpu":
        return
    missing = int((state_BK == UNOBSERVED).sum())
    if missing:
        raise ValueError(
            f"the loss 'full' needs every label observed, but {missing} of {state_BK.numel()} in this batch are not: "
            "train on the full label table, or choose loss.name: an"
        )
