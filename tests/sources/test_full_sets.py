"""VOC, COCO, NUS-WIDE and CUB: what is read from tiny trees in the official formats."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paml import storage
from paml.errors import DataError
from paml.labels import single_positive
from paml.sources.coco import CocoSettings, detect_coco, paper_order_key, read_coco
from paml.sources.cub import detect_cub, read_cub
from paml.sources.nus_wide import detect_nus_wide, read_nus_wide
from paml.sources.records import Records
from paml.sources.voc import CLASSES as VOC_CLASSES
from paml.sources.voc import VocSettings, detect_voc, read_voc
from tests.shards.images import source

IMAGES = [data for _, data in source(12)]


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def labels_of(records: Records, split: str | None = None) -> dict[str, dict[str, str]]:
    """The states of each image's classes, as text; of one split or of all."""
    labels: dict[str, dict[str, str]] = {}
    for number, name in enumerate(records.images):
        if split is None or (records.splits is not None and records.splits[number] == split):
            labels[name] = {}
    for image, cls, state in zip(records.image, records.cls.to_pylist(), records.state.to_pylist(), strict=True):
        name = records.images[image]
        if name in labels:
            assert cls not in labels[name], "each pair once"
            labels[name][cls] = state
    return labels


def positives(records: Records, split: str) -> dict[str, set[str]]:
    """The positive classes of each image of a split of complete labels."""
    assert records.complete
    assert set(records.state.to_pylist()) <= {"1"}
    return {name: set(labels) for name, labels in labels_of(records, split).items()}


def check_files(records: Records, root: Path) -> None:
    """The files that the source names exist, one per image."""
    assert records.folder is not None
    assert records.files is not None
    assert len(set(records.files)) == len(records.images)
    for file in records.files:
        assert (Path(records.folder) / file).read_bytes() in IMAGES
        assert root in (Path(records.folder) / file).parents


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


def test_voc(voc_tree: Path) -> None:
    records = read_voc(str(voc_tree), None, VocSettings())
    assert records.classes is not None
    assert tuple(records.classes.classes) == VOC_CLASSES
    assert positives(records, "train") == {
        "2008_000001.jpg": {"dog", "cat"},
        "2007_000027.jpg": {"person"},
        "2007_000032.jpg": {"aeroplane"},
    }
    assert positives(records, "val") == {"2008_000002.jpg": set()}
    assert set(records.splits or ()) == {"train", "val"}
    check_files(records, voc_tree)


def test_voc_difficult_objects(voc_tree: Path) -> None:
    records = read_voc(str(voc_tree), None, VocSettings())
    assert any(note.startswith("3 difficult") for note in records.notes)
    records = read_voc(str(voc_tree), None, VocSettings(difficult="positive"))
    assert positives(records, "val") == {"2008_000002.jpg": {"tvmonitor"}}
    assert positives(records, "train")["2007_000032.jpg"] == {"aeroplane", "person"}


def test_voc_errors(voc_tree: Path) -> None:
    path = voc_tree / "Annotations/2008_000002.xml"
    path.write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"2008_000002.xml is not a complete XML file"):
        read_voc(str(voc_tree), None, VocSettings())
    path.unlink()
    with pytest.raises(DataError, match=r"there is no .*2008_000002.xml"):
        read_voc(str(voc_tree), None, VocSettings())
    (voc_tree / "ImageSets/Main/train.txt").write_text("../../secret\n")
    with pytest.raises(DataError, match=r"secret.xml' is not a path below"):
        read_voc(str(voc_tree), None, VocSettings())


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


def test_coco(coco_tree: Path) -> None:
    records = read_coco(str(coco_tree), None, CocoSettings())
    assert records.classes is not None
    assert records.classes.classes == ["person", "dog", "bottle", "toothbrush"]
    prefix = "COCO_train2014_000000000"
    assert positives(records, "train2014") == {
        f"{prefix}009.jpg": {"person", "dog"},
        f"{prefix}025.jpg": {"person"},
        f"{prefix}100.jpg": {"dog", "bottle"},
        f"{prefix}581.jpg": set(),
    }
    assert positives(records, "val2014") == {"COCO_val2014_000000000042.jpg": {"bottle"}}
    assert "5 images (1 without labels), 4 classes" in records.understood
    check_files(records, coco_tree)


def test_coco_single_positives_in_the_order_of_the_papers(coco_tree: Path) -> None:
    """Ids sorted as strings: 100, 25, 9. The images without objects are not in the papers' sets."""
    records = read_coco(str(coco_tree), None, CocoSettings())
    found = {name: classes for name, classes in positives(records, "train2014").items() if classes}
    names = sorted(found, key=paper_order_key)
    assert [paper_order_key(name) for name in names] == ["100", "25", "9"]
    assert records.classes is not None
    full = np.array([[cls in found[name] for cls in records.classes.classes] for name in names])
    assert full.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert single_positive(full).sum(axis=1).tolist() == [1, 1, 1]


def test_paper_order_key() -> None:
    assert paper_order_key("val2017/000000000139.jpg") == "139"
    assert paper_order_key("COCO_val2014_000000000042") == "42"
    assert paper_order_key("frame_000100.jpg") == "frame_000100.jpg"


def test_coco_in_a_bucket(coco_tree: Path, s3: str) -> None:
    for path in coco_tree.rglob("*.*"):
        name = path.relative_to(coco_tree).as_posix()
        storage.copy(str(path), f"{s3}/coco/{name if name.startswith('annotations') else 'images/' + name}")
    assert detect_coco(f"{s3}/coco") is not None
    records = read_coco(f"{s3}/coco", None, CocoSettings())
    assert records.folder == f"{s3}/coco"
    assert records.files is not None
    assert storage.read_bytes(storage.join(records.folder, records.files[0])) == IMAGES[0]


def test_coco_errors(coco_tree: Path) -> None:
    with pytest.raises(DataError, match="no-such"):
        read_coco(str(coco_tree / "no-such"), None, CocoSettings())
    with pytest.raises(DataError, match=r"there is no .*no-such.json"):
        read_coco(str(coco_tree / "annotations/no-such.json"), None, CocoSettings())
    path = coco_tree / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    image, category = content["images"][0], content["categories"][0]
    for broken, message in (
        ({"images": [], "annotations": []}, "has no 'categories'"),
        ({**content, "images": []}, "lists no image"),
        ({**content, "images": [{"id": 3}]}, "image 3 has no file_name"),
        ({**content, "images": [image, {**image, "file_name": "b.jpg"}]}, "the id 9 is that of .*'b.jpg'"),
        ({**content, "categories": [category, {"id": 5, "name": "person"}]}, "1 and 5, named 'person'"),
        ({**content, "categories": [category, {"id": 1, "name": "b"}]}, "category 1 twice, named 'b'"),
        ({**content, "categories": [{"id": 1, "name": None}]}, "name None"),
        ({**content, "annotations": [{"id": 1, "image_id": 9, "caption": "a dog"}]}, "has captions"),
        ({**content, "annotations": [{"image_id": 9, "segments_info": []}]}, "has panoptic"),
        ({**content, "categories": [{**category, "keypoints": ["nose"]}]}, "has keypoints"),
        ({**content, "annotations": [{"id": 7, "image_id": [9], "category_id": 1}]}, "TypeError"),
        ({**content, "images": [{**image, "file_name": "\ud800"}]}, "UnicodeEncodeError"),
        ([content], "expected a JSON object, got list"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message):
            read_coco(str(path), None, CocoSettings())
    path.write_text(json.dumps(content)[:-5])
    with pytest.raises(DataError, match="is damaged"):
        read_coco(str(coco_tree), None, CocoSettings())


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


def test_nus_wide(nus_tree: Path) -> None:
    records = read_nus_wide(str(nus_tree), None, None)
    assert records.classes is not None
    assert records.classes.classes == ["airport", "animal", "water"]
    assert positives(records, "Train") == {
        "actor/0001_2124494179.jpg": set(),
        "zoo/0100_4.jpg": {"airport", "animal"},
        "zoo/0815_30.jpg": {"animal"},
    }
    assert positives(records, "Test") == {"actor/0002_174174086.jpg": {"airport", "water"}}
    check_files(records, nus_tree)
    elsewhere = read_nus_wide(str(nus_tree), "/data/images", None)
    assert (elsewhere.folder, elsewhere.files) == (None, None)


def test_nus_wide_errors(nus_tree: Path) -> None:
    path = nus_tree / "Groundtruth/TrainTestLabels/Labels_animal_Train.txt"
    path.write_text("0\n1\n")
    with pytest.raises(DataError, match=r"Labels_animal_Train.txt has 2 lines, .*TrainImagelist.txt has 3"):
        read_nus_wide(str(nus_tree), None, None)
    (nus_tree / "ConceptsList/Concepts81.txt").write_text("\n")
    with pytest.raises(DataError, match="no concept"):
        read_nus_wide(str(nus_tree), None, None)
    (nus_tree / "ConceptsList/Concepts81.txt").write_text("airport\nanimal\n")
    path.write_text("0\n1\n2\n")
    with pytest.raises(DataError, match="has a line '2', allowed are 0 and 1"):
        read_nus_wide(str(nus_tree), None, None)
    path.unlink()
    image_list = nus_tree / "ImageList/TestImagelist.txt"
    image_list.write_text("..\\secret.jpg\n")
    (path.parent / "Labels_animal_Train.txt").write_text("0\n1\n0\n")
    with pytest.raises(DataError, match=r"'../secret.jpg' is not a path below"):
        read_nus_wide(str(nus_tree), None, None)
    path.unlink()
    with pytest.raises(DataError, match=r"there is no .*Labels_animal_Train.txt"):
        read_nus_wide(str(nus_tree), None, None)


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


def test_cub(cub_tree: Path) -> None:
    records = read_cub(str(cub_tree), None, None)
    assert records.classes is not None
    curved, blue = records.classes.classes
    assert (curved, blue) == ("has_bill_shape::curved_(up_or_down)", "has_wing_color::blue")
    assert positives(records, "train") == {
        "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg": {curved, blue},
        "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg": set(),
    }
    albatross = "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert positives(records, "test") == {albatross: {curved}}
    check_files(records, cub_tree)


def test_cub_errors(cub_tree: Path) -> None:
    labels = cub_tree / "attributes/image_attribute_labels.txt"
    whole = labels.read_text()
    labels.write_text("".join(line + "\n" for line in whole.splitlines()[:-2]))
    with pytest.raises(DataError, match=r"attribute 1 for image 3, and of 1 more pairs"):
        read_cub(str(cub_tree), None, None)
    for line in ("3 2 yes 1 1", "3 2"):
        labels.write_text(f"{whole}{line}\n")
        with pytest.raises(DataError, match=f"line '{line}' has the label"):
            read_cub(str(cub_tree), None, None)
    labels.write_text(whole + "4 1 1 1 1\n")
    with pytest.raises(DataError, match=r"line '4 1 1 1 1' refers to '4'"):
        read_cub(str(cub_tree), None, None)
    (cub_tree / "train_test_split.txt").write_text("1 0\n2 1\n")
    with pytest.raises(DataError, match=r"image 3 is in only one of"):
        read_cub(str(cub_tree), None, None)


DETECT: dict[str, Callable[[str], str | None]] = {
    "voc": detect_voc,
    "coco": detect_coco,
    "nus_wide": detect_nus_wide,
    "cub": detect_cub,
}


def detected(folder: Path) -> list[str]:
    return [name for name, detect in DETECT.items() if detect(str(folder))]


def test_each_tree_is_detected_as_its_format_alone(
    voc_tree: Path, coco_tree: Path, nus_tree: Path, cub_tree: Path
) -> None:
    trees = {"voc": voc_tree, "coco": coco_tree, "nus_wide": nus_tree, "cub": cub_tree}
    assert {name: detected(tree) for name, tree in trees.items()} == {name: [name] for name in trees}
    assert detected(voc_tree.parent) == ["voc"]
    assert detected(coco_tree / "annotations") == detected(coco_tree / "annotations/instances_val2014.json") == ["coco"]


def test_strange_content_is_not_detected(tmp_path: Path) -> None:
    noise: Any = np.random.default_rng(0).bytes(100_000)
    files = {
        "a.json": noise,
        "b/b.json": '[{"annotations": [{"result": []}], "file_name": "a.jpg"}]',  # Label Studio's tasks
        "c.json": '{"samples": [{"filepath": "a.jpg"}]}',
        "d.xml": "<annotations><image id='0'/></annotations>",  # CVAT's own format
        "e.xml": noise,
        "images.txt": "",
    }
    write(tmp_path, files)
    assert detected(tmp_path) == detected(tmp_path / "none") == detected(tmp_path / "a\0b") == []
    assert [detected(tmp_path / name) for name in files] == [[]] * len(files)
