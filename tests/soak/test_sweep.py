"""Forty trials with early stops on two cores, killed twice: no trial is lost, nothing leaks or stalls."""

from pathlib import Path

import pytest

from tests.helpers.jobs import prepare_scenes, write_scenes
from tests.helpers.sweeps import SPACE, sweep_with_kills, tiny_sweep
from tests.jobs.test_sweep import check, train_the_best


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_forty_trials_killed_twice(tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=120, others=60), tmp_path / "data")
    settings = tiny_sweep(data, tmp_path / "runs", trials=40, search="optuna", space=SPACE)
    settings["base"] |= {"data.train_truth": None, "batch_size": 20}
    sweep = sweep_with_kills(settings, tmp_path, {"driver": 12, "ray": 26})
    states = [trial.state for trial in sweep.trials.values()]
    print(
        f"\n{sweep.seconds:.0f} s, {states.count('finished')} finished, {states.count('stopped')} stopped, "
        f"{len(sweep.ended_before)} unchanged by kills, {len(sweep.interrupted)} resumed, leaks {sweep.leaked}"
    )
    check(sweep, tmp_path / "runs" / "sweep", 40)
    assert states.count("stopped") >= 10
    train_the_best(sweep, tmp_path / "runs", data)
