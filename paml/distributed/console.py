"""One console for a run on many machines: workers send lines and progress, the driver prints them."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from paml.distributed.cluster import print_line
from paml.distributed.hangs import AttemptProcesses, Heartbeat
from paml.training.hooks import NoProgress, Progress, terminal_progress
from paml.training.meter import PositionFormatter


class Console:
    """An actor that holds the lines of the workers until the driver fetches them, and the state of the attempt."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._progress = "", 0, 0
        self._stop_reason: str | None = None
        self._outcome: dict[str, Any] = {}
        self._heartbeats: dict[int, tuple[Heartbeat, float]] = {}
        self._processes = AttemptProcesses()

    def log(self, line: str) -> None:
        """Add a line for the driver's console."""
        self._lines.append(line)

    def set_progress(self, title: str, done: int, total: int) -> None:
        """Set the progress of the current pass."""
        self._progress = title, done, total

    def fetch(self) -> tuple[list[str], tuple[str, int, int]]:
        """The lines since the last call, and the progress (title, done, total)."""
        lines, self._lines = self._lines, []
        return lines, self._progress

    def heartbeat(self, heartbeat: Heartbeat) -> bool:
        """Store a worker's heartbeat; returns whether the workers should stop."""
        self._heartbeats[heartbeat.rank] = heartbeat, time.monotonic()
        return self._stop_reason is not None

    def snapshot(self) -> tuple[list[Heartbeat], AttemptProcesses]:
        """The latest heartbeats by rank, with their age, and the processes of the attempt."""
        now = time.monotonic()
        beats = [
            dataclasses.replace(beat, silent_seconds=now - at) for _, (beat, at) in sorted(self._heartbeats.items())
        ]
        return beats, self._processes

    def add_worker(self, worker: ActorHandle, group: PlacementGroup | None) -> None:
        """Register a worker that has started, and the placement group of all workers."""
        self._processes.workers.append(worker)
        self._processes.placement_group = group

    def set_controller(self, pid: int) -> None:
        """Register the process of Ray Train's controller, which runs on the driver's node."""
        self._processes.controller_pid = pid

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._stop_reason = reason

    def set_outcome(self, **outcome: Any) -> None:
        """Report how a worker ended: `result`, `fatal_error` (which a restart would repeat), or `preempted` (because of
        `request_stop`). The first of each counts."""
        self._outcome = outcome | self._outcome

    def outcome(self) -> dict[str, Any]:
        """How the workers ended, as far as they have reported it, and `stop_reason`, the reason of `request_stop`."""
        return self._outcome | {"stop_reason": self._stop_reason}


def start_console(**options: Any) -> Any:
    """Start a console; options: for Ray."""
    return ray.remote(num_cpus=0, **options)(Console).remote()  # pyright: ignore


class RemoteProgress:
    """A worker's progress bar on the driver's console; sends at most 100 updates."""

    def __init__(self, console: ActorHandle, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = self._sent = 0

    def update(self, n: int) -> None:
        """Advance by `n` images."""
        self._done += n
        if self._done - self._sent >= self._total / 100:
            self._sent = self._done
            self._console.set_progress.remote(self._title, min(self._done, self._total), self._total)

    def close(self) -> None:
        """Finish the bar."""
        self._console.set_progress.remote(self._title, self._total, self._total)


class ConsoleHandler(logging.Handler):
    """Sends a worker's warnings to the driver's console, with run, rank, epoch and step.

    Warnings of libraries are sent by the first worker only, since they usually occur on all.
    """

    def __init__(self, console: ActorHandle, *, first: bool) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self.setFormatter(PositionFormatter())
        if not first:
            self.addFilter(logging.Filter("paml"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record without waiting."""
        self._console.log.remote(self.format(record))


@contextlib.contextmanager
def forward_console(
    console: Any, log: Callable[[str], None] = print_line, every_seconds: float = 0.5
) -> Iterator[None]:
    """Pass the lines of a console to `log`, and show its progress if stderr is a terminal, until the block ends."""
    done = threading.Event()

    def forward() -> None:
        bar: Progress = NoProgress()
        title, shown, last = "", 0, False
        while not last:
            last = done.wait(every_seconds)
            try:
                lines, (new_title, count, total) = ray.get(console.fetch.remote(), timeout=10)
            except Exception:  # a lost cluster is reported by the driver's main thread
                continue
            if lines or new_title != title or count >= total:
                bar.close()
                title = ""
            for line in lines:
                log(line)
            if count < total:
                if not title:
                    title, bar, shown = new_title, terminal_progress(new_title, total), 0
                bar.update(count - shown)
                shown = count
        bar.close()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1)  # a stopped job is killed after three seconds
