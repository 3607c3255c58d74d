"""Which labels are rejected: exactly the k highest logits of each pool, whatever the number of workers.

Among unobserved labels trained as negatives the loss softplus(x) rises with the logit x, so logits are ranked: the
float32 loss ties where the logits differ (for x << 0), the logits do not. Order: higher logit first; equal logits (0.0
and -0.0 are equal) by slot, then class. A NaN ranks below all; `partial_label_loss` is NaN then, and the caller stops.

Three ways to the same set:
- one worker on the CPU: numpy finds a bracket from a sample, then sorts the few labels above it;
- a GPU, one or several: a radix select over 32-bit keys that rise with the logit. Histograms of 11, 11 and 10 bits are
  summed over the workers, then the number of ties in each slot: four small all-reduces in all, whatever the data, so
  that a worker without images joins them like any other. Nothing waits for the device;
- several workers on CPUs: the same radix select and the same all-reduces, but only over the labels above each worker's
  own bracket. A rejected label is among the k highest of its own worker's part of the pool, and those lie above.

Within classes or images (`select_within`) a pool still loses k = ceil(rate x count) labels, but each of its groups, a
class or an image, gives at least floor and at most ceil of rate x its own count: first the floor of every group, then
the highest logits of those that come next in their groups. (The ceil of every group would reject many times the rate
where groups are small. Largest remainders would always favour the same classes, for the remainders hardly change from
batch to batch; the logits decide instead.)

Axes: B images of this worker, K classes, P pools, S slots of the global batch, G groups of a pool, N labels of a group.
"""

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paml.losses.blocks import in_blocks, true_places

RejectGroup = dist.ProcessGroup
"""The workers that share a global batch."""

LOWEST_KEY = -(2**31)
MAX_POOL = 2**31 - 1
DIGITS = ((21, 11), (10, 11), (0, 10))
SAMPLES = 16_384


def num_pools(batch_size: int, reject_pool: int | None) -> int:
    """Number of pools in a global batch; the last one may be smaller."""
    return -(-batch_size // (reject_pool or max(batch_size, 1)))


def round_up_to(rate: Fraction, limit: int) -> Fraction:
    """The least fraction >= rate with a denominator <= limit, so that ceil(rate * n) is the same for all n <= limit.

    It lets an int64 hold rate.numerator * n for any rate. (Farey neighbours by continued fractions: no fraction m/n
    with n <= limit lies between rate and the result.)
    """
    if rate.denominator <= limit:
        return rate
    p0, q0, p1, q1 = 0, 1, 1, 0
    n, d = rate.numerator, rate.denominator
    while True:
        a = n // d
        if q0 + a * q1 > limit:
            break
        p0, q0, p1, q1 = p1, q1, p0 + a * p1, q0 + a * q1
        n, d = d, n - a * d
    k = (limit - q0) // q1
    return max(Fraction(p0 + k * p1, q0 + k * q1), Fraction(p1, q1))


def select_rejected(
    logits_BK: Tensor,
    candidate_BK: Tensor,
    *,
    slots_B: Tensor,
    batch_size: int,
    rate: Fraction,
    reject_of: Literal["unobserved", "all"] = "unobserved",
    reject_pool: int | None = None,
    reject_within: Literal["pool", "class", "image"] = "pool",
    group: RejectGroup | None = None,
) -> Tensor:
    """The labels to reject, bool [B, K]: in each pool the k candidates with the highest logits.

    k = ceil(rate * count), exact; count is the pool's candidates (`reject_of` unobserved) or all its entries (all).
    k never exceeds the candidates, and nothing else is ever chosen. reject_within class or image: each class or image
    of a pool gives between floor and ceil of rate * its own count (see above).

    logits_BK: float32. candidate_BK: bool, the unobserved labels. slots_B: int64, each image's slot in the global
    batch, 0 to batch_size - 1, every slot on exactly one worker. reject_pool: consecutive slots ranked together, None
    for all. group: the workers that share the batch, None for one worker; all of them must call, also with B = 0.

    Raises TypeError for logits that are not float32, ValueError for shapes, slots or a rate that do not fit.
    """
    check_inputs(logits_BK, candidate_BK, slots_B, batch_size, rate, reject_pool)
    if rate == 0 or batch_size == 0:
        return torch.zeros_like(candidate_BK)
    several = group if group is not None and dist.get_world_size(group) > 1 else None
    if reject_within != "pool":
        of_class = reject_within == "class"
        return select_within(
            logits_BK, candidate_BK, slots_B, batch_size, rate, reject_of, reject_pool, several, of_class=of_class
        )
    if logits_BK.device.type != "cpu":
        return select_by_histogram(logits_BK, candidate_BK, slots_B, batch_size, rate, reject_of, reject_pool, several)
    logits, slots = logits_BK.detach().numpy(), slots_B.numpy()
    observed = true_places(~candidate_BK.numpy().reshape(-1))
    if several is None:
        flat = select_by_partition(logits, observed, slots, batch_size, rate, reject_of, reject_pool)
    else:
        flat = select_by_exchange(logits, observed, slots, batch_size, rate, reject_of, reject_pool, several)
    rejected_BK = torch.zeros_like(candidate_BK)
    rejected_BK.numpy().reshape(-1)[flat] = True
    return rejected_BK


def check_inputs(
    logits_BK: Tensor,
    candidate_BK: Tensor,
    slots_B: Tensor,
    batch_size: int,
    rate: Fraction,
    reject_pool: int | None,
) -> None:
    """Raise for inputs that cannot be ranked. Values on a GPU are not looked at, for that would wait for the device."""
    if logits_BK.dtype != torch.float32:
        raise TypeError(f"logits are {logits_BK.dtype}; ranking needs torch.float32: pass logits.float()")
    if logits_BK.ndim != 2 or logits_BK.shape != candidate_BK.shape or slots_B.shape != logits_BK.shape[:1]:
        raise ValueError(
            f"shapes do not fit: logits {tuple(logits_BK.shape)}, labels {tuple(candidate_BK.shape)}, "
            f"slots {tuple(slots_B.shape)}; needed are [B, K], [B, K] and [B]"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"reject rate is {rate}; it is a fraction from 0 to 1")
    pool_images = min(reject_pool or batch_size, batch_size)
    if pool_images * logits_BK.shape[1] > MAX_POOL:
        raise ValueError(
            f"a pool of {pool_images} images x {logits_BK.shape[1]} classes is above {MAX_POOL} labels: "
            "set loss.reject_pool lower"
        )
    if slots_B.device.type == "cpu" and len(slots_B):
        low, high = slots_B.aminmax()
        if low < 0 or high >= batch_size:
            raise ValueError(f"slots from {int(low)} to {int(high)} lie outside a batch of {batch_size}")


def images_in_pools(batch_size: int, reject_pool: int | None) -> np.ndarray:
    """int64 [P]: images of each pool of the global batch."""
    size = reject_pool or batch_size
    return np.minimum(size, batch_size - np.arange(num_pools(batch_size, reject_pool)) * size)


def keys_of(logits: np.ndarray) -> np.ndarray:
    """int32 keys in the order of the float32 logits: 0.0 and -0.0 the same, NaN the lowest."""
    bits = (logits + np.float32(0)).view(np.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys[np.isnan(logits)] = LOWEST_KEY
    return keys


def select_by_partition(
    logits_BK: np.ndarray,
    observed: np.ndarray,
    slots_B: np.ndarray,
    batch_size: int,
    rate: Fraction,
    reject_of: str,
    reject_pool: int | None,
) -> np.ndarray:
    """Flat indices into [B, K] of the labels to reject, for one worker that holds the whole batch.

    observed: flat indices, ascending, of the labels that are not candidates.
    """
    B, K = logits_BK.shape
    if B == 0 or K == 0:
        return np.empty(0, np.int64)
    logits_BK, observed, slots_B, order = _by_slots(logits_BK, observed, slots_B)
    starts, candidates = _pools(observed, slots_B, K, batch_size, reject_pool)
    if reject_of == "unobserved":
        counts = candidates
    else:
        counts = images_in_pools(batch_size, reject_pool) * K
    exact = round_up_to(rate, MAX_POOL)
    wanted = np.minimum(-(-counts * exact.numerator // exact.denominator), candidates)

    flat = np.ascontiguousarray(logits_BK).reshape(-1)
    kept = _above_bracket(flat, observed, starts, wanted)
    keys = keys_of(flat[kept])
    if len(wanted) == 1:
        chosen = _first_k(keys, int(wanted[0]))
    else:
        pool = np.searchsorted(starts, kept, side="right") - 1
        chosen = _first_k_of_pools(keys, pool, wanted)
    rejected = kept[chosen]
    return rejected if order is None else order[rejected // K] * K + rejected % K


def select_by_exchange(
    logits_BK: np.ndarray,
    observed: np.ndarray,
    slots_B: np.ndarray,
    batch_size: int,
    rate: Fraction,
    reject_of: str,
    reject_pool: int | None,
    group: RejectGroup | None,
) -> np.ndarray:
    """Flat indices into [B, K] of the labels to reject, for one of several workers on CPUs; all of them must call.

    observed: flat indices, ascending, of the labels that are not candidates.
    """
    K = logits_BK.shape[1]
    size, P = reject_pool or batch_size, num_pools(batch_size, reject_pool)
    logits_BK, observed, slots_B, order = _by_slots(logits_BK, observed, slots_B)
    starts, candidates = _pools(observed, slots_B, K, batch_size, reject_pool)
    # k of a pool needs the candidates of all workers, but it is never above the rate's share of all labels.
    # A tie that this worker leaves out comes after k labels of its own that go before it, so it is never needed.
    exact = round_up_to(rate, MAX_POOL)
    at_most = -(-images_in_pools(batch_size, reject_pool) * K * exact.numerator // exact.denominator)
    flat = np.ascontiguousarray(logits_BK).reshape(-1)
    kept = _above_bracket(flat, observed, starts, np.minimum(at_most, candidates))
    key = keys_of(flat[kept]).astype(np.int64) + 2**31
    pool = np.searchsorted(starts, kept, side="right") - 1

    in_play = np.arange(len(kept))
    threshold_P = np.zeros(P, np.int64)
    needed_P = np.zeros(P, np.int64)
    for shift, width in DIGITS:
        D = 2**width
        digit, own = (key[in_play] >> shift) & (D - 1), pool[in_play]
        counts = np.bincount(own * D + digit, minlength=P * D).reshape(P, D)
        # The candidates, also those that were left out, travel with the first histogram.
        sums = _summed(np.column_stack([counts, candidates]), group)
        counts_PD = sums[:, :D]
        if shift == DIGITS[0][0]:
            needed_P = _exact_k(torch.from_numpy(sums[:, D]), batch_size, K, rate, reject_of, reject_pool).numpy()
        at_least_PD = counts_PD[:, ::-1].cumsum(1)[:, ::-1]
        digit_P = np.maximum((at_least_PD >= needed_P[:, None]).sum(1) - 1, 0)
        needed_P = needed_P - (at_least_PD - counts_PD)[np.arange(P), digit_P]
        threshold_P |= digit_P << shift
        in_play = in_play[digit == digit_P[own]]

    # needed_P ties are left to take in each pool: by slot over all workers, then by class.
    slot = slots_B[kept[in_play] // max(K, 1)]
    ties_S = np.bincount(slot, minlength=batch_size)
    before_S = _summed(ties_S, group)
    before_S = before_S.cumsum() - before_S
    rank = np.arange(len(slot)) - np.searchsorted(slot, slot)
    before = before_S[slot] - before_S[slot // size * size]
    taken = key > threshold_P[pool]
    taken[in_play[before + rank < needed_P[slot // size]]] = True
    rejected = kept[taken]
    return rejected if order is None else order[rejected // K] * K + rejected % K


def _summed(counts: np.ndarray, group: RejectGroup | None) -> np.ndarray:
    """int64, the sum over the workers; sent as int32, which holds any count of a pool."""
    sums = torch.from_numpy(counts.astype(np.int32))
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums.numpy().astype(np.int64)


def _by_slots(
    logits_BK: np.ndarray, observed: np.ndarray, slots_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The same with rows in the order of their slots, so that a pool is a run of the flat logits; None: they were."""
    if len(slots_B) < 2 or (slots_B[1:] > slots_B[:-1]).all():
        return logits_BK, observed, slots_B, None
    order = np.argsort(slots_B, kind="stable")
    is_observed_BK = np.zeros(logits_BK.shape, bool)
    is_observed_BK.reshape(-1)[observed] = True
    return logits_BK[order], np.flatnonzero(is_observed_BK[order]), slots_B[order], order


def _pools(
    observed: np.ndarray, slots_B: np.ndarray, K: int, batch_size: int, reject_pool: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [P + 1] and [P]: where each pool starts in the flat logits of ordered rows, and its candidates there."""
    size, P = reject_pool or batch_size, num_pools(batch_size, reject_pool)
    starts = np.searchsorted(slots_B, np.arange(P + 1) * size) * K
    return starts, np.diff(starts) - np.diff(np.searchsorted(observed, starts))


def _above_bracket(flat: np.ndarray, observed: np.ndarray, starts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Flat indices, ascending, of candidates: the `wanted` highest of each pool and, where a sample helps, few more."""
    parts = []
    for start, end, k in zip(starts[:-1], starts[1:], wanted, strict=True):
        if k == 0:
            continue
        values = flat[start:end]
        n = len(values)
        mine = observed
        if len(wanted) > 1:
            mine = observed[slice(*np.searchsorted(observed, (start, end)))] - start
        kept = None
        if n > 4 * SAMPLES:
            stride = (n // SAMPLES) | 1
            sample = values[::stride]
            expected = len(sample) * k / n
            # The observed labels in the sample only loosen the bracket; so do NaNs, which fail the comparison below.
            rank = int(expected + 4 * expected**0.5 + 4 + len(sample) * len(mine) / n)
            if rank < len(sample) // 2:
                bracket = np.partition(sample, len(sample) - rank)[len(sample) - rank]
                kept = _without(_at_least(values, bracket), mine)
        if kept is None or len(kept) < k:
            kept = _without(np.arange(n), mine)
        parts.append(kept + start)
    return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, np.int64)


def _at_least(values: np.ndarray, bracket: np.float32) -> np.ndarray:
    """Where values >= bracket, ascending."""
    parts = in_blocks(lambda start, end: true_places(values[start:end] >= bracket) + start, len(values))
    return np.concatenate(parts)


def _without(indices: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """`indices` less `removed`, both ascending."""
    if len(removed) == 0 or len(indices) == 0:
        return indices
    place = np.searchsorted(removed, indices)
    np.minimum(place, len(removed) - 1, out=place)
    return indices[removed[place] != indices]


def _first_k(keys: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of the k highest keys, earlier positions first among equals."""
    if k == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
    chosen = keys >= threshold
    surplus = int(np.count_nonzero(chosen)) - k
    if surplus:
        chosen[np.flatnonzero(keys == threshold)[-surplus:]] = False
    return np.flatnonzero(chosen)


def _first_k_of_pools(keys: np.ndarray, pool: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """As `_first_k` in each pool; `pool` ascends, and each has at least its `wanted` keys."""
    if len(keys) == 0:
        return np.empty(0, np.int64)
    inverted = np.int64(2**31 - 1) - keys
    composite = (pool.astype(np.uint64) << np.uint64(32)) | inverted.astype(np.uint64)
    in_order = np.sort(composite)
    first = np.searchsorted(pool, np.arange(len(wanted)))
    threshold = in_order[np.minimum(first + np.maximum(wanted, 1) - 1, len(in_order) - 1)]
    own = threshold[pool]
    above, tied = composite < own, composite == own
    needed = wanted - np.bincount(pool[above], minlength=len(wanted))
    ties = np.flatnonzero(tied)
    tied_pool = pool[ties]
    rank = np.arange(len(ties)) - np.searchsorted(tied_pool, tied_pool)
    above[ties[rank < needed[tied_pool]]] = True
    above &= wanted[pool] > 0
    return np.flatnonzero(above)


def select_by_histogram(
    logits_BK: Tensor,
    candidate_BK: Tensor,
    slots_B: Tensor,
    batch_size: int,
    rate: Fraction,
    reject_of: str,
    reject_pool: int | None,
    group: RejectGroup | None,
) -> Tensor:
    """The labels to reject, bool [B, K], by a radix select over all workers of `group`, on any device.

    Every pass runs over all labels, since the number of those still in play would have to be waited for.
    """
    B, K = logits_BK.shape
    P = num_pools(batch_size, reject_pool)
    size = reject_pool or batch_size
    device = logits_BK.device
    pool_B = slots_B // size

    unsigned_BK = _unsigned_keys(logits_BK)

    # Labels in play: those whose leading digits equal their pool's threshold so far.
    key, pool = unsigned_BK.reshape(-1), pool_B[:, None].expand(B, K).reshape(-1)
    in_play = candidate_BK.reshape(-1)

    needed_P = torch.zeros(P, dtype=torch.int64, device=device)
    threshold_P = torch.zeros(P, dtype=torch.int64, device=device)
    for shift, width in DIGITS:
        digit = (key >> shift) & (2**width - 1)
        counts_PD = _histogram(digit, pool, in_play, P, 2**width)
        if group is not None:
            dist.all_reduce(counts_PD, group=group)
        # Labels in play with this digit or a higher one.
        at_least_PD = counts_PD.to(torch.int64).flip(1).cumsum(1).flip(1)
        if shift == DIGITS[0][0]:
            needed_P = _exact_k(at_least_PD[:, 0], batch_size, K, rate, reject_of, reject_pool)
        digit_P = (at_least_PD >= needed_P[:, None]).sum(1) - 1
        above_PD = at_least_PD - counts_PD
        needed_P = needed_P - above_PD.gather(1, digit_P[:, None]).squeeze(1)
        threshold_P = threshold_P | (digit_P << shift)
        in_play = in_play & (digit == digit_P[pool])

    # needed_P ties are left to take in each pool: by slot over all workers, then by class.
    threshold_B = threshold_P[pool_B]
    tied_BK = (unsigned_BK == threshold_B[:, None]) & candidate_BK
    ties_S = torch.zeros(batch_size, dtype=torch.int32, device=device)
    ties_S = ties_S.scatter(0, slots_B, tied_BK.sum(1, dtype=torch.int32))
    if group is not None:
        dist.all_reduce(ties_S, group=group)
    before_S = ties_S.to(torch.int64).cumsum(0) - ties_S
    first_P = torch.arange(P, device=device) * size
    before_B = before_S[slots_B] - before_S[first_P][pool_B]
    allowed_B = needed_P[pool_B] - before_B
    taken_BK = tied_BK & (tied_BK.cumsum(1, dtype=torch.int32) <= allowed_B[:, None])
    return ((unsigned_BK > threshold_B[:, None]) & candidate_BK) | taken_BK


def select_within(
    logits_BK: Tensor,
    candidate_BK: Tensor,
    slots_B: Tensor,
    batch_size: int,
    rate: Fraction,
    reject_of: str,
    reject_pool: int | None,
    group: RejectGroup | None,
    *,
    of_class: bool,
) -> Tensor:
    """The labels to reject, bool [B, K], ranked within each class of a pool, or else each image; on any device.

    One all-reduce gives every worker the order of the whole batch's labels (8 bytes each); nothing waits for a device.
    """
    K = logits_BK.shape[1]
    P, size = num_pools(batch_size, reject_pool), reject_pool or batch_size
    if K == 0:
        return torch.zeros_like(candidate_BK)
    device = logits_BK.device

    # Higher goes first and no two are equal: the logit's key, then the place in the pool, earlier first. -1: never.
    place_BK = (slots_B % size)[:, None] * K + torch.arange(K, device=device)
    order_BK = _unsigned_keys(logits_BK) * (size * K) + (size * K - 1 - place_BK)
    order_BK = torch.where(candidate_BK, order_BK, -1)
    order_SK = torch.full((P * size, K), -1, dtype=torch.int64, device=device)
    order_SK = order_SK.scatter(0, slots_B[:, None].expand_as(order_BK), order_BK)
    if group is not None:
        dist.all_reduce(order_SK, dist.ReduceOp.MAX, group=group)
    order_PGN = order_SK.view(P, size, K)
    if of_class:
        order_PGN = order_PGN.transpose(1, 2)

    candidates_PG = (order_PGN >= 0).sum(2)
    if reject_of == "unobserved":
        count_PG = candidates_PG
    else:
        exists_PS = torch.arange(P * size, device=device).view(P, size) < batch_size  # the last pool may be smaller
        count_PG = exists_PS.sum(1)[:, None].expand(P, K) if of_class else exists_PS * K
    at_most_PG = torch.minimum(_share_up(count_PG, rate), candidates_PG)
    # floor(rate * n), in the same exact arithmetic.
    at_least_PG = torch.minimum(count_PG - _share_up(count_PG, 1 - rate), candidates_PG)
    k_P = torch.minimum(_share_up(count_PG.sum(1), rate), at_most_PG.sum(1))

    # The first of each group, as many as any group can give.
    N = order_PGN.shape[2]
    first_PGM = order_PGN.topk(min(math.ceil(rate * N), N), dim=2).values
    last = first_PGM.gather(2, (at_least_PG - 1).clamp(min=0)[..., None]).squeeze(2)
    following = first_PGM.gather(2, at_least_PG.clamp(max=first_PGM.shape[2] - 1)[..., None]).squeeze(2)
    following_PG = torch.where(at_least_PG < at_most_PG, following, -1)
    left_P = k_P - at_least_PG.sum(1)
    falling_PG = following_PG.sort(1, descending=True).values
    least_P = falling_PG.gather(1, (left_P - 1).clamp(min=0)[:, None])
    follows_PG = (following_PG >= least_P) & (left_P > 0)[:, None] & (following_PG >= 0)
    nothing = torch.iinfo(torch.int64).max
    bound_PG = torch.where(follows_PG, following_PG, torch.where(at_least_PG > 0, last, nothing))

    bound_BK = bound_PG[slots_B // size] if of_class else bound_PG.reshape(-1)[slots_B][:, None]
    return (order_BK >= bound_BK) & candidate_BK


def _unsigned_keys(logits_BK: Tensor) -> Tensor:
    """int64 in [0, 2^32), in the order of the float32 logits: 0.0 and -0.0 the same, NaN the lowest, 0."""
    bits_BK = (logits_BK.detach() + 0.0).view(torch.int32)
    key_BK = bits_BK ^ ((bits_BK >> 31) & 0x7FFFFFFF)
    return torch.where(logits_BK.isnan(), LOWEST_KEY, key_BK).to(torch.int64) + 2**31


def _share_up(count: Tensor, rate: Fraction) -> Tensor:
    """int64 on the device: ceil(rate * count), exact."""
    exact = round_up_to(rate, MAX_POOL)
    return (count * exact.numerator + (exact.denominator - 1)).div(exact.denominator, rounding_mode="floor")


def _exact_k(
    candidates_P: Tensor, batch_size: int, K: int, rate: Fraction, reject_of: str, reject_pool: int | None
) -> Tensor:
    """int64 [P] on the device: ceil(rate * count), at most the candidates."""
    if reject_of == "unobserved":
        count_P = candidates_P
    else:
        size = reject_pool or batch_size
        first_P = torch.arange(len(candidates_P), device=candidates_P.device) * size
        count_P = (batch_size - first_P).clamp(max=size) * K
    return torch.minimum(_share_up(count_P, rate), candidates_P)


def _histogram(digit: Tensor, pool: Tensor, in_play: Tensor, P: int, D: int) -> Tensor:
    """int32 [P, D]: labels in play by pool and digit."""
    # On a GPU many labels share a digit: adding them into copies of the histogram keeps their additions apart. A label
    # out of play adds 0, at a place of its own.
    copies = max(1, 32 // P)
    place = torch.arange(len(digit), device=digit.device)
    bin_ = torch.where(in_play, digit, place % D)
    index = (pool * copies + place % copies) * D + bin_
    counts = torch.zeros(P * copies * D, dtype=torch.int32, device=digit.device)
    counts.scatter_add_(0, index, in_play.to(torch.int32))
    return counts.view(P, copies, D).sum(1, dtype=torch.int32)
