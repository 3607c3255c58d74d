"""What Ray Tune's own schedulers decide, told what a sweep knows of the trials before."""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import TrialScheduler

from paml.compare.settings import SweepSettings
from paml.compare.trials import Trial
from paml.distributed.tune_run import METRIC, TIME, scheduler_of
from tests.helpers.sweeps import tiny_sweep

BEFORE = [
    Trial(1, {}, "finished", (0.5, 0.6, 0.7)),
    Trial(2, {}, "stopped", (0.3,)),
    Trial(3, {}, "finished", (0.4, 0.5, 0.6)),
    Trial(4, {}, "failed", error="it broke"),
]


class NewTrial:
    """All of a trial that a scheduler asks for."""

    trial_id = "new"


def decisions(tmp_path: Path, scores: list[float], **changes: Any) -> list[str]:
    """Of the scheduler, told a new trial's validation mAP epoch by epoch."""
    settings = SweepSettings(**tiny_sweep(tmp_path, tmp_path, scheduler="median", **changes))
    scheduler, trial, nobody = scheduler_of(settings, 3, BEFORE), NewTrial(), None
    told: Any = scheduler
    told.on_trial_add(nobody, trial)
    return [told.on_trial_result(nobody, trial, {TIME: epoch, METRIC: s}) for epoch, s in enumerate(scores, 1)]


def test_the_median_rule_stops_a_trial_below_the_median_of_those_before(tmp_path: Path) -> None:
    """In epoch 1 the median of 0.5, 0.3 and 0.4, in epoch 2 that of the means 0.55 and 0.45."""
    assert decisions(tmp_path, [0.39], median_of=3) == [TrialScheduler.STOP]
    assert decisions(tmp_path, [0.41], median_of=3) == [TrialScheduler.CONTINUE]
    assert decisions(tmp_path, [0.41, 0.49], median_of=2) == [TrialScheduler.CONTINUE, TrialScheduler.STOP]
    assert decisions(tmp_path, [0.41, 0.51], median_of=2) == [TrialScheduler.CONTINUE] * 2


def test_the_median_rule_waits_for_its_first_epochs_and_for_enough_trials(tmp_path: Path) -> None:
    assert decisions(tmp_path, [0.1], median_of=3, first_epochs=2) == [TrialScheduler.CONTINUE]
    assert decisions(tmp_path, [0.1], median_of=4) == [TrialScheduler.CONTINUE]
