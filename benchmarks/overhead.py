"""The throughput of a whole run relative to its bare training step, measured alternately in one process.

python benchmarks/overhead.py [--config coco18] [--epochs 4] [any setting of a training]

The run has shards, decoding, journal, MLflow and checkpoints, without Ray. Every EVERY steps it pauses while a second
network executes the same step on batches in memory, so that both are measured under the same load. The loader reads
ahead during a pause, by at most a tenth of what the run needs. Prints for each epoch the images per second of both,
their ratio, and the fractions of time spent waiting for batches and for checkpoints; the medians exclude the first
epoch. Then measures one checkpoint of a ResNet-101 with 5,000 classes and Adam, and prints its fraction of the interval
between checkpoints of the recipe openimages_v3 at the expected 1,100 images per second.
"""

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from paml.data.loader import Batch
from paml.models import ModelSettings
from paml.models.cam import build_model, set_training
from paml.pipeline import train_and_report
from paml.runs.journal import Journal
from paml.settings import read_settings
from paml.shards.cache import Traffic
from paml.training.checkpoint import write_checkpoint
from paml.training.data import RunData, open_data, train_loader
from paml.training.hooks import RunHooks
from paml.training.loop import train
from paml.training.meter import Meter, Usage
from paml.training.result import Result
from paml.training.settings import TrainSettings, with_absolute_paths
from paml.training.state import TrainState, save_state
from paml.training.step import train_step
from paml.training.world import World

EVERY, STEPS = 40, 20
"""Steps of the run between two pauses, and bare steps per pause."""
V3_INTERVAL_SECONDS = 2000 * 128 / 1100


class PairedMeter(Meter):
    """Measures the usage of the run, without the pauses in which the bare steps are measured."""

    def __init__(self, bare: "BareStep") -> None:
        super().__init__()
        self.bare, self.usage, self.steps = bare, Usage(), 0

    def publish(self, usage: Usage) -> None:
        self.usage.add(usage)

    def step(self, images: int, traffic: Traffic) -> None:
        super().step(images, traffic)
        self.steps += 1
        if self.steps % EVERY == EVERY // 2:
            self.bare.measure()
            self._last_tick = time.monotonic()

    def take_usage(self) -> Usage:
        """The usage since the last call."""
        usage, self.usage = self.usage, Usage()
        return usage


def bare_step(settings: TrainSettings) -> "BareStep":
    """The network and step of a run, with batches in memory."""
    data = open_data(settings.data)
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    state = TrainState(settings, World(), model, data)
    loader = train_loader(settings, data, World(), epoch=1, start=0, overlay=state.overlay, probe_fraction=0.0)
    batches = [dataclasses.replace(b, images=b.images.clone()) for b in itertools.islice(loader, 8)]
    return BareStep(state, batches)


@dataclasses.dataclass
class BareStep:
    state: TrainState
    batches: list[Batch]
    images: int = 0
    seconds: float = 0.0

    def measure(self) -> None:
        """Execute and measure STEPS steps."""
        set_training(self.state.model, self.state.settings.model)
        start = time.perf_counter()
        for number in range(STEPS):
            batch = self.batches[number % len(self.batches)]
            train_step(self.state, batch, last=False)
            self.images += len(batch)
        self.seconds += time.perf_counter() - start

    def take_rate(self) -> float:
        """Images per second since the last call."""
        rate = self.images / self.seconds
        self.images, self.seconds = 0, 0.0
        return rate


def checkpoint_seconds(data: RunData) -> tuple[float, float]:
    """(seconds, bytes) of a checkpoint of the network of openimages_v3, written to a local disk."""
    settings = TrainSettings(model=ModelSettings(backbone="resnet101", weights=None))
    model = build_model(settings.model, 5000)
    state = TrainState(settings, World(), model, data)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    state.optimizer.step()
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(4):
            start = time.perf_counter()
            checkpoint = save_state(state)
            assert checkpoint is not None
            name = write_checkpoint(folder, step, checkpoint)
            times.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in (Path(folder) / "checkpoints" / name).iterdir())
    return statistics.median(times[1:]), size


def main() -> None:
    settings = read_settings(TrainSettings, ["--config=coco18", *sys.argv[1:]])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(settings.run, storage=folder, name="overhead", trackers=["mlflow"])
        workers = dataclasses.replace(settings.workers, num_workers=0)
        settings = with_absolute_paths(dataclasses.replace(settings, run=run, workers=workers), str(Path.cwd()))
        bare, rows = bare_step(settings), []
        bare.measure()
        bare.take_rate()
        meter = PairedMeter(bare)

        def compare(_: dict[str, float]) -> None:
            usage, bare_rate = meter.take_usage(), bare.take_rate()
            rate, waiting = usage.images / usage.seconds, usage.waited_seconds / usage.seconds
            rows.append((rate / bare_rate, waiting, usage.checkpoint_seconds / usage.seconds))
            print(
                f"epoch {len(rows)}: run {rate:.1f}, bare step {bare_rate:.1f} images/s: {rate / bare_rate:.1%}; "
                f"waiting for batches {waiting:.2%}, for {usage.checkpoints} checkpoints {rows[-1][2]:.2%} of the time",
                flush=True,
            )

        def launch(settings: TrainSettings) -> Result:
            journal = Journal(settings.run.folder, "rank0")
            return train(settings, World(), RunHooks(journal.metrics, print, on_epoch_end=compare, meter=meter))

        train_and_report(settings, launch=launch)
    ratio, waiting, checkpoints = (statistics.median(values) for values in zip(*rows[1:], strict=True))
    print(f"median: {ratio:.1%} of the rate of the bare step; waiting {waiting:.2%}, checkpoints {checkpoints:.2%}")
    seconds, size = checkpoint_seconds(open_data(settings.data))
    print(
        f"a checkpoint of ResNet-101, 5,000 classes, Adam: {seconds:.2f} s for {size / 1e6:,.0f} MB, "
        f"{seconds / V3_INTERVAL_SECONDS:.2%} of the interval of {V3_INTERVAL_SECONDS:.0f} s"
    )


if __name__ == "__main__":
    main()
