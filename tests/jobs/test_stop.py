"""A stopped run says so, in its exit status and in MLflow, leaves no process behind, and can be gone on with."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from paml.tracking.view import read_memory
from tests.helpers.jobs import (
    ROOT,
    gone,
    newest_step,
    prepare_scenes,
    status_in_mlflow,
    tiny_options,
    train_job,
    write_scenes,
)
from tests.helpers.kills import OwnRay

LONG = {"epochs": 400, "checkpoint__every_steps": 3, "run__mlflow": "true"}


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
        job.until(lambda: read_memory(str(runs / "stopped")), "MLflow")
        started = job.descendants()
        job.process.send_signal(number)
        assert job.wait(60) == status, job.output
    assert gone(started) == []
    assert "stopped; go on with --run.resume true --run.name stopped" in job.output
    assert "Traceback" not in job.output
    assert status_of(runs) == ["KILLED"]

    reached = newest_step(runs / "stopped")
    with train_job([*options, "--run.resume", "true"], tmp_path / "second.log") as job:
        job.until(lambda: newest_step(runs / "stopped") > reached, "a step further")
        job.until(lambda: "going on at epoch" in job.output, "its first line")
        job.until(lambda: status_of(runs) == ["RUNNING"], "MLflow")
        started = job.descendants()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 143
    assert gone(started) == []
    assert status_of(runs) == ["KILLED"]


def ray_job(ray: OwnRay, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess:
    """`ray job ...`, its output as text."""
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
        found = re.search(r"raysubmit_\w+", submitted.stdout)
        assert found is not None
        wait_for(lambda: newest_step(runs / "stopped") >= 4 and read_memory(str(runs / "stopped")))
        started = [
            process for process in ray.processes() if process.pid not in idle and "train_openimages" in line_of(process)
        ]
        assert started
        stopped = ray_job(ray, "stop", found.group())
        assert stopped.returncode == 0, stopped.stdout
        assert gone(started) == []
        assert "was stopped" in ray_job(ray, "status", found.group()).stdout
        assert status_of(runs) == ["KILLED"]
        wait_for(lambda: not [process for process in ray.processes() if "RayTrainWorker" in line_of(process)], 60)
    finally:
        ray.stop()


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(condition, seconds: float = 180) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
