import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.inference.predictor import ModelInfo, open_predictor, write_model_folder
from paml.metrics.calibration import CalibrationSettings, calibrate
from paml.models import ModelSettings, build_model
from paml.runs.journal import Journal
from paml.tracking.follower import Follower
from paml.tracking.mlflow_sink import MlflowSink
from paml.tracking.model import log_model, save_model
from tests.helpers.prepared import jpeg_image

from .conftest import differences

CLASSES, NAMES = ("/m/a", "/m/b", "/m/c"), ("Cat", "Dog", "Cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibrated model folder."""
    folder = str(tmp_path_factory.mktemp("model"))
    settings = ModelSettings(backbone="shufflenet_v2_x0_5", feature_layer="stage3", weights=None, output_stride=8)
    rng = np.random.default_rng(0)
    cls, logit = rng.integers(0, 3, 600), rng.normal(size=600)
    made = calibrate(cls, logit, rng.random(600) < 1 / (1 + np.exp(1 - logit)), 3, CalibrationSettings(precision=0.5))
    network = build_model(settings, 3, seed=4)
    write_model_folder(folder, network, ModelInfo(settings, 2.0, CLASSES, NAMES, 48), made)
    return folder


def test_the_model_is_logged_once_without_a_pickle(run_folder, model, server, capfd):
    import mlflow
    import yaml

    journal = Journal(run_folder, "driver")
    journal.run(experiment="models", name="m")
    log_model(journal, model=model)
    journal.status("FINISHED")
    for _ in range(2):
        follower = Follower(run_folder, MlflowSink(run_folder, server.uri), "mlflow", poll_s=0.1)
        assert follower.close(60) == 0
        assert differences(run_folder, server.uri) == []
    assert capfd.readouterr() == ("", "")

    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(follower.sink.run_id)
    (output,) = run.outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location
    folder = Path(mlflow.artifacts.download_artifacts(location, tracking_uri=server.uri))
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    assert open_predictor(str(folder)).digest() == open_predictor(model).digest()
    assert (folder / "code/paml/__init__.py").exists()
    content = yaml.safe_load((folder / "MLmodel").read_text())
    assert (content["run_id"], content["model_id"]) == (run.info.run_id, output.model_id)
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch==") and "+" not in line for line in requirements)
    (inputs,) = json.loads(content["signature"]["inputs"])
    assert (inputs["name"], inputs["type"]) == ("image", "binary")
    assert {entry["name"] for entry in json.loads(content["signature"]["params"])} == {"top", "maps"}
    assert (folder / "input_example.json").exists()


def expected(model: str, data: bytes, top: int) -> list[dict]:
    predictor = open_predictor(model)
    found = predictor.top_classes(predictor.forward(predictor.decode(data)[None]).scores_BK[0], top)
    return [{"class": one.class_id, "name": one.name, "score": one.score} for one in found]


@pytest.mark.slow
def test_the_served_model_predicts_as_the_checkpoint(model, tmp_path):
    out = tmp_path / "out"
    save_model(str(out), model=model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "mlflow", "models", "serve", "-m", str(out), "--env-manager", "local", "-p", str(port), "-w", "1"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment | {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def call(body: dict) -> list[list[dict]]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["predictions"]

    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end, (tmp_path / "serve.log").read_text()[-3000:]
                time.sleep(0.2)
        images = [jpeg_image("test", number, 60 + number) for number in range(2)]
        coded = [base64.b64encode(image).decode() for image in images]
        answers = call({"dataframe_records": [{"image": image} for image in coded], "params": {"top": 2}})
        for answer, image in zip(answers, images, strict=True):
            assert [set(entry) for entry in answer] == [{"class", "name", "score", "above_threshold"}] * 2
            for entry, own in zip(answer, expected(model, image, 2), strict=True):
                assert (entry["class"], entry["name"]) == (own["class"], own["name"])
                assert entry["score"] == pytest.approx(own["score"], abs=1e-5)
        (answer,) = call({"inputs": {"image": coded[:1]}, "params": {"maps": True, "top": 3}})
        assert [entry["score"] for entry in answer[:2]] == [entry["score"] for entry in answers[0]]
        drawn = [Image.open(io.BytesIO(base64.b64decode(entry["map"]))) for entry in answer]
        assert [(picture.format, picture.size) for picture in drawn] == [("PNG", (48, 48))] * 3
        assert (np.asarray(drawn[0]) != np.asarray(drawn[2])).any()
        with pytest.raises(urllib.error.HTTPError) as refused:
            call({"dataframe_records": [{"image": base64.b64encode(b"not an image").decode()}]})
        assert refused.value.code == 400
        assert "image 0" in refused.value.read().decode()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_loaded_model_takes_bytes(model, tmp_path):
    import mlflow
    import pandas

    save_model(str(tmp_path / "out"), model=model)
    requirements = (tmp_path / "out" / "requirements.txt").read_text()
    assert "torch==" in requirements
    assert "+" not in requirements
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "out"))
    image = jpeg_image("test", 3, 50)
    (answer,) = loaded.predict(pandas.DataFrame({"image": [image]}), params={"top": 3})
    for entry, own in zip(answer, expected(model, image, 3), strict=True):
        assert entry["class"] == own["class"]
        assert entry["score"] == pytest.approx(own["score"], abs=1e-5)
    with pytest.raises(mlflow.MlflowException, match="top is 0"):
        loaded.predict(pandas.DataFrame({"image": [image]}), params={"top": 0})


def test_a_folder_without_a_model_is_refused(run_folder, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="MLmodel"):
        Journal(run_folder, "driver").model(str(tmp_path / "x"))


def test_saving_changes_no_setting_of_the_process(model, tmp_path):
    import logging

    before = dict(os.environ), logging.getLogger("mlflow").level
    save_model(str(tmp_path / "out"), model=model)
    assert (dict(os.environ), logging.getLogger("mlflow").level) == before
