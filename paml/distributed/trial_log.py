"""Ray Tune's searcher for a sweep: gives Tune the trials to run, and keeps their records, journals and trackers."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from ray import tune
from ray.tune.search import Searcher

from paml.compare.space import STATES, Trial, count_states
from paml.compare.sweep import Sweep, next_point, read_scores, write_trial
from paml.compare.sweep_report import as_note, best_by_method, format_point
from paml.distributed.cluster import print_line, print_to_stderr
from paml.distributed.many_runs import mark_killed
from paml.distributed.ray_train import last_line
from paml.progress import format_duration
from paml.report import command_line
from paml.runs.folder import is_finished
from paml.runs.journal import END_STATUSES, Journal, read_journal
from paml.tracking import Trackers, start_trackers, try_sync

METRIC, TIME = "val_mAP", "epoch"
"""Keys of the results that trials report to Tune."""
STATE_TAG, POINT_TAG = "trial_state", "trial_point"
"""Tags of a trial's run."""
_CLOSE_SECONDS = 30.0


class _ErrorCallback(tune.Callback):
    """Reports trials that Tune does not retry any more."""

    def __init__(self, trial_log: "TrialLog") -> None:
        self._trial_log = trial_log

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error() or "its process was lost"
        self._trial_log.end(trial.config["number"], "failed", last_line(error))

    def __reduce__(self) -> Any:
        return object, ()


class TrialLog(Searcher):
    """The trials of a sweep, in the driver. Tune's pickled copies are empty: nothing is restored from Tune's state."""

    def __init__(self, sweep: Sweep, trials: dict[int, Trial], journal: Journal, tags: dict[str, str]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.sweep, self.trials, self.tags = sweep, trials, tags
        self.error_callback = _ErrorCallback(self)
        self._journal = journal
        retried = ("running", False), ("failed", False)
        self._unfinished = sorted(n for n, trial in trials.items() if (trial.state, trial.permanent) in retried)
        self._numbers: dict[str, int] = {}
        self._started: dict[int, float] = {}
        self._trackers: dict[int, Trackers] = {}
        self._threads: list[threading.Thread] = []
        ended = [number for number, trial in trials.items() if trial.state in ("finished", "stopped")]
        self._in_thread(self._complete_earlier, ended)

    def num_due(self) -> int:
        """Trials that remain to be run."""
        return len(self._unfinished) + max(0, len(self.sweep.settings.schedule) - len(self.trials))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Ignores Tune's own search space."""
        return True

    def suggest(self, trial_id: str) -> dict | None:
        """The next trial: first the interrupted ones, then new points."""
        if self._unfinished:
            number = self._unfinished.pop(0)
            trial = dataclasses.replace(self.trials[number], state="running", error=None)
        else:
            number = len(self.trials) + 1
            total = len(self.sweep.settings.schedule)
            point = next_point(self.sweep, number, self.trials) if number <= total else None
            if point is None:
                return Searcher.FINISHED  # pyright: ignore[reportReturnType]
            trial = Trial(number, point, "running", method=self.sweep.method(number))
        write_trial(self.sweep, trial)
        self.trials[number], self._numbers[trial_id], self._started[number] = trial, number, time.monotonic()
        self._trackers[number] = start_trackers(self.sweep.settings.trackers, self.sweep.run_folder(number))
        return {"number": number}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Store a trial's score, for the next points."""
        number = self._numbers[trial_id]
        trial, epoch = self.trials[number], result[TIME]
        if "failed" not in result and epoch == len(trial.scores) + 1:
            self.trials[number] = dataclasses.replace(trial, scores=(*trial.scores, result[METRIC]))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Record a trial that has finished, was stopped by the scheduler, or cannot succeed."""
        if error or result is None:
            return  # handled by error_callback
        number = self._numbers[trial_id]
        if "failed" in result:
            self.end(number, "failed", result["failed"], permanent=True)
        else:
            self.end(number, "finished" if is_finished(self.sweep.run_folder(number)) else "stopped")

    def end(
        self,
        number: int,
        state: Literal["finished", "stopped", "failed"],
        error: str | None = None,
        permanent: bool = False,
    ) -> None:
        """Record the end of a trial."""
        if number not in self._started:
            return  # Tune may report the end of a trial twice
        trial = self.trials[number]
        trial = self.trials[number] = dataclasses.replace(
            trial,
            state=state,
            scores=read_scores(self.sweep.run_folder(number)) or trial.scores,
            seconds=trial.seconds + time.monotonic() - self._started.pop(number),
            error=error,
            permanent=permanent,
        )
        write_trial(self.sweep, trial)
        self._complete_journal(number)
        trials = list(self.trials.values())
        counts = dict.fromkeys(STATES, 0) | count_states(trials)
        num_ended = len(trials) - counts["running"]
        outcome = {"finished": "done", "stopped": f"stopped after epoch {len(trial.scores)}"}.get(state, "FAILED")
        score = f", val mAP {100 * trial.score:.2f} in epoch {trial.epoch}" if trial.scores else ""
        point = f"{trial.method + ', ' if trial.method else ''}{format_point(trial.point)}"
        print_line(
            f"[{num_ended}/{len(self.sweep.settings.schedule)} trials] trial {number}: {outcome}{score} "
            f"({format_duration(trial.seconds)}; {point}){f': {error}' if error else ''}"
        )
        self._journal.note(as_note(self.sweep, trials, command_line(), done=False))
        metrics = {f"trial/{name}": float(count) for name, count in counts.items()}
        if best := best_by_method(self.sweep, trials):
            metrics["best_val_mAP"] = max(trial.score for trial in best.values())
        self._journal.metrics(metrics, num_ended)
        self._in_thread(self._trackers.pop(number).close, _CLOSE_SECONDS)

    def _complete_journal(self, number: int) -> None:
        """Add how the trial ended, to filter by, and the run's status if its process was stopped or lost."""
        trial, folder = self.trials[number], self.sweep.run_folder(number)
        last = {(event.kind, event.key): event.value for event in read_journal(folder, unreadable={})}
        status = last.get(("status", ""))
        if status is None:
            return  # it failed before it opened the journal
        journal = Journal(folder, "sweep")
        if last.get(("tag", STATE_TAG)) != trial.state:
            stopped = {"sweep.stopped_after_epoch": str(len(trial.scores))} if trial.state == "stopped" else {}
            journal.tags({STATE_TAG: trial.state, **stopped})
            if trial.scores:
                journal.metrics({"best_val_mAP": trial.score}, trial.epoch)
        if status not in END_STATUSES:
            journal.status("FAILED" if trial.state == "failed" else "FINISHED")

    def mark_killed(self) -> None:
        """Set the status of the running trials to KILLED in their journals."""
        mark_killed(self.sweep.run_folder(number) for number in self._started)

    def close(self) -> None:
        """Wait until the trackers are up to date."""
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call it without blocking Tune."""
        thread = threading.Thread(target=function, args=arguments, name="trackers", daemon=True)
        thread.start()
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    def _complete_earlier(self, numbers: list[int]) -> None:
        """Complete the journals and trackers of trials that ended just before a kill."""
        for number in numbers:
            write_trial(self.sweep, self.trials[number])
            self._complete_journal(number)
            for tracker in self.sweep.settings.trackers:
                try_sync(self.sweep.run_folder(number), tracker, print_to_stderr)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __reduce__(self) -> Any:
        return object, ()
