"""Caltech-UCSD Birds 200-2011, from the official tree `CUB_200_2011`: 312 attributes as classes."""

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels.class_list import ClassList
from paml.sources.full import check_below, first_existing, have_files, positive_labels, read_lines
from paml.sources.records import Records


def detect_cub(labels: str) -> str | None:
    """Whether a folder has the lists of images, of the split and of the attributes' labels."""
    files = ("images.txt", "train_test_split.txt", "attributes/image_attribute_labels.txt")
    return "images.txt and image_attribute_labels.txt" if have_files(labels, *((file,) for file in files)) else None


def read_cub(labels: str, images: str | None, settings: None) -> Records:
    """The complete labels of the folder that has images.txt, with the splits train (5,994 images) and test (5,794).

    Classes are the attributes (`has_bill_shape::dagger`) in the order of their ids. An attribute is positive if the
    file says that it is present, whatever the annotator's certainty, as in the papers. Raises DataError for missing or
    broken files.
    """
    image_list = storage.join(labels, "images.txt")
    names = dict(_read_pairs(image_list, "the images"))
    check_below(labels, list(names.values()), image_list)
    in_train = dict(_read_pairs(storage.join(labels, "train_test_split.txt"), "the split"))
    attribute_file = first_existing(
        labels, ["attributes/attributes.txt", "attributes.txt", "../attributes.txt"], "the attributes"
    )
    attributes = dict(_read_pairs(attribute_file, "the attributes"))
    if set(names) != set(in_train):
        image = min(set(names) ^ set(in_train), key=int)
        raise DataError(f"image {image} is in only one of images.txt and train_test_split.txt: unpack both again")
    positives = _read_labels(storage.join(labels, "attributes", "image_attribute_labels.txt"), names, attributes)
    splits = ["train" if in_train[number] == "1" else "test" for number in names]
    files, classes = list(names.values()), list(attributes.values())
    counts = ", ".join(f"{splits.count(split):,} in {split}" for split in ("train", "test"))
    return Records(
        path=labels,
        understood=f"CUB-200-2011, {len(files):,} images ({counts}), {len(classes)} attributes, all labeled",
        images=files,
        splits=splits,
        **positive_labels(positives, classes),
        classes=ClassList(labels, classes, classes),
        complete=True,
        folder=storage.join(labels, "images") if images is None else None,
        files=files if images is None else None,
    )


def _read_labels(path: str, names: dict[str, str], attributes: dict[str, str]) -> np.ndarray:
    """bool[N, K]. Raises DataError if a pair is missing or unknown."""
    row_of, column_of = ({number: index for index, number in enumerate(known)} for known in (names, attributes))
    positives, is_labeled = (np.zeros((len(names), len(attributes)), bool) for _ in range(2))
    for line in read_lines(path, "the labels"):
        # image, attribute, whether it is present, certainty, seconds; some lines of the official file have more
        image, attribute, present = (*line.split(None, 3), "", "", "")[:3]
        if present not in ("0", "1"):
            raise DataError(f"{path}: line {line!r} has the label {present!r}, allowed are 0 and 1: unpack it again")
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
