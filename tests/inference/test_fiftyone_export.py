"""A prediction as FiftyOne's data set."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.errors import DataError, SettingsError
from paml.inference.bulk import BulkSettings, predict_images
from paml.inference.fiftyone_export import FiftyOneExportSettings, export_fiftyone
from paml.inference.predictor import open_predictor
from paml.labels import POSITIVE, UNOBSERVED, LabelTable
from paml.sources.fiftyone import FiftyOneSettings, detect_fiftyone, read_fiftyone
from tests.helpers.prepared import COUNTS
from tests.inference.test_bulk import rows_of, write_images


def export(predictions: Path, out: Path, **settings) -> list[str]:
    lines: list[str] = []
    export_fiftyone(FiftyOneExportSettings(predictions=str(predictions), out=str(out), **settings), lines.append)
    return lines


@pytest.fixture(scope="module")
def predicted(trained: str, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prediction of shards, with maps. Do not write to it."""
    out = tmp_path_factory.mktemp("predicted")
    bulk = BulkSettings(top=3, maps=True, value="logit")
    predict_images(trained, str(prepared / "shards/test"), str(out), bulk, log=lambda line: None)
    return out


def test_predictions_of_shards(trained: str, prepared: Path, predicted: Path, tmp_path: Path) -> None:
    """Every image with its classes, maps and true labels, each once; the files exist."""
    labels = prepared / "labels/test.arrow"
    export(predicted, tmp_path, labels=str(labels), top=2, maps=1)
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert len(samples) == COUNTS["test"]
    rows, table, predictor = rows_of(predicted), LabelTable.open(labels), open_predictor(trained)
    names = dict(zip(predictor.classes, predictor.names, strict=True))
    for sample in samples:
        path = Path(sample["filepath"])
        row = rows[path.stem]
        with Image.open(tmp_path / path) as image:
            assert image.size == (predictor.info.image_size,) * 2
        found = sample["predictions"]["classifications"]
        best = np.argsort(-np.array(row["scores"], np.float64), kind="stable")[:2]
        assert [names[row["mids"][i]] for i in best] == [label["label"] for label in found]
        for label, i in zip(found, best, strict=True):
            assert label["confidence"] == pytest.approx(1 / (1 + np.exp(-float(row["scores"][i]))))
        grays = np.asarray(Image.open(tmp_path / sample["map_1"]["map_path"]))
        scores = np.array(row["maps"][best[0]], np.float32).reshape(grays.shape)
        assert grays.max() == (255 if scores.max() > 0 else 0)
        assert np.array_equal(grays > 0, np.round(255 * scores / max(scores.max(), 1e-9)) > 0)
        assert sample["map_1"]["label"] == found[0]["label"]
        assert "map_2" not in sample
        states = table.states([path.stem])[0]
        truth = {label["label"] for label in sample["positive_labels"]["classifications"]}
        assert truth == {table.names[i] for i in np.flatnonzero(states == POSITIVE)}
    ids = [label["_id"]["$oid"] for sample in samples for label in sample["predictions"]["classifications"]]
    assert len(set(ids)) == len(ids)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    fields = {field["name"] for field in metadata["sample_fields"]} - {"id"}
    assert {name for sample in samples for name in sample} - {"_media_type"} == fields


def test_the_source_reads_the_true_labels_back(prepared: Path, predicted: Path, tmp_path: Path) -> None:
    labels = prepared / "labels/test.arrow"
    assert "heatmaps" not in export(predicted, tmp_path, labels=str(labels), maps=0)[0]
    assert detect_fiftyone(str(tmp_path))
    records = read_fiftyone(str(tmp_path), None, FiftyOneSettings())
    table = LabelTable.open(labels)
    keys = [Path(name).stem for name in records.images]
    states = table.states(keys)
    labeled = np.argwhere(states != UNOBSERVED).tolist()
    expected = {(keys[i], table.names[k], str(int(states[i, k] == POSITIVE))) for i, k in labeled}
    assert expected
    triples = {
        (keys[i], cls, state)
        for i, cls, state in zip(records.image, records.cls.to_pylist(), records.state.to_pylist(), strict=True)
    }
    assert triples == expected


def test_a_folder_of_files_is_not_copied(trained: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    predict_images(trained, str(images), str(tmp_path / "scores"), BulkSettings(top=None), log=lambda line: None)
    lines = export(tmp_path / "scores", tmp_path / "out", top=1)
    assert "bulk.maps" in lines[0]
    samples = json.loads((tmp_path / "out/samples.json").read_text())["samples"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metadata.json", "samples.json"]
    rows = rows_of(tmp_path / "scores")
    assert len(samples) == len(rows) == 4
    for sample in samples:
        (label,) = sample["predictions"]["classifications"]
        key = str(Path(sample["filepath"]).relative_to(images).with_suffix(""))
        assert label["confidence"] == max(rows[key]["scores"])


def test_errors(predicted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        export(tmp_path / "none", tmp_path / "out")
    with pytest.raises(SettingsError, match="top is 0"):
        FiftyOneExportSettings(predictions="a", out="b", top=0)
    about = json.loads((predicted / "prediction.json").read_text())
    for name in ("prediction.json", "classes.csv"):
        (tmp_path / name).write_bytes((predicted / name).read_bytes())
    with pytest.raises(DataError, match="incomplete"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/samples.json").exists()
    (tmp_path / "prediction.json").write_text(json.dumps({"images": about["images"]}))
    with pytest.raises(DataError, match="top"):
        export(tmp_path, tmp_path / "out")
