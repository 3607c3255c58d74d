"""Read objects ahead of time with a bounded number of threads, and yield them in order."""

import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from paml import storage, tasks
from paml.errors import DataError
from paml.sources.parts import MAX_IMAGE_BYTES
from paml.storage import StorageError

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16
"""Concurrent requests of one part."""
_ATTEMPTS = 4
_FIRST_WAIT_SECONDS = 0.5
_PERMANENT = (errno.EACCES, errno.ENOENT, errno.EINVAL)


def read_concurrently(items: Iterable[T], read: Callable[[T], R], threads: int = THREADS) -> Iterator[tuple[T, R]]:
    """(item, read(item)) in the order of the items; at most 2 * `threads` results wait in memory.

    An exception of `read` is raised when it is its item's turn.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="paml-sources")
    try:
        started = ((item, pool.submit(read, item)) for item in items)
        for item, future in tasks.read_ahead(started, 2 * threads - 1):
            yield item, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_object(path: str) -> bytes | FileNotFoundError | DataError:
    """The image file or object at `path`; FileNotFoundError if there is none, DataError if it is too large.

    In addition to the storage's own retries, it is requested four times, with growing random waits. Raises
    StorageError if the storage still cannot tell.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return storage.read_bytes(path, MAX_IMAGE_BYTES)
        except storage.TooLargeError as error:
            return DataError(error.strerror)
        except FileNotFoundError:
            container = "bucket" if storage.is_remote(path) else "folder"
            return FileNotFoundError(f"not in the {container}: {path}")
        except StorageError as error:
            if error.errno in _PERMANENT or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(wait_seconds(attempt, _FIRST_WAIT_SECONDS))
    raise AssertionError("the loop returns or raises")


def wait_seconds(attempt: int, first: float, longest: float = 60.0) -> float:
    """The wait after failure number `attempt` (from 0): 50 to 100 % of `first`, doubled with each attempt."""
    return min(longest, first * 2**attempt) * random.uniform(0.5, 1.0)
