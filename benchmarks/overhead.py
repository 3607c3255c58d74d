"""What everything around the step costs: a run as people start it beside its bare step, in turn, in one process.

python benchmarks/overhead.py [--config jobs/recipes/coco18.yaml] [--epochs 4] [any setting of a training]

Every so many steps the run (shards, decoding, journal, MLflow, checkpoints; in this process, without Ray) stands still
while a second network does the same step over batches that lie in memory, with nothing around it: so both meet the
same state of the machine. What the loader reads ahead meanwhile is at most a tenth of what the run needs. Prints for
each epoch images a second of both, the run's share of the bare rate, and the shares of the time that waits for batches
and for checkpoints; the medians leave out the first epoch. Then the seconds that one checkpoint of a ResNet-101 with
5,000 classes and Adam takes, and their share of the interval of `jobs/recipes/openimages_v3.yaml` at the 1,100 images
a second that it expects.
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

from paml.cli import read_settings
from paml.distributed.run import train_run
from paml.models import ModelSettings
from paml.models.cam import build_model, set_training
from paml.shards.cache import Traffic
from paml.tracking import Journal
from paml.training.checkpoint import write_checkpoint
from paml.training.data import open_data, train_loader
from paml.training.loop import Result, Watcher, train
from paml.training.meter import Meter, Usage
from paml.training.settings import TrainSettings, at_absolute_paths
from paml.training.state import new_state, save_state
from paml.training.step import train_step
from paml.training.world import World

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
EVERY, STEPS = 40, 20
"""Steps of the run between two stretches of the bare step, and the length of these."""
V3_INTERVAL_SECONDS = 2000 * 128 / 1100


class Paired(Meter):
    """A meter that remembers an epoch of the run, and stops its clock for stretches of the bare step."""

    def __init__(self, bare: "Bare") -> None:
        super().__init__()
        self.bare, self.used, self.steps = bare, Usage(), 0

    def publish(self, used: Usage) -> None:
        self.used.add(used)

    def step(self, images: int, traffic: Traffic) -> None:
        super().step(images, traffic)
        self.steps += 1
        if self.steps % EVERY == EVERY // 2:
            self.bare.stretch()
            self._ticked = time.monotonic()

    def take(self) -> Usage:
        used, self.used = self.used, Usage()
        return used


def bare_steps(settings: TrainSettings) -> "Bare":
    """The same network and step over batches in memory."""
    data = open_data(settings.data)
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    state = new_state(settings, World(), model, len(data.classes), 10**9)
    loader = train_loader(settings, data, World(), epoch=1, start=0, overlay=state.overlay, probe=0.0)
    batches = [dataclasses.replace(b, images=b.images.clone()) for b in itertools.islice(loader, 8)]
    return Bare(state, batches)


@dataclasses.dataclass
class Bare:
    state: object
    batches: list
    images: int = 0
    seconds: float = 0.0

    def stretch(self) -> None:
        """So many steps, on its own clock."""
        set_training(self.state.model, self.state.settings.model)  # pyright: ignore[reportAttributeAccessIssue]
        begun = time.perf_counter()
        for number in range(STEPS):
            batch = self.batches[number % len(self.batches)]
            train_step(self.state, batch, last=False)  # pyright: ignore[reportArgumentType]
            self.images += len(batch)
        self.seconds += time.perf_counter() - begun

    def take_rate(self) -> float:
        """Images a second since it was asked last."""
        rate = self.images / self.seconds
        self.images, self.seconds = 0, 0.0
        return rate


def checkpoint_seconds() -> tuple[float, float]:
    """(seconds, bytes) of one checkpoint of the V3 recipe's network, written to a local disk."""
    settings = TrainSettings(model=ModelSettings(backbone="resnet101", weights=None))
    model = build_model(settings.model, 5000)
    state = new_state(settings, World(), model, 5000, 1000)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    state.optimiser.step()
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(4):
            begun = time.perf_counter()
            checkpoint = save_state(state)
            assert checkpoint is not None
            name = write_checkpoint(folder, step, checkpoint)
            times.append(time.perf_counter() - begun)
        size = sum(file.stat().st_size for file in (Path(folder) / "checkpoints" / name).iterdir())
    return statistics.median(times[1:]), size


def main() -> None:
    settings = read_settings(TrainSettings, __doc__ or "", default_config=str(RECIPES / "coco18.yaml"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(settings.run, storage=folder, name="overhead", mlflow=True)
        workers = dataclasses.replace(settings.workers, num_workers=0)
        settings = at_absolute_paths(dataclasses.replace(settings, run=run, workers=workers), str(Path.cwd()))
        bare, rows = bare_steps(settings), []
        bare.stretch()
        bare.take_rate()
        meter = Paired(bare)

        def compare(figures: dict[str, float]) -> None:
            used = meter.take()
            whole, alone = used.images / used.seconds, bare.take_rate()
            rows.append((whole / alone, used.waited_seconds / used.seconds, used.checkpoint_seconds / used.seconds))
            print(
                f"epoch {len(rows)}: run {whole:.1f}, bare step {alone:.1f} images/s: {whole / alone:.1%}; waiting for "
                f"batches {rows[-1][1]:.2%}, for {used.checkpoints} checkpoints {rows[-1][2]:.2%} of the time",
                flush=True,
            )

        def launch(settings: TrainSettings, run_folder: str) -> Result:
            journal = Journal(run_folder, "rank0")
            return train(settings, World(), Watcher(journal, print, epoch_done=compare, meter=meter))

        train_run(settings, launch=launch)
    ratio, waited, checkpoints = (statistics.median(values) for values in zip(*rows[1:], strict=True))
    print(f"median: {ratio:.1%} of the bare step's rate; waiting {waited:.2%}, checkpoints {checkpoints:.2%}")
    seconds, size = checkpoint_seconds()
    share = seconds / V3_INTERVAL_SECONDS
    print(
        f"a checkpoint of ResNet-101, 5,000 classes, Adam: {seconds:.2f} s for {size / 1e6:,.0f} MB, "
        f"{share:.2%} of {V3_INTERVAL_SECONDS:.0f} s"
    )


if __name__ == "__main__":
    main()
