"""Reads of images, or cached features, in threads into reused memory. No torch."""

import dataclasses
import functools
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from paml.data.augment import Augmentation
from paml.data.decode import UndecodableError, decode_into
from paml.shards.reader import CorruptSampleError, ShardReader

_ROWS_PER_TASK = 8
_FEATURE_BYTES_PER_TASK = 1 << 20

BadRows = list[tuple[int, str]]
"""Rows of a batch that could not be read, each with the reason."""


def decode_images(shards: ShardReader, index: np.ndarray, out: np.ndarray, crops: np.ndarray | None = None) -> BadRows:
    """Read and decode the images of `index` (int64[n], positions in the manifest) into `out`, uint8 [n, S, S, 3].

    crops: float64[n, 4], the crop box of each (`decode_into`); None for whole images.
    """
    bad = []
    for row, sample in enumerate(index.tolist()):
        try:
            decode_into(shards.read(sample), out[row], None if crops is None else crops[row])
        except (UndecodableError, CorruptSampleError) as error:
            bad.append((row, str(error)))
    return bad


@dataclasses.dataclass(frozen=True)
class PendingBatch:
    """The memory of a batch, [b, ...], and the tasks that fill it."""

    rows: np.ndarray
    tasks: list[tuple[int, Future[BadRows]]]
    """(first row, task)."""

    def wait(self) -> BadRows:
        """Wait until all rows are read. Raises the errors of the tasks."""
        return [(start + row, reason) for start, task in self.tasks for row, reason in task.result()]


class BatchReader:
    """Starts reads of batches in threads and reuses the memory of batches that nobody refers to any more.

    read_into: reads the rows of an index (int64[n], positions in the manifest) into an array [n, *row_shape]; called in
    a thread. buffers: number of unused batch buffers to retain. rows_per_task: largest number of rows of one call.
    """

    def __init__(
        self,
        read_into: Callable[[np.ndarray, np.ndarray], BadRows],
        row_shape: tuple[int, ...],
        dtype: type,
        *,
        batch_size: int,
        threads: int,
        buffers: int,
        rows_per_task: int = _ROWS_PER_TASK,
    ) -> None:
        self._rows_per_task = rows_per_task
        self.row_shape, self.dtype, self._read_into, self._threads = row_shape, dtype, read_into, threads
        self._shape = (batch_size, *row_shape)
        self._unused = _unused_buffers(self._shape, dtype, buffers)
        # Threads are shared by all epochs: CPython 3.11 can hang when a thread starts while memory is short.
        self._executor = _executor(threads)
        self._tasks: set[Future] = set()

    def start(self, index: np.ndarray, out: np.ndarray | None = None) -> PendingBatch:
        """Start to read the rows of `index`, int64[n], into `out` [n, ...], or into reused memory."""
        rows = self._acquire()[: len(index)] if out is None else out
        step = max(1, min(self._rows_per_task, -(-len(index) // self._threads)))
        tasks = []
        for start in range(0, len(index), step):
            task = self._executor.submit(self._read_into, index[start : start + step], rows[start : start + step])
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            tasks.append((start, task))
        return PendingBatch(rows, tasks)

    def close(self) -> None:
        """Cancel tasks that have not started and wait for the others."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        wait(tasks)

    def _acquire(self) -> np.ndarray:
        """A buffer that returns to the unused ones when no array or tensor views it any more."""
        try:
            buffer = self._unused.pop()
        except IndexError:
            buffer = np.empty(self._shape, self.dtype)
        owner = _BufferOwner(buffer)
        weakref.finalize(owner, self._unused.append, buffer).atexit = False
        return np.asarray(owner)


class _BufferOwner:
    """The base of all views of a buffer. It is not an array, because numpy skips arrays in a chain of bases."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.__array_interface__ = buffer.__array_interface__


@functools.lru_cache(maxsize=2)
def _unused_buffers(shape: tuple[int, ...], dtype: type, retain: int) -> deque[np.ndarray]:
    """Shared by all epochs: allocating fresh memory takes a tenth of the decoding time."""
    return deque(maxlen=retain)


@functools.lru_cache(maxsize=4)
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """Features of the frozen layers, or embeddings, for all n images of a manifest, in its order."""

    plain: np.ndarray
    """float16 [n, h, w, C]; embeddings may be float32."""
    mirrored: np.ndarray
    """Features of the mirrored images; the same array as `plain` if no image is mirrored."""
    bad: dict[int, str]
    """Positions of images that could not be read, with the reason; their features are 0."""

    @property
    def rows_per_task(self) -> int:
        """Number of rows to copy at once: vectors are so small that a task costs more than copying a few of them."""
        return max(_ROWS_PER_TASK, _FEATURE_BYTES_PER_TASK // max(1, self.plain[:1].nbytes))


def copy_features(features: CachedFeatures, augmentation: Augmentation, index: np.ndarray, out: np.ndarray) -> BadRows:
    """Copy the features of `index` to `out`, [n, h, w, C]. In a thread, no step waits for a slow disk."""
    if features.mirrored is features.plain:
        out[:] = features.plain[index]
        return [(row, features.bad[sample]) for row, sample in enumerate(index.tolist()) if sample in features.bad]
    for row, (sample, mirror) in enumerate(zip(index.tolist(), augmentation.flips(index), strict=True)):
        out[row] = (features.mirrored if mirror else features.plain)[sample]
    return [(row, features.bad[sample]) for row, sample in enumerate(index.tolist()) if sample in features.bad]
