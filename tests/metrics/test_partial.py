"""PartialAveragePrecision against scikit-learn, over batches and over workers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.metrics import PartialAveragePrecision, average_precision
from tests.helpers.ranks import run_on_ranks

N, K = 60, 7


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and states: class 3 has no positives, class 4 none observed."""
    rng = np.random.default_rng(0)
    scores = rng.integers(-5, 5, (N, K)).astype(np.float32)
    states = rng.choice(np.array([POSITIVE, NEGATIVE, UNOBSERVED], np.int8), (N, K))
    states[states[:, 3] == POSITIVE, 3] = NEGATIVE
    states[:, 4] = UNOBSERVED
    return scores, states


def by_scikit_learn(scores: np.ndarray, states: np.ndarray) -> np.ndarray:
    ap = np.full(K, np.nan)
    for k in range(K):
        observed = states[:, k] != UNOBSERVED
        if (states[observed, k] == POSITIVE).any():
            ap[k] = average_precision_score(states[observed, k] == POSITIVE, scores[observed, k])
    return ap


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16", "float64"])
def test_equals_scikit_learn(kind: str) -> None:
    scores, states = problem()
    expected = by_scikit_learn(scores, states)
    given_scores, given_states = scores, states
    if kind != "numpy":
        dtype = {"torch": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[kind]
        given_scores, given_states = torch.from_numpy(scores).to(dtype).requires_grad_(), torch.from_numpy(states)
    np.testing.assert_allclose(average_precision(given_scores, given_states), expected, atol=1e-12)
    metric = PartialAveragePrecision()
    for start in range(0, N, 13):
        metric.update(given_scores[start : start + 13], given_states[start : start + 13])
    result = metric.compute()
    np.testing.assert_allclose(result["AP"], expected, atol=1e-12)
    assert result["mAP"] == pytest.approx(np.nanmean(expected), abs=1e-12)
    assert result["skipped"] == 2
    np.testing.assert_array_equal(result["positives"], (states == POSITIVE).sum(0))
    np.testing.assert_array_equal(result["negatives"], (states == NEGATIVE).sum(0))
    metric.reset()
    metric.update(scores[:, :2], states[:, :2])
    assert len(metric.compute()["AP"]) == 2


def test_images_that_come_again_count_once() -> None:
    scores, states = problem()
    metric = PartialAveragePrecision()
    for rows in (np.arange(40), np.arange(30, N)):
        metric.update(scores[rows], states[rows], rows)
    np.testing.assert_allclose(metric.compute()["AP"], by_scikit_learn(scores, states), atol=1e-12)


def test_invalid_input_is_refused() -> None:
    metric = PartialAveragePrecision()
    with pytest.raises(ValueError, match="update"):
        metric.compute()
    metric.update(torch.zeros(2, 3), torch.full((2, 3), UNOBSERVED))
    assert np.isnan(metric.compute()["mAP"])
    for scores, states in ((torch.zeros(2, 4), torch.zeros(2, 4)), (torch.zeros(2, 3), torch.zeros(3, 2))):
        with pytest.raises(ValueError, match=r"\[B, 3\]"):
            metric.update(scores, states)


def worker(rank: int) -> list[float]:
    """Rank 1 has no batch; ranks 0 and 2 share five images."""
    scores, states = problem()
    metric = PartialAveragePrecision()
    rows = [np.arange(25), np.arange(0), np.arange(20, N)][rank]
    if len(rows):
        metric.update(torch.from_numpy(scores[rows]), torch.from_numpy(states[rows]), rows)
    return metric.compute()["AP"].tolist()


def test_ranks_are_gathered() -> None:
    for ap in run_on_ranks(worker, 3):
        np.testing.assert_allclose(ap, by_scikit_learn(*problem()), atol=1e-12)
