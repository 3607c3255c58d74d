"""MLflow's model registry: a run's final model as a version, with the aliases `candidate` and `champion`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from paml.errors import DataError
from paml.tracking.follower import replay
from paml.tracking.view import connect, own_calls

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
_TAG = "paml."
_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class TestScore:
    """What two models are compared by."""

    test: str
    """Digest of the images and labels that were scored."""
    convention: str
    """Of the mean, in words: means of different conventions do not compare."""
    map: float
    """Mean average precision, a fraction."""

    __test__ = False  # pytest would take the name for a test's


class Registered(NamedTuple):
    """What became of a model in the registry."""

    version: str
    tracking_uri: str
    champion: bool
    """Whether it is the champion now."""
    why: str
    """Why it is or is not, in words."""


def register_model(run_folder: str, name: str, score: TestScore, tracking_uri: str | None = None) -> Registered:
    """Send the run's journal to MLflow, register its newest final model, and set the aliases.

    The version becomes `candidate`; it becomes `champion` where there is none, or where its mAP is higher on the same
    test by the same convention. A model that is registered already keeps its version. Raises DataError where the run
    has no final model, ValueError without a store, and what MLflow raises.
    """
    report = replay(run_folder, tracking_uri)
    with own_calls(_TIMEOUT_S):
        client = connect(report.tracking_uri)
        model = _newest_model(client, report.run_id, run_folder)
        version = str(_version(client, name, model, report.run_id, score))
        client.set_registered_model_alias(name, CANDIDATE, version)
        champion, why = _beats_champion(client, name, version, score)
        if champion:
            client.set_registered_model_alias(name, CHAMPION, version)
    return Registered(version, report.tracking_uri, champion, why)


def _newest_model(client: MlflowClient, run_id: str, run_folder: str) -> Any:
    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    ready = [model for model in found if model.status == "READY"]
    if not ready:
        raise DataError(f"{run_folder} has no final model in MLflow: a run has one once it has ended well")
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
            return version.version
    tags = {"model_id": model.model_id, "test": score.test, "convention": score.convention, "test_map": repr(score.map)}
    made = client.create_model_version(
        name,
        model.artifact_location,
        run_id,
        tags={_TAG + key: value for key, value in tags.items()},
        model_id=model.model_id,
    )
    return made.version


def _beats_champion(client: MlflowClient, name: str, version: str, score: TestScore) -> tuple[bool, str]:
    held = client.get_registered_model(name).aliases.get(CHAMPION)
    if held is None:
        return True, "there was no champion"
    if str(held) == str(version):
        return True, "it was the champion already"
    champion = client.get_model_version(name, held)
    other = {key: champion.tags.get(_TAG + key) for key in ("test", "convention", "test_map")}
    if other["test"] is None or other["test_map"] is None:
        return False, f"the champion, version {held}, was not registered by paml: its test is not known"
    if other["test"] != score.test:
        return False, f"the champion, version {held}, was scored on another test: score both on the same one"
    if other["convention"] != score.convention:
        return False, f"the champion, version {held}, was scored by another convention: {other['convention']}"
    theirs = float(other["test_map"])
    figures = f"test mAP {100 * score.map:.2f} % against {100 * theirs:.2f} % of version {held}"
    better = score.map > theirs or (math.isnan(theirs) and not math.isnan(score.map))
    return better, figures
