import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from paml.tracking import Journal, MlflowFollower
from paml.tracking.model import final_model, save_model

from .conftest import differences


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"head.bias": np.arange(3, dtype=np.float32)}, path)
    return str(path)


def test_the_model_is_logged_once_without_a_pickle(run_folder, weights, server, tmp_path, capfd):
    import mlflow
    import yaml

    journal = Journal(run_folder, "driver")
    journal.run(experiment="models", name="m")
    final_model(
        journal, weights=weights, description={"model": {"backbone": "resnet18"}, "path": tmp_path}, num_classes=3
    )
    journal.status("FINISHED")
    for _ in range(2):
        follower = MlflowFollower(run_folder, server.uri, poll_s=0.1)
        assert follower.close(60) == 0
        assert differences(run_folder, server.uri) == []
    assert capfd.readouterr() == ("", "")

    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(follower.run_id)
    (output,) = run.outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location
    folder = Path(mlflow.artifacts.download_artifacts(location, tracking_uri=server.uri))
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pyc"))]
    assert (folder / "artifacts/model/weights.safetensors").read_bytes() == Path(weights).read_bytes()
    held = json.loads((folder / "artifacts/model/model.json").read_text())
    assert held == {"model": {"backbone": "resnet18"}, "path": str(tmp_path)}
    assert (folder / "code/paml/__init__.py").exists()
    content = yaml.safe_load((folder / "MLmodel").read_text())
    assert (content["run_id"], content["model_id"]) == (run.info.run_id, output.model_id)
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch==") and "+" not in line for line in requirements)
    (inputs,) = json.loads(content["signature"]["inputs"])
    assert inputs["tensor-spec"] == {"dtype": "uint8", "shape": [-1, -1, -1, 3]}
    (outputs,) = json.loads(content["signature"]["outputs"])
    assert outputs["tensor-spec"] == {"dtype": "float32", "shape": [-1, 3]}


@pytest.mark.slow
def test_the_model_loaded_elsewhere_scores_as_paml_does_here(tmp_path):
    import torch
    from safetensors.torch import save_file as save_tensors

    from paml.models import ModelSettings, build_model, load_for_inference

    settings = ModelSettings(backbone="resnet18", weights=None)
    folder = tmp_path / "here"
    folder.mkdir()
    state = {key: value.contiguous() for key, value in build_model(settings, 3, seed=4).state_dict().items()}
    save_tensors(state, folder / "weights.safetensors")
    described = {"model": dataclasses.asdict(settings), "classes": ["a", "b", "c"], "alpha": 2.0}
    out = tmp_path / "out"
    save_model(str(out), weights=str(folder / "weights.safetensors"), description=described, num_classes=3)
    (folder / "model.json").write_text((out / "artifacts/model/model.json").read_text())
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = """
        import sys
        import mlflow, numpy
        model = mlflow.pyfunc.load_model(sys.argv[1])
        numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2])))
        import paml
        print(paml.__file__)
    """
    arguments = [str(out), str(tmp_path / "images.npy"), str(tmp_path / "scores.npy")]
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(out / "code/paml/__init__.py")
    torch.set_num_threads(1)
    scores = np.load(tmp_path / "scores.npy")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, load_for_inference(folder)(images), rtol=0, atol=1e-6)


def test_a_folder_that_is_no_model_is_refused(run_folder, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no file MLmodel"):
        Journal(run_folder, "driver").model(str(tmp_path / "x"))


def test_saving_changes_no_setting_of_the_process(weights, tmp_path):
    import logging
    import os

    before = dict(os.environ), logging.getLogger("mlflow").level
    save_model(str(tmp_path / "out"), weights=weights, description={}, num_classes=3, requirements=["torch"])
    assert (dict(os.environ), logging.getLogger("mlflow").level) == before
    assert (tmp_path / "out" / "requirements.txt").read_text().splitlines()[-1] == "torch"
