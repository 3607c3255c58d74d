"""LinearInit: first the head, then end to end, in one run that can be interrupted anywhere."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from paml.errors import DataError, SettingsError
from paml.models import build_model
from paml.runs.spec import choose_checkpoint
from paml.settings import flatten
from paml.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from paml.training.loop import train
from paml.training.optimizer import LinearInitSettings, learning_rate_at
from paml.training.settings import TrainSettings, check_same_settings
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import Interrupted, quiet, run, stop_after_epoch, uninterrupted_and_resumed
from tests.training.test_resume import FULL, assert_same_bits, newest

LINEAR_INIT = {"epochs": 2, "learning_rate": 0.02}
CHANGES = FULL | {"epochs": 2}
"""Four epochs of three batches and two steps; seventeen batches with validation and test."""


def settings_of(root: Path, storage: Path, **changes: Any) -> TrainSettings:
    return dataclasses.replace(tiny_settings(root, storage, **changes), linear_init=LinearInitSettings(**LINEAR_INIT))


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, list[str]]:
    """A complete run with all checkpoints, and its log lines."""
    changes = CHANGES | {"checkpoint": {"every_steps": 1, "keep": None}}
    settings = settings_of(prepared, tmp_path_factory.mktemp("uninterrupted"), **changes)
    train(settings, World(), quiet(lines := []))
    return settings, lines


def checkpoints_of(settings: TrainSettings) -> list[Checkpoint]:
    folder = settings.run.folder
    return [read_checkpoint(folder, name) for name in list_checkpoints(folder)]


def changed_weights(one: Checkpoint, other: Checkpoint, start: str) -> set[str]:
    """Names of the weights and statistics that differ."""
    first, second = one.tensors["weights"], other.tensors["weights"]
    return {name for name in first if name.startswith(start) and not torch.equal(first[name], second[name])}


def test_first_only_the_head_changes_and_then_all_weights(uninterrupted) -> None:
    settings, lines = uninterrupted
    checkpoints = checkpoints_of(settings)
    assert [checkpoint.facts["optimizer_step"] for checkpoint in checkpoints] == list(range(1, 9))
    head_only = [checkpoint for checkpoint in checkpoints if checkpoint.facts["optimizer_step"] <= 4]
    for before, after in itertools.pairwise(head_only):
        assert not changed_weights(before, after, "backbone.")
        assert changed_weights(before, after, "head.") == {"head.weight", "head.bias"}
    initial = build_model(settings.model, 12, seed=settings.seed).state_dict()
    assert not changed_weights(Checkpoint({"weights": dict(initial)}, {}), head_only[-1], "backbone.")
    changed = changed_weights(head_only[-1], checkpoints[4], "backbone.")
    assert any("running_mean" in name for name in changed)
    assert any(name.endswith(".weight") for name in changed)
    assert len([line for line in lines if re.match(r"epoch [12]/4 \(head only\)", line)]) == 2
    assert len([line for line in lines if re.match(r"epoch [34]/4 ·", line)]) == 2


def test_a_phase_starts_with_a_new_optimizer(uninterrupted) -> None:
    """The optimizer has moments of the head, then none, then moments of all trainable weights."""
    settings, _ = uninterrupted
    moments = {
        checkpoint.facts["optimizer_step"]: len(checkpoint.tensors["optimizer"])
        for checkpoint in checkpoints_of(settings)
    }
    assert moments[3] == 2 * 3  # Adam has three tensors per parameter
    assert moments[4] == 0
    assert moments[5] > 100


def test_rejection_schedule_and_best_epoch_start_with_end_to_end_training(prepared: Path, tmp_path: Path) -> None:
    optimizer = {"schedule": "cosine", "learning_rate": 3e-3}
    result = run(settings_of(prepared, tmp_path, epochs=3, optimizer=optimizer))
    assert result is not None
    assert [metrics["epoch"] for metrics in result.history] == [1, 2, 3, 4, 5]
    assert [metrics["train/head_only"] for metrics in result.history] == [1, 1, 0, 0, 0]
    assert [metrics["rejection/rejected"] > 0 for metrics in result.history] == [False, False, False, True, True]
    settings = tiny_settings(prepared, tmp_path, optimizer=optimizer).optimizer
    expected = [0.02, 0.02, *(learning_rate_at(settings, step, 18) for step in (5, 11, 17))]
    assert [metrics["train/learning_rate"] for metrics in result.history] == pytest.approx(expected)
    assert all("val/mAP" in metrics for metrics in result.history)
    best = max(result.history[2:], key=lambda metrics: metrics["val/mAP"])
    assert result.best["5"]["epoch"] == best["epoch"]


@pytest.mark.parametrize("stop", [2, 3, 5, 7, 8, 11, 15])
def test_a_run_interrupted_in_either_phase_ends_with_the_same_bits(
    stop: int, uninterrupted, prepared: Path, tmp_path: Path
) -> None:
    resumed = settings_of(prepared, tmp_path, **CHANGES)
    assert run(resumed, stop_at=stop) is None
    assert run(resumed) is not None
    assert_same_bits(newest(uninterrupted[0]), newest(resumed))


def test_several_workers_change_phases_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    changes = CHANGES | {"grad_accum_steps": 1}
    whole, resumed = (settings_of(prepared, tmp_path / name, **changes) for name in ("whole", "resumed"))
    run_on_ranks(uninterrupted_and_resumed, 3, whole, resumed, [3, 7])
    assert_same_bits(newest(whole), newest(resumed))


def test_linear_init_works_with_cached_features(prepared: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"train_from": "stage3"}, "data": {"features_dir": str(tmp_path / "features")}}
    result = run(settings_of(prepared, tmp_path, **changes))
    assert result is not None
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]


def test_there_is_no_best_checkpoint_before_end_to_end_training(prepared: Path, tmp_path: Path) -> None:
    settings = settings_of(prepared, tmp_path)
    with pytest.raises(Interrupted):
        train(settings, World(), quiet(on_epoch_end=stop_after_epoch))
    folder = settings.run.folder
    with pytest.raises(DataError, match="best"):
        choose_checkpoint(folder, settings, "best", settings.boost.eval)
    assert choose_checkpoint(folder, settings, "newest", 1.0)[0] == list_checkpoints(folder)[-1]


@pytest.mark.parametrize("changes", [{"epochs": -1}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"linear_init\.(epochs is -1|learning_rate is 0\.0)"):
        LinearInitSettings(**changes)


def test_a_setting_that_is_missing_in_a_stored_run_has_its_default(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path)
    stored = {name: value for name, value in flatten(settings).items() if not name.startswith("linear_init")}
    check_same_settings(stored, settings)
    with pytest.raises(SettingsError, match=r"linear_init.epochs: 0 before, 2 now"):
        check_same_settings(stored, settings_of(prepared, tmp_path))
