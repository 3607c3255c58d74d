"""Annotation CSV files of Open Images, read into a LabelCollector.

Lines of the usual form are parsed by `paml.labels.fast_csv` on all cores; other lines, and files whose fields are in
quotes, one by one.
"""

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.errors import LabelError
from paml.labels.collect import LabelCollector
from paml.labels.fast_csv import ClassHashTable, ParsedBlock, parse_block, read_blocks
from paml.labels.rejects import HEADER
from paml.labels.resolve import Labels, map_ahead, sort_by_key

_BATCH_ROWS = 1 << 13
_BLOCK_BYTES = 1 << 20
_MAX_TEXT = 500
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8
_CUT_SUFFIX = pc.ReplaceSubstringOptions(r"(?i)\.jpe?g$", "")


class ParsedRows(NamedTuple):
    """Rows of a file that are not usual lines."""

    columns: list[Sequence[str]]
    """The columns of HEADER of the rows with four fields of UTF-8; empty if there is none."""
    bad_lines: list[tuple[int, str]]
    """Line number (from 1) and text of the others, with the reason."""


@dataclass(frozen=True)
class AnnotationFile:
    """One annotation file and the form of its first lines."""

    path: str
    """As the user names it."""
    local: str
    """The file itself or a local copy."""
    header_bytes: int
    quoted: bool
    """Fields are in quotes."""
    carriage_returns: bool
    """Lines end with a carriage return and a line feed."""


def open_annotation_file(path: str) -> AnnotationFile:
    """Check the header of an annotation file. Raises LabelError if it is missing, empty or of another kind."""
    expected = ",".join(HEADER)
    try:
        local = storage.local_copy(path)
        with open(local, "rb") as file:
            first = file.readline(1 << 16)
            second = file.readline(1 << 16)
    except FileNotFoundError:
        raise LabelError(f"there is no annotation file {path!r}: name an existing file") from None
    if not first:
        raise LabelError(
            f"annotation file {path!r} is empty (0 bytes), expected a CSV file with the header {expected}: download "
            "it again, or leave it out"
        )
    if first.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise LabelError(f"annotation file {path!r} is compressed, expected plain CSV: unpack it first")
    header = first.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if _split_cells(header) != HEADER:
        raise LabelError(
            f"annotation file {path!r} has the wrong header {header[:200]!r}, expected {expected!r}: "
            + _header_hint(header)
        )
    return AnnotationFile(path, local, len(first), second.startswith(b'"'), second.endswith(b"\r\n"))


def _split_cells(line: str) -> tuple[str, ...]:
    try:
        return tuple(next(csv.reader([line]), []))
    except csv.Error:  # a carriage return within the line, or an open quote
        return ()


def _header_hint(header: str) -> str:
    cells = [cell.strip() for cell in header.split(",")]
    if "XMin" in cells or "MaskPath" in cells or "LabelName1" in cells:
        return "these are boxes, masks or relations; use the file of human-verified image-level labels"
    if len(cells) == 4 and cells[3] in ("0", "1", "0.0", "1.0"):
        return "this looks like a row: add the header line above it"
    if sorted(cells) == sorted(HEADER):
        return "the columns are in another order: write them in the expected one"
    if {cell.lower() for cell in cells} == {name.lower() for name in HEADER}:
        return "match upper and lower case"
    return "use the file of human-verified image-level labels, or rewrite this one with these four columns"


def read_annotations(
    file: AnnotationFile, collector: LabelCollector, threads: int, on_rows: Callable[[int], None]
) -> int:
    """Collect the rows of a file. on_rows: called with the number of rows of it read so far.

    Returns the number of rows whose ImageID had the suffix of a JPEG file. It is cut off, because keys have none.
    """
    rows_before, suffixes_cut = collector.rows, 0
    try:
        for columns, bad_lines in _parse_quoted(file) if file.quoted else _parse_plain(file, collector, threads):
            if columns:
                names, *others = (pa.array(column, pa.string()) for column in columns)
                keys = pc.call_function("replace_substring_regex", [names], _CUT_SUFFIX)
                suffixes_cut += pc.call_function("sum", [pc.call_function("not_equal", [keys, names])]).as_py()
                collector.add_batch(file.path, pa.RecordBatch.from_arrays([keys, *others], list(HEADER)))
            if bad_lines:
                numbers, texts = zip(*bad_lines, strict=True)
                collector.add_bad_lines(file.path, texts, numbers)
            on_rows(collector.rows - rows_before)
    except OSError as error:
        raise storage.StorageError(error.errno or 0, f"cannot read {file.path!r}: {error.strerror}") from error
    return suffixes_cut


def _parse_plain(file: AnnotationFile, collector: LabelCollector, threads: int) -> Iterator[ParsedRows]:
    """Collect the usual lines block by block, and yield the other rows of each block."""
    classes = ClassHashTable(collector.classes)

    def parse(block: np.ndarray) -> tuple[ParsedBlock, Labels]:
        if file.carriage_returns:
            block = np.frombuffer(block.tobytes().replace(b"\r\n", b"\n"), np.uint8)
        parsed = parse_block(block, classes)
        return parsed, sort_by_key(parsed.keys, parsed.codes.astype(collector.code_type))

    first_line = 2
    with open(file.local, "rb", buffering=0) as source, ThreadPoolExecutor(threads, "paml-labels") as pool:
        source.seek(file.header_bytes)
        for parsed, labels in map_ahead(pool, parse, read_blocks(source, _BLOCK_BYTES), threads + 1):
            collector.add_block(labels)
            texts = parsed.other.decode(errors="surrogateescape").replace("\r\n", "\n").split("\n")[:-1]
            is_row = [text.count(",") == 3 and (text.isascii() or not _ESCAPED.search(text)) for text in texts]
            complete = list(itertools.compress(texts, is_row))
            bad_lines = [
                (first_line + number, _describe_fault(text, text.count(",") + 1))
                for number, text, valid in zip(parsed.other_lines.tolist(), texts, is_row, strict=True)
                if text and not valid
            ]
            cells = ",".join(complete).split(",")  # several times as fast as splitting each line
            yield ParsedRows([cells[column::4] for column in range(4)] if complete else [], bad_lines)
            first_line += parsed.lines


def _parse_quoted(file: AnnotationFile) -> Iterator[ParsedRows]:
    """Yield all rows in batches."""
    with open(file.local, "rb") as source:
        source.seek(file.header_bytes)
        reader = csv.reader(io.TextIOWrapper(source, "utf-8", "surrogateescape", newline=""), strict=True)
        at_end = False
        while not at_end:
            complete, bad_lines = [], []
            while len(complete) + len(bad_lines) < _BATCH_ROWS:
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    bad_lines.append((reader.line_num + 1, f"not CSV: {error}"))
                    continue
                if at_end := fields is None:
                    break
                if not fields:
                    continue
                text = ",".join(fields)
                if len(fields) == len(HEADER) and (text.isascii() or not _ESCAPED.search(text)):
                    complete.append(fields)
                else:
                    bad_lines.append((reader.line_num + 1, _describe_fault(text, len(fields))))
            yield ParsedRows(list(zip(*complete, strict=True)), bad_lines)


def _describe_fault(text: str, fields: int) -> str:
    """The reason for rejecting a line with this number of fields, followed by its text."""
    reason = "not UTF-8" if fields == len(HEADER) else f"{fields} fields, expected {len(HEADER)}"
    return f"{reason}: {text[:_MAX_TEXT].encode(errors='replace').decode()}"
