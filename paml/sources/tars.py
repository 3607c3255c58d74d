"""Images in tar files, read from front to back, local or remote, plain or compressed.

Python's tarfile, and with it WebDataset, takes a damaged header for the end of the archive and silently drops the
rest. Here the end is checked and damage is reported.
"""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from paml import storage
from paml.errors import DataError
from paml.parsing import PARSE_ERRORS
from paml.sources.folder import is_image
from paml.sources.full import list_inputs
from paml.sources.matching import file_key
from paml.sources.parts import MAX_IMAGE_BYTES, KeyRule, Part, Payload, fingerprint
from paml.storage import StorageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 14
"""Of one header with a long name or extra fields; names have at most 4,096 bytes."""
_MAX_DIGITS = re.compile(rb"\d{256}")
"""Python before 3.11.10 and 3.12.6 takes quadratic time for a run of digits in a header."""
_MAX_RATIO, _FREE_BYTES = 200, 64 << 20
"""A compressed archive may unpack to this many times its size plus so many bytes: images hardly compress."""
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_COMPRESSIONS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)


class TarDamage(DataError):
    """A tar file that is truncated or has damaged headers: the members after that position are lost."""


class BadMember(DataError):
    """A member that cannot be an image; the members after it can be read."""


class Member(NamedTuple):
    """A regular file of a tar archive."""

    name: str
    offset: int
    """Of its first byte within the uncompressed archive."""
    size: int
    read: Callable[[], bytes]
    """Its bytes; call it before advancing to the next member. Raises TarDamage and BadMember."""


class _BoundedFile:
    """The archive's file as tarfile reads it, with limits on header and unpacked sizes."""

    def __init__(self, file: Any, max_bytes: int | None) -> None:
        self._file, self._max_bytes = file, max_bytes
        self.in_header = False

    @contextlib.contextmanager
    def header(self) -> Iterator[None]:
        """While a header is read. Raises tarfile.ReadError for an invalid one."""
        self.in_header = True
        try:
            yield
        except _DAMAGE:
            raise
        except PARSE_ERRORS as error:  # also headers that nest deeper than Python's recursion limit
            raise tarfile.ReadError(f"an invalid header ({type(error).__name__})") from error
        finally:
            self.in_header = False

    def read(self, size: int = -1) -> bytes:
        if self.in_header and not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes, allowed are {_MAX_HEADER_BYTES:,}")
        data = self._file.read(size)
        if self.in_header and size > _BLOCK and _MAX_DIGITS.search(data):
            raise tarfile.ReadError("a header with a number of 256 digits or more")
        self._check_size(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset < 1 << 62:
            raise tarfile.ReadError(f"a header points to byte {offset}")
        self._check_size(offset)
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def _check_size(self, offset: int) -> None:
        if self._max_bytes is not None and offset > self._max_bytes:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_RATIO} times its size")


def list_tars(paths: Paths) -> list[str]:
    """Tar files of one or several paths; a folder stands for all tar files below it, sorted.

    Raises DataError if a path does not exist or a folder has none.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    tars: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if path.endswith(TAR_SUFFIXES) and storage.exists(path):
            tars.append(path)
            continue
        names = [name for name in list_inputs(path) if name.endswith(TAR_SUFFIXES)]
        if not names:
            raise DataError(f"{path} is not a tar file, and not a folder with tar files ({', '.join(TAR_SUFFIXES)})")
        tars.extend(storage.join(path, name) for name in names)
    return tars


def walk_tar(file: io.BufferedIOBase, path: str, *, unpack: bool = True) -> Iterator[Member]:
    """The regular files of an open, seekable tar archive, in its order; `path` is for messages.

    Skips folders, links and devices. Raises TarDamage, after all members before the damage, if the archive is
    truncated, a header is damaged, or it unpacks to more than 200 times its size; without `unpack`, also if it is
    compressed.
    """
    last, last_offset = "its beginning", -1
    try:
        bounded = _open_archive(file, path, unpack)
        with bounded.header():
            tar: Any = tarfile.TarFile(fileobj=cast(Any, bounded))
        with tar:
            while True:
                with bounded.header():
                    info = tar.next()
                if info is None:
                    break
                tar.members = []  # tarfile would keep them all in memory
                if info.size < 0 or info.offset <= last_offset:
                    raise tarfile.ReadError(f"a header of {info.size} bytes at byte {info.offset}")
                last_offset = info.offset
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size, partial(_read_member, bounded, info, path))
                last = repr(info.name)
            end = tar.offset
            bounded.seek(end)
            block = bounded.read(_BLOCK)
            # the end mark is the last thing in a valid archive; data after it means that a header was zeroed
            rest = iter(partial(bounded.read, 1 << 20), b"")
            zero_to_the_end = all(data.count(0) == len(data) for data in itertools.chain([block], rest))
    except (*_DAMAGE, OSError) as error:
        if _is_storage_error(error):
            raise
        reason = str(error).split(":\n")[0]
        raise TarDamage(f"{path} is not a tar file, or is truncated or damaged after {last}: {reason}") from error
    if len(block) < _BLOCK:
        raise TarDamage(f"{path} is truncated at byte {end + len(block)}, after {last}: it has no end mark")
    if not zero_to_the_end:
        raise TarDamage(f"{path} has a damaged header at byte {end}, after {last}: the rest is lost")


def _open_archive(file: Any, path: str, unpack: bool) -> _BoundedFile:
    """The archive, decompressed if necessary."""
    magic = file.read(_BLOCK)
    file.seek(0)
    if magic[257:262] == b"ustar":  # a member's name may start like a compressed file
        return _BoundedFile(file, None)
    decompress = next((decompress for prefix, decompress in _COMPRESSIONS if magic.startswith(prefix)), None)
    if decompress is None:
        return _BoundedFile(file, None)
    if not unpack:
        raise TarDamage(f"{path} is compressed: its images cannot be read by offset: unpack it first")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _BoundedFile(decompress(file), _FREE_BYTES + _MAX_RATIO * size)


def _is_storage_error(error: BaseException) -> bool:
    """Whether the disk or network failed; bz2 reports bad data as an OSError too, but without a number."""
    return isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None


def _read_member(bounded: _BoundedFile, info: tarfile.TarInfo, path: str) -> bytes:
    if info.issparse():
        raise BadMember(f"{info.name!r} in {path} is a sparse file, which no image is: pack it again")
    if info.size > MAX_IMAGE_BYTES:
        raise BadMember(
            f"{info.name!r} in {path} has {info.size:,} bytes, allowed are {MAX_IMAGE_BYTES:,} per image: leave it out"
        )
    try:
        bounded.seek(info.offset_data)
        data = bounded.read(info.size)
    except (*_DAMAGE, OSError) as error:
        if _is_storage_error(error):
            raise
        raise TarDamage(f"{path} is truncated or damaged in {info.name!r}: {error}") from error
    if len(data) < info.size:
        raise TarDamage(f"{path} is truncated in {info.name!r}: it has {len(data)} of {info.size} bytes")
    return data


def open_tar(path: str) -> io.BufferedReader:
    """A tar file as a buffered stream, with large reads if it is remote."""
    if storage.is_remote(path):
        return io.BufferedReader(cast(io.RawIOBase, storage.open_input(path)), 8 << 20)
    return io.BufferedReader(io.FileIO(path), 1 << 20)


def tar_parts(paths: Paths, keys: KeyRule = "name") -> list[Part]:
    """Tar files, local or remote, plain or compressed, one per part; a folder stands for all tar files below it.

    Images are in the order of the archive; keys are those of files in a folder. Raises DataError as `list_tars`.
    """
    return [tar_part(path, partial(_image_key, keys), keys) for path in list_tars(paths)]


def tar_part(path: str, key_of_member: Callable[[str], str | None], rule: str) -> Part:
    """The images of one tar file: the members that have a key.

    rule: identifies `key_of_member`, for the part's name. A damaged tar file yields the images before the damage and
    then (its path, the TarDamage), which ends up among the rejects.
    """
    size = storage.size_of(path)
    name = f"{os.path.basename(path)}-{fingerprint([path, str(size), rule])}"
    return Part(name, partial(_read_images, path, key_of_member), bytes=size)


def _image_key(rule: KeyRule, name: str) -> str | None:
    return file_key(name, rule) if is_image(name) else None


def _read_images(path: str, key_of_member: Callable[[str], str | None]) -> Iterator[tuple[str, Payload]]:
    try:
        with open_tar(path) as file:
            file.peek(_BLOCK)  # tarfile would report an error of its first read as an invalid tar file
            for member in walk_tar(file, path):
                if (key := key_of_member(member.name)) is not None:
                    try:
                        payload: Payload = member.read()
                    except BadMember as error:
                        payload = error
                    yield key, payload
    except TarDamage as damage:
        yield path, damage
    except (StorageError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path!r} to its end: {error}: try again") from error


def tar_keys(paths: Paths, keys: KeyRule = "name") -> list[str]:
    """The keys of the images in tar files, from their headers; damage ends the list of that file."""
    found: list[str] = []
    for path in list_tars(paths):
        with contextlib.suppress(TarDamage), open_tar(path) as file:
            found.extend(file_key(member.name, keys) for member in walk_tar(file, path) if is_image(member.name))
    return found
