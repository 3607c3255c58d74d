"""Images as files below a folder, local or remote: all that are listed, or those of the wanted keys."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from paml import storage
from paml.errors import DataError, check_setting
from paml.parsing import safe_join
from paml.sources.fetch import read_concurrently, read_object
from paml.sources.parts import KeyRule, Part, Payload, fingerprint

PER_PART = 2000
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif", ".pbm", ".pgm", ".pnm", ".ppm"),
    )
)

_LABEL_SUFFIXES = frozenset(
    (".csv", ".tsv", ".json", ".jsonl", ".txt", ".md", ".xml", ".yaml", ".yml", ".parquet", ".arrow", ".tar")
)


def key_of(name: str, rule: KeyRule = "name") -> str:
    """The key of an image, from its path below the source's folder."""
    return os.path.splitext(name.rsplit("/", 1)[-1] if rule == "name" else name)[0]


def is_image(name: str) -> bool:
    """Whether a file name has an image suffix and is not hidden (no leading dot)."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def folder_parts(folder: str | os.PathLike[str], per_part: int = PER_PART, *, keys: KeyRule = "name") -> list[Part]:
    """The image files below `folder` (local or `s3://bucket/prefix`, listed once), in parts of `per_part` files.

    Includes subfolders, except hidden ones, in the order of the names within each folder. Access to a bucket is by
    the AWS variables, the machine's role, or anonymous without either. Raises DataError if there is no such folder or
    no image in it, StorageError if it cannot be listed.
    """
    root = os.fspath(folder)
    images, _ = list_folder(root)
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
            [*([folder] if sizes is None else []), *itertools.chain.from_iterable(chunk), *map(str, chunk_sizes)]
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


def list_folder(root: str) -> tuple[list[tuple[str, int]], Counter[str]]:
    """(path below the folder, bytes) of each image file, and how many other files there are by suffix, without hidden
    files and files of labels. Raises DataError if there is no such folder, StorageError if it cannot be listed."""
    if not storage.is_remote(root) and not os.path.isdir(root):
        raise DataError(f"{root} is not a folder: name the folder of the images")
    listing = storage.list_objects(root) if storage.is_remote(root) else _walk(root, "")
    images: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    for name, size in listing:
        base, suffix = name.rsplit("/", 1)[-1], os.path.splitext(name)[1].lower()
        if is_image(name):
            images.append((name, size))
        elif not base.startswith(".") and suffix not in _LABEL_SUFFIXES:
            others[suffix or "no suffix"] += 1
    return images, others


def _walk(root: str, below: str, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """parents: device and inode of the folders above, so that a link back to one of them is not followed."""
    status = os.stat(os.path.join(root, below))
    if (inode := (status.st_dev, status.st_ino)) in parents:
        return
    with os.scandir(os.path.join(root, below)) as listing:
        entries = sorted((entry.name, entry) for entry in listing)
    for name, entry in entries:
        path = f"{below}/{name}" if below else name
        if not entry.is_dir():
            yield path, _size_of(entry)
        elif not name.startswith("."):
            yield from _walk(root, path, (*parents, inode))


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a dangling link, which is reported when it is read
        return 0
