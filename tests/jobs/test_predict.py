"""The commands that use a trained model, in processes of their own: predict, calibrate and register."""

import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.jobs import PAML, ROOT, Job, environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.helpers.prepared import COUNTS, jpeg_image, prepare_tiny
from tests.inference.conftest import calibrated, trained  # noqa: F401  (fixtures)


def call(command: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PAML, command, *map(str, options)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )


def scores(out: Path) -> dict[str, list[float]]:
    tables = [pq.read_table(path).to_pydict() for path in (out / "scores").glob("*.parquet")]
    return {key: row for table in tables for key, row in zip(table["key"], table["scores"], strict=True)}


@pytest.mark.slow
def test_predict_lists_and_draws_one_image_and_names_mistakes(trained: str, tmp_path: Path) -> None:  # noqa: F811
    image = tmp_path / "cat.jpg"
    image.write_bytes(jpeg_image("test", 0, 64))
    done = call("predict", "--model", trained, "--image", image, "--show", tmp_path / "out.png", "--top", 3)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "/m/" in line]) == 3
    with Image.open(tmp_path / "out.png") as plot:
        assert plot.format == "PNG"
    image.write_text("not an image")
    done = call("predict", "--model", trained, "--image", image)
    assert done.returncode == 1
    assert str(image) in done.stderr
    assert "Traceback" not in done.stderr
    done = call("predict", "--model", tmp_path, "--image", image)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    done = call("predict", "--model", trained)
    assert done.returncode == 2
    assert "image" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ray", ["false", "true"])
def test_a_killed_prediction_resumes_with_the_same_scores(trained: str, tmp_path: Path, ray: str) -> None:  # noqa: F811
    data = prepare_tiny(tmp_path / "data", counts=COUNTS | {"train": 400})
    out = tmp_path / "out"
    options = ["--model", trained, "--images", str(data / "shards" / "train"), "--bulk.batch_size", "1"]
    command = [*PAML, "predict", *options, "--cpus_per_task", "1", "--bulk.top", "null"]
    killed = [*command, "--ray", ray, "--out", str(out)]
    with Job(killed, tmp_path / "log", env=environment()) as job:
        job.until(lambda: len(list(out.glob("scores/*.parquet"))) >= 3, "three parts")
        job.kill()
    assert len(list(out.glob("scores/*.parquet"))) < 40
    with Job(killed, tmp_path / "resumed.log", env=environment()) as job:
        assert job.wait() == 0, job.output
    assert "resuming" in job.output
    whole = [*command, "--ray", "false", "--out", str(tmp_path / "whole")]
    with Job(whole, tmp_path / "whole.log", env=environment()) as job:
        assert job.wait() == 0, job.output
    assert len(scores(out)) == 400
    assert scores(out) == scores(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_registered_model_predicts_calibrated_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_scenes(write_scenes(tmp_path / "scenes", train=60, others=20), tmp_path / "data")
    run = tmp_path / "runs" / "registered"
    tracking = {"run__trackers": '["mlflow"]', "run__register": "digits"}
    options = tiny_options(data, tmp_path / "runs", "registered", epochs=1, **tracking)
    with train_job(options, tmp_path / "job.log") as job:
        assert job.wait() == 0, job.output
    assert "digits version 1: candidate and champion" in job.output
    done = call("calibrate", "--run", run)
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "calibration.json").exists()
    assert "sqlite" in done.stdout
    done = call("register", "--run", run, "--name", "digits")
    assert done.returncode == 0, done.stderr
    assert "digits version 2: candidate" in done.stdout  # calibrated, so another model, as good as the champion
    assert "and champion" not in done.stdout

    import mlflow
    import pandas

    from paml.inference.predictor import open_predictor

    # mlflow.set_tracking_uri would change the environment of later tests.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    loaded = mlflow.pyfunc.load_model("models:/digits@candidate")
    image = (next((tmp_path / "scenes" / "images" / "test").glob("*.jpg"))).read_bytes()
    (answer,) = loaded.predict(pandas.DataFrame({"image": [image]}), params={"top": 3})
    predictor = open_predictor(run)
    assert predictor.calibration is not None
    predictions = predictor.predict(image, top=3)
    assert [entry["class"] for entry in answer] == [prediction.class_id for prediction in predictions]
    assert [entry["score"] for entry in answer] == pytest.approx([one.score for one in predictions], abs=1e-5)
