"""What a tracker has to implement to mirror runs: one class, registered in `paml.tracking.TRACKERS`."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from paml.runs.journal import Event


class Sink(Protocol):
    """Mirrors the journal of one run into a tracker. Used by one thread at a time.

    `attach`, `push` and `finish` raise if the tracker is unreachable. `attach` is then called again, followed by
    every event that has not been delivered. A sink must therefore ignore events that the tracker already has.
    """

    environment: ClassVar[tuple[str, ...]]
    """Prefixes of the environment variables that configure the tracker."""
    destination: str
    """The server or file, without credentials, for messages."""
    refused: list[str]
    """Events that the tracker will never accept, each with the reason."""

    def __init__(self, run_folder: str, uri: str | None = None, *, timeout_s: int = 5) -> None:
        """Do not connect yet. `uri` defaults to the tracker's own configuration, `timeout_s` bounds each request.

        Raises SettingsError if there is no server or file to send to.
        """

    def attach(self, identity: Event) -> None:
        """Find the run of the event `run` in the tracker, or create it."""

    def push(self, events: Sequence[Event]) -> None:
        """Send events in their order. The only status among them is RUNNING."""

    def finish(self, status: str, time_ms: int) -> None:
        """End the run with FINISHED, FAILED or KILLED. Everything else has been pushed."""

    def link(self) -> str:
        """Where to look at the run."""
        ...
