"""Invariant 3: the plan of an epoch and each worker's part of it; random flips and crops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.data.augment import Augmentation
from paml.data.plan import EpochPlan, Samples, join, plan_epoch, shard_uses, worker_slots
from paml.errors import SettingsError
from paml.labels import LabelTable
from paml.shards import Manifest
from tests.helpers.prepared import key_of, write_states


def samples_of(count: int, shards: int) -> Samples:
    index = np.arange(count) * 3 + 1
    return Samples(index=index, row=np.arange(count), shard=(np.arange(count) * shards // count).astype(np.int32))


def plan_of(count: int = 100, batch: int = 8, epoch: int = 1, seed: int = 0, window: int = 32, shards: int = 5):
    return plan_epoch(samples_of(count, shards), batch_size=batch, epoch=epoch, seed=seed, window=window)


sizes = {
    "count": st.integers(1, 300),
    "batch": st.integers(1, 40),
    "epoch": st.integers(0, 1000),
    "seed": st.integers(0, 2**63),
    "window": st.integers(1, 400),
    "shards": st.integers(1, 9),
}


@given(**sizes)
@settings(max_examples=60, deadline=None)
def test_every_sample_occurs_exactly_once_per_epoch(**drawn: int) -> None:
    plan = plan_of(**drawn)
    seen = np.concatenate([plan.batch(step, (0, drawn["batch"]))[1] for step in range(plan.steps)])
    assert sorted(seen) == list(range(drawn["count"]))


@given(workers=st.integers(1, 8), **sizes)
@settings(max_examples=60, deadline=None)
def test_global_batches_are_the_same_for_every_number_of_workers(workers: int, **drawn: int) -> None:
    plan, batch = plan_of(**drawn), drawn["batch"]
    ranges = [worker_slots(batch, rank, workers) for rank in range(workers)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == batch
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    shares = [hi - lo for lo, hi in ranges]
    assert max(shares) - min(shares) <= 1
    for step in range(plan.steps):
        whole = plan.batch(step, (0, batch))
        parts = [plan.batch(step, own) for own in ranges]
        for column in range(2):
            np.testing.assert_array_equal(np.concatenate([part[column] for part in parts]), whole[column])
        assert len(whole[0]) == (batch if step < drawn["count"] // batch else drawn["count"] % batch)
        np.testing.assert_array_equal(whole[0], np.arange(len(whole[0])))


@given(**sizes)
@settings(max_examples=40, deadline=None)
def test_order_is_a_pure_function_of_its_arguments(**drawn: int) -> None:
    first = plan_of(**drawn).order
    np.testing.assert_array_equal(first, plan_of(**drawn).order)


@given(**sizes, workers=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_plan_of_some_slots_equals_that_part_of_the_whole_plan(workers: int, **drawn: int) -> None:
    samples, batch = samples_of(drawn["count"], drawn["shards"]), drawn["batch"]
    given_ = {name: drawn[name] for name in ("epoch", "seed", "window")}
    whole = plan_epoch(samples, batch_size=batch, **given_)
    for rank in range(workers):
        own = worker_slots(batch, rank, workers)
        part = plan_epoch(samples, batch_size=batch, **given_, slots=own)
        assert part.steps == whole.steps
        for step in range(whole.steps):
            for one, other in zip(part.batch(step, own), whole.batch(step, own), strict=True):
                np.testing.assert_array_equal(one, other)


@given(window=st.integers(1, 60), seed=st.integers(0, 2**32), epoch=st.integers(0, 50), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_streams_are_cut_from_whole_shards_and_shuffled_in_windows(
    window: int, seed: int, epoch: int, batch: int
) -> None:
    samples = samples_of(120, 6)
    drawn = {"batch_size": batch, "epoch": epoch, "seed": seed}
    order = plan_epoch(samples, **drawn, window=window).order
    before = plan_epoch(samples, **drawn, window=1).order
    # before the windows are shuffled, each shard is consecutive
    assert (samples.shard[before[::20]] == samples.shard[before].reshape(6, 20).T).all()
    moved = np.argsort(before)[order]
    bounds = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(120), batch))])
    for start, end in itertools.pairwise(bounds.tolist()):
        assert sorted(moved[start:end]) == list(range(start, end))  # no sample leaves its stream
        assert (np.abs(moved[start:end] - np.arange(start, end)) < window).all()
        blocks = [stop for stop in range(start, end + 1) if sorted(moved[start:stop]) == list(range(start, stop))]
        assert (np.diff(blocks) <= window).all()  # or its window


def test_order_within_a_shard_changes_each_epoch() -> None:
    """With one shard and as many streams as samples, the batch is the order."""
    orders = np.array([plan_of(60, 60, epoch, window=1, shards=1).order for epoch in range(400)])
    # the mean over 400 epochs is that of a uniform distribution
    assert abs(orders.mean(axis=0) - 29.5).max() < 5 * np.sqrt((60**2 - 1) / 12 / 400)
    assert len({tuple(order) for order in orders.tolist()}) == 400


def test_order_differs_between_epochs_and_seeds_and_is_the_manifest_order_without_shuffle() -> None:
    orders = [plan_of(epoch=epoch, seed=seed).order for epoch, seed in [(1, 0), (2, 0), (1, 1)]]
    for other in orders[1:]:
        assert (orders[0] != other).mean() > 0.8
    plain = plan_epoch(samples_of(50, 3), batch_size=8, epoch=4, seed=9, window=16, shuffle=False)
    np.testing.assert_array_equal(plain.order, np.arange(50))


@given(workers=st.integers(1, 12), **sizes)
@settings(max_examples=60, deadline=None)
def test_workers_read_disjoint_parts_of_the_shards(workers: int, **drawn: int) -> None:
    """For any window, all workers together read each shard once, plus at most one more per border."""
    samples, plan, batch = samples_of(drawn["count"], drawn["shards"]), plan_of(**drawn), drawn["batch"]
    own = [worker_slots(batch, rank, workers) for rank in range(workers)]
    read = [shard_uses(samples, plan, slots)[0] for slots in own]
    assert sum(len(shards) for shards in read) <= len(np.unique(samples.shard)) + workers - 1
    for slots, shards in zip(own, read, strict=True):
        mine = np.concatenate([plan.batch(step, slots)[1] for step in range(plan.steps)])
        assert set(shards) == set(samples.shard[mine])


@given(**sizes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_shard_uses_match_the_batches(data: st.DataObject, **drawn: int) -> None:
    samples, plan, batch = samples_of(drawn["count"], drawn["shards"]), plan_of(**drawn), drawn["batch"]
    lo = data.draw(st.integers(0, batch))
    hi = data.draw(st.integers(lo, batch))
    steps: dict[int, list[int]] = {}
    for step in range(plan.steps):
        for sample in plan.batch(step, (lo, hi))[1]:
            steps.setdefault(int(samples.shard[sample]), []).append(step)
    shard, first, last = shard_uses(samples, plan, (lo, hi))
    assert {int(s): (int(f), int(t)) for s, f, t in zip(shard, first, last, strict=True)} == {
        s: (min(used), max(used)) for s, used in steps.items()
    }
    assert (np.diff(first) >= 0).all()


def test_small_window_uses_few_shards_at_a_time() -> None:
    samples = samples_of(40_000, 400)  # 100 per shard, 5,000 per stream
    for window, limit in ((100, 3), (500, 7)):
        plan = plan_epoch(samples, batch_size=8, epoch=1, seed=0, window=window)
        _, first, last = shard_uses(samples, plan, (0, 8))
        in_use = max(((first <= step) & (last >= step)).sum() for step in range(plan.steps))
        assert in_use <= 8 * limit


def test_windows_of_streams_end_at_different_steps() -> None:
    samples = samples_of(64_000, 6400)
    plan = plan_epoch(samples, batch_size=64, epoch=1, seed=0, window=200)
    _, first, _ = shard_uses(samples, plan, (0, 64))
    starts = np.bincount(first[first > 0], minlength=plan.steps)
    assert starts.max() < 10 * starts.mean()


def test_plan_never_changes() -> None:
    """A checkpoint must resume with the same batches in a later version."""
    assert plan_of(24, 3, window=5, shards=3).order.tolist() == [
        *(14, 15, 10, 9, 12, 8, 11, 13),
        *(16, 18, 19, 23, 21, 20, 17, 22),
        *(4, 6, 2, 3, 5, 0, 1, 7),
    ]
    assert np.flatnonzero(Augmentation(seed=0, epoch=1, flip_prob=0.5).flips(np.arange(16))).tolist() == [
        2,
        8,
        9,
        11,
        12,
        15,
    ]


@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5, 1.0])
def test_flip_frequency_matches_the_probability(prob: float) -> None:
    flips = Augmentation(seed=3, epoch=5, flip_prob=prob).flips(np.arange(20_000))
    assert abs(flips.mean() - prob) < 4 * np.sqrt(prob * (1 - prob) / 20_000) + 1e-9


def test_flips_depend_only_on_seed_epoch_and_sample() -> None:
    items = np.arange(1000)
    flips = Augmentation(seed=3, epoch=5, flip_prob=0.5).flips(items)
    some = np.random.default_rng(0).permutation(items)[:100]
    np.testing.assert_array_equal(Augmentation(seed=3, epoch=5, flip_prob=0.5).flips(some), flips[some])
    for other in (
        Augmentation(seed=4, epoch=5, flip_prob=0.5).flips(items),
        Augmentation(seed=3, epoch=6, flip_prob=0.5).flips(items),
    ):
        assert 0.4 < (other != flips).mean() < 0.6


def crops_of(seed: int, epoch: int, index: np.ndarray, min_area: float) -> np.ndarray:
    crops = Augmentation(seed=seed, epoch=epoch, min_crop_area=min_area).crops(index)
    assert crops is not None
    return crops


def test_crops_never_change_and_depend_only_on_seed_epoch_and_sample() -> None:
    items = np.arange(1000)
    crops = crops_of(3, 5, items, 0.25)
    some = np.random.default_rng(0).permutation(items)[:100]
    np.testing.assert_array_equal(crops_of(3, 5, some, 0.25), crops[some])
    for other in (crops_of(4, 5, items, 0.25), crops_of(3, 6, items, 0.25)):
        assert (other != crops).any(axis=1).all()
    first = [[0.08577254, 0.09444598, 0.97514463, 0.78523011], [0.09123597, 0.0, 0.98378206, 1.0]]
    np.testing.assert_allclose(crops[:2], first, rtol=0, atol=1e-8)


@pytest.mark.parametrize("min_area", [0.05, 0.5, 0.8])
def test_crop_areas_are_uniform_and_aspect_ratios_log_uniform(min_area: float) -> None:
    left, top, right, bottom = crops_of(3, 5, np.arange(20_000), min_area).T
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 1
    width, height = right - left, bottom - top
    whole = (width < 1) & (height < 1)  # no side was cut to the image's
    assert (width * height)[whole].min() >= min_area * (1 - 1e-9)
    assert (np.abs(np.log(width / height))[whole] <= np.log(4 / 3) + 1e-9).all()
    assert abs(np.log(width / height).mean()) < 0.01
    small = width * height < 0.75  # no side of these was cut
    assert small.mean() == pytest.approx(max(0.0, 0.75 - min_area) / (1 - min_area), abs=0.015)
    for start, length in ((left, width), (top, height)):
        free = length < 1
        quantiles = np.quantile(start[free] / (1 - length[free]), [0.1, 0.5, 0.9])
        assert quantiles == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


@pytest.mark.parametrize("images", ["observed", "positive", "all"])
def test_join_selects_images(images: str, prepared, tmp_path) -> None:
    manifest = Manifest.open(prepared / "shards" / "train")
    keys = [key_of("train", number) for number in range(20)] + ["f" * 16]
    seen = np.zeros((21, 12), dtype=bool)
    truth = np.zeros((21, 12), dtype=bool)
    seen[:15, 0] = True  # five images have no label
    truth[:8, 0] = True
    write_states(tmp_path / "labels.arrow", keys, truth, seen)
    table = LabelTable.open(tmp_path / "labels.arrow")
    samples = join(manifest, table, images)  # type: ignore[arg-type]
    wanted = {"observed": set(keys[:15]), "positive": set(keys[:8]), "all": set(manifest.keys().to_pylist())}[images]
    assert {manifest.key(int(index)) for index in samples.index} == wanted
    assert samples.missing == 1
    assert samples.unlabeled == 46 - len(wanted)
    for index, row, shard in zip(samples.index, samples.row, samples.shard, strict=True):
        key = manifest.key(int(index))
        assert (table.keys([int(row)]) == [key]) if row >= 0 else (key not in keys)
        assert shard == manifest.shard[index]


def test_table_of_other_images_is_an_error(prepared, tmp_path) -> None:
    write_states(tmp_path / "other.arrow", ["a" * 16], np.ones((1, 12), bool), np.ones((1, 12), bool))
    manifest = Manifest.open(prepared / "shards" / "train")
    with pytest.raises(SettingsError, match=r"none of the 46 images"):
        join(manifest, LabelTable.open(tmp_path / "other.arrow"))


def test_batch_size_zero_is_an_error() -> None:
    with pytest.raises(SettingsError, match="batch_size is 0"):
        plan_of(batch=0)


def test_window_zero_is_an_error() -> None:
    with pytest.raises(SettingsError, match="window is 0"):
        plan_of(window=0)


def test_steps_include_a_short_last_batch() -> None:
    assert [EpochPlan(np.arange(count), 8).steps for count in (1, 8, 9, 16)] == [1, 1, 2, 2]
