"""The loss of a batch, and the labels that it rejects."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paml.errors import DataError
from paml.labels.states import POSITIVE, UNOBSERVED
from paml.losses.base import LEFT_OUT, BatchContext, Labels, per_label_loss, sign_of_labels
from paml.losses.blocks import nonzero_positions
from paml.losses.fused import DenseSignedLoss, SparseSignedLoss
from paml.losses.pools import check_inputs
from paml.losses.rates import reject_rate
from paml.losses.registry import LOSSES, LossSettings
from paml.losses.select import select_rejected
from paml.losses.select_cpu import select_on_cpu
from paml.losses.state import LossState, StateScope

_NONE = np.empty(0, np.int64)


class LossOutput(NamedTuple):
    loss: Tensor
    """Scalar, float32: the sum over this worker's labels / divisor. The sum over workers is the batch's loss."""
    rejected_BK: Tensor | None
    """bool: the labels rejected in this step; None if the loss never rejects or the epoch rejects nothing."""


def build_loss_state(settings: LossSettings, scope: StateScope) -> LossState | None:
    """What the loss keeps between batches, None for most. Raises SettingsError, DataError."""
    build = LOSSES[settings.name].state
    return None if build is None else build(settings, scope)


def partial_label_loss(
    logits_BK: Tensor,
    state_BK: Tensor,
    settings: LossSettings,
    context: BatchContext | None = None,
    *,
    loss_state: Tensor | None = None,
    select_logits_BK: Tensor | None = None,
    rate: Fraction | None = None,
) -> LossOutput:
    """The loss of this worker's part of a global batch, and the labels that it rejects.

    Cross-entropy and other means over labels are the sum / divisor; a mean over images (`Loss.divisor`) is the
    sum * K / divisor. The loss is not finite if a logit is NaN, rejected or not, or infinite with the wrong sign for
    its label. (Under cross-entropy +inf costs nothing for a positive, also for a corrected one; under the other losses
    every infinite logit makes it infinite or NaN.)

    Args:
        logits_BK: float32.
        state_BK: int8, label states. Earlier corrections of LL-Cp are POSITIVE.
        settings: the loss.
        context: epoch, and position in the global batch; the default is epoch 1 in a single process.
        loss_state: what the loss's state (`build_loss_state`) holds about these images, for the few losses with one.
        select_logits_BK: float32, logits that choose what is rejected, e.g. of averaged weights; None for `logits_BK`.
        rate: reject rate, instead of the one of `settings` in this epoch.

    Raises TypeError for logits that are not float32, ValueError for shapes or slots that do not fit, and if the loss
    lacks its `loss_state`. Raises DataError if the loss needs all labels observed and one is not.
    """
    loss, context = LOSSES[settings.name], context or BatchContext()
    pools = context.pools(logits_BK, settings.reject_pool)
    rate = reject_rate(settings, context.epoch) if rate is None else rate
    check_inputs(logits_BK, state_BK, pools, rate)
    ranked_BK = logits_BK.detach()
    if select_logits_BK is not None:
        check_inputs(select_logits_BK, state_BK, pools, rate)
        ranked_BK = select_logits_BK.detach()
    if loss.needs_all_observed:
        _check_all_observed(settings.name, state_BK)
    if loss.needs_state and loss_state is None:
        raise ValueError(f"the loss {settings.name!r} needs `loss_state`: read it from `build_loss_state(...)`")
    K = logits_BK.shape[1]
    divisor = pools.batch_size * K if context.divisor is None else context.divisor
    rejects = loss.rate is not None and rate > 0 and pools.batch_size > 0
    if logits_BK.device.type == "cpu" and loss.per_label is None and loss.unobserved != LEFT_OUT:
        # The fast path lists the few observed labels and those that are rejected.
        states = state_BK.numpy().reshape(-1)
        observed = nonzero_positions(states != UNOBSERVED)
        positive, left_out, rejected_BK = observed[states[observed] == POSITIVE], _NONE, None
        if rejects:
            left_out, rejected_BK = select_on_cpu(ranked_BK, observed, pools, rate, settings.reject_of)
            if loss.recovers:
                positive, left_out = np.sort(np.concatenate([positive, left_out])), _NONE
        return LossOutput(SparseSignedLoss.apply(logits_BK, positive, left_out, divisor), rejected_BK)

    rejected_BK = None
    if loss.select is not None:
        rejected_BK = loss.select(ranked_BK, state_BK, settings, context)
    elif rejects:
        unobserved_BK = state_BK == UNOBSERVED
        rejected_BK = select_rejected(ranked_BK, unobserved_BK, pools, rate=rate, reject_of=settings.reject_of)
    if loss.per_label is None:
        sign_BK = sign_of_labels(loss, state_BK, rejected_BK)
        return LossOutput(DenseSignedLoss.apply(logits_BK, sign_BK, divisor), rejected_BK)
    batch = Labels(state_BK, rejected_BK, loss_state)
    cost_BK = per_label_loss(loss, logits_BK, batch, settings, context)
    # Rows first, then in float64: the sum hardly depends on how the rows are shared among workers.
    total = cost_BK.sum(1).sum(0, dtype=torch.float64)
    if loss.over_batch is not None:
        total = total + loss.over_batch(logits_BK, batch, settings, context)
    total = (total * (K if loss.divisor == "images" else 1) / divisor).to(torch.float32)
    return LossOutput(total, rejected_BK)


def _check_all_observed(name: str, state_BK: Tensor) -> None:
    """Raise DataError for an unobserved label. Labels on a GPU are not checked: that would wait for the device."""
    unobserved = int((state_BK == UNOBSERVED).sum()) if state_BK.device.type == "cpu" else 0
    if unobserved:
        raise DataError(
            f"the loss {name!r} needs all labels observed, but {unobserved} of {state_BK.numel()} in this batch are "
            "not: use the full label table, or loss.name: an"
        )
