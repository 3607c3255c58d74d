"""The random-fraction regime: what it observes, how much, and what the sample depends on."""

from pathlib import Path

import numpy as np
import pytest

from paml.labels import (
    LabelError,
    LabelTable,
    observe_random_fraction,
    table_from_triples,
)
from tests.labels.test_table import pairs_of

NUM_IMAGES, NUM_CLASSES = 3000, 8
CLASSES = [f"/m/{number}" for number in range(NUM_CLASSES)]


def full_table(path: Path, order: np.ndarray | None = None, classes: list[str] = CLASSES) -> LabelTable:
    """All pairs; class c is positive in about 2^-c of the images. `order`: the order of the images."""
    rng = np.random.default_rng(7)
    positive = rng.random((NUM_IMAGES, NUM_CLASSES)) < 0.5 ** np.arange(NUM_CLASSES)
    keys = [f"{value:016x}" for value in rng.integers(0, 2**63, NUM_IMAGES)]
    order = np.arange(NUM_IMAGES) if order is None else order
    columns = np.array([CLASSES.index(mid) for mid in classes])
    image, cls = (axis.reshape(-1) for axis in np.indices((NUM_IMAGES, len(classes))))
    state = positive[order][:, columns].reshape(-1)
    return table_from_triples([keys[n] for n in order], classes, None, image, cls, state, str(path))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> LabelTable:
    return full_table(tmp_path_factory.mktemp("partial") / "full.arrow")


def test_observed_labels_are_true_and_metadata_names_the_regime(full: LabelTable, tmp_path: Path) -> None:
    seen = observe_random_fraction(full, str(tmp_path / "seen"), 0.3, 3)
    assert 0 < seen.num_annotations < full.num_annotations
    assert pairs_of(seen).items() <= pairs_of(full).items()
    assert seen.keys() == full.keys()
    assert seen.classes == full.classes
    assert seen.metadata["full"] == full.digest
    assert seen.metadata["seed"] == 3
    assert observe_random_fraction(full, str(tmp_path / "again"), 0.3, 3).digest == seen.digest
    assert observe_random_fraction(full, str(tmp_path / "other"), 0.3, 4).digest != seen.digest


def test_order_of_images_and_classes_does_not_matter(full: LabelTable, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    other = full_table(tmp_path / "shuffled", order, CLASSES[::-1])
    assert pairs_of(observe_random_fraction(other, str(tmp_path / "a"), 0.3, 3)) == pairs_of(
        observe_random_fraction(full, str(tmp_path / "b"), 0.3, 3)
    )


def test_sample_does_not_depend_on_other_images(full: LabelTable, tmp_path: Path) -> None:
    seen = pairs_of(observe_random_fraction(full, str(tmp_path / "seen"), 0.3, 3))
    rows = np.arange(0, NUM_IMAGES, 300)
    keys = full.keys(rows)
    part = table_from_triples([*keys, "one more"], CLASSES, None, *full.lookup(rows), str(tmp_path / "part"))
    assert pairs_of(observe_random_fraction(part, str(tmp_path / "s"), 0.3, 3)) == {
        p: s for p, s in seen.items() if p[0] in keys
    }


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 1.0])
def test_random_fraction_by_state_class_and_image(fraction: float, full: LabelTable, tmp_path: Path) -> None:
    truth = full.lookup(np.arange(full.num_images))
    pairs = pairs_of(observe_random_fraction(full, str(tmp_path / "seen"), fraction, seed=1))
    keys = full.keys()
    seen = np.array([(keys[i], CLASSES[c]) in pairs for i, c in zip(truth.image, truth.cls, strict=True)])
    parts = [truth.state == 0, truth.state == 1, truth.cls == 0, truth.cls == 5, truth.image < 700]
    for chosen in parts:
        # A binomial count exceeds five standard deviations once in two million.
        assert abs(seen[chosen].mean() - fraction) <= 5 * np.sqrt(fraction * (1 - fraction) / chosen.sum())
    # Labels of one image are sampled independently: the number observed of eight is binomial.
    number = np.bincount(truth.image[seen], minlength=NUM_IMAGES)
    variance = NUM_CLASSES * fraction * (1 - fraction)
    assert abs(number.var() - variance) <= 5 * variance * np.sqrt(3 / NUM_IMAGES)


def test_more_labels_with_the_same_seed_are_a_superset(full: LabelTable, tmp_path: Path) -> None:
    less, more = (pairs_of(observe_random_fraction(full, str(tmp_path / "seen"), part, 5)) for part in (0.1, 0.4))
    assert less.items() < more.items()


def test_invalid_fraction(full: LabelTable, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"1\.1"):
        observe_random_fraction(full, str(tmp_path / "x"), 1.1, 0)
