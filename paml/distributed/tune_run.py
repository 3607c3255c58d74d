"""A sweep as people start it: Ray Tune over the settings of a training, its table, pictures and best recipe.

What a sweep knows lies in its own small files and in its trials' checkpoints (`paml.compare.trials`), never in Tune's
state: each start tells a fresh Tune what is known, so a kill at any moment costs no more than the epochs under way.
"""

import dataclasses
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import ray
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from paml import storage
from paml.compare.halving import history_in
from paml.compare.pictures import draw_pictures
from paml.compare.progress import spoken
from paml.compare.settings import SweepSettings
from paml.compare.trials import (
    STATES,
    Sweep,
    Trial,
    as_csv,
    as_note,
    as_text,
    best_recipe,
    best_trial,
    claim_sweep,
    counted,
    is_of_head,
    is_whole,
    next_point,
    plan_sweep,
    read_trial,
    read_trials,
    said_plan,
    said_point,
    score_of,
    scores_in,
    write_trial,
)
from paml.distributed import cluster
from paml.distributed.compare_run import PARENT_TAG, tracked
from paml.distributed.console import Console, printing
from paml.distributed.grid_run import AGAIN
from paml.distributed.metrics import RayMeter
from paml.distributed.prepare_ray import refuse_unshared
from paml.distributed.ray_train import connect, ray_storage, train_on_ray
from paml.distributed.run import said_command, train_run
from paml.errors import PamlError, SettingsError
from paml.shards.tasks import one_line
from paml.tracking import Event, Journal, MlflowFollower, read_journal, replay
from paml.tracking.journal import END_STATUSES
from paml.training.data import open_data
from paml.training.loop import Result, Watcher, train
from paml.training.settings import TrainSettings, WorkerSettings
from paml.training.world import World, current_world

METRIC, TIME = "val_map", "epoch"
STATE_TAG, POINT_TAG = "trial_state", "trial_point"
"""Of a trial's run in MLflow: finished, stopped or failed; and what it tries."""
_AROUND_WORKERS = 0.01
"""CPUs of a trial that only waits for its Ray Train workers; a whole one would starve them, and none is refused."""
_CLOSE_SECONDS = 30.0
_REUSE_SECONDS = 60
"""A process that is to train the next trial may take so long to let go of the one that was stopped."""


def run_sweep(settings: SweepSettings) -> int:
    """Train the trials that are not trained yet; leave the table of all, pictures, and the best as `best.yaml`.

    The test split is never opened: train the recipe to score it. Returns 0, or 1 where a trial failed (the others go on
    without it). Raises SettingsError or DataError before anything is trained; a stop exits with 128 + signal, and the
    same command goes on, also after any kill.
    """
    sweep = plan_sweep(settings, cluster.base_folder())
    first = sweep.training(0, {axis.name: axis.ends[0] for axis in sweep.axes}).settings
    trials = read_trials(sweep)
    print(said_plan(sweep, trials, first.epochs), flush=True)
    if settings.plan:
        return 0
    open_data(first.data)
    claim_sweep(sweep)
    _join(settings, first.workers)
    shape = _shape(settings, first.workers, dict(ray.cluster_resources()))
    refuse_unshared(sweep.folder)

    def work(journal: Journal, parent: str | None) -> int:
        known = _Trials(sweep, trials, journal, {PARENT_TAG: parent} if parent else {})
        try:
            cluster.beside(lambda: _tune(known, shape, first.epochs))
        except BaseException:
            known.killed()
            raise
        known.close()
        _report(sweep, known.trials, journal)
        return 1 if any(trial.state == "failed" for trial in known.trials.values()) else 0

    note = as_note(sweep, trials.values(), said_command(), None)
    children = [sweep.run_folder(number) for number in range(1, settings.count + 1)]
    return tracked(settings, settings.name, sweep.folder, note, children, work)


def _join(settings: SweepSettings, workers: WorkerSettings) -> None:
    """Join the cluster. Tune's actors take no runtime environment of their own, so the driver's is theirs."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table at verbose 0, too
    environment = cluster.task_environment()
    variables = {**environment.get("env_vars", {}), "TUNE_FUNCTION_THREAD_TIMEOUT_S": str(_REUSE_SECONDS)}
    cluster.join(settings.address or workers.address, {**environment, "env_vars": variables})
    connect(workers)  # its variables for Ray Train
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How a trial lies on the cluster."""

    resources: dict[str, float]
    """Of the trial's own process."""
    at_once: int
    workers: WorkerSettings
    """Of its training."""


def _shape(settings: SweepSettings, workers: WorkerSettings, has: Mapping[str, float]) -> _Shape:
    """Of one process where there is at most one worker, else of workers that leave each trial's process its share.

    has: CPUs and GPUs of the cluster. Raises SettingsError where not even one trial fits.
    """
    cpus, all_gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    gpus = workers.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if all_gpus >= 1 else 0.0
    if workers.num_workers <= 1:
        own = {"CPU": float(settings.cpus_per_run)} | ({"GPU": gpus} if workers.num_workers and gpus else {})
        fits = int(min(has.get(name, 0.0) // share for name, share in own.items()))
        _refuse_too_large(fits, f"a trial of {own}", has)
        alone = dataclasses.replace(workers, num_workers=0)
        return _Shape(own, min(settings.at_once or fits, fits), alone)
    at_once = settings.at_once or 1
    share = workers.cpus_per_worker
    if share is None:
        free = (cpus - at_once * _AROUND_WORKERS) / (at_once * workers.num_workers)
        share = float(int(free)) if free >= 1 else int(free * 100) / 100
    need = at_once * workers.num_workers * share + at_once * _AROUND_WORKERS
    fits = share > 0 and need <= cpus + 1e-9 and at_once * workers.num_workers * gpus <= all_gpus
    what = f"{at_once} trial(s) of {workers.num_workers} workers of {share:g} CPUs and {gpus:g} GPUs"
    _refuse_too_large(fits, f"{what}, and {_AROUND_WORKERS:g} CPUs for each trial itself,", has)
    inner = dataclasses.replace(workers, cpus_per_worker=share, gpus_per_worker=gpus, max_failures=0)
    return _Shape({"CPU": _AROUND_WORKERS}, at_once, inner)


def _refuse_too_large(fits: float, what: str, has: Mapping[str, float]) -> None:
    if not fits:
        raise SettingsError(
            f"{what} do not fit the cluster, which has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs: "
            "lower at_once, cpus_per_run, workers.num_workers or workers.cpus_per_worker"
        )


def _tune(known: "_Trials", shape: _Shape, epochs: int) -> None:
    """All trials that are due, by a Tune that begins anew."""
    settings = known.sweep.settings
    due = known.due()
    if not due:
        return
    scheduler = scheduler_of(settings, epochs, known.trials.values())
    console: Any = ray.remote(num_cpus=0)(Console).remote()  # pyright: ignore[reportFunctionMemberAccess]
    told = tune.with_parameters(
        _trial,
        sweep=known.sweep,
        workers=shape.workers,
        cpus=shape.resources["CPU"],
        tags=known.tags,
        console=console,
        environment=cluster.storage_environment(),
    )
    tuner = tune.Tuner(
        tune.with_resources(told, shape.resources),
        tune_config=tune.TuneConfig(
            search_alg=known,
            scheduler=scheduler,
            num_samples=due,
            max_concurrent_trials=shape.at_once,
            reuse_actors=shape.workers.num_workers == 0,  # the next trial need not load torch anew
        ),
        run_config=tune.RunConfig(
            name=f"{settings.name}-{time.time_ns()}",  # new each time, so that Tune never takes up an old one
            storage_path=ray_storage(known.sweep.folder),
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[known.errors],
            verbose=0,
        ),
    )
    with printing(console):
        tuner.fit()


class _PastTrial:
    """Stands for a trial of an earlier start before a scheduler, which keeps it by its id."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"past-{number}"


def scheduler_of(settings: SweepSettings, epochs: int, trials: Iterable[Trial]) -> TrialScheduler:
    """Tune's scheduler, told the scores of all trials that have ended, as if it had seen them itself.

    epochs: of a whole training, those of the head alone left out.
    """
    if settings.scheduler == "none":
        return FIFOScheduler()
    first = min(settings.first_epochs, epochs)
    scheduler = (
        ASHAScheduler(TIME, METRIC, "max", max_t=epochs, grace_period=first, reduction_factor=settings.eta)
        if settings.scheduler == "asha"
        else MedianStoppingRule(
            TIME,
            METRIC,
            "max",
            grace_period=first,
            min_samples_required=settings.median_of,
            min_time_slice=float("inf"),  # pyright: ignore[reportArgumentType]  # a trial never makes way for another
        )
    )
    nobody: Any = None
    for trial in trials:
        if trial.state not in ("finished", "stopped") or not trial.scores:
            continue
        past: Any = _PastTrial(trial.number)
        scheduler.on_trial_add(nobody, past)
        for epoch, score in enumerate(trial.scores, 1):
            scheduler.on_trial_result(nobody, past, {TIME: epoch, METRIC: score})
        scheduler.on_trial_complete(nobody, past, {TIME: len(trial.scores), METRIC: trial.scores[-1]})
    return scheduler


class _Errors(tune.Callback):
    """Hears of trials that Tune has given up."""

    def __init__(self, heard: Callable[[str, str], None]) -> None:
        self._heard = heard

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Called after its last retry."""
        error = trial.get_pickled_error() or trial.get_error() or "its process was lost"
        self._heard(trial.trial_id, _last_line(error))

    def __reduce__(self) -> Any:
        return object, ()


def _last_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1].strip() if lines else type(error).__name__)[:500]


class _Trials(Searcher):
    """Tells Tune what to try, and keeps the records, the journals' ends and MLflow up to date.

    It lives in the driver alone. Tune's own copies of its searcher are left empty: nothing is ever restored from them.
    """

    def __init__(self, sweep: Sweep, trials: dict[int, Trial], journal: Journal, tags: dict[str, str]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.sweep, self.trials, self.tags = sweep, trials, tags
        self.errors = _Errors(self._lost)
        self._journal = journal
        again = ("running", False), ("failed", False)
        self._due = sorted(number for number, one in trials.items() if (one.state, one.lasting) in again)
        self._numbers: dict[str, int] = {}
        self._begun: dict[int, float] = {}
        self._followers: dict[int, MlflowFollower] = {}
        self._closing: list[threading.Thread] = []
        self._beside(self._finish_earlier, [n for n, trial in trials.items() if trial.state in ("finished", "stopped")])

    def due(self) -> int:
        """Trials that are to be started."""
        return len(self._due) + max(0, self.sweep.settings.count - len(self.trials))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Tune has no say in what is sought."""
        return True

    def suggest(self, trial_id: str) -> dict | None:
        """The next trial: one that was interrupted, else a new point."""
        if self._due:
            number = self._due.pop(0)
            trial = dataclasses.replace(self.trials[number], state="running", error=None)
        else:
            number = len(self.trials) + 1
            point = next_point(self.sweep, number, self.trials) if number <= self.sweep.settings.count else None
            if point is None:
                return Searcher.FINISHED  # pyright: ignore[reportReturnType]
            trial = Trial(number, point, "running")
        write_trial(self.sweep, trial)
        self.trials[number], self._numbers[trial_id], self._begun[number] = trial, number, time.monotonic()
        if self.sweep.settings.mlflow:
            folder = self.sweep.run_folder(number)
            self._followers[number] = MlflowFollower(folder, storage_root=folder.rpartition("/")[0])
        return {"number": number}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Keep what a trial has scored, so that the next point may know."""
        number = self._numbers[trial_id]
        trial, epoch = self.trials[number], result[TIME]
        if "failed" not in result and epoch == len(trial.scores) + 1:
            self.trials[number] = dataclasses.replace(trial, scores=(*trial.scores, result[METRIC]))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """A trial that has come to its end, has failed for good, or was stopped by the scheduler."""
        if error or result is None:
            return  # `errors` hears why
        number = self._numbers[trial_id]
        if "failed" in result:
            self._end(number, "failed", result["failed"], lasting=True)
        else:
            self._end(number, "finished" if is_whole(self.sweep, number) else "stopped")

    def _lost(self, trial_id: str, error: str) -> None:
        self._end(self._numbers[trial_id], "failed", error)

    def _end(
        self,
        number: int,
        state: Literal["finished", "stopped", "failed"],
        error: str | None = None,
        lasting: bool = False,
    ) -> None:
        if number not in self._begun:
            return  # Tune may say twice that a trial has ended
        trial = self.trials[number]
        trial = self.trials[number] = dataclasses.replace(
            trial,
            state=state,
            scores=scores_in(self.sweep.run_folder(number)) or trial.scores,
            seconds=trial.seconds + time.monotonic() - self._begun.pop(number),
            error=error,
            lasting=lasting,
        )
        write_trial(self.sweep, trial)
        self._end_journal(number)
        self._say(trial)
        best = best_trial(self.trials.values())
        self._journal.note(as_note(self.sweep, self.trials.values(), said_command(), None))
        counts = counted(self.trials.values())
        figures = {f"trial/{name}": float(counts.get(name, 0)) for name in STATES}  # a zero takes an old count's place
        self._journal.metrics(figures | ({"best_val_map": best.score} if best else {}), self._ended())
        follower = self._followers.pop(number, None)
        if follower is not None:
            self._beside(follower.close, _CLOSE_SECONDS)

    def _ended(self) -> int:
        return sum(trial.state != "running" for trial in self.trials.values())

    def _say(self, trial: Trial) -> None:
        how = {"finished": "done", "stopped": f"stopped after epoch {len(trial.scores)}"}.get(trial.state, "FAILED")
        scored = f", val mAP {100 * trial.score:.2f} in epoch {trial.epoch}" if trial.scores else ""
        error = f": {trial.error}" if trial.error else ""
        head = f"[{self._ended()}/{self.sweep.settings.count} trials]"
        print(
            f"{head} trial {trial.number}: {how}{scored} ({spoken(trial.seconds)}; {said_point(trial.point)}){error}",
            flush=True,
        )

    def _end_journal(self, number: int) -> None:
        """Say how the trial ended, so that MLflow can filter by it, and the run's status where its own process could
        not: it was stopped between two epochs, or was lost."""
        trial, folder = self.trials[number], self.sweep.run_folder(number)
        events = read_journal(folder, unreadable={})
        status = _last(event for event in events if event.kind == "status")
        if status is None:
            return  # it did not come so far as to open it
        journal = Journal(folder, "sweep")
        if _last(event for event in events if event.key == STATE_TAG) != trial.state:
            stopped = {"sweep.stopped_after_epoch": str(len(trial.scores))} if trial.state == "stopped" else {}
            journal.tags({STATE_TAG: trial.state, **stopped})
            if trial.scores:
                journal.metrics({"best_val_map": trial.score}, trial.epoch)
        if status not in END_STATUSES:
            journal.status("FAILED" if trial.state == "failed" else "FINISHED")

    def killed(self) -> None:
        """Let the journals of the trials under way say so."""
        for number in self._begun:
            folder = self.sweep.run_folder(number)
            if _last(event for event in read_journal(folder, unreadable={}) if event.kind == "status") == "RUNNING":
                Journal(folder, "sweep").status("KILLED")

    def close(self) -> None:
        """Wait until MLflow has what has ended."""
        for thread in self._closing:
            thread.join(_CLOSE_SECONDS)

    def _beside(self, work: Callable[..., Any], *arguments: Any) -> None:
        """In a thread, so that Tune never waits for MLflow."""
        thread = threading.Thread(target=work, args=arguments, name="mlflow-close", daemon=True)
        thread.start()
        self._closing = [*(one for one in self._closing if one.is_alive()), thread]

    def _finish_earlier(self, numbers: list[int]) -> None:
        """Trials that ended just before a kill: their journals and MLflow's view may lack the end."""
        for number in numbers:
            write_trial(self.sweep, self.trials[number])
            self._end_journal(number)
            if self.sweep.settings.mlflow:
                try:
                    replay(self.sweep.run_folder(number))
                except Exception as error:  # a view that can be refilled: no reason to fail
                    print(f"trial {number} is not whole in MLflow: {one_line(error)}", file=sys.stderr, flush=True)

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps nothing of ours."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored from Tune's state."""

    def __reduce__(self) -> Any:
        return object, ()


def _last(events: Iterable[Event]) -> Any:
    """The value of the last of them, None of none."""
    return next((event.value for event in reversed(list(events))), None)


class _Reports(TuneReportCallback):
    """Ray Train workers' epochs, for Tune."""

    def __init__(self, send: Callable[[Mapping[str, float], Callable[[dict], None]], None]) -> None:
        super().__init__()
        self._send = send

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called in Train's controller once all workers have reported."""
        self._send(metrics[0], lambda found: super(_Reports, self).after_report(run_context, [found], None))


def _trial(
    config: dict[str, Any],
    *,
    sweep: Sweep,
    workers: WorkerSettings,
    cpus: float,
    tags: dict[str, str],
    console: Any,
    environment: dict[str, str],
) -> None:
    """One trial in its own process: the training of `jobs/train_openimages.py`, each epoch told to Tune.

    One that was interrupted first tells the epochs of its checkpoint, so that the scheduler decides on them, too.
    """
    os.environ.update(environment)
    trial = read_trial(sweep, config["number"])
    training = sweep.training(trial.number, trial.point)
    settings, folder = training.settings, sweep.run_folder(trial.number)
    begun = storage.exists(storage.join(folder, "run.json"))
    run = dataclasses.replace(settings.run, resume=begun, mlflow=False)  # the driver follows all journals
    settings = dataclasses.replace(settings, workers=workers, run=run)
    say = functools.partial(_say, console, training.name)
    send = functools.partial(_send, heads=settings.linear_init.epochs, last=settings.all_epochs)
    for figures in history_in(folder):
        send(figures, tune.report)

    def launch(settings: TrainSettings, run_folder: str) -> Result:
        if workers.num_workers:
            return train_on_ray(settings, run_folder, say=say, callbacks=[_Reports(send)])
        torch.set_num_threads(max(1, int(cpus)))
        world = current_world() if ray.get_gpu_ids() else World()
        watcher = Watcher(
            Journal(run_folder, "rank0"),
            say,
            epoch_done=lambda figures: send(figures, tune.report),
            meter=RayMeter(settings.run.name, world.rank),
        )
        return train(settings, world, watcher)

    try:
        own = {"trial": str(trial.number), POINT_TAG: said_point(trial.point)}
        train_run(settings, say=say, tags={**tags, **own}, again=AGAIN, launch=launch)
        epoch, score, more = settings.epochs, scores_in(folder)[-1], {}
    except PamlError as error:  # starting again would only repeat it, and Tune starts whatever raises again
        epoch, score, more = len(scores_in(folder)) + 1, -1.0, {"failed": str(error)}
    tune.report({TIME: epoch, METRIC: score, **more})


def _say(console: Any, name: str, line: str) -> None:
    console.say.remote(f"{name}: {line}")


def _send(figures: Mapping[str, float], tell: Callable[[dict], None], *, heads: int, last: int) -> None:
    """Tell Tune of an epoch, but not of the last: that stands for the whole, and Tune ends a trial when it hears it."""
    if not is_of_head(figures) and figures["epoch"] < last:
        tell({TIME: int(figures["epoch"]) - heads, METRIC: score_of(figures)})


def _report(sweep: Sweep, trials: Mapping[int, Trial], journal: Journal) -> None:
    """The table on the console, and table, pictures and recipe in the folder and the journal."""
    ended = list(trials.values())
    text = as_text(sweep, ended)
    print(f"\ntrials of {sweep.settings.name}, validation mAP in percent\n{text}\n", flush=True)
    files = {"trials.txt": f"{text}\n".encode(), "trials.csv": as_csv(sweep, ended).encode()}
    files |= draw_pictures(sweep, ended)
    best = best_trial(ended)
    path = storage.join(sweep.folder, "best.yaml")
    if best is not None:
        files["best.yaml"] = best_recipe(sweep, best, ended, path).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(sweep.folder, name), data)
        kind = {"png": "figures", "yaml": "recipes"}.get(name.rpartition(".")[2], "tables")
        journal.artifact_bytes(data, f"{kind}/{name}")
    if best is not None:
        score = f"val mAP {100 * best.score:.2f}"
        print(f"best: trial {best.number}, {score}; train {path} to score the test split", flush=True)
    journal.note(as_note(sweep, ended, said_command(), path if best is not None else None))
    failed = [trial for trial in ended if trial.state == "failed"]
    for trial in failed:
        print(f"trial {trial.number} FAILED: {trial.error}", file=sys.stderr, flush=True)
    if any(not trial.lasting for trial in failed):
        print(f"{AGAIN} with those whose process was lost", file=sys.stderr, flush=True)
