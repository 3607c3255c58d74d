"""Embeddings: vectors or maps of another network, which are trained on instead of images (data.embeddings).

A file is converted once to a folder named by a digest of its path, size and times, which all runs share:
`vectors-<digest of the keys>.npy`, [N, H, W, C] in float16 or float32, and `manifest.arrow`, written last, with the key
and checksum of each row. To the rest of paml they are a manifest and cached features, as those of model.train_from.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.checksum import crc32_of, file_signature
from paml.data.readers import CachedFeatures
from paml.data.settings import DataSettings, features_folder
from paml.errors import DataError, SettingsError
from paml.labels.keys import as_strings
from paml.labels.table import LabelTable
from paml.parsing import PARSE_ERRORS, check_not_symlink, open_no_follow, parse_errors_as
from paml.shards.manifest import MANIFEST_NAME, SCHEMA, Manifest, ShardInfo, write_manifest
from paml.tasks import file_lock

_BLOCK_BYTES = 1 << 25
_HINT = "write it again: keys with a vector of floats each (Parquet), or an array [N, C] or [N, C, H, W] (.npy)"


class _Source(NamedTuple):
    """The content of a user's file."""

    keys: pa.Array
    """string[N]."""
    shape: tuple[int, int, int]
    """C, H, W; H and W are 1 for vectors."""
    dtype: np.dtype
    blocks: Iterator[np.ndarray]
    """Consecutive rows, [n, C] or [n, C, H, W]."""


def open_embeddings(settings: DataSettings, split: str, table: LabelTable) -> tuple[Manifest, CachedFeatures]:
    """The keys and the embeddings of a split, converted if they are not yet.

    Raises DataError for a file that cannot be used, and if less than half of the images of `table` have an embedding.
    """
    path = (settings.embeddings or "").replace("{split}", split)
    local = _local_files(path)
    about = [(os.path.abspath(name), file_signature(name)[2:]) for name in local]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    manifest, values = _open(path, local, os.path.join(features_folder(settings), f"embeddings-{digest[:32]}"))
    _check_matched(path, manifest, table)
    return manifest, CachedFeatures(values, values, {})


def _local_files(path: str) -> tuple[str, ...]:
    """Local copies of the file and, for .npy, of the one with its keys. Raises DataError unless there is one."""
    if not storage.exists(path):
        raise DataError(f"data.embeddings: {path} does not exist: set it to a .parquet file, or to a .npy file")
    if path.endswith(".parquet"):
        return (storage.local_copy(path),)
    name = path.rpartition("/")[2]
    names = [f"{start}keys.{suffix}" for start in (name.removesuffix("npy"), "") for suffix in ("txt", "npy")]
    existing = [keys for keys in (path.removesuffix(name) + other for other in names) if storage.exists(keys)]
    if len(existing) != 1:
        found = f"{' and '.join(existing)} exist" if existing else f"none of {', '.join(names)} exists next to it"
        raise DataError(f"the keys of {path} must be in one file, but {found}: save one key per row, in this order")
    return storage.local_copy(path), storage.local_copy(existing[0])


@functools.lru_cache(maxsize=4)
def _open(path: str, local: tuple[str, ...], folder: str) -> tuple[Manifest, np.ndarray]:
    """The converted file. Other processes may call it at the same time: one of them converts."""
    opened = _open_converted(folder)
    if opened is None:
        storage.ensure_writable(os.path.dirname(folder))
        os.makedirs(folder, exist_ok=True)
        check_not_symlink(folder)
        with file_lock(os.path.join(folder, "lock"), wait=True):
            opened = _open_converted(folder)
            if opened is None:
                storage.remove_temporaries(folder)  # of a process that died
                with parse_errors_as(path, _HINT):
                    _convert(path, _read_parquet(path, *local) if len(local) == 1 else _read_npy(path, *local), folder)
                opened = _open_converted(folder)
    if opened is None:
        raise DataError(f"the files in {folder} changed after they were written: remove the folder")
    return opened


def _open_converted(folder: str) -> tuple[Manifest, np.ndarray] | None:
    """None if the conversion does not exist or is damaged."""
    if not storage.exists(os.path.join(folder, MANIFEST_NAME)):
        return None
    with contextlib.suppress(DataError, FileNotFoundError, *PARSE_ERRORS):
        manifest = Manifest.open(folder)
        (info,), vectors = manifest.shards, manifest.shard_path(0)
        os.close(open_no_follow(vectors, os.O_RDONLY))
        if storage.sha256_of(vectors) == (info.sha256, info.bytes):
            return manifest, _map_npy(vectors)
    return None


def _map_npy(path: str) -> np.ndarray:
    """A .npy file as a memory map. `open_memmap` cannot unpickle: it raises ValueError for an array of objects."""
    return np.lib.format.open_memmap(path, mode="r")


def _read_npy(path: str, vectors: str, keys: str) -> _Source:
    values = _map_npy(vectors)
    if values.ndim not in (2, 4) or not values.size:
        raise ValueError(f"its shape is {list(values.shape)}")
    if keys.endswith(".npy"):
        texts = np.asarray(_map_npy(keys))
        texts = as_strings(np.strings.decode(texts, "utf-8") if texts.dtype.kind == "S" else texts)
    else:
        with open(keys, encoding="utf-8-sig", newline="\n") as file:
            texts = as_strings([line.rstrip("\r\n") for line in file])
    if len(texts) != len(values):
        raise DataError(
            f"{path} has {len(values):,} rows, but there are {len(texts):,} keys next to it: save one key per row"
        )
    channels, height, width = (*values.shape[1:], 1, 1)[:3]
    step = max(1, _BLOCK_BYTES // values[0].nbytes)
    blocks = (values[start : start + step] for start in range(0, len(values), step))
    return _Source(texts, (channels, height, width), values.dtype, blocks)


def _read_parquet(path: str, local: str) -> _Source:
    file = pq.ParquetFile(local)
    key, vector = _columns(file.schema_arrow)
    keys = as_strings(file.read(columns=[key]).column(0))
    first = next(file.iter_batches(1, columns=[vector]), None)
    if first is None or not (channels := len(first.column(0).flatten())):
        raise ValueError("it has no vectors")

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for batch in file.iter_batches(max(1, _BLOCK_BYTES // (4 * channels)), columns=[vector]):
            column = batch.column(0)
            lengths = pc.call_function("list_value_length", [column]).fill_null(0).to_numpy(zero_copy_only=False)
            if (lengths != channels).any():
                row = int(np.argmax(lengths != channels))
                raise DataError(
                    f"{path}: the vector of {keys[start + row].as_py()!r} has {lengths[row]} values, "
                    f"others have {channels}: use embeddings of one network and leave out images without one"
                )
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, channels)
            start += len(batch)

    return _Source(
        keys, (channels, 1, 1), np.dtype(file.schema_arrow.field(vector).type.value_type.to_pandas_dtype()), blocks()
    )


def _columns(schema: pa.Schema) -> tuple[str, str]:
    """Names of the columns of keys (`key`, or the only one of strings) and of vectors (the only one of lists)."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    vectors = [
        field.name
        for field in schema
        if any(check(field.type) for check in lists) and pa.types.is_floating(field.type.value_type)
    ]
    strings = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    keys = ["key"] if "key" in schema.names else strings
    if len(keys) != 1 or len(vectors) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"it must have one column `key` and one of lists of floats, but its columns are {columns}")
    return keys[0], vectors[0]


def _convert(path: str, source: _Source, folder: str) -> None:
    """Write the folder. Raises ValueError or DataError for content that cannot be trained on."""
    keys, (channels, height, width), count = source.keys, source.shape, len(source.keys)
    _check_keys(path, keys)
    if source.dtype.kind != "f":
        raise ValueError(f"its values are {source.dtype}, not floats")
    dtype = np.dtype("<f2" if source.dtype.itemsize == 2 else "<f4")
    row_bytes = channels * height * width * dtype.itemsize
    needed, free = count * row_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise SettingsError(
            f"the embeddings of {path} need {needed:,} bytes ({needed / 1e9:.1f} GB), but the disk of {folder} has "
            f"{free:,} bytes free: set data.features_dir to a larger disk"
        )
    header = io.BytesIO()
    shape = (count, height, width, channels)
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    digest, crcs, written = hashlib.sha256(header.getvalue()), np.zeros(count, np.uint32), 0
    name = f"vectors-{hashlib.sha256(json.dumps(keys.to_pylist()).encode()).hexdigest()[:16]}.npy"
    with storage.replacing(os.path.join(folder, name)) as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        for block in source.blocks:
            with np.errstate(over="ignore"):
                rows = block.astype(dtype).reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
            finite = np.isfinite(rows).all((1, 2, 3))
            if not finite.all():
                key = keys[written + int(np.argmin(finite))].as_py()
                raise DataError(
                    f"{path}: the vector of {key!r} has a value that is NaN, infinite or too large for {dtype}: leave "
                    "such images out, or compute their embeddings again"
                )
            content = memoryview(rows.tobytes())
            for start in range(0, len(content), row_bytes):
                crcs[written] = crc32_of(content[start : start + row_bytes])
                written += 1
            digest.update(content)
            file.write(content)
    size = len(header.getvalue()) + needed
    columns: dict[str, Any] = {
        "key": keys,
        "shard": np.zeros(count, np.int32),
        "offset": len(header.getvalue()) + row_bytes * np.arange(count),
        "size": np.full(count, row_bytes, np.int32),
        "crc32": crcs,
        "width": np.ones(count, np.int32),  # an embedding has no pixels
        "height": np.ones(count, np.int32),
    }
    batch = pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
    facts = {"embeddings": path, "shape": list(source.shape)}
    shard = ShardInfo(name, count, size, digest.hexdigest())
    write_manifest(folder, batch, [shard], settings=facts, report={"written": count})


def _check_keys(path: str, keys: pa.Array) -> None:
    empty = pc.call_function("equal", [keys.fill_null(""), pa.scalar("")]).to_numpy(zero_copy_only=False)
    if empty.any():
        raise DataError(f"{path}: the key of row {int(np.argmax(empty)) + 1:,} is empty: name every image")
    encoded = keys.dictionary_encode()
    counts = np.bincount(encoded.indices.to_numpy())
    if (counts > 1).any():
        example = encoded.dictionary[int(np.argmax(counts > 1))].as_py()
        raise DataError(
            f"{path}: {int((counts > 1).sum()):,} keys have several vectors, such as {example!r}: leave one of each"
        )


def _check_matched(path: str, manifest: Manifest, table: LabelTable) -> None:
    """Raise DataError if less than half of the table's images have an embedding."""
    rows = table.rows_of(manifest.keys())
    known = rows >= 0
    if 2 * known.sum() >= table.num_images:
        return
    missing = table.keys([int(np.setdiff1d(np.arange(table.num_images), rows)[0])])[0]
    other = manifest.key(int(np.argmin(known)))
    raise DataError(
        f"{known.sum():,} of the {table.num_images:,} images of {table.path} have an embedding in {path}: the labels "
        f"have {missing!r}, the embeddings {other!r}. Write the embeddings with exactly the keys of the labels"
    )
