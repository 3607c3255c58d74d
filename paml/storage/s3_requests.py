"""Requests to S3 with retries: every request is bounded in time.

Transient errors (5xx, SlowDown, resets, timeouts, broken or stalled bodies) are retried after a random wait with a
doubling upper bound (full jitter). An object that is slow or needs many attempts is logged once. An object that keeps
failing raises StorageError.
"""

import dataclasses
import errno
import functools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from paml.errors import StorageError

_TRANSIENT_CODES = {
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests"),
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict"),
}
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
NOT_FOUND_CODES = ("404", "NoSuchKey", "NotFound")
EXISTS_CODES = ("412", "PreconditionFailed")
_MAX_LOGGED_OBJECTS = 100
_MIN_BYTES_PER_SECOND = 100_000
_QUICK_SECONDS = 5.0
_WARN_ATTEMPTS = 4
"""Log the object of a request that needs this many attempts."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class S3Limits:
    """Timeouts and retries. Each is set by the environment variable PAML_S3_ and its name in capitals."""

    attempts: int = 10
    """Attempts per request, including the first."""
    connect_seconds: float = 10.0
    """Timeout of a connection, and of sending each block of a body."""
    read_seconds: float = 30.0
    """Timeout of an attempt while the server sends nothing."""
    deadline_seconds: float = 300.0
    """Limit for all attempts of a request and the waits between them, plus the time to transfer it at 100 kB/s."""
    wait_seconds: float = 0.1
    """Longest wait before the second attempt; it doubles with each further one."""
    max_wait_seconds: float = 20.0
    """Upper bound of all waits."""
    slow_seconds: float = 30.0
    """Log the object of a request that takes longer, or more than 5 s at less than 100 kB/s."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low = 1 if isinstance(field.default, int) else 0
            value = getattr(self, field.name)
            if not value >= low:
                raise StorageError(errno.EINVAL, f"{_variable(field.name)} is {value}: set it to {low} or more")

    @classmethod
    def from_environment(cls) -> "S3Limits":
        """The defaults, overridden by the environment. Raises StorageError for a variable that is not a number."""
        limits: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if value := os.environ.get(_variable(field.name)):
                try:
                    limits[field.name] = type(field.default)(value)
                except ValueError:
                    raise StorageError(
                        errno.EINVAL, f"{_variable(field.name)} is {value!r}: set it to a number, or unset it"
                    ) from None
        return cls(**limits)


def _variable(name: str) -> str:
    return f"PAML_S3_{name.upper()}"


class Attempt(NamedTuple):
    """One attempt of a request."""

    number: int
    """From 1."""
    deadline: float
    """In the time of `time.monotonic`."""

    def check_deadline(self) -> None:
        """Raises TimeoutError after the deadline."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the deadline has passed")


class TransferError(Exception):
    """The bytes received differ from those sent; another attempt may succeed."""


def endpoint() -> str | None:
    """URL of the S3 server; None for Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


_USER_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_PROFILE", "AWS_DEFAULT_REGION"),
)


@functools.lru_cache(maxsize=8)
def _build_client(process: int, address: str | None, user: tuple[str | None, ...], limits: S3Limits) -> Any:
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = Session()
    signed: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # `with_retries` does the retrying
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
    """The boto3 client for this process (clients do not survive a fork) and the credentials in the environment."""
    user = tuple(os.environ.get(name) for name in _USER_VARIABLES)
    return _build_client(os.getpid(), endpoint(), user, S3Limits.from_environment())


def code_and_status(error: Exception) -> tuple[str, int]:
    """(S3 error code, HTTP status) of a botocore error; ('', 0) if it has none."""
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def is_transient_code(code: str | None) -> bool:
    """Whether a request with this S3 error code may succeed later."""
    return code in _TRANSIENT_CODES


def _is_transient(error: Exception) -> bool:
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        code, status = code_and_status(error)
        return is_transient_code(code) or status in _TRANSIENT_STATUS
    transient = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
        ResponseParserError,
        HTTPError,
        TransferError,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, transient) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _permanent_error(error: Exception, action: str, path: str) -> OSError:
    """The error to raise for a botocore error that a retry cannot fix."""
    from botocore import exceptions

    failed = f"cannot {action} {path!r}"
    if isinstance(error, exceptions.NoCredentialsError):
        return StorageError(errno.EACCES, f"{failed}: no AWS keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not isinstance(error, exceptions.ClientError):
        return StorageError(errno.EIO, f"{failed}: {error}: check the network and AWS_ENDPOINT_URL, then try again")
    code, _ = code_and_status(error)
    if code in NOT_FOUND_CODES:
        return FileNotFoundError(errno.ENOENT, f"{failed}: no such object")
    if code in EXISTS_CODES:
        return FileExistsError(errno.EEXIST, f"{failed}: it already exists")
    if code == "NoSuchBucket":
        return StorageError(errno.ENOENT, f"{failed}: no such bucket: create it, or fix its name")
    if code in ("403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        problem = f"permission denied ({code}): check the AWS keys and the bucket policy"
        return StorageError(errno.EACCES, f"{failed}: {problem}")
    detail = error.response.get("Error", {}).get("Message", "")
    return StorageError(errno.EIO, f"{failed}: S3 returned {code}: {detail}")


def with_retries(action: str, path: str, call: Callable[[Attempt], T], *, size: int = 0) -> T:
    """The result of `call`, retried after transient errors. size: bytes to transfer.

    Raises FileNotFoundError, FileExistsError, or StorageError with the object, the attempts and the fix.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    limits, started = S3Limits.from_environment(), time.monotonic()
    deadline, last = started + limits.deadline_seconds + size / _MIN_BYTES_PER_SECOND, ""
    number = 0
    while True:
        number += 1
        try:
            result = call(Attempt(number, deadline))
        except Exception as error:
            if not _is_transient(error):
                if isinstance(error, BotoCoreError | ClientError):
                    raise _permanent_error(error, action, path) from error
                raise
            last = " ".join(str(error).split()) or type(error).__name__
            wait, attempts = _wait(limits, number), "1 attempt" if number == 1 else f"{number} attempts"
            if number == limits.attempts or time.monotonic() + wait >= deadline:
                raise StorageError(
                    errno.EIO,
                    f"cannot {action} {path!r}: {attempts} failed in {time.monotonic() - started:.1f} s, the last with "
                    f"{last}: check the network and AWS_ENDPOINT_URL, then try again (raise PAML_S3_ATTEMPTS and "
                    "PAML_S3_DEADLINE_SECONDS to retry longer)",
                ) from error
            time.sleep(wait)
            continue
        _log_if_slow(limits, path, time.monotonic() - started, number, size, last)
        return result


def _wait(limits: S3Limits, number: int) -> float:
    """Seconds before the next attempt. Does not use the global generator, which runs seed."""
    return random.SystemRandom().uniform(0, min(limits.max_wait_seconds, limits.wait_seconds * 2 ** (number - 1)))


_logged: set[str] = set()


def _log_if_slow(limits: S3Limits, path: str, seconds: float, attempts: int, size: int, last: str) -> None:
    slow_transfer = size > 0 and seconds > _QUICK_SECONDS and size / seconds < _MIN_BYTES_PER_SECOND
    slow = seconds > limits.slow_seconds or slow_transfer
    if not slow and attempts < _WARN_ATTEMPTS:
        return
    if path in _logged or len(_logged) >= _MAX_LOGGED_OBJECTS:
        return
    _logged.add(path)
    failed = f", {attempts} attempts, the last error: {last}" if last else ""
    problem = "slow" if slow else "unreliable"
    log.warning("%s is %s: one request took %.1f s%s", path, problem, seconds, failed)
