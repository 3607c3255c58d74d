"""Average precision under image weights, and the bootstrap over images."""

import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from paml.compare.bootstrap import Ranked, bootstrap_map, interval
from paml.metrics import MetricSettings, Pairs, scores


def some_pairs(images: int, classes: int, seed: int = 0, steps: float = 4.0) -> Pairs:
    """About two thirds of all pairs, with many equal scores; class 0 has no positives, class 1 none but positives."""
    rng = np.random.default_rng(seed)
    image, cls = np.nonzero(rng.random((images, classes)) < 0.67)
    positive = rng.random(len(image)) < 0.3
    positive[cls == 0], positive[cls == 1] = False, True
    score = np.round((rng.standard_normal(len(image)) + positive) * steps) / steps
    columns = cls.astype(np.int32), score.astype(np.float32), positive, 7 * image + 3
    return Pairs(*(torch.from_numpy(values) for values in columns))


def test_weighted_ap_is_sklearns():
    pairs = some_pairs(60, 7)
    images = np.unique(pairs.image.numpy())
    ranked, rng = Ranked(pairs, 8, images), np.random.default_rng(1)
    cls, score, positive, image = (values.numpy() for values in pairs)
    for _ in range(30):
        weights = rng.integers(0, 4, len(images))
        ap, positives, whole = ranked.average_precision(weights)
        for k in range(8):
            own = cls == k
            weight = weights[np.searchsorted(images, image[own])]
            assert whole[k] == weight.sum()
            assert positives[k] == weight[positive[own]].sum()
            if positives[k]:
                wanted = average_precision_score(positive[own], score[own], sample_weight=weight)
                assert abs(ap[k] - wanted) < 1e-12
            else:
                assert np.isnan(ap[k])


@pytest.mark.parametrize("convention", [{}, {"no_positives": "zero"}, {"no_negatives": "skip"}])
def test_mean_is_that_of_the_images_repeated(convention: dict):
    """Under every convention, as if each image stood in the split as often as it was drawn."""
    pairs, settings = some_pairs(30, 6), MetricSettings(**convention)
    images = np.unique(pairs.image.numpy())
    weights = np.random.default_rng(3).integers(0, 3, len(images))
    often = torch.from_numpy(weights[np.searchsorted(images, pairs.image.numpy())])
    repeated = [values.repeat_interleave(often) for values in pairs[:3]]
    assert Ranked(pairs, 6, images).mean(weights, settings) == pytest.approx(
        scores(*repeated, 6, settings=settings).map, abs=1e-12
    )
    ones = np.ones(len(images), int)
    assert Ranked(pairs, 6, images).mean(ones, settings) == pytest.approx(
        scores(*pairs[:3], 6, settings=settings).map, abs=1e-12
    )


def test_replicates_are_paired_and_seeded():
    settings = {"replicates": 40, "settings": MetricSettings()}
    pairs = some_pairs(50, 5)
    images = np.unique(pairs.image.numpy())
    one = bootstrap_map(pairs, 5, images, seed=1, **settings)
    assert np.array_equal(one, bootstrap_map(pairs, 5, images, seed=1, **settings))
    assert not np.array_equal(one, bootstrap_map(pairs, 5, images, seed=2, **settings))
    shifted = pairs._replace(score=pairs.score + 1)  # another model of the same ranks: no difference in any replicate
    assert np.array_equal(one, bootstrap_map(shifted, 5, images, seed=1, **settings))
    low, high = interval(one, 0.95)
    assert low < one.mean() < high
    with pytest.raises(ValueError, match="not among those"):
        bootstrap_map(pairs, 5, images[1:], seed=1, **settings)


def test_no_pairs_give_no_figure():
    nothing = Pairs(*(values[:0] for values in some_pairs(5, 3)))
    found = bootstrap_map(nothing, 3, np.arange(4), replicates=3, seed=0, settings=MetricSettings())
    assert np.isnan(found).all()
    assert np.isnan(interval(found, 0.95)).all()


def test_it_is_quick():
    """1,000 replicates of 2,000 images by 18 classes are to take a few seconds: a tenth of them, on a busy machine."""
    pairs = some_pairs(2000, 18, steps=1e4)
    begun = time.monotonic()
    bootstrap_map(pairs, 18, np.unique(pairs.image.numpy()), replicates=100, seed=0, settings=MetricSettings())
    assert time.monotonic() - begun < 2
