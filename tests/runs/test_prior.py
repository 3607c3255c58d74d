"""Class priors estimated with one run and used in another."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.errors import SettingsError
from paml.losses.p_asl import PASLSettings
from paml.losses.prior import read_prior, write_prior
from paml.runs.evaluate import EvaluateSettings, evaluate
from paml.settings import flatten
from paml.training.checkpoint import newest_checkpoint
from paml.training.data import open_data
from paml.training.loop import train
from paml.training.settings import check_same_settings, with_absolute_paths
from paml.training.state import load_state
from paml.training.world import World
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.runs import Interrupted, batches_of, quiet, run, state_of, stop_after_epoch


def test_a_prior_is_estimated_by_one_run_and_used_by_another(prepared: Path, tmp_path: Path) -> None:
    first = tiny_settings(prepared, tmp_path, loss={"name": "p-asl-ignore"}, epochs=1)
    assert run(first) is not None
    (tmp_path / "tiny" / "run.json").write_text(json.dumps({"settings": flatten(first)}))
    out = str(tmp_path / "prior.csv")
    evaluate(EvaluateSettings(run=str(tmp_path / "tiny"), prior_out=out), log=lambda line: None)
    prior_K = read_prior(out, CLASSES)

    data = open_data(first.data)
    state = state_of(first, data, World())
    checkpoint, _ = newest_checkpoint(str(tmp_path / "tiny"))
    assert checkpoint is not None
    load_state(state, checkpoint)
    state.model.eval()
    batches = batches_of(state, data, epoch=1)
    with torch.no_grad():
        scores = [torch.sigmoid(state.model(state.normalize(batch.images), 5.0)) for batch in batches]
    np.testing.assert_allclose(prior_K, torch.cat(scores).mean(0).numpy(), rtol=1e-4)

    for threshold, left_out in ((0.0, True), (1.0, False)):
        p_asl = PASLSettings(top_k=0, prior_file=out, prior_threshold=threshold)
        loss = {"name": "p-asl-selective", "p_asl": p_asl}
        second = tiny_settings(prepared, tmp_path / f"{threshold}", loss=loss, epochs=1, data={"probe_fraction": 0.0})
        plain = tiny_settings(
            prepared,
            tmp_path / f"{threshold}-plain",
            loss={"name": "p-asl-ignore" if left_out else "p-asl-negative"},
            epochs=1,
            data={"probe_fraction": 0.0},
        )
        one, other = run(second), run(plain)
        assert one is not None
        assert other is not None
        assert one.history[0]["train/loss"] == pytest.approx(other.history[0]["train/loss"], rel=1e-6)


def test_the_prior_file_may_move_before_a_resume(prepared: Path, tmp_path: Path) -> None:
    loss = {"name": "p-asl-selective", "p_asl": PASLSettings(prior_file="prior.csv")}
    settings = tiny_settings(prepared, tmp_path, loss=loss)
    moved = with_absolute_paths(settings, "/base")
    assert moved.loss.p_asl.prior_file == "/base/prior.csv"
    check_same_settings(flatten(settings), moved)


@pytest.mark.parametrize("started_with", [True, False])
def test_priors_cannot_be_added_or_removed_on_resume(started_with: bool, prepared: Path, tmp_path: Path) -> None:
    write_prior(path := str(tmp_path / "prior.csv"), CLASSES, np.full(len(CLASSES), 0.5))
    with_it, without = (
        tiny_settings(prepared, tmp_path, loss={"name": "p-asl-selective", "p_asl": PASLSettings(prior_file=file)})
        for file in (path, None)
    )
    first, second = (with_it, without) if started_with else (without, with_it)
    with pytest.raises(Interrupted):
        train(first, World(), quiet(on_epoch_end=stop_after_epoch))
    with pytest.raises(SettingsError, match=r"loss\.p_asl\.prior_file"):
        train(second, World(), quiet())
