"""BoostLU: raise the positive attribution scores of a class activation map (Kim et al., CVPR 2023)."""

import dataclasses
import math

import torch

from paml.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoostSettings:
    """Where the boost acts, and by how much."""

    train: float = 5.0
    """alpha while training; 1 is no boost. The paper's curve is flat between 4 and 6."""
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
        if self.eval in self.eval_also or len(set(self.eval_also)) < len(self.eval_also):
            raise SettingsError(f"boost.eval_also {self.eval_also} names an alpha twice, or boost.eval itself")

    @property
    def scored(self) -> tuple[float, ...]:
        """Every alpha that is scored, `eval` first."""
        return (self.eval, *self.eval_also)


def boost_lu(maps: torch.Tensor, alpha: float) -> torch.Tensor:
    """BoostLU(x) = max(x, alpha·x) = where(x > 0, alpha·x, x) for alpha ≥ 1, elementwise on maps of any shape.

    Followed by average pooling over H·W the gradient on a positive score is alpha/(H·W), else 1/(H·W).
    """
    return maps if alpha == 1 else torch.where(maps > 0, alpha * maps, maps)
