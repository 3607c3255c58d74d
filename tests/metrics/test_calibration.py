"""Calibration and thresholds against scikit-learn, scipy and their definitions."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from paml.errors import DataError, SettingsError
from paml.metrics.calibration import (
    Calibration,
    CalibrationSettings,
    calibrate,
    fit,
    precision_thresholds,
    reliability,
    sigmoid,
)

K = 6


def pairs(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of very different sizes, logits biased low by a slope and an offset per class, and truths."""
    rng = np.random.default_rng(seed)
    cls = rng.choice(K, n, p=[0.4, 0.3, 0.2, 0.095, 0.004, 0.001])
    truth = rng.normal(size=n) * 2
    slope, offset = np.linspace(0.5, 2, K), np.linspace(0, 3, K)
    positive = rng.random(n) < sigmoid(truth)
    return cls, (truth - offset[cls]) / slope[cls], positive


def test_platt_is_the_minimum_of_its_objective_in_every_class() -> None:
    cls, logit, positive = pairs()
    settings = CalibrationSettings(shrink=3.0)
    slope, offset = fit(cls, logit, positive, K, settings)
    center, spread = logit.mean(), logit.std()

    def loss(at: np.ndarray, z: np.ndarray, y: np.ndarray, start: np.ndarray) -> float:
        x = at[0] * z + at[1]
        return float(np.sum(np.logaddexp(0, x) - y * x) + 1.5 * np.sum((at - start) ** 2))

    def minimum(own: np.ndarray, start: np.ndarray) -> np.ndarray:
        z, y = (logit[own] - center) / spread, positive[own]
        return optimize.minimize(loss, start, args=(z, y, start), method="BFGS", options={"gtol": 1e-9}).x

    common = minimum(np.ones(len(cls), bool), np.array([spread, center]))
    for k in range(K):
        a, b = minimum(cls == k, common)
        assert slope[k] == pytest.approx(a / spread, rel=1e-4)
        assert offset[k] == pytest.approx(b - a * center / spread, rel=1e-4, abs=1e-4)


def test_platt_with_hardly_any_pull_is_logistic_regression_and_without_pairs_the_common_fit() -> None:
    cls, logit, positive = pairs()
    slope, offset = fit(cls, logit, positive, K + 1, CalibrationSettings(shrink=1e-6))
    for k in range(3):
        own = cls == k
        model = LogisticRegression(C=1e10, tol=1e-10).fit(logit[own, None], positive[own])
        assert slope[k] == pytest.approx(model.coef_[0, 0], rel=1e-3)
        assert offset[k] == pytest.approx(model.intercept_[0], rel=1e-3, abs=1e-3)
    model = LogisticRegression(C=1e10, tol=1e-10).fit(logit[:, None], positive)
    assert (slope[K], offset[K]) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), rel=1e-3)


def test_temperature_is_the_minimum_of_the_log_loss() -> None:
    cls, logit, positive = pairs()
    slope, offset = fit(cls, logit, positive, K, CalibrationSettings(method="temperature"))

    def loss(at: float) -> float:
        return float(np.sum(np.logaddexp(0, at * logit) - positive * at * logit))

    expected = optimize.minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-10}).x
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    assert not offset.any()


def test_a_class_with_misleading_scores_keeps_its_order() -> None:
    rng = np.random.default_rng(1)
    cls, logit = np.repeat([0, 1], 300), rng.normal(size=600)
    positive = rng.random(600) < sigmoid(np.where(cls == 0, 3, -3) * logit)
    slope, _ = fit(cls, logit, positive, 2, CalibrationSettings(shrink=0.1))
    assert slope[0] > 1
    assert 0 < slope[1] < 0.02


def test_a_known_bias_is_removed_and_the_error_equals_its_definition() -> None:
    cls, logit, positive = pairs(20_000)
    slope, offset = fit(cls, logit, positive, K, CalibrationSettings(shrink=1.0))
    before, after = sigmoid(logit), sigmoid(slope[cls] * logit + offset[cls])
    curve = reliability(before, positive, 10)
    observed, predicted = calibration_curve(positive, before, n_bins=10)
    full = curve.count > 0
    np.testing.assert_allclose(curve.observed[full], observed)
    np.testing.assert_allclose(curve.predicted[full], predicted)
    assert curve.error == pytest.approx(np.abs(observed - predicted) @ curve.count[full] / len(cls))
    assert curve.error > 0.1
    assert reliability(after, positive, 10).error < 0.02
    assert np.isnan(reliability(before[:0], positive[:0]).error)


def test_probability_one_is_in_the_last_bin() -> None:
    curve = reliability(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 4)
    assert curve.count.tolist() == [1, 0, 0, 2]
    assert curve.error == pytest.approx(2 / 3 * 0.5)


def test_thresholds_have_their_bound_and_do_not_split_ties() -> None:
    rng = np.random.default_rng(2)
    score = np.round(rng.random(3000), 2)
    positive = rng.random(3000) < score
    cls = np.zeros(3000, np.int64)
    thresholds = precision_thresholds(cls, score, positive, 1, precision=0.8, confidence=0.9)
    above = score >= thresholds.threshold[0]
    assert (thresholds.pairs_above[0], thresholds.positives_above[0]) == (above.sum(), (above & positive).sum())
    assert thresholds.bound[0] >= 0.8
    single = stats.beta.ppf(
        0.1, thresholds.positives_above[0], thresholds.pairs_above[0] - thresholds.positives_above[0] + 1
    )
    assert thresholds.bound[0] < single  # many were tried, so the bound of each is stricter
    assert thresholds.missing_reason(0) is None


def test_thresholds_reach_the_precision_with_the_stated_confidence() -> None:
    rng = np.random.default_rng(3)
    failures, total = 0, 0
    for _ in range(60):
        cls, score = np.repeat(np.arange(10), 400), rng.random(4000)
        chance = 0.4 + 0.6 * score
        thresholds = precision_thresholds(cls, score, rng.random(4000) < chance, 10, precision=0.85, confidence=0.8)
        for k in np.flatnonzero(np.isfinite(thresholds.threshold)):
            total += 1
            own = (cls == k) & (score >= thresholds.threshold[k])
            failures += chance[own].mean() < 0.85
    assert total > 200
    assert failures <= 0.2 * total


def test_classes_without_a_threshold_have_a_reason() -> None:
    cls = np.array([0] * 10 + [1] * 500)
    score = np.linspace(0, 1, 510)
    thresholds = precision_thresholds(cls, score, np.arange(510) % 2 == 0, 3, precision=0.9, confidence=0.9)
    assert not np.isfinite(thresholds.threshold).any()
    assert thresholds.needed == 22
    assert thresholds.missing_reason(0) == "10 pairs; at least 22 are needed"
    assert "best lower bound 0." in (thresholds.missing_reason(1) or "")
    assert thresholds.missing_reason(2) == "0 pairs; at least 22 are needed"


def test_a_calibration_survives_its_file(tmp_path) -> None:
    cls, logit, positive = pairs()
    calibration = calibrate(cls, logit, positive, K, CalibrationSettings(precision=0.7), {"split": "validation"})
    path = str(tmp_path / "calibration.json")
    calibration.write(path)
    loaded = Calibration.read(path)
    np.testing.assert_array_equal(loaded.scores(logit, cls), calibration.scores(logit, cls))
    for name, values in calibration.thresholds._asdict().items():
        np.testing.assert_array_equal(getattr(loaded.thresholds, name), values)
    assert dataclasses.asdict(loaded)["facts"] == {"split": "validation"}
    assert np.isfinite(calibration.threshold).any()
    text = (tmp_path / "calibration.json").read_text()
    assert "people verified" in text
    assert '"no_threshold"' in text
    (tmp_path / "calibration.json").write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(DataError, match="schema version 9"):
        Calibration.read(path)
    (tmp_path / "calibration.json").write_text(text[:200])
    with pytest.raises(DataError, match="damaged"):
        Calibration.read(path)


def test_invalid_input_is_refused() -> None:
    with pytest.raises(DataError, match="positives and negatives"):
        fit(np.zeros(3, int), np.zeros(3), np.ones(3, bool), 1, CalibrationSettings())
    for changes in ({"method": "magic"}, {"shrink": 0}, {"precision": 1.0}, {"confidence": 0}, {"bins": 0}):
        with pytest.raises(SettingsError, match=f"calibration.{next(iter(changes))} is"):
            CalibrationSettings(**changes)
