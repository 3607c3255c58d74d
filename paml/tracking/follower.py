"""Delivers a run's journal to a tracker in a thread."""

import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paml.redact import redact_credentials
from paml.runs.journal import END_STATUSES, Event, JournalReader, describe_unreadable, latest
from paml.tracking.sink import Sink

_LONGEST_PAUSE_S = 60.0
_EVENTS_PER_PUSH = 2000
_REASONS = {
    "Connection refused": "connection refused",
    "timed out": "no answer in time",
    "timeout": "no answer in time",
    "NameResolution": "host name not found",
    "RemoteDisconnected": "connection closed",
    "500 error responses": "server error",
}


def log_to_stderr(line: str) -> None:
    """Print a line about tracking."""
    print(f"paml: {line}", file=sys.stderr, flush=True)


def sync_command(run_folder: str, tracker: str, uri: str | None = None) -> str:
    """The command that sends a run's journal to a tracker; `uri` without credentials."""
    where = ["--tracking_uri", uri] if uri else []
    return shlex.join(["paml", "sync", run_folder, *where, "--tracker", tracker])


class Follower:
    """A thread that delivers new events of a run's journal to a sink.

    Training never waits for it. If the tracker is down or hangs, the thread waits for bounded time-outs and pauses of
    up to a minute. It logs one line when the tracker becomes unreachable and one when it is back.
    """

    def __init__(
        self,
        run_folder: str,
        sink: Sink,
        name: str,
        *,
        poll_s: float = 2.0,
        log: Callable[[str], None] = log_to_stderr,
    ) -> None:
        self.sink = sink
        self.attached = False
        """Whether the tracker has been reached."""
        self._run_folder, self._name, self._poll_s, self._log = run_folder, name, poll_s, log
        self._stop, self._caught_up = threading.Event(), False
        self._pending: list[Event] = []
        self._delivered = 0
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._follow, name=f"{name}-follower", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 30.0) -> int:
        """Deliver what is left, within `timeout` seconds; returns the number of events that could not be delivered.

        If there are any, one line names the command that sends them.
        """
        self._deadline = time.monotonic() + timeout
        self._stop.set()
        self._thread.join(timeout)
        if not self._thread.is_alive() and self._caught_up:
            return 0
        try:
            left = len(JournalReader(self._run_folder).poll()) - self._delivered
        except OSError:
            left = len(self._pending)
        if left:
            where = self.sink.destination
            command = sync_command(self._run_folder, self._name, where)
            self._log(f"{left} events of the journal are not in {self._name} ({where}). Send them: {command}")
        return left

    def _follow(self) -> None:
        reader, tracker = JournalReader(self._run_folder), f"{self._name} at {self.sink.destination}"
        failures = unreadable = refused = 0
        while True:
            stopping = self._stop.is_set()
            try:
                self._pending = self._pending + reader.poll()
                if len(reader.unreadable) > unreadable:
                    unreadable = len(reader.unreadable)
                    self._log(describe_unreadable(reader.unreadable))
                if self._pending and reader.identity is not None:
                    if failures or not self.attached:
                        self.sink.attach(reader.identity)
                        self.attached = True
                    deliver(self.sink, self._pending)
                    count, self._pending = len(self._pending), []
                    self._delivered += count
                    if failures > 1:
                        self._log(f"{tracker} is back; {count} events sent")
                    if len(self.sink.refused) > refused:
                        refused = len(self.sink.refused)
                        self._log(f"{self._name} refuses {refused} event(s), the last: {self.sink.refused[-1]}")
                failures, self._caught_up = 0, not self._pending
                if stopping:
                    return
            except Exception as error:
                failures, self._caught_up = failures + 1, False
                # The first failure may be a kept-alive connection that a healthy server has closed.
                if failures == 2:
                    self._log(
                        f"{tracker} is unreachable ({short_reason(error)}); training continues, and the journal is "
                        "sent when it is back"
                    )
            pause = min(self._poll_s * 2 ** min(max(0, failures - 1), 10), _LONGEST_PAUSE_S)
            if not stopping:
                self._stop.wait(pause)
            elif time.monotonic() < self._deadline:
                time.sleep(min(pause, 1.0, max(0.0, self._deadline - time.monotonic())))
            else:
                return


def deliver(
    sink: Sink, events: Sequence[Event], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Send events. An end status goes last, so a run that a tracker shows as ended is complete."""
    statuses = [event for event in events if event.kind == "status"]
    others = [event for event in latest(events) if event.kind != "status"]
    ended = bool(statuses) and statuses[-1].value in END_STATUSES
    if statuses and not ended:
        others.append(statuses[-1])
    for start in range(0, len(others), _EVENTS_PER_PUSH):
        sink.push(others[start : start + _EVENTS_PER_PUSH])
        progress(min(start + _EVENTS_PER_PUSH, len(others)), len(others))
    if ended:
        sink.finish(statuses[-1].value, statuses[-1].time_ms)


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What a sync did."""

    sink: Sink
    events: int
    """Events of the journal; the tracker now has all but the refused ones."""
    unreadable: dict[str, str]
    """Journal segments that cannot be read, with the reason."""
    status: str
    """The run's status in the tracker."""

    @property
    def complete(self) -> bool:
        """Whether the tracker now has the whole journal."""
        return not self.sink.refused and not self.unreadable

    def __str__(self) -> str:
        lines = [f"{self.events} events sent: {self.sink.link()}, {self.status}"]
        if self.status == "RUNNING":
            lines.append("the journal has no end status: if the run is dead, add --status KILLED")
        if self.sink.refused:
            lines.append(f"refused: {len(self.sink.refused)}, the last: {self.sink.refused[-1]}")
        if self.unreadable:
            lines.append(describe_unreadable(self.unreadable))
        return "\n".join(lines)


def short_reason(error: BaseException) -> str:
    """Why a tracker failed, in a few words and without credentials."""
    for sign, words in _REASONS.items():
        if sign in str(error):
            return words
    return redact_credentials(f"{type(error).__name__}: {error}".splitlines()[0])[:200]
