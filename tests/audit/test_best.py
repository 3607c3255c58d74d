"""The best labels of each class, held to a plain sort of all of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.audit.best import BestOfClasses


def _reference(scores_NK: np.ndarray, allowed_NK: np.ndarray, keep: int) -> list[tuple[int, int, float]]:
    found = []
    for cls in range(scores_NK.shape[1]):
        rows = [(-float(scores_NK[n, cls]), n) for n in np.flatnonzero(allowed_NK[:, cls])]
        found += [(cls, n, -score) for score, n in sorted(rows)[:keep]]
    return found


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 60),
    classes=st.integers(1, 5),
    keep=st.integers(0, 9),
    batch=st.integers(1, 17),
    levels=st.integers(1, 12),
    buffer=st.sampled_from([0, 7, 10**6]),
)
def test_the_best_of_a_stream_are_those_of_a_sort_of_everything(
    seed, images, classes, keep, batch, levels, buffer
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels, (images, classes)).astype(np.float32)  # few values: many ties
    allowed = rng.random((images, classes)) < 0.7
    best = BestOfClasses(classes, keep, buffer)
    order = rng.permutation(images)  # a tie goes to the lower place in whatever order images come
    for start in range(0, images, batch):
        chosen = order[start : start + batch]
        best.add(chosen, scores[chosen], allowed[chosen])
    found = best.result()
    assert list(zip(found.cls.tolist(), found.place.tolist(), found.score.tolist(), strict=True)) == _reference(
        scores, allowed, keep
    )


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    best, rng = BestOfClasses(8, 20, buffer=1000), np.random.default_rng(0)
    held = []
    for step in range(400):
        best.add(np.arange(50) + 50 * step, rng.random((50, 8), np.float32), np.ones((50, 8), bool))
        held.append(sum(len(part.place) for part in best._parts))
    assert max(held) <= 8 * 20 + 1000 + 50 * 8
    assert len(best.result().place) == 8 * 20


def test_a_class_without_an_allowed_label_has_none() -> None:
    best = BestOfClasses(2, 3)
    best.add(np.arange(2), np.zeros((2, 2), np.float32), np.array([[True, False], [True, False]]))
    assert best.result().cls.tolist() == [0, 0]


def test_nothing_streamed_leaves_nothing() -> None:
    assert len(BestOfClasses(3, 3).result().cls) == 0
