"""Pass 2 of the shard writer: the tar files of consecutive shards, from the records in all spills.

A task reads one range of each spill and holds at most GROUP_BYTES of images, or one shard if that is larger. Of several
images with the same key, the one of the largest source file is used; of equally large ones, the one whose stored bytes
come first. This rule does not depend on the order of the parts.
"""

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import StorageError
from paml.parsing import PARSE_ERRORS, parse_json_object, safe_join
from paml.shards.encode import member_key
from paml.shards.manifest import SCHEMA, ShardInfo
from paml.shards.spill import DamagedSpillError, Record, Spill, read_records, shard_of
from paml.tasks import TaskContext, TaskInterrupted

GROUP_BYTES = 512 << 20
_READ_THREADS = 8


@dataclasses.dataclass(frozen=True)
class AssembleJob:
    """What all tasks of pass 2 share, for P spills and G groups of shards."""

    out: str
    work: str
    num_shards: int
    spills: tuple[str, ...]
    """P paths."""
    bounds: np.ndarray
    """int64[P, G + 1]: offset of the first record of each group in each spill; the last column is the end."""
    groups: np.ndarray
    """int64[G + 1]: first shard of each group; the last entry is the number of shards."""
    source: str
    """Digest of all spills. Shards assembled from other spills are written again."""

    def memory(self, threads: int) -> int:
        """Peak memory of a task in bytes."""
        largest = int(np.diff(self.bounds, axis=1).sum(axis=0).max(initial=0))
        return largest + (256 << 20)


def plan_groups(out: str, work: str, num_shards: int, spills: Sequence[Spill], group_bytes: int) -> AssembleJob:
    """Group consecutive shards, at most `group_bytes` per group, but at least one shard."""
    shard_bytes = np.zeros(num_shards, np.int64)
    for spill in spills:
        shard_bytes[spill.shards] += np.diff(spill.ends, prepend=spill.start)
    groups, total = [0], 0
    for shard, size in enumerate(shard_bytes.tolist()):
        if total and total + size > group_bytes:
            groups.append(shard)
            total = 0
        total += size
    groups.append(num_shards)
    first_shards = np.array(groups, np.int64)
    bounds = np.zeros((len(spills), len(first_shards)), np.int64)
    for row, spill in enumerate(spills):
        bounds[row] = spill.offsets(first_shards)
    identity = "".join(sorted(f"{spill.path.rsplit('/', 1)[-1]} {spill.header_crc32}\n" for spill in spills))
    return AssembleJob(
        out=out,
        work=work,
        num_shards=num_shards,
        spills=tuple(spill.path for spill in spills),
        bounds=bounds,
        groups=first_shards,
        source=hashlib.sha256(identity.encode()).hexdigest(),
    )


def assemble_group(job: AssembleJob, group: int, context: TaskContext) -> list[str]:
    """Write the missing shards of one group. Returns the paths of damaged spills; if there are any, writes nothing."""
    first, end = int(job.groups[group]), int(job.groups[group + 1])
    missing = [shard for shard in range(first, end) if read_description(job, shard) is None]
    if missing:
        by_shard: dict[int, list[Record]] = {shard: [] for shard in missing}
        damaged = []
        with ThreadPoolExecutor(_READ_THREADS if storage.is_remote(job.work) else 1, "paml-read") as readers:
            for result in readers.map(lambda row: _read_range(job, row, group), range(len(job.spills))):
                if isinstance(result, DamagedSpillError):
                    damaged.append(result.path)
                    continue
                for record in result:
                    records = by_shard.get(shard_of(record.digest, job.num_shards))
                    if records is not None:
                        records.append(record)
        if damaged:
            return damaged
        for done, shard in enumerate(missing):
            if context.should_stop():
                raise TaskInterrupted(f"shards {first} to {end}")
            _write_shard(job, shard, sorted_unique(by_shard.pop(shard)))
            context.report(end - first - len(missing) + done + 1)
    context.report(end - first)
    return []


def _read_range(job: AssembleJob, row: int, group: int) -> list[Record] | DamagedSpillError:
    path, start, end = job.spills[row], int(job.bounds[row, group]), int(job.bounds[row, group + 1])
    try:
        return list(read_records(memoryview(storage.read_range(path, start, end - start)), path))
    except DamagedSpillError as error:
        return error
    except FileNotFoundError:
        return DamagedSpillError(path, "it does not exist")
    except StorageError:
        if storage.size_of(path) < end:
            return DamagedSpillError(path, "it is truncated")
        raise


def sorted_unique(records: Iterable[Record]) -> list[Record]:
    """The records by digest, one per key: that of the largest source file, then the first by its stored bytes."""
    ordered = sorted(records, key=lambda r: (r.digest, r.key, -r.source_bytes))
    unique: list[Record] = []
    for record in ordered:
        if not unique or unique[-1].key != record.key:
            unique.append(record)
        elif unique[-1].source_bytes == record.source_bytes and bytes(record.image) < bytes(unique[-1].image):
            unique[-1] = record
    return unique


def _description_path(job: AssembleJob, shard: int) -> str:
    return storage.join(job.work, f"shard-{shard:06d}.arrow")


def read_description(job: AssembleJob, shard: int) -> tuple[ShardInfo, pa.RecordBatch] | None:
    """The info and manifest rows of a shard, if it is complete and was assembled from the job's spills."""
    try:
        data = storage.read_bytes(_description_path(job, shard))
        batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        batch.validate(full=True)
        fields = parse_json_object(batch.schema.metadata[b"info"])
        if fields.pop("source") != job.source:
            return None
        info = ShardInfo(**fields)
        complete = info.count == 0 or storage.size_of(safe_join(job.out, info.name)) == info.bytes
        return (info, batch.replace_schema_metadata(None)) if complete else None
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (*PARSE_ERRORS, OSError):  # damaged: write the shard again
        return None


def _write_shard(job: AssembleJob, shard: int, records: list[Record]) -> None:
    name = f"shard-{shard:06d}.tar"
    info, offsets = ShardInfo(name, 0, 0, ""), []
    if records:
        with storage.replacing(storage.join(job.out, name)) as temporary:
            info, offsets = _write_tar_file(temporary, name, records)
    rows = [
        (record.key, shard, offset, len(record.image), record.crc32, record.width, record.height)
        for record, offset in zip(records, offsets, strict=True)
    ]
    batch = pa.RecordBatch.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)
    batch = batch.replace_schema_metadata({"info": json.dumps({**dataclasses.asdict(info), "source": job.source})})
    with (
        storage.replacing(_description_path(job, shard)) as temporary,
        pa.ipc.new_file(temporary, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _write_tar_file(path: str, name: str, records: list[Record]) -> tuple[ShardInfo, list[int]]:
    """Write a tar file with the same bytes as WebDataset's TarWriter. Returns its info and the offset of each image."""
    sha256, position, offsets = hashlib.sha256(), 0, []
    with open(path, "wb", buffering=1 << 20) as file:
        for record in records:
            member = tarfile.TarInfo(f"{member_key(record.key)}.{record.extension}")
            member.size, member.mode = len(record.image), 0o444
            member.uname = member.gname = "paml"
            # PAX supports names of any length and alphabet; for plain names it equals USTAR
            header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            offsets.append(position + len(header))
            for data in (header, record.image, bytes(-len(record.image) % tarfile.BLOCKSIZE)):
                sha256.update(data)
                file.write(data)
                position += len(data)
        end = bytes(2 * tarfile.BLOCKSIZE + -(position + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        sha256.update(end)
        file.write(end)
    return ShardInfo(name, len(records), position + len(end), sha256.hexdigest()), offsets
