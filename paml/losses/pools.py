"""How a global batch is divided into the pools that rejection ranks, and how many labels of a pool are rejected.

Axes: B images of this worker, K classes, P pools.
"""

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml.errors import SettingsError

RejectOf = Literal["unobserved", "all"]

MAX_POOL = 2**31 - 1


class Pools(NamedTuple):
    """How a global batch is divided into pools, and which part of it is on this worker."""

    slots_B: Tensor
    """int64, slot of each image in the global batch; every slot is on at most one worker, and may be empty."""
    batch_size: int
    """Number of slots in the global batch."""
    reject_pool: int | None = None
    """Number of consecutive slots that are ranked together; None for all."""
    group: dist.ProcessGroup | None = None
    """The workers that share the batch; all of them must call, also with B = 0. None for one worker."""

    @property
    def size(self) -> int:
        """Slots of a pool; the last pool may have fewer."""
        return self.reject_pool or max(self.batch_size, 1)

    @property
    def num_pools(self) -> int:
        """P."""
        return -(-self.batch_size // self.size)


def check_inputs(logits_BK: Tensor, labels_BK: Tensor, pools: Pools, rate: Fraction) -> None:
    """Raise TypeError or ValueError for inputs that cannot be ranked. Values on a GPU are not checked."""
    if logits_BK.dtype != torch.float32:
        raise TypeError(f"logits are {logits_BK.dtype}; ranking needs torch.float32: pass logits.float()")
    slots_B, batch_size = pools.slots_B, pools.batch_size
    if logits_BK.ndim != 2 or logits_BK.shape != labels_BK.shape or slots_B.shape != logits_BK.shape[:1]:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_BK.shape)}, labels {tuple(labels_BK.shape)}, slots "
            f"{tuple(slots_B.shape)}; they must be [B, K], [B, K] and [B]"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"reject rate is {rate}; it must be a fraction from 0 to 1")
    images = min(pools.size, batch_size)
    if images * logits_BK.shape[1] > MAX_POOL:
        raise SettingsError(
            f"a pool of {images} images x {logits_BK.shape[1]} classes has more than {MAX_POOL} labels: reduce "
            "loss.reject_pool"
        )
    if slots_B.device.type == "cpu" and len(slots_B):
        slots = slots_B.numpy()
        low, high = int(slots.min()), int(slots.max())
        if low < 0 or high >= batch_size:
            raise ValueError(f"slots {low} to {high} are outside of a batch of {batch_size}")


def round_up_to(rate: Fraction, limit: int) -> Fraction:
    """The least fraction >= rate with a denominator <= limit, so that ceil(rate * n) is the same for all n <= limit.

    With it an int64 holds rate.numerator * n for any rate. (No fraction m/n with n <= limit is between rate and the
    result.)
    """
    nearest = rate.limit_denominator(limit)
    if nearest >= rate:
        return nearest
    # Its successor in the Farey sequence: p2/q2 with p2 q - p q2 = 1 and the largest q2 <= limit.
    p, q = nearest.numerator, nearest.denominator
    q2 = limit - (limit + pow(p, -1, q)) % q
    return Fraction((1 + p * q2) // q, q2)


def labels_to_reject(candidates_P: Any, images_P: Any, K: int, rate: Fraction, reject_of: str) -> Any:
    """k of each pool, int64 [P], exact; for numpy arrays and for tensors."""
    exact = round_up_to(rate, MAX_POOL)
    count_P = candidates_P if reject_of == "unobserved" else images_P * K
    k_P = -(-count_P * exact.numerator // exact.denominator)
    return np.minimum(k_P, candidates_P) if isinstance(k_P, np.ndarray) else torch.minimum(k_P, candidates_P)
