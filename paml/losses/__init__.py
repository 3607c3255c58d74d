"""Losses for partial labels, by name in `LOSSES`. Each file has formula, source, defaults and divisor of a loss.

In your own training loop use `LargeLoss` or `make_loss`.
"""

from paml.losses.base import BatchContext, Labels, Loss, per_label_loss
from paml.losses.compute import LossOutput, build_loss_state, partial_label_loss
from paml.losses.modules import LargeLoss, PartialLabelLoss, make_loss
from paml.losses.pools import Pools
from paml.losses.rates import check_reject_rate, fitted_step, reject_rate, rejects_in
from paml.losses.registry import LOSSES, LossSettings
from paml.losses.select import select_rejected
from paml.losses.state import LossState, StateScope

__all__ = [
    "LOSSES",
    "BatchContext",
    "Labels",
    "LargeLoss",
    "Loss",
    "LossOutput",
    "LossSettings",
    "LossState",
    "PartialLabelLoss",
    "Pools",
    "StateScope",
    "build_loss_state",
    "check_reject_rate",
    "fitted_step",
    "make_loss",
    "partial_label_loss",
    "per_label_loss",
    "reject_rate",
    "rejects_in",
    "select_rejected",
]
