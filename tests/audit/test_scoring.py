"""One pass over a split: what it keeps and counts, held to plain numpy over all scores."""

import numpy as np
import pytest
import torch

from paml.audit.scoring import bin_of, least_rejected_bin, score_labels
from paml.data.loader import Batch, LabelTriples
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED
from paml.models.cam import CamClassifier

IMAGES, CLASSES = 37, 5


class _Maps(CamClassifier):
    """Maps that are a fixed linear function of the picture: its numbers are the scores."""

    def __init__(self, factor: float) -> None:
        torch.nn.Module.__init__(self)
        self.factor = factor

    def maps(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW * self.factor


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
def test_the_pass_keeps_the_best_and_all_observed_whatever_the_batches(split, size: int) -> None:
    maps, states = split
    views = (lambda batch: batch.images, lambda batch: -batch.images)
    found = score_labels(
        [_Maps(0.5), _Maps(1.0)], _batches(maps, states, size), views, alpha=3.0, num_classes=CLASSES, keep=6
    )
    raw = maps.double().numpy()
    logits = (_logits(raw, 3.0) + _logits(-raw, 3.0)) / 2
    expected = []
    for cls in range(CLASSES):
        rows = sorted((-logits[n, cls], n) for n in np.flatnonzero(states[:, cls] == UNOBSERVED))
        expected += [(cls, n + 100, -score) for score, n in rows[:6]]
    kept = found.unobserved
    assert list(zip(kept.cls.tolist(), kept.place.tolist(), kept.score.tolist(), strict=True)) == [
        (cls, place, pytest.approx(score, abs=1e-6)) for cls, place, score in expected
    ]
    image, cls = np.nonzero(states != UNOBSERVED)
    np.testing.assert_array_equal(found.observed.place, image + 100)
    np.testing.assert_array_equal(found.observed.cls, cls)
    np.testing.assert_array_equal(found.observed.positive, states[image, cls] == POSITIVE)
    np.testing.assert_allclose(found.observed.score, logits[image, cls], atol=1e-6)
    assert found.images == IMAGES
    for place, factor in enumerate((0.5, 1.0)):  # of the first view alone, by checkpoint
        own = _logits(raw * factor, 3.0)[states == UNOBSERVED]
        np.testing.assert_array_equal(
            found.histograms[place], np.bincount(bin_of(own.astype(np.float32)), minlength=1 << 16)
        )


def test_bins_rise_with_the_values_and_are_narrow() -> None:
    values = np.sort(np.concatenate([np.random.default_rng(0).normal(0, 10, 5000), [0.0, -0.0, 1e-30, -1e-30]]))
    bins = bin_of(values.astype(np.float32))
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << 16
    for number in np.unique(bins):
        own = values[bins == number]
        assert own.max() - own.min() <= np.abs(own).max() / 100


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_least_rejected_bin_holds_the_exact_threshold(share: float) -> None:
    values = np.random.default_rng(3).normal(0, 2, 4000).astype(np.float32)
    least = least_rejected_bin(np.bincount(bin_of(values), minlength=1 << 16), share)
    wanted = int(np.ceil(share * len(values)))
    rejected = bin_of(values) >= least
    if wanted == 0:
        assert not rejected.any()
        return
    assert least == bin_of(np.sort(values)[::-1][wanted - 1 : wanted])[0]
    assert rejected[np.argsort(-values)[:wanted]].all()


def test_lost_weights_and_an_empty_split_are_refused(split) -> None:
    maps, states = split
    views = (lambda batch: batch.images,)
    with pytest.raises(DataError, match="not finite"):
        score_labels([_Maps(float("nan"))], _batches(maps, states, 8), views, alpha=1.0, num_classes=CLASSES, keep=3)
    with pytest.raises(DataError, match="no image"):
        score_labels([_Maps(1.0)], [], views, alpha=1.0, num_classes=CLASSES, keep=3)
