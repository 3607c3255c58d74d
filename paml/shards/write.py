"""Write images as WebDataset shards with a manifest: the same bytes whatever the order of the source or the workers.

Two passes, each of tasks that can run anywhere, in any order, again after a failure. Pass 1 (`encode.py`), a task a
part of the source: images are decoded, resized, encoded and written as pieces, sorted by shard. Pass 2
(`assemble.py`), a task a group of shards: what all pieces have for them is sorted by the keys' hashes and written as
tar files. Both go on where they stood when a run is cut off and the same call is made again; so does another
machine, since the pieces lie beside the shards, which need their own size once more until they are done.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.errors import DataError, SettingsError
from paml.reading import open_own, read_facts, reading
from paml.shards.assemble import GROUP_BYTES, AssembleJob, assemble_group, plan_groups, read_description
from paml.shards.encode import PIECE_BYTES, EncodeJob, encode_part, reads_once
from paml.shards.manifest import MANIFEST_NAME, Manifest, ShardInfo, make_batch, write_manifest
from paml.shards.progress import Progress, showing
from paml.shards.settings import ShardSettings
from paml.shards.spill import KeySet, Piece, key_digest, piece_stem, read_pieces, writing
from paml.shards.tasks import Failure, LocalTasks, Tasks
from paml.sources.parts import Part, Payload
from paml.spreadsheet import ReportWriter
from paml.storage import StorageError

REJECTS_NAME = "rejects.csv"
PARTIAL = ".partial"
_MAX_SHARDS = 10_000_000
_ROUNDS = 5
_READS = 16
_LISTED = 50


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What a run of `write_shards` did."""

    folder: str
    written: int
    """Images in the shards."""
    rejected: int
    """Broken, unreadable or missing ones; each is named in rejects.csv."""
    missing: int
    """Of the rejected: wanted keys that no source had."""
    duplicates: int
    """Images whose key another one has too: the one of the largest file was kept."""
    unwanted: int
    """Images whose key was not among the wanted ones: skipped."""
    shards: int
    bytes: int
    """Of all tar files."""
    digest: str
    """Of all shards."""
    already_done: bool = False
    """The folder held the finished shards of the same settings: nothing was read or written."""

    def __str__(self) -> str:
        text = (
            f"{self.written:,} images in {self.shards} shards ({self.bytes / 1e6:,.1f} MB) in {self.folder}; "
            f"{self.rejected:,} rejected"
        )
        if self.missing:
            text += f" ({self.missing:,} of them wanted and not found)"
        if self.rejected:
            text += f", see {REJECTS_NAME}"
        if self.duplicates:
            text += f"; {self.duplicates:,} duplicate keys (largest file kept)"
        if self.unwanted:
            text += f"; {self.unwanted:,} not wanted"
        return text + ("; was finished already" if self.already_done else "")


class PartsFailed(DataError):
    """Some tasks failed for good while all others finished; `failures` names them."""

    def __init__(self, failures: Sequence[Failure], of: int, what: str) -> None:
        self.failures, self.of = tuple(failures), of
        lines = "".join(f"\n  {failure}" for failure in self.failures[:_LISTED])
        if len(self.failures) > _LISTED:
            lines += f"\n  and {len(self.failures) - _LISTED:,} more"
        super().__init__(
            f"{len(self.failures)} of {of:,} {what} failed, the others are done and kept:{lines}\n"
            "mend the cause and make the same call again: it does what is left"
        )


@dataclasses.dataclass(frozen=True)
class _OnePart:
    """A source of pairs as a part."""

    pairs: Iterable[tuple[str, Payload]]
    name: str = "the source"
    images: None = None
    bytes: None = None

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        return iter(self.pairs)

    @property
    def read_once(self) -> bool:
        return iter(self.pairs) is self.pairs


def write_shards(
    source: Iterable[tuple[str, Payload]],
    out_folder: str | os.PathLike[str],
    settings: ShardSettings | None = None,
    *,
    expected_count: int | None = None,
    wanted_keys: Iterable[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    work_folder: str | os.PathLike[str] | None = None,
) -> ShardReport:
    """Write the images of `source` as shards, `manifest.arrow` and `rejects.csv` to `out_folder`.

    `source` gives (key, payload) pairs, e.g. `iter_folder` or `iter_tars`, in the same order each time. It is one
    part, read by one task in this process; `write_parts` says the rest. `expected_count` defaults to `len(source)`,
    else to the number of wanted keys. `workers` threads decode and encode (default: all cores).
    """
    wanted = None if wanted_keys is None else _strings(wanted_keys)
    if expected_count is None:
        if isinstance(source, Sized):
            expected_count = len(source)
        elif wanted is not None:
            expected_count = len(wanted)
        elif not storage.exists(storage.join(os.fspath(out_folder), MANIFEST_NAME)):
            raise SettingsError("the source does not tell its length: give expected_count, an estimate will do")
    return write_parts(
        [_OnePart(source)],
        out_folder,
        settings,
        expected_count=expected_count,
        wanted_keys=wanted,
        tasks=LocalTasks(workers, raise_first=True),
        progress=progress,
        work_folder=work_folder,
    )


def write_parts(
    parts: Sequence[Part],
    out_folder: str | os.PathLike[str],
    settings: ShardSettings | None = None,
    *,
    expected_count: int | None = None,
    wanted_keys: Iterable[str] | None = None,
    tasks: Tasks | None = None,
    progress: Progress | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    piece_bytes: int = PIECE_BYTES,
    group_bytes: int = GROUP_BYTES,
) -> ShardReport:
    """Write the images of all `parts` as shards, `manifest.arrow` and `rejects.csv` to `out_folder`.

    Keys may hold any character; in the tar files those that WebDataset would cut at (dot) or that name folders are
    written as %2E and so on, while the manifest has the true key. `expected_count` fixes the number of shards; it
    defaults to the parts' images, or to the number of wanted keys where that is smaller. `wanted_keys` limits the
    shards to these; those that no part has are reported. `tasks` runs the work: in threads of this process by
    default, on a cluster by `paml.distributed.prepare_ray`. Without `progress` a bar is shown on a terminal, else a
    line every ten seconds. Pieces lie in `work_folder`, by default `.partial` in the output folder; all workers must
    reach it.

    Of several images with one key the one of the largest file is kept, then the one whose stored bytes come first.
    The bytes of all output files depend on the images, the settings, the wanted keys and the expected count alone.

    Memory: a task of pass 1 holds two pieces of at most `piece_bytes` and four images a thread, one of pass 2
    `group_bytes` (or one shard, where that is larger); local tasks run two at a time.

    A call that was cut off goes on where it stood when made again with the same settings and source; on a finished
    folder it returns at once. Raises StorageError for a full or unwritable folder, SettingsError where the folder
    holds shards of other settings, PartsFailed where parts could not be read, DataError where not one image was
    usable.
    """
    settings = settings or ShardSettings()
    out = os.fspath(out_folder)
    work = os.fspath(work_folder) if work_folder is not None else storage.join(out, PARTIAL)
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        done = _finished_report(out, settings)
        _tidy(out, work)
        return done
    storage.ensure_writable(out)
    wanted = None if wanted_keys is None else _strings(wanted_keys)
    with _only_writer(work), showing(progress) as report:
        run = _Run(parts, out, work, settings, wanted, expected_count, tasks or LocalTasks(), report)
        result = run.to_the_end(piece_bytes, group_bytes)
        _remove_intermediate_files(out, work)
    return result


def _strings(keys: Iterable[str]) -> pa.StringArray:
    """Keys as an Arrow array without doubles: 9 million in 180 MB."""
    array = keys if isinstance(keys, pa.StringArray) else pa.array(keys, pa.string())
    return pc.call_function("unique", [array])


def _finished_report(out: str, settings: ShardSettings) -> ShardReport:
    manifest = Manifest.open(out)
    if not settings.made(manifest.settings):
        have = manifest.settings or "none: they were indexed, not written here"
        raise SettingsError(
            f"{out} holds finished shards of other settings ({have}), asked for "
            f"{dataclasses.asdict(settings)}: choose another folder, or delete this one"
        )
    return ShardReport(**{**manifest.report, "folder": out, "digest": manifest.digest, "already_done": True})


@contextlib.contextmanager
def _only_writer(work: str) -> Iterator[None]:
    """One run at a time writes to a local folder. In S3 two would do the same work twice, to the same bytes."""
    with contextlib.ExitStack() as stack:
        if not storage.is_remote(work):
            with writing(work):
                os.makedirs(work, exist_ok=True)
                handle = open_own(os.path.join(work, "lock"), os.O_RDWR | os.O_CREAT)
                lock = stack.enter_context(open(handle, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"another run is writing the same shards (it holds {os.path.join(work, 'lock')}): wait for it or "
                    "stop it"
                ) from None
        yield


def _tidy(out: str, work: str) -> None:
    """Remove what a run left that was killed after its last shard, unless another one is about to."""
    if storage.list_files(work):
        with contextlib.suppress(StorageError), _only_writer(work):
            _remove_intermediate_files(out, work)


def _remove_intermediate_files(out: str, work: str) -> None:
    """The pieces, and what a killed run was writing when it was killed."""
    storage.delete_folder(work)
    if not storage.is_remote(out):
        for name in os.listdir(out):
            if name.endswith(".paml-tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(out, name))


class _Run:
    def __init__(
        self,
        parts: Sequence[Part],
        out: str,
        work: str,
        settings: ShardSettings,
        wanted: pa.StringArray | None,
        expected_count: int | None,
        tasks: Tasks,
        report: Progress,
    ) -> None:
        self._parts, self._out, self._work, self._settings = list(parts), out, work, settings
        self._wanted, self._tasks, self._report = wanted, tasks, report
        stems = [piece_stem(part) for part in self._parts]
        if len(set(stems)) < len(stems):
            doubled = next(part.name for part, stem in zip(self._parts, stems, strict=True) if stems.count(stem) > 1)
            raise DataError(f"two parts of the source are both {doubled!r}: name each file or folder once")
        self._stems = stems
        self._expected = self._expected_count() if expected_count is None else expected_count
        seed = settings.seed
        self._wanted_set = None
        if wanted is not None:
            self._wanted_set = KeySet.of(
                key_digest(seed, key.as_py())
                for start in range(0, len(wanted), 1 << 16)
                for key in wanted.slice(start, 1 << 16)
            )
        self._num_shards = self._plan()

    def _expected_count(self) -> int:
        known = [part.images for part in self._parts]
        count = None if None in known else sum(images or 0 for images in known)
        if self._wanted is not None:
            return len(self._wanted) if count is None else min(count, len(self._wanted))
        if count is None:
            raise SettingsError("the source does not tell its length: give expected_count, an estimate will do")
        return count

    def _plan(self) -> int:
        """The number of shards: of the run that goes on, else from the expected number of images."""
        path = storage.join(self._work, "plan.json")
        mine = {
            "settings": dataclasses.asdict(self._settings),
            "wanted": None if self._wanted_set is None else self._wanted_set.digest(),
        }
        try:
            plan = read_facts(path, f"delete {self._work} to start anew")
        except FileNotFoundError:
            plan = None
        if plan is not None:
            with reading(path, f"delete {self._work} to start anew"):
                num_shards = plan.pop("num_shards")
                same = {"settings": self._settings.made(plan["settings"]), "wanted": plan["wanted"] == mine["wanted"]}
                if type(num_shards) is not int or not 0 < num_shards <= _MAX_SHARDS:
                    raise ValueError(f"it plans {num_shards!r} shards")
            for name, what in (("settings", "settings"), ("wanted", "wanted keys")):
                if not same[name]:
                    raise SettingsError(
                        f"{self._work} holds a cut-off run of other {what} ({plan[name]}), asked for {mine[name]}: "
                        f"use those {what} to go on, or delete that folder to start anew"
                    )
            return num_shards
        if self._expected < 1:
            raise SettingsError(
                f"{self._expected} images are expected: name a source that holds some, or give expected_count "
                "(an estimate will do)"
            )
        num_shards = math.ceil(self._expected / self._settings.samples_per_shard)
        storage.write_bytes(path, json.dumps({**mine, "num_shards": num_shards}).encode())
        return num_shards

    def to_the_end(self, piece_bytes: int, group_bytes: int) -> ShardReport:
        """Both passes; what turns out damaged on the way is made again."""
        for _ in range(_ROUNDS):
            pieces = self._encode(piece_bytes)
            if pieces is None:
                continue
            job = plan_groups(self._out, self._work, self._num_shards, pieces, group_bytes)
            damaged = self._assemble(job)
            if not damaged:
                return self._finish(job, pieces)
            for path in damaged:
                storage.delete(path)
            if any(reads_once(part) for part in self._parts):
                raise DataError(
                    f"an intermediate file fails its checksum ({damaged[0]}) and has been removed: make the "
                    "same call again to redo its images"
                )
        raise StorageError(f"intermediate files in {self._work} were damaged {_ROUNDS} times: is the storage sound?")

    def _encode(self, piece_bytes: int) -> list[Piece] | None:
        """Pass 1. All pieces, ordered by name; None where one was changed meanwhile."""
        job = EncodeJob(self._work, self._settings, self._num_shards, self._wanted_set, piece_bytes)
        named = [(part.name, part) for part in self._parts]
        known = [part.images for part in self._parts]
        total = self._expected if None in known else sum(images or 0 for images in known)

        def show(done: int) -> None:
            self._report("images", done, max(done, total))

        found, failures = self._tasks.run(encode_part, job, named, show)
        if failures:
            raise PartsFailed(failures, len(named), "parts of the source")
        seen = sum(found)
        self._report("images", seen, seen)
        with ThreadPoolExecutor(_READS) as readers:
            by_part = list(readers.map(lambda stem: read_pieces(self._work, stem), sorted(self._stems)))
        if not all(pieces and pieces[-1].last for pieces in by_part):
            return None
        return [piece for pieces in by_part for piece in pieces]

    def _assemble(self, job: AssembleJob) -> list[str]:
        """Pass 2. The paths of damaged pieces."""
        groups = len(job.groups) - 1
        named = [(f"shards {job.groups[i]} to {job.groups[i + 1] - 1}", i) for i in range(groups)]
        found, failures = self._tasks.run(
            assemble_group, job, named, lambda done: self._report("shards", done, self._num_shards)
        )
        if failures:
            raise PartsFailed(failures, groups, "groups of shards")
        return sorted({path for paths in found for path in paths})

    def _finish(self, job: AssembleJob, pieces: Sequence[Piece]) -> ShardReport:
        """Write the rejects, then the manifest, which makes the folder a finished one."""
        with ThreadPoolExecutor(_READS) as readers:
            described = list(readers.map(lambda shard: read_description(job, shard), range(self._num_shards)))
        shards: list[ShardInfo] = []
        batches: list[pa.RecordBatch] = []
        for shard, description in enumerate(described):
            if description is None:
                raise StorageError(
                    f"shard {shard} in {self._out} was changed while it was written: make the call again"
                )
            info, batch = description
            if info.count:
                column = pa.array(np.full(batch.num_rows, len(shards), np.int32))
                batches.append(batch.set_column(1, batch.schema.field(1), column))
                shards.append(info)
        self._report("shards", self._num_shards, self._num_shards)
        batch = _joined(batches)
        rejects = _rejects(pieces, batch.column("key"))
        missing = self._missing(batch.column("key"), rejects)
        _write_rejects(storage.join(self._out, REJECTS_NAME), rejects, missing)
        seen = sum(piece.end - piece.first - piece.absent for piece in pieces)
        unwanted = sum(piece.unwanted for piece in pieces)
        if not batch.num_rows:
            raise DataError(
                f"not one of {seen:,} images was usable for {self._out}: see {REJECTS_NAME} there "
                f"for the {len(rejects) + len(missing):,} reasons"
            )
        report = ShardReport(
            folder=self._out,
            written=batch.num_rows,
            rejected=len(rejects) + len(missing),
            missing=len(missing),
            duplicates=seen - unwanted - batch.num_rows - len(rejects),
            unwanted=unwanted,
            shards=len(shards),
            bytes=sum(s.bytes for s in shards),
            digest="",
        )
        fields = {k: v for k, v in dataclasses.asdict(report).items() if k not in ("folder", "digest", "already_done")}
        manifest = write_manifest(self._out, batch, shards, settings=dataclasses.asdict(self._settings), report=fields)
        return dataclasses.replace(report, digest=manifest.digest)

    def _missing(self, written: pa.Array, rejects: dict[str, str]) -> pa.Array:
        """The wanted keys that no part had."""
        if self._wanted is None:
            return pa.array([], pa.string())
        met = pa.concat_arrays([written, pa.array(list(rejects), pa.string())])
        return self._wanted.filter(pc.call_function("invert", [_is_in(self._wanted, met)]))


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if not batches:
        columns = dict.fromkeys(("shard", "offset", "size", "crc32", "width", "height"), np.zeros(0))
        return make_batch(keys=[], **columns)
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _is_in(values: pa.Array, known: pa.Array) -> pa.BooleanArray:
    return pc.call_function("is_in", [values], pc.SetLookupOptions(known))


def _rejects(pieces: Iterable[Piece], written: pa.Array) -> dict[str, str]:
    """Key -> reason of the images that no part had a sound copy of; of two reasons the first by alphabet."""
    rejects: dict[str, str] = {}
    for piece in pieces:
        for key, reason in piece.rejects:
            rejects[key] = min(reason, rejects.get(key, reason))
    names = list(rejects)
    usable = _is_in(pa.array(names, pa.string()), written)
    for name, is_usable in zip(names, usable.to_pylist(), strict=True):
        if is_usable:
            del rejects[name]
    return rejects


def _write_rejects(path: str, rejects: dict[str, str], missing: pa.Array) -> None:
    """Rows of key and reason, sorted by key; a part at a time, since millions of images may be missing."""
    keys = pa.concat_arrays([pa.array(list(rejects), pa.string()), missing])
    order = pc.call_function("sort_indices", [keys], pc.SortOptions([("", "ascending")])).to_numpy()
    with storage.replacing(path) as temporary, writing(path), open(temporary, "wb") as file:
        for start in range(0, max(len(order), 1), 1 << 16):
            text = io.StringIO()
            rows = ReportWriter(text)
            if start == 0:
                rows.writerow(("key", "reason"))
            for key in keys.take(pa.array(order[start : start + (1 << 16)])).to_pylist():
                rows.writerow((key, rejects.get(key, "wanted, but in no source")))
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))
