"""PASCAL VOC 2007 and 2012, from the official tree `VOC2012/{Annotations,ImageSets/Main,JPEGImages}`."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Literal

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.reading import inside, reading
from paml.sources.fetch import read_ahead
from paml.sources.full import FullSplit, full_split, read_lines

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPLITS = {"train": "train", "test": "val"}
"""The papers' protocol on VOC2012: 5,717 images to train, 5,823 to test. On VOC2007 it is trainval and test."""

Difficult = Literal["negative", "positive", "unobserved"]


def voc(
    root: str, out: str, *, splits: Mapping[str, str] = SPLITS, difficult: Difficult = "negative"
) -> dict[str, FullSplit]:
    """The splits of the tree `root` (the folder that holds Annotations), with tables `{out}/{split}-full.arrow`.

    splits: the image set (a file of ImageSets/Main) of each split. Keys are the images' names. A class is positive
    where an object of it is annotated that is not marked difficult; where all of its objects are, `difficult`
    decides: the papers count them negative. Raises DataError for absent or broken files and unknown classes.
    """
    if difficult not in ("negative", "positive", "unobserved"):
        raise DataError(f"difficult is {difficult!r}, allowed are negative, positive and unobserved")
    found = {}
    for split, image_set in splits.items():
        path = storage.join(root, "ImageSets", "Main", f"{image_set}.txt")
        keys = [line.split()[0] for line in read_lines(path, "the image set")]
        with reading(path, "unpack it again"):
            for key in keys:
                inside(root, f"{key}.xml")
        easy, hard = np.zeros((len(keys), len(CLASSES)), bool), np.zeros((len(keys), len(CLASSES)), bool)
        paths = [storage.join(root, "Annotations", f"{key}.xml") for key in keys]
        for row, (_, objects) in enumerate(read_ahead(paths, _objects_of)):
            for cls, is_difficult in objects:
                (hard if is_difficult else easy)[row, cls] = True
        unclear = hard & ~easy
        found[split] = full_split(
            storage.join(root, "JPEGImages"),
            [(key, f"{key}.jpg") for key in keys],
            CLASSES,
            easy | unclear if difficult == "positive" else easy,
            storage.join(out, f"{split}-full.arrow"),
            unobserved=unclear if difficult == "unobserved" else None,
            about=f"PASCAL VOC {image_set}",
        )
    return found


def _objects_of(path: str) -> list[tuple[int, bool]]:
    """(class, whether it is difficult) of each object; parts of objects are none."""
    try:
        tree = ElementTree.fromstring(storage.read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"there is no {path}: unpack the annotations of this set too") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # also for encodings that nobody knows
        raise DataError(f"{path} is no whole XML file ({error}): unpack it again") from error
    objects = []
    for thing in tree.findall("object"):
        name = (thing.findtext("name") or "").strip()
        if name not in CLASSES:
            raise DataError(f"{path} names the class {name!r}: allowed are {', '.join(CLASSES)}")
        objects.append((CLASSES.index(name), (thing.findtext("difficult") or "0").strip() == "1"))
    return objects
