"""The labels to reject, on the CPU, for one worker or several (see `select`)."""

from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml.losses.blocks import BLOCK, map_blocks, nonzero_positions
from paml.losses.pools import Pools, labels_to_reject
from paml.losses.radix import DIGITS, sort_keys

SAMPLES = 16_384
"""Logits sampled from a long pool to estimate its threshold."""


def select_on_cpu(
    logits_BK: Tensor, observed: np.ndarray, pools: Pools, rate: Fraction, reject_of: str
) -> tuple[np.ndarray, Tensor]:
    """The labels to reject, as ascending positions in the flat [B, K] and as bool [B, K].

    observed: positions, ascending, of the labels that are not candidates.
    """
    B, K = logits_BK.shape
    values, slots_B = logits_BK.numpy(), pools.slots_B.numpy()
    rejected_BK, order = torch.zeros(B, K, dtype=torch.bool), None
    if B > 1 and not (slots_B[1:] > slots_B[:-1]).all():
        # With rows in the order of their slots a pool is a range of them.
        order = np.argsort(slots_B, kind="stable")
        is_observed_BK = np.zeros((B, K), bool)
        is_observed_BK.reshape(-1)[observed] = True
        values, slots_B = values[order], slots_B[order]
        observed = np.flatnonzero(is_observed_BK[order])
    values = np.ascontiguousarray(values).reshape(-1)

    if pools.group is None and pools.num_pools == 1:
        # In a small batch the number of operations counts.
        candidates = len(values) - len(observed)
        count = candidates if reject_of == "unobserved" else len(values)
        k = min(-(-count * rate.numerator // rate.denominator), candidates)
        rejected = _highest(values, observed, k) if k else np.empty(0, np.int64)
    else:
        rejected = _of_pools(values, observed, slots_B, K, pools, rate, reject_of)
    if order is not None:
        rejected = np.sort(order[rejected // K] * K + rejected % K)
    rejected_BK.numpy().reshape(-1)[rejected] = True
    return rejected, rejected_BK


def _of_pools(
    values: np.ndarray, observed: np.ndarray, slots_B: np.ndarray, K: int, pools: Pools, rate: Fraction, reject_of: str
) -> np.ndarray:
    """Positions, ascending, of the labels to reject in several pools or over several workers; slots ascend."""
    P, alone = pools.num_pools, pools.group is None
    row_P = np.searchsorted(slots_B, np.arange(P + 1) * pools.size)
    start_P, observed_P, images_P = row_P * K, np.searchsorted(observed, row_P * K), np.diff(row_P)
    candidates_P = images_P * K - np.diff(observed_P)
    if alone:
        k_P = labels_to_reject(candidates_P, images_P, K, rate, reject_of)
    else:
        # k of a pool depends on all workers, but is at most the rate's share of a full pool. A tie that this worker
        # leaves out comes after k of its labels that precede it, so it is never needed.
        full_P = np.minimum(pools.size, pools.batch_size - np.arange(P) * pools.size)
        k_P = np.minimum(labels_to_reject(full_P * K, full_P, K, rate, "all"), candidates_P)
    parts = [np.empty(0, np.int64)]
    for p in np.flatnonzero(k_P).tolist():
        start, end = start_P[p : p + 2]
        own = observed[observed_P[p] : observed_P[p + 1]] - start
        parts.append((_highest if alone else _above_threshold)(values[start:end], own, int(k_P[p])) + start)
    positions = np.concatenate(parts)
    if alone:
        return positions
    taken = _over_workers(
        values[positions], positions // max(K, 1), candidates_P, images_P, slots_B, pools, K, rate, reject_of
    )
    return positions[taken]


def _over_workers(
    logits: np.ndarray,
    row: np.ndarray,
    candidates_P: np.ndarray,
    images_P: np.ndarray,
    slots_B: np.ndarray,
    pools: Pools,
    K: int,
    rate: Fraction,
    reject_of: str,
) -> np.ndarray:
    """bool [n]: a radix select as in `radix`, of these few labels only; in numpy it takes a third of the time.

    Args:
        logits: float32 [n], ordered by image, then class.
        row: int64 [n], positions of the labels' images on this worker.
        candidates_P: int64 [P], this worker's unobserved labels in each pool.
        images_P: int64 [P], its images.
        slots_B: int64 [B], ascending.
    """
    P, slot = pools.num_pools, slots_B[row]
    pool, key = slot // pools.size, sort_keys(torch.from_numpy(logits)).numpy()
    in_play = np.arange(len(key))  # labels whose leading digits equal their pool's threshold so far
    needed_P, threshold_P = np.zeros(P, np.int64), np.zeros(P, np.int64)
    for shift, width in DIGITS:
        D = 2**width
        digit, own_pool = (key[in_play] >> shift) & (D - 1), pool[in_play]
        counts_PD = np.bincount(own_pool * D + digit, minlength=P * D).reshape(P, D)
        sums = _sum_over_workers(np.column_stack([counts_PD, candidates_P, images_P]), pools)
        counts_PD = sums[:, :D]
        if shift == DIGITS[0][0]:
            needed_P = labels_to_reject(sums[:, D], sums[:, D + 1], K, rate, reject_of)
        at_least_PD = counts_PD[:, ::-1].cumsum(1)[:, ::-1]
        digit_P = (at_least_PD >= needed_P[:, None]).sum(1) - 1
        needed_P = needed_P - (at_least_PD - counts_PD)[np.arange(P), digit_P]
        threshold_P |= digit_P << shift
        in_play = in_play[digit == digit_P[own_pool]]

    # Labels in play are tied now; needed_P of a pool remain to be taken: by slot over all workers, then by class.
    tied_slot, tied_pool = slot[in_play], pool[in_play]
    ties_S = _sum_over_workers(np.bincount(tied_slot, minlength=pools.batch_size), pools)
    before_S = ties_S.cumsum() - ties_S
    rank = np.arange(len(in_play)) - np.searchsorted(tied_slot, tied_slot)
    before = before_S[tied_slot] - before_S[tied_pool * pools.size]
    taken = key > threshold_P[pool]
    taken[in_play[before + rank < needed_P[tied_pool]]] = True
    return taken


def _sum_over_workers(counts: np.ndarray, pools: Pools) -> np.ndarray:
    """int64; sent as int32, which holds any count of a pool."""
    sums = torch.from_numpy(counts.astype(np.int32))
    dist.all_reduce(sums, group=pools.group)
    return sums.numpy().astype(np.int64)


def _highest(values: np.ndarray, observed: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of the k highest candidates of a pool, earlier ones first among equals."""
    if len(values) <= BLOCK:
        ranked = values.copy()
        ranked[observed] = -np.inf
        partitioned = np.partition(ranked, len(ranked) - k)[len(ranked) - k :]  # NaN sorts last
        if partitioned[0] > -np.inf and not np.isnan(partitioned.max()):
            return _at_least(ranked, partitioned[0], k)
    # The pool is long, or NaN or -inf would be ranked.
    positions = _above_threshold(values, observed, k)
    keys = sort_keys(torch.from_numpy(values[positions])).numpy()
    return positions[_at_least(keys, np.partition(keys, len(keys) - k)[len(keys) - k], k)]


def _at_least(values: np.ndarray, threshold: np.generic, k: int) -> np.ndarray:
    """Positions of the k highest values, earlier ones first among equals; threshold: the k-th highest."""
    positions = np.flatnonzero(values >= threshold)
    if len(positions) > k:
        tied = np.flatnonzero(values[positions] == threshold)
        positions = np.delete(positions, tied[k - len(positions) :])
    return positions


def _above_threshold(values: np.ndarray, observed: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of candidates of a pool: at least the k highest, and few more if the pool is long."""
    n = len(values)
    if n > 4 * SAMPLES:
        sample = values[:: (n // SAMPLES) | 1]
        expected = len(sample) * k / n
        # Observed labels in the sample only lower the threshold; so do NaNs, which fail the comparison below.
        rank = int(expected + 4 * expected**0.5 + 4 + len(sample) * len(observed) / n)
        if rank < len(sample) // 2:
            threshold = np.partition(sample, len(sample) - rank)[len(sample) - rank]
            blocks = map_blocks(lambda start, end: nonzero_positions(values[start:end] >= threshold) + start, n)
            positions = _without(np.concatenate(blocks), observed)
            if len(positions) >= k:
                return positions
    is_candidate = np.ones(n, bool)
    is_candidate[observed] = False
    return np.flatnonzero(is_candidate)


def _without(positions: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """`positions` except `removed`, both ascending."""
    if len(removed) == 0 or len(positions) == 0:
        return positions
    nearest = np.searchsorted(removed, positions)
    np.minimum(nearest, len(removed) - 1, out=nearest)
    return positions[removed[nearest] != positions]
