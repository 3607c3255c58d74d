"""Calibration and thresholds against scikit-learn, scipy and definitions."""

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
    """Classes of very different sizes, logits that are biased low by a class's own slope and offset, and truths."""
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
    centre, spread = logit.mean(), logit.std()

    def loss(at: np.ndarray, z: np.ndarray, y: np.ndarray, start: np.ndarray) -> float:
        x = at[0] * z + at[1]
        return float(np.sum(np.logaddexp(0, x) - y * x) + 1.5 * np.sum((at - start) ** 2))

    def minimum(own: np.ndarray, start: np.ndarray) -> np.ndarray:
        z, y = (logit[own] - centre) / spread, positive[own]
        return optimize.minimize(loss, start, args=(z, y, start), method="BFGS", options={"gtol": 1e-9}).x

    common = minimum(np.ones(len(cls), bool), np.array([spread, centre]))
    for k in range(K):
        a, b = minimum(cls == k, common)
        assert slope[k] == pytest.approx(a / spread, rel=1e-4)
        assert offset[k] == pytest.approx(b - a * centre / spread, rel=1e-4, abs=1e-4)


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


def test_a_class_whose_scores_mislead_keeps_its_order() -> None:
    rng = np.random.default_rng(1)
    cls, logit = np.repeat([0, 1], 300), rng.normal(size=600)
    positive = rng.random(600) < sigmoid(np.where(cls == 0, 3, -3) * logit)
    slope, _ = fit(cls, logit, positive, 2, CalibrationSettings(shrink=0.1))
    assert slope[0] > 1
    assert 0 < slope[1] < 0.02


def test_known_bias_is_undone_and_the_error_is_that_of_its_definition() -> None:
    cls, logit, positive = pairs(20_000)
    slope, offset = fit(cls, logit, positive, K, CalibrationSettings(shrink=1.0))
    before, after = sigmoid(logit), sigmoid(slope[cls] * logit + offset[cls])
    curve = reliability(before, positive, 10)
    true, said = calibration_curve(positive, before, n_bins=10)
    full = curve.count > 0
    np.testing.assert_allclose(curve.true[full], true)
    np.testing.assert_allclose(curve.said[full], said)
    assert curve.error == pytest.approx(np.abs(true - said) @ curve.count[full] / len(cls))
    assert curve.error > 0.1
    assert reliability(after, positive, 10).error < 0.02
    assert np.isnan(reliability(before[:0], positive[:0]).error)


def test_probability_one_falls_into_the_last_bin() -> None:
    curve = reliability(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 4)
    assert curve.count.tolist() == [1, 0, 0, 2]
    assert curve.error == pytest.approx(2 / 3 * 0.5)


def test_thresholds_have_the_bound_that_they_claim_and_ties_stand_together() -> None:
    rng = np.random.default_rng(2)
    score = np.round(rng.random(3000), 2)
    positive = rng.random(3000) < score
    cls = np.zeros(3000, np.int64)
    found = precision_thresholds(cls, score, positive, 1, precision=0.8, confidence=0.9)
    at = found.threshold[0]
    above = score >= at
    assert (found.above[0], found.hits[0]) == (above.sum(), (above & positive).sum())
    assert found.bound[0] >= 0.8
    single = stats.beta.ppf(0.1, found.hits[0], found.above[0] - found.hits[0] + 1)
    assert found.bound[0] < single  # many were tried, so each is held to more
    assert found.why_not(0) is None


def test_thresholds_keep_their_promise_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    broken, made = 0, 0
    for _ in range(60):
        cls, score = np.repeat(np.arange(10), 400), rng.random(4000)
        chance = 0.4 + 0.6 * score
        found = precision_thresholds(cls, score, rng.random(4000) < chance, 10, precision=0.85, confidence=0.8)
        for k in np.flatnonzero(np.isfinite(found.threshold)):
            made += 1
            own = (cls == k) & (score >= found.threshold[k])
            broken += chance[own].mean() < 0.85
    assert made > 200
    assert broken <= 0.2 * made


def test_classes_without_a_threshold_say_why() -> None:
    cls = np.array([0] * 10 + [1] * 500)
    score = np.linspace(0, 1, 510)
    found = precision_thresholds(cls, score, np.arange(510) % 2 == 0, 3, precision=0.9, confidence=0.9)
    assert not np.isfinite(found.threshold).any()
    assert found.needed == 22
    assert found.why_not(0) == "10 pairs, and at least 22 are needed"
    assert "best lower bound 0." in (found.why_not(1) or "")
    assert found.why_not(2) == "0 pairs, and at least 22 are needed"


def test_a_calibration_comes_back_from_its_file(tmp_path) -> None:
    cls, logit, positive = pairs()
    made = calibrate(cls, logit, positive, K, CalibrationSettings(precision=0.7), {"split": "validation"})
    path = str(tmp_path / "calibration.json")
    made.write(path)
    back = Calibration.read(path)
    np.testing.assert_array_equal(back.scores(logit, cls), made.scores(logit, cls))
    for name, values in made.thresholds._asdict().items():
        np.testing.assert_array_equal(getattr(back.thresholds, name), values)
    assert dataclasses.asdict(back)["facts"] == {"split": "validation"}
    assert np.isfinite(made.threshold).any()
    text = (tmp_path / "calibration.json").read_text()
    assert "people verified" in text
    assert '"no_threshold"' in text
    (tmp_path / "calibration.json").write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(DataError, match="schema version 9"):
        Calibration.read(path)
    (tmp_path / "calibration.json").write_text(text[:200])
    with pytest.raises(DataError, match="damaged"):
        Calibration.read(path)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match="positives and negatives"):
        fit(np.zeros(3, int), np.zeros(3), np.ones(3, bool), 1, CalibrationSettings())
    for changes in ({"method": "magic"}, {"shrink": 0}, {"precision": 1.0}, {"confidence": 0}, {"bins": 0}):
        with pytest.raises(SettingsError, match=f"calibration.{next(iter(changes))} is"):
            CalibrationSettings(**changes)
