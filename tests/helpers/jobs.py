"""Commands in processes of their own on tiny data, and the processes that they start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.shards import ShardSettings
from paml.sources.digit_scenes import write_digit_scenes

ROOT = Path(__file__).resolve().parents[2]
PAML = [sys.executable, "-m", "paml"]
TRAIN = str(ROOT / "jobs" / "train_openimages.py")
PREPARE = str(ROOT / "jobs" / "prepare_openimages.py")

# Process name of a worker in Ray 2.50 and later.
WORKER = "ray::RayTrainWorker"

QUIET = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # Ray's default starves its workers on a busy machine
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONUNBUFFERED": "1",
}


def environment(**changes: str) -> dict[str, str]:
    """The environment of a job: one thread, no token, no other Ray or MLflow."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return inherited | QUIET | changes


def write_scenes(folder: Path, *, train: int = 200, others: int = 40, size: int = 32) -> Path:
    """Write digit scenes as JPEG files and Open Images CSV; returns their folder."""
    write_digit_scenes(folder, images={"train": train, "validation": others, "test": others}, size=size)
    return folder


def prepare_scenes(scenes: Path, out: Path, *, size: int = 32, full_labels: bool = False) -> Path:
    """Write shards and label tables of `scenes`; returns the prepared folder."""
    settings = PrepareSettings(
        out=str(out),
        source="openimages",
        labels=str(scenes / "2017_11"),
        images=str(scenes / "images"),
        full_labels=str(scenes / "full-labels") if full_labels else None,
        shards=ShardSettings(size=size, samples_per_shard=50),
        workers=1,
    )
    prepare(settings, log=lambda line: None)
    return out


def tiny_options(data: Path, runs: Path, name: str, **options: object) -> list[str]:
    """Options of a run of seconds; keywords, with __ for a dot, are added or replace them."""
    chosen: dict[str, object] = {
        "data.root": data,
        "data.decode_threads": 1,
        "run.storage": runs,
        "run.name": name,
        "run.trackers": "[]",
        "model.backbone": "shufflenet_v2_x0_5",
        "model.feature_layer": "conv5",
        "model.weights": "null",
        "optimizer.learning_rate": 1e-3,
        "optimizer.head_lr_multiplier": 1,
        "batch_size": 20,
        "epochs": 2,
        "precision": "fp32",
        "workers.num_workers": 0,
    }
    chosen |= {key.replace("__", "."): value for key, value in options.items()}
    return [part for key, value in chosen.items() for part in (f"--{key}", str(value))]


class Job:
    """A command in its own process, with its output in a file. Leaving its context kills it and its descendants."""

    def __init__(self, command: list[str], log: Path, *, env: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.log = log
        self.start = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.kill()

    @property
    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 600.0) -> int:
        """Its exit status. Fails with the output if it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end within {seconds:g} s:\n{self.output[-6000:]}") from None

    def until(self, condition: Callable[[], object], event: str, seconds: float = 300.0) -> None:
        """Wait until a condition is true. Fails with the output if the job ends first or time runs out."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended before {event}:\n{self.output[-6000:]}")
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"waited {seconds:g} s for {event}:\n{self.output[-6000:]}")
            time.sleep(0.02)

    def descendants(self) -> list[psutil.Process]:
        """All processes started by it, directly or indirectly."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill the job and its descendants."""
        for process in [*self.descendants(), psutil.Process(self.process.pid)]:
            kill(process)
        self.process.wait(30)


def train_job(options: list[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Job:
    """`paml train` with these options."""
    return Job([*PAML, "train", *options], log, env=env or environment(), cwd=cwd)


def terminate(process: subprocess.Popen, seconds: float = 20.0) -> None:
    """Send SIGTERM, and SIGKILL if the process does not end in time."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill(process: psutil.Process) -> None:
    """Send SIGKILL; a process that has ended is not an error."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def processes_named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Processes whose command line begins with `name`, oldest first."""
    matches = []
    for process in processes:
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if line and line[0].startswith(name):
            matches.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(matches, key=lambda each: each[:2])]


def survivors(processes: list[psutil.Process], seconds: float = 60.0) -> list[psutil.Process]:
    """Processes that still run after at most so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def newest_step(run_folder: Path) -> int:
    """Optimizer steps of the newest committed checkpoint; 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in run_folder.glob("checkpoints/*/COMMIT")), default=0)


def status_in_mlflow(uri: str, name: str) -> list[str]:
    """Status of every MLflow run with this name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments, f"attributes.run_name = '{name}'")]
