"""Losses as modules, for your own training loop."""

from dataclasses import fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses.base import BatchContext
from paml.losses.compute import build_loss_state, partial_label_loss
from paml.losses.registry import LOSSES, LossSettings, SharedLossSettings
from paml.losses.state import LossState, StateScope

_MODES = {"reject": "ll-r", "correct-temporary": "ll-ct", "correct-permanent": "ll-cp"}


class LargeLoss(nn.Module):
    """Large-loss rejection and correction (Kim et al., CVPR 2022), at a reject rate that the caller sets.

    In each call the ceil(rate * count) unobserved labels with the largest losses are rejected; count is the number of
    unobserved labels in the batch. The papers start with a rate of 0 in the first epoch and increase it in each epoch:
    set `rate`. Exactly that many labels are rejected, also in a short last batch; observed labels never are.

    Args:
        rate: fraction of the unobserved labels to reject, from 0 to 1.
        mode: what happens to rejected labels. reject: they cost nothing. correct-temporary: they are trained as
            positives in this step. correct-permanent: the same, and the caller keeps them as positives:
            `states[criterion.rejected] = POSITIVE`.
    """

    def __init__(
        self, rate: float, mode: Literal["reject", "correct-temporary", "correct-permanent"] = "reject"
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise SettingsError(f"mode is {mode!r}; it must be one of {', '.join(_MODES)}")
        self.rate = rate
        self.settings = LossSettings(name=_MODES[mode])
        self.rejected: Tensor | None = None
        """bool [B, K]: the labels that the last call rejected."""

    def forward(self, logits: Tensor, states: Tensor) -> Tensor:
        """The mean loss of all labels, a scalar.

        Args:
            logits: [B, K].
            states: int8 [B, K], the codes POSITIVE, NEGATIVE and UNOBSERVED of paml.labels.
        """
        _check_states(states)
        rate = Fraction(str(self.rate))
        loss, rejected_BK = partial_label_loss(logits.float(), states, self.settings, rate=rate)
        self.rejected = torch.zeros_like(logits, dtype=torch.bool) if rejected_BK is None else rejected_BK
        return loss

    def extra_repr(self) -> str:
        return f"rate={self.rate}, loss={self.settings.name}"


class PartialLabelLoss(nn.Module):
    """A loss of the registry with its schedule and state; made by `make_loss`.

    Call `end_epoch()` after every epoch: the schedules of most losses go by `epoch`.
    """

    def __init__(
        self,
        settings: LossSettings,
        num_epochs: int | None,
        num_images: int | None,
        classes: tuple[str, ...] | None,
        learning_rate: float,
    ) -> None:
        super().__init__()
        if LOSSES[settings.name].needs_state and None in (num_images, num_epochs):
            raise SettingsError(f"the loss {settings.name} keeps a state per image: set num_images and num_epochs")
        self.settings, self.num_epochs, self.num_images, self.classes = settings, num_epochs, num_images, classes
        self.learning_rate = learning_rate
        self.epoch = 1
        """The current epoch, counted from 1."""
        self.state: LossState | None = None
        self.rejected: Tensor | None = None
        """bool [B, K]: the labels that the last call rejected; None if none were."""

    def forward(self, logits: Tensor, states: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            logits: [B, K].
            states: int8 [B, K], the codes POSITIVE, NEGATIVE and UNOBSERVED of paml.labels.
            index: int64 [B], number of each image, from 0 to num_images - 1, for losses with a state per image.
        """
        _check_states(states)
        logits = logits.float()
        if self.state is None and LOSSES[self.settings.name].state is not None:
            classes = self.classes or tuple(map(str, range(logits.shape[1])))
            images, epochs = np.arange(self.num_images or 0), self.num_epochs or 1
            scope = StateScope(index=images, classes=classes, epochs=epochs, device=logits.device)
            self.state = build_loss_state(self.settings, scope)
        context = BatchContext(epoch=self.epoch, num_epochs=self.num_epochs)
        index_B, loss_state = np.empty(0, np.int64), None
        if LOSSES[self.settings.name].needs_state:
            if index is None:
                raise ValueError(f"the loss {self.settings.name} keeps a state per image: pass index")
            index_B = index.cpu().numpy()
        if self.state is not None:
            loss_state = self.state.read(index_B, states)
        loss, self.rejected = partial_label_loss(logits, states, self.settings, context, loss_state=loss_state)
        if self.state is not None and self.training:
            slots_B = torch.arange(len(logits), device=logits.device)
            self.state.update(index_B, slots_B, len(logits), logits.detach(), states, self.learning_rate)
        return loss

    def end_epoch(self) -> None:
        """Move to the next epoch."""
        if self.state is not None:
            self.state.end_epoch(self.epoch)
        self.epoch += 1


def make_loss(
    name: str,
    *,
    num_epochs: int | None = None,
    num_images: int | None = None,
    classes: tuple[str, ...] | None = None,
    learning_rate: float = 1e-3,
    **settings: Any,
) -> PartialLabelLoss:
    """Any loss of `paml.losses.LOSSES` by name: `make_loss("asl", gamma_negative=4.0)`.

    Args:
        name: the loss.
        num_epochs: epochs of the run; needed by gr, role and em-apl.
        num_images: number of training images; needed by role and em-apl, which keep a state per image.
        classes: names of the classes; needed by p-asl-selective with a prior_file.
        learning_rate: of the classifier; role updates its estimates with a multiple of it.
        settings: the loss's own settings (`gamma_negative`) or the shared ones (`reject_rate_step`, `warmup_epochs`).

    Raises SettingsError.
    """
    if name not in LOSSES:
        raise SettingsError(f"loss is {name!r}; it must be one of {', '.join(LOSSES)}")
    own, shared = LOSSES[name].own_settings, {field.name for field in fields(SharedLossSettings)} - {"name"}
    groups: dict[str, dict[str, Any]] = {group: {} for group in own}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        group = next((group for group, kind in own.items() if key in {field.name for field in fields(kind)}), None)
        if group is None and key not in shared:
            allowed = [field.name for kind in own.values() for field in fields(kind)]
            raise SettingsError(f"{name} has no setting {key!r}; it has {', '.join([*allowed, *sorted(shared)])}")
        (values if group is None else groups[group])[key] = value
    values |= {group: own[group](**chosen) for group, chosen in groups.items()}
    return PartialLabelLoss(LossSettings(name=name, **values), num_epochs, num_images, classes, learning_rate)


def _check_states(states: Tensor) -> None:
    """Raise ValueError for codes that are not label states. States on a GPU are not checked."""
    if states.device.type == "cpu" and states.numel():
        low, high = (int(value) for value in states.aminmax())
        if low < min(POSITIVE, NEGATIVE, UNOBSERVED) or high > max(POSITIVE, NEGATIVE, UNOBSERVED):
            raise ValueError(
                f"label states from {low} to {high}; use POSITIVE ({POSITIVE}), NEGATIVE ({NEGATIVE}) and UNOBSERVED "
                f"({UNOBSERVED}) of paml.labels"
            )
