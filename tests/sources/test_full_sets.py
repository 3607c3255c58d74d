"""VOC, COCO, NUS-WIDE and CUB: images and labels of tiny trees in the official formats."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from paml import storage
from paml.data.settings import DataSettings
from paml.errors import DataError
from paml.labels import LabelTable, observe_single_positive, single_positive
from paml.preparation.single_positive import prepare_single_positive
from paml.shards import ShardSettings, write_shards
from paml.sources.coco import coco
from paml.sources.cub import cub
from paml.sources.full import LabeledSplit
from paml.sources.nus_wide import nus_wide
from paml.sources.parts import read_parts
from paml.sources.voc import CLASSES as VOC_CLASSES
from paml.sources.voc import voc
from paml.training.data import open_data
from tests.labels.test_table import pairs_of
from tests.shards.images import source

IMAGES = [data for _, data in source(12)]


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def positives(table: LabelTable) -> dict[str, set[str]]:
    """The positive classes of each image; fails if a label is unobserved."""
    pairs = pairs_of(table)
    assert len(pairs) == table.num_images * table.num_classes
    keys = table.keys()
    return {key: {cls for (image, cls), state in pairs.items() if state == 1 and image == key} for key in keys}


def check_images(split: LabeledSplit, tmp_path: Path) -> None:
    """The parts yield the table's images, and shards can be written from them."""
    found = dict(read_parts(split.parts))
    assert list(found) == split.table.keys()
    report = write_shards(list(found.items()), tmp_path / "shards", ShardSettings(size=16))
    assert (report.written, report.rejected) == (split.table.num_images, 0)


def voc_xml(*objects: tuple[str, int]) -> str:
    body = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated><difficult>{difficult}</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>"
        for name, difficult in objects
    )
    return f"<annotation>\n<folder>VOC2012</folder><size><width>500</width></size>{body}\n</annotation>\n"


@pytest.fixture
def voc_tree(tmp_path: Path) -> Path:
    objects = {
        "2007_000027": [("person", 0), ("person", 1)],
        "2007_000032": [("aeroplane", 0), ("person", 1)],
        "2008_000001": [("dog", 0), ("cat", 0)],
        "2008_000002": [("tvmonitor", 1)],
    }
    files: dict[str, str | bytes] = {f"Annotations/{key}.xml": voc_xml(*said) for key, said in objects.items()}
    files |= {f"JPEGImages/{key}.jpg": IMAGES[n] for n, key in enumerate(objects)}
    files["ImageSets/Main/train.txt"] = "2008_000001\n2007_000027\n2007_000032\n"
    files["ImageSets/Main/val.txt"] = "2008_000002\n"
    files["ImageSets/Main/trainval.txt"] = "2007_000027\n2007_000032\n2008_000001\n2008_000002\n"
    return write(tmp_path / "VOCdevkit" / "VOC2012", files)


def test_voc(voc_tree: Path, tmp_path: Path) -> None:
    splits = voc(str(voc_tree), str(tmp_path / "labels"))
    assert list(splits) == ["train", "test"]
    table = splits["train"].table
    assert table.path == str(tmp_path / "labels" / "train-full.arrow")
    assert table.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert positives(table) == {
        "2007_000027": {"person"},
        "2007_000032": {"aeroplane"},
        "2008_000001": {"dog", "cat"},
    }
    assert positives(splits["test"].table) == {"2008_000002": set()}
    check_images(splits["train"], tmp_path)


def test_voc_difficult_objects_are_negative(voc_tree: Path, tmp_path: Path) -> None:
    pairs = pairs_of(voc(str(voc_tree), str(tmp_path), splits={"all": "trainval"})["all"].table)
    assert pairs["2007_000032", "person"] == pairs["2008_000002", "tvmonitor"] == 0
    assert pairs["2007_000027", "person"] == 1
    assert sum(pairs.values()) == 4


def test_voc_errors(voc_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*ImageSets/Main/test.txt"):
        voc(str(voc_tree), str(tmp_path), splits={"test": "test"})
    (voc_tree / "Annotations/2008_000002.xml").write_text(voc_xml(("unicorn", 0)))
    with pytest.raises(DataError, match="'unicorn': allowed are aeroplane"):
        voc(str(voc_tree), str(tmp_path))
    (voc_tree / "Annotations/2008_000002.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"2008_000002.xml is not a complete XML file"):
        voc(str(voc_tree), str(tmp_path))
    (voc_tree / "Annotations/2008_000002.xml").unlink()
    with pytest.raises(DataError, match=r"there is no .*2008_000002.xml"):
        voc(str(voc_tree), str(tmp_path))


COCO_OBJECTS = {"train2014": {9: [1, 18], 25: [1], 100: [18, 44, 18], 581: []}, "val2014": {42: [44]}}


@pytest.fixture
def coco_tree(tmp_path: Path) -> Path:
    files: dict[str, str | bytes] = {}
    categories = [
        (1, "person", "person"),
        (18, "dog", "animal"),
        (44, "bottle", "kitchen"),
        (90, "toothbrush", "indoor"),
    ]
    for image_set, objects in COCO_OBJECTS.items():
        names = {number: f"COCO_{image_set}_{number:012d}.jpg" for number in objects}
        things = [(number, category) for number, found in objects.items() for category in found]
        said = {
            "info": {"year": 2014},
            "licenses": [],
            "images": [{"id": number, "file_name": name, "height": 4, "width": 4} for number, name in names.items()],
            "annotations": [
                {"id": 1 + n, "image_id": number, "category_id": category, "iscrowd": n % 2, "bbox": [0, 0, 1, 1]}
                for n, (number, category) in enumerate(things)
            ],
            "categories": [{"id": n, "name": name, "supercategory": above} for n, name, above in categories],
        }
        files[f"annotations/instances_{image_set}.json"] = json.dumps(said)
        files |= {f"{image_set}/{name}": IMAGES[n] for n, name in enumerate(names.values())}
    return write(tmp_path / "coco", files)


def test_coco(coco_tree: Path, tmp_path: Path) -> None:
    splits = coco(str(coco_tree), str(tmp_path / "labels"))
    table = splits["train"].table
    assert table.classes == ("person", "dog", "bottle", "toothbrush")
    assert positives(table) == {"100": {"dog", "bottle"}, "25": {"person"}, "9": {"person", "dog"}}
    assert table.keys() == ["100", "25", "9"]
    assert positives(splits["test"].table) == {"42": {"bottle"}}
    check_images(splits["train"], tmp_path)


def test_coco_single_positives_in_the_order_of_the_papers(coco_tree: Path, tmp_path: Path) -> None:
    """Ids sorted as strings: 100, 25, 9."""
    table = coco(str(coco_tree), str(tmp_path))["train"].table
    full = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    sampled = observe_single_positive(table, str(tmp_path / "single.arrow"), 1200, protocol="released")
    expected = {(["100", "25", "9"][row], table.classes[cls]): 1 for row, cls in np.argwhere(single_positive(full))}
    assert pairs_of(sampled) == expected


def test_coco_in_a_bucket(coco_tree: Path, tmp_path: Path, s3: str) -> None:
    for path in coco_tree.rglob("*.*"):
        name = path.relative_to(coco_tree).as_posix()
        storage.copy(str(path), f"{s3}/coco/{name if name.startswith('annotations') else 'images/' + name}")
    split = coco(f"{s3}/coco", str(tmp_path))["train"]
    assert [key for key, _ in read_parts(split.parts)] == ["100", "25", "9"]
    assert dict(read_parts(split.parts))["9"] == IMAGES[0]


def test_coco_errors(coco_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotations/instances_train2017.json or instances_train2017.json"):
        coco(str(coco_tree), str(tmp_path), splits={"train": "train2017"})
    path = coco_tree / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    for broken, message in (
        ({**content, "annotations": [{"id": 7, "image_id": 1234, "category_id": 1}]}, "annotation 7 refers to 1234"),
        ({**content, "annotations": [{"id": 7, "image_id": 9, "category_id": 2}]}, "annotation 7 refers to 2"),
        ({"images": [], "annotations": []}, "has no 'categories'"),
        ({**content, "images": []}, "lists no image"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message):
            coco(str(coco_tree), str(tmp_path))
    path.write_text(path.read_text()[:-5])
    with pytest.raises(DataError, match="is damaged"):
        coco(str(coco_tree), str(tmp_path))


@pytest.fixture
def nus_tree(tmp_path: Path) -> Path:
    concepts = ["airport", "animal", "water"]
    names = {
        "Train": ["actor\\0001_2124494179.jpg", "zoo\\0815_30.jpg", "zoo\\0100_4.jpg"],
        "Test": ["actor\\0002_174174086.jpg"],
    }
    labels = {
        "Train": {"airport": "0 0 1", "animal": "0 1 1", "water": "0 0 0"},
        "Test": {"airport": "1", "animal": "0", "water": "1"},
    }
    files: dict[str, str | bytes] = {"ConceptsList/Concepts81.txt": "\n".join(concepts) + "\n"}
    for phase, listed in names.items():
        files[f"ImageList/{phase}Imagelist.txt"] = "".join(f"{name} \r\n" for name in listed)
        for concept, said in labels[phase].items():
            files[f"Groundtruth/TrainTestLabels/Labels_{concept}_{phase}.txt"] = said.replace(" ", "\n") + "\n"
        for n, name in enumerate(listed):
            files["Flickr/" + name.replace("\\", "/")] = IMAGES[n]
    return write(tmp_path / "NUS-WIDE", files)


def test_nus_wide(nus_tree: Path, tmp_path: Path) -> None:
    splits = nus_wide(str(nus_tree), str(tmp_path / "labels"))
    table = splits["train"].table
    assert table.classes == ("airport", "animal", "water")
    assert positives(table) == {
        "0001_2124494179": set(),
        "0100_4": {"airport", "animal"},
        "0815_30": {"animal"},
    }
    assert positives(splits["test"].table) == {"0002_174174086": {"airport", "water"}}
    check_images(splits["train"], tmp_path)


def test_nus_wide_errors(nus_tree: Path, tmp_path: Path) -> None:
    path = nus_tree / "Groundtruth/TrainTestLabels/Labels_animal_Train.txt"
    path.write_text("0\n1\n")
    with pytest.raises(DataError, match=r"Labels_animal_Train.txt has 2 lines, .*TrainImagelist.txt has 3"):
        nus_wide(str(nus_tree), str(tmp_path))
    path.write_text("0\n1\n2\n")
    with pytest.raises(DataError, match="has a line '2', allowed are 0 and 1"):
        nus_wide(str(nus_tree), str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=r"there is no .*Labels_animal_Train.txt"):
        nus_wide(str(nus_tree), str(tmp_path))


@pytest.fixture
def cub_tree(tmp_path: Path) -> Path:
    images = [
        "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
        "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg",
        "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg",
    ]
    present = {(1, 1): 1, (1, 2): 0, (2, 1): 1, (2, 2): 1, (3, 1): 0, (3, 2): 0}
    lines = [f"{i} {a} {on} {1 + (i + a) % 4} {i * 1.5}" for (i, a), on in present.items()]
    lines[3] += " 0"  # as some lines of the official file have one number more
    files: dict[str, str | bytes] = {
        "CUB_200_2011/images.txt": "".join(f"{n} {name}\n" for n, name in enumerate(images, 1)),
        "CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 1\n",
        "CUB_200_2011/attributes/image_attribute_labels.txt": "\n".join(lines) + "\n",
        "attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::blue\n",
    }
    files |= {f"CUB_200_2011/images/{name}": IMAGES[n] for n, name in enumerate(images)}
    return write(tmp_path / "cub", files) / "CUB_200_2011"


def test_cub(cub_tree: Path, tmp_path: Path) -> None:
    splits = cub(str(cub_tree), str(tmp_path / "labels"))
    table = splits["train"].table
    assert table.classes == ("has_bill_shape::curved_(up_or_down)", "has_wing_color::blue")
    assert positives(table) == {
        "Black_Footed_Albatross_0009_34": set(table.classes),
        "Common_Yellowthroat_0003_190521": set(),
    }
    assert positives(splits["test"].table) == {"Black_Footed_Albatross_0046_18": {table.classes[0]}}
    check_images(splits["train"], tmp_path)


def test_cub_errors(cub_tree: Path, tmp_path: Path) -> None:
    labels = cub_tree / "attributes/image_attribute_labels.txt"
    whole = labels.read_text()
    labels.write_text("".join(line + "\n" for line in whole.splitlines()[:-2]))
    with pytest.raises(DataError, match=r"attribute 1 for image 3, and of 1 more pairs"):
        cub(str(cub_tree), str(tmp_path))
    labels.write_text(whole + "4 1 1 1 1\n")
    with pytest.raises(DataError, match=r"line '4 1 1 1 1' refers to '4'"):
        cub(str(cub_tree), str(tmp_path))
    (cub_tree / "train_test_split.txt").write_text("1 0\n2 1\n")
    with pytest.raises(DataError, match=r"image 3 is in only one of"):
        cub(str(cub_tree), str(tmp_path))


def test_single_positive_protocol(voc_tree: Path, tmp_path: Path) -> None:
    """Training can open the folder; validation is taken from train after the positives were sampled over all of it."""
    sets = voc(str(voc_tree), str(tmp_path / "all"))
    prepare_single_positive(sets, str(tmp_path / "data"), ShardSettings(size=16), validation_fraction=0.4)
    single = LabelTable.open(str(tmp_path / "data/labels/train-single.arrow"))
    full = LabelTable.open(str(tmp_path / "data/labels/train-full.arrow"))
    validation = LabelTable.open(str(tmp_path / "data/labels/validation.arrow"))
    assert sorted([*full.keys(), *validation.keys()]) == sets["train"].table.keys()
    kept = single.keys()
    assert kept == full.keys()
    sampled = observe_single_positive(sets["train"].table, str(tmp_path / "sampled.arrow"), 1200, protocol="released")
    wanted = {pair: state for pair, state in pairs_of(sampled).items() if pair[0] in kept}
    assert pairs_of(single) == wanted
    data = open_data(DataSettings(root=str(tmp_path / "data"), train_labels="labels/train-single.arrow"))
    assert len(data.train.samples) == 2
    assert len(data.validation.samples) == 1
    assert data.train.truth is not None
    assert data.test is not None
    assert data.test.manifest.num_samples == 1
    with pytest.raises(DataError, match="train and test"):
        prepare_single_positive({"train": sets["train"]}, str(tmp_path / "x"), ShardSettings(size=16))
