"""VOC's XML with own classes, as LabelImg, CVAT and Roboflow lay it out."""

from pathlib import Path

import pytest

from paml.errors import DataError, SettingsError
from paml.sources.voc import VocSettings, detect_voc, read_voc
from tests.sources.test_full_sets import IMAGES, check_files, labels_of, write


def xml(*classes: str, filename: str = "") -> str:
    named = f"<filename>{filename}</filename>" if filename else ""
    return f"<annotation>{named}{''.join(f'<object><name>{name}</name></object>' for name in classes)}</annotation>"


def test_labelimg(tmp_path: Path) -> None:
    """XML next to the images; the named file comes before the one with the XML's name."""
    files: dict[str, str | bytes] = {
        "site/1.xml": xml("helmet", " vest ", "helmet", filename="IMG 1.JPG"),
        "site/2.xml": xml("vest", filename="2"),  # LabelImg once left the suffix out
        "site/3.xml": xml(filename="moved.jpg"),
        "site/IMG 1.JPG": IMAGES[0],
        "site/2.png": IMAGES[1],
        "site/3.jpeg": IMAGES[2],
    }
    write(tmp_path, files)
    assert detect_voc(str(tmp_path))
    assert detect_voc(str(tmp_path / "site"))
    records = read_voc(str(tmp_path), None, VocSettings())
    assert labels_of(records) == {"IMG 1.JPG": {"helmet": "1", "vest": "1"}, "2.png": {"vest": "1"}, "3.jpeg": {}}
    assert records.classes is not None
    assert records.classes.classes == ["helmet", "vest"]
    assert records.splits is None
    check_files(records, tmp_path)
    assert read_voc(str(tmp_path), "/elsewhere", VocSettings()).files is None


def test_roboflow(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for n, split in enumerate(("train", "valid", "test")):
        files |= {f"{split}/a.xml": xml("dog", filename="a.jpg"), f"{split}/a.jpg": IMAGES[n]}
    records = read_voc(str(write(tmp_path, files)), None, VocSettings())
    assert labels_of(records, "valid") == {"valid/a.jpg": {"dog": "1"}}
    assert records.classes is not None
    assert records.classes.classes == ["dog"], "own classes, though VOC has it too"
    check_files(records, tmp_path)


def test_folders_of_annotations_and_images(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"annotations/train/a.xml": xml("cup"), "annotations/val/b.xml": xml("fork")}
    write(tmp_path, files | {"images/train/a.jpg": IMAGES[0], "images/val/b.jpg": IMAGES[1]})
    records = read_voc(str(tmp_path), None, VocSettings())
    assert labels_of(records, "val") == {"b.jpg": {"fork": "1"}}
    check_files(records, tmp_path)


def test_a_class_folder_named_train_is_no_split(tmp_path: Path) -> None:
    records = read_voc(str(write(tmp_path, {"train/a.xml": xml("x"), "bus/b.xml": xml("y")})), None, VocSettings())
    assert records.splits is None


def test_lists_of_one_class_are_not_splits(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "ImageSets/Main/default.txt": "a b\nc\n",
        "ImageSets/Main/cup_default.txt": "a b 1\nc -1\n",
        "Annotations/a b.xml": xml("cup"),
        "Annotations/c.xml": xml(),
        "Annotations/d.xml": xml("cup"),
    }
    records = read_voc(str(write(tmp_path, files)), None, VocSettings())
    assert labels_of(records) == {"a b.jpg": {"cup": "1"}, "c.jpg": {}}
    assert set(records.splits or ()) == {"default"}
    assert records.notes[0].startswith("1 of 3 XML files")
    assert "set images" in records.notes[1]
    assert records.folder is None


def test_several_years(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for year, lists in {"VOC2007": {"trainval": "000001", "test": "000002"}, "VOC2012": {"train": "2008_1"}}.items():
        for split, key in lists.items():
            files |= {f"{year}/ImageSets/Main/{split}.txt": key, f"{year}/Annotations/{key}.xml": xml("cat")}
            files |= {
                f"{year}/JPEGImages/{key}.jpg": IMAGES[len(files) % 12],
                f"{year}/SegmentationClass/{key}.png": b"",
            }
    records = read_voc(str(write(tmp_path, files)), None, VocSettings())
    assert dict(zip(records.images, records.splits or (), strict=True)) == {
        "000001.jpg": "trainval",
        "000002.jpg": "test",
        "2008_1.jpg": "train",
    }
    assert records.classes is not None
    assert len(records.classes.classes) == 20
    check_files(records, tmp_path)


def test_an_image_in_two_lists_is_refused(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"Annotations/{key}.xml": xml("cup") for key in "ab"}
    write(tmp_path, {**files, "ImageSets/Main/train.txt": "\n"})
    with pytest.raises(DataError, match="name no image"):
        read_voc(str(tmp_path), None, VocSettings())
    files |= {"ImageSets/Main/train.txt": "a\nb\n", "ImageSets/Main/val.txt": "b\n"}
    with pytest.raises(DataError, match=r"'b' is in two lists of ImageSets/Main, train.txt and val.txt"):
        read_voc(str(write(tmp_path, files)), None, VocSettings())


def test_what_is_not_a_label_is_reported(tmp_path: Path) -> None:
    write(tmp_path, {"a.xml": xml("cup", ""), "b.xml": "<sitemap/>"})
    records = read_voc(str(tmp_path), None, VocSettings())
    assert labels_of(records) == {"a.jpg": {"cup": "1"}}
    assert [(number, text.split()[0]) for number, text in records.bad_rows] == [(1, "a.xml"), (2, "b.xml")]
    (tmp_path / "a.xml").unlink()
    with pytest.raises(DataError, match=r"b.xml is XML of another format"):
        read_voc(str(tmp_path), None, VocSettings())
    (tmp_path / "b.xml").unlink()
    with pytest.raises(DataError, match="no XML file"):
        read_voc(str(tmp_path), None, VocSettings())
    with pytest.raises(SettingsError, match=r"voc.difficult is 'drop'"):
        VocSettings(difficult="drop")


def test_two_files_that_label_one_image_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.xml": xml("cup", filename="x.jpg"), "b.xml": xml("cup", filename="x.jpg"), "x.jpg": IMAGES[0]})
    with pytest.raises(DataError, match=r"a.xml and b.xml both label x.jpg"):
        read_voc(str(tmp_path), None, VocSettings())


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd.jpg", "C:\\photos\\a.jpg"])
def test_a_file_name_with_folders_is_only_a_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"secret.jpg": b"x", "set/deep/a.xml": xml("cup", filename=name), "set/deep/a.jpg": IMAGES[0]})
    records = read_voc(str(tmp_path / "set"), None, VocSettings())
    assert records.files == ["deep/a.jpg"]
