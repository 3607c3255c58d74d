"""`jobs/tune_openimages.py` on a real Ray: killed, stopped, with trials that fail, and with workers below a trial."""

import json
import signal
from pathlib import Path

import pytest

from paml.compare.trials import best_trial
from paml.training.loop import Result
from tests.helpers.jobs import environment, train_job
from tests.helpers.kills import OwnRay
from tests.helpers.sweeps import Sweeping, ended, leaks, planned, sweep_job, sweep_with_kills, tiny_sweep


def check(sweeping: Sweeping, folder: Path, count: int) -> None:
    """Nothing was lost, begun anew or left behind, and the table and the pictures stand."""
    assert sorted(sweeping.trials) == list(range(1, count + 1))
    assert {trial.state for trial in sweeping.trials.values()} <= {"finished", "stopped"}
    for number, trial in sweeping.kept.items():
        assert sweeping.trials[number] == trial
    for number in sweeping.interrupted:
        assert f"-{number:04d}: going on at epoch" in sweeping.said
    assert sweeping.leaked == []
    assert len((folder / "trials.txt").read_text().splitlines()) == count + 2
    assert {path.name for path in folder.glob("*.png")} >= {"parallel_coordinates.png", "score_by_setting.png"}


def train_the_best(sweeping: Sweeping, runs: Path, data: Path) -> None:
    """The recipe trains to the score that its trial had, and only then is the test split opened."""
    best = best_trial(sweeping.trials.values())
    assert best is not None
    assert not list(runs.glob("sweep-*/artifacts/test_*"))
    options = ["--config", str(runs / "sweep" / "best.yaml"), "--run.storage", str(runs), "--run.mlflow", "false"]
    with train_job(options, runs / "best.log", env=environment()) as job:
        assert job.wait(300) == 0, job.output
    result = Result.from_json(json.loads((runs / "sweep-best" / "result.json").read_text()))
    (found,) = result.best.values()
    assert (found["map"], found["epoch"]) == (best.score, best.epoch)
    assert result.test


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_goes_on_after_all_of_ray_was_killed(prepared: Path, tmp_path: Path):
    """Its driver alone is killed too where forty trials run, in tests/soak."""
    settings = tiny_sweep(prepared, tmp_path / "runs", trials=4)
    sweeping = sweep_with_kills(settings, tmp_path, {"ray": 1})
    check(sweeping, tmp_path / "runs" / "sweep", 4)
    train_the_best(sweeping, tmp_path / "runs", prepared)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_trial_that_fails_takes_no_other_with_it(prepared: Path, tmp_path: Path):
    """A grid without early stops: one point cannot be trained; in MLflow all stand below the sweep."""
    from mlflow import MlflowClient

    space = {"model.weights": [None, str(tmp_path / "nowhere.pth")], "loss.name": ["an", "ll-r"]}
    settings = tiny_sweep(
        prepared, tmp_path / "runs", space=space, search="grid", trials=None, scheduler="none", mlflow=True
    )
    ray = OwnRay()
    ray.start()
    try:
        with sweep_job(settings, tmp_path / "log", env=ray.environment) as job:
            assert job.wait(900) == 1, job.output
        assert leaks(ray) == []
    finally:
        ray.stop()
    trials = ended(planned(settings))
    assert [trial.state for trial in trials.values()] == ["finished", "finished", "failed", "failed"]
    assert all(trial.lasting and "nowhere.pth" in str(trial.error) for trial in list(trials.values())[2:])
    assert "Traceback" not in job.output
    assert "trial 3 FAILED: " in job.output
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("sweep")
    assert parent.data.metrics["best_val_map"] == max(trial.score for trial in trials.values() if trial.scores)
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "recipes")} == {"recipes/best.yaml"}
    assert [runs[f"sweep-000{n}"].info.status for n in (1, 2, 3, 4)] == ["FINISHED"] * 2 + ["FAILED"] * 2
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert len(client.get_metric_history(runs["sweep-0001"].info.run_id, "val/map")) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_of_two_workers_stop_early_and_leave_nothing(prepared: Path, tmp_path: Path):
    """Nested Ray Train workers on a cluster that holds just one trial of them: a leak would starve the next."""
    settings = tiny_sweep(
        prepared,
        tmp_path / "runs",
        common={"workers.num_workers": 2},
        trials=3,
        space={"optimiser.learning_rate": [1e-6, 1e-3, 1e-7]},
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
    trials = ended(planned(settings))
    assert [trials[n].state for n in (1, 2)] == ["finished", "stopped"]
    assert all(trial.scores for trial in trials.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_sweep_says_so_and_goes_on(prepared: Path, tmp_path: Path):
    settings = tiny_sweep(prepared, tmp_path / "runs", trials=2, scheduler="median", common={"epochs": 30})
    ray = OwnRay()
    ray.start()
    try:
        with sweep_job(settings, tmp_path / "log", env=ray.environment) as job:
            job.until(lambda: "epoch 1/30" in job.output, "an epoch")
            job.process.send_signal(signal.SIGTERM)
            assert job.wait(60) == 128 + signal.SIGTERM, job.output
        assert "stopped; the same command goes on" in job.output
        assert leaks(ray) == []
    finally:
        ray.stop()
    assert not ended(planned(settings))
