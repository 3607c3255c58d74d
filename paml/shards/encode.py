"""Pass 1 of the shard writer: the images of one part, decoded, resized and encoded, as pieces.

A task keeps at most two pieces in memory, one that fills and one that is being written, and the images that its
threads have in hand. What it has finished is found again: it goes on after the part's last whole piece.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from paml import storage
from paml.errors import DataError
from paml.shards.images import BadImage, prepare_image
from paml.shards.settings import ShardSettings
from paml.shards.spill import (
    KeySet,
    Piece,
    key_digest,
    pack,
    piece_path,
    piece_stem,
    read_pieces,
    shard_of,
    write_piece,
)
from paml.shards.tasks import Context, Interrupted
from paml.sources.parts import MAX_IMAGE_BYTES, Part, Payload
from paml.storage import StorageError

PIECE_BYTES = 256 << 20
_PIECE_SECONDS = 600.0
"""A piece ends after so long, however small it is: a slow source loses no more to a kill."""
_THREAD_BYTES = 64 << 20
_AHEAD = 4
"""Images in hand a thread."""
_ESCAPED = re.compile(r"[%./\\\x00-\x1f\x7f]")
_MAX_KEY_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """What all tasks of pass 1 share."""

    work: str
    """Folder of the pieces, local or remote."""
    settings: ShardSettings
    num_shards: int
    wanted: KeySet | None = None
    """Digests of the keys that are wanted; None takes all."""
    piece_bytes: int = PIECE_BYTES

    def memory(self, threads: int) -> int:
        """Bytes that a task of so many threads takes at most, for photos of usual size."""
        return 2 * self.piece_bytes + (threads + 2) * _THREAD_BYTES


def member_key(key: str) -> str:
    """A key as WebDataset's tar members have it: % . / \\ and control characters as %XX."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", key)


def encode_part(job: EncodeJob, part: Part, context: Context) -> int:
    """Write the pieces of `part` that are not there yet. Returns the number of its images.

    Raises what reading the part raises; what was read before that is kept in a piece. Raises StorageError where a
    piece cannot be written, and Interrupted where `context` says so.
    """
    stem = piece_stem(part)
    done = read_pieces(job.work, stem)
    try:
        return _Encoder(job, part, stem, context).run(done)
    except _OtherImages:
        for piece in done:
            storage.delete(piece.path)
        if reads_once(part):
            raise DataError(
                f"{part.name} gives other images than when the run was cut off, or in another order: make the same "
                "call again to read it anew"
            ) from None
        return _Encoder(job, part, stem, context).run([])


def reads_once(part: Part) -> bool:
    """Whether a part stands for an iterator, which cannot be read again."""
    return getattr(part, "read_once", False)


class _OtherImages(Exception):
    """A part gives other keys than when its pieces were written."""


@dataclasses.dataclass
class _Waiting:
    place: int
    key: object
    name: str
    """The key, or what stands for it among the rejects."""
    outcome: "Future[tuple[int, bytes, bytes]] | _Absent | str | None"
    """The record under way, or why the image is rejected, or None where it is not wanted."""


class _Absent:
    """A wanted key that this part has no image for; whether any part has one is seen at the end."""


class _Encoder:
    def __init__(self, job: EncodeJob, part: Part, stem: str, context: Context) -> None:
        self._job, self._part, self._stem, self._context = job, part, stem, context
        self._keys = hashlib.blake2b(digest_size=16)
        self._waiting: deque[_Waiting] = deque()
        self._number = self._first = self._end = 0
        self._writing: Future[None] | None = None
        self._can_write = True
        self._begin_piece()

    def _begin_piece(self) -> None:
        self._records: list[tuple[int, bytes, bytes]] = []
        self._rejects: dict[str, str] = {}
        self._bytes = self._unwanted = self._absent = 0
        self._first, self._begun = self._end, time.monotonic()

    def run(self, done: list[Piece]) -> int:
        """Go on after the pieces that are `done`."""
        context = self._context
        if done and done[-1].last:
            context.tick(done[-1].end)
            return done[-1].end
        self._number, start = len(done), done[-1].end if done else 0
        self._first = self._end = start
        expected = {piece.end: piece.keys for piece in done}
        with ThreadPoolExecutor(1, "paml-piece") as self._writer:
            try:
                place = -1
                for place, (key, payload) in enumerate(self._part):
                    if context.stopped():
                        raise Interrupted(self._part.name)
                    if place < start:
                        self._take_key(key)
                        if expected.get(place + 1, self._keys.hexdigest()) != self._keys.hexdigest():
                            raise _OtherImages
                        continue
                    self._waiting.append(self._begin(place, key, payload))
                    if len(self._waiting) > _AHEAD * context.threads:
                        self._take()
                if place + 1 < start:
                    raise _OtherImages
                while self._waiting:
                    self._take()
                self._end_piece(last=True)
                self._written()
            except BaseException as error:
                self._keep_what_is_done(error)
                raise
        context.tick(self._end)
        return self._end

    def _begin(self, place: int, key: str, payload: Payload) -> _Waiting:
        fault = _bad_key(key)
        if fault is not None:
            return _Waiting(place, key, repr(key) if key else f"image {place} of {self._part.name}", fault)
        digest, wanted = key_digest(self._job.settings.seed, key), self._job.wanted
        if isinstance(payload, FileNotFoundError) and wanted is not None and digest in wanted:
            return _Waiting(place, key, key, _Absent())
        if isinstance(payload, Exception):
            return _Waiting(place, key, key, str(payload))
        if wanted is not None and digest not in wanted:
            return _Waiting(place, key, key, None)
        future = self._context.pool.submit(_record, key, digest, payload, self._job)
        return _Waiting(place, key, key, future)

    def _take_key(self, key: object) -> None:
        self._keys.update(repr(key).encode("utf-8", "backslashreplace") + b"\n")

    def _take(self) -> None:
        """Put the oldest image in hand into the piece."""
        image = self._waiting[0]
        if image.outcome is None:
            self._unwanted += 1
        elif isinstance(image.outcome, _Absent):
            self._absent += 1
        elif isinstance(image.outcome, str):
            self._reject(image.name, image.outcome)
        else:
            try:
                record = image.outcome.result()
                self._records.append(record)
                self._bytes += len(record[2])
            except BadImage as bad:
                self._reject(image.name, str(bad))
        self._waiting.popleft()
        self._take_key(image.key)
        self._end = image.place + 1
        self._context.tick(self._end)
        if self._bytes >= self._job.piece_bytes or time.monotonic() - self._begun > _PIECE_SECONDS:
            self._end_piece(last=False)

    def _reject(self, name: str, reason: str) -> None:
        self._rejects[name] = min(reason, self._rejects.get(name, reason))

    def _end_piece(self, *, last: bool) -> None:
        """Have the piece written while the next one fills, once the one before is written."""
        self._written()
        self._writing = self._writer.submit(
            write_piece,
            piece_path(self._job.work, self._stem, self._number),
            self._records,
            part=self._part.name,
            first=self._first,
            end=self._end,
            last=last,
            keys=self._keys.hexdigest(),
            unwanted=self._unwanted,
            absent=self._absent,
            rejects=sorted(self._rejects.items()),
        )
        self._number += 1
        self._begin_piece()

    def _written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._can_write = False
            writing.result()
            self._can_write = True

    def _keep_what_is_done(self, error: BaseException) -> None:
        """A piece of the images that are encoded. A run that is stopped does not wait for an upload."""
        stopped = not isinstance(error, Exception) or isinstance(error, Interrupted)
        if stopped:
            for image in self._waiting:
                if isinstance(image.outcome, Future):
                    image.outcome.cancel()
        if isinstance(error, _OtherImages) or not self._can_write or (stopped and storage.is_remote(self._job.work)):
            return
        while self._waiting and _is_whole(self._waiting[0].outcome, wait=not stopped):
            self._take()
        with contextlib.suppress(StorageError):
            if self._end > self._first:
                self._end_piece(last=False)
            self._written()


def _is_whole(outcome: Future | _Absent | str | None, *, wait: bool) -> bool:
    if not isinstance(outcome, Future):
        return True
    if not outcome.done() and not wait:
        return False
    return not outcome.cancelled() and isinstance(outcome.exception(), BadImage | None)


def _bad_key(key: object) -> str | None:
    if not isinstance(key, str):
        return f"the key is {type(key).__name__}, not a string"
    if not key:
        return "the key is empty"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "the key (file name) is not valid UTF-8: rename the file"
    return f"the key has {size} bytes, at most {_MAX_KEY_BYTES} are allowed" if size > _MAX_KEY_BYTES else None


def _record(
    key: str, digest: bytes, payload: bytes | str | os.PathLike[str], job: EncodeJob
) -> tuple[int, bytes, bytes]:
    """One image, in a worker thread: (shard, digest, packed record). Raises BadImage, or StorageError for a path
    that a server does not give."""
    settings = job.settings
    if not isinstance(payload, bytes):
        path = os.fspath(payload)
        try:
            payload = storage.read_bytes(path, MAX_IMAGE_BYTES)
        except storage.TooLargeError as error:
            raise BadImage(str(error.strerror)) from error
        except OSError as error:
            # What a server refuses now it may give later: only a file that is not there is the image's own fault.
            if storage.is_remote(path) and not isinstance(error, FileNotFoundError):
                raise
            raise BadImage(f"unreadable: {error}") from error
    image = prepare_image(
        payload,
        size=settings.size,
        resize=settings.resize,
        quality=settings.quality,
        chroma=settings.chroma,
        max_pixels=settings.max_pixels,
        strict=settings.strict,
    )
    return shard_of(digest, job.num_shards), digest, pack(key, digest, len(payload), image)
