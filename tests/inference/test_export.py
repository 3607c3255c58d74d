"""Exported files reproduce the checkpoint in any batch size; a file that does not is not written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paml.data.decode import decode_rgb
from paml.errors import SettingsError
from paml.inference import export as exporting
from paml.inference.export import (
    ExportError,
    ExportSettings,
    export,
    max_difference,
    run_onnx,
    run_program,
    write_onnx,
    write_program,
)
from paml.inference.predictor import open_predictor
from paml.models import CamClassifier
from paml.models.backbones import BackboneInfo
from paml.models.inference import Inference
from tests.helpers.prepared import CLASSES, SIZE, jpeg_image

BATCHES = (1, 2, 7)


def images_of(count: int) -> np.ndarray:
    """uint8 [count, S, S, 3]."""
    return np.stack([decode_rgb(jpeg_image("test", number)) for number in range(count)])


def check_outputs(model: str, run, path: str, *, maps: bool) -> None:
    """Assert that every output equals the predictor's within 1e-4, in every batch size."""
    predictor = open_predictor(model)
    for count in BATCHES:
        output = predictor.forward(images_of(count), with_maps=True)
        expected = [output.logits_BK, output.scores_BK, *([output.maps_BKHW] if maps else [])]
        for actual, values in zip(run(path, images_of(count)), expected, strict=True):
            assert actual.dtype == np.float32
            np.testing.assert_allclose(actual, values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("write", "run"), [(write_onnx, run_onnx), (write_program, run_program)])
def test_files_contain_boost_and_calibration_and_take_any_batch_size(write, run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    info = BackboneInfo(channels=8, stride=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    network = CamClassifier(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU()), info, 5)
    calibration = {"slope": [1, 2, 3, 4, 5], "offset": [1, 0, -1, -2, -3]}
    module = Inference(network, alpha=5.0, with_maps=True, **calibration)
    write(module, SIZE, str(tmp_path / "file"))
    assert max_difference(module, SIZE, lambda images: run(str(tmp_path / "file"), images)) < 1e-4
    logits, scores, maps = run(str(tmp_path / "file"), images_of(7))
    np.testing.assert_allclose(maps.mean((2, 3)), logits, atol=1e-5)
    expected = 1 / (1 + np.exp(-(np.array(calibration["slope"]) * logits + np.array(calibration["offset"]))))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    raw = network.maps((torch.from_numpy(images_of(7)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2).detach().numpy()
    assert (raw > 0).any()
    np.testing.assert_allclose(maps, np.where(raw > 0, 5 * raw, raw), atol=1e-4)


@pytest.mark.slow
def test_torch_programs_reproduce_the_checkpoint_with_and_without_maps(
    calibrated: tuple[str, list[str]], tmp_path: Path
) -> None:
    lines: list[str] = []
    written = export(ExportSettings(model=calibrated[0], out=str(tmp_path), formats=("torch",)), lines.append)
    assert [Path(path).name for path in written] == ["model.pt2", "model-maps.pt2"]
    check_outputs(calibrated[0], run_program, written[0], maps=False)
    check_outputs(calibrated[0], run_program, written[1], maps=True)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["classes"] == list(CLASSES)
    copy, first = open_predictor(str(tmp_path)), open_predictor(calibrated[0])
    assert copy.digest() == first.digest()
    assert len(lines) == 3


@pytest.mark.slow
def test_onnx_files_reproduce_the_checkpoint_with_and_without_maps(
    calibrated: tuple[str, list[str]], tmp_path: Path
) -> None:
    written = export(ExportSettings(model=calibrated[0], out=str(tmp_path), formats=("onnx",)), lambda line: None)
    assert [Path(path).name for path in written] == ["model.onnx", "model-maps.onnx"]
    check_outputs(calibrated[0], run_onnx, written[0], maps=False)
    check_outputs(calibrated[0], run_onnx, written[1], maps=True)
    import onnx

    model = onnx.load(written[1])
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["logits", "scores", "maps"]
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".data"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_common_backbones_can_be_exported(backbone: str, tmp_path: Path) -> None:
    from paml.inference.predictor import ModelInfo, Predictor
    from paml.models import ModelSettings, build_model

    settings = ModelSettings(backbone=backbone, weights=None, output_stride=16)
    facts = ModelInfo(settings, 5.0, ("a", "b"), ("A", "B"), 64)
    module = Predictor(build_model(settings, 2, seed=1), facts).inference_module(with_maps=True)
    write_onnx(module, 64, str(tmp_path / "model.onnx"))
    assert max_difference(module, 64, lambda images: run_onnx(str(tmp_path / "model.onnx"), images)) < 1e-4
    write_program(module, 64, str(tmp_path / "model.pt2"))
    assert max_difference(module, 64, lambda images: run_program(str(tmp_path / "model.pt2"), images)) < 1e-4


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_with_other_bias(module, size: int, path: str) -> None:
        with torch.no_grad():
            module.model.head.bias += 0.01
        write_program(module, size, path)
        with torch.no_grad():
            module.model.head.bias -= 0.01

    monkeypatch.setattr(exporting, "write_program", write_with_other_bias)
    settings = ExportSettings(model=trained, out=str(tmp_path / "out"), formats=("torch",))
    with pytest.raises(ExportError, match=r"differ .* by 0\.01"):
        export(settings)
    assert not list((tmp_path / "out").iterdir())


def test_other_shapes_and_nan_are_infinitely_different(trained: str) -> None:
    module = open_predictor(trained).inference_module(with_maps=True)

    def same(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [values.numpy().copy() for values in module(torch.from_numpy(images))]

    def with_nan(images: np.ndarray) -> list[np.ndarray]:
        outputs = same(images)
        outputs[2][0, 0, 0, 0] = np.nan
        return outputs

    assert max_difference(module, SIZE, same) == 0
    assert max_difference(module, SIZE, with_nan) == float("inf")
    assert max_difference(module, SIZE, lambda images: [values[:1, :1] for values in same(images)]) == float("inf")


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="tflite"):
        ExportSettings(formats=("tflite",))  # pyright: ignore[reportArgumentType]
