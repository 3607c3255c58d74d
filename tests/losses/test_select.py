"""The selection against a plain sort, on each of its ways."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paml.losses import select_rejected
from paml.losses.blocks import BLOCK, in_blocks, true_places
from paml.losses.select import MAX_POOL, num_pools, round_up_to, select_by_exchange, select_by_histogram
from tests.helpers.ranks import run_on_ranks


def by_sorting(x, candidate, slots, batch_size, rate, reject_of, reject_pool):
    """The definition: in each pool the first k of the candidates in the order (logit falling, slot, class)."""
    B, K = x.shape
    size = reject_pool or batch_size
    rejected = torch.zeros_like(candidate)
    for p in range(num_pools(batch_size, reject_pool)):
        mine = [
            (-(float(x[b, k]) + 0.0), int(slots[b]), k, b)
            for b in range(B)
            for k in range(K)
            if candidate[b, k] and int(slots[b]) // size == p
        ]
        count = len(mine) if reject_of == "unobserved" else min(size, batch_size - p * size) * K
        for _, _, k, b in sorted(mine)[: math.ceil(rate * count)]:
            rejected[b, k] = True
    return rejected


def by_groups(x, candidate, slots, batch_size, rate, reject_of, reject_pool, within):
    """The definition: floor of its share from each class or image, then the best of those that come next in theirs."""
    K = x.shape[1]
    size = reject_pool or batch_size
    rejected = torch.zeros_like(candidate)
    row = {int(slot): b for b, slot in enumerate(slots)}
    for start in range(0, batch_size, size):
        pool = range(start, min(start + size, batch_size))
        labels = [[(slot, k) for slot in pool] for k in range(K)]
        if within == "image":
            labels = [[(slot, k) for k in range(K)] for slot in pool]
        taken, following, count = [], [], 0
        for group in labels:
            mine = [(-(float(x[row[slot], k]) + 0.0), slot, k) for slot, k in group if candidate[row[slot], k]]
            mine.sort()
            own = len(mine) if reject_of == "unobserved" else len(group)
            count += own
            taken += mine[: math.floor(rate * own)]
            following += mine[math.floor(rate * own) : math.ceil(rate * own)]
        taken += sorted(following)[: max(0, math.ceil(rate * count) - len(taken))]
        for _, slot, k in taken:
            rejected[row[slot], k] = True
    return rejected


def on_every_way(x, candidate, slots, batch_size, rate, reject_of, reject_pool):
    yield select_rejected(
        x,
        candidate,
        slots_B=slots,
        batch_size=batch_size,
        rate=rate,
        reject_of=reject_of,
        reject_pool=reject_pool,
    )
    yield select_by_histogram(x, candidate, slots, batch_size, rate, reject_of, reject_pool, None)
    yield by_exchange(x, candidate, slots, batch_size, rate, reject_of, reject_pool, None)


def by_exchange(x, candidate, slots, batch_size, rate, reject_of, reject_pool, group):
    observed = np.flatnonzero(~candidate.numpy())
    flat = select_by_exchange(x.numpy(), observed, slots.numpy(), batch_size, rate, reject_of, reject_pool, group)
    rejected = torch.zeros_like(candidate)
    rejected.view(-1)[torch.from_numpy(flat)] = True
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
    K=st.integers(1, 9),
    rate=RATES,
    reject_of=st.sampled_from(["unobserved", "all"]),
    reject_pool=st.sampled_from([None, 1, 2, 3, 20]),
)
def test_equals_plain_sort(data, B, K, rate, reject_of, reject_pool):
    x = torch.from_numpy(data.draw(hnp.arrays(np.float32, (B, K), elements=LOGITS)))
    candidate = torch.from_numpy(data.draw(hnp.arrays(bool, (B, K))))
    slots = torch.tensor(data.draw(st.permutations(range(B))))
    wanted = by_sorting(x, candidate, slots, B, rate, reject_of, reject_pool)
    for got in on_every_way(x, candidate, slots, B, rate, reject_of, reject_pool):
        assert torch.equal(got, wanted)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 7),
    K=st.integers(1, 9),
    rate=RATES,
    reject_of=st.sampled_from(["unobserved", "all"]),
    reject_pool=st.sampled_from([None, 1, 2, 3, 20]),
    within=st.sampled_from(["class", "image"]),
)
def test_within_groups_equals_a_plain_loop(data, B, K, rate, reject_of, reject_pool, within):
    x = torch.from_numpy(data.draw(hnp.arrays(np.float32, (B, K), elements=LOGITS)))
    candidate = torch.from_numpy(data.draw(hnp.arrays(bool, (B, K))))
    slots = torch.tensor(data.draw(st.permutations(range(B))))
    got = within_groups(x, candidate, slots, B, rate, reject_of, reject_pool, within)
    wanted = by_groups(x, candidate, slots, B, rate, reject_of, reject_pool, within)
    assert torch.equal(got, wanted)
    if reject_of == "unobserved":  # exactly as many in all as without groups
        assert got.sum() == by_sorting(x, candidate, slots, B, rate, reject_of, reject_pool).sum()


def within_groups(x, candidate, slots, batch_size, rate, reject_of, reject_pool, within, group=None):
    return select_rejected(
        x,
        candidate,
        slots_B=slots,
        batch_size=batch_size,
        rate=rate,
        reject_of=reject_of,
        reject_pool=reject_pool,
        reject_within=within,
        group=group,
    )


def test_groups_with_ties_lose_their_first_by_plan_position():
    """Shares of 1.5 of 3: one of each group, and with k = ceil(4.5) = 5 two more in all."""
    x, candidate, slots = torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool), torch.arange(3)
    of_class = within_groups(x, candidate, slots, 3, Fraction(1, 2), "unobserved", None, "class")
    assert of_class.tolist() == [[True, True, True], [True, True, False], [False, False, False]]
    of_image = within_groups(x, candidate, slots, 3, Fraction(1, 2), "unobserved", None, "image")
    assert of_image.tolist() == [[True, True, False], [True, True, False], [True, False, False]]
    assert torch.equal(of_image[[2, 0, 1]], within_groups(
        x, candidate, torch.tensor([2, 0, 1]), 3, Fraction(1, 2), "unobserved", None, "image"
    ))  # fmt: skip


def test_the_surplus_goes_to_the_highest_logits_not_to_the_first_classes():
    """A fifth of 4 labels a class is below one label: k = ceil(0.2 * 12) = 3 go, one of a class at most."""
    x = torch.tensor([[0.0, 9.0, 5.0], [1.0, 8.0, 0.0], [0.0, 7.0, 0.0], [0.0, 6.0, 0.0]])
    x = torch.cat([x, torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0]])], 1)
    candidate = torch.ones(4, 4, dtype=torch.bool)
    candidate[:, 0] = False
    rejected = within_groups(x, candidate, torch.arange(4), 4, Fraction(1, 5), "unobserved", None, "class")
    assert rejected.nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]
    rejected = within_groups(x, candidate, torch.arange(4), 4, Fraction(1, 20), "unobserved", None, "class")
    assert rejected.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("within", ["class", "image"])
def test_groups_with_nan_empty_shapes_and_meta(within):
    x = torch.tensor([[float("nan"), -5.0, -float("inf")], [float("nan"), 3.0, 4.0]])
    candidate = torch.ones(2, 3, dtype=torch.bool)
    rejected = within_groups(x, candidate, torch.arange(2), 2, Fraction(1, 3), "unobserved", None, within)
    of_class, of_image = [[False, False, False], [False, True, True]], [[False, True, False], [False, False, True]]
    assert rejected.tolist() == (of_class if within == "class" else of_image)
    for B, K, batch_size in ((0, 5, 4), (3, 0, 3)):
        none = torch.zeros(B, K, dtype=torch.bool)
        slots = torch.arange(B)
        rejected = within_groups(torch.zeros(B, K), none, slots, batch_size, Fraction(1, 2), "all", 2, within)
        assert rejected.shape == (B, K)
    on_meta = (x.to("meta"), candidate.to("meta"), torch.arange(2, device="meta"))
    assert within_groups(*on_meta, 2, Fraction(1, 3), "all", 1, within).shape == (2, 3)


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


LONG_CHOICES = [("unobserved", "pool"), ("all", "pool"), ("unobserved", "class"), ("all", "image")]


def long_pools_on_workers(rank):
    """Uneven shares out of order, so that the highest logits and the first ties lie on any of the workers."""
    slots = [range(40, 64), range(5, 40), [4, 0, 3, 1, 2]][rank]
    found = []
    for ties in TIES:
        x, candidate = (values[list(slots)] for values in long_pools(ties))
        for pool, rate in ((None, Fraction(13, 1000)), (16, Fraction(1, 7)), (None, Fraction(1, 10**5))):
            for reject_of, within in LONG_CHOICES:
                rejected = within_groups(
                    x, candidate, torch.tensor(list(slots)), 64, rate, reject_of, pool, within, dist.group.WORLD
                )
                found.append((list(slots), ties, pool, rate, reject_of, within, rejected.numpy()))
    return found


def test_long_pools_over_workers_lose_what_they_lose_on_one():
    results = run_on_ranks(long_pools_on_workers, 3)
    for parts in zip(*results, strict=True):
        _, ties, pool, rate, reject_of, within, _ = parts[0]
        x, candidate = long_pools(ties)
        alone = within_groups(x, candidate, torch.arange(64), 64, rate, reject_of, pool, within).numpy()
        together = np.zeros_like(alone)
        for slots, *_, rejected in parts:
            together[slots] = rejected
        assert alone.any()
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("reject_pool", [None, 16, 50])
def test_long_pools_with_a_bracket(ties, reject_pool):
    """Long enough for the sampled bracket; a bad sample or heavy ties must not change the set."""
    x, candidate = long_pools(ties)
    B = len(x)
    rate = Fraction(13, 1000)
    ways = list(on_every_way(x, candidate, torch.arange(B), B, rate, "unobserved", reject_pool))
    size = reject_pool or B
    for start in range(0, B, size):
        rows = slice(start, start + size)
        flat, allowed = x[rows].flatten(), candidate[rows].flatten()
        order = flat.masked_fill(~allowed, -torch.inf).sort(descending=True, stable=True).indices
        wanted = torch.zeros_like(allowed)
        wanted[order[: math.ceil(rate * int(allowed.sum()))]] = True
        for got in ways:
            assert torch.equal(got[rows].flatten(), wanted)


def test_k_is_not_of_float_arithmetic():
    """0.01 of 40,000 is 400, not the 401 that the drift of 1 - 0.005 - 0.005 gives; and nothing but candidates goes."""
    x, candidate = torch.zeros(8, 5000), torch.ones(8, 5000, dtype=torch.bool)
    rate = Fraction("0.005") * 2
    for rejected in on_every_way(x, candidate, torch.arange(8), 8, rate, "all", None):
        assert rejected.sum() == 400
        assert rejected.flatten()[:400].all()


def test_k_never_exceeds_the_candidates():
    candidate = torch.zeros(4, 10, dtype=torch.bool)
    candidate[1, 2:5] = True
    for rejected in on_every_way(torch.zeros(4, 10), candidate, torch.arange(4), 4, Fraction(1, 2), "all", None):
        assert torch.equal(rejected, candidate)


def test_signed_zeros_are_one_value():
    x = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    for rejected in on_every_way(
        x, torch.ones(1, 4, dtype=torch.bool), torch.arange(1), 1, Fraction(1, 2), "all", None
    ):
        assert rejected.tolist() == [[True, True, False, False]]


def test_nan_ranks_last():
    x = torch.tensor([[float("nan"), -5.0, -float("nan"), -float("inf")]])
    candidate = torch.ones(1, 4, dtype=torch.bool)
    for rejected in on_every_way(x, candidate, torch.arange(1), 1, Fraction(1, 2), "all", None):
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
        for rejected in on_every_way(x, candidate, torch.arange(B), batch_size, Fraction(1, 2), "unobserved", 2):
            assert rejected.shape == (B, K)
    no_labels = torch.zeros(0, 5, dtype=torch.bool)
    rejected = select_rejected(torch.zeros(0, 5), no_labels, slots_B=torch.arange(0), batch_size=0, rate=Fraction(1, 2))
    assert rejected.shape == (0, 5)


def test_refusals():
    x, candidate, slots = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.arange(2)
    rate = Fraction(1, 2)
    with pytest.raises(TypeError, match=r"bfloat16.*logits\.float"):
        select_rejected(x.bfloat16(), candidate, slots_B=slots, batch_size=2, rate=rate)
    with pytest.raises(ValueError, match="shapes do not fit"):
        select_rejected(x, candidate[:1], slots_B=slots, batch_size=2, rate=rate)
    with pytest.raises(ValueError, match="outside a batch of 1"):
        select_rejected(x, candidate, slots_B=slots, batch_size=1, rate=rate)
    with pytest.raises(ValueError, match="reject rate is 3/2"):
        select_rejected(x, candidate, slots_B=slots, batch_size=2, rate=Fraction(3, 2))
    with pytest.raises(ValueError, match=rf"above {MAX_POOL} labels.*reject_pool"):
        select_rejected(x, candidate, slots_B=slots, batch_size=2**30, rate=rate)


@settings(deadline=None)
@given(length=st.integers(0, 20_000), share=st.sampled_from([0.0, 0.001, 0.1, 1.0]), seed=st.integers(0, 99))
def test_true_places(length, share, seed):
    mask = np.random.default_rng(seed).random(length) < share
    assert np.array_equal(true_places(mask), np.flatnonzero(mask))


def test_blocks_cover_the_array_in_order_for_any_number_of_threads():
    length = 5 * BLOCK + 7
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(in_blocks(lambda start, end: (start, end), length))
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]
    assert [end - start for start, end in seen[0]] == [BLOCK] * 5 + [7]
    assert in_blocks(lambda start, end: 1, 0) == []
