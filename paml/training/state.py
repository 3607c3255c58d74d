"""The state of a run: everything needed to resume it with bit-identical results."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from paml.data.plan import EpochPlan
from paml.errors import SettingsError
from paml.labels.overlay import LabelOverlay
from paml.losses import LOSSES, StateScope, build_loss_state
from paml.models import CamClassifier
from paml.models.cam import set_requires_grad
from paml.settings import flatten
from paml.training.checkpoint import Checkpoint
from paml.training.data import RunData
from paml.training.evaluate import evaluation_mode, normalizer_of
from paml.training.optimizer import Phase, build_optimizer, learning_rate_at
from paml.training.rejected import EpochRejections
from paml.training.settings import TrainSettings
from paml.training.world import World

COUNTS: tuple[str, ...] = (
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


class TrainState:
    """Model, optimizer and position of one worker.

    The same on all workers except for `loss_sum`, `counts`, `rejected` and `new_corrections`.
    """

    def __init__(self, settings: TrainSettings, world: World, model: CamClassifier, data: RunData) -> None:
        """The state before the first step. Seeds torch's generators, which networks with stochastic depth use.

        Raises SettingsError for SyncBatchNorm without a GPU, and what the loss raises for its settings and the data.
        """
        if settings.model.batch_norm == "sync" and world.device.type != "cuda":
            raise SettingsError("model.batch_norm is sync, which needs GPUs: set it to worker or frozen")
        torch.manual_seed((settings.seed + 1) * 1_000_003 + world.rank)
        self.settings, self.world, self.num_classes = settings, world, len(data.classes)
        self.epoch = 1
        """The current epoch, from 1."""
        self.step = 0
        """Global batches done in this epoch."""
        self.optimizer_step = 0
        """Optimizer steps done in the run."""
        self.steps_per_epoch = EpochPlan(data.train.samples.index, settings.batch_size).steps
        self.model = model.to(world.device)
        model.on_features = model.info.embeddings or settings.model.train_from is not None
        self.ema_model = copy.deepcopy(model).eval() if settings.optimizer.ema_decay else None
        self.start_phase()
        self.autocast = autocast_dtype(settings.precision, world.device)
        enabled = self.autocast == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=enabled)  # pyright: ignore
        self.normalize = normalizer_of(model, world.device)
        self.overlay = LabelOverlay(self.num_classes)
        """Labels that the loss has corrected permanently (LL-Cp)."""
        self.new_corrections: list[np.ndarray] = []
        """Corrections of this worker that have not been shared with the others."""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        """Sum of the label losses of this worker in the epoch."""
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=world.device)
        """int64 [len(COUNTS)]: counts of this worker in the epoch."""
        self.rejected = EpochRejections(self.num_classes, settings.seed, self.epoch)
        """The rejected labels of this worker that the epoch will save."""
        scope = StateScope(
            index=data.train.samples.index,
            classes=data.classes,
            epochs=settings.epochs,
            seed=settings.seed,
            device=world.device,
            world=world.group,
        )
        self.loss_state = build_loss_state(settings.loss, scope)
        """What the loss keeps between batches; None for most losses."""
        self.history: list[dict[str, float]] = []
        """Metrics of each finished epoch."""
        self.best: dict[str, dict[str, Any]] = {}
        """For each alpha: the best epoch, its validation mAP and its checkpoint."""
        self.data_digests = {"training images": data.train.manifest.digest, "training labels": data.train.table.digest}
        """Digests of the training data, which must be the same when the run is resumed."""
        self.pending: list = []
        """Results of the previous step that are still being copied from the GPU."""

    def start_phase(self) -> None:
        """Make the optimizer of the current phase, and DDP over the parameters that it trains."""
        self.network: nn.Module = self.model  # drop the old DDP and its hooks before a new one is built
        """The model, wrapped in DDP if there are several workers."""
        set_requires_grad(self.model, self.settings.model, head_only=self.phase.head_only)
        self.optimizer = build_optimizer(self.phase.optimizer, self.model)
        self.network = _distributed(self.model, self.world)

    @property
    def phase(self) -> Phase:
        """The phase of the current epoch. `optimizer` and `network` belong to it."""
        return self.settings.phase(self.epoch)

    @property
    def loss_epoch(self) -> int:
        """The epoch, from 1, of the loss's schedule. Head-only epochs are warm-up epochs of the rejection."""
        return 1 if self.phase.head_only else self.epoch - self.phase.first_epoch + 1

    @property
    def learning_rate(self) -> float:
        """The learning rate of the backbone in the next optimizer step. Schedules span a phase."""
        phase, steps_per_epoch = self.phase, -(-self.steps_per_epoch // self.settings.grad_accum_steps)
        step = self.optimizer_step - (phase.first_epoch - 1) * steps_per_epoch
        return learning_rate_at(phase.optimizer, step, phase.epochs * steps_per_epoch)

    @property
    def eval_model(self) -> CamClassifier:
        """The model that is evaluated: the EMA model if there is one."""
        return self.model if self.ema_model is None else self.ema_model


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses for `precision` (auto, bf16, fp16 or fp32) on `device`; None for float32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def enter_epoch(state: TrainState, epoch: int) -> None:
    """Move to the start of `epoch`; all workers must call it. A new phase gets a new optimizer."""
    previous = state.phase
    state.epoch, state.step = epoch, 0
    state.rejected = EpochRejections(state.num_classes, state.settings.seed, epoch)
    if state.phase != previous:
        state.start_phase()


def _distributed(model: CamClassifier, world: World) -> nn.Module:
    """DDP with its gradient buckets in their final order before the first step.

    DDP reorders its buckets after the first backward pass. A resumed run would reorder them one step later than an
    uninterrupted one, and with three or more workers an all-reduce would sum in another order, which changes the bits.
    A backward pass with zero gradients, in evaluation mode to leave BatchNorm's statistics unchanged, does it now.
    """
    if world.group is None:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device.index] if world.device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    shape = (1, model.info.channels, 1, 1) if model.info.embeddings else (1, 3, 64, 64)
    blank = torch.zeros(shape, device=world.device)
    with evaluation_mode(network):
        if model.on_features:
            with torch.no_grad():
                blank = model.front(blank)
        (network(blank).sum() * 0).backward()
    network.zero_grad()
    return network


def share_corrections(state: TrainState) -> None:
    """Merge the permanent corrections of all workers; all workers must call it."""
    if LOSSES[state.settings.loss.name].corrects:
        own = np.concatenate([*state.new_corrections, np.empty(0, np.int64)])
        state.new_corrections.clear()
        for codes in state.world.gather_objects(own):
            state.overlay.add(codes)


def share_rejected(state: TrainState) -> None:
    """Gather the rejected labels to be saved on the first worker; all workers must call it."""
    gathered = state.world.gather_objects(state.rejected.arrays())
    state.rejected = EpochRejections(state.num_classes, state.settings.seed, state.epoch)
    for part in gathered if state.world.first else ():
        state.rejected.add(**part)


def save_state(state: TrainState) -> Checkpoint | None:
    """A checkpoint of the whole run on the first worker, None on the others. All workers must call it."""
    share_corrections(state)
    share_rejected(state)
    for total in (state.loss_sum, state.counts):
        state.world.sum(total)
        if not state.world.first:
            total.zero_()
    device = state.world.device
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    generators = state.world.gather_objects([generator.numpy().tobytes() for generator in states])
    if not state.world.first:
        return None
    moments = state.optimizer.state_dict()["state"]
    tensors = {
        "weights": dict(state.model.state_dict()),
        "optimizer": {f"{index}.{key}": value for index, slot in moments.items() for key, value in slot.items()},
        "progress": {
            "overlay": torch.from_numpy(state.overlay.codes),
            "loss_sum": state.loss_sum,
            "counts": state.counts,
            **{f"rejected.{name}": torch.from_numpy(array) for name, array in state.rejected.arrays().items()},
            **{
                f"generator.{rank}.{index}": torch.frombuffer(bytearray(content), dtype=torch.uint8)
                for rank, contents in enumerate(generators)
                for index, content in enumerate(contents)
            },
        },
    }
    if state.ema_model is not None:
        tensors["ema"] = dict(state.ema_model.state_dict())
    if state.loss_state is not None:
        tensors["loss_state"] = state.loss_state.tensors()
    facts = {
        "settings": flatten(state.settings),
        "num_classes": state.num_classes,
        "epoch": state.epoch,
        "step": state.step,
        "optimizer_step": state.optimizer_step,
        "scaler": state.scaler.state_dict(),
        "history": state.history,
        "best": state.best,
        "workers": state.world.size,
        "data": state.data_digests,
    }
    return Checkpoint(tensors, facts)


def load_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """Restore the state of `checkpoint`. Raises SettingsError if only one of the two has a state of the loss."""
    facts, tensors = checkpoint.facts, checkpoint.tensors
    if (state.loss_state is not None) != ("loss_state" in tensors):
        before, now = ("without", "with") if state.loss_state is not None else ("with", "without")
        raise SettingsError(
            f"the run was started {before} loss.p_asl.prior_file and is resumed {now} it: set it as before (another "
            "path of the same file is allowed), or set another run.name"
        )
    enter_epoch(state, facts["epoch"])
    state.model.load_state_dict(tensors["weights"])
    if state.ema_model is not None:
        state.ema_model.load_state_dict(tensors["ema"])
    _load_optimizer(state.optimizer, tensors["optimizer"])
    progress = tensors["progress"]
    state.overlay = LabelOverlay(state.num_classes, progress["overlay"].numpy())
    if state.loss_state is not None:
        state.loss_state.load(tensors["loss_state"])
    if state.world.first:
        state.loss_sum.copy_(progress["loss_sum"])
        state.counts.copy_(progress["counts"])
        state.rejected.add(*(progress[f"rejected.{name}"].numpy() for name in ("codes", "logits", "by_class")))
    cpu, cuda = (progress.get(f"generator.{state.world.rank}.{index}") for index in range(2))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and state.world.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, state.world.device)
    state.scaler.load_state_dict(facts["scaler"])
    state.step, state.optimizer_step = facts["step"], facts["optimizer_step"]
    state.history, state.best = facts["history"], facts["best"]


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the moments, with the memory layout that the optimizer itself would give them."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, slot in optimizer.state.items():
        for key, value in slot.items():
            if value.shape == parameter.shape:
                slot[key] = torch.empty_like(parameter).copy_(value)
