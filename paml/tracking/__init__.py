"""Tracking: a run's figures go to an append-only journal first; MLflow is a view that can be refilled.

`paml.tracking.journal` needs neither torch nor MLflow, so workers import it freely; MLflow itself is
imported on first use only.
"""

from paml.tracking.follower import MlflowFollower, replay
from paml.tracking.journal import Event, Journal, JournalError, JournalReader, read_journal
from paml.tracking.system import SystemSampler

__all__ = [
    "Event",
    "Journal",
    "JournalError",
    "JournalReader",
    "MlflowFollower",
    "SystemSampler",
    "read_journal",
    "replay",
]
