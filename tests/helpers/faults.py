"""Faults of stored data, injected into a tiny prepared folder, and how paml reacts to them.

A fault is a flipped bit, an overwritten block, a truncation or an exchange of files, at a random position among the
bytes of its kind. The truth is in memory; what is read back under a fault is compared with it by key.
"""

import collections
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from paml import storage
from paml.checksum import CHECKSUM_PLACEHOLDER, write_checksum
from paml.errors import DataError
from paml.labels import NEGATIVE, POSITIVE, LabelError, LabelTable, table_from_triples
from paml.shards import CorruptSampleError, Manifest, ShardReader, ShardSettings, verify_shards, write_shards
from paml.shards.manifest import MANIFEST_NAME, shards_digest
from paml.storage import StorageError

BLOCK, RECORD, END_MARK = 512, 10_240, 1024
TABLE = "labels.arrow"
CLASSES = tuple(f"/m/{number:02d}" for number in range(12))

Range = tuple[int, int]
Labels = frozenset[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Member:
    """Byte positions of an image in a tar file."""

    key: str
    header: int
    body: int
    body_end: int
    end: int
    """End of the padding after the body."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An intact folder with shards, manifest and label table, and its content."""

    folder: Path
    """Faults are injected here, unless `bucket_folder` is set."""
    files: Mapping[str, bytes]
    """Content by name: tar files, manifest, table."""
    members: Mapping[str, Sequence[Member]]
    """By tar file."""
    images: Mapping[str, bytes]
    """By key."""
    labels: Mapping[str, Labels]
    """(class, state) pairs by key."""
    bucket_folder: str | None = None
    """A folder in a bucket with the same files."""

    @property
    def tars(self) -> list[str]:
        return sorted(self.members)

    def keys_of(self, tar: str) -> set[str]:
        return {member.key for member in self.members[tar]}

    @property
    def root(self) -> str:
        return self.bucket_folder or str(self.folder)

    def path(self, name: str) -> str:
        return storage.join(self.root, name)

    def put(self, name: str, data: bytes | None) -> None:
        """Replace a file; None removes it."""
        if self.bucket_folder is not None:
            storage.delete(self.path(name)) if data is None else storage.write_bytes(self.path(name), data)
            return
        # a new file each time, as a copy creates: one that is open stays intact
        (self.folder / name).unlink(missing_ok=True)
        if data is not None:
            (self.folder / name).write_bytes(data)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of the files, and the images it damages."""

    kind: str
    what: str
    files: Mapping[str, bytes | None]
    """New content by name; None removes a file."""
    damaged: frozenset[str] = frozenset()
    """Keys of the images whose bytes are changed, moved or missing."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one fault."""

    detected: bool
    """By `verify_shards`, or on opening the manifest or the table."""
    named: bool
    """Every changed file is named, and exactly the damaged images."""
    refused: bool
    """The manifest or the table is refused, so nothing is delivered."""
    wrong: int
    """Images delivered with wrong bytes or wrong labels."""
    unnamed: int
    """Images missing without an error that names them."""
    lost_intact: int
    """Images not delivered although their bytes are intact."""
    not_delivered: int
    """Images that were not delivered."""


def prepare(folder: Path, *, images: int = 288, per_shard: int = 8, size: int = 32) -> Prepared:
    """Write an intact folder."""
    keys: list[str] = [f"{number * 2654435761 % 2**64:016x}" for number in range(images)]
    write_shards(
        [(key, _picture(number, size)) for number, key in enumerate(keys)],
        folder,
        ShardSettings(size=size, samples_per_shard=per_shard),
    )
    rng = np.random.default_rng(11)
    seen = rng.random((images, len(CLASSES))) < 0.4
    positive = rng.random(seen.shape) < 0.5
    image, cls = np.nonzero(seen)
    state = np.where(positive[image, cls], POSITIVE, NEGATIVE)
    table_from_triples(keys, CLASSES, None, image, cls, state, str(folder / TABLE))
    manifest = Manifest.open(folder)
    members = {}
    for shard, info in enumerate(manifest.shards):
        rows = manifest.rows_of_shard(shard)
        members[info.name] = [_member(manifest, row) for row in range(rows.start, rows.stop)]
    names = [*members, MANIFEST_NAME, TABLE]
    files = {name: (folder / name).read_bytes() for name in names}
    return Prepared(
        folder=folder,
        files=files,
        members=members,
        images={m.key: files[tar][m.body : m.body_end] for tar, inside in members.items() for m in inside},
        labels=_labels(LabelTable.open(folder / TABLE), keys),
    )


def _picture(number: int, size: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def _member(manifest: Manifest, row: int) -> Member:
    body, size = int(manifest.offset[row]), int(manifest.size[row])
    return Member(manifest.key(row), body - BLOCK, body, body + size, body + -(-size // BLOCK) * BLOCK)


def _labels(table: LabelTable, keys: list[str]) -> dict[str, Labels]:
    triples = table.lookup(table.rows_of(keys))
    labels: dict[str, set[tuple[int, int]]] = {key: set() for key in keys}
    for image, cls, state in zip(triples.image, triples.cls, triples.state, strict=True):
        labels[keys[image]].add((int(cls), int(state)))
    return {key: frozenset(pairs) for key, pairs in labels.items()}


Maker = Callable[[Prepared, np.random.Generator], Fault]
KINDS: dict[str, Maker] = {}


def _kind(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        KINDS[name] = maker
        return maker

    return add


def _ranges(prepared: Prepared, part: str) -> list[tuple[str, Range]]:
    """(tar file, byte range) of every header, body, padding or end."""
    ranges = []
    for tar, members in prepared.members.items():
        ends = (members[-1].end, len(prepared.files[tar]))
        parts = {
            "headers": [(m.header, m.body) for m in members],
            "bodies": [(m.body, m.body_end) for m in members],
            "padding": [(m.body_end, m.end) for m in members],
            "ends": [ends],
            "files": [(0, ends[1])],
        }
        ranges += [(tar, span) for span in parts[part] if span[0] < span[1]]
    return ranges


def _draw(ranges: Sequence[tuple[str, Range]], rng: np.random.Generator) -> tuple[str, int, Range]:
    """A random byte of all ranges: (tar file, position, its range)."""
    sizes = np.array([high - low for _, (low, high) in ranges])
    position = int(rng.integers(sizes.sum()))
    chosen = int(np.searchsorted(np.cumsum(sizes), position, side="right"))
    tar, (low, high) = ranges[chosen]
    return tar, low + position - int(sizes[:chosen].sum()), (low, high)


def _damaged_keys(prepared: Prepared, tar: str, data: bytes) -> frozenset[str]:
    """Keys of images whose bytes are not at their old position."""
    return frozenset(m.key for m in prepared.members[tar] if data[m.body : m.body_end] != prepared.images[m.key])


def _changed(prepared: Prepared, kind: str, what: str, tar: str, data: bytes) -> Fault:
    return Fault(kind, what, {tar: data}, _damaged_keys(prepared, tar, data))


def _flip_in(part: str) -> None:
    kind = f"bit flip in tar {part}"

    @_kind(kind)
    def make(prepared: Prepared, rng: np.random.Generator) -> Fault:
        tar, position, _ = _draw(_ranges(prepared, part), rng)
        bit = int(rng.integers(8))
        data = bytearray(prepared.files[tar])
        data[position] ^= 1 << bit
        return _changed(prepared, kind, f"bit {bit} of byte {position} of {tar}", tar, bytes(data))


for _part in ("headers", "bodies", "padding", "ends", "files"):
    _flip_in(_part)


def _flip_file(name: str, kind: str) -> None:
    @_kind(kind)
    def make(prepared: Prepared, rng: np.random.Generator) -> Fault:
        data = bytearray(prepared.files[name])
        position, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[position] ^= 1 << bit
        return Fault(kind, f"bit {bit} of byte {position} of {name}", {name: bytes(data)})


_flip_file(MANIFEST_NAME, "bit flip in the manifest")
_flip_file(TABLE, "bit flip in the label table")


def _overwrite(kind: str, part: str, fill: Callable[[int, np.random.Generator], bytes]) -> None:
    @_kind(kind)
    def make(prepared: Prepared, rng: np.random.Generator) -> Fault:
        tar, position, (low, high) = _draw(_ranges(prepared, part), rng)
        start, end = (low, high) if part == "headers" else (position, min(position + BLOCK, high))
        data = bytearray(prepared.files[tar])
        data[start:end] = fill(end - start, rng)
        if bytes(data) == prepared.files[tar]:
            data[start] ^= 1
        return _changed(prepared, kind, f"bytes {start} to {end} of {tar}", tar, bytes(data))


_overwrite("tar header zeroed", "headers", lambda size, rng: bytes(size))
_overwrite("tar header garbled", "headers", lambda size, rng: rng.bytes(size))
_overwrite("up to 512 bytes of a body zeroed", "bodies", lambda size, rng: bytes(size))


def _cut(kind: str, where: Callable[[Prepared, str, np.random.Generator], int | None]) -> None:
    @_kind(kind)
    def make(prepared: Prepared, rng: np.random.Generator) -> Fault:
        size: int | None = None
        tar = ""
        while size is None or size >= len(prepared.files[tar]):
            tar = prepared.tars[rng.integers(len(prepared.members))]
            size = where(prepared, tar, rng)
        return _changed(prepared, kind, f"{tar} cut to {size} bytes", tar, prepared.files[tar][:size])


def _some(prepared: Prepared, tar: str, rng: np.random.Generator) -> Member:
    return prepared.members[tar][int(rng.integers(len(prepared.members[tar])))]


def _within(low: int, high: int, rng: np.random.Generator) -> int | None:
    """A position strictly between the two."""
    return int(rng.integers(low + 1, high)) if high - low > 1 else None


def _in_header(prepared: Prepared, tar: str, rng: np.random.Generator) -> int | None:
    member = _some(prepared, tar, rng)
    return _within(member.header, member.body, rng)


def _in_body(prepared: Prepared, tar: str, rng: np.random.Generator) -> int | None:
    member = _some(prepared, tar, rng)
    return _within(member.body, member.body_end, rng)


def _in_padding(prepared: Prepared, tar: str, rng: np.random.Generator) -> int | None:
    member = _some(prepared, tar, rng)
    return _within(member.body_end, member.end, rng)


def _at_block(prepared: Prepared, tar: str, rng: np.random.Generator) -> int:
    return BLOCK * int(rng.integers(len(prepared.files[tar]) // BLOCK))


def _in_end(prepared: Prepared, tar: str, rng: np.random.Generator) -> int | None:
    end = prepared.members[tar][-1].end
    return _within(end, min(end + END_MARK, len(prepared.files[tar])), rng)


def _at_record(prepared: Prepared, tar: str, rng: np.random.Generator) -> int:
    return RECORD * int(rng.integers(len(prepared.files[tar]) // RECORD))


_cut("tar cut in a header", _in_header)
_cut("tar cut after a header", lambda prepared, tar, rng: _some(prepared, tar, rng).body)
_cut("tar cut in a body", _in_body)
_cut("tar cut after a body", lambda prepared, tar, rng: _some(prepared, tar, rng).body_end)
_cut("tar cut in padding", _in_padding)
_cut("tar cut after a member", lambda prepared, tar, rng: _some(prepared, tar, rng).end)
_cut("tar cut at a block", _at_block)
_cut("tar cut in the end mark", _in_end)
_cut("tar cut at a record", _at_record)


def _cut_file(name: str, kind: str) -> None:
    @_kind(kind)
    def make(prepared: Prepared, rng: np.random.Generator) -> Fault:
        size = int(rng.integers(len(prepared.files[name])))
        if rng.random() < 0.2:
            size -= size % 8  # where the parts of an Arrow file end
        return Fault(kind, f"{name} cut to {size} bytes", {name: prepared.files[name][:size]})


_cut_file(MANIFEST_NAME, "manifest cut")
_cut_file(TABLE, "label table cut")


@_kind("shards swapped")
def _swapped(prepared: Prepared, rng: np.random.Generator) -> Fault:
    size = 2 if rng.random() < 0.7 else 3
    chosen = [prepared.tars[number] for number in rng.choice(len(prepared.tars), size, replace=False)]
    files = {tar: prepared.files[other] for tar, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)}
    damaged = frozenset[str]().union(*(_damaged_keys(prepared, tar, data) for tar, data in files.items()))
    return Fault("shards swapped", " for ".join(chosen), files, damaged)


@_kind("shards missing")
def _missing(prepared: Prepared, rng: np.random.Generator) -> Fault:
    chosen = [prepared.tars[number] for number in rng.choice(len(prepared.tars), rng.integers(1, 4), replace=False)]
    damaged = frozenset[str]().union(*(prepared.keys_of(tar) for tar in chosen))
    return Fault("shards missing", ", ".join(chosen), dict.fromkeys(chosen), damaged)


@_kind("shard overwritten by a copy of another")
def _doubled(prepared: Prepared, rng: np.random.Generator) -> Fault:
    tar, other = (prepared.tars[number] for number in rng.choice(len(prepared.tars), 2, replace=False))
    return _changed(
        prepared, "shard overwritten by a copy of another", f"{other} over {tar}", tar, prepared.files[other]
    )


@_kind("shard duplicated under a new name")
def _extra(prepared: Prepared, rng: np.random.Generator) -> Fault:
    tar = prepared.tars[rng.integers(len(prepared.tars))]
    name = f"shard-{rng.integers(len(prepared.tars), 10**6):06d}.tar"
    return Fault("shard duplicated under a new name", f"{tar} also as {name}", {name: prepared.files[tar]})


def _rewritten(prepared: Prepared, name: str, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes]) -> bytes:
    """An Arrow file with wrong counts and a correct checksum."""
    changed = batch.replace_schema_metadata({**(batch.schema.metadata or {}), **metadata, **CHECKSUM_PLACEHOLDER})
    path = prepared.folder.parent / f"rewritten-{name}"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, changed.schema) as writer:
        writer.write_batch(changed)
    write_checksum(str(path))
    return path.read_bytes()


@_kind("wrong shard counts in a manifest with a valid checksum")
def _shard_counts(prepared: Prepared, rng: np.random.Generator) -> Fault:
    batch = pa.ipc.open_file(prepared.files[MANIFEST_NAME]).get_batch(0)
    shards = list(Manifest(str(prepared.folder), batch).shards)
    shard, by = int(rng.integers(len(shards))), int(rng.choice([-3, -2, -1, 1, 2, 3]))
    shards[shard] = dataclasses.replace(shards[shard], count=shards[shard].count + by)
    if rng.random() < 0.3:  # the sum stays correct
        other = (shard + 1 + int(rng.integers(len(shards) - 1))) % len(shards)
        shards[other] = dataclasses.replace(shards[other], count=shards[other].count - by)
    listed = json.dumps([dataclasses.asdict(shard) for shard in shards]).encode()
    data = _rewritten(prepared, MANIFEST_NAME, batch, {b"shards": listed, b"digest": shards_digest(shards).encode()})
    return Fault(
        "wrong shard counts in a manifest with a valid checksum", f"shard {shard} by {by}", {MANIFEST_NAME: data}
    )


@_kind("duplicate or missing rows in a manifest with a valid checksum")
def _rows(prepared: Prepared, rng: np.random.Generator) -> Fault:
    batch = pa.ipc.open_file(prepared.files[MANIFEST_NAME]).get_batch(0)
    row, duplicate = int(rng.integers(batch.num_rows)), bool(rng.random() < 0.5)
    rows = [*range(row + duplicate), *range(row + (not duplicate), batch.num_rows)]
    data = _rewritten(prepared, MANIFEST_NAME, batch.take(pa.array(rows)), {})
    what = f"row {row} {'duplicated' if duplicate else 'omitted'}"
    return Fault("duplicate or missing rows in a manifest with a valid checksum", what, {MANIFEST_NAME: data})


@_kind("wrong counts in a label table with a valid checksum")
def _table_counts(prepared: Prepared, rng: np.random.Generator) -> Fault:
    batch = pa.ipc.open_file(prepared.files[TABLE]).get_batch(0)
    about = json.loads((batch.schema.metadata or {})[b"paml"])
    field, by = str(rng.choice(["num_images", "num_annotations"])), int(rng.integers(1, 100))
    by = -by if rng.random() < 0.5 else by
    about[field] += by
    data = _rewritten(prepared, TABLE, batch, {b"paml": json.dumps(about).encode()})
    return Fault("wrong counts in a label table with a valid checksum", f"{field} by {by}", {TABLE: data})


class Injected:
    """A context in which the folder has a fault."""

    def __init__(self, prepared: Prepared, fault: Fault) -> None:
        self._prepared, self._fault = prepared, fault

    def __enter__(self) -> None:
        for name, data in self._fault.files.items():
            self._prepared.put(name, data)

    def __exit__(self, *error: object) -> None:
        for name in self._fault.files:
            self._prepared.put(name, self._prepared.files.get(name))


def in_bucket(prepared: Prepared, folder: str) -> Prepared:
    """The same content in `folder` of a bucket, where faults are then injected."""
    copy = dataclasses.replace(prepared, bucket_folder=folder)
    for name, data in prepared.files.items():
        copy.put(name, data)
    return copy


def judge(prepared: Prepared, fault: Fault, cache: str | None = None) -> Outcome:
    """Inject a fault; returns what verification reports and what reading delivers.

    `cache`: the folder of the shard cache, for a bucket.
    """
    with Injected(prepared, fault):
        paths = {prepared.path(name) for name in fault.files}
        try:
            report = verify_shards(prepared.root, workers=2)
            named = {fault.path for fault in report.faults}
            lost = set(report.lost)
        except DataError as error:
            named, lost = {path for path in paths if path in str(error)}, set()
        try:
            table = LabelTable.open(prepared.path(TABLE))
        except LabelError as error:
            named |= {path for path in paths if path in str(error)}
            table = None
        detected, exact = bool(named & paths), named == paths
        try:
            manifest = Manifest.open(prepared.root)
        except DataError:
            manifest = None
        if manifest is None or table is None:
            return Outcome(detected, exact, True, 0, 0, 0, 0)
        delivered, errors, wrong = _read_all(prepared, manifest, table, cache)
        missing = set(prepared.images) - delivered
        return Outcome(
            detected=detected,
            named=exact and lost == fault.damaged,
            refused=False,
            wrong=wrong,
            unnamed=len(missing - errors),
            lost_intact=len(missing - fault.damaged),
            not_delivered=len(missing),
        )


def _read_all(
    prepared: Prepared, manifest: Manifest, table: LabelTable, cache: str | None
) -> tuple[set[str], set[str], int]:
    """(keys delivered, keys named by errors, keys delivered wrong), read as training does."""
    reader = ShardReader(manifest, cache)
    labels = _labels(table, manifest.keys().to_pylist())
    delivered: set[str] = set()
    errors: set[str] = set()
    wrong = 0
    for row in range(len(manifest)):
        key = manifest.key(row)
        try:
            data = bytes(reader.read(row))
        except (CorruptSampleError, StorageError) as error:
            text = str(error)
            shard = manifest.shard_path(int(manifest.shard[row]))
            if key in text or shard in text:
                errors.add(key)
            continue
        delivered.add(key)
        wrong += data != prepared.images.get(key) or labels[key] != prepared.labels.get(key)
    return delivered, errors, wrong


def draw_faults(prepared: Prepared, per_kind: int, seed: int = 0) -> list[Fault]:
    """`per_kind` faults of each kind."""
    faults = []
    for number, (kind, make) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, number])
        made = [make(prepared, rng) for _ in range(per_kind)]
        assert all(fault.kind == kind for fault in made)
        faults += made
    return faults


@dataclasses.dataclass
class Row:
    """Sums of the outcomes of one kind."""

    injected: int = 0
    detected: int = 0
    named: int = 0
    refused: int = 0
    wrong: int = 0
    unnamed: int = 0
    lost_intact: int = 0
    not_delivered: int = 0


def judge_all(prepared: Prepared, faults: Sequence[Fault]) -> tuple[dict[str, Row], list[str]]:
    """(sums by kind, descriptions of the faults that were missed)."""
    table: dict[str, Row] = collections.defaultdict(Row)
    missed = []
    for fault in faults:
        outcome, row = judge(prepared, fault), table[fault.kind]
        row.injected += 1
        for field in dataclasses.fields(outcome):
            setattr(row, field.name, getattr(row, field.name) + int(getattr(outcome, field.name)))
        if not (outcome.detected and outcome.named) or outcome.wrong or outcome.unnamed or outcome.lost_intact:
            missed.append(f"{fault.kind}: {fault.what}: {outcome}")
    return dict(table), missed


def report(table: Mapping[str, Row]) -> str:
    """As a Markdown table."""
    columns = ("injected", "detected", "named", "refused", "wrong pixels or labels", "unnamed")
    columns += ("intact images lost", "images not delivered")
    lines = ["| fault | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    total = Row()
    for kind, row in [*table.items(), ("all", total)]:
        cells = [getattr(row, field.name) for field in dataclasses.fields(row)]
        lines.append(f"| {kind} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
        if row is not total:
            for field in dataclasses.fields(row):
                setattr(total, field.name, getattr(total, field.name) + getattr(row, field.name))
    return "\n".join(lines)
