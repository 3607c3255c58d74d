"""The columns of a table file as text: CSV (RFC 4180) with any usual delimiter, tab-separated text, and Parquet."""

import codecs
import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from paml import storage
from paml.errors import LabelError
from paml.parsing import parse_errors_as

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods")
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_HEAD_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 23
_SHOWN_CHARS = 200


@dataclass(frozen=True)
class Column:
    """A column of N cells without blanks around them; an empty cell is ""."""

    texts: pa.Array
    """string[D], the distinct cells."""
    codes: np.ndarray
    """int[N], the index in `texts` of each cell."""


@dataclass(frozen=True)
class ListColumn:
    """A column of N cells, each a list of texts without blanks around them."""

    offsets: np.ndarray
    """int64[C + 1]: cell c is `texts[offsets[c]:offsets[c + 1]]`."""
    texts: pa.Array
    """string[offsets[C]]"""
    codes: np.ndarray
    """int[N], the cell of each row."""


@dataclass(frozen=True)
class TableFile:
    """A table of N rows."""

    kind: str
    """The format in a few words: `CSV, semicolons, UTF-16`."""
    columns: dict[str, Column | ListColumn]
    """By the name in the header, as `one_line`; `Unnamed: 3` without one."""
    rows: np.ndarray
    """int64[N], the number of each row in the file, from 1, without the header and empty lines."""
    bad_rows: list[tuple[int, str]]
    """(number, reason and text) of lines with another number of columns than the header."""
    left_out: list[str]
    """Columns that are neither text, numbers nor lists of them, each with its type."""


class Header(NamedTuple):
    """What the first bytes of a text file say."""

    encoding: str
    delimiter: str
    names: list[str]
    """The fields of the first line that is not empty."""
    blank_lines: int
    """Empty lines before it."""
    has_rows: bool
    """Whether anything but empty lines follows."""


def read_columns(path: str) -> TableFile:
    """Read a CSV, TSV or Parquet file, local or in S3. Raises LabelError in one line that names `path`."""
    lower = path.lower()
    if lower.endswith(_WORKBOOKS):
        raise LabelError(
            f"{path!r} is a spreadsheet: export it as CSV (in Excel: Save As, CSV UTF-8), and name that file"
        )
    if not lower.endswith((*TEXT_SUFFIXES, *PARQUET_SUFFIXES)):
        raise LabelError(
            f"{path!r} is not a table: name a file that ends with .csv, .tsv, .txt (or these and .gz) or .parquet"
        )
    if not storage.exists(path):
        raise LabelError(
            f"there is no label file {path!r}: name an existing file, or '{{split}}' in it for one per split"
        )
    is_parquet = lower.endswith(PARQUET_SUFFIXES)
    with (
        storage.open_input(path) as file,
        parse_errors_as(path, "use CSV in UTF-8, or Parquet", LabelError, (csv.Error, OSError)),
    ):
        table = _read_parquet(file) if is_parquet else _read_text(path, file)
    columns = [(name or f"Unnamed: {number}", column) for number, (name, column) in enumerate(table.columns)]
    repeated = [name for name, count in Counter(name for name, _ in columns).items() if count > 1]
    if repeated:
        raise LabelError(f"{path!r} has several columns {repeated[0]!r}: rename or remove all but one")
    if not len(table.rows):
        reason = f"its first bad line: {table.bad_rows[0][1]}" if table.bad_rows else "it has a header and nothing else"
        raise LabelError(f"{path!r} has no row ({reason}): write a row for each label or image")
    return TableFile(table.kind, dict(columns), table.rows, table.bad_rows, table.left_out)


def read_header(head: bytes) -> Header:
    """The encoding, delimiter and columns of a text file. head: its first bytes, may be compressed with gzip.

    The delimiter is the one that gives the most columns, with quotes respected. Raises ValueError or zlib.error.
    """
    if head.startswith(b"\x1f\x8b"):
        head = zlib.decompressobj(31).decompress(head, _HEAD_BYTES)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = head.decode(encoding, "replace")
    if "\0" in text:
        raise ValueError("it is binary, or UTF-16 without a byte order mark")
    lines = list(io.StringIO(text, newline=""))
    blank = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    best: list[str] = []
    delimiter, has_rows = ",", False
    for candidate in _DELIMITERS:
        reader = csv.reader(lines[blank:], delimiter=candidate)
        names = [one_line(name) for name in next(reader, [])]
        if len(names) > len(best):
            best, delimiter = names, candidate
            has_rows = any(line.strip() for line in lines[blank + reader.line_num :])
    return Header(encoding, delimiter, best, blank, has_rows)


class _Columns(NamedTuple):
    """A TableFile whose columns may have one name."""

    kind: str
    columns: Sequence[tuple[str, Column | ListColumn]]
    rows: np.ndarray
    bad_rows: list[tuple[int, str]]
    left_out: list[str]


def _read_text(path: str, file: pa.NativeFile) -> _Columns:
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        raise LabelError(f"{path!r} is a zip file or an Excel workbook: unzip it, or export it as CSV")
    try:
        encoding, delimiter, names, blank_lines, has_rows = read_header(head)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not names:
        raise LabelError(f"{path!r} is empty: write a line with the names of the columns, then a row for each label")
    if not has_rows:
        return _Columns("CSV", [], np.zeros(0, np.int64), [], [])
    bad_rows: list[tuple[int, str]] = []
    skipped: list[int] = []
    unclosed: list[str] = []

    def skip_bad_row(row: Any) -> str:  # pyarrow ignores errors that it raises
        number = row.number - 1 - blank_lines
        if row.text.count('"') % 2 and "\n" in row.text:
            unclosed.append(row.text)
        if row.text.strip(f" {delimiter}\r\n\t"):
            reason = f"{row.actual_columns} columns, expected {row.expected_columns}: {one_line(row.text)}"
            bad_rows.append((number, reason[:_SHOWN_CHARS]))
        skipped.append(number)
        return "skip"

    numbers = [str(number) for number in range(len(names))]
    stream = pa.CompressedInputStream(file, "gzip") if head.startswith(b"\x1f\x8b") else file
    try:
        table = pacsv.read_csv(
            pa.transcoding_input_stream(stream, encoding, "utf-8"),
            pacsv.ReadOptions(
                use_threads=False,
                block_size=_BLOCK_BYTES,
                skip_rows=blank_lines,
                column_names=numbers,
                skip_rows_after_names=1,
            ),
            pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip_bad_row),
            pacsv.ConvertOptions(
                column_types=dict.fromkeys(numbers, pa.dictionary(pa.int32(), pa.string())), strings_can_be_null=False
            ),
        )
    except UnicodeError as error:
        raise LabelError(
            f"{path!r} is not {encoding.removesuffix('-sig').upper()} text ({error}): save it as 'CSV UTF-8', or "
            "convert it with `iconv -f CP1252 -t UTF-8`"
        ) from None
    if unclosed:
        raise _unclosed_quote(path, unclosed[0])
    columns = [(name, _encode(column)) for name, column in zip(names, table.columns, strict=True)]
    _check_quotes(path, columns, delimiter)
    rows = np.delete(np.arange(1, table.num_rows + len(skipped) + 1), np.array(skipped, np.int64) - 1)
    parts = ["CSV" if delimiter == "," else f"text with {_DELIMITERS[delimiter]}"]
    parts += ["UTF-16"] if encoding == "utf-16" else []
    return _Columns(", ".join(parts), columns, rows, bad_rows, [])


def _check_quotes(path: str, columns: Sequence[tuple[str, Column]], delimiter: str) -> None:
    """Raise LabelError for a cell that holds further rows, because its quote is not closed."""
    for _, column in columns:
        several_lines = column.texts.filter(pc.call_function("match_substring", [column.texts], _match("\n")))
        for text in several_lines.to_pylist():
            further = list(csv.reader(text.splitlines()[1:], delimiter=delimiter))
            # the first field, mostly an image, tells rows from the lines of a text or a list
            if further and all(len(row) == len(columns) > 1 and re.fullmatch(r"[^\s\[{]+", row[0]) for row in further):
                raise _unclosed_quote(path, text)


def _match(text: str) -> pc.MatchSubstringOptions:
    return pc.MatchSubstringOptions(text)


def _unclosed_quote(path: str, text: str) -> LabelError:
    return LabelError(f"{path!r} has a quote that is not closed, before {text[:80]!r}: close or remove it")


def _read_parquet(file: pa.NativeFile) -> _Columns:
    parquet = pq.ParquetFile(file)
    columns: list[tuple[str, Column | ListColumn]] = []
    left_out: list[str] = []
    for number, field in enumerate(parquet.schema_arrow):
        try:
            columns.append((one_line(field.name), _read_parquet_column(parquet, number, field)))
        except pa.ArrowNotImplementedError:
            left_out.append(f"{field.name} ({field.type})")
    return _Columns("Parquet", columns, np.arange(1, parquet.metadata.num_rows + 1), [], left_out)


def _read_parquet_column(parquet: pq.ParquetFile, number: int, field: pa.Field) -> Column | ListColumn:
    """A column as text. Raises ArrowNotImplementedError for types other than text, numbers and lists of text."""
    is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
    values = field.type.value_type if is_list else field.type
    if pa.types.is_nested(values) or pa.types.is_binary(values) or pa.types.is_large_binary(values):
        raise pa.ArrowNotImplementedError(str(field.type))
    if is_list and (pa.types.is_integer(values) or pa.types.is_floating(values)):
        raise pa.ArrowNotImplementedError(str(field.type))
    column = pa.chunked_array(
        [batch.column(0) for batch in parquet.iter_batches(columns=[field.name])],
        type=parquet.schema_arrow[number].type,
    )
    if not is_list:
        return _encode(_as_text(column))
    lists = column.combine_chunks()
    texts = trim(_as_text(pa.chunked_array([lists.flatten()])).combine_chunks())
    is_text = pc.call_function("not_equal", [texts, pa.scalar("")])
    row = pc.call_function("list_parent_indices", [lists]).filter(is_text).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(lists)), dtype=np.int64)])
    return ListColumn(offsets, texts.filter(is_text), np.arange(len(lists)))


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as string, whole numbers without `.0`, nulls as ""."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        values = column.drop_null().to_numpy()
        if np.all(np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < 2**53)):
            column = column.cast(pa.int64())
    text = column.cast(pa.string()).fill_null("")
    text.validate(full=True)  # Parquet does not guarantee that text is valid UTF-8
    return text


def _encode(column: pa.ChunkedArray) -> Column:
    coded = (column if pa.types.is_dictionary(column.type) else column.dictionary_encode()).unify_dictionaries()
    codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in coded.chunks]
    dictionary = coded.chunk(0).dictionary if codes else pa.array([], pa.string())
    trimmed = trim(dictionary).dictionary_encode()
    new_codes = trimmed.indices.to_numpy(zero_copy_only=False)
    return Column(trimmed.dictionary, new_codes[np.concatenate(codes)] if codes else np.zeros(0, np.int32))


def trim(texts: pa.Array) -> pa.Array:
    """Texts without blanks around them."""
    return pc.call_function("utf8_trim_whitespace", [texts])


def one_line(text: str) -> str:
    """The text with single blanks instead of line breaks and other blanks, and none around it."""
    return " ".join(text.split())
