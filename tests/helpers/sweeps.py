"""Sweeps of trials of seconds, as people start them, and what their folders hold."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from paml.compare.settings import SweepSettings
from paml.compare.trials import Sweep, Trial, plan_sweep, read_trials
from tests.helpers.grids import tiny_base
from tests.helpers.jobs import ROOT, Job

TUNE = str(ROOT / "jobs" / "tune_openimages.py")
SPACE: dict[str, Any] = {
    "loss.name": ["ll-r", "ll-ct", "ll-cp"],
    "loss.reject_rate_step": {"log_uniform": [1e-3, 1e-1]},
    "boost.train, boost.eval": [[1, 1], [1, 5], [3, 3], [5, 5]],
    "optimiser.learning_rate": {"log_uniform": [1e-4, 1e-2]},
}


def tiny_sweep(data: Path, storage: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a sweep on the tiny prepared data, as a file holds them."""
    given: dict[str, Any] = {
        "base": tiny_base(data) | {"epochs": 3},
        "storage": str(storage),
        "mlflow": False,
        "space": SPACE,
        "search": "random",
        "trials": 6,
        "first_epochs": 1,
        "eta": 2,
    }
    return given | changes


def planned(settings: Mapping[str, Any]) -> Sweep:
    """What its folder belongs to."""
    return plan_sweep(SweepSettings(**settings), "/")


def sweep_job(settings: Mapping[str, Any], log: Path, *, env: Mapping[str, str], options: tuple[str, ...] = ()) -> Job:
    """`python jobs/tune_openimages.py` with these settings."""
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(json.loads(json.dumps(dict(settings)))))
    return Job([sys.executable, TUNE, "--config", str(config), *options], log, env=env)


def ended(sweep: Sweep) -> dict[int, Trial]:
    """The trials that are noted to have ended."""
    return {number: trial for number, trial in read_trials(sweep).items() if trial.state != "running"}
