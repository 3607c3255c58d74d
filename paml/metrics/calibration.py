"""Calibrated probabilities, and thresholds for a target precision.

Partial labels trained as negatives bias scores low, so p = 0.5 is not a natural threshold. Temperature scaling (Guo et
al., ICML 2017) divides all logits by one number. Platt scaling (Platt, 1999) fits a slope and an offset, here per
class and shrunk towards those of all classes together, more so for a class with few pairs. Everything is fitted on
annotated pairs and is valid for such pairs only: see VALIDITY_NOTE.

Axes: K classes, n pairs.
"""

import dataclasses
import json
import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from paml import storage
from paml.errors import DataError, check_setting
from paml.parsing import parse_errors_as, read_json

SCHEMA_VERSION = 1
VALIDITY_NOTE = (
    "Valid for pairs like the annotated ones of the split that it was fitted on. On Open Images these are pairs that "
    "people verified, mostly because a classifier had proposed them: among all pairs of a new image positives are "
    "rarer, and precision is lower."
)
Method = Literal["platt", "temperature", "none"]
_MIN_SLOPE = 0.01
_GRID = 1.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How scores are calibrated and thresholds chosen."""

    method: Method = "platt"
    """platt: slope and offset per class, shrunk towards the common ones; temperature: one slope for all; none."""
    shrink: float = 5.0
    """Weight of the common fit against a class's own, in units of information: a pair with probability 0.5 has 0.25.
    Must be above 0, since the slope of a perfectly separated class would be infinite."""
    precision: float = 0.9
    """Target precision of the pairs at or above a class's threshold."""
    confidence: float = 0.9
    """Probability that a class's precision is at least the target (bound of Clopper and Pearson, with the error
    probability divided among the tried thresholds)."""
    bins: int = 15
    """Number of bins of equal width for the calibration error and the reliability diagram."""

    def __post_init__(self) -> None:
        methods, shrink = get_args(Method), self.shrink
        check_setting(self.method in methods, "calibration.method", self.method, " or ".join(methods))
        check_setting(math.isfinite(shrink) and shrink > 0, "calibration.shrink", shrink, "above 0")
        for name in ("precision", "confidence"):
            value = getattr(self, name)
            check_setting(0 < value < 1, f"calibration.{name}", value, "between 0 and 1")
        check_setting(self.bins >= 1, "calibration.bins", self.bins, "1 or more")


class Thresholds(NamedTuple):
    """For each class the lowest tried score with the target precision, and the counts behind it."""

    threshold: np.ndarray
    """float64 [K]; NaN if no threshold reaches the precision."""
    pairs_above: np.ndarray
    """int64 [K]: pairs at or above it; 0 without a threshold."""
    positives_above: np.ndarray
    """int64 [K]: positives among them."""
    bound: np.ndarray
    """float64 [K]: lower bound of the precision at the threshold, else the best bound tried; NaN without any."""
    pairs: np.ndarray
    """int64 [K]: all pairs of the class."""
    positives: np.ndarray
    """int64 [K]"""
    needed: int
    """Minimum number of pairs that a class needs for a threshold."""

    def missing_reason(self, cls: int) -> str | None:
        """Why a class has no threshold; None if it has one."""
        if np.isfinite(self.threshold[cls]):
            return None
        if self.pairs[cls] < self.needed:
            return f"{self.pairs[cls]} pairs; at least {self.needed} are needed"
        return f"no threshold reaches the precision (best lower bound {self.bound[cls]:.3f})"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibrated scores sigmoid(slope * logit + offset), and thresholds for them; stored as JSON with a model."""

    method: Method
    slope: np.ndarray
    """float64 [K], above 0: calibration never changes the order of the scores within a class."""
    offset: np.ndarray
    """float64 [K]"""
    thresholds: Thresholds
    precision: float
    confidence: float
    facts: dict[str, Any]
    """What it was fitted on (split, checkpoint, alpha), and the errors before and after."""

    @property
    def threshold(self) -> np.ndarray:
        """float64 [K], for calibrated scores; NaN for a class without one."""
        return self.thresholds.threshold

    def scores(self, logits: np.ndarray, cls: np.ndarray) -> np.ndarray:
        """Calibrated probabilities float64 [n] of logits [n] of classes [n]."""
        return sigmoid(self.slope[cls] * logits.astype(np.float64) + self.offset[cls])

    def write(self, path: str) -> None:
        """Write a JSON file, local or s3://, with one line per class."""
        thresholds = self.thresholds
        columns = {"slope": self.slope, "offset": self.offset} | thresholds._asdict()
        needed = columns.pop("needed")
        rows = []
        for k in range(len(self.slope)):
            row = {name: None if np.isnan(values[k]) else values[k].item() for name, values in columns.items()}
            reason = thresholds.missing_reason(k)
            rows.append(row if reason is None else row | {"no_threshold": reason})
        head = {"schema_version": SCHEMA_VERSION, "needed": needed, "holds_for": VALIDITY_NOTE}
        head |= {name: getattr(self, name) for name in ("method", "precision", "confidence", "facts")}
        text = json.dumps(head, indent=1)[:-2] + ',\n "classes": [\n  '
        text += ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"
        storage.write_bytes(path, text.encode())

    @classmethod
    def read(cls, path: str) -> "Calibration":
        """Read a file from `write`. Raises DataError if it is damaged or has another schema version."""
        facts = read_json(path, "calibrate again")
        with parse_errors_as(path, "calibrate again"):
            if facts["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {facts['schema_version']}, this paml reads {SCHEMA_VERSION}: "
                    "calibrate again with this paml"
                )
            rows = facts["classes"]

            def column(name: str) -> np.ndarray:
                kind = np.int64 if name.startswith(("pairs", "positives")) else np.float64
                return np.array([math.nan if row[name] is None else row[name] for row in rows], kind)

            thresholds = Thresholds._make([*map(column, Thresholds._fields[:-1]), facts["needed"]])
            slope, offset = column("slope"), column("offset")
            if not (np.isfinite(slope).all() and (slope > 0).all() and np.isfinite(offset).all()):
                raise ValueError("a slope is not above 0, or an offset is not finite")
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

    Raises DataError unless there are positives and negatives.
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
    """(slope, offset), float64 [K] each; slopes are above 0.

    platt minimizes, for each class, the sum of log losses + shrink/2 * (dslope^2 + doffset^2), where d is the
    difference from the common fit, for logits standardized over all pairs. The common fit is shrunk in the same way
    towards slope 1 and offset 0 of the logits themselves. temperature minimizes the log loss of all pairs.
    Raises DataError.
    """
    if not 0 < np.count_nonzero(positive) < len(positive):
        raise DataError(
            f"of {len(positive):,} annotated pairs {np.count_nonzero(positive):,} are positive: calibration needs "
            "positives and negatives; use a split with both"
        )
    ones, zeros = np.ones(num_classes), np.zeros(num_classes)
    if settings.method == "none":
        return ones, zeros
    logit, truth = logit.astype(np.float64), positive.astype(np.float64)
    if settings.method == "temperature":
        scale = math.sqrt(float(np.mean(logit**2))) or 1.0
        common = np.zeros(len(logit), np.int64)
        slope, _ = _minimize(logit / scale, truth, common, 1, (scale, 0.0), 0.0, free_offset=False)
        return ones * (slope[0] / scale), zeros
    center, spread = float(logit.mean()), float(logit.std()) or 1.0
    z, common = (logit - center) / spread, np.zeros(len(logit), np.int64)
    identity = (spread, center)  # slope 1 and offset 0 of the logits, for z
    (slope,), (offset,) = _minimize(z, truth, common, 1, identity, settings.shrink)
    slopes, offsets = _minimize(z, truth, cls.astype(np.int64), num_classes, (slope, offset), settings.shrink)
    return slopes / spread, offsets - slopes * center / spread


def _minimize(
    z: np.ndarray,
    truth: np.ndarray,
    group: np.ndarray,
    groups: int,
    start: tuple[float, float],
    shrink: float,
    *,
    free_offset: bool = True,
) -> np.ndarray:
    """Slopes and offsets [2, groups], shrunk towards `start`: the minimum of a convex loss for slope >= _MIN_SLOPE."""
    from scipy.optimize import minimize

    center = np.array(start)[:, None]
    # In units of each group's information, about 1/4 per pair, the loss is equally curved in all groups.
    unit = 1 / np.sqrt(np.bincount(group, minlength=groups) / 4 + shrink + 1e-12)

    def loss(steps: np.ndarray) -> tuple[float, np.ndarray]:
        change = steps.reshape(2, groups) * unit
        slope, offset = center + change
        x = slope[group] * z + offset[group]
        residual = sigmoid(x) - truth
        gradient = np.stack([np.bincount(group, residual * z, groups), np.bincount(group, residual, groups)])
        value = np.sum(np.logaddexp(0.0, x) - truth * x) + shrink / 2 * np.sum(change**2)
        return value, ((gradient + shrink * change) * unit).ravel()

    no_bound, fixed = (-np.inf, np.inf), (0.0, 0.0)
    bounds = [((_MIN_SLOPE - start[0]) / u, np.inf) for u in unit] + [no_bound if free_offset else fixed] * groups
    first = np.clip(np.zeros(2 * groups), *np.transpose(bounds))
    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 1e-6}
    result = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    slope, offset = center + result.x.reshape(2, groups) * unit
    return np.stack([np.maximum(slope, _MIN_SLOPE), offset])


def precision_thresholds(
    cls: np.ndarray, score: np.ndarray, positive: np.ndarray, num_classes: int, *, precision: float, confidence: float
) -> Thresholds:
    """For each class the lowest score at which the precision of the pairs at or above it reaches the target.

    The scores at a geometric sequence of ranks are tried. The ranks do not depend on the truth, and the error
    probability 1 - confidence is divided among them, so the bound of Clopper and Pearson also holds for the lowest one
    chosen. A class with too few pairs has no threshold.
    """
    from scipy.stats import beta

    needed = max(1, math.ceil(math.log(1 - confidence) / math.log(precision)))
    order = np.lexsort((-score, cls))
    ends = np.searchsorted(cls[order], np.arange(num_classes + 1))
    chosen = Thresholds(
        threshold=np.full(num_classes, np.nan),
        pairs_above=np.zeros(num_classes, np.int64),
        positives_above=np.zeros(num_classes, np.int64),
        bound=np.full(num_classes, np.nan),
        pairs=np.bincount(cls, minlength=num_classes),
        positives=np.bincount(cls[positive], minlength=num_classes),
        needed=needed,
    )
    for k in range(num_classes):
        own = order[ends[k] : ends[k + 1]]
        ranks = _ranks(needed, len(own))
        if not len(ranks):
            continue
        values, hits_so_far = score[own], np.cumsum(positive[own])
        # Pairs with equal scores are on the same side of a threshold.
        counts = np.unique(np.searchsorted(-values, -values[ranks - 1], side="right"))
        hits = hits_so_far[counts - 1]
        error = (1 - confidence) / len(counts)
        bounds = np.where(hits > 0, beta.ppf(error, np.maximum(hits, 1), counts - hits + 1), 0.0)
        reached = np.flatnonzero(bounds >= precision)
        chosen.bound[k] = bounds.max()
        if len(reached):
            last = reached[-1]
            chosen.threshold[k], chosen.bound[k] = values[counts[last] - 1], bounds[last]
            chosen.pairs_above[k], chosen.positives_above[k] = counts[last], hits[last]
    return chosen


def _ranks(first: int, last: int) -> np.ndarray:
    """first, ..., last, each about _GRID times the one before."""
    if last < first:
        return np.empty(0, np.int64)
    count = 1 + max(0, math.ceil(math.log(last / first) / math.log(_GRID)))
    return np.unique(np.minimum(np.ceil(first * _GRID ** np.arange(count + 1)), last).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predicted and observed frequencies of positives, in bins of equal width."""

    count: np.ndarray
    """int64 [bins]"""
    predicted: np.ndarray
    """float64 [bins]: mean probability; NaN in an empty bin."""
    observed: np.ndarray
    """float64 [bins]: fraction of positives; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |predicted - observed| over the pairs. NaN without pairs."""
        if not self.count.sum():
            return math.nan
        full = self.count > 0
        gap = np.abs(self.predicted[full] - self.observed[full])
        return float((gap * self.count[full]).sum() / self.count.sum())


def reliability(probability: np.ndarray, positive: np.ndarray, bins: int = 15) -> Reliability:
    """Bins [i/bins, (i+1)/bins), the last one closed, of probabilities float [n] and truths bool [n]."""
    bin_ = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(bin_, probability, bins) / count
        observed = np.bincount(bin_, positive.astype(np.float64), bins) / count
    return Reliability(count, predicted, observed)


def log_loss(probability: np.ndarray, positive: np.ndarray) -> float:
    """Mean log loss in nats."""
    p = np.clip(probability.astype(np.float64), 1e-15, 1 - 1e-15)
    return float(-np.mean(np.where(positive, np.log(p), np.log1p(-p))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1/(1 + exp(-x)) without overflow."""
    from scipy.special import expit

    return expit(x)
