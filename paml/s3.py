"""Objects in S3 over networks and servers that fail: every request is bounded in time and repeated with care.

What passes (5xx, SlowDown, resets, time-outs, bodies that break or stall) is tried again after a random share of
a wait that doubles (full jitter); a body that broke goes on where it stood. Uploads carry their MD5, which the
server checks, and their size is read back. An object that is slow or needs many tries is named once in the log;
one that stays bad raises StorageError. Use it through `paml.storage`.
"""

import base64
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from paml.storage import StorageError, TooLargeError

PART_BYTES = 16 << 20
"""Files are copied in parts of this size, several at a time, and each part is repeated by itself."""
PAGE_KEYS = 1000
_PARALLEL_PARTS = 4
_MAX_PARTS = 10_000
_FIRST_BLOCK = 256 << 10
_MAX_NAMED = 100
_TOKEN = "paml-writer"
_PASSING_CODES = {
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests"),
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict"),
}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_GONE = ("404", "NoSuchKey", "NotFound")
_EXISTS = ("412", "PreconditionFailed")

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class S3Limits:
    """How long to wait and how often to try. Each is set by the variable PAML_S3_ and its name in capitals."""

    attempts: int = 10
    """Tries of one request, the first included."""
    connect_seconds: float = 10.0
    """For a connection, and for sending each piece of a body."""
    read_seconds: float = 30.0
    """Silence of the server after which a try is given up."""
    deadline_seconds: float = 300.0
    """For all tries of one request and the waits between them, on top of what its bytes take at 100 kB/s."""
    wait_seconds: float = 0.1
    """The longest wait before the second try; it doubles with each further one."""
    max_wait_seconds: float = 20.0
    """The longest wait of all."""
    slow_seconds: float = 30.0
    """A request that takes longer, or more than 5 s at less than 100 kB/s, has its object named in the log."""
    warn_attempts: int = 4
    """So many tries of one request have its object named in the log."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low = 1 if isinstance(field.default, int) else 0
            if not getattr(self, field.name) >= low:
                raise StorageError(
                    errno.EINVAL,
                    f"{_variable(field.name)} is {getattr(self, field.name)}: it must be a number of {low} or more",
                )

    @classmethod
    def of_environment(cls) -> "S3Limits":
        """The defaults and what the environment says. Raises StorageError for a variable that is no number."""
        return _limits_of(tuple(os.environ.get(_variable(field.name)) for field in dataclasses.fields(cls)))


_LEAST_RATE = 100_000  # bytes a second
_QUICK_SECONDS = 5.0


def _variable(name: str) -> str:
    return f"PAML_S3_{name.upper()}"


@functools.lru_cache(maxsize=8)
def _limits_of(values: tuple[str | None, ...]) -> S3Limits:
    chosen: dict[str, Any] = {}
    for field, value in zip(dataclasses.fields(S3Limits), values, strict=True):
        if value:
            try:
                chosen[field.name] = type(field.default)(value)
            except ValueError:
                raise StorageError(
                    errno.EINVAL, f"{_variable(field.name)} is {value!r}: set it to a number, or leave it away"
                ) from None
    return S3Limits(**chosen)


class Attempt(NamedTuple):
    """One try of a request."""

    number: int
    """From 1."""
    deadline: float
    """By `time.monotonic`."""

    def check(self) -> None:
        """Raises TimeoutError once the deadline is past."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("it has not ended by the deadline")


class BrokenTransfer(Exception):
    """Bytes that did not arrive as they were sent; another try may help."""


class Changed(StorageError):
    """Somebody has replaced the object while it was read."""


def bucket_and_key(path: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. Raises StorageError where no bucket is named."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise StorageError(
            errno.EINVAL,
            f"'s3://…@{bucket.rpartition('@')[2]}' holds keys: write s3://bucket/key, and give the keys by "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not bucket:
        raise StorageError(errno.EINVAL, f"{path!r} names no bucket: write s3://bucket/key")
    return bucket, key


def endpoint() -> str | None:
    """URL of the server, where it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


_USER = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")


@functools.lru_cache(maxsize=8)
def _client_of(process: int, address: str | None, user: tuple[str | None, ...], limits: S3Limits) -> Any:
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = Session()
    signed: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # repeating is done here
        connect_timeout=limits.connect_seconds,
        read_timeout=limits.read_seconds,
        max_pool_connections=64,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **signed,
    )
    region = session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=address, region_name=region, config=config)


def client() -> Any:
    """The boto3 client of this process (one that a fork shares is not safe) and of the user in the environment."""
    user = tuple(os.environ.get(name) for name in _USER)
    return _client_of(os.getpid(), endpoint(), user, S3Limits.of_environment())


def _code_and_status(error: Exception) -> tuple[str, int]:
    answer = getattr(error, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    return code, int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        code, status = _code_and_status(error)
        return code in _PASSING_CODES or status in _PASSING_STATUS
    passing = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
        ResponseParserError,
        HTTPError,
        BrokenTransfer,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, passing) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _clear(error: Exception, doing: str, path: str) -> OSError:
    """What a user is told of an error that another try cannot mend."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code, _ = _code_and_status(error)
        if code in _GONE:
            return FileNotFoundError(errno.ENOENT, f"cannot {doing} {path!r}: there is no such object")
        if code in _EXISTS:
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
        detail = error.response.get("Error", {})
        return StorageError(errno.EIO, f"cannot {doing} {path!r}: S3 answered {code}: {detail.get('Message', '')}")
    if isinstance(error, exceptions.NoCredentialsError):
        return StorageError(errno.EACCES, f"cannot {doing} {path!r}: no AWS keys: set AWS_ACCESS_KEY_ID and its secret")
    return StorageError(
        errno.EIO, f"cannot {doing} {path!r}: {error}: check the network and AWS_ENDPOINT_URL, then try again"
    )


def retried(doing: str, path: str, call: Callable[[Attempt], T], *, size: int = 0) -> T:
    """The result of `call`, which is tried again while its errors may pass; `size` is what it moves, in bytes.

    Raises FileNotFoundError, FileExistsError, or StorageError with the object, the tries and how to mend it.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    limits, started = S3Limits.of_environment(), time.monotonic()
    deadline, last = started + limits.deadline_seconds + size / _LEAST_RATE, ""
    for number in range(1, limits.attempts + 1):
        try:
            result = call(Attempt(number, deadline))
        except Exception as error:
            if not _may_pass(error):
                if isinstance(error, BotoCoreError | ClientError):
                    raise _clear(error, doing, path) from error
                raise
            last = " ".join(str(error).split()) or type(error).__name__
            wait, tries = _wait(limits, number), "1 try" if number == 1 else f"{number} tries"
            if number == limits.attempts or time.monotonic() + wait >= deadline:
                raise StorageError(
                    errno.EIO,
                    f"cannot {doing} {path!r}: given up after {tries} in {time.monotonic() - started:.1f} s, "
                    f"the last of which failed with: {last}: check the network and AWS_ENDPOINT_URL, then try again "
                    "(PAML_S3_ATTEMPTS and PAML_S3_DEADLINE_SECONDS allow for more)",
                ) from error
            time.sleep(wait)
            continue
        _name_if_slow(limits, path, time.monotonic() - started, number, size, last)
        return result
    raise AssertionError("the loop returns or raises")


def _wait(limits: S3Limits, number: int) -> float:
    """Seconds before the next try. Not from the generator that runs seed, which this must not move on."""
    return random.SystemRandom().uniform(0, min(limits.max_wait_seconds, limits.wait_seconds * 2 ** (number - 1)))


_named: set[str] = set()
_naming = threading.Lock()


def _name_if_slow(limits: S3Limits, path: str, seconds: float, attempts: int, size: int, last: str) -> None:
    slow = seconds > limits.slow_seconds or (size > 0 and seconds > _QUICK_SECONDS and size / seconds < _LEAST_RATE)
    if not slow and attempts < limits.warn_attempts:
        return
    with _naming:
        if path in _named or len(_named) > _MAX_NAMED:
            return
        _named.add(path)
        if len(_named) > _MAX_NAMED:
            log.warning("more than %d objects in S3 are slow or fail now and then: no more are named", _MAX_NAMED)
            return
    moved = f" for {size:,} bytes" if size else ""
    what = "is slow: one request took" if slow else "fails now and then: one request took"
    failed = f" and {attempts} tries, the last failure: {last}" if last else ""
    log.warning("%s %s %.1f s%s%s", path, what, seconds, moved, failed)


class Head(NamedTuple):
    """What the server says of an object."""

    size: int
    etag: str | None
    metadata: Mapping[str, str]


def head(path: str, doing: str = "read") -> Head:
    """Raises FileNotFoundError where there is no object."""
    bucket, key = bucket_and_key(path)
    answer = retried(doing, path, lambda _: client().head_object(Bucket=bucket, Key=key))
    return Head(int(answer["ContentLength"]), answer.get("ETag"), answer.get("Metadata", {}))


def read_object(
    path: str, offset: int = 0, size: int | None = None, *, etag: str | None = None, most: int | None = None
) -> bytes:
    """`size` bytes from `offset`, or all from there; fewer where the object ends before.

    With `etag` it must still be that object, else Changed is raised. A body that breaks goes on where it stood.
    Raises TooLargeError where there are more than `most` bytes to be read.
    """
    bucket, key = bucket_and_key(path)
    pieces: list[bytes] = []
    state = {"got": 0, "etag": etag}

    def read(attempt: Attempt) -> None:
        start = offset + state["got"]
        options: dict[str, Any] = {"IfMatch": state["etag"]} if state["etag"] else {}
        if start or size is not None:
            options["Range"] = f"bytes={start}-" + ("" if size is None else str(offset + size - 1))
        try:
            answer = client().get_object(Bucket=bucket, Key=key, **options)
        except Exception as error:
            code, status = _code_and_status(error)
            if code == "InvalidRange" or status == 416:
                return
            if code in _EXISTS and etag is None:
                pieces.clear()
                state.update(got=0, etag=None)
                raise BrokenTransfer("the object was replaced while it was read") from error
            if code in _EXISTS:
                raise Changed(
                    errno.ESTALE, f"cannot read {path!r}: it was replaced while it was read: start again"
                ) from error
            raise
        if "Range" in options and "ContentRange" not in answer:
            raise StorageError(
                errno.EIO, f"cannot read {path!r}: the server ignores byte ranges: use one that serves them"
            )
        state["etag"] = state["etag"] or answer.get("ETag")
        expected, arrived = int(answer["ContentLength"]), 0
        if most is not None and state["got"] + expected > most:
            answer["Body"].close()
            raise TooLargeError(errno.EFBIG, f"{path!r} has more than {most:,} bytes: take it away")
        with contextlib.closing(answer["Body"]) as body:
            # one receive at a time, so that a trickle is seen and each wait is bounded
            receive = getattr(getattr(body, "_raw_stream", None), "read1", None) or body.read
            while arrived < expected:
                attempt.check()
                piece = receive(min(expected - arrived, 1 << 20))
                if not piece:
                    raise BrokenTransfer(f"the body ended after {arrived:,} of {expected:,} bytes")
                pieces.append(piece)
                arrived += len(piece)
                state["got"] += len(piece)

    retried("read", path, read, size=size or 0)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Body(io.BytesIO):
    """Bytes to send that stop being sent once the deadline is past."""

    def __init__(self, data: bytes, attempt: Attempt) -> None:
        super().__init__(data)
        self._attempt = attempt

    def read(self, size: int | None = -1) -> bytes:
        self._attempt.check()
        return super().read(size)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def write_object(path: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write an object whole. With `if_absent` FileExistsError where it exists; of several writers one succeeds,
    and it knows so even where the answer to its first try was lost: the object names its writer."""
    bucket, key = bucket_and_key(path)
    options: dict[str, Any] = {"ContentMD5": _md5(data)}
    writer = uuid.uuid4().hex
    if if_absent:
        options |= {"IfNoneMatch": "*", "Metadata": {_TOKEN: writer}}

    def write(attempt: Attempt) -> None:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=_Body(data, attempt), **options)
        except Exception as error:
            if attempt.number == 1 or _code_and_status(error)[0] not in _EXISTS or not _is_mine(path, writer):
                raise
        _check_written(path, len(data), again=not if_absent)

    retried("write", path, write, size=len(data))


def _is_mine(path: str, writer: str) -> bool:
    try:
        return head(path, "write").metadata.get(_TOKEN) == writer
    except FileNotFoundError:
        return False


def _check_written(path: str, expected: int, *, again: bool) -> None:
    try:
        found = head(path, "write").size
    except FileNotFoundError:
        found = -1
    if found != expected:
        what = "is not there" if found < 0 else f"holds {found} bytes"
        if again:
            raise BrokenTransfer(f"the object {what} after a write of {expected}")
        raise StorageError(errno.EIO, f"{path!r} {what} after a write of {expected} bytes: use sound storage")


def upload_file(local: str, path: str, *, if_absent: bool = False) -> None:
    """Write an object from a local file, in parts where it is large; whole or not at all."""
    size = os.path.getsize(local)
    part = max(PART_BYTES, -(-size // _MAX_PARTS))
    with open(local, "rb") as file:
        if size <= part:
            write_object(path, file.read(), if_absent=if_absent)
            return
        _upload_parts(file.fileno(), size, part, path, if_absent)


def _upload_parts(file: int, size: int, part: int, path: str, if_absent: bool) -> None:
    bucket, key = bucket_and_key(path)
    place: dict[str, Any] = {"Bucket": bucket, "Key": key}
    writer = uuid.uuid4().hex
    begun = retried(
        "write", path, lambda _: client().create_multipart_upload(**place, Metadata={_TOKEN: writer})["UploadId"]
    )

    def send(number: int) -> dict[str, Any]:
        data = os.pread(file, min(part, size - (number - 1) * part), (number - 1) * part)
        options = {"UploadId": begun, "PartNumber": number, "ContentMD5": _md5(data)}
        etag = retried(
            "write",
            path,
            lambda attempt: client().upload_part(**place, **options, Body=_Body(data, attempt))["ETag"],
            size=len(data),
        )
        return {"PartNumber": number, "ETag": etag}

    def complete(attempt: Attempt) -> None:
        try:
            client().complete_multipart_upload(
                **place,
                UploadId=begun,
                MultipartUpload={"Parts": parts},
                **({"IfNoneMatch": "*"} if if_absent else {}),
            )
        except Exception as error:
            unsure = attempt.number > 1 and _code_and_status(error)[0] in (*_EXISTS, *_GONE, "NoSuchUpload")
            if not unsure or not _is_mine(path, writer):
                raise

    try:
        with ThreadPoolExecutor(_PARALLEL_PARTS, thread_name_prefix="upload") as pool:
            parts = _all(pool, send, range(1, -(-size // part) + 1))
        retried("write", path, complete)
    except BaseException:
        # parts that are never completed would be paid for
        with contextlib.suppress(Exception):
            client().abort_multipart_upload(**place, UploadId=begun)
        raise
    try:
        _check_written(path, size, again=True)
    except BrokenTransfer as broken:
        raise StorageError(errno.EIO, f"{path!r}: {broken}: write it again on sound storage") from broken


def _all(pool: ThreadPoolExecutor, call: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """The results in order; the first error ends it, and what has not begun never does."""
    try:
        return list(pool.map(call, numbers))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def download_file(path: str, local: str) -> int:
    """Copy an object into the local file `local`, in parts, several at a time. Returns its size in bytes.

    Raises Changed where it is replaced meanwhile.
    """
    about = head(path)
    starts = range(0, about.size, PART_BYTES)
    with open(local, "wb") as file:
        file.truncate(about.size)
        number = file.fileno()

        def fetch(start: int) -> None:
            size = min(PART_BYTES, about.size - start)
            data = read_object(path, start, size, etag=about.etag)
            if len(data) != size:
                raise Changed(errno.ESTALE, f"{path!r} ends early: it was replaced while it was read: start again")
            view = memoryview(data)
            while view:
                done = os.pwrite(number, view, start + size - len(view))
                view = view[done:]

        if len(starts) < 2:
            for start in starts:
                fetch(start)
        else:
            with ThreadPoolExecutor(_PARALLEL_PARTS, thread_name_prefix="download") as pool:
                _all(pool, fetch, starts)
    return about.size


class ObjectReader(io.RawIOBase):
    """An object opened for reading, seekable: in blocks that grow to 16 MiB while it is read from front to back."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._about = head(path)
        self._at = self._start = 0
        self._block = memoryview(b"")
        self._ahead = _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        """In bytes."""
        return self._about.size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._about.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {base + offset} in {self._path!r}: it must be >= 0")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._about.size or not len(buffer):
            return 0
        if not self._start <= self._at < self._start + len(self._block):
            self._fetch(len(buffer))
        piece = self._block[self._at - self._start :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _fetch(self, wanted: int) -> None:
        goes_on = self._at == self._start + len(self._block)
        self._ahead = min(2 * self._ahead, PART_BYTES) if goes_on else _FIRST_BLOCK
        size = min(max(self._ahead, min(wanted, PART_BYTES)), self._about.size - self._at)
        data = read_object(self._path, self._at, size, etag=self._about.etag)
        if len(data) != size:
            raise Changed(errno.ESTALE, f"{self._path!r} ends early: it was replaced while it was read: start again")
        self._start, self._block = self._at, memoryview(data)


def list_objects(path: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the objects under the prefix `path`, by ascending key, page by page."""
    bucket, prefix = bucket_and_key(path)
    after: dict[str, str] = {}
    while True:
        options = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **after}
        page = retried("list", path, lambda _, options=options: client().list_objects_v2(**options))
        yield from ((entry["Key"], int(entry["Size"])) for entry in page.get("Contents", []))
        if not page.get("IsTruncated"):
            return
        after = {"ContinuationToken": page["NextContinuationToken"]}


def delete_object(path: str) -> None:
    """Nothing happens where there is none."""
    bucket, key = bucket_and_key(path)
    retried("delete", path, lambda _: client().delete_object(Bucket=bucket, Key=key))


def delete_objects(folder: str, keys: Sequence[str]) -> None:
    """Delete many objects of the bucket of `folder`."""
    bucket, _ = bucket_and_key(folder)
    for start in range(0, len(keys), PAGE_KEYS):
        left = list(keys[start : start + PAGE_KEYS])

        def delete(_: Attempt, left: list[str] = left) -> None:
            entries = [{"Key": key} for key in left]
            answer = client().delete_objects(Bucket=bucket, Delete={"Objects": entries, "Quiet": True})
            errors = answer.get("Errors", [])
            if not errors:
                return
            first = errors[0]
            named = f"{len(errors)} of {len(left)} objects, {first.get('Code')} for {first.get('Key')!r}"
            if all(error.get("Code") in _PASSING_CODES for error in errors):
                left[:] = [error["Key"] for error in errors]
                raise BrokenTransfer(named)
            raise StorageError(errno.EACCES, f"cannot delete in {folder!r}: {named}: check the bucket's policy")

        retried("delete", folder, delete)
