"""The ranking of label issues, compared with a sort of all labels, and the normalization by class."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.audit.issues import MISSING, WRONG
from paml.audit.rank import CLASS_SHIFT, PRIOR_COUNT, ClassScale, fit_class_scale, rank_issues
from paml.audit.scoring import ScoredLabels, SplitScores, TopLabelsPerClass
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED


def _scores(logits_NK: np.ndarray, states_NK: np.ndarray, per_class: int) -> SplitScores:
    top = TopLabelsPerClass(logits_NK.shape[1], per_class)
    top.add(np.arange(len(logits_NK)), logits_NK, states_NK == UNOBSERVED)
    image, cls = np.nonzero(states_NK != UNOBSERVED)
    observed = ScoredLabels(image, cls.astype(np.int32), logits_NK[image, cls], states_NK[image, cls])
    return SplitScores(len(logits_NK), logits_NK.shape[1], top.result(), observed)


def _random_labels(seed: int, images: int, classes: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels + 1, (images, classes)) / 2).astype(np.float32)
    return logits, rng.choice([POSITIVE, NEGATIVE, UNOBSERVED], (images, classes), p=(0.2, 0.2, 0.6)).astype(np.int8)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 40),
    classes=st.integers(1, 5),
    count=st.integers(0, 30),
    wrong_count=st.integers(0, 30),
    max_per_class=st.one_of(st.none(), st.integers(1, 4)),
    levels=st.integers(1, 6),
)
def test_issues_are_the_top_of_all_labels(
    seed: int, images: int, classes: int, count: int, wrong_count: int, max_per_class: int | None, levels: int
) -> None:
    logits, states = _random_labels(seed, images, classes, levels)
    scores = _scores(logits, states, min(count, max_per_class or count))
    scale = fit_class_scale(scores)
    issues = rank_issues(scores, scale, count, wrong_count, max_per_class)

    def expected(candidates: list[tuple[float, int, int]], limit: int) -> list[tuple[float, int, int]]:
        chosen: list[tuple[float, int, int]] = []
        for score, index, cls in sorted(candidates):
            if max_per_class is None or sum(cls == other for *_, other in chosen) < max_per_class:
                chosen.append((score, index, cls))
        return chosen[:limit]

    pairs = [(n, k) for n in range(images) for k in range(classes)]
    first = expected(
        [(float(scale.offset[k]) - float(logits[n, k]), n, k) for n, k in pairs if states[n, k] == UNOBSERVED], count
    )
    signs = {POSITIVE: 1, NEGATIVE: -1}
    observed = [
        (signs[int(states[n, k])] * (float(logits[n, k]) - float(scale.boundary[k])), n, k)
        for n, k in pairs
        if states[n, k] != UNOBSERVED
    ]
    second = expected(observed, wrong_count)
    assert (
        list(zip((-issues.score).tolist(), issues.image.tolist(), issues.cls.tolist(), strict=True)) == first + second
    )
    assert issues.kind.tolist() == [MISSING] * len(first) + [WRONG] * len(second)
    assert issues.rank.tolist() == [*range(1, len(first) + 1), *range(1, len(second) + 1)]
    np.testing.assert_array_equal(issues.state, states[issues.image, issues.cls])
    np.testing.assert_array_equal(issues.logit, logits[issues.image, issues.cls])


def test_a_class_is_shifted_by_a_fraction_of_its_distance_and_less_with_few_positives() -> None:
    logits = np.concatenate([np.full((90, 2), (3.0, -1.0)), np.full((10, 2), (3.0, -1.0))]).astype(np.float32)
    states = np.full((100, 2), UNOBSERVED, np.int8)
    states[:90, 0] = POSITIVE
    states[90:, 1] = POSITIVE
    offset = fit_class_scale(_scores(logits, states, 5)).offset
    weight = np.array([90 / (90 + PRIOR_COUNT), 10 / (10 + PRIOR_COUNT)])
    overall = (weight * [3.0, -1.0]).sum() / weight.sum()
    np.testing.assert_allclose(offset, CLASS_SHIFT * weight * (np.array([3.0, -1.0]) - overall))
    assert offset[0] > 0 > offset[1]


def test_the_boundary_is_between_observed_positives_and_negatives() -> None:
    logits, states = np.zeros((80, 3), np.float32), np.full((80, 3), UNOBSERVED, np.int8)
    states[:40], states[40:] = POSITIVE, NEGATIVE
    states[:, 2] = UNOBSERVED
    logits[:40, 0], logits[40:, 0] = -1, -5
    logits[:40, 1], logits[40:, 1] = 3, -3
    weight = (40 / (40 + PRIOR_COUNT)) ** 2
    boundary = fit_class_scale(_scores(logits, states, 5)).boundary
    np.testing.assert_allclose(boundary, [-1.5 + CLASS_SHIFT * weight * -1.5, -1.5 + CLASS_SHIFT * weight * 1.5, -1.5])
    values = ClassScale(np.full(3, 9.0), boundary).scores(
        np.array([0, 0]), np.array([-4.0, -4.0]), np.array([POSITIVE, NEGATIVE])
    )
    assert values[0] == -values[1] == boundary[0] + 4  # a positive is wrong below the boundary, a negative above it


def test_classes_without_observed_labels_are_not_shifted() -> None:
    logits, states = np.zeros((4, 3), np.float32), np.full((4, 3), UNOBSERVED, np.int8)
    scale = fit_class_scale(_scores(logits, states, 2))
    assert scale.offset.tolist() == scale.boundary.tolist() == [0, 0, 0]
    states[:, 1] = POSITIVE
    assert fit_class_scale(_scores(logits, states, 2)).offset.tolist() == [0, 0, 0]  # one class is at its own mean


def test_there_may_be_fewer_labels_than_requested() -> None:
    labels = ScoredLabels(*(np.empty(0, kind) for kind in (np.int64, np.int32, np.float32, np.int8)))
    scores = SplitScores(0, 2, labels, labels)
    assert len(rank_issues(scores, fit_class_scale(scores), 5, 5)) == 0
