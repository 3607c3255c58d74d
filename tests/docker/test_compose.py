"""docker/compose.yaml as shipped, with the real images of paml; PostgreSQL, Redis and the S3 store are substitutes.

`make soak` runs it. It needs the training image (30 minutes to build) and about 10 GB of memory. With
PAML_DOCKER_QUICK=1 the training image is built without packages and gets those of this Python by a volume.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.docker_engine import PACKAGES, Engine, docker_engine
from tests.helpers.jobs import ROOT, tiny_options

pytestmark = [pytest.mark.soak, pytest.mark.timeout(9000)]

QUICK = os.environ.get("PAML_DOCKER_QUICK") == "1"
TARGET = "train-cpu" if QUICK else "train-cuda"
EPOCHS, STEPS = 40, 10  # 200 images in batches of 20

SCENES = """
from paml.sources.digit_scenes import write_digit_scenes
write_digit_scenes("/scratch/scenes", images={"train": 200, "validation": 40, "test": 40}, size=32)
"""

DIGEST = """
import hashlib, sys
from paml.training.checkpoint import list_checkpoints, read_checkpoint
folder = sys.argv[1]
name = list_checkpoints(folder)[-1]
tensors = read_checkpoint(folder, name).tensors
digest = hashlib.sha256()
for group in sorted(tensors):
    for key in sorted(tensors[group]):
        digest.update(f"{group}/{key}".encode() + tensors[group][key].numpy().tobytes())
print(name, sum(map(len, tensors.values())), digest.hexdigest())
"""

NEWEST = """
import sys
from paml.training.checkpoint import list_checkpoints
print(int((list_checkpoints(sys.argv[1]) or ["step-0"])[-1].removeprefix("step-")))
"""

DRIVER = """
import sys
from ray.job_submission import JobSubmissionClient
print(JobSubmissionClient("http://127.0.0.1:8265").get_job_info(sys.argv[1]).driver_info.node_ip_address)
"""

RUNS = """
from mlflow import MlflowClient
client = MlflowClient()
ids = [each.experiment_id for each in client.search_experiments()]
for run in client.search_runs(ids):
    print(run.info.run_name, run.info.status, len(run.data.metrics))
"""

WITHOUT_TOKEN = """
import urllib.request, urllib.error
try:
    print(urllib.request.urlopen("http://ray-head:8265/api/jobs/", timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


class Stack:
    """The containers of the compose file."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        text = (ROOT / "docker" / ".env.example").read_text()
        text = re.sub(r"^TRAIN_TARGET=.*", f"TRAIN_TARGET={TARGET}", text, flags=re.M)
        (folder / "env").write_text(re.sub(r"^CPUS_PER_WORKER=.*", "CPUS_PER_WORKER=2", text, flags=re.M))
        services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
        # Ports of this machine may be in use, and its limit of open files is too low for Ray.
        lines = ["services:"]
        for name in services:
            lines += [f"  {name}:", "    ports: !reset []", "    ulimits: {nofile: 20000}"]
            if QUICK and name in ("bucket", "ray-head", "ray-worker"):
                lines += [f"    volumes: ['{PACKAGES}', '{folder / 'ray'}:/opt/venv/bin/ray:ro']"]
        (folder / "ray").write_text("#!/opt/venv/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
        (folder / "ray").chmod(0o755)
        (folder / "here.yaml").write_text("\n".join(lines) + "\n")
        files = ["-f", str(ROOT / "docker" / "compose.yaml"), "-f", str(folder / "here.yaml")]
        self._command = [*engine.compose(), "--env-file", str(folder / "env"), *files]

    def run(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, env=self._engine.environment, timeout=timeout
        )

    def __call__(self, *arguments: str, timeout: float = 900) -> str:
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, f"compose {' '.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def python(self, code: str, *arguments: str) -> str:
        """The output of a program in the head's container."""
        return self("exec", "-T", "ray-head", "python", "-c", code, *arguments).strip()

    def states(self) -> dict[str, str]:
        """State or health by container."""
        lines = self("ps", "--all", "--format", "json").splitlines()
        containers = [json.loads(line) for line in lines]
        return {each["Name"]: each["Health"] or f"{each['State']} {each['ExitCode']}" for each in containers}

    def kill(self, container: str) -> None:
        """SIGKILL from outside, as the kernel does when memory runs out: Docker restarts the container."""
        os.kill(self._engine.inspect(container)["State"]["Pid"], signal.SIGKILL)

    def restarts(self, container: str) -> int:
        return self._engine.inspect(container)["RestartCount"]

    def address(self, container: str) -> str:
        (network,) = self._engine.inspect(container)["NetworkSettings"]["Networks"].values()
        return network["IPAddress"]


def until(condition: Callable[[], object], what: str, seconds: float) -> float:
    """Wait; returns the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"waited {seconds:g} s for {what}"
        time.sleep(2)
    return time.monotonic() - start


@contextlib.contextmanager
def running(engine: Engine, folder: Path) -> Iterator[Stack]:
    stack = Stack(engine, folder)
    try:
        stack("up", "--no-build", "--pull", "never", "--detach", timeout=1800)
        yield stack
    except BaseException:
        print(stack.run("ps", "--all").stdout, stack.run("logs", "--tail", "40").stdout[-20000:])
        raise
    finally:
        stack.run("down", "--volumes", "--timeout", "5")


def options(name: str) -> list[str]:
    """A run with every kind of state, on two workers, that is a minute long at least."""
    tiny = tiny_options(
        Path("DATA"), Path("RUNS"), name, epochs=EPOCHS, workers__num_workers=2, workers__cpus_per_worker=1,
        loss__name="ll-cp", loss__reject_rate_step=0.02, optimizer__ema_decay=0.9, optimizer__schedule="one_cycle",
        data__flip_prob=0.5, checkpoint__every_steps=3, run__resume="auto",
    )  # fmt: skip
    trackers = tiny.index("--run.trackers")
    del tiny[trackers : trackers + 2]
    return [{"DATA": "s3://paml/data", "RUNS": "s3://paml/runs"}.get(each, each) for each in tiny]


def submit(stack: Stack, name: str) -> None:
    stack(
        "exec", "-T", "ray-head", "ray", "job", "submit", "--no-wait", f"--submission-id={name}",
        "--address=http://127.0.0.1:8265", "--entrypoint-num-cpus=1",
        "--", "python", "/opt/paml/jobs/train_openimages.py", *options(name),
    )  # fmt: skip


def status(stack: Stack, name: str) -> str:
    done = stack.run("exec", "-T", "ray-head", "ray", "job", "status", "--address=http://127.0.0.1:8265", name)
    match = re.search(r"(PENDING|RUNNING|SUCCEEDED|FAILED|STOPPED)|failed|succeeded", done.stdout + done.stderr)
    return match[0].upper() if match else "UNKNOWN"


def finish(stack: Stack, name: str, seconds: float = 1800) -> None:
    def ended() -> bool:
        job_status = status(stack, name)
        if job_status in ("FAILED", "STOPPED"):
            address = "--address=http://127.0.0.1:8265"
            logs = stack.run("exec", "-T", "ray-head", "ray", "job", "logs", address, name)
            raise AssertionError(f"{name} {job_status}: {logs.stdout[-6000:]}")
        return job_status == "SUCCEEDED"

    until(ended, f"the end of {name}", seconds)


def test_a_training_survives_killed_containers_with_the_same_bits(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("docker")
    with docker_engine(folder) as engine:
        engine.compose()
        if not engine.has(f"paml-train:{TARGET}"):
            engine.build(TARGET, f"paml-train:{TARGET}", packages=not QUICK)
        if not engine.has("paml-tracking"):
            engine.build("tracking", "paml-tracking")
        engine.build_substitutes()
        work = engine.folder / "compose"
        work.mkdir(exist_ok=True)
        with running(engine, work) as stack:
            _check(stack)
        shutil.rmtree(work)


def _check(stack: Stack) -> None:
    healthy = {
        "paml-bucket-1": "exited 0", "paml-mlflow-1": "healthy", "paml-postgres-1": "healthy",
        "paml-ray-head-1": "healthy", "paml-ray-worker-1": "healthy", "paml-ray-worker-2": "healthy",
        "paml-redis-1": "healthy", "paml-s3-1": "healthy",
    }  # fmt: skip
    took = until(lambda: stack.states() == healthy, "health of all containers", 600)
    print(f"healthy {took:.0f} s after `up` returned")
    assert stack.python(WITHOUT_TOKEN) == "401"

    stack.python(SCENES)
    stack(
        "exec", "-T", "ray-head", "python", "/opt/paml/jobs/prepare_openimages.py",
        "--labels", "/scratch/scenes/2017_11", "--images", "/scratch/scenes/images", "--out", "s3://paml/data",
        "--shards.size", "32", "--shards.samples_per_shard", "50", "--ray", "false", "--workers", "1",
    )  # fmt: skip
    submit(stack, "undisturbed")
    finish(stack, "undisturbed")
    expected = stack.python(DIGEST, "s3://paml/runs/undisturbed")

    def newest() -> int:
        return int(stack.python(NEWEST, "s3://paml/runs/disturbed"))

    def continues(after: int) -> bool:
        return newest() > after

    submit(stack, "disturbed")
    until(lambda: newest() >= STEPS, "the first epoch", 600)
    driver = stack.python(DRIVER, "disturbed")
    workers = {stack.address(each): each for each in ("paml-ray-worker-1", "paml-ray-worker-2")}
    assert driver in workers, f"the driver is at {driver}, the workers at {workers}"
    (other,) = [name for address, name in workers.items() if address != driver]
    step = newest()
    stack.kill(other)
    took = until(lambda: continues(step + 1), "a checkpoint after the loss of a worker", 600)
    print(f"worker killed at step {step}: a newer checkpoint {took:.0f} s later")
    step = newest()
    stack("restart", "--timeout", "5", "postgres")
    stack.kill(head := "paml-ray-head-1")
    until(lambda: stack.restarts(head) and stack.states()[head] == "healthy", "the head", 300)
    took = until(lambda: continues(step), "a checkpoint after the loss of the head", 600)
    print(
        f"head killed and PostgreSQL restarted at step {step}: a newer checkpoint {took:.0f} s after the head was back"
    )
    assert newest() < EPOCHS * STEPS, "the run ended before the faults did: increase the epochs"
    finish(stack, "disturbed")
    assert stack.restarts(head) >= 1
    assert stack.restarts(other) >= 1

    digest = stack.python(DIGEST, "s3://paml/runs/disturbed")
    print(f"undisturbed {expected}\n  disturbed {digest}")
    assert digest == expected
    shown = dict(re.findall(r"^(\S+) (\w+) \d+$", stack.python(RUNS), re.M))
    assert shown == {"undisturbed": "FINISHED", "disturbed": "FINISHED"}
