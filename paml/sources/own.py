"""One's own labels: a CSV or Parquet file that says which image shows what, turned into a label table.

The images themselves are a folder or a bucket: `folder_parts`. The file has either the columns `image,class,state`,
a row a label, or `image,labels`, a row an image with its positive classes between semicolons.
"""

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from paml import storage
from paml.labels import LabelError, LabelReport, LabelSettings, build_label_table
from paml.labels.build import HEADER, read_classes
from paml.reading import reading
from paml.sources.folder import KeyRule, is_image, key_of

_STATES = {"1": "1", "1.0": "1", "true": "1", "positive": "1", "0": "0", "0.0": "0", "false": "0", "negative": "0"}
_SCHEMA = pa.schema([(name, pa.string()) for name in HEADER])
_BATCH_ROWS = 1 << 16


def own_labels(
    path: str,
    out: str,
    *,
    classes: str | None = None,
    complete: bool = False,
    keys: KeyRule = "name",
    settings: LabelSettings | None = None,
) -> LabelReport:
    """Read the label file `path` and write the label table `out`, with its rejects file beside it.

    path: `.csv` or `.parquet`, local or in S3. `image` is a file name (with or without folders and suffix), `class`
    a class of the list or its name, `state` 1 or 0, or positive or negative. Further columns are not read.
    classes: a class list (one class a line, or CSV of class and name, in the order of the head); without one, the
    classes of the file in sorted order. Either is stored as `<out stem>.classes.csv`: give that for the other splits.
    complete: the `labels` of each image are all that it shows, so that the others are NEGATIVE; by default they are
    UNOBSERVED. keys: as in `folder_parts`, and the same as there.

    Rows that cannot be used are counted by kind and written to `<out stem>.rejects.parquet`, where `Source` gives
    the row's number (from 1, header and empty lines not counted); two labels of one pair are settled as in
    `build_label_table`. Raises LabelError for a file of other columns, a name that several classes have, two
    images that would share a key, and as `build_label_table`.
    """
    columns = _columns_of(path)
    if complete and "labels" not in columns:
        raise LabelError(f"{path!r} states each label by itself: complete is only for a column `labels`")
    stem = os.path.splitext(out)[0]
    class_path = f"{stem}.classes.csv"
    bad_lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="paml-own-") as folder:
        if classes is None:
            mids = sorted({cls for batch in _batches(path, columns, []) for cls in _classes_in(batch)})
            rows = [(mid, mid) for mid in mids]
        else:
            rows = _class_rows(classes)
            mids = [mid for mid, _ in rows]
        if not mids:
            raise LabelError(f"{path!r} names no class at all: fill in its column {columns[1]!r}")
        storage.write_bytes(class_path, _csv_bytes(rows))
        translate = _translator(rows)
        annotations = os.path.join(folder, f"{os.path.splitext(os.path.basename(path))[0]}.annotations.csv")
        images = _Images(keys)
        quoted = pacsv.WriteOptions(include_header=False, quoting_style="all_valid")
        with open(annotations, "wb") as file:
            file.write((",".join(HEADER) + "\n").encode())
            with pacsv.CSVWriter(file, _SCHEMA, write_options=quoted) as writer:
                first_row = 1
                for batch in _batches(path, columns, bad_lines):
                    writer.write_batch(_as_annotations(batch, first_row, images, translate, mids if complete else None))
                    first_row += batch.num_rows
            file.write(_csv_bytes([(line,) for line in bad_lines]))  # one field each: the parser rejects and keeps them
        images.check(path)
        return build_label_table(annotations, class_path, out, descriptions=class_path, settings=settings)


def _columns_of(path: str) -> list[str]:
    """The columns to read. Raises LabelError where the file has neither set of them."""
    if path.endswith(".parquet"):
        with storage.open_input(path) as file, _reading(path):
            found = pq.ParquetFile(file).schema_arrow.names
    else:
        with storage.open_input(path) as file:
            first = file.read(1 << 16).decode("utf-8-sig", "replace").splitlines()
        with _reading(path):
            found = next(csv.reader(first[:1]), [])
    for wanted in (["image", "class", "state"], ["image", "labels"]):
        if set(wanted) <= set(found):
            return wanted
    raise LabelError(
        f"{path!r} has the columns {', '.join(found) or 'none'}; expected are image,class,state (a row a label) or "
        "image,labels (a row an image, its classes between semicolons): name them so in the first line"
    )


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    kind = "Parquet of text or numbers" if path.endswith(".parquet") else "CSV with commas, in UTF-8"
    with reading(path, f"expected is {kind}", LabelError, (csv.Error, OSError)):
        yield


def _batches(path: str, columns: Sequence[str], bad_lines: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted columns as text, nothing null; lines that are no rows go to `bad_lines`, with the reason."""
    with storage.open_input(path) as file:
        if path.endswith(".parquet"):
            with _reading(path):
                batches = pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=list(columns))
            while True:
                with _reading(path):
                    batch = next(batches, None)
                    text = None if batch is None else _as_text(batch, columns)
                if text is None:
                    return
                yield text

        def keep(row: Any) -> str:
            bad_lines.append(f"{row.actual_columns} columns where {row.expected_columns} are expected: {row.text}")
            return "skip"

        parse = pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=keep)
        convert = pacsv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
        )
        try:
            with pacsv.open_csv(file, parse_options=parse, convert_options=convert) as reader:
                for batch in reader:
                    yield _as_text(batch, columns)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise LabelError(f"{path!r} cannot be read ({error}): expected is CSV with commas, in UTF-8") from error


def _as_text(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    texts = []
    for name in columns:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        text = column.cast(pa.string()).fill_null("")
        text.validate(full=True)  # Parquet says of any bytes that they are text
        texts.append(pc.call_function("utf8_trim_whitespace", [text]))
    return pa.RecordBatch.from_arrays(texts, list(columns))


def _split_labels(batch: pa.RecordBatch) -> tuple[pa.Array, np.ndarray]:
    """The classes that the rows name, and the row of each; empty ones are none."""
    lists = pc.call_function("split_pattern", [batch["labels"]], pc.SplitPatternOptions(";"))
    texts = pc.call_function("utf8_trim_whitespace", [lists.flatten()])
    rows = pc.call_function("list_parent_indices", [lists]).to_numpy()
    some = pc.call_function("not_equal", [texts, pa.scalar("")])
    return texts.filter(some), rows[some.to_numpy(zero_copy_only=False)]


def _classes_in(batch: pa.RecordBatch) -> set[str]:
    texts = _split_labels(batch)[0] if "labels" in batch.schema.names else batch["class"]
    return set(texts.unique().to_pylist()) - {""}


def _as_annotations(
    batch: pa.RecordBatch,
    first_row: int,
    images: "_Images",
    translate: Callable[[str], str],
    all_classes: Sequence[str] | None,
) -> pa.RecordBatch:
    """The labels of some rows as rows of an annotation file, in the columns of HEADER."""
    image = images.keys_of(batch["image"])
    if "labels" in batch.schema.names:
        texts, rows = _split_labels(batch)
        cls, state = _mapped(texts, translate), np.ones(len(rows), np.int64)
        if all_classes is not None:
            cls, rows, state = _with_negatives(cls, rows, batch.num_rows, all_classes)
        confidence: pa.Array = pa.array(["0", "1"]).take(pa.array(state))
    else:
        rows = np.arange(batch.num_rows)
        cls = _mapped(batch["class"], translate)
        confidence = _mapped(batch["state"], lambda text: _STATES.get(text.lower(), text))
    number = pc.call_function(
        "binary_join_element_wise", [pa.scalar("row"), pa.array(rows + first_row).cast(pa.string()), pa.scalar(" ")]
    )
    return pa.RecordBatch.from_arrays([image.take(pa.array(rows)), number, cls, confidence], schema=_SCHEMA)


def _with_negatives(
    cls: pa.Array, rows: np.ndarray, num_rows: int, classes: Sequence[str]
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(class, row, state) of all that the rows name, then of each class of the list that a row does not name."""
    index = pc.call_function("index_in", [cls], pc.SetLookupOptions(pa.array(classes, pa.string())))
    index = index.fill_null(-1).to_numpy(zero_copy_only=False)
    shown = np.zeros((num_rows, len(classes)), bool)
    shown[rows[index >= 0], index[index >= 0]] = True
    other_rows, others = np.nonzero(~shown)
    state = np.concatenate([np.ones(len(rows), np.int64), np.zeros(len(others), np.int64)])
    whole = pa.concat_arrays([cls, pa.array(classes, pa.string()).take(pa.array(others))])
    return whole, np.concatenate([rows, other_rows]), state


def _mapped(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """`change` of each text, called once for each that differs."""
    coded = texts.dictionary_encode()
    return pa.array([change(text) for text in coded.dictionary.to_pylist()], pa.string()).take(coded.indices)


class _Images:
    """Names of images and their keys."""

    def __init__(self, rule: KeyRule) -> None:
        self._rule: KeyRule = rule
        self._seen: list[pa.Array] = []

    def keys_of(self, images: pa.Array) -> pa.Array:
        self._seen.append(images.unique())
        return _mapped(images, self._key_of)

    def _key_of(self, image: str) -> str:
        if is_image(image):
            return key_of(image, self._rule)
        return image.rsplit("/", 1)[-1] if self._rule == "name" else image

    def check(self, path: str) -> None:
        """Raises LabelError where two images have one key: their labels would be mixed."""
        if not self._seen:
            return
        images = pa.concat_arrays(self._seen).unique()
        keys = _mapped(images, self._key_of).dictionary_encode()
        counts = np.bincount(keys.indices.to_numpy(), minlength=len(keys.dictionary))
        if (counts > 1).any():
            shared = int(np.argmax(counts > 1))
            both = [images[int(place)].as_py() for place in np.flatnonzero(keys.indices.to_numpy() == shared)[:2]]
            raise LabelError(
                f"{path!r} names the images {both[0]!r} and {both[1]!r}, which both have the key "
                f"{keys.dictionary[shared].as_py()!r}: set keys to 'path', here and for the images, or rename one"
            )


def _class_rows(path: str) -> list[tuple[str, str]]:
    """(class, name) of a class list; the name is the class itself where the list has none."""
    mids = read_classes(path)
    text = storage.read_bytes(path).decode("utf-8-sig")  # read_classes has read it as such
    names = {row[0].strip(): row[1].strip() for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1}
    return [(mid, names.get(mid) or mid) for mid in mids]


def _translator(rows: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """What turns a class or its name into the class; what is neither stays, to be rejected."""
    mids = {mid for mid, _ in rows}
    by_name: dict[str, list[str]] = {}
    for mid, name in rows:
        by_name.setdefault(name, []).append(mid)

    def translate(text: str) -> str:
        named = by_name.get(text, [])
        if text in mids or not named:
            return text
        if len(named) > 1:
            raise LabelError(f"{len(named)} classes are named {text!r} ({', '.join(named)}): write the class itself")
        return named[0]

    return translate


def _csv_bytes(rows: Sequence[Sequence[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()
