"""Pass 2 of the shard writer: the tar files of some consecutive shards, from what all pieces have for them.

A task reads one range of each piece, so it holds GROUP_BYTES of images, or one shard where that is larger.
Of several images with one key the one of the largest source file is kept, and of equally large ones the one whose
stored bytes come first in byte order: a rule that does not ask which part came first.
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
from paml.reading import MISSHAPEN, inside, parse_object
from paml.shards.encode import member_key
from paml.shards.manifest import ShardInfo, batch_bytes, make_batch
from paml.shards.spill import DamagedPiece, Piece, Record, read_records, shard_of, writing
from paml.shards.tasks import Context, Interrupted
from paml.storage import StorageError

GROUP_BYTES = 512 << 20
_READS = 8


@dataclasses.dataclass(frozen=True)
class AssembleJob:
    """What all tasks of pass 2 share, for P pieces and G groups of shards."""

    out: str
    work: str
    num_shards: int
    pieces: tuple[str, ...]
    """P paths."""
    bounds: np.ndarray
    """int64[P, G + 1]: byte of each piece at which the records of each group begin; the last one is the end."""
    groups: np.ndarray
    """int64[G + 1]: first shard of each group; the last one is the number of shards."""
    source: str
    """Digest of all pieces: shards that were made of other ones are made anew."""

    def memory(self, threads: int) -> int:
        """Bytes that a task takes at most."""
        largest = int(np.diff(self.bounds, axis=1).sum(axis=0).max(initial=0))
        return largest + (256 << 20)


def plan_groups(out: str, work: str, num_shards: int, pieces: Sequence[Piece], group_bytes: int) -> AssembleJob:
    """Consecutive shards in groups of at most `group_bytes`, but at least one shard each."""
    shard_bytes = np.zeros(num_shards, np.int64)
    for piece in pieces:
        shard_bytes[piece.shards] += np.diff(piece.ends, prepend=piece.start)
    groups, held = [0], 0
    for shard, size in enumerate(shard_bytes.tolist()):
        if held and held + size > group_bytes:
            groups.append(shard)
            held = 0
        held += size
    groups.append(num_shards)
    firsts = np.array(groups, np.int64)
    bounds = np.zeros((len(pieces), len(firsts)), np.int64)
    for row, piece in enumerate(pieces):
        bounds[row] = piece.offsets(firsts)
    marks = "".join(sorted(f"{piece.path.rsplit('/', 1)[-1]} {piece.mark}\n" for piece in pieces))
    return AssembleJob(
        out=out,
        work=work,
        num_shards=num_shards,
        pieces=tuple(piece.path for piece in pieces),
        bounds=bounds,
        groups=firsts,
        source=hashlib.sha256(marks.encode()).hexdigest(),
    )


def assemble_group(job: AssembleJob, group: int, context: Context) -> list[str]:
    """Write the shards of one group that are not there yet. Returns the paths of pieces that turn out damaged;
    where there are any, the group is left as it is."""
    first, end = int(job.groups[group]), int(job.groups[group + 1])
    todo = [shard for shard in range(first, end) if read_description(job, shard) is None]
    if todo:
        by_shard: dict[int, list[Record]] = {shard: [] for shard in todo}
        damaged = []
        with ThreadPoolExecutor(_READS if storage.is_remote(job.work) else 1, "paml-read") as readers:
            for outcome in readers.map(lambda row: _range(job, row, group), range(len(job.pieces))):
                if isinstance(outcome, DamagedPiece):
                    damaged.append(outcome.path)
                    continue
                for record in outcome:
                    records = by_shard.get(shard_of(record.digest, job.num_shards))
                    if records is not None:
                        records.append(record)
        if damaged:
            return damaged
        for done, shard in enumerate(todo):
            if context.stopped():
                raise Interrupted(f"shards {first} to {end}")
            _write_shard(job, shard, sorted_unique(by_shard.pop(shard)))
            context.tick(end - first - len(todo) + done + 1)
    context.tick(end - first)
    return []


def _range(job: AssembleJob, row: int, group: int) -> list[Record] | DamagedPiece:
    path, start, end = job.pieces[row], int(job.bounds[row, group]), int(job.bounds[row, group + 1])
    try:
        return list(read_records(memoryview(storage.read_range(path, start, end - start)), path))
    except DamagedPiece as damage:
        return damage
    except FileNotFoundError:
        return DamagedPiece(path, "it is gone")
    except StorageError:
        if storage.size_of(path) < end:
            return DamagedPiece(path, "it is cut")
        raise


def sorted_unique(records: Iterable[Record]) -> list[Record]:
    """By digest, one a key: of the largest source file, then by the stored bytes."""
    ordered = sorted(records, key=lambda r: (r.digest, r.key, -r.source_bytes))
    kept: list[Record] = []
    for record in ordered:
        if not kept or kept[-1].key != record.key:
            kept.append(record)
        elif kept[-1].source_bytes == record.source_bytes and bytes(record.image) < bytes(kept[-1].image):
            kept[-1] = record
    return kept


def _description_path(job: AssembleJob, shard: int) -> str:
    return storage.join(job.work, f"shard-{shard:06d}.arrow")


def read_description(job: AssembleJob, shard: int) -> tuple[ShardInfo, pa.RecordBatch] | None:
    """What a shard holds, where it is in place whole and made of the job's pieces."""
    try:
        data = storage.read_bytes(_description_path(job, shard))
        batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        batch.validate(full=True)
        fields = parse_object(batch.schema.metadata[b"info"])
        if fields.pop("source") != job.source:
            return None
        info = ShardInfo(**fields)
        whole = info.count == 0 or storage.size_of(inside(job.out, info.name)) == info.bytes
        return (info, batch.replace_schema_metadata(None)) if whole else None
    except FileNotFoundError:
        return None
    except storage.StorageError:
        raise
    except (*MISSHAPEN, OSError):  # not what this writer leaves: the shard is made anew
        return None


def _write_shard(job: AssembleJob, shard: int, records: list[Record]) -> None:
    name = f"shard-{shard:06d}.tar"
    info, offsets = ShardInfo(name, 0, 0, ""), []
    if records:
        with storage.replacing(storage.join(job.out, name)) as temporary, writing(temporary):
            info, offsets = _write_tar_file(temporary, name, records)
    batch = make_batch(
        keys=[r.key for r in records],
        shard=np.full(len(records), shard, np.int32),
        offset=np.array(offsets, np.int64),
        size=np.array([len(r.image) for r in records], np.int32),
        crc32=np.array([r.crc32 for r in records], np.uint32),
        width=np.array([r.width for r in records], np.int32),
        height=np.array([r.height for r in records], np.int32),
    )
    metadata = {"info": json.dumps({**dataclasses.asdict(info), "source": job.source})}
    storage.write_bytes(_description_path(job, shard), batch_bytes(batch.replace_schema_metadata(metadata)))


def _write_tar_file(path: str, name: str, records: list[Record]) -> tuple[ShardInfo, list[int]]:
    """Write a tar file as WebDataset's TarWriter does. Returns what it is and the offset of each image in it."""
    sha256, at, offsets = hashlib.sha256(), 0, []
    with open(path, "wb", buffering=1 << 20) as file:
        for record in records:
            member = tarfile.TarInfo(f"{member_key(record.key)}.{record.extension}")
            member.size, member.mode = len(record.image), 0o444
            member.uname = member.gname = "paml"
            # PAX takes names of any length and alphabet; plain names look as in USTAR.
            head = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            offsets.append(at + len(head))
            for data in (head, record.image, bytes(-len(record.image) % tarfile.BLOCKSIZE)):
                sha256.update(data)
                file.write(data)
                at += len(data)
        end = bytes(2 * tarfile.BLOCKSIZE + -(at + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        sha256.update(end)
        file.write(end)
    return ShardInfo(name, len(records), at + len(end), sha256.hexdigest()), offsets
