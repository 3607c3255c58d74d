"""A training run as people start it: its folder, its journal, its workers, its report.

The driver owns the journal's frame (settings, status) and MLflow; rank 0 of the workers owns the figures.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paml import __version__, storage
from paml.distributed import cluster
from paml.errors import SettingsError, Stopped
from paml.explain.gallery import draw_gallery, gallery_html, shown_epochs
from paml.explain.panel import PanelRow, draw_map_panel
from paml.metrics import Scores, score_table, write_per_class
from paml.predict.predictor import ModelFacts, write_model_folder
from paml.predict.register import RegisterSettings, register_run
from paml.reading import read_facts, reading
from paml.secrets import without_keys
from paml.tracking import Journal, MlflowFollower, SystemSampler
from paml.tracking.figures import rejected_by_epoch_figure
from paml.tracking.model import final_model
from paml.training.checkpoint import committed
from paml.training.data import RunData, Split, open_data
from paml.training.loop import Result, Watcher, pairs_path, run_folder_of, terminal_bar, train
from paml.training.meter import say_places
from paml.training.reject_rate import with_reject_rate
from paml.training.score_run import load_model
from paml.training.settings import TrainSettings, at_absolute_paths, flatten, refuse_other_settings
from paml.training.watched import kept_maps, watched_labels
from paml.training.world import World

EPOCHS_SHOWN = 8
"""Of which the panel of maps has a column each."""


def run_training(settings: TrainSettings) -> int:
    """Train as `settings` say and leave a finished run: journal, checkpoints, tables, figure, final model, MLflow.

    Returns 0. Raises PamlError for what the user has to mend; a stop exits with 128 + signal. The journal then
    says FAILED or KILLED, and `--run.resume true` goes on from the newest checkpoint.
    """
    settings = at_absolute_paths(settings, cluster.base_folder())
    follower = train_run(settings)
    if follower is not None:
        shown = without_keys(follower.tracking_uri)
        print(f"MLflow: {shown}, experiment {settings.run.experiment}, run {follower.run_id}")
    if settings.run.register is not None:
        register = RegisterSettings(run=run_folder_of(settings), name=settings.run.register)
        if follower is None:
            print(f"not registered, since MLflow is away; later: {register.command}", flush=True)
        else:
            register_run(dataclasses.replace(register, tracking_uri=follower.tracking_uri))
    return 0


def train_run(
    settings: TrainSettings,
    *,
    say: Callable[[str], None] = print,
    tags: Mapping[str, str] | None = None,
    last_epoch: int | None = None,
    again: str | None = None,
    launch: Callable[[TrainSettings, str], Result] | None = None,
) -> MlflowFollower | None:
    """`run_training` at absolute paths, alone or as one of many; returns the follower whose MLflow holds all of it.

    say: hears the run's lines (not those of Ray Train workers, which have a console of their own). tags: added to the
    run's own. last_epoch: as in `paml.training.loop.train`; it leaves no report.
    again: what to tell somebody who stops the run. launch: runs the loop, given settings and run folder, in the place
    of what `settings.workers` says. Raises as `run_training` does.
    """
    run_folder = run_folder_of(settings)
    data = open_data(settings.data)
    settings = with_reject_rate(settings, data, say)
    claim_run(settings, run_folder)
    journal = Journal(run_folder, "driver")
    follower = sampler = None
    if settings.workers.num_workers > 0:
        from paml.distributed.ray_train import connect

        connect(settings.workers)  # before stopping: ray.init takes the signals for itself
    with stopping() as signals:
        try:
            _open_journal(journal, settings, data, tags or {})
            if settings.run.mlflow:
                follower = MlflowFollower(run_folder, storage_root=settings.run.storage)
            sampler = SystemSampler(journal, settings.run.system_seconds) if settings.run.system_seconds else None
            result = launch(settings, run_folder) if launch else _train(settings, run_folder, say, last_epoch)
            if sampler is not None:
                sampler.close()
            if last_epoch is None:
                _report(result, settings, data, run_folder, journal)
                storage.write_bytes(storage.join(run_folder, "result.json"), json.dumps(result.to_json()).encode())
            storage.remove_temporaries(run_folder)  # of workers that were killed over a write
            journal.status("FINISHED")
        except SystemExit:  # Ray Tune ends a trial between two epochs: the sweep knows why, and notes it
            if sampler is not None:
                sampler.close()
            raise
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            journal.status("KILLED")
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for MLflow
            if follower is not None:
                submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # `ray job stop` leaves three seconds
                follower.close(timeout=1.5 if submitted else 15.0)
            again = again or f"go on with --run.resume true --run.name {settings.run.name}"
            print(f"stopped; {again}", file=sys.stderr, flush=True)
            raise SystemExit(128 + (signals[0] if signals else signal.SIGINT)) from None
        except BaseException:
            journal.status("FAILED")
            if follower is not None:
                follower.close(timeout=10.0)
            raise
    return follower if follower is not None and follower.close() == 0 else None


def claim_run(settings: TrainSettings, run_folder: str) -> None:
    """Refuse a name that is taken unless the run is to be resumed; refuse to resume what is not there, but for `auto`.

    Raises SettingsError, also where a resumed run's settings differ in what decides the computation.
    """
    storage.ensure_writable(run_folder)
    mark = storage.join(run_folder, "run.json")
    there = settings.run.resume and storage.exists(mark)
    if there or settings.run.resume is True:
        if not there:
            raise SettingsError(f"there is no run {run_folder} to resume; leave run.resume out to begin it")
        mend = "copy the run again, or begin a run of another run.name"
        stored = read_facts(mark, mend)
        with reading(mark, mend):
            refuse_other_settings(stored["settings"], settings)
        storage.remove_temporaries(run_folder)
        return
    facts = {"schema_version": 1, "paml": __version__, "settings": flatten(settings)}
    try:
        storage.write_bytes(mark, json.dumps(facts, indent=1).encode(), if_absent=True)
    except FileExistsError as error:
        newest = committed(run_folder)[-1:] or ["none"]
        raise SettingsError(
            f"a run {run_folder} exists (newest checkpoint: {newest[0]}). Give --run.resume true to go on with it, "
            "another --run.name to begin a new one, or remove the folder"
        ) from error


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C become Stopped; yields the signals so far. `ray job stop` leaves three seconds.

    Signals are the main thread's: in any other one nothing changes.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(settings: TrainSettings, run_folder: str, say: Callable[[str], None], last_epoch: int | None) -> Result:
    if settings.workers.num_workers > 0:
        from paml.distributed.ray_train import train_on_ray

        return train_on_ray(settings, run_folder, last_epoch)
    say_places()
    watcher = Watcher(journal=Journal(run_folder, "rank0"), say=say, bar=terminal_bar)
    return train(settings, World(), watcher, last_epoch)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            found[f"version.{name}"] = version(name)
    return {"version.paml": __version__, "version.python": sys.version.split()[0], **found}


def _open_journal(journal: Journal, settings: TrainSettings, data: RunData, more: Mapping[str, str]) -> None:
    tags = {
        "dataset": settings.data.root.rstrip("/").rsplit("/", 1)[-1],
        "method": settings.loss.name + ("+boost" if settings.boost.train > 1 else ""),
        "backbone": settings.model.backbone,
        **_versions(),
        **more,
    }
    submission = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    if "job_submission_id" in submission:
        tags["ray_job"] = submission["job_submission_id"]
    journal.run(experiment=settings.run.experiment, name=settings.run.name, tags=tags, note=_note(settings, data))
    journal.settings(dataclasses.asdict(settings))
    for split in data.splits:
        journal.dataset(
            name=split.name,
            digest=_data_digest(split),
            source=split.manifest.folder,
            context={"train": "training"}.get(split.name, split.name),
            profile={"images": len(split.samples), "annotations": split.table.num_annotations},
        )


def said_command() -> str:
    """The command that started this process, from the top of the repository."""
    return without_keys(shlex.join(["python", f"jobs/{Path(sys.argv[0]).name}", *sys.argv[1:]]))


def _note(
    settings: TrainSettings,
    data: RunData,
    rows: Mapping[str, Scores] | None = None,
    result: Result | None = None,
) -> str:
    """What stands at the head of the run's page, in Markdown: its scores, what it is, how to repeat it.

    The page shows five lines of it before a click, so the scores come first.
    """
    digests = ", ".join(f"{split.name} `{_data_digest(split)}`" for split in data.splits)
    versions = ", ".join(f"{name.removeprefix('version.')} {version}" for name, version in _versions().items())
    maps = [f"**test mAP {100 * scores.map:.2f}** ({name})" for name, scores in (rows or {}).items()]
    maps += [
        f"**validation mAP {100 * found['map']:.2f}** (alpha {alpha}, epoch {found['epoch']})"
        for alpha, found in (result.best if result else {}).items()
    ]
    unscored = "No test scores yet." if data.test is not None else "The test split is not opened."
    parts = [
        "; ".join(maps) or unscored,
        f"**{settings.loss.name}**, boost {settings.boost.train:g} in training and {settings.boost.eval:g} in scoring, "
        f"{settings.model.backbone} at {data.image_size} px, on `{settings.data.root}` "
        f"({len(data.train.samples):,} images, {len(data.classes):,} classes).",
        f"**Repeat:** `{said_command()}`; every setting is in the artifact `settings.yaml`.",
        f"**Data** (digests of shards and labels): {digests}.",
        f"**Versions:** {versions}.",
    ]
    if result is not None and (rejected := _said_rejected(result, f"{settings.boost.eval:g}")):
        parts.insert(1, rejected)
    if rows:
        table = score_table(dict(rows))
        parts.append(f"Test scores in percent, each alpha's epoch chosen on validation:\n\n```\n{table}\n```")
    return "\n\n".join(parts)


def _said_rejected(result: Result, alpha: str) -> str | None:
    """What rejection did in the best epoch, and where to look at it; None where a run rejects nothing."""
    best = result.best.get(alpha, {}).get("epoch")
    figures = next((one for one in result.history if one["epoch"] == best), {})
    if "rejection/rejected" not in figures:
        return None
    shares = {
        "precision": "of them {:.0f} % truly positive",
        "recall": "{:.0f} % of all false negatives",
        "probe_recall": "recall by the probe {:.0f} %",
        "probe_false_rejection": "false rejection by the probe {:.1f} %",
    }
    known = {name: figures.get(f"rejection/{name}", math.nan) for name in shares}
    said = [shares[name].format(100 * value) for name, value in known.items() if not math.isnan(value)]
    head = f"**{figures['rejection/rejected']:,.0f} labels rejected** in that epoch"
    return ", ".join([head, *said]) + "; which ones: `rejected_labels.html` among the artifacts, and `figures/`."


def _data_digest(split: Split) -> str:
    return f"{split.manifest.digest[:16]}-{split.table.digest[:16]}"


def _report(result: Result, settings: TrainSettings, data: RunData, run_folder: str, journal: Journal) -> None:
    """The score table on the console, and every artifact into the journal."""
    rows: dict[str, Scores] = {}
    for alpha, scores in result.test.items():
        best = result.best[alpha]
        rows[f"alpha {alpha}, epoch {best['epoch']}"] = scores
        path = storage.join(run_folder, "artifacts", f"test_per_class_alpha_{alpha}.parquet")
        write_per_class(path, scores, data.classes, data.names)
        journal.artifact(path, f"tables/test_per_class_alpha_{alpha}.parquet")
        journal.artifact(pairs_path(run_folder, alpha), f"tables/test_pairs_alpha_{alpha}.parquet")
    if rows:
        table = score_table(rows)
        print(f"\ntest scores of {settings.run.name}, in percent\n{table}\n", flush=True)
        journal.artifact_bytes(table.encode(), "tables/test_scores.txt")
    journal.note(_note(settings, data, rows, result))
    journal.artifact_bytes(json.dumps(_finite(result.history), indent=1).encode(), "tables/history.json")
    rejected = [
        {name.removeprefix("rejection/"): value for name, value in figures.items()} for figures in result.history
    ]
    if any("rejected" in figures for figures in rejected):
        path = storage.join(run_folder, "artifacts", "rejected_by_epoch.png")
        rejected_by_epoch_figure(rejected, path)
        journal.artifact(path, "figures/rejected_by_epoch.png")
    _report_rejected(settings, data, run_folder, len(result.history), journal)
    _report_maps(settings, data, run_folder, len(result.history), journal)
    _final_model(result, settings, data, run_folder, journal)


def _report_rejected(settings: TrainSettings, data: RunData, run_folder: str, epochs: int, journal: Journal) -> None:
    """What was rejected, to be looked at: a figure, and a page with more of it."""
    shown = shown_epochs(run_folder, data.train, epochs, settings.seed)
    if not shown:
        return
    path = storage.join(run_folder, "artifacts", "rejected_labels.png")
    draw_gallery(shown, path)
    journal.artifact(path, "figures/rejected_labels.png")
    journal.artifact_bytes(gallery_html(settings.run.name, shown).encode(), "rejected_labels.html")


def _report_maps(settings: TrainSettings, data: RunData, run_folder: str, epochs: int, journal: Journal) -> None:
    """The watched labels' maps side by side: of every epoch, or of some evenly spread ones with the first and last."""
    shown = np.unique(np.linspace(1, epochs, min(epochs, EPOCHS_SHOWN)).round().astype(int)).tolist()
    kept = {epoch: maps for epoch in shown if (maps := kept_maps(run_folder, epoch))}
    if not kept:
        return
    labels = watched_labels(data.validation, data.image_size, settings.seed)
    rows = [
        PanelRow(label.pixels, data.names[label.cls], [maps[place] for maps in kept.values()])
        for place, label in enumerate(labels[: min(map(len, kept.values()))])
    ]
    path = storage.join(run_folder, "artifacts", "maps_by_epoch.png")
    draw_map_panel([f"epoch {epoch}" for epoch in kept], rows, path)
    journal.artifact(path, "figures/maps_by_epoch.png")


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _final_model(result: Result, settings: TrainSettings, data: RunData, run_folder: str, journal: Journal) -> None:
    """The best epoch's scored weights, ready for inference: a model folder, and a pickle-free MLflow model of it."""
    alpha = settings.boost.eval
    best = result.best[f"{alpha:g}"]["checkpoint"]
    network = load_model(run_folder, settings, best)
    facts = ModelFacts(settings.model, alpha, data.classes, data.names, data.image_size, settings.run.name, best)
    folder = storage.join(run_folder, "model")
    write_model_folder(folder, network, facts, None)
    final_model(journal, model=folder)
