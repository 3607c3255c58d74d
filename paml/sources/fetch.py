"""Objects read ahead of their turn by a bounded number of threads, and given in their order."""

import errno
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from paml import storage
from paml.errors import DataError
from paml.sources.parts import MAX_IMAGE_BYTES
from paml.storage import StorageError

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16
"""Requests that one part has under way at a time."""
_TRIES = 4
_FIRST_WAIT_SECONDS = 0.5
_LASTING = (errno.EACCES, errno.ENOENT, errno.EINVAL)


def read_ahead(items: Iterable[T], read: Callable[[T], R], threads: int = THREADS) -> Iterator[tuple[T, R]]:
    """(item, read(item)) in the order of the items; at most 2 * `threads` results wait in memory.

    What `read` raises is raised here, in its item's turn.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="paml-sources")
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= 2 * threads:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_object(path: str) -> bytes | FileNotFoundError | DataError:
    """The image's file or object at `path`; FileNotFoundError where there is none, DataError where it is too large.

    Over and above the storage's own tries it is asked four times, with growing waits of random length. Raises
    StorageError where it still cannot tell.
    """
    for attempt in range(_TRIES):
        try:
            return storage.read_bytes(path, MAX_IMAGE_BYTES)
        except storage.TooLargeError as error:
            return DataError(error.strerror)
        except FileNotFoundError:
            place = "in the bucket" if storage.is_remote(path) else "in the folder"
            return FileNotFoundError(f"not {place}: {path}")
        except StorageError as error:
            if error.errno in _LASTING or attempt == _TRIES - 1:
                raise
            time.sleep(wait_seconds(attempt, _FIRST_WAIT_SECONDS))
    raise AssertionError("the loop returns or raises")


def wait_seconds(attempt: int, first: float, most: float = 60.0) -> float:
    """How long to wait after failure number `attempt` (from 0): half to all of `first`, doubled each time."""
    return min(most, first * 2**attempt) * random.uniform(0.5, 1.0)
