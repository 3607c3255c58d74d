"""What a worker's clock counts, and where its log lines say that they come from."""

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paml.shards.cache import Traffic
from paml.training.loop import Watcher, train
from paml.training.meter import PLACE, Meter, Place, PlacedFormatter, Usage
from paml.training.world import World
from tests.helpers.prepared import tiny_settings


class Shown(Meter):
    def __init__(self) -> None:
        super().__init__()
        self.published: list[Usage] = []
        self.told: list[dict[str, float]] = []

    def publish(self, used: Usage) -> None:
        self.published.append(used)

    def figures(self, figures: dict[str, float]) -> None:
        self.told.append(figures)


def test_waits_work_and_checkpoints_are_told_apart() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    meter = Shown()
    begun = time.monotonic()
    for batch in meter.waiting(batches()):
        time.sleep(0.02)
        meter.step(10 + batch, Traffic(bytes_fetched=100, hits=1))
        with meter.checkpoint():
            time.sleep(0.03)
    lasted = time.monotonic() - begun
    used = meter.end_epoch()
    assert (used.images, used.checkpoints) == (33, 3)
    assert used.traffic == Traffic(bytes_fetched=300, hits=3)
    assert 0.15 <= used.waited_seconds <= lasted - 0.15
    assert 0.09 <= used.checkpoint_seconds <= lasted - 0.2
    assert 0.3 <= used.seconds <= lasted
    assert sum(part.images for part in meter.published) == 33
    assert sum(part.traffic.bytes_fetched for part in meter.published) == 300
    assert meter.end_epoch().images == 0


def test_time_outside_of_training_is_not_counted() -> None:
    meter = Meter()
    for _ in meter.waiting([1]):
        meter.step(1, Traffic())
    time.sleep(0.2)  # scoring
    with meter.checkpoint():
        pass
    assert meter.end_epoch().seconds < 0.1


def test_a_training_tells_its_meter_all_images_and_its_figures_the_shares(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, epochs=2)
    meter = Shown()
    result = train(settings, World(), Watcher(meter=meter))
    assert sum(part.images for part in meter.published) == 2 * 46
    assert sum(part.checkpoints for part in meter.published) >= 2
    assert [figures["epoch"] for figures in meter.told] == [1, 2]
    assert "rejection/rejected_share" in meter.told[0]
    for figures in result.history:
        assert 0 <= figures["train/data_wait_share"] <= 1
        assert 0 <= figures["train/checkpoint_share"] <= 1
    assert result.history[1]["train/checkpoint_share"] > 0
    assert str(PLACE) == "run tiny rank 0 epoch 2 step 5"


def test_a_log_line_says_run_rank_epoch_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paml.training.meter.PLACE", Place("first", 3, 2, 118))
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(PlacedFormatter())
    log = logging.Logger("paml.s3")
    log.addHandler(handler)
    log.warning("read again after %s", "a reset")
    assert text.getvalue() == "warning [run first rank 3 epoch 2 step 118] paml.s3: read again after a reset\n"
