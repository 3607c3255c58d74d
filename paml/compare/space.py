"""The search space of a sweep: its axes, the points of grid and random search, and the trials.

Points depend on the space and the seed alone, so that a restarted sweep continues with the same ones.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from paml.errors import SettingsError

Kind = Literal["uniform", "log_uniform", "int"]
DIGITS = 4
"""Significant digits of a value sampled from a range, to keep recipes readable."""
_MAX_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting that varies, or several that change together."""

    name: str
    """Dotted name, or names joined by commas, as written in the settings of the sweep."""
    kind: Literal["choice"] | Kind
    values: tuple[Any, ...] = ()
    """Of a choice."""
    low: float = 0.0
    high: float = 0.0
    """Ends of a range, both included."""
    step: float | None = None
    """A range with a step contains low, low + step, ...; always set for integers."""

    @property
    def names(self) -> list[str]:
        """The dotted names that it sets."""
        return re.split(r"\s*,\s*", self.name.strip())

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All values, or None for a continuous range."""
        if self.kind == "choice":
            return self.values
        if self.step is None:
            return None
        return tuple(self.round(self.low + i * self.step) for i in range(self.num_steps + 1))

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values to validate: if these are valid, all are."""
        return self.values if self.kind == "choice" else (self.round(self.low), self.round(self.high))

    def sample(self, rng: random.Random) -> Any:
        """A random value, uniform over the values (over their logarithms with log_uniform)."""
        if (grid := self.grid) is not None:
            return grid[rng.randrange(len(grid))]
        if self.kind == "log_uniform":
            return self.round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.round(rng.uniform(self.low, self.high))

    def settings(self, value: Any) -> dict[str, Any]:
        """Dotted name -> value. With several names `value` is a list with one entry per name, or one value for all."""
        names = self.names
        if len(names) > 1 and isinstance(value, (list, tuple)):
            return dict(zip(names, value, strict=True))
        return dict.fromkeys(names, value)

    @property
    def num_steps(self) -> int:
        """Steps from low to high, whatever the rounding of floats."""
        return math.floor((self.high - self.low) / (self.step or 1) * (1 + 1e-12) + 1e-9)

    def round(self, value: float) -> Any:
        """A value of the range with few digits."""
        if self.kind == "int":
            return round(value)
        digits = 12 if self.step else DIGITS
        return min(self.high, max(self.low, float(f"{value:.{digits}g}")))

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.name}: one of {', '.join(str(value) for value in self.values)}"
        step = f" by {self.step:g}" if self.step and (self.kind, self.step) != ("int", 1) else ""
        return f"{self.name}: {self.kind} from {self.low:g} to {self.high:g}{step}"


def format_value(value: Any) -> str:
    """A value of an axis for a table or a plot."""
    if isinstance(value, (list, tuple)):
        return "/".join(format_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_space(space: Mapping[str, Any]) -> list[Axis]:
    """The axes of `TuneSettings.space`. Raises SettingsError that names the axis and what is wrong."""
    axes = [_parse_axis(name, spec) for name, spec in space.items()]
    names = [name for axis in axes for name in axis.names]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"space: {name!r} appears twice")
    return axes


def _parse_axis(name: str, spec: Any) -> Axis:
    where = f"space: {name!r}"
    if isinstance(spec, (list, tuple)) and spec:
        return _parse_choice(where, name, spec)
    kinds = [kind for kind in get_args(Kind) if isinstance(spec, Mapping) and kind in spec]
    if not isinstance(spec, Mapping) or len(kinds) != 1:
        raise SettingsError(
            f"{where} is {spec!r}; give a list of values, or one of {{uniform: [low, high]}}, "
            "{log_uniform: [low, high]}, {int: [low, high]}; uniform and int also take a step"
        )
    (kind,) = kinds
    unknown = set(spec) - ({kind} if kind == "log_uniform" else {kind, "step"})
    if unknown:
        raise SettingsError(f"{where}: {kind} does not take {', '.join(sorted(map(str, unknown)))}")
    return _parse_range(where, name, kind, spec[kind], spec.get("step"))


def _parse_choice(where: str, name: str, values: Sequence[Any]) -> Axis:
    axis = Axis(name, "choice", tuple(list(value) if isinstance(value, tuple) else value for value in values))
    labels = [format_value(value) for value in values]
    for value, label in zip(values, labels, strict=True):
        if len(axis.names) > 1 and isinstance(value, (list, tuple)) and len(value) != len(axis.names):
            raise SettingsError(f"{where} names {len(axis.names)} settings, but {value!r} has {len(value)} values")
        if labels.count(label) > 1:
            raise SettingsError(f"{where}: {value!r} appears twice")
    return axis


def _parse_range(where: str, name: str, kind: Any, ends: Any, step: Any) -> Axis:
    types = (int,) if kind == "int" else (int, float)
    for value in [*(ends if isinstance(ends, (list, tuple)) else [ends]), *([] if step is None else [step])]:
        if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
            hint = " (in YAML 1e-4 is text: write 1.0e-4)" if isinstance(value, str) else ""
            raise SettingsError(f"{where}: {value!r} is not {'an integer' if kind == 'int' else 'a number'}{hint}")
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or ends[0] >= ends[1]:
        raise SettingsError(f"{where}: {kind} is {ends!r}; give [low, high] with low < high")
    if kind == "log_uniform" and ends[0] <= 0:
        raise SettingsError(f"{where}: log_uniform starts at {ends[0]!r}; it must start above 0")
    if step is not None and not 0 < step <= ends[1] - ends[0]:
        raise SettingsError(f"{where}: step is {step!r}; it must be above 0 and at most {ends[1] - ends[0]:g}")
    return Axis(name, kind, low=ends[0], high=ends[1], step=step or (1 if kind == "int" else None))


def space_size(axes: Sequence[Axis]) -> float:
    """Number of points; infinity with a continuous range."""
    return math.prod(math.inf if (grid := axis.grid) is None else len(grid) for axis in axes)


def grid_points(axes: Sequence[Axis], count: int, seed: int) -> list[dict[str, Any]]:
    """All points in order, or a random sample of `count` if there are more."""
    points = [
        dict(zip((axis.name for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.grid or () for axis in axes))
    ]
    if count >= len(points):
        return points
    return [points[i] for i in sorted(random.Random(seed).sample(range(len(points)), count))]


def random_points(axes: Sequence[Axis], seed: int) -> Iterator[dict[str, Any]]:
    """Distinct random points, until the space is almost exhausted. A longer sequence starts with the shorter one."""
    rng, seen = random.Random(seed), set()
    while True:
        for _ in range(_MAX_RESAMPLES):
            point = {axis.name: axis.sample(rng) for axis in axes}
            if repr(point) not in seen:
                break
        else:
            return
        seen.add(repr(point))
        yield point


STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running"}
"""State of a trial -> how reports call it."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the search space and its results."""

    number: int
    """From 1."""
    point: dict[str, Any]
    """Name of an axis -> value."""
    state: Literal["running", "finished", "stopped", "failed"]
    scores: tuple[float, ...] = ()
    """Validation mAP per epoch, without epochs that train the head alone; -1 instead of NaN."""
    seconds: float = 0.0
    """Training time, without attempts that were killed together with the driver."""
    error: str | None = None
    permanent: bool = False
    """Whether the error would occur again: the trial is not restarted."""
    method: str = ""

    @property
    def score(self) -> float:
        """The best epoch's validation mAP, or NaN."""
        return max(self.scores, default=math.nan)

    @property
    def epoch(self) -> int:
        """The best epoch, from 1; 0 without scores."""
        return self.scores.index(self.score) + 1 if self.scores else 0


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The best finished trial; if none has finished, the best of those with a score."""
    scored = [trial for trial in trials if trial.scores]
    finished = [trial for trial in scored if trial.state == "finished"]
    return max(finished or scored, key=lambda trial: (trial.score, -trial.number), default=None)


def rank_trials(trials: Iterable[Trial]) -> list[Trial]:
    """Best first, those without a score last."""
    return sorted(trials, key=lambda trial: (-trial.score if trial.scores else math.inf, trial.number))


def count_states(trials: Iterable[Trial]) -> dict[str, int]:
    """State -> number of trials, without states that no trial is in."""
    states = [trial.state for trial in trials]
    return {state: states.count(state) for state in STATES if state in states}
