"""A source of images is a list of parts: pieces that can be read anywhere, in any order, again after a failure."""

import os
from collections.abc import Iterator
from typing import Protocol

Payload = bytes | str | os.PathLike[str] | Exception
"""An image's bytes, or the path of its file (local or remote), or why the source could not read it."""


class Part(Protocol):
    """Some images of a source. Small when pickled, since it travels to the task that reads it."""

    name: str
    """Unique within the source and the same in every run: finished work is found again by it."""
    images: int | None
    """How many it gives, where that is known without reading it."""
    bytes: int | None
    """Bytes to be read, where known."""

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        """(key, payload) of each image, in an order that is the same each time."""
        ...
