"""The shard writer's tasks on a Ray cluster: bounded in number and memory, killed ones started again.

A task asks for as many CPUs as it has threads, and for the memory that its job states, so that Ray starts no more of
them on a node than it can hold. A few more than can run are handed to Ray at a time, however many there are.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paml import storage
from paml.distributed import cluster
from paml.errors import SettingsError
from paml.shards.tasks import Context, Done, Failure, Work, one_line

MAX_CPUS_PER_TASK = 8
"""Of a source of few large parts, e.g. 16 tar files on 500 cores; of many parts each task has one CPU."""
_MEMORY_SHARE = 0.9
_POLL_SECONDS = 0.5
_SIZE_SECONDS = 15.0


class Counter:
    """An actor that knows how far each task is."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def tell(self, name: str, done: int) -> None:
        """Task `name` has done so many units in all."""
        self._done[name] = done

    def reset(self) -> None:
        """Other tasks begin."""
        self._done = {}

    def total(self) -> int:
        """Units that all tasks have done."""
        return sum(self._done.values())


class RayTasks:
    """Runs tasks on the cluster that this process has joined (`cluster.join`)."""

    def __init__(self, *, cpus_per_task: int | None = None, gpus_per_task: float = 0.0, retries: int = 3) -> None:
        """`cpus_per_task`: by default 1, and up to MAX_CPUS_PER_TASK where there are fewer tasks than CPUs.

        `gpus_per_task`: 0 for none; a share where several tasks are to use one.
        """
        self._cpus, self._gpus, self._retries = cpus_per_task, gpus_per_task, retries
        self._counter: Any = None

    @property
    def lanes(self) -> int:
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(
        self, work: Work, job: Any, tasks: Sequence[tuple[str, Any]], done: Done
    ) -> tuple[list[Any], list[Failure]]:
        """As in `Tasks`. A task that raises or whose worker dies is started again `retries` times, then reported.

        Ray is spoken to in a thread: a main thread that waits for Ray heeds no signal, and a stopped job has three
        seconds. On a signal's exception the tasks are killed; what their pieces hold is kept.
        """
        if self._counter is None:
            self._counter = _remote(Counter, num_cpus=0, max_restarts=-1).remote()
        self._counter.reset.remote()
        loop = _Loop(work, job, tasks, done, self._cpus, self._gpus, self._retries, self._counter)
        outcome: Future[tuple[list[Any], list[Failure]]] = Future()

        def speak() -> None:
            try:
                outcome.set_result(loop.run())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=speak, name="paml-ray", daemon=True).start()
        try:
            while not outcome.done():
                time.sleep(0.1)
        except BaseException:
            loop.stop.set()
            raise
        return outcome.result()


class _Loop:
    def __init__(
        self,
        work: Work,
        job: Any,
        tasks: Sequence[tuple[str, Any]],
        done: Done,
        cpus: int | None,
        gpus: float,
        retries: int,
        counter: Any,
    ) -> None:
        self._work, self._tasks, self._done, self._retries = work, tasks, done, retries
        self._cpus_wanted, self._gpus = cpus, gpus
        self._job, self._environment = ray.put(job), ray.put(cluster.storage_environment())
        self._counter = counter
        self._waiting = deque((name, task, 1, 0.0) for name, task in tasks)
        self._running: dict[Any, tuple[str, Any, int]] = {}
        self._memory_of = getattr(job, "memory", lambda threads: 0)
        self._measured = -_SIZE_SECONDS
        self.stop = threading.Event()

    def run(self) -> tuple[list[Any], list[Failure]]:
        """Until all tasks have ended."""
        results: list[Any] = []
        failures: list[Failure] = []
        told = time.monotonic()
        while (self._waiting or self._running) and not self.stop.is_set():
            self._fill()
            ended, _ = (
                ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS) if self._running else ([], [])
            )
            for reference in ended:
                name, task, attempt = self._running.pop(reference)
                try:
                    results.append(ray.get(reference))
                except RayError as error:
                    if attempt > self._retries:
                        failures.append(Failure(name, reason_of(error), attempt))
                    else:
                        wait = 0.5 * 2 ** (attempt - 1)
                        self._waiting.append((name, task, attempt + 1, time.monotonic() + wait))
            if not self._running:
                time.sleep(0.05)
            if time.monotonic() - told >= _POLL_SECONDS:
                told = time.monotonic()
                self._tell()
        for reference in self._running:
            ray.cancel(reference, force=True)
        if not self.stop.is_set():
            self._tell()
        return results, failures

    def _tell(self) -> None:
        try:
            self._done(ray.get(self._counter.total.remote(), timeout=5))
        except RayError:
            return  # it starts again; the tasks matter more

    def _fill(self) -> None:
        """Hand tasks to Ray until it has a few more than it can run."""
        now = time.monotonic()
        if now - self._measured >= _SIZE_SECONDS:
            self._measured = now
            self._measure()
        later = []
        while self._waiting and len(self._running) < self._limit:
            name, task, attempt, not_before = self._waiting.popleft()
            if not_before > now or self._is_full(task):
                later.append((name, task, attempt, not_before))
                continue
            reference = self._remote.remote(
                self._work, self._job, task, name, self._counter, self._environment, self._cpus
            )
            self._running[reference] = (name, task, attempt)
        self._waiting.extend(later)

    def _is_full(self, task: Any) -> bool:
        """Whether as many tasks of its kind run as the task allows (`at_a_time`: sources that want few readers)."""
        most = getattr(task, "at_a_time", None)
        return most is not None and sum(type(other) is type(task) for _, other, _ in self._running.values()) >= most

    def _measure(self) -> None:
        """The shape of a task on the cluster as it is now; nodes come and go."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            nodes = [{"CPU": 1.0}]
        total, most = sum(int(node["CPU"]) for node in nodes), int(max(node["CPU"] for node in nodes))
        cpus = self._cpus_wanted or min(MAX_CPUS_PER_TASK, max(1, total // max(1, len(self._tasks))))
        self._cpus = min(cpus, most)
        memory = min(self._memory_of(self._cpus), _MEMORY_SHARE * max(node.get("memory", 0.0) for node in nodes))
        slots = max(1, sum(self._places(node) for node in nodes))
        self._limit = slots + max(1, slots // 4)
        self._remote = _remote(
            _task,
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            memory=int(memory),
            max_retries=0,
            runtime_env=cluster.task_environment(),
            name=getattr(self._work, "__name__", "task"),
        )

    def _places(self, node: dict[str, float]) -> int:
        """Tasks that a node can run at once."""
        by_cpu = int(node["CPU"]) // self._cpus
        return min(by_cpu, int(node.get("GPU", 0) / self._gpus)) if self._gpus else by_cpu


def _remote(function: Any, **options: Any) -> Any:
    return ray.remote(**options)(function)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _task(work: Work, job: Any, task: Any, name: str, counter: Any, environment: dict[str, str], threads: int) -> Any:
    """One task, in a worker of Ray."""
    os.environ.update(environment)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="paml-shards")
    context = Context(pool, threads, lambda: False, lambda done: counter.tell.remote(name, done))
    try:
        result = work(job, task, context)
        context.flush()
        return result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def reason_of(error: RayError) -> str:
    """Why a task failed, in one line: the error that it raised, or how its worker died."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return one_line(error.cause)
    if isinstance(error, WorkerCrashedError):
        return "its worker died: killed from outside, or by the machine for want of memory"
    return one_line(error)


def refuse_unshared(folder: str) -> None:
    """Raises SettingsError where `folder` is local and not every node of the cluster has it."""
    if storage.is_remote(folder):
        return
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here]
    if not others:
        return
    storage.ensure_writable(folder)
    probe = storage.join(folder, f".probe-{os.getpid()}-{time.time_ns()}")
    storage.write_bytes(probe, b"paml")
    try:
        for node in others:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(_remote(os.path.exists, num_cpus=0, scheduling_strategy=where).remote(probe)):
                raise SettingsError(
                    f"{folder} is a local folder, and node {node['NodeManagerAddress']} of the cluster does not have "
                    "it: give a folder that all nodes share, or s3://bucket/prefix"
                )
    finally:
        storage.delete(probe)
