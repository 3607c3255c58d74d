"""MLflow as a tracker.

The server is asked what it has before anything is sent, and again after every failure. A lost reply, a server restored
from a backup or a second sync therefore duplicates nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paml import storage
from paml.errors import SettingsError
from paml.parsing import PARSE_ERRORS, parse_json_object, safe_join
from paml.redact import redact_credentials
from paml.runs.journal import CHARTS, NOTE_TAG, PARENT_TAG, Event
from paml.tasks import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

ID_TAG = "paml.journal"
CONTEXT_TAG = "mlflow.data.context"
CUT_MARK = " … [cut: whole in the artifact settings.yaml]"
TAG_NAMES = {NOTE_TAG: "mlflow.note.content", PARENT_TAG: "mlflow.parentRunId"}

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the UI open with runs and charts instead of the pages for language models."""

# Error codes for content that a server will never accept; after any other error a later attempt may succeed.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
_METRICS_PER_BATCH = 1000
_TEXTS_PER_BATCH = 50
_LARGE_FILE_TIMEOUT_S = 60


class MlflowSink:
    """One run in one MLflow server or SQLite file; see `paml.tracking.sink.Sink`."""

    environment: ClassVar[tuple[str, ...]] = ("MLFLOW_",)

    def __init__(self, run_folder: str, uri: str | None = None, *, timeout_s: int = 5) -> None:
        """`uri`: default MLFLOW_TRACKING_URI, else where the run was sent last, else mlflow.db next to the run."""
        self.run_folder, states = run_folder, read_state(run_folder)
        sent_to = [] if uri or os.environ.get("MLFLOW_TRACKING_URI") else list(states)
        folder = run_folder.rstrip("/").rpartition("/")[0] or "."
        self.tracking_uri = uri or (sent_to[-1] if sent_to else default_tracking_uri(folder))
        self.destination = redact_credentials(self.tracking_uri)
        self.refused: list[str] = []
        self.run_id = ""
        self.experiment_id = ""
        self._timeout_s = timeout_s
        self._state = states.get(self.destination, {})
        self._parent: Event | None = None

    def attach(self, identity: Event) -> None:
        """Find or create the run, and ask what the server has of it."""
        with bounded_calls(self._timeout_s):
            run = self._find(identity) or self._create(identity)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._metric_keys, self._metrics = set(run.data.metrics), dict[str, set[int]]()
        self._params, self._tags = set(run.data.params), dict(run.data.tags)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self._datasets = {(item.dataset.name, item.dataset.digest) for item in inputs}
        self._end = (run.info.status, run.info.end_time)
        if self._state.get("run_id") != self.run_id:
            self._state = {"run_id": self.run_id, "experiment_id": self.experiment_id, "artifacts": {}}
            self._write_state()

    def push(self, events: Sequence[Event]) -> None:
        """Send the events that the server does not have yet."""
        kinds: dict[str, list[Event]] = {}
        for event in events:
            kinds.setdefault(event.kind, []).append(event)
        with bounded_calls(self._timeout_s):
            for kind, size, send in (
                ("param", _TEXTS_PER_BATCH, self._push_params),
                ("tag", _TEXTS_PER_BATCH, self._push_tags),
                ("metric", _METRICS_PER_BATCH, self._push_metrics),
            ):
                of_kind = kinds.get(kind, [])
                for first in range(0, len(of_kind), size):
                    send(of_kind[first : first + size])
            for event in kinds.get("dataset", []):
                self._push_dataset(event)
            if "status" in kinds and self._end[0] != "RUNNING":
                self._client.update_run(self.run_id, "RUNNING")
                self._end = ("RUNNING", None)
            self._link_parent()
        # A server passes large files on to its own storage before it answers.
        with bounded_calls(max(_LARGE_FILE_TIMEOUT_S, self._timeout_s)):
            for event in kinds.get("artifact", []):
                self._push_artifact(event)
            for event in kinds.get("model", []):
                self._push_model(event)

    def finish(self, status: str, time_ms: int) -> None:
        """Set status and end time."""
        with bounded_calls(self._timeout_s):
            self._link_parent()
            if self._end != (status, time_ms):
                self._client.set_terminated(self.run_id, status, time_ms)
                self._end = (status, time_ms)

    def link(self) -> str:
        """The address of the run's page, or file and run for SQLite."""
        if self.destination.startswith("http"):
            return f"{self.destination.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{self.destination}, run {self.run_id}"

    @functools.cached_property
    def _client(self) -> MlflowClient:
        return connect(self.tracking_uri)

    def _find(self, identity: Event) -> Any:
        """The run, also in the experiment of an earlier `attach`, which may have another name now."""
        experiment = self._client.get_experiment_by_name(identity.value["experiment"])
        experiments = {self._state.get("experiment_id"), experiment and experiment.experiment_id} - {None}
        return self._search([str(one) for one in experiments], identity.key)

    def _search(self, experiments: list[str], journal: str) -> Any:
        """The run that mirrors a journal, or None."""
        runs = self._client.search_runs(experiments, f"tags.`{ID_TAG}` = '{journal}'") if experiments else []
        return runs[0] if runs else None

    def _create(self, identity: Event) -> Any:
        from mlflow.exceptions import MlflowException

        name = identity.value["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another run may create it at the same time
                database = _database_of(self.tracking_uri)
                location = database and (database.parent / "mlartifacts" / name.replace("/", "_")).as_uri()
                self._client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
            experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            raise RuntimeError(f"the experiment {name!r} cannot be created")
        return self._client.create_run(
            experiment.experiment_id,
            start_time=identity.time_ms,
            tags={ID_TAG: identity.key, "mlflow.source.name": "paml", "mlflow.source.type": "JOB"},
            run_name=identity.value["name"],
        )

    def _push_metrics(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        missing = [event for event in batch if event.step not in self._steps(event.key)]
        rows = [(event, Metric(event.key, event.value, event.time_ms, event.step)) for event in missing]
        self._send(rows, lambda metrics: self._client.log_batch(self.run_id, metrics=metrics, synchronous=True))
        for event in missing:
            self._metrics[event.key].add(event.step)

    def _steps(self, key: str) -> set[int]:
        if key not in self._metrics:
            history = self._client.get_metric_history(self.run_id, key) if key in self._metric_keys else []
            self._metrics[key] = {metric.step for metric in history}
        return self._metrics[key]

    def _push_params(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        missing = [event for event in batch if event.key not in self._params]
        rows = [(event, Param(event.key, cut(event.value, MAX_PARAM_VAL_LENGTH))) for event in missing]
        self._send(rows, lambda params: self._client.log_batch(self.run_id, params=params, synchronous=True))
        self._params.update(event.key for event in missing)

    def _push_tags(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import RunTag
        from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

        charts = child_charts_url(self.experiment_id, self.run_id)
        rows: dict[str, tuple[Event, RunTag]] = {}
        for event in batch:
            name = TAG_NAMES.get(event.key, event.key)
            value = cut(event.value.replace(CHARTS, charts), MAX_TAG_VAL_LENGTH)
            if event.key == PARENT_TAG:
                self._parent = event
            elif self._tags.get(name) != value:
                rows[name] = event, RunTag(name, value)
        self._send(list(rows.values()), lambda tags: self._client.log_batch(self.run_id, tags=tags, synchronous=True))
        self._tags |= {name: tag.value for name, (_, tag) in rows.items()}

    def _link_parent(self) -> None:
        """Nest the run under its parent, in the same experiment, once the server has that."""
        if self._parent is not None and (parent := self._search([self.experiment_id], self._parent.value)):
            self._client.set_tag(self.run_id, TAG_NAMES[PARENT_TAG], parent.info.run_id)
            self._parent = None

    def _push_dataset(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE

        value = event.value
        digest = value["digest"][:MAX_DATASET_DIGEST_SIZE]
        if (event.key, digest) in self._datasets:
            return
        source = json.dumps({"uri": value["source"]})
        profile = json.dumps({**value["profile"], "digest": value["digest"]})
        entity = Dataset(event.key, digest, source_type="paml", source=source, profile=profile)
        item = DatasetInput(entity, [InputTag(CONTEXT_TAG, value["context"])])
        self._send([(event, item)], lambda items: self._client.log_inputs(self.run_id, items))
        self._datasets.add((event.key, digest))

    def _push_artifact(self, event: Event) -> None:
        if self._state["artifacts"].get(event.key) == event.value["sha256"]:
            return
        folder, _, name = event.key.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = os.path.join(temporary, name)
            if self._fetch(event, event.value["file"], local):
                self._send([(event, local)], lambda _: self._client.log_artifact(self.run_id, local, folder or None))
        self._state["artifacts"][event.key] = event.value["sha256"]
        self._write_state()

    def _push_model(self, event: Event) -> None:
        from mlflow.models import Model

        client, files = self._client, sorted(event.value["files"].items())
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        same_run = f"source_run_id = '{self.run_id}' AND name = '{event.key}'"
        for logged in client.search_logged_models([self.experiment_id], filter_string=same_run):
            if logged.tags.get("paml.digest") == digest:
                if logged.status == "READY":
                    self._log_output(logged.model_id)
                    return
                client.delete_logged_model(logged.model_id)  # from an interrupted push
        with tempfile.TemporaryDirectory() as temporary:
            for file in event.value["files"]:
                local = safe_join(temporary, file)
                os.makedirs(os.path.dirname(local), exist_ok=True)
                if not self._fetch(event, f"{event.value['file']}/{file}", local):
                    return
            logged = client.create_logged_model(self.experiment_id, event.key, self.run_id, {"paml.digest": digest})
            about = Model.load(temporary)
            about.run_id, about.model_id, about.artifact_path = self.run_id, logged.model_id, logged.artifact_location
            about.save(os.path.join(temporary, "MLmodel"))
            client.log_model_artifacts(logged.model_id, temporary)
        client.finalize_logged_model(logged.model_id, "READY")
        self._log_output(logged.model_id)

    def _log_output(self, model_id: str) -> None:
        """Log a complete model as the run's output; an output cannot be removed after an interrupted push."""
        from mlflow.entities import LoggedModelOutput

        outputs = self._client.get_run(self.run_id).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])

    def _fetch(self, event: Event, file: str, local: str) -> bool:
        """Copy a file of the run to `local`; a missing one counts as refused."""
        path = safe_join(self.run_folder, file)
        if not storage.exists(path):
            self.refused.append(f"{event.kind} {event.key}: its file {path} is missing")
            return False
        storage.copy(path, local)
        return True

    def _send(self, rows: Sequence[tuple[Event, Any]], log: Callable[[list[Any]], object]) -> None:
        """Send the entities of events; if the server refuses them, halve them until the refused one is isolated."""
        from mlflow.exceptions import MlflowException

        if not rows:
            return
        try:
            log([entity for _, entity in rows])
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if self._client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise  # a deleted run refuses everything
            if len(rows) > 1:
                half = len(rows) // 2
                self._send(rows[:half], log)
                self._send(rows[half:], log)
            else:
                reason = redact_credentials(str(error).splitlines()[0])[:200]
                self.refused.append(f"{rows[0][0].kind} {rows[0][0].key}: {reason}")

    def _write_state(self) -> None:
        state = read_state(self.run_folder) | {self.destination: self._state}
        storage.write_bytes(storage.join(self.run_folder, "mlflow.json"), json.dumps(state, indent=1).encode())


def default_tracking_uri(storage_folder: str) -> str:
    """MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in a folder of runs.

    Raises SettingsError if there is neither, because the folder is not on a local disk.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if storage.is_remote(storage_folder):
        raise SettingsError(f"{storage_folder} is not a local folder: set MLFLOW_TRACKING_URI to an MLflow server")
    return f"sqlite:///{os.path.abspath(storage_folder)}/mlflow.db"


def child_charts_url(experiment_id: str, run_id: str) -> str:
    """Link within the MLflow UI to the charts of all child runs of a run, the best first.

    In the default order, by age, MLflow collapses the child runs and draws none of them.
    """
    parameters = {"searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'", "orderByKey": "metrics.`best_val_mAP`"}
    query = urllib.parse.urlencode(parameters, quote_via=urllib.parse.quote)
    return f"#/experiments/{experiment_id}/runs?{query}&orderByAsc=false&compareRunsMode=CHART"


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and CUT_MARK if it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - len(CUT_MARK)] + CUT_MARK


def read_state(run_folder: str) -> dict[str, dict[str, Any]]:
    """`<run>/mlflow.json`: tracking URI without credentials -> run_id, experiment_id and digests of sent artifacts.

    A missing or damaged file gives {}, since the run is found again by its tag.
    """
    try:
        stored = parse_json_object(storage.read_bytes(storage.join(run_folder, "mlflow.json")))
        return {
            redact_credentials(uri): {
                "run_id": str(state["run_id"]),
                "experiment_id": str(state["experiment_id"]),
                "artifacts": dict(state["artifacts"]),
            }
            for uri, state in stored.items()
        }
    except (FileNotFoundError, *PARSE_ERRORS):
        return {}


def _database_of(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.split("///", 1)[1]).absolute() if tracking_uri.startswith("sqlite:") else None


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a server or a SQLite file, which is created if it does not exist."""
    from mlflow import MlflowClient

    database = _database_of(tracking_uri)
    if database is None:
        return MlflowClient(tracking_uri)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes must not create the tables at the same time.
    with file_lock(f"{database}.lock", wait=True):
        SqlAlchemyStore(tracking_uri, (database.parent / "mlartifacts").as_uri()).engine.dispose()
        return MlflowClient(tracking_uri)


_calls_lock = threading.Lock()
_call_timeouts: list[int] = []
_outside_calls = contextlib.ExitStack()
"""Restores the environment and the loggers after the last call."""


@contextlib.contextmanager
def bounded_calls(timeout_s: int) -> Iterator[None]:
    """Bound MLflow's HTTP requests and silence its logging while calls of paml run, in any thread."""
    with _calls_lock:
        if not _call_timeouts:
            _outside_calls.enter_context(_silenced())
        _call_timeouts.append(timeout_s)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(_call_timeouts))
    try:
        yield
    finally:
        with _calls_lock:
            _call_timeouts.remove(timeout_s)
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(_call_timeouts, default=0))
            if not _call_timeouts:
                _outside_calls.close()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    environment = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        # With retries, a lost reply would create a run twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {name: os.environ[name] for name in environment if name in os.environ}
    os.environ.update(environment)
    # Importing MLflow sets the levels of these loggers.
    importlib.import_module("mlflow")
    levels = {
        logger: logger.level for logger in map(logging.getLogger, ("mlflow", "alembic", "urllib3.connectionpool"))
    }
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    yield
    for name in environment:
        del os.environ[name]
    os.environ.update(before)
    for logger, level in levels.items():
        logger.setLevel(level)
