"""One pass over a split, compared with plain numpy over all scores."""

import numpy as np
import pytest
import torch

from paml.audit.scoring import score_labels
from paml.data.loader import Batch, LabelTriples
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED

IMAGES, CLASSES = 37, 5


def _batches(scores_NKHW: torch.Tensor, states_NK: np.ndarray, size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(scores_NKHW), size):
        index = np.arange(start, min(start + size, len(scores_NKHW)))
        image, cls = np.nonzero(states_NK[index] != UNOBSERVED)
        state = states_NK[index][image, cls]
        labels = LabelTriples(torch.from_numpy(image), torch.from_numpy(cls), torch.from_numpy(state))
        none = LabelTriples(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))
        batches.append(
            Batch(
                step=start,
                images=scores_NKHW[index],
                flips=torch.zeros(len(index), dtype=torch.bool),
                slots=torch.arange(len(index)),
                index=index + 100,
                keys=lambda: [],
                labels=labels,
                probe=none,
                truth=None,
                bad=(),
            )
        )
    return batches


@pytest.fixture
def split() -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    maps = torch.round(torch.randn(IMAGES, CLASSES, 2, 2, generator=generator) * 4) / 4
    states = np.random.default_rng(2).choice([POSITIVE, NEGATIVE, UNOBSERVED], (IMAGES, CLASSES), p=(0.1, 0.1, 0.8))
    return maps, states.astype(np.int8)


def _logits(maps: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(maps > 0, alpha * maps, maps).mean((2, 3))


@pytest.mark.parametrize("size", [1, 8, 64])
def test_a_pass_returns_top_and_observed_labels_for_any_batch_size(split, size: int) -> None:
    maps, states = split
    views = (lambda batch: batch.images, lambda batch: -batch.images)
    scores = score_labels(views, _batches(maps, states, size), alpha=3.0, num_classes=CLASSES, per_class=6)
    raw = maps.double().numpy()
    logits = (_logits(raw, 3.0) + _logits(-raw, 3.0)) / 2
    expected = []
    for cls in range(CLASSES):
        rows = sorted((-logits[n, cls], n) for n in np.flatnonzero(states[:, cls] == UNOBSERVED))
        expected += [(cls, n + 100, -score) for score, n in rows[:6]]
    top = scores.unobserved
    assert list(zip(top.cls.tolist(), top.image.tolist(), top.score.tolist(), strict=True)) == [
        (cls, index, pytest.approx(score, abs=1e-6)) for cls, index, score in expected
    ]
    image, cls = np.nonzero(states != UNOBSERVED)
    np.testing.assert_array_equal(scores.observed.image, image + 100)
    np.testing.assert_array_equal(scores.observed.cls, cls)
    np.testing.assert_array_equal(scores.observed.state, states[image, cls])
    np.testing.assert_allclose(scores.observed.score, logits[image, cls], atol=1e-6)
    assert scores.images == IMAGES


def test_nan_weights_and_an_empty_split_are_refused(split) -> None:
    maps, states = split
    views = (lambda batch: batch.images * float("nan"),)
    with pytest.raises(DataError, match="not finite"):
        score_labels(views, _batches(maps, states, 8), alpha=1.0, num_classes=CLASSES, per_class=3)
    with pytest.raises(DataError, match="no image"):
        score_labels(views, [], alpha=1.0, num_classes=CLASSES, per_class=3)
