"""Figures of maps, each against a plain loop in float64 or scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from paml.explain import measures


def _maps(seed: int, shape: tuple[int, ...] = (7, 5, 6), *, ties: bool = False) -> np.ndarray:
    maps = np.random.default_rng(seed).normal(0, 3, shape)
    return np.round(maps) if ties else maps


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys_with_ties_or_without(ties: bool) -> None:
    first, second = _maps(1, ties=ties), _maps(2, ties=ties)
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(measures.spearman(first, second), expected, rtol=0, atol=1e-12)


def test_ranks_are_scipys_averages() -> None:
    values = _maps(3, (4, 5, 5), ties=True).reshape(4, 25)
    np.testing.assert_array_equal(measures.average_ranks(values) + 1, stats.rankdata(values, axis=1))


def test_spearman_of_a_constant_map_is_undefined_and_never_a_number() -> None:
    first = _maps(4, (3, 4, 4))
    first[1] = 0.1
    found = measures.spearman(first, _maps(5, (3, 4, 4)))
    assert np.isnan(found).tolist() == [False, True, False]


def test_concordance_and_difference_are_those_of_a_plain_loop() -> None:
    first, second = _maps(6), _maps(7) + 1
    second[0] = 2.0
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        x, y = [float(v) for v in a.ravel()], [float(v) for v in b.ravel()]
        mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
        cov = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True)) / len(x)
        vx, vy = (math.fsum((p - m) ** 2 for p in v) / len(v) for v, m in ((x, mx), (y, my)))
        found = measures.concordance(first, second)[place]
        assert found == pytest.approx(2 * cov / (vx + vy + (mx - my) ** 2), abs=1e-12)
        apart = math.fsum(abs(p - q) for p, q in zip(x, y, strict=True)) / len(x)
        assert measures.mean_absolute_difference(first, second)[place] == pytest.approx(apart, abs=1e-12)


def test_concordance_sees_the_scale_that_ranks_do_not() -> None:
    maps = _maps(8)
    assert measures.spearman(maps, maps / 10) == pytest.approx(1)
    assert (measures.concordance(maps, maps / 10) < 0.3).all()
    assert measures.concordance(maps, maps) == pytest.approx(1)
    assert np.isnan(measures.concordance(np.ones((1, 2, 2)), np.ones((1, 2, 2)))).all()


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(1, 1, 1), (2, 5, 1), (5, 6, 2), (5, 10, 2), (7, 10, 4), (7, 7, 2), (14, 14, 10), (9, 10, 4), (10, 11, 6)],
)
def test_five_percent_of_a_map_is_rounded_half_to_even_and_never_none(height: int, width: int, count: int) -> None:
    assert measures.end_count(height, width) == count
    maps = _maps(9, (3, height, width))
    for place, (top, bottom) in enumerate(zip(*measures.end_means(maps), strict=True)):
        ordered = sorted(maps[place].ravel().tolist())
        assert top == pytest.approx(math.fsum(ordered[-count:]) / count, abs=1e-12)
        assert bottom == pytest.approx(math.fsum(ordered[:count]) / count, abs=1e-12)


def test_boost_changes_neither_ranks_nor_the_place_of_the_maximum_nor_boxes() -> None:
    maps, other = _maps(10), _maps(11)
    boosted = np.where(maps > 0, 5 * maps, maps)
    boxes = [np.array([[0.2, 0.7, 0.1, 0.9]])] * len(maps)
    np.testing.assert_array_equal(measures.spearman(maps, other), measures.spearman(boosted, other))
    np.testing.assert_array_equal(measures.points_into(maps, boxes), measures.points_into(boosted, boxes))
    assert not np.allclose(measures.concordance(maps, other), measures.concordance(boosted, other))


def test_the_control_is_symmetric_and_its_width_changes_no_rank() -> None:
    control = measures.centred_gaussian(4, 6)
    np.testing.assert_array_equal(control, control[::-1])
    np.testing.assert_array_equal(control, control[:, ::-1])
    y, x = (np.arange(4) - 1.5)[:, None], np.arange(6) - 2.5
    np.testing.assert_allclose(control, np.exp(-(x**2) / (2 * 1.5**2) - y**2 / (2 * 1.0**2)))
    maps, square = _maps(12, (3, 5, 5)), measures.centred_gaussian(5, 5)
    np.testing.assert_allclose(measures.spearman(maps, square[None]), measures.spearman(maps, np.sqrt(square)[None]))


def test_pointing_hits_where_the_maximal_cells_centre_lies_in_any_box_of_the_class() -> None:
    maps = np.zeros((4, 4, 4))
    maps[:, 1, 2] = 1  # its centre is at x = 0.625, y = 0.375
    maps[3, 3, 3] = 1  # a second maximum: the first counts
    far = [0.0, 0.2, 0.0, 0.2]
    boxes = [[[0.6, 0.7, 0.3, 0.4]], [[0.7, 1.0, 0.3, 0.4]], [far, [0.625, 1.0, 0.0, 0.375]], [[0.8, 1.0, 0.8, 1.0]]]
    hits = measures.points_into(maps, [np.array(own) for own in boxes])
    assert hits.tolist() == [True, False, True, False]


def test_box_iou_is_the_best_of_the_parts_above_the_share_of_the_maximum() -> None:
    maps = np.full((1, 8, 8), -1.0)
    maps[0, 0:4, 0:4] = 4.0
    maps[0, 6:8, 6:8] = 1.0
    boxes = [np.array([[0.0, 0.5, 0.0, 0.5]])]
    assert measures.best_box_iou(maps, boxes, share=0.5, size=8) == pytest.approx(1.0)
    small = [np.array([[0.75, 1.0, 0.75, 1.0]])]
    assert measures.best_box_iou(maps, small, share=0.5, size=8) == pytest.approx(0.0)
    assert measures.best_box_iou(maps, small, share=0.25, size=8) == pytest.approx(1.0)
    half = [np.array([[0.0, 0.5, 0.0, 0.25], [0.9, 1.0, 0.0, 0.1]])]
    assert measures.best_box_iou(maps, half, share=0.5, size=8) == pytest.approx(0.5)


def test_a_map_without_a_positive_score_finds_no_box() -> None:
    assert measures.best_box_iou(-np.ones((1, 4, 4)), [np.array([[0, 1, 0, 1.0]])], share=0.2, size=8) == 0
