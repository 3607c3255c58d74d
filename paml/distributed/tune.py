"""The command `paml tune`: Ray Tune over training settings, with a table, plots and the best recipe as the result.

A sweep is stored in its own small files and its trials' checkpoints (`paml.compare.sweep`), never in Tune's state. Each
start replays them to a new Tune, so a kill costs at most the epochs in progress.
"""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from paml import storage
from paml.compare.settings import TuneSettings
from paml.compare.space import Trial
from paml.compare.sweep import (
    Sweep,
    claim_sweep,
    is_head_only,
    plan_sweep,
    read_history,
    read_scores,
    read_trial,
    read_trials,
    validation_score,
)
from paml.compare.sweep_report import (
    as_note,
    as_text,
    best_by_method,
    format_plan,
    format_point,
    recipe_path,
    report_files,
)
from paml.distributed import cluster
from paml.distributed.cluster import CONTINUE, print_line, print_to_stderr
from paml.distributed.console import forward_console, start_console
from paml.distributed.many_runs import run_as_parent, train_or_resume
from paml.distributed.metrics import RayMeter
from paml.distributed.ray_tasks import check_shared
from paml.distributed.ray_train import connect, cpu_share, gpus_per_worker, ray_storage
from paml.distributed.trial_log import METRIC, POINT_TAG, TIME, TrialLog
from paml.errors import PamlError, SettingsError, StorageError
from paml.report import command_line
from paml.runs.journal import Journal
from paml.training.data import open_data
from paml.training.hooks import RunHooks
from paml.training.loop import train as run_loop
from paml.training.result import Result
from paml.training.settings import TrainSettings, WorkerSettings
from paml.training.world import World, current_world

_DRIVER_CPUS = 0.01
"""CPUs of a trial that waits for its Ray Train workers. A whole CPU would starve them, and Ray allows no zero."""
_REUSE_SECONDS = 60
"""How long a process may take to stop a trial before it starts the next one."""


def run_tune(settings: TuneSettings) -> int:
    """Run the trials that are not finished; write the table, the plots, and the best trials as recipes.

    The test split is never opened; training the recipes scores it. Returns 0, or 1 if a trial failed (which does not
    affect the others). Raises SettingsError or DataError before anything is trained. A stop exits with 128 + signal;
    the same command continues, also after a kill.
    """
    sweep = plan_sweep(settings, cluster.base_folder())
    methods = {method: sweep.first_training(method).settings for method in settings.method_names}
    epochs = {method: training.epochs for method, training in methods.items()}
    trials = read_trials(sweep)
    print(format_plan(sweep, trials, epochs), flush=True)
    if settings.plan:
        return 0
    for data in {training.data for training in methods.values()}:
        open_data(data)
    claim_sweep(sweep)
    workers = next(iter(methods.values())).workers
    _join_cluster(workers)
    placement = _place_trials(settings, workers, ray.cluster_resources())
    check_shared(sweep.folder)

    def work(journal: Journal, tags: dict[str, str]) -> int:
        trial_log = TrialLog(sweep, trials, journal, tags)
        try:
            cluster.call_in_thread(lambda: _run_trials(trial_log, epochs, *placement))
        except BaseException:
            trial_log.mark_killed()
            raise
        trial_log.close()
        _report(sweep, trial_log.trials, journal)
        return 1 if any(trial.state == "failed" for trial in trial_log.trials.values()) else 0

    note = as_note(sweep, trials.values(), command_line(), done=False)
    return run_as_parent(settings, settings.name, sweep.folder, note, work)


def _join_cluster(workers: WorkerSettings) -> None:
    """Join the cluster. Tune's actors cannot have their own runtime environment, so the driver's is set."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a table even with verbose=0
    environment = cluster.task_environment()
    variables = {**environment.get("env_vars", {}), "TUNE_FUNCTION_THREAD_TIMEOUT_S": str(_REUSE_SECONDS)}
    cluster.join(workers.address, {**environment, "env_vars": variables})
    connect(workers)  # sets the variables for Ray Train
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _place_trials(
    settings: TuneSettings, workers: WorkerSettings, available: Mapping[str, float]
) -> tuple[dict[str, float], int, WorkerSettings]:
    """(resources of a trial's process, number of concurrent trials, workers of a trial's training).

    One process per trial for up to one worker; otherwise Ray Train workers and a process that waits for them.
    available: CPUs and GPUs of the cluster. Raises SettingsError if not even one trial fits.
    """
    count, gpus = workers.num_workers, gpus_per_worker(workers, available)
    if count <= 1:
        least, resources = 1, {"CPU": float(settings.cpus_per_run)} | ({"GPU": gpus} if count and gpus else {})
        per_trial, inner = resources, dataclasses.replace(workers, num_workers=0)
    else:
        least, resources = settings.max_concurrent or 1, {"CPU": _DRIVER_CPUS}
        share = cpu_share(available.get("CPU", 0.0) - least * _DRIVER_CPUS, least * count)
        cpus = workers.cpus_per_worker or max(share, 0.01)
        per_trial = {"CPU": _DRIVER_CPUS + count * cpus} | ({"GPU": count * gpus} if gpus else {})
        inner = dataclasses.replace(workers, cpus_per_worker=cpus, gpus_per_worker=gpus, max_failures=0)
    fits = int(min(available.get(name, 0.0) / amount + 1e-9 for name, amount in per_trial.items()))
    if fits < least:
        raise SettingsError(
            f"{least} trial(s) with {per_trial} each do not fit on the cluster, which has {available.get('CPU', 0):g} "
            f"CPUs and {available.get('GPU', 0):g} GPUs: lower max_concurrent, cpus_per_run, workers.num_workers or "
            "workers.cpus_per_worker"
        )
    return resources, min(settings.max_concurrent or (fits if count <= 1 else 1), fits), inner


def _run_trials(
    trial_log: TrialLog,
    epochs: Mapping[str, int],
    resources: dict[str, float],
    max_concurrent: int,
    workers: WorkerSettings,
) -> None:
    """Run all remaining trials with a new Tune."""
    sweep, settings = trial_log.sweep, trial_log.sweep.settings
    if not trial_log.num_due():
        return
    by_method = {
        method: make_scheduler(settings, num_epochs, [t for t in trial_log.trials.values() if t.method == method])
        for method, num_epochs in epochs.items()
    }
    console = start_console()
    trainable = tune.with_parameters(
        _run_trial,
        sweep=sweep,
        workers=workers,
        cpus=resources["CPU"],
        tags=trial_log.tags,
        console=console,
        environment=cluster.storage_environment(),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=trial_log,
            scheduler=SchedulerByMethod(by_method, sweep.method),
            num_samples=trial_log.num_due(),
            max_concurrent_trials=max_concurrent,
            reuse_actors=workers.num_workers == 0,  # the next trial need not import torch
        ),
        run_config=tune.RunConfig(
            name=f"{settings.name}-{time.time_ns()}",  # new, so that Tune does not restore an earlier state
            storage_path=ray_storage(sweep.folder),
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[trial_log.error_callback],
            verbose=0,
        ),
    )
    with forward_console(console):
        tuner.fit()


@dataclasses.dataclass(frozen=True)
class _PastTrial:
    trial_id: str


class SchedulerByMethod(FIFOScheduler):
    """One scheduler per method, so that only trials of the same method compete."""

    def __init__(self, schedulers: Mapping[str, TrialScheduler], method_of: Callable[[int], str]) -> None:
        """method_of: method of a trial number."""
        super().__init__()
        self._schedulers, self._method_of = dict(schedulers), method_of

    def _scheduler(self, trial: Any) -> TrialScheduler:
        return self._schedulers[self._method_of(trial.config["number"])]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        return self._scheduler(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        self._scheduler(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler(trial).on_trial_remove(tune_controller, trial)


def make_scheduler(settings: TuneSettings, epochs: int, trials: Iterable[Trial]) -> TrialScheduler:
    """The scheduler for the trials of one method.

    epochs: of a training that is not stopped early, without those that train the head alone. trials: earlier ones,
    whose scores are replayed.
    """
    if settings.scheduler == "none":
        return FIFOScheduler()
    common: Any = {"time_attr": TIME, "metric": METRIC, "mode": "max"}
    common["grace_period"] = min(settings.grace_epochs, epochs)
    if settings.scheduler == "asha":
        scheduler = ASHAScheduler(max_t=epochs, reduction_factor=settings.reduction_factor, **common)
    else:  # trials are never paused for others
        common["min_time_slice"] = float("inf")
        scheduler = MedianStoppingRule(min_samples_required=settings.median_min_trials, **common)
    controller: Any = None
    for trial in trials:
        if trial.state not in ("finished", "stopped") or not trial.scores:
            continue
        past: Any = _PastTrial(f"past-{trial.number}")
        scheduler.on_trial_add(controller, past)
        for epoch, score in enumerate(trial.scores, 1):
            scheduler.on_trial_result(controller, past, {TIME: epoch, METRIC: score})
        scheduler.on_trial_complete(controller, past, {TIME: len(trial.scores), METRIC: trial.scores[-1]})
    return scheduler


class _ReportCallback(TuneReportCallback):
    """Passes the epochs of Ray Train workers to Tune."""

    def __init__(self, result_of: Callable[[Mapping[str, float]], dict[str, Any] | None]) -> None:
        super().__init__()
        self._result_of = result_of

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called in Ray Train's controller after all workers have reported."""
        if result := self._result_of(metrics[0]):
            super().after_report(run_context, [result], None)


def _run_trial(
    config: dict[str, Any],
    *,
    sweep: Sweep,
    workers: WorkerSettings,
    cpus: float,
    tags: dict[str, str],
    console: Any,
    environment: dict[str, str],
) -> None:
    """One trial in its own process, with each epoch reported to Tune.

    An interrupted trial first reports the epochs of its checkpoint, so that the scheduler can stop it.
    """
    os.environ.update(environment)
    trial = read_trial(sweep, config["number"])
    training = sweep.training(trial.number, trial.method, trial.point)
    settings, folder = training.settings, training.folder
    run = dataclasses.replace(settings.run, trackers=[], register=None)  # the driver starts the trackers
    training = dataclasses.replace(training, settings=dataclasses.replace(settings, workers=workers, run=run))

    def log(line: str) -> None:
        console.log.remote(f"{training.name}: {line}")

    result_of = functools.partial(_epoch_result, head_epochs=settings.linear_init.epochs, last=settings.all_epochs)

    def report(metrics: Mapping[str, float]) -> None:
        if result := result_of(metrics):
            tune.report(result)

    for metrics in read_history(folder):
        report(metrics)

    def train_here(settings: TrainSettings) -> Result:
        torch.set_num_threads(max(1, int(cpus)))
        world = current_world() if ray.get_gpu_ids() else World()
        meter = RayMeter(training.name, world.rank)
        return run_loop(
            settings, world, RunHooks(Journal(folder, "rank0").metrics, log, on_epoch_end=report, meter=meter)
        )

    tags = {**tags, "trial": str(trial.number), POINT_TAG: format_point(trial.point)}
    tags |= {"tuned_method": trial.method} if trial.method else {}
    try:
        callbacks = [_ReportCallback(result_of)] if workers.num_workers else []
        train_or_resume(training, tags, log, launch=train_here, callbacks=callbacks)
        epoch, score, failed = settings.epochs, read_scores(folder)[-1], {}
    except StorageError:
        raise
    except PamlError as error:  # returns, since Tune would retry a trial that raises
        epoch, score, failed = len(read_scores(folder)) + 1, -1.0, {"failed": str(error)}
    tune.report({TIME: epoch, METRIC: score, **failed})


def _epoch_result(metrics: Mapping[str, float], *, head_epochs: int, last: int) -> dict[str, Any] | None:
    """What Tune gets of an epoch; None for the last: Tune ends a trial there, which has yet to finish its run."""
    if is_head_only(metrics) or metrics["epoch"] >= last:
        return None
    return {TIME: int(metrics["epoch"]) - head_epochs, METRIC: validation_score(metrics)}


def _report(sweep: Sweep, trials: Mapping[int, Trial], journal: Journal) -> None:
    """Print the table, and write table, plots and recipes to the folder and the journal."""
    all_trials = list(trials.values())
    table = as_text(sweep, all_trials)
    print_line(f"\ntrials of {sweep.settings.name}, validation mAP in percent\n{table}\n")
    for name, data in report_files(sweep, all_trials).items():
        storage.write_bytes(storage.join(sweep.folder, name), data)
        kind = {"png": "figures", "yaml": "recipes"}.get(name.rpartition(".")[2], "tables")
        journal.artifact_bytes(data, f"{kind}/{name}")
    for method, best in best_by_method(sweep, all_trials).items():
        print_line(
            f"{method + ': ' if method else ''}best trial {best.number}, val mAP {100 * best.score:.2f}; to score the "
            f"test split: paml train --config {recipe_path(sweep, method)}"
        )
    journal.note(as_note(sweep, all_trials, command_line(), done=True))
    failed = [trial for trial in all_trials if trial.state == "failed"]
    for trial in failed:
        print_to_stderr(f"trial {trial.number} FAILED: {trial.error}")
    if any(not trial.permanent for trial in failed):
        print_to_stderr(f"{CONTINUE} with the trials whose process was lost")
