"""Scores of many images: one Parquet file a part of the images, whole or absent, so that a stopped job goes on.

`<out>/` holds prediction.json (what is predicted with what; another job is refused there), classes.csv,
scores/<part>.parquet, and once all parts are done rejects.csv (key, reason) with every image that could not be used.
"""

import contextlib
import dataclasses
import functools
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paml import storage
from paml.data.decode import UndecodableError
from paml.errors import DataError, SettingsError
from paml.predict.predictor import Precision, Predicted, Predictor, open_predictor
from paml.reading import MISSHAPEN, parse_json, read_facts
from paml.shards.manifest import MANIFEST_NAME, Manifest, rejects_csv
from paml.shards.progress import Progress, showing
from paml.shards.reader import CorruptSample, ShardReader
from paml.shards.tasks import Context, Interrupted, LocalTasks, Tasks
from paml.shards.write import PartsFailed
from paml.sources.fetch import read_object
from paml.sources.folder import KeyRule, folder_parts
from paml.sources.parts import Part, Payload, mark_of
from paml.spreadsheet import ReportWriter
from paml.training.allocator import keep_memory

SCHEMA_VERSION = 1
_ROWS = 2048
"""Rows held in memory before they are written."""
_FOOTERS = 16
_TASK_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """What is written of each image, and how it is computed."""

    top: int | None = 20
    """Classes of each image, those of the highest scores; null for all, in the order of classes.csv."""
    value: Literal["probability", "logit"] = "probability"
    """probability: calibrated where the model is; logit: as evaluation ranks them, without ties near 0 and 1."""
    maps: bool = False
    """Also the boosted maps of these classes, float16 [h·w] each; needs `top`."""
    batch_size: int = 64
    """Images in one pass of the network."""
    per_part: int = 2000
    """Files in one part, of a folder or bucket; of shards each one is a part."""
    keys: KeyRule = "path"
    """Keys of a folder's files, both without suffix: path below the folder, or name alone."""
    precision: Precision = "fp32"
    """What the network computes in; auto takes 16 bit where the device computes in it, and scores differ a little."""
    cache_dir: str | None = None
    """Folder for shards of a bucket; null takes $PAML_CACHE or ~/.cache/paml."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "per_part"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"bulk.{name} is {value}; it must be at least 1")
        if self.value not in ("probability", "logit"):
            raise SettingsError(f"bulk.value is {self.value!r}; allowed are probability, logit")
        if self.keys not in ("path", "name"):
            raise SettingsError(f"bulk.keys is {self.keys!r}; allowed are path, name")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise SettingsError(f"bulk.precision is {self.precision!r}; allowed are auto, bf16, fp16, fp32")
        if self.maps and self.top is None:
            raise SettingsError("bulk.maps is true and bulk.top null; maps of all classes fill disks: set bulk.top")


class PartDone(NamedTuple):
    """What became of one part."""

    name: str
    images: int
    rejects: list[tuple[str, str]]
    """(key, reason) of images that could not be used."""


class Outcome(NamedTuple):
    """What a prediction leaves."""

    images: int
    """Rows, over all parts."""
    rejected: int
    found: int
    """Parts that an earlier call had done."""


@dataclasses.dataclass(frozen=True)
class ShardPart:
    """The images of one shard."""

    name: str
    folder: str
    shard: int
    images: int
    bytes: int
    cache_dir: str | None

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        reader = _reader(self.folder, self.cache_dir)
        rows = reader.manifest.rows_of_shard(self.shard)
        try:
            for index in range(rows.start, rows.stop):
                key = reader.manifest.key(index)
                try:
                    yield key, reader.read(index)
                except CorruptSample as error:
                    yield key, error
        finally:
            reader.release([self.shard])


@functools.lru_cache(maxsize=1)
def _reader(folder: str, cache_dir: str | None) -> ShardReader:
    return ShardReader(Manifest.open(folder), cache_dir)


def image_parts(source: str, settings: BulkSettings) -> Sequence[Part]:
    """The parts of a folder of shards (one that holds a manifest) or of images, local or s3://. Raises DataError."""
    if not storage.exists(storage.join(source, MANIFEST_NAME)):
        return folder_parts(source, settings.per_part, keys=settings.keys)
    manifest = Manifest.open(source)
    return [
        ShardPart(
            f"{PurePosixPath(info.name).stem}-{mark_of([info.sha256])}",
            source,
            number,
            info.count,
            info.bytes,
            settings.cache_dir,
        )
        for number, info in enumerate(manifest.shards)
    ]


@dataclasses.dataclass(frozen=True)
class BulkJob:
    """What all tasks share; travels to them."""

    model: str
    out: str
    settings: BulkSettings
    digest: str
    """Of the model."""
    device: str
    """Where the tasks compute."""
    mark: str
    """Digest of all that decides the rows; a part of another one is made anew."""

    def memory(self, threads: int) -> int:
        """Bytes that a task is counted with: the network, its activations and two batches of pictures."""
        return _TASK_BYTES


def predict_images(
    model: str,
    source: str,
    out: str,
    settings: BulkSettings,
    *,
    device: str | None = None,
    tasks: Tasks | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Score all images of `source` into `out` with the model that `open_predictor` opens.

    `device`: where the tasks compute; by default on the GPU of this process, if it has one, else on the CPU.
    Parts that are there already are kept, so that the same call goes on where an earlier one was stopped. Raises
    SettingsError where `out` holds another prediction, DataError where the source has no image or none of them can be
    used, PartsFailed with the parts that failed once all others are done, StorageError.
    """
    global _held
    storage.ensure_writable(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        keep_memory()
    predictor = open_predictor(model, precision=settings.precision)
    if settings.top is not None and settings.top > len(predictor.facts.classes):
        raise SettingsError(
            f"bulk.top is {settings.top}; the model has {len(predictor.facts.classes)} classes: take fewer, or null"
        )
    about = _about(predictor, source, settings)
    mark = mark_of([json.dumps(about, sort_keys=True)])
    job = BulkJob(predictor.source, out, settings, predictor.digest(), device, mark)
    if device == "cpu":
        _held = (mark, predictor)
    parts = image_parts(source, settings)
    _claim(out, about, predictor)
    by_name = {part.name: part for part in parts}
    held = _held_parts(job, set(by_name))
    todo = [(name, part) for name, part in by_name.items() if name not in held]
    before = sum(part.images + len(part.rejects) for part in held.values())
    total = sum(part.images or 0 for part in parts)
    if held:
        say(f"{len(held):,} of {len(parts):,} parts are done ({before:,} images), the other {len(todo):,} follow")
    with showing(progress, say) as show:
        show("images", before, total)
        done, failures = (tasks or LocalTasks()).run(
            score_part, job, todo, lambda count: show("images", before + count, total)
        )
    if failures:
        raise PartsFailed(failures, len(parts), "parts")
    ended = [*held.values(), *done]
    rejects = [reject for part in ended for reject in part.rejects]
    storage.write_bytes(storage.join(out, "rejects.csv"), rejects_csv(rejects))
    images = sum(part.images for part in ended)
    if not images:
        raise DataError(f"none of the {len(rejects):,} images of {source} can be used, first {rejects[0]}")
    return Outcome(images, len(rejects), len(held))


def read_part(job: BulkJob, name: str) -> PartDone | None:
    """A part that is whole; None where it is absent, cut, or of another job."""
    path = _part_path(job.out, name)
    if not storage.exists(path):
        return None
    try:
        with storage.open_input(path) as file:
            found = pq.read_metadata(file)
            facts = {key.decode(): value.decode() for key, value in (found.metadata or {}).items()}
        if facts.get("mark") != job.mark:
            return None
        rejects = [(str(key), str(reason)) for key, reason in parse_json(facts["rejects"])]
        return PartDone(name, found.num_rows, rejects)
    except storage.StorageError:
        raise
    except (*MISSHAPEN, OSError):  # pyarrow says of a footer that cannot be that it is an OSError
        return None


def score_part(job: BulkJob, part: Part, context: Context) -> PartDone:
    """Score the images of one part and write its file. Holds two batches of pictures and the rows of the part.

    The next batch is read and decoded by the pool's threads while the network works on this one.
    """
    predictor, path = _opened(job), _part_path(job.out, part.name)
    rejects: list[tuple[str, str]] = []
    with storage.replacing(path) as temporary:
        rows = _Rows(temporary, job, predictor)
        batches = _batches(part, job.settings.batch_size)
        waiting = _submit(next(batches, []), predictor, context)
        while waiting:
            if context.stopped():
                raise Interrupted(part.name)
            following = _submit(next(batches, []), predictor, context)
            faults = [one.future.result() for one in waiting]
            good = [place for place, fault in enumerate(faults) if fault is None]
            rejects += [(one.key, fault) for one, fault in zip(waiting, faults, strict=True) if fault is not None]
            if good:
                pixels = waiting[0].pixels
                if len(good) < len(waiting):
                    pixels = pixels[good]
                rows.add([waiting[place].key for place in good], predictor.predict(pixels, maps=job.settings.maps))
            waiting = following
            context.tick(rows.count + len(rejects))
        rows.finish(rejects)
    return PartDone(part.name, rows.count, rejects)


class _Waiting(NamedTuple):
    key: str
    pixels: np.ndarray
    """uint8 [b, S, S, 3], of the whole batch."""
    future: "Future[str | None]"
    """Why the image cannot be used, once known; None for a good one."""


def _batches(part: Iterable[tuple[str, Payload]], size: int) -> Iterator[list[tuple[str, Payload]]]:
    batch = []
    for image in part:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _submit(batch: list[tuple[str, Payload]], predictor: Predictor, context: Context) -> list[_Waiting]:
    side = predictor.facts.image_size
    pixels = np.empty((len(batch), side, side, 3), np.uint8)
    return [
        _Waiting(key, pixels, context.pool.submit(_decode, predictor, payload, pixels[place]))
        for place, (key, payload) in enumerate(batch)
    ]


def _decode(predictor: Predictor, payload: Payload, out: np.ndarray) -> str | None:
    if isinstance(payload, Exception):
        return str(payload)
    data = payload if isinstance(payload, bytes) else read_object(str(payload))
    if isinstance(data, Exception):
        return str(data)
    try:
        predictor.decode(data, out)
    except UndecodableError as error:
        return str(error)
    return None


class _Rows:
    """The rows of a part, written as they come; `finish` makes the file whole."""

    def __init__(self, path: str, job: BulkJob, predictor: Predictor) -> None:
        self._job, self._settings = job, job.settings
        self._mids = pa.array(predictor.facts.classes, pa.string())
        self._writer = pq.ParquetWriter(path, _schema(job.settings), compression="zstd")
        self._tables: list[pa.Table] = []
        self._map_size: tuple[int, int] | None = None
        self.count = 0

    def add(self, keys: list[str], found: Predicted) -> None:
        values = found.scores_BK if self._settings.value == "probability" else found.logits_BK
        columns: list[pa.Array] = [pa.array(keys, pa.string())]
        if self._settings.top is None:
            columns.append(_lists(values))
        else:
            order = top_classes(values, self._settings.top)
            columns.append(_listed(self._mids.take(pa.array(order.ravel())), len(keys)))
            columns.append(_lists(np.take_along_axis(values, order, 1)))
            if found.maps_BKHW is not None:
                maps = np.take_along_axis(found.maps_BKHW, order[:, :, None, None], 1)
                self._map_size = maps.shape[2:]
                columns.append(_listed(_lists(maps.reshape(order.size, -1)), len(keys)))
        self._tables.append(pa.Table.from_arrays(columns, schema=self._writer.schema))
        self.count += len(keys)
        if sum(table.num_rows for table in self._tables) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._tables = []

    def finish(self, rejects: list[tuple[str, str]]) -> None:
        """Write what is left and, last, the facts by which the part is known."""
        self._flush()
        facts = {
            "schema_version": str(SCHEMA_VERSION),
            "mark": self._job.mark,
            "value": self._settings.value,
            "rejects": json.dumps(rejects),
        }
        if self._settings.top is None:
            facts["mids"] = json.dumps(self._mids.to_pylist())
        if self._map_size is not None:
            facts["map_size"] = json.dumps(self._map_size)
        self._writer.add_key_value_metadata(facts)
        self._writer.close()


def _schema(settings: BulkSettings) -> pa.Schema:
    fields = [("key", pa.string()), ("scores", pa.list_(pa.float16()))]
    if settings.top is not None:
        fields.insert(1, ("mids", pa.list_(pa.string())))
    if settings.maps:
        fields.append(("maps", pa.list_(pa.list_(pa.float16()))))
    return pa.schema(fields)


def top_classes(values_BK: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: classes of the highest values, highest first, equal ones by their index."""
    count = min(count, values_BK.shape[1])
    return np.argsort(-values_BK, axis=1, kind="stable")[:, :count]


def _lists(values: np.ndarray) -> pa.Array:
    """float [rows, n] as `rows` lists of float16."""
    return _listed(pa.array(values.astype(np.float16).ravel(), pa.float16()), len(values))


def _listed(flat: pa.Array, rows: int) -> pa.Array:
    """`flat` in `rows` lists of one length."""
    offsets = np.arange(rows + 1, dtype=np.int32) * (len(flat) // rows)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _part_path(out: str, name: str) -> str:
    return storage.join(out, "scores", f"{name}.parquet")


def _about(predictor: Predictor, source: str, settings: BulkSettings) -> dict[str, Any]:
    """All that decides the rows."""
    kept = ("top", "value", "maps", "precision", "keys", "per_part")
    return {
        "schema_version": SCHEMA_VERSION,
        "images": source,
        "model": predictor.source,
        "model_digest": predictor.digest(),
        **{name: getattr(settings, name) for name in kept},
    }


def _claim(out: str, about: dict[str, Any], predictor: Predictor) -> None:
    """Write what `out` is for, or refuse it where it is for something else."""
    path = storage.join(out, "prediction.json")
    with contextlib.suppress(FileExistsError):
        storage.write_bytes(path, json.dumps(about, indent=1).encode(), if_absent=True)
    held = read_facts(path, "give another --out")
    other = [
        f"{name}: {held.get(name)!r} there, {value!r} now" for name, value in about.items() if held.get(name) != value
    ]
    if other:
        raise SettingsError(
            f"{out} holds another prediction ({'; '.join(other)}): give another --out, or go on with what it was for"
        )
    thresholds = None if predictor.calibration is None else predictor.calibration.threshold
    lines = io.StringIO()
    writer = ReportWriter(lines)
    writer.writerow(("class_index", "mid", "name", "threshold"))
    for index, (mid, name) in enumerate(zip(predictor.facts.classes, predictor.facts.names, strict=True)):
        known = thresholds is not None and np.isfinite(thresholds[index])
        shown = f"{thresholds[index]:.6g}" if known else ""  # pyright: ignore
        writer.writerow((index, mid, name, shown))
    storage.write_bytes(storage.join(out, "classes.csv"), lines.getvalue().encode())


def _held_parts(job: BulkJob, names: set[str]) -> dict[str, PartDone]:
    """The parts that are whole. Raises SettingsError where there are parts that the source does not have."""
    suffix = ".parquet"
    files = storage.list_files(storage.join(job.out, "scores"))
    there = {file.removesuffix(suffix) for file in files if file.endswith(suffix)}
    if other := sorted(there - names):
        raise SettingsError(
            f"{job.out}/scores holds {len(other):,} parts that the images do not have (any more), such as {other[0]}: "
            "images were added or changed. Give another --out, or remove those files"
        )
    with ThreadPoolExecutor(_FOOTERS, thread_name_prefix="paml-parts") as pool:
        found = pool.map(lambda name: read_part(job, name), sorted(there))
        return {part.name: part for part in found if part is not None}


_held: "tuple[str, Predictor] | None" = None
_opening = threading.Lock()


def _opened(job: BulkJob) -> Predictor:
    """One predictor a process, which its tasks share. Raises DataError where the model has changed since the start."""
    global _held
    with _opening:
        if _held is None or _held[0] != job.mark:
            if job.device == "cpu":
                keep_memory()
            predictor = open_predictor(job.model, device=job.device, precision=job.settings.precision)
            if predictor.digest() != job.digest:
                raise DataError(f"the model {job.model} has changed since the prediction began: begin another --out")
            _held = (job.mark, predictor)
        return _held[1]
