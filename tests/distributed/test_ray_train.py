"""The function of a Ray Train worker, called in this process, and the version check of Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paml.distributed import ray_train
from paml.distributed.console import Console
from paml.distributed.ray_internals import check_version
from paml.errors import PamlError
from paml.runs.folder import pairs_path
from paml.training.hooks import NoProgress
from paml.training.meter import Meter
from tests.helpers.prepared import tiny_settings


class LocalConsole:
    """A console whose remote calls are plain calls."""

    def __init__(self) -> None:
        self.console = Console()

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.console, name))


def test_a_worker_reports_each_epoch_and_the_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(prepared, tmp_path, epochs=2)
    reports: list[dict[str, float]] = []
    console: Any = LocalConsole()
    monkeypatch.setattr(ray_train.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(ray_train.ray.train, "report", reports.append)
    monkeypatch.setattr(ray_train.logging, "captureWarnings", lambda capture: None)
    monkeypatch.setattr(ray_train, "ConsoleHandler", lambda console, first: ray_train.logging.NullHandler())
    monkeypatch.setattr(ray_train, "RayMeter", lambda run, rank: Meter())
    monkeypatch.setattr(ray_train, "RemoteProgress", lambda console, title, images: NoProgress(title, images))
    ray_train._worker({"settings": settings, "console": console, "storage": {}})
    assert [metrics["epoch"] for metrics in reports] == [1, 2]
    result = console.console.outcome()["result"]
    assert [metrics["epoch"] for metrics in result.history] == [1, 2]
    assert result.test
    assert Path(pairs_path(settings.run.folder, "5")).exists()
    assert any(line.startswith("epoch 2/2") for line in console.console.fetch()[0])
    heartbeats, _ = console.console.snapshot()
    assert [beat.ended for beat in heartbeats] == [True]


@pytest.mark.parametrize("version", ["2.49.2", "2.61.0", "3.0.0"])
def test_another_version_of_ray_is_rejected(version: str) -> None:
    check_version("2.60.3")
    with pytest.raises(PamlError, match=rf"{version}.*<2\.61"):
        check_version(version)
