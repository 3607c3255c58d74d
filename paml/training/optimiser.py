"""Optimiser, learning-rate schedule and averaged weights."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from paml.errors import SettingsError
from paml.models.cam import CamClassifier, head_parameters

OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "one_cycle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How weights move."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The papers use Adam (SGD with momentum .9 for VOC)."""
    learning_rate: float = 1e-5
    """Of the backbone, at the schedule's top."""
    head_factor: float = 10.0
    """The head learns at learning_rate × head_factor."""
    weight_decay: float = 0.0
    """Decoupled for adamw, L2 for adam and sgd."""
    momentum: float = 0.9
    """Of sgd."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """one_cycle rises over `warmup_share` of the steps from 1/25 and falls as a cosine to 0; cosine only falls."""
    warmup_share: float = 0.0
    """Share of all steps over which the rate rises from 1/25 of its top; one_cycle takes 0.3 where this is 0."""
    average: float = 0.0
    """Decay of the exponentially averaged weights, which are then the ones scored; 0 for none."""
    clip_norm: float | None = None
    """Largest norm of the gradient; null for no clipping."""

    def __post_init__(self) -> None:
        for name, allowed in (("name", OPTIMISERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise SettingsError(f"optimiser.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise SettingsError(f"optimiser.clip_norm is {self.clip_norm}; it must be above 0, or null for no clipping")
        if not self.weight_decay >= 0 or not 0 <= self.momentum < 1:
            raise SettingsError(
                f"optimiser.weight_decay ({self.weight_decay}) must be at least 0 and momentum ({self.momentum}) "
                "in [0, 1)"
            )
        if not self.learning_rate > 0 or not self.head_factor > 0:
            raise SettingsError(
                f"optimiser.learning_rate ({self.learning_rate}) and head_factor ({self.head_factor}) must be above 0"
            )
        if not 0 <= self.average < 1 or not 0 <= self.warmup_share < 1:
            raise SettingsError(
                f"optimiser.average ({self.average}) and warmup_share ({self.warmup_share}) must lie in [0, 1)"
            )


def build_optimiser(settings: OptimiserSettings, model: CamClassifier) -> torch.optim.Optimizer:
    """Two groups: the backbone, and the head at its own rate. Rates are set by `set_rate` before each step."""
    head = head_parameters(model)
    heads = {id(parameter) for parameter in head}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in heads and p.requires_grad], "factor": 1.0},
        {"params": head, "factor": settings.head_factor},
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, weight_decay=decay, momentum=settings.momentum)
    fused = next(model.parameters()).device.type == "cuda"
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=decay, fused=fused)


def rate_at(settings: OptimiserSettings, step: int, total_steps: int) -> float:
    """The backbone's learning rate for optimiser step `step` (from 0) of `total_steps`; a pure function."""
    share = settings.warmup_share
    if settings.schedule == "one_cycle" and not share:
        share = 0.3
    rise = share * total_steps
    if step < rise:
        position = 0.5 - 0.5 * math.cos(math.pi * step / rise)
        return settings.learning_rate * (0.04 + 0.96 * position)
    if settings.schedule == "constant":
        return settings.learning_rate
    left = (step - rise) / max(1.0, total_steps - rise)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * left))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of `rate`."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]


def average_into(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """averaged ← decay·averaged + (1 − decay)·model for parameters; buffers (BatchNorm) are copied."""
    with torch.no_grad():
        for kept, new in _pairs(averaged.parameters(), model.parameters()):
            kept.lerp_(new, 1 - decay)
        for kept, new in _pairs(averaged.buffers(), model.buffers()):
            kept.copy_(new)


def _pairs(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> Iterable[tuple]:
    return zip(first, second, strict=True)
