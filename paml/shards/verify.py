"""Check a folder of shards against its manifest, and name what is lost."""

import contextlib
import dataclasses
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import ACCESS_READ, mmap

import pyarrow.compute as pc

from paml import storage
from paml.shards.crc import crc32_of
from paml.shards.encode import member_key
from paml.shards.manifest import MANIFEST_NAME, Manifest

_NAMED = 10
_BLOCK, _NAME, _PREFIX = 512, 100, 345  # bytes of a tar header and of the name in it; where a long name begins


@dataclasses.dataclass(frozen=True)
class ShardFault:
    """What is wrong with one shard, or with a file beside them."""

    path: str
    problem: str
    count: int
    """Images that the manifest names in it."""
    lost: tuple[str, ...]
    """Keys of those that cannot be read."""

    def __str__(self) -> str:
        named = ", ".join(self.lost[:_NAMED])
        if len(self.lost) > _NAMED:
            named += f" and {len(self.lost) - _NAMED:,} more"
        return f"{self.path}: {self.problem}" + (
            f"; lost {len(self.lost):,} of {self.count:,} images: {named}" if self.lost else ""
        )


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify_shards` found."""

    folder: str
    shards: int
    samples: int
    bytes: int
    deep: bool
    faults: tuple[ShardFault, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def lost(self) -> tuple[str, ...]:
        """Keys of all images that cannot be read."""
        return tuple(key for fault in self.faults for key in fault.lost)

    def __str__(self) -> str:
        by = "SHA-256" if self.deep else "size alone"
        head = f"{self.folder}: {self.samples:,} images in {self.shards:,} shards, checked by {by}: "
        if self.ok:
            return head + "all whole"
        head += f"{len(self.faults)} bad files, {len(self.lost):,} images lost"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


def verify_shards(
    folder: str | os.PathLike[str],
    *,
    deep: bool = True,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyReport:
    """Check each shard's size, SHA-256 and keys; where they differ, each image's CRC-32 and each tar header.

    Shards that are gone, hold another's content, or are not in the manifest (stock WebDataset would read them too)
    are named. Without `deep` sizes alone are compared. Damage is reported, not raised; raises DataError where there
    is no sound manifest, StorageError where storage cannot be reached.
    """
    manifest = Manifest.open(folder)
    faults = [*_doubled_keys(manifest), *_strangers(manifest)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        checks = pool.map(lambda shard: _check(manifest, shard, deep), range(len(manifest.shards)))
        for done, fault in enumerate(checks, start=1):
            if fault is not None:
                faults.append(fault)
            if progress is not None:
                progress("shards", done, len(manifest.shards))
    return VerifyReport(
        folder=manifest.folder,
        shards=len(manifest.shards),
        samples=manifest.num_samples,
        bytes=sum(shard.bytes for shard in manifest.shards),
        deep=deep,
        faults=tuple(faults),
    )


def _doubled_keys(manifest: Manifest) -> list[ShardFault]:
    keys = manifest.keys()
    if pc.call_function("count_distinct", [keys]).as_py() == len(keys):
        return []
    counts = pc.call_function("value_counts", [keys])
    twice = counts.field("values").filter(pc.call_function("greater", [counts.field("counts"), 1])).to_pylist()
    named = ", ".join(twice[:_NAMED])
    path = storage.join(manifest.folder, MANIFEST_NAME)
    return [ShardFault(path, f"{len(twice):,} keys stand twice: {named}: write the shards again", 0, ())]


def _strangers(manifest: Manifest) -> list[ShardFault]:
    """Tar files of the folder that its manifest does not name; one that indexes others' shards may leave some out."""
    if not manifest.settings:
        return []
    known = {info.name for info in manifest.shards}
    return [
        ShardFault(storage.join(manifest.folder, name), f"not in {MANIFEST_NAME}: move it away", 0, ())
        for name in storage.list_files(manifest.folder)
        if name.endswith(".tar") and not name.startswith(".") and name not in known
    ]


def _check(manifest: Manifest, shard: int, deep: bool) -> ShardFault | None:
    info, path, rows = manifest.shards[shard], manifest.shard_path(shard), manifest.rows_of_shard(shard)
    try:
        size = storage.size_of(path)
    except FileNotFoundError:
        keys = tuple(manifest.keys()[rows.start : rows.stop].to_pylist())
        return ShardFault(path, "the file is gone", info.count, keys)
    problem = ""
    if size < info.bytes:
        problem = f"cut: {size:,} of {info.bytes:,} bytes are there"
    elif size > info.bytes:
        problem = f"{size:,} bytes where {info.bytes:,} were written"
    if not problem and not deep:
        return None
    with _local(path) as local:
        digest = storage.sha256_of(local)[0]
        if digest == info.sha256:
            return _misnamed(manifest, shard, local)
        problem = problem or "SHA-256 differs"
        owner = next((other.name for other in manifest.shards if other.sha256 == digest), None)
        if owner is not None:
            problem += f": it holds what belongs into {owner}"
        return _salvage(manifest, shard, local, problem)


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """A local file with the content of `path`."""
    if not storage.is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="paml-verify-") as temporary:
        local = os.path.join(temporary, "shard.tar")
        storage.copy_to_local(path, local)
        yield local


def _mapped(local: str) -> memoryview:
    empty = not os.path.getsize(local)
    with open(local, "rb") as file:
        return memoryview(b"" if empty else mmap(file.fileno(), 0, access=ACCESS_READ))


def _misnamed(manifest: Manifest, shard: int, local: str) -> ShardFault | None:
    """Keys of the manifest that are not the names in a whole tar file: their images would get others' labels."""
    rows, data, wrong = manifest.rows_of_shard(shard), _mapped(local), []
    places = zip(manifest.keys()[rows].to_pylist(), manifest.offset[rows].tolist(), strict=True)
    for key, offset in places:
        header = bytes(data[offset - _BLOCK : offset])
        name = header[:_NAME].split(b"\0", 1)[0]
        # longer names, and those beyond ASCII, stand elsewhere
        if len(name) == _NAME or header[_PREFIX] or not key.isascii():
            continue
        written = member_key(key) if manifest.settings else key
        if not name.startswith(f"{written}.".encode()):
            wrong.append(f"{key} is {name.decode('ascii', 'replace')}")
    if not wrong:
        return None
    named = "; ".join(wrong[:_NAMED]) + (f"; {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
    path = storage.join(manifest.folder, MANIFEST_NAME)
    problem = f"{len(wrong):,} keys are not those of {manifest.shards[shard].name}: {named}: write the shards again"
    return ShardFault(path, problem, manifest.shards[shard].count, ())


def _salvage(manifest: Manifest, shard: int, local: str, problem: str) -> ShardFault:
    """Say which images of a bad shard are whole."""
    rows, lost, details = manifest.rows_of_shard(shard), [], []
    data = _mapped(local)
    for index in range(rows.start, rows.stop):
        offset, size = int(manifest.offset[index]), int(manifest.size[index])
        image = data[offset : offset + size]
        if len(image) < size:
            lost.append(manifest.key(index))
            continue
        if crc32_of(image) != int(manifest.crc32[index]):
            lost.append(manifest.key(index))
            details.append(f"image {lost[-1]!r} (bytes {offset} to {offset + size}) fails its CRC-32")
            continue
        try:
            tarfile.TarInfo.frombuf(bytes(data[offset - _BLOCK : offset]), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            details.append(
                f"the tar header of {manifest.key(index)!r} at byte {offset - _BLOCK} is damaged (paml reads "
                "past it, stock WebDataset drops what follows)"
            )
    if not lost and not details:
        details.append("all images are whole by CRC-32: the damage lies between them")
    shown = details[:_NAMED] + ([f"{len(details) - _NAMED} more"] if len(details) > _NAMED else [])
    return ShardFault(
        manifest.shard_path(shard),
        ": ".join([problem, "; ".join(shown)] if shown else [problem]),
        manifest.shards[shard].count,
        tuple(lost),
    )
