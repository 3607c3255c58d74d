"""Many trainings, each as `jobs/train_openimages.py` does it: on the cluster side by side, or here one after another.

A training without Ray Train workers is one Ray task of some CPUs. One that fails is named and takes no other with it;
one that was stopped goes on from its newest checkpoint.
"""

import dataclasses
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from paml import storage
from paml.compare.grid import Training
from paml.compare.progress import Progress
from paml.compare.settings import TrainingsSettings
from paml.distributed import cluster
from paml.distributed.run import train_run
from paml.errors import PamlError
from paml.shards.tasks import Context, one_line
from paml.tracking import Journal, read_journal
from paml.training.data import open_data
from paml.training.loop import run_folder_of
from paml.training.reject_rate import with_reject_rate
from paml.training.score_run import settings_of_run
from paml.training.settings import refuse_other_settings

AGAIN = "the same command goes on"
_RETRIES = 3


def check_trainings(trainings: Sequence[Training]) -> None:
    """Raise DataError or SettingsError, before anything is trained, for data that are not there and for folders that
    hold a run of other settings."""
    opened = {}
    for each in trainings:
        if each.settings.data not in opened:
            opened[each.settings.data] = open_data(each.settings.data)
        settings = with_reject_rate(each.settings, opened[each.settings.data], lambda line: None)
        folder = run_folder_of(settings)
        if storage.exists(storage.join(folder, "run.json")):
            try:
                refuse_other_settings(dataclasses.asdict(settings_of_run(folder)), settings)
            except PamlError as error:
                raise type(error)(f"{folder}: {error}. Or let `storage` be another folder") from error
        else:
            storage.ensure_writable(folder)


def join_cluster(trainings: Sequence[Training], settings: TrainingsSettings) -> None:
    """Join the cluster if any of them needs one. To be called before signals are caught: Ray takes them for itself."""
    workers = [each.settings.workers for each in trainings if each.settings.workers.num_workers > 0]
    if workers:
        from paml.distributed.ray_train import connect

        connect(dataclasses.replace(workers[0], address=settings.address or workers[0].address))
    elif settings.at_once != 0:
        cluster.join(settings.address)


def train_all(
    trainings: Sequence[Training],
    settings: TrainingsSettings,
    *,
    done: int,
    tags: Mapping[str, str],
    last_epoch: int | None = None,
) -> dict[str, str]:
    """Train them to their end, or to `last_epoch`; returns name -> error of those that failed. After `join_cluster`.

    done: trainings of the grid that need nothing more, for the progress lines. tags: of each training's MLflow run.
    """
    goals = {each.name: min(each.settings.all_epochs, last_epoch or each.settings.all_epochs) for each in trainings}
    progress = Progress(goals, done)
    alone = [each for each in trainings if settings.at_once == 0 or each.settings.workers.num_workers > 0]
    together = [each for each in trainings if each not in alone]
    failed = _train_on_ray(together, settings, progress, tags, last_epoch) if together else {}
    for each in alone:
        error = _train_one(each, tags, last_epoch, lambda line, name=each.name: _print(progress.line(name, line)))
        _print(progress.ended(each.name, error))
        if error is not None:
            failed[each.name] = error
    return failed


def _print(line: str) -> None:
    print(line, flush=True)


def _train_one(training: Training, tags: Mapping[str, str], last_epoch: int | None, say: Any) -> str | None:
    """Train one in this process; returns what went wrong, None where nothing did. Only a stop is raised."""
    settings = training.settings
    begun = storage.exists(storage.join(run_folder_of(settings), "run.json"))
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, resume=begun))
    try:
        train_run(settings, say=say, tags={**tags, "row": training.method}, last_epoch=last_epoch, again=AGAIN)
    except PamlError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return one_line(error)
    return None


@dataclasses.dataclass(frozen=True)
class _Task:
    training: Training
    at_a_time: int | None
    """Read by RayTasks."""


@dataclasses.dataclass(frozen=True)
class _Job:
    console: Any
    tags: dict[str, str]
    last_epoch: int | None
    mlflow: dict[str, str]
    """MLflow's variables of the driver's environment."""


def _train_on_ray(
    trainings: Sequence[Training],
    settings: TrainingsSettings,
    progress: Progress,
    tags: Mapping[str, str],
    last_epoch: int | None,
) -> dict[str, str]:
    import ray

    from paml.distributed.console import Console, printing
    from paml.distributed.prepare_ray import RayTasks, refuse_unshared

    class Board(Console):
        """A console that puts the state of the whole before each line."""

        def hear(self, name: str, line: str) -> None:
            self.say(progress.line(name, line))

        def ended(self, name: str, error: str | None) -> None:
            self.say(progress.ended(name, error))

    refuse_unshared(trainings[0].settings.run.storage)
    console: Any = ray.remote(num_cpus=0, runtime_env=cluster.task_environment())(Board).remote()  # pyright: ignore
    mlflow = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    tasks = RayTasks(cpus_per_task=settings.cpus_per_run, retries=_RETRIES)
    named = [(each.name, _Task(each, settings.at_once)) for each in trainings]
    try:
        with printing(console):
            job = _Job(console, dict(tags), last_epoch, mlflow)
            results, dead = tasks.run(_train_task, job, named, lambda units: None)
    except BaseException:
        _note_killed(trainings)
        raise
    failed = {name: error for name, error in results if error is not None}
    for failure in dead:
        failed[failure.name] = failure.reason
        _print(progress.ended(failure.name, failure.reason))
    return failed


def _train_task(job: _Job, task: _Task, context: Context) -> tuple[str, str | None]:
    """One training in a Ray task; a worker that dies is another's to start again."""
    import ray
    import torch

    os.environ.update(job.mlflow)
    torch.set_num_threads(context.threads)
    name = task.training.name
    error = _train_one(task.training, job.tags, job.last_epoch, lambda line: job.console.hear.remote(name, line))
    ray.get(job.console.ended.remote(name, error))
    return name, error


def _note_killed(trainings: Sequence[Training]) -> None:
    """Let the journals of runs whose workers were killed say so."""
    for each in trainings:
        folder = run_folder_of(each.settings)
        if not storage.exists(storage.join(folder, "run.json")):
            continue
        statuses = [event.value for event in read_journal(folder, unreadable={}) if event.kind == "status"]
        if statuses and statuses[-1] == "RUNNING":
            Journal(folder, "grid").status("KILLED")
