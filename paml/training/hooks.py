"""How a run reports and how it is stopped: the callbacks of `paml.training.loop.train`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from paml.training.meter import Meter


class Progress(Protocol):
    """A progress bar over the images of one pass."""

    def update(self, n: int) -> Any:
        """Advance by `n` images."""

    def close(self) -> Any:
        """Finish the bar."""


class NoProgress(Progress):
    """A progress bar that shows nothing."""

    def __init__(self, title: str = "", images: int = 0) -> None: ...


def terminal_progress(title: str, images: int) -> Progress:
    """A tqdm bar, which shows nothing unless stderr is a terminal."""
    from tqdm import tqdm

    return tqdm(total=images, desc=title, unit="img", leave=False, dynamic_ncols=True, disable=None)


@dataclasses.dataclass(frozen=True)
class RunHooks:
    """Callbacks of a run. `record_metrics` and `log` are called on the first worker, the others on all."""

    record_metrics: Callable[[dict[str, float], int], None] = lambda metrics, epoch: None
    """Journals the metrics of an epoch."""
    log: Callable[[str], None] = print
    progress: Callable[[str, int], Progress] = NoProgress
    """Given a title and a number of images, returns a progress bar."""
    on_epoch_end: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called with the metrics of an epoch after its checkpoint has been written."""
    meter: Meter = dataclasses.field(default_factory=Meter)
    on_position: Callable[..., None] = lambda activity, epoch, step, bounded=True: None
    """Called when an activity starts, with its description, the epoch (from 1), the steps done in the epoch, and
    whether an activity without progress means that the worker hangs."""
    should_stop: Callable[[], bool] = lambda: False
    """Called after each optimizer step and each epoch. If it returns true, on all workers, the run writes a checkpoint
    and raises RunPreempted."""


class RunPreempted(Exception):
    """The run stopped because of `RunHooks.should_stop`, after writing a checkpoint."""
