"""Boxes are read from CSV files in the Open Images format."""

from pathlib import Path

import numpy as np
import pytest

from paml.errors import DataError
from paml.explain.boxes import read_boxes
from tests.helpers.jobs import write_scenes

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"


def test_only_valid_boxes_of_the_requested_images_and_classes_are_read(tmp_path: Path) -> None:
    lines = [
        "0001,xclick,/m/a,1,0.1,0.5,0.2,0.6,0,0",
        "0001,xclick,/m/a,1,0.5,1.0,0.0,0.5,-1,1",
        "0001,xclick,/m/b,1,0.5,0.4,0.0,0.5,0,0",
        "0001,xclick,/m/b,1,0.5,1.4,0.0,0.5,0,0",
        "0001,xclick,/m/other,1,0,1,0,1,0,0",
        "0002,xclick,/m/a,1,0,1,0,1,0,0",
    ]
    path = tmp_path / "annotations-human-bbox.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    boxes = read_boxes(str(path), ["0001", "0003"], ["/m/a", "/m/b"])
    assert (boxes.rows, boxes.malformed) == (6, 2)
    assert list(boxes.by_label) == [("0001", "/m/a")]
    np.testing.assert_array_equal(boxes.by_label["0001", "/m/a"], [[0.1, 0.5, 0.2, 0.6], [0.5, 1.0, 0.0, 0.5]])


@pytest.mark.parametrize("text", ["ImageID,LabelName\n0001,/m/a\n", HEADER + "\n0001,x,/m/a,1,left,0.5,0,1,0,0\n", ""])
def test_a_file_without_boxes_is_refused_with_the_required_columns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="ImageID,LabelName,XMin,XMax,YMin,YMax"):
        read_boxes(str(path), ["0001"], ["/m/a"])
    with pytest.raises(DataError, match=r"none\.csv"):
        read_boxes(str(tmp_path / "none.csv"), ["0001"], ["/m/a"])


def test_a_file_without_a_box_of_these_images_is_refused_with_an_example_of_each(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "\n0002,x,/m/b,1,0.1,0.5,0,1,0,0\n0001,x,/m/a,1,0.5,0.1,0,1,0,0\n")
    with pytest.raises(DataError, match=r"(?s)none of the 2 boxes.*\(1 have .*image 0002.*/m/b.*image is 0001.*/m/a"):
        read_boxes(str(path), ["0001"], ["/m/a"])
    path.write_text(HEADER + "\n")
    with pytest.raises(DataError, match="none of the 0 boxes"):
        read_boxes(str(path), ["0001"], ["/m/a"])


def test_digit_scenes_write_boxes_in_this_format(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=1, others=3)
    keys = sorted(path.stem for path in (scenes / "images" / "test").iterdir())
    classes = (scenes / "2017_11" / "classes-trainable.txt").read_text().split()
    boxes = read_boxes(str(scenes / "boxes" / "test.csv"), keys, classes)
    assert boxes.malformed == 0
    assert {key for key, _ in boxes.by_label} == set(keys)
    assert sum(map(len, boxes.by_label.values())) == boxes.rows
