"""Images as files below a folder, local or remote."""

import os
from collections.abc import Iterator

from paml import storage
from paml.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm")
)


def key_of(name: str) -> str:
    """The key of an image: its file name without folders and without the last suffix."""
    return os.path.splitext(name.rsplit("/", 1)[-1])[0]


def is_image(name: str) -> bool:
    """Whether a file name looks like an image; hidden files (a leading dot) do not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def iter_folder(folder: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """(key, path) of each image file below `folder`, subfolders included, sorted by name within each folder.

    The key is the file name without folders and suffix. Other files are passed over. Raises DataError where
    there is no such folder.
    """
    root = os.fspath(folder)
    if storage.is_remote(root):
        for name in storage.list_files(root):
            if is_image(name):
                yield key_of(name), storage.join(root, name)
        return
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder: name the folder that holds the images")
    yield from _walk(root)


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as found:
        entries = sorted((entry.name, entry.is_dir()) for entry in found)
    for name, is_folder in entries:
        path = os.path.join(folder, name)
        if is_folder:
            if not name.startswith("."):
                yield from _walk(path)
        elif is_image(name):
            yield key_of(name), path


def count_folder(folder: str | os.PathLike[str]) -> int:
    """Number of image files below `folder`."""
    return sum(1 for _ in iter_folder(folder))
