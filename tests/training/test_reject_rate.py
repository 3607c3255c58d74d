"""A reject rate that nobody has set is fitted to the data, and stands in the run's record from then on."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paml.distributed.run import train_run
from paml.errors import SettingsError
from paml.losses import LossSettings, check_reject_rate, fitted_step, reject_rate
from paml.training.data import open_data
from paml.training.reject_rate import rate_warning, with_reject_rate
from paml.training.score_run import settings_of_run
from tests.helpers.prepared import CLASSES, COUNTS, key_of, tiny_settings, true_classes, write_states

UNSET = {"reject_rate_step": None}


def observed() -> np.ndarray:
    """bool[N, K]: the training labels that `prepare_tiny` leaves, drawn as it draws them."""
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
def test_as_many_labels_are_rejected_on_average_as_there_are_false_negatives(name, epochs, num_classes, positives):
    step = fitted_step(name, epochs=epochs, labels_per_image=num_classes, unobserved_positives_per_image=positives)
    settings = LossSettings(name=name, reject_rate_step=step)
    rates = [reject_rate(settings, epoch) for epoch in range(2, epochs + 1)]
    rejected = float(sum(rates) if name == "ll-cp" else sum(rates) / len(rates)) * num_classes
    assert 0.9 * positives < rejected <= positives * (1 + 1e-9)  # a step of two digits, rounded down
    expected: dict[str, Any] = {"labels_per_image": num_classes, "unobserved_positives_per_image": positives}
    assert check_reject_rate(settings, epochs=epochs, **expected) is None


def test_no_rate_rejects_more_than_all():
    assert fitted_step("ll-r", epochs=2, labels_per_image=1.0, unobserved_positives_per_image=3.0) == 1.0


def test_a_loss_that_goes_by_a_rate_cannot_do_without():
    with pytest.raises(ValueError, match="ll-r needs a reject_rate_step: set it, or fit it"):
        reject_rate(LossSettings(), 2)
    assert reject_rate(LossSettings(name="splc"), 2) == reject_rate(LossSettings(name="an"), 2) == Fraction(0)


@pytest.mark.parametrize("reject_of", ["unobserved", "all"])
def test_it_is_fitted_to_what_validation_shows_and_training_observes(prepared: Path, tmp_path: Path, reject_of: str):
    said: list[str] = []
    settings = tiny_settings(prepared, tmp_path, loss=UNSET | {"reject_of": reject_of}, epochs=5)
    fitted = with_reject_rate(settings, open_data(settings.data), said.append)
    truth, seen = np.stack([true_classes("train", number) for number in range(COUNTS["train"])]), observed()
    shown = np.mean([true_classes("validation", number).sum() for number in range(COUNTS["validation"])])
    expected = shown - (truth & seen).sum(1).mean()
    labels = len(CLASSES) - (seen.sum(1).mean() if reject_of == "unobserved" else 0)
    step = fitted.loss.reject_rate_step
    assert step is not None
    assert step <= 2 * expected / labels / 5 < 1.1 * step
    assert rate_warning(fitted, open_data(settings.data)) is None
    (line,) = said
    assert line.startswith(f"loss.reject_rate_step {step:g}, fitted to the data: ")
    assert f"{expected:.3g} (validation shows {shown:.3g}, training observes" in line


def test_only_images_that_take_part_count(prepared: Path, tmp_path: Path):
    """Release lists name millions of images without any label; training leaves them out."""
    root = shutil.copytree(prepared, tmp_path / "data")
    truth = np.stack([true_classes("train", number) for number in range(COUNTS["train"])])
    seen = observed()
    seen[::2] = False
    (root / "labels" / "train.arrow").unlink()
    write_states(root / "labels" / "train.arrow", [key_of("train", n) for n in range(len(truth))], truth, seen)
    said: list[str] = []
    settings = tiny_settings(root, tmp_path, loss=UNSET)
    with_reject_rate(settings, open_data(settings.data), said.append)
    assert f"training observes {(truth & seen)[1::2].sum(1).mean():.3g})" in said[0]


def test_full_labels_of_the_training_images_have_no_say(prepared: Path, tmp_path: Path):
    """They are there to judge a run by: a rate that knew them would be a better one than anybody can have."""
    alone, known = (
        with_reject_rate(settings, open_data(settings.data), lambda line: None).loss.reject_rate_step
        for settings in (
            tiny_settings(prepared, tmp_path, loss=UNSET, data=data)
            for data in ({}, {"train_truth": "labels/train-full.arrow"})
        )
    )
    assert alone == known


@pytest.mark.parametrize("loss", [{"reject_rate_step": 0.03}, UNSET | {"name": "an"}, UNSET | {"name": "splc"}])
def test_one_that_is_set_or_not_needed_stays(prepared: Path, tmp_path: Path, loss: dict):
    settings = tiny_settings(prepared, tmp_path, loss=loss)
    assert with_reject_rate(settings, open_data(settings.data), pytest.fail) is settings


def test_a_run_records_it_and_goes_on_with_it(prepared: Path, tmp_path: Path):
    said: list[str] = []
    settings = tiny_settings(prepared, tmp_path, loss=UNSET, run={"system_seconds": 0})
    train_run(settings, say=said.append, last_epoch=1)
    step = settings_of_run(str(tmp_path / "tiny")).loss.reject_rate_step
    assert step is not None
    again = tiny_settings(prepared, tmp_path, loss=UNSET, run={"system_seconds": 0, "resume": True})
    train_run(again, say=said.append)
    assert any(line.startswith("going on at epoch 2") for line in said)
    assert settings_of_run(str(tmp_path / "tiny")).loss.reject_rate_step == step


def test_validation_that_shows_no_more_than_training_is_refused(prepared: Path, tmp_path: Path):
    root = shutil.copytree(prepared, tmp_path / "data")
    settings = tiny_settings(root, tmp_path, loss=UNSET, data={"train_labels": "labels/train-full.arrow"})
    with pytest.raises(SettingsError, match=r"loss.reject_rate_step is null, .* nothing to reject. Set it"):
        train_run(settings, say=lambda line: None)
    assert not (tmp_path / "tiny" / "run.json").exists()
