"""Write images as WebDataset shards with a manifest. The bytes do not depend on the order of the source or on workers.

Two passes of tasks that can run anywhere, in any order, and again after a failure. Pass 1 (`encode.py`, one task per
part of the source) decodes, resizes and encodes images and writes spills, sorted by shard. Pass 2 (`assemble.py`, one
task per group of shards) sorts the records of all spills by the hashes of their keys and writes tar files. After an
interruption, the same call continues both passes, also on another machine: the spills are next to the shards. They need
as much space as the shards until the shards are complete.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.errors import DataError, SettingsError, StorageError
from paml.parsing import parse_errors_as
from paml.progress import Progress, progress_display
from paml.shards.assemble import GROUP_BYTES, AssembleJob, assemble_group, plan_groups, read_description
from paml.shards.encode import SPILL_BYTES, EncodeJob, encode_part
from paml.shards.manifest import MANIFEST_NAME, REJECTS_NAME, SCHEMA, Manifest, ShardInfo, write_manifest, write_rejects
from paml.shards.settings import ShardSettings
from paml.shards.spill import Spill, digest_set, read_spills, spill_stem
from paml.sources.parts import Part, Payload
from paml.tasks import LocalTaskRunner, TaskRunner, claim_folder, file_lock, run_tasks

MISSING_REASON = "requested, but in no source"
"""In the rejects file, of an image that no part has."""
_MAX_SHARDS = 10_000_000
_MAX_ROUNDS = 5
_READ_THREADS = 16


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """Result of `write_shards`."""

    folder: str
    written: int
    """Images in the shards."""
    rejected: int
    """Broken, unreadable or missing images; rejects.csv lists them."""
    missing: int
    """Rejected because no source has the requested key."""
    duplicates: int
    """Images with the key of another one; the one of the largest file is used."""
    unwanted: int
    """Images whose key was not requested."""
    shards: int
    bytes: int
    """Of all tar files."""
    digest: str
    """Of all shards."""
    already_done: bool = False
    """The folder had the complete shards of the same settings, and nothing was read or written."""

    def __str__(self) -> str:
        text = (
            f"{self.written:,} images in {self.shards} shards ({self.bytes / 1e6:,.1f} MB) in {self.folder}; "
            f"{self.rejected:,} rejected"
        )
        if self.missing:
            text += f" ({self.missing:,} of them requested but missing)"
        if self.rejected:
            text += f", see {REJECTS_NAME}"
        if self.duplicates:
            text += f"; {self.duplicates:,} duplicate keys (largest file used)"
        if self.unwanted:
            text += f"; {self.unwanted:,} not requested"
        return text + ("; already complete" if self.already_done else "")


def write_shards(
    source: Iterable[tuple[str, Payload]],
    out_folder: str | os.PathLike[str],
    settings: ShardSettings | None = None,
    *,
    expected_count: int | None = None,
    workers: int | None = None,
    **options: Any,
) -> ShardReport:
    """Write the images of `source` as shards, `manifest.arrow` and `rejects.csv` to `out_folder`.

    source: (key, payload) pairs in a repeatable order, e.g. `read_parts(folder_parts(path))`; one task reads it in this
    process. expected_count: default `len(source)`, or the number of wanted keys. workers: encoding threads (default:
    all CPUs). options: keyword arguments of `write_parts`.
    """
    if expected_count is None and isinstance(source, Sized):
        expected_count = len(source)
    part = Part("the source", partial(iter, source), read_once=iter(source) is source)
    tasks = LocalTaskRunner(workers, raise_first=True)
    return write_parts([part], out_folder, settings, expected_count=expected_count, tasks=tasks, **options)


def write_parts(
    parts: Sequence[Part],
    out_folder: str | os.PathLike[str],
    settings: ShardSettings | None = None,
    *,
    expected_count: int | None = None,
    wanted_keys: Iterable[str] | None = None,
    tasks: TaskRunner | None = None,
    progress: Progress | None = None,
    spill_bytes: int = SPILL_BYTES,
    group_bytes: int = GROUP_BYTES,
) -> ShardReport:
    """Write the images of all `parts` as shards, `manifest.arrow` and `rejects.csv` to `out_folder`.

    Keys may contain any character. In the tar files, dots and other characters with a meaning for WebDataset are
    written as %2E and so on; the manifest has the original key.

    expected_count: determines the number of shards; default: the number of images in the parts, or of wanted keys if
    that is smaller. wanted_keys: write only these, and report those that no part has. tasks: runs the work, by default
    in threads of this process. progress: default a bar on a terminal, or a line every ten seconds.

    Of several images with the same key, the one of the largest file is used, then the first by its stored bytes. The
    bytes of all output files depend only on the images, the settings, the wanted keys and the expected count.

    Memory: a task of pass 1 holds two spills of at most `spill_bytes` and four images per thread; a task of pass 2
    holds `group_bytes`, or one shard if that is larger. Two local tasks run at a time.

    An interrupted call continues when it is repeated with the same settings and source; for a complete folder it
    returns at once. Raises StorageError for a full or unwritable folder, SettingsError if the folder has shards of
    other settings, PartsFailed if parts could not be read, and DataError if no image was usable.
    """
    settings = settings or ShardSettings()
    out = os.fspath(out_folder)
    work = storage.join(out, ".partial")
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        report = _completed_report(out, settings)
        if storage.list_files(work):  # a run was killed after its last shard
            with contextlib.suppress(StorageError), _exclusive_writer(out, work):
                pass  # deletes the intermediate files
        return report
    storage.ensure_writable(out)
    repeated = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if repeated:
        raise DataError(f"two parts of the source have the name {repeated[0]!r}: give each file or folder once")
    wanted = None
    if wanted_keys is not None:
        keys = wanted_keys if isinstance(wanted_keys, pa.StringArray) else pa.array(wanted_keys, pa.string())
        wanted = pc.call_function("unique", [keys])  # 9 million in 180 MB
    counts = [part.images for part in parts]
    images = None if None in counts else sum(count or 0 for count in counts)
    if expected_count is None:
        known = [count for count in (images, None if wanted is None else len(wanted)) if count is not None]
        if not known:
            raise SettingsError("the length of the source is unknown: set expected_count (an estimate is enough)")
        expected_count = min(known)
    with _exclusive_writer(out, work), progress_display(progress) as show:
        digests = None if wanted is None else digest_set(settings.seed, map(str, wanted))
        num_shards = _plan_shards(work, settings, digests, expected_count)
        encode_job, tasks = EncodeJob(work, settings, num_shards, digests, spill_bytes), tasks or LocalTaskRunner()
        for _ in range(_MAX_ROUNDS):
            spills = _encode(encode_job, parts, expected_count if images is None else images, tasks, show)
            if spills is None:
                continue
            job = plan_groups(out, work, num_shards, spills, group_bytes)
            damaged = _assemble(job, tasks, show)
            if not damaged:
                show("shards", num_shards, num_shards)
                return _finish(job, spills, settings, wanted)
            for path in damaged:
                storage.delete(path)
            if any(part.read_once for part in parts):
                raise DataError(
                    f"checksum mismatch in the intermediate file {damaged[0]}, which was deleted: run the same command "
                    "again to write it again"
                )
        raise StorageError(f"intermediate files in {work} were damaged {_MAX_ROUNDS} times: check the storage")


def _completed_report(out: str, settings: ShardSettings) -> ShardReport:
    manifest = Manifest.open(out)
    if manifest.settings != dataclasses.asdict(settings):
        found = manifest.settings or "none: they were indexed, not written by paml"
        raise SettingsError(
            f"{out} has complete shards of other settings ({found}), requested were {dataclasses.asdict(settings)}: "
            "choose another folder, or delete this one"
        )
    return ShardReport(**{**manifest.report, "folder": out, "digest": manifest.digest, "already_done": True})


@contextlib.contextmanager
def _exclusive_writer(out: str, work: str) -> Iterator[None]:
    """Refuse a second run in the same local folder; in S3, two runs would write the same bytes twice.

    When the block succeeds, deletes the spills, and temporary files of killed runs.
    """
    with contextlib.ExitStack() as stack:
        if not storage.is_remote(work):
            path = os.path.join(work, "lock")
            with storage.storage_errors("write", work):
                os.makedirs(work, exist_ok=True)
                locked = stack.enter_context(file_lock(path, wait=False))
            if locked is False:
                raise StorageError(f"another run is writing the same shards (it holds {path}): wait for it or stop it")
        yield
        storage.delete_folder(work)
        storage.remove_temporaries(out)


def _plan_shards(work: str, settings: ShardSettings, wanted: np.ndarray | None, expected_count: int) -> int:
    """The number of shards: that of the interrupted run, or from the expected number of images."""
    if expected_count < 1:
        raise SettingsError(
            f"{expected_count} images are expected: use a source with images, or set expected_count (an estimate is "
            "enough)"
        )
    path, hint = (
        storage.join(work, "plan.json"),
        f"delete {work} to start again, or repeat the command with the stored values",
    )
    plan = {
        "settings": dataclasses.asdict(settings),
        "wanted keys": None if wanted is None else hashlib.sha256(wanted.tobytes()).hexdigest(),
        "num_shards": math.ceil(expected_count / settings.samples_per_shard),
    }
    stored = claim_folder(path, plan, ("settings", "wanted keys"), hint)
    with parse_errors_as(path, hint):
        num_shards = stored["num_shards"]
        if type(num_shards) is not int or not 0 < num_shards <= _MAX_SHARDS:
            raise ValueError(f"num_shards is {num_shards!r}")
    return num_shards


def _encode(job: EncodeJob, parts: Sequence[Part], total: int, tasks: TaskRunner, show: Progress) -> list[Spill] | None:
    """Pass 1, of about `total` images. All spills, ordered by name; None if one was changed meanwhile."""
    named = [(part.name, part) for part in parts]
    counts = run_tasks(
        tasks, encode_part, job, named, lambda done: show("images", done, max(done, total)), "parts of the source"
    )
    show("images", sum(counts), sum(counts))
    stems = sorted(spill_stem(part) for part in parts)
    with ThreadPoolExecutor(_READ_THREADS) as readers:
        by_part = list(readers.map(lambda stem: read_spills(job.work, stem), stems))
    if not all(spills and spills[-1].last for spills in by_part):
        return None
    return [spill for spills in by_part for spill in spills]


def _assemble(job: AssembleJob, tasks: TaskRunner, show: Progress) -> list[str]:
    """Pass 2. The paths of damaged spills."""
    groups = enumerate(pairwise(job.groups.tolist()))
    named = [(f"shards {first} to {end - 1}", group) for group, (first, end) in groups]
    damaged = run_tasks(
        tasks, assemble_group, job, named, lambda done: show("shards", done, job.num_shards), "groups of shards"
    )
    return sorted({path for paths in damaged for path in paths})


def _finish(
    job: AssembleJob, spills: Sequence[Spill], settings: ShardSettings, wanted: pa.StringArray | None
) -> ShardReport:
    """Write the rejects, then the manifest, which marks the folder as complete."""
    shards, batch = _read_descriptions(job)
    reasons: dict[str, str] = {}
    for key, reason in (reject for spill in spills for reject in spill.rejects.items()):
        reasons[key] = min(reason, reasons.get(key, reason))  # does not depend on the order
    unusable = _without(pa.array(list(reasons), pa.string()), batch.column("key"))
    missing = pa.array([], pa.string())
    if wanted is not None:
        missing = _without(_without(wanted, batch.column("key")), unusable)
    rejected = pa.concat_arrays([unusable, missing]).sort()  # millions of images may be missing
    write_rejects(job.out, ((key, reasons.get(key, MISSING_REASON)) for key in map(str, rejected)))
    read = sum(spill.end - spill.first - spill.absent for spill in spills)
    unwanted = sum(spill.unwanted for spill in spills)
    if not batch.num_rows:
        raise DataError(
            f"none of {read:,} images was usable for {job.out}: see {REJECTS_NAME} there for the "
            f"{len(rejected):,} reasons"
        )
    report = {
        "written": batch.num_rows,
        "rejected": len(rejected),
        "missing": len(missing),
        "duplicates": read - unwanted - batch.num_rows - len(unusable),
        "unwanted": unwanted,
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
    }
    manifest = write_manifest(job.out, batch, shards, settings=dataclasses.asdict(settings), report=report)
    return ShardReport(folder=job.out, digest=manifest.digest, **report)


def _read_descriptions(job: AssembleJob) -> tuple[list[ShardInfo], pa.RecordBatch]:
    """The shards that have images, and their rows of the manifest."""
    shards: list[ShardInfo] = []
    batches: list[pa.RecordBatch] = []
    with ThreadPoolExecutor(_READ_THREADS) as readers:
        descriptions = readers.map(lambda shard: read_description(job, shard), range(job.num_shards))
        for shard, description in enumerate(descriptions):
            if description is None:
                raise StorageError(
                    f"shard {shard} in {job.out} was changed while it was written: run the same command again"
                )
            shards.append(description[0])
            batches.append(description[1])
    shards = [info for info in shards if info.count]
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [info.count for info in shards])
    return shards, pa.concat_batches(batches).set_column(1, SCHEMA.field(1), pa.array(numbers))


def _without(values: pa.Array, known: pa.Array) -> pa.Array:
    """The values that are not in `known`."""
    is_known = pc.call_function("is_in", [values], pc.SetLookupOptions(known))
    return values.filter(pc.call_function("invert", [is_known]))
