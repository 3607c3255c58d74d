"""Caltech-UCSD Birds 200-2011, from the official tree `CUB_200_2011`: 312 attributes as classes."""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.sources.folder import key_of
from paml.sources.full import FullSplit, first_that_exists, full_split, read_lines


def cub(root: str, out: str) -> dict[str, FullSplit]:
    """The splits train (5,994 images) and test (5,794), with tables `{out}/{split}-full.arrow`.

    root: the folder that holds images.txt. Keys are the images' names, classes the attributes
    (`has_bill_shape::dagger`) in the order of their ids. An attribute is positive where the file says that it is
    present, whatever the annotator's certainty, as the papers do. Raises DataError for absent or broken files.
    """
    names = dict(_pairs(storage.join(root, "images.txt"), "the images"))
    in_train = dict(_pairs(storage.join(root, "train_test_split.txt"), "the split"))
    listed = first_that_exists(root, ["attributes/attributes.txt", "attributes.txt", "../attributes.txt"], "attributes")
    attributes = dict(_pairs(listed, "the attributes"))
    row_of, column_of = ({number: place for place, number in enumerate(known)} for known in (names, attributes))
    if set(names) != set(in_train):
        odd = min(set(names) ^ set(in_train), key=int)
        raise DataError(f"image {odd} stands in one of images.txt and train_test_split.txt only: unpack both again")
    positives, said = np.zeros((len(names), len(attributes)), bool), np.zeros((len(names), len(attributes)), bool)
    path = storage.join(root, "attributes", "image_attribute_labels.txt")
    for line in read_lines(path, "the labels"):
        # image, attribute, whether it is present, certainty, seconds; some lines of the official file have more
        image, attribute, present = line.split(None, 3)[:3]
        try:
            place = row_of[image], column_of[attribute]
        except KeyError as error:
            raise DataError(f"{path}: line {line!r} names {error}, which is not listed: unpack it again") from error
        positives[place], said[place] = present == "1", True
    if not said.all():
        row, column = np.argwhere(~said)[0]
        raise DataError(
            f"{path} is cut: it says nothing of attribute {list(attributes)[column]} of image {list(names)[row]}, nor "
            f"of {int((~said).sum()) - 1:,} more pairs: unpack it again"
        )
    is_train = np.array([in_train[number] == "1" for number in names])
    files = [(key_of(name), name) for name in names.values()]
    return {
        split: full_split(
            storage.join(root, "images"),
            [files[row] for row in rows],
            list(attributes.values()),
            positives[rows],
            storage.join(out, f"{split}-full.arrow"),
            about=f"CUB-200-2011 {split}",
        )
        for split, rows in (("train", np.flatnonzero(is_train)), ("test", np.flatnonzero(~is_train)))
    }


def _pairs(path: str, what: str) -> list[tuple[str, str]]:
    """(number, rest of the line) of each line."""
    pairs = []
    for line in read_lines(path, what):
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest:
            raise DataError(f"{path}: the line {line!r} is not a number and a text ({what}): unpack it again")
        pairs.append((number, rest.strip()))
    return pairs
