"""Sweeps of trials of seconds, as people start them, and what their folders hold."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from paml.compare.settings import SweepSettings
from paml.compare.trials import Sweep, Trial, plan_sweep, read_trials
from tests.helpers.grids import tiny_base
from tests.helpers.jobs import ROOT, WORKER, Job, gone, kill, named, newest_step
from tests.helpers.kills import OwnRay

TUNE = str(ROOT / "jobs" / "tune_openimages.py")
TRIAL = "ray::ImplicitFunc"
ASK = """
import json, ray
from ray.util import placement_group_table
ray.init(log_to_driver=False)
groups = [f"group {g['placement_group_id']} {g['state']}" for g in placement_group_table().values()
          if g["state"] != "REMOVED"]
free, has = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
print(json.dumps(groups + ([f"{has - free:g} CPUs"] if free < has else [])))
"""
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
    config.write_text(yaml.safe_dump(json.loads(json.dumps(dict(settings))), sort_keys=False))
    return Job([sys.executable, TUNE, "--config", str(config), *options], log, env=env)


def ended(sweep: Sweep) -> dict[int, Trial]:
    """The trials that are noted to have ended."""
    return {number: trial for number, trial in read_trials(sweep).items() if trial.state != "running"}


def unfinished(sweep: Sweep) -> list[int]:
    """Trials under way that have a whole checkpoint behind them."""
    found = read_trials(sweep)
    return [n for n, trial in found.items() if trial.state == "running" and newest_step(Path(sweep.run_folder(n)))]


@dataclasses.dataclass
class Sweeping:
    """A sweep that was killed and came to its end."""

    trials: dict[int, Trial]
    kept: dict[int, Trial]
    """Trials that had ended when one of the kills fell, as they were noted then."""
    interrupted: set[int]
    """Trials that had a checkpoint and were under way when one fell."""
    said: str
    """Output of all starts."""
    leaked: list[str]
    """What of the cluster was still taken when all was over, with the names of processes left by the kills."""
    seconds: float


def sweep_with_kills(settings: Mapping[str, Any], folder: Path, kills: Mapping[str, int]) -> Sweeping:
    """Kill the "driver", or all of "ray", once so many trials have ended and another has a checkpoint; finish it."""
    sweep, ray, begun = planned(settings), OwnRay(), time.monotonic()
    kept: dict[int, Trial] = {}
    interrupted: set[int] = set()
    said: list[str] = []
    ray.start()
    try:
        for what, number in kills.items():
            with sweep_job(settings, folder / f"until-{what}.log", env=ray.environment) as job:
                job.until(lambda n=number: len(ended(sweep)) >= n and unfinished(sweep), f"{number} trials", 1200)
                kept |= ended(sweep)
                if what == "driver":
                    left = trial_processes(ray)
                    kill(psutil.Process(job.process.pid))
                    assert job.wait(60) != 0
                    assert not gone(left, 60), "trials outlive their driver"
                else:
                    ray.kill()
                    assert job.wait(240) != 0
                interrupted |= set(unfinished(sweep))
                if what == "ray":
                    ray.start()
                said.append(job.output)
        with sweep_job(settings, folder / "start-last.log", env=ray.environment) as job:
            assert job.wait(3000) == 0, job.output
            said.append(job.output)
        return Sweeping(read_trials(sweep), kept, interrupted, "".join(said), leaks(ray), time.monotonic() - begun)
    finally:
        ray.stop()


def trial_processes(ray: OwnRay) -> list[psutil.Process]:
    """Those that train."""
    return [process for name in (TRIAL, WORKER) for process in named(ray.processes(), name)]


def leaks(ray: OwnRay, seconds: float = 60.0) -> list[str]:
    """What is left in a cluster without jobs, after at most so many seconds: trials, placement groups, CPUs taken."""
    end, found = time.monotonic() + seconds, ["not asked"]
    while found and time.monotonic() < end:
        found = [" ".join(process.cmdline()) for process in trial_processes(ray)]
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=dict(ray.environment), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        found += json.loads(done.stdout.splitlines()[-1])
    return found
