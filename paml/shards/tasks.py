"""Tasks that can run anywhere, in any order, again after a failure; and a way to run them in this process."""

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

_NOT_MENDED_BY_TIME = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_TICK_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0


class Interrupted(Exception):
    """A task was asked to stop."""


class Context:
    """What a task is given by the one who runs it."""

    def __init__(
        self, pool: ThreadPoolExecutor, threads: int, stopped: Callable[[], bool], tick: Callable[[int], None]
    ) -> None:
        self.pool, self.threads, self.stopped = pool, threads, stopped
        self._tick, self._told, self._done = tick, 0.0, -1

    def tick(self, done: int) -> None:
        """`done` units of this task are done in all; passed on twice a second."""
        self._done = done
        now = time.monotonic()
        if now - self._told >= _TICK_SECONDS:
            self._told = now
            self._tick(done)

    def flush(self) -> None:
        """Pass on the last one."""
        if self._done >= 0:
            self._tick(self._done)


Work = Callable[[Any, Any, Context], Any]
"""(job, task, context) -> result: a function at the top level of a module; all three can be pickled but the last."""
Done = Callable[[int], None]
"""Told how many units of all tasks are done."""


class Failure(Exception):
    """A task that failed for good; `reason` is its last error in one line."""

    def __init__(self, name: str, reason: str, attempts: int) -> None:
        super().__init__(name, reason, attempts)
        self.name, self.reason, self.attempts = name, reason, attempts

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.attempts} attempts)" if self.attempts > 1 else "")


class Tasks(Protocol):
    """Runs tasks: here in threads, on a cluster by `paml.distributed.prepare_ray`."""

    def run(
        self, work: Work, job: Any, tasks: Sequence[tuple[str, Any]], done: Done
    ) -> tuple[list[Any], list[Failure]]:
        """Run `work(job, task, context)` for each (name, task). Results, in no order, and the tasks that failed."""
        ...

    @property
    def lanes(self) -> int:
        """About how many tasks run at once."""
        ...


def one_line(error: BaseException) -> str:
    """Kind and message of an error, cut to a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:600] if text else type(error).__name__


class LocalTasks:
    """Tasks in threads of this process: two at a time, so that one computes while the other ends."""

    def __init__(self, threads: int | None = None, *, retries: int = 2, raise_first: bool = False) -> None:
        """`raise_first`: let the first error end all, as it is, in place of a list of what failed."""
        self.threads, self._retries, self._raise_first = threads or os.cpu_count() or 1, retries, raise_first

    @property
    def lanes(self) -> int:
        return 2

    def run(
        self, work: Work, job: Any, tasks: Sequence[tuple[str, Any]], done: Done
    ) -> tuple[list[Any], list[Failure]]:
        """As in `Tasks`. An error that no retry mends, such as a full disk, is raised at once. A signal's exception
        ends the tasks first: each keeps what it has done."""
        queue = deque((name, task, 1) for name, task in tasks)
        results: list[Any] = []
        failures: list[Failure] = []
        units: dict[str, int] = {}
        fatal: list[BaseException] = []
        stop, lock = threading.Event(), threading.Lock()

        def tick(name: str, count: int) -> None:
            with lock:
                units[name] = count
                done(sum(units.values()))

        def lane(pool: ThreadPoolExecutor) -> None:
            while not stop.is_set():
                try:
                    name, task, attempt = queue.popleft()
                except IndexError:
                    return
                context = Context(pool, self.threads, stop.is_set, lambda count, name=name: tick(name, count))
                try:
                    result = work(job, task, context)
                    context.flush()
                    results.append(result)
                except Interrupted:
                    return
                except Exception as error:
                    if self._raise_first or getattr(error, "errno", None) in _NOT_MENDED_BY_TIME:
                        fatal.append(error)
                        stop.set()
                    elif attempt <= self._retries:
                        stop.wait(0.5 * attempt)
                        queue.append((name, task, attempt + 1))
                    else:
                        failures.append(Failure(name, one_line(error), attempt))
                except BaseException as error:
                    fatal.append(error)
                    stop.set()

        with _pool(self.threads) as pool:
            lanes = [
                threading.Thread(target=lane, args=(pool,), name=f"paml-task-{i}", daemon=True)
                for i in range(min(self.lanes, len(tasks)))
            ]
            for thread in lanes:
                thread.start()
            try:
                for thread in lanes:
                    while thread.is_alive():
                        thread.join(0.2)
            except BaseException:
                stop.set()
                end = time.monotonic() + _PATIENCE_SECONDS
                for thread in lanes:
                    thread.join(max(0.0, end - time.monotonic()))
                raise
        if fatal:
            raise fatal[0]
        return results, failures


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="paml-shards")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
