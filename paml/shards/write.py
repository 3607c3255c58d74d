"""Write images as WebDataset shards with a manifest: the same bytes whatever the source's order or workers.

Two passes. The first reads the source once, encodes each image and appends it to the spill file of its shard
(`spill.py`). The second sorts each spill file by the keys' hashes and writes it as a tar file. Both go on
where they stood when a run is cut off and the same call is made again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.errors import DataError, SettingsError
from paml.shards.images import BadImage, Resize, prepare_image
from paml.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    batch_bytes,
    make_batch,
    rejects_csv,
    write_manifest,
)
from paml.shards.spill import (
    DamagedSpill,
    KeySet,
    Record,
    Spill,
    key_digest,
    pack,
    read_records,
    shard_of,
    writing,
)
from paml.storage import StorageError

Payload = bytes | str | os.PathLike[str] | Exception
"""An image's bytes, or the path of its file (local or remote), or why the source could not read it."""
Progress = Callable[[str, int, int], None]
"""Called with (what is done: "images" or "shards", how many, of how many)."""

REJECTS_NAME = "rejects.csv"
_BLOCK = 512
_ESCAPED = re.compile(r"[%./\\\x00-\x1f\x7f]")
_MAX_KEY_BYTES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How images become shards. The bytes of the shards depend on these and on the images alone."""

    size: int = 448
    """Side of the stored images in pixels, from 16 to 8192; unused with `original`."""
    resize: Resize = "squash"
    """`squash`: both sides become `size`, as in the papers. `shorter_side`: the shorter side comes down to
    `size`, aspect kept, never enlarged. `original`: the bytes stay as they are (jpg, png and webp)."""
    quality: int = 90
    """Of the JPEG encoding (baseline, 4:2:0), 1 to 100; unused with `original`."""
    samples_per_shard: int = 2000
    """Images a shard holds on average: sizes vary by about the square root of it."""
    seed: int = 0
    """Of the hash that gives an image its shard and its place in it."""
    strict: bool = True
    """Refuse JPEG files that decode only with the decoder's warnings (corrupt data); False keeps them."""
    max_pixels: int = 1 << 27
    """Images with more pixels are refused, so that one file cannot use up the memory."""

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "shorter_side", "original"):
            raise SettingsError(f"shards.resize is {self.resize!r}: set it to squash, shorter_side or original")
        for name, low, high in (
            ("size", 16, 8192),
            ("quality", 1, 100),
            ("samples_per_shard", 1, 10_000_000),
            ("seed", 0, 2**64 - 1),
            ("max_pixels", 1, 2**40),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SettingsError(f"shards.{name} is {value!r}: set it to a whole number from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What a run of `write_shards` did."""

    folder: str
    written: int
    """Images in the shards."""
    rejected: int
    """Broken, unreadable or missing ones; each is named in rejects.csv."""
    missing: int
    """Of the rejected: wanted keys that no source had."""
    duplicates: int
    """Images whose key had been seen: the first usable one was kept."""
    unwanted: int
    """Images whose key was not among the wanted ones: skipped."""
    shards: int
    bytes: int
    """Of all tar files."""
    digest: str
    """Of all shards."""
    already_done: bool = False
    """The folder held the finished shards of the same settings: nothing was read or written."""

    def __str__(self) -> str:
        text = (
            f"{self.written:,} images in {self.shards} shards ({self.bytes / 1e6:,.1f} MB) in {self.folder}; "
            f"{self.rejected:,} rejected"
        )
        if self.missing:
            text += f" ({self.missing:,} of them wanted and not found)"
        if self.rejected:
            text += f", see {REJECTS_NAME}"
        if self.duplicates:
            text += f"; {self.duplicates:,} duplicate keys (first one kept)"
        if self.unwanted:
            text += f"; {self.unwanted:,} not wanted"
        return text + ("; was finished already" if self.already_done else "")


def write_shards(
    source: Iterable[tuple[str, Payload]],
    out_folder: str | os.PathLike[str],
    settings: ShardSettings | None = None,
    *,
    expected_count: int | None = None,
    wanted_keys: Iterable[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    work_folder: str | os.PathLike[str] | None = None,
) -> ShardReport:
    """Write the images of `source` as shards, `manifest.arrow` and `rejects.csv` to `out_folder`.

    `source` gives (key, payload) pairs, e.g. `iter_folder` or `iter_tars`. Keys may hold any character; in the
    tar files those that WebDataset would cut at (dot) or that name folders are written as %2E and so on, while
    the manifest has the true key. `expected_count` fixes the number of shards; it defaults to `len(source)`,
    else to the number of wanted keys. `wanted_keys` limits the shards to these; those that no source has are
    reported. `workers` threads decode and encode (default: all cores). Without `progress` a bar is shown on a
    terminal. Intermediate files need about as much disk as the shards; they lie in `work_folder`, by default
    `.partial` in the output folder, or for remote output below the machine's folder for temporary files.

    A call that was cut off goes on where it stood when made again with the same settings and source; on a
    finished folder it returns at once. Raises StorageError for a full or unwritable folder, SettingsError
    where the folder holds shards of other settings, DataError where not one image was usable.
    """
    settings = settings or ShardSettings()
    out = os.fspath(out_folder)
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        return _finished_report(out, settings)
    storage.ensure_writable(out)
    work = Path(work_folder) if work_folder is not None else _default_work_folder(out)
    wanted = None if wanted_keys is None else list(dict.fromkeys(wanted_keys))
    if expected_count is None:
        if isinstance(source, Sized):
            expected_count = len(source)
        elif wanted is not None:
            expected_count = len(wanted)
        else:
            raise SettingsError("the source does not tell its length: give expected_count, an estimate will do")
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    with _only_writer(work), _reporter(progress) as report:
        num_shards = _plan(work, settings, expected_count)
        job = _Job(out, work, settings, num_shards, workers or os.cpu_count() or 1, report)
        while True:
            counts = job.spill_images(source, wanted, expected_count)
            try:
                shards, batch = job.write_tars()
                break
            except DamagedSpill as damage:
                if iter(source) is source:
                    raise DataError(
                        f"an intermediate file was damaged ({damage}) and has been removed: make the "
                        "same call again to redo its images"
                    ) from damage
        result = job.finish(shards, batch, counts)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _finished_report(out: str, settings: ShardSettings) -> ShardReport:
    manifest = Manifest.open(out)
    if manifest.settings != dataclasses.asdict(settings):
        have = manifest.settings or "none: they were indexed, not written here"
        raise SettingsError(
            f"{out} holds finished shards of other settings ({have}), asked for "
            f"{dataclasses.asdict(settings)}: choose another folder, or delete this one"
        )
    return ShardReport(**{**manifest.report, "folder": out, "digest": manifest.digest, "already_done": True})


def _default_work_folder(out: str) -> Path:
    if not storage.is_remote(out):
        return Path(out) / ".partial"
    name = hashlib.sha256(out.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"paml-shards-{os.getuid()}-{name}"


@contextlib.contextmanager
def _only_writer(work: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with writing(work):
            lock = stack.enter_context(open(work / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another run is writing the same shards (it holds {work / 'lock'}): wait for it or stop it"
            ) from None
        yield


@contextlib.contextmanager
def _reporter(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
    elif not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
    else:
        from tqdm import tqdm

        bars: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = tqdm(total=total, unit=f" {what}", unit_scale=total > 100_000, smoothing=0.05)
            bars[what].update(done - bars[what].n)

        try:
            yield show
        finally:
            for bar in bars.values():
                bar.close()


def _plan(work: Path, settings: ShardSettings, expected_count: int) -> int:
    """The number of shards: of the run that goes on, else from the expected number of images."""
    path = work / "plan.json"
    mine = dataclasses.asdict(settings)
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["settings"] != mine:
            raise SettingsError(
                f"{work} holds a cut-off run of other settings ({plan['settings']}), asked for {mine}: "
                "use those settings to go on, or delete that folder to start anew"
            )
        return plan["num_shards"]
    if expected_count < 1:
        raise SettingsError(
            f"{expected_count} images are expected: name a source that holds some, or give expected_count "
            "(an estimate will do)"
        )
    num_shards = math.ceil(expected_count / settings.samples_per_shard)
    storage.write_bytes(str(path), json.dumps({"settings": mine, "num_shards": num_shards}).encode())
    return num_shards


def member_key(key: str) -> str:
    """A key as WebDataset's tar members have it: % . / \\ and control characters as %XX."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", key)


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


class _Job:
    def __init__(
        self, out: str, work: Path, settings: ShardSettings, num_shards: int, workers: int, report: Progress
    ) -> None:
        self.out, self.work, self.settings = out, work, settings
        self.num_shards, self.workers, self.report = num_shards, workers, report

    def _tar_name(self, shard: int) -> str:
        return f"shard-{shard:06d}.tar"

    def _part_path(self, shard: int) -> Path:
        return self.work / f"part-{shard:06d}.arrow"

    def _finished(self) -> set[int]:
        """Shards that are in place whole; the description of one that is gone is removed."""
        finished = set()
        for shard in range(self.num_shards):
            path = self._part_path(shard)
            if path.exists():
                info, _ = _read_part(path)
                tar = storage.join(self.out, info.name)
                if info.count == 0 or (storage.exists(tar) and storage.size_of(tar) == info.bytes):
                    finished.add(shard)
                else:
                    path.unlink()
        return finished

    def spill_images(
        self, source: Iterable[tuple[str, Payload]], wanted: list[str] | None, expected_count: int
    ) -> dict[str, Any]:
        """Pass 1. Returns the counts; a pass that is complete on disk is not repeated."""
        spill = Spill(self.work, self.num_shards, finished=self._finished())
        complete = self.work / "images.json"
        if complete.exists():
            if not spill.lost:
                return json.loads(complete.read_text())
            complete.unlink()
        seed = self.settings.seed
        wanted_set = None if wanted is None else KeySet.of([key_digest(seed, key) for key in wanted])
        found = np.zeros(0 if wanted_set is None else len(wanted_set), bool)
        rejects: dict[str, str] = {}
        seen = unwanted = 0
        waiting: deque[tuple[str, bytes, Future[bytes]]] = deque()

        def take() -> None:
            key, digest, future = waiting.popleft()
            try:
                record = future.result()
            except BadImage as bad:
                rejects.setdefault(key, str(bad))
                return
            spill.add(shard_of(digest, self.num_shards), digest, record)

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="paml-shards")
        try:
            for sequence, (key, payload) in enumerate(source):
                seen += 1
                if seen % 64 == 0:
                    self.report("images", seen, max(seen, expected_count))
                fault = _bad_key(key)
                if fault is not None:
                    rejects.setdefault(repr(key) if key else f"image {sequence} of the source", fault)
                    continue
                digest = key_digest(seed, key)
                if wanted_set is not None and not isinstance(payload, Exception):
                    place = wanted_set.find(digest)
                    if place < 0:
                        unwanted += 1
                        continue
                    found[place] = True
                if spill.done.find(digest) >= 0:
                    continue
                waiting.append((key, digest, pool.submit(_work, key, digest, sequence, payload, self.settings)))
                if len(waiting) > 4 * self.workers:
                    take()
            while waiting:
                take()
        except BaseException as error:
            if not isinstance(error, StorageError):
                with contextlib.suppress(StorageError):
                    while waiting:
                        take()
                    spill.flush()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        spill.flush()
        self.report("images", seen, seen)
        missing = 0
        if wanted is not None and wanted_set is not None:
            for key in wanted:
                if not found[wanted_set.find(key_digest(seed, key))]:
                    rejects[key] = "wanted, but in no source"
                    missing += 1
        counts = {"seen": seen, "unwanted": unwanted, "missing": missing, "rejects": sorted(rejects.items())}
        storage.write_bytes(str(complete), json.dumps(counts).encode())
        return counts

    def write_tars(self) -> tuple[list[ShardInfo], pa.RecordBatch]:
        """Pass 2. Raises DamagedSpill once a damaged spill file has been removed."""
        shards, batches = [], []
        for shard in range(self.num_shards):
            if not self._part_path(shard).exists():
                self._write_tar(shard)
            info, batch = _read_part(self._part_path(shard))
            with contextlib.suppress(FileNotFoundError):
                (self.work / f"spill-{shard:06d}.bin").unlink()
            if info.count:
                column = pa.array(np.full(batch.num_rows, len(shards), np.int32))
                batches.append(batch.set_column(1, batch.schema.field(1), column))
                shards.append(info)
            self.report("shards", shard + 1, self.num_shards)
        if not batches:
            return [], make_batch(
                **dict.fromkeys(("shard", "offset", "size", "crc32", "width", "height"), np.zeros(0)), keys=[]
            )
        table = pa.Table.from_batches([b.replace_schema_metadata(None) for b in batches]).combine_chunks()
        return shards, table.to_batches()[0]

    def _write_tar(self, shard: int) -> None:
        spill = self.work / f"spill-{shard:06d}.bin"
        data = memoryview(b"")
        if spill.exists() and spill.stat().st_size:
            with open(spill, "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            records = _sorted_unique(read_records(data))
        except DamagedSpill as damage:
            spill.unlink()
            raise DamagedSpill(f"{spill}: {damage}") from damage
        name = self._tar_name(shard)
        if records:
            with storage.replacing(storage.join(self.out, name)) as temporary, writing(temporary):
                info, offsets = _write_tar_file(temporary, name, data, records)
        else:
            info, offsets = ShardInfo(name, 0, 0, ""), []
        batch = make_batch(
            keys=[r.key for r in records],
            shard=np.zeros(len(records), np.int32),
            offset=np.array(offsets, np.int64),
            size=np.array([r.size for r in records], np.int32),
            crc32=np.array([r.crc32 for r in records], np.uint32),
            width=np.array([r.width for r in records], np.int32),
            height=np.array([r.height for r in records], np.int32),
        )
        metadata = {"info": json.dumps(dataclasses.asdict(info))}
        storage.write_bytes(str(self._part_path(shard)), batch_bytes(batch.replace_schema_metadata(metadata)))

    def finish(self, shards: list[ShardInfo], batch: pa.RecordBatch, counts: dict[str, Any]) -> ShardReport:
        """Write the rejects, then the manifest, which makes the folder a finished one."""
        rejects = dict(counts["rejects"])
        if rejects:
            names = list(rejects)
            usable = pc.call_function("is_in", [pa.array(names, pa.string())], pc.SetLookupOptions(batch.column("key")))
            for name, is_usable in zip(names, usable.to_pylist(), strict=True):
                if is_usable:  # another source had a sound copy
                    del rejects[name]
        storage.write_bytes(storage.join(self.out, REJECTS_NAME), rejects_csv(list(rejects.items())))
        if not batch.num_rows:
            raise DataError(
                f"not one of {counts['seen']:,} images was usable for {self.out}: see {REJECTS_NAME} there "
                f"for the {len(rejects):,} reasons"
            )
        present = len(rejects) - counts["missing"]
        report = ShardReport(
            folder=self.out,
            written=batch.num_rows,
            rejected=len(rejects),
            missing=counts["missing"],
            duplicates=counts["seen"] - counts["unwanted"] - batch.num_rows - present,
            unwanted=counts["unwanted"],
            shards=len(shards),
            bytes=sum(s.bytes for s in shards),
            digest="",
        )
        fields = {k: v for k, v in dataclasses.asdict(report).items() if k not in ("folder", "digest", "already_done")}
        manifest = write_manifest(self.out, batch, shards, settings=dataclasses.asdict(self.settings), report=fields)
        return dataclasses.replace(report, digest=manifest.digest)


def _work(key: str, digest: bytes, sequence: int, payload: Payload, settings: ShardSettings) -> bytes:
    """One image to its spill record, in a worker thread. Raises BadImage."""
    if isinstance(payload, Exception):
        raise BadImage(str(payload))
    if not isinstance(payload, bytes):
        try:
            payload = storage.read_bytes(os.fspath(payload))
        except OSError as error:
            raise BadImage(f"unreadable: {error}") from error
    image = prepare_image(
        payload,
        size=settings.size,
        resize=settings.resize,
        quality=settings.quality,
        max_pixels=settings.max_pixels,
        strict=settings.strict,
    )
    return pack(key, digest, sequence, image)


def _sorted_unique(records: Iterable[Record]) -> list[Record]:
    ordered = sorted(records, key=lambda r: (r.digest, r.key, r.sequence))
    return [r for i, r in enumerate(ordered) if i == 0 or r.key != ordered[i - 1].key]


class _HashingFile:
    def __init__(self, file: Any) -> None:
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _write_tar_file(path: str, name: str, data: memoryview, records: list[Record]) -> tuple[ShardInfo, list[int]]:
    """Write a tar file. Returns what it is and the offset of each image in it."""
    from webdataset.writer import TarWriter  # brings in torch where that is installed: seconds

    offsets = []
    with open(path, "wb", buffering=1 << 20) as file:
        out = _HashingFile(file)
        # PAX takes names of any length and alphabet; plain names look as in USTAR. An int for the time, since
        # PAX would write a header for a float.
        writer = TarWriter(
            cast(Any, out),
            encoder=False,
            compress=False,
            mtime=0,
            user="paml",
            group="paml",
            mode=0o444,
            format="PAX_FORMAT",
        )
        with writer:
            for record in records:
                image = bytes(data[record.start : record.start + record.size])
                writer.write({"__key__": member_key(record.key), record.extension: image})
                offsets.append(writer.tarstream.offset - -(-record.size // _BLOCK) * _BLOCK)
    return ShardInfo(name, len(records), out.size, out.sha256.hexdigest()), offsets


def _read_part(path: Path) -> tuple[ShardInfo, pa.RecordBatch]:
    with pa.OSFile(str(path), "rb") as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    return ShardInfo(**json.loads(batch.schema.metadata[b"info"])), batch
