"""Class lists: which classes there are, in which order, and what they are called."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from paml import storage
from paml.errors import LabelError
from paml.labels.table_file import check_classes


class ClassList(NamedTuple):
    """The classes of a table, in the order of their indices, with a name each."""

    path: str
    """The file, for messages."""
    classes: list[str]
    names: list[str]
    unnamed: int = 0
    """Classes without a description: their name is the class itself."""


def read_class_list(path: str, descriptions: str | None = None) -> ClassList:
    """The classes of the list at `path`, named by the class CSV `descriptions`, or else by the list's second column."""
    classes = read_classes(path)
    if descriptions:
        names = read_descriptions(descriptions)
    else:
        names = {row[0]: row[1].strip() for row in read_rows(path) if len(row) > 1}
    return ClassList(
        path, classes, [names.get(cls) or cls for cls in classes], sum(not names.get(cls) for cls in classes)
    )


def read_classes(path: str) -> list[str]:
    """The classes of a list, in its order: one per line, or the first column of a class CSV.

    Raises LabelError if the list is empty or has a duplicate.
    """
    classes = [row[0] for row in read_rows(path)]
    if not classes:
        raise LabelError(f"class list {path!r} is empty: put one class (MID) on each line, as classes-trainable.txt")
    try:
        check_classes(classes, classes)
    except LabelError as error:
        raise LabelError(f"class list {path!r}: {error}") from None
    return classes


def read_descriptions(path: str) -> dict[str, str]:
    """Class to name, from a class CSV with or without a header; the first line of a class counts.

    Raises LabelError for a line without a name.
    """
    names: dict[str, str] = {}
    for row in read_rows(path):
        if len(row) < 2:
            raise LabelError(
                f"class descriptions {path!r}: the line of {row[0]!r} has no name: write each line as `MID,name`"
            )
        names.setdefault(row[0], row[1])
    return names


def write_class_list(path: str, classes: Sequence[str], names: Sequence[str]) -> None:
    """Write `class,name` per line, usable as `classes` and as `descriptions` of a build."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(zip(classes, names, strict=True))
    storage.write_bytes(path, text.getvalue().encode())


def read_text(path: str) -> str:
    """The content of a text file. Raises LabelError if it does not exist or is not UTF-8."""
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise LabelError(f"there is no file {path!r}: name an existing file") from None
    except UnicodeDecodeError as error:
        raise LabelError(f"{path!r} is not UTF-8 text ({error}): convert it, or name another file") from None


def read_rows(path: str) -> list[list[str]]:
    """The rows of a small CSV file whose first field is not empty, without the header LabelName."""
    try:
        text = read_text(path)
        rows = [[row[0].strip(), *row[1:]] for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise LabelError(f"{path!r} cannot be read as CSV ({error}): fix it, or name another file") from None
    rows = [row for row in rows if row[0]]
    return rows[1:] if rows and rows[0][0] == "LabelName" else rows
