"""NUS-WIDE, from the official tree: `Groundtruth`, `ImageList`, `ConceptsList` and the images in `Flickr`.

Published results on NUS-WIDE use different downloads of it (150,000 and 60,260 images that one group downloaded
again, or other counts): scores are comparable only over the same images.
"""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.sources.folder import key_of
from paml.sources.full import LabeledSplit, first_existing, read_lines, write_labeled_split

SPLITS = {"train": "Train", "test": "Test"}


def nus_wide(root: str, out: str, *, images: str | None = None) -> dict[str, LabeledSplit]:
    """The splits of the tree `root`, with tables `{out}/{split}-full.arrow`.

    images: the folder of the images, `{root}/Flickr` by default, with the subfolders of the image lists. Keys are the
    images' names (`0001_2124494179`), classes the 81 concepts in the order of `Concepts81.txt`. Images that no longer
    exist are reported when they are read. Raises DataError for missing files, and for files that differ in length.
    """
    concepts = read_lines(
        first_existing(root, ["ConceptsList/Concepts81.txt", "Concepts81.txt"], "the concepts"), "the concepts"
    )
    labeled = {}
    for split, phase in SPLITS.items():
        image_list = first_existing(
            root, [f"ImageList/{phase}Imagelist.txt", f"{phase}Imagelist.txt"], "the images of the split"
        )
        names = [line.replace("\\", "/") for line in read_lines(image_list, "the images of the split")]
        positives = np.zeros((len(names), len(concepts)), bool)
        for cls, concept in enumerate(concepts):
            path = storage.join(root, "Groundtruth", "TrainTestLabels", f"Labels_{concept}_{phase}.txt")
            positives[:, cls] = _read_labels(path, len(names), image_list)
        labeled[split] = write_labeled_split(
            images or storage.join(root, "Flickr"),
            [(key_of(name), name) for name in names],
            concepts,
            positives,
            storage.join(out, f"{split}-full.arrow"),
            set_name=f"NUS-WIDE {phase}",
        )
    return labeled


def _read_labels(path: str, count: int, image_list: str) -> np.ndarray:
    """bool[count]: one line per image, 1 or 0."""
    lines = read_lines(path, "the labels of a concept")
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines):,} lines, {image_list} has {count:,}: unpack both again")
    other = set(lines) - {"0", "1"}
    if other:
        raise DataError(f"{path} has a line {min(other)!r}, allowed are 0 and 1: unpack it again")
    return np.array(lines) == "1"
