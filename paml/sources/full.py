"""What the fully labelled sets have in common: a split is its images and a table of every label."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels import POSITIVE, LabelTable, table_from_triples
from paml.labels.states import NEGATIVE
from paml.sources.folder import file_parts
from paml.sources.parts import Part


@dataclass(frozen=True)
class FullSplit:
    """One split of a set whose labels are all known."""

    parts: list[Part]
    """Its images."""
    table: LabelTable
    """Their labels, POSITIVE or NEGATIVE for every class; of some sets a few stay UNOBSERVED on request."""


def full_split(
    folder: str,
    files: Sequence[tuple[str, str]],
    classes: Sequence[str],
    positives: np.ndarray,
    out: str,
    *,
    unobserved: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    about: str,
) -> FullSplit:
    """Write the table of N images to `out` and make parts of their files.

    files: (key, path below `folder`) of each image; positives: bool[N, K]; unobserved: bool[N, K], True where the
    table is to have no label; about: the set's name, recorded in the table. Raises LabelError where a key repeats,
    DataError where there are no images.
    """
    if not files:
        raise DataError(f"{about} has no image in {folder}: name the folder in which the set was unpacked")
    states = np.where(positives, np.int8(POSITIVE), np.int8(NEGATIVE))
    image, cls = np.nonzero(np.ones_like(positives) if unobserved is None else ~unobserved)
    keys = [key for key, _ in files]
    table = table_from_triples(
        keys, classes, names, image, cls, states[image, cls], out, metadata={"set": about, "full": True}
    )
    order = np.argsort(np.array(keys, object), kind="stable")
    return FullSplit(file_parts(folder, [files[place] for place in order]), table)


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a text file without blanks around them, empty ones left out; DataError where it is absent."""
    try:
        text = storage.read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        raise DataError(f"there is no {path} ({what}): name the folder in which the set was unpacked") from None
    except storage.StorageError as error:
        if error.errno in (errno.EISDIR, errno.ENOTDIR):
            raise DataError(f"{path} is no file ({what}): name the folder in which the set was unpacked") from error
        raise
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_that_exists(root: str, names: Sequence[str], what: str) -> str:
    """The first of some files below `root` that is there. Raises DataError."""
    for name in names:
        if storage.exists(path := storage.join(root, name)):
            return path
    raise DataError(f"{root} holds no {' nor '.join(names)} ({what}): name the folder in which the set was unpacked")
