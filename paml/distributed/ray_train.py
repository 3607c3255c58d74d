"""Ray Train workers around the training loop: DDP process groups, lost workers replaced, results brought home."""

import contextlib
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paml import storage
from paml.distributed import cluster
from paml.distributed.console import Console, ConsoleHandler, RemoteBar, printing
from paml.distributed.hangs import ControllerProcess, Heartbeat, StallError, Watch, beat_seconds
from paml.distributed.metrics import RayMeter
from paml.distributed.room import Move, wait_for_room
from paml.errors import PamlError, SettingsError
from paml.tracking.journal import Journal
from paml.training.loop import Left, Result, Watcher, train
from paml.training.settings import TrainSettings, WorkerSettings
from paml.training.world import World, current_world

END_SECONDS = 45.0
"""How long Ray Train's controller may take to end an attempt that was given up: 35 s where a worker does not listen."""


def connect(settings: WorkerSettings) -> None:
    """Join the cluster of `workers.address` or RAY_ADDRESS; where there is none, start Ray in this process."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    for name in ("COLLECTIVE_TIMEOUT_S", "WORKER_HEALTH_CHECK_TIMEOUT_S"):
        os.environ.setdefault(f"RAY_TRAIN_{name}", str(_later(settings)))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a lost node is a lost worker, replaced below
    # Workers speak through Console; what else Ray's processes print stays in Ray's log folder.
    cluster.join(settings.address)


def _later(settings: WorkerSettings) -> float:
    """When all else gives up, in seconds: after the watch, which alone can tell which worker is to blame."""
    return 1.2 * settings.collective_timeout_seconds + 5


def _start_seconds(settings: WorkerSettings) -> float:
    """When workers that were not heard of are given up: Ray Train's wait for their place, then that for their start,
    which takes minutes where a machine is busy or an image is to be pulled.
    """
    placed = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60.0))
    return placed + max(300.0, settings.collective_timeout_seconds)


def resources_per_worker(settings: WorkerSettings, cluster: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs of each worker: as set, else equal shares of what the cluster has, one GPU at most."""
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) >= 1 else 0.0
    cpus = settings.cpus_per_worker
    if cpus is None:
        share = cluster.get("CPU", 1.0) / settings.num_workers
        cpus = float(int(share)) if share >= 1 else int(share * 100) / 100
    fits = settings.num_workers * gpus <= cluster.get("GPU", 0) and settings.num_workers * cpus <= cluster.get("CPU", 0)
    if not fits and settings.min_workers is None:
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
    newest checkpoint. Workers on a node that is about to go move elsewhere, and an elastic run takes what room there
    is; neither counts as a failure. With `last_epoch` it breaks off after that epoch, and the result is empty. Raises
    PamlError for what starting again would only repeat, RuntimeError for a lost cause.

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
    workers = settings.workers
    resources = resources_per_worker(workers, dict(ray.cluster_resources()))
    least, failures, count = workers.min_workers or workers.num_workers, 0, workers.num_workers
    tell, begun = say or _to_terminal, False
    while True:
        if begun or workers.min_workers is not None:
            count = wait_for_room(resources, least, workers.num_workers, _start_seconds(workers), tell)
            if count < workers.num_workers:
                tell(f"going on with {count} of {workers.num_workers} workers: the cluster has room for no more")
        begun = True
        console = _console()
        try:
            with printing(console, say=say):
                failure = _fit(settings, run_folder, resources, count, console, last_epoch, callbacks)
            patience = max(30.0, workers.collective_timeout_seconds)
            message = None if failure is None else _answer(console.failed_for_good, patience)
            left = None if failure is not None else _answer(console.why_left, patience)
        finally:
            ray.kill(console)
        if left is not None:
            tell(f"{left}: the workers have left a checkpoint, and begin again")
            continue
        if failure is None and last_epoch is not None:
            return Result({}, {}, [])
        if failure is None:
            return Result.read(run_folder)
        if message is not None:
            raise PamlError(message)
        failures += 1
        if failures > workers.max_failures:
            raise RuntimeError(f"training failed {failures} times, the last time by:\n{failure}")
        _to_terminal(f"{what_failed(failure)}; restart {failures} of {workers.max_failures} from the newest checkpoint")


def _console() -> Any:
    """One an attempt, so that what is left of the last one is not heard; it comes back where its process is killed.

    It is on the driver's node, which nothing of the run outlives: anywhere else, as on the head, it would be one more
    thing that can be lost.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    kept: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    actor: Any = ray.remote(**kept)(Console)
    return actor.remote()


def _to_terminal(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _answer(method: Any, seconds: float) -> Any:
    """What an actor answers. Raises RuntimeError where nothing comes in time: then Ray itself is at fault."""
    try:
        return ray.get(method.remote(), timeout=seconds)
    except RayError as error:
        raise RuntimeError(
            f"Ray has not answered for {seconds:g} s ({_last_line(error)}): see `ray status` and start Ray again where "
            "it hangs, then give the same command with --run.resume true"
        ) from error


def what_failed(failure: BaseException) -> str:
    """One line. Workers that died are named alone: the errors of the others follow from that."""
    if isinstance(failure, StallError):
        return str(failure)
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
    count: int,
    console: Any,
    last_epoch: int | None,
    callbacks: Sequence[UserCallback],
) -> BaseException | None:
    """One attempt; None when it finished. Its name is new each time, so Ray never takes up an old one in silence."""
    workers, on_gpus = settings.workers, "GPU" in resources
    environment = cluster.task_environment()
    limit, later = workers.collective_timeout_seconds, _later(workers)
    if on_gpus:  # NCCL is to go first, since it then writes down which collectives were under way
        limit, later = later, limit
        environment = environment | {"env_vars": environment.get("env_vars", {}) | nccl_environment(settings.run.name)}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "settings": settings,
            "run_folder": run_folder,
            "last_epoch": last_epoch,
            "console": console,
            "storage": ray.put(cluster.storage_environment()),  # a reference, since dashboards show what stands here
        },
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=math.ceil(later)),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{settings.run.name}-{time.time_ns()}",
            storage_path=ray_storage(run_folder),
            callbacks=[*callbacks, ControllerProcess(console)],  # pyright: ignore[reportArgumentType] - Ray takes both
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env=environment,
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    watch, move = Watch(console, count, limit, _start_seconds(workers)), Move(workers, resources, count)
    outcome = cluster.in_thread(trainer.fit)
    try:
        while not outcome.done():
            wait([outcome], timeout=watch.every_seconds)
            stalled = None if outcome.done() else watch.look()
            if stalled is not None:
                watch.end_attempt(outcome, END_SECONDS)
                hint = "Where that may truly take longer, raise workers.collective_timeout_seconds"
                return StallError(f"{stalled}. {hint}")
            reason = move.reason(watch.nodes)
            if reason is not None:
                console.leave.remote(reason)
    finally:
        move.close()
    error = outcome.exception()
    if error is None:
        return None
    if not isinstance(error, ray.train.TrainingFailedError | RayError):
        raise error
    if not isinstance(error, ray.train.TrainingFailedError):
        watch.clear_up()
    stalled = watch.look(0.8)  # of two that notice it, the one that cannot tell whom to blame may have been faster
    return StallError(f"{stalled} ({what_failed(error)})") if stalled is not None else error


def ray_storage(run_folder: str) -> str:
    """Where Ray keeps its own notes of an attempt; nothing of ours depends on them."""
    folder = storage.join(run_folder, "ray")
    return folder if storage.is_remote(folder) else str(Path(folder).resolve())


def nccl_environment(run: str) -> dict[str, str]:
    """What makes NCCL give up on a collective that hangs and leave on the node's disk which were under way; what the
    user has set stands. Both spellings, since torch changed them with 2.9.
    """
    trace = storage.join(dumps_folder(run), "rank_")
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **dict.fromkeys(("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        **dict.fromkeys(("TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"), "1"),
        **dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), trace),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def dumps_folder(run: str) -> str:
    """Where a node keeps what NCCL wrote down, until the next attempt takes it into the run's storage."""
    return storage.join(storage.cache_folder(), "nccl", run)


def _keep_dumps(run: str, run_folder: str) -> None:
    """Bring what NCCL wrote on this node in an attempt before into `<run>/hangs/`; make room for the next."""
    folder = dumps_folder(run)
    os.makedirs(folder, exist_ok=True)
    for name in storage.list_files(folder):
        local = storage.join(folder, name)
        kept = f"{time.strftime('%Y%m%d-%H%M%S')}-{platform.node()}-{name}"
        with contextlib.suppress(FileNotFoundError):  # another worker of this node was faster
            storage.upload(local, storage.join(run_folder, "hangs", kept))
            storage.delete(local)


def _worker(config: dict[str, Any]) -> None:
    settings, run_folder, console = config["settings"], config["run_folder"], config["console"]
    world = current_world(_later(settings.workers))
    heart = Heartbeat(console, world.rank, every_seconds=beat_seconds(settings.workers.collective_timeout_seconds))
    try:
        _work(settings, run_folder, world, heart, config)
    finally:
        heart.end()


def _work(settings: TrainSettings, run_folder: str, world: World, heart: Heartbeat, config: dict[str, Any]) -> None:
    console = config["console"]
    os.environ.update(ray.get(config["storage"], timeout=settings.workers.collective_timeout_seconds))
    logging.getLogger().addHandler(ConsoleHandler(console, first=world.first))
    logging.captureWarnings(True)
    if world.device.type == "cuda":
        _keep_dumps(settings.run.name, run_folder)
    watcher = Watcher(
        journal=Journal(run_folder, "rank0") if world.first else None,
        say=lambda line: console.say.remote(line),  # without waiting: a console that is away holds up no worker
        bar=(lambda title, images: RemoteBar(console, title, images)) if world.first else Watcher.bar,
        epoch_done=lambda figures: ray.train.report(dict(figures)),
        meter=RayMeter(settings.run.name, world.rank),
        at=heart.at,
        leaving=lambda: world.any(heart.leave),
    )
    try:
        result = train(settings, world, watcher, config["last_epoch"])
    except Left:
        if world.first:
            ray.get(console.left.remote(), timeout=settings.workers.collective_timeout_seconds)
        return
    except PamlError as error:
        ray.get(console.fatal.remote(str(error)), timeout=settings.workers.collective_timeout_seconds)
        raise
    if world.first and config["last_epoch"] is None:  # a file that means that the run is at its end
        storage.write_bytes(storage.join(run_folder, "result.json"), json.dumps(result.to_json()).encode())
