"""Files on a local disk and in S3 through one interface: a path is a str, either local or `s3://bucket/key`.

Local files are written to a temporary file in the target's folder, flushed to the disk and renamed: a reader sees the
whole file or none. S3 is accessed with boto3, because pyarrow's timeouts cannot be set on Linux. The environment
variables PAML_S3_* set its timeouts and retries (see `paml.storage.s3_requests.S3Limits`). Region, keys and endpoint
come from the usual AWS variables (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for other servers). Without keys, access
is anonymous.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from paml.errors import StorageError, TooLargeError
from paml.storage import s3
from paml.storage.s3_requests import endpoint

_TEMPORARY_SUFFIX = ".paml-tmp"

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is exhausted: free some space or choose another folder",
    errno.EFBIG: "the file is larger than this disk or its limits allow: choose another folder",
    errno.EACCES: "permission denied: choose another folder, or change its permissions",
    errno.EPERM: "operation not permitted: choose another folder, or change its permissions",
    errno.EROFS: "the file system is read-only: choose a folder on another file system",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another folder, or move the file",
    errno.EISDIR: "this is a folder, not a file: give the path of a file",
    errno.EIO: "the disk reported an input/output error: check it, or choose another disk",
    errno.ENOTCONN: "the mounted storage is not connected: mount it again",
    errno.ESTALE: "the mounted storage is stale: mount it again",
}


@contextlib.contextmanager
def storage_errors(action: str, path: str) -> Iterator[None]:
    """Convert OSErrors to StorageError, except FileNotFoundError and FileExistsError."""
    try:
        yield
    except (StorageError, FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise StorageError(error.errno, f"cannot {action} {path!r}: {error}") from error
        raise StorageError(error.errno, f"cannot {action} {path!r}: {reason}") from error


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in S3."""
    return os.fspath(path).startswith("s3://")


def absolute_path(path: str | None, base: str) -> str | None:
    """A local path made absolute, relative to `base`; None and remote paths are unchanged."""
    if path is None or is_remote(path) or path.startswith(("http://", "https://")):
        return path
    return os.path.abspath(os.path.join(base, os.path.expanduser(path)))


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """`root` and `parts`, joined with slashes. Raises StorageError for an absolute part, which would leave the root."""
    if any(part.startswith("/") or is_remote(part) for part in parts):
        raise StorageError(errno.EINVAL, f"cannot join {parts!r} to {os.fspath(root)!r}: a part must be relative")
    named = [part.strip("/") for part in parts if part.strip("/")]
    base = os.fspath(root)
    if is_remote(base):
        return "/".join([base.rstrip("/"), *named])
    return os.path.join(base, *named)


def exists(path: str) -> bool:
    """Whether `path` is a file (not a folder)."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        s3.head(path)
    except FileNotFoundError:
        return False
    return True


def size_of(path: str) -> int:
    """Size of the file in bytes. Raises FileNotFoundError or StorageError."""
    if is_remote(path):
        return s3.head(path).size
    with storage_errors("read", path):
        return os.stat(path).st_size


def read_bytes(path: str, max_bytes: int | None = None) -> bytes:
    """The whole file. Raises FileNotFoundError or StorageError.

    With `max_bytes` raises TooLargeError for a larger file, and for a pipe or a device.
    """
    if is_remote(path):
        return s3.read_object(path, max_bytes=max_bytes)
    if max_bytes is None:
        with storage_errors("read", path), open(path, "rb") as file:
            return file.read()
    with storage_errors("read", path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise TooLargeError(errno.EFBIG, f"{path!r} is a pipe or a device: use a regular file")
        if status.st_size > max_bytes:
            raise TooLargeError(
                errno.EFBIG, f"{path!r} has {status.st_size:,} bytes; at most {max_bytes:,} are allowed: remove it"
            )
        return file.read(status.st_size)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` (both in bytes). Raises StorageError if the file is shorter."""
    if offset < 0 or size < 0:
        raise StorageError(errno.EINVAL, f"cannot read {size} bytes at {offset} of {path!r}: use 0 or more for both")
    if size == 0:
        return b""
    if is_remote(path):
        data = s3.read_object(path, offset, size)
    else:
        with storage_errors("read", path), open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise StorageError(
            errno.EIO,
            f"{path!r} is truncated: requested {size} bytes at {offset}, got {len(data)}: copy or create it again",
        )
    return data


def write_bytes(path: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write the file atomically: a reader sees all of it or nothing.

    With `if_absent` raises FileExistsError if `path` exists; exactly one of several writers succeeds. Creates folders
    as needed and checks the size afterwards. Raises StorageError.
    """
    if is_remote(path):
        s3.write_object(path, data, if_absent=if_absent)
        return
    with replacing(path, if_absent=if_absent) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str, *, if_absent: bool = False) -> Iterator[str]:
    """A temporary local path to write to. The file replaces `path` when the block ends, and is deleted if it fails.

    if_absent: as in `write_bytes`.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="paml-") as folder:
            temporary = os.path.join(folder, "file")
            with storage_errors("write", temporary):
                yield temporary
            copy(temporary, path, if_absent=if_absent)
        return
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    with storage_errors("write", path):
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "a file has this name", folder) from error
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # refuses an impossible name before any work is done
        try:
            yield temporary
            with open(temporary, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            if if_absent:
                _link_or_move(temporary, path)
            else:
                os.replace(temporary, path)
            _flush_folder(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        if (written := size_of(path)) != size:
            raise StorageError(errno.EIO, f"{path!r} has {written} bytes after a write of {size}: check the storage")


def _link_or_move(temporary: str, path: str) -> None:
    """Give a file its name. Raises FileExistsError if there is one of that name."""
    try:
        os.link(temporary, path)
        os.unlink(temporary)
    except OSError as error:  # mounted buckets and exFAT have no hard links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "xb"):
            pass
        os.replace(temporary, path)


def _flush_folder(folder: str) -> None:
    """Make the rename survive a power failure, if the file system can flush folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy(source: str, target: str, *, if_absent: bool = False) -> None:
    """Copy a file, local or in S3, to another path atomically, and check the size. if_absent: as in `write_bytes`."""
    if is_remote(target):
        with local_file(source) as local, storage_errors("read", local):
            s3.upload_file(local, target, if_absent=if_absent)
        return
    with replacing(target, if_absent=if_absent) as temporary:
        if is_remote(source):
            s3.download_file(source, temporary)
        else:
            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """A local path with the content of `path`: `path` itself, or a temporary copy of an object."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="paml-") as folder:
        local = os.path.join(folder, "file")
        copy(path, local)
        yield local


def local_copy(path: str, *, refresh: bool = False) -> str:
    """A local path with the content of `path`: `path` itself if it is local, otherwise a file in `cache_folder`.

    A cached file is reused while the object has the same ETag and size, unless `refresh` is set.
    """
    if not is_remote(path):
        return path
    info = s3.head(path)
    identity = f"{endpoint()} {path} {info.etag} {info.size}"
    cached = os.path.join(
        cache_folder(), hashlib.sha256(identity.encode()).hexdigest()[:32] + "-" + path.split("/")[-1]
    )
    if refresh or os.path.islink(cached) or not exists(cached):  # the cache creates no links
        copy(path, cached)
    return cached


def cache_folder() -> str:
    """The folder for copies of remote files: `$PAML_CACHE`, `$XDG_CACHE_HOME/paml` or `~/.cache/paml`."""
    folder = os.environ.get("PAML_CACHE")
    return folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "paml")


def open_input(path: str) -> pa.NativeFile:
    """The file, opened for reading and seekable. The caller closes it. Raises FileNotFoundError or StorageError."""
    with storage_errors("read", path):
        if is_remote(path):
            return pa.PythonFile(s3.ObjectReader(path), mode="r")
        return pafs.LocalFileSystem().open_input_file(path)


def list_files(folder: str) -> list[str]:
    """Paths of all files under `folder`, relative to it, sorted; [] if it does not exist.

    Omits temporary files of interrupted writes.
    """
    if is_remote(folder):
        return [name for name, _ in list_objects(folder)]
    names = []
    with storage_errors("list", folder):
        for directory, _, files in os.walk(folder, onerror=_raise_unless_missing):
            base = os.path.relpath(directory, folder)
            names += [os.path.normpath(os.path.join(base, name)) for name in files]
    return sorted(name for name in names if not name.endswith(_TEMPORARY_SUFFIX))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def list_objects(folder: str) -> list[tuple[str, int]]:
    """(path, bytes) of all objects under a folder in S3, as in `list_files`."""
    root = folder.rstrip("/") + "/"
    prefix = s3.bucket_and_key(root)[1]
    entries = [(key[len(prefix) :], size) for key, size in s3.list_objects(root)]
    return sorted(entry for entry in entries if entry[0])


def delete(path: str) -> None:
    """Delete a file, if it exists."""
    if is_remote(path):
        s3.delete_object(path)
        return
    with storage_errors("delete", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def delete_folder(folder: str) -> None:
    """Delete a folder and its content, if it exists. Raises StorageError for a whole bucket."""
    if is_remote(folder):
        _, prefix = s3.bucket_and_key(folder.rstrip("/"))
        if not prefix:
            raise StorageError(errno.EINVAL, f"refusing to delete the whole bucket {folder!r}: give a folder in it")
        s3.delete_objects(folder, [f"{prefix}/{name}" for name in list_files(folder)])
        return
    with storage_errors("delete", folder), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def remove_temporaries(folder: str) -> None:
    """Delete the temporary files of interrupted writes under a local folder that nobody writes to.

    Nothing to do in S3: a lifecycle rule of the bucket removes the parts of interrupted uploads.
    """
    if not is_remote(folder):
        for path in pathlib.Path(folder).rglob(f".*{_TEMPORARY_SUFFIX}"):
            delete(str(path))


def ensure_writable(folder: str) -> None:
    """Write and delete a small file in `folder`, creating the folder if needed.

    Raises StorageError, so that a job fails at its start and not at its first checkpoint.
    """
    probe = join(folder, f".{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        write_bytes(probe, b"paml" * 1024)
        delete(probe)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, str(error.strerror or error))
        raise StorageError(error.errno, f"the folder {folder!r} is not writable: {reason}") from error


def sha256_of(path: str) -> tuple[str, int]:
    """SHA-256 (hex) of a file and its size in bytes."""
    with storage_errors("read", path), open_input(path) as file:
        digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType] # it has readinto
        return digest.hexdigest(), file.tell()
