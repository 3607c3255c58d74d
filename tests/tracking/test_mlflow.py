"""MLflow mirrors a journal exactly, through a real server that is killed, hangs and loses replies."""

import contextlib
import functools
import http.client
import http.server
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from paml import storage
from paml.cli.actions import sync as sync_command
from paml.errors import PamlError
from paml.runs.journal import Journal, read_journal
from paml.runs.system import SystemSampler
from paml.tracking import start_trackers, sync
from paml.tracking.follower import Follower
from paml.tracking.mlflow_sink import MlflowSink

from .conftest import differences, wait_until


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def follow(run_folder, uri, **options):
    return Follower(run_folder, MlflowSink(run_folder, uri, timeout_s=2), "mlflow", poll_s=0.1, **options)


def open_run(run_folder):
    journal = Journal(run_folder, "driver")
    journal.run(
        experiment="exp/one", name="first", tags={"digest": "a" * 64}, note="# A run\n\nof *paml*, [below](paml:charts)"
    )
    journal.settings({"loss": {"name": "ll-r", "reject_rate_step": 1e-4}, "long": "x" * 9000})
    journal.dataset("coco18/train", digest="ab" * 32, source="/somewhere", context="training", profile={"images": 5})
    return journal


def epoch(run_folder, number):
    values = {"train/loss": 1 / number, "rejection/rejected": 100.0 * number, "val/mAP": math.nan}
    values |= {f"groups/G{group}": number + group / 7 for group in range(1, 6)}
    rank0 = Journal(run_folder, "rank0")
    rank0.metrics(values, number)
    rank0.artifact_bytes(f"classes of epoch {number}".encode(), f"per_class/{number}.txt")


def end(journal, status="FINISHED"):
    journal.artifact_bytes(b"G1 0.5", "scores/table.txt")
    journal.metrics({"test/mAP": math.inf}, 0)
    journal.status(status)


def write_model(folder):
    folder.mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}\n")
    (folder / "weights.safetensors").write_bytes(os.urandom(1000))
    return str(folder)


def test_a_run_is_in_mlflow_exactly_once(run_folder, server, tmp_path, capfd):
    lines = []
    journal = open_run(run_folder)
    follower = follow(run_folder, server.uri, log=lines.append)
    sampler = SystemSampler(journal, 0.2)
    for number in range(1, 4):
        epoch(run_folder, number)
        time.sleep(0.25)
    sampler.close()
    journal.model(write_model(tmp_path / "m"))
    end(journal)
    assert follower.close(60) == 0
    assert lines == []
    assert capfd.readouterr() == ("", "")
    assert differences(run_folder, server.uri) == []
    run = MlflowClient(server.uri).get_run(follower.sink.run_id)
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.data.params["long"].endswith("[cut: whole in the artifact settings.yaml]")
    query = f"searchFilter=tags.%60mlflow.parentRunId%60%20%3D%20%27{follower.sink.run_id}%27"
    query += "&orderByKey=metrics.%60best_val_mAP%60&orderByAsc=false&compareRunsMode=CHART"
    charts = f"#/experiments/{run.info.experiment_id}/runs?{query}"
    assert run.data.tags["mlflow.note.content"] == f"# A run\n\nof *paml*, [below]({charts})"


def test_nothing_is_lost_when_the_server_is_killed_and_restarted(run_folder, server):
    lines = []
    journal = open_run(run_folder)
    follower = follow(run_folder, server.uri, log=lines.append)
    epoch(run_folder, 1)
    wait_until(lambda: follower.sink.run_id)
    server.kill()
    try:
        slowest = 0.0
        for number in range(2, 12):
            start = time.perf_counter()
            epoch(run_folder, number)
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.1)
        wait_until(lambda: len(lines) == 1)
    finally:
        server.start()
    end(journal)
    wait_until(lambda: len(lines) == 2)
    assert follower.close(60) == 0
    assert slowest < 0.5
    assert "is unreachable (connection" in lines[0]
    assert "is back" in lines[1]
    assert differences(run_folder, server.uri) == []


def test_sync_twice_after_the_server_was_down_all_the_time(run_folder, server, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    lines = []
    journal = open_run(run_folder)
    follower = follow(run_folder, nowhere, log=lines.append)
    for number in range(1, 4):
        epoch(run_folder, number)
    journal.model(write_model(tmp_path / "m"))
    end(journal, "FAILED")
    wait_until(lambda: lines)
    left = follower.close(0.5)
    assert left == len(read_journal(run_folder))
    assert len(lines) == 2
    assert f"{left} events" in lines[1]
    assert f"paml sync {run_folder} --tracking_uri" in lines[1]
    for _ in range(2):
        assert sync_command(run_folder, server.uri) == 0
        assert differences(run_folder, server.uri) == []
        assert "FAILED" in capsys.readouterr().out
    # mlflow.json is only a cache.
    Path(run_folder, "mlflow.json").unlink()
    sync(run_folder, server.uri)
    assert differences(run_folder, server.uri) == []


@pytest.mark.slow
def test_a_second_follower_continues_after_a_killed_one(run_folder, server):
    journal = open_run(run_folder)
    for step in range(30):
        journal.metric_rows([(f"many/{key}", key + step / 31, step, 10**12 + step) for key in range(400)])
    script = f"""
        import time
        from paml.tracking.follower import Follower
        from paml.tracking.mlflow_sink import MlflowSink
        follower = Follower({run_folder!r}, MlflowSink({run_folder!r}, {server.uri!r}), "mlflow", poll_s=0.1)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        client = MlflowClient(server.uri)

        def some_metrics():
            experiment = client.get_experiment_by_name("exp/one")
            identity = next(event for event in read_journal(run_folder) if event.kind == "run")
            runs = (
                client.search_runs([experiment.experiment_id], f"tags.`paml.journal` = '{identity.key}'")
                if experiment
                else []
            )
            return bool(runs and runs[0].data.metrics)

        wait_until(some_metrics)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    follower = follow(run_folder, server.uri)
    epoch(run_folder, 1)
    end(journal)
    assert follower.close(120) == 0
    assert differences(run_folder, server.uri) == []


@pytest.mark.slow
def test_lost_replies_duplicate_nothing(run_folder, server, tmp_path):
    with losing_proxy(server.port, seed=5) as (uri, lost):
        lines = []
        journal = open_run(run_folder)
        follower = follow(run_folder, uri, log=lines.append)
        for number in range(1, 4):
            epoch(run_folder, number)
            time.sleep(0.2)
        journal.model(write_model(tmp_path / "m"))
        end(journal)
        assert follower.close(120) == 0
        assert len(lost) > 5
        assert any("runs/create" in path for path in lost)
    assert differences(run_folder, server.uri) == []


@contextlib.contextmanager
def losing_proxy(port, seed):
    """Forwards every request but drops replies: that of the first runs/create, and a third of the others."""
    draw, lost = random.Random(seed), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            link = http.client.HTTPConnection("127.0.0.1", port)
            link.request(self.command, self.path, body, dict(self.headers.items()))
            reply = link.getresponse()
            data = reply.read()
            link.close()
            first_creation = "runs/create" in self.path and not any("runs/create" in path for path in lost)
            if self.command != "GET" and (first_creation or draw.random() < 0.33):
                lost.append(self.path)
                self.close_connection = True
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, format, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", lost
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_a_hanging_server_does_not_slow_the_journal(run_folder):
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen(50)
        lines = []
        journal = open_run(run_folder)
        alone = [seconds(functools.partial(journal.params, {f"warm{index}": 1})) for index in range(50)]
        before = dict(os.environ)
        follower = follow(run_folder, f"http://127.0.0.1:{hung.getsockname()[1]}", log=lines.append)
        times = []
        while not lines:
            times.append(seconds(lambda: journal.metrics({"train/loss": 0.5}, len(times))))
            time.sleep(0.02)
            assert len(times) < 3000
        start = time.monotonic()
        left = follower.close(1.0)
        assert time.monotonic() - start < 2.0
    assert left == len(read_journal(run_folder))
    assert "no answer in time" in lines[0]
    assert statistics.median(times) < 3 * statistics.median(alone) + 0.005
    assert sorted(times)[int(len(times) * 0.99)] < 0.2
    wait_until(lambda: not follower._thread.is_alive())
    assert dict(os.environ) == before


def test_a_resumed_run_continues_in_the_same_mlflow_run(run_folder, server):
    client = MlflowClient(server.uri)
    journal = open_run(run_folder)
    follower = follow(run_folder, server.uri)
    epoch(run_folder, 1)
    journal.status("KILLED")
    assert follower.close(60) == 0
    run_id = follower.sink.run_id
    assert client.get_run(run_id).info.status == "KILLED"

    journal = Journal(run_folder, "driver")
    journal.run(experiment="exp/one", name="first")
    follower = follow(run_folder, server.uri)
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING")
    epoch(run_folder, 1)
    epoch(run_folder, 2)
    end(journal)
    assert follower.close(60) == 0
    assert follower.sink.run_id == run_id
    assert differences(run_folder, server.uri) == []


def test_sync_ends_a_run_whose_driver_was_killed(run_folder, server, capsys):
    open_run(run_folder)
    epoch(run_folder, 1)
    last = max(event.time_ms for event in read_journal(run_folder))
    assert sync_command(run_folder, server.uri) == 0
    assert "--status KILLED" in capsys.readouterr().out
    assert sync_command(run_folder, server.uri, status="KILLED") == 0
    assert differences(run_folder, server.uri) == []
    assert read_journal(run_folder)[-1].time_ms == last
    with pytest.raises(PamlError, match="KILLED"):
        sync_command(run_folder, server.uri, status="FINISHED")


def test_sync_goes_where_the_run_was_sent_last_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run_folder = str(tmp_path / "runs" / "one")
    journal = open_run(run_folder)
    assert follow(run_folder, f"sqlite:///{tmp_path}/mlflow.db").close(60) == 0
    end(journal)
    assert sync_command(run_folder) == 0
    assert f"sqlite:///{tmp_path}/mlflow.db" in capsys.readouterr().out
    assert differences(run_folder, f"sqlite:///{tmp_path}/mlflow.db") == []
    with pytest.raises(PamlError, match="nothing"):
        sync_command(str(tmp_path / "nothing"))
    assert sorted(os.listdir(tmp_path)) == ["mlartifacts", "mlflow.db", "mlflow.db.lock", "runs"]


def test_refused_events_are_named_and_the_others_are_sent(run_folder, server):
    journal = open_run(run_folder)
    sync(run_folder, server.uri)
    run_id = (
        MlflowClient(server.uri)
        .search_runs(
            [MlflowClient(server.uri).get_experiment_by_name("exp/one").experiment_id],
            f"tags.`paml.journal` = '{next(e.key for e in read_journal(run_folder) if e.kind == 'run')}'",
        )[0]
        .info.run_id
    )
    lost = Path(run_folder, "artifacts", "lost.txt")
    journal.artifact_bytes(b"x", "lost.txt")
    lost.unlink()
    # MLflow itself knows this tag and takes no such value.
    journal.tags({"mlflow.runName": "", "fine": "yes"})
    epoch(run_folder, 1)
    report = sync(run_folder, server.uri)
    assert any("lost.txt" in line for line in report.sink.refused)
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.data.tags["fine"] == "yes"
    assert run.data.metrics["train/loss"] == 1.0


@pytest.mark.slow
def test_several_processes_create_one_sqlite_store(tmp_path):
    script = """
        import sys
        from paml.runs.journal import Journal
        from paml.tracking import start_trackers
        root, name = sys.argv[1:]
        journal = Journal(f"{root}/runs/{name}", "driver")
        journal.run(experiment="e", name=name)
        journal.artifact_bytes(b"x", "x.txt")
        trackers = start_trackers(["mlflow"], f"{root}/runs/{name}")
        journal.metrics({"a": 1.0}, 1)
        journal.status("FINISHED")
        sys.exit(trackers.close(90))
    """
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), f"run{index}"],
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(3)
    ]
    outputs = [process.communicate()[0].decode() for process in processes]
    assert outputs == [""] * 3
    assert [process.returncode for process in processes] == [0, 0, 0]
    for index in range(3):
        assert differences(str(tmp_path / "runs" / f"run{index}"), f"sqlite:///{tmp_path}/runs/mlflow.db") == []
    names = ["mlartifacts", "mlflow.db", "mlflow.db.lock", "run0", "run1", "run2"]
    assert sorted(os.listdir(tmp_path / "runs")) == names


def test_a_run_on_s3_is_followed_and_synchronized(s3, server, tmp_path):
    run_folder = f"{s3}/runs/one"
    journal = open_run(run_folder)
    follower = follow(run_folder, server.uri)
    for number in range(1, 5):
        epoch(run_folder, number)
    journal.model(write_model(tmp_path / "m"))
    end(journal)
    assert follower.close(60) == 0
    assert differences(run_folder, server.uri) == []
    storage.delete(f"{run_folder}/mlflow.json")
    sync(run_folder, server.uri)
    assert differences(run_folder, server.uri) == []


def test_a_remote_run_without_a_server_is_not_followed(monkeypatch, s3):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = []
    trackers = start_trackers(["mlflow"], f"{s3}/run", log=lines.append)
    assert (trackers.close(), trackers.links()) == (0, [])
    assert len(lines) == 1
    assert f"paml sync {s3}/run" in lines[0]
