"""The view of a run in MLflow: the only file that calls MLflow's client.

The server is asked what it holds before anything is sent to it for the first time, and again after every
failure. So a reply that was lost, a server put back from a backup, or a second replay doubles nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import logging
import os
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paml import storage
from paml.reading import inside, open_own, parse_object
from paml.secrets import without_keys
from paml.tracking.journal import CHARTS, END_STATUSES, Event, latest

if TYPE_CHECKING:
    from mlflow import MlflowClient

ID_TAG = "paml.journal"
CUT_TAG = "paml.cut_params"
CONTEXT_TAG = "mlflow.data.context"
CUT_MARK = " … [cut: whole in the artifact settings.yaml]"

# What a server answers to content that it will never take; anything else may pass on a later try.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
_METRICS_PER_BATCH = 1000
_TEXTS_PER_BATCH = 50


class MlflowView:
    """One run of a journal in one MLflow store. Used by one thread at a time.

    Methods raise what MLflow raises: call `attach` again before the next `push`.
    """

    def __init__(self, run_folder: str, tracking_uri: str, *, request_timeout_s: int = 5):
        self.run_folder = run_folder
        self.tracking_uri = tracking_uri
        self.refused: list[str] = []
        """What the server will never take, each with its reason."""
        self.run_id: str | None = None
        self.experiment_id = ""
        self._request_timeout_s = request_timeout_s
        self._client: MlflowClient | None = None
        self._memory = read_memory(run_folder).get(without_keys(tracking_uri), {})
        self._metrics: dict[str, set[int]] = {}
        self._metric_keys: set[str] = set()
        self._params: set[str] = set()
        self._tags: dict[str, str] = {}
        self._datasets: set[tuple[str, str]] = set()
        self._status = ""
        self._end_time: int | None = None

    def attach(self, identity: Event) -> None:
        """Finds the run in MLflow, or creates it, and asks what it holds."""
        with own_calls(self._request_timeout_s):
            client = self._client = self._client or connect(self.tracking_uri)
            run = self._find(client, identity) or self._create(client, identity)
            self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
            self._metrics, self._metric_keys = {}, set(run.data.metrics)
            self._params, self._tags = set(run.data.params), dict(run.data.tags)
            inputs = run.inputs.dataset_inputs if run.inputs else []
            self._datasets = {(item.dataset.name, item.dataset.digest) for item in inputs}
            self._status, self._end_time = run.info.status, run.info.end_time
        if self._memory.get("run_id") != self.run_id:
            self._memory = {"run_id": self.run_id, "experiment_id": self.experiment_id, "artifacts": {}}
            self._remember()

    def push(self, events: Sequence[Event], done: Callable[[int], None] = lambda count: None) -> None:
        """Sends events that the server does not hold yet; `done` hears how many are dealt with.

        The status goes last, so a run that MLflow shows as ended is whole.
        """
        kinds: dict[str, list[Event]] = {}
        for event in events:
            kinds.setdefault(event.kind, []).append(event)
        with own_calls(self._request_timeout_s):
            for batch in _batches(kinds.get("param", []), _TEXTS_PER_BATCH):
                self._push_params(batch)
                done(len(batch))
            for batch in _batches(kinds.get("tag", []), _TEXTS_PER_BATCH):
                self._push_tags(batch)
                done(len(batch))
            for batch in _batches(kinds.get("metric", []), _METRICS_PER_BATCH):
                self._push_metrics(batch)
                done(len(batch))
            for event in kinds.get("dataset", []):
                self._push_dataset(event)
                done(1)
        for kind, push in (("artifact", self._push_artifact), ("model", self._push_model)):
            of_kind = kinds.get(kind, [])
            for event in latest(of_kind):
                # A server passes large files on to its own storage before it answers.
                with own_calls(max(60, self._request_timeout_s)):
                    push(event)
            done(len(of_kind))
        if statuses := kinds.get("status", []):
            with own_calls(self._request_timeout_s):
                self._push_status(statuses[-1])
        done(len(statuses) + len(kinds.get("run", [])))

    def _find(self, client: MlflowClient, identity: Event) -> Any:
        from mlflow.exceptions import MlflowException

        if run_id := self._memory.get("run_id"):
            try:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(identity.value["experiment"])
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.`{ID_TAG}` = '{identity.key}'")
        return client.get_run(found[0].info.run_id) if found else None

    def _create(self, client: MlflowClient, identity: Event) -> Any:
        from mlflow.exceptions import MlflowException

        name = identity.value["experiment"]
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                location = _artifact_location(self.tracking_uri, name)
                experiment_id = client.create_experiment(name, artifact_location=location, tags=_KIND)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
                experiment_id = experiment.experiment_id
        else:
            experiment_id = experiment.experiment_id
        tags = {ID_TAG: identity.key, "mlflow.source.name": "paml", "mlflow.source.type": "JOB"}
        run = client.create_run(experiment_id, start_time=identity.time_ms, tags=tags, run_name=identity.value["name"])
        return client.get_run(run.info.run_id)

    def _push_metrics(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        missing = [event for event in batch if event.step not in self._steps(event.key)]
        rows = [Metric(event.key, event.value, event.time_ms, event.step) for event in missing]
        self._send(missing, lambda part: self._log_batch(metrics=[rows[index] for index in part]))
        for event in missing:
            self._metrics[event.key].add(event.step)

    def _steps(self, key: str) -> set[int]:
        if key not in self._metrics:
            held = self._api.get_metric_history(self._run_id, key) if key in self._metric_keys else []
            self._metrics[key] = {metric.step for metric in held}
        return self._metrics[key]

    def _push_params(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        missing = [event for event in batch if event.key not in self._params]
        rows = [Param(event.key, cut(event.value, MAX_PARAM_VAL_LENGTH)) for event in missing]
        self._send(missing, lambda part: self._log_batch(params=[rows[index] for index in part]))
        self._params.update(event.key for event in missing)
        if too_long := [event.key for event in missing if len(event.value) > MAX_PARAM_VAL_LENGTH]:
            known = json.loads(self._tags.get(CUT_TAG, "[]"))
            value = json.dumps(sorted({*known, *too_long}))
            self._push_tags([Event(kind="tag", time_ms=0, key=CUT_TAG, value=value)])

    def _push_tags(self, batch: Sequence[Event]) -> None:
        from mlflow.entities import RunTag
        from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

        charts = charts_below(self.experiment_id, self._run_id)
        wanted = {event.key: cut(event.value.replace(CHARTS, charts), MAX_TAG_VAL_LENGTH) for event in batch}
        last = {event.key: event for event in batch if self._tags.get(event.key) != wanted[event.key]}
        rows = [RunTag(key, wanted[key]) for key in last]
        self._send(list(last.values()), lambda part: self._log_batch(tags=[rows[index] for index in part]))
        self._tags.update(wanted)

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
        self._send([event], lambda part: self._api.log_inputs(self._run_id, [item]))
        self._datasets.add((event.key, digest))

    def _push_artifact(self, event: Event) -> None:
        if self._memory["artifacts"].get(event.key) == event.value["sha256"]:
            return
        folder, _, name = event.key.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = os.path.join(temporary, name)
            if self._fetch(event, event.value["file"], local):
                self._send([event], lambda part: self._api.log_artifact(self._run_id, local, folder or None))
        self._memory["artifacts"][event.key] = event.value["sha256"]
        self._remember()

    def _push_model(self, event: Event) -> None:
        client, digest = self._api, _digest(event.value["files"])
        same_run = f"source_run_id = '{self._run_id}' AND name = '{event.key}'"
        for model in client.search_logged_models([self.experiment_id], filter_string=same_run):
            if model.tags.get("paml.digest") == digest:
                if model.status == "READY":
                    self._name_output(model.model_id)
                    return
                # Left by a push that was cut off.
                client.delete_logged_model(model.model_id)
        with tempfile.TemporaryDirectory() as temporary:
            for file in event.value["files"]:
                local = inside(temporary, file)
                os.makedirs(os.path.dirname(local), exist_ok=True)
                if not self._fetch(event, f"{event.value['file']}/{file}", local):
                    return
            tags = {"paml.digest": digest}
            model = client.create_logged_model(self.experiment_id, event.key, self._run_id, tags)
            _name_model(os.path.join(temporary, "MLmodel"), model, self._run_id)
            client.log_model_artifacts(model.model_id, temporary)
        client.finalize_logged_model(model.model_id, "READY")
        self._name_output(model.model_id)

    def _name_output(self, model_id: str) -> None:
        """The run's output, once it is whole: an output cannot be taken back where the push is cut off before."""
        from mlflow.entities import LoggedModelOutput

        outputs = self._api.get_run(self._run_id).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._api.log_outputs(self._run_id, [LoggedModelOutput(model_id, step=0)])

    def _push_status(self, event: Event) -> None:
        status = event.value
        if status in END_STATUSES:
            if (self._status, self._end_time) != (status, event.time_ms):
                self._api.set_terminated(self._run_id, status, event.time_ms)
                self._end_time = event.time_ms
        elif self._status != status:
            self._api.update_run(self._run_id, status)
        self._status = status

    def _fetch(self, event: Event, file: str, local: str) -> bool:
        """Copies a file of the run to `local`; a missing one is counted as refused."""
        path = inside(self.run_folder, file)
        if not storage.exists(path):
            self.refused.append(f"{event.kind} {event.key}: its file {path} is gone")
            return False
        Path(local).write_bytes(storage.read_bytes(path))
        return True

    def _send(self, events: Sequence[Event], send: Callable[[Sequence[int]], None]) -> None:
        """Sends all; where the server refuses, halves the batch until the refused events stand alone."""
        from mlflow.exceptions import MlflowException

        parts: list[Sequence[int]] = [range(len(events))] if events else []
        while parts:
            part = parts.pop()
            try:
                send(part)
            except MlflowException as error:
                if error.error_code not in _REFUSALS or self._is_deleted():
                    raise
                if len(part) > 1:
                    parts += [part[: len(part) // 2], part[len(part) // 2 :]]
                    continue
                event = events[part[0]]
                self.refused.append(f"{event.kind} {event.key}: {_first_line(error)}")

    def _is_deleted(self) -> bool:
        return self._api.get_run(self._run_id).info.lifecycle_stage != "active"

    def _log_batch(self, **values: Any) -> None:
        self._api.log_batch(self._run_id, synchronous=True, **values)

    def _remember(self) -> None:
        memory = read_memory(self.run_folder)
        memory[without_keys(self.tracking_uri)] = self._memory
        content = json.dumps(memory, indent=1).encode()
        storage.write_bytes(storage.join(self.run_folder, "mlflow.json"), content)

    @property
    def _api(self) -> MlflowClient:
        if self._client is None:
            raise RuntimeError("attach() comes before push()")
        return self._client

    @property
    def _run_id(self) -> str:
        if self.run_id is None:
            raise RuntimeError("attach() comes before push()")
        return self.run_id


def default_tracking_uri(storage_root: str | None) -> str | None:
    """MLFLOW_TRACKING_URI if set, else SQLite in `<storage_root>/mlflow.db`; None where no local disk."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if storage_root is None or storage.is_remote(storage_root):
        return None
    return f"sqlite:///{os.path.abspath(storage_root)}/mlflow.db"


def charts_below(experiment_id: str, run_id: str) -> str:
    """Link, within MLflow's pages, to the charts of all runs below a run, the best first.

    Ordered by their age, as by default, MLflow folds those runs into the one above them and draws none.
    """
    below = {"searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'", "orderByKey": "metrics.`best_val_map`"}
    query = urllib.parse.urlencode(below, quote_via=urllib.parse.quote)
    return f"#/experiments/{experiment_id}/runs?{query}&orderByAsc=false&compareRunsMode=CHART"


def cut(text: str, limit: int) -> str:
    """Text of at most `limit` characters; says so where it is cut."""
    return text if len(text) <= limit else text[: limit - len(CUT_MARK)] + CUT_MARK


def reason(error: BaseException) -> str:
    """The shortest useful words on why MLflow failed."""
    text = str(error)
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("timed out", "no answer in time"),
        ("timeout", "no answer in time"),
        ("NameResolution", "host name not found"),
        ("RemoteDisconnected", "connection closed"),
    ):
        if sign in text:
            return words
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return without_keys(f"{type(error).__name__}: {error}".splitlines()[0])[:200]


def _batches(events: Sequence[Event], size: int) -> Iterator[Sequence[Event]]:
    for start in range(0, len(events), size):
        yield events[start : start + size]


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _name_model(path: str, model: Any, run_id: str) -> None:
    """Writes into the file MLmodel which run and logged model it belongs to."""
    import yaml

    content = yaml.safe_load(Path(path).read_text())
    content |= {
        "run_id": run_id,
        "model_id": model.model_id,
        "model_uuid": model.model_id,
        "artifact_path": model.artifact_location,
    }
    Path(path).write_text(yaml.safe_dump(content))


def read_memory(run_folder: str) -> dict[str, dict[str, Any]]:
    """What `<run>/mlflow.json` remembers, by tracking URI without user and password: the run's id and the artifacts."""
    path = storage.join(run_folder, "mlflow.json")
    if not storage.exists(path):
        return {}
    try:
        found = parse_object(storage.read_bytes(path))
    except ValueError:
        # Only a short cut: the run is found again by its tag.
        return {}
    return {
        without_keys(uri): {name: known[name] for name in ("run_id", "experiment_id", "artifacts")}
        for uri, known in found.items()
        if isinstance(known, dict)
        and isinstance(known.get("run_id"), str)
        and isinstance(known.get("experiment_id"), str)
        and isinstance(known.get("artifacts"), dict)
    }


_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""So that the pages open with runs and charts, and not with what language models need."""


def _artifact_location(tracking_uri: str, experiment: str) -> str | None:
    if not tracking_uri.startswith("sqlite:"):
        return None
    folder = Path(tracking_uri.split("///", 1)[1]).absolute().parent / "mlartifacts"
    return (folder / experiment.replace("/", "_")).as_uri()


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a server or store; a SQLite file is made first where there is none."""
    from mlflow import MlflowClient

    if not tracking_uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database = Path(tracking_uri.split("///", 1)[1]).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create the tables at once break each other.
    with open(open_own(f"{database}.lock", os.O_RDWR | os.O_CREAT), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        SqlAlchemyStore(tracking_uri, (database.parent / "mlartifacts").as_uri()).engine.dispose()
        return MlflowClient(tracking_uri)


_calls_lock = threading.Lock()
_call_timeouts: list[int] = []
_restore: Callable[[], None] | None = None


@contextlib.contextmanager
def own_calls(timeout_s: int) -> Iterator[None]:
    """Bounds MLflow's HTTP requests and silences its chatter while our own calls run, in any thread."""
    global _restore
    with _calls_lock:
        if not _call_timeouts:
            _restore = _bound_and_silence()
        _call_timeouts.append(timeout_s)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(_call_timeouts))
    try:
        yield
    finally:
        with _calls_lock:
            _call_timeouts.remove(timeout_s)
            if _call_timeouts:
                os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(_call_timeouts))
            elif _restore is not None:
                _restore()
                _restore = None


def _bound_and_silence() -> Callable[[], None]:
    environment = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        # MLflow would send a request again whose reply was lost, and so create a run twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    old_environment = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    # Imported first, because MLflow sets the levels of these loggers when it is imported.
    importlib.import_module("mlflow")

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    old_levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)

    def restore() -> None:
        for name, value in old_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, old_levels, strict=True):
            logger.setLevel(level)

    return restore
