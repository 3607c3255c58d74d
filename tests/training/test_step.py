"""One step of training against a plain reference: golden losses, short batches, accumulation, clipping, what stays."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.data.decode import decode_rgb
from paml.data.plan import draw_flips
from paml.errors import SettingsError
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED
from paml.models.cam import set_training
from paml.training.data import open_data
from paml.training.state import TrainState
from paml.training.step import settle_waiting, train_step
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import batches_of, state_of

# At twice this rate training is chaotic: differences of rounding grow to 2e-5 within twenty steps.
ALPHA, STEP_OF_RATE, RATE, MOMENTUM = 5.0, 0.05, 0.01, 0.9


def begun(root: Path, **changes) -> tuple[TrainState, object]:
    settings = tiny_settings(root, root / "none", **({"model": {"batch_norm": "frozen"}} | changes))
    data = open_data(settings.data)
    state = state_of(settings, data, World())
    set_training(state.model, settings.model)
    return state, data


# The reference: large-loss rejection (Kim et al., CVPR 2022) with BoostLU (Kim et al., CVPR 2023), as one would read
# them aloud: float64, one label after the other, SGD by hand.


def reference_losses(state: TrainState, data, steps: int) -> list[float]:
    """Losses of LL-R + BoostLU over some steps, from the weights that `state` has."""
    model = copy.deepcopy(state.model).double()
    settings, train = state.settings, data.train
    reader_of = batch_reader(train)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        epoch += 1
        for batch in batches_of(state, data, epoch=epoch)[: steps - len(losses)]:
            images, labels = [], []
            mirrored = draw_flips(settings.seed, epoch, batch.index, settings.data.flip)
            for place, index in enumerate(batch.index):
                pixels = decode_rgb(reader_of.read(int(index))).astype(np.float64) / 255
                if mirrored[place]:
                    pixels = pixels[:, ::-1]
                images.append((pixels - settings.model.pixel_mean) / settings.model.pixel_std)
                row = train.table.rows_of([train.manifest.key(int(index))])
                found = train.table.lookup(row)
                labels.append(dict(zip(found.cls.tolist(), found.state.tolist(), strict=True)))
            maps = model.maps(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)))
            boosted = torch.maximum(maps, ALPHA * maps)
            logits = boosted.sum((2, 3)) / (maps.shape[2] * maps.shape[3])

            scores = logits.detach()
            unobserved = []
            for place, known in enumerate(labels):
                unobserved += [(place, cls) for cls in range(state.num_classes) if cls not in known]
            rate = STEP_OF_RATE * (epoch - 1)
            largest_first = sorted(unobserved, key=lambda pair: -float(scores[pair]))
            rejected = set(largest_first[: math.ceil(round(rate * len(unobserved), 9))])
            total = torch.zeros((), dtype=torch.float64)
            for place, known in enumerate(labels):
                for cls in range(state.num_classes):
                    if (place, cls) in rejected:
                        continue
                    probability = torch.sigmoid(logits[place, cls])
                    positive = known.get(cls) == POSITIVE
                    total = total - torch.log(probability if positive else 1 - probability)
            loss = total / (settings.batch_size * state.num_classes)
            losses.append(float(loss.detach()))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    momentum[name] = MOMENTUM * momentum[name] + weight.grad
                    rate_of_part = RATE * (10.0 if name.startswith("head") else 1.0)
                    weight -= rate_of_part * momentum[name]
    return losses


def batch_reader(split):
    from paml.shards import ShardReader

    return ShardReader(split.manifest)


def test_twenty_golden_losses_of_ll_r_with_boost(prepared: Path) -> None:
    state, data = begun(
        prepared,
        boost={"train": ALPHA},
        loss={"name": "ll-r", "reject_rate_step": STEP_OF_RATE},
        optimiser={"name": "sgd", "learning_rate": RATE, "momentum": MOMENTUM},
        data={"probe": 0.0},
        epochs=4,
    )
    wanted = reference_losses(state, data, 20)
    found: list[float] = []
    while len(found) < 20:
        for batch in batches_of(state, data, epoch=state.epoch)[: 20 - len(found)]:
            before = float(state.loss_sum)
            train_step(state, batch, last=state.step + 1 == state.steps_per_epoch)
            found.append((float(state.loss_sum) - before) / (8 * state.num_classes))
        state.epoch, state.step = state.epoch + 1, 0
    difference = max(abs(one - other) for one, other in zip(found, wanted, strict=True))
    assert difference < 1e-5
    assert wanted[-1] < 0.8 * wanted[0]
    assert int(state.counts[2]) > 50  # rejected
    print(f"golden losses differ by {difference:.1e} at most")


# Gradients, seen by a step of plain SGD at rate 1

PLAIN = {"name": "sgd", "learning_rate": 1.0, "head_factor": 1.0, "momentum": 0.0}


def steps_taken(state: TrainState, batches: list, *, last: bool = False) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for batch in batches:
        train_step(state, batch, last=last and batch is batches[-1])
    return {name: before[name] - p.detach() for name, p in state.model.named_parameters()}


def gradient_of_an(state: TrainState, batch, divisor: float) -> dict[str, torch.Tensor]:
    """Of the sum over all labels of AN's cross-entropy / divisor, by autograd alone."""
    model = copy.deepcopy(state.model)
    target = torch.zeros(len(batch), state.num_classes)
    positive = batch.labels.state == POSITIVE
    target[batch.labels.image[positive], batch.labels.cls[positive]] = 1
    logits = model(state.normalise(batch.images, batch.flips), state.settings.boost.train)
    (torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6)
    assert sum(float(value.square().sum()) for value in wanted.values()) > 1e-6


def test_a_short_last_batch_is_not_over_weighted(prepared: Path) -> None:
    state, data = begun(prepared, optimiser=PLAIN, loss={"name": "an"})
    last = batches_of(state, data, epoch=1)[-1]
    assert len(last) == 6
    wanted = gradient_of_an(state, last, 8 * state.num_classes)
    assert_close(steps_taken(state, [last], last=True), wanted)


def test_alpha_grows_by_epochs(prepared: Path) -> None:
    """A step's gradient is that with the epoch's own alpha: 1, 2, 3 and then 3 for good."""
    boost = {"train": 3.0, "schedule": "linear", "schedule_epochs": 2}
    found = {}
    for epoch, alpha in ((1, 1.0), (2, 2.0), (3, 3.0), (9, 3.0)):
        state, data = begun(prepared, optimiser=PLAIN, loss={"name": "an"}, boost=boost)
        constant, _ = begun(prepared, optimiser=PLAIN, loss={"name": "an"}, boost={"train": alpha})
        batch = batches_of(state, data, epoch=1)[0]
        state.epoch = epoch
        wanted = gradient_of_an(constant, batch, 8 * state.num_classes)
        found[alpha] = steps_taken(state, [batch])
        assert_close(found[alpha], wanted)
    assert (found[1.0]["head.bias"] - found[3.0]["head.bias"]).abs().max() > 1e-3


def test_accumulated_batches_make_one_step_of_their_mean(prepared: Path) -> None:
    state, data = begun(prepared, optimiser=PLAIN, loss={"name": "an"}, accumulate=2)
    pair = batches_of(state, data, epoch=1)[:2]
    parts = [gradient_of_an(state, batch, 2 * 8 * state.num_classes) for batch in pair]
    assert_close(steps_taken(state, pair), {name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert state.optimiser_step == 1


def test_what_is_left_over_at_the_end_of_an_epoch_still_moves_the_weights(prepared: Path) -> None:
    state, data = begun(prepared, optimiser=PLAIN, loss={"name": "an"}, accumulate=4)
    last = batches_of(state, data, epoch=1)[-1]
    wanted = gradient_of_an(state, last, 4 * 8 * state.num_classes)
    assert_close(steps_taken(state, [last], last=True), wanted)


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_the_gradient_is_clipped_to_a_norm(share: float, prepared: Path) -> None:
    state, data = begun(prepared, loss={"name": "an"})
    batch = batches_of(state, data, epoch=1)[0]
    wanted = gradient_of_an(state, batch, 8 * state.num_classes)
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in wanted.values()))
    state, _ = begun(prepared, loss={"name": "an"}, optimiser=PLAIN | {"clip_norm": share * norm})
    assert_close(steps_taken(state, [batch]), {name: min(1.0, share) * value for name, value in wanted.items()})


def test_frozen_parts_do_not_move_in_training(prepared: Path) -> None:
    state, data = begun(prepared, optimiser=PLAIN, model={"batch_norm": "worker", "frozen_layers": 2})
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    steps_taken(state, batches_of(state, data, epoch=1)[:1])
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in changed if name.startswith(("backbone.conv1.", "backbone.maxpool."))}
    assert {name for name in changed if name.startswith("backbone.stage2.") and "running_mean" in name}


def test_averaged_weights_are_a_float64_mean_of_those_passed(prepared: Path) -> None:
    state, data = begun(prepared, optimiser={"average": 0.8, "learning_rate": 1e-2})
    wanted = {name: p.detach().double().clone() for name, p in state.model.named_parameters()}
    for batch in batches_of(state, data, epoch=1):
        train_step(state, batch, last=False)
        for name, value in state.model.named_parameters():
            wanted[name] = 0.8 * wanted[name] + 0.2 * value.detach().double()
    assert state.averaged is not None
    for name, value in state.averaged.named_parameters():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_the_averaged_weights_choose_what_is_rejected(prepared: Path) -> None:
    """Of the same batch, boosted as in training and with BatchNorm at rest; they are changed in no other way."""
    state, data = begun(
        prepared,
        model={"batch_norm": "worker"},
        loss={"name": "ll-cp", "reject_by": "averaged", "reject_rate_step": 0.1},
        optimiser={"average": 0.5, "learning_rate": 1e-2},
        data={"probe": 0.0},
    )
    first, *batches = batches_of(state, data, epoch=2)
    train_step(state, first, last=False)  # the warm-up epoch still: the averaged weights are other ones from now on
    state.epoch = 2
    averaged, differing = state.averaged, 0
    assert averaged is not None
    for batch in batches:
        kept = copy.deepcopy(averaged)
        logits = averaged(state.normalise(batch.images, batch.flips), ALPHA).detach()
        of_model = copy.deepcopy(state.model)(state.normalise(batch.images, batch.flips), ALPHA).detach()
        unobserved = torch.ones_like(logits, dtype=torch.bool)
        unobserved[batch.labels.image, batch.labels.cls] = False
        k = math.ceil(int(unobserved.sum()) / 10)
        wanted, other = (x.masked_fill(~unobserved, -math.inf).flatten().topk(k).indices for x in (logits, of_model))
        differing += int((~torch.isin(wanted, other)).sum())
        train_step(state, batch, last=False)
        places = wanted.sort().values.numpy()
        image, cls = np.divmod(places, state.num_classes)
        np.testing.assert_array_equal(
            np.sort(state.new_codes[-1]), np.sort(state.overlay.encode(batch.index[image], cls))
        )
        for name, value in kept.named_parameters():
            mixed = value.detach().lerp(dict(state.model.named_parameters())[name].detach(), 0.5)
            torch.testing.assert_close(dict(averaged.named_parameters())[name].detach(), mixed)
    assert differing > 5


def test_rejection_by_averaged_weights_that_are_not_kept_is_refused(prepared: Path) -> None:
    with pytest.raises(SettingsError, match=r"reject_by is averaged, but optimiser.average is 0.*reject by model"):
        begun(prepared, loss={"reject_by": "averaged"})


def test_the_counts_of_a_step_equal_those_made_by_hand(prepared: Path) -> None:
    state, data = begun(prepared, data={"probe": 0.3, "train_truth": "labels/train-full.arrow"})
    state.epoch = 3
    batches = batches_of(state, data, epoch=3, probe=0.3)
    unobserved = false = hidden_positive = hidden_negative = rejected = 0
    for batch in batches:
        here = len(batch) * state.num_classes - len(batch.labels.image)
        unobserved += here
        rejected += math.ceil(here / 10)
        seen = set(zip(batch.labels.image.tolist(), batch.labels.cls.tolist(), strict=True))
        assert batch.truth is not None
        for image, cls, truth in zip(*(v.tolist() for v in vars(batch.truth).values()), strict=True):
            false += truth == POSITIVE and (image, cls) not in seen
        hidden_positive += int((batch.probe.state == POSITIVE).sum())
        hidden_negative += int((batch.probe.state == NEGATIVE).sum())
        train_step(state, batch, last=False)
    counts = state.counts.tolist()
    assert counts[:4] == [46, unobserved, rejected, false]
    assert 0 < counts[4] < min(rejected, false)
    assert (counts[5], counts[7], counts[9]) == (hidden_positive, hidden_negative, 0)
    assert 0 < counts[6] + counts[8] <= rejected
    assert min(hidden_positive, hidden_negative) > 5


def test_ll_cp_turns_what_it_rejects_into_positives_for_good(prepared: Path) -> None:
    state, data = begun(prepared, loss={"name": "ll-cp"}, data={"probe": 0.3})
    state.epoch = 2
    before = {}
    for batch in batches_of(state, data, epoch=2, probe=0.3):
        for image, cls, label in zip(*(v.tolist() for v in vars(batch.labels).values()), strict=True):
            before[int(batch.index[image]), cls] = label
        train_step(state, batch, last=False)
    rejected, probed = int(state.counts[2]), state.counts[[6, 8]].tolist()
    state.overlay.add(np.concatenate(state.new_codes))
    assert len(state.overlay) == rejected > 10
    corrected = {divmod(int(code), state.num_classes) for code in state.overlay.codes}
    assert not corrected & before.keys()
    after = {}
    state.counts.zero_()
    state.epoch = 3
    for batch in batches_of(state, data, epoch=3, probe=0.3):
        for image, cls, label in zip(*(v.tolist() for v in vars(batch.labels).values()), strict=True):
            after[int(batch.index[image]), cls] = label
        train_step(state, batch, last=False)
    assert after == before | dict.fromkeys(corrected, POSITIVE)
    assert int(state.counts[1]) == 46 * state.num_classes - len(after)
    assert all(later >= earlier for later, earlier in zip(state.counts[[6, 8]].tolist(), probed, strict=True))
    assert sum(probed) > 0


def test_sync_batch_norm_without_a_gpu_is_refused(prepared: Path) -> None:
    with pytest.raises(SettingsError, match="batch_norm is sync, which needs GPUs; take worker or frozen"):
        begun(prepared, model={"batch_norm": "sync"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", ["an", "ll-r", "ll-ct", "ll-cp", "role", "em-apl"])
def test_a_step_on_a_gpu_waits_for_nothing(loss: str, prepared: Path) -> None:
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
    settle_waiting(state)
    assert math.isfinite(float(state.loss_sum))
    assert (UNOBSERVED, int(state.counts[0])) == (-1, 46)
