"""One console for a run on many machines: the first worker speaks, the driver prints.

Lines come out bare and in order, and a bar moves where the driver has a terminal.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from paml.distributed.hangs import Attempt, Beat
from paml.training.loop import Progress, terminal_bar
from paml.training.meter import PlacedFormatter


class Console:
    """An actor that holds what the workers have said until the driver takes it, and where each of them stands."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bar: tuple[str, int, int] | None = None
        self._fatal: str | None = None
        self._leave: str | None = None
        self._left = False
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._attempt = Attempt()

    def say(self, line: str) -> None:
        """One line for the driver's console."""
        self._lines.append(line)

    def bar(self, title: str, done: int, total: int) -> None:
        """Where the pass under way stands."""
        self._bar = (title, done, total)

    def fatal(self, message: str) -> None:
        """An error that starting again would only repeat."""
        self._fatal = self._fatal or message

    def take(self) -> tuple[list[str], tuple[str, int, int] | None]:
        """Lines not taken yet, and the bar."""
        lines, self._lines = self._lines, []
        return lines, self._bar

    def beat(self, beat: Beat) -> bool:
        """Where a worker stands; returns whether it is to leave."""
        self._beats[beat.rank] = beat, time.monotonic()
        return self._leave is not None

    def leave(self, reason: str) -> None:
        """The workers are to leave a checkpoint and go."""
        self._leave = reason

    def left(self) -> None:
        """They have done so."""
        self._left = True

    def why_left(self) -> str | None:
        """The reason, where they have."""
        return self._leave if self._left else None

    def worker(self, worker: ActorHandle, place: PlacementGroup | None) -> None:
        """A worker has started, in the place that Ray has given to all of them."""
        self._attempt = dataclasses.replace(self._attempt, workers=(*self._attempt.workers, worker), place=place)

    def controller(self, pid: int) -> None:
        """The process of Ray Train's controller, on the driver's node."""
        self._attempt = dataclasses.replace(self._attempt, controller=pid)

    def standing(self) -> tuple[list[Beat], Attempt]:
        """Where the workers stand, by rank, with the time since they were heard; and what the attempt consists of."""
        now = time.monotonic()
        beats = [dataclasses.replace(beat, silent_seconds=now - at) for _, (beat, at) in sorted(self._beats.items())]
        return beats, self._attempt

    def failed_for_good(self) -> str | None:
        """The message of `fatal`, if there was one."""
        return self._fatal


class RemoteBar:
    """A worker's end of the bar; it speaks at most once in so many images."""

    def __init__(self, console: ActorHandle, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = self._told = 0

    def update(self, n: int) -> None:
        """`n` more images are done."""
        self._done += n
        if self._done - self._told >= self._total / 100:
            self._told = self._done
            self._console.bar.remote(self._title, min(self._done, self._total), self._total)

    def close(self) -> None:
        """The pass is over."""
        self._console.bar.remote(self._title, self._total, self._total)


class ConsoleHandler(logging.Handler):
    """A worker's warnings for the driver's console, each with run, rank, epoch and step.

    Of the first worker all, of the others paml's own: what a library warns of it warns of everywhere.
    """

    def __init__(self, console: ActorHandle, *, first: bool) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self.setFormatter(PlacedFormatter())
        if not first:
            self.addFilter(logging.Filter("paml"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send it, without waiting."""
        self._console.say.remote(self.format(record))


@contextlib.contextmanager
def printing(
    console: ActorHandle, every_seconds: float = 0.5, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Print in this process, or give to `say`, what the console holds, until the block ends."""
    over = threading.Event()
    thread = threading.Thread(target=_print, args=(console, over, every_seconds, say or _say), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1)  # a stopped job has three seconds in all


def _say(line: str) -> None:
    print(line, flush=True)


def _print(console: ActorHandle, over: threading.Event, every_seconds: float, say: Callable[[str], None]) -> None:
    shown: tuple[str, Progress, int] | None = None
    last = False
    while not last:
        last = over.wait(every_seconds)
        try:
            lines, bar = ray.get(console.take.remote(), timeout=10)
        except Exception:  # the cluster went away: fit() reports that, this thread has nothing to add
            continue
        if shown and (bar is None or bar[0] != shown[0] or bar[1] >= bar[2] or lines):
            shown[1].close()
            shown = None
        for line in lines:
            say(line)
        if bar is not None and bar[1] < bar[2]:
            if shown is None:
                shown = (bar[0], terminal_bar(bar[0], bar[2]), 0)
            shown[1].update(bar[1] - shown[2])
            shown = (bar[0], shown[1], bar[1])
    if shown:
        shown[1].close()
