"""Training through Ray that is killed repeatedly, and its last checkpoint."""

import dataclasses
import os
import random
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch
import yaml

from paml.distributed.local_head import ray_head
from paml.settings import settings_from_values
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.settings import TrainSettings
from tests.helpers.jobs import (
    QUIET,
    ROOT,
    WORKER,
    environment,
    kill,
    newest_step,
    processes_named,
    survivors,
    tiny_options,
    train_job,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import finish

EPOCHS, STEPS = 6, 10  # 200 images in batches of 20


def hard_options(data: Path, runs: Path, name: str, workers: int, epochs: int = EPOCHS) -> list[str]:
    """A run with every kind of state: BatchNorm, EMA weights, one-cycle, LL-Cp's corrections, flips, the probe."""
    return tiny_options(
        data,
        runs,
        name,
        epochs=epochs,
        workers__num_workers=workers,
        loss__name="ll-cp",
        loss__reject_rate_step=0.02,
        optimizer__ema_decay=0.9,
        optimizer__schedule="one_cycle",
        data__flip_prob=0.5,
        checkpoint__every_steps=3,
    )


class OwnRay:
    """A private head that can be killed and restarted."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._head: psutil.Process | None = None
        self.environment: Mapping[str, str] = {}

    def start(self) -> None:
        """Start it on new ports."""
        os.environ.update(QUIET)
        before = {process.pid for process in psutil.Process().children()}
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        with suppress(PermissionError):  # Ray gives up if its processes start slowly, as on a busy machine
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        try:
            self.environment = environment(**self._stack.enter_context(ray_head(ROOT, cpus=2)))
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, priority)
        (self._head,) = [process for process in psutil.Process().children() if process.pid not in before]
        for process in self.processes():
            with suppress(psutil.Error):
                process.nice(priority)

    def processes(self) -> list[psutil.Process]:
        """The head, the GCS, the raylet and every worker."""
        assert self._head is not None
        return [self._head, *self._head.children(recursive=True)]

    def kill(self) -> None:
        """Kill all of its processes at once."""
        found = self.processes()
        for process in found:
            kill(process)
        assert not survivors(found, 30)
        self.stop()

    def stop(self) -> None:
        """Stop it."""
        self._stack.close()
        self._head = None


@dataclasses.dataclass
class Kill:
    """A kill and the recovery from it."""

    kind: str
    workers: int
    step: int
    """Newest checkpoint at the kill, in optimizer steps."""
    seconds: float = 0.0
    """From the kill to the first newer checkpoint, including the start of Ray and of the job."""


def final_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by group and name."""
    checkpoint = read_checkpoint(str(run_folder), list_checkpoints(str(run_folder))[-1])
    return {f"{group}/{name}": value for group, part in checkpoint.tensors.items() for name, value in part.items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bit-identical."""
    names = first.keys() | second.keys()
    return sorted(
        name
        for name in names
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or first[name].shape != second[name].shape
        or first[name].numpy().tobytes() != second[name].numpy().tobytes()
    )


def uninterrupted(data: Path, runs: Path, workers: int, epochs: int = EPOCHS) -> dict[str, torch.Tensor]:
    """The last checkpoint of an uninterrupted run on Gloo workers, without Ray."""
    name = f"uninterrupted-{workers}"
    options = hard_options(data, runs, name, workers, epochs)
    values = {key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(*[iter(options)] * 2, strict=True)}
    settings = settings_from_values(TrainSettings, values, name)
    run_on_ranks(finish, workers, settings, timeout_s=600)  # forty epochs on a slow machine
    assert newest_step(runs / name) == epochs * STEPS
    return final_tensors(runs / name)


def killed(
    data: Path, runs: Path, workers: int, ray: OwnRay, kinds: list[str], seed: int, epochs: int = EPOCHS
) -> tuple[dict[str, torch.Tensor], list[Kill]]:
    """The last checkpoint of a run that is killed in these ways (worker, driver, ray) at random moments.

    The steps are divided into as many parts as there are kills; each kill comes at a random step of its part.
    """
    rng = random.Random(seed)
    name = f"killed-{workers}-{seed}"
    folder, log = runs / name, runs.parent / name
    options = hard_options(data, runs, name, workers, epochs)
    job = train_job(options, log.with_suffix(".0.log"), env=ray.environment)
    part = (epochs * STEPS - 6) / len(kinds)
    kills: list[Kill] = []
    try:
        for number, kind in enumerate(kinds):
            target = int(part * (number + rng.random())) + 1
            job.until(lambda target=target: newest_step(folder) >= target, f"step {target}")
            time.sleep(rng.random() * 0.3)
            start, done = time.monotonic(), Kill(kind, workers, newest_step(folder))
            if kind == "worker":
                kill(rng.choice(processes_named(ray.processes(), WORKER)[-workers:]))
            else:
                old = [*job.descendants(), psutil.Process(job.process.pid)]
                if kind == "driver":
                    kill(old[-1])
                    left = processes_named(ray.processes(), WORKER)
                else:
                    left = ray.processes()
                    ray.kill()
                assert job.wait(240) != 0, job.output
                assert not survivors([*old, *left]), "processes of the killed run still run"
                if kind == "ray":
                    ray.start()
                job = train_job(
                    [*options, "--run.resume", "true"], log.with_suffix(f".{number + 1}.log"), env=ray.environment
                )
            before = newest_step(folder)
            job.until(lambda before=before: newest_step(folder) > before, f"recovery from kill {number + 1} ({kind})")
            done.seconds = time.monotonic() - start
            kills.append(done)
        assert job.wait() == 0, job.output
    finally:
        job.end()
    assert newest_step(folder) == epochs * STEPS
    return final_tensors(folder), kills
