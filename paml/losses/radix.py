"""Exact selection of the highest logits on a GPU, over any number of workers (see `select`).

`select_cpu` uses the same keys and digits.

Axes: B images of this worker, K classes, P pools, S slots of the global batch, D digits.
"""

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from paml.losses.pools import Pools, labels_to_reject

DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, width) in bits of a 32-bit key's digits."""


def sort_keys(logits: Tensor) -> Tensor:
    """int64 keys in [0, 2^32) in the order of the float32 logits: equal for 0.0 and -0.0, 0 for NaN."""
    bits = (logits + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31
    return torch.where(logits.isnan(), 0, keys)


def select_on_device(logits_BK: Tensor, candidate_BK: Tensor, pools: Pools, rate: Fraction, reject_of: str) -> Tensor:
    """`select_rejected` on a GPU. Nothing waits for the device, so every pass covers all labels."""
    (B, K), P, slots_B, device = logits_BK.shape, pools.num_pools, pools.slots_B, logits_BK.device
    row = torch.arange(B, device=device).repeat_interleave(K)
    pool_B = slots_B // pools.size
    pool, candidate = pool_B[row], candidate_BK.reshape(-1)
    own_B2 = torch.stack([candidate_BK.sum(1), torch.full_like(pool_B, 1)], 1)
    counts_P2 = own_B2.new_zeros(P, 2).index_add(0, pool_B, own_B2)

    # Labels in play: those whose leading digits equal their pool's threshold so far.
    key, in_play = sort_keys(logits_BK.reshape(-1)), candidate
    needed_P, threshold_P = slots_B.new_zeros(P), slots_B.new_zeros(P)
    for shift, width in DIGITS:
        D = 2**width
        digit = (key >> shift) & (D - 1)
        # Numbers of candidates and images travel with the first histogram.
        sums = _sum_over_workers(torch.cat([_histogram(digit, pool, in_play, P, D), counts_P2], 1), pools)
        counts_PD = sums[:, :D]
        if shift == DIGITS[0][0]:
            needed_P = labels_to_reject(sums[:, D], sums[:, D + 1], K, rate, reject_of)
        at_least_PD = counts_PD.flip(1).cumsum(1).flip(1)
        digit_P = (at_least_PD >= needed_P[:, None]).sum(1) - 1
        needed_P = needed_P - (at_least_PD - counts_PD).gather(1, digit_P[:, None]).squeeze(1)
        threshold_P = threshold_P | (digit_P << shift)
        in_play = in_play & (digit == digit_P[pool])

    # Labels in play are tied now; needed_P of a pool remain to be taken: by slot over all workers, then by class.
    tied_BK = in_play.view(B, K)
    ties_S = _sum_over_workers(slots_B.new_zeros(pools.batch_size).scatter(0, slots_B, tied_BK.sum(1)), pools)
    before_S = ties_S.cumsum(0) - ties_S
    allowed_B = needed_P[pool_B] - before_S[slots_B] + before_S[pool_B * pools.size]
    tie_taken_BK = tied_BK & (tied_BK.cumsum(1) <= allowed_B[:, None])
    return (candidate & (key > threshold_P[pool])).view(B, K) | tie_taken_BK


def _sum_over_workers(counts: Tensor, pools: Pools) -> Tensor:
    """int64; sent as int32, which holds any count of a pool."""
    if pools.group is None:
        return counts
    sums = counts.to(torch.int32)
    dist.all_reduce(sums, group=pools.group)
    return sums.to(torch.int64)


def _histogram(digit: Tensor, pool: Tensor, in_play: Tensor, P: int, D: int) -> Tensor:
    """int64 [P, D]: labels in play by pool and digit."""
    # On a GPU, additions to the same bin are serialized: they are spread over copies of the histogram. A label out of
    # play adds 0 to a bin that depends on its position.
    copies = max(1, 32 // P)
    position = torch.arange(len(digit), device=digit.device)
    bin_ = torch.where(in_play, digit, position % D)
    index = (pool * copies + position % copies) * D + bin_
    counts = torch.zeros(P * copies * D, dtype=torch.int32, device=digit.device)
    counts.scatter_add_(0, index, in_play.to(torch.int32))
    return counts.view(P, copies, D).sum(1)
