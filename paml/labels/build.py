"""From annotation CSV files of Open Images (V3 to V7) to a label table.

DuckDB parses within a memory limit, in parallel; what remains of a row is 10 bytes (key and code), so memory
is O(annotations). Nothing is dropped in silence: every row is either a label of the table or is counted by kind
and written to the rejects file beside it.
"""

import contextlib
import csv
import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.labels.states import LabelError
from paml.labels.table import check_classes, code_type, hex_to_uint64, uint64_to_hex, write_table

HEADER = ("ImageID", "Source", "LabelName", "Confidence")
KINDS = ("malformed_row", "unknown_class", "malformed_confidence", "duplicate", "contradiction")
CONFLICT_RULES = {
    "negative": "a pair that is both 1 and 0 is NEGATIVE; the rows that say 1 are rejected",
    "positive": "a pair that is both 1 and 0 is POSITIVE; the rows that say 0 are rejected",
    "drop": "a pair that is both 1 and 0 is left UNOBSERVED; all its rows are rejected",
    "error": "a pair that is both 1 and 0 stops the build",
}
_BATCH_ROWS = 1 << 18
_SETTLE_ROWS = 1 << 20
_MAX_TEXT = 500
_CONFIDENCES = pa.array(["0", "1", "0.0", "1.0"])  # the last bit of a place is the state
_UNKNOWN, _BAD_CONFIDENCE, _BAD_ROW = -1, -2, -3
_KIND_OF_CODE = {
    _UNKNOWN: "unknown_class",
    _BAD_CONFIDENCE: "malformed_confidence",
    _BAD_ROW: "malformed_row",
}
_REJECTS = pa.schema(
    [
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("ImageID", pa.string()),
        ("Source", pa.string()),
        ("LabelName", pa.string()),
        ("Confidence", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How annotation files become a table."""

    conflict: Literal["negative", "positive", "drop", "error"] = "negative"
    """What becomes of a pair that is both 1 and 0: see CONFLICT_RULES. Recorded in the table."""
    image_ids: Literal["auto", "hex"] = "auto"
    """`hex` rejects, as malformed rows, ImageIDs other than 16 lower-case hex digits; `auto` takes any name, and
    stores all keys as text (20 bytes an image, not 8) as soon as one is no such number."""
    memory_limit_mb: int = 512
    """What DuckDB may use, in MiB; what needs more is spilled to the temporary folder. The labels themselves take
    about 40 bytes each while they are sorted, over and above this."""
    threads: int = 0
    """Threads of the parser; 0 takes the cores that this process may use."""
    temp_folder: str | None = None
    """Where DuckDB spills; the system's temporary folder by default."""

    def __post_init__(self) -> None:
        if self.conflict not in CONFLICT_RULES:
            raise LabelError(f"labels.conflict is {self.conflict!r}, allowed are {', '.join(CONFLICT_RULES)}")
        if self.image_ids not in ("auto", "hex"):
            raise LabelError(f"labels.image_ids is {self.image_ids!r}, allowed are auto and hex")
        if self.memory_limit_mb < 64:
            raise LabelError(f"labels.memory_limit_mb is {self.memory_limit_mb}, allowed is 64 or more: set 512")
        if self.threads < 0:
            raise LabelError(f"labels.threads is {self.threads}, allowed is 0 (all cores) or more: set 0")


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What a build did. `rows` = `annotations` + the sum of `rejected`."""

    path: str
    """The table."""
    rejects_path: str
    """The rejected rows (Parquet), with kind, file and what they said."""
    rows: int
    """Rows of all files, headers and empty lines left out."""
    images: int
    """Images with one label or more."""
    annotations: int
    """Labels in the table."""
    positives: int
    negatives: int
    classes: int
    """Classes of the class list, annotated or not."""
    annotated_classes: int
    """Classes with one label or more."""
    unnamed_classes: int
    """Classes without a description, which are named by their MIDs."""
    rejected: dict[str, int]
    """Rejected rows by kind; all of KINDS are there."""
    conflicting_pairs: int
    """(image, class) pairs that were both 1 and 0."""
    unknown_classes: tuple[tuple[str, int], ...]
    """MIDs that are not in the class list, with their rows, the most frequent first."""
    conflict: str
    """The rule for such pairs."""
    first_text_key: str | None
    """The first ImageID that is not 16 lower-case hex digits, which makes all keys text."""
    digest: str
    """Digest of the table's content."""

    def __str__(self) -> str:
        lines = [
            f"label table {self.path}: {self.images:,} images, {self.annotations:,} labels "
            f"({self.positives:,} positive, {self.negatives:,} negative), "
            f"{self.annotated_classes:,} of {self.classes:,} classes annotated",
            f"{self.rows:,} rows read, {sum(self.rejected.values()):,} rejected: "
            + ", ".join(f"{kind.replace('_', ' ')} {self.rejected[kind]:,}" for kind in KINDS),
        ]
        if self.conflicting_pairs:
            lines.append(f"{self.conflicting_pairs:,} contradicting pairs: {CONFLICT_RULES[self.conflict]}")
        if self.unknown_classes:
            first = ", ".join(f"{mid} ({count:,})" for mid, count in self.unknown_classes[:5])
            lines.append(f"{len(self.unknown_classes):,} classes are not in the class list, most often {first}")
        if self.unnamed_classes:
            lines.append(f"{self.unnamed_classes:,} classes have no description and are named by their MIDs")
        if self.first_text_key is not None:
            lines.append(f"keys are stored as text, since {self.first_text_key!r} is not 16 lower-case hex digits")
        if any(self.rejected.values()):
            lines.append(f"the rejected rows are in {self.rejects_path}")
        return "\n".join(lines)


class _Settled(NamedTuple):
    """Labels in order: keys uint64[n], offsets int64[n + 1], codes[m]; rejected ones as (key uint64, code) arrays."""

    keys: np.ndarray
    offsets: np.ndarray
    codes: np.ndarray
    duplicates: tuple[np.ndarray, np.ndarray]
    contradictions: tuple[np.ndarray, np.ndarray]
    conflicting_pairs: int


def build_label_table(
    annotations: str | Sequence[str],
    classes: str,
    out: str,
    *,
    descriptions: str | None = None,
    settings: LabelSettings | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> LabelReport:
    """Read annotation files and write the label table `out` and, beside it, `<out stem>.rejects.parquet`.

    annotations: CSV files with header `ImageID,Source,LabelName,Confidence` (`annotations-human.csv` of V3,
    `*-human-imagelabels.csv` of V4 to V7, with or without the prefixes oidv6- and oidv7-); Confidence is 1 or 0.
    classes: one MID a line (`classes-trainable.txt`), or a class CSV whose first column is the MID; its order is
    the order of the class indices. descriptions: class CSV of MID and name, with or without a header.
    progress: called with (file, rows read so far).

    Raises LabelError for a wrong header, an empty file, no usable row, or, by rule, a contradiction; StorageError
    and FileNotFoundError for files that cannot be read or written.
    """
    settings = settings or LabelSettings()
    paths = [annotations] if isinstance(annotations, str) else list(annotations)
    if not paths:
        raise LabelError("there are no annotation files: name at least one")
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise LabelError(f"annotation file {twice!r} is named twice: all its rows would be duplicates, name it once")
    mids = read_classes(classes)
    names, unnamed = _names_of(mids, descriptions)
    local = {path: storage.local_copy(path) for path in paths}
    quoted = {path: _check_header(path, local[path]) for path in paths}

    rejects_path = os.path.splitext(out)[0] + ".rejects.parquet"
    with (
        _Rejects(rejects_path) as rejects,
        _Digests([*local.values(), storage.local_copy(classes)]) as digests,
    ):
        labels = _Collected(code_type(len(mids)), settings.image_ids)
        with _parser(settings) as connection:
            for path in paths:
                _parse(connection, path, local[path], quoted[path], pa.array(mids), labels, rejects, progress)
        if labels.count == 0:
            raise LabelError(_nothing_usable(paths, classes, mids, rejects))
        settled, keys = labels.settle(settings.conflict, mids)
        rejects.add_labels("duplicate", keys, settled.duplicates, mids)
        rejects.add_labels("contradiction", keys, settled.contradictions, mids)
        sources = [
            {"file": os.path.basename(path), "sha256": sha256, "bytes": size}
            for path, (sha256, size) in zip([*paths, classes], digests.results(), strict=True)
        ]
    rejected = {kind: rejects.counts[kind] for kind in KINDS}
    table = write_table(
        out,
        keys=keys(settled.keys),
        offsets=settled.offsets,
        codes=settled.codes,
        classes=mids,
        names=names,
        metadata={
            "rows": labels.count + rejects.before_labels,
            "rejected": rejected,
            "conflict": settings.conflict,
            "conflict_rule": CONFLICT_RULES[settings.conflict],
            "conflicting_pairs": settled.conflicting_pairs,
            "sources": sources,
        },
    )
    positives, negatives = table.class_counts()
    return LabelReport(
        path=out,
        rejects_path=rejects_path,
        rows=labels.count + rejects.before_labels,
        images=table.num_images,
        annotations=table.num_annotations,
        positives=int(positives.sum()),
        negatives=int(negatives.sum()),
        classes=len(mids),
        annotated_classes=int(((positives + negatives) > 0).sum()),
        unnamed_classes=unnamed,
        rejected=rejected,
        conflicting_pairs=settled.conflicting_pairs,
        unknown_classes=tuple(rejects.unknown.most_common()),
        conflict=settings.conflict,
        first_text_key=labels.first_text_key,
        digest=table.digest,
    )


def read_classes(path: str) -> list[str]:
    """The MIDs of a class list, in its order: one a line, or the first column of a class CSV.

    Raises LabelError where the list is empty or names a class twice.
    """
    mids = [row[0] for row in _csv_rows(path)]
    if not mids:
        raise LabelError(f"class list {path!r} is empty: it holds one MID a line, as classes-trainable.txt does")
    try:
        check_classes(mids, mids)
    except LabelError as error:
        raise LabelError(f"class list {path!r}: {error}") from None
    return mids


def read_descriptions(path: str) -> dict[str, str]:
    """MID to name, from a class CSV with or without a header; the first line of a MID counts.

    Raises LabelError for a line without a name.
    """
    names: dict[str, str] = {}
    for row in _csv_rows(path):
        if len(row) < 2:
            raise LabelError(
                f"class descriptions {path!r}: the line of {row[0]!r} has no name; a line is `MID,name`: add the name"
            )
        names.setdefault(row[0], row[1])
    return names


def _csv_rows(path: str) -> list[list[str]]:
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabelError(f"{path!r} is not UTF-8 text ({error}): convert it, or name the right file") from None
    rows = [[row[0].strip(), *row[1:]] for row in csv.reader(io.StringIO(text, newline="")) if row]
    rows = [row for row in rows if row[0]]
    return rows[1:] if rows and rows[0][0] == "LabelName" else rows


def _names_of(mids: Sequence[str], descriptions: str | None) -> tuple[list[str], int]:
    known = read_descriptions(descriptions) if descriptions else {}
    return [known.get(mid) or mid for mid in mids], sum(not known.get(mid) for mid in mids)


def _check_header(path: str, local: str) -> bool:
    """Whether the file quotes its fields. Raises LabelError where it is empty or its header is another one."""
    expected = ",".join(HEADER)
    with open(local, "rb") as file:
        first = file.readline(1 << 16)
        second = file.readline(1 << 16)
    if not first:
        raise LabelError(
            f"annotation file {path!r} is empty (0 bytes), expected is a CSV file with the header {expected}: "
            "fetch it again, or leave it out"
        )
    if first.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise LabelError(f"annotation file {path!r} is compressed, expected is plain CSV: unpack it first")
    found = first.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if tuple(next(csv.reader([found]), [])) != HEADER:
        raise LabelError(
            f"annotation file {path!r} has a wrong header: found {found[:200]!r}, expected {expected!r}: "
            + _header_advice(found)
        )
    return second.startswith(b'"')


def _header_advice(found: str) -> str:
    cells = [cell.strip() for cell in found.split(",")]
    if "XMin" in cells or "MaskPath" in cells or "LabelName1" in cells:
        return "these are boxes, masks or relations; name the file of human-verified image-level labels"
    if len(cells) == 4 and cells[3] in ("0", "1", "0.0", "1.0"):
        return "this looks like a row: put the header line above it"
    if sorted(cells) == sorted(HEADER):
        return "the columns stand in another order: write them in the expected one"
    if {cell.lower() for cell in cells} == {name.lower() for name in HEADER}:
        return "mind upper and lower case"
    return "name the file of human-verified image-level labels, or rewrite this one with these four columns"


@contextlib.contextmanager
def _parser(settings: LabelSettings) -> Iterator[Any]:
    """A DuckDB connection in memory that spills to a folder of its own."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix="paml-labels-", dir=settings.temp_folder) as spill:
        config = {
            "memory_limit": f"{settings.memory_limit_mb}MiB",
            "threads": settings.threads or _usable_cores(),
            "temp_directory": spill,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        connection = duckdb.connect(config=config)
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise LabelError(
                f"the annotation parser needs more than labels.memory_limit_mb = {settings.memory_limit_mb}: "
                f"double it ({str(error).splitlines()[0]})"
            ) from error
        except duckdb.IOException as error:
            raise storage.StorageError(
                0,
                f"the annotation parser cannot read its file or spill to {spill!r}: {error}: free some disk space",
            ) from error
        finally:
            connection.close()
            pa.default_memory_pool().release_unused()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _literal_path(path: str) -> str:
    """A path that DuckDB reads as itself: in a file name `[`, `*` and `?` would be patterns."""
    return _literal("".join(f"[{mark}]" if mark in "*?[" else mark for mark in path))


def _parse(
    connection: Any,
    path: str,
    local: str,
    quoted: bool,
    mids: pa.Array,
    labels: "_Collected",
    rejects: "_Rejects",
    progress: Callable[[str, int], None] | None,
) -> None:
    """Stream one file into `labels` and `rejects`."""
    import duckdb

    quote = _literal('"' if quoted else "")
    columns = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in HEADER)
    query = f"""
        FROM read_csv({_literal_path(local)}, auto_detect = false, header = true, delim = ',',
            quote = {quote}, escape = {quote}, columns = {{{columns}}}, compression = 'none',
            store_rejects = true, rejects_table = 'bad_lines', rejects_scan = 'bad_scans')
        """
    connection.execute("DROP TABLE IF EXISTS bad_lines; DROP TABLE IF EXISTS bad_scans")
    rows = 0
    try:
        for batch in connection.sql(query).to_arrow_reader(_BATCH_ROWS):
            rows += batch.num_rows
            codes = _codes_of(batch, mids)
            bad = codes < 0
            if bad.any():
                rejects.add_rows(path, batch.filter(pa.array(bad)), codes[bad])
                batch, codes = batch.filter(pa.array(~bad)), codes[~bad]
            odd = labels.add(batch.column("ImageID"), codes)
            if odd is not None:
                rejects.add_odd_keys(path, batch.filter(pa.array(odd)))
            if progress is not None:
                progress(path, rows)
    except duckdb.InvalidInputException as error:
        raise LabelError(
            f"annotation file {path!r} cannot be parsed: {str(error).splitlines()[0]}: its line ends may be mixed "
            "(convert them with dos2unix), or it is no CSV file"
        ) from error
    bad_lines = connection.sql(
        "SELECT line, min(error_type::VARCHAR) AS reason, "
        f"left(any_value(csv_line), {_MAX_TEXT}) AS text FROM bad_lines GROUP BY line ORDER BY line"
    )
    rejects.add_lines(path, bad_lines.to_arrow_table())


def _codes_of(batch: pa.RecordBatch, mids: pa.Array) -> np.ndarray:
    """int64[n]: 2 * class + state of each row, or the negative code of what is wrong with it."""
    cls = _index_in(batch.column("LabelName"), mids)
    confidence = _index_in(batch.column("Confidence"), _CONFIDENCES)
    codes = 2 * cls + (confidence & 1)
    codes[confidence < 0] = _BAD_CONFIDENCE
    codes[cls < 0] = _UNKNOWN
    for name in ("ImageID", "LabelName"):
        if batch.column(name).null_count:
            codes[batch.column(name).is_null().to_numpy(zero_copy_only=False)] = _BAD_ROW
    return codes


def _index_in(values: pa.Array, allowed: pa.Array) -> np.ndarray:
    """int64[n]: the place of each value among those allowed, -1 where it is not one of them."""
    found = pc.call_function("index_in", [values], pc.SetLookupOptions(allowed))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


class _Collected:
    """Keys and codes of the rows that are labels, as they come: uint64 as long as all keys are hex, then text."""

    def __init__(self, dtype: np.dtype, image_ids: str) -> None:
        self.count = 0
        self.first_text_key: str | None = None
        self._dtype = dtype
        self._hex_only = image_ids == "hex"
        self._values: list[np.ndarray] = []
        self._texts: list[pa.Array] = []
        self._codes: list[np.ndarray] = []

    def add(self, keys: pa.Array, codes: np.ndarray) -> np.ndarray | None:
        """Keep one batch; bool[n] of the rows refused for their keys, None where there are none."""
        refused = None
        if self.first_text_key is None:
            values, valid = hex_to_uint64(keys)
            if not valid.all() and self._hex_only:
                refused = ~valid
                values, codes = values[valid], codes[valid]
            elif not valid.all():
                self.first_text_key = keys[int(np.flatnonzero(~valid)[0])].as_py()
                self._texts = [uint64_to_hex(kept) for kept in self._values]
                self._values = []
            if self.first_text_key is None:
                self._values.append(values)
        if self.first_text_key is not None:
            self._texts.append(keys)
        self._codes.append(codes.astype(self._dtype))
        self.count += len(codes)
        return refused

    def settle(self, conflict: str, mids: Sequence[str]) -> tuple[_Settled, Callable[[np.ndarray], pa.Array]]:
        """The labels in order, and what turns their keys (uint64) into keys as stored. Empties this collection."""
        codes = _joined(self._codes)
        if self.first_text_key is None:
            values = _joined(self._values)
            stored: Callable[[np.ndarray], pa.Array] = pa.array
        else:
            coded = pa.concat_arrays([text.cast(pa.large_string()) for text in self._texts]).dictionary_encode()
            self._texts = []
            order = pc.call_function("array_sort_indices", [coded.dictionary]).to_numpy().astype(np.int64)
            rank = np.empty(len(order), np.uint64)
            rank[order] = np.arange(len(order))
            values = rank[coded.indices.to_numpy()]
            stored = _taker(coded.dictionary.take(pa.array(order)))
        return _settle(values, codes, conflict, lambda key: _key_text(stored, key), mids), stored


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts in one array; the list is emptied on the way, so that both never exist in full."""
    whole = np.empty(sum(len(part) for part in parts), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def _taker(column: pa.Array) -> Callable[[np.ndarray], pa.Array]:
    return lambda chosen: column.take(pa.array(chosen)).cast(pa.string())


def _key_text(stored: Callable[[np.ndarray], pa.Array], key: int) -> str:
    return _as_text(stored(np.array([key], np.uint64)))[0].as_py()


def _as_text(keys: pa.Array) -> pa.Array:
    return uint64_to_hex(keys.to_numpy()) if pa.types.is_uint64(keys.type) else keys


def _settle(
    keys: np.ndarray, codes: np.ndarray, conflict: str, text_of: Callable[[int], str], mids: Sequence[str]
) -> _Settled:
    """Sort labels by (key, class), keep one of equal rows and settle contradictions.

    Works on ranges of keys of about a million labels, whose sorting stays in the cache and whose copies stay small.
    """
    pieces = max(1, len(keys) // _SETTLE_ROWS)
    sample = np.sort(keys[:: max(1, len(keys) // (64 * pieces))])
    bounds = np.unique(sample[(np.arange(1, pieces) * len(sample)) // pieces])
    piece_of = np.zeros(len(keys), np.uint8 if len(bounds) < 256 else np.uint16)
    for bound in bounds:
        piece_of += keys >= bound
    columns: list[list[np.ndarray]] = [[] for _ in range(8)]
    for piece in range(len(bounds) + 1):
        here = np.flatnonzero(piece_of == piece)
        for column, part in zip(columns, _settle_piece(keys[here], codes[here], conflict), strict=True):
            column.append(part)
    unique, counts, settled, *rejected, conflicting = map(_joined, columns)
    if conflict == "error" and len(conflicting):
        some = ", ".join(
            f"image {text_of(int(key))} and class {mids[int(code) >> 1]}"
            for key, code in zip(rejected[2][:3], rejected[3][:3], strict=True)
        )
        raise LabelError(
            f"{len(conflicting):,} pairs are both 1 and 0, the first: {some}: mend the files, or set labels.conflict "
            "to negative, positive or drop"
        )
    offsets = np.zeros(len(unique) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=offsets[1:])
    return _Settled(unique, offsets, settled, (rejected[0], rejected[1]), (rejected[2], rejected[3]), len(conflicting))


def _settle_piece(keys: np.ndarray, codes: np.ndarray, conflict: str) -> tuple[np.ndarray, ...]:
    """(keys, counts, codes, duplicate keys, codes, contradicting keys, codes, conflicting pairs) of one range."""
    order = np.argsort(keys)
    ascending = keys[order]
    starts = np.ones(len(keys), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=starts[1:])
    unique = ascending[starts]
    pairs = np.cumsum(starts, dtype=np.int64)
    pairs -= 1
    pairs <<= 32
    pairs |= codes[order].astype(np.int64)
    pairs.sort()
    repeats = np.zeros(len(pairs), bool)
    np.equal(pairs[1:], pairs[:-1], out=repeats[1:])
    # A contradiction is two neighbours of one pair once repeats are gone: first the negative, then the positive.
    single = pairs[~repeats] if repeats.any() else pairs
    second = np.flatnonzero((single[1:] >> 1) == (single[:-1] >> 1)) + 1
    conflicting = single[second] >> 1
    lost = np.zeros(len(single), bool)
    lost[second] = conflict != "positive"
    if conflict in ("positive", "drop", "error"):
        lost[second - 1] = True
    repeated, losing = pairs[repeats], single[lost]
    if len(losing) and len(repeated):
        # Copies of a row that loses are contradictions too, not duplicates: all that the file said is counted once.
        copies = np.isin(repeated, losing)
        losing, repeated = np.concatenate([losing, repeated[copies]]), repeated[~copies]
    kept = single[~lost] if len(losing) else single
    counts = np.bincount(kept >> 32, minlength=len(unique))
    has_labels = counts > 0
    low = np.int64(0xFFFFFFFF)
    return (
        unique[has_labels],
        counts[has_labels].astype(np.int32),
        (kept & low).astype(codes.dtype),
        unique[repeated >> 32],
        (repeated & low).astype(codes.dtype),
        unique[losing >> 32],
        (losing & low).astype(codes.dtype),
        conflicting,
    )


class _Rejects:
    """The rejects file (Parquet), written as rejects are found and moved into place when the build succeeds."""

    def __init__(self, path: str) -> None:
        self.counts: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.example: dict[str, str] = {}
        self.before_labels = 0
        self._path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Rejects":
        temporary = self._stack.enter_context(storage.replacing(self._path))
        self._writer = self._stack.enter_context(pq.ParquetWriter(temporary, _REJECTS, compression="zstd"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add_rows(self, path: str, batch: pa.RecordBatch, codes: np.ndarray) -> None:
        """Rows (with the columns of HEADER) that have a negative code each."""
        for code, kind in _KIND_OF_CODE.items():
            if not (codes == code).any():
                continue
            part = batch.filter(pa.array(codes == code))
            if kind == "unknown_class":
                for entry in part.column("LabelName").value_counts().to_pylist():
                    self.unknown[entry["values"]] += entry["counts"]
            self.example.setdefault(kind, ",".join(part.column(name)[0].as_py() or "" for name in HEADER))
            texts = {name: part.column(name) for name in HEADER}
            self._write(kind, part.num_rows, path, texts)
            self.before_labels += part.num_rows

    def add_odd_keys(self, path: str, batch: pa.RecordBatch) -> None:
        """Rows whose ImageID is not 16 lower-case hex digits, where others are refused."""
        texts = {
            "ImageID": batch.column("ImageID"),
            "text": pa.array(["ImageID is not 16 lower-case hex digits"] * len(batch)),
        }
        self._write("malformed_row", batch.num_rows, path, texts)
        self.before_labels += batch.num_rows

    def add_lines(self, path: str, lines: pa.Table) -> None:
        """Lines that are no rows of four fields: `line` (from 1), `reason`, `text`."""
        if lines.num_rows == 0:
            return
        lines = lines.combine_chunks()
        text = [
            f"{r.as_py()}: {(t.as_py() or '').strip()}" for r, t in zip(lines["reason"], lines["text"], strict=True)
        ]
        self._write(
            "malformed_row",
            lines.num_rows,
            path,
            {"line": pa.concat_arrays(lines["line"].chunks).cast(pa.int64()), "text": pa.array(text)},
        )
        self.before_labels += lines.num_rows

    def add_labels(
        self,
        kind: str,
        stored: Callable[[np.ndarray], pa.Array],
        labels: tuple[np.ndarray, np.ndarray],
        mids: Sequence[str],
    ) -> None:
        """Sound rows that another row repeats or contradicts, as (keys uint64[n], codes[n])."""
        keys, codes = labels
        if len(keys) == 0:
            return
        texts = {
            "ImageID": _as_text(stored(keys)),
            "LabelName": pa.array(mids).take(pa.array(codes >> 1)),
            "Confidence": pa.array(["0", "1"]).take(pa.array(codes & 1)),
        }
        self._write(kind, len(keys), None, texts)

    def _write(self, kind: str, count: int, path: str | None, columns: dict[str, pa.Array]) -> None:
        self.counts[kind] += count
        filled = {"kind": pa.array([kind]).take(pa.array(np.zeros(count, np.int8))), **columns}
        if path is not None:
            filled["file"] = pa.array([os.path.basename(path)]).take(pa.array(np.zeros(count, np.int8)))
        arrays = [
            filled[field.name].cast(field.type)
            if field.name in filled and field.name != "kind"
            else filled["kind"].dictionary_encode().cast(field.type)
            if field.name == "kind"
            else pa.nulls(count, field.type)
            for field in _REJECTS
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_REJECTS))


class _Digests:
    """SHA-256 and size of files, computed beside the parsing: hashing frees the interpreter's lock."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._found: list[tuple[str, int]] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="paml-digests", daemon=True)

    def _run(self) -> None:
        try:
            for path in self._paths:
                self._found.append(storage.sha256_of(path))
        except OSError as error:
            self._error = error

    def __enter__(self) -> "_Digests":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.join()

    def results(self) -> list[tuple[str, int]]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


def _nothing_usable(paths: Sequence[str], classes: str, mids: Sequence[str], rejects: _Rejects) -> str:
    files = ", ".join(repr(path) for path in paths[:3])
    if not rejects.before_labels:
        return f"no usable row in {files}: there is a header but no row below it: fetch the file again"
    counts = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in rejects.counts.items() if count)
    message = f"no usable row in {files}: {rejects.before_labels:,} rows read, all rejected ({counts}). "
    if rejects.counts["unknown_class"] == rejects.counts.total():
        first = rejects.unknown.most_common(1)[0][0]
        return message + (
            f"The files name classes such as {first!r}, the class list {classes!r} such as {mids[0]!r}: "
            "name the class list of the same release"
        )
    if rejects.counts["malformed_confidence"]:
        return message + (
            f"A Confidence is 1 or 0, one row is {rejects.example['malformed_confidence']!r}: machine annotations are "
            "fractional; name the human-verified ones"
        )
    return message + "A row is `ImageID,Source,LabelName,Confidence`: mend the files"
