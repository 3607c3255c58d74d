"""Average precision against scikit-learn, class by class, on sparse pairs with ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from paml.metrics import average_precision_by_class


def by_scikit_learn(cls, score, positive, num_classes):
    ap = np.full(num_classes, np.nan)
    for k in range(num_classes):
        own = cls == k
        if positive[own].any():
            ap[k] = average_precision_score(positive[own], score[own])
    return ap


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 400),
    num_classes=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    kind=st.sampled_from(["normal", "rounded", "one value", "bf16", "signed zeros", "wide", "subnormal"]),
)
def test_equals_scikit_learn(seed, n, num_classes, share, kind):
    rng = np.random.default_rng(seed)
    cls = rng.integers(0, num_classes, n)
    score = rng.standard_normal(n).astype(np.float32)
    score = {
        "normal": score,
        "rounded": np.round(score),
        "one value": np.full(n, -2.5, np.float32),
        "bf16": torch.from_numpy(score).bfloat16().float().numpy(),
        "signed zeros": np.where(score > 0, np.float32(0), np.float32(-0.0)),
        "wide": (np.sign(score) * np.float32(10) ** np.clip(score * 12, -37, 37)).astype(np.float32),
        "subnormal": (score * np.float32(1e-40)).astype(np.float32),
    }[kind]
    positive = rng.random(n) < share
    ap = average_precision_by_class(cls, score, positive, num_classes)
    np.testing.assert_allclose(ap, by_scikit_learn(cls, score, positive, num_classes), rtol=0, atol=1e-12)
    micro = by_scikit_learn(np.zeros(n, int), score, positive, 1)[0]
    together = average_precision_by_class(np.zeros_like(cls), score, positive, 1)[0]
    assert together == pytest.approx(micro, abs=1e-12, nan_ok=True)


def test_at_the_size_of_open_images():
    rng = np.random.default_rng(0)
    n, num_classes = 100_000, 5000
    cls = np.sort(rng.zipf(1.3, n) % num_classes).astype(np.int32)
    score = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).bfloat16().float()
    positive = rng.random(n) < 0.6
    ap = average_precision_by_class(torch.from_numpy(cls), score, torch.from_numpy(positive), num_classes)
    for k in (0, 1, 2, 3, 17, 4999):
        own = cls == k
        expected = average_precision_score(positive[own], score.numpy()[own]) if positive[own].any() else np.nan
        assert ap[k] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_order_of_pairs_does_not_change_a_bit():
    """Workers may return the pairs in any order."""
    rng = np.random.default_rng(1)
    cls, score, positive = rng.integers(0, 9, 500), rng.integers(-3, 3, 500).astype(np.float32), rng.random(500) < 0.4
    order = rng.permutation(500)
    first = average_precision_by_class(cls, score, positive, 9)
    assert np.array_equal(average_precision_by_class(cls[order], score[order], positive[order], 9), first)


def test_infinite_scores_are_ranked():
    score = np.array([np.inf, -np.inf, 0.0], np.float32)
    ap = average_precision_by_class(np.zeros(3, int), score, np.array([False, True, False]), 1)
    assert ap[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": np.zeros(3)}, TypeError, "float64.*float32"),
        ({"positive": np.zeros(3, np.int8)}, TypeError, "int8.*bool"),
        ({"cls": np.array([0, 1, 2])}, ValueError, "classes 0 to 2"),
        ({"cls": np.array([0, -1, 1])}, ValueError, "classes -1 to 1"),
        ({"cls": np.array([0, 1])}, ValueError, "pairs do not fit"),
        ({"score": np.array([0, np.nan, 1], np.float32)}, ValueError, "1 of 3 scores"),
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
    ],
)
def test_invalid_input_is_refused(changes, error, message):
    pairs = {
        "cls": np.array([0, 1, 1]),
        "score": np.zeros(3, np.float32),
        "positive": np.zeros(3, bool),
        "num_classes": 2,
    }
    with pytest.raises(error, match=message):
        average_precision_by_class(**(pairs | changes))
