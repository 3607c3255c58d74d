"""Training runs for tests, also on several Gloo workers, whose processes import this module."""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from paml.data.loader import Batch
from paml.labels import UNOBSERVED
from paml.losses import BatchContext, LossSettings, partial_label_loss
from paml.metrics import MetricSettings, scores
from paml.models.cam import build_model, set_training
from paml.training.data import RunData, eval_loader, open_data, train_loader
from paml.training.evaluate import score_pairs
from paml.training.features import with_features
from paml.training.hooks import RunHooks
from paml.training.loop import train
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.state import TrainState
from paml.training.step import train_step
from paml.training.world import World


class Interrupted(Exception):
    """Raised to simulate a killed run."""


class CountDown:
    """A progress bar that interrupts the run after some batches of training and evaluation."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def progress(self, title: str, images: int) -> "CountDown":
        return self

    def update(self, n: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted

    def close(self) -> None: ...


class MemoryJournal:
    """Records the metrics of a run."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.epochs.append((step, values))


def quiet(lines: list[str] | None = None, **parts: Any) -> RunHooks:
    """Hooks that collect the log lines."""
    return RunHooks(log=([] if lines is None else lines).append, **parts)


def stop_after_epoch(metrics: dict[str, float]) -> None:
    """For `RunHooks.on_epoch_end`: interrupts the run after its next epoch."""
    raise Interrupted


def run(settings: TrainSettings, *, stop_at: int | None = None, world: World | None = None) -> Result | None:
    """Run to the end, or to the batch `stop_at` and return None."""
    hooks = quiet() if stop_at is None else quiet(progress=CountDown(stop_at).progress)
    try:
        return train(settings, world or World(), hooks)
    except Interrupted:
        return None


def world_of(rank: int) -> World:
    """The world of a worker started by `run_on_ranks`."""
    return World(rank=rank, size=dist.get_world_size(), group=dist.group.WORLD)


def state_of(settings: TrainSettings, data: RunData, world: World) -> TrainState:
    """The state before the first step, with BatchNorm statistics of noise, for the case that they are frozen."""
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    noise = torch.Generator().manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, 3, 32, 32, generator=noise))
    return TrainState(settings, world, model, data)


def cached(state: TrainState, data: RunData, lines: list[str] | None = None) -> RunData:
    """The data with cached features if the settings use them."""
    return with_features(state.settings, data, state.model, state.world, quiet(lines))


def batches_of(state: TrainState, data: RunData, *, epoch: int, start: int = 0, probe: float = 0.0) -> list[Batch]:
    """The worker's batches in an epoch."""
    loader = train_loader(
        state.settings, data, state.world, epoch=epoch, start=start, overlay=state.overlay, probe_fraction=probe
    )
    return list(loader)


@dataclasses.dataclass
class Trace:
    """The batches and results of some steps of a worker."""

    index: list[np.ndarray] = dataclasses.field(default_factory=list)
    flips: list[np.ndarray] = dataclasses.field(default_factory=list)
    slots: list[np.ndarray] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    rejected: list[np.ndarray] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    pairs: int = 0
    map: float = 0.0
    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def crafted_logits(batch: Batch, num_classes: int) -> torch.Tensor:
    """float32 [b, K], a function of image and class with many ties."""
    pair = batch.index[:, None] * num_classes + np.arange(num_classes)
    return torch.from_numpy(((pair * 2654435761 % 1009 % 23) / 4.0 - 3.0).astype(np.float32))


def trace_steps(rank: int, settings: TrainSettings, steps: int) -> Trace:
    """Train some steps on one of several workers, or on a single one if there is no process group."""
    world = world_of(rank) if dist.is_initialized() else World()
    data = open_data(settings.data)
    state, trace = state_of(settings, data, world), Trace()
    data = cached(state, data)
    crafted = LossSettings(name="ll-r", reject_rate_step=0.07)
    while len(trace.losses) < steps:
        set_training(state.model, settings.model)
        for batch in batches_of(state, data, epoch=state.epoch)[: steps - len(trace.losses)]:
            before = state.loss_sum.clone()
            train_step(state, batch, last=state.step + 1 == state.steps_per_epoch)
            total = world.sum(state.loss_sum - before)
            trace.losses.append(float(total) / (settings.batch_size * state.num_classes))
            trace.index.append(batch.index)
            trace.flips.append(batch.flips.numpy())
            trace.slots.append(batch.slots.numpy())
            trace.rejected.append(_rejected(batch, state, crafted))
        state.epoch, state.step = state.epoch + 1, 0
    trace.counts = world.sum(state.counts.clone()).tolist()
    pairs = score_pairs(
        state.model,
        eval_loader(settings.data, data.validation, data.image_size, world, batch_size=settings.eval_batch_size),
        alphas=(5.0,),
        world=world,
        autocast=None,
    )[5.0]
    none = np.zeros(state.num_classes, np.int64)
    trace.pairs = len(pairs.cls)
    trace.map = scores(*pairs[:3], state.num_classes, settings=MetricSettings(), train_counts=none).map
    trace.weights = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    return trace


def _rejected(batch: Batch, state: TrainState, settings: LossSettings) -> np.ndarray:
    """Codes of the labels of this batch that are rejected with crafted logits."""
    K = state.num_classes
    states = torch.full((len(batch), K), UNOBSERVED, dtype=torch.int8)
    states[batch.labels.image, batch.labels.cls] = batch.labels.state
    out = partial_label_loss(
        crafted_logits(batch, K),
        states,
        settings,
        BatchContext(
            epoch=3, world=state.world.group, slots_B=batch.slots, batch_size=state.settings.batch_size, divisor=1.0
        ),
    )
    assert out.rejected_BK is not None
    image, cls = np.nonzero(out.rejected_BK.numpy())
    return batch.index[image] * K + cls


def finish(rank: int, settings: TrainSettings) -> None:
    """On each worker: run to the end, from the newest checkpoint if there is one."""
    assert run(settings, world=world_of(rank)) is not None


def uninterrupted_and_resumed(
    rank: int, uninterrupted: TrainSettings, resumed: TrainSettings, stops: list[int]
) -> None:
    """On each worker: a run without a stop, and one that is interrupted after each of `stops` batches."""
    world = world_of(rank)
    assert run(uninterrupted, world=world) is not None
    for stop in stops:
        assert run(resumed, stop_at=stop, world=world) is None
        dist.barrier()
    assert run(resumed, world=world) is not None
