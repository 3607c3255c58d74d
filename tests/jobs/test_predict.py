"""jobs/predict.py and its sisters as people start them: a photo, many images, killed and resumed, on Ray."""

import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.jobs import ROOT, Job, environment, kill, prepare_scenes, tiny_options, train_job, write_scenes
from tests.helpers.prepared import COUNTS, picture, prepare_tiny
from tests.predict.conftest import calibrated, trained  # noqa: F401  (fixtures)

PREDICT = str(ROOT / "jobs" / "predict.py")


def call(job: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *map(str, options)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def scores(out: Path) -> dict[str, list[float]]:
    tables = [pq.read_table(path).to_pydict() for path in (out / "scores").glob("*.parquet")]
    return {key: row for table in tables for key, row in zip(table["key"], table["scores"], strict=True)}


@pytest.mark.slow
def test_a_photo_and_what_cannot_be_one(trained: str, tmp_path: Path) -> None:  # noqa: F811
    photo = tmp_path / "cat.jpg"
    photo.write_bytes(picture("test", 0, 64))
    done = call("predict.py", "--model", trained, "--image", photo, "--show", tmp_path / "out.png", "--top", 3)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "/m/" in line]) == 3
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG"
    photo.write_text("no picture")
    done = call("predict.py", "--model", trained, "--image", photo)
    assert done.returncode == 1
    assert "cannot be read as a picture" in done.stderr
    assert "Traceback" not in done.stderr
    done = call("predict.py", "--model", tmp_path, "--image", photo)
    assert done.returncode == 1
    assert "neither a run" in done.stderr
    done = call("predict.py", "--model", trained)
    assert done.returncode == 2
    assert "give either image" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("job", ["predict.py", "export.py", "calibrate.py", "register.py"])
def test_help_explains_and_settings_print(job: str) -> None:
    done = call(job, "--help")
    assert done.returncode == 0
    assert "python jobs/" in done.stdout
    assert "--config" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ray", ["false", "true"])
def test_killed_and_started_again_it_gives_the_unbroken_scores(trained: str, tmp_path: Path, ray: str) -> None:  # noqa: F811
    data = prepare_tiny(tmp_path / "data", counts=COUNTS | {"train": 400})
    out = tmp_path / "out"
    options = ["--model", trained, "--images", str(data / "shards" / "train"), "--bulk.batch_size", "1"]
    command = [sys.executable, PREDICT, *options, "--ray", ray, "--cpus_per_task", "1", "--bulk.top", "null"]
    with Job([*command, "--out", str(out)], tmp_path / "log", env=environment()) as job:
        job.until(lambda: len(list(out.glob("scores/*.parquet"))) >= 3, "three parts")
        for process in job.descendants():
            kill(process)
        kill(psutil.Process(job.process.pid))
        job.process.wait(30)
    before = len(list(out.glob("scores/*.parquet")))
    assert before < 40
    with Job([*command, "--out", str(out)], tmp_path / "again", env=environment()) as job:
        assert job.wait() == 0, job.output
    assert "parts are done" in job.output
    whole = ["--out", str(tmp_path / "whole"), "--ray", "false", "--cpus_per_task", "1", "--bulk.top", "null"]
    with Job([sys.executable, PREDICT, *options, *whole], tmp_path / "whole.log", env=environment()) as job:
        assert job.wait() == 0, job.output
    assert len(scores(out)) == 400
    assert scores(out) == scores(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_model_is_registered_calibrated_and_gives_its_scores_from_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    run = tmp_path / "runs" / "registered"
    options = tiny_options(data, tmp_path / "runs", "registered", epochs=1, run__mlflow="true", run__register="digits")
    with train_job(options, tmp_path / "job.log") as job:
        assert job.wait() == 0, job.output
    assert "is version 1 of digits" in job.output
    assert "and the champion (there was no champion)" in job.output
    done = call("calibrate.py", "--run", run)
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "calibration.json").exists()
    assert "MLflow: sqlite" in done.stdout
    done = call("register.py", "--run", run, "--name", "digits")
    assert done.returncode == 0, done.stderr
    assert "version 2 of digits" in done.stdout  # a calibration makes it another model, as good as the champion
    assert "not the champion" in done.stdout

    import mlflow
    import pandas

    from paml.predict.predictor import open_predictor

    # mlflow.set_tracking_uri would outlive this test, in the environment of all that come after it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    loaded = mlflow.pyfunc.load_model("models:/digits@candidate")
    image = (next((tmp_path / "scenes" / "images" / "test").glob("*.jpg"))).read_bytes()
    (answer,) = loaded.predict(pandas.DataFrame({"image": [image]}), params={"top": 3})
    predictor = open_predictor(str(run))
    assert predictor.calibration is not None
    found = predictor.top(predictor.predict(predictor.decode(image)[None]).scores_BK[0], 3)
    assert [entry["class"] for entry in answer] == [one.mid for one in found]
    assert [entry["score"] for entry in answer] == pytest.approx([one.score for one in found], abs=1e-5)
