"""Optimizer, learning-rate schedule and exponential moving average (EMA) of the weights, and the phases of a run."""

import dataclasses
import math
from typing import Literal

import torch
from torch import nn

from paml.errors import check_setting
from paml.models.cam import CamClassifier

_START_FACTOR = 1 / 25
_ONE_CYCLE_WARMUP = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, its learning rate and the EMA of the weights."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer. The papers use Adam."""
    learning_rate: float = 1e-5
    """Peak learning rate of the backbone."""
    head_lr_multiplier: float = 10.0
    """The learning rate of the head is learning_rate × head_lr_multiplier."""
    weight_decay: float = 0.0
    """Weight decay: decoupled for adamw, an L2 penalty for adam and sgd."""
    momentum: float = 0.9
    """Momentum of sgd."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """Learning-rate schedule after the warm-up: constant, or cosine decay to 0. one_cycle is cosine with a warm-up over
    0.3 of the steps unless `warmup_fraction` is set."""
    warmup_fraction: float = 0.0
    """Fraction of all steps in which the learning rate rises from 1/25 of its peak."""
    ema_decay: float = 0.0
    """Decay of the EMA of the weights per optimizer step. The EMA weights are then evaluated and exported; 0 disables
    them."""
    clip_norm: float | None = None
    """Maximum gradient norm; null disables clipping."""

    def __post_init__(self) -> None:
        choices = {"name": ("adam", "adamw", "sgd"), "schedule": ("constant", "cosine", "one_cycle")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            check_setting(value in allowed, f"optimizer.{name}", value, " or ".join(allowed))
        for name in ("learning_rate", "head_lr_multiplier"):
            value = getattr(self, name)
            check_setting(value > 0, f"optimizer.{name}", value, "above 0")
        for name in ("momentum", "warmup_fraction", "ema_decay"):
            value = getattr(self, name)
            check_setting(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        check_setting(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        clip = self.clip_norm
        check_setting(clip is None or clip > 0, "optimizer.clip_norm", clip, "above 0, or null for no clipping")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearInitSettings:
    """LinearInit: train only the head before end-to-end training.

    The frozen backbone is protected from the poor gradients of an untrained head, which matters with very sparse
    labels (Cole et al., CVPR 2021).
    """

    epochs: int = 0
    """Epochs that train only the head, before the `epochs` of the run; 0 disables LinearInit. The schedules of the
    loss and of the learning rate start after them."""
    learning_rate: float = 1e-3
    """Learning rate of the head in these epochs, constant."""

    def __post_init__(self) -> None:
        check_setting(self.epochs >= 0, "linear_init.epochs", self.epochs, "0 (disabled) or more")
        check_setting(self.learning_rate > 0, "linear_init.learning_rate", self.learning_rate, "above 0")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive epochs that share an optimizer."""

    head_only: bool
    """Whether the backbone is frozen, with its BatchNorm statistics."""
    first_epoch: int
    """The epoch of the run, counted from 1, that the phase starts with."""
    epochs: int
    optimizer: OptimizerSettings


def build_optimizer(settings: OptimizerSettings, model: CamClassifier) -> torch.optim.Optimizer:
    """An optimizer with two parameter groups, backbone and head. `set_learning_rate` sets their rates."""
    head = list(model.head.parameters())
    in_head = {id(parameter) for parameter in head}
    backbone = [p for p in model.parameters() if id(p) not in in_head and p.requires_grad]
    groups = [
        {"params": backbone, "multiplier": 1.0},
        {"params": head, "multiplier": settings.head_lr_multiplier},
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, weight_decay=decay, momentum=settings.momentum)
    fused = next(model.parameters()).device.type == "cuda"
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=decay, fused=fused)


def learning_rate_at(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The learning rate of the backbone in optimizer step `step` (from 0) of `total_steps`."""
    warmup = settings.warmup_fraction
    if settings.schedule == "one_cycle" and not warmup:
        warmup = _ONE_CYCLE_WARMUP
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        rise = 0.5 - 0.5 * math.cos(math.pi * step / warmup_steps)
        return settings.learning_rate * (_START_FACTOR + (1 - _START_FACTOR) * rise)
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each parameter group from that of the backbone."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·model for parameters; buffers (BatchNorm statistics) are copied."""
    for averaged, current in zip(ema_model.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)
    for averaged, current in zip(ema_model.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)
