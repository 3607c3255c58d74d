"""The manifest of a folder of shards: where each image lies, and the checksums to tell that it is whole.

An Arrow IPC file of one record batch, memory-mapped, shared by all processes of a machine. Rows stand by
shard, and within a shard as in the tar. A seal over the file's own bytes is checked when it is opened, since a
wrong key there would give an image the labels of another.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError
from paml.reading import MISSHAPEN, inside, parse_json, parse_object
from paml.seal import UNSEALED, BrokenSeal, check_seal, file_mark, seal_file
from paml.spreadsheet import ReportWriter

MANIFEST_NAME = "manifest.arrow"
SCHEMA_VERSION = 1
_ROWS_AT_A_TIME = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FIELDS = {"schema_version", "digest", "settings", "report", "shards"}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int32()),
        ("crc32", pa.uint32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One tar file."""

    name: str
    """Relative to the manifest's folder; a whole path or URL for shards that were indexed where they lie."""
    count: int
    """Images in it."""
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Hex digest of the tar file."""


class Manifest:
    """What a folder of shards holds. Make one by `Manifest.open`; pickles as its folder.

    `shard` int32[N], `offset` int64[N] (of the image's first byte within the tar), `size` int32[N] (bytes),
    `crc32` uint32[N] (of the image's bytes), `width` and `height` int32[N] are views of the mapped file.
    """

    def __init__(self, folder: str, batch: pa.RecordBatch, *, seal: str = "", mark: tuple[int, ...] = ()) -> None:
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        self.folder = folder
        self._batch = batch
        self._seal, self._mark = seal, mark
        self.shards: tuple[ShardInfo, ...] = tuple(_shard_info(s) for s in parse_json(metadata["shards"]))
        self.num_samples: int = batch.num_rows
        self.digest: str = metadata["digest"]
        self.settings: dict[str, Any] = parse_object(metadata["settings"])
        """The settings that the shards were written with; empty for shards of other people."""
        self.report: dict[str, Any] = parse_object(metadata["report"])
        """Counts of the run that wrote the shards or the index."""
        self.shard = self._view("shard")
        self.offset = self._view("offset")
        self.size = self._view("size")
        self.crc32 = self._view("crc32")
        self.width = self._view("width")
        self.height = self._view("height")

    def _view(self, name: str) -> np.ndarray:
        return self._batch.column(name).to_numpy(zero_copy_only=True)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Open the manifest of a folder, local or remote.

        Raises DataError where there is none, or it is cut, changed, contradicts itself, or has another schema
        version. A remote one that arrives damaged is fetched a second time. Manifests of before the seal are read
        without one.
        """
        return _open(os.fspath(folder), "", ())

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.folder, self._seal, self._mark)

    def __len__(self) -> int:
        return self.num_samples

    def keys(self) -> pa.StringArray:
        """The key of each image, N strings."""
        return self._batch.column("key")

    def key(self, index: int) -> str:
        return self._batch.column("key")[int(index)].as_py()

    def shard_path(self, shard: int) -> str:
        """Path or URL of a shard's tar file."""
        name = self.shards[int(shard)].name
        return name if storage.is_remote(name) or os.path.isabs(name) else storage.join(self.folder, name)

    def rows_of_shard(self, shard: int) -> slice:
        """The rows of one shard: they stand together."""
        return slice(
            int(np.searchsorted(self.shard, shard, side="left")),
            int(np.searchsorted(self.shard, shard, side="right")),
        )


def _shard_info(fields: dict[str, Any]) -> ShardInfo:
    """Raises TypeError or ValueError for what no manifest says of a shard."""
    info = ShardInfo(**fields)
    if [type(value) for value in dataclasses.astuple(info)] != [str, int, int, str]:
        raise TypeError(f"a shard is described by {fields!r}")
    if info.count < 0 or not 0 <= info.bytes < 1 << 62 or not _SHA256.fullmatch(info.sha256):
        raise ValueError(f"a shard is described by {fields!r}")
    if not (storage.is_remote(info.name) or os.path.isabs(info.name)):
        inside("", info.name)
    return info


def _open(folder: str, seal: str, mark: tuple[int, ...]) -> Manifest:
    """The manifest of `folder`; that of `seal`, where one is given. A file of the same `mark` is not checked again."""
    path = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(path):
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}: write shards with write_shards "
            "(a run that was cut off goes on where it stood), or index WebDataset's own with index_shards"
        )
    try:
        manifest = _read(folder, path, storage.local_copy(path), mark)
    except DataError:
        if not storage.is_remote(path):
            raise
        manifest = _read(folder, path, storage.local_copy(path, again=True), ())
    if seal and manifest._seal != seal:
        raise DataError(f"{path} has changed since it was opened: start the run again")
    return manifest


def _read(folder: str, path: str, local: str, mark: tuple[int, ...]) -> Manifest:
    mend = "copy it again, write the shards again, or index them anew with index_shards"
    try:
        with pa.memory_map(local) as source:
            data = source.read_buffer()
        found = file_mark(local)
        seal = check_seal(memoryview(data)) if found != mark else _seal_of(data)
        reader = pa.ipc.open_file(data)
        schema = reader.schema
        version = (schema.metadata or {}).get(b"schema_version", b"none").decode("utf-8", "replace")
        if version != str(SCHEMA_VERSION):
            raise DataError(
                f"{path} has schema version {version}, this paml reads {SCHEMA_VERSION}: "
                "write the shards again or use the paml that wrote them"
            )
        fields = {key.decode("utf-8", "replace") for key in schema.metadata}
        if fields != (_FIELDS if seal is None else _FIELDS | {"seal"}):
            raise BrokenSeal(f"its metadata have the fields {', '.join(sorted(fields))}")
        if reader.num_record_batches > 1:
            raise BrokenSeal(f"it has {reader.num_record_batches} record batches, not one")
        batch = reader.get_batch(0) if reader.num_record_batches else pa.RecordBatch.from_pylist([], schema=schema)
        if not batch.schema.equals(SCHEMA):
            raise BrokenSeal(f"its columns are {', '.join(batch.schema.names)}")
        if found != mark:  # a seal tells that bytes have changed, not who wrote them
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise BrokenSeal("it has nulls")
        manifest = Manifest(folder, batch, seal="" if seal is None else seal.decode(), mark=found)
    except (BrokenSeal, OSError, *MISSHAPEN) as error:
        if isinstance(error, storage.StorageError | DataError):
            raise
        raise DataError(f"{path} is damaged or cut ({error}): {mend}") from error
    fault = contradiction(manifest) if found != mark else None
    if fault is not None:
        raise DataError(f"{path} contradicts itself: {fault}: {mend}")
    return manifest


def contradiction(manifest: Manifest) -> str | None:
    """What in a manifest cannot be: counts, places and digest that do not agree; None for a sound one."""
    shards = manifest.shards
    if shards_digest(shards) != manifest.digest:
        return "the list of shards is not that of its digest"
    room = np.array([info.bytes for info in shards], np.int64)
    found = np.zeros(len(shards), np.int64)
    last_shard, last_end = 0, 0
    for start in range(0, len(manifest), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        shard, offset = manifest.shard[rows], manifest.offset[rows]
        ends = offset + manifest.size[rows]
        if shard.min() < 0 or shard.max() >= len(shards):
            return f"a row lies in shard {shard.max()}, and there are {len(shards)}"
        step = np.diff(shard, prepend=last_shard)
        if (step < 0).any():
            return f"row {start + int(np.flatnonzero(step < 0)[0])} stands after those of a later shard"
        outside = (offset < 0) | (ends < offset) | (ends > room[shard])
        overlap = (step == 0) & (offset < np.concatenate([[last_end], ends[:-1]]))
        if (outside | overlap).any():
            row = int(np.flatnonzero(outside | overlap)[0])
            what = "lies outside of" if outside[row] else "overlaps the one before it in"
            place = f"image {manifest.key(start + row)!r} (bytes {offset[row]} to {ends[row]})"
            return f"{place} {what} {shards[shard[row]].name}"
        found += np.bincount(shard, minlength=len(shards))
        last_shard, last_end = int(shard[-1]), int(ends[-1])
    for info, count in zip(shards, found, strict=True):
        if info.count != count:
            return f"{info.name} should hold {info.count:,} images, and {count:,} rows name it"
    return None


def _seal_of(data: pa.Buffer) -> bytes | None:
    """The seal that the metadata hold, unchecked."""
    return (pa.ipc.open_file(data).schema.metadata or {}).get(b"seal")


def batch_bytes(batch: pa.RecordBatch) -> bytes:
    """A record batch as the bytes of an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def make_batch(
    *,
    keys: Sequence[str] | pa.Array,
    shard: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    crc32: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
) -> pa.RecordBatch:
    columns = [pa.array(keys, pa.string())]
    for field, values in zip(list(SCHEMA)[1:], (shard, offset, size, crc32, width, height), strict=True):
        columns.append(pa.array(np.asarray(values), type=field.type))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def shards_digest(shards: Sequence[ShardInfo]) -> str:
    """One digest for a set of shards: SHA-256 over the names, counts and digests of their tar files."""
    lines = [f"{os.path.basename(s.name)} {s.count} {s.bytes} {s.sha256}\n" for s in shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(
    folder: str,
    batch: pa.RecordBatch,
    shards: Sequence[ShardInfo],
    *,
    settings: dict[str, Any],
    report: dict[str, Any],
) -> Manifest:
    """Write `manifest.arrow` atomically, sealed, and open it."""
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "digest": shards_digest(shards),
        "settings": json.dumps(settings, sort_keys=True),
        "report": json.dumps(report, sort_keys=True),
        "shards": json.dumps([dataclasses.asdict(s) for s in shards]),
    }
    coded: dict[str | bytes, str | bytes] = {**UNSEALED, **metadata}
    sealed = batch.replace_schema_metadata(coded)
    with storage.replacing(storage.join(folder, MANIFEST_NAME)) as temporary:
        with pa.OSFile(temporary, "wb") as file, pa.ipc.new_file(file, sealed.schema) as writer:
            writer.write_batch(sealed)
        seal_file(temporary)
    return Manifest.open(folder)


def rejects_csv(rejects: Sequence[tuple[str, str]]) -> bytes:
    """Rows of (key, reason) as CSV with a header line, sorted by key, for people: see `paml.spreadsheet`."""
    out = io.StringIO()
    writer = ReportWriter(out)
    writer.writerow(("key", "reason"))
    writer.writerows(sorted(rejects))
    return out.getvalue().encode("utf-8", "backslashreplace")
