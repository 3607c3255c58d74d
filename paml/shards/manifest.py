"""The manifest of a folder of shards: the location and the checksum of each image.

An Arrow IPC file with one record batch, memory-mapped and shared by all processes of a machine. Rows are ordered by
shard, and within a shard as in the tar file. A checksum of the whole file is verified when it is opened, because a
wrong key would give an image the labels of another.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from paml import storage
from paml.checksum import ChecksumError, read_with_checksum, write_with_checksum
from paml.errors import DataError, SettingsError
from paml.parsing import parse_json, parse_json_object, safe_join
from paml.spreadsheet import write_report

MANIFEST_NAME = "manifest.arrow"
REJECTS_NAME = "rejects.csv"
SCHEMA_VERSION = 1
_ROWS_PER_CHECK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FIELDS = {"schema_version", "digest", "settings", "report", "shards", "seal"}
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
    """Path relative to the manifest's folder; an absolute path or URL for indexed shards in another folder."""
    count: int
    """Number of images."""
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Hex digest of the tar file."""


class Manifest:
    """The images of a folder of shards. Open one with `Manifest.open`; pickles as its folder.

    `shard` int32[N], `offset` int64[N] (of the image's first byte in the tar), `size` int32[N] (bytes),
    `crc32` uint32[N] (of the image's bytes), `width` and `height` int32[N] are views of the mapped file.
    """

    def __init__(self, folder: str, batch: pa.RecordBatch) -> None:
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        self.folder = folder
        self._batch = batch
        self._checksum = metadata["seal"]
        self._signature: tuple[int, ...] = ()
        self.shards: tuple[ShardInfo, ...] = tuple(_parse_shard(s) for s in parse_json(metadata["shards"]))
        self.num_samples: int = batch.num_rows
        self.digest: str = metadata["digest"]
        self.settings: dict[str, Any] = parse_json_object(metadata["settings"])
        """The settings that wrote the shards; empty for indexed shards."""
        self.report: dict[str, Any] = parse_json_object(metadata["report"])
        """Counts of the run that wrote the shards or the index."""
        self.shard = self._column("shard")
        self.offset = self._column("offset")
        self.size = self._column("size")
        self.crc32 = self._column("crc32")
        self.width = self._column("width")
        self.height = self._column("height")

    def _column(self, name: str) -> np.ndarray:
        return self._batch.column(name).to_numpy(zero_copy_only=True)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Open the manifest of a folder, local or remote.

        Raises DataError if it is missing, damaged, inconsistent, or of another schema version. A damaged copy of a
        remote manifest is fetched a second time.
        """
        return _open(os.fspath(folder), "", ())

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.folder, self._checksum, self._signature)

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
        """The rows of one shard, which are consecutive."""
        return slice(*np.searchsorted(self.shard, (shard, shard + 1)).tolist())

    @property
    def image_size(self) -> int:
        """Side of the stored images in pixels. Raises SettingsError if they are not squares of one size."""
        if len(self) and (self.width == self.width[0]).all() and (self.height == self.width[0]).all():
            return int(self.width[0])
        raise SettingsError(
            f"the images of {self.folder} differ in size: set data.image_size to the training size in pixels"
        )


def _parse_shard(fields: dict[str, Any]) -> ShardInfo:
    """Raises TypeError or ValueError for an invalid description of a shard."""
    info = ShardInfo(**fields)
    if [type(value) for value in dataclasses.astuple(info)] != [str, int, int, str]:
        raise TypeError(f"invalid shard {fields!r}")
    if info.count < 0 or not 0 <= info.bytes < 1 << 62 or not _SHA256.fullmatch(info.sha256):
        raise ValueError(f"invalid shard {fields!r}")
    if not (storage.is_remote(info.name) or os.path.isabs(info.name)):
        safe_join("", info.name)
    return info


def _open(folder: str, checksum: str, signature: tuple[int, ...]) -> Manifest:
    """Open a manifest, with the given checksum if any. A file with the given signature is not verified again."""
    path = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(path):
        raise DataError(
            f"{folder} has no {MANIFEST_NAME}: run `paml prepare` (an interrupted run continues), or index WebDataset "
            "shards with index_shards"
        )
    hint = "copy it again, write the shards again, or index them again with index_shards"

    def parse(batch: pa.RecordBatch, check: bool) -> Manifest:
        if not batch.schema.equals(SCHEMA):
            raise ChecksumError(f"its columns are {', '.join(batch.schema.names)}")
        if check:  # a checksum detects changed bytes, not a wrong writer
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise ChecksumError("it has nulls")
        manifest = Manifest(folder, batch)
        if check and (problem := find_inconsistency(manifest)):
            raise DataError(f"{path} is inconsistent: {problem}: {hint}")
        return manifest

    def damaged(error: Exception) -> DataError:
        return DataError(f"{path} is damaged or truncated ({error}): {hint}")

    manifest, current = read_with_checksum(path, signature, partial(_check_kind, path), parse, damaged)
    manifest._signature = current
    if checksum and manifest._checksum != checksum:
        raise DataError(f"{path} has changed since it was opened: start the run again")
    return manifest


def _check_kind(path: str, metadata: Mapping[bytes, bytes]) -> None:
    version = metadata.get(b"schema_version", b"none").decode("utf-8", "replace")
    if version != str(SCHEMA_VERSION):
        raise DataError(
            f"{path} has schema version {version}, this version of paml reads {SCHEMA_VERSION}: write the shards "
            "again, or use the version of paml that wrote them"
        )
    fields = {key.decode("utf-8", "replace") for key in metadata}
    if fields != _FIELDS:
        raise ChecksumError(f"its metadata fields are {', '.join(sorted(fields))}")


def find_inconsistency(manifest: Manifest) -> str | None:
    """A disagreement between the counts, offsets and digest of a manifest; None if they agree."""
    shards = manifest.shards
    if shards_digest(shards) != manifest.digest:
        return "the list of shards does not match its digest"
    shard_bytes = np.array([info.bytes for info in shards], np.int64)
    counts = np.zeros(len(shards), np.int64)
    last_shard, last_end = 0, 0
    for start in range(0, len(manifest), _ROWS_PER_CHECK):
        rows = slice(start, start + _ROWS_PER_CHECK)
        shard, offset = manifest.shard[rows], manifest.offset[rows]
        ends = offset + manifest.size[rows]
        if shard.min() < 0 or shard.max() >= len(shards):
            return f"a row refers to shard {shard.max()} of {len(shards)}"
        step = np.diff(shard, prepend=last_shard)
        if (step < 0).any():
            return f"row {start + int(np.flatnonzero(step < 0)[0])} follows the rows of a later shard"
        outside = (offset < 0) | (ends < offset) | (ends > shard_bytes[shard])
        overlap = (step == 0) & (offset < np.concatenate([[last_end], ends[:-1]]))
        if (outside | overlap).any():
            row = int(np.flatnonzero(outside | overlap)[0])
            relation = "is outside of" if outside[row] else "overlaps the previous image in"
            image = f"image {manifest.key(start + row)!r} (bytes {offset[row]} to {ends[row]})"
            return f"{image} {relation} {shards[shard[row]].name}"
        counts += np.bincount(shard, minlength=len(shards))
        last_shard, last_end = int(shard[-1]), int(ends[-1])
    for info, count in zip(shards, counts, strict=True):
        if info.count != count:
            return f"{info.name} should have {info.count:,} images, but {count:,} rows refer to it"
    return None


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
    """Write `manifest.arrow` atomically, with its checksum, and open it."""
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "digest": shards_digest(shards),
        "settings": json.dumps(settings, sort_keys=True),
        "report": json.dumps(report, sort_keys=True),
        "shards": json.dumps([dataclasses.asdict(s) for s in shards]),
    }
    write_with_checksum(storage.join(folder, MANIFEST_NAME), batch.replace_schema_metadata(metadata))
    return Manifest.open(folder)


def write_rejects(folder: str, rejects: Iterable[tuple[str, str]]) -> None:
    """Write `rejects.csv`, a CSV report (see `paml.spreadsheet`), with a header and the rows (key, reason)."""
    with (
        storage.replacing(storage.join(folder, REJECTS_NAME)) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        write_report(file, itertools.chain([("key", "reason")], rejects))
