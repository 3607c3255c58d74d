"""Workers that stall: found by what they last did, named, and ended, so that the run goes on without them.

Every worker tells the run's console once in a while where it stands. A worker that waits in a collective stands still
as well, but is not the one to blame: that is the one that is silent, or that stands still somewhere else.
"""

import contextlib
import dataclasses
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

_PAML = str(Path(__file__).resolve().parents[1])
_WAITS = ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "torch/cuda/streams.py")
"""Files in which a worker waits for the others, or for a GPU that does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a worker stands."""

    rank: int
    node: str
    pid: int
    node_id: str = ""
    """Ray's name of the node."""
    doing: str = "starting"
    epoch: int = 0
    step: int = 0
    """Global batches done in the epoch."""
    still_seconds: float = 0.0
    """Since it last moved; 0 while it does something that may take any time."""
    where: str = ""
    """The line of code at which it stands, once it does so."""
    waits: bool = False
    """Whether that is within a collective."""
    ended: bool = False
    """Whether its part of the run is over, well or not."""
    silent_seconds: float = 0.0
    """Since the console heard it; the console's to say."""

    @property
    def stalled_seconds(self) -> float:
        """Since it is known to have moved."""
        return 0.0 if self.ended else self.still_seconds + self.silent_seconds


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What an attempt consists of, as far as it is known."""

    workers: tuple[ActorHandle, ...] = ()
    controller: int | None = None
    """Its process, on the driver's node."""
    place: PlacementGroup | None = None
    """The resources of all workers."""


def beat_seconds(limit_seconds: float) -> float:
    """How often workers tell where they stand."""
    return min(5.0, limit_seconds / 10)


class Heartbeat:
    """A worker's thread that tells the console where the thread that made it stands."""

    def __init__(self, console: ActorHandle, rank: int, every_seconds: float) -> None:
        self._console, self._every = console, every_seconds
        self._beat = Beat(rank=rank, node=platform.node(), pid=os.getpid())
        self.leave = False
        """Whether the driver has asked the workers to leave a checkpoint and go."""
        self._moved: float | None = time.monotonic()
        self._watched = threading.get_ident()
        self._over = threading.Event()
        if ray.is_initialized():  # else asking would start one
            context = ray.get_runtime_context()
            self._beat = dataclasses.replace(self._beat, node_id=context.get_node_id())
            self._console.worker.remote(context.current_actor, get_current_placement_group())
        self._console.beat.remote(self._beat)
        threading.Thread(target=self._tell, name="heartbeat", daemon=True).start()

    def at(self, doing: str, epoch: int, step: int, bounded: bool = True) -> None:
        """The worker begins something. `bounded`: whether it is stalled where that takes too long."""
        begins_epoch = epoch != self._beat.epoch
        self._beat = dataclasses.replace(self._beat, doing=doing, epoch=epoch, step=step)
        self._moved = time.monotonic() if bounded else None
        if begins_epoch:  # told at once, so that a stall of the first seconds has its place, too
            self._console.beat.remote(self._beat)

    def end(self) -> None:
        """The worker is done, or has failed."""
        self._over.set()
        with contextlib.suppress(RayError):  # so that all it has said is with the console before its process ends
            ray.get(self._console.beat.remote(dataclasses.replace(self._beat, ended=True)), timeout=5)

    def _tell(self) -> None:
        while not self._over.wait(self._every):
            moved = self._moved
            still = 0.0 if moved is None else time.monotonic() - moved
            beat = dataclasses.replace(self._beat, still_seconds=still)
            if still > 2 * self._every:
                where, waits = _standing(sys._current_frames().get(self._watched))
                beat = dataclasses.replace(beat, where=where, waits=waits)
            if not self._over.is_set():
                answer = self._console.beat.remote(beat)
                with contextlib.suppress(RayError):
                    self.leave = bool(ray.get(answer, timeout=self._every)) or self.leave


def _standing(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of paml and of all, and whether the innermost waits for the other workers."""
    if frame is None:
        return "", False
    innermost, ours = frame, frame
    while ours.f_back is not None and not ours.f_code.co_filename.startswith(_PAML):
        ours = ours.f_back
    lines = [_line(innermost)] if innermost is ours else [_line(ours), _line(innermost)]
    return " → ".join(lines), any(part in innermost.f_code.co_filename for part in _WAITS)


def _line(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    for root in (os.path.dirname(_PAML), *sys.path):
        if root and path.startswith(root + os.sep):
            path = path[len(root) + 1 :]
            break
    return f"{frame.f_code.co_name} ({path}:{frame.f_lineno})"


def stall(beats: Sequence[Beat], limit_seconds: float) -> str | None:
    """What to say of workers that have not moved for longer than the limit, those to blame first; None without any."""
    stalled = [beat for beat in beats if beat.stalled_seconds > limit_seconds]
    if not stalled:
        return None
    blamed = [beat for beat in stalled if beat.silent_seconds > limit_seconds / 2]
    blamed = blamed or [beat for beat in stalled if not beat.waits] or stalled
    waiting = [f"worker {beat.rank}" for beat in stalled if beat not in blamed]
    parts = [_describe(beat, limit_seconds) for beat in blamed]
    if waiting:
        parts.append(f"{', '.join(waiting)} waited for that")
    elif len(blamed) > 1 and all(beat.waits for beat in blamed):
        parts.append("each waits for the others: a collective that not all have entered, or a network that is cut")
    return "; ".join(parts)


def _describe(beat: Beat, limit_seconds: float) -> str:
    named = f"worker {beat.rank} (node {beat.node}, process {beat.pid}) has stalled for {beat.stalled_seconds:.0f} s"
    place = f"after step {beat.step} of epoch {beat.epoch}, {beat.doing}" if beat.epoch else beat.doing
    if beat.silent_seconds > limit_seconds / 2:
        return f"{named}, last heard {place}: it does not answer, its process is stopped or its machine is gone"
    return f"{named} {place}: it stands in {beat.where}"


class StallError(RuntimeError):
    """An attempt that was ended since a part of it stood still; the message names it."""


class ControllerProcess(ControllerCallback):
    """Tells the console which process Ray Train's controller is."""

    def __init__(self, console: ActorHandle) -> None:
        self._console = console

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        self._console.controller.remote(os.getpid())


class Watch:
    """The driver's view of one attempt: whether it still moves, and how to end it."""

    def __init__(self, console: ActorHandle, num_workers: int, limit_seconds: float, start_seconds: float) -> None:
        self._console, self._num_workers = console, num_workers
        self._limit, self._start_seconds = limit_seconds, start_seconds
        self._begun = time.monotonic()
        self._heard: float | None = None
        self._attempt = Attempt()
        self.nodes: set[str] = set()
        """Ray's names of the nodes that the workers are on, as of the last look, once all have begun."""
        self.every_seconds = beat_seconds(limit_seconds)

    def look(self, share: float = 1.0) -> str | None:
        """What stands still, for longer than this share of the limit; None where all moves."""
        limit, now = self._limit * share, time.monotonic()
        try:
            beats, self._attempt = ray.get(self._console.standing.remote(), timeout=min(10.0, self._limit))
        except RayError as error:
            silent = now - (self._heard or self._begun)
            patience = max(30.0, limit) + (self._start_seconds if self._heard is None else 0.0)
            return f"Ray has not answered for {silent:.0f} s ({type(error).__name__})" if silent > patience else None
        self._heard = now
        if (stalled := stall(beats, limit)) is not None:
            return stalled
        missing = sorted(set(range(self._num_workers)) - {beat.rank for beat in beats})
        self.nodes = set() if missing else {beat.node_id for beat in beats if not beat.ended}
        if missing and now - self._begun > self._start_seconds:
            return f"{', '.join(f'worker {rank}' for rank in missing)} did not start within {now - self._begun:.0f} s"
        if not missing and all(beat.ended and beat.silent_seconds > limit for beat in beats):
            return "Ray Train's controller has not ended the attempt, though all workers are done"
        return None

    def end_attempt(self, outcome: Future, seconds: float) -> None:
        """Kill the workers, upon which the controller ends the attempt; where it does not, kill it and clear up after
        it. Ray kills processes that are stopped or do not listen as well.
        """
        for worker in self._attempt.workers:
            with contextlib.suppress(RayError):
                ray.kill(worker)
        wait([outcome], timeout=seconds)
        if outcome.done():
            return
        with contextlib.suppress(psutil.Error):
            controller = None if self._attempt.controller is None else psutil.Process(self._attempt.controller)
            if controller is not None and "TrainController" in " ".join(controller.cmdline()):
                controller.kill()
        self.clear_up()
        wait([outcome], timeout=seconds)

    def clear_up(self) -> None:
        """After a controller that died: Ray would keep the workers' resources for as long as the driver lives."""
        with contextlib.suppress(RayError):
            if self._attempt.place is not None:
                remove_placement_group(self._attempt.place)
