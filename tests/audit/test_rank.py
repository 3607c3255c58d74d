"""The order of finds, held to a plain sort over all labels, and what normalises a class."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.audit.best import BestOfClasses, Labels
from paml.audit.finds import OBSERVED_WRONG, UNOBSERVED_POSITIVE
from paml.audit.rank import FEW, SHARE, ClassScale, choose, scale_of
from paml.audit.scoring import Observed, Scored
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED


def _scored(logits_NK: np.ndarray, states_NK: np.ndarray, keep: int) -> Scored:
    best = BestOfClasses(logits_NK.shape[1], keep)
    best.add(np.arange(len(logits_NK)), logits_NK, states_NK == UNOBSERVED)
    image, cls = np.nonzero(states_NK != UNOBSERVED)
    positive = states_NK[image, cls] == POSITIVE
    observed = Observed(image, cls.astype(np.int32), positive, logits_NK[image, cls])
    return Scored(len(logits_NK), logits_NK.shape[1], best.result(), observed, np.zeros((1, 1 << 16), np.int64))


def _drawn(seed: int, images: int, classes: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels + 1, (images, classes)) / 2).astype(np.float32)
    return logits, rng.choice([POSITIVE, NEGATIVE, UNOBSERVED], (images, classes), p=(0.2, 0.2, 0.6)).astype(np.int8)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 40),
    classes=st.integers(1, 5),
    count=st.integers(0, 30),
    observed_count=st.integers(0, 30),
    most=st.one_of(st.none(), st.integers(1, 4)),
    levels=st.integers(1, 6),
)
def test_finds_are_the_best_of_all_labels_though_only_each_class_s_best_are_kept(
    seed: int, images: int, classes: int, count: int, observed_count: int, most: int | None, levels: int
) -> None:
    logits, states = _drawn(seed, images, classes, levels)
    scored = _scored(logits, states, min(count, most or count))
    scale = scale_of(scored)
    found = choose(scored, scale, count, observed_count, most)

    def expected(candidates: list[tuple[float, int, int]], limit: int) -> list[tuple[float, int, int]]:
        chosen: list[tuple[float, int, int]] = []
        for score, place, cls in sorted(candidates):
            if most is None or sum(cls == other for *_, other in chosen) < most:
                chosen.append((score, place, cls))
        return chosen[:limit]

    pairs = [(n, k) for n in range(images) for k in range(classes)]
    first = expected(
        [(float(scale.offset[k]) - float(logits[n, k]), n, k) for n, k in pairs if states[n, k] == UNOBSERVED], count
    )
    signs = {POSITIVE: 1, NEGATIVE: -1}
    doubts = [
        (signs[int(states[n, k])] * (float(logits[n, k]) - float(scale.border[k])), n, k)
        for n, k in pairs
        if states[n, k] != UNOBSERVED
    ]
    second = expected(doubts, observed_count)
    assert list(zip((-found.score).tolist(), found.place.tolist(), found.cls.tolist(), strict=True)) == first + second
    assert found.kind.tolist() == [UNOBSERVED_POSITIVE] * len(first) + [OBSERVED_WRONG] * len(second)
    assert found.rank.tolist() == [*range(1, len(first) + 1), *range(1, len(second) + 1)]
    np.testing.assert_array_equal(found.state, states[found.place, found.cls])
    np.testing.assert_array_equal(found.logit, logits[found.place, found.cls])


def test_a_class_moves_by_a_share_of_its_distance_and_less_with_few_positives() -> None:
    logits = np.concatenate([np.full((90, 2), (3.0, -1.0)), np.full((10, 2), (3.0, -1.0))]).astype(np.float32)
    states = np.full((100, 2), UNOBSERVED, np.int8)
    states[:90, 0] = POSITIVE
    states[90:, 1] = POSITIVE
    offset = scale_of(_scored(logits, states, 5)).offset
    weight = np.array([90 / (90 + FEW), 10 / (10 + FEW)])
    overall = (weight * [3.0, -1.0]).sum() / weight.sum()
    np.testing.assert_allclose(offset, SHARE * weight * (np.array([3.0, -1.0]) - overall))
    assert offset[0] > 0 > offset[1]


def test_the_border_lies_between_the_observed_positives_and_negatives() -> None:
    logits, states = np.zeros((80, 3), np.float32), np.full((80, 3), UNOBSERVED, np.int8)
    states[:40], states[40:] = POSITIVE, NEGATIVE
    states[:, 2] = UNOBSERVED
    logits[:40, 0], logits[40:, 0] = -1, -5
    logits[:40, 1], logits[40:, 1] = 3, -3
    weight = (40 / (40 + FEW)) ** 2
    border = scale_of(_scored(logits, states, 5)).border
    np.testing.assert_allclose(border, [-1.5 + SHARE * weight * -1.5, -1.5 + SHARE * weight * 1.5, -1.5])
    scores = ClassScale(np.full(3, 9.0), border).scores(
        np.array([0, 0]), np.array([-4.0, -4.0]), np.array([POSITIVE, NEGATIVE])
    )
    assert scores[0] == -scores[1] == border[0] + 4  # a positive is wrong below the border, a negative above it


def test_classes_without_observed_labels_are_taken_as_all_are() -> None:
    logits, states = np.zeros((4, 3), np.float32), np.full((4, 3), UNOBSERVED, np.int8)
    scale = scale_of(_scored(logits, states, 2))
    assert scale.offset.tolist() == scale.border.tolist() == [0, 0, 0]
    states[:, 1] = POSITIVE
    assert scale_of(_scored(logits, states, 2)).offset.tolist() == [0, 0, 0]  # one class is at its own mean


def test_there_may_be_fewer_labels_than_asked_for() -> None:
    labels = Labels(*(np.empty(0, kind) for kind in (np.int64, np.int32, np.float32)))
    observed = Observed(*(np.empty(0, kind) for kind in (np.int64, np.int32, bool, np.float32)))
    scored = Scored(0, 2, labels, observed, np.zeros((1, 1 << 16), np.int64))
    assert len(choose(scored, scale_of(scored), 5, 5)) == 0
