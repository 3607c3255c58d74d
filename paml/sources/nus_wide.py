"""NUS-WIDE, from the official tree: `Groundtruth`, `ImageList`, `ConceptsList` and the images in `Flickr`.

Published results on NUS-WIDE use different downloads of it (150,000 and 60,260 images that one group downloaded
again, or other counts): scores are comparable only over the same images.
"""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels.class_list import ClassList
from paml.sources.full import check_below, first_existing, have_files, positive_labels, read_lines
from paml.sources.records import Records

PHASES = ("Train", "Test")
_CONCEPTS = ("ConceptsList/Concepts81.txt", "Concepts81.txt")


def detect_nus_wide(labels: str) -> str | None:
    """Whether a folder has the lists of concepts and images."""
    found = have_files(labels, _CONCEPTS, _image_lists("Train"), _image_lists("Test"))
    return "Concepts81.txt and image lists" if found else None


def read_nus_wide(labels: str, images: str | None, settings: None) -> Records:
    """The complete labels of the tree `labels`, with the splits Train and Test.

    images: the folder of the images, `{labels}/Flickr` by default, with the subfolders of the image lists. Classes are
    the 81 concepts in the order of `Concepts81.txt`. Images that no longer exist are reported when they are read.
    Raises DataError for missing files, and for files that differ in length.
    """
    concepts = read_lines(first_existing(labels, _CONCEPTS, "the concepts"), "the concepts")
    if not concepts:
        raise DataError(f"{labels} lists no concept: unpack the lists again")
    if repeated := {concept for concept in concepts if concepts.count(concept) > 1}:
        raise DataError(f"{labels}: the concept {min(repeated)!r} is listed twice: unpack the lists again")
    names: list[str] = []
    splits: list[str] = []
    positives: list[np.ndarray] = []
    for phase in PHASES:
        image_list = first_existing(labels, _image_lists(phase), "the images of the split")
        listed = [line.replace("\\", "/") for line in read_lines(image_list, "the images of the split")]
        check_below(labels, listed, image_list)
        columns = [
            _read_labels(
                storage.join(labels, "Groundtruth", "TrainTestLabels", f"Labels_{concept}_{phase}.txt"),
                len(listed),
                image_list,
            )
            for concept in concepts
        ]
        positives.append(np.stack(columns, axis=1))
        names += listed
        splits += [phase] * len(listed)
    counts = ", ".join(f"{splits.count(phase):,} in {phase}" for phase in PHASES)
    return Records(
        path=labels,
        understood=f"NUS-WIDE, {len(names):,} images ({counts}), {len(concepts)} concepts, all labeled",
        images=names,
        splits=splits,
        **positive_labels(np.concatenate(positives), concepts),
        classes=ClassList(labels, concepts, concepts),
        complete=True,
        folder=storage.join(labels, "Flickr") if images is None else None,
        files=names if images is None else None,
    )


def _image_lists(phase: str) -> tuple[str, str]:
    return f"ImageList/{phase}Imagelist.txt", f"{phase}Imagelist.txt"


def _read_labels(path: str, count: int, image_list: str) -> np.ndarray:
    """bool[count]: one line per image, 1 or 0."""
    lines = read_lines(path, "the labels of a concept")
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines):,} lines, {image_list} has {count:,}: unpack both again")
    other = set(lines) - {"0", "1"}
    if other:
        raise DataError(f"{path} has a line {min(other)!r}, allowed are 0 and 1: unpack it again")
    return np.array(lines) == "1"
