"""Detect workers that hang, name them, and kill them, to restart the run without them.

Every worker sends heartbeats to the run's console. A worker that waits in a collective makes no progress either, but is
not the cause: that is the one that is silent, or makes no progress elsewhere.
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
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from paml.distributed.ray_internals import ControllerCallback

_PAML = str(Path(__file__).resolve().parents[1])
_WAITING_FILES = (
    "torch/distributed/",
    "torch/nn/parallel/distributed.py",
    "torch/autograd/graph.py",
    "torch/cuda/streams.py",
)
"""Files in which a worker waits for other workers, or for a GPU that does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """State of a worker."""

    rank: int
    node: str
    """Host name."""
    pid: int
    node_id: str = ""
    """Ray's id of the node."""
    activity: str = "starting"
    epoch: int = 0
    step: int = 0
    """Steps done in the epoch."""
    idle_seconds: float = 0.0
    """Time since the last progress; 0 during activities without a time limit."""
    location: str = ""
    """The line of code that an idle worker is in."""
    in_collective: bool = False
    """Whether that line waits for other workers."""
    ended: bool = False
    """Whether the worker has finished or failed."""
    silent_seconds: float = 0.0
    """Age of the heartbeat, set by the console."""

    @property
    def stalled_seconds(self) -> float:
        """Time since the worker is known to have made progress."""
        return 0.0 if self.ended else self.idle_seconds + self.silent_seconds


@dataclasses.dataclass
class AttemptProcesses:
    """What is known of the processes and resources of an attempt."""

    workers: list[ActorHandle] = dataclasses.field(default_factory=list)
    controller_pid: int | None = None
    placement_group: PlacementGroup | None = None


def heartbeat_seconds(limit_seconds: float) -> float:
    """Time between the heartbeats of a worker."""
    return min(5.0, limit_seconds / 10)


class HeartbeatThread:
    """Sends heartbeats about the thread that created it."""

    def __init__(self, console: ActorHandle, rank: int, every_seconds: float) -> None:
        self._console, self._every = console, every_seconds
        self._state = Heartbeat(rank=rank, node=platform.node(), pid=os.getpid())
        self.stop_requested = False
        """Whether the driver has asked the workers to write a checkpoint and stop."""
        self._last_progress: float | None = time.monotonic()
        self._watched_thread = threading.get_ident()
        self._closed = threading.Event()
        if ray.is_initialized():  # otherwise the runtime context would start a Ray
            context = ray.get_runtime_context()
            self._state = dataclasses.replace(self._state, node_id=context.get_node_id())
            self._console.add_worker.remote(context.current_actor, get_current_placement_group())
        self._console.heartbeat.remote(self._state)
        threading.Thread(target=self._send, name="heartbeat", daemon=True).start()

    def on_position(self, activity: str, epoch: int, step: int, bounded: bool = True) -> None:
        """Record that an activity starts. bounded: whether it counts as a hang if it takes too long."""
        new_epoch = epoch != self._state.epoch
        self._state = dataclasses.replace(self._state, activity=activity, epoch=epoch, step=step)
        self._last_progress = time.monotonic() if bounded else None
        if new_epoch:  # at once, so that a hang in the first seconds is reported with its position
            self._console.heartbeat.remote(self._state)

    def close(self) -> None:
        """Report that the worker has finished or failed."""
        self._closed.set()
        with contextlib.suppress(RayError):  # waits, so that all its messages arrive before the process ends
            ray.get(self._console.heartbeat.remote(dataclasses.replace(self._state, ended=True)), timeout=5)

    def _send(self) -> None:
        while not self._closed.wait(self._every):
            last = self._last_progress
            idle = 0.0 if last is None else time.monotonic() - last
            heartbeat = dataclasses.replace(self._state, idle_seconds=idle)
            if idle > 2 * self._every:
                location, waits = _locate(sys._current_frames().get(self._watched_thread))
                heartbeat = dataclasses.replace(heartbeat, location=location, in_collective=waits)
            if not self._closed.is_set():
                answer = self._console.heartbeat.remote(heartbeat)
                with contextlib.suppress(RayError):
                    self.stop_requested = bool(ray.get(answer, timeout=self._every)) or self.stop_requested


def _locate(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of paml and of all code, and whether the latter waits for other workers."""
    if frame is None:
        return "", False
    innermost, ours = frame, frame
    while ours.f_back is not None and not ours.f_code.co_filename.startswith(_PAML):
        ours = ours.f_back
    lines = [_format_frame(innermost)] if innermost is ours else [_format_frame(ours), _format_frame(innermost)]
    return " → ".join(lines), any(part in innermost.f_code.co_filename for part in _WAITING_FILES)


def _format_frame(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname} (line {frame.f_lineno})"


def describe_hang(heartbeats: Sequence[Heartbeat], limit_seconds: float) -> str | None:
    """Which workers have made no progress for longer than the limit, likely causes first; None if all have."""
    stalled = [beat for beat in heartbeats if beat.stalled_seconds > limit_seconds]
    if not stalled:
        return None
    causes = [beat for beat in stalled if beat.silent_seconds > limit_seconds / 2]
    causes = causes or [beat for beat in stalled if not beat.in_collective] or stalled
    waiting = [f"worker {beat.rank}" for beat in stalled if beat not in causes]
    parts = [_describe(beat, limit_seconds) for beat in causes]
    if waiting:
        parts.append(f"{', '.join(waiting)} waited for it")
    elif len(causes) > 1 and all(beat.in_collective for beat in causes):
        parts.append("each waits for the others: some have not entered a collective, or the network is down")
    return "; ".join(parts)


def _describe(beat: Heartbeat, limit_seconds: float) -> str:
    worker = f"worker {beat.rank} (node {beat.node}, process {beat.pid}) hangs for {beat.stalled_seconds:.0f} s"
    position = f"after step {beat.step} of epoch {beat.epoch}, {beat.activity}" if beat.epoch else beat.activity
    if beat.silent_seconds > limit_seconds / 2:
        return f"{worker}, last heartbeat {position}: its process is stopped or its node is down"
    return f"{worker} {position}: in {beat.location}"


class HangError(RuntimeError):
    """An attempt was ended because some of its processes hung; the message names them."""


class ReportController(ControllerCallback):
    """Tells the console the process id of Ray Train's controller."""

    def __init__(self, console: ActorHandle) -> None:
        self._console = console

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller."""
        self._console.set_controller.remote(os.getpid())


class HangMonitor:
    """Runs in the driver: whether an attempt makes progress, and how to end it."""

    def __init__(self, console: ActorHandle, num_workers: int, limit_seconds: float, start_seconds: float) -> None:
        self._console, self._num_workers = console, num_workers
        self._limit, self._start_seconds = limit_seconds, start_seconds
        self._started = time.monotonic()
        self._last_answer: float | None = None
        self._processes = AttemptProcesses()
        self.nodes: set[str] = set()
        """Ray's ids of the workers' nodes at the last check; empty until all workers have started."""
        self.every_seconds = heartbeat_seconds(limit_seconds)

    def check(self, limit_scale: float = 1.0) -> str | None:
        """What hangs for longer than the limit times `limit_scale`, or None."""
        limit, now = self._limit * limit_scale, time.monotonic()
        try:
            beats, self._processes = ray.get(self._console.snapshot.remote(), timeout=min(10.0, self._limit))
        except RayError as error:
            silent = now - (self._last_answer or self._started)
            allowed = max(30.0, limit) + (self._start_seconds if self._last_answer is None else 0.0)
            return f"Ray has not answered for {silent:.0f} s ({type(error).__name__})" if silent > allowed else None
        self._last_answer = now
        if (hang := describe_hang(beats, limit)) is not None:
            return hang
        missing = sorted(set(range(self._num_workers)) - {beat.rank for beat in beats})
        self.nodes = set() if missing else {beat.node_id for beat in beats if not beat.ended}
        if missing and now - self._started > self._start_seconds:
            return f"{', '.join(f'worker {rank}' for rank in missing)} did not start within {now - self._started:.0f} s"
        if not missing and all(beat.ended and beat.silent_seconds > limit for beat in beats):
            return "Ray Train's controller did not end the attempt after all workers had finished"
        return None

    def end_attempt(self, outcome: Future, seconds: float) -> None:
        """Kill the workers, which makes the controller end the attempt; if it does not, kill it too.

        ray.kill also ends processes that are stopped or do not respond.
        """
        for worker in self._processes.workers:
            with contextlib.suppress(RayError):
                ray.kill(worker)
        wait([outcome], timeout=seconds)
        if outcome.done():
            return
        if self._processes.controller_pid is not None:
            with contextlib.suppress(psutil.Error):
                controller = psutil.Process(self._processes.controller_pid)
                if "TrainController" in " ".join(controller.cmdline()):
                    controller.kill()
        self.release_resources()
        wait([outcome], timeout=seconds)

    def release_resources(self) -> None:
        """Remove the workers' placement group, which outlives a controller that was killed."""
        with contextlib.suppress(RayError):
            if self._processes.placement_group is not None:
                remove_placement_group(self._processes.placement_group)
