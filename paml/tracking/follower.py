"""Follows a journal and keeps MLflow's view of it up to date, in the background or in one go."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from paml import storage
from paml.secrets import without_keys
from paml.tracking.journal import (
    END_STATUSES,
    Event,
    Journal,
    JournalError,
    JournalReader,
    describe_unreadable,
)
from paml.tracking.view import MlflowView, default_tracking_uri, read_memory, reason

_LONGEST_WAIT_S = 60.0
_REPLAY_ATTEMPTS = 3


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class MlflowFollower:
    """A thread of the driver that follows the journal of a run and sends what is new to MLflow.

    Training never waits for it: a server that is down or hangs costs the thread bounded time-outs, then a
    growing pause of at most a minute. One line says that the server is away and one that it is back.
    """

    def __init__(
        self,
        run_folder: str,
        tracking_uri: str | None = None,
        *,
        storage_root: str | None = None,
        poll_s: float = 2.0,
        request_timeout_s: int = 5,
        say: Callable[[str], None] = _say,
    ):
        """`tracking_uri`: default MLFLOW_TRACKING_URI, else SQLite in `storage_root`."""
        self.run_folder = str(run_folder)
        self.tracking_uri = tracking_uri or default_tracking_uri(storage_root)
        self._shown_uri = without_keys(self.tracking_uri)
        self._say = say
        self._poll_s = poll_s
        self._request_timeout_s = request_timeout_s
        self._stop = threading.Event()
        self._caught_up = threading.Event()
        self._pending: list[Event] = []
        self._sent = 0
        self._view: MlflowView | None = None
        self._drain_until = float("inf")
        self._thread = threading.Thread(target=self._follow, name="mlflow-follower", daemon=True)
        if self.tracking_uri is None:
            say(
                "paml: no MLflow server is set and the run's storage is not a local disk, so nothing is sent "
                f"to MLflow. Set MLFLOW_TRACKING_URI, or send it later: {refill_command(self.run_folder)}"
            )
        else:
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the server has been reached."""
        return self._view.run_id if self._view else None

    def close(self, timeout: float = 30.0) -> int:
        """Sends what is left, for at most `timeout` seconds; returns how many events are left.

        Where some are left, one line says so and names the command that sends them.
        """
        if self.tracking_uri is None:
            return 0
        self._drain_until = time.monotonic() + timeout
        self._stop.set()
        self._thread.join(timeout)
        if not self._thread.is_alive() and self._caught_up.is_set():
            return 0
        left = self._count_left()
        if left:
            self._say(
                f"paml: {left} events of the journal are not in MLflow ({self._shown_uri}). Send them with "
                f"{refill_command(self.run_folder, self.tracking_uri)}"
            )
        return left

    def _count_left(self) -> int:
        try:
            return len(JournalReader(self.run_folder).poll()) - self._sent
        except OSError:
            return len(self._pending)

    def _follow(self) -> None:
        reader = JournalReader(self.run_folder)
        view = self._view = MlflowView(
            self.run_folder, self.tracking_uri or "", request_timeout_s=self._request_timeout_s
        )
        attached, away, failures, named, refused = False, False, 0, 0, 0
        while True:
            stopping = self._stop.is_set()
            try:
                self._pending = self._pending + reader.poll()
                self._caught_up.clear()
                if len(reader.unreadable) > named:
                    named = len(reader.unreadable)
                    self._say(f"paml: {describe_unreadable(reader.unreadable)}")
                if self._pending and reader.identity is not None:
                    if not attached:
                        view.attach(reader.identity)
                        attached = True
                    sent = len(self._pending)
                    view.push(self._pending)
                    self._pending = []
                    self._sent += sent
                    if away:
                        self._say(f"paml: MLflow at {self._shown_uri} is back; {sent} events sent")
                        away = False
                    if len(view.refused) > refused:
                        refused = len(view.refused)
                        self._say(f"paml: MLflow refuses {refused} event(s), the last: {view.refused[-1]}")
                failures = 0
                if not self._pending:
                    self._caught_up.set()
                if stopping:
                    return
            except Exception as error:
                attached = False
                failures += 1
                # The first failure may be a kept connection that a healthy server has closed.
                if not away and failures > 1:
                    away = True
                    self._say(
                        f"paml: MLflow at {self._shown_uri} is away ({reason(error)}); training goes on, "
                        "the journal keeps all figures and they are sent when it is back"
                    )
            wait = self._poll_s if failures < 2 else min(self._poll_s * 2 ** (failures - 1), _LONGEST_WAIT_S)
            if not stopping:
                self._stop.wait(wait)
            elif time.monotonic() < self._drain_until:
                time.sleep(min(wait, 1.0, max(0.0, self._drain_until - time.monotonic())))
            else:
                return


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay did."""

    run_id: str
    """MLflow's id of the run."""
    tracking_uri: str
    events: int
    """Events of the journal, all of them in MLflow now but the refused."""
    refused: tuple[str, ...]
    """What the server will never take, each with its reason."""
    unreadable: dict[str, str]
    """Segments of the journal that cannot be read -> reason."""
    status: str
    """The run's status in MLflow."""

    def __str__(self) -> str:
        shown = without_keys(self.tracking_uri)
        lines = [f"{self.events} events are in MLflow ({shown}), run {self.run_id}: {self.status}"]
        if self.status == "RUNNING":
            lines.append("the journal has no end: if the run is dead, say so with --status KILLED")
        if self.refused:
            lines.append(f"refused: {len(self.refused)}, the last: {self.refused[-1]}")
        if self.unreadable:
            lines.append(describe_unreadable(self.unreadable))
        return "\n".join(lines)


def replay(
    run_folder: str,
    tracking_uri: str | None = None,
    *,
    status: str | None = None,
    request_timeout_s: int = 30,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReplayReport:
    """Sends to MLflow whatever of a run's journal it does not hold; nothing is doubled.

    `status` ends a run whose driver was killed before it could: it is written to the journal, timed by the
    last event. Without `tracking_uri`: MLFLOW_TRACKING_URI, else the store that the run was last sent to, else
    SQLite in the folder that holds the run.

    Raises JournalError where there is no journal or `status` contradicts it, ValueError without a store, and
    what MLflow raises where the server fails.
    """
    run_folder = str(run_folder).rstrip("/")
    uri = tracking_uri or _usual_uri(run_folder)
    if uri is None:
        raise ValueError(f"{run_folder} is not on a local disk: name the server by --tracking-uri")
    reader = JournalReader(run_folder)
    events = reader.poll()
    if not events:
        raise JournalError(f"no journal in {run_folder}: it has no readable events under {run_folder}/journal")
    ends = [event.value for event in events if event.kind == "status"]
    end = ends[-1] if ends and ends[-1] in END_STATUSES else None
    if status is not None and status not in END_STATUSES:
        raise JournalError(f"status {status!r}: allowed are {', '.join(END_STATUSES)}")
    if status is not None and end is not None and end != status:
        raise JournalError(f"the journal of {run_folder} ends with {end}; --status is for a run without an end")
    if status is not None and end is None:
        Journal(run_folder, "replay").status(status, max(event.time_ms for event in events))
        events += reader.poll()
    name = storage.join(run_folder).rstrip("/").rpartition("/")[2]
    first = events[0]
    identity = reader.identity or Event(
        kind="run", time_ms=first.time_ms, key=f"unopened.{name}", value={"experiment": "paml", "name": name}
    )
    view = MlflowView(run_folder, uri, request_timeout_s=request_timeout_s)
    for attempt in range(_REPLAY_ATTEMPTS):
        try:
            view.refused.clear()
            view.attach(identity)
            view.push(events, _counter(len(events), progress))
            break
        except Exception:
            if attempt == _REPLAY_ATTEMPTS - 1:
                raise
            time.sleep(1.0)
    return ReplayReport(
        run_id=view.run_id or "",
        tracking_uri=uri,
        events=len(events),
        refused=tuple(view.refused),
        unreadable=dict(reader.unreadable),
        status=status or end or "RUNNING",
    )


def _usual_uri(run_folder: str) -> str | None:
    used = list(read_memory(run_folder))
    if used and not os.environ.get("MLFLOW_TRACKING_URI"):
        return used[-1]
    return default_tracking_uri(run_folder.rpartition("/")[0] or ".")


def _counter(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    return count


def refill_command(run_folder: str, tracking_uri: str = "URI") -> str:
    """The command that sends a run's journal to MLflow. A user and password are left to MLflow's variables."""
    tracking_uri = without_keys(tracking_uri)
    return f"python -m paml.tracking {shlex.quote(run_folder)} --tracking-uri {shlex.quote(tracking_uri)}"
