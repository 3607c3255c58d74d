"""A reject rate that is not set is fitted to the data and stored in the run."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paml.errors import SettingsError
from paml.losses import LossSettings, check_reject_rate, fitted_step, reject_rate
from paml.runs.folder import settings_of_run
from paml.runs.train import train
from paml.training.data import open_data
from paml.training.loop import train as run_loop
from paml.training.reject_rate import rate_warning, with_reject_rate
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, key_of, tiny_settings, true_classes, write_states
from tests.helpers.runs import Interrupted, quiet, stop_after_epoch

UNSET = {"reject_rate_step": None}


def observed() -> np.ndarray:
    """bool [N, K]: the training labels that `prepare_tiny` observes."""
    truth = np.stack([true_classes("train", number) for number in range(COUNTS["train"])])
    seen = np.random.default_rng(5).random(truth.shape) < 1 / 3
    seen[np.arange(len(truth)), truth.argmax(1)] = True
    return seen


@given(
    name=st.sampled_from(["ll-r", "ll-ct", "ll-cp"]),
    epochs=st.integers(2, 60),
    num_classes=st.integers(20, 20_000),
    positives=st.floats(0.05, 9.0),
)
def test_as_many_labels_are_rejected_as_there_are_false_negatives(name, epochs, num_classes, positives):
    step = fitted_step(name, epochs=epochs, labels_per_image=num_classes, unobserved_positives_per_image=positives)
    settings = LossSettings(name=name, reject_rate_step=step)
    rates = [reject_rate(settings, epoch) for epoch in range(2, epochs + 1)]
    rejected = float(sum(rates) if name == "ll-cp" else sum(rates) / len(rates)) * num_classes
    assert 0.9 * positives < rejected <= positives * (1 + 1e-9)  # the step is rounded down to two digits
    expected: dict[str, Any] = {"labels_per_image": num_classes, "unobserved_positives_per_image": positives}
    assert check_reject_rate(settings, epochs=epochs, **expected) is None


def test_the_rate_is_at_most_one():
    assert fitted_step("ll-r", epochs=2, labels_per_image=1.0, unobserved_positives_per_image=3.0) == 1.0


def test_a_loss_that_rejects_at_a_rate_needs_one():
    with pytest.raises(ValueError, match="reject_rate_step"):
        reject_rate(LossSettings(), 2)
    assert reject_rate(LossSettings(name="splc"), 2) == reject_rate(LossSettings(name="an"), 2) == Fraction(0)


@pytest.mark.parametrize("reject_of", ["unobserved", "all"])
def test_the_step_is_fitted_to_validation_and_observed_training_labels(prepared: Path, tmp_path: Path, reject_of: str):
    lines: list[str] = []
    settings = tiny_settings(prepared, tmp_path, loss=UNSET | {"reject_of": reject_of}, epochs=5)
    fitted = with_reject_rate(settings, open_data(settings.data), lines.append)
    truth, seen = np.stack([true_classes("train", number) for number in range(COUNTS["train"])]), observed()
    present = np.mean([true_classes("validation", number).sum() for number in range(COUNTS["validation"])])
    expected = present - (truth & seen).sum(1).mean()
    labels = len(CLASSES) - (seen.sum(1).mean() if reject_of == "unobserved" else 0)
    step = fitted.loss.reject_rate_step
    assert step is not None
    assert step <= 2 * expected / labels / 5 < 1.1 * step
    assert rate_warning(fitted, open_data(settings.data)) is None
    (line,) = lines
    assert f"loss.reject_rate_step is {step:g}" in line
    assert f"{expected:.3g} labels" in line
    assert f"{present:.3g} in validation" in line


def test_images_without_labels_do_not_count(prepared: Path, tmp_path: Path):
    """Public label lists contain millions of images without labels; training skips them."""
    root = shutil.copytree(prepared, tmp_path / "data")
    truth = np.stack([true_classes("train", number) for number in range(COUNTS["train"])])
    seen = observed()
    seen[::2] = False
    (root / "labels" / "train.arrow").unlink()
    write_states(root / "labels" / "train.arrow", [key_of("train", n) for n in range(len(truth))], truth, seen)
    lines: list[str] = []
    settings = tiny_settings(root, tmp_path, loss=UNSET)
    with_reject_rate(settings, open_data(settings.data), lines.append)
    assert f"{(truth & seen)[1::2].sum(1).mean():.3g} observed" in lines[0]


def test_full_labels_of_training_images_are_not_used(prepared: Path, tmp_path: Path):
    """They are for evaluation only; in practice they do not exist."""
    without, with_truth = (
        with_reject_rate(settings, open_data(settings.data), lambda line: None).loss.reject_rate_step
        for settings in (
            tiny_settings(prepared, tmp_path, loss=UNSET, data=data)
            for data in ({}, {"train_truth": "labels/train-full.arrow"})
        )
    )
    assert without == with_truth


@pytest.mark.parametrize("loss", [{"reject_rate_step": 0.03}, UNSET | {"name": "an"}, UNSET | {"name": "splc"}])
def test_a_step_that_is_set_or_not_needed_is_not_changed(prepared: Path, tmp_path: Path, loss: dict):
    settings = tiny_settings(prepared, tmp_path, loss=loss)
    assert with_reject_rate(settings, open_data(settings.data), pytest.fail) is settings


def test_the_fitted_step_is_stored_and_used_on_resume(prepared: Path, tmp_path: Path):
    lines: list[str] = []
    settings = tiny_settings(prepared, tmp_path, loss=UNSET)
    hooks = quiet(on_epoch_end=stop_after_epoch)
    with pytest.raises(Interrupted):
        train(settings, launch=lambda claimed: run_loop(claimed, World(), hooks), log=lines.append)
    step = settings_of_run(str(tmp_path / "tiny")).loss.reject_rate_step
    assert step is not None
    resumed = tiny_settings(prepared, tmp_path, loss=UNSET, run={"resume": True})
    train(resumed, log=lines.append)
    assert any(line.startswith("resuming at epoch 2") for line in lines)
    assert settings_of_run(str(tmp_path / "tiny")).loss.reject_rate_step == step


def test_validation_as_sparse_as_train_gives_a_guess_and_a_warning(prepared: Path, tmp_path: Path):
    root = shutil.copytree(prepared, tmp_path / "data")
    shutil.copy(root / "labels/train.arrow", root / "labels/validation.arrow")
    shutil.rmtree(root / "shards/validation")
    shutil.copytree(root / "shards/train", root / "shards/validation")
    settings = tiny_settings(root, tmp_path, loss=UNSET)
    lines: list[str] = []
    fitted = with_reject_rate(settings, open_data(settings.data), lines.append)
    assert (fitted.loss.reject_rate_step or 0) > 0
    assert [line.startswith("WARNING: loss.reject_rate_step") for line in lines] == [True]


def test_training_labels_without_a_gap_are_refused(prepared: Path, tmp_path: Path):
    root = shutil.copytree(prepared, tmp_path / "data")
    settings = tiny_settings(root, tmp_path, loss=UNSET, data={"train_labels": "labels/train-full.arrow"})
    with pytest.raises(SettingsError, match=r"loss.reject_rate_step.*nothing to reject"):
        train(settings, log=lambda line: None)
    assert not (tmp_path / "tiny" / "run.json").exists()
