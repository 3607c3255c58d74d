"""What a reviewer sees of a finished run in the MLflow UI, read from the page that a real browser makes of it."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from paml.tracking.view import read_memory
from tests.helpers.browser import find_browser
from tests.helpers.jobs import environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.tracking.conftest import MlflowServer

BROWSER = find_browser()


def page(url: str, profile: Path) -> str:
    """The text of a page, once its scripts have run for 25 s of the browser's own time."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--window-size=1600,2400",
        "--virtual-time-budget=25000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", done.stdout, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_page_of_a_run_answers_the_reviewers_questions(tmp_path: Path) -> None:
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    options = tiny_options(data, tmp_path / "runs", "seen", epochs=2, loss__name="ll-r", run__mlflow="true")
    server = MlflowServer(tmp_path)
    server.start()
    try:
        with train_job(options, tmp_path / "job.log", env=environment(MLFLOW_TRACKING_URI=server.uri)) as job:
            assert job.wait() == 0, job.output
        run = tmp_path / "runs" / "seen"
        (memory,) = read_memory(str(run)).values()
        result = json.loads((run / "result.json").read_text())
        address = f"{server.uri}/#/experiments/{memory['experiment_id']}/runs/{memory['run_id']}"

        overview = page(address, tmp_path / "profile")
        for scores in result["test"].values():
            assert f"{100 * scores['map']:.2f}" in overview
        assert result["test"].popitem()[1]["convention"] in overview
        for answer in ("ll-r", "Repeat:", "jobs/train_openimages.py", "Versions:", "torch", "digests", "Finished"):
            assert answer in overview

        charts = page(f"{address}/model-metrics", tmp_path / "profile")
        for section in ("groups (", "rejection (", "test (", "train (", "val ("):
            assert section in charts
        assert "seen (rejection/rejected)" in charts  # drawn, without a click
    finally:
        server.kill()
