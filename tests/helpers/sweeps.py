"""Sweeps with trials of seconds, as commands, and the records in their folders."""

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

from paml.compare.settings import TuneSettings
from paml.compare.space import Trial
from paml.compare.sweep import Sweep, plan_sweep, read_trials
from tests.helpers.grids import tiny_base
from tests.helpers.jobs import ROOT, WORKER, Job, kill, newest_step, processes_named, survivors
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
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]},
}


def tiny_sweep(data: Path, storage: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a sweep on the tiny prepared data, as in a recipe."""
    given: dict[str, Any] = {
        "base": tiny_base(data) | {"epochs": 3},
        "storage": str(storage),
        "trackers": [],
        "space": SPACE,
        "search": "random",
        "trials": 6,
        "grace_epochs": 1,
        "reduction_factor": 2,
    }
    return given | changes


def plan(settings: Mapping[str, Any]) -> Sweep:
    """The sweep with these settings."""
    return plan_sweep(TuneSettings(**settings), "/")


def sweep_job(settings: Mapping[str, Any], log: Path, *, env: Mapping[str, str], options: tuple[str, ...] = ()) -> Job:
    """`python jobs/tune_openimages.py` with these settings."""
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(json.loads(json.dumps(dict(settings))), sort_keys=False))
    return Job([sys.executable, TUNE, "--config", str(config), *options], log, env=env)


def ended(sweep: Sweep) -> dict[int, Trial]:
    """The trials that have ended, by their records."""
    return {number: trial for number, trial in read_trials(sweep).items() if trial.state != "running"}


def unfinished(sweep: Sweep) -> list[int]:
    """Running trials with a checkpoint."""
    trials = read_trials(sweep)
    return [n for n, trial in trials.items() if trial.state == "running" and newest_step(Path(sweep.run_folder(n)))]


@dataclasses.dataclass
class SweepResult:
    """Results of a sweep that was killed and then finished."""

    trials: dict[int, Trial]
    ended_before: dict[int, Trial]
    """Trials that had ended before a kill, with their records at that time."""
    interrupted: set[int]
    """Trials with a checkpoint that were running at a kill."""
    output: str
    """Of all starts."""
    leaked: list[str]
    """Resources of the cluster that were still in use at the end, and processes that survived the kills."""
    seconds: float


def sweep_with_kills(settings: Mapping[str, Any], folder: Path, kills: Mapping[str, int]) -> SweepResult:
    """Run a sweep to its end. kills: "driver" or "ray" -> number of ended trials after which to kill it."""
    sweep, ray, start = plan(settings), OwnRay(), time.monotonic()
    ended_before: dict[int, Trial] = {}
    interrupted: set[int] = set()
    outputs: list[str] = []
    ray.start()
    try:
        for what, number in kills.items():
            with sweep_job(settings, folder / f"until-{what}.log", env=ray.environment) as job:
                job.until(lambda n=number: len(ended(sweep)) >= n and unfinished(sweep), f"{number} trials", 1200)
                ended_before |= ended(sweep)
                if what == "driver":
                    remaining = trial_processes(ray)
                    kill(psutil.Process(job.process.pid))
                    assert job.wait(60) != 0
                    assert not survivors(remaining, 60), "trials survive their driver"
                else:
                    ray.kill()
                    assert job.wait(240) != 0
                interrupted |= set(unfinished(sweep))
                if what == "ray":
                    ray.start()
                outputs.append(job.output)
        with sweep_job(settings, folder / "start-last.log", env=ray.environment) as job:
            assert job.wait(3000) == 0, job.output
            outputs.append(job.output)
        return SweepResult(
            read_trials(sweep), ended_before, interrupted, "".join(outputs), leaks(ray), time.monotonic() - start
        )
    finally:
        ray.stop()


def trial_processes(ray: OwnRay) -> list[psutil.Process]:
    """Processes that train."""
    return [process for name in (TRIAL, WORKER) for process in processes_named(ray.processes(), name)]


def leaks(ray: OwnRay, seconds: float = 60.0) -> list[str]:
    """Trials, placement groups and CPUs that are still in use in a cluster without jobs, after a time limit."""
    end, in_use = time.monotonic() + seconds, ["unknown"]
    while in_use and time.monotonic() < end:
        in_use = [" ".join(process.cmdline()) for process in trial_processes(ray)]
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=dict(ray.environment), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        in_use += json.loads(done.stdout.splitlines()[-1])
    return in_use
