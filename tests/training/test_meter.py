"""The meter of a worker, and positions in log lines."""

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paml.shards.cache import Traffic
from paml.training.hooks import RunHooks
from paml.training.loop import train
from paml.training.meter import POSITION, Meter, PositionFormatter, RunPosition, Usage
from paml.training.world import World
from tests.helpers.prepared import tiny_settings


class RecordingMeter(Meter):
    def __init__(self) -> None:
        super().__init__()
        self.published: list[Usage] = []
        self.reported: list[dict[str, float]] = []

    def publish(self, usage: Usage) -> None:
        self.published.append(usage)

    def epoch_metrics(self, metrics: dict[str, float]) -> None:
        self.reported.append(metrics)


def test_waits_steps_and_checkpoints_are_measured_separately() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    meter = RecordingMeter()
    started = time.monotonic()
    for batch in meter.waiting(batches()):
        time.sleep(0.02)
        meter.step(10 + batch, Traffic(bytes_fetched=100, hits=1))
        with meter.checkpoint():
            time.sleep(0.03)
    duration = time.monotonic() - started
    usage = meter.end_epoch()
    assert (usage.images, usage.checkpoints) == (33, 3)
    assert usage.traffic == Traffic(bytes_fetched=300, hits=3)
    assert 0.15 <= usage.waited_seconds <= duration - 0.15
    assert 0.09 <= usage.checkpoint_seconds <= duration - 0.2
    assert 0.3 <= usage.seconds <= duration
    assert sum(part.images for part in meter.published) == 33
    assert sum(part.traffic.bytes_fetched for part in meter.published) == 300
    assert meter.end_epoch().images == 0


def test_time_outside_of_training_is_not_counted() -> None:
    meter = Meter()
    for _ in meter.waiting([1]):
        meter.step(1, Traffic())
    time.sleep(0.2)  # evaluation
    with meter.checkpoint():
        pass
    assert meter.end_epoch().seconds < 0.1


def test_a_run_reports_usage_and_metrics_to_its_meter(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, epochs=2)
    meter = RecordingMeter()
    result = train(settings, World(), RunHooks(meter=meter))
    assert sum(part.images for part in meter.published) == 2 * 46
    assert sum(part.checkpoints for part in meter.published) >= 2
    assert [metrics["epoch"] for metrics in meter.reported] == [1, 2]
    assert "rejection/rejected_fraction" in meter.reported[0]
    for metrics in result.history:
        assert 0 <= metrics["train/data_wait_fraction"] <= 1
        assert 0 <= metrics["train/checkpoint_fraction"] <= 1
    assert result.history[1]["train/checkpoint_fraction"] > 0
    assert str(POSITION) == "run tiny rank 0 epoch 2 step 5"


def test_log_lines_contain_run_rank_epoch_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paml.training.meter.POSITION", RunPosition("first", 3, 2, 118))
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(PositionFormatter())
    logger = logging.Logger("paml.storage.s3")
    logger.addHandler(handler)
    logger.warning("retrying after %s", "a reset")
    assert text.getvalue() == "warning [run first rank 3 epoch 2 step 118] paml.storage.s3: retrying after a reset\n"
