"""Training runs on real Gloo workers, for tests: at the top level of a module, so that a process can import it."""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from paml.data.loader import Batch
from paml.data.plan import EpochPlan
from paml.labels import UNOBSERVED
from paml.losses import LossSettings, partial_label_loss
from paml.metrics import MetricSettings, scores
from paml.models.cam import build_model, set_training
from paml.training.data import RunData, eval_loader, loss_memory, open_data, train_loader
from paml.training.evaluate import score_pairs
from paml.training.features import with_features
from paml.training.loop import Result, Watcher, train
from paml.training.settings import TrainSettings
from paml.training.state import TrainState, new_state
from paml.training.step import train_step
from paml.training.world import World


class Interrupted(Exception):
    """Stands for a kill: nothing of the run gets to tidy up."""


class CountDown:
    """Progress bars that interrupt the run at its nth batch, training and scoring alike."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def bar(self, title: str, images: int) -> "CountDown":
        return self

    def update(self, n: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted

    def close(self) -> None: ...


def quiet(said: list[str] | None = None, **parts: Any) -> Watcher:
    """A watcher that keeps what is said."""
    return Watcher(say=(said if said is not None else []).append, **parts)


def run(settings: TrainSettings, *, stop_at: int | None = None, world: World | None = None) -> Result | None:
    """A run to its end, or to its nth batch, where None comes back."""
    watcher = quiet() if stop_at is None else quiet(bar=CountDown(stop_at).bar)
    try:
        return train(settings, world or World(), watcher)
    except Interrupted:
        return None


def world_of(rank: int) -> World:
    """The place of a worker that `run_on_ranks` has started."""
    return World(rank=rank, size=dist.get_world_size(), group=dist.group.WORLD)


def state_of(settings: TrainSettings, data: RunData, world: World) -> TrainState:
    """A run before its first step, BatchNorm's statistics measured on noise so that frozen ones let signals through."""
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    noise = torch.Generator().manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, 3, 32, 32, generator=noise))
    steps = EpochPlan(data.train.samples.index, settings.batch_size).steps
    state = new_state(settings, world, model, len(data.classes), steps)
    state.memory = loss_memory(settings, data, world)
    return state


def cached(state: TrainState, data: RunData, said: list[str] | None = None) -> RunData:
    """The data with features in the place of images, where the settings say so."""
    watcher = quiet(said)
    return with_features(state.settings, data, state.model, state.world, say=watcher.say, bar=watcher.bar)


def batches_of(state: TrainState, data: RunData, *, epoch: int, start: int = 0, probe: float = 0.0) -> list[Batch]:
    """The worker's batches of an epoch."""
    overlay = state.overlay
    return list(train_loader(state.settings, data, state.world, epoch=epoch, start=start, overlay=overlay, probe=probe))


@dataclasses.dataclass
class Trace:
    """What a worker saw and computed in some steps."""

    places: list[np.ndarray] = dataclasses.field(default_factory=list)
    flips: list[np.ndarray] = dataclasses.field(default_factory=list)
    slots: list[np.ndarray] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    rejected: list[np.ndarray] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    pairs: int = 0
    map: float = 0.0
    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def crafted_logits(batch: Batch, num_classes: int) -> torch.Tensor:
    """float32 [b, K], a function of image and class alone, with many ties."""
    pair = batch.index[:, None] * num_classes + np.arange(num_classes)
    return torch.from_numpy(((pair * 2654435761 % 1009 % 23) / 4.0 - 3.0).astype(np.float32))


def trace_steps(rank: int, settings: TrainSettings, steps: int) -> Trace:
    """Some steps of training on one of several workers, or on one alone where no process group stands."""
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
            trace.places.append(batch.index)
            trace.flips.append(batch.flips.numpy())
            trace.slots.append(batch.slots.numpy())
            trace.rejected.append(_rejected(batch, state, crafted))
        state.epoch, state.step = state.epoch + 1, 0
    trace.counts = world.sum(state.counts.clone()).tolist()
    pairs = score_pairs(
        state.model,
        eval_loader(settings, data.validation, data.image_size, world),
        alphas=(5.0,),
        world=world,
        normalise=state.normalise,
        autocast=None,
    )[5.0]
    none = np.zeros(state.num_classes, np.int64)
    trace.pairs = len(pairs.cls)
    trace.map = scores(
        *pairs[:3], state.num_classes, settings=MetricSettings(), train_positives=none, train_negatives=none
    ).map
    trace.weights = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    return trace


def _rejected(batch: Batch, state: TrainState, settings: LossSettings) -> np.ndarray:
    """Codes of the labels that crafted logits lose in this batch."""
    K = state.num_classes
    states = torch.full((len(batch), K), UNOBSERVED, dtype=torch.int8)
    states[batch.labels.image, batch.labels.cls] = batch.labels.state
    out = partial_label_loss(
        crafted_logits(batch, K),
        states,
        settings=settings,
        epoch=3,
        divisor=1.0,
        world=state.world.group,
        slots_B=batch.slots,
        batch_size=state.settings.batch_size,
    )
    assert out.rejected_BK is not None
    image, cls = np.nonzero(out.rejected_BK.numpy())
    return batch.index[image] * K + cls


def finish(rank: int, settings: TrainSettings) -> None:
    """On each worker: the run to its end, from its newest checkpoint on where there is one."""
    assert run(settings, world=world_of(rank)) is not None


def unbroken_and_resumed(rank: int, whole: TrainSettings, broken: TrainSettings, stops: list[int]) -> None:
    """On each worker: one run to its end; another that is interrupted after each of `stops` batches, then finished."""
    world = world_of(rank)
    assert run(whole, world=world) is not None
    for stop in stops:
        assert run(broken, stop_at=stop, world=world) is None
        dist.barrier()
    assert run(broken, world=world) is not None
