"""The run folder: `<run.storage>/<run.name>`, its files, and who may write to it.

run.json holds the settings that the run started with and reserves its name. result.json marks a finished run.
"""

import dataclasses
import json
import re
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from paml import __version__, storage
from paml.errors import DataError, SettingsError
from paml.metrics import Scores, write_pairs
from paml.parsing import parse_errors_as, read_json
from paml.settings import flatten, unflatten
from paml.training.checkpoint import list_checkpoints
from paml.training.result import Result
from paml.training.settings import TrainSettings, check_same_settings


def pairs_path(run_folder: str, alpha: str) -> str:
    """Parquet file of the scored pairs of the test split for one alpha, such as "5"."""
    return storage.join(run_folder, "artifacts", f"test_pairs_alpha_{alpha}.parquet")


def per_class_path(run_folder: str, alpha: str) -> str:
    """Parquet file of the test scores per class for one alpha."""
    return storage.join(run_folder, "artifacts", f"test_per_class_alpha_{alpha}.parquet")


def claim_run(settings: TrainSettings) -> TrainSettings:
    """Reserve the run's name by writing run.json, or check that the run can be resumed.

    Returns the settings with `run.name` and `run.experiment` filled in. A null name becomes the first free one of
    `mine`, `mine-2`, ..., for data in a folder `mine`.

    Raises SettingsError if the name is taken and `run.resume` is false, if there is no run to resume (except with
    `auto`), or if a resumed run's settings differ in anything that changes the computation.
    """
    dataset = re.sub(r"[^\w.-]+", "-", settings.data.root.rstrip("/").rpartition("/")[2]).strip("-.") or "run"
    settings = _with_run(settings, experiment=settings.run.experiment or dataset)
    if settings.run.name is not None:
        _claim(settings)
        return settings
    if settings.run.resume:
        raise SettingsError(f"run.resume is {settings.run.resume}, but run.name is null: set run.name to the run")
    named, number = _with_run(settings, name=dataset), 1
    storage.ensure_writable(named.run.folder)
    while not _write_run_file(named):
        number += 1
        named = _with_run(settings, name=f"{dataset}-{number}")
    return named


def _with_run(settings: TrainSettings, **changes: str) -> TrainSettings:
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, **changes))


def _claim(settings: TrainSettings) -> None:
    folder = settings.run.folder
    storage.ensure_writable(folder)
    path, hint = storage.join(folder, "run.json"), "copy the run again, or start a new one with another run.name"
    exists = bool(settings.run.resume) and storage.exists(path)
    if settings.run.resume is True and not exists:
        raise SettingsError(f"there is no run {folder} to resume: set run.resume to false to start it")
    if exists:
        stored = read_json(path, hint)
        with parse_errors_as(path, hint):
            check_same_settings(stored["settings"], settings)
        storage.remove_temporaries(folder)
    elif not _write_run_file(settings):
        newest = list_checkpoints(folder)[-1:] or ["none"]
        raise SettingsError(
            f"the run {folder} already exists (newest checkpoint: {newest[0]}). Set run.resume to true to continue it, "
            "set another run.name, or remove the folder"
        )


def _write_run_file(settings: TrainSettings) -> bool:
    content = {"schema_version": 1, "paml": __version__, "settings": flatten(settings)}
    path = storage.join(settings.run.folder, "run.json")
    try:
        storage.write_bytes(path, json.dumps(content, indent=1).encode(), if_absent=True)
    except FileExistsError:
        return False
    return True


def settings_of_run(run_folder: str) -> TrainSettings:
    """The settings that a run started with. Raises DataError if there is no run, or if run.json is damaged."""
    path, hint = storage.join(run_folder, "run.json"), "copy the run again"
    try:
        content = read_json(path, hint)
    except FileNotFoundError as error:
        raise DataError(f"{run_folder} is not a run (run.json is missing): give the folder <storage>/<name>") from error
    with parse_errors_as(path, hint):
        return unflatten(TrainSettings, content["settings"])


def save_pairs(run_folder: str, result: Result) -> None:
    """Write the scored test pairs of each alpha to `pairs_path`."""
    for alpha, pairs in result.test_pairs.items():
        num_classes = len(result.test[alpha].per_class)
        write_pairs(pairs_path(run_folder, alpha), pairs, num_classes, result.test_digests)


def is_finished(run_folder: str) -> bool:
    """Whether a run has trained to the end."""
    return storage.exists(storage.join(run_folder, "result.json"))


def read_result(run_folder: str) -> Result:
    """The result of a finished run. Raises FileNotFoundError, and DataError if result.json is damaged."""
    path, hint = storage.join(run_folder, "result.json"), "remove it and resume the run"
    content = read_json(path, hint)
    with parse_errors_as(path, hint):
        return Result.from_json(content)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A finished run: its folder, settings, metrics and scores."""

    folder: str
    settings: TrainSettings
    result: Result

    @classmethod
    def open(cls, folder: str) -> Self:
        """Open the folder of a finished run, local or s3://. Raises DataError if there is none."""
        settings = settings_of_run(folder)
        try:
            return cls(folder, settings, read_result(folder))
        except FileNotFoundError as error:
            raise DataError(f"the run {folder} is not finished: resume it with run.resume=true") from error

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of each epoch, such as {"epoch": 1, "train/loss": 0.02, "val/mAP": 0.61}."""
        return self.result.history

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation mAP at `settings.boost.eval`, from 1."""
        return self.result.best[self._alpha]["epoch"]

    @property
    def scores(self) -> dict[float, Scores]:
        """Test scores by alpha, each from the epoch chosen on validation; empty without a test split."""
        return {float(alpha): scores for alpha, scores in self.result.test.items()}

    def class_scores(self, alpha: float | None = None) -> pa.Table:
        """Test scores per class, one row each (`.to_pandas()`); `alpha` defaults to `settings.boost.eval`.

        Raises DataError if the run has no test scores for that alpha.
        """
        path = per_class_path(self.folder, self._alpha if alpha is None else f"{alpha:g}")
        try:
            return pq.read_table(pa.BufferReader(storage.read_bytes(path)))
        except FileNotFoundError as error:
            scored = ", ".join(self.result.test) or "none"
            raise DataError(f"{path} is missing: the test split was scored with alpha {scored}") from error

    @property
    def _alpha(self) -> str:
        return f"{self.settings.boost.eval:g}"

    def __repr__(self) -> str:
        best = self.result.best.get(self._alpha)
        parts = [f"{self.settings.loss.name}, boost {self.settings.boost.eval:g}", f"{len(self.history)} epochs"]
        if best is not None:
            parts.append(f"best epoch {best['epoch']}, validation mAP {100 * best['map']:.2f} %")
        if self._alpha in self.result.test:
            parts.append(f"test mAP {100 * self.result.test[self._alpha].map:.2f} %")
        return f"Run({self.folder!r}: {', '.join(parts)})"
