"""A predictor gives the scores of evaluation, wherever its model comes from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paml.data.device import Normaliser
from paml.errors import DataError, PamlError, SettingsError
from paml.predict.calibrate import CalibrateSettings, calibrate_run
from paml.predict.predictor import open_predictor, write_model_folder
from paml.predict.single import predict_photo
from paml.training.data import eval_loader, open_split, split_reader
from paml.training.evaluate import score_pairs
from paml.training.score_run import choose_checkpoint, load_model, settings_of_run
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, SIZE, picture


def evaluated(folder: str, alpha: float) -> np.ndarray:
    """float32 [n, K]: the logits that evaluation ranks, of all test images (all of their pairs are annotated)."""
    run = settings_of_run(folder)
    split = open_split(run.data, "test", "labels/test.arrow", images="observed")
    name, _ = choose_checkpoint(folder, run, "best", alpha)
    normalise = Normaliser(run.model.pixel_mean, run.model.pixel_std, torch.device("cpu"))
    pairs = score_pairs(
        load_model(folder, run, name),
        eval_loader(run, split, SIZE, World()),
        alphas=(alpha,),
        world=World(),
        normalise=normalise,
        autocast=None,
    )[alpha]
    logits = np.full((COUNTS["test"], len(CLASSES)), np.nan, np.float32)
    logits[pairs.image.numpy(), pairs.cls.numpy()] = pairs.score.numpy()
    return logits


def stored(folder: str) -> list[bytes]:
    """The test images as their shards hold them."""
    run = settings_of_run(folder)
    split = open_split(run.data, "test", "labels/test.arrow", images="observed")
    reader = split_reader(run.data, split)
    return [reader.read(index) for index in range(COUNTS["test"])]


@pytest.mark.parametrize("alpha", [5.0, 1.0])
def test_scores_are_those_of_evaluation(trained: str, alpha: float) -> None:
    predictor = open_predictor(f"{trained}:alpha={alpha:g}")
    pixels = np.stack([predictor.decode(data) for data in stored(trained)])
    found = predictor.predict(pixels, maps=True)
    expected = evaluated(trained, alpha)
    np.testing.assert_allclose(found.logits_BK, expected, atol=1e-5)
    np.testing.assert_allclose(found.scores_BK, 1 / (1 + np.exp(-expected)), atol=1e-5)
    assert found.maps_BKHW is not None
    np.testing.assert_allclose(found.maps_BKHW.mean((2, 3)), found.logits_BK, atol=1e-5)
    np.testing.assert_allclose(predictor.predict(pixels).logits_BK, found.logits_BK, atol=1e-6)
    assert predictor.predict(pixels).maps_BKHW is None


def test_a_model_folder_needs_neither_run_nor_data(trained: str, tmp_path: Path) -> None:
    predictor = open_predictor(trained)
    write_model_folder(str(tmp_path / "m"), predictor.network, predictor.facts, None)
    copy = open_predictor(str(tmp_path / "m"))
    assert copy.digest() == predictor.digest()
    assert copy.facts == predictor.facts
    assert copy.facts.classes == CLASSES
    assert copy.facts.image_size == SIZE
    assert copy.facts.checkpoint is not None
    again = open_predictor(predictor.source)
    assert (again.digest(), again.source) == (predictor.digest(), predictor.source)
    other = dataclasses.replace(predictor.facts, alpha=1.0)
    write_model_folder(str(tmp_path / "other"), predictor.network, other, None)
    assert open_predictor(str(tmp_path / "other")).digest() != predictor.digest()


def test_a_calibration_is_found_by_checkpoint_and_alpha(calibrated: tuple[str, list[str]]) -> None:
    folder, said = calibrated
    predictor = open_predictor(folder)
    assert predictor.calibration is not None
    plain = open_predictor(folder, calibrated=False)
    assert plain.calibration is None
    assert open_predictor(f"{folder}:alpha=1").calibration is None
    pixels = np.stack([plain.decode(data) for data in stored(folder)])
    found, before = predictor.predict(pixels), plain.predict(pixels)
    np.testing.assert_array_equal(found.logits_BK, before.logits_BK)
    expected = predictor.calibration.scores(before.logits_BK, np.arange(len(CLASSES)))
    np.testing.assert_allclose(found.scores_BK, expected, atol=1e-6)
    assert np.abs(found.scores_BK - before.scores_BK).max() > 0.01
    text = "\n".join(said)
    assert "people verified" in text
    assert "on test: calibration error" in text
    facts = predictor.calibration.facts
    assert (facts["pairs"], facts["images"]) == (COUNTS["validation"] * len(CLASSES), COUNTS["validation"])
    assert facts["log_loss_after"] < facts["log_loss_before"] + 0.05
    diagrams = list((Path(folder) / "calibration").glob("*.png"))
    assert len(diagrams) == 1
    with Image.open(diagrams[0]) as drawn:
        assert drawn.size[0] > 800


def test_thresholds_mark_what_reaches_them(calibrated: tuple[str, list[str]]) -> None:
    predictor = open_predictor(calibrated[0])
    assert predictor.calibration is not None
    predictor.calibration.threshold[:] = np.nan
    predictor.calibration.threshold[:2] = 0.5
    scores = np.full(len(CLASSES), 0.1)
    scores[[0, 1, 2]] = 0.5, 0.4, 0.9
    found = predictor.top(scores, 3)
    assert [(one.index, one.above_threshold) for one in found] == [(2, None), (0, True), (1, False)]


def test_a_photo_is_said_and_drawn_with_its_maps(calibrated: tuple[str, list[str]], tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(picture("test", 1, 48))
    said: list[str] = []
    predictor = open_predictor(calibrated[0])
    found = predict_photo(predictor, str(photo), top=5, show=str(tmp_path / "out.png"), say=said.append)
    assert len(found) == 5
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].mid in said[0]
    assert "scores are calibrated" in said[0]
    with Image.open(tmp_path / "out.png") as drawn:
        colours = np.asarray(drawn.convert("RGB"))
    assert colours.shape[1] > 600
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize(
    ("content", "match"), [(None, "is not there"), (b"no picture", "cannot be read as a picture"), (b"", "empty file")]
)
def test_a_photo_that_cannot_be_read_is_named(trained: str, tmp_path: Path, content: bytes | None, match: str) -> None:
    photo = tmp_path / "photo.jpg"
    if content is not None:
        photo.write_bytes(content)
    with pytest.raises(DataError, match=match):
        predict_photo(open_predictor(trained), str(photo))


def test_what_is_no_model_is_refused(trained: str, tmp_path: Path) -> None:
    def refused(match: str, kind: type[PamlError] = DataError) -> None:
        with pytest.raises(kind, match=match):
            open_predictor(str(tmp_path))

    refused("neither a run .run.json. nor a model .model.json.")
    (tmp_path / "model.json").write_text("{")
    refused("damaged")
    (tmp_path / "model.json").write_text('{"alpha": 1}')
    refused("another kind of file")
    predictor = open_predictor(trained)
    (tmp_path / "model.json").write_text(json.dumps(predictor.facts.to_json()))
    refused("weights.safetensors is missing")
    write_model_folder(str(tmp_path), predictor.network, predictor.facts, None)
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-100])
    refused("copy the whole model folder again")
    with pytest.raises(ValueError, match="float64"):
        predictor.predict(np.zeros((1, 8, 8, 3)))
    with pytest.raises(SettingsError, match="name another split"):
        CalibrateSettings(run=trained, split="test", check="test")
    with pytest.raises(DataError, match="holds no run"):
        calibrate_run(CalibrateSettings(run=str(tmp_path)))
