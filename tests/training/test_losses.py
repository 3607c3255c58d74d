"""The losses of the papers in runs: with and without boost, below zero, and on several workers."""

from pathlib import Path

import pytest

from paml.errors import SettingsError
from paml.losses.em import EMSettings
from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import run, trace_steps

QUICK = ("em", "splc", "role", "em-apl", "curriculum")
OTHERS = ("p-asl-selective", "wan", "an-ls", "epr", "asl", "p-asl-ignore", "p-asl-negative", "hill", "gr")


@pytest.mark.parametrize("loss", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_losses_train_with_and_without_boost(loss: str, prepared: Path, tmp_path: Path) -> None:
    for alpha in (5.0, 1.0) if loss not in QUICK else (5.0,):
        boost = {"train": alpha, "eval": alpha}
        # With this alpha the entropy outweighs everything else: the loss is negative, which is no error.
        changes = {"name": loss, "warmup_epochs": 0 if loss == "em-apl" else None}
        changes |= {"em": EMSettings(alpha=20.0)} if loss == "em" else {}
        settings = tiny_settings(
            prepared, tmp_path / f"{alpha}", loss=changes, boost=boost, data={"probe_fraction": 0.2}, epochs=3
        )
        result = run(settings)
        assert result is not None
        losses = [metrics["train/loss"] for metrics in result.history]
        assert losses[-1] < losses[0] or loss in ("gr", "em-apl")  # their targets change, or come later
        assert (losses[0] < 0) == (loss == "em")
        rejects = loss in ("splc", "p-asl-selective", "curriculum")
        assert ("rejection/rejected" in result.history[-1]) == rejects
        assert ("rejection/probe_recall" in result.history[-1]) == rejects
        if loss == "p-asl-selective":
            assert result.history[0]["rejection/rejected"] > 0
        if loss in ("splc", "curriculum"):
            assert result.history[0]["rejection/rejected"] == 0


@pytest.mark.parametrize("loss", ["epr", "role", pytest.param("p-asl-selective", marks=pytest.mark.slow)])
def test_losses_on_two_workers_equal_those_on_one(loss: str, prepared: Path) -> None:
    """Terms of the whole batch are computed over all workers."""
    settings = tiny_settings(
        prepared,
        prepared / "none",
        model={"batch_norm": "frozen"},
        data={"probe_fraction": 0.0},
        loss={"name": loss},
        optimizer={"name": "sgd", "learning_rate": 0.03},
    )
    steps = 8  # includes the short last batch of an epoch
    single = trace_steps(0, settings, steps).losses
    several = run_on_ranks(trace_steps, 2, settings, steps)[0].losses
    assert several == pytest.approx(single, rel=1e-4)
    assert single[-1] != pytest.approx(single[0], rel=0.01)


def test_a_loss_state_that_is_too_large_is_refused(prepared: Path, tmp_path: Path) -> None:
    loss = {"name": "role", "max_state_gb": 1e-6}
    with pytest.raises(SettingsError, match=r"46 images x 12 classes, 6\.62e-06 GB .*loss\.max_state_gb allows 1e-06"):
        run(tiny_settings(prepared, tmp_path, loss=loss))
