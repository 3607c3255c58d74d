"""Losses for partial labels, by name in `LOSSES`. A file each: its formula, source, defaults and divisor.

Axes: B images of this worker, K classes.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paml.labels.states import POSITIVE, UNOBSERVED
from paml.losses.base import (
    AS_POSITIVE,
    LEFT_OUT,
    Epoch,
    Labels,
    Loss,
    Place,
    check_all_observed,
    per_label_loss,
    sign_of_labels,
)
from paml.losses.blocks import true_places
from paml.losses.fused import DenseSignedLoss, SparseSignedLoss
from paml.losses.memory import Memory, Scope
from paml.losses.registry import LOSSES
from paml.losses.select import RejectGroup, check_inputs, select_by_partition, select_rejected
from paml.losses.settings import LossSettings, check_reject_rate, fitted_step, reject_rate, rejects_in

__all__ = [
    "LOSSES",
    "Loss",
    "LossOutput",
    "LossSettings",
    "Memory",
    "RejectGroup",
    "Scope",
    "build_memory",
    "check_reject_rate",
    "fitted_step",
    "partial_label_loss",
    "per_label_loss",
    "reject_rate",
    "rejects_in",
    "select_rejected",
]


def build_memory(settings: LossSettings, scope: Scope) -> Memory | None:
    """What the loss keeps of a run beyond the batch, None for most. Raises SettingsError, DataError."""
    loss = LOSSES[settings.name]
    return None if loss.memory is None else loss.memory(loss.settings_in(settings), scope)


class LossOutput(NamedTuple):
    loss: Tensor
    """Scalar, float32: the sum over this worker's labels / divisor. Summed over workers it is the batch's loss."""
    rejected_BK: Tensor | None
    """bool: the labels rejected in this step; None where the loss never rejects or the epoch rejects nothing."""


def partial_label_loss(
    logits_BK: Tensor,
    state_BK: Tensor,
    *,
    settings: LossSettings,
    epoch: int,
    divisor: float,
    slots_B: Tensor,
    batch_size: int,
    world: RejectGroup | None = None,
    epochs: int | None = None,
    recalled: Tensor | None = None,
    select_logits_BK: Tensor | None = None,
) -> LossOutput:
    """The loss of a worker's part of a global batch, and the labels that it rejects.

    logits_BK: float32. state_BK: int8 label states; corrections of LL-Cp made in earlier steps are written in as
    POSITIVE. epoch counts from 1. divisor: batch_size * K for a mean over the global batch. slots_B: int64, the images'
    slots in the global batch of `batch_size` images. world: the workers that share the batch, None for one alone; all
    of them must call, also with B = 0. epochs: of the whole run, for losses that move with it (GR). recalled: what the
    loss's memory (`build_memory`) recalls of these images, for the few losses that have one. select_logits_BK: float32,
    the logits that choose what is rejected, for example of an averaged model; None takes `logits_BK`.

    From epoch `settings.correct_after` on, a rejected label whose probability is above `settings.correct_threshold` is
    trained as a positive. It still counts as rejected in the output.

    Cross-entropy and what is a mean over labels is the sum / divisor; a loss that is a mean over images
    (`Loss.divisor`) is the sum * K / divisor.
    The loss is not finite if any logit is NaN, rejected or not, or infinite against its label: the caller stops on a
    loss that is not finite. (Under cross-entropy a +inf that is a positive, or that LL-Ct or LL-Cp corrects, costs
    nothing; under the other losses every infinite logit shows.)
    Raises TypeError for logits that are not float32, ValueError for shapes or slots that do not fit, and for a loss
    that lacks what its memory recalls.
    """
    loss = LOSSES[settings.name]
    rate = reject_rate(settings, epoch)
    check_inputs(logits_BK, state_BK, slots_B, batch_size, rate, settings.reject_pool)
    ranked_BK = logits_BK.detach()
    if select_logits_BK is not None:
        check_inputs(select_logits_BK, state_BK, slots_B, batch_size, rate, settings.reject_pool)
        ranked_BK = select_logits_BK.detach()
    if loss.needs_all_observed:
        check_all_observed(state_BK)
    if loss.needs_memory and recalled is None:
        raise ValueError(
            f"the loss {settings.name!r} needs what its memory recalls: keep a `build_memory(...)` and pass `recalled`"
        )
    alone = world is None or world.size() == 1
    correcting = settings.correct_after is not None and epoch >= settings.correct_after
    plain = settings.reject_within == "pool" and not correcting
    fused = loss.per_label is None and loss.unobserved != LEFT_OUT
    if alone and logits_BK.device.type == "cpu" and fused and plain:
        return _on_one_cpu(loss, logits_BK, ranked_BK, state_BK, settings, rate, divisor, slots_B, batch_size)

    own, now = loss.settings_in(settings), Epoch(epoch, epochs)
    place = Place(slots_B, batch_size, settings.reject_pool, world)
    rejected_BK = _choose(loss, ranked_BK, state_BK, settings, now, rate, place)
    all_rejected_BK = rejected_BK
    if correcting and rejected_BK is not None:
        sure_BK = rejected_BK & (ranked_BK > math.log(settings.correct_threshold / (1 - settings.correct_threshold)))
        state_BK, rejected_BK = torch.where(sure_BK, POSITIVE, state_BK), rejected_BK & ~sure_BK
    if loss.per_label is not None:
        cost_BK = per_label_loss(loss, logits_BK, state_BK, rejected_BK, own, now, recalled)
        # Rows first, then in float64: the sum hardly depends on how the rows are shared among workers.
        total = cost_BK.sum(1).sum(0, dtype=torch.float64)
        if loss.over_batch is not None:
            total = total + loss.over_batch(logits_BK, Labels(state_BK, rejected_BK, recalled), own, world)
        per = logits_BK.shape[1] if loss.divisor == "images" else 1
        total = (total * per / divisor).to(torch.float32)
    elif logits_BK.device.type == "cpu" and loss.unobserved != LEFT_OUT:
        positive = true_places(state_BK.numpy().reshape(-1) == POSITIVE)
        flat = true_places(rejected_BK.numpy().reshape(-1)) if rejected_BK is not None else np.empty(0, np.int64)
        total = _sparse(loss, logits_BK, positive, flat, divisor)
    else:
        total = DenseSignedLoss.apply(logits_BK, sign_of_labels(loss, state_BK, rejected_BK), divisor)
    return LossOutput(total, all_rejected_BK)


def _choose(
    loss: Loss,
    ranked_BK: Tensor,
    state_BK: Tensor,
    settings: LossSettings,
    now: Epoch,
    rate: Fraction,
    place: Place,
) -> Tensor | None:
    """What is rejected: by the loss's own rule where it has one, else the largest losses of each pool."""
    if loss.select is not None:
        return loss.select(ranked_BK, state_BK, loss.settings_in(settings), now, place)
    if not _rejects_now(loss, rate, place.batch_size):
        return None
    return select_rejected(
        ranked_BK,
        state_BK == UNOBSERVED,
        slots_B=place.slots_B,
        batch_size=place.batch_size,
        rate=rate,
        reject_of=settings.reject_of,
        reject_pool=settings.reject_pool,
        reject_within=settings.reject_within,
        group=place.world,
    )


def _rejects_now(loss: Loss, rate: Fraction, batch_size: int) -> bool:
    return loss.rejects and rate > 0 and batch_size > 0


def _on_one_cpu(
    loss: Loss,
    logits_BK: Tensor,
    ranked_BK: Tensor,
    state_BK: Tensor,
    settings: LossSettings,
    rate: Fraction,
    divisor: float,
    slots_B: Tensor,
    batch_size: int,
) -> LossOutput:
    """The fast way where one worker holds the whole batch on the CPU: only the few observed labels are listed."""
    states = state_BK.numpy().reshape(-1)
    observed = true_places(states != UNOBSERVED)
    positive = observed[states[observed] == POSITIVE]
    if not _rejects_now(loss, rate, batch_size):
        return LossOutput(_sparse(loss, logits_BK, positive, np.empty(0, np.int64), divisor), None)
    rejected = select_by_partition(
        ranked_BK.numpy(),
        observed,
        slots_B.numpy(),
        batch_size,
        rate,
        settings.reject_of,
        settings.reject_pool,
    )
    rejected_BK = torch.zeros(logits_BK.shape, dtype=torch.bool)
    rejected_BK.numpy().reshape(-1)[rejected] = True
    return LossOutput(_sparse(loss, logits_BK, positive, rejected, divisor), rejected_BK)


def _sparse(loss: Loss, logits_BK: Tensor, positive: np.ndarray, rejected: np.ndarray, divisor: float) -> Tensor:
    left_out = rejected if loss.rejected == LEFT_OUT else np.empty(0, np.int64)
    if loss.rejected == AS_POSITIVE and len(rejected):
        positive = np.sort(np.concatenate([positive, rejected]))
    return SparseSignedLoss.apply(logits_BK, positive, left_out, divisor)
