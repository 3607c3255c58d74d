"""Who decodes: threads of this process, or processes that fill memory which they share with it.

No torch here, so that a process starts in a fraction of a second. Which of the two, and how many, changes no pixel.
"""

import contextlib
import dataclasses
import functools
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from paml.data.decode import UndecodableError, decode_into
from paml.errors import PamlError
from paml.shards.cache import Traffic
from paml.shards.reader import CorruptSample, ShardReader

_EXIT_SECONDS = 5.0


class LoaderProcessError(RuntimeError):
    """A loader process ended on its own; the message names it."""


Faults = list[tuple[int, str]]
"""Places of a span that could not be used, each with the reason."""


Crops = Callable[[np.ndarray], np.ndarray | None]
"""int64[n], places in the manifest, to float64[n, 4], the part that is kept of each image; None for all of them."""


def decode_span(reader: ShardReader, index: np.ndarray, out: np.ndarray, crops: np.ndarray | None = None) -> Faults:
    """Read and decode the images of `index` (int64[n], places in the manifest) into `out`, uint8 [n, S, S, 3].

    crops: float64[n, 4], the part that is kept of each (`decode_into`); None for all of them.
    """
    faults = []
    for place, sample in enumerate(index.tolist()):
        try:
            decode_into(reader.read(sample), out[place], None if crops is None else crops[place])
        except (UndecodableError, CorruptSample) as error:
            faults.append((place, str(error)))
    return faults


@dataclasses.dataclass(frozen=True)
class Filling:
    """A batch's memory, uint8 [n, S, S, 3], and the tasks that fill it."""

    pixels: np.ndarray
    spans: list[tuple[int, Future[Faults]]]

    def faults(self) -> Faults:
        """Wait until all is decoded; raises what a decoder raised."""
        return [(start + place, reason) for start, future in self.spans for place, reason in future.result()]


class Pool:
    """Batches' memory, given again once nobody refers to it: fresh memory costs the kernel a tenth of a decode.

    Arrays, and tensors made from them, hold the memory as long as any view of them lives: nobody sees it change.
    """

    def __init__(self, make: Callable[[], np.ndarray], keep: int) -> None:
        self._make, self._keep = make, keep
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """The whole memory of one batch."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._make()
        lease = _Lease(memory)
        weakref.finalize(lease, _give_back, self._free, memory, self._keep).atexit = False
        return np.asarray(lease)


class _Lease:
    """The root of all views of a batch: numpy would skip an array here, since views refer to the last owner."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__


def _give_back(free: list[np.ndarray], memory: np.ndarray, keep: int) -> None:
    if len(free) < keep:
        free.append(memory)


class Decoders(Protocol):
    """What fills batches. Close it with the epoch."""

    def fill(self, index: np.ndarray, out: np.ndarray | None = None) -> Filling:
        """Begin to decode the images of `index`, int64[n], into `out`, uint8 [n, S, S, 3], or a pool's memory."""
        ...

    def release(self, shards: list[int]) -> None:
        """These shards are not needed any more."""
        ...

    def traffic(self) -> Traffic:
        """What was read from the bucket since the last call."""
        ...

    def close(self) -> None:
        """End the threads or processes."""
        ...


@functools.lru_cache(maxsize=2)
def _lasting_pool(shape: tuple[int, int, int, int], keep: int) -> Pool:
    """One for training and one for scoring, which outlive their epochs."""
    return Pool(lambda: np.empty(shape, np.uint8), keep)


@functools.lru_cache(maxsize=4)
def _lasting_executor(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


class Threads:
    """Threads that outlive their epoch: one that begins when no memory is left can keep its starter waiting for ever
    (CPython 3.11), and epochs begin often.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = _lasting_executor(threads, name)
        self._tasks: set[Future] = set()

    def submit(self, work: Callable[..., Faults], *given: Any) -> "Future[Faults]":
        """Begin `work(*given)` as soon as a thread is free."""
        task = self._executor.submit(work, *given)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancel what has not begun, and wait for the rest."""
        left = list(self._tasks)
        for task in left:
            task.cancel()
        wait(left)


class ThreadDecoders:
    """Threads: libjpeg-turbo holds no lock of the interpreter while it works."""

    def __init__(
        self, reader: ShardReader, shape: tuple[int, int, int, int], threads: int, *, keep: int, crops: Crops
    ) -> None:
        self._reader, self._threads, self._crops = reader, threads, crops
        self._pool = _lasting_pool(shape, keep)
        self._workers = Threads(threads, "decode")

    def fill(self, index: np.ndarray, out: np.ndarray | None = None) -> Filling:
        pixels = self._pool.take()[: len(index)] if out is None else out
        spans = []
        for start, stop in _cut(len(index), self._threads, 8):
            own = index[start:stop]
            task = self._workers.submit(decode_span, self._reader, own, pixels[start:stop], self._crops(own))
            spans.append((start, task))
        return Filling(pixels, spans)

    def release(self, shards: list[int]) -> None:
        self._reader.release(shards)

    def traffic(self) -> Traffic:
        return self._reader.cache.take_traffic()

    def close(self) -> None:
        self._workers.close()


def _cut(images: int, workers: int, most: int) -> list[tuple[int, int]]:
    """Spans of at most `most` images, so many that all workers have some of a small batch too."""
    step = max(1, min(most, -(-images // workers)))
    return [(start, min(start + step, images)) for start in range(0, images, step)]


class ProcessDecoders:
    """Processes that decode into memory which they share with this one.

    They are plain `python -c` children, not forks, so that they know nothing of the parent's threads, and end when
    the parent does. Each is served by a thread that waits for it: one that dies is an error, not a wait.
    """

    def __init__(
        self, reader: ShardReader, shape: tuple[int, int, int, int], processes: int, *, keep: int, crops: Crops
    ) -> None:
        self._reader, self._shape, self._crops = reader, shape, crops
        self._memory = _SharedFile()
        self._pool = Pool(self._region, keep)
        self._traffic, self._count = Traffic(), threading.Lock()
        self._released: list[int] = []
        self._executor = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._children: list[_Child] = []
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        try:
            for number in range(processes):
                child = _Child(f"{number + 1} of {processes}", self._memory.handle)
                self._children.append(child)
                child.send((reader, shape))
                self._idle.put(child)
        except BaseException:
            self.close()
            raise

    def fill(self, index: np.ndarray, out: np.ndarray | None = None) -> Filling:
        if out is not None:
            raise ValueError("loader processes fill memory of their own, which they share")
        pixels = self._pool.take()[: len(index)]
        offset = self._memory.offset_of(pixels)
        spans = []
        for start, stop in _cut(len(index), len(self._children), 16):
            spans.append((start, self._executor.submit(self._ask, offset, start, index[start:stop])))
        return Filling(pixels, spans)

    def release(self, shards: list[int]) -> None:
        self._reader.release(shards)
        self._released.extend(shards)

    def traffic(self) -> Traffic:
        with self._count:
            taken, self._traffic = self._traffic, Traffic()
        taken.add(self._reader.cache.take_traffic())
        return taken

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.end()
        self._executor.shutdown(wait=True)

    def _region(self) -> np.ndarray:
        return self._memory.region(int(np.prod(self._shape))).reshape(self._shape)

    def _ask(self, offset: int, start: int, index: np.ndarray) -> Faults:
        child = self._idle.get()
        try:
            released = self._released[child.told :]
            child.told += len(released)
            child.send((offset, start, index, self._crops(index), released))
            answer = child.receive()
        finally:
            self._idle.put(child)
        if isinstance(answer, BaseException):
            raise answer
        faults, traffic = answer
        with self._count:
            self._traffic.add(traffic)
        return faults


class _SharedFile:
    """A nameless file that grows, mapped piece by piece: memory that children see too."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.handle = os.memfd_create("paml-batches", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self.handle)
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when this object goes
            self.handle = file.fileno()
            weakref.finalize(self, file.close)
        self._size = 0
        self._offsets: dict[int, int] = {}

    def region(self, size: int) -> np.ndarray:
        """uint8[size], new."""
        rounded = -(-max(1, size) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        offset, self._size = self._size, self._size + rounded
        os.ftruncate(self.handle, self._size)
        memory = np.frombuffer(mmap.mmap(self.handle, rounded, offset=offset), np.uint8)[:size]
        self._offsets[memory.ctypes.data] = offset
        return memory

    def offset_of(self, memory: np.ndarray) -> int:
        """Where in the file an array starts that is the beginning of a region."""
        return self._offsets[memory.ctypes.data]


class _Child:
    """A loader process and the line to it."""

    def __init__(self, name: str, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            line = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from paml.data.decoders import serve; serve({line}, {memory})"],
                pass_fds=(line, memory),
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"},
            )
        self._line = Connection(ours.detach())
        self._name = name
        self._ended = False
        self.told = 0
        """How many released shards it has been told of."""

    def send(self, task: Any) -> None:
        try:
            self._line.send(task)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        try:
            return self._line.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def _death(self) -> LoaderProcessError:
        pid = self._process.pid
        if self._ended:
            return LoaderProcessError(f"loader process {self._name} (pid {pid}) was ended")
        status = self._process.wait()
        how = f"exit status {status}"
        if status < 0:
            how = f"signal {-status} ({signal.Signals(-status).name})"
        hint = ": was the memory short?" if status == -signal.SIGKILL else ""
        return LoaderProcessError(
            f"loader process {self._name} (pid {pid}) died by {how}{hint} "
            "The run can be resumed; data.loader_processes: 0 decodes in threads instead"
        )

    def end(self) -> None:
        """It leaves when it finds the line closed; a process that does not is killed."""
        self._ended = True
        line = socket.socket(fileno=os.dup(self._line.fileno()))
        with line, contextlib.suppress(OSError):  # where it is dead already
            line.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(line: int, memory: int) -> None:
    """The life of a loader process: spans are asked for over the socket `line`, pixels go to the file `memory`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    connection = Connection(line)
    regions: dict[int, np.ndarray] = {}
    try:
        reader, shape = connection.recv()
        size = int(np.prod(shape))
        while True:
            offset, start, index, crops, released = connection.recv()
            if offset not in regions:
                mapped = mmap.mmap(memory, max(1, size), offset=offset)
                regions[offset] = np.frombuffer(mapped, np.uint8)[:size].reshape(shape)
            try:
                reader.release(released)
                out = regions[offset][start : start + len(index)]
                answer: Any = (decode_span(reader, index, out, crops), reader.cache.take_traffic())
            except (PamlError, OSError) as error:
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
