"""Trackers mirror runs. A run's journal holds every metric; a tracker shows it and can be refilled from it.

A new tracker is a `paml.tracking.sink.Sink` and a line in `TRACKERS`. Importing this package imports no tracker's
library.
"""

import os
import time
from collections.abc import Callable, Iterable

from paml.errors import PamlError, SettingsError
from paml.runs.journal import END_STATUSES, Event, Journal, JournalError, JournalReader
from paml.tracking.follower import Follower, SyncReport, deliver, log_to_stderr, short_reason, sync_command
from paml.tracking.mlflow_sink import MlflowSink
from paml.tracking.sink import Sink

TRACKERS: dict[str, type[Sink]] = {"mlflow": MlflowSink}
DEFAULT_TRACKER = next(iter(TRACKERS))
_SYNC_ATTEMPTS = 3


class Trackers:
    """The trackers that follow a run."""

    def __init__(self, followers: Iterable[Follower]) -> None:
        self._followers = list(followers)
        self.undelivered = 0
        """Events that were not delivered when the trackers were closed."""

    def close(self, timeout: float = 30.0) -> int:
        """Deliver what is left, within `timeout` seconds in all; returns the number of events not delivered."""
        end = time.monotonic() + timeout
        self.undelivered = sum(each.close(max(0.0, end - time.monotonic())) for each in self._followers)
        return self.undelivered

    def links(self) -> list[str]:
        """Where to look at the run, for each tracker that it was delivered to."""
        return [each.sink.link() for each in self._followers if each.attached]


def start_trackers(names: Iterable[str], run_folder: str, log: Callable[[str], None] = log_to_stderr) -> Trackers:
    """Follow a run's journal with each tracker, in threads. Raises SettingsError for an unknown name."""
    kinds = {name: sink_of(name) for name in names}
    followers = []
    for name, kind in kinds.items():
        try:
            followers.append(Follower(run_folder, kind(run_folder), name, log=log))
        except SettingsError as error:
            log(f"{error}. Nothing is sent to {name} until then; send it later: {sync_command(run_folder, name)}")
    return Trackers(followers)


def sync(
    run_folder: str,
    uri: str | None = None,
    *,
    tracker: str = DEFAULT_TRACKER,
    status: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SyncReport:
    """Send to a tracker whatever it lacks of a run's journal; nothing is duplicated.

    `status` ends a run whose process was killed before it could write one; it is added to the journal. `progress` is
    called with the numbers of events sent and to send.

    Raises JournalError if there is no journal or `status` contradicts it, SettingsError for an unknown tracker or if
    there is nowhere to send to, and whatever the tracker raises if it fails.
    """
    run_folder = str(run_folder).rstrip("/")
    sink, reader = sink_of(tracker)(run_folder, uri, timeout_s=30), JournalReader(run_folder)
    events = reader.poll()
    if not events:
        reader.identify()  # raises the error of a folder without a journal
    name = run_folder.rpartition("/")[2]
    identity = reader.identity or Event(  # its first segment is damaged
        kind="run", time_ms=events[0].time_ms, key=f"unopened.{name}", value={"experiment": "paml", "name": name}
    )
    statuses = [event.value for event in events if event.kind == "status"]
    end = statuses[-1] if statuses and statuses[-1] in END_STATUSES else None
    if status is not None:
        if status not in END_STATUSES:
            raise JournalError(f"status is {status!r}; it must be one of {', '.join(END_STATUSES)}")
        if end not in (None, status):
            raise JournalError(f"{run_folder} ends with {end}; --status is for runs without an end status")
        if end is None:
            Journal(run_folder, "sync").status(status, max(event.time_ms for event in events))
            events += reader.poll()
    for attempt in range(_SYNC_ATTEMPTS):
        try:
            sink.refused.clear()
            sink.attach(identity)
            deliver(sink, events, progress)
            break
        except PamlError:
            raise
        except Exception:
            if attempt == _SYNC_ATTEMPTS - 1:
                raise
            time.sleep(1.0)
    return SyncReport(sink=sink, events=len(events), unreadable=reader.unreadable, status=status or end or "RUNNING")


def try_sync(
    run_folder: str, tracker: str = DEFAULT_TRACKER, log: Callable[[str], None] = log_to_stderr
) -> SyncReport | None:
    """`sync`, except that a failure is logged, since the journal can be sent later, and gives None."""
    try:
        return sync(run_folder, tracker=tracker)
    except Exception as error:  # any error of the tracker's library
        command = sync_command(run_folder, tracker)
        log(f"{run_folder} was not sent to {tracker} ({short_reason(error)}); send it later: {command}")
        return None


def sink_of(name: str) -> type[Sink]:
    """The sink class of a tracker. Raises SettingsError for an unknown name."""
    if name not in TRACKERS:
        raise SettingsError(f"unknown tracker {name!r} in run.trackers; known are {', '.join(sorted(TRACKERS))}")
    return TRACKERS[name]


def environment() -> dict[str, str]:
    """The environment variables that configure trackers, for processes that start without them."""
    prefixes = tuple(prefix for kind in TRACKERS.values() for prefix in kind.environment)
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
