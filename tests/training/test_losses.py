"""Losses of the papers in whole runs: with and without boost, below zero, and over workers."""

from pathlib import Path

import pytest

from paml.losses.em import EMSettings
from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import run, trace_steps

QUICK = ("em", "splc")
OTHERS = ("p-asl-selective", "wan", "an-ls", "epr", "asl", "p-asl-ignore", "p-asl-negative", "hill", "gr")


@pytest.mark.parametrize("loss", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_losses_train_with_and_without_boost(loss: str, prepared: Path, tmp_path: Path) -> None:
    for alpha in (5.0, 1.0) if loss not in QUICK else (5.0,):
        boost = {"train": alpha, "eval": alpha}
        # An entropy that outweighs all else: the loss falls below zero and the run goes on.
        settings = {"name": loss} | ({"em": EMSettings(alpha=20.0)} if loss == "em" else {})
        settings = tiny_settings(
            prepared, tmp_path / f"{alpha}", loss=settings, boost=boost, data={"probe": 0.2}, epochs=3
        )
        result = run(settings)
        assert result is not None
        losses = [figures["train/loss"] for figures in result.history]
        assert losses[-1] < losses[0] or loss == "gr"  # whose targets move
        assert (losses[0] < 0) == (loss == "em")
        rejects = loss in ("splc", "p-asl-selective")
        assert ("rejection/rejected" in result.history[-1]) == rejects
        assert ("rejection/probe_recall" in result.history[-1]) == rejects
        if loss == "p-asl-selective":
            assert result.history[0]["rejection/rejected"] > 0
        if loss == "splc":
            assert result.history[0]["rejection/rejected"] == 0


@pytest.mark.parametrize("loss", ["epr", pytest.param("p-asl-selective", marks=pytest.mark.slow)])
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
