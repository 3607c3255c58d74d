"""Binary cross-entropy of signed labels: its value and its gradient in one pass over memory.

With sign +1 for a label trained as a negative, -1 for a positive, and z = sign * x, each label costs softplus(z) and
its gradient is sign * sigmoid(z). A label that is left out has z = -inf: no cost, no gradient. It is computed as
x - inf, so that a NaN or +inf logit gives NaN and is not hidden by rejection.

Axes: B images of this worker, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from paml.losses.blocks import BLOCK, map_blocks

LARGE = 10.0
"""The product of 1 + exp(z) of eight labels fits float32 for z up to this."""
MIN_FACTORED = 4096
"""Arrays up to this size take the logarithm of each element: multiplying pairs first would be slower."""


class SparseSignedLoss(torch.autograd.Function):
    """For the CPU: all labels are negatives except those in two short ascending lists of flat positions (int64)."""

    @staticmethod
    def forward(ctx: Any, logits_BK: Tensor, positive: np.ndarray, left_out: np.ndarray, divisor: float) -> Tensor:
        ctx.save_for_backward(logits_BK)
        ctx.labels, ctx.divisor = (positive, left_out), divisor
        total, ctx.slope = cost_and_slope(logits_BK.detach(), positive, left_out)
        return torch.tensor(total / divisor, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the logits, float32 [B, K]."""
        refuse_second_derivatives()
        # The forward pass's slope is scaled in place and returned; a second backward computes it again.
        slope, ctx.slope = ctx.slope, None
        if slope is None:
            (logits_BK,) = ctx.saved_tensors
            positive, left_out = ctx.labels
            _, slope = cost_and_slope(logits_BK.detach(), positive, left_out)
        return slope.mul_(float(grads[0]) / ctx.divisor), None, None, None


class DenseSignedLoss(torch.autograd.Function):
    """For any device, with a sign for every label (int8 [B, K]); nothing waits for the device."""

    @staticmethod
    def forward(ctx: Any, logits_BK: Tensor, sign_BK: Tensor, divisor: float) -> Tensor:
        z_BK = torch.where(sign_BK == 0, logits_BK - torch.inf, logits_BK * sign_BK)
        ctx.save_for_backward(z_BK, sign_BK)
        ctx.divisor = divisor
        # Rows first, then in float64: the sum hardly depends on how the rows are shared among workers.
        return (softplus(z_BK).sum(1).sum(0, dtype=torch.float64) / divisor).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        z_BK, sign_BK = ctx.saved_tensors
        return torch.sigmoid(z_BK) * (sign_BK * (grads[0] / ctx.divisor)), None, None


def refuse_second_derivatives() -> None:
    """Raise if a graph of the gradient is requested: its second derivatives would be wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss has no second derivatives (create_graph=True): use paml.losses.per_label_loss"
        )


def cost_and_slope(logits_BK: Tensor, positive: np.ndarray, left_out: np.ndarray) -> tuple[float, Tensor]:
    """(sum of all label costs, sign * sigmoid(z) [B, K]) for float32 logits on the CPU."""
    x = logits_BK.contiguous().numpy().reshape(-1)
    slope_BK = torch.empty(logits_BK.shape, dtype=torch.float32)
    slope = slope_BK.numpy().reshape(-1)
    if len(x) <= BLOCK:
        return _cost_and_slope(x, positive, left_out, slope), slope_BK

    def block(start: int, end: int) -> float:
        flipped = positive[np.searchsorted(positive, start) : np.searchsorted(positive, end)] - start
        out = left_out[np.searchsorted(left_out, start) : np.searchsorted(left_out, end)] - start
        return _cost_and_slope(x[start:end], flipped, out, slope[start:end])

    return sum(map_blocks(block, len(x))), slope_BK


def _cost_and_slope(x: np.ndarray, positive: np.ndarray, left_out: np.ndarray, slope: np.ndarray) -> float:
    z = x.copy()
    z[positive] *= np.float32(-1)
    if len(left_out):
        with np.errstate(invalid="ignore"):
            z[left_out] -= np.float32(np.inf)
    total = softplus_and_sigmoid(z, slope)
    slope[positive] *= np.float32(-1)
    return total


def softplus_and_sigmoid(z: np.ndarray, sigmoid: np.ndarray) -> float:
    """The sum of log(1 + exp(z)), stable for every z. Writes sigmoid(z) into `sigmoid` and overwrites z."""
    if len(z) == 0:
        return 0.0
    total = 0.0
    if z.max() <= LARGE:
        e = np.exp(z, out=z)
        np.divide(e, np.add(e, np.float32(1), out=sigmoid), out=sigmoid)
    else:
        torch.sigmoid(torch.from_numpy(z), out=torch.from_numpy(sigmoid))
        total = float(np.maximum(z, np.float32(0)).sum())
        e = np.exp(np.copysign(z, np.float32(-1), out=z), out=z)
    # (1 + a)(1 + b) - 1 = a + b + ab: three rounds leave an eighth of the logarithms and keep small terms exact.
    while len(e) % 2 == 0 and len(e) * 8 > len(z) and len(e) > MIN_FACTORED:
        half = len(e) // 2
        a, b = e[:half], e[half:]
        product = a * b
        a += b
        a += product
        e = a
    return total + float(np.log1p(e, out=e).sum())
