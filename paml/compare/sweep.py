"""A sweep: its trainings, and its records.

The folder of a sweep has one small file per trial, replaced atomically and written by the driver alone. These files and
the trials' checkpoints are all that a sweep needs to continue after a kill.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from paml import storage
from paml.compare.grid import Training, base_settings, make_training, results_folder
from paml.compare.settings import TuneSettings
from paml.compare.space import Trial, grid_points, random_points
from paml.compare.study import suggest_point
from paml.errors import CheckpointError, SettingsError
from paml.parsing import parse_errors_as, read_json
from paml.runs.folder import is_finished
from paml.settings import flatten, settings_from_values
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.settings import TrainSettings

SCHEMA_VERSION = 2
MAY_DIFFER = "trials", "max_concurrent", "cpus_per_run", "max_failures", "trackers", "plan", "storage", "experiment"
"""Settings that may change when a sweep continues."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's settings with the recipe read, so that any process can build a trial's settings."""

    settings: TuneSettings
    base: dict[str, Any]
    """The recipe and the common settings, by dotted name."""
    root: str
    """Folder that relative paths are resolved against."""

    @property
    def folder(self) -> str:
        """Folder of the records, the table, the plots and the recipes."""
        return results_folder(self.settings, self.settings.name, self.root)

    def run_folder(self, number: int) -> str:
        """Run folder of a trial."""
        return f"{self.folder}-{number:04d}"

    def method(self, number: int) -> str:
        """Method of a trial; empty without methods."""
        return self.settings.schedule[number - 1][0]

    def values(self, method: str, point: Mapping[str, Any]) -> dict[str, Any]:
        """What a method and a point set, by dotted name. boost.eval defaults to boost.train."""
        values = self.settings.method_settings(method)
        for axis in self.settings.axes(method):
            values |= axis.settings(point[axis.name])
        if "boost.train" in values and "boost.eval" not in values:
            values["boost.eval"] = values["boost.train"]
        return values

    def training(self, number: int, method: str, point: Mapping[str, Any]) -> Training:
        """A trial's training, without the test split. Raises SettingsError for values that do not fit together."""
        values = {**self.base, **self.values(method, point), "boost.eval_also": [], "data.test_split": None}
        name = f"{self.settings.name}-{number:04d}"
        return make_training(self.settings, name, f"trial {number}", values, self.root)

    def first_training(self, method: str) -> Training:
        """A training with the first value of each axis."""
        return self.training(0, method, {axis.name: axis.extremes[0] for axis in self.settings.axes(method)})


def plan_sweep(settings: TuneSettings, root: str) -> Sweep:
    """Read the recipe and validate every method and the extremes of every axis. `root` resolves relative paths.

    Raises SettingsError for an unreadable recipe and for values that a training does not accept.
    """
    base = base_settings(settings)
    plain = {**base, "boost.eval_also": [], "data.test_split": None}
    settings_from_values(TrainSettings, plain, "base")
    for method in settings.method_names:
        with_method = plain | settings.method_settings(method)
        if method:
            settings_from_values(TrainSettings, with_method, f"method {method!r}")
        for axis in settings.axes(method):
            if method == settings.method_names[0] or axis.name not in settings.space:
                for value in axis.extremes:
                    settings_from_values(TrainSettings, with_method | axis.settings(value), f"space: {axis.name!r}")
    return Sweep(settings, base, root)


def claim_sweep(sweep: Sweep) -> None:
    """Write the sweep's settings to its folder, or raise SettingsError if a different sweep is there."""
    path, hint = storage.join(sweep.folder, "sweep.json"), "give the sweep another name"
    new = {name: value for name, value in dataclasses.asdict(sweep.settings).items() if name not in MAY_DIFFER}
    new |= {"base": sweep.base, "common": {}, "schema_version": SCHEMA_VERSION}
    new["space"] = list(sweep.settings.space.items())  # in order, since the random points depend on it
    data = json.dumps(new, indent=1).encode()
    storage.ensure_writable(sweep.folder)
    try:
        storage.write_bytes(path, data, if_absent=True)
        return
    except FileExistsError:
        old = read_json(path, hint)
    with parse_errors_as(path, hint):
        before, now = flatten(old), flatten(json.loads(data))
    changes = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise SettingsError(
            f"{sweep.folder} has a sweep with other settings: {'; '.join(changes)}. Set another name; to continue that "
            f"sweep, only {', '.join(MAY_DIFFER)} may change"
        )


def write_trial(sweep: Sweep, trial: Trial) -> None:
    """Write or replace a trial's record."""
    path = storage.join(sweep.folder, "trials", f"{trial.number:04d}.json")
    storage.write_bytes(path, json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(trial)}).encode())


def read_trial(sweep: Sweep, number: int) -> Trial:
    """A trial's record."""
    path, hint = storage.join(sweep.folder, "trials", f"{number:04d}.json"), "remove it to restart the trial"
    facts = read_json(path, hint)
    with parse_errors_as(path, hint):
        if facts.pop("schema_version") != SCHEMA_VERSION:
            raise SettingsError(f"{sweep.folder} was written by another version of paml: set another name")
        trial = Trial(**{**facts, "scores": tuple(float(score) for score in facts["scores"])})
        if trial.number != number or trial.point.keys() != {axis.name for axis in sweep.settings.axes(trial.method)}:
            raise ValueError(f"it is of trial {trial.number!r}, or of another space")
        return trial


def read_trials(sweep: Sweep) -> dict[int, Trial]:
    """All trials started so far, by number. A trial with a finished run counts as finished."""
    trials = {}
    names = storage.list_files(storage.join(sweep.folder, "trials"))
    for number in sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{4,9}\.json", name, re.ASCII)):
        trial = read_trial(sweep, number)
        if trial.state == "running" and is_finished(sweep.run_folder(number)):
            trial = dataclasses.replace(trial, state="finished", scores=read_scores(sweep.run_folder(number)))
        trials[number] = trial
    return trials


def next_point(sweep: Sweep, number: int, trials: Mapping[int, Trial]) -> dict[str, Any] | None:
    """The point of trial `number`, or None if the space is exhausted. trials: all started so far."""
    settings = sweep.settings
    method, index = settings.schedule[number - 1]
    axes = settings.axes(method)
    if settings.search == "grid":
        return grid_points(axes, settings.count(method), settings.seed)[index]
    if settings.search == "random":
        return next(itertools.islice(random_points(axes, settings.seed), index, None), None)
    return suggest_point(axes, number, settings.seed, [one for one in trials.values() if one.method == method])


def read_history(run_folder: str) -> list[dict[str, float]]:
    """Metrics of a run's epochs so far, from its newest readable checkpoint; empty without one."""
    for name in reversed(list_checkpoints(run_folder)):
        try:
            facts = read_checkpoint(run_folder, name, groups=()).facts
            with parse_errors_as(f"{run_folder}/checkpoints/{name}", "remove it", CheckpointError):
                return [dict(metrics) for metrics in facts["history"]]
        except CheckpointError:
            continue
    return []


def read_scores(run_folder: str) -> tuple[float, ...]:
    """Validation mAP of a run's epochs so far, as in `Trial.scores`."""
    return tuple(map(validation_score, (epoch for epoch in read_history(run_folder) if not is_head_only(epoch))))


def is_head_only(metrics: Mapping[str, float]) -> bool:
    """Whether an epoch trained the head alone: it does not depend on most settings."""
    return bool(metrics.get("train/head_only", 0))


def validation_score(metrics: Mapping[str, float]) -> float:
    """An epoch's validation mAP; NaN becomes -1, to rank last."""
    value = metrics["val/mAP"]
    return value if value == value else -1.0
