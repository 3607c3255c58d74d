"""Pass 1 of the shard writer: decode, resize and encode the images of one part, and write them as spills.

A task holds at most two spills in memory, one being filled and one being written, and the images that its threads are
encoding. After an interruption it continues after the part's last complete spill.
"""

import dataclasses
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np

from paml import storage
from paml.errors import DataError, TooLargeError
from paml.shards.images import UndecodableError, prepare_image
from paml.shards.settings import ShardSettings
from paml.shards.spill import (
    Spill,
    SpillHeader,
    is_in_set,
    key_digest,
    pack,
    read_spills,
    shard_of,
    spill_path,
    spill_stem,
    write_spill,
)
from paml.sources.parts import MAX_IMAGE_BYTES, Part, Payload
from paml.tasks import TaskContext, TaskInterrupted, read_ahead

SPILL_BYTES = 256 << 20
_SPILL_SECONDS = 600.0
"""A spill ends after this time, so that a slow source loses little when it is killed."""
_THREAD_BYTES = 64 << 20
_IMAGES_PER_THREAD = 4
"""Images of a thread that are queued or being encoded."""
_ESCAPED = re.compile(r"[%./\\\x00-\x1f\x7f]")
_MAX_KEY_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """What all tasks of pass 1 share."""

    work: str
    """Folder of the spills, local or remote."""
    settings: ShardSettings
    num_shards: int
    wanted: np.ndarray | None = None
    """The `digest_set` of the requested keys; None for all."""
    spill_bytes: int = SPILL_BYTES

    def memory(self, threads: int) -> int:
        """Peak memory of a task in bytes, for photos of usual size."""
        return 2 * self.spill_bytes + (threads + 2) * _THREAD_BYTES


def member_key(key: str) -> str:
    """A key as a tar member name: % . / \\ and control characters as %XX, because WebDataset cuts names at a dot."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", key)


def encode_part(job: EncodeJob, part: Part, context: TaskContext) -> int:
    """Write the missing spills of `part`. Returns the number of its images.

    An error while reading the part is raised after the images read so far have been written. Raises StorageError, and
    TaskInterrupted if the task is asked to stop.
    """
    stem = spill_stem(part)
    spills = read_spills(job.work, stem)
    if spills and spills[-1].last:
        context.report(spills[-1].end)
        return spills[-1].end
    encoder, images = _Encoder(job, part, stem, context), iter(part)
    if spills and not encoder.skip(images, spills):
        for spill in spills:
            storage.delete(spill.path)
        if part.read_once:
            raise DataError(
                f"{part.name} has other images than in the interrupted run, or in another order: run the same command "
                "again to read it from the start"
            )
        return encode_part(job, part, context)
    return encoder.run(images)


class _Encoder:
    """Encodes the images of a part in the pool's threads and writes them, in order, as spills."""

    def __init__(self, job: EncodeJob, part: Part, stem: str, context: TaskContext) -> None:
        self._job, self._part, self._stem, self._context = job, part, stem, context
        self._keys = hashlib.blake2b(digest_size=16)
        self._error: Exception | None = None
        self._write: Future[None] | None = None
        self._start_spill(0, 0)

    def _start_spill(self, number: int, first: int) -> None:
        self._number, self._spill = number, SpillHeader(first=first, end=first)
        self._records: list[tuple[int, bytes, bytes]] = []
        self._bytes, self._spill_start = 0, time.monotonic()

    def skip(self, images: Iterator[tuple[str, Payload]], spills: Sequence[Spill]) -> bool:
        """Advance to the first image that is not in the spills. Returns False if the keys before it have changed."""
        for key, _ in itertools.islice(images, spills[-1].end):
            if self._context.should_stop():
                raise TaskInterrupted(self._part.name)
            self._hash_key(key)
        self._start_spill(len(spills), spills[-1].end)
        return self._keys.hexdigest() == spills[-1].keys

    def run(self, images: Iterator[tuple[str, Payload]]) -> int:
        """Encode and write the images. Returns the number of images of the part. After an error, writes those before
        it; a run that is stopped does not wait for an upload."""
        with ThreadPoolExecutor(1, "paml-spill") as self._writer:
            try:
                for key, encoded in read_ahead(self._start(images), _IMAGES_PER_THREAD * self._context.threads):
                    self._add(key, encoded)
            except Exception as error:
                self._error = self._error or error
            stopped = isinstance(self._error, TaskInterrupted) and storage.is_remote(self._job.work)
            if self._error is None or (self._spill.end > self._spill.first and not stopped):
                self._end_spill(last=self._error is None)
            if self._write is not None:
                self._write.result()
        if self._error is not None:
            raise self._error
        return self._spill.end

    def _start(self, images: Iterator[tuple[str, Payload]]) -> Iterator[tuple[str, "Future[_Encoded]"]]:
        """Start to encode each image. Ends at an error of the source, which is raised after the images before it."""
        try:
            for key, payload in images:
                if self._context.should_stop():
                    raise TaskInterrupted(self._part.name)
                yield key, self._context.pool.submit(_encode, self._job, key, payload)
        except Exception as error:
            self._error = error

    def _hash_key(self, key: object) -> None:
        self._keys.update(repr(key).encode("utf-8", "backslashreplace") + b"\n")

    def _add(self, key: str, future: "Future[_Encoded]") -> None:
        """Add the next image to the spill."""
        spill = self._spill
        try:
            encoded = future.result()
        except UndecodableError as error:
            name = key
            if _invalid_key(key):
                name = repr(key) if key else f"image {spill.end} of {self._part.name}"
            spill.rejects[name] = min(str(error), spill.rejects.get(name, str(error)))
        else:
            if encoded == "unwanted":
                spill.unwanted += 1
            elif encoded == "absent":
                spill.absent += 1
            else:
                self._records.append(encoded)
                self._bytes += len(encoded[2])
        self._hash_key(key)
        spill.end += 1
        self._context.report(spill.end)
        if self._bytes >= self._job.spill_bytes or time.monotonic() - self._spill_start > _SPILL_SECONDS:
            self._end_spill(last=False)

    def _end_spill(self, *, last: bool) -> None:
        """Start to write the spill in a thread, after the previous one is written."""
        if self._write is not None:
            self._write.result()  # raises its error each time: no spill follows one that is missing
        self._spill.last, self._spill.keys = last, self._keys.hexdigest()
        path = spill_path(self._job.work, self._stem, self._number)
        self._write = self._writer.submit(write_spill, path, self._records, self._spill)
        self._start_spill(self._number + 1, self._spill.end)


def _invalid_key(key: object) -> str | None:
    if not isinstance(key, str):
        return f"the key is {type(key).__name__}, not a string"
    if not key:
        return "the key is empty"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "the key (file name) is not valid UTF-8: rename the file"
    return f"the key has {size} bytes; at most {_MAX_KEY_BYTES} are allowed" if size > _MAX_KEY_BYTES else None


_Encoded = tuple[int, bytes, bytes] | Literal["unwanted", "absent"]
"""(shard, digest, packed record); or the key was not requested, or is requested but this part has no image of it."""


def _encode(job: EncodeJob, key: str, payload: Payload) -> _Encoded:
    """Encode one image in a pool thread. Raises UndecodableError, or StorageError."""
    if problem := _invalid_key(key):
        raise UndecodableError(problem)
    digest = key_digest(job.settings.seed, key)
    is_wanted = job.wanted is None or is_in_set(digest, job.wanted)
    if isinstance(payload, FileNotFoundError) and job.wanted is not None and is_wanted:
        return "absent"
    if isinstance(payload, Exception):
        raise UndecodableError(str(payload))
    if not is_wanted:
        return "unwanted"
    if not isinstance(payload, bytes):
        path = os.fspath(payload)
        try:
            payload = storage.read_bytes(path, max_bytes=MAX_IMAGE_BYTES)
        except TooLargeError as error:
            raise UndecodableError(str(error.strerror)) from error
        except OSError as error:
            # a server may return later what it refuses now, unless the file does not exist
            if storage.is_remote(path) and not isinstance(error, FileNotFoundError):
                raise
            raise UndecodableError(f"unreadable: {error}") from error
    image = prepare_image(payload, job.settings)
    return shard_of(digest, job.num_shards), digest, pack(key, digest, len(payload), image)
