"""A predictor reproduces the scores of evaluation, whatever its model is opened from."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.errors import DataError, PamlError, SettingsError
from paml.inference.calibrate import CalibrateSettings, calibrate_run
from paml.inference.predictor import open_predictor, write_model_folder
from paml.inference.single import predict_image
from paml.metrics.calibration import VALIDITY_NOTE
from paml.runs.folder import settings_of_run
from paml.runs.spec import choose_checkpoint, load_model
from paml.training.data import eval_loader, open_split, split_reader
from paml.training.evaluate import score_pairs
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, SIZE, jpeg_image


def evaluate_logits(folder: str, alpha: float) -> np.ndarray:
    """float32 [n, K]: logits of all test images as computed by evaluation; all their pairs are annotated."""
    run = settings_of_run(folder)
    split = open_split(run.data, "test", "labels/test.arrow", images="observed")
    name, _ = choose_checkpoint(folder, run, "best", alpha)
    pairs = score_pairs(
        load_model(folder, run, name),
        eval_loader(run.data, split, SIZE, World(), batch_size=run.eval_batch_size),
        alphas=(alpha,),
        world=World(),
        autocast=None,
    )[alpha]
    logits = np.full((COUNTS["test"], len(CLASSES)), np.nan, np.float32)
    logits[pairs.image.numpy(), pairs.cls.numpy()] = pairs.score.numpy()
    return logits


def stored_images(folder: str) -> list[bytes]:
    """The test images as stored in their shards."""
    run = settings_of_run(folder)
    split = open_split(run.data, "test", "labels/test.arrow", images="observed")
    reader = split_reader(run.data, split)
    return [reader.read(index) for index in range(COUNTS["test"])]


@pytest.mark.parametrize("alpha", [5.0, 1.0])
def test_scores_equal_those_of_evaluation(trained: str, alpha: float) -> None:
    predictor = open_predictor(f"{trained}:alpha={alpha:g}")
    pixels = np.stack([predictor.decode(data) for data in stored_images(trained)])
    output = predictor.forward(pixels, with_maps=True)
    expected = evaluate_logits(trained, alpha)
    np.testing.assert_allclose(output.logits_BK, expected, atol=1e-5)
    np.testing.assert_allclose(output.scores_BK, 1 / (1 + np.exp(-expected)), atol=1e-5)
    assert output.maps_BKHW is not None
    np.testing.assert_allclose(output.maps_BKHW.mean((2, 3)), output.logits_BK, atol=1e-5)
    np.testing.assert_allclose(predictor.forward(pixels).logits_BK, output.logits_BK, atol=1e-6)
    assert predictor.forward(pixels).maps_BKHW is None


def test_a_model_folder_needs_neither_run_nor_data(trained: str, tmp_path: Path) -> None:
    predictor = open_predictor(trained)
    write_model_folder(str(tmp_path / "m"), predictor.network, predictor.info, None)
    copy = open_predictor(tmp_path / "m")
    assert copy.digest() == predictor.digest()
    assert copy.info == predictor.info
    assert copy.classes == CLASSES
    assert copy.info.image_size == SIZE
    assert copy.info.checkpoint is not None
    again = open_predictor(predictor.source)
    assert (again.digest(), again.source) == (predictor.digest(), predictor.source)
    other = dataclasses.replace(predictor.info, alpha=1.0)
    write_model_folder(str(tmp_path / "other"), predictor.network, other, None)
    assert open_predictor(str(tmp_path / "other")).digest() != predictor.digest()


def test_images_can_be_paths_bytes_arrays_and_pil_images(trained: str, tmp_path: Path) -> None:
    predictor = open_predictor(trained)
    with Image.open(io.BytesIO(jpeg_image("test", 1, 48))) as opened:
        image = opened.convert("RGB")
    path = tmp_path / "image.png"
    image.save(path)
    expected = predictor.predict(path, top=3)
    assert [prediction.score for prediction in expected] == sorted((p.score for p in expected), reverse=True)
    assert expected[0].class_id in CLASSES
    for same in (str(path), path.read_bytes(), np.asarray(image), image):
        assert predictor.predict(same, top=3) == expected
    batched = predictor.predict([path, image, *[np.asarray(image)] * 40], top=3)
    assert len(batched) == 42
    for predictions in (batched[0], batched[-1], *predictor.predict(np.asarray(image)[None], top=3)):
        assert [prediction.class_id for prediction in predictions] == [prediction.class_id for prediction in expected]
        np.testing.assert_allclose([p.score for p in predictions], [p.score for p in expected], atol=1e-6)
    maps = predictor.maps(image)
    np.testing.assert_allclose(1 / (1 + np.exp(-maps.mean((1, 2))[expected[0].index])), expected[0].score, atol=1e-5)
    assert all(part in repr(predictor) for part in (predictor.source, "12 classes", f"{SIZE} px", "not calibrated"))
    for wrong, match in ((np.zeros((8, 8)), "float64"), (np.zeros((8, 8, 4), np.uint8), r"8, 8, 4"), (None, "object")):
        with pytest.raises(DataError, match=match):
            predictor.predict(wrong)


def test_a_calibration_is_used_for_its_checkpoint_and_alpha(calibrated: tuple[str, list[str]]) -> None:
    folder, lines = calibrated
    predictor = open_predictor(folder)
    assert predictor.calibration is not None
    plain = open_predictor(folder, calibrated=False)
    assert plain.calibration is None
    assert open_predictor(f"{folder}:alpha=1").calibration is None
    pixels = np.stack([plain.decode(data) for data in stored_images(folder)])
    output, before = predictor.forward(pixels), plain.forward(pixels)
    np.testing.assert_array_equal(output.logits_BK, before.logits_BK)
    expected = predictor.calibration.scores(before.logits_BK, np.arange(len(CLASSES)))
    np.testing.assert_allclose(output.scores_BK, expected, atol=1e-6)
    assert np.abs(output.scores_BK - before.scores_BK).max() > 0.01
    text = "\n".join(lines)
    assert VALIDITY_NOTE in text
    assert "on test: calibration error" in text
    facts = predictor.calibration.facts
    assert (facts["pairs"], facts["images"]) == (COUNTS["validation"] * len(CLASSES), COUNTS["validation"])
    assert facts["log_loss_after"] < facts["log_loss_before"] + 0.05
    diagrams = list((Path(folder) / "calibration").glob("*.png"))
    assert len(diagrams) == 1
    with Image.open(diagrams[0]) as diagram:
        assert diagram.size[0] > 800


def test_predictions_show_whether_they_reach_their_thresholds(calibrated: tuple[str, list[str]]) -> None:
    predictor = open_predictor(calibrated[0])
    assert predictor.calibration is not None
    predictor.calibration.threshold[:] = np.nan
    predictor.calibration.threshold[:2] = 0.5
    scores = np.full(len(CLASSES), 0.1)
    scores[[0, 1, 2]] = 0.5, 0.4, 0.9
    predictions = predictor.top_classes(scores, 3)
    assert [(one.index, one.above_threshold) for one in predictions] == [(2, None), (0, True), (1, False)]


def test_one_image_is_listed_and_drawn_with_its_maps(calibrated: tuple[str, list[str]], tmp_path: Path) -> None:
    image = tmp_path / "image.jpg"
    image.write_bytes(jpeg_image("test", 1, 48))
    lines: list[str] = []
    predictor = open_predictor(calibrated[0])
    predictions = predict_image(predictor, str(image), top=5, show=str(tmp_path / "out.png"), log=lines.append)
    assert len(predictions) == 5
    assert [one.score for one in predictions] == sorted((one.score for one in predictions), reverse=True)
    assert predictions[0].class_id in lines[0]
    assert "scores are calibrated" in lines[5]
    with Image.open(tmp_path / "out.png") as plot:
        colors = np.asarray(plot.convert("RGB"))
    assert colors.shape[1] > 600
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize("content", [None, b"no image", b""])
def test_an_unreadable_image_is_named(trained: str, tmp_path: Path, content: bytes | None) -> None:
    image = tmp_path / "image.jpg"
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(DataError, match=r"image\.jpg"):
        predict_image(open_predictor(trained), str(image))


def test_anything_else_than_a_model_is_refused(trained: str, tmp_path: Path) -> None:
    def refused(match: str, kind: type[PamlError] = DataError) -> None:
        with pytest.raises(kind, match=match):
            open_predictor(str(tmp_path))

    refused(r"run\.json.*model\.json")
    (tmp_path / "model.json").write_text("{")
    refused(r"model\.json")
    (tmp_path / "model.json").write_text('{"alpha": 1}')
    refused(r"model\.json.*'model'")
    predictor = open_predictor(trained)
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(predictor.info)))
    refused(r"weights\.safetensors is missing")
    write_model_folder(str(tmp_path), predictor.network, predictor.info, None)
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-100])
    refused(r"weights\.safetensors")
    with pytest.raises(ValueError, match="float64"):
        predictor.forward(np.zeros((1, 8, 8, 3)))
    with pytest.raises(SettingsError, match="check is 'test'"):
        CalibrateSettings(run=trained, split="test", check="test")
    with pytest.raises(DataError, match=r"run\.json"):
        calibrate_run(CalibrateSettings(run=str(tmp_path)))
