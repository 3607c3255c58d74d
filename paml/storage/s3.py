"""Objects in S3: read, write, list and delete. Use them through `paml.storage`.

Requests are retried as in `paml.storage.s3_requests`. A read whose body breaks continues at the byte it reached.
Uploads carry their MD5, which the server verifies, and their size is checked afterwards.
"""

import base64
import contextlib
import errno
import hashlib
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from paml.errors import StorageError, TooLargeError
from paml.storage.s3_requests import (
    EXISTS_CODES,
    NOT_FOUND_CODES,
    Attempt,
    TransferError,
    client,
    code_and_status,
    is_transient_code,
    with_retries,
)

PART_BYTES = 16 << 20
"""Size of the parts of an upload or download. Several are transferred in parallel, each with its own retries."""
PAGE_KEYS = 1000
_PARALLEL_PARTS = 4
_MAX_PARTS = 10_000
_FIRST_BLOCK = 256 << 10
_WRITER_TAG = "paml-writer"


class ObjectChangedError(StorageError):
    """The object was replaced while it was read."""


def bucket_and_key(path: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. Raises StorageError for a path without a bucket, or with credentials."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise StorageError(
            errno.EINVAL,
            f"'s3://…@{bucket.rpartition('@')[2]}' contains credentials: use s3://bucket/key, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not bucket:
        raise StorageError(errno.EINVAL, f"{path!r} has no bucket: use s3://bucket/key")
    return bucket, key


class ObjectInfo(NamedTuple):
    """Size and metadata of an object."""

    size: int
    etag: str | None
    metadata: Mapping[str, str]


def head(path: str, action: str = "read") -> ObjectInfo:
    """Raises FileNotFoundError if there is no object."""
    bucket, key = bucket_and_key(path)
    response = with_retries(action, path, lambda _: client().head_object(Bucket=bucket, Key=key))
    return ObjectInfo(int(response["ContentLength"]), response.get("ETag"), response.get("Metadata", {}))


def read_object(
    path: str, offset: int = 0, size: int | None = None, *, etag: str | None = None, max_bytes: int | None = None
) -> bytes:
    """`size` bytes from `offset` (None: all bytes); fewer if the object ends before.

    A read whose body breaks continues at the byte it reached. Raises ObjectChangedError if the object no longer has
    the given `etag`, and TooLargeError for more than `max_bytes` bytes.
    """
    bucket, key = bucket_and_key(path)
    changed = f"{path!r} was replaced while it was read: start again"
    blocks: list[bytes] = []
    state = {"received": 0, "etag": etag}

    def read(attempt: Attempt) -> None:
        start = offset + state["received"]
        options: dict[str, Any] = {"IfMatch": state["etag"]} if state["etag"] else {}
        if start or size is not None:
            options["Range"] = f"bytes={start}-" + ("" if size is None else str(offset + size - 1))
        try:
            response = client().get_object(Bucket=bucket, Key=key, **options)
        except Exception as error:
            code, status = code_and_status(error)
            if code == "InvalidRange" or status == 416:
                return
            if code in EXISTS_CODES and etag is None:
                blocks.clear()
                state.update(received=0, etag=None)
                raise TransferError("the object was replaced while it was read") from error
            if code in EXISTS_CODES:
                raise ObjectChangedError(errno.ESTALE, changed) from error
            raise
        if "Range" in options and "ContentRange" not in response:
            raise StorageError(
                errno.EIO, f"cannot read {path!r}: the server ignores byte ranges: use a server that supports them"
            )
        state["etag"] = state["etag"] or response.get("ETag")
        expected, arrived = int(response["ContentLength"]), 0
        if max_bytes is not None and state["received"] + expected > max_bytes:
            response["Body"].close()
            raise TooLargeError(errno.EFBIG, f"{path!r} has more than {max_bytes:,} bytes: remove it")
        with contextlib.closing(response["Body"]) as body:
            # one receive at a time bounds each wait, also for a body that trickles
            receive = getattr(getattr(body, "_raw_stream", None), "read1", None) or body.read
            while arrived < expected:
                attempt.check_deadline()
                block = receive(min(expected - arrived, 1 << 20))
                if not block:
                    raise TransferError(f"the body ended after {arrived:,} of {expected:,} bytes")
                blocks.append(block)
                arrived += len(block)
                state["received"] += len(block)

    with_retries("read", path, read, size=size or 0)
    if etag is not None and size is not None and state["received"] != size:
        raise ObjectChangedError(errno.ESTALE, changed)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


class _Body(io.BytesIO):
    """A request body that raises TimeoutError after the deadline."""

    def __init__(self, data: bytes, attempt: Attempt) -> None:
        super().__init__(data)
        self._attempt = attempt

    def read(self, size: int | None = -1) -> bytes:
        self._attempt.check_deadline()
        return super().read(size)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def write_object(path: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write an object atomically. With `if_absent` raises FileExistsError if it exists; exactly one of several writers
    succeeds. The object's metadata names the writer, so a writer whose first response was lost knows that it won."""
    bucket, key = bucket_and_key(path)
    options: dict[str, Any] = {"ContentMD5": _md5(data)}
    writer = uuid.uuid4().hex
    if if_absent:
        options |= {"IfNoneMatch": "*", "Metadata": {_WRITER_TAG: writer}}

    def write(attempt: Attempt) -> None:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=_Body(data, attempt), **options)
        except Exception as error:
            if attempt.number == 1 or code_and_status(error)[0] not in EXISTS_CODES or not _is_written_by(path, writer):
                raise
        _check_written(path, len(data), retry=not if_absent)

    with_retries("write", path, write, size=len(data))


def _is_written_by(path: str, writer: str) -> bool:
    try:
        return head(path, "write").metadata.get(_WRITER_TAG) == writer
    except FileNotFoundError:
        return False


def _check_written(path: str, expected: int, *, retry: bool) -> None:
    try:
        size = head(path, "write").size
    except FileNotFoundError:
        size = -1
    if size != expected:
        problem = "is missing" if size < 0 else f"has {size} bytes"
        if retry:
            raise TransferError(f"the object {problem} after a write of {expected}")
        raise StorageError(errno.EIO, f"{path!r} {problem} after a write of {expected} bytes: check the storage")


def upload_file(local: str, path: str, *, if_absent: bool = False) -> None:
    """Write an object from a local file atomically, in parts if it is large."""
    size = os.path.getsize(local)
    part = max(PART_BYTES, -(-size // _MAX_PARTS))
    with open(local, "rb") as file:
        if size <= part:
            write_object(path, file.read(), if_absent=if_absent)
            return
        _upload_parts(file.fileno(), size, part, path, if_absent)


def _upload_parts(file: int, size: int, part: int, path: str, if_absent: bool) -> None:
    bucket, key = bucket_and_key(path)
    target: dict[str, Any] = {"Bucket": bucket, "Key": key}
    writer = uuid.uuid4().hex
    upload_id = with_retries(
        "write", path, lambda _: client().create_multipart_upload(**target, Metadata={_WRITER_TAG: writer})["UploadId"]
    )

    def send(number: int) -> dict[str, Any]:
        data = os.pread(file, min(part, size - (number - 1) * part), (number - 1) * part)
        options = {"UploadId": upload_id, "PartNumber": number, "ContentMD5": _md5(data)}
        etag = with_retries(
            "write",
            path,
            lambda attempt: client().upload_part(**target, **options, Body=_Body(data, attempt))["ETag"],
            size=len(data),
        )
        return {"PartNumber": number, "ETag": etag}

    def complete(attempt: Attempt) -> None:
        try:
            client().complete_multipart_upload(
                **target,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **({"IfNoneMatch": "*"} if if_absent else {}),
            )
        except Exception as error:
            doubtful = (*EXISTS_CODES, *NOT_FOUND_CODES, "NoSuchUpload")
            unsure = attempt.number > 1 and code_and_status(error)[0] in doubtful
            if not unsure or not _is_written_by(path, writer):
                raise

    try:
        with ThreadPoolExecutor(_PARALLEL_PARTS, thread_name_prefix="upload") as pool:
            parts = list(pool.map(send, range(1, -(-size // part) + 1)))  # the first error cancels the rest
        with_retries("write", path, complete)
    except BaseException:
        # the bucket owner pays for parts that are never completed
        with contextlib.suppress(Exception):
            client().abort_multipart_upload(**target, UploadId=upload_id)
        raise
    try:
        _check_written(path, size, retry=True)
    except TransferError as error:
        raise StorageError(errno.EIO, f"{path!r}: {error}: check the storage and write it again") from error


def download_file(path: str, local: str) -> None:
    """Copy an object to the local file `local`, in parallel parts. Raises ObjectChangedError if it is replaced."""
    info = head(path)
    with open(local, "wb") as file:
        file.truncate(info.size)
        number = file.fileno()

        def fetch(start: int) -> None:
            size = min(PART_BYTES, info.size - start)
            data = read_object(path, start, size, etag=info.etag)
            view = memoryview(data)
            while view:
                done = os.pwrite(number, view, start + size - len(view))
                view = view[done:]

        with ThreadPoolExecutor(_PARALLEL_PARTS, thread_name_prefix="download") as pool:
            list(pool.map(fetch, range(0, info.size, PART_BYTES)))


class ObjectReader(io.RawIOBase):
    """An object opened for reading, seekable. Sequential reads fetch blocks that grow to 16 MiB."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._info = head(path)
        self._position = self._start = 0
        self._block = memoryview(b"")
        self._block_bytes = _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """In bytes."""
        return self._info.size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {base + offset} in {self._path!r}: use 0 or more")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one block goes. Returns the number of bytes, 0 at the end of the object."""
        if self._position >= self._info.size or not len(buffer):
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            self._fetch(len(buffer))
        block = self._block[self._position - self._start :][: len(buffer)]
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def _fetch(self, wanted: int) -> None:
        sequential = self._position == self._start + len(self._block)
        self._block_bytes = min(2 * self._block_bytes, PART_BYTES) if sequential else _FIRST_BLOCK
        size = min(max(self._block_bytes, min(wanted, PART_BYTES)), self._info.size - self._position)
        data = read_object(self._path, self._position, size, etag=self._info.etag)
        self._start, self._block = self._position, memoryview(data)


def list_objects(path: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the objects with the prefix `path`, by ascending key."""
    bucket, prefix = bucket_and_key(path)
    after: dict[str, str] = {}
    while True:
        options = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **after}
        page = with_retries("list", path, lambda _, options=options: client().list_objects_v2(**options))
        yield from ((entry["Key"], int(entry["Size"])) for entry in page.get("Contents", []))
        if not page.get("IsTruncated"):
            return
        after = {"ContinuationToken": page["NextContinuationToken"]}


def delete_object(path: str) -> None:
    """Delete an object, if it exists."""
    bucket, key = bucket_and_key(path)
    with_retries("delete", path, lambda _: client().delete_object(Bucket=bucket, Key=key))


def delete_objects(folder: str, keys: Sequence[str]) -> None:
    """Delete many objects of the bucket of `folder`."""
    bucket, _ = bucket_and_key(folder)
    for start in range(0, len(keys), PAGE_KEYS):
        remaining = list(keys[start : start + PAGE_KEYS])

        def delete(_: Attempt, remaining: list[str] = remaining) -> None:
            entries = [{"Key": key} for key in remaining]
            response = client().delete_objects(Bucket=bucket, Delete={"Objects": entries, "Quiet": True})
            errors = response.get("Errors", [])
            if not errors:
                return
            first = errors[0]
            failed = f"{len(errors)} of {len(remaining)} objects, {first.get('Code')} for {first.get('Key')!r}"
            if all(is_transient_code(error.get("Code")) for error in errors):
                remaining[:] = [error["Key"] for error in errors]
                raise TransferError(failed)
            raise StorageError(errno.EACCES, f"cannot delete in {folder!r}: {failed}: check the bucket policy")

        with_retries("delete", folder, delete)
