"""Images in tar files, read from front to back, local or remote, plain or compressed.

Python's tarfile, and with it stock WebDataset, takes a damaged header for the end of the archive and drops the
rest without a word; here the end is checked, and what was lost is reported.
"""

import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from paml import storage
from paml.errors import DataError
from paml.sources.folder import is_image, key_of
from paml.sources.parts import Part, Payload, mark_of, read_parts
from paml.storage import StorageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BLOCK = 512
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class TarDamage(DataError):
    """A tar file that is cut, or whose headers were changed: members after that place are lost."""


class Member(NamedTuple):
    """A regular file of a tar archive."""

    name: str
    offset: int
    """Of its first byte within the (unpacked) archive."""
    size: int
    read: Callable[[], bytes]
    """Its bytes; to be called before the next member is asked for."""


def list_tars(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Tar files of a path or several: a folder stands for all tar files below it, sorted.

    Raises DataError where a path does not exist or a folder holds none.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if path.endswith(TAR_SUFFIXES) and storage.exists(path):
            found.append(path)
            continue
        names = [name for name in storage.list_files(path) if name.endswith(TAR_SUFFIXES)]
        if not names:
            kinds = ", ".join(TAR_SUFFIXES)
            raise DataError(f"{path} is not a tar file, nor a folder that holds any ({kinds})")
        found.extend(storage.join(path, name) for name in names)
    return found


def walk_tar(file: io.BufferedIOBase, path: str) -> Iterator[Member]:
    """The regular files of an open tar archive, in its order; `path` is for messages.

    Raises TarDamage at the place where the archive is cut or a header is damaged, after all before it.
    """
    last = "its beginning"
    try:
        with tarfile.open(fileobj=cast(Any, file), mode="r:*") as archive:
            tar = cast(Any, archive)
            while (info := tar.next()) is not None:
                tar.members = []  # it would keep them all
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size, partial(_read, archive, info, path))
                last = repr(info.name)
            end = tar.offset
            tar.fileobj.seek(end)
            block = tar.fileobj.read(_BLOCK)
            clean = len(block) == _BLOCK and _all_zero(block) and _zero_to_the_end(tar.fileobj)
    except _DAMAGE as error:
        reason = str(error).split(":\n")[0]
        raise TarDamage(f"{path} is no tar file, or is cut or damaged after {last}: {reason}") from error
    if len(block) < _BLOCK:
        raise TarDamage(f"{path} is cut at byte {end + len(block)}, after {last}: it has no end mark")
    if not clean:
        raise TarDamage(f"{path} has a damaged header at byte {end}, after {last}: what follows is lost")


def _all_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def _zero_to_the_end(file: Any) -> bool:
    """An end mark is the last thing in a sound archive; data behind it means that a header was zeroed."""
    while data := file.read(1 << 20):
        if not _all_zero(data):
            return False
    return True


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> bytes:
    try:
        part = tar.extractfile(info)
        data = part.read() if part is not None else b""
    except _DAMAGE as error:
        raise TarDamage(f"{path} is cut or damaged in {info.name!r}: {error}") from error
    if len(data) < info.size:
        raise TarDamage(f"{path} is cut in {info.name!r}: {len(data)} of {info.size} bytes are there")
    return data


def open_tar(path: str) -> io.BufferedReader:
    """A tar file as a buffered stream, with large reads where it is remote."""
    if storage.is_remote(path):
        return io.BufferedReader(cast(io.RawIOBase, storage.open_input(path)), 8 << 20)
    return io.BufferedReader(io.FileIO(path), 1 << 20)


@dataclass(frozen=True)
class TarPart:
    """One tar file. How many images it holds is not known before it is read."""

    name: str
    path: str
    bytes: int | None
    images: None = None

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        try:
            with open_tar(self.path) as file:
                file.peek(_BLOCK)  # tarfile takes an error of its first read for a file that is no tar
                for member in walk_tar(file, self.path):
                    if is_image(member.name):
                        yield key_of(member.name), member.read()
        except TarDamage as damage:
            yield self.path, damage
        except (StorageError, FileNotFoundError):
            raise
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path!r} to its end: {error}: try again") from error


def tar_parts(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Part]:
    """Tar files, local or remote, plain or compressed, one a part; a folder stands for all that lie below it.

    Its images are given in its order, the key being the member's name without folders and suffix. A damaged tar
    file gives what lies before the damage and then one pair (its path, the TarDamage), so that it is reported
    among the rejects. Raises DataError as `list_tars`.
    """
    parts: list[Part] = []
    for path in list_tars(paths):
        size = storage.size_of(path)
        parts.append(TarPart(f"{os.path.basename(path)}-{mark_of([path, str(size)])}", path, size))
    return parts


def iter_tars(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, Payload]]:
    """(key, payload) of each image in tar files, one file after the other, as `tar_parts` gives them."""
    return read_parts(tar_parts(paths))


def count_tars(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> int:
    """Number of images in tar files, from their headers; damage ends the count of that file."""
    count = 0
    for path in list_tars(paths):
        try:
            with open_tar(path) as file:
                for member in walk_tar(file, path):
                    count += is_image(member.name)
        except TarDamage:
            continue
    return count
