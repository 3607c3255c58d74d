"""BoostLU: raise the positive attribution scores of a class activation map (Kim et al., CVPR 2023)."""

import dataclasses
import math
from typing import Literal

import torch

from paml.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoostSettings:
    """Where the boost acts, and by how much."""

    train: float = 2.0
    """alpha while training; 1 is no boost. The paper has 5, as in scoring, and its curve is flat between 4 and 6; 2 in
    training and 5 in scoring won on validation in two of three settings and drew in one (RESULTS.md, paml-best)."""
    schedule: Literal["constant", "linear"] = "constant"
    """linear: alpha while training grows by equal steps an epoch from 1 in the first to `train` after
    `schedule_epochs` epochs; `eval` stays as it is. Epochs count as for the rejection."""
    schedule_epochs: int = 5
    """Epochs over which alpha grows."""
    eval: float = 5.0
    """alpha while scoring; 1 is no boost."""
    eval_also: tuple[float, ...] = ()
    """Further alphas scored beside `eval`, each with a best epoch of its own (the paper's 'inference only' rows)."""

    def __post_init__(self) -> None:
        for name, alpha in [
            ("train", self.train),
            ("eval", self.eval),
            *(("eval_also", a) for a in self.eval_also),
        ]:
            if not (math.isfinite(alpha) and alpha >= 1):
                raise SettingsError(
                    f"boost.{name} is {alpha}; alpha must be at least 1, since below it max(x, alpha·x) would "
                    "shrink negative scores and boost nothing. Use 1 for no boost."
                )
        if self.schedule not in ("constant", "linear"):
            raise SettingsError(f"boost.schedule is {self.schedule!r}; allowed are constant, linear")
        if self.schedule_epochs < 1:
            raise SettingsError(f"boost.schedule_epochs is {self.schedule_epochs}; it must be at least 1")
        if self.eval in self.eval_also or len(set(self.eval_also)) < len(self.eval_also):
            raise SettingsError(f"boost.eval_also {self.eval_also} names an alpha twice, or boost.eval itself")

    def train_in(self, epoch: int) -> float:
        """alpha while training in an epoch (counted from 1); a pure function."""
        if self.schedule == "constant":
            return self.train
        share = min(1.0, (epoch - 1) / self.schedule_epochs)
        return 1 - share + share * self.train

    @property
    def scored(self) -> tuple[float, ...]:
        """Every alpha that is scored, `eval` first."""
        return (self.eval, *self.eval_also)


def boost_lu(maps: torch.Tensor, alpha: float) -> torch.Tensor:
    """BoostLU(x) = max(x, alpha·x) = where(x > 0, alpha·x, x) for alpha ≥ 1, elementwise on maps of any shape.

    Followed by average pooling over H·W the gradient on a positive score is alpha/(H·W), else 1/(H·W).
    """
    return maps if alpha == 1 else torch.where(maps > 0, alpha * maps, maps)
