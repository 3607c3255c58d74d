"""Average precision under image weights, and the bootstrap over images."""

import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from paml.compare.bootstrap import RankedPairs, bootstrap_map, interval
from paml.metrics import MetricSettings, Pairs, scores


def some_pairs(images: int, classes: int, seed: int = 0, steps: float = 4.0) -> Pairs:
    """About two thirds of all pairs, with many ties; class 0 has no positives, class 1 has only positives."""
    rng = np.random.default_rng(seed)
    image, cls = np.nonzero(rng.random((images, classes)) < 0.67)
    positive = rng.random(len(image)) < 0.3
    positive[cls == 0], positive[cls == 1] = False, True
    score = np.round((rng.standard_normal(len(image)) + positive) * steps) / steps
    columns = cls.astype(np.int32), score.astype(np.float32), positive, 7 * image + 3
    return Pairs(*(torch.from_numpy(values) for values in columns))


def test_weighted_ap_equals_sklearn():
    pairs = some_pairs(60, 7)
    images = np.unique(pairs.image.numpy())
    ranked, rng = RankedPairs(pairs, 8, images), np.random.default_rng(1)
    cls, score, positive, image = (values.numpy() for values in pairs)
    for _ in range(30):
        weights = rng.integers(0, 4, len(images))
        ap, positives, whole = ranked.average_precision(weights)
        for k in range(8):
            in_class = cls == k
            weight = weights[np.searchsorted(images, image[in_class])]
            assert whole[k] == weight.sum()
            assert positives[k] == weight[positive[in_class]].sum()
            if positives[k]:
                expected = average_precision_score(positive[in_class], score[in_class], sample_weight=weight)
                assert abs(ap[k] - expected) < 1e-12
            else:
                assert np.isnan(ap[k])


@pytest.mark.parametrize("convention", [{}, {"no_positives": "zero"}])
def test_weighted_mean_equals_repeated_images(convention: dict):
    """In every convention, a weight is the same as copies of an image."""
    pairs, settings = some_pairs(30, 6), MetricSettings(**convention)
    images = np.unique(pairs.image.numpy())
    weights = np.random.default_rng(3).integers(0, 3, len(images))
    counts = torch.from_numpy(weights[np.searchsorted(images, pairs.image.numpy())])
    cls, score, positive = (values.repeat_interleave(counts) for values in pairs[:3])
    assert RankedPairs(pairs, 6, images).mean(weights, settings) == pytest.approx(
        scores(cls, score, positive, 6, settings=settings).map, abs=1e-12
    )
    ones = np.ones(len(images), int)
    assert RankedPairs(pairs, 6, images).mean(ones, settings) == pytest.approx(
        scores(*pairs[:3], 6, settings=settings).map, abs=1e-12
    )


def test_replicates_are_paired_and_seeded():
    settings = {"replicates": 40, "settings": MetricSettings()}
    pairs = some_pairs(50, 5)
    images = np.unique(pairs.image.numpy())
    maps = bootstrap_map(pairs, 5, images, seed=1, **settings)
    assert np.array_equal(maps, bootstrap_map(pairs, 5, images, seed=1, **settings))
    assert not np.array_equal(maps, bootstrap_map(pairs, 5, images, seed=2, **settings))
    shifted = pairs._replace(score=pairs.score + 1)  # another model with the same ranking
    assert np.array_equal(maps, bootstrap_map(shifted, 5, images, seed=1, **settings))
    low, high = interval(maps, 0.95)
    assert low < maps.mean() < high
    with pytest.raises(ValueError, match="images"):
        bootstrap_map(pairs, 5, images[1:], seed=1, **settings)


def test_no_pairs_give_nan():
    empty = Pairs(*(values[:0] for values in some_pairs(5, 3)))
    maps = bootstrap_map(empty, 3, np.arange(4), replicates=3, seed=0, settings=MetricSettings())
    assert np.isnan(maps).all()
    assert np.isnan(interval(maps, 0.95)).all()


def test_replicates_are_fast():
    """100 replicates of 2,000 images and 18 classes take less than 2 s of processor time."""
    pairs = some_pairs(2000, 18, steps=1e4)
    start = time.process_time()
    bootstrap_map(pairs, 18, np.unique(pairs.image.numpy()), replicates=100, seed=0, settings=MetricSettings())
    assert time.process_time() - start < 2
