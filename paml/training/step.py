"""The algorithm on one screen: batch → maps → boost → logits → loss per label → rejection → reduce → backward."""

import contextlib

import numpy as np
import torch

from paml.data.device import DeviceBatch, move, to_device
from paml.data.loader import Batch
from paml.errors import NonFiniteLossError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, BatchContext, partial_label_loss, rejects_in
from paml.training.optimizer import set_learning_rate, update_ema
from paml.training.rejected import StepRejections, find_rejections
from paml.training.state import TrainState


def train_step(state: TrainState, batch: Batch, *, last: bool) -> None:
    """Train on one global batch. The optimizer steps after every `grad_accum_steps`, and after the `last` of an epoch.

    Large-loss rejection (Kim et al., CVPR 2022) on the logits of boosted maps (Kim et al., CVPR 2023). All workers
    divide by B·K of a full global batch, so an image counts the same in a short last batch as in any other.
    Raises NonFiniteLossError: on a CPU before the optimizer step, on a GPU one step later, to avoid waiting for it.
    """
    settings, world = state.settings, state.world
    is_optimizer_step = last or (state.step + 1) % settings.grad_accum_steps == 0
    data = to_device(batch, state.num_classes, state.normalize, world.device)
    divisor = settings.batch_size * state.num_classes * settings.grad_accum_steps
    context = BatchContext(
        epoch=state.loss_epoch,
        num_epochs=settings.epochs,
        slots_B=data.slots_B,
        batch_size=settings.batch_size,
        world=world.group,
        divisor=divisor,
    )

    no_sync = getattr(state.network, "no_sync", contextlib.nullcontext)  # skips DDP's gradient exchange
    with contextlib.nullcontext() if is_optimizer_step else no_sync():
        with torch.autocast(world.device.type, state.autocast, enabled=state.autocast is not None):
            ema_logits_BK = _ema_forward(state, data.images_BCHW)
            logits_BK = _forward(state, data.images_BCHW)
        out = partial_label_loss(
            logits_BK,
            data.state_BK,
            settings.loss,
            context,
            loss_state=None if state.loss_state is None else state.loss_state.read(batch.index, data.state_BK),
            select_logits_BK=ema_logits_BK,
        )
        select_logits_BK = logits_BK if ema_logits_BK is None else ema_logits_BK
        _accumulate_metrics(state, batch, data, out.loss.detach() * divisor, out.rejected_BK, select_logits_BK)
        state.scaler.scale(out.loss * world.size).backward()  # DDP averages gradients; the loss is a sum over workers

    learning_rate = state.learning_rate
    if state.loss_state is not None:
        head_rate = learning_rate * state.phase.optimizer.head_lr_multiplier
        state.loss_state.update(
            batch.index, data.slots_B, settings.batch_size, logits_BK.detach(), data.state_BK, head_rate
        )
    state.step += 1
    if is_optimizer_step:
        set_learning_rate(state.optimizer, learning_rate)
        if settings.optimizer.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.optimizer.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.optimizer_step += 1
        if state.ema_model is not None:
            update_ema(state.ema_model, state.model, settings.optimizer.ema_decay)


def _forward(state: TrainState, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Logits [B, K]. A worker without images joins all collectives with blank images, whose logits are dropped."""
    alpha = state.settings.boost.train
    if len(images_BCHW) or state.settings.model.batch_norm == "sync":  # SyncBatchNorm accepts an empty part
        return state.network(images_BCHW, alpha)
    blank = images_BCHW.new_zeros((2, *images_BCHW.shape[1:]))
    return state.network(blank, alpha)[:0]


@torch.no_grad()
def _ema_forward(state: TrainState, images_BCHW: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, K] of the EMA weights if they select labels in this epoch."""
    loss, ema_model = state.settings.loss, state.ema_model
    if ema_model is None or loss.reject_by == "model" or not rejects_in(loss, state.loss_epoch):
        return None
    state.world.broadcast_buffers(ema_model)  # BatchNorm statistics differ, and a checkpoint has the first worker's
    if not len(images_BCHW):
        return images_BCHW.new_zeros((0, state.num_classes))
    return ema_model(images_BCHW, state.settings.boost.train)


def _accumulate_metrics(
    state: TrainState,
    batch: Batch,
    data: DeviceBatch,
    loss: torch.Tensor,
    rejected_BK: torch.Tensor | None,
    select_logits_BK: torch.Tensor,
) -> None:
    """Add the step to the epoch's metrics on the device, and check that the loss is finite without waiting for a GPU.

    select_logits_BK: logits that the rejection was based on.
    """
    zero, rejections = state.counts.new_zeros(()), None
    unobserved_BK = data.state_BK == UNOBSERVED
    false_BK = None if data.truth_BK is None else unobserved_BK & (data.truth_BK == POSITIVE)
    if rejected_BK is None:
        rejected_BK = torch.zeros_like(data.state_BK, dtype=torch.bool)
    else:
        index_B = move(torch.from_numpy(batch.index), state.world.device)
        rejections = find_rejections(select_logits_BK, rejected_BK, false_BK, index_B, state.rejected.salt)
    probe = [data.probe_BK == POSITIVE, data.probe_BK == NEGATIVE]
    rejected_or_corrected_BK = rejected_BK | (data.state_BK == POSITIVE)  # LL-Cp's corrections of hidden labels
    state.loss_sum += loss
    state.counts += torch.stack(
        [
            zero + len(batch),
            unobserved_BK.sum(),
            rejected_BK.sum(),
            zero if false_BK is None else false_BK.sum(),
            zero if false_BK is None else (false_BK & rejected_BK).sum(),
            *(n for hidden_BK in probe for n in (hidden_BK.sum(), (hidden_BK & rejected_or_corrected_BK).sum())),
            zero + len(batch.bad),
        ]
    )
    corrected_BK = rejected_BK if LOSSES[state.settings.loss.name].corrects else None
    results = (torch.isfinite(loss), corrected_BK, *(rejections or ()))
    if state.world.device.type == "cpu":
        _check_and_record(state, batch, *results)
        return
    flush_pending(state)
    copies = [None if result is None else result.to("cpu", non_blocking=True) for result in results]
    event = torch.cuda.Event()
    event.record()
    state.pending.append((batch, copies, event))


def flush_pending(state: TrainState) -> None:
    """Record the results of the previous step once they have been copied from the GPU."""
    while state.pending:
        batch, copies, event = state.pending.pop()
        event.synchronize()
        _check_and_record(state, batch, *copies)


def _check_and_record(
    state: TrainState, batch: Batch, finite: torch.Tensor, corrected_BK: torch.Tensor | None, *rejections: torch.Tensor
) -> None:
    if not bool(finite):
        raise NonFiniteLossError(
            f"the loss of step {batch.step} in epoch {state.epoch} is not finite on worker {state.world.rank}, for "
            f"the images {', '.join(batch.keys())}: lower optimizer.learning_rate, set optimizer.clip_norm, or set "
            "precision to bf16 instead of fp16"
        )
    if corrected_BK is not None:
        image, cls = np.nonzero(corrected_BK.numpy())
        state.new_corrections.append(state.overlay.encode(batch.index[image], cls))
    if rejections:
        state.rejected.add_step(StepRejections(*rejections), batch.index)
