"""Scores that mean something: calibrated probabilities, and thresholds for a wanted precision.

Partial labels trained as negatives bias scores low, so p = 0.5 is no natural threshold. Temperature scaling (Guo et
al., ICML 2017) divides all logits by one number; Platt scaling (Platt, 1999) fits slope and offset, here for each
class, drawn to those of all classes together as far as a class has few pairs. All ranges over annotated pairs, and
holds for such pairs only: see HOLDS_FOR.

Axes: K classes, n pairs.
"""

import dataclasses
import json
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from paml import storage
from paml.errors import DataError, SettingsError
from paml.reading import read_facts, reading

SCHEMA_VERSION = 1
HOLDS_FOR = (
    "Holds for pairs as those of the split that it was fitted on, which are the annotated ones: on Open Images these "
    "are pairs that people verified, mostly because a classifier had proposed them, so among all pairs of a new image "
    "positives are rarer, and precision lower."
)
Method = Literal["platt", "temperature", "none"]
_LEAST_SLOPE = 0.01
_NEWTON_STEPS = 100
_GRID = 1.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How scores are calibrated and thresholds chosen."""

    method: Method = "platt"
    """platt: slope and offset of each class, drawn to the common ones; temperature: one slope for all; none."""
    shrink: float = 5.0
    """Pull of the common fit on a class's own, in units of information: a pair whose probability is 0.5 has 0.25.
    0 is none, and refused for platt, since classes that are told apart without fault would have an endless slope."""
    precision: float = 0.9
    """Precision wanted of the pairs at or above a class's threshold."""
    confidence: float = 0.9
    """Probability with which a class's precision is to be at least that wanted (Clopper and Pearson's bound, divided
    among the thresholds tried)."""
    bins: int = 15
    """Bins of equal width for the calibration error and the reliability diagram."""

    def __post_init__(self) -> None:
        if self.method not in ("platt", "temperature", "none"):
            raise SettingsError(f"calibration.method is {self.method!r}; allowed are platt, temperature, none")
        if not (math.isfinite(self.shrink) and self.shrink > 0):
            raise SettingsError(f"calibration.shrink is {self.shrink}; it must be above 0")
        for name in ("precision", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise SettingsError(f"calibration.{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.bins < 1:
            raise SettingsError(f"calibration.bins is {self.bins}; it must be at least 1")


class Thresholds(NamedTuple):
    """For each class the lowest tried score with the wanted precision, and what it rests on."""

    threshold: np.ndarray
    """float64 [K]; NaN where no threshold reaches the precision."""
    above: np.ndarray
    """int64 [K]: pairs at or above it; 0 where there is none."""
    hits: np.ndarray
    """int64 [K]: positives among them."""
    bound: np.ndarray
    """float64 [K]: lower bound of the precision at the threshold, or the best bound of those tried; NaN without any."""
    pairs: np.ndarray
    """int64 [K]: all pairs of the class."""
    positives: np.ndarray
    """int64 [K]"""
    needed: int
    """Pairs that a class needs at least for any threshold."""

    def why_not(self, cls: int) -> str | None:
        """Why a class has no threshold, in words; None where it has one."""
        if np.isfinite(self.threshold[cls]):
            return None
        if self.pairs[cls] < self.needed:
            return f"{self.pairs[cls]} pairs, and at least {self.needed} are needed"
        return f"no threshold is sure to reach it (best lower bound {self.bound[cls]:.3f})"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibrated scores sigmoid(slope·logit + offset), and thresholds on them; stored as JSON with a model."""

    method: Method
    slope: np.ndarray
    """float64 [K], above 0: no calibration changes the order of the scores within a class."""
    offset: np.ndarray
    """float64 [K]"""
    thresholds: Thresholds
    precision: float
    confidence: float
    facts: dict[str, Any]
    """What it was fitted on, and how well: split, checkpoint, alpha, errors before and after."""

    @property
    def threshold(self) -> np.ndarray:
        """float64 [K] on calibrated scores; NaN where a class has none."""
        return self.thresholds.threshold

    def scores(self, logits: np.ndarray, cls: np.ndarray) -> np.ndarray:
        """Calibrated probabilities float64 [n] of logits [n] of classes [n]."""
        return sigmoid(self.slope[cls] * logits.astype(np.float64) + self.offset[cls])

    def write(self, path: str, classes: "tuple[str, ...] | None" = None) -> None:
        """To a JSON file, local or s3://, a line a class."""
        found = self.thresholds
        rows = []
        for k in range(len(self.slope)):
            reached = bool(np.isfinite(found.threshold[k]))
            rows.append(
                {
                    "slope": float(self.slope[k]),
                    "offset": float(self.offset[k]),
                    "threshold": float(found.threshold[k]) if reached else None,
                    "pairs_above": int(found.above[k]),
                    "positives_above": int(found.hits[k]),
                    "bound": float(found.bound[k]) if np.isfinite(found.bound[k]) else None,
                    "pairs": int(found.pairs[k]),
                    "positives": int(found.positives[k]),
                }
            )
            if not reached:
                rows[-1]["no_threshold"] = found.why_not(k)
        head = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "precision": self.precision,
            "confidence": self.confidence,
            "needed": found.needed,
            "holds_for": HOLDS_FOR,
            "facts": self.facts,
        }
        text = json.dumps(head, indent=1)[:-2] + ',\n "classes": [\n  '
        text += ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"
        storage.write_bytes(path, text.encode())

    @classmethod
    def read(cls, path: str) -> "Calibration":
        """What `write` wrote. Raises DataError where it is damaged or of another schema version."""
        facts = read_facts(path, "calibrate again")
        with reading(path, "calibrate again"):
            if facts["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {facts['schema_version']}, this paml reads {SCHEMA_VERSION}: "
                    "calibrate again with this paml"
                )
            rows = facts["classes"]

            def column(name: str, kind: type) -> np.ndarray:
                return np.array([math.nan if row[name] is None else row[name] for row in rows], kind)

            thresholds = Thresholds(
                column("threshold", np.float64),
                column("pairs_above", np.int64),
                column("positives_above", np.int64),
                column("bound", np.float64),
                column("pairs", np.int64),
                column("positives", np.int64),
                facts["needed"],
            )
            slope, offset = column("slope", np.float64), column("offset", np.float64)
            if not (np.isfinite(slope).all() and (slope > 0).all() and np.isfinite(offset).all()):
                raise ValueError("a slope is not above 0, or an offset no number")
            return cls(
                facts["method"], slope, offset, thresholds, facts["precision"], facts["confidence"], facts["facts"]
            )


def calibrate(
    cls: np.ndarray,
    logit: np.ndarray,
    positive: np.ndarray,
    num_classes: int,
    settings: CalibrationSettings,
    facts: dict[str, Any] | None = None,
) -> Calibration:
    """Fit on annotated pairs: classes int [n], logits float [n], truth bool [n].

    Raises DataError where there are no pairs, or all are of one kind, so that nothing can be fitted.
    """
    slope, offset = fit(cls, logit, positive, num_classes, settings)
    score = sigmoid(slope[cls] * logit.astype(np.float64) + offset[cls])
    thresholds = precision_thresholds(
        cls, score, positive, num_classes, precision=settings.precision, confidence=settings.confidence
    )
    return Calibration(settings.method, slope, offset, thresholds, settings.precision, settings.confidence, facts or {})


def fit(
    cls: np.ndarray, logit: np.ndarray, positive: np.ndarray, num_classes: int, settings: CalibrationSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(slope, offset), float64 [K] each, above 0 the slopes.

    platt minimises, for each class, the sum of log losses plus shrink/2·(Δslope² + Δoffset²), where Δ is the distance
    from the common fit in logits that are standardised over all pairs; the common fit is drawn likewise to slope 1 and
    offset 0 of the logits themselves. temperature minimises the log loss of all pairs. Raises DataError.
    """
    if not 0 < np.count_nonzero(positive) < len(positive):
        raise DataError(
            f"of {len(positive):,} annotated pairs {np.count_nonzero(positive):,} are positive: a calibration needs "
            "positives and negatives, so choose a split that has both"
        )
    ones, zeros = np.ones(num_classes), np.zeros(num_classes)
    if settings.method == "none":
        return ones, zeros
    logit, truth = logit.astype(np.float64), positive.astype(np.float64)
    if settings.method == "temperature":
        scale = math.sqrt(float(np.mean(logit**2))) or 1.0
        common = np.zeros(len(logit), np.int64)
        slope, _ = _newton(logit / scale, truth, common, 1, (scale, 0.0), 0.0, free_offset=False)
        return ones * (slope[0] / scale), zeros
    centre, spread = float(logit.mean()), float(logit.std()) or 1.0
    z, common = (logit - centre) / spread, np.zeros(len(logit), np.int64)
    identity = (spread, centre)  # slope 1 and offset 0 of the logits, in terms of z
    (slope,), (offset,) = _newton(z, truth, common, 1, identity, settings.shrink)
    slopes, offsets = _newton(z, truth, cls.astype(np.int64), num_classes, (slope, offset), settings.shrink)
    return slopes / spread, offsets - slopes * centre / spread


def _newton(
    z: np.ndarray,
    truth: np.ndarray,
    group: np.ndarray,
    groups: int,
    start: tuple[float, float],
    shrink: float,
    *,
    free_offset: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset of each group, drawn to `start`: the minimum under slope ≥ _LEAST_SLOPE.

    The loss is convex, so a group whose free slope falls below the least one has its minimum at the least one.
    """
    slope, offset = np.full(groups, start[0]), np.full(groups, start[1])
    slope, offset = _descend(z, truth, group, slope, offset, start, shrink, np.ones(groups, bool), free_offset)
    low = slope < _LEAST_SLOPE
    if low.any():
        slope = np.where(low, _LEAST_SLOPE, slope)
        if free_offset:
            slope, offset = _descend(z, truth, group, slope, offset, start, shrink, ~low, free_offset)
    return slope, offset


def _descend(
    z: np.ndarray,
    truth: np.ndarray,
    group: np.ndarray,
    slope: np.ndarray,
    offset: np.ndarray,
    start: tuple[float, float],
    shrink: float,
    free_slope: np.ndarray,
    free_offset: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for all groups at once, each with a step of its own that is halved until its loss falls."""
    groups = len(slope)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, values, groups)

    def loss(slope: np.ndarray, offset: np.ndarray) -> np.ndarray:
        x = slope[group] * z + offset[group]
        own = total(np.logaddexp(0.0, x) - truth * x)
        return own + shrink / 2 * ((slope - start[0]) ** 2 + (offset - start[1]) ** 2)

    before = loss(slope, offset)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(slope[group] * z + offset[group])
        weight = p * (1 - p)
        down_slope = total((p - truth) * z) + shrink * (slope - start[0])
        down_offset = total(p - truth) + shrink * (offset - start[1])
        curve_ss, curve_oo, curve_so = total(weight * z * z) + shrink, total(weight) + shrink, total(weight * z)
        if not free_offset:
            down_offset, curve_so, curve_oo = np.zeros(groups), np.zeros(groups), np.ones(groups)
        down_slope = np.where(free_slope, down_slope, 0.0)
        curve_so = np.where(free_slope, curve_so, 0.0)
        if max(np.abs(down_slope).max(), np.abs(down_offset).max()) < 1e-9 * max(1.0, len(z) / groups):
            break
        area = np.maximum(curve_ss * curve_oo - curve_so**2, 1e-300)
        step_slope = (curve_oo * down_slope - curve_so * down_offset) / area
        step_offset = (curve_ss * down_offset - curve_so * down_slope) / area
        share = np.ones(groups)
        for _ in range(40):
            after = loss(slope - share * step_slope, offset - share * step_offset)
            worse = after > before + 1e-12 * np.abs(before)
            if not worse.any():
                break
            share = np.where(worse, share / 2, share)
        slope, offset = slope - share * step_slope, offset - share * step_offset
        before = loss(slope, offset)
    return slope, offset


def precision_thresholds(
    cls: np.ndarray,
    score: np.ndarray,
    positive: np.ndarray,
    num_classes: int,
    *,
    precision: float,
    confidence: float,
) -> Thresholds:
    """For each class the lowest score such that the precision of the pairs at or above it is surely as wanted.

    Tried are the scores at a geometric row of ranks, which depend on the scores alone and never on the truth; the error
    probability 1 - confidence is divided among them, so that the choice of the lowest does not spoil the bound of
    Clopper and Pearson. So a class without enough pairs has no threshold, and none is made up for it.
    """
    from scipy.stats import beta

    needed = max(1, math.ceil(math.log(1 - confidence) / math.log(precision)))
    order = np.lexsort((-score, cls))
    ends = np.searchsorted(cls[order], np.arange(num_classes + 1))
    threshold, bound = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    above, hits = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for k in range(num_classes):
        own = order[ends[k] : ends[k + 1]]
        ranks = _ranks(needed, len(own))
        if not len(ranks):
            continue
        values, found = score[own], np.cumsum(positive[own])
        # pairs of one score stand or fall together
        counts = np.unique(np.searchsorted(-values, -values[ranks - 1], side="right"))
        right = found[counts - 1]
        error = (1 - confidence) / len(counts)
        bounds = np.where(right > 0, beta.ppf(error, np.maximum(right, 1), counts - right + 1), 0.0)
        reached = np.flatnonzero(bounds >= precision)
        bound[k] = bounds.max()
        if len(reached):
            last = reached[-1]
            threshold[k], bound[k] = values[counts[last] - 1], bounds[last]
            above[k], hits[k] = counts[last], right[last]
    return Thresholds(
        threshold,
        above,
        hits,
        bound,
        np.bincount(cls, minlength=num_classes),
        np.bincount(cls[positive], minlength=num_classes),
        needed,
    )


def _ranks(first: int, last: int) -> np.ndarray:
    """first, … , last, each about _GRID times the one before."""
    if last < first:
        return np.empty(0, np.int64)
    count = 1 + max(0, math.ceil(math.log(last / first) / math.log(_GRID)))
    return np.unique(np.minimum(np.ceil(first * _GRID ** np.arange(count + 1)), last).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Probabilities in bins of equal width: what was said, and what was true."""

    count: np.ndarray
    """int64 [bins]"""
    said: np.ndarray
    """float64 [bins]: mean probability; NaN in an empty bin."""
    true: np.ndarray
    """float64 [bins]: share of positives; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |said - true| over the pairs. NaN without pairs."""
        if not self.count.sum():
            return math.nan
        full = self.count > 0
        gap = np.abs(self.said[full] - self.true[full])
        return float((gap * self.count[full]).sum() / self.count.sum())


def reliability(probability: np.ndarray, positive: np.ndarray, bins: int = 15) -> Reliability:
    """Bins [i/bins, (i+1)/bins), the last one closed, of probabilities float [n] and truth bool [n]."""
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        said = np.bincount(place, probability, bins) / count
        true = np.bincount(place, positive.astype(np.float64), bins) / count
    return Reliability(count, said, true)


def log_loss(probability: np.ndarray, positive: np.ndarray) -> float:
    """Mean log loss in nats."""
    p = np.clip(probability.astype(np.float64), 1e-15, 1 - 1e-15)
    return float(-np.mean(np.where(positive, np.log(p), np.log1p(-p))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1/(1 + exp(-x)) without overflow."""
    from scipy.special import expit

    return expit(x)
