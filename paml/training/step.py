"""The algorithm on one screen: batch → maps → boost → logits → loss per label → rejection → reduce → backward."""

import contextlib

import numpy as np
import torch

from paml.data.device import DeviceBatch, move, to_device
from paml.data.loader import Batch
from paml.errors import NonFiniteLossError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import partial_label_loss, rejects_in
from paml.training.optimiser import average_into, set_rate
from paml.training.rejected import Found, add_found, find_rejected
from paml.training.state import TrainState


def train_step(state: TrainState, batch: Batch, *, last: bool) -> None:
    """One global batch; the optimiser moves after every `accumulate` of them and after the epoch's `last`.

    Large-loss rejection (Kim et al., CVPR 2022) on the logits of boosted maps (Kim et al., CVPR 2023). Every
    worker divides by B·K of the full global batch, so a short last batch weighs no more an image than others.
    Raises NonFiniteLossError: on a CPU before the weights move, on a GPU a step later, without waiting for it.
    """
    settings, world = state.settings, state.world
    moves = last or (state.step + 1) % settings.accumulate == 0
    data = to_device(batch, state.num_classes, state.normalise, world.device)
    divisor = settings.batch_size * state.num_classes * settings.accumulate

    with contextlib.nullcontext() if moves else _no_sync(state):
        with torch.autocast(world.device.type, state.autocast, enabled=state.autocast is not None):
            select_logits_BK = _averaged_forward(state, data.images_BCHW)
            logits_BK = _forward(state, data.images_BCHW)
        out = partial_label_loss(
            logits_BK,
            data.state_BK,
            settings=settings.loss,
            epoch=state.loss_epoch,
            divisor=divisor,
            world=world.group,
            slots_B=data.slots_B,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            recalled=None if state.memory is None else state.memory.recall(batch.index, data.state_BK),
            select_logits_BK=select_logits_BK,
        )
        chosen_by_BK = logits_BK if select_logits_BK is None else select_logits_BK
        _note(state, batch, data, out.loss.detach() * divisor, out.rejected_BK, chosen_by_BK)
        state.scaler.scale(out.loss * world.size).backward()  # DDP averages; the loss is a sum over workers

    rate = state.learning_rate
    if state.memory is not None:
        head_rate = rate * state.phase.optimiser.head_factor
        state.memory.learn(batch.index, data.slots_B, logits_BK.detach(), data.state_BK, head_rate)
    state.step += 1
    if moves:
        set_rate(state.optimiser, rate)
        if settings.optimiser.clip_norm is not None:
            state.scaler.unscale_(state.optimiser)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.optimiser.clip_norm)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        state.optimiser.zero_grad()
        state.optimiser_step += 1
        if state.averaged is not None:
            average_into(state.averaged, state.model, settings.optimiser.average)


def _no_sync(state: TrainState) -> contextlib.AbstractContextManager:
    no_sync = getattr(state.network, "no_sync", contextlib.nullcontext)
    return no_sync()


def _forward(state: TrainState, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Logits [B, K]. A worker without images still takes part in every collective, by a picture that counts nothing."""
    alpha = state.settings.boost.train_in(state.loss_epoch)
    if len(images_BCHW) or state.settings.model.batch_norm == "sync":  # SyncBatchNorm leaves an empty part out
        return state.network(images_BCHW, alpha)
    blank = images_BCHW.new_zeros((2, *images_BCHW.shape[1:]))
    return state.network(blank, alpha)[:0]


@torch.no_grad()
def _averaged_forward(state: TrainState, images_BCHW: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, K] of the averaged weights, where they are the ones that choose labels in this epoch."""
    loss, averaged = state.settings.loss, state.averaged
    if averaged is None or loss.reject_by == "model" or not rejects_in(loss, state.loss_epoch):
        return None
    state.world.broadcast_buffers(averaged)  # BatchNorm's differ between workers, and a checkpoint keeps the first's
    if not len(images_BCHW):
        return images_BCHW.new_zeros((0, state.num_classes))
    return averaged(images_BCHW, state.settings.boost.train_in(state.loss_epoch))


def _note(
    state: TrainState,
    batch: Batch,
    data: DeviceBatch,
    loss: torch.Tensor,
    rejected_BK: torch.Tensor | None,
    logits_BK: torch.Tensor,
) -> None:
    """Add the step's figures to the epoch's, on the device; check the loss as soon as that costs no waiting.

    logits_BK: those by which labels are rejected.
    """
    zero, found = state.counts.new_zeros(()), None
    unobserved_BK = data.state_BK == UNOBSERVED
    false_BK = None if data.truth_BK is None else unobserved_BK & (data.truth_BK == POSITIVE)
    if rejected_BK is None:
        rejected_BK = torch.zeros_like(data.state_BK, dtype=torch.bool)
    else:
        index_B = move(torch.from_numpy(batch.index), state.world.device)
        found = find_rejected(logits_BK, rejected_BK, false_BK, index_B, state.rejected.salt)
    probe = [data.probe_BK == POSITIVE, data.probe_BK == NEGATIVE]
    taken_BK = rejected_BK | (data.state_BK == POSITIVE)  # a hidden label is positive once LL-Cp has corrected it
    state.loss_sum += loss
    state.counts += torch.stack(
        [
            zero + len(batch),
            unobserved_BK.sum(),
            rejected_BK.sum(),
            zero if false_BK is None else false_BK.sum(),
            zero if false_BK is None else (false_BK & rejected_BK).sum(),
            *(count for hidden_BK in probe for count in (hidden_BK.sum(), (hidden_BK & taken_BK).sum())),
            zero + len(batch.bad),
        ]
    )
    finite = torch.isfinite(loss)
    corrected_BK = rejected_BK if state.settings.loss.name == "ll-cp" else None
    if state.world.device.type == "cpu":
        _settle(state, batch, finite, corrected_BK, *(found or ()))
        return
    settle_waiting(state)
    copies = [None if t is None else t.to("cpu", non_blocking=True) for t in (finite, corrected_BK, *(found or ()))]
    event = torch.cuda.Event()
    event.record()
    state.waiting.append((batch, copies, event))


def settle_waiting(state: TrainState) -> None:
    """Read what the step before has sent from the GPU."""
    while state.waiting:
        batch, copies, event = state.waiting.pop()
        event.synchronize()
        _settle(state, batch, *copies)


def _settle(
    state: TrainState, batch: Batch, finite: torch.Tensor, corrected_BK: torch.Tensor | None, *found: torch.Tensor
) -> None:
    if not bool(finite):
        raise NonFiniteLossError(
            f"the loss of step {batch.step} in epoch {state.epoch} is not finite on worker {state.world.rank}, on "
            f"the images {', '.join(batch.keys())}. Lower optimiser.learning_rate, set optimiser.clip_norm, or take "
            "precision bf16 instead of fp16"
        )
    if corrected_BK is not None:
        image, cls = np.nonzero(corrected_BK.numpy())
        state.new_codes.append(state.overlay.encode(batch.index[image], cls))
    if found:
        add_found(state.rejected, Found(*found), batch.index)
