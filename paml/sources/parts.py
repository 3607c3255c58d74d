"""A source of images is a list of parts: pieces that can be read anywhere, in any order, again after a failure.

What a part cannot read for good (a key that the bucket has not, a damaged file, a dead link) it gives as an
exception in the image's place, so that it ends among the rejects with its reason. What may go well next time
(storage that does not answer, a denied bucket) it raises, so that the part is read again.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

Payload = bytes | str | os.PathLike[str] | Exception
"""An image's bytes, or the path of its file (local or remote), or why the source could not read it."""


MAX_IMAGE_BYTES = 1 << 28
"""An image's file may have so many bytes, so that one cannot use up the memory; larger ones are rejected unread."""


class Part(Protocol):
    """Some images of a source. Small when pickled, since it travels to the task that reads it."""

    @property
    def name(self) -> str:
        """Unique within the source and the same in every run: finished work is found again by it.

        It changes with what the part is to read (files and their sizes, wanted keys), not with their content.
        """
        ...

    @property
    def images(self) -> int | None:
        """How many it gives, where that is known without reading it."""
        ...

    @property
    def bytes(self) -> int | None:
        """Bytes to be read, where known."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        """(key, payload) of each image, in an order that is the same each time. Raises StorageError."""
        ...


def starts(count: int, per_part: int) -> range:
    """Where each part of `per_part` of `count` images begins. Raises ValueError for empty parts."""
    if per_part < 1:
        raise ValueError(f"per_part is {per_part}; a part holds at least 1 image: set 2000")
    return range(0, count, per_part)


def mark_of(texts: Iterable[str]) -> str:
    """12 hex digits that tell one list of texts from another."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def read_parts(parts: Iterable[Part]) -> Iterator[tuple[str, Payload]]:
    """The images of all parts, one part after the other."""
    return itertools.chain.from_iterable(parts)
