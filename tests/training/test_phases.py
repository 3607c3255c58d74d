"""LinearInit: the head alone first, then end to end, as one run that may be stopped anywhere."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from paml.errors import DataError, SettingsError
from paml.models import build_model
from paml.training.checkpoint import Checkpoint, committed, read_checkpoint
from paml.training.loop import run_folder_of, train
from paml.training.optimiser import rate_at
from paml.training.phases import LinearInitSettings
from paml.training.score_run import choose_checkpoint
from paml.training.settings import TrainSettings, flatten, refuse_other_settings
from paml.training.world import World
from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import quiet, run, unbroken_and_resumed
from tests.training.test_resume import EVERYTHING, assert_same_bits, newest

TWO = {"epochs": 2, "learning_rate": 0.02}
BOTH = EVERYTHING | {"epochs": 2}
"""Four epochs of three batches, two steps each; with validation and test seventeen batches."""


def settings_of(root: Path, storage: Path, **changes: Any) -> TrainSettings:
    return dataclasses.replace(tiny_settings(root, storage, **changes), linear_init=LinearInitSettings(**TWO))


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, list[str]]:
    """A run to its end with every checkpoint kept, and what it said."""
    changes = BOTH | {"checkpoint": {"every_steps": 1, "keep": None}}
    settings = settings_of(prepared, tmp_path_factory.mktemp("whole"), **changes)
    train(settings, World(), quiet(said := []))
    return settings, said


def kept(settings: TrainSettings) -> list[Checkpoint]:
    folder = f"{settings.run.storage}/tiny"
    return [read_checkpoint(folder, name) for name in committed(folder)]


def moved(one: Checkpoint, other: Checkpoint, start: str) -> set[str]:
    """Names of the weights and statistics that differ."""
    first, second = one.tensors["weights"], other.tensors["weights"]
    return {name for name in first if name.startswith(start) and not torch.equal(first[name], second[name])}


def test_the_head_learns_alone_and_then_the_whole(whole) -> None:
    settings, said = whole
    checkpoints = kept(settings)
    assert [found.facts["optimiser_step"] for found in checkpoints] == list(range(1, 9))
    head_alone = [found for found in checkpoints if found.facts["optimiser_step"] <= 4]
    for before, after in itertools.pairwise(head_alone):
        assert not moved(before, after, "backbone.")
        assert moved(before, after, "head.") == {"head.weight", "head.bias"}
    drawn = build_model(settings.model, 12, seed=settings.seed).state_dict()
    loaded = Checkpoint({"weights": dict(drawn)}, {})
    assert not moved(loaded, head_alone[-1], "backbone.")
    changed = moved(head_alone[-1], checkpoints[4], "backbone.")
    assert any("running_mean" in name for name in changed)
    assert any(name.endswith(".weight") for name in changed)
    assert len([line for line in said if re.match(r"epoch [12]/4 \(head alone\)", line)]) == 2
    assert len([line for line in said if re.match(r"epoch [34]/4 ·", line)]) == 2


def test_a_phase_begins_with_a_fresh_optimiser(whole) -> None:
    """Moments of the head alone, none as the whole begins, then of all that learns."""
    settings, _ = whole
    moments = {found.facts["optimiser_step"]: len(found.tensors["optimiser"]) for found in kept(settings)}
    assert moments[3] == 2 * 3  # Adam keeps three of each parameter
    assert moments[4] == 0
    assert moments[5] > 100


def test_rejection_schedule_and_best_epoch_count_from_the_whole(prepared: Path, tmp_path: Path) -> None:
    optimiser = {"schedule": "cosine", "learning_rate": 3e-3}
    result = run(settings_of(prepared, tmp_path, epochs=3, optimiser=optimiser))
    assert result is not None
    assert [figures["epoch"] for figures in result.history] == [1, 2, 3, 4, 5]
    assert [figures["train/head_only"] for figures in result.history] == [1, 1, 0, 0, 0]
    assert [figures["rejection/rejected"] > 0 for figures in result.history] == [False, False, False, True, True]
    settings = tiny_settings(prepared, tmp_path, optimiser=optimiser).optimiser
    wanted = [0.02, 0.02, *(rate_at(settings, step, 18) for step in (5, 11, 17))]
    assert [figures["train/learning_rate"] for figures in result.history] == pytest.approx(wanted)
    assert all("val/map" in figures for figures in result.history)
    best = max(result.history[2:], key=lambda figures: figures["val/map"])
    assert result.best["5"]["epoch"] == best["epoch"]


@pytest.mark.parametrize("stop", [2, 3, 5, 7, 8, 11, 15])
def test_a_run_stopped_in_either_phase_ends_with_the_same_bits(
    stop: int, whole, prepared: Path, tmp_path: Path
) -> None:
    broken = settings_of(prepared, tmp_path, **BOTH)
    assert run(broken, stop_at=stop) is None
    assert run(broken) is not None
    assert_same_bits(newest(whole[0]), newest(broken))


def test_several_workers_go_from_phase_to_phase_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    changes = BOTH | {"accumulate": 1}
    full, broken = (settings_of(prepared, tmp_path / name, **changes) for name in ("whole", "broken"))
    run_on_ranks(unbroken_and_resumed, 3, full, broken, [3, 7])
    assert_same_bits(newest(full), newest(broken))


def test_it_goes_together_with_cached_features(prepared: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"train_from": "stage3"}, "data": {"features_dir": str(tmp_path / "features")}}
    result = run(settings_of(prepared, tmp_path, **changes))
    assert result is not None
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]


def test_there_is_no_best_checkpoint_while_the_head_learns_alone(prepared: Path, tmp_path: Path) -> None:
    settings = settings_of(prepared, tmp_path)
    train(settings, World(), quiet(), last_epoch=1)
    folder = run_folder_of(settings)
    with pytest.raises(DataError, match="no epoch trained end to end is over"):
        choose_checkpoint(folder, settings, "best", settings.boost.eval)
    assert choose_checkpoint(folder, settings, "newest", 1.0)[0] == committed(folder)[-1]


@pytest.mark.parametrize("changes", [{"epochs": -1}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"linear_init.epochs .* must be at least 0 \(0 is off\)"):
        LinearInitSettings(**changes)


def test_a_run_of_before_there_was_this_setting_may_be_resumed(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path)
    stored = {name: value for name, value in flatten(settings).items() if not name.startswith("linear_init")}
    refuse_other_settings(stored, settings)
    with pytest.raises(SettingsError, match=r"linear_init.epochs: 0 then, 2 now"):
        refuse_other_settings(stored, settings_of(prepared, tmp_path))
