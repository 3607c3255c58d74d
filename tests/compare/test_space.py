"""The search space of a sweep: its settings, and the points that are tried."""

import math
import random
from itertools import islice
from typing import Any

import pytest

from paml.compare.settings import TuneSettings
from paml.compare.space import Trial, grid_points, parse_space, random_points, space_size
from paml.compare.study import suggest_point
from paml.errors import SettingsError

SPACE: dict[str, Any] = {
    "loss.name": ["ll-r", "ll-ct"],
    "boost.train, boost.eval": [[1, 5], 3],
    "loss.warmup_epochs": {"int": [2, 8], "step": 3},
    "data.flip_prob": {"uniform": [0.5, 0.9], "step": 0.1},
}
RANGES: dict[str, Any] = {
    "loss.reject_rate_step": {"log_uniform": [1e-5, 1e-2]},
    "optimizer.learning_rate": {"uniform": [0.25, 0.75]},
}


def test_axes():
    name, boost, epochs, probability = parse_space(SPACE)
    assert name.grid == ("ll-r", "ll-ct")
    assert boost.settings([1, 5]) == {"boost.train": 1, "boost.eval": 5}
    assert boost.settings(3) == {"boost.train": 3, "boost.eval": 3}
    assert epochs.grid == (2, 5, 8)
    assert probability.grid == (0.5, 0.6, 0.7, 0.8, 0.9)
    assert space_size([name, boost, epochs, probability]) == 2 * 2 * 3 * 5
    assert math.isinf(space_size(parse_space(RANGES)))
    assert [axis.extremes for axis in parse_space(RANGES)] == [(1e-5, 1e-2), (0.25, 0.75)]


def test_grid():
    axes = parse_space(SPACE)
    points = grid_points(axes, 60, 0)
    assert len({repr(point) for point in points}) == 60
    sample = grid_points(axes, 7, 3)
    assert sample == grid_points(axes, 7, 3)
    assert len({repr(point) for point in sample}) == 7
    assert all(point in points for point in sample)


def test_random_points_are_distinct_and_reproducible():
    axes = parse_space(SPACE | RANGES)
    points = list(islice(random_points(axes, 4), 30))
    assert points[:12] == list(islice(random_points(axes, 4), 12))
    assert points != list(islice(random_points(axes, 5), 30))
    steps = [point["loss.reject_rate_step"] for point in points]
    assert all(1e-5 <= step <= 1e-2 and step == float(f"{step:.4g}") for step in steps)
    assert 5 < sum(step < 10**-3.5 for step in steps) < 25
    small = parse_space({"loss.name": ["ll-r", "ll-ct", "ll-cp"]})
    assert sorted(point["loss.name"] for point in random_points(small, 0)) == ["ll-cp", "ll-ct", "ll-r"]


def scored_trials(axes: list, count: int, state: Any, seed: int = 0) -> list[Trial]:
    """Trials that score better for ll-ct and for rates near 1e-3."""
    rng, trials = random.Random(seed), []
    for number in range(count):
        point = {axis.name: axis.sample(rng) for axis in axes}
        score = 1 - abs(math.log10(point["loss.reject_rate_step"]) + 3) / 3 - 0.3 * (point["loss.name"] == "ll-r")
        trials.append(Trial(number, point, state, (score / 2, score)))
    return trials


def test_optuna_prefers_good_points_and_is_reproducible():
    axes = parse_space({"loss.name": SPACE["loss.name"], **RANGES})
    past = scored_trials(axes, 30, "finished") + scored_trials(axes, 10, "stopped", 1)
    points = [suggest_point(axes, number, 7, past) for number in range(41, 61)]
    assert points == [suggest_point(axes, number, 7, past) for number in range(41, 61)]
    assert len({repr(point) for point in points}) == 20
    near = [abs(math.log10(point["loss.reject_rate_step"]) + 3) < 0.75 for point in points]
    assert sum(near) > 14  # random points: half of them
    assert sum(point["loss.name"] == "ll-ct" for point in points) > 14


def test_optuna_accepts_every_kind_of_axis_and_every_state():
    axes = parse_space(SPACE | RANGES)
    rng = random.Random(1)
    states: dict[Any, tuple[float, ...]] = {"finished": (0.1, 0.3), "stopped": (0.2,), "running": (), "failed": ()}
    past = [
        Trial(number, {axis.name: axis.sample(rng) for axis in axes}, state, scores)
        for state, scores in states.items()
        for number in range(5)
    ]
    for number in range(1, 30):
        point = suggest_point(axes, number, 0, past)
        assert all(axis.grid is None or point[axis.name] in axis.grid for axis in axes)
        assert all(axis.grid is not None or axis.low <= point[axis.name] <= axis.high for axis in axes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.name": "ll-r"}, "'loss.name' is 'll-r'"),
        ({"loss.name": []}, r"'loss.name' is \[\]"),
        ({"loss.name": ["ll-r", "ll-r"]}, "'ll-r' .*twice"),
        ({"boost.train": {"uniform": [5, 1]}}, r"uniform is \[5, 1\]"),
        ({"boost.train": {"uniform": [1, 5], "log": True}}, "uniform .*log"),
        ({"boost.train": {"uniform": [1, 5], "int": [1, 5]}}, "'boost.train' is"),
        ({"boost.train": {"uniform": [1, 5], "step": 9}}, "step is 9; .* 4"),
        ({"loss.reject_rate_step": {"log_uniform": [0, 0.1]}}, "log_uniform .* 0;"),
        ({"loss.reject_rate_step": {"log_uniform": ["1e-4", 0.1]}}, r"'1e-4' .*1\.0e-4"),
        ({"loss.warmup_epochs": {"int": [1, 2.5]}}, "2.5 .*integer"),
        ({"boost.train, boost.eval": [[1, 2, 3]]}, "2 settings.* 3 values"),
        ({"boost.train, boost.eval": [[1, 2]], "boost.eval": [1]}, "'boost.eval' .*twice"),
        ({"loss.rate": [1]}, r"'loss\.rate'"),
        ({"data.test_split": ["test"]}, "'data.test_split'"),
        ({"run.name": ["a", "b"]}, "'run.name'"),
        ({"epochs": [3, 4]}, "'epochs' .*asha"),
        ({"seed": [1, 2]}, "'seed' .*common"),
        ({}, "space is empty"),
    ],
)
def test_invalid_spaces_are_rejected(space: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        TuneSettings(space=space, trials=1, common={"seed": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": None}, "trials is null.*optuna"),
        ({"trials": 0}, "trials is 0"),
        ({"search": "grid", "space": RANGES}, "grid.* loss.reject_rate_step, optimizer.learning_rate "),
        ({"search": "random", "space": {"loss.name": ["ll-r"]}}, "trials is 3.* 1 points"),
        ({"search": "grids"}, "search is 'grids'; .*random or grid or optuna"),
        ({"scheduler": "hyperband"}, "'hyperband'; .*asha or median or none"),
        ({"reduction_factor": 1}, "reduction_factor is 1"),
        ({"max_concurrent": 0}, "max_concurrent is 0"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"methods": {"x": {"los.name": "an"}}}, "method 'x'.*'los.name'"),
        ({"methods": {"x": {"run.name": "an"}}}, "method 'x'.*'run.name'"),
        ({"methods": {"x": {"loss.name": "an"}}}, "method 'x'.*'loss.name' .*methods"),
        ({"methods": {"x": {"space": {"epochs": [1, 2]}}}}, "method 'x'.*'epochs'"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        TuneSettings(**{"space": SPACE, "trials": 3} | changes)


def test_lengths_may_vary_without_early_stopping():
    settings = TuneSettings(space={"epochs": [3, 4]}, search="grid", scheduler="none")
    assert len(settings.schedule) == 2


def test_methods_take_turns_and_add_to_the_space():
    methods: dict[str, Any] = {
        "AN": {"loss.name": "an"},
        "LL-R": {"loss.name": "ll-r", "space": {"loss.reject_rate_step": [0.01, 0.02]}},
    }
    settings = TuneSettings(space={"boost.train": [1, 5]}, methods=methods, search="grid")
    assert settings.schedule == [("AN", 0), ("LL-R", 0), ("AN", 1), ("LL-R", 1), ("LL-R", 2), ("LL-R", 3)]
    assert [axis.name for axis in settings.axes("LL-R")] == ["boost.train", "loss.reject_rate_step"]
    assert settings.method_settings("LL-R") == {"loss.name": "ll-r"}
