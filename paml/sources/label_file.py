"""Labels of any data set: a CSV or Parquet file of images and classes, turned into a label table.

The file has either the columns `image,class,state`, a row per label, or `image,labels`, a row per image with its
positive classes separated by semicolons.
"""

import csv
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from paml import storage
from paml.errors import LabelError
from paml.labels.build import LabelReport, LabelSettings, build_from_batches
from paml.labels.class_list import ClassList, read_class_list, write_class_list
from paml.labels.rejects import HEADER
from paml.labels.states import STATE_OF_TEXT
from paml.parsing import parse_errors_as
from paml.sources.folder import is_image, key_of
from paml.sources.parts import KeyRule

_SCHEMA = pa.schema([(name, pa.string()) for name in HEADER])
_BATCH_ROWS = 1 << 16


def build_from_label_file(
    path: str,
    out: str,
    *,
    classes: str | None = None,
    complete: bool = False,
    keys: KeyRule = "name",
    settings: LabelSettings | None = None,
) -> LabelReport:
    """Read the label file `path` and write the label table `out`, with its rejects file next to it.

    path: `.csv` or `.parquet`, local or in S3. `image` is a file name (with or without folders and suffix), `class`
    a class of the list or its name, `state` 1 or 0, or positive or negative. Other columns are ignored.
    classes: a class list (one class per line, or CSV of class and name, in the order of the head); by default the
    classes of the file in sorted order. Either is written to `<out stem>.classes.csv`: pass that for the other splits.
    complete: the `labels` of an image are all it shows, so its other classes are NEGATIVE; by default they are
    UNOBSERVED. keys: as in `folder_parts`, and the same as there.

    Unusable rows are counted by kind and written to `<out stem>.rejects.parquet`, where `Source` is the row's number
    (from 1, without header and empty lines); two labels of one pair are resolved as in `build_label_table`. Raises
    LabelError for a file with other columns, a name that several classes have, two images with the same key, and as
    `build_label_table`.
    """
    bad_lines: list[str] = []
    table = _read_file(path, bad_lines)
    if complete and "labels" not in table.column_names:
        raise LabelError(f"{path!r} has a row per label: complete is only for files with a column `labels`")
    batches = table.to_batches(max_chunksize=_BATCH_ROWS)
    class_path = f"{os.path.splitext(out)[0]}.classes.csv"
    if classes is None:
        names = sorted({cls for batch in batches for cls in _classes_in(batch)})
        class_list = ClassList(class_path, names, names)
    else:
        class_list = read_class_list(classes)
    if not class_list.classes:
        raise LabelError(f"{path!r} has no class: fill in its column {table.column_names[1]!r}")
    write_class_list(class_path, class_list.classes, class_list.names)
    key_rule = partial(_key_of, rule=keys)
    _check_unique(path, table["image"].unique(), key_rule)
    first_rows = itertools.accumulate((batch.num_rows for batch in batches), initial=1)
    all_classes = class_list.classes if complete else None
    annotations = map(
        partial(_to_annotations, key_rule=key_rule, class_of=_class_translator(class_list), all_classes=all_classes),
        batches,
        first_rows,
    )
    return build_from_batches(path, annotations, bad_lines, class_list, out, settings=settings)


def _read_file(path: str, bad_lines: list[str]) -> pa.Table:
    """The needed columns as text without nulls; lines that are not rows are added to `bad_lines`, with the reason."""
    if not storage.exists(path):
        raise LabelError(f"there is no label file {path!r}: name an existing file")
    is_parquet = path.endswith(".parquet")
    hint = "use Parquet of text or numbers" if is_parquet else "use CSV with commas, in UTF-8"

    def skip_bad_line(row: Any) -> str:
        bad_lines.append(f"{row.actual_columns} columns, expected {row.expected_columns}: {row.text}")
        return "skip"

    with storage.open_input(path) as file, parse_errors_as(path, hint, LabelError, (csv.Error, OSError)):
        if is_parquet:
            parquet = pq.ParquetFile(file)
            columns = _choose_columns(path, parquet.schema_arrow.names)
            table = parquet.read(columns)
        else:
            first = file.read(1 << 16).decode("utf-8-sig", "replace").splitlines()
            columns = _choose_columns(path, next(csv.reader(first[:1]), []))
            file.seek(0)
            table = pacsv.read_csv(
                file,
                pacsv.ReadOptions(use_threads=False),
                pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip_bad_line),
                pacsv.ConvertOptions(
                    include_columns=columns,
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=False,
                ),
            )
        return pa.table({name: _as_text(table[name]) for name in columns})


def _choose_columns(path: str, names: Sequence[str]) -> list[str]:
    """The columns to read. Raises LabelError if the file has neither set of them."""
    for required in (["image", "class", "state"], ["image", "labels"]):
        if set(required) <= set(names):
            return required
    raise LabelError(
        f"{path!r} has the columns {', '.join(names) or 'none'}; expected image,class,state (a row per label) or "
        "image,labels (a row per image, its classes separated by semicolons): name them in the first line"
    )


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = column.cast(pa.string()).fill_null("")
    text.validate(full=True)  # Parquet does not guarantee that text is valid UTF-8
    return pc.call_function("utf8_trim_whitespace", [text])


def _split_labels(batch: pa.RecordBatch) -> tuple[pa.Array, np.ndarray]:
    """(class, row) of each class in the column `labels`; empty ones are skipped."""
    lists = pc.call_function("split_pattern", [batch["labels"]], pc.SplitPatternOptions(";"))
    texts = pc.call_function("utf8_trim_whitespace", [lists.flatten()])
    rows = pc.call_function("list_parent_indices", [lists]).to_numpy()
    not_empty = pc.call_function("not_equal", [texts, pa.scalar("")])
    return texts.filter(not_empty), rows[not_empty.to_numpy(zero_copy_only=False)]


def _classes_in(batch: pa.RecordBatch) -> set[str]:
    texts = _split_labels(batch)[0] if "labels" in batch.schema.names else batch["class"]
    return set(texts.unique().to_pylist()) - {""}


def _to_annotations(
    batch: pa.RecordBatch,
    first_row: int,
    *,
    key_rule: Callable[[str], str],
    class_of: Callable[[str], str],
    all_classes: Sequence[str] | None,
) -> pa.RecordBatch:
    """The labels of some rows, in the columns of HEADER."""
    keys = _map_distinct(batch["image"], key_rule)
    if "labels" in batch.schema.names:
        texts, rows = _split_labels(batch)
        cls, state = _map_distinct(texts, class_of), np.ones(len(rows), np.int64)
        if all_classes is not None:
            cls, rows, state = _add_negatives(cls, rows, batch.num_rows, all_classes)
        confidence: pa.Array = pa.array(["0", "1"]).take(pa.array(state))
    else:
        rows = np.arange(batch.num_rows)
        cls = _map_distinct(batch["class"], class_of)
        confidence = _map_distinct(batch["state"], lambda text: str(STATE_OF_TEXT.get(text.lower(), text)))
    number = pc.call_function(
        "binary_join_element_wise", [pa.scalar("row"), pa.array(rows + first_row).cast(pa.string()), pa.scalar(" ")]
    )
    return pa.RecordBatch.from_arrays([keys.take(pa.array(rows)), number, cls, confidence], schema=_SCHEMA)


def _add_negatives(
    cls: pa.Array, rows: np.ndarray, num_rows: int, classes: Sequence[str]
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(class, row, state) of all positives, then of each class that a row does not list."""
    index = pc.call_function("index_in", [cls], pc.SetLookupOptions(pa.array(classes, pa.string())))
    index = index.fill_null(-1).to_numpy(zero_copy_only=False)
    positive = np.zeros((num_rows, len(classes)), bool)
    positive[rows[index >= 0], index[index >= 0]] = True
    negative_rows, negatives = np.nonzero(~positive)
    state = np.concatenate([np.ones(len(rows), np.int64), np.zeros(len(negatives), np.int64)])
    all_cls = pa.concat_arrays([cls, pa.array(classes, pa.string()).take(pa.array(negatives))])
    return all_cls, np.concatenate([rows, negative_rows]), state


def _map_distinct(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """`change` of each text, called once per distinct text."""
    coded = texts.dictionary_encode()
    return pa.array([change(text) for text in coded.dictionary.to_pylist()], pa.string()).take(coded.indices)


def _key_of(image: str, rule: KeyRule) -> str:
    if is_image(image):
        return key_of(image, rule)
    return image.rsplit("/", 1)[-1] if rule == "name" else image


def _check_unique(path: str, images: pa.Array, key_rule: Callable[[str], str]) -> None:
    """Raise LabelError if two images have the same key: their labels would be mixed."""
    image_of: dict[str, str] = {}
    for image in images.to_pylist():
        key = key_rule(image)
        if image_of.setdefault(key, image) != image:
            raise LabelError(
                f"{path!r} lists the images {image_of[key]!r} and {image!r}, which have the same key {key!r}: set keys "
                "to 'path', here and for the images, or rename one"
            )


def _class_translator(class_list: ClassList) -> Callable[[str], str]:
    """A function from a class or its name to the class; other texts are unchanged, to be rejected."""
    classes = set(class_list.classes)
    classes_of: dict[str, list[str]] = {}
    for cls, name in zip(class_list.classes, class_list.names, strict=True):
        classes_of.setdefault(name, []).append(cls)

    def translate(text: str) -> str:
        named = classes_of.get(text, [])
        if text in classes or not named:
            return text
        if len(named) > 1:
            raise LabelError(
                f"{len(named)} classes are named {text!r} ({', '.join(named)}): use the class, not its name"
            )
        return named[0]

    return translate
