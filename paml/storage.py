"""One way to files on a local disk and in S3: a path is a str, either local or `s3://bucket/key`.

Local files are written to a temporary file beside the target, flushed to the disk and renamed, so that a
reader sees the whole file or none. S3 is reached by pyarrow for streams and by boto3 for what pyarrow lacks:
anonymous buckets, retried and ranged reads, conditional writes. Region, keys and end point come from the usual
AWS variables (`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for other servers); without keys, access is anonymous.
"""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

_TEMPORARY = ".paml-tmp"
_MULTIPART_BYTES = 64 << 20
_MAX_ATTEMPTS = 6
_CONNECTIONS = 64  # botocore keeps 10, and makes new ones for every further thread's request
_PAGE_KEYS = 1000


class StorageError(OSError):
    """Storage that cannot be used: the message names the path, the reason and how to mend it."""


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
    """Turn the operating system's errors and botocore's into StorageError; a missing file stays FileNotFoundError."""
    try:
        yield
    except (StorageError, FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise StorageError(error.errno, f"cannot {doing} {path!r}: {error}") from error
        raise StorageError(error.errno, f"cannot {doing} {path!r}: {reason}") from error


def _botocore_error(error: Exception, doing: str, path: str) -> OSError:
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        detail = error.response.get("Error", {})
        code = str(detail.get("Code", ""))
        if code in ("404", "NoSuchKey", "NotFound"):
            return FileNotFoundError(errno.ENOENT, f"cannot {doing} {path!r}: there is no such object")
        if code in ("412", "PreconditionFailed", "ConditionalRequestConflict", "409"):
            return FileExistsError(errno.EEXIST, f"cannot {doing} {path!r}: it exists already")
        if code == "NoSuchBucket":
            return StorageError(
                errno.ENOENT, f"cannot {doing} {path!r}: there is no such bucket: make it, or mend its name"
            )
        if code in ("403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return StorageError(
                errno.EACCES,
                f"cannot {doing} {path!r}: permission denied ({code}): check the AWS keys and the bucket's policy",
            )
        return StorageError(errno.EIO, f"cannot {doing} {path!r}: S3 answered {code}: {detail.get('Message', '')}")
    if isinstance(error, exceptions.NoCredentialsError):
        return StorageError(errno.EACCES, f"cannot {doing} {path!r}: no AWS keys: set AWS_ACCESS_KEY_ID and its secret")
    return StorageError(
        errno.EIO, f"cannot {doing} {path!r}: {error}: check the network and AWS_ENDPOINT_URL, then try again"
    )


@contextlib.contextmanager
def _clear_s3_errors(doing: str, path: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _botocore_error(error, doing, path) from error
    except Boto3Error as error:
        cause = error.__cause__ or error.__context__ or error
        raise _botocore_error(cause if isinstance(cause, Exception) else error, doing, path) from error


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


def _bucket_and_key(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(errno.EINVAL, f"{path!r} names no bucket: write s3://bucket/key")
    return bucket, key


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _user() -> tuple[str | None, ...]:
    """What tells one user of S3 from another, so that new keys in the environment get a new client."""
    return tuple(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"))


@functools.lru_cache(maxsize=8)
def _client_of(process: int, endpoint: str | None, user: tuple[str | None, ...]) -> Any:
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = Session()
    signed: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(
        retries={"mode": "standard", "max_attempts": _MAX_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **signed,
    )
    region = session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _client() -> Any:
    """The boto3 client of this process: one that a fork shares is not safe."""
    return _client_of(os.getpid(), _endpoint(), _user())


@functools.lru_cache(maxsize=8)
def _arrow_s3_of(process: int, endpoint: str | None, user: tuple[str | None, ...]) -> pafs.FileSystem:
    from boto3.session import Session

    session = Session()
    options: dict[str, Any] = {"anonymous": True} if session.get_credentials() is None else {}
    if endpoint:
        options["endpoint_override"] = endpoint
    if session.region_name:
        options["region"] = session.region_name
    elif endpoint:
        options["region"] = "us-east-1"
    return pafs.S3FileSystem(**options)


def exists(path: str) -> bool:
    """Whether a file (not a folder) lies at `path`."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        size_of(path)
    except FileNotFoundError:
        return False
    return True


def size_of(path: str) -> int:
    """Size of the file in bytes. Raises FileNotFoundError where there is none."""
    if is_remote(path):
        bucket, key = _bucket_and_key(path)
        with _clear_s3_errors("read", path):
            return int(_client().head_object(Bucket=bucket, Key=key)["ContentLength"])
    with _clear_errors("read", path):
        return os.stat(path).st_size


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError or StorageError."""
    if not is_remote(path):
        with _clear_errors("read", path), open(path, "rb") as file:
            return file.read()
    return _read_object(path, None)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` (both in bytes). Raises StorageError where the file ends before."""
    if offset < 0 or size < 0:
        raise StorageError(errno.EINVAL, f"cannot read {path!r} at {offset} for {size} bytes: both must be >= 0")
    if size == 0:
        return b""
    if is_remote(path):
        data = _read_object(path, f"bytes={offset}-{offset + size - 1}")
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


def _read_object(path: str, byte_range: str | None) -> bytes:
    """One object or a range of it. A connection that breaks within the body is tried again, three times in all."""
    from botocore.exceptions import BotoCoreError

    bucket, key = _bucket_and_key(path)
    options = {} if byte_range is None else {"Range": byte_range}
    with _clear_s3_errors("read", path):
        for attempt in range(3):
            try:
                answer = _client().get_object(Bucket=bucket, Key=key, **options)
                return answer["Body"].read()
            except BotoCoreError:
                if attempt == 2:
                    raise
    raise AssertionError("the loop returns or raises")


def write_bytes(path: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write the whole file at once: a reader sees all of it or nothing.

    With `if_absent` the write fails with FileExistsError where `path` exists, and of several writers just one
    succeeds. Folders are made as needed. Raises StorageError; the size is checked after the write.
    """
    if is_remote(path):
        bucket, key = _bucket_and_key(path)
        options = {"IfNoneMatch": "*"} if if_absent else {}
        with _clear_s3_errors("write", path):
            _client().put_object(Bucket=bucket, Key=key, Body=data, **options)
        _check_size(path, len(data))
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
    size = size_of(local)
    bucket, key = _bucket_and_key(path)
    with _clear_s3_errors("write", path), _clear_errors("read", local):
        if if_absent:
            with open(local, "rb") as body:
                _client().put_object(Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")
        else:
            from boto3.s3.transfer import TransferConfig

            transfer = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES)
            _client().upload_file(local, bucket, key, Config=transfer)
    _check_size(path, size)


def copy_to_local(path: str, local: str) -> None:
    """Copy `path` to the local file `local`, whole or not at all; the size is checked."""
    expected = size_of(path)
    with replacing(local) as temporary:
        if is_remote(path):
            bucket, key = _bucket_and_key(path)
            with _clear_s3_errors("read", path):
                _client().download_file(bucket, key, temporary)
        else:
            shutil.copyfile(path, temporary)
    _check_size(local, expected)


def local_copy(path: str) -> str:
    """A local path with the content of `path`: itself where it is local, else a file in the user's cache.

    The cached file is used again as long as the object's ETag and size stay as they were. The cache is
    `$PAML_CACHE`, else `$XDG_CACHE_HOME/paml`, else `~/.cache/paml`.
    """
    if not is_remote(path):
        return path
    bucket, key = _bucket_and_key(path)
    with _clear_s3_errors("read", path):
        head = _client().head_object(Bucket=bucket, Key=key)
    mark = f"{_endpoint()} {path} {head['ETag']} {head['ContentLength']}"
    cached = os.path.join(cache_folder(), hashlib.sha256(mark.encode()).hexdigest()[:32] + "-" + path.split("/")[-1])
    if not exists(cached):
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
            return _arrow_s3_of(os.getpid(), _endpoint(), _user()).open_input_file(path.removeprefix("s3://"))
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
    bucket, prefix = _bucket_and_key(folder.rstrip("/") + "/")
    found = []
    with _clear_s3_errors("list", folder):
        pages = _client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": _PAGE_KEYS}):
            found += [(entry["Key"][len(prefix) :], int(entry["Size"])) for entry in page.get("Contents", [])]
    return sorted(entry for entry in found if entry[0])


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def delete(path: str) -> None:
    """Remove one file; nothing happens where there is none."""
    if is_remote(path):
        bucket, key = _bucket_and_key(path)
        with _clear_s3_errors("delete", path):
            _client().delete_object(Bucket=bucket, Key=key)
        return
    with _clear_errors("delete", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def delete_folder(folder: str) -> None:
    """Remove a folder and all under it; nothing happens where there is none. A whole bucket is refused."""
    if is_remote(folder):
        bucket, prefix = _bucket_and_key(folder.rstrip("/"))
        if not prefix:
            raise StorageError(errno.EINVAL, f"will not delete the whole bucket {folder!r}: name a folder in it")
        names = list_files(folder)
        with _clear_s3_errors("delete", folder):
            for start in range(0, len(names), _PAGE_KEYS):
                entries = [{"Key": f"{prefix}/{name}"} for name in names[start : start + _PAGE_KEYS]]
                answer = _client().delete_objects(Bucket=bucket, Delete={"Objects": entries, "Quiet": True})
                if answer.get("Errors"):
                    first = answer["Errors"][0]
                    raise StorageError(
                        errno.EACCES,
                        f"cannot delete {len(answer['Errors'])} of {len(entries)} objects under {folder!r}: "
                        f"{first.get('Code')} for {first.get('Key')!r}: check the bucket's policy",
                    )
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
