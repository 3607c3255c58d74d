"""Early stopping by Ray Tune's schedulers, with the scores of earlier trials replayed."""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import TrialScheduler

from paml.compare.settings import TuneSettings
from paml.compare.space import Trial
from paml.distributed.trial_log import METRIC, TIME
from paml.distributed.tune import SchedulerByMethod, make_scheduler
from tests.helpers.sweeps import tiny_sweep

EARLIER = [
    Trial(1, {}, "finished", (0.5, 0.6, 0.7)),
    Trial(2, {}, "stopped", (0.3,)),
    Trial(3, {}, "finished", (0.4, 0.5, 0.6)),
    Trial(4, {}, "failed", error="it broke"),
]
CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class NewTrial:
    """What a scheduler needs of a trial."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config = f"new-{number}", {"number": number}


def decisions(scheduler: Any, number: int, scores: list[float]) -> list[str]:
    """The scheduler's decision after each epoch of a new trial."""
    trial = NewTrial(number)
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, {TIME: epoch, METRIC: s}) for epoch, s in enumerate(scores, 1)]


def median(tmp_path: Path, scores: list[float], **changes: Any) -> list[str]:
    settings = TuneSettings(**tiny_sweep(tmp_path, tmp_path, scheduler="median", **changes))
    return decisions(make_scheduler(settings, 3, EARLIER), 5, scores)


def test_median_rule_compares_with_earlier_trials(tmp_path: Path) -> None:
    """In epoch 1 the median of 0.5, 0.3 and 0.4; in epoch 2 that of the means 0.55 and 0.45."""
    assert median(tmp_path, [0.39], median_min_trials=3) == [STOP]
    assert median(tmp_path, [0.41], median_min_trials=3) == [CONTINUE]
    assert median(tmp_path, [0.41, 0.49], median_min_trials=2) == [CONTINUE, STOP]
    assert median(tmp_path, [0.41, 0.51], median_min_trials=2) == [CONTINUE] * 2


def test_median_rule_waits_for_grace_epochs_and_for_enough_trials(tmp_path: Path) -> None:
    assert median(tmp_path, [0.1], median_min_trials=3, grace_epochs=2) == [CONTINUE]
    assert median(tmp_path, [0.1], median_min_trials=4) == [CONTINUE]


def test_only_trials_of_the_same_method_compete(tmp_path: Path) -> None:
    """With ASHA: a trial worse than those of its own method is stopped, whatever the other method scores."""
    settings = TuneSettings(**tiny_sweep(tmp_path, tmp_path, grace_epochs=1))
    good = [Trial(number, {}, "finished", (0.9, 0.9, 0.9), method="good") for number in (1, 3)]
    bad = [Trial(number, {}, "finished", (0.1, 0.1, 0.1), method="bad") for number in (2, 4)]
    by_method = {"good": make_scheduler(settings, 3, good), "bad": make_scheduler(settings, 3, bad)}
    scheduler = SchedulerByMethod(by_method, lambda number: "good" if number % 2 else "bad")
    assert decisions(scheduler, 5, [0.5]) == [STOP]
    assert decisions(scheduler, 6, [0.5]) == [CONTINUE]
