"""A stopped run reports it in its exit status and in MLflow, leaves no process behind, and can be resumed."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from paml.tracking.mlflow_sink import read_state
from tests.helpers.jobs import (
    ROOT,
    newest_step,
    prepare_scenes,
    status_in_mlflow,
    survivors,
    tiny_options,
    train_job,
    write_scenes,
)
from tests.helpers.kills import OwnRay

LONG = {"epochs": 400, "checkpoint__every_steps": 3, "run__trackers": "[mlflow]"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    return prepare_scenes(write_scenes(folder / "scenes", train=60, others=20), folder / "data")


def status_of(runs: Path) -> list[str]:
    return status_in_mlflow(f"sqlite:///{runs}/mlflow.db", "stopped")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "workers", "status"), [(signal.SIGTERM, 0, 143), (signal.SIGINT, 2, 130)])
def test_signal_stops_the_job(data: Path, tmp_path: Path, number: int, workers: int, status: int):
    runs = tmp_path / "runs"
    changes = {"workers__num_workers": workers, "workers__address": "local"} if workers else {}
    options = tiny_options(data, runs, "stopped", **LONG, **changes)
    with train_job(options, tmp_path / "first.log") as job:
        job.until(lambda: newest_step(runs / "stopped") >= 4, "step 4")
        job.until(lambda: read_state(str(runs / "stopped")), "MLflow")
        started = job.descendants()
        job.process.send_signal(number)
        assert job.wait(120) == status, job.output
    assert survivors(started) == []
    assert "--run.resume true --run.name stopped" in job.output
    assert "Traceback" not in job.output
    assert status_of(runs) == ["KILLED"]

    reached = newest_step(runs / "stopped")
    with train_job([*options, "--run.resume", "true"], tmp_path / "second.log") as job:
        job.until(lambda: newest_step(runs / "stopped") > reached, "a step further")
        job.until(lambda: "resuming at epoch" in job.output, "its first line")
        job.until(lambda: status_of(runs) == ["RUNNING"], "MLflow")
        started = job.descendants()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(120) == 143
    assert survivors(started) == []
    assert status_of(runs) == ["KILLED"]


def ray_job(ray: OwnRay, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess:
    """Run `ray job ...`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ray.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_job_stop(data: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    options = tiny_options(data, runs, "stopped", **LONG, workers__num_workers=2)
    ray = OwnRay()
    ray.start()
    try:
        idle = {process.pid for process in ray.processes()}
        submitted = ray_job(ray, "submit", "--no-wait", "--", "python", "jobs/train_openimages.py", *options)
        assert submitted.returncode == 0, submitted.stdout
        match = re.search(r"raysubmit_\w+", submitted.stdout)
        assert match is not None
        wait_for(lambda: newest_step(runs / "stopped") >= 4 and read_state(str(runs / "stopped")))
        started = [
            process
            for process in ray.processes()
            if process.pid not in idle and "train_openimages" in command_line(process)
        ]
        assert started
        stopped = ray_job(ray, "stop", match.group())
        assert stopped.returncode == 0, stopped.stdout
        assert survivors(started) == []
        assert "was stopped" in ray_job(ray, "status", match.group()).stdout
        assert status_of(runs) == ["KILLED"]
        wait_for(lambda: not [process for process in ray.processes() if "RayTrainWorker" in command_line(process)], 60)
    finally:
        ray.stop()


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s"
        time.sleep(0.1)
