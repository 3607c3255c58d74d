"""Invariants 3 to 5 on real workers: batches, flips, rejected labels and losses do not depend on their number."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.prepared import tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import Trace, trace_steps

STEPS = 20


@cache
def traces(root: Path, workers: int) -> list[Trace]:
    # SGD, since Adam turns gradients that are only rounding errors into full steps.
    settings = tiny_settings(
        root,
        root / "none",
        model={"batch_norm": "frozen"},
        data={"probe_fraction": 0.0},
        optimizer={"name": "sgd", "learning_rate": 0.03},
        epochs=4,
    )
    if workers == 1:
        return [trace_steps(0, settings, STEPS)]
    return run_on_ranks(trace_steps, workers, settings, STEPS)


@pytest.fixture(params=[2, pytest.param(4), pytest.param(3, marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, prepared: Path) -> tuple[Trace, list[Trace]]:
    """The trace of one worker, and those of several."""
    return traces(prepared, 1)[0], traces(prepared, request.param)


def test_batches_and_flips_are_the_same(pair: tuple[Trace, list[Trace]]) -> None:
    single, several = pair
    for name in ("index", "flips", "slots"):
        for step in range(STEPS):
            merged = np.concatenate([getattr(trace, name)[step] for trace in several])
            np.testing.assert_array_equal(merged, getattr(single, name)[step])


def test_rejected_labels_are_the_same_for_the_same_logits(pair: tuple[Trace, list[Trace]]) -> None:
    single, several = pair
    assert min(len(rejected) for rejected in single.rejected) > 5
    for step in range(STEPS):
        merged = np.concatenate([trace.rejected[step] for trace in several])
        np.testing.assert_array_equal(np.sort(merged), np.sort(single.rejected[step]))


def test_losses_differ_by_less_than_1e_5(pair: tuple[Trace, list[Trace]]) -> None:
    single, several = pair
    difference = max(abs(one - other) for one, other in zip(single.losses, several[0].losses, strict=True))
    assert single.losses[-1] < 0.9 * single.losses[0]
    assert difference < 1e-5
    assert several[0].counts == single.counts
    assert all(trace.losses == several[0].losses for trace in several)


def test_weights_are_equal_on_all_workers_and_close_to_those_of_one(pair: tuple[Trace, list[Trace]]) -> None:
    single, several = pair
    for name, value in single.weights.items():
        for trace in several:
            assert torch.equal(trace.weights[name], several[0].weights[name])
        torch.testing.assert_close(several[0].weights[name], value, rtol=1e-3, atol=1e-5)


def test_every_image_is_evaluated_once(pair: tuple[Trace, list[Trace]]) -> None:
    single, several = pair
    assert [trace.pairs for trace in several] == [24 * 12] * len(several)
    for trace in several:
        assert trace.map == pytest.approx(single.map, abs=1e-3)  # close scores may swap ranks
