"""Common parts of the sources that are folder trees: short looks at files, folders of images, complete labels."""

import contextlib
import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, StorageError
from paml.parsing import parse_errors_as, safe_join
from paml.sources.matching import normalize_name
from paml.storage import s3

SNIFF_BYTES = 1 << 16
_SNIFF_FILES = 1000


def read_lines(path: str, content: str) -> list[str]:
    """The stripped, non-empty lines of a text file; DataError, with its `content`, if it does not exist."""
    try:
        text = storage.read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        raise DataError(f"there is no {path} ({content}): name the folder of the unpacked set") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_existing(root: str, names: Sequence[str], content: str) -> str:
    """The first of some files below `root` that exists. Raises DataError."""
    for name in names:
        if storage.exists(path := storage.join(root, name)):
            return path
    raise DataError(f"{root} has no {' or '.join(names)} ({content}): name the folder of the unpacked set")


def sniff(path: str) -> bytes:
    """The first 64 KB of a file; b"" if it cannot be read."""
    try:
        return storage.read_range(path, 0, min(storage.size_of(path), SNIFF_BYTES))
    except (OSError, ValueError):
        return b""


def list_some(folder: str) -> list[str]:
    """Paths in a folder, sorted: of its files and its subfolders' files and folders, or the first 1,000 objects in S3.

    [] if there are none, or they cannot be listed.
    """
    try:
        if storage.is_remote(folder):
            prefix = s3.bucket_and_key(folder.rstrip("/") + "/")[1]
            objects = s3.list_objects(folder.rstrip("/") + "/")
            return [key[len(prefix) :] for key, _ in itertools.islice(objects, _SNIFF_FILES)]
        with os.scandir(folder) as listing:
            entries = sorted((entry.name, entry.is_dir()) for entry in listing)
    except (OSError, ValueError):
        return []
    names = [name for name, is_folder in entries if not is_folder]
    for folder_name in [name for name, is_folder in entries if is_folder and not name.startswith(".")]:
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, folder_name)) as listing:
            names += [f"{folder_name}/{entry.name}" for entry in listing]
    return sorted(names)


_OUTPUT = re.compile(r"(|.*/)(?:shards/[^/]+/manifest\.arrow|labels/[^/]+\.(?:classes\.csv|rejects\.parquet))")


def list_inputs(folder: str) -> list[str]:
    """Paths of all files below a folder, except those that `paml prepare` wrote there."""
    names = storage.list_files(folder)
    outputs = {match[1] for name in names if (match := _OUTPUT.fullmatch(name))}
    written = tuple(output + part for output in outputs for part in ("shards/", "labels/"))
    return [name for name in names if not name.startswith(written)]


def have_files(root: str, *choices: Sequence[str]) -> bool:
    """Whether `root` has one file of each choice; False if that cannot be determined."""
    try:
        return all(any(storage.exists(storage.join(root, name)) for name in names) for names in choices)
    except (StorageError, ValueError):
        return False


def path_below(root: str, *parts: str) -> str | None:
    """`parts` of an untrusted file as one path below `root`; None if it would leave the folder."""
    path = posixpath.normpath("/".join(part for part in parts if part).replace("\\", "/")).lstrip("/")
    try:
        safe_join(root, path)
    except ValueError:
        return None
    return path


def check_below(folder: str, names: Sequence[str], path: str) -> None:
    """Raise DataError if the file `path` names a file outside of `folder`."""
    with parse_errors_as(path, "unpack it again"):
        for name in names:
            safe_join(folder, name)


def distinct_names(names: Sequence[str], folders: Sequence[str], splits: Sequence[str], path: str) -> list[str]:
    """The names of the images of `path`; those that repeat with their folders before them.

    Raises DataError for an image that is labeled twice, such as in two splits.
    """
    counts = Counter(names)
    distinct = [
        f"{folder}/{normalize_name(name)}" if counts[name] > 1 and folder else name
        for name, folder in zip(names, folders, strict=True)
    ]
    split_of: dict[str, str] = {}
    for name, split in zip(distinct, splits, strict=True):
        if name in split_of:
            where = f"in {split_of[name]} and {split}" if split else "by two files"
            raise DataError(f"{path}: the image {name!r} is labeled twice, {where}: remove it from one")
        split_of[name] = split
    return distinct


def positive_labels(positives: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The fields `image`, `cls` and `state` of `Records` for the positives, bool[N, K], of complete labels."""
    image, cls = np.nonzero(positives)
    names = pa.DictionaryArray.from_arrays(pa.array(cls, pa.int32()), pa.array(classes, pa.string()))
    return {"image": image, "cls": names, "state": pa.repeat("1", len(image))}
