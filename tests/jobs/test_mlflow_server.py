"""Nothing is lost when MLflow and its PostgreSQL are killed during `paml train`."""

import subprocess
from pathlib import Path

import pytest

from paml.tracking.mlflow_sink import read_state
from tests.helpers.jobs import (
    PAML,
    ROOT,
    environment,
    newest_step,
    prepare_scenes,
    status_in_mlflow,
    tiny_options,
    train_job,
    write_scenes,
)
from tests.tracking.conftest import MlflowServer, Postgres, differences


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sync_after_database_and_server_were_killed_during_a_run(tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    run = tmp_path / "runs" / "followed"
    options = tiny_options(
        data, tmp_path / "runs", "followed", epochs=60, loss__name="ll-r", run__trackers='["mlflow"]'
    )
    database = Postgres(tmp_path)
    database.start()
    server = MlflowServer(tmp_path, database.uri)
    server.start()
    try:
        with train_job(options, tmp_path / "job.log", env=environment(MLFLOW_TRACKING_URI=server.uri)) as job:
            job.until(lambda: newest_step(run) >= 6 and read_state(str(run)), "epoch 2 in MLflow")
            database.kill()
            reached = newest_step(run)
            job.until(lambda: newest_step(run) > reached, "a step without the database")
            database.start()
            job.until(lambda: newest_step(run) > reached + 3, "a step with the database back")
            server.kill()
            assert job.wait() == 0
        command = f"paml sync {run} --tracking_uri {server.uri}"
        assert "unreachable" in job.output
        assert command in job.output

        server.start()
        assert status_in_mlflow(server.uri, "followed") == ["RUNNING"]
        sync = [*PAML, *command.split()[1:]]
        result = subprocess.run(sync, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert differences(str(run), server.uri) == []
    finally:
        server.kill()
        database.stop()
