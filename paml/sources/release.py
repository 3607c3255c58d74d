"""Files of the Open Images releases: fetched and checked (V3), and found by name in a folder (V3 to V7)."""

import hashlib
import json
import os
import posixpath
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paml import storage
from paml.errors import DataError
from paml.reading import parse_object, reading
from paml.sources.fetch import wait_seconds
from paml.sources.web import LATER, Unreachable, opened, pieces
from paml.storage import StorageError

BASE = "https://storage.googleapis.com/openimages"
"""Where the releases lie."""
IMAGE_BUCKET = "s3://open-images-dataset"
"""The images at 1,024 pixels or less, `{split}/{ImageID}.jpg`, to be read without keys. Validation and test are
whole; of train it holds the 1,743,042 images that have boxes, not all 9,011,219."""
SPLITS = ("train", "validation", "test")
V3 = "2017_11"
_PIECE = 16 << 20
_TRIES = 5


@dataclass(frozen=True)
class Archive:
    """A tar.gz file of a release and what is taken out of it."""

    name: str
    bytes: int
    md5: str
    """Hex digest."""
    files: tuple[str, ...]
    """Members that are unpacked; others are left alone."""


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
"""The archives of V3 that training needs: `images` only for the original addresses of the photos."""


def fetch_release(
    folder: str | os.PathLike[str],
    archives: Sequence[str] = ("classes", "annotations_human"),
    *,
    base: str = BASE,
    known: Mapping[str, Archive] = V3_ARCHIVES,
    keep_archives: bool = False,
    say: Callable[[str], None] | None = None,
) -> str:
    """Fetch archives of V3 to the local `folder`, check and unpack them; returns `{folder}/2017_11`.

    archives: names in `known`. base: a web address, a local folder or `s3://bucket/prefix` that holds the
    archives, in a folder `2017_11` or directly. An archive that lies in `folder` already is used.

    May be made again at any time: what is unpacked is kept, and a download that was cut off goes on where it
    stood. Raises DataError for unknown names and for wrong bytes (naming what was expected and found),
    StorageError where the source cannot be read or the folder not be written.
    """
    root = os.fspath(folder)
    if storage.is_remote(root):
        raise DataError(f"a release is unpacked on a local disk, not in {root}: name a local folder")
    unknown = [name for name in archives if name not in known]
    if unknown:
        raise DataError(f"there is no archive {unknown[0]!r} in this release: allowed are {', '.join(known)}")
    storage.ensure_writable(root)
    for name in archives:
        archive = known[name]
        if _is_unpacked(root, archive):
            continue
        place = os.path.join(root, archive.name)
        if os.path.exists(place):
            _check(place, archive, place)
        else:
            if say is not None:
                say(f"fetching {archive.name} ({archive.bytes / 1e6:,.1f} MB) from {base}")
            _download(base, archive, place)
        _unpack(root, archive, place)
        if not keep_archives:
            storage.delete(place)
    return os.path.join(root, V3)


def _stamp_of(root: str, archive: Archive) -> str:
    return os.path.join(root, V3, f".{archive.name}.json")


def _is_unpacked(root: str, archive: Archive) -> bool:
    stamp = _stamp_of(root, archive)
    if not os.path.exists(stamp):
        return False
    with reading(stamp, "remove it: the archive is then unpacked anew"):
        said = parse_object(storage.read_bytes(stamp))
        if said["md5"] != archive.md5 or set(said["files"]) != set(archive.files):
            return False
        places = {os.path.join(root, name): size for name, size in said["files"].items()}
    return all(os.path.isfile(place) and os.path.getsize(place) == size for place, size in places.items())


def _unpack(root: str, archive: Archive, place: str) -> None:
    """Take the expected regular files out, each under its own name, and nothing else."""
    sizes: dict[str, int] = {}
    try:
        with tarfile.open(place, "r:*") as tar:
            for info in tar:
                name = posixpath.normpath(info.name)
                if not info.isreg() or name not in archive.files or name in sizes:
                    continue
                body = tar.extractfile(info)
                if body is None:
                    continue
                with storage.replacing(os.path.join(root, name)) as temporary, open(temporary, "wb") as out:
                    shutil.copyfileobj(body, out, _PIECE)
                sizes[name] = info.size
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{place} cannot be unpacked ({error}): delete it and fetch it again") from error
    absent = [name for name in archive.files if name not in sizes]
    if absent:
        raise DataError(f"{place} holds no {absent[0]}: it is no {archive.name} of Open Images V3, delete it")
    storage.write_bytes(_stamp_of(root, archive), json.dumps({"md5": archive.md5, "files": sizes}).encode())


def _check(place: str, archive: Archive, source: str) -> None:
    """Raises DataError where the file has not the archive's size and MD5."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with open(place, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    if (size, digest.hexdigest()) != (archive.bytes, archive.md5):
        raise DataError(_wrong(source, archive, f"{size:,} bytes with MD5 {digest.hexdigest()}"))


def _wrong(source: str, archive: Archive, found: str) -> str:
    return (
        f"{source} is not {archive.name} of the release: expected {archive.bytes:,} bytes with MD5 {archive.md5}, "
        f"found {found}: delete what is wrong, or name another source"
    )


def _download(base: str, archive: Archive, place: str) -> None:
    partial = place + ".part"
    source = _find(base, archive)
    failures = 0
    while (have := os.path.getsize(partial) if os.path.exists(partial) else 0) != archive.bytes:
        if have > archive.bytes:
            os.unlink(partial)
            raise DataError(_wrong(source, archive, f"{have:,} bytes or more"))
        try:
            _append(source, archive, partial, have)
        except Unreachable as error:
            grew = os.path.exists(partial) and os.path.getsize(partial) > have
            failures = 1 if grew else failures + 1
            if failures >= _TRIES:
                raise StorageError(
                    error.errno,
                    f"{error.strerror}; {have:,} of {archive.bytes:,} bytes are there after {_TRIES} more tries: "
                    "make the same call again to go on from there",
                ) from error
            time.sleep(wait_seconds(failures - 1, 0.5))
    try:
        _check(partial, archive, source)
    except DataError:
        os.unlink(partial)
        raise
    os.replace(partial, place)


def _append(source: str, archive: Archive, partial: str, have: int) -> None:
    """Add to the partial file what follows its `have` bytes."""
    try:
        if source.startswith(("http://", "https://")):
            _append_web(source, archive, partial, have)
        else:
            _append_stored(source, archive, partial, have)
    except (StorageError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {partial!r}: {error}: free some space there") from error


def _append_web(url: str, archive: Archive, partial: str, have: int) -> None:
    with opened(url, headers={"Range": f"bytes={have}-"} if have else {}) as answer:
        if answer.status in LATER:
            raise Unreachable(0, f"{url} answered {answer.status}")
        if answer.status not in (200, 206, 416):
            raise StorageError(0, f"{url} answered {answer.status}: mend the address, or fetch the file yourself")
        # Content-Range is `bytes 5-99/100`, or `bytes */100` where the file has no such bytes.
        span, _, total = answer.headers.get("Content-Range", "").partition("/")
        if answer.status == 200:
            total = answer.headers.get("Content-Length", "")
        if total.isdigit() and int(total) != archive.bytes:
            raise DataError(_wrong(url, archive, f"{int(total):,} bytes"))
        begins = have if answer.status == 206 and span.startswith(f"bytes {have}-") else 0
        if answer.status != 200 and begins != have:
            raise StorageError(0, f"{url} answered {answer.status} to a request for its bytes from {have}: try again")
        with open(partial, "r+b" if begins else "wb") as out:
            out.seek(begins)
            for piece in pieces(answer, url):
                out.write(piece)
                if out.tell() > archive.bytes:
                    return


def _append_stored(path: str, archive: Archive, partial: str, have: int) -> None:
    size = storage.size_of(path)
    if size != archive.bytes:
        raise DataError(_wrong(path, archive, f"{size:,} bytes"))
    with open(partial, "ab") as out:
        for start in range(have, size, _PIECE):
            out.write(storage.read_range(path, start, min(_PIECE, size - start)))


def _find(base: str, archive: Archive) -> str:
    if base.startswith(("http://", "https://")):
        return f"{base.rstrip('/')}/{V3}/{archive.name}"
    for place in (storage.join(base, V3, archive.name), storage.join(base, archive.name)):
        if storage.exists(place):
            return place
    raise DataError(f"{base} holds neither {V3}/{archive.name} nor {archive.name}: name the folder that holds it")


@dataclass(frozen=True)
class ReleaseFiles:
    """The files of one split of a release, and of its classes."""

    annotations: str
    """Human-verified image-level labels: `ImageID,Source,LabelName,Confidence`."""
    classes: str
    """The trainable classes, one MID a line."""
    descriptions: str | None
    """MID and name; None where the folder has none, so that classes are named by their MIDs."""
    images: str | None
    """The image list with the original addresses; None where the folder has none (only `flickr_parts` needs it)."""


_LABELS = "annotations-human-imagelabels.csv"
_KINDS = ("annotations", "classes", "descriptions", "images")


def _paths_of(split: str) -> dict[str, dict[str, str]]:
    """version -> kind -> path below BASE. Later releases share files with earlier ones."""
    train = split == "train"
    listed = f"{split}-images-with-{'labels-with-' if train else ''}rotation.csv"
    short = "val" if split == "validation" else split
    own = {
        "v3": (f"{V3}/{split}/annotations-human.csv", f"{V3}/", f"{V3}/{split}/images.csv"),
        "v4": (f"2018_04/{split}/{split}-{_LABELS}", "2018_04/", f"2018_04/{split}/{listed}"),
        "v5": (f"v5/{split}-{_LABELS}", "v5/", f"v5/{listed}" if train else f"2018_04/{split}/{listed}"),
        "v6": (f"v6/oidv6-{split}-{_LABELS}" if train else f"v5/{split}-{_LABELS}", "v6/oidv6-", ""),
        "v7": (f"v7/oidv7-{short}-{_LABELS}", "v7/oidv7-", ""),
    }
    newest = f"v6/oidv6-{listed}" if train else f"2018_04/{split}/{listed}"
    return {
        version: {
            "annotations": annotations,
            "classes": f"{prefix}classes-trainable.txt",
            "descriptions": f"{prefix}class-descriptions.csv",
            "images": images or newest,
        }
        for version, (annotations, prefix, images) in own.items()
    }


VERSIONS = tuple(_paths_of("train"))


def find_release_files(folder: str, split: str, version: str | None = None) -> ReleaseFiles:
    """The files of a release that lie in `folder` (local or S3), under their names on the server.

    They may lie in the server's folders, in folders named by split, or side by side. split: train, validation or
    test; version: v3 to v7, needed only where the folder holds several releases. Raises DataError that says which
    file is absent and where it comes from.
    """
    if split not in SPLITS:
        raise DataError(f"{split!r} is no split of Open Images: allowed are {', '.join(SPLITS)}")
    if version is not None and version not in VERSIONS:
        raise DataError(f"{version!r} is no release of Open Images known here: allowed are {', '.join(VERSIONS)}")
    paths = {known: kinds for known, kinds in _paths_of(split).items() if version in (None, known)}
    places = {path: _place_in(folder, path, split) for path in {p for kinds in paths.values() for p in kinds.values()}}
    found = {known: [places[kinds[kind]] for kind in _KINDS] for known, kinds in paths.items()}
    whole = [files for files in found.values() if files[0] and files[1]]
    if len({(files[0], files[1]) for files in whole}) > 1:
        named = ", ".join(known for known, files in found.items() if files in whole)
        raise DataError(f"{folder} holds the files of several releases ({named}) for {split!r}: say which, by version")
    if not whole:
        raise DataError(_absent(folder, split, paths, found))
    descriptions, images = (next((files[kind] for files in whole if files[kind]), None) for kind in (2, 3))
    return ReleaseFiles(str(whole[0][0]), str(whole[0][1]), descriptions, images)


def _place_in(folder: str, path: str, split: str) -> str | None:
    """Where a file of the server lies below `folder`, if it does."""
    below, name = path.split("/", 1)[1], posixpath.basename(path)
    candidates = [path, below, f"{split}/{name}"]
    if split in name or "-val-" in name or name.endswith(("classes-trainable.txt", "class-descriptions.csv")):
        candidates.append(name)
    return next((place for c in candidates if storage.exists(place := storage.join(folder, c))), None)


def _absent(
    folder: str, split: str, paths: Mapping[str, Mapping[str, str]], found: Mapping[str, Sequence[str | None]]
) -> str:
    started = [known for known, files in found.items() if files[0]] or [
        known for known, files in found.items() if files[1]
    ]
    if not started:
        names = ", ".join(dict.fromkeys(kinds["annotations"] for kinds in paths.values()))
        return (
            f"{folder} holds no annotations of {split!r}: looked for {names}. fetch_release fetches those of V3; "
            f"the others lie below {BASE}"
        )
    version = started[-1]
    kind = "classes" if found[version][0] else "annotations"
    path = paths[version][kind]
    origin = f"{BASE}/{path}"
    if version == "v3":
        origin = f"{BASE}/{V3}/{V3_ARCHIVES['classes' if kind == 'classes' else 'annotations_human'].name}"
    other = "its annotations are there" if kind == "classes" else "its class list is there"
    return f"{folder} holds no {posixpath.basename(path)} for {split!r} ({other}): fetch {origin}"
