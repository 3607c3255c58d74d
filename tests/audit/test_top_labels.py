"""The top labels of each class, compared with a sort of all labels."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.audit.scoring import TopLabelsPerClass


def _reference(scores_NK: np.ndarray, allowed_NK: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    expected = []
    for cls in range(scores_NK.shape[1]):
        rows = [(-float(scores_NK[n, cls]), n) for n in np.flatnonzero(allowed_NK[:, cls])]
        expected += [(cls, n, -score) for score, n in sorted(rows)[:count]]
    return expected


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 60),
    classes=st.integers(1, 5),
    count=st.integers(0, 9),
    batch=st.integers(1, 17),
    levels=st.integers(1, 12),
    buffer=st.sampled_from([0, 7, 10**6]),
)
def test_the_top_of_a_stream_is_the_top_of_a_sort_of_all_labels(
    seed, images, classes, count, batch, levels, buffer
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels, (images, classes)).astype(np.float32)  # few values: many ties
    allowed = rng.random((images, classes)) < 0.7
    top = TopLabelsPerClass(classes, count, buffer)
    order = rng.permutation(images)  # ties go to the lower index in any order of images
    for start in range(0, images, batch):
        chosen = order[start : start + batch]
        top.add(chosen, scores[chosen], allowed[chosen])
    labels = top.result()
    assert list(zip(labels.cls.tolist(), labels.image.tolist(), labels.score.tolist(), strict=True)) == _reference(
        scores, allowed, count
    )


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    top, rng = TopLabelsPerClass(8, 20, buffer=1000), np.random.default_rng(0)
    retained = []
    for step in range(400):
        top.add(np.arange(50) + 50 * step, rng.random((50, 8), np.float32), np.ones((50, 8), bool))
        retained.append(sum(len(image) for image, _, _ in top._parts))
    assert max(retained) <= 8 * 20 + 1000 + 50 * 8
    assert len(top.result().image) == 8 * 20


def test_a_class_without_allowed_labels_has_none() -> None:
    top = TopLabelsPerClass(2, 3)
    top.add(np.arange(2), np.zeros((2, 2), np.float32), np.array([[True, False], [True, False]]))
    assert top.result().cls.tolist() == [0, 0]


def test_without_scores_the_result_is_empty() -> None:
    assert len(TopLabelsPerClass(3, 3).result().cls) == 0
