"""Files that anybody may have written: reading one ends in its content or in one clear error, whatever it holds."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, PamlError

MISSHAPEN = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    RecursionError,
    pa.ArrowException,
)
"""What code raises that takes content apart which is not of the shape that it was written in."""

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may take a picture for. It knows forty more, some of which start programs (EPS) or read other files."""
MAX_PIXELS = 1 << 27
"""Pixels of a picture that training and prediction decode."""
MAX_SCANS = 500
"""Of a JPEG: progressive ones have about ten."""


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for one that is nested too deeply to be read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The object (names to values) of a JSON text. Raises ValueError for any other."""
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not names and values")
    return found


@contextlib.contextmanager
def reading(
    path: str, mend: str, error: type[Exception] = DataError, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what misshapen content raises in the block into `error`, which names the file and says how to mend it.

    also: what else stands for such content, as libraries' own exceptions. Errors of paml and of storage pass.
    """
    try:
        yield
    except (PamlError, storage.StorageError, FileNotFoundError):
        raise
    except (*MISSHAPEN, *also) as fault:
        from paml.labels.states import LabelError  # labels read by this module, too

        if isinstance(fault, LabelError):
            raise
        said = " ".join(str(fault).split())[:300]
        raise error(f"{path} is damaged, or another kind of file ({type(fault).__name__}: {said}): {mend}") from fault


def read_facts(path: str, mend: str, error: type[Exception] = DataError) -> dict[str, Any]:
    """The JSON object in a file, local or s3://. Raises `error`, and FileNotFoundError or StorageError."""
    data = storage.read_bytes(path)
    with reading(path, mend, error):
        return parse_object(data)


def inside(root: str, name: Any) -> str:
    """The path of what a file names below `root`. Raises ValueError where it would lie elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or storage.is_remote(name):
        raise ValueError(f"{name!r} is no name of a file")
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} does not lie below its folder")
    return storage.join(root, name)


def open_own(path: str, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file that is itself at `path`, as caches of one's own hold it: no link is followed.

    Raises StorageError (ELOOP) for a link and for anything but a regular file, else what os.open raises.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        raise _not_own(path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_own(path)
    return handle


def own_folder(path: str) -> None:
    """Raises StorageError where the folder that is to be at `path` is a link to another place."""
    if os.path.islink(path):
        raise _not_own(path)


def scan_fault(data: bytes | memoryview) -> str | None:
    """What is wrong with a JPEG whose every few bytes cost the decoder a pass over all pixels; None for any other."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    read = np.frombuffer(data, np.uint8)  # bytes.count takes six times as long, a twentieth of a decode
    scans = np.count_nonzero((read[:-1] == 0xFF) & (read[1:] == 0xDA))
    return f"a JPEG of {scans:,} scans: more than {MAX_SCANS}" if scans > MAX_SCANS else None


def _not_own(path: str) -> storage.StorageError:
    return storage.StorageError(
        errno.ELOOP,
        f"{path} is a link or no regular file, and a cache follows none: somebody else put it there; remove it, and "
        "keep the cache in a folder that you alone may write to",
    )
