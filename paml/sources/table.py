"""Labels in a table of any of the usual forms: CSV, TSV or Parquet.

long: a row per label (image, class[, state]). list: a row per image with its classes in one cell. wide: a row per
image and a column per class.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.errors import LabelError
from paml.labels.class_list import ClassList
from paml.labels.states import UNOBSERVED
from paml.parsing import PARSE_ERRORS
from paml.sources.full import sniff
from paml.sources.records import TEXT_OF_STATE, Records
from paml.sources.separators import BLANK, JSON, NONE, SURE, detect_separator, split_cells
from paml.sources.table_columns import (
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    Column,
    ListColumn,
    TableFile,
    one_line,
    read_columns,
    read_header,
)
from paml.sources.table_form import IMAGE_NAMES, TableForm, choose_form, column_word, shown
from paml.sources.table_settings import TableSettings, number_of


def detect_table(labels: str) -> str | None:
    """Why a file looks like a table, by its suffix and columns; None for others, and for Parquet with images."""
    lower = labels.lower()
    try:
        if lower.endswith(PARQUET_SUFFIXES):
            with storage.open_input(labels) as file:
                schema = pq.read_schema(file)
            if b"huggingface" in (schema.metadata or {}) or any(_has_bytes(column.type) for column in schema):
                return None
            return f"Parquet with the columns {shown(schema.names)}"
        if not lower.endswith(TEXT_SUFFIXES):
            return None
        header = read_header(sniff(labels))
    except (*PARSE_ERRORS, OSError, zlib.error):
        return None
    known = any(column_word(name) in IMAGE_NAMES for name in header.names)
    if len(header.names) < 2 or (not known and ".txt" in lower[-7:]):
        return None
    return f"a table with the columns {shown(header.names)}"


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_table(labels: str, images: str | None, settings: TableSettings) -> Records:
    """The labels of the table `labels`: CSV, TSV, or text with semicolons, plain or .gz, or Parquet.

    The rows of one image are joined. Raises LabelError for a file that cannot be read, columns that are not known or
    fit several forms, cells whose separator is not certain, and an image with two splits.
    """
    table = read_columns(labels)
    columns = choose_form(labels, table, settings)
    image, is_named = _index_images(table, columns)
    names = image.texts.to_pylist()
    bad_rows, notes = list(table.bad_rows), list(columns.notes)
    unnamed = np.flatnonzero(~is_named)
    written = unnamed[_is_written(table, unnamed)]
    bad_rows += [(int(table.rows[row]), f"no image: {_row_text(table, row)}") for row in written.tolist()]
    if len(unnamed) > len(written):
        notes.append(f"{len(unnamed) - len(written):,} empty rows")
    if columns.form == "wide":
        found = _read_wide(table, columns, settings)
        classes = ClassList(labels, list(columns.classes), list(columns.classes))
    else:
        found = _read_cells(labels, table, columns, settings)
        classes = None
    bad_rows += [(int(table.rows[row]), reason) for row, reason in found.bad_rows if is_named[row]]
    keep = is_named[found.row]
    row, cls, state = found.row[keep], found.cls.filter(pa.array(keep)), found.state.filter(pa.array(keep))
    counts = dict(
        zip(state.dictionary.to_pylist(), np.bincount(state.indices, minlength=len(state.dictionary)), strict=True)
    )
    minus = sum(int(count) for text, count in counts.items() if number_of(text) == -1)
    if minus:
        notes.append(
            f"labels that are -1: {minus:,}, rejected, because -1 means negative to some and uncertain to others; set "
            "table.minus_one to negative, unobserved or positive"
        )
    number_classes = len(columns.classes) if columns.form == "wide" else len(cls.unique())
    understood = [
        f"{columns.form} table ({table.kind})", f"{len(names):,} images", f"{number_classes:,} classes",
        f"{len(row):,} labels ({counts['1']:,} positive, {counts['0']:,} negative)",
        *columns.described(), *found.described,
    ]  # fmt: skip
    return Records(
        path=labels,
        understood=", ".join(understood),
        images=names,
        image=image.codes[row].astype(np.int64),
        cls=cls,
        state=state,
        row=table.rows[row],
        splits=_read_splits(labels, table, columns, image, is_named),
        classes=classes,
        bad_rows=sorted(bad_rows),
        notes=[*notes, *found.notes],
    )


@dataclass(kw_only=True)
class _Labels:
    """M labels."""

    row: np.ndarray
    """int64[M], index of the row."""
    cls: pa.DictionaryArray
    state: pa.DictionaryArray
    bad_rows: Sequence[tuple[int, str]] = ()
    """(index of the row, reason)"""
    described: Sequence[str] = ()
    notes: Sequence[str] = ()


class _StateCodes:
    """The codes of the states in the order in which they were asked for; 0, 1 and 2 are `1`, `0` and ""."""

    def __init__(self, settings: TableSettings) -> None:
        self.state_of = settings.state_of
        self.codes = {text: number for number, text in enumerate(TEXT_OF_STATE.values())}

    def of(self, texts: pa.Array) -> np.ndarray:
        """int32[D], the code of each text; -1 for a blank cell."""
        states = [self.state_of(text) for text in texts.to_pylist()]
        codes = [-1 if state is None else self.codes.setdefault(state, len(self.codes)) for state in states]
        return np.array(codes, np.int32)

    def array(self, codes: np.ndarray) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(self.codes), pa.string()))


def _index_images(table: TableFile, columns: TableForm) -> tuple[Column, np.ndarray]:
    """(the distinct images, with the image of each row; bool[N] whether the row names one)."""
    column = _text_column(table, columns.image)
    is_name = pc.call_function("not_equal", [column.texts, pa.scalar("")]).to_numpy(zero_copy_only=False)
    index = np.cumsum(is_name) - 1
    return Column(column.texts.filter(pa.array(is_name)), index[column.codes]), is_name[column.codes]


def _text_column(table: TableFile, name: str) -> Column:
    column = table.columns[name]
    assert isinstance(column, Column), "choose_form refuses lists of anything but classes"
    return column


def _read_wide(table: TableFile, columns: TableForm, settings: TableSettings) -> _Labels:
    """A label per cell that is not blank."""
    codes = _StateCodes(settings)
    rows, classes, states = [], [], []
    for number, name in enumerate(columns.classes):
        column = _text_column(table, name)
        state = codes.of(column.texts)[column.codes]
        row = np.flatnonzero(state >= 0)
        rows.append(row)
        classes.append(np.full(len(row), number, np.int32))
        states.append(state[row])
    cls = pa.DictionaryArray.from_arrays(pa.array(np.concatenate(classes)), pa.array(columns.classes, pa.string()))
    return _Labels(row=np.concatenate(rows), cls=cls, state=codes.array(np.concatenate(states)))


def _read_cells(path: str, table: TableFile, columns: TableForm, settings: TableSettings) -> _Labels:
    """A label for each class in the cells of a column: positive, or with the state of the row."""
    assert columns.cls is not None, "long and list have a column of classes"
    column = table.columns[columns.cls]
    described: list[str] = []
    notes: list[str] = []
    if isinstance(column, ListColumn):
        offsets, texts, bad = column.offsets, column.texts, np.zeros(len(column.offsets) - 1, bool)
    else:
        separator, note = _choose_separator(path, column.texts, columns, settings)
        offsets, texts, bad = split_cells(column.texts, separator)
        if separator != NONE:
            described.append(f"separator {separator!r}")
            columns.form = "long" if columns.state else "list"
        notes += [note] if note else []
    lengths = np.diff(offsets)[column.codes]
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + offsets[column.codes][row]
    coded = texts.dictionary_encode()
    cls = pa.DictionaryArray.from_arrays(coded.indices.take(pa.array(position)), coded.dictionary)
    codes = _StateCodes(settings)
    if columns.state is None:
        is_bad, state = bad[column.codes], np.zeros(len(row), np.int32)
    else:
        states = _text_column(table, columns.state)
        of_row = codes.of(states.texts)[states.codes]
        is_bad = bad[column.codes] | ((lengths == 0) & (of_row >= 0))
        of_row[of_row < 0] = codes.codes[TEXT_OF_STATE[UNOBSERVED]]
        state = of_row[row]
    bad_rows = [
        (number, f"no class, or a damaged list: {_row_text(table, number)}")
        for number in np.flatnonzero(is_bad).tolist()
    ]
    return _Labels(row=row, cls=cls, state=codes.array(state), bad_rows=bad_rows, described=described, notes=notes)


def _choose_separator(path: str, cells: pa.Array, columns: TableForm, settings: TableSettings) -> tuple[str, str]:
    """(separator, note). Raises LabelError if it is not certain."""
    texts = [text for text in cells.to_pylist() if text]
    if settings.separator is not None:
        separator = " " if settings.separator == BLANK else settings.separator
        if separator in (NONE, JSON) or not separator.strip() or any(separator in text for text in texts):
            return settings.separator, ""
        example = max(texts, key=len, default="")[:60]
        return (
            separator,
            f"WARNING: no cell of {columns.cls!r} holds table.separator {separator!r}, such as {example!r}",
        )
    separator = detect_separator(texts)
    is_long = columns.state is not None or settings.given_form == "long"
    if columns.plural and separator is None and not is_long:
        examples = ", ".join(repr(text[:60]) for text in sorted(texts, key=len, reverse=True)[:3])
        raise LabelError(
            f"{path!r} has cells in {columns.cls!r} that may hold one class or several: {examples}. Set "
            f"table.separator to what joins them (such as '|' or ','), to {BLANK}, to {JSON}, or to {NONE} if each "
            "cell is one class"
        )
    if separator == NONE or (not is_long and (columns.plural or separator in SURE)):
        return separator or NONE, ""
    if is_long and separator in (None, BLANK):
        return NONE, ""
    example = next((text for text in texts if separator and separator in text), max(texts, key=len))
    return NONE, f"each cell of {columns.cls!r} is one class, such as {example!r}; if not, set table.separator"


def _read_splits(
    path: str, table: TableFile, columns: TableForm, image: Column, is_named: np.ndarray
) -> list[str] | None:
    """The split of each image. Raises LabelError for an image with two."""
    if columns.split is None:
        return None
    column = _text_column(table, columns.split)
    texts = column.texts.to_pylist()
    blank = texts.index("") if "" in texts else -1
    rows = np.flatnonzero(is_named & (column.codes != blank))
    split_of = np.full(len(image.texts), -1)
    split_of[image.codes[rows]] = column.codes[rows]
    differ = rows[split_of[image.codes[rows]] != column.codes[rows]]
    if len(differ):
        number = image.codes[differ[0]]
        both = f"{texts[column.codes[differ[0]]]!r} and {texts[split_of[number]]!r}"
        raise LabelError(
            f"{path!r} has {len(np.unique(image.codes[differ])):,} images in two splits, such as "
            f"{image.texts[int(number)].as_py()!r} in {both}: remove its rows from one"
        )
    return ["" if code < 0 else texts[code] for code in split_of.tolist()]


def _is_written(table: TableFile, rows: np.ndarray) -> np.ndarray:
    """bool[n]: whether any cell of a row is not empty."""
    written = np.zeros(len(rows), bool)
    for column in table.columns.values():
        if isinstance(column, ListColumn):
            written |= np.diff(column.offsets)[column.codes[rows]] > 0
        else:
            is_text = pc.call_function("not_equal", [column.texts, pa.scalar("")]).to_numpy(zero_copy_only=False)
            written |= is_text[column.codes[rows]]
    return written


def _row_text(table: TableFile, row: int) -> str:
    """The cells of a row, for messages."""
    cells = [c.texts[int(c.codes[row])].as_py() for c in table.columns.values() if isinstance(c, Column)]
    return one_line(",".join(cells))[:200]
