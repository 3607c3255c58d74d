"""Many trainings: at the same time on a Ray cluster, or one after another in this process.

Without Ray Train workers, a training is one Ray task. A failed training does not affect the others; one that was
stopped resumes from its newest checkpoint.
"""

import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from paml import storage
from paml.compare.grid import Training
from paml.compare.settings import MultiRunSettings
from paml.distributed import cluster
from paml.distributed.cluster import CONTINUE, print_line, print_to_stderr
from paml.errors import PamlError
from paml.pipeline import train_and_report
from paml.progress import format_duration
from paml.runs.folder import settings_of_run
from paml.runs.journal import PARENT_TAG, Journal, journal_identity, plain, read_journal
from paml.runs.stopping import stopping
from paml.runs.train import is_ray_job
from paml.tasks import TaskContext, format_error
from paml.tracking import environment, start_trackers
from paml.training.data import open_data
from paml.training.embeddings import with_embeddings
from paml.training.reject_rate import with_reject_rate
from paml.training.result import Result
from paml.training.settings import TrainSettings, check_same_settings


def run_as_parent(
    settings: MultiRunSettings, name: str, folder: str, note: str, work: Callable[[Journal, dict[str, str]], int]
) -> int:
    """Call `work(journal, tags)` with the journal of a parent run open and mirrored by the trackers.

    tags: make a run a child of this one. Returns what `work` returns; a stop exits with 128 + signal.
    """
    journal = Journal(folder, "driver")
    with stopping() as signals:
        trackers = None
        try:
            journal.run(experiment=settings.experiment, name=name, note=note)
            values = plain(dataclasses.asdict(settings))
            journal.artifact_bytes(
                yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(), "settings.yaml"
            )
            journal.params({key: value for key, value in values.items() if not isinstance(value, dict)})
            trackers = start_trackers(settings.trackers, folder)
            status = work(journal, {PARENT_TAG: journal_identity(folder)})
            journal.status("FINISHED" if status == 0 else "FAILED")
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            journal.status("KILLED" if stopped else "FAILED")
            if trackers is not None:
                trackers.close(1.0 if stopped and is_ray_job() else 10.0)
            if not isinstance(error, KeyboardInterrupt):
                raise  # if a training in this process was stopped, it has printed the message
            print_to_stderr(f"stopped; {CONTINUE}")
            raise SystemExit(128 + (signals[0] if signals else 2)) from None
    trackers.close(30.0)
    for link in trackers.links():
        print(f"tracked: {link}")
    return status


def check_trainings(trainings: Sequence[Training]) -> None:
    """Raise DataError or SettingsError for missing data, and for run folders with other settings."""
    open_once = functools.cache(open_data)
    for training in trainings:
        data = open_once(training.settings.data)
        settings = with_reject_rate(with_embeddings(training.settings, data), data, lambda line: None)
        if storage.exists(storage.join(training.folder, "run.json")):
            try:
                check_same_settings(dataclasses.asdict(settings_of_run(training.folder)), settings)
            except PamlError as error:
                raise type(error)(f"{training.folder}: {error}. Or set another `storage`") from error
        else:
            storage.ensure_writable(training.folder)


def join_cluster(trainings: Sequence[Training], settings: MultiRunSettings) -> None:
    """Join the cluster if a training needs it. Call it before catching signals: ray.init installs handlers."""
    workers = [training.settings.workers for training in trainings if training.settings.workers.num_workers > 0]
    if workers:
        from paml.distributed.ray_train import connect

        connect(workers[0])
    elif settings.max_concurrent != 0:
        cluster.join(trainings[0].settings.workers.address)


def train_all(
    trainings: Sequence[Training], settings: MultiRunSettings, *, finished: int, tags: Mapping[str, str]
) -> dict[str, str]:
    """Train all, after `join_cluster`. Returns name -> error of those that failed.

    finished: trainings that were finished before, for the progress. tags: of each run.
    """
    progress = TrainingProgress(len(trainings) + finished, finished)
    in_tasks = [t for t in trainings if settings.max_concurrent != 0 and t.settings.workers.num_workers == 0]
    failed = _train_in_tasks(in_tasks, settings, progress, tags) if in_tasks else {}
    for training in trainings:
        if training not in in_tasks:
            error = _train_one(training, tags, progress.log)
            progress.done += 1
            progress.log(_format_end(training.name, error))
            if error is not None:
                failed[training.name] = error
    return failed


def _train_one(training: Training, tags: Mapping[str, str], log: Callable[[str], None]) -> str | None:
    """Train in this process; returns the error, or None. Raises only if it is stopped."""

    def log_named(line: str) -> None:
        log(f"{training.name}: {line}")

    try:
        train_or_resume(training, {**tags, "row": training.method}, log_named)
    except PamlError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return format_error(error)
    return None


def train_or_resume(
    training: Training,
    tags: Mapping[str, str],
    log: Callable[[str], None],
    launch: Callable[[TrainSettings], Result] | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train a run to its end, from its newest checkpoint if it has one.

    launch: executes the loop of a training without Ray Train workers. callbacks: for Ray Train's controller.
    """
    exists = storage.exists(storage.join(training.folder, "run.json"))
    settings = dataclasses.replace(training.settings, run=dataclasses.replace(training.settings.run, resume=exists))
    if settings.workers.num_workers > 0:
        from paml.distributed.ray_train import train_on_ray

        launch = functools.partial(train_on_ray, log=log, callbacks=callbacks)
    train_and_report(settings, launch=launch, log=log, tags=tags, resume_hint=CONTINUE)


def _format_end(name: str, error: str | None) -> str:
    return f"{name}: " + ("done" if error is None else f"FAILED: {error}")


def _train_in_tasks(
    trainings: Sequence[Training], settings: MultiRunSettings, progress: "TrainingProgress", tags: Mapping[str, str]
) -> dict[str, str]:
    from paml.distributed.console import forward_console, start_console
    from paml.distributed.ray_tasks import RayTaskRunner, check_shared

    check_shared(trainings[0].settings.run.storage)
    console = start_console(runtime_env=cluster.task_environment())
    runner = RayTaskRunner(cpus_per_task=settings.cpus_per_run, limit=settings.max_concurrent, retries=3)
    job = {"console": console, "tags": dict(tags), "environment": environment()}
    tasks = [(training.name, training) for training in trainings]
    try:
        with forward_console(console, progress.log):
            results, lost = runner.run(_run_task, job, tasks, lambda done: setattr(progress, "done", done))
    except BaseException:
        mark_killed(training.folder for training in trainings)
        raise
    failed = {name: error for name, error in results if error is not None}
    progress.done = len(trainings)
    for failure in lost:
        failed[failure.name] = failure.reason
        progress.log(_format_end(failure.name, failure.reason))
    return failed


def _run_task(job: dict[str, Any], training: Training, context: TaskContext) -> tuple[str, str | None]:
    """One training in a Ray task, which is retried if its worker dies."""
    import ray
    import torch

    os.environ.update(job["environment"])  # configures trackers
    torch.set_num_threads(context.threads)
    log = job["console"].log.remote
    error = _train_one(training, job["tags"], log)
    context.report(1)
    ray.get(log(_format_end(training.name, error)))
    return training.name, error


def mark_killed(folders: Iterable[str]) -> None:
    """Set the status of runs to KILLED in their journals, if their processes were killed before they could."""
    for folder in folders:
        if storage.exists(storage.join(folder, "run.json")):
            statuses = [event.value for event in read_journal(folder, unreadable={}) if event.kind == "status"]
            if statuses[-1:] == ["RUNNING"]:
                Journal(folder, "parent").status("KILLED")


class TrainingProgress:
    """Overall progress of many trainings, and the remaining time, estimated from those that this process has ended."""

    def __init__(self, total: int, finished: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """finished: trainings that were finished before."""
        self._total, self._finished, self._clock, self._start = total, finished, clock, clock()
        self.done = 0
        """Trainings that have finished or failed since then."""

    def log(self, line: str) -> None:
        """Print a line of a training with the overall progress."""
        print_line(self.format_line(line))

    def format_line(self, line: str) -> str:
        """The line with the overall progress."""
        ended, time_left = self._finished + self.done, ""
        if self.done and ended < self._total:
            seconds = (self._clock() - self._start) / self.done * (self._total - ended)
            time_left = f", {format_duration(seconds)} left"
        return f"[{ended}/{self._total} runs{time_left}] {line}"
