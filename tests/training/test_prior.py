"""A file of class priors from one run to another."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.errors import SettingsError
from paml.losses.p_asl import PASLSettings
from paml.losses.prior import read_prior, write_prior
from paml.training.checkpoint import newest_checkpoint
from paml.training.data import open_data
from paml.training.loop import train
from paml.training.prior import main
from paml.training.settings import at_absolute_paths, flatten, refuse_other_settings
from paml.training.state import load_state
from paml.training.world import World
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.runs import batches_of, quiet, run, state_of


def test_a_prior_is_estimated_by_one_run_and_used_by_another(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = tiny_settings(prepared, tmp_path, loss={"name": "p-asl-ignore"}, epochs=1)
    assert run(first) is not None
    (tmp_path / "tiny" / "run.json").write_text(json.dumps({"settings": flatten(first)}))
    out = str(tmp_path / "prior.csv")
    assert main(["--run", str(tmp_path / "tiny"), "--out", out]) == 0
    prior_K = read_prior(out, CLASSES)
    assert f"12 classes, {(prior_K > 0.05).sum()} of them with a prior above 0.05" in capsys.readouterr().out

    # The mean of sigmoid over the training images, one after the other, by the epoch's checkpoint.
    data = open_data(first.data)
    state = state_of(first, data, World())
    checkpoint, _ = newest_checkpoint(str(tmp_path / "tiny"))
    assert checkpoint is not None
    load_state(state, checkpoint)
    state.model.eval()
    batches = batches_of(state, data, epoch=1)
    with torch.no_grad():
        scores = [torch.sigmoid(state.model(state.normalise(batch.images), 5.0)) for batch in batches]
    np.testing.assert_allclose(prior_K, torch.cat(scores).mean(0).numpy(), rtol=1e-4)

    for threshold, left_out in ((0.0, True), (1.0, False)):
        p_asl = PASLSettings(top_k=0, prior_file=out, prior_threshold=threshold)
        loss = {"name": "p-asl-selective", "p_asl": p_asl}
        second = tiny_settings(prepared, tmp_path / f"{threshold}", loss=loss, epochs=1, data={"probe": 0.0})
        plain = tiny_settings(
            prepared,
            tmp_path / f"{threshold}-plain",
            loss={"name": "p-asl-ignore" if left_out else "p-asl-negative"},
            epochs=1,
            data={"probe": 0.0},
        )
        one, other = run(second), run(plain)
        assert one is not None
        assert other is not None
        assert one.history[0]["train/loss"] == pytest.approx(other.history[0]["train/loss"], rel=1e-6)


def test_the_file_of_priors_may_lie_elsewhere_when_a_run_goes_on(prepared: Path, tmp_path: Path) -> None:
    loss = {"name": "p-asl-selective", "p_asl": PASLSettings(prior_file="prior.csv")}
    settings = tiny_settings(prepared, tmp_path, loss=loss)
    moved = at_absolute_paths(settings, "/base")
    assert moved.loss.p_asl.prior_file == "/base/prior.csv"
    refuse_other_settings(flatten(settings), moved)


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_run_neither_gains_nor_loses_its_priors(begun_with: bool, prepared: Path, tmp_path: Path) -> None:
    write_prior(path := str(tmp_path / "prior.csv"), CLASSES, np.full(len(CLASSES), 0.5))
    with_it, without = (
        tiny_settings(prepared, tmp_path, loss={"name": "p-asl-selective", "p_asl": PASLSettings(prior_file=file)})
        for file in (path, None)
    )
    first, second = (with_it, without) if begun_with else (without, with_it)
    train(first, World(), quiet(), last_epoch=1)
    with pytest.raises(SettingsError, match=r"give loss\.p_asl\.prior_file as it was"):
        train(second, World(), quiet())


def test_a_prior_of_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "prior.csv")]) == 1
    assert "holds no run" in capsys.readouterr().err
