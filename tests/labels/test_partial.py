"""Partial regimes: what each may show, in what share, and on what it depends."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paml.labels import (
    LabelError,
    LabelTable,
    observe_class_wise,
    observe_positives,
    observe_random_share,
    table_from_triples,
)
from tests.labels.test_table import pairs_of

NUM_IMAGES, NUM_CLASSES = 3000, 8
CLASSES = [f"/m/{number}" for number in range(NUM_CLASSES)]
Regime = Callable[[LabelTable, str, int], LabelTable]
REGIMES: dict[str, Regime] = {
    "random share": lambda full, out, seed: observe_random_share(full, out, 0.3, seed),
    "class-wise share": lambda full, out, seed: observe_class_wise(full, out, seed, share=0.3),
    "class-wise count": lambda full, out, seed: observe_class_wise(full, out, seed, count=50),
    "positives": lambda full, out, seed: observe_positives(full, out, share=0.3, seed=seed),
}


def full_table(path: Path, order: np.ndarray | None = None, classes: list[str] = CLASSES) -> LabelTable:
    """All pairs; class c is positive in about a share 2^-c of the images. `order`: of the images as they are given."""
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


@pytest.fixture(params=list(REGIMES))
def regime(request: pytest.FixtureRequest) -> Regime:
    return REGIMES[request.param]


def test_nothing_but_the_truth_is_seen_and_the_table_says_how(full: LabelTable, regime: Regime, tmp_path: Path) -> None:
    seen = regime(full, str(tmp_path / "seen"), 3)
    assert 0 < seen.num_annotations < full.num_annotations
    assert pairs_of(seen).items() <= pairs_of(full).items()
    assert seen.keys() == full.keys()
    assert seen.classes == full.classes
    assert seen.metadata["full"] == full.digest
    assert seen.metadata["seed"] == 3
    assert regime(full, str(tmp_path / "again"), 3).digest == seen.digest
    assert regime(full, str(tmp_path / "other"), 4).digest != seen.digest


def test_neither_the_order_of_images_nor_of_classes_matters(full: LabelTable, regime: Regime, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    other = full_table(tmp_path / "shuffled", order, CLASSES[::-1])
    assert pairs_of(regime(other, str(tmp_path / "a"), 3)) == pairs_of(regime(full, str(tmp_path / "b"), 3))


@pytest.mark.parametrize("name", ["random share", "positives"])
def test_a_label_is_drawn_without_regard_to_other_images(name: str, full: LabelTable, tmp_path: Path) -> None:
    seen = pairs_of(REGIMES[name](full, str(tmp_path / "seen"), 3))
    rows = np.arange(0, NUM_IMAGES, 300)
    keys = full.keys(rows)
    part = table_from_triples([*keys, "one more"], CLASSES, None, *full.lookup(rows), str(tmp_path / "part"))
    assert pairs_of(REGIMES[name](part, str(tmp_path / "s"), 3)) == {p: s for p, s in seen.items() if p[0] in keys}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_random_share_is_met_by_state_class_and_image(share: float, full: LabelTable, tmp_path: Path) -> None:
    truth = full.lookup(np.arange(full.num_images))
    pairs = pairs_of(observe_random_share(full, str(tmp_path / "seen"), share, seed=1))
    keys = full.keys()
    seen = np.array([(keys[i], CLASSES[c]) in pairs for i, c in zip(truth.image, truth.cls, strict=True)])
    parts = [truth.state == 0, truth.state == 1, truth.cls == 0, truth.cls == 5, truth.image < 700]
    for chosen in parts:
        # A binomial count leaves five standard deviations once in two million.
        assert abs(seen[chosen].mean() - share) <= 5 * np.sqrt(share * (1 - share) / chosen.sum())
    # Labels of one image are drawn apart: the number seen of an image's eight is binomial, with this variance.
    number = np.bincount(truth.image[seen], minlength=NUM_IMAGES)
    variance = NUM_CLASSES * share * (1 - share)
    assert abs(number.var() - variance) <= 5 * variance * np.sqrt(3 / NUM_IMAGES)


@pytest.mark.parametrize("options", [{"count": 40}, {"count": 0}, {"share": 0.1}, {"share": 1.0}])
def test_each_class_gets_its_number_of_each_state(options: dict, full: LabelTable, tmp_path: Path) -> None:
    seen = observe_class_wise(full, str(tmp_path / "seen"), 2, **options)
    for before, after in zip(full.class_counts(), seen.class_counts(), strict=True):
        if "count" in options:
            assert after.tolist() == [min(options["count"], n) for n in before.tolist()]
        else:
            assert after.tolist() == [round(options["share"] * n) for n in before.tolist()]


def test_each_label_of_a_class_is_as_likely(full: LabelTable, tmp_path: Path) -> None:
    """Over 200 seeds the images of class 3's positives are drawn evenly: chi-square, 5 standard deviations."""
    drawn: Counter[str] = Counter()
    for seed in range(200):
        seen = observe_class_wise(full, str(tmp_path / "seen"), seed, count=20)
        labels = seen.lookup(np.arange(seen.num_images))
        drawn.update(labels.image[(labels.cls == 3) & (labels.state == 1)].tolist())
    labels = full.lookup(np.arange(full.num_images))
    candidates = labels.image[(labels.cls == 3) & (labels.state == 1)]
    counts = np.array([drawn[row] for row in candidates.tolist()])
    assert counts.sum() == 200 * 20
    expected = 200 * 20 / len(candidates)
    chi_square = ((counts - expected) ** 2 / (expected * (1 - 20 / len(candidates)))).sum()
    assert abs(chi_square - len(candidates)) < 5 * np.sqrt(2 * len(candidates))


def test_more_of_one_seed_shows_all_that_less_does(full: LabelTable, tmp_path: Path) -> None:
    out = str(tmp_path / "seen")
    for less, more in [
        (lambda: observe_random_share(full, out, 0.1, 5), lambda: observe_random_share(full, out, 0.4, 5)),
        (lambda: observe_class_wise(full, out, 5, count=5), lambda: observe_class_wise(full, out, 5, share=0.3)),
        (lambda: observe_positives(full, out, share=0.2, seed=5), lambda: observe_positives(full, out, seed=5)),
    ]:
        assert pairs_of(less()).items() < pairs_of(more()).items()


def test_positives_alone(full: LabelTable, tmp_path: Path) -> None:
    truth = {pair: state for pair, state in pairs_of(full).items() if state == 1}
    assert pairs_of(observe_positives(full, str(tmp_path / "all"))) == truth
    some = pairs_of(observe_positives(full, str(tmp_path / "some"), share=0.25, seed=9))
    assert some.items() < truth.items()
    assert abs(len(some) / len(truth) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(truth))


def test_regimes_of_one_seed_do_not_draw_alike(full: LabelTable, tmp_path: Path) -> None:
    share = {pair for pair, state in pairs_of(observe_random_share(full, str(tmp_path / "a"), 0.5, 1)).items() if state}
    positive = set(pairs_of(observe_positives(full, str(tmp_path / "b"), share=0.5, seed=1)))
    truth = sum(pairs_of(full).values())
    assert abs(len(share & positive) / truth - 0.25) < 5 * np.sqrt(0.25 * 0.75 / truth)


def test_wrong_shares_are_refused(full: LabelTable, tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    for change, message in [
        (lambda: observe_random_share(full, out, 1.1, 0), "the share of labels is 1.1, allowed is 0 to 1"),
        (lambda: observe_positives(full, out, share=-0.1), "the share of labels is -0.1"),
        (lambda: observe_class_wise(full, out, 0), "count is None and share is None: give one of the two"),
        (lambda: observe_class_wise(full, out, 0, count=1, share=0.5), "count is 1 and share is 0.5"),
        (lambda: observe_class_wise(full, out, 0, count=-1), "count is -1, allowed is 0 or more"),
    ]:  # fmt: skip
        with pytest.raises(LabelError, match=message):
            change()
