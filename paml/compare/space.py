"""The space of a sweep: what its settings may be, and what its trials try. No torch, no Ray; Optuna for one search.

What is tried depends on the space, the seed and the scores known so far, never on the process that asks: a sweep
that was killed asks again and goes on.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from paml.errors import SettingsError

KINDS = ("choice", "uniform", "log_uniform", "int")
DIGITS = 4
"""Significant digits of what is drawn from a range, so that recipes can be read."""
_RANDOM_FIRST = 10
_REDRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Axis:
    """One setting that is varied, or several that move together."""

    name: str
    """Its dotted name, or names joined by commas, as the settings of the sweep give them."""
    kind: Literal["choice", "uniform", "log_uniform", "int"]
    values: tuple[Any, ...] = ()
    """Of a choice."""
    low: float = 0.0
    high: float = 0.0
    """Ends of a range, both included."""
    step: float | None = None
    """A range with a step holds low, low + step and so on; null for all of it."""

    @property
    def names(self) -> list[str]:
        """Dotted names that it sets."""
        return re.split(r"\s*,\s*", self.name.strip())

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All its values, None where there are too many to count."""
        if self.kind == "choice":
            return self.values
        step = self.step or (1 if self.kind == "int" else None)
        if step is None:
            return None
        return tuple(self._at(self.low + place * step) for place in range(self._steps(step) + 1))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that are wrong if any is: every one of a choice, both ends of a range."""
        return self.values if self.kind == "choice" else (self._at(self.low), self._at(self.high))

    def draw(self, rng: random.Random) -> Any:
        """One value, each (or each order of magnitude) as likely as another."""
        if (grid := self.grid) is not None:
            return grid[rng.randrange(len(grid))]
        if self.kind == "log_uniform":
            return self._at(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._at(rng.uniform(self.low, self.high))

    def settings(self, value: Any) -> dict[str, Any]:
        """Dotted name -> value; a choice among names that move together holds a list of one each, or one for all."""
        names = self.names
        if len(names) > 1 and isinstance(value, (list, tuple)):
            return dict(zip(names, value, strict=True))
        return dict.fromkeys(names, value)

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.name}: one of {', '.join(str(value) for value in self.values)}"
        step = f" by {self.step:g}" if self.step else ""
        return f"{self.name}: {self.kind} from {self.low:g} to {self.high:g}{step}"

    def _steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step * (1 + 1e-12) + 1e-9)

    def _at(self, value: float) -> Any:
        if self.kind == "int":
            return round(value)
        digits = 12 if self.step else DIGITS
        return min(self.high, max(self.low, float(f"{value:.{digits}g}")))


def parse_space(space: Mapping[str, Any]) -> list[Axis]:
    """The axes of a space as a sweep's settings write it. Raises SettingsError that names the axis and what is wrong.

    A list is a choice; a mapping names its kind: {uniform: [1, 9], step: 0.5}, {log_uniform: [1e-5, 1e-3]},
    {int: [1, 8]}, {choice: [a, b]}.
    """
    axes = [_axis(name, given) for name, given in space.items()]
    seen: dict[str, str] = {}
    for axis in axes:
        for name in axis.names:
            if name in seen:
                raise SettingsError(f"space: {name!r} is varied twice, by {seen[name]!r} and by {axis.name!r}")
            seen[name] = axis.name
    return axes


def _axis(name: str, given: Any) -> Axis:
    where = f"space: {name!r}"
    if isinstance(given, (list, tuple)):
        given = {"choice": given}
    kinds = [kind for kind in KINDS if isinstance(given, Mapping) and kind in given]
    if len(kinds) != 1:
        raise SettingsError(
            f"{where} is {given!r}; give a list of values, or one of {{choice: [...]}}, {{uniform: [low, high]}}, "
            "{log_uniform: [low, high]}, {int: [low, high]}, the second and the last also with step"
        )
    (kind,) = kinds
    unknown = set(given) - {kind, *(("step",) if kind in ("uniform", "int") else ())}
    if unknown:
        raise SettingsError(f"{where}: {', '.join(sorted(map(str, unknown)))} is no part of {kind}")
    if kind == "choice":
        return _choice(where, name, given[kind])
    return _range(where, name, kind, given[kind], given.get("step"))


def _choice(where: str, name: str, values: Any) -> Axis:
    if not isinstance(values, (list, tuple)) or not values:
        raise SettingsError(f"{where}: a choice is a list of at least one value, not {values!r}")
    axis = Axis(name, "choice", tuple(list(value) if isinstance(value, tuple) else value for value in values))
    for value in values:
        if len(axis.names) > 1 and isinstance(value, (list, tuple)) and len(value) != len(axis.names):
            raise SettingsError(f"{where} names {len(axis.names)} settings, {value!r} has {len(value)} values")
        if list(values).count(value) > 1:
            raise SettingsError(f"{where}: {value!r} stands twice")
    return axis


def _range(where: str, name: str, kind: Any, ends: Any, step: Any) -> Axis:
    numbers = (int,) if kind == "int" else (int, float)
    given = [*(ends if isinstance(ends, (list, tuple)) else [ends]), *([] if step is None else [step])]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value):
            hint = " (YAML takes 1e-4 for text: write 1.0e-4)" if isinstance(value, str) else ""
            raise SettingsError(f"{where}: {value!r} is no {'whole ' if kind == 'int' else ''}number{hint}")
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or ends[0] >= ends[1]:
        raise SettingsError(f"{where}: {kind} is {ends!r}; give [low, high] with low below high")
    if kind == "log_uniform" and ends[0] <= 0:
        raise SettingsError(f"{where}: log_uniform begins at {ends[0]!r}; it must begin above 0")
    if step is not None and not 0 < step <= ends[1] - ends[0]:
        raise SettingsError(f"{where}: step is {step!r}; it must be above 0 and fit into {list(ends)}")
    return Axis(name, kind, low=ends[0], high=ends[1], step=step)


def size_of(axes: Sequence[Axis]) -> float:
    """Points of the space; infinity where an axis is a range without a step."""
    return math.prod(math.inf if (grid := axis.grid) is None else len(grid) for axis in axes)


def grid_points(axes: Sequence[Axis], count: int, seed: int) -> list[dict[str, Any]]:
    """All points in order, or `count` of them without repeats where there are more."""
    whole = [
        dict(zip((axis.name for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.grid or () for axis in axes))
    ]
    if count >= len(whole):
        return whole
    return [whole[place] for place in sorted(random.Random(seed).sample(range(len(whole)), count))]


def random_points(axes: Sequence[Axis], seed: int) -> Iterator[dict[str, Any]]:
    """Different points without end (or until the space has hardly another): the first n are the same for every n."""
    rng, seen = random.Random(seed), set()
    while True:
        for _ in range(_REDRAWS):
            point = {axis.name: axis.draw(rng) for axis in axes}
            if repr(point) not in seen:
                break
        else:
            return
        seen.add(repr(point))
        yield point


@dataclasses.dataclass(frozen=True)
class Known:
    """A point that was tried or is being tried."""

    point: Mapping[str, Any]
    state: Literal["running", "finished", "stopped", "failed"]
    scores: Sequence[float] = ()
    """Of its epochs so far."""


def optuna_point(axes: Sequence[Axis], number: int, seed: int, known: Sequence[Known]) -> dict[str, Any]:
    """What Optuna's tree-structured Parzen estimator tries as trial `number`, by all that is known.

    The first ten are drawn at random. A stopped trial counts by how far it came, one that runs is taken for a bad one
    so that others look elsewhere, a failed one is left out.
    """
    import optuna  # a second, and of no use to the other searches

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=random.Random(f"{seed}-{number}").randrange(2**31), n_startup_trials=_RANDOM_FIRST, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    spans = {axis.name: _distribution(axis) for axis in axes}
    states = {"running": "RUNNING", "finished": "COMPLETE", "stopped": "PRUNED"}
    for each in known:
        if each.state == "failed" or (each.state != "running" and not each.scores):
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[states[each.state]],
                value=max(each.scores) if each.state == "finished" else None,
                params={axis.name: _coded(axis, each.point[axis.name]) for axis in axes},
                distributions=spans,
                intermediate_values=dict(enumerate(each.scores, 1)),
            )
        )
    found = study.ask(spans).params
    return {axis.name: _decoded(axis, found[axis.name]) for axis in axes}


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if axis.kind == "choice":  # by its place, since Optuna keeps no lists
        return distributions.CategoricalDistribution(range(len(axis.values)))
    if axis.kind == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high), step=int(axis.step or 1))
    if axis.kind == "log_uniform":
        return distributions.FloatDistribution(axis.low, axis.high, log=True)
    if axis.step:
        top = axis.low + axis._steps(axis.step) * axis.step
        return distributions.FloatDistribution(axis.low, top, step=axis.step)
    return distributions.FloatDistribution(axis.low, axis.high)


def _coded(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if axis.kind == "choice" else value


def _decoded(axis: Axis, value: Any) -> Any:
    return axis.values[value] if axis.kind == "choice" else axis._at(value)
