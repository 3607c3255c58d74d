"""`jobs/tune_openimages.py` on a real Ray: kills, stops, failing trials, and trials with Ray Train workers."""

import json
import signal
from pathlib import Path

import pytest

from paml.compare.space import best_trial
from paml.training.result import Result
from tests.helpers.jobs import environment, train_job
from tests.helpers.kills import OwnRay
from tests.helpers.sweeps import SweepResult, ended, leaks, plan, sweep_job, sweep_with_kills, tiny_sweep


def check(sweep: SweepResult, folder: Path, count: int) -> None:
    """No trial was lost or restarted from scratch, nothing leaked, and table and plots exist."""
    assert sorted(sweep.trials) == list(range(1, count + 1))
    assert {trial.state for trial in sweep.trials.values()} <= {"finished", "stopped"}
    for number, trial in sweep.ended_before.items():
        assert sweep.trials[number] == trial
    for number in sweep.interrupted:
        assert f"-{number:04d}: resuming at epoch" in sweep.output
    assert sweep.leaked == []
    assert len((folder / "trials.txt").read_text().splitlines()) == count + 2
    assert {path.name for path in folder.glob("*.png")} >= {"parallel_coordinates.png", "score_by_setting.png"}


def train_the_best(sweep: SweepResult, runs: Path, data: Path) -> None:
    """The recipe reproduces the score of its trial, and is the first to open the test split."""
    best = best_trial(sweep.trials.values())
    assert best is not None
    assert not list(runs.glob("sweep-*/artifacts/test_*"))
    options = ["--config", str(runs / "sweep" / "best.yaml"), "--run.storage", str(runs), "--run.trackers", "[]"]
    with train_job(options, runs / "best.log", env=environment()) as job:
        assert job.wait(300) == 0, job.output
    result = Result.from_json(json.loads((runs / "sweep-best" / "result.json").read_text()))
    (found,) = result.best.values()
    assert (found["map"], found["epoch"]) == (best.score, best.epoch)
    assert result.test


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_continues_after_all_of_ray_was_killed(prepared: Path, tmp_path: Path):
    """tests/soak also kills the driver alone."""
    settings = tiny_sweep(prepared, tmp_path / "runs", trials=4)
    sweep = sweep_with_kills(settings, tmp_path, {"ray": 1})
    check(sweep, tmp_path / "runs" / "sweep", 4)
    train_the_best(sweep, tmp_path / "runs", prepared)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_failing_trial_does_not_affect_the_others(prepared: Path, tmp_path: Path):
    """A grid without early stopping, of which half cannot be trained. In MLflow all are children of the sweep."""
    from mlflow import MlflowClient

    space = {"model.weights": [None, str(tmp_path / "nowhere.pth")], "loss.name": ["an", "ll-r"]}
    settings = tiny_sweep(
        prepared, tmp_path / "runs", space=space, search="grid", trials=None, scheduler="none", trackers=["mlflow"]
    )
    ray = OwnRay()
    ray.start()
    try:
        with sweep_job(settings, tmp_path / "log", env=ray.environment) as job:
            assert job.wait(900) == 1, job.output
        assert leaks(ray) == []
    finally:
        ray.stop()
    trials = ended(plan(settings))
    assert [trial.state for trial in trials.values()] == ["finished", "finished", "failed", "failed"]
    assert all(trial.permanent and "nowhere.pth" in str(trial.error) for trial in list(trials.values())[2:])
    assert "Traceback" not in job.output
    assert "trial 3 FAILED: " in job.output
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_name: run for run in client.search_runs(experiments)}
    parent = runs.pop("sweep")
    assert parent.data.metrics["best_val_mAP"] == max(trial.score for trial in trials.values() if trial.scores)
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "recipes")} == {"recipes/best.yaml"}
    assert [runs[f"sweep-000{n}"].info.status for n in (1, 2, 3, 4)] == ["FINISHED"] * 2 + ["FAILED"] * 2
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert len(client.get_metric_history(runs["sweep-0001"].info.run_id, "val/mAP")) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_with_two_workers_stop_early_and_release_resources(prepared: Path, tmp_path: Path):
    """The cluster has resources for one trial with Ray Train workers: a leak would starve the next."""
    settings = tiny_sweep(
        prepared,
        tmp_path / "runs",
        common={"workers.num_workers": 2},
        trials=3,
        space={"optimizer.learning_rate": [1e-6, 1e-3, 1e-7]},
        search="grid",
    )
    ray = OwnRay()
    ray.start()
    try:
        with sweep_job(settings, tmp_path / "log", env=ray.environment) as job:
            assert job.wait(1000) == 0, job.output
        assert leaks(ray) == []
    finally:
        ray.stop()
    trials = ended(plan(settings))
    assert [trials[n].state for n in (1, 2)] == ["finished", "stopped"]
    assert all(trial.scores for trial in trials.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_sweep_can_continue(prepared: Path, tmp_path: Path):
    settings = tiny_sweep(prepared, tmp_path / "runs", trials=2, scheduler="median", common={"epochs": 30})
    ray = OwnRay()
    ray.start()
    try:
        with sweep_job(settings, tmp_path / "log", env=ray.environment) as job:
            job.until(lambda: "epoch 1/30" in job.output, "an epoch")
            job.process.send_signal(signal.SIGTERM)
            assert job.wait(60) == 128 + signal.SIGTERM, job.output
        assert "stopped; repeat the command to continue" in job.output
        assert leaks(ray) == []
    finally:
        ray.stop()
    assert not ended(plan(settings))
