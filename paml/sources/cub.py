"""Caltech-UCSD Birds 200-2011, from the official tree `CUB_200_2011`: 312 attributes as classes."""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.sources.folder import key_of
from paml.sources.full import LabeledSplit, first_existing, read_lines, write_labeled_split


def cub(root: str, out: str) -> dict[str, LabeledSplit]:
    """The splits train (5,994 images) and test (5,794), with tables `{out}/{split}-full.arrow`.

    root: the folder that has images.txt. Keys are the images' names, classes the attributes
    (`has_bill_shape::dagger`) in the order of their ids. An attribute is positive if the file says that it is present,
    whatever the annotator's certainty, as in the papers. Raises DataError for missing or broken files.
    """
    names = dict(_read_pairs(storage.join(root, "images.txt"), "the images"))
    in_train = dict(_read_pairs(storage.join(root, "train_test_split.txt"), "the split"))
    attribute_file = first_existing(
        root, ["attributes/attributes.txt", "attributes.txt", "../attributes.txt"], "the attributes"
    )
    attributes = dict(_read_pairs(attribute_file, "the attributes"))
    if set(names) != set(in_train):
        image = min(set(names) ^ set(in_train), key=int)
        raise DataError(f"image {image} is in only one of images.txt and train_test_split.txt: unpack both again")
    positives = _read_labels(storage.join(root, "attributes", "image_attribute_labels.txt"), names, attributes)
    is_train = np.array([in_train[number] == "1" for number in names])
    files = [(key_of(name), name) for name in names.values()]
    return {
        split: write_labeled_split(
            storage.join(root, "images"),
            [files[row] for row in rows],
            list(attributes.values()),
            positives[rows],
            storage.join(out, f"{split}-full.arrow"),
            set_name=f"CUB-200-2011 {split}",
        )
        for split, rows in (("train", np.flatnonzero(is_train)), ("test", np.flatnonzero(~is_train)))
    }


def _read_labels(path: str, names: dict[str, str], attributes: dict[str, str]) -> np.ndarray:
    """bool[N, K]. Raises DataError if a pair is missing or unknown."""
    row_of, column_of = ({number: index for index, number in enumerate(known)} for known in (names, attributes))
    positives, is_labeled = (np.zeros((len(names), len(attributes)), bool) for _ in range(2))
    for line in read_lines(path, "the labels"):
        # image, attribute, whether it is present, certainty, seconds; some lines of the official file have more
        image, attribute, present = line.split(None, 3)[:3]
        try:
            pair = row_of[image], column_of[attribute]
        except KeyError as error:
            raise DataError(f"{path}: line {line!r} refers to {error}, which is not listed: unpack it again") from error
        positives[pair], is_labeled[pair] = present == "1", True
    if not is_labeled.all():
        row, column = np.argwhere(~is_labeled)[0]
        raise DataError(
            f"{path} is incomplete: it has no label of attribute {list(attributes)[column]} for image "
            f"{list(names)[row]}, and of {int((~is_labeled).sum()) - 1:,} more pairs: unpack it again"
        )
    return positives


def _read_pairs(path: str, content: str) -> list[tuple[str, str]]:
    """(number, rest of the line) of each line."""
    pairs = []
    for line in read_lines(path, content):
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest:
            raise DataError(f"{path}: the line {line!r} is not a number and a text ({content}): unpack it again")
        pairs.append((number, rest.strip()))
    return pairs
