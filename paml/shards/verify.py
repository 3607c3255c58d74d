"""Verify a folder of shards against its manifest and list the lost images."""

import contextlib
import dataclasses
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from paml import storage
from paml.checksum import crc32_of
from paml.shards.cache import OpenShard
from paml.shards.encode import member_key
from paml.shards.manifest import MANIFEST_NAME, Manifest
from paml.sources.tars import TarDamage, walk_tar

_MAX_LISTED = 10
_BLOCK = 512
"""Bytes of a tar header."""


@dataclasses.dataclass(frozen=True)
class ShardFault:
    """A problem with one shard, or with another file of the folder."""

    path: str
    problem: str
    count: int = 0
    """Images in it according to the manifest."""
    lost: tuple[str, ...] = ()
    """Keys of the unreadable images."""

    def __str__(self) -> str:
        lost = f"; lost {len(self.lost):,} of {self.count:,} images: {_listed(self.lost)}" if self.lost else ""
        return f"{self.path}: {self.problem}{lost}"


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """Result of `verify_shards`; `str(report)` is readable."""

    manifest: Manifest
    deep: bool
    faults: tuple[ShardFault, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def lost(self) -> tuple[str, ...]:
        """Keys of all unreadable images."""
        return tuple(key for fault in self.faults for key in fault.lost)

    def __str__(self) -> str:
        method = "SHA-256" if self.deep else "size only"
        images, shards = len(self.manifest), len(self.manifest.shards)
        head = f"{self.manifest.folder}: {images:,} images in {shards:,} shards, verified by {method}: "
        if self.ok:
            return head + "all intact"
        head += f"{len(self.faults)} bad files, {len(self.lost):,} images lost"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


def verify_shards(
    folder: str | os.PathLike[str],
    *,
    deep: bool = True,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyReport:
    """Verify each shard's size, SHA-256 and keys; if they differ, each image's CRC-32 and each tar header.

    Reports shards that are missing, have the content of another shard, or are not in the manifest (stock WebDataset
    would read them too). Compares only sizes if `deep` is False. Raises DataError if there is no valid manifest, and
    StorageError if the storage is unreachable.
    """
    manifest = Manifest.open(folder)
    faults = _folder_faults(manifest)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        results = pool.map(lambda shard: _verify_shard(manifest, shard, deep), range(len(manifest.shards)))
        for done, fault in enumerate(results, start=1):
            if fault is not None:
                faults.append(fault)
            if progress is not None:
                progress("shards", done, len(manifest.shards))
    return VerifyReport(manifest, deep, tuple(faults))


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first ten items and the number of the others."""
    more = [f"{len(items) - _MAX_LISTED:,} more"] if len(items) > _MAX_LISTED else []
    return separator.join([*items[:_MAX_LISTED], *more])


def _folder_faults(manifest: Manifest) -> list[ShardFault]:
    """Duplicate keys, and tar files that are not in the manifest. A manifest of indexed shards may omit some."""
    faults = []
    counts = manifest.keys().value_counts()
    repeated = counts.field("values").filter(pa.array(counts.field("counts").to_numpy() > 1)).to_pylist()
    if repeated:
        problem = f"{len(repeated):,} duplicate keys: {_listed(repeated)}: write the shards again"
        faults.append(ShardFault(storage.join(manifest.folder, MANIFEST_NAME), problem))
    known = {info.name for info in manifest.shards}
    for name in storage.list_files(manifest.folder) if manifest.settings else []:
        if name.endswith(".tar") and not name.startswith(".") and name not in known:
            problem = f"not in {MANIFEST_NAME}: move it to another folder"
            faults.append(ShardFault(storage.join(manifest.folder, name), problem))
    return faults


def _verify_shard(manifest: Manifest, shard: int, deep: bool) -> ShardFault | None:
    info, path, rows = manifest.shards[shard], manifest.shard_path(shard), manifest.rows_of_shard(shard)
    try:
        size = storage.size_of(path)
    except FileNotFoundError:
        keys = tuple(manifest.keys()[rows.start : rows.stop].to_pylist())
        return ShardFault(path, "the file is missing", info.count, keys)
    problem = f"truncated: {size:,} of {info.bytes:,} bytes" if size < info.bytes else ""
    if size > info.bytes:
        problem = f"{size:,} bytes instead of {info.bytes:,}"
    if not problem and not deep:
        return None
    with storage.local_file(path) as local:
        digest = storage.sha256_of(local)[0]
        if digest == info.sha256:
            return _wrong_keys(manifest, shard, local)
        problem = problem or "SHA-256 differs"
        owner = next((other.name for other in manifest.shards if other.sha256 == digest), None)
        if owner is not None:
            problem += f": it has the content of {owner}"
        return _check_images(manifest, shard, local, problem)


def _wrong_keys(manifest: Manifest, shard: int, local: str) -> ShardFault | None:
    """Keys of the manifest that differ from the names in an intact tar file: images would get wrong labels."""
    rows, names = manifest.rows_of_shard(shard), dict[int, str]()
    with open(local, "rb") as file, contextlib.suppress(TarDamage):  # the index ends at the damage too
        for member in walk_tar(file, local):
            names[member.offset] = member.name
    wrong = []
    for key, offset in zip(manifest.keys()[rows].to_pylist(), manifest.offset[rows].tolist(), strict=True):
        name = names.get(offset, "no member of the tar file")
        if not name.startswith(f"{member_key(key) if manifest.settings else key}."):
            wrong.append(f"{key} is {name}")
    if not wrong:
        return None
    info, path = manifest.shards[shard], storage.join(manifest.folder, MANIFEST_NAME)
    problem = f"{len(wrong):,} keys differ from those of {info.name}: {_listed(wrong, '; ')}: write the shards again"
    return ShardFault(path, problem, info.count)


def _check_images(manifest: Manifest, shard: int, local: str, problem: str) -> ShardFault:
    """Find the intact images of a damaged shard."""
    rows, lost, details = manifest.rows_of_shard(shard), [], []
    tar = OpenShard(local)
    for index in range(rows.start, rows.stop):
        key, offset, size = manifest.key(index), int(manifest.offset[index]), int(manifest.size[index])
        image = tar.read(offset, size)
        if len(image) < size:
            lost.append(key)
        elif crc32_of(image) != int(manifest.crc32[index]):
            lost.append(key)
            details.append(f"CRC-32 mismatch in the image {key!r} (bytes {offset} to {offset + size})")
        else:
            try:
                tarfile.TarInfo.frombuf(tar.read(offset - _BLOCK, _BLOCK), "utf-8", "surrogateescape")
            except (tarfile.HeaderError, OSError):  # there is no byte before the tar file
                details.append(
                    f"damaged tar header of {key!r} at byte {offset - _BLOCK} (paml can read the images after it, "
                    "stock WebDataset drops them)"
                )
    if not lost and not details:
        details.append("all images are intact by CRC-32: the damage is between them")
    return ShardFault(
        manifest.shard_path(shard),
        ": ".join([problem, _listed(details, "; ")] if details else [problem]),
        manifest.shards[shard].count,
        tuple(lost),
    )
