"""Images in tar files, read from front to back, local or remote, plain or compressed.

Python's tarfile, and with it stock WebDataset, takes a damaged header for the end of the archive and drops the
rest without a word; here the end is checked, and what was lost is reported.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from paml import storage
from paml.errors import DataError
from paml.reading import MISSHAPEN
from paml.sources.folder import is_image, key_of
from paml.sources.parts import MAX_IMAGE_BYTES, Part, Payload, mark_of, read_parts
from paml.storage import StorageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 14
"""Of one header with a long name or further fields; names have 4,096 bytes at most."""
_MAX_DIGITS = re.compile(rb"\d{256}")
"""Python before 3.11.10 and 3.12.6 takes the square of the time for a run of digits in a header."""
_MAX_RATIO, _ANY_RATIO_BYTES = 200, 64 << 20
"""A packed archive may unpack to so many times its size, over and above so many bytes: images hardly shrink."""
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_PACKED: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)


class TarDamage(DataError):
    """A tar file that is cut, or whose headers were changed: members after that place are lost."""


class BadMember(DataError):
    """A member that cannot be an image; what follows it can be read."""


class Member(NamedTuple):
    """A regular file of a tar archive."""

    name: str
    offset: int
    """Of its first byte within the (unpacked) archive."""
    size: int
    read: Callable[[], bytes]
    """Its bytes; to be called before the next member is asked for. Raises TarDamage and BadMember."""


class _Guard:
    """An open archive as tarfile reads it, with bounds on what a header may ask for and an archive unpack to."""

    def __init__(self, file: Any, most: int | None) -> None:
        self._file, self._most = file, most
        self.in_header = False

    @contextlib.contextmanager
    def header(self) -> Iterator[None]:
        """Of the reading of a header. Raises tarfile.ReadError for one that cannot be."""
        self.in_header = True
        try:
            yield
        except _DAMAGE:
            raise
        except MISSHAPEN as error:  # also headers that lead to headers, deeper than Python calls
            raise tarfile.ReadError(f"a header that cannot be ({type(error).__name__})") from error
        finally:
            self.in_header = False

    def read(self, size: int = -1) -> bytes:
        if self.in_header and not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes, where {_MAX_HEADER_BYTES:,} are allowed")
        data = self._file.read(size)
        if self.in_header and size > _BLOCK and _MAX_DIGITS.search(data):
            raise tarfile.ReadError("a header with a number of 256 digits or more")
        if self._most is not None and self._file.tell() > self._most:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_RATIO} times its size")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset < 1 << 62:
            raise tarfile.ReadError(f"a header leads to byte {offset}")
        if self._most is not None and offset > self._most:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_RATIO} times its size")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


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


def walk_tar(file: io.BufferedIOBase, path: str, *, unpack: bool = True) -> Iterator[Member]:
    """The regular files of an open, seekable tar archive, in its order; `path` is for messages.

    Folders, links and devices are passed over. Raises TarDamage at the place where the archive is cut or a header is
    damaged, after all before it, where it unpacks to more than 200 times its size, and, without `unpack`, where it is
    packed.
    """
    last, before = "its beginning", -1
    try:
        guard = _opened(file, path, unpack)
        with guard.header():
            tar: Any = tarfile.TarFile(fileobj=cast(Any, guard))
        with tar:
            while (info := _next(tar, guard)) is not None:
                tar.members = []  # it would keep them all
                if info.size < 0 or info.offset <= before:
                    raise tarfile.ReadError(f"a header of {info.size} bytes at byte {info.offset}")
                before = info.offset
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size, partial(_read, guard, info, path))
                last = repr(info.name)
            end = tar.offset
            guard.seek(end)
            block = guard.read(_BLOCK)
            clean = len(block) == _BLOCK and _all_zero(block) and _zero_to_the_end(guard)
    except (*_DAMAGE, OSError) as error:
        if _of_storage(error):
            raise
        reason = str(error).split(":\n")[0]
        raise TarDamage(f"{path} is no tar file, or is cut or damaged after {last}: {reason}") from error
    if len(block) < _BLOCK:
        raise TarDamage(f"{path} is cut at byte {end + len(block)}, after {last}: it has no end mark")
    if not clean:
        raise TarDamage(f"{path} has a damaged header at byte {end}, after {last}: what follows is lost")


def _opened(file: Any, path: str, unpack: bool) -> _Guard:
    """The archive, unpacked where it is packed."""
    mark = file.read(6)
    file.seek(0)
    unpacked = next((opened for sign, opened in _PACKED if mark.startswith(sign)), None)
    if unpacked is None:
        return _Guard(file, None)
    if not unpack:
        raise TarDamage(f"{path} is compressed: its images cannot be read by offset: unpack it first")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _Guard(unpacked(file), _ANY_RATIO_BYTES + _MAX_RATIO * size)


def _next(tar: Any, guard: _Guard) -> tarfile.TarInfo | None:
    with guard.header():
        return tar.next()


def _of_storage(error: BaseException) -> bool:
    """Whether the disk or the network failed, not what was read: bz2 says of bad data that it is an OSError."""
    return isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None


def _all_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def _zero_to_the_end(file: Any) -> bool:
    """An end mark is the last thing in a sound archive; data behind it means that a header was zeroed."""
    while data := file.read(1 << 20):
        if not _all_zero(data):
            return False
    return True


def _read(guard: "_Guard", info: tarfile.TarInfo, path: str) -> bytes:
    if info.issparse():
        raise BadMember(f"{info.name!r} in {path} is stored with holes, which no image has: pack it anew")
    if info.size > MAX_IMAGE_BYTES:
        raise BadMember(
            f"{info.name!r} in {path} has {info.size:,} bytes, and an image may have {MAX_IMAGE_BYTES:,}: leave it out"
        )
    try:
        guard.seek(info.offset_data)
        data = guard.read(info.size)
    except (*_DAMAGE, OSError) as error:
        if _of_storage(error):
            raise
        raise TarDamage(f"{path} is cut or damaged in {info.name!r}: {error}") from error
    if len(data) < info.size:
        raise TarDamage(f"{path} is cut or damaged in {info.name!r}: {len(data)} of {info.size} bytes are there")
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
                        yield key_of(member.name), _payload(member)
        except TarDamage as damage:
            yield self.path, damage
        except (StorageError, FileNotFoundError):
            raise
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.path!r} to its end: {error}: try again") from error


def _payload(member: Member) -> Payload:
    try:
        return member.read()
    except BadMember as error:
        return error


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
