"""Every sample exactly once per epoch, in the same global batches for any number of workers and any first step."""

import numpy as np
import pytest

from paml.data.plan import EpochPlan, Samples, plan_epoch, worker_slots

EPOCHS, SEED = (1, 2, 3), 11
# (samples of each shard, batch size)
CASES = {
    "uneven shards": ([1, 40, 7, 3, 90, 2, 55, 13], 16),
    "fewer shards than streams": ([70, 1, 29], 24),
    "one shard": ([97], 10),
    "one sample per shard": ([1] * 61, 7),
    "batch divides the samples": ([25, 25, 50], 20),
    "one batch with short streams": ([12, 19], 32),
    "fewer samples than workers": ([2, 1], 8),
    "fewer slots than workers": ([20, 30, 10], 3),
}
WORKERS = (1, 2, 3, 5, 8)
MANY = (1, 2, 3, 7, 8, 31, 64, 100, 333, 512, 1000, 1023, 1024)


def samples_of(sizes: list[int]) -> Samples:
    count = sum(sizes)
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32) * 2, sizes)  # some shards have no sample
    return Samples(index=np.arange(count) * 5, row=np.arange(count), shard=shard)


def plan_of(samples: Samples, batch: int, epoch: int, slots: tuple[int, int] | None = None) -> EpochPlan:
    return plan_epoch(samples, batch_size=batch, epoch=epoch, seed=SEED, window=16, slots=slots)


def batches_of(plans: list[EpochPlan], ranges: list[tuple[int, int]], start: int) -> list[list[tuple[int, int]]]:
    """The global batches from `start` on as (slot, sample) pairs, assembled from the workers' plans."""
    batches = []
    for step in range(start, plans[0].steps):
        parts = [plan.batch(step, own) for plan, own in zip(plans, ranges, strict=True)]
        batches.append([(int(slot), int(sample)) for part in parts for slot, sample in zip(*part, strict=True)])
    return batches


@pytest.mark.parametrize("case", list(CASES))
def test_batches_are_the_same_for_all_workers_and_starts(case: str) -> None:
    sizes, batch = CASES[case]
    samples = samples_of(sizes)
    for epoch in EPOCHS:
        alone = batches_of([plan_of(samples, batch, epoch)], [(0, batch)], 0)
        assert sorted(sample for one in alone for _, sample in one) == list(range(len(samples)))
        assert all([slot for slot, _ in one] == list(range(len(one))) for one in alone)
        assert [len(one) for one in alone[:-1]] == [batch] * (len(alone) - 1)
        for workers in WORKERS:
            ranges = [worker_slots(batch, rank, workers) for rank in range(workers)]
            plans = [plan_of(samples, batch, epoch, slots=own) for own in ranges]
            assert len({plan.steps for plan in plans}) == 1  # all workers make the same steps
            for start in range(len(alone) + 1):
                assert batches_of(plans, ranges, start) == alone[start:]


def test_epochs_have_the_same_samples_in_another_order() -> None:
    samples = samples_of([1, 40, 7, 3, 90, 2, 55, 13])
    orders = [plan_of(samples, 16, epoch).order.tolist() for epoch in EPOCHS]
    assert len({tuple(order) for order in orders}) == len(EPOCHS)
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("batch", [1000, 1024, 2500], ids=["fewer slots than workers", "one slot per worker", "uneven"])
def test_batches_are_the_same_for_up_to_1024_workers(batch: int) -> None:
    rng = np.random.default_rng(3)
    samples = samples_of(rng.integers(1, 500, 60).tolist())
    whole = plan_of(samples, batch, 2)
    expected = np.concatenate([whole.batch(step, (0, batch))[1] for step in range(whole.steps)])
    assert (np.sort(expected) == np.arange(len(samples))).all()
    for workers in MANY:
        ranges = [worker_slots(batch, rank, workers) for rank in range(workers)]
        assert (ranges[0][0], ranges[-1][1]) == (0, batch)
        steps = range(whole.steps)
        shares = [np.concatenate([whole.batch(step, own)[1] for own in ranges]) for step in steps]
        np.testing.assert_array_equal(np.concatenate(shares), expected)
        for rank in {0, workers // 3, workers - 1}:
            own = ranges[rank]
            part = plan_of(samples, batch, 2, slots=own)
            for step in steps:
                np.testing.assert_array_equal(part.batch(step, own)[1], whole.batch(step, own)[1])
