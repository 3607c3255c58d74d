"""Labels in a table of any of the usual forms: CSV, TSV or Parquet.

long: a row per label (image, class[, state]). list: a row per image with its classes in one cell. wide: a row per
image and a column per class.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.errors import LabelError, SettingsError, check_setting
from paml.labels.class_list import ClassList
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.parsing import PARSE_ERRORS
from paml.sources.full import sniff
from paml.sources.records import TEXT_OF_STATE, Records
from paml.sources.separators import BLANK, JSON, NONE, detect_separator, split_cells
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

FORMS = ("auto", "long", "list", "wide")
_STATES = {"positive": POSITIVE, "negative": NEGATIVE, "unobserved": UNOBSERVED}
_WORDS = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "present", "positive", "pos"), TEXT_OF_STATE[POSITIVE]),
    **dict.fromkeys(("0", "no", "n", "false", "f", "absent", "negative", "neg"), TEXT_OF_STATE[NEGATIVE]),
    **dict.fromkeys(("unknown", "uncertain", "unobserved"), TEXT_OF_STATE[UNOBSERVED]),
}
_BLANK_WORDS = ("", "nan", "null", "none", "na", "n/a", "<na>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)

# Names of columns without case, blanks, `_` and `-`, in order of preference: a path tells more than a number.
_IMAGE_NAMES = (
    "imagepath", "imgpath", "filepath", "path", "filename", "imagefile", "imagefilename", "imagename", "imgname",
    "file", "image", "img", "photo", "picture", "imageindex", "imageid", "imgid", "id", "name",
)  # fmt: skip
_CLASS_NAMES = (
    "classname", "labelname", "categoryname", "class", "label", "category", "tag", "target", "classid", "labelid",
    "categoryid",
)  # fmt: skip
_LABELS_NAMES = (
    "labels", "labelnames", "classes", "classnames", "categories", "categorynames", "tags", "findinglabels",
    "findings", "targets", "attributes", "choices", "choice",
)  # fmt: skip
_STATE_NAMES = ("state", "confidence", "value", "present", "presence", "ispresent")
_STATE_NAMES_NEXT_TO_CLASS = ("label", "target", "labels")
_SPLIT_NAMES = ("split", "datasplit", "subset", "partition", "set", "dataset", "phase")
_SPLIT_WORDS = ("train", "val", "test", "dev")
_SURE_SEPARATORS = ("|", ";", JSON)
_MAX_WORDS = 1000
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """How to read a table of labels: which columns it has and what their values mean."""

    form: str = "auto"
    """`long`: a row per label (image, class[, state]). `list`: a row per image, with its classes in one cell. `wide`: a
    row per image and a column per class. `auto`: by the columns."""
    image_column: str | None = None
    """The column of images; null: by the usual names (image, file_name, path, image_id, ...)."""
    class_column: str | None = None
    """long: the column of classes; null: by the usual names (class, label, category, ...)."""
    state_column: str | None = None
    """long: the column of states; null: by the usual names (state, confidence, value, ...). Without one, each row is
    a positive label."""
    labels_column: str | None = None
    """list: the column of the classes of an image; null: by the usual names (labels, tags, classes, ...)."""
    class_columns: list[str] | None = None
    """wide: the columns that are classes; null: those that hold only states."""
    split_column: str | None = None
    """The column of splits; null: by the usual names (split, subset, set, ...)."""
    separator: str | None = None
    """What joins the classes of a cell, such as `|`; or `blank`, `json` (lists in brackets), or `none` (each cell is
    one class); null: detected if it is unambiguous."""
    minus_one: str | None = None
    """What -1 means: `negative`, `unobserved` or `positive`; null: -1 is rejected."""
    positive_words: tuple[str, ...] = ()
    """More words for positive. Built in: 1, yes, y, true, t, present, positive, pos."""
    negative_words: tuple[str, ...] = ()
    """More words for negative. Built in: 0, no, n, false, f, absent, negative, neg."""
    unobserved_words: tuple[str, ...] = ()
    """More words for unobserved. Built in: a blank cell, nan, null, none, n/a, unknown, uncertain, unobserved."""

    def __post_init__(self) -> None:
        check_setting(self.form in FORMS, "table.form", self.form, f"one of {', '.join(FORMS)}")
        check_setting(self.separator != "", "table.separator", self.separator, "a text, blank, json, none or null")
        allowed = (None, *_STATES)
        check_setting(self.minus_one in allowed, "table.minus_one", self.minus_one, f"null, {', '.join(_STATES)}")
        given = {form: name for form, name in self._form_settings() if getattr(self, name) is not None}
        if self.form != "auto":
            given.setdefault(self.form, "form")
        if len(given) > 1:
            names = " and ".join(f"table.{name}" for name in given.values())
            raise SettingsError(f"{names} are of different forms, {' and '.join(given)}: set only those of one form")
        words = [word.strip().lower() for word in (*self.positive_words, *self.negative_words, *self.unobserved_words)]
        repeated = [word for word in words if words.count(word) > 1]
        check_setting(not repeated, "table.positive_words and the like", (repeated or [""])[0], "in one of them, once")

    @staticmethod
    def _form_settings() -> Sequence[tuple[str, str]]:
        return ("long", "class_column"), ("long", "state_column"), ("list", "labels_column"), ("wide", "class_columns")

    @property
    def given_form(self) -> str:
        """The form that `form` or the settings of one form say; `auto` if none does."""
        given = [form for form, name in self._form_settings() if getattr(self, name) is not None]
        return given[0] if given else self.form

    def state_of(self, text: str) -> str | None:
        """`1`, `0` or "" (unobserved) as in `Records.state`; None for a blank cell, and other texts unchanged."""
        word = text.lower()
        own = (self.positive_words, self.negative_words, self.unobserved_words)
        for state, words in zip(_STATES.values(), own, strict=True):
            if any(word == own_word.strip().lower() for own_word in words):
                return TEXT_OF_STATE[state]
        if word in _BLANK_WORDS:
            return None
        number = _number(word)
        if number == -1 and self.minus_one is not None:
            return TEXT_OF_STATE[_STATES[self.minus_one]]
        if number in (0, 1):
            word = str(int(number))
        return _WORDS.get(word, text)


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def detect_table(labels: str) -> str | None:
    """Why a file looks like a table, by its suffix and columns; None for others, and for Parquet with images."""
    lower = labels.lower()
    try:
        if lower.endswith(PARQUET_SUFFIXES):
            with storage.open_input(labels) as file:
                schema = pq.read_schema(file)
            if b"huggingface" in (schema.metadata or {}) or any(_has_bytes(column.type) for column in schema):
                return None
            return f"Parquet with the columns {_shown(schema.names)}"
        if not lower.endswith(TEXT_SUFFIXES):
            return None
        header = read_header(sniff(labels))
    except (*PARSE_ERRORS, OSError, zlib.error):
        return None
    known = any(_normalize(name) in _IMAGE_NAMES for name in header.names)
    if len(header.names) < 2 or (not known and ".txt" in lower[-7:]):
        return None
    return f"a table with the columns {_shown(header.names)}"


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _normalize(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def read_table(labels: str, images: str | None, settings: TableSettings) -> Records:
    """The labels of the table `labels`: CSV, TSV, or text with semicolons, plain or .gz, or Parquet.

    The rows of one image are joined. Raises LabelError for a file that cannot be read, columns that are not known or
    fit several forms, cells whose separator is not certain, and an image with two splits.
    """
    table = read_columns(labels)
    columns = _choose_columns(labels, table, settings)
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
    minus = sum(int(count) for text, count in counts.items() if _number(text) == -1)
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


# --- which columns -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Columns:
    """The form of a table and the columns that are used."""

    form: str
    image: str
    split: str | None = None
    cls: str | None = None
    """long and list: the classes."""
    state: str | None = None
    """long"""
    classes: Sequence[str] = ()
    """wide"""
    plural: bool = False
    """Whether the name of `cls`, or a setting, says that a cell has several classes."""
    other_images: Sequence[str] = ()
    """Columns that could be the image, too."""
    notes: list[str] = field(default_factory=list)

    def described(self) -> list[str]:
        """The columns that are used, for `Records.understood`."""
        used = {"image": self.image, "class": self.cls, "state": self.state, "split": self.split}
        texts = [f"{role} column {name!r}" for role, name in used.items() if name is not None]
        if self.other_images:
            texts[0] += f" (not {', '.join(map(repr, self.other_images))})"
        if self.form == "wide":
            texts.append(f"class columns {_shown(self.classes)}")
        return texts


def _choose_columns(path: str, table: TableFile, settings: TableSettings) -> _Columns:
    """The form and the columns, by the settings, the names and the values. Raises LabelError."""
    names = list(table.columns)

    def pick(setting: str | None, usual: Sequence[str], taken: Sequence[str | None] = ()) -> str | None:
        return _pick(path, [name for name in names if name not in taken], setting, usual)

    image = pick(settings.image_column, _IMAGE_NAMES)
    if image is None:
        raise LabelError(
            f"{path!r} has no column of images among {_shown(names)}: name one image, file_name or image_id in the "
            "first line, or set table.image_column"
        )
    split = pick(settings.split_column, _SPLIT_NAMES, [image])
    if (
        split
        and settings.split_column is None
        and _normalize(split) != "split"
        and not _has_splits(table.columns[split])
    ):
        split = None
    taken = [image, split]
    others = [name for name in names if name not in taken and _normalize(name) in _IMAGE_NAMES]
    state_columns = [
        name
        for name in names
        if name not in (*taken, *others)
        and not _normalize(name).startswith("unnamed:")
        and _normalize(name) != "index"
        and _is_class(table.columns[name], settings)
    ]
    form = settings.given_form
    usual = {"long": _CLASS_NAMES + _LABELS_NAMES, "list": _LABELS_NAMES + _CLASS_NAMES}.get(
        form, _LABELS_NAMES + _CLASS_NAMES
    )
    cls = pick(settings.class_column or settings.labels_column, usual, taken)
    if form == "auto" and cls in state_columns:
        cls = pick(None, usual, [*taken, *state_columns]) or cls
    if cls is None and form in ("auto", "list"):
        lists = [name for name, column in table.columns.items() if isinstance(column, ListColumn)]
        cls = lists[0] if len(lists) == 1 else None
    columns = _Columns(form=form, image=image, split=split, other_images=others)
    if form == "auto":
        columns.form = _detect_form(path, table, cls, pick(None, _STATE_NAMES, taken), state_columns)
    if columns.form == "wide":
        columns.classes = state_columns
        if settings.class_columns is not None:
            columns.classes = [name for wanted in settings.class_columns if (name := pick(wanted, ()))]
        if not columns.classes:
            raise _no_classes(path, table, taken)
    else:
        if cls is None:
            raise _no_classes(path, table, taken)
        columns.cls = cls
        columns.plural = form == "list" or _normalize(cls) in _LABELS_NAMES
        if columns.form == "long":
            columns.state = pick(settings.state_column, _STATE_NAMES, [*taken, cls]) or next(
                (name for name in state_columns if name != cls and _normalize(name) in _STATE_NAMES_NEXT_TO_CLASS), None
            )
    used = (image, split, columns.cls, columns.state, *columns.classes)
    lists = [name for name in used if isinstance(table.columns.get(name or ""), ListColumn) and name != columns.cls]
    if lists:
        raise LabelError(f"{path!r} has lists in {lists[0]!r}, only classes can be lists: correct the column settings")
    if unused := [_example(table, name) for name in names if name not in used] + table.left_out:
        columns.notes.append(f"columns that are not used: {_shown(unused)}")
    return columns


def _pick(path: str, names: Sequence[str], setting: str | None, usual: Sequence[str]) -> str | None:
    """The column that the setting or else the first usual name means; None without. Raises LabelError."""
    if setting is not None:
        wanted = one_line(setting)
        fitting = [name for name in names if name == wanted] or [n for n in names if n.lower() == wanted.lower()]
        if len(fitting) != 1:
            raise LabelError(f"{path!r} has no column {setting!r}: it has {_shown(names)}; correct the setting")
        return fitting[0]
    for known in usual:
        fitting = [name for name in names if _normalize(name) == known]
        if len(fitting) > 1:
            raise LabelError(
                f"{path!r} has several columns with one meaning, {' and '.join(map(repr, fitting))}: choose with "
                "table.image_column, class_column, labels_column, state_column or split_column"
            )
        if fitting:
            return fitting[0]
    return None


def _detect_form(path: str, table: TableFile, cls: str | None, state: str | None, state_columns: Sequence[str]) -> str:
    """The form of a table by the names and values of its columns. Raises LabelError if two forms fit."""
    if cls is not None and state is not None and cls != state:
        return "long"
    wide = [name for name in state_columns if name != cls]
    if cls is None or cls in state_columns:
        if cls is not None and not wide:
            values = " and ".join(repr(text) for text in table.columns[cls].texts.to_pylist()[:2])
            raise LabelError(
                f"{path!r} has one column of classes, {cls!r}, with the values {values}: set table.form to wide if it "
                f"is a class {cls!r} that is present or absent, or to long if these are names of classes"
            )
        return "wide"
    by_name = [name for name in wide if _normalize(name) in _STATE_NAMES_NEXT_TO_CLASS]
    if len(wide) > 1 and not by_name and not _is_joined(table.columns[cls]):
        raise LabelError(
            f"{path!r} has classes in the column {cls!r}, and {len(wide):,} columns of states, {_shown(wide)}: set "
            "table.form to wide, list or long"
        )
    return "long" if by_name or _normalize(cls) in _CLASS_NAMES else "list"


def _is_joined(column: Column | ListColumn) -> bool:
    """Whether the cells are lists beyond doubt."""
    return isinstance(column, ListColumn) or detect_separator(column.texts.to_pylist()) in _SURE_SEPARATORS


def _no_classes(path: str, table: TableFile, taken: Sequence[str | None]) -> LabelError:
    columns = _shown([_example(table, name) for name in table.columns if name not in taken] + table.left_out)
    return LabelError(
        f"{path!r} has no column of classes among {columns or 'none'}: set table.class_column (a row per label), "
        "table.labels_column (classes in one cell) or table.class_columns (1, 0 or blank per class; other words with "
        "table.positive_words); for numbers with names of classes, and embedded images, set source to hf"
    )


def _example(table: TableFile, name: str) -> str:
    """A column and the first cell that is not empty."""
    text = next((text for text in table.columns[name].texts[:_SHOWN].to_pylist() if text), "")
    return f"{name} ({text[:30]!r})"


def _has_splits(column: Column | ListColumn) -> bool:
    return any(text.lower().startswith(_SPLIT_WORDS) for text in column.texts[:_MAX_WORDS].to_pylist())


def _is_class(column: Column | ListColumn, settings: TableSettings) -> bool:
    """Whether a column holds states: most cells, if no other is a number below -1 or above 1 (an age, a count).

    Letters count only in pairs, such as y and n: F and M are not states.
    """
    if isinstance(column, ListColumn) or len(column.texts) > _MAX_WORDS:
        return False
    texts = column.texts.to_pylist()
    states = [settings.state_of(text) for text in texts]
    known = [state in (None, *TEXT_OF_STATE.values()) or _number(state) == -1 for state in states]
    written = [number for number, state in enumerate(states) if state is not None]
    counts = np.bincount(column.codes, minlength=len(texts))
    own = {
        word.strip().lower()
        for word in (*settings.positive_words, *settings.negative_words, *settings.unobserved_words)
    }
    letters = [n for n in written if re.fullmatch("[a-zA-Z]", texts[n]) and texts[n].lower() not in own]
    if all(known[number] for number in written):
        return any(states[n] != "" for n in written) and not (len(written) == len(letters) == 1)
    if any(abs(_number(texts[n]) or 0) > 1 for n in written if not known[n]):
        return False
    certain = sum(int(counts[n]) for n in written if known[n] and n not in letters)
    return 2 * certain > sum(int(counts[n]) for n in written)


# --- the labels ----------------------------------------------------------------------------------------------------


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


def _index_images(table: TableFile, columns: _Columns) -> tuple[Column, np.ndarray]:
    """(the distinct images, with the image of each row; bool[N] whether the row names one)."""
    column = _text_column(table, columns.image)
    is_name = pc.call_function("not_equal", [column.texts, pa.scalar("")]).to_numpy(zero_copy_only=False)
    index = np.cumsum(is_name) - 1
    return Column(column.texts.filter(pa.array(is_name)), index[column.codes]), is_name[column.codes]


def _text_column(table: TableFile, name: str) -> Column:
    column = table.columns[name]
    assert isinstance(column, Column), "_choose_columns refuses lists of anything but classes"
    return column


def _read_wide(table: TableFile, columns: _Columns, settings: TableSettings) -> _Labels:
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


def _read_cells(path: str, table: TableFile, columns: _Columns, settings: TableSettings) -> _Labels:
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


def _choose_separator(path: str, cells: pa.Array, columns: _Columns, settings: TableSettings) -> tuple[str, str]:
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
    if separator == NONE or (not is_long and (columns.plural or separator in _SURE_SEPARATORS)):
        return separator or NONE, ""
    if is_long and separator in (None, BLANK):
        return NONE, ""
    example = next((text for text in texts if separator and separator in text), max(texts, key=len))
    return NONE, f"each cell of {columns.cls!r} is one class, such as {example!r}; if not, set table.separator"


def _read_splits(
    path: str, table: TableFile, columns: _Columns, image: Column, is_named: np.ndarray
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
