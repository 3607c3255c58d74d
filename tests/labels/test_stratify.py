"""Stratified splits: exact sizes, and each class's positives and negatives in every part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import LabelError, LabelTable
from paml.labels.stratify import stratified_split

FRACTIONS = st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.0, 0.4], [0.25] * 4, [1.0], [1 / 3] * 3])


def long_tailed(num_images: int, num_classes: int, labels_per_image: int, seed: int) -> LabelTable:
    """The class of rank r is labeled in proportion to 1 / r; a third of the labels are positive."""
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, num_classes + 1)
    cls = random.choice(num_classes, (num_images, labels_per_image), p=frequency / frequency.sum())
    pairs = np.unique(np.arange(num_images)[:, None] * num_classes + cls)
    keys = [f"photo {number}" for number in range(num_images)]
    return LabelTable.from_arrays(
        [keys[image] for image in pairs // num_classes],
        pairs % num_classes,
        random.random(len(pairs)) < 1 / 3,
        classes=[f"class {number}" for number in range(num_classes)],
        images=keys,
    )


def counts_of(table: LabelTable, parts: np.ndarray, num_parts: int) -> np.ndarray:
    """int64[2K, P]: the labels of each class and state in each part."""
    labels = table.lookup(np.arange(table.num_images))
    counts = np.zeros((2 * table.num_classes, num_parts), np.int64)
    np.add.at(counts, (2 * labels.cls + labels.state, parts[labels.image]), 1)
    return counts


@st.composite
def tables(draw: st.DrawFn) -> LabelTable:
    """Up to 30 images and 4 classes; some images have no label."""
    num_images, num_classes = draw(st.integers(0, 30)), draw(st.integers(1, 4))
    states = draw(st.lists(st.sampled_from([-1, -1, 0, 1]), min_size=120, max_size=120))
    dense = np.array(states).reshape(30, 4)[:num_images, :num_classes]
    image, cls = np.nonzero(dense >= 0)
    keys = [f"k{number}" for number in range(num_images)]
    classes = [f"c{number}" for number in range(num_classes)]
    return LabelTable.from_arrays([keys[row] for row in image], cls, dense[image, cls], classes=classes, images=keys)


@given(tables(), FRACTIONS, st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_every_image_has_one_part_and_sizes_match(table: LabelTable, fractions: list[float], seed: int) -> None:
    parts = stratified_split(table, fractions, seed)
    assert parts.shape == (table.num_images,)
    sizes = np.bincount(parts, minlength=len(fractions))
    assert len(sizes) == len(fractions)
    expected = table.num_images * np.array(fractions)
    used = np.array(fractions) > 0
    assert not sizes[~used].any()
    if (expected[used] >= 1).all():
        assert (np.abs(sizes - expected) < 1 + 1e-9).all()
    else:
        assert (sizes[used] >= 1).all() or table.num_images < used.sum()
    assert (stratified_split(table, fractions, seed) == parts).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5], [0.6, 0.2, 0.2]]))
@settings(max_examples=15, deadline=None)
def test_labels_are_divided_like_images(seed: int, fractions: list[float]) -> None:
    table = long_tailed(1000, 40, 4, seed)
    counts = counts_of(table, stratified_split(table, fractions, seed), len(fractions))
    total = counts.sum(1, keepdims=True)
    difference = np.abs(counts - total * fractions).max(1)
    frequent = (total * min(fractions) >= 3).ravel()
    assert difference[frequent].mean() < 2
    assert difference[frequent].max() < 6
    assert (counts[total.ravel() >= len(fractions)] > 0).all()


def test_a_random_split_is_worse() -> None:
    fractions = [0.8, 0.1, 0.1]
    table = long_tailed(2000, 100, 4, seed=0)
    stratified = counts_of(table, stratified_split(table, fractions, 0), 3)
    chance = counts_of(table, np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [1600, 200, 200])), 3)
    total = stratified.sum(1, keepdims=True)
    frequent = total.ravel() >= 30
    errors = [np.abs(counts - total * fractions)[frequent].mean() for counts in (stratified, chance)]
    assert errors[0] < errors[1] / 3
    divisible = np.flatnonzero(total >= 3)
    assert (stratified[divisible] > 0).all()
    assert (chance[divisible] == 0).any()


def test_rare_classes_do_not_take_a_part_from_frequent_ones() -> None:
    rare = [f"rare {number}" for number in range(100) for _ in range(3)]
    of_image = [*rare, *["frequent"] * 200]  # one label each; a tenth is too small for all rare classes
    table = LabelTable.from_arrays([f"{number:04}" for number in range(500)], of_image, [1] * 500)
    counts = counts_of(table, stratified_split(table, [0.8, 0.1, 0.1], 0), 3)[1::2]
    covered = np.all(counts > 0, axis=1)
    assert covered[table.classes.index("frequent")]
    assert np.abs(counts[table.classes.index("frequent")] - [160, 20, 20]).max() < 15
    assert covered.sum() >= 20  # by their fractions alone, none


def test_result_depends_on_content_and_seed_only() -> None:
    table = long_tailed(300, 20, 3, seed=1)
    labels = table.lookup(np.arange(table.num_images))
    keys, shuffled = table.keys(), np.random.default_rng(2).permutation(len(labels.cls))
    again = LabelTable.from_arrays(
        [keys[image] for image in labels.image[shuffled]],
        labels.cls[shuffled],
        labels.state[shuffled],
        classes=table.classes,
        images=keys[::-1],
    )
    parts = stratified_split(table, [0.5, 0.5], 3)
    assert (stratified_split(again, [0.5, 0.5], 3) == parts).all()
    assert 0.3 < (stratified_split(table, [0.5, 0.5], 4) == parts).mean() < 0.7


@pytest.mark.parametrize("fractions", [[], [0.5], [0.5, 0.6], [1.5, -0.5], [float("nan"), 0.5]])
def test_fractions_are_checked(fractions: list[float]) -> None:
    with pytest.raises(LabelError, match="fractions are"):
        stratified_split(long_tailed(10, 2, 1, seed=0), fractions, 0)
