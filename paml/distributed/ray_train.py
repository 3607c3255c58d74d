"""Training on Ray Train workers: starts them, replaces lost ones, and returns the result to the driver."""

import contextlib
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
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
from paml.distributed.capacity import RestartPolicy, wait_for_capacity
from paml.distributed.cluster import print_line, print_to_stderr
from paml.distributed.console import ConsoleHandler, RemoteProgress, forward_console, start_console
from paml.distributed.hangs import HangError, HangMonitor, HeartbeatThread, ReportController, heartbeat_seconds
from paml.distributed.metrics import RayMeter
from paml.errors import PamlError, SettingsError, StorageError
from paml.runs.folder import save_pairs
from paml.runs.journal import Journal
from paml.training.hooks import NoProgress, RunHooks, RunPreempted
from paml.training.loop import train as run_loop
from paml.training.result import Result
from paml.training.settings import TrainSettings, WorkerSettings
from paml.training.world import World, current_world

END_SECONDS = 45.0
"""Time limit for Ray Train's controller to end an attempt. It takes 35 s if a worker does not respond."""


def connect(settings: WorkerSettings) -> None:
    """Join the cluster at `workers.address` or RAY_ADDRESS, or start Ray in this process if both are unset."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    for name in ("COLLECTIVE_TIMEOUT_S", "WORKER_HEALTH_CHECK_TIMEOUT_S"):
        os.environ.setdefault(f"RAY_TRAIN_{name}", str(_late_timeout(settings)))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # RestartPolicy watches for preempted nodes
    cluster.join(settings.address)


def _late_timeout(settings: WorkerSettings) -> float:
    """Time limit in seconds for everything but HangMonitor, which goes first since only it can tell the cause."""
    return 1.2 * settings.collective_timeout_seconds + 5


def _start_timeout(settings: WorkerSettings) -> float:
    """Time limit in seconds for workers to start: Ray Train's limit for their placement, and time to pull an image."""
    placement = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60.0))
    return placement + max(300.0, settings.collective_timeout_seconds)


def resources_per_worker(settings: WorkerSettings, available: Mapping[str, float]) -> dict[str, float]:
    """CPUs and GPUs of each worker: as set, or equal shares of the cluster's, with at most one GPU.

    Raises SettingsError if the workers do not fit on the cluster, unless they are elastic.
    """
    all_cpus, all_gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    gpus = gpus_per_worker(settings, available)
    cpus = settings.cpus_per_worker or cpu_share(all_cpus or 1.0, settings.num_workers)
    fits = settings.num_workers * gpus <= all_gpus and settings.num_workers * cpus <= all_cpus
    if not fits and settings.min_workers is None:
        raise SettingsError(
            f"{settings.num_workers} workers with {cpus:g} CPUs and {gpus:g} GPUs each do not fit on the cluster, "
            f"which has {all_cpus:g} CPUs and {all_gpus:g} GPUs: lower workers.num_workers, workers.cpus_per_worker or "
            "workers.gpus_per_worker"
        )
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def gpus_per_worker(settings: WorkerSettings, available: Mapping[str, float]) -> float:
    """As set, or one if the cluster has any."""
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    return 1.0 if available.get("GPU", 0.0) >= 1 else 0.0


def cpu_share(cpus: float, workers: int) -> float:
    """CPUs per worker: a whole number, or below one CPU a multiple of 0.01."""
    share = cpus / workers
    return float(int(share)) if share >= 1 else int(share * 100) / 100


def train_on_ray(
    settings: TrainSettings, *, log: Callable[[str], None] | None = None, callbacks: Sequence[UserCallback] = ()
) -> Result:
    """Execute the training loop on Ray Train workers. `connect` must have been called.

    Lost workers are replaced `workers.max_failures` times, and training resumes from the newest checkpoint. Workers
    leave nodes that are being removed, and elastic runs grow with the cluster; these restarts do not count.

    log: receives the lines of the workers; by default they are printed. callbacks: for Ray Train's controller.
    Raises PamlError for errors that a restart would repeat, RuntimeError after too many failures.
    """
    return cluster.call_in_thread(lambda: _run_attempts(settings, log, callbacks))


def _run_attempts(
    settings: TrainSettings, log: Callable[[str], None] | None, callbacks: Sequence[UserCallback]
) -> Result:
    workers, failures = settings.workers, 0
    resources = resources_per_worker(workers, ray.cluster_resources())
    count, needs_capacity = workers.num_workers, workers.min_workers is not None
    log_event = log or print_to_stderr
    while True:
        if needs_capacity:
            least = workers.min_workers or workers.num_workers
            count = wait_for_capacity(resources, least, workers.num_workers, _start_timeout(workers), log_event)
            if count < workers.num_workers:
                log_event(f"training with {count} of {workers.num_workers} workers: no more fit on the cluster")
        needs_capacity = True
        # It is on the driver's node, without which the run ends anyway, and restarted if its process is killed.
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        console = start_console(max_restarts=-1, max_task_retries=-1, scheduling_strategy=this_node)
        try:
            with forward_console(console, log or print_line):
                failure = _run_attempt(settings, resources, count, console, callbacks)
            answer = console.outcome.remote()
            outcome: dict[str, Any] = ray.get(answer, timeout=max(30.0, workers.collective_timeout_seconds))
        except RayError as error:
            raise RuntimeError(
                f"Ray does not answer ({last_line(error)}): check `ray status`, restart Ray if it hangs, and repeat "
                "the command with --run.resume true"
            ) from error
        finally:
            ray.kill(console)
        if failure is None and "preempted" in outcome:
            log_event(f"{outcome['stop_reason'] or 'the driver asked'}: the workers wrote a checkpoint and restart")
            continue
        if failure is None and "result" in outcome:
            return outcome["result"]
        if failure is not None and "fatal_error" in outcome:
            raise PamlError(outcome["fatal_error"])
        failures += 1
        if failures > workers.max_failures:
            raise RuntimeError(f"training failed {failures} times, the last time by:\n{failure}")
        reason = "the result was lost" if failure is None else describe_failure(failure)
        print_to_stderr(f"{reason}; restart {failures} of {workers.max_failures} from the newest checkpoint")


def describe_failure(failure: BaseException) -> str:
    """One line. If workers died, only they are named, since the errors of the others follow from that."""
    if isinstance(failure, HangError):
        return str(failure)
    failures = dict(getattr(failure, "worker_failures", {}))
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    dead = {rank: error for rank, error in causes.items() if isinstance(error, RayActorError)}
    if dead:
        return "; ".join(f"worker {rank} died ({_cause_of_death(error)})" for rank, error in sorted(dead.items()))
    if causes:
        return "; ".join(f"worker {rank} failed ({last_line(error)})" for rank, error in sorted(causes.items()))
    return f"the workers failed ({last_line(failure)})"


def _cause_of_death(error: BaseException) -> str:
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    return detail.group(1).strip()[:300] if detail else last_line(error)


def last_line(error: object) -> str:
    """The last line of an error's message, which is the cause if it has a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:500] if lines else type(error).__name__


def _run_attempt(
    settings: TrainSettings, resources: dict[str, float], count: int, console: Any, callbacks: Sequence[UserCallback]
) -> BaseException | None:
    """Returns what failed, or None. The attempt has a new name, so that Ray does not restore an earlier one."""
    workers, on_gpus = settings.workers, "GPU" in resources
    environment = cluster.task_environment()
    limit, late = workers.collective_timeout_seconds, _late_timeout(workers)
    if on_gpus:  # NCCL times out first, to dump the collectives in progress
        limit, late = late, limit
        variables = environment.get("env_vars", {}) | nccl_environment(str(settings.run.name))
        environment = environment | {"env_vars": variables}
    trainer = TorchTrainer(
        _worker,
        # The credentials are passed by reference, since dashboards show this dict.
        train_loop_config={"settings": settings, "console": console, "storage": ray.put(cluster.storage_environment())},
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=math.ceil(late)),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{settings.run.name}-{time.time_ns()}",
            storage_path=ray_storage(settings.run.folder),
            callbacks=[*callbacks, ReportController(console)],  # pyright: ignore[reportArgumentType] - Ray takes both
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env=environment,
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    monitor = HangMonitor(console, count, limit, _start_timeout(workers))
    restart_policy = RestartPolicy(workers, resources, count)
    outcome = cluster.start_thread(trainer.fit)
    try:
        while not outcome.done():
            wait([outcome], timeout=monitor.every_seconds)
            hang = None if outcome.done() else monitor.check()
            if hang is not None:
                monitor.end_attempt(outcome, END_SECONDS)
                return HangError(f"{hang}. If this can take longer, raise workers.collective_timeout_seconds")
            reason = restart_policy.reason(monitor.nodes)
            if reason is not None:
                console.request_stop.remote(reason)
    finally:
        restart_policy.close()
    error = outcome.exception()
    if error is None:
        return None
    if not isinstance(error, ray.train.TrainingFailedError):
        if not isinstance(error, RayError):
            raise error
        monitor.release_resources()
    hang = monitor.check(0.8)  # a time-out elsewhere may have been faster than the monitor
    return HangError(f"{hang} ({describe_failure(error)})") if hang is not None else error


def ray_storage(folder: str) -> str:
    """Folder for Ray's own records; paml does not read them."""
    folder = storage.join(folder, "ray")
    return folder if storage.is_remote(folder) else str(Path(folder).resolve())


def nccl_environment(run: str) -> dict[str, str]:
    """Variables that make NCCL abort a hanging collective and dump those in progress to the node's disk, unless set by
    the user."""
    defaults = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": storage.join(_dump_folder(run), "rank_"),
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def _dump_folder(run: str) -> str:
    return storage.join(storage.cache_folder(), "nccl", run)


def _upload_dumps(settings: TrainSettings) -> None:
    """Move NCCL's dumps of earlier attempts from this node to `<run>/hangs/`."""
    folder = _dump_folder(str(settings.run.name))
    os.makedirs(folder, exist_ok=True)
    for name in storage.list_files(folder):
        local = storage.join(folder, name)
        target = f"{time.strftime('%Y%m%d-%H%M%S')}-{platform.node()}-{name}"
        with contextlib.suppress(FileNotFoundError):  # another worker of this node was faster
            storage.copy(local, storage.join(settings.run.folder, "hangs", target))
            storage.delete(local)


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train calls in each worker."""
    settings, console = config["settings"], config["console"]
    world, timeout = current_world(_late_timeout(settings.workers)), settings.workers.collective_timeout_seconds
    with contextlib.closing(HeartbeatThread(console, world.rank, heartbeat_seconds(timeout))) as heartbeat:
        os.environ.update(ray.get(config["storage"], timeout=timeout))
        logging.getLogger().addHandler(ConsoleHandler(console, first=world.first))
        logging.captureWarnings(True)
        if world.device.type == "cuda":
            _upload_dumps(settings)
        _train_in_worker(settings, world, heartbeat, console)


def _train_in_worker(settings: TrainSettings, world: World, heartbeat: HeartbeatThread, console: Any) -> None:
    timeout = settings.workers.collective_timeout_seconds
    hooks = RunHooks(
        record_metrics=Journal(settings.run.folder, "rank0").metrics if world.first else RunHooks.record_metrics,
        log=lambda line: console.log.remote(line),  # does not wait for the console
        progress=(lambda title, images: RemoteProgress(console, title, images)) if world.first else NoProgress,
        on_epoch_end=lambda metrics: ray.train.report(dict(metrics)),
        meter=RayMeter(str(settings.run.name), world.rank),
        on_position=heartbeat.on_position,
        should_stop=lambda: world.any(heartbeat.stop_requested),
    )
    try:
        result = run_loop(settings, world, hooks)
    except RunPreempted:
        if world.first:
            ray.get(console.set_outcome.remote(preempted=True), timeout=timeout)
        return
    except PamlError as error:
        if not isinstance(error, StorageError):
            ray.get(console.set_outcome.remote(fatal_error=str(error)), timeout=timeout)
        raise
    if world.first:
        save_pairs(settings.run.folder, result)
        result = Result(result.best, result.test, result.history)
        ray.get(console.set_outcome.remote(result=result), timeout=timeout)
