"""MLflow's model registry: a run's final model becomes `candidate`, and `champion` if its test score is higher."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from paml.errors import DataError, SettingsError
from paml.metrics import read_pairs
from paml.models.backbones import check_takes_images
from paml.runs.folder import pairs_path, read_result, settings_of_run
from paml.tracking import sync
from paml.tracking.mlflow_sink import MlflowSink, bounded_calls, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
_TAG = "paml."
_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegisterSettings:
    """Register the final model of a run in MLflow."""

    run: str
    """Folder of a finished run."""
    name: str = "paml"
    """Name of the registered model."""
    tracking_uri: str | None = None
    """MLflow server or file; null uses MLFLOW_TRACKING_URI, else where the run was sent last."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/:'\""):
            raise SettingsError(f"name is {self.name!r}; it must not be empty or contain / : ' or \"")

    @property
    def command(self) -> str:
        """The command that registers the model."""
        return f"paml register --run {shlex.quote(self.run)} --name {shlex.quote(self.name)}"


@dataclasses.dataclass(frozen=True)
class TestScore:
    """The score that models are compared by."""

    test: str
    """Digest of the test images and labels."""
    convention: str
    """How the mean is taken; scores of different conventions cannot be compared."""
    map: float
    """Mean average precision, a fraction."""

    __test__ = False  # not a pytest class


class Registered(NamedTuple):
    """A registered model version."""

    version: str
    champion: bool
    """Whether the version is now the champion."""
    reason: str
    """Why it is or is not."""


def register_run(settings: RegisterSettings, log: Callable[[str], None] = print) -> Registered:
    """Register a finished run's final model and log the outcome. Raises as `score_of_run` and `register_model` do."""
    check_takes_images(settings_of_run(settings.run).model, settings.run)
    model = register_model(settings.run, settings.name, score_of_run(settings.run), settings.tracking_uri)
    role = "candidate and champion" if model.champion else "candidate, not champion"
    log(f"registered {settings.run} as {settings.name} version {model.version}: {role} ({model.reason})")
    return model


def score_of_run(run_folder: str) -> TestScore:
    """The test score of a finished run at its boost.eval. Raises DataError if it has none."""
    alpha = f"{settings_of_run(run_folder).boost.eval:g}"
    try:
        scores = read_result(run_folder).test[alpha]
        _, metadata = read_pairs(pairs_path(run_folder, alpha))
    except (FileNotFoundError, KeyError) as error:
        raise DataError(
            f"{run_folder} has no test score for alpha {alpha}: finish the run with a data.test_split"
        ) from error
    return TestScore(f"{metadata['split']}-{metadata['labels']}"[:200], scores.convention, scores.map)


def register_model(run_folder: str, name: str, score: TestScore, tracking_uri: str | None = None) -> Registered:
    """Send the run's journal to MLflow, register its newest final model and set the aliases.

    The version becomes `candidate`. It becomes `champion` if there is none, or if its mAP is higher on the same test
    split under the same convention. A model that is already registered keeps its version.

    Raises DataError if the run has no final model, SettingsError if there is no server, and whatever MLflow raises.
    """
    sink = sync(run_folder, tracking_uri, tracker="mlflow").sink
    assert isinstance(sink, MlflowSink)
    with bounded_calls(_TIMEOUT_S):
        client = connect(sink.tracking_uri)
        model = _newest_model(client, sink, run_folder)
        version = _version(client, name, model, sink.run_id, score)
        client.set_registered_model_alias(name, CANDIDATE, version)
        champion, reason = _beats_champion(client, name, version, score)
        if champion:
            client.set_registered_model_alias(name, CHAMPION, version)
    return Registered(version, champion, reason)


def _newest_model(client: MlflowClient, sink: MlflowSink, run_folder: str) -> Any:
    of_run = f"source_run_id = '{sink.run_id}'"
    models = client.search_logged_models([sink.experiment_id], filter_string=of_run)
    ready = [model for model in models if model.status == "READY"]
    if not ready:
        raise DataError(f"{run_folder} has no final model in MLflow: finish the run first")
    return max(ready, key=lambda model: model.creation_timestamp)


def _version(client: MlflowClient, name: str, model: Any, run_id: str, score: TestScore) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(_TAG + "model_id") == model.model_id:
            return str(version.version)
    tags = {"model_id": model.model_id, "test": score.test, "convention": score.convention, "test_map": repr(score.map)}
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id,
        tags={_TAG + key: value for key, value in tags.items()},
        model_id=model.model_id,
    )
    return str(version.version)


def _beats_champion(client: MlflowClient, name: str, version: str, score: TestScore) -> tuple[bool, str]:
    current = client.get_registered_model(name).aliases.get(CHAMPION)
    if current is None:
        return True, "there was no champion"
    if str(current) == version:
        return True, "it already is the champion"
    tags = client.get_model_version(name, current).tags
    test, convention, test_map = (tags.get(_TAG + key) for key in ("test", "convention", "test_map"))
    if test is None or test_map is None:
        return False, f"the champion, version {current}, was not registered by paml, so its test split is unknown"
    if test != score.test:
        return False, f"the champion, version {current}, was scored on another test split: score both on the same one"
    if convention != score.convention:
        return False, f"the champion, version {current}, was scored with another convention: {convention}"
    champion_map = float(test_map)
    better = score.map > champion_map or (math.isnan(champion_map) and not math.isnan(score.map))
    return better, f"test mAP {100 * score.map:.2f} % against {100 * champion_map:.2f} % of version {current}"
