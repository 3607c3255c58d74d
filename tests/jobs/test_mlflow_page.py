"""What a reviewer sees of a finished run in the MLflow UI, read from the page that a real browser makes of it."""

import json
from pathlib import Path

import pytest

from paml.tracking.view import read_memory
from tests.helpers.browser import Browser
from tests.helpers.jobs import environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.tracking.conftest import MlflowServer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_page_of_a_run_answers_the_reviewers_questions(tmp_path: Path) -> None:
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(data, tmp_path / "runs", "seen", epochs=2, loss__name="ll-r", run__mlflow="true")
    browser, server = Browser(tmp_path / "profile", height=2400), MlflowServer(tmp_path)
    server.start()
    try:
        with train_job(options, tmp_path / "job.log", env=environment(MLFLOW_TRACKING_URI=server.uri)) as job:
            assert job.wait() == 0, job.output
        run = tmp_path / "runs" / "seen"
        (memory,) = read_memory(str(run)).values()
        result = json.loads((run / "result.json").read_text())
        address = f"{server.uri}/#/experiments/{memory['experiment_id']}/runs/{memory['run_id']}"

        overview = ["ll-r", "Repeat:", "jobs/train_openimages.py", "Versions:", "torch", "digests", "Finished"]
        overview += [f"{100 * scores['map']:.2f}" for scores in result["test"].values()]
        overview += [scores["convention"] for scores in result["test"].values()]
        browser.visit(address, *overview)
        sections = ("groups (", "rejection (", "test (", "train (", "val (")
        browser.visit(f"{address}/model-metrics", *sections, "seen (rejection/rejected)")  # drawn, without a click
    finally:
        browser.close()
        server.kill()
