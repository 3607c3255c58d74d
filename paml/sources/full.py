"""Common parts of the fully labeled sets: a split is its images and a table of every label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, LabelTable, table_from_triples
from paml.sources.folder import file_parts
from paml.sources.parts import Part


@dataclass(frozen=True)
class LabeledSplit:
    """One split of a set whose labels are all known."""

    parts: list[Part]
    """Its images."""
    table: LabelTable
    """Their labels, POSITIVE or NEGATIVE for every class."""


def write_labeled_split(
    folder: str,
    files: Sequence[tuple[str, str]],
    classes: Sequence[str],
    positives: np.ndarray,
    out: str,
    *,
    set_name: str,
) -> LabeledSplit:
    """Write the table of N images to `out` and make parts of their files.

    files: (key, path below `folder`) of each image; positives: bool[N, K]; set_name: recorded in the table. Raises
    LabelError for a duplicate key, DataError for no images.
    """
    if not files:
        raise DataError(f"{set_name} has no image in {folder}: name the folder of the unpacked set")
    image, cls = (index.ravel() for index in np.indices(positives.shape))
    state = np.where(positives, POSITIVE, NEGATIVE).ravel()
    keys = [key for key, _ in files]
    table = table_from_triples(keys, classes, None, image, cls, state, out, metadata={"set": set_name, "full": True})
    order = np.argsort(np.array(keys, object), kind="stable")
    return LabeledSplit(file_parts(folder, [files[index] for index in order]), table)


def read_lines(path: str, content: str) -> list[str]:
    """The stripped, non-empty lines of a text file; DataError, with its `content`, if it does not exist."""
    try:
        text = storage.read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        raise DataError(f"there is no {path} ({content}): name the folder of the unpacked set") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_existing(root: str, names: Sequence[str], content: str) -> str:
    """The first of some files below `root` that exists. Raises DataError."""
    for name in names:
        if storage.exists(path := storage.join(root, name)):
            return path
    raise DataError(f"{root} has no {' or '.join(names)} ({content}): name the folder of the unpacked set")
