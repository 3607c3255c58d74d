"""Exported files give the checkpoint's scores, in any batch size, and one that does not is not written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paml.data.decode import decode_rgb
from paml.errors import SettingsError
from paml.models import CamClassifier
from paml.models.inference import Inference
from paml.predict import export as exporting
from paml.predict.export import (
    ExportError,
    ExportSettings,
    difference,
    export,
    run_onnx,
    run_program,
    write_onnx,
    write_program,
)
from paml.predict.predictor import open_predictor
from tests.helpers.prepared import CLASSES, SIZE, picture

BATCHES = (1, 2, 7)


def pictures(count: int) -> np.ndarray:
    """uint8 [count, S, S, 3]."""
    return np.stack([decode_rgb(picture("test", number)) for number in range(count)])


def agrees(model: str, run, path: str, *, maps: bool) -> None:
    """Every output of the file, in batches of every size, is the predictor's within 1e-4."""
    predictor = open_predictor(model)
    for count in BATCHES:
        own = predictor.predict(pictures(count), maps=True)
        found = run(path, pictures(count))
        expected = [own.logits_BK, own.scores_BK, *([own.maps_BKHW] if maps else [])]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("write", "run"), [(write_onnx, run_onnx), (write_program, run_program)])
def test_boost_calibration_and_any_batch_size_are_in_the_file(write, run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CamClassifier(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU()), 8, 5)
    own = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "slope": [1, 2, 3, 4, 5], "offset": [1, 0, -1, -2, -3]}
    module = Inference(network, alpha=5.0, with_maps=True, **own)
    write(module, SIZE, str(tmp_path / "file"))
    assert difference(module, SIZE, lambda images: run(str(tmp_path / "file"), images)) < 1e-4
    logits, scores, maps = run(str(tmp_path / "file"), pictures(7))
    np.testing.assert_allclose(maps.mean((2, 3)), logits, atol=1e-5)
    expected = 1 / (1 + np.exp(-(np.array(own["slope"]) * logits + np.array(own["offset"]))))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    raw = network.maps((torch.from_numpy(pictures(7)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2).detach().numpy()
    assert (raw > 0).any()
    np.testing.assert_allclose(maps, np.where(raw > 0, 5 * raw, raw), atol=1e-4)


@pytest.mark.slow
def test_programs_of_torch_give_the_checkpoints_scores_with_and_without_maps(
    calibrated: tuple[str, list[str]], tmp_path: Path
) -> None:
    said: list[str] = []
    written = export(ExportSettings(model=calibrated[0], out=str(tmp_path), formats=("torch",)), said.append)
    assert [Path(path).name for path in written] == ["model.pt2", "model-maps.pt2"]
    agrees(calibrated[0], run_program, written[0], maps=False)
    agrees(calibrated[0], run_program, written[1], maps=True)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["classes"] == list(CLASSES)
    copy, first = open_predictor(str(tmp_path)), open_predictor(calibrated[0])
    assert copy.digest() == first.digest()
    assert len(said) == 3


@pytest.mark.slow
def test_onnx_files_give_the_checkpoints_scores_with_and_without_maps(
    calibrated: tuple[str, list[str]], tmp_path: Path
) -> None:
    written = export(ExportSettings(model=calibrated[0], out=str(tmp_path), formats=("onnx",)), lambda line: None)
    assert [Path(path).name for path in written] == ["model.onnx", "model-maps.onnx"]
    agrees(calibrated[0], run_onnx, written[0], maps=False)
    agrees(calibrated[0], run_onnx, written[1], maps=True)
    import onnx

    model = onnx.load(written[1])
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["logits", "scores", "maps"]
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".data"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_the_usual_networks_can_be_exported(backbone: str, tmp_path: Path) -> None:
    from paml.models import ModelSettings, build_model
    from paml.predict.predictor import ModelFacts, Predictor

    settings = ModelSettings(backbone=backbone, weights=None, output_stride=16)
    facts = ModelFacts(settings, 5.0, ("a", "b"), ("A", "B"), 64)
    module = Predictor(build_model(settings, 2, seed=1), facts).inference(with_maps=True)
    write_onnx(module, 64, str(tmp_path / "model.onnx"))
    assert difference(module, 64, lambda images: run_onnx(str(tmp_path / "model.onnx"), images)) < 1e-4
    write_program(module, 64, str(tmp_path / "model.pt2"))
    assert difference(module, 64, lambda images: run_program(str(tmp_path / "model.pt2"), images)) < 1e-4


@pytest.mark.slow
def test_a_file_that_differs_is_refused_and_not_written(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(module, size: int, path: str) -> None:
        with torch.no_grad():
            module.model.head.bias += 0.01
        write_program(module, size, path)
        with torch.no_grad():
            module.model.head.bias -= 0.01

    monkeypatch.setattr(exporting, "write_program", spoiled)
    settings = ExportSettings(model=trained, out=str(tmp_path / "out"), formats=("torch",), maps="without")
    with pytest.raises(ExportError, match=r"would differ .* by 0\.01"):
        export(settings)
    assert not list((tmp_path / "out").iterdir())


def test_the_difference_counts_shapes_and_what_is_not_finite(trained: str) -> None:
    module = open_predictor(trained).inference(with_maps=True)

    def own(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [values.numpy().copy() for values in module(torch.from_numpy(images))]

    def with_nan(images: np.ndarray) -> list[np.ndarray]:
        found = own(images)
        found[2][0, 0, 0, 0] = np.nan
        return found

    assert difference(module, SIZE, own) == 0
    assert difference(module, SIZE, with_nan) == float("inf")
    assert difference(module, SIZE, lambda images: [values[:1, :1] for values in own(images)]) == float("inf")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="name onnx, torch or both"):
        ExportSettings(formats=("tflite",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="allowed are both, with, without"):
        ExportSettings(maps="all")  # pyright: ignore[reportArgumentType]
