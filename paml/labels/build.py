"""From annotation CSV files of Open Images (V3 to V7) to a label table.

Lines of the usual form are parsed block by block by `paml.labels.plain`, on all cores; all others, and files that
have another form throughout, by DuckDB within a memory limit. What remains of a row is 10 bytes (key and code), so
memory is O(annotations). Nothing is dropped in silence: every row is either a label of the table or is counted by
kind and written to the rejects file beside it.
"""

import contextlib
import csv
import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.labels.plain import ClassWords, PlainLines, blocks_of, parse_block
from paml.labels.settle import (
    CONFLICT_RULES,
    ConflictRule,
    Labels,
    Settled,
    ahead,
    by_key,
    in_blocks,
    refuse_contradictions,
    settle,
)
from paml.labels.states import LabelError
from paml.labels.table import check_classes, code_type, hex_to_uint64, uint64_to_hex, write_table

HEADER = ("ImageID", "Source", "LabelName", "Confidence")
KINDS = ("malformed_row", "unknown_class", "malformed_confidence", "duplicate", "contradiction")
_BATCH_ROWS = 1 << 18
_BLOCK_BYTES = 1 << 20
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

    conflict: ConflictRule = "negative"
    """What becomes of a pair that is both 1 and 0: see CONFLICT_RULES. Recorded in the table."""
    image_ids: Literal["auto", "hex"] = "auto"
    """`hex` rejects, as malformed rows, ImageIDs other than 16 lower-case hex digits; `auto` takes any name, and
    stores all keys as text (20 bytes an image, not 8) as soon as one is no such number."""
    memory_limit_mb: int = 512
    """What DuckDB may use for lines of unusual form, in MiB; what needs more is spilled to the temporary folder. The
    labels themselves take about 20 bytes each while they are sorted, over and above this."""
    threads: int = 0
    """Threads that parse and sort; 0 takes the cores that this process may use."""
    temp_folder: str | None = None
    """Where DuckDB spills and lines of unusual form wait for it; the system's temporary folder by default."""

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
    forms = {path: _check_header(path, local[path]) for path in paths}
    threads = settings.threads or _usable_cores()

    rejects_path = os.path.splitext(out)[0] + ".rejects.parquet"
    with (
        _Rejects(rejects_path) as rejects,
        _Digests([*local.values(), storage.local_copy(classes)]) as digests,
    ):
        labels = _Collected(code_type(len(mids)), settings.image_ids)
        with _parser(settings) as connection:
            for path in paths:
                file = _File(path, local[path], forms[path], settings.temp_folder, threads)
                _parse(connection, file, mids, labels, rejects, progress)
        if labels.count == 0:
            raise LabelError(_nothing_usable(paths, classes, mids, rejects))
        settled, keys = labels.settle(settings.conflict, threads)
        if settings.conflict == "error":
            advice = "mend the files, or set labels.conflict to negative, positive or drop"
            refuse_contradictions(settled, lambda key: _key_text(keys, key), mids, advice)
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
    try:
        rows = [[row[0].strip(), *row[1:]] for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise LabelError(f"{path!r} cannot be read as CSV ({error}): mend it, or name the right file") from None
    rows = [row for row in rows if row[0]]
    return rows[1:] if rows and rows[0][0] == "LabelName" else rows


def _names_of(mids: Sequence[str], descriptions: str | None) -> tuple[list[str], int]:
    known = read_descriptions(descriptions) if descriptions else {}
    return [known.get(mid) or mid for mid in mids], sum(not known.get(mid) for mid in mids)


@dataclass(frozen=True)
class _Form:
    """What the first lines say of a file."""

    header_bytes: int
    quoted: bool
    """Fields stand in quotes."""
    carriage_returns: bool
    """Lines end with a carriage return and a line feed."""


def _check_header(path: str, local: str) -> _Form:
    """The form of the file. Raises LabelError where it is empty or its header is another one."""
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
    if _cells(found) != HEADER:
        raise LabelError(
            f"annotation file {path!r} has a wrong header: found {found[:200]!r}, expected {expected!r}: "
            + _header_advice(found)
        )
    return _Form(len(first), quoted=second.startswith(b'"'), carriage_returns=second.endswith(b"\r\n"))


def _cells(line: str) -> tuple[str, ...]:
    try:
        return tuple(next(csv.reader([line]), []))
    except csv.Error:  # a carriage return within the line, or a field without end
        return ()


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


@dataclass(frozen=True)
class _File:
    """One annotation file on its way into the table."""

    path: str
    """As the user names it."""
    local: str
    """Where it can be read."""
    form: _Form
    temp_folder: str | None
    threads: int


def _parse(
    connection: Any,
    file: _File,
    mids: Sequence[str],
    labels: "_Collected",
    rejects: "_Rejects",
    progress: Callable[[str, int], None] | None,
) -> None:
    """Read one file into `labels` and `rejects`: what is plain in blocks, the rest with care."""
    say = (lambda rows: progress(file.path, rows)) if progress else lambda rows: None
    if file.form.quoted or file.form.carriage_returns:
        _parse_with_care(connection, file, file.local, None, mids, labels, rejects, say)
        return
    with tempfile.TemporaryDirectory(prefix="paml-labels-", dir=file.temp_folder) as folder:
        odd = os.path.join(folder, "odd.csv")
        read = _parse_plain(file, odd, mids, labels, say)
        if read is None:
            _parse_with_care(connection, file, file.local, None, mids, labels, rejects, say)
        elif len(read[1]):
            rows, numbers = read
            _parse_with_care(connection, file, odd, numbers, mids, labels, rejects, lambda more: say(rows + more))


def _parse_plain(
    file: _File, odd: str, mids: Sequence[str], labels: "_Collected", say: Callable[[int], None]
) -> tuple[int, np.ndarray] | None:
    """Read the plain lines into `labels` and copy the others, below a header, to the file `odd`.

    Returns the number of plain lines and int64[k], the line numbers (from 1) of the others; None, with nothing done,
    where most lines of the first block are of another form.
    """
    classes = ClassWords(mids)

    def read(block: np.ndarray) -> tuple[PlainLines, Labels]:
        lines = parse_block(block, classes)
        return lines, by_key(lines.keys, lines.codes.astype(labels.dtype))

    rows, line, numbers = 0, 2, []
    try:
        with (
            open(file.local, "rb", buffering=0) as source,
            open(odd, "wb") as others,
            ThreadPoolExecutor(file.threads, "paml-labels") as pool,
        ):
            source.seek(file.form.header_bytes)
            others.write(",".join(HEADER).encode() + b"\n")
            for lines, plain in ahead(pool, read, blocks_of(source, _BLOCK_BYTES), file.threads + 1):
                if line == 2 and 2 * len(lines.odd_lines) > lines.lines:
                    return None
                labels.add_plain(plain)
                others.write(lines.odd)
                numbers.append(lines.odd_lines + line)
                line += lines.lines
                rows += len(plain.keys)
                say(rows)
    except OSError as error:
        raise storage.StorageError(
            error.errno or 0, f"cannot read {file.path!r} or put its unusual lines into {odd!r}: {error.strerror}"
        ) from error
    return rows, np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def _parse_with_care(
    connection: Any,
    file: _File,
    local: str,
    numbers: np.ndarray | None,
    mids: Sequence[str],
    labels: "_Collected",
    rejects: "_Rejects",
    say: Callable[[int], None],
) -> None:
    """Stream the CSV file `local` into `labels` and `rejects`.

    numbers: the numbers that its lines have in `file`, if it holds but some of them.
    """
    import duckdb

    path, allowed = file.path, pa.array(mids)
    quote = _literal('"' if file.form.quoted else "")
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
            codes = _codes_of(batch, allowed)
            bad = codes < 0
            if bad.any():
                rejects.add_rows(path, batch.filter(pa.array(bad)), codes[bad])
                batch, codes = batch.filter(pa.array(~bad)), codes[~bad]
            odd = labels.add(batch.column("ImageID"), codes)
            if odd is not None:
                rejects.add_odd_keys(path, batch.filter(pa.array(odd)))
            say(rows)
    except duckdb.InvalidInputException as error:
        raise LabelError(
            f"annotation file {path!r} cannot be parsed: {str(error).splitlines()[0]}: its line ends may be mixed "
            "(convert them with dos2unix), or it is no CSV file"
        ) from error
    bad_lines = connection.sql(
        "SELECT line, min(error_type::VARCHAR) AS reason, "
        f"left(any_value(csv_line), {_MAX_TEXT}) AS text FROM bad_lines GROUP BY line ORDER BY line"
    ).to_arrow_table()
    if numbers is not None and bad_lines.num_rows:
        own = numbers[bad_lines["line"].to_numpy().astype(np.int64) - 2]
        bad_lines = bad_lines.set_column(0, "line", pa.array(own))
    rejects.add_lines(path, bad_lines)


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
        self.dtype = dtype
        self._hex_only = image_ids == "hex"
        self._blocks: list[Labels] = []
        self._texts: list[tuple[pa.Array, np.ndarray]] = []

    def add_plain(self, block: Labels) -> None:
        """Keep labels with hex keys, ascending by key."""
        if self.first_text_key is None:
            self._blocks.append(block)
        else:
            self._texts.append((uint64_to_hex(block.keys), block.codes))
        self.count += len(block.keys)

    def add(self, keys: pa.Array, codes: np.ndarray) -> np.ndarray | None:
        """Keep one batch; bool[n] of the rows refused for their keys, None where there are none."""
        refused, codes = None, codes.astype(self.dtype)
        if self.first_text_key is None:
            values, valid = hex_to_uint64(keys)
            if valid.all() or self._hex_only:
                refused = None if valid.all() else ~valid
                self.add_plain(by_key(values[valid], codes[valid]))
                return refused
            self.first_text_key = keys[int(np.flatnonzero(~valid)[0])].as_py()
            self._texts = [(uint64_to_hex(block.keys), block.codes) for block in self._blocks]
            self._blocks = []
        self._texts.append((keys, codes))
        self.count += len(codes)
        return refused

    def settle(self, conflict: ConflictRule, threads: int) -> tuple[Settled, Callable[[np.ndarray], pa.Array]]:
        """The labels in order, and what turns their keys (uint64) into keys as stored. Empties this collection."""
        if self.first_text_key is None:
            return settle(self._blocks, conflict, threads=threads), pa.array
        codes = np.concatenate([codes for _, codes in self._texts])
        texts = pa.concat_arrays([text.cast(pa.large_string()) for text, _ in self._texts])
        self._texts = []
        values, dictionary = ranked(texts)
        return settle(list(in_blocks(values, codes)), conflict, threads=threads), _taker(dictionary)


def ranked(texts: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(uint64[n], large_string[u]): the rank of each text among the u distinct ones, and these, ascending."""
    coded = texts.dictionary_encode()
    order = pc.call_function("array_sort_indices", [coded.dictionary]).to_numpy().astype(np.int64)
    rank = np.empty(len(order), np.uint64)
    rank[order] = np.arange(len(order))
    return rank[coded.indices.to_numpy()], coded.dictionary.take(pa.array(order))


def _taker(column: pa.Array) -> Callable[[np.ndarray], pa.Array]:
    return lambda chosen: column.take(pa.array(chosen)).cast(pa.string())


def _key_text(stored: Callable[[np.ndarray], pa.Array], key: int) -> str:
    return _as_text(stored(np.array([key], np.uint64)))[0].as_py()


def _as_text(keys: pa.Array) -> pa.Array:
    return uint64_to_hex(keys.to_numpy()) if pa.types.is_uint64(keys.type) else keys


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
