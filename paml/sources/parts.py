"""A source of images is a function that returns parts: pieces that can be read anywhere, in any order, repeatedly.

If an image cannot be read at all (a key that is not in the bucket, a damaged file, a dead link), a part yields an
exception in its place, which ends up among the rejects with its reason. Errors that a retry may fix (storage that
does not respond, a denied bucket) are raised, so the part is read again.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

KeyRule = Literal["name", "path"]
"""`name`: the key is the file name without folders and suffix. `path`: its path below the folder, without suffix."""
Payload = bytes | str | os.PathLike[str] | Exception
"""An image's bytes, the path of its file (local or remote), or why the source could not read it."""
MAX_IMAGE_BYTES = 1 << 28
"""Larger image files are rejected unread, so that one cannot exhaust the memory."""


@dataclass(frozen=True)
class Part:
    """Some images of a source. Small when pickled, because it is sent to the task that reads it."""

    name: str
    """Unique within the source and the same in every run: completed work is identified by it.

    It depends on what the part is to read (files and their sizes, wanted keys), not on their content."""
    read: Callable[[], Iterator[tuple[str, Payload]]]
    """Returns (key, payload) of each image, always in the same order. Raises StorageError."""
    images: int | None = None
    """The number of images, if known without reading."""
    bytes: int | None = None
    """The number of bytes to read, if known."""
    max_concurrent: int | None = None
    """The number of parts with this limit that may be read at a time."""
    read_once: bool = False
    """Whether `read` cannot be called again."""

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        return self.read()


def fingerprint(texts: Iterable[str]) -> str:
    """12 hex digits that identify a list of texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def read_parts(parts: Iterable[Part]) -> Iterator[tuple[str, Payload]]:
    """The images of all parts, one part after the other."""
    return itertools.chain.from_iterable(parts)
