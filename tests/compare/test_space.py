"""The space of a sweep: what it may be told, and what its trials try."""

import math
import random
from itertools import islice
from typing import Any

import pytest

from paml.compare.settings import SweepSettings
from paml.compare.space import Known, grid_points, optuna_point, parse_space, random_points, size_of
from paml.errors import SettingsError

SPACE: dict[str, Any] = {
    "loss.name": ["ll-r", "ll-ct"],
    "boost.train, boost.eval": [[1, 5], 3],
    "boost.schedule_epochs": {"int": [2, 8], "step": 3},
    "loss.correct_threshold": {"uniform": [0.5, 0.9], "step": 0.1},
}
RANGES: dict[str, Any] = {
    "loss.reject_rate_step": {"log_uniform": [1e-5, 1e-2]},
    "optimiser.learning_rate": {"uniform": [0.25, 0.75]},
}


def test_axes():
    name, boost, epochs, threshold = parse_space(SPACE)
    assert name.grid == ("ll-r", "ll-ct")
    assert boost.settings([1, 5]) == {"boost.train": 1, "boost.eval": 5}
    assert boost.settings(3) == {"boost.train": 3, "boost.eval": 3}
    assert epochs.grid == (2, 5, 8)
    assert threshold.grid == (0.5, 0.6, 0.7, 0.8, 0.9)
    assert size_of([name, boost, epochs, threshold]) == 2 * 2 * 3 * 5
    assert math.isinf(size_of(parse_space(RANGES)))
    assert [axis.ends for axis in parse_space(RANGES)] == [(1e-5, 1e-2), (0.25, 0.75)]


def test_grid():
    axes = parse_space(SPACE)
    whole = grid_points(axes, 60, 0)
    assert len({repr(point) for point in whole}) == 60
    some = grid_points(axes, 7, 3)
    assert some == grid_points(axes, 7, 3)
    assert len({repr(point) for point in some}) == 7
    assert all(point in whole for point in some)


def test_random_points_are_different_and_the_same_again():
    axes = parse_space(SPACE | RANGES)
    points = list(islice(random_points(axes, 4), 30))
    assert points[:12] == list(islice(random_points(axes, 4), 12))
    assert points != list(islice(random_points(axes, 5), 30))
    steps = [point["loss.reject_rate_step"] for point in points]
    assert all(1e-5 <= step <= 1e-2 and step == float(f"{step:.4g}") for step in steps)
    assert 5 < sum(step < 10**-3.5 for step in steps) < 25
    small = parse_space({"loss.name": ["ll-r", "ll-ct", "ll-cp"]})
    assert sorted(point["loss.name"] for point in random_points(small, 0)) == ["ll-cp", "ll-ct", "ll-r"]


def known(axes: list, count: int, state: Any, seed: int = 0) -> list[Known]:
    """Trials whose score falls with the distance of the rate from 1e-3, and is better for the second scheme."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        point = {axis.name: axis.draw(rng) for axis in axes}
        score = 1 - abs(math.log10(point["loss.reject_rate_step"]) + 3) / 3 - 0.3 * (point["loss.name"] == "ll-r")
        found.append(Known(point, state, (score / 2, score)))
    return found


def test_optuna_finds_what_is_good_and_says_the_same_again():
    axes = parse_space({"loss.name": SPACE["loss.name"], **RANGES})
    past = known(axes, 30, "finished") + known(axes, 10, "stopped", 1)
    points = [optuna_point(axes, number, 7, past) for number in range(41, 61)]
    assert points == [optuna_point(axes, number, 7, past) for number in range(41, 61)]
    assert len({repr(point) for point in points}) == 20
    near = [abs(math.log10(point["loss.reject_rate_step"]) + 3) < 0.75 for point in points]
    assert sum(near) > 14  # half of them, were they drawn at random
    assert sum(point["loss.name"] == "ll-ct" for point in points) > 14


def test_optuna_takes_every_kind_and_state():
    axes = parse_space(SPACE | RANGES)
    rng = random.Random(1)
    past = [
        Known({axis.name: axis.draw(rng) for axis in axes}, state, scores)
        for state, scores in (("finished", (0.1, 0.3)), ("stopped", (0.2,)), ("running", ()), ("failed", ()))
        for _ in range(5)
    ]
    for number in range(1, 30):
        point = optuna_point(axes, number, 0, past)
        assert all(axis.grid is None or point[axis.name] in axis.grid for axis in axes)
        assert all(axis.grid is not None or axis.low <= point[axis.name] <= axis.high for axis in axes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.name": "ll-r"}, "give a list of values, or one of"),
        ({"loss.name": []}, "a list of at least one value"),
        ({"loss.name": ["ll-r", "ll-r"]}, "'ll-r' stands twice"),
        ({"boost.train": {"uniform": [5, 1]}}, "with low below high"),
        ({"boost.train": {"uniform": [1, 5], "log": True}}, "log is no part of uniform"),
        ({"boost.train": {"uniform": [1, 5], "int": [1, 5]}}, "give a list of values, or one of"),
        ({"boost.train": {"uniform": [1, 5], "step": 9}}, r"step is 9; .* fit into \[1, 5\]"),
        ({"loss.reject_rate_step": {"log_uniform": [0, 0.1]}}, "it must begin above 0"),
        ({"loss.reject_rate_step": {"log_uniform": ["1e-4", 0.1]}}, r"'1e-4' is no number \(YAML takes"),
        ({"boost.schedule_epochs": {"int": [1, 2.5]}}, "2.5 is no whole number"),
        ({"boost.train, boost.eval": [[1, 2, 3]]}, "names 2 settings"),
        ({"boost.train, boost.eval": [[1, 2]], "boost.eval": [1]}, "'boost.eval' is varied twice"),
        ({"loss.rate": [1]}, r"no setting 'loss\.rate'; like it are"),
        ({"data.test_split": ["test"]}, "'data.test_split' cannot be varied"),
        ({"run.name": ["a", "b"]}, "'run.name' cannot be varied"),
        ({"epochs": [3, 4]}, "'epochs' cannot be varied under scheduler asha"),
        ({"seed": [1, 2]}, "'seed' is set in common, too"),
        ({}, "space is empty"),
    ],
)
def test_mistakes_are_named(space: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        SweepSettings(space=space, trials=1, common={"seed": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": None}, "trials is null; a search by optuna needs a number"),
        ({"trials": 0}, "trials is 0; it must be at least 1"),
        (
            {"search": "grid", "space": RANGES},
            "search is grid, but loss.reject_rate_step, optimiser.learning_rate has no",
        ),
        ({"search": "random", "space": {"loss.name": ["ll-r"]}}, "the space holds 1 points"),
        ({"search": "grids"}, "search is 'grids'; allowed are random, grid, optuna"),
        ({"scheduler": "hyperband"}, "allowed are asha, median, none"),
        ({"eta": 1}, "eta is 1"),
        ({"at_once": 0}, "a sweep needs Ray"),
        ({"name": "a b"}, "it names a folder"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        SweepSettings(**{"space": SPACE, "trials": 3} | changes)


def test_lengths_may_vary_where_nothing_compares_them_epoch_by_epoch():
    settings = SweepSettings(space={"epochs": [3, 4]}, search="grid", scheduler="none")
    assert settings.count == 2
