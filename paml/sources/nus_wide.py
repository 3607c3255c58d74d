"""NUS-WIDE, from the official tree: `Groundtruth`, `ImageList`, `ConceptsList` and the images in `Flickr`.

Published rows on NUS-WIDE rest on different downloads of it (150,000 and 60,260 images that one group fetched
again, or other counts): scores are comparable only over the same images.
"""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.sources.folder import key_of
from paml.sources.full import FullSplit, first_that_exists, full_split, read_lines

SPLITS = {"train": "Train", "test": "Test"}


def nus_wide(root: str, out: str, *, images: str | None = None, drop_empty: bool = False) -> dict[str, FullSplit]:
    """The splits of the tree `root`, with tables `{out}/{split}-full.arrow`.

    images: the folder of the images, `{root}/Flickr` by default. Its subfolders are those of the image lists.
    Keys are the images' names (`0001_2124494179`), classes the 81 concepts in the order of `Concepts81.txt`.
    drop_empty leaves out images without any concept, about a fifth of all. Photos that are no longer to be had are
    reported when the images are read. Raises DataError for absent files, and for those that differ in length.
    """
    concepts = read_lines(
        first_that_exists(root, ["ConceptsList/Concepts81.txt", "Concepts81.txt"], "the concepts"), "the concepts"
    )
    found = {}
    for split, phase in SPLITS.items():
        listed = first_that_exists(
            root, [f"ImageList/{phase}Imagelist.txt", f"{phase}Imagelist.txt"], "the images of the split"
        )
        names = [line.replace("\\", "/") for line in read_lines(listed, "the images of the split")]
        positives = np.zeros((len(names), len(concepts)), bool)
        for cls, concept in enumerate(concepts):
            path = storage.join(root, "Groundtruth", "TrainTestLabels", f"Labels_{concept}_{phase}.txt")
            positives[:, cls] = _labels_of(path, len(names), listed)
        kept = np.flatnonzero(positives.any(axis=1)) if drop_empty else np.arange(len(names))
        found[split] = full_split(
            images or storage.join(root, "Flickr"),
            [(key_of(names[row]), names[row]) for row in kept],
            concepts,
            positives[kept],
            storage.join(out, f"{split}-full.arrow"),
            about=f"NUS-WIDE {phase}",
        )
    return found


def _labels_of(path: str, count: int, listed: str) -> np.ndarray:
    """bool[count]: one line an image, 1 or 0."""
    lines = read_lines(path, "the labels of a concept")
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines):,} lines, {listed} has {count:,}: unpack both again")
    other = set(lines) - {"0", "1"}
    if other:
        raise DataError(f"{path} has a line {min(other)!r}, allowed are 0 and 1: unpack it again")
    return np.array(lines) == "1"
