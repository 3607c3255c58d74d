"""The papers' single-positive protocol on their data sets, from the official trees to prepared data."""

import json
from pathlib import Path

import numpy as np
import pytest

from paml.data.settings import DataSettings
from paml.labels import POSITIVE, LabelTable
from paml.preparation.prepare import prepare
from paml.preparation.protocol import PAPER_VALIDATION
from paml.preparation.settings import PrepareSettings
from paml.shards import Manifest, ShardSettings
from paml.sources.voc import CLASSES
from paml.training.data import open_data
from tests.helpers.shared import shared
from tests.shards.images import source

IMAGE = source(1)[0][1]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_voc(root: Path, train: np.ndarray, test: np.ndarray) -> list[str]:
    """A tree of these labels, bool[N, 20]; returns the keys of train, in the order of the rows."""
    keys = {split: [f"{split}_{n:06}" for n in range(len(full))] for split, full in (("train", train), ("val", test))}
    for split, full in (("train", train), ("val", test)):
        write(root / "ImageSets/Main" / f"{split}.txt", "\n".join(keys[split]))
        for key, row in zip(keys[split], full, strict=True):
            objects = "".join(f"<object><name>{CLASSES[cls]}</name></object>" for cls in np.flatnonzero(row))
            write(root / "Annotations" / f"{key}.xml", f"<annotation>{objects}</annotation>")
            write(root / "JPEGImages" / f"{key}.jpg", IMAGE)
    return keys["train"]


def write_coco(root: Path, train: np.ndarray, test: np.ndarray) -> list[str]:
    """As `write_voc`; ids ascend as texts, as the papers order them: 1, 10, 100, 101, ..."""
    ids = {
        "train2014": sorted(map(str, range(1, 1 + len(train)))),
        "val2014": [str(9000 + n) for n in range(len(test))],
    }
    for split, full in (("train2014", train), ("val2014", test)):
        images = [{"id": int(n), "file_name": f"COCO_{split}_{int(n):012}.jpg"} for n in ids[split]]
        annotations = [
            {"id": n, "image_id": int(ids[split][row]), "category_id": int(cls) + 1}
            for n, (row, cls) in enumerate(np.argwhere(full))
        ]
        categories = [{"id": n, "name": name} for n, name in enumerate(CLASSES, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
        for image in images:
            write(root / split / image["file_name"], IMAGE)
    return ids["train2014"]


@pytest.mark.parametrize(("name", "write_tree"), [("voc", write_voc), ("coco", write_coco)])
def test_equals_the_released_script(name: str, write_tree, tmp_path: Path) -> None:
    golden = np.load(shared("golden", "single_positive_seed1200.npz"))
    full, observed = golden["train_full"] == 1, golden["train_observed"] == 1
    keys = write_tree(tmp_path / "tree", full, golden["val_full"][:9] == 1)
    out = tmp_path / "data"
    settings = PrepareSettings(
        source=name, labels=str(tmp_path / "tree"), out=str(out), protocol="single-positive",
        shards=ShardSettings(size=16), workers=2,
    )  # fmt: skip
    prepare(settings, lambda line: None)
    single, truth, validation = (
        LabelTable.open(out / "labels" / f"{table}.arrow") for table in ("train-single", "train-full", "validation")
    )
    held_out = np.random.RandomState(1200).permutation(len(keys))[-round(PAPER_VALIDATION * len(keys)) :]
    trained = np.sort(np.setdiff1d(np.arange(len(keys)), held_out))
    assert single.keys() == truth.keys() == [keys[row] for row in trained]
    assert validation.keys() == [keys[row] for row in np.sort(held_out)]
    np.testing.assert_array_equal(single.states(single.keys()) == POSITIVE, observed[trained])
    np.testing.assert_array_equal(truth.states(truth.keys()) == POSITIVE, full[trained])
    np.testing.assert_array_equal(validation.states(validation.keys()) == POSITIVE, full[np.sort(held_out)])
    assert LabelTable.open(out / "labels/test.arrow").num_images == 9
    assert not list((out / "labels").glob("all-*"))
    data = open_data(DataSettings(root=str(out), train_labels="labels/train-single.arrow"))
    assert (len(data.train.samples), len(data.validation.samples)) == (400, 100)
    assert data.train.truth is not None
    assert Manifest.open(out / "shards/test").num_samples == 9


def test_images_without_objects_are_left_out_of_coco(tmp_path: Path) -> None:
    full = np.random.default_rng(0).random((60, 20)) < 0.2
    full[7] = False
    keys = write_coco(tmp_path / "tree", full, full[8:14])
    for protocol in (None, "single-positive"):
        out = tmp_path / f"out-{protocol}"
        prepare(
            PrepareSettings(
                labels=str(tmp_path / "tree"), out=str(out), protocol=protocol, shards=ShardSettings(size=16), workers=2
            ),
            lambda line: None,
        )
        trained = {
            key for split in ("train", "validation") for key in Manifest.open(out / "shards" / split).keys().to_pylist()
        }
        name = f"COCO_train2014_{int(keys[7]):012}"
        assert ({name, keys[7]} & trained == {name}) == (protocol is None)
