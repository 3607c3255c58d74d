"""Invariant 6: stopped anywhere and started again, a run ends with the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.errors import SettingsError
from paml.losses.em_apl import EMAPLSettings
from paml.losses.role import RoleSettings
from paml.training.checkpoint import Checkpoint, newest_checkpoint
from paml.training.loop import Left, train
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, key_of, prepare_tiny, tiny_settings, true_classes, write_states
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import finish, quiet, run, unbroken_and_resumed

EVERYTHING: dict[str, Any] = {
    "loss": {"name": "ll-cp"},
    "optimiser": {"average": 0.9, "schedule": "one_cycle", "learning_rate": 3e-3, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 1},
    "data": {"flip": 0.5},
    "epochs": 3,
    "batch_size": 16,
    "accumulate": 2,
}
"""BatchNorm training, averaged weights, one-cycle, LL-Cp, flips, accumulation: 3 epochs of 3 batches, 2 steps each."""
BATCHES = 3 * (3 + 1) + 1
"""Of training, validation and test, in the whole run."""


def newest(settings: TrainSettings) -> Checkpoint:
    found, faults = newest_checkpoint(f"{settings.run.storage}/{settings.run.name}")
    assert found is not None
    assert not faults
    return found


TIMES = {"train/images_per_second", "train/data_wait_share", "train/checkpoint_share"}


def assert_same_bits(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, value in tensors.items():
            assert value.dtype == other.tensors[group][name].dtype
            assert torch.equal(value, other.tensors[group][name]), f"{group}: {name}"
    for name, value in one.facts.items():
        if name == "history":
            for before, after in zip(value, other.facts[name], strict=True):
                timeless = [{k: v for k, v in x.items() if k not in TIMES} for x in (before, after)]
                np.testing.assert_equal(*timeless)
        elif name != "settings":
            assert value == other.facts[name], name


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("whole"), **EVERYTHING)
    assert run(settings) is not None
    found = newest(settings)
    assert found.facts["optimiser_step"] == 6
    assert len(found.tensors["progress"]["overlay"]) > 20
    assert found.tensors.keys() == {"weights", "averaged", "optimiser", "progress"}
    return found


@pytest.mark.parametrize("stop", range(BATCHES))
def test_a_run_stopped_at_any_batch_ends_with_the_same_bits(
    stop: int, unbroken: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(prepared, tmp_path, **EVERYTHING)
    assert run(settings, stop_at=stop) is None
    assert run(settings) is not None
    assert_same_bits(unbroken, newest(settings))


def test_a_run_stopped_at_every_batch_in_turn_ends_with_the_same_bits(
    unbroken: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    """Each attempt gets three batches further: accumulation makes the second of a pair the first that is kept."""
    settings = tiny_settings(prepared, tmp_path, **EVERYTHING)
    attempts = 1
    while run(settings, stop_at=3) is None:
        attempts += 1
        assert attempts < 12
    assert attempts > 3
    assert_same_bits(unbroken, newest(settings))


@pytest.mark.parametrize("asked", range(6))
def test_a_run_that_is_asked_to_leave_loses_nothing(
    asked: int, unbroken: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    """Two steps of the optimiser an epoch: it is asked after the first, and after the epoch."""
    settings = tiny_settings(prepared, tmp_path, **EVERYTHING)
    answers = iter([False] * asked + [True])
    with pytest.raises(Left):
        train(settings, World(), dataclasses.replace(quiet([]), leaving=lambda: next(answers)))
    assert newest(settings).facts["optimiser_step"] == asked + 1
    assert run(settings) is not None
    assert_same_bits(unbroken, newest(settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"every_steps": None}, "optimiser": {"name": "sgd", "schedule": "cosine"}},
        {"precision": "bf16", "optimiser": {"name": "adamw", "weight_decay": 0.01}, "loss": {"name": "ll-ct"}},
        {"precision": "fp16", "checkpoint": {"every_steps": 1}},
    ],
    ids=["sgd, epochs alone", "bf16", "fp16"],
)
def test_other_ways_to_train_go_on_with_the_same_bits(changes: dict, prepared: Path, tmp_path: Path) -> None:
    whole, broken = (
        tiny_settings(prepared, tmp_path / name, **({"batch_size": 16} | changes)) for name in ("whole", "broken")
    )
    assert run(whole) is not None
    assert run(broken, stop_at=6) is None
    assert run(broken) is not None
    assert_same_bits(newest(whole), newest(broken))
    scaler = newest(whole).facts["scaler"]
    assert bool(scaler) == (changes.get("precision") == "fp16")
    assert all(np.isfinite(figures["train/loss"]) for figures in newest(whole).facts["history"])


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "role", "role": RoleSettings(expected_positives=2.5, learning_rate_factor=100.0)},
        {"name": "em-apl", "em_apl": EMAPLSettings(first_epoch=1)},
    ],
    ids=lambda loss: loss["name"],
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_loss_remembers_is_in_the_checkpoint(loss: dict, workers: int, prepared: Path, tmp_path: Path) -> None:
    """Stopped within the first epoch, within the second, and while the second is scored; 3 epochs of 3 batches."""
    changes: dict[str, Any] = {"loss": loss, "checkpoint": {"every_steps": 1}, "batch_size": 16, "epochs": 3}
    whole, broken = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "broken"))
    stops = [2, 4, 2]
    if workers > 1:
        run_on_ranks(unbroken_and_resumed, workers, whole, broken, stops)
    else:
        assert run(whole) is not None
        for stop in stops:
            assert run(broken, stop_at=stop) is None
        assert run(broken) is not None
    remembered = newest(whole).tensors["memory"]
    assert remembered.keys() & {"estimate", "target"}
    for tensor in remembered.values():
        tensor.nan_to_num_(nan=7.0)  # which would differ from itself
    found = newest(broken)
    for tensor in found.tensors["memory"].values():
        tensor.nan_to_num_(nan=7.0)
    one = newest(whole)
    one.tensors["memory"].update(remembered)
    assert_same_bits(one, found)
    if loss["name"] == "em-apl":
        assert (remembered["target"] != 7).sum() > 100


BEYOND: dict[str, Any] = EVERYTHING | {
    "loss": {"name": "ll-r", "reject_within": "class", "reject_by": "averaged", "correct_after": 2},
    "epochs": 2,
    "accumulate": 1,
}


@pytest.mark.parametrize("workers", [1, 3, pytest.param(2, marks=pytest.mark.slow)])
def test_rejection_by_averaged_weights_goes_on_with_the_same_bits(workers: int, prepared: Path, tmp_path: Path) -> None:
    """Workers' BatchNorm statistics differ and a checkpoint holds the first's, so all must choose by the first's."""
    whole, broken = (tiny_settings(prepared, tmp_path / name, **BEYOND) for name in ("whole", "broken"))
    if workers > 1:
        run_on_ranks(unbroken_and_resumed, workers, whole, broken, [5])
    else:
        assert run(whole) is not None
        assert run(broken, stop_at=5) is None
        assert run(broken) is not None
    assert_same_bits(newest(whole), newest(broken))
    assert newest(whole).facts["history"][-1]["rejection/rejected"] > 10


@pytest.mark.slow
def test_a_network_with_random_depth_goes_on_with_the_same_draws(prepared: Path, tmp_path: Path) -> None:
    model = {"backbone": "efficientnet_b0", "feature_layer": None, "output_stride": 16}
    changes: dict[str, Any] = {"model": model, "checkpoint": {"every_steps": 1}, "batch_size": 16}
    whole, broken = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "broken"))
    assert run(whole) is not None
    torch.rand(7)  # another process has drawn otherwise
    assert run(broken, stop_at=2) is None
    torch.rand(5)
    assert run(broken) is not None
    assert_same_bits(newest(whole), newest(broken))


@pytest.mark.parametrize("workers", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_several_workers_go_on_with_the_same_bits(workers: int, prepared: Path, tmp_path: Path) -> None:
    """Three matter: from there on the order in which DDP adds up decides the bits."""
    changes = EVERYTHING | {"epochs": 2, "accumulate": 1}
    whole, broken = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "broken"))
    run_on_ranks(unbroken_and_resumed, workers, whole, broken, [5])
    found = newest(whole)
    assert found.facts["workers"] == workers
    assert_same_bits(found, newest(broken))


@pytest.mark.slow
def test_another_number_of_workers_goes_on_with_the_same_images(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, **(EVERYTHING | {"model": {"batch_norm": "frozen"}}))
    assert run(settings, stop_at=5) is None
    run_on_ranks(finish, 2, settings)
    history = newest(settings).facts["history"]
    assert [figures["epoch"] for figures in history] == [1, 2, 3]
    assert newest(settings).facts["workers"] == 2
    whole = tiny_settings(prepared, tmp_path / "whole", **(EVERYTHING | {"model": {"batch_norm": "frozen"}}))
    assert run(whole) is not None
    for one, other in zip(newest(whole).facts["history"], history, strict=True):
        assert one["rejection/rejected"] == other["rejection/rejected"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said_and_replaced(
    unbroken: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    from paml.training.loop import train
    from paml.training.world import World

    settings = tiny_settings(prepared, tmp_path, **(EVERYTHING | {"checkpoint": {"every_steps": 1, "keep": 2}}))
    assert run(settings, stop_at=6) is None
    folder = sorted((tmp_path / "tiny" / "checkpoints").iterdir())[-1]
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    said: list[str] = []
    train(settings, World(), quiet(said))
    assert any(line.startswith("passed over a checkpoint") and folder.name in line for line in said)
    assert any(line.startswith("going on at epoch 2, step 0 of 3") for line in said), said
    assert_same_bits(unbroken, newest(settings))


# What is refused


@pytest.fixture(scope="module")
def begun(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped within its second epoch."""
    storage = tmp_path_factory.mktemp("begun")
    assert run(tiny_settings(prepared, storage), stop_at=10) is None
    return storage


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"epochs": 5}, "epochs: 2 then, 5 now"),
        ({"boost": {"eval_also": (1.0,)}}, r"boost.eval_also: \[\] then, \[1.0\] now"),
        ({"loss": {"name": "an"}, "data": {"flip": 0.0}}, "data.flip: 0.5 then, 0.0 now; loss.name: 'll-r' then, 'an'"),
    ],
)
def test_other_settings_are_refused_by_name(changes: dict, named: str, begun: Path, prepared: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        run(tiny_settings(prepared, begun, **changes))


def relabelled(prepared: Path, root: Path, classes: int, flip: tuple[int, int] | None = None) -> Path:
    """The same shards with other tables."""
    root.mkdir()
    (root / "shards").symlink_to(prepared / "shards")
    for split, count in COUNTS.items():
        keys = [key_of(split, number) for number in range(count)]
        truth = np.zeros((count, classes), dtype=bool)
        truth[:, : len(CLASSES)] = [true_classes(split, number) for number in range(count)]
        if flip is not None and split == "train":
            truth[flip] ^= True
        write_states(root / "labels" / f"{split}.arrow", keys, truth, np.ones_like(truth))
    return root


def test_more_classes_in_the_table_than_in_the_head_are_refused(begun: Path, prepared: Path, tmp_path: Path) -> None:
    root = relabelled(prepared, tmp_path / "more", len(CLASSES) + 1)
    with pytest.raises(SettingsError, match="label table has 13 classes, the checkpoint's head has 12: train on"):
        run(tiny_settings(root, begun))


def test_other_labels_are_refused(begun: Path, prepared: Path, tmp_path: Path) -> None:
    root = relabelled(prepared, tmp_path / "other", len(CLASSES), flip=(3, 5))
    with pytest.raises(SettingsError, match=r"the training labels below data.root differ"):
        run(tiny_settings(root, begun))


def test_other_images_are_refused(begun: Path, tmp_path: Path) -> None:
    root = prepare_tiny(tmp_path / "other", counts=COUNTS | {"train": 45})
    with pytest.raises(SettingsError, match=r"the training images, training labels below data.root differ"):
        run(tiny_settings(root, begun))


def test_paths_workers_and_the_loader_may_differ(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path)
    assert run(settings, stop_at=10) is None
    moved = tmp_path / "moved"
    moved.symlink_to(prepared)
    changed = tiny_settings(
        moved, tmp_path, data={"decode_threads": 3, "prefetch": 1}, checkpoint={"keep": 7}, workers={"num_workers": 2}
    )
    assert run(changed) is not None
    assert newest(changed).facts["epoch"] == 3
