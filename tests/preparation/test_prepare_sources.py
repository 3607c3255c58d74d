"""`prepare` from the files people have: what is matched, filled in, divided, refused and reported."""

import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from PIL import Image

from paml.errors import DataError, LabelError, PamlError
from paml.labels import LabelTable
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.settings import settings_from_values
from paml.shards import Manifest

RED, BLUE = (220, 20, 20), (20, 20, 220)


def picture(path: Path, color: Sequence[int] = RED, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(color)).save(path)


def run(folder: Path, lines: list[str] | None = None, **changes: object) -> dict[str, dict[str, dict[str, int]]]:
    """Prepare `folder`/out from `folder`/images; the labels by split, key and class."""
    values: dict[str, Any] = {
        "out": str(folder / "out"),
        "images": str(folder / "images"),
        "shards.size": 32,
        "shards.samples_per_shard": 50,
        "workers": 1,
        "splits": ["train"],
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    settings = settings_from_values(PrepareSettings, values, "test")
    report = prepare(settings, (lines if lines is not None else []).append)
    return {split: pairs_of(Path(settings.out) / "labels" / f"{split}.arrow") for split in report.splits}


def pairs_of(path: Path) -> dict[str, dict[str, int]]:
    table = LabelTable.open(path)
    labels, keys = table.lookup(np.arange(table.num_images)), table.keys()
    pairs: dict[str, dict[str, int]] = {key: {} for key in keys}
    for image, cls, state in zip(labels.image, labels.cls, labels.state, strict=True):
        pairs[keys[image]][table.classes[cls]] = int(state)
    return pairs


def stored(folder: Path, split: str = "train") -> dict[str, np.ndarray]:
    """The mean color of each stored image, by key."""
    manifest, colors = Manifest.open(folder / "out" / "shards" / split), {}
    for tar in sorted((folder / "out" / "shards" / split).glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                pixels = np.asarray(Image.open(io.BytesIO(file.read())), float)
                colors[member.name.rsplit(".", 1)[0]] = pixels.mean(axis=(0, 1))
    assert len(colors) == manifest.num_samples
    return (
        {key: colors[name] for key, name in zip(manifest.keys().to_pylist(), colors, strict=False)}
        if len(colors) == 1
        else colors
    )


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_split_column(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.jpg")
    rows = (
        "a.jpg,cat,1,train\nb.jpg,cat,0,val\nc.jpg,cat,1,val\nd.jpg,cat,1,Test\nd.jpg,dog,0,Test\na.jpg,dog,1,train\n"
    )
    labels = write(tmp_path / "labels.csv", "image,class,state,split\n" + rows)
    with pytest.raises(DataError, match="test cannot be scored"):
        run(tmp_path, labels=labels, splits=None)
    labels = write(
        tmp_path / "labels.csv", "image,class,state,split\n" + rows + "d.jpg,ape,1,Test\nd2.jpg,ape,0,test\n"
    )
    with pytest.raises(DataError, match="several splits for test: Test, test"):
        run(tmp_path, labels=labels, splits=None)
    labels = write(tmp_path / "labels.csv", "image,class,state,split\n" + rows + "e.jpg,dog,1,Test\n")
    picture(tmp_path / "images" / "e.jpg")
    found = run(tmp_path, labels=labels, splits=None)
    assert found == {
        "train": {"a": {"cat": 1, "dog": 1}},
        "validation": {"b": {"cat": 0}, "c": {"cat": 1}},
        "test": {"d": {"cat": 1, "dog": 0}, "e": {"dog": 1}},
    }


def test_files_by_split(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    for split, rows in {"train": "a,cat,1", "val": "b,cat,1\nc,cat,0"}.items():
        write(tmp_path / "l{1}" / f"{split}.csv", f"image,class,state\n{rows}\n")
    pattern = str(tmp_path / "l{1}" / "{split}.csv")
    assert set(run(tmp_path, labels=pattern, splits=None)) == {"train", "validation"}
    with pytest.raises(LabelError, match=r"no .*l\{1\}/test.csv.*split test"):
        run(tmp_path, labels=pattern, splits=["train", "test"])
    write(tmp_path / "l{1}" / "val.csv", "image,class,state\nb,cat,1\na,cat,0\n")
    with pytest.raises(DataError, match="'a' in train and validation"):
        run(tmp_path, labels=pattern, splits=None)


def test_unlisted_labels_by_split(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(
        tmp_path / "l.csv",
        "image,class,state,split\na,cat,1,train\nb,dog,,train\nb,cat,yes,train\nc,cat,1,test\nc,ape,unknown,test\nd,dog,1,test\n",
    )
    with pytest.raises(DataError, match=r"\{test: negative\}"):
        run(tmp_path, labels=labels, splits=["train", "test"])
    lines: list[str] = []
    found = run(tmp_path, lines, labels=labels, splits=["train", "test"], unlisted={"test": "negative"})
    assert found == {
        "train": {"a": {"cat": 1}, "b": {"cat": 1}},
        "test": {"c": {"cat": 1, "dog": 0}, "d": {"cat": 0, "dog": 1, "ape": 0}},
    }
    assert LabelTable.open(tmp_path / "out/labels/train.arrow").classes == ("ape", "cat", "dog")


def test_values_that_are_not_understood_are_shown(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0.7\na,dog,maybe\nb,dog,maybe\n")
    lines: list[str] = []
    assert run(tmp_path, lines, labels=labels, unlisted={"train": "negative"}) == {"train": {"a": {"cat": 1}}}
    (warning,) = [line for line in lines if line.startswith("WARNING: 3 labels")]
    assert "'maybe' (2), '0.7' (1)" in warning
    found = run(tmp_path, labels=labels, out=str(tmp_path / "out2"), table__negative_words=["maybe"])
    assert found == {"train": {"a": {"cat": 1, "dog": 0}, "b": {"dog": 0}}}


def test_the_photo_that_the_label_names_is_stored(tmp_path: Path) -> None:
    picture(tmp_path / "images/JPEGImages/1.jpg", RED)
    picture(tmp_path / "images/SegmentationClass/1.png", BLUE, (80, 60))
    labels = write(tmp_path / "l.csv", "image,class,state\nJPEGImages/1.jpg,cat,1\n")
    lines: list[str] = []
    run(tmp_path, lines, labels=labels)
    assert stored(tmp_path)["1"][0] > 200
    assert any("SegmentationClass/1.png" in line for line in lines)
    labels = write(tmp_path / "l.csv", "image,class,state\n1,cat,1\n")
    with pytest.raises(DataError, match="2 files have the key '1'"):
        run(tmp_path, labels=labels, out=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("written", "files"),
    [
        ("images\\train\\{}.jpg", "{}.jpg"),
        ("./{}.jpg", "{}.jpg"),
        ("{}", "{}.png"),
    ],
)
@pytest.mark.parametrize("keys", ["name", "path"])
def test_images_are_matched(tmp_path: Path, written: str, files: str, keys: str) -> None:
    for name in "ab":
        picture(tmp_path / "images/train" / files.format(name))
    rows = "".join(f"{written.format(name)},cat,1\n" for name in "ab")
    labels = write(tmp_path / "l.csv", "image,class,state\n" + rows)
    (keys_of_table,) = run(tmp_path, labels=labels, keys=keys).values()
    assert set(keys_of_table) == set(Manifest.open(tmp_path / "out/shards/train").keys().to_pylist())


@pytest.mark.parametrize(
    ("labels", "files", "cause"),
    [
        (["1.0", "2.0"], ["1", "2"], r"'1.0'.*'1'.*'\.0'"),
        (["1", "2"], ["0001", "0002"], "'1'.*'0001'.*zeros"),
        (["A1", "B2"], ["a1", "b2"], "'A1'.*'a1'.*case"),
        (["a", "b", "c"], ["a", "z"], r"1 of 3 labeled images.*'b'.*'z'"),
    ],
)
def test_nothing_is_matched_in_silence(tmp_path: Path, labels: list[str], files: list[str], cause: str) -> None:
    for name in files:
        picture(tmp_path / "images" / f"{name}.jpg")
    path = write(tmp_path / "l.csv", "image,class,state\n" + "".join(f"{name},cat,1\n" for name in labels))
    with pytest.raises(DataError, match=cause):
        run(tmp_path, labels=path)
    assert not (tmp_path / "out/shards").exists()


@pytest.mark.parametrize("keys", ["name", "path"])
def test_tars_folders_and_buckets_follow_one_rule(tmp_path: Path, s3: str, keys: str) -> None:
    """The split's own images if there are any, else those of all splits; keys as in folders."""
    names = ["cats/1.jpg", "dogs/2.jpg"]
    for name in names:
        picture(tmp_path / "images" / name)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/all.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "images" / name, f"./{name}")
    bucket = s3.removeprefix("s3://")
    for name in names:
        for prefix in ("flat", "split/train"):
            boto3.client("s3").upload_file(str(tmp_path / "images" / name), bucket, f"{prefix}/{name}")
    labels = write(tmp_path / "l.csv", "image,class,state\ncats/1.jpg,cat,1\ndogs/2.jpg,dog,0\n")
    expected = {"name": {"1", "2"}, "path": {"cats/1", "dogs/2"}}[keys]
    for number, images in enumerate([tmp_path / "images", tmp_path / "tars", f"{s3}/flat", f"{s3}/split"]):
        for only_labeled in (True, False):
            out = tmp_path / f"out{number}{only_labeled}"
            run(tmp_path, labels=labels, images=str(images), keys=keys, out=str(out), only_labeled=only_labeled)
            assert set(Manifest.open(out / "shards/train").keys().to_pylist()) == expected


def test_tars_without_the_labeled_images(tmp_path: Path) -> None:
    picture(tmp_path / "images/0001.jpg")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/train.tar", "w") as tar:
        tar.add(tmp_path / "images/0001.jpg", "0001.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\n1,cat,1\n")
    with pytest.raises(DataError, match=r"'1'.*'0001'.*zeros"):
        run(tmp_path, labels=labels, images=str(tmp_path / "tars"))


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "images/train/a.jpg")
    write(tmp_path / "images/train/b.jp2", "x")
    write(tmp_path / "images/train/c.JP2", "x")
    write(tmp_path / "images/train/d.raw", "x")
    write(tmp_path / "images/train/notes.txt", "x")
    labels = write(tmp_path / "l.csv", "image,class,state\na.jpg,cat,1\n")
    lines: list[str] = []
    run(tmp_path, lines, labels=labels)
    assert any("3 files" in line and ".jp2 2, .raw 1" in line for line in lines)


@pytest.mark.parametrize("labels_in", ["table", "voc"])
def test_labels_that_grew_add_their_images(tmp_path: Path, labels_in: str) -> None:
    def give(names: str) -> str:
        for name in names:
            picture(tmp_path / "images" / f"{name}.jpg")
            objects = "<annotation><object><name>cat</name></object></annotation>"
            if labels_in == "voc":
                write(tmp_path / "images" / f"{name}.xml", objects)
        rows = "".join(f"{name},cat,1\n" for name in names)
        return write(tmp_path / "l.csv", "image,class,state\n" + rows) if labels_in == "table" else f"{tmp_path}/images"

    images = str(tmp_path / "images") if labels_in == "table" else None
    labels = give("ab")
    run(tmp_path, labels=labels, images=images)
    lines: list[str] = []
    run(tmp_path, lines, labels=labels, images=images)
    assert any("already complete" in line for line in lines)
    give("abc")
    lines = []
    run(tmp_path, lines, labels=labels, images=images)
    assert any(line.startswith("1 labeled images are not in") and "'c'" in line for line in lines)
    assert set(Manifest.open(tmp_path / "out/shards/train").keys().to_pylist()) == set("abc")


def test_good_shards_are_never_deleted(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0\nc,cat,1\n")
    run(tmp_path, labels=labels)
    write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0\nc,cat,1\nd,cat,1\n")
    (tmp_path / "images/a.jpg").rename(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"such as 'd', and 1 of its images have no file"):
        run(tmp_path, labels=labels)
    with pytest.raises(PamlError, match=r"other settings"):
        run(tmp_path, labels=labels, shards__size=64)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/train.tar", "w") as tar:
        for name in "bcd":
            tar.add(tmp_path / "images" / f"{name}.jpg", f"{name}.jpg")
    with pytest.raises(DataError, match=r"such as 'd'.*delete it"):
        run(tmp_path, labels=labels, images=str(tmp_path / "tars"), only_labeled=True)
    assert set(Manifest.open(tmp_path / "out/shards/train").keys().to_pylist()) == set("abc")


def test_splits_of_ours_hold_their_own_images_alone(tmp_path: Path) -> None:
    """Folders of the images by split, and labels whose train is divided into train and validation."""
    rows = []
    for number in range(20):
        split = "test" if number >= 16 else "train"
        picture(tmp_path / "images" / split / f"{number:02}.jpg", (number * 9, 0, 0), (8, 8))
        rows.append(f"{number:02},cat,{number % 2},{split}")
    labels = write(tmp_path / "l.csv", "\n".join(["image,class,state,split", *rows]) + "\n")
    found = run(tmp_path, labels=labels, splits=None, split="0.5,0.5,0")
    for split, pairs in found.items():
        assert set(Manifest.open(tmp_path / "out/shards" / split).keys().to_pylist()) == set(pairs)
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 8, "validation": 8, "test": 4}


def test_splits_prepared_apart_must_not_share_images(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0\n")
    run(tmp_path, labels=labels)
    with pytest.raises(DataError, match=r"2 images of validation are in .*train.arrow"):
        run(tmp_path, labels=labels, splits=["validation"])


def test_names_of_splits_add_to_the_usual_ones(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.jpg")
    rows = "a,cat,1,train\nb,cat,0,holdout\nc,cat,1,holdout\nd,cat,1,extra\n"
    labels = write(tmp_path / "l.csv", "image,class,state,split\n" + rows)
    with pytest.raises(DataError, match=r"split_names"):
        run(tmp_path, labels=labels, splits=None)
    lines: list[str] = []
    found = run(tmp_path, lines, labels=labels, splits=None, split_names={"validation": "holdout"})
    assert {split: set(pairs) for split, pairs in found.items()} == {"train": {"a"}, "validation": {"b", "c"}}
    assert any("1 of 4 images" in line for line in lines)


def test_a_tar_next_to_the_images_is_not_taken_for_them(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    with tarfile.open(tmp_path / "images/masks.tar", "w"):
        pass
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\n")
    run(tmp_path, labels=labels, images=str(tmp_path / "images"))
    run(tmp_path, labels=labels, images=str(tmp_path), out=str(tmp_path / "images/out"))  # shards below the images
    assert Manifest.open(tmp_path / "images/out/shards/train").num_samples == 1


def test_one_missing_file_is_reported(tmp_path: Path) -> None:
    """Other files that the labels name are used, though others have the same keys."""
    names = [f"{n:03}" for n in range(6)]
    for name in names[1:]:
        picture(tmp_path / f"voc/JPEGImages/{name}.jpg")
        picture(tmp_path / f"voc/SegmentationClass/{name}.png", BLUE)
    for name in names:
        write(tmp_path / f"voc/Annotations/{name}.xml", "<annotation><object><name>cat</name></object></annotation>")
    write(tmp_path / "voc/ImageSets/Main/train.txt", "\n".join(names))
    run(tmp_path, labels=str(tmp_path / "voc"), images=None)
    assert set(Manifest.open(tmp_path / "out/shards/train").keys().to_pylist()) == set(names[1:])
    assert all(color[0] > 200 for color in stored(tmp_path).values())


def test_settings_of_other_sources_are_refused(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\n")
    with pytest.raises(PamlError, match=r"openimages"):
        run(tmp_path, labels=labels, openimages__flickr=True)
    with pytest.raises(PamlError, match=r"unlisted does not apply to Open Images"):
        run(tmp_path, labels=labels, source="openimages", unlisted={"train": "negative"})
    with pytest.raises(PamlError, match=r"verdicts_split"):
        run(tmp_path, labels=labels, verdicts=["v.csv"], verdicts_split="test")


def test_only_unknown_values(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,high\n")
    lines: list[str] = []
    with pytest.raises(DataError, match="no label that is positive or negative"):
        run(tmp_path, lines, labels=labels)
    assert any("'high' (1)" in line for line in lines)


def test_images_that_moved_to_another_split(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images/train" / f"{name}.jpg")
    labels = write(
        tmp_path / "l.csv", "image,class,state,split\na,cat,1,train\nb,cat,0,train\nc,cat,1,test\nd,cat,0,test\n"
    )
    run(tmp_path, labels=labels, splits=["train", "test"])
    write(tmp_path / "l.csv", "image,class,state,split\na,cat,1,train\nb,cat,0,test\nc,cat,1,test\nd,cat,0,test\n")
    for _ in range(2):
        lines: list[str] = []
        run(tmp_path, lines, labels=labels, splits=["train", "test"])
        assert Manifest.open(tmp_path / "out/shards/train").keys().to_pylist() == ["a"]
    assert any("already complete" in line for line in lines)


def test_a_second_run_does_not_read_the_output_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/train-0.tar", "w") as tar:
        for number in range(4):
            picture(tmp_path / "a.jpg", (number * 50, 0, 0))
            tar.add(tmp_path / "a.jpg", f"{number}.jpg")
            write(tmp_path / "a.cls", "cat")
            tar.add(tmp_path / "a.cls", f"{number}.cls")
    for out in ("out", "out2"):
        found = run(tmp_path, labels=str(tmp_path / "data"), images=None, out=str(tmp_path / "data" / out))
        assert found == {"train": {str(number): {"cat": 1} for number in range(4)}}


def test_names_of_classes_are_normalized(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(tmp_path / "l.csv", "image,class,state\na,\u00e9,1\nb,e\u0301,0\nc,Cat,1\nc,cat,0\n")
    lines: list[str] = []
    found = run(tmp_path, lines, labels=labels)
    assert found == {"train": {"a": {"\u00e9": 1}, "b": {"\u00e9": 0}, "c": {"Cat": 1, "cat": 0}}}
    assert any(line.startswith("WARNING") and "Cat, cat" in line for line in lines)


def test_a_table_without_gaps_is_complete(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.jpg")
    labels = write(tmp_path / "l.csv", "image,cat,dog\na,1,0\nb,0,1\nc,1,1\nd,0,1\n")
    run(tmp_path, labels=labels, protocol="single-positive")
    single = pairs_of(tmp_path / "out/labels/train-single.arrow")
    assert {key: list(states.values()) for key, states in single.items()} == {key: [1] for key in "abcd"}
    found = run(
        tmp_path,
        labels=write(tmp_path / "m.csv", "image,class\na,cat\nb,dog\n"),
        unlisted="negative",
        out=str(tmp_path / "o"),
    )
    assert found == {"train": {"a": {"cat": 1, "dog": 0}, "b": {"cat": 0, "dog": 1}}}


def test_a_split_without_its_images_cannot_be_scored(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path / "images/d.jpg", "no image")
    labels = write(
        tmp_path / "l.csv", "image,class,state,split\na,cat,1,train\nb,cat,1,test\nc,cat,1,test\nd,cat,0,test\n"
    )
    with pytest.raises(DataError, match=r"test cannot be scored.*1 are missing"):
        run(tmp_path, labels=labels, splits=["train", "test"])


def test_the_same_content_in_two_splits(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png", RED)
    picture(tmp_path / "images/b.png", RED)
    picture(tmp_path / "images/c.png", BLUE)
    labels = write(tmp_path / "l.csv", "image,class,state,split\na,cat,1,train\nb,cat,1,test\nc,cat,0,test\n")
    run(tmp_path, labels=labels, splits=["train", "test"])
    with pytest.raises(DataError, match="'a' in train and 'b' in test"):
        run(tmp_path, labels=labels, splits=["train", "test"], same_image="content")


def test_a_stratified_split_is_the_same_again(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        picture(tmp_path / "images" / f"{number:03}.jpg", (number * 4, 0, 0), (8, 8))
        rows += [f"{number:03},common,{number % 2}", f"{number:03},rare,{int(number % 20 == 0)}"]
    labels = write(tmp_path / "l.csv", "\n".join(["image,class,state", *rows]) + "\n")
    first = run(tmp_path, labels=labels, splits=None, split="0.5,0.25,0.25")
    labels = write(tmp_path / "l2.csv", "\n".join(["image,class,state", *reversed(rows)]) + "\n")
    again = run(tmp_path, labels=labels, splits=None, split="0.5,0.25,0.25", out=str(tmp_path / "out2"))
    assert first == again
    assert {split: len(pairs) for split, pairs in first.items()} == {"train": 30, "validation": 15, "test": 15}
    for pairs in first.values():
        assert any(states["rare"] == 1 for states in pairs.values())
        common = [states["common"] for states in pairs.values()]
        assert abs(sum(common) - len(common) / 2) <= 1


def coco_json(images: Sequence[Mapping], annotations: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    return json.dumps(
        {
            "images": images,
            "annotations": [
                {"id": n, "image_id": image, "category_id": category} for n, (image, category) in enumerate(annotations)
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        }
    )


def test_roboflow_coco_is_detected(tmp_path: Path) -> None:
    for split, names in {"train": "abcd", "valid": "ef"}.items():
        for name in names:
            picture(tmp_path / "data" / split / f"{name}.jpg")
        images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(names)]
        write(
            tmp_path / "data" / split / "_annotations.coco.json",
            coco_json(images, [(0, 1), (1, 2)], ["helmet", "vest"]),
        )
    lines: list[str] = []
    found = run(tmp_path, lines, labels=str(tmp_path / "data"), images=None, splits=None)
    assert any(line.startswith("source: coco") for line in lines)
    assert found["train"]["a"] == {"helmet": 1, "vest": 0}
    assert found["train"]["d"] == {"helmet": 0, "vest": 0}
    assert set(found["validation"]) == {"e", "f"}
    assert Manifest.open(tmp_path / "out/shards/train").num_samples == 4


def test_a_protocol_on_complete_labels(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        picture(tmp_path / "images" / f"{number:02}.jpg", (number * 6, 0, 0), (8, 8))
        rows.append(f"{number:02},{'cat;dog' if number % 2 else 'cat' if number % 3 else 'dog'}")
    labels = write(tmp_path / "l.csv", "\n".join(["image,labels", *rows]) + "\n")
    with pytest.raises(PamlError, match="unlisted"):
        run(tmp_path, labels=labels, splits=None, protocol="single-positive")
    complete = dict.fromkeys(("train", "validation", "test"), "negative")
    lines: list[str] = []
    run(tmp_path, lines, labels=labels, splits=None, protocol="single-positive", unlisted=complete)
    full, single = (pairs_of(tmp_path / "out/labels" / f"train-{name}.arrow") for name in ("full", "single"))
    assert all(len(states) == 2 for states in full.values())
    assert all(list(states.values()) == [1] for states in single.values())
    assert all(full[key].items() >= states.items() for key, states in single.items())
    assert "--data.train_labels labels/train-single.arrow" in lines[-1]
    run(tmp_path, labels=labels, splits=None, protocol="random-share", protocol_share=0.5, unlisted=complete)
    share = pairs_of(tmp_path / "out/labels/train-share.arrow")
    observed = sum(map(len, share.values()))
    assert 0.2 * 2 * len(full) < observed < 0.8 * 2 * len(full)


def test_complete_labels_next_to_partial_ones(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    partial = write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0\nc,dog,1\n")
    full = write(tmp_path / "full.csv", "image,labels\na,cat;dog;ape\nb,dog\nc,dog\nd,cat\n")
    found = run(tmp_path, labels=partial, full_labels=full)
    assert found["train"] == {"a": {"cat": 1}, "b": {"cat": 0}, "c": {"dog": 1}}
    assert pairs_of(tmp_path / "out/labels/train-full.arrow") == {
        "a": {"ape": 1, "cat": 1, "dog": 1}, "b": {"ape": 0, "cat": 0, "dog": 1}, "c": {"ape": 0, "cat": 0, "dog": 1},
    }  # fmt: skip
    write(tmp_path / "full.csv", "image,labels\na,cat;dog\nb,dog\n")
    with pytest.raises(DataError, match="no labels of 1 images of train, such as 'c'"):
        run(tmp_path, labels=partial, full_labels=full)


def test_unknown_and_absent_labels(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    with pytest.raises(DataError, match=r"there is no '.*nowhere.csv'"):
        run(tmp_path, labels=str(tmp_path / "nowhere.csv"))
    with pytest.raises(DataError, match=r"none of the known formats.*coco"):
        run(tmp_path, labels=write(tmp_path / "notes.bin", "x"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\n")
    with pytest.raises(PamlError, match=r"images is not set"):
        run(tmp_path, labels=labels, images=None)


def test_label_tables_alone(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.csv", "image,class,state\na,cat,1\nb,cat,0\n")
    lines: list[str] = []
    assert run(tmp_path, lines, labels=labels, images=None, images_from="none") == {
        "train": {"a": {"cat": 1}, "b": {"cat": 0}}
    }
    assert not (tmp_path / "out/shards").exists()
    assert "--config embeddings" in lines[-1]
