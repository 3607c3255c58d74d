"""Files of the Open Images releases: downloaded and verified (V3), and found in a folder (V3 to V7).

In a folder they have their names on the server, or the names and folders of FiftyOne's dataset zoo
(`fiftyone/utils/openimages.py`): {split}/labels/classifications.csv, {split}/data/{ImageID}.jpg and, once or in each
split, metadata/classes.csv.
"""

import hashlib
import json
import os
import posixpath
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paml import storage
from paml.errors import DataError
from paml.parsing import parse_errors_as, parse_json_object
from paml.sources.fetch import wait_seconds
from paml.sources.web import RETRY_STATUS, Unreachable, iter_chunks, open_url
from paml.storage import StorageError

BASE = "https://storage.googleapis.com/openimages"
"""The server of the releases."""
SPLITS = ("train", "validation", "test")
V3 = "2017_11"
_WEB = ("http://", "https://")
_TRIES = 5


@dataclass(frozen=True)
class Archive:
    """A tar.gz file of a release and the files to extract from it."""

    name: str
    bytes: int
    md5: str
    """Hex digest."""
    files: tuple[str, ...]
    """Members to extract; others are ignored."""


V3_ARCHIVES: Mapping[str, Archive] = {
    "classes": Archive(
        f"classes_{V3}.tar.gz",
        303_055,
        "3937f6dddf777ca912c816d5f6ffe06f",
        (f"{V3}/classes-trainable.txt", f"{V3}/class-descriptions.csv"),
    ),
    "annotations_human": Archive(
        f"annotations_human_{V3}.tar.gz",
        144_102_834,
        "cdcbb5e9aba900530c85cb370564f599",
        tuple(f"{V3}/{split}/annotations-human.csv" for split in SPLITS),
    ),
    "images": Archive(
        f"images_{V3}.tar.gz",
        1_038_133_015,
        "d840296342470becab9db7228bda86cc",
        tuple(f"{V3}/{split}/images.csv" for split in SPLITS),
    ),
}
"""The archives of V3 needed for training; `images` only for the original addresses of the images."""


def fetch_release(
    folder: str | os.PathLike[str],
    archives: Sequence[Archive],
    *,
    base: str = BASE,
    log: Callable[[str], None] = print,
) -> str:
    """Download archives of V3 to the local `folder`, verify and unpack them; returns `{folder}/2017_11`.

    base: a web address, a local folder or `s3://bucket/prefix` that has the archives, in a folder `2017_11` or
    directly. An archive that is already in `folder` is used.

    Can be repeated at any time: unpacked files are not downloaded again, and an interrupted download resumes. Raises
    DataError for wrong bytes (with the expected and the actual ones), StorageError if the source cannot be read or the
    folder not be written.
    """
    root = os.fspath(folder)
    if storage.is_remote(root):
        raise DataError(f"a release is unpacked to a local disk, not to {root}: name a local folder")
    storage.ensure_writable(root)
    for archive in archives:
        if _is_unpacked(root, archive):
            continue
        path = os.path.join(root, archive.name)
        if os.path.exists(path):
            _verify(path, archive, path)
        else:
            log(f"fetching {archive.name} ({archive.bytes / 1e6:,.1f} MB) from {base}")
            _download(base, archive, path)
        _unpack(root, archive, path)
        storage.delete(path)
    return os.path.join(root, V3)


def _record_path(root: str, archive: Archive) -> str:
    return os.path.join(root, V3, f".{archive.name}.json")


def _is_unpacked(root: str, archive: Archive) -> bool:
    path = _record_path(root, archive)
    if not os.path.exists(path):
        return False
    with parse_errors_as(path, "delete it to unpack the archive again"):
        record = parse_json_object(storage.read_bytes(path))
        if record["md5"] != archive.md5 or set(record["files"]) != set(archive.files):
            return False
        sizes = {os.path.join(root, name): size for name, size in record["files"].items()}
    return all(os.path.isfile(file) and os.path.getsize(file) == size for file, size in sizes.items())


def _unpack(root: str, archive: Archive, path: str) -> None:
    """Extract the expected regular files, each under its own name, and nothing else."""
    sizes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for info in tar:
                name = posixpath.normpath(info.name)
                if not info.isreg() or name not in archive.files or name in sizes:
                    continue
                body = tar.extractfile(info)
                if body is None:
                    continue
                with storage.replacing(os.path.join(root, name)) as temporary, open(temporary, "wb") as out:
                    shutil.copyfileobj(body, out)
                sizes[name] = info.size
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}): delete it and fetch it again") from error
    missing = [name for name in archive.files if name not in sizes]
    if missing:
        raise DataError(f"{path} has no {missing[0]}: it is not {archive.name} of Open Images V3, delete it")
    storage.write_bytes(_record_path(root, archive), json.dumps({"md5": archive.md5, "files": sizes}).encode())


def _verify(path: str, archive: Archive, source: str) -> None:
    """Raise DataError if the file does not have the archive's size and MD5."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if (size := os.path.getsize(path)) != archive.bytes or digest != archive.md5:
        raise _wrong_bytes(source, archive, f"{size:,} bytes with MD5 {digest}")


def _wrong_bytes(source: str, archive: Archive, actual: str) -> DataError:
    return DataError(
        f"{source} is not {archive.name} of the release: expected {archive.bytes:,} bytes with MD5 {archive.md5}, got "
        f"{actual}: delete it, or use another source"
    )


def _download(base: str, archive: Archive, path: str) -> None:
    partial = path + ".part"
    source = _find_archive(base, archive)
    if source.startswith(_WEB):
        _download_from_web(source, archive, partial)
    else:
        storage.copy(source, partial)
    try:
        _verify(partial, archive, source)
    except DataError:
        os.unlink(partial)
        raise
    os.replace(partial, path)


def _download_from_web(url: str, archive: Archive, partial: str) -> None:
    """Append to the partial file until it has all bytes; resumes after a failure."""
    failures = 0
    while (have := _size_of(partial)) < archive.bytes:
        try:
            with storage.storage_errors("write", partial):
                _append(url, archive, partial, have)
        except Unreachable as error:
            failures = 1 if _size_of(partial) > have else failures + 1
            if failures >= _TRIES:
                raise StorageError(
                    error.errno,
                    f"{error.strerror}; {have:,} of {archive.bytes:,} bytes were downloaded, {_TRIES} more tries "
                    "failed: repeat the call to resume",
                ) from error
            time.sleep(wait_seconds(failures - 1, 0.5))


def _size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _append(url: str, archive: Archive, partial: str, have: int) -> None:
    """Append the bytes after the first `have` to the partial file."""
    with open_url(url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status in RETRY_STATUS:
            raise Unreachable(0, f"{url} answered {response.status}")
        if response.status not in (200, 206, 416):
            raise StorageError(0, f"{url} answered {response.status}: fix the address, or download the file yourself")
        # Content-Range is `bytes 5-99/100`, or `bytes */100` if the file has no such bytes.
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        if response.status == 200:
            total = response.headers.get("Content-Length", "")
        if total.isdigit() and int(total) != archive.bytes:
            raise _wrong_bytes(url, archive, f"{int(total):,} bytes")
        start = have if response.status == 206 and span.startswith(f"bytes {have}-") else 0
        if response.status != 200 and start != have:
            raise StorageError(
                0, f"{url} answered {response.status} to a request for its bytes from {have} on: try again"
            )
        with open(partial, "r+b" if start else "wb") as out:
            out.seek(start)
            for chunk in iter_chunks(response, url):
                out.write(chunk)
                if out.tell() > archive.bytes:
                    return


def _find_archive(base: str, archive: Archive) -> str:
    if base.startswith(_WEB):
        return f"{base.rstrip('/')}/{V3}/{archive.name}"
    for path in (storage.join(base, V3, archive.name), storage.join(base, archive.name)):
        if storage.exists(path):
            return path
    raise DataError(f"{base} has neither {V3}/{archive.name} nor {archive.name}: name the folder that has it")


class ReleaseFiles(NamedTuple):
    """The files of one split of a release, and of its classes."""

    annotations: str
    """Human-verified image-level labels: `ImageID,Source,LabelName,Confidence`."""
    classes: str
    """The classes: of the release the trainable ones, one MID per line, or if it has no such list all of
    `descriptions`."""
    descriptions: str | None
    """CSV of MID and name; None if the folder has none: classes are then named by their MIDs."""
    images: str | None
    """The image list with the original addresses, needed by `flickr_parts`; None if the folder has none."""


_LABELS = "annotations-human-imagelabels.csv"
_FIFTYONE_LABELS = "labels/classifications.csv"


def _paths_of(split: str) -> dict[str, ReleaseFiles]:
    """The paths below BASE, by version. Later releases share files with earlier ones."""
    train = split == "train"
    listed = f"{split}-images-with-{'labels-with-' if train else ''}rotation.csv"
    short = "val" if split == "validation" else split
    newest = f"v6/oidv6-{listed}" if train else f"2018_04/{split}/{listed}"
    paths = {
        "v3": (f"{V3}/{split}/annotations-human.csv", f"{V3}/", f"{V3}/{split}/images.csv"),
        "v4": (f"2018_04/{split}/{split}-{_LABELS}", "2018_04/", f"2018_04/{split}/{listed}"),
        "v5": (f"v5/{split}-{_LABELS}", "v5/", f"v5/{listed}" if train else newest),
        "v6": (f"v6/oidv6-{split}-{_LABELS}" if train else f"v5/{split}-{_LABELS}", "v6/oidv6-", newest),
        "v7": (f"v7/oidv7-{short}-{_LABELS}", "v7/oidv7-", newest),
    }
    return {
        version: ReleaseFiles(annotations, f"{prefix}classes-trainable.txt", f"{prefix}class-descriptions.csv", images)
        for version, (annotations, prefix, images) in paths.items()
    }


def find_release_files(folder: str, split: str) -> ReleaseFiles:
    """The files of a release in `folder` (local or S3), under their names on the server or in FiftyOne's layout.

    Names of the server may be in its folders, in folders named by split, or all in one. split: train, validation or
    test. Raises DataError for the files of several releases, and for a missing file, with its address.
    """
    if split not in SPLITS:
        raise DataError(f"{split!r} is not a split of Open Images: allowed are {', '.join(SPLITS)}")
    paths = _paths_of(split)
    located = {path: _locate(folder, path, split) for path in {str(path) for files in paths.values() for path in files}}
    files_of = {version: [located[str(path)] for path in files] for version, files in paths.items()}
    files_of["FiftyOne's"] = _fiftyone_files(folder, split)
    described = {v: [files[0], files[2], *files[2:]] for v, files in files_of.items() if files[0] and files[2]}
    complete = {v: files for v, files in files_of.items() if files[0] and files[1]} or described
    names = dict.fromkeys([*complete, *described])
    annotation_files = {files_of[version][0] for version in names}
    if len(annotation_files) > 1 or len({(files[0], files[1]) for files in complete.values()}) > 1:
        raise DataError(
            f"{folder} has the files of several releases ({', '.join(names)}) for {split!r}: keep one per folder"
        )
    if not complete:
        raise DataError(_missing_message(folder, split, paths, files_of))
    annotations, classes, *_ = next(iter(complete.values()))
    others = (next((files[kind] for files in complete.values() if files[kind]), None) for kind in (2, 3))
    return ReleaseFiles(str(annotations), str(classes), *others)


def images_folder_of(folder: str, split: str) -> str | None:
    """The folder of a split's images if `folder` is in FiftyOne's layout, which has them next to the labels."""
    annotations = storage.join(folder, split, _FIFTYONE_LABELS)
    return storage.join(folder, split, "data") if storage.exists(annotations) else None


def detect_openimages(labels: str) -> str | None:
    """Whether a folder has human-verified labels of Open Images, under a name that `find_release_files` knows."""
    try:
        path = next((path for split in SPLITS if (path := _find_annotations(labels, split))), None)
    except (OSError, ValueError):  # storage that does not respond, a path with a zero byte
        return None
    return None if path is None else f"labels of Open Images in {path}"


def _find_annotations(folder: str, split: str) -> str | None:
    """The path below `folder` of a split's annotations, of any release."""
    candidates = [f"{split}/{_FIFTYONE_LABELS}"]
    candidates += [c for files in _paths_of(split).values() for c in _candidates(files.annotations, split)]
    return next((c for c in dict.fromkeys(candidates) if storage.exists(storage.join(folder, c))), None)


def _fiftyone_files(folder: str, split: str) -> list[str | None]:
    """The files of a split in FiftyOne's layout, in the order of ReleaseFiles; it has no list of trainable classes."""

    def find(*paths: str) -> str | None:
        return next((found for path in paths if storage.exists(found := storage.join(folder, path))), None)

    annotations = find(f"{split}/{_FIFTYONE_LABELS}")
    if annotations is None:
        return [None] * len(ReleaseFiles._fields)
    classes = find(*(f"{place}metadata/classes.csv" for place in (f"{split}/", "", *(f"{s}/" for s in SPLITS))))
    return [annotations, None, classes, find(f"{split}/metadata/image_ids.csv")]


def _locate(folder: str, path: str, split: str) -> str | None:
    """The path of a file of the server below `folder`, if it exists."""
    return next((found for c in _candidates(path, split) if storage.exists(found := storage.join(folder, c))), None)


def _candidates(path: str, split: str) -> list[str]:
    """Where a file of the server may be in a user's folder."""
    below, name = path.split("/", 1)[1], posixpath.basename(path)
    candidates = [path, below, f"{split}/{name}"]
    if split in name or "-val-" in name or name.endswith(("classes-trainable.txt", "class-descriptions.csv")):
        candidates.append(name)
    return candidates


def _missing_message(
    folder: str, split: str, paths: Mapping[str, ReleaseFiles], files_of: Mapping[str, Sequence[str | None]]
) -> str:
    started = [version for version in paths if files_of[version][0] or files_of[version][1]]
    if files_of["FiftyOne's"][0]:
        return (
            f"{folder} has no metadata/classes.csv for {split!r}, the classes of FiftyOne's layout: download "
            f"{BASE}/v5/class-descriptions-boxable.csv and give it this name"
        )
    if storage.exists(storage.join(folder, _FIFTYONE_LABELS)):
        return (
            f"{folder} is a single split in FiftyOne's layout: set labels to the folder that has {split}/, and splits "
            "to those that are there"
        )
    if not started:
        names = ", ".join(dict.fromkeys(files.annotations for files in paths.values()))
        others = [name for name in SPLITS if _find_annotations(folder, name)]
        fix = f"Set splits to '[{', '.join(others)}]', which it has, or" if others else "Set"
        return (
            f"{folder} has no annotations of {split!r}: looked for {names} and {split}/{_FIFTYONE_LABELS}. {fix} "
            f"openimages.download_from to download V3; the other releases are below {BASE}"
        )
    version = next((version for version in reversed(started) if files_of[version][0]), started[-1])
    has_annotations = files_of[version][0] is not None
    path = paths[version].classes if has_annotations else paths[version].annotations
    archive = V3_ARCHIVES["classes" if has_annotations else "annotations_human"].name
    origin = f"{BASE}/{V3}/{archive}" if version == "v3" else f"{BASE}/{path}"
    return f"{folder} has no {posixpath.basename(path)} for {split!r}: download {origin}"
