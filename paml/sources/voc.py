"""PASCAL VOC 2007 and 2012, from the official tree `VOC2012/{Annotations,ImageSets/Main,JPEGImages}`."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.parsing import parse_errors_as, safe_join
from paml.sources.fetch import read_concurrently
from paml.sources.full import LabeledSplit, read_lines, write_labeled_split

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPLITS = {"train": "train", "test": "val"}
"""The papers' protocol on VOC2012: 5,717 images to train, 5,823 to test. On VOC2007 it is trainval and test."""


def voc(root: str, out: str, *, splits: Mapping[str, str] = SPLITS) -> dict[str, LabeledSplit]:
    """The splits of the tree `root` (the folder that has Annotations), with tables `{out}/{split}-full.arrow`.

    splits: the image set (a file of ImageSets/Main) of each split. Keys are the images' names. A class is positive if
    an object of it is annotated that is not marked difficult, as in the papers. Raises DataError for missing or broken
    files and unknown classes.
    """
    labeled = {}
    for split, image_set in splits.items():
        path = storage.join(root, "ImageSets", "Main", f"{image_set}.txt")
        keys = [line.split()[0] for line in read_lines(path, "the image set")]
        with parse_errors_as(path, "unpack it again"):
            for key in keys:
                safe_join(root, f"{key}.xml")
        positives = np.zeros((len(keys), len(CLASSES)), bool)
        paths = [storage.join(root, "Annotations", f"{key}.xml") for key in keys]
        for row, (_, classes) in enumerate(read_concurrently(paths, _read_classes)):
            positives[row, classes] = True
        labeled[split] = write_labeled_split(
            storage.join(root, "JPEGImages"),
            [(key, f"{key}.jpg") for key in keys],
            CLASSES,
            positives,
            storage.join(out, f"{split}-full.arrow"),
            set_name=f"PASCAL VOC {image_set}",
        )
    return labeled


def _read_classes(path: str) -> list[int]:
    """The class of each object that is not difficult."""
    try:
        tree = ElementTree.fromstring(storage.read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"there is no {path}: unpack the annotations of this set too") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # includes unknown encodings
        raise DataError(f"{path} is not a complete XML file ({error}): unpack it again") from error
    classes = []
    for element in tree.findall("object"):
        name = (element.findtext("name") or "").strip()
        if name not in CLASSES:
            raise DataError(f"{path} has the class {name!r}: allowed are {', '.join(CLASSES)}")
        if (element.findtext("difficult") or "0").strip() != "1":
            classes.append(CLASSES.index(name))
    return classes
