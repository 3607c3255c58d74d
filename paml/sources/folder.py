"""Images as files below a folder, local or remote: all that are listed, or those of the wanted keys."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from paml import storage
from paml.errors import DataError, check_setting
from paml.parsing import safe_join
from paml.sources.fetch import read_concurrently, read_object
from paml.sources.parts import ImageRequest, ImageSet, KeyRule, Part, Payload, fingerprint

PER_PART = 2000
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm")
)


def key_of(name: str, rule: KeyRule = "name") -> str:
    """The key of an image, from its path below the source's folder."""
    return os.path.splitext(name.rsplit("/", 1)[-1] if rule == "name" else name)[0]


def is_image(name: str) -> bool:
    """Whether a file name has an image suffix and is not hidden (no leading dot)."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def folder_source(request: ImageRequest) -> ImageSet:
    """List the split's folder; or, if it does not exist and that is allowed, the folder shared by all splits."""
    if request.shared_folder and not storage.is_remote(request.images) and not os.path.isdir(request.folder):
        return ImageSet(folder_parts(request.images, keys=request.keys), only_labeled=True)
    return ImageSet(folder_parts(request.folder, keys=request.keys))


def bucket_source(request: ImageRequest) -> ImageSet:
    """Read {split}/{key}.jpg of each labeled image, without listing the bucket."""
    return ImageSet(bucket_parts(request.images, request.table.keys(), request.split), only_labeled=True)


def folder_parts(folder: str | os.PathLike[str], per_part: int = PER_PART, *, keys: KeyRule = "name") -> list[Part]:
    """The image files below `folder` (local or `s3://bucket/prefix`, listed once), in parts of `per_part` files.

    Includes subfolders, except hidden ones, in the order of the names within each folder. Access to a bucket is by
    the AWS variables, the machine's role, or anonymous without either. Raises DataError if there is no such folder or
    no image in it, StorageError if it cannot be listed.
    """
    root = os.fspath(folder)
    images = list(_list_images(root))
    if not images:
        raise DataError(f"{root} has no image ({', '.join(sorted(IMAGE_SUFFIXES))}): name the folder of the images")
    files = [(key_of(name, keys), name) for name, _ in images]
    return file_parts(root, files, [size for _, size in images], per_part=per_part)


def bucket_parts(prefix: str, keys: Iterable[str], split: str, per_part: int = PER_PART) -> list[Part]:
    """The images `{prefix}/{split}/{key}.jpg` of the wanted keys, in parts of `per_part`, ordered by key.

    prefix: `s3://bucket` or `s3://bucket/folder`, or a local folder; access as in `folder_parts`. A missing key yields
    a FileNotFoundError; reading raises StorageError if the storage cannot tell. (If a bucket denies listing, S3 reports
    missing objects as denied: that is such an error.)
    """
    files = [(key, f"{key}.jpg") for key in sorted(set(keys))]
    return file_parts(storage.join(prefix, split), files, per_part=per_part, as_paths=False)


def file_parts(
    folder: str,
    files: Sequence[tuple[str, str]],
    sizes: Sequence[int] | None = None,
    *,
    per_part: int = PER_PART,
    as_paths: bool = True,
) -> list[Part]:
    """Files given as (key, path below `folder`), without listing the folder. as_paths: yield local files as paths.

    Raises SettingsError for a `per_part` below 1.
    """
    check_setting(per_part >= 1, "per_part", per_part, "1 or more")
    as_paths = as_paths and not storage.is_remote(folder)
    parts = []
    for number, start in enumerate(range(0, len(files), per_part)):
        chunk = tuple(files[start : start + per_part])
        chunk_sizes = [] if sizes is None else sizes[start : start + per_part]
        digits = fingerprint(
            [*([folder] if sizes is None else []), *(name for _, name in chunk), *map(str, chunk_sizes)]
        )
        read = partial(_read_files, folder, chunk, as_paths)
        total = None if sizes is None else sum(chunk_sizes)
        parts.append(Part(f"files-{number:06d}-{digits}", read, len(chunk), total))
    return parts


def _read_files(folder: str, files: Sequence[tuple[str, str]], as_paths: bool) -> Iterator[tuple[str, Payload]]:
    if as_paths:
        yield from ((key, os.path.join(folder, name)) for key, name in files)
        return
    for (key, _), payload in read_concurrently(files, partial(_read_file, folder)):
        yield key, payload


def _read_file(folder: str, file: tuple[str, str]) -> Payload:
    try:
        path = safe_join(folder, file[1])
    except ValueError as error:
        return DataError(str(error))
    return read_object(path)


def _list_images(root: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, bytes) of each image file."""
    if storage.is_remote(root):
        yield from ((name, size) for name, size in storage.list_objects(root) if is_image(name))
        return
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder: name the folder of the images")
    yield from _walk(root, "")


def _walk(root: str, below: str, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """parents: device and inode of the folders above, so that a link back to one of them is not followed."""
    status = os.stat(os.path.join(root, below))
    if (inode := (status.st_dev, status.st_ino)) in parents:
        return
    with os.scandir(os.path.join(root, below)) as listing:
        entries = sorted((entry.name, entry) for entry in listing)
    for name, entry in entries:
        path = f"{below}/{name}" if below else name
        if entry.is_dir():
            if not name.startswith("."):
                yield from _walk(root, path, (*parents, inode))
        elif is_image(name):
            yield path, _size_of(entry)


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a dangling link, which is reported when it is read
        return 0
