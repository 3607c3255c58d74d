"""Train a run: claim its folder, keep its journal, execute the training loop, handle stops and failures.

Needs neither Ray nor a tracker. Callers pass what comes from higher layers: how the loop is launched, the trackers
that mirror the journal, and the report on the result.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping

from paml import __version__, storage
from paml.metrics import write_per_class
from paml.runs.folder import Run, claim_run, per_class_path, save_pairs
from paml.runs.journal import Journal
from paml.runs.stopping import stopping
from paml.runs.system import SystemSampler
from paml.training.data import RunData, Split, open_data
from paml.training.embeddings import with_embeddings
from paml.training.hooks import RunHooks, terminal_progress
from paml.training.loop import train as run_loop
from paml.training.meter import log_positions
from paml.training.reject_rate import with_reject_rate
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.world import World

_VERSIONS_OF = ("torch", "torchvision", "ray", "numpy", "pyarrow")


@dataclasses.dataclass(frozen=True)
class RunContext:
    """A run in progress."""

    settings: TrainSettings
    """With name, experiment and reject rate filled in."""
    folder: str
    data: RunData
    journal: Journal


def train(
    settings: TrainSettings,
    *,
    launch: Callable[[TrainSettings], Result] | None = None,
    connect: Callable[[], None] | None = None,
    on_start: Callable[[RunContext], Callable[[float], object]] | None = None,
    on_end: Callable[[RunContext, Result], None] | None = None,
    log: Callable[[str], None] = print,
    tags: Mapping[str, str] | None = None,
    resume_hint: str | None = None,
) -> Run:
    """Train a run to its end, or resume it, and return it.

    Args:
        settings: with absolute paths if another process executes the loop.
        launch: executes the loop and returns its result; the default trains in this process.
        connect: called once the run is claimed, before signal handlers are installed.
        on_start: called once the journal is open, to follow it. Returns a function that is called when the run ends,
            with the seconds it may take.
        on_end: called with the result before the run counts as finished.
        log: receives the lines of the loop in this process.
        tags: added to the run's tags.
        resume_hint: tells a user who stops the run how to continue it.

    Raises PamlError for mistakes in settings or data. A stop exits with status 128 + signal. The journal ends with
    FINISHED, FAILED or KILLED.
    """
    data = open_data(settings.data)
    settings = claim_run(with_reject_rate(with_embeddings(settings, data), data, log))
    folder = settings.run.folder
    context = RunContext(settings, folder, data, Journal(folder, "driver"))
    if connect is not None:
        connect()
    close: Callable[[float], object] = _follow_nothing
    sampler: SystemSampler | None = None
    with stopping() as signals:
        try:
            _open_journal(context, tags or {})
            close = on_start(context) if on_start else close
            sampler = SystemSampler(context.journal)
            result = launch(settings) if launch else _train_here(context, log)
            sampler.close()
            _save(context, result, on_end)
            storage.remove_temporaries(folder)  # of workers killed during a write
            context.journal.status("FINISHED")
        except SystemExit:  # Ray Tune ends a trial this way; the sweep records why
            if sampler is not None:
                sampler.close()
            raise
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            context.journal.status("KILLED")
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the wait for trackers
            close(1.5 if is_ray_job() else 15.0)
            hint = resume_hint or f"continue with --run.resume true --run.name {settings.run.name}"
            print(f"stopped; {hint}", file=sys.stderr, flush=True)
            raise SystemExit(128 + (signals[0] if signals else signal.SIGINT)) from None
        except BaseException:
            context.journal.status("FAILED")
            close(10.0)
            raise
    close(30.0)
    return Run(folder, settings, result)


def _follow_nothing(timeout: float) -> None: ...


def is_ray_job() -> bool:
    """Whether this process was started by `ray job submit`, which allows three seconds after a stop."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _train_here(context: RunContext, log: Callable[[str], None]) -> Result:
    log_positions()
    hooks = RunHooks(record_metrics=Journal(context.folder, "rank0").metrics, log=log, progress=terminal_progress)
    return run_loop(context.settings, World(), hooks, data=context.data)


def _save(context: RunContext, result: Result, on_end: Callable[[RunContext, Result], None] | None) -> None:
    save_pairs(context.folder, result)
    for alpha, scores in result.test.items():
        write_per_class(per_class_path(context.folder, alpha), scores, context.data.classes, context.data.names)
    if on_end is not None:
        on_end(context, result)
    storage.write_bytes(storage.join(context.folder, "result.json"), json.dumps(result.to_json()).encode())


def _open_journal(context: RunContext, extra_tags: Mapping[str, str]) -> None:
    settings, journal = context.settings, context.journal
    tags = {
        "dataset": settings.data.root.rstrip("/").rsplit("/", 1)[-1],
        "method": settings.loss.name + ("+boost" if settings.boost.train > 1 else ""),
        "backbone": settings.model.backbone,
        **{f"version.{name}": version for name, version in versions().items()},
        **extra_tags,
    }
    submission = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    if "job_submission_id" in submission:
        tags["ray_job"] = submission["job_submission_id"]
    journal.run(experiment=str(settings.run.experiment), name=str(settings.run.name), tags=tags)
    journal.settings(dataclasses.asdict(settings))
    for split in context.data.splits:
        journal.dataset(
            split.name,
            digest=data_digest(split),
            source=split.manifest.folder,
            context={"train": "training"}.get(split.name, split.name),
            profile={"images": len(split.samples), "annotations": split.table.num_annotations},
        )


def versions() -> dict[str, str]:
    """Versions of paml, Python and the libraries that affect a result."""
    installed = {"paml": __version__, "python": sys.version.split()[0]}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def data_digest(split: Split) -> str:
    """Digests of a split's images and labels, 16 hex digits each."""
    return f"{split.manifest.digest[:16]}-{split.table.digest[:16]}"
