"""COCO's and LVIS's JSON as tools and people write it: layouts, names, partial labels, references to nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paml.errors import DataError, SettingsError
from paml.sources.coco import CocoSettings, detect_coco, read_coco, split_name
from tests.sources.test_full_sets import IMAGES, check_files, labels_of, write


def instances(
    images: Mapping[Any, str] | Sequence[Mapping[str, Any]],
    annotations: Sequence[tuple[Any, Any]],
    categories: Mapping[Any, str],
) -> str:
    """A JSON file. images: id to file name, or entries; annotations: (image id, category id)."""
    entries = [{"id": n, "file_name": name} for n, name in images.items()] if isinstance(images, Mapping) else images
    content = {
        "info": {"description": "test"},
        "images": entries,
        "annotations": [
            {"id": 100 + n, "image_id": image, "category_id": category, "bbox": [0, 0, 1, 1], "segmentation": [[0.5]]}
            for n, (image, category) in enumerate(annotations)
        ],
        "categories": [{"id": n, "name": name} for n, name in categories.items()],
    }
    return json.dumps(content)


def test_roboflow(tmp_path: Path) -> None:
    """A JSON next to the images of each split; ids and file names start again in each."""
    categories = [
        {"id": 0, "name": "helmet", "supercategory": "none"},  # the project, which has the name of a class here
        {"id": 1, "name": "helmet", "supercategory": "helmet"},
        {"id": 2, "name": "vest", "supercategory": "helmet"},
    ]
    files: dict[str, str | bytes] = {}
    for n, split in enumerate(("train", "valid", "test")):
        content = json.loads(instances({0: "a_jpg.rf.0.jpg", 1: f"{split}.jpg"}, [(0, 1), (0, 1), (1, 2)], {}))
        files[f"{split}/_annotations.coco.json"] = json.dumps({**content, "categories": categories})
        files |= {f"{split}/a_jpg.rf.0.jpg": IMAGES[n], f"{split}/{split}.jpg": IMAGES[3 + n]}
    write(tmp_path, files | {"README.roboflow.txt": "x"})
    assert detect_coco(str(tmp_path))
    records = read_coco(str(tmp_path), None, CocoSettings())
    assert labels_of(records, "valid") == {"valid/a_jpg.rf.0.jpg": {"helmet": "1"}, "valid.jpg": {"vest": "1"}}
    assert set(records.splits or ()) == {"train", "valid", "test"}
    assert records.classes is not None
    assert records.classes.classes == ["helmet", "vest"]
    assert records.complete
    assert "category 'helmet'" in records.notes[0]
    check_files(records, tmp_path)


@pytest.mark.parametrize("folder", ["images/", "images/default/", "annotations/", "data/", ""])
def test_cvat(tmp_path: Path, folder: str) -> None:
    """One file, `default`: no splits. The images are where they exist."""
    files: dict[str, str | bytes] = {
        "annotations/instances_default.json": instances({7: "x/ö.png"}, [(7, 3)], {3: "cup"})
    }
    write(tmp_path, files | {f"{folder}x/ö.png": IMAGES[0]})
    for labels in (tmp_path, tmp_path / "annotations", tmp_path / "annotations/instances_default.json"):
        assert detect_coco(str(labels))
        records = read_coco(str(labels), None, CocoSettings())
        assert labels_of(records) == {"x/ö.png": {"cup": "1"}}
        assert records.splits is None
        check_files(records, tmp_path)
    given_folder = read_coco(str(tmp_path), "/elsewhere", CocoSettings())
    assert (given_folder.folder, given_folder.files) == (None, None)


LVIS_IMAGES = [
    {"id": 1, "coco_url": "http://x/train2017/1.jpg", "neg_category_ids": [2], "not_exhaustive_category_ids": [3, 1]},
    {"id": 2, "coco_url": "http://x/val2017/2.jpg", "neg_category_ids": [], "not_exhaustive_category_ids": []},
]
LVIS_CLASSES = {1: "fork", 2: "bun", 3: "cup", 4: "owl"}


def test_lvis(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "lvis_v1_train.json": instances(LVIS_IMAGES, [(1, 1), (2, 4)], LVIS_CLASSES),
        "lvis_v1_image_info_test_dev.json": '{"images": [{"id": 1, "coco_url": "u"}], "categories": []}',
        "train2017/1.jpg": IMAGES[0],
        "val2017/2.jpg": IMAGES[1],
    }
    write(tmp_path, files)
    records = read_coco(str(tmp_path), None, CocoSettings())
    assert labels_of(records) == {
        "train2017/1.jpg": {"fork": "1", "bun": "0", "cup": ""},  # fork: annotated, if not everywhere
        "val2017/2.jpg": {"owl": "1"},
    }
    assert not records.complete
    assert "image_info" in records.notes[0]
    check_files(records, tmp_path)
    assert read_coco(str(tmp_path), None, CocoSettings(complete=True)).complete


def test_lvis_with_unknown_and_contradicting_classes(tmp_path: Path) -> None:
    """Both states of a contradiction are recorded; unknown ids are bad rows."""
    image = {"id": 1, "file_name": "1.jpg", "neg_category_ids": [2, 77]}
    write(tmp_path, {"l.json": instances([image], [(1, 2), (1, 1)], LVIS_CLASSES)})
    records = read_coco(str(tmp_path / "l.json"), None, CocoSettings())
    pairs = list(zip(records.cls.to_pylist(), records.state.to_pylist(), strict=True))
    assert sorted(pairs) == [("bun", "0"), ("bun", "1"), ("fork", "1")]
    assert ["77" in text for _, text in records.bad_rows] == [True]
    plain = instances({1: "b.jpg"}, [(1, 1)], LVIS_CLASSES)
    write(tmp_path, {"plain.json": plain})
    with pytest.raises(DataError, match=r"LVIS files and others.*l.json, plain.json"):
        read_coco(str(tmp_path), None, CocoSettings())


def test_partly_annotated_coco(tmp_path: Path) -> None:
    write(tmp_path, {"l.json": instances({1: "a.jpg"}, [(1, 1)], {1: "cup"})})
    assert not read_coco(str(tmp_path / "l.json"), None, CocoSettings(complete=False)).complete
    with pytest.raises(SettingsError, match=r"coco.complete is 'no'"):
        CocoSettings(complete="no")  # type: ignore[arg-type]


def test_references_to_nothing(tmp_path: Path) -> None:
    """Some are reported with the annotation's id; if all are, the file is refused."""
    path = write(tmp_path, {"l.json": instances({1: "a.jpg"}, [(1, 1), (5, 1), (1, 9)], {1: "cup"})}) / "l.json"
    records = read_coco(str(path), None, CocoSettings())
    assert labels_of(records) == {"a.jpg": {"cup": "1"}}
    assert [number for number, _ in records.bad_rows] == [2, 3]
    assert "annotation 101 refers to image 5" in records.bad_rows[0][1]
    assert "annotation 102 refers to category 9" in records.bad_rows[1][1]
    path.write_text(instances({1: "a.jpg"}, [("1", 1), ("1", 1)], {1: "cup"}))  # text for a number
    with pytest.raises(DataError, match="annotation 100 refers to image '1'"):
        read_coco(str(path), None, CocoSettings())


def test_classes_of_all_files_in_order_of_appearance(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "annotations/train.json": instances({1: "a.jpg"}, [(1, 2)], {2: "pear", 1: "fig"}),
        "annotations/val.json": instances({1: "b.jpg"}, [(1, 1)], {1: "apple", 5: "fig"}),
        "annotations/notes.json": '{"by": "me"}',
    }
    records = read_coco(str(write(tmp_path, files)), None, CocoSettings())
    assert records.classes is not None
    assert records.classes.classes == ["pear", "fig", "apple"]
    assert labels_of(records, "val") == {"b.jpg": {"apple": "1"}}
    assert "annotations/notes.json" in records.notes[0]
    assert "no image was found" in records.notes[1]
    assert records.folder is None


def test_official_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "annotations/captions_val2017.json": '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
        "annotations/instances_val2017.json": instances({1: "000000000001.jpg"}, [], {1: "cup"}),
        "annotations/person_keypoints_val2017.json": "{}",
    }
    records = read_coco(str(write(tmp_path, files)), None, CocoSettings())
    assert labels_of(records) == {"000000000001.jpg": {}}
    assert records.notes[0].startswith("2 other JSON files")


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    one = instances({1: "a.jpg"}, [(1, 1)], {1: "cup"})
    write(tmp_path, {"annotations/train.json": one, "annotations/val.json": one, "images/a.jpg": IMAGES[0]})
    with pytest.raises(DataError, match=r"images/a.jpg' is labeled twice, in train and val"):
        read_coco(str(tmp_path), None, CocoSettings())


def test_an_image_that_is_listed_again_has_the_labels_of_both(tmp_path: Path) -> None:
    content = instances({1: "a.jpg", 2: "a.jpg"}, [(1, 1), (2, 2)], {1: "cup", 2: "fork"})
    records = read_coco(str(write(tmp_path, {"l.json": content}) / "l.json"), None, CocoSettings())
    assert labels_of(records) == {"a.jpg": {"cup": "1", "fork": "1"}}
    assert "1 images again" in records.notes[0]


@pytest.mark.parametrize("name", ["/home/me/photos/a.jpg", "..\\photos\\a.jpg", "https://host/bucket/a.jpg"])
def test_paths_of_another_machine_stay_names(tmp_path: Path, name: str) -> None:
    """The images are near, not where the file says: they are matched by name, below the folder."""
    write(tmp_path, {"set/result.json": instances({1: name}, [(1, 1)], {1: "cup"}), "set/images/a.jpg": IMAGES[0]})
    records = read_coco(str(tmp_path / "set"), None, CocoSettings())
    assert list(records.images) == [name]
    assert (records.folder, records.files) == (str(tmp_path / "set"), None)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "images/../../secret.jpg", "a\0b.jpg", "s3://b/a.jpg"]
)
def test_no_file_leaves_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"secret.jpg": b"x", "set/a.jpg": IMAGES[0]})
    write(tmp_path, {"set/l.json": instances({1: "a.jpg", 2: name}, [(1, 1)], {1: "cup"})})
    records = read_coco(str(tmp_path / "set/l.json"), None, CocoSettings())
    assert records.files is not None
    for file in records.files:
        assert not file or (tmp_path / "set") in (tmp_path / "set" / file).resolve().parents


def test_images_that_are_not_exactly_as_named_are_matched_by_the_folder(tmp_path: Path) -> None:
    """Some are missing, or have another suffix or Unicode form: no list of files, which would lose them."""
    content = instances({1: "a.jpg", 2: "o\u0308.jpg", 3: "c.jpg"}, [(1, 1)], {1: "cup"})
    write(tmp_path, {"l.json": content, "images/ö.JPG": IMAGES[0]})
    records = read_coco(str(tmp_path / "l.json"), None, CocoSettings())
    assert (records.folder, records.files) == (str(tmp_path), None)
    write(tmp_path, {"images/c.jpg": IMAGES[1]})
    records = read_coco(str(tmp_path / "l.json"), None, CocoSettings())
    assert records.files == ["", "", "images/c.jpg"]


def test_split_names() -> None:
    names = {
        "annotations/instances_train2014.json": "train2014",
        "lvis_v1_train.json": "train",
        "lvis_v0.5_val.json": "val",
        "valid/_annotations.coco.json": "valid",
        "test/labels.json": "test",
        "train_coco.json": "train",
        "annotations/instances_my-part.json": "my_part",
        "annotations.json": "",
    }
    assert {name: split_name(name) for name in names} == names


IDS = st.one_of(st.integers(0, 6), st.sampled_from(["1", "x"]), st.just(2.0))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(IDS, IDS), max_size=12),
    negatives=st.lists(st.tuples(st.integers(0, 3), IDS), max_size=6),
    is_lvis=st.booleans(),
)
def test_every_annotation_is_a_label_or_a_bad_row(
    tmp_path: Path, pairs: list[tuple[Any, Any]], negatives: list[tuple[int, Any]], is_lvis: bool
) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
    if is_lvis:
        images = [{**image, "neg_category_ids": [c for i, c in negatives if i == image["id"]]} for image in images]
    classes = {n: f"class {n}" for n in range(4)}
    path = tmp_path / "l.json"
    path.write_text(instances(images, pairs, classes))
    known = [(i, c) for i, c in pairs if i in range(4) and c in range(4)]
    if pairs and not known:
        with pytest.raises(DataError, match="refers to"):
            read_coco(str(path), None, CocoSettings())
        return
    records = read_coco(str(path), None, CocoSettings())
    found = set(zip(records.image.tolist(), records.cls.to_pylist(), records.state.to_pylist(), strict=True))
    wanted = {(int(i), classes[int(c)], "1") for i, c in known}
    listed = negatives if is_lvis else []
    wanted |= {(i, classes[int(c)], "0") for i, c in listed if c in range(4)}
    assert found == wanted
    assert len(records.bad_rows) == len(pairs) - len(known) + sum(c not in range(4) for _, c in listed)
