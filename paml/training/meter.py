"""Where a worker's time goes, and where it stands: for whoever watches, and for its log lines.

The loop measures and Ray's exporter (`paml.distributed.metrics`) publishes; neither waits for a device.
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
    """What a worker has used and done since it was counted last; sums, so that a reader may divide them."""

    images: int = 0
    seconds: float = 0.0
    """Of training, the waits and checkpoints below included; scoring is not in it."""
    waited_seconds: float = 0.0
    """For batches that were not ready."""
    checkpoint_seconds: float = 0.0
    """In which the step stood still for a checkpoint."""
    checkpoints: int = 0
    traffic: Traffic = dataclasses.field(default_factory=Traffic)

    def add(self, other: "Usage") -> None:
        """Count what `other` holds, too."""
        for name in ("images", "seconds", "waited_seconds", "checkpoint_seconds", "checkpoints"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.traffic.add(other.traffic)


class Meter:
    """A worker's clock. This one only adds up an epoch; `publish` is for those that show it to others."""

    def __init__(self) -> None:
        self._epoch, self._since = Usage(), Usage()
        self._published = self._ticked = time.monotonic()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time noted that each kept the step waiting."""
        self._ticked = time.monotonic()
        source = iter(batches)
        while True:
            begun = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._since.waited_seconds += time.monotonic() - begun
            yield batch

    def step(self, images: int, traffic: Traffic) -> None:
        """A step over so many images of this worker is done; `traffic` is what it took from the bucket."""
        self._since.images += images
        self._since.traffic.add(traffic)
        self._tick()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Around the making of a checkpoint."""
        begun = self._ticked = time.monotonic()
        yield
        self._since.checkpoint_seconds += time.monotonic() - begun
        self._since.checkpoints += 1
        self._tick()
        self._flush()

    def end_epoch(self) -> Usage:
        """What was used since the last call."""
        self._flush()
        used, self._epoch = self._epoch, Usage()
        return used

    def figures(self, figures: dict[str, float]) -> None:
        """An epoch's figures over all workers, in MLflow's names; told to the first worker's meter alone."""

    def publish(self, used: Usage) -> None:
        """Show what was used since the last call: at most once a second, and at the end of an epoch."""

    def _tick(self) -> None:
        now = time.monotonic()
        self._since.seconds += now - self._ticked
        self._ticked = now
        if now - self._published >= 1:
            self._flush()

    def _flush(self) -> None:
        used, self._since = self._since, Usage()
        self._published = time.monotonic()
        self._epoch.add(used)
        self.publish(used)


@dataclasses.dataclass
class Place:
    """Where this process stands in which run."""

    run: str = ""
    rank: int = 0
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"run {self.run} rank {self.rank} epoch {self.epoch} step {self.step}" if self.run else "no run"


PLACE = Place()
"""Of this process, which trains one run at a time. The loop keeps it."""


class PlacedFormatter(logging.Formatter):
    """Log lines that say where they come from: `warning [run first rank 3 epoch 2 step 118] paml.s3: …`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with its traceback where it has one."""
        return f"{record.levelname.lower()} [{PLACE}] {record.name}: {super().format(record).strip()}"


def say_places() -> None:
    """Put the place before the warnings of a process that has set up no logging of its own."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PlacedFormatter())
        handler.setLevel(logging.WARNING)
        logging.getLogger().addHandler(handler)
