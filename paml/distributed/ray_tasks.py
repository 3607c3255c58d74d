"""Runs tasks on a Ray cluster, within its CPUs and memory; Ray retries those that fail or are killed.

A task requests its CPUs and its memory from Ray. Only slightly more tasks than fit are submitted at a time.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paml import storage
from paml.distributed import cluster
from paml.errors import SettingsError
from paml.tasks import ReportDone, TaskContext, TaskFailure, TaskFunction, format_error

MAX_CPUS_PER_TASK = 8
"""If there are fewer tasks than CPUs, e.g. 16 tar files and 500 CPUs."""
_MEMORY_FRACTION = 0.9
_POLL_SECONDS = 0.5
_MEASURE_SECONDS = 15.0


class ProgressCounter:
    """An actor that adds up the progress of all tasks."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def report(self, name: str, done: int) -> None:
        """Set the number of units that a task has done."""
        self._done[name] = done

    def total(self) -> int:
        """Units that all tasks have done."""
        return sum(self._done.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayTaskRunner:
    """Runs tasks on the cluster that this process has joined (`cluster.join`)."""

    cpus_per_task: int | None = None
    """By default 1, and up to MAX_CPUS_PER_TASK if there are fewer tasks than CPUs."""
    gpus_per_task: float = 0.0
    """A fraction lets several tasks share a GPU."""
    limit: int | None = None
    """Maximum number of concurrent tasks; None derives it from the cluster."""
    retries: int = 3

    @property
    def concurrency(self) -> int:
        """CPUs of the cluster."""
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(
        self, work: TaskFunction, job: Any, tasks: Sequence[tuple[str, Any]], done: ReportDone
    ) -> tuple[list[Any], list[TaskFailure]]:
        """See `paml.tasks.TaskRunner`. Signal exceptions kill the tasks; the files that they have finished remain."""
        scheduler = _Scheduler(self, work, job, tasks, done)
        try:
            return cluster.call_in_thread(scheduler.run)
        except BaseException:
            scheduler.stop.set()
            raise


class _Scheduler:
    def __init__(
        self, runner: RayTaskRunner, work: TaskFunction, job: Any, tasks: Sequence[tuple[str, Any]], done: ReportDone
    ) -> None:
        self._runner, self._work, self._num_tasks, self._done = runner, work, len(tasks), done
        self._job, self._environment = ray.put(job), ray.put(cluster.storage_environment())
        self._counter = _remote(ProgressCounter, num_cpus=0, max_restarts=-1).remote()
        self._waiting = deque(tasks)
        self._running: dict[Any, tuple[str, Any]] = {}
        self._memory_of = getattr(job, "memory", lambda threads: 0)
        self._last_measure = -_MEASURE_SECONDS
        self.stop = threading.Event()

    def run(self) -> tuple[list[Any], list[TaskFailure]]:
        """Run all tasks."""
        results: list[Any] = []
        failures: list[TaskFailure] = []
        last_report = time.monotonic()
        while (self._waiting or self._running) and not self.stop.is_set():
            self._submit()
            finished, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
            for reference in finished:
                name, _ = self._running.pop(reference)
                try:
                    results.append(ray.get(reference))
                except RayError as error:
                    failures.append(TaskFailure(name, failure_reason(error), self._runner.retries + 1))
            if time.monotonic() - last_report >= _POLL_SECONDS:
                last_report = time.monotonic()
                self._report()
        for reference in self._running:
            ray.cancel(reference, force=True)
        if not self.stop.is_set():
            self._report()
        return results, failures

    def _report(self) -> None:
        with contextlib.suppress(RayError):  # the counter restarts, and the tasks do not depend on it
            self._done(ray.get(self._counter.total.remote(), timeout=5))

    def _submit(self) -> None:
        """Submit tasks until there are slightly more than the cluster can run."""
        now = time.monotonic()
        if now - self._last_measure >= _MEASURE_SECONDS:
            self._last_measure = now
            self._measure_cluster()
        later = []
        while self._waiting and len(self._running) < self._limit:
            name, task = self._waiting.popleft()
            if self._is_at_limit(task):
                later.append((name, task))
                continue
            reference = self._remote_task.remote(
                self._work, self._job, task, name, self._counter, self._environment, self._cpus
            )
            self._running[reference] = name, task
        self._waiting.extend(later)

    def _is_at_limit(self, task: Any) -> bool:
        """Whether the task's `max_concurrent` is reached."""
        limit = getattr(task, "max_concurrent", None)
        running = sum(getattr(other, "max_concurrent", None) == limit for _, other in self._running.values())
        return limit is not None and running >= limit

    def _measure_cluster(self) -> None:
        """Set the resources per task and the number of tasks from the current nodes."""
        nodes = [node["Resources"] for node in _cpu_nodes()] or [{"CPU": 1.0}]
        total, largest = sum(int(node["CPU"]) for node in nodes), int(max(node["CPU"] for node in nodes))
        cpus = self._runner.cpus_per_task or min(MAX_CPUS_PER_TASK, max(1, total // max(1, self._num_tasks)))
        self._cpus = min(cpus, largest)
        memory = min(self._memory_of(self._cpus), _MEMORY_FRACTION * max(node.get("memory", 0.0) for node in nodes))
        gpus = self._runner.gpus_per_task
        by_cpu = [int(node["CPU"]) // self._cpus for node in nodes]
        by_gpu = [int(node.get("GPU", 0) / gpus) if gpus else count for node, count in zip(nodes, by_cpu, strict=True)]
        slots = max(1, sum(map(min, by_cpu, by_gpu)))
        self._limit = self._runner.limit or slots + max(1, slots // 4)
        self._remote_task = _remote(
            _run_task,
            num_cpus=self._cpus,
            num_gpus=gpus,
            memory=int(memory),
            max_retries=self._runner.retries,
            retry_exceptions=True,
            runtime_env=cluster.task_environment(),
            name=getattr(self._work, "__name__", "task"),
        )


def _remote(function: Any, **options: Any) -> Any:
    return ray.remote(**options)(function)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _cpu_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _run_task(
    work: TaskFunction, job: Any, task: Any, name: str, counter: Any, environment: dict[str, str], threads: int
) -> Any:
    """Run one task in a Ray worker."""
    os.environ.update(environment)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="paml-task")
    context = TaskContext(pool, threads, lambda: False, lambda done: counter.report.remote(name, done))
    try:
        result = work(job, task, context)
        context.flush()
        return result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def failure_reason(error: RayError) -> str:
    """Why a task failed, in one line."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return format_error(error.cause)
    if isinstance(error, WorkerCrashedError):
        return "its worker process died: it was killed, or its node ran out of memory"
    return format_error(error)


def check_shared(folder: str) -> None:
    """Raise SettingsError if `folder` is local and a node of the cluster does not have it."""
    if storage.is_remote(folder):
        return
    this_node = ray.get_runtime_context().get_node_id()
    others = [node for node in _cpu_nodes() if node["NodeID"] != this_node]
    if not others:
        return
    storage.ensure_writable(folder)
    probe = storage.join(folder, f".probe-{os.getpid()}-{time.time_ns()}")
    storage.write_bytes(probe, b"paml")
    try:
        for node in others:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(_remote(os.path.exists, num_cpus=0, scheduling_strategy=on_node).remote(probe)):
                raise SettingsError(
                    f"{folder} is a local folder that node {node['NodeManagerAddress']} of the cluster does not have: "
                    "use a folder that all nodes share, or s3://bucket/prefix"
                )
    finally:
        storage.delete(probe)
