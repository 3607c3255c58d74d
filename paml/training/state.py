"""All that a run must keep so that stopping it anywhere changes nothing."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from paml.data.device import Normalise, Normaliser, features_as_float
from paml.errors import SettingsError
from paml.labels.overlay import LabelOverlay
from paml.losses import Memory
from paml.models import CamClassifier
from paml.models.cam import set_learning
from paml.training.checkpoint import Checkpoint
from paml.training.optimiser import build_optimiser, rate_at
from paml.training.phases import Phase
from paml.training.rejected import Rejected
from paml.training.settings import TrainSettings, flatten
from paml.training.world import World

COUNTS = (
    "images",
    "unobserved",
    "rejected",
    "false_negatives",
    "rejected_false_negatives",
    "probe_positives",
    "rejected_probe_positives",
    "probe_negatives",
    "rejected_probe_negatives",
    "bad_images",
)
"""Integers summed over an epoch, in the order of TrainState.counts."""


@dataclasses.dataclass
class TrainState:
    """Model, optimiser and place of one worker.

    Equal on all workers, but for `loss_sum`, `counts`, `rejected` and `new_codes`.
    """

    settings: TrainSettings
    world: World
    num_classes: int
    model: CamClassifier
    averaged: CamClassifier | None
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    normalise: Normalise
    autocast: torch.dtype | None
    steps_per_epoch: int
    network: nn.Module
    """The model, wrapped for DDP where there are several workers."""
    overlay: LabelOverlay
    loss_sum: torch.Tensor
    """float64 scalar on the device: sum of the epoch's label losses of this worker."""
    counts: torch.Tensor
    """int64 [len(COUNTS)] on the device: this worker's share of the epoch's counts."""
    rejected: Rejected
    """What this worker keeps of the epoch's rejected labels."""
    epoch: int = 1
    """The epoch under way, from 1."""
    step: int = 0
    """Global batches done in this epoch."""
    optimiser_step: int = 0
    """Steps of the optimiser done in all."""
    new_codes: list[np.ndarray] = dataclasses.field(default_factory=list)
    """LL-Cp's corrections that the other workers do not know yet."""
    memory: Memory | None = None
    """What the loss keeps beyond a batch; few losses do."""
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Figures of each epoch done."""
    best: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """For each alpha scored: the best epoch, its validation mAP and its checkpoint."""
    data_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the run is trained on; a run goes on with the same alone."""
    waiting: list = dataclasses.field(default_factory=list)
    """Figures of the step before that are still on their way from the GPU."""

    @property
    def phase(self) -> Phase:
        """The phase of the epoch under way; the optimiser and `network` are of it."""
        return self.settings.phase(self.epoch)

    @property
    def loss_epoch(self) -> int:
        """What the loss's and the boost's schedules take the epoch under way for."""
        return self.phase.loss_epoch(self.epoch)

    @property
    def learning_rate(self) -> float:
        """Of the backbone in the optimiser's next step: schedules run over a phase."""
        phase, an_epoch = self.phase, -(-self.steps_per_epoch // self.settings.accumulate)
        return rate_at(phase.optimiser, self.optimiser_step - phase.before * an_epoch, phase.epochs * an_epoch)


def autocast_type(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """The type to compute in, or None for float32."""
    return autocast_of(settings.precision, device)


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that auto, bf16, fp16 or fp32 computes in on a device, or None for float32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def new_state(
    settings: TrainSettings, world: World, model: CamClassifier, num_classes: int, steps_per_epoch: int
) -> TrainState:
    """A run before its first step. Seeds torch's generators, which draw for networks with random depth.

    Raises SettingsError for SyncBatchNorm without a GPU.
    """
    if settings.model.batch_norm == "sync" and world.device.type != "cuda":
        raise SettingsError("model.batch_norm is sync, which needs GPUs; take worker or frozen")
    torch.manual_seed((settings.seed + 1) * 1_000_003 + world.rank)
    model = model.to(world.device)
    model.on_features = settings.model.train_from is not None
    normalise: Normalise = Normaliser(settings.model.pixel_mean, settings.model.pixel_std, world.device)
    averaged = None
    if settings.optimiser.average:
        import copy

        averaged = copy.deepcopy(model).eval()
    autocast = autocast_type(settings, world.device)
    optimiser, network = _learners(settings, world, model, epoch=1)
    return TrainState(
        settings=settings,
        world=world,
        num_classes=num_classes,
        model=model,
        averaged=averaged,
        optimiser=optimiser,
        scaler=torch.amp.GradScaler(world.device.type, enabled=autocast == torch.float16),  # pyright: ignore
        normalise=features_as_float if model.on_features else normalise,
        autocast=autocast,
        steps_per_epoch=steps_per_epoch,
        network=network,
        overlay=LabelOverlay(num_classes),
        loss_sum=torch.zeros((), dtype=torch.float64, device=world.device),
        counts=torch.zeros(len(COUNTS), dtype=torch.int64, device=world.device),
        rejected=Rejected(num_classes, settings.seed, epoch=1),
    )


def _learners(
    settings: TrainSettings, world: World, model: CamClassifier, *, epoch: int
) -> tuple[torch.optim.Optimizer, nn.Module]:
    """A fresh optimiser and DDP over what learns in the phase of `epoch`."""
    phase = settings.phase(epoch)
    set_learning(model, settings.model, head_only=phase.head_only)
    return build_optimiser(phase.optimiser, model), _distributed(model, world)


def enter_epoch(state: TrainState, epoch: int) -> None:
    """Go to the beginning of `epoch`; all workers must call it. A phase begins with a fresh optimiser."""
    before = state.phase
    state.epoch, state.step = epoch, 0
    state.rejected = Rejected(state.num_classes, state.settings.seed, epoch)
    if state.phase != before:
        state.network = state.model  # DDP's hooks go before others come
        state.optimiser, state.network = _learners(state.settings, state.world, state.model, epoch=epoch)


def _distributed(model: CamClassifier, world: World) -> nn.Module:
    """DDP with its gradient buckets in their final order before the first step.

    DDP re-orders its buckets after the first backward pass. A resumed run would do so one step later than the
    unbroken one, and an all-reduce over three or more workers adds up in another order: the bits would differ.
    One backward pass of nothing, with BatchNorm's statistics at rest, brings that forward to the start.
    """
    if world.group is None:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device.index] if world.device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    modes = {module: module.training for module in model.modules()}
    network.eval()
    blank = torch.zeros(1, 3, 64, 64, device=world.device)
    if model.on_features:
        with torch.no_grad():
            blank = model.front(blank)
    (network(blank).sum() * 0).backward()
    network.zero_grad()
    for module, mode in modes.items():
        module.training = mode
    return network


def share_corrections(state: TrainState) -> None:
    """Make LL-Cp's overlay equal on all workers."""
    if state.settings.loss.name == "ll-cp":
        mine = np.concatenate([*state.new_codes, np.empty(0, np.int64)])
        state.new_codes.clear()
        for codes in state.world.gather_objects(mine):
            state.overlay.add(codes)


def share_rejected(state: TrainState) -> None:
    """Bring what the workers keep of the epoch's rejected labels to the first; all workers must call it."""
    found = state.world.gather_objects((state.rejected.codes, state.rejected.logits, state.rejected.by_class))
    state.rejected = Rejected(state.num_classes, state.settings.seed, state.epoch)
    for own in found if state.world.first else ():
        state.rejected.add(*own)


def _generators(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that a network may draw from on this device."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def save_state(state: TrainState) -> Checkpoint | None:
    """A checkpoint of the whole run on the first worker, None on the others. All workers must call it."""
    share_corrections(state)
    share_rejected(state)
    totals = state.world.sum(state.loss_sum.clone()), state.world.sum(state.counts.clone())
    state.loss_sum.copy_(totals[0] if state.world.first else torch.zeros_like(totals[0]))
    state.counts.copy_(totals[1] if state.world.first else torch.zeros_like(totals[1]))
    generators = state.world.gather_objects([g.numpy().tobytes() for g in _generators(state.world.device)])
    if not state.world.first:
        return None
    moments = state.optimiser.state_dict()["state"]
    tensors = {
        "weights": dict(state.model.state_dict()),
        "optimiser": {f"{place}.{key}": value for place, slot in moments.items() for key, value in slot.items()},
        "progress": {
            "overlay": torch.from_numpy(state.overlay.codes),
            "loss_sum": state.loss_sum,
            "counts": state.counts,
            "rejected.codes": torch.from_numpy(state.rejected.codes),
            "rejected.logits": torch.from_numpy(state.rejected.logits),
            "rejected.by_class": torch.from_numpy(state.rejected.by_class),
            **{
                f"generator.{rank}.{place}": torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
                for rank, own in enumerate(generators)
                for place, drawn in enumerate(own)
            },
        },
    }
    if state.averaged is not None:
        tensors["averaged"] = dict(state.averaged.state_dict())
    if state.memory is not None:
        tensors["memory"] = state.memory.tensors()
    facts = {
        "settings": flatten(state.settings),
        "num_classes": state.num_classes,
        "epoch": state.epoch,
        "step": state.step,
        "optimiser_step": state.optimiser_step,
        "scaler": state.scaler.state_dict(),
        "history": state.history,
        "best": state.best,
        "workers": state.world.size,
        "data": state.data_digests,
    }
    return Checkpoint(tensors, facts)


def load_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """Take up the run where `checkpoint` left it. Raises SettingsError where one has a memory and the other none."""
    facts, tensors = checkpoint.facts, checkpoint.tensors
    if (state.memory is not None) != ("memory" in tensors):
        begun, now = ("without", "with") if state.memory is not None else ("with", "without")
        raise SettingsError(
            f"the run was begun {begun} a memory of its loss {state.settings.loss.name}, and would go on {now} one: "
            "give loss.p_asl.prior_file as it was (another path of the same file will do), or the new run another "
            "run.name"
        )
    enter_epoch(state, facts["epoch"])
    state.model.load_state_dict(tensors["weights"])
    if state.averaged is not None:
        state.averaged.load_state_dict(tensors["averaged"])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors["optimiser"].items():
        place, key = name.split(".", 1)
        moments.setdefault(int(place), {})[key] = value
    groups = state.optimiser.state_dict()["param_groups"]
    state.optimiser.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, slot in state.optimiser.state.items():  # laid out in memory as the optimiser does it itself
        for key, value in slot.items():
            if value.shape == parameter.shape:
                slot[key] = torch.empty_like(parameter).copy_(value)
    progress = tensors["progress"]
    state.overlay = LabelOverlay(state.num_classes, progress["overlay"].numpy())
    if state.memory is not None:
        state.memory.load(tensors["memory"])
    if state.world.first:
        state.loss_sum.copy_(progress["loss_sum"])
        state.counts.copy_(progress["counts"])
        if "rejected.codes" in progress:  # an older paml kept none
            state.rejected.add(*(progress[f"rejected.{name}"].numpy() for name in ("codes", "logits", "by_class")))
    own = [progress.get(f"generator.{state.world.rank}.{place}") for place in range(2)]
    if own[0] is not None:
        torch.set_rng_state(own[0])
    if own[1] is not None and state.world.device.type == "cuda":
        torch.cuda.set_rng_state(own[1], state.world.device)
    state.scaler.load_state_dict(facts["scaler"])
    state.step, state.optimiser_step = facts["step"], facts["optimiser_step"]
    state.history, state.best = facts["history"], facts["best"]
