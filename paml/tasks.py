"""Tasks that can run anywhere, in any order, and again after a failure; and a runner for this process.

Also what resumable work has in common: the claim and the lock of its folder, and reading ahead in order.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from paml import storage
from paml.errors import DataError, SettingsError
from paml.parsing import open_no_follow, read_json

T = TypeVar("T")
_MAX_LISTED = 50
_PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REPORT_SECONDS = 0.5
_STOP_SECONDS = 10.0
"""Time for tasks to stop after a signal."""


class TaskInterrupted(Exception):
    """Raised by a task that was asked to stop."""


class TaskContext:
    """Passed to a task: a thread pool, the number of its threads, `should_stop()` and `report(done)`."""

    def __init__(
        self, pool: ThreadPoolExecutor, threads: int, should_stop: Callable[[], bool], report: Callable[[int], None]
    ) -> None:
        self.pool, self.threads, self.should_stop = pool, threads, should_stop
        self._report, self._last_report, self._done = report, 0.0, -1

    def report(self, done: int) -> None:
        """Report that `done` units of this task are done in total. Forwards at most two reports per second."""
        self._done = done
        now = time.monotonic()
        if now - self._last_report >= _REPORT_SECONDS:
            self._last_report = now
            self._report(done)

    def flush(self) -> None:
        """Forward the last report."""
        if self._done >= 0:
            self._report(self._done)


TaskFunction = Callable[[Any, Any, TaskContext], Any]
"""(job, task, context) -> result: a top-level function; job, task and result must be picklable."""
ReportDone = Callable[[int], None]
"""Called with the number of units done in all tasks."""


class TaskFailure(NamedTuple):
    """A task that failed in all its attempts."""

    name: str
    reason: str
    """Its last error in one line."""
    attempts: int

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.attempts} attempts)" if self.attempts > 1 else "")


class PartsFailed(DataError):
    """Some tasks failed in all attempts, and all others finished. `failures` lists the former."""

    def __init__(self, failures: Sequence[TaskFailure], of: int, what: str) -> None:
        self.failures, self.of = tuple(failures), of
        lines = "".join(f"\n  {failure}" for failure in self.failures[:_MAX_LISTED])
        if len(self.failures) > _MAX_LISTED:
            lines += f"\n  and {len(self.failures) - _MAX_LISTED:,} more"
        super().__init__(
            f"{len(self.failures)} of {of:,} {what} failed; the others are done and saved:{lines}\n"
            "fix the cause and run the same command again to process the rest"
        )


class TaskRunner(Protocol):
    """Runs tasks: in threads (`LocalTaskRunner`) or on a cluster (`paml.distributed`)."""

    def run(
        self, work: TaskFunction, job: Any, tasks: Sequence[tuple[str, Any]], done: ReportDone
    ) -> tuple[list[Any], list[TaskFailure]]:
        """Run `work(job, task, context)` for each (name, task). Returns the results, in any order, and the failures."""
        ...

    @property
    def concurrency(self) -> int:
        """Approximate number of tasks that run at once."""
        ...


def format_error(error: BaseException) -> str:
    """Type and message of an error in one line of at most 600 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:600] if text else type(error).__name__


class LocalTaskRunner:
    """Runs tasks in this process, two at a time: one computes while the other finishes."""

    def __init__(self, threads: int | None = None, *, retries: int = 2, raise_first: bool = False) -> None:
        """threads: size of the pool that all tasks share. raise_first: raise the first error, without retries."""
        self.threads, self._retries, self._raise_first = threads or os.cpu_count() or 1, retries, raise_first

    @property
    def concurrency(self) -> int:
        return 2

    def run(
        self, work: TaskFunction, job: Any, tasks: Sequence[tuple[str, Any]], done: ReportDone
    ) -> tuple[list[Any], list[TaskFailure]]:
        """See `TaskRunner`. An error that a retry cannot fix, such as a full disk, is raised at once. The exception of
        a signal first stops the tasks, which save their progress."""
        queue = deque((name, task, 1) for name, task in tasks)
        results: list[Any] = []
        failures: list[TaskFailure] = []
        units: dict[str, int] = {}
        fatal: list[BaseException] = []
        stop, lock = threading.Event(), threading.Lock()

        def report(name: str, count: int) -> None:
            with lock:
                units[name] = count
                done(sum(units.values()))

        def work_until_empty(pool: ThreadPoolExecutor, ended: threading.Event) -> None:
            try:
                work_on_queue(pool)
            finally:
                ended.set()

        def work_on_queue(pool: ThreadPoolExecutor) -> None:
            while not stop.is_set():
                try:
                    name, task, attempt = queue.popleft()
                except IndexError:
                    return
                context = TaskContext(pool, self.threads, stop.is_set, lambda count, name=name: report(name, count))
                try:
                    result = work(job, task, context)
                    context.flush()
                    results.append(result)
                except TaskInterrupted:
                    return
                except BaseException as error:
                    permanent = getattr(error, "errno", None) in _PERMANENT_ERRNOS
                    if self._raise_first or permanent or not isinstance(error, Exception):
                        fatal.append(error)
                        stop.set()
                    elif attempt <= self._retries:
                        stop.wait(0.5 * attempt)
                        queue.append((name, task, attempt + 1))
                    else:
                        failures.append(TaskFailure(name, format_error(error), attempt))

        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="paml-task")
        try:
            # Events, since a join that a signal interrupts marks its thread as ended (CPython 3.11).
            ends = [threading.Event() for _ in range(min(self.concurrency, len(tasks)))]
            for i, end in enumerate(ends):
                threading.Thread(target=work_until_empty, args=(pool, end), name=f"paml-task-{i}", daemon=True).start()
            try:
                for end in ends:
                    while not end.wait(0.2):
                        pass
            except BaseException:
                stop.set()
                deadline = time.monotonic() + _STOP_SECONDS
                for end in ends:
                    end.wait(max(0.0, deadline - time.monotonic()))
                raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if fatal:
            raise fatal[0]
        return results, failures


def run_tasks(
    runner: TaskRunner, work: TaskFunction, job: Any, tasks: Sequence[tuple[str, Any]], done: ReportDone, what: str
) -> list[Any]:
    """The results of `runner.run`, in any order. Raises PartsFailed after all tasks if some failed.

    what: a word for the tasks, in the plural.
    """
    results, failures = runner.run(work, job, tasks, done)
    if failures:
        raise PartsFailed(failures, len(tasks), what)
    return results


def read_ahead(started: Iterable[T], count: int) -> Iterator[T]:
    """The items in order, each after `count` of those that follow it have been taken from `started`."""
    pending = deque[T]()
    for item in started:
        pending.append(item)
        del item  # the consumer may free the one it gets
        if len(pending) > count:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def claim_folder(path: str, plan: dict[str, Any], compared: Iterable[str], hint: str) -> dict[str, Any]:
    """Write `plan` to the JSON file `path` unless it exists. Returns the stored plan.

    Raises SettingsError if the stored plan has other values for the fields `compared`, and DataError if it is damaged.
    """
    with contextlib.suppress(FileExistsError):
        storage.write_bytes(path, json.dumps(plan, indent=1).encode(), if_absent=True)
    stored = read_json(path, hint)
    changed = [name for name in compared if stored.get(name) != plan[name]]
    if changed:
        details = "; ".join(f"{name} is {plan[name]!r}, stored {stored.get(name)!r}" for name in changed)
        raise SettingsError(f"{path} belongs to work with other {' and '.join(changed)} ({details}): {hint}")
    return stored


@contextlib.contextmanager
def file_lock(path: str, *, wait: bool) -> Iterator[bool | None]:
    """Lock a local file, which is created, and yield whether it is locked: False if another process holds it, None on a
    file system without locks. wait: wait for the holder.

    The kernel releases the lock of a process that dies.
    """
    locked: bool | None = True
    with open(open_no_follow(path, os.O_RDWR | os.O_CREAT), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            locked = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            locked = None
        yield locked
