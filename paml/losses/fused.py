"""Binary cross-entropy of signed labels, forward and backward in few passes over memory.

With sign +1 for a label trained as a negative, -1 as a positive, and z = sign * x, each label costs softplus(z) and its
gradient is sign * sigmoid(z). A label that is left out has z = -inf: no cost, no gradient. It is formed as x - inf, so
that a NaN or +inf logit gives NaN there too and cannot hide in a rejected label.

Axes: B images of this worker, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

BLOCK = 65_536
"""Labels worked on at a time on the CPU: two float32 buffers of it fit the second-level cache."""


class SparseSignedLoss(torch.autograd.Function):
    """For the CPU: all labels are negatives but for two short lists of flat indices (numpy, int64)."""

    @staticmethod
    def forward(ctx: Any, logits_BK: Tensor, positive: np.ndarray, left_out: np.ndarray, divisor: float) -> Tensor:
        z_BK = logits_BK.detach().clone(memory_format=torch.contiguous_format)
        z = z_BK.numpy().reshape(-1)
        z[positive] *= -1
        z[left_out] -= np.float32(np.inf)
        ctx.save_for_backward(z_BK)
        ctx.positive, ctx.divisor = positive, divisor
        return torch.tensor(sum_of_softplus(z_BK.numpy()) / divisor, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z_BK,) = ctx.saved_tensors
        grad_BK = torch.sigmoid(z_BK).mul_(grads[0] / ctx.divisor)
        grad_BK.numpy().reshape(-1)[ctx.positive] *= -1
        return grad_BK, None, None, None


class DenseSignedLoss(torch.autograd.Function):
    """For any device, by a sign for every label (int8 [B, K]); nothing waits for the device."""

    @staticmethod
    def forward(ctx: Any, logits_BK: Tensor, sign_BK: Tensor, divisor: float) -> Tensor:
        z_BK = torch.where(sign_BK == 0, logits_BK - torch.inf, logits_BK * sign_BK)
        ctx.save_for_backward(z_BK, sign_BK)
        ctx.divisor = divisor
        # Rows first, then in float64: the sum hardly depends on how the rows are shared among workers.
        return (softplus(z_BK).sum(1).sum(0, dtype=torch.float64) / divisor).to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_BK, sign_BK = ctx.saved_tensors
        return torch.sigmoid(z_BK) * (sign_BK * (grads[0] / ctx.divisor)), None, None


def sum_of_softplus(z_BK: np.ndarray) -> float:
    """The sum of log(1 + exp(z)), stable for every z: max(z, 0) + log1p(exp(-|z|)); in blocks that stay in the cache."""
    B, K = z_BK.shape
    if B == 0 or K == 0:
        return 0.0
    rows = max(1, BLOCK // K)
    buffer = np.empty((min(rows, B), K), np.float32)
    total = 0.0
    for start in range(0, B, rows):
        z = z_BK[start : start + rows]
        part = buffer[: len(z)]
        np.maximum(z, np.float32(0), out=part)
        total += float(part.sum(1).sum(dtype=np.float64))
        np.abs(z, out=part)
        np.negative(part, out=part)
        np.exp(part, out=part)
        np.log1p(part, out=part)
        total += float(part.sum(1).sum(dtype=np.float64))
    return total
