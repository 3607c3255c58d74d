"""Where the time of a worker goes, and the position of this process in the run, for log lines.

The loop measures; `paml.distributed.metrics` publishes the numbers through Ray. Neither waits for a device.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from paml.shards.cache import Traffic

T = TypeVar("T")


@dataclasses.dataclass
class Usage:
    """Time and data used by a worker since some earlier moment."""

    images: int = 0
    seconds: float = 0.0
    """Training time with the two below; evaluation is not included."""
    waited_seconds: float = 0.0
    """Time spent waiting for batches."""
    checkpoint_seconds: float = 0.0
    """Time spent writing checkpoints."""
    checkpoints: int = 0
    traffic: Traffic = dataclasses.field(default_factory=Traffic)

    def add(self, other: "Usage") -> None:
        """Add `other` to this one."""
        for name in ("images", "seconds", "waited_seconds", "checkpoint_seconds", "checkpoints"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.traffic.add(other.traffic)


class Meter:
    """Measures a worker's usage per epoch. Subclasses override `publish` and `epoch_metrics` to export it."""

    def __init__(self) -> None:
        self._epoch, self._unpublished = Usage(), Usage()
        self._published = self._last_tick = time.monotonic()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Iterate over the batches and measure how long each is waited for."""
        self._last_tick = time.monotonic()
        source = iter(batches)
        while True:
            started = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._unpublished.waited_seconds += time.monotonic() - started
            yield batch

    def step(self, images: int, traffic: Traffic) -> None:
        """Count a finished step over `images` images of this worker, and the traffic since the last call."""
        self._unpublished.images += images
        self._unpublished.traffic.add(traffic)
        self._tick()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Measure the writing of a checkpoint."""
        started = self._last_tick = time.monotonic()
        yield
        self._unpublished.checkpoint_seconds += time.monotonic() - started
        self._unpublished.checkpoints += 1
        self._tick()
        self._flush()

    def end_epoch(self) -> Usage:
        """The usage since the last call."""
        self._flush()
        usage, self._epoch = self._epoch, Usage()
        return usage

    def epoch_metrics(self, metrics: dict[str, float]) -> None:
        """Export an epoch's metrics over all workers. Called on the first worker."""

    def publish(self, usage: Usage) -> None:
        """Export the usage since the last call. Called at most once a second, and at the end of an epoch."""

    def _tick(self) -> None:
        now = time.monotonic()
        self._unpublished.seconds += now - self._last_tick
        self._last_tick = now
        if now - self._published >= 1:
            self._flush()

    def _flush(self) -> None:
        usage, self._unpublished = self._unpublished, Usage()
        self._published = time.monotonic()
        self._epoch.add(usage)
        self.publish(usage)


@dataclasses.dataclass
class RunPosition:
    """The run that a process works on, and its progress."""

    run: str = ""
    rank: int = 0
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"run {self.run} rank {self.rank} epoch {self.epoch} step {self.step}" if self.run else "no run"


POSITION = RunPosition()
"""Position of this process, which trains one run at a time. Updated by the loop."""


class PositionFormatter(logging.Formatter):
    """Adds the position to log lines: `warning [run first rank 3 epoch 2 step 118] paml.storage.s3: …`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the traceback if there is one."""
        return f"{record.levelname.lower()} [{POSITION}] {record.name}: {super().format(record).strip()}"


def log_positions() -> None:
    """Add the position to warnings, unless logging has been configured already."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PositionFormatter())
        handler.setLevel(logging.WARNING)
        logging.getLogger().addHandler(handler)
