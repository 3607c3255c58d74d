"""What a source of labels understood: images, classes and labels, before splits, matching and rules for the rest.

A source reads one format and decides nothing else. `paml.preparation` divides its records into splits, matches images
to files, fills in unlisted labels and writes the tables.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from paml.labels.class_list import ClassList
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.sources.parts import Part

TEXT_OF_STATE = {POSITIVE: "1", NEGATIVE: "0", UNOBSERVED: ""}
"""How `Records.state` writes a state."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """The images and labels of one file, folder or data set."""

    path: str
    """The file or folder, as the user named it."""
    understood: str
    """What was understood, in one line without a full stop: `wide table, 3 images, 14 class columns, -1 unobserved`."""
    images: Sequence[str]
    """N image names as the source writes them, with folders and suffix if it has them; no name repeats. Images without
    any label are included."""
    image: np.ndarray
    """int64[M], the index in `images` of each label."""
    cls: pa.Array
    """string[M], the class of each label, or its name; may be dictionary-encoded. A class that is not in `classes`
    becomes a reject."""
    state: pa.Array
    """string[M], "1", "0", or "" for a pair that is explicitly unobserved: no rule fills it in. Any other text is the
    value of a cell that was not understood and becomes a reject. May be dictionary-encoded."""
    keys: Sequence[str] | None = None
    """N keys, if the format has its own, such as COCO's image ids; None: they are made from the names."""
    row: np.ndarray | None = None
    """int64[M], the number of the row or record of each label in the file, from 1; None if it has none."""
    splits: Sequence[str] | None = None
    """N names of splits as the source writes them (`train`, `val2017`), "" for none; None if it knows no splits."""
    classes: ClassList | None = None
    """The source's own list, in its order; None: the distinct classes, sorted."""
    part_splits: Sequence[str] | None = None
    """The split of each of `parts` as in `splits`, if a part has images of one split only."""
    complete: bool = False
    """Whether the format says that every class that an image does not list is absent."""
    unlabeled: np.ndarray | None = None
    """bool[N], images that nobody annotated: no rule fills in their labels. None: all were."""
    folder: str | None = None
    """The folder of the images, if the source knows it; else the setting `images` names it."""
    files: Sequence[str] | None = None
    """N paths below `folder` (or absolute), if the source names the exact file of each image; "" for unknown."""
    parts: Sequence[Part] | None = None
    """The images themselves, if they are embedded in the source: their keys are `images`."""
    bad_rows: Sequence[tuple[int, str]] = ()
    """(number, reason and text) of rows that are not labels at all."""
    notes: Sequence[str] = ()
    """Lines that the user should see: columns left out, files that were not read, values with a doubtful meaning."""

    def __post_init__(self) -> None:
        count = len(self.cls)
        assert len(self.image) == len(self.state) == count, "one image, class and state per label"
        assert self.splits is None or len(self.splits) == len(self.images), "one split per image"
        assert self.files is None or len(self.files) == len(self.images), "one file per image"


@dataclass
class RecordBuilder:
    """Collects labels one image at a time; for sources that are small enough for Python loops."""

    images: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    cls: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)

    def add_image(
        self, name: str, labels: Mapping[str, int] | Counter[str], *, row: int = 0, split: str = "", file: str = ""
    ) -> None:
        """Add an image with the state of each of its classes (POSITIVE, NEGATIVE or UNOBSERVED)."""
        number = len(self.images)
        self.images.append(name)
        self.splits.append(split)
        self.files.append(file)
        for cls, state in labels.items():
            self.image.append(number)
            self.cls.append(cls)
            self.state.append(TEXT_OF_STATE[state])
            self.row.append(row)

    def columns(self) -> dict[str, Any]:
        """The fields of `Records` that were collected; `splits` and `files` only if an image has one."""
        return {
            "images": self.images,
            "image": np.array(self.image, np.int64),
            "cls": pa.array(self.cls, pa.string()).dictionary_encode(),
            "state": pa.array(self.state, pa.string()).dictionary_encode(),
            "row": np.array(self.row, np.int64),
            "splits": self.splits if any(self.splits) else None,
            "files": self.files if any(self.files) else None,
        }
