"""Images as files below a folder, local or remote."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from paml import storage
from paml.errors import DataError
from paml.sources.fetch import read_ahead, read_object
from paml.sources.parts import Part, Payload, mark_of, starts

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm")
)

KeyRule = Literal["name", "path"]
"""`name`: the key is the file name without folders and suffix. `path`: its path below the folder, without suffix."""


def key_of(name: str, rule: KeyRule = "name") -> str:
    """The key of an image, from its path below the source's folder."""
    return os.path.splitext(name.rsplit("/", 1)[-1] if rule == "name" else name)[0]


def is_image(name: str) -> bool:
    """Whether a file name looks like an image; hidden files (a leading dot) do not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class FolderPart:
    """Some files of a folder. Those of a local one are given as paths, those of a bucket are read ahead."""

    name: str
    folder: str
    files: tuple[tuple[str, str], ...]
    """(key, path below the folder) of each."""
    bytes: int | None

    @property
    def images(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        if not storage.is_remote(self.folder):
            for key, name in self.files:
                yield key, os.path.join(self.folder, name)
            return
        for (key, _), data in read_ahead(self.files, self._read):
            yield key, data

    def _read(self, file: tuple[str, str]) -> Payload:
        return read_object(storage.join(self.folder, file[1]))


def folder_parts(folder: str | os.PathLike[str], per_part: int = 2000, *, keys: KeyRule = "name") -> list[Part]:
    """The image files below `folder` (local or `s3://bucket/prefix`, listed once), in parts of `per_part` files.

    Subfolders are included, hidden ones and other files are passed over; the order is that of the names within
    each folder. Access to a bucket is by the AWS variables, the machine's role, or anonymous without either.
    Raises DataError where there is no such folder or no image in it, StorageError where it cannot be listed.
    """
    root = os.fspath(folder)
    found = list(_images_below(root))
    if not found:
        raise DataError(f"{root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}): name the folder of the images")
    parts: list[Part] = []
    for number, start in enumerate(starts(len(found), per_part)):
        run = found[start : start + per_part]
        mark = mark_of(f"{name} {size}" for name, size in run)
        files = tuple((key_of(name, keys), name) for name, _ in run)
        parts.append(FolderPart(f"files-{number:06d}-{mark}", root, files, sum(size for _, size in run)))
    return parts


def file_parts(folder: str, files: Sequence[tuple[str, str]], per_part: int = 2000) -> list[Part]:
    """Files that are known by name, (key, path below `folder`) each: nothing is listed."""
    parts: list[Part] = []
    for number, start in enumerate(starts(len(files), per_part)):
        run = tuple(files[start : start + per_part])
        parts.append(FolderPart(f"files-{number:06d}-{mark_of(name for _, name in run)}", folder, run, None))
    return parts


def iter_folder(folder: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """(key, path) of each image file below `folder`, as `folder_parts` finds them. Raises DataError."""
    root = os.fspath(folder)
    for name, _ in _images_below(root):
        yield key_of(name), storage.join(root, name)


def _images_below(root: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, bytes) of each image file."""
    if storage.is_remote(root):
        yield from ((name, size) for name, size in storage.list_sizes(root) if is_image(name))
        return
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder: name the folder that holds the images")
    yield from _walk(root, "")


def _walk(root: str, below: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """above: device and number of the folders that lead here, so that a link back to one of them is not gone into."""
    about = os.stat(os.path.join(root, below))
    if (mark := (about.st_dev, about.st_ino)) in above:
        return
    with os.scandir(os.path.join(root, below)) as found:
        entries = sorted((entry.name, entry) for entry in found)
    for name, entry in entries:
        path = f"{below}/{name}" if below else name
        if entry.is_dir():
            if not name.startswith("."):
                yield from _walk(root, path, (*above, mark))
        elif is_image(name):
            yield path, _size_of(entry)


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a link that leads nowhere: whoever reads it reports it
        return 0
