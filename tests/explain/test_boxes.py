"""Boxes are read from Open Images' CSV."""

from pathlib import Path

import numpy as np
import pytest

from paml.errors import DataError
from paml.explain.boxes import read_boxes
from tests.helpers.jobs import write_scenes

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"


def test_only_sound_boxes_of_the_asked_images_and_classes_are_kept(tmp_path: Path) -> None:
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
    assert list(boxes.of) == [("0001", "/m/a")]
    np.testing.assert_array_equal(boxes.of["0001", "/m/a"], [[0.1, 0.5, 0.2, 0.6], [0.5, 1.0, 0.0, 0.5]])


@pytest.mark.parametrize("text", ["ImageID,LabelName\n0001,/m/a\n", HEADER + "\n0001,x,/m/a,1,left,0.5,0,1,0,0\n", ""])
def test_a_file_that_holds_no_boxes_is_refused_with_the_columns_that_it_needs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="ImageID,LabelName,XMin,XMax,YMin,YMax"):
        read_boxes(str(path), ["0001"], ["/m/a"])
    with pytest.raises(DataError, match="is not there"):
        read_boxes(str(tmp_path / "none.csv"), ["0001"], ["/m/a"])


def test_the_digit_scenes_boxes_are_of_that_format(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=1, others=3)
    keys = sorted(path.stem for path in (scenes / "images" / "test").iterdir())
    classes = (scenes / "2017_11" / "classes-trainable.txt").read_text().split()
    boxes = read_boxes(str(scenes / "boxes" / "test.csv"), keys, classes)
    assert boxes.malformed == 0
    assert {key for key, _ in boxes.of} == set(keys)
    assert sum(map(len, boxes.of.values())) == boxes.rows
