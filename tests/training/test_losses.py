"""Losses of the papers in whole runs: with and without boost, below zero, and over workers."""

from pathlib import Path

import pytest

from paml.errors import SettingsError
from paml.losses.em import EMSettings
from paml.losses.em_apl import EMAPLSettings
from paml.losses.role import RoleSettings
from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import run, trace_steps

QUICK = ("em", "splc", "role", "em-apl", "curriculum")
OTHERS = ("p-asl-selective", "wan", "an-ls", "epr", "asl", "p-asl-ignore", "p-asl-negative", "hill", "gr")


@pytest.mark.parametrize("loss", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_losses_train_with_and_without_boost(loss: str, prepared: Path, tmp_path: Path) -> None:
    for alpha in (5.0, 1.0) if loss not in QUICK else (5.0,):
        boost = {"train": alpha, "eval": alpha}
        # An entropy that outweighs all else: the loss falls below zero and the run goes on.
        settings = {"name": loss, "em_apl": EMAPLSettings(first_epoch=1)}
        settings |= {"em": EMSettings(alpha=20.0)} if loss == "em" else {}
        settings = tiny_settings(
            prepared, tmp_path / f"{alpha}", loss=settings, boost=boost, data={"probe": 0.2}, epochs=3
        )
        result = run(settings)
        assert result is not None
        losses = [figures["train/loss"] for figures in result.history]
        assert losses[-1] < losses[0] or loss in ("gr", "em-apl")  # whose targets move or come later
        assert (losses[0] < 0) == (loss == "em")
        rejects = loss in ("splc", "p-asl-selective", "curriculum")
        assert ("rejection/rejected" in result.history[-1]) == rejects
        assert ("rejection/probe_recall" in result.history[-1]) == rejects
        if loss == "p-asl-selective":
            assert result.history[0]["rejection/rejected"] > 0
        if loss in ("splc", "curriculum"):
            assert result.history[0]["rejection/rejected"] == 0


@pytest.mark.parametrize("loss", ["epr", "role", pytest.param("p-asl-selective", marks=pytest.mark.slow)])
def test_losses_over_workers_equal_those_of_one(loss: str, prepared: Path) -> None:
    """What is of the whole batch crosses the workers: their losses, and so the weights behind them, stay the same."""
    settings = tiny_settings(
        prepared,
        prepared / "none",
        model={"batch_norm": "frozen"},
        data={"probe": 0.0},
        loss={"name": loss},
        optimiser={"name": "sgd", "learning_rate": 0.03},
    )
    steps = 8  # the epoch's short last batch among them
    alone = trace_steps(0, settings, steps).losses
    several = run_on_ranks(trace_steps, 2, settings, steps)[0].losses
    assert several == pytest.approx(alone, rel=1e-4)
    assert alone[-1] != pytest.approx(alone[0], rel=0.01)


def test_a_memory_that_is_too_large_ends_the_run_before_its_first_step(prepared: Path, tmp_path: Path) -> None:
    loss = {"name": "role", "role": RoleSettings(max_memory_gb=1e-6)}
    with pytest.raises(SettingsError, match=r"46 images x 12 classes, 6\.62e-06 GB .*\.max_memory_gb allows 1e-06"):
        run(tiny_settings(prepared, tmp_path, loss=loss))
