"""What a Ray Train worker does of a run, in this process."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from paml.distributed import ray_train
from paml.training.loop import run_folder_of
from tests.helpers.prepared import tiny_settings

SAID = ("say", "bar", "fatal", "beat", "worker")


def test_a_worker_breaks_off_where_it_is_told(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a search on Ray Train workers spends what its rungs say, and leaves no result of half a run."""
    settings = tiny_settings(prepared, tmp_path, epochs=3)
    folder, reported = Path(run_folder_of(settings)), []
    monkeypatch.setattr(ray_train.ray, "get", lambda found, timeout=None: found)
    monkeypatch.setattr(ray_train.ray.train, "report", reported.append)
    monkeypatch.setattr(ray_train.logging, "captureWarnings", lambda capture: None)
    console = SimpleNamespace(**{name: SimpleNamespace(remote=lambda *said: None) for name in SAID})
    monkeypatch.setattr(ray_train, "ConsoleHandler", lambda console, first: ray_train.logging.NullHandler())
    monkeypatch.setattr(ray_train, "RayMeter", lambda run, rank: ray_train.Watcher().meter)
    monkeypatch.setattr(ray_train, "RemoteBar", lambda console, title, images: ray_train.Watcher.bar(title, images))
    config = {"settings": settings, "run_folder": str(folder), "console": console, "storage": {}}
    ray_train._worker(config | {"last_epoch": 1})
    assert [figures["epoch"] for figures in reported] == [1]
    assert not (folder / "result.json").exists()
    ray_train._worker(config | {"last_epoch": None})
    assert [figures["epoch"] for figures in reported] == [1, 2, 3]
    assert (folder / "result.json").exists()
