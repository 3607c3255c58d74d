"""Parse untrusted files: each read returns the content or raises one clear error."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from paml import storage
from paml.errors import DataError, PamlError, StorageError

PARSE_ERRORS = (
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
"""Errors that parsing code raises for content of the wrong shape."""


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for a text that is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(data: bytes | str) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError for any other value."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def parse_errors_as(
    path: str, hint: str, error: type[Exception] = DataError, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Convert parse errors in the block to `error`, with the file's path and a hint how to fix it.

    also: further exceptions to convert, such as those of a library. PamlErrors pass unchanged.
    """
    try:
        yield
    except (PamlError, FileNotFoundError):
        raise
    except (*PARSE_ERRORS, *also) as cause:
        detail = " ".join(str(cause).split())[:300]
        raise error(f"{path} is damaged or has another format ({type(cause).__name__}: {detail}): {hint}") from cause


def read_json(path: str, hint: str, error: type[Exception] = DataError) -> dict[str, Any]:
    """The JSON object in a file, local or s3://. Raises `error`, FileNotFoundError or StorageError."""
    data = storage.read_bytes(path)
    with parse_errors_as(path, hint, error):
        return parse_json_object(data)


def safe_join(root: str, name: Any) -> str:
    """`root` joined with a relative path from an untrusted file. Raises ValueError for a path outside of `root`."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or storage.is_remote(name):
        raise ValueError(f"{name!r} is not a file name")
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not a path below its folder")
    return storage.join(root, name)


def open_no_follow(path: str, flags: int, mode: int = 0o666) -> int:
    """A descriptor of the regular file at `path`, without following a link; for files in a cache.

    Raises StorageError (ELOOP) for a link or anything but a regular file, and otherwise the errors of os.open.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        raise _planted_file_error(path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _planted_file_error(path)
    return handle


def check_not_symlink(path: str) -> None:
    """Raises StorageError if `path` is a link."""
    if os.path.islink(path):
        raise _planted_file_error(path)


def _planted_file_error(path: str) -> StorageError:
    return StorageError(
        errno.ELOOP,
        f"{path} is a link or not a regular file; the cache does not create those: remove it, and use a cache folder "
        "that only you can write to",
    )
