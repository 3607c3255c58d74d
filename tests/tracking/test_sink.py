"""A tracker is one class: a sink of thirty lines mirrors a real run."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from paml import tracking
from paml.errors import SettingsError
from paml.pipeline import train_and_report
from paml.runs.folder import read_result
from paml.runs.journal import Event, Journal, read_journal
from paml.tracking.follower import Follower
from tests.helpers.prepared import tiny_settings

from .conftest import wait_until


class ListSink:
    """Keeps everything in memory; the server is shared and can be unreachable."""

    environment: ClassVar[tuple[str, ...]] = ("LIST_",)
    server: ClassVar[dict[str, dict]] = {}
    reachable: ClassVar[bool] = True

    def __init__(self, run_folder: str, uri: str | None = None, *, timeout_s: int = 5) -> None:
        self.destination, self.refused = uri or "memory", list[str]()

    def attach(self, identity: Event) -> None:
        if not self.reachable:
            raise ConnectionError("Connection refused")
        run = {"name": identity.value["name"], "events": {}, "status": "RUNNING"}
        self.run = self.server.setdefault(identity.key, run)

    def push(self, events: Sequence[Event]) -> None:
        if not self.reachable:
            raise ConnectionError("Connection refused")
        self.run["status"] = "RUNNING"
        self.run["events"] |= {(event.kind, event.key, event.step): event.value for event in events}

    def finish(self, status: str, time_ms: int) -> None:
        self.run["status"] = status

    def link(self) -> str:
        return f"list:{self.run['name']}"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "list", ListSink)
    monkeypatch.setattr(ListSink, "server", {})
    monkeypatch.setattr(ListSink, "reachable", True)


def in_journal(run_folder: str) -> dict:
    events = [event for event in read_journal(run_folder) if event.kind not in ("run", "status")]
    return {(event.kind, event.key, event.step): repr(event.value) for event in events}


def in_sink() -> dict:
    (run,) = ListSink.server.values()
    return {key: repr(value) for key, value in run["events"].items() if key[0] not in ("run", "status")}


def test_a_sink_receives_a_whole_training(prepared: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run = train_and_report(tiny_settings(prepared, tmp_path, run={"trackers": ["list"]}), log=lines.append)
    (mirrored,) = ListSink.server.values()
    assert (mirrored["name"], mirrored["status"]) == ("tiny", "FINISHED")
    assert in_sink() == in_journal(run.folder)
    assert mirrored["events"]["metric", "val/mAP", 2] == run.history[1]["val/mAP"]
    assert ("model", "final_model", 0) in mirrored["events"]
    assert "list:tiny" in lines[-1]
    assert read_result(run.folder).best == run.result.best


def test_a_sink_that_was_unreachable_receives_everything_later(run_folder: str) -> None:
    lines: list[str] = []
    journal = Journal(run_folder, "driver")
    journal.run(experiment="e", name="n")
    ListSink.reachable = False
    follower = Follower(run_folder, ListSink(run_folder), "list", poll_s=0.02, log=lines.append)
    journal.metrics({"val/mAP": 0.5}, 1)
    wait_until(lambda: lines)
    assert "connection refused" in lines[0]
    ListSink.reachable = True
    journal.metrics({"val/mAP": 0.6}, 2)
    journal.status("FINISHED")
    assert follower.close(30) == 0
    assert in_sink() == in_journal(run_folder)
    assert "back" in lines[-1]


def test_sync_delivers_the_journal_of_a_killed_run(run_folder: str) -> None:
    journal = Journal(run_folder, "driver")
    journal.run(experiment="e", name="n", tags={"a": "1"})
    journal.metrics({"val/mAP": 0.5}, 1)
    done: list[tuple[int, int]] = []
    report = tracking.sync(run_folder, tracker="list", status="KILLED", progress=lambda *counts: done.append(counts))
    assert (report.status, report.complete) == ("KILLED", True)
    assert in_sink() == in_journal(run_folder)
    (run,) = ListSink.server.values()
    assert run["status"] == "KILLED"
    assert done[-1][0] == done[-1][1] > 0


def test_unknown_trackers_are_refused_with_the_known_ones(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'wandb'.*list, mlflow"):
        train_and_report(tiny_settings(prepared, tmp_path, run={"trackers": ["wandb"]}))
    assert not (tmp_path / "tiny").exists()


def test_registration_needs_mlflow(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"run\.trackers"):
        train_and_report(tiny_settings(prepared, tmp_path, run={"trackers": ["list"], "register": "digits"}))
    assert not (tmp_path / "tiny").exists()


def test_variables_of_trackers_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIST_URL", "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "y")
    assert {"LIST_URL": "x", "MLFLOW_TRACKING_URI": "y"}.items() <= tracking.environment().items()
    assert "PATH" not in tracking.environment()
