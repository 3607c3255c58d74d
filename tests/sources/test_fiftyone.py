"""FiftyOne's data sets on disk, as `dataset.export` writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from paml.errors import DataError, SettingsError
from paml.sources.fiftyone import FiftyOneSettings, detect_fiftyone, read_fiftyone
from tests.sources.test_full_sets import IMAGES, check_files, labels_of, write


def classification(label: Any) -> dict[str, Any]:
    return {"_id": {"$oid": "6b0e"}, "_cls": "Classification", "tags": [], "label": label}


def classifications(*labels: Any) -> dict[str, Any]:
    return {"_cls": "Classifications", "classifications": [classification(label) for label in labels]}


def detections(*labels: str) -> dict[str, Any]:
    boxes = [{"_cls": "Detection", "label": label, "bounding_box": [0.1, 0.1, 0.2, 0.2]} for label in labels]
    return {"_cls": "Detections", "detections": boxes}


def sample(path: str, *tags: str, **fields: Any) -> dict[str, Any]:
    return {"_id": {"$oid": "6b"}, "filepath": path, "tags": list(tags), "_media_type": "image", "_rand": 0.9, **fields}


def samples(root: Path, *items: Any) -> Path:
    files: dict[str, str | bytes] = {"metadata.json": "{}", "samples.json": json.dumps({"samples": items})}
    paths = [item["filepath"] for item in items if isinstance(item, dict) and item["filepath"].startswith("data/")]
    return write(root, files | {path: IMAGES[n] for n, path in enumerate(dict.fromkeys(paths))})


def read(root: Path, images: str | None = None, **settings: str):
    assert detect_fiftyone(str(root))
    return read_fiftyone(str(root), images, FiftyOneSettings(**settings))


def test_samples(tmp_path: Path) -> None:
    heat = {"_cls": "Heatmap", "map": None}
    samples(
        tmp_path,
        sample("data/a 1.jpg", "train", "night", truth=classifications("cat", "dog"), heat=heat, weather="rain"),
        sample("data/b.jpg", "test", truth=classifications()),
        sample("data/c.jpg", "train"),
    )
    records = read(tmp_path)
    assert labels_of(records) == {"data/a 1.jpg": {"cat": "1", "dog": "1"}, "data/b.jpg": {}, "data/c.jpg": {}}
    assert records.splits == ["train", "test", "train"]
    assert not records.complete
    check_files(records, tmp_path)
    assert "1 of 3 samples have no value" in records.notes[0], "an empty list is a value"
    assert read(tmp_path / "samples.json").images == records.images
    assert read(tmp_path, images="elsewhere").files is None


def test_fields(tmp_path: Path) -> None:
    one = sample("data/a.jpg", truth=classification("cat"), boxes=detections("car", "car"), model=classification("dog"))
    samples(tmp_path, one, sample("data/b.jpg", absent=classifications("fox")))
    with pytest.raises(DataError, match="truth, boxes, model, absent"):
        read(tmp_path)
    assert labels_of(read(tmp_path, field="boxes"))["data/a.jpg"] == {"car": "1"}
    records = read(tmp_path, field="truth", negative_field="absent")
    assert labels_of(records) == {"data/a.jpg": {"cat": "1"}, "data/b.jpg": {"fox": "0"}}
    with pytest.raises(DataError, match="'ground'"):
        read(tmp_path, field="ground")
    with pytest.raises(SettingsError, match="'absent'"):
        FiftyOneSettings(negative_field="absent")
    samples(tmp_path, sample("data/a.jpg", heat={"_cls": "Segmentation"}))
    with pytest.raises(DataError, match="heat"):
        read(tmp_path)


def test_labels_of_open_images(tmp_path: Path) -> None:
    fields = {"positive_labels": classifications("Cat"), "negative_labels": classifications("Dog", "Cat")}
    samples(tmp_path, sample("data/a.jpg", **fields, detections=detections("Cat")))
    records = read(tmp_path)
    pairs = zip(records.cls.to_pylist(), records.state.to_pylist(), strict=True)
    assert sorted(pairs) == [("Cat", "0"), ("Cat", "1"), ("Dog", "0")], "a contradiction is not resolved here"
    samples(tmp_path, sample("data/a.jpg", negative_labels=classifications("Dog")))
    assert labels_of(read(tmp_path)) == {"data/a.jpg": {"Dog": "0"}}


def test_a_file_per_sample(tmp_path: Path) -> None:
    files = {f"samples/{n}.json": json.dumps(sample(f"data/{n}.jpg", truth=classification("cat"))) for n in "ab"}
    write(tmp_path, {"metadata.json": "{}", **files, "data/a.jpg": IMAGES[0], "data/b.jpg": IMAGES[1]})
    records = read(tmp_path)
    assert labels_of(records) == {"data/a.jpg": {"cat": "1"}, "data/b.jpg": {"cat": "1"}}
    check_files(records, tmp_path)


def test_images_elsewhere(tmp_path: Path) -> None:
    """An export without media names files of another machine; no path leads out of the folder."""
    write(tmp_path, {"secret.jpg": b"x"})
    for path in ("/home/me/set/a.jpg", str(tmp_path / "secret.jpg"), "../secret.jpg"):
        samples(tmp_path / "set", sample(path, truth=classification("cat")))
        records = read(tmp_path / "set")
        assert (records.images, records.files, records.folder) == ([path], None, None)
        assert "set images" in records.notes[0]


def test_what_is_not_an_image_or_a_class(tmp_path: Path) -> None:
    bad = classifications("cat", None, "")
    samples(tmp_path, sample("data/a.jpg", truth=bad), {**sample("data/v.mp4"), "_media_type": "video"})
    records = read(tmp_path)
    assert labels_of(records) == {"data/a.jpg": {"cat": "1"}}
    assert sorted(number for number, _ in records.bad_rows) == [1, 1, 2]
    samples(tmp_path, sample("data/a.jpg", "train", "val", truth=bad))
    with pytest.raises(DataError, match=r"data/a.jpg.*train and val"):
        read(tmp_path)
    samples(tmp_path, *[sample("data/a.jpg", truth=bad)] * 2)
    with pytest.raises(DataError, match=r"data/a.jpg"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("classes", "values"),
    [
        (None, {"a": "cat", "sub/b": None, "c.d": "dog"}),
        (["dog", "cat"], {"a": 1, "sub/b": None, "c.d": 0}),
        (None, {"a": ["cat"], "sub/b": None, "c.d": ["dog", "dog"]}),
        (["dog", "cat"], {"a": [1], "sub/b": None, "c.d": [0]}),
        (None, {"a": {"label": "cat", "confidence": 0.5}, "sub/b": None, "c.d": {"label": "dog"}}),
        (None, {"a": [{"label": "cat", "bounding_box": [0, 0, 1, 1]}], "sub/b": None, "c.d": [{"label": "dog"}]}),
    ],
)
def test_labels_json(tmp_path: Path, classes: list[str] | None, values: dict[str, Any]) -> None:
    files = {f"data/{key}.png": IMAGES[n] for n, key in enumerate(values)}
    write(tmp_path, {"labels.json": json.dumps({"classes": classes, "labels": values}), **files})
    records = read(tmp_path)
    assert labels_of(records) == {"a.png": {"cat": "1"}, "sub/b.png": {}, "c.d.png": {"dog": "1"}}
    assert (records.classes and records.classes.classes) == classes
    assert "1 of 3 samples have no value" in records.notes[0]
    check_files(records, tmp_path)


def test_positions_outside_of_the_classes(tmp_path: Path) -> None:
    write(tmp_path, {"labels.json": json.dumps({"classes": ["cat"], "labels": {"a": [0, 1, -1, True, "new"]}})})
    records = read(tmp_path)
    assert labels_of(records) == {"a": {"cat": "1", "new": "1"}}
    assert [text.split()[-1].strip("'") for _, text in records.bad_rows] == ["1", "-1", "True"]
    assert records.classes is not None
    assert records.classes.classes == ["cat", "new"]


def test_a_folder_per_split(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for n, split in enumerate(("train", "val")):
        files |= {f"{split}/labels.json": json.dumps({"classes": ["cat"], "labels": {f"{n}": 0}})}
        files |= {f"{split}/data/{n}.jpg": IMAGES[n]}
    records = read(write(tmp_path, files))
    assert dict(zip(records.images, records.splits or (), strict=True)) == {"0.jpg": "train", "1.jpg": "val"}
    check_files(records, tmp_path)


def test_a_data_set_in_a_bucket(tmp_path: Path, s3: str) -> None:
    from paml import storage

    storage.write_bytes(f"{s3}/set/val/labels.json", json.dumps({"labels": {"a": "cat"}}).encode())
    storage.write_bytes(f"{s3}/set/val/data/a.jpg", IMAGES[0])
    assert detect_fiftyone(f"{s3}/set")
    records = read_fiftyone(f"{s3}/set", None, FiftyOneSettings())
    assert (records.folder, records.files) == (f"{s3}/set", ["val/data/a.jpg"])


def test_other_files(tmp_path: Path) -> None:
    for text in ("", "[]", '{"images": [], "annotations": []}', '{"samples": 1}', '{"classes": []}', "{{"):
        path = tmp_path / "other.json"
        path.write_text(text)
        assert detect_fiftyone(str(path)) is None
        assert detect_fiftyone(str(tmp_path)) is None
        with pytest.raises(DataError, match=r"other\.json"):
            read_fiftyone(str(path), None, FiftyOneSettings())
    with pytest.raises(DataError, match="none"):
        read_fiftyone(str(tmp_path / "none"), None, FiftyOneSettings())
    write(tmp_path, {"labels.json": '{"classes": [], "labels": {}}'})
    with pytest.raises(DataError, match="no image"):
        read(tmp_path)
