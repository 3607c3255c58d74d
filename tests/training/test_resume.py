"""Invariant 6: a run that is interrupted anywhere and resumed ends with the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paml.errors import SettingsError
from paml.losses.role import RoleSettings
from paml.training.checkpoint import Checkpoint, newest_checkpoint
from paml.training.hooks import RunPreempted
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, key_of, prepare_tiny, tiny_settings, true_classes, write_states
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import finish, quiet, run, uninterrupted_and_resumed

FULL: dict[str, Any] = {
    "loss": {"name": "ll-cp"},
    "optimizer": {"ema_decay": 0.9, "schedule": "one_cycle", "learning_rate": 3e-3, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 1},
    "data": {"flip_prob": 0.5},
    "epochs": 3,
    "batch_size": 16,
    "grad_accum_steps": 2,
}
"""BatchNorm, EMA weights, one-cycle, LL-Cp, flips, accumulation: 3 epochs of 3 batches and 2 optimizer steps."""
BATCHES = 3 * (3 + 1) + 1
"""Batches of training, validation and test in the whole run."""


def newest(settings: TrainSettings) -> Checkpoint:
    checkpoint, problems = newest_checkpoint(settings.run.folder)
    assert checkpoint is not None
    assert not problems
    return checkpoint


TIMES = {"train/images_per_second", "train/data_wait_fraction", "train/checkpoint_fraction"}


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
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("whole"), **FULL)
    assert run(settings) is not None
    checkpoint = newest(settings)
    assert checkpoint.facts["optimizer_step"] == 6
    assert len(checkpoint.tensors["progress"]["overlay"]) > 20
    assert checkpoint.tensors.keys() == {"weights", "ema", "optimizer", "progress"}
    return checkpoint


@pytest.mark.parametrize("stop", range(BATCHES))
def test_a_run_interrupted_at_any_batch_ends_with_the_same_bits(
    stop: int, uninterrupted: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(prepared, tmp_path, **FULL)
    assert run(settings, stop_at=stop) is None
    assert run(settings) is not None
    assert_same_bits(uninterrupted, newest(settings))


def test_a_run_interrupted_many_times_ends_with_the_same_bits(
    uninterrupted: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    """Each attempt trains at most three batches; checkpoints are written after every second one."""
    settings = tiny_settings(prepared, tmp_path, **FULL)
    attempts = 1
    while run(settings, stop_at=3) is None:
        attempts += 1
        assert attempts < 12
    assert attempts > 3
    assert_same_bits(uninterrupted, newest(settings))


@pytest.mark.parametrize("steps", range(6))
def test_a_preempted_run_loses_no_step(steps: int, uninterrupted: Checkpoint, prepared: Path, tmp_path: Path) -> None:
    """An epoch has two optimizer steps; `should_stop` is called after the first, and after the epoch."""
    settings = tiny_settings(prepared, tmp_path, **FULL)
    answers = iter([False] * steps + [True])
    with pytest.raises(RunPreempted):
        train(settings, World(), dataclasses.replace(quiet([]), should_stop=lambda: next(answers)))
    assert newest(settings).facts["optimizer_step"] == steps + 1
    assert run(settings) is not None
    assert_same_bits(uninterrupted, newest(settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"every_steps": None}, "optimizer": {"name": "sgd", "schedule": "cosine"}},
        {"precision": "bf16", "optimizer": {"name": "adamw", "weight_decay": 0.01}, "loss": {"name": "ll-ct"}},
        {"precision": "fp16", "checkpoint": {"every_steps": 1}},
    ],
    ids=["sgd, epochs only", "bf16", "fp16"],
)
def test_other_settings_resume_with_the_same_bits(changes: dict, prepared: Path, tmp_path: Path) -> None:
    whole, resumed = (
        tiny_settings(prepared, tmp_path / name, **({"batch_size": 16} | changes)) for name in ("whole", "resumed")
    )
    assert run(whole) is not None
    assert run(resumed, stop_at=6) is None
    assert run(resumed) is not None
    assert_same_bits(newest(whole), newest(resumed))
    scaler = newest(whole).facts["scaler"]
    assert bool(scaler) == (changes.get("precision") == "fp16")
    assert all(np.isfinite(metrics["train/loss"]) for metrics in newest(whole).facts["history"])


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "role", "expected_positives": 2.5, "role": RoleSettings(lr_multiplier=100.0)},
        {"name": "em-apl", "warmup_epochs": 0},
    ],
    ids=lambda loss: loss["name"],
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_state_of_a_loss_is_in_the_checkpoint(loss: dict, workers: int, prepared: Path, tmp_path: Path) -> None:
    """Interrupted in the first epoch, in the second, and in its evaluation; 3 epochs of 3 batches."""
    changes: dict[str, Any] = {"loss": loss, "checkpoint": {"every_steps": 1}, "batch_size": 16, "epochs": 3}
    whole, resumed = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "resumed"))
    stops = [2, 4, 2]
    if workers > 1:
        run_on_ranks(uninterrupted_and_resumed, workers, whole, resumed, stops)
    else:
        assert run(whole) is not None
        for stop in stops:
            assert run(resumed, stop_at=stop) is None
        assert run(resumed) is not None
    loss_state = newest(whole).tensors["loss_state"]
    assert loss_state.keys() & {"estimate", "target"}
    for tensor in loss_state.values():
        tensor.nan_to_num_(nan=7.0)  # NaN is not equal to itself
    last = newest(resumed)
    for tensor in last.tensors["loss_state"].values():
        tensor.nan_to_num_(nan=7.0)
    one = newest(whole)
    one.tensors["loss_state"].update(loss_state)
    assert_same_bits(one, last)
    if loss["name"] == "em-apl":
        assert (loss_state["target"] != 7).sum() > 100


BY_EMA: dict[str, Any] = FULL | {
    "loss": {"name": "ll-r", "reject_by": "ema"},
    "epochs": 2,
    "grad_accum_steps": 1,
}


@pytest.mark.parametrize("workers", [1, 3, pytest.param(2, marks=pytest.mark.slow)])
def test_rejection_by_ema_resumes_with_the_same_bits(workers: int, prepared: Path, tmp_path: Path) -> None:
    """BatchNorm statistics differ between workers and a checkpoint has those of the first, so all must use them."""
    whole, resumed = (tiny_settings(prepared, tmp_path / name, **BY_EMA) for name in ("whole", "resumed"))
    if workers > 1:
        run_on_ranks(uninterrupted_and_resumed, workers, whole, resumed, [5])
    else:
        assert run(whole) is not None
        assert run(resumed, stop_at=5) is None
        assert run(resumed) is not None
    assert_same_bits(newest(whole), newest(resumed))
    assert newest(whole).facts["history"][-1]["rejection/rejected"] > 10


@pytest.mark.slow
def test_stochastic_depth_resumes_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    model = {"backbone": "efficientnet_b0", "feature_layer": None, "output_stride": 16}
    changes: dict[str, Any] = {"model": model, "checkpoint": {"every_steps": 1}, "batch_size": 16}
    whole, resumed = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "resumed"))
    assert run(whole) is not None
    torch.rand(7)  # change the state of the generator, as another process would
    assert run(resumed, stop_at=2) is None
    torch.rand(5)
    assert run(resumed) is not None
    assert_same_bits(newest(whole), newest(resumed))


@pytest.mark.parametrize("workers", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_several_workers_resume_with_the_same_bits(workers: int, prepared: Path, tmp_path: Path) -> None:
    """From three workers on, the order in which DDP sums affects the bits."""
    changes = FULL | {"epochs": 2, "grad_accum_steps": 1}
    whole, resumed = (tiny_settings(prepared, tmp_path / name, **changes) for name in ("whole", "resumed"))
    run_on_ranks(uninterrupted_and_resumed, workers, whole, resumed, [5])
    last = newest(whole)
    assert last.facts["workers"] == workers
    assert_same_bits(last, newest(resumed))


@pytest.mark.slow
def test_another_number_of_workers_resumes_with_the_same_images(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, **(FULL | {"model": {"batch_norm": "frozen"}}))
    assert run(settings, stop_at=5) is None
    run_on_ranks(finish, 2, settings)
    history = newest(settings).facts["history"]
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    assert newest(settings).facts["workers"] == 2
    whole = tiny_settings(prepared, tmp_path / "whole", **(FULL | {"model": {"batch_norm": "frozen"}}))
    assert run(whole) is not None
    for one, other in zip(newest(whole).facts["history"], history, strict=True):
        assert one["rejection/rejected"] == other["rejection/rejected"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)


def test_a_damaged_newest_checkpoint_is_skipped_reported_and_replaced(
    uninterrupted: Checkpoint, prepared: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(prepared, tmp_path, **(FULL | {"checkpoint": {"every_steps": 1, "keep": 2}}))
    assert run(settings, stop_at=6) is None
    folder = sorted((tmp_path / "tiny" / "checkpoints").iterdir())[-1]
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    lines: list[str] = []
    train(settings, World(), quiet(lines))
    assert any(line.startswith("skipped a damaged checkpoint") and folder.name in line for line in lines)
    assert any(line.startswith("resuming at epoch 2, step 0 of 3") for line in lines), lines
    assert_same_bits(uninterrupted, newest(settings))


# Refused resumes


@pytest.fixture(scope="module")
def started(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted in its second epoch."""
    storage = tmp_path_factory.mktemp("started")
    assert run(tiny_settings(prepared, storage), stop_at=10) is None
    return storage


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed: 3 before, 4 now"),
        ({"epochs": 5}, "epochs: 2 before, 5 now"),
        ({"boost": {"eval_also": (1.0,)}}, r"boost.eval_also: \[\] before, \[1.0\] now"),
        (
            {"loss": {"name": "an"}, "data": {"flip_prob": 0.0}},
            "data.flip_prob: 0.5 before, 0.0 now; loss.name: 'll-r' before, 'an'",
        ),
    ],
)
def test_changed_settings_are_refused_and_named(changes: dict, named: str, started: Path, prepared: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        run(tiny_settings(prepared, started, **changes))


def relabeled(prepared: Path, root: Path, classes: int, flip: tuple[int, int] | None = None) -> Path:
    """The same shards with other label tables."""
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


def test_another_number_of_classes_is_refused(started: Path, prepared: Path, tmp_path: Path) -> None:
    root = relabeled(prepared, tmp_path / "more", len(CLASSES) + 1)
    with pytest.raises(SettingsError, match=r"13 classes.* 12"):
        run(tiny_settings(root, started))


def test_changed_labels_are_refused(started: Path, prepared: Path, tmp_path: Path) -> None:
    root = relabeled(prepared, tmp_path / "other", len(CLASSES), flip=(3, 5))
    with pytest.raises(SettingsError, match=r"the training labels in data.root"):
        run(tiny_settings(root, started))


def test_changed_images_are_refused(started: Path, tmp_path: Path) -> None:
    root = prepare_tiny(tmp_path / "other", counts=COUNTS | {"train": 45})
    with pytest.raises(SettingsError, match=r"training images and the training labels in data.root"):
        run(tiny_settings(root, started))


def test_paths_workers_and_loader_settings_may_change(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path)
    assert run(settings, stop_at=10) is None
    moved = tmp_path / "moved"
    moved.symlink_to(prepared)
    changed = tiny_settings(
        moved, tmp_path, data={"decode_threads": 3}, checkpoint={"keep": 7}, workers={"num_workers": 2}
    )
    assert run(changed) is not None
    assert newest(changed).facts["epoch"] == 3
