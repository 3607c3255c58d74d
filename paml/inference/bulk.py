"""Prediction of many images into one Parquet file per part of the images, complete or absent, so it can be resumed.

Output folder: prediction.json (images, model and settings; other predictions are refused), classes.csv,
scores/<part>.parquet and, after all parts, rejects.csv (key, reason) with the images that could not be used.
"""

import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paml import storage
from paml.data.decode import UndecodableError
from paml.errors import DataError, SettingsError, check_setting
from paml.inference.predictor import ModelOutput, Precision, Predictor, open_predictor
from paml.parsing import PARSE_ERRORS, parse_json
from paml.progress import Progress, progress_display
from paml.shards.manifest import MANIFEST_NAME, Manifest, write_rejects
from paml.shards.reader import CorruptSampleError, ShardReader
from paml.sources.fetch import read_object
from paml.sources.folder import folder_parts
from paml.sources.parts import KeyRule, Part, Payload, fingerprint
from paml.spreadsheet import format_csv
from paml.tasks import LocalTaskRunner, TaskContext, TaskInterrupted, TaskRunner, claim_folder, read_ahead, run_tasks
from paml.training.allocator import retain_freed_memory

SCHEMA_VERSION = 1
ScoreKind = Literal["probability", "logit"]
_ROWS_PER_WRITE = 2048
_FOOTER_THREADS = 16
_TASK_MEMORY_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """What to store for each image, and how to compute it."""

    top: int | None = 20
    """Number of classes to store, those of the highest scores; null stores all, in the order of classes.csv."""
    value: ScoreKind = "probability"
    """probability: calibrated if the model is; logit: as ranked in evaluation, without ties near 0 and 1."""
    maps: bool = False
    """Also store the boosted maps of these classes, float16 [h·w] each; needs `top`."""
    batch_size: int = 64
    """Images per forward pass."""
    files_per_part: int = 2000
    """Files per part for a folder or bucket; for shards, each shard is a part."""
    keys: KeyRule = "path"
    """Keys of the files of a folder: path below the folder, or name, both without suffix."""
    precision: Precision = "fp32"
    """Precision of the network; auto uses 16 bit if the device supports it, which changes scores slightly."""
    cache_dir: str | None = None
    """Cache folder for remote shards; null uses $PAML_CACHE or ~/.cache/paml."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "files_per_part"):
            value = getattr(self, name)
            check_setting(value is None or value >= 1, f"bulk.{name}", value, "at least 1")
        for name, kind in (("value", ScoreKind), ("keys", KeyRule), ("precision", Precision)):
            choices, value = get_args(kind), getattr(self, name)
            check_setting(value in choices, f"bulk.{name}", value, f"one of {', '.join(choices)}")
        if self.maps and self.top is None:
            raise SettingsError(
                "bulk.maps is true and bulk.top is null: set bulk.top; maps of all classes are too large"
            )


class PartResult(NamedTuple):
    """A completed part."""

    name: str
    images: int
    rejects: list[tuple[str, str]]
    """(key, reason) of images that could not be used."""


class BulkResult(NamedTuple):
    """A completed prediction: images with a row, images that could not be used, parts done by an earlier call."""

    images: int
    rejected: int
    resumed_parts: int


def _read_shard(folder: str, shard: int, cache_dir: str | None) -> Iterator[tuple[str, Payload]]:
    reader = _shard_reader(folder, cache_dir)
    rows = reader.manifest.rows_of_shard(shard)
    try:
        for index in range(rows.start, rows.stop):
            key = reader.manifest.key(index)
            try:
                yield key, reader.read(index)
            except CorruptSampleError as error:
                yield key, error
    finally:
        reader.release([shard])


@functools.lru_cache(maxsize=1)
def _shard_reader(folder: str, cache_dir: str | None) -> ShardReader:
    return ShardReader(Manifest.open(folder), cache_dir)


def image_parts(source: str, settings: BulkSettings) -> Sequence[Part]:
    """The parts of a folder of shards (with a manifest) or of image files, local or s3://. Raises DataError."""
    if not storage.exists(storage.join(source, MANIFEST_NAME)):
        return folder_parts(source, settings.files_per_part, keys=settings.keys)
    parts = []
    for number, info in enumerate(Manifest.open(source).shards):
        name = f"{PurePosixPath(info.name).stem}-{fingerprint([info.sha256])}"
        read = functools.partial(_read_shard, source, number, settings.cache_dir)
        parts.append(Part(name, read, info.count, info.bytes))
    return parts


@dataclasses.dataclass(frozen=True)
class BulkJob:
    """What all tasks share; it is pickled for remote tasks."""

    model: str
    out: str
    settings: BulkSettings
    model_digest: str
    device: str
    """Device of the tasks."""
    fingerprint: str
    """Digest of everything that determines the rows; parts with another one are computed again."""

    def memory(self, threads: int) -> int:
        """Bytes to reserve for a task: the network, its activations and two batches of images."""
        return _TASK_MEMORY_BYTES


def predict_images(
    model: str,
    source: str,
    out: str,
    settings: BulkSettings,
    *,
    device: str | None = None,
    tasks: TaskRunner | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> BulkResult:
    """Predict all images of `source` with the model that `open_predictor` opens, and write the scores to `out`.

    Parts that are complete are not computed again, so the same call resumes a stopped prediction. device: device of the
    tasks; default: the GPU of this process if it has one. Raises SettingsError if `out` holds another prediction,
    DataError if the source has no usable image, PartsFailed with the failed parts after all others are done,
    StorageError.
    """
    global _cached_predictor
    storage.ensure_writable(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        retain_freed_memory()
    predictor = open_predictor(model, precision=settings.precision)
    if settings.top is not None and settings.top > len(predictor.classes):
        raise SettingsError(
            f"bulk.top is {settings.top}, but the model has {len(predictor.classes)} classes: set it to at most that, "
            "or to null for all"
        )
    parts = {part.name: part for part in image_parts(source, settings)}
    description = _claim_folder(out, predictor, source, settings)
    job_fingerprint = fingerprint([json.dumps(description, sort_keys=True)])
    job = BulkJob(predictor.source, out, settings, description["model_digest"], device, job_fingerprint)
    if device == "cpu":
        _cached_predictor = (job_fingerprint, predictor)
    completed = _completed_parts(job, set(parts))
    remaining = [(name, part) for name, part in parts.items() if name not in completed]
    before = sum(part.images + len(part.rejects) for part in completed.values())
    total = sum(part.images or 0 for part in parts.values())
    if completed:
        log(f"resuming: {len(completed):,} of {len(parts):,} parts are complete ({before:,} images)")
    with progress_display(progress, log) as show:
        show("images", before, total)
        results = run_tasks(
            tasks or LocalTaskRunner(),
            predict_part,
            job,
            remaining,
            lambda count: show("images", before + count, total),
            "parts",
        )
    results = [*completed.values(), *results]
    rejects = [reject for part in results for reject in part.rejects]
    write_rejects(out, sorted(rejects))
    images = sum(part.images for part in results)
    if not images:
        raise DataError(f"none of the {len(rejects):,} images of {source} can be used; the first: {rejects[0]}")
    return BulkResult(images, len(rejects), len(completed))


def read_part(job: BulkJob, name: str) -> PartResult | None:
    """A completed part; None if its file is absent, truncated or of another job."""
    path = _part_path(job.out, name)
    if not storage.exists(path):
        return None
    try:
        with storage.open_input(path) as file:
            footer = pq.read_metadata(file)
        metadata = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        if metadata.get("fingerprint") != job.fingerprint:
            return None
        rejects = [(str(key), str(reason)) for key, reason in parse_json(metadata["rejects"])]
        return PartResult(name, footer.num_rows, rejects)
    except storage.StorageError:
        raise
    except (*PARSE_ERRORS, OSError):  # pyarrow raises OSError for a damaged footer
        return None


def predict_part(job: BulkJob, part: Part, context: TaskContext) -> PartResult:
    """Predict the images of one part and write its file. Memory: two batches of images and the rows to be written.

    The pool's threads read and decode the next batch while the network processes this one.
    """
    predictor, settings = _open_cached(job), job.settings
    metadata = {"schema_version": str(SCHEMA_VERSION), "fingerprint": job.fingerprint, "value": settings.value}
    if settings.top is None:
        metadata["mids"] = json.dumps(predictor.classes)
    rejects: list[tuple[str, str]] = []
    rows, waiting = 0, list[pa.Table]()
    with (
        storage.replacing(_part_path(job.out, part.name)) as temporary,
        pq.ParquetWriter(temporary, _schema(settings), compression="zstd") as writer,
    ):
        for keys, pixels, decoding in read_ahead(_decode_batches(part, settings.batch_size, predictor, context), 1):
            if context.should_stop():
                raise TaskInterrupted(part.name)
            errors = [error.result() for error in decoding]
            rejects += [(key, error) for key, error in zip(keys, errors, strict=True) if error is not None]
            usable = [i for i, error in enumerate(errors) if error is None]
            if usable:
                output = predictor.forward(
                    pixels if len(usable) == len(errors) else pixels[usable], with_maps=settings.maps
                )
                if output.maps_BKHW is not None:
                    metadata["map_size"] = json.dumps(output.maps_BKHW.shape[2:])
                waiting.append(_table([keys[i] for i in usable], output, predictor, settings))
                rows += len(usable)
            if sum(map(len, waiting)) >= _ROWS_PER_WRITE:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
            context.report(rows + len(rejects))
            del pixels  # before the next batch is allocated
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
        writer.add_key_value_metadata(metadata | {"rejects": json.dumps(rejects)})
    return PartResult(part.name, rows, rejects)


def _decode_batches(
    part: Part, size: int, predictor: Predictor, context: TaskContext
) -> Iterator[tuple[tuple[str, ...], np.ndarray, "list[Future[str | None]]"]]:
    """Start decoding batches of at most `size` images: their keys, pixels uint8 [b, S, S, 3], and errors."""
    images, side = iter(part), predictor.info.image_size
    while batch := list(itertools.islice(images, size)):
        keys, payloads = zip(*batch, strict=True)
        pixels = np.empty((len(batch), side, side, 3), np.uint8)
        tasks = zip(payloads, pixels, strict=True)
        yield keys, pixels, [context.pool.submit(_decode, predictor, *task) for task in tasks]


def _decode(predictor: Predictor, payload: Payload, out: np.ndarray) -> str | None:
    """Decode one image. Returns why it cannot be used; None for a usable one."""
    data = payload if isinstance(payload, (bytes, Exception)) else read_object(str(payload))
    if isinstance(data, Exception):
        return str(data)
    try:
        predictor.decode(data, out)
    except UndecodableError as error:
        return str(error)
    return None


def _schema(settings: BulkSettings) -> pa.Schema:
    fields = [("key", pa.string()), ("scores", pa.list_(pa.float16()))]
    if settings.top is not None:
        fields.insert(1, ("mids", pa.list_(pa.string())))
    if settings.maps:
        fields.append(("maps", pa.list_(pa.list_(pa.float16()))))
    return pa.schema(fields)


def _table(keys: Sequence[str], output: ModelOutput, predictor: Predictor, settings: BulkSettings) -> pa.Table:
    """The rows of a batch, with the columns of `_schema`."""
    values = output.scores_BK if settings.value == "probability" else output.logits_BK
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    if settings.top is not None:
        top = np.argsort(-values, axis=1, kind="stable")[:, : settings.top]
        values = np.take_along_axis(values, top, 1)
        columns["mids"] = _split_into_lists(
            pa.array(predictor.classes, pa.string()).take(pa.array(top.ravel())), len(keys)
        )
        if output.maps_BKHW is not None:
            maps = np.take_along_axis(output.maps_BKHW, top[:, :, None, None], 1)
            columns["maps"] = _split_into_lists(_float16_lists(maps.reshape(top.size, -1)), len(keys))
    return pa.table(columns | {"scores": _float16_lists(values)}, schema=_schema(settings))


def _float16_lists(values: np.ndarray) -> pa.Array:
    """float [rows, n] as `rows` lists of float16."""
    return _split_into_lists(pa.array(values.astype(np.float16).ravel(), pa.float16()), len(values))


def _split_into_lists(flat: pa.Array, rows: int) -> pa.Array:
    """`flat` as `rows` lists of equal length."""
    offsets = np.arange(rows + 1, dtype=np.int32) * (len(flat) // rows)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _part_path(out: str, name: str) -> str:
    return storage.join(out, "scores", f"{name}.parquet")


def _claim_folder(out: str, predictor: Predictor, source: str, settings: BulkSettings) -> dict[str, Any]:
    """Write prediction.json, which holds everything that determines the rows, and classes.csv; return the former.

    Raises SettingsError if the folder holds another prediction.
    """
    names = ("top", "value", "maps", "precision", "keys", "files_per_part")
    description = {
        "schema_version": SCHEMA_VERSION,
        "images": source,
        "model": predictor.source,
        "model_digest": predictor.digest(),
        **{name: getattr(settings, name) for name in names},
    }
    claim_folder(storage.join(out, "prediction.json"), description, description, "set another --out")
    thresholds = [f"{threshold:.6g}" if np.isfinite(threshold) else "" for threshold in predictor.thresholds]
    classes = zip(range(len(thresholds)), predictor.classes, predictor.names, thresholds, strict=True)
    rows = [("class_index", "mid", "name", "threshold"), *classes]
    storage.write_bytes(storage.join(out, "classes.csv"), format_csv(rows).encode())
    return description


def _completed_parts(job: BulkJob, names: set[str]) -> dict[str, PartResult]:
    """The completed parts by name. Raises SettingsError if there are parts that the source does not have."""
    suffix = ".parquet"
    files = storage.list_files(storage.join(job.out, "scores"))
    stored = {file.removesuffix(suffix) for file in files if file.endswith(suffix)}
    if unknown := sorted(stored - names):
        raise SettingsError(
            f"{job.out}/scores holds {len(unknown):,} parts of other images, such as {unknown[0]}: images were added "
            "or changed. Set another --out, or delete these files"
        )
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="paml-parts") as pool:
        results = pool.map(lambda name: read_part(job, name), sorted(stored))
        return {part.name: part for part in results if part is not None}


_cached_predictor: "tuple[str, Predictor] | None" = None
"""(fingerprint of a job, its predictor): one predictor per process, shared by its tasks."""
_cache_lock = threading.Lock()


def _open_cached(job: BulkJob) -> Predictor:
    """The process's predictor. Raises DataError if the model has changed since the prediction started."""
    global _cached_predictor
    with _cache_lock:
        if _cached_predictor is None or _cached_predictor[0] != job.fingerprint:
            if job.device == "cpu":
                retain_freed_memory()
            predictor = open_predictor(job.model, device=job.device, precision=job.settings.precision)
            if predictor.digest() != job.model_digest:
                raise DataError(f"the model {job.model} changed after the prediction started: set another --out")
            _cached_predictor = (job.fingerprint, predictor)
        return _cached_predictor[1]
