"""Ray Train workers around the training loop: DDP process groups, lost workers replaced, results brought home."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from paml import storage
from paml.distributed import cluster
from paml.distributed.console import Console, ConsoleHandler, RemoteBar, printing
from paml.errors import PamlError, SettingsError
from paml.tracking.journal import Journal
from paml.training.loop import Result, Watcher, train
from paml.training.settings import TrainSettings, WorkerSettings
from paml.training.world import current_world


def connect(settings: WorkerSettings) -> None:
    """Join the cluster of `workers.address` or RAY_ADDRESS; where there is none, start Ray in this process."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(settings.collective_timeout_seconds))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a lost node is a lost worker, replaced below
    # Workers speak through Console; what else Ray's processes print stays in Ray's log folder.
    cluster.join(settings.address)


def resources_per_worker(settings: WorkerSettings, cluster: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs of each worker: as set, else equal shares of what the cluster has, one GPU at most."""
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) >= 1 else 0.0
    cpus = settings.cpus_per_worker
    if cpus is None:
        share = cluster.get("CPU", 1.0) / settings.num_workers
        cpus = float(int(share)) if share >= 1 else int(share * 100) / 100
    if settings.num_workers * gpus > cluster.get("GPU", 0) or settings.num_workers * cpus > cluster.get("CPU", 0):
        raise SettingsError(
            f"{settings.num_workers} workers of {cpus:g} CPUs and {gpus:g} GPUs do not fit the cluster, which has "
            f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs: lower workers.num_workers or the "
            "share of each"
        )
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def train_on_ray(
    settings: TrainSettings,
    run_folder: str,
    last_epoch: int | None = None,
    *,
    say: Callable[[str], None] | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Run the loop on Ray Train workers. Lost workers are replaced `workers.max_failures` times, each time from the
    newest checkpoint. With `last_epoch` it breaks off after that epoch, and the result is empty. Raises PamlError for
    what starting again would only repeat, RuntimeError for a lost cause.

    say: hears the workers' lines instead of the terminal. callbacks: Ray Train's, called in its controller.
    """
    return cluster.beside(lambda: _attempts(settings, run_folder, last_epoch, say, callbacks))


def _attempts(
    settings: TrainSettings,
    run_folder: str,
    last_epoch: int | None,
    say: Callable[[str], None] | None,
    callbacks: Sequence[UserCallback],
) -> Result:
    resources = resources_per_worker(settings.workers, dict(ray.cluster_resources()))
    console: Any = ray.remote(num_cpus=0)(Console).remote()  # pyright: ignore[reportFunctionMemberAccess]
    for attempt in range(settings.workers.max_failures + 1):
        with printing(console, say=say):
            failure = _fit(settings, run_folder, resources, console, last_epoch, callbacks)
        if failure is None and last_epoch is not None:
            return Result({}, {}, [])
        if failure is None:
            return Result.read(run_folder)
        message = ray.get(console.failed_for_good.remote())
        if message is not None:
            raise PamlError(message)
        if attempt == settings.workers.max_failures:
            raise RuntimeError(f"training failed {attempt + 1} times, the last time by:\n{failure}")
        print(
            f"{what_failed(failure)}; restart {attempt + 1} of {settings.workers.max_failures} from the newest "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("unreachable: the last attempt returns or raises")


def what_failed(failure: BaseException) -> str:
    """One line. Workers that died are named alone: the errors of the others follow from that."""
    failures = dict(getattr(failure, "worker_failures", {}))
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    dead = {rank: error for rank, error in causes.items() if isinstance(error, RayActorError)}
    if dead:
        return "; ".join(f"worker {rank} died ({_cause_of_death(error)})" for rank, error in sorted(dead.items()))
    if causes:
        return "; ".join(f"worker {rank} failed ({_last_line(error)})" for rank, error in sorted(causes.items()))
    return f"the workers failed ({_last_line(failure)})"


def _cause_of_death(error: BaseException) -> str:
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    return detail.group(1).strip()[:300] if detail else _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


def _fit(
    settings: TrainSettings,
    run_folder: str,
    resources: dict,
    console: Any,
    last_epoch: int | None,
    callbacks: Sequence[UserCallback],
) -> BaseException | None:
    """One attempt; None when it finished. Its name is new each time, so Ray never takes up an old one in silence."""
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "settings": settings,
            "run_folder": run_folder,
            "last_epoch": last_epoch,
            "console": console,
            "storage": ray.put(cluster.storage_environment()),  # a reference, since dashboards show what stands here
        },
        torch_config=TorchConfig(
            backend="nccl" if "GPU" in resources else "gloo", timeout_s=int(settings.workers.collective_timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=settings.workers.num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{settings.run.name}-{time.time_ns()}",
            storage_path=ray_storage(run_folder),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env=cluster.task_environment(),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return error
    return None


def ray_storage(run_folder: str) -> str:
    """Where Ray keeps its own notes of an attempt; nothing of ours depends on them."""
    folder = storage.join(run_folder, "ray")
    return folder if storage.is_remote(folder) else str(Path(folder).resolve())


def _worker(config: dict[str, Any]) -> None:
    settings, run_folder, console = config["settings"], config["run_folder"], config["console"]
    os.environ.update(ray.get(config["storage"]))
    world = current_world()
    if world.first:
        logging.getLogger().addHandler(ConsoleHandler(console))
        logging.captureWarnings(True)
    watcher = Watcher(
        journal=Journal(run_folder, "rank0") if world.first else None,
        say=lambda line: ray.get(console.say.remote(line)),
        bar=(lambda title, images: RemoteBar(console, title, images)) if world.first else Watcher.bar,
        epoch_done=lambda figures: ray.train.report(dict(figures)),
    )
    try:
        result = train(settings, world, watcher, config["last_epoch"])
    except PamlError as error:
        ray.get(console.fatal.remote(str(error)))
        raise
    if world.first and config["last_epoch"] is None:  # a file that means that the run is at its end
        storage.write_bytes(storage.join(run_folder, "result.json"), json.dumps(result.to_json()).encode())
