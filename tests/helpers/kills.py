"""Training through Ray that is killed again and again, and what its last checkpoint holds in the end."""

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

from jobs.train_openimages import RECIPE
from paml.compare.grid import read_training
from paml.distributed.local_head import ray_head
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.settings import flatten
from tests.helpers.jobs import QUIET, ROOT, WORKER, environment, gone, kill, named, newest_step, tiny_options, train_job
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import finish

EPOCHS, STEPS = 6, 10  # 200 images in batches of 20


def hard_options(data: Path, runs: Path, name: str, workers: int, epochs: int = EPOCHS) -> list[str]:
    """All that a run must keep: BatchNorm, averaged weights, one-cycle, LL-Cp's corrections, flips, the probe."""
    return tiny_options(
        data,
        runs,
        name,
        epochs=epochs,
        workers__num_workers=workers,
        loss__name="ll-cp",
        loss__reject_rate_step=0.02,
        optimiser__average=0.9,
        optimiser__schedule="one_cycle",
        data__flip=0.5,
        checkpoint__every_steps=3,
    )


class OwnRay:
    """A head of our own that can be killed and started again."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._head: psutil.Process | None = None
        self.environment: Mapping[str, str] = {}

    def start(self) -> None:
        """Up, on new ports."""
        os.environ.update(QUIET)
        before = {process.pid for process in psutil.Process().children()}
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        with suppress(PermissionError):  # Ray gives up where its parts take long to start, as on a busy machine
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        try:
            self.environment = environment(**self._stack.enter_context(ray_head(ROOT, cpus=2)))
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, usual)
        (self._head,) = [process for process in psutil.Process().children() if process.pid not in before]
        for process in self.processes():
            with suppress(psutil.Error):
                process.nice(usual)

    def processes(self) -> list[psutil.Process]:
        """The head, the GCS, the raylet and every worker."""
        assert self._head is not None
        return [self._head, *self._head.children(recursive=True)]

    def kill(self) -> None:
        """All of them at once."""
        found = self.processes()
        for process in found:
            kill(process)
        assert not gone(found, 30)
        self.stop()

    def stop(self) -> None:
        """As its context manager does."""
        self._stack.close()
        self._head = None


@dataclasses.dataclass
class Kill:
    """One kill and how long it took to come back."""

    kind: str
    workers: int
    step: int
    """Newest checkpoint at the kill, in optimiser steps."""
    seconds: float = 0.0
    """From the kill to the first checkpoint that is newer, the start of Ray and of the job included."""


def final_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by group and name."""
    checkpoint = read_checkpoint(str(run_folder), committed(str(run_folder))[-1])
    return {f"{group}/{name}": value for group, part in checkpoint.tensors.items() for name, value in part.items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
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


def unbroken(data: Path, runs: Path, workers: int, epochs: int = EPOCHS) -> dict[str, torch.Tensor]:
    """The last checkpoint of a run that nobody disturbed: on Gloo workers of this machine, without Ray."""
    name = f"unbroken-{workers}"
    options = hard_options(data, runs, name, workers, epochs)
    values = flatten(yaml.safe_load(RECIPE.read_text()))  # what the job takes for all that no option says
    values |= {key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(*[iter(options)] * 2, strict=True)}
    settings = read_training(values, name)
    run_on_ranks(finish, workers, settings, timeout_s=600)  # forty epochs on a slow machine
    assert newest_step(runs / name) == epochs * STEPS
    return final_tensors(runs / name)


def killed(
    data: Path, runs: Path, workers: int, ray: OwnRay, kinds: list[str], seed: int, epochs: int = EPOCHS
) -> tuple[dict[str, torch.Tensor], list[Kill]]:
    """The last checkpoint of a run that is killed as `kinds` say (worker, driver, ray), at moments drawn by `seed`.

    The steps of the run are cut into as many parts as there are kills; a kill falls anywhere in its part.
    """
    rng = random.Random(seed)
    name = f"killed-{workers}-{seed}"
    folder, log = runs / name, runs.parent / name
    options = hard_options(data, runs, name, workers, epochs)
    job = train_job(options, log.with_suffix(".0.log"), env=ray.environment)
    part = (epochs * STEPS - 6) / len(kinds)
    kills: list[Kill] = []
    try:
        for place, kind in enumerate(kinds):
            target = int(part * (place + rng.random())) + 1
            job.until(lambda target=target: newest_step(folder) >= target, f"step {target}")
            time.sleep(rng.random() * 0.3)
            begun, done = time.monotonic(), Kill(kind, workers, newest_step(folder))
            if kind == "worker":
                kill(rng.choice(named(ray.processes(), WORKER)[-workers:]))
            else:
                old = [*job.descendants(), psutil.Process(job.process.pid)]
                if kind == "driver":
                    kill(old[-1])
                    left = named(ray.processes(), WORKER)
                else:
                    left = ray.processes()
                    ray.kill()
                assert job.wait(240) != 0, job.output
                assert not gone([*old, *left]), "processes of the killed run are left"
                if kind == "ray":
                    ray.start()
                job = train_job(
                    [*options, "--run.resume", "true"], log.with_suffix(f".{place + 1}.log"), env=ray.environment
                )
            before = newest_step(folder)
            job.until(lambda before=before: newest_step(folder) > before, f"recovery from kill {place + 1} ({kind})")
            done.seconds = time.monotonic() - begun
            kills.append(done)
        assert job.wait() == 0, job.output
    finally:
        job.end()
    assert newest_step(folder) == epochs * STEPS
    return final_tensors(folder), kills
