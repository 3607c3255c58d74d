"""BoostLU: multiplies the positive values of a class activation map (Kim et al., CVPR 2023)."""

import dataclasses
import math

import torch

from paml.errors import SettingsError, check_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoostSettings:
    """Factor alpha of BoostLU in training and in scoring."""

    train: float = 2.0
    """alpha in training; 1 is no boost. The paper uses 5 in training and in scoring, and its curve is flat between 4
    and 6; 2 in training with 5 in scoring won on validation in two of our three settings and tied in one."""
    eval: float = 5.0
    """alpha in scoring; 1 is no boost."""
    eval_also: tuple[float, ...] = ()
    """More alphas to score, each with its own best epoch (the paper's "inference only" rows)."""

    def __post_init__(self) -> None:
        named = [("train", self.train), ("eval", self.eval), *(("eval_also", alpha) for alpha in self.eval_also)]
        for name, alpha in named:
            check_setting(
                math.isfinite(alpha) and alpha >= 1, f"boost.{name}", alpha, "at least 1, which disables the boost"
            )
        if self.eval in self.eval_also or len(set(self.eval_also)) < len(self.eval_also):
            raise SettingsError(f"boost.eval_also {self.eval_also} repeats an alpha, or boost.eval")

    @property
    def scored(self) -> tuple[float, ...]:
        """Every alpha that is scored, `eval` first."""
        return (self.eval, *self.eval_also)


def boost_lu(maps: torch.Tensor, alpha: float) -> torch.Tensor:
    """BoostLU(x) = where(x > 0, alpha * x, x), elementwise on maps of any shape, for alpha >= 1.

    After average pooling over H*W the gradient of a positive value is alpha / (H*W), of any other 1 / (H*W).
    """
    return maps if alpha == 1 else torch.where(maps > 0, alpha * maps, maps)
