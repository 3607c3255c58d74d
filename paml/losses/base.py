"""What a loss is: how each kind of label is trained, and which of the unobserved ones are rejected.

Most losses of the papers are a cost of each label by itself (`per_label`), summed over the batch and divided as the
loss states. x is a logit, p = sigmoid(x) and q = 1 - p; -log p is written softplus(-x), -log q softplus(x), q^g
exp(-g softplus(x)), so that nothing overflows and no epsilon is needed (the released codes take log(p + 1e-5) or clamp
p at 1e-8, which caps a cost and stops the gradient of the labels that are most wrong).

Axes: B images (of the global batch, or a worker's part of it), K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses.memory import Memory, Scope
from paml.losses.select import RejectGroup

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


class Labels(NamedTuple):
    """The labels of a worker's images, as a cost sees them."""

    state_BK: Tensor
    """int8 label states."""
    rejected_BK: Tensor | None = None
    """bool, the unobserved labels that are rejected; None where none are."""
    recalled: Tensor | None = None
    """What the loss's memory says of them (`Memory.recall`)."""

    @property
    def positive(self) -> Tensor:
        """bool [B, K]: observed as present."""
        return self.state_BK == POSITIVE

    @property
    def unobserved(self) -> Tensor:
        """bool [B, K], the rejected ones among them."""
        return self.state_BK == UNOBSERVED


class Epoch(NamedTuple):
    """How far the run is."""

    number: int
    """The epoch under way, counted from 1."""
    last: int | None = None
    """Epochs of the whole run; None where the caller does not say."""


class Place(NamedTuple):
    """Where a worker's images stand in the global batch, for what has to be chosen over all of it."""

    slots_B: Tensor
    batch_size: int
    reject_pool: int | None
    world: RejectGroup | None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How labels are trained: by cross-entropy (`unobserved`, `rejected`) unless `per_label` gives another cost."""

    unobserved: int = AS_NEGATIVE
    """AS_NEGATIVE or LEFT_OUT: how cross-entropy trains an unobserved label."""
    rejected: int = LEFT_OUT
    """LEFT_OUT or AS_POSITIVE: how a rejected label is trained."""
    rate: Callable[[Fraction, int], Fraction] = never
    """(reject_rate_step, epoch counted from 1) -> the share to reject in that epoch, exactly."""
    rejects: bool = False
    """Whether labels are chosen and rejected at all."""
    select: Callable[[Tensor, Tensor, Any, Epoch, Place], Tensor | None] | None = None
    """Another choice than the highest logits of each pool at `rate`: (logits_BK, state_BK, own settings, epoch, place)
    -> bool [B, K], or None where this epoch rejects nothing."""
    corrects: bool = False
    """Whether a rejected label becomes a positive for good: the caller stores it and writes it into later states."""
    needs_all_observed: bool = False
    """Whether an unobserved label is an error."""
    per_label: Callable[[Tensor, Labels, Any, Epoch], Tensor] | None = None
    """Another cost than cross-entropy: (logits_BK, labels, own settings, epoch) -> cost_BK, differentiated by autograd;
    None takes the fused cross-entropy. A rejected label that is LEFT_OUT is taken out afterwards."""
    over_batch: Callable[[Tensor, Labels, Any, RejectGroup | None], Tensor] | None = None
    """A term that no label has by itself: (logits_BK, labels, own settings, world) -> this worker's share of it as a
    scalar, to be added to the sum of its labels' costs. All workers call it."""
    divisor: Literal["labels", "images"] = "labels"
    """Mean over the full global batch's labels (B x K) or over its images (B: a sum over an image's labels)."""
    settings: str | None = None
    """The field of LossSettings with the loss's own settings."""
    memory: Callable[[Any, Scope], Memory | None] | None = None
    """(own settings, run) -> what the loss keeps beyond the batch; None where these settings need nothing kept. Raises
    SettingsError where it does not fit."""
    needs_memory: bool = False
    """Whether the loss cannot be computed without what its memory recalls."""

    @property
    def by_rate(self) -> bool:
        """Whether it rejects at `rate`, by `reject_rate_step`."""
        return self.rejects and self.select is None

    def settings_in(self, all_settings: object) -> Any:
        """The loss's own settings, None where it has none."""
        return None if self.settings is None else getattr(all_settings, self.settings)


def sign_of_labels(loss: Loss, state_BK: Tensor, rejected_BK: Tensor | None) -> Tensor:
    """int8 [B, K]: AS_NEGATIVE, AS_POSITIVE or LEFT_OUT for every label."""
    sign_BK = torch.full_like(state_BK, loss.unobserved, dtype=torch.int8)
    sign_BK = torch.where(state_BK == POSITIVE, AS_POSITIVE, sign_BK)
    sign_BK = torch.where(state_BK == NEGATIVE, AS_NEGATIVE, sign_BK)
    if rejected_BK is not None:
        sign_BK = torch.where(rejected_BK, loss.rejected, sign_BK)
    return sign_BK


def per_label_loss(
    loss: Loss,
    logits_BK: Tensor,
    state_BK: Tensor,
    rejected_BK: Tensor | None = None,
    own: Any = None,
    epoch: Epoch = Epoch(1),  # noqa: B008
    recalled: Tensor | None = None,
) -> Tensor:
    """The cost of every label, [B, K], of the logits' type: the readable form that the fast path must equal.

    own: the loss's own settings (`Loss.settings_in`). recalled: what its memory says of these labels. A logit that is
    NaN or +inf gives NaN even where the label is left out, so that no fault hides in a rejected label.
    """
    if loss.needs_all_observed:
        check_all_observed(state_BK)
    nothing_BK = (logits_BK - logits_BK).detach()
    if loss.per_label is None:
        sign_BK = sign_of_labels(loss, state_BK, rejected_BK)
        return torch.where(sign_BK == LEFT_OUT, nothing_BK, softplus(logits_BK * sign_BK))
    cost_BK = loss.per_label(logits_BK, Labels(state_BK, rejected_BK, recalled), own, epoch) + nothing_BK
    if rejected_BK is not None and loss.rejected == LEFT_OUT:
        cost_BK = torch.where(rejected_BK, nothing_BK, cost_BK)
    return cost_BK


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
