"""One way to files on a local disk and in S3: a path is a str, either local or `s3://bucket/key`.

Local files are written to a temporary file beside the target, flushed to the disk and renamed, so that a
reader sees the whole file or none. S3 is reached by boto3 (`paml.s3`), since pyarrow's time-outs cannot be set on
Linux; its requests are bounded and repeated by PAML_S3_* (see `paml.s3.S3Limits`). Region, keys and end point come
from the usual AWS variables (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for other servers); without keys, access
is anonymous.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from types import ModuleType

import pyarrow as pa
import pyarrow.fs as pafs

_TEMPORARY = ".paml-tmp"
_MULTIPART_BYTES = 64 << 20
_MAX_ATTEMPTS = 6
_CONNECTIONS = 64  # botocore keeps 10, and makes new ones for every further thread's request
_PAGE_KEYS = 1000


class StorageError(OSError):
    """Storage that cannot be used: the message names the path, the reason and how to mend it."""


class TooLargeError(StorageError):
    """A file of more bytes than its reader takes."""


_REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is larger than this disk or its limits allow: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may use, or change its permissions",
    errno.EPERM: "operation not permitted: choose a folder that you may use, or change its permissions",
    errno.EROFS: "the file system is read-only: choose a folder on a writable one",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another folder or move that file away",
    errno.EISDIR: "this is a folder, not a file: name a file in it",
    errno.EIO: "the disk reports an input/output error: check it, or choose another one",
    errno.ENOTCONN: "the mounted storage is not connected: mount it again",
    errno.ESTALE: "the mounted storage has gone stale: mount it again",
}


@contextlib.contextmanager
def _clear_errors(doing: str, path: str) -> Iterator[None]:
    """Turn the operating system's errors into StorageError; a missing file stays FileNotFoundError."""
    try:
        yield
    except (StorageError, FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise StorageError(error.errno, f"cannot {doing} {path!r}: {error}") from error
        raise StorageError(error.errno, f"cannot {doing} {path!r}: {reason}") from error


def _s3() -> ModuleType:
    """`paml.s3`, which takes boto3 in and is loaded where it is needed."""
    from paml import s3

    return s3


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` lies in S3."""
    return os.fspath(path).startswith("s3://")


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """`root` and `parts` with one slash between; an absolute part is refused, since it would leave the root."""
    if any(part.startswith("/") or is_remote(part) for part in parts):
        raise StorageError(errno.EINVAL, f"cannot join {parts!r} to {os.fspath(root)!r}: a part must be relative")
    named = [part.strip("/") for part in parts if part.strip("/")]
    base = os.fspath(root)
    if is_remote(base):
        return "/".join([base.rstrip("/"), *named])
    return os.path.join(base, *named)


def exists(path: str) -> bool:
    """Whether a file (not a folder) lies at `path`."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        _s3().head(path)
    except FileNotFoundError:
        return False
    return True


def size_of(path: str) -> int:
    """Size of the file in bytes. Raises FileNotFoundError where there is none."""
    if is_remote(path):
        return _s3().head(path).size
    with _clear_errors("read", path):
        return os.stat(path).st_size


def read_bytes(path: str, most: int | None = None) -> bytes:
    """The whole file. Raises FileNotFoundError or StorageError.

    With `most` (bytes) TooLargeError for a file of more, and for a pipe or a device, which may have no end.
    """
    if is_remote(path):
        return _s3().read_object(path, most=most)
    if most is None:
        with _clear_errors("read", path), open(path, "rb") as file:
            return file.read()
    with _clear_errors("read", path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            what = f"has {about.st_size:,} bytes, more than" if stat.S_ISREG(about.st_mode) else "is no file of at most"
            raise TooLargeError(errno.EFBIG, f"{path!r} {what} {most:,} bytes: take it away, or make it smaller")
        return file.read(about.st_size)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` (both in bytes). Raises StorageError where the file ends before."""
    if offset < 0 or size < 0:
        raise StorageError(errno.EINVAL, f"cannot read {path!r} at {offset} for {size} bytes: both must be >= 0")
    if size == 0:
        return b""
    if is_remote(path):
        data = _s3().read_object(path, offset, size)
    else:
        with _clear_errors("read", path), open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise StorageError(
            errno.EIO,
            f"{path!r} ends early: asked for {size} bytes at {offset}, got {len(data)}: fetch or make it again",
        )
    return data


def write_bytes(path: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write the whole file at once: a reader sees all of it or nothing.

    With `if_absent` the write fails with FileExistsError where `path` exists, and of several writers just one
    succeeds. Folders are made as needed. Raises StorageError; the size is checked after the write.
    """
    if is_remote(path):
        _s3().write_object(path, data, if_absent=if_absent)
        return
    with replacing(path, if_absent=if_absent) as temporary, open(temporary, "wb") as file:
        file.write(data)


def _check_size(path: str, expected: int) -> None:
    found = size_of(path)
    if found != expected:
        raise StorageError(
            errno.EIO,
            f"{path!r} holds {found} bytes after a write of {expected}: write it again on sound storage",
        )


@contextlib.contextmanager
def replacing(path: str, *, if_absent: bool = False) -> Iterator[str]:
    """A local path to write to; when the block ends well the file moves to `path`, when it fails it vanishes.

    For a local `path` the file lies beside it and is flushed and renamed; for S3 it is uploaded. `if_absent` as
    in `write_bytes`.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="paml-") as folder:
            temporary = os.path.join(folder, "file")
            with _clear_errors("write", temporary):
                yield temporary
            upload(temporary, path, if_absent=if_absent)
        return
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}{_TEMPORARY}")
    with _clear_errors("write", path):
        _make_folder(folder)
        _check_name(folder, name)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            if if_absent:
                os.link(temporary, path)
                os.unlink(temporary)
            else:
                os.replace(temporary, path)
            _flush_folder(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _check_size(path, size)


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "a file has this name", folder) from error


def _check_name(folder: str, name: str) -> None:
    """Fail before the work, not after it, where the name itself is refused."""
    with contextlib.suppress(FileNotFoundError):
        os.lstat(os.path.join(folder, name))


def _flush_folder(folder: str) -> None:
    """Make the rename itself survive a power cut, where the file system can flush folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def upload(local: str, path: str, *, if_absent: bool = False) -> None:
    """Copy a local file to `path` (local or S3), whole or not at all; the size is checked."""
    if not is_remote(path):
        with replacing(path, if_absent=if_absent) as temporary:
            shutil.copyfile(local, temporary)
        return
    with _clear_errors("read", local):
        _s3().upload_file(local, path, if_absent=if_absent)


def copy_to_local(path: str, local: str) -> None:
    """Copy `path` to the local file `local`, whole or not at all; the size is checked."""
    with replacing(local) as temporary:
        if is_remote(path):
            expected = _s3().download_file(path, temporary)
        else:
            expected = size_of(path)
            shutil.copyfile(path, temporary)
    _check_size(local, expected)


def local_copy(path: str, *, again: bool = False) -> str:
    """A local path with the content of `path`: itself where it is local, else a file in the user's cache.

    The cached file is used again as long as the object's ETag and size stay as they were, unless `again` asks for
    a new copy. The cache is `$PAML_CACHE`, else `$XDG_CACHE_HOME/paml`, else `~/.cache/paml`.
    """
    if not is_remote(path):
        return path
    about = _s3().head(path)
    mark = f"{_s3().endpoint()} {path} {about.etag} {about.size}"
    cached = os.path.join(cache_folder(), hashlib.sha256(mark.encode()).hexdigest()[:32] + "-" + path.split("/")[-1])
    if again or os.path.islink(cached) or not exists(cached):  # a link is none of this cache's: it is replaced
        copy_to_local(path, cached)
    return cached


def cache_folder() -> str:
    """Where copies of remote files are kept on this machine."""
    own = os.environ.get("PAML_CACHE")
    return own or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "paml")


def open_input(path: str) -> pa.NativeFile:
    """The file opened for reading, seekable; the caller closes it. Raises FileNotFoundError or StorageError."""
    with _clear_errors("read", path):
        if is_remote(path):
            return pa.PythonFile(_s3().ObjectReader(path), mode="r")
        return pafs.LocalFileSystem().open_input_file(path)


def list_files(folder: str) -> list[str]:
    """Names of all files under `folder`, relative to it, with '/' between parts, sorted; [] where it is missing.

    Files of writes that were cut off are left out.
    """
    if is_remote(folder):
        return [name for name, _ in _list_objects(folder)]
    names = []
    with _clear_errors("list", folder):
        for where, _, files in os.walk(folder, onerror=_raise_unless_missing):
            base = os.path.relpath(where, folder)
            names += [name if base == "." else f"{base}/{name}" for name in files if not name.endswith(_TEMPORARY)]
    return sorted(name.replace(os.sep, "/") for name in names)


def list_sizes(folder: str) -> list[tuple[str, int]]:
    """(name, bytes) of the files that `list_files` names, in its order; in S3 the listing itself tells the sizes."""
    if is_remote(folder):
        return _list_objects(folder)
    return [(name, size_of(os.path.join(folder, name))) for name in list_files(folder)]


def _list_objects(folder: str) -> list[tuple[str, int]]:
    root = folder.rstrip("/") + "/"
    prefix = _s3().bucket_and_key(root)[1]
    found = [(key[len(prefix) :], size) for key, size in _s3().list_objects(root)]
    return sorted(entry for entry in found if entry[0])


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def delete(path: str) -> None:
    """Remove one file; nothing happens where there is none."""
    if is_remote(path):
        _s3().delete_object(path)
        return
    with _clear_errors("delete", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def delete_folder(folder: str) -> None:
    """Remove a folder and all under it; nothing happens where there is none. A whole bucket is refused."""
    if is_remote(folder):
        _, prefix = _s3().bucket_and_key(folder.rstrip("/"))
        if not prefix:
            raise StorageError(errno.EINVAL, f"will not delete the whole bucket {folder!r}: name a folder in it")
        _s3().delete_objects(folder, [f"{prefix}/{name}" for name in list_files(folder)])
        return
    with _clear_errors("delete", folder), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def ensure_writable(folder: str) -> None:
    """Write and remove a small file in `folder`, which is made if needed.

    Raises StorageError with the folder, the reason and how to mend it, so that a job fails at its start and not
    at its first checkpoint.
    """
    probe = join(folder, f".{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        write_bytes(probe, b"paml" * 1024)
        delete(probe)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, str(error.strerror or error))
        raise StorageError(error.errno, f"the folder {folder!r} is not writable: {reason}") from error


def sha256_of(path: str) -> tuple[str, int]:
    """SHA-256 (hex) of a file and its size in bytes, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with _clear_errors("read", path), open_input(path) as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size
