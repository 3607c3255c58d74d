"""The labels to reject, from each implementation, against a plain sort."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paml.losses import Pools, select_rejected
from paml.losses.blocks import BLOCK, map_blocks, nonzero_positions
from paml.losses.pools import MAX_POOL, round_up_to
from paml.losses.radix import select_on_device
from paml.losses.select_cpu import select_on_cpu
from tests.helpers.ranks import run_on_ranks


def by_sorting(x, candidate, slots, batch_size, rate, reject_of, reject_pool):
    """The definition: in each pool the first k candidates in the order (logit descending, slot, class)."""
    B, K = x.shape
    size = reject_pool or batch_size
    rejected = torch.zeros_like(candidate)
    for first in range(0, batch_size, size):
        images = [b for b in range(B) if first <= int(slots[b]) < first + size]
        ranked = [(-(float(x[b, k]) + 0.0), int(slots[b]), k, b) for b in images for k in range(K) if candidate[b, k]]
        count = len(ranked) if reject_of == "unobserved" else len(images) * K
        for _, _, k, b in sorted(ranked)[: math.ceil(rate * count)]:
            rejected[b, k] = True
    return rejected


def by_all_implementations(x, candidate, slots, batch_size, rate, reject_of, reject_pool):
    pools = Pools(slots, batch_size, reject_pool)
    yield select_rejected(x, candidate, pools, rate=rate, reject_of=reject_of)
    if rate > 0 and batch_size > 0:
        yield select_on_device(x, candidate, pools, rate, reject_of)
        yield by_exchange(x, candidate, pools, rate, reject_of)


def by_exchange(x, candidate, pools, rate, reject_of):
    """The implementation for several workers, with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paml.losses.select_cpu._highest", None)  # not used
        patch.setattr("paml.losses.select_cpu._sum_over_workers", lambda counts, pools: counts.astype(np.int64))
        observed = np.flatnonzero(~candidate.numpy())
        positions, rejected = select_on_cpu(x, observed, pools._replace(group="one worker"), rate, reject_of)
    assert np.array_equal(positions, np.flatnonzero(rejected))
    return rejected


LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, -80.0, 80.0, 1e-45, -1e-45, float("-inf")]),
    st.floats(-90, 90, width=32),
)
RATES = st.one_of(
    st.sampled_from([Fraction(0), Fraction(1), Fraction(1, 10), Fraction(0.1)]),
    st.decimals(0, 1, places=17).map(Fraction),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 7),
    empty_slots=st.sampled_from([0, 0, 4]),
    K=st.integers(1, 9),
    rate=RATES,
    reject_of=st.sampled_from(["unobserved", "all"]),
    reject_pool=st.sampled_from([None, 1, 2, 3, 20]),
)
def test_equals_plain_sort(data, B, empty_slots, K, rate, reject_of, reject_pool):
    x = torch.from_numpy(data.draw(hnp.arrays(np.float32, (B, K), elements=LOGITS)))
    candidate = torch.from_numpy(data.draw(hnp.arrays(bool, (B, K))))
    batch_size = B + empty_slots
    slots = torch.tensor(data.draw(st.one_of(st.just(range(batch_size)), st.permutations(range(batch_size))))[:B])
    expected = by_sorting(x, candidate, slots, batch_size, rate, reject_of, reject_pool)
    for rejected in by_all_implementations(x, candidate, slots, batch_size, rate, reject_of, reject_pool):
        assert torch.equal(rejected, expected)


TIES = ["none", "bf16", "few values", "one value", "sorted"]


def long_pools(ties):
    B, K = 64, 3001
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, K, generator=generator) * 2 - 4
    x = {
        "none": x,
        "bf16": x.bfloat16().float(),
        "few values": x.round(),
        "one value": torch.full_like(x, -3.0),
        "sorted": x.flatten().sort().values.view(B, K),
    }[ties]
    return x, torch.rand(B, K, generator=generator) > 0.02


def long_pools_on_workers(rank):
    """Uneven shares out of order, so that the highest logits and the first ties are on any worker."""
    slots = torch.tensor([list(range(40, 64)), list(range(5, 40)), [4, 0, 3, 1, 2]][rank])
    results = []
    for ties in TIES:
        x, candidate = (values[slots] for values in long_pools(ties))
        for pool, rate in ((None, Fraction(13, 1000)), (16, Fraction(1, 7)), (None, Fraction(1, 10**5))):
            for reject_of in ("unobserved", "all"):
                pools = Pools(slots, 64, pool, dist.group.WORLD)
                rejected = select_rejected(x, candidate, pools, rate=rate, reject_of=reject_of)
                results.append((slots.numpy(), ties, pool, rate, reject_of, rejected.numpy()))
    return results


def test_long_pools_on_several_workers_equal_those_on_one():
    results = run_on_ranks(long_pools_on_workers, 3)
    for parts in zip(*results, strict=True):
        _, ties, pool, rate, reject_of, _ = parts[0]
        x, candidate = long_pools(ties)
        alone = select_rejected(x, candidate, Pools(torch.arange(64), 64, pool), rate=rate, reject_of=reject_of).numpy()
        joined = np.zeros_like(alone)
        for slots, *_, rejected in parts:
            joined[slots] = rejected
        assert alone.any()
        np.testing.assert_array_equal(joined, alone)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("reject_pool", [None, 16, 50])
def test_long_pools_with_an_estimated_threshold(ties, reject_pool):
    """Long enough to be sampled; a bad sample or many ties must not change the set."""
    x, candidate = long_pools(ties)
    B = len(x)
    rate = Fraction(13, 1000)
    results = list(by_all_implementations(x, candidate, torch.arange(B), B, rate, "unobserved", reject_pool))
    size = reject_pool or B
    for start in range(0, B, size):
        rows = slice(start, start + size)
        flat, allowed = x[rows].flatten(), candidate[rows].flatten()
        order = flat.masked_fill(~allowed, -torch.inf).sort(descending=True, stable=True).indices
        expected = torch.zeros_like(allowed)
        expected[order[: math.ceil(rate * int(allowed.sum()))]] = True
        for rejected in results:
            assert torch.equal(rejected[rows].flatten(), expected)


def test_k_is_exact():
    """0.01 of 40,000 is 400, not 401 as with the float error of 1 - 0.005 - 0.005."""
    x, candidate = torch.zeros(8, 5000), torch.ones(8, 5000, dtype=torch.bool)
    rate = Fraction("0.005") * 2
    for rejected in by_all_implementations(x, candidate, torch.arange(8), 8, rate, "all", None):
        assert rejected.sum() == 400
        assert rejected.flatten()[:400].all()


def test_k_never_exceeds_the_candidates():
    candidate = torch.zeros(4, 10, dtype=torch.bool)
    candidate[1, 2:5] = True
    for rejected in by_all_implementations(
        torch.zeros(4, 10), candidate, torch.arange(4), 4, Fraction(1, 2), "all", None
    ):
        assert torch.equal(rejected, candidate)


def test_signed_zeros_are_one_value():
    x = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    for rejected in by_all_implementations(
        x, torch.ones(1, 4, dtype=torch.bool), torch.arange(1), 1, Fraction(1, 2), "all", None
    ):
        assert rejected.tolist() == [[True, True, False, False]]


def test_nan_ranks_last():
    x = torch.tensor([[float("nan"), -5.0, -float("nan"), -float("inf")]])
    candidate = torch.ones(1, 4, dtype=torch.bool)
    for rejected in by_all_implementations(x, candidate, torch.arange(1), 1, Fraction(1, 2), "all", None):
        assert rejected.tolist() == [[False, True, False, True]]


@given(numerator=st.integers(0, 10**20), extra=st.integers(0, 10**20), limit=st.integers(1, 300))
def test_round_up_to_keeps_every_k(numerator, extra, limit):
    if numerator + extra == 0:
        return
    rate = Fraction(numerator, numerator + extra)
    rounded = round_up_to(rate, limit)
    assert rounded >= rate
    assert rounded.denominator <= max(limit, 1)
    assert [math.ceil(rounded * n) for n in range(limit + 1)] == [math.ceil(rate * n) for n in range(limit + 1)]


def test_empty_shapes():
    for B, K, batch_size in ((0, 5, 4), (3, 0, 3)):
        x, candidate = torch.zeros(B, K), torch.zeros(B, K, dtype=torch.bool)
        for rejected in by_all_implementations(
            x, candidate, torch.arange(B), batch_size, Fraction(1, 2), "unobserved", 2
        ):
            assert rejected.shape == (B, K)
    no_labels = torch.zeros(0, 5, dtype=torch.bool)
    rejected = select_rejected(torch.zeros(0, 5), no_labels, Pools(torch.arange(0), 0), rate=Fraction(1, 2))
    assert rejected.shape == (0, 5)


def test_invalid_inputs_are_refused():
    x, candidate, slots = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.arange(2)
    rate = Fraction(1, 2)
    with pytest.raises(TypeError, match=r"bfloat16.*logits\.float"):
        select_rejected(x.bfloat16(), candidate, Pools(slots, 2), rate=rate)
    with pytest.raises(ValueError, match="shapes"):
        select_rejected(x, candidate[:1], Pools(slots, 2), rate=rate)
    with pytest.raises(ValueError, match="batch of 1"):
        select_rejected(x, candidate, Pools(slots, 1), rate=rate)
    with pytest.raises(ValueError, match="3/2"):
        select_rejected(x, candidate, Pools(slots, 2), rate=Fraction(3, 2))
    with pytest.raises(ValueError, match=rf"{MAX_POOL} labels.*reject_pool"):
        select_rejected(x, candidate, Pools(slots, 2**30), rate=rate)


@settings(deadline=None)
@given(length=st.integers(0, 20_000), share=st.sampled_from([0.0, 0.001, 0.1, 1.0]), seed=st.integers(0, 99))
def test_nonzero_positions(length, share, seed):
    mask = np.random.default_rng(seed).random(length) < share
    assert np.array_equal(nonzero_positions(mask), np.flatnonzero(mask))


def test_blocks_cover_the_array_in_order_for_any_number_of_threads():
    length = 5 * BLOCK + 7
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(map_blocks(lambda start, end: (start, end), length))
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]
    assert [end - start for start, end in seen[0]] == [BLOCK] * 5 + [7]
    assert map_blocks(lambda start, end: 1, 0) == []
