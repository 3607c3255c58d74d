"""`ray job submit -- python jobs/compare.py` on a private head, with MLflow."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paml.compare.settings import CompareSettings
from paml.distributed.local_head import ray_head
from paml.runs.journal import read_journal
from tests.helpers.grids import METHODS, tiny_grid
from tests.helpers.jobs import QUIET, ROOT, Job, environment


def submit(head: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Exit status and output of `ray job submit --working-dir .`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--log-color=false", "--working-dir", "."]
    done = subprocess.run(
        [*command, "--", "python", *arguments], cwd=ROOT, env=head, capture_output=True, text=True, timeout=400
    )
    return done.returncode, done.stdout + done.stderr


def write_recipe(settings: CompareSettings, path: Path) -> str:
    """Write the settings as a recipe; returns its path."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(vars(settings)))))
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_submitted_comparison(prepared: Path, tmp_path: Path):
    """Concurrent trainings. One fails and is named; the others are in the table and children of one MLflow run."""
    from mlflow import MlflowClient

    os.environ.update(QUIET)
    methods = METHODS | {"lost": {"loss.name": "iu", "model.weights": str(tmp_path / "nowhere.pth")}}
    settings = tiny_grid(prepared, tmp_path / "runs", trackers=["mlflow"], max_concurrent=None, methods=methods)
    config = write_recipe(settings, tmp_path / "c.yaml")
    with ray_head(ROOT, cpus=2) as head:
        status, output = submit(environment(**head), "jobs/compare.py", "--config", config)
    assert status == 1, output
    assert "Traceback" not in output
    assert "partial-lost-seed0: FAILED: " in output
    assert "/4 runs, " in output
    assert "partial-an-seed0: epoch 2/2" in output
    table = (tmp_path / "runs" / "comparison" / "table-partial.txt").read_text()
    assert table.splitlines()[2].startswith("---")
    assert len([line for line in table.splitlines() if line.startswith(("AN", "full labels", "LL-R", "lost"))]) == 5

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("compare")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("comparison")
    assert f"%27{parent.info.run_id}%27" in parent.data.tags["mlflow.note.content"]
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["mAP/partial/LL-R BoostLU"] > 0
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "tables")} == {
        f"tables/table-partial.{extension}" for extension in ("txt", "csv", "tex")
    }
    finished = {name: run for name, run in runs.items() if run.info.status == "FINISHED"}
    assert set(finished) == {"full-labels-seed0", "partial-an-seed0", "partial-LL-R-BoostLU-seed0"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_comparison(prepared: Path, tmp_path: Path):
    """Without a cluster: SIGTERM stops the concurrent trainings and their journals end with KILLED."""
    settings = tiny_grid(prepared, tmp_path / "runs", max_concurrent=None, common={"epochs": 40})
    command = [sys.executable, "jobs/compare.py", "--config", write_recipe(settings, tmp_path / "c.yaml")]
    with Job(command, tmp_path / "log", env=environment()) as job:
        job.until(lambda: job.output.count("epoch 2/40") > 1, "two epochs of two trainings")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM, job.output
        assert "stopped; repeat the command to continue" in job.output
    journals = [path.parent for path in (tmp_path / "runs").glob("*/journal")]
    assert len(journals) >= 3
    for run in journals:
        statuses = [event.value for event in read_journal(str(run), unreadable={}) if event.kind == "status"]
        assert statuses == ["RUNNING", "KILLED"]
