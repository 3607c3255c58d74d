"""A training step against a plain reference: golden losses, short batches, accumulation, clipping, frozen parts."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.data.augment import Augmentation
from paml.data.decode import decode_rgb
from paml.errors import SettingsError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED
from paml.models.cam import set_training
from paml.shards import ShardReader
from paml.training.data import open_data
from paml.training.state import COUNTS, TrainState
from paml.training.step import flush_pending, train_step
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import batches_of, state_of

# At twice this learning rate rounding errors grow to 2e-5 within 20 steps.
ALPHA, REJECT_RATE_STEP, LEARNING_RATE, MOMENTUM = 5.0, 0.05, 0.01, 0.9


def new_training(root: Path, **changes) -> tuple[TrainState, object]:
    settings = tiny_settings(root, root / "none", **({"model": {"batch_norm": "frozen"}} | changes))
    data = open_data(settings.data)
    state = state_of(settings, data, World())
    set_training(state.model, settings.model)
    return state, data


# The reference: large-loss rejection (Kim et al., CVPR 2022) with BoostLU (Kim et al., CVPR 2023): loops
# over labels in float64, and SGD by hand.


def reference_losses(state: TrainState, data, steps: int) -> list[float]:
    """Losses of LL-R + BoostLU in the first steps, from the weights of `state`."""
    model = copy.deepcopy(state.model).double()
    settings, train = state.settings, data.train
    reader = ShardReader(train.manifest)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        epoch += 1
        for batch in batches_of(state, data, epoch=epoch)[: steps - len(losses)]:
            images, labels = [], []
            mirrored = Augmentation(seed=settings.seed, epoch=epoch, flip_prob=settings.data.flip_prob).flips(
                batch.index
            )
            for position, index in enumerate(batch.index):
                pixels = decode_rgb(reader.read(int(index))).astype(np.float64) / 255
                if mirrored[position]:
                    pixels = pixels[:, ::-1]
                images.append((pixels - state.model.info.mean) / state.model.info.std)
                row = train.table.rows_of([train.manifest.key(int(index))])
                known = train.table.lookup(row)
                labels.append(dict(zip(known.cls.tolist(), known.state.tolist(), strict=True)))
            maps = model.maps(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)))
            boosted = torch.maximum(maps, ALPHA * maps)
            logits = boosted.sum((2, 3)) / (maps.shape[2] * maps.shape[3])

            scores = logits.detach()
            unobserved = []
            for image, known in enumerate(labels):
                unobserved += [(image, cls) for cls in range(state.num_classes) if cls not in known]
            rate = REJECT_RATE_STEP * (epoch - 1)
            largest_first = sorted(unobserved, key=lambda pair: -float(scores[pair]))
            rejected = set(largest_first[: math.ceil(round(rate * len(unobserved), 9))])
            total = torch.zeros((), dtype=torch.float64)
            for image, known in enumerate(labels):
                for cls in range(state.num_classes):
                    if (image, cls) in rejected:
                        continue
                    probability = torch.sigmoid(logits[image, cls])
                    positive = known.get(cls) == POSITIVE
                    total = total - torch.log(probability if positive else 1 - probability)
            loss = total / (settings.batch_size * state.num_classes)
            losses.append(float(loss.detach()))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    momentum[name] = MOMENTUM * momentum[name] + weight.grad
                    learning_rate = LEARNING_RATE * (10.0 if name.startswith("head") else 1.0)
                    weight -= learning_rate * momentum[name]
    return losses


def test_twenty_golden_losses_of_ll_r_with_boost(prepared: Path) -> None:
    state, data = new_training(
        prepared,
        boost={"train": ALPHA},
        loss={"name": "ll-r", "reject_rate_step": REJECT_RATE_STEP},
        optimizer={"name": "sgd", "learning_rate": LEARNING_RATE, "momentum": MOMENTUM},
        data={"probe_fraction": 0.0},
        epochs=4,
    )
    expected = reference_losses(state, data, 20)
    losses: list[float] = []
    while len(losses) < 20:
        for batch in batches_of(state, data, epoch=state.epoch)[: 20 - len(losses)]:
            before = float(state.loss_sum)
            train_step(state, batch, last=state.step + 1 == state.steps_per_epoch)
            losses.append((float(state.loss_sum) - before) / (8 * state.num_classes))
        state.epoch, state.step = state.epoch + 1, 0
    difference = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    assert difference < 1e-5
    assert expected[-1] < 0.8 * expected[0]
    assert int(state.counts[COUNTS.index("rejected")]) > 50


# Gradients, measured by a step of plain SGD with learning rate 1

PLAIN = {"name": "sgd", "learning_rate": 1.0, "head_lr_multiplier": 1.0, "momentum": 0.0}


def updates(state: TrainState, batches: list, *, last: bool = False) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for batch in batches:
        train_step(state, batch, last=last and batch is batches[-1])
    return {name: before[name] - p.detach() for name, p in state.model.named_parameters()}


def gradient_of_an(state: TrainState, batch, divisor: float) -> dict[str, torch.Tensor]:
    """The gradient of AN's cross-entropy, summed over all labels and divided by `divisor`."""
    model = copy.deepcopy(state.model)
    target = torch.zeros(len(batch), state.num_classes)
    positive = batch.labels.state == POSITIVE
    target[batch.labels.image[positive], batch.labels.cls[positive]] = 1
    logits = model(state.normalize(batch.images, batch.flips), state.settings.boost.train)
    (torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=2e-6)
    assert sum(float(value.square().sum()) for value in expected.values()) > 1e-6


def test_images_of_a_short_last_batch_have_the_same_weight(prepared: Path) -> None:
    state, data = new_training(prepared, optimizer=PLAIN, loss={"name": "an"})
    last = batches_of(state, data, epoch=1)[-1]
    assert len(last) == 6
    expected = gradient_of_an(state, last, 8 * state.num_classes)
    assert_close(updates(state, [last], last=True), expected)


def test_accumulated_batches_give_one_step_with_their_mean_gradient(prepared: Path) -> None:
    state, data = new_training(prepared, optimizer=PLAIN, loss={"name": "an"}, grad_accum_steps=2)
    pair = batches_of(state, data, epoch=1)[:2]
    parts = [gradient_of_an(state, batch, 2 * 8 * state.num_classes) for batch in pair]
    assert_close(updates(state, pair), {name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert state.optimizer_step == 1


def test_an_incomplete_accumulation_at_the_end_of_an_epoch_still_steps(prepared: Path) -> None:
    state, data = new_training(prepared, optimizer=PLAIN, loss={"name": "an"}, grad_accum_steps=4)
    last = batches_of(state, data, epoch=1)[-1]
    expected = gradient_of_an(state, last, 4 * 8 * state.num_classes)
    assert_close(updates(state, [last], last=True), expected)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_the_gradient_norm_is_clipped(factor: float, prepared: Path) -> None:
    state, data = new_training(prepared, loss={"name": "an"})
    batch = batches_of(state, data, epoch=1)[0]
    expected = gradient_of_an(state, batch, 8 * state.num_classes)
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in expected.values()))
    state, _ = new_training(prepared, loss={"name": "an"}, optimizer=PLAIN | {"clip_norm": factor * norm})
    assert_close(updates(state, [batch]), {name: min(1.0, factor) * value for name, value in expected.items()})


def test_frozen_layers_do_not_change(prepared: Path) -> None:
    state, data = new_training(prepared, optimizer=PLAIN, model={"batch_norm": "worker", "frozen_layers": 2})
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    updates(state, batches_of(state, data, epoch=1)[:1])
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in changed if name.startswith(("backbone.conv1.", "backbone.maxpool."))}
    assert {name for name in changed if name.startswith("backbone.stage2.") and "running_mean" in name}


def test_ema_weights_equal_a_float64_average(prepared: Path) -> None:
    state, data = new_training(prepared, optimizer={"ema_decay": 0.8, "learning_rate": 1e-2})
    expected = {name: p.detach().double().clone() for name, p in state.model.named_parameters()}
    for batch in batches_of(state, data, epoch=1):
        train_step(state, batch, last=False)
        for name, value in state.model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * value.detach().double()
    assert state.ema_model is not None
    for name, value in state.ema_model.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_ema_weights_select_the_rejected_labels(prepared: Path) -> None:
    """On the same batch, boosted as in training, in evaluation mode; the EMA weights change only by their update."""
    state, data = new_training(
        prepared,
        model={"batch_norm": "worker"},
        loss={"name": "ll-cp", "reject_by": "ema", "reject_rate_step": 0.1},
        optimizer={"ema_decay": 0.5, "learning_rate": 1e-2},
        data={"probe_fraction": 0.0},
    )
    first, *batches = batches_of(state, data, epoch=2)
    train_step(state, first, last=False)  # in the warm-up epoch; EMA weights and weights differ from now on
    state.epoch = 2
    ema_model, differing = state.ema_model, 0
    assert ema_model is not None
    for batch in batches:
        before = copy.deepcopy(ema_model)
        ema_logits = ema_model(state.normalize(batch.images, batch.flips), ALPHA).detach()
        logits = copy.deepcopy(state.model)(state.normalize(batch.images, batch.flips), ALPHA).detach()
        unobserved = torch.ones_like(ema_logits, dtype=torch.bool)
        unobserved[batch.labels.image, batch.labels.cls] = False
        k = math.ceil(int(unobserved.sum()) / 10)
        expected, other = (
            x.masked_fill(~unobserved, -math.inf).flatten().topk(k).indices for x in (ema_logits, logits)
        )
        differing += int((~torch.isin(expected, other)).sum())
        train_step(state, batch, last=False)
        image, cls = np.divmod(expected.sort().values.numpy(), state.num_classes)
        np.testing.assert_array_equal(
            np.sort(state.new_corrections[-1]), np.sort(state.overlay.encode(batch.index[image], cls))
        )
        for name, value in before.named_parameters():
            updated = value.detach().lerp(dict(state.model.named_parameters())[name].detach(), 0.5)
            torch.testing.assert_close(dict(ema_model.named_parameters())[name].detach(), updated)
    assert differing > 5


def test_rejection_by_ema_needs_ema_weights(prepared: Path) -> None:
    with pytest.raises(SettingsError, match=r"loss\.reject_by.*optimizer\.ema_decay is 0"):
        new_training(prepared, loss={"reject_by": "ema"})


def test_counts_equal_those_of_a_loop_over_labels(prepared: Path) -> None:
    state, data = new_training(prepared, data={"probe_fraction": 0.3, "train_truth": "labels/train-full.arrow"})
    state.epoch = 3
    batches = batches_of(state, data, epoch=3, probe=0.3)
    unobserved = false = hidden_positive = hidden_negative = rejected = 0
    for batch in batches:
        in_batch = len(batch) * state.num_classes - len(batch.labels.image)
        unobserved += in_batch
        rejected += math.ceil(in_batch / 10)
        seen = set(zip(batch.labels.image.tolist(), batch.labels.cls.tolist(), strict=True))
        assert batch.truth is not None
        for image, cls, truth in zip(*(v.tolist() for v in batch.truth), strict=True):
            false += truth == POSITIVE and (image, cls) not in seen
        hidden_positive += int((batch.probe.state == POSITIVE).sum())
        hidden_negative += int((batch.probe.state == NEGATIVE).sum())
        train_step(state, batch, last=False)
    counts = dict(zip(COUNTS, state.counts.tolist(), strict=True))
    assert (counts["images"], counts["bad_images"]) == (46, 0)
    assert (counts["unobserved"], counts["rejected"], counts["false_negatives"]) == (unobserved, rejected, false)
    assert 0 < counts["rejected_false_negatives"] < min(rejected, false)
    assert (counts["probe_positives"], counts["probe_negatives"]) == (hidden_positive, hidden_negative)
    assert 0 < counts["rejected_probe_positives"] + counts["rejected_probe_negatives"] <= rejected
    assert min(hidden_positive, hidden_negative) > 5


def test_ll_cp_corrects_rejected_labels_permanently(prepared: Path) -> None:
    state, data = new_training(prepared, loss={"name": "ll-cp"}, data={"probe_fraction": 0.3})
    state.epoch = 2
    before = {}
    for batch in batches_of(state, data, epoch=2, probe=0.3):
        for image, cls, label in zip(*(values.tolist() for values in batch.labels), strict=True):
            before[int(batch.index[image]), cls] = label
        train_step(state, batch, last=False)
    rejected, probed = int(state.counts[2]), state.counts[[6, 8]].tolist()
    state.overlay.add(np.concatenate(state.new_corrections))
    assert len(state.overlay) == rejected > 10
    corrected = {divmod(int(code), state.num_classes) for code in state.overlay.codes}
    assert not corrected & before.keys()
    after = {}
    state.counts.zero_()
    state.epoch = 3
    for batch in batches_of(state, data, epoch=3, probe=0.3):
        for image, cls, label in zip(*(values.tolist() for values in batch.labels), strict=True):
            after[int(batch.index[image]), cls] = label
        train_step(state, batch, last=False)
    assert after == before | dict.fromkeys(corrected, POSITIVE)
    assert int(state.counts[1]) == 46 * state.num_classes - len(after)
    assert all(later >= earlier for later, earlier in zip(state.counts[[6, 8]].tolist(), probed, strict=True))
    assert sum(probed) > 0


def test_sync_batch_norm_needs_a_gpu(prepared: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.batch_norm is sync"):
        new_training(prepared, model={"batch_norm": "sync"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", ["an", "ll-r", "ll-ct", "ll-cp", "role", "em-apl"])
def test_a_step_does_not_wait_for_the_gpu(loss: str, prepared: Path) -> None:
    device = torch.device("cuda", 0)
    settings = tiny_settings(prepared, prepared / "none", loss={"name": loss}, precision="bf16")
    data = open_data(settings.data)
    state = state_of(settings, data, World(device=device))
    set_training(state.model, settings.model)
    batches = batches_of(state, data, epoch=2)
    state.epoch = 2
    for batch in batches[:3]:
        train_step(state, batch, last=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[3:]:
            train_step(state, batch, last=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    flush_pending(state)
    assert math.isfinite(float(state.loss_sum))
    assert (UNOBSERVED, int(state.counts[0])) == (-1, 46)
