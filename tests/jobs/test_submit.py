"""`ray job submit`, with and without --working-dir, from a checkout that no installed paml refers to."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from paml.distributed.local_head import ray_head
from tests.helpers.jobs import QUIET, ROOT, environment, newest_step, prepare_scenes, tiny_options, write_scenes
from tests.helpers.sweeps import tiny_sweep

WHERE = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import ray
from paml.distributed import cluster, ray_train
from paml.training.settings import WorkerSettings

ray_train.connect(WorkerSettings())

@ray.remote(num_cpus=0.1, runtime_env=cluster.task_environment())
def where():
    import paml
    return paml.__file__

print("a worker has", ray.get(where.remote()))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the parts that a job needs, in a folder that no installed paml refers to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for part in ("paml", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "where.py").write_text(WHERE)
    return folder


@pytest.fixture(scope="module")
def head(checkout: Path) -> Iterator[dict[str, str]]:
    os.environ.update(QUIET)
    with ray_head(checkout, cpus=2) as variables:
        yield environment(**variables)


def submit(head: dict[str, str], checkout: Path, *arguments: str, seconds: float = 600) -> tuple[int, str]:
    """Exit status and output of `ray job submit`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--log-color=false", *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_import_the_paml_of_their_job(head: dict[str, str], checkout: Path):
    status, output = submit(head, checkout, "--", "python", "where.py")
    assert status == 0, output
    assert f"a worker has {checkout / 'paml' / '__init__.py'}" in output

    status, output = submit(head, checkout, "--working-dir", ".", "--", "python", "where.py")
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "a worker has" in line]
    assert "_ray_pkg_" in line


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("upload", [False, True], ids=["without", "with_working_dir"])
def test_submitted_job_trains(head: dict[str, str], checkout: Path, tmp_path: Path, upload: bool):
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(data, tmp_path / "runs", "submitted", epochs=1, workers__num_workers=2)
    before = ["--working-dir", "."] if upload else []
    status, output = submit(head, checkout, *before, "--", "python", "jobs/train_openimages.py", *options)
    assert status == 0, output
    assert newest_step(tmp_path / "runs" / "submitted") == 3
    assert "test scores of submitted" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_open_images_job_logs_the_rejection_of_every_epoch_to_mlflow(
    head: dict[str, str], checkout: Path, tmp_path: Path
):
    """With the recipe's loss, its default of two workers, and full labels of the training images."""
    scenes = write_scenes(tmp_path / "scenes", train=200, others=40)
    data = prepare_scenes(scenes, tmp_path / "data", full_labels=True)
    options = tiny_options(
        data,
        tmp_path / "runs",
        "tracked",
        epochs=3,
        run__trackers="[mlflow]",
        data__train_truth="labels/train-full.arrow",
        loss__reject_rate_step=0.02,
    )
    workers = options.index("--workers.num_workers")
    del options[workers : workers + 2]
    variables = head | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    env_vars = f'{{"env_vars": {{"MLFLOW_TRACKING_URI": "{variables["MLFLOW_TRACKING_URI"]}"}}}}'
    job = ["python", "jobs/train_openimages.py", *options]
    status, output = submit(head, checkout, "--runtime-env-json", env_vars, "--", *job)
    assert status == 0, output
    assert "--config=openimages_v3" in output

    from mlflow import MlflowClient

    client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, "attributes.run_name = 'tracked'")
    assert run.data.params["loss.name"] == "ll-r"
    assert run.data.params["boost.train"] == "5.0"

    def by_epoch(name: str) -> dict[int, float]:
        return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}

    rejected, hits = by_epoch("rejection/rejected"), by_epoch("rejection/rejected_false_negatives")
    precision, recall = by_epoch("rejection/precision"), by_epoch("rejection/recall")
    assert rejected.keys() == hits.keys() == {1, 2, 3}
    assert rejected[1] == 0
    assert 0 < rejected[2] < rejected[3]
    for epoch in (2, 3):
        assert 0 <= hits[epoch] <= rejected[epoch]
        assert precision[epoch] == pytest.approx(hits[epoch] / rejected[epoch])
        assert 0 <= recall[epoch] <= 1
    for name in ("train/loss", "train/workers", "val/mAP"):
        assert by_epoch(name).keys() == {1, 2, 3}
    assert set(by_epoch("train/workers").values()) == {2.0}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_submitted_sweep_tries_boost_and_reject_rate(
    head: dict[str, str], checkout: Path, prepared: Path, tmp_path: Path
):
    space = {"boost.train": [1.0, 5.0], "loss.reject_rate_step": [0.01, 0.05]}
    settings = tiny_sweep(
        prepared, tmp_path / "runs", space=space, search="grid", trials=None, scheduler="none", trackers=["mlflow"]
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    job = ["python", "jobs/tune_openimages.py", "--config", str(tmp_path / "sweep.yaml")]
    status, output = submit(head, checkout, "--", *job, seconds=1400)
    assert status == 0, output

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    trials = [run for run in client.search_runs(experiments) if "mlflow.parentRunId" in run.data.tags]
    tried = [tuple(float(run.data.params[name]) for name in space) for run in trials]
    assert sorted(tried) == [(1.0, 0.01), (1.0, 0.05), (5.0, 0.01), (5.0, 0.05)]
    rejected = {}
    for run, (_, step) in zip(trials, tried, strict=True):
        for name in ("rejection/rejected", "rejection/rejected_false_negatives", "val/mAP"):
            assert {metric.step for metric in client.get_metric_history(run.info.run_id, name)} == {1, 2, 3}
        rejected.setdefault(step, []).append(run.data.metrics["rejection/rejected"])
    assert max(rejected[0.01]) < min(rejected[0.05])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_submitted_job_fails_with_its_message(head: dict[str, str], checkout: Path, tmp_path: Path):
    missing = tmp_path / "nothing"
    status, output = submit(head, checkout, "--", "python", "jobs/train_openimages.py", "--data.root", str(missing))
    assert status == 1
    assert f"error: {missing}" in output
    assert "Traceback" not in output

    status, output = submit(head, checkout, "--", "python", "jobs/train_openimages.py")
    assert status == 1
    assert "paml prepare --config openimages_v3_data" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_paml_submit_uses_this_python_and_this_folder(head: dict[str, str], tmp_path: Path):
    prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(Path("data"), Path("runs"), "submitted", epochs=1)
    command = [sys.executable, "-m", "paml", "submit", "train", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    assert f"-- {sys.executable} -m paml train" in done.stdout.splitlines()[0]
    assert newest_step(tmp_path / "runs" / "submitted") == 3
