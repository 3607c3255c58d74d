"""Invariants 3 to 5 over real workers: the same batches, flips, rejected labels and losses for any number of them."""

from collections.abc import Callable
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
    # SGD, since Adam makes whole steps of gradients that are nothing but rounding; which ones depends on the processor.
    settings = tiny_settings(
        root,
        root / "none",
        model={"batch_norm": "frozen"},
        data={"probe": 0.0},
        optimiser={"name": "sgd", "learning_rate": 0.03},
        epochs=4,
    )
    if workers == 1:
        return [trace_steps(0, settings, STEPS)]
    return run_on_ranks(trace_steps, workers, settings, STEPS)


@pytest.fixture(params=[2, pytest.param(4), pytest.param(3, marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, prepared: Path) -> tuple[Trace, list[Trace]]:
    """One worker's trace, and those of several."""
    return traces(prepared, 1)[0], traces(prepared, request.param)


def test_batches_and_flips_are_those_of_one_worker(pair: tuple[Trace, list[Trace]]) -> None:
    alone, several = pair
    for name in ("places", "flips", "slots"):
        for step in range(STEPS):
            together = np.concatenate([getattr(trace, name)[step] for trace in several])
            np.testing.assert_array_equal(together, getattr(alone, name)[step])


def test_the_same_labels_are_rejected_for_the_same_logits(pair: tuple[Trace, list[Trace]]) -> None:
    alone, several = pair
    assert min(len(rejected) for rejected in alone.rejected) > 5
    for step in range(STEPS):
        together = np.concatenate([trace.rejected[step] for trace in several])
        np.testing.assert_array_equal(np.sort(together), np.sort(alone.rejected[step]))


def test_losses_are_equal_within_1e_5(
    pair: tuple[Trace, list[Trace]], record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture
) -> None:
    alone, several = pair
    difference = max(abs(one - other) for one, other in zip(alone.losses, several[0].losses, strict=True))
    record_property("largest_difference", difference)
    with capsys.disabled():
        print(f"\n{len(several)} workers against one: losses of {STEPS} steps differ by {difference:.2e} at most")
    assert alone.losses[-1] < 0.9 * alone.losses[0]
    assert difference < 1e-5
    assert several[0].counts == alone.counts
    assert all(trace.losses == several[0].losses for trace in several)


def test_weights_stay_equal_on_all_workers_and_close_to_those_of_one(pair: tuple[Trace, list[Trace]]) -> None:
    alone, several = pair
    for name, value in alone.weights.items():
        for trace in several:
            assert torch.equal(trace.weights[name], several[0].weights[name])
        torch.testing.assert_close(several[0].weights[name], value, rtol=1e-3, atol=1e-5)


def test_every_image_is_scored_once(pair: tuple[Trace, list[Trace]]) -> None:
    alone, several = pair
    assert [trace.pairs for trace in several] == [24 * 12] * len(several)
    for trace in several:
        assert trace.map == pytest.approx(alone.map, abs=1e-3)  # close scores may change places
