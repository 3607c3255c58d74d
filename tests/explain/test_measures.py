"""Metrics of maps, each compared with a plain loop in float64 or with scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from paml.explain import measures


def _maps(seed: int, shape: tuple[int, ...] = (7, 5, 6), *, ties: bool = False) -> np.ndarray:
    maps = np.random.default_rng(seed).normal(0, 3, shape)
    return np.round(maps) if ties else maps


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_equals_scipy_with_and_without_ties(ties: bool) -> None:
    first, second = _maps(1, ties=ties), _maps(2, ties=ties)
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(measures.spearman(first, second), expected, rtol=0, atol=1e-12)


def test_spearman_of_a_constant_map_is_nan() -> None:
    first = _maps(4, (3, 4, 4))
    first[1] = 0.1
    correlation = measures.spearman(first, _maps(5, (3, 4, 4)))
    assert np.isnan(correlation).tolist() == [False, True, False]


def test_concordance_equals_a_plain_loop() -> None:
    first, second = _maps(6), _maps(7) + 1
    second[0] = 2.0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        x, y = [float(v) for v in a.ravel()], [float(v) for v in b.ravel()]
        mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
        cov = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True)) / len(x)
        vx, vy = (math.fsum((p - m) ** 2 for p in v) / len(v) for v, m in ((x, mx), (y, my)))
        expected = 2 * cov / (vx + vy + (mx - my) ** 2)
        assert measures.concordance(first, second)[i] == pytest.approx(expected, abs=1e-12)


def test_concordance_depends_on_scale_and_ranks_do_not() -> None:
    maps = _maps(8)
    assert measures.spearman(maps, maps / 10) == pytest.approx(1)
    assert (measures.concordance(maps, maps / 10) < 0.3).all()
    assert measures.concordance(maps, maps) == pytest.approx(1)
    assert np.isnan(measures.concordance(np.ones((1, 2, 2)), np.ones((1, 2, 2)))).all()


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(1, 1, 1), (2, 5, 1), (5, 6, 2), (5, 10, 2), (7, 10, 4), (7, 7, 2), (14, 14, 10), (9, 10, 4), (10, 11, 6)],
)
def test_tails_hold_five_percent_rounded_half_to_even_and_at_least_one(height: int, width: int, count: int) -> None:
    maps = _maps(9, (3, height, width))
    for i, (top, bottom) in enumerate(zip(*measures.tail_means(maps), strict=True)):
        ordered = sorted(maps[i].ravel().tolist())
        assert top == pytest.approx(math.fsum(ordered[-count:]) / count, abs=1e-12)
        assert bottom == pytest.approx(math.fsum(ordered[:count]) / count, abs=1e-12)


def test_boost_changes_neither_ranks_nor_pointing_but_concordance() -> None:
    maps, other = _maps(10), _maps(11)
    boosted = np.where(maps > 0, 5 * maps, maps)
    boxes = [np.array([[0.2, 0.7, 0.1, 0.9]])] * len(maps)
    np.testing.assert_array_equal(measures.spearman(maps, other), measures.spearman(boosted, other))
    np.testing.assert_array_equal(measures.pointing_hits(maps, boxes), measures.pointing_hits(boosted, boxes))
    assert not np.allclose(measures.concordance(maps, other), measures.concordance(boosted, other))


def test_the_control_map_is_symmetric_and_its_width_changes_no_rank() -> None:
    control = measures.centered_gaussian(4, 6)
    np.testing.assert_array_equal(control, control[::-1])
    np.testing.assert_array_equal(control, control[:, ::-1])
    y, x = (np.arange(4) - 1.5)[:, None], np.arange(6) - 2.5
    np.testing.assert_allclose(control, np.exp(-(x**2) / (2 * 1.5**2) - y**2 / (2 * 1.0**2)))
    maps, square = _maps(12, (3, 5, 5)), measures.centered_gaussian(5, 5)
    np.testing.assert_allclose(measures.spearman(maps, square[None]), measures.spearman(maps, np.sqrt(square)[None]))


def test_pointing_uses_the_center_of_the_first_maximum_and_any_box() -> None:
    maps = np.zeros((4, 4, 4))
    maps[:, 1, 2] = 1  # its center is at x = 0.625, y = 0.375
    maps[3, 3, 3] = 1  # a second maximum: the first counts
    far = [0.0, 0.2, 0.0, 0.2]
    boxes = [[[0.6, 0.7, 0.3, 0.4]], [[0.7, 1.0, 0.3, 0.4]], [far, [0.625, 1.0, 0.0, 0.375]], [[0.8, 1.0, 0.8, 1.0]]]
    hits = measures.pointing_hits(maps, [np.array(one) for one in boxes])
    assert hits.tolist() == [True, False, True, False]


def test_box_iou_is_the_best_over_components_above_the_threshold() -> None:
    maps = np.full((1, 8, 8), -1.0)
    maps[0, 0:4, 0:4] = 4.0
    maps[0, 6:8, 6:8] = 1.0
    boxes = [np.array([[0.0, 0.5, 0.0, 0.5]])]
    assert measures.best_box_iou(maps, boxes, threshold=0.5, size=8) == pytest.approx(1.0)
    small = [np.array([[0.75, 1.0, 0.75, 1.0]])]
    assert measures.best_box_iou(maps, small, threshold=0.5, size=8) == pytest.approx(0.0)
    assert measures.best_box_iou(maps, small, threshold=0.25, size=8) == pytest.approx(1.0)
    half = [np.array([[0.0, 0.5, 0.0, 0.25], [0.9, 1.0, 0.0, 0.1]])]
    assert measures.best_box_iou(maps, half, threshold=0.5, size=8) == pytest.approx(0.5)


def test_box_iou_of_a_map_without_positive_scores_is_zero() -> None:
    box = [np.array([[0, 1, 0, 1.0]])]
    assert measures.best_box_iou(-np.ones((1, 4, 4)), box, threshold=0.2, size=8) == 0
