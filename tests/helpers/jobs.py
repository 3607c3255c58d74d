"""Jobs as people start them: tiny data, a command in a process of its own, and the processes that it starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from paml.prepare import PrepareSettings, prepare
from paml.shards import ShardSettings
from paml.sources.digit_scenes import write_digit_scenes

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "jobs" / "train_openimages.py")
PREPARE = str(ROOT / "jobs" / "prepare_openimages.py")

# Names of what Ray 2.5x and later call their processes.
WORKER = "ray::RayTrainWorker"

QUIET = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # Ray's default starves its workers where the machine has other work
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONUNBUFFERED": "1",
}


def environment(**changes: str) -> dict[str, str]:
    """The environment of a job: one thread, no token, no Ray or MLflow of somebody else."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return kept | QUIET | changes


def write_scenes(folder: Path, *, train: int = 200, others: int = 40, size: int = 32) -> Path:
    """Digit scenes as JPEG files and Open Images CSV; returns their folder."""
    write_digit_scenes(folder, images={"train": train, "validation": others, "test": others}, size=size)
    return folder


def prepare_scenes(scenes: Path, out: Path, *, size: int = 32) -> Path:
    """Shards and label tables of `scenes`; returns the prepared folder."""
    settings = PrepareSettings(
        out=str(out),
        release=str(scenes / "2017_11"),
        images=str(scenes / "images"),
        shards=ShardSettings(size=size, samples_per_shard=50),
        workers=1,
    )
    prepare(settings, say=lambda line: None)
    return out


def tiny_options(data: Path, runs: Path, name: str, **options: object) -> list[str]:
    """Options of the smallest run there is; keywords, with __ for a dot, come on top."""
    chosen: dict[str, object] = {
        "data.root": data,
        "data.decode_threads": 1,
        "run.storage": runs,
        "run.name": name,
        "run.system_seconds": 0,
        "run.mlflow": "false",
        "model.backbone": "shufflenet_v2_x0_5",
        "model.feature_layer": "conv5",
        "model.weights": "null",
        "optimiser.learning_rate": 1e-3,
        "optimiser.head_factor": 1,
        "batch_size": 20,
        "eval_batch_size": 20,
        "epochs": 2,
        "precision": "fp32",
        "workers.num_workers": 0,
    }
    chosen |= {key.replace("__", "."): value for key, value in options.items()}
    return [part for key, value in chosen.items() for part in (f"--{key}", str(value))]


class Job:
    """A command in a process of its own, its output in a file; as a context it leaves nothing running."""

    def __init__(self, command: list[str], log: Path, *, env: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.log = log
        self.begun = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it where it still runs."""
        if self.process.poll() is None:
            self.kill()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 600.0) -> int:
        """Its exit status; the test fails with its output where it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end within {seconds:g} s:\n{self.output[-6000:]}") from None

    def until(self, condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
        """Wait for something while the job runs."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended before {what}:\n{self.output[-6000:]}")
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"waited {seconds:g} s for {what}:\n{self.output[-6000:]}")
            time.sleep(0.02)

    def descendants(self) -> list[psutil.Process]:
        """All processes that it has started, and those that they have."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """The job and all that it started."""
        for process in [*self.descendants(), psutil.Process(self.process.pid)]:
            kill(process)
        self.process.wait(30)


def train_job(options: list[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Job:
    """`python jobs/train_openimages.py` with these options and no recipe's."""
    return Job([sys.executable, TRAIN, *options], log, env=env or environment(), cwd=cwd)


def kill(process: psutil.Process) -> None:
    """SIGKILL, by its id; one that is gone already is no error."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those whose command line begins with `name`, oldest first."""
    found = []
    for process in processes:
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            continue
        if line and line[0].startswith(name):
            found.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(found, key=lambda each: each[:2])]


def gone(processes: list[psutil.Process], seconds: float = 60.0) -> list[psutil.Process]:
    """Those that are left after at most so many seconds: none, where all have ended."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def newest_step(run_folder: Path) -> int:
    """Optimiser steps of the newest committed checkpoint; 0 where there is none."""
    return max((int(path.parent.name[5:]) for path in run_folder.glob("checkpoints/*/COMMIT")), default=0)


def status_in_mlflow(uri: str, name: str) -> list[str]:
    """Status of every MLflow run of this name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments, f"attributes.run_name = '{name}'")]
