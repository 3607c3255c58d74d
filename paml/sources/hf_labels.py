"""The columns of a Hugging Face data set: which hold images and labels, and what their values say.

Features as `datasets` writes them into the schema, in its versions since 1.0:
https://huggingface.co/docs/datasets/about_dataset_features
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.errors import DataError
from paml.labels.class_list import ClassList
from paml.parsing import parse_json_object
from paml.sources.hf_files import is_embedded
from paml.sources.separators import NONE, detect_separator, split_cells
from paml.sources.table_columns import trim
from paml.sources.table_settings import TableSettings

LABEL_NAMES = (
    "labels", "label", "classes", "class", "tags", "tag", "categories", "category", "labelnames", "classnames",
    "labelname", "classname", "targets", "target",
)  # fmt: skip
_PATH_NAMES = ("filename", "imagepath", "filepath", "path", "image", "file", "imagefile", "img", "imageid", "id")
_SHOWN = 8


@dataclass(kw_only=True)
class LabelColumns:
    """The columns that are used."""

    image: str
    labels: str | None
    """A class or a list of classes per image; None: `classes`."""
    negatives: str | None
    classes: Sequence[str] = ()
    """Columns of one class each, with its state."""
    unused: Sequence[str] = ()
    names: Sequence[str] = ()
    """Names by class number, if the schema has them."""

    @property
    def read(self) -> list[str]:
        """All of them but the images."""
        return [name for name in (self.labels, self.negatives, *self.classes) if name is not None]


@dataclass(kw_only=True)
class ColumnLabels:
    """M labels."""

    row: np.ndarray
    """int64[M], the index of the row."""
    cls: pa.Array
    state: pa.Array
    notes: list[str] = field(default_factory=list)


def read_features(schema: pa.Schema) -> dict[str, Any]:
    """The features by column, as `datasets` describes them; {} without. Raises ValueError."""
    text = (schema.metadata or {}).get(b"huggingface")
    info = parse_json_object(text).get("info") if text else None
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def class_names(feature: Any) -> list[str]:
    """The names of a ClassLabel, or of the ClassLabels of a list; [] for other features."""
    while isinstance(feature, list | dict):
        if isinstance(feature, list):
            feature = feature[0] if len(feature) == 1 else None
        elif feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            return [str(name) for name in names] if isinstance(names, list) else []
        else:
            feature = feature.get("feature")
    return []


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)


def _normalize(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def choose_columns(
    path: str, schema: pa.Schema, image_column: str | None, labels_column: str | None, negatives_column: str | None
) -> LabelColumns:
    """The columns by the settings, else by features, types and names. Raises DataError if several fit, or none."""
    features = read_features(schema)
    kinds = {column.name: column.type for column in schema}
    for setting in (image_column, labels_column, negatives_column):
        if setting is not None and setting not in kinds:
            raise DataError(f"{path!r} has no column {setting!r}: it has {_shown(schema.names)}; correct the setting")
    image = image_column or _choose_image(path, schema)
    left = [name for name in kinds if name not in (image, negatives_column)]
    labels, classes = labels_column, []
    if labels is None:
        typed = [name for name in left if class_names(features.get(name)) or _is_label_list(kinds[name])]
        named = [
            name
            for name in left
            if _normalize(name) in LABEL_NAMES and (_is_text(kinds[name]) or _is_number(kinds[name]))
        ]
        fitting = typed or named
        if len(fitting) > 1:
            raise DataError(
                f"{path!r} has several columns that may be the labels, {' and '.join(map(repr, fitting))}: set "
                "hf.labels_column to one"
            )
        labels = fitting[0] if fitting else None
    if labels is None:
        classes = [name for name in left if _is_number(kinds[name])]
    if labels is None and not classes:
        raise _no_labels(path, schema)
    unused = [name for name in left if name != labels and name not in classes]
    return LabelColumns(
        image=image, labels=labels, negatives=negatives_column, classes=classes, unused=unused,
        names=class_names(features.get(labels or "")),
    )  # fmt: skip


def _is_label_list(kind: pa.DataType) -> bool:
    return _is_list(kind) and (_is_text(kind.value_type) or _is_number(kind.value_type))


def _choose_image(path: str, schema: pa.Schema) -> str:
    embedded = [column.name for column in schema if is_embedded(column.type)]
    if len(embedded) > 1:
        raise DataError(
            f"{path!r} has several columns of images, {' and '.join(map(repr, embedded))}: set hf.image_column to one"
        )
    texts = {_normalize(column.name): column.name for column in reversed(list(schema)) if _is_text(column.type)}
    name = next((texts[usual] for usual in _PATH_NAMES if usual in texts), None)
    if not embedded and name is None:
        raise DataError(f"{path!r} has no column of images among {_shown(schema.names)}: set hf.image_column")
    return embedded[0] if embedded else name or ""


def _no_labels(path: str, schema: pa.Schema) -> DataError:
    columns = _shown([f"{column.name} ({str(column.type)[:40]})" for column in schema])
    return DataError(
        f"{path!r} has no column of labels among {columns}: set hf.labels_column to one with a class or a list of "
        "classes per image"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def read_labels(path: str, table: pa.Table, columns: LabelColumns, settings: TableSettings) -> ColumnLabels:
    """The labels of all rows. settings: `separator` of texts, and what -1 means.

    Raises DataError for values that are neither classes nor states.
    """
    if columns.labels is None:
        return _read_states(path, table, columns, settings)
    found = _read_classes(path, table, columns.labels, columns.names, settings)
    if columns.negatives is not None:
        absent = _read_classes(path, table, columns.negatives, columns.names, settings)
        found = ColumnLabels(
            row=np.concatenate([found.row, absent.row]),
            cls=pa.concat_arrays([found.cls, absent.cls]),
            state=pa.concat_arrays([found.state, pa.repeat("0", len(absent.row))]),
            notes=[*found.notes, *absent.notes],
        )
    return found


def _read_states(path: str, table: pa.Table, columns: LabelColumns, settings: TableSettings) -> ColumnLabels:
    """A label per cell of the columns with states only; null is not recorded."""
    rows, classes, states, others = [], [], [], []
    for name in columns.classes:
        values = table.column(name).cast(pa.float64(), safe=False).to_numpy()  # null becomes NaN
        row = np.flatnonzero(np.isin(values, (-1, 0, 1)))
        if len(row) < np.count_nonzero(~np.isnan(values)) or not len(row):
            others.append(name)
            continue
        rows.append(row)
        classes.append(pa.repeat(name, len(row)))
        states.append(_states(values[row], settings))
    if not rows:
        raise _no_labels(path, table.schema)
    columns.classes = [name for name in columns.classes if name not in others]
    columns.unused = [*columns.unused, *others]
    return ColumnLabels(row=np.concatenate(rows), cls=pa.concat_arrays(classes), state=pa.concat_arrays(states))


def _states(values: np.ndarray, settings: TableSettings) -> pa.Array:
    """The state of each of the numbers 1, 0 and -1, as in `Records`."""
    texts = [settings.state_of(text) or "" for text in ("-1", "0", "1")]
    return pa.array(texts, pa.string()).take(pa.array(values.astype(np.int8) + 1))


def _read_classes(path: str, table: pa.Table, name: str, names: Sequence[str], settings: TableSettings) -> ColumnLabels:
    """The classes of a column, positive; or the states of a list with one number per class."""
    column = table.column(name)
    if _is_list(column.type):
        value_type = column.type.value_type
        lists = column.cast(pa.large_list(value_type)).combine_chunks()
        lengths = pc.call_function("list_value_length", [lists]).fill_null(0).to_numpy(zero_copy_only=False)
        row = np.repeat(np.arange(len(lists)), lengths)
        values = pc.call_function("list_flatten", [lists])
    elif _is_text(column.type) or _is_number(column.type) or pa.types.is_null(column.type):
        value_type = column.type
        values, row = column.combine_chunks(), np.arange(len(column))
    else:
        raise _wrong_type(path, name, column.type)
    is_set = values.is_valid().to_numpy(zero_copy_only=False)
    if _is_text(value_type):
        row, texts, notes = _split(path, name, row[is_set], values.drop_null().cast(pa.string()), settings, column.type)
        return ColumnLabels(row=row, cls=texts, state=pa.repeat("1", len(row)), notes=notes)
    if not _is_number(value_type) and not pa.types.is_null(value_type):
        raise _wrong_type(path, name, column.type)
    row, numbers = row[is_set], values.drop_null()
    if pa.types.is_floating(value_type):
        fractions = numbers.to_numpy(zero_copy_only=False)
        fractions = fractions[fractions != np.floor(fractions)]
        if len(fractions):
            raise DataError(
                f"{path!r} has the number {fractions[0]} in the column {name!r}: classes are names or whole numbers; "
                "set hf.labels_column to another column"
            )
    numbers = numbers.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if not names and (length := _vector_length(row, numbers)):
        cls = pa.array(map(str, range(length)), pa.string()).take(
            pa.array(np.tile(np.arange(length), len(row) // length))
        )
        note = f"the numbers in {name!r} are a state for each class, not class numbers"
        return ColumnLabels(row=row, cls=cls, state=_states(numbers, settings), notes=[note])
    if pa.types.is_boolean(value_type):
        raise _wrong_type(path, name, column.type)
    is_class = numbers >= 0
    left_out = int((~is_class).sum())
    distinct, codes = np.unique(numbers[is_class], return_inverse=True)
    texts = [names[n] if n < len(names) and are_distinct(names) else str(n) for n in distinct.tolist()]
    return ColumnLabels(
        row=row[is_class],
        cls=pa.array(texts, pa.string()).take(pa.array(codes)),
        state=pa.repeat("1", len(codes)),
        notes=[f"{left_out:,} class numbers below 0 were left out: they mean no class"] if left_out else [],
    )


def _wrong_type(path: str, name: str, kind: pa.DataType) -> DataError:
    return DataError(
        f"{path!r} has {str(kind)[:80]} in the column {name!r}: labels are a class or a list of classes per image; set "
        "hf.labels_column to such a column"
    )


def _vector_length(row: np.ndarray, numbers: np.ndarray) -> int:
    """K if each row has K numbers of -1, 0 and 1, which repeat within a row as class numbers do not; else 0."""
    counts = np.bincount(row)
    counts = counts[counts > 0]
    if not len(counts) or counts.min() != counts.max() or counts[0] < 2 or not np.isin(numbers, (-1, 0, 1)).all():
        return 0
    ordered = np.sort(numbers.reshape(-1, counts[0]), axis=1)
    return int(counts[0]) if (ordered[:, 1:] == ordered[:, :-1]).any() else 0


def _split(
    path: str, name: str, row: np.ndarray, texts: pa.Array, settings: TableSettings, kind: pa.DataType
) -> tuple[np.ndarray, pa.Array, list[str]]:
    """(rows, classes, notes) of texts, each of which may hold several classes, unless they are items of lists."""
    coded = trim(texts).dictionary_encode()
    cells = coded.dictionary.to_pylist()
    separator, notes = settings.separator or NONE, []
    if not _is_list(kind) and settings.separator is None:
        separator = detect_separator(cells)
        if separator is None:
            examples = ", ".join(repr(cell[:60]) for cell in sorted(cells, key=len, reverse=True)[:3])
            raise DataError(
                f"{path!r} has texts in {name!r} that may be one class or several: {examples}. Set hf.separator to "
                f"what joins them (such as ','), to blank, to json, or to {NONE} if each is one class"
            )
        notes = [f"classes in {name!r} are joined by {separator!r}"] if separator != NONE else []
    offsets, classes, bad = split_cells(coded.dictionary, separator)
    if bad.any():
        raise DataError(
            f"{path!r} has {cells[int(np.flatnonzero(bad)[0])][:60]!r} in {name!r}, which is not a list: fix it"
        )
    codes = coded.indices.to_numpy(zero_copy_only=False)
    lengths = np.diff(offsets)[codes]
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(row, lengths), classes.take(pa.array(position + np.repeat(offsets[codes], lengths))), notes


def are_distinct(names: Sequence[str]) -> bool:
    """Whether no two classes have one name."""
    return len(set(names)) == len(names)


def list_classes(path: str, columns: LabelColumns, labels: ColumnLabels) -> ClassList | None:
    """The classes in the order of their numbers or columns; None if they are names without an order."""
    if columns.classes:
        return ClassList(path, list(columns.classes), list(columns.classes))
    if columns.names:
        pa.array(columns.names, pa.string())  # JSON can have text that is not valid Unicode
        known = list(columns.names) if are_distinct(columns.names) else [str(n) for n in range(len(columns.names))]
        return ClassList(path, known, list(columns.names))
    distinct: list[str] = labels.cls.unique().to_pylist()
    if not distinct or not all(cls.isdecimal() for cls in distinct):
        return None
    order = sorted(distinct, key=int)
    return ClassList(path, order, order)
